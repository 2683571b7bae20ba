"""Transformer layers with Hopfield association in the place of attention, called like torch's own.

Source: Ramsauer et al., Hopfield Networks is All You Need (2020), arXiv 2008.02217; Vaswani et al. (2017), arXiv
1706.03762.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.hopfield import Hopfield
from lamina.nn.hopfield_association import SOURCE
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


class _FeedForwardLayer(nn.Module):
    """What both layers share: the two linear layers of each position, and the names torch gives them."""

    def __init__(self, width: int, hidden: int, dropout: float, activation: Node) -> None:
        super().__init__()
        if width < 1 or hidden < 1:
            raise ShapeError(f"width and hidden must be positive, got {width} and {hidden}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation: nn.Module = factory("layer", activation)()
        self.dropout = nn.Dropout(dropout)

    def _feed(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


@register("layer", source=f"{SOURCE}; layer: Vaswani et al. 2017, section 3.1")
class HopfieldEncoderLayer(_FeedForwardLayer):
    """Post-norm encoder layer, (B, T, width) -> same: `nn.TransformerEncoderLayer(batch_first=True)` with association.

    Also inside `nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)`.

    Args:
        hidden: channels inside the feed-forward; torch's dim_feedforward.
        dropout: of both branches, of what the activation gives and of the association's weights; in training, 0..1.
        activation: of the feed-forward.
        association: built as association(width=, heads=, dropout=), as far as it names them; a `Hopfield` by another
            name or options.
    Raises:
        ShapeError, ValueError: sizes or a dropout that cannot be.
    Source: Ramsauer et al. (2020), official HopfieldEncoderLayer; Vaswani et al. (2017).
    Example:
        >>> HopfieldEncoderLayer(16, heads=2, hidden=32)(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        hidden: int = 2048,
        dropout: float = 0.1,
        activation: Annotated[Node, Slot("layer")] = "relu",
        association: Annotated[Node, Slot("mixer")] = "hopfield",
    ) -> None:
        super().__init__(width, hidden, dropout, activation)
        self.self_attn = _association(association, width, heads, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer; masks and the hint as torch's layer takes them."""
        _check_hint("src_mask", is_causal, src_mask)
        found = self.self_attn(src, key_padding_mask=src_key_padding_mask, association_mask=src_mask)
        x = self.norm1(src + self.dropout(found))
        return self.norm2(x + self._feed(x))


@register("layer", source=f"{SOURCE}; layer: Vaswani et al. 2017, section 3.1")
class HopfieldDecoderLayer(_FeedForwardLayer):
    """Post-norm decoder layer: states among themselves, then with a memory; `nn.TransformerDecoderLayer`'s arguments.

    tgt (B, S, width), memory (B, N, width) -> (B, S, width). Also inside `nn.TransformerDecoder`.

    Args:
        hidden, dropout, activation: as `HopfieldEncoderLayer`.
        association: of the states among themselves. cross_association: with the memory; None = as association.
    Raises:
        ShapeError, ValueError: sizes or a dropout that cannot be.
    Source: Ramsauer et al. (2020), official HopfieldDecoderLayer; Vaswani et al. (2017).
    Example:
        >>> HopfieldDecoderLayer(16, heads=2, hidden=32)(torch.randn(3, 5, 16), torch.randn(3, 9, 16)).shape
        torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        hidden: int = 2048,
        dropout: float = 0.1,
        activation: Annotated[Node, Slot("layer")] = "relu",
        association: Annotated[Node, Slot("mixer")] = "hopfield",
        cross_association: Annotated[Node | None, Slot("mixer")] = None,
    ) -> None:
        super().__init__(width, hidden, dropout, activation)
        cross = association if cross_association is None else cross_association
        self.self_attn = _association(association, width, heads, dropout)
        self.multihead_attn = _association(cross, width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Run the layer; masks and hints as torch's layer takes them."""
        _check_hint("tgt_mask", tgt_is_causal, tgt_mask)
        _check_hint("memory_mask", memory_is_causal, memory_mask)
        found = self.self_attn(tgt, key_padding_mask=tgt_key_padding_mask, association_mask=tgt_mask)
        x = self.norm1(tgt + self.dropout(found))
        found = self.multihead_attn((memory, x), key_padding_mask=memory_key_padding_mask, association_mask=memory_mask)
        x = self.norm2(x + self.dropout(found))
        return self.norm3(x + self._feed(x))


def _association(node: Node, width: int, heads: int, dropout: float) -> Hopfield:
    made = factory("mixer", node)(width=width, heads=heads, dropout=dropout)
    if not isinstance(made, Hopfield):
        raise ValueError(f"the association of a Hopfield layer must be a Hopfield, got {type(made).__name__}")
    # torch's stacks of layers ask for it.
    made.batch_first = True  # type: ignore[assignment]
    return made


def _check_hint(name: str, hint: bool, mask: Tensor | None) -> None:
    if hint and mask is None:
        raise ValueError(f"the hint that {name} is causal needs the mask itself")
