"""The command `spinal attribute`."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from spinal_jax import config
from spinal_jax.cli import help as pages
from spinal_jax.cli.arguments import quoted
from spinal_jax.cli.console import DONE, SHORT, complain, short_path
from spinal_jax.cli.registry import COMMANDS, command
from spinal_jax.config.attribute import AttributeConfig
from spinal_jax.errors import UserError

ARMS = {"aligned": "dpo", "control": "shuffled", "beside": "sft"}  # arm -> file of conf/arm/


@command(
    "'aligned=[RUN,...]' 'control=[RUN,...]' | experiment=attribution model.source=BASE preferences=hh ...",
    "Whether aligned runs differ from control runs of one base by more than a control run moves. With experiment= it "
    "first trains the runs, as spinal train with the same settings would; without, it loads no model.",
    AttributeConfig,
    makes_runs_by="train",
)
def attribute_command(asked: AttributeConfig, folder: Path) -> int:
    from spinal_jax.comparison.attribution import attribute, attribution_shortfalls, save_attribution
    from spinal_jax.report.attribution import write_attribution_report
    from spinal_jax.runs import folder as run_folder

    run_folder.check_free(folder, asked.overwrite, config.to_mapping(asked))
    found = attribute(
        asked.aligned,
        asked.control,
        base=asked.base,
        beside=asked.beside,
        margin=asked.margin,
        step=asked.step,
        same_base=asked.same_base,
    )
    with run_folder.writing(folder, asked.overwrite) as scratch:
        save_attribution(found, scratch)
        write_attribution_report(scratch)
        run_folder.write_manifest(scratch, "attribute", config.to_mapping(asked), {}, {})
    print(found)
    print(f"  report    {short_path(folder / 'report.html')}", flush=True)
    if short := attribution_shortfalls(found, **config.to_mapping(asked.assert_)):
        complain(f"the evidence falls short of assert: {'; '.join(short)}")
        return SHORT
    return DONE


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of `spinal attribute experiment=FILE ...`: (those of the sweep that trains, those of the attribution).

    Raises:
        UserError: the command is run in several processes.
    """
    own = {*pages.names_of(COMMANDS["attribute"]), "hydra.run.dir"} - {"overwrite"}
    training, judging = [], []
    for argument in arguments:
        name = argument.partition("=")[0]
        if name == "parallel.coordinator":
            raise UserError(
                "spinal attribute experiment= runs in one process; train with spinal train experiment=... in each "
                "process, then give the folders: spinal attribute aligned=[...] control=[...]"
            )
        (judging if name in own else training).append(argument)
    if not any(argument.startswith("-") for argument in training):
        training.append("--multirun")
    return training, judging


def arms_of(judging: Sequence[str], sweep: Path) -> list[str]:
    """The arguments of the attribution after a sweep: by default each arm has the folders `ARM-*` of the sweep, and the
    result is written to its folder `attribution`."""
    given = {argument.partition("=")[0] for argument in judging}
    found = [*judging, "overwrite=true"]  # repeated, because there may be more runs than before
    for name, arm in ARMS.items():
        pattern = f"{glob.escape(str(sweep))}/{arm}-*"
        if name not in given and (name != "beside" or glob.glob(pattern)):
            found.append(f"{name}=[{quoted(pattern)}]")
    return found if "hydra.run.dir" in given else [*found, f"hydra.run.dir={quoted(str(sweep / 'attribution'))}"]
