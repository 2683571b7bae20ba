"""Mean field at its unique equilibrium, as a layer: q = softmax(Phi q + b), differentiated where it ends.

Source: Feng, Winston, Kolter, Monotone deep Boltzmann machines (2023), arXiv 2307.04990; the parent method: Winston,
Kolter, Monotone operator equilibrium networks (2020), arXiv 2006.08591.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import proximal_softmax as prox
from lamina.nn._conjugate_gradient import mean_field_adjoint
from lamina.nn._inputs import check_features
from lamina.nn._precision import without_autocast
from lamina.nn.fixed_point_solver import FixedPointInfo, Solver, fixed_point
from lamina.nn.monotone_coupling import SOURCE, Coupling, MonotoneHollow, coupling_range
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

HALVINGS = 4
"""How often alpha="auto" is halved, where a solve does not end, before that is reported."""


@dataclass(frozen=True)
class Equilibrium:
    """How the last solve of a `MeanFieldEquilibrium` went."""

    iterations: int
    residual: float
    """Largest relative residual of a row, of the iteration with step alpha."""
    converged: bool
    alpha: float
    eigenvalues: tuple[float, float]
    """Smallest and largest eigenvalue of I - Phi as far as ten products tell, from inside the spectrum."""
    backward_iterations: int | None = None
    """Of the linear solve behind the gradient; None before it."""


@register("layer", source=f"{SOURCE}, section 4 and equation 12")
class MeanFieldEquilibrium(nn.Module):
    """Turn scores of discrete variables into their mean-field marginals under a coupling: q = softmax(Phi q + bias).

    bias (B, dim) -> q (B, dim), a distribution over the states of each variable; the one answer there is where
    I - Phi is positive, however one starts. Solved by forward-backward splitting, its steps mixed by Anderson; the
    gradient comes from the equilibrium itself, so memory does not grow with the iterations. float32 inside, outside
    autocast; under torch.compile the solve runs as it is. `last` tells how the last solve went.

    Each call looks at the spectrum of I - Phi: where it is not positive the answer need not be unique, and a
    RuntimeWarning says so; another one says where a solve did not end.

    Args:
        coupling: `MonotoneHollow`, `MonotoneHollowConv`, the recipe node of one, or any module that is a `Coupling`.
        alpha: step of the splitting, above 0 and at most 1; "auto" = min(1, 1/L), L the largest eigenvalue of I - Phi,
            halved where a solve does not end.
        solver: "anderson", or "splitting" for the plain iteration.
        tol: relative residual at which a row has converged; of the backward solve too.
        max_iter: steps of a solve.
        gradient: "implicit", exact up to tol; "one_step" leaves out the response of the equilibrium: cheaper, biased.
    Raises:
        LaminaError: an option out of range, NaN, or observations that are not one-hot. ShapeError: wrong widths.
    Source: section 4 (splitting), equation 12 (gradient). Deviation: the backward system is solved by conjugate
        gradients, as it is symmetric and positive where I - Phi is; its condition number is at most 2 + L.
    Example:
        >>> layer = MeanFieldEquilibrium(MonotoneHollow([8] * 32, rank=64))
        >>> layer(torch.zeros(2, 256)).shape
        torch.Size([2, 256])
    """

    coupling: nn.Module

    def __init__(
        self,
        coupling: Annotated[nn.Module | Node, Slot("layer")],
        alpha: float | Literal["auto"] = "auto",
        solver: Solver = "anderson",
        tol: float = 1e-5,
        max_iter: int = 200,
        gradient: Literal["implicit", "one_step"] = "implicit",
    ) -> None:
        super().__init__()
        made = coupling if isinstance(coupling, nn.Module) else factory("layer", coupling)()
        if not isinstance(made, Coupling):
            raise LaminaError(f"a {type(made).__name__} is no coupling: it needs blocks, prepare() and product()")
        if solver not in ("anderson", "splitting"):
            raise LaminaError(f"solver must be 'anderson' or 'splitting', got {solver!r}")
        if gradient not in ("implicit", "one_step"):
            raise LaminaError(f"gradient must be 'implicit' or 'one_step', got {gradient!r}")
        if not tol > 0 or max_iter < 1:
            raise LaminaError(f"tol must be above 0 and max_iter at least 1, got {tol} and {max_iter}")
        self.coupling, self.gradient, self.solver = cast(nn.Module, made), gradient, solver
        self.alpha = alpha if alpha == "auto" else prox.check_alpha(alpha)
        self.tol, self.max_iter = tol, max_iter
        self.last: Equilibrium | None = None

    @property
    def phi(self) -> Coupling:
        """The coupling."""
        return cast(Coupling, self.coupling)

    def forward(
        self, bias: Tensor, observed: Tensor | None = None, mask: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Return the marginals.

        Args:
            bias: (B, dim), scores of the states.
            observed: (B, dim), one-hot at the variables that `mask` marks; what it holds elsewhere does not matter.
            mask: (B, variables) bool, True = observed: the variable keeps its state and acts on the others.
            start: (B, dim), where to start, such as the last answer; None = every state equally likely.
        """
        q, _ = self.solve(bias, observed, mask, start)
        return q.to(bias.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def solve(
        self,
        bias: Tensor,
        observed: Tensor | None = None,
        mask: Tensor | None = None,
        start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the marginals and the scores Phi q + bias that they are the softmax of, both (B, dim), float32."""
        blocks = self.phi.blocks
        blocks.check(bias, "bias")
        with without_autocast(bias.device):
            prepared = self.phi.prepare()
            wide = bias.to(prepared[0].dtype)
            held = _clamped(self.phi, wide, observed, mask)
            if start is not None:
                blocks.check(start, "start")
                start = start.to(wide.dtype)
            q = cast(Tensor, _MeanField.apply(self, wide, *held, start, *prepared))
            return q, self.phi.product(q, *prepared) + wide

    def descend(
        self,
        bias: Tensor,
        observed: Tensor | None,
        marked: Tensor | None,
        start: Tensor | None,
        prepared: Sequence[Tensor],
    ) -> Tensor:
        """Find the equilibrium, without a gradient, and note in `last` how that went."""
        if not bool(torch.isfinite(bias).all()):
            raise LaminaError("the bias of a mean field must be finite, it holds NaN or inf")
        low, high = coupling_range(self.phi, prepared)
        alpha = float(self.alpha) if self.alpha != "auto" else min(1.0, 1.0 / max(high, 1e-6))
        q = self.phi.blocks.uniform(len(bias), bias) if start is None else start
        if observed is not None and marked is not None:
            q = torch.where(marked, observed, q)
        spent = 0
        for attempt in range(HALVINGS + 1 if self.alpha == "auto" else 1):
            step = alpha / 2**attempt
            q, info = self._iterate(q, step, bias, observed, marked, prepared)
            spent += info.iterations
            if info.converged:
                break
        self.last = Equilibrium(spent, info.residual, info.converged, step, (low, high))
        self._report(self.last)
        return q

    def _iterate(
        self,
        q: Tensor,
        alpha: float,
        bias: Tensor,
        observed: Tensor | None,
        marked: Tensor | None,
        prepared: Sequence[Tensor],
    ) -> tuple[Tensor, FixedPointInfo]:
        blocks = self.phi.blocks

        def step(at: Tensor) -> Tensor:
            scores = (1.0 - alpha) * at + alpha * (self.phi.product(at, *prepared) + bias)
            pieces = zip(blocks.split(scores), blocks.split(at), strict=True)
            new = blocks.join([prox.solve(x, alpha, 2, start=near) for x, near in pieces])
            return new if observed is None or marked is None else torch.where(marked, observed, new)

        return fixed_point(step, q, self.solver, self.tol, self.max_iter)

    def _report(self, last: Equilibrium) -> None:
        if last.eigenvalues[0] <= 0:
            warnings.warn(
                f"the coupling is not monotone: I - Phi has an eigenvalue of {last.eigenvalues[0]:.3g} or less, so the "
                "equilibrium need not be unique",
                RuntimeWarning,
                stacklevel=2,
            )
        if not last.converged:
            warnings.warn(
                f"the mean field did not converge: residual {last.residual:.2g} after {last.iterations} steps, "
                f"tol {self.tol:.2g} (alpha {last.alpha:.3g}); raise max_iter, or lower alpha",
                RuntimeWarning,
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"alpha={self.alpha}, solver={self.solver}, tol={self.tol}, gradient={self.gradient}"


class _MeanField(torch.autograd.Function):
    """The solve forward, the implicit function theorem backward; nothing of the iterations is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: MeanFieldEquilibrium,
        bias: Tensor,
        observed: Tensor | None,
        marked: Tensor | None,
        start: Tensor | None,
        *prepared: Tensor,
    ) -> Tensor:
        q = layer.descend(bias, observed, marked, start, prepared)
        ctx.layer = layer
        ctx.save_for_backward(q, marked, *prepared)
        return q

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, marked, *prepared = ctx.saved_tensors
        layer = cast(MeanFieldEquilibrium, ctx.layer)
        phi = layer.phi
        pulled, steps = mean_field_adjoint(
            lambda v: phi.product(v, *prepared),
            phi.blocks,
            q,
            marked,
            grads[0],
            tol=layer.tol,
            max_iter=layer.max_iter if layer.gradient == "implicit" else 0,
        )
        if layer.last is not None:
            layer.last = replace(layer.last, backward_iterations=steps)
        wanted = [t.detach().requires_grad_(need) for t, need in zip(prepared, ctx.needs_input_grad[5:], strict=True)]
        with torch.enable_grad():
            image = phi.product(q.detach(), *wanted)
        leaves = [t for t in wanted if t.requires_grad]
        found = iter(torch.autograd.grad(image, leaves, pulled, allow_unused=True) if leaves else ())
        return None, pulled, None, None, None, *(next(found) if t.requires_grad else None for t in wanted)


@register("layer", source=f"{SOURCE}, section 4; as the head of another network")
class EquilibriumHead(nn.Module):
    """Linear head whose classes settle together with hidden variables: a classifier refined by mean-field inference.

    x (..., in_features) -> logits (..., out_features). The linear scores are the bias of a monotone coupling between
    one variable with a state a class and `variables` hidden ones, whose bias is linear in x too; the logits are the
    class's scores at the equilibrium, to which softmax belongs. It starts as exactly the linear layer: the coupling's
    part at the classes is zero, and learns. So in place of a trained `nn.Linear` it changes no output at first.

    Args:
        variables: hidden variables, at least 1. states: of each, at least 2.
        rank: of the coupling.
        m: margin of monotonicity, strictly between 0 and 1.
        equilibrium: built as equilibrium(coupling).
    Raises:
        ShapeError: fewer than 2 outputs, or a width of x that is not in_features. LaminaError: options out of range.
    Example:
        >>> EquilibriumHead(16, 10)(torch.randn(2, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        variables: int = 8,
        states: int = 8,
        rank: int = 32,
        m: float = 0.1,
        equilibrium: Annotated[Node, Slot("layer")] = "mean_field_equilibrium",
    ) -> None:
        super().__init__()
        if out_features < 2 or in_features < 1:
            raise ShapeError(f"EquilibriumHead needs at least 2 outputs and 1 input, got {out_features}, {in_features}")
        coupling = MonotoneHollow([out_features] + [states] * variables, rank, m)
        with torch.no_grad():
            coupling.weight[:, :out_features].zero_()
        self.in_features, self.out_features = in_features, out_features
        self.equilibrium: MeanFieldEquilibrium = factory("layer", equilibrium)(coupling)
        bound = 1.0 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound)) if bias else None
        self.hidden = nn.Linear(in_features, variables * states)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits at the equilibrium."""
        check_features("EquilibriumHead", x, self.in_features)
        direct = F.linear(x, self.weight, self.bias)
        bias = torch.cat([direct, self.hidden(x)], dim=-1)
        _, scores = self.equilibrium.solve(bias.flatten(0, -2) if x.dim() > 1 else bias[None])
        return scores[:, : self.out_features].reshape(direct.shape).to(direct.dtype)


def _clamped(
    coupling: Coupling, bias: Tensor, observed: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check what was observed; return it in the dtype of the bias, and the mask spread over the states."""
    blocks = coupling.blocks
    if (observed is None) != (mask is None):
        raise LaminaError("observed and mask go together: the states, and which variables have them")
    if observed is None or mask is None:
        return None, None
    blocks.check(observed, "observed")
    if mask.shape != (len(bias), blocks.count) or mask.dtype != torch.bool or len(observed) != len(bias):
        raise ShapeError(
            f"mask must be bool ({len(bias)}, {blocks.count}), a value a variable, got {mask.dtype} {tuple(mask.shape)}"
        )
    held = observed.to(bias.dtype)
    blocks.check_clamps(held, mask)
    return held, blocks.spread(mask)
