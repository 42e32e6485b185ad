"""The same rows in several containers through a whole audit, and many rows in little memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from .conftest import Spinal


def test_a_parquet_file_its_twin_and_its_folder_give_the_same_trace(
    tmp_path: Path, spinal: Spinal, model: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = [{"prompt": "x" + "".join(rng.choice([*"abcdefgh "], rng.integers(15, 60))), "n": n} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    found = {}
    for source in ("rows.jsonl", "rows.parquet", "rows"):
        out = tmp_path / "runs" / source
        outcome = spinal("audit", f"model.source={model}", f"prompts.path={tmp_path / source}", f"hydra.run.dir={out}")
        assert outcome.code == 0, outcome.err
        files = (out / "trace.json", out / "spectra.safetensors")
        found[source] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert found["rows.jsonl"] == found["rows.parquet"] == found["rows"]


# Linux's ru_maxrss begins with the size of the process that started this one; VmHWM is of this program alone.
READ = """
import re, resource, sys
from pathlib import Path
from spinal_jax.data import read_prompts

count = len(read_prompts(sys.argv[1]).prompts)
status = Path("/proc/self/status")
if status.exists():
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(count, peak)
"""


def test_a_hundred_thousand_rows_of_parquet_are_read_within_a_gibibyte(tmp_path: Path) -> None:
    text = " ".join(f"word{n}" for n in range(200))  # 1.5 kB, beside columns that nobody asks for
    with pyarrow.parquet.ParquetWriter(
        tmp_path / "rows.parquet", pyarrow.schema([("prompt", "string"), ("other", "string")])
    ) as file:
        for start in range(0, 100_000, 10_000):
            prompts = [f"{n} {text}" for n in range(start, start + 10_000)]
            file.write_table(pyarrow.table({"prompt": prompts, "other": prompts}))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "rows.parquet")], capture_output=True, text=True, check=True
    )
    count, peak = map(int, done.stdout.split())
    assert count == 100_000
    assert peak < 2**30
