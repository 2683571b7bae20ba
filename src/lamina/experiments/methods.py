"""`lamina methods`: the table of methods, and one method's parts, signatures, tests, claim and evidence."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table
from rich.text import Text

import lamina
from lamina import registry
from lamina.experiments import evidence
from lamina.experiments.bars import parse_bar
from lamina.experiments.harness import Experiment, experiments, figures, find, interval_lines, paper_figures, reported
from lamina.registry import Part

console = Console()


@dataclass(frozen=True)
class Method:
    """One method as its experiment's module describes it."""

    experiment: Experiment
    title: str
    page: str
    """The module's docstring below its first line: Markdown."""
    parts: tuple[Part, ...]
    """Registered parts that the experiment's module itself imports."""
    tests: tuple[str, ...]
    """Test files of the modules behind the parts, relative to the source tree."""


def methods() -> list[Method]:
    """Return every method that has an experiment, by slug."""
    return [describe(e) for e in experiments().values()]


def describe(experiment: Experiment) -> Method:
    """Collect what the registry, the experiment's docstring and the source tree say about a method."""
    module = importlib.import_module(experiment.run.__module__)
    title, _, page = inspect.cleandoc(module.__doc__ or experiment.slug).partition("\n")
    parts = _parts(module)
    tests = getattr(module, "TESTS", None) or _tests(parts)
    return Method(experiment, title.rstrip("."), page.strip(), parts, tests)


def show(slug: str | None = None, *, parts: bool = False) -> None:
    """Print the table of methods, of all registered parts, or one method's page.

    Raises:
        LaminaError: no method is called so.
    """
    if parts:
        console.print(_parts_table(registry.parts()))
    elif slug is None:
        console.print(_methods_table(methods()))
    else:
        _show_one(describe(find(slug)))


def _show_one(method: Method) -> None:
    one = method.experiment
    _print(f"{method.page}\n", head=f"{one.slug}: {method.title}\n\n")
    parts = (f"  {p.kind} {p.name}: {p.place}{signature(p)}" for p in method.parts)
    _print(("\n".join(parts) or "  -") + "\n", head="Parts\n")
    _print(", ".join(method.tests) or "-", head="Tests  ")
    _print(f"{one.source}; bar: {one.bar.text}", head="Claim  ")
    _print(evidence.status(one), head="Status ")
    _print("\n".join(f"  {line}" for line in [*verdict_lines(one), *evidence_lines(one)]))


def _print(text: str, head: str = "") -> None:
    # Wrapped by the terminal alone, so that lines the page has broken already are not broken twice.
    console.print(Text.assemble((head, "bold"), text), soft_wrap=True, highlight=False)


def verdict_lines(one: Experiment) -> list[str]:
    """Word the verdict on the stored figures: a line a clause of the bar with its interval, and what follows."""
    found = evidence.read(one.slug)
    if found is None:
        return []
    bar, judged = parse_bar(found.content["bar"]), evidence.judge(found)
    count = len(found.measurements)
    basis = "one seed" if count == 1 else f"95 % bootstrap interval of the mean over {count} seeds"
    # Few values have few means: nothing that an interval of three says goes beyond them.
    basis += ", nearly smallest to largest" if 1 < count <= 3 else ""
    lines = interval_lines(judged, bar)
    return [*lines, f"{judged.status or 'no verdict'} when it ran: {judged.reason} ({basis})"]


def evidence_lines(one: Experiment) -> list[str]:
    """Word the stored figures: a line a figure, ours and baseline over the seeds, the paper's beside."""
    found = evidence.read(one.slug)
    if found is None:
        return []
    runs = found.measurements
    ours, base, paper = (
        [figures(m.ours) for m in runs],
        [figures(m.baseline) for m in runs],
        paper_figures(runs[0].paper),
    )
    lines = []
    for name in ours[0]:
        line = f"{name}: ours {_mean([o[name] for o in ours])}"
        if all(name in b for b in base):
            line += f", baseline {_mean([b[name] for b in base])}"
        lines.append(line + (f", paper {paper[name]:g}" if name in paper else ""))
    lines += [f"{name} (reported): {_mean(values)}" for name, values in reported(runs).items()]
    if isinstance(runs[0].paper, str):
        lines.append(f"paper: {runs[0].paper}")
    return lines


def signature(part: Part) -> str:
    """Return a part's signature, without annotations, as a recipe's author needs it."""
    try:
        found = inspect.signature(part.target)
    except (TypeError, ValueError):
        return "(...)"
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _methods_table(found: Sequence[Method]) -> Table:
    table = Table("method", "what it is", "parts", "status")
    for m in found:
        names = ", ".join(f"{p.kind} {p.name}" for p in m.parts)
        table.add_row(m.experiment.slug, m.title, names, evidence.status(m.experiment))
    return table


def _parts_table(found: Sequence[Part]) -> Table:
    table = Table("kind", "name", "where", "what it is")
    for part in found:
        table.add_row(part.kind, part.name, part.place, first_line(part))
    return table


def first_line(part: Part) -> str:
    """Return the first line of a part's docstring."""
    return (inspect.getdoc(part.target) or "").partition("\n")[0]


def _parts(module: ModuleType) -> tuple[Part, ...]:
    """Return the registered parts a module names in `PARTS` ("kind name"; may be empty), else those it imports."""
    named: Sequence[str] | None = getattr(module, "PARTS", None)
    if named is not None:
        return tuple(registry.describe(*entry.split()) for entry in named)
    values = [v for v in vars(module).values() if callable(v)]
    return tuple(p for p in registry.parts() if any(p.target is v for v in values))


def _tests(parts: Sequence[Part]) -> tuple[str, ...]:
    root = Path(lamina.__file__).parent.parent.parent
    modules = dict.fromkeys(p.target.__module__ for p in parts if p.target.__module__.startswith("lamina."))
    files: list[str] = []
    for module in modules:
        *packages, name = module.split(".")[1:]
        files += sorted(str(f.relative_to(root)) for f in root.joinpath("tests", *packages).glob(f"test_{name}*.py"))
    return tuple(dict.fromkeys(files))


def _mean(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.4g} ({min(values):.4g} .. {max(values):.4g})" if min(values) < max(values) else f"{mean:.4g}"
