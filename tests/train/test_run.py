from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from tests.parallel.test_data_parallel import free_port, torchrun
from tests.train.tiny import Net, numbers, recipe

from lamina import io
from lamina.errors import LaminaError
from lamina.recipe import load
from lamina.rewrite.rewriting import history
from lamina.train import run as run_module
from lamina.train import state
from lamina.train.outcome import Stage
from lamina.train.precision import TrainingError
from lamina.train.run import differences, train

ROOT = Path(__file__).parents[2]

WORKER = """
import os, signal, sys
from lamina.recipe import load
from lamina.train.run import train
from lamina.train.trainer import Trainer
from tests.train.tiny import recipe

inner = Trainer._look_around

def look(self):
    inner(self)
    if self.step == 8 and self.world.rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)

if "die" in sys.argv:
    Trainer._look_around = look
try:
    train(load(recipe(model={"name": "tests.train.tiny:Net", "batch_norm": False})), folder=sys.argv[1])
except Exception as error:
    print(type(error).__name__, error, file=sys.stderr)
    # As after an uncaught error, but without waiting for the other process.
    os._exit(3)
"""


def test_a_recipe_leaves_a_whole_folder(tmp_path, capsys) -> None:
    done = train(load(recipe()), folder=tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "checkpoints", "environment.json", "model", "report.html",
    }  # fmt: skip
    assert json.loads((tmp_path / "a" / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "rows/s" in printed
    assert f"report: {tmp_path / 'a' / 'report.html'}" in printed
    # The recipe in the folder, spelled out, is the same run.
    train(load(tmp_path / "a" / "recipe.yaml"), folder=tmp_path / "b")
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    # And what was saved is what was trained.
    loaded = io.load(tmp_path / "a" / "model")
    assert len(history(loaded)) == 1
    for name, tensor in done.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_last_table_fits_a_terminal(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stages = [
        Stage(name, 1_219_840, 5.3, 2.6, latency=0.0123, memory=555 << 20, steps=240, seconds=1.0, items=7_310)
        for name in ("start", "linear_expansion", "grow_parameter_tokens")
    ]
    run_module._show(types.SimpleNamespace(unit="tokens", folder=tmp_path, stages=stages), tmp_path / "report.html")
    out = capsys.readouterr().out
    assert "linear_expansion" in out
    assert "…" not in out


def test_the_learning_rate_follows_schedule_and_groups(tmp_path) -> None:
    train(load(recipe()), folder=tmp_path)
    rates = [r["lr"] for r in numbers(tmp_path) if r["event"] == "step"]
    assert rates[0] == pytest.approx(1e-2 / 12 / 0.2)
    assert max(rates) <= 1e-2
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    last = state.checkpoints(tmp_path)[-1]
    groups = json.loads((last / "state.json").read_text())["optimizer"]["groups"]
    assert [g["weight_decay"] for g in groups] == [0.01, 0.0]
    assert "norm.weight" in groups[1]["params"]


def test_runs_are_numbered(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(json.dumps(recipe()))
    first, second = train(load(Path("small.yaml"))), train(load(Path("small.yaml")))
    assert (str(first.folder), str(second.folder)) == ("runs/small-001", "runs/small-002")
    assert train(load(Path("small.yaml")), resume=True).folder == second.folder


def test_resume_of_another_recipe_names_the_key(tmp_path) -> None:
    train(load(recipe()), folder=tmp_path)
    with pytest.raises(LaminaError, match="holds a run already: resume it"):
        train(load(recipe()), folder=tmp_path)
    other = recipe(optimizer={"name": "adamw", "lr": 0.5, "schedule": {"name": "warmup_cosine", "warmup": 0.2}})
    with pytest.raises(LaminaError, match=r"another recipe: optimizer\.lr is 0\.01 there and 0\.5 here"):
        train(load(other), folder=tmp_path, resume=True)
    # Where to run and how often to save may change.
    train(load(recipe(), ["train.keep_last=1"]), folder=tmp_path, resume=True)


def test_a_kill_while_the_recipe_is_written_leaves_none(tmp_path, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    original = Path.write_text

    def write(self, text, **options):
        original(self, text[: len(text) // 2], **options)
        raise Killed

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(Killed):
        train(load(recipe()), folder=tmp_path)
    monkeypatch.undo()
    assert train(load(recipe()), folder=tmp_path, resume=True).steps == 12


def test_a_model_that_cannot_be_saved_is_told_in_a_sentence(tmp_path, monkeypatch) -> None:
    def full(*given, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(io, "save", full)
    sentence = "the trained model could not be written: No space left.*step-000012 is intact"
    with pytest.raises(TrainingError, match=sentence):
        train(load(recipe()), folder=tmp_path)
    monkeypatch.undo()
    assert (train(load(recipe()), folder=tmp_path, resume=True).folder / "model").is_dir()


def test_a_run_gone_on_from_any_checkpoint_is_the_same_run(tmp_path) -> None:
    train(load(recipe()), folder=tmp_path)
    whole = numbers(tmp_path)
    for step in (12, 9):
        found = state.checkpoints(tmp_path)
        assert found[-1].name == state.name_of(step)
        for file in found[-1].iterdir():
            file.unlink()
        found[-1].rmdir()
        if step == 12:
            train(load(recipe()), folder=tmp_path, resume=True)
            assert numbers(tmp_path) == whole
            for file in (last := state.checkpoints(tmp_path)[-1]).iterdir():
                file.unlink()
            last.rmdir()
    # None is left: it begins again.
    train(load(recipe()), folder=tmp_path, resume=True)
    assert numbers(tmp_path) == whole


def test_differences_name_every_key() -> None:
    one, other = load(recipe()), load(recipe(), ["train.steps=13", "rewrite[0].at=0.75", "model.depth=2"])
    assert [(k, a, b) for k, a, b in differences(one, other)] == [
        ("model.depth", 3, 2),
        ("rewrite[0].at", 0.5, 0.75),
        ("train.steps", 12, 13),
    ]


def test_a_weight_and_a_seed_count(tmp_path) -> None:
    short = {"steps": 1, "device": "cpu"}
    a = train(load(recipe(rewrite=[], train=short)), folder=tmp_path / "a")
    b = train(load(recipe(rewrite=[], train={**short, "seed": 1})), folder=tmp_path / "b")
    heavy = [{"name": "classification", "weight": 3.0}]
    c = train(load(recipe(rewrite=[], objective=heavy, train=short)), folder=tmp_path / "c")
    assert a.loss != b.loss
    assert c.loss == pytest.approx(3 * a.loss)
    assert isinstance(a.model, Net)


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = torchrun(WORKER, str(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    done = torchrun(WORKER, str(broken), "die", options=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(broken) == numbers(whole)
    assert (broken / "model" / "architecture.json").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_the_others_end_with_a_sentence_when_one_process_dies(tmp_path) -> None:
    port = str(free_port())
    workers = []
    for rank in (0, 1):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-c", WORKER, str(tmp_path), "die"]
        workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    workers[1].communicate(timeout=120)
    assert workers[1].returncode == -signal.SIGKILL
    begun = time.monotonic()
    _, error = workers[0].communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert workers[0].returncode == 3
    assert "TrainingError process 0 of 2 lost another one, which ended or hangs" in error
    assert "resume" in error
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-000003", "step-000006"]
