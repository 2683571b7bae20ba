"""Which dimensions of which parameters grow with the width: read off a model and a narrower one of the same kind."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import TypeAdapter
from torch import nn
from torch.nn import Parameter

from lamina.anatomy import dissect
from lamina.errors import AnatomyError, LaminaError, nearest
from lamina.optim.parametrization.readout import READOUTS

Kind = Literal["matrix", "vector", "normalized", "fixed"]
"""Two dimensions that grow, one, one whose scale the layer divides away, none."""

Role = Literal["hidden", "input", "readout", "normalized"]
"""What a user may say of a parameter that cannot be read off: leads from width to width, into it, out of it, out of it
into numbers that are normalised at once (the keys of a Pattention)."""

Width = tuple[float, float, Kind]
"""How much wider than the base a parameter's input is, and its output; and its kind."""

_INPUT_NAMES = ("embed", "token", "pos", "cls")
"""Parts of the names of free parameters that are added to, or put in front of, the tokens."""


@dataclass(frozen=True)
class Widths:
    """What muP needs to know of a model; the decision of `MuP`, plain JSON."""

    parameters: dict[str, Width]
    """By name: (k_in, k_out, kind)."""
    shapes: dict[str, tuple[int, ...]]
    """By name, as they were."""
    growing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By name: the dimensions of width, a later change of which is noticed."""
    readouts: dict[str, float] = field(default_factory=dict)
    """Path of each read-out: what its input is divided by."""
    tied: list[str] = field(default_factory=list)
    """Read-outs whose weight is a token embedding's."""
    factors: dict[str, float] = field(default_factory=dict)
    """By name of a parameter: what its first values are multiplied by."""
    logits: dict[str, float] = field(default_factory=dict)
    """Path of an attention, or of its query projection: what its logits are multiplied by."""
    output_mult: float = 1.0
    """Of every read-out."""

    def table(self) -> str:
        """Word the decision for people."""
        lines = [f"  {n}: {kind}, in x {i:g}, out x {o:g}" for n, (i, o, kind) in self.parameters.items()]
        lines += [f"  {path}: read-out, input / {k:g}" for path, k in self.readouts.items()]
        return "\n".join(lines + [f"  {path}: logits x {f:g}" for path, f in self.logits.items()])


def widths_of(model: nn.Module) -> Widths:
    """Return the widths that `MuP` decided on, from the model's history.

    Raises:
        LaminaError: the model has none.
    """
    for record in reversed(getattr(model, "lamina_history", ())):
        if record.name == MUP_NAME:
            return read(record.decision)
    raise LaminaError(
        f"{type(model).__name__} does not know its widths: rewrite(model, MuP(base)) comes first "
        f'(in a recipe: rewrite: [{{name: "lamina.optim.parametrization:MuP", base: {{width: 64}}}}])'
    )


MUP_NAME = "lamina.optim.parametrization.mup_pass:MuP"
"""What the history calls the pass."""


def read(widths: Widths | Mapping[str, Any]) -> Widths:
    """Return widths that may be given as plain JSON.

    Raises:
        LaminaError: no widths.
    """
    if isinstance(widths, Widths):
        return widths
    try:
        return TypeAdapter(Widths).validate_python(dict(widths))
    except ValueError as error:
        raise LaminaError(f"these are no widths, as MuP decides on them: {' '.join(str(error).split())}") from error


def compare(
    model: nn.Module, base: nn.Module, delta: nn.Module | None, roles: Mapping[str, Role]
) -> tuple[dict[str, Width], dict[str, tuple[int, ...]], dict[str, float]]:
    """Return the width of every parameter, its dimensions that grow, and the read-outs with their width.

    Args:
        delta: a second width; a dimension grows if it differs from the base's there. None: if the model's does.
        roles: by pattern of parameter names, for what cannot be read off.
    Raises:
        LaminaError: other parameters, dimensions or groups; an unknown role, a pattern that fits nothing.
    """
    owners = {n: (model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n, _ in model.named_parameters()}
    _check_roles(roles, owners)
    growing = _growing(model, base, base if delta is None else delta, by_model=delta is None)
    bases = dict(base.named_parameters())
    inside = _block_paths(model)
    widths: dict[str, Width] = {}
    for name, parameter in model.named_parameters():
        ratios = {d: parameter.shape[d] / bases[name].shape[d] for d in growing[name]}
        role = next((r for pattern, r in roles.items() if fnmatch.fnmatchcase(name, pattern)), None)
        module, attribute = owners[name]
        _check_groups(name, module, base.get_submodule(name.rpartition(".")[0]))
        widths[name] = _width(name, parameter, module, attribute, ratios, role, inside)
    return widths, growing, _readouts(model, base, widths)


def _growing(model: nn.Module, base: nn.Module, delta: nn.Module, *, by_model: bool) -> dict[str, tuple[int, ...]]:
    """List the dimensions of each parameter that grow with the width."""
    ours, bases, deltas = (dict(m.named_parameters()) for m in (model, base, delta))
    for what, others in (("base", bases), ("delta", deltas)):
        differing = [n for n in (*ours, *others) if n not in ours or n not in others]
        if differing:
            side = "the model alone has" if differing[0] in ours else f"the {what} alone has"
            raise LaminaError(
                f"MuP compares models of the same parameters, and {side} {differing[0]!r}: give the {what} the same "
                "depth and parts, and let MuP come before other passes"
            )
    found = {}
    for name, parameter in ours.items():
        shape, narrow, other = parameter.shape, bases[name].shape, (ours if by_model else deltas)[name].shape
        if not len(shape) == len(narrow) == len(other):
            raise LaminaError(f"MuP: {name} has shape {tuple(shape)} here and {tuple(narrow)} in the base")
        found[name] = tuple(d for d in range(len(shape)) if narrow[d] != other[d])
        for d in range(len(shape)):
            if shape[d] != narrow[d] and d not in found[name]:
                raise LaminaError(
                    f"MuP: dimension {d} of {name} is {shape[d]} here and {narrow[d]} in the base, but is the same in "
                    "base and delta: it is no dimension of width"
                )
        if len(found[name]) > 2:
            raise LaminaError(
                f"MuP: {name} {tuple(shape)} grows in {len(found[name])} dimensions, and at most 2 are known"
            )
    return found


def _width(
    name: str,
    parameter: Parameter,
    module: nn.Module,
    attribute: str,
    ratios: dict[int, float],
    role: Role | None,
    inside: tuple[str, ...],
) -> Width:
    if not ratios:
        return 1.0, 1.0, "fixed"
    into, out = _fans(module, attribute, parameter)
    if len(ratios) == 2:
        if (into is None and len(set(ratios.values())) > 1) or (into is not None and ratios.keys() != {into, out}):
            raise LaminaError(_unclear(name, parameter, module, "which of its two dimensions is the input"))
        first, second = sorted(ratios) if into is None or out is None else (out, into)
        return ratios[second], ratios[first], "matrix"
    (dimension, k), *_ = ratios.items()
    if role is None:
        role = _role(name, parameter, dimension, into, inside, module)
    if role == "readout" and (type(module) not in READOUTS or attribute != "weight"):
        raise LaminaError(
            f"MuP: {name} leads from the width to a fixed size, so its input has to be divided, which is known of "
            f"{', '.join(c.__name__ for c in READOUTS)} and not of a {type(module).__name__}"
        )
    return {
        "input": (1.0, k, "vector"),
        "readout": (k, 1.0, "vector"),
        "normalized": (k, 1.0, "normalized"),
        "hidden": (k, k, "matrix"),
    }[role]  # type: ignore[return-value]


def _role(
    name: str, parameter: Parameter, dimension: int, into: int | None, inside: tuple[str, ...], module: nn.Module
) -> Role:
    """Say what a parameter does that grows in one dimension."""
    if parameter.dim() == 1 or (into is not None and dimension != into):
        return "input"
    if into is None:
        lone = parameter.numel() == parameter.shape[dimension]
        if lone or any(part in name.rpartition(".")[2].lower() for part in _INPUT_NAMES):
            return "input"
        raise LaminaError(_unclear(name, parameter, module, "whether it leads into the width or out of it"))
    if any(name.startswith(f"{path}.") for path in inside):
        raise LaminaError(
            f"MuP: {name} leads from the width to a fixed size in the middle of the network: let the base differ in "
            f"that size too (heads, hidden sizes), or say roles={{{name!r}: 'readout'}} if it is one (a router, a gate)"
        )
    return "readout"


def _fans(module: nn.Module, attribute: str, parameter: Parameter) -> tuple[int | None, int | None]:
    """Return the dimensions of a weight's input and output; (None, None) where they are not known."""
    if parameter.dim() < 2:
        return None, None
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag)):
        return 0, 1
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase)):
        return 1, 0
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        return 1, 0
    # transformers' Conv1D is a linear layer whose weight is transposed.
    return (0, 1) if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else (None, None)


def _readouts(model: nn.Module, base: nn.Module, widths: Mapping[str, Width]) -> dict[str, float]:
    """Find the layers that lead from the width to a fixed size, and how much wider than the base's their input is."""
    names, found = {id(p): n for n, p in model.named_parameters()}, {}
    for path, module in model.named_modules():
        weight, narrow = getattr(module, "weight", None), getattr(base.get_submodule(path), "weight", None)
        if type(module) not in READOUTS or not isinstance(weight, Parameter) or not isinstance(narrow, Parameter):
            continue
        if widths[names[id(weight)]][2] == "vector" and weight.shape[0] == narrow.shape[0]:
            found[path] = weight.shape[1] / narrow.shape[1]
    return found


def _check_groups(name: str, module: nn.Module, base: nn.Module) -> None:
    groups, narrow = getattr(module, "groups", 1), getattr(base, "groups", 1)
    if isinstance(groups, int) and groups != narrow:
        raise LaminaError(
            f"MuP: the convolution of {name} has {groups} groups and the base's {narrow}: how groups that grow with "
            "the width scale is not known"
        )


def _check_roles(roles: Mapping[str, Role], names: Mapping[str, Any]) -> None:
    for pattern, role in roles.items():
        if role not in get_args(Role):
            raise LaminaError(
                f"MuP: roles are {', '.join(get_args(Role))}, got {role!r} for {pattern!r}"
                f"{nearest(str(role), get_args(Role))}"
            )
        if not fnmatch.filter(names, pattern):
            raise LaminaError(f"MuP: no parameter fits the pattern {pattern!r} of roles{nearest(pattern, names)}")


def _unclear(name: str, parameter: Parameter, module: nn.Module, what: str) -> str:
    return (
        f"MuP cannot see of {name} {tuple(parameter.shape)} in a {type(module).__name__} {what}: "
        f"say so, roles={{{name!r}: ...}} with one of {', '.join(map(repr, get_args(Role)))}"
    )


def _block_paths(model: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(b.path for t in dissect(model).trunks for b in t.blocks)
    except AnatomyError:
        return ()
