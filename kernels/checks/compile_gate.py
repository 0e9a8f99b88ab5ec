"""Compiles every Triton kernel of the catalog for every target, with no GPU present, and says what the machine code
needs.

This is not the interpreter's process. The interpreter accepts kernels that the compiler refuses, so both must run, and
TRITON_INTERPRET turns kernels into something that cannot be compiled: such a process is refused. Nor are threads used:
Triton sets options of LLVM that belong to the whole process, and two threads that compile at once give PTX that no
launch would get.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.kernels.checks import machine_code
from weftrain.kernels.contract import TARGETS, Compilation, Implementation, KernelError
from weftrain.kernels.registry import Catalog, load_catalog
from weftrain.kernels.triton_version import why_not_triton

SCHEMA_VERSION = 2
_CACHE_FOLDER = "weftrain_compile_gate"
_POOL_FROM = 16  # fewer compilations than this are done before other processes have imported torch
_FIGURES = {  # what `diff` compares -> its words
    "registers": "registers",
    "stack_bytes": "stack bytes",
    "spill_bytes": "spill bytes",
    "spill_instructions": "spill instructions",
    "shared_bytes": "shared bytes",
    "matrix_instruction": "matrix instruction",
    "matrix_instruction_count": "matrix instructions",
    "loop_matrix_instructions": "matrix instructions of the inner loop",
    "loop_instructions": "instructions of the inner loop",
    "wide_share": "share of wide accesses",
    "blocks_per_multiprocessor": "blocks a multiprocessor",
    "binary_bytes": "binary bytes",
}


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration for one target; without machine code its figures are None."""

    op: str
    source: str
    name: str
    target: str
    default: bool  # a launch takes it; False: a candidate
    ok: bool  # an excluded row is ok: it is never launched
    reason: str | None  # why it is not ok
    excluded: str | None  # why this configuration is not for this target
    registers: int | None = None
    stack_bytes: int | None = None
    spill_bytes: int | None = None
    spill_instructions: int | None = None
    shared_bytes: int | None = None
    shared_limit_bytes: int | None = None
    matrix_instruction: str | None = None
    matrix_instruction_count: int | None = None
    loop_matrix_instructions: int | None = None
    loop_instructions: int | None = None
    wide_share: float | None = None
    blocks_per_multiprocessor: int | None = None
    binary_bytes: int | None = None
    compile_s: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes a row the same row in another run."""
        return self.op, self.source, self.name, self.target


def compile_all(
    catalog: Catalog | None = None,
    ops: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    targets: Sequence[str] = TARGETS,
    include_candidates: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Compile every Compilation of the catalog for every target; rows in the order of catalog, compilation, target.

    catalog: None is load_catalog(). ops, sources: None is all. progress(done, total, "op name target"): called after
    each row. Raises KernelError for a process that interprets, Triton not installed, an unknown op, source or target,
    two compilations of one op and source under one name, and a compilation that does not declare the arguments of its
    kernel.
    """
    _refuse_what_cannot_compile()
    catalog = load_catalog() if catalog is None else catalog
    _check_names(catalog, ops, sources, targets)
    jobs: list[_Job] = [
        (op, source, compilation, target)
        for op, by_source in catalog.items()
        for source, variants in by_source.items()
        if (ops is None or op in ops) and (sources is None or source in sources)
        for compilation in _compilations(op, source, variants)
        if compilation.default or include_candidates
        for target in targets
        if target in compilation.targets
    ]
    rows: dict[int, Row] = {}
    for index, row in _finished(jobs):
        rows[index] = row
        if progress is not None:
            progress(len(rows), len(jobs), f"{row.op} {row.name} {row.target}")
    return [rows[index] for index in range(len(jobs))]


_Job = tuple[str, str, Compilation, str]  # op, source, what, target


def _finished(jobs: Sequence[_Job]) -> Iterator[tuple[int, Row]]:
    """Rows as they are made: here where they are few, else in one process for each core."""
    workers = min(os.cpu_count() or 1, len(jobs) // (_POOL_FROM // 2))
    if len(jobs) < _POOL_FROM or workers < 2:
        yield from ((index, _row(*job)) for index, job in enumerate(jobs))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(
                _row_elsewhere, op, source, dataclasses.replace(what, kernel=_address(what.kernel)), target
            ): index
            for index, (op, source, what, target) in enumerate(jobs)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            lost = [
                f"{jobs[index][0]} {jobs[index][2].name} {jobs[index][3]}"
                for future, index in futures.items()
                if future.exception()
            ]
            raise KernelError(
                f"the compiler ended its process at one of: {'; '.join(lost[: 2 * workers])}; compile them one by one"
            ) from None
        finally:  # interrupted: what has not begun does not begin
            pool.shutdown(wait=True, cancel_futures=True)


def _address(kernel: Any) -> tuple[str, str, str]:
    """Where another process finds a kernel: its module, the module's file, its name."""
    return kernel.fn.__module__, kernel.fn.__globals__["__file__"], kernel.fn.__name__


def _at(module_name: str, file: str, name: str) -> Any:
    """The kernel of an address: of the module by that name where that is the same file, else of the file."""
    module = sys.modules.get(module_name)
    if module is None:
        try:
            found = importlib.util.find_spec(module_name)
        except ModuleNotFoundError:  # of its parent
            found = None
        if found is not None and found.origin is not None and Path(found.origin) == Path(file):
            module = importlib.import_module(module_name)
        else:
            found = importlib.util.spec_from_file_location(module_name, file)
            if found is None or found.loader is None:
                raise KernelError(f"the kernel '{name}' is defined in {file}, which is no Python module")
            module = sys.modules[module_name] = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
    kernel = getattr(module, name, None)
    if kernel is None:
        raise KernelError(
            f"{file} has no '{name}' at its top level, where the compile gate's other processes look for kernels"
        )
    return kernel


def _row_elsewhere(op: str, source: str, what: Compilation, target: str) -> Row:
    return _row(op, source, dataclasses.replace(what, kernel=_at(*what.kernel)), target)


def _refuse_what_cannot_compile() -> None:
    if (reason := why_not_triton()) is not None:
        raise KernelError(f"nothing can be compiled: {reason}")
    import triton

    if triton.knobs.runtime.interpret:
        raise KernelError(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it and start a new process"
        )


def _check_names(
    catalog: Catalog, ops: Sequence[str] | None, sources: Sequence[str] | None, targets: Sequence[str]
) -> None:
    known = {source for by_source in catalog.values() for source in by_source}
    for kind, asked, there in (
        ("op", ops, list(catalog)),
        ("source", sources, sorted(known)),
        ("target", targets, list(TARGETS)),
    ):
        for name in asked or ():
            if name not in there:
                raise KernelError(f"unknown {kind} '{name}'; there is: {', '.join(there)}")


def _compilations(op: str, source: str, variants: Sequence[Implementation]) -> list[Compilation]:
    from triton.runtime.jit import JITFunction

    found = [made for variant in variants if variant.compilations is not None for made in variant.compilations()]
    for made in found:
        if not isinstance(made.kernel, JITFunction):
            raise KernelError(
                f"{op} '{made.name}': its kernel is a {type(made.kernel).__name__}; give the function that @triton.jit "
                "made, not the operator of triton_op, what wrap_triton returns, or what @triton.autotune chooses among"
            )
        takes, declared = made.kernel.arg_names, [*made.signature, *made.constexprs]
        if sorted(declared) != sorted(takes):
            raise KernelError(
                f"{op} '{made.name}': the kernel takes {', '.join(takes)}; declared are {', '.join(declared)}"
            )
    names = [made.name for made in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise KernelError(
            f"{op} of source '{source}' declares two compilations named '{repeated[0]}'; a name is unique within the op"
        )
    return found


def _row(op: str, source: str, compilation: Compilation, target: str) -> Row:
    """Compile one, unless it is excluded, and judge it."""
    excluded = compilation.excluded.get(target)
    row = Row(
        op, source, compilation.name, target, compilation.default, True, None, excluded,
        shared_limit_bytes=machine_code.SHARED_LIMIT_BYTES[target],
    )  # fmt: skip
    if excluded is not None:
        return row
    from triton import TritonError

    started = time.perf_counter()
    try:
        compiled = _compile(compilation, target)
    except (
        TritonError,
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
    ) as error:  # what Triton's stages raise for a kernel
        reason = f"does not compile: {_compiler_message(error)}"
        return dataclasses.replace(row, ok=False, reason=reason, compile_s=time.perf_counter() - started)
    compile_s = time.perf_counter() - started
    code = machine_code.read(
        compiled.asm, target,
        warps=compilation.num_warps,
        shared_bytes=int(compiled.metadata.shared),
        tensor_memory=int(getattr(compiled.metadata, "tmem_size", 0) or 0),
    )  # fmt: skip
    row = dataclasses.replace(
        row, shared_bytes=int(compiled.metadata.shared), compile_s=compile_s, **dataclasses.asdict(code)
    )
    fault = _why_not(row, compilation)
    return dataclasses.replace(row, ok=fault is None, reason=fault)


def _compile(compilation: Compilation, target: str) -> Any:
    """What a launch on `target` would compile; from the gate's own folder of Triton's cache where nothing changed.

    Its own, because the rest of the cache may hold what some process compiled in several threads, and that is not what
    is judged here.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        kind, _, alignment = compilation.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if alignment:
            attributes[(index,)] = [["tt.divisibility", int(alignment)]]
    source = ASTSource(compilation.kernel, signature, dict(compilation.constexprs), attributes)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / _CACHE_FOLDER)
        return triton.compile(source, target=gpu, options=options)


def _why_not(row: Row, compilation: Compilation) -> str | None:
    assert row.shared_bytes is not None
    assert row.shared_limit_bytes is not None
    reasons = []
    if row.spill_bytes or row.spill_instructions:
        reasons.append(f"spills {row.spill_bytes} bytes ({row.spill_instructions} instructions)")
    if row.shared_bytes > row.shared_limit_bytes:
        reasons.append(f"needs {row.shared_bytes / 1024:g} KiB of {row.shared_limit_bytes / 1024:g} KiB shared memory")
    if compilation.matrix_instructions and row.matrix_instruction is None:
        reasons.append("has no matrix instruction, and must")
    if compilation.matrix_instructions and compilation.one_block is None and row.blocks_per_multiprocessor == 1:
        reasons.append("only one block fits a multiprocessor, and `one_block` does not say why that is enough")
    return "; ".join(reasons) or None


def _compiler_message(error: BaseException) -> str:
    """The message that says why: Triton's errors carry it last, after the source line and a caret."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip(" ^")]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'without a message'}"


# ---- written down, and compared


def to_json(rows: Sequence[Row]) -> str:
    """A document that `from_json` reads and people diff: one row a line."""
    import triton

    lines = ",\n".join(f"    {json.dumps(dataclasses.asdict(row))}" for row in rows)
    head = f'  "schema_version": {SCHEMA_VERSION},\n  "triton": {json.dumps(triton.__version__)},\n  "rows": ['
    return f"{{\n{head}\n{lines}\n  ]\n}}\n" if rows else f"{{\n{head}]\n}}\n"


def from_json(text: str) -> list[Row]:
    """The rows of `to_json`. Raises KernelError for anything else."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise KernelError(f"not the JSON of `weftrain kernels compile`: {error}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise KernelError(f"schema_version is {version!r}; this weftrain reads {SCHEMA_VERSION}: write the file again")
    try:
        return [Row(**row) for row in document["rows"]]
    except (KeyError, TypeError) as error:
        raise KernelError(f"a row of the compile gate's JSON is not understood: {error}") from None


def diff(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """What changed, a line a kernel and target: figures (`registers 128 -> 168`), state, new and gone rows."""
    before, after = {row.key: row for row in old}, {row.key: row for row in new}
    lines = []
    for key, row in after.items():
        if key not in before:
            lines.append(f"{' '.join(key)}: new, {_state(row)}")
        elif changes := _changes(before[key], row):
            lines.append(f"{' '.join(key)}: {', '.join(changes)}")
    lines += [f"{' '.join(key)}: gone" for key in before if key not in after]
    return lines


def _changes(old: Row, new: Row) -> list[str]:
    changes = [f"{_state(old)} -> {_state(new)}"] if _state(old) != _state(new) else []
    if old.default != new.default:
        changes.append("now a default" if new.default else "no longer a default")
    for name, words in _FIGURES.items():
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            changes.append(f"{words} {'none' if was is None else was} -> {'none' if now is None else now}")
    return changes


def _state(row: Row) -> str:
    return f"excluded ({row.excluded})" if row.excluded else "ok" if row.ok else f"not ok ({row.reason})"
