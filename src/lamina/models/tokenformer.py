"""TokenFormer: a transformer whose projections are attention to learned pairs, in every published size; and as a ViT.

It is our `Transformer` with `pattention` in its slots, so caches, generation, passes and recipes are the same.
Source: Wang et al., TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters (2025), arXiv
2410.23168.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from torch import nn

from lamina.errors import ShapeError
from lamina.models.transformer import Transformer
from lamina.models.vision_transformer import VisionTransformer
from lamina.nn.parameter_attention import Pattention, Score
from lamina.recipe import Node
from lamina.registry import Slot, register

SOURCE = "Wang et al. 2025, arXiv 2410.23168"


@register("model", "tokenformer", source=SOURCE)
class TokenFormer(Transformer):
    """Language model (or, with `classes`, a classifier) whose weights are pairs of keys and values; more can be added.

    input_ids (B, T) -> logits (B, T, vocabulary), or (B, classes) from the mean of the real tokens. Each block: query,
    key, value and output projections by one `Pattention` each, then one in place of the feed-forward network. Norms
    in the blocks have neither gain nor shift, the last one has both; no bias anywhere. Parameters a block:
    2 * width * (4 * attention_pairs + mlp_pairs).

    Args:
        vocabulary: number of token ids.
        context: longest sequence.
        attention_pairs: of each of the four projections; None = width.
        mlp_pairs: of the layer in place of the feed-forward; None = 4 * attention_pairs.
        rotary_fraction: share of each head's channels that turn with the position (position "rotary").
        score: see `Pattention`; with "softmax" the model cannot grow.
        position: "rotary" (inside the attention), "learned" (added to the embeddings), or "none".
        tie: the output projection is the token embedding.
        causal, classes, head: see `Transformer`.
    Raises:
        ShapeError: sizes that do not fit. RecipeError: an unknown score or position.
    Source: Wang et al., TokenFormer (2025), arXiv 2410.23168, section 3.2 and appendix; the values' start is the
        official code's, a deviation of 2 / (depth * sqrt(width)).
    Example:
        >>> import torch
        >>> model = TokenFormer(2, 16, 2, vocabulary=32, context=8, attention_pairs=4)
        >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        *,
        vocabulary: int,
        context: int = 2048,
        attention_pairs: int | None = None,
        mlp_pairs: int | None = None,
        rotary_fraction: float = 0.25,
        score: Score = "l2_gelu",
        position: Literal["rotary", "learned", "none"] = "rotary",
        tie: bool = True,
        causal: bool = True,
        classes: int | None = None,
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__(
            depth,
            width,
            heads,
            vocabulary=vocabulary,
            context=context,
            causal=causal,
            mixer={"name": "attention", "rotary_fraction": rotary_fraction},
            position=position,
            tie=tie,
            classes=classes,
            head=head,
            **_slots(width, attention_pairs, mlp_pairs, score, 1e-5),
        )
        self.final_norm = nn.LayerNorm(width)
        _draw_pairs(self.blocks, depth, width)


@register("model", "tokenformer_vit", source=f"{SOURCE}, table 3")
class TokenFormerViT(VisionTransformer):
    """Vision transformer whose weights are pairs of keys and values; more can be added.

    pixel_values (B, channels, image, image) -> logits (B, classes). Blocks as in `TokenFormer`, without a mask; learned
    positions.

    Args:
        image: height and width in pixels; a multiple of patch.
        patch: height and width of a patch in pixels.
        attention_pairs, mlp_pairs, score: see `TokenFormer`.
        pool: "class" (a class token, read at the end) or "mean" (of the patches; there is no class token).
        head: built as head(width, classes).
    Raises:
        ShapeError: sizes that do not fit. RecipeError: an unknown score or pool.
    Source: Wang et al., TokenFormer (2025), arXiv 2410.23168, section 4.2 (ViT-B/16 and L/16).
    Example:
        >>> import torch
        >>> TokenFormerViT(8, 4, 1, 16, 2, classes=5)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        *,
        attention_pairs: int | None = None,
        mlp_pairs: int | None = None,
        classes: int = 1000,
        channels: int = 3,
        score: Score = "l2_gelu",
        pool: Literal["class", "mean"] = "class",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        slots = _slots(width, attention_pairs, mlp_pairs, score, 1e-6)
        sizes: dict[str, Any] = {"classes": classes, "channels": channels, "pool": pool, "head": head}
        super().__init__(image, patch, depth, width, heads, mixer="attention", **sizes, **slots)
        self.final_norm = nn.LayerNorm(width, eps=1e-6)
        _draw_pairs(self.blocks, depth, width)


def _slots(width: int, attention_pairs: int | None, mlp_pairs: int | None, score: Score, eps: float) -> dict[str, Any]:
    """What stands in the slots of the blocks."""
    attention_pairs = width if attention_pairs is None else attention_pairs
    mlp_pairs = 4 * attention_pairs if mlp_pairs is None else mlp_pairs
    if min(width, attention_pairs, mlp_pairs) < 1:
        raise ShapeError(f"TokenFormer: sizes must be at least 1, got {width=}, {attention_pairs=}, {mlp_pairs=}")
    node = {"name": "pattention", "score": score}
    return {
        "linear": {**node, "pairs": attention_pairs},
        "feed_forward": {**node, "in_features": width, "out_features": width, "pairs": mlp_pairs},
        "norm": {"name": "layer_norm", "eps": eps, "elementwise_affine": False},
    }


def _draw_pairs(blocks: nn.ModuleList, depth: int, width: int) -> None:
    for module in blocks.modules():
        if isinstance(module, Pattention):
            module.reset_parameters(2 / (depth * math.sqrt(width)))


def _size(name: str, parameters: str, blocks: int, width: int, heads: int, pairs: int) -> Callable[..., TokenFormer]:
    def build(
        vocabulary: int = 50304,
        context: int = 2048,
        *,
        depth: int = blocks,
        classes: int | None = None,
        score: Score = "l2_gelu",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> TokenFormer:
        options: dict[str, Any] = {"vocabulary": vocabulary, "context": context, "classes": classes, "head": head}
        return TokenFormer(depth, width, heads, attention_pairs=pairs, mlp_pairs=4 * pairs, score=score, **options)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = (
        f"TokenFormer with {blocks} blocks of width {width}, {heads} heads, {pairs} pairs a projection and {4 * pairs} "
        f"in place of the feed-forward: {parameters} parameters with a vocabulary of 50304."
    )
    return register("model", name, source=SOURCE)(build)


tokenformer_124m = _size("tokenformer_124m", "123 569 664", 12, 768, 12, 576)
tokenformer_150m = _size("tokenformer_150m", "151 881 216", 12, 768, 12, 768)
tokenformer_354m = _size("tokenformer_354m", "353 503 232", 24, 1024, 16, 768)
tokenformer_450m = _size("tokenformer_450m", "454 166 528", 24, 1024, 16, 1024)
tokenformer_757m = _size("tokenformer_757m", "756 156 416", 24, 1024, 16, 1792)
tokenformer_900m = _size("tokenformer_900m", "903 252 480", 32, 1280, 16, 1280)
tokenformer_1_5b = _size("tokenformer_1_5b", "1 587 219 456", 40, 1536, 16, 1536)
