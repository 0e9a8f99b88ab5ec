"""What the machine code of every kernel said of its speed when it was recorded, and what is worse than that now.

The record is a JSON file, one line a kernel. `weftrain kernels compile --op OP --record FILE` compiles what is asked
for and replaces its lines in the file; `--against FILE` compares and fails where a figure is worse.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from weftrain.kernels.checks.compile_gate import Row
from weftrain.kernels.contract import KernelError

SCHEMA_VERSION = 1
_WIDE_TOLERANCE = 0.005
_DENSITY_TOLERANCE = 0.05  # of the multiply-adds an instruction of the inner loop


@dataclass(frozen=True)
class Figures:
    """Of one kernel on one target, in the order in which the file has them."""

    blocks: int  # that a multiprocessor holds at once
    wide_share: float | None
    matrix: str | None
    loop_matrix: int
    loop: int
    registers: int
    shared_bytes: int

    @property
    def density(self) -> float:
        """Multiply-adds of matrix instructions for each instruction of the inner loop; without a shape in the
        instruction's name, their number.
        """
        # "HGMMA.64x128x16", "v_mfma.32x32x8_bf16", and of one warp "HMMA.16816" for 16 x 8 x 16
        shape = re.search(r"(\d+)x(\d+)x(\d+)|(16)(8)(8|16|32|64)\b", self.matrix or "")
        volume = math.prod(int(extent) for extent in shape.groups() if extent) if shape else 1
        return volume * self.loop_matrix / self.loop if self.loop else 0.0


Record = dict[str, dict[str, Figures]]  # "op source kernel" -> target -> figures


def figures_of(row: Row) -> Figures | None:
    """None of a row without machine code, or one that fails: it has no figures to keep."""
    if not row.ok or row.registers is None:
        return None
    assert row.blocks_per_multiprocessor is not None
    assert row.shared_bytes is not None
    return Figures(
        row.blocks_per_multiprocessor, row.wide_share, row.matrix_instruction, row.loop_matrix_instructions or 0,
        row.loop_instructions or 0, row.registers, row.shared_bytes,
    )  # fmt: skip


def kernel_of(row: Row) -> str:
    return f"{row.op} {row.source} {row.name}"


def merged(record: Record, rows: Sequence[Row]) -> Record:
    """The record with the rows in place of what it has of their targets; of an op and source that the rows hold for one
    target, other kernels are gone from that target.
    """
    asked = {(f"{row.op} {row.source} ", row.target) for row in rows}
    kept = {
        kernel: {
            target: figures
            for target, figures in by_target.items()
            if not any(kernel.startswith(of) and target == on for of, on in asked)
        }
        for kernel, by_target in record.items()
    }
    for row in rows:
        figures = figures_of(row)
        if figures is not None and row.default:
            kept.setdefault(kernel_of(row), {})[row.target] = figures
    return {kernel: by_target for kernel, by_target in kept.items() if by_target}


def regressions(record: Record, rows: Sequence[Row]) -> list[str]:
    """A line for each default kernel and target that is worse than its record, or has none."""
    lines = []
    for row in rows:
        now = figures_of(row)
        if now is None or not row.default:
            continue
        was = record.get(kernel_of(row), {}).get(row.target)
        worse = ["is not in the record"] if was is None else _worse(was, now)
        if worse:
            lines.append(f"{kernel_of(row)} {row.target}: {', '.join(worse)}")
    return lines


def _worse(was: Figures, now: Figures) -> list[str]:
    worse = []
    if now.blocks < was.blocks:
        worse.append(f"blocks a multiprocessor {was.blocks} -> {now.blocks}")
    if (now.wide_share or 0) < (was.wide_share or 0) - _WIDE_TOLERANCE:
        worse.append(f"share of wide accesses {was.wide_share} -> {now.wide_share}")
    if now.density < was.density * (1 - _DENSITY_TOLERANCE):
        worse.append(
            f"matrix instructions of the inner loop {was.loop_matrix} {was.matrix} of {was.loop} -> "
            f"{now.loop_matrix} {now.matrix} of {now.loop}"
        )
    return worse


# ---- the file


def to_json(record: Record, triton: str) -> str:
    """One line a kernel, sorted."""
    head = {"schema_version": SCHEMA_VERSION, "triton": triton, "columns": list(Figures.__dataclass_fields__)}
    kernels = {
        kernel: {target: list(vars(figures).values()) for target, figures in sorted(by_target.items())}
        for kernel, by_target in sorted(record.items())
    }
    lines = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(by_target)}" for kernel, by_target in kernels.items())
    return f'{json.dumps(head)[:-1]}, "kernels": {{\n{lines}\n}}}}\n'


def from_json(text: str) -> tuple[Record, str]:
    """(the record, the version of Triton that compiled it). Raises KernelError for another file."""
    try:
        document = json.loads(text)
        if document["schema_version"] != SCHEMA_VERSION or document["columns"] != list(Figures.__dataclass_fields__):
            raise KernelError("this record of static figures is of another version: record it anew")
        record = {
            kernel: {target: Figures(*values) for target, values in by_target.items()}
            for kernel, by_target in document["kernels"].items()
        }
        return record, str(document["triton"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, KernelError):
            raise
        raise KernelError(f"not a record of static figures: {error!r}; record it anew") from None
