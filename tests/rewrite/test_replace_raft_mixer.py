"""Raft token mixing put in the place of attention: our vision transformer, transformers', a home-made one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.contract.example import Example
from tests.rewrite.test_replace_attention import Sunday, decided, images, ours, out, pixels, vit
from torch import Tensor, nn

from lamina import io
from lamina.errors import AnatomyError, LaminaError
from lamina.models import RaftMLP, Transformer
from lamina.nn import GridAsSequence, RaftTokenMixing
from lamina.rewrite import DropBlock, DropMLP, Replace, history, replay, rewrite

transformers = pytest.importorskip("transformers")

RAFT = "raft_token_mixing"
EXAMPLES = [
    Example(
        "pass", "replace", {"old": "attention", "new": RAFT}, model=ours, batch=pixels, bad={"options": {"rafts": 3}}
    )
]


def sunday() -> nn.Module:
    torch.manual_seed(0)
    return Sunday().eval()


def backbone(**options: object) -> RaftMLP:
    torch.manual_seed(0)
    sizes = {"widths": (8, 16), "depths": (2, 3), "patches": (2, 2), "image": 12, "classes": 5}
    return RaftMLP(**(sizes | options)).eval()


@pytest.mark.parametrize(("make", "prefix"), [(ours, 1), (vit, 1), (sunday, 2)])
def test_every_attention_becomes_a_branch_on_the_grid_of_the_patches(make, prefix: int) -> None:
    model, batch = make(), pixels()
    batches = None if make is ours else [{"pixel_values": batch["pixel_values"]}]
    before = out(model, batch)
    assert rewrite(model, Replace("attention", RAFT, options={"rafts": 4}), data=batches) is model
    assert (decided(model)["grid"], decided(model)["prefix"]) == ([3, 3], prefix)
    mixers = [m for m in model.modules() if isinstance(m, RaftTokenMixing)]
    # The block adds x itself.
    assert [(m.width, m.grid, m.rafts, m.residual) for m in mixers] == [(16, (3, 3), 4, False)] * 2
    assert out(model, batch).shape == before.shape
    with torch.no_grad():
        model(batch["pixel_values"])
    model.train()
    result = model(batch["pixel_values"])
    (result if isinstance(result, Tensor) else result.logits).square().sum().backward()
    assert all(p.grad is not None for m in mixers for p in m.parameters())


def test_the_cells_get_what_the_mixer_gives_and_class_tokens_nothing() -> None:
    model = rewrite(vit(), Replace("attention", RAFT))
    shim = model.vit.layers[0].attention
    assert isinstance(shim.mixer, GridAsSequence)
    x = images(2, 10, 16)
    mixed = shim(x)[0]
    assert not mixed[:, 0].any()
    expected = shim.mixer.mixer(x[:, 1:].mT.unflatten(2, (3, 3)))
    assert torch.equal(mixed[:, 1:], expected.flatten(2).mT)


def test_some_layers_only_and_options_of_the_card() -> None:
    model = rewrite(vit(), Replace("attention", RAFT, match="vit.layers.1.*", options={"residual": False}))
    assert [isinstance(m, RaftTokenMixing) for m in model.modules()].count(True) == 1
    other = rewrite(vit(), Replace("attention", RAFT, match="vit.layers.1.*"))
    assert torch.equal(out(model, pixels()), out(other, pixels()))


def test_the_decision_is_replayed_on_the_original_on_meta_and_after_loading(tmp_path) -> None:
    original = ours()
    model = rewrite(copy.deepcopy(original), Replace("attention", RAFT, seed=3))
    record = history(model)[0]
    assert json.loads(json.dumps(record.decision))["grid"] == [3, 3]
    assert torch.equal(out(replay(copy.deepcopy(original), [record]), pixels()), out(model, pixels()))
    ghost = replay(ours().to("meta"), [record])
    assert {n: p.shape for n, p in ghost.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    io.save(model, tmp_path / "saved")
    assert torch.equal(out(io.load(tmp_path / "saved"), pixels()), out(model, pixels()))


def test_momentum_of_the_rest_follows_and_the_new_weights_are_fresh() -> None:
    model = ours()
    optimizer = torch.optim.AdamW(model.parameters())
    model(pixels()["pixel_values"]).square().sum().backward()
    optimizer.step()
    kept = optimizer.state[model.head.weight]["exp_avg"].clone()
    rewrite(model, Replace("attention", RAFT), optimizer=optimizer)
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], kept)
    fresh = [p for m in model.modules() if isinstance(m, RaftTokenMixing) for p in m.parameters()]
    assert not any(optimizer.state.get(p) for p in fresh)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_what_cannot_be_a_grid_is_refused() -> None:
    with pytest.raises(AnatomyError, match="mixes whole images"):
        rewrite(Transformer(2, 16, 2, vocabulary=8, context=4), Replace("attention", RAFT))
    model = ours()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(LaminaError, match="rafts must divide width, got rafts=3 and width=16"):
        rewrite(model, Replace("attention", RAFT, options={"rafts": 3}))
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_passes_of_other_methods_find_the_parts_of_a_raft_mlp() -> None:
    batch = {"pixel_values": images(4, 3, 12, 12)}
    dropped = rewrite(backbone(), DropBlock(count=1, trunk="levels.1"), data=[batch])
    assert len(history(dropped)[0].decision["blocks"]) == 1
    assert out(dropped, batch).shape == (4, 5)
    thinner = rewrite(backbone(), DropMLP(count=1, trunk="levels.1"), data=[batch])
    assert history(thinner)[0].parameters_before - history(thinner)[0].parameters_after >= 2 * 16 * 64
    swapped = rewrite(
        backbone(), Replace("layer_norm", "rms_norm"), Replace("head", "fourier_head", options={"num_frequencies": 2})
    )
    assert not any(type(m) is nn.LayerNorm for m in swapped.modules())
    assert out(swapped, batch).shape == (4, 5)
    algebra = rewrite(backbone(), Replace("linear", "phm_linear", match="levels.*", options={"n": 2}))
    assert sum(type(m).__name__ == "PHMLinear" for m in algebra.modules()) == 10
    assert out(algebra, batch).shape == (4, 5)
