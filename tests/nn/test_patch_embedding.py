from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor

from lamina.errors import ShapeError
from lamina.nn import MultiScalePatchEmbed


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


EXAMPLES = [
    Example(
        "layer",
        "multi_scale_patch_embed",
        {"in_channels": 3, "width": 5, "kernels": [2, 4], "stride": 2},
        inputs=lambda: (maps(2, 3, 6, 4),),
        bad={"kernels": [2, 5]},
    )
]


def joined(embed: MultiScalePatchEmbed) -> Tensor:
    """The weight of the one linear layer, (width, numbers of all windows), window by window, channels first."""
    return torch.cat([conv.weight.flatten(1) for conv in embed.convs], dim=1)


@pytest.mark.parametrize(("kernels", "stride"), [((2, 4), 2), ((4, 8), 4), ((1, 3, 7), 1), ((3, 9), 3), ((4,), 4)])
def test_it_is_one_linear_layer_of_all_windows(kernels: tuple[int, ...], stride: int) -> None:
    torch.manual_seed(0)
    embed, x = MultiScalePatchEmbed(3, 5, kernels, stride), maps(2, 3, 3 * stride, 2 * stride)
    windows = [F.unfold(x, k, padding=(k - stride) // 2, stride=stride) for k in kernels]
    expected = F.linear(torch.cat(windows, dim=1).mT, joined(embed), embed.convs[0].bias).mT.unflatten(2, (3, 2))
    torch.testing.assert_close(embed(x), expected, rtol=1e-4, atol=1e-5)
    weight = maps(*expected.shape)
    found = [torch.autograd.grad((o * weight).sum(), list(embed.parameters())) for o in (embed(x), expected)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_one_kernel_is_the_plain_embedding_of_flattened_patches() -> None:
    torch.manual_seed(0)
    embed, x = MultiScalePatchEmbed(3, 5, (4,), 4), maps(2, 3, 8, 12)
    patches = x.unflatten(2, (2, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3)  # (B, h, w, p1 p2 c)
    order = joined(embed).unflatten(1, (3, 4, 4)).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(embed(x), F.linear(patches, order, embed.convs[0].bias).permute(0, 3, 1, 2))
    conv = embed.convs[0]
    torch.testing.assert_close(embed(x), F.conv2d(x, conv.weight, conv.bias, stride=4))


def test_a_wide_window_sees_beyond_its_patch() -> None:
    x = maps(1, 1, 8, 8).requires_grad_()
    torch.manual_seed(0)
    seen = torch.autograd.grad(MultiScalePatchEmbed(1, 1, (2, 4), 2)(x)[0, 0, 1, 2], x)[0][0, 0] != 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:5, 3:7] = True
    assert torch.equal(seen, expected)


def test_weights_start_as_those_of_the_one_linear_layer() -> None:
    torch.manual_seed(0)
    embed = MultiScalePatchEmbed(4, 200, (2, 4), 2)
    bound = (4 * (4 + 16)) ** -0.5
    assert joined(embed).abs().max() <= bound
    assert joined(embed).detach().std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert embed.convs[0].bias.abs().max() <= bound
    assert embed.convs[1].bias is None


def test_bf16_is_float32_rounded() -> None:
    torch.manual_seed(0)
    embed, x = MultiScalePatchEmbed(3, 5, (2, 4), 2), maps(2, 3, 6, 4)
    expected = embed(x)
    found = embed.bfloat16()(x.bfloat16()).float()
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    ("kernels", "stride", "words"),
    [
        ((4, 6), 4, "multiple of the stride 4, got a kernel of 6"),
        ((8, 4), 4, "first kernel must be the stride 4.*got 8"),
        ((3, 6), 3, "a kernel of 6 cannot be centred on a patch of 3"),
        ((), 4, "at least 1"),
        ((0,), 4, "at least 1"),
        ((4,), 0, "at least 1"),
    ],
)
def test_bad_kernels_are_refused(kernels: tuple[int, ...], stride: int, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        MultiScalePatchEmbed(3, 8, kernels, stride)


def test_bad_maps_are_refused() -> None:
    embed = MultiScalePatchEmbed(3, 8, (4, 8), 4)
    for size in ((8, 10), (10, 8)):
        with pytest.raises(ShapeError, match=rf"a map of \({size[0]}, {size[1]}\) does not divide into patches of 4"):
            embed(maps(1, 3, *size))
    for x in (maps(1, 1, 8, 8), maps(3, 8, 8), maps(1, 3, 8, 8).long()):
        with pytest.raises(ShapeError, match=r"floating-point maps \(B, 3, H, W\)"):
            embed(x)
