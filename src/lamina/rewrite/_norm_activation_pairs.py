"""Find the batch norms that an activation follows, those that none follows, and say why others cannot be told."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lamina.anatomy import get, undisturbed
from lamina.errors import AnatomyError
from lamina.nn import TokenBatchNorm

ACTIVATIONS: dict[str, tuple[type[nn.Module], ...]] = {
    "relu": (nn.ReLU,),
    "relu6": (nn.ReLU6,),
    "silu": (nn.SiLU,),
    "hardswish": (nn.Hardswish,),
    "gelu": (nn.GELU,),
    "elu": (nn.ELU,),
    "leaky_relu": (nn.LeakyReLU,),
    "mish": (nn.Mish,),
    "tanh": (nn.Tanh,),
    "sigmoid": (nn.Sigmoid,),
    "softplus": (nn.Softplus,),
    "hardtanh": (nn.Hardtanh,),
    "hardsigmoid": (nn.Hardsigmoid,),
    "selu": (nn.SELU,),
    "celu": (nn.CELU,),
    "prelu": (nn.PReLU,),
}
"""By the name of the function; as a module, a call (`F.relu`) or a method (`x.relu_()`)."""

FUNCTIONAL = "functional"
"""Stands for the path of an activation that is no module."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_SUMS = ("add", "iadd", "add_")
_ROOT = ""


@dataclass(frozen=True)
class ActivationCall:
    """One call of an activation."""

    name: str
    path: str
    """Of the module, or `FUNCTIONAL`."""
    block: str
    """Path of the module in whose forward it is called."""
    ordinal: int
    """Which of the activation calls of that forward it is, counted from 0."""


@dataclass(frozen=True)
class NormCall:
    """One call of a norm: with the activation that alone reads it, or without one, or why it cannot be told."""

    path: str
    activation: ActivationCall | None
    reason: str
    before_sum: bool
    """Whether a sum reads it that an activation follows (a post-activation net)."""


@dataclass(frozen=True)
class Seen:
    """What the traces of a model show."""

    norms: list[NormCall]
    activations: list[ActivationCall]
    parts: list[str]
    """Paths of the parts that were traced; the empty path is the whole model."""


def candidates(model: nn.Module, match: str | None) -> dict[str, _BatchNorm]:
    """Return every batch norm whose path matches.

    Raises:
        AnatomyError: there is no batch norm, or none at such a path.
    """
    known = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not known:
        raise AnatomyError(f"{type(model).__name__} has no batch norm: there is no pair of norm and activation to fuse")
    norms = {path: m for path, m in known.items() if match is None or fnmatch.fnmatchcase(path, match)}
    if not norms:
        raise AnatomyError(
            f"no batch norm of {type(model).__name__} stands at a path like {match!r}; they are at {', '.join(known)}"
        )
    return norms


def kind_reason(norm: _BatchNorm) -> str:
    """Say why a norm cannot be replaced whatever follows it; empty = it can."""
    name = type(norm).__name__
    if isinstance(norm, TokenBatchNorm):
        return "its features are the last dimension, and a fused layer has its channels in dimension 1"
    if type(norm) not in _NORMS and joint_activation(norm) is None:
        return f"{name} is a class of its own, which may compute something else"
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return "hooks are registered on it, or its forward is patched"
    return ""


def joint_activation(norm: nn.Module) -> nn.Module | None:
    """Return the activation inside a joint module, such as timm's `BatchNormAct2d` (children `drop` and `act`)."""
    inner = getattr(norm, "act", None)
    plain = all(type(m) is nn.Identity for name, m in norm.named_children() if name != "act")
    known = isinstance(norm, _BatchNorm) and type(norm).__name__.startswith("BatchNormAct") and plain
    return inner if known and isinstance(inner, nn.Module) else None


def name_of(module: nn.Module) -> str:
    """Name the activation that a module computes; empty = none that is known."""
    return next((name for name, types in ACTIVATIONS.items() if type(module) in types), "")


def look(model: nn.Module, norms: Mapping[str, nn.Module], wanted: Collection[str]) -> Seen:
    """Trace a model with torch.fx, or else those of its parts that can be traced; once as in evaluation and once as in
    training. Runs nothing, changes nothing.
    """
    seen = Seen([], [], [])
    with undisturbed(model):
        for path, part in _parts(model, norms, _ROOT):
            found = []
            for training in (False, True):
                graph = _trace(part, training)
                assert graph is not None
                found.append(_Reader(model, path, graph, norms, wanted))
            first, second = (reader.norm_calls() for reader in found)
            seen.norms.extend(first if _told(first) == _told(second) else [_differs(call) for call in first])
            seen.activations.extend(found[0].activations.values())
            seen.parts.append(path)
    return seen


def _told(calls: Iterable[NormCall]) -> list[tuple[str, ActivationCall | None, bool]]:
    return [(c.path, c.activation, bool(c.reason)) for c in calls]


def _differs(call: NormCall) -> NormCall:
    return NormCall(call.path, None, "what reads it in training is not what reads it in evaluation", False)


def _parts(model: nn.Module, norms: Mapping[str, nn.Module], path: str) -> Iterator[tuple[str, nn.Module]]:
    """Find the largest parts that hold norms and can be traced."""
    part = get(model, path)
    if not any(m is norm for m in part.modules() if m is not part for norm in norms.values()):
        return
    if _trace(part, False) is not None and _trace(part, True) is not None:
        yield path, part
        return
    for name, _ in part.named_children():
        yield from _parts(model, norms, f"{path}.{name}".lstrip("."))


def is_activation(node: fx.Node, root: nn.Module) -> str:
    """Name the activation that a node computes; empty = it is another operation."""
    if node.op == "call_module":
        return name_of(root.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return ""
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = called.removesuffix("_")
    return name if name in ACTIVATIONS else ""


class _Tracer(fx.Tracer):
    """Goes into everything but torch's own layers, norms (joint ones, too) and activations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or bool(name_of(m)) or super().is_leaf_module(m, module_qualified_name)


def _trace(part: nn.Module, training: bool) -> fx.Graph | None:
    for module in part.modules():
        module.training = training
    try:
        return _Tracer().trace(part)
    except Exception:
        # Any code may stand in a forward; the caller then looks at its parts.
        return None


class _Reader:
    """Reads the calls of norms and activations off one graph."""

    def __init__(
        self, model: nn.Module, part: str, graph: fx.Graph, norms: Mapping[str, nn.Module], wanted: Collection[str]
    ) -> None:
        self.root, self.part, self.graph, self.wanted = get(model, part), part, graph, wanted
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.known = {id(m) for m in norms.values()}
        self.activations: dict[fx.Node, ActivationCall] = {}
        counted: dict[str, int] = {}
        for node in graph.nodes:
            if name := is_activation(node, self.root):
                key, block = self._caller(node)
                path = self._path(str(node.target)) if node.op == "call_module" else FUNCTIONAL
                self.activations[node] = ActivationCall(name, path, block, counted.get(key, 0))
                counted[key] = counted.get(key, 0) + 1

    def norm_calls(self) -> list[NormCall]:
        calls = [n for n in self.graph.nodes if n.op == "call_module" and id(self._module(n)) in self.known]
        return [self._call(node) for node in calls]

    def _call(self, node: fx.Node) -> NormCall:
        path, readers = self._path(str(node.target)), list(_readers(node))
        acting = [r for r in readers if r in self.activations]
        if len(readers) == 1 and acting and readers[0].args and self.activations[acting[0]].name in self.wanted:
            return NormCall(path, self.activations[acting[0]], "", False)
        if acting:
            names = " and ".join(dict.fromkeys(_word(r) for r in readers))
            only = "" if len(readers) == 1 else ", not by one activation alone"
            return NormCall(path, None, f"its output is read by {names}{only}", False)
        if self.part and any(r.op == "output" for r in readers):
            # What the rest of the model does with it was not seen.
            return NormCall(path, None, f"its output leaves {self.part}, and more of the model cannot be traced", False)
        return NormCall(path, None, "", any(self._is_sum_before_activation(r) for r in readers))

    def _is_sum_before_activation(self, node: fx.Node) -> bool:
        called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        is_sum = node.op in ("call_function", "call_method") and called in _SUMS
        return is_sum and any(r in self.activations for r in _readers(node))

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _path(self, target: str) -> str:
        """Return the first of a module's paths in the whole model."""
        return self.paths[id(self.root.get_submodule(target))]

    def _caller(self, node: fx.Node) -> tuple[str, str]:
        """Return (what tells this call of the caller from others, the caller's path in the model)."""
        stack = list(node.meta.get("nn_module_stack", {}).items())
        stack = stack[:-1] if node.op == "call_module" else stack
        if not stack:
            return _ROOT, self.part
        key, (path, _) = stack[-1]
        return key, self._path(path)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Go through whatever returns its input."""
    for user in node.users:
        if user.op == "call_module" and _is_identity(user):
            yield from _readers(user)
        else:
            yield user


def _is_identity(node: fx.Node) -> bool:
    # A called module is the last on its own stack.
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return bool(stack) and stack[-1][1] is nn.Identity


def _word(node: fx.Node) -> str:
    if node.op == "output":
        return "whoever calls the model"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
