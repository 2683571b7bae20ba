"""How tokens come to stand in groups: images into sub-images, unequal groups into one tensor, latents one group later.

Source: Chen, Li, FIT: Far-reaching Interleaved Transformers (2023), arXiv 2305.12689, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import ShapeError
from lamina.nn.attention import visible


def group_image(images: Tensor, group: int, patch: int) -> Tensor:
    """Cut images into square sub-images (the groups) and these into patches (the tokens).

    (B, C, H, W) -> (B, t, n, patch * patch * C): groups row by row, the patches of a group row by row, the numbers of a
    patch as rows, columns, channels. With patch=1 and RGB bytes, `.flatten(2)` gives R, G, B, R, ... in raster order.

    Args:
        group: side of a sub-image in pixels, a multiple of patch.
        patch: side of a patch in pixels.
    Raises:
        ShapeError: no images, or sides that do not divide.
    """
    if images.dim() != 4:
        raise ShapeError(f"group_image takes images (B, C, H, W), got {tuple(images.shape)}")
    rows, columns, inner = _cells(images.shape[2], images.shape[3], group, patch)
    x = images.unflatten(3, (columns, inner, patch)).unflatten(2, (rows, inner, patch))  # (B, C, R, i, p, S, i, p)
    return x.permute(0, 2, 5, 3, 6, 4, 7, 1).flatten(5).flatten(3, 4).flatten(1, 2)


def ungroup_image(tokens: Tensor, size: tuple[int, int], group: int, patch: int) -> Tensor:
    """Undo `group_image`: (B, t, n, patch * patch * C) -> images (B, C, H, W) of that size.

    Raises:
        ShapeError: tokens that are not of such an image.
    """
    rows, columns, inner = _cells(*size, group, patch)
    channels, rest = divmod(tokens.shape[-1], patch * patch)
    if tokens.dim() != 4 or tokens.shape[1:3] != (rows * columns, inner * inner) or rest:
        raise ShapeError(
            f"an image of {size} in groups of {group} and patches of {patch} pixels has tokens (B, {rows * columns}, "
            f"{inner * inner}, {patch * patch} * C), got {tuple(tokens.shape)}"
        )
    x = tokens.unflatten(3, (patch, patch, channels)).unflatten(2, (inner, inner)).unflatten(1, (rows, columns))
    return x.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5).flatten(2, 4)


def snake_order(rows: int, columns: int) -> Tensor:
    """Number the cells of a grid as a snake goes: row by row, every second row backward; (rows * columns,) int64.

    `x[:, snake_order(4, 4)]` puts 16 groups in an order in which each lies beside the one before.

    Raises:
        ShapeError: a size below 1.
    """
    if min(rows, columns) < 1:
        raise ShapeError(f"rows and columns must be at least 1, got {rows} and {columns}")
    cells = torch.arange(rows * columns).view(rows, columns)
    cells[1::2] = cells[1::2].flip(1)
    return cells.flatten()


def pad_groups(groups: Sequence[Tensor], tokens_per_group: int | None = None) -> tuple[Tensor, Tensor]:
    """Put groups of unequal fill into one tensor: t tensors (n_i, ...) -> ((t, n, ...), mask (t, n), True = real).

    Args:
        tokens_per_group: n; None = the longest group's.
    Raises:
        ShapeError: no groups, or one that is longer than n.
    """
    longest = max((len(g) for g in groups), default=0)
    size = longest if tokens_per_group is None else tokens_per_group
    if not groups or longest > size:
        raise ShapeError(f"the longest of {len(groups)} groups has {longest} tokens, a group has room for {size}")
    filled = torch.nn.utils.rnn.pad_sequence([*groups, groups[0].new_zeros(size, *groups[0].shape[1:])], True)[:-1]
    lengths = torch.tensor([len(g) for g in groups], device=filled.device)
    return filled, torch.arange(size, device=filled.device) < lengths[:, None]


def shift_latents(latents: Tensor) -> Tensor:
    """Give every group the latents of the group before, the first one zeros; (B, t, m, C) -> same."""
    return F.pad(latents[:, :-1], (0, 0, 0, 0, 1, 0))


def block_causal_mask(groups: int, latents: int, *, device: torch.device | None = None) -> Tensor:
    """Make the mask of latents that see their own group and earlier ones: (t * m, t * m) bool, True = may look."""
    total = groups * latents
    mask = visible(total, total, latents, device=device)
    return torch.ones(1, 1, dtype=torch.bool, device=device) if mask is None else mask[0, 0]


def into_groups(
    x: Tensor, mask: Tensor | None, shape: tuple[int, int], features: int, pad: bool
) -> tuple[Tensor, Tensor | None]:
    """Bring tokens (B, t, n, c) or (B, L, c), and the mask of the real ones, to t groups of n.

    Args:
        mask: as x without its last dimension, bool or 0/1; None = all are real.
        shape: (t, n).
        features: c.
        pad: fill up fewer tokens with zeros that the mask leaves out; False = refuse them.
    Raises:
        ShapeError: another number of groups, tokens or features; a mask of another shape.
    """
    groups, size = shape
    if x.dim() not in (3, 4) or x.shape[-1] != features or not x.is_floating_point():
        raise ShapeError(
            f"expected floating-point tokens (batch, {groups} groups, {size}, {features}) or (batch, tokens, "
            f"{features}), got {x.dtype} {tuple(x.shape)}"
        )
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ShapeError(f"attention_mask must be {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
    wanted = (groups * size,) if x.dim() == 3 else (groups, size)
    given = tuple(x.shape[1:-1])
    lacking = [w - g for w, g in zip(wanted, given, strict=True)]
    if min(lacking) < 0 or (any(lacking) and not pad):
        raise ShapeError(
            f"the model's {groups} groups of {size} take {' x '.join(map(str, wanted))} tokens, got "
            f"{' x '.join(map(str, given))}" + ("; fewer are taken with pad_groups=True" if min(lacking) >= 0 else "")
        )
    if any(lacking):
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
        widths = [side for lack in reversed(lacking) for side in (0, lack)]
        x, mask = F.pad(x, (0, 0, *widths)), F.pad(mask, widths)
    mask = None if mask is None else mask.to(torch.bool).reshape(-1, groups, size)
    return x.reshape(-1, groups, size, features), mask


def _cells(height: int, width: int, group: int, patch: int) -> tuple[int, int, int]:
    """Return how many groups stand in a column and a row, and how many patches along the side of one."""
    if min(group, patch) < 1 or group % patch or height % group or width % group or min(height, width) < 1:
        raise ShapeError(
            f"patches of {patch} pixels must divide groups of {group}, and these the image of {height} x {width}"
        )
    return height // group, width // group, group // patch
