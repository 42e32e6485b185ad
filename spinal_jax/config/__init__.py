"""Configuration as frozen records, and a strict `build` that turns a plain mapping into them.

Field names are the command line's override names: `metrics.contraction.window=[0.1,0.5]` is
`AuditConfig.metrics.contraction.window`. Values are checked where they are declared, so that a record that exists is
valid.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

from spinal_jax.data.packing import Positions
from spinal_jax.errors import UserError

T = TypeVar("T")


def require(condition: bool, path: str, value: object, right: str) -> None:
    """UserError, unless `condition`: the setting `path` is `value`, and takes what `right` says."""
    if not condition:
        raise UserError(f"{path} is {value!r}; it takes {right}")


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint, and how it computes."""

    source: str  # hub id, folder with config.json and safetensors, .gguf file, converted folder, or random:SIZE@SEED
    revision: str | None = None  # of a hub id
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and forward; statistics are float32 or better
    name: str | None = None  # shown in reports; default: from the source
    ignore_keys: tuple[str, ...] = ()  # config.json keys that you know change nothing

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "model.source", self.source, "a hub id, a folder or a .gguf file")


@dataclass(frozen=True)
class PromptsConfig:
    """Which prompts."""

    path: str | None = None  # null: the pool that ships with the package
    format: Literal["jsonl", "hh", "text", "world"] = "jsonl"
    field: str = "prompt"  # of a jsonl row
    limit: int | None = None  # rows
    offset: int = 0  # rows
    max_length: int = 256  # tokens; of longer prompts the last ones are kept
    chat_template: bool = False

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, "prompts.limit", self.limit, "a number above 0, or null for all")
        require(self.offset >= 0, "prompts.offset", self.offset, "0 or more rows to pass over")
        require(self.max_length > 1, "prompts.max_length", self.max_length, "2 or more tokens")


@dataclass(frozen=True)
class PreferencesConfig:
    """Which preference pairs; `sft` trains on the chosen responses."""

    path: str | None = None
    format: Literal["hh", "jsonl", "world"] = "hh"
    limit: int | None = None  # rows, or pairs of the world
    offset: int = 0  # rows to pass over
    held_out: int = 0  # last rows, kept from training and used to evaluate
    max_length: int = 256  # tokens of prompt and response
    overlong: Literal["drop", "cut_prompt"] = "drop"
    chat_template: bool = False
    separability: float = 1.0  # of the world's pairs: share in which the two responses differ in style
    label_noise: float = 0.0  # probability that chosen and rejected change places, in training
    shuffle_labels: bool = False  # they do so by the toss of a coin: the null control
    seed: int = 0  # of the world and of the labels

    def __post_init__(self) -> None:
        right = "the path of a file" if self.format != "world" else "null: the world is generated"
        require((self.path is None) == (self.format == "world"), "preferences.path", self.path, right)
        require(self.limit is None or self.limit > 0, "preferences.limit", self.limit, "a number above 0, or null")
        require(self.offset >= 0, "preferences.offset", self.offset, "0 or more rows to pass over")
        require(self.held_out >= 0, "preferences.held_out", self.held_out, "0 or more rows")
        require(self.max_length > 2, "preferences.max_length", self.max_length, "3 or more tokens")
        for name in ("separability", "label_noise"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"preferences.{name}", value, "a number from 0 to 1")


@dataclass(frozen=True)
class ContractionConfig:
    """How fast the tail of a layer's spectrum decays: `metrics.contraction`."""

    window: tuple[float, float] = (0.10, 0.50)  # of the numerical rank
    skip: int = 1  # first tokens of each sequence that do not count: attention sinks
    center: bool = False

    def __post_init__(self) -> None:
        low, high = self.window
        right = "two fractions [lo, hi] with 0 <= lo < hi <= 1"
        require(0 <= low < high <= 1, "metrics.contraction.window", list(self.window), right)
        require(self.skip >= 0, "metrics.contraction.skip", self.skip, "0 or more tokens")


@dataclass(frozen=True)
class TransportConfig:
    """How far the token distribution moves between layers: `metrics.transport`."""

    positions: str = "last:4"
    temperature: float = 1.0
    top_k: int | None = None  # null: exact over the vocabulary

    def __post_init__(self) -> None:
        Positions.parse(self.positions)
        require(self.temperature > 0, "metrics.transport.temperature", self.temperature, "a number above 0")
        require(self.top_k is None or self.top_k > 0, "metrics.transport.top_k", self.top_k, "null or a number above 0")


@dataclass(frozen=True)
class VariantsConfig:
    """Other settings that the same pass is measured under, kept in the trace's arrays: `metrics.variants`."""

    center: bool = True  # contraction with the mean row subtracted
    skip: tuple[int, ...] = ()  # contraction that skips so many tokens instead
    positions: tuple[str, ...] | None = None  # transport at last:K alone; null: 1, 2 and 4 where the setting has more
    groups: bool = False  # contraction without each group too, for intervals: each costs as the spectra themselves

    def __post_init__(self) -> None:
        for skip in self.skip:
            require(skip >= 0, "metrics.variants.skip", list(self.skip), "numbers of tokens, 0 or more")
        for text in self.positions or ():
            right = "a list of last:K, K a whole number above 0"
            kind, _, count = text.partition(":")
            good = kind == "last" and count.isascii() and count.isdigit() and int(count) > 0
            require(good, "metrics.variants.positions", list(self.positions or ()), right)


@dataclass(frozen=True)
class MetricsConfig:
    """What is measured."""

    contraction: ContractionConfig = field(default_factory=ContractionConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    groups: int = 16  # of prompts, for the jackknife
    variants: VariantsConfig = field(default_factory=VariantsConfig)

    def __post_init__(self) -> None:
        require(2 <= self.groups <= 1024, "metrics.groups", self.groups, "a number from 2 to 1024")
        for last in self.lasts:
            right = f"last:K of fewer tokens than metrics.transport.positions={self.transport.positions} measures"
            require(self._has(last), "metrics.variants.positions", list(self.variants.positions or ()), right)

    @property
    def lasts(self) -> tuple[int, ...]:
        """The K of each variant `last:K` of transport's positions."""
        if self.variants.positions is None:
            return tuple(k for k in (1, 2, 4) if self._has(k))
        return tuple(int(text.removeprefix("last:")) for text in self.variants.positions)

    def _has(self, last: int) -> bool:
        """Whether the last `last` tokens are some of those that transport measures."""
        base = Positions.parse(self.transport.positions)
        return base.kind == "all" or (base.kind == "last" and last < base.count)


@dataclass(frozen=True)
class ParallelConfig:
    """How devices share the work: data x fsdp x tensor; -1 takes the devices that are left."""

    data: int = -1  # rows of a batch
    fsdp: int = 1  # rows of a batch, and parameters
    tensor: int = 1  # parameters: heads, inner features, vocabulary

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"parallel.{name}", size, "a number above 0, or -1 for what is left")
        require(list(sizes.values()).count(-1) < 2, "parallel", sizes, "-1 for one axis at most")


@dataclass(frozen=True)
class AuditParallelConfig(ParallelConfig):
    """How devices share an audit: `parallel`."""

    backend: Literal["auto", "mesh", "pmap"] = "auto"  # pmap: a whole model on each device; auto: by device and memory
    coordinator: str | None = None  # HOST:PORT where process 0 of several listens; auto: SLURM or a TPU pod says
    processes: int | None = None  # that share the run
    process: int | None = None  # which of them this is, from 0
    start_timeout: int = 300  # seconds in which all of them must have started

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.backend != "pmap" or (self.fsdp == 1 and self.tensor == 1)
        right = "mesh where parallel.fsdp or parallel.tensor split the model"
        require(whole, "parallel.backend", self.backend, right)
        alone = self.backend != "pmap" or self.coordinator is None
        require(alone, "parallel.backend", self.backend, "auto or mesh where several processes share the run")
        require(self.start_timeout > 0, "parallel.start_timeout", self.start_timeout, "a number of seconds above 0")
        if self.coordinator is None or self.coordinator == "auto":
            right = "null unless parallel.coordinator is HOST:PORT"
            require(self.processes is None, "parallel.processes", self.processes, right)
            require(self.process is None, "parallel.process", self.process, right)
            return
        host, _, port = self.coordinator.rpartition(":")
        good = bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
        require(good, "parallel.coordinator", self.coordinator, "HOST:PORT of process 0, auto, or null for one process")
        right = "how many processes share the run, where parallel.coordinator is HOST:PORT"
        require(self.processes is not None and self.processes > 0, "parallel.processes", self.processes, right)
        right = f"which process this is, from 0 to {(self.processes or 1) - 1}"
        require(
            self.process is not None and 0 <= self.process < (self.processes or 1),
            "parallel.process",
            self.process,
            right,
        )

    @property
    def default(self) -> bool:
        """Whether no size was given."""
        return (self.data, self.fsdp, self.tensor) == (-1, 1, 1)


@dataclass(frozen=True)
class AuditConfig:
    """`spinal audit`."""

    model: ModelConfig
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallel: AuditParallelConfig = field(default_factory=AuditParallelConfig)
    batch_tokens: int | None = None  # tokens computed at a time; null: by device
    checkpoint_every: int | None = None  # batches between saves, from which a killed run goes on; null: none
    overwrite: bool = False  # replace a complete run

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "null or above 0")
        alone = self.checkpoint_every is None or self.parallel.coordinator is None
        require(alone, "checkpoint_every", self.checkpoint_every, "null where several processes share the run")


@dataclass(frozen=True)
class ComparedConfig:
    """One of two checkpoints to compare: the run folder of its audit, or the checkpoint itself."""

    trace: str | None = None  # run folder of an audit
    source: str | None = None  # hub id, folder with config.json and safetensors, .gguf file, or converted folder
    revision: str | None = None  # of a hub id
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and forward; statistics are float32 or better
    name: str | None = None  # shown in reports; default: from the source
    ignore_keys: tuple[str, ...] = ()  # config.json keys that you know change nothing


@dataclass(frozen=True)
class ScoreConfig:
    """Weights of the parts of the SPINALScore: `score`."""

    delta: float = 1 / 3  # of Delta_align
    coherence: float = 1 / 3  # of the aligned model's coherence
    gradient: float = 1 / 3  # of the terminal block's share of the preference gradient

    def __post_init__(self) -> None:
        for name in ("delta", "coherence", "gradient"):
            require(getattr(self, name) >= 0, f"score.{name}", getattr(self, name), "a weight of 0 or more")


@dataclass(frozen=True)
class AssertConfig:
    """What the evidence must show, or the command ends with exit code 3: `assert`."""

    verdict: Literal["contraction", "expansion", "no detectable change"] | None = None
    delta_align_low: float | None = None  # the 95 % interval of Delta_align begins here or above
    delta_align_high: float | None = None  # the 95 % interval of Delta_align ends here or below
    p_value: float | None = None  # at most
    spinal_score_low: float | None = None  # the 95 % interval of the SPINALScore begins here or above
    holds: float | None = None  # least share of the settings in which the sign of Delta_align holds

    def __post_init__(self) -> None:
        for name in ("p_value", "holds"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"assert.{name}", value, "null or a number from 0 to 1")


@dataclass(frozen=True)
class CompareConfig:
    """`spinal compare`."""

    model: ComparedConfig
    reference: ComparedConfig
    others: tuple[str, ...] = ()  # more run folders, to be ranked with the model
    other_references: tuple[str, ...] = ()  # one for each of them; none: the reference
    names: tuple[str, ...] = ()  # how the model and each of others are called; none: as their traces say
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    preferences: PreferencesConfig | None = None  # pairs for the preference gradient; null: without it
    beta: float = 0.1  # of the DPO loss whose gradient that is
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    align: Literal["equal", "relative"] = "equal"
    same_prompts: bool = True
    score: ScoreConfig = field(default_factory=ScoreConfig)
    assert_: AssertConfig = field(default_factory=AssertConfig)
    parallel: AuditParallelConfig = field(default_factory=AuditParallelConfig)
    batch_tokens: int | None = None  # tokens computed at a time; null: by device
    overwrite: bool = False  # replace a complete run

    def __post_init__(self) -> None:
        for name in ("model", "reference"):
            side: ComparedConfig = getattr(self, name)
            if (side.trace is None) == (side.source is None):
                both = f"{name}.trace is {side.trace!r} and {name}.source is {side.source!r}; give one of them"
                neither = f"{name} is missing; give {name}.trace=RUN of an audit, or {name}.source=CHECKPOINT"
                raise UserError(neither if side.trace is None else both)
        sources = self.model.source is not None, self.reference.source is not None
        if any(sources) and not all(sources):
            kind, other = ("source", "trace") if self.model.source is not None else ("trace", "source")
            one, two = getattr(self.model, kind), getattr(self.reference, other)
            raise UserError(f"model.{kind} is {one!r} but reference.{other} is {two!r}; give both alike")
        right = "null with saved traces: the preference gradient needs both models (model.source, reference.source)"
        require(self.preferences is None or all(sources), "preferences", "given", right)
        coordinator = self.parallel.coordinator
        right = "null with saved traces: comparing them takes one process"
        require(coordinator is None or all(sources), "parallel.coordinator", coordinator, right)
        right = "null with preferences: their gradient is taken by one process"
        require(coordinator is None or self.preferences is None, "parallel.coordinator", coordinator, right)
        require(self.beta > 0, "beta", self.beta, "a number above 0")
        right = "as many folders as others, or none"
        fits = len(self.other_references) in (0, len(self.others))
        require(fits, "other_references", list(self.other_references), right)
        right = "a name for the model and one for each of others, or none"
        require(len(self.names) in (0, 1 + len(self.others)), "names", list(self.names), right)


@dataclass(frozen=True)
class SourceConfig:
    """Which checkpoint, and in which dtype it is written again."""

    source: str  # hub id, folder with config.json and safetensors, .gguf file, or converted folder
    revision: str | None = None  # of a hub id
    dtype: Literal["float32", "bfloat16"] | None = None  # of what is written; null: as the source has it
    name: str | None = None  # not used here; ready-made models state it
    ignore_keys: tuple[str, ...] = ()  # config.json keys that you know change nothing

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "model.source", self.source, "a hub id, a folder or a .gguf file")


@dataclass(frozen=True)
class ConvertConfig:
    """`spinal convert`."""

    model: SourceConfig
    out: str  # folder to write
    overwrite: bool = False  # replace a checkpoint that was written there before


@dataclass(frozen=True)
class ExportConfig:
    """`spinal export`."""

    model: SourceConfig
    out: str  # folder to write
    shard_gb: float = 5.0  # 10^9 bytes of tensors in a file, at most
    overwrite: bool = False  # replace a checkpoint that was written there before

    def __post_init__(self) -> None:
        require(self.shard_gb > 0, "shard_gb", self.shard_gb, "a number of gigabytes above 0")


@dataclass(frozen=True)
class VerifyConfig:
    """`spinal verify`."""

    model: ModelConfig
    prompts: PromptsConfig = field(default_factory=lambda: PromptsConfig(limit=4, max_length=64))
    tolerance: float | None = None  # relative error of residuals and logits; null: 1e-4, 2e-4 with experts
    kl_tolerance: float = 1e-5  # nats, from PyTorch's distribution to ours, at any position

    def __post_init__(self) -> None:
        right = "float32 here: rounding to bfloat16 would hide what is to be found"
        require(self.model.dtype == "float32", "model.dtype", self.model.dtype, right)
        require(self.tolerance is None or self.tolerance > 0, "tolerance", self.tolerance, "null or a number above 0")
        require(self.kl_tolerance > 0, "kl_tolerance", self.kl_tolerance, "a number of nats above 0")


def to_mapping(config: Any) -> dict[str, Any]:
    """The record as plain nested dictionaries and lists, as it goes into manifest.json."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k.removesuffix("_"): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


def build(record: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A `record` from nested mappings. UserError names the dotted path of an unknown, missing or mistyped key."""
    hints = typing.get_type_hints(record)
    known = {_key(f): f for f in fields(record)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(
                f"there is no setting {_join(path, key)}; there are {', '.join(_join(path, k) for k in known)}"
            )
    chosen = {}
    for name, declared in known.items():
        if name in values:
            chosen[declared.name] = _value(hints[declared.name], values[name], _join(path, name))
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise UserError(f"{_join(path, name)} is missing; give {_join(path, name)}=...")
    return record(**chosen)


def _key(declared: Field[Any]) -> str:
    """What users call a field: one that is a keyword of Python, such as assert, ends with an underscore here."""
    return declared.name.removesuffix("_")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` as what the annotation says, or UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        listed = isinstance(value, (list, tuple))
        return _value(next((a for a in kinds if (typing.get_origin(a) is tuple) == listed), kinds[0]), value, path)
    if is_dataclass(hint):
        require(isinstance(value, Mapping), path, value, f"settings such as {path}.{fields(hint)[0].name}")
        return build(typing.cast(type, hint), value, path)
    if origin is Literal:
        require(value in arguments, path, value, " or ".join(map(str, arguments)))
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), path, value, "a list")
        if arguments[-1] is Ellipsis:
            return tuple(_value(arguments[0], v, path) for v in value)
        require(len(value) == len(arguments), path, value, f"a list of {len(arguments)}")
        return tuple(_value(a, v, path) for a, v in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    require(isinstance(value, hint) and not (hint is int and isinstance(value, bool)), path, value, names[hint])
    return value
