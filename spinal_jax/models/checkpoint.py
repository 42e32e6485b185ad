"""Opens the checkpoint a user names. Every kind looks alike: an HF-style config, and tensors under HF names."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from spinal_jax.errors import UserError
from spinal_jax.models.folders import COMPANIONS, read_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Checkpoint(Protocol):
    """A model on disk: a config as config.json holds it, and tensors under HF names in HF layout, read one by one."""

    source: str  # what the user named
    kind: str  # "huggingface", "gguf" or "orbax"
    config: dict[str, Any]  # the content of config.json, or the same rebuilt from the file's own metadata
    revision: str | None  # the commit that a hub download resolved to

    def names(self) -> Mapping[str, TensorInfo]:
        """Every tensor by HF name, sorted, with its shape and the dtype that `tensor` returns; reads no weights."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, read now into an array of its own. bfloat16 is `ml_dtypes.bfloat16`. KeyError if unknown."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's fast tokenizer, with its chat template; UserError if it has none that can be trusted."""
        ...

    def sha256(self) -> str:
        """Hex digest of the weight files' bytes, in order of file name; of one file it is what `sha256sum` prints."""
        ...

    def close(self) -> None:
        """Release what is held open. Arrays already read stay valid."""
        ...


Bounds = tuple[tuple[int, int], ...]  # (start, stop) along each axis


@runtime_checkable
class ReadsParts(Protocol):
    """A checkpoint that can read some rows of a tensor without the others."""

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        """A block of a tensor, read now into an array of its own."""
        ...


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
            from spinal_jax.models.orbax import OrbaxFolder

            return OrbaxFolder(path, source)
        return SafetensorsFolder(path, source)
    if is_gguf and path.is_file():
        from spinal_jax.models.gguf import GgufFile

        return GgufFile(path, source)
    if path.exists():
        raise UserError(f"{source} is neither a folder nor a .gguf file; name the folder that holds config.json")
    raise UserError(f"there is no {source!r}: expected an existing folder, a .gguf file, or a hub id (owner/name)")


def sha256_of(paths: Iterable[Path]) -> str:
    """Hex SHA-256 of the files' bytes one after the other, read in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}


class _Stored(NamedTuple):
    path: Path
    offset: int
    info: TensorInfo


class SafetensorsFolder:
    """A Hugging Face folder: config.json beside model.safetensors or the shards that an index names."""

    kind: str = "huggingface"

    def __init__(self, folder: Path, source: str, revision: str | None = None) -> None:
        self.folder = folder
        self.source = source
        self.revision = revision
        self.config = read_config(folder)
        self._stored = _find_tensors(folder)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {name: self._stored[name].info for name in sorted(self._stored)}

    def names(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensor(self, name: str) -> np.ndarray:
        shape = self._stored[name].info.shape
        return self._rows(name, 0, shape[0] if shape else 1).reshape(shape)

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        shape = self._stored[name].info.shape
        if len(shape) == 2 and bounds[1] != (0, shape[1]):
            return self._block(name, *bounds)
        return self._rows(name, *bounds[0])[(slice(None), *(slice(*each) for each in bounds[1:]))]

    def _block(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Some columns of some rows, without the bytes between them: a process of several may need few of them."""
        path, offset, info = self._stored[name]
        values = np.empty((rows[1] - rows[0], columns[1] - columns[0]), info.dtype)
        flat, wide = values.view(np.uint8), info.shape[1] * info.dtype.itemsize
        with path.open("rb", buffering=0) as file:
            for place, row in enumerate(range(*rows)):
                file.seek(offset + row * wide + columns[0] * info.dtype.itemsize)
                if file.readinto(flat[place].data) != flat.shape[1]:
                    raise _shorter(path, name)
        return values

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        # Read, not mapped: mapped pages count as resident memory, and a streaming conversion would seem to hold it all.
        path, offset, info = self._stored[name]
        wide = math.prod(info.shape[1:])
        count = (stop - start) * wide
        values = np.fromfile(path, info.dtype, count, offset=offset + start * wide * info.dtype.itemsize)
        if values.size != count:
            raise _shorter(path, name)
        return values.reshape(stop - start, *info.shape[1:])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from spinal_jax.models.tokenizer import folder_tokenizer

        return folder_tokenizer(self.folder)

    def sha256(self) -> str:
        return sha256_of(sorted({stored.path for stored in self._stored.values()}))

    def close(self) -> None:
        """Nothing is held open between reads."""


def _shorter(path: Path, name: str) -> UserError:
    return UserError(f"{path} has become shorter since it was opened: {name} cannot be read")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Errors: UserError."""
    path = folder / "config.json"
    if path.exists():
        return _read_json(path)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter, not a whole model: merge it into its base model and save that")
    raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder")


def _find_tensors(folder: Path) -> dict[str, _Stored]:
    """Where every tensor of the folder lies, from the shards' headers alone."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return _read_header(single)
    if index.exists():
        return _read_shards(folder, index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise UserError(
            f"{folder} has its weights only as pickle ({pickles[0]}), which is never read because it can run code; "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise UserError(f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json")


def _read_shards(folder: Path, index: Path) -> dict[str, _Stored]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map that says which shard holds which tensor")
    shards: dict[str, dict[str, _Stored]] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if Path(shard).name != shard:
            raise UserError(f"{index} names the shard {shard!r}, which is not a file of the folder itself")
        if not (folder / shard).exists():
            raise UserError(f"the shard {shard} is missing from {folder}: {index.name} names it")
        shards[shard] = _read_header(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise UserError(f"{index} says that {name} is in {shard}, but that file does not hold it")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_header(path: Path) -> dict[str, _Stored]:
    """The tensors of one safetensors file; the reference parser refuses a header that does not cover the whole file."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    stored = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise UserError(f"{name} in {path} has the dtype {entry['dtype']}; those that can be read are {known}")
        stored[name] = _Stored(path, 8 + length + entry["data_offsets"][0], TensorInfo(tuple(entry["shape"]), dtype))
    return stored


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
