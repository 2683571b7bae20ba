from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.train.tiny import DropLast, WidenClasses, net, numbers, trainer

from lamina.errors import LaminaError
from lamina.gradients.reducer import Stateless
from lamina.objectives import Classification, Distillation, WeightedSum
from lamina.train import packing, state
from lamina.train.distributed import World
from lamina.train.metrics import Metrics, read
from lamina.train.phases import Scheduled
from lamina.train.precision import TrainingError

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, time
from pathlib import Path
from tests.train.test_state import long_run
long_run(Path(sys.argv[1]), slow=float(sys.argv[2])).fit(resume="resume" in sys.argv)
"""


def long_run(folder: Path, slow: float = 0.0):
    """A run with everything that has state: dropout, batch norm, teacher, two rewrites, a reducer, a schedule."""
    objective = WeightedSum([(1.0, Classification()), (0.5, Distillation())])

    def schedule(fraction: float) -> float:
        time.sleep(slow)
        return 1 - fraction / 2

    return trainer(
        folder,
        objective=objective,
        steps=40,
        rewrites=[Scheduled(DropLast(), 0.3), Scheduled(WidenClasses((4, 3, 2, 1, 0)), 0.6)],
        reducer=Momentum(),
        schedule=schedule,
        evaluate_every=7,
        checkpoint_every=1,
        keep_best=True,
        accumulate=2,
    )


class Momentum(Stateless):
    """A reducer with state, by name."""

    granularity = "model"

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, torch.Tensor] = {}

    def reduce(self, gradients, group):
        for name, g in gradients.items():
            old = self.before.get(name)
            same = old is not None and old.shape == g.shape
            self.before[name] = 0.5 * old + g if same else g.clone()
        return dict(self.before)

    def state_dict(self):
        return {"before": dict(self.before)}

    def load_state_dict(self, given) -> None:
        self.before = dict(given["before"])


def start(folder: Path, *words: str, slow: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(slow), *words]
    # As many threads as here: sums in another order are other numbers.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("whole")
    long_run(folder).fit()
    return numbers(folder)


def test_resume_at_every_kind_of_moment_gives_the_same_numbers(tmp_path, uninterrupted, monkeypatch) -> None:
    # Stopped by an exception at many steps, all in one folder: before, at and after each rewrite, at the end.
    original = state.save

    class Stop(Exception):
        pass

    def save(folder, step, *rest):
        path = original(folder, step, *rest)
        if step in moments:
            moments.discard(step)
            raise Stop
        return path

    moments = {1, 11, 12, 13, 23, 24, 30, 40}
    monkeypatch.setattr(state, "save", save)
    for _ in range(8):
        with pytest.raises(Stop):
            long_run(tmp_path).fit(resume=True)
    long_run(tmp_path).fit(resume=True)
    assert numbers(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_process_killed_at_random_moments_goes_on_with_the_same_numbers(tmp_path, uninterrupted) -> None:
    generator = torch.Generator().manual_seed(int(time.time()))
    kills = 0
    for _ in range(4):
        process = start(tmp_path, "resume", slow=0.02)
        wait_for_rows(tmp_path, process)
        time.sleep(float(torch.rand((), generator=generator)) * 0.4)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    finish(start(tmp_path, "resume"))
    assert numbers(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_process_killed_while_it_writes_a_checkpoint(tmp_path, uninterrupted) -> None:
    # Between the tensors and the rename: the half checkpoint lies there when the next process starts.
    process = start(tmp_path, slow=0.01)
    half: list[Path] = []
    while not half and process.poll() is None:
        half = list((tmp_path / "checkpoints").glob(".step-0000[12]*.partial"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    last = state.checkpoints(tmp_path)[-1]
    shutil.copytree(last, tmp_path / "checkpoints" / ".step-000039.partial")
    (tmp_path / "checkpoints" / ".step-000039.partial" / "complete").unlink()
    finish(start(tmp_path, "resume"))
    assert numbers(tmp_path) == uninterrupted
    assert not list((tmp_path / "checkpoints").glob(".*"))


def wait_for_rows(folder: Path, process: subprocess.Popen[str]) -> None:
    path = folder / "metrics.jsonl"
    begun = path.stat().st_size if path.exists() else 0
    while process.poll() is None and (not path.exists() or path.stat().st_size <= begun):
        time.sleep(0.005)


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch) -> None:
    whole = trainer(tmp_path / "whole", checkpoint_every=4)
    whole.fit()
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    original = FileSystemWriter._write_data
    calls = []

    def full(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")
        return original(self, *given)

    monkeypatch.setattr(FileSystemWriter, "_write_data", full)
    with pytest.raises(TrainingError, match=r"step-000008 could not be written: No space left.*step-000004 is intact"):
        trainer(tmp_path / "full", checkpoint_every=4).fit()
    monkeypatch.undo()
    trainer(tmp_path / "full", checkpoint_every=4).fit(resume=True)
    assert numbers(tmp_path / "full") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("what", ["metrics.jsonl", "environment.json", "checkpoints"])
def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path, monkeypatch, what) -> None:
    whole = trainer(tmp_path / "whole", checkpoint_every=4)
    whole.fit()
    if what == "metrics.jsonl":
        original, rows = Metrics.append, []

        def full(self, row):
            rows.append(row)
            if len(rows) == 7:
                # Half a row is there, as a full disk leaves it.
                with self.path.open("a") as file:
                    file.write('{"eve')
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(self, row)

        monkeypatch.setattr(Metrics, "append", full)
        sentence = r"metrics.jsonl could not be written: No space left.*last good checkpoint: step-000004 is intact"
    else:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / what).symlink_to("/dev/null/nowhere")
        sentence = r"full could not be written: Not a directory|step-000004 could not be written: .*there is none yet"
    with pytest.raises(TrainingError, match=sentence):
        trainer(tmp_path / "full", checkpoint_every=4).fit()
    monkeypatch.undo()
    if what != "metrics.jsonl":
        (tmp_path / "full" / what).unlink()
    trainer(tmp_path / "full", checkpoint_every=4).fit(resume=True)
    assert numbers(tmp_path / "full") == numbers(tmp_path / "whole")


def test_weights_that_are_no_numbers_are_not_kept(tmp_path) -> None:
    def explode(fraction: float) -> float:
        return 1.0 if fraction < 0.5 else math.inf

    # The loss of step 6 is a number still: its update is what breaks.
    with pytest.raises(
        TrainingError, match=r"embed.weight after step 6 is no number; the last good checkpoint is step-"
    ):
        trainer(tmp_path, checkpoint_every=1, keep_last=1, schedule=explode).fit()
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-000005"]
    run = trainer(tmp_path, checkpoint_every=1, keep_last=1, schedule=lambda f: 1.0).fit(resume=True)
    assert math.isfinite(run.loss)


def test_only_the_last_checkpoints_and_the_best_are_kept(tmp_path) -> None:
    run = trainer(
        tmp_path,
        steps=20,
        evaluate_every=2,
        checkpoint_every=2,
        keep_last=3,
        keep_best=True,
        schedule=lambda f: 1.0 if f <= 0.4 else 300.0,
    ).fit()
    kept = [p.name for p in state.checkpoints(tmp_path)]
    assert kept == sorted({state.name_of(run.best["step"]), "step-000016", "step-000018", "step-000020"})


def test_a_checkpoint_without_its_mark_does_not_count(tmp_path) -> None:
    trainer(tmp_path, checkpoint_every=4).fit()
    newest = state.checkpoints(tmp_path)[-1]
    (newest / "complete").unlink()
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-000008"]


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path) -> None:
    trainer(tmp_path, checkpoint_every=12).fit()
    files = sorted(p.name for p in (tmp_path / "checkpoints" / "step-000012").iterdir())
    assert files == ["complete", "shard-00001-model-00001-of-00001.safetensors", "state.json"]
    plain = json.loads((tmp_path / "checkpoints" / "step-000012" / "state.json").read_text())
    # Two moments and a step count for each of 12 parameters, by name.
    assert set(plain["optimizer"]["state"]) == {n for n, _ in net().named_parameters()}


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path) -> None:
    trainer(tmp_path, checkpoint_every=12).fit()
    with pytest.raises(LaminaError, match=r"embed.weight of shape \(16, 6\).*step-000012 has it with shape \(8, 6\)"):
        trainer(tmp_path, model=net(width=16), checkpoint_every=12).fit(resume=True)
    (tmp_path / "checkpoints" / "step-000012" / "state.json").write_text("{")
    with pytest.raises(LaminaError, match="not a readable checkpoint"):
        trainer(tmp_path, checkpoint_every=12).fit(resume=True)


def test_rows_after_the_checkpoint_vanish_at_resume(tmp_path) -> None:
    trainer(tmp_path, checkpoint_every=12).fit()
    expected = numbers(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 13}\n{"eve')
    trainer(tmp_path, checkpoint_every=12).fit(resume=True)
    assert numbers(tmp_path) == expected
    assert read(tmp_path / "metrics.jsonl")[-1]["event"] == "end"


def test_any_tree_survives_packing() -> None:
    tree = {"a": [1, (2.5, None), {3: torch.arange(3), "x": True}], "b": torch.tensor(1.5), "c": ()}
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(packing.pack(tree, "t", tensors)))
    back = packing.unpack(plain, tensors.__getitem__)
    assert back["a"][1] == (2.5, None)
    assert back["c"] == ()
    assert back["a"][2]["x"] is True
    assert torch.equal(back["a"][2][3], torch.arange(3))
    assert torch.equal(back["b"], torch.tensor(1.5))
    with pytest.raises(LaminaError, match=r"t\.bad is a set"):
        packing.pack({"bad": {1}}, "t", {})


def test_tensors_of_every_kind_survive_a_checkpoint(tmp_path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 4).t(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3).bfloat16(),
        "eighth": torch.randn(4).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "double": torch.randn(2, dtype=torch.float64),
    }
    path = state.save(tmp_path, 3, {"note": 1}, tensors, World())
    loaded = state.load(path, World())
    found = {k: loaded.allocate(k) for k in tensors}
    loaded.fill(found)
    assert (loaded.step, loaded.plain["note"]) == (3, 1)
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].double(), tensor.double()), key
