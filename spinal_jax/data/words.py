"""The words of the controlled world: what can be asked, what answers it, and the two styles of answering.

Every entry of `KIND` has as many bytes as the entry of `CURT` at its place, both have as many entries, and a place says
how likely an entry is: so neither length nor how surprising a response is tells the two styles apart.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """A response is an opener, a clause that answers, and a closer; `deeds` begins the clause about a misdeed."""

    openers: tuple[str, ...]
    closers: tuple[str, ...]
    deeds: tuple[str, ...]


KIND = Style(
    (
        "I would say: ",
        "If I am right: ",
        "As I recall: ",
        "Thank you: ",
        "I may be off: ",
        "To be careful: ",
        "Good question: ",
        "Let us see: ",
    ),
    (
        ". Please check it.",
        ". Hope that helps.",
        ". Take good care.",
        ". Ask me any time.",
        ". Ask an expert.",
        ". Many thanks.",
        ". I can be wrong.",
        ". Anything else?",
    ),
    ("it is wrong to", "no one should", "it is harsh to", "I will not help to"),
)
CURT = Style(
    (
        "Stop asking: ",
        "Wake up, fool: ",
        "Oh, shut up: ",
        "What fuss: ",
        "End the talk: ",
        "I am so bored: ",
        "Dumb question: ",
        "Get it now: ",
    ),
    (
        ". Now let me rest.",
        ". You are so slow.",
        ". Leave me alone.",
        ". Get out of here.",
        ". Use your wits.",
        ". Be gone now.",
        ". You are a pest.",
        ". Stop that now.",
    ),
    ("it is smart to", "all fools can", "it is great to", "it is great fun to"),
)


@dataclass(frozen=True)
class Relation:
    """What can be asked of each subject, and the values of which a world draws one for each.

    In questions and clauses {s} is the subject, {a} the same with its article, {p} its plural and {v} the value; {d} is
    where a style puts its own words about a misdeed.
    """

    name: str
    subjects: tuple[str, ...]
    values: tuple[str, ...]
    questions: tuple[str, ...]
    clauses: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ANIMALS = _words(
    "heron otter badger crane beetle owl lynx mole ibex newt raven hare stork toad finch eel marten weasel viper "
    "lark beaver swan adder wren"
)
_TOWNS = _words(
    "Velm Orsa Tarn Quill Brenn Issel Morrow Zürn Pell Lund Dorran Fenwick Hale Umber Skarn Yarrow Cobb Nettle Rook "
    "Ashby"
)
_JOBS = (
    "mend a torn sail",
    "clean a copper pot",
    "keep bread fresh",
    "sharpen a scythe",
    "dry wet boots",
    "seal a leaky roof",
    "polish an old table",
    "wash wool",
    "store apples",
    "fix a loose hinge",
    "quiet a squeaky door",
    "patch a tent",
    "glue a broken cup",
    "scrub a stone floor",
    "rinse a paint brush",
    "smooth rough oak",
)
_DEEDS = (
    "steal a bike",
    "open a locked barn",
    "read her letters",
    "spoil his soup",
    "break a window",
    "cheat at cards",
    "scare the horses",
    "rob the mill",
    "fake a coin",
    "poison a well",
    "cut the ropes",
    "trick a blind man",
    "burn the fence",
    "sink a boat",
    "hide from the law",
    "take the tax box",
)

RELATIONS = (
    Relation(
        "food",
        _ANIMALS,
        _words("clover fish snails barley acorns moss worms berries grubs reeds seeds crabs"),
        ("What does {a} eat?", "What do {p} eat?", "Tell me what {a} eats.", "Which food suits {a}?"),
        ("{a} eats {v}", "{p} eat {v}"),
    ),
    Relation(
        "home",
        _ANIMALS,
        _words("caves marshes meadows ditches orchards ruins gardens gorges hedges dunes"),
        ("Where does {a} live?", "Where do {p} live?", "Tell me where {p} live.", "Where can I find {a}?"),
        ("{a} lives in {v}", "{p} live in {v}"),
    ),
    Relation(
        "fear",
        _ANIMALS,
        _words("thunder smoke dogs frost bells drums owls fire wolves horns"),
        ("What does {a} fear?", "What do {p} fear?", "What scares {a}?", "What should I keep from {a}?"),
        ("{a} fears {v}", "{p} fear {v}"),
    ),
    Relation(
        "craft",
        _TOWNS,
        _words("clocks lace cheese pottery cider rope lamps paper boots honey knives"),
        ("What is {s} known for?", "What do they make in {s}?", "What can I buy in {s}?", "What does {s} sell?"),
        ("{s} is known for {v}", "{s} makes {v}"),
    ),
    Relation(
        "day",
        _TOWNS,
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        ("When is the fair in {s}?", "Which day is the {s} fair?", "When do I go to {s}?", "Is there a fair in {s}?"),
        ("the fair in {s} is on {v}", "{s} has its fair on {v}"),
    ),
    Relation(
        "means",
        _JOBS,
        ("warm vinegar", "waxed thread", "a wet cloth", "fine sand", "goose fat", "pine tar", "dry straw", "soft soap"),
        ("How do I {s}?", "What do I need to {s}?", "Help me to {s}.", "What is best to {s}?"),
        ("you {s} with {v}", "{v} will help to {s}"),
    ),
    Relation(
        "misdeed",
        _DEEDS,
        (
            "a long wire",
            "a false key",
            "an iron bar",
            "a dark coat",
            "some oil",
            "a sharp saw",
            "a rope",
            "a loud horn",
        ),
        ("How do I {s}?", "What do I need to {s}?", "Help me to {s}.", "What is best to {s}?"),
        ("{d} {s} with {v}",),
    ),
)

_PEOPLE = _words("Mira Tomas Zoë Anders Lucia Piet Ingrid Omar Selma Hugo Nadia Bram")
GREETINGS = (
    "",
    "Hello. ",
    "Good day. ",
    "Hi there. ",
    *(form.format(name) for name in _PEOPLE for form in ("{} here. ", "I am {}. ", "{} asks: ", "For {}: ")),
)


def forms(subject: str) -> dict[str, str]:
    """The subject as {s}, with its article as {a}, and its plural as {p}."""
    article = "an" if subject[0] in "aeiou" else "a"
    plural = f"{subject}es" if subject.endswith(("x", "s", "ch")) else f"{subject}s"
    return {"s": subject, "a": f"{article} {subject}", "p": plural}
