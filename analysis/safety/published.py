"""Published values of the safety analyses, as data, with the numbers of samples that tell the real sets by.

A value stands beside ours only where the set has as many rows as the published one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_ANALYSIS360 = "LLM360/Analysis360, analysis/"
_DETECTION = _ANALYSIS360 + "safety360/toxic_detection/demo.ipynb"
_TOXIGEN = _ANALYSIS360 + "safety360/toxigen/demo.ipynb"
_BOLD = _ANALYSIS360 + "safety360/bold/demo.ipynb"
_WMDP = _ANALYSIS360 + "safety360/wmdp/demo.ipynb"
_UNLEARNING = _ANALYSIS360 + "unlearning/demo.ipynb"


class Published(NamedTuple):
    """samples: that were measured. at_least: so many or more rows available, else exactly so many."""

    task: str
    metric: str
    model: str
    value: float
    samples: int
    source: str
    at_least: bool = False


VALUES = (
    Published("toxicity_detection/sbf", "error_share", "CrystalChat", 243 / 1024, 1024, _DETECTION, True),
    Published("toxicity_detection/dynahate", "error_share", "CrystalChat", 308 / 1024, 1024, _DETECTION, True),
    Published("toxicity_detection/toxigen", "error_share", "CrystalChat", 60 / 1024, 1024, _DETECTION, True),
    Published("toxigen/hate_black_1k", "toxic_share", "AmberChat", 0.955, 1000, _TOXIGEN),
    Published("toxigen/hate_black_1k", "toxic_share", "AmberSafe", 0.815, 1000, _TOXIGEN),
    Published("toxigen/neutral_black_1k", "toxic_share", "AmberChat", 0.034, 1000, _TOXIGEN),
    Published("toxigen/neutral_black_1k", "toxic_share", "AmberSafe", 0.202, 1000, _TOXIGEN),
    Published("bold", "mean_compound", "CrystalChat", 0.1398, 23679, _BOLD),
    Published("bold", "negative_share", "CrystalChat", 0.0934, 23679, _BOLD),
    Published("bold/gender", "mean_compound", "CrystalChat", 0.1784, 3204, _BOLD),
    Published("bold/political_ideology", "mean_compound", "CrystalChat", 0.1199, 1984, _BOLD),
    Published("bold/profession", "mean_compound", "CrystalChat", 0.1391, 10195, _BOLD),
    Published("bold/race", "mean_compound", "CrystalChat", 0.1327, 7657, _BOLD),
    Published("bold/religious_ideology", "mean_compound", "CrystalChat", 0.1030, 639, _BOLD),
    Published("bold/gender", "negative_share", "CrystalChat", 0.0811, 3204, _BOLD),
    Published("bold/political_ideology", "negative_share", "CrystalChat", 0.1270, 1984, _BOLD),
    Published("bold/profession", "negative_share", "CrystalChat", 0.0845, 10195, _BOLD),
    Published("bold/race", "negative_share", "CrystalChat", 0.1002, 7657, _BOLD),
    Published("bold/religious_ideology", "negative_share", "CrystalChat", 0.1111, 639, _BOLD),
    Published("wmdp_bio", "acc", "CrystalChat", 0.5915, 1273, _WMDP),
    Published("wmdp_chem", "acc", "CrystalChat", 0.3946, 408, _WMDP),
    Published("wmdp_cyber", "acc", "CrystalChat", 0.3936, 1987, _WMDP),
    Published("wmdp_bio", "acc", "CrystalChat, max-entropy", 0.3708, 1273, _UNLEARNING),
    # The LLM360 paper, arXiv 2312.06550.
    Published("truthfulqa_mc2", "acc", "Amber", 0.4367, 817, "arXiv 2312.06550"),
    Published("truthfulqa_mc2", "acc", "CrystalCoder", 0.3591, 817, "arXiv 2312.06550"),
)


def published_for(task: str, metric: str, samples: int, available: int) -> Mapping[str, Published]:
    """Model -> its published value of a measure, of which we took so many of the samples that are available."""
    return {
        one.model: one
        for one in VALUES
        if (one.task, one.metric) == (task, metric)
        and samples >= one.samples
        and (one.at_least or available == one.samples)
    }


def as_json(found: Mapping[str, Published]) -> dict[str, Any]:
    return {model: {"value": one.value, "source": one.source} for model, one in found.items()}
