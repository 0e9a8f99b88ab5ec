"""Why there is no file system for an address such as `sftp://host/runs`, in words that name the remedy.

fsspec knows some forty kinds of addresses and loads the package of each when it is asked for one.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from weftrain.core.errors import one_line

_PACKAGES = {"s3fs": "'weftrain[s3]'", "smbclient": "smbprotocol"}  # those that are called otherwise than their modules
_WANTS_MORE = ("webdav",)  # whose libraries take the server's address apart from the path


def no_file_system(address: str, error: Exception) -> str:
    """What to tell about `error`, which fsspec raised for an address: begins with its scheme, ends with a remedy."""
    import fsspec

    scheme = urlsplit(address).scheme
    if scheme not in fsspec.available_protocols():
        return f"no such file system: nothing that is installed knows {scheme}://: check the address"
    if scheme in _WANTS_MORE or isinstance(error, TypeError):
        return (
            f"{scheme}:// cannot be used: its library wants more than an address can say, such as the server's address "
            "apart from the path: use another kind of store, such as s3://"
        )
    if isinstance(error, ImportError):
        missing = _missing(error)
        package = _PACKAGES.get(missing, missing)
        return f"{scheme}:// needs a package that is not installed: {one_line(error)}: pip install {package}"
    if isinstance(error, OSError) or "Authentication" in type(error).__name__:
        return (
            f"{scheme}:// cannot be opened: {type(error).__name__}: {one_line(error)}: check the address, the network "
            "and the credentials"
        )
    return f"{scheme}:// cannot be opened: {type(error).__name__}: {one_line(error)}: check what its library asks for"


def _missing(error: BaseException) -> str:
    """The package whose import failed; fsspec raises an error of its own from that one."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ImportError) and found.name:
            return found.name.partition(".")[0]
        found = found.__cause__ or found.__context__
    return "what it names"
