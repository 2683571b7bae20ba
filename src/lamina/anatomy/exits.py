"""Where a residual stream can be left: after any block of a trunk, through the norm that the model ends with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lamina.anatomy import Trunk, _width, dissect, get
from lamina.batches import bare
from lamina.errors import AnatomyError, ShapeError


@dataclass(frozen=True)
class Exits:
    """What must be known to read the stream after block n = 1..depth as if the model ended there."""

    trunk: str
    """Path of the stack of blocks."""
    blocks: tuple[str, ...]
    """Paths of the blocks, in the order they run; each module once."""
    depth: int
    """How many blocks run in one pass; more than there are paths where one runs several times (ALBERT)."""
    norm: str | None
    """Path of the norm after the last block; None where there is none (post-norm blocks)."""
    width: int
    """Channels of the stream."""
    time_first: bool
    """Whether the stream is (T, B, C)."""

    def tokens(self, x: Tensor) -> Tensor:
        """Bring the stream into the order (B, T, C): from (T, B, C), or from a grid (B, C, H, W) or (B, H, W, C).

        Raises:
            ShapeError: it has another form, or another width.
        """
        if x.dim() == 4:
            x = (x.movedim(1, -1) if x.shape[1] == self.width else x).flatten(1, 2)
        elif x.dim() == 3 and self.time_first:
            x = x.transpose(0, 1)
        if x.dim() != 3 or x.shape[-1] != self.width:
            raise ShapeError(
                f"the stream of {self.trunk} should be (batch, tokens, {self.width}), got {tuple(x.shape)}"
            )
        return x

    def normed(self, model: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the final norm, if there is one, on tokens (B, T, C).

        Args:
            mask: (B, T), for a norm that takes statistics over tokens (`takes_mask`).
        """
        if self.norm is None:
            return x
        norm = model.get_submodule(self.norm)
        told = (mask,) if mask is not None and getattr(norm, "takes_mask", False) else ()
        normed: Tensor = norm(x, *told)
        return normed


def find_exits(model: nn.Module, trunk: str | None = None) -> Exits:
    """Find the exits of a model by its module tree; runs nothing.

    Args:
        trunk: path of the stack of blocks, where the model has several.
    Raises:
        AnatomyError: no trunk, several and none named, blocks that are never called, or a width that cannot be told.
    """
    model = bare(model)
    found, norm = _trunk(model, trunk)
    modules = {id(get(model, b.path)): b.path for b in reversed(found.blocks)}
    listed = [path for path in modules.values() if isinstance(get(model, path), (nn.ModuleList, nn.ModuleDict))]
    if listed:
        raise AnatomyError(
            f"{listed[0]} of {type(model).__name__} is a list that is never called: nothing shows its end"
        )
    width = _width(model, found)
    if width is None:
        raise AnatomyError(f"cannot tell the width of the stream of {found.path} in {type(model).__name__}")
    inside = [m for path in modules.values() for m in get(model, path).modules()]
    time_first = any(getattr(m, "batch_first", True) is False for m in inside)
    return Exits(found.path, tuple(reversed(modules.values())), found.depth, norm, width, time_first)


def _trunk(model: nn.Module, path: str | None) -> tuple[Trunk, str | None]:
    """Return the trunk and the norm after it."""
    if path is None:
        found = dissect(model)
        return found.trunk(), found.final_norm
    # What stands beside the named stack; the model's own reading is that of its last one.
    named = dissect(model, blocks=path)
    try:
        known = dissect(model)
    except AnatomyError:
        return named.trunk(path), named.final_norm
    return (known if any(t.path == path for t in known.trunks) else named).trunk(path), named.final_norm
