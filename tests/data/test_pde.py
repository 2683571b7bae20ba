from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.errors import LaminaError


def archive(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def darcy(rows: int, side: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return archive(x=rng.random((rows, side, side)) > 0.5, y=rng.random((rows, side, side), dtype=np.float32))


LINE = np.arange(8.0 * 11).reshape(8, 11)
FILES = {
    "pde/darcy_train_16.npz": darcy(6, 16, 0),
    "pde/darcy_test_16.npz": darcy(2, 16, 1),
    "pde/darcy_test_32.npz": darcy(2, 32, 2),
    "pde/KdV_reference.npz": archive(uu=LINE),
    "pde/burgers_shock_reference.npz": archive(usol=LINE),
}
EXAMPLES = [Example("data", "pde", options={"batch": 2, "folder": "{folder}"}, files=FILES, bad={"train": 0})]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path))
    return tmp_path


def test_darcy_is_evaluated_at_its_own_resolution_or_at_twice_that(folder: Path) -> None:
    for side in (None, 16, 32):
        found = data.pde("darcy", 2, evaluation=side, train=4)
        assert (len(found.train), len(found.evaluation)) == (4, 2)
        assert found.sizes == {"channels": 1, "image": 16}
        x = found.evaluation.batch(torch.arange(2))
        assert x["inputs"].shape == x["targets"].shape == (2, 1, side or 16, side or 16)
    row = found.train.batch(torch.tensor([3]))
    stored = np.load(io.BytesIO(FILES["pde/darcy_train_16.npz"]))
    assert torch.equal(row["inputs"][0, 0], torch.from_numpy(stored["x"][3]).float())
    assert torch.equal(row["targets"][0, 0], torch.from_numpy(stored["y"][3]))


def test_a_solution_over_time_gives_steps(folder: Path) -> None:
    for name in ("kdv", "burgers"):
        found = data.pde(name, 2)
        # 11 times are 10 steps, of which the last 2 are held out.
        assert (len(found.train), len(found.evaluation)) == (8, 2)
        for part, start in ((found.train, 0), (found.evaluation, 8)):
            step = part.batch(torch.tensor([0]))
            assert torch.equal(step["inputs"][0, 0].double(), torch.from_numpy(LINE[:, start]))
            assert torch.equal(step["targets"][0, 0].double(), torch.from_numpy(LINE[:, start + 1]))
        assert found.sizes == {"channels": 1, "image": (8,)}


def test_what_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaminaError, match=r"'pde' is not at hand.*pde/AC_reference\.npz"):
        data.pde("allen_cahn")
    with pytest.raises(LaminaError, match="evaluation is a resolution of 'darcy'"):
        data.pde("kdv", 2, evaluation=32)
    monkeypatch.delenv("LAMINA_DATA")
    with pytest.raises(LaminaError, match=r"LAMINA_DATA names no folder; it should hold pde/darcy_train_16\.npz"):
        data.pde()


def test_the_real_sets() -> None:
    if not Path(os.environ.get("LAMINA_DATA", "/nowhere"), "pde/darcy_train_16.npz").is_file():
        pytest.skip("LAMINA_DATA has no pde/darcy_train_16.npz")
    found = data.pde(evaluation=32)
    assert (len(found.train), len(found.evaluation)) == (1000, 50)
    rows = found.train.batch(torch.arange(1000))
    assert rows["inputs"].unique().tolist() == [0.0, 1.0]
    # The boundary where the pressure is 0 stands at the first index only.
    assert rows["targets"][:, :, 0].mean() < 0.01 * rows["targets"].mean()
    assert rows["targets"][:, :, -1].mean() > 0.1 * rows["targets"].mean()
    assert [len(data.pde(name).train) for name in ("burgers", "allen_cahn", "kdv")] == [80, 160, 160]
