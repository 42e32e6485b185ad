"""A tokenizer of bytes, and sizes of small decoders to go with it: all that a model made from nothing needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from spinal_jax.jsontypes import Json
from spinal_jax.models.formats.tokenizer import without_advice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_RESERVED = tuple(f"<|reserved_{index}|>" for index in range(5))  # 264 = 8 x 33 tokens, so that a vocabulary shards


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of 264 tokens: the 256 bytes, then BOS (256), EOS (257), PAD (258) and five in reserve.

    It puts BOS first, and gives any text back: `decode(encode(text), skip_special_tokens=True) == text` where `text`
    does not itself spell a special token. `save_pretrained` writes it as tokenizer.json.
    """
    with without_advice():
        from transformers import PreTrainedTokenizerFast

    special = (BOS, EOS, PAD, *_RESERVED)
    vocabulary = {symbol: number for number, symbol in enumerate((*_byte_symbols(), *special))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _byte_symbols() -> list[str]:
    """The character that stands for each byte: itself where it prints, else the next beyond 255, as GPT-2 has it."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def _llama(width: int, depth: int, heads: int, mlp_width: int) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256 + 3 + len(_RESERVED),
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": mlp_width,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }


SIZES: dict[str, Json] = {
    "0.3m": _llama(width=64, depth=6, heads=2, mlp_width=176),
    "0.6m": _llama(width=96, depth=6, heads=3, mlp_width=208),
    "1m": _llama(width=96, depth=9, heads=3, mlp_width=256),
    "2m": _llama(width=128, depth=10, heads=4, mlp_width=352),
    "3m": _llama(width=160, depth=10, heads=5, mlp_width=432),
    "10m": _llama(width=256, depth=12, heads=4, mlp_width=704),
    "30m": _llama(width=448, depth=12, heads=7, mlp_width=1200),
    "100m": _llama(width=704, depth=16, heads=11, mlp_width=1888),
    "300m": _llama(width=1024, depth=24, heads=16, mlp_width=2752),
    "1b": _llama(width=1792, depth=26, heads=14, mlp_width=4736),
}
"""config.json of Llama-family decoders of bytes, by their number of parameters."""
