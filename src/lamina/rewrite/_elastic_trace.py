"""Look into one block on symbols: which hidden channels nothing outside sees, and whether the block can be left out.

Every value is followed by the space its channels live in. A linear layer or a convolution opens a new space; norms,
activations, depthwise convolutions and pooling stay in theirs; sums and products of two values make their spaces one.
A space that layers of the block make and layers of the block read, and that nothing else touches, is a hidden group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lamina.anatomy import is_norm, undisturbed
from lamina.nn.elastic import ElasticBlock, plain_class
from lamina.nn.elastic.layers import CONVOLUTIONS, ElasticBatchNorm, ElasticDepthwiseConv, layer_kind

_SAME = frozenset({
    *("relu", "relu_", "relu6", "gelu", "silu", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "tanh", "mish"),
    *("leaky_relu", "elu", "selu", "celu", "softplus", "dropout", "feature_dropout", "clamp", "clip", "contiguous"),
    *("float", "half", "to", "type_as", "detach", "clone", "neg", "abs", "square", "pow", "exp", "sqrt", "rsqrt"),
    *("alpha_dropout", "dropout2d", "requires_grad_", "bfloat16", "nan_to_num"),
})  # fmt: skip
"""Operations that change every number on its own."""
_POOLING = frozenset({
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "interpolate"),
})  # fmt: skip
_JOINING = frozenset({"add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "truediv", "div"})
_SIZES = frozenset({"size", "dim", "numel", "stride"})
_POOLING_MODULES = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)


class _AnySize(int):
    """Stands for every size a block's forward asks for, and is equal to what it is checked against.

    What a forward computes with sizes has no part in what is looked for here.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


_ANY_SIZE = _AnySize(16)

_STREAM = ("the block is given it", "it leaves the block")
"""Why channels of the stream stay: no news."""


@dataclass
class Group:
    """Hidden channels: the layers that make, change and read them, by their paths in the block."""

    hidden: int
    producers: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    inner: bool = False
    """Whether all producers read, and all consumers make, one other group (squeeze and excitation)."""


@dataclass
class BlockView:
    """What one look at a block showed."""

    groups: list[Group]
    skipped: dict[str, str]
    """Why hidden channels of a layer cannot be fewer, by the layer's path in the block."""
    optional: bool
    """Whether the block adds to the very stream it was given, so that it can be left out."""
    returns_tuple: bool = False


def look_into(block: nn.Module) -> BlockView:
    """Trace a block on symbols; no weight is touched, nothing is changed."""
    tracer = _Tracer()
    try:
        with undisturbed(block), torch.random.fork_rng(devices=[]):
            graph = tracer.trace(_Root(block, tracer))
    except Exception as error:
        # Any code may stand in a forward; the reason is told.
        reason = f"its forward cannot be followed on symbols ({type(error).__name__}: {str(error)[:80]})"
        return BlockView([], {"": reason}, optional=False)
    return _Reader(block, graph).view()


class _Sized(fx.Proxy):
    """A value whose sizes are numbers, so that a forward may compute with them."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (_ANY_SIZE,) * self.tracer.rank  # type: ignore[attr-defined]

    def size(self, dim: int | None = None) -> Any:
        """Return them, or one."""
        return self.shape if dim is None else _ANY_SIZE

    def dim(self) -> int:
        """Return how many there are."""
        return len(self.shape)

    ndim = property(dim)

    def is_floating_point(self) -> bool:
        """Return True: it is."""
        return True


class _Root(nn.Module):
    """Calls the block's forward past its `__call__` (checkpointing), with symbols for what it requires."""

    def __init__(self, block: nn.Module, tracer: _Tracer) -> None:
        super().__init__()
        self.block = block
        self.make = tracer.create_proxy

    def forward(self, stream: Any) -> Any:
        parameters = list(inspect.signature(_forward_of(self.block)).parameters.values())
        needed = [p for p in parameters[1:] if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return _forward_of(self.block)(stream, **{p.name: self.make("placeholder", p.name, (), {}) for p in needed})


def _forward_of(block: nn.Module) -> Callable[..., Any]:
    """Return a block's own forward, also where it is elastic already."""
    return plain_class(block).forward.__get__(block) if isinstance(block, ElasticBlock) else block.forward


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.rank = 4

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        convolutions = [m for m in root.modules() if isinstance(m, CONVOLUTIONS)]
        self.rank = max((m.weight.dim() for m in convolutions), default=3)
        return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if layer_kind(m) is None and any(True for _ in m.children()):
            try:
                return forward(*args, **kwargs)
            except Exception:
                # Not traceable: taken as one opaque unit.
                pass
        elif layer_kind(m) is None and not type(m).__module__.startswith("torch.nn") and not _holds(m):
            try:
                return forward(*args, **kwargs)
            except Exception:
                pass
        return self.create_proxy("call_module", path, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        # Tests on values are taken not to hold.
        return False


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


@dataclass
class _Space:
    """The channels of some values."""

    producers: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    reason: str = ""
    """Why they cannot be fewer; empty = they can."""


class _Reader:
    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.graph = block, graph
        self.live = _live(graph)
        self.spaces: dict[fx.Node, _Space] = {}
        self.streams: dict[fx.Node, int] = {}
        """Values that are the stream the block was given, with how many sums they have seen."""
        self.calls: dict[str, int] = {}
        self.all: list[_Space] = []

    def view(self) -> BlockView:
        optional, is_tuple = False, False
        for node in (n for n in self.graph.nodes if n in self.live):
            if node.op == "placeholder":
                self.spaces[node] = self._space(_STREAM[0])
                if not self.streams:
                    self.streams[node] = 0
            elif node.op == "output":
                optional, is_tuple = self._output(node)
            else:
                self._follow(node)
        groups, skipped = [], {}
        for space in self.all:
            reason = self._reason(space)
            if reason and reason not in _STREAM and space.producers:
                skipped[space.producers[0]] = reason
            if not reason and space.producers and space.consumers:
                hidden = _outputs(self._module(space.producers[0]))
                groups.append(Group(hidden, space.producers, space.between, space.consumers))
        _mark_inner(groups)
        return BlockView(groups, skipped, optional, is_tuple)

    def _reason(self, space: _Space) -> str:
        if space.reason:
            return space.reason
        members = [*space.producers, *space.between, *space.consumers]
        twice = next((m for m in members if self.calls.get(m, 0) > 1), None)
        if twice is not None:
            return f"{twice} runs more than once"
        sizes = {_outputs(self._module(p)) for p in space.producers}
        sizes |= {_inputs(self._module(c)) for c in space.consumers}
        return "" if len(sizes) == 1 else f"layers of different sizes meet in it: {sorted(sizes)}"

    def _follow(self, node: fx.Node) -> None:
        given = [n for n in node.all_input_nodes if n in self.spaces]
        name = _name(node)
        if node.op == "call_module":
            self._call(node, given)
        elif name in _SIZES or (node.target is getattr and node.args[1] in ("device", "dtype", "shape")):
            return
        elif name in _SAME or name in _POOLING or self._keeps_channels(node, name):
            self._pass_on(node, given, stream=name in _SAME)
        elif name in _JOINING:
            self._join(node, given, adding=name in ("add", "add_", "iadd"))
        else:
            self._close(node, given, f"{name} reads it")

    def _call(self, node: fx.Node, given: list[fx.Node]) -> None:
        path = str(node.target).removeprefix("block.")
        module = self.block.get_submodule(path)
        self.calls[path] = self.calls.get(path, 0) + 1
        kind = layer_kind(module)
        if kind is None and len(given) == 1 and _changes_one_by_one(module):
            self._pass_on(node, given, stream=not isinstance(module, _POOLING_MODULES))
        elif kind is None and is_norm(module) and given:
            self.spaces[given[0]].reason = self.spaces[given[0]].reason or f"{path} normalises over its channels"
            self._pass_on(node, given, stream=True)
        elif kind is None or len(given) != 1:
            self._close(node, given, f"{path} reads it")
        elif kind in (ElasticBatchNorm, ElasticDepthwiseConv):
            self.spaces[given[0]].between.append(path)
            self._pass_on(node, given, stream=kind is ElasticBatchNorm)
        else:
            self.spaces[given[0]].consumers.append(path)
            self.spaces[node] = self._space("")
            self.spaces[node].producers.append(path)

    def _pass_on(self, node: fx.Node, given: list[fx.Node], *, stream: bool) -> None:
        if len(given) != 1:
            self._close(node, given, f"{_name(node)} reads it")
            return
        self.spaces[node] = self.spaces[given[0]]
        if stream and given[0] in self.streams:
            self.streams[node] = self.streams[given[0]]

    def _join(self, node: fx.Node, given: list[fx.Node], *, adding: bool) -> None:
        if len(given) < len(node.all_input_nodes):
            self._close(node, given, f"a tensor of the block's own takes part in {_name(node)}")
            return
        if len(given) == 1:
            self._pass_on(node, given, stream=True)
            return
        one, two = (self.spaces[n] for n in given[:2])
        self.spaces[node] = self._merged(one, two)
        streams = [self.streams[n] for n in given if n in self.streams]
        if adding and streams:
            self.streams[node] = max(streams) + 1

    def _merged(self, one: _Space, two: _Space) -> _Space:
        if one is two:
            return one
        for name in ("producers", "between", "consumers"):
            getattr(one, name).extend(getattr(two, name))
        one.reason = one.reason or two.reason
        for node, space in self.spaces.items():
            if space is two:
                self.spaces[node] = one
        self.all.remove(two)
        return one

    def _close(self, node: fx.Node, given: list[fx.Node], reason: str) -> None:
        for one in given:
            self.spaces[one].reason = self.spaces[one].reason or reason
        self.spaces[node] = self._space(f"{_name(node)} makes it")

    def _keeps_channels(self, node: fx.Node, name: str) -> bool:
        """Tell a mean over the places of an image, and padding at its edges."""
        if name == "mean":
            dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            dims = (dims,) if isinstance(dims, int) else dims
            rank = self.rank
            return (
                isinstance(dims, (tuple, list)) and rank > 3 and all(isinstance(d, int) and d % rank > 1 for d in dims)
            )
        if name == "pad":
            edges = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ())
            return isinstance(edges, (tuple, list)) and self.rank > 3 and len(edges) <= 2 * (self.rank - 2)
        return False

    @property
    def rank(self) -> int:
        convolutions = [m for m in self.block.modules() if isinstance(m, CONVOLUTIONS)]
        return max((m.weight.dim() for m in convolutions), default=3)

    def _output(self, node: fx.Node) -> tuple[bool, bool]:
        """Close what leaves the block; tell whether it is the stream, and whether it is a tuple of one."""
        for one in node.all_input_nodes:
            if one in self.spaces:
                self.spaces[one].reason = self.spaces[one].reason or _STREAM[1]
        value: Any = node.args[0]
        single = isinstance(value, (tuple, list)) and len(value) == 1
        first = value[0] if single else value
        return isinstance(first, fx.Node) and self.streams.get(first, 0) > 0, single

    def _space(self, reason: str) -> _Space:
        self.all.append(_Space(reason=reason))
        return self.all[-1]

    def _module(self, path: str) -> Any:
        return self.block.get_submodule(path)


_MIXING = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.ChannelShuffle, nn.MultiheadAttention)
"""Modules without parameters that look at several channels at once."""


def _changes_one_by_one(module: nn.Module) -> bool:
    """Tell a module of torch's without numbers of its own that changes, or pools, every channel on its own."""
    if _holds(module) or not type(module).__module__.startswith("torch.nn"):
        return False
    return not isinstance(module, (*_MIXING, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.Fold, nn.Unfold))


def _mark_inner(groups: list[Group]) -> None:
    """Find the groups that lie between a group and itself, and take what they read and make off that one's ends."""
    for group in groups:
        for other in groups:
            if other is not group and set(group.producers) <= set(other.consumers):
                group.inner = group.inner or set(group.consumers) <= set(other.producers)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes the output depends on; failed attempts to trace into a module leave dead ones behind."""
    waiting = [n for n in graph.nodes if n.op in ("output", "placeholder")]
    live: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting.extend(node.all_input_nodes)
            waiting.extend(u for u in node.users if _changes(u, node))
    return live


def _changes(user: fx.Node, node: fx.Node) -> bool:
    return user.op == "call_method" and str(user.target).endswith("_") and user.args[0] is node


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _outputs(layer: Any) -> int:
    return int(
        layer.out_channels if isinstance(layer, CONVOLUTIONS) else getattr(layer, "out_features", None) or layer.nf
    )


def _inputs(layer: Any) -> int:
    if isinstance(layer, CONVOLUTIONS):
        return int(layer.in_channels)
    return int(getattr(layer, "in_features", None) or layer.nx)
