"""Between a checkpoint's tensors and ours: the rules a family states once, and the loader that applies them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.formats.base import Bounds, Checkpoint, ReadsParts
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.progress import Advance

SplitTensor = Callable[[np.ndarray, DecoderConfig], Sequence[np.ndarray]]
JoinTensor = Callable[[Sequence[np.ndarray], DecoderConfig], np.ndarray]
Placing = Callable[[str, tuple[int, ...]], Sharding]  # where a parameter lies, by its path and shape

# A router's correction bias decides which experts run; DeepSeek-V3 keeps it in float32 beside bfloat16 weights.
KEEP_FLOAT32, FLOAT32 = ".correction", np.dtype(np.float32)


def as_it_is(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
    """The tensor is the parameter."""
    return (tensor,)


@dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor name and where it lives with us.

    `hf` may hold `{i}`, the block, and `{e}`, an expert or whatever else has tensors of its own within a block.
    `ours` are parameter paths; those that start with `block.` are stacked over depth, and with `{e}` in `hf` over that
    behind it. `split` turns the tensor into one array for each path, `join` back, bit for bit; both default to the
    identity on a single path. Where the tensor has not the shape to be split, `split` raises ValueError.
    """

    hf: str
    ours: tuple[str, ...]
    split: SplitTensor = as_it_is
    join: JoinTensor = lambda parts, config: parts[0]


def same(hf: str, ours: str) -> Rule:
    """The tensor is ours as it lies."""
    return Rule(hf, (ours,))


def scalar(hf: str, ours: str) -> Rule:
    """A single number that is saved without an axis."""
    return Rule(hf, (ours,), lambda t, c: (t.reshape(1),), lambda p, c: p[0].reshape(()))


def linear(hf: str, ours: str, bias: bool) -> list[Rule]:
    """Weight, and bias where the family has one, of a linear layer or a norm."""
    return [same(f"{hf}.weight", f"{ours}.weight")] + ([same(f"{hf}.bias", f"{ours}.bias")] if bias else [])


def transposed(hf: str, ours: str) -> Rule:
    """A matrix stored as [in, out]."""
    return Rule(hf, (ours,), lambda t, c: (t.T,), lambda p, c: p[0].T)


def fused(
    hf: str, ours: Sequence[str], sizes: Callable[[DecoderConfig], Sequence[int]], transpose: bool = False
) -> Rule:
    """Several of our arrays stacked along their first axis, of `sizes` rows each; `transpose`: stored as [in, out]."""

    def split(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
        rows = sizes(config)
        tensor = tensor.T if transpose else tensor
        if tensor.shape[0] != sum(rows):
            raise ValueError(f"it has {tensor.shape[0]} rows, not {' + '.join(map(str, rows))}")
        return np.split(tensor, np.cumsum(rows)[:-1])

    def join(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
        return np.concatenate(parts).T if transpose else np.concatenate(parts)

    return Rule(hf, tuple(ours), split, join)


def by_head(hf: str, ours: Sequence[str], heads: int, sizes: Sequence[int]) -> Rule:
    """Several of our arrays stacked head by head: of each head `sizes[0]` rows of one, then `sizes[1]` of the next."""

    def split(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
        if tensor.shape[0] != heads * sum(sizes):
            raise ValueError(f"it has {tensor.shape[0]} rows, not {heads} times {' + '.join(map(str, sizes))}")
        parts = np.split(tensor.reshape(heads, sum(sizes), *tensor.shape[1:]), np.cumsum(sizes)[:-1], axis=1)
        return [part.reshape(-1, *tensor.shape[1:]) for part in parts]

    def join(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
        apart = [part.reshape(heads, size, *part.shape[1:]) for part, size in zip(parts, sizes, strict=True)]
        return np.concatenate(apart, axis=1).reshape(-1, *parts[0].shape[1:])

    return Rule(hf, tuple(ours), split, join)


def without_prefix(prefix: str) -> tuple[tuple[str, str], ...]:
    """`Family.renamed` for checkpoints of the model without its head, whose names lack the first part, `prefix`."""
    return ((rf"^(?!{prefix}\.|lm_head\.)", f"{prefix}."),)


def qkv_rows(config: DecoderConfig) -> tuple[int, int, int]:
    """How many rows queries, keys and values have."""
    return config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim


@dataclass(frozen=True)
class Family:
    """A family is data: how its config.json reads, and what its tensors are called."""

    model_types: tuple[str, ...]
    decoder_config: Callable[[HFConfig], DecoderConfig]
    rules: Callable[[DecoderConfig], list[Rule]]
    ignored: tuple[str, ...] = ()  # patterns of tensors that hold no parameter, such as saved rotary tables
    renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) from other names in use to those of the rules
    experts_apart: bool = False  # its rules have a tensor for each expert; files may have one for all


@dataclass(frozen=True)
class TensorTarget:
    """One tensor of the checkpoint and the rows of our stacked parameters that it fills."""

    rule: Rule
    name: str
    paths: tuple[str, ...]  # full paths of our parameters
    row: tuple[int, ...]  # (block within its stack, expert), as far as the rule has them

    @property
    def keeps_float32(self) -> bool:
        """Whether it fills a parameter that is float32 in a model of any dtype."""
        return any(path.endswith(KEEP_FLOAT32) for path in self.paths)


def parameter_shapes(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of the decoder, stacked over depth; nothing is allocated."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(abstract))}


def tensor_targets(rules: Sequence[Rule], config: DecoderConfig, shapes: Mapping[str, Any]) -> Iterator[TensorTarget]:
    """Every tensor that the checkpoint must hold, rule by rule. A block rule applies to the blocks whose stack has such
    a parameter, so a family with dense and sparse blocks states both. `{e}` counts the second axis of the parameter."""
    rows = config.rows
    for rule in rules:
        if "{i}" not in rule.hf:
            yield TensorTarget(rule, rule.hf, rule.ours, ())
            continue
        for layer, (stack, row) in enumerate(rows):
            paths = tuple(path.replace("block.", f"stacks.{stack}.", 1) for path in rule.ours)
            if paths[0] not in shapes:
                continue
            if "{e}" not in rule.hf:
                yield TensorTarget(rule, rule.hf.format(i=layer), paths, (row,))
                continue
            for expert in range(shapes[paths[0]].shape[1]):
                yield TensorTarget(rule, rule.hf.format(i=layer, e=expert), paths, (row, expert))


def parts_of(
    place: TensorTarget, tensor: np.ndarray, config: DecoderConfig, shapes: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters that a tensor fills at `place.row`, by path. UserError where its shape is not what they need."""
    try:
        parts = place.rule.split(tensor, config)
    except ValueError as error:
        raise UserError(f"tensor {place.name} of shape {tensor.shape} cannot be split: {error}") from error
    for path, part in zip(place.paths, parts, strict=True):
        needed = shapes[path].shape[len(place.row) :]
        if part.shape != needed:
            raise UserError(
                f"tensor {place.name} has shape {tuple(tensor.shape)}, but config.json makes it fill {path} with "
                f"{tuple(needed)}"
            )
        yield path, part


def load_decoder(
    checkpoint: Checkpoint,
    family: Family,
    config: DecoderConfig,
    dtype: jnp.dtype,
    progress: Advance = lambda size: None,
    placing: Placing | None = None,
) -> Decoder:
    """The checkpoint as a `Decoder` whose parameters have `dtype`, and lie where `placing` says or on one device.

    Where devices split a parameter, it is read and put there part by part, and only the parts that devices of this
    process need. Raises UserError when a tensor is missing, unknown, or of another shape than the config says.
    """
    shapes = parameter_shapes(config)
    wanted, stored = match(checkpoint, family, config, shapes)
    infos = checkpoint.names()
    for place in wanted:  # shapes before bytes: an array of no memory each
        for _ in parts_of(place, np.broadcast_to(np.float32(0), infos[stored[place.name]].shape), config, shapes):
            pass
    loaded: dict[str, jax.Array] = {}
    for _, same_rule in groupby(wanted, key=lambda place: place.rule.hf):
        group = list(same_rule)  # a rule at a time: only its stacks, or a part of each, are on the host at once
        paths = dict.fromkeys(path for place in group for path in place.paths)
        shardings = {path: placing(path, shapes[path].shape) if placing else None for path in paths}
        missing = {path: _pieces(shapes[path].shape, sharding) for path, sharding in shardings.items()}
        arrived: dict[str, list[jax.Array]] = {path: [] for path in paths}
        while any(missing.values()):
            pieces = {path: some.pop() for path, some in missing.items() if some}
            bounds = {path: piece.bounds for path, piece in pieces.items()}
            filled = {
                path: np.empty([stop - start for start, stop in b], FLOAT32 if path.endswith(KEEP_FLOAT32) else dtype)
                for path, b in bounds.items()
            }
            for place in group:
                for path, row, block in _blocks(place, bounds, checkpoint, stored[place.name], config, shapes):
                    filled[path][row] = block
                    require_finite(filled[path][row], checkpoint.source, stored[place.name])
                    progress(block.nbytes)
            for path, piece in pieces.items():
                arrived[path] += [jax.device_put(filled[path], device) for device in piece.devices]
        for path, arrays in arrived.items():
            sharding, shape = shardings[path], shapes[path].shape
            alone = sharding is None
            loaded[path] = arrays[0] if alone else jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    return assemble(config, loaded)


def require_finite(values: np.ndarray, source: str, name: str) -> None:
    """UserError where some value is infinite or not a number, which names the tensor and says how many there are.

    Looks at the exponents' bits: NumPy's own test makes an array and takes bfloat16 one value at a time.
    """
    bits = {2: np.uint16, 4: np.uint32}[values.itemsize]
    exponent = np.array(np.inf, values.dtype).view(bits)
    rows = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    step = max(1, (1 << 22) // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step]).view(bits)
        if (wrong := int(np.count_nonzero((part & exponent) == exponent))) > 0:
            raise UserError(
                f"{source}: {wrong} values of {name} are infinite or not a number, as after training that diverged"
            )


class _Piece(NamedTuple):
    """A part of a parameter, and the devices of this process that need it; None stands for the one that JAX takes."""

    bounds: Bounds
    devices: list[Any]


def _pieces(shape: tuple[int, ...], sharding: Sharding | None) -> list[_Piece]:
    """The parts of a parameter that differ."""
    if sharding is None:
        return [_Piece(tuple((0, size) for size in shape), [None])]
    pieces: dict[Bounds, list[Any]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        pieces[tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))].append(device)
    return [_Piece(bounds, devices) for bounds, devices in pieces.items()]


def _blocks(
    place: TensorTarget,
    bounds: Mapping[str, Bounds],
    checkpoint: Checkpoint,
    name: str,
    config: DecoderConfig,
    shapes: Mapping[str, Any],
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """What a tensor fills of pieces with these bounds: (path, row within the piece, values)."""
    lead = len(place.row)
    wanted = {
        path: bounds[path]
        for path in place.paths
        if path in bounds and all(a <= row < b for row, (a, b) in zip(place.row, bounds[path], strict=False))
    }
    if not wanted:
        return
    inner = {path: each[lead:] for path, each in wanted.items()}
    if place.rule.split is as_it_is and isinstance(checkpoint, ReadsParts) and all(inner.values()):
        parts = {path: checkpoint.part(name, each) for path, each in inner.items()}
    else:
        whole = dict(parts_of(place, checkpoint.tensor(name), config, shapes))
        parts = {path: whole[path][tuple(slice(*each) for each in inner[path])] for path in wanted}
    for path, part in parts.items():
        yield path, tuple(row - a for row, (a, _) in zip(place.row, wanted[path], strict=False)), part


def assemble(config: DecoderConfig, parameters: Mapping[str, Any]) -> Decoder:
    """A decoder from its parameters by path."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    flat = [(path, leaf.replace(parameters[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def match(
    checkpoint: Checkpoint, family: Family, config: DecoderConfig, shapes: Mapping[str, Any]
) -> tuple[list[TensorTarget], dict[str, str]]:
    """The tensors that the config needs, and the name in the checkpoint of each by the name that the rules have.

    Raises UserError for a checkpoint whose tensors are not exactly the ones this config needs. What is made on the way
    is bounded by the tensors that are there, whatever the config asks for.
    """
    stored = _known_names(checkpoint, family)
    wanted: list[TensorTarget] = []
    rest = tensor_targets(family.rules(config), config, shapes)
    for place in rest:
        if place.name not in stored:
            more = (other.name for other in islice(rest, 100_000) if other.name not in stored)
            missing = sorted([place.name, *more])
            raise UserError(
                f"{checkpoint.source} lacks the tensor {missing[0]}{_more(missing)}, which its config.json needs"
            )
        wanted.append(place)
    if unfilled := sorted(set(shapes) - {path for place in wanted for path in place.paths}):
        raise AssertionError(f"the {config.family} family states no rule for {unfilled[0]}")
    need = {place.name for place in wanted}
    extra = sorted(stored.keys() - need)
    if config.tied and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        embedding = stored[next(place.name for place in wanted if place.paths == ("embedding",))]
        if not np.array_equal(checkpoint.tensor(stored["lm_head.weight"]), checkpoint.tensor(embedding)):
            raise UserError(
                f"{checkpoint.source} has tie_word_embeddings, but its lm_head.weight differs from {embedding}"
            )
    if extra:
        raise UserError(
            f"{checkpoint.source} holds the tensor {stored[extra[0]]}{_more(extra)}, which a {config.family} model of "
            "its config.json does not have"
        )
    return wanted, stored


def _known_names(checkpoint: Checkpoint, family: Family) -> dict[str, str]:
    """The checkpoint's names of its tensors by the names that the family's rules have for them."""
    stored: dict[str, str] = {}
    for name in checkpoint.names():
        if any(re.fullmatch(pattern, name) for pattern in family.ignored):
            continue
        known = name
        for pattern, replacement in family.renamed:
            known = re.sub(pattern, replacement, known)
        if known in stored:
            raise UserError(f"{checkpoint.source} holds one tensor under two names, {stored[known]} and {name}")
        stored[known] = name
    return stored


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
