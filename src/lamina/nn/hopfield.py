"""Hopfield: association of states with stored patterns, sharpness and number of updates at will; attention is one case.

Source: Ramsauer et al., Hopfield Networks is All You Need (2020), arXiv 2008.02217.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._hopfield_inputs import association_of, keys_seen, three_patterns
from lamina.nn._hopfield_options import (
    NormOption,
    check_rest,
    check_static,
    head_sizes,
    make_norm,
    per_head,
    steps_of,
)
from lamina.nn.attention import KeyValueCache, rotate
from lamina.nn.hopfield_association import SOURCE, associate, masked_softmax, update_by_head, update_until_rest
from lamina.nn.torch_layers import draw
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

INITIAL_STD = 0.02
EPS = 1e-4
"""How far a state may still move and count as at rest, where the user leaves it open."""


@register("mixer", source=f"{SOURCE}, equations 3 and 10")
class Hopfield(nn.Module):
    """Association of state patterns with stored patterns, (B, S, width) -> (B, S, output_size); batch first.

    For attention with control of its sharpness (`beta`) and of how often the states are updated, for looking sets up in
    one another, for pooling (`HopfieldPooling`) and learned look-up (`HopfieldLayer`). Called with one tensor it is a
    sequence mixer like `attention`; without norms and further updates, it computes what multi-head attention does.
    Plain retrieval from a tensor of patterns, without parameters, is `HopfieldMemory`.

    Per head: q = state W_q, k = stored W_k, v = projection W_v; q <- softmax(beta q k^T) k, `update_steps_max` times;
    then softmax(beta q k^T) v, heads side by side, output projection. Memory grows with S + N: no table of S x N
    weights is made unless it is asked for, a mask is that large, or torch has no fused kernel for dropout (CPU, in
    training).

    Args:
        width: of the states.
        heads: of the states; hflayers' num_heads.
        hidden_size: width of one head; None = width // heads.
        pattern_size: width of one head's values; None = hidden_size.
        output_size: what the output projection gives; None = width.
        stored_size, projection_size: widths of the stored patterns and of what is projected; None = width.
        kv_heads: heads of stored patterns and values, shared by groups of the states' heads; None = heads.
        beta: inverse temperature, above 0, or one a head; None = 1 / sqrt(hidden_size), or 1 where all is static.
        update_steps_max: updates besides the one association that always is, or one number a head; None = until no
            state of the head moves farther than update_steps_eps, 1000 at most.
        update_steps_eps: a head whose states all move less (Euclidean norm, in key space) stops early, or one a head;
            None = no early stop, and 1e-4 where update_steps_max is None. With a stop the number of updates is known at
            the run only: no full graph of torch.compile, no export.
        stored_static, state_static, projection_static: use the tensor as it is, in every head; its width must then be
            hidden_size (of the projection: pattern_size).
        projection_connected: values are made of what the key projection gives for them, not of the tensor itself.
        norm_stored, norm_state, norm_projection: layer normalisation of what comes in; "plain" = no gain and shift.
        norm_hopfield: the same on every head's q and k, by one shared norm.
        bias: give the projections a bias.
        output_bias: give the output projection one; None = as bias says.
        bias_row: append a learned pattern and value.
        zero_row: append a pattern and value of zeros, so that a head can find nothing.
        output_projection: False = the heads' values side by side come out.
        dropout: of the association weights of the last step, in training; 0..1.
        causal: a state sees patterns at its own and earlier positions only, in every update.
        rotary, rotary_base: turn q and k by their position, as `attention` does; one tensor only.
        context: the longest sequence allowed; None = any.
        linear: the four projections, built as linear(in, out, bias=).
    Raises:
        ShapeError: sizes that do not divide or fit, at construction or at the call; integers; empty sequences.
        ValueError: beta, update_steps_eps, update_steps_max or dropout outside their range; two masks of padding.
    Source: Ramsauer et al. (2020), section 3 and appendix; options of the official hflayers. Deviations: the stop looks
        at how far states move, not at the S x N weights, and is off for a fixed number of updates; beta of one entry a
        head scales heads (hflayers: features); a bias row goes with static patterns too; a state that sees nothing
        gives zeros.
    Example:
        >>> Hopfield(16, heads=2, update_steps_max=2)((torch.randn(3, 9, 16), torch.randn(3, 5, 16))).shape
        torch.Size([3, 5, 16])
    """

    beta: Tensor | float

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        hidden_size: int | None = None,
        pattern_size: int | None = None,
        output_size: int | None = None,
        stored_size: int | None = None,
        projection_size: int | None = None,
        kv_heads: int | None = None,
        beta: float | Sequence[float] | None = None,
        update_steps_max: int | Sequence[int] | None = 0,
        update_steps_eps: float | Sequence[float] | None = None,
        stored_static: bool = False,
        state_static: bool = False,
        projection_static: bool = False,
        projection_connected: bool = False,
        norm_stored: NormOption = True,
        norm_state: NormOption = True,
        norm_projection: NormOption = True,
        norm_hopfield: NormOption = False,
        bias: bool = True,
        output_bias: bool | None = None,
        bias_row: bool = False,
        zero_row: bool = False,
        output_projection: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        context: int | None = None,
        linear: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        self.width, self.heads, self.kv_heads = width, heads, heads if kv_heads is None else kv_heads
        self.stored_size = width if stored_size is None else stored_size
        self.projection_size = width if projection_size is None else projection_size
        self.hidden_size, self.pattern_size = head_sizes(self, hidden_size, pattern_size)
        self.output_size = width if output_size is None else output_size
        self.output_size = self.output_size if output_projection else heads * self.pattern_size
        self.stored_static, self.state_static = stored_static, state_static
        self.projection_static, self.projection_connected = projection_static, projection_connected
        check_static(self)
        self.causal, self.rotary, self.rotary_base, self.context = causal, rotary, rotary_base, context
        self.zero_row, self.dropout = zero_row, dropout
        check_rest(self)
        self._set_updates(beta, update_steps_max, update_steps_eps)
        self.norm_stored = make_norm(norm_stored, self.stored_size)
        self.norm_state = make_norm(norm_state, width)
        self.norm_projection = make_norm(norm_projection, self.projection_size)
        self.norm_hopfield = make_norm(norm_hopfield, self.hidden_size)
        make, keys, values = (
            factory("layer", linear),
            *(self.kv_heads * s for s in (self.hidden_size, self.pattern_size)),
        )
        self.query = None if state_static else make(width, heads * self.hidden_size, bias=bias)
        self.key = None if stored_static else make(self.stored_size, keys, bias=bias)
        into = keys if projection_connected else self.projection_size
        self.value = None if projection_static else make(into, values, bias=bias)
        also = bias if output_bias is None else output_bias
        self.out = make(heads * self.pattern_size, self.output_size, bias=also) if output_projection else None
        self.key_row = nn.Parameter(torch.empty(self.kv_heads, 1, self.hidden_size)) if bias_row else None
        self.value_row = nn.Parameter(torch.empty(self.kv_heads, 1, self.pattern_size)) if bias_row else None
        self.initialise(INITIAL_STD)

    @staticmethod
    def instead_of_attention(offered: Mapping[str, Any]) -> dict[str, Any]:
        """Options with which it computes what an attention of the offered sizes does (for `Replace`)."""
        norms = dict.fromkeys(("norm_stored", "norm_state", "norm_projection"), False)
        return {**norms, "hidden_size": offered.get("head_width"), "beta": offered.get("scale")}

    def initialise(self, std: float) -> None:
        """Draw the weights anew: normal with `std`, biases zero; norms start as they do."""
        for layer in (self.query, self.key, self.value, self.out):
            if layer is not None:
                draw(layer, std)
        for row in (self.key_row, self.value_row):
            if row is not None:
                nn.init.normal_(row, std=std)

    def forward(
        self,
        x: Tensor | tuple[Tensor, ...],
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Associate; returns (B, S, output_size), and with `return_weights` (B, heads, S, N + rows) weights beside.

        Args:
            x: (stored (B, N, stored_size), state (B, S, width), projection (B, N, projection_size)); of two, the stored
                patterns are projected too; one tensor is all three. A batch of 1 serves all.
            attention_mask: (B, N) bool or 0/1, True = a real pattern (with a cache: over all its tokens too).
            positions: (T,) or (B, T) whole numbers, for rotary; None = counted on from the cache's length.
            cache: keys and values of earlier tokens; this call appends to it. Causal, one tensor.
            key_padding_mask: (B, N), True = ignore, or torch's float form (0 and -inf); instead of attention_mask.
            association_mask: (S, N) or (B * heads, S, N); bool True = forbidden, or a float added to the scores.
            return_weights: of the last association, before dropout; learned and zero rows last.
        """
        stored, state, projection = three_patterns(x, (self.stored_size, self.width, self.projection_size))
        past = self._check_sequence(x, stored, state, cache)
        q, k, v = self._project(stored, state, projection)
        if self.rotary:
            if positions is None:
                positions = torch.arange(past, past + state.shape[1], device=state.device)
            q, k = (rotate(t, positions, base=self.rotary_base) for t in (q, k))
        if cache is not None:
            k, v = cache.extend(self, k, v)
        patterns = k.shape[2]
        k, v = self._with_rows(k, v)
        seen, extra = keys_seen(attention_mask, key_padding_mask), k.shape[2] - patterns
        # The fused kernel makes this mask itself, without a table, where it is the only one.
        plain = self.causal and seen is None and association_mask is None and not extra and not return_weights
        plain = plain and q.shape[2] == patterns
        sizes = (q.shape[0], self.heads, q.shape[2], patterns)
        mask = None if plain else association_of(sizes, seen, extra, self.causal, association_mask, q)
        q = self._update(q, partial(self._associate, k=k, v=k, mask=mask, causal=plain))
        dropout = self.dropout if self.training else 0.0
        if not return_weights:
            return self._merge(self._associate(q, k, v, mask, plain, dropout))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        weights = masked_softmax(self._sharpened(q) @ k.mT, mask)
        return self._merge(F.dropout(weights, dropout).to(v.dtype) @ v), weights

    def extra_repr(self) -> str:
        """Show what the projections do not."""
        beta = self.beta if isinstance(self.beta, float) else [round(b, 4) for b in self.beta.flatten().tolist()]
        return (
            f"{self.width}, heads={self.heads}, hidden_size={self.hidden_size}, pattern_size={self.pattern_size}, "
            f"beta={beta}, update_steps_max={self.update_steps_max}, causal={self.causal}"
        )

    def _check_sequence(
        self, x: Tensor | tuple[Tensor, ...], stored: Tensor, state: Tensor, cache: KeyValueCache | None
    ) -> int:
        """Check what only one sequence of tokens can have; return how many tokens came before it."""
        if (self.rotary or cache is not None) and not isinstance(x, Tensor):
            raise ValueError(
                "rotary positions and a cache are for one sequence, not for states and stored patterns apart"
            )
        if cache is not None and not self.causal:
            raise ValueError("a key-value cache needs causal=True: earlier tokens would have to see the new ones")
        past = 0 if cache is None else cache.length
        if self.causal and state.shape[1] > stored.shape[1]:
            raise ShapeError(f"causal: the {state.shape[1]} states are the last of {stored.shape[1]} stored patterns")
        if self.context is not None and past + stored.shape[1] > self.context:
            raise ShapeError(f"the sequence has {past + stored.shape[1]} tokens, the context is {self.context}")
        return past

    def _project(self, stored: Tensor, state: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, heads, S, hidden), k and v (B, kv_heads, N, hidden or pattern)."""
        normed, values = self.norm_stored(stored), self.norm_projection(projection)
        queries = _through(self.query, self.norm_state(state))
        keys = _through(self.key, normed)
        if self.projection_connected:
            # Where nothing tells the two apart, the key projection has been computed already.
            values = keys if values is normed else _through(self.key, values)
        own = self.projection_static and not self.projection_connected
        q = self.norm_hopfield(_by_head(queries, self.heads, self.hidden_size, self.state_static))
        k = self.norm_hopfield(_by_head(keys, self.kv_heads, self.hidden_size, self.stored_static))
        v = _by_head(_through(self.value, values), self.kv_heads, self.pattern_size, own)
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        batch = next((t.shape[0] for t in (q, k, v) if t.shape[0] != 1), 1)
        q, k, v = (t.transpose(1, 2).to(dtype).expand(batch, -1, -1, -1) for t in (q, k, v))
        return q, k, v

    def _with_rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the learned row and the row of zeros."""
        if self.key_row is not None and self.value_row is not None:
            k = torch.cat((k, self.key_row.to(k.dtype).expand(k.shape[0], -1, -1, -1)), dim=2)
            v = torch.cat((v, self.value_row.to(v.dtype).expand(v.shape[0], -1, -1, -1)), dim=2)
        return (F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))) if self.zero_row else (k, v)

    def _associate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float = 0.0
    ) -> Tensor:
        if isinstance(self.beta, float):
            return associate(q, k, v, self.beta, mask, causal=causal, dropout=dropout)
        return associate(self._sharpened(q), k, v, 1.0, mask, causal=causal, dropout=dropout)

    def _sharpened(self, q: Tensor) -> Tensor:
        return q * (self.beta if isinstance(self.beta, float) else self.beta.to(q.dtype))

    def _update(self, q: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
        """Move the states in key space, as often as each head is to."""
        # Read at the call, for who changes it on a layer that is there.
        counts, eps = steps_of(self.update_steps_max, self.heads), self.update_steps_eps
        if counts is not None and eps is None:
            return update_by_head(q, step, counts)
        return update_until_rest(q, step, counts, (EPS,) * self.heads if eps is None else eps)

    def _merge(self, heads: Tensor) -> Tensor:
        """Put the heads side by side, (B, heads, S, pattern) -> (B, S, heads * pattern), and project."""
        joined = heads.transpose(1, 2).flatten(2)
        return joined if self.out is None else self.out(joined)

    def _set_updates(
        self,
        beta: float | Sequence[float] | None,
        update_steps_max: int | Sequence[int] | None,
        update_steps_eps: float | Sequence[float] | None,
    ) -> None:
        if beta is None:
            all_static = self.stored_static and self.state_static and self.projection_static
            beta = 1.0 if all_static else 1 / math.sqrt(self.hidden_size)
        betas = per_head("beta", beta, self.heads, 0.0)
        if len(set(betas)) == 1:
            self.beta = betas[0]
        else:
            self.register_buffer("beta", torch.tensor(betas)[:, None, None])
        steps_of(update_steps_max, self.heads)
        self.update_steps_max = update_steps_max
        eps = update_steps_eps
        self.update_steps_eps = None if eps is None else per_head("update_steps_eps", eps, self.heads, 0.0)


def _through(layer: nn.Module | None, x: Tensor) -> Tensor:
    return x if layer is None else layer(x)


def _by_head(x: Tensor, heads: int, size: int, whole: bool) -> Tensor:
    """(B, T, heads * size) -> (B, T, heads, size); or every head gets the whole of (B, T, size)."""
    return x[:, :, None].expand(-1, -1, heads, -1) if whole else x.unflatten(-1, (heads, size))
