"""What the first values of a model have to be multiplied by, so that they scale with the width as muP says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.optim.parametrization.widths import Width

_MANY = 64
"""Entries from which on a measured deviation is worth more than a guess at the rule behind it."""


def initial_factors(model: nn.Module, base: nn.Module, widths: Mapping[str, Width]) -> dict[str, float]:
    """Return the factor of every parameter whose first values do not scale as they should; by name.

    Hidden weights shall be 1 / sqrt(k_in) of the base's, everything else as large as the base's. How large they are is
    measured in both, so it does not matter by which rule a model is initialised; the measurement is rounded to the
    nearest power of the width (the rules are powers), except where it clearly is none.

    Raises:
        LaminaError: a model without values.
    """
    if any(p.is_meta for p in (*model.parameters(), *base.parameters())):
        raise LaminaError(
            "MuP compares first values, and there are none on the meta device: initialise both models first"
        )
    bases = dict(base.named_parameters())
    scales: dict[str, float] = {}
    found = {}
    for name, parameter in model.named_parameters():
        k_in, k_out, kind = widths[name]
        owner, _, own = name.rpartition(".")
        sibling = f"{owner}.weight".lstrip(".")
        ks = [k_in, k_out]
        if own == "bias" and _drawn_by_torch(model.get_submodule(owner)) and sibling in scales:
            # Then it is as small as the weight beside it, which has more entries to tell by.
            rules = [scales[sibling]]
        else:
            rules = [k**e for k in ks for e in (-1.0, -0.5, 0.0, 0.5)]
        scales[name] = _scale(parameter, bases[name], rules)
        wanted = k_in**-0.5 if kind == "matrix" else scales[name] if kind == "normalized" else 1.0
        if not math.isclose(wanted, scales[name], rel_tol=1e-9):
            found[name] = wanted / scales[name]
    return found


@torch.no_grad()
def _drawn_by_torch(module: nn.Module) -> bool:
    """Say whether weight and bias look as torch draws them: uniform, up to 1 / sqrt(inputs)."""
    weight, bias = module.weight, module.bias
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    bound = weight[0].numel() ** -0.5
    noise = 6 * math.sqrt(0.5 / weight.numel())
    return (
        bool(bias.any())
        and float(max(weight.abs().max(), bias.abs().max())) <= 1.01 * bound
        and abs(math.log(_size(weight) * math.sqrt(3) / bound)) <= max(noise, 0.02)
    )


@torch.no_grad()
def _scale(values: Tensor, base: Tensor, rules: Sequence[float]) -> float:
    """Return how large values are beside the base's: the nearest rule, or what is measured where none is near."""
    large, small = _size(values), _size(base)
    if large == 0.0 or small == 0.0 or set(rules) == {1.0}:
        # What starts at zero stays there; and at the base's own width nothing changes at all.
        return 1.0
    ratio = large / small
    near = min(rules, key=lambda rule: abs(math.log(ratio / rule)))
    noise = 6 * math.sqrt(0.5 / values.numel() + 0.5 / base.numel())
    few = min(values.numel(), base.numel()) < _MANY
    return near if few or abs(math.log(ratio / near)) <= max(noise, 0.02) else ratio


def _size(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
