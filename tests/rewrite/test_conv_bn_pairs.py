from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.rewrite.batch_norms import drawn, with_statistics
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lamina.errors import AnatomyError, LaminaError
from lamina.rewrite import ConvBN, rewrite
from lamina.rewrite.conv_bn import ConvBNBlock


class HomeMade(nn.Module):
    """Looks at values on its way: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm_a = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.tapped, self.norm_b = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.last, self.norm_c = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().sum() == 0:
            return x
        x = F.relu(self.norm_a(self.first(x)))
        y = self.tapped(x)
        x = F.relu(self.norm_b(y) + y)
        return self.norm_c(self.last(x.mean((2, 3))))


class Twice(nn.Module):
    """One convolution with two norms' worth of use, in a few ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv, self.norm = way, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.between = {"dropout": nn.Dropout(), "activation": nn.ReLU(), "inplace": nn.ReLU(inplace=True)}.get(way)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.between is not None:
            return self.norm(self.between(y))
        if self.way == "functional":
            return self.norm(F.dropout(y, 0.5, self.training))
        if self.way == "in_training":
            return self.norm(y * torch.rand(()) if self.training else y)
        if self.way == "method":
            return self.norm(y.relu_())
        if self.way == "tap":
            return self.norm(y) + y
        if self.way == "listed":
            return torch.cat([self.norm(y), y])
        if self.way == "returned":
            return {"normed": self.norm(y), "map": y}
        if self.way == "layer_twice":
            return self.norm(self.conv(y))
        if self.way == "norm_twice":
            return self.norm(self.norm(y))
        assert self.way == "view"
        return self.norm(y.view(y.shape))


WAYS = [
    "functional",
    "in_training",
    "dropout",
    "activation",
    "inplace",
    "method",
    "tap",
    "listed",
    "returned",
    "layer_twice",
    "norm_twice",
    "view",
]


class Untraceable(nn.Module):
    """Runs a model that torch.fx then cannot trace."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("traced", [True, False])
def test_a_norm_that_is_not_alone_behind_its_layer_stays(way: str, traced: bool) -> None:
    model = with_statistics(Twice(way)).eval()
    before = model(drawn(2, 3, 4, 4))
    whole = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), model).eval()
    wrapped: nn.Module = whole if traced else Untraceable(whole)
    decision = ConvBN().decide(wrapped, None if traced else [{"x": drawn(2, 3, 4, 4)}])
    path = "2.norm" if traced else "inner.2.norm"
    assert list(decision.skipped) == [path]
    assert len(decision.pairs) == 1, "the one in front"
    words = {"tap": "add", "listed": "cat", "layer_twice": "2 times", "norm_twice": "2 times", "returned": "output"}
    if traced or way not in ("inplace", "method"):
        assert words.get(way, "input is not the output of") in decision.skipped[path]
    else:
        assert "also read by relu_" in decision.skipped[path]
    rewrite(wrapped, ConvBN(), data=[{"x": drawn(2, 3, 4, 4)}])
    after = model(drawn(2, 3, 4, 4))
    assert torch.equal(
        after["normed"] if way == "returned" else after, before["normed"] if way == "returned" else before
    )


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def patched(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]
    return layer


class OddConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OddNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def in_integers(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(torch.ones_like(layer.weight, dtype=torch.int8), requires_grad=False)
    return layer


STAYS: dict[str, tuple[Any, Any, str]] = {
    "hooks on the layer": (lambda: hooked(nn.Conv2d(3, 3, 1)), lambda: nn.BatchNorm2d(3), "0: hooks are registered"),
    "hooks on the norm": (lambda: nn.Conv2d(3, 3, 1), lambda: hooked(nn.BatchNorm2d(3)), "hooks are registered"),
    "a patched forward": (lambda: patched(nn.Conv2d(3, 3, 1)), lambda: nn.BatchNorm2d(3), "patched"),
    "a parametrization": (
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
        lambda: nn.BatchNorm2d(3),
        "parametrization: fold that first",
    ),
    "another convolution": (lambda: OddConv(3, 3, 1), lambda: nn.BatchNorm2d(3), "OddConv is a class of its own"),
    "another norm": (lambda: nn.Conv2d(3, 3, 1), lambda: OddNorm(3), "OddNorm is a class of its own"),
    "no statistics": (
        lambda: nn.Conv2d(3, 3, 1),
        lambda: nn.BatchNorm2d(3, track_running_stats=False),
        "no running statistics",
    ),
    "no batch yet": (lambda: nn.Conv2d(3, 3, 1), lambda: nn.BatchNorm2d(3, momentum=None), "average of no batch"),
    "lazy norm": (lambda: nn.Conv2d(3, 3, 1), lambda: nn.LazyBatchNorm2d(), "has not seen its first batch"),
    "integers": (lambda: in_integers(nn.Conv2d(3, 3, 1)), lambda: nn.BatchNorm2d(3), "type torch.int8"),
    "complex numbers": (
        lambda: nn.Conv2d(3, 3, 1, dtype=torch.complex64),
        lambda: nn.BatchNorm2d(3),
        "type torch.complex64",
    ),
    "other channels": (lambda: nn.Linear(3, 3), lambda: nn.BatchNorm2d(3), "does not normalise the channels of"),
}


@pytest.mark.parametrize("what", STAYS)
def test_what_must_not_be_merged_stays_with_its_reason(what: str) -> None:
    layer, norm, reason = STAYS[what]
    model = nn.Sequential(layer(), norm(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    decision = ConvBN().decide(model)
    assert decision.pairs == (("2", "3"),)
    assert reason in decision.skipped["1"]
    assert f"1: {decision.skipped['1']}" in decision.table()
    with pytest.raises(AnatomyError, match="no batch norm of Sequential can join"):
        ConvBN(match="1").decide(model)


def test_a_home_made_model_that_cannot_be_traced_needs_a_batch() -> None:
    model = with_statistics(HomeMade()).eval()
    x = drawn(2, 3, 4, 4)
    with pytest.raises(AnatomyError, match="pass data"):
        ConvBN().decide(model)
    expected = model(x)
    rewrite(model, ConvBN(), data=[{"pixels": x}])
    assert isinstance(model.norm_a, ConvBNBlock)
    assert isinstance(model.norm_c, ConvBNBlock)
    assert type(model.norm_b) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), expected)


def test_a_lazy_model_is_not_called_for_the_first_time() -> None:
    model = nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3)).eval()
    with pytest.raises(AnatomyError, match=r"waits for its first batch to know the size of 0\.weight"):
        ConvBN().decide(model, [{"x": drawn(2, 3, 4, 4)}])
    with pytest.raises(AnatomyError, match="LazyConv2d has not seen its first batch"):
        ConvBN().decide(model)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.aside = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return x.mean() + self.aside(x).mean() if self.training else x.mean()


@pytest.mark.parametrize("traced", [True, False])
def test_a_head_that_runs_in_training_alone_is_tuned_too(traced: bool) -> None:
    inner = with_statistics(Auxiliary())
    model: nn.Module = inner if traced else Untraceable(inner)
    x = drawn(2, 3, 4, 4)
    before = set_norms_aside(inner)(x)
    decision = ConvBN().decide(model.eval(), [{"x": x}])
    assert [norm.removeprefix("inner.") for _, norm in decision.pairs] == ["trunk.1", "aside.1"]
    assert [norm.removeprefix("inner.") for norm in decision.bytes] == ["trunk.1"]
    rewrite(model, ConvBN(), data=[{"x": x}])
    torch.testing.assert_close(set_norms_aside(inner)(x), before)


def set_norms_aside(model: nn.Module) -> nn.Module:
    """Put a model in training mode, but for its norms."""
    model.train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    return model


class Counting(nn.Dropout):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return super().forward(x)


def test_looking_leaves_no_trace() -> None:
    model = Untraceable(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Counting())).eval()
    model.inner[0].train()
    modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert ConvBN().decide(model, [{"x": drawn(2, 3, 4, 4)}]).pairs == (("inner.0", "inner.1"),)
    assert torch.equal(torch.rand(3), expected), "the random state is put back"
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_shared_layer_stays_where_only_parts_can_be_traced() -> None:
    pair = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    inner = nn.ModuleDict({"a": pair, "b": nn.Sequential(pair[0], nn.ReLU())})
    model = Untraceable(inner).eval()
    with pytest.raises(AnatomyError, match="stands at several paths"):
        ConvBN().decide(model)


def test_small_maps_with_large_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64))
    batch: list[Mapping[str, Any]] = [{"x": drawn(1, 3, 4, 4)}]
    decision = ConvBN(min_ratio=0.5).decide(model.eval(), batch)
    # 64 channels of 2 x 2 against 64 x 8 x 3 x 3 weights.
    assert decision.pairs == (("0", "1"),)
    assert "save 0.06 times its folded weight, less than 0.5" in decision.skipped["3"]
    assert list(decision.bytes) == ["1"]
    assert "bytes" in decision.table()
    with pytest.raises(LaminaError, match="needs data"):
        ConvBN(min_ratio=0.5).decide(model)
