import dataclasses
import json
import math
import re
import sys
import types

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from lamina.data import load
from lamina.errors import LaminaError
from lamina.experiments import evidence, harness, methods, picture, reproduce
from lamina.experiments.bars import parse_bar
from lamina.experiments.harness import Measurement, interval, reported, verdict

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


@pytest.mark.parametrize(
    ("text", "even"),
    [
        ("(ours / baseline) <= 0.8", 1.0),
        ("2 * ours / baseline <= 1.6", 2.0),
        ("100 * (ours / baseline) <= 80", 100.0),
        ("-(ours / baseline) >= -0.8", -1.0),
        ("1 - ours / baseline >= 0.2", 0.0),
        ("(a(ours) / a(baseline) + b(ours) / b(baseline)) / 2 <= 0.85", 1.0),
        ("ours - paper >= 0.1", 0.0),
        ("ours >= 0.9", 0.0),
        ("ours - 0.8 * baseline <= 0", 0.0),
    ],
)
def test_the_neutral_point_is_where_ours_equals_the_baseline(text, even):
    assert parse_bar(text).clauses[0].neutral == even


def test_a_ratio_in_parentheses_points_the_same_way_as_without():
    for text in ("ours / baseline <= 0.8", "(ours / baseline) <= 0.8", "100 * ours / baseline <= 80"):
        bar = parse_bar(text)
        judged = [verdict([Measurement(ours, 1.0)], bar).status for ours in (0.7, 0.9, 1.1)]
        assert judged == ["reproduced", "direction only", "not reproduced"], text


@pytest.mark.parametrize("text", ["ours >= 1 / 0", "ours <= 1e400"])
def test_a_bar_without_a_finite_threshold_is_refused(text):
    with pytest.raises(LaminaError, match="needs a finite number right of"):
        parse_bar(text)


def test_a_clause_is_quoted_as_it_was_written():
    bar = parse_bar("error(ours) <= -0.5 and  a(ours)-b(ours) > 1, 3 seeds")
    assert [c.text for c in bar.clauses] == ["error(ours) <= -0.5", "a(ours)-b(ours) > 1"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An experiment in a module of its own, whose source can be edited."""
    source = tmp_path / "lamina_toy.py"
    source.write_text('"""Toy."""\nfrom lamina.gradients import Mean\nSCALE = 1\n')
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


def test_a_method_may_draw_a_picture_of_its_own(toy, monkeypatch):
    one, into, _ = toy
    into.mkdir()
    assert picture.draw_own(one, torch.device("cpu"), into / "none.svg") is None
    asked = []

    def draw(seed, device):
        asked.append((seed, device.type))
        figure = Figure()
        figure.subplots().plot([1, 2])
        return figure

    module = types.ModuleType("lamina_toy")
    module.picture = draw
    monkeypatch.setitem(sys.modules, "lamina_toy", module)
    paths = [picture.draw_own(one, torch.device("cpu"), into / f"{n}.svg") for n in ("a", "b")]
    assert asked == [(0, "cpu"), (0, "cpu")], "of the first seed"
    assert paths[0].read_text().startswith("<?xml")
    assert paths[0].read_bytes() == paths[1].read_bytes(), "no date, no random ids"


def test_code_comments_do_not_make_evidence_stale_but_code_does(toy):
    one, into, source = toy
    reproduce.reproduce(one, into=into)
    assert list(evidence.code_hashes(one)) == sorted(
        ["lamina.errors", "lamina.gradients.lost_worker", "lamina.gradients.reducer", "lamina.registry", "lamina_toy"]
    )
    source.write_text(source.read_text().replace('"""Toy."""', '"""Another sentence."""\n# and a comment'))
    assert evidence.status(one, into) == "reproduced"
    source.write_text(source.read_text() + 'PARTS = ("norm layer_norm",)\nTESTS: tuple[str, ...] = ()\n')
    assert evidence.status(one, into) == "reproduced", "what only the page shows is no code behind the figures"
    source.write_text(source.read_text().replace("SCALE = 1", "SCALE = 2"))
    assert evidence.status(one, into) == "stale"
    assert "lamina_toy changed since the run" in reproduce.check_one(one, into)[0]


def test_hashes_are_those_of_every_python_version(toy):
    """Quotes inside f-strings are printed differently by Python 3.12, and 3.13 names other fields."""
    one, _, source = toy
    source.write_text("def f(x: int) -> str:\n    return f\"{x!r:>{'4'}} {'a'}\" if x else ''\n")
    assert evidence.code_hashes(one) == {"lamina_toy": "8662e690a2c7eea1"}


def test_the_harness_counts_only_where_it_is_what_is_measured():
    found = harness.experiments()
    assert not [name for name in evidence.code_hashes(found["lamb"]) if name in evidence.MACHINERY]
    measured_itself = evidence.code_hashes(found["reproducibility-process"])
    assert {f"lamina.experiments.{n}" for n in ("bars", "evidence", "harness", "reproduce")} <= measured_itself.keys()


def test_other_data_make_evidence_stale_and_data_that_are_not_here_do_not(toy, tmp_path, monkeypatch):
    one, into, _ = toy
    file = tmp_path / "data" / "text" / "tinyshakespeare.txt"
    file.parent.mkdir(parents=True)
    file.write_text("to be or not to be, " * 200)
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "data"))

    def run(seed, device):
        load("tiny_shakespeare", context=8)
        return Measurement({"a": 2.0}, {"a": 1.0})

    read = dataclasses.replace(one, run=run)
    run.__module__ = one.run.__module__
    stored = json.loads(reproduce.reproduce(read, into=into).read_text())["data"]
    assert list(stored) == ["text/tinyshakespeare.txt"]
    assert evidence.status(read, into) == "reproduced"
    file.write_text("that is the question")
    assert reproduce.check_one(read, into) == ["toy: stale: data text/tinyshakespeare.txt changed since the run"]
    monkeypatch.delenv("LAMINA_DATA")
    assert evidence.status(read, into) == "reproduced"
    assert json.loads(reproduce.reproduce(one, into=into).read_text())["data"] == {}, "another experiment's files"


def test_evidence_under_another_name_is_refused(toy):
    one, into, _ = toy
    path = reproduce.reproduce(one, into=into)
    (into / "other.json").write_text(path.read_text())
    with pytest.raises(LaminaError, match=r"evidence of another experiment: field 'slug' says 'toy'"):
        evidence.read("other", into)


def test_allow_stale_forgives_stale_evidence_and_nothing_else(toy, monkeypatch, capsys):
    one, into, source = toy
    monkeypatch.setattr(reproduce, "experiments", lambda: {"toy": one})
    path = reproduce.reproduce(one, into=into)

    def check(**options):
        capsys.readouterr()
        code = reproduce.main(check=True, into=into, **options)
        return code, capsys.readouterr().out

    assert check() == check(allow_stale=False) == (0, "1 experiments checked, 0 problems\n")
    source.write_text(source.read_text().replace("SCALE = 1", "SCALE = 2"))
    line = "toy: stale: lamina_toy changed since the run\n"
    assert check() == (1, line + "1 experiments checked, 1 problems\n")
    assert check(allow_stale=True) == (0, line + "1 experiments checked, 1 stale, 0 problems\n")
    assert evidence.status(one, into) == "stale"
    # Another bar, which the figures do not even meet, is stale evidence too: it was judged rightly when it was written.
    stricter = dataclasses.replace(one, bar=parse_bar("a(ours) - c(baseline) >= 7, 3 seeds"))
    monkeypatch.setattr(reproduce, "experiments", lambda: {"toy": stricter})
    assert check(allow_stale=True)[0] == 0
    assert "stale: bar changed" in check(allow_stale=True)[1]
    content = json.loads(path.read_text())
    del content["digest"]
    content["status"] = "direction only"
    path.write_text(json.dumps({**content, "digest": evidence.digest(content)}))
    code, out = check(allow_stale=True)
    assert (code, "'status' says direction only, the bar says reproduced" in out) == (1, True)
    path.write_text(path.read_text().replace('"seconds"', '"seconds_"'))
    assert check(allow_stale=True)[0] == 1
    path.unlink()
    code, out = check(allow_stale=True)
    assert (code, "toy: no evidence" in out) == (1, True)


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(LaminaError, match="--check runs nothing"):
        reproduce.main(check=True, smoke=True)
    with pytest.raises(LaminaError, match="--allow-stale belongs to --check"):
        reproduce.main(allow_stale=True)


def test_a_users_mistake_in_an_experiment_is_a_sentence_and_a_fault_of_ours_a_traceback(toy, monkeypatch, capsys):
    one, into, _ = toy

    def without_data(seed, device):
        raise LaminaError("the data set 'sts_b' is not at hand")

    def broken(seed, device):
        raise RuntimeError("a fault")

    for run, shown in ((without_data, False), (broken, True)):
        run.__module__ = "lamina_toy"
        monkeypatch.setattr(reproduce, "experiments", lambda run=run: {"toy": dataclasses.replace(one, run=run)})
        assert reproduce.main(into=into) == 1
        out = capsys.readouterr().out
        assert ("Traceback" in out) is shown
    assert "RuntimeError: a fault" in out


def test_a_methods_page_says_what_its_verdict_rests_on(capsys):
    methods.show("lamb")
    out = capsys.readouterr().out
    assert re.search(r"loss_512\(ours\) / loss_512\(baseline\) <= 0\.8: 0\.\d+ \[0\.\d+, 0\.\d+\]\n", out)
    assert "95 % bootstrap interval of the mean over 3 seeds, nearly smallest to largest" in out
    assert "tests/optim/test_lamb.py" in out
    tests = methods.describe(harness.find("layer-norm")).tests
    assert {"tests/nn/test_layer_norm.py", "tests/nn/test_layer_norm_recurrent.py"} < set(tests)
    assert len(set(tests)) == len(tests)


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
    with pytest.raises(LaminaError, match="no experiment is called 'LAYER_NORM'; did you mean 'layer-norm'"):
        harness.find("LAYER_NORM")


def test_every_method_has_a_page_parts_and_tests():
    for method in methods.methods():
        assert method.title, method.experiment.slug
        assert len(method.page) > 300, f"{method.experiment.slug}: its docstring is its home page"
        # A process, and an explainer that changes no model, have none.
        assert method.parts or method.experiment.slug in ("reproducibility-process", "linear-interpreter")
        assert method.tests, f"{method.experiment.slug}: no test file found"


def test_what_only_some_seeds_measured_is_reported_of_those():
    runs = [Measurement(1.0, 0.0, extra=e) for e in ({"a": 1.0, "b": 5.0}, {"a": 3.0}, {"c": 2.0})]
    assert reported(runs) == {"a": [1.0, 3.0], "b": [5.0], "c": [2.0]}
    assert reported([Measurement(1.0, 0.0)]) == {}
