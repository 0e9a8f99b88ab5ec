"""The words of errors: one line, the operating system's reason, and nothing that acts on a terminal."""

from __future__ import annotations

import errno
import os

import pytest

from weftrain.core.errors import DataError, file_problem, one_line, os_errors_as, printable


def test_an_error_is_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError("x" * 400)) == "x" * 300
    assert one_line(KeyError()) == "KeyError"
    assert file_problem(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == "No space left on device"
    assert file_problem(OSError("only words")) == "only words"


def test_an_os_error_is_told_with_its_file_and_the_remedy() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")
    whole = r"^/data: cannot be written: No space left on device \(/data/x\): make room$"
    with pytest.raises(DataError, match=whole), os_errors_as(DataError, "/data: cannot be written", "make room"):
        raise full
    whole = r"^/data/x: cannot be read: No space left on device$"
    with pytest.raises(DataError, match=whole), os_errors_as(DataError, "/data/x: cannot be read"):
        raise full


def test_text_from_files_does_not_act_on_a_terminal() -> None:
    assert printable("a\x1b[2Jb\u202ec\n") == "a\\x1b[2Jb\\u202ec\\n"
    assert printable("a\nb", keep="\n") == "a\nb"
