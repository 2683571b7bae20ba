"""Several views of each row, through an encoder that takes single ones."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn

from lamina.batches import logits
from lamina.errors import LaminaError, ShapeError
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("model", source="Chen et al., SimCLR (2020), arXiv 2002.05709")
class EachView(nn.Module):
    """Any encoder, given several views of each row: every view is a row to it.

    For objectives that compare views (`weighted_contrastive`) on data that shows several (`augmented_views`). With the
    encoder's features (B, d): inputs (B, views, ...) -> (B, views, d), and single rows as ever, (B, ...) -> (B, d).

    Args:
        encoder: a module, or built as encoder(classes=, channels=, image=), as far as it names them and they are given.
        dims: of a batch of single rows: 4 for images (B, C, H, W), 5 for volumes. One more, and the second is views.
        classes, channels, image: of the encoder.
    Raises:
        LaminaError: dims below 2. ShapeError: at the call, neither as many dimensions nor one more.
    Example:
        >>> import torch
        >>> encoder = {"name": "resnet", "depths": [1], "widths": [8], "stem": "small", "head": "identity"}
        >>> EachView(encoder, classes=1)(torch.zeros(3, 2, 3, 8, 8)).shape
        torch.Size([3, 2, 8])
    """

    def __init__(
        self,
        encoder: Annotated[nn.Module | Node, Slot("model")],
        dims: int = 4,
        *,
        classes: int | None = None,
        channels: int | None = None,
        image: int | None = None,
    ) -> None:
        super().__init__()
        if dims < 2:
            raise LaminaError(f"dims must be at least 2, rows and their numbers, got {dims}")
        self.dims = dims
        sizes: dict[str, Any] = {"classes": classes, "channels": channels, "image": image}
        given = {name: size for name, size in sizes.items() if size is not None}
        self.encoder: nn.Module = encoder if isinstance(encoder, nn.Module) else factory("model", encoder)(**given)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features of every view, or of every row."""
        if inputs.dim() == self.dims:
            return logits(self.encoder(inputs))
        if inputs.dim() != self.dims + 1:
            raise ShapeError(
                f"EachView takes rows of {self.dims} dimensions with the batch's, or one more for views, got "
                f"{tuple(inputs.shape)}"
            )
        return logits(self.encoder(inputs.flatten(0, 1))).unflatten(0, inputs.shape[:2])

    def extra_repr(self) -> str:
        """Show the dimensions."""
        return f"dims={self.dims}"
