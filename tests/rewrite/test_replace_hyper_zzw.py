"""The global mixer in place of attention, and convolutions whose kernel is a function of the place in it."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.contract.foreign import convolutional
from tests.rewrite.test_replace_attention import Sunday, ours, out, pixels, vit
from torch import Tensor, nn

from lamina import io
from lamina.errors import LaminaError, RecipeError
from lamina.nn import CoordinateConv2d, HyperZZWGlobal
from lamina.optim import Kar3
from lamina.rewrite import Replace, history, replay, rewrite

GLOBAL, CONV = "hyper_zzw_global", "coordinate_conv2d"


def home_made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(4, 4, 7, padding=3, groups=4),
        nn.Flatten(),
        nn.Linear(256, 3),
    ).eval()


def sixteen() -> dict[str, Tensor]:
    return {"inputs": torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize(("make", "prefix"), [(ours, 1), (vit, 1), (lambda: Sunday().eval(), 2)])
def test_attention_becomes_the_product_of_maps(make, prefix: int) -> None:
    model, batch = make(), pixels()
    batches = None if make is ours else [{"pixel_values": batch["pixel_values"]}]
    model = rewrite(model, Replace("attention", GLOBAL, options={"hidden": 8, "omega0": 1.0}), data=batches)
    mixers = [m for m in model.modules() if isinstance(m, HyperZZWGlobal)]
    assert [(m.width, m.kernel.size, m.kernel.omega0) for m in mixers] == [(16, (3, 3), 1.0)] * 2
    assert history(model)[0].decision["prefix"] == prefix
    result = model.train()(batch["pixel_values"])
    (result if isinstance(result, Tensor) else result.logits).square().sum().backward()
    assert all(p.grad is not None for m in mixers for p in m.parameters())


@pytest.mark.parametrize("make", [convolutional, lambda: (home_made(), sixteen())])
def test_a_convolution_becomes_a_function_of_the_place_with_the_same_outputs(make) -> None:
    model, batch = make()
    model.eval()
    before = copy.deepcopy(model)
    count = sum(type(m) is nn.Conv2d for m in model.modules())
    model = rewrite(model, Replace("conv2d", CONV), data=[batch])
    layers = [m for m in model.modules() if isinstance(m, CoordinateConv2d)]
    assert len(layers) == count > 0
    assert not any(type(m) is nn.Conv2d for m in model.modules())
    torch.testing.assert_close(out(model, batch), out(before, batch), rtol=1e-3, atol=1e-3)
    assert torch.equal(out(replay(copy.deepcopy(before), history(model)).eval(), batch), out(model, batch))
    skeleton = replay(before.to("meta"), history(model))
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_biases_keep_their_optimizer_state_and_frozen_stays_frozen() -> None:
    model = home_made()
    model[0].requires_grad_(False)
    optimizer = Kar3(p for p in model.parameters() if p.requires_grad)
    model(sixteen()["inputs"]).sum().backward()
    optimizer.step()
    mean = optimizer.state[model[2].bias]["mean_1"].clone()
    model = rewrite(model, Replace("conv2d", CONV, options={"hidden": 16}), optimizer=optimizer)
    assert torch.equal(optimizer.state[model[2].bias]["mean_1"], mean)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[2].parameters())
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_it_is_saved_and_loaded(tmp_path) -> None:
    model = rewrite(ours(), Replace("attention", GLOBAL, options={"hidden": 8}), Replace("conv2d", CONV))
    io.save(model, tmp_path / "saved")
    assert torch.equal(out(io.load(tmp_path / "saved"), pixels()), out(model, pixels()))


def test_what_cannot_be_replaced_is_refused() -> None:
    with pytest.raises(LaminaError, match="omega0 must be a finite number above 0"):
        rewrite(home_made(), Replace("conv2d", CONV, options={"omega0": -1.0}))
    with pytest.raises(RecipeError, match="has no option 'hiden'"):
        rewrite(home_made(), Replace("conv2d", CONV, options={"hiden": 3}))
    from tests.rewrite.test_replace_attention import decoder

    with pytest.raises(LaminaError, match="sees earlier tokens only"):
        rewrite(decoder(), Replace("attention", GLOBAL))
