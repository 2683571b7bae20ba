"""Standardised maps: image by image, over the batch, or group by group in turn. Without gains and shifts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.progressive_norm import token_moments
from lamina.registry import register

EPS = 1e-5


@register("norm", "group_instance_batch_norm", source="Zhang (2024), arXiv 2401.17948, G-IBS")
class GroupInstanceBatchNorm(nn.Module):
    """Groups of channels, standardised over batch and positions (even groups) or image by image (odd groups).

    x (B, C, H, W) -> same; no gain, no shift. Statistics in float32.

    Args:
        width: C; a multiple of groups.
        groups: equal runs of channels; 1 = batch statistics alone.
        track_stats: keep running statistics of the even groups and use them in evaluation; False (the paper's): the
            batch's own in evaluation too, so that an answer depends on what is beside it.
        momentum: of the running statistics. sync: in training, batch statistics over all data-parallel processes.
    Raises:
        ShapeError: groups that do not divide width; at the call, other channels, or statistics of a single number.
    Source: G-IBS, "group-based instance-batch standardisation".
    Example:
        >>> GroupInstanceBatchNorm(24)(torch.randn(2, 24, 5, 5)).mean((0, 2, 3)).abs().max() < 1e-5
        tensor(True)
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        width: int,
        groups: int = 12,
        track_stats: bool = False,
        *,
        momentum: float = 0.1,
        sync: bool = False,
    ) -> None:
        super().__init__()
        if width < 1 or groups < 1 or width % groups:
            raise ShapeError(f"groups must divide width, both at least 1, got width={width} and groups={groups}")
        self.width, self.groups, self.momentum, self.sync = width, groups, momentum, sync
        followed = (groups + 1) // 2 * (width // groups)
        self.register_buffer("running_mean", torch.zeros(followed) if track_stats else None)
        self.register_buffer("running_var", torch.ones(followed) if track_stats else None)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise every channel."""
        if x.dim() != 4 or x.shape[1] != self.width or not x.is_floating_point():
            what = f"takes floating-point maps (B, {self.width}, H, W), got {x.dtype} {tuple(x.shape)}"
            raise ShapeError(f"GroupInstanceBatchNorm {what}")
        if self.groups == 1:
            return self._over_the_batch(x)
        share = self.width // self.groups
        maps, count = x.unflatten(1, (self.groups, share)), self.groups // 2 * 2
        # Unbound, not sliced twice: the gradient of a slice is a whole map of zeros.
        even, odd = (part.flatten(1, 2) for part in maps[:, :count].unflatten(1, (-1, 2)).unbind(2))
        if count < self.groups:
            even = torch.cat((even, maps[:, -1]), dim=1)
        even, odd = self._over_the_batch(even), instance_standardize(odd)
        return interleaved(even.unflatten(1, (-1, share)), odd.unflatten(1, (-1, share))).flatten(1, 2)

    def _over_the_batch(self, x: Tensor) -> Tensor:
        own = self.training or self.running_mean is None
        if own and x.shape[0] * x.shape[2] * x.shape[3] < 2:
            raise ShapeError(
                f"batch statistics of one number are not defined, got maps {tuple(x.shape)}: more images, or "
                "track_stats=True and eval()"
            )
        # In evaluation processes may have unequally many batches, and nobody to answer.
        if self.sync and self.training:
            return self._over_all_processes(x)
        return F.batch_norm(x, self.running_mean, self.running_var, None, None, own, self.momentum, EPS)

    def _over_all_processes(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (2, 3), correction=0)  # (B, C)
        middle, between, images = token_moments(mean, sync=True)
        total = token_moments(var, sync=True)[0] + between
        if self.running_mean is not None and self.running_var is not None:
            count = images * x.shape[2] * x.shape[3]
            unbiased = total.detach() * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(middle.detach().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        standard = (wide - middle[:, None, None]) * torch.rsqrt(total + EPS)[:, None, None]
        return standard.to(x.dtype)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.width}, groups={self.groups}, track_stats={self.running_mean is not None}"


def interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """Put even (B, m, ...) and odd (B, m or m - 1, ...) groups in turn: (B, groups, ...)."""
    count = odd.shape[1]
    pairs = torch.stack((even[:, :count], odd), dim=2).flatten(1, 2)
    return torch.cat((pairs, even[:, count:]), dim=1) if even.shape[1] > count else pairs


def instance_standardize(x: Tensor) -> Tensor:
    """Standardise each channel of each image: (B, C, H, W) -> same.

    Raises:
        ShapeError: maps of one position.
    """
    if x.shape[2] * x.shape[3] < 2:
        raise ShapeError(f"maps of one position have no variance of their own, got {tuple(x.shape)}")
    return F.instance_norm(x, eps=EPS)
