"""Multi-head attention: grouped heads, rotary positions, padding, a key-value cache and a swappable kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.attention_kernels import KernelName, make_kernel
from lamina.nn.torch_layers import draw
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, mask) -> out: queries (B, H, T, D), keys (B, H, S, D), mask (B or 1, 1, T or 1, S) bool, True = seen."""


@dataclass
class KeyValueCache:
    """Keys and values of the tokens a decoder has seen, for one batch of sequences being generated.

    Every attention layer keeps its tensors under itself, so a layer that was dropped simply has none. `length`
    counts the tokens seen; the model that runs the layers moves it on, once a pass (`advance`).
    """

    length: int = 0
    """Tokens of the earlier passes."""
    slots: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> keys and values, each (B, kv_heads, tokens, head_width)."""

    def extend(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values to the layer's slot; return the whole slot.

        Raises:
            ShapeError: the slot does not hold `length` tokens (a layer run twice in a pass, or a missing `advance`).
        """
        if layer in self.slots:
            keys = torch.cat((self.slots[layer][0], keys), dim=2)
            values = torch.cat((self.slots[layer][1], values), dim=2)
        fresh = keys.shape[2] - self.length
        if fresh < 1:
            raise ShapeError(f"the cache counts {self.length} tokens, but a layer holds only {keys.shape[2]}")
        self.slots[layer] = keys, values
        return keys, values

    def advance(self, count: int) -> None:
        """Count the tokens of a pass that is over.

        Raises:
            ShapeError: a layer was given more or fewer tokens than that.
        """
        self.length += count
        for layer, (keys, _) in self.slots.items():
            if keys.shape[2] != self.length:
                name = type(layer).__name__
                raise ShapeError(f"the cache counts {self.length} tokens, but a {name} layer holds {keys.shape[2]}")

    @property
    def bytes(self) -> int:
        """Memory of all slots."""
        return sum(t.numel() * t.element_size() for slot in self.slots.values() for t in slot)


@register("mixer", source="Vaswani et al. 2017; grouped heads: Ainslie et al. 2023; rotary: Su et al. 2021")
class Attention(nn.Module):
    """Multi-head scaled dot-product attention over a sequence.

    x (B, T, width) -> (B, T, width), with separate query, key, value and output projections. Runs on torch's fused
    `scaled_dot_product_attention` unless another kernel is given.

    Args:
        heads: query heads; None = one per 64 channels, at least one.
        kv_heads: heads of keys and values, shared by groups of query heads; None = heads.
        head_width: channels of one head; None = width // heads. heads * head_width need not be width.
        bias: give the four projections a bias.
        output_bias: give the output projection one; None = as bias says.
        causal: a token sees itself and earlier tokens only.
        causal_block: a token sees its whole block of this many tokens and the earlier blocks; in place of causal.
        rotary: turn queries and keys by their position (halves paired, as in Llama).
        rotary_base: the slowest wave length is 2 pi times this, in tokens.
        rotary_fraction: share of each head's channels that turn, the first ones; above 0, up to 1.
        context: the longest sequence allowed (with the cache's tokens); None = any.
        dropout: of attention weights, in training; 0..1. Not with a kernel of your own.
        linear: the four projections, built as linear(in, out, bias=).
        kernel: what is done with queries, keys and values: a name of `lamina.nn.attention_kernels`, alone or with
            options (`{name: local, window: 32}`), or a function of your own, see `Kernel`; None = softmax, fused.
    Raises:
        ShapeError: sizes do not divide, x or the mask does not fit, the sequence is longer than context.
        RecipeError: a kernel that is not known, or cannot do what is asked (causal).
    Source: Vaswani et al., Attention Is All You Need (2017), arXiv 1706.03762, section 3.2; Ainslie et al. (2023),
        arXiv 2305.13245, section 2.2; Su et al. (2021), arXiv 2104.09864, equation 34.
    Example:
        >>> Attention(32, heads=4, causal=True)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        *,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        causal: bool = False,
        causal_block: int | None = None,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        rotary_fraction: float = 1.0,
        context: int | None = None,
        dropout: float = 0.0,
        kernel: KernelName | Mapping[str, Any] | Kernel | None = None,
        linear: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        self.width, self.causal, self.rotary, self.rotary_base = width, causal, rotary, rotary_base
        self.causal_block = _checked_block(causal_block, causal)
        self.heads, self.kv_heads, self.head_width = _head_sizes(width, heads, kv_heads, head_width)
        self.context, self.dropout = context, dropout
        self.masked_by_kernel = isinstance(kernel, (str, Mapping))
        sizes = {"heads": self.heads, "head_width": self.head_width, "context": context}
        self.kernel = make_kernel(kernel, causal=causal, **sizes) if isinstance(kernel, (str, Mapping)) else kernel
        if self.masked_by_kernel and self.kernel is not None and causal_block is not None:
            raise ValueError(f"the kernel {kernel!r} knows no causal_block (got {causal_block}): leave one of them out")
        self.rotary_width = _rotary_width(self.head_width, rotary_fraction) if rotary else 0
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if dropout and self.kernel is not None:
            raise ValueError(
                "dropout of attention weights is the fused kernel's: with a kernel of your own set it to 0"
            )
        make = factory("layer", linear)
        # A kernel that says what it `reads` has no other projection: weights without a gradient stall DDP.
        reads = getattr(self.kernel, "reads", ("query", "key", "value"))
        self.query: Any = make(width, self.heads * self.head_width, bias=bias) if "query" in reads else None
        self.key: Any = make(width, self.kv_heads * self.head_width, bias=bias) if "key" in reads else None
        self.value = make(width, self.kv_heads * self.head_width, bias=bias)
        self.out = make(self.heads * self.head_width, width, bias=bias if output_bias is None else output_bias)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend; x (B, T, width) -> (B, T, width).

        Args:
            attention_mask: (B, S) bool or 0/1 over all keys (the cache's first); True = a real token.
            positions: (T,) or (B, T) whole numbers for rotary; None = counted on from the cache's length.
            cache: keys and values of earlier tokens; this call appends to it. Causal attention only.
        """
        return self.out(self._heads(x, attention_mask, positions, cache).transpose(1, 2).flatten(2))

    def head_outputs(self, x: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Return what each head adds, (B, heads, T, width): their sum is the output without the output bias."""
        heads, size = self.heads, self.heads * self.head_width
        one = torch.eye(size, dtype=x.dtype, device=x.device)
        # Any linear layer is known by what it makes of the unit vectors.
        weight = (self.out(one) - self.out(torch.zeros_like(one[:1]))).unflatten(0, (heads, -1))
        return torch.einsum("bhtd,hdc->bhtc", self._heads(x, attention_mask, positions, None), weight)

    def initialise(self, std: float, out_std: float) -> None:
        """Draw the weights anew: normal with `std`, the output projection with `out_std`; biases zero.

        `out_std` is for heads that are as wide together as the model; of wider ones it is the smaller, by the root of
        the ratio, so that the number of heads does not change the size of what is added to the residual stream.
        """
        out_std *= math.sqrt(self.width / (self.heads * self.head_width))
        for layer in (self.query, self.key, self.value, self.out):
            draw(layer, out_std if layer is self.out else std)

    @property
    def caches(self) -> bool:
        """Whether it can work with a key-value cache: only softmax and kernels of the user's own can."""
        return self.kernel is None or not self.masked_by_kernel

    def extra_repr(self) -> str:
        """Show what the projections do not."""
        block = "" if self.causal_block is None else f", causal_block={self.causal_block}"
        return f"heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}, rotary={self.rotary}{block}"

    def _heads(
        self, x: Tensor, attention_mask: Tensor | None, positions: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Return the heads' outputs (B, H, T, D), before the output projection."""
        past = self._check(x, attention_mask, cache)
        v = self._split(self.value(x), self.kv_heads)  # (B, H, T, D)
        q = v if self.query is None else self._split(self.query(x), self.heads)
        k = v if self.key is None else self._split(self.key(x), self.kv_heads)
        if self.rotary:
            if positions is None:
                positions = torch.arange(past, past + x.shape[1], device=x.device)
            q, k = (rotate(t, positions, base=self.rotary_base, width=self.rotary_width) for t in (q, k))
        if cache is not None:
            k, v = cache.extend(self, k, v)
        return self._attend(q, k, v, attention_mask, past)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_width)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keys_seen: Tensor | None, past: int) -> Tensor:
        plain_causal = self.causal and keys_seen is None and past == 0 and self.kernel is None
        block = 1 if self.causal else self.causal_block
        # A kernel that has a name hides later tokens itself, without a table of all pairs.
        block = None if self.masked_by_kernel and self.kernel is not None else block
        mask = None if plain_causal else visible(q.shape[2], k.shape[2], block, keys_seen, device=q.device)
        grouped = self.kv_heads != self.heads
        if self.kernel is not None:
            if grouped:
                k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            return self.kernel(q, k, v, mask)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=plain_causal, enable_gqa=grouped
        )

    def _check(self, x: Tensor, attention_mask: Tensor | None, cache: KeyValueCache | None) -> int:
        if x.dim() != 3 or x.shape[-1] != self.width or not x.is_floating_point():
            raise ShapeError(
                f"Attention takes floating-point (batch, tokens, {self.width}), got {x.dtype} {tuple(x.shape)}"
            )
        past = 0 if cache is None else cache.length
        length = past + x.shape[1]
        if cache is not None and not self.causal and (self.causal_block is None or past % self.causal_block):
            raise ValueError(
                "a key-value cache needs causal attention, in whole blocks: earlier tokens would have to see new ones"
            )
        if cache is not None and not self.caches:
            raise ValueError(f"the kernel {type(self.kernel).__name__} takes whole sequences, and no key-value cache")
        if self.context is not None and length > self.context:
            raise ShapeError(f"the sequence has {length} tokens, the context is {self.context}")
        if attention_mask is not None and attention_mask.shape != (x.shape[0], length):
            raise ShapeError(f"attention_mask must be {(x.shape[0], length)}, got {tuple(attention_mask.shape)}")
        return past


def visible(
    queries: int,
    keys: int,
    block: int | None,
    keys_seen: Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor | None:
    """Make the boolean mask (B or 1, 1, queries or 1, keys), True = may look; None = everything is seen.

    The queries are the last of the keys' tokens. In a causal mask a token always sees itself, so that a row of a
    sequence padded on the left is never empty (an empty row has no softmax).

    Args:
        block: a token sees the tokens of its block of this size and of earlier ones; 1 = causal, None (or False) = all.
    """
    mask = None if keys_seen is None else keys_seen.to(torch.bool)[:, None, None, :]
    if not block or (mask is None and queries == 1):
        return mask
    offset = keys - queries
    row = torch.arange(offset, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)
    earlier = (column <= row if block == 1 else column // block <= row // block)[None, None]
    return earlier if mask is None else (earlier & mask) | (column == row)


def rotate(x: Tensor, positions: Tensor, *, base: float = 10000.0, width: int | None = None) -> Tensor:
    """Turn each pair (i, i + D/2) of channels by position * base^(-2i/D); x (B, H, T, D), positions (T,) or (B, T).

    The angles are float32 whatever x is: at position 1000 bfloat16 would be off by whole turns.

    Args:
        width: turn the first so many channels alone (they are D then), and leave the others; None = all.
    Source: Su et al. (2021), arXiv 2104.09864, equation 34; pairs of halves instead of neighbours, as in Llama.
    """
    if width is not None and width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], positions, base=base), x[..., width:]), dim=-1)
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions.to(torch.float32)[..., None] * frequencies  # (T, D/2) or (B, T, D/2)
    if angle.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _checked_block(block: int | None, causal: bool) -> int | None:
    if block is not None and causal:
        raise ValueError(f"causal hides the later tokens of a block: give causal or causal_block={block}, not both")
    if block is not None and block < 1:
        raise ShapeError(f"causal_block must be at least 1, got {block}")
    return block


def _rotary_width(head_width: int, fraction: float) -> int:
    """How many channels of a head turn."""
    if not 0.0 < fraction <= 1.0:
        raise ShapeError(f"rotary_fraction must lie above 0 and not above 1, got {fraction}")
    width = int(head_width * fraction)
    if width < 2 or width % 2:
        share = "" if fraction == 1.0 else f" of which a share of {fraction} turns, {width} channels"
        raise ShapeError(f"rotary positions pair up channels: head_width must be even, got {head_width}{share}")
    return width


def _head_sizes(width: int, heads: int | None, kv_heads: int | None, head_width: int | None) -> tuple[int, int, int]:
    heads = max(width // 64, 1) if heads is None else heads
    kv_heads = heads if kv_heads is None else kv_heads
    if min(width, heads, kv_heads) < 1 or (head_width is not None and head_width < 1):
        raise ShapeError(f"sizes must be positive: {width=}, {heads=}, {kv_heads=}, {head_width=}")
    if head_width is None and width % heads:
        raise ShapeError(f"width {width} does not divide by {heads} heads; change one, or give head_width")
    if heads % kv_heads:
        raise ShapeError(f"{heads} heads do not divide by {kv_heads} kv_heads")
    return heads, kv_heads, head_width or width // heads
