"""Every rule alone: a function is wrapped in a module, and its map at an input is held to what it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.experiments import evidence
from lamina.experiments.harness import experiments
from lamina.verify import LinearInterpreter


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def system(function: Callable[[Tensor], Tensor], x0: Tensor, rule: Any = "secant") -> LinearInterpreter:
    found = LinearInterpreter(Of(function).eval(), x0, rule)
    torch.testing.assert_close(found.output, function(x0.clone()), rtol=0, atol=0)
    scale = float(found.output.abs().max()) or 1.0
    torch.testing.assert_close(found.apply(x0), found.output, rtol=1e-12, atol=1e-12 * scale)
    # Several probes at once, alone, and backwards: the same map.
    some, v = draw(3, *x0.shape[1:], seed=5), draw(*found.output.shape, seed=6)
    moved = found.filter(some)
    alone = torch.stack([found.filter(u[None]).reshape(moved.shape[1:]) for u in some])
    torch.testing.assert_close(alone, moved, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        (found.filter(some[:1]) * v).sum(), (some[0] * found.transpose(v)[0]).sum(), rtol=1e-9, atol=1e-10
    )
    return found


def jacobian(function: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, x0).reshape(-1, x0.numel())


X = torch.tensor([[-7.0, -3.2, -1.0, -0.4, 0.0, 1e-9, 0.3, 0.9, 2.5, 6.5]]).double()

PIECEWISE: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    torch.relu,
    lambda x: x.clone().relu_(),
    lambda x: F.relu(x.clone(), True),
    torch.ops.aten.relu,
    F.relu6,
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: F.leaky_relu_(x.clone(), 0.2),
    lambda x: F.prelu(x, torch.tensor([0.3]).double()),
    F.rrelu,
    F.hardtanh,
    lambda x: F.hardtanh(x.clone(), -2, 2, True),
    lambda x: F.threshold(x, 0.5, 3.0),
    F.hardsigmoid,
    F.hardshrink,
    F.softshrink,
    lambda x: x.clamp(-1.5, 1.5),
    lambda x: x.clamp(min=-1.5),
    lambda x: torch.clamp_max(x, 2.0),
    torch.abs,
    abs,
    torch.nan_to_num,
]
SMOOTH: list[Callable[[Tensor], Tensor]] = [
    torch.sigmoid,
    torch.tanh,
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.softplus(x, 2.0),
    F.mish,
    F.elu,
    lambda x: F.elu_(x.clone()),
    F.celu,
    F.selu,
    F.hardswish,
    F.softsign,
    F.tanhshrink,
    F.logsigmoid,
    torch.exp,
    torch.square,
    lambda x: x**2,
    lambda x: x.pow(3),
    lambda x: 2**x,
    torch.sin,
    torch.cos,
    torch.erf,
    torch.expm1,
    torch.asinh,
    lambda x: torch.log1p(x.square()),
]


@pytest.mark.parametrize("function", PIECEWISE)
def test_piecewise_linear_units_have_the_slope_of_pytorchs_backward(function: Callable[[Tensor], Tensor]) -> None:
    for rule in ("secant", "tangent"):
        found = system(function, X, rule)
        torch.testing.assert_close(found.matrix(), jacobian(function, X))


@pytest.mark.parametrize("function", SMOOTH)
def test_smooth_units_have_the_secant_and_near_zero_the_tangent(function: Callable[[Tensor], Tensor]) -> None:
    found, y = system(function, X), function(X)
    far = X.abs().flatten() > 1e-6
    gain, near = found.matrix().diagonal(), jacobian(function, X).diagonal()
    torch.testing.assert_close(gain[far], (y / X).flatten()[far])
    torch.testing.assert_close(gain[~far], near[~far])
    # What is left at x = 0 is phi(0), and nothing elsewhere.
    expected = torch.where(far, 0, function(torch.zeros_like(X)).flatten())
    torch.testing.assert_close(found.bias.flatten(), expected, atol=1e-12, rtol=1e-7)
    torch.testing.assert_close(system(function, X, "tangent").matrix(), jacobian(function, X))


def test_where_a_secant_blows_up_at_zero_it_is_kept_finite() -> None:
    x = torch.tensor([[0.0, 4.0]]).double()
    found = system(torch.sqrt, x)
    assert found.matrix().tolist() == [[0.0, 0.0], [0.0, 0.5]]


W = draw(4, 6, seed=1)
IMAGE = draw(1, 4, 5, 7, seed=2)
MASK = torch.tensor([True, False, True, True, False])

AFFINE: list[Callable[[Tensor], Tensor]] = [
    lambda x: 2 - x + 3,
    lambda x: -x / 4 + x * W[0, 0],
    lambda x: torch.rsub(x, 1.5) - (+x),
    lambda x: x.sum(1, keepdim=True) + x.mean(3, keepdim=True),
    lambda x: x.cumsum(2).flip(3).roll(1, 2),
    lambda x: F.linear(x[..., :6], W, W[:, 0]),
    lambda x: x[..., :6] @ W.T,
    lambda x: torch.addmm(W, W[:, :4], x[0, 0, :4, :6]),
    lambda x: torch.einsum("bchw,ck->bkhw", x, W),
    lambda x: F.conv2d(x, IMAGE.expand(3, 4, 5, 7)[:, :, :3, :3], padding=1, stride=2),
    lambda x: F.conv_transpose2d(x, IMAGE.permute(1, 0, 2, 3)[:, :, :2, :2], stride=2),
    lambda x: F.conv1d(x.flatten(2), IMAGE[:, :, 0, :3]),
    lambda x: F.avg_pool2d(x, 2) * 2,
    lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", align_corners=True),
    lambda x: F.pad(x, (1, 2), value=3.0),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    lambda x: F.pixel_shuffle(x, 2),
    lambda x: F.channel_shuffle(x, 2),
    lambda x: F.fold(F.unfold(x, 3), (5, 7), 3),
    lambda x: F.grid_sample(x, IMAGE[:, :2].permute(0, 2, 3, 1) / 3, align_corners=False),
    lambda x: F.batch_norm(x, W[0, :4], W[1, :4].exp(), W[2, :4], W[3, :4]),
    lambda x: torch.cat([x, IMAGE, torch.ones_like(x)], 1),
    lambda x: torch.stack([x, 2 * x]).movedim(0, 1).flatten(1, 2),
    lambda x: torch.cat(x.split(2, 1)[::-1], 1) + torch.cat(x.chunk(2, 1), 1),
    lambda x: torch.stack([row * i for i, row in enumerate(x[0])])[None],
    lambda x: x.view(1, -1).reshape(x.shape[0], 7, -1).transpose(1, 2).contiguous(),
    lambda x: x.permute(0, 2, 3, 1).unsqueeze(1).expand(1, 2, 5, 7, 4).squeeze(0),
    lambda x: x.unflatten(1, (2, 2)).repeat(1, 1, 2, 1, 1),
    lambda x: x[:, [2, 0]] + x[:, 1:3],
    lambda x: x[:, :, MASK],
    lambda x: x.masked_fill(MASK[:, None], 2.0),
    lambda x: torch.where(MASK[:, None], x, IMAGE),
    lambda x: x.gather(3, torch.tensor([[[[3, 1]]]]).expand(1, 4, 5, 2)),
    lambda x: x.index_select(1, torch.tensor([3, 3])),
    lambda x: torch.zeros(1, 2, 5, 7).double().index_add(1, torch.tensor([0, 1, 1, 0]), x),
    lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2.0, s=(5, 7)),
    lambda x: x.tril().diagonal(dim1=2, dim2=3),
    lambda x: F.dropout(x, 0.5, training=False).detach().data.float().double(),
    lambda x: x.mT.T.mH.real if x.dim() == 2 else x.mT,
    lambda x: torch.lerp(x, IMAGE, 0.25),
    lambda x: F.embedding(torch.tensor([[0, 2]]), x[0, 0]),
]


@pytest.mark.parametrize("function", AFFINE)
def test_what_is_affine_is_its_own_map(function: Callable[[Tensor], Tensor]) -> None:
    x0, u, zero = draw(1, 4, 5, 7), draw(1, 4, 5, 7, seed=4), torch.zeros(1, 4, 5, 7).double()
    found = system(function, x0)
    torch.testing.assert_close(found.bias, function(zero), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.apply(u), function(u), rtol=1e-6, atol=1e-6)


def write_into_a_buffer(x: Tensor) -> Tensor:
    room = torch.ones(1, 4, 5, 9).double()
    # First through a view of what no probe has reached yet.
    room[..., 0].copy_(x[..., 0])
    room[..., 1:8] = x
    return room


def write_through_a_view(x: Tensor) -> Tensor:
    x = x * 1.0
    x[:, :2].relu_()
    x.view(-1)[3:9].mul_(2).add_(1)
    return x


def write_into_a_part(x: Tensor) -> Tensor:
    x = x * 1.0
    left, right = x.chunk(2, 1)
    left += right
    left.relu_()
    return x


def view_made_before_it_was_written(x: Tensor) -> Tensor:
    room = torch.zeros(2, 4, 5, 7).double()
    view = room[1]
    room[1:] = x
    return view * 2 + room[0]


def change_the_input(x: Tensor) -> Tensor:
    return x.mul_(3).sub_(1).transpose_(1, 2)


def constants_in_place(x: Tensor) -> Tensor:
    x = x + 0
    x[:, 0].zero_()
    x[:, 1] = 5.0
    return x.clamp_(min=-0.5)


@pytest.mark.parametrize(
    "function",
    [write_into_a_buffer, write_through_a_view, view_made_before_it_was_written, change_the_input, constants_in_place],
)
def test_what_is_written_in_place_is_followed_through_all_views(function: Callable[[Tensor], Tensor]) -> None:
    x0 = draw(1, 4, 5, 7)
    found = system(function, x0)
    # Piecewise linear: differences are exact, and autograd would not let all of these be written into.
    steps, y = torch.eye(140).double().view(-1, 1, 4, 5, 7) * 1e-7, function(x0.clone())
    columns = [(function(x0 + step) - y).flatten() / 1e-7 for step in steps]
    torch.testing.assert_close(found.matrix(), torch.stack(columns, 1), atol=1e-6, rtol=0)


def test_parts_of_a_split_may_be_written_into_as_evaluation_allows() -> None:
    x0 = draw(1, 4, 5, 7)
    found = system(write_into_a_part, x0)
    expected = jacobian(lambda x: torch.cat([F.relu(x[:, :2] + x[:, 2:]), x[:, 2:]], 1), x0)
    torch.testing.assert_close(found.matrix(), expected)


CHOICES: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.max_pool2d(x, 2, padding=1),
    lambda x: F.max_pool2d(x, 3, 2, 1, 1, ceil_mode=True),
    lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    lambda x: torch.max_pool2d(x, 2),
    lambda x: F.max_pool1d(x.flatten(2), 3, stride=1),
    lambda x: F.max_pool3d(x, 2),
    lambda x: F.adaptive_max_pool2d(x, (2, 3)),
    lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=(5, 7)),
    lambda x: x.max(1).values,
    lambda x: x.amax((2, 3)),
    lambda x: x.topk(2, 1).values,
    lambda x: x.sort(3, descending=True)[0],
    lambda x: torch.maximum(x, x.flip(1)),
    lambda x: torch.max(x, IMAGE),
    lambda x: x.max().reshape(1, 1),
    lambda x: x.median(3).values,
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x * (x > 0.3),
    lambda x: x[:, x.sum((0, 2, 3)).argmax()],
]


@pytest.mark.parametrize("function", CHOICES)
def test_choices_are_those_that_were_made(function: Callable[[Tensor], Tensor]) -> None:
    x0 = draw(1, 4, 5, 7)
    found = system(function, x0)
    expected = jacobian(function, x0)
    torch.testing.assert_close(found.matrix(), expected)


def test_ties_of_a_pool_go_to_the_first() -> None:
    x = torch.ones(1, 1, 2, 2)
    assert LinearInterpreter(nn.MaxPool2d(2).eval(), x).row(0).flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


A = draw(1, 3, 4, seed=7)


def test_the_gate_of_a_product() -> None:
    x0, u = draw(1, 3, 4), draw(1, 3, 4, seed=8)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        # The operand that broadcasts stays, on either side.
        (lambda x: x * x.mean(2, keepdim=True), u * x0.mean(2, keepdim=True)),
        (lambda x: x.mean(1, keepdim=True) * x, u * x0.mean(1, keepdim=True)),
        # Of equals what came straight from a unit, on either side.
        (lambda x: (x + A) * x.sigmoid(), u * x0.sigmoid()),
        (lambda x: torch.tanh(x) * (x + A), u * x0.tanh()),
        # Else the first.
        (lambda x: (x + A) * (x * 2), (x0 + A) * (u * 2)),
        (lambda x: x * x, x0 * u),
        (lambda x: F.glu(x, 2), u[..., :2] * x0[..., 2:].sigmoid()),
        # Denominators, norms and normalisers stay.
        (lambda x: x / x.exp().sum(2, keepdim=True), u / x0.exp().sum(2, keepdim=True)),
        (lambda x: F.normalize(x, dim=2), u / x0.norm(dim=2, keepdim=True)),
        (lambda x: F.log_softmax(x, 2), u),
        (lambda x: 1 / x + x, u),
        # Products of matrices.
        (lambda x: x.mT @ x, x0.mT @ u),
        (lambda x: torch.softmax(x @ x.mT, -1) @ x, torch.softmax(x0 @ x0.mT, -1) @ u),
        (lambda x: torch.einsum("bij,bkj->bik", x, x), x0 @ u.mT),
        (lambda x: F.linear(A, x[0]), F.linear(A, u[0])),
        (lambda x: F.linear(x, x[0] + 1), F.linear(u, x0[0] + 1)),
        (lambda x: torch.addcmul(x, x, x + A), u + x0 * u),
    ]
    for function, expected in cases:
        found = system(function, x0)
        moved = found.filter(u)
        torch.testing.assert_close(moved, expected.expand_as(moved))


def test_statistics_of_norms_stay() -> None:
    x, u = draw(1, 4, 3, 5) * 2 + 1, draw(1, 4, 3, 5, seed=9)
    w, b = draw(4, seed=10), draw(4, seed=11)
    last, image = (3,), (-1, 1, 1)
    mean, deviation = x.mean(3, keepdim=True), (x.var(3, correction=0, keepdim=True) + 1e-5).sqrt()
    flat = x.view(1, 2, -1)
    group = [s.repeat_interleave(2, 1).view(1, 4, 1, 1) for s in (flat.mean(2), flat.var(2, correction=0))]
    channel = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    one = x[..., :4].contiguous()
    rms = torch.rsqrt(one.square().mean(3, keepdim=True) + 1e-3)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = [
        (lambda x: F.layer_norm(x, (5,)), u / deviation, -mean / deviation),
        (
            lambda x: F.group_norm(x, 2, w, b, 1e-3),
            u * w.view(image) / (group[1] + 1e-3).sqrt(),
            b.view(image) - group[0] * w.view(image) / (group[1] + 1e-3).sqrt(),
        ),
        (
            lambda x: F.instance_norm(x, weight=w, bias=b),
            u * w.view(image) / (channel[1] + 1e-5).sqrt(),
            b.view(image) - channel[0] * w.view(image) / (channel[1] + 1e-5).sqrt(),
        ),
        (
            lambda x: F.batch_norm(x, None, None, w, b, training=True),
            u * w.view(image) / (channel[1] + 1e-5).sqrt(),
            b.view(image) - channel[0] * w.view(image) / (channel[1] + 1e-5).sqrt(),
        ),
        (
            lambda x: torch.batch_norm(x, w, b, w, w.exp(), False, 0.1, 1e-5, False),
            u * (w / (w.exp() + 1e-5).sqrt()).view(image),
            F.batch_norm(0 * x, w, w.exp(), w, b),
        ),
        (
            lambda x: F.instance_norm(x, w, w.exp(), use_input_stats=False),
            u / (w.exp() + 1e-5).sqrt().view(image),
            F.batch_norm(0 * x, w, w.exp()),
        ),
        (lambda x: F.rms_norm(x[..., :4], (4,), w, 1e-3), u[..., :4] * rms * w, torch.zeros_like(one)),
        # Written out, they are the same.
        (
            lambda x: (x - x.mean(3, keepdim=True)) / (x.var(last, correction=0, keepdim=True) + 1e-5).sqrt(),
            (u - u.mean(3, keepdim=True)) / deviation,
            torch.zeros_like(x),
        ),
    ]
    for function, moved, bias in cases:
        found = system(function, x)
        torch.testing.assert_close(found.filter(u), moved)
        torch.testing.assert_close(found.bias, bias.expand_as(found.bias), atol=1e-9, rtol=1e-9)


def test_attention_reads_the_probe_with_the_weights_of_x0() -> None:
    x, u = draw(1, 5, 8), draw(1, 5, 8, seed=12)
    heads = lambda x: x.unflatten(2, (2, 4)).transpose(1, 2)  # noqa: E731
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    weights = torch.softmax((heads(x) @ heads(x).mT / 2).masked_fill(~mask, -torch.inf), -1)
    expected = weights @ heads(u)
    causal = lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True)  # noqa: E731
    masked = lambda x: F.scaled_dot_product_attention(heads(x), heads(x), value=heads(x), attn_mask=mask)  # noqa: E731
    for function in (causal, masked):
        torch.testing.assert_close(system(function, x).filter(u), expected)
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    for options in ({"need_weights": False}, {"average_attn_weights": False}):
        found = system(lambda x, o=options: layer(x, x, x, **o)[0], x)  # type: ignore[misc]
        torch.testing.assert_close(found.apply(u), layer(x, x, u)[0].detach())
    # Only the values move: keys and queries that depend on the input are all bias.
    fixed = system(lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(u)), x)
    assert not fixed.filter(u).any()


def test_what_ends_in_a_softmax_is_all_bias() -> None:
    x = draw(1, 4)
    found = system(lambda x: torch.softmax(x, 1), x)
    assert torch.equal(found.bias, torch.softmax(x, 1))
    assert not found.matrix().any()
    assert not found.row(0).any()


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2 + torch.relu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_function_with_a_backward_of_its_own_is_looked_into() -> None:
    x = draw(1, 4)
    assert torch.equal(system(Custom.apply, x).matrix(), torch.diag(2.0 + (x[0] > 0)))


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda x: x.long(), "no linear rule for long in Of, it gives whole numbers"),
        (lambda x: x.to(torch.int32), "to in Of makes whole numbers"),
        (lambda x: x // 2, "it gives whole numbers"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), r"no linear rule for div in Of for this call \(it rounds\)"),
        (lambda x: x * float(x.sum()), "__float__ in Of takes a value"),
        (lambda x: x * (x > 0).sum().item(), "item in Of takes a value"),
        (lambda x: torch.add(x, 1, out=torch.empty(1, 4).double()), "writes into a tensor that was there before"),
        (lambda x: F.prelu(x, x[0, :1]), "another argument than the first depends on the input"),
        (lambda x: x.clamp(min=torch.zeros(3, 4).double()), "no linear rule for clamp in Of for this call"),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5), "it drops at random"),
    ],
)
def test_what_has_no_linear_part_is_refused(function: Callable[[Tensor], Tensor], sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        LinearInterpreter(Of(function).eval(), draw(1, 4))


def test_the_evidence_is_of_every_rule() -> None:
    behind = evidence.code_hashes(experiments()["linear-interpreter"])
    assert {
        f"lamina.verify.linear_scopes.{part}" for part in ("call", "units", "products", "selections", "table")
    } <= set(behind)
