import json
import re
from html.parser import HTMLParser

import pytest

from lamina.train import report
from lamina.train.outcome import Stage

ROWS = [
    {"event": "step", "step": 1, "loss": 5.0, "lr": 0.1, "tokens_per_second": 100.0},
    {"event": "evaluation", "step": 1, "loss": 4.5},
    {
        "event": "rewrite",
        "pass": "drop_attention",
        "at": 0.6,
        "parameters_before": 1000,
        "parameters_after": 750,
        "kept": 7,
        "derived": ["a"],
        "fresh": [],
        "dropped": ["b", "c"],
        "step": 6,
        "loss_before": 4.0,
        "loss_after": 4.25,
    },
    {"event": "step", "step": 10, "loss": 3.0, "lr": 0.01, "tokens_per_second": 120.0},
    {"event": "end", "step": 10, "loss": 3.0, "evaluation": 3.125},
]
STAGES = [
    Stage("start", 1000, 5.5, 4.0, 6, 2.0, 400, 0.02, 3 * 2**20),
    Stage("drop_attention", 750, 4.25, 3.125, 4, 1.0, 300, 0.0125, 2 * 2**20),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "recipe.yaml").write_text("model: <transformer>\n")
    (tmp_path / "model").mkdir()
    decision = {"attention": [1], "mlp": [], "scores": {"attention": [0.5, 0.9], "mlp": [0.1, 0.2]}}
    (tmp_path / "model" / "architecture.json").write_text(json.dumps({"rewrites": [{"decision": decision}]}))
    return tmp_path


class Checker(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_says_what_the_run_did_and_needs_no_other_file(folder):
    page = report.write(folder, STAGES, title="A <run>").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    text = " ".join("".join(checker.text).split())
    for words in (
        "A <run>",
        "10 steps, training loss 3.0000, evaluation loss 3.1250.",
        "1,000 → 750 parameters (-25.0 %)",
        "Evaluation loss 4.0000 → 4.2500 at that moment.",
        "7 parameters kept, 1 derived, 0 fresh, 2 dropped",
        "at 60 % of training (step 6)",
        "model: <transformer>",
    ):
        assert words in text, words
    assert "<run>" not in page
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=\"(?!#)", page.replace("xlink:href", "href"))


def test_the_table_has_rate_and_memory(folder):
    assert report.stage_cells(STAGES[1]) == [
        "drop_attention", "4.2500", "3.1250", "750", "12.5", "300", "2 MiB", "4",
    ]  # fmt: skip
    assert report.stage_cells(Stage("start", 5)) == ["start", "-", "-", "5", "-", "-", "-", "0"]


def test_a_run_that_was_cut_short_still_has_a_report(folder):
    (folder / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + '{"event": "st')
    page = report.write(folder).read_text()
    assert "The run did not end." in page
    assert page.count("<svg") == 1


def test_the_same_run_gives_the_same_bytes(folder):
    assert report.write(folder, STAGES).read_bytes() == report.write(folder, STAGES).read_bytes()


def test_curves_hold_the_numbers(monkeypatch):
    seen = {}
    monkeypatch.setattr(report, "svg_of", lambda figure: seen.setdefault("figure", figure) and "")
    report.curves(ROWS)
    loss, lr, speed = seen["figure"].axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 5.0], [10, 3.0]]
    assert loss.lines[1].get_xydata().tolist() == [[1, 4.5]]
    assert lr.lines[0].get_ydata().tolist() == [0.1, 0.01]
    assert speed.lines[0].get_ydata().tolist() == [100.0, 120.0]
    assert [line.get_xdata()[0] for line in loss.lines[2:]] == [6]
