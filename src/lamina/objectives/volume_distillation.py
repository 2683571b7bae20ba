"""Volume distillation: follow another field point by point, then ray by ray; no photographs needed.

Active learning (`active`) looks for more of what the student gets wrong: views, rays, points.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch, bare
from lamina.errors import LaminaError, nearest
from lamina.nn.fields import OccupancyGrid, Rendering, Samples, VolumeRenderer, truncated_exp
from lamina.nn.fields.render import check_rays
from lamina.objectives._field_mining import Active, hard_parts, observe
from lamina.objectives._field_pair import (
    Told,
    check_pair,
    comparable,
    distances,
    field_in,
    geometry_of,
    within_forward,
)
from lamina.objectives.hard_samples import HardPoints as HardPoints
from lamina.objectives.hard_samples import HardRays as HardRays
from lamina.objectives.hard_samples import HardSamples as HardSamples
from lamina.objectives.hard_views import HardViews as HardViews
from lamina.objectives.objective import Losses
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

WEIGHTS = {"feature": 0.002, "density": 0.002, "color": 0.002, "render": 1.0, "depth": 0.0}
"""Of the distances, as published; the first decays."""


@register("objective", source="Fang et al., One is All (AAAI 2023), arXiv 2211.15977")
class VolumeDistillation(nn.Module):
    """Make a field say what another field says, whatever each is made of: shallow quantities first, then what is seen.

    Stage 1 compares geometry features (log-density and 15 numbers) at points along the rays, stage 2 log-densities and
    colours at these points as well, stage 3 the rendered rays too. Log-densities are clipped to [-2, 7] on both sides.
    Where a field has no such feature (`grid_field`), stage 2 comes first. The batch has `origins` and `directions`
    (`scenes`), or `points` (N, dim) where no ray is rendered. Evaluations always render, and `measure` is the mean
    square between the two renderings.

    Args:
        teacher: a field, a model with one inside, or the node of such a model
            (`{name: "lamina.io:load", folder: runs/hash/model}`), frozen from then on; None: the model before its
            latest rewrite, and until then the loss is 0.
        renderer: a `VolumeRenderer`, or its options by name; None: the student's own.
        stages: fractions of training at which stage 1 and stage 2 end, told by `set_progress`; (0, 0) = all at once.
        weights: of the distances `feature`, `density`, `color`, `render`, `depth` (expected distances of what rays
            see, published as 0: off); what is not named stays as published.
        feature_decay: the feature's weight is multiplied by it at every step.
        l1: weight of the sum of mean absolute values of a low-rank student's density factors, in stage 3.
        distance: "norm", of the whole batch's difference, or "mse", its mean square.
        occupancy: cells a side of a grid of what the teacher fills, outside of which neither is asked; None = the
            teacher's own grid, if it has one. The student's own is not used.
        active: any of `HardViews()`, `HardRays()`, `HardPoints()` (or their names, or nodes: `hard_views`, ...), in
            training alone. They look at what was rendered, so they begin with stage 3: views and rays change the
            batches to come, points leave out of the point-wise distances what neither field shows.
    Raises:
        LaminaError: fractions not 0 <= first <= second <= 1, a negative or unknown weight, a decay outside 0..1; (at
            the call) no field, fields of two boxes, a teacher that is not finite, a batch without rays or directions.
        ShapeError: (at the call) directions that are not of length 1.
    Source: as registered, equations 2 to 5 and section 4.1; hyperparameters of the official code. Active learning, and
        the loss of depths: Fang et al., Progressive Volume Distillation with Active Learning (2023), arXiv 2304.04012.
    Deviation: with several micro-batches a "norm" is of each of them; over several processes it is of the whole batch.
    Example:
        >>> from lamina.nn.fields import GridField
        >>> follow = VolumeDistillation(GridField(resolution=4), VolumeRenderer(samples=8))
        >>> rays = {"origins": torch.tensor([[0.0, 0.0, 3.0]]), "directions": torch.tensor([[0.0, 0.0, -1.0]])}
        >>> sorted(follow(GridField(resolution=5), rays))
        ['color', 'count', 'density', 'feature', 'loss', 'render']
    """

    needs: ClassVar[Literal["outputs", "model"]] = "model"
    steps: Tensor

    def __init__(
        self,
        teacher: Annotated[nn.Module | Node | None, Slot("model")] = None,
        renderer: VolumeRenderer | Mapping[str, Any] | None = None,
        *,
        stages: tuple[float, float] = (1 / 15, 1 / 6),
        weights: Mapping[str, float] | None = None,
        feature_decay: float = 0.995,
        l1: float = 1e-4,
        distance: Literal["norm", "mse"] = "norm",
        occupancy: int | None = None,
        active: Sequence[Active] = (),
    ) -> None:
        super().__init__()
        self.weights = _weights(weights or {}, feature_decay, l1)
        self.names = tuple(n for n, w in WEIGHTS.items() if w or self.weights[n])
        if not 0 <= stages[0] <= stages[1] <= 1:
            raise LaminaError(f"stages must be two fractions 0 <= first <= second <= 1, got {tuple(stages)}")
        if distance not in ("norm", "mse"):
            raise LaminaError(f"distance must be 'norm' or 'mse', got {distance!r}")
        self.stages, self.feature_decay, self.l1, self.distance = tuple(stages), feature_decay, l1, distance
        self.renderer = VolumeRenderer(**renderer) if isinstance(renderer, Mapping) else renderer
        self.cells, self.fraction = occupancy, 0.0
        self._told = self._counted = False
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.grid: OccupancyGrid | None = None
        hard, self.hard_points = hard_parts(active)
        self.hard = nn.ModuleList(hard)
        # A teacher that was given is known without a checkpoint: it stays outside of the module tree.
        self._given: tuple[nn.Module, ...] = ()
        self.taken: nn.Module | None = None
        self._checked: tuple[int, int] | None = None
        if teacher is not None:
            made = teacher if isinstance(teacher, nn.Module) else factory("model", teacher)()
            self._given = (self._held(made),)

    @property
    def teacher(self) -> nn.Module | None:
        """The model that is followed, frozen."""
        return self._given[0] if self._given else self.taken

    def before_rewrite(self, model: nn.Module) -> None:
        """Keep a frozen copy of the model as teacher, unless one was given."""
        if not self._given:
            self.taken = self._held(copy.deepcopy(bare(model)))

    def set_progress(self, fraction: float) -> None:
        """Learn how far training is; a step counts once each time this is told."""
        self.fraction, self._told, self._counted = fraction, True, False
        for part in self.hard:
            part.set_progress(fraction)  # type: ignore[operator]

    def stage(self) -> int:
        """Return which stage it is: 1, 2 or 3. An evaluation is in stage 3."""
        if not torch.is_grad_enabled():
            return 3
        first, second = self.stages
        return 1 if self.fraction <= first and first else 2 if self.fraction <= second and second else 3

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Ask both fields at the same points and return the losses."""
        student, teacher, rows = field_in(model), self.teacher, len(_rows_of(batch))
        if teacher is None:
            zero = torch.zeros((), device=_rows_of(batch).device)
            return self._with_names({"loss": zero, "count": zero + rows}, {})
        taught = field_in(teacher)
        self._check(student, taught)
        mining = torch.is_grad_enabled() and not _rows_of(batch).is_meta
        if mining and (self.hard or self.hard_points):
            batch = self._propose(batch)
            rows = len(_rows_of(batch))
        renderer = self.renderer or getattr(bare(model), "renderer", None)
        places = self._places(batch, renderer, taught)
        stage = self.stage() if places.samples is not None else min(self.stage(), 2)
        with torch.no_grad():
            goal = geometry_of(taught, places.x)

        def follow() -> Told:
            found = geometry_of(student, places.x)
            if stage > 1 or not comparable(found, goal):
                found.color = student.color(found.raw, places.d).float()
            return found

        found = within_forward(model, follow)
        if found.color is not None:
            with torch.no_grad():
                goal.color = taught.color(goal.raw, places.d).float()
        pairs = self._pairs(found, goal, places, renderer if stage == 3 else None, mining)
        if mining and "render" in pairs:
            observe(self.hard, batch, *pairs["render"])
        return self._sum(pairs, student, model, rows, stage)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield nothing: the teacher is frozen."""
        return iter(())

    def train(self, mode: bool = True) -> VolumeDistillation:
        """Set the mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def _propose(self, batch: Batch) -> Batch:
        """Return the batch as active learning wants it."""
        if "origins" not in batch:
            raise LaminaError(
                f"active learning looks for hard views, rays and points of rays: it needs 'origins' and 'directions' "
                f"in the batch, which has {sorted(batch)}"
            )
        for part in self.hard:
            batch = part.propose(batch)  # type: ignore[operator]
        return batch

    def _places(self, batch: Batch, renderer: VolumeRenderer | None, taught: Any) -> Places:
        """Return the points at which both are asked."""
        if "origins" not in batch:
            if self.weights["render"]:
                raise LaminaError(
                    f"volume_distillation renders rays and needs 'origins' and 'directions' in the batch, which has "
                    f"{sorted(batch)}; weights={{'render': 0}} follows 'points' alone"
                )
            return Places(None, batch["points"], batch.get("directions"))
        if renderer is None or "directions" not in batch:
            raise LaminaError(
                "volume_distillation needs a renderer (its own or the student's) and a batch with 'directions', got "
                f"{'none' if renderer is None else 'one'} and {sorted(batch)}"
            )
        check_rays(batch["origins"], batch["directions"])
        samples = renderer.sample(batch["origins"], batch["directions"], taught.bound, self._occupancy())
        x, d = samples.points.flatten(0, 1), samples.directions.flatten(0, 1)
        if samples.occupied is None or x.is_meta:
            return Places(samples, x, d)
        inside = samples.occupied.flatten().nonzero().squeeze(1)
        empty = not len(inside)
        if empty:
            # One point that weighs nothing: every process takes part in what follows.
            inside = inside.new_zeros(1)
        return Places(samples, x[inside], d[inside], inside, empty)

    def _occupancy(self) -> OccupancyGrid | None:
        return self.grid if self.cells is not None else getattr(self.teacher, "occupancy", None)

    def _pairs(
        self, found: Told, goal: Told, places: Places, renderer: VolumeRenderer | None, mining: bool
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what is compared: student's and teacher's by name; of points, in mining, the hard ones alone."""
        pairs = {}
        if found.feature is not None and goal.feature is not None and found.feature.shape == goal.feature.shape:
            pairs["feature"] = found.feature, goal.feature
        if found.color is not None and goal.color is not None:
            if found.density is not None and goal.density is not None:
                pairs["density"] = found.density, goal.density
            pairs["color"] = found.color, goal.color
        if places.empty:
            pairs = {name: (0 * a, 0 * b) for name, (a, b) in pairs.items()}
        if renderer is not None and places.samples is not None:
            behind = renderer.behind(places.samples.steps)
            seen, shown = (_seen(t, places, renderer, behind) for t in (found, goal))
            if mining and self.hard_points is not None:
                hard = self.hard_points.select_either(seen.weights.detach(), shown.weights).flatten()
                rows = (hard if places.rows is None else hard[places.rows]).nonzero().squeeze(1)
                pairs = {name: (a[rows], b[rows]) for name, (a, b) in pairs.items()}
            pairs["render"] = seen.color, shown.color
            if self.weights["depth"]:
                pairs["depth"] = seen.depth, shown.depth
        return pairs

    def _sum(
        self, pairs: dict[str, tuple[Tensor, Tensor]], student: Any, model: nn.Module, rows: int, stage: int
    ) -> Losses:
        device = self.steps.device if not pairs else next(iter(pairs.values()))[0].device
        count = torch.tensor(float(rows), device=device)
        found = distances(pairs, count, self.distance)
        weights: dict[str, Any] = dict(self.weights)
        weights["feature"] = weights["feature"] * self.feature_decay ** self.steps.to(torch.float32).to(device)
        total = torch.stack([weights[name] * value for name, value in found.items()]).sum()
        if stage == 3 and self.l1 and hasattr(student, "size_penalty"):
            total = total + self.l1 * student.size_penalty()
        if isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel):
            # It waits for a gradient of every parameter, and a stage may leave networks out.
            total = total + 0 * torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum()
        losses: Losses = {"loss": total, "count": count}
        if not torch.is_grad_enabled() and "render" in pairs:
            losses["measure"] = (pairs["render"][0] - pairs["render"][1]).square().mean()
        elif torch.is_grad_enabled() and not self._counted:
            self.steps += 1
            self._counted = self._told
        return self._with_names(losses, found)

    def _with_names(self, losses: Losses, found: Mapping[str, Tensor]) -> Losses:
        """Add every distance to be logged; those that are not of this stage are 0."""
        zero = torch.zeros_like(losses["loss"].detach())
        return losses | {name: found[name].detach() if name in found else zero for name in self.names}

    def _check(self, student: Any, taught: Any) -> None:
        if self._checked != (id(student), id(taught)):
            check_pair(student, taught)
            self._checked = id(student), id(taught)

    def _held(self, teacher: nn.Module) -> nn.Module:
        """Freeze a teacher and look where it holds something."""
        teacher = teacher.eval().requires_grad_(False)
        if self.cells is not None:
            field = field_in(teacher)
            self.grid = OccupancyGrid(self.cells, bound=field.bound).update(field)
        return teacher

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VolumeDistillation:
        """Move the teacher along."""
        for teacher in self._given:
            teacher._apply(fn)
        super()._apply(fn, recurse)
        return self


@dataclass(frozen=True)
class Places:
    """Points of one batch, and the rays they are of."""

    samples: Samples | None
    """None: there are no rays, only points."""
    x: Tensor
    """(N, dim): the points at which fields are asked."""
    d: Tensor | None
    rows: Tensor | None = None
    """Which of the rays' points these are; None = all."""
    empty: bool = False
    """No point holds anything: the one that is asked weighs nothing."""


def _seen(told: Told, places: Places, renderer: VolumeRenderer, behind: Tensor) -> Rendering:
    """Render what a field told of the points."""
    samples, s, color = places.samples, told.density, told.color
    assert samples is not None
    assert s is not None
    assert color is not None
    sigma, shape = truncated_exp(s), samples.steps.shape
    if places.empty:
        sigma = 0 * sigma
    if places.rows is not None:
        count = samples.steps.numel()
        sigma = sigma.new_zeros(count).index_put((places.rows,), sigma)
        color = color.new_zeros(count, 3).index_put((places.rows,), color)
    return renderer.composite(sigma.view(shape), color.view(*shape, 3), samples, behind)


def _rows_of(batch: Batch) -> Tensor:
    for name in ("origins", "points"):
        if isinstance(batch.get(name), Tensor):
            found: Tensor = batch[name]
            return found
    raise LaminaError(f"volume_distillation needs 'origins' and 'directions', or 'points', in the batch, which has {sorted(batch)}")  # fmt: skip  # noqa: E501


def _weights(given: Mapping[str, float], feature_decay: float, l1: float) -> dict[str, float]:
    for name, weight in given.items():
        if name not in WEIGHTS:
            raise LaminaError(f"weights has no {name!r}{nearest(name, WEIGHTS)}; it has {', '.join(WEIGHTS)}")
        if not weight >= 0:
            raise LaminaError(f"weights[{name!r}] must be at least 0, got {weight}")
    if not 0 <= feature_decay <= 1 or not l1 >= 0:
        raise LaminaError(f"feature_decay must be in 0..1 and l1 at least 0, got {feature_decay} and {l1}")
    return {**WEIGHTS, **given}
