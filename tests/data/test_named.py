from __future__ import annotations

import gzip
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.contract.example import Example

from lamina import data
from lamina.errors import LaminaError


def _idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes())


def _npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 255)).save(file, "PNG")
    return file.getvalue()


def _jpegs(shades: list[int]) -> bytes:
    files = [_picture(s) for s in shades]
    joined = np.frombuffer(b"".join(files), dtype=np.uint8)
    labels = np.arange(len(files), dtype=np.uint8) % 2
    return _npz(data=joined, offsets=np.cumsum([0] + [len(f) for f in files]), labels=labels)


PIXELS, LABELS = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4), np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)
HOURS = "date,a,OT\n" + "".join(f"h{i},{i},{-i}\n" for i in range(20 * 720))
FILES = {
    **{f"mnist/{p}-images-idx3-ubyte.gz": _idx(PIXELS) for p in ("train", "t10k")},
    **{f"mnist/{p}-labels-idx1-ubyte.gz": _idx(LABELS) for p in ("train", "t10k")},
    "cifar10/train_jpeg_20k.npz": _jpegs([0, 255, 9, 8]),
    "cifar10/test_jpeg_3k.npz": _jpegs([1, 2]),
    "text/tinyshakespeare.txt": b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 4,
    "text/wikitext-2-test.txt.gz": gzip.compress(b" = Robert <unk> = \n" * 9),
    "text/wikitext-2-valid.txt.gz": gzip.compress(b" = Homarus gammarus = \n" * 9),
    "glue/SST-2/train.tsv.gz": gzip.compress(b'sentence\tlabel\na "fine film\t1\ndull\t0\nNA\t0\n'),
    "glue/SST-2/dev.tsv.gz": gzip.compress(b"sentence\tlabel\nfine\t1\n"),
    "glue/STS-B/dev.tsv.gz": gzip.compress(b"sentence1\tsentence2\tscore\na\tb\t2.5\n"),
    "textclass/ag_news_train10k.tsv.gz": gzip.compress(b"label\ttext\n4\tchips\n1\tpeace\n"),
    "textclass/ag_news_test.csv.gz": gzip.compress(b'"4","title","more, chips"\n'),
    "timeseries/ETTh1.csv.gz": gzip.compress(HOURS.encode()),
    "uci/concrete.npz": _npz(
        X=np.random.default_rng(0).random((20, 3)), y=np.arange(20.0), test_idx=np.array([[3, 7]])
    ),
}

_HERE = {"folder": "{folder}"}
EXAMPLES = [
    Example("data", "mnist", options={"batch": 2, **_HERE}, files=FILES, bad={"limit": 0}),
    Example("data", "cifar10", options={"batch": 2, **_HERE}, files=FILES, bad={"limit": 0}),
    Example("data", "digits", options={"batch": 8}, bad={"split": 1.0}),
    Example("data", "tiny_shakespeare", options={"context": 8, "batch": 2, **_HERE}, files=FILES, bad={"context": 0}),
    Example(
        "data",
        "wikitext",
        options={"context": 8, "batch": 2, "train": "test", **_HERE},
        files=FILES,
        bad={"train": "train"},
    ),
    Example("data", "sst2", options={"context": 8, "batch": 2, **_HERE}, files=FILES, bad={"batch": 9}),
    Example("data", "ag_news", options={"context": 8, "batch": 2, **_HERE}, files=FILES, bad={"batch": 9}),
    Example("data", "etth1", options={"context": 8, "horizon": 4, **_HERE}, files=FILES, bad={"horizon": 0}),
    Example("data", "uci", options={"batch": 4, **_HERE}, files=FILES, bad={"fold": 1}),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    for name, content in FILES.items():
        (tmp_path / "sets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sets" / name).write_bytes(content)
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "sets"))
    return tmp_path / "sets"


def test_sets_of_images(folder: Path) -> None:
    found = data.load("mnist", batch=2, limit=3)
    assert (len(found.train), len(found.evaluation)) == (3, 6)
    batch = found.evaluation.batch(torch.tensor([5]))
    assert batch["pixel_values"][0, 0, 3, 3].item() == pytest.approx((95 / 255 - 0.1307) / 0.3081)
    assert batch["labels"].tolist() == [2]
    found = data.cifar10(2)
    red = found.train.batch(torch.arange(4))["pixel_values"][:, 0, 0, 0] * 0.2470 + 0.4914
    torch.testing.assert_close(red * 255, torch.tensor([0.0, 255, 9, 8]), atol=1e-3, rtol=0)
    assert isinstance(found.train.pixels, np.memmap)


def test_damaged_offsets_are_refused(folder: Path) -> None:
    damaged = _npz(data=np.zeros(9, np.uint8), offsets=np.array([0, 8]), labels=np.zeros(1))
    (folder / "cifar10/test_jpeg_3k.npz").write_bytes(damaged)
    with pytest.raises(LaminaError, match=r"offsets of .*test_jpeg_3k.npz' do not cover its 9 bytes"):
        data.cifar10(2)


def test_sets_of_text(folder: Path) -> None:
    found = data.tiny_shakespeare(8, 2)
    written = FILES["text/tinyshakespeare.txt"].decode()
    letters = sorted(set(written))
    assert found.sizes["vocabulary"] == len(letters)
    assert "".join(letters[i] for i in found.train.tokens) == written[: len(found.train.tokens)]
    found = data.wikitext(8, 2, train="test")
    assert bytes(found.train.tokens).startswith(b" = Robert")
    assert bytes(found.evaluation.tokens).startswith(b" = Homarus")
    found = data.sst2(16, 2)
    assert bytes(found.train.batch(torch.tensor([0]))["input_ids"][0].tolist()) == b'a "fine film\0\0\0\0'
    assert found.train.batch(torch.arange(3))["labels"].tolist() == [1, 0, 0]
    found = data.ag_news(11, 2)
    assert found.train.batch(torch.arange(2))["labels"].tolist() == [1, 0]
    assert bytes(found.evaluation.batch(torch.tensor([0]))["input_ids"][0].tolist()) == b"more, chips"
    assert data.sts_b("dev").scores.tolist() == [2.5]


def test_months_of_training_then_valid_then_test(folder: Path) -> None:
    month = 720
    for part, first in (("valid", 12 * month), ("test", 16 * month)):
        found = data.etth1(8, 4, evaluation=part)
        assert len(found.train) == 12 * month - 12 + 1
        assert len(found.evaluation) == 4 * month - 4 + 1
        hours = np.arange(12 * month)
        label = found.evaluation.batch(torch.tensor([0]))["labels"][0, 0]
        assert label[0].item() == pytest.approx((first - hours.mean()) / hours.std(), rel=1e-5)
        assert label[1].item() == pytest.approx(-label[0].item(), rel=1e-5)


def test_uci_holds_out_the_fold(folder: Path) -> None:
    assert data.uci(batch=4).evaluation.batch(torch.arange(2))["labels"].tolist() == [3, 7]
    with pytest.raises(LaminaError, match=r"folds 0..0, got 1"):
        data.uci(fold=1)


def test_digits_are_the_library_s() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    found = data.digits()
    assert (len(found.train), len(found.evaluation)) == (1438, 359)
    row = int(found.train.rows[0])
    expected = torch.from_numpy(sklearn.load_digits().images[row] / 16).float()
    assert torch.equal(found.train.batch(torch.tensor([0]))["pixel_values"][0, 0], expected)


class _Hub:
    """What datasets.load_dataset gives, by path and configuration."""

    def __init__(self) -> None:
        image, grey = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("L", (4, 4), 255)
        split = {"image": [grey] * 3, "img": [image] * 3, "label": [0, 1, 2], "text": ["a", "b", "c"]}
        split |= {"sentence": ["x", "y", "z"], "sentence1": ["a"] * 3, "sentence2": ["b"] * 3}
        self.sets = dict.fromkeys(("train", "validation", "test"), split)
        self.asked: list[tuple[str, str | None]] = []

    def load_dataset(self, path: str, config: str | None = None) -> dict[str, dict[str, list[object]]]:
        self.asked.append((path, config))
        return self.sets


def test_the_hub_is_asked_where_no_folder_has_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMINA_DATA", raising=False)
    hub = _Hub()
    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", hub.load_dataset)
    batch = data.mnist(2).train.batch(torch.tensor([1]))
    assert batch["pixel_values"].unique().item() == pytest.approx((1 - 0.1307) / 0.3081)
    assert batch["labels"].tolist() == [1]
    assert data.cifar10(2).sizes == {"classes": 3, "channels": 3, "image": 4}
    assert data.sst2(4, 2).evaluation.batch(torch.arange(3))["labels"].tolist() == [0, 1, 2]
    assert len(data.ag_news(4, 2).train) == 3
    assert bytes(data.wikitext(1, 1).train.tokens) == b"abc"
    assert data.sts_b("train").scores.tolist() == [0, 1, 2]
    glue = [("nyu-mll/glue", "sst2"), ("fancyzhx/ag_news", None), ("Salesforce/wikitext", "wikitext-2-v1")]
    assert hub.asked == [("ylecun/mnist", None), ("uoft-cs/cifar10", None), *glue, ("nyu-mll/glue", "stsb")]


def test_both_ways_are_named_where_neither_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMINA_DATA", raising=False)

    def offline(path: str, config: str | None = None) -> None:
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", offline)
    with pytest.raises(LaminaError, match=r"let LAMINA_DATA name a folder with mnist/train.*no route to the hub\)$"):
        data.mnist()
    with pytest.raises(LaminaError, match=r"LAMINA_DATA names no folder; it should hold text/tiny"):
        data.tiny_shakespeare()
    with pytest.raises(LaminaError, match="has not all of mnist/train"):
        data.mnist(folder=str(tmp_path))
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "set"))
    (tmp_path / "sets").mkdir()
    with pytest.raises(LaminaError, match=r"no 'set' in .*did you mean 'sets'"):
        data.mnist()


def _real(file: str) -> None:
    root = os.environ.get("LAMINA_DATA")
    if not root or not Path(root, file).is_file():
        pytest.skip(f"LAMINA_DATA names no folder with {file}")


def test_real_mnist() -> None:
    _real("mnist/train-images-idx3-ubyte.gz")
    found = data.mnist()
    assert (len(found.train), len(found.evaluation)) == (60_000, 10_000)
    assert found.train.batch(torch.arange(5))["labels"].tolist() == [5, 0, 4, 1, 9]
    assert found.evaluation.batch(torch.arange(5))["labels"].tolist() == [7, 2, 1, 0, 4]
    assert found.train.pixels.mean() / 255 == pytest.approx(0.1307, abs=5e-5)


def test_real_text_and_series() -> None:
    _real("text/tinyshakespeare.txt")
    found = data.tiny_shakespeare()
    assert found.sizes["vocabulary"] == 65
    assert len(found.train.tokens) + len(found.evaluation.tokens) == 1_115_394
    _real("timeseries/ETTh1.csv.gz")
    found = data.etth1(evaluation="test")
    assert (len(found.train), len(found.evaluation)) == (8449, 2785)


def test_real_pairs() -> None:
    _real("glue/STS-B/train.tsv.gz")
    assert [len(data.sts_b(p)) for p in ("train", "dev", "test")] == [5749, 1500, 1379]
    scores = data.sts_b("dev").scores
    assert (scores.min().item(), scores.max().item()) == (0, 5)
