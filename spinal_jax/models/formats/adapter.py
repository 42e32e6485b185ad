"""PEFT adapters (LoRA, rsLoRA, DoRA) as checkpoints: merged into their base in float32, one tensor at a time.

Merging follows PEFT: `W + scale * B A` for LoRA (Hu et al. 2021, arXiv 2106.09685), with `scale = alpha / rank`, or
`alpha / sqrt(rank)` (rsLoRA, arXiv 2312.03732); `m * (W + scale * B A) / ||W + scale * B A||` for DoRA (arXiv
2402.09353), the norm taken over the inputs of each output. Adapted layers are determined from the
tensors, so that all ways of selecting layers (patterns, names, `layers_to_transform`) are supported.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import regex

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import ReadJson
from spinal_jax.models.families import family_of, read_model
from spinal_jax.models.formats.base import Checkpoint, TensorInfo, read_json, sha256_of
from spinal_jax.models.formats.safetensors import read_header, read_stored
from spinal_jax.models.formats.tokenizer import folder_tokenizer, has_tokenizer
from spinal_jax.models.hf_config import HFConfig, value_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 1.0  # that a pattern may take: some never end
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys of adapter_config.json that say nothing about merging: which layers were chosen, how training went, bookkeeping.
_HARMLESS = """
task_type peft_version auto_mapping base_model_name_or_path revision inference_mode target_modules exclude_modules
lora_dropout bias modules_to_save layers_to_transform layers_pattern megatron_core loftq_config eva_config corda_config
lora_ga_config qalora_group_size runtime_config lora_bias ensure_weight_tying velora_config use_dora
trainable_token_indices target_modules_pattern
"""
# Keys that must be null, false or empty: what they switch on is not a low-rank term on a matrix.
_REFUSED = (
    "megatron_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
_SUFFIXES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_LORA = re.compile(rf"(.+)\.({'|'.join(_SUFFIXES)})(?:\.default)?(?:\.(weight|bias))?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
# GPT-2 stores these as [in, out]; PEFT transposes their change.
_CONV1D = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains an adapter."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model of an adapter folder and its revision. Raises UserError without one."""
    config = read_json(folder / CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base.strip():
        raise UserError(f"{folder / CONFIG} does not name its base model; name it: model.base=...")
    if revision is not None and not isinstance(revision, str):
        raise UserError(f"{folder / CONFIG}: revision is {value_text(revision)}, which is not a name")
    return base, revision


class AdapterFolder:
    """An adapter with its base as a `Checkpoint` of the merged model. Changed tensors are float32."""

    kind: str = "adapter"

    def __init__(self, folder: Path, source: str, base: Checkpoint) -> None:
        self.path, self.source, self.base, self.revision = folder, source, base, base.revision
        self.config = dict(base.config)
        self._path = folder / WEIGHTS
        settings = _Settings(folder)
        self._settings = settings
        if not self._path.exists():
            raise UserError(f"{folder} has no {WEIGHTS}; adapters saved as pickle (.bin) are never read")
        self._stored = read_header(self._path)
        self.folder: Path | None = folder if has_tokenizer(folder) else getattr(base, "folder", None)
        self._own_tokenizer = folder if has_tokenizer(folder) else None
        self._family = family_of(str(base.config.get("model_type", "")))
        self._names = {self._known(name): name for name in base.names()}
        self._full: dict[str, str] = {}  # tensor of the base -> tensor of the adapter that replaces it
        self._terms: dict[str, dict[str, dict[str, str]]] = {}  # tensor of the base -> module -> low-rank terms
        self._kept: set[str] = set()  # of `_full`: what a low-rank term was trained on, saved beside it
        self._rows: dict[str, str] = {}  # tensor of the base -> rows of it that were trained
        for key in self._stored:
            self._place(key)
        self._check_terms()
        self._tie()
        self._infos = self._describe()

    def names(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensor(self, name: str) -> np.ndarray:
        values = self._read(self._full[name]) if name in self._full else self.base.tensor(self._source_of(name))
        if name in self._terms:
            values = values.astype(np.float32)
            for module, parts in self._terms[name].items():
                values = self._merged(name, module, parts, values)
        if name in self._rows:
            values, rows = values.astype(np.float32), self._settings.token_rows(name, len(values))
            values[rows] = self._fitting(self._rows[name], (len(rows), *values.shape[1:]))
        return values

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer() if self._own_tokenizer is None else folder_tokenizer(self._own_tokenizer)

    def sha256(self) -> str:
        both = f"{self.base.sha256()} {sha256_of([self._path])} {self._settings.digest}"
        return hashlib.sha256(both.encode()).hexdigest()

    def close(self) -> None:
        self.base.close()

    def _known(self, name: str) -> str:
        """The name of a tensor in the rules of the family."""
        for pattern, replacement in self._family.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    def _place(self, key: str) -> None:
        """Finds the tensor of the base that a tensor of the adapter belongs to."""
        if not key.startswith("base_model.model."):
            raise UserError(f"{self._path} holds {key}, which is not a name that PEFT gives")
        path = re.sub(r"(\.token_adapter)?\.base_layer\.", ".", key.removeprefix("base_model.model."))
        if match := _LORA.fullmatch(path):
            module, part, kind = match.groups()
            suffix = "bias" if (part, kind) == ("lora_B", "bias") else "weight"
            name = self._find(f"{module}.{suffix}", key)
            parts = self._terms.setdefault(name, {}).setdefault(module, {})
            parts["lora_bias" if suffix == "bias" else part] = key
            return
        if match := _TOKENS.fullmatch(path):
            self._rows[self._find(f"{match[1]}.weight", key)] = key
            return
        if re.search(r"lora|adapter|original_module", path):
            raise UserError(f"{self._path} holds {key}, which is not understood here")
        path = re.sub(r"\.modules_to_save(\.default)?\.", ".", path)
        is_kept = ".base_layer." in key
        name = self._find(path, key, new=path == "lm_head.weight" and not is_kept)
        self._full[name] = key
        if is_kept:
            self._kept.add(name)

    def _find(self, path: str, key: str, new: bool = False) -> str:
        known = self._known(path)
        if known in self._names:
            return self._names[known]
        if path == "lm_head.weight":  # tied in the base
            return path if new else self._embedding()
        raise UserError(f"{self._path} holds {key}, but {self.base.source} has no tensor {path} for it to change")

    def _embedding(self) -> str:
        _, decoder = read_model(self.base.config, self._settings.ignore)
        (rule,) = [rule for rule in self._family.rules(decoder) if rule.ours == ("embedding",)]
        return self._names[rule.hf]

    def _check_terms(self) -> None:
        for name, module, parts in ((n, m, p) for n, modules in self._terms.items() for m, p in modules.items()):
            pair = {"lora_A", "lora_B"} <= parts.keys() or {"lora_embedding_A", "lora_embedding_B"} <= parts.keys()
            if not pair and parts.keys() != {"lora_bias"}:
                lacking = next(part for part in ("lora_A", "lora_B") if part not in parts)
                raise UserError(f"{self._path} has no {lacking} for {name}")
            if pair:
                first, second = (parts.get(x) or parts[y] for x, y in (_SUFFIXES[:3:2], _SUFFIXES[1:4:2]))
                self._settings.check_rank(module, self._stored[first].info, self._stored[second].info)

    def _tie(self) -> None:
        """Unties matrices of which only one was trained."""
        _, decoder = read_model(self.base.config, self._settings.ignore)
        self._untied: str | None = None  # what lm_head.weight is read from, where the base has none
        embedding = self._embedding()
        rows = self._stored[self._full[embedding]].info.shape[0] if embedding in self._full else decoder.vocab_size
        self._set("vocab_size", rows)
        if not decoder.tied:
            return
        if "lm_head.weight" in self._full or embedding in self._full.keys() - self._kept:
            self._set("tie_word_embeddings", False)
            self._untied = embedding

    def _set(self, key: str, value: object) -> None:
        if "text_config" in self.config:
            self.config["text_config"] = dict(self.config["text_config"]) | {key: value}
        if "text_config" not in self.config or key == "tie_word_embeddings":
            self.config[key] = value

    def _source_of(self, name: str) -> str:
        return self._untied if name == "lm_head.weight" and self._untied is not None else name

    def _describe(self) -> dict[str, TensorInfo]:
        infos = dict(self.base.names())
        if self._untied is not None:
            infos.setdefault("lm_head.weight", infos[self._untied])
        infos |= {name: self._stored[key].info for name, key in self._full.items()}
        changed = self._terms.keys() | self._rows.keys()
        infos |= {name: TensorInfo(infos[name].shape, np.dtype(np.float32)) for name in changed}
        return dict(sorted(infos.items()))

    def _read(self, key: str) -> np.ndarray:
        return read_stored(self._stored[key], key)

    def _fitting(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of the adapter that must have a shape, for NumPy would repeat a smaller one. Errors: UserError."""
        values = self._read(key)
        if values.shape != shape:
            raise UserError(f"{self._path}: {key} has shape {values.shape}, but its base needs {shape}")
        return values

    def _merged(self, name: str, module: str, parts: Mapping[str, str], weight: np.ndarray) -> np.ndarray:
        read = {part: self._read(key).astype(np.float32) for part, key in parts.items()}
        rank = next((len(read[part]) for part in ("lora_A", "lora_embedding_A") if part in read), None)
        scale = self._settings.scale(module, rank)
        if "lora_bias" in read:
            return weight + np.float32(scale) * self._fitting(parts["lora_bias"], weight.shape)
        is_embedding = "lora_embedding_A" in read
        turned = is_embedding or (self._settings.conv1d(self.config) and _CONV1D.fullmatch(name) is not None)
        a, b = (
            (read["lora_embedding_A"], read["lora_embedding_B"]) if is_embedding else (read["lora_A"], read["lora_B"])
        )
        weight = weight.T if turned else weight  # [out, in]
        if (b.shape[0], a.shape[1]) != weight.shape:
            raise UserError(
                f"{self._path}: {name} has shape {weight.shape} as [out, in], but its adapter is of {b.shape[0]} "
                f"outputs and {a.shape[1]} inputs"
            )
        merged = weight + np.float32(scale) * (b @ a)
        if "lora_magnitude_vector" in read:
            lengths = row_norms(merged, contiguous=not turned)
            magnitudes = read["lora_magnitude_vector"].reshape(-1)
            if magnitudes.shape != lengths.shape:
                key = parts["lora_magnitude_vector"]
                raise UserError(f"{self._path}: {key} has {magnitudes.size} numbers, but its base {lengths.size} rows")
            merged *= (magnitudes / lengths)[:, None]
        return np.ascontiguousarray(merged.T if turned else merged)


def row_norms(weight: np.ndarray, contiguous: bool) -> np.ndarray:
    """Norms [out] of the rows of a float32 weight [out, in], added up in the order of `torch.linalg.norm` on a CPU.

    Contiguous rows are summed in eight lanes, rows of a transposed weight one number after another. A float32 norm of
    4,096 numbers is off by up to 1e-6 in the latter order, so a merged tensor equals PEFT's only in the same order.
    """
    squares = weight * weight
    lanes = 8 if contiguous else 1
    whole = squares.shape[1] - squares.shape[1] % lanes
    sums = np.zeros((len(squares), lanes), np.float32)
    for at in range(0, whole, lanes):
        sums += squares[:, at : at + lanes]
    return np.sqrt(functools.reduce(np.add, [*sums.T, *squares.T[whole:]]))


class _Settings:
    """adapter_config.json, with all keys checked."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CONFIG
        self.digest = sha256_of([self.path])
        values = read_json(self.path)
        self.ignore: tuple[str, ...] = ()
        if (kind := values.pop("peft_type", None)) != "LORA":
            raise UserError(f"{self.path}: peft_type is {value_text(kind)}, but only LORA can be merged into its base")
        config = HFConfig(values, path="", model_type="PEFT")
        try:
            config.ignore(*_HARMLESS.split())
            config.refuse(*_REFUSED)
            self.rank, self.alpha = config.size("r", 8), config.positive("lora_alpha", 8)
            self.rslora = config.flag("use_rslora", False)
            self.turned = config.flag("fan_in_fan_out", False)
            start = config.get("init_lora_weights", True)
            if not isinstance(start, bool) and start not in ("gaussian", "eva", "orthogonal"):
                raise config.refusal(
                    "init_lora_weights",
                    "which changes the base too; save it as plain LORA with path_initial_model_for_weight_conversion",
                )
            self.patterns = {key: self._pattern(config, key) for key in ("rank_pattern", "alpha_pattern")}
            self._tokens = config.get("trainable_token_indices")
            config.done(harmless=frozenset())
        except UserError as error:
            raise UserError(str(error).replace("config.json", str(self.path), 1)) from error

    def _pattern(self, config: HFConfig, key: str) -> dict[str, float]:
        values = config.get(key) or {}
        if not isinstance(values, dict):
            raise config.refusal(key, "which is not a mapping")
        inner = HFConfig(values, path=f"{key}.")
        return {pattern: inner.positive(pattern) for pattern in values}

    def _of(self, key: str, module: str, default: float) -> float:
        """The value of the first pattern that matches the end of a module name, as in PEFT."""
        for pattern, value in self.patterns[key].items():
            try:
                if regex.match(rf"(.*\.)?({pattern})$", module, timeout=SECONDS):
                    return value
            except regex.error as error:
                raise UserError(f"{self.path}: {key} has the pattern {pattern!r}, which is none: {error}") from error
            except TimeoutError as error:
                what = f"the pattern {value_text(pattern)}, which takes more than {SECONDS:g} s to match {module}"
                raise UserError(f"{self.path}: {key} has {what}") from error
        return default

    def check_rank(self, module: str, first: TensorInfo, second: TensorInfo) -> None:
        """Raises UserError if the matrices of a module have another rank than the config."""
        rank = int(self._of("rank_pattern", module, self.rank))
        if len(first.shape) != 2 or len(second.shape) != 2 or not first.shape[0] == second.shape[1] == rank:
            raise UserError(
                f"{self.path} makes the rank of {module} {rank}, but its matrices are {first.shape} and {second.shape}"
            )

    def scale(self, module: str, rank: int | None) -> float:
        """The scale of the low-rank term of a module."""
        count = int(self._of("rank_pattern", module, self.rank)) if rank is None else rank
        alpha = self._of("alpha_pattern", module, self.alpha)
        return alpha / math.sqrt(count) if self.rslora else alpha / count

    def conv1d(self, config: ReadJson) -> bool:
        """Whether the matrices are of GPT-2's Conv1D layers."""
        return self.turned or config.get("model_type") == "gpt2"

    def token_rows(self, name: str, count: int) -> list[int]:
        """The trained rows of an embedding."""
        rows = self._tokens
        if isinstance(rows, dict):
            rows = next((value for module, value in rows.items() if f".{module}." in f".{name}"), None)
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < count for row in rows):
            raise UserError(f"{self.path}: trainable_token_indices does not say which rows of {name} were trained")
        return rows
