"""The three levels of active learning of fields, as `volume_distillation` is given them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lamina.batches import Batch
from lamina.errors import LaminaError, nearest
from lamina.objectives.hard_samples import HardPoints, HardRays, HardSamples
from lamina.objectives.hard_views import HardViews
from lamina.recipe import build
from lamina.recipe._options import Misfit
from lamina.registry import snake_case

Active = HardSamples | HardPoints | str | Mapping[str, Any]
"""One level: what was made in Python, or its name or node."""

LEVELS: dict[str, type] = {snake_case(level.__name__): level for level in (HardViews, HardRays, HardPoints)}


def hard_parts(active: Sequence[Active]) -> tuple[list[HardSamples], HardPoints | None]:
    """Build the levels: those that change batches, in the order in which they do, and the one that selects points.

    Raises:
        LaminaError: with `active[i]`: no such level, an option that does not fit, or a level twice.
    """
    if isinstance(active, (str, Mapping)):
        raise LaminaError(f"active must be a list of levels ({', '.join(LEVELS)}), got {active!r}")
    made = [_made(level, f"active[{i}]") for i, level in enumerate(active)]
    kinds = [type(level) for level in made]
    twice = next((k for i, k in enumerate(kinds) if k in kinds[:i]), None)
    if twice is not None:
        raise LaminaError(f"active has {snake_case(twice.__name__)} twice: each level once")
    samples = [level for level in made if isinstance(level, HardSamples)]
    # Views replace rays, the others add some: what they added belongs to no view.
    samples.sort(key=lambda level: not isinstance(level, HardViews))
    return samples, next((level for level in made if isinstance(level, HardPoints)), None)


def observe(hard: Iterable[nn.Module], batch: Batch, seen: Tensor, shown: Tensor) -> None:
    """Tell the levels how wrong every ray of a batch is: colours of student and teacher, (R, 3) each."""
    gap = (seen - shown).detach().float()
    for level in hard:
        assert isinstance(level, HardSamples)
        # A view is ranked by its PSNR, a ray by the sum over its colour.
        level.observe(batch, gap.square().mean(1) if isinstance(level, HardViews) else gap.abs().sum(1))


def _made(level: Active, place: str) -> HardSamples | HardPoints:
    if isinstance(level, (HardSamples, HardPoints)):
        return level
    node = {"name": level} if isinstance(level, str) else dict(level) if isinstance(level, Mapping) else {}
    name = node.pop("name", None)
    if name not in LEVELS:
        meant = nearest(name, LEVELS) if isinstance(name, str) else ""
        raise LaminaError(f"{place}: no level of active learning is called {name!r}{meant}; there are {', '.join(LEVELS)}")  # fmt: skip  # noqa: E501
    full = f"{LEVELS[name].__module__}:{LEVELS[name].__name__}"
    try:
        made: HardSamples | HardPoints = build({"name": full, **node}, "objective", place)
    except Misfit as error:
        raise LaminaError(f"{error.path}: {error.sentence.replace(f'objective {full!r}', name)}") from error
    return made
