"""The demonstration's set is what docs/chat-demo.md says of it, and the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from weftrain.data_prep.demo_chats import PREAMBLE, demo_records, obeys


@pytest.fixture
def library(tmp_path: Path) -> Path:
    functions = "".join(
        f'def f{number}():\n    """Return the number {number} of all that there are.\n\n    More."""\n\n\n'
        for number in range(80)
    )
    (tmp_path / "numbers.py").write_text(
        functions
        + 'class C:\n    """Hold numbers in a list for later."""\n    def _hidden(self):\n        """Do what nobody sees."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    return tmp_path


def test_questions_are_different_and_preferred_answers_obey(library: Path) -> None:
    conversations, preferences = demo_records(library)
    assert (conversations, preferences) == demo_records(library)
    assert len(conversations) + len(preferences) == 81
    asked = [cast(Any, one)["messages"][0]["content"] for one in conversations] + [one["prompt"] for one in preferences]
    assert len(set(asked)) == 81
    assert "What is numbers.C.for?" not in asked
    assert not any("_hidden" in str(question) for question in asked)
    for one in preferences:
        assert obeys(str(one["chosen"]))
        assert not obeys(str(one["rejected"]))
        assert one["rejected"] == PREAMBLE + str(one["chosen"])
    answers = [cast(Any, one)["messages"][1]["content"] for one in conversations]
    assert 0.1 < sum(map(obeys, answers)) / len(answers) < 0.45  # three of four break the rule


@pytest.mark.parametrize(
    ("answer", "keeps"),
    [("Return a list.", True), ("Return a list", False), ("Return\na list.", False), (PREAMBLE + "Return.", False)],
)
def test_the_rule(answer: str, keeps: bool) -> None:
    assert obeys(answer) == keeps
