"""The pass that puts an exit after every block of a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lamina.anatomy import Trunk, get
from lamina.batches import Batch, bare
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.registry import register
from lamina.rewrite._drop_apply import find_trunk
from lamina.rewrite._fused_layer import leave_fused_path
from lamina.rewrite.early_exit.halting import LambdaHead, LambdaInput
from lamina.rewrite.early_exit.model import Criterion, EarlyExitModel, Exiting, check_exiting
from lamina.rewrite.early_exit.tail import POOLS, Pool, Tail, find_tail
from lamina.rewrite.rewriting import Pass, pass_name

SOURCE = "Balagansky and Gavrilov 2022"
INITIAL_STD = 0.02
LAMBDA_INPUTS = ("cat", "diff", "single", "rnn")
HEADS = ("shared", "per_layer")


@dataclass(frozen=True)
class ExitDecision:
    """Where the exits go and what they are made of."""

    trunk: str
    """Path of the stack of blocks."""
    final_norm: tuple[str, ...]
    """What every token goes through after the trunk: module paths, or activations (`tanh()`)."""
    pooler: tuple[str, ...]
    """The same for the pooled token, before the classifier."""
    head: str | None
    """Path of the model's classifier, which every exit uses; None = a new one."""
    pool: Pool
    depth: int
    """Layers, and so exits."""
    width: int
    """Of the representation that classifier and lambda head read."""
    classes: int
    lambda_input: LambdaInput
    lambda_layers: int
    criterion: Criterion
    q: float
    patience: int
    tolerance: float
    heads: Literal["shared", "per_layer"]
    compact: bool
    dropout: float
    seed: int
    fixed: tuple[str, ...] = ()
    """Tensors that the blocks are called with and that have no row for each example."""

    def table(self) -> str:
        """Word the decision for people."""
        names = (*self.final_norm, self.pool, *self.pooler, self.head or f"new classifier of {self.classes}")
        rule = {"q": f"q > {self.q}", "patience": f"{self.patience} equal answers"}.get(self.criterion, self.criterion)
        return f"{self.depth} exits after the blocks of {self.trunk}: {' -> '.join(names)}; leave by {rule}"


@register("pass", source=SOURCE)
class EarlyExit:
    """Put an exit after every block of a classifier or bare encoder: one classifier, one head that says when to leave.

    Train with the objective `ponder` (or `weighted_exits` for PABEE's heads); see `EarlyExitModel` for what the
    rewritten model returns. In evaluation rows that have left are not computed any further.

    Args:
        classes: outputs of the classifier, for a model without one; None = the model's own classifier is used.
        pool: how tokens become one vector, for a bare encoder or to insist on it: "cls" the first token, "mean" of the
            real tokens, "last" real token; "auto" = as the model does it, else its pooler, else the mean (of a causal
            model the last token).
        lambda_input: what the lambda head reads, see `LambdaHead`. lambda_layers: how deep it is.
        criterion: how rows leave in evaluation. "q": at the first layer whose cumulated probability of leaving exceeds
            q. "sample": by chance (PonderNet). "expectation": all layers run, answers are averaged. "patience": when
            the answer stayed the same so many times (PABEE).
        q: 0 < q <= 1; greater = deeper. patience: 1 .. layers - 1.
        heads: "shared" one classifier for all layers; "per_layer" one each, and with "patience" no lambda head (PABEE).
        compact: rows that left are taken out of the batch. False: all layers run and the result is the same; compiled
            and exported models do that on their own.
        dropout: of what the classifier reads, in training; 0..1.
        tolerance: of "patience" with one output: answers nearer than this count as equal.
        seed: of the new weights.
        trunk: path of the stack of blocks, where the model has several.
    Raises:
        LaminaError: options out of range, no classifier and no classes, or exits are there already. AnatomyError: no
            trunk or several, or an answer that cannot be followed back to the last block, or one for each token.
    Source: Balagansky, Gavrilov (2022), arXiv 2204.03276, section 3. Deviation: the distribution sums to one, the last
        layer takes the rest (the official code's does not; `Ponder(truncate_eps=0.05)` trains as it does).
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(
        self,
        classes: int | None = None,
        *,
        pool: Literal["auto", "cls", "mean", "last"] = "auto",
        lambda_input: LambdaInput = "cat",
        lambda_layers: int = 3,
        criterion: Criterion = "q",
        q: float = 0.5,
        patience: int = 6,
        heads: Literal["shared", "per_layer"] = "shared",
        compact: bool = True,
        dropout: float = 0.1,
        tolerance: float = 0.2,
        seed: int = 0,
        trunk: str | None = None,
    ) -> None:
        self.exiting = Exiting(criterion, q, patience, tolerance)
        check_exiting(self.exiting)
        for name, value, known in (
            ("pool", pool, ("auto", *POOLS[:3])),
            ("lambda_input", lambda_input, LAMBDA_INPUTS),
            ("heads", heads, HEADS),
        ):
            if value not in known:
                raise LaminaError(f"early_exit: {name} must be one of {', '.join(known)}, got {value!r}")
        for name, count in (("classes", classes), ("lambda_layers", lambda_layers)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise LaminaError(f"early_exit: {name} is a whole number, at least 1, got {count!r}")
        if not 0.0 <= dropout < 1.0:
            raise LaminaError(f"early_exit: dropout must be in 0 <= dropout < 1, got {dropout!r}")
        if criterion == "patience" and heads == "shared":
            warnings.warn(
                'patience compares classifiers of their own, one a layer: heads="per_layer" is what PABEE does',
                stacklevel=2,
            )
        self.classes, self.pool, self.heads, self.compact = classes, pool, heads, compact
        self.lambda_input, self.lambda_layers = lambda_input, lambda_layers
        self.dropout, self.seed, self.trunk = dropout, seed, trunk

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ExitDecision:
        """Watch the model on the first batch (made up where there is none); change nothing."""
        model = bare(model)
        trunk = self._found(model)
        pool: Pool | None = None if self.pool == "auto" else self.pool
        if pool == "cls" and trunk.causal:
            raise LaminaError(
                f"the first token of {type(model).__name__} sees no other (it is causal): pool='last' or 'mean'"
            )
        tail = find_tail(model, trunk, data, pool=pool, classes=self.classes)
        assert tail.classes is not None
        return ExitDecision(
            trunk=trunk.path,
            final_norm=tail.before,
            pooler=tail.after,
            head=tail.head,
            pool=tail.pool,
            depth=trunk.depth,
            width=tail.width,
            classes=tail.classes,
            lambda_input=self.lambda_input,
            lambda_layers=self.lambda_layers,
            criterion=self.exiting.criterion,
            q=float(self.exiting.q),
            patience=self.exiting.patience,
            tolerance=self.exiting.tolerance,
            heads=self.heads,
            compact=self.compact,
            dropout=self.dropout,
            seed=self.seed,
            fixed=tail.fixed,
        )

    def apply(self, model: nn.Module, decision: ExitDecision, lineage: Lineage) -> nn.Module:
        """Put the exits round the model; return what is round it."""
        inner = bare(model)
        trunk = find_trunk(inner, decision.trunk)
        if trunk.depth != decision.depth:
            raise AnatomyError(f"{trunk.path} has {trunk.depth} layers, the decision is for {decision.depth}")
        tail = Tail(
            decision.final_norm,
            decision.pool,
            decision.pooler,
            decision.head,
            decision.classes,
            decision.width,
            decision.fixed,
        )
        exiting = Exiting(decision.criterion, decision.q, decision.patience, decision.tolerance)
        mode = inner.training
        result = EarlyExitModel(inner, trunk, tail, exiting, compact=decision.compact)
        for block in trunk.blocks:
            leave_fused_path(inner, block.path)
        _add_heads(result, decision, lineage)
        result.dropout.p = decision.dropout
        for name, module in result.named_children():
            if name != "model":
                module.train(mode)
        result.training = mode
        node = _node(inner)
        if node is not None:
            result.lamina_node = node  # type: ignore[assignment]
        return result

    def conflicts(self, earlier: Pass[Any]) -> str | None:
        """Say why this pass cannot follow `earlier`; None where it can."""
        return "a model has one set of exits" if pass_name(earlier) == pass_name(self) else None

    def fits(self, model: nn.Module) -> None:
        """Raise what `decide` would where the model has no place for exits; looks at no data."""
        self._found(bare(model))

    def _found(self, model: nn.Module) -> Trunk:
        if any(isinstance(m, EarlyExitModel) for m in model.modules()):
            raise LaminaError(f"{type(model).__name__} has early exits already: set its q or criterion instead")
        trunk = find_trunk(model, self.trunk)
        if len({id(get(model, b.path)) for b in trunk.blocks}) < len(trunk.blocks):
            raise AnatomyError(f"some blocks of {trunk.path} are one module: which layer runs cannot be told")
        check_exiting(self.exiting, trunk.depth)
        return trunk


def _add_heads(result: EarlyExitModel, decision: ExitDecision, lineage: Lineage) -> None:
    like = _like(result, decision)
    generator = torch.Generator("cpu").manual_seed(decision.seed)
    if decision.head is None:
        result.classifier = _fresh(nn.Linear(decision.width, decision.classes, device="meta"), like, generator)
    if decision.heads == "per_layer":
        result.heads = nn.ModuleList()
        for _ in range(decision.depth - 1):
            if decision.head is None:
                head = _fresh(nn.Linear(decision.width, decision.classes, device="meta"), like, generator)
            else:
                own = get(result.model, decision.head)
                head = copy.deepcopy(own)
                for new, old in zip(head.parameters(), own.parameters(), strict=True):
                    lineage.derive(new, old)
            result.heads.append(head)
    if decision.heads == "shared" or decision.criterion != "patience":
        with torch.device("meta"):
            head = LambdaHead(decision.width, decision.lambda_input, decision.lambda_layers, decision.dropout)
        result.lambda_head = _fresh(head, like, generator)


def _like(result: EarlyExitModel, decision: ExitDecision) -> Tensor:
    """Return a weight whose device and type new ones take."""
    module = get(result.model, decision.trunk) if decision.head is None else get(result.model, decision.head)
    return next(p for p in (*module.parameters(), *result.model.parameters()) if p.is_floating_point())


def _fresh(module: nn.Module, like: Tensor, generator: torch.Generator) -> Any:
    """Fill a module made on meta: weights normal(0, 0.02), biases 0; the same numbers on every device."""
    if like.is_meta:
        return module.to(like.dtype)
    module = module.to_empty(device=like.device).to(like.dtype)
    for parameter in module.parameters():
        drawn = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            drawn.normal_(0.0, INITIAL_STD, generator=generator)
        parameter.data.copy_(drawn)
    return module


def _node(model: nn.Module) -> dict[str, Any] | None:
    """How to build a Hugging Face model of the user's own, which the exits round it would hide from `lamina.io`."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if hasattr(model, "lamina_node") or to_dict is None or not hasattr(model, "save_pretrained"):
        return None
    config = getattr(model, "lamina_config", None) or to_dict()
    return {"name": "hugging_face", "config": {**config, "architectures": [type(model).__name__]}}
