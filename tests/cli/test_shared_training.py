"""`spinal train` among processes, over loopback: one run, one folder, one end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from .conftest import Spinal
from .test_processes import Several, ends, refused, same, several  # noqa: F401 (a fixture)

CLOSE = 1e-5  # sums over devices come in another order: roundings of float32
STEPS = 10
TRAIN = (
    *("train", "model.source=random:0.3m@1", "objective=dpo", "objective.cache=cache"),
    *("preferences=world", "preferences.limit=24", "preferences.held_out=4"),
    *("prompts=world", "prompts.limit=16", "prompts.max_length=32", "metrics.groups=4"),
    *(f"steps={STEPS}", "batch_size=4", f"trace_every={STEPS}", "save_every=9", "optimizer.learning_rate=1e-4"),
)


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_processes_train_what_one_does_and_a_run_moves_to_another_number_of_them(
    several: Several,  # noqa: F811
    spinal: Spinal,
    tmp_path: Path,
) -> None:
    """Two processes of two devices each, SIGTERM at one of them, then four of one device, against one process."""
    run = tmp_path / "shared"
    two = several(2, *TRAIN, "parallel.fsdp=2", "parallel.tensor=2", "parallel.data=1", run=str(run), devices=2)
    alone = spinal(*TRAIN, "parallel.data=1", "hydra.run.dir=alone")
    assert alone.code == 0, alone
    while len(lines(run)) < 3 and all(process.poll() is None for process in two):
        time.sleep(0.05)
    two[1].terminate()
    for number, outcome in enumerate(ends(two)):
        assert outcome.code == 143, outcome
        assert ("in 2 processes, mesh 1 x 2 x 2" in outcome.err) == (number == 0), outcome
        said = "spinal: terminated; the same command goes on" if number else "spinal: process 1 of 2 on "
        assert outcome.err.splitlines()[-1].startswith(said), outcome
    assert not (run / "manifest.json").exists()
    done = lines(run)[-1]["step"] + 1
    assert 3 <= done < STEPS
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(done)]

    four = ends(several(4, *TRAIN, "parallel.fsdp=2", "parallel.tensor=2", run=str(run)))
    assert [outcome.code for outcome in four] == [0] * 4, four
    assert f"going on from step {done} of {STEPS}" in four[0].err
    assert not any("report" in outcome.out for outcome in four[1:])
    wanted = tmp_path / "alone"
    assert [line["step"] for line in lines(run)] == [*range(STEPS + 1)]
    for line, right in zip(lines(run), lines(wanted), strict=True):
        assert line.keys() == right.keys()
        for name, value in right.items():
            np.testing.assert_allclose(line[name], value, rtol=CLOSE, atol=CLOSE, err_msg=f"{right['step']} {name}")
    for step in (0, STEPS):
        name = f"traces/step_{step:06}"
        same(run / name / "trace.json", wanted / name / "trace.json")
        same(run / name / "comparison.json", wanted / name / "comparison.json")
    trained, right = (load_file(each / "model" / "model.safetensors") for each in (run, wanted))
    assert trained.keys() == right.keys()
    for name, values in right.items():
        np.testing.assert_allclose(trained[name], values, atol=CLOSE, err_msg=name)
    assert (run / "report.html").exists()
    assert (run / "manifest.json").exists()


def test_processes_that_do_not_share_a_folder_or_examples_never_begin(several: Several, tmp_path: Path) -> None:  # noqa: F811
    apart = several(2, *TRAIN)
    for number in range(2):
        rows = [{"prompt": "a", "chosen": f"b{row} {number}", "rejected": "c"} for row in range(8)]
        (tmp_path / str(number) / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("preferences=jsonl", "preferences.path=own.jsonl", "preferences.held_out=0", "preferences.limit=null")
    others = several(2, *TRAIN, *data, run=str(tmp_path / "shared"))
    for outcome in ends(apart):
        refused(
            outcome, "process 1 does not see the folder ", "choose a hydra.run.dir on a file system that they share"
        )
    for outcome in ends(others):
        refused(outcome, "process 1 has other examples than process 0; all must have the same")
    assert not (tmp_path / "shared" / "settings.json").exists()
