"""Hugging Face PyTorch as the reference: random tiny models, their residual streams, and the comparison with ours.

A relative error is, per boundary and for the logits, `max |ours - theirs| / max |theirs|`, both maxima over all real
tokens of the batch and all features.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder, collect
from spinal_jax.models.families import family_of
from spinal_jax.models.formats.base import TensorInfo
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import load_decoder

transformers.utils.logging.disable_progress_bar()

LENGTHS = (40, 23, 17)  # tokens of the prompts compared; the shorter two fit into one packed row
LONG = (150, 83, 67)  # where blocks have a recurrent state, which is computed in chunks of 64 tokens
COMPOSITES = ("mistral3", "qwen3_5", "qwen3_5_moe")  # whose text part AutoModelForCausalLM would make alone


@dataclass
class MemoryCheckpoint:
    """A checkpoint that lives in memory; tests change its config and tensors at will."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    source: str = "memory"
    kind: str = "huggingface"
    revision: str | None = None

    def names(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(self.tensors[name].shape, self.tensors[name].dtype) for name in sorted(self.tensors)}

    def tensor(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def tokenizer(self) -> Any:
        raise NotImplementedError("a random model has no tokenizer")

    def sha256(self) -> str:
        raise NotImplementedError("a random model has no files")

    def close(self) -> None:
        pass


def random_model(hf_config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model with eager attention, every parameter away from its initial value, norms and biases too."""
    auto: Any = AutoModelForImageTextToText if hf_config.model_type in COMPOSITES else AutoModelForCausalLM
    model = auto.from_config(hf_config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():  # DeepSeek-V3 saves a buffer too
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".A_log"):
                parameter.copy_(noise - 2)  # a memory of some tokens to hundreds; theirs begins with next to none
            elif parameter.ndim == 0:
                parameter.mul_(1.25)  # xIELU's constants, saved with the model
            elif parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def checkpoint_of(model: PreTrainedModel) -> MemoryCheckpoint:
    """What `save_pretrained` writes of a model: config.json and the tensors under the names files have."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = SafetensorsFolder(Path(folder), folder)
        return MemoryCheckpoint(saved.config, {name: saved.tensor(name) for name in saved.names()})


def old_style(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as releases before `rope_parameters` wrote it."""
    old = dict(copy.deepcopy(config))
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    if "text_config" in old:
        old["text_config"] = old_style(old["text_config"])
    rope = old.pop("rope_parameters", None)
    if rope is None:
        return old
    theta_key, partial_key = "rope_theta", "partial_rotary_factor"
    if old["model_type"] == "gpt_neox":
        theta_key, partial_key = "rotary_emb_base", "rotary_pct"
    if "full_attention" in rope:
        if old["model_type"] != "olmo3":
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    old[theta_key] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old[partial_key] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return old


def translate(config: Mapping[str, Any], ignore: Iterable[str] = ()) -> DecoderConfig:
    """Our config of a config.json, every key of it accounted for."""
    hf = HFConfig(config, ignore)
    decoder = family_of(hf.model_type).decoder_config(hf)
    hf.done()
    return decoder


def load(checkpoint: MemoryCheckpoint, dtype: Any = jnp.float32) -> Decoder:
    """The checkpoint as our decoder."""
    family = family_of(checkpoint.config["model_type"])
    return load_decoder(checkpoint, family, translate(checkpoint.config), jnp.dtype(dtype))


class Stream(NamedTuple):
    """One forward: the residual stream at every boundary [D + 1, B, T, d] and the logits [B, T, V], float32."""

    residual: np.ndarray
    logits: np.ndarray


@torch.no_grad()
def reference_stream(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray | None = None) -> Stream:
    """Theirs, for tokens [B, T] of which `mask` says the real ones. Caught before the final norm, by hooks."""
    base: Any = model.base_model
    base = getattr(base, "language_model", base)
    blocks = base.layers if hasattr(base, "layers") else base.h
    seen: list[torch.Tensor] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in blocks]
    attention_mask = None if mask is None else torch.from_numpy(mask.astype(np.int64))
    try:
        logits = model(torch.from_numpy(tokens), attention_mask=attention_mask, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return Stream(torch.stack(seen).float().numpy(), logits.float().numpy())


@contextlib.contextmanager
def in_float64(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A copy of the model that computes in float64, also where their code asks for float32 by name."""
    named = torch.float32, torch.float, torch.Tensor.float
    wide: Any = copy.deepcopy(model).double()
    for module in wide.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # the fused kernels take no float64
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield wide
    finally:
        torch.float32, torch.float, torch.Tensor.float = named  # type: ignore[method-assign]


class Rows(NamedTuple):
    """What `Decoder.forward` takes, each [B, T]."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    lengths: np.ndarray


def pack(prompts: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int, padding: int) -> Rows:
    """The prompts that `rows` names, one behind the other, padded on the right with the token `padding`."""
    packed = Rows(*(np.zeros((len(rows), length), np.int32) for _ in Rows._fields))
    packed.tokens[:] = padding
    packed.lengths[:] = 1
    for row, members in enumerate(rows):
        start = 0
        for segment, prompt in enumerate((prompts[member] for member in members), start=1):
            part = slice(start, start + len(prompt))
            packed.tokens[row, part], packed.positions[row, part] = prompt, np.arange(len(prompt))
            packed.segments[row, part], packed.lengths[row, part] = segment, len(prompt)
            start += len(prompt)
    return packed


# Unoptimised, because compiling is most of these tests' time; the audit's own program is compared elsewhere.
@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _our_stream(model: Decoder, rows: Rows) -> tuple[jax.Array, jax.Array]:
    tokens, *where = rows
    last, residual = model.forward(tokens, tap=collect(lambda h: h), **dict(zip(Rows._fields[1:], where, strict=True)))
    return residual, model.lens(last)


def our_stream(model: Decoder, rows: Rows) -> Stream:
    """Ours."""
    return Stream(*(np.asarray(x, np.float32) for x in _our_stream(model, rows)))


def relative_errors(ours: Sequence[Stream], theirs: Sequence[Stream]) -> dict[str, float]:
    """The relative error of each boundary and of the logits, over prompts given as streams of one row each."""
    errors = {}
    for index in range(len(theirs[0].residual) + 1):

        def part(stream: Stream, index: int = index) -> np.ndarray:
            return stream.residual[index] if index < len(stream.residual) else stream.logits

        name = f"boundary {index}" if index < len(theirs[0].residual) else "logits"
        gap = max(float(np.abs(part(a) - part(b)).max()) for a, b in zip(ours, theirs, strict=True))
        errors[name] = gap / max(float(np.abs(part(b)).max()) for b in theirs)
    return errors


def assert_parity(
    hf_config: PretrainedConfig,
    tolerance: float,
    *,
    seed: int = 0,
    lengths: tuple[int, int, int] | None = None,
    checkpoint: MemoryCheckpoint | None = None,
) -> float:
    """Builds a random model of `hf_config` and compares it with ours, at every boundary and at the logits.

    Theirs is one right-padded batch, or a prompt at a time where the rotary embedding depends on the length of the
    sequence (there they would count the padding). Ours is run twice: the same batch, and packed rows that hold several
    prompts. A model with a recurrent state is compared with theirs in float64, and may differ by twice what theirs in
    float32 does at its worst boundary where that is above `tolerance`: decays, and norms of heads that read next to
    nothing, enlarge what is rounded. Both spellings of config.json, with `rope_parameters` and with `rope_theta` and
    `rope_scaling`, must mean the same. `checkpoint` replaces what the model would be saved as.

    Returns:
        the largest relative error seen; raises AssertionError if above `tolerance`.
    """
    model = random_model(hf_config, seed)
    saved = checkpoint or checkpoint_of(model)
    decoder = load(saved)
    assert translate(old_style(saved.config)) == decoder.config
    lengths = lengths or (LENGTHS if decoder.config.delta is None else LONG)
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, decoder.config.vocab_size, n).astype(np.int32) for n in lengths]
    width = lengths[0]
    assert lengths[1] + lengths[2] <= width
    batch = pack(prompts, [[0], [1], [2]], width, padding=int(random.integers(decoder.config.vocab_size)))

    def cut(stream: Stream, row: int, start: int, length: int) -> Stream:
        part = slice(start, start + length)
        return Stream(stream.residual[:, row, part], stream.logits[row, part])

    def reference(model: PreTrainedModel) -> list[Stream]:
        if any(rope.kind in ("dynamic", "longrope") for rope in decoder.config.ropes):
            # A copy for each: the module keeps frequencies from call to call.
            return [cut(reference_stream(copy.deepcopy(model), p[None]), 0, 0, len(p)) for p in prompts]
        padded = reference_stream(model, batch.tokens, batch.segments > 0)
        return [cut(padded, row, 0, n) for row, n in enumerate(lengths)]

    theirs = reference(model)
    if decoder.config.delta is not None:
        with in_float64(model) as wide:
            exact = reference(wide)
        tolerance = max(tolerance, 2 * max(relative_errors(theirs, exact).values()))
        theirs = exact
    ours = our_stream(decoder, batch)
    unpacked = relative_errors([cut(ours, row, 0, n) for row, n in enumerate(lengths)], theirs)
    ours = our_stream(decoder, pack(prompts, [[0], [1, 2], [2, 1]], width, padding=0))
    packed = relative_errors(
        [
            cut(ours, 0, 0, lengths[0]),
            cut(ours, 1, 0, lengths[1]),
            cut(ours, 1, lengths[1], lengths[2]),
            cut(ours, 2, 0, lengths[2]),
            cut(ours, 2, lengths[2], lengths[1]),
        ],
        [theirs[0], theirs[1], theirs[2], theirs[2], theirs[1]],
    )
    for form, errors in (("batch", unpacked), ("packed", packed)):
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        assert not wrong, f"{form}: relative errors above {tolerance}: {wrong}\n{json.dumps(saved.config)}"
    return max(*unpacked.values(), *packed.values())
