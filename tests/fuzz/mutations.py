"""Hostile changes of bytes, of JSON and of command lines, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e-30, 1e300, 0.5, -1e-3)
TEXTS = (
    *("", " ", "\0", "a" * 5000, "../../x", "javascript:alert(1)", "x#y%41", "$\\frac{$", "é", "{{ 1/0 }}", "${x}"),
    *("nan", "inf", "null", "1e999", "[" * 2000, "<script>", "\ud800", "%c", "-1", "last:4"),
)


def value(rng: random.Random) -> Any:
    """A value that may be of any type, size or depth."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice((None, True, False, float("nan"), float("inf")))
    if kind == 3:
        return [value(rng) for _ in range(rng.randrange(3))]
    if kind == 4:
        return {rng.choice(TEXTS[:8]): value(rng) for _ in range(rng.randrange(3))}
    if kind == 5:
        found: Any = 0
        for _ in range(rng.choice((3, 50, 900))):
            found = [found]
        return found
    return (
        rng.randrange(-5, 5000) if kind == 6 else "".join(chr(rng.randrange(32, 500)) for _ in range(rng.randrange(9)))
    )


def changed_json(rng: random.Random, document: Any) -> Any:
    """The document with one to three places replaced, removed, renamed or doubled."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randrange(1, 4)):
        places = list(_places(document))
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        action = rng.randrange(4)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice(TEXTS[:8]) or "new"] = holder.pop(key)
        elif action == 2 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = rng.choice((-holder[key], holder[key] * 2, holder[key] + 1, str(holder[key]), [holder[key]]))
        else:
            holder[key] = value(rng)
    return document


def _places(document: Any, depth: int = 0) -> Any:
    """(holder, key) of every value in a document."""
    if depth > 20:
        return
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from _places(document[key], depth + 1)


def json_text(rng: random.Random, document: Any) -> bytes:
    """A JSON file of the changed document, now and then broken as a text too."""
    text = json.dumps(changed_json(rng, document), ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    return changed_bytes(rng, text) if rng.random() < 0.2 else text


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one to four of them flipped, cut, doubled, moved or overwritten; or with much more."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        if not changed:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(20)))
        # Most structure is at the beginning of a file.
        at = rng.randrange(len(changed)) if rng.random() < 0.5 else rng.randrange(min(len(changed), 400))
        action = rng.randrange(7)
        if action == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del changed[at:]
        elif action == 2:
            del changed[at : at + rng.randrange(1, 40)]
        elif action == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 200)]
        elif action == 4:
            changed[at : at + 8] = rng.choice(NUMBERS[:6]).__index__().to_bytes(16, "little", signed=True)[:8]
        elif action == 5:
            changed[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        else:
            changed[at] = rng.choice((0, 10, 34, 92, 91, 123, 255))
    return bytes(changed)
