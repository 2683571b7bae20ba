"""What can be said before training about parts that are each right and do not fit each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lamina.anatomy import describe
from lamina.batches import call
from lamina.data import Data
from lamina.errors import AnatomyError, LaminaError
from lamina.objectives.objective import Objective
from lamina.recipe import build
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


def refuse_batch(node: Any, data: Data) -> None:
    """Refuse the node of a model that no batch of the data passes through; neither weights nor memory are needed.

    Nothing is said of a model that cannot be built or run on `meta`, or has parts that are built already.

    Raises:
        RecipeError: with the shapes of the batch and the words of the layer that does not take them.
    """
    if not _only_names(node):
        return
    try:
        with torch.device("meta"):
            model: nn.Module = build(node, "model", **data.sizes)
    except (NotImplementedError, RuntimeError):
        return
    try_batch(model.to("meta"), call, data)


def try_batch(model: nn.Module, objective: Objective | Callable[..., Any], data: Data) -> str | None:
    """Send one batch through a model on `meta`, where nothing is computed; return why it could not be tried, or None.

    Raises:
        RecipeError: the batch does not pass through the model, or the objective cannot use what comes out.
    """
    batch = data.train.batch(torch.arange(min(2, len(data.train))))
    try:
        objective(model, {name: values.to("meta") for name, values in batch.items()})
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
