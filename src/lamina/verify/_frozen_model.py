"""A model and how its decisions are frozen: one call runs it at x0 with probes beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lamina.batches import TARGETS, Batch, bare, call, logits
from lamina.errors import LaminaError, nearest
from lamina.probe import first_tensor
from lamina.verify._frozen_pass import FrozenPass, UserScope
from lamina.verify.linear_scopes.call import Rule, Settings
from lamina.verify.linear_scopes.table import name_of

Rules = Mapping[Any, UserScope]
"""Module type, or torch function -> scope."""


class FrozenModel:
    """A model and how its decisions are frozen."""

    def __init__(self, model: nn.Module, rule: Rule, eps: float, strict: bool, rules: Rules | None) -> None:
        if rule not in get_args(Rule):
            known = get_args(Rule)
            raise LaminaError(f"the rule must be one of {known}, got {rule!r}{nearest(str(rule), known)}")
        if not eps > 0:
            raise LaminaError(f"eps must be above 0, got {eps}")
        self.model = _checked(model)
        self.rule, self.eps, self.strict = rule, eps, strict
        given = dict(rules or {})
        self.modules = {k: s for k, s in given.items() if isinstance(k, type) and issubclass(k, nn.Module)}
        self.functions = {name_of(k): s for k, s in given.items() if k not in self.modules}

    def run(
        self,
        batch: Batch,
        name: str,
        probe: Tensor,
        *,
        count: int | None = None,
        graph: bool = False,
        watch: bool = False,
    ) -> tuple[Tensor, Tensor | None, FrozenPass]:
        """Run the model; return its output, part 1 of it (None: all of it is constant) and the pass."""
        settings = Settings(self.rule, self.eps, self.strict, count, watch)
        frozen = FrozenPass(self.model, self.functions, settings, differentiable=graph)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            with torch.set_grad_enabled(graph):
                # Written into by layers that work in place: never the caller's own.
                frozen.follow(batch[name], probe.clone())
            stack.enter_context(frozen.module_scopes(self.modules))
            stack.enter_context(frozen)
            output = _prediction(call(self.model, batch))
        part1 = frozen.part1(output)
        if part1 is None and output not in frozen.decided:
            raise LaminaError(
                f"the output of {type(self.model).__name__} does not depend on this input, as far as torch functions "
                "can be seen (what is scripted, or runs outside of torch, cannot)"
            )
        return output, part1, frozen


def _prediction(output: Any) -> Tensor:
    try:
        return logits(output)
    except TypeError:
        # Image-to-image models name theirs otherwise.
        found = first_tensor(output)
        if found is None:
            raise
        return found


def _checked(model: nn.Module) -> nn.Module:
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise LaminaError(f"{type(bare(model)).__name__} is compiled, and a compiled graph cannot be looked into")
    model = bare(model)
    scripted = next((p for p, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise LaminaError(f"{scripted or type(model).__name__!r} is scripted, and a script cannot be looked into")
    training = next((p for p, m in model.named_modules() if m.training), None)
    if training is not None:
        raise LaminaError(f"{training or type(model).__name__!r} is in training mode: call model.eval() first")
    return model


def named_input(x: Tensor | Batch) -> tuple[dict[str, Any], str]:
    """Return the batch and the name of its first floating-point entry.

    Raises:
        LaminaError: there is none.
    """
    batch = {"inputs": x} if isinstance(x, Tensor) else {k: v for k, v in x.items() if k not in TARGETS}
    name = next((k for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if name is None:
        types = ", ".join(f"{k} {getattr(v, 'dtype', type(v).__name__)}" for k, v in batch.items())
        raise LaminaError(
            f"a linear map needs a floating-point input, got {types} (of a language model the map starts at "
            "{'inputs_embeds': model.get_input_embeddings()(input_ids)})"
        )
    return batch, name
