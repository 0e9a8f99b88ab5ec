"""TensorBoard shows what metrics.jsonl says, after any history of the run and of the follower."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from small_metrics import train
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from weftrain.analysis.tracking.follower import Follower
from weftrain.analysis.tracking.tensorboard import TensorBoard
from weftrain.core.run.metrics import MetricsWriter, read_metrics


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def expected_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the effective records say, as TensorBoard names it and in the precision that it keeps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(folder):
        if record["kind"] == "step":
            numbers = {f"train/{name}": record[name] for name in ("loss", "grad_norm", "tokens")}
            numbers |= {f"train/learning_rate/{group}": value for group, value in record["learning_rate"].items()}
        elif record["kind"] == "evaluation":
            numbers = {f"heldout/{record['set']}/{name}": record[name] for name in ("loss", "perplexity", "tokens")}
        else:
            continue
        for tag, value in numbers.items():
            found.setdefault(tag, []).append((record["step"], float(np.float32(value))))
    return found


def follow(folder: Path) -> None:
    """What one start of the run leaves behind it in TensorBoard."""
    follower = Follower(folder, "tensorboard", TensorBoard(sleep=lambda seconds: None))
    follower.advance()
    follower.close()


def test_tensorboard_shows_the_same_numbers_also_after_a_resume(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 9)
        follow(tmp_path)
    assert scalars(tmp_path) == expected_scalars(tmp_path)
    assert len(scalars(tmp_path)["train/loss"]) == 9
    with MetricsWriter(tmp_path, resume_step=6) as writer:
        train(writer, 7, 8, run=1)
        follow(tmp_path)
    assert scalars(tmp_path) == expected_scalars(tmp_path)
    assert len(scalars(tmp_path)["train/loss"]) == 8


def test_a_run_that_goes_back_while_it_is_followed_is_shown_once(tmp_path: Path) -> None:
    follower = Follower(tmp_path, "tensorboard", TensorBoard(sleep=lambda seconds: None))
    for resume_step, first, last in ((None, 1, 9), (6, 7, 7), (3, 4, 12), (8, 9, 9)):
        with MetricsWriter(tmp_path, resume_step=resume_step) as writer:
            for step in range(first, last + 1):
                train(writer, step, step, run=first)
                follower.advance()
    follower.close()
    assert scalars(tmp_path) == expected_scalars(tmp_path)


def test_what_a_killed_follower_wrote_after_its_state_is_not_doubled(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 3)
        follow(tmp_path)
        state = (tmp_path / "tracking" / "tensorboard.json").read_bytes()
        train(writer, 4, 6)
        follow(tmp_path)
        (tmp_path / "tracking" / "tensorboard.json").write_bytes(state)
        train(writer, 7, 7)
        follow(tmp_path)
    assert scalars(tmp_path) == expected_scalars(tmp_path)


def test_a_run_of_an_earlier_version_is_written_anew(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.evaluation({"step": 0, "set": "held", "loss": 6.0, "perplexity": 403.4, "tokens": 100})
        train(writer, 1, 5)
        follow(tmp_path)
    (tmp_path / "tracking" / "tensorboard.json").unlink()
    with MetricsWriter(tmp_path, resume_step=4) as writer:
        train(writer, 5, 6, run=1)
    follow(tmp_path)
    assert scalars(tmp_path) == expected_scalars(tmp_path)


def test_samples_are_texts_of_tensorboard(tmp_path: Path) -> None:
    def written(writer: MetricsWriter, step: int, text: str) -> None:
        failed = {"text": "", "problem": "logits are not finite"}
        writer.samples([{"step": step, "prompt": "nan", "text": text}, {"step": step, "prompt": "b", **failed}])

    with MetricsWriter(tmp_path) as writer:
        written(writer, 2, "inf")
        written(writer, 4, "one\n<b>\x1b[2J")
        follow(tmp_path)
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        written(writer, 4, "another")
        follow(tmp_path)
    board = plugin_event_accumulator.EventAccumulator(
        str(tmp_path / "tensorboard")
    )  # TensorBoard's own, of all plugins
    board.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("samples/1/text_summary")]
    assert texts == ["    naninf", "    nananother"]
    assert board.Tensors("samples/2/text_summary")[0].tensor_proto.string_val == [b"    logits are not finite"]


def test_tensorboard_has_the_recipe_s_values_in_the_run_itself(tmp_path: Path) -> None:
    values = {"name": "x", "model": {"layers": 2, "tied": True, "mup": None}, "schedule": [{"steps": 3}], "lr": 0.5}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 2)
    follow(tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    content = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    given = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    found = {key: getattr(value, value.WhichOneof("kind")) for key, value in given.items()}
    wanted = {"model.layers": 2, "model.tied": True, "model.mup": "null", "schedule": '[{"steps":3}]', "lr": 0.5}
    assert found == {"name": "x", **wanted}
    assert scalars(tmp_path) == expected_scalars(tmp_path)
    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [True]
