"""Weights & Biases, by its own package `wandb`: project and entity, mode and credentials are its own settings.

What the package knows beyond this run stays here: no code, git state, console output, command line or host data is
sent. Its files are in the run's folder tracking/wandb, from where `wandb sync` uploads what was written offline.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weftrain.analysis.tracking.tracker import Ending, Record, TrackedRun, TrackerError
from weftrain.core.formats import fsops
from weftrain.core.formats.plain_file import real_path

PROJECT = "weftrain"  # where WANDB_PROJECT does not name another
_FINISH_S = 25.0  # less than the end of a run waits for a tracker
_INIT_S = 30.0  # for the server's answer; then it is tried again
_API = "https://api.wandb.ai"


class WeightsAndBiases:
    """One run of W&B, whose charts have the completed steps as their axis `step`. It cannot forget what it has."""

    def problem(self) -> str:
        if importlib.util.find_spec("wandb") is None:
            return "the package wandb is not installed: pip install wandb"
        if _is_offline() or os.environ.get("WANDB_MODE") == "disabled" or _has_credentials():
            return ""
        return "no credentials: run `wandb login` or set WANDB_API_KEY, or WANDB_MODE=offline to upload later"

    def open(self, run: TrackedRun, known: str | None, after: int) -> str:
        # Reports of its crashes would have paths of this machine.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if problem := self.problem():  # it would ask on the terminal
            raise TrackerError(problem)
        folder = real_path(run.folder) / "tracking"
        fsops.make_dirs(folder)
        settings = wandb.Settings(
            silent=True,
            host="not sent",
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=_INIT_S,
            finish_timeout=_FINISH_S,
            finish_timeout_raises=True,
        )
        before = _run_folders(folder)
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                dir=str(folder),
                id=known or secrets.token_hex(8),
                name=run.name,
                group=real_path(run.folder).name if run.number > 1 else None,
                notes=f"goes on from {run.continues}, which the run went back behind" if run.continues else None,
                resume=None if _is_offline() else "allow",
                reinit="create_new",
                settings=settings,
            )
        except wandb.errors.Error as error:
            for left in _run_folders(folder) - before:  # or each attempt would leave one
                fsops.remove_tree(left)
            raise TrackerError(f"{error}: check the network, WANDB_BASE_URL and the credentials") from error
        self._run.config.update(dict(run.hyperparameters), allow_val_change=True)
        self._run.define_metric("step", hidden=True)
        for name in ("train/*", "heldout/*", "score/*", "samples/*", "event/*"):
            self._run.define_metric(name, step_metric="step")
        return str(self._run.id)

    def send(self, records: Sequence[Record]) -> None:
        for one in records:
            texts = {**one.texts, f"event/{one.kind}": one.event} if one.event else one.texts
            self._run.log({"step": one.step, "time": one.time, **one.numbers, **texts})

    def rewind(self, step: int) -> bool:
        return False

    def close(self, ending: Ending) -> None:
        if ending == "abandoned":
            self._run.tags = (*(self._run.tags or ()), "abandoned")
        try:
            self._run.finish(exit_code=255 if ending == "interrupted" else 0)
        except TimeoutError as error:
            raise TrackerError(
                f"not everything was uploaded before the end: `wandb sync {Path(self._run.dir).parent}` does the rest"
            ) from error


def _run_folders(folder: Path) -> set[Path]:
    return set(folder.glob("wandb/run-*"))


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE") in ("offline", "dryrun")


def _has_credentials() -> bool:
    """Whether there are any; what they are is not looked at."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _API)).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    with contextlib.suppress(OSError, netrc.NetrcParseError, ValueError):
        return host in netrc.netrc(str(path)).hosts
    return False
