from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.batches import call
from lamina.errors import AnatomyError
from lamina.probe import capture, first_tensor, observe, run, run_captured


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Splitting(nn.Module):
    """Returns a tuple whose first entry is no tensor."""

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> tuple[None, Tensor, Tensor]:
        return None, x * 2, x * 3


class Net(nn.Module):
    def __init__(self, depth: int = 4, fail: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Counting(6, 6) for _ in range(depth))
        self.split = Splitting()
        self.head = Counting(6, 2)
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        _, double, triple = self.split(x, scale=x)
        if self.fail:
            raise RuntimeError("in the middle")
        return self.head(double + triple)


def net(**options: object) -> Net:
    torch.manual_seed(0)
    return Net(**options)  # type: ignore[arg-type]


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(1))}


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_values_equal_a_manual_forward() -> None:
    model, x = net(), batch()["x"]
    with capture(model, inputs=["layers.2", "split"], outputs=["layers.1", "split", "", "head"]) as seen:
        result = call(model, {"x": x})
    h = x
    steps = []
    for layer in model.layers:
        steps.append((h, nn.functional.linear(h, layer.weight, layer.bias)))
        h = torch.tanh(steps[-1][1])
    torch.testing.assert_close(seen.inputs["layers.2"], steps[2][0])
    torch.testing.assert_close(seen.outputs["layers.1"], steps[1][1])
    torch.testing.assert_close(seen.input("split"), h)
    assert seen.outputs["split"][0] is None
    torch.testing.assert_close(seen.outputs["split"][2], h * 3)
    torch.testing.assert_close(seen.tensor("split"), h * 2)
    torch.testing.assert_close(seen.outputs[""], result)
    assert hooks_on(model) == 0


def test_values_are_detached_unless_asked() -> None:
    model = net()
    cut = run_captured(model, batch(), ["layers.0", "split"])
    assert not cut.tensor("layers.0").requires_grad
    assert not cut.outputs["split"][1].requires_grad
    assert cut.result.requires_grad


def test_gradients_flow_through_what_was_captured() -> None:
    model = net()
    seen = run_captured(model, batch(), ["layers.1"], detach=False)
    (got,) = torch.autograd.grad(seen.tensor("layers.1").pow(2).sum(), model.layers[0].weight)
    x = batch()["x"]
    (want,) = torch.autograd.grad(model.layers[1](torch.tanh(model.layers[0](x))).pow(2).sum(), model.layers[0].weight)
    torch.testing.assert_close(got, want)


def test_stop_skips_what_comes_after() -> None:
    model = net()
    seen = run_captured(model, batch(), ["layers.1"], inputs=["layers.2"], stop=True)
    assert [layer.calls for layer in model.layers] == [1, 1, 0, 0]
    assert model.head.calls == 0
    assert seen.result is None
    assert set(seen.outputs) == {"layers.1"}
    with capture(model, outputs=["layers.0"], stop=True) as again:
        call(model, batch())
        pytest.fail("the call was to end the block")
    assert again.tensor("layers.0").shape == (3, 6)
    with capture(model, outputs=["layers.0"], stop=True):
        assert run(model, batch()) is None
    assert hooks_on(model) == 0


def test_hooks_go_on_an_error() -> None:
    model = net(fail=True)
    fused = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="in the middle"):
        run_captured(model, batch(), ["layers.0", "head"])
    assert hooks_on(model) == 0
    with pytest.raises(AnatomyError, match=r"no module 'layer.1'; did you mean 'layers.1'"):
        run_captured(model, batch(), ["layers.0", "layer.1"])
    assert hooks_on(model) == 0
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_mistakes_are_named() -> None:
    model = net()
    with pytest.raises(AnatomyError, match="nothing to look at in Net"), capture(model):
        pass
    model.spare = nn.Linear(2, 2)
    with pytest.raises(AnatomyError, match="Net did not run 'spare'"):
        run_captured(model, batch(), ["spare"])
    seen = run_captured(model, batch(), ["head"])
    with pytest.raises(AnatomyError, match=r"no output of 'layers.0' was seen \(seen: head\)"):
        seen.tensor("layers.0")
    with pytest.raises(AnatomyError, match="no input of 'head' was seen"):
        seen.input("head")


@given(times=st.integers(1, 5))
@settings(max_examples=5, deadline=None)
def test_a_module_that_runs_several_times_gives_a_list(times: int) -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(times):
                x = self.block(x)
            return x

    model = Repeated()
    seen = run_captured(model, {"x": torch.ones(1, 4)}, ["block"], inputs=["block"])
    tensors = seen.tensors("block")
    assert len(tensors) == times
    assert isinstance(seen.outputs["block"], list) == (times > 1)
    torch.testing.assert_close(tensors[-1], seen.result.detach())
    if times > 1:
        torch.testing.assert_close(seen.inputs["block"][1], tensors[0])


def test_observe_streams_and_keeps_nothing() -> None:
    model = net()
    sums: list[float] = []

    def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        assert module is model.layers[3]
        assert not kwargs
        sums.append(float((output - nn.functional.linear(args[0], module.weight, module.bias)).detach().abs().sum()))

    with observe(model, {"layers.3": add}):
        call(model, batch())
        call(model, batch())
    call(model, batch())
    assert sums == [0.0, 0.0]
    assert hooks_on(model) == 0
    scales: list[Tensor] = []
    with observe(model, {"split": lambda module, args, kwargs, output: scales.append(kwargs["scale"])}):
        call(model, batch())
    assert len(scales) == 1
    with pytest.raises(AnatomyError, match="nothing to look at"), observe(model, {}):
        pass


def test_observe_says_when_a_module_starts_and_cannot_change_its_input() -> None:
    said = []
    with observe(
        model := net(),
        {"layers.1": lambda module, args, kwargs, output: said.append("end of 1")},
        {p: lambda module, args, kwargs, p=p: said.append(f"start of {p[-1]}") or 7 for p in ("layers.0", "layers.1")},
    ):
        call(model, batch())
    assert said == ["start of 0", "start of 1", "end of 1"]
    assert hooks_on(model) == 0


def test_raw_outputs_keep_their_type() -> None:
    Pair = namedtuple("Pair", ["a", "b"])

    class Many(nn.Module):
        def forward(self, x: Tensor) -> OrderedDict[str, object]:
            return OrderedDict(pair=Pair(x * 1, [x * 2, {"deep": x * 3}]), count=3)

    x = torch.ones(2, requires_grad=True)
    seen = run_captured(nn.Sequential(OrderedDict(many=Many())), {"inputs": x}, ["many"])
    raw = seen.outputs["many"]
    assert isinstance(raw, OrderedDict)
    assert raw["count"] == 3
    assert not raw["pair"].a.requires_grad
    assert not raw["pair"].b[1]["deep"].requires_grad
    torch.testing.assert_close(seen.tensor("many"), torch.ones(2))
    assert first_tensor({"a": [3, ("x", x)]}) is x
    assert first_tensor("text") is None


def test_works_under_autocast() -> None:
    model = net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = run_captured(model, batch(), ["layers.1"])
    assert seen.tensor("layers.1").dtype == torch.bfloat16


def test_torch_encoder_is_seen_inside_without_its_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        seen = run_captured(model, {"src": x}, ["layers.0.linear1", "layers.1.self_attn"])
        torch.testing.assert_close(seen.result, model(x))
    assert seen.tensor("layers.0.linear1").shape == (2, 3, 16)


@pytest.mark.parametrize("how", ["wrapped", "in place", "one block"])
def test_a_compiled_model_runs_eagerly_and_says_so(how: str) -> None:
    model = net(depth=2)
    want = run_captured(model, batch(), ["layers.1"])
    compiled: nn.Module = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.layers[1].compile(backend="eager")
    with torch.no_grad():
        compiled(batch()["x"])
    with pytest.warns(UserWarning, match="Net is compiled, and a compiled graph cannot be looked into") as told:
        seen = run_captured(compiled, batch(), ["layers.1"])
    assert len(told) == 1
    torch.testing.assert_close(seen.tensor("layers.1"), want.tensor("layers.1"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(batch()["x"]), want.result)


@pytest.mark.distributed
def test_paths_are_the_bare_models_under_ddp(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        seen = run_captured(wrapped, batch(), ["layers.1"], detach=False)
        torch.testing.assert_close(
            seen.tensor("layers.1"), run_captured(model, batch(), ["layers.1"]).tensor("layers.1")
        )
        (seen.tensor("layers.1").sum() + seen.result.sum()).backward()
        assert model.layers[0].weight.grad is not None
        assert run_captured(wrapped, batch(), ["layers.0"], stop=True).result is None
        # A pass cut short must not confuse the next full one.
        wrapped(batch()["x"]).sum().backward()
        assert hooks_on(model) == 0
    finally:
        dist.destroy_process_group()
