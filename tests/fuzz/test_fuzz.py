"""Two hundred hostile inputs, and every input that once was a find: one sentence each, within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from .run import tried
from .targets import Sound, targets

FINDS = Path(__file__).parent / "finds.txt"
NAMES = list(targets(Sound(Path("."))))
EACH = dict.fromkeys(NAMES, 200 // len(NAMES) + 1) | {"measured": 4, "pages": 4}  # which take seconds


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def numbers(name: str) -> list[int]:
    """The numbers that are tried of a class: the first ones, and those that were finds."""
    kept = [line.split() for line in FINDS.read_text().splitlines() if line and not line.startswith("#")]
    return [*range(EACH[name]), *(int(number) for found, number in kept if found == name)]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NAMES)
def test_hostile_inputs_are_read_or_refused_in_one_sentence(name: str, sound: Sound, tmp_path: Path) -> None:
    target = targets(sound)[name]
    troubles = {number: tried(target, name, number, tmp_path / "one") for number in numbers(name)}
    assert {number: trouble for number, trouble in troubles.items() if trouble is not None} == {}
