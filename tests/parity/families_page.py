"""Writes docs/families.md from the registry and the parity tests: `python -m tests.parity.families_page`."""

from __future__ import annotations

import sys
from pathlib import Path

from spinal_jax.models.families import ALL_FAMILIES, REFUSED
from spinal_jax.models.formats.gguf_architectures import ARCHITECTURES
from spinal_jax.models.formats.splitters import REFUSED as NO_SPLITTERS
from spinal_jax.models.formats.splitters import SPLITTERS
from spinal_jax.models.translate import Family

from .cases import CASES, SEEDS
from .gguf_names import MODEL_TYPES
from .reference import COMPOSITES, LENGTHS, LONG

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

HEAD = f"""# Families and formats

Made by `python -m tests.parity.families_page` from the registry of families and the parity tests.

Every family is compared with Hugging Face PyTorch in float32, on random tiny models in which each parameter is moved
from its initial value: the residual stream at every boundary and the logits, relative to the largest value of each.
Prompts have {", ".join(map(str, LENGTHS[:-1]))} and {LENGTHS[-1]} tokens (longer than any window), padded on the right
and packed into rows; {", ".join(map(str, LONG[:-1]))} and {LONG[-1]} where blocks have a recurrent state, longer than
the chunks in which that is computed. The error must be below 1e-5; blocks with a recurrent state are compared with
Hugging Face in float64 and may have twice the error of its float32, since a head that reads next to nothing is normed
to full size, and its rounding with it. Every tensor of a checkpoint is read once and comes back bit for bit.
A key of config.json that a family does not know is an error that names it. `spinal verify` makes the same comparison
for a checkpoint of yours.

| model_type | what it is | GGUF | configurations tried |
| --- | --- | --- | --- |
"""

SOURCES = {
    "Hugging Face folder or hub id": ("safetensors, in shards or one", "every family above"),
    "FP8 in blocks (`quant_method: fp8`)": ("dequantised to float32 as it is loaded", "element by element"),
    "MXFP4 (`quant_method: mxfp4`)": ("exact in bfloat16", "Hugging Face's own decoding, bit for bit"),
    "all experts in one tensor (`experts.gate_up_proj`)": ("as a tensor for each", "bit for bit"),
    "PEFT adapter folder": (
        "LoRA, rsLoRA, DoRA, `modules_to_save`, biases, trained tokens, merged in float32",
        "every tensor that PEFT merges, and the states that both give, to 1e-6",
    ),
    "`.gguf`, in one or several parts": (
        "every type that the gguf package dequantises",
        "values and tokens that transformers reads",
    ),
    "folder of `spinal convert`": ("Orbax, each file with its digest", "bit for bit"),
}

TAIL = """
Refused by name: {refusals}.

## Sources

| source | what is read | what was compared |
| --- | --- | --- |
{sources}

`spinal verify` covers each of them. Hugging Face reads folders itself, quantised ones too, and GGUF files of one part
whose architecture it knows; PEFT merges adapters. Other GGUF files and converted folders are exported to a scratch
folder first, and where names and values are so taken as they are read here, the report says it.

A GGUF file does not hold everything: which blocks of SmolLM3 have a rope, the scale of Gemma's 27B models, the
activation of GPT-NeoX-20B, the groups of experts of DeepSeek-V2 and V3 in older files. There the published model's are
taken; other models of that architecture may differ.

A step of a repository is named by `model.revision=step-1000`, which stands for the one branch, tag or local folder of
that step. `router_aux_loss_coef` of a mixture of experts is read and not used: training here adds no balancing loss.

## Tokenizers of GGUF files

`tokenizer.ggml.pre` says how text is cut. Known: {known}. Refused, since no family here uses them: {refused}.
"""


def page() -> str:
    """The page's text."""
    sources = "\n".join(f"| {name} | {read} | {tried} |" for name, (read, tried) in SOURCES.items())
    tail = TAIL.format(sources=sources, known=_names(SPLITTERS), refused=_names(NO_SPLITTERS), refusals=_refusals())
    return HEAD + "\n".join(_row(family, name) for family in ALL_FAMILIES for name in family.model_types) + "\n" + tail


def _refusals() -> str:
    reasons = {why: [name for name in REFUSED if REFUSED[name] == why] for why in REFUSED.values()}
    return "; ".join(f"{', '.join(f'`{name}`' for name in names)} ({why})" for why, names in reasons.items())


def _names(table: dict) -> str:
    return ", ".join(f"`{name}`" for name in table)


def _row(family: Family, model_type: str) -> str:
    about = " ".join((sys.modules[family.decoder_config.__module__].__doc__ or "").split("\n\n")[0].split()).rstrip(".")
    files = ", ".join(f"`{name}`" for name in ARCHITECTURES if model_type in MODEL_TYPES[name])
    elsewhere = "test_delta_net" if model_type in COMPOSITES else "test_sparse"
    tried = f"{len(SEEDS)}, each with other switches" if model_type in CASES else f"in `tests/parity/{elsewhere}.py`"
    return f"| `{model_type}` | {about} | {files} | {tried} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
