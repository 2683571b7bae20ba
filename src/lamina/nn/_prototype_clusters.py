"""Where prototypes start (k-means of latents) and which of them are one and the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.errors import LaminaError, ShapeError

ROUNDS = 50
"""Of k-means at most; it ends where nothing moves."""


def centres(latents: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` k-means centres of latents (n, q), started by k-means++; float32 at least."""
    if len(latents) < count:
        raise LaminaError(f"{count} prototypes need at least as many latents to start from, got {len(latents)}")
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    found = _spread(x, count, generator)
    for _ in range(ROUNDS):
        nearest = torch.cdist(x, found).argmin(1)
        sums = torch.zeros_like(found).index_add_(0, nearest, x)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), found)
        if torch.equal(moved, found):
            break
        found = moved
    return found


def centres_of_classes(
    latents: Tensor, labels: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return `count` centres shared out among the classes, the largest first in line, and the class of each (count,).

    Raises:
        ShapeError: not one whole-number label a latent. LaminaError: fewer centres than classes.
    """
    if labels.shape != latents.shape[:1] or labels.is_floating_point():
        raise ShapeError(f"labels must be whole numbers, one a latent, got {tuple(labels.shape)} for {len(latents)}")
    names, sizes = labels.unique(return_counts=True)
    if count < len(names):
        raise LaminaError(f"{count} prototypes cannot start at {len(names)} classes: each needs one")
    share, rest = divmod(count, len(names))
    more = set(sizes.argsort(descending=True, stable=True)[:rest].tolist())
    shares = [share + (i in more) for i in range(len(names))]
    pieces = [centres(latents[labels == n], s, generator) for n, s in zip(names, shares, strict=True)]
    return torch.cat(pieces), names.repeat_interleave(torch.tensor(shares, device=names.device))


def _spread(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw rows one after the other, each with a probability that grows with its squared distance to those drawn."""
    first = int(torch.randint(len(x), (1,), generator=generator))
    rows, far = [first], (x - x[first]).square().sum(1)
    while len(rows) < count:
        # On the CPU, so that a seed gives the same rows on every device. Of equal latents any will do.
        chances = far.cpu().double()
        chances = chances if float(chances.sum()) > 0 else torch.ones_like(chances)
        rows.append(int(torch.multinomial(chances, 1, generator=generator)))
        far = torch.minimum(far, (x - x[rows[-1]]).square().sum(1))
    return x[rows].clone()


def close_groups(prototypes: Tensor, tolerance: float) -> list[list[int]]:
    """Group rows (m, q) that a chain of steps of at most `tolerance` (Euclidean) connects; in order of the first."""
    if not tolerance >= 0:
        raise LaminaError(f"tolerance is a distance between prototypes, at least 0, got {tolerance}")
    p = prototypes.detach().double()
    near = (p[:, None] - p[None]).norm(dim=-1) <= tolerance
    groups: list[list[int]] = []
    left = list(range(len(p)))
    while left:
        group, reached = [left[0]], near[left[0]].clone()
        while more := [j for j in left if bool(reached[j]) and j not in group]:
            group += more
            reached = near[group].any(0)
        groups.append(sorted(group))
        left = [j for j in left if j not in group]
    return groups


def merged(prototypes: Tensor, weight: Tensor, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Put one prototype in the place of each group: the mean of (m, q), the sum of the columns of weight (K, m)."""
    points = torch.stack([prototypes[list(g)].mean(0) for g in groups])
    return points, torch.stack([weight[:, list(g)].sum(1) for g in groups], dim=1)
