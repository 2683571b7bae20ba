"""The table of a search, and one file that shows it: every row, the dominated ones marked, and the front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.search.trial import Summary, Trial, summaries
from lamina.train.report import figure_of, svg_of

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 table { border-collapse: collapse; margin: .5rem 0 1.5rem } .dominated { color: #888 }
 td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left } svg { max-width: 100%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<table><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row, dominated in rows %}<tr{% if dominated %} class="dominated"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{{ front | safe }}
{% if failed %}<h2>Trials that could not run</h2><ul>{% for t in failed %}<li>{{ t.number }}: {{ t.error }}</li>{% endfor %}</ul>{% endif %}
</body></html>
"""  # noqa: E501


def header(rows: Sequence[Summary], accuracy: bool) -> list[str]:
    """Name the columns: the choices by the last part of their paths where that is clear, then what was measured.

    Milliseconds are of a batch of 1 and of 32 rows; time is that of training; on the front is what nothing dominates.
    """
    paths = list(dict.fromkeys(p for r in rows for p in r.chosen))
    short = [p.rpartition(".")[2] for p in paths]
    names = [s if short.count(s) == 1 else p for s, p in zip(short, paths, strict=True)]
    measured = ["accuracy" if accuracy else "loss", "parameters", "ms, 1", "ms, 32", "memory", "time"]
    return [*names, *measured, "front"]


def cells(row: Summary, paths: Sequence[str], accuracy: bool) -> list[str]:
    """Word one summary."""
    chosen = [str(row.chosen.get(path, "-")) for path in paths]
    if row.score is None:
        return [*chosen, "failed", "-", "-", "-", "-", "-", ""]
    spread = f" ± {row.spread:.4f}" if row.trials > 1 else ""
    return [
        *chosen,
        f"{row.score if accuracy else -row.score:.4f}{spread}",
        f"{row.costs['parameters']:,.0f}",
        f"{1e3 * row.costs['latency_1']:.2f}",
        f"{1e3 * row.costs['latency_32']:.1f}",
        f"{row.costs['peak_bytes'] / 2**20:,.1f} MiB",
        f"{row.seconds:,.0f} s",
        "" if row.dominated else "yes",
    ]


def show(trials: Sequence[Trial], path: Path) -> None:
    """Print the table, and where the report is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    names, rows = _table(trials)
    table = Table(*names, title=str(path.parent), pad_edge=False, box=SIMPLE_HEAD)
    for row, dominated in rows:
        table.add_row(*row, style="dim" if dominated else None)
    Console().print(table)
    for trial in trials:
        if trial.error is not None:
            print(f"trial {trial.number} could not run: {trial.error}")
    print(f"report: {path}")


def write(folder: Path, trials: Sequence[Trial]) -> Path:
    """Write `report.html` into the search's folder; return its path. The file needs no other."""
    from jinja2 import Environment

    names, rows = _table(trials)
    failed = [t for t in trials if t.error is not None]
    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE).render(
        title=folder.name,
        summary=f"{len(trials)} trials. A row is a mean over seeds; grey rows are dominated: another one is at least "
        "as good in score, parameters, latency and memory, and better in one. Milliseconds are those of a forward pass "
        "of 1 and of 32 rows, memory is weights and live tensors in the latter.",
        header=names,
        rows=rows,
        failed=failed,
        front=front(summaries(trials)),
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def front(rows: Sequence[Summary]) -> str:
    """Draw score against latency and parameters as SVG, the rows that nothing dominates joined by a line."""
    good = [r for r in rows if r.score is not None]
    figure = figure_of(9, 3.6)
    for axis, cost, label in zip(
        figure.subplots(1, 2, sharey=True), ("latency_1", "parameters"), ("seconds, batch 1", "parameters"), strict=True
    ):
        kept = sorted((r for r in good if not r.dominated), key=lambda r: r.costs[cost])
        axis.plot([r.costs[cost] for r in kept], [r.score for r in kept], "-", color="tab:blue", linewidth=1)
        for r in good:
            color = "lightgray" if r.dominated else "tab:blue"
            axis.errorbar(r.costs[cost], r.score, yerr=r.spread, fmt="o", color=color, capsize=3)
            axis.annotate(", ".join(map(str, r.chosen.values())), (r.costs[cost], r.score), fontsize=7)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("score")
    return svg_of(figure)


def _table(trials: Sequence[Trial]) -> tuple[list[str], list[tuple[list[str], bool]]]:
    rows: list[Summary] = summaries(trials)
    accuracy = any("accuracy" in t.metrics for t in trials)
    paths: list[Any] = list(dict.fromkeys(p for r in rows for p in r.chosen))
    return header(rows, accuracy), [(cells(r, paths, accuracy), r.dominated) for r in rows]
