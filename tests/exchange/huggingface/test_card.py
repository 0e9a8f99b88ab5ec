"""The metadata of model cards as huggingface_hub reads it, without a network."""

from __future__ import annotations

import pytest
import yaml

from weftrain.analysis.report.model_card import hub_licence

pytest.importorskip("huggingface_hub")
from weftrain.exchange.huggingface.card import card_problem


def card(**fields: object) -> str:
    return f"---\n{yaml.safe_dump(fields, sort_keys=True)}---\n\n# A model\n"


GOOD = {"license": "apache-2.0", "pipeline_tag": "text-generation"}


@pytest.mark.parametrize(
    "licence", ["Apache-2.0", "MIT OR Apache-2.0", "LicenseRef-ours", "GPL-2.0-only WITH GCC-exception-2.0"]
)
def test_what_is_written_for_a_licence_is_read_as_it_is(licence: str) -> None:
    assert (
        card_problem(card(**hub_licence(licence), library_name="transformers", pipeline_tag="text-generation")) is None
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# A model\n", "has no front matter"),
        ("---\nlicense: mit\n", "has no front matter"),
        (card(license="mit"), "has no pipeline_tag"),
        (card(pipeline_tag="text-generation"), "has no license"),
        (card(**GOOD, tags=["a", "a"]), "is read otherwise by huggingface_hub: key 'tags'"),
        (card(**GOOD, **{"model-index": [{"name": 1}]}), "is not read by huggingface_hub"),
        ("---\nlicense: mit\nlicense: apache-2.0\npipeline_tag: x\n---\n", "is not read by huggingface_hub"),
        ("---\na: &a [x]\nb: *a\n---\n", "is not read by huggingface_hub"),
        ("---\n[1, 2\n---\n", "is not read by huggingface_hub"),
    ],
)  # fmt: skip
def test_what_it_would_lose_or_refuse_is_one_line(text: str, words: str) -> None:
    problem = card_problem(text)
    assert problem is not None
    assert words in problem
    assert "\n" not in problem
