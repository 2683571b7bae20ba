"""Gather the examples that stand in the test files of the parts."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.contract.example import Example

from lamina import registry
from lamina.recipe import build

TESTS = Path(__file__).parent.parent


@functools.cache
def examples() -> tuple[Example, ...]:
    """Import every test file of the parts' packages and return its `EXAMPLES`."""
    found: list[Example] = []
    for package in sorted({p.rpartition(".")[2] for p in registry.KINDS.values()}):
        for path in sorted((TESTS / package).glob("test_*.py")):
            # Skipped as a whole where an extra is not installed: then its parts are, too.
            with contextlib.suppress(pytest.skip.Exception):
                found += getattr(_load(path), "EXAMPLES", [])
    return tuple(found)


def of(*kinds: str) -> list[Example]:
    """Return the examples of some kinds, whose parts this project registers."""
    return [e for e in examples() if e.kind in kinds]


def label(example: Example) -> str:
    """Return `kind-name`, for test ids."""
    return f"{example.kind}-{example.name}"


def make(example: Example, **given: Any) -> Any:
    """Build the example's part, as a recipe would."""
    return build({"name": example.name, **example.options}, example.kind, **given)


def _load(path: Path) -> Any:
    name = "contract_of_" + "_".join(path.relative_to(TESTS).with_suffix("").parts)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
