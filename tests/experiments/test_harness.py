import json
import math
import sys
import types

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lamina.errors import LaminaError
from lamina.experiments import evidence, harness, methods, reproduce
from lamina.experiments.bars import parse_bar
from lamina.experiments.harness import Measurement, interval, verdict

SIMPLE = parse_bar("ours - baseline >= 0.1, 3 seeds")


def measured(*ours, baseline=0.0):
    return [Measurement(o, baseline) for o in ours]


@pytest.mark.parametrize(
    ("text", "ours", "baseline", "value"),
    [
        ("a(ours) - a(baseline) >= 0.02", {"a": 3}, {"a": 1}, 2.0),
        ("a(ours) - 2 * a(baseline) + 1 >= 0", {"a": 3}, {"a": 1}, 2.0),
        ("a(ours) / a(baseline) <= 0.8", {"a": 3}, {"a": 4}, 0.75),
        ("(a(ours) + b(ours)) / 2 <= 1", {"a": 3, "b": 5}, {"a": 0}, 4.0),
        ("-a(ours) > -3e0", {"a": 2}, {}, -2.0),
        ("a(ours) - a(ours) - a(ours) > 0", {"a": 2}, {}, -2.0),
        ("8 / a(ours) / a(ours) > 0", {"a": 2}, {}, 2.0),
    ],
)
def test_a_bar_computes_what_it_says(text, ours, baseline, value):
    assert parse_bar(text).clauses[0].value(ours, baseline, {}) == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ours", "expects >= or <= or > or <, not its end"),
        ("ours >= 1, x seeds", "expects a number of seeds"),
        ("ours >= baseline", "needs a constant right of '>='"),
        ("a(theirs) >= 1", "expects ours or baseline or paper, not theirs"),
        ("ours >= 1 or ours <= 2", "does not expect or"),
        ("ours >= 1 ; import os", "does not know ;"),
        ("__import__('os') >= 1", "expects ours or baseline or paper|does not know"),
        ("", "expects more, not its end"),
    ],
)
def test_a_bar_that_makes_no_sense_is_refused(text, sentence):
    with pytest.raises(LaminaError, match=sentence):
        parse_bar(text)


def test_an_unmeasured_figure_is_named():
    with pytest.raises(LaminaError, match=r"acuracy\(ours\).*did you mean 'accuracy'"):
        verdict([Measurement({"accuracy": 1.0}, 0.0)], parse_bar("acuracy(ours) >= 1"))


def test_the_interval_of_few_values_is_within_them_and_of_many_is_the_textbook_s():
    low, mean, high = interval([1.0, 2.0, 4.0])
    assert 1.0 <= low < mean < high <= 4.0
    g = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=g, dtype=torch.float64)
    low, mean, high = interval(values.tolist())
    half = 1.96 * values.std().item() / math.sqrt(400)
    assert abs((high - low) / 2 - half) < 0.1 * half
    assert interval([3.0]) == (3.0, 3.0, 3.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=5), st.floats(0.0, 0.5))
def test_verdict_moves_with_the_margin(values, margin):
    bar = parse_bar(f"ours - baseline >= {margin:.6f}, 3 seeds")
    low, mean, _ = interval(values)
    assume(abs(low - margin) > 1e-4)
    assume(abs(mean) > 1e-4)
    expected = "reproduced" if low >= margin else "direction only" if mean > 0 else "not reproduced"
    assert verdict(measured(*values), bar).status == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(0.01, 2.0))
def test_a_stronger_baseline_never_raises_the_verdict(values, stronger):
    rank = {"not reproduced": 0, "direction only": 1, "reproduced": 2}
    before = verdict(measured(*values), SIMPLE).status
    after = verdict(measured(*values, baseline=stronger), SIMPLE).status
    assert rank[after] <= rank[before]


def test_a_missing_seed_or_a_nan_gives_no_status():
    assert verdict(measured(1.0, 1.0), SIMPLE).status is None
    assert "2 seeds measured" in verdict(measured(1.0, 1.0), SIMPLE).reason
    assert verdict(measured(1.0, 1.0, float("nan")), SIMPLE).status is None


def test_ratio_bars_take_one_as_the_neutral_point_and_every_clause_counts():
    ratio = parse_bar("ours / baseline <= 0.8")
    assert verdict([Measurement(0.5, 1.0)], ratio).status == "reproduced"
    assert verdict([Measurement(0.9, 1.0)], ratio).status == "direction only"
    assert verdict([Measurement(1.1, 1.0)], ratio).status == "not reproduced"
    both = parse_bar("a(ours) >= 1 and b(ours) >= 1")
    assert verdict([Measurement({"a": 2.0, "b": 0.5}, 0.0)], both).status == "direction only"
    assert verdict([Measurement({"a": 2.0, "b": -0.5}, 0.0)], both).status == "not reproduced"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An experiment in a module of its own, whose source can be edited."""
    source = tmp_path / "lamina_toy.py"
    source.write_text('"""Toy."""\nfrom lamina.gradients import Median\nSCALE = 1\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(harness, "_experiments", {})
    evidence._source.cache_clear()

    def run(seed, device):
        noise = torch.rand(()).item()
        return Measurement({"a": 2.0 + 0.1 * noise}, {"a": 1.0}, paper={"a": 1.5}, extra={"b": 3.0})

    run.__module__ = "lamina_toy"
    harness.experiment("toy", source="table 1", bar="a(ours) - a(baseline) >= 0.5, 3 seeds")(run)
    yield harness._experiments["toy"], tmp_path / "evidence", source
    sys.modules.pop("lamina_toy", None)
    evidence._source.cache_clear()


def test_reproduce_writes_evidence_that_checks_and_the_same_seed_gives_the_same_figures(toy):
    one, into, _ = toy
    path = reproduce.reproduce(one, into=into)
    first = json.loads(path.read_text())
    assert first["status"] == "reproduced"
    assert first["measurements"][0]["ours"]["a"] > 2.0
    assert first["environment"]["packages"]["torch"] == torch.__version__
    assert (into / "toy.svg").read_text().startswith("<?xml")
    assert reproduce.check_one(one, into) == []
    assert evidence.status(one, into) == "reproduced"
    assert json.loads(reproduce.reproduce(one, into=into).read_text())["measurements"] == first["measurements"]


def test_code_comments_do_not_make_evidence_stale_but_code_does(toy):
    one, into, source = toy
    reproduce.reproduce(one, into=into)
    assert list(evidence.code_hashes(one)) == sorted(
        ["lamina.errors", "lamina.gradients.reducer", "lamina.gradients.robust", "lamina.registry", "lamina_toy"]
    )
    source.write_text(source.read_text().replace('"""Toy."""', '"""Another sentence."""\n# and a comment'))
    assert evidence.status(one, into) == "reproduced"
    source.write_text(source.read_text().replace("SCALE = 1", "SCALE = 2"))
    assert evidence.status(one, into) == "stale"
    assert "lamina_toy changed since the run" in reproduce.check_one(one, into)[0]


def test_an_edited_figure_is_found(toy):
    one, into, _ = toy
    path = reproduce.reproduce(one, into=into)
    path.write_text(path.read_text().replace('"seconds"', '"seconds_"'))
    assert "edited after the run" in reproduce.check_one(one, into)[0]


def test_one_failing_experiment_hides_no_other_and_the_exit_code_says_so(toy, monkeypatch):
    _, into, _ = toy

    def broken(seed, device):
        raise RuntimeError("no data")

    broken.__module__ = "lamina_toy"
    harness.experiment("aa-broken", source="-", bar="ours >= 1", seeds=(0,))(broken)
    monkeypatch.setattr(reproduce, "experiments", lambda: dict(sorted(harness._experiments.items())))
    assert reproduce.main(into=into) == 1
    assert (into / "toy.json").exists()
    assert not (into / "aa-broken.json").exists()


def test_smoke_runs_one_seed_and_writes_nothing(toy, monkeypatch):
    _, into, _ = toy
    seen = []

    def run(seed, device):
        seen.append((seed, harness.smoke()))
        return Measurement(1.0, 0.0)

    run.__module__ = "lamina_toy"
    harness.experiment("short", source="-", bar="ours >= 1")(run)
    monkeypatch.setattr(reproduce, "experiments", lambda: {"short": harness._experiments["short"]})
    assert reproduce.main(smoke=True, into=into) == 0
    assert seen == [(0, True)]
    assert not into.exists()
    assert not harness.smoke()


def test_two_experiments_of_one_name_and_too_few_seeds_are_refused(toy):
    other = types.FunctionType((lambda seed, device: Measurement(1, 0)).__code__, {"__name__": "elsewhere"})
    other.__module__ = "elsewhere"
    with pytest.raises(LaminaError, match="two experiments are called 'toy'"):
        harness.experiment("toy", source="-", bar="ours >= 1")(other)
    with pytest.raises(LaminaError, match="has 2 seeds, its bar asks for 3"):
        harness.experiment("few", source="-", bar="ours >= 1, 3 seeds", seeds=(0, 1))(other)


def test_an_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(LaminaError, match="no experiment is called"):
        harness.find("no-such-method")


def test_every_method_has_a_page_parts_and_tests():
    for method in methods.methods():
        assert method.title, method.experiment.slug
        assert len(method.page) > 300, f"{method.experiment.slug}: its docstring is its home page"
        assert method.parts or method.experiment.slug == "reproducibility-process", method.experiment.slug
        assert method.tests, f"{method.experiment.slug}: no test file found"
