"""Follow the residual stream through one block: which modules branch off it, and where the norms sit.

The block's own forward runs once on symbols (torch.fx), so flags and helper methods are read as they are and no
weight is touched (the meta device will do). What cannot be traced into is taken as one opaque unit.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from lamina.anatomy._look import undisturbed
from lamina.anatomy._tree import hint, is_attention, is_head_norm, is_inside, is_norm, join, widths

_MEMORY = frozenset({"encoder_hidden_states", "memory", "encoder_output", "encoder_outputs", "cross_attention_states"})
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_SIZES = frozenset({"size", "dim", "numel", "stride"})
_VIEWS = frozenset({"mT", "T", "data"})
"""Attributes of a tensor that are its values again; all others are sizes and the like."""


@dataclass(frozen=True)
class Strand:
    """A branch on its way: the modules it went through since it left the stream."""

    units: tuple[str, ...]
    before: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    crosses: bool = False
    """True where it reads a second input (an encoder's output)."""
    base: int = 0
    """Number of additions the stream had seen where the strand left it; equal = parallel."""


@dataclass
class Branch:
    """A strand that came back to the residual stream."""

    strand: Strand
    scope: str
    """Path, in the block, of the module whose forward does the addition; empty = the block itself."""
    closing: list[str] = field(default_factory=list)
    """Norms of the stream right after the addition (post-norm)."""
    hidden: bool = False
    """True where the addition happens inside an opaque unit."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Everything that belongs to the branch, norms included."""
        s = self.strand
        return (*s.units, *s.before, *s.inner, *s.after, *self.closing)


@dataclass(frozen=True)
class Flow:
    """What one run on symbols showed; paths are relative to the block."""

    branches: tuple[Branch, ...]
    tuples: frozenset[str]
    """Modules that return a tuple."""
    called: tuple[str, ...]
    """Norms and units in the order they were called."""
    residual: bool
    """False where nothing comes back to the stream (the branches are then what reaches the output)."""


def follow(block: nn.Module) -> Flow | None:
    """Trace a block's residual stream; None where its forward cannot run on symbols."""
    for memory in (True, False):
        tracer = _Tracer()
        try:
            # Undisturbed: layer drop would leave a branch out by chance, and symbols must not stay on the modules.
            with undisturbed(block), torch.random.fork_rng(devices=[]):
                graph = tracer.trace(_Root(block, tracer, memory))
        except Exception:
            # Any code may stand in a forward; the caller then reads the tree alone, and says so where it cannot.
            continue
        return _Reader(block, graph, tracer.tuples).read()
    return None


class _Root(nn.Module):
    """Calls the block's forward past its `__call__` (checkpointing, hooks), with stand-ins for what it requires."""

    def __init__(self, block: nn.Module, tracer: _Tracer, memory: bool) -> None:
        super().__init__()
        self.block = block
        self.make = tracer.create_proxy
        self.memory = memory

    def forward(self, stream: Any) -> Any:
        rest = list(inspect.signature(self.block.forward).parameters.values())[1:]
        given: dict[str, Any] = {}
        for p in rest:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            if (self.memory and p.name in _MEMORY) or p.default is p.empty:
                pair = "tuple[int, int]" in str(p.annotation).lower()
                given[p.name] = (8, 8) if pair else self.make("placeholder", p.name, (), {})
        return self.block.forward(stream, **given)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tuples: set[str] = set()

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if not _is_unit(m):
            self.stack.append(path)
            try:
                result = forward(*args, **kwargs)
                if isinstance(result, tuple) or _is_joined_tuple(result):
                    self.tuples.add(path.removeprefix("block."))
                return result
            except Exception:
                # Not traceable: fall through and take the module as one opaque unit.
                pass
            finally:
                self.stack.pop()
        return self.create_proxy("call_module", path, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.stack[-1].removeprefix("block.") if self.stack else ""
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        # Tests on values (overflow clamps, fast paths) are taken not to hold.
        return False

    def keys(self, obj: fx.Proxy) -> Any:
        return ()


def _is_unit(module: nn.Module) -> bool:
    if widths(module) or is_norm(module) or not any(True for _ in module.children()):
        return True
    if any(p.dim() > 1 for p in module.parameters(recurse=False)) and hint(type(module).__name__) == "attention":
        # Its projections are bare weights (XLNet): traced into, they would not show.
        return True
    own_norm = any(is_norm(c) and not is_head_norm(n) for n, c in module.named_children())
    return is_attention(module) and not own_norm


@dataclass(frozen=True)
class _Value:
    role: Literal["stream", "normed", "branch", "memory"]
    strands: tuple[Strand, ...] = ()
    norms: tuple[str, ...] = ()
    sums: int = 0
    """Of the stream: how many additions it has seen."""


class _Reader:
    """Abstract run over the graph: each node is the stream, the normed stream, a branch, a second input, or None."""

    def __init__(self, block: nn.Module, graph: fx.Graph, tuples: set[str]) -> None:
        self.block, self.graph, self.tuples = block, graph, tuples
        self.values: dict[fx.Node, _Value | None] = {}
        self.branches: list[Branch] = []
        self.called: list[str] = []
        self.sums = 0
        self.live = _live(graph)

    def read(self) -> Flow:
        output: _Value | None = None
        placeholders = 0
        for node in self.graph.nodes:
            if node not in self.live:
                continue
            if node.op == "placeholder":
                placeholders += 1
                self.values[node] = _Value("stream") if placeholders == 1 else _memory(node)
            elif node.op == "call_module":
                self.values[node] = self._module(node)
            elif node.op in ("call_function", "call_method"):
                self.values[node] = self._function(node)
                if _is_change(node):
                    # `y.add_(x)`: what reads y from here on reads the sum.
                    self.values[node.args[0]] = self.values[node]
            elif node.op == "output":
                output = self._first(node)
        residual = bool(self.branches)
        if not residual and output is not None and output.role == "branch":
            self._close(output.strands, "")
        return Flow(tuple(self.branches), frozenset(self.tuples), tuple(self.called), residual)

    def _first(self, node: fx.Node) -> _Value | None:
        found = [self.values.get(n) for n in node.all_input_nodes]
        return next((v for v in found if v is not None), None)

    def _module(self, node: fx.Node) -> _Value | None:
        path = str(node.target).removeprefix("block.")
        module = self.block.get_submodule(path)
        given = [v for v in (self.values.get(n) for n in node.all_input_nodes) if v is not None]
        if any(_is_item(user) for user in node.users):
            self.tuples.add(path)
        if is_norm(module):
            self.called.append(path)
            return self._norm(node, path, _merge(given))
        if not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
            return _merge(given)
        self.called.append(path)
        if not any(v.role != "memory" for v in given):
            return given[0] if given else None
        return _Value("branch", (_extend(given, path),))

    def _norm(self, node: fx.Node, path: str, value: _Value | None) -> _Value | None:
        if value is None or value.role == "memory":
            return value
        if value.role == "branch":
            return replace(value, strands=tuple(replace(s, after=(*s.after, path)) for s in value.strands))
        if value.role == "stream" and self._closes(node):
            for branch in self.branches:
                if branch.strand.base == self.branches[-1].strand.base:
                    branch.closing.append(path)
            return value
        return replace(value, role="normed", norms=(*value.norms, path))

    def _closes(self, node: fx.Node) -> bool:
        """Tell whether this norm is the only reader of the sum before it (then it is a post-norm)."""
        source = node.all_input_nodes[0]
        while source.op != "placeholder":
            if sum(u in self.live and not _is_size(u) for u in source.users) != 1:
                return False
            if source.op != "call_module" and source.target in _ADD:
                return bool(self.branches)
            source = next((n for n in source.all_input_nodes if self.values.get(n) is not None), source)
            if source.op == "call_module" and is_norm(self.block.get_submodule(str(source.target)[6:])):
                return False
        return False

    def _function(self, node: fx.Node) -> _Value | None:
        if _is_size(node):
            return None
        if node.target is operator.getitem and _is_item(node) and node.args[1] != 0 and self._is_opaque(node.args[0]):
            return None
        first = node.args[0] if node.args else None
        if node.target in _ADD and isinstance(first, (tuple, list)):
            # Tuples put together, `(hidden,) + rest`: the first element counts.
            return self.values.get(first[0]) if first and isinstance(first[0], fx.Node) else None
        given = [v for v in (self.values.get(n) for n in node.all_input_nodes) if v is not None]
        return self._add(node, given) if node.target in _ADD and len(given) == 2 else _merge(given)

    def _is_opaque(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and (node.op == "call_module" or node.target in _ADD)

    def _add(self, node: fx.Node, given: list[_Value]) -> _Value | None:
        branches = [v for v in given if v.role == "branch"]
        scope = str(node.meta.get("scope", ""))
        if len(branches) == 1:
            if any(v.role in ("stream", "normed") for v in given):
                return self._close(branches[0].strands, scope)
            return branches[0]
        if len(branches) == 2:
            short, long = sorted(branches, key=lambda v: len(v.strands[0].units))
            if self._is_prefix(short, long):
                return self._close_hidden(short.strands[0], long.strands[0], scope)
            separate = not set(_units(short)) & set(_units(long)) and not self._is_one_module(branches, scope)
            return _Value("branch", (*branches[0].strands, *branches[1].strands)) if separate else _merge(given)
        return _merge([v for v in given if v.role == "stream"] or given)

    def _is_one_module(self, branches: list[_Value], scope: str) -> bool:
        """Tell two ways through one module, added up in it (routed and shared experts), from parallel branches."""
        if not scope or not all(is_inside(u, scope) for v in branches for u in _units(v)):
            return False
        attending = [any(is_attention(self.block.get_submodule(u)) for u in _units(v)) for v in branches]
        return attending[0] == attending[1]

    def _is_prefix(self, short: _Value, long: _Value) -> bool:
        """Tell an opaque module that must add the residual itself: its output is the stream of what follows."""
        if len(short.strands) != 1 or len(long.strands) != 1:
            return False
        units = short.strands[0].units
        composed = all(any(True for _ in self.block.get_submodule(u).children()) for u in units)
        return composed and long.strands[0].units[: len(units)] == units != long.strands[0].units

    def _close_hidden(self, short: Strand, long: Strand, scope: str) -> _Value:
        self._close((short,), "", hidden=True)
        rest = long.units[len(short.units) :]
        start = self.called.index(rest[0])
        fresh = [n for n in long.inner if n not in short.inner]
        before = tuple(n for n in fresh if self.called.index(n) < start)
        inner = tuple(n for n in fresh if n not in before)
        return self._close((Strand(rest, before, inner, long.after, base=self.sums),), scope)

    def _close(self, strands: tuple[Strand, ...], scope: str, *, hidden: bool = False) -> _Value:
        self.sums += 1
        known = {b.strand.units for b in self.branches}
        self.branches += [Branch(s, scope, hidden=hidden) for s in strands if s.units not in known]
        return _Value("stream", sums=self.sums)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes the output depends on; failed attempts to trace into a module leave dead ones behind."""
    waiting = [n for n in graph.nodes if n.op in ("output", "placeholder")]
    live: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting.extend(node.all_input_nodes)
            waiting.extend(u for u in node.users if _is_change(u) and u.args[0] is node)
    return live


def _is_change(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "add_" and isinstance(node.args[0], fx.Node)


def _memory(node: fx.Node) -> _Value | None:
    return _Value("memory") if node.target in _MEMORY else None


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[1], (int, slice))


def _is_joined_tuple(result: Any) -> bool:
    """Tell a tuple put together from known and symbolic parts, `(output,) + rest`."""
    node = result.node if isinstance(result, fx.Proxy) else None
    return node is not None and node.target in _ADD and any(isinstance(a, (tuple, list)) for a in node.args)


def _is_size(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] not in _VIEWS
    return node.op == "call_method" and node.target in _SIZES


def _units(value: _Value) -> list[str]:
    return [u for s in value.strands for u in s.units]


def _merge(given: list[_Value]) -> _Value | None:
    """Value of an operation that is no addition: the furthest travelled of its inputs."""
    strands = tuple(dict.fromkeys(s for v in given for s in v.strands))
    if len(strands) == 1 or (strands and sum(bool(v.strands) for v in given) == 1):
        return _Value("branch", strands)
    if strands:
        return _Value("branch", (_joined(strands),))
    for role in ("normed", "stream", "memory"):
        found = [v for v in given if v.role == role]
        if found:
            return max(found, key=lambda v: v.sums)
    return None


def _joined(strands: tuple[Strand, ...]) -> Strand:
    def every(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(x for s in strands for x in getattr(s, name)))

    # A norm that only some of the strands went through (queries, keys) lies inside what they become.
    shared = tuple(n for n in every("after") if all(n in s.after for s in strands))
    inner = tuple(dict.fromkeys((*every("inner"), *(n for n in every("after") if n not in shared))))
    crosses = any(s.crosses for s in strands)
    return Strand(every("units"), every("before"), inner, shared, crosses, max(s.base for s in strands))


def _extend(given: list[_Value], path: str) -> Strand:
    strands = tuple(dict.fromkeys(s for v in given for s in v.strands))
    crosses = any(v.role == "memory" for v in given)
    if not strands:
        norms = tuple(dict.fromkeys(n for v in given for n in v.norms))
        return Strand((path,), before=norms, crosses=crosses, base=max((v.sums for v in given), default=0))
    one = strands[0] if len(strands) == 1 else _joined(strands)
    units = tuple(dict.fromkeys((*one.units, path)))
    return replace(one, units=units, inner=(*one.inner, *one.after), after=(), crosses=one.crosses or crosses)


def outermost(block: nn.Module, units: tuple[str, ...], foreign: set[str]) -> tuple[str, ...]:
    """Climb from each unit to the largest module of the block that holds no module of another branch."""
    found: dict[str, None] = {}
    for unit in units:
        best, steps = unit, unit.split(".")
        for length in range(len(steps) - 1, 0, -1):
            path = join(*steps[:length])
            if any(is_inside(f, path) for f in foreign):
                break
            # A ModuleList has no forward: it is not something that computes a branch.
            if not isinstance(block.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
                best = path
        found[best] = None
    return tuple(found)
