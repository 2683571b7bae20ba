"""Groups of tokens, and what a FIT costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lamina.errors import RecipeError, ShapeError
from lamina.models import (
    FIT,
    attention_cost,
    block_causal_mask,
    group_image,
    pad_groups,
    shift_latents,
    snake_order,
    ungroup_image,
)


def test_an_image_in_groups_by_hand() -> None:
    image = torch.arange(2 * 4 * 8.0).view(1, 2, 4, 8)
    found = group_image(image, group=4, patch=2)
    assert found.shape == (1, 2, 4, 8)
    # The second group's third patch: rows 2 and 3, columns 4 and 5, both channels.
    assert found[0, 1, 2].tolist() == [20, 52, 21, 53, 28, 60, 29, 61]
    raster = group_image(image, group=2, patch=1).flatten(2)
    assert raster[0, 0].tolist() == [0, 32, 1, 33, 8, 40, 9, 41]


@pytest.mark.parametrize(
    ("size", "group", "patch"), [((1, 1), 1, 1), ((7, 21), 7, 7), ((12, 6), 6, 2), ((63, 63), 63, 9)]
)
def test_images_come_back(size: tuple[int, int], group: int, patch: int) -> None:
    image = torch.randn(2, 3, *size)
    tokens = group_image(image, group, patch)
    inner = (group // patch) ** 2
    assert tokens.shape == (2, size[0] * size[1] // group**2, inner, 3 * patch**2)
    assert torch.equal(ungroup_image(tokens, size, group, patch), image)


def test_a_snake_goes_to_a_neighbour() -> None:
    assert snake_order(3, 3).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    order = snake_order(4, 7)
    steps = (order // 7).diff().abs() + (order % 7).diff().abs()
    assert sorted(order.tolist()) == list(range(28))
    assert (steps == 1).all()


def test_latents_one_group_later_and_who_sees_whom() -> None:
    x = torch.randn(2, 3, 2, 4)
    shifted = shift_latents(x)
    assert torch.equal(shifted[:, 1:], x[:, :-1])
    assert not shifted[:, 0].any()
    mask = block_causal_mask(3, 2)
    assert mask.int().sum(1).tolist() == [2, 2, 4, 4, 6, 6]
    assert block_causal_mask(1, 1).tolist() == [[True]]


def test_groups_of_unequal_fill() -> None:
    x, mask = pad_groups([torch.ones(2, 3), torch.zeros(0, 3), 2 * torch.ones(1, 3)])
    assert (x.shape, mask.tolist()) == ((3, 2, 3), [[True, True], [False, False], [True, False]])
    assert x.sum().item() == 12
    assert pad_groups([torch.ones(2, 3)], 5)[0].shape == (1, 5, 3)


def test_bad_groups_are_refused() -> None:
    for call, words in (
        (lambda: group_image(torch.zeros(1, 3, 8, 8), 4, 3), "patches of 3 pixels must divide groups of 4"),
        (lambda: group_image(torch.zeros(1, 3, 9, 8), 4, 2), "the image of 9 x 8"),
        (lambda: group_image(torch.zeros(3, 8, 8), 4, 2), "takes images"),
        (lambda: ungroup_image(torch.zeros(1, 3, 4, 12), (8, 8), 4, 2), r"tokens \(B, 4, 4, 4 \* C\)"),
        (lambda: snake_order(0, 3), "at least 1"),
        (lambda: pad_groups([torch.zeros(4, 2)], 3), "has 4 tokens, a group has room for 3"),
        (lambda: pad_groups([]), "longest of 0 groups"),
    ):
        with pytest.raises(ShapeError, match=words):
            call()


SIZES: dict[str, Any] = {
    "tokens_per_group": 32, "groups": 6, "latents_per_group": 8, "token_width": 16, "latent_width": 24,
}  # fmt: skip


def model_of(layers: str, **options: Any) -> FIT:
    torch.manual_seed(0)
    return FIT(layers, in_features=4, token_heads=2, latent_heads=4, **(SIZES | options))


@pytest.mark.parametrize("layers", ["(2)1(1)", "(1)2(2)1(1)3"])
@pytest.mark.parametrize("side", [0, 3])
def test_the_cost_is_what_torch_counts(layers: str, side: int) -> None:
    model = model_of(layers, side_features=2 if side else 0).requires_grad_(False)
    costs = attention_cost(layers, **SIZES, side_tokens=side)
    y = (torch.zeros(1, 6, side, 2),) if side else ()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 6, 32, 4), *y)
    counted: Any = counter.get_flop_counts()
    assert [c.name for c in costs] == [
        n for n, m in model.trunk.named_modules() if type(m).__name__ in ("FITLayer", "CrossRead")
    ]
    for cost in costs:
        found = counted[f"FIT.trunk.{cost.name}"]
        assert sum(found.values()) == cost.flops
        assert found[torch.ops.aten.bmm] == cost.attention_flops


def kept(model: FIT, x: Tensor) -> int:
    """Bytes that the backward pass keeps, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ends = model(x)
    assert ends[0].requires_grad
    return sum(held.values())


def test_training_keeps_what_the_cost_says_and_as_much_a_token_at_any_length() -> None:
    found, said = [], []
    for groups in (4, 8, 16):
        model = model_of("(2)1(2)", groups=groups)
        found.append(kept(model, torch.zeros(1, groups, 32, 4)))
        costs = attention_cost("(2)1(2)", **(SIZES | {"groups": groups}), token_heads=2, latent_heads=4)
        said.append(sum(c.activation_bytes for c in costs))
    for measured, estimate in zip(found, said, strict=True):
        # The stem and the last norms are no layers.
        assert 0.85 * estimate < measured < 1.1 * estimate
    assert found[2] / found[1] == pytest.approx(2, rel=0.02)


def balanced(length: int, m: int = 16) -> tuple[int, int]:
    """Tokens a group and groups that balance local and global attention."""
    n = round((length * m * m) ** (1 / 3))
    return n, math.ceil(length / n)


def test_balanced_attention_grows_as_the_power_four_thirds() -> None:
    lengths, cost = (4096, 16384, 65536, 160_000), []
    for length in lengths:
        n, t = balanced(length)
        layers = attention_cost("(1)1(1)1", n, t, 16, 32, 32)
        cost.append(sum(c.attention_flops for c in layers))
    slope = math.log(cost[-1] / cost[0]) / math.log(lengths[-1] / lengths[0])
    assert slope <= 4 / 3 + 0.05
    # The card's worked example, in pairs of tokens.
    layers = attention_cost("(1)1(1)", 1600, 100, 64, 1, 1)
    pairs = {c.name: c.attention_flops / 4 for c in layers}
    assert pairs["blocks.0.local.0"] == 2.56e8
    assert pairs["blocks.0.latent.0"] == 6400**2
    assert pairs["blocks.0.read"] + pairs["blocks.0.write"] == pytest.approx(2.05e7, rel=1e-2)


def test_a_cost_of_a_bad_string_is_refused() -> None:
    with pytest.raises(RecipeError, match="is written"):
        attention_cost("2(4)", **SIZES)
