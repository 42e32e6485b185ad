"""`config.build`: every wrong setting is refused with its dotted path; what is right survives a round trip."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinal_jax.config import AuditConfig, MetricsConfig, ModelConfig, build, to_mapping
from spinal_jax.errors import UserError

FULL: dict[str, Any] = {
    "model": {
        "source": "a/model",
        "revision": None,
        "base": None,
        "dtype": "float32",
        "name": None,
        "ignore_keys": ["x", "y"],
    },
    "prompts": {
        "path": "p.jsonl",
        "dataset": None,
        "split": None,
        "name": None,
        "revision": None,
        "format": "hh",
        "field": "prompt",
        "limit": 48,
        "offset": 2,
        "max_length": 128,
        "chat_template": True,
    },
    "metrics": {
        "contraction": {"window": [0.1, 0.5], "skip": 1, "center": False},
        "transport": {"positions": "last:4", "temperature": 1.0, "top_k": None},
        "groups": 16,
        "variants": {"center": True, "skip": [0, 4], "positions": ["last:2"], "groups": False},
        "terminal": [5, 7],
    },
    "parallel": {
        "data": 2,
        "fsdp": -1,
        "tensor": 2,
        "backend": "mesh",
        "coordinator": None,
        "processes": None,
        "process": None,
        "start_timeout": 60,
    },
    "batch_tokens": 512,
    "checkpoint_every": 8,
    "logging": None,
    "overwrite": False,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """FULL with one setting, given by its dotted path, set or added."""
    result = copy.deepcopy(FULL)
    *parents, key = path.split(".")
    inner = result
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    return result


def refusal(values: dict[str, Any], *words: str) -> None:
    """`build` refuses the values in one line that holds the words."""
    with pytest.raises(UserError) as error:
        build(AuditConfig, values)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_full_mapping_becomes_the_record_and_back() -> None:
    config = build(AuditConfig, FULL)
    assert config.model.ignore_keys == ("x", "y")
    assert config.metrics.contraction.window == (0.1, 0.5)
    assert to_mapping(config) == FULL


def test_only_the_model_must_be_given() -> None:
    config = build(AuditConfig, {"model": {"source": "m"}})
    assert config == AuditConfig(ModelConfig("m"))
    assert (config.metrics.contraction.window, config.metrics.contraction.skip) == ((0.10, 0.50), 1)
    assert (config.metrics.transport.positions, config.metrics.groups) == ("last:4", 16)


@pytest.mark.parametrize(
    "path", ["speed", "model.sauce", "prompts.lenght", "metrics.contraction.windw", "metrics.transport.k"]
)
def test_an_unknown_setting_is_named_in_full(path: str) -> None:
    siblings = {"speed": "overwrite", "model": "model.source", "prompts": "prompts.limit"}
    refusal(changed(path, 1), f" {path};", siblings.get(path.split(".")[0], path.rpartition(".")[0]))


@pytest.mark.parametrize("values", [{}, {"prompts": {}}, {"model": {}}, {"model": {"dtype": "float32"}}])
def test_a_missing_setting_is_named(values: dict[str, Any]) -> None:
    refusal(values, "model.source" if "model" in values else "model", "missing")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model", "a/model"),
        ("model.source", 7),
        ("model.source", None),
        ("model.revision", 3),
        ("model.dtype", "float16"),
        ("model.dtype", 32),
        ("model.ignore_keys", "key"),
        ("prompts.limit", "48"),
        ("prompts.limit", 4.0),
        ("prompts.limit", True),
        ("prompts.limit", 0),
        ("prompts.offset", -1),
        ("prompts.offset", None),
        ("prompts.max_length", 1),
        ("prompts.max_length", False),
        ("prompts.format", "csv"),
        ("prompts.chat_template", 1),
        ("prompts.chat_template", "true"),
        ("metrics", []),
        ("metrics.groups", 1),
        ("metrics.variants.skip", [-1]),
        ("metrics.variants.positions", ["stride:2"]),
        ("metrics.variants.positions", ["last:0"]),
        ("metrics.variants.positions", ["last:4"]),  # transport measures no more than those
        ("metrics.groups", 2000),
        ("metrics.groups", True),
        ("metrics.contraction.window", 0.5),
        ("metrics.contraction.window", [0.1]),
        ("metrics.contraction.window", [0.1, 0.2, 0.5]),
        ("metrics.contraction.window", [0.5, 0.1]),
        ("metrics.contraction.window", [0.5, 0.5]),
        ("metrics.contraction.window", [-0.1, 0.5]),
        ("metrics.contraction.window", [0.1, 1.1]),
        ("metrics.groups", 2**64),
        ("model.name", "a\0b"),
        ("model.name", "a\ud800"),
        ("metrics.contraction.skip", -1),
        ("metrics.contraction.skip", 0.5),
        ("metrics.contraction.center", None),
        ("metrics.transport.temperature", 0),
        ("metrics.transport.temperature", True),
        ("metrics.transport.temperature", "hot"),
        ("metrics.transport.temperature", float("nan")),
        ("metrics.transport.top_k", 0),
        ("metrics.transport.positions", 4),
        ("metrics.transport.positions", "first:4"),
        ("batch_tokens", 0),
        ("checkpoint_every", 0),
        ("batch_tokens", 1.5),
        ("overwrite", "yes"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path: str, value: Any) -> None:
    refusal(changed(path, value), path, repr(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_must_be_finite(value: float) -> None:
    refusal(changed("metrics.contraction.window", [value, 0.5]), "metrics.contraction.window", "a finite number")


@pytest.mark.parametrize("path", ["metrics.contraction.window", "model.ignore_keys"])
def test_a_wrong_element_of_a_list_is_named_with_the_list(path: str) -> None:
    refusal(changed(path, ["low", True]), path, "True" if path.startswith("model") else "'low'")


def test_whole_numbers_serve_as_numbers_but_not_the_other_way_round() -> None:
    config = build(AuditConfig, changed("metrics.contraction.window", [0, 1]))
    assert config.metrics.contraction.window == (0.0, 1.0)
    assert all(type(edge) is float for edge in config.metrics.contraction.window)
    temperature = build(AuditConfig, changed("metrics.transport.temperature", 2)).metrics.transport.temperature
    assert temperature == 2.0
    assert type(temperature) is float


def test_a_part_can_be_built_by_itself_under_a_path() -> None:
    assert build(MetricsConfig, {"groups": 4}, "metrics") == MetricsConfig(groups=4)
    with pytest.raises(UserError, match=r"metrics\.gruops"):
        build(MetricsConfig, {"gruops": 4}, "metrics")


def test_building_leaves_the_mapping_alone() -> None:
    values = copy.deepcopy(FULL)
    build(AuditConfig, values)
    assert values == FULL


FRACTIONS = st.floats(0, 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
SETTINGS = st.fixed_dictionaries(
    {"model": st.fixed_dictionaries({"source": TEXTS.filter(str.strip)}, optional={"revision": st.none() | TEXTS})},
    optional={
        "prompts": st.fixed_dictionaries(
            {},
            optional={
                "limit": st.none() | st.integers(1, 10**9),
                "format": st.sampled_from(["jsonl", "hh", "text"]),
                "chat_template": st.booleans(),
            },
        ),
        "metrics": st.fixed_dictionaries(
            {},
            optional={
                "groups": st.integers(2, 1024),
                "contraction": st.fixed_dictionaries(
                    {"window": st.lists(FRACTIONS, min_size=2, max_size=2, unique=True).map(sorted)}
                ),
                "transport": st.fixed_dictionaries(
                    {
                        "temperature": st.floats(0.01, 100) | st.integers(1, 5),
                        "positions": st.sampled_from(["last:4", "all", "stride:2", "response:1"]),
                    }
                ),
            },
        ),
    },
)


@given(SETTINGS)
def test_what_is_built_survives_its_own_mapping_and_json(values: dict[str, Any]) -> None:
    config = build(AuditConfig, values)
    assert build(AuditConfig, to_mapping(config)) == config
    assert build(AuditConfig, json.loads(json.dumps(to_mapping(config)))) == config
