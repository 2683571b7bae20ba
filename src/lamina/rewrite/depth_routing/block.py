"""What stands as the forward of a routed block: choose, gather, run the block on those tokens alone, put them back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import AnatomyError, LaminaError
from lamina.nn.token_router import Choice, TokenRouting, gather, scatter
from lamina.rewrite.depth_routing.arguments import Masks, real_tokens, rows_of, taken
from lamina.rewrite.depth_routing.cache import EMPTY, Slots, find_slots, without_cache

Scale = Literal["mlp", "block", "none"]
Positions = Literal["original", "compact"]
CALL, FEW = 64_000_000, 32
"""Rows run apart on a CPU where that spares so many multiplications, of so many tokens at least."""


class Protected:
    """Which tokens of the batch that runs must enter; the model's own forward says so, the blocks read it."""

    def __init__(self) -> None:
        # Kept until the next pass: a block that is checkpointed runs again in the backward pass.
        self.mask: Tensor | None = None


class Scaled:
    """Stands as the forward of a feed-forward: what it returns is multiplied, token by token."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.weight: Tensor | None = None
        self.keep = False
        """Whether the block is checkpointed inside its routing: then it runs again in the backward pass."""
        self.ran = False
        self.__signature__ = inspect.signature(plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scaled:
        # A weight that was kept is part of a graph, which cannot be copied, and is of no use to a copy.
        return Scaled(copy.deepcopy(self.plain, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        result = self.plain(*args, **kwargs)
        self.ran, weight = True, self.weight
        if not self.keep:
            self.weight = None
        if weight is None:
            return result
        if isinstance(result, tuple):
            return (result[0] * weight.to(result[0].dtype), *result[1:])
        return result * weight.to(result.dtype)


@dataclass(frozen=True)
class Place:
    """How one block is routed."""

    norm: str
    """Path, in the block, of the norm whose output the router reads."""
    scale: Scale
    scaled: str | None
    """Path, in the block, of the module whose output is all that the feed-forward adds, where that is scaled."""
    positions: Positions
    causal: bool


class Routed:
    """Stands as the forward of one block, so that no name in the model changes."""

    def __init__(
        self,
        plain: Callable[..., Any],
        block: nn.Module,
        routing: TokenRouting,
        place: Place,
        protected: Protected,
        masks: Masks,
    ) -> None:
        self.plain, self.block, self.routing, self.place = plain, block, routing, place
        self.protected, self.masks = protected, masks
        self._scaled()
        self.__signature__ = inspect.signature(plain)
        self.names = tuple(self.__signature__.parameters)
        self.weights = sum(p.numel() for p in block.parameters())
        self.ends: tuple[None, ...] | None = None
        """What the block returns after the stream; None = not known yet, or no tuple at all."""
        self.known = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block for the tokens that enter."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        x = given.pop(self.names[0])
        if not isinstance(x, Tensor):
            # A dissection runs blocks on symbols.
            return self.plain(*args, **kwargs)
        if x.dim() != 3:
            raise AnatomyError(f"depth routing takes a stream (batch, tokens, channels), got {tuple(x.shape)}")
        real = real_tokens(given, x)
        z = self.block.get_submodule(self.place.norm)(x)
        if self.routing.by_rank:
            return self._by_rank(x, given, self.routing(z, self.protected.mask, real))
        if x.is_meta:
            # Nobody knows which tokens would enter; the shapes are the same.
            return self.plain(*args, **kwargs)
        if not torch.compiler.is_compiling():
            return self._by_threshold(x, given, z, real)
        if find_cache(given):
            # One graph it cannot be; in several, this part runs outside them.
            return torch.compiler.disable(self._by_threshold)(x, given, z, real)
        return self._all(x, given, self.routing(z, self.protected.mask, real), real)

    def _by_rank(self, x: Tensor, given: dict[str, Any], choice: Choice) -> Any:
        index = choice.top
        assert index is not None
        found = find_cache(given)
        if found is not None and found(x.shape[1]):
            raise LaminaError(
                "the k likeliest tokens are not known before the last one: no decoding from a cache in training, or "
                "with inference='topk'"
            )
        given = without_cache(given)
        if index.shape[1] == x.shape[1]:
            return self._run(x, choice.probability, given)
        ranks = self._ranks(index, None, choice.real)
        given = taken(given, index, x.shape[:2], ranks=ranks)
        result = self._run(gather(x, index), choice.probability.gather(1, index), given)
        return self._put_back(result, scatter(x, index, _stream(result)))

    def _by_threshold(self, x: Tensor, given: dict[str, Any], z: Tensor, real: Tensor | None) -> Any:
        found = find_slots(given, self.block, x.shape[1])
        slots, before = (None, 0) if found is None else found
        protect = self.protected.mask
        if before and protect is not None and protect.shape[1] != x.shape[1]:
            # The mask of a prompt that is cached by now says nothing of what came after it.
            protect = None
        choice = self.routing(z, protect, real, decoding=before > 0 and x.shape[1] == 1)
        if before and self.place.positions == "compact":
            raise LaminaError(
                "positions='compact' cannot go on from a cache: the arrays of earlier positions are gone; pass "
                "use_cache=False, or route with positions='original'"
            )
        counts = choice.enters.sum(1).tolist()
        if max(counts) == 0:
            if slots is not None:
                slots.passed(before + x.shape[1])
            return self._nothing(x, given)
        groups = self._groups(counts, given, slots, x)
        if len(groups) == 1:
            result, stream = self._entered(x, given, choice, counts, slots, before)
            return self._put_back(result, stream)
        return self._apart(x, given, choice, counts, slots, before, groups)

    def _entered(
        self, x: Tensor, given: dict[str, Any], choice: Choice, counts: list[int], slots: Slots | None, before: int
    ) -> tuple[Any, Tensor]:
        """Run the block on the tokens that enter; return what it gave, and the stream with that put back."""
        most, real = max(counts), choice.real
        if x.shape[1] == 1:
            # It is the whole stream: there is nothing to take out of it.
            index, valid = torch.zeros_like(choice.enters, dtype=torch.long), None if min(counts) else choice.enters
            picked, p = x, choice.probability
        else:
            # Right-aligned, in order: the fillers of rows with fewer tokens come first.
            index = choice.enters.to(torch.uint8).argsort(dim=1, stable=True)[:, x.shape[1] - most :]
            valid = None if min(counts) == most else choice.enters.gather(1, index)
            picked, p = gather(x, index), choice.probability.gather(1, index)
        if slots is not None:
            some = self._cached(x, given, index, valid, slots, before, real)
        else:
            some = taken(given, index, x.shape[:2], ranks=self._ranks(index, valid, real))
            if valid is not None:
                some = self.masks.hide(given, some, valid, self.place.causal, x.dtype)
        result = self._run(picked, p, some)
        if slots is not None:
            slots.end()
        return result, _scatter_valid(x, index, valid, _stream(result))

    def _groups(self, counts: list[int], given: Mapping[str, Any], slots: Slots | None, x: Tensor) -> list[list[int]]:
        """Say which rows run in one call: those with the same number of tokens, or where fillers cost less than a call.

        A block that takes no mask cannot be told of fillers. On an accelerator a call costs more than they do, and
        slots that hold tokens already have all rows.
        """
        if slots is None and not self.masks.can(given):
            return row_groups(counts, 0)
        fresh = slots is None or slots.positions is None
        spare = max(FEW, CALL // max(self.weights, 1)) if fresh and x.device.type == "cpu" else sum(counts) * len(x)
        return row_groups(counts, spare)

    def _apart(
        self,
        x: Tensor,
        given: dict[str, Any],
        choice: Choice,
        counts: list[int],
        slots: Slots | None,
        before: int,
        groups: list[list[int]],
    ) -> Any:
        """Run groups of rows one after the other."""
        streams, result, held = [], None, []
        for group in groups:
            rows = torch.tensor(group, device=x.device)
            own = x[rows]
            if counts[group[0]]:
                part = Choice(*(None if t is None else t[rows] for t in choice))  # type: ignore[arg-type]
                some = rows_of(given, rows, len(x))
                result, own = self._entered(own, some, part, [counts[r] for r in group], slots, before)
                if slots is not None:
                    held.append((rows, slots.taken()))
            streams.append(own)
        if slots is not None:
            slots.joined(held, len(x), before + x.shape[1])
        order = torch.tensor([r for group in groups for r in group], device=x.device).argsort()
        return self._put_back(result, torch.cat(streams)[order])

    def _cached(
        self,
        x: Tensor,
        given: dict[str, Any],
        index: Tensor,
        valid: Tensor | None,
        slots: Slots,
        before: int,
        real: Tensor | None,
    ) -> dict[str, Any]:
        """Return what the block is called with so that its keys are added to its slots, under a mask over those."""
        earlier = slots.positions
        positions = index + before if valid is None else torch.where(valid, index + before, EMPTY)
        ranks = self._ranks(index, valid, real)
        if before == 0 and self.masks.given(given) is not None:
            # Nothing is cached, so the model's own mask is of these tokens; it need not be causal (images).
            some = taken(given, index, x.shape[:2], ranks=ranks)
            some = some if valid is None else self.masks.hide(given, some, valid, self.place.causal, x.dtype)
        else:
            some = taken(self.masks.without(given), index, x.shape[:2], ranks=ranks)
            some |= self.masks.over_slots(given, earlier, valid, index.shape, x)
        return {**some, **slots.begin(positions, before + x.shape[1])}

    def _all(self, x: Tensor, given: dict[str, Any], choice: Choice, real: Tensor | None) -> Any:
        """Compute every token and keep what entered: in a graph the numbers of tokens must be known beforehand."""
        if not self.masks.can(given):
            raise LaminaError(
                f"how many tokens pass a threshold is not known in a graph, and {type(self.block).__name__} takes no "
                "mask that could hide them: route with inference='topk', or run it without a graph"
            )
        given = self.masks.hide(given, given, choice.enters, self.place.causal, x.dtype)
        if self.place.positions == "compact":
            every = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            ranks = self._ranks(every, choice.enters, real)
            given |= taken(self.masks.without(given), every, x.shape[:2], ranks=ranks)
        result = self._run(x, choice.probability, given)
        return self._put_back(result, torch.where(choice.enters[..., None], _stream(result).to(x.dtype), x))

    def _nothing(self, x: Tensor, given: dict[str, Any]) -> Any:
        """No token enters: the block is the identity, in the form of its results."""
        if not self.known:
            index = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
            plain = without_cache({k: v for k, v in given.items() if k not in self.masks.names})
            self._run(x[:, :1], None, taken(plain, index, x.shape[:2], ranks=index))
        return x if self.ends is None else (x, *self.ends)

    def _run(self, x: Tensor, p: Tensor | None, given: Mapping[str, Any]) -> Any:
        """Run the block on (B, k, C), scaled by the probabilities (B, k)."""
        scaled = self._scaled()
        if scaled is not None:
            scaled.weight = None if p is None else p[..., None]
            scaled.keep = self.block.training and getattr(self.block, "gradient_checkpointing", False)
            scaled.ran = False
        result = self.plain(x, **given)
        if scaled is not None and not scaled.ran:
            raise LaminaError(
                f"{self.place.scaled} of {type(self.block).__name__}, which depth routing scales, did not run: it is "
                "no longer the block's feed-forward"
            )
        if self.place.scale == "block" and p is not None:
            y = _stream(result)
            result = self._put_back(result, torch.lerp(x.to(y.dtype), y, p[..., None].to(y.dtype)))
        self.ends = (None,) * (len(result) - 1) if isinstance(result, (tuple, list)) else None
        self.known = True
        return result

    def _scaled(self) -> Scaled | None:
        """Return what scales the feed-forward; hung on anew where another pass has put another module there."""
        if self.place.scaled is None:
            return None
        module = self.block.get_submodule(self.place.scaled)
        if not isinstance(module.forward, Scaled):
            module.forward = Scaled(module.forward)
        return module.forward

    def _ranks(self, index: Tensor, valid: Tensor | None, real: Tensor | None) -> Tensor | None:
        """With compact positions: from which token (B, k) each takes its position, the i-th from the i-th real one."""
        if self.place.positions == "original":
            return None
        number = torch.ones_like(index) if valid is None else valid.long()
        number = (number.cumsum(1) - 1).clamp(min=0)
        return number if real is None else (~real).to(torch.uint8).argsort(dim=1, stable=True).gather(1, number)

    def _put_back(self, result: Any, stream: Tensor) -> Any:
        return (stream, *result[1:]) if isinstance(result, (tuple, list)) else stream


def row_groups(counts: Sequence[int], spare: int) -> list[list[int]]:
    """Put rows with like numbers of tokens together: a new group begins where it spares more than `spare` fillers."""
    order = sorted(range(len(counts)), key=lambda row: -counts[row])
    groups = [order[:1]]
    for place, row in enumerate(order[1:], start=1):
        if (counts[groups[-1][0]] - counts[row]) * (len(order) - place) > spare:
            groups.append([row])
        else:
            groups[-1].append(row)
    return groups


def find_cache(given: Mapping[str, Any]) -> Callable[[int], int] | None:
    """Return what tells the number of cached tokens before these, or None where the call has no cache."""
    cache = given.get("past_key_values", given.get("past_key_value"))
    if cache is not None:
        return lambda tokens: int(cache.get_seq_length()) - tokens
    own = given.get("cache")
    return None if own is None else lambda tokens: int(own.length)


def _stream(result: Any) -> Tensor:
    stream = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(stream, Tensor):
        raise AnatomyError(f"a block returned a {type(result).__name__}, expected a tensor or a tuple that begins so")
    return stream


def _scatter_valid(x: Tensor, index: Tensor, valid: Tensor | None, values: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return values.to(x.dtype) if valid is None else torch.where(valid[..., None], values.to(x.dtype), x)
    if valid is None:
        return scatter(x, index, values)
    keep = valid.flatten().nonzero()[:, 0]
    start = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    flat = x.flatten(0, 1).index_copy(0, (index + start).flatten()[keep], values.to(x.dtype).flatten(0, 1)[keep])
    return flat.view_as(x)
