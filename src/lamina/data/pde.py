"""Published solutions of partial differential equations by name, from a folder."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch

from lamina.data._arrays import npz
from lamina.data._at_hand import places
from lamina.data.examples import Data
from lamina.data.flows import channels_first, from_fields
from lamina.errors import LaminaError
from lamina.registry import register


class Solution(NamedTuple):
    """One solution over space and time: where it stands, the name of the array (space, time)."""

    file: str
    array: str


SOLUTIONS = {
    "burgers": Solution("pde/burgers_shock_reference.npz", "usol"),
    "allen_cahn": Solution("pde/AC_reference.npz", "uu"),
    "kdv": Solution("pde/KdV_reference.npz", "uu"),
}


@register(
    "data",
    source="Darcy flow: neuraloperator (Kossaifi et al.); others: Raissi et al., "
    "Physics-informed neural networks (2019)",
)
def pde(
    equation: Literal["darcy", "burgers", "allen_cahn", "kdv"] = "darcy",
    batch: int = 16,
    *,
    evaluation: Literal[16, 32] | None = None,
    train: int | None = None,
    folder: str | None = None,
) -> Data:
    """Pairs of fields `inputs` -> `targets`, as in `flows`, from published data.

    "darcy": permeability (0 or 1) to pressure, 1,000 pairs of 16 x 16 cells, 50 for evaluation at 16 x 16 or at
    32 x 32 (another resolution than trained on). "burgers", "allen_cahn", "kdv": one solution over space and time each;
    a row maps all of space at one time to that at the next, the last fifth of the times is the evaluation.

    Args:
        equation: which.
        batch: global batch size.
        evaluation: cells an axis of the evaluation, for "darcy"; None = 16.
        train: rows to train on, from the first; None = all.
        folder: with `pde/darcy_train_16.npz` and so on; default: what LAMINA_DATA names.
    Raises:
        LaminaError: the set is not at hand, or an evaluation at another resolution where there is none.
    """
    if train is not None and train < 1:
        raise LaminaError(f"train must be at least 1, got {train}")
    if equation == "darcy":
        files = ["pde/darcy_train_16.npz", f"pde/darcy_test_{evaluation or 16}.npz"]
        found = places("pde", files, folder, hub=None) or []
        fields = [channels_first(a) for path in found for a in npz(path, ["x", "y"])]
        return from_fields(fields[0][:train], fields[1][:train], fields[2], fields[3], batch, "pde")
    if evaluation is not None:
        raise LaminaError(f"evaluation is a resolution of 'darcy'; {equation!r} has one resolution only")
    solution = SOLUTIONS[equation]
    path = (places("pde", [solution.file], folder, hub=None) or [])[0]
    values = np.ascontiguousarray(npz(path, [solution.array])[0].T)
    frames = torch.from_numpy(values).float()[:, None]
    cut = len(frames) - 1 - (len(frames) - 1) // 5
    now, following = frames[:-1], frames[1:]
    return from_fields(now[:cut][:train], following[:cut][:train], now[cut:], following[cut:], batch, "pde")
