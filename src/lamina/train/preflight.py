"""What can be said before training about parts that are each right and do not fit each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lamina.anatomy import describe, undisturbed
from lamina.batches import call, to_device
from lamina.data import Data
from lamina.errors import AnatomyError, LaminaError
from lamina.objectives.objective import Objective, WeightedSum
from lamina.recipe import build, frame
from lamina.recipe._options import Misfit
from lamina.rewrite.rewriting import Pass


def refuse_misfits(model: nn.Module, sizes: Mapping[str, Any], passes: Sequence[Pass[Any]] = ()) -> None:
    """Refuse a model with too few tokens for the data, or too small for the first pass; weights may be on `meta`.

    The passes after the first see another model, so nothing is said about them.

    Args:
        sizes: of the data set.
    Raises:
        RecipeError: with the path of the node that does not fit.
    """
    known, needed = _vocabulary(model), sizes.get("vocabulary")
    if known is not None and needed is not None and known < needed:
        raise Misfit("model", f"the data has {needed} different tokens, the model's table has rows for {known} only")
    fits = getattr(passes[0], "fits", None) if passes else None
    if fits is None:
        return
    try:
        fits(model)
    except LaminaError as error:
        raise Misfit("rewrite[0]", str(error)) from error


def refuse_batch(node: Any, model: nn.Module, data: Data) -> None:
    """Refuse a model that no batch of the data passes through; it is asked itself only where one on `meta` says so.

    Nothing is said of a model that cannot be built or run on `meta`, or has parts that are built already.

    Args:
        node: of the recipe.
        model: what was built of it.

    Raises:
        RecipeError: with the shapes of the batch and the words of the layer that does not take them.
    """
    if not _only_names(node):
        return
    try:
        with torch.device("meta"):
            weightless: nn.Module = build(node, "model", **data.sizes)
    except (NotImplementedError, RuntimeError):
        return
    try:
        try_batch(weightless.to("meta"), call, data)
    except Misfit:
        # Kernels for meta refuse what the real ones take (grouped products of experts in float32).
        with torch.random.fork_rng(devices=[]), torch.no_grad(), undisturbed(model):
            try_batch(model, call, data)


def refuse_objective(
    objective: Objective, model: nn.Module, data: Data, rewrites: Sequence[Any] = (), place: str = "objective"
) -> None:
    """Let objectives that can tell (`fits(model, data, until)`) refuse a model or data that lack what they need.

    Nothing is said where a pass rewrites the model before training, and of what begins after the first rewrite.

    Args:
        rewrites: nodes of the recipe's passes.
        place: of the objective in the recipe.
    Raises:
        RecipeError: with the path of the objective.
    """
    if isinstance(objective, WeightedSum):
        for i, one in enumerate(objective.terms):
            refuse_objective(one, model, data, rewrites, f"objective[{i}]")
        return
    fits = getattr(objective, "fits", None)
    first = frame(rewrites[0], "pass")["at"] if rewrites else "after"
    if fits is None or first == "before":
        return
    try:
        fits(model, data, 1.0 if first == "after" else first)
    except LaminaError as error:
        raise Misfit(place, str(error)) from error


def try_batch(model: nn.Module, objective: Objective | Callable[..., Any], data: Data) -> str | None:
    """Send one batch through a model, on `meta` without computing; return why it could not be tried, or None.

    Raises:
        RecipeError: the batch does not pass through the model, or the objective cannot use what comes out.
    """
    batch = data.train.batch(torch.arange(min(2, len(data.train))))
    device = next((p.device for p in model.parameters()), torch.device("meta"))
    try:
        objective(model, to_device(batch, device))
    except LaminaError as error:
        raise Misfit("model", f"a batch of the data does not fit: {error}") from error
    except Exception as error:
        words = " ".join(str(error).split())
        # What needs real numbers on the way says so, in one of torch's several ways.
        if isinstance(error, NotImplementedError) or "meta" in words.lower():
            return words
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in batch.items())
        raise Misfit(
            "model", f"a batch of the data ({shapes}) does not fit: {type(error).__name__}: {words}"
        ) from error
    return None


def _only_names(node: Any) -> bool:
    """Say whether building the node makes everything anew: a part that is there would be shared with the real model."""
    if isinstance(node, Mapping):
        return all(map(_only_names, node.values()))
    if isinstance(node, (list, tuple)):
        return all(map(_only_names, node))
    return node is None or isinstance(node, (str, int, float, type))


def _vocabulary(model: nn.Module) -> int | None:
    try:
        return describe(model).vocabulary
    except AnatomyError:
        return None
