from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.errors import ShapeError
from lamina.nn.attention import Attention
from lamina.nn.layout import GridAsSequence, SequenceAsGrid, layout_of


def test_a_grid_mixer_runs_on_cells_row_by_row_and_leaves_the_prefix_alone() -> None:
    class ShiftRight(nn.Module):
        layout = "grid"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.roll(1, dims=3)

    layer = GridAsSequence(ShiftRight(), grid=(2, 3), prefix=1)
    x = torch.tensor([9.0, 0, 1, 2, 3, 4, 5]).view(1, 7, 1)
    assert layer(x).flatten().tolist() == [0, 2, 0, 1, 5, 3, 4]
    assert layout_of(layer) == "sequence"
    with pytest.raises(ShapeError, match=r"expected 1 \+ 2 \* 3 tokens, got 6"):
        layer(x[:, 1:])


def test_there_and_back_is_the_mixer_itself() -> None:
    torch.manual_seed(0)
    mixer = Attention(8, 2)
    grid = SequenceAsGrid(mixer)
    assert layout_of(grid) == "grid"
    assert layout_of(mixer) == "sequence"
    image = torch.randn(2, 8, 3, 5)
    assert torch.allclose(grid(image)[1, :, 2, 4], mixer(image.flatten(2).mT)[1, 14], atol=1e-6)
    x = torch.randn(2, 15, 8)
    assert torch.allclose(GridAsSequence(grid, (3, 5))(x), mixer(x), atol=1e-6)


def test_prefix_follows_autocast() -> None:
    layer = GridAsSequence(nn.Conv2d(4, 4, 3, padding=1), grid=(2, 2), prefix=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 6, 4)).dtype == torch.bfloat16
