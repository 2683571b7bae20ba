"""From a recipe node to the part it names: look it up, check its options, call it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lamina import registry
from lamina.errors import LaminaError, MissingExtra, nearest
from lamina.recipe._options import REQUIRED, Misfit, Signature, fit, is_plain, plain, show, signature_of
from lamina.recipe._yaml import Choice
from lamina.registry import Part

Node = str | Mapping[str, Any] | Callable[..., Any]
"""A part as it stands in a recipe: its name, `{name: ..., option: value}`, or (in Python) what builds it."""

FRAME: dict[str, tuple[str, ...]] = {
    "pass": ("at",),
    "objective": ("weight",),
    "optimizer": ("schedule", "exclude"),
}
"""Keys of a top-level node that the frame takes itself (and `seed`, in any node whose part has no such option)."""

OFFERED: dict[str, frozenset[str]] = {
    "model": frozenset("vocabulary context classes channels features image outputs".split()),
    "objective": frozenset("model vocabulary mask_token classes width".split()),
    "optimizer": frozenset({"params", "model"}),
    "schedule": frozenset({"fraction"}),
    "reducer": frozenset({"world", "workers"}),
}
"""Values that whoever builds a part may add when the node leaves them out; not missing, not spelled out."""

TOP_LEVEL = {"pass": "rewrite", "reducer": "gradients"}


@dataclass(frozen=True)
class Found:
    """A node that was looked up and whose options fit."""

    part: Part
    path: str
    handed: Mapping[str, Any]
    """What the node sets, as the constructor wants it."""
    spelled: Mapping[str, Any]
    """The node with its defaults, in YAML's own types."""
    frame: Mapping[str, Any]
    """What the frame takes, defaults included."""

    @property
    def signature(self) -> Signature:
        """What the part can be given."""
        return signature_of(self.part.target)

    @property
    def what(self) -> str:
        """The part in words: `pass 'drop_attention'`."""
        return f"{self.part.kind} {self.part.name!r}"

    def missing(self, given: Mapping[str, Any] | frozenset[str]) -> list[str]:
        """Name the required options that neither the node nor `given` sets."""
        options = self.signature.options.values()
        return [o.name for o in options if o.default is REQUIRED and o.name not in self.handed and o.name not in given]


@dataclass(frozen=True)
class Factory:
    """Builds a part when the values its owner knows are there: `factory("norm", "layer_norm")(width)`.

    Positional values are always handed over; keywords only where the part names them and the node leaves them open.
    """

    found: Found

    def __call__(self, *values: Any, **given: Any) -> Any:
        """Build one more instance."""
        return _call(self.found, values, given)


def build(node: Any, kind: str, place: str | None = None, /, **given: Any) -> Any:
    """Build the part a node names.

    Args:
        node: a name, `{name: part, option: value}`, a class; anything already built is returned as it is.
        kind: one of `lamina.registry.KINDS`.
        place: where the node stands, for errors (`rewrite[1]`); default is the kind's top-level key.
        given: values on offer (`vocabulary=256`): handed over where the signature names them and the node leaves
            them open (absent, or null where null is the default).
    Raises:
        RecipeError: no such part, an option that does not fit or is missing, or the part refuses its options.
    """
    path = TOP_LEVEL.get(kind, kind) if place is None else place
    if inspect.isclass(node):
        return _call(_wrap(node, kind, path), (), given)
    if not isinstance(node, (str, Mapping, Choice)) and not is_plain(node):
        return node
    return _call(look_up(node, kind, path, framed=True), (), given)


def factory(kind: str, node: Any) -> Callable[..., Any]:
    """Return what builds the part again and again, each time with more values; the node is checked now.

    Args:
        node: a name, `{name: part, option: value}`, or a class or function that builds the part.
    Raises:
        RecipeError: no such part, an option that does not fit, or a module that is already built.
    """
    if isinstance(node, Factory):
        return node
    if hasattr(node, "forward") and not inspect.isclass(node):
        raise Misfit("", f"expected what builds a {kind}, got a {type(node).__name__} that is built already")
    if callable(node):
        return Factory(_wrap(node, kind, ""))
    return Factory(look_up(node, kind, ""))


def look_up(node: Any, kind: str, path: str, *, framed: bool = False, choices: bool = False) -> Found:
    """Find the part of a node and check every option the node sets, nested nodes too.

    Args:
        framed: the node stands at the recipe's top level, where the frame takes keys of its own, and defaults
            are spelled out (those of a nested node are for the part around it to set).
        choices: an option may be left open.
    Raises:
        RecipeError: with the path of the mistake.
    """
    name, options = _split(node, kind, path)
    try:
        part = registry.describe(kind, name)
    except LaminaError as error:
        raise Misfit(path, str(error)) from error
    signature = signature_of(part.target)
    ours = FRAME.get(kind, ()) if framed else ()
    ours += ("seed",) if "seed" not in signature.options else ()
    _refuse_unknown(part, signature, options, ours, path)
    frame = {k: _frame_value(k, options.pop(k, _ABSENT), f"{path}.{k}", choices) for k in ours}
    spelled: dict[str, Any] = {"name": name}
    handed = {}
    for key, value in options.items():
        handed[key], spelled[key] = _check_option(signature, key, value, f"{path}.{key}" if path else key, choices)
    if framed:
        _spell_defaults(spelled, signature, OFFERED.get(kind, frozenset()), path)
    frame = {k: v for k, v in frame.items() if v is not None}
    ordered = {k: spelled[k] for k in ("name", *signature.options) if k in spelled}
    return Found(part, path, handed, {**ordered, **spelled, **frame}, frame)


def spell(node: Any, kind: str, path: str, *, framed: bool = False, choices: bool = False) -> Any:
    """Return a node with everything it stands for spelled out; see `look_up`."""
    if isinstance(node, Choice) and choices:
        if node.kind != "oneof":
            raise Misfit(path, f"expected {_a(kind)} or !oneof [...] of several, got !{node.kind}")
        return Choice(
            "oneof",
            [spell(c, kind, f"{path}[{i}]", framed=framed, choices=choices) for i, c in enumerate(node.arguments)],
        )
    found = look_up(node, kind, path, framed=framed, choices=choices)
    missing = found.missing(OFFERED.get(kind, frozenset())) if framed else []
    if missing:
        raise Misfit(path, _missing(found, missing))
    return dict(found.spelled)


def open_choice(value: Any, path: str = "") -> str | None:
    """Return the path of the first value that is left open, or None."""
    if isinstance(value, Choice):
        return path
    if isinstance(value, Mapping):
        below: Iterator[tuple[str, Any]] = ((f"{path}.{k}" if path else str(k), v) for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        below = ((f"{path}[{i}]", v) for i, v in enumerate(value))
    else:
        return None
    return next((found for p, v in below if (found := open_choice(v, p)) is not None), None)


def refuse_choice(value: Any, path: str = "") -> None:
    """Refuse a value in which something is left open."""
    where = open_choice(value, path)
    if where is not None:
        raise Misfit(where, "this choice is open, so the recipe is a search space: `lamina search` runs it")


_ABSENT: Any = object()


def _split(node: Any, kind: str, path: str) -> tuple[str, dict[str, Any]]:
    if isinstance(node, Choice):
        refuse_choice(node, path)
    options: dict[str, Any] = dict(node) if isinstance(node, Mapping) else {"name": node}
    if "name" not in options:
        known = next((h for k in options if (h := nearest(str(k), ["name"]))), "")
        raise Misfit(path, f"expected the name of {_a(kind)} in the key 'name', got the keys {', '.join(map(repr, options)) or 'none'}{known}")  # fmt: skip  # noqa: E501
    name = options.pop("name")
    if not isinstance(name, str):
        what = "the key 'name' to be" if isinstance(node, Mapping) else f"{{name: {_a(kind)}, option: value}} or"
        raise Misfit(path, f"expected {what} the name of {_a(kind)}, got {show(name)}")
    return name, options


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _refuse_unknown(
    part: Part, signature: Signature, options: Mapping[str, Any], ours: tuple[str, ...], path: str
) -> None:
    known = (*signature.options, *ours)
    for key in options:
        if key not in known and not (signature.open_ended and isinstance(key, str)):
            listed = ", ".join(k for k in known if k not in ("seed", *OFFERED.get(part.kind, ()))) or "no options"
            raise Misfit(
                f"{path}.{key}" if path else str(key),
                f"the {part.kind} {part.name!r} has no option {key!r}{nearest(str(key), known)} (it takes: {listed})",
            )


def _check_option(signature: Signature, key: str, value: Any, path: str, choices: bool) -> tuple[Any, Any]:
    """Return the value as the constructor wants it, and as it is spelled."""
    option = signature.options.get(key)
    if not choices:
        refuse_choice(value, path)
    if option is None:
        return value, plain(value)
    if option.slot is None:
        return fit(value, option.hint, path), plain(value)
    if value is None and option.default is None:
        return None, None
    if isinstance(value, (list, tuple)) and option.many:
        return value, [_spell_slot(v, option.slot, f"{path}[{i}]", choices) for i, v in enumerate(value)]
    return value, _spell_slot(value, option.slot, path, choices)


def _spell_slot(value: Any, kind: str, path: str, choices: bool) -> Any:
    if not isinstance(value, (str, Mapping, Choice)) and not is_plain(value):
        return value
    return spell(value, kind, path, choices=choices)


def _spell_defaults(spelled: dict[str, Any], signature: Signature, offered: frozenset[str], path: str) -> None:
    for option in signature.options.values():
        if option.name in spelled or option.name in offered or not is_plain(option.default):
            continue
        with contextlib.suppress(Misfit):
            # A default outside its own type hint would not pass a second check: it stays unsaid.
            _, spelled[option.name] = _check_option(Signature({option.name: option}, False, False), option.name,
                                                    option.default, f"{path}.{option.name}", False)  # fmt: skip


def _frame_value(key: str, value: Any, path: str, choices: bool) -> Any:
    """Check what the frame takes; return it or its default."""
    if value is _ABSENT:
        value = {"at": "before", "weight": 1.0, "schedule": "constant", "exclude": "norms_and_biases"}.get(key)
        return value if key != "schedule" else spell(value, "schedule", path)
    if not choices:
        refuse_choice(value, path)
    if isinstance(value, Choice) and key != "schedule":
        for candidate in value.candidates():
            _frame_value(key, candidate, path, choices)
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key == "at" and value not in ("before", "after") and not (number and 0 < value < 1):
        hint = nearest(value, ("before", "after")) if isinstance(value, str) else ""
        raise Misfit(path, f"expected 'before', 'after' or a fraction of training between 0 and 1 (both excluded), got {show(value)}{hint}")  # fmt: skip  # noqa: E501
    if key == "weight" and not (number and 0 <= value < math.inf):
        raise Misfit(path, f"expected a weight of at least 0, got {show(value)}")
    if key == "seed" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise Misfit(path, f"expected a seed, a whole number of at least 0, got {show(value)}")
    if key == "seed":
        return fit(value, int, path)
    if key == "exclude":
        return fit(value, Literal["norms_and_biases", "nothing"], path)
    return _spelled_schedule(value, path, choices) if key == "schedule" else value


def _spelled_schedule(value: Any, path: str, choices: bool) -> Any:
    found = spell(value, "schedule", path, choices=choices)
    if isinstance(found, Choice):
        return found
    complete = look_up(value, "schedule", path, framed=False, choices=choices)
    missing = complete.missing(OFFERED["schedule"])
    if missing:
        raise Misfit(path, _missing(complete, missing))
    _spell_defaults(found, complete.signature, OFFERED["schedule"], path)
    return found


def _wrap(target: Callable[..., Any], kind: str, path: str) -> Found:
    name = getattr(target, "__qualname__", type(target).__name__)
    return Found(Part(kind, name, target, None, name), path, {}, {"name": name}, {})


def _missing(found: Found, missing: list[str]) -> str:
    many = "options " if len(missing) > 1 else "option "
    return f"the {found.what} needs the {many}{', '.join(map(repr, missing))}, which the node does not set"


def _call(found: Found, values: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
    """Call the constructor with the node's options, the positional `values`, and what it names of `given`."""
    signature = found.signature
    arguments = dict(found.handed)
    for key, value in given.items():
        unset = key not in arguments or (arguments[key] is None and signature.options[key].default is None)
        if key in signature.options and unset:
            arguments[key] = value
    placed = values if signature.variadic else _by_position(found, arguments, values)
    missing = found.missing(frozenset(arguments))
    if missing and not signature.variadic:
        raise Misfit(found.path, _missing(found, missing))
    try:
        with _seeded(found.frame.get("seed")):
            return found.part.target(*placed, **arguments)
    except MissingExtra:
        raise
    except (LaminaError, ValueError, OSError) as error:
        raise _refused(found, error) from error


def _by_position(found: Found, arguments: dict[str, Any], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Name the positional values and add them to the arguments; a None leaves what the node sets."""
    names = [o.name for o in found.signature.options.values() if o.positional]
    if len(values) > len(names):
        raise Misfit(found.path, f"the {found.what} cannot stand here: it takes {len(names)} values by position, and is given {len(values)}")  # fmt: skip  # noqa: E501
    for name, value in zip(names, values, strict=False):
        if name in found.handed and value is not None:
            raise Misfit(name, f"{name!r} is set by the part around this {found.what} (to {show(value)}): leave it out")
        if name not in found.handed:
            arguments[name] = value
    return ()


class _Refused(Misfit):
    """A constructor's own error; `owner` is the part's name, `words` what it said, for the part around it."""

    def __init__(self, path: str, sentence: str, owner: str, words: str) -> None:
        super().__init__(path, sentence)
        self.owner, self.words = owner, words


def _refused(found: Found, error: Exception) -> _Refused:
    """Word a constructor's error, with the path of the option it speaks of."""
    words = " ".join(str(error).split()) or type(error).__name__
    handed, below, inner = found.handed, "", ""
    if isinstance(error, Misfit):
        # A nested part refused: its path is relative to the slot that holds it.
        words, inner = getattr(error, "words", error.sentence), error.path
        slots = (o.name for o in found.signature.options.values() if o.slot is not None)
        owner = getattr(error, "owner", None)
        below = next((s for s in slots if owner is not None and _names(handed.get(s)) == owner), "")
    if inner:
        path = (found.path, below, inner)
    else:
        # Where a nested node does not set what the sentence is about, the part around it does.
        path = (
            found.path,
            blamed(words, handed) or below or (found.path and blamed(words, found.signature.options)),
            "",
        )
    where = ".".join(p for p in path if p)
    return _Refused(where, words if where else f"{found.what}: {words}", found.part.name, words)


def _names(node: Any) -> str | None:
    return node.get("name") if isinstance(node, Mapping) else node if isinstance(node, str) else None


def blamed(sentence: str, *names: Iterable[str]) -> str:
    """Guess which option a sentence is about: the first it names of the first group that has one; empty = none."""
    for group in names:
        places = {m.start(): n for n in group if (m := re.search(rf"(?<!\w){re.escape(n)}(?!\w)", sentence))}
        if places:
            return places[min(places)]
    return ""


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw the part's first weights from a seed of its own, and leave the global generator as it was."""
    if seed is None:
        yield
        return
    # Looked up late: this module must not load torch for `lamina --help`.
    torch = importlib.import_module("torch")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
