"""The command `spinal watch`."""

from __future__ import annotations

from pathlib import Path

from spinal_jax.cli.console import DONE, Stopped, say, short_path, stages
from spinal_jax.cli.registry import command
from spinal_jax.config.watch import WatchConfig


@command(
    "DIR | dir=DIR",
    "Traces the checkpoints that a trainer writes into a folder, while it trains.",
    WatchConfig,
    {"prompts": "default", "metrics": "default"},
    ("dir",),
)
def watch_command(asked: WatchConfig, folder: Path) -> int:
    from spinal_jax.recording.watch import run_watch

    try:
        watched = run_watch(asked, folder, stages({}), say=say)
    except Stopped as stopped:
        stopped.kept = (
            f"the traces so far are in {short_path(folder)}; hydra.run.dir={short_path(folder)} goes on from there"
        )
        raise
    print(watched)
    if watched.steps:
        print(f"  report    {short_path(folder / 'report.html')}", flush=True)
    return DONE
