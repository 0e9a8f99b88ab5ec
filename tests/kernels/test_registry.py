"""select, pins, preferences, the manifest and third parties: what is chosen, what is refused, and in which words."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from weftrain.kernels import (
    OPS,
    Implementation,
    KernelError,
    Op,
    Spec,
    available_everywhere,
    load_catalog,
    registry,
    select,
    table,
)
from weftrain.kernels.checks import run_checks
from weftrain.kernels.ops import BUILT_IN


def uses(*modules: str, op: str = "attention", device: str = "cpu") -> list[Spec]:
    return [Spec(op, module, device, torch.float32, {"head_dim": 16}) for module in modules]


LAYERS = tuple(f"layers.{i}.attention" for i in range(4))


def third_party(spec: Spec | None = None, **_: Any) -> str:
    return "third party"


def _needs_head_dim_64(spec: Spec) -> str | None:
    return None if spec.attributes["head_dim"] == 64 else "needs head_dim 64"


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """offer(name=object or exception, ...): what the installed packages' entry points load to."""

    def install(**offered: Any) -> None:
        class Fake:
            value = "their_package:kernels"

            def __init__(self, name: str) -> None:
                self.name = name

            def load(self) -> Any:
                given = offered[self.name]
                given = given.ops if isinstance(given, Offered) else given
                if isinstance(given, BaseException):
                    raise given
                return given

        def entry_points(*, group: str) -> list[Fake]:
            names = {"weftrain.ops": [], "weftrain.kernels": []}
            for name, given in offered.items():
                names["weftrain.ops" if isinstance(given, Offered) else "weftrain.kernels"].append(name)
            return [Fake(name) for name in names.get(group, [])]

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    yield install
    monkeypatch.undo()
    OPS.look_again()


def test_every_op_has_a_reference_and_every_row_of_the_table_a_state() -> None:
    rows = table("cpu", torch.bfloat16)
    assert {row.op for row in rows} == set(load_catalog())
    assert all(row.reason is None for row in rows if row.source == "reference")
    assert {row.source for row in rows} >= {"reference", "torch"}


def test_a_variant_is_for_its_device_and_atomics_have_a_name() -> None:
    cpu = select(uses("layers.0.attention")).function("attention", "layers.0.attention")
    assert cpu.__name__ == "attention_blocked"
    entry = select(uses("layers.0.attention", device="cuda")).manifest["ops"]["attention"][0]
    assert "is the source named sdpa" in entry["passed_over"]["torch"]
    assert entry["source"] != "sdpa"
    named = select(uses("layers.0.attention", device="cuda"), pins={"attention": "sdpa"}).function(
        "attention", "layers.0.attention"
    )
    assert named.__name__ == "attention_fused"
    with pytest.raises(
        KernelError, match=r"'attention' = 'sdpa' cannot be used .* on cpu: on a CPU its kernel hides an Inf in k"
    ):
        select(uses("layers.0.attention"), pins={"attention": "sdpa"})


def test_preferences_in_order_and_the_manifest_says_why() -> None:
    selection = select(uses(*LAYERS), ["reference", "torch"])
    assert selection.function("attention", LAYERS[2]).__module__ == "weftrain.kernels.reference"
    (entry,) = selection.manifest["ops"]["attention"]
    assert entry["modules"] == list(LAYERS)
    assert entry["source"] == "reference"
    assert entry["passed_over"]["torch"] == "'reference' is preferred"
    assert set(entry["passed_over"]) == set(load_catalog()["attention"]) - {"reference"}
    passed_over = select(uses(*LAYERS), ["torch"]).manifest["ops"]["attention"][0]["passed_over"]
    assert passed_over["reference"] == passed_over["sdpa"] == "not among kernels.preferences"


def test_a_preference_falls_through_with_its_reason(offer: Callable[..., None]) -> None:
    offer(
        fast=[
            Implementation(
                "attention",
                "fast",
                third_party,
                lambda spec: "needs head_dim 64" if spec.attributes["head_dim"] != 64 else None,
            )
        ]
    )
    specs = [
        *uses("layers.0.attention"),
        Spec("attention", "layers.1.attention", "cpu", torch.float32, {"head_dim": 64}),
    ]
    selection = select(specs, ["fast", "torch"])
    assert selection.function("attention", "layers.1.attention") is third_party
    assert selection.function("attention", "layers.0.attention").__name__ == "attention_blocked"
    fell, taken = selection.manifest["ops"]["attention"]
    assert fell["passed_over"]["fast"] == "needs head_dim 64"
    assert taken["source"] == "fast"


def test_no_preference_available_names_every_reason(offer: Callable[..., None]) -> None:
    offer(fast=Implementation("attention", "fast", third_party, lambda spec: "needs a tape drive"))
    with pytest.raises(
        KernelError,
        match=r"no preferred kernel for attention in 'a' on cpu \(fast: needs a tape .*; add one of .*torch",
    ):
        select(uses("a"), ["fast"])


def test_a_pin_overrides_and_a_glob_overrides_a_plain_pin() -> None:
    selection = select(uses(*LAYERS), ["torch"], {"attention": "reference", "attention@layers.[0-1].*": "torch"})
    sources = [selection.function("attention", module).__module__.split(".")[2] for module in LAYERS]
    assert sources == ["torch_ops", "torch_ops", "reference", "reference"]
    assert {entry["pin"] for entry in selection.manifest["ops"]["attention"]} == {
        "attention",
        "attention@layers.[0-1].*",
    }


def test_a_pin_never_falls_through(offer: Callable[..., None]) -> None:
    offer(fast=Implementation("attention", "fast", third_party, lambda spec: "needs a tape drive"))
    with pytest.raises(
        KernelError, match="'attention' = 'fast' cannot be used for 'a' on cpu: needs a tape drive; available there: "
    ):
        select(uses("a"), ["torch"], {"attention": "fast"})


@pytest.mark.parametrize(
    ("preferences", "pins", "message"),
    [
        (["torhc"], {}, "unknown source 'torhc'; did you mean 'torch'"),
        (["torch"], {"atention": "torch"}, "unknown op 'atention'; did you mean 'attention'"),
        (["torch"], {"attention": "referense"}, "unknown source 'referense'; did you mean 'reference'"),
        (
            ["torch"],
            {"attention@layers.9.attention": "torch"},
            "matches no module that uses attention; did you mean 'layers",
        ),
        (["torch"], {"swiglu": "torch"}, "this model does not use swiglu; it uses attention"),
        (
            ["torch"],
            {"attention@layers.*": "torch", "attention@*.0.*": "reference"},
            r"'attention@layers.\*' and 'attention@\*.0.\*' both match 'layers.0.attention' with different sources",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    preferences: list[str], pins: dict[str, str], message: str
) -> None:
    with pytest.raises(KernelError, match=message) as caught:
        select(uses(*LAYERS), preferences, pins)
    assert "\n" not in str(caught.value)


def test_an_unknown_op_and_a_use_that_was_not_selected() -> None:
    with pytest.raises(KernelError, match="module 'm' uses the unknown op 'ropee'; did you mean 'rope'"):
        select(uses("m", op="ropee"))
    with pytest.raises(
        KernelError, match=r"no kernel was selected for attention in module 'layers.9.attention'; did you mean 'layers"
    ):
        select(uses(*LAYERS)).function("attention", "layers.9.attention")


def test_globs_that_agree_are_no_conflict() -> None:
    selection = select(uses(*LAYERS), ["torch"], {"attention@layers.*": "reference", "attention@*.0.*": "reference"})
    assert selection.function("attention", LAYERS[0]).__module__ == "weftrain.kernels.reference"


def test_third_parties_are_found_and_held_to_the_rules(offer: Callable[..., None]) -> None:
    offer(
        one=Implementation("swiglu", "theirs", third_party, version="theirs 2.1"),
        more=[Implementation("rope", "theirs", third_party)],
    )
    selection = select(uses("ffn", op="swiglu"), ["theirs", "torch"])
    assert selection.function("swiglu", "ffn") is third_party
    assert selection.manifest["ops"]["swiglu"][0]["version"] == "theirs 2.1"


def test_a_broken_plugin_is_named_and_passed_over(offer: Callable[..., None]) -> None:
    good = Implementation("swiglu", "good", third_party)
    for broken, message in (
        (Implementation("swiglu", "torch", third_party), "under the source name 'torch', which is taken"),
        (
            [Implementation("rope", "theirs", third_party), Implementation("rope", "torch", third_party)],
            "which is taken",
        ),
        (Implementation("swigloo", "theirs", third_party), "unknown op 'swigloo'; did you mean 'swiglu'"),
        (third_party, "gives a function; it must give an Implementation"),
        (
            ImportError("no module named tape"),
            "cannot be loaded: ImportError: no module named tape; repair or uninstall",
        ),
        # a package may raise anything
        (RuntimeError("driver too old"), "cannot be loaded: RuntimeError: driver too old"),
    ):
        offer(one=broken, two=good)
        catalog = load_catalog()
        assert catalog["swiglu"]["good"][0].function is third_party
        assert "theirs" not in catalog["rope"]  # all of a plugin or nothing
        ((origin, reason),) = catalog.broken_plugins.items()
        assert origin == "entry point 'one' (their_package:kernels)"
        assert message in reason
        manifest = select(uses("ffn", op="swiglu"), ["good"]).manifest
        assert manifest["broken_plugins"] == catalog.broken_plugins
        with pytest.raises(KernelError, match=r"unknown source 'theirs'.* entry point 'one' .* was passed over"):
            select(uses("ffn", op="swiglu"), ["theirs", "torch"])


def their_op(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class Offered:
    """What an entry point of the group weftrain.ops gives, and what is said of it."""

    ops: Any
    message: str


def made(function: Any = their_op, **how: Any) -> Op:
    cost = {"bytes_moved": lambda a: 8, "flops": lambda a: 1, "backward_cost": lambda a: (12, 1)}
    return Op(
        function, function,
        **{"differentiable": ("x",), "examples": {"odd": lambda device, dtype: {"x": torch.ones(3)}}, **cost, **how},
    )  # fmt: skip


def test_an_op_of_another_package_is_one_like_all(offer: Callable[..., None]) -> None:
    """With an implementation of a third package."""
    offer(
        op=Offered([made()], ""),
        one=Implementation("their_op", "theirs", third_party),
    )
    catalog = load_catalog()
    assert catalog.broken_plugins == {}
    assert [*catalog["their_op"]] == ["reference", "theirs"]
    assert OPS["their_op"].function is their_op
    assert {(row.op, row.source, row.reason) for row in table("cpu", torch.float32) if row.op == "their_op"} == {
        ("their_op", "reference", None),
        ("their_op", "theirs", None),
    }
    assert select(uses("m", op="their_op"), ["theirs"]).function("their_op", "m") is third_party


def test_an_op_that_is_wrong_is_named_and_passed_over(offer: Callable[..., None]) -> None:
    for one in (
        Offered([made(OPS["swiglu"].function)], "gives the op 'swiglu', which weftrain itself has already"),
        Offered([made(), made()], "gives two ops of one name"),
        Offered(made(differentiable=("y",)), "op 'their_op': its function takes x, and not 'y'"),
        Offered(made(examples={"amber_7b": None}), "op 'their_op' has no example named 'odd'"),
        Offered(made(lambda x: x), "gives an op whose function has no name of its own"),
        Offered(their_op, "gives a function; it must give an Op or a list of them"),
        Offered(RuntimeError("no GPU"), "cannot be loaded: RuntimeError: no GPU"),
        Offered(BaseException("a panic of its extension"), "cannot be loaded: BaseException: a panic of its extension"),
    ):
        offer(wrong=one, two=Implementation("swiglu", "good", third_party))
        catalog = load_catalog()
        assert set(OPS) == set(BUILT_IN) == set(catalog)
        assert "good" in catalog["swiglu"]
        assert catalog.broken_plugins["entry point 'wrong' (their_package:kernels)"].startswith(one.message)
    # of two packages with one op the second is passed over, with the first's name
    offer(one=Offered(made(), ""), two=Offered(made(), ""))
    assert "which entry point 'one' (their_package:kernels) has" in "".join(load_catalog().broken_plugins.values())
    assert "their_op" in OPS


def test_an_op_whose_examples_fail_has_findings_and_the_others_too(offer: Callable[..., None]) -> None:
    def fails(device: str, dtype: torch.dtype) -> dict[str, Any]:
        raise OSError("no such table")

    offer(op=Offered(made(examples={"odd": fails}), ""))
    (finding,) = run_checks(["their_op"], dtypes=[torch.float32], checks=["numerics"])
    assert (finding.op, finding.source, finding.check, finding.ok) == ("their_op", "reference", "examples", False)
    assert finding.detail == "its examples cannot be made: raised OSError: no such table"


def test_an_implementation_that_would_fail_later_is_passed_over_now(offer: Callable[..., None], tmp_path: Path) -> None:
    for wrong, message in (
        (Implementation("swiglu", "theirs", "their_package:swiglu"), "the function of swiglu is a str"),  # type: ignore[arg-type]
        (Implementation("swiglu", "theirs", third_party, version=None), "its version is None"),  # type: ignore[arg-type]
        (Implementation("swiglu", "theirs", third_party, files=[tmp_path / "a.cu"]), "a.cu, which is not there"),
        (made(), "an Op belongs to the entry points of group weftrain.ops"),
    ):
        offer(one=wrong)
        catalog = load_catalog()
        assert "theirs" not in catalog["swiglu"]
        assert message in catalog.broken_plugins["entry point 'one' (their_package:kernels)"]


def test_a_plugin_that_cannot_say_whether_it_is_available_is_not(offer: Callable[..., None]) -> None:
    def fails(spec: Spec) -> str | None:
        raise OSError("no such device")

    offer(one=Implementation("swiglu", "theirs", third_party, fails))
    (entry,) = select(uses("ffn", op="swiglu"), ["theirs", "torch"]).manifest["ops"]["swiglu"]
    assert entry["source"] == "torch"
    assert entry["passed_over"]["theirs"] == "its own `unavailable` failed: OSError: no such device"
    with pytest.raises(KernelError, match="no such device"):
        select(uses("ffn", op="swiglu"), ["torch"], {"swiglu": "theirs"})


def test_the_manifest_is_json() -> None:
    manifest = select(uses(*LAYERS), pins={"attention@*.0.*": "reference"}).manifest
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["ops"]["attention"][0]["function"].startswith("weftrain.kernels.")


def test_without_a_compiler_the_optimizer_ops_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    entry = select(uses("optimizer", op="adamw"), ["torch", "reference"]).manifest["ops"]["adamw"][0]
    assert entry["source"] == "reference"
    assert (
        entry["passed_over"]["torch"] == "torch.compile needs the C++ compiler 'no-such-compiler', which is not on PATH"
    )


def test_the_recipe_default_is_the_registrys() -> None:
    """core.config repeats the order, because reading a recipe must not import torch."""
    from weftrain.core.config import KernelsConfig

    assert KernelsConfig().preferences == registry.DEFAULT_PREFERENCES


def _order(device: str, op: str, compiled: bool) -> list[str]:
    """The sources that were asked for one use, in order, of a catalog in which only `reference` is available."""
    asked: list[str] = []

    def refuses(source: str) -> Callable[[Spec], str | None]:
        def unavailable(spec: Spec) -> str | None:
            asked.append(source)
            return "not here"

        return unavailable

    catalog = registry.Catalog()
    for source in registry.DEFAULT_PREFERENCES:
        unavailable = available_everywhere if source == "reference" else refuses(source)
        catalog.setdefault(op, {})[source] = [Implementation(op, source, OPS[op].function, unavailable)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load_catalog", lambda: catalog)
        select([Spec(op, "a", device, torch.bfloat16)], compiled=compiled)
    return [*asked, "reference"]


@pytest.mark.parametrize("op", sorted(OPS))
def test_the_default_order_follows_device_and_compilation(op: str) -> None:
    cpu, gpu = list(registry.DEFAULT_PREFERENCES), list(registry.GPU_PREFERENCES)
    assert sorted(cpu) == sorted(gpu)
    assert gpu.index("triton") < gpu.index("torch")
    found = [_order(device, op, compiled) for device in ("cpu", "cuda") for compiled in (False, True)]
    if op in ("grouped_gemm", "newton_schulz"):  # torch has a kernel for each product
        assert found == [cpu if op == "grouped_gemm" else ["flash_attn", "torch", "reference"]] * 4
        return
    alone = ("attention", "linear_cross_entropy", "adamw", "grad_norm")
    assert found == [cpu, cpu, gpu, gpu if op in alone else cpu]


def test_a_list_of_preferences_is_taken_as_it_stands_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = registry.Catalog()
    catalog["rope"] = {
        source: [Implementation("rope", source, OPS["rope"].function)] for source in registry.DEFAULT_PREFERENCES
    }
    monkeypatch.setattr(registry, "load_catalog", lambda: catalog)
    use = [Spec("rope", "a", "cuda", torch.bfloat16)]
    assert select(use, ["torch", "triton"]).manifest["ops"]["rope"][0]["source"] == "torch"
    assert select(use, ["triton", "torch"], compiled=True).manifest["ops"]["rope"][0]["source"] == "triton"
