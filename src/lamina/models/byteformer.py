"""ByteFormer: a transformer that classifies files by their bytes, undecoded.

Source: Horton, Mehta, Farhadi, Rastegari, Bytes Are All You Need: Transformers Operating Directly On File Bytes (2023),
arXiv 2306.00238.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models.transformer import TransformerBlock, check_linear, mean_token, normed, sinusoids
from lamina.nn.byte_tokens import ByteTokens
from lamina.nn.feed_forward import FeedForward
from lamina.nn.windowed_attention import TokenMerging1d, WindowedAttention, merged_mask
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SOURCE = "Horton et al. 2023, arXiv 2306.00238"
SIZES = {"tiny": (192, 3, 12), "small": (384, 6, 12), "base": (768, 12, 12), "huge": (1280, 20, 32)}
"""Width, heads and depth of the published sizes."""

MERGE_AFTER = (0, 1, 3, 5, 7, 9)
"""Layers after which the published networks merge tokens."""


class ByteFormerBlock(TransformerBlock):
    """A pre-norm block that may end by making one token of every two: x (B, T, width) -> (B, T or ceil(T / 2), width).

    Args:
        parts: of `TransformerBlock`.
        merge: called with x and the mask; None = as many tokens as before.
        fill: zeros are added to a multiple of this number of tokens, take part in the attention, and are cut off.
    """

    def __init__(self, *parts: Any, merge: nn.Module | None = None, fill: int = 1) -> None:
        super().__init__(*parts)
        self.merge, self.fill = merge, fill

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Run both branches, then merge."""
        length = x.shape[1]
        x = super().forward(x if self.fill == 1 else F.pad(x, (0, 0, 0, -length % self.fill)), **context)
        x = x if self.fill == 1 else x[:, :length]
        return x if self.merge is None else self.merge(x, context.get("attention_mask"))[0]


@register("model", "byteformer", source=SOURCE)
class ByteFormer(nn.Module):
    """Classify files by their bytes: PNG, JPEG, TIFF, WAV or any other, of any length, without decoding them.

    inputs (B, S) whole numbers 0..255, padded with -1 -> logits (B, classes): byte tokens, a strided convolution that
    makes fewer of them, blocks whose attention sees a window (a shifted one in every other block), neighbours merged
    after some blocks, and the mean of the tokens that are left. Padding changes nothing: a file has the same logits
    alone and in a batch. The inputs are not written to.

    Args:
        size: "tiny", "small", "base" or "huge": width, heads and depth as published; None = as they are given.
        width, heads, depth: of the blocks; None = of "tiny" (192, 3, 12).
        mlp_ratio: channels inside the feed-forward for each of the width.
        kernel: bytes a token is made of, even, their starts kernel / 2 apart; 0 = each byte is a token. The published
            networks have 32 (TIFF) down to 4 (JPEG): the fewer bytes a file has, the less.
        window: tokens that see each other. shift: of every other block's windows; None = half a window.
        max_tokens: the most tokens of a file, after the reduction; longer ones are refused. Published: 10000 to 50000.
        merge_after: blocks after which neighbours are merged, from 0; None = as published (0, 1, 3, 5, 7, 9), as far
            as another block follows.
        mask_attention: False = padding takes part everywhere, and windows wrap round the end: what the official code
            computes, and its published weights were trained with.
        positions: "learned" (a table) or "sinusoidal".
        dropout: of embeddings and branches, in training; 0..1.
        norm: built as norm(width).
        mixer: built as mixer(width=, heads=, window=, shift=, wrap=), as far as it names them.
        feed_forward: built as feed_forward(width=, hidden=, dropout=), as far as it names them.
        linear: the layers inside mixer and feed_forward, as far as they have a slot of that name.
        head: built as head(width, classes).
    Raises:
        RecipeError: an unknown size or kind of positions, a size beside a width, heads or a depth.
        ShapeError: sizes that do not fit, blocks to merge after that there are not; at the call, no whole numbers
            (B, S), values outside -1..255, a file shorter than the kernel or of more than max_tokens tokens.
    Source: section 3.1 and appendix A. Deviations: `ByteTokens`, `WindowedAttention`, `TokenMerging1d` name theirs.
    Example:
        >>> model = ByteFormer(10, width=16, heads=2, depth=2, kernel=8, window=8)
        >>> model(torch.randint(256, (2, 100))).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int = 1000,
        size: Literal["tiny", "small", "base", "huge"] | None = None,
        width: int | None = None,
        heads: int | None = None,
        depth: int | None = None,
        *,
        mlp_ratio: int = 4,
        kernel: int = 16,
        window: int = 128,
        shift: int | None = None,
        max_tokens: int = 10_000,
        merge_after: Sequence[int] | None = None,
        mask_attention: bool = True,
        positions: Literal["learned", "sinusoidal"] = "learned",
        dropout: float = 0.0,
        norm: Annotated[Node, Slot("norm")] = "layer_norm",
        mixer: Annotated[Node, Slot("mixer")] = "windowed_attention",
        feed_forward: Annotated[Node, Slot("layer")] = "feed_forward",
        linear: Annotated[Node, Slot("layer")] = "linear",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        width, heads, depth = _sizes(size, width, heads, depth)
        if positions not in ("learned", "sinusoidal"):
            raise RecipeError(f"positions must be 'learned' or 'sinusoidal', got {positions!r}")
        if min(classes, mlp_ratio, window, max_tokens) < 1:
            raise ShapeError(f"sizes must be at least 1: {classes=}, {mlp_ratio=}, {window=}, {max_tokens=}")
        merged = _merged(merge_after, depth)
        shift = window // 2 if shift is None else shift
        make_norm, make_mixer = factory("norm", norm), factory("mixer", mixer)
        make_feed_forward = factory("layer", feed_forward)
        check_linear(linear, make_mixer, make_feed_forward)

        def block(index: int) -> ByteFormerBlock:
            given = {"window": window, "shift": shift * (index % 2), "wrap": not mask_attention, "linear": linear}
            mixing = make_mixer(width=width, heads=heads, causal=False, **given)
            feeding = make_feed_forward(width=width, hidden=mlp_ratio * width, dropout=dropout, linear=linear)
            merge = TokenMerging1d(width, make_norm(width)) if index in merged else None
            parts = (make_norm(width), mixing, make_norm(width), feeding, dropout)
            return ByteFormerBlock(*parts, merge=merge, fill=1 if mask_attention else window)

        self.max_tokens, self.mask_attention = max_tokens, mask_attention
        self.tokens = ByteTokens(width, kernel)
        self.position_embedding = nn.Parameter(torch.empty(max_tokens, width)) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(block(i) for i in range(depth))
        self.final_norm: nn.Module = make_norm(width)
        self.head: nn.Module = factory("layer", head)(width, classes)
        self._initialise()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        x, mask = self.tokens(inputs)
        x = self.dropout(self._placed(x))
        seen: Tensor | None = mask if self.mask_attention else None
        for block in self.blocks:
            x = block(x, attention_mask=seen)
            if seen is not None and getattr(block, "merge", None) is not None:
                seen = merged_mask(seen)
        return self.head(mean_token(normed(self.final_norm, x, seen), seen))

    def _placed(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.max_tokens:
            raise ShapeError(
                f"the longest file of the batch has {length} tokens, max_tokens is {self.max_tokens}: raise it, "
                "or take a larger kernel"
            )
        if self.position_embedding is not None:
            return x + self.position_embedding[:length]
        return x + sinusoids(torch.arange(length, device=x.device), x.shape[-1]).to(x.dtype)

    def _initialise(self) -> None:
        """Draw the linear layers by Xavier, positions with deviation width^-0.5; others' parts start as they do."""
        if self.position_embedding is not None:
            nn.init.trunc_normal_(self.position_embedding, std=self.position_embedding.shape[1] ** -0.5)
        own = (WindowedAttention, FeedForward, TokenMerging1d)
        parts = [m for part in self.blocks.modules() if isinstance(part, own) for m in part.modules()]
        for layer in (*parts, self.head):
            if type(layer) is nn.Linear:
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def load_byteformer(state: dict[str, Tensor], model: ByteFormer) -> None:
    """Load the weights that apple/corenet saved for a network of the same sizes.

    They were trained with padding that takes part: for the same outputs the model has `mask_attention=False`, and for
    the published networks with windows of 32, `shift=64`.

    Args:
        state: the official model's state dict.
        model: changed in place.
    Raises:
        RuntimeError: by torch, names the tensors that are missing, left over or of another shape.
    """
    from lamina.models._byteformer_official import renamed

    model.load_state_dict(renamed(state))


def _sizes(size: str | None, width: int | None, heads: int | None, depth: int | None) -> tuple[int, int, int]:
    given = {"width": width, "heads": heads, "depth": depth}
    if size is not None and size not in SIZES:
        raise RecipeError(f"size must be one of {', '.join(SIZES)}, or None, got {size!r}")
    if size is not None and (beside := [n for n, v in given.items() if v is not None]):
        raise RecipeError(f"size={size!r} says {' and '.join(beside)} already: leave one of them out")
    found = tuple(d if v is None else v for d, v in zip(SIZES[size or "tiny"], given.values(), strict=True))
    if min(found) < 1 or found[0] % found[1]:
        raise ShapeError(f"sizes must be at least 1 and width divide by heads, got width, heads, depth = {found}")
    return found[0], found[1], found[2]


def _merged(merge_after: Sequence[int] | None, depth: int) -> set[int]:
    """Return the blocks after which tokens are merged."""
    if merge_after is None:
        return {i for i in MERGE_AFTER if i < depth - 1}
    wrong = [i for i in merge_after if not 0 <= i < depth]
    if wrong or len(set(merge_after)) < len(merge_after):
        raise ShapeError(f"merge_after names each of the blocks 0..{depth - 1} at most once, got {[*merge_after]}")
    return set(merge_after)
