"""Opens the checkpoint a user names, whatever its format."""

from __future__ import annotations

import re
from pathlib import Path

from spinal_jax.errors import UserError
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.folders import COMPANIONS, read_record
from spinal_jax.models.formats.safetensors import SafetensorsFolder


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Open what `source` names: a folder with config.json and safetensors, a .gguf file, a folder that
    `spinal convert` wrote, or a hub id `owner/name`.

    Files are checked here as far as that needs no reading of weights: formats, shards and lengths, so that a damaged
    download is refused before any work. Only a hub id has a `revision`. Errors: UserError.
    """
    path = Path(source).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    if not path.exists() and not is_gguf and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return _hub_snapshot(source, revision)
    if revision is not None:
        raise UserError(f"revision {revision!r} was given for {source!r}, but only a hub id (owner/name) has any")
    if path.is_dir():
        record = read_record(path)
        if record is not None and record["sha256"] is None:
            raise UserError(f"{source} was not finished; run the command that writes it again, and it will go on")
        if (path / "orbax.checkpoint").exists() or (path / "_CHECKPOINT_METADATA").exists():
            from spinal_jax.models.formats.orbax import OrbaxFolder

            return OrbaxFolder(path, source)
        return SafetensorsFolder(path, source)
    if is_gguf and path.is_file():
        from spinal_jax.models.formats.gguf import GgufFile

        return GgufFile(path, source)
    if path.exists():
        raise UserError(f"{source} is neither a folder nor a .gguf file; name the folder that holds config.json")
    raise UserError(f"there is no {source!r}: expected an existing folder, a .gguf file, or a hub id (owner/name)")


_HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS]


def _hub_snapshot(repo: str, revision: str | None) -> SafetensorsFolder:
    """The repository's config, safetensors and tokenizer, downloaded into the hub's cache or found there."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    named = repo if revision is None else f"{repo} at revision {revision}"
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as error:
        raise UserError(f"{named} is gated: accept its terms on the hub, then log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"the hub has {repo}, but no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{repo} is neither a local folder nor a repository that the hub shows you") from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(f"{named} is neither a local folder nor in the hub's cache, and {why}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{named} could not be downloaded: {reason[0] if reason else type(error).__name__}") from error
    return SafetensorsFolder(folder, repo, revision=folder.name)
