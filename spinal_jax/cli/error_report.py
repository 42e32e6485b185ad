"""The report file of an unforeseen error, without secrets."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("spinal-jax", "jax", "jaxlib", "flax", "transformers", "numpy", "hydra-core", "orbax-checkpoint")
SECRETS = (
    (re.compile(r"\b(hf|sk|ghp|gho|github_pat|xox[a-z]|AKIA|glpat)[-_]?[A-Za-z0-9_-]{8,}"), r"\1_***"),
    (
        re.compile(r"(?i)((?:token|secret|passw(?:or)?d|api_?key|credential|authorization)\w*['\"]?\s*[=:]\s*)\S+"),
        r"\1***",
    ),
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@"),
)


def without_secrets(text: str) -> str:
    """The text with tokens, passwords and the home folder masked."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def write_error_report(error: BaseException) -> Path:
    """Writes the report into the temporary folder, or else the current folder, and returns its path.

    Raises OSError if neither is writable.
    """
    lines = [
        f"spinal: unforeseen error, {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"command: {' '.join(sys.argv)}",
        f"python {platform.python_version()}, {platform.platform()}",
        *(f"{name} {_version(name)}" for name in PACKAGES),
        "",
        *traceback.format_exception(error),
    ]
    text = without_secrets("\n".join(lines))
    name = f"spinal-error-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    try:
        path = Path(tempfile.gettempdir()) / name
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        path = Path.cwd() / name
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
