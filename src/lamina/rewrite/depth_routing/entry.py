"""How a mask of tokens that must enter gets from a batch to the blocks, past a model that does not know of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.rewrite.depth_routing.block import Protected


class Entry:
    """Stands as the model's forward: takes the mask, or makes it of the tokens' ids, and runs the model without it."""

    def __init__(
        self, plain: Callable[..., Any], protected: Protected, name: str | None, skippable: Sequence[int]
    ) -> None:
        self.plain, self.protected, self.name, self.skippable = plain, protected, name, tuple(skippable)
        signature = inspect.signature(plain)
        self.names = tuple(signature.parameters)
        self.known = name in self.names
        if name is not None and not self.known:
            extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            parameters = list(signature.parameters.values())
            ends = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
            parameters.insert(len(parameters) - ends, extra)
            signature = signature.replace(parameters=parameters)
        self.__signature__ = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.name is not None:
            mask = given.get(self.name)
            if not self.known:
                kwargs.pop(self.name, None)
        else:
            mask = self._of_ids(given.get("input_ids"))
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise LaminaError(f"{self.name} is a mask of the tokens that must enter, (batch, tokens), got {shape}")
        self.protected.mask = mask
        return self.plain(*args, **kwargs)

    def _of_ids(self, ids: Tensor | None) -> Tensor | None:
        if ids is None:
            raise LaminaError(
                "depth_routing was told which ids may be skipped, and the model is called without input_ids"
            )
        mask = torch.ones_like(ids, dtype=torch.bool)
        for token in self.skippable:
            mask = mask & (ids != token)
        return mask
