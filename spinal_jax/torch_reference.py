"""Hugging Face's PyTorch model of a checkpoint, in float32: what `spinal verify` compares with."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spinal_jax.models.formats.adapter import AdapterFolder
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.expert_tensors import ExpertsApart
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.gguf import GgufFile
from spinal_jax.models.formats.quantised import Dequantised
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.progress import Advance


class Stream(NamedTuple):
    """Results of the forward pass of one prompt, float32."""

    residual: np.ndarray  # [D + 1, T, d], before the final norm
    logits: np.ndarray  # [T, V]


class Unreadable(Exception):
    """Hugging Face cannot read the checkpoint."""


def torch_streams(
    checkpoint: Checkpoint, ignore_keys: Sequence[str], tokens: Sequence[np.ndarray], advance: Advance, notes: list[str]
) -> Iterator[Stream]:
    """Runs Hugging Face's model on the prompts, one at a time and the shortest first, because some rotary embeddings
    depend on padding and on the longest prompt so far.

    Args:
        checkpoint: what to run.
        ignore_keys: keys of config.json without effect.
        tokens: the ids of each prompt.
        advance: called with 1 after each prompt.
        notes: gets a sentence for what was not read by Hugging Face but taken as it is read here.

    Raises:
        Unreadable: Hugging Face cannot read the checkpoint.
    """
    import torch

    with _reference(checkpoint, ignore_keys, notes) as model, torch.no_grad():
        base: Any = model.base_model
        base = getattr(base, "language_model", base)
        blocks = base.layers if hasattr(base, "layers") else base.h
        seen: list[Any] = []
        hooks = [
            blocks[0].register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        ]
        for block in blocks:
            hooks.append(
                block.register_forward_hook(
                    lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
                )
            )
        try:
            for ids in tokens:
                seen.clear()
                logits = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits
                yield Stream(torch.cat(seen).float().numpy(), logits[0].float().numpy())
                advance(1)
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def _reference(checkpoint: Checkpoint, ignore_keys: Sequence[str], notes: list[str]) -> Iterator[Any]:
    """Loads the model, and checks that no weight is missing.

    Where Hugging Face or PEFT cannot read the source, its export is loaded, with a line in `notes`.
    """
    with tempfile.TemporaryDirectory(prefix="spinal-verify-") as scratch:

        def exported(checkpoint: Checkpoint) -> Any:
            return _hugging_face(export(checkpoint, str(Path(scratch) / "model"), ignore_keys=ignore_keys))

        try:
            model = _own_reading(checkpoint, exported)
        except Unreadable as error:
            notes.append(f"{error}; compared with its export instead, so its names and values are taken as read here")
            model = exported(checkpoint)
        yield model


def _own_reading(checkpoint: Checkpoint, exported: Callable[[Checkpoint], Any]) -> Any:
    """The model as Hugging Face and PEFT read the source; converted folders, which only we read, are `exported`."""
    match checkpoint:
        case ExpertsApart():
            return _own_reading(checkpoint.inner, exported)
        case SafetensorsFolder():
            return _hugging_face(checkpoint.folder)
        case Dequantised():
            return _hugging_face(checkpoint.folder, dequantise=True)
        case GgufFile() if len(checkpoint.paths) > 1:
            raise Unreadable(f"transformers reads GGUF files of one part, and this one has {len(checkpoint.paths)}")
        case GgufFile():
            model = _hugging_face(checkpoint.path.parent, gguf_file=checkpoint.path.name)
            used = model.state_dict()  # where experts lie in one tensor
            if left := [name for name in checkpoint.names() if name not in used and ".experts." not in name]:
                raise Unreadable(f"transformers leaves out {left[0]}")
            return model
        case AdapterFolder():
            if find_spec("peft") is None:
                raise Unreadable("peft, which merges adapters, is not installed (pip install peft)")
            return _merged(_own_reading(checkpoint.base, exported), checkpoint.path)
        case _:
            return exported(checkpoint)


def _merged(base: Any, adapter: Path) -> Any:
    """The base with an adapter, merged by PEFT."""
    import warnings

    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights, which the comparison covers
            return PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    except (ValueError, RuntimeError, OSError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"PEFT cannot merge it: {' '.join(str(error).split())}") from error


def _hugging_face(folder: Path, dequantise: bool = False, **options: Any) -> Any:
    """The model of a folder; `dequantise`: to float32, where quantised weights would stay as they are on a GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, logging
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what does not load is an error below
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        kind: Any = AutoModelForCausalLM
        if type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # such as Mistral 3 with images
            kind = AutoModelForImageTextToText
        if dequantise:
            described.quantization_config = {**described.quantization_config, "dequantize": True}
            options["config"] = described
        loaded = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (ValueError, RuntimeError, OSError, ImportError, KeyError, TypeError, NotImplementedError) as error:
        raise Unreadable(f"transformers cannot open it: {' '.join(str(error).split())}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise Unreadable(f"transformers does not find {missing[0]} in it and would make up random values")
    return model.eval()
