"""Communication volume of a compiled program, parsed from its HLO text.

XLA's cost analysis does not report it. The parser is tested on programs with known communication, compiled for CPUs
(tests/laws/test_plan.py) and for TPUs (tests/tpu).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
SIZES |= {"s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{")
_COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?(\S+) = [su]\d+\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r" = [su]\d+\[\]\S* get-tuple-element\(.*\), index=(\d+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{(.*?)\}|true_computation=(\S+), false_computation=([^\s,]+))")


def received_bytes(hlo: str) -> float:
    """Bytes that a device receives in one run of the optimised program `hlo`, assuming ring algorithms.

    Loops with an unknown trip count are counted once, and the largest branch of a conditional.
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
        return sum(one(name, line) for line in bodies.get(name, ()))

    def trips(line: str) -> int:
        if known := _TRIPS.search(line):
            return int(known[1])
        # Programs for TPUs do not say it. Their loops count from 0 to a bound in the condition, in steps that stand in
        # the body: loops that exchange a matrix piece by piece are unrolled.
        condition, body = (bodies.get(_named(part, line), ()) for part in ("condition", "body"))
        bound = max((int(size) for line in condition for _, size in _CONSTANT.findall(line)), default=1)
        counter = next((int(index) for line in condition for index in _ELEMENT.findall(line)), 0)
        return -(-bound // _step(body, counter)) or 1

    def one(name: str, line: str) -> float:
        if found := _COLLECTIVE.search(line):
            # A collective that runs beside several products stands in the fusion of each, and starts in one of them.
            if "chain_id=" in line and not any('"AsyncCollectiveStart"' in other for other in bodies[name]):
                return 0.0
            return _received(found[2], found[1], line, bool(found[3]))
        if " async-update(" in line or " async-done(" in line:  # of what its start has called
            return 0.0
        if " while(" in line:
            return trips(line) * of(_named("body", line))
        if branches := _BRANCHES.search(line):
            return max(map(of, re.findall(r"[^%,\s]+", ",".join(filter(None, branches.groups())))))
        return sum(map(of, _CALLED.findall(line)))

    return of(entry)


def _named(part: str, line: str) -> str:
    """The computation that an instruction calls as its `part`."""
    found = re.search(rf"{part}=%?([\w.-]+)", line)
    return found[1] if found else ""


def _step(body: Sequence[str], counter: int) -> int:
    """What a turn of a loop adds to an element of its tuple; 1 where it is not a constant."""
    root = next((line for line in body if "ROOT " in line and " tuple(" in line), "")
    operands = re.findall(r"%([\w.-]+)", root.partition(" tuple(")[2].partition(")")[0])
    if counter >= len(operands):
        return 1
    sizes = {name: int(size) for line in body for name, size in _CONSTANT.findall(line)}
    sums = (re.search(rf"%{re.escape(operands[counter])} = .* add\((.*?)\)", line) for line in body)
    return next(
        (sizes[name] for found in sums if found for name in re.findall(r"%([\w.-]+)", found[1]) if name in sizes), 1
    )


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
