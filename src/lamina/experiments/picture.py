"""The pictures beside an evidence file: every figure of ours and the baseline's, seed by seed; and the method's own.

An experiment's module may have a function `picture(seed, device) -> Figure` that shows what figures do not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lamina.experiments.harness import Experiment, Measurement, figures, paper_figures


def draw(experiment: Experiment, measurements: Sequence[Measurement], path: Path) -> Path:
    """Draw one small panel a figure, ours and baseline as points, the paper's value as a line; write an SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ours = [figures(m.ours) for m in measurements]
    base = [figures(m.baseline) for m in measurements]
    paper = paper_figures(measurements[0].paper)
    names = list(dict.fromkeys([*ours[0], *base[0]]))
    # No ids drawn at random and no date: the same figures give the same file.
    with mpl.rc_context({"svg.hashsalt": experiment.slug, "font.size": 9}):
        drawing = Figure(figsize=(2.4 * len(names) + 0.6, 2.8), layout="constrained")
        for axis, name in zip(drawing.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for place, (arm, values) in enumerate((("ours", ours), ("baseline", base))):
                points = [v[name] for v in values if name in v]
                axis.plot([place] * len(points), points, "o", alpha=0.6)
                if points:
                    axis.plot([place - 0.2, place + 0.2], [sum(points) / len(points)] * 2, "k-")
                axis.text(place, 1.01, arm, transform=axis.get_xaxis_transform(), ha="center")
            if name in paper:
                axis.axhline(paper[name], linestyle=":", color="gray")
            axis.set_xlim(-0.6, 1.6)
            axis.set_xticks([])
            axis.set_xlabel(experiment.slug if name == "value" else name)
        if measurements[0].unit:
            drawing.supylabel(measurements[0].unit)
        drawing.savefig(path, format="svg", metadata={"Date": None})
    return path


def draw_own(experiment: Experiment, device: torch.device, path: Path) -> Path | None:
    """Write what the experiment's module draws for its first seed as an SVG; None where it draws nothing."""
    make = getattr(sys.modules.get(experiment.run.__module__), "picture", None)
    if make is None:
        return None
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": experiment.slug, "font.size": 9}):
        make(experiment.seeds[0], device).savefig(path, format="svg", metadata={"Date": None})
    return path
