"""Networks between functions on a grid: MgNO, whose linear maps are multigrid V-cycles, and the Fourier operator FNO.

Both take and give fields in physical units: shifts and scales are buffers, set by `fit_normalizer`.
Source: He, Liu, Xu, MgNO (ICLR 2024), arXiv 2310.19809; Li et al., FNO (ICLR 2021), arXiv 2010.08895.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models._physical_units import Number, PhysicalUnits
from lamina.nn.multigrid import SCHEDULE, Schedule, norm_of
from lamina.nn.spectral_convolution import SpectralConvolution
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SOURCE = "He, Liu & Xu 2024, arXiv 2310.19809"
PADDING = {"dirichlet": "zeros", "periodic": "circular", "neumann": "reflect"}
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class NeuralOperator(nn.Module):
    """What MgNO and FNO share: physical units, the grid they were trained on, what they refuse."""

    trained_grid: Tensor

    def __init__(self, in_channels: int, out_channels: int, dim: int, units: Mapping[str, Number]) -> None:
        super().__init__()
        if min(in_channels, out_channels) < 1 or dim not in (1, 2, 3):
            raise ShapeError(
                f"in_channels and out_channels must be at least 1 and dim 1, 2 or 3, got {in_channels}, "
                f"{out_channels}, {dim}"
            )
        self.in_channels, self.out_channels, self.dim = in_channels, out_channels, dim
        self.units = PhysicalUnits(dim, units)
        # Zeros: not known yet.
        self.register_buffer("trained_grid", torch.zeros(dim, dtype=torch.int64))
        self.told = self.recorded = False
        self._known_grid: tuple[int, ...] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map fields (B, in_channels, *grid) to fields (B, out_channels, *grid), both in physical units."""
        self._check_fields(inputs)
        self._mind_grid(tuple(inputs.shape[2:]))
        return self.units.decode(self.operate(self.units.encode(inputs)), inputs.dtype)

    def operate(self, x: Tensor) -> Tensor:
        """Map shifted and scaled inputs to such outputs."""
        raise NotImplementedError

    def fit_normalizer(self, batches: Iterable[Mapping[str, Any]], *, per_cell: bool = False) -> None:
        """Set shifts and scales to mean and deviation of the `inputs` and `targets` of batches, in place.

        Args:
            per_cell: a mean and a deviation for each cell of the grid (the model then takes no other grid).
        Raises:
            LaminaError: no batch, numbers that are not finite.
        """
        grid = self.units.fit(batches, per_cell=per_cell)
        self._record(grid)
        self.recorded = True

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self._known_grid = None

    def _record(self, grid: tuple[int, ...]) -> None:
        self.trained_grid.copy_(torch.tensor(grid))
        self._known_grid = grid

    def _check_fields(self, x: Tensor) -> None:
        if x.dim() != self.dim + 2 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ShapeError(
                f"{type(self).__name__} takes real floating-point fields (B, {self.in_channels}, ...) with {self.dim} "
                f"axes, got {x.dtype} {tuple(x.shape)}"
            )
        field = self.units.input_scale.shape[1:]
        if field != x.shape[2:] and any(n != 1 for n in field):
            raise ShapeError(
                f"the normaliser has a value a cell for a grid of {tuple(field)}, got {tuple(x.shape[2:])}"
            )

    def _mind_grid(self, grid: tuple[int, ...]) -> None:
        """Remember the first grid trained on; warn once where the model runs on another."""
        if (
            torch.compiler.is_compiling()
            or self.trained_grid.is_meta
            or (self.recorded if self.training else self.told)
        ):
            return
        if self._known_grid is None:
            # Once: on a GPU to read it is to wait for all that was asked of it.
            self._known_grid = tuple(self.trained_grid.tolist())
        trained = self._known_grid
        if self.training:
            self.recorded = True
            if not any(trained):
                self._record(grid)
        elif any(trained) and trained != grid:
            self.told = True
            warnings.warn(
                f"{type(self).__name__} was trained on a grid of {trained} and runs on {grid}: weights belong to one "
                "spacing, the error is likely to be much larger",
                stacklevel=4,
            )


@register("model", "mgno", source=SOURCE)
class MgNO(NeuralOperator):
    """Neural operator of multigrid V-cycles: coefficient or source field -> solution, with its boundary condition.

    inputs (B, in_channels, *grid) -> (B, out_channels, *grid). Each layer is `activation(W v + B v + b)`: W a linear
    map that reaches the whole grid (`MultigridLinear`), B one of each cell; the output is a linear map of each cell.
    Any grid that leaves 2 cells to the coarsest level is taken, but weights belong to the spacing trained on.

    Args:
        width: channels between the layers.
        depth: layers.
        schedule: (pre, post) smoothing steps of each level, finest first.
        dim: axes of the grid, 1..3.
        boundary: of the solution: 0 outside ("dirichlet"), "periodic", no flux ("neumann").
        input_shift, input_scale, output_shift, output_scale: units; a number, one a channel or a field, see
            `fit_normalizer`; None = none. A model built with a tensor here cannot be saved: fit, or set `units`.
        residual_input: add the (shifted and scaled) input to the output: for a step in time.
        operator: the map W, built as operator(in, out, schedule=, dim=, padding_mode=, grid=) as far as it names them.
        activation: after each layer.
        pointwise: whether layers have B and b.
        norm: before each activation, built as norm(width), or over the grid as norm([width, *grid]); None = none.
        multigrid_output: the output is one more V-cycle, not a map of each cell.
        grid: sizes trained on; picks kernels (see `MultigridLinear`), and is needed for norms over the grid.
    Raises:
        ShapeError: sizes below 1, too many levels for the grid, residual_input with other channels out than in; at the
            call, another number of axes or channels, complex numbers, another grid than a norm or a normaliser has.
        RecipeError: no such boundary, a norm over the grid without `grid`.
    Warns:
        UserWarning: once, where a trained model runs on another grid (not seen under torch.compile).
    Source: section 3; sizes: the released settings.
    Example:
        >>> MgNO(1, 1, width=8, depth=2)(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 24,
        depth: int = 5,
        schedule: Schedule = SCHEDULE,
        *,
        dim: int = 2,
        boundary: Literal["dirichlet", "periodic", "neumann"] = "dirichlet",
        input_shift: Number = None,
        input_scale: Number = None,
        output_shift: Number = None,
        output_scale: Number = None,
        residual_input: bool = False,
        operator: Annotated[Node, Slot("layer")] = "multigrid_linear",
        activation: Annotated[Node, Slot("layer")] = "gelu",
        pointwise: bool = True,
        norm: Annotated[Node | None, Slot("norm")] = None,
        multigrid_output: bool = False,
        grid: Sequence[int] | None = None,
    ) -> None:
        units = {"input_shift": input_shift, "input_scale": input_scale}
        super().__init__(
            in_channels, out_channels, dim, units | {"output_shift": output_shift, "output_scale": output_scale}
        )
        if boundary not in PADDING:
            raise RecipeError(f"boundary must be one of {', '.join(PADDING)}, got {boundary!r}")
        _check_sizes(width=width, depth=depth)
        if residual_input and in_channels != out_channels:
            raise ShapeError(f"residual_input adds {in_channels} channels to {out_channels}: they must be as many")
        make = factory("layer", operator)
        given: dict[str, Any] = {"schedule": schedule, "dim": dim, "padding_mode": PADDING[boundary], "grid": grid}
        widths = [in_channels, *[width] * depth]
        layers = [
            OperatorLayer(
                make(into, width, **given),
                CONV[dim](into, width, 1) if pointwise else None,
                norm_of(norm, width, grid) if norm is not None else None,
                factory("layer", activation)(),
            )
            for into in widths[:-1]
        ]
        self.residual_input = residual_input
        self.layers = nn.Sequential(*layers)
        self.head: nn.Module = (
            make(width, out_channels, **given) if multigrid_output else CONV[dim](width, out_channels, 1, bias=False)
        )

    def operate(self, x: Tensor) -> Tensor:
        """Run the layers and the output map."""
        y: Tensor = self.head(self.layers(channels_together(x))).contiguous()
        return x + y if self.residual_input else y


class OperatorLayer(nn.Module):
    """activation(norm(W v + B v + b)): W sees the whole grid, B each cell."""

    def __init__(
        self, operator: nn.Module, pointwise: nn.Module | None, norm: nn.Module | None, activation: nn.Module
    ) -> None:
        super().__init__()
        self.operator, self.pointwise, self.norm, self.activation = operator, pointwise, norm, activation

    def forward(self, v: Tensor) -> Tensor:
        """Map (B, in, *grid) to (B, out, *grid)."""
        mapped: Tensor = self.operator(v)
        if self.pointwise is not None:
            mapped = mapped + self.pointwise(v)
        if self.norm is not None:
            mapped = self.norm(mapped)
        return self.activation(mapped)


@register("model", "fno", source="Li et al. 2021, arXiv 2010.08895")
class FNO(NeuralOperator):
    """Fourier neural operator: the usual baseline. inputs (B, in_channels, *grid) -> (B, out_channels, *grid).

    Lift inputs and coordinates to `width` channels, `depth` layers `gelu(K v + B v + b)` (K filters the lowest
    frequencies; no activation after the last), project by two maps of each cell.

    Args:
        modes: frequencies kept along each axis.
        coordinates: give the network the place of each cell, 0..1 along each axis.
        projection: hidden channels of the projection; None = 4 * width.
        input_shift, input_scale, output_shift, output_scale: as in `MgNO`.
    Raises:
        ShapeError: sizes below 1; at the call, another number of axes or channels, or complex numbers.
    Source: section 4. Deviation: no padding of fields that are not periodic.
    Example:
        >>> FNO(1, 1, width=8, depth=2, modes=4)(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 32,
        depth: int = 4,
        modes: int | Sequence[int] = 12,
        *,
        dim: int = 2,
        coordinates: bool = True,
        projection: int | None = None,
        input_shift: Number = None,
        input_scale: Number = None,
        output_shift: Number = None,
        output_scale: Number = None,
    ) -> None:
        units = {"input_shift": input_shift, "input_scale": input_scale}
        super().__init__(
            in_channels, out_channels, dim, units | {"output_shift": output_shift, "output_scale": output_scale}
        )
        hidden = 4 * width if projection is None else projection
        _check_sizes(width=width, depth=depth, projection=hidden)
        conv = CONV[dim]
        self.coordinates = coordinates
        self.lift = conv(in_channels + (dim if coordinates else 0), width, 1)
        self.layers = nn.Sequential(
            *(
                OperatorLayer(
                    SpectralConvolution(width, width, modes, dim=dim),
                    conv(width, width, 1),
                    None,
                    nn.GELU() if i < depth - 1 else nn.Identity(),
                )
                for i in range(depth)
            )
        )
        self.project = nn.Sequential(conv(width, hidden, 1), nn.GELU(), conv(hidden, out_channels, 1))

    def operate(self, x: Tensor) -> Tensor:
        """Lift, filter, project."""
        if self.coordinates:
            x = torch.cat((x, coordinates(x)), 1)
        return self.project(self.layers(self.lift(x)))


def channels_together(f: Tensor) -> Tensor:
    """Lay the channels of a plane's cells side by side on the CPU, whose convolutions are a fifth faster so."""
    if f.dim() != 4 or f.device.type != "cpu":
        return f
    # With one channel both layouts are the same numbers in the same order; only a copy has the strides that say which.
    return (
        f.clone(memory_format=torch.channels_last)
        if f.shape[1] == 1
        else f.contiguous(memory_format=torch.channels_last)
    )


def coordinates(x: Tensor) -> Tensor:
    """Return the place of each cell of fields (B, ..., *grid), 0..1 along each axis: (B, dim, *grid)."""
    axes = [torch.linspace(0, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(x), -1, *x.shape[2:])


def rollout(model: nn.Module, frames: Tensor, steps: int) -> Tensor:
    """Foretell one frame after the other from the model's own: (B, k, *grid), oldest first -> (B, steps, *grid).

    The model maps the last k frames to the next one.
    """
    found = []
    for _ in range(steps):
        following = model(frames)
        if following.shape[1] != 1:
            raise ShapeError(f"a rollout needs a model that gives one frame, this one gives {following.shape[1]}")
        found.append(following)
        frames = torch.cat((frames[:, 1:], following), 1)
    return torch.cat(found, 1)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ShapeError(f"{name} must be at least 1, got {size}")


DARCY: Schedule = ((1, 0),) * 5 + ((2, 0),)


@register("model", source=f"{SOURCE}, released settings")
def mgno_darcy_smooth(in_channels: int = 1, out_channels: int = 1, *, side: int = 211) -> MgNO:
    """MgNO for Darcy flow with smooth coefficients: 5 layers of width 24, 6 levels, 211 x 211 cells."""
    return MgNO(in_channels, out_channels, 24, 5, DARCY, grid=(side, side))


@register("model", source=f"{SOURCE}, released settings")
def mgno_darcy_rough(in_channels: int = 1, out_channels: int = 1, *, side: int = 256) -> MgNO:
    """MgNO for Darcy flow with rough or multiscale coefficients: 4 layers of width 24, 6 levels, 256 x 256 cells."""
    return MgNO(in_channels, out_channels, 24, 4, DARCY, grid=(side, side))


@register("model", source=f"{SOURCE}, released settings")
def mgno_navier_stokes(in_channels: int = 1, out_channels: int = 1, *, side: int = 64) -> MgNO:
    """MgNO for a step of two-dimensional Navier-Stokes: periodic, 5 layers of width 32, norms over 64 x 64 cells."""
    operator: dict[str, Any] = {"name": "multigrid_linear", "bias": True, "norm": "layer_norm"}
    options: dict[str, Any] = {"boundary": "periodic", "residual_input": True, "pointwise": False}
    schedule: Schedule = ((1, 0),) * 3 + ((2, 0),) * 2
    return MgNO(in_channels, out_channels, 32, 5, schedule, operator=operator, grid=(side, side), **options)


@register("model", source=f"{SOURCE}, released settings")
def mgno_pipe(in_channels: int = 2, out_channels: int = 1) -> MgNO:
    """MgNO for the flow through a pipe, from the places of its grid: 5 layers of width 24, 129 x 129 cells."""
    return MgNO(in_channels, out_channels, 24, 5, (*((1, 0),) * 4, (1, 1), (2, 0)))


@register("model", source=f"{SOURCE}, released settings")
def mgno_helmholtz(in_channels: int = 1, out_channels: int = 1, *, side: int = 101) -> MgNO:
    """MgNO for the Helmholtz equation: 4 layers of width 20 whose levels widen, reflected, 101 x 101 cells.

    The released modules hold 11,241 numbers more, in convolutions that are never called.
    """
    operator = {"name": "multigrid_linear", "bias": True, "widen": True, "pad_restriction": False}
    options: dict[str, Any] = {"boundary": "neumann", "pointwise": False, "norm": "layer_norm"}
    schedule: Schedule = ((1, 0),) * 4 + ((2, 0),)
    return MgNO(
        *(in_channels, out_channels, 20, 4, schedule),
        operator=operator,
        multigrid_output=True,
        grid=(side, side),
        **options,
    )
