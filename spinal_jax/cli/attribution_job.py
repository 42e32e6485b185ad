"""The command that compares several runs with controls."""

from __future__ import annotations

from pathlib import Path

from spinal_jax import config
from spinal_jax.cli.console import DONE, SHORT, complain, shown
from spinal_jax.cli.registry import command
from spinal_jax.config.attribute import AttributeConfig


@command(
    "'aligned=[RUN,...]' 'control=[RUN,...]' [base=RUN]",
    "Whether aligned runs differ from control runs of one base by more than a control run moves; loads no model.",
    AttributeConfig,
)
def attribute(asked: AttributeConfig, folder: Path) -> int:
    from spinal_jax.comparison.attribution import attribute, save_attribution, shortfalls
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
    print(f"  report    {shown(folder / 'report.html')}", flush=True)
    if short := shortfalls(found, **config.to_mapping(asked.assert_)):
        complain(f"the evidence falls short of assert: {'; '.join(short)}")
        return SHORT
    return DONE
