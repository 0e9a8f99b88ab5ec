"""State formats: bytes a parameter, and the plane that forward and backward read."""

from __future__ import annotations

from weftrain.backends.streaming.store.state_format import FORMATS


def test_bytes_a_parameter() -> None:
    assert {name: form.bytes_per_parameter("bfloat16") for name, form in FORMATS.items()} == {
        "fp32": 14, "split": 12, "bf16_moments": 8, "int8_moments": 6.03125,
    }  # fmt: skip
    assert FORMATS["fp32"].bytes_per_parameter("float32") == 12


def test_the_first_plane_is_in_the_compute_dtype() -> None:
    for form in FORMATS.values():
        assert {compute: form.planes(compute)[0].dtype for compute in ("float32", "bfloat16")} == {
            "float32": "float32",
            "bfloat16": "bfloat16",
        }
