from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.contract.example import Example
from tests.processes import in_processes
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.models import PrototypeNetwork
from lamina.nn import PrototypeHead
from lamina.objectives import Distillation, PrototypeObjective, PrototypePenalties, WeightedSum
from lamina.objectives.prototype import dead_prototypes, nearest_over_processes


def network() -> nn.Module:
    torch.manual_seed(0)
    return PrototypeNetwork(num_prototypes=5, classes=3, image=8, widths=(6, 4), weight_std=None)


def classifier() -> nn.Module:
    """Of somebody else, with the head put in."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), PrototypeHead(6, 3, 5))


def batch(rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(rows, 1, 8, 8, generator=generator),
        "labels": torch.randint(3, (rows,), generator=generator),
    }


def vectors(rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"inputs": torch.randn(rows, 4, generator=generator), "labels": torch.arange(rows) % 3}


EXAMPLES = [
    Example("objective", "prototype", model=network, batch=batch, bad={"reconstruction": -1.0}),
    Example("objective", "prototype_penalties", model=classifier, batch=vectors, bad={"data_to_prototype": -1.0}),
]


def test_it_is_the_weighted_sum_of_the_four_terms() -> None:
    net, data = network(), batch()
    found = PrototypeObjective(20.0, 2.0, 3.0, 5.0)(net, data)
    out, x = net(data["pixel_values"]), data["pixel_values"]
    d = (out.latent[:, None] - net.head.layer.prototypes).square().sum(-1)
    terms = {
        "classification": F.cross_entropy(out.logits, data["labels"]),
        "reconstruction": (out.reconstruction - x).square().flatten(1).sum(1).mean(),
        "prototype_to_data": torch.stack([d[:, j].min() for j in range(5)]).mean(),
        "data_to_prototype": torch.stack([row.min() for row in d]).mean(),
    }
    weights = dict(zip(terms, (20.0, 2.0, 3.0, 5.0), strict=True))
    torch.testing.assert_close(found["loss"], sum(w * terms[n] for n, w in weights.items()))
    for name, term in terms.items():
        torch.testing.assert_close(found[name], term.detach())
    assert found["count"] == 6
    assert found["measure"] == found["classification"]
    assert found["accuracy"] == (out.logits.argmax(1) == data["labels"]).float().mean()
    assert found["dead"] == 5 - len(set(d.argmin(1).tolist()))


def test_the_official_weights_are_the_default() -> None:
    assert list(PrototypeObjective().weights.values()) == [20.0, 1.0, 1.0, 1.0]


def test_the_gradient_of_the_whole_loss_is_right_and_the_penalties_are_not_each_other() -> None:
    net, data = network().double(), batch()
    data["pixel_values"] = data["pixel_values"].double()
    objective = PrototypeObjective(2.0, 0.5, 3.0, 5.0)

    def value(p: Tensor, w: Tensor) -> Tensor:
        swapped = {"head.layer.prototypes": p, "head.linear.weight": w}
        outputs = torch.func.functional_call(net, swapped, (data["pixel_values"],))
        return objective.loss(outputs, data)["loss"]

    given = [v.detach().clone().requires_grad_() for v in (net.head.layer.prototypes, net.head.linear.weight)]
    # The cross-entropy is computed in float32.
    assert torch.autograd.gradcheck(value, given, eps=1e-3, atol=1e-2, rtol=1e-2)
    (one,) = torch.autograd.grad(value(*given), given[:1])
    objective = PrototypeObjective(2.0, 0.5, 5.0, 3.0)
    (two,) = torch.autograd.grad(value(*given), given[:1])
    assert not torch.allclose(one, two)


def test_without_a_reconstruction_that_term_is_left_out() -> None:
    net, data = network().eval(), batch()
    found = PrototypeObjective(20.0, 99.0)(net, data)
    assert "reconstruction" not in found
    torch.testing.assert_close(
        found["loss"],
        20 * found["classification"] + found["prototype_to_data"] + found["data_to_prototype"],
        check_dtype=False,
    )


def test_names_of_the_batch() -> None:
    net, data = network(), batch()
    renamed = {"inputs": data["pixel_values"], "targets": data["labels"]}
    objective = PrototypeObjective()
    assert torch.equal(objective(net, renamed)["loss"], objective(net, data)["loss"])


def test_dead_prototypes_are_the_nearest_of_no_row() -> None:
    assert dead_prototypes(torch.tensor([[1.0, 2.0, 3.0], [1.0, 5.0, 0.5]])) == 1
    assert dead_prototypes(torch.zeros(0, 3)) == 3


def test_one_row_is_legal() -> None:
    assert torch.isfinite(PrototypeObjective()(network(), batch(1))["loss"])


def test_penalties_beside_any_objective_in_any_model() -> None:
    model, data = classifier(), vectors()
    found = PrototypePenalties("classification", 0.3, 0.7)(model, data)
    z = model[:2](data["inputs"])
    first, second = model[2].penalties(z)
    task = F.cross_entropy(model(data["inputs"]), data["labels"])
    torch.testing.assert_close(found["loss"], task + 0.3 * first + 0.7 * second)
    torch.testing.assert_close(found["prototype_to_data"], first.detach())
    torch.testing.assert_close(found["data_to_prototype"], second.detach())
    torch.testing.assert_close(found["task"], task.detach())
    found["loss"].backward()
    assert model[2].layer.prototypes.grad.any()


def test_penalties_share_the_forward_pass_of_a_sum() -> None:
    model, data = classifier(), vectors()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    own = PrototypePenalties()
    total = WeightedSum([(1.0, own), (0.5, PrototypePenalties(prototype_to_data=0.0))], ["own", "other"])
    found = total(model, data)
    assert len(calls) == 1
    torch.testing.assert_close(found["own"], own(model, data)["loss"].detach())
    distilled = WeightedSum([(1.0, own), (0.5, Distillation())])
    distilled.before_rewrite(model)
    distilled(model, data)["loss"].backward()


BAD: list[tuple[Any, str]] = [
    (lambda: PrototypeObjective(classification=-1.0), "weight classification must be at least 0, got -1.0"),
    (lambda: PrototypeObjective()(nn.Linear(4, 3), vectors()), "needs .distances in the outputs, got a Tensor"),
    (lambda: PrototypeObjective()(network(), {"pixel_values": batch()["pixel_values"]}), "needs 'targets'"),
    (lambda: PrototypeObjective()(network(), {**batch(), "labels": torch.full((6,), 3)}), r"lie in 0\.\.2"),
    (lambda: PrototypePenalties()(nn.Linear(4, 3), vectors()), "Linear has none: Replace"),
    (lambda: PrototypePenalties().loss(torch.zeros(2, 3), vectors(2)), "call the objective, not its loss"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_bad_input_is_met_with_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises((LaminaError, ShapeError), match=sentence):
        call()


def test_a_reconstruction_of_another_shape_is_refused() -> None:
    out = SimpleNamespace(logits=torch.zeros(2, 3), distances=torch.ones(2, 4), reconstruction=torch.zeros(2, 1, 7, 8))
    with pytest.raises(ShapeError, match=r"as the image, \(2, 1, 8, 8\), got \(2, 1, 7, 8\)"):
        PrototypeObjective().loss(out, batch(2))


def spread_out() -> tuple[nn.Module, dict[str, Tensor]]:
    """Prototypes that are nearest to different rows of the batch."""
    net, data = network(), batch(7)
    with torch.no_grad():
        net.head.layer.prototypes.copy_(net(data["pixel_values"]).latent[[0, 1, 3, 4, 6]] + 0.01)
    return net, data


def _worker(rank: int) -> Any:
    net, data = spread_out()
    # Unequal shares, as at the end of an epoch; the trainer weighs each process by its rows.
    mine = {k: (v[:3], v[3:])[rank] for k, v in data.items()}
    found = PrototypeObjective()(net, mine)
    local = PrototypeObjective(gather=False)(net, mine)
    (found["loss"] * found["count"] / 7).backward()
    gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
    dist.all_reduce(gradients)
    with torch.no_grad():
        alone = PrototypeObjective()(net.eval(), mine)["prototype_to_data"]
    tie = torch.ones(2, 3, requires_grad=True)
    nearest_over_processes(tie).backward()
    dist.all_reduce(tie.grad)
    return found["prototype_to_data"], local["prototype_to_data"], gradients, alone, tie.grad.sum()


@pytest.mark.distributed
def test_over_two_processes_it_is_the_loss_and_gradient_of_the_whole_batch(tmp_path: Any) -> None:
    results = in_processes(_worker, 2, tmp_path)
    net, data = spread_out()
    whole = PrototypeObjective()(net, data)
    whole["loss"].backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()])
    for rank in range(2):
        nearest, local, gradients, alone, tie = results[rank]
        torch.testing.assert_close(nearest, whole["prototype_to_data"])
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(local, nearest), "each process has some of the nearest rows"
        torch.testing.assert_close(alone, local)
        # One row of four has the nearest; both processes have two rows, and the mean over them is the gradient.
        assert float(tie) == pytest.approx(2.0)
