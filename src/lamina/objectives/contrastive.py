"""Contrastive learning where "alike" is a matter of degree: pairs are weighed by what is known of the two."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch, call, logits
from lamina.errors import LaminaError, ShapeError, nearest
from lamina.nn._kept_float32 import wide
from lamina.nn._precision import without_autocast
from lamina.objectives._gather_rows import gather_rows, row_counts, several_processes
from lamina.objectives.objective import Losses, target
from lamina.objectives.similarity import SIMILARITIES
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

Mode = Literal["exp", "y_aware", "threshold"]
SOURCE = "Barbano et al., Anatomical Foundation Models for Brain MRIs (2024), arXiv 2408.07079"


@register("objective", source=SOURCE)
class WeightedContrastive(nn.Module):
    """Features alike where rows are alike by what is known of them: ages, measurements, labels, or the views alone.

    Rows attract each other by their likeness w in 0..1, each attribute for itself; the losses are added. outputs
    (N, d), or (N, V, d) with V views of each row (`each_view` makes them of any encoder); features are normalised here.
    Logs each attribute's loss, by its name. In a batch row i and attribute a give `weighted_contrastive_loss`; a row
    that is like no other counts nothing.

        WeightedContrastive([
            {"name": "age", "similarity": {"name": "rbf", "width": 5.0}},
            {"name": "psi", "similarity": {"name": "anatomical", "by": "region"}, "weight": 1.0},
        ])

    Args:
        attributes: a mapping each: `name` of the batch entry, which is not handed to the model where its forward does
            not name it; `similarity`: a name of `SIMILARITIES`, or a mapping of it and its options, or a function from
            values (N, ...) to (N, N); `weight` (1.0) of its loss; `missing` ("refuse"): "drop" where an entry may be
            NaN. "identity" needs views and no batch entry: every row is like itself alone (SimCLR).
        mode: what repels, see `weighted_contrastive_loss`; "exp" is AnatCL's.
        temperature: divides cosines, above 0.
        base_temperature: the loss is multiplied by temperature / base_temperature (0.07 in the official code);
            None = not at all.
        head: a network between the features and the loss, trained along and never part of the model: a module, or a
            node such as {name: projection, in_features: 512}.
        official_shift: compute as the released code does, for parity; see `weighted_contrastive_loss`.
        gather: in training, rows are compared with those of all processes: the loss of the global batch. In
            micro-batches (`accumulate`) only rows of one are compared.
    Raises:
        LaminaError: an unknown similarity or option, a weight below 0, a temperature not above 0; (at the call) an
            entry that is not in the batch, or NaN in it.
        ShapeError: (at the call) fewer than two rows to compare, one view of each with "identity", or outputs that are
            no (N, d) or (N, V, d).
    """

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"

    def __init__(
        self,
        attributes: Sequence[Mapping[str, Any]],
        mode: Mode = "exp",
        temperature: float = 0.1,
        base_temperature: float | None = None,
        *,
        head: Annotated[nn.Module | Node | None, Slot("layer")] = None,
        official_shift: bool = False,
        gather: bool = True,
    ) -> None:
        super().__init__()
        _check_mode(mode, temperature)
        if base_temperature is not None and not base_temperature > 0:
            raise LaminaError(f"base_temperature must be above 0, or None, got {base_temperature}")
        if not attributes:
            raise LaminaError("weighted_contrastive needs an attribute; {'name': 'view', 'similarity': 'identity'} is one")  # fmt: skip  # noqa: E501
        self.attributes = [Attribute(given, f"attributes[{i}]") for i, given in enumerate(attributes)]
        names = [a.name for a in self.attributes]
        if len(set(names)) < len(names) or {"loss", "count"} & set(names):
            raise LaminaError(f"attributes need a name each, none of them 'loss' or 'count', got {names}")
        self.mode, self.temperature, self.official_shift = mode, temperature, official_shift
        self.scale = 1.0 if base_temperature is None else temperature / base_temperature
        self.gather = gather
        self.head = head if isinstance(head, nn.Module) or head is None else factory("layer", head)()

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        return self.loss(call(model, batch), batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses of features already computed."""
        z = logits(outputs)
        if z.dim() not in (2, 3) or not z.is_floating_point():
            raise ShapeError(f"weighted_contrastive takes features (N, d) or (N, views, d), got {tuple(z.shape)}")
        rows, views = len(z), z.shape[1] if z.dim() == 3 else 1
        if self.head is not None:
            z = self.head(z)
        with without_autocast(z.device):
            z = F.normalize(wide(z), dim=-1)
            values = {a.name: a.values(batch, rows, z.device) for a in self.attributes}
            counts, first = [rows], 0
            if self.gather and several_processes():
                counts = row_counts(rows, z.device)
                first = sum(counts[: dist.get_rank()])
                z, values = gather_rows(z, counts), {k: gather_rows(v, counts) for k, v in values.items()}
            if len(z) * views < 2:
                raise ShapeError(f"weighted_contrastive compares rows with each other, and got {len(z)} of one view")
            if views < 2 and (alone := [a.name for a in self.attributes if not a.needs_entry]):
                raise ShapeError(
                    f"{alone[0]!r}: by identity only the views of a row are alike, and there is one of each"
                )
            own = slice(first * views, (first + rows) * views)
            together = len(counts) > 1
            terms = {a.name: self._term(a, z, values[a.name], own, together) for a in self.attributes}
            total = torch.stack([a.weight * terms[a.name] for a in self.attributes]).sum()
        count = torch.tensor(float(rows), device=z.device)
        return {"loss": total, "count": count, **{name: term.detach() for name, term in terms.items()}}

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield those of the head."""
        return iter(()) if self.head is None else self.head.parameters()

    def _term(self, attribute: Attribute, z: Tensor, values: Tensor, own: slice, together: bool) -> Tensor:
        """The mean over all anchors, times what this process has of it: averaged by rows it is the whole again."""
        z, w = rows_and_weights(z, attribute.weights(values))
        losses, counted = anchor_losses(z, w, self.mode, self.temperature, self.official_shift, own)
        anchors, here = counted.sum(), own.stop - own.start
        if together:
            dist.all_reduce(anchors)
        return self.scale * losses.sum() / anchors.clamp(min=1) * (len(z) / max(here, 1))


class Attribute:
    """One thing known of the rows of a batch, and how it makes them alike; see `WeightedContrastive`."""

    def __init__(self, given: Mapping[str, Any], place: str) -> None:
        self.name, similarity, self.weight, self.missing = _attribute(given, place)
        options: dict[str, Any] = {}
        if isinstance(similarity, Mapping):
            options = {k: v for k, v in similarity.items() if k != "name"}
            similarity = similarity.get("name")
        self.needs_entry = similarity != "identity"
        if isinstance(similarity, str) and similarity in SIMILARITIES:
            self.weights: Callable[[Tensor], Tensor] = _with_options(similarity, options, f"{place}.similarity")
        elif callable(similarity):
            self.weights = functools.partial(_checked, similarity)
        else:
            meant = nearest(str(similarity), SIMILARITIES)
            raise LaminaError(f"{place}.similarity must be one of {', '.join(SIMILARITIES)}, or a function, got {similarity!r}{meant}")  # fmt: skip  # noqa: E501

    def values(self, batch: Batch, rows: int, device: torch.device) -> Tensor:
        """Take the entry out of a batch, a row each."""
        if not self.needs_entry:
            return torch.zeros(rows, device=device)
        found = target(batch, self.name, "weighted_contrastive")
        if len(found) != rows:
            raise ShapeError(f"{self.name!r} has {len(found)} rows, and the features have {rows}")
        if self.missing == "refuse" and found.is_floating_point() and _any(found.isnan()):
            raise LaminaError(f"{self.name!r} has NaN in the batch; with missing='drop' what is not known is left out")
        return found


def weighted_contrastive_loss(
    z: Tensor, w: Tensor, mode: Mode = "exp", temperature: float = 0.1, official_shift: bool = False
) -> Tensor:
    """Return the mean over rows i of the contrastive loss in which j attracts i as much as w_ij says, 0-dim.

    With s_ij = z_i . z_j / temperature, and sums over all but i itself:
    L_i = -1 / sum_j w_ij * sum_j w_ij [ s_ij - log sum_k r ], where r, what repels, is
    "y_aware": exp(s_ik); "exp": exp(s_ik (1 - w_ik)), so that who attracts does not repel; "threshold": exp(s_ik) of
    those k with w_ik < w_ij, a j without such k left out. A row without weight is left out of the mean.

    w of 0 and 1 make "y_aware" SupCon; two views of each row and the identity make it SimCLR's loss.

    Args:
        z: (N, d), or (N, V, d) with V views of each row; normalised (a warning says where it is not).
        w: (N, N) from 0 to 1; the diagonal counts between the views of a row.
        official_shift: as the released code: in "exp", the largest s of a row is taken off before (1 - w) weighs it,
            which changes the result; in "threshold", every k repels i at once, as often as it has rows that are less
            like it than i is. In "y_aware" nothing changes.
    Raises:
        LaminaError: unknown mode, temperature not above 0, w outside 0..1 or NaN. ShapeError: fewer than two rows to
            compare, or w that does not fit z.
    Source: Barbano et al., Contrastive learning for regression in multi-site brain age prediction (2023), arXiv
        2211.08326, equations 1 to 4.
    Example:
        >>> z = F.normalize(torch.randn(4, 8), dim=1)
        >>> weighted_contrastive_loss(z, torch.ones(4, 4)).shape
        torch.Size([])
    """
    _check_mode(mode, temperature)
    if z.dim() not in (2, 3) or z.flatten(0, -2).shape[0] < 2:
        raise ShapeError(f"z must be (N, d) or (N, views, d) of at least two rows, got {tuple(z.shape)}")
    _check_weights(w, len(z))
    z = wide(z)
    if _any((z.detach().norm(dim=-1) - 1).abs() > 0.01):
        warnings.warn("the rows of z are not of length 1: torch.nn.functional.normalize makes them so", stacklevel=2)
    losses, counts = anchor_losses(*rows_and_weights(z, w), mode, temperature, official_shift)
    return losses.sum() / counts.sum().clamp(min=1)


def rows_and_weights(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Make every view a row, (N, V, d) and (N, N) -> (N * V, d) and (N * V, N * V); without views nothing changes."""
    w = w.to(z.dtype)
    if z.dim() == 2:
        return z, w
    views = z.shape[1]
    return z.flatten(0, 1), w.repeat_interleave(views, 0).repeat_interleave(views, 1)


def anchor_losses(
    z: Tensor,
    w: Tensor,
    mode: Mode = "exp",
    temperature: float = 0.1,
    official_shift: bool = False,
    own: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Return L_i of the rows `own` against all rows, and 1.0 or 0.0 for whether a row counts: (A,), (A,).

    The core of `weighted_contrastive_loss`, without its checks; z (M, d), w (M, M), nothing larger is made.
    """
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)[own]
    s = z[own] @ z.mT / temperature
    others = w[own].masked_fill(itself, 0.0)
    if mode == "threshold" and not official_shift:
        weighed, total = _threshold(s, others, itself)
    else:
        if official_shift:
            s = s - s.detach().amax(1, keepdim=True)
        repelled = s
        if mode == "exp":
            repelled = s * (1 - others)
        elif mode == "threshold":
            times = _less_alike(w)[:, own].mT.masked_fill(itself, 0)
            # A row that nobody repels does not count; it would ask for the logarithm of 0.
            others = others.masked_fill((times == 0).all(1, keepdim=True), 0.0)
            repelled = s + torch.where(others.any(1, keepdim=True), times, 1).to(s.dtype).log()
        repulsion = repelled.masked_fill(itself, -torch.inf).logsumexp(1)
        total = others.sum(1)
        weighed = (others * s).sum(1) - total * repulsion
    counts = (total > 0).to(s.dtype)
    return torch.where(total > 0, -weighed / torch.where(total > 0, total, 1.0), 0.0), counts


def _threshold(s: Tensor, w: Tensor, itself: Tensor) -> tuple[Tensor, Tensor]:
    """Sum w (s_ij - log of what is less alike than j) over j, and w over the same j.

    Sorted by w, what is less alike than j stands before it, and a running log-sum-exp has all denominators at once.
    """
    order = w.masked_fill(itself, torch.inf).argsort(1)
    ranked = w.masked_fill(itself, torch.inf).gather(1, order)
    running = s.gather(1, order).logcumsumexp(1)
    before = torch.searchsorted(ranked, ranked, side="left")
    denominator = running.gather(1, (before - 1).clamp(min=0))
    kept = torch.where((before > 0) & ranked.isfinite(), ranked, 0.0)
    return (kept * (s.gather(1, order) - denominator)).sum(1), kept.sum(1)


def _less_alike(w: Tensor) -> Tensor:
    """Count, for every k and i, the rows j with w_kj < w_ki: (M, M)."""
    ranked = w.sort(1).values
    return torch.searchsorted(ranked.contiguous(), w.contiguous(), side="left")


def _attribute(given: Mapping[str, Any], place: str) -> tuple[str, Any, float, str]:
    known = ("name", "similarity", "weight", "missing")
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str) or "similarity" not in given:
        raise LaminaError(f"{place} must be a mapping with 'name' and 'similarity', got {given!r}")
    for key in given:
        if key not in known:
            raise LaminaError(f"{place} has no option {key!r}{nearest(key, known)}; it takes {', '.join(known)}")
    weight, missing = given.get("weight", 1.0), given.get("missing", "refuse")
    if not isinstance(weight, (int, float)) or not weight >= 0:
        raise LaminaError(f"{place}.weight must be at least 0, got {weight!r}")
    if missing not in ("refuse", "drop"):
        raise LaminaError(f"{place}.missing must be 'refuse' or 'drop', got {missing!r}")
    return given["name"], given["similarity"], float(weight), missing


def _with_options(name: str, options: Mapping[str, Any], place: str) -> Callable[[Tensor], Tensor]:
    function = SIMILARITIES[name]
    known = list(inspect.signature(function).parameters)[1:]
    for key in options:
        if key not in known:
            raise LaminaError(f"{place}: {name} has no option {key!r}{nearest(key, known)}; it takes {', '.join(known) or 'none'}")  # fmt: skip  # noqa: E501
    try:
        # Three rows that say nothing, so that bad values of options are told now and not in the first batch.
        function(torch.zeros(3, 1, 1) if name == "anatomical" else torch.zeros(3), **options)
    except LaminaError as error:
        raise LaminaError(f"{place}: {error}") from error
    except TypeError as error:
        raise LaminaError(f"{place}: {name} does not take {dict(options)}: {error}") from error
    return functools.partial(function, **options)


def _check_mode(mode: str, temperature: float) -> None:
    if mode not in ("exp", "y_aware", "threshold"):
        raise LaminaError(f"mode must be 'exp', 'y_aware' or 'threshold', got {mode!r}")
    if not temperature > 0:
        raise LaminaError(f"temperature must be above 0, got {temperature}")


def _check_weights(w: Tensor, rows: int) -> None:
    if w.shape != (rows, rows):
        raise ShapeError(f"w must be ({rows}, {rows}), one weight a pair of rows, got {tuple(w.shape)}")
    if _any(~((w >= 0) & (w <= 1))):
        raise LaminaError(f"w must be in 0..1, got {float(w.min()):.3g} to {float(w.max()):.3g}")


def _checked(similarity: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Call a function of somebody else, which may give anything."""
    w = similarity(values)
    _check_weights(w, len(values))
    return w


def _any(found: Tensor) -> bool:
    """Whether something is to be told; on meta and inside a compiled graph there is nothing to look at."""
    return not (found.is_meta or torch.compiler.is_compiling()) and bool(found.any())
