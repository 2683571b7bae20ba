from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models import Terminator
from lamina.nn import CoordinateKernel
from lamina.nn.hyper_convolution.block import SFNEBlock

SMALL: dict[str, Any] = {
    "classes": 3,
    "image": 4,
    "channels": 1,
    "bottlenecks": (2, 2),
    "local_kernels": (1, 3, 3, 1),
    "groups": 2,
    "skips": {1: (0,)},
}


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "model",
        "terminator",
        SMALL | {"bottlenecks": (2,), "branches": ("global",)},  # All of it is compiled below, in the slow run.
        batch=lambda: {"pixel_values": images(2, 1, 4, 4), "labels": torch.tensor([0, 2])},
        bad={"skips": {0: (0,)}},
    )
]


def small(**options: object) -> Terminator:
    torch.manual_seed(0)
    return Terminator(**{**SMALL, **options})


def test_the_published_network_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = Terminator()
    counts = [sum(p.numel() for p in b.parameters()) for b in model.blocks]
    assert counts == [53_377, 57_824, 105_188, 253_580, 863_996]
    assert sum(p.numel() for p in model.head.parameters()) == 2_890
    assert sum(p.numel() for p in model.parameters()) == 1_336_855
    # Registered besides: none; the scalars that are: one a local operator and one a block.
    assert sum(p.dim() == 0 for p in model.parameters()) == 25
    assert not list(model.buffers())
    assert [b.norm.width for b in model.blocks] == [12, 36, 72, 144, 288]
    assert [b.slow.layers for b in model.blocks] == [3, 2, 2, 2, 2]
    assert [b.dropout for b in model.blocks] == [0, 0.05, 0.05, 0.05, 0.05]
    assert [b.skips for b in model.blocks] == [(), (), (12,), (36,), (72, 36)]
    assert [m.kernel.size[0] for m in model.blocks[4].locals] == [3, 9, 5, 7]


def test_the_network_of_the_digits_has_the_parameters_of_the_card() -> None:
    with torch.device("meta"):
        model = Terminator(10, 8, 1, bottlenecks=(12, 2, 2), slow_layers=2, local_kernels=(3, 5, 5, 3), skips={})
    assert sum(p.numel() for p in model.parameters()) == 167_787


def test_blocks_are_chained_with_the_earlier_outputs_they_read() -> None:
    model, x = small(bottlenecks=(2, 2, 2), skips={2: (0,), 1: (), 7: (3,)}).eval(), images(2, 1, 4, 4)
    first = model.blocks[0](x)
    second = model.blocks[1](first)
    third = model.blocks[2](second, first)
    torch.testing.assert_close(model(x), model.head(third.mean((2, 3))))


@pytest.mark.parametrize("side", [2, 7, 9])
def test_it_takes_square_images_of_any_size(side: int) -> None:
    model = small()
    asked: list[Any] = []
    for block in model.blocks:
        block.slow.register_forward_hook(lambda m, args, kwargs, out: asked.append(out.shape), with_kwargs=True)
    assert model(images(2, 1, side, side)).shape == (2, 3)
    assert asked == [(1, 1, side, side), (1, 2, side, side)]


def test_its_slow_kernels_need_no_images_and_carry_gradients() -> None:
    model = small()
    kernels = model.slow_kernels()
    assert [(tuple(k.shape), b) for k, b in kernels] == [((1, 1, 4, 4), 2), ((1, 2, 4, 4), 2)]
    kernels[1][0].sum().backward()
    assert model.blocks[1].slow.out.weight.grad is not None
    assert model.blocks[0].slow.out.weight.grad is None


def test_batch_dependence_is_real_as_published_and_absent_with_both_options() -> None:
    x = images(4, 1, 4, 4)
    with torch.no_grad():
        published = small().eval()
        assert (published(x)[:1] - published(x[:1])).abs().max() > 1e-3
        half = small(track_stats=True)
        half(x)
        assert (half.eval()(x)[:1] - half(x[:1])).abs().max() > 1e-3, "the kernels still come from the batch"
        alone = small(track_stats=True, per_sample=True)
        alone(x)
        torch.testing.assert_close(alone.eval()(x)[:1], alone(x[:1]), rtol=1e-4, atol=1e-5)


def test_without_branches_and_with_another_frequency() -> None:
    model = small(branches=("global",), omega0=1.0, slow_layers=(2, 1))
    assert not any("locals" in n for n, _ in model.named_parameters())
    assert {m.omega0 for m in model.modules() if isinstance(m, CoordinateKernel)} == {1.0}
    assert [b.slow.layers for b in model.blocks if isinstance(b, SFNEBlock)] == [2, 1]


def test_the_head_is_a_slot() -> None:
    assert isinstance(small(head={"name": "fourier_head", "num_frequencies": 1}).head, nn.Module)
    assert type(small(head={"name": "fourier_head", "num_frequencies": 1}).head).__name__ == "FourierHead"


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(RecipeError, match="dropout has 3 entries for 2 blocks"):
        small(dropout=(0, 0, 0))
    with pytest.raises(RecipeError, match="block 1 cannot read the output of block 1"):
        small(skips={1: (1,)})
    with pytest.raises(ShapeError, match="groups must divide width, both at least 1, got width=2 and groups=12"):
        small(groups=12)
    with pytest.raises(ShapeError, match="kernel_size must be odd"):
        small(local_kernels=(2, 3, 3, 3))
    with pytest.raises(ShapeError, match="number of blocks must be at least 1"):
        small(bottlenecks=())
    with pytest.raises(ShapeError, match=r"Terminator takes floating-point square maps \(B, 1, S, S\)"):
        small()(images(1, 1, 4, 5))
    with pytest.raises(ShapeError, match="tiled"):
        small(bottlenecks=(4, 2, 3), skips={1: (0,), 2: (1,)}, channels=1) and Terminator(
            3, 4, 2, bottlenecks=(3, 1), groups=2, skips={1: (0,)}
        ) and SFNEBlock(6, 2, 4, groups=2, skips=(4,))


@pytest.mark.slow  # Its graph has thousands of nodes; the fast half is the experiment's smoke run.
def test_the_published_size_trains_a_step_compiled_or_not() -> None:
    torch.manual_seed(0)
    model, x = Terminator(), images(4, 3, 32, 32)
    torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        # In one graph; inductor's kernels for it alone take minutes to build.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
