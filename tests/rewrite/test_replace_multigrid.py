"""V-cycles put in the place of convolutions and attention: transformers' networks, a home-made one, ours."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import convolutional
from tests.rewrite.test_replace_attention import Sunday, decided, ours, out, pixels, vit
from torch import Tensor, nn

from lamina import io
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.models import MetaFormer, Transformer
from lamina.nn import MultigridLinear, MultigridMixer
from lamina.rewrite import Replace, history, replay, rewrite

pytest.importorskip("transformers")

NEW = "multigrid_linear"
SCHEDULE = {"schedule": [[1, 1], [1, 0]]}


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def home() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.Conv2d(4, 2, 5, padding=2),
    )


def backbone() -> MetaFormer:
    torch.manual_seed(0)
    return MetaFormer((1,), (4,), mixers="identity_mixer", mlp=False, classes=3, patch=(3, 1, 1)).eval()


EXAMPLES = [
    Example(
        "pass",
        "replace",
        {"old": "conv2d", "new": NEW, "match": "embeds.0", "options": {"schedule": [[1, 0], [1, 0]]}},
        model=backbone,
        batch=lambda: {"pixel_values": images(2, 3, 8, 8)},
        bad={"match": "head"},
        only_ours="a convolution with a kernel of 3 at this path",
    )
]


def test_a_convolution_becomes_a_cycle_that_starts_as_it() -> None:
    model, x = home(), images(2, 1, 8, 9)
    before = model(x)
    optimizer = torch.optim.AdamW(model.parameters())
    before.square().sum().backward()
    optimizer.step()
    before, kept = model(x), optimizer.state[model[0].weight]["exp_avg"].clone()
    rewrite(model, Replace("conv2d", NEW, match="[02]", options=SCHEDULE), optimizer=optimizer)
    torch.testing.assert_close(model(x), before)
    cycles = [m for m in model if isinstance(m, MultigridLinear)]
    assert [(m.padding_mode, m.levels[0].pre[0].smoother.bias is None) for m in cycles] == [
        ("circular", False),
        ("zeros", True),
    ]
    assert torch.equal(optimizer.state[cycles[0].levels[0].pre[0].smoother.weight]["exp_avg"], kept)
    # And it learns to look further.
    far = torch.zeros(1, 1, 16, 16)
    far[0, 0, 8, 8] = 1.0

    def reach() -> int:
        with torch.no_grad():
            return int(((model[0](far) - model[0](0 * far)).abs().sum(1) > 0).sum())

    assert reach() == 9
    for _ in range(2):
        optimizer.zero_grad()
        model(images(2, 1, 16, 16)).square().sum().backward()
        optimizer.step()
    assert reach() > 25
    assert all(p.grad is not None for p in model.parameters())


def test_a_transformers_resnet_keeps_its_outputs() -> None:
    model, batch = convolutional()
    model.eval()
    before = out(model, batch)
    paths = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and (m.kernel_size, m.stride) == ((3, 3), (1, 1))
    ]
    assert len(paths) >= 4
    for path in paths[:2]:
        rewrite(model, Replace("conv2d", NEW, match=path, options={"schedule": [[1, 0], [1, 0]]}))
    torch.testing.assert_close(out(model, batch), before)
    assert len(history(model)) == 2
    model.train()
    model(**batch).logits.square().sum().backward()
    assert sum(isinstance(m, MultigridLinear) for m in model.modules()) == 2


def test_lines_and_volumes_too() -> None:
    for dim, conv in ((1, nn.Conv1d), (3, nn.Conv3d)):
        torch.manual_seed(0)
        model, x = nn.Sequential(conv(1, 2, 3, padding=1, padding_mode="reflect")), images(1, 1, *[8] * dim)
        before = model(x)
        rewrite(model, Replace(f"conv{dim}d", NEW, options=SCHEDULE))
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 2, 1),
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(2, 2, 3, 2, 1),
        nn.Conv2d(2, 2, 3, 1, 1, groups=2),
        nn.Conv2d(2, 2, 3, 1, 1, padding_mode="replicate"),
        nn.Conv2d(2, 2, 3, padding="valid"),
    ],
    ids=str,
)
def test_other_convolutions_are_refused_and_nothing_is_changed(conv: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), conv)
    with pytest.raises(ShapeError, match=r"kernel of 3.*choose others by match="):
        rewrite(model, Replace("conv2d", NEW))
    assert type(model[0]) is nn.Conv2d


def sunday() -> nn.Module:
    torch.manual_seed(0)
    return Sunday().eval()


@pytest.mark.parametrize(("make", "prefix"), [(ours, 1), (vit, 1), (sunday, 2)])
def test_every_attention_becomes_a_cycle_on_the_grid_of_the_patches(make, prefix: int) -> None:
    model, batch = make(), pixels()
    batches = None if make is ours else [{"pixel_values": batch["pixel_values"]}]
    before = out(model, batch)
    rewrite(model, Replace("attention", NEW, options={"padding_mode": "reflect"}), data=batches)
    assert (decided(model)["grid"], decided(model)["prefix"]) == ([3, 3], prefix)
    mixers = [m for m in model.modules() if isinstance(m, MultigridMixer)]
    assert [(m.in_channels, m.grid, m.schedule, m.padding_mode) for m in mixers] == [
        (16, (3, 3), ((2, 0),), "reflect")
    ] * 2
    assert out(model, batch).shape == before.shape
    model.train()
    result = model(batch["pixel_values"])
    (result if isinstance(result, Tensor) else result.logits).square().sum().backward()
    assert all(p.grad is not None for m in mixers for p in m.parameters())


def test_decisions_are_replayed_on_meta_and_after_loading(tmp_path) -> None:
    for make, one, batch in (
        (ours, Replace("attention", NEW, seed=3), pixels()),
        (backbone, Replace("conv2d", NEW, match="embeds.0", options=SCHEDULE), {"pixel_values": images(1, 3, 16, 16)}),
    ):
        original = make()
        model = rewrite(copy.deepcopy(original), one)
        record = history(model)[0]
        assert torch.equal(out(replay(copy.deepcopy(original), [record]), batch), out(model, batch))
        ghost = replay(make().to("meta"), [record])
        assert {n: p.shape for n, p in ghost.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
        io.save(model, tmp_path / "saved")
        assert torch.equal(out(io.load(tmp_path / "saved"), batch), out(model, batch))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(AnatomyError, match="mixes whole images"):
        rewrite(Transformer(2, 16, 2, vocabulary=8, context=4), Replace("attention", NEW))
    with pytest.raises(LaminaError, match="levels leave"):
        rewrite(ours(), Replace("attention", NEW, options={"schedule": [[1, 0]] * 4}))
    with pytest.raises(LaminaError, match="no option 'levels'"):
        rewrite(home(), Replace("conv2d", NEW, match="0", options={"levels": 3}))
