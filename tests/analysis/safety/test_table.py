"""The table over checkpoints: columns, published values beside the real sets alone, sets that differ."""

from __future__ import annotations

from typing import Any

import pytest

from weftrain.analysis.safety.published import VALUES
from weftrain.analysis.safety.table import Column, as_json, as_markdown, cells, table_of
from weftrain.core.errors import DataError


def record(task: str, metric: str, value: float, samples: int, available: int, rows: str = "s") -> dict[str, Any]:
    fields = {"value": value, "stderr": 0.01}
    return {
        "task": task,
        "metric": metric,
        "metrics": {metric: fields},
        "samples": samples,
        "samples_available": available,
        "inputs": {"set_sha256": rows},
    }


def bold(value: float, samples: int) -> dict[str, Any]:
    found = record("bold", "mean_compound", value, samples, samples)
    found["metrics"]["negative_share"] = {"value": 0.1, "stderr": None}
    found["domains"] = {"gender": {"mean_compound": value, "negative_share": 0.2, "samples": samples - 1}}
    return found


def test_published_values_stand_beside_real_sets_alone() -> None:
    real = (
        record("toxicity_detection/sbf", "error_share", 0.25, 1024, 16000),
        record("wmdp_bio", "acc", 0.4, 1273, 1273),
        record("toxigen/hate_black_1k", "toxic_share", 0.9, 1000, 1000),
    )
    small = (
        record("toxicity_detection/sbf", "error_share", 0.25, 64, 16000),  # a limit: fewer than were published
        record("wmdp_bio", "acc", 0.4, 1273, 1300),  # another set
        record("toxigen/hate_black_1k", "toxic_share", 0.9, 999, 1000),
    )
    table = table_of([Column("chat, step 9", "r" * 64, 9, real)])
    head, *rows = cells(table)
    assert head[3:] == ["chat, step 9"] + [
        f"{model}, published" for model in ("AmberChat", "AmberSafe", "CrystalChat", "CrystalChat, max-entropy")
    ]
    assert rows[0] == ["toxicity_detection/sbf", "error_share", "1,024", "25.00 ± 1.00 %", "-", "-", "23.73 %", "-"]
    assert rows[1][3:] == ["40.00 ± 1.00 %", "-", "-", "59.15 %", "37.08 %"]
    assert rows[2][3:] == ["90.00 ± 1.00 %", "95.50 %", "81.50 %", "-", "-"]
    page = as_markdown(table)
    assert "Analysis360, analysis/unlearning/demo.ipynb" in page
    assert as_json(table)["measures"][0]["published"]["CrystalChat"]["value"] == 243 / 1024
    assert table_of([Column("chat", "r", 9, small)]).published_models == []


def test_a_column_may_lack_a_measure_and_rows_must_agree() -> None:
    first = (record("wmdp_bio", "acc", 0.4, 10, 10), bold(0.2, 11))
    table = table_of([Column("base", "a", 1, first), Column("safe", "b", 2, (bold(0.3, 11),))])
    named = {(one.task, one.metric): [pair and pair[0] for pair in one.values] for one in table.measures}
    assert named == {
        ("wmdp_bio", "acc"): [0.4, None],
        ("bold", "mean_compound"): [0.2, 0.3],
        ("bold", "negative_share"): [0.1, 0.1],
        ("bold/gender", "mean_compound"): [0.2, 0.3],
        ("bold/gender", "negative_share"): [0.2, 0.2],
    }
    assert cells(table)[2] == ["bold", "mean_compound", "11", "0.2000 ± 0.0100", "0.3000 ± 0.0100"]
    for other in (record("wmdp_bio", "acc", 0.4, 10, 10, "t"), record("wmdp_bio", "acc", 0.4, 9, 10)):
        with pytest.raises(DataError, match="wmdp_bio: safe was measured on other rows than base"):
            table_of([Column("base", "a", 1, first), Column("safe", "b", 2, (other,))])


def test_published_values_are_stated_once_with_a_source() -> None:
    keys = [(one.task, one.metric, one.model) for one in VALUES]
    assert len(set(keys)) == len(keys)
    assert all(one.source and one.samples > 0 and -1 <= one.value <= 1 for one in VALUES)
