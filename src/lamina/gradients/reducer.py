"""What a reducer is: how the gradients of data-parallel workers become one; averaging, and how to attach one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lamina.errors import LaminaError, PlanError, ShapeError
from lamina.gradients.lost_worker import lost_worker_told, named
from lamina.registry import register

Group = dist.ProcessGroup | None


@runtime_checkable
class Reducer(Protocol):
    """Combines per-worker gradients; every rank gets the same result.

    Two methods more are called where a reducer has them: `follow(parameters)` by `attach`, with the model's trained
    parameters by name, anew after every rewrite; and `reduce_flat(buffer, names, group)` in a bucket's hook, which
    combines the whole bucket in place and returns a future (backward then goes on meanwhile), or None for `reduce`.
    """

    granularity: ClassVar[Literal["bucket", "model"]]
    """`bucket`: may be called per bucket inside DDP's communication hook; `model`: once, after backward.

    After backward, workers without any gradient are told of before a `bucket` reducer is called; a `model` reducer is
    called with none, and tells the others itself.
    """

    def tasks(self, step: int, rank: int, world: int) -> Sequence[int]:
        """Name the data shards this rank computes in this step (gradient coding); by default its own."""
        ...

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Combine the named gradients over the group; the arguments are not changed."""
        ...

    def bytes_sent(self) -> int:
        """Return the bytes this rank handed to collectives so far (counted at the calls, not estimated)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state across steps, keyed by parameter name."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state back."""
        ...


class Stateless:
    """The half of a reducer that one without state shares: its own shard, a byte counter, nothing to save."""

    def __init__(self) -> None:
        self.sent = 0

    def tasks(self, step: int, rank: int, world: int) -> Sequence[int]:
        """Return this rank's own shard."""
        return (rank,)

    def bytes_sent(self) -> int:
        """Return the bytes this rank handed to collectives so far."""
        return self.sent

    def state_dict(self) -> dict[str, Any]:
        """Return the byte counter, the only thing that lasts."""
        return {"sent": self.sent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the byte counter back."""
        self.sent = int(state["sent"])


@register("reducer")
class Mean(Stateless):
    """The mean of the workers' gradients by all-reduce: what DistributedDataParallel does by itself."""

    granularity: ClassVar[Literal["bucket", "model"]] = "bucket"

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Return the mean of every gradient over the group."""
        world = size(group)
        result = {}
        for name, flat in flatten(gradients).items():
            if world > 1:
                # Before the sum, so that fp16 does not overflow.
                dist.all_reduce(flat.mul_(1 / world), group=group)
                self.sent += flat.nbytes
            result[name] = flat
        return unflatten(result, gradients)

    def reduce_flat(self, flat: Tensor, names: Sequence[str], group: Group) -> torch.futures.Future[Tensor] | None:
        """Average a whole bucket in place while backward goes on."""
        if size(group) == 1:
            return None
        self.sent += flat.nbytes
        return mean_later(flat, group)


class Handle:
    """A reducer attached to a model: call `reduce()` after backward, `remove()` to detach.

    Under DistributedDataParallel a `bucket` reducer works inside backward, and `reduce()` does nothing.
    """

    def __init__(self, model: nn.Module, reducer: Reducer, group: Group, in_backward: bool) -> None:
        self.reducer = reducer
        self.model: nn.Module | None = model
        self.group = group
        self.in_backward = in_backward
        self.turn = 0

    def reduce(self) -> None:
        """Replace every `.grad` by the workers' combined one; a parameter without one counts as zero.

        Raises:
            LaminaError: a worker (this one or another) has no gradient at all, so it has nothing to send, or is gone.
        """
        if self.model is None or self.in_backward:
            return
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        silent = bool(trained) and all(p.grad is None for p in trained.values())
        if trained and self.reducer.granularity == "bucket" and size(self.group) > 1:
            self._roll_call(silent, next(iter(trained.values())).device)
        elif silent:
            self.reducer.reduce({}, self.group)
        if silent:
            raise LaminaError("no parameter has a gradient to combine: call backward() before reduce()")
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        reduced = self.reducer.reduce(gradients, self.group)
        for name, parameter in trained.items():
            if parameter.grad is None:
                parameter.grad = reduced[name]
            else:
                parameter.grad.copy_(reduced[name])

    def _roll_call(self, silent: bool, device: torch.device) -> None:
        """Tell the others whether this worker has a gradient (8 bytes, in no reducer's count), before any waits."""
        self.turn += 1
        everyone = torch.zeros(size(self.group), dtype=torch.int64, device=device)
        with lost_worker_told(self.group, f"roll call/{self.turn}"):
            mine = torch.tensor([int(silent)], device=device)
            dist.all_gather(list(everyone.split(1)), mine, group=self.group)
        absent = everyone.nonzero().view(-1).tolist()
        if absent:
            raise LaminaError(
                f"{named(absent)} had no parameter with a gradient to combine (call backward() before reduce()); "
                f"nothing was combined; this is worker {dist.get_rank(self.group)}"
            )

    def remove(self) -> None:
        """Detach from a plain model.

        Raises:
            PlanError: a DDP model keeps its communication hook for life (torch has no way to take it off).
        """
        if isinstance(self.model, DistributedDataParallel):
            raise PlanError("a reducer cannot be taken off a DistributedDataParallel model: wrap the bare model again")
        self.model = None


def attach(model: nn.Module, reducer: Reducer, group: Group = None) -> Handle:
    """Let a reducer combine the gradients of `model`, in any training loop.

        handle = attach(model, Median())
        loss.backward()
        handle.reduce()          # before clipping and optimizer.step()

    Args:
        model: plain, or wrapped in DistributedDataParallel (a `bucket` reducer then works in its hook).
        group: the data-parallel process group; None = the default one, or a single process.
    Raises:
        PlanError: the parameters are sharded (FSDP2, tensor parallel): a reducer needs whole gradients.
    """
    sharded = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise PlanError(
            f"{type(reducer).__name__} needs replicated parameters, but {sharded!r} is sharded: use DDP, not FSDP2"
        )
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    if hasattr(reducer, "follow"):
        reducer.follow({n: p for n, p in bare.named_parameters() if p.requires_grad})
    if not isinstance(model, DistributedDataParallel):
        return Handle(model, reducer, group, in_backward=False)
    in_backward = reducer.granularity == "bucket"
    group = group or model.process_group
    # For a model-level reducer the hook sends nothing: the gradients stay local until Handle.reduce().
    model.register_comm_hook(_Hook(model, reducer if in_backward else None, group), _reduce_bucket)
    return Handle(model, reducer, group, in_backward)


class _Hook:
    def __init__(self, model: DistributedDataParallel, reducer: Reducer | None, group: Group) -> None:
        self.names = {id(p): n for n, p in model.module.named_parameters()}
        self.reducer = reducer
        self.reduce_flat = getattr(reducer, "reduce_flat", None)
        self.group = group


# DDP compares the annotations of a hook with its own classes, which postponed annotations (strings) fail.
def _reduce_bucket(hook, bucket):  # type: ignore[no-untyped-def]
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    if hook.reducer is not None:
        names = [hook.names[id(p)] for p in bucket.parameters()]
        if hook.reduce_flat is not None:
            later = hook.reduce_flat(bucket.buffer(), names, hook.group)
            if later is not None:
                return later
        views = dict(zip(names, bucket.gradients(), strict=True))
        for name, reduced in hook.reducer.reduce(views, hook.group).items():
            views[name].copy_(reduced)
    future.set_result(bucket.buffer())
    return future


def size(group: Group) -> int:
    """Return how many workers the group has; 1 where torch.distributed is not running."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def mean_later(flat: Tensor, group: Group) -> torch.futures.Future[Tensor]:
    """Replace a vector by the workers' mean, in place, while the caller goes on: the bits of plain DDP's."""
    # Straight from the group: what torch.distributed does around it takes as long as some 100,000 numbers.
    everyone: Any = group or dist.group.WORLD
    work = everyone.allreduce([flat.mul_(1 / size(group))])
    first: Callable[[Any], Tensor] = lambda done: done.value()[0]  # noqa: E731
    return work.get_future().then(first)


def flatten(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate gradients into one vector a dtype, in the mapping's order: one collective instead of many."""
    dtypes = dict.fromkeys(g.dtype for g in gradients.values())
    return {
        str(dtype): torch.cat([g.detach().reshape(-1) for g in gradients.values() if g.dtype == dtype])
        for dtype in dtypes
    }


def unflatten(flat: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `flatten`: views into the vectors, shaped like the gradients they came from."""
    at = dict.fromkeys(flat, 0)
    result = {}
    for name, gradient in like.items():
        key, count = str(gradient.dtype), gradient.numel()
        result[name] = flat[key][at[key] : at[key] + count].view(gradient.shape)
        at[key] += count
    return result


def gather(flat: Tensor, group: Group) -> Tensor:
    """Return every worker's vector: (n,) -> (world, n).

    Raises:
        ShapeError: the workers' vectors differ in length.
    """
    world = size(group)
    if world == 1:
        return flat[None]
    counts = torch.empty((world, 1), dtype=torch.long, device=flat.device)
    dist.all_gather(list(counts.unbind()), torch.tensor([flat.numel()], device=flat.device), group=group)
    if len(set(counts.flatten().tolist())) > 1:
        raise ShapeError(f"the workers' gradients differ in length: {counts.flatten().tolist()}")
    everyone = flat.new_empty((world, flat.numel()))
    dist.all_gather(list(everyone.unbind()), flat.contiguous(), group=group)
    return everyone
