"""Output folders of a conversion: killed anywhere it ends in the same bytes, and nothing of others is replaced."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spinal_jax.errors import UserError
from spinal_jax.models.formats import folders, orbax
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.open import open_checkpoint

from .converting import Killed, contents, converted, killer, refusal, write_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    return converted(source, source.parent / "converted")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row lies in several files, each written in several steps."""
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 300)
    monkeypatch.setattr(orbax, "WRITE_BYTES", 700)


@pytest.mark.usefixtures("small_chunks")
def test_killed_anywhere_it_ends_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    wanted = contents(converted(source, tmp_path / "wanted"))
    assert len([name for name in wanted if name.startswith("state/embedding/")]) > 5
    out = tmp_path / "out"
    kills = 0
    while not out.exists():  # one more step each time, over everything that earlier runs left
        with killer(after=1 + 3 * kills) as bar:
            try:
                converted(source, out, bar=bar)
            except Killed:
                kills += 1
                with pytest.raises(UserError, match="was not finished"):
                    open_checkpoint(f"{out}.partial")
    assert kills > 10
    assert contents(out) == wanted


def test_what_is_done_is_not_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with killer(after=20) as bar, pytest.raises(Killed):
        converted(source, tmp_path / "out", bar=bar)
    read: list[str] = []
    checkpoint = open_checkpoint(str(source))
    tensor = checkpoint.tensor
    monkeypatch.setattr(checkpoint, "tensor", lambda name: (read.append(name), tensor(name))[1])
    total = 0

    @contextmanager
    def bar(what: str, size: int, unit: str) -> Iterator[Callable[[int], None]]:
        nonlocal total
        done = 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount

        yield advance
        assert done == size  # what was skipped counts as done
        total += 1

    convert(checkpoint, str(tmp_path / "out"), bar=bar)
    assert total == 3
    assert 0 < len(read) <= len(checkpoint.names()) - 18


def test_half_written_files_of_a_killed_run_do_not_stay(source: Path, folder: Path, tmp_path: Path) -> None:
    with killer(after=10) as bar, pytest.raises(Killed):
        converted(source, tmp_path / "out", bar=bar)
    state = tmp_path / "out.partial" / "state"
    (state / "embedding" / "0.0.__lock").write_bytes(b"half")
    (state / "stacks.0.mlp.up.weight").mkdir(exist_ok=True)
    (state / "stacks.0.mlp.up.weight" / ".zarray.__lock").write_bytes(b"")
    assert contents(converted(source, tmp_path / "out")) == contents(folder)


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_it_takes_the_place_of_another(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Before the old folder is set aside, or after: it is never lost, and the next run ends as if nothing had been."""
    other = write_model(tmp_path / "other", seed=1)
    out = converted(other, tmp_path / "out")
    rename, left = os.rename, renames

    def dying(before: Any, after: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        rename(before, after)

    monkeypatch.setattr(folders.os, "rename", dying)
    with pytest.raises(Killed):
        converted(source, out, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path / ("out" if renames == 0 else "out.replaced")) != contents(folder)
    assert contents(converted(source, out, overwrite=True)) == contents(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("deleted", [0, 1, 3, 6])  # entries of the seven that the folder has
def test_killed_while_it_clears_what_was_there(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    """What is half deleted is still known as ours, when an old folder goes and when what another run left does."""
    other = write_model(tmp_path / "other", seed=1)
    out = converted(other, tmp_path / "out")

    def dying(left: int) -> None:
        rmtree, unlink = shutil.rmtree, Path.unlink

        def count(remove: Callable[..., None]) -> Callable[..., None]:
            def counting(path: Path, *more: Any, **options: Any) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                remove(path, *more, **options)

            return counting

        monkeypatch.setattr(folders.shutil, "rmtree", count(rmtree))
        monkeypatch.setattr(Path, "unlink", count(unlink))

    dying(deleted)
    with pytest.raises(Killed):
        converted(source, out, overwrite=True)
    monkeypatch.undo()
    assert contents(out) == contents(folder)
    assert contents(converted(other, out, overwrite=True)) != contents(folder)

    with killer(after=10) as bar, pytest.raises(Killed):
        converted(other, tmp_path / "new", bar=bar)
    dying(deleted % 2)  # it has state/ and the record
    with pytest.raises(Killed):
        converted(source, tmp_path / "new", overwrite=True)
    monkeypatch.undo()
    assert contents(converted(source, tmp_path / "new", overwrite=True)) == contents(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other", "out"]


def test_a_real_sigkill(source: Path, folder: Path, tmp_path: Path) -> None:
    """In another process, which dies within a write."""
    script = f"""
import os, signal, sys
from spinal_jax.models.formats import orbax
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.formats.convert import convert
write, left = orbax.ParameterFile.write, 9
def dying(self, row, values, progress):
    global left
    left -= 1
    if left == 0:
        self._store[row].write(values)  # begun, and not waited for
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, row, values, progress)
orbax.ParameterFile.write = dying
convert(open_checkpoint({str(source)!r}), {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert contents(converted(source, tmp_path / "out")) == contents(folder)


def test_what_is_there_is_replaced_only_when_asked(source: Path, folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    out = converted(other, tmp_path / "out")
    first = contents(out)
    assert "already holds a complete checkpoint; set overwrite=true" in refusal(source, out)
    assert contents(out) == first
    with killer(after=10) as bar, pytest.raises(Killed):
        converted(source, out, overwrite=True, bar=bar)
    assert contents(out) == first
    assert contents(converted(source, out, overwrite=True)) == contents(folder)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_replaced(source: Path, tmp_path: Path, overwrite: bool) -> None:
    mine = tmp_path / "out"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert "was not written by spinal convert or export" in refusal(source, mine, overwrite=overwrite)
    file = tmp_path / "file"
    file.write_text("work")
    assert "was not written by spinal" in refusal(source, file, overwrite=overwrite)
    for before, name in (("out", "new.partial"), ("new.partial", "new.replaced")):
        shutil.move(tmp_path / before, tmp_path / name)
        assert f"{name} is in the way" in refusal(source, tmp_path / "new", overwrite=overwrite)
        assert (tmp_path / name / "thesis.tex").exists()


def test_an_empty_folder_may_be_named(source: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert contents(converted(source, tmp_path / "out")) == contents(folder)


def test_source_and_out_stay_apart(source: Path, tmp_path: Path) -> None:
    moved = tmp_path / "outer" / "model"
    shutil.copytree(source, moved)
    link = tmp_path / "link"
    link.symlink_to(moved)
    for out in (moved, moved / "inner", link / "inner"):
        assert "lies inside the source" in refusal(moved, out, overwrite=True)
    assert "holds the source" in refusal(moved, moved.parent, overwrite=True)
    assert contents(moved) == contents(source)


def test_an_unfinished_conversion_of_something_else_is_not_mixed_in(source: Path, folder: Path, tmp_path: Path) -> None:
    for options in ({"dtype": "bfloat16"}, {}):
        origin = source if options else write_model(tmp_path / "other", seed=1)
        with killer(after=10) as bar, pytest.raises(Killed):
            converted(origin, tmp_path / "out", bar=bar, overwrite=True, **options)
        assert "unfinished checkpoint of another source or with other settings" in refusal(source, tmp_path / "out")
    assert contents(converted(source, tmp_path / "out", overwrite=True)) == contents(folder)


def test_two_runs_never_write_one_output_folder(source: Path, folder: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert f"{partial} is in use by another run" in refusal(source, out)
    os.close(descriptor)

    @contextmanager
    def overtaken(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Another conversion begins and ends while this one still hashes its source."""
        if what == "hash source":
            converted(source, out)
        yield lambda amount: None

    assert "already holds a complete checkpoint" in refusal(source, out, bar=overtaken)
    assert contents(out) == contents(folder)
    assert not partial.exists()


def test_a_disk_that_cannot_be_written(source: Path, folder: Path, tmp_path: Path) -> None:
    """After the cause is gone the same command goes on."""
    with killer(after=10) as bar, pytest.raises(Killed):
        converted(source, tmp_path / "out", bar=bar)
    state = tmp_path / "out.partial" / "state"
    (state / "stacks.0.mlp.down.weight").write_text("not a folder")
    assert "stacks.0.mlp.down.weight cannot be written" in refusal(source, tmp_path / "out")
    (state / "stacks.0.mlp.down.weight").unlink()
    assert contents(converted(source, tmp_path / "out")) == contents(folder)
