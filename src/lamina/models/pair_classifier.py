"""Classify pairs of sequences by one encoder that reads both."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("model", source="Tay et al., Long Range Arena (2020), arXiv 2011.04006, document matching")
class PairClassifier(nn.Module):
    """Encode two sequences by the same encoder, and tell their relation from both codes x, y, x * y and x - y.

    For matching and entailment. input_ids (B, 2, T) -> logits (B, classes). The pairs are your data's: no data set of
    the toolkit has two sequences a row.

    Args:
        encoder: built as encoder(vocabulary=, context=, classes=features, causal=False), as far as it names them: any
            classifier of sequences, whose logits are the code.
        features: numbers in a code.
        hidden: channels between the codes and the logits; None = features.
        vocabulary, context: of the encoder.
        classes: relations told apart.
    Raises:
        ShapeError: a size below 1; at the call, not two sequences a row.
    Source: the document matching of Tay et al., Long Range Arena (2020), arXiv 2011.04006, section 2.2.3.
    Example:
        >>> encoder = {"name": "wide_transformer", "total_heads": 4, "width": 16, "head_width": 4}
        >>> model = PairClassifier(encoder, features=8, vocabulary=32, context=12)
        >>> model(torch.zeros(3, 2, 9, dtype=torch.long)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        encoder: Annotated[Node, Slot("model")] = "wide_transformer",
        features: int = 128,
        hidden: int | None = None,
        *,
        vocabulary: int,
        context: int,
        classes: int = 2,
    ) -> None:
        super().__init__()
        hidden = features if hidden is None else hidden
        if min(features, hidden, classes) < 1:
            raise ShapeError(f"sizes must be positive: {features=}, {hidden=}, {classes=}")
        self.context = context
        sizes = {"vocabulary": vocabulary, "context": context, "classes": features}
        self.encoder: nn.Module = factory("model", encoder)(**sizes, causal=False)
        self.up, self.activation, self.head = nn.Linear(4 * features, hidden), nn.GELU(), nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits.

        Args:
            attention_mask: (B, 2, T) bool or 0/1; True = a real token.
        """
        if input_ids.dim() != 3 or input_ids.shape[1] != 2:
            raise ShapeError(
                f"PairClassifier takes two sequences a row, (batch, 2, tokens), got {tuple(input_ids.shape)}"
            )
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        x, y = self.encoder(input_ids.flatten(0, 1), mask).unflatten(0, (-1, 2)).unbind(1)
        return self.head(self.activation(self.up(torch.cat((x, y, x * y, x - y), dim=-1))))
