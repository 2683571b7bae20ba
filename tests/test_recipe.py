# ruff: noqa: E501
from __future__ import annotations

import copy
import dataclasses
import enum
import math
import pickle
import random
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.malformed_recipes import BASE, KEY, OPEN, WHOLE

# Imported here, so that the parts of this package are registered before a test replaces the registry.
from lamina import recipe, registry
from lamina.errors import LaminaError, MissingExtra, RecipeError
from lamina.recipe import Choice, Node, Recipe, _yaml, build, check, dump, factory, load, override, placed
from lamina.registry import Slot, register


@dataclasses.dataclass
class LayerNorm:
    width: int
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {self.eps}")


class Net:
    def __init__(
        self,
        width: int = 8,
        depth: int = 2,
        *,
        vocabulary: int | None = None,
        norm: Annotated[Node, Slot("norm")] = "layer_norm",
        fields: Annotated[Sequence[Node], Slot("field")] = (),
    ) -> None:
        self.width, self.depth, self.vocabulary = width, depth, vocabulary
        make_norm = factory("norm", norm)
        if width > 100:
            raise ValueError(f"width must be at most 100, got {width}")
        self.norms = [make_norm(width) for _ in range(depth)]
        self.fields = [factory("field", f)() for f in fields]
        self.drawn = random.random()


def grid(size: int = 4) -> int:
    return size


def rows(files: str = "here", batch: int = 2) -> str:
    if files != "here":
        raise FileNotFoundError(f"no files at {files!r}")
    return files


class Plain: ...


def adamw(params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), amsgrad: bool = False) -> Any:
    return params, lr, betas, amsgrad


def constant(fraction: float) -> float:
    return 1.0


def cosine(fraction: float, warmup: float = 0.1) -> float:
    if warmup > 1:
        raise ValueError(f"warmup must be at most 1, got {warmup}")
    return fraction * warmup


class Drop:
    def __init__(self, count: int, by: Literal["cosine", "random"] = "cosine", keep: int | None = None) -> None:
        self.count = count
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if keep is not None and keep < count:
            raise LaminaError(f"keep={keep} is below count={count}")

    def conflicts(self, earlier: Any) -> str | None:
        return "nothing is left to drop after fold" if isinstance(earlier, Fold) else None


class Fold: ...


class Median:
    def __init__(self, trim: float = 0.0) -> None:
        if trim >= 0.5:
            raise ValueError(f"trim must be below 0.5, got {trim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    steps: int = 100
    precision: Literal["fp32", "bf16"] = "fp32"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


# Before a test replaces the registry, so that no package is imported, and its parts lost, while one runs.
registry.parts()

PARTS = {
    "norm": [LayerNorm],
    "model": [Net],
    "field": [grid],
    "data": [rows],
    "objective": [Plain],
    "optimizer": [adamw],
    "schedule": [constant, cosine],
    "pass": [Drop, Fold],
    "reducer": [Median],
}


@pytest.fixture(autouse=True)
def stand_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of small parts, and nothing else, so that no test waits for a package."""
    monkeypatch.setattr(registry, "_parts", {})
    monkeypatch.setattr(registry, "_load", registry._check_kind)
    monkeypatch.setitem(sys.modules, "lamina.train.options", types.SimpleNamespace(TrainOptions=TrainOptions))
    for kind, targets in PARTS.items():
        for target in targets:
            # `Net` stays itself: registering a model wraps its constructor once a call.
            added = types.new_class("Net", (target,)) if target is Net else target
            register(kind, registry.snake_case(target.__name__))(added)


def changed(text: str) -> str:
    """Put a key on line 5, in place of the one in BASE."""
    kept = [line if not line.startswith(text.partition(":")[0] + ":") else "" for line in BASE.splitlines()]
    return "\n".join(kept) + "\n" + text + "\n"


@pytest.mark.parametrize(("text", "sentence"), [e[1:] for e in WHOLE], ids=[e[0] for e in WHOLE])
def test_what_is_no_recipe_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(load(text))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("text", "sentence"), [e[1:] for e in KEY], ids=[e[0] for e in KEY])
def test_a_key_that_does_not_fit_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(load(changed(text)))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("text", "sentence"), [e[1:] for e in OPEN], ids=[e[0] for e in OPEN])
def test_training_refuses_a_search_space(text: str, sentence: str) -> None:
    opened = load(changed(text))
    check(opened)
    with pytest.raises(RecipeError) as caught:
        check(opened, choices_allowed=False)
    assert str(caught.value) == sentence


def test_the_table_is_large_and_the_base_is_right() -> None:
    assert len(WHOLE) + len(KEY) + len(OPEN) >= 60
    check(load(BASE), choices_allowed=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-2", -2), ("+3", 3), ("010", 10), ("0o10", 8),
        ("0x1f", 31), (".inf", math.inf), ("-.INF", -math.inf), ("true", True), ("FALSE", False), ("~", None),
        ("null", None), ("12:30:00", "12:30:00"), ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"),
        ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("0b1", "0b1"), ("1e", "1e"), ("<<", "<<"), ("=", "="),
        ("'1'", "1"), ('"true"', "true"), ("nan", "nan"), ("inf", "inf"), (".", "."), ("-", None),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = _yaml.read(f"[{text}]" if text != "-" else "- ", "x")[0][0]
    assert found == value
    assert type(found) is type(value)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["yes", "1e-3", "12:30", "~", "", " ", "0o7", "!oneof", "a: b", "- a", "#", "1_0", ".nan", "null", "9" * 5000]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
RANGES = st.tuples(st.integers(-9, 9), st.integers(1, 9))
INTV = RANGES.map(lambda r: Choice("intv", {"min": r[0], "max": r[0] + r[1]}))
FLOATV = RANGES.map(lambda r: Choice("floatv", {"min": r[0] / 7, "max": r[0] / 7 + r[1], "scale": "linear"}))
VALUES = st.recursive(
    SCALARS | INTV | FLOATV,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS | st.integers(), inner, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(lambda c: Choice("oneof", c))
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equal, and of equal types all the way down (1, 1.0 and True are equal to each other)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Choice):
        return a.kind == b.kind and same(a.arguments, b.arguments)
    if isinstance(a, dict):
        return [*map(repr, a)] == [*map(repr, b)] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(VALUES)
@example({"\x85": "a\x85b\u2028c\n d\t\ufeff"})
@settings(deadline=None, max_examples=300)
def test_values_survive_yaml_exactly(value: Any) -> None:
    assert same(_yaml.read(_yaml.write(value), "x")[0], value)


@given(st.dictionaries(TEXTS, VALUES, max_size=3), st.lists(VALUES, max_size=2))
@settings(deadline=None, max_examples=50)
def test_recipes_survive_yaml_exactly(options: dict[str, Any], passes: list[Any]) -> None:
    made = Recipe(model={"name": "net", **options}, data="rows", objective="plain", rewrite=passes)
    assert load(dump(made)) == made


@given(st.lists(TEXTS | st.integers(), max_size=4))
@settings(deadline=None, max_examples=100)
def test_another_yaml_reader_sees_the_same_text(values: list[Any]) -> None:
    assert yaml.safe_load(_yaml.write([v for v in values if v != "9" * 5000])) == [v for v in values if v != "9" * 5000]


@given(st.text(max_size=60) | st.text("[]{}:,-#&*!'\"\n ab1.", max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_text_is_read_or_refused(text: str) -> None:
    sentence = "x:"
    try:
        _yaml.read(text, "x")
    except RecipeError as error:
        sentence = str(error)
    assert sentence.startswith("x:")


def test_a_recipe_made_in_python_survives_yaml_exactly() -> None:
    class Precision(enum.StrEnum):
        HALF = "bf16"

    made = Recipe(
        model={"name": "net", "width": np.int64(8), "path": Path("a/b")},
        data="rows",
        objective=("plain", {"name": "plain", "weight": np.float32(0.5)}),
        optimizer={"name": "adamw", "lr": np.float64(1e-3), "betas": (0.9, 1.0)},
        train={"precision": Precision.HALF},
    )
    back = load(dump(made))
    assert back == made
    for key in recipe.KEYS:
        assert same(getattr(back, key), getattr(made, key)), key
    assert made.optimizer["betas"] == [0.9, 1.0]
    assert type(made.train["precision"]) is str


@pytest.mark.parametrize("key", [True, 1.5, None])
def test_a_key_that_yaml_would_not_give_back_is_refused(key: Any) -> None:
    with pytest.raises(RecipeError, match="model: the recipe holds a Python object"):
        dump(Recipe(model={"name": "net", key: 1}, data="rows", objective="plain"))


def test_what_is_built_from_a_recipe_names_its_line() -> None:
    made = load(changed("model:\n  name: net\n  width: 102"))
    with pytest.raises(RecipeError) as caught, placed(made):
        build(made.model, "model")
    assert str(caught.value) == "recipe:7: model.width: width must be at most 100, got 102"
    with pytest.raises(RecipeError) as again, placed(made):
        check(load(changed("data: nosuch")))
    assert str(again.value).startswith("recipe:5: data: no data is called")


def test_steps_left_open_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needy:
        steps: int
        precision: str = "fp32"

    monkeypatch.setitem(sys.modules, "lamina.train.options", types.SimpleNamespace(TrainOptions=Needy))
    full = check(load(BASE + "train: {steps: !oneof [1, 2]}\n"))
    assert full.train == {"steps": Choice("oneof", [1, 2]), "precision": "fp32"}


def test_an_override_goes_on_from_the_default() -> None:
    text = "model: net\ndata: rows\nobjective: plain\n"
    assert load(text, ["optimizer.lr=0.5"]).optimizer == {"name": "adamw", "lr": 0.5}
    assert load(text, ["rewrite[0]=fold"]).rewrite == ["fold"]
    for before in (text, text + "parallel: auto\n"):
        assert load(before, ["parallel.data=2"]).parallel == {"data": 2}
    assert override(load(text), "parallel.data=2").parallel == {"data": 2}
    assert override(load(text), "gradients.name=median").gradients == {"name": "median"}


def test_the_spelled_out_recipe_is_complete_and_stable() -> None:
    full = check(load(BASE + "rewrite: [{name: drop, count: 1, at: 0.5}]\ngradients: median\nparallel: {data: 2}\n"))
    assert full.model == {"name": "net", "width": 8, "depth": 2, "norm": {"name": "layer_norm"}, "fields": []}
    assert full.data == {"name": "rows", "files": "here", "batch": 2}
    assert full.objective == {"name": "plain", "weight": 1.0}
    assert full.optimizer == {
        "name": "adamw", "lr": 0.1, "betas": [0.9, 0.999], "amsgrad": False,
        "schedule": {"name": "constant"}, "exclude": "norms_and_biases",
    }  # fmt: skip
    assert full.rewrite == [{"name": "drop", "count": 1, "at": 0.5, "by": "cosine", "keep": None}]
    assert full.gradients == {"name": "median", "trim": 0.0}
    assert full.parallel == {"data": 2, "shard": 1, "tensor": 1, "pipeline": 1, "sequence": 1}
    assert full.train == {"steps": 100, "precision": "fp32", "clip": None}
    assert list(full.model) == ["name", "width", "depth", "norm", "fields"]
    assert check(full) == full
    assert check(load(dump(full))) == full


def test_schedule_options_are_spelled_out() -> None:
    full = check(load(changed("optimizer: {name: adamw, schedule: cosine}")))
    assert full.optimizer["schedule"] == {"name": "cosine", "warmup": 0.1}
    assert recipe.frame(full.optimizer, "optimizer") == {
        "schedule": {"name": "cosine", "warmup": 0.1},
        "exclude": "norms_and_biases",
    }
    assert recipe.frame({"name": "drop", "count": 1}, "pass") == {"at": "before"}
    assert recipe.frame({"name": "plain", "weight": 0}, "objective") == {"weight": 0}


def test_an_open_recipe_is_checked_and_kept() -> None:
    full = check(load(changed("model: !oneof [net, {name: net, width: !intv {min: 1, max: 4}}]")))
    first, second = full.model.arguments
    assert first["width"] == 8
    assert second["width"] == Choice("intv", {"min": 1, "max": 4})
    assert load(dump(full)) == full


def test_build_calls_the_part_with_what_it_names() -> None:
    net = build({"name": "net", "width": 4, "norm": {"name": "layer_norm", "eps": 1}}, "model", vocabulary=7, other=1)
    assert (net.width, net.vocabulary, net.norms[0]) == (4, 7, LayerNorm(4, 1.0))
    assert type(net.norms[0].eps) is float
    assert build("adamw", "optimizer", params=[1]) == ([1], 1e-3, (0.9, 0.999), False)
    assert build({"name": "adamw", "betas": [0.5, 1]}, "optimizer", params=[])[2] == (0.5, 1.0)
    assert build({"name": "drop", "count": 3, "at": 0.5}, "pass").count == 3


def test_what_the_node_sets_wins_over_what_is_given_and_null_is_unset() -> None:
    assert build({"name": "net", "width": 4}, "model", width=9).width == 4
    assert build({"name": "net", "vocabulary": 3}, "model", vocabulary=9).vocabulary == 3
    assert build({"name": "net", "vocabulary": None}, "model", vocabulary=9).vocabulary == 9


def test_what_is_built_passes_through_and_a_class_is_built() -> None:
    drop = Drop(1)
    assert build(drop, "pass") is drop
    assert build(Drop, "pass", count=2, other=3).count == 2


def test_a_seed_makes_the_weights_and_leaves_the_generator() -> None:
    torch = pytest.importorskip("torch")

    class Weights:
        def __init__(self) -> None:
            self.weight = torch.randn(3)

    register("layer", "weights")(Weights)
    torch.manual_seed(0)
    expected = torch.randn(1)
    torch.manual_seed(0)
    first, second = (build({"name": "weights", "seed": 5}, "layer").weight for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.randn(1), expected)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: build({"name": "drop", "count": 0}, "pass", "rewrite[1]"), "rewrite[1].count: count must be at least 1, got 0"),
        (lambda: build("drop", "pass"), "rewrite: the pass 'drop' needs the option 'count', which the node does not set"),
        (lambda: build({"name": "net", "norm": {"name": "layer_norm", "eps": 0}}, "model"), "model.norm.eps: eps must be positive, got 0.0"),
        (lambda: build({"name": "net", "width": 7, "norm": "layer_norm"}, "model"), "model.width: width must be even, got 7"),
        (lambda: build("net", "model", width=7), "model.width: width must be even, got 7"),
        (lambda: build("net", "model", width=102), "model.width: width must be at most 100, got 102"),
        (lambda: factory("norm", "layer_norm")(7), "norm 'layer_norm': width must be even, got 7"),
        (lambda: build({"name": "rows", "files": "gone"}, "data"), "data.files: no files at 'gone'"),
        (lambda: build({"name": "net", "width": Choice("oneof", [1])}, "model"), "model.width: this choice is open, so the recipe is a search space: `lamina search` runs it"),
        (lambda: build(Choice("oneof", ["net"]), "model"), "model: this choice is open, so the recipe is a search space: `lamina search` runs it"),
        (lambda: build(3, "model"), "model: expected {name: a model, option: value} or the name of a model, got 3"),
        (lambda: factory("norm", {"name": "layer_norm", "width": 3})(4), "width: 'width' is set by the part around this norm 'layer_norm' (to 4): leave it out"),
        (lambda: factory("field", "grid")(1, 2), "the field 'grid' cannot stand here: it takes 1 values by position, and is given 2"),
        (lambda: factory("norm", "layer_norm")(), "the norm 'layer_norm' needs the option 'width', which the node does not set"),
    ],
)  # fmt: skip
def test_errors_of_build_and_factory(call: Any, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        call()
    assert str(caught.value) == sentence


def test_a_bug_in_a_part_stays_a_bug() -> None:
    def broken() -> None:
        raise KeyError("bug")

    def lacking() -> None:
        raise MissingExtra("pip install it")

    register("layer", "broken")(broken)
    register("layer", "lacking")(lacking)
    with pytest.raises(KeyError):
        build("broken", "layer")
    with pytest.raises(MissingExtra):
        build("lacking", "layer")


def test_factory_builds_again_with_more_values() -> None:
    make = factory("norm", {"name": "layer_norm", "eps": 2})
    assert make(6) == make(width=6, unknown=1) == LayerNorm(6, 2.0)
    assert make(6) is not make(6)
    assert factory("norm", make) is make
    assert copy.deepcopy(make)(6) == LayerNorm(6, 2.0)
    assert factory("norm", LayerNorm)(6) == LayerNorm(6)
    assert factory("norm", lambda width: width + 1)(3) == 4
    assert pickle.loads(pickle.dumps(factory("field", grid)))() == 4


def test_a_positional_none_is_unset() -> None:
    def layer(width: int, hidden: int | None = None) -> tuple[int, int | None]:
        return width, hidden

    register("layer", "layer")(layer)
    assert factory("layer", {"name": "layer", "hidden": 5})(2, None) == (2, 5)
    assert factory("layer", "layer")(2, None) == (2, None)


def test_a_factory_refuses_a_module_that_is_built() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RecipeError, match=r"expected what builds a norm, got a LayerNorm that is built already"):
        factory("norm", torch.nn.LayerNorm(3))
    assert factory("norm", torch.nn.LayerNorm)(3).normalized_shape == (3,)
    assert isinstance(factory("norm", torch.nn.Identity)(3), torch.nn.Identity)


def test_a_module_without_a_constructor_has_no_options() -> None:
    torch = pytest.importorskip("torch")
    register("layer", "tanh")(torch.nn.Tanh)
    assert isinstance(factory("layer", "tanh")(), torch.nn.Tanh)
    with pytest.raises(
        RecipeError, match=r"^layer\.slope: the layer 'tanh' has no option 'slope' \(it takes: no options\)$"
    ):
        build({"name": "tanh", "slope": 1}, "layer")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("optimizer.lr=1e-3", ("optimizer", "lr"), 1e-3),
        ("model=other", ("model",), "other"),
        ("model.norm=layer_norm", ("model", "norm"), "layer_norm"),
        ("data.files=a=b", ("data", "files"), "a=b"),
        ("rewrite[0].count=2", ("rewrite", 0, "count"), 2),
        ("rewrite.1.name=drop", ("rewrite", 1, "name"), "drop"),
        ("rewrite=[{name: fold}]", ("rewrite", 0, "name"), "fold"),
        ("train.steps=7", ("train", "steps"), 7),
        ("train.steps=!oneof [1, 2]", ("train", "steps"), Choice("oneof", [1, 2])),
    ],
)
def test_overrides(text: str, path: tuple[Any, ...], value: Any) -> None:
    before = load(BASE + "rewrite: [{name: drop, count: 1}]\n")
    kept = copy.deepcopy(before)
    after = override(before, text)
    assert before == kept
    found: Any = getattr(after, str(path[0]))
    for step in path[1:]:
        found = found[step]
    assert found == value
    assert load(BASE + "rewrite: [{name: drop, count: 1}]\n", [text]) == after


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr", "an override is written path=value (optimizer.lr=1e-3), got 'lr'"),
        ("=3", "an override is written path=value (optimizer.lr=1e-3), got '=3'"),
        ("a[x]=3", "an override is written path=value (optimizer.lr=1e-3), got 'a[x]=3'"),
        ("optimiser.lr=3", "override 'optimiser.lr=3': a recipe has no key 'optimiser'; did you mean 'optimizer'?"),
        ("rewrite[4].count=3", "override 'rewrite[4].count=3': expected a place in the list, 0..0, got 4"),
        ("rewrite.count=3", "override 'rewrite.count=3': expected a place in the list, 0..0, got 'count'"),
        ("optimizer.lr.x=3", "override 'optimizer.lr.x=3': 0.1 has no parts that 'x' could be"),
        ("model=[", "override 'model=[':1: while parsing a flow node, expected the node content, but found '<stream end>'"),
        ("model.width=x", "override 'model.width=x': model.width: expected a whole number, got the text 'x'"),
    ],
)  # fmt: skip
def test_overrides_that_do_not_fit(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(load(BASE + "rewrite: []\n", [text]))
    assert str(caught.value) == sentence


def test_a_file_is_named_in_errors(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(BASE + "train: {steps: x}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^mine\.yaml:5: train\.steps: expected a whole number, got the text 'x'$"):
        check(load(file))
    with pytest.raises(RecipeError, match=r"min\.yaml' does not exist; did you mean 'mine\.yaml'\?$"):
        load(tmp_path / "min.yaml")
    with pytest.raises(RecipeError, match=r"is a folder$"):
        load(str(tmp_path))
    file.write_bytes(b"model: \xff\n")
    with pytest.raises(RecipeError, match=r"is not UTF-8 text \(byte 7\)$"):
        load(file)


def test_a_recipe_made_in_python_is_checked_without_places() -> None:
    with pytest.raises(RecipeError, match=r"^model\.width: expected a whole number, got the text '8'$"):
        check(Recipe(model={"name": "net", "width": "8"}, data="rows", objective="plain"))
    with pytest.raises(RecipeError, match=r"^model: the recipe holds a Python object"):
        dump(Recipe(model=Net(), data="rows", objective="plain"))
    made = check(Recipe(model="net", data="rows", objective=("plain", {"name": "plain", "weight": 2})))
    assert recipe.objectives(made) == [{"name": "plain", "weight": 1.0}, {"name": "plain", "weight": 2}]


def test_an_annotation_that_cannot_be_read_leaves_the_others_checked() -> None:
    def layer(a: int, b: Unreadable = None) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    register("layer", "layer")(layer)
    build({"name": "layer", "a": 1, "b": "anything"}, "layer")
    with pytest.raises(RecipeError, match=r"^layer\.a: expected a whole number, got the text 'x'$"):
        build({"name": "layer", "a": "x"}, "layer")
