"""Opens a checkpoint of any format."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterable
from pathlib import Path

from spinal_jax.errors import UserError
from spinal_jax.models.formats.adapter import AdapterFolder, base_of, is_adapter
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.expert_tensors import apart
from spinal_jax.models.formats.folders import COMPANIONS, read_record
from spinal_jax.models.formats.quantised import dequantised
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.models.hf_config import shorten_middle


def open_checkpoint(source: str, revision: str | None = None, base: str | None = None) -> Checkpoint:
    """Opens a checkpoint: a folder with config.json and safetensors, a PEFT adapter folder, a .gguf file, a
    folder that `spinal convert` wrote, or a hub id `owner/name` of a model or an adapter.

    Formats, shards and lengths are checked without reading weights, so that damaged downloads are reported early.

    Args:
        source: as above.
        revision: of a hub id: a branch, tag or commit, or a training step such as `step-1000`, which stands for the
            one branch of that step; of a local folder with one folder for each step: which of them.
        base: of an adapter: the model that it was trained on, in place of the one that its adapter_config.json names.

    Errors: UserError.
    """
    try:
        checkpoint = _open(source, revision, base)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{shorten_middle(str(error.filename))} is too long for the name of a file") from error
    if base is not None and checkpoint.kind != "adapter":
        checkpoint.close()
        raise UserError(f"base {base!r} was given for {source!r}, which is a whole model and not an adapter")
    return checkpoint


def _open(source: str, revision: str | None, base: str | None, is_base: bool = False) -> Checkpoint:
    """As `open_checkpoint`; `is_base`: for an adapter, which is trained on a whole model."""
    path = Path(source).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    if not path.exists() and not is_gguf and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return _hub_snapshot(source, revision, base, is_base)
    if revision is not None:
        path = at_revision(path, source, revision)
    if path.is_dir():
        record = read_record(path)
        if record is not None and record["sha256"] is None:
            raise UserError(f"{source} was not finished; run the command that writes it again, and it will go on")
        if (path / "orbax.checkpoint").exists() or (path / "_CHECKPOINT_METADATA").exists():
            from spinal_jax.models.formats.orbax import OrbaxFolder

            return OrbaxFolder(path, source)
        return _folder(path, source, base, is_base=is_base)
    if is_gguf and path.is_file():
        from spinal_jax.models.formats.gguf import GgufFile

        return GgufFile(path, source)
    if path.exists():
        raise UserError(f"{source} is neither a folder nor a .gguf file; name the folder that holds config.json")
    raise UserError(f"there is no {source!r}: expected an existing folder, a .gguf file, or a hub id (owner/name)")


def adapter_base(source: str, revision: str | None = None, base: str | None = None) -> tuple[str, str | None]:
    """The base model of an adapter and its revision. Raises UserError if `source` is not an adapter."""
    checkpoint = open_checkpoint(source, revision, base)
    with contextlib.closing(checkpoint):
        if not isinstance(checkpoint, AdapterFolder):
            raise UserError(
                f"reference is missing; give reference.source=CHECKPOINT, since {source} is no adapter, which names one"
            )
        return checkpoint.base.source, checkpoint.base.revision


def _folder(
    path: Path, source: str, base: str | None, revision: str | None = None, is_base: bool = False
) -> Checkpoint:
    """A Hugging Face folder: a whole model, or an adapter on its base."""
    if not is_adapter(path):
        return apart(dequantised(SafetensorsFolder(path, source, revision)))
    if is_base:  # also where an adapter is its own base
        raise UserError(f"{source} is an adapter itself; merge that one first")
    name, base_revision = adapted(path, base)
    try:
        model = _open(name, base_revision, None, is_base=True)
    except UserError as error:
        raise UserError(f"the base model of the adapter {source}: {error}; another is named by model.base=") from error
    return AdapterFolder(path, source, model)


def adapted(adapter: Path, base: str | None) -> tuple[str, str | None]:
    """Source and revision of the base model of an adapter folder: `base`, or the one that it names, perhaps relative to
    itself."""
    name, revision = (base, None) if base is not None else base_of(adapter)
    if (relative := adapter / name).is_dir() and not Path(name).expanduser().exists():
        name = str(relative)
    return name, revision


_STEP = re.compile(r"(?:step|checkpoint)[-_]?(\d{1,12})", re.IGNORECASE)
_STEPS = re.compile(r"(?:^|[^a-z0-9])(?:global_?)?(?:step|checkpoint)[-_]?(\d{1,12})(?!\d)")


def _of_step(names: Iterable[str], revision: str) -> list[str]:
    """The names that match the training step of a revision such as `step-1000`."""
    if not (match := _STEP.fullmatch(revision)):
        return []
    return sorted(name for name in names if int(match[1]) in map(int, _STEPS.findall(name.lower())))


def at_revision(path: Path, source: str, revision: str) -> Path:
    """The folder within a local `path` for a revision. Raises UserError if there is none."""
    found = _step_folder(path, revision) if path.is_dir() else None
    if found is None:
        raise UserError(f"revision {revision!r} was given for {source!r}, but only a hub id (owner/name) has any")
    return found


def _step_folder(path: Path, revision: str) -> Path | None:
    """The folder within `path` for a revision or its training step."""
    if Path(revision).name == revision and (path / revision).is_dir():
        return path / revision
    matches = _of_step((each.name for each in path.iterdir() if each.is_dir()), revision)
    if len(matches) > 1:
        raise UserError(f"{path} has several folders for {revision}: {', '.join(matches)}; name one of them")
    return path / matches[0] if matches else None


_HUB_FILES = ["adapter_config.json", "config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS]


def _hub_snapshot(repo: str, revision: str | None, base: str | None, is_base: bool = False) -> Checkpoint:
    """The repository's config, safetensors and tokenizer, downloaded into the hub's cache or found there."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    named = repo if revision is None else f"{repo} at revision {revision}"
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as error:
        raise UserError(f"{named} is gated: accept its terms on the hub, then log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        return _hub_snapshot(repo, _step_revision(repo, revision, error), base, is_base)
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{repo} is neither a local folder nor a repository that the hub shows you") from error
    except errors.LocalEntryNotFoundError as error:
        if revision is not None and len(matches := _of_step(_cached_revisions(repo), revision)) == 1:
            return _hub_snapshot(repo, matches[0], base, is_base)
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(f"{named} is neither a local folder nor in the hub's cache, and {why}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{named} could not be downloaded: {reason[0] if reason else type(error).__name__}") from error
    return _folder(folder, repo, base, revision=folder.name, is_base=is_base)


def _step_revision(repo: str, revision: str | None, error: Exception) -> str:
    """The one branch or tag of a repository that belongs to a training step. Errors: UserError."""
    matches: list[str] = []
    if _STEP.fullmatch(revision or ""):
        import huggingface_hub

        try:
            refs = huggingface_hub.list_repo_refs(repo)
        except Exception as trouble:  # the transport differs between releases of the client
            reason = str(trouble).strip().splitlines()
            why = reason[0] if reason else type(trouble).__name__
            raise UserError(f"the revisions of {repo} cannot be listed to find {revision!r}: {why}") from trouble
        matches = _of_step((ref.name for ref in (*refs.branches, *refs.tags)), revision or "")
    if len(matches) > 1:
        raise UserError(
            f"{repo} has several revisions for {revision}: {', '.join(matches)}; name one of them"
        ) from error
    if not matches or matches == [revision]:
        raise UserError(f"the hub has {repo}, but no revision {revision!r} of it") from error
    return matches[0]


def _cached_revisions(repo: str) -> list[str]:
    """The branches and tags of a repository that were downloaded before."""
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs"
    return [path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file()] if refs.is_dir() else []
