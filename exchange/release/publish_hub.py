"""Publishing a release to a repository on the Hugging Face hub: a branch for each checkpoint, as LLM360 did.

`huggingface_hub` sends the files and knows the token. What is there already is known by the hashes in the lists of
files, and the same lists are compared when a branch was sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from weftrain.core.errors import RemoteError, one_line
from weftrain.core.formats.plain_file import open_plain
from weftrain.exchange.audit.hub import HubSeries
from weftrain.exchange.audit.series import VanishedError
from weftrain.exchange.release.publish import Outgoing, Part
from weftrain.exchange.remote.store import without_secrets

MAIN = "main"
RECORD = "record/"
_LEFT_OUT = ("checkpoints/", "data/", "revisions/")  # of the main branch
_ATTRIBUTES = ".gitattributes"  # the hub's own, in every repository
_MAX_GIT_BYTES = 64 << 20  # of a file that git itself keeps


class HubTarget:
    """A repository `hub:owner/name`, which is made if it is not there."""

    def __init__(self, address: str, endpoint: str, *, private: bool) -> None:
        try:
            self._hub: Any = importlib.import_module("huggingface_hub")
        except ImportError:
            raise RemoteError(f"{address}: huggingface_hub is not installed: pip install huggingface_hub") from None
        self._hub.utils.disable_progress_bars()
        token = self._hub.get_token()
        self._series = HubSeries(address, endpoint, token)
        self._name = self._series.where.partition(":")[2]
        self._api = self._hub.HfApi(endpoint=endpoint, token=token if token else False)
        self._private = private
        self._main: set[str] = set()
        self._made = False

    def parts(self, files: Mapping[str, Outgoing]) -> list[Part]:
        revisions: dict[str, dict[str, Outgoing]] = {}
        record = {}
        for name, file in sorted(files.items()):
            if name.startswith("revisions/"):
                _, revision, path = name.split("/", 2)
                revisions.setdefault(revision, {})[path] = file
            elif not name.startswith(_LEFT_OUT):
                record[RECORD + name] = file
        if not revisions:
            raise RemoteError(f"{self._series.where}: the release has no revisions/ to publish: release the run again")
        ordered = sorted(revisions, key=lambda name: (len(name), name))  # ckpt_999 before ckpt_1000
        main = {**revisions[ordered[-1]], **record}
        self._main = set(main)
        return [*(Part(name, revisions[name]) for name in ordered), Part(MAIN, main)]

    def missing(self, part: Part) -> list[str]:
        there = self._there(part.name)
        self._other(part, there)
        return [name for name, file in part.files.items() if not _is_same(there.get(name, ""), file)]

    def send(self, part: Part, names: list[str]) -> None:
        with self._failures(part.name):
            if not self._made:
                self._api.create_repo(self._name, private=self._private or None, exist_ok=True)
                self._made = True
            if part.name != MAIN:
                self._api.create_branch(self._name, branch=part.name, exist_ok=True)
        # A new branch begins as main is, with the record and the weights of a release that ended earlier.
        others = self._other(part, self._there(part.name))
        operations = [
            *(self._hub.CommitOperationAdd(name, str(part.files[name].path)) for name in names),
            *(self._hub.CommitOperationDelete(name) for name in others),
        ]
        with self._failures(part.name):
            self._api.create_commit(
                self._name, operations, commit_message=f"Publish {part.name}", revision=part.name, num_threads=4
            )
        there = self._there(part.name)
        if wrong := [name for name, file in part.files.items() if not _is_same(there.get(name, ""), file)]:
            raise RemoteError(
                f"{self._series.where}: branch {part.name}: {wrong[0]} is not what was sent: publish it again"
            )

    def _there(self, branch: str) -> dict[str, str]:
        """File -> identity on a branch; nothing where there is no branch, or no repository."""
        try:
            return self._series.identities(branch) if branch in self._series.refs() else {}
        except VanishedError:
            return {}

    def _other(self, part: Part, there: Mapping[str, str]) -> list[str]:
        """Files on a branch that this part has not, but the main branch of this release. Raises RemoteError for
        others.
        """
        others = sorted(there.keys() - part.files.keys() - {_ATTRIBUTES})
        if foreign := [name for name in others if part.name == MAIN or name not in self._main]:
            raise RemoteError(
                f"{self._series.where}: branch {part.name} holds {foreign[0][:120]}, which is no file of this release: "
                "name a repository of its own"
            )
        return others

    @contextlib.contextmanager
    def _failures(self, branch: str) -> Iterator[None]:
        try:
            yield
        except RemoteError:
            raise
        except Exception as error:  # the library's own, those of its HTTP client, and of the system
            words = without_secrets(one_line(error, 240))
            raise RemoteError(
                f"{self._series.where}: branch {branch}: {words}: publish again, and it continues where it stopped"
            ) from None


def _is_same(identity: str, file: Outgoing) -> bool:
    """Whether the hub's identity of a file is that of these bytes: SHA-256, or git's hash of a small one."""
    if identity.startswith("sha256:"):
        return identity == f"sha256:{file.sha256}"
    if not identity.startswith("git:") or file.size > _MAX_GIT_BYTES:
        return False
    found = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with open_plain(file.path) as opened:
        found.update(opened.read())
    return identity == f"git:{found.hexdigest()}"
