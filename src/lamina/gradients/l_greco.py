"""A compressor's knob for every layer, chosen anew from time to time: the error of a uniform one in fewer bytes."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lamina.errors import LaminaError
from lamina.gradients.budget import solve_budget
from lamina.gradients.compression.compressor import Compressor, Option, is_layer, peak
from lamina.gradients.reducer import Group, size
from lamina.gradients.throttled import built
from lamina.recipe import Node
from lamina.registry import Slot, register

log = logging.getLogger(__name__)

Norm = Literal["l2", "l2sq"]
CHOSEN, SKIPPED = 1.0, 0.0


@register(
    "reducer",
    "l_greco",
    source="Alimohammadi et al., L-GreCo (MLSys 2024), arXiv 2210.17357, algorithm 1",
)
class LGreCo:
    """Layer-wise adaptive gradient compression: the inner compressor with a knob of its own for every layer.

    Every `period` steps the first worker measures what each knob value would lose of each layer's gradient, chooses the
    values that make the message smallest while the total loss stays within that of the uniform setting, and tells the
    others. Until `start_step` gradients go raw; until there are `window` gradients the knob is uniform.

    Args:
        base: the compressor inside (`qsgd`, `topk`, `powersgd`): a node, or one that is built. Its own option is the
            uniform setting; its own `start_step` is not used.
        alpha: the error budget as a multiple of the uniform setting's error.
        period: steps between two choices; the paper takes an epoch.
        start_step: steps of plain all-reduce.
        window: steps whose mean gradient (of the first worker, with error feedback) the choice is made from.
        buckets: of the dynamic programme.
        grid: knob values to choose from, the uniform one among them; None = the compressor's own `options`.
        norm: errors are 2-norms of layers, or their squares (`l2sq`).
    Raises:
        LaminaError: an option out of its range, an empty grid or one without the uniform setting, a `base` that is no
            compressor; from `reduce`, what the compressor raises.
    Deviation: an option without error takes no bucket, and the uniform setting competes with the table's answer (see
        `solve_budget`). Where even the smallest errors exceed the budget (alpha far below 1) those are taken, and the
        log says so once. Gradients that are not finite do not enter the window; without any the choice
        is skipped, and counted.
    Example:
        >>> LGreCo({"name": "powersgd", "rank": 4}, period=100, start_step=50).report()["choices"]
        0
    """

    granularity: ClassVar[Literal["bucket", "model"]] = "bucket"

    def __init__(
        self,
        base: Annotated[Node | Compressor, Slot("reducer")] = "powersgd",
        alpha: float = 1.0,
        *,
        period: int = 1000,
        start_step: int = 1000,
        window: int = 10,
        buckets: int = 10_000,
        grid: Sequence[Option] | None = None,
        norm: Norm = "l2",
    ) -> None:
        compressor = built(base)
        if not isinstance(compressor, Compressor):
            raise LaminaError(f"base must be a compressor (qsgd, topk, powersgd), got a {type(compressor).__name__}")
        if not alpha > 0:
            raise LaminaError(f"alpha must be above 0, got {alpha!r}")
        for name, value, least in (
            ("period", period, 1),
            ("window", window, 1),
            ("buckets", buckets, 1),
            ("start_step", start_step, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LaminaError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if period < window:
            raise LaminaError(f"period must be at least window, got {period} and {window}")
        if norm not in ("l2", "l2sq"):
            raise LaminaError(f"norm must be 'l2' or 'l2sq', got {norm!r}")
        self.base, self.alpha, self.period, self.window, self.buckets, self.norm = (
            compressor,
            alpha,
            period,
            window,
            buckets,
            norm,
        )
        self.grid = None if grid is None else self._checked_grid(grid)
        compressor.start_step = self.start_step = start_step
        self.memory = compressor.memory
        self.memory.kinds |= {"window": {}, "counted": {}}
        self.choices, self.skipped = 0, 0
        self.last: dict[str, float] = {}

    def tasks(self, step: int, rank: int, world: int) -> Sequence[int]:
        """Return this rank's own shard."""
        return (rank,)

    def reduce(self, gradients: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """Return the mean of the workers' compressed gradients; choose knobs first, where it is time.

        Raises:
            LaminaError, ShapeError, PlanError: see `Compressor.reduce`.
        """
        if size(group) == 1 or not gradients:
            return dict(gradients)
        if self.base.begin(gradients):
            self._begin_step(group, next(iter(gradients.values())).device)
        if self._collecting():
            self._collect(gradients, group)
        return self.base.combine(gradients, group)

    def reduce_flat(self, flat: Tensor, names: Sequence[str], group: Group) -> torch.futures.Future[Tensor] | None:
        """Average a bucket while backward goes on, as long as no gradient is looked at; see `Compressor`."""
        steps = self.memory.steps + self.memory.begins(names)
        if steps > self._first() - self.window:
            return None
        return self.base.reduce_flat(flat, names, group)

    def follow(self, parameters: Mapping[str, Parameter]) -> None:
        """Take the model's parameters by their present names."""
        self.base.follow(parameters)

    def bytes_sent(self) -> int:
        """Return the bytes this rank handed to collectives so far, the choices' broadcasts included."""
        return self.base.bytes_sent()

    def report(self) -> dict[str, Any]:
        """Return knobs by layer; error, budget, bytes of the last choice, and what it took; and what the base did."""
        return {
            "options": dict(self.memory["options"]),
            "choices": self.choices,
            "skipped": self.skipped,
            **self.last,
            "base": self.base.report(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the compressor's state with the window's sums, and the counters; each worker has its own."""
        own = {"choices": self.choices, "skipped": self.skipped, "last": dict(self.last)}
        return {**own, "base": self.base.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state back."""
        self.base.load_state_dict(state["base"])
        self.choices, self.skipped = int(state["choices"]), int(state["skipped"])
        self.last = dict(state["last"])

    def choose(self, gradients: Mapping[str, Tensor]) -> dict[str, Option]:
        """Return the cheapest option of each layer within the budget; what it came to is in `report()`.

        Args:
            gradients: by name, of the layers (two or more dimensions), on one machine: nothing is sent.
        """
        begun = time.perf_counter()
        options = {n: self._options(n, g) for n, g in gradients.items()}
        errors = {n: self.base.errors(g, options[n]).numpy() for n, g in gradients.items()}
        if self.norm == "l2sq":
            errors = {n: e**2 for n, e in errors.items()}
        sizes = {n: [self.base.size(g.shape, o, g.element_size()) for o in options[n]] for n, g in gradients.items()}
        uniform = {n: options[n].index(self._default(g)) for n, g in gradients.items()}
        budget = self.alpha * math.fsum(errors[n][d] for n, d in uniform.items())
        measured = time.perf_counter()
        # At alpha below 1 the uniform setting is over the budget, and drops out.
        found, true = solve_budget(
            list(errors.values()), list(sizes.values()), budget, self.buckets, default=list(uniform.values())
        )
        self.last = {
            "true_error": true,
            "budget": budget,
            "bytes": float(sum(sizes[n][c] for n, c in zip(gradients, found, strict=True))),
            "uniform_bytes": float(sum(sizes[n][d] for n, d in uniform.items())),
            "seconds_errors": measured - begun,
            "seconds_solver": time.perf_counter() - measured,
        }
        assert true <= budget or self.alpha < 1, "the uniform setting itself is within the budget"
        if true > budget:
            log.warning("l_greco: alpha %g asks for less error than any option has; the least is taken", self.alpha)
        return {n: options[n][c] for n, c in zip(gradients, found, strict=True)}

    def _begin_step(self, group: Group, device: torch.device) -> None:
        step = self.memory.steps - 1
        if step < self._first() or (step - self._first()) % self.period:
            return
        self._adapt(group, device)
        self.memory["window"].clear()
        self.memory["counted"].clear()

    def _first(self) -> int:
        """Return the first step that has knobs of its own."""
        return max(self.start_step, self.window)

    def _collecting(self) -> bool:
        """Say whether the present step is one of the last before a choice."""
        left = self._first() - (self.memory.steps - 1)
        return 0 < (left if left > 0 else left % self.period or self.period) <= self.window

    def _collect(self, gradients: Mapping[str, Tensor], group: Group) -> None:
        """Add the first worker's gradients to the window, those that are finite; the others keep none."""
        if dist.get_rank(group) != 0:
            return
        sums, counted = self.memory["window"], self.memory["counted"]
        for name, gradient in gradients.items():
            if is_layer(gradient) and torch.isfinite(peak(gradient)):
                corrected = self.base.corrected(name, gradient)
                before = self.memory.fitting("window", name, corrected)
                sums[name] = corrected if before is None else corrected.add_(before)
                steps = 0 if before is None else counted[name][0]
                counted[name] = [steps + 1, str(gradient.dtype).removeprefix("torch.")]

    def _window(self) -> dict[str, Tensor]:
        """Return the mean gradients, each in the type its gradient has."""
        counted = self.memory["counted"]
        return {n: (g / counted[n][0]).to(getattr(torch, counted[n][1])) for n, g in self.memory["window"].items()}

    def _adapt(self, group: Group, device: torch.device) -> None:
        """Let the first worker choose, and take over what it chose: its layers are those of the last step's names."""
        names = sorted(self.memory.names)
        words = torch.zeros(2 + len(names), dtype=torch.float64, device=device)
        if self.memory["window"]:
            chosen = self.choose(self._window())
            words[2:] = torch.tensor([chosen.get(n, 0) for n in names], dtype=torch.float64)
            words[0] = CHOSEN
        words[1] = zlib.crc32(repr(names).encode())
        mine = float(words[1])
        status, theirs, *values = self.base.traffic.broadcast(words, group).tolist()
        if mine != theirs:
            raise LaminaError("l_greco: workers trained other parameters than the first one in the last step")
        if status != CHOSEN:
            self.skipped += 1
            return
        self.choices += 1
        self.base.set_options({n: v for n, v in zip(names, values, strict=True) if v})

    def _options(self, name: str, gradient: Tensor) -> list[Option]:
        """List a layer's options: what the grid (or the compressor) has, as far as the layer can take it."""
        if self.grid is None:
            return self.base.options(gradient.shape)
        return sorted({self.base.capped(gradient.shape, o) for o in self.grid})

    def _default(self, gradient: Tensor) -> Option:
        return self.base.capped(gradient.shape, self.base.option)

    def _checked_grid(self, grid: Sequence[Option]) -> list[Option]:
        checked = [self.base.check_option(o) for o in grid]
        if not checked:
            raise LaminaError("grid must have at least one option, got an empty one")
        if self.base.option not in checked:
            raise LaminaError(f"grid must have the compressor's own {self.base.knob} {self.base.option}, got {checked}")
        return checked
