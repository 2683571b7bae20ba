"""One knob from deep to wide: the same number of heads in few layers or in many.

Source: Brown, Zhao, Shumailov, Mullins, Wide Attention Is The Way Forward For Transformers? (2022), arXiv 2210.00640.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from lamina.errors import ShapeError
from lamina.models.transformer import Transformer
from lamina.recipe import Node
from lamina.registry import Slot, register

MIXER: Node = {"name": "attention", "bias": True}
SOURCE = "Brown et al., Wide Attention Is The Way Forward For Transformers? (2022), arXiv 2210.00640"


@register("model", source=f"{SOURCE}, section 2")
def wide_transformer(
    total_heads: int = 48,
    depth: int = 1,
    width: int = 256,
    *,
    vocabulary: int,
    context: int,
    classes: int | None = None,
    head_width: int = 64,
    hidden: int | None = None,
    causal: bool = False,
    mixer: Annotated[Node, Slot("mixer")] = MIXER,
    norm: Annotated[Node, Slot("norm")] = "layer_norm",
    feed_forward: Annotated[Node, Slot("layer")] = "feed_forward",
    position: Literal["rotary", "learned", "sinusoidal", "none"] = "learned",
    dropout: float = 0.0,
    pool: Literal["mean", "class"] = "mean",
    linear: Annotated[Node, Slot("layer")] = "linear",
    head: Annotated[Node, Slot("layer")] = "linear",
) -> Transformer:
    """Transformer that spreads a fixed number of heads over `depth` layers; by default all in one layer, an encoder.

    Attention has the same parameters at every depth, 4 * width * total_heads * head_width; feed-forward networks and
    norms are there `depth` times. So one layer of all heads is smaller and faster than many of few heads, and small
    encoders trained from scratch on classification are about as accurate. Not shown for pre-trained language models.

    Args:
        total_heads: of all layers together.
        depth: layers; divides total_heads. `aspect_ratios` lists the choices.
        width: of the residual stream.
        head_width: channels of a head, at every depth. total_heads / depth * head_width need not be width.
        hidden: channels inside a feed-forward network; None = 4 * width.
        classes, causal, mixer, norm, feed_forward, position, dropout, pool, linear, head: as in `Transformer`; a mixer
            must name head_width.
    Raises:
        ShapeError: depth does not divide total_heads, or a size is below 1.
    Example:
        >>> import torch
        >>> model = wide_transformer(8, depth=2, width=16, head_width=4, vocabulary=32, context=8, classes=3)
        >>> len(model.blocks), model.blocks[0].mixer.heads, model(torch.zeros(1, 5, dtype=torch.long)).shape
        (2, 4, torch.Size([1, 3]))
    """
    if total_heads < 1 or depth < 1 or total_heads % depth:
        raise ShapeError(
            f"depth {depth} does not divide total_heads {total_heads}; (depth, heads) can be "
            f"{', '.join(map(str, aspect_ratios(max(total_heads, 1))))}"
        )
    slots: dict[str, Any] = {"mixer": mixer, "norm": norm, "feed_forward": feed_forward, "linear": linear, "head": head}
    sizes: dict[str, Any] = {"vocabulary": vocabulary, "context": context, "classes": classes, "hidden": hidden}
    rest: dict[str, Any] = {"causal": causal, "position": position, "dropout": dropout, "pool": pool}
    return Transformer(depth, width, total_heads // depth, head_width=head_width, **sizes, **rest, **slots)


def aspect_ratios(total_heads: int) -> list[tuple[int, int]]:
    """List every (depth, heads) with depth * heads = total_heads, the deepest first.

    Raises:
        ShapeError: total_heads is below 1.
    Example:
        >>> aspect_ratios(6)
        [(6, 1), (3, 2), (2, 3), (1, 6)]
    """
    if total_heads < 1:
        raise ShapeError(f"total_heads must be at least 1, got {total_heads}")
    return [(depth, total_heads // depth) for depth in range(total_heads, 0, -1) if total_heads % depth == 0]
