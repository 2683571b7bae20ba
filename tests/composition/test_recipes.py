"""Methods of different stages together: every recipe in `recipes/` is trained in bf16, saved, loaded and run again.

A method adds a file there that puts it beside methods of other stages; nothing here needs to know of it.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from tests.contract.foreign import runs_bf16_lstm

import lamina
from lamina.batches import TARGETS, call, logits
from lamina.recipe import build
from lamina.recipe import load as load_recipe
from lamina.rewrite import history
from lamina.train import report
from lamina.train.metrics import read
from lamina.train.run import train

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind at all; " * 60
"""What `book.txt` in a recipe holds."""

RECIPES = {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}

DRAWN = {"life_of_a_model", *list(RECIPES)[::6]}
"""Whose report is drawn, a third of a short run's time."""

SHIPPED = {p.stem: p for p in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))}

FIRST_STEPS = {"steps": 6, "log_every": 1, "evaluate_batches": 1}

TRAIN = {"steps": 10, "log_every": 1, "evaluate_batches": 2, "precision": "bf16", "seed": 3}


@pytest.fixture(autouse=True)
def book(tmp_path, monkeypatch):
    """Run where `book.txt` lies."""
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)


def run(name, out, **options):
    precision = {} if "lstm" not in name or runs_bf16_lstm() else {"precision": "fp32"}
    chosen = {**TRAIN, **precision, **options}
    recipe = load_recipe(RECIPES[name], [f"train.{key}={json.dumps(value)}" for key, value in chosen.items()])
    return train(recipe, folder=out)


def losses(folder):
    return [r["loss"] for r in read(Path(folder, "metrics.jsonl")) if r["event"] == "step"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_saves_loads_and_runs_again_to_the_same_numbers(name, monkeypatch):
    if name not in DRAWN:
        monkeypatch.setattr(report, "write", lambda folder, *_, **__: folder)
    done = run(name, "first")
    found = losses("first")
    assert len(found) == 10
    assert all(torch.isfinite(torch.tensor(found)))
    recipe = load_recipe(Path("first", "recipe.yaml"))
    assert len(history(done.model)) == len(recipe.rewrite)
    if name in DRAWN:
        assert Path("first", "report.html").stat().st_size > 5000
    loaded = lamina.load("first/model")
    rows = build(recipe.data, "data").evaluation.batch(torch.tensor([0, 1]))
    batch = {k: v for k, v in rows.items() if k not in TARGETS}
    with torch.no_grad():
        assert torch.equal(logits(call(loaded, batch)), logits(call(done.model, batch)))
    monkeypatch.setattr(report, "write", lambda folder, *_, **__: folder)
    again = train(recipe, folder="again")
    assert losses("again") == found
    assert again.evaluation == done.evaluation


STAGED = {"elastic", "field_conversion", "life-of-a-model"}
"""Their losses have more terms, or others, later on."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_takes_its_first_steps(name):
    chosen = [f"train.{key}={value}" for key, value in FIRST_STEPS.items()]
    recipe = load_recipe(SHIPPED[name], [*chosen, "model.depth=1"] if name == "wide_attention" else chosen)
    if "LAMINA_DATA" not in os.environ and name in ("latent_ode", "mgno"):
        pytest.skip("LAMINA_DATA names no folder with the recipe's data")
    done = train(recipe, folder="run")
    assert math.isfinite(done.evaluation)
    if name not in STAGED:
        assert losses("run")[-1] < 1.2 * losses("run")[0]


def test_a_compiled_run_rewrites_on_the_way_and_follows_the_eager_one():
    run("drop_distillation_of_logits", "eager")
    run("drop_distillation_of_logits", "compiled", compile=True)
    eager, compiled = losses("eager"), losses("compiled")
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 0.05


def test_the_rewrite_is_in_the_metrics_with_the_fate_of_every_state():
    run("layer_norm_lstm_in_a_home_made_model", "first")
    rows = [r for r in read(Path("first", "metrics.jsonl")) if r["event"] == "rewrite"]
    assert [r["pass"] for r in rows] == ["replace", "drop_sublayers"]
    assert any("weight" in n for n in rows[0]["derived"]), "the recurrent weights' momentum follows"
    assert rows[0]["fresh"], "gains are new"
    decision = json.loads(Path("first/model/architecture.json").read_text())["rewrites"][0]["decision"]
    assert decision["paths"] == ["read"]
