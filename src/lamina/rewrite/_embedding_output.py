"""The end of a truncated model: its output becomes the pooled, cut stream after the last block.

Hooks, because a new root would rename every tensor, and what a model computes behind its trunk is written in its own
forward. They are part of the model: copied, compiled and exported with it, and made again when a saved model is built.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from lamina.anatomy import get
from lamina.anatomy.exits import Exits
from lamina.errors import LaminaError
from lamina.nn.token_pooling import Pooling, TokenPooling
from lamina.probe import first_tensor
from lamina.rewrite._fused_layer import leave_fused_path

NAME = "embedding_output"
"""Of the child that stands for it in the model."""


class EmbeddingOutput(TokenPooling):
    """Turns a model's forward into its embedding (B, width); see `TokenPooling`. It has no parameters.

    Whatever block runs last is read, so that a pass may still take one out.
    """

    def __init__(self, exits: Exits, width: int | None, pool: Pooling, *, normalize: bool) -> None:
        super().__init__(width, pool, normalize=normalize)
        self.exits = exits
        self.listening = False
        self.stream: Tensor | None = None
        self._handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Become a child of the model and listen to its blocks."""
        for path in self.exits.blocks:
            leave_fused_path(model, path)
            self._handles.append(get(model, path).register_forward_hook(self._keep))
        self._handles.append(model.register_forward_pre_hook(self._begin))
        self._handles.append(model.register_forward_hook(self._answer, with_kwargs=True))
        model.register_module(NAME, self)

    def detach(self, model: nn.Module) -> None:
        """Leave the model as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        del model._modules[NAME]

    def _begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.listening = True

    def _keep(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A block under a checkpoint runs again in the backward pass; nothing must stay behind then.
        if self.listening:
            self.stream = first_tensor(output)

    def _answer(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        stream, self.stream, self.listening = self.stream, None, False
        if stream is None:
            raise LaminaError(f"no block of {self.exits.trunk} ran, so {type(model).__name__} has no embedding to give")
        mask = _mask(model, args, kwargs)
        embedding: Tensor = self(self.exits.normed(model, self.exits.tokens(stream), mask), mask)
        return embedding


def _mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    found = kwargs.get("attention_mask")
    if found is None and len(args) > 1:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        at = names.index("attention_mask") if "attention_mask" in names else len(args)
        found = args[at] if at < len(args) else None
    return found if isinstance(found, Tensor) else None
