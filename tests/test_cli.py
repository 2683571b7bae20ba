# ruff: noqa: E501
from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import cli, registry
from lamina.data.examples import Columns, Data
from lamina.io import load, save
from lamina.models import Transformer, VisionTransformer
from lamina.recipe import Recipe
from lamina.registry import register

# Before a test replaces the registry, so that no package is imported, and its parts lost, while one runs.
registry.parts()


class Net(nn.Module):
    def __init__(self, width: int = 4, depth: int = 3, *, vocabulary: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


class RealNet(Net):
    """Cannot be built on the meta device: it asks a tensor for a number."""

    def __init__(self, *, vocabulary: int = 2) -> None:
        super().__init__(vocabulary=vocabulary)
        self.scale = float(torch.ones(()).item())


@dataclass(frozen=True)
class Cut:
    kept: list[int]

    def table(self) -> str:
        return f"keeps {len(self.kept)} blocks"


class CutBlocks:
    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"
    looked_at: ClassVar[list[int]] = []

    def __init__(self, count: int) -> None:
        self.count = count

    def decide(self, model: nn.Module, data: Iterable[Any] | None = None) -> Cut:
        self.looked_at[:] = [] if data is None else [int(batch["input_ids"].shape[0]) for batch in data]
        return Cut(list(range(len(model.blocks) - self.count)))

    def apply(self, model: nn.Module, decision: Cut, lineage: Any) -> nn.Module:
        model.blocks = nn.ModuleList(model.blocks[i] for i in decision.kept)
        return model


class Plain:
    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": model(batch["input_ids"]).mean()}


def rows(batch: int = 2, context: int = 8) -> Data:
    ids = torch.zeros(6, context, dtype=torch.long)
    return Data(Columns({"input_ids": ids}), None, batch, {"vocabulary": 10, "context": context})


def constant(fraction: float) -> float:
    return 1.0


RECIPE = "model: net\ndata: rows\nobjective: plain\noptimizer: {name: adamw, lr: 0.1}\ntrain: {steps: 3}\n"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A recipe of stand-in parts, in the folder that the test runs in."""
    monkeypatch.setattr(registry, "_parts", {})
    monkeypatch.setattr(registry, "_load", registry._check_kind)
    net = types.new_class("Net", (Net,), exec_body=lambda body: body.update(__module__=__name__))
    for kind, name, target in [
        ("model", "net", net),
        ("model", "real_net", RealNet),
        ("data", "rows", rows),
        ("objective", "plain", Plain),
        ("optimizer", "adamw", torch.optim.AdamW),
        ("optimizer", "sgd", torch.optim.SGD),
        ("schedule", "constant", constant),
        ("pass", "cut_blocks", CutBlocks),
    ]:
        register(kind, name)(target)  # type: ignore[type-var]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path | None, bool]]:
    """What `lamina.train.run.run` was called with."""
    calls: list[tuple[Recipe, Path | None, bool]] = []

    def run(recipe: Recipe, *, folder: Path | None, resume: bool) -> None:
        calls.append((recipe, folder, resume))

    monkeypatch.setitem(sys.modules, "lamina.train.run", types.SimpleNamespace(run=run))
    return calls


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run the command line, which must end with code 2; return the one sentence on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("lamina: ")
    assert err.count("\n") == 1
    return err.removeprefix("lamina: ").rstrip("\n")


def run(*words: str) -> None:
    """Run the command line, which must end well."""
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code in (0, None)


def started(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(lamina.__file__).parents[1])}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, env=environment)


def test_help_is_fast_and_leaves_torch_alone() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = started("-m", "lamina", "--help")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    assert all(verb in found.stdout for verb in ("train", "check", "rewrite", "methods", "reproduce"))
    script = (
        "import sys\nfrom lamina import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in ('torch', 'numpy', 'yaml', 'transformers')))"
    )
    assert started("-c", script).stdout.endswith("[]\n")


def test_reading_a_recipe_leaves_torch_alone() -> None:
    script = "import sys, lamina.recipe as r; r.load(sys.argv[1], ['train.steps=1']); print('torch' in sys.modules)"
    assert started("-c", script, str(cli.find_recipe("first"))).stdout == "False\n"


def test_a_mistake_is_one_sentence_and_code_2(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(RECIPE.replace("model: net", "model: nte"), encoding="utf-8")
    expected = (
        "mine.yaml:1: model: no model is called 'nte'; did you mean 'net'? (`lamina methods --parts` lists all parts)"
    )
    assert refused(capsys, "check", "mine.yaml") == expected
    with pytest.raises(lamina.errors.RecipeError):
        cli.main(["check", "mine.yaml", "--debug"])


def test_a_wrong_option_of_the_command_line_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--resum"])
    assert caught.value.code == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "firts"], "no recipe file 'firts', and none is shipped under that name; did you mean 'first'"),
        (["train", "min.yaml"], "no recipe file 'min.yaml', and none is shipped under that name; did you mean 'mine.yaml'"),
        (["train", "mine.yaml", "other"], "expected one recipe and overrides like optimizer.lr=1e-3, got mine.yaml, other"),
        (["train", "mine.yaml", "--name", "a", "--folder", "b"], "give --name or --folder, not both (got 'a' and 'b')"),
        (["train", "mine.yaml", "model.width=!oneof [2, 4]"], "override 'model.width=!oneof [2, 4]': model.width: this choice is open, so the recipe is a search space: `lamina search` runs it"),
        (["train", "mine.yaml", "modle.width=4"], "override 'modle.width=4': a recipe has no key 'modle'; did you mean 'model'?"),
        (["rewrite", "here", "cut_blocks"], "say where the rewritten model goes (--out FOLDER), or only look (--dry-run)"),
        (["rewrite", "here", "cut_block", "--dry-run"], "PASS 1: no pass is called 'cut_block'; did you mean 'cut_blocks'? (`lamina methods --parts` lists all parts)"),
        (["rewrite", "here", "{name: cut_blocks, count: 1", "--dry-run"], "PASS:1: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'"),
        (["rewrite", "here", "{name: cut_blocks, count: 1}", "--dry-run"], "no saved model at here: no such folder"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("recipe", "trained")
def test_mistakes(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *words).startswith(sentence)


def test_train_hands_over_the_checked_recipe(recipe: Path, trained: list[Any]) -> None:
    run("train", "mine.yaml", "optimizer.lr=1e-2", "train.steps=7", "--name", "a", "--resume")
    run("train", "optimizer.lr=1", str(recipe), "--folder", "b")
    Path("a=b.yaml").write_text(RECIPE, encoding="utf-8")
    run("train", "a=b.yaml")
    assert [(folder, resume) for _, folder, resume in trained] == [
        (Path("runs/a"), True), (Path("b"), False), (None, False),
    ]  # fmt: skip
    checked = trained[0][0]
    assert (checked.optimizer["lr"], checked.train["steps"], checked.train["precision"]) == (1e-2, 7, "fp32")
    assert checked.model == {"name": "net", "width": 4, "depth": 3}


def test_train_without_a_recipe_takes_the_first(monkeypatch: pytest.MonkeyPatch, trained: list[Any]) -> None:
    read: list[Any] = []

    def remember(recipe: Recipe, **options: Any) -> Recipe:
        read.append(recipe)
        return recipe

    monkeypatch.setattr("lamina.recipe.check", remember)
    run("train", "train.steps=5")
    assert read[0].train["steps"] == 5
    assert read[0].rewrite[0]["name"] == "drop_attention"


def test_check_prints_the_tree_and_the_estimates(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_measured_rate", lambda: 1e6)
    run("check", "mine.yaml")
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert "├── model: net" in printed
    assert "lr: 0.1" in words
    assert "betas: [0.9, 0.999]" in words
    # Embedding 10 x 4 and three matrices 4 x 4; AdamW keeps two states a weight; 2 rows of 8 tokens a step.
    assert "parameters: 88" in words
    assert "memory: 0.0 MiB (weights, gradients and 2 optimizer states a weight" in words
    assert f"a step: about {6 * 88 * 16 / 1e6:.2g} s (estimate: 6 FLOPs x 88 parameters x 16 tokens" in words


@pytest.mark.parametrize(
    ("override", "states"),
    [("optimizer={name: sgd, lr: 0.1}", 0), ("optimizer={name: sgd, lr: 0.1, momentum: 0.9}", 1),
     ("optimizer={name: adamw, amsgrad: true}", 3)],
)  # fmt: skip
@pytest.mark.usefixtures("recipe")
def test_check_counts_the_states_of_the_optimizer(
    override: str, states: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run("check", "mine.yaml", override)
    assert f"{states} optimizer states a weight" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("recipe")
def test_check_builds_for_real_what_cannot_be_on_meta(capsys: pytest.CaptureFixture[str]) -> None:
    run("check", "mine.yaml", "model=real_net")
    out, err = capsys.readouterr()
    assert "parameters: 88" in out
    assert err.startswith("the model cannot be built on the meta device")


def test_check_asks_a_model_of_numbers_where_only_meta_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixtral = (
        "{model_type: mixtral, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, "
        "num_key_value_heads: 2, vocab_size: 256, pad_token_id: 0}"
    )
    path = tmp_path / "experts.yaml"
    path.write_text(
        f"model: {{name: hugging_face, task: causal_lm, config: {mixtral}}}\n"
        "data: {name: text, context: 8, batch: 2, limit: 20000}\nobjective: next_token\n"
        "optimizer: {name: adamw, lr: 1e-3}\ntrain: {steps: 2}\n"
    )
    run("check", str(path))
    assert "its shapes pass through" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("recipe")
def test_check_of_a_search_space_prints_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    run("check", "mine.yaml", "model.width=!oneof [2, 4]")
    printed = capsys.readouterr().out
    assert "width: !oneof [2, 4]" in printed
    assert "a search space" in printed


@pytest.mark.usefixtures("recipe")
def test_the_measured_rate_is_one_a_machine_can_have() -> None:
    assert 1e8 < cli._measured_rate(size=256, repeats=2) < 1e16


@pytest.mark.usefixtures("recipe")
def test_rewrite_saves_and_a_dry_run_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = registry.find("model", "net")()
    save(model, tmp_path / "before")
    one, two = "{name: cut_blocks, count: 1}", "{name: cut_blocks, count: 1, at: after}"
    run("rewrite", "before", one, two, "--dry-run", "--data", "{name: rows, batch: 3}", "--out", "dry")
    printed = capsys.readouterr().out
    assert printed.count("keeps") == 2
    assert "kept:\n- 0\n- 1\n" in printed
    assert CutBlocks.looked_at == [3] * 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before", "mine.yaml"]
    run("rewrite", "before", one, two, "--out", "after")
    assert "saved in after" in capsys.readouterr().out
    assert CutBlocks.looked_at == []
    rewritten = load(tmp_path / "after")
    assert torch.equal(rewritten.blocks[0].weight, model.blocks[0].weight)
    assert len(rewritten.blocks) == 1


def test_a_language_model_is_shown_library_text_and_a_vision_model_needs_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(Transformer(3, 16, 2, vocabulary=256, context=32), tmp_path / "text")
    save(VisionTransformer(8, 4, 2, 16, 2), tmp_path / "images")
    words = ("{name: drop_attention, count: 1}", "--dry-run")
    run("rewrite", str(tmp_path / "text"), *words)
    printed = capsys.readouterr().out
    assert re.search(r"^block attention +mlp +block +goes$", printed, re.MULTILINE)
    assert re.search(r"^key-value cache: 128 bytes less per token and sequence$", printed, re.MULTILINE)
    assert re.search(r"^parameters: .* fewer\)\nspeed-up .*x$", printed, re.MULTILINE)
    assert "(--data on the command line)" in refused(capsys, "rewrite", str(tmp_path / "images"), *words)


def test_methods_and_reproduce_pass_their_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def show(slug: str | None = None, *, parts: bool = False) -> None:
        calls.append((slug, parts))

    def main(slugs: Iterable[str] = (), *, smoke: bool = False, check: bool = False, allow_stale: bool = False) -> int:
        calls.append((list(slugs), smoke, check, allow_stale))
        return int(check and not allow_stale)

    monkeypatch.setattr("lamina.experiments.methods.show", show)
    monkeypatch.setattr("lamina.experiments.reproduce.main", main)
    run("methods", "lamb")
    run("methods", "--parts")
    run("reproduce", "lamb", "metaformer", "--smoke")
    with pytest.raises(SystemExit) as caught:
        cli.main(["reproduce", "--check"])
    assert caught.value.code == 1
    run("reproduce", "--check", "--allow-stale")
    assert calls == [
        ("lamb", False),
        (None, True),
        (["lamb", "metaformer"], True, False, False),
        ([], False, True, False),
        ([], False, True, True),
    ]


def test_shipped_recipes_are_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.find_recipe("first").name == "first.yaml"
    (tmp_path / "first").write_text("model: net", encoding="utf-8")
    assert cli.find_recipe("first") == Path("first")


def test_every_command_has_a_traceback_on_demand() -> None:
    commands: list[Callable[..., Any] | None] = [c.callback for c in cli.app.registered_commands]
    assert len(commands) == 8
    assert all("debug" in c.__annotations__ for c in commands if c is not None)


@pytest.mark.parametrize("name", [p.stem for p in sorted(cli.find_recipe("first").parent.glob("*.yaml"))])
def test_shipped_recipes_fit_the_parts_they_name(name: str) -> None:
    from lamina.recipe import check, dump
    from lamina.recipe import load as read

    full = check(read(cli.find_recipe(name)))
    assert full.train["seed"] == 0
    assert check(read(dump(full))) == full


def test_the_first_recipe_needs_no_search() -> None:
    from lamina.recipe import check
    from lamina.recipe import load as read

    full = check(read(cli.find_recipe("first")), choices_allowed=False)
    assert full.optimizer["schedule"]["name"] == "warmup_cosine"
