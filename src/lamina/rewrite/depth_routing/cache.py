"""Keys and values of a layer that not every token enters: beside them stands which token each one is of."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.nn.attention import KeyValueCache

EMPTY = -1
"""Position of a slot that holds no token: in a batch some rows have entered more often than others."""


Held = tuple[Tensor, dict[Any, tuple[Tensor, Tensor]]]
"""Positions (B, L), and keys and values (B, H, L, D) of each attention."""


class Slots(Protocol):
    """The cache of one layer, as the layer's block uses it."""

    positions: Tensor | None
    """(B, L), which token each slot is of, rising in each row; `EMPTY` in slots that hold none."""

    def begin(self, positions: Tensor, seen: int) -> Mapping[str, Any]:
        """Announce tokens (B, n) about to be added, of `seen` in all; return what the block must be called with."""
        ...

    def end(self) -> None:
        """Leave no more empty slots than the row with the most tokens asks for."""
        ...

    def passed(self, seen: int) -> None:
        """Take note that the model has seen so many tokens, though none was added."""
        ...

    def taken(self) -> Held:
        """Hand out what is held and be empty: of some rows, others follow."""
        ...

    def joined(self, held: Sequence[tuple[Tensor, Held]], rows: int, seen: int) -> None:
        """Hold what was taken out for these rows, of so many; rows that are not named hold nothing."""
        ...


def find_slots(given: Mapping[str, Any], block: nn.Module, tokens: int) -> tuple[Slots, int] | None:
    """Return the block's slots in the cache that it is called with, and how many tokens came before; None = no cache.

    Raises:
        LaminaError: a kind of cache whose slots cannot differ from layer to layer, or one filled by another model.
    """
    cache = given.get("past_key_values", given.get("past_key_value"))
    if cache is not None:
        # The first layer is dense and has run already, so it counts all tokens, these too.
        return _transformers_slots(cache, _slot_number(block), block), int(cache.get_seq_length()) - tokens
    own = given.get("cache")
    if isinstance(own, KeyValueCache):
        held = vars(own).setdefault("routed", {})
        return held.setdefault(block, OwnSlots()), own.length
    return None


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with no cache among them."""
    return {k: None if k in ("past_key_values", "past_key_value", "cache") else v for k, v in given.items()}


class OwnSlots:
    """Slots for `lamina.nn.Attention`: a cache of its own, whose length is the number of slots."""

    def __init__(self) -> None:
        self.inner = KeyValueCache()
        self.positions: Tensor | None = None

    def begin(self, positions: Tensor, seen: int) -> Mapping[str, Any]:
        """See `Slots`."""
        self.positions = _joined(self.positions, positions)
        return {"cache": self.inner}

    def end(self) -> None:
        """See `Slots`."""
        assert self.positions is not None
        self.inner.advance(self.positions.shape[1] - self.inner.length)
        order = _order(self.positions)
        if order is not None:
            self.positions = self.positions.gather(1, order)
            self.inner.slots = {m: (_take(k, order), _take(v, order)) for m, (k, v) in self.inner.slots.items()}
            self.inner.length = order.shape[1]

    def passed(self, seen: int) -> None:
        """See `Slots`."""

    def taken(self) -> Held:
        """See `Slots`."""
        assert self.positions is not None
        held: Held = self.positions, {**self.inner.slots}
        self.positions, self.inner = None, KeyValueCache()
        return held

    def joined(self, held: Sequence[tuple[Tensor, Held]], rows: int, seen: int) -> None:
        """See `Slots`."""
        self.positions, self.inner.slots = _joined_rows(held, rows)
        self.inner.length = self.positions.shape[1]


def _slot_number(block: nn.Module) -> int:
    for module in block.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int):
            return number
    raise LaminaError(f"{type(block).__name__} was given a cache, but none of its modules numbers its slot (layer_idx)")


def _transformers_slots(cache: Any, number: int, block: nn.Module) -> Any:
    cls = _layer_class()
    layers: Any = getattr(cache, "layers", None)
    make = getattr(cache, "layer_class_to_replicate", None)
    while isinstance(layers, list) and make is not None and len(layers) <= number:
        layers.append(make())
    layer: Any = layers[number] if isinstance(layers, list) and number < len(layers) else None
    if isinstance(layer, cls):
        return layer
    if type(layer) is not cls.__base__ or getattr(cache, "offloading", False):
        kind = type(cache).__name__ if layer is None else f"{type(cache).__name__} of {type(layer).__name__}"
        raise LaminaError(
            f"depth routing needs a transformers DynamicCache whose layers may differ in length, got a {kind}: pass "
            "past_key_values=DynamicCache(), or use_cache=False"
        )
    if layer.is_initialized:
        raise LaminaError(
            f"slot {number} of the cache holds keys that {type(block).__name__} did not route: begin with an empty one"
        )
    layers[number] = cls()
    return layers[number]


@functools.cache
def _layer_class() -> Any:
    """Make the class when it is first needed: transformers is optional."""
    from transformers.cache_utils import DynamicLayer

    class RoutedLayer(DynamicLayer):
        """A layer's keys and values with the positions of their tokens, which follow all that is done to them."""

        def __init__(self) -> None:
            super().__init__()
            self.positions: Tensor | None = None
            self.seen = 0

        def begin(self, positions: Tensor, seen: int) -> Mapping[str, Any]:
            """See `Slots`."""
            self.positions, self.seen = _joined(self.positions, positions), seen
            return {}

        def end(self) -> None:
            """See `Slots`."""
            assert self.positions is not None
            if self.get_seq_length() != self.positions.shape[1]:
                raise LaminaError("the attention of a routed block did not add its keys to the cache")
            self._keep(_order(self.positions))

        def passed(self, seen: int) -> None:
            """See `Slots`."""
            self.seen = seen

        def taken(self) -> Held:
            """See `Slots`."""
            assert self.positions is not None
            held: Held = self.positions, {None: (self.keys, self.values)}
            self.reset()
            return held

        def joined(self, held: Sequence[tuple[Tensor, Held]], rows: int, seen: int) -> None:
            """See `Slots`."""
            self.positions, slots = _joined_rows(held, rows)
            self.lazy_initialization(*slots[None])
            (self.keys, self.values), self.seen = slots[None], seen

        def crop(self, tokens_to_remove: int) -> None:
            """Forget the last tokens that the model saw, whether they entered here or not."""
            if tokens_to_remove > 0:
                raise ValueError(f"crop takes how many tokens go as a negative number, got {tokens_to_remove}")
            self.seen = max(self.seen + tokens_to_remove, 0)
            if self.positions is not None:
                self.positions = self.positions.masked_fill(self.positions >= self.seen, EMPTY)
                self._keep(_order(self.positions))

        def reset(self) -> None:
            super().reset()
            self.positions, self.seen = None, 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.batch_select_indices(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            if self.positions is not None:
                self.positions = self.positions.repeat_interleave(repeats, dim=0)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices.to(self.device) if self.is_initialized else indices)
            if self.positions is not None:
                self.positions = self.positions[indices.to(self.positions.device)]

        def _keep(self, order: Tensor | None) -> None:
            if order is None or self.positions is None or self.keys is None or self.values is None:
                return
            self.positions = self.positions.gather(1, order)
            self.keys, self.values = _take(self.keys, order), _take(self.values, order)

    return RoutedLayer


def _joined(earlier: Tensor | None, new: Tensor) -> Tensor:
    return new if earlier is None else torch.cat((earlier, new), dim=1)


def _joined_rows(held: Sequence[tuple[Tensor, Held]], rows: int) -> Held:
    """Put what rows hold into one, right-aligned; the slots of the others are empty."""
    most = max(positions.shape[1] for _, (positions, _) in held)

    def joined(parts: Sequence[tuple[Tensor, Tensor]], fill: float) -> Tensor:
        like = parts[0][1]
        whole = like.new_full((rows, like.shape[1], most, like.shape[3]), fill)
        for at, part in parts:
            whole[at, :, most - part.shape[2] :] = part
        return whole

    positions = joined([(at, p[:, None, :, None]) for at, (p, _) in held], EMPTY)[:, 0, :, 0]
    slots = {
        module: (
            joined([(at, s[module][0]) for at, (_, s) in held], 0.0),
            joined([(at, s[module][1]) for at, (_, s) in held], 0.0),
        )
        for module in held[0][1][1]
    }
    return positions, slots


def _order(positions: Tensor) -> Tensor | None:
    """Say which slots stay, (B, m): m tokens of the fullest row, empty slots first; None where all do."""
    full = positions != EMPTY
    most = int(full.sum(1).max())
    if most == full.shape[1]:
        return None
    return full.to(torch.uint8).argsort(dim=1, stable=True)[:, full.shape[1] - most :]


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Take slots (B, m) of keys or values (B, H, L, D), in one copy."""
    rows, heads, length, _ = x.shape
    start = torch.arange(rows * heads, device=x.device).view(rows, heads, 1) * length
    index = order[:, None, :] + start
    return x.flatten(0, 2).index_select(0, index.flatten()).unflatten(0, index.shape)
