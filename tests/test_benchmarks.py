"""The benchmarks are run by hand; what they take from the recipe and the package must still fit."""

import pytest


@pytest.mark.parametrize("name", ["bare loop", "lamina Trainer"])
def test_the_trainers_benchmark_still_trains_the_default_recipe(name, tmp_path, monkeypatch):
    from benchmarks.trainer import SMALL, fit, task

    monkeypatch.chdir(tmp_path)
    seconds, _ = fit(name, task(*SMALL, windows=1))
    assert len(seconds) == 1
    assert seconds[0] > 0
