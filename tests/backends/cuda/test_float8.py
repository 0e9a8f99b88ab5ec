"""Linear maps in eight bits through torchao, emulated where no device has them: each product is that of operands rounded
here, and training is the same within what eight bits allow, on one rank and on several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from eight_bits import SIZES
from ranks import apart, source_of

from weftrain.backends.common.registry import get_backend
from weftrain.backends.cuda.float8 import check_float8, chosen, share_of_products, use_float8
from weftrain.backends.cuda.options import CudaOptions, Float8
from weftrain.backends.cuda.rendezvous import leave
from weftrain.core.backend import Job, Plan
from weftrain.core.blocks import Linear
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'weftrain[float8]'")


@pytest.fixture(autouse=True)
def _no_world_stays() -> Iterator[None]:
    yield
    leave()


def trained(recipe: Recipe, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    cuda = get_backend("cuda")
    recipe = Recipe.model_validate(
        {**recipe.model_dump(), "backend": {"name": "cuda", "options": {"device": "cpu", **options}}}
    )
    run = cuda.prepare(Job(recipe, Plan(0, recipe.schedule.steps), cuda.options.model_validate(recipe.backend.options)))
    _, gradients = run.gradients(source_of(recipe).rows(0, 0, 4))
    losses = [float(result.loss) for result in run.train(source_of(recipe))]
    run.close()
    return gradients, losses


GROUPED = ["model.num_kv_heads=2", "model.head_dim=32", "model.qk_norm=per_head", "model.norm_placement=after"]
GELU = ["model.feed_forward=gelu", "model.residual=parallel", "model.qkv_bias=true"]


def rounded(x: torch.Tensor, dim: int | None, dtype: torch.dtype, powers: bool) -> torch.Tensor:
    """x in float64 after a round trip through eight bits, one scale for the tensor or for each slice along `dim`."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.finfo(dtype).max / largest.double().clamp_min(1e-12)
    if powers:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x.double() * scale).float().to(dtype).double() / scale


def in_blocks(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The same of blocks of 32 along `dim`, each with the smallest power of two that brings it below 448."""
    cut = x.double().transpose(dim, -1).unflatten(-1, (-1, 32))
    scale = torch.exp2(torch.ceil(torch.log2(cut.abs().amax(-1, keepdim=True) / 448)))
    return ((cut / scale).float().to(torch.float8_e4m3fn).double() * scale).flatten(-2).transpose(dim, -1)


def in_float8(**options: Any) -> Float8:
    found = CudaOptions.model_validate(options).in_float8
    assert found is not None
    return found


E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def products(
    scaling: str, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, gradient of x and of the weight, in float64, of x [n, in], weight [out, in] and dy [n, out]."""
    plain = dy.double().T @ x.double()
    if scaling == "tensorwise":
        x8, w8, dy8 = rounded(x, None, E4, False), rounded(weight, None, E4, False), rounded(dy, None, E5, False)
        return x8 @ w8.T, dy8 @ w8, dy8.T @ x8
    if scaling == "rowwise":  # along what each product sums over
        forward = rounded(x, 1, E4, True) @ rounded(weight, 1, E4, True).T
        backward = rounded(dy, 1, E4, True) @ rounded(weight, 0, E4, True)
        return forward, backward, rounded(dy, 0, E4, True).T @ rounded(x, 0, E4, True)
    if scaling == "rowwise_with_gw_hp":
        forward = rounded(x, 1, E4, True) @ rounded(weight, 1, E4, True).T
        return forward, rounded(dy, 1, E4, True) @ rounded(weight, None, E4, True), plain
    forward, backward = in_blocks(x, 1) @ in_blocks(weight, 1).T, in_blocks(dy, 1) @ in_blocks(weight, 0)
    return forward, backward, plain if scaling == "mxfp8_with_gw_hp" else in_blocks(dy, 0).T @ in_blocks(x, 0)


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8", "mxfp8_with_gw_hp"])
def test_each_product_is_that_of_rounded_operands(scaling: str, tiny_recipe: Callable[..., Recipe]) -> None:
    """Of a weight whose rows are of very different sizes, so that one scale is not another."""
    torch.manual_seed(0)
    config = tiny_recipe("amber", *SIZES).model
    layer = torch.nn.ModuleDict({"o_proj": Linear(64, 64, bias=False)})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"0": torch.nn.ModuleDict({"attention": layer})})})
    weight = torch.randn(64, 64) * torch.exp2(torch.arange(64) / 4)[:, None]
    layer["o_proj"].weight.data.copy_(weight)
    options = in_float8(float8=scaling, float8_linears="layers.0.attention.o_proj")
    use_float8(model, config, options, 1)
    x = (torch.randn(96, 64) * torch.exp2(torch.arange(96) / 8)[:, None]).requires_grad_()
    dy = torch.randn(96, 64) * torch.exp2(torch.arange(64) / 8)
    y = layer["o_proj"](x)
    y.backward(dy)
    found = (y, x.grad, layer["o_proj"].weight.grad)
    for one, wanted in zip(found, products(scaling, x.detach(), weight, dy), strict=True):
        assert one is not None
        assert apart(one, wanted) < 1e-6


@pytest.mark.parametrize("scaling", ["tensorwise", pytest.param("mxfp8", marks=pytest.mark.prove)])
@pytest.mark.parametrize(
    "fields", [[], *(pytest.param(fields, marks=pytest.mark.prove) for fields in (GROUPED, GELU))], ids=len
)
def test_float8_is_near_and_is_not_the_same(
    scaling: str, fields: list[str], tiny_recipe: Callable[..., Recipe]
) -> None:
    """Three bits of mantissa in the blocks: gradients differ by a tenth, losses hardly; an eighth of that would be no
    float8 at all.
    """
    recipe = tiny_recipe("amber", *SIZES, *fields, "batch.micro_batch_size=2")
    (plain, plain_losses), (eight, eight_losses) = trained(recipe), trained(recipe, float8=scaling)
    apart = {
        name: ((eight[name] - plain[name]).norm() / plain[name].norm()).item()
        for name in plain
        if "proj.weight" in name
    }
    assert min(apart.values()) > 0.0125, apart
    assert max(apart.values()) < 0.5, apart
    assert eight_losses == pytest.approx(plain_losses, rel=0.03)


def test_the_recipe_says_which_linear_maps(tiny_recipe: Callable[..., Recipe]) -> None:
    model = tiny_recipe("amber", *SIZES, "model.num_layers=2").model
    every, left_out = chosen(model, in_float8(float8=True), 1)
    assert len(every) == 2 * 7
    assert not left_out
    some, left_out = chosen(model, in_float8(float8="mxfp8", float8_linears="layers.1.ffn *.q_proj"), 1)
    assert some == {"layers.0.attention.q_proj", "layers.1.attention.q_proj"} | {
        f"layers.1.ffn.{name}_proj" for name in ("gate", "up", "down")
    }
    # on two tensor parallel ranks a row of 96 is 48, three blocks of 16
    assert chosen(model, in_float8(float8=True), 2)[1] == set()
    assert {name.split(".")[-1] for name in chosen(model, in_float8(float8=True), 4)[1]} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    head = 112 * 64
    blocks = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert share_of_products(model, in_float8(float8=True), 1) == pytest.approx(blocks / (blocks + head))
    assert share_of_products(model, in_float8(float8="rowwise_with_gw_hp"), 1) == pytest.approx(
        2 / 3 * blocks / (blocks + head)
    )


@pytest.mark.parametrize(
    ("options", "tensor", "tokens", "words"),
    [
        ({"float8_linears": "layers.*.mlp"}, 1, 32, "linears 0: 'layers.*.mlp' matches no parameter and no module"),
        ({"float8_linears": "layers.*.q_proj head"}, 1, 32, "linears 1: 'head' matches no"),
        ({"float8": "mxfp8"}, 2, 32, "tensor_parallel is 2: torchao's products of blocks are not split"),
        ({"float8": "mxfp8"}, 1, 48, "a micro-batch has 48 tokens, no multiple of its blocks of 32"),
        ({}, 8, 32, "no linear module's sizes are multiples of 128, as tensorwise asks for on 8 tensor parallel ranks"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], tensor: int, tokens: int, words: str, tiny_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(BackendError) as raised:
        check_float8(tiny_recipe("amber", *SIZES).model, in_float8(**{"float8": True, **options}), tensor, tokens)
    assert words in str(raised.value)
    check_float8(tiny_recipe("amber", *SIZES).model, in_float8(float8="mxfp8_with_gw_hp"), 1, 48)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"float8": "rowwise", "float8_gather": True}, "float8_gather needs float8=tensorwise, not rowwise"),
        ({"float8_gather": True}, "float8_gather needs float8=tensorwise, not none"),
        ({"float8": "delayed"}, "float8"),
        ({"float8": True, "float8_gather": True, "parallel": "ddp"}, "float8_gather needs parallel=fsdp or hsdp"),
        ({"float8": True, "float8_gather": True, "cpu_offload": True}, "float8_gather and cpu_offload"),
        ({"float8": True, "float8_linears": " "}, "float8_linears"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CudaOptions.model_validate(options)
    assert CudaOptions.model_validate({"float8": True}).float8 == "tensorwise"
    assert CudaOptions.model_validate({"float8": False}).in_float8 is None


@pytest.mark.parametrize(
    ("scaling", "capability", "words"),
    [
        ("tensorwise", (8, 0), "tensorwise needs compute capability 8.9 and NVIDIA A100 has 8.0: set float8=false"),
        ("rowwise", (8, 9), "rowwise needs compute capability 9.0 and NVIDIA A100 has 8.9: set float8=tensorwise"),
        ("mxfp8", (9, 0), "needs compute capability 10.0 and NVIDIA A100 has 9.0: set float8=rowwise_with_gw_hp"),
    ],
)
def test_a_device_without_such_arithmetic_is_refused(
    scaling: Any,
    capability: tuple[int, int],
    words: str,
    tiny_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(BackendError) as raised:
        use_float8(torch.nn.Module(), tiny_recipe("amber", *SIZES).model, in_float8(float8=scaling), 1)
    assert words in str(raised.value)
