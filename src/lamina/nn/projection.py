"""The small network between an encoder's features and a loss that compares them."""

from __future__ import annotations

from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._inputs import check_features
from lamina.registry import register


@register("layer", "projection", source="Chen et al., SimCLR (2020), arXiv 2002.05709, section 2.1")
class ProjectionHead(nn.Module):
    """Two linear layers with a ReLU between: what a contrastive loss sees of an encoder, and nobody else.

    x (..., in_features) -> (..., width). Trained along with the encoder and then left off, for what the loss asks to
    forget (by which way up, at which site) is lost behind it, not before.

    Args:
        in_features: width of the encoder's features.
        width: of the result.
        hidden: of the layer between; None = in_features.
    Raises:
        ShapeError: a size below 1, or (at the call) an x that is not floating-point (..., in_features).
    Example:
        >>> import torch
        >>> ProjectionHead(512)(torch.randn(2, 512)).shape
        torch.Size([2, 128])
    """

    def __init__(self, in_features: int, width: int = 128, hidden: int | None = None) -> None:
        super().__init__()
        hidden = in_features if hidden is None else hidden
        if min(in_features, width, hidden) < 1:
            raise ShapeError(f"ProjectionHead: sizes must be positive, got {in_features=}, {width=}, {hidden=}")
        self.in_features, self.width = in_features, width
        self.layers = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension."""
        check_features("ProjectionHead", x, self.in_features)
        projected: Tensor = self.layers(x)
        return projected
