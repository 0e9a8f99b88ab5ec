"""The hash of a kernel covers every file that it is made of: a change in any of them is another hash, in any other file
it is not.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weftrain.kernels import load_catalog
from weftrain.kernels.source_files import defined, hash_files

FILES = {
    "__init__.py": "",
    "ops/__init__.py": "",
    "ops/attention.py": "from their_kernels.ops import _tiles\n\ndef attention(q):\n    from .. import late\n    return q\n",
    "ops/_tiles.py": "from ..shared import SIZE\nimport hashlib\n",
    "ops/other.py": "",
    "shared.py": "SIZE = 1\n",
    "late.py": "",
    "attention.cpp": "int x;\n",
    "unused.py": "",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        path = tmp_path / "their_kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "their_kernels"
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_kernels"]:
        del sys.modules[name]


def test_every_file_of_a_kernel_counts_and_no_other(package: Path) -> None:
    function = importlib.import_module("their_kernels.ops.attention").attention
    extra = [package / "attention.cpp"]
    before, files = hash_files(function, extra)
    assert set(files) == {
        "__init__.py",
        "ops/__init__.py",
        "attention.cpp",
        "late.py",
        "ops/_tiles.py",
        "ops/attention.py",
        "shared.py",
    }
    assert files["shared.py"] == hashlib.sha256(FILES["shared.py"].encode()).hexdigest()
    for name in FILES:
        path = package / name
        path.write_text(path.read_text() + "# changed\n")
        after, _ = hash_files(function, extra)
        assert (after != before) == (name in files), name
        path.write_text(FILES[name])
    assert hash_files(function, extra) == (before, files)


def test_what_is_wrapped_is_hashed_and_not_its_wrapper(package: Path) -> None:
    """An operator of torch.library is an object of torch's; the kernel is what somebody wrote."""
    (package / "operators.py").write_text(
        "import functools\nimport torch\nfrom torch import Tensor\nfrom torch.library import custom_op, triton_op\n\n"
        "def written(x: Tensor) -> Tensor:\n    return x.clone()\n\n"
        "custom = custom_op('their_kernels::custom', mutates_args=())(written)\n"
        "custom.register_fake(torch.empty_like)\n"
        "triton = triton_op('their_kernels::triton', mutates_args=())(written)\n"
        "partial = functools.partial(triton)\n"
    )
    module = importlib.import_module("their_kernels.operators")
    for function in (module.custom, module.triton, module.partial):
        assert defined(function) is module.written
        assert set(hash_files(function)[1]) == {"operators.py"}


def test_files_alone_are_a_kernel_too(package: Path) -> None:
    assert set(hash_files(len, [package / "attention.cpp"])[1]) == {"attention.cpp"}


def test_a_builtin_has_no_files() -> None:
    assert hash_files(len) == (None, {})


@pytest.mark.parametrize(
    ("op", "source", "wanted"),
    [
        (
            "attention",
            "cpp",
            {"cpp_ops/attention.py", "cpp_ops/attention.cpp", "cpp_ops/vector.h", "cpp_ops/_build.py", "arguments.py"},
        ),
        (
            "attention",
            "triton",
            {"triton_ops/attention.py", "triton_ops/_attention_kernels.py", "triton_ops/_launch.py"},
        ),
        ("linear_cross_entropy", "torch", {"torch_ops/linear_cross_entropy.py", "reference.py", "derivatives.py"}),
        ("rope", "reference", {"reference.py", "arguments.py"}),
    ],
)
def test_our_own_kernels_name_their_helpers(op: str, source: str, wanted: set[str]) -> None:
    implementation = load_catalog()[op][source][0]
    _, files = hash_files(implementation.function, implementation.files)
    assert wanted <= set(files)
    assert not any(name.startswith(("checks/numerics", "registry", "apex_ops/")) for name in files)
