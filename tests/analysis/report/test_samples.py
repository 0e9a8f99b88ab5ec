"""Samples of text on a run's page: those that count, a few of many, and as text whatever they hold."""

from __future__ import annotations

import itertools
import re

from made_runs import HOSTILE, Made, check_markup, page_of, report_of

from weftrain.analysis.report.samples import MAX_CHARACTERS, MAX_PROMPTS, MAX_ROWS, Samples


def test_what_counts_is_shown_newest_first(eventful: Made) -> None:
    for step, text in ((6, "early"), (24, "late\n  indented"), (24, "late\n  again")):
        eventful.metric("sample", step=step, prompt="def", text=text)
    eventful.metric("sample", step=24, prompt=HOSTILE, text="", problem="logits are not finite")
    page = page_of(eventful.run)
    check_markup(page)
    (section,) = re.findall(r'<section id="samples".*?</section>', page, re.DOTALL)
    assert re.findall(r"<td class=text>(.*?)</td>", section, re.DOTALL) == [
        "late\n  again",
        "logits are not finite",
        "early",
        "-",
    ]
    assert re.findall(r'<th scope="row" class="n">(\d+)', section) == ["24", "6"]
    assert page.index('id="curves"') < page.index('id="samples"') < page.index('id="summary"')


def test_a_rollback_takes_its_texts_with_it(eventful: Made) -> None:
    eventful.metric("sample", step=18, prompt="def", text="kept")
    eventful.metric("sample", step=24, prompt="def", text="left")
    eventful.roll_back(18, 2, "the text was worse")
    assert list(report_of(eventful.run).samples.shown()) == [(18, ["kept"])]
    assert "No text was sampled" in page_of(Made(eventful.run.with_name("other")).run)


def test_a_few_of_many_at_even_distances() -> None:
    samples = Samples()
    for step in range(1, 1001):
        for prompt in range(MAX_PROMPTS + 3):
            samples.add({"step": step, "prompt": f"{prompt}", "text": "x" * (MAX_CHARACTERS + step)})
            assert len(samples.rows) <= 2 * MAX_ROWS
    shown = list(samples.shown())
    steps = [step for step, _ in shown]
    assert (len(shown), steps[0], steps[-1], samples.steps) == (MAX_ROWS, 1000, 1, 1000)
    gaps = [later - earlier for later, earlier in itertools.pairwise(steps)]
    assert max(gaps) <= 2 * min(gaps[1:])  # the newest is kept wherever it lies
    assert all(len(texts) == MAX_PROMPTS and None not in texts for _, texts in shown)
    assert all(text is not None and len(text) == MAX_CHARACTERS + 1 for _, texts in shown for text in texts)
