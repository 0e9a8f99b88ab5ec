"""What is said of an address that no file system opens: its scheme, and what to do."""

from __future__ import annotations

import importlib.util

import fsspec
import pytest

from weftrain.core.formats.file_systems import no_file_system


def told(address: str, **options: object) -> str:
    with pytest.raises(Exception) as raised:  # each library behind fsspec has its own
        fsspec.core.url_to_fs(address, **options)
    return no_file_system(address, raised.value)


@pytest.mark.parametrize(
    ("address", "module", "package"),
    [("abfs://box/x", "adlfs", "adlfs"), ("sftp://host/x", "paramiko", "paramiko"), ("gs://box/x", "gcsfs", "gcsfs")],
)
def test_a_package_that_is_not_installed_is_named(address: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed here")
    words = told(address)
    assert words.startswith(f"{address.partition(':')[0]}:// needs a package that is not installed: ")
    assert words.endswith(f": pip install {package}")


def test_an_extra_is_named_where_it_brings_the_package() -> None:
    error = ImportError("Install s3fs to access S3")
    error.__cause__ = ImportError("no s3fs", name="s3fs.core")
    assert no_file_system("s3://box/x", error).endswith("pip install 'weftrain[s3]'")


def test_what_no_package_would_mend_asks_for_none() -> None:
    assert told("nosuch://x") == ("no such file system: nothing that is installed knows nosuch://: check the address")
    assert no_file_system("webdav://host/x", ImportError("Install webdav4 to access WebDAV")).startswith(
        "webdav:// cannot be used: its library wants more than an address can say"
    )
    missing = TypeError("__init__() missing 1 required positional argument: 'host'")
    assert "smb:// cannot be used" in no_file_system("smb:///x", missing)


def test_a_server_that_does_not_answer_is_no_missing_package() -> None:
    words = no_file_system("sftp://host/x", ConnectionRefusedError(111, "Connection refused"))
    assert "pip" not in words
    assert words.startswith("sftp:// cannot be opened: ConnectionRefusedError: ")
    assert words.endswith(": check the address, the network and the credentials")
