import pytest
import torch
from torch import nn

from lamina import registry
from lamina.errors import LaminaError, MissingExtra, require
from lamina.registry import find, names, register, snake_case


@pytest.fixture(autouse=True)
def own_parts(monkeypatch):
    registry.parts()
    monkeypatch.setattr(registry, "_parts", dict(registry._parts))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("LayerNormLSTM", "layer_norm_lstm"), ("LAMB", "lamb"), ("ViT", "vi_t"), ("Drop2d", "drop2d"), ("mean", "mean")],
)
def test_snake_case(name, expected):
    assert snake_case(name) == expected


def test_a_part_is_found_by_name_and_by_module():
    @register("layer", source="nobody")
    class OwnLayer(nn.Module): ...

    assert find("layer", "own_layer") is OwnLayer
    assert "own_layer" in names("layer")
    assert registry.describe("layer", "own_layer").source == "nobody"
    assert find("layer", "torch.nn:Linear") is nn.Linear


def test_a_name_taken_twice_names_both_places():
    def one(): ...

    def two(): ...

    register("layer", "same")(one)
    register("layer", "same")(one)
    with pytest.raises(LaminaError, match=r"'same' is taken: .*one and .*two both"):
        register("layer", "same")(two)


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("reducer", "medain", "no reducer is called 'medain'; did you mean 'median'"),
        ("layr", "x", "no kind of part is called 'layr'; did you mean 'layer'"),
        ("layer", "torch.nn:Lineer", "cannot be imported"),
        ("layer", "no.such.module:Thing", "cannot be imported: No module named 'no'"),
        ("layer", "torch:__version__", "not something that can be called"),
        ("space", "anything", "no space is called 'anything'"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(kind, name, sentence):
    with pytest.raises(LaminaError, match=sentence):
        find(kind, name)


def test_other_people_s_parts_come_by_entry_point(monkeypatch):
    class Entry:
        value = "their.module:Part"

        def load(self):
            return nn.Identity

    monkeypatch.setattr(registry, "entry_points", lambda group, name: [Entry()] if name == "layer.theirs" else [])
    assert find("layer", "theirs") is nn.Identity


def test_a_model_remembers_the_arguments_it_was_built_with():
    @register("model", "remembering")
    class Remembering(nn.Module):
        def __init__(self, width, *, depth=2):
            super().__init__()
            self.layers = nn.Linear(width, depth)

    class Child(Remembering):
        def __init__(self):
            super().__init__(3)

    assert Remembering(4, depth=5).lamina_node == {"name": "remembering", "width": 4, "depth": 5}
    assert not hasattr(Child(), "lamina_node")
    assert torch.equal(Remembering(4).layers.weight * 0, torch.zeros(2, 4))


def test_a_missing_package_names_its_extra():
    with pytest.raises(MissingExtra, match=r'pip install "lamina\[search\]"'):
        require("no_such_package.part", "search")
