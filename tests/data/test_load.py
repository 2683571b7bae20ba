from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.collect import of
from tests.contract.example import Example

from lamina import data
from lamina.errors import LaminaError
from lamina.registry import find, names

AUGMENTED = {"elastically_deformed"}
"""Training rows of these depend on the batch they are in: the same batch again is the same, another order is not."""
TIMES = {"rotated": 4}
"""These give so many rows for one, side by side."""
BY_NAME: dict[str, Example] = {e.name: e for e in of("data")}


def _options(example: Example, folder: Path, extra: dict[str, Any]) -> dict[str, Any]:
    for name, content in example.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return _placed({**example.options, **extra}, folder)


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: _placed(v, folder) for k, v in value.items()}
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))


def test_every_registered_set_has_an_example() -> None:
    assert sorted(BY_NAME) == names("data")


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_set_gives_the_same_rows_again_and_in_any_order(name: str, tmp_path: Path) -> None:
    options = _options(BY_NAME[name], tmp_path / "files", {})
    first, second = data.load(name, **options), copy.deepcopy(data.load(name, **options))
    for a, b in ((first.train, second.train), (first.evaluation, second.evaluation)):
        assert isinstance(a, data.Examples)
        rows = torch.arange(min(6, len(a)))
        augmented = name in AUGMENTED and a is first.train
        forward, backward = a.batch(rows), b.batch(rows if augmented else rows.flip(0))
        assert forward.keys() == backward.keys()
        for key, values in forward.items():
            assert values.is_contiguous() or key in ("inputs", "labels")
            again = backward[key].unflatten(0, (len(rows), -1))
            assert torch.equal(values, (again if augmented else again.flip(0)).flatten(0, 1)), key
            assert not values.is_floating_point() or values.isfinite().all()
    batch = next(data.Loader(first.train, first.batch))
    assert {len(v) for v in batch.values()} == {TIMES.get(name, 1) * first.batch}


@pytest.mark.parametrize("name", sorted(n for n, e in BY_NAME.items() if e.bad))
def test_every_set_refuses_its_bad_option(name: str, tmp_path: Path) -> None:
    options = _options(BY_NAME[name], tmp_path / "files", dict(BY_NAME[name].bad))
    with pytest.raises(LaminaError):
        find("data", name)(**options)
