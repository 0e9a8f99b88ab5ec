"""Keys, types in words and the generated pages."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from weftrain.cli import reference
from weftrain.cli.main import VERBS
from weftrain.core.config import OptimizerConfig, Recipe, Segment
from weftrain.core.formats.strict_model import StrictModel


class Base(StrictModel):
    # above, in two
    # lines
    inherited: int = 3


class Example(Base):
    given: Annotated[int, Field(gt=0, le=8)]  # behind
    text: str | None = None

    # not above a field

    items: tuple[Segment, ...] = ()


def test_keys_have_the_comments_of_their_fields() -> None:
    found = reference.keys(Example)
    assert found == [
        ("inherited", "integer", "3", "above, in two lines"),
        ("given", "integer > 0, <= 8", "", "behind"),
        ("text", "text or null", "null", ""),
        ("items", "list of Segment sections", "[]", ""),
    ]


def test_no_python_type_is_shown() -> None:
    page = reference.recipe_page() + reference.backend_options_page()
    for name in ("tuple", "NoneType", "<class", "typing", "Annotated", "| value |"):
        assert name not in page, name


def test_the_recipe_page_has_every_key() -> None:
    page = reference.recipe_page()
    for heading in ("## schedule.learning_rate.*", "## data.sources.*.fim", "## model.mup"):
        assert heading in page
    for model in (Recipe, OptimizerConfig):
        assert reference.key_table(model) in page


def test_the_verbs_page_has_every_verb() -> None:
    page = reference.verbs_page()
    for members in VERBS.values():
        for name in members:
            assert f"\n### {name}\n" in page
            assert f"Usage: weftrain {name} " in page
    assert "Usage: weftrain kernels check " in page
