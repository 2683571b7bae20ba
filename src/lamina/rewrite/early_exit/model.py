"""The model that a row may leave after any block."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.anatomy import Trunk, get
from lamina.errors import LaminaError
from lamina.rewrite.early_exit.halting import LambdaHead, exit_distribution
from lamina.rewrite.early_exit.leaving import (
    ByPatience,
    ByProbability,
    EveryLayer,
    Exits,
    Leaving,
    Reporting,
    Rule,
    Run,
)
from lamina.rewrite.early_exit.tail import Tail, reader, token_mask
from lamina.rewrite.rewriting import Record, history

Criterion = Literal["q", "sample", "expectation", "patience"]
CRITERIA: tuple[Criterion, ...] = ("q", "sample", "expectation", "patience")


@dataclass(frozen=True)
class Exiting:
    """When a row leaves."""

    criterion: Criterion
    q: float
    patience: int
    tolerance: float


class EarlyExitModel(nn.Module):
    """A model whose answer may leave after any block; what `EarlyExit` makes.

    Called like the model inside, whose own kind of output it returns (a dict where that is a tensor), with

    - in training: `logits` (B, C) of the last layer, `exit_logits` (B, n, C), `exit_log_p` (B, n), `lambda_logits`
      (B, n); without the last two where there is no lambda head;
    - in evaluation: `logits` of the layer each row left at, and `exit_layer` (B,), 1..n.

    `q`, `patience` and `criterion` may be set at any time, and are saved as set; so may `compact`, which is not. Under
    torch.compile and torch.export all layers run for all rows, whatever `compact` says: who leaves is not known there.
    """

    def __init__(self, model: nn.Module, trunk: Trunk, tail: Tail, exiting: Exiting, *, compact: bool) -> None:
        super().__init__()
        self.model = model
        self.trunk, self.tail, self.depth = trunk.path, tail, trunk.depth
        self.exits, self.exiting, self.compact = Exits(), exiting, compact
        self.lambda_head: LambdaHead | None = None
        self.classifier: nn.Module | None = None
        """Where the model had none."""
        self.heads: nn.ModuleList | None = None
        """PABEE's: of layers 1..n-1; the last layer's is the model's own, or `classifier`."""
        self.dropout = nn.Dropout(0.0)
        self._names = tuple(inspect.signature(self._callee.forward).parameters)
        for path in dict.fromkeys(b.path for b in trunk.blocks):
            block = get(model, path)
            block.forward = Reporting(block.forward, self.exits)

    @property
    def lamina_wrapped(self) -> nn.Module:
        """The model that says which inputs it takes."""
        return self._callee

    @property
    def _callee(self) -> nn.Module:
        inner = getattr(self.model, "lamina_wrapped", None)
        return inner if isinstance(inner, nn.Module) else self.model

    @property
    def config(self) -> Any:
        """The config of the model inside, where it has one."""
        config = getattr(self.model, "config", None)
        if config is None:
            raise AttributeError(f"{type(self.model).__name__} has no config")
        return config

    @property
    def q(self) -> float:
        """Cumulated probability of leaving above which a row leaves: 0..1; greater is deeper."""
        return self.exiting.q

    @q.setter
    def q(self, value: float) -> None:
        self._set(q=value)

    @property
    def patience(self) -> int:
        """How often on end PABEE's answer must stay the same."""
        return self.exiting.patience

    @patience.setter
    def patience(self, value: int) -> None:
        self._set(patience=value)

    @property
    def criterion(self) -> Criterion:
        """By which rule rows leave in evaluation."""
        return self.exiting.criterion

    @criterion.setter
    def criterion(self, value: Criterion) -> None:
        self._set(criterion=value)

    def _set(self, **change: Any) -> None:
        exiting = Exiting(**{**vars(self.exiting), **change})
        check_exiting(exiting, self.depth)
        if exiting.criterion != "patience" and self.lambda_head is None:
            raise LaminaError(f"criterion={exiting.criterion!r} needs a lambda head, and these exits were made without")
        self.exiting = exiting
        # What is saved is the decision: it says what the model does now.
        self.lamina_history: tuple[Record, ...] = tuple(
            replace(r, decision={**r.decision, **change}) if r.name == "early_exit" else r for r in history(self)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model inside; see the class for what comes back.

        Raises:
            LaminaError: a cache of keys and values was asked for, or the model now has other blocks than it had.
        """
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if "use_cache" in self._names:
            if given.get("use_cache") or given.get("past_key_values") is not None:
                raise LaminaError("a row that left has no keys in later layers: exits go without a cache")
            kwargs = kwargs if "use_cache" in given else {**kwargs, "use_cache": False}
        elif given.get("cache") is not None:
            raise LaminaError("a row that left has no keys in later layers: exits go without a cache")
        mask = token_mask(self.model, given, self.tail.pool)
        if self.training or self.criterion == "expectation":
            return self._every_layer(args, kwargs, mask)
        return self._leaving(args, kwargs, mask)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a token that leaves early has no keys for the tokens after it in the layers it did not see.

        Raises:
            LaminaError: always.
        """
        raise LaminaError(
            "a model with early exits does not generate: a token that leaves has no keys and values in later layers; "
            "the model inside does (model.model.generate)"
        )

    def _every_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> Any:
        run = EveryLayer()
        result = self._run(run, args, kwargs)
        self._check(len(run.streams))
        read = reader(self.model, self.tail)
        h = torch.stack([read(x, mask) for x in run.streams], dim=1)
        found: dict[str, Tensor] = {"exit_logits": self._scores(self.dropout(h))}
        if self.lambda_head is not None:
            found["lambda_logits"] = self.lambda_head(h)
            found["exit_log_p"] = exit_distribution(found["lambda_logits"])
        if not self.training:
            layer = torch.full((len(h),), self.depth, device=h.device)
            logits = _expected(found["exit_logits"], found["exit_log_p"])
            return _with(result, {"logits": logits, "exit_layer": layer})
        # Zero, but a path to every parameter: an objective may read a part of this, and data-parallel processes wait
        # for the gradient of each parameter.
        unused = [t.float().sum() for t in (*found.values(), *_own_tensors(result))]
        scores = found["exit_logits"]
        found["exit_logits"] = scores + (0.0 * torch.stack(unused).sum()).to(scores.dtype)
        return _with(result, {"logits": found["exit_logits"][:, -1], **found})

    def _leaving(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> Any:
        compact = self.compact and not (torch.compiler.is_compiling() and _in_a_graph())
        read = reader(self.model, self.tail)
        run = Leaving(self._rule(), read, mask, self.depth, self.tail.fixed, compact=compact)
        result = self._run(run, args, kwargs)
        self._check(run.ran)
        assert run.left_at is not None
        found = {"exit_layer": run.left_at}
        if self.tail.head is None or self.heads is not None:
            found = {"logits": self._answers(read(run.stream, mask), run.left_at), **found}
        return _with(result, found)

    def _run(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.exits.run = run
        try:
            return self.model(*args, **kwargs)
        finally:
            self.exits.run = None

    def _check(self, ran: int) -> None:
        if ran != self.depth:
            raise LaminaError(
                f"{ran} blocks of {self.trunk} ran, and the exits were made for {self.depth}: drop, replace or "
                "reorder blocks before early_exit"
            )

    def _rule(self) -> Rule:
        if self.criterion == "patience":
            return ByPatience(self._answer, self.patience, self.exiting.tolerance)
        assert self.lambda_head is not None
        return ByProbability(self.lambda_head, self.q if self.criterion == "q" else None)

    def _head(self, layer: int) -> nn.Module:
        if self.heads is not None and layer < self.depth:
            return self.heads[layer - 1]
        if self.classifier is not None:
            return self.classifier
        assert self.tail.head is not None
        return get(self.model, self.tail.head)

    def _answer(self, h: Tensor, layer: int) -> Tensor:
        answer: Tensor = self._head(layer)(h)
        return answer

    def _scores(self, h: Tensor) -> Tensor:
        """Answers of all layers from h (B, n, C_h)."""
        if self.heads is None:
            return self._answer(h.flatten(0, 1), self.depth).unflatten(0, h.shape[:2])
        return torch.stack([self._answer(h[:, i], i + 1) for i in range(self.depth)], dim=1)

    def _answers(self, h: Tensor, layer: Tensor) -> Tensor:
        """Answer each row by the head of the layer it left at."""
        answers = self._answer(h, self.depth)
        for i in range(1, self.depth) if self.heads is not None else ():
            answers = torch.where((layer == i)[:, None], self._answer(h, i), answers)
        return answers


def check_exiting(exiting: Exiting, depth: int | None = None) -> None:
    """Refuse a rule that cannot be.

    Args:
        depth: of the trunk, where it is known.
    Raises:
        LaminaError: names the option.
    """
    if exiting.criterion not in CRITERIA:
        raise LaminaError(f"early_exit: criterion must be one of {', '.join(CRITERIA)}, got {exiting.criterion!r}")
    if isinstance(exiting.q, bool) or not isinstance(exiting.q, (int, float)) or not 0.0 < exiting.q <= 1.0:
        raise LaminaError(f"early_exit: q is a share of the exits' probability, 0 < q <= 1, got {exiting.q!r}")
    if isinstance(exiting.patience, bool) or not isinstance(exiting.patience, int) or exiting.patience < 1:
        raise LaminaError(f"early_exit: patience is a whole number, at least 1, got {exiting.patience!r}")
    if not exiting.tolerance > 0.0:
        raise LaminaError(f"early_exit: tolerance must be positive, got {exiting.tolerance!r}")
    if depth is not None and exiting.criterion == "patience" and exiting.patience >= depth:
        raise LaminaError(
            f"early_exit: patience={exiting.patience} is never reached in {depth} layers (an answer can repeat "
            f"{depth - 1} times at most)"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_a_graph() -> bool:
    """Say so; called once, while the graph is made."""
    warnings.warn(
        "which rows leave is not known in a compiled or exported graph: all layers run there (as compact=False)",
        stacklevel=2,
    )
    return True


def _expected(scores: Tensor, log_p: Tensor) -> Tensor:
    if scores.shape[-1] == 1:
        return (log_p.exp()[..., None] * scores).sum(1)
    return torch.logsumexp(log_p[..., None] + scores.float().log_softmax(-1), dim=1)


def _own_tensors(result: Any) -> list[Tensor]:
    values = [result] if isinstance(result, Tensor) else result.values() if isinstance(result, dict) else result
    return [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]


def _with(result: Any, found: dict[str, Tensor]) -> Any:
    """Add what was found to the model's output, in its own class where it is a mapping."""
    if isinstance(result, dict):
        if torch.compiler.is_compiling():
            # Its class knows its own fields only, and could not be put together again outside the graph.
            return {**result, **found}
        for key, value in found.items():
            result[key] = value
        return result
    if isinstance(result, Tensor):
        return {"logits": result, **found}
    raise LaminaError(
        f"the model with exits returned a {type(result).__name__}: pass return_dict=True, or leave it out"
    )
