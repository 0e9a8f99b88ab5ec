"""Tasks on a Ray cluster.

Only task numbers travel. All nodes must see the work folder under the same path and have weftrain installed. A task
that was lost with its node is retried, which is safe because tasks are idempotent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from weftrain.core.errors import DataError, one_line

_RETRIES = 3  # of a task whose node was lost; an error of the task itself is not tried again
_IN_FLIGHT = 4  # tasks a CPU of the cluster


def run_on_ray(
    function: Callable[[int], object],
    indices: Sequence[int],
    *,
    address: str | None,
    workers: int | None,
    on_done: Callable[[int], None],
) -> None:
    """Call function(index) for each index on the cluster at `address`, or on a local one of `workers` CPUs. Raises
    DataError where Ray is missing or unreachable, and the error of the first task that fails.
    """
    try:
        import ray
    except ImportError:
        raise DataError("--executor ray needs Ray: pip install 'weftrain[ray]'") from None
    if not indices:
        return
    started = not ray.is_initialized()
    if started:
        options = {"num_cpus": workers, "include_dashboard": False} if address is None else {"address": address}
        try:
            ray.init(**options, log_to_driver=False, configure_logging=False)
        except Exception as error:  # a ConnectionError, a ValueError, an error of its own: by version
            where = "could not be started here" if address is None else f"at {address} cannot be reached"
            raise DataError(f"the Ray cluster {where}: {one_line(error)}") from error
    try:
        for index in _results(function, indices):
            on_done(index)
    finally:
        if started:
            ray.shutdown()


def _results(function: Callable[[int], object], indices: Sequence[int]) -> Iterator[int]:
    """Indices as their tasks end; a bounded number of tasks is submitted at once."""
    import ray

    @ray.remote(max_retries=_RETRIES)
    def task(index: int) -> None:
        function(index)

    most = _IN_FLIGHT * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(indices))
    running: dict[object, int] = {}
    while waiting or running:
        while waiting and len(running) < most:
            index = waiting.pop()
            running[task.remote(index)] = index
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, DataError | OSError) else error from None
            except ray.exceptions.RayError as error:
                raise DataError(
                    f"task {running[reference]} was lost {_RETRIES + 1} times: {one_line(error)}"
                ) from error
            yield running.pop(reference)
