"""One vector a row at every exit of a model, from one forward pass that is watched."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lamina import probe
from lamina.anatomy.exits import Exits, find_exits
from lamina.batches import Batch, bare, call
from lamina.errors import AnatomyError, LaminaError
from lamina.nn.token_pooling import Pooling, TokenPooling, pool_tokens

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[object, Exits]] = weakref.WeakKeyDictionary()
"""Exits of models seen before: finding them reads every block's forward."""


def exits_of(model: nn.Module, trunk: str | None = None) -> Exits:
    """Find the exits of a model, again only where its modules are others than the last time."""
    root = bare(model)
    seen = (trunk, tuple((path, type(m)) for path, m in root.named_modules()))
    known = _KNOWN.get(root)
    if known is None or known[0] != seen:
        known = _KNOWN[root] = (seen, find_exits(root, trunk))
    return known[1]


def cut_of(model: nn.Module) -> TokenPooling | None:
    """Return the pooling by which a truncated model ends, if it is one."""
    return next((m for m in bare(model).children() if isinstance(m, TokenPooling)), None)


def exit_vectors(
    model: nn.Module, batch: Batch, exits: Exits, layers: Collection[int], pool: Pooling
) -> dict[int, Tensor]:
    """Run the model once and pool the stream after each of these blocks, 1..depth: layer -> (B, C), float32 at least.

    Raises:
        LaminaError: padding without a mask, blocks whose output is changed afterwards or has no gradient.
        AnatomyError: a block that did not run.
    """
    root = bare(model)
    mask = _mask(root, batch)
    watch = _Watch(root, exits, frozenset(layers), pool, mask)
    with probe.observe(model, dict.fromkeys(exits.blocks, watch.note)):
        call(model, batch, use_cache=False)
    return watch.read()


class _Watch:
    """Keeps what each wanted block gives, pooled.

    With gradients the stream is alive until the backward pass anyway, so it is pooled when the model is through: inside
    a block that is checkpointed, what a hook computes would be missing when the block runs again. Without, at once.
    """

    def __init__(
        self, model: nn.Module, exits: Exits, wanted: frozenset[int], pool: Pooling, mask: Tensor | None
    ) -> None:
        self.model, self.exits, self.wanted, self.pool, self.mask = model, exits, wanted, pool, mask
        self.later, self.layer = torch.is_grad_enabled(), 0
        self.kept: dict[int, tuple[Tensor, int]] = {}
        self.pooled: dict[int, Tensor] = {}

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.layer += 1
        if self.layer not in self.wanted:
            return
        stream = probe.first_tensor(output)
        if stream is None:
            raise AnatomyError(f"a block of {self.exits.trunk} gave no tensor, only a {type(output).__name__}")
        if self.later and not torch.is_grad_enabled():
            raise LaminaError(
                f"the blocks of {self.exits.trunk} run without gradients (a checkpoint with use_reentrant=True?), so "
                "nothing could be learned at an exit: checkpoint with use_reentrant=False"
            )
        if self.later:
            self.kept[self.layer] = stream, stream._version
        else:
            self.pooled[self.layer] = self._pool(stream)

    def read(self) -> dict[int, Tensor]:
        for layer, (stream, version) in self.kept.items():
            if stream._version != version:
                raise LaminaError(f"what block {layer} of {self.exits.trunk} gives is changed in place by a later one")
            self.pooled[layer] = self._pool(stream)
        silent = self.wanted - self.pooled.keys()
        if silent:
            raise AnatomyError(f"{self.exits.trunk} ran {self.layer} blocks, and {sorted(silent)} were asked for")
        return self.pooled

    def _pool(self, stream: Tensor) -> Tensor:
        tokens = self.exits.tokens(stream)
        return pool_tokens(self.exits.normed(self.model, tokens, self.mask), self.mask, self.pool)


def _mask(model: nn.Module, batch: Batch) -> Tensor | None:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor):
        return mask
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(padding, int) and isinstance(ids, Tensor) and bool((ids == padding).any()):
        raise LaminaError(
            f"the batch has padding (token {padding}) and no attention_mask: the padding would be pooled along"
        )
    return None
