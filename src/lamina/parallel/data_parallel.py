"""Data parallelism: replicate a model (DDP) or shard it (FSDP2), and get the bare module back for a rewrite.

A pass sees the bare module. DDP is a wrapper and comes off; FSDP2 changes the module itself, so `gather` builds the
bare one anew from a copy on the meta device, made before sharding, and the whole tensors.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lamina.anatomy import dissect
from lamina.batches import bare
from lamina.errors import AnatomyError, PlanError
from lamina.gradients.reducer import Handle, Reducer, attach

SKELETON = "lamina_skeleton"
"""Under which a sharded model keeps its bare copy on the meta device."""


@dataclass(frozen=True)
class Placement:
    """How the processes of a run share the model: `data` replicas, each sharded over `shard` processes."""

    data: int = 1
    """Replicas, >= 1."""
    shard: int = 1
    """Processes over which FSDP2 shards each replica; 1 = every process holds the whole model (DDP)."""

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        for name, value in (("data", self.data), ("shard", self.shard)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"a placement's {name} must be a whole number of at least 1, got {value!r}")

    @property
    def processes(self) -> int:
        """How many processes it takes."""
        return self.data * self.shard

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the devices as replicas x shards (or shards alone).

        Raises:
            PlanError: the run has another number of processes.
        """
        self.check(_world())
        if self.data == 1:
            return init_device_mesh(device.type, (self.shard,), mesh_dim_names=("shard",))
        return init_device_mesh(device.type, (self.data, self.shard), mesh_dim_names=("data", "shard"))

    def check(self, world: int) -> None:
        """Refuse a run of another number of processes.

        Raises:
            PlanError: says what to start instead.
        """
        if self.processes != world:
            raise PlanError(
                f"data: {self.data} x shard: {self.shard} needs {self.processes} processes, this run has {world}: "
                f"start it with torchrun --nproc-per-node {self.processes}"
            )


@dataclass
class Placed:
    """A model as a training step calls it."""

    module: nn.Module
    """Call this one; wrapped (DDP, torch.compile) or sharded."""
    bare: nn.Module
    """Without wrappers; its parameters are DTensors where the model is sharded."""
    handle: Handle | None = None
    """The reducer, where one is attached."""
    replicated: DistributedDataParallel | None = None

    @property
    def sharded(self) -> bool:
        """Whether the forward pass talks to other processes."""
        return isinstance(self.bare, FSDPModule)

    def syncing(self, now: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch: gradients are combined after the last one alone (`now`)."""
        if isinstance(self.bare, FSDPModule):
            self.bare.set_requires_gradient_sync(now)
        elif self.replicated is not None and not now:
            return cast(AbstractContextManager[None], self.replicated.no_sync())
        return nullcontext()

    def reshard(self) -> None:
        """Give up whole parameters that a forward pass without a backward pass left behind."""
        reshard(self.bare)

    def reduce(self) -> None:
        """Combine the gradients, where a reducer does it after backward."""
        if self.handle is not None:
            self.handle.reduce()


def place(
    model: nn.Module,
    placement: Placement,
    *,
    device: torch.device,
    reducer: Reducer | None = None,
    compile: bool = False,
    optimizer: Optimizer | None = None,
) -> Placed:
    """Move a bare model to its devices and wrap it; an optimizer that already has state follows.

    Raises:
        PlanError: a reducer and shards (a reducer needs whole gradients), a reducer that decodes a gradient only steps
            later, or another number of processes.
    """
    model.to(device)
    handle: Handle | None = None
    replicated: DistributedDataParallel | None = None
    module = model
    placement.check(_world())
    if reducer is not None:
        _check_tasks(reducer)
    if placement.shard > 1:
        if reducer is not None:
            raise PlanError(f"{type(reducer).__name__} needs whole gradients: use shard 1 (DDP), not {placement.shard}")
        module = shard(model, placement.mesh(device), optimizer=optimizer)
    elif placement.data > 1 and (reducer is None or reducer.granularity == "bucket"):
        module = replicated = replicate(model, device)
        handle = attach(replicated, reducer) if reducer is not None else None
    elif reducer is not None:
        same_everywhere(model)
        handle = attach(model, reducer)
    if compile:
        module = cast(nn.Module, torch.compile(module))
    return Placed(module, model, handle, replicated)


def take_back(placed: Placed, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Return the bare module with whole parameters; `placed` must not be used again.

    The optimizer's state is gathered along, so that a rewrite can carry it.
    """
    if placed.sharded:
        return gather(placed.bare, optimizer=optimizer)
    if placed.replicated is not None:
        # DDP sits in reference cycles; its hooks on the parameters go when it does.
        placed.module, placed.replicated, placed.handle = placed.bare, None, None
        gc.collect()
    return placed.bare


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap a model in DistributedDataParallel; rank 0's weights win.

    Raises:
        PlanError: nothing to train.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise PlanError(f"{type(model).__name__} has no parameter that is trained: there is nothing to replicate")
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def shard(model: nn.Module, mesh: DeviceMesh, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Shard a model in place with FSDP2, block by block where blocks are found; return it. Rank 0's weights win.

    Args:
        optimizer: of the whole parameters; afterwards it holds the sharded ones, with their state.
    Raises:
        PlanError: the model is sharded already.
    """
    if isinstance(model, FSDPModule):
        raise PlanError(f"{type(model).__name__} is sharded already: gather it first")
    same_everywhere(model)
    skeleton = clone_with(model, lambda t: t.to("meta"))
    old = dict(model.named_parameters())
    for path in _blocks(model):
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.__dict__[SKELETON] = skeleton
    if optimizer is not None:
        new = dict(model.named_parameters())
        _follow(optimizer, [(old[name], new[name]) for name in old], _split)
    return model


def gather(model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Return the bare module of a sharded model: whole tensors, equal names, on every process.

    Args:
        optimizer: of the sharded parameters; afterwards it holds the whole ones, with their state.
    Raises:
        PlanError: the model was not sharded by `shard`, or over more than data and shards (tensor parallel).
    """
    skeleton = model.__dict__.get(SKELETON)
    if skeleton is None:
        raise PlanError(
            f"{type(model).__name__} cannot be gathered for a rewrite: only a model that was sharded by "
            "lamina.parallel.data_parallel.shard knows its bare form"
        )
    reshard(model)
    old = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {n: _whole(p.detach(), n) for n, p in old.items()}
    tensors.update(model.named_buffers())
    named = {id(t): n for n, t in (*skeleton.named_parameters(), *skeleton.named_buffers())}
    result = clone_with(skeleton, lambda t: tensors[named[id(t)]])
    _keep_flags(model, result)
    if optimizer is not None:
        new = dict(result.named_parameters())
        _follow(optimizer, [(old[name], new[name]) for name in old], lambda state, _: _whole(state, "the optimizer"))
    return result


def reshard(model: nn.Module) -> None:
    """Make the parameters of a sharded model its shards again: the root keeps them whole after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clone_with(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a module, ties and all, with each parameter and buffer replaced by `change` of it."""
    memo: dict[int, Any] = {id(p): Parameter(change(p), p.requires_grad) for p in model.parameters()}
    memo.update({id(b): change(b) for b in model.buffers()})
    return copy.deepcopy(model, memo)


def same_everywhere(model: nn.Module) -> None:
    """Overwrite parameters and buffers by those of rank 0."""
    if _world() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def same_buffers(placed: Placed) -> None:
    """Overwrite the buffers (running statistics) by those of rank 0, as DDP does before each step."""
    if _world() > 1:
        for buffer in placed.bare.buffers():
            dist.broadcast(buffer, src=0)


def _check_tasks(reducer: Reducer) -> None:
    rank = dist.get_rank() if _world() > 1 else 0
    delay = getattr(reducer, "delay", None)
    if delay:
        raise PlanError(
            f"{type(reducer).__name__} decodes a gradient {delay} steps later: train {delay + 1} models in turns with "
            "lamina.gradients.coding.interleave, or take gradient_coding, which has no delay"
        )
    if delay is None and tuple(reducer.tasks(0, rank, _world())) != (rank,):
        raise PlanError(f"{type(reducer).__name__} gives a process other shards than its own, and has no `delay`")


def _whole(tensor: Tensor, name: str) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device_mesh.ndim > 2:
        raise PlanError(f"{name} is spread over a mesh of {tensor.device_mesh.ndim} dimensions: it cannot be rewritten")
    return tensor.full_tensor()


def _split(state: Tensor, new: Parameter) -> Tensor:
    """Shard a state tensor like its parameter; every process has the whole of it."""
    if not isinstance(new, DTensor) or state.shape != new.shape:
        return state
    return distribute_tensor(state, new.device_mesh, new.placements, src_data_rank=None)


def _follow(
    optimizer: Optimizer,
    pairs: list[tuple[Parameter, Parameter]],
    convert: Callable[[Tensor, Parameter], Tensor],
) -> None:
    replaced: Mapping[int, Parameter] = {id(old): new for old, new in pairs}
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(id(p), p) for p in group["params"]]
    for old, new in pairs:
        state = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[new] = {k: convert(v, new) if isinstance(v, Tensor) else v for k, v in state.items()}


def _keep_flags(old: nn.Module, new: nn.Module) -> None:
    """Carry over what training changed beside tensors: train or eval mode, frozen parameters."""
    for before, after in zip(old.modules(), new.modules(), strict=True):
        after.training = before.training
    for before_p, after_p in zip(old.parameters(), new.parameters(), strict=True):
        after_p.requires_grad_(before_p.requires_grad)


def _blocks(model: nn.Module) -> list[str]:
    """Paths of the blocks that can be sharded one by one: none that shares a parameter with the rest of the model."""
    try:
        trunks = dissect(bare(model)).trunks
    except AnatomyError:
        return []
    paths = list(dict.fromkeys(block.path for trunk in trunks for block in trunk.blocks))
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((p for p in paths if name.startswith(f"{p}.")), "")
        owners.setdefault(id(parameter), set()).add(owner)
    sharing = {owner for found in owners.values() if len(found) > 1 for owner in found}
    return [p for p in paths if p not in sharing]


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
