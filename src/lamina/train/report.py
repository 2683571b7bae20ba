"""`report.html`: one file that shows a run: curves, the model before and after each pass, recipe, machine."""

from __future__ import annotations

import base64
import io as text_io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lamina.train.metrics import read
from lamina.train.outcome import Stage

Row = Mapping[str, Any]

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 table { border-collapse: collapse; margin: .5rem 0 1.5rem }
 td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
 th { text-align: left; font-weight: 600 } td.number { text-align: right; font-variant-numeric: tabular-nums }
 pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px } svg { max-width: 100%; height: auto }
 .quiet { color: #666 } summary { cursor: pointer }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<h2>Before and after</h2>
<p class="quiet">Evaluation loss as each model begins and ends; milliseconds of its forward pass over an evaluation
batch; rate and memory of training.</p>
<table><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in stages %}<tr>{% for cell in row %}<td{% if not loop.first %} class="number"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}</table>
<h2>Curves</h2>
{{ curves | safe }}
{% if rewrites %}<h2>Rewrites</h2>
{% for r in rewrites %}<h3>{{ r.name }}, {{ r.when }}</h3>
<p>{{ r.parameters }}. {{ r.loss }} {{ r.states }}</p>
{{ r.scores | safe }}
<details><summary class="quiet">the decision</summary><pre>{{ r.decision }}</pre></details>
{% endfor %}{% endif %}
{% for name, data in pictures %}<h2>{{ name | capitalize }}</h2>
<p><img alt="{{ name }}" style="max-width: 100%" src="data:image/png;base64,{{ data }}"></p>
{% endfor %}<h2>Recipe</h2><pre>{{ recipe }}</pre>
<h2>Machine</h2><pre>{{ environment }}</pre>
</body></html>
"""


def write(
    folder: str | Path,
    stages: Sequence[Stage] = (),
    *,
    title: str | None = None,
    unit: str = "tokens",
    pictures: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `report.html` from what a run left in its folder; return its path. The file needs no other.

    Args:
        stages: of the run, for the table (loss, parameters, rate and memory before and after each pass).
        title: default: the folder's name.
        unit: what rates count, tokens or rows.
        pictures: what the trained model shows of itself, name -> (H, W, 3) in 0..1.
    """
    from jinja2 import Environment

    folder = Path(folder)
    rows = read(folder / "metrics.jsonl")
    environment = Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(TEMPLATE).render(
        title=title or folder.name,
        summary=_summary(rows),
        header=header(unit),
        stages=[stage_cells(s) for s in stages],
        curves=curves(rows),
        rewrites=[_rewrite(r, d) for r, d in _with_decisions(rows, folder)],
        pictures=[(name, _png(values)) for name, values in (pictures or {}).items()],
        recipe=_text(folder / "recipe.yaml"),
        environment=_text(folder / "environment.json"),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _png(values: Tensor) -> str:
    """Return an image (H, W, 3) in 0..1 as a PNG file, in base64."""
    from matplotlib.image import imsave

    file = text_io.BytesIO()
    imsave(file, values.clamp(0, 1).cpu().numpy(), format="png")
    return base64.b64encode(file.getvalue()).decode()


def header(unit: str) -> tuple[str, ...]:
    """Name the columns of the table that a run ends with.

    loss, end: as the stage begins and ends; ms: forward pass of an evaluation batch; rates count `unit` in training.
    """
    return "after", "loss", "end", "parameters", "ms", f"{unit}/s", "memory", "steps"


def stage_cells(stage: Stage) -> list[str]:
    """Word one stage for the table: see `header`."""
    return [
        stage.name,
        "-" if stage.loss_before is None else f"{stage.loss_before:.4f}",
        "-" if stage.loss_after is None else f"{stage.loss_after:.4f}",
        f"{stage.parameters:,}",
        f"{1000 * stage.latency:.3g}" if stage.latency else "-",
        f"{stage.rate:,.0f}" if stage.rate else "-",
        f"{stage.memory / 2**20:,.0f} MiB" if stage.memory else "-",
        str(stage.steps),
    ]


def curves(rows: Sequence[Row]) -> str:
    """Draw loss, learning rate and speed over the steps as one SVG; dashed lines where a pass ran."""
    steps = [r for r in rows if r["event"] == "step"]
    rate = next((k for k in (steps[0] if steps else ()) if k.endswith("_per_second")), None)
    rewrites = [(r["step"], r["pass"]) for r in rows if r["event"] == "rewrite"]
    figure = figure_of(9, 7)
    loss, lr, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training", linewidth=1)
    found = [r for r in rows if r["event"] == "evaluation"]
    if found:
        loss.plot([r["step"] for r in found], [r["loss"] for r in found], "o-", label="evaluation", markersize=4)
    lr.plot([r["step"] for r in steps], [r["lr"] for r in steps], linewidth=1)
    if rate is not None:
        speed.plot([r["step"] for r in steps], [r[rate] for r in steps], linewidth=1)
        speed.set_ylabel(rate.replace("_per_second", "/s"))
    for axis in (loss, lr, speed):
        axis.grid(alpha=0.3)
        for step, _ in rewrites:
            axis.axvline(step, linestyle="--", color="gray", linewidth=1)
    for step, name in rewrites:
        loss.text(step, 1.01, name, transform=loss.get_xaxis_transform(), ha="center", fontsize=8)
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    lr.set_ylabel("learning rate")
    speed.set_xlabel("step")
    return svg_of(figure)


def score_chart(scores: Mapping[str, Sequence[float]], gone: Mapping[str, Sequence[int]]) -> str:
    """Draw a pass's scores per block, one group of bars a kind; what went is hatched."""
    kinds = [k for k, values in scores.items() if values]
    figure = figure_of(7, 2.4)
    axis = figure.subplots()
    for place, kind in enumerate(kinds):
        at = [i + place / (len(kinds) + 1) for i in range(len(scores[kind]))]
        bars = axis.bar(at, [v or 0.0 for v in scores[kind]], width=1 / (len(kinds) + 1), label=kind)
        for index in gone.get(kind, ()):
            bars[index].set_hatch("///")
            bars[index].set_edgecolor("black")
    axis.set_xlabel("block (hatched: gone)")
    axis.set_ylabel("score")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


def _rewrite(row: Row, decision: Row | None) -> dict[str, str]:
    before, after = row["parameters_before"], row["parameters_after"]
    at = row["at"]
    return {
        "name": row["pass"],
        "when": at if isinstance(at, str) else f"at {100 * at:.0f} % of training (step {row['step']})",
        "parameters": f"{before:,} → {after:,} parameters ({100 * (after / before - 1):+.1f} %)",
        "loss": _losses(row),
        "states": _states(row),
        "scores": _scores(decision),
        "decision": json.dumps(decision, indent=1) if decision is not None else "not stored",
    }


def _losses(row: Row) -> str:
    before, after = row.get("loss_before"), row.get("loss_after")
    return "" if before is None or after is None else f"Evaluation loss {before:.4f} → {after:.4f} at that moment."


def _states(row: Row) -> str:
    if "kept" not in row:
        return ""
    counts = ", ".join(f"{len(row[k])} {k}" for k in ("derived", "fresh", "dropped"))
    return f"Optimizer state: {row['kept']} parameters kept, {counts}."


def _scores(decision: Row | None) -> str:
    scores = (decision or {}).get("scores")
    if decision is None or not isinstance(scores, Mapping):
        return ""
    lists = {k: v for k, v in scores.items() if isinstance(v, list)}
    gone = {k: decision.get(k, decision.get(f"{k}s", [])) for k in lists}
    return score_chart(lists, gone) if lists else ""


def _with_decisions(rows: Sequence[Row], folder: Path) -> list[tuple[Row, Row | None]]:
    """Pair each rewrite with its decision, from the saved model's history."""
    found = [r for r in rows if r["event"] == "rewrite"]
    saved = folder / "model" / "architecture.json"
    records = json.loads(saved.read_text(encoding="utf-8"))["rewrites"] if saved.exists() else []
    decisions = [r["decision"] for r in records][-len(found) :] if found else []
    return [(r, decisions[i] if len(decisions) == len(found) else None) for i, r in enumerate(found)]


def _summary(rows: Sequence[Row]) -> str:
    end = next((r for r in reversed(rows) if r["event"] == "end"), None)
    if end is None:
        return "The run did not end."
    evaluation = "" if end["evaluation"] is None else f", evaluation loss {end['evaluation']:.4f}"
    return f"{end['step']} steps, training loss {end['loss']:.4f}{evaluation}."


def figure_of(width: float, height: float) -> Any:
    """Return an empty figure of so many inches, drawn without a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg_of(figure: Any) -> str:
    """Draw a figure as SVG to stand in a page; the same figure gives the same bytes."""
    import matplotlib as mpl

    buffer = text_io.StringIO()
    # The same run draws the same bytes: no ids at random, no date.
    with mpl.rc_context({"svg.hashsalt": "lamina"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else "-"
