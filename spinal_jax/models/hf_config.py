"""A strict reader of Hugging Face config.json: every key is used, knowingly ignored, or an error that names it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.models.rope import Rope, RopeKind

# Keys that cannot change what a forward pass computes: bookkeeping, training-only settings, generation defaults.
_HARMLESS = """
_name_or_path architectures auto_map bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id
decoder_start_token_id unk_token_id torch_dtype dtype transformers_version model_type name_or_path use_cache
initializer_range initializer_factor init_std attention_dropout attn_dropout attention_dropout_prob hidden_dropout
attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop classifier_dropout embedding_dropout residual_dropout
hidden_dropout_prob resid_dropout gradient_checkpointing pretraining_tp return_dict output_hidden_states
output_attentions torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward cross_attention_hidden_size
tie_encoder_decoder finetuning_task id2label label2id num_labels tokenizer_class prefix task_specific_params
problem_type max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
keys_to_ignore_at_inference cache_implementation _attn_implementation _attn_implementation_autoset attn_implementation
_attn_implementation_internal output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux is_decoder
unsloth_version unsloth_fixed neftune_noise_alpha max_sequence_length transformers.js_config _commit_hash
"""
HARMLESS = frozenset(_HARMLESS.split())

# Keys that must be absent, empty or false, because they would change the forward pass.
REFUSED = ("quantization_config", "is_encoder_decoder", "add_cross_attention", "pruned_heads")

# A rope setting's keys, beside its type, theta and rotary fraction.
_ORIGINAL = "original_max_position_embeddings"
ROPE_KINDS: dict[str, RopeKind] = {
    kind: kind for kind in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


# Bounds of values in a config, beyond any published model.
LARGEST = 2**31 - 1
MOST_BLOCKS = 4096
MOST_ROTATED = 1 << 16
LARGEST_REAL = float(np.finfo(np.float32).max)


def value_text(value: object) -> str:
    """A value of a config for a message, shortened, for any size or nesting."""
    if isinstance(value, int) and abs(value) > 2**63:
        return f"a whole number of {value.bit_length()} bits"
    try:
        return shorten_middle(" ".join(repr(value).split()))
    except RecursionError:
        return "a deeply nested value"


def shorten_middle(text: str, most: int = 200) -> str:
    """The text, or its two ends where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


class HFConfig:
    """config.json, read key by key; `done` raises UserError for unread keys.

    >>> config = HFConfig({"hidden_size": 64, "new_switch": True})
    >>> config.integer("hidden_size")
    64
    >>> config.done()
    Traceback (most recent call last):
    spinal_jax.errors.UserError: config.json has the key 'new_switch' (True), which ...
    """

    def __init__(self, values: ReadJson, ignore: Iterable[str] = (), *, path: str = "", model_type: str = ""):
        self.values = dict(values)
        self.read: set[str] = set(ignore)
        self.path = path  # where in config.json the keys stand, such as "text_config."
        named = self.values.get("model_type", "")
        self.model_type = model_type or (named if isinstance(named, str) else value_text(named))
        self._ignore = frozenset(ignore)
        self._sections: list[HFConfig] = []

    def defaults(self, **values: object) -> None:
        """Sets the defaults of Hugging Face's config class for absent keys. Null is not absent."""
        self.read.update(values.keys() - self.values.keys())
        self.values = {**values, **self.values}

    def section(self, key: str, model_type: str) -> HFConfig:
        """A nested config; `done` checks it too."""
        values = self._typed(key, Mapping, "a config of its own", None)
        part = HFConfig(values, self._ignore, path=f"{self.path}{key}.", model_type=model_type)
        if (given := part.get("model_type", model_type)) != model_type:
            raise UserError(f"config.json: {key}.model_type is {value_text(given)}; supported is {model_type}")
        self._sections.append(part)
        return part

    def part(self, key: str) -> HFConfig:
        """A nested mapping, empty if it is null or absent; its keys are not checked by `done`."""
        return HFConfig(self._mapping(key) or {}, path=f"{self.path}{key}.", model_type=self.model_type)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default if it is absent or null."""
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def _typed(self, key: str, kinds: type | tuple[type, ...], what: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            state = "has no value for" if key in self.values else "lacks"
            raise UserError(f"config.json {state} {self.path + key!r}, which a {self.model_type} model needs")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise UserError(f"config.json: {self.path}{key} is {value_text(value)}, which is not {what}")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 0, high: int = LARGEST) -> int:
        """A whole number from `low` to `high`, required without a default."""
        value = self._typed(key, int, "a whole number", default)
        if not low <= value <= high:
            raise self._outside(key, value, f"a whole number from {low} to {high}")
        return int(value)

    def size(self, key: str, default: int | None = None, *, high: int = LARGEST) -> int:
        """A whole number of at least 1."""
        return self.integer(key, default, low=1, high=high)

    def number(self, key: str, default: float | None = None) -> float:
        """A real number within the range of float32, required without a default."""
        return self._real(key, self._typed(key, (int, float), "a number", default))

    def positive(self, key: str, default: float | None = None) -> float:
        """A real number above 0 and within the range of float32."""
        if (value := self.number(key, default)) <= 0:
            raise self._outside(key, value, "a positive number")
        return value

    def epsilon(self, key: str, default: float | None = None) -> float:
        """The epsilon of a norm, from 0 to 1."""
        if not 0 <= (value := self.number(key, default)) <= 1:
            raise self._outside(key, value, "a norm's epsilon, from 0 to 1")
        return value

    def _real(self, key: str, value: int | float) -> float:
        if not -LARGEST_REAL <= value <= LARGEST_REAL:  # also false for NaN; huge integers are not converted
            raise self._outside(key, value, "a finite number within the range of float32")
        return float(value)

    def _outside(self, key: str, value: object, what: str) -> UserError:
        return UserError(f"config.json: {self.path}{key} is {value_text(value)}, which is not {what}")

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false, required without a default."""
        return bool(self._typed(key, bool, "true or false", default))

    def choice(self, key: str, table: ReadJson, default: str | None = None) -> Any:
        """The entry of `table` that the key names."""
        name = self._typed(key, str, "a name", default)
        if name not in table:
            raise UserError(
                f"config.json: {self.path}{key} is {value_text(name)}; supported are {', '.join(sorted(table))}"
            )
        return table[name]

    def softcap(self, key: str) -> float | None:
        """The scale of a tanh soft-cap, or None."""
        if self.get(key) is None:
            return None
        if (cap := self.number(key)) <= 0:
            raise self.refusal(key, "but a soft-cap must be positive (null: none)")
        return cap

    def window(self, key: str) -> int:
        """The attention window in tokens; null is 0, unlimited."""
        if self.get(key) is None:
            return 0
        if (window := self.integer(key, low=-LARGEST)) <= 0:
            raise self.refusal(key, "but a window must be positive (null: none)")
        return window

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of real numbers."""
        values = self._typed(key, (list, tuple), "a list", None)
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise self._outside(key, values, "a list of numbers")
        return tuple(self._real(key, value) for value in values)

    def _mapping(self, key: str) -> ReadJson | None:
        return None if self.get(key) is None else self._typed(key, Mapping, "a mapping", None)

    def ignore(self, *keys: str) -> None:
        """Marks keys without effect in this family as read."""
        self.read.update(keys)

    def refuse(self, *keys: str) -> None:
        """Raises UserError for unsupported keys, unless they are false, zero, null or empty."""
        for key in keys:
            if self.get(key):
                raise self.refusal(key, f"which {self.model_type} models here do not support")

    def agree(self, key: str, value: object, why: str) -> None:
        """Checks that an optional key has this value."""
        if self.get(key, value) != value:
            raise self.refusal(key, f"but {why}")

    def refusal(self, key: str, why: str) -> UserError:
        """The error that names a key and its value."""
        return UserError(f"config.json: {self.path}{key} is {value_text(self.values.get(key))}, {why}")

    def done(self, harmless: frozenset[str] = HARMLESS) -> None:
        """Raises UserError for unread keys, so that no setting is silently ignored."""
        self.refuse(*(key for key in REFUSED if key not in self._ignore))
        for key in sorted(self.values):
            if key not in self.read and key not in harmless:
                raise UserError(
                    f"config.json has the key {self.path + key!r} ({value_text(self.values[key])}), which the "
                    f"{self.model_type} family here does not know; if it cannot change the forward pass, pass "
                    f"model.ignore_keys=[{key}]"
                )
        for section in self._sections:
            section.done()

    def rope(
        self,
        head_dim: int,
        *,
        section: str | None = None,
        kinds: Mapping[str, RopeKind] = ROPE_KINDS,
        theta_key: str = "rope_theta",
        default_theta: float = 10000.0,
        partial_key: str = "partial_rotary_factor",
        default_partial: float | None = None,
        extra: Iterable[str] = (),
    ) -> Rope:
        """The rotary embedding, from `rope_parameters` or, in older files, from `theta_key` with `rope_scaling`.

        Args:
            head_dim: features of a head.
            section: layer type, for configs with `rope_parameters` for each type; `rope_scaling` is then that of full
                attention.
            kinds: scaling types of the family.
            theta_key, default_theta: key of theta in older files, and its default.
            partial_key, default_partial: the same for the rotated fraction of a head; None for families that rotate
                whole heads, where other fractions are errors.
            extra: keys of the setting that the family reads itself, or that its class ignores.

        Raises:
            UserError: unsupported or contradictory settings.
        """
        old = None if section == "sliding_attention" else self._mapping("rope_scaling")
        new = self._mapping("rope_parameters")
        if section is not None and new is not None:
            if unknown := sorted(set(new) - {"full_attention", "sliding_attention"}):
                raise UserError(
                    f"config.json: rope_parameters has {value_text(unknown[0])}, which is no type of layer here"
                )
            new = HFConfig(new, path=f"{self.path}rope_parameters.")._mapping(section)
        if old and new and _spelling(old) != _spelling(new):
            raise UserError(
                f"config.json contradicts itself: rope_scaling is {value_text(old)}, "
                f"rope_parameters is {value_text(new)}"
            )
        name = "rope_scaling" if not new else "rope_parameters" if section is None else f"rope_parameters.{section}"
        scaling = HFConfig(
            new or old or {}, {*self._ignore, *extra}, path=f"{self.path}{name}.", model_type=self.model_type
        )

        theta = self._agreed("rope_theta", scaling.get("rope_theta"), self.get(theta_key), default_theta)
        theta = HFConfig({theta_key: theta}, path=self.path, model_type=self.model_type).positive(theta_key)
        partial = self._agreed(
            "partial_rotary_factor", scaling.get("partial_rotary_factor"), self.get(partial_key), default_partial or 1.0
        )
        partial = HFConfig({partial_key: partial}, path=self.path, model_type=self.model_type).positive(partial_key)
        if default_partial is None and partial != 1:
            raise UserError(
                f"config.json: partial_rotary_factor is {partial!r}, but {self.model_type} rotates whole heads"
            )
        kind = self._agreed("rope_type", scaling.get("rope_type"), scaling.get("type"), "default")
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(
                f"config.json: {scaling.path}rope_type is {value_text(kind)}; supported are {', '.join(kinds)}"
            )
        dim = int(head_dim * partial)
        if dim > MOST_ROTATED:
            raise UserError(f"config.json: heads of {head_dim} features are beyond what a rotary embedding is made for")
        if not 2 <= dim <= head_dim:
            raise UserError(
                f"config.json: partial_rotary_factor is {partial!r}, which rotates {dim} of {head_dim} features"
            )
        if section is not None and scaling.get("truncate") is False:
            raise scaling.refusal("truncate", "which is not supported where layers differ")  # upstream never reads it
        rope = self._scaled(dim, theta, kinds[kind], scaling, self.size("max_position_embeddings", 2048))
        scaling.done(harmless=frozenset())
        return rope

    def _scaled(self, dim: int, theta: float, kind: RopeKind, scaling: HFConfig, limit: int) -> Rope:
        """The rope of a kind with settings from `scaling`; `limit` is the maximum sequence length."""
        original = self._agreed(_ORIGINAL, scaling.get(_ORIGINAL), self.get(_ORIGINAL), limit)
        original = HFConfig({_ORIGINAL: original}, path=self.path, model_type=self.model_type).size(_ORIGINAL)
        if kind == "default":
            return Rope(dim, theta)
        if kind in ("linear", "dynamic"):
            if kind == "dynamic" and dim == 2:
                raise UserError("config.json: rope type 'dynamic' is not defined for 2 rotated features")
            return Rope(dim, theta, kind, factor=scaling.positive("factor"), original_positions=limit)
        if kind == "llama3":
            return Rope(
                dim,
                theta,
                kind,
                factor=scaling.positive("factor"),
                original_positions=original,
                low_freq_factor=scaling.positive("low_freq_factor"),
                high_freq_factor=scaling.positive("high_freq_factor"),
            )
        if dim % 2:
            raise UserError(f"config.json: rope type {kind!r} needs an even number of rotated features, not {dim}")
        if kind == "longrope" and original < 2:
            raise UserError(f"config.json: {_ORIGINAL} is {original}, but rope type 'longrope' takes its logarithm")
        implied = kind == "longrope" or "factor" in scaling.values
        factor = scaling.positive("factor", limit / original if implied else None)
        if kind == "yarn":
            m, m_all = scaling.number("mscale", 0), scaling.number("mscale_all_dim", 0)
            if m < 0 or m_all < 0:
                raise UserError(
                    f"config.json: {scaling.path}mscale is {m}, mscale_all_dim {m_all}; none may be negative"
                )
            attention = _mscale(factor, m) / _mscale(factor, m_all) if m and m_all else _mscale(factor, 1)
            return Rope(
                dim,
                theta,
                kind,
                factor=factor,
                original_positions=original,
                beta_fast=scaling.number("beta_fast", 32) or 32,
                beta_slow=scaling.number("beta_slow", 1) or 1,
                truncate=scaling.flag("truncate", True),
                attention_factor=scaling.positive("attention_factor", attention),
            )
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = scaling.numbers("short_factor"), scaling.numbers("long_factor")
        if min((*short, *long), default=1.0) <= 0:
            raise UserError(f"config.json: {scaling.path}short_factor and long_factor must be positive numbers")
        if not len(short) == len(long) == dim // 2:
            raise UserError(
                f"config.json: short_factor and long_factor have {len(short)} and {len(long)} entries for {dim // 2} "
                "rotary frequencies"
            )
        return Rope(
            dim,
            theta,
            kind,
            factor=factor,
            original_positions=original,
            attention_factor=scaling.positive("attention_factor", attention),
            short_factor=short,
            long_factor=long,
        )

    def _agreed(self, key: str, first: Any, second: Any, default: Any) -> Any:
        """A value that can be given in two places, which must agree."""
        if first is not None and second is not None and first != second:
            raise UserError(
                f"config.json contradicts itself: {key} is both {value_text(first)} and {value_text(second)}"
            )
        return first if first is not None else second if second is not None else default


def _mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def _spelling(scaling: ReadJson) -> Json:
    """A rope setting without keys in which old and new formats differ."""
    plain = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
    return {k: v for k, v in plain.items() if k not in ("rope_theta", "partial_rotary_factor")}
