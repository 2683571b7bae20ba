from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.contract.foreign import HomeBlock
from torch import Tensor, nn

from lamina.batches import call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.models import MetaFormer, ResNet, Transformer, VisionTransformer
from lamina.rewrite import Fold, rewrite
from lamina.verify import LinearInterpreter, affine_parts, linear_interpreter


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class UNet(nn.Module):
    """Down by a stride, up by a transposed convolution, joined; instance norm; the input is added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.down, self.up = nn.Conv2d(8, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu_(self.norm(self.first(x)))
        deep = self.up(torch.tanh(self.down(wide)))
        return self.last(torch.cat([wide, deep], 1)) + x


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 4 * i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return F.avg_pool2d(x, 2).flatten(1).mean(1, keepdim=True)


class MobileBlock(nn.Module):
    """As in MobileNetV3: hard swish, written out, and a gate for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.gate = nn.Conv2d(12, 12, 3, 2, 1, groups=12), nn.Conv2d(12, 12, 1)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(self.norm(self.wide(x))), inplace=True)
        x = x * F.hardsigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = x * F.relu6(x + 3) / 6
        return self.out(F.dropout(x.mean((2, 3)), training=self.training))


def vgg(bias: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(1, 6, 3, padding=1, bias=bias), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.LeakyReLU(), nn.AdaptiveMaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5, bias=bias))


def espcn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.PReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.PixelShuffle(2))


def hugging_face_resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu"), 1)


IMAGE, GREY, VECTORS = (1, 3, 9, 9), (1, 1, 7, 7), (1, 5, 16)
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: ResNet((1, 1), (6, 8), stem="small", classes=5), IMAGE),
    "vgg": (vgg, GREY),
    "densenet": (Dense, (1, 3, 6, 6)),
    "unet": (UNet, (1, 3, 8, 8)),
    "espcn": (espcn, GREY),
    "mobilenet": (MobileBlock, IMAGE),
    "vit": (lambda: VisionTransformer(depth=1, width=16, heads=2, image=8, patch=4, classes=5), (1, 3, 8, 8)),
    "poolformer": (lambda: MetaFormer((1, 1), (8, 8), classes=5, image=8, patch=(3, 1, 1)), (1, 3, 8, 8)),
    "encoder": (encoder, (1, 3, 8)),
    "home-made": (lambda: HomeBlock(16), VECTORS),
    "transformers resnet": (hugging_face_resnet, (1, 3, 32, 32)),
}


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.to(dtype).eval()


def given(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    make, shape = ZOO[name]
    return made(make, dtype), draw(*shape).to(dtype)


def plain(model: nn.Module, x: Tensor) -> Tensor:
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return logits(call(model, {"inputs": x}))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@pytest.mark.parametrize("name", ZOO)
def test_the_map_gives_the_networks_output_and_is_linear_with_an_adjoint(name: str) -> None:
    for dtype, close in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model, x0 = given(name, dtype)
        before = copy.deepcopy(model.state_dict())
        system = linear_interpreter(model, x0)
        y = plain(model, x0)
        assert torch.equal(system.output, y)
        scale = float(y.abs().max())
        assert float((system.apply(x0) - y).abs().max()) <= close * scale
        assert system.check()["consistency"] <= close
        assert system.check()["unknown"] == []
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    # In float64 from here on.
    x, y = draw(2, *x0.shape[1:], seed=1).double(), draw(2, *system.output.shape[1:], seed=2).double()
    r, moved = system.bias, system.filter(x)
    mixed = system.apply((2 * x[0] - 3 * x[1])[None])
    torch.testing.assert_close(mixed - r, (2 * moved[0] - 3 * moved[1])[None], rtol=1e-10, atol=1e-10 * scale)
    assert float((plain(model, 2 * x0) - r - 2 * (plain(model, x0) - r)).abs().max()) > 1e-6 * scale
    torch.testing.assert_close((moved * y).sum(), (x * system.transpose(y)).sum(), rtol=1e-10, atol=1e-10 * scale)
    torch.testing.assert_close(torch.cat([system.filter(x[:1]), system.filter(x[1:])]), moved)
    torch.testing.assert_close(torch.cat([system.transpose(y[:1]), system.transpose(y[1:])]), system.transpose(y))


@pytest.mark.parametrize("name", ["vgg", "espcn", "densenet"])
def test_of_a_piecewise_linear_network_the_matrix_is_the_jacobian(name: str) -> None:
    model, x0 = given(name)
    system = LinearInterpreter(model, x0)
    inputs, outputs = x0.numel(), system.output.numel()
    jacobian = torch.func.jacrev(model)(x0).detach().reshape(outputs, inputs)
    torch.testing.assert_close(system.matrix(), jacobian, rtol=1e-10, atol=1e-12)
    rows = torch.stack([system.row(i).flatten() for i in range(min(outputs, 9))])
    columns = torch.stack([system.column(j).flatten() for j in range(7)], 1)
    torch.testing.assert_close(rows, jacobian[:9], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(columns, jacobian[:, :7], rtol=1e-10, atol=1e-12)
    operator = system.operator()
    assert operator.shape == (outputs, inputs)
    np.testing.assert_allclose(operator @ np.eye(inputs), jacobian, atol=1e-12)
    np.testing.assert_allclose(operator.T @ np.eye(outputs)[:, :3], jacobian.T[:, :3], atol=1e-12)
    np.testing.assert_allclose(operator @ np.arange(inputs), jacobian.numpy() @ np.arange(inputs), atol=1e-9)


@pytest.mark.parametrize("rule", ["secant", "tangent"])
def test_smooth_units_give_the_jacobian_by_their_tangent_alone(rule: Any) -> None:
    model = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)))
    x0 = draw(1, 4).double()
    jacobian = torch.func.jacrev(model)(x0).detach().reshape(3, 4)
    system = LinearInterpreter(model, x0, rule)
    assert torch.allclose(system.matrix(), jacobian, rtol=1e-10) == (rule == "tangent")
    torch.testing.assert_close(system.apply(x0), model(x0).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["secant", "tangent"])
def test_frozen_statistics_are_not_the_jacobian_by_any_rule(rule: Any) -> None:
    model, x0 = made(lambda: nn.InstanceNorm2d(2)), draw(1, 2, 3, 3).double()
    jacobian = torch.func.jacrev(model)(x0).reshape(18, 18)
    matrix = LinearInterpreter(model, x0, rule).matrix()
    assert float((matrix - jacobian).abs().max()) > 0.1
    deviation = x0.var((2, 3), correction=0).add(1e-5).sqrt().repeat_interleave(9)
    torch.testing.assert_close(matrix, torch.diag(1 / deviation))


def test_a_network_of_two_units_by_hand() -> None:
    net = made(lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        net[0].bias.copy_(torch.tensor([0.5, -9.0]))
        net[2].weight.copy_(torch.tensor([[2.0, 7.0]]))
        net[2].bias.copy_(torch.tensor([-1.0]))
    # The first unit has 1 + 2 + 0.5, the second 3 - 1 - 9 and is off: F = 2 * (1, 2), r = 2 * 0.5 - 1.
    system = LinearInterpreter(net, torch.ones(1, 2).double())
    assert system.matrix().tolist() == [[2.0, 4.0]]
    assert system.bias.tolist() == [[0.0]]
    assert system.output.tolist() == [[6.0]]
    assert system.contributions(0).tolist() == [[2.0, 4.0]]


def test_without_biases_nothing_remains_and_a_last_bias_remains_alone() -> None:
    x0 = draw(*GREY).double()
    model = made(lambda: vgg(bias=False))
    system = LinearInterpreter(model, x0)
    assert not system.bias.any()
    torch.testing.assert_close(system.filter(x0), system.output, rtol=1e-12, atol=0)
    # Without biases a vote is the input times the gradient.
    x = x0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, 3], x)
    torch.testing.assert_close(system.contributions(3), gradient * x0)
    model[-1].bias = nn.Parameter(draw(5).double())
    torch.testing.assert_close(LinearInterpreter(model, x0).bias, model[-1].bias.detach()[None], rtol=1e-12, atol=0)


def test_a_linear_network_is_its_own_matrix_wherever_it_is_looked_at() -> None:
    net = made(lambda: nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 1)))
    matrix, bias = net[1].weight @ net[0].weight, net[1].weight @ net[0].bias + net[1].bias
    for x0 in (draw(1, 7).double(), torch.zeros(1, 7).double(), draw(7).double()):
        system = LinearInterpreter(net, x0)
        torch.testing.assert_close(system.matrix(), matrix.detach())
        torch.testing.assert_close(system.bias.flatten(), bias.detach())
        assert system.row(0).shape == x0.shape


@pytest.mark.parametrize(("mode", "kernel"), [("bilinear", [0.25, 0.75, 0.75, 0.25]), ("bicubic", None)])
def test_a_column_of_an_upsampling_is_its_kernel(mode: str, kernel: list[float] | None) -> None:
    system = LinearInterpreter(made(lambda: nn.Upsample(scale_factor=2, mode=mode)), draw(1, 1, 9, 9).double())
    column = system.column((0, 4, 4))[0, 0]
    if kernel is None:
        # Keys' kernel with a = -0.75 at the distances of the eight nearest pixels.
        a, t = -0.75, torch.tensor([1.75, 1.25, 0.75, 0.25, 0.25, 0.75, 1.25, 1.75]).double()
        near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        line = torch.where(t <= 1, near, far)
    else:
        line = torch.tensor(kernel).double()
    start = 9 - len(line) // 2
    expected = F.pad(torch.outer(line, line), [start, 18 - start - len(line)] * 2)
    torch.testing.assert_close(column, expected)


def test_the_singular_triples_are_those_of_the_matrix() -> None:
    model, x0 = given("vgg")
    system = LinearInterpreter(model, x0)
    u, values, vt = np.linalg.svd(system.matrix().numpy(), full_matrices=False)
    for method in ("block", "lanczos"):
        found = system.svd(3, method)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.values, values[:3], rtol=1e-6)
        assert found.left.shape == (3, 5)
        assert found.right.shape == (3, 1, 7, 7)
        np.testing.assert_allclose(np.abs((found.left.numpy() * u.T[:3]).sum(1)), 1, atol=1e-4)
        np.testing.assert_allclose(np.abs((found.right.flatten(1).numpy() * vt[:3]).sum(1)), 1, atol=1e-4)


def test_votes_and_bias_add_up_to_each_logit() -> None:
    model, x0 = given("mobilenet", torch.float32)
    system = LinearInterpreter(model, x0)
    for i in range(5):
        total = system.contributions(i).sum() + system.bias[0, i]
        torch.testing.assert_close(total, system.output[0, i], rtol=1e-5, atol=1e-6)


def test_many_inputs_are_split_at_once_each_by_its_own_system() -> None:
    for name in ("vgg", "unet", "home-made"):
        model, x = given(name)
        x = torch.cat([x, draw(*x.shape, seed=1).double()])
        parts = affine_parts(model, x)
        torch.testing.assert_close(parts.filtered + parts.bias, plain(model, x))
        for i in range(2):
            torch.testing.assert_close(parts.bias[i : i + 1], LinearInterpreter(model, x[i : i + 1]).bias)


def test_a_language_model_is_looked_at_from_its_embeddings_on() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).eval()
    x = model.get_input_embeddings()(torch.tensor([[3, 1, 4, 1]])).detach()
    system = LinearInterpreter(model, {"inputs_embeds": x, "attention_mask": torch.ones(1, 4)})
    assert system.check()["consistency"] < 1e-5
    # The last token's logits see every token, the first one's only itself.
    assert system.row((3, 7)).abs().sum(-1).gt(0).tolist() == [[True] * 4]
    assert system.row((0, 7)).abs().sum(-1).gt(0).tolist() == [[True, False, False, False]]


def test_a_rewrite_that_keeps_the_function_keeps_every_vote() -> None:
    model, x0 = given("resnet")
    before = LinearInterpreter(model, x0)
    votes, matrix = before.contributions(2), before.matrix()
    folded = rewrite(model, Fold()).eval()
    after = LinearInterpreter(folded, x0)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(after.contributions(2), votes)
    torch.testing.assert_close(after.matrix(), matrix)
    with pytest.raises(LaminaError, match="is random, or was changed since"):
        folded.head.weight.data.mul_(2)
        after.filter(x0)


class LastFirst(nn.Module):
    """Gives pixels with their channels last, as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)


def test_inputs_and_outputs_may_lie_in_memory_in_any_order() -> None:
    model, x = made(LastFirst), draw(1, 3, 5, 4).double()
    plainly = LinearInterpreter(model, x)
    assert not plainly.output.is_contiguous()
    jacobian = torch.func.jacrev(model)(x).detach().reshape(12, 60)
    for x0 in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ):
        system = LinearInterpreter(model, x0)
        # Places, and flat indices, are those of the shape, whatever the memory.
        torch.testing.assert_close(system.row((1, 0, 1)).flatten(), jacobian[5])
        torch.testing.assert_close(system.row(5).flatten(), jacobian[5])
        torch.testing.assert_close(system.column((2, 1, 3)).flatten(), jacobian[:, 47])
        torch.testing.assert_close(
            system.contributions(-1).sum() + system.bias.flatten()[-1], system.output[0, 2, 1, 1]
        )
        torch.testing.assert_close(system.matrix(), jacobian)


class Summed(nn.Module):
    """Its first output is 0 but for rounding, which is another one every time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([x[:, :1] * 0 + 3e-6 * self.calls, x])


def test_rounding_of_an_output_near_0_is_not_taken_for_chance() -> None:
    x = 30 * torch.ones(1, 1)
    system = LinearInterpreter(Summed().eval(), x)
    assert system.row(1).tolist() == [[1.0]]
    # Where an output is not finite, the others are still compared.
    ends = nn.Sequential(nn.Linear(3, 4)).eval()
    ends[0].bias.data[:2] = torch.tensor([torch.inf, torch.nan])
    system = LinearInterpreter(ends, draw(1, 3))
    assert torch.equal(system.row(2), ends[0].weight.detach()[2:3])
    ends[0].bias.data[3] += 1
    with pytest.raises(LaminaError, match="is random, or was changed since"):
        system.row(2)


def test_half_precision_and_autocast() -> None:
    model, x0 = given("unet", torch.bfloat16)
    system = LinearInterpreter(model, x0)
    assert system.apply(x0).dtype == torch.bfloat16
    assert system.check()["consistency"] < 0.05
    model, x0 = given("vgg", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert LinearInterpreter(model, x0).check()["consistency"] < 0.02
    with torch.inference_mode():
        assert LinearInterpreter(model, x0).row(0).any()


def test_nothing_is_left_in_the_model_and_an_error_leaves_nothing_either() -> None:
    model, x0 = given("vgg")
    model.append(nn.Softsign()).append(Round()).eval()
    kept = {n: (dict(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    with pytest.raises(LaminaError, match="whole numbers"):
        LinearInterpreter(model, x0, rules={nn.Softsign: lambda unit, part0, part1, affine: affine(1.0, unit(part0))})
    for name, module in model.named_modules():
        assert (dict(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)) == kept[name]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.relu(torch.ones(())) == 1


class Round(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if (x > 0).any() else x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape)


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(1, 3)


class Distances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(x)


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.Sequential(nn.Identity(), Round()), r"no linear rule for round in 1 \(Round\), it gives whole numbers"),
    (lambda: nn.Sequential(Distances()), r"no linear rule for special_i0 in 0 \(Distances\): .*strict=False"),
    (Branch, r"__bool__ in Branch takes a value of the input's out of torch.*strict=False"),
    (Numpy, "numpy in Numpy takes a value of the input's out of torch"),
    (Constant, "output of Constant does not depend on this input"),
    (lambda: nn.LSTM(7, 2, batch_first=True), r"no linear rule for lstm in LSTM"),
    (lambda: nn.Sequential(nn.Flatten(), MonteCarlo()), r"dropout in 1 \(MonteCarlo\) drops at random although"),
]


class MonteCarlo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, True)


@pytest.mark.parametrize(("make", "sentence"), REFUSED)
def test_what_cannot_be_linear_is_named_with_its_place(make: Callable[[], nn.Module], sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        LinearInterpreter(make().eval(), draw(1, 7, 7))


def test_bad_input() -> None:
    net, x = nn.Sequential(nn.Linear(3, 2)).eval(), draw(1, 3)
    with pytest.raises(ShapeError, match=r"x0 is \(2, 3\): take x0\[i : i \+ 1\].*affine_parts"):
        LinearInterpreter(net, draw(2, 3))
    with pytest.raises(LaminaError, match=r"floating-point input, got inputs torch.int64 .*inputs_embeds"):
        LinearInterpreter(net, torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(LaminaError, match=r"'Sequential' is in training mode: call model\.eval"):
        LinearInterpreter(nn.Sequential(nn.Linear(3, 2)), x)
    with pytest.raises(LaminaError, match="'0' is in training mode"):
        mixed = nn.Sequential(nn.Dropout()).eval()
        mixed[0].train()
        LinearInterpreter(mixed, x)
    with pytest.raises(LaminaError, match="Sequential is compiled"):
        compiled = nn.Sequential(nn.Linear(3, 2)).eval()
        # As `module.compile()` leaves it.
        compiled._compiled_call_impl = compiled.forward
        LinearInterpreter(compiled, x)
    with pytest.raises(LaminaError, match="got 'scant'; did you mean 'secant'"):
        LinearInterpreter(net, x, "scant")  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="eps must be above 0, got 0"):
        LinearInterpreter(net, x, eps=0)
    with pytest.raises(LaminaError, match="is random, or was changed since"):
        LinearInterpreter(Noise().eval(), x).apply(x)
    system = LinearInterpreter(net, x)
    with pytest.raises(ShapeError, match=r"x must have the shape of x0, \(1, 3\), or be \(count, 3\); got \(1, 4\)"):
        system.apply(draw(1, 4))
    with pytest.raises(ShapeError, match=r"v must have the shape of the output, \(1, 2\)"):
        system.transpose(draw(1, 3))
    with pytest.raises(ShapeError, match=r"no output 2: there are 2, of shape \(2,\)"):
        system.row(2)
    with pytest.raises(ShapeError, match=r"no input \(0, 1\): there are 3"):
        system.column((0, 1))
    with pytest.raises(LaminaError, match="2 x 3 elements, more than max_elements=5"):
        system.matrix(max_elements=5)
    with pytest.raises(LaminaError, match=r"k must be 1\.\.2"):
        system.svd(3)


def test_without_strictness_the_tangent_is_taken_and_said() -> None:
    model, x0 = nn.Sequential(nn.Linear(4, 3), Distances()).double().eval(), draw(1, 4).double()
    with pytest.warns(UserWarning, match=r"special_i0 in 1 \(Distances\) has no linear rule: its tangent"):
        system = LinearInterpreter(model, x0, strict=False)
    with pytest.warns(UserWarning, match="its tangent"):
        found = system.check()
    assert found["unknown"] == ["special_i0 in 1 (Distances)"]
    assert found["consistency"] < 1e-12
    with pytest.warns(UserWarning, match="its tangent"):
        matrix = system.matrix()
    torch.testing.assert_close(matrix, torch.func.jacrev(model)(x0).detach().reshape(3, 4))
    with pytest.warns(UserWarning, match="only what it did at x0"):
        branch = LinearInterpreter(Branch().eval(), torch.ones(1, 2), strict=False)
    with pytest.warns(UserWarning, match="only what it did at x0"):
        matrix = branch.matrix()
    assert matrix.tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_a_user_may_give_rules_for_functions_and_for_modules() -> None:
    model, x0 = nn.Sequential(nn.Linear(4, 3), Distances(), nn.Tanh()).double().eval(), draw(1, 4).double()
    seen = []

    def scope(unit: Callable[[Tensor], Tensor], part0: Tensor, part1: Tensor, affine: Callable[..., Tensor]) -> Tensor:
        seen.append((part0, part1.shape))
        return affine(unit(part0) / part0)

    by_function = LinearInterpreter(model, x0, rules={torch.special.i0: scope, torch.tanh: lambda u, a, b, c: c(0, 1)})
    assert by_function.bias.tolist() == [[1.0, 1.0, 1.0]]
    assert not by_function.matrix().any()
    by_module = LinearInterpreter(model, x0, rules={Distances: scope})
    assert torch.equal(seen[0][0], model[0](x0))
    assert all(shape == (1, 3) for _, shape in seen)
    torch.testing.assert_close(by_module.apply(x0), model(x0).detach())
    h = model[0](x0).detach()
    gain = torch.special.i0(h) / h * model(x0).detach() / torch.special.i0(h)
    torch.testing.assert_close(by_module.matrix(), gain.T * model[0].weight.detach())
    with pytest.raises(LaminaError, match=r"rule for Distances must return part 1 of the output, \(1, 3\), .* \(3,\)"):
        LinearInterpreter(model, x0, rules={Distances: lambda unit, part0, part1, affine: part1[0]})


def test_the_units_are_listed_with_their_place_and_gain() -> None:
    model, x0 = given("vgg")
    units = LinearInterpreter(model, x0).units()
    assert [(u.path, u.function) for u in units] == [("1 (ReLU)", "relu"), ("4 (LeakyReLU)", "leaky_relu")]
    x = torch.tensor([[1e-3, 2.0]])
    found = LinearInterpreter(nn.Sigmoid().eval(), x).check()
    assert found["max_gain"] == pytest.approx(float(torch.sigmoid(x[0, 0]) / 1e-3))


def test_a_transformer_of_ours_reads_embeddings_through_a_module_of_ones_own() -> None:
    class Behind(nn.Module):
        """A decoder's blocks and head, from the stream on."""

        def __init__(self, model: Transformer) -> None:
            super().__init__()
            self.blocks, self.norm, self.head = model.blocks, model.final_norm, model.head

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = Behind(Transformer(depth=1, width=8, heads=2, vocabulary=11, context=6)).double().eval()
    system = LinearInterpreter(model, draw(1, 6, 8).double())
    assert system.check()["consistency"] < 1e-12
    assert system.row((0, 3))[0, 1:].abs().max() == 0
