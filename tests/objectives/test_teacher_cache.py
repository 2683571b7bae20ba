"""Teacher outputs on disk: the same numbers, the teacher at rest, and what is refused."""

import copy
import multiprocessing

import pytest
import torch
from torch import nn

from lamina.data import Columns, Data, Loader, augmented_views, indexed
from lamina.errors import LaminaError
from lamina.objectives import Distillation
from lamina.objectives.teacher_cache import TeacherCache, fingerprints

TERMS = ["knowledge_distillation", {"name": "hint", "student": "0", "from": 0.5}]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def data(rows=20):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows + 4, 4, generator=g), torch.randint(3, (rows + 4,), generator=g)
    part = [Columns({"inputs": x[s], "labels": y[s]}) for s in (slice(rows), slice(rows, None))]
    return indexed(Data(*part, 5))


def losses(objective, steps=8, seed=3):
    student = net()
    optimizer, loader = torch.optim.SGD(student.parameters(), lr=0.1), Loader(data().train, 5, seed=seed)
    found = []
    for step in range(steps):
        objective.set_progress(step / steps)
        optimizer.zero_grad()
        found.append(objective(student, next(loader))["loss"])
        found[-1].backward()
        optimizer.step()
    return torch.stack(found).detach()


def test_a_cached_teacher_gives_the_losses_of_a_live_one_and_rests_from_the_second_epoch_on(tmp_path):
    teacher, ran = net(seed=1), []
    plain = losses(Distillation(teacher, terms=TERMS))
    teacher.register_forward_hook(lambda *a: ran.append(1))
    first = losses(Distillation(teacher, terms=TERMS, cache=tmp_path))
    assert len(ran) == 4
    torch.testing.assert_close(first, plain)
    again = losses(Distillation(teacher, terms=TERMS, cache=tmp_path))
    assert len(ran) == 4
    assert torch.equal(again[:4], plain[:4]), "batches as they were when they were written: to the bit"
    torch.testing.assert_close(again, plain)
    held = data().evaluation.batch(torch.tensor([0, 3]))
    objective = Distillation(teacher, terms=TERMS, cache=tmp_path)
    with torch.no_grad():
        found = [objective(net(), held)["loss"] for _ in range(2)]
    assert len(ran) == 5
    torch.testing.assert_close(*found)
    assert torch.equal(copy.deepcopy(objective)(net(), held)["loss"], found[1])


def test_another_teacher_another_data_set_and_random_rows_are_refused(tmp_path):
    batch = data().train.batch(torch.arange(5))
    Distillation(net(1), terms=TERMS, cache=tmp_path)(net(), batch)
    with pytest.raises(LaminaError, match="holds the outputs of another teacher: name another folder"):
        Distillation(net(2), terms=TERMS, cache=tmp_path)(net(), batch)
    objective = Distillation(net(1), terms=TERMS, cache=tmp_path)
    other = {**batch, "inputs": batch["inputs"].clone()}
    other["inputs"][3, 1] += 1e-6
    with pytest.raises(LaminaError, match="row 3 looks different than when the teacher saw it"):
        objective(net(), other)
    with pytest.raises(LaminaError, match="need each row's number: wrap the data set in `indexed`"):
        objective(net(), {k: v for k, v in batch.items() if k != "index"})
    more = Distillation(net(1), terms=[*TERMS, {"name": "hint", "student": "1"}], cache=tmp_path)
    with pytest.raises(LaminaError, match=r"does not hold '1' of the teacher, only 0, \.logits: name another folder"):
        more(net(), batch)
    (tmp_path / "teacher.json").write_text('{"format": 9}')
    with pytest.raises(LaminaError, match="has format 9; this version of lamina reads format 1"):
        TeacherCache(tmp_path).outputs(batch, dict)


def test_random_augmentation_is_refused_before_training():
    images = Data(Columns({"pixel_values": torch.rand(6, 1, 8, 8)}), None, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    objective = Distillation(copy.deepcopy(model), terms=["knowledge_distillation"], cache="nowhere")
    assert objective.fits(model, indexed(images)) is None
    with pytest.raises(LaminaError, match="cache cannot be used with random augmentation"):
        objective.fits(model, augmented_views(indexed(images), count=1))
    with pytest.raises(LaminaError, match="cache needs each row's number in the batch"):
        objective.fits(model, images)


def test_fingerprints_tell_rows_apart_by_value_and_place_and_nothing_else():
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    found = fingerprints({"inputs": x, "labels": torch.tensor([0, 1, 2]), "index": torch.arange(3)})
    assert found[0] == found[2] != found[1]
    assert (found != 0).all()
    ids = torch.tensor([[3, 4], [4, 3]])
    named = [fingerprints({name: ids}) for name in ("input_ids", "token_type_ids")]
    assert not torch.equal(*named)
    for kind in (torch.float16, torch.float64, torch.bool, torch.uint8):
        assert len(set(fingerprints({"inputs": torch.tensor([[0, 1], [1, 0]]).to(kind)}).tolist())) == 2
    with pytest.raises(LaminaError, match="no tensor that a teacher could see"):
        fingerprints({"labels": torch.zeros(2)})


def test_rows_far_apart_lie_in_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("lamina.objectives.teacher_cache.PIECE", 64)
    cache = TeacherCache(tmp_path)
    batch = {"inputs": torch.randn(4, 2), "index": torch.tensor([90, 0, 7, 31])}
    given = {".logits": torch.arange(12.0).reshape(4, 3)}
    cache.outputs(batch, lambda b: given)
    found = TeacherCache(tmp_path).outputs(batch, lambda b: {})
    assert torch.equal(found[".logits"], given[".logits"])
    part = {k: v[1:3] for k, v in batch.items()}
    assert torch.equal(TeacherCache(tmp_path).outputs(part, lambda b: {})[".logits"], given[".logits"][1:3])


def fill(folder, start):
    objective = Distillation(net(1), terms=TERMS, cache=folder)
    with torch.no_grad():
        objective(net(), data().train.batch(torch.arange(start, 20, 2)))


@pytest.mark.slow
def test_two_processes_fill_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fill, args=(tmp_path, i)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    batch = data().train.batch(torch.arange(20))
    found = TeacherCache(tmp_path, net(1).requires_grad_(False)).outputs(batch, lambda b: {})
    torch.testing.assert_close(found[".logits"], net(1)(batch["inputs"]).detach())
