"""Split a model's parameters into optimizer groups: what is decayed and adapted, and what is not."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import nn
from torch.nn import Parameter

from lamina.errors import LaminaError, nearest

_NORM_CLASS = re.compile(r"Norm([A-Z]?\d+[a-z]?)?$")
_BIAS_NAME = re.compile(r"(^|_)bias$|^bias_")
_CHOICES = ("norms_and_biases", "nothing")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    exclude: Literal["norms_and_biases", "nothing"] = "norms_and_biases",
) -> list[dict[str, Any]]:
    """Return the trainable parameters as optimizer groups, in the order of `model.named_parameters()`.

    The second group holds the gains and biases: no decay and (LAMB, LARS) no trust ratio. Every torch
    optimizer takes the list; those that do not know `adapt` ignore it.

    Args:
        weight_decay: of the first group, >= 0; the second has 0.
        exclude: `norms_and_biases`: parameters held directly by a normalisation module (by type, or a class
            called `...Norm`), those called bias, and those a module names in an attribute `undecayed`; embeddings
            stay decayed. `nothing`: one group.
    Raises:
        LaminaError: a negative decay, or an unknown `exclude`.
    Source: You et al. (2020), arXiv 1904.00962, appendix H (BERT runs).
    """
    if weight_decay < 0:
        raise LaminaError(f"parameter_groups: weight_decay must be >= 0, got {weight_decay}")
    if exclude not in _CHOICES:
        raise LaminaError(
            f"parameter_groups: exclude must be one of {_CHOICES}, got {exclude!r}{nearest(str(exclude), _CHOICES)}"
        )
    excluded = norms_and_biases(model) if exclude == "norms_and_biases" else frozenset()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if n not in excluded], "weight_decay": weight_decay}
    ]
    rest: list[Parameter] = [p for n, p in named if n in excluded]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0, "adapt": False})
    return groups


def norms_and_biases(model: nn.Module) -> frozenset[str]:
    """Name the parameters that are gains, biases or `undecayed`, as `model.named_parameters()` calls them."""
    names = dict(model.named_parameters()).keys()
    found = {n for n in names if _BIAS_NAME.search(n.rpartition(".")[2])}
    for prefix, module in model.named_modules():
        own = getattr(module, "undecayed", ())
        if is_norm(module):
            own = [n for n, _ in module.named_parameters(recurse=False)]
        found.update(f"{prefix}.{n}" if prefix else n for n in own)
    return frozenset(found & names)


def is_norm(module: nn.Module) -> bool:
    """Say whether a module normalises: its class, or a base of it, is called `...Norm` (`RMSNorm`, `BatchNorm2d`)."""
    return any(_NORM_CLASS.search(c.__name__) for c in type(module).__mro__)
