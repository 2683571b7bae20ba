from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.example import Example

from lamina.data import VolumeFiles, load, phantoms, read_volume, standardized, volumes
from lamina.errors import LaminaError, MissingExtra, ShapeError

EXAMPLES = [
    Example(
        "data", "volumes", {"batch": 2, "subjects": 8, "size": 16, "views": 2, "augment": ["crop"]}, bad={"views": 0}
    )
]
TABLE = "file,age,site,diagnosis,insula.thickness,insula.area,cuneus.thickness,cuneus.area\n"


def scan(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def write(folder: Path, name: str, values: np.ndarray) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / name)


def study(folder: Path) -> Path:
    for i in range(4):
        write(folder, f"s{i}.nii.gz", scan(6, 5, 7) + i)
    rows = ["s0.nii.gz,30,Turin,1,1,10,2,20", "s1.nii.gz,,Paris,0,2,20,,40", "s2.nii.gz,50,Turin,,3,30,6,60"]
    (folder / "subjects.csv").write_text(TABLE + "\n".join([*rows, "s3.nii.gz,60,Paris,0,4,40,8,80"]) + "\n")
    return folder


def test_phantoms_come_with_what_they_were_rendered_from() -> None:
    data = volumes(subjects=10, size=16, split=0.3, batch=2, seed=4)
    made = phantoms(10, 16, seed=4)
    order = torch.cat([data.train.rows, data.evaluation.rows])
    assert sorted(order.tolist()) == list(range(10))
    parts = [p.batch(torch.arange(len(p))) for p in (data.train, data.evaluation)]
    for name, values in (
        ("inputs", made.volumes),
        ("age", made.age),
        ("site", made.site),
        ("diagnosis", made.diagnosis),
    ):
        assert torch.equal(torch.cat([p[name] for p in parts]), values[order])
    expected = standardized(made.measures, data.train.rows)[order]
    torch.testing.assert_close(torch.cat([p["psi"] for p in parts]), expected)
    assert data.sizes == {"in_channels": 1, "image": 16, "regions": 12, "measures": 3}


def test_views_are_of_evaluation_too_and_a_target_is_there_as_labels() -> None:
    data = load("volumes", subjects=10, size=16, batch=2, views=2, augment=["crop", "cutout"], target="diagnosis")
    batch = data.train.batch(torch.arange(2))
    assert batch["inputs"].shape == (2, 2, 1, 16, 16, 16)
    assert torch.equal(batch["labels"], batch["diagnosis"])
    assert data.evaluation.batch(torch.arange(1))["inputs"].shape == (1, 2, 1, 16, 16, 16)
    single = load("volumes", subjects=10, size=16, batch=2, augment=["crop"])
    assert single.evaluation.batch(torch.arange(1))["inputs"].shape == (1, 1, 16, 16, 16)
    assert load("volumes", subjects=10, size=16, batch=2, views=2, split=0.0).evaluation is None


def test_a_folder_with_a_table(tmp_path: Path) -> None:
    data = volumes(study(tmp_path), batch=2, size=None, split=0.0)
    batch = data.train.batch(torch.tensor([0, 1, 2, 3]))
    assert batch["inputs"].shape == (4, 1, 6, 5, 7)
    torch.testing.assert_close(batch["inputs"][2, 0], torch.from_numpy(scan(6, 5, 7) + 2))
    assert batch["age"].isnan().tolist() == [False, True, False, False]
    assert batch["site"].tolist() == [1, 0, 1, 0]
    assert batch["diagnosis"].tolist() == [1, 0, -1, 0]
    assert batch["psi"].shape == (4, 2, 2)
    assert batch["psi"].isnan().nonzero().tolist() == [[1, 1, 0]]
    # Insula: 1 to 4. Cuneus' thickness: 2, 6 and 8.
    torch.testing.assert_close(batch["psi"][0, 0, 0], torch.tensor(-1.5 / 1.25**0.5))
    cuneus = torch.tensor([2.0, 6, 8])
    torch.testing.assert_close(batch["psi"][[0, 2, 3], 1, 0], (cuneus - cuneus.mean()) / cuneus.std(correction=0))
    assert data.sizes == {"in_channels": 1, "image": (6, 5, 7), "regions": 2, "measures": 2}


def test_a_folder_without_one_is_its_volumes(tmp_path: Path) -> None:
    for name in ("b.nii", "a.nii.gz"):
        write(tmp_path, name, scan(6, 6, 6))
    data = volumes(tmp_path, batch=1, size=4, split=0.0)
    assert [p.name for p in data.train.whole.paths] == ["a.nii.gz", "b.nii"]
    assert set(data.train.batch(torch.arange(2))) == {"inputs"}
    assert data.sizes == {"in_channels": 1, "image": 4}


def test_resampling_keeps_a_slope_and_the_mean(tmp_path: Path) -> None:
    slope = np.broadcast_to(np.arange(24, dtype=np.float32)[:, None, None], (24, 9, 13)).copy()
    write(tmp_path, "slope.nii", slope)
    found = read_volume(tmp_path / "slope.nii", 8)
    assert found.shape == (8, 8, 8)
    torch.testing.assert_close(found[:, 3, 3], torch.arange(8) * 3.0 + 1)
    write(tmp_path, "noise.nii", scan(32, 32, 32))
    smaller = read_volume(tmp_path / "noise.nii", 8)
    torch.testing.assert_close(smaller.mean(), torch.from_numpy(scan(32, 32, 32)).mean())
    assert smaller.std() < 0.06, "voxels between the samples count"


def test_whole_numbers_with_a_scale_and_a_fourth_dimension_of_one(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2, 1), np.eye(4))
    image.header.set_slope_inter(0.5, 1.0)
    nibabel.save(image, tmp_path / "a.nii")
    found = read_volume(tmp_path / "a.nii")
    assert found.dtype == torch.float32
    assert found.shape == (2, 2, 2)
    torch.testing.assert_close(found, torch.from_numpy(nibabel.load(tmp_path / "a.nii").get_fdata()[..., 0]).float())


def test_real_scans_and_templates() -> None:
    root = os.environ.get("LAMINA_DATA")
    if not root or not (Path(root) / "brain" / "someones_anatomy.nii.gz").is_file():
        pytest.skip("LAMINA_DATA names no folder with brain/someones_anatomy.nii.gz")
    pytest.importorskip("nibabel")
    assert read_volume(Path(root, "brain/someones_anatomy.nii.gz")).shape == (57, 67, 56)
    small = VolumeFiles([Path(root, "brain", f"{n}.nii.gz") for n in ("someones_anatomy", "mni152_gm")], 32)
    batch = small.batch(torch.tensor([0, 1]))["inputs"]
    assert batch.shape == (2, 1, 32, 32, 32)
    assert torch.isfinite(batch).all()
    assert batch.flatten(1).std(1).min() > 0
    with pytest.raises(ShapeError, match=r"is \(128, 96, 24, 2\): a volume has three dimensions"):
        read_volume(Path(root, "brain/example4d.nii.gz"))


def test_standardising_leaves_out_what_is_missing() -> None:
    values = torch.tensor([[1.0, 5], [3.0, 5], [torch.nan, 5], [9.0, 5]])
    found = standardized(values, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found[:, 0], torch.tensor([-1.0, 1.0, torch.nan, 7.0]), equal_nan=True)
    assert torch.equal(found[:, 1], torch.zeros(4))


def test_without_nibabel_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.nii").write_bytes(b"")
    real = importlib.import_module

    def without(name: str) -> Any:
        if name.startswith("nibabel"):
            raise ImportError(name, name="nibabel")
        return real(name)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(MissingExtra, match=r"lamina\[volumes\]"):
        volumes(tmp_path, batch=1)


def test_bad_input_is_met_with_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("nibabel")

    def refused(sentence: str, kind: type[Exception] = LaminaError, **options: Any) -> None:
        with pytest.raises(kind, match=sentence):
            volumes(**({"batch": 1, "source": tmp_path, "size": None, "split": 0.0} | options))

    refused("has neither subjects.csv nor a file that ends in .nii or .nii.gz")
    refused("the folder of volumes .* does not exist", source=tmp_path / "nowhere")
    refused("16 voxels a side, .*0", source="phantoms", subjects=4, size=0)
    refused("views must be at least 1, got 0", source="phantoms", subjects=4, size=16, views=0)
    study(tmp_path)
    write(tmp_path, "s1.nii.gz", scan(4, 4, 4))
    odd = volumes(tmp_path, batch=1, size=None, split=0.0)
    with pytest.raises(ShapeError, match=r"volumes of one batch must be of one size, .*: give one, as size=64"):
        odd.train.batch(torch.tensor([0, 1]))
    (tmp_path / "s0.nii.gz").write_bytes(b"no scan")
    refused(r"s0\.nii\.gz' cannot be read as a volume")
    write(tmp_path, "s0.nii.gz", scan(4, 4, 4, 2))
    refused(r"is \(4, 4, 4, 2\): a volume has three dimensions", ShapeError)
    table = tmp_path / "subjects.csv"
    table.write_text("file,iq\ns1.nii.gz,100\n")
    refused(r"are measurements, called region\.measure, .* odd ones out: \['\.iq', 'iq'\]")
    table.write_text("file,age\ns1.nii.gz,old\n")
    refused("the column 'age' of .* is not numeric")
    table.write_text("name,age\ns1.nii.gz,3\n")
    refused("needs a column 'file', it has")
    table.write_text("file,age\ns9.nii.gz,3\n")
    refused("the volume .*s9.nii.gz' does not exist")
    table.write_text("file,age\ns1.nii.gz,3\n")
    refused("target is 'site', and of the subjects is known: age", target="site")
