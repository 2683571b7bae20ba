"""Cortical thickness of healthy people at 23 sites: a real table to learn anatomy from."""

from __future__ import annotations

from typing import Literal

import torch

from lamina.data._at_hand import places
from lamina.data._standardize import standardized
from lamina.data._tables import read_columns
from lamina.data.examples import Columns, Data, split_rows
from lamina.data.series import numbers
from lamina.errors import LaminaError
from lamina.registry import register

FILE = "brain/fcon1000_thickness.csv.gz"


@register(
    "data", source="Biswal et al., Toward discovery science of human brain function (2010); FreeSurfer, Destrieux"
)
def cortical_thickness(
    batch: int = 64,
    *,
    inputs: Literal["left", "right", "both"] = "both",
    split: float = 0.2,
    seed: int = 0,
    folder: str | None = None,
) -> Data:
    """1,078 subjects of 1000 Functional Connectomes, 74 regions a hemisphere, ages 8 to 85 (28 in the mean).

    `inputs` (B, 74 or 148) and `psi` (B, 74, 2), region by hemisphere (left, right), are thickness, standardised over
    the training rows; `age` (B,) years; `sex` (B,) 0 or 1 as the table has it, `site` (B,) int64.

    Args:
        batch: global batch size.
        inputs: which hemisphere the model sees.
        split: evaluation's share of the subjects, drawn with `seed`.
        seed: of the draw.
        folder: with `brain/fcon1000_thickness.csv.gz`; default: what LAMINA_DATA names.
    Raises:
        LaminaError: the table is not below the folder.
    """
    if inputs not in ("left", "right", "both"):
        raise LaminaError(f"inputs must be 'left', 'right' or 'both', got {inputs!r}")
    found = places("cortical_thickness", [FILE], folder, hub=None) or []
    table = read_columns(found[0])
    regions = [n[3:] for n in table if n.startswith("lh_") and n.endswith("_thickness") and "MeanThickness" not in n]
    sides = [numbers({n: table[n] for n in (f"{side}_{r}" for r in regions)}, found[0]) for side in ("lh", "rh")]
    train, held = split_rows(len(sides[0]), split, seed)
    psi = standardized(torch.stack(sides, dim=-1), train).float()
    known = numbers({"age": table["age"], "sex": table["sex"]}, found[0])
    sites = sorted(set(table["site"]))
    shown = {"left": psi[..., 0], "right": psi[..., 1], "both": psi.flatten(1)}[inputs]
    columns = {
        "inputs": shown,
        "age": known[:, 0].float(),
        "psi": psi,
        "sex": known[:, 1].long(),
        "site": torch.tensor([sites.index(s) for s in table["site"]]),
    }
    parts = [Columns({name: values[rows] for name, values in columns.items()}) for rows in (train, held)]
    sizes = {"features": shown.shape[1], "regions": len(regions), "measures": 2}
    return Data(parts[0], parts[1] if split else None, batch, sizes, "cortical_thickness")
