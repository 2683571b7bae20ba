from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.processes import in_processes
from torch import Tensor, nn
from torch._dynamo import testing

from lamina.anatomy import dissect
from lamina.errors import LaminaError, ShapeError
from lamina.models import Transformer
from lamina.nn import PRepBN, RepBN, TokenBatchNorm
from lamina.nn.progressive_norm import blend_weight, token_moments
from lamina.optim.groups import norms_and_biases


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example("norm", "rep_bn", {"num_features": 8}, inputs=lambda: (drawn(2, 3, 8),), bad={"num_features": 0}),
    Example("norm", "prep_bn", {"num_features": 8}, inputs=lambda: (drawn(2, 3, 8),), bad={"decay_fraction": 0.0}),
    Example(
        "norm", "prep_bn", {"num_features": 8, "base": "rms_norm", "skip_init": 0.0}, inputs=lambda: (drawn(9, 8),)
    ),
]


def used(norm: RepBN) -> RepBN:
    """As after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in (norm.running_mean, norm.weight, norm.bias):
            value.normal_(generator=generator)
        norm.running_var.uniform_(0.3, 3, generator=generator)
        norm.skip.fill_(0.7)
    return norm


def by_hand(x: Tensor, norm: RepBN) -> Tensor:
    """RepBN in training, by the letter."""
    rows = x.reshape(-1, x.shape[-1])
    mean, var = rows.mean(0), rows.var(0, unbiased=False)
    return norm.weight * (x - mean) / (var + norm.eps).sqrt() + norm.bias + norm.skip * x


@pytest.mark.parametrize("shape", [(2, 1), (7, 63), (1, 7, 1), (3, 63, 7), (2, 3, 5, 4)])
def test_training_is_batch_norm_over_all_tokens_plus_the_skip(shape: tuple[int, ...]) -> None:
    norm, x = used(RepBN(shape[-1])).double(), drawn(*shape).double().requires_grad_()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    expected, found = by_hand(x, norm), norm(x)
    torch.testing.assert_close(found, expected)
    wanted = (x, norm.weight, norm.bias, norm.skip)
    signs = drawn(*shape, seed=1).double()
    gradients = [torch.autograd.grad((y * signs).sum(), wanted) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    rows = x.detach().reshape(-1, shape[-1])
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * rows.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 * var + 0.1 * rows.var(0))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("shape", [(2, 1), (7, 63), (3, 7, 7)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_evaluation_is_a_scale_and_shift_and_the_merged_batch_norm(
    shape: tuple[int, ...], dtype: torch.dtype, bound: float
) -> None:
    norm, x = used(RepBN(shape[-1])).eval(), drawn(*shape).to(dtype)
    if dtype == torch.float64:
        norm.double()
    exact = copy.deepcopy(norm).double()
    wide = x.double()
    normed = (wide - exact.running_mean) / (exact.running_var + exact.eps).sqrt()
    expected = exact.weight * normed + exact.bias + exact.skip * wide
    scale, shift = norm.scale_and_shift(torch.float64)
    torch.testing.assert_close(scale * wide + shift, expected)
    merged = norm.merged()
    assert type(merged) is TokenBatchNorm
    for found in (norm(x), merged(x)):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= bound * expected.abs().max().clamp(min=1)


def test_a_half_precision_input_keeps_float32_statistics() -> None:
    norm = RepBN(7)
    x = drawn(63, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.float().var(0), rtol=1e-3, atol=1e-3)


def test_padding_is_normalised_but_not_counted() -> None:
    x, lengths = drawn(3, 7, 5).double(), torch.tensor([7, 1, 4])
    mask = torch.arange(7) < lengths[:, None]
    padded, packed = used(RepBN(5)).double(), used(RepBN(5)).double()
    given, rows = x.clone().requires_grad_(), x[mask].clone().requires_grad_()
    with torch.no_grad():
        given[~mask] = 1e3
    found, expected = padded(given, mask), packed(rows)
    torch.testing.assert_close(found[mask], expected)
    torch.testing.assert_close(padded.running_mean, packed.running_mean)
    torch.testing.assert_close(padded.running_var, packed.running_var)
    assert padded.num_batches_tracked == packed.num_batches_tracked
    weights = drawn(12, 5, seed=2).double()
    (found[mask] * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(given.grad[mask], rows.grad)
    assert not given.grad[~mask].any()
    torch.testing.assert_close(padded(x, mask.long())[mask], packed(x[mask]))


@pytest.mark.parametrize("classes", [None, 3])
def test_our_transformer_says_which_tokens_are_real(classes: int | None) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocabulary": 16, "context": 6, "causal": False, "classes": classes}
    padded = Transformer(2, 8, 2, norm={"name": "prep_bn", "start": 0.5}, **options)
    other = copy.deepcopy(padded)
    ids = torch.randint(16, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([6, 3, 2])[:, None]
    filled = torch.where(mask, ids, 7)
    found, expected = padded(ids, mask), other(filled, mask)
    torch.testing.assert_close(found if classes else found[mask], expected if classes else expected[mask])
    for (name, a), b in zip(padded.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_mask_that_leaves_nothing_changes_no_statistics() -> None:
    norm = used(RepBN(3))
    kept = norm.running_mean.clone(), norm.running_var.clone()
    for count in (0, 1):
        assert torch.isfinite(norm(drawn(1, 4, 3), (torch.arange(4) < count)[None])).all()
    assert torch.equal(norm.running_mean, kept[0])
    assert torch.equal(norm.running_var, kept[1])


def test_without_momentum_the_statistics_are_the_average_of_all_batches() -> None:
    batches = [drawn(9, 4, seed=s) for s in range(3)]
    whole = torch.ones(9, dtype=torch.bool)
    for mask in (None, whole):
        norm = RepBN(4, momentum=None)
        for x in batches:
            norm(x, mask)
        torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in batches]).mean(0))


def test_it_is_layer_norm_first_and_batch_norm_in_the_end() -> None:
    norm, x = PRepBN(7), drawn(3, 5, 7)
    used(norm.rep)
    with torch.no_grad():
        norm.norm.weight.uniform_(0.5, 2)
        norm.norm.bias.normal_()
    base, rep = copy.deepcopy(norm.norm), copy.deepcopy(norm.rep)
    assert torch.equal(norm(x), base(x))
    assert norm.rep.num_batches_tracked == 1, "the statistics are collected from the first step on"
    norm.set_progress(0.8)
    norm(x).square().sum().backward()
    assert not norm.norm.weight.grad.any()
    assert not norm.norm.bias.grad.any()
    assert norm.rep.weight.grad.any()
    assert torch.equal(norm(x), copy.deepcopy(rep)(x))
    norm.set_progress(0.2)
    torch.testing.assert_close(norm(x), 0.75 * base(x) + 0.25 * rep(x))


def test_at_the_first_step_the_new_branch_has_a_gradient_of_zero() -> None:
    norm = PRepBN(4)
    norm(drawn(5, 4)).square().sum().backward()
    assert all(p.grad is not None for p in norm.parameters())
    assert not any(p.grad.any() for p in norm.rep.parameters())
    assert norm.norm.weight.grad.any()


def test_evaluation_reads_the_new_branch_at_any_time() -> None:
    norm, x = PRepBN(4, base="rms_norm").eval(), drawn(2, 3, 4)
    used(norm.rep)
    expected = norm.rep(x)
    for fraction in (0.0, 0.3, 1.0):
        norm.set_progress(fraction)
        assert torch.equal(norm(x), expected)


def test_the_zero_start_of_language_models() -> None:
    norm = PRepBN(4, base="rms_norm", base_eps=1e-6, skip_init=0.0, scale_init=0.0)
    assert not norm.rep(drawn(5, 4)).any()
    assert torch.equal(norm(drawn(5, 4)), F.rms_norm(drawn(5, 4), (4,), eps=1e-6))


def lams(norm: PRepBN, steps: int) -> list[float]:
    found = []
    for step in range(steps + 1):
        norm.set_progress(step / steps)
        found.append(round(float(norm.lam), 6))
    return found


def test_the_decay_of_lam() -> None:
    assert lams(PRepBN(2), 5) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert lams(PRepBN(2, decay_fraction=0.4, warm_fraction=0.4), 5) == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert lams(PRepBN(2, decay_fraction=1.0, start=0.5), 4) == [0.5, 0.375, 0.25, 0.125, 0.0]
    late = [(begin / 20, warm / 20) for begin in range(20) for warm in range(19)]
    assert all(blend_weight(1.0, (1 - w) * (1 - b), b + w * (1 - b)) == 0 for b, w in late), "rounding leaves nothing"


def test_lam_is_saved() -> None:
    norm, other = PRepBN(3), PRepBN(3)
    norm.set_progress(0.3)
    other.load_state_dict(norm.state_dict())
    assert float(other.lam) == pytest.approx(1 - 0.3 / 0.8)
    assert norm.lam.shape == ()


def test_lam_moves_without_a_new_graph() -> None:
    torch.compiler.reset()
    counter = testing.CompileCounter()
    norm = PRepBN(4)
    compiled, x = torch.compile(norm, backend=counter, fullgraph=True), drawn(5, 4)
    for fraction in (0.0, 0.5, 1.0):
        norm.set_progress(fraction)
        torch.testing.assert_close(compiled(x), copy.deepcopy(norm)(x))
    assert counter.frame_count == 1


def test_anatomy_and_optimizer_groups_take_it_for_a_norm() -> None:
    model = Transformer(2, 8, 2, vocabulary=16, context=4, norm="prep_bn")
    found = [s.norms for b in dissect(model).trunk().blocks for s in b.sublayers]
    assert found == [(f"blocks.{i}.norm{n}",) for i in range(2) for n in (1, 2)]
    own = {f"norm.{n}" for n in ("norm.weight", "norm.bias", "rep.weight", "rep.bias", "rep.skip")}
    assert norms_and_biases(nn.ModuleDict({"norm": PRepBN(3)})) == own


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PRepBN(4, decay_fraction=0.0), "decay_fraction must be positive"),
        (lambda: PRepBN(4, decay_fraction=0.8, warm_fraction=0.3), "more than the whole of training"),
        (lambda: PRepBN(4, warm_fraction=-0.1), "not negative"),
        (lambda: PRepBN(4, start=1.5), "start must lie in 0..1"),
        (lambda: PRepBN(4, base="group_norm"), "base must be one of layer_norm, rms_norm"),
        (lambda: PRepBN(4).set_progress(1.01), "must lie in 0..1, got 1.01"),
        (lambda: RepBN(0), "at least one feature"),
        (lambda: RepBN(4, eps=0.0), "eps must be positive"),
        (lambda: RepBN(4, momentum=2.0), "momentum must lie in 0..1"),
    ],
)
def test_bad_options_are_refused(make: Any, words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        make()


def test_bad_inputs_are_refused() -> None:
    for norm in (RepBN(4), PRepBN(4)):
        with pytest.raises(ShapeError, match=r"takes floating-point \(..., 4\), got torch.float32 \(2, 3\)"):
            norm(drawn(2, 3))
        with pytest.raises(ShapeError, match=r"the mask must be \(2, 3\), got \(2,\)"):
            norm(drawn(2, 3, 4), torch.ones(2))
        with pytest.raises(ShapeError, match="1 token has none: give more, or call eval"):
            norm(drawn(1, 1, 4))
        assert norm.eval()(drawn(1, 1, 4)).shape == (1, 1, 4)


def test_moments_do_not_cancel() -> None:
    rows = 1e4 + drawn(63, 3)
    torch.testing.assert_close(token_moments(rows)[1], rows.double().var(0, unbiased=False).float(), rtol=1e-3, atol=0)


def _work(rank: int) -> list[bool]:
    x, signs = drawn(6, 5, 4).double(), drawn(6, 5, 4, seed=1).double()
    mask = drawn(6, 5, seed=2) > -0.5
    right = []
    for given in (None, mask):
        whole, alone, part = x.clone().requires_grad_(), used(RepBN(4)).double(), used(RepBN(4, sync=True)).double()
        # One process with everything is not synchronised, whatever the group.
        expected = alone(whole, mask if given is not None else torch.ones(6, 5))
        (expected * signs).sum().backward()
        rows = slice(0, 2) if rank == 0 else slice(2, 6)
        mine = x[rows].clone().requires_grad_()
        found = part(mine, None if given is None else given[rows])
        (found * signs[rows]).sum().backward()
        right.append(torch.allclose(found, expected[rows]))
        right.append(torch.allclose(mine.grad, whole.grad[rows]))
        right.append(torch.allclose(part.running_var, alone.running_var))
        right.append(torch.allclose(part.running_mean, alone.running_mean))
    return right


@pytest.mark.distributed
def test_synchronised_statistics_are_those_of_all_processes(tmp_path: Path) -> None:
    assert in_processes(_work, 2, tmp_path) == [[True] * 8] * 2
