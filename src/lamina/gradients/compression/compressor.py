"""What compressors share: raw small tensors, errors fed back by name, faulty workers named, bytes counted."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lamina.errors import LaminaError, PlanError, ShapeError
from lamina.gradients.compression.memory import Memory
from lamina.gradients.compression.traffic import Traffic
from lamina.gradients.reducer import Group, flatten, size, unflatten

Option = int | float
"""The value of a layer's knob: bits, density or rank."""


class Compressor(ABC):
    """A reducer that sends less than the gradient, with a knob for every layer.

    Layers are the parameters of two or more dimensions, seen as matrices (first dimension x the rest); vectors (biases,
    gains) always go raw, and so does a layer that a knob would make less than `min_compression_rate` times smaller.
    In a single process nothing crosses and nothing is lost: the gradient comes back as it is.

    Before anything is sent, workers exchange 16 bytes a bucket: whether their gradients are finite, and a checksum of
    names, shapes, types and knobs. A faulty worker is named on all of them before any state has changed.

    Args:
        option: of every layer, until `set_options` says otherwise.
        error_feedback: add what was not sent to the next step's gradient.
        start_step: steps before it are plain all-reduce.
        nonfinite: what a NaN or infinity in a worker's gradient does: `raise` names worker and parameter; `pass_on`
            sends this bucket raw, as all-reduce would, so that an fp16 loss scaler sees it and skips the step.
    """

    granularity: ClassVar[Literal["bucket", "model"]] = "bucket"
    knob: ClassVar[str]
    """What an option is called."""

    def __init__(
        self,
        option: Option,
        *,
        error_feedback: bool,
        start_step: int,
        nonfinite: Literal["raise", "pass_on"],
        min_compression_rate: float = 1.0,
    ) -> None:
        if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
            raise LaminaError(f"start_step must be a whole number of at least 0, got {start_step!r}")
        if nonfinite not in ("raise", "pass_on"):
            raise LaminaError(f"nonfinite must be 'raise' or 'pass_on', got {nonfinite!r}")
        self.option = self.check_option(option)
        self.error_feedback, self.start_step, self.nonfinite = error_feedback, start_step, nonfinite
        self.min_compression_rate = min_compression_rate
        self.traffic = Traffic()
        self.memory = Memory("options", "residual")
        self.passed_on = 0
        """Buckets sent raw because a worker's gradient was not finite."""

    @abstractmethod
    def check_option(self, option: Option) -> Option:
        """Return the option; refuse one that no layer can have.

        Raises:
            LaminaError: says the range.
        """

    @abstractmethod
    def options(self, shape: Sequence[int]) -> list[Option]:
        """List the options that L-GreCo tries for a layer of this shape, the present default among them."""

    @abstractmethod
    def compressed_size(self, shape: Sequence[int], option: Option, itemsize: int) -> int:
        """Return the bytes a worker sends for a layer under an option."""

    @abstractmethod
    def compression_errors(self, gradient: Tensor, options: Sequence[Option]) -> Tensor:
        """Return || G - decompress(compress(G)) ||_2 of a float32 gradient for each option, float64."""

    @abstractmethod
    def exchange(self, layers: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Combine layers that are worth compressing, all of one dtype; keep what was not sent."""

    def capped(self, shape: Sequence[int], option: Option) -> Option:
        """Return the option as a layer of this shape takes it."""
        return option

    def size(self, shape: Sequence[int], option: Option, itemsize: int = 4) -> int:
        """Return the bytes a worker sends for a layer: compressed, or raw where that saves too little."""
        compressed = self.compressed_size(shape, option, itemsize)
        return compressed if self.worthwhile(shape, option, itemsize) else math.prod(shape) * itemsize

    def worthwhile(self, shape: Sequence[int], option: Option, itemsize: int = 4) -> bool:
        """Say whether a layer becomes more than `min_compression_rate` times smaller under an option."""
        compressed = self.compressed_size(shape, option, itemsize)
        return compressed * self.min_compression_rate < math.prod(shape) * itemsize

    def errors(self, gradient: Tensor, options: Sequence[Option]) -> Tensor:
        """Return the 2-norm of what compression loses of a gradient, for each option: (options,) in float64."""
        lossy = [self.worthwhile(gradient.shape, option, gradient.element_size()) for option in options]
        found = self.compression_errors(gradient.detach().float(), options)
        return torch.where(torch.tensor(lossy), found.cpu(), 0.0)

    def set_options(self, options: Mapping[str, Option]) -> None:
        """Set the knobs of some layers by parameter name; the others keep theirs.

        Raises:
            LaminaError: an option that no layer can have.
        """
        self.memory["options"].update({name: self.check_option(option) for name, option in options.items()})

    def option_of(self, name: str) -> Option:
        """Return the present knob of a layer."""
        found: Option = self.memory["options"].get(name, self.option)
        return found

    def tasks(self, step: int, rank: int, world: int) -> Sequence[int]:
        """Return this rank's own shard."""
        return (rank,)

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Return the mean of the workers' compressed gradients; the same bits on every worker.

        Raises:
            LaminaError: a worker's gradient is not finite (with `nonfinite: raise`), or a worker is gone.
            ShapeError: workers disagree about names, shapes, types or knobs.
            PlanError: a sparse gradient.
        """
        if size(group) == 1 or not gradients:
            return dict(gradients)
        self.begin(gradients)
        return self.combine(gradients, group)

    def reduce_flat(self, flat: Tensor, names: Sequence[str], group: Group) -> torch.futures.Future[Tensor] | None:
        """Before `start_step`, average a whole bucket in place while backward goes on; afterwards None."""
        if size(group) == 1 or self.memory.steps + self.memory.begins(names) > self.start_step:
            return None
        self.begin(names)
        return self.traffic.mean_later(flat, group)

    def begin(self, names: Mapping[str, Tensor] | Sequence[str]) -> bool:
        """Take note of a bucket; say whether a step begins with it."""
        return self.memory.begin(names)

    def combine(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Do the work of `reduce` for a bucket that was taken note of."""
        if self.memory.steps <= self.start_step or not self._agree(gradients, group):
            return self._mean(gradients, group)
        layers = {n: g for n, g in gradients.items() if self.compresses(n, g)}
        result = self._mean({n: g for n, g in gradients.items() if n not in layers}, group)
        for dtype in dict.fromkeys(g.dtype for g in layers.values()):
            result |= self.exchange({n: g for n, g in layers.items() if g.dtype == dtype}, group)
        return {n: result[n] for n in gradients}

    def compresses(self, name: str, gradient: Tensor) -> bool:
        """Say whether a gradient is worth compressing under its present knob."""
        return is_layer(gradient) and self.worthwhile(gradient.shape, self.option_of(name), gradient.element_size())

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient with what earlier steps did not send, in memory of its own, float32 (or float64)."""
        work = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        kept = self.memory.fitting("residual", name, work) if self.error_feedback else None
        return work.clone() if kept is None else work + kept

    def keep(self, name: str, residual: Tensor) -> None:
        """Keep what was not sent for the next step."""
        if self.error_feedback:
            self.memory["residual"][name] = residual

    def follow(self, parameters: Mapping[str, Parameter]) -> None:
        """Take the model's parameters by their present names (`attach` calls it, after every rewrite)."""
        self.memory.follow(parameters)

    def bytes_sent(self) -> int:
        """Return the bytes this rank handed to collectives so far, checks, scales and indices included."""
        return self.traffic.sent

    def report(self) -> dict[str, Any]:
        """Return what was done: steps, bytes handed over, bytes over a ring's link, buckets passed on."""
        return {"steps": self.memory.steps, **self.traffic.state_dict(), "passed_on": self.passed_on}

    def state_dict(self) -> dict[str, Any]:
        """Return knobs, residuals and counters by parameter name; each worker has its own."""
        return {"traffic": self.traffic.state_dict(), "passed_on": self.passed_on, "memory": self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state back."""
        self.traffic.load_state_dict(state["traffic"])
        self.passed_on = int(state["passed_on"])
        self.memory.load_state_dict(state["memory"])

    def _mean(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        flat = {dtype: self.traffic.mean(vector, group) for dtype, vector in flatten(gradients).items()}
        return unflatten(flat, gradients)

    def _agree(self, gradients: Mapping[str, Tensor], group: Group) -> bool:
        """Exchange a few words on the bucket; say whether every worker's gradient is finite."""
        sparse = next((n for n, g in gradients.items() if g.layout != torch.strided), None)
        if sparse is not None:
            raise PlanError(f"{type(self).__name__} takes dense gradients, but that of {sparse!r} is sparse")
        layout = [(n, tuple(g.shape), str(g.dtype), self.option_of(n)) for n, g in gradients.items()]
        peaks = torch.stack([peak(g) for g in gradients.values()])
        bad = int((~torch.isfinite(peaks)).to(torch.uint8).argmax()) if not torch.isfinite(peaks).all() else -1
        words = torch.tensor([zlib.crc32(repr(layout).encode()), bad], dtype=torch.int64, device=peaks.device)
        everyone = self.traffic.gather(words, group).tolist()
        odd = [rank for rank, (checksum, _) in enumerate(everyone) if checksum != everyone[0][0]]
        if odd:
            raise ShapeError(
                f"workers {odd} sent gradients of other names, shapes, types or knobs than worker 0; this is worker "
                f"{dist.get_rank(group)}: {_words(layout)}"
            )
        faulty = [(rank, list(gradients)[at]) for rank, (_, at) in enumerate(everyone) if at >= 0]
        if faulty and self.nonfinite == "raise":
            told = ", ".join(f"worker {rank} in {name!r}" for rank, name in faulty)
            raise LaminaError(
                f"a gradient has NaN or infinity: {told}; nothing was combined (fp16 with a loss scaler meets these: "
                "set nonfinite='pass_on')"
            )
        self.passed_on += bool(faulty)
        return not faulty


def is_layer(gradient: Tensor) -> bool:
    """Say whether a gradient is of a layer: a matrix, or a kernel that is seen as one."""
    return gradient.ndim >= 2 and gradient.numel() > 0


def peak(gradient: Tensor) -> Tensor:
    """Return the largest magnitude as a float32 scalar: NaN or infinity where there is one anywhere."""
    if not gradient.numel():
        return torch.zeros((), device=gradient.device)
    low, high = gradient.detach().aminmax()
    return torch.maximum(-low, high).float()


def seeded(device: torch.device, *words: object) -> torch.Generator:
    """Return a generator whose numbers depend on the words alone: nothing about it needs to be saved."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(words).encode()))


def _words(layout: Sequence[tuple[str, tuple[int, ...], str, Option]]) -> str:
    shown = ", ".join(f"{name} {shape}" for name, shape, _, _ in layout[:4])
    return shown + (f" and {len(layout) - 4} more" if len(layout) > 4 else "")
