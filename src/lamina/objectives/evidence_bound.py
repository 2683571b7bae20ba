"""Train models with a latent start that has a posterior, such as latent ODEs: errors, and how far it is from the prior.

Source: Kingma, Welling, Auto-Encoding Variational Bayes (2013), arXiv 1312.6114; as used in Rubanova et al., Latent
ODEs (2019), arXiv 1907.03907.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch, call
from lamina.errors import LaminaError, ShapeError
from lamina.objectives.objective import Losses, mean, target
from lamina.registry import register


@register("objective", source="Kingma, Welling 2013, arXiv 1312.6114, equation 10; Rubanova et al. 2019")
class EvidenceBound(nn.Module):
    """Squared error of what a latent model foretells and reconstructs, plus the divergence of its posterior.

    outputs: a mapping with `logits`, `mean` and `log_variance` (B, width) and maybe `reconstruction`: that of
    `LatentODE`. The targets are `labels`, where the batch has them, and `inputs`; entries where `mask` is False do not
    count in the reconstruction. loss = error / (2 noise^2) a value + weight * KL / values a row, in nats up to a
    constant. Logs `error` (mean squared, of the labels; else of the reconstruction), `reconstruction` and `divergence`.

    Args:
        noise: standard deviation of the observations, > 0; the paper of latent ODEs has 0.01, for values in 0..1.
        weight: of the divergence at the end, >= 0.
        growth: the weight grows as weight * (1 - growth**(steps - delay)), from 0; 0..1 (1 excluded).
        delay: training calls before it starts to grow.
        reconstruct: weight of the reconstruction's error beside the labels', >= 0.
    Raises:
        LaminaError: an option out of range, or outputs without a posterior. ShapeError: targets of another shape.
    """

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"
    calls: Tensor

    def __init__(
        self,
        noise: float = 1.0,
        weight: float = 1.0,
        growth: float = 0.99,
        delay: int = 100,
        reconstruct: float = 1.0,
    ) -> None:
        super().__init__()
        if not (noise > 0 and weight >= 0 and reconstruct >= 0 and delay >= 0 and 0 <= growth < 1):
            raise LaminaError(
                f"noise must be above 0, weight, reconstruct and delay at least 0 and growth in 0..1, got {noise}, "
                f"{weight}, {reconstruct}, {delay} and {growth}"
            )
        self.noise, self.weight, self.growth, self.delay, self.reconstruct = noise, weight, growth, delay, reconstruct
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        return self.loss(call(model, batch), batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the bound's negative, a mean over the values that count."""
        if not isinstance(outputs, Mapping) or not {"mean", "log_variance", "logits"} <= set(outputs):
            raise LaminaError("evidence_bound needs outputs with mean, log_variance and logits, such as a LatentODE's")
        terms = self._errors(outputs, batch)
        if torch.is_grad_enabled():
            self.calls += 1
        grown = 1.0 - self.growth ** max(int(self.calls) - self.delay, 0) if self.weight else 0.0
        middle, log_variance = outputs["mean"].float(), outputs["log_variance"].float()
        divergence = 0.5 * (middle.square() + log_variance.exp() - 1.0 - log_variance).sum(-1).mean()
        error = terms[0]["loss"]
        values = terms[0]["count"] / len(middle)
        loss = sum(
            (w * t["loss"] for w, t in zip((1.0, self.reconstruct), terms, strict=False)), torch.zeros(()).to(error)
        )
        loss = loss / (2 * self.noise**2) + self.weight * grown * divergence / values.clamp(min=1.0)
        logged = {"error": error.detach(), "divergence": divergence.detach()}
        if len(terms) > 1:
            logged["reconstruction"] = terms[1]["loss"].detach()
        return {"loss": loss, "count": terms[0]["count"], "measure": error.detach(), **logged}

    def _errors(self, outputs: Any, batch: Batch) -> list[Losses]:
        """Squared error of the labels (where there are some), and of the reconstruction."""
        given = target(batch, "inputs", "evidence_bound")
        again = _squared(outputs.get("reconstruction", outputs["logits"]), given, batch.get("mask"))
        if not isinstance(batch.get("labels"), Tensor):
            return [again]
        ahead = _squared(outputs["logits"], batch["labels"], None)
        return [ahead, again] if "reconstruction" in outputs else [ahead]

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield nothing: there is nothing of its own to train."""
        return iter(())


def _squared(guess: Tensor, wanted: Tensor, mask: Any) -> Losses:
    if guess.shape != wanted.shape:
        raise ShapeError(f"evidence_bound got outputs {tuple(guess.shape)} for targets {tuple(wanted.shape)}")
    seen = mask if isinstance(mask, Tensor) else None
    wanted = wanted.float() if seen is None else torch.where(seen.bool(), wanted.float(), 0.0)
    return mean((guess.float() - wanted).square(), seen)
