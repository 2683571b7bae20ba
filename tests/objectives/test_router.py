"""The routers' loss: ln 2 where they know nothing, what a router gets from it, and that it needs routers."""

import math

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import llama, ours
from torch.nn import functional as F

from lamina import probe
from lamina.errors import LaminaError
from lamina.nn import TokenRouting
from lamina.objectives import NextToken, RouterLoss, WeightedSum
from lamina.objectives.router import membership_loss
from lamina.rewrite import DepthRouting, rewrite


def routed():
    return rewrite(ours()[0], DepthRouting([1, 2]))


def batch():
    ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


EXAMPLES = [Example("objective", "router_loss", model=routed, batch=batch)]


def test_a_router_that_knows_nothing_costs_ln_2_in_every_layer():
    model = routed()
    torch.nn.init.zeros_(model.token_router.weight)
    losses = RouterLoss()(model.train(), batch())
    assert float(losses["loss"].detach()) == pytest.approx(2 * math.log(2), rel=1e-6)
    assert int(losses["count"]) == 32


def test_it_is_the_cross_entropy_of_what_the_routers_gave_and_chose():
    model = routed().train()
    seen = []
    paths = [p for p, m in model.named_modules() if isinstance(m, TokenRouting)]
    with probe.observe(model, dict.fromkeys(paths, lambda m, a, k, o: seen.append(o))):
        model(batch()["input_ids"])
    expected = sum(F.cross_entropy(c.logits.flatten(0, 1), c.enters.flatten().long()) for c in seen)
    found = RouterLoss()(model, batch())
    torch.testing.assert_close(found["loss"], expected)
    assert all(int(c.enters.sum()) == 16 for c in seen)
    agreeing = torch.stack([((c.probability >= 0.5) == c.enters).float().mean() for c in seen]).mean()
    torch.testing.assert_close(found["agreement"], agreeing)


def test_padding_is_not_counted():
    logits = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    enters = torch.tensor([[True, False, True], [False, True, False]])
    real = torch.tensor([[True, True, False], [True, True, True]])
    loss, count = membership_loss(logits, enters, real)
    torch.testing.assert_close(loss, F.cross_entropy(logits[real], enters[real].long()))
    assert int(count) == 5


def test_beside_a_task_the_model_runs_once_and_the_router_learns_from_both():
    model, runs = routed().train(), []
    objective = WeightedSum([(1.0, NextToken()), (0.01, RouterLoss())], ["next_token", "router_loss"])
    with probe.observe(model, {"blocks.0": lambda *_: runs.append(1)}):
        losses = objective(model, batch())
    assert len(runs) == 1
    torch.testing.assert_close(losses["loss"], losses["next_token"] + 0.01 * losses["router_loss"])
    losses["loss"].backward()
    assert model.token_router.weight.grad.abs().max() > 0
    assert float(objective(model.eval(), batch())["router_loss"]) == 0.0


def test_it_follows_a_transformers_model_under_checkpointing():
    model, _ = llama()
    model = rewrite(model, DepthRouting([1, 2]))
    plain = RouterLoss()(model.train(), batch())["loss"]
    plain.backward()
    wanted = model.model.token_router.weight.grad.clone()
    model.zero_grad()
    model.activation_checkpointing_enable()
    RouterLoss()(model, batch())["loss"].backward()
    torch.testing.assert_close(model.model.token_router.weight.grad, wanted)


def test_it_waits_for_routers_where_a_pass_will_come_and_is_refused_where_none_will():
    objective = RouterLoss()
    with pytest.raises(LaminaError, match="needs a model with routed blocks"):
        objective.fits(ours()[0])
    objective.fits(ours()[0], until=0.5)
    objective.fits(routed())
    before = objective(ours()[0], batch())
    assert (float(before["loss"]), int(before["count"])) == (0.0, 4)
    with pytest.raises(LaminaError, match="call the objective"):
        RouterLoss().loss(torch.zeros(1), batch())
