"""The gradient of one step, whatever it is split into, and the loss of an evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lamina.batches import Batch, to_device
from lamina.errors import LaminaError
from lamina.parallel.data_parallel import Placed
from lamina.train.distributed import World
from lamina.train.latency import ForwardTimes
from lamina.train.losses import logged
from lamina.train.options import Precision
from lamina.train.precision import autocast

Losses = Mapping[str, Tensor]


def gradients(
    placed: Placed,
    objective: Any,
    batch: Batch,
    *,
    world: World,
    parts: int = 1,
    precision: Precision = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor, Losses]:
    """Add the gradient of one step to `.grad`: the mean over everything that counts, in all parts and processes.

    DDP and FSDP2 average over processes, backward sums over micro-batches. So each loss (a mean over `count`) is
    multiplied by count * processes / (count of all): padding then weighs nothing, however the batch is split.

    Args:
        batch: this process's rows.
        parts: micro-batches.
    Returns:
        (sum of loss * count, sum of count) of this process in float64, and the last micro-batch's losses.
    """
    exact = _exact(world)
    terms: list[Tensor] = []
    counts: list[Tensor] = []
    share: Tensor | None = None
    losses: Losses = {}
    for i, part in enumerate(split(batch, parts)):
        with placed.syncing(i == parts - 1):
            with autocast(precision, world.device):
                losses = objective(placed.module, part)
            loss, count = losses["loss"], losses["count"].detach()
            terms.append(loss.detach().to(exact) * count)
            counts.append(count.to(exact))
            if parts > 1 or world.size > 1:
                # The first count stands for all until the others are known: the scale of fp16 losses stays sane.
                share = _share(count, world) if share is None else share
                loss = loss * (count / share)
            (loss if scaler is None else scaler.scale(loss)).backward()
    weighted, counted = (terms[0], counts[0]) if parts == 1 else (torch.stack(terms).sum(), torch.stack(counts).sum())
    if share is not None and parts > 1:
        whole = world.total(counted.clone())
        _multiply_gradients(placed, objective, share * world.size / torch.where(whole > 0, whole, 1.0))
    placed.reduce()
    _average_own_gradients(objective, world)
    return weighted, counted, losses


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Cut a batch into `parts` along its rows; entries that are not one a row go along whole.

    Raises:
        LaminaError: fewer rows than parts.
    """
    if parts == 1:
        yield batch
        return
    rows = rows_of(batch)
    if rows < parts:
        raise LaminaError(f"accumulate is {parts}, but a process has only {rows} rows of a batch: take a larger batch")
    cut = {
        k: v.tensor_split(parts) for k, v in batch.items() if isinstance(v, Tensor) and v.ndim and v.shape[0] == rows
    }
    for i in range(parts):
        yield {k: cut[k][i] if k in cut else v for k, v in batch.items()}


def rows_of(batch: Batch) -> int:
    """Return the number of rows: the length of the first tensor."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)


def size_of(batch: Batch) -> tuple[int, str]:
    """Return what a throughput counts, and its unit: tokens where there are token ids, else rows."""
    ids = batch.get("input_ids")
    return (ids.numel(), "tokens") if isinstance(ids, Tensor) else (rows_of(batch), "rows")


@torch.no_grad()
def evaluate(
    placed: Placed,
    objective: Any,
    batches: Iterable[Batch],
    *,
    world: World,
    precision: Precision = "fp32",
    times: ForwardTimes | None = None,
) -> dict[str, float]:
    """Return means over all batches and processes, weighted by count; the model's mode is kept.

    `loss` is the objective's `measure` where it has one; beside it stands what else the objective logs (accuracy).
    Processes may have unequally many batches. `times` gets what the model takes of each of this process's.
    """
    # Neither DDP nor torch.compile has a part in it, so the processes need not walk in step, unless they are sharded.
    model = placed.bare
    was_training = model.training
    model.eval()
    exact = _exact(world)
    zero = torch.zeros((), dtype=exact, device=world.device)
    counted, sums = zero.clone(), defaultdict[str, Tensor](zero.clone)
    for batch, real in _in_step(batches, world) if placed.sharded else ((b, True) for b in batches):
        watched = times.batch(model) if times is not None and real else nullcontext()
        with autocast(precision, world.device), watched:
            losses = objective(model, to_device(batch, world.device))
        if real:
            count = losses["count"].to(exact)
            counted += count
            for name, value in {**logged(losses), "loss": losses.get("measure", losses["loss"])}.items():
                sums[name] += value.to(exact) * count
    model.train(was_training)
    placed.reshard()
    # A process without a batch knows no names.
    names = sorted({name for known in world.everyone(list(sums)) for name in known})
    total, *weighted = world.total(torch.stack([counted, *(sums[name] for name in names)])).tolist()
    if not total:
        raise LaminaError("the evaluation counted nothing: every target is padding, or there is no batch")
    return {name: value / total for name, value in zip(names, weighted, strict=True)}


def _in_step(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """Go on until the last process is done: the others repeat a batch that does not count."""
    last: Batch | None = None
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        left = world.total(torch.tensor([batch is not None], dtype=torch.int64, device=world.device))
        if not int(left):
            return
        last = batch if batch is not None else last
        if last is None:
            raise LaminaError(
                f"process {world.rank} has no row to evaluate: the set is smaller than the number of processes"
            )
        yield last, batch is not None


def _exact(world: World) -> torch.dtype:
    """In float64 (loss * count) / count is the loss itself, to the bit."""
    return torch.float32 if world.device.type == "mps" else torch.float64


def _share(count: Tensor, world: World) -> Tensor:
    """Mean count of a process; 1 where nothing counts."""
    whole = world.total(count.clone())
    return torch.where(whole > 0, whole / world.size, torch.ones_like(whole))


def _multiply_gradients(placed: Placed, objective: Any, factor: Tensor) -> None:
    for parameter in (*placed.bare.parameters(), *own_parameters(objective)):
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))


def _average_own_gradients(objective: Any, world: World) -> None:
    """An objective's own parameters are outside DDP and FSDP2."""
    if world.size == 1:
        return
    for parameter in own_parameters(objective):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad.div_(world.size))


def clip_gradients(parameters: Sequence[Parameter], limit: float) -> None:
    """Scale the gradients down to a joint norm of at most `limit`; shards and whole tensors may stand side by side."""
    with_gradient = [p for p in parameters if p.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p.grad, DTensor)]
    if len(sharded) in (0, len(with_gradient)):
        nn.utils.clip_grad_norm_(with_gradient, limit)
        return
    # An objective's own parameters beside a sharded model: torch refuses to take one norm of both.
    whole = [p for p in with_gradient if not isinstance(p.grad, DTensor)]
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in (sharded, whole)]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in with_gradient:
        gradient = parameter.grad
        (gradient.to_local() if isinstance(gradient, DTensor) else cast(Tensor, gradient)).mul_(factor)


def complete_optimizer(optimizer: Optimizer, objective: Any) -> Optimizer:
    """Add the objective's own parameters, a group for each rate, and remember each group's rate as `initial_lr`."""
    held, factors = {id(p) for group in optimizer.param_groups for p in group["params"]}, _rate_factors(objective)
    own: dict[float, list[Parameter]] = defaultdict(list)
    for parameter in own_parameters(objective):
        if id(parameter) not in held:
            own[factors.get(id(parameter), 1.0)].append(parameter)
    for factor, parameters in own.items():
        rate = {} if factor == 1 else {"lr": optimizer.defaults["lr"] * factor}
        optimizer.add_param_group({"params": parameters, **rate})
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def _rate_factors(objective: Any) -> dict[int, float]:
    """Return what an objective, and any inside it, says of the learning rates of its own parameters, by id."""
    within: Iterable[Any] = objective.modules() if isinstance(objective, nn.Module) else (objective,)
    told = (one.rate_factors() for one in within if hasattr(one, "rate_factors"))
    return {id(p): factor for pairs in told for p, factor in pairs}


def set_rates(optimizer: Optimizer, multiplier: float) -> None:
    """Set the learning rate of each group to a multiple of its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def own_parameters(objective: Any) -> list[Parameter]:
    """List the parameters that an objective trains along."""
    return [p for p in objective.parameters() if p.requires_grad]
