"""The target of a hypernetwork: which of its parameters are generated, and how they are taken out and put back."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lamina.anatomy import is_norm
from lamina.errors import LaminaError, ShapeError, nearest

Match = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
Base = Literal["none", "frozen", "trainable"]

MARK = "_generated_by_hypernetwork"
"""Attribute of a target's module: the names of its parameters that are generated."""

ORDER = "_parameters_before_hypernetwork"
"""Attribute of a target's module: the names of all its parameters, in order."""


@dataclass(frozen=True)
class Entry:
    """One generated tensor of the target."""

    name: str
    """As `target.named_parameters()` calls it."""
    places: tuple[tuple[str, str], ...]
    """(module path, attribute) of every place where it stands: several where weights are tied."""
    shape: tuple[int, ...]
    dtype: int
    """Which of the target's dtypes it has: an index."""
    rank: int | None
    """Of the two factors that are emitted in its stead; None = it is emitted whole."""

    @property
    def numel(self) -> int:
        """How many numbers the tensor has."""
        return torch.Size(self.shape).numel()

    @property
    def rows(self) -> int:
        """Rows of the tensor as a matrix: its first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def emitted(self) -> int:
        """How many numbers the generator emits for it."""
        return self.numel if self.rank is None else self.rank * (self.rows + self.numel // self.rows)

    def assemble(self, emitted: Tensor) -> Tensor:
        """Make tensors (B, *shape) of the numbers (B, emitted)."""
        if self.rank is None:
            return emitted.reshape(-1, *self.shape)
        left, right = emitted.split((self.rows * self.rank, self.emitted - self.rows * self.rank), dim=1)
        product = left.reshape(-1, self.rows, self.rank) @ right.reshape(len(right), self.rank, -1)
        return product.reshape(-1, *self.shape)


def select(target: nn.Module, match: Match, rank: int | None) -> tuple[list[Entry], list[torch.dtype]]:
    """List the parameters to generate, in the order of `named_parameters()`, and the dtypes among them.

    Raises:
        LaminaError: a pattern without a match, nothing selected, or a parameter that cannot be generated.
    """
    named = dict(target.named_parameters())
    chosen = _chosen(target, named, match)
    if not chosen:
        raise LaminaError(f"match={match!r} selects no parameter of {type(target).__name__}: nothing to generate")
    dtypes = list(dict.fromkeys(named[name].dtype for name in chosen))
    places = _places(target)
    entries = []
    for name in chosen:
        parameter = named[name]
        _check(name, parameter)
        rows = parameter.shape[0] if parameter.dim() else 1
        small = (
            rank is not None and parameter.dim() > 1 and rank * (rows + parameter.numel() // rows) < parameter.numel()
        )
        shape = tuple(parameter.shape)
        entries.append(
            Entry(name, places[id(parameter)], shape, dtypes.index(parameter.dtype), rank if small else None)
        )
    return entries, dtypes


def take_out(target: nn.Module, entries: Sequence[Entry], base: Base) -> None:
    """Remove the entries' parameters from the target, in place; a base stays, at the first place of each."""
    for entry in entries:
        for at, (path, attribute) in enumerate(entry.places):
            module = target.get_submodule(path)
            setattr(module, ORDER, getattr(module, ORDER, tuple(module._parameters)))
            setattr(module, MARK, getattr(module, MARK, frozenset()) | {attribute})
            kept = module._parameters[attribute]
            if base == "frozen" and at == 0 and kept is not None:
                del module._parameters[attribute]
                module.register_buffer(attribute, kept.detach().clone())
            elif base == "none" or at > 0:
                module._parameters[attribute] = None
            elif kept is not None:
                kept.requires_grad_(True)
    refresh_recurrent(target)


def refresh_recurrent(target: nn.Module) -> None:
    """Let torch's recurrent layers forget the tensors of the last call: they keep a list of their own."""
    for module in target.modules():
        if isinstance(module, nn.RNNBase):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                setattr(module, name, tensor)


def tell_recurrent(target: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of the coming call on the list that torch's recurrent layers keep."""
    for path, module in target.named_modules():
        if isinstance(module, nn.RNNBase):
            named = [f"{path}.{name}" if path else name for name in module._flat_weights_names]
            held = [getattr(module, name, None) for name in module._flat_weights_names]
            module._flat_weights = [tensors.get(name, own) for name, own in zip(named, held, strict=True)]


def base_of(target: nn.Module, entry: Entry) -> Tensor | None:
    """Return what the target holds of an entry; None where it holds nothing."""
    path, attribute = entry.places[0]
    module = find(target, path)
    if module is None or attribute not in getattr(module, MARK, ()):
        return None
    held: Tensor | None = getattr(module, attribute)
    return held


def by_place(target: nn.Module, entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors by every place where the target wants them.

    A place whose module a rewrite took away or replaced since is left out: what stands there now has its own weights.
    """
    found = {}
    for entry in entries:
        for path, attribute in entry.places:
            if attribute in getattr(find(target, path), MARK, ()):
                found[f"{path}.{attribute}" if path else attribute] = tensors[entry.name]
    return found


def freeze_out(target: nn.Module, entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a plain copy of the target whose parameters are the given tensors; ties stay tied."""
    plain = copy.deepcopy(target)
    for entry in entries:
        parameter = nn.Parameter(tensors[entry.name].detach().clone())
        for path, attribute in entry.places:
            module = find(plain, path)
            if module is not None and attribute in getattr(module, MARK, ()):
                module._buffers.pop(attribute, None)
                module._parameters[attribute] = parameter
    for module in plain.modules():
        if hasattr(module, MARK):
            # A frozen base stood among the buffers: the parameters come back in the order that they had.
            order = (*getattr(module, ORDER), *module._parameters)
            module._parameters = {n: module._parameters[n] for n in dict.fromkeys(order) if n in module._parameters}
            delattr(module, MARK)
            delattr(module, ORDER)
    refresh_recurrent(plain)
    return plain


def find(target: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, or None."""
    module: nn.Module | None = target
    for step in path.split(".") if path else ():
        module = None if module is None else module._modules.get(step)
    return module


def fingerprint(entries: Sequence[Entry]) -> list[list[int]]:
    """Return a row an entry: where it begins among all generated numbers, and a digest of its name, shape and rank."""
    rows, offset = [], 0
    for entry in entries:
        digest = hashlib.sha256(f"{entry.name} {entry.shape} {entry.rank}".encode()).digest()
        rows.append([offset, int.from_bytes(digest[:7], "big")])
        offset += entry.numel
    return rows


def refuse_another_layout(stored: object, entries: Sequence[Entry]) -> None:
    """Compare a saved fingerprint with the entries'; nothing saved, or nothing in it yet (meta), passes.

    Raises:
        LaminaError: they differ; the first entry that does is named.
    """
    expected = fingerprint(entries)
    if not isinstance(stored, Tensor) or stored.is_meta or stored.tolist() == expected:
        return
    differ = (i for i, (a, b) in enumerate(zip(stored.tolist(), expected, strict=False)) if a != b)
    first = next(differ, min(len(stored), len(expected)))
    named = entries[first].name if first < len(expected) else "one more"
    raise LaminaError(
        f"the saved hypernetwork generates other tensors than this one ({len(stored)} and {len(expected)}): the first "
        f"that differs is {named}; it has another target, match or rank"
    )


def with_running_statistics(target: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the norms that keep running statistics."""
    for path, module in target.named_modules():
        if module._buffers.get("running_mean") is not None:
            yield path, module


def _chosen(target: nn.Module, named: Mapping[str, nn.Parameter], match: Match) -> list[str]:
    if callable(match):
        return [name for name, parameter in named.items() if match(name, parameter)]
    every = {f"{path}.{a}" if path else a: i for i, ps in _places(target).items() for path, a in ps}
    norms = {id(p) for m in target.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    chosen: set[int] = set()
    for pattern in (match,) if isinstance(match, str) else match:
        found = {i for name, i in every.items() if fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise LaminaError(f"{type(target).__name__} has no parameter {pattern!r}{nearest(pattern, every)}")
        # A bare star means the weights; whoever wants the norms' gains as well names them, or says `**`.
        chosen |= found - norms if pattern == "*" else found
    return [name for name, parameter in named.items() if id(parameter) in chosen]


def _places(target: nn.Module) -> dict[int, tuple[tuple[str, str], ...]]:
    """Map each parameter (by identity) to the places where it stands; a shared module counts once."""
    found: dict[int, tuple[tuple[str, str], ...]] = {}
    for path, module in target.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found[id(parameter)] = (*found.get(id(parameter), ()), (path, attribute))
    return found


def _check(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise LaminaError(f"{name} is lazy, its shape not known yet: run the target once before wrapping it")
    if not parameter.is_floating_point():
        raise LaminaError(f"{name} is {parameter.dtype}: only floating-point parameters can be generated")
    if not parameter.numel():
        raise ShapeError(f"{name} is empty, {tuple(parameter.shape)}: leave it out of match")
