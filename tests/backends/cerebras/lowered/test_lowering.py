"""The other process and what it leaves behind, with a stand-in for it: no failure is taken for a lowering, and each
says what and where.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lowered_graphs import recipe_of_graph, stored_text
from oracle import parameter_order

from weftrain.backends.cerebras import CerebrasOptions, process, worker_job
from weftrain.backends.cerebras.lowered.lowering import REPORT, Lowered, LoweringError, explain_traceback, lower, remedy
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError

Tiny = Callable[..., Recipe]
COPY = f"""#!{sys.executable}
import shutil, sys
shutil.copyfile(sys.argv[-3], sys.argv[-1])
"""


@pytest.fixture
def lowering(tmp_path: Path, tiny_recipe: Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Lowered]:
    """lowering(kind='ok', files={...}, layers=2, silence_s=20) with the stand-in; the output is tmp_path / 'out'."""
    monkeypatch.setattr(process, "WORKER", Path(__file__).parents[1] / "stand_in_worker.py")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "bin" / "torch-cirh-opt").write_text(COPY)
    base = recipe_of_graph("crystal_float32", tiny_recipe)

    def run(
        kind: str = "ok", files: dict[str, str] | None = None, layers: int = 2, silence_s: float = 20, **more: Any
    ) -> Lowered:
        recipe = base.model_copy(update={"model": base.model.model_copy(update={"num_layers": layers})})
        text = stored_text("crystal_float32")
        behaviour = {
            "kind": kind,
            "parameters": list(parameter_order(base.model, base.optimizer)),
            "files": {"torch.mlir": "torch", "cirh.mlir": text} if files is None else files,
            **more,
        }
        (tmp_path / "behaviour").write_text(json.dumps(behaviour))
        return lower(
            worker_job(recipe, CerebrasOptions(), "validate"),
            tmp_path / "out",
            silence_s,
            python=tmp_path / "bin" / "python",
        )

    return run


def test_a_whole_lowering_gets_its_name_and_a_report(lowering: Callable[..., Lowered], tmp_path: Path) -> None:
    made = lowering()
    assert made.folder == tmp_path / "out"
    assert json.loads((made.folder / REPORT).read_text())["structure"] == made.report.structure
    assert (made.report.seconds, made.report.peak_bytes) == (1.5, 1000)
    assert (made.folder / process.LOG).read_text() == "the vendor's chatter\n"
    lowering()  # an earlier one is replaced
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "behaviour", "out"}


def test_a_folder_of_something_else_is_not_replaced(lowering: Callable[..., Lowered], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(BackendError, match=r"holds no report\.json of an earlier lowering"):
        lowering()
    assert (tmp_path / "out" / "precious").read_text() == "mine"


TRACEBACK = """{"message":"failed to legalize operation 'torch.aten.index.Tensor' that was explicitly marked illegal", "notes": ["loc(
\\"layers.0.ffn.fwd/aten::index\\"(callsite(\\"wrapper\\"(\\"cerebras/pytorch/core/function_mode.py\\":116:0) at
callsite(\\"swiglu\\"(\\"ROOT/kernels/reference.py\\":74:0)"]}""".replace("\n", "")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"kind": "silent", "silence_s": 0.5}, "sent nothing for 0.5 s"),
        ({"kind": "killed"}, "was killed by SIGKILL"),
        ({"kind": "code"}, "ended with code 7: the last words"),
        ({"kind": "garbage"}, "a line that is not JSON"),
        ({"kind": "half"}, "ended with code 0"),
        (
            {"files": {"torch.mlir": "torch", "cirh.mlir": ""}},
            "cirh.mlir is empty, though the compiler reported no failure",
        ),
        ({"files": {"torch.mlir": "torch"}}, "cirh.mlir is missing"),
        ({"files": {"torch.mlir": "torch", "cirh.mlir": "module {"}}, "no function with arguments"),
        ({"layers": 3}, "the lowered graph is not the recipe's step: parameter layers.2"),
        (
            {"files": {"cirh.mlir": "", "traceback_1.json": TRACEBACK}},
            "aten::index of module layers.0.ffn.fwd does not lower",
        ),
        (
            {"kind": "failed", "name": "RuntimeError", "message": "not supported `aten::nonzero`\n\nStack Trace: 0#"},
            "aten::nonzero",
        ),
    ],
)
def test_no_failure_is_taken_for_a_lowering(
    case: dict[str, Any], words: str, lowering: Callable[..., Lowered], tmp_path: Path
) -> None:
    with pytest.raises(BackendError) as error:
        lowering(**case)
    assert words in str(error.value)
    assert "Stack Trace" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"bin", "behaviour", "out.failed"}


def test_a_failed_lowering_leaves_an_earlier_one_alone(lowering: Callable[..., Lowered], tmp_path: Path) -> None:
    before = (lowering().folder / REPORT).read_bytes()
    with pytest.raises(LoweringError):
        lowering(files={"torch.mlir": "torch", "cirh.mlir": ""})
    assert (tmp_path / "out" / REPORT).read_bytes() == before


def test_a_missing_tool_is_named(lowering: Callable[..., Lowered], tmp_path: Path) -> None:
    (tmp_path / "bin" / "torch-cirh-opt").unlink()
    with pytest.raises(LoweringError, match="torch-cirh-opt is missing: the environment is not whole"):
        lowering()


def test_a_tool_that_fails_is_quoted(lowering: Callable[..., Lowered], tmp_path: Path) -> None:
    (tmp_path / "bin" / "torch-cirh-opt").write_text("import sys\nsys.exit('cannot parse')\n")
    with pytest.raises(LoweringError, match=r"torch-cirh-opt cannot read cirh\.mlir: cannot parse"):
        lowering()


def test_our_line_and_the_remedy_are_found_in_the_compilers_report(tmp_path: Path) -> None:
    path = tmp_path / "traceback_1.json"
    path.write_text(TRACEBACK.replace("ROOT", "/somewhere/weftrain"))
    words = explain_traceback(path, Path("/somewhere/weftrain"))
    assert "at kernels/reference.py:74 in swiglu; advanced indexing has no backward there" in words


@pytest.mark.parametrize(
    "words",
    [
        "aten::nonzero",
        "aten::index_put_",
        "aten::_local_scalar_dense",
        "view_as_complex",
        "torch has no attribute 'lazy'",
    ],
)
def test_there_is_a_remedy_for_what_is_known(words: str) -> None:
    assert remedy(words)
    assert remedy("something else") is None
