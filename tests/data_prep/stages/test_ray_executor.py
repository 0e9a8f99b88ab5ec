"""Ray: the same bytes as without it, the task's own error, and one line where there is no cluster."""

from __future__ import annotations

import builtins
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.stages import plan
from weftrain.data_prep.stages.executors import LocalExecutor, RayExecutor
from weftrain.data_prep.stages.ray_executor import run_on_ray
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.prove
def test_a_local_cluster_of_two_workers_gives_the_same_bytes(
    tmp_path: Path, encoder: TextEncoder, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'weftrain[ray]'")
    monkeypatch.setattr(plan, "_MEBI", 300)
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = Inputs(tuple(list_inputs([str(tmp_path / "t.jsonl")], source=None)), "text")
    settings: dict[str, Any] = {
        "tokenizer": tmp_path / "tokenizer.json",
        "sequence_length": 16,
        "heldout_fraction": 0.2,
    }
    settings |= {"rows_per_shard": 20, "fim": FimSettings(rate=0.5, spm_share=0.5)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        done: list[tuple[str, int]] = []
        executor = RayExecutor()
        prepare(
            inputs,
            tmp_path / "ray",
            name="d",
            **settings,
            executor=executor,
            progress=lambda stage, at, total, unit: done.append((stage, at)),
        )
        with pytest.raises(DataError, match="file 7 is broken"):
            run_on_ray(_fails, range(20), address=None, workers=2, on_done=lambda index: None)
    finally:
        ray.shutdown()
    prepare(inputs, tmp_path / "local", name="d", **settings, executor=LocalExecutor(1))
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
    assert {stage for stage, _ in done} == {"tokenize", "order", "write"}


def _fails(index: int) -> None:
    if index == 7:
        raise DataError("file 7 is broken; mend it")


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def none(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(DataError, match=r"pip install 'weftrain\[ray\]'"):
        run_on_ray(_fails, [1], address=None, workers=1, on_done=lambda index: None)
