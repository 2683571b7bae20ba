from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lamina.errors import RecipeError, ShapeError
from lamina.nn import Attention, IdentityMixer, MixerTokenMixing, RaftTokenMixing, ResizeTokenMixing
from lamina.recipe import build


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


NODE = {"name": "raft_token_mixing", "residual": False}
EXAMPLES = [
    Example(
        kind,
        "resize_token_mixing",
        {"mixer": NODE, "grid": (3, 4), "width": 4},
        inputs=lambda: (maps(2, 4, 5, 3),),
        bad={"grid": (0, 4)},
    )
    for kind in ("mixer", "layer")
]


class Ops(TorchDispatchMode):
    """Which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def resizes(module: nn.Module, x: Tensor) -> int:
    with Ops() as seen:
        module(x)
    return sum("upsample" in n for n in seen.names)


def test_at_its_own_size_it_is_the_mixer_and_interpolates_nothing() -> None:
    torch.manual_seed(0)
    mixer, x = RaftTokenMixing(4, (3, 4)), maps(2, 4, 3, 4)
    wrapped = ResizeTokenMixing(mixer, (3, 4))
    assert torch.equal(wrapped(x), mixer(x))
    assert resizes(wrapped, x) == 0
    assert resizes(wrapped, maps(2, 4, 6, 4)) == 2


@pytest.mark.parametrize("size", [(6, 8), (5, 3), (1, 7), (2, 63)])
def test_elsewhere_it_resizes_mixes_and_resizes_back(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mixer, x = MixerTokenMixing(4, (3, 4)), maps(2, 4, *size)
    there = F.interpolate(x, (3, 4), mode="bicubic", align_corners=False)
    expected = F.interpolate(mixer(there), size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(ResizeTokenMixing(mixer, (3, 4))(x), expected)


@pytest.mark.parametrize("size", [(3, 4), (6, 9), (2, 3), (63, 1)])
def test_a_constant_map_passes_unchanged(size: tuple[int, int]) -> None:
    x = torch.tensor([0.3, -2.0])[None, :, None, None].expand(2, 2, *size)
    torch.testing.assert_close(ResizeTokenMixing(IdentityMixer(), (3, 4))(x), x.contiguous())


def test_a_mixer_is_built_from_its_node() -> None:
    wrapped = build({"name": "resize_token_mixing", "mixer": NODE}, "mixer", width=4, grid=(3, 4), heads=1)
    assert isinstance(wrapped.mixer, RaftTokenMixing)
    assert not wrapped.mixer.residual
    with pytest.raises(RecipeError, match="needs the width"):
        ResizeTokenMixing("raft_token_mixing", (3, 4))


def test_a_mixer_of_sequences_reads_the_cells_row_by_row() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 2, context=12), maps(2, 8, 3, 4)
    wrapped = ResizeTokenMixing(attention, (3, 4))
    torch.testing.assert_close(wrapped(x), attention(x.flatten(2).mT).mT.unflatten(2, (3, 4)))
    assert wrapped(maps(2, 8, 4, 5)).shape == (2, 8, 4, 5)


def test_bf16_maps_stay_bf16() -> None:
    wrapped = ResizeTokenMixing(IdentityMixer(), (3, 4))
    assert wrapped(maps(1, 2, 6, 8).bfloat16()).dtype is torch.bfloat16


def test_a_map_of_few_cells_is_warned_about() -> None:
    wrapped = ResizeTokenMixing(IdentityMixer(), (8, 9))
    with pytest.warns(UserWarning, match=r"a map of \(1, 9\) cells is blown up .* \(8, 9\), more than 4 times"):
        wrapped(maps(1, 2, 1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(maps(1, 2, 2, 3))
        wrapped(maps(1, 2, 64, 90))


def test_any_size_runs_in_one_compiled_graph() -> None:
    torch.manual_seed(0)
    wrapped = ResizeTokenMixing(RaftTokenMixing(4, (3, 4)), (3, 4)).eval()
    compiled = torch.compile(wrapped, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((3, 4), (5, 7), (6, 3)):
            torch.testing.assert_close(compiled(maps(2, 4, *size)), wrapped(maps(2, 4, *size)))


def test_what_is_no_map_is_refused() -> None:
    wrapped = ResizeTokenMixing(IdentityMixer(), (3, 4))
    for x in (maps(4, 3, 4), maps(2, 4, 3, 4).long()):
        with pytest.raises(ShapeError, match=r"floating-point maps \(B, C, H, W\)"):
            wrapped(x)
