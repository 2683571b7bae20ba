"""A page that shows the linear system behind one input: votes, bias shares, rows, columns, singular images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.errors import LaminaError, ShapeError
from lamina.verify._frozen_model import Rules
from lamina.verify.linear_interpreter import LinearInterpreter
from lamina.verify.linear_scopes.call import Rule

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 table { border-collapse: collapse; margin: .5rem 0 1.5rem }
 td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
 th { text-align: left; font-weight: 600 } td + td { text-align: right; font-variant-numeric: tabular-nums }
 img { max-width: 100%; height: auto } .quiet { color: #666 }
</style></head><body>
<h1>{{ title }}</h1>
<p>At this input the model is the affine map y = F x + r. {{ summary }}</p>
<h2>Where each output comes from</h2>
<table><tr><th>output</th><th>value</th><th>from the input, F x</th><th>from biases, r</th><th>share of biases, r / y</th></tr>
{% for row in shares %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% for section in sections %}<h2>{{ section.title }}</h2>
<p class="quiet">{{ section.text }}</p>
<img alt="{{ section.title }}" src="data:image/png;base64,{{ section.image }}">
{% endfor %}
<h2>Units whose decisions are frozen</h2>
<table><tr><th>module</th><th>function</th><th>largest gain</th></tr>
{% for unit in units %}<tr><td>{{ unit.path }}</td><td>{{ unit.function }}</td><td>{{ "%.3g"|format(unit.gain) }}</td></tr>{% endfor %}
</table>
</body></html>
"""  # noqa: E501

SHOWN_UNITS = 40

TEXTS = {
    "rows": "Left: how the output weighs every input. Right: its votes, row * x; with r they add up to the output. "
    "Red counts for it, blue against.",
    "columns": "Where one unit of an input goes.",
    "singular": "The directions of the input that F enlarges most (above), and what it makes of them (below).",
}


def explain(
    model: nn.Module,
    x0: Tensor | Batch,
    folder: str | Path = "explain",
    *,
    outputs: Sequence[int] | None = None,
    rows: bool = True,
    columns: bool = True,
    svd: int = 0,
    count: int = 3,
    rule: Rule = "secant",
    strict: bool = True,
    rules: Rules | None = None,
    title: str | None = None,
) -> Path:
    """Write `explain.html` with its pictures (PNG) and arrays (.npy) into a folder; return the page's path.

    Arrays: `input`, `output`, `bias`; `rows` and `votes` (one an output shown), `columns` (one an input shown),
    `singular_values`, `left`, `right` (float64); the others in the model's precision, float32 at least. The page itself
    needs no other file.

    Args:
        x0: one input, as of `LinearInterpreter`; so are rule, strict, rules.
        outputs: flat indices to show; None: the `count` largest of a vector, or of an image the pixel in the middle, at
            the strongest edge and in the flattest place.
        rows: show what outputs look at.
        columns: show where the `count` inputs go that vote strongest for the first output shown.
        svd: singular triples to show; compute in float64 (`model.double()`) where digits matter.
        count: how many outputs and inputs are chosen.
        title: default: the model's class.
    Raises:
        LaminaError: as `LinearInterpreter`; count or svd out of range. ShapeError: no such output.
    """
    if count < 1 or svd < 0:
        raise LaminaError(f"count must be at least 1 and svd at least 0, got {count} and {svd}")
    system = LinearInterpreter(model, x0, rule, strict=strict, rules=rules)
    chosen = list(outputs) if outputs is not None else _outputs(system.output, count)
    if not chosen or not all(0 <= i < system.output.numel() for i in chosen):
        raise ShapeError(f"outputs must be among 0..{system.output.numel() - 1}, got {chosen}")
    arrays, figures = _collect(system, chosen, rows, columns, svd, count)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", _wide(array).numpy(), allow_pickle=False)
    pictures = {name: _png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    page = folder / "explain.html"
    page.write_text(_page(system, chosen, pictures, title or type(model).__name__), encoding="utf-8")
    return page


def _collect(
    system: LinearInterpreter, chosen: Sequence[int], rows: bool, columns: bool, svd: int, count: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compute what is shown; return arrays and figures by name."""
    x, y = _single(system.x0), _single(system.output)
    arrays = {"input": x, "output": y, "bias": _single(system.bias)}
    figures = {"input": _figure([[("input", x), ("output", y)]])}
    # Columns are chosen by the votes for the first output.
    looked = chosen if rows else chosen[:1] if columns else ()
    filters = [_single(system.row(i)) for i in looked]
    votes = [f * x for f in filters]
    if rows:
        arrays |= {"rows": torch.stack(filters), "votes": torch.stack(votes)}
        names = [_place(i, y) for i in chosen]
        figures["rows"] = _figure(
            [[(f"row of {n}", f), (f"votes for {n}", v)] for n, f, v in zip(names, filters, votes, strict=True)]
        )
    if columns:
        places = votes[0].abs().flatten().topk(min(count, x.numel())).indices.tolist()
        found = torch.stack([_single(system.column(i)) for i in places])
        arrays["columns"] = found
        figures["columns"] = _figure([[(f"column of {_place(i, x)}", c) for i, c in zip(places, found, strict=True)]])
    if svd:
        triples = system.svd(svd)
        arrays |= {"singular_values": triples.values, "left": triples.left, "right": triples.right}
        above = [(f"{v:.3g}", r) for v, r in zip(triples.values.tolist(), triples.right, strict=True)]
        figures["singular"] = _figure([above, [("", left) for left in triples.left]])
    return arrays, figures


def _outputs(output: Tensor, count: int) -> list[int]:
    """Choose outputs worth a look."""
    y = _single(output)
    if y.dim() < 2 or min(y.shape[-2:]) < 3:
        found: list[int] = output.flatten().topk(min(count, output.numel())).indices.tolist()
        return found
    image = y.reshape(-1, *y.shape[-2:])[0].float()
    down, across = torch.gradient(image)
    steep = (down.square() + across.square())[1:-1, 1:-1]
    height, width = image.shape
    middle = height // 2 * width + width // 2
    extreme = [divmod(int(place), width - 2) for place in (steep.argmax(), steep.argmin())]
    places = [middle, *((i + 1) * width + j + 1 for i, j in extreme)]
    return list(dict.fromkeys(places))[:count]


def _page(system: LinearInterpreter, chosen: Sequence[int], pictures: Mapping[str, bytes], title: str) -> str:
    from jinja2 import Environment

    found = system.check()
    y, r = system.output.flatten(), system.bias.flatten()
    shares = [
        [_place(i, _single(system.output)), *(f"{float(v):.4g}" for v in (y[i], y[i] - r[i], r[i], r[i] / y[i]))]
        for i in chosen
    ]
    summary = (
        f"The map gives the model's output to {found['consistency']:.1g} of its largest value; the largest gain of a "
        f"unit is {found['max_gain']:.3g}."
    )
    if found["unknown"]:
        summary += f" Taken by their tangents: {', '.join(found['unknown'])}."
    titles = {"input": "Input and output", "rows": "Rows", "columns": "Columns", "singular": "Singular triples"}
    sections = [
        {"title": titles[name], "text": TEXTS.get(name, ""), "image": base64.b64encode(picture).decode()}
        for name, picture in pictures.items()
    ]
    environment = Environment(autoescape=True, trim_blocks=True)
    units = sorted(system.units(), key=lambda unit: -unit.gain)[:SHOWN_UNITS]
    return environment.from_string(TEMPLATE).render(
        title=title, summary=summary, shares=shares, sections=sections, units=units
    )


def _place(index: int, like: Tensor) -> str:
    if like.dim() < 2:
        return str(index)
    return str(tuple(int(i) for i in np.unravel_index(index, tuple(like.shape))))


def _wide(x: Tensor) -> Tensor:
    """Return numbers that numpy knows as they are; half precision in float32."""
    return x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))


def _single(x: Tensor) -> Tensor:
    return x[0] if x.dim() > 1 else x


def _figure(panels: Sequence[Sequence[tuple[str, Tensor]]]) -> Any:
    """Draw rows of titled arrays: vectors as bars, others as images; channels are added up."""
    from matplotlib.figure import Figure

    across = max(len(row) for row in panels)
    figure = Figure(figsize=(2.6 * across, 2.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), across, squeeze=False)
    for row, places in zip(panels, axes, strict=True):
        for axis in places[len(row) :]:
            axis.set_axis_off()
        for (name, values), axis in zip(row, places, strict=False):
            _draw(axis, values.detach().float().cpu())
            axis.set_title(name, fontsize=9)
    return figure


def _draw(axis: Any, values: Tensor) -> None:
    if values.dim() < 2:
        axis.bar(range(values.numel()), values.flatten().numpy(), width=1.0)
        axis.axhline(0, color="gray", linewidth=0.5)
        return
    image = values.reshape(-1, *values.shape[-2:]).sum(0)
    reach = float(image.abs().max()) or 1.0
    axis.imshow(image.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # The same figures give the same bytes.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
