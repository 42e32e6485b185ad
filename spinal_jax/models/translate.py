"""Rules that map tensors of a checkpoint to parameters, and the loader that applies them."""

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
from jax import Array
from jax.sharding import Sharding

from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.formats.base import Bounds, Checkpoint, ReadsParts
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.progress import Advance

SplitTensor = Callable[[np.ndarray, DecoderConfig], Sequence[np.ndarray]]
JoinTensor = Callable[[Sequence[np.ndarray], DecoderConfig], np.ndarray]
Placing = Callable[[str, tuple[int, ...]], Sharding]  # sharding of a parameter by path and shape

# The correction bias of a router selects experts; DeepSeek-V3 stores it in float32.
KEEP_FLOAT32, FLOAT32 = ".correction", np.dtype(np.float32)


def as_it_is(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
    """The identity."""
    return (tensor,)


@dataclass(frozen=True)
class Rule:
    """A Hugging Face tensor name and its parameters.

    `hf` may contain `{i}`, the block, and `{e}`, an expert or another index within a block. `ours` are parameter paths;
    paths that start with `block.` are stacked over depth, and over `{e}` as the second axis. `split` maps the tensor to
    one array for each path, and `join` is its exact inverse; both default to the identity. `split` raises ValueError
    for a wrong shape.
    """

    hf: str
    ours: tuple[str, ...]
    split: SplitTensor = as_it_is
    join: JoinTensor = lambda parts, config: parts[0]


def same(hf: str, ours: str) -> Rule:
    """A tensor that equals the parameter."""
    return Rule(hf, (ours,))


def scalar(hf: str, ours: str) -> Rule:
    """A scalar that is saved without an axis."""
    return Rule(hf, (ours,), lambda t, c: (t.reshape(1),), lambda p, c: p[0].reshape(()))


def linear(hf: str, ours: str, bias: bool) -> list[Rule]:
    """Weight and optional bias of a linear layer or a norm."""
    return [same(f"{hf}.weight", f"{ours}.weight")] + ([same(f"{hf}.bias", f"{ours}.bias")] if bias else [])


def transposed(hf: str, ours: str) -> Rule:
    """A matrix stored as [in, out]."""
    return Rule(hf, (ours,), lambda t, c: (t.T,), lambda p, c: p[0].T)


def fused(
    hf: str, ours: Sequence[str], sizes: Callable[[DecoderConfig], Sequence[int]], transpose: bool = False
) -> Rule:
    """Several parameters concatenated along the first axis, of `sizes` rows each; `transpose`: stored as [in, out]."""

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
    """Several parameters interleaved by head: `sizes[0]` rows of the first, `sizes[1]` rows of the next, and so on."""

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
    """`Family.renamed` for checkpoints without a head, whose tensor names lack `prefix`."""
    return ((rf"^(?!{prefix}\.|lm_head\.)", f"{prefix}."),)


def qkv_rows(config: DecoderConfig) -> tuple[int, int, int]:
    """Numbers of rows of queries, keys and values."""
    return config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim


@dataclass(frozen=True)
class Family:
    """A model family: how to read its config.json, and the rules of its tensors."""

    model_types: tuple[str, ...]
    decoder_config: Callable[[HFConfig], DecoderConfig]
    rules: Callable[[DecoderConfig], list[Rule]]
    ignored: tuple[str, ...] = ()  # patterns of tensors without parameters, such as rotary tables
    renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) from alternative names to those of the rules
    experts_apart: bool = False  # rules have a tensor for each expert, files may have one for all


@dataclass(frozen=True)
class TensorTarget:
    """A tensor of the checkpoint and the rows of stacked parameters that it fills."""

    rule: Rule
    name: str
    paths: tuple[str, ...]  # full paths of parameters
    row: tuple[int, ...]  # (row in the stack, expert), or fewer

    @property
    def keeps_float32(self) -> bool:
        """Whether the parameter is float32 for any dtype of the model."""
        return any(path.endswith(KEEP_FLOAT32) for path in self.paths)


def parameter_shapes(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> abstract array of every parameter of the decoder, stacked over depth."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(abstract))}


def tensor_targets(
    rules: Sequence[Rule], config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[TensorTarget]:
    """All tensors that the checkpoint must have, by rule. A block rule applies to blocks with such a parameter, so a
    family with dense and sparse blocks has rules for both. `{e}` runs over the second axis of the parameter."""
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
    place: TensorTarget, tensor: np.ndarray, config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, np.ndarray]]:
    """The values of a tensor at `place.row`, by parameter path. Raises UserError for a wrong shape."""
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
    """Loads the checkpoint as a `Decoder` in `dtype`, placed by `placing` or on one device.

    Sharded parameters are read by parts, and only the parts of the devices of this process. Raises UserError for a
    missing or unknown tensor, or a wrong shape.
    """
    shapes = parameter_shapes(config)
    wanted, stored = match(checkpoint, family, config, shapes)
    infos = checkpoint.names()
    for place in wanted:  # check shapes before values are read, with arrays that need no memory
        for _ in parts_of(place, np.broadcast_to(np.float32(0), infos[stored[place.name]].shape), config, shapes):
            pass
    loaded: dict[str, jax.Array] = {}
    for _, same_rule in groupby(wanted, key=lambda place: place.rule.hf):
        group = list(same_rule)  # one rule at a time limits host memory
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
    """Raises UserError, with the tensor and the count, if values are not finite.

    Tests the exponent bits, because `np.isfinite` allocates an array and is slow for bfloat16.
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
    """A part of a parameter and the devices of this process that need it; None is JAX's default device."""

    bounds: Bounds
    devices: list[Any]


def _pieces(shape: tuple[int, ...], sharding: Sharding | None) -> list[_Piece]:
    """The distinct parts of a parameter."""
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
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """The values of a tensor within pieces of these bounds: (path, row within the piece, values)."""
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


def assemble(config: DecoderConfig, parameters: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Decoder:
    """A decoder from its parameters by path."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    flat = [(path, leaf.replace(parameters[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def match(
    checkpoint: Checkpoint, family: Family, config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[list[TensorTarget], dict[str, str]]:
    """The tensors of the config, and their names in the checkpoint by names of the rules.

    Raises UserError unless the checkpoint has exactly these tensors. Memory is bounded by the tensors of the
    checkpoint, for any config.
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
    """Names of the rules -> names in the checkpoint."""
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
