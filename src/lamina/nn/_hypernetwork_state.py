"""What a hypernetwork keeps besides weights: generated weights to hold on to, and running statistics a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.nn._hypernetwork_target import find, with_running_statistics


class Memory(nn.Module):
    """Conditions and the weights generated for them at the time: T of them, P numbers each.

    Args:
        numbers: P.
        values: how many tensors one condition is made of.
    """

    def __init__(self, numbers: int, values: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.empty(0, numbers))
        self.names = [f"value{i}" for i in range(values)]
        for name in self.names:
            self.register_buffer(name, torch.empty(0))

    def __len__(self) -> int:
        return len(self.get_buffer("weights"))

    def values(self) -> list[Tensor]:
        """Return the remembered conditions, (T, ...) each."""
        return [self.get_buffer(name) for name in self.names]

    @torch.no_grad()
    def add(self, values: Sequence[Tensor], weights: Tensor) -> None:
        """Remember rows; a condition that is known already gets the new weights."""
        for i in range(len(weights)):
            row = [value[i : i + 1] for value in values]
            old = [(v, r) for v, r in zip(self.values(), row, strict=True) if len(self)]
            same = torch.ones(len(self), dtype=torch.bool, device=weights.device)
            for kept, new in old:
                same &= (kept == new).reshape(len(kept), -1).all(1)
            for name, new in zip(self.names, row, strict=True):
                self._set(name, new, ~same)
            self._set("weights", weights[i : i + 1], ~same)

    def prepare_to_load(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for what a saved state holds; `shapes` by name."""
        for name, buffer in list(self._buffers.items()):
            if buffer is not None and name in shapes:
                setattr(self, name, buffer.new_empty(tuple(shapes[name])))

    def _set(self, name: str, row: Tensor, keep: Tensor) -> None:
        old = self.get_buffer(name)
        row = row.detach().clone()
        setattr(self, name, torch.cat((old[keep].to(row.dtype), row)) if len(old) else row)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        found = {n: state[prefix + n] for n in self._buffers if prefix + n in state}
        self.prepare_to_load({n: t.shape for n, t in found.items()})
        for name, tensor in found.items():
            # A condition may be whole numbers: an empty memory does not know yet.
            setattr(self, name, self.get_buffer(name).to(tensor.dtype))
        super()._load_from_state_dict(state, prefix, *rest)


class TaskStatistics(nn.Module):
    """The running statistics of the target's batch norms, once for each of `count` tasks."""

    def __init__(self, target: nn.Module, count: int) -> None:
        super().__init__()
        self.places: list[tuple[str, str]] = []
        for path, module in with_running_statistics(target):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    stacked = buffer.detach().expand(count, *buffer.shape).clone()
                    self.register_buffer(f"buffer{len(self.places)}", stacked)
                    self.places.append((path, name))

    def read(self, task: Tensor) -> dict[str, Tensor]:
        """Return one task's buffers, copied, by their names in the target."""
        row = task.reshape(1)
        return {f"{p}.{n}".lstrip("."): b.index_select(0, row)[0] for (p, n), b in zip(self.places, self.buffers())}  # noqa: B905  # fmt: skip

    @torch.no_grad()
    def write(self, task: Tensor, found: Mapping[str, Tensor]) -> None:
        """Store one task's buffers after a training step."""
        for (path, name), buffer in zip(self.places, self.buffers(), strict=True):
            buffer.index_copy_(0, task.reshape(1), found[f"{path}.{name}".lstrip(".")].unsqueeze(0))

    def put(self, task: Tensor, plain: nn.Module) -> None:
        """Set one task's buffers in a plain copy of the target."""
        found = self.read(task)
        for path, name in self.places:
            module = find(plain, path)
            if module is not None:
                module._buffers[name] = found[f"{path}.{name}".lstrip(".")]


def keep_statistics(target: nn.Module, policy: str, count: int | None) -> TaskStatistics | None:
    """Prepare the target's norms with running statistics, in place, and return a set a task where that is the policy.

    Args:
        policy: "refuse", "batch" (take the statistics away: the batch's own, always) or "per_condition".
        count: of tasks; None = conditions are no tasks.
    Raises:
        LaminaError: such norms and no policy, or a policy that needs tasks.
    """
    kept = list(with_running_statistics(target))
    if not kept:
        return None
    if policy == "refuse":
        raise LaminaError(
            f"{kept[0][0] or type(target).__name__} keeps running statistics, which differ from condition to "
            "condition: pass batch_norm='per_condition' or 'batch', or put a GroupNorm there"
        )
    if policy == "per_condition":
        if count is None:
            raise LaminaError("batch_norm='per_condition' needs a TaskCondition: statistics are kept a task")
        return TaskStatistics(target, count)
    for _, module in kept:
        module.track_running_stats = False  # type: ignore[assignment]
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            module._buffers[name] = None
    return None
