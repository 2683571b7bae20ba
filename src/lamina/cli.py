"""The command line: one subcommand a verb. Nothing but typer is imported before a command runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from lamina.recipe import Recipe

CONFIRMED_UP_TO = 2**27
"""Parameters of a model that `check` may build in memory where one without memory refuses a batch."""

FIRST = "first"
"""The shipped recipe that `lamina train` runs when no other is named."""

app = typer.Typer(name="lamina", no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipe file, then optimizer.lr=1e-3 ...")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with exit code 2 and one sentence on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=words, prog_name="lamina")
    except Exception as error:
        from lamina.errors import LaminaError

        if "--debug" in words or not isinstance(error, LaminaError):
            raise
        print(f"lamina: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def train(
    recipe: Arguments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run: its folder is runs/NAME.")] = None,
    folder: Annotated[Path | None, typer.Option(help="The run's folder itself.")] = None,
    debug: Debug = False,
) -> None:
    """Train what a recipe says (without one: the recipe 'first')."""
    from lamina.errors import LaminaError
    from lamina.recipe import check

    if name is not None and folder is not None:
        raise LaminaError(f"give --name or --folder, not both (got {name!r} and {str(folder)!r})")
    checked = check(_read(recipe or []), choices_allowed=False)
    from lamina.train.run import run

    run(checked, folder=Path("runs", name) if name is not None else folder, resume=resume)


@app.command("check")
def check_command(recipe: Arguments = None, debug: Debug = False) -> None:
    """Check a recipe, print it spelled out, and estimate parameters, memory and time of a step."""
    from rich.console import Console

    from lamina.recipe import check, placed

    console = Console(highlight=False)
    checked = check(_read(recipe or []))
    # Estimated first: what cannot be built is refused before anything is printed.
    with placed(checked):
        lines = _estimates(checked)
    console.print(_tree(checked))
    for line in lines:
        console.print(line, markup=False)


@app.command("rewrite")
def rewrite_command(
    model: Annotated[Path, typer.Argument(help="Folder saved by Lamina or by transformers.")],
    passes: Annotated[list[str], typer.Argument(metavar="PASS...", help="drop_block or '{name: ..., count: 2}'")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the decisions, save nothing.")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Data node for passes that look at activations; a language model is shown library text."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the rewritten model.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--train", metavar="RECIPE", help="Train the result as RECIPE says, with this model and PASS."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Rewrite a saved model by passes and save the result, trained again where --train says how."""
    from lamina.errors import LaminaError
    from lamina.io import load, save
    from lamina.recipe import build
    from lamina.rewrite.rewriting import apply_decision, check_order

    if out is None and not dry_run:
        raise LaminaError("say where the rewritten model goes (--out FOLDER), or only look (--dry-run)")
    built = [build(_node(text, "PASS"), "pass", f"PASS {i}") for i, text in enumerate(passes, 1)]
    check_order(built)
    if recipe is not None and not dry_run:
        print(f"saved in {save(_rewritten_and_trained(model, passes, recipe), out)}")  # type: ignore[arg-type]
        return
    loaded = load(model)
    batches = _standard(loaded, model) if data is None else _calibration(build(_node(data, "--data"), "data", "--data"))
    for text, one in zip(passes, built, strict=True):
        decision = one.decide(loaded, batches)
        _show_decision(text, decision)
        loaded = apply_decision(loaded, one, decision)
    if out is not None and not dry_run:
        print(f"saved in {save(loaded, out)}")


@app.command("search")
def search_command(
    recipe: Arguments = None,
    algorithm: Annotated[str, typer.Option(help="Which point comes next: a name, or '{name: ...}'.")] = "sweep",
    aspect_ratios: Annotated[
        bool, typer.Option("--aspect-ratios", help="Open the model's depth and heads, their product kept.")
    ] = False,
    trials: Annotated[int | None, typer.Option(help="Stop when so many are done.")] = None,
    folder: Annotated[Path | None, typer.Option(help="The search's folder; it goes on where it holds one.")] = None,
    debug: Debug = False,
) -> None:
    """Train what a recipe's choices (!oneof [...]) allow and compare what it gives and costs: table, report, front."""
    from lamina.search import search, with_aspect_ratios

    space = with_aspect_ratios(_read(recipe or [])) if aspect_ratios else _read(recipe or [])
    search(space, algorithm=_node(algorithm, "--algorithm"), trials=trials, folder=folder)
    if aspect_ratios:
        print("What is known of wide transformers is of small encoders, trained from scratch on classification.")


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="Folder of a saved model, a model node, or module:function.")],
    example: Annotated[str, typer.Argument(metavar="INPUT", help="Image, .npy, or a data set's example: digits:7.")],
    output: Annotated[list[int] | None, typer.Option(help="Output to explain, by flat index; may be repeated.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Show what outputs look at.")] = False,
    columns: Annotated[bool, typer.Option("--columns", help="Show where inputs go.")] = False,
    svd: Annotated[int, typer.Option(help="Show this many singular triples, computed in float64.")] = 0,
    count: Annotated[int, typer.Option(help="How many outputs and inputs are chosen.")] = 3,
    rule: Annotated[str, typer.Option(help="Of smooth units: secant or tangent.")] = "secant",
    size: Annotated[int | None, typer.Option(help="Scale and crop an image to this square.")] = None,
    mean: Annotated[float, typer.Option(help="Subtracted from pixels of 0..1.")] = 0.5,
    std: Annotated[float, typer.Option(help="Divided by.")] = 0.5,
    out: Annotated[Path, typer.Option(help="Folder for the page, pictures and arrays.")] = Path("explain"),
    debug: Debug = False,
) -> None:
    """Show the linear system behind one input: votes, bias shares, rows, columns, singular images."""
    from lamina.verify.explain_command import run

    what = {"rows": rows, "columns": columns} if rows or columns or svd else {}
    run(model, example, out, outputs=output, svd=svd, count=count, rule=rule, size=size, mean=mean, std=std, **what)


@app.command("convert-distillation")
def convert_distillation_command(
    file: Annotated[Path, typer.Argument(help="Configuration of torchdistill (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the recipes, one a stage; without it, print.")] = None,
    debug: Debug = False,
) -> None:
    """Turn a torchdistill configuration into recipes and list what has no counterpart; nothing in it is imported."""
    from lamina.train.convert_torchdistill import show

    show(file, out)


@app.command()
def methods(
    slug: Annotated[str | None, typer.Argument(help="One method's page; without it, the table of all.")] = None,
    parts: Annotated[bool, typer.Option("--parts", help="List every registered part instead.")] = False,
    debug: Debug = False,
) -> None:
    """Show the methods, their parts and their evidence."""
    from lamina.experiments.methods import show

    show(slug, parts=parts)


@app.command()
def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="[SLUG]...", help="Without one: all.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="One seed, tiny sizes: does it run?")] = False,
    check: Annotated[bool, typer.Option("--check", help="Judge the stored evidence again, run nothing.")] = False,
    allow_stale: Annotated[
        bool, typer.Option("--allow-stale", help="With --check: print stale evidence, do not count it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run ours and the baseline side by side and put the paper's figure next to the measured one."""
    from lamina.experiments.reproduce import main as reproduce_main

    raise typer.Exit(reproduce_main(slugs or [], smoke=smoke, check=check, allow_stale=allow_stale))


def find_recipe(name: str) -> Path:
    """Return a recipe's path: a file, or the name of one that is shipped (`first`).

    Raises:
        RecipeError: neither.
    """
    import importlib.resources

    from lamina.errors import RecipeError, nearest

    path = Path(name)
    if path.exists():
        return path
    source_tree = Path(__file__).parents[2] / "recipes"
    packaged = Path(str(importlib.resources.files("lamina") / "recipes"))
    shipped = {p.stem: p for folder in (packaged, source_tree) for p in sorted(folder.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    known = nearest(name, [*shipped, *beside])
    raise RecipeError(f"no recipe file {name!r}, and none is shipped under that name{known} (shipped: {', '.join(shipped)})")  # fmt: skip  # noqa: E501


def _read(arguments: Sequence[str]) -> Recipe:
    """Take `[RECIPE] [overrides]` apart: what has a `=` and is no file is an override."""
    from lamina.errors import LaminaError
    from lamina.recipe import load

    overrides = [a for a in arguments if "=" in a and not Path(a).exists()]
    recipes = [a for a in arguments if a not in overrides]
    if len(recipes) > 1:
        raise LaminaError(f"expected one recipe and overrides like optimizer.lr=1e-3, got {', '.join(recipes)}")
    return load(find_recipe(recipes[0] if recipes else FIRST), overrides)


def _rewritten_and_trained(folder: Path, passes: Sequence[str], recipe: str) -> nn.Module:
    """Train a recipe whose model and passes are these; an objective that wants a teacher is told before each pass."""
    from lamina.recipe import check, load
    from lamina.train.run import run

    nodes = [_node(text, "PASS") for text in passes]
    saved = {"name": "lamina.io:load", "folder": str(folder)}
    rewrites = [{"at": "before", **({"name": node} if isinstance(node, str) else node)} for node in nodes]
    read = load(find_recipe(recipe))
    return run(check(dataclasses.replace(read, model=saved, rewrite=rewrites), choices_allowed=False)).model


def _node(text: str, what: str) -> Any:
    from lamina.recipe._yaml import read

    return read(text, what)[0]


def _standard(model: nn.Module, folder: Path) -> Iterable[Mapping[str, Any]] | None:
    """Return text of the standard library for a language model that can read it, else None."""
    import inspect

    from lamina.anatomy import describe
    from lamina.data.calibration import standard_text
    from lamina.errors import AnatomyError

    taken = inspect.signature(model.forward).parameters
    if "input_ids" not in taken or not {"decoder_input_ids", "pixel_values"}.isdisjoint(taken):
        # Text alone is not what it reads.
        return None
    try:
        shape = describe(model)
    except AnatomyError:
        return None
    return standard_text(folder, vocabulary=shape.vocabulary, context=shape.context)


def _calibration(data: Any, count: int = 8) -> list[Mapping[str, Any]]:
    """Return some batches of a data set's training part: what passes look at."""
    from itertools import islice

    from lamina.data.loader import Loader

    return list(islice(Loader(data.train, data.batch), count))


def _show_decision(text: str, decision: Any) -> None:
    from rich.console import Console

    from lamina.recipe._yaml import write
    from lamina.rewrite.rewriting import to_json

    console = Console(highlight=False)
    console.print(f"{text}:", markup=False)
    console.print(write(to_json(decision)), markup=False, end="")
    table = getattr(decision, "table", None)
    if table is not None:
        console.print(table())


def _tree(recipe: Recipe) -> Any:
    from rich.tree import Tree

    from lamina.recipe import KEYS

    tree = Tree("recipe")
    for key in KEYS:
        _grow(tree, key, getattr(recipe, key))
    return tree


def _grow(tree: Any, key: str, value: Any) -> None:
    """Add a value to a rich tree: a part's name on its own line, its options below."""
    from rich.text import Text

    from lamina.recipe._yaml import write

    if isinstance(value, Mapping) and value:
        branch = tree.add(Text(f"{key}: {value['name']}" if "name" in value else key))
        for below, content in value.items():
            if below != "name":
                _grow(branch, str(below), content)
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        branch = tree.add(Text(key))
        for i, content in enumerate(value):
            _grow(branch, f"[{i}]", content)
    else:
        # Inside a list, and that taken off again, because YAML ends a lone scalar with a mark.
        tree.add(Text(f"{key}: {write([value], flow=True).strip()[1:-1]}"))


def _estimates(recipe: Recipe) -> list[str]:
    """Build the data, the model on no memory, and the optimizer; say what a step costs."""
    from lamina.errors import RecipeError
    from lamina.recipe import build, objectives, open_choice
    from lamina.train.preflight import refuse_misfits, refuse_objective, try_batch

    if any(open_choice(getattr(recipe, key)) for key in ("model", "data", "objective", "optimizer", "rewrite")):
        return ["a search space: sizes depend on the choices (`lamina search` runs it)"]
    data = build(recipe.data, "data")
    model = _weightless(recipe, data.sizes)
    refuse_misfits(model, data.sizes, [build(n, "pass", f"rewrite[{i}]") for i, n in enumerate(recipe.rewrite)])
    untried = None
    for i, node in enumerate(objectives(recipe)):
        place = f"objective[{i}]" if isinstance(recipe.objective, list) else None
        objective = build(node, "objective", place, model=model, **data.sizes)
        refuse_objective(objective, model, data, recipe.rewrite, place or "objective")
        try:
            untried = untried or try_batch(model.to("meta"), objective, data)
        except RecipeError:
            # Kernels for meta refuse what the real ones take (grouped products of experts): a model of numbers decides.
            if sum(p.numel() for p in model.parameters()) > CONFIRMED_UP_TO:
                raise
            real = build(recipe.model, "model", **data.sizes)
            try_batch(real, build(node, "objective", place, model=real, **data.sizes), data)
    states = _states_per_weight(recipe)
    weights = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = data.batch * int(data.sizes.get("context", 1))
    rate = _measured_rate()
    return [
        f"parameters: {weights:,}",
        f"memory: {size * (2 + states) / 2**20:,.1f} MiB (weights, gradients and {states} optimizer states a weight; "
        "activations come on top)",
        f"a step: about {6 * weights * tokens / rate:.2g} s (estimate: 6 FLOPs x {weights:,} parameters x {tokens:,} "
        f"{'tokens' if 'context' in data.sizes else 'rows'}, at the {rate / 1e9:,.0f} GFLOP/s this machine's float32 "
        "matrix product was just measured at; attention and reads of data are left out)",
        f"a batch: not tried, this needs real numbers ({untried})" if untried else "a batch: its shapes pass through",
    ]


def _weightless(recipe: Recipe, sizes: Mapping[str, Any]) -> nn.Module:
    """Build the model on the meta device, or in memory where its constructor needs numbers."""
    import torch

    from lamina.recipe import build

    try:
        with torch.device("meta"):
            model: nn.Module = build(recipe.model, "model", **sizes)
    except (NotImplementedError, RuntimeError) as error:
        print(f"the model cannot be built on the meta device ({error}): building it in memory", file=sys.stderr)
        model = build(recipe.model, "model", **sizes)
    return model


def _states_per_weight(recipe: Recipe) -> int:
    """Count the tensors an optimizer keeps per weight, by letting it take one step on a tiny matrix."""
    import torch

    from lamina.recipe import build

    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = build(recipe.optimizer, "optimizer", params=[weight], model=None)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = (s for s in optimizer.state[weight].values() if isinstance(s, torch.Tensor))
    return sum(1 for s in held if s.shape == weight.shape)


def _measured_rate(size: int = 512, repeats: int = 5) -> float:
    """Measure a float32 matrix product, forward only, on this machine: FLOP/s, the best of a few."""
    import time

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
