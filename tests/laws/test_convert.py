"""Converted folders: the same tensors, read by Orbax itself; what is not what was written is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from spinal_jax.errors import UserError
from spinal_jax.models.families import read_model
from spinal_jax.models.formats import orbax
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.translate import load_decoder, parameter_shapes

from .converting import BFLOAT16, CONFIG, contents, converted, refusal, write_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    return converted(source, source.parent / "converted")


def test_the_same_tensors_come_back(source: Path, folder: Path) -> None:
    before, after = open_checkpoint(str(source)), open_checkpoint(str(folder))
    assert (after.kind, after.config, after.revision) == ("orbax", before.config, None)
    assert after.names() == before.names()
    assert list(after.names()) == sorted(after.names())
    for name in before.names():
        assert after.tensor(name).tobytes() == before.tensor(name).tobytes()
    with pytest.raises(KeyError):
        after.tensor("model.layers.9.mlp.up_proj.weight")


def test_the_record_says_what_was_read_and_written(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((folder / "spinal.json").read_text())
    sha256 = open_checkpoint(str(source)).sha256()
    assert record["source"] == {"name": "model", "kind": "huggingface", "revision": None, "sha256": sha256}
    assert record["sha256"] == open_checkpoint(str(folder)).sha256()
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert not list(source.parent.glob("*.partial"))
    monkeypatch.chdir(source)
    assert contents(converted(Path("."), tmp_path / "from_here")) == contents(folder)


def test_orbax_itself_reads_it_into_any_sharding(source: Path, folder: Path) -> None:
    family, config = read_model(CONFIG)
    wanted = load_decoder(open_checkpoint(str(source)), family, config, jnp.dtype(jnp.float32))
    tree = ocp.load(folder)
    np.testing.assert_array_equal(tree["stacks"]["0"]["mlp"]["up"]["weight"], wanted.stacks[0].mlp.up.weight[...])
    np.testing.assert_array_equal(tree["embedding"], wanted.embedding[...])
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded if x.ndim == 3 else whole), tree
    )
    loaded = ocp.load(folder, abstract)
    up = loaded["stacks"]["0"]["mlp"]["up"]["weight"]
    assert up.sharding == sharded
    np.testing.assert_array_equal(up, wanted.stacks[0].mlp.up.weight[...])


def test_a_dtype_can_be_asked_for(source: Path, tmp_path: Path) -> None:
    before = open_checkpoint(str(source))
    after = open_checkpoint(str(converted(source, tmp_path / "half", dtype="bfloat16")))
    for name in before.names():
        assert after.names()[name].dtype == BFLOAT16
        assert after.tensor(name).tobytes() == before.tensor(name).astype(BFLOAT16).tobytes()
    again = open_checkpoint(str(convert(after, str(tmp_path / "whole"), dtype="float32")))
    assert again.tensor("lm_head.weight").tobytes() == after.tensor("lm_head.weight").astype(np.float32).tobytes()


def test_each_parameter_keeps_its_dtype(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", shards=1, dtype=BFLOAT16)
    checkpoint = open_checkpoint(str(source))
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float16)
    save_file(tensors, source / "model.safetensors")
    after = open_checkpoint(str(converted(source, tmp_path / "out")))
    assert after.names()["model.norm.weight"].dtype == np.float32
    assert after.names()["lm_head.weight"].dtype == BFLOAT16
    # A stack has one dtype: the narrowest that holds all of its rows.
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert after.names()[name].dtype == np.float32
        np.testing.assert_array_equal(after.tensor(name), tensors[name].astype(np.float32))


def test_memory_is_that_of_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a stack, nor of several copies: as far as NumPy's own allocations show it."""
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(orbax, "WRITE_BYTES", 1 << 18)
    sizes = {"hidden_size": 64, "intermediate_size": 8192, "vocab_size": 8192, "num_hidden_layers": 5}
    source = write_model(tmp_path / "model", **sizes)
    checkpoint = open_checkpoint(str(source))
    largest = max(int(np.prod(info.shape)) * info.dtype.itemsize for info in checkpoint.names().values())
    assert largest == 2 << 20
    shapes = parameter_shapes(read_model(checkpoint.config)[1])  # and tracing, which allocates too, is done once
    assert max(int(np.prod(s.shape)) for s in shapes.values()) * 4 > 3 * largest
    tracemalloc.start()
    try:
        for out, dtype in (("same", None), ("half", "bfloat16")):
            tracemalloc.reset_peak()
            convert(checkpoint, str(tmp_path / out), dtype=dtype)
            assert tracemalloc.get_traced_memory()[1] < largest + (1 << 20)
        tracemalloc.reset_peak()
        export(open_checkpoint(str(source)), str(tmp_path / "export"))
        assert tracemalloc.get_traced_memory()[1] < largest + (1 << 20)
    finally:
        tracemalloc.stop()


def test_sources_that_cannot_be_converted(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    config = broken / "config.json"
    config.write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    assert "model_type 'mamba' is not supported" in refusal(broken, tmp_path / "out")
    config.write_text(json.dumps(CONFIG | {"intermediate_size": 25}))
    assert "tensor model.layers.0.mlp.gate_proj.weight has shape (24, 16)" in refusal(broken, tmp_path / "out")
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 4}))
    assert "tensors of 3 blocks" in refusal(broken, tmp_path / "out2")
    config.write_text(json.dumps(CONFIG))
    checkpoint = open_checkpoint(str(source))
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    save_file(tensors | {"model.norm.weight": np.ones(16, np.int8)}, broken / "model.safetensors")
    assert "model.norm.weight has the dtype int8" in refusal(broken, tmp_path / "out2")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out2.partial").exists()
    assert "out=/" in refusal(source, Path("/"))


def test_keys_that_are_to_be_ignored_are_remembered(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    (source / "config.json").write_text(json.dumps(CONFIG | {"motto": "onward"}))
    assert "motto" in refusal(source, tmp_path / "out")
    out = converted(source, tmp_path / "out", ignore_keys=("motto",))
    assert open_checkpoint(str(out)).config["motto"] == "onward"


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    def damaged() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy")
        return tmp_path / "copy"

    copy = damaged()
    shutil.rmtree(copy / "state" / "embedding")
    with pytest.raises(UserError, match=r"embedding/\.zarray is missing"):
        open_checkpoint(str(copy))
    copy = damaged()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 51}))
    with pytest.raises(UserError, match=r"is damaged: config.json is not what spinal convert wrote"):
        open_checkpoint(str(copy))
    copy = damaged()
    (copy / "state" / "embedding" / "0.0").unlink()
    with pytest.raises(UserError, match=r"is damaged: .*embedding/0\.0 is missing"):
        open_checkpoint(str(copy))
    copy = damaged()
    up = copy / "state" / "stacks.0.mlp.up.weight" / "2.0.0"
    up.write_bytes(up.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"2\.0\.0 is missing or cut short"):
        open_checkpoint(str(copy))
    for changed in ({"ignore_keys": [[]]}, {"ignore_keys": "x"}, {"source": {}}, {"source": {"revision": 3}}):
        copy = damaged()
        record = json.loads((copy / "spinal.json").read_text())
        (copy / "spinal.json").write_text(json.dumps(record | changed))
        with pytest.raises(UserError, match="does not say what was written"):
            open_checkpoint(str(copy))
    copy = damaged()
    (copy / "spinal.json").unlink()
    with pytest.raises(UserError, match="that spinal convert did not write"):
        open_checkpoint(str(copy))


def flip(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    file.write_bytes(bytes(raw))


@pytest.mark.parametrize("how", ["one bit", "NaN", "zeros", "swapped", "swapped parameters", ".zarray", "config.json"])
def test_what_is_not_what_was_written_is_refused_when_it_is_loaded(folder: Path, tmp_path: Path, how: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    up, gate = (copy / "state" / f"stacks.0.mlp.{name}.weight" for name in ("up", "gate"))
    chunk = up / "1.0.0"
    if how == "one bit":
        flip(chunk, 4321)
    elif how == "NaN":
        chunk.write_bytes(b"\xff" * chunk.stat().st_size)
    elif how == "zeros":
        chunk.write_bytes(bytes(chunk.stat().st_size))
    elif how.startswith("swapped"):
        other = up / "2.0.0" if how == "swapped" else gate / "1.0.0"
        one, two = chunk.read_bytes(), other.read_bytes()
        assert one != two
        assert len(one) == len(two)
        chunk.write_bytes(two)
        other.write_bytes(one)
    else:
        flip(copy / "config.json" if how == "config.json" else up / ".zarray", 99)
    with pytest.raises(UserError, match=r"is damaged: .* is not what spinal convert wrote"):
        loaded(copy)
    with pytest.raises(UserError, match=r"is damaged"):
        export(open_checkpoint(str(copy)), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def loaded(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    family, decoder = read_model(checkpoint.config)
    load_decoder(checkpoint, family, decoder, np.dtype(np.float32))


def test_an_orbax_folder_of_another_program_is_refused(tmp_path: Path) -> None:
    ocp.save(tmp_path / "tree", {"a": np.ones(3)})
    with pytest.raises(UserError, match="that spinal convert did not write"):
        open_checkpoint(str(tmp_path / "tree"))


def test_the_commands(source: Path, folder: Path, tmp_path: Path) -> None:
    """In one other process, since Hydra and JAX take seconds to start."""
    commands = [
        ["convert", f"model.source={source}", "out=a/b"],
        ["convert", f"model.source={source}", "out=a/b"],
        ["export", "model.source=a/b", "out=c", "shard_gb=1e-6", "model.dtype=bfloat16"],
        ["export", "model.source=a/b", "out=d", "shard_gb=0"],
    ]
    script = f"""
import sys
from spinal_jax.cli import main as cli
for arguments in {commands!r}:
    sys.argv = ["spinal", *arguments]
    try:
        cli.main()
        print("code 0")
    except SystemExit as stopped:
        print("code", stopped.code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a/b", "code 0", "code 2", "c", "code 0", "code 2"], done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith("spinal: out=a/b already holds a complete checkpoint; set overwrite=true")
    assert second.startswith("spinal: shard_gb is 0")
    assert contents(tmp_path / "a" / "b") == contents(folder)
    exported = open_checkpoint(str(tmp_path / "c"))
    assert {info.dtype for info in exported.names().values()} == {BFLOAT16}
    assert len(list((tmp_path / "c").glob("model-*.safetensors"))) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
