"""A strict reader of Hugging Face config.json: every key is used, knowingly ignored, or an error that names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from spinal_jax.errors import UserError
from spinal_jax.models.rope import Rope, RopeKind

# Keys that cannot change what a forward pass computes: bookkeeping, training-only settings, generation defaults.
HARMLESS = frozenset(
    """
    _name_or_path architectures auto_map bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id unk_token_id torch_dtype dtype transformers_version model_type name_or_path use_cache
    initializer_range initializer_factor init_std attention_dropout attn_dropout attention_dropout_prob hidden_dropout
    resid_pdrop embd_pdrop attn_pdrop classifier_dropout embedding_dropout hidden_dropout_prob resid_dropout
    gradient_checkpointing pretraining_tp return_dict output_hidden_states output_attentions torchscript use_bfloat16
    tf_legacy_loss chunk_size_feed_forward cross_attention_hidden_size tie_encoder_decoder finetuning_task id2label
    label2id tokenizer_class prefix task_specific_params problem_type max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens keys_to_ignore_at_inference
    _attn_implementation _attn_implementation_autoset attn_implementation _attn_implementation_internal
    output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux unsloth_version unsloth_fixed
    transformers.js_config _commit_hash
    """.split()
)

# Keys that must be absent, empty or false: what they switch on would change the forward.
REFUSED = frozenset(
    """
    quantization_config is_encoder_decoder add_cross_attention pruned_heads is_decoder
    """.split()
)

ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
}


class HFConfig:
    """config.json, read key by key; `done` refuses what nobody read.

    >>> config = HFConfig({"hidden_size": 64, "new_switch": True})
    >>> config.integer("hidden_size")
    64
    >>> config.done()
    Traceback (most recent call last):
    spinal_jax.errors.UserError: config.json has the key 'new_switch' (True), which ...
    """

    def __init__(self, values: Mapping[str, Any], ignore: Iterable[str] = ()):
        self.values = dict(values)
        self.read: set[str] = set(ignore)

    @property
    def model_type(self) -> str:
        """The family's name in Hugging Face's terms."""
        return str(self.values.get("model_type", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key that may be absent; null reads as absent, as in Hugging Face."""
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def _typed(self, key: str, kinds: type | tuple[type, ...], what: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise UserError(f"config.json lacks {key!r}, which a {self.model_type} model needs")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise UserError(f"config.json: {key} is {value!r}, which is not {what}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number, required where there is no default."""
        return int(self._typed(key, int, "a whole number", default))

    def number(self, key: str, default: float | None = None) -> float:
        """A real number, required where there is no default."""
        return float(self._typed(key, (int, float), "a number", default))

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self._typed(key, bool, "true or false", default))

    def choice(self, key: str, table: Mapping[str, Any], default: str | None = None) -> Any:
        """The entry of `table` that the key names."""
        name = self._typed(key, str, "a name", default)
        if name not in table:
            raise UserError(f"config.json: {key} is {name!r}; supported are {', '.join(sorted(table))}")
        return table[name]

    def ignore(self, *keys: str) -> None:
        """Marks keys as read that change nothing in this family."""
        self.read.update(keys)

    def refuse(self, *keys: str) -> None:
        """Refuses keys that, set to anything but false, zero, null or empty, would need code that this family has not."""
        for key in keys:
            if self.get(key):
                raise UserError(
                    f"config.json: {key} is {self.values[key]!r}, which {self.model_type} models here do not support"
                )

    def done(self) -> None:
        """Refuses keys that nobody read, so that nothing in a checkpoint is silently left out."""
        self.refuse(*REFUSED)
        for key in sorted(self.values):
            if key not in self.read and key not in HARMLESS:
                raise UserError(
                    f"config.json has the key {key!r} ({self.values[key]!r}), which the {self.model_type} family here "
                    f"does not know; if it cannot change the forward pass, pass model.ignore_keys=[{key}]"
                )

    def rope(self, head_dim: int, *, default_theta: float = 10000.0, section: str | None = None) -> Rope:
        """The rotary embedding, from `rope_parameters` or from `rope_theta` with `rope_scaling`.

        Args:
            head_dim: features of a head; `partial_rotary_factor` rotates only the first part of them.
            default_theta: where config.json has none.
            section: the layer type, for configs whose `rope_parameters` holds one entry for each.
        """
        theta = self.get("rope_theta")
        partial = self.get("partial_rotary_factor", self.get("rotary_pct"))
        old, new = self.get("rope_scaling"), self.get("rope_parameters")
        if section is not None and new is not None and section in new:
            new = new[section]
        if old and new and _plain(old) != _plain(new):
            raise UserError(f"config.json contradicts itself: rope_scaling is {old!r}, rope_parameters is {new!r}")
        given = dict(new or old or {})
        theta = _agree("rope_theta", given.pop("rope_theta", None), theta, default_theta)
        partial = _agree("partial_rotary_factor", given.pop("partial_rotary_factor", None), partial, 1.0)
        kind = _agree("rope_type", given.pop("rope_type", None), given.pop("type", None), "default")
        if kind == "su":  # Phi-3's first name for it
            kind = "longrope"
        if kind not in ROPE_KEYS:
            raise UserError(
                f"config.json: rope scaling of type {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}"
            )
        if unknown := sorted(set(given) - ROPE_KEYS[kind] - {"original_max_position_embeddings"}):
            raise UserError(f"config.json: rope scaling {kind!r} has the key {unknown[0]!r}, which is not known for it")
        return self._scaled(int(head_dim * partial), float(theta), cast(RopeKind, kind), given)

    def _scaled(self, dim: int, theta: float, kind: RopeKind, given: dict[str, Any]) -> Rope:
        from math import log, sqrt

        limit = self.integer("max_position_embeddings", 2048)
        original = self.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
        if kind == "default":
            return Rope(dim, theta)
        if kind in ("linear", "dynamic", "llama3") and "factor" not in given:
            raise UserError(f"config.json: rope scaling {kind!r} lacks its factor")
        if kind in ("linear", "dynamic"):
            return Rope(dim, theta, kind, factor=float(given["factor"]), original_positions=limit)
        original = int(original or limit)
        factor = float(given.get("factor") or limit / original)
        if kind == "llama3":
            return Rope(
                dim,
                theta,
                kind,
                factor=factor,
                original_positions=original,
                low_freq_factor=float(given["low_freq_factor"]),
                high_freq_factor=float(given["high_freq_factor"]),
            )
        attention = given.get("attention_factor")
        if kind == "yarn":
            if attention is None:
                m, m_all = given.get("mscale"), given.get("mscale_all_dim")
                attention = _mscale(factor, m) / _mscale(factor, m_all) if m and m_all else _mscale(factor, 1.0)
            return Rope(
                dim,
                theta,
                kind,
                factor=factor,
                original_positions=original,
                beta_fast=float(given.get("beta_fast") or 32),
                beta_slow=float(given.get("beta_slow") or 1),
                truncate=bool(given.get("truncate", True)),
                attention_factor=float(attention),
            )
        if attention is None:
            attention = 1.0 if factor <= 1.0 else sqrt(1 + log(factor) / log(original))
        short, long = tuple(given["short_factor"]), tuple(given["long_factor"])
        if len(short) != dim // 2 or len(long) != dim // 2:
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
            attention_factor=float(attention),
            short_factor=short,
            long_factor=long,
        )


def _mscale(factor: float, m: float) -> float:
    from math import log

    return 1.0 if factor <= 1 else 0.1 * m * log(factor) + 1.0


def _plain(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A rope setting without what old and new spellings may say or leave out."""
    plain = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
    return {k: v for k, v in plain.items() if k not in ("rope_theta", "partial_rotary_factor")}


def _agree(key: str, first: Any, second: Any, default: Any) -> Any:
    """The value given in two possible places, which must not differ."""
    if first is not None and second is not None and first != second:
        raise UserError(f"config.json contradicts itself: {key} is both {first!r} and {second!r}")
    return first if first is not None else second if second is not None else default


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
