"""Leave single activation calls out of a block's forward, by re-tracing it; its parameters, names and class stay."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from lamina.anatomy import undisturbed
from lamina.errors import AnatomyError
from lamina.rewrite._norm_activation_pairs import is_activation, name_of


def leave_out(block: nn.Module, ordinals: Collection[int]) -> None:
    """Let a block skip the activation calls of its forward with these numbers, counted from 0; in place.

    A `nn.Sequential` gets an identity there. Any other block becomes an instance of a class derived from its own
    whose forward is the traced one: attributes, hooks, children and `isinstance` stay.

    Raises:
        AnatomyError: the block cannot be traced by itself.
    """
    if _is_sequential(block):
        acting = [name for name, m in block._modules.items() if m is not None and name_of(m)]
        for ordinal in ordinals:
            block.register_module(acting[ordinal], nn.Identity().train(block.training))
        return
    kind: Any = type(block)
    block.__class__ = _derived(kind, *_code(block, ordinals))


def check(block: nn.Module, ordinals: Collection[int]) -> None:
    """Find out whether `leave_out` could do it; changes nothing.

    Raises:
        AnatomyError: it could not, and why.
    """
    if not _is_sequential(block):
        _code(block, ordinals)


def _is_sequential(block: nn.Module) -> bool:
    return type(block).forward is nn.Sequential.forward


def _code(block: nn.Module, ordinals: Collection[int]) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Return (source of the forward without these calls, the global names in it)."""
    name = type(block).__name__
    if "forward" in vars(block):
        raise AnatomyError(f"the forward of this {name} is not its class's (patched)")
    optional = {n: p.default for n, p in _parameters(block).items() if p.default is not inspect.Parameter.empty}
    with undisturbed(block):
        block.training = True
        trained = _traced(block, ordinals).python_code("self")
        block.training = False
        graph = _traced(block, ordinals)
        code = graph.python_code("self")
        if trained.src != code.src:
            raise AnatomyError(f"the forward of {name} is another one in training than in evaluation")
        if optional and _operations(graph) != _operations(_traced(block, ordinals, optional)):
            raise AnatomyError(f"the forward of {name} is another one with its optional arguments than without")
    return code.src, tuple(code.globals.items())


def _parameters(block: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(block.forward).parameters)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(block: nn.Module, ordinals: Collection[int], given: dict[str, Any] | None = None) -> fx.Graph:
    try:
        graph = _Tracer().trace(block, given)
    except Exception as error:
        # Any code may stand in a forward.
        raise AnatomyError(f"{type(block).__name__} cannot be traced by itself: {error}") from error
    acting = [node for node in graph.nodes if is_activation(node, block)]
    for ordinal in ordinals:
        node, source = acting[ordinal], acting[ordinal].args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    return graph


def _operations(graph: fx.Graph) -> list[tuple[str, str]]:
    """List what a graph does; the checks that fx adds for given arguments are no part of it."""
    found = [(n.op, str(n.target)) for n in graph.nodes if n.op.startswith("call")]
    return [one for one in found if "_assert" not in one[1] and " eq " not in one[1]]


@functools.cache
def _derived(base: Any, source: str, names: tuple[tuple[str, Any], ...]) -> Any:
    """Make the class; equal blocks share it."""
    scope = dict(names)
    exec(compile(source, f"<traced forward of {base.__name__}>", "exec"), scope)
    made = type(base.__name__, (base,), {"__module__": base.__module__, "forward": scope["forward"]})
    made.__doc__ = f"{base.__name__} whose forward leaves out activations that a norm computes now."
    return made
