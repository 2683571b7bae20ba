"""Stored soft labels: the crop that was seen comes back to the bit, with what was said of it, and nothing else does."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from lamina.data import Columns, Crops, Loader, digits
from lamina.errors import LaminaError, ShapeError
from lamina.objectives import EnsembleDistillation, SoftLabelStore, soft_labels
from lamina.objectives.soft_labels import spread

CROPS = Crops(scale=(0.3, 1.0), padding=1)


def teacher(seed=1, classes=5, side=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, classes)).eval()


def images(rows=9):
    g = torch.Generator().manual_seed(2)
    x, y = torch.rand(rows, 1, 8, 8, generator=g), torch.randint(5, (rows,), generator=g)
    return Columns({"pixel_values": x, "labels": y})


class Watched(nn.Module):
    """Keeps what it is shown."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, pixel_values):
        self.seen.append(pixel_values.clone())
        return self.inner(pixel_values)


@pytest.mark.parametrize("top_k", [None, 2, 5])
def test_a_stored_crop_comes_back_to_the_bit_with_what_was_said_of_it(tmp_path, top_k):
    watched, rows = Watched(teacher()), images()
    store = SoftLabelStore(tmp_path / "labels", top_k, CROPS, count=4, seed=3)
    assert store.record(rows, [watched, teacher(2)], batch=12) == 9
    seen = torch.cat(watched.seen).unflatten(0, (9, 4))
    data = SoftLabelStore(tmp_path / "labels", top_k, CROPS, count=4, seed=3).wrap(rows, per_image=3)
    index, objective = torch.tensor([5, 0, 7]), EnsembleDistillation([teacher(), teacher(2)], allow_scratch=True)
    for epoch, turn in ((0, [0, 1, 2]), (1, [3, 0, 1])):
        data.set_epoch(epoch)
        batch = data.batch(index)
        assert torch.equal(batch["pixel_values"], seen[index][:, turn].flatten(0, 1))
        assert torch.equal(batch["labels"], rows.batch(index)["labels"].repeat_interleave(3))
        torch.testing.assert_close(batch["soft_label"].sum(1), torch.ones(9), atol=1e-6, rtol=0)
        z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
        online = objective.loss(z, {k: v for k, v in batch.items() if k != "soft_label"})
        stored = EnsembleDistillation(allow_scratch=True).loss(z, batch)
        if top_k == 2:
            said = torch.stack([teacher(s)(batch["pixel_values"]).softmax(-1) for s in (1, 2)]).mean(0)
            cut = (said - batch["soft_label"]).abs().sum(1).max()
            assert 0.01 < cut < 2 * (1 - said.topk(2).values.sum(1)).max()
            assert abs(online["loss"] - stored["loss"]) < cut * z.log_softmax(-1).abs().max()
            assert torch.equal(batch["soft_label"].argmax(1), said.argmax(1))
        else:
            assert torch.equal(stored["loss"], online["loss"])
            assert torch.equal(stored["kl"], online["kl"])


def test_what_was_killed_goes_on_and_what_is_there_is_not_asked_again(tmp_path):
    rows, watched = images(), Watched(teacher())

    class Killed(Watched):
        def forward(self, pixel_values):
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return super().forward(pixel_values)

    store = SoftLabelStore(tmp_path, 2, CROPS, count=2)
    with pytest.raises(KeyboardInterrupt):
        store.record(rows, Killed(teacher()), batch=6)
    with pytest.raises(LaminaError, match=r"lacks 3 of 9 rows: record\(\) goes on where it stopped"):
        SoftLabelStore(tmp_path, 2, CROPS, count=2).wrap(rows)
    assert SoftLabelStore(tmp_path, 2, CROPS, count=2).record(rows, watched, batch=6) == 3
    assert len(watched.seen) == 1
    SoftLabelStore(tmp_path / "whole", 2, CROPS, count=2).record(rows, Watched(teacher()), batch=6)
    for name in ("boxes", "flips", "classes", "probabilities", "fingerprints"):
        one, two = (np.load(folder / f"{name}.npy") for folder in (tmp_path, tmp_path / "whole"))
        assert np.array_equal(one, two), name
    assert {np.load(tmp_path / f"{n}.npy").dtype.str for n in ("boxes", "probabilities", "classes")} == {"<i2", "<f2", "<i4"}  # fmt: skip  # noqa: E501


def test_other_data_other_teachers_and_other_crops_are_refused(tmp_path):
    rows = images()
    store = SoftLabelStore(tmp_path, 2, CROPS, count=2)
    with pytest.raises(LaminaError, match=r"holds no soft labels: record\(\) asks the teachers"):
        store.wrap(rows)
    store.record(rows, teacher())
    with pytest.raises(LaminaError, match="holds soft labels of teachers: others; name another folder"):
        SoftLabelStore(tmp_path, 2, CROPS, count=2).record(rows, teacher(2))
    for options, sentence in (
        ({"crops": CROPS, "count": 3}, "count: 2, not 3"),
        ({"crops": Crops(), "count": 2}, "crops: .*0.3"),
        ({"crops": CROPS, "count": 2, "seed": 1}, "seed: 0, not 1"),
    ):
        with pytest.raises(LaminaError, match=f"holds soft labels of {sentence}"):
            SoftLabelStore(tmp_path, 2, **options).wrap(rows)
    with pytest.raises(LaminaError, match="holds soft labels of average: probabilities, not logits"):
        store.record(rows, teacher(), average="logits")
    with pytest.raises(LaminaError, match="rows: 9, not 8"):
        store.wrap(images(8))
    other = images()
    other.columns["pixel_values"][4, 0, 0, 0] += 1e-5
    with pytest.raises(LaminaError, match="row 4 looks different than when the teachers saw it"):
        store.wrap(other).batch(torch.arange(6))
    with pytest.raises(LaminaError, match=r"per_image must be in 1..2, the crops stored of each image, got 3"):
        store.wrap(rows, per_image=3)
    for options, sentence in (
        ({"top_k": 0}, "count and top_k must be at least 1"),
        ({"count": 2}, "2 crops of each image need `crops`"),
    ):
        with pytest.raises(LaminaError, match=sentence):
            SoftLabelStore(tmp_path, **options)
    with pytest.raises(LaminaError, match="finds no 'pixel_values'"):
        SoftLabelStore(tmp_path / "x").record(Columns({"inputs": torch.rand(3, 4)}), teacher())
    with pytest.raises(ShapeError, match=r"one answer an image, \(B, classes\)"):
        SoftLabelStore(tmp_path / "x").record(rows, nn.Conv2d(1, 3, 1))
    manifest = json.loads((tmp_path / "soft_labels.json").read_text())
    (tmp_path / "soft_labels.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(LaminaError, match="has format 9; this version of lamina reads format 1"):
        SoftLabelStore(tmp_path, 2, CROPS, count=2).wrap(rows)


def test_what_is_not_kept_is_spread_evenly_over_the_other_classes():
    found = spread(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[0.5, 0.3], [1.0, 0.1]]), 4)
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.3, 0.1, 0.5], [1.0, 0.0, 0.1, 0.0]]))


def test_a_data_set_of_a_recipe_is_recorded_when_it_is_built_evaluation_whole(tmp_path):
    given = digits(batch=16)
    options = {"path": str(tmp_path), "count": 2, "crops": {"scale": [0.5, 1.0], "size": 6}}
    data = soft_labels(given, teachers=[teacher(1, 10, 6), teacher(2, 10, 6)], **options)
    assert data.sizes["image"] == 6
    again = soft_labels(given, **options)
    batch, same = (next(Loader(d.train, 16)) for d in (data, again))
    assert torch.equal(batch["soft_label"], same["soft_label"])
    held = data.evaluation.batch(torch.arange(3))
    said = torch.stack([teacher(s, 10, 6)(held["pixel_values"]).softmax(-1) for s in (1, 2)]).mean(0)
    top = said.topk(5)
    torch.testing.assert_close(held["soft_label"].gather(1, top.indices), top.values, atol=1e-3, rtol=0)
    with pytest.raises(LaminaError, match="crops have no option 'sise'"):
        soft_labels(given, str(tmp_path / "x"), crops={"sise": 6})
