"""What stands where a dropped part was: modules without parameters, so that the block around them stays as it is."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy import Block, Sublayer, get, swap
from lamina.errors import AnatomyError
from lamina.rewrite._fused_layer import leave_fused_path

Rest = tuple[tuple[str, int] | None, ...]
"""What follows the first element of a returned tuple: a (name, position) argument handed through, or None."""


class Skip(nn.Module):
    """Returns its first tensor unchanged, or after `norm`; takes any arguments.

    Args:
        norm: a post-norm that stays.
        rest: None = return a tensor; else a tuple that goes on with these (arguments handed through, or None).
    """

    def __init__(self, norm: nn.Module | None = None, *, rest: Rest | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.rest = rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the stream through."""
        x = _first(args, kwargs)
        return _filled(x if self.norm is None else self.norm(x), self.rest, args, kwargs)


class SkipBranch(nn.Module):
    """Returns zeros of its first tensor's shape, for a block that adds what its branch returns.

    Zeros of their own, not one that is expanded: a block may write into them (Falcon adds its branches in place, others
    have an in-place dropout).
    """

    # torch.nn.TransformerEncoderLayer reads it: without a bias it takes no fused path.
    in_proj_bias: Tensor | None = None

    def __init__(self, *, rest: Rest | None = None, batch_first: bool = True) -> None:
        super().__init__()
        self.rest, self.batch_first = rest, batch_first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros."""
        x = _first(args, kwargs)
        return _filled(torch.zeros_like(x), self.rest, args, kwargs)


def skip_sublayer(model: nn.Module, block: Block, sublayer: Sublayer, *, keep_norm: bool) -> None:
    """Take one residual branch out of a block, in place; weights need not be there (meta).

    Args:
        keep_norm: leave the norm of a post-norm branch: the stream becomes norm(x) instead of x.
    Raises:
        AnatomyError: its norm serves another branch as well, and the branch adds the residual itself.
    """
    kept = sublayer.norms[-1:] if keep_norm and sublayer.place == "post" else ()
    outside = _own_norms(block, sublayer)
    shared = _outside(sublayer) - outside
    if sublayer.residual_inside:
        if shared:
            raise AnatomyError(f"{sublayer.path} cannot go: its norm {', '.join(sorted(shared))} serves another branch")
        *earlier, last = sublayer.parts
        for part in earlier:
            _put(model, part, Skip(rest=_rest(model, sublayer, part)))
        norm = get(model, kept[0]) if kept else None
        _put(model, last, Skip(norm, rest=_rest(model, sublayer, last)))
    else:
        for part in sublayer.parts:
            order = bool(getattr(get(model, part), "batch_first", True))
            _put(model, part, SkipBranch(rest=_rest(model, sublayer, part), batch_first=order))
    for norm_path in outside - set(kept):
        _put(model, norm_path, Skip())
    leave_fused_path(model, block.path)


def _own_norms(block: Block, sublayer: Sublayer) -> set[str]:
    """Norms outside the branch's modules that no other branch of the block uses (GPT-J's feed both)."""
    others = {n for s in block.sublayers if s is not sublayer for n in s.norms}
    return _outside(sublayer) - others


def _outside(sublayer: Sublayer) -> set[str]:
    return {n for n in sublayer.norms if not any(n == p or n.startswith(p + ".") for p in sublayer.parts)}


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    old = get(model, path)
    swap(model, path, new)
    new.training = old.training


def _rest(model: nn.Module, sublayer: Sublayer, part: str) -> Rest | None:
    if part != sublayer.path or sublayer.returns == "tensor":
        return None
    return returned_rest(get(model, part))


def returned_rest(module: nn.Module) -> Rest:
    """Read from a forward's source what its tuple holds after the first element.

    T5's attention returns (x, position_bias, weights): an element named as an argument is handed through, as the
    next block needs it; any other becomes None. A source that does not tell counts as (x, weights).
    """
    forward = type(module).forward
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return (None,)
    tuples = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple)]
    if not tuples:
        return (None,)
    names = [p for p in inspect.signature(forward).parameters if p != "self"]
    return tuple(
        (e.id, names.index(e.id)) if isinstance(e, ast.Name) and e.id in names else None for e in tuples[-1].elts[1:]
    )


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a dropped part was called without a tensor")


def _filled(x: Tensor, rest: Rest | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if rest is None:
        return x
    return (x, *(None if r is None else args[r[1]] if r[1] < len(args) else kwargs.get(r[0]) for r in rest))
