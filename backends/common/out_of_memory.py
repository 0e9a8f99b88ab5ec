"""A failed allocation becomes one message: what was done, the largest parts, and the options to change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from weftrain.backends.common.device_memory import largest_parts
from weftrain.core.errors import OutOfMemoryError, WeftrainError, is_out_of_memory, one_line

# (bytes by part, settings that need less)
Outlook = Callable[[], tuple[Mapping[str, int], Sequence[str]]]


@contextlib.contextmanager
def naming_memory(doing: str, device: torch.device, outlook: Outlook) -> Iterator[None]:
    """Raises OutOfMemoryError for an allocation that fails in the block.

    doing: completes "out of memory in". outlook: asked for the message alone, of what the run was computed to need.
    """
    try:
        yield
    except WeftrainError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parts, settings = outlook()
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's memory"
        raise OutOfMemoryError(
            f"out of memory in {doing}, {where}: {one_line(error, 160)}: largest parts, computed: "
            f"{largest_parts(parts)}; the last checkpoint is whole, and the same command goes on from it: try "
            f"{'; '.join(settings) or 'a smaller model'}"
        ) from error
