"""Train all parts of an elastic model together with the whole: it learns the labels, they learn from it.

    objective = Sandwich("classification", start=0.5, ramp=0.05)       # the whole alone for half of the training

Source: Annavajjala et al., DepS: Delayed epsilon-Shrinking for Faster Once-For-All Training (ECCV 2024), arXiv
2407.06167; the sandwich rule and in-place distillation: Yu et al., BigNAS (ECCV 2020), arXiv 2003.11142.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lamina import probe
from lamina.batches import Batch, bare, call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.nn.elastic import Subnet, Supernet, is_elastic, supernet
from lamina.objectives._penalized import Penalized
from lamina.objectives.objective import Losses, mean
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

IGNORE = -100
"""Label of a position that counts for nothing (torch's own `ignore_index`)."""


@register("objective", source="Annavajjala et al., DepS (ECCV 2024), arXiv 2407.06167")
class Sandwich(Penalized):
    """Another objective on the whole of an elastic model, and a share of it for parts that follow the whole.

    Every step trains the whole by the labels; from `start - ramp` on also the smallest part and `samples` random ones,
    each by the whole's own predictions (no labels, no dropout): loss = whole + share * (smallest + random + random),
    where the share grows from 0 to `multiplier` during the ramp. Until then, for a model that is not elastic (yet), and
    for one in evaluation mode it is `base` alone, bit by bit. Which parts are drawn hangs on `seed` and on how far
    training is (`set_progress`, which a loop of your own has to call), so processes and resumed runs draw the same.

    Batch norms of a part normalise by the batch and leave the running statistics alone, which stay those of the whole.
    Predictions are logits over the last dimension; positions with label -100 or attention mask 0 are left out.

    Args:
        base: objective of the task at hand, or its recipe node; its loss is logged as `task`.
        samples: how many random parts a step has, besides the smallest.
        temperature: softens the predictions that are followed, > 0.
        start: fraction of training from which parts count in full; 0 = from the first step (BigNAS).
        ramp: fraction of training before `start` during which their share grows linearly.
        multiplier: their share afterwards.
        schedule: of the learning rate, the recipe node of the optimizer's or a function of the fraction: during the
            ramp the share is multiplied by rate(start) / rate(now), so that what the parts are trained with grows
            linearly; None = the rate is taken to be constant over the ramp.
        seed: of the draws.
    Raises:
        LaminaError: an option out of range, or a ramp longer than what comes before `start`.
    Source: DepS, arXiv 2407.06167, section 3 and algorithm 1; T_w = 150 and R = 5 of 270 epochs are the defaults.
        Deviation: the running statistics stay the whole's (the official code lets every part write into them and takes
        them anew before each evaluation).
    """

    def __init__(
        self,
        base: Annotated[Node, Slot("objective")],
        samples: int = 2,
        temperature: float = 1.0,
        *,
        start: float = 0.55,
        ramp: float = 0.02,
        multiplier: float = 1.0,
        schedule: Annotated[Node | None, Slot("schedule")] = None,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
            raise LaminaError(f"sandwich: samples must be a whole number, not negative, got {samples!r}")
        if not temperature > 0 or not multiplier >= 0:
            raise LaminaError(
                f"sandwich: temperature must be > 0 and multiplier >= 0, got {temperature} and {multiplier}"
            )
        if not 0 <= start <= 1 or not ramp >= 0:
            raise LaminaError(f"sandwich: start must be in 0..1 and ramp not negative, got {start} and {ramp}")
        if ramp > start:
            raise LaminaError(f"sandwich: a ramp of {ramp} does not fit before start, at {start} of the training")
        self.samples, self.temperature, self.multiplier, self.seed = samples, temperature, multiplier, seed
        self.start, self.ramp = start, ramp
        self.rate: Callable[[float], float] | None = None if schedule is None else factory("schedule", schedule)
        self.fraction = 0.0

    def set_progress(self, fraction: float) -> None:
        """Tell how far training is: the share of the parts, and which are drawn, hang on it."""
        super().set_progress(fraction)
        self.fraction = float(fraction)

    def share(self, fraction: float) -> float:
        """Return what the losses of the parts are multiplied by; `fraction` is that of the training after the step."""
        if self.start == 0 or fraction > self.start:
            return self.multiplier
        # Rounded, so that the last step before the ramp has none of it.
        grown = round((fraction - self.start + self.ramp) / self.ramp, 9) if self.ramp else 0.0
        if grown <= 0:
            return 0.0
        rates = (1.0, 1.0) if self.rate is None else (self.rate(self.start), self.rate(fraction))
        return self.multiplier * grown * (rates[0] / rates[1] if rates[1] else 1.0)

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the whole's losses, with those of the parts added, and logged as `smallest` and `random`."""
        share = self._share_now(model)
        if not share:
            alone: Losses = self.base(model, batch)
            return alone
        net = supernet(model)
        net.set(net.full())
        losses, predictions, again = self._whole(model, batch)
        found = [self._part(model, net, part, predictions, again, batch) for part in self.draw(net)]
        total = losses["loss"] + share * torch.stack(found).sum()
        result = {**losses, "loss": total, "smallest": found[0].detach()}
        result["measure"] = losses.get("measure", losses["loss"]).detach()
        if self.samples:
            result["random"] = torch.stack(found[1:]).mean().detach()
        return {**result, "share": total.new_tensor(share)}

    def parts(self, model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        """Yield the terms of the loss one by one, the whole's first, for a loop that goes backward after each.

        The gradients sum up to that of the loss, and no more than one network's activations are held. Under
        DistributedDataParallel every backward pass but the last belongs in `no_sync()`.
        """
        share = self._share_now(model)
        if not share:
            yield self.base(model, batch)["loss"]
            return
        net = supernet(model)
        net.set(net.full())
        losses, predictions, again = self._whole(model, batch)
        yield losses["loss"]
        for part in self.draw(net):
            yield share * self._part(model, net, part, predictions, again, batch)

    def draw(self, net: Supernet) -> list[Subnet]:
        """Return the parts of this step: the smallest, then the random ones; the same on every process."""
        drawn = [net.smallest()]
        for index in range(self.samples):
            key = zlib.crc32(struct.pack("<qqd", self.seed, index, self.fraction))
            drawn.append(net.sample(torch.Generator().manual_seed(key)))
        return drawn

    def _share_now(self, model: nn.Module) -> float:
        share = self.share(self.fraction)
        return share if share and bare(model).training and is_elastic(model) else 0.0

    def _whole(self, model: nn.Module, batch: Batch) -> tuple[Losses, Tensor, Callable[[nn.Module], Any]]:
        """Return the base's losses, the predictions to follow, and how to call a model as it was called."""
        if self.base.needs == "outputs":
            outputs = call(model, batch)
            return self.base.loss(outputs, batch), logits(outputs).detach(), lambda part: call(part, batch)
        # It calls the model itself, perhaps with another batch (masked tokens).
        seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        with probe.observe(model, {"": lambda module, args, kwargs, output: seen.append((args, kwargs, output))}):
            losses = self.base(model, batch)
        args, kwargs, outputs = seen[-1]
        return losses, logits(outputs).detach(), lambda part: part(*args, **kwargs)

    def _part(
        self,
        model: nn.Module,
        net: Supernet,
        part: Subnet,
        goal: Tensor,
        again: Callable[[nn.Module], Any],
        batch: Batch,
    ) -> Tensor:
        """Return what one part lacks to predict what the whole does."""
        with net.running_as(part), undistracted(net.model):
            predicted = logits(again(_runner(model, net)))
        if predicted.shape != goal.shape:
            raise ShapeError(f"a part predicts {tuple(predicted.shape)}, the whole {tuple(goal.shape)}")
        losses = soft_cross_entropy(predicted, goal, self.temperature)
        return mean(losses, _kept(batch, losses.shape))["loss"]


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return temperature**2 * sum_c -softmax(teacher / T)_c log softmax(student / T)_c: (..., c) -> (...), float32.

    Larger than the divergence of the two by the teacher's entropy, and of the same gradient.
    """
    goal = F.softmax(teacher.float() / temperature, dim=-1)
    return -(temperature**2) * (goal * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1)


@contextmanager
def undistracted(model: nn.Module) -> Iterator[None]:
    """Let a model train without dropout, and its batch norms normalise by the batch but not remember it."""
    trained = [m for m in model.modules() if m.training]
    norms = [m for m in trained if isinstance(m, _BatchNorm) and m.track_running_stats]
    # A recurrent layer goes backward in training mode alone (cuDNN); a norm of any kind knows what it does there.
    quiet = [m for m in trained if getattr(m, "running_mean", None) is None and not isinstance(m, nn.RNNBase)]
    for module in quiet:
        module.training = False
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for module in quiet:
            module.training = True
        for norm in norms:
            norm.track_running_stats = True


def _runner(model: nn.Module, net: Supernet) -> nn.Module:
    """Return what runs the parts: a compiled model where shapes never change, else the bare one.

    Wrappers of data parallelism saw the whole, whose gradients they wait for.
    """
    compiled = getattr(model, "_orig_mod", None) is net.model
    return model if compiled and net.mode == "mask" else net.model


def _kept(batch: Batch, shape: torch.Size) -> Tensor | None:
    """Return which predictions count, in their shape; None = all."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    kept = None
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        kept = labels != IGNORE
    if isinstance(mask, Tensor) and mask.shape == shape:
        kept = mask.bool() if kept is None else kept & mask.bool()
    return kept
