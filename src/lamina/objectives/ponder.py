"""Objectives of models with early exits: the mean loss under a learned distribution of exits, or a weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch, call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.objectives.objective import Losses, mean, target
from lamina.objectives.supervised import IGNORE
from lamina.registry import register

Divergence = Literal["prior_to_posterior", "posterior_to_prior"]
Base = Literal["cross_entropy", "squared"]
SMALLEST = 1e-8
"""Probabilities are not taken smaller before the logarithm."""


class _Exits:
    """What both objectives do: they see outputs only, and in evaluation what the exit answered."""

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"
    name: ClassVar[str]

    def __init__(self, base: Base | Callable[[Tensor, Tensor], Tensor] | None, wait: bool) -> None:
        if base not in (None, "cross_entropy", "squared") and not callable(base):
            raise LaminaError(
                f"{self.name}: base is 'cross_entropy', 'squared', a function of scores and labels, or nothing, "
                f"got {base!r}"
            )
        self.base, self.wait = base, wait

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        return self.loss(call(model, batch), batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses of outputs already computed."""
        labels = target(batch, "labels", self.name)
        scores = _entry(outputs, "exit_logits")
        if scores is None:
            return self._left(outputs, labels)
        if scores.dim() != 3:
            raise ShapeError(f"{self.name} takes exit_logits (batch, exits, classes), got {tuple(scores.shape)}")
        return self._trained(outputs, scores, labels)

    def parameters(self) -> Iterator[Parameter]:
        """Yield nothing: there is nothing of its own to train."""
        return iter(())

    def _trained(self, outputs: Any, scores: Tensor, labels: Tensor) -> Losses:
        raise NotImplementedError

    def _left(self, outputs: Any, labels: Tensor) -> Losses:
        """Loss of a model in evaluation, of each row where it left; of one without exits (yet), of its answer."""
        layer, scores = _entry(outputs, "exit_layer"), logits(outputs)
        if layer is None and scores.requires_grad and not self.wait:
            raise LaminaError(
                f"{self.name} trains a model with exits (exit_logits in its outputs): rewrite it first, "
                "{name: early_exit}, or give wait: true where that comes later in training"
            )
        asked = _asked(labels)
        losses = mean(self._errors(scores[:, None], labels)[:, 0], asked)
        result: Losses = {**losses, "task": losses["loss"].detach()}
        if layer is not None:
            result["depth"] = mean(layer.float(), asked)["loss"]
        if scores.shape[-1] > 1 and not labels.is_floating_point():
            result["accuracy"] = mean((scores.argmax(-1) == labels).float(), asked)["loss"]
        return result

    def _errors(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row at each exit, (B, n); 0 where the label is -100."""
        rows, exits, classes = scores.shape
        base = self.base or ("squared" if classes == 1 else "cross_entropy")
        if base == "squared":
            wanted = labels.reshape(rows, -1)
            if wanted.shape[1] != classes:
                raise ShapeError(f"{self.name} got labels {tuple(labels.shape)} for outputs of {classes} numbers")
            return (scores.float() - wanted[:, None].float()).square().mean(-1)
        if labels.shape != (rows,):
            raise ShapeError(f"{self.name} got labels {tuple(labels.shape)} for {rows} rows: one a row")
        if callable(base):
            return torch.stack([base(scores[:, i], labels) for i in range(exits)], dim=1)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ShapeError(f"{self.name} takes class numbers as labels, whole numbers, got {labels.dtype}")
        exact = scores if scores.dtype == torch.float64 else scores.float()
        flat = labels.long()[:, None].expand(-1, exits).reshape(-1)
        try:
            return F.cross_entropy(exact.flatten(0, 1), flat, ignore_index=IGNORE, reduction="none").view(rows, exits)
        except IndexError as error:
            asked = labels[labels != IGNORE]
            raise ShapeError(
                f"{self.name} got labels from {int(asked.min())} to {int(asked.max())} for {classes} classes: they "
                f"must lie in 0..{classes - 1}, or be {IGNORE} where nothing is asked"
            ) from error


@register("objective", source="Balagansky and Gavrilov 2022; Banino et al. 2021")
class Ponder(_Exits):
    """Mean loss under the exits' probabilities, plus the divergence from a geometric prior; for models with exits.

    loss = mean over rows of sum_i p_i l(C(h_i), y) + beta * KL. Reads `exit_logits` (B, n, C) and `exit_log_p` (B, n)
    of a model that `early_exit` rewrote, in training; in evaluation `logits` and `exit_layer`, and then the loss is
    that of the answers given (no KL). Logs `task`, `kl`, `depth` (the mean layer, 1..n) and `accuracy`.

    Args:
        base: loss of one row: "cross_entropy", "squared", or a function of scores (B, C) and labels that returns (B,);
            None = cross-entropy, squared error where C = 1.
        prior: chance of leaving after each layer, 0 < prior < 1; the mean depth is about 1 / prior. The paper's 0.1 is
            for 12 layers: of 6 it would hold 0.59 of the mass at the last, so take 0.2 there.
        beta: weight of the KL, not negative.
        kl: "prior_to_posterior" is KL(G || p), as the official code has it; "posterior_to_prior" KL(p || G), as
            PonderNet writes it.
        truncate_eps: train as the official code: the last layer's p_n = lambda_n prod (1 - lambda_j), and once a row's
            mass exceeds 1 - eps its later p are the constant eps / n. None = the exact distribution. It uses 0.05.
        kind: the prior: "geometric", or "normal", the code's other one: exp(-(i - 1 / prior)^2), normalised.
        wait: a model without exits trains on its one answer, for runs in which the pass comes later; else an error.
    Raises:
        LaminaError: options out of range, or outputs without what it reads. ShapeError: labels that do not fit.
    Source: Balagansky, Gavrilov (2022), arXiv 2204.03276, section 3; Banino et al. (2021), arXiv 2107.05407, section 2.
    Example:
        >>> out = {"exit_logits": torch.zeros(1, 2, 2), "exit_log_p": torch.tensor([[0.5, 0.5]]).log()}
        >>> round(float(Ponder(prior=0.5).loss(out, {"labels": torch.tensor([1])})["loss"]), 4)
        0.6931
    """

    name = "ponder"

    def __init__(
        self,
        base: Base | Callable[[Tensor, Tensor], Tensor] | None = None,
        prior: float = 0.1,
        beta: float = 0.5,
        kl: Divergence = "prior_to_posterior",
        truncate_eps: float | None = None,
        kind: Literal["geometric", "normal"] = "geometric",
        wait: bool = False,
    ) -> None:
        super().__init__(base, wait)
        if not 0.0 < prior < 1.0:
            raise LaminaError(f"ponder: prior is a chance, 0 < prior < 1, got {prior}")
        if not beta >= 0.0:
            raise LaminaError(f"ponder: beta must not be negative, got {beta}")
        if kl not in ("prior_to_posterior", "posterior_to_prior"):
            raise LaminaError(f"ponder: kl is 'prior_to_posterior' or 'posterior_to_prior', got {kl!r}")
        if kind not in ("geometric", "normal"):
            raise LaminaError(f"ponder: kind of prior is 'geometric' or 'normal', got {kind!r}")
        if truncate_eps is not None and not 0.0 < truncate_eps < 1.0:
            raise LaminaError(f"ponder: truncate_eps is a probability, 0 < truncate_eps < 1, got {truncate_eps}")
        self.prior, self.beta, self.kl, self.truncate_eps, self.kind = prior, beta, kl, truncate_eps, kind

    def _trained(self, outputs: Any, scores: Tensor, labels: Tensor) -> Losses:
        log_p = _needed(outputs, "exit_log_p", scores)
        if self.truncate_eps is not None:
            log_p = truncated(_needed(outputs, "lambda_logits", scores), self.truncate_eps)
        p, asked = log_p.exp(), _asked(labels)
        prior = log_prior(scores.shape[1], self.prior, self.kind).to(log_p)
        task = mean((p * self._errors(scores, labels)).sum(1), asked)
        divergence = mean(kl_divergence(log_p, prior, self.kl), asked)["loss"]
        layers = torch.arange(1, scores.shape[1] + 1, device=p.device)
        result: Losses = {
            "loss": task["loss"] + self.beta * divergence,
            "count": task["count"],
            "task": task["loss"].detach(),
            "kl": divergence.detach(),
            "depth": mean((p * layers).sum(1).detach(), asked)["loss"],
        }
        if scores.shape[2] > 1 and not labels.is_floating_point():
            right = (scores.argmax(-1) == labels[:, None]).to(p.dtype)
            result["accuracy"] = mean((p * right).sum(1).detach(), asked)["loss"]
        return result


@register("objective", source="Zhou et al. 2020, equation 3")
class WeightedExits(_Exits):
    """Every exit's loss, weighted by its layer: sum_i i l_i / sum_i i; what PABEE's classifiers are trained on.

    Reads `exit_logits` (B, n, C) of a model that `early_exit` rewrote; in evaluation `logits` and `exit_layer`, as
    `Ponder` does. Logs `task` (the last layer's loss) and `accuracy`.

    Args:
        base: loss of one row, see `Ponder`. wait: as there.
    Raises:
        LaminaError: outputs without exits. ShapeError: labels that do not fit.
    Source: Zhou et al., BERT Loses Patience (2020), arXiv 2006.04152, equation 3.
    """

    name = "weighted_exits"

    def __init__(self, base: Base | Callable[[Tensor, Tensor], Tensor] | None = None, *, wait: bool = False) -> None:
        super().__init__(base, wait)

    def _trained(self, outputs: Any, scores: Tensor, labels: Tensor) -> Losses:
        errors, asked = self._errors(scores, labels), _asked(labels)
        weights = torch.arange(1, scores.shape[1] + 1, device=errors.device, dtype=errors.dtype)
        losses = mean((errors * weights).sum(1) / weights.sum(), asked)
        result: Losses = {**losses, "task": mean(errors[:, -1].detach(), asked)["loss"]}
        if scores.shape[2] > 1 and not labels.is_floating_point():
            result["accuracy"] = mean((scores[:, -1].argmax(-1) == labels).to(errors.dtype), asked)["loss"]
        return result


def log_prior(exits: int, chance: float, kind: Literal["geometric", "normal"] = "geometric") -> Tensor:
    """Return the log-prior of the exits, (n,), float64: geometric, the last layer taking the rest, or normal."""
    layer = torch.arange(1, exits + 1, dtype=torch.float64)
    if kind == "normal":
        return torch.log_softmax(-(layer - 1.0 / chance).square(), dim=0)
    stay = torch.log1p(torch.tensor(-chance, dtype=torch.float64))
    leave = torch.full_like(layer, chance).log()
    leave[-1] = 0.0
    return (layer - 1) * stay + leave


def kl_divergence(log_p: Tensor, log_g: Tensor, direction: Divergence = "prior_to_posterior") -> Tensor:
    """Divergence of the exits' distribution and the prior, a row: log p (B, n), log g (n,) -> (B,), in nats.

    "prior_to_posterior" is sum_i g_i (log g_i - log p_i), "posterior_to_prior" sum_i p_i (log p_i - log g_i).
    """
    log_p = log_p.clamp(min=torch.tensor(SMALLEST, dtype=torch.float64).log().item())
    if direction == "prior_to_posterior":
        return (log_g.exp() * (log_g - log_p)).sum(-1)
    return (log_p.exp() * (log_p - log_g)).sum(-1)


def truncated(lambda_logits: Tensor, eps: float) -> Tensor:
    """Log of the exit probabilities that the official code trains on: (B, n) -> (B, n); they sum to less than 1.

    p_i = lambda_i prod_{j<i} (1 - lambda_j), the last one too; where the layers before hold more than 1 - eps already,
    p_i is the constant eps / n, without a gradient.
    """
    a = lambda_logits if lambda_logits.dtype == torch.float64 else lambda_logits.float()
    stayed = F.logsigmoid(-a).cumsum(1)
    before = torch.cat((torch.zeros_like(stayed[:, :1]), stayed[:, :-1]), dim=1)
    log_p = F.logsigmoid(a) + before
    over = -torch.expm1(before) > 1.0 - eps
    return torch.where(over, torch.full_like(log_p, eps / a.shape[1]).log(), log_p)


def _entry(outputs: Any, name: str) -> Tensor | None:
    value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return value if isinstance(value, Tensor) else None


def _needed(outputs: Any, name: str, scores: Tensor) -> Tensor:
    value = _entry(outputs, name)
    if value is None:
        raise LaminaError(
            f"ponder needs {name!r} in the outputs: exits made for patience have no lambda head (train them with "
            "weighted_exits)"
        )
    if value.shape != scores.shape[:2]:
        raise ShapeError(f"ponder got {name} {tuple(value.shape)} for exit_logits {tuple(scores.shape)}")
    return value


def _asked(labels: Tensor) -> Tensor:
    """Rows that have a label."""
    known = labels.reshape(len(labels), -1)[:, 0]
    return torch.ones_like(known, dtype=torch.bool) if known.is_floating_point() else known != IGNORE
