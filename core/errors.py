"""Errors a person can act on: what was wrong, where (file, key, tensor, sample), what to do. One line each.

The command line prints the message alone and exits with `exit_code`; a traceback means a defect of ours.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class WeftrainError(Exception):
    """Base of every expected failure. The message is one line and names file, field and remedy."""

    exit_code = 2


class RecipeError(WeftrainError):
    """A recipe, an override or a combination of keys that cannot be used."""


class DataError(WeftrainError):
    """A dataset, shard, manifest, tokenizer or input file that is missing, damaged or does not match."""


class CheckpointError(WeftrainError):
    """A checkpoint that is missing, torn, altered or does not fit the model."""


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be read (permissions, a failing disk), so that it is unknown whether it is whole."""


class RunFolderError(WeftrainError):
    """A run folder that is in use, read-only, full, or belongs to another recipe."""


class RunInUseError(RunFolderError):
    """Another process holds the run's lock."""


class RemoteError(WeftrainError):
    """An address in an object store that is not there, refuses, cannot be reached, or holds something else."""


class BackendError(WeftrainError):
    """A backend that is not there, or cannot do what the recipe asks of it."""


class EverywhereError(BackendError):
    """What every process of a run found at once, or was told: the one that leads says it, and the others are silent."""


class NonFiniteError(WeftrainError):
    """A loss or gradient norm that is not finite: the step did not happen. Names the step and its samples."""

    exit_code = 3


class OutOfMemoryError(WeftrainError):
    """An allocation that failed, on a device or on the host. Names the largest parts, and what to change."""

    exit_code = 5


class AlertError(WeftrainError):
    """A rule of the recipe's `alerts` halted the run, which is saved. Names the rule, the step and what it found."""

    exit_code = 6


class ReleaseError(WeftrainError):
    """A release that is incomplete, altered, or not one; names the file."""


# Where an error has no type of its own: of torch's allocators of plain and of page-locked host memory, of CUDA, cuBLAS
# and cuDNN.
_OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|cannot allocate memory|_STATUS_ALLOC_FAILED|bad_alloc|"
    "cudaErrorMemoryAllocation|hipErrorOutOfMemory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of Python, numpy or torch, on a device or in plain or page-locked host memory."""
    if isinstance(error, WeftrainError):
        return isinstance(error, OutOfMemoryError)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def one_line(error: BaseException, most: int = 300) -> str:
    """The first `most` characters of an error's message, without line breaks; its type if it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def file_problem(error: OSError | ValueError) -> str:
    """Why a file could not be read or written, in one line: the operating system's words where there are any."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


@contextlib.contextmanager
def os_errors_as(kind: type[WeftrainError], problem: str, remedy: str = "") -> Iterator[None]:
    """Raise an OSError of the block as `kind`: "problem: what the system says (which file): remedy"."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) not in problem else ""
        raise kind(f"{problem}: {file_problem(error)}{where}{remedy and ': ' + remedy}") from error


# control characters, line and paragraph separators, direction marks, invisible characters, lone surrogates
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str, keep: str = "") -> str:
    """Text from a file, made safe to display: each character that controls a terminal becomes its escape, as `\\x1b`.

    A reason in a ledger or the name of a file or tensor can hold escape sequences that erase lines or reverse the
    direction of writing. Whatever a command prints passes through here. keep: characters that may stay, as "\\n\\t".
    """
    return _CONTROLS.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text
    )
