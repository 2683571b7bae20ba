"""Look inside a running model: keep, or watch, what named submodules take and give.

`capture` keeps values, `observe` hands them to callbacks and stores nothing, `run_captured` does one forward pass.
Paths are those of the bare model, also under DistributedDataParallel. A compiled graph passes hooks by, so while one
looks, compiled models and submodules run eagerly, and a warning says so. Hooks are gone afterwards, also on an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy import get
from lamina.batches import Batch, bare, call
from lamina.errors import AnatomyError

Callback = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
"""Called after a watched module ran, with the module, its positional and keyword arguments, and its output."""

Notice = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Called before a watched module runs, with the module, its positional and keyword arguments."""


class _Stop(BaseException):
    """Ends a forward pass early; no `except Exception` in a model's code can swallow it."""


@dataclass
class Captured:
    """What was seen, by path; a list where a module ran more than once."""

    inputs: dict[str, Any] = field(default_factory=dict)
    """First tensor each module was called with (positional before keyword), or its raw arguments if it got none."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """Raw output of each module."""
    result: Any = None
    """What the model returned (set by `run_captured`); None where the pass was ended early."""

    def tensor(self, path: str) -> Tensor:
        """Return the first tensor of a module's output (of its last call).

        Raises:
            AnatomyError: it was not captured, did not run, or gave no tensor.
        """
        return self.tensors(path)[-1]

    def tensors(self, path: str) -> list[Tensor]:
        """Return the first tensor of each output of a module, one per call.

        Raises:
            AnatomyError: it was not captured, did not run, or gave no tensor.
        """
        return _tensors("output", path, self.outputs)

    def input(self, path: str) -> Tensor:
        """Return the first tensor a module was called with (at its last call).

        Raises:
            AnatomyError: it was not captured, did not run, or was given no tensor.
        """
        return _tensors("input", path, self.inputs)[-1]


@contextmanager
def capture(
    model: nn.Module,
    inputs: Iterable[str] = (),
    outputs: Iterable[str] = (),
    *,
    detach: bool = True,
    stop: bool = False,
) -> Iterator[Captured]:
    """Keep what the modules at these paths take and give while the block runs.

    With `stop`, the call that is cut short ends the `with` block as well; `run(model, batch)` returns None instead.

    Args:
        detach: cut the values off the graph (values are not copied: an operation in place would show).
        stop: end the pass as soon as every path was seen once; the rest of the model does not run.
    Raises:
        AnatomyError: no such path (the nearest are named), or no path at all.
    """
    inputs, outputs = tuple(dict.fromkeys(inputs)), tuple(dict.fromkeys(outputs))
    seen = Captured()
    waiting = {("in", p) for p in inputs} | {("out", p) for p in outputs}

    def note(side: str, path: str, table: dict[str, Any], counts: dict[str, int], value: Any) -> None:
        _keep(table, counts, path, _detached(value) if detach else value)
        waiting.discard((side, path))
        if stop and not waiting:
            raise _Stop

    times_in: dict[str, int] = {}
    times_out: dict[str, int] = {}

    def before(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: note("in", path, seen.inputs, times_in, _given(args, kwargs))

    def after(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: note("out", path, seen.outputs, times_out, output)

    hooks_before, hooks_after = {p: before(p) for p in inputs}, {p: after(p) for p in outputs}
    # A call right inside the `with` that was cut short has shown all: that is the end of the block, not an error.
    with suppress(_Stop), _hooked(model, hooks_before, hooks_after):
        yield seen


@contextmanager
def observe(
    model: nn.Module, callbacks: Mapping[str, Callback], before: Mapping[str, Notice] | None = None
) -> Iterator[None]:
    """Call back after each run of the modules at these paths; nothing is stored (streaming statistics).

    Args:
        before: called at the start of each run of the modules at its paths.
    Raises:
        AnatomyError: no such path (the nearest are named), or no path at all.
    """

    def tell(callback: Callback) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            callback(module, args, kwargs, output)

        return after

    def announce(notice: Notice) -> Callable[..., None]:
        # A pre-hook's result would replace the arguments.
        def ahead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            notice(module, args, kwargs)

        return ahead

    starts = {p: announce(n) for p, n in (before or {}).items()}
    with _hooked(model, starts, {p: tell(c) for p, c in callbacks.items()}):
        yield


def run(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """Call a model inside `capture`; return its output, or None where `stop` ended the pass early."""
    try:
        return call(model, batch, **options)
    except _Stop:
        return None


def run_captured(
    model: nn.Module,
    batch: Batch,
    outputs: Iterable[str] = (),
    *,
    inputs: Iterable[str] = (),
    stop: bool = False,
    detach: bool = True,
    **options: Any,
) -> Captured:
    """Run one forward pass and return what was captured, the model's own output as `result`.

    With `detach` there is no gradient through the captured values; wrap the call in `torch.no_grad()` where none is
    needed at all. A path that did not run in this pass is an error.

    Raises:
        AnatomyError: no such path, or a module that did not run.
    """
    inputs, outputs = tuple(inputs), tuple(outputs)
    with capture(model, inputs, outputs, detach=detach, stop=stop) as seen:
        # DistributedDataParallel keeps books of unfinished passes: a pass to be cut short goes around it.
        seen.result = run(bare(model) if stop else model, batch, **options)
    silent = [p for p in inputs if p not in seen.inputs] + [p for p in outputs if p not in seen.outputs]
    if silent:
        raise AnatomyError(f"{type(bare(model)).__name__} did not run {', '.join(map(repr, silent))} on this batch")
    return seen


def first_tensor(value: Any) -> Tensor | None:
    """Return a tensor, or the first one in a tuple, list, mapping or model output; None where there is none."""
    if isinstance(value, Tensor):
        return value
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    return next((t for t in map(first_tensor, items) if t is not None), None)


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return (*args, *kwargs.values())


def _tensors(side: str, path: str, table: Mapping[str, Any]) -> list[Tensor]:
    if path not in table:
        raise AnatomyError(f"no {side} of {path!r} was seen (seen: {', '.join(sorted(table)) or 'none'})")
    value = table[path]
    found = [first_tensor(v) for v in (value if isinstance(value, _Calls) else [value])]
    tensors = [t for t in found if t is not None]
    if len(tensors) < len(found):
        raise AnatomyError(f"the {side} of {path!r} has no tensor, only a {type(value).__name__}")
    return tensors


class _Calls(list[Any]):
    """Values of a module that ran several times, told from an output that is itself a list."""


def _keep(table: dict[str, Any], counts: dict[str, int], path: str, value: Any) -> None:
    counts[path] = counts.get(path, 0) + 1
    if counts[path] == 1:
        table[path] = value
    elif counts[path] == 2:
        table[path] = _Calls([table[path], value])
    else:
        table[path].append(value)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        items = [_detached(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_detached(v) for v in value]
    if type(value) is dict:
        return {k: _detached(v) for k, v in value.items()}
    if isinstance(value, Mapping):
        # A model output class (an ordered mapping built from keywords) keeps its type.
        return type(value)(**{k: _detached(v) for k, v in value.items()})
    return value


@contextmanager
def _hooked(
    model: nn.Module, before: Mapping[str, Callable[..., None]], after: Mapping[str, Callable[..., None]]
) -> Iterator[None]:
    """Hang hooks on, keep compiled graphs and torch's fused encoder path (both pass modules by) off; undo it all."""
    root = bare(model)
    if not before and not after:
        raise AnatomyError(f"nothing to look at in {type(root).__name__}: no path was given")
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as undo:
        for path, hook in before.items():
            undo.callback(get(root, path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for path, hook in after.items():
            undo.callback(get(root, path).register_forward_hook(hook, with_kwargs=True).remove)
        undo.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if _is_compiled(model):
            warnings.warn(
                f"{type(root).__name__} is compiled, and a compiled graph cannot be looked into: it runs eagerly here",
                stacklevel=5,
            )
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _is_compiled(model: nn.Module) -> bool:
    """Tell a model of which any part is compiled, wrapped or in place."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
