"""The command line: `spinal COMMAND [overrides]`. The only module that knows Hydra."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spinal_jax.errors import UserError

USAGE = """usage: spinal COMMAND [setting=value ...]

  audit    the depth trace of one checkpoint     spinal audit model.source=FOLDER|FILE.gguf|HUB_ID
  report   figures and page of a finished run    spinal report DIR

`spinal audit --help` lists the settings, `-m` sweeps over lists of values, `hydra.run.dir=DIR` says where to write.
"""
INTERRUPTED = 130


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 a mistake in what was asked, 130 interrupted, 1 anything else."""
    commands: dict[str, Callable[[list[str]], None]] = {"audit": _audit, "report": _report}
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command in ("", "-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if command else 2)
    try:
        if command not in commands:
            raise UserError(f"there is no command {command!r}; there are {', '.join(commands)}")
        commands[command](arguments)
    except UserError as error:
        print(f"spinal: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("spinal: interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("spinal report takes one run folder: spinal report DIR")
    from spinal_jax.report.page import write_report

    print(write_report(arguments[0]))


def _audit(arguments: list[str]) -> None:
    _compose("audit", arguments, _audit_job)


def _compose(command: str, arguments: list[str], job: Callable[[dict[str, Any], Path], None]) -> None:
    """Runs `job(settings, output folder)` under Hydra, for one run or each of a sweep's."""
    # Hydra then lets exceptions through instead of printing them and exiting by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def task(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            job(_plain(OmegaConf.to_container(config, resolve=True)), folder)
        finally:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    sys.argv = [f"spinal {command}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(_conf()), config_name=command)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        lines = [line for cause in causes for line in str(cause).splitlines() if line.strip()]
        raise UserError("; ".join(dict.fromkeys(line.strip().rstrip(".") for line in lines[:3]))) from error


def _conf() -> Path:
    """Where the YAML files lie: inside an installed wheel, beside the package in a checkout."""
    package = Path(__file__).parent
    return next(path for path in (package / "conf", package.parent / "conf") if (path / "audit.yaml").exists())


def _plain(settings: Any) -> dict[str, Any]:
    """Without the keys still missing (???), which `build` then names."""

    def known(value: Any) -> Any:
        return {k: known(v) for k, v in value.items() if v != "???"} if isinstance(value, dict) else value

    return known(settings)


def _audit_job(settings: dict[str, Any], folder: Path) -> None:
    from spinal_jax import config, runs

    asked = config.build(config.AuditConfig, settings)
    runs.check_free(folder, asked.overwrite)
    from spinal_jax.api import bars, run_audit
    from spinal_jax.report.page import write_report
    from spinal_jax.result import save_trace

    begin = time.perf_counter()
    trace = run_audit(asked, bar=bars(True), say=lambda line: print(line, file=sys.stderr))
    seconds = {"audit": round(time.perf_counter() - begin, 3)}
    with runs.writing(folder) as scratch:
        save_trace(trace, scratch)
        write_report(scratch)
        runs.write_events(trace, scratch)
        runs.write_manifest(scratch, "audit", config.to_mapping(asked), trace, seconds)
    print(trace)
    print(f"{folder / 'report.html'}")
