"""Settings of data: prompts, preference pairs, documents."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from spinal_jax.config.record import about, require
from spinal_jax.errors import UserError


def require_path(part: str, path: str | None, needed: bool, allowed: bool) -> None:
    """UserError where a file is needed and none is named, or one is named and none is read."""
    if path is None and needed:
        raise UserError(f"{part}.path is missing; give {part}.path=FILE")
    require(path is None or allowed, f"{part}.path", path, "null: the world is generated")


def require_source(part: str, record: PromptsConfig | PreferencesConfig, needed: bool) -> None:
    """UserError unless `path` or `dataset` names one source where one is needed or read, and the rest belongs to it."""
    generated = record.format == "world"
    if record.dataset is None:
        require_path(part, record.path, needed=needed and not generated, allowed=not generated)
        for name in ("name", "revision"):
            value = getattr(record, name)
            require(value is None, f"{part}.{name}", value, f"null without {part}.dataset")
        alone = record.split is None or record.path is not None
        require(alone, f"{part}.split", record.split, f"null without {part}.dataset or {part}.path")
        return
    require(record.path is None, f"{part}.path", record.path, f"null beside {part}.dataset={record.dataset}")
    readable = record.format not in ("text", "world")
    require(readable, f"{part}.format", record.format, f"a format with fields beside {part}.dataset={record.dataset}")
    good = bool(record.dataset.strip()) and "://" not in record.dataset
    require(good, f"{part}.dataset", record.dataset, "the id of a data set, such as owner/name")


PromptFormat = Literal[
    "jsonl", "text", "hh", "ultrafeedback", "tulu3", "dolci", "helpsteer3", "shp", "nectar", "orca", "kto", "world"
]
PairFormat = Literal[
    "hh", "jsonl", "ultrafeedback", "tulu3", "dolci", "helpsteer3", "shp", "nectar", "orca", "kto", "world"
]


@dataclass(frozen=True)
class PairFieldsConfig:
    """Which columns hold what a format of pairs calls prompt, chosen, rejected and system: `preferences.fields`."""

    prompt: str | None = dataclasses.field(
        default=None, metadata=about("column of the prompt; null: that of the format")
    )
    chosen: str | None = dataclasses.field(default=None, metadata=about("column of the preferred response"))
    rejected: str | None = dataclasses.field(default=None, metadata=about("column of the other response"))
    system: str | None = dataclasses.field(default=None, metadata=about("column of the system's message"))

    @property
    def given(self) -> dict[str, str]:
        """Those that are not null."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class PromptsConfig:
    """Which prompts: `prompts`."""

    path: str | None = dataclasses.field(
        default=None, metadata=about("file; null: the 256 prompts that ship with the package")
    )
    dataset: str | None = dataclasses.field(
        default=None, metadata=about("id of a hub data set, owner/name, streamed in place of a file")
    )
    split: str | None = dataclasses.field(
        default=None, metadata=about("split of the data set (null: train) or of a folder")
    )
    name: str | None = dataclasses.field(default=None, metadata=about("configuration of the data set"))
    revision: str | None = dataclasses.field(
        default=None, metadata=about("branch, tag or commit of the data set; null: its main branch")
    )
    format: PromptFormat = dataclasses.field(
        default="jsonl",
        metadata=about("layout of the rows (docs/data.md); jsonl: a field, text: lines, world: generated questions"),
    )
    field: str = dataclasses.field(default="prompt", metadata=about("column of a row of format jsonl"))
    limit: int | None = dataclasses.field(default=None, metadata=about("how many to read; null: all", "rows"))
    offset: int = dataclasses.field(default=0, metadata=about("how many to skip first", "rows"))
    max_length: int = dataclasses.field(default=256, metadata=about("longer prompts keep their last tokens", "tokens"))
    chat_template: bool = dataclasses.field(
        default=False, metadata=about("render prompts with the tokenizer's chat template")
    )

    def __post_init__(self) -> None:
        require_source("prompts", self, needed=False)
        require(self.limit is None or self.limit > 0, "prompts.limit", self.limit, "a number above 0, or null for all")
        require(self.offset >= 0, "prompts.offset", self.offset, "0 or more rows to pass over")
        require(self.max_length > 1, "prompts.max_length", self.max_length, "2 or more tokens")


@dataclass(frozen=True)
class PreferencesConfig:
    """Which preference pairs; `sft` trains on the chosen responses: `preferences`."""

    path: str | None = dataclasses.field(default=None, metadata=about("file; of the world null"))
    dataset: str | None = dataclasses.field(
        default=None, metadata=about("id of a hub data set, owner/name, streamed in place of a file")
    )
    split: str | None = dataclasses.field(
        default=None, metadata=about("split of the data set (null: train) or of a folder")
    )
    name: str | None = dataclasses.field(default=None, metadata=about("configuration of the data set"))
    revision: str | None = dataclasses.field(
        default=None, metadata=about("branch, tag or commit of the data set; null: its main branch")
    )
    format: PairFormat = dataclasses.field(
        default="hh", metadata=about("layout of the rows (docs/data.md); world: generated pairs")
    )
    fields: PairFieldsConfig = dataclasses.field(default_factory=PairFieldsConfig)
    limit: int | None = dataclasses.field(
        default=None, metadata=about("how many to read; null: all", "rows or generated pairs")
    )
    offset: int = dataclasses.field(default=0, metadata=about("how many to skip first", "rows"))
    held_out: int = dataclasses.field(
        default=0, metadata=about("last rows, kept from training and used to evaluate", "rows")
    )
    max_length: int = dataclasses.field(default=256, metadata=about("longest prompt and response together", "tokens"))
    overlong: Literal["drop", "cut_prompt"] = dataclasses.field(
        default="drop", metadata=about("longer pairs are dropped, or their prompts are cut from the left")
    )
    chat_template: bool = dataclasses.field(
        default=False, metadata=about("render pairs with the tokenizer's chat template")
    )
    separability: float = dataclasses.field(
        default=1.0, metadata=about("share of generated pairs whose two responses differ in style")
    )
    label_noise: float = dataclasses.field(
        default=0.0, metadata=about("probability that chosen and rejected change places, in training")
    )
    shuffle_labels: bool = dataclasses.field(
        default=False, metadata=about("random labels, in training and evaluation: the null control")
    )
    seed: int = dataclasses.field(default=0, metadata=about("seed of the generated pairs and of the labels"))

    def __post_init__(self) -> None:
        require_source("preferences", self, needed=True)
        require(self.limit is None or self.limit > 0, "preferences.limit", self.limit, "a number above 0, or null")
        require(self.offset >= 0, "preferences.offset", self.offset, "0 or more rows to pass over")
        require(self.held_out >= 0, "preferences.held_out", self.held_out, "0 or more rows")
        require(self.max_length > 2, "preferences.max_length", self.max_length, "3 or more tokens")
        require(0 <= self.seed < 2**32, "preferences.seed", self.seed, "a number from 0 to 2^32 - 1")
        for name in ("separability", "label_noise"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"preferences.{name}", value, "a number from 0 to 1")


@dataclass(frozen=True)
class CorpusConfig:
    """Which documents `lm` trains on: `corpus`."""

    path: str | None = dataclasses.field(default=None, metadata=about("file; of the world null"))
    format: Literal["text", "jsonl", "world"] = dataclasses.field(
        default="text", metadata=about("format of the file; world: generated dialogues")
    )
    field: str = dataclasses.field(default="text", metadata=about("key of a jsonl row"))
    limit: int | None = dataclasses.field(default=None, metadata=about("how many to read; null: all", "documents"))
    held_out: int = dataclasses.field(
        default=0, metadata=about("last documents, kept from training and used to evaluate", "documents")
    )
    max_length: int = dataclasses.field(default=256, metadata=about("longer documents are cut into pieces", "tokens"))
    seed: int = dataclasses.field(default=0, metadata=about("seed of the generated dialogues"))

    def __post_init__(self) -> None:
        from_file = self.format != "world"
        require_path("corpus", self.path, needed=from_file, allowed=from_file)
        require(self.limit is None or self.limit > 0, "corpus.limit", self.limit, "a number above 0, or null")
        require(self.held_out >= 0, "corpus.held_out", self.held_out, "0 or more documents")
        require(self.max_length > 1, "corpus.max_length", self.max_length, "2 or more tokens")
        require(0 <= self.seed < 2**32, "corpus.seed", self.seed, "a number from 0 to 2^32 - 1")
