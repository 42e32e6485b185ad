"""Communication volume of a compiled program, parsed from its HLO text.

XLA's cost analysis does not report it. The parser is tested on programs with known communication, compiled for CPUs
(tests/laws/test_plan.py) and for TPUs (tests/tpu).
"""

from __future__ import annotations

import re
from functools import cache

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
SIZES |= {"s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{")
_COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r" = [su]\d+\[\]\S* constant\((\d+)\)")


def received_bytes(hlo: str) -> float:
    """Bytes that a device receives in one run of the optimised program `hlo`, assuming ring algorithms.

    Loops with an unknown trip count are counted once.
    """
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            current = found[1]
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            bodies[current].append(line)

    @cache
    def of(name: str) -> float:
        return sum(map(one, bodies.get(name, ())))

    def trips(line: str) -> int:
        if known := _TRIPS.search(line):
            return int(known[1])
        # Programs for TPUs do not say it. Their loops count from 0 to a bound in the condition.
        condition = re.search(r"condition=%?([\w.-]+)", line)
        lines = bodies.get(condition[1], ()) if condition else ()
        return max((int(bound) for line in lines for bound in _BOUND.findall(line)), default=0) or 1

    def one(line: str) -> float:
        if found := _COLLECTIVE.search(line):
            return _received(found[2], found[1], line, bool(found[3]))
        if " async-update(" in line or " async-done(" in line:  # of what its start has called
            return 0.0
        if " while(" in line:
            body = re.search(r"body=%?([\w.-]+)", line)
            return trips(line) * (of(body[1]) if body else 0.0)
        called = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line)
        return sum(of(name) for name in called)

    return of(entry)


def _received(kind: str, shape: str, line: str, starts: bool) -> float:
    devices = _group_size(line)
    arrays = _ARRAY.findall(shape)
    if starts and kind != "all-reduce":  # has operands, results, and then counters of its own
        arrays = [(dtype, sides) for dtype, sides in arrays if sides]
        arrays = arrays[len(arrays) // 2 :]
    size = sum(SIZES[dtype] * _product(sides) for dtype, sides in arrays)
    others = (devices - 1) / devices
    match kind:
        case "all-reduce":  # each reduces its part, then all get all parts
            return 2 * others * size
        case "reduce-scatter":  # what comes out is one part
            return (devices - 1) * size
        case "collective-permute":
            return size
        case _:
            return others * size


def _group_size(line: str) -> int:
    """Size of a device group, written as `[groups,size]<=..`, as lists, or as mesh axes and parts of these."""
    groups = _GROUPS.search(line)
    if groups is None:
        return 1
    if groups[1]:
        return int(groups[1])
    if groups[2]:
        return groups[2].count(",") + 1
    sizes, total = dict(re.findall(r"'(\w+)'=(\d+)", groups[3])), 1
    for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[4]):
        total *= int(part or sizes[axis])
    return total


def _product(sides: str) -> int:
    total = 1
    for side in filter(None, sides.split(",")):
        total *= int(side)
    return total
