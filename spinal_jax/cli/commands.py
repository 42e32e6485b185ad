"""Imports all commands, which registers them in the order of the help page."""

from spinal_jax.cli import attribution_job as attribution_job
from spinal_jax.cli import checkpoint_jobs as checkpoint_jobs
from spinal_jax.cli import jobs as jobs
from spinal_jax.cli import recording_jobs as recording_jobs
from spinal_jax.cli.registry import COMMANDS as COMMANDS

FIRST = ("audit", "compare", "attribute", "train", "watch", "collect", "report", "plan")
for _name in sorted(COMMANDS, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
    COMMANDS[_name] = COMMANDS.pop(_name)
