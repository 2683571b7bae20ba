from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import nn

from lamina import cli
from lamina.errors import LaminaError, RecipeError
from lamina.recipe import Choice, Recipe, build, load
from lamina.search import Trial, latency, peak_bytes, points, search, summaries, with_aspect_ratios
from lamina.search import run as run_module

EXAMPLES = [Example("algorithm", "sweep")]

PLANTED = """
model: {name: wide_transformer, total_heads: 2, depth: !oneof [2, 1], width: 8, head_width: 2, hidden: 8}
data: {name: listops, context: 12, shortest: 3, depth: 2, rows: 24, evaluation_rows: 8, batch: 8}
objective: classification
train: {steps: 2, seed: !oneof [0, 1]}
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def space(**open_values: Any) -> Recipe:
    model = {"name": "transformer", "depth": 2, "heads": 4, "width": 8, **open_values}
    return load(
        {"model": model, "data": {"name": "text", "context": 8}, "objective": "next_token", "train": {"steps": 1}}
    )


def test_points_are_the_product_of_choices_wherever_they_stand() -> None:
    recipe = load(
        "model: {name: transformer, norm: !oneof [layer_norm, rms_norm], depth: !intv {min: 1, max: 3}}\n"
        "data: text\nobjective: [next_token, {name: distillation, weight: !oneof [0.1, 0.2]}]\ntrain: {steps: 1}\n"
    )
    found = list(points(recipe))
    assert len(found) == 2 * 3 * 2
    assert found[1].chosen == {"model.norm": "layer_norm", "model.depth": 1, "objective[1].weight": 0.2}
    assert found[1].recipe.objective == ["next_token", {"name": "distillation", "weight": 0.2}]
    assert found[-1].recipe.model == {"name": "transformer", "norm": "rms_norm", "depth": 3}


def test_a_choice_between_nodes_is_told_by_what_differs_and_may_hold_choices() -> None:
    mixers = [{"name": "attention", "kernel": "local"}, {"name": "hopfield", "beta": Choice("oneof", [1.0, 2.0])}]
    found = [p.chosen for p in points(space(mixer=Choice("oneof", mixers)))]
    assert found == [
        {"model.mixer.name": "attention", "model.mixer.kernel": "local", "model.mixer.beta": None},
        {"model.mixer.name": "hopfield", "model.mixer.kernel": None, "model.mixer.beta": 1.0},
        {"model.mixer.name": "hopfield", "model.mixer.kernel": None, "model.mixer.beta": 2.0},
    ]


def test_a_choice_deep_inside_a_choice_speaks_for_itself() -> None:
    kernels = [{"name": "local", "window": Choice("oneof", [2, 4])}, {"name": "linear"}]
    mixers = [{"name": "attention", "kernel": k} for k in kernels]
    found = [p.chosen for p in points(space(mixer=Choice("oneof", mixers)))]
    assert found == [
        {"model.mixer.kernel.window": 2},
        {"model.mixer.kernel.window": 4},
        {"model.mixer.kernel": {"name": "linear"}},
    ]


@pytest.mark.parametrize(
    ("open_values", "sentence"),
    [
        ({}, "leaves nothing open"),
        ({"dropout": Choice("floatv", {"min": 0.0, "max": 0.5})}, "model.dropout: a sweep runs every candidate"),
        ({"width": Choice("intv", {"min": 1, "max": 9000})}, "has too many"),
    ],
)
def test_what_cannot_be_counted_out_is_refused(open_values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        list(points(space(**open_values)))


def test_every_divisor_runs_once_a_seed_and_finished_trials_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "planted.yaml").write_text(PLANTED)
    trained: list[Path] = []
    train = run_module.train

    def counted(recipe: Recipe, *, folder: Path, resume: bool) -> Any:
        trained.append(folder)
        return train(recipe, folder=folder, resume=resume)

    monkeypatch.setattr(run_module, "train", counted)
    recipe = load(tmp_path / "planted.yaml")
    first = search(recipe, trials=2)
    assert [f.name for f in trained] == ["000", "001"]
    # Killed as the third trial is trained, and its row is half written.
    results = tmp_path / "runs/planted-search/results.jsonl"

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        search(recipe)
    monkeypatch.undo()
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with results.open("a") as file:
        file.write('{"number": 2, "chos')
    monkeypatch.setattr(run_module, "train", counted)
    trials = search(recipe)
    assert [f.name for f in trained] == ["000", "001", "002", "002", "003"]
    assert trials[:2] == first
    assert [t.chosen for t in trials] == [
        {"model.depth": depth, "train.seed": seed} for depth in (2, 1) for seed in (0, 1)
    ]
    assert trials == run_module.load("runs/planted-search")
    for t in trials:
        assert 0 <= t.metrics["accuracy"] <= 1
        assert min(t.latency_1, t.latency_32, t.seconds, t.peak_bytes) > 0
    assert trials[0].parameters > trials[2].parameters
    assert trials[0].parameters * 4 < trials[0].peak_bytes
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    page = Path("runs/planted-search/report.html").read_text()
    assert "<svg" in page
    rows = summaries(trials)
    assert [(r.chosen["model.depth"], r.trials) for r in rows] == [(2, 2), (1, 2)]
    assert search(recipe) == trials
    assert len(trained) == 5


def trial(number: int, accuracy: float | None, cost: float, **chosen: Any) -> Trial:
    metrics = {} if accuracy is None else {"accuracy": accuracy}
    sizes: dict[str, Any] = {"latency_1": cost, "latency_32": cost, "parameters": int(cost), "peak_bytes": int(cost)}
    return Trial(number=number, chosen=chosen, loss=None if accuracy is None else 1.0, metrics=metrics, **sizes)


def test_dominated_rows_are_marked_on_the_means_over_seeds() -> None:
    trials = [
        trial(0, 0.9, 8, a=1, seed=0),
        trial(1, 0.7, 8, a=1, seed=1),
        trial(2, 0.8, 4, a=2),  # as good, and cheaper
        trial(3, 0.6, 2, a=3),
        trial(4, 0.5, 3, a=4),  # worse and dearer than a=3
        trial(5, 0.5, 1, a=5),
        trial(6, None, 0, a=6),  # failed
    ]
    rows = summaries(trials)
    assert [r.chosen["a"] for r in rows if r.dominated] == [1, 4]
    assert rows[0].score == pytest.approx(0.8)
    assert rows[0].spread == pytest.approx(0.2 / 2**0.5)
    assert rows[0].trials == 2
    assert rows[-1].score is None
    alike = summaries([trial(0, 0.5, 1, a=1), trial(1, 0.5, 1, a=2)])
    assert not any(r.dominated for r in alike), "equals do not dominate each other"


def test_a_trial_that_does_not_fit_is_a_row_and_the_search_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    found = search(load(PLANTED.replace("[2, 1]", "[3, 1]").replace("!oneof [0, 1]", "0")), folder="one")
    assert [t.error is None for t in found] == [False, True]
    assert "depth 3 does not divide total_heads 2" in str(found[0].error)
    assert "trial 0 could not run" in capsys.readouterr().out


def test_another_space_in_the_folder_and_a_wrong_option_are_refused() -> None:
    short = PLANTED.replace("!oneof [0, 1]", "0")
    Path("full").mkdir()
    Path("full/recipe.yaml").write_text("model: other\n")
    with pytest.raises(LaminaError, match="is another search space"):
        search(load(short), folder="full")
    with pytest.raises(LaminaError, match=r"model\.width: expected"):
        search(load(short.replace("width: 8", "width: !oneof [8, wide]")), folder="new")
    with pytest.raises(LaminaError, match="no algorithm is called 'sweeep'"):
        search(load(short), folder="new", algorithm="sweeep")
    with pytest.raises(LaminaError, match="at least one trial, got 0"):
        search(load(short), folder="new", trials=0)
    assert not Path("new").exists()


LLAMA = {"model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
DIGITS: dict[str, Any] = {"image": 8, "patch": 4, "channels": 1, "classes": 10}
WIDE = {"name": "wide_transformer", "total_heads": 6, "width": 8, "head_width": 4}
RATIOS: list[tuple[dict[str, Any], int]] = [
    ({"name": "transformer", "depth": 2, "heads": 4, "width": 8}, 4),
    ({"name": "transformer", "depth": 2, "heads": 4, "width": 8, "kv_heads": 2}, 3),
    ({"name": "transformer", "depth": 3, "heads": 2, "width": 8, "mixer": {"name": "attention", "head_width": 6}}, 4),
    (WIDE, 4),
    ({"name": "vision_transformer", "depth": 2, "heads": 2, "width": 8, **DIGITS}, 3),
    ({"name": "hugging_face", "config": {**LLAMA, **HEADS}}, 3),
]


@pytest.mark.parametrize(("node", "count"), RATIOS)
def test_any_transformer_recipe_opens_to_its_aspect_ratios(node: dict[str, Any], count: int) -> None:
    recipe = load(
        {"model": node, "data": {"name": "text", "context": 8}, "objective": "next_token", "train": {"steps": 1}}
    )
    opened = with_aspect_ratios(recipe)
    assert len(opened.model.candidates()) == count
    totals = set()
    for candidate in opened.model.candidates():
        with torch.device("meta"):
            model = build(candidate, "model", vocabulary=256, context=8)
        matrices = [p for n, p in model.named_parameters() if ("mixer" in n or "self_attn" in n) and p.dim() == 2]
        totals.add(sum(p.numel() for p in matrices))
    assert len(totals) == 1, "attention has the same parameters at every ratio"
    assert len(list(points(opened))) == count


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"name": "resnet18"}, "'resnet18' has no depth and heads"),
        ({"name": "transformer", "depth": Choice("oneof", [1, 2])}, "model.depth: --aspect-ratios sets depth"),
        (Choice("oneof", ["transformer", "resnet18"]), "the model is a choice itself"),
        ({"name": "transformer", "mixer": "hopfield", "causal": False}, "would change nothing|ties the width"),
        ({"name": "hugging_face", "config": {"model_type": "bert"}}, "BertConfig has no head_dim"),
        (
            {"name": "transformer", "mixer": {"name": "attention", "heads": 2}},
            "model.mixer.heads: --aspect-ratios changes",
        ),
        ({"name": "transformer", "mixer": {"name": "attention", "kv_heads": 2}}, "the kv_heads of the model"),
        ({"name": "hugging_face", "config": {"model_type": "lama"}}, "no model_type is called 'lama'; did you mean"),
        ({"name": "hugging_face", "path": "somewhere"}, "loaded from a folder has its aspect ratio"),
    ],
)
def test_models_without_an_aspect_ratio_are_refused(node: Any, sentence: str) -> None:
    recipe = load({"model": node, "data": "text", "objective": "next_token", "train": {"steps": 1}})
    with pytest.raises(RecipeError, match=sentence):
        candidate = with_aspect_ratios(recipe).model.candidates()[0]
        build(candidate, "model", vocabulary=8, context=8)


def test_the_command_opens_the_ratios_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain.yaml").write_text(
        PLANTED.replace("depth: !oneof [2, 1]", "depth: 2").replace("!oneof [0, 1]", "0")
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["search", "plain.yaml", "--aspect-ratios", "--trials", "1", "--folder", "out"])
    assert not stopped.value.code
    rows = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert [r["chosen"] for r in rows] == [{"model.depth": 2}]
    assert "trained from scratch" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["search", "plain.yaml"])
    assert stopped.value.code == 2
    assert "leaves nothing open" in capsys.readouterr().err


def test_peak_memory_is_weights_and_what_is_alive_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 100, bias=False), nn.ReLU(), nn.Linear(100, 2, bias=False)).eval()
    weights = 4 * (4 * 100 + 100 * 2)
    # The wide tensor and what ReLU makes of it stand side by side; the input is the caller's.
    assert peak_bytes(model, {"inputs": torch.randn(8, 4)}) == weights + 2 * 8 * 100 * 4


def test_latency_is_that_of_one_pass() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(x.shape)
            assert not torch.is_grad_enabled()
            return x

    assert 0 < latency(Counted(), {"inputs": torch.randn(2, 2)}, rounds=5) < 0.01
    assert len(calls) == 3 + 5
