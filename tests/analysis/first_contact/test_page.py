"""The page states what was found, on what machine, under which power and clocks."""

from __future__ import annotations

from weftrain.analysis.first_contact.findings import Finding
from weftrain.analysis.first_contact.page import counts, page_html

ABOUT = {
    "weftrain": {"version": "0.1.0", "commit": "0123abcd", "dirty": False},
    "device": "NVIDIA H200",
    "gpu": [{"index": "0", "power.limit": "700.00", "clocks.max.sm": "1980", "driver_version": "580.65"}],
    "libraries": {"torch": "2.13.0", "triton": "3.7.1", "torchao": "not installed"},
    "cuda": "13.0",
    "kernel_sources": ["torch", "triton"],
}
FOUND = [
    Finding("machine", "versions and conditions", True, {}, ABOUT, 0.5),
    Finding("parity", "amber <demo>", False, {"losses apart": 0.25}, {"why": "losses are 0.25 apart"}, 3.0),
    Finding("parity", "", True, {"took, s": 4.0}, {}, 4.0),
    Finding("7B", "as it comes", True, {"tokens/s": 10412.3}, {}, 30.0),
    Finding("7B", "", None, {}, {"device": {"power, W": {"least": 90.0, "median": 640.0, "greatest": 698.5}}}, 31.0),
]


def test_the_page_states_proofs_figures_and_conditions() -> None:
    page = page_html(FOUND)
    for text in (
        "2 answers good, 1 bad, 1 not asked",
        "NVIDIA H200",
        "power.limit 700.00, clocks.max.sm 1980, driver_version 580.65",
        "torch 2.13.0, triton 3.7.1<",
        "0.1.0, commit 0123abcd<",
        "amber &lt;demo&gt;",
        "losses are 0.25 apart",
        "10,412",
        "90 / 640 / 698.5",
    ):
        assert text in page
    assert page.index("What failed") < page.index("<h2>Figures") < page.index("All questions")


def test_a_check_that_did_not_end_counts_as_bad() -> None:
    ended = Finding("ranks", "", False, {}, {"why": "ended after its 120 s"}, 120.0)
    assert counts([*FOUND, ended]) == (2, 2, 1)
    assert "ended after its 120 s" in page_html([ended])
