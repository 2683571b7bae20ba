"""Train the routers of a mixture of depths to be thresholds: tell of each token whether it is among the k chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from lamina import probe
from lamina.batches import Batch, bare, call, first_input, logits
from lamina.errors import LaminaError
from lamina.nn.token_router import ENTER, Choice, TokenRouting
from lamina.objectives.objective import Losses
from lamina.registry import register

_log = logging.getLogger(__name__)


@register("objective", source="Luo et al., gamma-MoD (2024), arXiv 2410.13859, equation 9")
class RouterLoss:
    """Cross-entropy between each router's logits and whether its layer's top-k took the token, summed over layers.

    A term beside a task's objective, at the paper's weight: `[next_token, {name: router_loss, weight: 0.01}]`. It is 0
    in evaluation, where nothing is chosen by rank, and until `depth_routing` has rewritten the model, perhaps in the
    middle of training. Logs `agreement`: the share of tokens for which a threshold of 0.5 decides as the top-k does.
    Padding is not counted.

    Source: Luo et al. (2024), arXiv 2410.13859, section 3.4. Deviation: its weight, 0.01, is the sum's that it is a
        term of.
    Example:
        >>> round(float(membership_loss(torch.zeros(1, 3, 2), torch.tensor([[True, False, True]]))[0]), 4)
        0.6931
    """

    needs: ClassVar[Literal["outputs", "model"]] = "model"

    def __init__(self) -> None:
        self._seen: list[Choice] | None = None
        self._training = self._told = False

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the model on the batch and return the loss."""
        with self.observing(model):
            outputs = call(model, batch)
        losses = self.loss(outputs, batch)
        if losses["loss"].requires_grad:
            # Alone it leaves out what comes after the last router, and data-parallel processes wait for all parameters.
            losses["loss"] = losses["loss"] + 0.0 * logits(outputs).float().sum()
        return losses

    @contextmanager
    def _observe(self, model: nn.Module) -> Iterator[None]:
        paths, seen = _routings(model), list[Choice]()
        if not paths:
            if not self._told:
                _log.info("router_loss is 0 until depth_routing has rewritten the model")
            self._told = True
            yield
            self._seen = seen
            return

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Choice) -> None:
            seen.append(output)

        with probe.observe(model, dict.fromkeys(paths, keep)):
            yield
        self._seen, self._training = seen, model.training

    @property
    def observing(self) -> Callable[[nn.Module], AbstractContextManager[None]]:
        """A context under which a forward pass leaves what `loss` needs."""
        return self._observe

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Return the loss of the pass that ran under `observing`.

        Raises:
            LaminaError: none did.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise LaminaError(
                "router_loss looks at the routers while the model runs: call the objective, not its loss()"
            )
        if not seen:
            x = first_input(batch)
            return {"loss": torch.zeros((), device=x.device), "count": torch.tensor(float(len(x)), device=x.device)}
        found = [membership_loss(c.logits, c.enters, c.real) for c in seen]
        count = found[0][1]
        if not self._training:
            return {"loss": torch.zeros((), device=count.device), "count": count}
        agreement = torch.stack([_agreement(c) for c in seen]).mean()
        return {"loss": torch.stack([value for value, _ in found]).sum(), "count": count, "agreement": agreement}

    def fits(self, model: nn.Module, data: Any = None, until: float = 1.0) -> None:
        """Say before training whether there is, or may come, something to look at.

        Args:
            until: fraction of training up to which the model stays as it is.
        Raises:
            LaminaError: nothing is routed, and nothing will be.
        """
        if until >= 1.0 and not _routings(model):
            raise LaminaError("router_loss needs a model with routed blocks: rewrite it, {name: depth_routing}")

    def parameters(self) -> Iterator[Parameter]:
        """Yield nothing: the routers are the model's."""
        return iter(())


def _routings(model: nn.Module) -> list[str]:
    return [path for path, module in bare(model).named_modules() if isinstance(module, TokenRouting)]


def membership_loss(logits: Tensor, enters: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of two classes, in nats, and over how many tokens; logits (B, T, 2), enters (B, T) bool.

    Args:
        real: (B, T) bool, tokens that count; None = all.
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), enters.flatten().long(), reduction="none")
    counted = torch.ones_like(losses) if real is None else real.flatten().to(losses.dtype)
    return (losses * counted).sum() / counted.sum().clamp(min=1), counted.sum()


def _agreement(choice: Choice) -> Tensor:
    same = ((choice.logits.softmax(-1)[..., ENTER] >= 0.5) == choice.enters).float()
    counted = torch.ones_like(same) if choice.real is None else choice.real.to(same.dtype)
    return (same * counted).sum() / counted.sum().clamp(min=1)
