"""An audit with `checkpoint_every` that was killed goes on when the command is run again."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from .conftest import Spinal, Start

WORLD = ("audit", "model.source=random:0.3m", "prompts=world", "prompts.limit=300", "batch_tokens=128")
AUDIT = (*WORLD, "metrics.groups=8")


def test_a_killed_and_a_terminated_audit_end_in_the_same_trace(start: Start, spinal: Spinal, tmp_path: Path) -> None:
    whole = start(*AUDIT, "hydra.run.dir=whole", cwd=tmp_path)
    run = tmp_path / "run"
    command = (*AUDIT, "checkpoint_every=2", "hydra.run.dir=run")

    def saves() -> set[str]:
        return {path.name for path in (run / "progress" / "0" / "saved").glob("[0-9]*")}

    def stop(number: int) -> tuple[int, str]:
        """Starts it, and ends it once it has saved something new."""
        before, process = saves(), start(*command, cwd=tmp_path)
        while saves() <= before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate()[1]
        return process.returncode, said

    assert stop(signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = stop(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "spinal: terminated; the same command goes on from what was saved last"
    assert not (run / "manifest.json").exists()
    spinal(*WORLD, "checkpoint_every=2", "hydra.run.dir=run").refusal("unfinished audit with", "overwrite=true")
    going_on = start(*command, cwd=tmp_path)
    for process in (going_on, whole):
        _, said = process.communicate()
        assert process.returncode == 0, said
    for name in ("trace.json", "trace.csv", "spectra.safetensors", "report.html"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (run / "progress").exists()
