"""Whatever is wrong with what was asked or given: one sentence that names it, exit code 2, and no run folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spinal_jax.cli.commands import COMMANDS

from .conftest import Outcome, Spinal, Start

Write = Callable[[Path], Path]
Refused = Callable[..., None]


@pytest.fixture
def refused(spinal: Spinal, model: Path, prompts: Path, tmp_path: Path) -> Refused:
    """Audits the tiny model on the words, changed by the arguments, and expects one line with the words asked for."""

    def check(changes: str, *words: str) -> None:
        run = tmp_path / "run"
        right = [f"model.source={model}", f"prompts.path={prompts}", "prompts.format=text", f"hydra.run.dir={run}"]
        settings = {setting.partition("=")[0]: setting for setting in [*right, *changes.split()]}
        spinal("audit", *settings.values()).refusal(*words)
        assert not run.exists()

    return check


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("modle.source=x", ["'modle.source'", "did you mean model.source?"]),
        ("prompts.formt=hh", ["'prompts.formt'", "did you mean prompts.format?"]),
        ("promts=hh", ["'promts'", "did you mean prompts?"]),
        ("zzz=1", ["'zzz'", "spinal audit --help"]),
        ("+modle.source=x", ["modle", "model, prompts, metrics"]),
        ("prompts=xx", ["prompts/xx", "default, hh"]),
        ("model.source=a=b", ["'model.source=a=b'", "'NAME=\"VALUE\"'"]),
        ("model.source", ["'model.source'", "NAME=VALUE"]),
        ("model.source=a,b", ["model.source=a,b", "-m", "quote"]),
        ("model.name=${nowhere}", ["model.name", "nowhere"]),
        ("--speed", ["--speed", "spinal audit --help"]),
        ("prompts.format=xx", ["prompts.format", "'xx'", "jsonl", "hh", "text"]),
        ("prompts.limit=abc", ["prompts.limit", "'abc'", "whole number"]),
        ("prompts.limit=0", ["prompts.limit", "0"]),
        ("model.source=null", ["model.source"]),
        ("model.dtype=float16", ["model.dtype", "float32", "bfloat16"]),
        ("overwrite=maybe", ["overwrite", "'maybe'", "true or false"]),
        ("metrics.contraction.window=[0.5,0.1]", ["metrics.contraction.window", "[0.5, 0.1]", "lo < hi"]),
        ("metrics.contraction.window=[0.3,0.3]", ["metrics.contraction.window", "lo < hi"]),
        ("metrics.contraction.window=0.5", ["metrics.contraction.window", "0.5", "list"]),
        ("metrics.contraction.window=[0.1,0.2]", ["[0.1, 0.2]", "more or longer prompts"]),
        ("metrics.transport.temperature=1e-30", ["metrics.transport.temperature", "1e-30", "from 1e-06 to 1e+06"]),
        ("metrics.transport.positions=first:2", ["metrics.transport.positions", "'first:2'", "last:K"]),
        ("metrics.transport.positions=response:2", ["metrics.transport.positions", "response"]),
        ("prompts.limit=1 prompts.max_length=8", ["7 measured tokens", "more or longer prompts"]),
        ("prompts.offset=40", ["no prompt", "offset=40"]),
        ("prompts.path=nowhere.txt", ["prompts.path", "nowhere.txt"]),
        ("prompts.format=jsonl", ["words.txt", "line 1", "not JSON"]),
        ("prompts.format=hh", ["words.txt", "line 1", "not JSON"]),
        ("prompts.chat_template=true", ["prompts.chat_template", "no chat template"]),
        ("model.source=nowhere", ["'nowhere'", "folder", ".gguf", "hub id"]),
    ],
)
def test_a_mistake_in_the_settings(refused: Refused, changes: str, words: list[str]) -> None:
    refused(changes, *words)


def test_what_must_be_given(spinal: Spinal, tmp_path: Path) -> None:
    spinal("audit").refusal("model.source is missing", "model.source=...")
    assert not any(tmp_path.glob("runs/audit/*"))
    spinal("audt").refusal("there is no command 'audt'; did you mean audit?")
    spinal("frobnicate").refusal("'frobnicate'", ", ".join(COMMANDS))
    spinal("report").refusal("spinal report DIR")
    spinal("report", "a", "b").refusal("spinal report DIR")
    spinal("report", "nowhere").refusal("no run at nowhere", "the folder of an audit")
    outcome = spinal()
    assert outcome.code == 2
    assert "usage: spinal COMMAND" in outcome.err


@pytest.mark.parametrize(
    ("name", "content", "changes", "words"),
    [
        ("empty.jsonl", b"", "", ["empty.jsonl", "no prompt"]),
        ("blank.jsonl", b"\n  \n", "", ["blank.jsonl", "2 empty"]),
        ("hh.jsonl", b'{"chosen": "no turns"}\n', "prompts.format=hh", ["line 1", "HH"]),
        ("field.jsonl", b'{"text": "hello"}\n', "prompts.field=prompt", ["line 1", "'prompt'", "'text'"]),
        ("number.jsonl", b'{"prompt": 3}\n', "", ["line 1", "string", "3"]),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00", "", ["cut.jsonl.gz", "gzip"]),
    ],
)
def test_a_broken_prompts_file(
    refused: Refused, tmp_path: Path, name: str, content: bytes, changes: str, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(f"prompts.path={tmp_path / name} prompts.format=jsonl {changes}", *words)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_type(folder: Path) -> None:
    change_config(folder, model_type="mamba")


def unknown_key(folder: Path) -> None:
    change_config(folder, new_switch=True)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_tensors(folder: Path, **changed: np.ndarray | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def all_zero(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: np.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    change_tensors(folder, model__layers__1__mlp__up_proj__weight=np.zeros((47, 32), np.float32))


def missing_tensor(folder: Path) -> None:
    change_tensors(folder, model__norm__weight=None)


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shard = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def foreign_tokenizer(folder: Path) -> None:
    """One that exists only as code in the folder."""
    (folder / "tokenizer.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    settings = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": ["tokenizer.OddTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").rename(folder / "vocab.json")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, ["config.json"]),
        (other_type, ["'mamba'", "supported", "llama", "mistral"]),
        (unknown_key, ["'new_switch'", "model.ignore_keys=[new_switch]"]),
        (truncated, ["model.safetensors", "truncated"]),
        (all_zero, ["hidden states at boundary 0 are all 0"]),
        (wrong_shape, ["model.layers.1.mlp.up_proj.weight", "(47, 32)", "48"]),
        (missing_tensor, ["model.norm.weight"]),
        (missing_shard, ["model-00002-of-00002.safetensors", "missing"]),
        (pickled, ["pytorch_model.bin", "run code", "save_pretrained"]),
        (no_tokenizer, ["tokenizer.json"]),
        (foreign_tokenizer, ["tokenizer", "never run"]),
    ],
)
def test_a_broken_checkpoint(
    refused: Refused,
    write_model: Write,
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: list[str],
) -> None:
    folder = write_model(tmp_path / "model")
    damage(folder)
    refused(f"model.source={folder}", *words)
    assert not any(path.name == "ran" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("command", ["export", "convert", "plan"])
def test_a_config_that_no_model_has_is_refused_by_every_command(
    spinal: Spinal, write_model: Write, tmp_path: Path, command: str
) -> None:
    folder = write_model(tmp_path / "model")
    where = "hydra.run.dir=out" if command == "plan" else "out=out"
    for values, words in (
        ({"rope_parameters": {"rope_type": [], "rope_theta": 1e4}}, ["rope_type", "[]"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "bits"]),
        ({"num_hidden_layers": 2**31}, ["num_hidden_layers", "2147483648"]),
    ):
        change_config(folder, **{"rope_parameters": None, "rms_norm_eps": 1e-6, "num_hidden_layers": 3} | values)
        spinal(command, folder, where).refusal(*words)
    (folder / "config.json").write_text("[" * 200_000)
    spinal(command, folder, where).refusal("config.json", "nested")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_gguf_with_an_unknown_quantisation(refused: Refused, tmp_path: Path) -> None:
    name = b"token_embd.weight"
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 32, 8, 250, 0)
    path = tmp_path / "odd.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(4096))
    refused(f"model.source={path}", "odd.gguf", "token_embd.weight", "250")
    path.write_bytes(b"GGML" + bytes(64))
    refused(f"model.source={path}", "odd.gguf", "not a GGUF file")


def test_an_output_folder_that_cannot_be(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(f"hydra.run.dir={tmp_path / 'file'}", "output folder", "file")
    refused(f"hydra.run.dir={tmp_path / 'file' / 'run'}", "output folder", "file")


def test_an_empty_folder_of_the_users_stays(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    refused(f"hydra.run.dir={tmp_path / 'mine'} prompts.limit=abc", "prompts.limit")
    assert (tmp_path / "mine").is_dir()


def test_as_a_process_of_its_own(start: Start, model: Path, tmp_path: Path) -> None:
    window = "metrics.contraction.window=[0.5,0.1]"
    process = start("audit", f"model.source={model}", window, f"hydra.run.dir={tmp_path / 'run'}")
    out, err = process.communicate()
    Outcome(process.returncode, out, err).refusal("metrics.contraction.window", "[0.5, 0.1]")
    assert not (tmp_path / "run").exists()
