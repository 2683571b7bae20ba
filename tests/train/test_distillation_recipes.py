"""Distillation from YAML alone: another method is another line, a stage another recipe, a wrong path no run."""

import json
from pathlib import Path

import pytest
import torch

import lamina
from lamina.cli import main
from lamina.errors import RecipeError
from lamina.recipe import check, dump, load
from lamina.train.metrics import read
from lamina.train.run import train

TEACHER = """
lamina: 1
model: {name: resnet, depths: [1, 1], widths: [8, 16], stem: small}
data: {name: digits, batch: 32}
objective: classification
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {steps: 4, evaluate_batches: 1}
"""

STUDENT = """
lamina: 1
model: {name: resnet, depths: [1, 1], widths: [4, 8], stem: small}
data: {name: digits, batch: 32}
objective:
  name: distillation
  teacher: {name: "lamina.io:load", folder: teacher/model}
  terms: [{name: knowledge_distillation, temperature: 4.0, alpha: 0.1}]
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {steps: 4, evaluate_batches: 1, log_every: 1}
"""

HINT = {"name": "hint", "student": "stages.1", "adapter": [8, 16]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train(load(TEACHER), folder=folder)
    return folder


@pytest.fixture(autouse=True)
def beside_the_teacher(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(teacher)


def logged(folder):
    return [r for r in read(Path(folder, "metrics.jsonl")) if r["event"] == "step"]


def changed(**options):
    return [f"objective.{key}={json.dumps(value)}" for key, value in options.items()]


def test_another_method_is_another_line_and_a_stage_another_recipe(capsys):
    train(load(STUDENT), folder="kd")
    assert all("knowledge_distillation" in r for r in logged("kd"))
    # FitNets: hints first, the pass cut short behind them, the stem frozen; nothing but the recipe differs.
    train(load(STUDENT, changed(terms=[HINT], stop=True, frozen=["stem"])), folder="hints")
    assert all("hint" in r for r in logged("hints"))
    first = lamina.load("hints/model").state_dict()
    fresh = train(load(STUDENT, [*changed(terms=[HINT]), "train.steps=1", "optimizer.lr=1e-30"]), folder="none").model
    assert torch.equal(first["stem.0.weight"], fresh.state_dict()["stem.0.weight"])
    assert torch.equal(first["stem.1.running_mean"], torch.zeros(4))
    assert torch.equal(first["head.weight"], fresh.state_dict()["head.weight"]), "it was not reached"
    assert not torch.equal(first["stages.1.0.conv1.weight"], fresh.state_dict()["stages.1.0.conv1.weight"])
    second = [
        f"model={json.dumps({'name': 'lamina.io:load', 'folder': 'hints/model'})}",
        "optimizer=adamw",
        "train.steps=1",
    ]
    done = train(load(STUDENT, [*second, "optimizer.lr=1e-30"]), folder="second")
    assert torch.equal(done.model.state_dict()["stages.1.0.conv1.weight"], first["stages.1.0.conv1.weight"])
    assert all(p.requires_grad for p in done.model.parameters())
    recipe = check(load(STUDENT, changed(terms=[HINT], frozen=["stem"])))
    assert check(load(dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ([{**HINT, "student": "stage.1"}], r"student: ResNet has no module 'stage.1'; did you mean 'stages\.1'"),
        ([{**HINT, "teacher": "heat"}], "teacher: ResNet has no module 'heat'; did you mean 'head'"),
        ([{**HINT, "adapter": None}], r"\(2, 8, 4, 4\) of the student and .*; `adapter: \[8, 16\]`"),
        ([{**HINT, "name": "hintt"}], "no loss of distillation is called 'hintt'; did you mean 'hint'"),
    ],
)
def test_what_cannot_be_paired_is_refused_before_training_and_by_check(terms, sentence, capsys):
    with pytest.raises(RecipeError, match=sentence):
        train(load(STUDENT, changed(terms=terms)), folder="refused")
    assert not Path("refused", "metrics.jsonl").exists()
    Path("mine.yaml").write_text(STUDENT)
    with pytest.raises(SystemExit):
        main(["check", "mine.yaml", *changed(terms=terms)])
    said = capsys.readouterr().err
    assert "mine.yaml:5: objective" in said or "objective.terms" in said


def test_a_cut_in_training_is_checked_up_to_the_cut():
    later = [HINT | {"adapter": None, "teacher": "stages.1"}, {"name": "hint", "student": "blocks.9", "from": 0.5}]
    cut = [{"name": "replace", "old": "head", "new": "fourier_head", "options": {"frequencies": 3}, "at": 0.5}]
    text = [*changed(teacher=None, terms=later), f"rewrite={json.dumps(cut)}"]
    with pytest.raises(RecipeError, match="has no module 'stage9'"):
        train(load(STUDENT, [*text, 'objective.terms[0].student="stage9"']), folder="refused")
