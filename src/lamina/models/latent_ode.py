"""Latent ODE: a time series as one point in a latent space, from where a learned ODE runs through it and beyond.

Sources: Rubanova, Chen, Duvenaud, Latent ODEs for Irregularly-Sampled Time Series (2019), arXiv 1907.03907; Pal,
Edelman, Rackauckas, Locally Regularized Neural Differential Equations (2023), arXiv 2303.02262.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypedDict

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn.ode.block import NeuralODE, field_of, rising_times
from lamina.nn.ode.solve import Adjoint
from lamina.nn.ode.step import SOURCE
from lamina.recipe import Node
from lamina.registry import Slot, register


class LatentOutput(TypedDict):
    """What a latent ODE says of a batch of series."""

    logits: Tensor
    """The rows after those given, (B, horizon, channels); with horizon 0 the reconstruction."""
    reconstruction: Tensor
    """The rows given, (B, T, channels)."""
    mean: Tensor
    """Of the latent start's posterior, (B, width)."""
    log_variance: Tensor
    """Of the latent start's posterior, (B, width)."""


@register("model", "latent_ode", source=f"Rubanova et al. 2019, arXiv 1907.03907; sizes: {SOURCE}, PhysioNet")
class LatentODE(nn.Module):
    """Encode a series backwards into the start of a latent ODE, solve it, and decode the path: fill in and foretell.

    inputs (B, T, channels) -> `LatentOutput`. The defaults are the paper's PhysioNet network. In training the start is
    drawn from its posterior, in evaluation it is the mean. `lamina.objectives.EvidenceBound` trains it.

    Args:
        channels: of the series.
        horizon: rows to foretell after those given, which with them fill the times 0..1 evenly; 0 = reconstruct only.
        context: rows given, if always as many: any other number is refused. None = as many as come.
        width: of the latent state. latent: of the encoder. hidden: of the vector field; None = its own default.
        func: built as func(width=width, hidden=hidden), as far as it names them.
        method, rtol, atol, adjoint: of the `NeuralODE`.
    Raises:
        ShapeError: sizes below 1; at the call, no series of these channels, or a mask or times that do not fit it.
    Example:
        >>> LatentODE(3, horizon=2, width=4, latent=8, hidden=8)(torch.randn(2, 5, 3))["logits"].shape
        torch.Size([2, 2, 3])
    """

    def __init__(
        self,
        channels: int = 37,
        horizon: int = 0,
        context: int | None = None,
        *,
        width: int = 20,
        latent: int = 50,
        hidden: int | None = 40,
        func: Annotated[Node, Slot("layer")] = "time_mlp",
        method: Literal["tsit5", "dopri5"] = "tsit5",
        rtol: float = 1e-4,
        atol: float = 1e-4,
        adjoint: Adjoint = "discrete",
    ) -> None:
        super().__init__()
        if min(channels, width, latent) < 1 or horizon < 0 or (context is not None and context < 1):
            raise ShapeError(
                f"channels, width, latent and context must be at least 1 and horizon not negative, got {channels}, "
                f"{width}, {latent}, {context} and {horizon}"
            )
        self.channels, self.horizon, self.context = channels, horizon, context
        self.encoder = nn.GRU(2 * channels, latent, batch_first=True)
        self.posterior = nn.Linear(latent, 2 * width)
        self.ode = NeuralODE(field_of(func, width, hidden), (0.0, 1.0), method, rtol, atol, adjoint, all_times=True)
        self.decoder = nn.Linear(width, channels)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, times: Sequence[float] | Tensor | None = None
    ) -> LatentOutput:
        """Reconstruct what is given, and foretell.

        Args:
            mask: (B, T, channels) bool, True = observed; None = everything. What is not is not looked at.
            times: of the T rows and the horizon's, strictly rising, the first one the latent start's; None = even over
                0..1. Only the path sees them: the encoder reads row after row, however far apart.
        """
        if inputs.dim() != 3 or inputs.shape[2] != self.channels or inputs.shape[1] < 1:
            raise ShapeError(f"LatentODE takes series (B, T, {self.channels}), got {tuple(inputs.shape)}")
        if self.context not in (None, inputs.shape[1]):
            raise ShapeError(f"LatentODE was built for {self.context} rows, got {inputs.shape[1]}")
        rows = inputs.shape[1]
        mean, log_variance = self.encode(inputs, mask)
        z0 = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        path = self.decoder(self.ode(z0, self._times(rows, times))).movedim(0, 1)[:, : rows + self.horizon]
        given, ahead = path[:, :rows], path[:, rows:]
        return {
            "logits": ahead if self.horizon else given,
            "reconstruction": given,
            "mean": mean,
            "log_variance": log_variance,
        }

    def encode(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latent start, each (B, width)."""
        seen = torch.ones_like(inputs) if mask is None else mask.to(inputs.dtype)
        if seen.shape != inputs.shape:
            raise ShapeError(f"mask must have the shape of inputs, {tuple(inputs.shape)}, got {tuple(seen.shape)}")
        # Where nothing was observed there may stand anything, NaN too.
        known = inputs if mask is None else torch.where(mask.bool(), inputs, 0.0)
        _, last = self.encoder(torch.cat([known, seen], dim=2).flip(1))
        mean, log_variance = self.posterior(last[0]).chunk(2, dim=-1)
        return mean, log_variance

    def _times(self, rows: int, times: Sequence[float] | Tensor | None) -> tuple[float, ...]:
        total = rows + self.horizon
        if times is None:
            given = [i / max(total - 1, 1) for i in range(total)]
        else:
            given = times.tolist() if isinstance(times, Tensor) else list(times)
        if len(given) != total:
            raise ShapeError(f"{rows} rows and a horizon of {self.horizon} need {total} times, got {len(given)}")
        # One row alone has no interval: the solve gets an end, and its state there is not read.
        return rising_times(given if total > 1 else [given[0], given[0] + 1.0])
