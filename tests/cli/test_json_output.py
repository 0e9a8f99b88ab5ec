"""`--json` of the verbs: the fields that docs/json-output.md names, and nothing else on standard output."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result
from json_page import documented


def fields(result: Result) -> set[str]:
    found: Any = json.loads(result.stdout)
    assert found.pop("schema_version") == 1
    return set(found)


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (["show", "crystal_demo", "--step", "3"], "show RECIPE"),
        (["show"], "show"),
        (["plan", "amber_7b", "--devices", "224xA100-80GB", "--mtbf", "4000", "--simulate"], "plan RECIPE"),
    ],
)
def test_fields_are_those_of_the_page(weftrain: Callable[..., Result], words: list[str], row: str) -> None:
    result = weftrain(*words, "--json")
    assert result.exit_code == 0, result.output
    found = fields(result)
    for part in ("failures", "simulated"):
        if part in found:
            found |= set(json.loads(result.stdout)[part])
    assert found == documented(row)


def test_a_plan_that_does_not_fit_is_printed_and_refused(weftrain: Callable[..., Result]) -> None:
    result = weftrain("plan", "amber_7b", "batch.replicas=1", "--devices", "1xA100-80GB", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["fits"] is False
    assert found["remedies"]
    assert "does not fit" in result.stderr


def test_learning_rates_of_the_steps_asked_for(weftrain: Callable[..., Result]) -> None:
    found = json.loads(weftrain("show", "amber_7b", "--step", "1000", "--json").stdout)
    assert set(found["learning_rates"]) == {"0", "1000"}
    assert set(found["learning_rates"]["1000"].values()) == {0.00015}
    assert found["recipe"]["name"] == "amber_7b"
