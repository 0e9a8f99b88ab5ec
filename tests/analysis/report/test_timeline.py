"""The timeline: times against a brute-force count, a bar a slice, the files that are written, and a message for each
bad input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from weftrain.analysis.report.timeline import (
    COLOURS,
    TRACKS,
    Slice,
    TimelineError,
    add_to_tensorboard,
    busy,
    draw,
    read_trace,
)
from weftrain.backends.streaming import trace as streaming_trace
from weftrain.cli.main import main

# One record, in ms: read while nothing runs, computed while the next is read, updated and written; two threads read at
# once.
RECORDED = [
    ("compute", "fetch layers.0", 0, 10),
    ("stall", "layers.0", 1, 10),
    ("read", "layers.0", 0, 10),
    ("compute", "forward layers.0", 10, 30),
    ("read", "layers.1", 12, 22),
    ("read", "layers.1", 14, 26),
    ("compute", "loss head", 30, 34),
    ("compute", "backward layers.0", 34, 60),
    ("spool", "layers.0", 58, 64),
    ("move", "update embedding", 60, 62),
    ("write", "embedding", 62, 66),
    ("compute", "recompute layers.0", 70, 71),
]
TRACK_NAMES = [
    {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}}
    for number, track in enumerate(TRACKS)
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with RECORDED in its trace.json."""
    trace = streaming_trace.Trace()
    for track, name, start, end in RECORDED:
        trace(track, name, 5.0 + start / 1e3, 5.0 + end / 1e3)
    trace.save(tmp_path / "trace.json")
    return tmp_path


def write(path: Path, *events: Any) -> Path:
    path.write_text(json.dumps({"traceEvents": [*TRACK_NAMES, *events]}))
    return path


def event(**changes: Any) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": 0, "name": "forward head", "cat": "compute", "ts": 0.0, "dur": 1.0, **changes}


def test_a_recorded_trace_comes_back(run: Path) -> None:
    assert TRACKS == streaming_trace.TRACKS
    found = {(one.track, one.name, one.start_ms, one.end_ms) for one in read_trace(run / "trace.json")}
    assert found == {(track, name, float(start), float(end)) for track, name, start, end in RECORDED}


def test_busy_by_hand(run: Path) -> None:
    found = busy(read_trace(run / "trace.json"))
    # Moved: [0, 10], [12, 26], [58, 66], 32 ms. Computing and not stalled: [0, 1], [10, 62], [70, 71]; of the moved 1 +
    # 14 + 4.
    assert found == pytest.approx(
        {"compute": 61.0, "move": 2.0, "read": 24.0, "write": 4.0, "spool": 6.0, "stall": 9.0, "overlap_share": 19 / 32}
    )


def test_nothing_moved_is_all_overlapped() -> None:
    assert busy([]) == {**dict.fromkeys(TRACKS, 0.0), "overlap_share": 1.0}
    assert busy([Slice("compute", "forward head", 0.0, 1.0), Slice("read", "head", 0.5, 0.0)])["overlap_share"] == 1.0


@given(st.lists(st.tuples(st.sampled_from(TRACKS), st.integers(0, 40), st.integers(0, 12)), max_size=40))
def test_busy_is_what_counting_says(drawn: list[tuple[str, int, int]]) -> None:
    cells = {
        track: {cell for one, start, size in drawn if one == track for cell in range(start, start + size)}
        for track in TRACKS
    }
    moving = cells["read"] | cells["write"] | cells["spool"]
    under = moving & ((cells["compute"] | cells["move"]) - cells["stall"])
    found = busy([Slice(track, "layers.0", float(start), float(size)) for track, start, size in drawn])
    assert {track: found[track] for track in TRACKS} == {track: len(cells[track]) for track in TRACKS}
    assert found["overlap_share"] == pytest.approx(len(under) / len(moving) if moving else 1.0, abs=1e-12)


def test_kinds_and_records() -> None:
    named = [("compute", "forward layers.3"), ("compute", "dream layers.3"), ("move", "update head"), ("move", "head")]
    named += [("stall", "end of step"), ("spool", "head")]
    found = [(one.kind, one.record) for one in (Slice(track, name, 0.0, 1.0) for track, name in named)]
    assert found[:2] == [("forward", "layers.3"), ("other", "dream layers.3")]
    assert found[2:] == [("update", "head"), ("other", "head"), ("stall", "end of step"), ("spool", "head")]


def test_the_figure_has_one_bar_a_slice_and_the_stalls_are_red(run: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgba

    pyplot_before = "matplotlib.pyplot" in sys.modules
    slices = read_trace(run / "trace.json")
    figure = draw(slices, run / "t.png")
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before
    assert (run / "t.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    bars = []
    for collection in axes.collections:
        for path in collection.get_paths():
            (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
            bars.append((round((low + high) / 2), round(left), round(right), tuple(collection.get_facecolor()[0])))
    wanted = [
        (TRACKS.index(one.track), round(one.start_ms), round(one.end_ms), to_rgba(COLOURS[one.kind])) for one in slices
    ]
    assert sorted(bars) == sorted(wanted)
    assert {colour for lane, _, _, colour in bars if lane == TRACKS.index("stall")} == {to_rgba("red")}
    assert [label.get_text() for label in axes.get_yticklabels()] == list(TRACKS)
    assert axes.get_xlabel() == "ms"
    assert (
        axes.get_title()
        == "busy ms: compute 61.0, move 2.0, read 24.0, write 4.0, spool 6.0, stall 9.0; 59% of the I/O under computation"
    )
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {one.kind for one in slices}


def test_a_bar_is_labelled_where_it_is_wide_enough() -> None:
    pytest.importorskip("matplotlib")
    wide, narrow = Slice("compute", "forward $a_{$", 0.0, 100.0), Slice("read", "layers.10", 0.0, 0.5)
    (axes,) = draw([wide, narrow]).axes
    assert [text.get_text() for text in axes.texts] == ["$a_{$"]  # as it stands: a name is no formula


def test_no_slices_make_an_empty_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert read_trace(write(tmp_path / "trace.json")) == []
    figure = draw([], tmp_path / "t.svg")
    assert "no I/O" in figure.axes[0].get_title()
    assert "<svg" in (tmp_path / "t.svg").read_text()


def image_tags(run: Path) -> list[str]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags: list[str] = events.Tags()["images"]
    return tags


def test_tensorboard_has_the_image(run: Path) -> None:
    pytest.importorskip("matplotlib")
    add_to_tensorboard(draw(read_trace(run / "trace.json")), run)
    assert image_tags(run) == ["streaming/timeline"]


def test_the_verb_prints_draws_and_says_where(run: Path) -> None:
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(main, ["timeline", str(run)])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines()}
    assert rows["compute"] == ["61.0", "85.9%", "5"]
    assert rows["read"] == ["24.0", "33.8%", "3"]
    assert rows["stall"] == ["9.0", "12.7%", "1"]
    assert rows["overlap"][0] == "59.4%"
    assert str(run / "timeline.png") in result.output
    assert "https://ui.perfetto.dev" in result.output
    assert (run / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert image_tags(run) == ["streaming/timeline"]


def test_the_verb_without_a_trace_says_how_to_record_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["timeline", str(tmp_path)])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith(f"weftrain: {tmp_path / 'trace.json'}: no trace here; ")
    assert "backend.options.trace_steps=3" in line
    assert "does not exist" in CliRunner().invoke(main, ["timeline", str(tmp_path / "nowhere")]).output
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_table_is_printed_and_the_extra_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.patches"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(main, ["timeline", str(run)])
    assert result.exit_code == 0
    assert "compute" in result.output
    assert "picture " not in result.output
    assert result.output.splitlines()[-1].endswith("pip install 'weftrain[plot]'")


BAD_EVENTS = {
    "not an object": 3,
    "'tid' is not a whole number": event(tid=True),
    "lies on track 9": event(tid=9),
    "'ph' is 'B'": event(ph="B"),
    "'name' is not a printable text": event(name="a\nb"),
    "'ts' is not a number": event(ts="0"),
    "'ts' is -1.0": event(ts=-1),
    "'ts' is inf": event(ts=10**400),
    "'dur' is not a number": event(dur=None),
    "'dur' is -0.5": event(dur=-0.5),
    "names track 0 'compute'": TRACK_NAMES[0],
    "names track 6 'gossip'": {**TRACK_NAMES[0], "tid": 6, "args": {"name": "gossip"}},
    "names track 6 None": {**TRACK_NAMES[0], "tid": 6, "args": []},
}


@pytest.mark.parametrize("said", BAD_EVENTS)
def test_a_bad_event_is_named(said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "trace.json", event(), BAD_EVENTS[said])
    with pytest.raises(TimelineError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: traceEvents[{len(TRACK_NAMES) + 1}]: {said}")
    assert "trace_steps" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b'{"traceEvents": [', "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"traceEvents": [NaN]}', "not JSON (NaN is not a JSON number)"),
        (b'{"traceEvents": [], "traceEvents": []}', "not JSON (key 'traceEvents' appears twice)"),
        (b"[" * 100_000, "not JSON (nested too deeply)"),
        (b"[]", "it has no list 'traceEvents'"),
        (b'{"traceEvents": {}}', "it has no list 'traceEvents'"),
        (b'{"traceEvents": [{"ph": "X", "tid": 0}]}', "lies on track 0, which no event before it names"),
    ],
)
def test_a_file_that_is_no_trace(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(data)
    with pytest.raises(TimelineError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "trace_steps" in str(caught.value)


def test_infinity_by_a_large_exponent(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.json", event())
    path.write_text(path.read_text().replace('"dur": 1.0', '"dur": 1e999'))
    with pytest.raises(TimelineError, match="'dur' is inf"):
        read_trace(path)


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(TimelineError, match="cannot be read"):
        read_trace(tmp_path / "trace.json")
