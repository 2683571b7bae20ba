"""Objectives with a target: next token, masked token, classification, regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.batches import Batch, call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.objectives.objective import Losses, mean, target
from lamina.registry import register

IGNORE = -100
"""Label of a position that counts for nothing (torch's own `ignore_index`)."""


class _FromOutputs:
    """What the objectives of this file share: they need outputs only and have no parameters."""

    needs: ClassVar[Literal["outputs", "model"]] = "outputs"

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the losses."""
        return self.loss(call(model, batch), batch)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the losses of outputs already computed."""
        raise NotImplementedError

    def parameters(self) -> Iterator[Parameter]:
        """Yield nothing: there is nothing of its own to train."""
        return iter(())


@register("objective")
class NextToken(_FromOutputs):
    """Cross-entropy of the next token at every position, in nats.

    outputs (B, T, vocabulary) and `labels` (B, T), already shifted: labels[:, t] follows input_ids[:, t].
    Without `labels` they are made from `input_ids`, and padding (`attention_mask` 0) is left out.

    Args:
        label_smoothing: share of the target spread over the vocabulary, 0..1.
        shift: True where `labels` stand at their own positions (Hugging Face's convention) and are to be
            shifted here.
    """

    def __init__(self, label_smoothing: float = 0.0, *, shift: bool = False) -> None:
        _check_share("label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing
        self.shift = shift

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the mean over positions whose label is not -100."""
        scores = logits(outputs)
        labels = batch.get("labels")
        if labels is None:
            labels = next_labels(target(batch, "input_ids", "next_token"), batch.get("attention_mask"))
        elif self.shift:
            labels = next_labels(labels, None)
        return _cross_entropy(scores, labels, self.label_smoothing, "next_token")


@register("objective", source="Devlin et al., BERT (2018), arXiv 1810.04805, section 3.1")
class MaskedToken(_FromOutputs):
    """Cross-entropy of hidden tokens: a share of the input is replaced by a mask token and must be restored.

    Of the chosen positions 80 % become `mask_token`, 10 % a random token, 10 % stay. In training the choice is drawn
    from a generator of the objective's own, whose state is saved. For a model in evaluation mode it is the same every
    time: evaluations can be compared, and do not move the training's draws.

    Args:
        mask_token: id of the mask token.
        vocabulary: number of token ids, for the random replacement.
        share: of positions chosen, 0..1.
        seed: of the choice.
        masked: True where the batch arrives masked, with `labels` (a Hugging Face collator does that).
    """

    needs: ClassVar[Literal["outputs", "model"]] = "model"

    def __init__(
        self, mask_token: int, vocabulary: int, *, share: float = 0.15, seed: int = 0, masked: bool = False
    ) -> None:
        _check_share("share", share)
        if not 0 <= mask_token < vocabulary:
            raise LaminaError(f"mask_token must be an id below vocabulary={vocabulary}, got {mask_token}")
        self.mask_token, self.vocabulary, self.share, self.masked = mask_token, vocabulary, share, masked
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Mask the batch, run the model, return the losses."""
        drawn = self.generator if model.training else torch.Generator().manual_seed(self.seed)
        masked = batch if self.masked else self.mask(batch, drawn)
        return self.loss(call(model, masked), masked)

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the mean over the masked positions of a batch that `mask` made."""
        return _cross_entropy(logits(outputs), target(batch, "labels", "masked_token"), 0.0, "masked_token")

    def mask(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return the batch with masked `input_ids` and with `labels` (-100 where nothing is asked).

        Args:
            generator: draws the choice; None = the objective's own.
        """
        tokens = target(batch, "input_ids", "masked_token")
        generator = self.generator if generator is None else generator
        draw = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        action = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        other = torch.randint(self.vocabulary, tokens.shape, generator=generator).to(tokens.device)
        chosen = draw < self.share
        if isinstance(batch.get("attention_mask"), Tensor):
            chosen &= batch["attention_mask"].bool()
        hidden = torch.where(action < 0.8, self.mask_token, torch.where(action < 0.9, other, tokens))
        return {
            **batch,
            "input_ids": torch.where(chosen, hidden, tokens),
            "labels": tokens.masked_fill(~chosen, IGNORE),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where the saved generator stood."""
        self.generator.set_state(state["generator"])


@register("objective")
class Classification(_FromOutputs):
    """Cross-entropy of a class a row: outputs (B, ..., classes), `labels` (B, ...) in 0..classes-1; logs accuracy.

    Args:
        label_smoothing: share of the target spread over the classes, 0..1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        _check_share("label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the mean over rows whose label is not -100, and `accuracy` (0..1)."""
        scores, labels = logits(outputs), target(batch, "labels", "classification")
        losses = _cross_entropy(scores, labels, self.label_smoothing, "classification")
        right = (scores.argmax(-1) == labels).sum() / losses["count"].clamp(min=1)
        return {**losses, "accuracy": right.detach()}


@register("objective")
class Regression(_FromOutputs):
    """Squared, absolute or Huber error of numbers: outputs and `labels` of one shape ((B, 1) and (B,) also fit).

    Args:
        kind: the error of one element; `huber` has its bend at 1.
    """

    def __init__(self, kind: Literal["squared", "absolute", "huber"] = "squared") -> None:
        errors: dict[str, Callable[..., Tensor]] = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.huber_loss}
        if kind not in errors:
            raise LaminaError(f"kind must be one of {', '.join(errors)}, got {kind!r}")
        self.error = errors[kind]

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the mean over all elements."""
        guess, labels = logits(outputs), target(batch, "labels", "regression")
        if guess.shape == (*labels.shape, 1):
            guess = guess.squeeze(-1)
        if guess.shape != labels.shape:
            # Broadcasting (B, 1) against (B,) would silently compare every row with every other.
            raise ShapeError(f"regression got outputs {tuple(guess.shape)} for labels {tuple(labels.shape)}")
        return mean(self.error(guess.float(), labels.float(), reduction="none"))


def next_labels(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Shift tokens (B, T) one to the left: the label of position t is token t+1; the last, and padding, is -100."""
    labels = torch.full_like(tokens, IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    if mask is not None:
        labels[:, :-1].masked_fill_(~(mask[:, 1:].bool() & mask[:, :-1].bool()), IGNORE)
    return labels


def _cross_entropy(scores: Tensor, labels: Tensor, smoothing: float, name: str) -> Losses:
    if scores.shape[:-1] != labels.shape:
        raise ShapeError(f"{name} got outputs {tuple(scores.shape)} for labels {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(f"{name} takes class numbers as labels, whole numbers, got {labels.dtype}")
    flat = labels.reshape(-1).long()
    try:
        summed = F.cross_entropy(
            scores.reshape(-1, scores.shape[-1]).float(),
            flat,
            ignore_index=IGNORE,
            label_smoothing=smoothing,
            reduction="sum",
        )
    except IndexError as error:
        # Told by torch's own check, and so at no cost; a GPU checks later, in its own words.
        asked = flat[flat != IGNORE]
        raise ShapeError(
            f"{name} got labels from {int(asked.min())} to {int(asked.max())} for {scores.shape[-1]} classes: they "
            f"must lie in 0..{scores.shape[-1] - 1}, or be {IGNORE} where nothing is asked"
        ) from error
    count = (flat != IGNORE).sum().to(summed.dtype)
    return {"loss": summed / count.clamp(min=1), "count": count}


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise LaminaError(f"{name} must be in 0..1, got {value}")
