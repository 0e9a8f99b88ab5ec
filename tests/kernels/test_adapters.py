"""The adapters against recorded signatures: what they pass, that it binds, and that with what they pass the result is
the reference's.

Where a package is absent, a stand-in with exactly its recorded signature takes its place and computes, in plain torch,
what its source computes: which dtype the product has, which placement epsilon. Where it is present, the record is
compared with the real thing.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels import DEFAULT_PREFERENCES, OPS, KernelError, Spec, load_catalog, reference, select
from weftrain.kernels.apex_ops import adamw as apex_adamw
from weftrain.kernels.apex_ops import layer_norm as apex_layer_norm
from weftrain.kernels.apex_ops import rms_norm as apex_rms_norm
from weftrain.kernels.flash_attn_ops import attention as flash
from weftrain.kernels.liger_ops import layer_norm as liger_layer_norm
from weftrain.kernels.liger_ops import linear_cross_entropy as liger_lce
from weftrain.kernels.liger_ops import rms_norm as liger_rms_norm
from weftrain.kernels.packages import installed
from weftrain.kernels.quack_ops import rms_norm as quack_rms_norm
from weftrain.kernels.torch_ops import attention as torch_attention

RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "recorded_signatures.json").read_text())
PACKAGES = {package: record for package, record in RECORD.items() if package != "what"}
CALLABLES = {path: parameters for record in PACKAGES.values() for path, parameters in record["callables"].items()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def signature(path: str) -> inspect.Signature:
    """The recorded one."""
    found = []
    for name, *default in CALLABLES[path]:
        if name.startswith("*"):
            found.append(inspect.Parameter(name[1:], inspect.Parameter.VAR_POSITIONAL))
            continue
        value = ast.literal_eval(default[0]) if default else inspect.Parameter.empty
        found.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value))
    return inspect.Signature(found)


class StandIns:
    """Modules that are not installed, made of recorded signatures; `calls[path]` is what each function was given, by
    name.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        self.calls: dict[str, dict[str, Any]] = {}

    def module(self, name: str) -> ModuleType:
        """`name` and its parents, importable, with folders that exist."""
        for end in [i for i, letter in enumerate(name + ".") if letter == "."]:
            part = name[:end]
            if part in sys.modules:
                continue
            place = self.folder / part.replace(".", "/")
            place.mkdir(parents=True)
            (place / "__init__.py").touch()
            made = ModuleType(part)
            made.__spec__ = importlib.machinery.ModuleSpec(part, None, is_package=True)
            made.__spec__.submodule_search_locations = [str(place)]
            made.__path__ = [str(place)]
            self.monkeypatch.setitem(sys.modules, part, made)
            parent, _, leaf = part.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, made)
        return sys.modules[name]

    def add(self, path: str, computes: Callable[..., Any]) -> None:
        """The function at the recorded path; `computes` gets the bound arguments by name."""
        recorded = signature(path)

        def function(*args: Any, **kwargs: Any) -> Any:
            bound = recorded.bind(*args, **kwargs)  # a TypeError where the adapter calls what does not exist
            bound.apply_defaults()
            self.calls[path] = dict(bound.arguments)
            return computes(**bound.arguments)

        owner, _, name = path.rpartition(".")
        if name == "forward":  # of an autograd.Function, which is called by apply(...) and without ctx
            module, _, class_name = owner.rpartition(".")
            made = type(class_name, (), {"apply": staticmethod(lambda *args: function(None, *args))})
            setattr(self.module(module), class_name, made)
        else:
            setattr(self.module(owner), name, function)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIns:
    return StandIns(monkeypatch, tmp_path)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """gpu(9, 0): torch then believes that it sees one."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))
        if importlib.util.find_spec("triton") is not None:  # its ops ask the device more
            launch = importlib.import_module("weftrain.kernels.triton_ops._launch")
            monkeypatch.setattr(launch, "target", lambda device: f"sm_{major}{minor}")

    return pretend


def attention_spec(dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **attributes: Any) -> Spec:
    return Spec(
        "attention",
        "layers.0.attention",
        device,
        dtype,
        {"head_dim": 64, "scale": 0.125, "document_start": False} | attributes,
    )


def computes_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: tuple[int, int], **_: Any
) -> Tensor:
    """As flash-attn counts: a query at t sees the keys t - left to t + right, -1 for all of a side."""
    assert causal
    left, right = window_size
    assert right in (-1, None, 0)
    return reference.attention(q, k, v, scale=softmax_scale, window=None if left in (-1, None) else left + 1)


def gives_a_pair(**given: Any) -> tuple[Tensor, None]:
    return computes_attention(**given), None


# What each version of flash-attn is found by, and what else it cannot run without.
FLASH = {2: "flash_attn.flash_attn_interface", 3: "flash_attn_interface", 4: "flash_attn.cute"}
BESIDE = {2: "flash_attn_2_cuda", 4: "cutlass"}


def install_flash(stand_ins: StandIns, *versions: int) -> None:
    for version in versions:
        stand_ins.add(f"{FLASH[version]}.flash_attn_func", gives_a_pair if version == 4 else computes_attention)
        if version in BESIDE:
            stand_ins.module(BESIDE[version])


def resolve(path: str) -> Any:
    """The object at a dotted path: modules as far as they go, attributes from there."""
    names = path.split(".")
    end = len(names)
    while importlib.util.find_spec(names[0]) is not None:
        try:
            found: Any = importlib.import_module(".".join(names[:end]))
            break
        except ModuleNotFoundError:
            end -= 1
    for name in names[end:]:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_record_is_what_is_installed(package: str) -> None:
    record = PACKAGES[package]
    if not installed(package):
        pytest.skip(f"{package} is not installed; its signatures were transcribed from {record['version']}")
    if package == "amp_C":
        pytest.skip("a C++ module: Python cannot see its parameters")
    found = apex_rms_norm.unavailable(Spec("rms_norm", "m", "cuda", torch.float32))
    if package == "apex" and found not in (None, "torch sees no CUDA device"):
        pytest.skip(str(found))
    for path, recorded in record["callables"].items():
        parameters = inspect.signature(resolve(path)).parameters.values()
        real = [
            [
                f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name,
                *([] if p.default is p.empty else [repr(p.default)]),
            ]
            for p in parameters
        ]
        assert real == recorded, path


# ---- flash-attn
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "version", "deterministic"),
    [
        (flash.attention_2, 2, True),
        (flash.attention_2_atomic, 2, False),
        (flash.attention_3, 3, True),
        (flash.attention_3_atomic, 3, False),
        (flash.attention_4, 4, True),
        (flash.attention_4_atomic, 4, False),
    ],
)
def test_flash_attn_is_called_as_its_source_wants(
    function: Any, version: int, deterministic: bool, stand_ins: StandIns
) -> None:
    install_flash(stand_ins, version)
    path = f"{FLASH[version]}.flash_attn_func"
    everything = None if version == 4 else -1
    q, k, v = (torch.randn(2, 5, 3, 16, dtype=torch.bfloat16) for _ in range(3))
    strided = torch.randn(2, 5, 9, 16, dtype=torch.bfloat16)[:, :, :3]  # a slice of a fused projection: not copied
    assert torch.equal(function(strided, k, v, scale=0.3), reference.attention(strided, k, v, scale=0.3))
    given = stand_ins.calls[path]
    assert given["q"] is strided  # layout [B, T, H, D] is theirs too
    assert (given["k"] is k, given["v"] is v) == (True, True)
    assert (given["softmax_scale"], given["causal"], given["deterministic"]) == (0.3, True, deterministic)
    sides = (everything, everything)
    assert (given["window_size"], given["softcap"], given.get("dropout_p", 0.0)) == (sides, 0.0, 0.0)
    assert given["return_lse" if version == 4 else "return_attn_probs"] is False
    with pytest.raises(
        KernelError, match=r"attention: flash-attn takes documents as cumulative lengths.*source triton or sdpa"
    ):
        function(q, k, v, scale=0.3, document_start=torch.zeros(2, 5, dtype=torch.int32))
    with pytest.raises(KernelError, match="attention: k is"):
        function(q, k[:, :4], v, scale=0.3)
    stand_ins.calls.clear()
    shared = {"k": k[:, :, :1], "v": v[:, :, :1], "scale": 0.3, "window": 2}  # one key head, two keys a query
    assert torch.equal(function(q, **shared), reference.attention(q, **shared))
    given = stand_ins.calls.pop(path)
    assert (given["window_size"], given["k"].shape) == ((1, 0), (2, 5, 1, 16))
    empty = [torch.empty(2, 0, heads, 16, dtype=q.dtype, requires_grad=True) for heads in (3, 1, 1)]
    output = function(*empty, scale=0.3)
    assert output.shape == (2, 0, 3, 16)
    assert all(gradient.numel() == 0 for gradient in torch.autograd.grad(output.sum(), empty))
    assert stand_ins.calls == {}  # nothing to launch


def test_an_early_version_3_gives_a_pair(stand_ins: StandIns) -> None:
    stand_ins.add("flash_attn_interface.flash_attn_func", gives_a_pair)
    q = torch.randn(1, 4, 2, 8)
    assert torch.equal(flash.attention_3(q, q, q, scale=1.0), reference.attention(q, q, q, scale=1.0))


@pytest.mark.parametrize(
    ("installed", "capability", "head_dim", "chosen", "chosen_atomic"),
    [
        ((2, 3, 4), (9, 0), 128, 3, 3),
        ((2, 4), (9, 0), 128, 4, 4),
        ((2,), (9, 0), 128, 2, 2),
        ((2, 3, 4), (8, 0), 128, 2, 2),
        ((2, 3, 4), (8, 9), 256, 2, 2),
        ((2, 3, 4), (10, 0), 128, 4, 4),
        ((2, 3, 4), (10, 3), 64, 4, 4),
        ((2, 3), (10, 0), 128, 2, 2),
        ((2, 3, 4), (12, 0), 128, 2, 2),
        ((3,), (8, 0), 128, None, None),
        ((4,), (8, 0), 128, None, None),
        ((3, 4), (12, 0), 128, None, None),
        ((2,), (7, 5), 128, None, None),
        ((), (9, 0), 128, None, None),
        ((2, 3, 4), (9, 0), 192, 3, 3),
        ((2, 3, 4), (9, 0), 200, 4, 3),
        ((2, 3), (9, 0), 256, 2, 3),
        ((3,), (9, 0), 256, None, 3),
        ((2, 3, 4), (10, 0), 192, 2, 2),
        ((2, 3, 4), (10, 0), 256, 2, 4),
    ],
)
def test_which_version_serves(
    installed: tuple[int, ...],
    capability: tuple[int, int],
    head_dim: int,
    chosen: int | None,
    chosen_atomic: int | None,
    stand_ins: StandIns,
    gpu: Callable[[int, int], None],
) -> None:
    install_flash(stand_ins, *installed)
    gpu(*capability)
    spec = attention_spec(head_dim=head_dim)
    for source, wanted, suffix in (("flash_attn", chosen, ""), ("flash_attn_atomic", chosen_atomic, "_atomic")):
        if wanted is None:
            with pytest.raises(KernelError, match=r"needs Hopper|needs sm_80 or newer; this is sm_75|is not installed"):
                select([spec], pins={"attention": source})
            continue
        found = select([spec], pins={"attention": source}).function("attention", "layers.0.attention")
        assert found.__name__ == f"attention_{wanted}{suffix}"


def reasons_of_flash_attn(**attributes: Any) -> list[str]:
    """Of versions 3, 4 and 2, in the order in which they are tried."""
    return [str(variant.unavailable(attention_spec(**attributes))) for variant in flash.IMPLEMENTATION[:3]]


def test_flash_attn_4_alone_is_not_taken_for_version_2(stand_ins: StandIns, gpu: Callable[[int, int], None]) -> None:
    """It installs flash_attn/cute and no flash_attn/__init__.py: `flash_attn` is found, and has no version 2 in it."""
    install_flash(stand_ins, 4)
    (stand_ins.folder / "flash_attn/__init__.py").unlink()
    gpu(8, 0)
    three, four, two = reasons_of_flash_attn()
    assert "flash_attn_interface (flash-attn 3) is not installed" in three
    assert "flash-attn 4 needs Hopper or Blackwell, sm_90 or sm_10x; this is sm_80" in four
    assert "flash_attn is not installed (flash-attn-4 is, which is another package): pip install flash-attn" in two
    gpu(10, 0)
    assert reasons_of_flash_attn()[1] == "None"


def test_half_installed_flash_attn_is_named(stand_ins: StandIns, gpu: Callable[[int, int], None]) -> None:
    for path in FLASH.values():
        stand_ins.module(path)
    gpu(9, 0)
    three, four, two = reasons_of_flash_attn(head_dim=256)
    assert three == "flash-attn 3 has no deterministic backward for head_dim above 192, this is 256"
    assert "installed without cutlass" in four
    assert "installed without its extension flash_attn_2_cuda" in two


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (attention_spec(torch.float32), "takes bfloat16 and float16, not float32"),
        (attention_spec(head_dim=20), "needs head_dim a multiple of 8 up to 256, this is 20"),
        (attention_spec(head_dim=264), "up to 256, this is 264"),
        (attention_spec(document_start=True), "whose number depends on the data"),
        (attention_spec(device="cpu"), "needs an NVIDIA GPU, not cpu"),
    ],
)
def test_what_flash_attn_cannot_do_is_said(
    spec: Spec, reason: str, stand_ins: StandIns, gpu: Callable[[int, int], None]
) -> None:
    install_flash(stand_ins, 2)
    gpu(8, 0)
    assert all(implementation.unavailable(attention_spec()) is None for implementation in flash.IMPLEMENTATION[2::3])
    for implementation in flash.IMPLEMENTATION:
        assert reason in str(implementation.unavailable(spec))


def test_amd_is_refused(stand_ins: StandIns, gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash(stand_ins, 2)
    gpu(9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "its old Triton kernel: not offered" in reasons_of_flash_attn()[2]


def test_sources_with_float_atomics_are_in_no_default() -> None:
    atomic = {"flash_attn_atomic", "sdpa", "cudnn"}
    assert not atomic & set(DEFAULT_PREFERENCES)
    assert atomic <= set(load_catalog()["attention"])


# ---- cuDNN
# ----------------------------------------------------------------------------------------------------


def test_cudnn_is_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no cuDNN: here torch may take its own kernel, but the request is what a GPU gets."""
    asked: list[Any] = []

    def stand_in(backend: Any) -> Any:
        asked.append(backend)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch_attention, "sdpa_kernel", stand_in)
    for shape, heads in (((2, 5, 4, 16), 4), ((2, 5, 4, 16), 2), ((2, 1, 4, 16), 2), ((2, 0, 4, 16), 2)):
        q, k, v = (torch.randn(*shape[:2], count, 16, requires_grad=True) for count in (4, heads, heads))
        output = torch_attention.attention_cudnn(q, k, v, scale=0.3)
        expected = reference.attention(q, k, v, scale=0.3)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        got = torch.autograd.grad(output.square().sum(), (q, k, v))
        for one, other in zip(got, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert asked == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION] * 2  # one key or none needs no kernel
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    with pytest.raises(KernelError, match="has no second derivative"):
        torch.autograd.grad(torch_attention.attention_cudnn(q, q, q, scale=0.3).sum(), q, create_graph=True)
    for refused in ({"window": 2}, {"document_start": torch.zeros(1, 3, dtype=torch.int32)}):
        with pytest.raises(KernelError, match="attention: cuDNN's attention in torch takes documents and windows as"):
            torch_attention.attention_cudnn(q, q, q, scale=0.3, **refused)


@pytest.mark.parametrize(
    ("capability", "spec", "version", "reason"),
    [
        ((9, 0), attention_spec(), 91002, None),
        ((12, 0), attention_spec(head_dim=128, heads_per_key=4), 90100, None),
        ((9, 0), attention_spec(device="cpu"), 91002, "needs an NVIDIA GPU, not cpu"),
        ((9, 0), attention_spec(torch.float32), 91002, "takes bfloat16 and float16, not float32"),
        ((9, 0), attention_spec(head_dim=256), 91002, "a multiple of 8 up to 128, this is 256"),
        ((9, 0), attention_spec(head_dim=20), 91002, "a multiple of 8 up to 128, this is 20"),
        ((9, 0), attention_spec(window=8), 91002, "documents and windows as a mask of every query and key"),
        ((9, 0), attention_spec(document_start=True), 91002, "documents and windows as a mask of every query and key"),
        ((7, 5), attention_spec(), 91002, "needs sm_80 or newer; this is sm_75"),
        ((9, 0), attention_spec(), 8907, "needs cuDNN 9.0 or newer"),
        ((9, 0), attention_spec(), None, "torch has none"),
    ],
)
def test_where_cudnn_is_offered(
    capability: tuple[int, int],
    spec: Spec,
    version: int | None,
    reason: str | None,
    gpu: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(*capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: version is not None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    (cudnn,) = load_catalog()["attention"]["cudnn"]
    found = cudnn.unavailable(spec)
    assert found is None if reason is None else reason in str(found)


def test_cudnn_is_refused_where_determinism_is_asked_for(
    gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, 0)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    (cudnn,) = load_catalog()["attention"]["cudnn"]
    assert "torch has no deterministic cuDNN attention" in str(cudnn.unavailable(attention_spec()))
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(KernelError, match="attention: torch has no deterministic cuDNN attention"):
        cudnn.function(q, q, q, scale=0.3)


# ---- apex
# ----------------------------------------------------------------------------------------------------


def computes_rms_norm(input: Tensor, weight: Tensor, eps: float, **_: Any) -> Tensor:
    """csrc/layer_norm_cuda_kernel.cu: gamma[i] * static_cast<V>(c_invvar * curr), with V the weight's dtype, and so the
    output's.
    """
    x = input.float()
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(weight.dtype)


def computes_layer_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float, **_: Any) -> Tensor:
    return weight * F.layer_norm(input.float(), input.shape[-1:], eps=eps).to(weight.dtype) + bias


def computes_adam(
    noop_flag: Tensor,
    tensor_lists: Any,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    **rest: Any,
) -> None:
    """csrc/multi_tensor_adam.cu, ADAM_MODE_1: every tensor read as the dtype of the first list's."""
    assert noop_flag.dtype == torch.int32
    assert (mode, rest["bias_correction"]) == (1, 1)
    for g, p, m, v in zip(*tensor_lists, strict=True):
        assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (g, p, m, v))
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + epsilon) + rest["weight_decay"] * p
        p.sub_(lr * update)


NORMS = "apex.normalization.fused_layer_norm"


@pytest.fixture
def apex(stand_ins: StandIns) -> StandIns:
    for name in ("fused_rms_norm_affine", "mixed_dtype_fused_rms_norm_affine"):
        stand_ins.add(f"{NORMS}.{name}", computes_rms_norm)
    for name in ("fused_layer_norm_affine", "mixed_dtype_fused_layer_norm_affine"):
        stand_ins.add(f"{NORMS}.{name}", computes_layer_norm)
    stand_ins.add("amp_C.multi_tensor_adam", computes_adam)
    stand_ins.add(
        "apex.multi_tensor_apply.multi_tensor_applier",
        lambda op, noop_flag_buffer, tensor_lists, args: op(65536, noop_flag_buffer, tensor_lists, *args),
    )
    return stand_ins


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_apex_norms_round_once(op: str, dtype: torch.dtype, apex: StandIns) -> None:
    arguments = OPS[op].examples["odd"]("cpu", dtype)
    function = {"rms_norm": apex_rms_norm.rms_norm, "layer_norm": apex_layer_norm.layer_norm}[op]
    found = function(**arguments)
    expected = OPS[op].function(**arguments)
    assert found.dtype == dtype
    # A weight in x's own dtype would round twice: about a third of the elements would then differ by one unit in the
    # last place.
    different = (found != expected).float().mean().item()
    assert different < 0.01 if dtype != torch.float32 else torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    (path,) = apex.calls
    assert path.endswith(f".{'' if dtype == torch.float32 else 'mixed_dtype_'}fused_{op}_affine")
    given = apex.calls[path]
    assert given["weight"].dtype == torch.float32
    assert given["normalized_shape"] == (77,)
    # memory_efficient rebuilds x from the rounded output
    assert (given["eps"], given["memory_efficient"]) == (0.1, False)
    empty = {**arguments, "x": arguments["x"][:0]}
    apex.calls.clear()
    assert function(**empty).shape == (0, 5, 77)
    assert apex.calls == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("example", ["odd", "odd_no_copies"])
def test_apex_adamw_is_the_reference(example: str, dtype: torch.dtype, apex: StandIns) -> None:
    ours, theirs = OPS["adamw"].examples[example]("cpu", dtype), OPS["adamw"].examples[example]("cpu", dtype)
    for arguments in (ours, theirs):  # one that has no elements, and one that is not contiguous
        for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "copies"):
            if arguments[name] is not None:
                arguments[name].append(torch.empty(0, dtype=arguments[name][0].dtype))
        arguments["gradients"][0] = arguments["gradients"][0].t().contiguous().t()
    before = [gradient.clone() for gradient in theirs["gradients"]]
    reference.adamw(**ours)
    apex_adamw.adamw(**theirs)
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        for one, other in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-9)
    for parameter, copy in zip(theirs["parameters"], theirs["copies"] or theirs["parameters"], strict=True):
        assert torch.equal(parameter.to(copy.dtype), copy)
    assert all(torch.equal(*pair) for pair in zip(before, theirs["gradients"], strict=True))
    given = apex.calls["amp_C.multi_tensor_adam"]
    assert (given["step"], given["epsilon"], given["weight_decay"]) == (3, 1e-8, 0.1)


def test_apex_adamw_has_one_placement_of_epsilon(apex: StandIns) -> None:
    with pytest.raises(KernelError, match="adamw: apex adds epsilon after the bias correction"):
        apex_adamw.adamw(**OPS["adamw"].examples["odd_before"]("cpu", torch.float32))
    spec = Spec("adamw", "optimizer", "cuda", torch.float32, {"eps_placement": "before_bias_correction"})
    assert "it has no 'before_bias_correction'" in str(apex_adamw.unavailable(spec))


def test_which_apex(stand_ins: StandIns, gpu: Callable[[int, int], None]) -> None:
    """None, the web toolkit of that name, NVIDIA's without its extensions, NVIDIA's."""
    gpu(9, 0)
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("an apex is installed")
    norm, adam = (
        Spec("rms_norm", "n", "cuda", torch.bfloat16, {"hidden_size": 64}),
        Spec("adamw", "optimizer", "cuda", torch.bfloat16),
    )

    def reasons() -> list[str]:
        return [
            str(apex_rms_norm.unavailable(norm)),
            str(apex_layer_norm.unavailable(norm)),
            str(apex_adamw.unavailable(adam)),
        ]

    assert all("apex is not installed: build github.com/NVIDIA/apex" in reason for reason in reasons())
    stand_ins.module("apex")
    assert all("the installed apex is not NVIDIA's" in reason and "web toolkit" in reason for reason in reasons())
    for folder in ("normalization", "multi_tensor_apply"):
        stand_ins.module(f"apex.{folder}")
    assert all("apex was built without its CUDA extension" in reason for reason in reasons())
    stand_ins.module("amp_C")
    stand_ins.module("fused_layer_norm_cuda")
    assert reasons() == ["None"] * 3


# ---- liger
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def liger(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    if importlib.util.find_spec("liger_kernel") is not None:
        pytest.skip("liger_kernel is installed: stand-ins would hide it")
    ops = "liger_kernel.ops"
    stand_ins.add(
        f"{ops}.rms_norm.LigerRMSNormFunction.forward", lambda X, W, eps, **_: reference.rms_norm(X, W, eps=eps)
    )
    stand_ins.add(
        f"{ops}.layer_norm.LigerLayerNormFunction.forward",
        lambda X, W, B, eps, **_: reference.layer_norm(X, W, B, eps=eps),
    )

    def fused(
        _input: Tensor, weight: Tensor, target: Tensor, ignore_index: int, lse_square_scale: float, **_: Any
    ) -> tuple[Any, ...]:
        loss = reference.linear_cross_entropy(
            _input, weight, target, ignore_index=ignore_index, z_loss=lse_square_scale
        )
        return loss, None, None, None

    stand_ins.add(f"{ops}.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction.forward", fused)
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.8.5" if name == "liger-kernel" else installed(name)
    )
    return stand_ins


def test_liger_norms(liger: StandIns) -> None:
    arguments = OPS["rms_norm"].examples["odd"]("cpu", torch.bfloat16)
    assert torch.equal(liger_rms_norm.rms_norm(**arguments), reference.rms_norm(**arguments))
    (given,) = liger.calls.values()
    # "llama" rounds before the weight; in_place would overwrite the incoming gradient.
    assert (given["casting_mode"], given["offset"], given["in_place"], given["eps"]) == ("gemma", 0.0, False, 0.1)
    arguments = OPS["layer_norm"].examples["odd"]("cpu", torch.bfloat16)
    assert torch.equal(liger_layer_norm.layer_norm(**arguments), reference.layer_norm(**arguments))


def test_liger_linear_cross_entropy(liger: StandIns) -> None:
    arguments = OPS["linear_cross_entropy"].examples["odd"]("cpu", torch.bfloat16) | {"z_loss": 0.01}
    assert torch.equal(liger_lce.linear_cross_entropy(**arguments), reference.linear_cross_entropy(**arguments))
    (given,) = liger.calls.values()
    assert (given["reduction"], given["accum_dtype"], given["lse_square_scale"]) == ("sum", torch.float32, 0.01)
    assert (given["label_smoothing"], given["bias"], given["ce_weight"], given["softcap"]) == (0.0, None, None, None)
    arguments["weight"].requires_grad_()  # liger gives no gradient to a weight beside a hidden state that wants none
    liger_lce.linear_cross_entropy(**arguments)
    (given,) = liger.calls.values()
    assert given["_input"].requires_grad
    empty = arguments | {"hidden": arguments["hidden"][:0], "labels": arguments["labels"][:0]}
    assert liger_lce.linear_cross_entropy(**empty).item() == 0.0
    with pytest.raises(
        KernelError, match="linear_cross_entropy: liger's fused linear cross-entropy has no logits_scale"
    ):
        liger_lce.linear_cross_entropy(**arguments | {"logits_scale": 0.5})
    with pytest.raises(KernelError, match="linear_cross_entropy: liger's softcap of the logits"):
        liger_lce.linear_cross_entropy(**arguments | {"logits_softcap": 30.0})
    with pytest.raises(KernelError, match="linear_cross_entropy: liger's label smoothing"):
        liger_lce.linear_cross_entropy(**arguments | {"label_smoothing": 0.1})
    with pytest.raises(KernelError, match="linear_cross_entropy: liger's fused linear cross-entropy weighs classes"):
        liger_lce.linear_cross_entropy(**arguments | {"token_weights": torch.ones(29)})
    for name, value in (("label_smoothing", 0.1), ("token_weights", True)):
        spec = Spec("linear_cross_entropy", "head", "cuda", torch.bfloat16, {name: value})
        assert "liger's" in str(liger_lce.unavailable(spec))


def test_liger_never_sees_an_impossible_label(liger: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not looked at (on a GPU), the loss is NaN and no label leads out of the row."""
    monkeypatch.setattr(liger_lce, "check_linear_cross_entropy", lambda *_: None)
    arguments = OPS["linear_cross_entropy"].examples["odd"]("cpu", torch.float32)
    for impossible in (-1, 101, 10**9):
        labels = arguments["labels"].clone()
        labels[3] = impossible
        assert liger_lce.linear_cross_entropy(**arguments | {"labels": labels}).isnan()
        (given,) = liger.calls.values()
        assert given["target"].max() < 101
        assert given["target"][3] == -100


def test_liger_is_offered_where_it_fits_and_named_where_not(liger: StandIns, gpu: Callable[[int, int], None]) -> None:
    gpu(9, 0)
    offered = {op: sources["liger"][0] for op, sources in load_catalog().items() if "liger" in sources}
    reasons = {
        op: it.unavailable(Spec(op, "m", "cuda", torch.bfloat16, OPS[op].attributes)) for op, it in offered.items()
    }
    assert {op for op, reason in reasons.items() if reason is None} == {
        "rms_norm",
        "layer_norm",
        "linear_cross_entropy",
    }
    assert "turns q and k in place" in str(reasons["rope"])
    assert "overwrites gate and up" in str(reasons["swiglu"])
    assert "overwrites the caller's logits" in str(reasons["cross_entropy"])
    scaled = Spec("linear_cross_entropy", "head", "cuda", torch.bfloat16, {"logits_scale": 0.5})
    assert "has no logits_scale" in str(liger_lce.unavailable(scaled))
    wide = Spec("rms_norm", "n", "cuda", torch.bfloat16, {"hidden_size": 65537})
    assert "needs hidden_size <= 65536, this is 65537" in str(liger_rms_norm.IMPLEMENTATION.unavailable(wide))
    with pytest.raises(KernelError, match="rope: liger's rope turns"):
        offered["rope"].function()


def test_an_old_liger_is_refused(
    liger: StandIns, gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, 0)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.10")
    spec = Spec("rms_norm", "n", "cuda", torch.bfloat16, {"hidden_size": 64})
    assert "needs liger-kernel >= 0.8, this is 0.5.10" in str(liger_rms_norm.IMPLEMENTATION.unavailable(spec))


def test_a_liger_without_its_submodule_is_named(
    stand_ins: StandIns, gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed("liger_kernel"):
        pytest.skip("liger_kernel is installed: stand-ins would hide it")
    gpu(9, 0)
    stand_ins.module("liger_kernel.ops.layer_norm")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.5")
    for implementation, expected in (
        (liger_rms_norm, "has no liger_kernel.ops.rms_norm: pip"),
        (liger_layer_norm, None),
    ):
        spec = Spec(implementation.IMPLEMENTATION.op, "n", "cuda", torch.bfloat16, {"hidden_size": 64})
        reason = implementation.IMPLEMENTATION.unavailable(spec)
        assert reason is None if expected is None else expected in str(reason)


# ---- quack
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quack(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    if importlib.util.find_spec("quack") is not None:
        pytest.skip("quack is installed: a stand-in would hide it")
    stand_ins.add("quack.rmsnorm.rmsnorm", lambda x, weight, eps, **_: reference.rms_norm(x, weight, eps=eps))
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.6.5" if name == "quack-kernels" else installed(name)
    )
    return stand_ins


def test_quack_rms_norm(quack: StandIns) -> None:
    arguments = OPS["rms_norm"].examples["odd"]("cpu", torch.bfloat16)
    assert torch.equal(quack_rms_norm.rms_norm(**arguments), reference.rms_norm(**arguments))
    (given,) = quack.calls.values()
    assert (given["eps"], given["weight_offset"], given["out_dtype"], given["residual"]) == (0.1, 0.0, None, None)
    x = arguments["x"].requires_grad_()
    with pytest.raises(KernelError, match="rms_norm of source 'quack' has no second derivative"):
        torch.autograd.grad(quack_rms_norm.rms_norm(**arguments).sum(), x, create_graph=True)


def test_quack_is_offered_where_it_fits_and_named_where_not(
    quack: StandIns, gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reasons() -> dict[str, str | None]:
        return {
            op: sources["quack"][0].unavailable(Spec(op, "m", "cuda", torch.bfloat16, OPS[op].attributes))
            for op, sources in load_catalog().items()
            if "quack" in sources
        }

    gpu(9, 0)
    found = reasons()
    assert [op for op, reason in found.items() if reason is None] == ["rms_norm"]
    assert "before it is rounded" in str(found["add_rms_norm"])
    assert "no differentiable layer norm" in str(found["layer_norm"])
    assert "loses the digits of large logits" in str(found["cross_entropy"])
    gpu(10, 0)
    assert reasons()["rms_norm"] is None
    gpu(8, 0)
    assert reasons()["rms_norm"] == "quack is for compute capability 9 and 10, this is 8.0"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.2")
    assert "needs quack-kernels >= 0.6, this is 0.3.2" in str(reasons()["rms_norm"])
    assert "quack" not in DEFAULT_PREFERENCES


def test_another_package_called_quack_is_not_it(stand_ins: StandIns, gpu: Callable[[int, int], None]) -> None:
    gpu(9, 0)
    stand_ins.module("quack")
    spec = Spec("rms_norm", "n", "cuda", torch.bfloat16, {"hidden_size": 64})
    assert quack_rms_norm.IMPLEMENTATION.unavailable(spec) == "quack is not installed: pip install quack-kernels"


def test_nothing_optional_is_imported_by_the_catalog() -> None:
    """Finding out what there is must not run what there is: the wrong apex pulls in a web framework."""
    program = (
        "import sys, torch; from weftrain.kernels import table; table('cpu', torch.bfloat16); table('cuda', "
        "torch.bfloat16); "
        "print(sorted({'flash_attn', 'flash_attn_interface', 'apex', 'amp_C', 'liger_kernel', 'quack'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
