from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import PrototypeHead, PrototypeLayer, prototype_penalties, squared_distances


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "layer",
        "prototype_layer",
        {"num_prototypes": 5, "width": 6},
        inputs=lambda: (latents(3, 6),),
        bad={"num_prototypes": 0},
    ),
    Example(
        "layer",
        "prototype_head",
        {"in_features": 6, "num_classes": 3, "num_prototypes": 5},
        inputs=lambda: (latents(3, 6),),
        bad={"in_features": 0},
    ),
]


def naive(z: Tensor, p: Tensor) -> Tensor:
    """Difference by difference, in float64."""
    return (z.double()[..., None, :] - p.double()).square().sum(-1)


def test_the_hand_computed_case() -> None:
    d = squared_distances(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[1.0], [5.0]]))
    assert d.tolist() == [[1.0, 25.0], [0.0, 16.0], [9.0, 1.0]]
    first, second = prototype_penalties(d)
    assert float(first) == 0.5
    assert float(second) == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "count", "width"), [(1, 1, 1), (7, 63, 7), (63, 7, 63), (64, 15, 40)])
def test_distances_and_gradients_are_those_of_the_differences(
    rows: int, count: int, width: int, dtype: torch.dtype
) -> None:
    z, p = latents(rows, width).to(dtype).requires_grad_(), latents(count, width, seed=1).to(dtype).requires_grad_()
    found = squared_distances(z, p)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    z64, p64 = z.detach().double().requires_grad_(), p.detach().double().requires_grad_()
    expected = naive(z64, p64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (found - expected).abs().max() <= tolerance * expected.max()
    torch.testing.assert_close(found.double(), torch.cdist(z64, p64).square(), rtol=1e-4, atol=1e-4)
    weight = latents(rows, count, seed=2).double()
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, other in ((z, z64), (p, p64)):
        scale = other.grad.abs().max()
        assert (ours.grad.double() - other.grad).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * scale


def test_distances_far_from_the_origin_keep_their_digits_and_are_never_negative() -> None:
    z = 1000 + latents(50, 8)
    p = z[:5] + 0.01 * latents(5, 8, seed=1)
    found = squared_distances(z, p)
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), naive(z, p), rtol=1e-4, atol=1e-5)
    assert (squared_distances(z, z[:3]).diagonal() < 1e-5).all()


def test_autocast_does_not_lower_distances_or_logits() -> None:
    head, z = PrototypeHead(8, 3, 5), latents(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = head(z)
        added = head.contributions(z)
    assert torch.equal(lowered, head(z))
    assert torch.equal(added, head.contributions(z))
    assert head.bfloat16()(z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (6,), (0, 6)])
def test_it_is_called_like_a_linear_layer_and_is_linear_in_distances(shape: tuple[int, ...]) -> None:
    head, z = PrototypeHead(6, 3, 5), latents(*shape)
    assert head(z).shape == nn.Linear(6, 3)(z).shape
    expected = naive(z, head.layer.prototypes) @ head.linear.weight.double().T
    torch.testing.assert_close(head(z).double(), expected, rtol=1e-5, atol=1e-5)
    added = head.contributions(z)
    assert added.shape == (*shape[:-1], 5, 3)
    torch.testing.assert_close(added.sum(-2), head(z), rtol=1e-5, atol=1e-6)


def test_moving_all_or_reordering_prototypes_changes_nothing() -> None:
    head, z = PrototypeHead(6, 3, 5).double(), latents(4, 6).double()
    before, shift, order = head(z), latents(6, seed=3).double(), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        head.layer.prototypes.add_(shift)
        torch.testing.assert_close(head(z + shift), before)
        head.layer.prototypes.copy_(head.layer.prototypes[order])
        assert not torch.allclose(head(z + shift), before)
        head.linear.weight.copy_(head.linear.weight[:, order])
    torch.testing.assert_close(head(z + shift), before)


def test_penalties_go_through_the_nearest_one_alone_and_are_not_each_other() -> None:
    d = latents(7, 3).abs().requires_grad_()
    first, second = prototype_penalties(d)
    (one,) = torch.autograd.grad(first, d, retain_graph=True)
    (two,) = torch.autograd.grad(second, d)
    assert (one != 0).sum(0).tolist() == [1, 1, 1]
    assert (two != 0).sum(1).tolist() == [1] * 7
    torch.testing.assert_close(one.sum(), torch.tensor(1.0))
    torch.testing.assert_close(two.sum(), torch.tensor(1.0))
    assert not torch.equal(one, two)
    tied = torch.ones(4, 2, requires_grad=True)
    prototype_penalties(tied)[0].backward()
    assert sorted(tied.grad[:, 0].tolist()) == [0.0, 0.0, 0.0, 0.5]
    assert [float(v) for v in prototype_penalties(torch.zeros(0, 3))] == [0.0, 0.0]


def test_the_head_gives_the_penalties_of_its_latents() -> None:
    head, z = PrototypeHead(6, 3, 5), latents(2, 4, 6)
    d = naive(z, head.layer.prototypes).flatten(0, 1)
    first, second = head.penalties(z)
    torch.testing.assert_close(first.double(), d.min(0).values.mean())
    torch.testing.assert_close(second.double(), d.min(1).values.mean())


def test_the_gradient_of_head_and_penalties_is_right() -> None:
    head, z = PrototypeHead(3, 2, 4).double(), latents(5, 3).double().requires_grad_()

    def value(z: Tensor, p: Tensor, w: Tensor) -> Tensor:
        d = squared_distances(z, p)
        first, second = prototype_penalties(d)
        return (d @ w.T).logsumexp(-1).sum() + first + 2 * second

    weights = [w.detach().clone().requires_grad_() for w in (head.layer.prototypes, head.linear.weight)]
    assert torch.autograd.gradcheck(value, (z, *weights))


def test_the_class_of_a_prototype_is_that_of_its_most_negative_weight() -> None:
    head = PrototypeHead(2, 3, 3)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[0.1, -2.0, 0.5], [-0.3, -1.0, 0.4], [0.2, 5.0, -0.1]]))
    assert head.prototype_class().tolist() == [1, 0, 2]


def test_the_start_is_the_official_one_and_the_seed_s() -> None:
    head = PrototypeHead(40, 10)
    assert head.layer.prototypes.shape == (15, 40)
    for value in (head.layer.prototypes.detach(), head.linear.weight.detach()):
        assert 0 <= float(value.min()) < 0.1 < 0.9 < float(value.max()) < 1
    assert head.linear.bias is None
    torch.manual_seed(5)
    again, other = PrototypeHead(40, 10), PrototypeHead(40, 10, seed=1)
    assert torch.equal(again.linear.weight, head.linear.weight)
    assert not torch.equal(other.layer.prototypes, head.layer.prototypes)
    assert not torch.equal(other.linear.weight, head.linear.weight)
    assert PrototypeLayer(50, 40, "normal").prototypes.min() < -2
    with torch.device("meta"):
        assert PrototypeHead(4, 3).layer.prototypes.is_meta


def clusters() -> tuple[Tensor, Tensor, Tensor]:
    """Three classes, the first of them in two places."""
    centres = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]])
    z = (centres[:, None] + 0.1 * latents(4, 20, 2)).flatten(0, 1)
    return centres, z, torch.tensor([0, 0, 1, 2]).repeat_interleave(20)


def test_prototypes_start_at_the_clusters_of_latents() -> None:
    centres, z, _ = clusters()
    layer = PrototypeLayer(4, 2)
    assert layer.initialize(z) is None
    assert naive(centres, layer.prototypes).min(1).values.max() < 0.01
    same = PrototypeLayer(4, 2)
    same.initialize(z)
    assert torch.equal(same.prototypes, layer.prototypes)


def test_with_labels_every_class_has_prototypes_and_the_head_knows_them() -> None:
    centres, z, labels = clusters()
    head = PrototypeHead(2, 3, 4)
    head.initialize(z, labels)
    assert head.prototype_class().tolist() == [0, 0, 1, 2]
    assert naive(centres, head.layer.prototypes).min(1).values.max() < 0.01
    # A class with two prototypes adds up two distances: told apart where every class has one.
    even = PrototypeHead(2, 3, 3)
    even.initialize(z[20:], labels[20:])
    assert (even(z[20:]).argmax(1) == labels[20:]).all()
    assert even(z).abs().max() < 10


def test_merging_equal_prototypes_keeps_the_logits() -> None:
    head, z = PrototypeHead(3, 2, 5), latents(4, 3)
    with torch.no_grad():
        head.layer.prototypes[3] = head.layer.prototypes[1]
        head.layer.prototypes[4] = head.layer.prototypes[0] + 1e-4
    before = head(z)
    assert head.merge(1e-3) == [[0, 4], [1, 3], [2]]
    assert head.layer.prototypes.shape == (3, 3)
    torch.testing.assert_close(head(z), before, rtol=1e-3, atol=1e-3)
    assert head.merge(0.0) == [[0], [1], [2]]
    chain = PrototypeHead(1, 2, 3)
    with torch.no_grad():
        chain.layer.prototypes.copy_(torch.tensor([[0.0], [2.0], [1.0]]))
    assert chain.merge(1.0) == [[0, 1, 2]]


BAD: list[tuple[Any, str]] = [
    (lambda: PrototypeLayer(0, 3), "at least 1, got 0 and 3"),
    (lambda: PrototypeLayer(2, 3, "unifrm"), "'uniform' or 'normal', got 'unifrm'"),
    (lambda: PrototypeHead(3, 0), "at least 1, got 3 and 0"),
    (lambda: PrototypeHead(3, 2)(torch.zeros(2, 4)), r"width 3, got torch.float32 \(2, 4\)"),
    (lambda: PrototypeHead(3, 2)(torch.zeros(2, 3, dtype=torch.long)), "floating-point"),
    (lambda: squared_distances(torch.zeros(2, 3), torch.zeros(3)), r"one q, got \(2, 3\) and \(3,\)"),
    (lambda: squared_distances(torch.zeros(2, 3).long(), torch.zeros(2, 3)), "floating-point values, got torch.int64"),
    (lambda: PrototypeLayer(3, 2).initialize(torch.zeros(2, 2)), "at least as many latents to start from, got 2"),
    (lambda: PrototypeLayer(3, 2).initialize(torch.zeros(5, 4)), r"must be \(n, 2\), got \(5, 4\)"),
    (lambda: PrototypeLayer(1, 2).initialize(torch.rand(4, 2), torch.arange(4)), "cannot start at 4 classes"),
    (lambda: PrototypeLayer(3, 2).initialize(torch.rand(4, 2), torch.zeros(3).long()), "one a latent"),
    (lambda: PrototypeHead(2, 3).initialize(torch.rand(4, 2), torch.arange(4)), r"lie in 0\.\.2, got 0 to 3"),
    (lambda: PrototypeHead(3, 2).merge(-1.0), "at least 0, got -1.0"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_bad_input_is_met_with_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises((LaminaError, ShapeError), match=sentence):
        call()


def test_fewer_prototypes_than_classes_are_worth_a_warning() -> None:
    with pytest.warns(UserWarning, match="4 prototypes cannot be one of each of 5 classes"):
        PrototypeHead(3, 5, 4)
