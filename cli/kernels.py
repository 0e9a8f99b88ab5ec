"""`weftrain kernels`: the implementations of each op: are they correct, do they compile, how fast are they.

`check` and `bench` run what can run in this process. `--interpret` starts another one, because Triton decides at its
import whether it interprets, and a process that interprets cannot compile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from weftrain.cli.arguments import Group, NamedPath
from weftrain.cli.display import Bar, Console
from weftrain.cli.kernel_parts import (
    DEVICE,
    DTYPES,
    FILE,
    JSON,
    OPS,
    SOURCES,
    interpreted,
    mend_the_interpreter,
    print_table,
    progress,
    repeated,
)
from weftrain.cli.kernels_bench import bench

if TYPE_CHECKING:
    from weftrain.kernels.checks import Finding, static_figures
    from weftrain.kernels.checks.compile_gate import Row


@click.group(cls=Group, invoke_without_command=True)
@click.option(
    "--device",
    "devices",
    type=click.Choice(["cpu", "cuda"]),
    multiple=True,
    help="Only this device type; default: both.",
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Dtype of the activations."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def kernels(ctx: click.Context, devices: tuple[str, ...], dtype: str, as_json: bool) -> None:
    """Every op x source x device: usable, or the reason why not. Subcommands check, compile and measure them."""
    if ctx.invoked_subcommand is not None:
        return
    import torch

    from weftrain.kernels import DEFAULT_PREFERENCES, GPU_PREFERENCES, load_catalog, table

    for origin, reason in load_catalog().broken_plugins.items():
        click.echo(f"warning: {origin} was passed over: {reason}", err=True)
    found = {device: table(device, getattr(torch, dtype)) for device in devices or ("cpu", "cuda")}
    if as_json:
        rows = [
            {**{name: getattr(row, name) for name in ("op", "source", "version", "reason")}, **where}
            for device, by_op in found.items()
            for where in ({"device": device, "dtype": dtype},)
            for row in by_op
        ]
        orders = {"preferences": list(DEFAULT_PREFERENCES), "preferences_on_gpu": list(GPU_PREFERENCES)}
        click.echo(json.dumps({"schema_version": 1, **orders, "rows": rows}, indent=1))
        return
    console = Console()
    shown = Table("op", "source", "version", *found, box=None, pad_edge=False)
    reasons: dict[str, int] = {}
    previous = ""
    for rows_of_one in zip(*found.values(), strict=True):
        first = rows_of_one[0]
        states = [
            "ok" if row.reason is None else f"no ({reasons.setdefault(row.reason, len(reasons) + 1)})"
            for row in rows_of_one
        ]
        shown.add_row("" if first.op == previous else first.op, first.source, first.version, *states)
        previous = first.op
    print_table(shown)
    for reason, number in reasons.items():
        console.print(f"({number}) {reason}")
    console.print(f"tried in this order unless a recipe says otherwise: {', '.join(DEFAULT_PREFERENCES)};")
    console.print(f"on a GPU, but for ops that torch.compile fuses in a compiled model: {', '.join(GPU_PREFERENCES)}")


# check


@kernels.command("check")
@OPS
@SOURCES
@DEVICE
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(DTYPES),
    multiple=True,
    help="Only this dtype (repeatable); default: all three.",
)
@click.option("--check", "checks", multiple=True, metavar="CHECK", help="Only this check (repeatable).")
@click.option("--thorough", is_flag=True, help="Every size and range in every dtype, and times: minutes.")
@click.option(
    "--limit",
    "limit_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="What takes longer for one question has failed.  [default: 120; 600 under the interpreter]",
)
@click.option(
    "--interpret",
    is_flag=True,
    help="Run Triton kernels on the CPU, under Triton's interpreter, in a separate process.",
)
@JSON
def check(
    ops: tuple[str, ...],
    sources: tuple[str, ...],
    device: str,
    dtypes: tuple[str, ...],
    checks: tuple[str, ...],
    thorough: bool,
    limit_s: float | None,
    interpret: bool,
    json_path: Path | None,
) -> None:
    """Check implementations against the contract: numerics, sizes, ranges, composition, side effects, bounds, bad
    input, cost. Failures are printed when they are found. Exit code 1 if there is one.
    """
    if interpret:
        if device != "cpu":
            raise click.BadParameter("the interpreter runs on the CPU", param_hint="--interpret")
        rest = repeated(ops=ops, sources=sources, dtypes=dtypes, checks=checks)
        rest += ["--thorough"] if thorough else []
        sys.exit(interpreted("check", [*rest, "--limit", f"{limit_s or 600:g}"], json_path))
    import torch

    from weftrain.kernels.checks import DTYPES as ALL
    from weftrain.kernels.checks import run_checks
    from weftrain.kernels.checks.findings import to_json
    from weftrain.kernels.checks.time_limit import LIMIT_S

    mend_the_interpreter()
    console = Console()
    chosen = tuple(getattr(torch, dtype) for dtype in dtypes) or ALL
    with Bar(console, "checks", 1) as bar:
        report = run_checks(
            ops or None,
            sources or None,
            device,
            chosen,
            checks or None,
            progress(bar),
            thorough=thorough,
            limit_s=limit_s or LIMIT_S,
            found=_as_they_come(console),
        )
    if json_path is not None:
        json_path.write_text(to_json(report))
    print_table(_findings_table(report))
    for reason in dict.fromkeys(
        f"{item.op} {item.source}: {item.reason}" for item in report.skipped if item.check == "*"
    ):
        console.print(f"skipped {reason}")
    for finding in report.failed:
        where = f"{finding.op} {finding.source} {finding.check} {finding.example} {finding.dtype}"
        console.print(f"FAILED {where}: {finding.detail}")
    console.print(
        f"{len(report) - len(report.failed)} passed, {len(report.failed)} failed, {len(report.skipped)} skipped"
    )
    if not report:
        console.print("nothing was checked: no implementation that was asked for is available here")
    sys.exit(1 if report.failed or not report else 0)


def _as_they_come(console: Console) -> Callable[[Finding], None]:
    """Prints each failure at once, and what was asked of a source when its first answer of another check comes."""
    asked: dict[tuple[str, str, str], list[bool]] = {}

    def hear(finding: Finding) -> None:
        key = finding.op, finding.source, finding.check
        if key not in asked and asked:
            (op, source, check), answers = next(reversed(asked.items()))
            console.print(f"{op} {source} {check}: {sum(answers)} of {len(answers)}")
        asked.setdefault(key, []).append(finding.ok)
        if not finding.ok:
            console.print(f"failed {' '.join(key)} {finding.example} {finding.dtype}: {finding.detail}")

    return hear


def _findings_table(findings: Sequence[Finding]) -> Table:
    """op x source; for each check, how many of its questions passed."""
    names = list(dict.fromkeys(finding.check for finding in findings))
    shown = Table("op", "source", *names, box=None, pad_edge=False)
    for op, source in dict.fromkeys((finding.op, finding.source) for finding in findings):
        cells = []
        for name in names:
            answers = [
                finding.ok for finding in findings if (finding.op, finding.source, finding.check) == (op, source, name)
            ]
            cells.append("-" if not answers else f"{sum(answers)}/{len(answers)}" + ("" if all(answers) else " FAILED"))
        shown.add_row(op, source, *cells)
    return shown


# compile


@kernels.command("compile")
@OPS
@SOURCES
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="Only this target (repeatable), such as sm_90 or gfx942; default: all.",
)
@click.option("--defaults-only", is_flag=True, help="Leave out candidates that no launch uses.")
@JSON
@click.option(
    "--diff",
    "old_path",
    type=NamedPath(exists=True, dir_okay=False, path_type=Path),
    metavar="OLD",
    help="Earlier --json file to compare with.",
)
@click.option(
    "--record",
    "record_path",
    type=FILE,
    metavar="FILE",
    help="Keep the figures of speed in FILE, in place of those that it has of these kernels.",
)
@click.option(
    "--against",
    "against_path",
    type=NamedPath(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Fail where a figure of speed is worse than in this file of --record.",
)
def compile_(
    ops: tuple[str, ...],
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    defaults_only: bool,
    json_path: Path | None,
    old_path: Path | None,
    record_path: Path | None,
    against_path: Path | None,
) -> None:
    """Compile every Triton kernel ahead of time, with no GPU: registers, spills, shared memory, blocks that a
    multiprocessor holds, matrix instructions of the inner loop, share of wide memory accesses.

    Exit code 1 if a default configuration does not compile within its target's limits, or is slower by its machine code
    than --against says.
    """
    from weftrain.core.formats.plain_file import read_plain
    from weftrain.kernels.checks import static_figures
    from weftrain.kernels.checks.compile_gate import compile_all, diff, from_json, to_json
    from weftrain.kernels.contract import TARGETS

    console = Console()
    # before the minutes, not after
    old = None if old_path is None else from_json(read_plain(old_path, "record").decode())
    record = {} if against_path is None else _static_figures(against_path)
    recorded = {} if record_path is None or not record_path.exists() else _static_figures(record_path)
    with Bar(console, "compiling", 1) as bar:
        rows = compile_all(None, ops or None, sources or None, targets or TARGETS, not defaults_only, progress(bar))
    if json_path is not None:
        json_path.write_text(to_json(rows))
    print_table(_rows_table(rows))
    failed = [row for row in rows if row.default and not row.ok]
    for row in rows:
        if not row.ok:
            kind = "FAILED" if row.default else "candidate fails"
            console.print(f"{kind} {row.op} {row.source} {row.name} {row.target}: {row.reason}")
    if old is not None:
        changes = diff(old, rows)
        for line in changes or ["nothing changed"]:
            console.print(line)
    slower = [] if against_path is None else static_figures.regressions(record, rows)
    for line in slower:
        console.print(f"SLOWER {line}")
    if record_path is not None:
        import triton

        text = static_figures.to_json(static_figures.merged(recorded, rows), triton.__version__)
        record_path.write_text(text)
    excluded = sum(row.excluded is not None for row in rows)
    candidates = sum(not row.ok and not row.default for row in rows)
    console.print(
        f"{len(rows)} configurations x targets: {len(failed)} failed, {candidates} candidates fail, {excluded} excluded"
    )
    sys.exit(1 if failed or slower else 0)


@kernels.command("fetch")
@click.argument("repository")
@click.option("--revision", required=True, metavar="COMMIT", help="40 hex digits; a branch or a tag is not taken.")
@click.option("--build", metavar="NAME", help="Only this build, such as torch210-cxx11-cu128-x86_64-linux.")
def fetch(repository: str, revision: str, build: str | None) -> None:
    """Download a kernel of the Hugging Face Hub and print the SHA-256 of each of its builds. Nothing of it is run."""
    from weftrain.kernels import hub

    for name, sha256 in hub.fetch(repository, revision, build).items():
        click.echo(f"{sha256}  {name}")


def _static_figures(path: Path) -> static_figures.Record:
    """The record of a file. Figures of another Triton are not comparable: refused."""
    import triton

    from weftrain.core.formats.plain_file import read_plain
    from weftrain.kernels import KernelError
    from weftrain.kernels.checks import static_figures

    record, version = static_figures.from_json(read_plain(path, "record").decode())
    if version != triton.__version__:
        raise KernelError(
            f"{path} was recorded with triton {version}, and this is {triton.__version__}: record it anew"
        )
    return record


def _rows_table(rows: Sequence[Row]) -> Table:
    headings = "op,source,kernel,target,state,registers,spills,shared / limit KiB,blocks,wide,matrix,in loop,binary KiB"
    shown = Table(*headings.split(","), box=None, pad_edge=False)
    for row in rows:
        state = "excluded" if row.excluded else "ok" if row.ok else "FAILED"
        spills = "-" if row.spill_instructions is None else str(row.spill_instructions)
        shared = "-"
        if row.shared_bytes is not None and row.shared_limit_bytes is not None:
            shared = f"{row.shared_bytes / 1024:.1f} / {row.shared_limit_bytes / 1024:.0f}"
        matrix = f"{row.matrix_instruction_count} {row.matrix_instruction}" if row.matrix_instruction else "-"
        blocks = "-" if row.blocks_per_multiprocessor is None else str(row.blocks_per_multiprocessor)
        wide = "-" if row.wide_share is None else f"{row.wide_share:.0%}"
        loop = f"{row.loop_matrix_instructions} of {row.loop_instructions}" if row.loop_matrix_instructions else "-"
        binary = "-" if row.binary_bytes is None else f"{row.binary_bytes / 1024:.1f}"
        registers = "-" if row.registers is None else str(row.registers)
        name = row.name if row.default else f"{row.name} (candidate)"
        machine = [registers, spills, shared, blocks, wide, matrix, loop, binary]
        shown.add_row(row.op, row.source, name, row.target, state, *machine)
    return shown


kernels.add_command(bench)
