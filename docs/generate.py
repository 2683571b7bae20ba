"""Write the generated pages of the docs: one a method, the method table, all parts, the benchmarks.

Run by `make docs` before mkdocs; nothing it writes is kept in git but the README's table of methods.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lamina import registry
from lamina.experiments import evidence, methods
from lamina.experiments.harness import figures, paper_figures, reported

DOCS = Path(__file__).parent
ROOT = DOCS.parent
MARKS = ("<!-- methods: written by make docs -->\n", "<!-- /methods -->\n")
"""Between which the README's table stands."""


def main() -> None:
    found = methods.methods()
    folder = DOCS / "methods"
    folder.mkdir(exist_ok=True)
    for method in found:
        (folder / f"{method.experiment.slug}.md").write_text(method_page(method), encoding="utf-8")
        for _, picture in pictures(method.experiment.slug):
            shutil.copy(picture, folder / picture.name)
    (folder / "index.md").write_text(method_table(found), encoding="utf-8")
    (DOCS / "parts.md").write_text(parts_page(), encoding="utf-8")
    (DOCS / "benchmarks.md").write_text(benchmarks_page(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), found), encoding="utf-8")


def with_table(readme: str, found: list[methods.Method]) -> str:
    """Return the README with today's table of methods."""
    rows = ["| method | what it is | parts |", "| --- | --- | --- |"]
    # A module may hold a second experiment on the same method.
    first = {m.experiment.run.__module__: m for m in reversed(found)}
    for m in sorted(first.values(), key=lambda m: m.experiment.slug):
        # One name may stand for parts of two kinds.
        names = list(dict.fromkeys(f"`{p.name}`" for p in m.parts))
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        rows.append(f"| {m.experiment.slug} | {m.title} | {', '.join(names[:4])}{more} |")
    before, _, rest = readme.partition(MARKS[0])
    return before + MARKS[0] + "\n".join(rows) + "\n" + MARKS[1] + rest.partition(MARKS[1])[2]


def method_table(found: list[methods.Method]) -> str:
    rows = ["# Methods", "", "Status is computed from the evidence, never typed.", ""]
    rows += ["| method | what it is | parts | status |", "| --- | --- | --- | --- |"]
    for m in found:
        parts = ", ".join(f"{p.kind} `{p.name}`" for p in m.parts)
        slug = m.experiment.slug
        rows.append(f"| [{slug}]({slug}.md) | {m.title} | {parts} | {evidence.status(m.experiment)} |")
    return "\n".join(rows) + "\n"


def method_page(method: methods.Method) -> str:
    one = method.experiment
    lines = [f"# {method.title}", "", method.page, ""]
    lines += ["## Parts", ""] if method.parts else []
    lines += [f"- {p.kind} `{p.name}{methods.signature(p)}`: {methods.first_line(p)}" for p in method.parts]
    sources = sorted({p.source for p in method.parts if p.source})
    lines += [
        "",
        "## What we measured",
        "",
        f"Claim from: {one.source}. Bar, set before the run: `{one.bar.text}`.",
        "",
    ]
    lines += measured(method)
    lines += ["", "## Tests", "", *(f"- `{t}`" for t in method.tests)]
    lines += ["", "## Sources", "", *(f"- {s}" for s in sources)] if sources else []
    return "\n".join(lines) + "\n"


def measured(method: methods.Method) -> list[str]:
    one = method.experiment
    found = evidence.read(one.slug)
    if found is None:
        return ["No evidence yet: `lamina reproduce " + one.slug + "`."]
    runs, where = found.measurements, found.content["environment"]
    lines = [
        f"**Status: {evidence.status(one)}**",
        "",
        *(f"- {line}" for line in methods.verdict_lines(one)),
        "",
        "| figure | seed | ours | baseline | paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for seed, run in zip(found.content["seeds"], runs, strict=True):
        base, paper = figures(run.baseline), paper_figures(run.paper)
        for name, value in figures(run.ours).items():
            other = f"{base[name]:.4g}" if name in base else "-"
            claim = f"{paper[name]:g}" if name in paper else "-"
            lines.append(f"| {name} | {seed} | {value:.4g} | {other} | {claim} |")
    if beside := reported(runs):
        lines += ["", "Reported beside the bar, mean over seeds:", "", "| figure | value |", "| --- | --- |"]
        lines += [f"| {n} | {sum(values) / len(values):.4g} |" for n, values in beside.items()]
    if isinstance(runs[0].paper, str):
        lines += ["", f"The paper: {runs[0].paper}"]
    for title, picture in pictures(one.slug):
        lines += ["", f"![{title}]({picture.name})"]
    packages = ", ".join(f"{k} {v}" for k, v in where["packages"].items())
    lines += [
        "",
        f"{where['processor']}, {where['cores']} cores; {packages}; {found.content['seconds']:.0f} s; commit {where['commit']}.",
    ]
    return lines


def pictures(slug: str) -> list[tuple[str, Path]]:
    """Return title and file of the pictures that `lamina reproduce` drew of a method."""
    named = {f"{slug}-picture.svg": "what it does", f"{slug}.svg": "ours and baseline by seed"}
    found = [(title, evidence.folder() / name) for name, title in named.items()]
    return [(title, path) for title, path in found if path.exists()]


def parts_page() -> str:
    rows = ["# Parts", "", "Everything a recipe can name, from the registry.", ""]
    rows += ["| kind | name | what it is |", "| --- | --- | --- |"]
    rows += [
        f"| {p.kind} | `{p.name}` | {methods.first_line(p).replace('|', chr(92) + '|')} |" for p in registry.parts()
    ]
    return "\n".join(rows) + "\n"


def benchmarks_page() -> str:
    rows = [
        "# Benchmarks",
        "",
        "Paired, alternating runs in one process; ratio of medians, so below 1 is faster or leaner.",
        "",
    ]
    rows += ["| what | ours | against | ratio | spread | goal |", "| --- | --- | --- | --- | --- | --- |"]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            low, high = row["spread"]
            rows.append(
                f"| {row['what']} | {row['ours']} | {row['peer']} | {row['ratio']:.3f} | {low:.3f} .. {high:.3f} | {row['goal']} |"
            )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
