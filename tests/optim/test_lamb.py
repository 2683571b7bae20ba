from __future__ import annotations

import copy
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import LaminaError
from lamina.optim import parameter_groups
from lamina.optim._layerwise import trust_ratio, trust_ratio_of_numbers
from lamina.optim.lamb import LAMB

EXAMPLES = [
    Example("optimizer", "lamb", options={"lr": 1e-2}, bad={"variant": "papre"}),
]

CORRECTED = {"adapt": True, "correct": True}
SHAPES = [(4, 3), (7,), (2, 3, 5), (1,), ()]
BOTH = pytest.mark.parametrize("foreach", [False, None], ids=["literal", "fused"])


def make(
    shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(parameters: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, steps: int, scale: float = 1.0) -> list[Tensor]:
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(steps):
        gradients(parameters, step, scale)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def naive(
    values: list[np.ndarray[Any, Any]],
    grads: Callable[[int], list[np.ndarray[Any, Any]]],
    steps: int,
    *,
    lr: float,
    decay: float,
    adapt: bool,
    correct: bool,
    clip_norm: float | None,
    averaging: bool = True,
    decoupled: bool = True,
    high: float = math.inf,
    trust_clip: bool = False,
    eps: float = 1e-6,
) -> list[np.ndarray[Any, Any]]:
    """The card's six lines in numpy, with the switches of all variants."""
    b1, b2 = 0.9, 0.999
    m, v = [np.zeros_like(x) for x in values], [np.zeros_like(x) for x in values]
    for t in range(1, steps + 1):
        gs = grads(t - 1)
        if clip_norm is not None:
            total = math.sqrt(sum((g * g).sum() for g in gs))
            gs = [g / max(1.0, total / clip_norm) for g in gs]
        for i, g in enumerate(gs):
            x = values[i]
            if not decoupled:
                g = g + decay * x
            m[i] = b1 * m[i] + ((1 - b1) if averaging else 1.0) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            mh = m[i] / (1 - b1**t) if correct else m[i]
            vh = v[i] / (1 - b2**t) if correct else v[i]
            u = mh / (np.sqrt(vh) + eps) + (decay * x if decoupled else 0)
            xn, un = np.linalg.norm(x.ravel()), np.linalg.norm(u.ravel())
            ratio = min(xn, high) / un if adapt and xn > 0 and un > 0 else 1.0
            values[i] = x - lr * (min(ratio, 1.0) if trust_clip else ratio) * u
    return values


def naive_gradients(step: int) -> list[np.ndarray[Any, Any]]:
    parameters = make()
    gradients(parameters, step, 3.0)
    return [p.grad.numpy() for p in parameters]  # type: ignore[union-attr]


@BOTH
def test_hand_case(foreach: bool | None) -> None:
    x = Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    x.grad = torch.tensor([0.1, 0.1], dtype=torch.float64)
    LAMB([x], lr=1e-3, eps=1e-6, weight_decay=0.0, foreach=foreach).step()
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64) - 0.001 * math.sqrt(2.5)
    torch.testing.assert_close(x.data, expected, rtol=1e-12, atol=0)


@BOTH
def test_the_first_step_is_the_sign_of_the_gradient(foreach: bool | None) -> None:
    x = make([(5, 4)])[0]
    before = x.detach().clone()
    gradients([x], 0)
    x.grad[1] = 0  # type: ignore[index]
    optimizer = LAMB([x], lr=0.1, eps=0.0, weight_decay=0.0, foreach=foreach)
    optimizer.record = True
    optimizer.step()
    expected = before - 0.1 * before.norm() / math.sqrt(16) * torch.sign(x.grad)  # type: ignore[arg-type]
    torch.testing.assert_close(x.data, expected, rtol=1e-10, atol=1e-12)
    ratio, x_norm, u_norm = optimizer.trust_ratios()[0]
    assert (ratio, x_norm, u_norm) == pytest.approx((float(before.norm()) / 4, float(before.norm()), 4), rel=1e-6)


@BOTH
@pytest.mark.parametrize("correct", [True, False])
def test_the_scale_of_the_loss_does_not_matter(correct: bool, foreach: bool | None) -> None:
    options: dict[str, Any] = {"eps": 0.0, "weight_decay": 0.0, "bias_correction": correct, "foreach": foreach}
    ours = run(LAMB(make(), lr=0.05, **options), 8)
    for scale in (1e-3, 1e4):
        torch.testing.assert_close(run(LAMB(make(), lr=0.05, **options), 8, scale), ours, rtol=1e-10, atol=1e-12)


@BOTH
@pytest.mark.parametrize(("variant", "phi"), [("paper", None), ("paper", (0.5, 2.0)), ("nvlamb", None), ("v3", (0, 1))])
def test_a_step_is_as_long_as_the_weights_say(
    variant: Any, phi: tuple[float, float] | None, foreach: bool | None
) -> None:
    parameters = make()
    optimizer = LAMB(parameters, lr=0.03, weight_decay=0.1, variant=variant, phi=phi, foreach=foreach)
    for step in range(5):
        before = [p.detach().clone() for p in parameters]
        gradients(parameters, step)
        optimizer.step()
        for old, new in zip(before, parameters, strict=True):
            norm = float(old.norm()) if phi is None else min(max(float(old.norm()), phi[0]), phi[1])
            assert float((new - old).detach().norm()) == pytest.approx(0.03 * norm, rel=1e-6)


@BOTH
def test_a_scale_invariant_model_scales_its_trajectory(foreach: bool | None) -> None:
    def trajectory(scale: float) -> Tensor:
        weight = Parameter(make([(6, 4)])[0].data * scale)
        optimizer = LAMB([weight], lr=0.05, eps=0.0, weight_decay=0.0, foreach=foreach)
        x = make([(16, 4)], seed=1)[0].detach()
        y = make([(16, 6)], seed=2)[0].detach()
        for _ in range(10):
            optimizer.zero_grad()
            (nn.functional.layer_norm(x @ weight.T, (6,), eps=0.0) - y).square().mean().backward()
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(trajectory(7.0), 7.0 * trajectory(1.0), rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize(
    ("options", "literal"),
    [
        ({"variant": "paper"}, {"adapt": True, "correct": True, "clip_norm": None}),
        (
            {"variant": "paper", "trust_clip": True},
            {"adapt": True, "correct": True, "clip_norm": None, "trust_clip": True},
        ),
        ({"variant": "nvlamb"}, {"adapt": True, "correct": True, "clip_norm": 1.0}),
        ({"variant": "nvlamb", "max_grad_norm": 1e6}, {"adapt": True, "correct": True, "clip_norm": 1e6}),
        ({"variant": "nvlamb", "weight_decay": 0.0}, {"adapt": False, "correct": True, "clip_norm": 1.0, "decay": 0.0}),
        (
            {"variant": "nvlamb", "weight_decay": 0.0, "always_adapt": True},
            {"adapt": True, "correct": True, "clip_norm": 1.0, "decay": 0.0},
        ),
        (
            {"variant": "nvlamb", "grad_averaging": False, "bias_correction": False},
            {"adapt": True, "correct": False, "clip_norm": 1.0, "averaging": False},
        ),
        (
            {"variant": "nvlamb", "decoupled": False},
            {"adapt": True, "correct": True, "clip_norm": 1.0, "decoupled": False},
        ),
        ({"variant": "v3"}, {"adapt": True, "correct": False, "clip_norm": None, "high": 10.0}),
        ({"variant": "v3", "phi": (0.0, math.inf)}, {"adapt": True, "correct": False, "clip_norm": None}),
    ],
)
def test_every_variant_is_the_cards_formula(
    options: dict[str, Any], literal: dict[str, Any], foreach: bool | None
) -> None:
    scale = 8.0
    parameters = [Parameter(p.data * scale) for p in make()]
    optimizer = LAMB(parameters, lr=0.02, **{"weight_decay": 0.05, **options}, foreach=foreach)
    ours = run(optimizer, 12, 3.0)
    expected = naive(
        [p.detach().numpy() * scale for p in make()], naive_gradients, 12, lr=0.02, **{"decay": 0.05, **literal}
    )
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-11)


@BOTH
def test_without_ratio_it_is_adam_with_decoupled_decay(foreach: bool | None) -> None:
    ours = LAMB([{"params": make(), "adapt": False}], lr=0.02, weight_decay=0.1, eps=1e-6, foreach=foreach)
    torchs = torch.optim.AdamW(make(), lr=0.02, weight_decay=0.1, eps=1e-6)
    torch.testing.assert_close(run(ours, 20), run(torchs, 20), rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("pytorch_optimizer") is None, reason="pytorch-optimizer is not installed")
@BOTH
@pytest.mark.filterwarnings("ignore")
def test_v3_is_pytorch_optimizers_lamb(foreach: bool | None) -> None:
    import pytorch_optimizer

    # Theirs adds eps to the ratio's divisor too, and divides the finished step by 1 - b1^t unless adam_debias is set.
    shapes = [(8, 8), (16,), (3, 5)]
    options: dict[str, Any] = {"weight_decouple": False, "adam_debias": True, "pre_norm": False, "foreach": False}
    theirs = pytorch_optimizer.Lamb(make(shapes), lr=0.02, weight_decay=0.05, eps=1e-9, **options)
    ours = LAMB(make(shapes), lr=0.02, weight_decay=0.05, eps=1e-9, variant="v3", foreach=foreach)
    torch.testing.assert_close(run(ours, 20), run(theirs, 20), rtol=1e-6, atol=1e-8)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", ["paper", "nvlamb", "v3"])
def test_zero_tensors_stay_finite(variant: Any, dtype: torch.dtype, foreach: bool | None) -> None:
    still, readout, idle = (Parameter(torch.zeros(3, 2, dtype=dtype)) for _ in range(3))
    still.grad, readout.grad = torch.zeros_like(still), torch.ones_like(readout)
    for eps in (1e-6, 0.0):
        optimizer = LAMB(
            [still, readout, idle], lr=0.5, eps=eps, variant=variant, bias_correction=True, foreach=foreach
        )
        optimizer.record = True
        readout.data.zero_()
        optimizer.step()
        assert torch.equal(still.data, torch.zeros_like(still))
        torch.testing.assert_close(readout.data, torch.full_like(readout, -0.5), rtol=1e-2, atol=0)
        assert [r[0] for r in optimizer.trust_ratios().values()] == [1, 1]
        assert idle not in optimizer.state


@pytest.mark.parametrize(
    ("variant", "more"),
    [
        ("paper", {}),
        ("nvlamb", {"decoupled": False}),
        ("v3", {"grad_averaging": False}),
        ("nvlamb", {"trust_clip": True}),
    ],
)
def test_fused_is_literal_over_50_steps(variant: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.optim._layerwise.CACHE_ELEMENTS", 40)

    def make_mixed() -> list[Parameter]:
        found = [*make(dtype=torch.float32), *make(seed=3), *make([(9, 33), (51, 70)], seed=4, dtype=torch.float32)]
        found.append(Parameter(make([(4, 3, 5, 5)], seed=5)[0].data.to(memory_format=torch.channels_last)))
        found.append(Parameter(make([(6, 4)], seed=6)[0].data.T))
        return found

    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.02, "variant": variant, **more}
    literal, fused = run(LAMB(make_mixed(), foreach=False, **options), 50), run(LAMB(make_mixed(), **options), 50)
    for a, b in zip(literal, fused, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-6


def test_narrow_parameters_keep_float32_moments_and_round_once() -> None:
    exact, narrow = (
        make(dtype=torch.float32),
        [p.detach().bfloat16().requires_grad_() for p in make(dtype=torch.float32)],
    )
    for p, q in zip(exact, narrow, strict=True):
        p.data.copy_(q)
    ours, theirs = LAMB(narrow, lr=0.02), LAMB(exact, lr=0.02)
    literal = LAMB([p.detach().clone().requires_grad_() for p in narrow], lr=0.02, foreach=False)
    gradients(narrow, 0)
    for p, q, r in zip(exact, narrow, literal.param_groups[0]["params"], strict=True):
        p.grad, r.grad = q.grad.float(), q.grad.clone()
    for optimizer in (ours, theirs, literal):
        optimizer.step()
    for p, q, r in zip(exact, narrow, literal.param_groups[0]["params"], strict=True):
        assert torch.equal(p.bfloat16(), q)
        assert torch.equal(r, q)
        assert ours.state[q]["exp_avg"].dtype is torch.float32


def test_moving_a_bias_to_the_excluded_group_changes_that_bias_alone() -> None:
    def train(excluded: set[int]) -> list[Tensor]:
        parameters = make()
        groups = [
            {"params": [p for i, p in enumerate(parameters) if i not in excluded]},
            {"params": [p for i, p in enumerate(parameters) if i in excluded], "weight_decay": 0.0, "adapt": False},
        ]
        optimizer = LAMB(groups, lr=0.05, weight_decay=0.1)
        for step in range(4):
            gradients(parameters, step)
            optimizer.step()
        return [p.detach() for p in parameters]

    first, second = train({3}), train({1, 3})
    assert [torch.allclose(a, b, rtol=1e-13) for a, b in zip(first, second, strict=True)] == [
        True,
        False,
        True,
        True,
        True,
    ]
    adam = torch.optim.Adam(make(), lr=0.05, eps=1e-6)
    torch.testing.assert_close(second[1], run(adam, 4)[1])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(torch.randn(16, 4, generator=torch.Generator().manual_seed(step))).square().mean()


@BOTH
@pytest.mark.parametrize("variant", ["paper", "nvlamb", "v3"])
def test_state_dict_continues_bit_for_bit(variant: Any, foreach: bool | None) -> None:
    def train(model: nn.Module, optimizer: LAMB, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    model = net()
    optimizer = LAMB(parameter_groups(model, 0.01), lr=0.05, variant=variant, foreach=foreach)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net()
    again.load_state_dict(saved["model"])
    resumed = LAMB(parameter_groups(again, 0.01), lr=0.7, variant=variant)
    resumed.load_state_dict(saved["optimizer"])
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (again, resumed), (copied_model, copied)):
        train(m, o, range(3, 6))
    for a, b, c in zip(model.parameters(), again.parameters(), copied_model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_state_of_another_variant_is_refused() -> None:
    optimizer = LAMB(make(), variant="nvlamb")
    run(optimizer, 1)
    with pytest.raises(LaminaError, match=r"variant 'paper', but group 0 of the state was saved under 'nvlamb'"):
        LAMB(make()).load_state_dict(optimizer.state_dict())
    with pytest.raises(LaminaError, match="saved under None"):
        LAMB(make()).load_state_dict(torch.optim.Adam(make()).state_dict())


def test_closure_is_called_with_gradients_on() -> None:
    model = net()
    optimizer = LAMB(model.parameters(), lr=0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_skipped_by_the_scaler_leaves_the_count_alone() -> None:
    model = net()
    optimizer = LAMB(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, poison in enumerate([False, True, False]):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if poison:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_trust_ratios_by_name() -> None:
    model = net()
    optimizer = LAMB(model.named_parameters(), lr=0.05)
    loss_of(model, 0).backward()
    with pytest.raises(LaminaError, match="record = True"):
        optimizer.trust_ratios()
    optimizer.record = True
    norm = float(model[3].weight.detach().norm())
    optimizer.step()
    found = optimizer.trust_ratios()
    assert found.keys() == dict(model.named_parameters()).keys()
    ratio, x_norm, u_norm = found["3.weight"]
    assert x_norm == pytest.approx(norm)
    assert ratio == pytest.approx(x_norm / u_norm)
    assert found["3.weight"] != found["0.weight"]


def test_a_rate_in_a_tensor_and_a_scheduler() -> None:
    a, b = make(dtype=torch.float32), make(dtype=torch.float32)
    plain, captured = LAMB(a, lr=0.1), LAMB(b, lr=0.1, capturable=True)
    assert isinstance(captured.param_groups[0]["lr"], Tensor)
    for optimizer in (plain, captured):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(3):
            gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(a, b)


def test_compiled_step_is_the_eager_step() -> None:
    a, b = make([(4, 3), (7,)], dtype=torch.float32), make([(4, 3), (7,)], dtype=torch.float32)
    plain, compiled = LAMB(a, lr=0.1, foreach=False), LAMB(b, lr=0.1)
    step = torch.compile(compiled.step, backend="eager")
    for i in range(3):
        gradients(a, i)
        gradients(b, i)
        plain.step()
        step()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"eps": -1e-6}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"betas": (0.9,)}, "betas"),
        ({"lr": "fast"}, "lr must be >= 0, got 'fast'"),
        ({"phi": 3.0}, "low <= high, got 3.0"),
        ({"phi": (0.0, 1.0, 2.0)}, "low <= high"),
        ({"phi": (2.0, 1.0)}, "low <= high"),
        ({"phi": (-1.0, 1.0)}, "low <= high"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"variant": "nvlam"}, "did you mean 'nvlamb'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        LAMB(make(), **options)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(LaminaError, match="view_as_real"):
        LAMB([Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = LAMB(make())
    with pytest.raises(LaminaError, match="lr must be"):
        optimizer.add_param_group({"params": make(seed=1), "lr": -1.0})
    with pytest.raises(LaminaError, match="adapt must be True, False or None"):
        optimizer.add_param_group({"params": make(seed=1), "adapt": "no"})
    assert len(optimizer.param_groups) == 1
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(LaminaError, match="SparseAdam"):
        LAMB(embedding.parameters()).step()
    same = make()
    with pytest.raises(ValueError, match="more than one parameter group"):
        LAMB([{"params": same}, {"params": same}])


def test_a_group_may_be_empty() -> None:
    for capturable in (False, True):
        alone, beside = make(), make()
        for layers, groups in ((alone, [{"params": alone}]), (beside, [{"params": []}, {"params": beside}])):
            gradients(layers, 0)
            LAMB(groups, capturable=capturable).step()
        assert not torch.equal(alone[0], make()[0])
        assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_a_flattened_model_is_warned_about() -> None:
    flat = Parameter(torch.ones(4))
    flat._is_flat_param = True  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="one layer"):
        LAMB([flat])


@pytest.mark.parametrize("phi", [None, (0.0, 10.0), (0.5, 2.0)])
@pytest.mark.parametrize("clip", [False, True])
def test_ratios_of_numbers_are_the_ratios_of_tensors(phi: tuple[float, float] | None, clip: bool) -> None:
    squares = [0.0, 1e-30, 0.25, 7.0, 1e6, math.inf, math.nan]
    for x in squares:
        for u in squares:
            norms = (torch.tensor(v, dtype=torch.float64).sqrt() for v in (x, u))
            expected = trust_ratio(*norms, phi=phi, clip=clip)
            found = torch.tensor(trust_ratio_of_numbers(x, u, phi, clip), dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0, equal_nan=True)
