"""One pass of a network at x0 with probes beside it: every decision is x0's, what is left acts on the probes linearly.

The model's own code runs on x0 alone, untouched; a torch function mode sees each call, and does for the probes what
x0 decided. Nothing is kept from layer to layer but what the model itself keeps.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from lamina import probe
from lamina.errors import LaminaError
from lamina.verify.linear_scopes import table
from lamina.verify.linear_scopes.call import Call, NoRuleError, Settings, put_together, take_apart
from lamina.verify.linear_scopes.selections import tangent
from lamina.verify.linear_scopes.units import STRAIGHT

UserScope = Callable[[Callable[..., Any], Tensor, Tensor, Callable[..., Tensor]], Tensor]
"""(unit, part0, part1, affine) -> part 1 of the unit's output."""


@dataclass(frozen=True)
class Unit:
    """One unit whose decision was frozen."""

    path: str
    """The module that called it."""
    function: str
    gain: float
    """The largest |gain|."""


class FrozenPass(TorchFunctionMode):
    """Follows probes through whatever runs while it is open.

    Args:
        model: whose modules are named in messages.
        functions: a user's scopes by the name of the torch function.
        settings: rule, strictness, number of probes.
        differentiable: keep the graph of the probes.
    """

    def __init__(
        self,
        model: nn.Module,
        functions: Mapping[str, UserScope],
        settings: Settings,
        *,
        differentiable: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.functions, self.settings, self.differentiable = model, functions, settings, differentiable
        self.probes, self.decided, self.straight = (WeakTensorKeyDictionary() for _ in range(3))
        self.inside_scope = 0
        self.units: list[Unit] = []
        self.unknown: list[str] = []

    def follow(self, value: Tensor, part1: Tensor) -> None:
        """Let part 1 belong to a tensor of the model from here on."""
        self.probes[value] = part1

    def part1(self, value: Tensor) -> Tensor | None:
        """Return what belongs to a tensor; None: it does not depend on the probe."""
        found: Tensor | None = self.probes.get(value)
        if found is None and value._is_view() and value._base in self.probes:
            with torch.set_grad_enabled(self.differentiable):
                found = _same_view(self.probes[value._base], value, self.settings.count)
            self.probes[value] = found
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a call at x0, and its rule on the probes."""
        kwargs = kwargs or {}
        if self.inside_scope:
            return func(*args, **kwargs)
        leaves, spec = take_apart(args, kwargs)
        moving = {i: p for i, x in enumerate(leaves) if isinstance(x, Tensor) and (p := self.part1(x)) is not None}
        if not moving:
            return self._undisturbed(func, args, kwargs, leaves)
        return self._followed(func, args, kwargs, leaves, spec, moving)

    def _undisturbed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> Any:
        """Run what does not depend on the probe; what is computed from decisions is one."""
        chosen = any(isinstance(x, Tensor) and x in self.decided for x in leaves)
        if chosen and table.name_of(func) in table.CONTROL:
            self._refuse_control(func)
        result = func(*args, **kwargs)
        if chosen:
            self._decide(result)
        return result

    def _followed(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        spec: Any,
        moving: dict[int, Tensor],
    ) -> Any:
        name = table.name_of(func)
        if name in table.CONTROL:
            self._refuse_control(func)
        if isinstance(kwargs.get("out"), Tensor) or name == "__set__":
            raise LaminaError(f"{self._call(func)} writes into a tensor that was there before: this cannot be followed")
        written = leaves[0] if table.in_place(func, args, kwargs) else None
        if written is not None:
            if 0 not in moving:
                moving = {0: self._make_room(written), **moving}
            # What a ReLU passed shows in its output as well.
            before = leaves[0].detach() if name == "relu" else leaves[0].detach().clone()
            leaves = [before, *leaves[1:]]
        result = func(*args, **kwargs)
        if written is None and (_tensorless(result) or result is leaves[0] or name in table.NEW):
            return result
        args, kwargs = put_together(leaves, spec)
        straight = {i for i in moving if leaves[i] in self.straight}
        target = None if written is None else 0
        call = Call(func, name, args, kwargs, leaves, spec, moving, straight, self.settings, target)
        call.result = written if written is not None else result
        with torch.set_grad_enabled(self.differentiable):
            part1 = self._mirror(call)
            self._assign(call, part1, moving.get(0) if written is not None else None)
        return result

    def _mirror(self, call: Call) -> Any:
        """Return part 1 of the result, by the user's rule, ours, or the tangent."""
        name = call.name
        if name in self.functions:
            return self._by_user(call, self.functions[name])
        if name in table.CONSTANT:
            return _nothing(call.result)
        if name in table.DROPOUT:
            if not call.at(2, "training", call.kwargs.get("train", False)):
                return call.probes[0]
            raise LaminaError(f"{self._call(call.function)} drops at random although the model is in evaluation mode")
        reason = ", it gives whole numbers" if name in table.ROUNDING else ""
        scope = None if reason else table.SCOPES.get(name)
        if scope is not None:
            try:
                part1 = scope(call)
            except NoRuleError as error:
                reason = f" for this call ({error})"
            else:
                self._note(call)
                return _nothing(call.result) if part1 is None else part1
        return self._unknown(call, reason)

    def _unknown(self, call: Call, reason: str) -> Any:
        where = self._call(call.function)
        if self.settings.strict:
            raise LaminaError(
                f"there is no linear rule for {where}{reason}: give one, as rules={{{call.name}: scope}}, or take its "
                "tangent at x0 with strict=False"
            )
        warnings.warn(f"{where} has no linear rule{reason}: its tangent at x0 is taken", stacklevel=4)
        self.unknown.append(where)
        try:
            return tangent(call)
        except NoRuleError as error:
            raise LaminaError(f"there is no linear rule for {where}{reason}, {error}") from error

    def _by_user(self, call: Call, scope: UserScope) -> Any:
        if 0 not in call.probes:
            raise LaminaError(f"the rule for {call.name} needs the first argument of {self._call(call.function)}")
        part0 = call.leaves[0]
        part1 = call.over(lambda x: scope(call.unit, part0, x, _affine(x)), call.probes[0])
        return self._checked(part1, call.result, call.name)

    def _checked(self, part1: Any, result: Any, name: str) -> Tensor:
        lead = () if self.settings.count is None else (self.settings.count,)
        if not isinstance(result, Tensor) or not isinstance(part1, Tensor) or part1.shape != (*lead, *result.shape):
            got = tuple(part1.shape[len(lead) :]) if isinstance(part1, Tensor) else type(part1).__name__
            wanted = tuple(result.shape) if isinstance(result, Tensor) else "one tensor"
            raise LaminaError(f"the rule for {name} must return part 1 of the output, {wanted}, and returned {got}")
        return part1

    def _assign(self, call: Call, part1: Any, written: Tensor | None) -> None:
        """Keep part 1 of every tensor of the result."""
        if written is not None:
            self._write(call.leaves[0], call.result, written, part1)
            return
        alone = isinstance(call.result, Tensor)
        pairs = [(call.result, part1)] if alone else zip(*map(pytree.tree_leaves, (call.result, part1)), strict=True)
        for value, moved in pairs:
            if not isinstance(value, Tensor):
                continue
            if moved is None:
                self.decided[value] = True
                continue
            if not (value.is_floating_point() or value.is_complex()):
                raise LaminaError(f"{self._call(call.function)} makes whole numbers of what depends on the input")
            self.probes[value] = moved
            if call.name in STRAIGHT:
                self.straight[value] = True

    def _write(self, before: Tensor, target: Tensor, written: Tensor, part1: Tensor | None) -> None:
        """Change the probe of a tensor as that was changed, in place, so that its views change as well."""
        if part1 is None:
            part1 = self.settings.spread(target)
        if before.shape == target.shape:
            try:
                written.copy_(part1)
            except RuntimeError:
                # One of several views of a split, which autograd does not let anybody write into: by a view of its own.
                base = written._base
                if base is None:
                    raise
                written = base.as_strided(written.shape, written.stride(), written.storage_offset())
                self.probes[target] = written.copy_(part1)
        else:
            self.probes[target] = part1

    def _make_room(self, target: Tensor) -> Tensor:
        """Give a constant that is about to be written into a part 1 of its own, and so what it is a view of."""
        base = target._base if target._is_view() else None
        if base is None:
            self.probes[target] = self.settings.spread(target)
        else:
            self.probes[base] = self.settings.spread(base)
            with torch.set_grad_enabled(self.differentiable):
                self.probes[target] = _same_view(self.probes[base], target, self.settings.count)
        found: Tensor = self.probes[target]
        return found

    def _decide(self, result: Any) -> None:
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value not in self.probes:
                self.decided[value] = True

    def _note(self, call: Call) -> None:
        if call.gains:
            gain = max(float(g.abs().max()) if g.is_floating_point() else float(g.any()) for g in call.gains)
            self.units.append(Unit(self._where(), call.name, gain))

    def _refuse_control(self, func: Callable[..., Any]) -> None:
        text = (
            f"{self._call(func)} takes a value of the input's out of torch: what the code does with it is not followed"
        )
        if self.settings.strict:
            raise LaminaError(f"{text} (strict=False keeps to what it does at x0)")
        warnings.warn(f"{text}, only what it did at x0", stacklevel=5)
        self.unknown.append(self._call(func))

    def _call(self, func: Callable[..., Any]) -> str:
        return f"{getattr(func, '__name__', func)} in {self._where()}"

    def _where(self) -> str:
        """Name the innermost module whose code is running."""
        paths = {id(m): (path, type(m).__name__) for path, m in self.model.named_modules()}
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            found = paths.get(id(frame.f_locals.get("self")))
            if found is not None:
                return f"{found[0]} ({found[1]})" if found[0] else found[1]
        return type(self.model).__name__

    @contextmanager
    def module_scopes(self, rules: Mapping[type[nn.Module], UserScope]) -> Iterator[None]:
        """While open, modules of these types are units of their own: a user's rule stands for all that they call."""
        found = {p: s for p, m in self.model.named_modules() for t, s in rules.items() if isinstance(m, t)}
        if not found:
            yield
            return
        given: list[tuple[Tensor, Tensor] | None] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = probe.first_tensor((args, kwargs))
            part1 = None if x is None or self.inside_scope else self.part1(x)
            given.append(None if x is None or part1 is None else (x.detach().clone(), part1))
            self.inside_scope += 1

        def after(path: str) -> probe.Callback:
            def close(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self.inside_scope -= 1
                pair = given.pop()
                if pair is not None:
                    self._by_user_module(module, found[path], pair, output)

            return close

        with probe.observe(self.model, {p: after(p) for p in found}, dict.fromkeys(found, before)):
            yield

    def _by_user_module(self, module: nn.Module, scope: UserScope, pair: tuple[Tensor, Tensor], output: Any) -> None:
        part0, part1 = pair
        call = Call(module, "", (), {}, [], None, {0: part1}, set(), self.settings)
        with torch._C.DisableTorchFunction(), torch.set_grad_enabled(self.differentiable):
            moved = call.over(lambda x: scope(module, part0, x, _affine(x)), part1)
        value = probe.first_tensor(output)
        assert value is not None
        self.probes[value] = self._checked(moved, value, type(module).__name__)


def _affine(part1: Tensor) -> Callable[..., Tensor]:
    def affine(gain: Tensor, constant: Tensor | float = 0.0) -> Tensor:
        return part1 * gain + constant

    return affine


def _nothing(result: Any) -> Any:
    if isinstance(result, Tensor):
        return None
    return pytree.tree_map(lambda _: None, result)


def _tensorless(result: Any) -> bool:
    if isinstance(result, Tensor):
        return False
    return not any(isinstance(x, Tensor) for x in pytree.tree_leaves(result))


def _same_view(base: Tensor, view: Tensor, count: int | None) -> Tensor:
    """Return the view of a base's part 1 that `view` is of the base."""
    origin = view._base
    assert origin is not None
    lead = base.dim() - origin.dim()
    if base.stride()[lead:] != origin.stride() or base.dtype != view.dtype:
        raise LaminaError(f"a view of shape {tuple(view.shape)} was written into in a way that cannot be followed")
    offset = view.storage_offset() - origin.storage_offset()
    return base.as_strided(
        (*base.shape[:lead], *view.shape), (*base.stride()[:lead], *view.stride()), base.storage_offset() + offset
    )
