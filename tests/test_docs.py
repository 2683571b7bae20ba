"""Every Python snippet of the README and the guide runs as printed."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```(?:\n\n((?:    [^\n]*\n)+))?", re.DOTALL)


def snippets():
    for page in PAGES:
        for number, found in enumerate(SNIPPET.finditer(page.read_text(encoding="utf-8")), 1):
            yield pytest.param(found[1], found[2], id=f"{page.name}-{number}")


@pytest.mark.parametrize(("code", "printed"), list(snippets()))
def test_a_snippet_runs_and_prints_what_the_page_says(code, printed, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    if printed is not None:
        expected = [line[4:].rstrip() for line in printed.splitlines()]
        assert [line.rstrip() for line in said.getvalue().splitlines()] == expected


def test_the_readme_is_short_and_shows_code_early():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    assert lines.index("```python") < 20


def test_the_readme_has_the_table_of_today():
    from docs.generate import with_table

    from lamina.experiments import methods

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, methods.methods()) == readme, "make docs writes it anew"
