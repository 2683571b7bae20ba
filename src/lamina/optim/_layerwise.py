"""What the layer-wise optimizers share: norms over whole tensors, across shards, and the trust ratio.

A "layer" is one parameter tensor. Nothing here waits for the device: ratios stay tensors, unless the host has them
anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lamina.errors import LaminaError, nearest

Bounds = tuple[float, float]
_Views = dict[tuple[torch.Size, ...], list[Tensor]]
T = TypeVar("T")

# Elements worked on at a time on the CPU: small enough that what one pass wrote is still in the cache for the next.
CACHE_ELEMENTS = 2**20


class LayerwiseOptimizer(Optimizer):
    """Closures, checks, recording and state-dict rules of LAMB and LARS; not an optimizer by itself."""

    record: bool
    """Set to True: each step leaves `trust_ratios()`."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._transient()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._transient()

    def _transient(self) -> None:
        self.record = False
        self._recorded: list[tuple[list[Tensor], Tensor]] = []
        self._scratch: dict[tuple[torch.device, torch.dtype], tuple[Tensor, _Views]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see torch. `adapt: bool` in it decides whether its tensors get the ratio.

        Raises:
            LaminaError: an option is out of range, or a parameter is complex.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for parameter in group["params"]:
                if parameter.is_complex():
                    raise LaminaError(f"{self._name} does not take complex parameters: pass torch.view_as_real of them")
            self._check(group)
        except LaminaError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state; see torch.

        Raises:
            LaminaError: it was saved by another optimizer or under another variant.
        """
        for i, (ours, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if saved.get("variant") != ours["variant"]:
                raise LaminaError(
                    f"this {self._name} is variant {ours['variant']!r}, but group {i} of the state was saved under "
                    f"{saved.get('variant')!r}: build the optimizer with the variant of the state"
                )
        super().load_state_dict(state_dict)
        widen_state(self, state_dict)
        for parameter, state in self.state.items():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step on every parameter that has a gradient; return what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._recorded.clear()
        self._update()
        return loss

    def trust_ratios(self) -> dict[str | int, tuple[float, float, float]]:
        """Return (ratio, ||x||, ||u||) of each adapted tensor in the last step, by name or index.

        Waits for the device. Names are known when the optimizer was made from `model.named_parameters()`.

        Raises:
            LaminaError: `record` was not set before the step.
        """
        if not self.record:
            raise LaminaError(f"set record = True on this {self._name} before the step whose trust ratios you want")
        known: dict[int, str | int] = {}
        for group in self.param_groups:
            names: Sequence[str | int] = group.get("param_names") or range(
                len(known), len(known) + len(group["params"])
            )
            known.update({id(p): n for p, n in zip(group["params"], names, strict=True)})
        return {
            known[id(p)]: (row[0], row[1], row[2])
            for layers, values in self._recorded
            for p, row in zip(layers, values.tolist(), strict=True)
            if id(p) in known  # A rewrite since then may have taken it out.
        }

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update(self) -> None:
        raise NotImplementedError

    def _trainable(self, group: dict[str, Any]) -> list[Tensor]:
        found = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in found):
            raise LaminaError(f"{self._name} does not take sparse gradients: use torch.optim.SparseAdam for that layer")
        return found

    def _ratios(
        self, x_squares: list[Tensor], u_squares: list[Tensor], layers: list[Tensor], phi: Bounds | None, clip: bool
    ) -> Tensor:
        """Return the trust ratio of each layer from the local squared norms of its value and its update."""
        squares = over_shards(torch.stack([*x_squares, *u_squares]).view(2, -1), layers)
        x_norms, u_norms = squares.sqrt().unbind()
        ratios = trust_ratio(x_norms, u_norms, phi=phi, clip=clip)
        if self.record:
            self._recorded.append((layers, torch.stack([ratios, x_norms, u_norms], dim=1)))
        return ratios

    def _buffers(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Return one uninitialised buffer per tensor, cut out of memory that every step reuses."""
        key = like[0].device, like[0].dtype
        shapes = tuple(t.shape for t in like)
        whole, views = self._scratch.get(key) or (None, {})
        if shapes not in views:  # Kept: cutting them anew takes as long as the arithmetic on small tensors.
            sizes = [t.numel() for t in like]
            if whole is None or whole.numel() < sum(sizes):
                whole, views = self._scratch[key] = torch.empty(sum(sizes), device=key[0], dtype=key[1]), {}
            parts = torch.split_with_sizes(whole[: sum(sizes)], sizes)
            views[shapes] = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return views[shapes]


def widen_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Take the state of narrow parameters from the saved one again, in float32: torch's loading has rounded it."""
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for key, parameter in zip(saved, held, strict=True):
        if is_narrow(parameter):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    optimizer.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)


def trust_ratio(x_norm: Tensor, u_norm: Tensor, *, phi: Bounds | None = None, clip: bool = False) -> Tensor:
    """Return phi(||x||) / ||u||, and 1 where either norm is 0.

    Args:
        phi: ||x|| is clamped to (low, high); None = as it is.
        clip: at most 1 (LAMBC).
    Source: LAMB, arXiv 1904.00962, algorithm 2.
    """
    scale = x_norm if phi is None else x_norm.clamp(*phi)
    ratio = torch.where(torch.minimum(x_norm, u_norm) > 0, scale / u_norm, 1.0)
    return ratio.clamp(max=1.0) if clip else ratio


def trust_ratio_of_numbers(x_square: float, u_square: float, phi: Bounds | None, clip: bool) -> float:
    """Return what `trust_ratio` does, of squared norms that are numbers."""
    if not (x_square > 0 and u_square > 0):
        return 1.0
    scale = math.sqrt(x_square)
    scale = scale if phi is None else min(max(scale, phi[0]), phi[1])
    ratio = scale / math.sqrt(u_square)
    return min(ratio, 1.0) if clip else ratio


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the squared L2 norm of each (local) tensor, in at least float32."""
    if tensors[0].device.type == "cpu":
        return [_dot(wide(t).reshape(-1)) for t in tensors]
    norms = torch._foreach_norm(list(tensors), 2, torch.float32 if is_narrow(tensors[0]) else None)
    return list(torch.stack(norms).square().unbind())


def _dot(flat: Tensor) -> Tensor:
    # Twice as fast as vector_norm on the CPU. Sums of more than 2^18 float32 squares lose digits in either.
    if flat.numel() <= 2**18:
        return torch.dot(flat, flat)
    return torch.stack([torch.dot(part, part) for part in flat.split(2**18)]).sum()


def over_shards(squares: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Sum local squares (..., layers) over the shards of each layer: one all-reduce per mesh dimension, in place."""
    columns: dict[tuple[Any, int], list[int]] = {}
    for i, layer in enumerate(layers):
        for key in _sharded_over(layer):
            columns.setdefault(key, []).append(i)
    for (mesh, dimension), chosen in columns.items():
        part = squares[..., chosen].contiguous()
        dist.all_reduce(part, group=mesh.get_group(dimension))
        squares[..., chosen] = part
    return squares


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_narrow(tensor: Tensor) -> bool:
    """Say whether the values have fewer bits than float32."""
    return tensor.dtype.itemsize < 4


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is narrower than that, else itself."""
    return tensor.float() if is_narrow(tensor) else tensor


def chunks(layers: Sequence[Tensor], limit: int | None) -> Iterator[list[Tensor]]:
    """Split layers into runs of one device and dtype, and of at most `limit` elements unless a single one is larger."""
    batch: list[Tensor] = []
    count = 0
    for layer in layers:
        size = layer.numel()
        alike = bool(batch) and (layer.device, layer.dtype) == (batch[0].device, batch[0].dtype)
        if batch and (not alike or (limit is not None and count + size > limit)):
            yield batch
            batch, count = [], 0
        batch.append(layer)
        count += size
    if batch:
        yield batch


def chunk_limit(layers: Sequence[Tensor]) -> int | None:
    """Return how many elements to work on at a time; None = all: to launch, or to all-reduce, only once."""
    return CACHE_ELEMENTS if all(p.device.type == "cpu" and not hasattr(p, "device_mesh") for p in layers) else None


def choose(optimizer: str, option: str, value: T, choices: Sequence[T]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise LaminaError(
            f"{optimizer}: {option} must be one of {', '.join(map(repr, choices))}, got {value!r}"
            f"{nearest(str(value), [str(c) for c in choices])}"
        )


def not_negative(optimizer: str, group: dict[str, Any], *options: str) -> None:
    """Refuse options below 0 (or not a number)."""
    for option in options:
        if not (_are_numbers([group[option]], 1) and group[option] >= 0):
            raise LaminaError(f"{optimizer}: {option} must be >= 0, got {group[option]!r}")


def check_betas(optimizer: str, betas: Any) -> None:
    """Refuse decay rates that are not two numbers from 0 to below 1."""
    if not (_are_numbers(betas, 2) and all(0 <= b < 1 for b in betas)):
        raise LaminaError(f"{optimizer}: betas must be two numbers in [0, 1), got {betas}")


def check_adapt(optimizer: str, group: dict[str, Any]) -> None:
    """Refuse a group's `adapt` that is neither a truth value nor None."""
    if group["adapt"] not in (None, True, False):
        raise LaminaError(
            f"{optimizer}: adapt must be True, False or None (as the variant says), got {group['adapt']!r}"
        )


def check_bounds(optimizer: str, phi: Bounds | None) -> None:
    """Refuse clamping bounds that are negative or in the wrong order."""
    if phi is not None and not (_are_numbers(phi, 2) and 0 <= phi[0] <= phi[1]):
        raise LaminaError(f"{optimizer}: phi must be None or (low, high) with 0 <= low <= high, got {phi}")


def _are_numbers(values: Any, count: int) -> bool:
    if not isinstance(values, (tuple, list)) or len(values) != count:
        return False
    return all(isinstance(v, (Real, Tensor)) for v in values)


def _sharded_over(layer: Tensor) -> list[tuple[Any, int]]:
    if not hasattr(layer, "device_mesh"):
        return []
    placements: Sequence[Any] = layer.placements  # type: ignore[attr-defined]
    if any(p.is_partial() for p in placements):
        raise LaminaError(f"a parameter placed as {tuple(placements)} has no norm of its own: redistribute it first")
    return [(layer.device_mesh, i) for i, p in enumerate(placements) if p.is_shard()]
