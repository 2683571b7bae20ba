"""What stands where an attention was: a module that is called like one and runs a token mixer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamina import anatomy, probe
from lamina.errors import LaminaError
from lamina.nn.layout import GridAsSequence
from lamina.rewrite._skip import Rest

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class ReplacedAttention(nn.Module):
    """Takes what the attention took, returns what it returned, and runs a mixer inside.

    Args:
        mixer: of sequences, (B, T, C) -> the same.
        names: of the positional arguments of the attention's forward.
        rest: None = return a tensor; else a tuple that goes on with these (arguments handed through, or None).
        batch_first: False where tokens are (T, B, C).
        norm: a norm that stood inside the attention's module and stays; `norm_at` says where it runs.
        residual: add the input to the branch, as the attention's module did.
    Raises:
        LaminaError: at the call, a mask or a cache that the mixer cannot use: ignoring it would be silently wrong.
    """

    # torch.nn.TransformerEncoderLayer reads it: without a bias it takes no fused path.
    in_proj_bias: Tensor | None = None

    def __init__(
        self,
        mixer: nn.Module,
        *,
        names: tuple[str, ...] = (),
        rest: Rest | None = None,
        batch_first: bool = True,
        norm: nn.Module | None = None,
        norm_at: anatomy.NormPlace = "none",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, norm
        self.names, self.rest, self.batch_first = names, rest, batch_first
        self.norm_at, self.residual = norm_at, residual
        self.takes = frozenset(inspect.signature(mixer.forward).parameters)

    @property
    def caches(self) -> bool:
        """Whether it can work with a key-value cache of ours."""
        return "cache" in self.takes and bool(getattr(self.mixer, "caches", True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Mix the tokens."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x = stream_of(given)
        branch = self.norm(x) if self.norm is not None and self.norm_at == "pre" else x
        branch = branch if self.batch_first else branch.transpose(0, 1)
        branch = self.mixer(branch, **self._context(given))
        branch = branch if self.batch_first else branch.transpose(0, 1)
        branch = self.norm(branch) if self.norm is not None and self.norm_at == "sandwich" else branch
        result = x + branch if self.residual else branch
        result = self.norm(result) if self.norm is not None and self.norm_at == "post" else result
        if self.rest is None:
            return result
        return (result, *(None if r is None else given.get(r[0]) for r in self.rest))

    def _context(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the mixer is told besides the tokens; refuse what it would have to ignore."""
        context: dict[str, Any] = {}
        for name in masks_of(given):
            context["attention_mask"] = _keys_seen(name, given[name])
        for name in CACHES:
            if given.get(name) is not None:
                context["cache"] = given[name]
                if name != "cache" or "cache" not in self.takes:
                    raise LaminaError(
                        f"{self._what()} keeps no cache of that kind: call the model with use_cache=False"
                    )
        if "attention_mask" in context and "attention_mask" not in self.takes:
            raise LaminaError(f"{self._what()} takes no mask, but the model handed it one: give whole sequences only")
        positions = given.get("positions", given.get("position_ids"))
        if positions is not None and "positions" in self.takes:
            context["positions"] = positions
        return context

    def _what(self) -> str:
        inner = self.mixer.mixer if isinstance(self.mixer, GridAsSequence) else self.mixer
        return f"the {type(inner).__name__} in place of attention"


def stream_of(given: Mapping[str, Any]) -> Tensor:
    """Return the tokens among the arguments an attention was called with."""
    hidden = given.get("hidden_states")
    x = hidden if isinstance(hidden, Tensor) else probe.first_tensor(dict(given))
    if x is None:
        raise LaminaError(f"a replaced attention was called without a tensor, with {', '.join(given) or 'nothing'}")
    return x


def masks_of(given: Mapping[str, Any]) -> list[str]:
    """Name the arguments that hide tokens (a mask of heads does not)."""
    return [n for n, v in given.items() if n.endswith("mask") and "head" not in n and isinstance(v, Tensor)]


def _keys_seen(name: str, mask: Tensor) -> Tensor:
    """Read a mask as (B, keys), True = a real token: padding is all that a mask may say here.

    Of (B, 1, queries, keys) the last query counts: it sees every real token, in causal models too.
    """
    if name == "key_padding_mask":
        return ~mask if mask.dtype is torch.bool else mask >= 0
    if mask.dim() == 2 and name != "attn_mask":
        return mask.bool()
    if mask.dim() == 4 and mask.shape[1] == 1:
        last = mask[:, 0, -1]
        return last if last.dtype is torch.bool else last >= 0
    raise LaminaError(f"a replaced attention reads masks of padding only, {name} has the shape {tuple(mask.shape)}")
