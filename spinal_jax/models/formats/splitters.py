"""Pre-tokenizers of byte-level GGUF tokenizers, by the name in `tokenizer.ggml.pre`.

The names are defined by llama.cpp's `src/llama-vocab.cpp`; unknown names are errors. Splits are applied in sequence,
each to the pieces of the one before. If llama.cpp and the tokenizer.json of a model differ, the latter is used, because
the model was trained with it: `deepseek-llm` and `deepseek-coder` isolate single digits, `qwen2` and related names
normalise Unicode (NFC) first. `default` and `smollm` follow llama.cpp. Transformers uses the split of GPT-2 for both,
which is wrong for SmolLM: its tokenizer.json isolates digits first, so that both blanks in "a  1" stay together.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from spinal_jax.errors import UserError
from spinal_jax.models.hf_config import value_text


class Splitter(NamedTuple):
    """A pre-tokenizer."""

    patterns: tuple[str, ...]  # matches of each are separate pieces
    compose: bool = False  # Unicode NFC first
    whole_words: bool = False  # pieces that are tokens are not merged
    adds_bos: bool = False  # default of the file

    @property
    def stages(self) -> list[PreTokenizer]:
        """The splits in sequence, then byte level."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}|{_SPACES}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASHED}|{_SPACES}"
# Cased letters without those that DeepSeek's own list leaves out, Georgian and mathematical ones mostly.
_DEEPSEEK_LETTERS = (
    "\\s?[\\p{Lu}\\p{Ll}\\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2f\ua790-\ua7ff\uab30-\uab6f"
    "\U00010570-\U000105bf\U00016e40-\U00016e7f\U0001d400-\U0001d7ff\U0001df00-\U0001dfff]]+"
)
_DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_SPACES}",
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_MARKS = r"[\p{P}\$\+<=>\^~\|]+"

_LLAMA3_KIND = Splitter((_LLAMA3,), whole_words=True, adds_bos=True)
_PLAIN = Splitter((_GPT2,))
_DIGITS_FIRST = Splitter((r"\p{N}", _GPT2))
_GROUPS: dict[str, Splitter] = {
    "default": Splitter((_MARKS, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": _LLAMA3_KIND,
    "dbrx smaug-bpe glm4 chatglm-bpe": Splitter((_LLAMA3,)),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling": _PLAIN,
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": _DIGITS_FIRST,
    "falcon": Splitter((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": Splitter((_QWEN2,), compose=True),
    "stablelm2 hunyuan solar-open grok-2": Splitter((_QWEN2,)),
    "qwen35": Splitter((_QWEN35,), compose=True),
    "tekken": Splitter((_TEKKEN,), whole_words=True, adds_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Splitter((_GPT4O,)),
    "deepseek-llm": Splitter((r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _DEEPSEEK_ASIAN, r"\p{N}")),
    "deepseek-coder": Splitter((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Splitter(_DEEPSEEK3),
    "bloom poro-chat gpt3-finnish": Splitter((_BLOOM,)),
    "viking": Splitter((_BLOOM, r"\p{N}")),
    "bailingmoe bailingmoe2 llada-moe": Splitter(
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
    ),
    "seed-coder": Splitter(
        (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
    ),
}
SPLITTERS = {name: splitter for names, splitter in _GROUPS.items() for name in names.split()}

# Unsupported names with the reason.
_NOT_HERE = {
    "belongs to models that give embeddings, not text": (
        "jina-es jina-de jina-v2-es jina-v2-de jina-v5-nano jina-v1-en jina-v2-code roberta-bpe modern-bert whitespace "
        "granite-embed-multi-311m granite-embed-multi-97m"
    ),
    "needs code of its own in llama.cpp, not patterns alone": "kimi-k2 afmoe gemma4 sarvam-moe",
    "cuts text in a way that no family here uses": (
        "minicpm5 spark2_5 youtu jais-2 exaone-moe chameleon tiny_aya cohere2moe superbpe ufakzeka laguna"
    ),
}
REFUSED = {name: why for why, names in _NOT_HERE.items() for name in names.split()}


def splitter_of(name: object, path: Path) -> Splitter:
    """The splitter of this name. Raises UserError for an unknown name, because another splitter would give other
    tokens.
    """
    if isinstance(name, str) and name in SPLITTERS:
        return SPLITTERS[name]
    if isinstance(name, str) and name in REFUSED:
        raise UserError(f"{path} splits text by tokenizer.ggml.pre = {name!r}, which {REFUSED[name]}")
    known = ", ".join(SPLITTERS)
    raise UserError(f"{path} splits text by tokenizer.ggml.pre = {value_text(name)}; those that are known are {known}")
