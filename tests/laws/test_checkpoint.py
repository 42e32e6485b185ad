"""Hugging Face folders and hub ids: what is read is what was written, and every broken one is refused in a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from spinal_jax.errors import UserError
from spinal_jax.models.formats.open import open_checkpoint

CONFIG = {"model_type": "llama", "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1}


def some_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "model.embed_tokens.weight": rng.normal(size=(6, 4)).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": rng.normal(size=(8, 4)).astype(np.float16),
        "model.norm.weight": rng.normal(size=4).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }


def write_folder(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(source: str | Path, *holds: str) -> str:
    """The message with which a source is refused: one line that holds each of the given words."""
    with pytest.raises(UserError) as error:
        open_checkpoint(str(source))
    message = str(error.value)
    assert "\n" not in message
    for word in holds:
        assert word in message
    return message


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back_bit_equal(tmp_path: Path, shards: int) -> None:
    tensors = some_tensors()
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "m", tensors, shards)))
    assert checkpoint.kind == "huggingface"
    assert checkpoint.source == str(tmp_path / "m")
    assert checkpoint.config == CONFIG
    assert checkpoint.revision is None
    assert list(checkpoint.names()) == sorted(tensors)
    for name, written in tensors.items():
        read = checkpoint.tensor(name)
        assert checkpoint.names()[name] == (written.shape, written.dtype) == (read.shape, read.dtype)
        assert read.tobytes() == written.tobytes()
    with pytest.raises(KeyError):
        checkpoint.tensor("model.layers.9.mlp.up_proj.weight")


def test_arrays_outlive_the_checkpoint_and_can_be_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "m", tensors)))
    array = checkpoint.tensor("model.norm.weight")
    checkpoint.close()
    array[:] = 0
    assert open_checkpoint(str(tmp_path / "m")).tensor("model.norm.weight").any()


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """Weights replaced after opening are the ones that are read: nothing was held."""
    first, second = some_tensors(0), some_tensors(1)
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "m", first)))
    write_folder(tmp_path / "m", second)
    np.testing.assert_array_equal(checkpoint.tensor("model.embed_tokens.weight"), second["model.embed_tokens.weight"])


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "m", some_tensors())))
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-80])
    last = max(checkpoint.names(), key=lambda name: checkpoint.names()[name].shape)
    with pytest.raises(UserError, match=r"model\.safetensors has become shorter"):
        checkpoint.tensor(last)


def test_sha256_is_of_the_weight_files_in_order_of_name(tmp_path: Path) -> None:
    single = write_folder(tmp_path / "single", some_tensors())
    bytes_of = [path.read_bytes() for path in sorted(single.glob("*.safetensors"))]
    assert open_checkpoint(str(single)).sha256() == hashlib.sha256(bytes_of[0]).hexdigest()
    sharded = write_folder(tmp_path / "sharded", some_tensors(), shards=3)
    bytes_of = [path.read_bytes() for path in sorted(sharded.glob("*.safetensors"))]
    assert open_checkpoint(str(sharded)).sha256() == hashlib.sha256(b"".join(bytes_of)).hexdigest()
    (sharded / "config.json").write_text("{}")
    assert open_checkpoint(str(sharded)).sha256() == hashlib.sha256(b"".join(bytes_of)).hexdigest()


def test_a_source_that_is_nothing_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere" / "at" / "all", "nowhere", "folder")
    refusal(tmp_path / "lost.gguf", "lost.gguf")
    refusal("gpt3", "gpt3", "owner/name")
    refusal("a/b/c", "a/b/c", "owner/name")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refusal(file, "model.safetensors", "folder")


def test_a_revision_belongs_to_a_hub_id(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    with pytest.raises(UserError, match=r"'v2'.*only a hub id"):
        open_checkpoint(str(folder), revision="v2")


def test_a_bad_config_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    config = folder / "config.json"
    config.write_text("{not json")
    refusal(folder, "config.json", "not JSON")
    config.write_bytes(b'{"a": "\xff"}')
    refusal(folder, "config.json", "not JSON")
    config.write_text("[]")
    refusal(folder, "config.json", "list")
    config.unlink()
    refusal(folder, str(folder), "config.json")
    (folder / "adapter_config.json").write_text("{}")
    refusal(folder, "adapter_config.json", "model.base=")
    (folder / "config.json").mkdir()
    refusal(folder, "config.json", "not a regular file")


def test_missing_weights_are_refused_and_pickle_is_never_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    (folder / "model.safetensors").unlink()
    refusal(folder, str(folder), "model.safetensors")
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        refusal(folder, name, "run code", "save_pretrained")
        (folder / name).unlink()


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors(), shards=3)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    index.write_text("{")
    refusal(folder, index.name, "not JSON")
    index.write_text('{"metadata": {}}')
    refusal(folder, index.name, "weight_map")
    write_index(folder, {**good, "ghost.weight": good["scalar"]})
    assert "ghost.weight" not in open_checkpoint(str(folder)).names()  # some exporters leave such entries
    write_index(folder, {**good, "scalar": "../model.safetensors"})
    refusal(folder, "../model.safetensors")
    write_index(folder, good)
    shard = folder / good["scalar"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refusal(folder, shard.name, "truncated")
    shard.unlink()
    refusal(folder, shard.name, "missing")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-2],
        lambda whole: whole[:20],
        lambda whole: whole[:5],
        lambda whole: b"",
        lambda whole: whole + b"more",
        lambda whole: b"\xff" * len(whole),
        lambda whole: whole[:8] + b"}" + whole[9:],
        lambda whole: whole.replace(b'"shape":[6,4]', b'"shape":[6,5]'),
    ],
)
def test_a_damaged_file_is_found_at_opening(tmp_path: Path, damage) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    assert damage(whole) != whole
    weights.write_bytes(damage(whole))
    refusal(folder, "model.safetensors", "truncated or not")


def test_an_unreadable_file_and_an_unknown_dtype_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    weights = folder / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    refusal(folder, "w in", "F4", "BF16")
    weights.unlink()
    weights.mkdir()
    refusal(folder, "model.safetensors", "not a regular file")


def test_a_hub_id_downloads_the_named_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = write_folder(tmp_path / "0123abcd", some_tensors())
    asked = {}

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("owner/some-model.v1", revision="v2")
    assert (asked["repo"], asked["revision"]) == ("owner/some-model.v1", "v2")
    assert not any(".bin" in pattern or pattern.endswith(".py") for pattern in asked["patterns"])
    assert (checkpoint.source, checkpoint.revision) == ("owner/some-model.v1", "0123abcd")
    assert checkpoint.tensor("scalar") == 3


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None)
    return kind("first line\nsecond line", response=response)


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (http_error(errors.RepositoryNotFoundError), ["owner/name", "neither a local folder"]),
        (http_error(errors.GatedRepoError), ["owner/name", "gated"]),
        (http_error(errors.RevisionNotFoundError), ["owner/name", "'v9'"]),
        (http_error(errors.HfHubHTTPError), ["owner/name", "first line"]),
        (errors.LocalEntryNotFoundError("no"), ["owner/name", "cannot be reached"]),
        (OSError("disk full"), ["owner/name", "disk full"]),
    ],
)
def test_a_failed_download_is_one_sentence(raised: Exception, words: list[str], monkeypatch) -> None:
    def download(*args, **kwargs):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError) as error:
        open_checkpoint("owner/name", revision="v9")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refusal("nobody/nothing", "nobody/nothing", "HF_HUB_OFFLINE")
    refusal("bad--id/x..y", "bad--id/x..y")


def write_tokenizer(folder: Path, config: dict) -> None:
    words = {"<unk>": 0, "<s>": 1, "hello": 2, "world": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_the_folders_tokenizer_is_fast_and_has_its_chat_template(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    write_tokenizer(
        folder, {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": template}
    )
    tokenizer = open_checkpoint(str(folder)).tokenizer()
    assert tokenizer("hello there world").input_ids == [2, 0, 3]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path: Path, model_type: str) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    trace = tmp_path / "it-ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    write_tokenizer(folder, {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}})
    config = {**CONFIG, "model_type": model_type, "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config == config
    with pytest.raises(UserError, match="never run") as error:
        checkpoint.tokenizer()
    assert "\n" not in str(error.value)
    assert not trace.exists()


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    with pytest.raises(UserError, match=r"no tokenizer.*tokenizer\.json"):
        open_checkpoint(str(folder)).tokenizer()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be built"):
        open_checkpoint(str(folder)).tokenizer()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=f"{name} is not a regular file"):
            open_checkpoint(str(folder)).tokenizer()
        (folder / name).unlink()
        (folder / "tokenizer.json").write_text("{}")


def test_transformers_gives_no_advice_about_pytorch(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", some_tensors())
    write_tokenizer(folder, {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    code = (
        "import os, sys\n"
        "sys.modules['torch'] = None\n"
        "from spinal_jax.models.formats.open import open_checkpoint\n"
        "open_checkpoint(sys.argv[1]).tokenizer()\n"
        "assert 'TRANSFORMERS_NO_ADVISORY_WARNINGS' not in os.environ\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
