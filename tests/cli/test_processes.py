"""Real processes that share a run, over loopback: one trace, one folder, one end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

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
    ) -> list[subprocess.Popen[str]]:
        port = free_port()
        for number in range(count):
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            place = [f"127.0.0.1:{port}", f"parallel.processes={count}", f"parallel.process={number}"]
            if slurm:
                place = ["auto"]
                job = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": count, "PROCID": number, "LOCALID": number}
                environment |= {f"SLURM_{name}": str(value) for name, value in job.items()}
                environment["JAX_COORDINATOR_PORT"] = str(port)
            said = [*arguments, f"hydra.run.dir={run}", f"parallel.coordinator={place[0]}", *place[1:]]
            started.append(start(*said, *(own or {}).get(number, ()), cwd=folder, env=environment))
        return started[-count:]

    yield begin
    for process in started:
        with_children = [process]
        if psutil.pid_exists(process.pid):
            with_children += psutil.Process(process.pid).children(recursive=True)
        for each in reversed(with_children):
            each.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen[str]], timeout: float = 1200) -> list[Outcome]:
    deadline = time.monotonic() + timeout
    found = []
    for process in processes:
        out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        found.append(Outcome(process.returncode, out, err))
    return found


def same(one: Path, other: Path) -> None:
    found, wanted = (json.loads(path.read_text())["columns"] for path in (one, other))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        got, right = (np.array(some, float) for some in (found[name], values))
        np.testing.assert_allclose(got, right, rtol=CLOSE, atol=CLOSE, err_msg=name)


def test_two_and_four_processes_find_what_one_does(several: Several, spinal: Spinal, tmp_path: Path) -> None:
    """Two with two devices each compare two models, four that SLURM has started audit one of them."""
    compare = ("compare", "model.source=random:0.3m", "reference.source=random:0.3m@1", *WORLD)
    two = several(2, *compare, "parallel.fsdp=2", devices=2)
    alone = spinal(*compare, "hydra.run.dir=alone")
    assert alone.code == 0, alone
    for number, outcome in enumerate(ends(two)):
        assert outcome.code == 0, outcome
        assert ("mesh 2 x 2 x 1" in outcome.err) == (number == 0), outcome  # libraries may write in all processes
        assert ("report" in outcome.out) == (number == 0), outcome
    for name in ("aligned/trace.json", "reference/trace.json", "comparison.json"):
        same(tmp_path / "0" / "run" / name, tmp_path / "alone" / name)
    assert not (tmp_path / "1" / "run").exists()
    four = ends(several(4, *AUDIT, "parallel.fsdp=2", "parallel.tensor=2", run="four", slurm=True))
    assert [outcome.code for outcome in four] == [0] * 4, four
    assert "cpu x 4 in 4 processes, mesh 1 x 2 x 2" in four[0].err
    assert not any("DepthTrace" in outcome.out for outcome in four[1:])
    assert list(tmp_path.glob("*/four")) == [tmp_path / "0" / "four"]
    same(tmp_path / "0" / "four" / "trace.json", tmp_path / "alone" / "aligned" / "trace.json")


@pytest.mark.parametrize(
    ("count", "dies", "sent"), [(4, 2, signal.SIGKILL), (2, 0, signal.SIGKILL), (2, 1, signal.SIGSTOP)]
)
def test_a_process_that_is_gone_ends_all(
    several: Several, tmp_path: Path, count: int, dies: int, sent: signal.Signals
) -> None:
    """Where process 0 is gone, so is JAX's service, and JAX itself may end the others before they can say a word."""
    processes = several(count, *ENDLESS)
    assert processes[0].stderr is not None
    assert f"in {count} processes" in processes[0].stderr.readline()
    processes[dies].send_signal(sent)
    found = ends([process for number, process in enumerate(processes) if number != dies])
    processes[dies].kill()
    for outcome in found:
        assert outcome.code not in (0, 2), outcome  # -6 where JAX has aborted it
        if dies:
            assert "Traceback" not in outcome.err
            assert outcome.code == 1, outcome
            assert f"spinal: process {dies} of {count} on " in outcome.err.splitlines()[-1]
            assert outcome.err.endswith(f" is gone (nothing heard for 25 s): the run ends in all {count} processes\n")
    assert not list(tmp_path.glob("*/run/manifest.json"))


def test_a_signal_to_one_process_ends_all(several: Several, tmp_path: Path) -> None:
    processes = several(2, *ENDLESS)
    assert processes[0].stderr is not None
    assert "in 2 processes" in processes[0].stderr.readline()
    processes[1].send_signal(signal.SIGTERM)
    zero, one = ends(processes)
    assert (zero.code, one.code) == (143, 143)
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
    for number, text in enumerate(("some words to say\n" * 9, "", "other words to say\n" * 9)):
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
    for number, outcome in enumerate(ends(late)):
        refused(outcome, f"process {number} of 2 did not meet ", "within parallel.start_timeout=15")


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
        (("parallel.coordinator=auto", "checkpoint_every=2"), "checkpoint_every is 2; it takes null where several"),
    ],
)
def test_what_cannot_be_shared_is_refused(spinal: Spinal, settings: tuple[str, ...], words: str) -> None:
    spinal(*AUDIT, *settings).refusal(words)


LOAD = """
import json, sys
import jax.numpy as jnp, numpy as np
from spinal_jax.parallel.distributed import Place, start
from spinal_jax.parallel.mesh import make_mesh
from spinal_jax.parallel.placement import Shards
from spinal_jax.config import ParallelConfig
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.models.families import read_model
from spinal_jax.models.parts import take_apart
from spinal_jax.models.translate import load_decoder

source, service, process, sizes = sys.argv[1:]
start(Place(service, 2, int(process)), 60)
read = []
for name in ("_rows", "_block"):
    def counted(*of, method=getattr(SafetensorsFolder, name)):
        read.append(method(*of))
        return read[-1]
    setattr(SafetensorsFolder, name, counted)
family, config = read_model(json.load(open(f"{source}/config.json")))
shards = Shards(make_mesh(ParallelConfig(*map(int, sizes))))
checkpoint = open_checkpoint(source)
model = load_decoder(checkpoint, family, config, jnp.dtype(jnp.float32), placing=shards.parameter)
sums = {path: float(jnp.sum(x)) for path, x in take_apart(model)[1].items()}
shapes = checkpoint.names().values()
matrices = sum(info.dtype.itemsize * np.prod(info.shape) for info in shapes if len(info.shape) == 2)
print(json.dumps([sum(x.nbytes for x in read if x.ndim == 2) / float(matrices), sums]))
"""


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_each_process_reads_only_what_its_devices_hold(model: Path, axis: str) -> None:
    """Half of every matrix, whether rows or columns are split, and both processes then hold the same model."""
    service = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    sizes = "121" if axis == "fsdp" else "112"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(model), service, str(number), sizes],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        found: list[Any] = []
        for outcome in ends(processes):
            assert outcome.code == 0, outcome
            found.append(json.loads(outcome.out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    assert [share for share, _ in found] == [0.5, 0.5]
    assert found[0][1] == found[1][1]
