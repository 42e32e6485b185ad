"""Texts that are drawn, files of rows, and the message of a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from spinal_jax.errors import UserError

USER, REPLY = "user", "assistant"
READ_WRITES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
# Few letters, so that merges meet the boundary; white space, because tokenizers treat it apart; more than one byte.
LETTERS = st.text("ab .\n:é🍅", max_size=12)
SAID = LETTERS.filter(lambda text: bool(text.strip()))


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text
