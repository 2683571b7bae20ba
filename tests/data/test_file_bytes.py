"""Files as examples: folders, sets that are encoded, padding, orders that keep it low, draws that resume exactly."""

import os

import numpy as np
import pytest
import torch
from tests.contract.example import Example

from lamina import data
from lamina.data import ByteNoise, Columns, Data, FileBytes, Loader, encode, file_bytes
from lamina.data.file_bytes import KeptFiles
from lamina.errors import LaminaError, ShapeError

FILES = {
    f"{kind}/{i}.{end}": bytes([start + i % 7] * (20 + 9 * i % 40))
    for kind, end, start in (("cat", "png", 0), ("dog", "wav", 100))
    for i in range(8)
}
EXAMPLES = [
    Example(
        "data",
        "file_bytes",
        options={"source": "{folder}", "batch": 3, "split": 0.25, "transforms": ["byte_permutation", "byte_noise"]},
        files=FILES,
        bad={"pool": 0},
    )
]


def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def images(count=12, side=6):
    pixels = torch.randint(256, (count, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = data.Images(pixels.numpy(), (np.arange(count) % 3).astype(np.int64))
    rows = torch.arange(count)
    return pixels, Data(whole.select(rows[:8]), whole.select(rows[8:]), 4, whole.sizes, "images")


def test_a_folder_gives_every_file_once_as_it_is_with_its_class(tmp_path):
    found = file_bytes(folder(tmp_path), batch=4, split=0.25)
    assert found.sizes == {"classes": 2}
    rows = {}
    for part in (found.train, found.evaluation):
        for i in range(len(part)):
            batch = part.batch(torch.tensor([i]))
            rows[bytes(batch["inputs"][0].tolist())] = int(batch["labels"])
    assert rows == {content: int(name.startswith("dog")) for name, content in FILES.items()}
    listed = file_bytes([tmp_path / name for name in FILES], batch=4, split=0.0)
    assert len(listed.train) == 16
    assert listed.evaluation is None
    batch = listed.train.batch(torch.tensor([0, 3]))
    first, second = [FILES[n] for n in list(FILES)[0:4:3]]
    assert batch["inputs"].dtype == torch.int64
    for row, content in zip(batch["inputs"].tolist(), (first, second), strict=True):
        assert bytes(row[: len(content)]) == content
        assert set(row[len(content) :]) <= {-1}


@pytest.mark.parametrize("encoding", ["fhwc", "fchw", "tiff", "png", "jpeg"])
def test_images_become_files_of_their_very_pixels(encoding):
    pytest.importorskip("PIL")
    pixels, given = images()
    found = file_bytes(given, encoding, 4)
    assert found.sizes == {"classes": 3}
    for part, start in ((found.train, 0), (found.evaluation, 8)):
        contents = {bytes(r[r >= 0].tolist()) for r in part.batch(torch.arange(len(part)))["inputs"]}
        assert contents == {encode(p, encoding) for p in pixels[start : start + len(part)]}
    assert found.train.batch(torch.tensor([4]))["labels"].tolist() == [1]


def test_pixels_with_channels_first_are_turned_before_they_are_encoded():
    pixels = torch.randint(256, (4, 3, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = data.Images(pixels.numpy(), np.arange(4), channels_last=False)
    for encoding, expected in (("fchw", pixels), ("fhwc", pixels.movedim(1, -1))):
        found = file_bytes(Data(whole, None, 2, {}, "images"), encoding, 2).train.batch(torch.arange(4))["inputs"]
        assert torch.equal(found, expected.flatten(1).long())


def test_images_are_augmented_before_they_are_encoded_and_anew_in_every_batch():
    pixels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = Data(Columns({"pixel_values": pixels, "labels": torch.arange(6)}), None, 3, {"classes": 6}, "columns")
    moved = data.load("augmented_views", data=given, count=1, augment=["crop"])
    plain, live = file_bytes(given, "fhwc", 3), file_bytes(moved, "fhwc", 3)
    rows = torch.tensor([1, 4])
    assert not torch.equal(live.train.batch(rows)["inputs"], plain.train.batch(rows)["inputs"])
    assert live.train.batch(rows)["labels"].tolist() == [1, 4]
    assert torch.equal(live.train.batch(rows)["inputs"], live.train.batch(rows)["inputs"])


def test_sounds_become_wav_files_and_those_of_a_folder_are_stored_anew(tmp_path):
    waves = torch.sin(torch.arange(80) / torch.arange(3, 9)[:, None])
    given = Data(Columns({"inputs": waves, "labels": torch.arange(6) % 2}), None, 3, {}, "tones")
    found = file_bytes(given, "wav", 3, rate=800)
    assert found.train.batch(torch.tensor([0]))["inputs"].shape == (1, 44 + 160)
    assert found.sizes == {"classes": 2}
    for i, wave in enumerate(waves):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        (tmp_path / str(i % 2) / f"{i}.wav").write_bytes(encode(wave.numpy(), "wav", sample="int32"))
    again = file_bytes(tmp_path, "wav", 3, sample="uint8", split=0.0)
    assert again.train.batch(torch.tensor([0]))["inputs"].shape == (1, 44 + 80)


def many(count=203, pool=8, **options):
    lengths = torch.randint(4, 400, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    return FileBytes(KeptFiles([bytes(n) for n in lengths]), torch.arange(count), pool=pool, **options)


def padded_share(loader):
    batches = [next(loader)["inputs"] for _ in range(loader.batches_per_epoch)]
    return sum(int((b < 0).sum()) for b in batches) / sum(b.numel() for b in batches)


def test_batches_have_files_of_like_lengths_and_an_epoch_has_every_file_once():
    assert padded_share(Loader(many(), 8)) < padded_share(Loader(many(pool=1), 8)) / 3
    loader = Loader(many(), 8, drop_last=False)
    epochs = [[next(loader)["labels"].tolist() for _ in range(26)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(203))
    assert epochs[0] != epochs[1]
    # Batches of long files are not at the end.
    means = torch.tensor([[float(many().files.lengths[b].float().mean()) for b in e[:-1]] for e in epochs])
    assert (means[:, :12].mean() - means[:, 13:].mean()).abs() < 60
    shares = [Loader(many(), 8, rank=r, world=2) for r in range(2)]
    both = [sorted(i for s in shares for i in next(s)["labels"].tolist()) for _ in range(3)]
    assert both == [sorted(b) for b in epochs[0][:3]]


def test_evaluation_has_batches_of_like_lengths_too():
    part = many()
    sorted_, plain = part.bucketed(8), many(pool=1)
    batches = [p.batch(torch.arange(i, i + 8))["inputs"] for p in (sorted_, plain) for i in range(0, 200, 8)]
    assert sum(b.numel() for b in batches[:25]) < 0.75 * sum(b.numel() for b in batches[25:])
    equal = FileBytes(KeptFiles([bytes(3)] * 5), None)
    assert equal.bucketed(2) is equal


def test_noise_is_new_in_every_epoch_and_resuming_gives_the_very_bytes():
    def loader():
        return Loader(many(40, transforms=[ByteNoise(-9, 9)]), 8, seed=4)

    whole = loader()
    batches = [next(whole) for _ in range(12)]
    state = None
    first = loader()
    for _ in range(7):
        next(first)
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    for expected in batches[7:]:
        found = next(second)
        assert torch.equal(found["inputs"], expected["inputs"])
    of_epoch = [{int(r["labels"][i]): r["inputs"][i] for r in batches[e : e + 5] for i in range(8)} for e in (0, 5)]
    same = [torch.equal(of_epoch[0][i][:4], of_epoch[1][i][:4]) for i in of_epoch[0]]
    assert sum(same) < 4


def test_files_back_to_back_in_an_archive_are_taken_apart(tmp_path):
    kept = [bytes([i] * (3 + i)) for i in range(6)]
    ends = np.cumsum([0, *map(len, kept)])
    packed = {"data": np.frombuffer(b"".join(kept), np.uint8), "labels": np.arange(6) % 2}
    np.savez(tmp_path / "a.npz", offsets=ends, **packed)
    found = file_bytes(tmp_path / "a.npz", batch=2, split=0.0).train.batch(torch.arange(6))
    assert [bytes(r[r >= 0].tolist()) for r in found["inputs"]] == kept
    assert found["labels"].tolist() == [0, 1, 0, 1, 0, 1]
    np.savez(tmp_path / "b.npz", offsets=ends[:-1], **packed)
    with pytest.raises(ShapeError, match="6 labels"):
        file_bytes(tmp_path / "b.npz", batch=2)


REAL = {"cifar10/test_jpeg_3k.npz": b"\xff\xd8\xff", "speech/fsdd_4speakers_30takes.npz": b"RIFF"}


@pytest.mark.skipif(not os.environ.get("LAMINA_DATA"), reason="LAMINA_DATA names no folder with JPEG and WAV files")
@pytest.mark.parametrize(("name", "begin"), REAL.items())
def test_real_jpegs_and_spoken_digits_are_read_as_they_are_with_little_padding(name, begin):
    path = os.path.join(os.environ["LAMINA_DATA"], name)
    if not os.path.exists(path):
        pytest.skip(f"LAMINA_DATA has no {name}")
    loader, drawn = (Loader(file_bytes(path, batch=16, pool=p).train, 16) for p in (16, 1))
    batch = next(loader)
    assert all(bytes(r[: len(begin)].tolist()) == begin for r in batch["inputs"])
    assert padded_share(loader) < padded_share(drawn) / 2
    if begin == b"RIFF":
        values, rate = data.read_sound(bytes(batch["inputs"][0][batch["inputs"][0] >= 0].tolist()))
        assert rate == 8000
        assert 0.01 < np.abs(values).max() <= 1


def test_what_cannot_be_is_refused(tmp_path):
    place = folder(tmp_path / "files") if (tmp_path / "files").mkdir() is None else None
    _, given = images()
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "a" / "x").write_bytes(b"")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x").write_bytes(b"1")
    for options, words in (
        ({"source": tmp_path / "fils"}, "did you mean 'files'"),
        ({"source": tmp_path / "flat"}, "one sub-folder of files a class"),
        ({"source": tmp_path / "empty"}, "is empty"),
        ({"source": tmp_path / "flat" / "x"}, "is one file"),
        ({"source": []}, "list of files is empty"),
        ({"source": place, "encoding": "png"}, "by way of pixels"),
        ({"source": place, "encoding": "wav"}, "uncompressed WAV"),
        ({"source": tmp_path / "no.npz"}, "does not exist"),
        ({"source": place, "quality": 3}, "for JPEG"),
        ({"source": place, "pad": 0}, "pad is -1"),
        ({"source": place, "pool": 0}, "pool must be"),
        ({"source": given}, "choose an encoding"),
        ({"source": given, "encoding": "wav"}, "nothing to encode"),
        ({"source": given, "encoding": "tif"}, "did you mean 'tiff'"),
    ):
        with pytest.raises(LaminaError, match=words):
            found = file_bytes(**{"batch": 2, **options})
            found.train.batch(torch.tensor([0]))
    with pytest.raises(ShapeError, match="bytes: give pad=-1"):
        file_bytes(place, batch=2, pad=None).train.batch(torch.arange(4))
    normalised = Data(Columns({"pixel_values": torch.randn(4, 1, 2, 2)}), None, 2, {}, "columns")
    with pytest.raises(LaminaError, match="mean=0 and std=1"):
        file_bytes(normalised, "fhwc", 2)
