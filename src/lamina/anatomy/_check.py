"""Hold a static reading against one forward pass: do the blocks run in sequence, and which norm receives what?"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.anatomy._edit import get
from lamina.anatomy._look import undisturbed
from lamina.anatomy._tree import is_head_norm, is_inside, is_norm
from lamina.batches import Batch, call
from lamina.errors import AnatomyError

Place = Literal["pre", "post", "sandwich", "none"]


@dataclass(frozen=True)
class Call:
    """One run of one module: the first tensor it got and the first it gave (None where there was none)."""

    path: str
    given: Tensor | None
    got: Tensor | None


def trace(model: nn.Module, batch: Batch, paths: set[str]) -> list[Call]:
    """Run one forward pass in eval mode without gradients; list the calls of the modules in the order they ended."""
    calls: list[Call] = []
    with ExitStack() as undo:
        undo.enter_context(undisturbed(model))
        undo.enter_context(torch.no_grad())
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for path in paths:
            given: list[Tensor | None] = []

            # Copies, for a later operation in place would change what was seen; blocks do it to their own input.
            def before(module: nn.Module, args: Any, kwargs: Any, given: list[Tensor | None] = given) -> None:
                given.append(_copy(_first((*args, *kwargs.values()))))

            def after(
                module: nn.Module, args: Any, output: Any, path: str = path, given: list[Tensor | None] = given
            ) -> None:
                calls.append(Call(path, given.pop(), _copy(_first((output,)))))

            undo.callback(get(model, path).register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(get(model, path).register_forward_hook(after).remove)
        call(model, batch)
    return calls


def measured_repeats(calls: list[Call], stack: str, blocks: tuple[str, ...]) -> int | None:
    """Check that the blocks run one after the other, each on what the one before it gave.

    Returns how often the whole stack ran, None where the batch did not reach it.
    Raises:
        AnatomyError: the blocks run in another order, or beside each other.
    """
    ran = [c for c in calls if c.path in blocks]
    if not ran:
        return None
    repeats = len(ran) // len(blocks)
    if [c.path for c in ran] != list(blocks) * repeats:
        raise AnatomyError(f"the blocks of {stack!r} do not run in sequence: {' '.join(c.path for c in ran)}")
    for one, two in itertools.pairwise(ran):
        if _are_neighbours(blocks, one.path, two.path) and not _same(one.got, two.given):
            raise AnatomyError(
                f"the blocks of {stack!r} do not run in sequence: {two.path!r} does not read what {one.path!r} gives"
            )
    return repeats


def measured_norms(
    model: nn.Module, calls: list[Call], block: str, parts: tuple[str, ...], taken: set[str]
) -> tuple[tuple[str, ...], Place]:
    """Decide by values which norms beside a branch belong to it, and where they sit.

    Args:
        parts: modules of the branch.
        taken: what is not to be judged: parts of other branches, post-norms of earlier ones.
    Returns:
        (norms in the order they run, place); no norms where the values say nothing (the branch did not run, keeps its
        norms inside, or takes its input in another order, as windows do).
    """
    first = {c.path: c for c in reversed(calls)}
    start, end = first.get(parts[0]), first.get(parts[-1])
    if start is None or end is None or start.given is None or end.got is None:
        return (), "none"
    summed = start.given + end.got.reshape(start.given.shape) if start.given.numel() == end.got.numel() else None
    roles: dict[str, str] = {}
    for name, module in get(model, block).named_modules():
        path = f"{block}.{name}".strip(".")
        seen = first.get(path)
        if seen is None or not is_norm(module) or is_head_norm(path) or _within(path, (*parts, *taken)):
            continue
        if _same(seen.got, start.given):
            roles[path] = "before"
        elif _same(seen.given, end.got):
            roles[path] = "behind"
        elif _same(seen.given, summed):
            roles[path] = "after"
    before, behind, after = ([n for n, r in roles.items() if r == role] for role in ("before", "behind", "after"))
    place: Place = "post" if after else "sandwich" if behind else "pre" if before else "none"
    return (*before, *behind, *after), place


def _within(path: str, outer: tuple[str, ...]) -> bool:
    return any(is_inside(path, o) for o in outer)


def _are_neighbours(blocks: tuple[str, ...], one: str, two: str) -> bool:
    """Tell blocks that follow each other in their container (a downsampling sibling may stand between)."""
    first, second = one.rpartition(".")[2], two.rpartition(".")[2]
    if first.isdigit() and second.isdigit() and one != two and len(blocks) > 1:
        return int(second) == int(first) + 1
    return True


def _first(values: tuple[Any, ...]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (tuple, list)):
            found = _first(tuple(value))
            if found is not None:
                return found
        if isinstance(value, dict):
            found = _first(tuple(value.values()))
            if found is not None:
                return found
    return None


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None or one.numel() != two.numel() or one.dtype != two.dtype:
        return False
    loose = 1e-5 if one.dtype in (torch.float32, torch.float64) else 1e-2
    return bool(torch.allclose(one, two.reshape(one.shape), rtol=loose, atol=loose * float(one.abs().max())))
