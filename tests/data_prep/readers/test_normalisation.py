"""Unicode forms in linear time: the same as unicodedata's, whatever the marks."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.data_prep.readers import normalisation
from weftrain.data_prep.readers.normalisation import unicode_form

MARKS = "\u0301\u0316\u0323\u0344\u0345\u0327\u3099\u05b0\u0488…ﬁ①"


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from("aé가e 1" + MARKS), max_size=40), st.sampled_from(["NFC", "NFKC"]))
def test_runs_are_sorted_as_unicodedata_sorts_them(text: str, form: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalisation, "_LONG_RUN", re.compile(r"[^\w\x00-\x7f]{2,}"))
        assert unicode_form(form, text) == unicodedata.normalize(form, text)  # type: ignore[arg-type]


def test_a_long_run_takes_linear_time() -> None:
    """It takes unicodedata half a minute."""
    assert unicode_form("NFC", "e" + "\u0301\u0316" * 100_000) == "é" + "\u0316" * 100_000 + "\u0301" * 99_999


def test_every_combining_mark_belongs_to_a_run() -> None:
    run = re.compile(r"[^\w\x00-\x7f]")
    assert all(run.match(chr(point)) for point in range(0x20000) if unicodedata.combining(chr(point)))
