"""`weftrain gpu`: the first minutes on a GPU, proofs and figures in one page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("gpu")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("gpu-report"),
    show_default=True,
    help="New folder for results.jsonl and report.html.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=10),
    default=470.0,
    show_default=True,
    help="Seconds in all; what no longer fits is named.",
)
@click.option("--only", multiple=True, metavar="CHECK", help="This check alone (repeatable); --list names them.")
@click.option("--list", "list_them", is_flag=True, help="List the checks, and run none.")
@click.option("--child", hidden=True, help="One check in this process, as each is started.")
@click.option("--dry", is_flag=True, help="The same program on the CPU at tiny sizes: a try, not a measurement.")
def gpu(out: Path, budget: float, only: tuple[str, ...], list_them: bool, child: str | None, dry: bool) -> None:
    """Prove and measure weftrain on this machine's GPU within eight minutes.

    Kernels against float64, backends against each other and against the CPU, the same bits twice, a release replayed;
    then the speed of kernels and of whole steps. Exit code 3: an answer was bad.
    """
    import torch

    from weftrain.analysis.first_contact.checks import CHECKS
    from weftrain.analysis.first_contact.conditions import Conditions
    from weftrain.analysis.first_contact.findings import Findings
    from weftrain.analysis.first_contact.launch import first_contact
    from weftrain.analysis.first_contact.page import PAGE, counts
    from weftrain.backends.common.registry import get_backend
    from weftrain.core.errors import BackendError
    from weftrain.kernels.cuda_devices import absence

    if list_them:
        for check in CHECKS.values():
            click.echo(f"{check.name:<18} at most {check.limit_s:>4.0f} s  {check.summary}")
        return
    if child is not None:
        CHECKS[child].run(Conditions(out, get_backend, dry), Findings(out, child, click.echo))
        return
    # Where there is a device it is asked in a process of its own, since a context here would hold memory meanwhile.
    if not dry and not torch.cuda.is_available() and (absent := absence()) is not None:
        raise BackendError(f"{absent.reason}; --dry tries this program on the CPU")
    found = first_contact(out, budget, only, dry, click.echo)
    good, bad, unasked = counts(found)
    click.echo(f"{good} good, {bad} bad, {unasked} not asked; the page is {out / PAGE}")
    if bad:
        raise SystemExit(3)
