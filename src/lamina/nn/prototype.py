"""Decisions as weighted distances to learned prototypes: the layer, a head for `nn.Linear`, the two penalties.

Source: Li, Liu, Chen, Rudin, Deep Learning for Case-Based Reasoning through Prototypes (2018), arXiv 1710.04806.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import _prototype_clusters as clusters
from lamina.nn._precision import without_autocast
from lamina.registry import register

SOURCE = "Li, Liu, Chen, Rudin, Deep Learning for Case-Based Reasoning through Prototypes (2018), arXiv 1710.04806"


@register("layer", source=f"{SOURCE}, section 3")
class PrototypeLayer(nn.Module):
    """Squared Euclidean distances to learned prototypes. x (..., width) -> (..., num_prototypes), at least float32.

    Under autocast too: distances of bfloat16 products lose the small differences that decide.

    Args:
        num_prototypes: m >= 1.
        width: q, of the latents.
        init: "uniform" in 0..1, as the official code, or "normal", standard; `initialize` starts from data.
        seed: of the start, and of `initialize`.
    Raises:
        LaminaError: a size below 1, an unknown init. ShapeError: (at the call) another width.
    Example:
        >>> PrototypeLayer(15, 40)(torch.rand(2, 40)).shape
        torch.Size([2, 15])
    """

    def __init__(
        self, num_prototypes: int, width: int, init: Literal["uniform", "normal"] = "uniform", seed: int = 0
    ) -> None:
        super().__init__()
        if num_prototypes < 1 or width < 1:
            raise LaminaError(
                f"a prototype layer needs num_prototypes and width of at least 1, got {num_prototypes} and {width}"
            )
        draws = {"uniform": torch.rand, "normal": torch.randn}
        if init not in draws:
            raise LaminaError(f"init must be 'uniform' or 'normal', got {init!r}")
        self.width, self.seed = width, seed
        # The same numbers on every device; under torch.device("meta") a generator has none to give.
        here, generator = torch.empty(0).device, torch.Generator("cpu").manual_seed(seed)
        self.prototypes = nn.Parameter(draws[init](num_prototypes, width, generator=generator, device="cpu").to(here))

    def forward(self, x: Tensor) -> Tensor:
        """Return the squared distances of (..., width)."""
        if x.dim() < 1 or x.shape[-1] != self.width or not x.is_floating_point():
            raise ShapeError(
                f"the prototypes are floating-point vectors of width {self.width}, got {x.dtype} {tuple(x.shape)}"
            )
        return squared_distances(x, self.prototypes)

    @torch.no_grad()
    def initialize(self, latents: Tensor, labels: Tensor | None = None) -> Tensor | None:
        """Start the prototypes at k-means centres of latents (n, width); with labels, of each class on its own.

        Returns:
            The class each prototype started in, (num_prototypes,), or None without labels.
        Raises:
            LaminaError: too few latents, or fewer prototypes than classes. ShapeError: latents of another width.
        """
        if latents.dim() != 2 or latents.shape[1] != self.width:
            raise ShapeError(f"latents to start from must be (n, {self.width}), got {tuple(latents.shape)}")
        generator = torch.Generator().manual_seed(self.seed)
        count, classes = len(self.prototypes), None
        if labels is None:
            points = clusters.centres(latents, count, generator)
        else:
            points, classes = clusters.centres_of_classes(latents, labels, count, generator)
        self.prototypes.copy_(points)
        return classes

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{len(self.prototypes)}, {self.width}"


@register("layer", source=f"{SOURCE}, section 3")
class PrototypeHead(nn.Module):
    """Classifier whose logits are a weighted sum of distances to prototypes; for `nn.Linear(in_features, num_classes)`.

    x (..., in_features) -> logits (..., num_classes), at least float32, also under autocast. A negative weight: being
    near that prototype speaks for that class. Beside the task's loss, train with `penalties`, without which prototypes
    are near nothing: the objectives `prototype` (of a `PrototypeNetwork`) and `prototype_penalties` (of any model).

    Args:
        in_features: width of the latents.
        num_classes: K.
        num_prototypes: m, at least K for one a class (a warning); None: 1.5 K, the paper's 15 for 10 classes.
        init, seed: see `PrototypeLayer`; the weights start uniform in 0..1, as in the official code. Where latents are
            far from 0..1 (a pretrained trunk), call `initialize` with some of them.
    Raises:
        LaminaError: a size below 1. ShapeError: (at the call) another width.
    Example:
        >>> head = PrototypeHead(64, 10, num_prototypes=15)
        >>> head(torch.rand(2, 64)).shape, head.contributions(torch.rand(2, 64)).shape
        (torch.Size([2, 10]), torch.Size([2, 15, 10]))
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_prototypes: int | None = None,
        *,
        init: Literal["uniform", "normal"] = "uniform",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise LaminaError(
                f"a prototype head needs in_features and num_classes of at least 1, got {in_features} and {num_classes}"
            )
        count = (3 * num_classes + 1) // 2 if num_prototypes is None else num_prototypes
        if 1 <= count < num_classes:
            warnings.warn(
                f"{count} prototypes cannot be one of each of {num_classes} classes: take at least {num_classes}",
                stacklevel=2,
            )
        self.in_features, self.num_classes = in_features, num_classes
        self.layer = PrototypeLayer(count, in_features, init, seed)
        self.linear = nn.Linear(count, num_classes, bias=False)
        here, generator = self.linear.weight.device, torch.Generator("cpu").manual_seed(seed + 1)
        drawn = torch.rand(count, num_classes, generator=generator, device="cpu")
        with torch.no_grad():
            self.linear.weight.copy_(drawn.t().to(here))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of (..., in_features)."""
        return self.logits(self.layer(x))

    def logits(self, distances: Tensor) -> Tensor:
        """Return the logits (..., K) of squared distances (..., m), in their dtype."""
        with without_autocast(distances.device):
            return F.linear(distances, self.linear.weight.to(distances.dtype))

    def contributions(self, z: Tensor) -> Tensor:
        """Return what each prototype adds to each logit: (..., in_features) -> (..., m, K); their sum is the logits."""
        distances = self.layer(z)
        return distances[..., None] * self.linear.weight.t().to(distances.dtype)

    def prototype_class(self) -> Tensor:
        """Return the class that nearness to each prototype speaks for most, (m,): that of its most negative weight."""
        return self.linear.weight.detach().argmin(0)

    def penalties(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return (R1, R2) of latents (..., in_features), see `prototype_penalties`."""
        return prototype_penalties(self.layer(z))

    @torch.no_grad()
    def initialize(self, latents: Tensor, labels: Tensor | None = None) -> None:
        """Start the prototypes at k-means centres of latents (n, in_features), see `PrototypeLayer.initialize`.

        With labels each class has prototypes of its own, and the weights start with these alone, one for the mean
        distance: -1 / mean for a prototype's class, 0 for others.
        """
        if labels is not None and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise LaminaError(
                f"labels must lie in 0..{self.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
        classes = self.layer.initialize(latents, labels)
        if classes is not None:
            scale = self.layer(latents).mean().clamp(min=torch.finfo(torch.float32).tiny)
            self.linear.weight.copy_(-F.one_hot(classes, self.num_classes).t() / scale)

    @torch.no_grad()
    def merge(self, tolerance: float) -> list[list[int]]:
        """Put one prototype in the place of those that are within `tolerance` of each other; return the groups.

        Distance: Euclidean, of latents; chains count. The mean takes their place, with the sum of their weights: for
        equal prototypes logits stay. Changes the head in place: `prototypes` and `weight` are new parameters, so an
        optimizer has to be made anew.

        Raises:
            LaminaError: a negative tolerance.
        """
        groups = clusters.close_groups(self.layer.prototypes, tolerance)
        points, weight = clusters.merged(self.layer.prototypes, self.linear.weight, groups)
        self.layer.prototypes = nn.Parameter(points, requires_grad=self.layer.prototypes.requires_grad)
        self.linear.weight = nn.Parameter(weight, requires_grad=self.linear.weight.requires_grad)
        self.linear.in_features = len(groups)
        return groups

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_features}, {self.num_classes}"


def squared_distances(z: Tensor, prototypes: Tensor) -> Tensor:
    """Return |z - p_j|^2 for every prototype: (..., q), (m, q) -> (..., m), at least float32, never negative.

    One matrix product, after the mean of the prototypes was taken from both, which leaves distances as they are and
    keeps their digits where z and p are large and close to each other. Not lowered by autocast.

    Raises:
        ShapeError: widths that differ, or values that are not floating-point.
    Example:
        >>> squared_distances(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[1.0], [5.0]]))
        tensor([[ 1., 25.],
                [ 0., 16.],
                [ 9.,  1.]])
    """
    if prototypes.dim() != 2 or z.dim() < 1 or z.shape[-1] != prototypes.shape[-1]:
        raise ShapeError(
            f"squared_distances takes (..., q) and (m, q) of one q, got {tuple(z.shape)} and {tuple(prototypes.shape)}"
        )
    if not (z.is_floating_point() and prototypes.is_floating_point()):
        raise ShapeError(f"squared_distances takes floating-point values, got {z.dtype} and {prototypes.dtype}")
    dtype = torch.promote_types(torch.promote_types(z.dtype, prototypes.dtype), torch.float32)
    with without_autocast(z.device):
        p = prototypes.to(dtype)
        middle = p.mean(0).detach()
        p, rows = p - middle, (z.to(dtype) - middle).reshape(-1, z.shape[-1])
        found = torch.addmm(p.square().sum(1), rows, p.t(), alpha=-2.0) + rows.square().sum(1, keepdim=True)
        return found.clamp(min=0.0).view(*z.shape[:-1], len(p))


def prototype_penalties(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return (R1, R2), 0-dim both, of squared distances (..., m).

    R1, the mean over prototypes of the distance to their nearest row, keeps every prototype near some input; R2, the
    mean over rows of the distance to their nearest prototype, keeps every input near some prototype. The gradient goes
    through the nearest alone, of several through one. Of no rows both are 0.

    Source: arXiv 1710.04806, equations 3 and 4.
    Example:
        >>> prototype_penalties(torch.tensor([[1.0, 25.0], [0.0, 16.0], [9.0, 1.0]]))
        (tensor(0.5000), tensor(0.6667))
    """
    rows = distances.reshape(-1, distances.shape[-1])
    if not len(rows):
        return rows.sum(), rows.sum()
    return rows.min(0).values.mean(), rows.min(1).values.mean()
