"""The compile gate: what it refuses and why, held to kernels that were made to fail; and, as a longer proof, every
kernel of the catalog.

No GPU is needed or touched. A process that interprets Triton kernels cannot compile them, so this file is skipped
there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from weftrain.kernels import Implementation, KernelError, load_catalog  # noqa: E402
from weftrain.kernels.checks import static_figures  # noqa: E402
from weftrain.kernels.checks.compile_gate import Row, compile_all, diff, from_json, to_json  # noqa: E402
from weftrain.kernels.contract import TARGETS, Compilation  # noqa: E402
from weftrain.kernels.registry import Catalog  # noqa: E402

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set: kernels cannot be compiled here"
)


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def centre(x, y, BLOCK: tl.constexpr):
    """A row in the registers of one warp: at BLOCK 32768, 1024 of them for each thread of NVIDIA, 512 of AMD."""
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at)
    tl.store(y + at, row - tl.sum(row, 0))


@triton.jit
def product(x, y, out, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK, K] times [K, BLOCK]; a pipeline stage holds 2 * BLOCK * BLOCK_K elements in shared memory."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, K, BLOCK_K):
        left = tl.load(x + row[:, None] * K + first + column[None, :])
        right = tl.load(y + (first + column)[:, None] * BLOCK + row[None, :])
        acc = tl.dot(left, right, acc)
    tl.store(out + row[:, None] * BLOCK + row[None, :], acc)


@triton.jit
def listed(x, y, BLOCK: tl.constexpr):
    """The interpreter runs this."""
    at = tl.arange(0, BLOCK)
    parts = []
    for part in range(2):
        parts.append(tl.load(x + part * BLOCK + at))
    tl.store(y + at, parts[0] + parts[1])


X = "*fp32:16"
DOUBLE = Compilation("double", double, {"x": X, "y": X, "n": "i32"}, {"BLOCK": 256}, num_warps=2, num_stages=2)
CENTRE = Compilation("centre", centre, {"x": X, "y": X}, {"BLOCK": 32768}, num_warps=1, num_stages=2)
PRODUCT = Compilation(
    "product", product, {"x": "*bf16:16", "y": "*bf16:16", "out": X, "K": "i32:16"}, {"BLOCK": 128, "BLOCK_K": 64},
    num_warps=8, num_stages=2, matrix_instructions=True, one_block="130 registers of 256 threads",
)  # fmt: skip
LISTED = Compilation("listed", listed, {"x": X, "y": X}, {"BLOCK": 256}, num_warps=2, num_stages=2)


def never(*_: Any) -> None:
    raise AssertionError("the gate runs nothing")


def catalog_of(*compilations: Compilation) -> dict[str, dict[str, list[Implementation]]]:
    return {"swiglu": {"ours": [Implementation("swiglu", "ours", never, compilations=lambda: compilations)]}}


def compiled(*compilations: Compilation, targets: tuple[str, ...] = ("sm_90",), **how: Any) -> list[Row]:
    return compile_all(catalog_of(*compilations), targets=targets, **how)


def test_a_small_kernel_for_every_target() -> None:
    seen: list[tuple[int, int, str]] = []
    rows = compile_all(catalog_of(DOUBLE), progress=lambda *where: seen.append(where))
    assert [row.target for row in rows] == list(TARGETS)
    for row in rows:
        assert (row.op, row.source, row.name, row.default, row.ok, row.reason, row.excluded) == (
            "swiglu", "ours", "double", True, True, None, None,
        )  # fmt: skip
        assert (row.stack_bytes, row.spill_bytes, row.spill_instructions, row.shared_bytes) == (0, 0, 0, 0)
        assert (row.matrix_instruction, row.matrix_instruction_count) == (None, 0)
        assert row.registers in range(4, 64)
        assert row.binary_bytes > 1000
    limits = [163, 99, 99, 227, 227, 227, 99, 64, 64, 160]
    assert [row.shared_limit_bytes for row in rows] == [kib * 1024 for kib in limits]
    assert [(done, total) for done, total, _ in seen] == [(done, 10) for done in range(1, 11)]
    assert {note for *_, note in seen} == {f"swiglu double {target}" for target in TARGETS}


def test_matrix_instructions_are_named_for_every_kind_of_target() -> None:
    rows = compiled(PRODUCT, targets=("sm_80", "sm_90", "sm_103", "gfx942"))
    assert [row.matrix_instruction for row in rows] == [
        "HMMA.16816",
        "HGMMA.64x128x16",
        "UTCHMMA",
        "v_mfma.32x32x8_bf16",
    ]
    # 128 x 128 x 64 a turn, of eight warps; on the last two targets the first and the last turns stand outside
    assert [row.loop_matrix_instructions for row in rows] == [64, 4, 4, 16]
    assert all(70 < (row.loop_instructions or 0) < 130 for row in rows)
    assert [row.wide_share for row in rows] == [1.0] * 4
    assert [row.blocks_per_multiprocessor for row in rows] == [1, 2, 2, 2]
    assert all(row.ok and row.matrix_instruction_count > 0 for row in rows)


@pytest.mark.parametrize(
    "target",
    ["sm_90", *(pytest.param(on, marks=[pytest.mark.prove, pytest.mark.soak]) for on in ("sm_80", "sm_103", "gfx942"))],
)
def test_spills_are_found(target: str) -> None:
    (row,) = compiled(CENTRE, targets=(target,))
    assert not row.ok
    assert row.spill_bytes > 0
    assert row.spill_instructions > 0
    assert row.reason == f"spills {row.spill_bytes} bytes ({row.spill_instructions} instructions)"


def test_one_block_a_multiprocessor_needs_a_reason() -> None:
    (row,) = compiled(dataclasses.replace(PRODUCT, one_block=None), targets=("sm_80",))
    assert (row.ok, row.blocks_per_multiprocessor) == (False, 1)
    assert row.reason == "only one block fits a multiprocessor, and `one_block` does not say why that is enough"
    assert all(row.ok for row in compiled(PRODUCT, targets=("sm_80",)))


def test_narrow_accesses_are_seen() -> None:
    """Eight elements of 2 bytes of a row that is aligned are one access; of one that is not, eight."""
    aligned = {"x": "*bf16:16", "y": "*bf16:16", "n": "i32:16"}
    wide = dataclasses.replace(DOUBLE, signature=aligned, constexprs={"BLOCK": 512})
    narrow = dataclasses.replace(wide, name="narrow", signature=aligned | {"x": "*bf16"})
    rows = compiled(wide, narrow, targets=("sm_80", "gfx942"))
    assert [row.wide_share for row in rows] == [1.0, 0.0, 0.5, 0.0]  # a wave of 64 lanes has four elements each


def test_too_much_shared_memory_is_found() -> None:
    """Per stage 2 x 128 x 256 bf16 = 128 KiB."""
    large = dataclasses.replace(PRODUCT, constexprs={"BLOCK": 128, "BLOCK_K": 256}, num_stages=3)
    (row,) = compiled(large)
    assert not row.ok
    assert row.shared_bytes > row.shared_limit_bytes
    assert row.reason == f"needs {row.shared_bytes / 1024:g} KiB of 227 KiB shared memory"


def test_what_only_the_interpreter_accepts_is_found() -> None:
    (row,) = compiled(LISTED)
    assert not row.ok
    assert (
        row.reason == "does not compile: CompilationError: AttributeError(\"'tuple' object has no attribute append\")"
    )
    assert "\n" not in row.reason
    assert row.registers is None


def test_a_required_matrix_instruction_that_is_missing_is_found() -> None:
    (row,) = compiled(dataclasses.replace(DOUBLE, matrix_instructions=True))
    assert (row.ok, row.reason) == (False, "has no matrix instruction, and must")


def test_excluded_targets_other_targets_and_candidates() -> None:
    """An excluded configuration is not compiled but stays in sight; one that is for another target has no row."""
    excluded = dataclasses.replace(LISTED, excluded={"sm_90": "a list inside"})
    candidate = dataclasses.replace(DOUBLE, name="candidate", default=False)
    elsewhere = dataclasses.replace(DOUBLE, name="elsewhere", targets=("sm_80",))
    rows = compiled(excluded, candidate, elsewhere)
    assert [(row.name, row.default, row.ok, row.excluded, row.registers is None) for row in rows] == [
        ("listed", True, True, "a list inside", True),
        ("candidate", False, True, None, False),
    ]
    assert [row.name for row in compiled(excluded, candidate, include_candidates=False)] == ["listed"]


@pytest.mark.prove
def test_other_processes_give_the_same_rows() -> None:
    """Sixteen are shared out; this file is no importable module there, so the kernels are found by its path."""
    many = [dataclasses.replace(made, name=f"{made.name} {n}") for n in range(2) for made in (DOUBLE, PRODUCT)]
    four = ("sm_80", "sm_90", "sm_100", "gfx942")
    here = [row for made in many for row in compiled(made, targets=four)]
    shared = compiled(*many, targets=four)
    assert len(shared) == 16
    assert [dataclasses.replace(row, compile_s=None) for row in shared] == [
        dataclasses.replace(row, compile_s=None) for row in here
    ]


def test_what_is_judged_comes_from_no_cache_but_the_gates_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled(DOUBLE)
    assert [path.name for path in tmp_path.iterdir()] == ["weftrain_compile_gate"]
    assert list(tmp_path.glob("weftrain_compile_gate/*/double.cubin"))
    assert triton.knobs.cache.dir == str(tmp_path)


def test_a_process_that_ends_is_an_error_that_names_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "fatal_kernels.py"
    path.write_text(
        "import multiprocessing, os\nimport triton\nimport triton.language as tl\n\n"
        "if multiprocessing.parent_process() is not None:\n    os._exit(3)\n\n"
        "@triton.jit\ndef fatal(x):\n    tl.store(x, tl.load(x) + 1)\n"
    )
    spec = importlib.util.spec_from_file_location("fatal_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    many = [Compilation(f"fatal {n}", module.fatal, {"x": X}, {}, num_warps=1, num_stages=1) for n in range(16)]
    with pytest.raises(
        KernelError, match="the compiler ended its process at one of: swiglu fatal 0 sm_90; swiglu fatal 1 sm_90;"
    ):
        compiled(*many)


def test_what_cannot_be_meant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="unknown target 'sm_70'; there is: sm_80, sm_86, sm_89"):
        compile_all(catalog_of(DOUBLE), targets=("sm_70",))
    with pytest.raises(KernelError, match="unknown op 'rope'; there is: swiglu"):
        compile_all(catalog_of(DOUBLE), ops=["rope"])
    with pytest.raises(KernelError, match="unknown source 'theirs'; there is: ours"):
        compile_all(catalog_of(DOUBLE), sources=["theirs"])
    with pytest.raises(KernelError, match="swiglu of source 'ours' declares two compilations named 'double'"):
        compiled(DOUBLE, DOUBLE)
    with pytest.raises(KernelError, match="swiglu 'double': the kernel takes x, y, n, BLOCK; declared are x, y, BLOCK"):
        compiled(dataclasses.replace(DOUBLE, signature={"x": X, "y": X}))
    with pytest.raises(KernelError, match=r"'double': its kernel is a Autotuner; give the function that @triton.jit"):
        compiled(dataclasses.replace(DOUBLE, kernel=triton.autotune([triton.Config({})], ["n"])(double)))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(
        KernelError, match="TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it and"
    ):
        compiled(DOUBLE)


ROW = Row(
    "swiglu",
    "ours",
    "double",
    "sm_90",
    True,
    True,
    None,
    None,
    128,
    0,
    0,
    0,
    1024,
    232448,
    "HGMMA",
    16,
    binary_bytes=9000,
    compile_s=0.5,
)


def test_json_and_back() -> None:
    rows = [ROW, dataclasses.replace(ROW, target="sm_80", excluded="spills 8 bytes", registers=None)]
    text = to_json(rows)
    assert from_json(text) == rows
    document = json.loads(text)
    assert (document["schema_version"], document["triton"]) == (2, triton.__version__)
    assert from_json(to_json([])) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("registers", "not the JSON of `weftrain kernels compile`"),
        ("[]", "schema_version is None; this weftrain reads 2"),
        ('{"schema_version": 1, "rows": []}', "schema_version is 1; this weftrain reads 2"),
        ('{"schema_version": 2}', "is not understood: 'rows'"),
        (
            '{"schema_version": 2, "rows": [{"op": "rope", "warps": 4}]}',
            "a row of the compile gate's JSON is not understood",
        ),
        ('{"schema_version": 2, "rows": [7]}', "a row of the compile gate's JSON is not understood"),
    ],
)
def test_other_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        from_json(text)


def test_diff_says_what_changed() -> None:
    assert diff([ROW], [dataclasses.replace(ROW, compile_s=9.0)]) == []
    worse = dataclasses.replace(
        ROW, registers=168, spill_bytes=16, ok=False, reason="spills 16 bytes (4 instructions)", matrix_instruction=None, default=False
    )  # fmt: skip
    assert diff([ROW], [worse]) == [
        "swiglu ours double sm_90: ok -> not ok (spills 16 bytes (4 instructions)), no longer a default, registers 128 "
        "-> 168, "
        "spill bytes 0 -> 16, matrix instruction HGMMA -> none"
    ]
    other = dataclasses.replace(ROW, target="sm_80", excluded="needs 200 KiB of 163 KiB")
    assert diff([ROW], [other]) == [
        "swiglu ours double sm_80: new, excluded (needs 200 KiB of 163 KiB)",
        "swiglu ours double sm_90: gone",
    ]


RECORD = Path(__file__).parent / "static_figures.json"


def test_the_record_is_of_kernels_that_there_are() -> None:
    """Of their ops and sources, and of all targets."""
    record, _ = static_figures.from_json(RECORD.read_text())
    assert {target for by_target in record.values() for target in by_target} == set(TARGETS)
    sources = {f"{op} {source}" for op, by_source in load_catalog().items() for source in by_source}
    assert {" ".join(kernel.split()[:2]) for kernel in record} <= sources


def sampled(catalog: Catalog) -> Catalog:
    """Each kernel for sm_90 and, by its name, for about a twelfth of the other targets; in float16, for which the
    compiler does what it does for bfloat16, a twelfth of sm_90's too.
    """

    def targets(op: str, made: Compilation) -> tuple[str, ...]:
        every = () if " fp16 " in f" {made.name} " else ("sm_90",)
        return tuple(
            on for on in made.targets if on in every or zlib.crc32(f"{op} {made.name} {on}".encode()) % 12 == 0
        )

    def fewer(op: str, variant: Implementation) -> Implementation:
        assert variant.compilations is not None
        made = [dataclasses.replace(made, targets=targets(op, made)) for made in variant.compilations()]
        return dataclasses.replace(variant, compilations=lambda: made)

    for op, by_source in catalog.items():
        for source, variants in by_source.items():
            by_source[source] = [fewer(op, one) if one.compilations else one for one in variants]
    return catalog


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])])
def test_every_kernel_compiles_within_the_limits_of_every_target(everything: bool) -> None:
    """everything: for every target, and with the configurations that tuning may choose, too; else those that run without
    it, for a sample of the targets. And none has become slower by its machine code; everything is in the record of that,
    which `weftrain kernels compile --op OP --record tests/kernels/checks/static_figures.json` writes anew.
    """
    rows = compile_all(load_catalog() if everything else sampled(load_catalog()), include_candidates=everything)
    assert [f"{' '.join(row.key)}: {row.reason}" for row in rows if not row.ok] == []
    record, version = static_figures.from_json(RECORD.read_text())
    if version == triton.__version__:
        worse = static_figures.regressions(record, rows)
        assert [line for line in worse if everything or not line.endswith("is not in the record")] == []
    products = [
        row
        for row in rows
        if row.op == "attention" and not row.excluded and "row_sums" not in row.name and "fp32" not in row.name
    ]
    assert {row.target for row in products} == set(TARGETS)  # a sample has all of them too
    assert all(row.matrix_instruction_count for row in products)
    at_64_and_128 = [
        row.matrix_instruction
        for row in products
        if row.target == "sm_90" and (" d64 " in row.name or " d128 " in row.name)
    ]
    assert {str(name).split(".")[0] for name in at_64_and_128} == {"HGMMA"}


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_what_is_excluded_would_fail() -> None:
    """An exclusion that is no longer true goes."""
    by_target: dict[str, list[Compilation]] = {target: [] for target in TARGETS}
    for op, sources in load_catalog().items():
        for source, variants in sources.items():
            for compilation in (
                made for variant in variants if variant.compilations for made in variant.compilations()
            ):
                bare = dataclasses.replace(
                    compilation, name=f"{op} {source} {compilation.name}", excluded={}, default=True
                )
                for target in compilation.excluded:
                    by_target[target].append(bare)
    for target, compilations in by_target.items():
        assert [row.name for row in compiled(*compilations, targets=(target,)) if row.ok] == []
