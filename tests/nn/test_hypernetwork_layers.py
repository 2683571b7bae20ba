import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example

from lamina.errors import ShapeError
from lamina.nn import HyperConv2d, HyperLinear
from lamina.nn.hypernetwork_layers import per_sample_conv2d, per_sample_linear


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


EXAMPLES = [
    Example(
        "layer",
        "hyper_linear",
        {"in_features": 5, "out_features": 4, "condition_dim": 3},
        inputs=lambda: (normal(2, 5), normal(2, 3, seed=1)),
        bad={"condition_dim": 0},
    ),
    Example(
        "layer",
        "hyper_conv2d",
        {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "condition_dim": 3, "groups": 2},
        inputs=lambda: (normal(2, 2, 5, 5), normal(2, 3, seed=1)),
        bad={"groups": 3},
    ),
]


def by_hand(layer, c):
    weight = layer.weight + sum(c[k] * layer.weight_directions[k] for k in range(len(c)))
    bias = None if layer.bias is None else layer.bias + sum(c[k] * layer.bias_directions[k] for k in range(len(c)))
    return weight, bias


@pytest.mark.parametrize("size", [1, 7, 63])
@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_row_goes_through_its_own_linear_layer(size, middle, bias):
    torch.manual_seed(0)
    layer = HyperLinear(size, 5, 3, bias=bias).double()
    if bias:
        torch.nn.init.normal_(layer.bias_directions)
    x, c = normal(4, *middle, size, dtype=torch.float64), normal(4, 3, seed=1, dtype=torch.float64)
    expected = torch.stack([F.linear(x[b], *by_hand(layer, c[b])) for b in range(4)])
    torch.testing.assert_close(layer(x, c), expected)
    torch.testing.assert_close(layer(x, c[0]), F.linear(x, *by_hand(layer, c[0])))


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1)])
def test_every_image_goes_through_its_own_convolution(stride, padding, dilation, groups):
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = HyperConv2d(2, 4, 3, 3, **options).double()
    torch.nn.init.normal_(layer.bias_directions)
    x, c = normal(3, 2, 7, 7, dtype=torch.float64), normal(3, 3, seed=1, dtype=torch.float64)
    expected = torch.cat([F.conv2d(x[b : b + 1], *by_hand(layer, c[b]), **options) for b in range(3)])
    torch.testing.assert_close(layer(x, c), expected)
    torch.testing.assert_close(layer(x, c[0]), F.conv2d(x, *by_hand(layer, c[0]), **options))


def test_gradients_through_both_ways_of_computing_a_row_agree():
    torch.manual_seed(0)
    layer = HyperLinear(6, 5, 3).double()
    x, c = (
        normal(4, 6, dtype=torch.float64).requires_grad_(),
        normal(4, 3, seed=1, dtype=torch.float64).requires_grad_(),
    )
    given = (x, c, *layer.parameters())
    flat = torch.autograd.grad(layer(x, c).square().sum(), given)
    batched = torch.autograd.grad(layer(x.unsqueeze(1), c).square().sum(), given)
    for a, b in zip(flat, batched, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(layer, (x, c))


def test_no_condition_is_the_plain_layer_and_two_conditions_differ():
    torch.manual_seed(0)
    linear, conv = HyperLinear(6, 5, 3), HyperConv2d(2, 4, 3, 3)
    x, image = normal(2, 6), normal(2, 2, 5, 5)
    torch.testing.assert_close(linear(x, torch.zeros(2, 3)), F.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(conv(image, torch.zeros(3)), F.conv2d(image, conv.weight, conv.bias))
    same, c = x[:1].expand(2, -1), normal(2, 3)
    assert (linear(same, c)[0] - linear(same, c)[1]).abs().max() > 1e-2


def test_weights_start_as_spread_as_torch_s_for_conditions_of_unit_mean_square():
    torch.manual_seed(0)
    layer = HyperLinear(48, 64, 16)
    drawn = torch.stack([by_hand(layer, normal(16, seed=s))[0] for s in range(50)])
    assert abs(drawn.std().item() / torch.nn.Linear(48, 64).weight.std().item() - 1) < 0.1


def test_bf16_stays_near_float32():
    torch.manual_seed(0)
    layer, x, c = HyperLinear(63, 7, 4), normal(3, 2, 63), normal(3, 4, seed=1)
    exact = layer(x, c)
    rounded = layer.bfloat16()(x.bfloat16(), c.bfloat16())
    assert (exact - rounded.float()).abs().max() < 0.05 * exact.abs().max()


def test_the_functions_take_any_number_of_middle_dimensions():
    w = normal(2, 4, 3)
    torch.testing.assert_close(per_sample_linear(normal(2, 3), w), torch.einsum("boi,bi->bo", w, normal(2, 3)))
    kernel = normal(2, 4, 3, 1, 1)
    image = normal(2, 3, 2, 2)
    expected = torch.einsum("boi,bihw->bohw", kernel[..., 0, 0], image)
    torch.testing.assert_close(per_sample_conv2d(image, kernel), expected)


@pytest.mark.parametrize(
    ("x", "c", "sentence"),
    [
        ((2, 4), (2, 3), r"takes floating-point \(\.\.\., 5\), got torch.float32 \(2, 4\)"),
        ((2, 5), (2, 4), r"conditions \(3,\) or \(B, 3\), got \(2, 4\)"),
        ((2, 5), (3, 3), r"3 conditions for an input of shape \(2, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(x, c, sentence):
    with pytest.raises(ShapeError, match=sentence):
        HyperLinear(5, 2, 3)(torch.zeros(x), torch.zeros(c))


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"takes floating-point \(B, 2, H, W\), got torch.float32 \(2, 3, 5, 5\)"):
        HyperConv2d(2, 4, 3, 3)(torch.zeros(2, 3, 5, 5), torch.zeros(3))
    with pytest.raises(ShapeError, match="groups 3 does not divide 2 and 4"):
        HyperConv2d(2, 4, 3, 3, groups=3)
