"""What is fuzzed: for each class of input a sound one, a change of it, and the code that reads it.

A target takes a folder to write into and a seeded generator; it either does its work or raises UserError. Where the
format carries a digest it also asserts that what was read is what was written.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from spinal_jax import data
from spinal_jax.audit.pipeline import load, opened, run_audit
from spinal_jax.audit.trace import load_trace, save_trace
from spinal_jax.cli import main as cli
from spinal_jax.cli.commands import COMMANDS
from spinal_jax.config import AuditConfig, ModelConfig, build
from spinal_jax.config.plan import PlanConfig
from spinal_jax.config.record import defaults_of
from spinal_jax.errors import UserError
from spinal_jax.models.formats.convert import convert as convert_checkpoint
from spinal_jax.models.formats.open import open_checkpoint

from ..cli.conftest import _write_model
from ..laws.conftest import _make_trace
from ..parity.gguf_files import KEYS, some_tensors, write
from .descriptions import families, metadata, shards
from .mutations import TEXTS, changed_bytes, changed_json, json_text, value
from .saved import saved, sound_runs

Target = Callable[[Path, random.Random], object]


class Sound:
    """Sound inputs, each made once, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder

    @functools.cached_property
    def model(self) -> Path:
        """A tiny Llama folder."""
        return _write_model(self.folder / "model")

    @functools.cached_property
    def gguf(self) -> bytes:
        """The least GGUF file that opens."""
        return write(self.folder / "m.gguf", "llama", KEYS, some_tensors()).read_bytes()

    @functools.cached_property
    def converted(self) -> Path:
        """The tiny model as an Orbax folder."""
        with contextlib.closing(open_checkpoint(str(self.model))) as checkpoint:
            return convert_checkpoint(checkpoint, str(self.folder / "converted"))

    @functools.cached_property
    def run(self) -> Path:
        """The folder of an audit."""
        run = self.folder / "run"
        save_trace(_make_trace(depth=4, groups=6, width=12), run)
        manifest = {
            "schema": "spinal-manifest/1",
            "command": "audit",
            "config": {"model": {"source": "m"}},
            "files": [],
        }
        (run / "manifest.json").write_text(json.dumps(manifest))
        return run

    @functools.cached_property
    def runs(self) -> Path:
        """A folder with a run of each command."""
        return sound_runs(self.folder / "runs")


def copied(source: Path, folder: Path, name: str, content: bytes) -> str:
    """A copy of a folder with one file of other content; the path of the copy."""
    shutil.copytree(source, folder / source.name)
    (folder / source.name / name).write_bytes(content)
    return str(folder / source.name)


def loaded(source: str) -> Any:
    """The model of a source, with its weights."""
    with opened(ModelConfig(source)) as (checkpoint, family, decoder):
        return load(checkpoint, family, decoder, "float32")


def targets(sound: Sound) -> dict[str, Target]:
    """Every class by name."""

    def config(folder: Path, rng: random.Random) -> None:
        document = json.loads((sound.model / "config.json").read_text())
        source = copied(sound.model, folder, "config.json", json_text(rng, document))
        with opened(ModelConfig(source)) as (checkpoint, _, decoder):
            assert decoder.depth == len({name.split(".")[2] for name in checkpoint.names() if ".layers." in name})

    def safetensors(folder: Path, rng: random.Random) -> None:
        content = (sound.model / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        if rng.random() < 0.6:
            header = json_text(rng, json.loads(content[8 : 8 + size]))
            changed = len(header).to_bytes(8, "little") + header + content[8 + size :]
        else:
            changed = changed_bytes(rng, content)
        loaded(copied(sound.model, folder, "model.safetensors", changed))

    def gguf(folder: Path, rng: random.Random) -> None:
        (folder / "m.gguf").write_bytes(changed_bytes(rng, sound.gguf))
        with contextlib.closing(open_checkpoint(str(folder / "m.gguf"))) as checkpoint:
            for name in checkpoint.names():
                checkpoint.tensor(name)
            checkpoint.tokenizer()

    def tokenizer(folder: Path, rng: random.Random) -> None:
        name = rng.choice(("tokenizer.json", "tokenizer_config.json"))
        document = json.loads((sound.model / name).read_text())
        source = copied(sound.model, folder, name, json_text(rng, document))
        with contextlib.closing(open_checkpoint(source)) as checkpoint:
            data.token_ids(data.Prompt("some text", (("user", "some text"),)), checkpoint.tokenizer(), 16, False)

    def template(folder: Path, rng: random.Random) -> None:
        pieces = (
            *("{{ messages[0]['content'] }}", "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ bos_token }}"),
            *(
                "{{ 'a' * 10**9 }}",
                "{{ 1/0 }}",
                "{{ '%c' % 1114112 }}",
                "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            ),
            *(
                "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
                "{{ raise_exception('no') }}",
            ),
            *(
                "{% set x = 'a' %}",
                "{{ messages | tojson }}",
                "{{ ''.__class__ }}",
                "{{ 10 ** 10 ** 10 }}",
                "{{",
                "\ud800",
            ),
        )
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 4)))
        if rng.random() < 0.5:
            text = changed_bytes(rng, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
        said = json.loads((sound.model / "tokenizer_config.json").read_text()) | {"chat_template": text}
        source = copied(sound.model, folder, "tokenizer_config.json", json.dumps(said).encode())
        with contextlib.closing(open_checkpoint(source)) as checkpoint:
            data.token_ids(data.Prompt("some text", (("user", "some text"),)), checkpoint.tokenizer(), 16, True)

    def prompts(folder: Path, rng: random.Random) -> None:
        rows = [
            {"prompt": "one"},
            {"prompt": [{"role": "user", "content": "two"}]},
            {"chosen": "\n\nHuman: a\n\nAssistant: b"},
        ]
        content = b"\n".join(json_text(rng, rng.choice(rows)) for _ in range(3))
        format = rng.choice(("jsonl", "hh", "text"))
        _file(folder, rng, content, lambda path: data.read_prompts(path, format))

    def preferences(folder: Path, rng: random.Random) -> None:
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        rows = [
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": "b"}]},
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        ]
        content = b"\n".join(json_text(rng, rng.choice(rows)) for _ in range(3))
        format = rng.choice(("jsonl", "hh"))
        _file(folder, rng, content, lambda path: data.read_pairs(path, format))

    def runs(folder: Path, rng: random.Random) -> None:
        from spinal_jax.runs.find import find_runs
        from spinal_jax.runs.training_run import load_training_run

        name = rng.choice(("trace.json", "manifest.json", "spectra.safetensors", "onset.json"))
        there = sound.run / name
        content = there.read_bytes() if there.exists() else b'{"records": [{"step": 0}], "onset": null}'
        changed = changed_bytes(rng, content) if name.endswith("tensors") else json_text(rng, json.loads(content))
        place = folder / rng.choice(("run", "javascript:alert(1)", "x#y%41", "_smoke", "$\\frac{$"))
        place.mkdir()
        copied(sound.run, place, name, changed)
        for read in (load_trace, load_training_run, lambda path: find_runs([path])):
            with contextlib.suppress(UserError):
                read(place / sound.run.name)

    def orbax(folder: Path, rng: random.Random) -> None:
        import jax
        from flax import nnx

        files = sorted(path for path in sound.converted.rglob("*") if path.is_file())
        file = rng.choice(files)
        name = str(file.relative_to(sound.converted))
        found = loaded(copied(sound.converted, folder, name, changed_bytes(rng, file.read_bytes())))
        as_written = jax.tree.leaves(nnx.state(loaded(str(sound.converted))))
        for one, other in zip(jax.tree.leaves(nnx.state(found)), as_written, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)

    def plan(folder: Path, rng: random.Random) -> None:
        from spinal_jax.plan.plan import make_plan

        asked = defaults_of(PlanConfig) | {"model": {"source": "random:0.3m"}, "compile": False}
        changed = changed_json(rng, asked)
        if isinstance(changed, dict):
            changed["compile"] = False
            make_plan(build(PlanConfig, changed))

    def measured(folder: Path, rng: random.Random) -> None:
        """An audit of a changed model under changed settings gives numbers, or says why there is none."""
        said = defaults_of(AuditConfig)["metrics"] | {"groups": 4}
        source = shutil.copytree(sound.model, folder / "model")
        if rng.random() < 0.6:
            tensors = load_file(source / "model.safetensors")
            changed = tensors[rng.choice(sorted(tensors))]
            at = tuple(rng.randrange(size) for size in changed.shape)
            where = at if rng.random() < 0.5 else at[:-1]
            changed[where] = rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e30, 1e-40, 0.0))
            save_file(tensors, source / "model.safetensors")
        else:
            said = changed_json(rng, said)
        texts = [f"{value(rng)} text number {number} of a few words, {number * number}" for number in range(12)]
        asked = {"model": {"source": str(source)}, "metrics": said, "prompts": {"max_length": 48}}
        trace = run_audit(build(AuditConfig, asked), texts)
        for name, values in (*trace.columns.items(), *trace.arrays.items()):
            assert not np.isinf(values).any(), name
        for name in ("contraction", "transport"):
            assert np.isfinite(trace.summary[name]) or trace.warnings, name

    def overrides(folder: Path, rng: random.Random) -> None:
        command = COMMANDS[rng.choice([name for name, found in COMMANDS.items() if found.record is not None])]
        names = [*_names(command.record), "hydra.run.dir", "hydra", *command.folders, "nothing.here", *TEXTS[:6]]
        arguments = []
        for _ in range(rng.randrange(1, 4)):
            said = value(rng)
            text = said if isinstance(said, str) else json.dumps(said)
            lead = rng.choice(("", "", "", "", "+", "++", "~"))
            arguments.append(
                rng.choice((f"{lead}{rng.choice(names)}={text}", text, rng.choice(("--info", "-c", "-p", "-m"))))
            )
        if any(word in ("-m", "--multirun") for word in arguments):
            arguments.append("hydra.sweep.dir=sweep")
        with _in(folder), _quiet():
            cli._compose(replace(command, job=lambda asked, out: 0), arguments)

    def index(folder: Path, rng: random.Random) -> None:
        shards(sound.model, folder, rng)

    def pages(folder: Path, rng: random.Random) -> None:
        saved(sound.runs, folder, rng)

    found = (
        config,
        families,
        metadata,
        index,
        pages,
        safetensors,
        gguf,
        tokenizer,
        template,
        prompts,
        preferences,
        runs,
        orbax,
        plan,
        overrides,
        measured,
    )
    return {target.__name__: target for target in found}


def _file(folder: Path, rng: random.Random, content: bytes, read: Callable[[str], object]) -> None:
    if rng.random() < 0.5:
        content = changed_bytes(rng, content)
    path = folder / "rows"
    if rng.random() < 0.2:
        path, content = folder / "rows.gz", gzip.compress(content)
        content = changed_bytes(rng, content) if rng.random() < 0.5 else content
    path.write_bytes(content)
    read(str(path))


def _names(record: Any) -> list[str]:
    from spinal_jax.config.record import settings_of

    return [setting.name for setting in settings_of(record)]


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    with contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import io

    before = sys.argv
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            sys.argv = before
