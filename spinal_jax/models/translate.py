"""Between a checkpoint's tensors and ours: the rules a family states once, and the loader that applies them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spinal_jax.errors import UserError
from spinal_jax.models.checkpoint import Checkpoint
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.hf_config import HFConfig

Split = Callable[[np.ndarray, DecoderConfig], Sequence[np.ndarray]]
Join = Callable[[Sequence[np.ndarray], DecoderConfig], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor name and where it lives with us.

    `hf` may hold `{i}` (block) and `{e}` (expert). `ours` are parameter paths; those that start with `block.` are
    stacked over depth, and with `{e}` in `hf` over experts behind that. `split` turns the tensor into one array for each
    path, `join` back; both default to the identity on a single path.
    """

    hf: str
    ours: tuple[str, ...]
    split: Split = lambda tensor, config: (tensor,)
    join: Join = lambda parts, config: parts[0]


def same(hf: str, ours: str) -> Rule:
    """The tensor is ours as it lies."""
    return Rule(hf, (ours,))


def linear(hf: str, ours: str, bias: bool) -> list[Rule]:
    """Weight, and bias where the family has one, of a linear layer."""
    return [same(f"{hf}.weight", f"{ours}.weight")] + ([same(f"{hf}.bias", f"{ours}.bias")] if bias else [])


def transposed(hf: str, ours: str) -> Rule:
    """A matrix stored as [in, out]."""
    return Rule(hf, (ours,), lambda t, c: (t.T,), lambda p, c: p[0].T)


@dataclass(frozen=True)
class Family:
    """A family is data: how its config.json reads, and what its tensors are called."""

    model_types: tuple[str, ...]
    decoder_config: Callable[[HFConfig], DecoderConfig]
    rules: Callable[[DecoderConfig], list[Rule]]
    ignored: tuple[str, ...] = ()  # patterns of tensors that hold no parameter, such as saved rotary tables


@dataclass(frozen=True)
class Place:
    """One tensor of the checkpoint and the rows of our stacked parameters that it fills."""

    rule: Rule
    name: str
    paths: tuple[str, ...]  # full paths of our parameters
    row: tuple[int, ...]  # (block within its stack, expert), as far as the rule has them


def parameter_shapes(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of the decoder, stacked over depth; nothing is allocated."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(abstract))}


def places(rules: Sequence[Rule], config: DecoderConfig, shapes: Mapping[str, Any]) -> Iterator[Place]:
    """Every tensor that the checkpoint must hold, rule by rule. A block rule applies to the blocks whose stack has such
    a parameter, so a family with dense and sparse blocks states both."""
    for rule in rules:
        if "{i}" not in rule.hf:
            yield Place(rule, rule.hf, rule.ours, ())
            continue
        for layer in range(config.depth):
            stack, row = config.stack_of(layer)
            paths = tuple(path.replace("block.", f"stacks.{stack}.", 1) for path in rule.ours)
            if paths[0] not in shapes:
                continue
            if "{e}" not in rule.hf:
                yield Place(rule, rule.hf.format(i=layer), paths, (row,))
                continue
            assert config.experts is not None
            for expert in range(config.experts.count):
                yield Place(rule, rule.hf.format(i=layer, e=expert), paths, (row, expert))


def load_decoder(
    checkpoint: Checkpoint,
    family: Family,
    config: DecoderConfig,
    dtype: jnp.dtype,
    progress: Callable[[int], None] = lambda size: None,
) -> Decoder:
    """The checkpoint as a `Decoder` whose parameters have `dtype`.

    Raises UserError when a tensor is missing, unknown, or of another shape than the config says.
    """
    shapes = parameter_shapes(config)
    rules = family.rules(config)
    wanted = list(places(rules, config, shapes))
    check_names(checkpoint, family, config, wanted, shapes)
    loaded: dict[str, jax.Array] = {}
    for rule in rules:  # a rule at a time: only its stacks are on the host at once
        stacks: dict[str, np.ndarray] = {}
        for place in (p for p in wanted if p.rule is rule):
            tensor = checkpoint.tensor(place.name)
            try:
                parts = rule.split(tensor, config)
            except ValueError as error:
                raise UserError(f"tensor {place.name} of shape {tensor.shape} cannot be split: {error}") from error
            for path, part in zip(place.paths, parts, strict=True):
                if path not in stacks:
                    stacks[path] = np.empty(shapes[path].shape, dtype)
                target = stacks[path][place.row] if place.row else stacks[path]
                if part.shape != target.shape:
                    raise UserError(
                        f"tensor {place.name} has shape {tuple(tensor.shape)}, but config.json makes it fill "
                        f"{path} with {tuple(target.shape)}"
                    )
                stacks[path][place.row] = part
                progress(part.nbytes)
        loaded |= {path: jax.device_put(array) for path, array in stacks.items()}
    return assemble(config, loaded)


def assemble(config: DecoderConfig, parameters: Mapping[str, Any]) -> Decoder:
    """A decoder from its parameters by path."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    flat = [(path, leaf.replace(parameters[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def check_names(
    checkpoint: Checkpoint,
    family: Family,
    config: DecoderConfig,
    wanted: Sequence[Place],
    shapes: Mapping[str, Any],
) -> None:
    """Refuses a checkpoint whose tensors are not exactly the ones this config needs."""
    names = checkpoint.names()
    have, need = set(names), {place.name for place in wanted}
    filled = {path for place in wanted for path in place.paths}
    if unfilled := sorted(set(shapes) - filled):
        raise AssertionError(f"the {config.family} family states no rule for {unfilled[0]}")
    if missing := sorted(need - have):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{checkpoint.source} lacks the tensor {missing[0]}{more}, which its config.json needs")
    extra = {n for n in have - need if not any(re.fullmatch(pattern, n) for pattern in family.ignored)}
    if config.tied and "lm_head.weight" in extra:
        extra.discard("lm_head.weight")
        embedding = next(place.name for place in wanted if place.paths == ("embedding",))
        if not np.array_equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor(embedding)):
            raise UserError(
                f"{checkpoint.source} has tie_word_embeddings, but its lm_head.weight differs from {embedding}"
            )
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{checkpoint.source} holds the tensor {min(extra)}{more}, which a {config.family} model of its config.json "
            "does not have"
        )
