from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example

from lamina.errors import ShapeError
from lamina.nn import ProjectionHead

EXAMPLES = [
    Example(
        "layer",
        "projection",
        {"in_features": 6, "width": 4},
        inputs=lambda: (torch.randn(3, 6, generator=torch.Generator().manual_seed(0)),),
        bad={"width": 0},
    )
]


def test_it_is_two_linear_layers_with_a_relu_between() -> None:
    torch.manual_seed(0)
    head, x = ProjectionHead(5, 3, hidden=7), torch.randn(2, 63, 5)
    first, last = head.layers[0], head.layers[2]
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(head(x), hidden @ last.weight.T + last.bias)


@pytest.mark.parametrize(("width", "count"), [(512, 328_320), (2048, 4_458_624)])
def test_sizes_of_the_published_heads(width: int, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ProjectionHead(width).parameters()) == count


def test_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"takes floating-point \(\.\.\., 5\), got torch.float32 \(2, 4\)"):
        ProjectionHead(5)(torch.zeros(2, 4))
