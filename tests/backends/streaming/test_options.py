"""The backend's options."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from weftrain.backends.streaming.options import StreamingOptions


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="offload_activations needs activations=keep"):
        StreamingOptions(activations="recompute", offload_activations=True)
