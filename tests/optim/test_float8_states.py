from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import LaminaError
from lamina.lineage import Lineage
from lamina.models import Transformer
from lamina.optim import Float8AdamW, carry, parametrize
from lamina.optim.dynamic_range import QuantizedTensor
from lamina.optim.float8_states import update_groups_
from lamina.recipe import build
from lamina.rewrite import DropMLP, rewrite

EXAMPLES = [Example("optimizer", "float8_adamw", options={"lr": 1e-2, "min_numel": 16}, bad={"group_size": 100})]

SHAPES = [(64, 128), (65, 63), (7,), (1,), ()]


def make(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(parameters: Sequence[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        p.grad = (0.01 * torch.randn(p.shape, generator=generator)).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[Tensor]:
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(start, start + steps):
        gradients(parameters, step)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def codes(state: Any) -> list[Tensor]:
    return [v.view(torch.uint8) if v.dtype.itemsize == 1 else v for s in state.values() for v in s.values()]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_first_step_is_adamws_and_the_second_nearly(decay: float) -> None:
    options = {"lr": 1e-2, "weight_decay": decay}
    exact = torch.optim.AdamW(make(), **options)
    ours = Float8AdamW(make(), min_numel=1, **options)
    plain = Float8AdamW(make(), min_numel=1, expand=False, **options)
    first, found = run(exact, 1), run(ours, 1)
    run(plain, 1)
    for a, b in zip(first, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-6)
    second, found, other = run(exact, 1, start=1), run(ours, 1, start=1), run(plain, 1, start=1)
    off, coarse = ((second[0] - x[0]).norm() / (second[0] - first[0]).norm() for x in (found, other))
    assert off < 0.02
    assert off < coarse
    assert not torch.equal(second[0], found[0])


def test_small_tensors_are_adamws_for_ever() -> None:
    exact, ours = torch.optim.AdamW(make(), lr=1e-2), Float8AdamW(make(), lr=1e-2, min_numel=10**6)
    for a, b in zip(run(exact, 5), run(ours, 5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_formula_on_what_was_kept(dtype: torch.dtype) -> None:
    """Moments are read back, moved, used, and only then rounded."""
    b1, b2, lr, eps, decay = 0.9, 0.999, 1e-2, 1e-8, 0.1
    optimizer = Float8AdamW(make([(65, 63)], dtype), lr, (b1, b2), eps, decay, min_numel=1)
    run(optimizer, 2)
    (p,) = optimizer.param_groups[0]["params"]
    m, v = (optimizer.state[p][n].dequantize().double() for n in ("exp_avg", "exp_avg_sq"))
    before = p.detach().double()
    run(optimizer, 1, start=2)
    g = p.grad.double()
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    expected = before - lr * (m / (1 - b1**3) / ((v / (1 - b2**3)).sqrt() + eps) + decay * before)
    tolerance = {"rtol": 8e-3, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 0.0, "atol": 1e-6}
    torch.testing.assert_close(p.detach().double(), expected, **tolerance)
    kept = optimizer.state[p]["exp_avg"].dequantize().double()
    assert ((kept - m).norm() / m.norm()) < 0.03
    assert float(optimizer.state[p]["step"]) == 3


def test_chunks_and_layouts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Float8AdamW(make([(64, 130)]), min_numel=1)
    expected = run(whole, 3)[0]
    monkeypatch.setattr("lamina.optim.float8_states.CHUNK", 256)
    parts = Float8AdamW(make([(64, 130)]), min_numel=1)
    # Vector instructions round the last numbers of a row otherwise than scalar ones; a code may then be its neighbour.
    close = {"rtol": 0.0, "atol": 1e-4}
    torch.testing.assert_close(run(parts, 3)[0], expected, **close)
    turned = Parameter(make([(64, 130)])[0].detach().T.contiguous().T)
    assert not turned.is_contiguous()
    torch.testing.assert_close(run(Float8AdamW([turned], min_numel=1), 3)[0], expected, **close)
    groups = [{"params": make([(64, 130)]), "lr": torch.tensor(1e-3)}]
    torch.testing.assert_close(run(Float8AdamW(groups, lr=7.0, min_numel=1), 3)[0], expected, **close)


def test_bytes_are_a_quarter() -> None:
    optimizer = Float8AdamW(make())
    run(optimizer, 1)
    assert optimizer.state_bytes() == 2 * (64 * 128 + 12 * 64) + 8 * (65 * 63 + 7 + 1 + 1)
    large = Float8AdamW(make([(64, 128)]))
    run(large, 1)
    assert large.state_bytes() <= 0.28 * 8 * 64 * 128


def test_a_state_comes_back_code_for_code_and_goes_on(tmp_path: Path) -> None:
    expected = run(Float8AdamW(make(), min_numel=2), 4)
    first = Float8AdamW(make(), min_numel=2)
    values = run(first, 2)
    state = first.state_dict()
    found = state["state"][0]
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == {
        "step": (torch.float32, ()),
        **{f"{m}.codes": (torch.float8_e4m3fn, (64, 128)) for m in ("exp_avg", "exp_avg_sq")},
        **{f"{m}.{p}": (torch.float32, (1, 64)) for m in ("exp_avg", "exp_avg_sq") for p in ("scale", "k", "center")},
    }
    torch.save(state, tmp_path / "state.pt")
    second = Float8AdamW(make(), min_numel=2)
    for p, value in zip(second.param_groups[0]["params"], values, strict=True):
        p.data.copy_(value)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(codes(second.state_dict()["state"]), codes(state["state"]), strict=True):
        assert torch.equal(a, b)
    assert isinstance(second.state[second.param_groups[0]["params"][0]]["exp_avg"], QuantizedTensor)
    for a, b in zip(run(second, 2, start=2), expected, strict=True):
        assert torch.equal(a, b)
    twin = copy.deepcopy(first)
    for a, b in zip(run(twin, 2, start=2), expected, strict=True):
        assert torch.equal(a, b)


def test_it_goes_on_from_plain_adamw() -> None:
    before = torch.optim.AdamW(make(), lr=1e-2)
    values = run(before, 20)
    ours = Float8AdamW(make(), lr=1e-2)
    for p, value in zip(ours.param_groups[0]["params"], values, strict=True):
        p.data.copy_(value)
    state = before.state_dict()
    group = {**ours.state_dict()["param_groups"][0], "params": state["param_groups"][0]["params"]}
    ours.load_state_dict({"state": state["state"], "param_groups": [group]})
    for a, b, c in zip(run(before, 1, start=20), run(ours, 1, start=20), values, strict=True):
        assert (a - b).norm() <= 0.03 * (a - c).norm() + 1e-7
    assert isinstance(ours.state[ours.param_groups[0]["params"][0]]["exp_avg"], QuantizedTensor)


def test_moments_follow_a_rewrite_row_by_row() -> None:
    layer = nn.Linear(128, 96, bias=False)
    optimizer = Float8AdamW(layer.parameters())
    gradients([layer.weight], 0)
    optimizer.step()
    kept, old, lineage = optimizer.state[layer.weight]["exp_avg"].dequantize(), layer.weight, Lineage()
    layer.weight = Parameter(old.detach()[[3, 1] + 62 * [5]])
    lineage.derive(layer.weight, old, [3, -1] + 62 * [5])
    carry(optimizer, layer, lineage)
    torch.testing.assert_close(optimizer.state[layer.weight]["exp_avg"][0], kept[3])
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"][1], torch.zeros(128))
    gradients([layer.weight], 1)
    optimizer.step()
    assert isinstance(optimizer.state[layer.weight]["exp_avg"], QuantizedTensor)
    assert float(optimizer.state[layer.weight]["step"]) == 2


def test_a_step_with_a_gradient_that_is_no_number_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = Float8AdamW(make(), min_numel=2)
    run(optimizer, 1)
    parameters = optimizer.param_groups[0]["params"]
    before, state = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict()["state"])
    for bad in (torch.nan, torch.inf):
        gradients(parameters, 1)
        parameters[1].grad[3, 4] = bad
        with caplog.at_level(logging.WARNING):
            optimizer.step()
    assert optimizer.skipped == 2
    assert "left a step out: its gradients are not finite (2 so far)" in caplog.text
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(codes(state), codes(optimizer.state_dict()["state"]), strict=True))
    gradients(parameters, 1)
    parameters[1].grad.fill_(1e30)  # its square is not finite, it is
    optimizer.step()
    assert torch.isfinite(parameters[1]).all()
    assert torch.isfinite(optimizer.state[parameters[1]]["exp_avg_sq"].dequantize()).all()


def test_it_is_the_optimizer_of_a_model_in_mup_and_under_a_drop_pass() -> None:
    def decoder(width: int) -> nn.Module:
        torch.manual_seed(0)
        return Transformer(2, width, 2, vocabulary=16, context=8, tie=False)

    model = parametrize(decoder(64), "mup", base=lambda: decoder(16))
    node = {"name": "mup", "base": {"name": "float8_adamw", "lr": 1e-2}, "rule": "adam"}
    optimizer = build(node, "optimizer", model=model)
    assert isinstance(optimizer, Float8AdamW)
    assert {g["lr"] for g in optimizer.param_groups} == {1e-2, 1e-2 / 4}
    ids = torch.arange(8)[None]
    for step in range(4):
        if step == 2:
            model = rewrite(model, DropMLP(count=1), data=[{"input_ids": ids}], optimizer=optimizer)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert torch.isfinite(loss)


@pytest.mark.slow
def test_one_kernel_does_what_single_operations_do() -> None:
    eager, compiled = Float8AdamW(make([(64, 128)])), Float8AdamW(make([(64, 128)]))
    run(eager, 3)
    fused = torch.compile(update_groups_, backend="aot_eager", fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.optim.float8_states.update_groups_", fused)
        run(compiled, 3)
    for a, b in zip(codes(eager.state_dict()["state"]), codes(compiled.state_dict()["state"]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_compiled_step_differs_in_hardly_any_code(device: str) -> None:
    """The functions run eagerly on the CPU are the truth for the kernels that are generated from them."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernel generated for it cannot run here")
    torch.compiler.reset()
    eager, compiled = make([(64, 128), (65, 63)]), make([(64, 128), (65, 63)])
    compiled = [Parameter(p.detach().to(device)) for p in compiled]
    one, other = Float8AdamW(eager, min_numel=1), Float8AdamW(compiled, min_numel=1, compile=True)
    for step in range(3):
        gradients(eager, step)
        for p, q in zip(eager, compiled, strict=True):
            assert p.grad is not None
            q.grad = p.grad.to(device)
        one.step()
        other.step()
        if step == 0:
            pairs = [
                (one.state[p][m].codes, other.state[q][m].codes.cpu())
                for p, q in zip(eager, compiled, strict=True)
                for m in ("exp_avg", "exp_avg_sq")
            ]
            differ = torch.cat([(a.float() != b.float()).flatten() for a, b in pairs])
            apart = torch.cat(
                [(a.view(torch.uint8).int() - b.view(torch.uint8).int()).abs().flatten() for a, b in pairs]
            )
            assert differ.float().mean() <= 1e-3
            assert apart.max() <= 1
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(p.detach(), q.detach().cpu(), rtol=0.0, atol=1e-4)


def test_what_it_cannot_take_is_refused() -> None:
    x = Parameter(torch.zeros(2))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"group_size": 100}, "group_size must be a power of two, 32 or more, got 100"),
        ({"expand": (True, False)}, "expand is True or False, for both moments alike"),
        ({"formats": ("e4m3",)}, "formats are two"),
        ({"formats": ("e4m3", "e4m4")}, "format must be one of 'e4m3', 'e5m2', got 'e4m4'"),
        ({"range_bound": "papre"}, "range_bound must be one of"),
        ({"min_numel": -1}, "min_numel must be >= 0"),
    ]
    for options, words in refused:
        with pytest.raises(LaminaError, match=f"Float8AdamW: {words}"):
            Float8AdamW([x], **options)
    with pytest.raises(LaminaError, match="Float8AdamW has no amsgrad"):
        Float8AdamW([{"params": [x], "amsgrad": True}])
    with pytest.raises(LaminaError, match=r"does not take torch.float16 parameters: use bfloat16 or float32"):
        Float8AdamW([Parameter(torch.zeros(2, dtype=torch.float16))])
    with pytest.raises(LaminaError, match=r"does not take torch.complex64 parameters: use torch.view_as_real"):
        Float8AdamW([Parameter(torch.zeros(2, dtype=torch.complex64))])
    x.grad = torch.zeros(2).to_sparse()
    with pytest.raises(LaminaError, match="does not take sparse gradients"):
        Float8AdamW([x]).step()
    ours, other = Float8AdamW(make([(64, 64)])), Float8AdamW(make([(64, 64)]), formats=("e5m2", "e4m3"))
    run(ours, 1)
    with pytest.raises(
        LaminaError, match=r"exp_avg \(torch.float8_e4m3fn, with an exponent\) was saved under other options"
    ):
        other.load_state_dict({**ours.state_dict(), "param_groups": other.state_dict()["param_groups"]})
