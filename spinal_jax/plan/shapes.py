"""Shapes of planned decoders, from config.json; some are shipped with the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from spinal_jax.config import ModelConfig
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import read_model
from spinal_jax.models.formats.adapter import is_adapter
from spinal_jax.models.formats.base import read_config
from spinal_jax.models.formats.byte_level import SIZES
from spinal_jax.models.formats.open import adapted, at_revision, open_checkpoint
from spinal_jax.models.formats.random_weights import RANDOM, random_shape

FOLDER = Path(__file__).parent / "shapes"


@cache
def shipped() -> dict[str, Json]:
    """config.json of the shipped models, by hub id and by short name."""
    found = {}
    for file in sorted(FOLDER.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found |= dict.fromkeys((file.stem, record["source"], *record["same"]), record["config"])
    return found


def decoder_of(config: ModelConfig) -> DecoderConfig:
    """The decoder of `config.source`, without weights.

    Reads config.json of a folder, or the header of a .gguf file. For a hub id that is not shipped, config.json is
    downloaded or taken from the cache. Raises UserError if it cannot be read.
    """
    return read_model(_config_of(config.source, config.revision, config.base), config.ignore_keys)[1]


def _config_of(source: str, revision: str | None, base: str | None, is_base: bool = False) -> Json:
    """The content of config.json; `is_base`: of the base model of an adapter."""
    if source.startswith(RANDOM):
        shape, _ = random_shape(source, revision, base)
        return dict(SIZES[shape]) if shape in SIZES else _config_of(shape, revision, base)
    path = Path(source).expanduser()
    if path.is_dir() and revision is not None:
        path = at_revision(path, source, revision)
    if path.is_dir() and is_adapter(path):
        if is_base:
            raise UserError(f"{source} is an adapter itself; merge that one first")
        return _config_of(*adapted(path, base), None, is_base=True)
    if base is not None:
        raise UserError(f"base {base!r} was given for {source!r}, which is a whole model and not an adapter")
    if path.is_dir():
        return read_config(path)
    if not path.exists() and source in shipped() and revision is None:
        return dict(shipped()[source])
    if not path.exists() and path.suffix.lower() != ".gguf" and source.count("/") == 1:
        return _hub_config(source, revision)
    if not path.exists() and path.suffix.lower() != ".gguf":
        raise UserError(
            f"there is no model {source!r}: expected a folder with config.json, a .gguf file, a hub id (owner/name), "
            f"random:SIZE, or one of {', '.join(_short_names())}"
        )
    checkpoint = open_checkpoint(source, revision, base)
    try:
        return checkpoint.config
    finally:
        checkpoint.close()


def _short_names() -> Iterator[str]:
    return (name for name in shipped() if "/" not in name)


def _hub_config(repo: str, revision: str | None) -> Json:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        file = Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=revision))
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the config.json of {repo} does not come with spinal, is not in the hub's cache and could not be "
            f"downloaded; name a folder that holds it, or one of {', '.join(_short_names())}"
        ) from error
    return read_config(file.parent)
