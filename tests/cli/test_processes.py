"""Real processes that share a run, over loopback: one trace, one folder, one end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from spinal_jax.parallel.meeting import INTERVAL, connected
from spinal_jax.parallel.peers import SILENCE
from tests.parity.gguf_files import KEYS, quantised, write

from .conftest import Outcome, Spinal, Start

CLOSE = 1e-5  # sums over devices come in another order: roundings of float32
WORLD = ("prompts=world", "prompts.limit=16", "prompts.max_length=32", "metrics.groups=4")
AUDIT = ("audit", "model.source=random:0.3m", *WORLD)
ENDLESS = (*AUDIT, "prompts.limit=3000", "batch_tokens=128")
Several = Callable[..., "list[subprocess.Popen[str]]"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def several(start: Start, tmp_path: Path) -> Iterator[Several]:
    """Starts `spinal ARGUMENTS` in so many processes, each in a folder of its own; `own` are one's own arguments."""
    started: list[subprocess.Popen[str]] = []

    def begin(
        count: int,
        *arguments: str,
        own: dict[int, tuple[str, ...]] | None = None,
        run: str = "run",
        slurm: bool = False,
        devices: int = 1,
        before: str = "",
        only: tuple[int, ...] | None = None,
    ) -> list[subprocess.Popen[str]]:
        port = free_port()
        numbers = only or tuple(range(count))
        for number in numbers:
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            place = [f"127.0.0.1:{port}", f"parallel.processes={count}", f"parallel.process={number}"]
            if slurm:
                place = ["auto"]
                job = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": count, "PROCID": number, "LOCALID": number}
                environment |= {f"SLURM_{name}": str(value) for name, value in job.items()}
                environment["JAX_COORDINATOR_PORT"] = str(port)
            said = [
                arguments[0],
                "parallel.start_timeout=300",
                *arguments[1:],
                f"hydra.run.dir={run}",
                f"parallel.coordinator={place[0]}",
            ]
            said += place[1:]
            started.append(start(*said, *(own or {}).get(number, ()), cwd=folder, env=environment, before=before))
        return started[-len(numbers) :]

    yield begin
    for process in started:
        with_children = [process]
        if psutil.pid_exists(process.pid):
            with_children += psutil.Process(process.pid).children(recursive=True)
        for each in reversed(with_children):
            each.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen[str]]) -> list[Outcome]:
    found = []
    for process in processes:
        out, err = process.communicate()
        found.append(Outcome(process.returncode, out, err))
    return found


def await_start(process: subprocess.Popen[str], count: int) -> None:
    """Returns once the process has said that the audit begins, whatever libraries write before."""
    assert process.stderr is not None
    for line in process.stderr:
        if f"in {count} processes" in line:
            return
    raise AssertionError(process.communicate())


def same(one: Path, other: Path) -> None:
    found, wanted = (json.loads(path.read_text())["columns"] for path in (one, other))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        got, right = (np.array(some, float) for some in (found[name], values))
        np.testing.assert_allclose(got, right, rtol=CLOSE, atol=CLOSE, err_msg=name)


# Says at the end how many spectra a process has taken, and how many prompts it has tokenised and grouped.
COUNTING = """
import atexit, sys
from spinal_jax.data import tokens
from spinal_jax.metrics import contraction
from spinal_jax.stats import groups

counts = {"spectra": [], "prompts": [], "grouped": []}
def counted(module, name, what, size):
    whole = getattr(module, name)
    def count(*given):
        counts[what].append(size(*given))
        return whole(*given)
    setattr(module, name, count)

counted(contraction, "singular_values", "spectra", lambda *given: 1)
counted(tokens, "_encode", "prompts", lambda texts, *rest: len(texts))
counted(groups, "components", "grouped", len)
atexit.register(lambda: print("counted", *map(sum, counts.values()), file=sys.stderr))
"""


def counted(outcome: Outcome) -> list[int]:
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("counted ")]
    return [int(number) for number in line.split()[1:]]


def test_two_processes_compare_as_one_does(several: Several, spinal: Spinal, tmp_path: Path) -> None:
    """Two with two devices each, which share the spectra, the prompts and the preference pairs."""
    pairs = ("preferences=world", "preferences.limit=12", "preferences.held_out=0")
    compare = ("compare", "model.source=random:0.3m", "reference.source=random:0.3m@1", *WORLD, *pairs)
    two = several(2, *compare, "parallel.fsdp=2", devices=2, before=COUNTING)
    alone = spinal(*compare, "hydra.run.dir=alone")
    assert alone.code == 0, alone
    found = ends(two)
    for number, outcome in enumerate(found):
        assert outcome.code == 0, outcome
        assert ("mesh 2 x 2 x 1" in outcome.err) == (number == 0), outcome  # libraries may write in all processes
        assert ("report" in outcome.out) == (number == 0), outcome
    for name in ("aligned/trace.json", "reference/trace.json", "comparison.json"):
        same(tmp_path / "0" / "run" / name, tmp_path / "alone" / name)
    compared = json.loads((tmp_path / "alone" / "comparison.json").read_text())["columns"]
    assert "gradient_norm" in compared
    assert not (tmp_path / "1" / "run").exists()
    trace = json.loads((tmp_path / "alone" / "aligned" / "trace.json").read_text())
    spectra, prompts, grouped = zip(*map(counted, found), strict=True)
    assert sum(spectra) % (2 * (trace["model"]["layers"] + 1)) == 0  # of two models, as many at each boundary
    assert max(spectra) <= 0.55 * sum(spectra)
    # Each takes half of the 16 prompts: with both tokenizers, to compare them, and once for both models.
    assert prompts == (3 * 8, 3 * 8)
    assert grouped == (16 + 12, 0)  # the first groups the prompts and the pairs


def test_an_audit_goes_on_in_as_many_processes_and_in_others(several: Several, tmp_path: Path) -> None:
    """SIGTERM at one of two ends both after a save. Two then end in the same bytes as two that nobody stopped, and four
    that SLURM has started in the same numbers."""
    command = (*AUDIT, "prompts.limit=160", "metrics.groups=4", "batch_tokens=128", "checkpoint_every=1")
    whole = ends(several(2, *command, run=str(tmp_path / "whole")))
    assert [outcome.code for outcome in whole] == [0, 0], whole
    stopped = several(2, *command, run=str(tmp_path / "run"))
    saved = tmp_path / "run" / "progress" / "0" / "saved"
    while not any(path.name.isdigit() and int(path.name) >= 2 for path in saved.glob("*")):
        assert stopped[1].poll() is None, stopped[1].communicate()
        time.sleep(0.01)
    stopped[1].send_signal(signal.SIGTERM)
    for outcome in ends(stopped):
        assert outcome.code == 143, outcome
        assert outcome.err.splitlines()[-1].startswith("spinal: ")
    assert not (tmp_path / "run" / "manifest.json").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "four")
    going_on = several(2, *command, run=str(tmp_path / "run"))
    four = several(4, *command, "parallel.fsdp=2", "parallel.tensor=2", run=str(tmp_path / "four"), slurm=True)
    for outcome in ends([*going_on, *four]):
        assert outcome.code == 0, outcome
    for name in ("trace.json", "trace.csv", "spectra.safetensors", "report.html"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    same(tmp_path / "four" / "trace.json", tmp_path / "whole" / "trace.json")
    for name in ("run", "four"):
        assert not (tmp_path / name / "progress").exists()


def test_processes_that_save_share_a_folder(several: Several) -> None:
    for outcome in ends(several(2, *AUDIT, "checkpoint_every=1")):
        refused(outcome, "process 1 does not see the folder", "choose a hydra.run.dir on a file system that they share")


@pytest.mark.parametrize(
    ("count", "dies", "sent"), [(4, 2, signal.SIGKILL), (2, 0, signal.SIGKILL), (2, 1, signal.SIGSTOP)]
)
def test_a_process_that_is_gone_ends_all(
    several: Several, tmp_path: Path, count: int, dies: int, sent: signal.Signals
) -> None:
    """Where process 0 is gone, so is JAX's service, and JAX itself may end the others before they can say a word."""
    processes = several(count, *ENDLESS)
    await_start(processes[0], count)
    processes[dies].send_signal(sent)
    found = ends([process for number, process in enumerate(processes) if number != dies])
    processes[dies].kill()
    for outcome in found:
        assert outcome.code not in (0, 2), outcome  # -6 where JAX has aborted it
        if dies:
            assert "Traceback" not in outcome.err
            assert outcome.code == 1, outcome
            (said,) = [line for line in outcome.err.splitlines() if line.startswith("spinal: ")]
            assert said.startswith(f"spinal: process {dies} of {count} on ")
            assert said.endswith(f" is gone (nothing heard for {SILENCE:.0f} s): the run ends in all {count} processes")
    assert not list(tmp_path.glob("*/run/manifest.json"))


# A library that makes an error of whatever ends it.
WRAPPING = """
from spinal_jax.cli import jobs

whole = jobs._audit
def wrapped(*given):
    try:
        return whole(*given)
    except KeyboardInterrupt as stopped:
        raise ValueError("some setting is wrong") from stopped
jobs._audit = wrapped
"""


@pytest.mark.parametrize("before", ["", WRAPPING], ids=["as it is", "as an error of a library"])
def test_a_signal_to_one_process_ends_all(several: Several, tmp_path: Path, before: str) -> None:
    processes = several(2, *ENDLESS, before=before)
    await_start(processes[0], 2)
    processes[1].send_signal(signal.SIGTERM)
    zero, one = ends(processes)
    assert (zero.code, one.code) == (143, 143), (zero, one)
    assert zero.err.splitlines()[-1].startswith("spinal: process 1 of 2 on ")
    assert zero.err.endswith(" was terminated: the run ends in all 2 processes\n")
    assert one.err.splitlines()[-1].startswith("spinal: terminated; ")
    assert not list(tmp_path.glob("*/run"))


def refused(outcome: Outcome, *words: str) -> None:
    """One sentence of ours, whatever libraries write beside it."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.out + outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("spinal: ")]
    for word in words:
        assert word in line, line


def test_what_one_process_refuses_ends_all(
    several: Several, model: Path, write_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    """A file that is missing on one machine, one that is another there, and weights of which one number differs."""
    for number, text in enumerate(("some words to say\n" * 9, "", "same words to say\n" * 9)):
        (tmp_path / str(number)).mkdir()
        if text:
            (tmp_path / str(number) / "own.txt").write_text(text)
    settings = ("prompts.path=own.txt", "prompts.format=text")
    missing = ends(several(2, "audit", f"model.source={model}", *settings))
    (tmp_path / "2" / "own.txt").rename(tmp_path / "1" / "own.txt")
    others = ends(several(2, "audit", f"model.source={model}", *settings))
    for number in range(2):
        tensors = load_file(write_model(tmp_path / str(number) / "same") / "model.safetensors")
        if number:
            tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
        save_file(tensors, tmp_path / str(number) / "same" / "model.safetensors", {"format": "pt"})
    weights = ends(several(2, "audit", "model.source=same", *WORLD))
    for outcome in missing:
        refused(outcome, "there is no file 'own.txt'")
    for outcome in others:
        refused(outcome, "process 1 has other prompts than process 0; all must have the same")
    for outcome in weights:
        refused(outcome, "process 1 has other values of model.layers.1.mlp.up_proj.weight than process 0")


def test_processes_that_do_not_belong_together_never_begin(several: Several) -> None:
    other = several(2, *AUDIT, own={1: ("prompts.limit=8",)})
    late = several(2, *AUDIT, "parallel.start_timeout=15", own={1: ("parallel.coordinator=127.0.0.1:1",)})
    for outcome in ends(other):
        refused(outcome, "was started with prompts.limit=8, but process 0 with 16")
    seen = "1 of 2 have connected, this one included (1 from 127.0.0.1)", "nothing answers there"
    for number, outcome in enumerate(ends(late)):
        refused(outcome, f"process {number} of 2 did not meet ", "within parallel.start_timeout=15", seen[number])


def test_who_waits_for_others_ends_when_told_or_when_process_0_is_gone(several: Several, tmp_path: Path) -> None:
    """Of three processes the last never comes."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        zero, one = several(3, *AUDIT, only=(0, 1))
        port = int(re.search(r"127.0.0.1:([0-9]+)", " ".join(zero.args))[1])
        while len(connected(port)) < 2:
            assert zero.poll() is None, zero.communicate()
            time.sleep(0.1)
        if sent == signal.SIGTERM:
            one.send_signal(sent)
            (outcome,) = ends([one])
            assert outcome.code == 143
            assert outcome.err.splitlines()[-1].startswith("spinal: terminated; ")
            zero.kill()
        else:
            time.sleep(5 * INTERVAL)  # in which it hears of process 0
            zero.send_signal(sent)
            (outcome,) = ends([one])
            assert outcome.code == 1
            said = " has not answered process 1 of 3 for 20 s)"
            assert outcome.err.splitlines()[-1].startswith("spinal: process 0 of 3 is gone (127.0.0.1:")
            assert outcome.err.endswith(f"{said}\n")
    assert not (tmp_path / "1" / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("parallel.coordinator=here",),
            "parallel.coordinator is 'here'; it takes HOST:PORT of process 0, auto, or null",
        ),
        (("parallel.coordinator=here:1",), "parallel.processes is None; it takes how many processes"),
        (("parallel.coordinator=here:1", "parallel.processes=2", "parallel.process=2"), "from 0 to 1"),
        (("parallel.processes=2",), "parallel.processes is 2; it takes null unless parallel.coordinator is HOST:PORT"),
        (("parallel.coordinator=auto",), "neither SLURM, Open MPI nor a TPU pod says"),
        (("parallel.coordinator=auto", "parallel.backend=pmap"), "parallel.backend is 'pmap'; it takes auto or mesh"),
    ],
)
def test_what_cannot_be_shared_is_refused(spinal: Spinal, settings: tuple[str, ...], words: str) -> None:
    spinal(*AUDIT, *settings).refusal(words)


LOAD = """
import json, sys
import jax.numpy as jnp, numpy as np
from spinal_jax.parallel.distributed import ClusterSpec, start
from spinal_jax.parallel.mesh import make_mesh
from spinal_jax.parallel.placement import Shards
from spinal_jax.config import ParallelConfig
from spinal_jax.models.formats.gguf import GgufFile
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.models.families import read_model
from spinal_jax.models.parts import take_apart
from spinal_jax.models.translate import load_decoder

service, process, sizes, *sources = sys.argv[1:]
start(ClusterSpec(service, 2, int(process)), 60)
read = []
for kind, name in ((SafetensorsFolder, "_rows"), (SafetensorsFolder, "_block"), (GgufFile, "_read")):
    def counted(*of, method=getattr(kind, name)):
        read.append(method(*of))
        return read[-1]
    setattr(kind, name, counted)
shards = Shards(make_mesh(ParallelConfig(*map(int, sizes))))
for source in sources:
    read.clear()
    checkpoint = open_checkpoint(source)
    family, config = read_model(checkpoint.config)
    model = load_decoder(checkpoint, family, config, jnp.dtype(jnp.float32), placing=shards.parameter)
    sums = {path: float(jnp.sum(x)) for path, x in take_apart(model)[1].items()}
    shapes = checkpoint.names().values()
    matrices = sum(np.prod(info.shape) for info in shapes if len(info.shape) == 2)
    print("read", json.dumps([sum(x.size for x in read if x.ndim == 2 and len(x) > 1) / float(matrices), sums]))
"""


def gguf_of(model: Path, path: Path) -> Path:
    """The tiny model as a GGUF file, its matrices in blocks of 32 columns where that divides them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None
        blocks = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        tensors[known] = quantised(tensor, gguf.GGMLQuantizationType.Q8_0) if blocks else tensor
    sizes = {".block_count": 3, ".context_length": 2048, ".embedding_length": 32, ".feed_forward_length": 48}
    return write(path, "llama", {**KEYS, **sizes}, tensors)


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_each_process_reads_only_what_its_devices_hold(model: Path, tmp_path: Path, axis: str) -> None:
    """Half of every matrix of a folder and of a GGUF file, whether rows or columns are split, and both processes then
    hold the same model."""
    service = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    sizes, sources = "121" if axis == "fsdp" else "112", (model, gguf_of(model, tmp_path / "model.gguf"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, service, str(number), sizes, *map(str, sources)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        found: list[list[Any]] = []
        for outcome in ends(processes):
            assert outcome.code == 0, outcome
            said = [line for line in outcome.out.splitlines() if line.startswith("read ")]
            found.append([json.loads(line.removeprefix("read ")) for line in said])
    finally:
        for process in processes:
            process.kill()
    for zero, one in zip(*found, strict=True):
        assert zero[0] == one[0] == 0.5
        assert zero[1] == one[1]
