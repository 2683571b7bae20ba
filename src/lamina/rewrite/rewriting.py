"""Rewrite a model by passes: each decides what to change, then changes it, and the model remembers it.

A decision is plain data, so it can be shown before it is applied, stored beside the weights, replayed on a
fresh model, and sent from rank 0 to every other process.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, get_type_hints, runtime_checkable

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.optim import Optimizer

from lamina import registry
from lamina.batches import Batch
from lamina.errors import LaminaError, RecipeError, nearest
from lamina.lineage import Lineage
from lamina.optim.carry import carry

D = TypeVar("D")


@runtime_checkable
class Pass(Protocol[D]):
    """What a rewrite pass is; the options are its constructor's arguments.

    Optional: `upgrade(decision, version)` (classmethod) turns a stored decision of an older version into today's;
    `conflicts(earlier)` returns a sentence why this pass cannot follow the given one, or None; `fits(model)` raises
    where no data could make this pass work on the model, so that training learns of it before it begins;
    `set_progress(fraction)` is told how far training is before the pass decides; `batches` is how many batches of
    training data it wants to look at.
    """

    version: ClassVar[int]
    """Of the decision's format."""
    preserves: ClassVar[Literal["function", "shape", "nothing"]]
    """A claim that contract tests check: equal outputs, equal output shapes, or neither."""

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> D:
        """Look at the model (and data), change nothing, return a frozen JSON-able dataclass."""
        ...

    def apply(self, model: nn.Module, decision: D, lineage: Lineage) -> nn.Module:
        """Carry the decision out, looking at nothing else; works on the meta device; returns the model."""
        ...


@dataclass(frozen=True)
class Record:
    """One rewrite in a model's history: enough to do it again on the same original."""

    name: str
    """Registered name of the pass, or `module:Class`."""
    version: int
    decision: dict[str, Any]
    parameters_before: int
    parameters_after: int


def rewrite(
    model: nn.Module,
    *passes: Pass[Any],
    data: Iterable[Batch] | None = None,
    optimizer: Optimizer | None = None,
    allow_no_change: bool = False,
) -> nn.Module:
    """Apply passes one after the other, in place; return the model (a pass may return a new root).

    Under torch.distributed rank 0 decides and every rank applies its decision. Pass the bare module, not a
    wrapped one.

    Args:
        data: calibration batches, for passes that look at activations; iterated once per pass.
        optimizer: its parameter groups and state follow the rewrite.
        allow_no_change: a pass that changed nothing raises unless this is set.
    Raises:
        LaminaError: a pass changed nothing, or the model is wrapped for data parallelism.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        # Its reducer goes on waiting for the parameters it was made for.
        raise LaminaError("rewrite takes the bare module, not the DistributedDataParallel round it: rewrite, then wrap")
    for one in passes:
        model = apply_decision(
            model, one, _agree(one, model, data), optimizer=optimizer, allow_no_change=allow_no_change
        )
    return model


def apply_decision(
    model: nn.Module,
    one: Pass[D],
    decision: D,
    *,
    optimizer: Optimizer | None = None,
    allow_no_change: bool = False,
) -> nn.Module:
    """Carry out one decision already made, record it in the model's history, and let the optimizer follow."""
    earlier = history(model)
    origin = _origin(model)
    before = _signature(model)
    count = _count(model)
    old_names = {id(p): n for n, p in model.named_parameters()}
    lineage = Lineage()
    result = one.apply(model, decision, lineage)
    if _signature(result) == before and not allow_no_change:
        raise LaminaError(
            f"{type(one).__name__} changed nothing in {type(model).__name__} (decision: {decision}); "
            "pass allow_no_change=True if that is meant"
        )
    record = Record(pass_name(one), one.version, to_json(decision), count, _count(result))
    result.lamina_history = (*earlier, record)  # type: ignore[assignment]
    for name, value in origin.items():
        setattr(result, name, value)
    if optimizer is not None:
        carry(optimizer, result, lineage, old_names=old_names)
    return result


def replay(model: nn.Module, records: Iterable[Record]) -> nn.Module:
    """Do recorded rewrites again on the model they started from (weights may be on `meta`)."""
    for record in records:
        one = pass_class(record.name)
        decision = from_json(one, record.decision, record.version)
        # Options shape decisions, never their application, so a bare instance carries any decision out.
        instance = one.__new__(one)
        model = apply_decision(model, instance, decision, allow_no_change=True)
    return model


def history(model: nn.Module) -> tuple[Record, ...]:
    """Return the rewrites this model went through, oldest first."""
    return getattr(model, "lamina_history", ())


def check_order(passes: Sequence[Pass[Any]]) -> None:
    """Refuse a sequence in which one pass cannot follow another.

    Raises:
        RecipeError: names both passes and why.
    """
    for later in range(len(passes)):
        conflicts = getattr(passes[later], "conflicts", None)
        if conflicts is None:
            continue
        for earlier in range(later):
            reason = conflicts(passes[earlier])
            if reason:
                first, second = pass_name(passes[earlier]), pass_name(passes[later])
                raise RecipeError(
                    f"rewrite[{earlier}] ({first}) and rewrite[{later}] ({second}) exclude each other: {reason}"
                )


def pass_name(one: Pass[Any]) -> str:
    """Return the registered name of a pass, or `module:Class`."""
    cls = type(one)
    for part in registry.parts_of("pass"):
        if part.target is cls:
            return part.name
    return f"{cls.__module__}:{cls.__qualname__}"


def pass_class(name: str) -> type[Pass[Any]]:
    """Return the pass class behind a recorded name."""
    target = registry.find("pass", name)
    if not inspect.isclass(target) or not all(hasattr(target, n) for n in ("version", "decide", "apply")):
        raise LaminaError(f"{name!r} is no pass (a class with version, decide and apply): {target!r}")
    return cast(type[Pass[Any]], target)


def to_json(decision: Any) -> dict[str, Any]:
    """Turn a decision (a dataclass) into plain JSON values."""
    if not dataclasses.is_dataclass(decision):
        raise TypeError(f"a decision must be a dataclass, got {type(decision).__name__}")
    plain: dict[str, Any] = TypeAdapter(type(decision)).dump_python(decision, mode="json")
    return plain


def from_json(one: type[Pass[Any]], decision: dict[str, Any], version: int) -> Any:
    """Rebuild a decision from JSON, upgrading an older version.

    Raises:
        LaminaError: written by a newer version, or not what the pass's decision looks like.
    """
    if version > one.version:
        raise LaminaError(f"{one.__name__} reads decisions up to version {one.version}, this one is version {version}")
    if version < one.version:
        upgrade = getattr(one, "upgrade", None)
        if upgrade is None:
            raise LaminaError(f"{one.__name__} cannot upgrade a decision of version {version}")
        decision = upgrade(decision, version)
    kind = get_type_hints(one.decide)["return"]
    known = [f.name for f in dataclasses.fields(kind)]
    for name in decision:
        if name not in known:
            raise LaminaError(f"not a decision of {one.__name__}: it has no {name!r}{nearest(name, known)}")
    try:
        return TypeAdapter(kind).validate_python(decision)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise LaminaError(f"not a decision of {one.__name__}: {place}: {first['msg']}") from error


def _agree(one: Pass[Any], model: nn.Module, data: Iterable[Batch] | None) -> Any:
    """Decide, on rank 0 alone where there are several processes, so that all apply the very same decision."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return one.decide(model, data)
    message: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            message[0] = {"decision": to_json(one.decide(model, data))}
        except Exception as error:
            # The others wait for a decision: tell them before failing here.
            message[0] = {"error": f"{type(error).__name__}: {error}"}
            dist.broadcast_object_list(message, src=0)
            raise
    dist.broadcast_object_list(message, src=0)
    if "error" in message[0]:
        raise LaminaError(f"rank 0 could not decide {type(one).__name__}: {message[0]['error']}")
    return from_json(type(one), message[0]["decision"], one.version)


def _origin(model: nn.Module) -> dict[str, Any]:
    """How the model was built, kept through rewrites: a pass may edit a Hugging Face config or return a new root."""
    origin = {n: getattr(model, n) for n in ("lamina_node", "lamina_config") if hasattr(model, n)}
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not origin and to_dict is not None:
        origin["lamina_config"] = to_dict()
    return origin


def _signature(model: nn.Module) -> tuple[Any, ...]:
    modules = tuple((n, id(m)) for n, m in model.named_modules())
    tensors = tuple((n, id(p), tuple(p.shape)) for n, p in (*model.named_parameters(), *model.named_buffers()))
    # A block that shares its weights runs as often as the config says (ALBERT).
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return modules, tensors, tuple(id(vars(m).get("forward")) for m in model.modules()), depth


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
