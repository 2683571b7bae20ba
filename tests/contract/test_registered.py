"""Every registered part has an example, a docstring, and refuses what the example says it must."""

from collections import Counter

import pytest
from tests.contract.collect import examples, label

from lamina import registry
from lamina.errors import LaminaError
from lamina.recipe import build

OURS = [p for p in registry.parts() if p.place.startswith("lamina.") or p.target.__module__.startswith("torch")]


@pytest.mark.parametrize("part", OURS, ids=lambda p: f"{p.kind}-{p.name}")
def test_a_part_has_an_example_and_says_what_it_is(part):
    found = [e for e in examples() if (e.kind, e.name) == (part.kind, part.name)]
    assert found, f"{part.kind} {part.name!r} has no Example in its test file"
    assert (part.target.__doc__ or "").strip(), f"{part.place} has no docstring"


def test_no_example_is_of_a_part_that_is_not_there():
    known = {(p.kind, p.name) for p in registry.parts()}
    assert {(e.kind, e.name) for e in examples()} <= known
    assert not [k for k, n in Counter(id(e) for e in examples()).items() if n > 1]


@pytest.mark.parametrize("example", [e for e in examples() if e.bad and e.kind != "pass"], ids=label)
def test_bad_options_are_refused_with_a_sentence_when_the_part_is_built(example):
    option, value = next(iter(example.bad.items()))
    given = {"params": [make_parameter()]} if example.kind == "optimizer" else {}
    with pytest.raises(LaminaError, match=r"\w+ \w+"):
        build({"name": example.name, **example.options, option: value}, example.kind, **given)


@pytest.mark.parametrize("example", [e for e in examples() if e.name != "identity"], ids=label)
def test_an_option_no_part_has_is_refused(example):
    with pytest.raises(LaminaError, match="no_such_option"):
        build({"name": example.name, **example.options, "no_such_option": 1}, example.kind)


def make_parameter():
    import torch

    return torch.nn.Parameter(torch.zeros(2))
