"""Which module's output goes where: what a pass must know before it merges two modules.

Seen on symbols (torch.fx: the whole model, or those of its parts that can be traced), or in real forward passes, where
a tensor is known by its identity and every operation on it is seen. Either way once as in evaluation and once as in
training: what does nothing in evaluation (dropout, a dropped path) is seen in the other.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from lamina import probe
from lamina.anatomy import undisturbed
from lamina.batches import Batch, call

RESULT = "the model's output"
"""A reader that is no operation."""


@dataclass
class Call:
    """One call of a watched module."""

    reads: str | None
    """Path of the watched module whose output it takes; None = anything else."""
    alone: bool
    """Whether it was called with that tensor and nothing else."""
    readers: list[str] = field(default_factory=list)
    """Who uses its output: paths of watched modules, else a word for the operation."""
    input: Tensor | None = None
    output: Tensor | None = None
    """On a real run: the tensors themselves."""


Links = dict[str, list[Call]]
"""The calls of every watched module, by path."""


def links_on_symbols(model: nn.Module, watched: Collection[str]) -> tuple[Links, bool]:
    """Trace a model with torch.fx, and where it cannot be traced, its parts; runs nothing.

    Returns the links and whether the whole model was traced. A part shows what happens inside of it alone.
    """
    wanted = set(watched)
    with _unmoved(model), undisturbed(model):
        whole = _traced(model, wanted, "")
        if whole is not None:
            return whole, True
        return dict(_parts(model, wanted, "")), False


def links_of_run(model: nn.Module, batch: Batch, watched: Collection[str]) -> Links:
    """Run a model as in evaluation and as in training (but for its batch norms), and see what becomes of every output.

    Without gradients; buffers and the random state are put back.
    """
    with _unmoved(model):
        return _merged(*(watch(model, batch, watched, training=training) for training in (False, True)))


def watch(model: nn.Module, batch: Batch, watched: Collection[str], *, training: bool = False) -> Links:
    """Run a model once without gradients and see what becomes of every watched output.

    Args:
        training: with every module but the batch norms in training mode.
    """
    watcher = _Watcher()
    before = {path: functools.partial(watcher.starts, path) for path in watched}
    after = {path: functools.partial(watcher.ends, path) for path in watched}
    with undisturbed(model), torch.no_grad(), probe.observe(model, after, before):
        _pretend(model, training)
        with watcher:
            result = call(model, batch)
    watcher.note(result, RESULT)
    return watcher.links


@contextmanager
def _unmoved(model: nn.Module) -> Iterator[None]:
    """Put back buffers that change in place (a forward may count its calls, in a trace too) and the random state."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


def _pretend(model: nn.Module, training: bool) -> None:
    """Set the mode inside `undisturbed`, which puts it back."""
    for module in model.modules():
        module.training = training and not isinstance(module, _BatchNorm)


def _merged(first: Links, second: Links) -> Links:
    """Put two looks at one model together; where they disagree, the link is none."""
    merged: Links = {}
    for path in (*first, *(p for p in second if p not in first)):
        one, two = first.get(path, []), second.get(path, [])
        if len(one) != len(two):
            # A layer that is left out at random is not called at all.
            merged[path] = max(one, two, key=len)
            continue
        merged[path] = [
            replace(
                a,
                reads=a.reads if a.reads == b.reads else None,
                alone=a.alone and b.alone,
                readers=list(dict.fromkeys([*a.readers, *b.readers])),
            )
            for a, b in zip(one, two, strict=True)
        ]
    return merged


def on_meta(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, without touching its weights: shapes without numbers or memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def _parts(model: nn.Module, watched: set[str], prefix: str) -> Iterator[tuple[str, list[Call]]]:
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        inside = {w for w in watched if w.startswith(f"{path}.")}
        if not inside:
            continue
        found = _traced(child, {w.removeprefix(f"{path}.") for w in inside}, f"{path}.")
        yield from _parts(child, watched, f"{path}.") if found is None else found.items()


class _Tracer(fx.Tracer):
    def __init__(self, watched: set[str]) -> None:
        super().__init__()
        self.watched = watched

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.watched:
            return True
        holds = any(w.startswith(f"{module_qualified_name}.") for w in self.watched)
        return not holds and super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module, watched: set[str], prefix: str) -> Links | None:
    """Read the links off two traces; None where the forward cannot run on symbols."""
    found: list[Links] = []
    for training in (False, True):
        _pretend(module, training)
        try:
            graph = _Tracer(watched).trace(module)
        except Exception:
            # Any code may stand in a forward; the caller then looks elsewhere, or says that it cannot.
            return None
        found.append(_read(graph, watched, prefix))
    return _merged(*found)


def _read(graph: fx.Graph, watched: set[str], prefix: str) -> Links:
    links: Links = {}
    for node in graph.nodes:
        if node.op != "call_module" or node.target not in watched:
            continue
        given = [*node.args, *node.kwargs.values()]
        source = given[0] if given and isinstance(given[0], fx.Node) else None
        reads = None if source is None else _name(source, watched, prefix, "")
        readers = [str(_name(user, watched, prefix, RESULT)) for user in node.users]
        links.setdefault(f"{prefix}{node.target}", []).append(Call(reads, len(given) == 1, readers))
    return links


def _name(node: fx.Node, watched: set[str], prefix: str, result: str) -> str | None:
    if node.op == "call_module" and node.target in watched:
        return f"{prefix}{node.target}"
    if not result:
        return None
    if node.op == "output":
        return result
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


class _Watcher(TorchDispatchMode):
    """Sees every operation of a forward pass, and inside which watched module it happens."""

    def __init__(self) -> None:
        super().__init__()
        self.links: Links = {}
        self.inside: list[str] = []
        self.made: dict[int, Call] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.note((args, kwargs), self.inside[-1] if self.inside else str(func.overloadpacket.__name__))
        return func(*args, **(kwargs or {}))

    def starts(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember whose input this is."""
        given = [*args, *kwargs.values()]
        first = given[0] if given and isinstance(given[0], Tensor) else None
        source = None if first is None else self.made.get(id(first))
        reads = next((p for p, calls in self.links.items() for c in calls if c is source), None)
        self.links.setdefault(path, []).append(Call(reads, len(given) == 1, input=first))
        self.inside.append(path)

    def ends(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember the output, which stays alive, so that no other tensor gets its identity."""
        self.inside.pop()
        last = self.links[path][-1]
        if isinstance(output, Tensor):
            last.output = output
            # A module that returns its input made nothing: who reads it reads what came before.
            self.made.setdefault(id(output), last)

    def note(self, value: Any, reader: str) -> None:
        """Count a reader once per call, however many operations it takes."""
        for tensor in tensors_in(value):
            made = self.made.get(id(tensor))
            if made is not None and made.output is tensor and reader not in made.readers:
                made.readers.append(reader)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in (nested) arguments, a result or a model's output."""
    items: Any = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = vars(value).values()
    for item in items:
        yield from tensors_in(item)
