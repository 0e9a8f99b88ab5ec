"""The record of what machine code says of a kernel's speed: what counts as worse, and that a file keeps it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from weftrain.kernels import KernelError
from weftrain.kernels.checks.compile_gate import Row
from weftrain.kernels.checks.machine_code import blocks_per_multiprocessor
from weftrain.kernels.checks.static_figures import from_json, merged, regressions, to_json

ROW = Row(
    "attention", "ours", "forward", "sm_90", True, True, None, None, registers=168, shared_bytes=65536,
    matrix_instruction="HGMMA.64x64x16", loop_matrix_instructions=16, loop_instructions=400, wide_share=0.98,
    blocks_per_multiprocessor=2,
)  # fmt: skip
RECORD = merged({}, [ROW])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks_per_multiprocessor": 1}, "blocks a multiprocessor 2 -> 1"),
        ({"wide_share": 0.5}, "share of wide accesses 0.98 -> 0.5"),
        ({"loop_instructions": 800}, "matrix instructions of the inner loop 16 HGMMA.64x64x16 of 400 -> 16 "),
        ({"matrix_instruction": "HGMMA.64x8x16"}, "-> 16 HGMMA.64x8x16 of 400"),
        ({"matrix_instruction": "HMMA.16816"}, "-> 16 HMMA.16816 of 400"),
        ({"matrix_instruction": None, "loop_matrix_instructions": 0, "loop_instructions": 0}, "-> 0 None of 0"),
        ({"name": "backward"}, "attention ours backward sm_90: is not in the record"),
        ({"target": "sm_80"}, "is not in the record"),
    ],
)
def test_what_is_worse_is_named(change: dict[str, Any], said: str) -> None:
    (line,) = regressions(RECORD, [replace(ROW, **change)])
    assert said in line


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"blocks_per_multiprocessor": 3, "registers": 255, "shared_bytes": 0},
        {"loop_instructions": 410},
        {"loop_instructions": 800, "loop_matrix_instructions": 32},  # unrolled once
        {"matrix_instruction": "HGMMA.64x128x16", "loop_matrix_instructions": 8},
        {"default": False, "name": "candidate"},
        {"ok": False, "reason": "spills"},  # the gate says so, louder
    ],
)
def test_what_is_as_good_is_not(change: dict[str, Any]) -> None:
    assert regressions(RECORD, [replace(ROW, **change)]) == []


def test_recording_replaces_what_was_compiled_and_nothing_else() -> None:
    others = [replace(ROW, name="gone"), replace(ROW, name="forward", target="sm_80"), replace(ROW, op="rope")]
    record = merged(merged({}, [ROW, *others]), [replace(ROW, blocks_per_multiprocessor=1)])
    assert {kernel: sorted(by_target) for kernel, by_target in record.items()} == {
        "attention ours forward": ["sm_80", "sm_90"],
        "rope ours forward": ["sm_90"],
    }
    assert record["attention ours forward"]["sm_90"].blocks == 1
    assert from_json(to_json(record, "3.7.1")) == (record, "3.7.1")


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"schema_version": 9, "columns": []}'])
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(KernelError, match="record it anew"):
        from_json(text)


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "tensor_memory", "blocks"),
    [
        ("sm_90", 32, 4, 0, 0, 16),  # 64 warps
        ("sm_90", 168, 8, 0, 0, 1),  # 12 warps fit
        ("sm_90", 128, 8, 0, 0, 2),
        ("sm_90", 129, 8, 0, 0, 1),  # 136 are given: 12 warps
        ("sm_90", 16, 1, 0, 0, 32),
        ("sm_86", 16, 1, 0, 0, 16),
        ("sm_90", 32, 4, 113 * 1024, 0, 2),  # and one KiB each for the system: 228
        ("sm_90", 32, 4, 113 * 1024 + 1, 0, 1),
        ("sm_80", 32, 4, 82 * 1024, 0, 1),
        ("sm_100", 32, 4, 0, 256, 2),
        ("sm_100", 32, 4, 0, 512, 1),
        ("gfx942", 128, 4, 0, 0, 4),
        ("gfx942", 129, 4, 0, 0, 3),
        ("gfx942", 512, 4, 0, 0, 1),
        ("gfx942", 32, 4, 32 * 1024, 0, 2),
        ("gfx950", 32, 4, 32 * 1024, 0, 5),
    ],
)
def test_blocks_a_multiprocessor(
    target: str, registers: int, warps: int, shared: int, tensor_memory: int, blocks: int
) -> None:
    assert blocks_per_multiprocessor(target, registers, warps, shared, tensor_memory) == blocks
