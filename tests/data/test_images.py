from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.contract.example import Example

from lamina import data
from lamina.data._arrays import idx, is_idx, npy, npz
from lamina.errors import LaminaError, ShapeError


def _npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _idx(array: np.ndarray, code: int = 8) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


PIXELS = np.arange(20 * 4 * 4, dtype=np.uint8).reshape(20, 4, 4)
LABELS = np.arange(20, dtype=np.uint8) % 3

EXAMPLES = [
    Example(
        "data",
        "images",
        options={"source": "{folder}/a.npz", "batch": 4, "split": 0.2},
        files={"a.npz": _npz(images=PIXELS, labels=LABELS)},
        bad={"split": -0.1},
    ),
    Example(
        "data",
        "elastically_deformed",
        options={
            "data": {"name": "images", "source": "{folder}/a.npz", "batch": 4, "split": 0.2},
            "alpha": 2.0,
            "sigma": 1.0,
        },
        files={"a.npz": _npz(images=PIXELS, labels=LABELS)},
        bad={"sigma": 0.0},
    ),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))


def test_bytes_are_scaled_and_normalised_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(_npz(images=np.array([[[0, 255]]], dtype=np.uint8), labels=np.array([0])))
    found = data.load("images", source=str(tmp_path / "a.npz"), batch=1, split=0.0, mean=0.2, std=0.4)
    batch = found.train.batch(torch.tensor([0]))
    assert batch["pixel_values"].tolist() == [[[[pytest.approx(-0.5), pytest.approx(2.0)]]]]
    assert batch["labels"].tolist() == [0]
    assert found.evaluation is None


@pytest.mark.parametrize("kind", ["npz", "npy", "idx", "idx.gz"])
def test_every_container_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    pixels, labels = tmp_path / f"a-idx3-ubyte.{kind}", tmp_path / f"b-idx1-ubyte.{kind}"
    given: dict[str, object] = {"labels": labels}
    if kind == "npz":
        pixels.write_bytes(_npz(images=PIXELS, labels=LABELS))
        given = {}
    elif kind == "npy":
        np.save(pixels, PIXELS)
        np.save(labels, LABELS)
    else:
        pack = gzip.compress if kind.endswith("gz") else bytes
        pixels.write_bytes(pack(_idx(PIXELS)))
        labels.write_bytes(pack(_idx(LABELS)))
    found = data.images(pixels, 2, split=0.25, mean=0.0, std=1.0, **given)
    parts = [p.batch(torch.arange(len(p))) for p in (found.train, found.evaluation)]
    assert [len(p["labels"]) for p in parts] == [15, 5]
    values = torch.cat([p["pixel_values"] for p in parts])[:, 0] * 255
    rows = values[:, 0, 0].round().long() // 16 % 16 + torch.where(values[:, 0, 0] < 0, 1, 0)
    for row, image, label in zip(rows, values, torch.cat([p["labels"] for p in parts]), strict=True):
        # Image i starts with byte 16 i (mod 256), so only i and i + 16 look alike.
        assert torch.equal(image.round().byte(), torch.from_numpy(PIXELS[int(row)]))
        assert label.item() in {int(LABELS[i]) for i in (int(row), int(row) + 16) if i < 20}
    assert found.sizes == {"classes": 3, "channels": 1, "image": 4}
    if kind in ("npy", "idx"):
        base = found.train.pixels
        while not isinstance(base, np.memmap):
            base = base.base
        assert base.filename == pixels


def test_no_row_is_in_both_parts(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(_npz(images=PIXELS, labels=np.arange(20)))
    found = data.images(tmp_path / "a.npz", 2, split=0.3, seed=4)
    train, held = (p.batch(torch.arange(len(p)))["labels"].tolist() for p in (found.train, found.evaluation))
    assert sorted(train + held) == list(range(20))
    assert len(held) == 6


def test_colour_axes(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    last = data.Images(colour, np.zeros(5), mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    first = data.Images(
        colour.transpose(0, 3, 1, 2), np.zeros(5), mean=[0.1, 0.2, 0.3], std=[1, 2, 3], channels_last=False
    )
    rows = torch.tensor([3, 1])
    a, b = last.batch(rows)["pixel_values"], first.batch(rows)["pixel_values"]
    assert torch.equal(a, b)
    assert a[0, 2, 1, 5].item() == pytest.approx((colour[3, 1, 5, 2] / 255 - 0.3) / 3, abs=1e-6)
    assert last.sizes == first.sizes == {"classes": 1, "channels": 3, "image": (4, 6)}
    with pytest.raises(ShapeError, match="2 values for 3 channels"):
        data.Images(colour, np.zeros(5), mean=[0.1, 0.2])


def test_float_pixels_are_not_scaled() -> None:
    found = data.Images(np.full((1, 2, 2), 3.0), np.zeros(1), mean=1.0, std=2.0)
    assert found.batch(torch.tensor([0]))["pixel_values"].unique().tolist() == [1.0]


def _pictures(root: Path, side: int = 8) -> None:
    for number, (name, colour) in enumerate({"cat": (255, 0, 0), "ant": (0, 0, 255)}.items()):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (side, side), colour).save(root / name / f"{i}{number}.png")


def test_a_folder_has_a_class_a_sub_folder(tmp_path: Path) -> None:
    _pictures(tmp_path / "pets")
    found = data.images(tmp_path / "pets", 2, split=0.0, mean=0.0, std=1.0)
    batch = found.train.batch(torch.arange(6))
    assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["pixel_values"][0, :, 0, 0].tolist() == [0, 0, 1]
    assert batch["pixel_values"][5, :, 7, 7].tolist() == [1, 0, 0]
    assert isinstance(found.train.pixels, np.memmap)
    grey = data.images(tmp_path / "pets", 2, split=0.0, channels=1, size=4)
    assert grey.sizes == {"classes": 2, "channels": 1, "image": 4}
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 2


def test_mistakes_in_a_folder_are_named(tmp_path: Path) -> None:
    _pictures(tmp_path / "pets")
    Image.new("RGB", (9, 8)).save(tmp_path / "pets" / "cat" / "z.png")
    with pytest.raises(LaminaError, match=r"z.png' is \(8, 9, 3\) but .*size=64"):
        data.images(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "z.png").write_bytes(b"no image")
    with pytest.raises(LaminaError, match=r"z.png' cannot be read as an image"):
        data.images(tmp_path / "pets")
    (tmp_path / "pets" / "dog").mkdir()
    with pytest.raises(LaminaError, match="class 'dog' of it has none"):
        data.images(tmp_path / "pets")
    with pytest.raises(LaminaError, match="no sub-folder"):
        data.images(tmp_path / "pets" / "cat")


def test_idx_types_and_damage(tmp_path: Path) -> None:
    numbers = np.array([[1.5, -2.0]], dtype=">f8")
    path = tmp_path / "a.idx"
    path.write_bytes(_idx(numbers, 0x0E))
    assert np.array_equal(idx(path), numbers)
    path.write_bytes(_idx(numbers, 0x0E)[:-1])
    with pytest.raises(LaminaError, match="27 bytes, but its header promises 28"):
        idx(path)
    for bad in (b"\x01\x00\x08\x01", b"\x00\x00\x07\x01\0\0\0\0", b"", b"\x00\x00\x08\x03\0\0"):
        path.write_bytes(bad)
        with pytest.raises(LaminaError, match=r"not an idx file|header (alone )?promises"):
            idx(path)
    names = ["t10k-images-idx3-ubyte.gz", "train-labels.idx1-ubyte", "a.idx", "a.npy", "a.npz", "index.png"]
    assert [is_idx(n) for n in names] == [True, True, True, False, False, False]


def test_pickles_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    objects = np.array([{"a": 1}, None], dtype=object)
    np.savez(path, images=objects, labels=LABELS, allow_pickle=True)
    with pytest.raises(LaminaError, match=r"array 'images' of .*allow_pickle=False"):
        data.images(path)
    path.write_bytes(_npz(images=PIXELS, labels=LABELS)[:200])
    with pytest.raises(LaminaError, match="cannot be read"):
        data.images(path)
    path.write_bytes(_npz(image=PIXELS, labels=LABELS))
    with pytest.raises(LaminaError, match=r"no array 'images', only .*did you mean 'image'"):
        data.images(path)
    np.save(tmp_path / "o.npy", objects, allow_pickle=True)
    with pytest.raises(LaminaError, match=r"cannot be read as a .npy"):
        npy(tmp_path / "o.npy")
    np.save(tmp_path / "p.npy", PIXELS)
    (tmp_path / "q.npy").write_bytes((tmp_path / "p.npy").read_bytes()[:-1])
    with pytest.raises(LaminaError, match=r"cannot be read as a .npy"):
        npy(tmp_path / "q.npy")
    with pytest.raises(LaminaError, match="one array"):
        npz(tmp_path / "p.npy", ["a"])


def test_pixels_and_labels_must_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", PIXELS)
    np.save(tmp_path / "l.npy", LABELS[:7])
    with pytest.raises(ShapeError, match=r"\(20, 4, 4\) \(7,\)"):
        data.images(tmp_path / "p.npy", labels=tmp_path / "l.npy")
    with pytest.raises(LaminaError, match="holds pixels only"):
        data.images(tmp_path / "p.npy")
    with pytest.raises(LaminaError, match="whole numbers from 0"):
        data.Images(PIXELS, LABELS - 0.5)
    with pytest.raises(LaminaError, match=r"bytes .uint8. or floats, got int64"):
        data.Images(PIXELS.astype(np.int64), LABELS)
    with pytest.raises(LaminaError, match="std must be above 0"):
        data.Images(PIXELS, LABELS, std=0.0)


def test_big_endian_floats_of_an_idx_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.idx3").write_bytes(_idx(PIXELS.astype(">f4"), 0x0D))
    (tmp_path / "l.idx1").write_bytes(_idx(LABELS))
    found = data.images(tmp_path / "p.idx3", 4, labels=tmp_path / "l.idx1", mean=0.0, std=1.0, split=0)
    batch = found.train.batch(torch.tensor([3]))
    assert torch.equal(batch["pixel_values"][0, 0], torch.from_numpy(PIXELS[3].astype(np.float32)))


def test_grey_images_of_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name, values in (("a", [[0, 256], [32768, 65535]]), ("b", [[65535, 0], [0, 0]])):
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.array(values, dtype=np.uint16)).save(folder / name / "x.png")
    for channels in (1, 3):
        found = data.images(folder, 2, channels=channels, mean=0.0, std=1.0, split=0)
        pixels = found.train.batch(torch.tensor([0]))["pixel_values"] * 255
        assert pixels.round().flatten(1)[0, :4].tolist() == [0, 1, 128, 255]
    Image.fromarray(np.zeros((2, 2), dtype=np.int32)).save(folder / "a" / "y.tif")
    with pytest.raises(LaminaError, match=r"y\.tif' has pixels of 32 bits without a known range"):
        data.images(folder, 2, split=0)
    with pytest.raises(LaminaError, match="size must be at least 1, got 0"):
        data.images(folder, 2, size=0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (7, 63), (1, 5)])
@pytest.mark.parametrize(("alpha", "sigma"), [(20.0, 4.0), (3.0, 0.7)])
def test_elastic_deformation_is_scipy_s(height: int, width: int, alpha: float, sigma: float) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    images = drawn(3, 2, height, width)
    found = data.elastic_deformation(images, alpha, sigma, torch.Generator().manual_seed(5))
    noise = drawn(3, 2, height, width, seed=5) * 2 - 1
    rows, columns = np.mgrid[:height, :width]
    for i in range(3):
        dx, dy = (alpha * ndimage.gaussian_filter(n.double().numpy(), sigma, mode="constant") for n in noise[i])
        for c in range(2):
            expected = ndimage.map_coordinates(images[i, c].double().numpy(), [rows + dy, columns + dx], order=1)
            # On the border itself rounding decides whether a point is inside.
            edge = np.minimum.reduce([abs(rows + dy), abs(rows + dy - height + 1), abs(columns + dx), abs(columns + dx - width + 1)])  # fmt: skip  # noqa: E501
            apart = abs(found[i, c].numpy() - expected)
            assert apart[edge > 1e-4].max(initial=0.0) < 1e-4


def test_without_displacement_images_stay_and_channels_move_together() -> None:
    images = drawn(2, 1, 6, 5)
    torch.testing.assert_close(data.elastic_deformation(images, 0.0), images)
    three = data.elastic_deformation(images.expand(2, 3, 6, 5), 2.0, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(three[:, 0], three[:, 2])
    assert not torch.allclose(three[:, :1], images, atol=1e-2)
    assert data.elastic_deformation(images.bfloat16(), 2.0, 1.0).dtype == torch.bfloat16


def test_a_batch_is_deformed_anew_and_resuming_gives_the_same() -> None:
    plain = data.digits(batch=16)
    found = data.elastically_deformed(plain, 3.0, 1.0)
    rows = torch.arange(16)
    first, again, other = (found.train.batch(r)["pixel_values"] for r in (rows, rows, rows.flip(0)))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other.flip(0), atol=1e-2)
    assert not torch.allclose(first, plain.train.batch(rows)["pixel_values"], atol=1e-2)
    assert not torch.equal(first, data.elastically_deformed(plain, 3.0, 1.0, seed=1).train.batch(rows)["pixel_values"])
    assert found.evaluation is plain.evaluation
    assert len(found.train) == len(plain.train)
    assert found.sizes == plain.sizes


def test_what_cannot_be_deformed_is_refused() -> None:
    for alpha, sigma in ((-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(LaminaError, match="alpha must be at least 0 and sigma above 0"):
            data.elastic_deformation(drawn(1, 1, 2, 2), alpha, sigma)
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\), got torch.float32 \(2, 2\)"):
        data.elastic_deformation(drawn(2, 2))
    series = data.elastically_deformed(data.from_arrays(np.ones((8, 2)), np.arange(8) % 2, 4, task="classification"))
    with pytest.raises(ShapeError, match="needs images, 'pixel_values'"):
        series.train.batch(torch.tensor([0]))
