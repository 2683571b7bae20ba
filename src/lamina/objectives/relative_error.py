"""Errors of fields relative to the target: in L^p, and in Sobolev norms, which count derivatives too.

Source: He, Liu, Xu, MgNO (ICLR 2024), arXiv 2310.19809; Li et al. (2021), arXiv 2010.08895.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch, call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.nn._kept_float32 import wide
from lamina.nn._precision import without_autocast
from lamina.objectives.objective import Losses, target
from lamina.registry import register

SMALLEST = 1e-12
"""A target of norm 0 is divided by this: its relative error has no meaning, and shows."""


class _Relative:
    """The mean over rows of ||prediction - target|| / ||target||, in some norm of fields (B, channels, *grid)."""

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"
    name: ClassVar[str]

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        return self.loss(call(model, batch), batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the mean over the rows of the batch."""
        found, wanted = logits(outputs), target(batch, "targets", self.name)
        if found.shape != wanted.shape or found.dim() < 2:
            raise ShapeError(f"{self.name} got outputs {tuple(found.shape)} for targets {tuple(wanted.shape)}")
        found = wide(found)
        wanted = wanted.to(found.dtype)
        errors = self.norm(found - wanted) / self.norm(wanted).clamp(min=SMALLEST)
        return {"loss": errors.mean(), "count": torch.tensor(float(len(errors)), device=errors.device)}

    def norm(self, fields: Tensor) -> Tensor:
        """Return the norm of each row, (B,)."""
        raise NotImplementedError

    def parameters(self) -> Iterator[Parameter]:
        """Yield nothing: there is nothing of its own to train."""
        return iter(())


@register("objective", source="Li et al. 2021, arXiv 2010.08895")
class RelativeLp(_Relative):
    """Relative error of fields, ||prediction - target||_p / ||target||_p, over channels and cells of each row.

    outputs and `targets` (B, channels, *grid), in the units in which the error counts.

    Args:
        p: of the norm, at least 1; `inf` = the largest error.
    Raises:
        LaminaError: p below 1. ShapeError: outputs and targets of different shapes.
    Source: as the released code of MgNO and FNO, which sum over the batch; here the mean, so that a batch that is split
        over steps or processes gives the same gradient.
    Example:
        >>> y = torch.ones(3, 1, 4, 4)
        >>> RelativeLp().loss(2 * y, {"targets": y})["loss"]
        tensor(1.)
    """

    name: ClassVar[str] = "relative_lp"

    def __init__(self, p: float = 2.0) -> None:
        if not p >= 1:
            raise LaminaError(f"p must be at least 1 to make a norm, got {p}")
        self.p = float(p)

    def norm(self, fields: Tensor) -> Tensor:
        """Return the p-norm of each row."""
        return torch.linalg.vector_norm(fields.flatten(1), self.p, dim=1)


@register("objective", source="He, Liu & Xu 2024, arXiv 2310.19809, released code")
class RelativeSobolev(_Relative):
    """Relative error of fields and their derivatives: in the norm of H^order, by frequencies.

    outputs and `targets` (B, channels, *grid). Frequency k counts (1 + |k|^2)^(order / 2) times, k in periods a side:
    what is rough in the error weighs more than in `relative_lp`.

    Args:
        order: how many derivatives count, above 0.
        cutoff: along each axis, frequencies from here on add nothing to |k|, so that they count as in L^2; None = all
            count.
    Raises:
        LaminaError: order not above 0, cutoff below 1. ShapeError: outputs and targets of different shapes.
    Source: the released code's loss (`cutoff` 20, sum over the batch; here the mean, see `RelativeLp`).
    Example:
        >>> y = torch.ones(3, 1, 4, 4)
        >>> RelativeSobolev().loss(y, {"targets": y})["loss"]
        tensor(0.)
    """

    name: ClassVar[str] = "relative_sobolev"

    def __init__(self, order: float = 1.0, cutoff: int | None = 20) -> None:
        if not order > 0:
            raise LaminaError(f"order must be above 0, got {order}; without derivatives the objective is relative_lp")
        if cutoff is not None and cutoff < 1:
            raise LaminaError(f"cutoff must be at least 1, or null for none, got {cutoff}")
        self.order, self.cutoff = float(order), cutoff

    def norm(self, fields: Tensor) -> Tensor:
        """Return the Sobolev norm of each row."""
        if fields.dim() < 3:
            raise ShapeError(f"relative_sobolev takes fields (B, channels, *grid), got {tuple(fields.shape)}")
        axes = tuple(range(2, fields.dim()))
        with without_autocast(fields.device):
            spectrum = torch.view_as_real(torch.fft.fftn(fields, dim=axes, norm="ortho"))
            weights = sobolev_weights(fields.shape[2:], self.order, self.cutoff, fields)
            return torch.linalg.vector_norm((spectrum * weights[..., None]).flatten(1), dim=1)


def sobolev_weights(grid: torch.Size, order: float, cutoff: int | None, like: Tensor) -> Tensor:
    """Return (1 + |k|^2)^(order / 2) of every frequency of a grid, in the order of torch.fft.fftn."""
    total = torch.ones((), dtype=like.dtype, device=like.device)
    for axis, n in enumerate(grid):
        k = torch.arange(n, dtype=like.dtype, device=like.device)
        k = torch.minimum(k, n - k)
        if cutoff is not None:
            k = torch.where(k < cutoff, k, 0)
        total = total + k.square().view(-1, *[1] * (len(grid) - 1 - axis))
    return total ** (order / 2)
