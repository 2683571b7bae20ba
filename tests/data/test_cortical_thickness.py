from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.example import Example

from lamina.data import cortical_thickness
from lamina.data.cortical_thickness import FILE
from lamina.errors import LaminaError

COLUMNS = ["sub_id", "age", "sex", *(f"{s}_{r}_thickness" for s in ("lh", "rh") for r in ("insula", "cuneus", "MeanThickness")), "site"]  # fmt: skip  # noqa: E501
ROWS = [
    [f"s{i}", 20 + i, i % 2, *(i * (k + 1) if k < 3 else i * i + k for k in range(6)), "ab"[i // 3]] for i in range(5)
]
CSV = "\n".join(",".join(map(str, row)) for row in [COLUMNS, *ROWS]) + "\n"


def write(folder: Path) -> str:
    import gzip

    (folder / "brain").mkdir()
    (folder / FILE).write_bytes(gzip.compress(CSV.encode()))
    return str(folder)


def _packed() -> bytes:
    import gzip

    return gzip.compress(CSV.encode())


EXAMPLES = [
    Example(
        "data",
        "cortical_thickness",
        {"batch": 2, "folder": "{folder}"},
        files={FILE: _packed()},
        bad={"inputs": "middle"},
    )
]


def test_regions_by_hemisphere_without_their_mean(tmp_path: Path) -> None:
    data = cortical_thickness(2, split=0.0, folder=write(tmp_path))
    batch = data.train.batch(torch.arange(5))
    assert batch["psi"].shape == (5, 2, 2)
    line = (torch.arange(5.0) - 2) / 2**0.5
    square = torch.arange(5.0) ** 2
    square = (square - square.mean()) / square.std(correction=0)
    torch.testing.assert_close(batch["psi"], torch.stack([line, square], dim=1)[:, None].expand(5, 2, 2))
    assert batch["age"].tolist() == [20, 21, 22, 23, 24]
    assert batch["sex"].tolist() == [0, 1, 0, 1, 0]
    assert batch["site"].tolist() == [0, 0, 0, 1, 1]
    assert data.sizes == {"features": 4, "regions": 2, "measures": 2}


@pytest.mark.parametrize(("inputs", "width"), [("left", 2), ("right", 2), ("both", 4)])
def test_what_the_model_sees(tmp_path: Path, inputs: Any, width: int) -> None:
    data = cortical_thickness(2, inputs=inputs, split=0.4, folder=write(tmp_path))
    batch = data.evaluation.batch(torch.arange(2))
    expected = {"left": batch["psi"][..., 0], "right": batch["psi"][..., 1], "both": batch["psi"].flatten(1)}[inputs]
    assert torch.equal(batch["inputs"], expected)
    assert batch["inputs"].shape == (2, width)


def test_the_real_table() -> None:
    root = os.environ.get("LAMINA_DATA")
    if not root or not (Path(root) / FILE).is_file():
        pytest.skip(f"LAMINA_DATA names no folder with {FILE}")
    data = cortical_thickness()
    assert len(data.train) + len(data.evaluation) == 1078
    batch = data.train.batch(torch.arange(len(data.train)))
    assert batch["psi"].shape[1:] == (74, 2)
    assert all(v.isfinite().all() for v in batch.values())
    assert torch.corrcoef(torch.stack([batch["psi"].mean((1, 2)), batch["age"]]))[0, 1] < -0.3, "age thins"
    assert len(batch["site"].unique()) > 15


def test_it_is_not_at_hand(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match="'cortical_thickness' is not at hand"):
        cortical_thickness(folder=str(tmp_path))
