"""Hypernetworks: the weights of any module, generated from a condition (a task, data, numbers, noise).

Source: Chauhan et al., A Brief Review of Hypernetworks in Deep Learning (2023), arXiv 2306.06955.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lamina.errors import LaminaError, ShapeError
from lamina.nn import _hypernetwork_start as start
from lamina.nn import _hypernetwork_target as parts
from lamina.nn._hypernetwork_batching import mapped
from lamina.nn._hypernetwork_generators import Generation, Generator
from lamina.nn._hypernetwork_options import (
    Init,
    as_batch,
    check_choices,
    check_positive,
    check_rows,
    check_together,
    make_condition,
    members,
    stacked,
    without_row,
)
from lamina.nn._hypernetwork_state import Memory, keep_statistics
from lamina.nn._precision import without_autocast
from lamina.nn.hypernetwork_conditions import Condition, JointCondition, TaskCondition
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

RESIDUAL_FACTOR = 0.1
"""On the heads' weights where the generated weights are added to a base."""


@dataclass(frozen=True)
class TensorReport:
    """How spread one generated tensor is, beside the target's own at the time of wrapping."""

    name: str
    shape: tuple[int, ...]
    std: float
    own_std: float
    """NaN where the target had no values (meta)."""


@register("layer", "hypernetwork", source="Chauhan et al. 2023, arXiv 2306.06955")
class HyperNetwork(nn.Module):
    """Any module with some or all of its weights generated from a condition.

    For many tasks without forgetting, weights that adapt to the input, a whole path of a hyperparameter, ensembles from
    noise, or a small generator for a large target. Optimizers and DDP see the generator, the embeddings and what is
    not generated; `materialize` gives an ordinary module back.

    h(x, condition) -> what target(x) returns. One condition: one set of weights for all of x. A batch of B
    conditions: row b of every input tensor runs with weights of its own (outputs batch first). `for_each` runs every
    condition on a whole batch. Many conditions run at once by `torch.func.vmap` (torch's recurrent layers, for which it
    has no rules, one after the other). Weights are generated in float32, outside autocast, and cast to the target's
    dtype.

    Args:
        target: a module, or the recipe node of a model; taken apart in place (pass a copy to keep it).
        condition: what the weights depend on (`TaskCondition`, `VectorCondition`, `DataCondition`, `NoiseCondition`,
            or several of them; or their recipe nodes).
        generation: "chunk": pieces of chunk_size, each with an embedding (large targets). "once": one head for all.
            "multihead": a head a tensor. "component": a run a tensor with an embedding, one head.
        chunk_size: numbers a chunk.
        generator: another trunk than the MLP: what builds a module (B, R, width) -> (B, R, hidden) from its width, or
            one already built; R runs (chunks, components) stand in a row, so that a recurrent net or attention fits.
        hidden: widths of the MLP's layers; () = weights linear in the condition.
        rank: emit two factors of this rank for every matrix that this makes smaller; None = whole.
        match: glob(s) of parameter names, or a predicate (name, parameter). "*" leaves the norms' gains and biases
            ordinary; name them, or say "**", to generate them too.
        base: "frozen" or "trainable": generated weights are added to the target's own. "none": they are the weights.
        init: "hyperfan_in"/"hyperfan_out": at the start weights have the variance that keeps signals (gradients) alive,
            biases 0, norms 1. "residual": torch's heads * 0.1. "zero": exactly the base. None = "residual" with a base,
            "hyperfan_in" without.
        batch_norm: of norms with running statistics in the target. "per_condition": a set a task (then one task a
            call). "batch": the batch's own, always.
        embedding: width of a chunk's or component's embedding.
        allow_large: let "once" emit more than 50 million numbers.
    Raises:
        LaminaError: nothing selected, an unknown name, an integer or lazy parameter, running statistics without a
            policy, options that exclude each other; at the call, a condition that does not exist.
        ShapeError: sizes below 1; at the call, a batch of conditions that does not fit x.
    Source: Chauhan et al. (2023), arXiv 2306.06955, sections 3-4; chunks: von Oswald et al. (2020), arXiv 1906.00695;
        hyperfan: Chang et al. (2020). Deviation: hyperfan weights are unit numbers times a fixed factor a tensor, the
        same variance for every way of emitting; biases start at 0, so that hyperfan-in is not halved for them.
    Example:
        >>> from lamina.nn import TaskCondition
        >>> h = HyperNetwork(nn.Linear(4, 3), TaskCondition(5), chunk_size=8)
        >>> h(torch.randn(2, 4), 1).shape, h(torch.randn(2, 4), torch.tensor([0, 4])).shape, h.num_generated
        (torch.Size([2, 3]), torch.Size([2, 3]), 15)
    """

    scales: Tensor
    constants: Tensor

    def __init__(
        self,
        target: Annotated[nn.Module | Node, Slot("model")],
        condition: Annotated[Condition | Node | Sequence[Condition | Node], Slot("layer")],
        generation: Generation = "chunk",
        *,
        chunk_size: int = 512,
        generator: Annotated[nn.Module | Node | Callable[..., Any] | None, Slot("layer")] = None,
        hidden: Sequence[int] = (64, 64),
        rank: int | None = None,
        match: str | Sequence[str] | Callable[[str, nn.Parameter], bool] = "*",
        base: Literal["none", "frozen", "trainable"] = "none",
        init: Init | None = None,
        batch_norm: Literal["refuse", "per_condition", "batch"] = "refuse",
        embedding: int = 16,
        allow_large: bool = False,
    ) -> None:
        super().__init__()
        init = init or ("hyperfan_in" if base == "none" else "residual")
        check_choices(generation=generation, base=base, init=init, batch_norm=batch_norm)
        check_positive(
            chunk_size=chunk_size, embedding=embedding, rank=1 if rank is None else rank, hidden=min(hidden, default=1)
        )
        check_together(base, init, rank)
        module: nn.Module = target if isinstance(target, nn.Module) else factory("model", target)()
        self.condition = make_condition(condition)
        self.entries, dtypes = parts.select(module, match, rank)
        self.one_task_a_call = any(True for _ in parts.with_running_statistics(module))
        count = self.condition.count if isinstance(self.condition, TaskCondition) else None
        self.statistics = keep_statistics(module, batch_norm, count)
        values = [dict(module.named_parameters())[e.name] for e in self.entries]
        self.own_stds = [start.mean_and_spread(v)[1] for v in values]
        starts = [start.Start(1.0, 0.0, None)] * len(values)
        if init.startswith("hyperfan"):
            starts = start.hyperfan(module, self.entries, values, outward=init == "hyperfan_out")
        parts.take_out(module, self.entries, base)
        self.recurrent = any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in module.modules())
        self.target = module
        self.generator = Generator(
            self.condition.width,
            [e.emitted for e in self.entries],
            generation=generation,
            chunk_size=chunk_size,
            embedding=embedding,
            hidden=hidden,
            trunk=generator,
            allow_large=allow_large,
        )
        self._start(starts, init)
        self.memory = Memory(self.num_generated, len(members(self.condition)))
        self.register_buffer("layout", torch.tensor(parts.fingerprint(self.entries)))
        for i, dtype in enumerate(dtypes):
            # Empty, but it follows the module's dtype: what generated weights are cast to.
            self.register_buffer(f"like{i}", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, x: Any = None, condition: Any = None, **named: Any) -> Any:
        """Run the target with the weights of a condition, or each row with those of its own.

        Args:
            x: the target's first argument, or a tuple of several; more go by keyword.
            condition: what `condition` takes; None = as it fills itself (data: x; noise: a fresh draw; the only task).
        """
        args = x if isinstance(x, tuple) else () if x is None else (x,)
        value = self._complete(condition, next((t for t in (*args, *named.values()) if isinstance(t, Tensor)), None))
        code = self.condition(value)
        if code.dim() == 1:
            return self._run(self._generate(code.unsqueeze(0)), value, args, named)
        self._refuse_rows_in_batch_norm()
        check_rows(len(code), (args, named))
        weights = parts.by_place(self.target, self.entries, self._generate(code))
        args, named = tree_map(lambda t: t.unsqueeze(1) if isinstance(t, Tensor) else t, (args, named))
        return tree_map(without_row, self._vmapped(weights, args, named, shared=False))

    def for_each(self, x: Any, condition: Any, *, shared: bool = True, at_once: int | None = None, **named: Any) -> Any:
        """Run each of B conditions on a whole batch: outputs (B, ...).

        Args:
            x: as in `forward`; with `shared=False` every input tensor has B batches in its first dimension.
            at_once: conditions whose weights are in memory at a time; None = all.
        Raises:
            ShapeError: a single condition, or inputs that are not B batches.
        """
        args = x if isinstance(x, tuple) else () if x is None else (x,)
        value = self._complete(condition, next((t for t in (*args, *named.values()) if isinstance(t, Tensor)), None))
        codes = self.condition(value)
        if codes.dim() == 1:
            raise ShapeError("for_each takes a batch of conditions, got one: call the module itself")
        if not shared:
            check_rows(len(codes), (args, named))
        if self.statistics is not None:
            at_once = 1
        found = []
        for i in range(0, len(codes), at_once or len(codes)):
            rows = slice(i, i + (at_once or len(codes)))
            each = tree_map(lambda t: t[rows] if isinstance(t, Tensor) and not shared else t, (args, named))  # noqa: B023
            found.append(
                self._for_some(codes[rows], None if self.statistics is None else value[rows], *each, shared=shared)
            )
        return found[0] if len(found) == 1 else tree_map(lambda *ts: torch.cat(ts), *found)

    def generate(self, condition: Any = None) -> dict[str, Tensor]:
        """Return the weights by name, as the target would have them; with a leading B for a batch of conditions."""
        code = self.condition(self._complete(condition, None))
        found = self._generate(_rows(code))
        return found if code.dim() == 2 else {name: tensor[0] for name, tensor in found.items()}

    def materialize(self, condition: Any = None) -> nn.Module:
        """Freeze one condition out: a plain copy of the target with its weights, and no generator.

        Raises:
            ShapeError: a batch of conditions.
        """
        value = self._complete(condition, None)
        code = self.condition(value)
        if code.dim() == 2 and len(code) != 1:
            raise ShapeError(f"materialize takes one condition, got a batch of {len(code)}")
        weights = {name: tensor[0] for name, tensor in self._generate(code.reshape(1, -1)).items()}
        plain = parts.freeze_out(self.target, self.entries, weights)
        if self.statistics is not None:
            self.statistics.put(self._task(value), plain)
        return plain.train(self.training)

    def remember(self, conditions: Any) -> None:
        """Keep the weights of these conditions as they are now, for `drift`; known ones are kept anew.

        Args:
            conditions: a batch of them, as `generate` takes it (task numbers: a list will do).
        """
        with torch.no_grad():
            value = self._complete(as_batch(conditions), None)
            code = self.condition(value)
            self.memory.add(stacked(self.condition, value, len(_rows(code))), self._flat(_rows(code)))

    def drift(self) -> Tensor:
        """Return how far the remembered conditions' weights have moved: mean over them of the squared distance; ()."""
        if not len(self.memory):
            return self.scales.new_zeros(())
        values = self.memory.values()
        code = self.condition(tuple(values) if isinstance(self.condition, JointCondition) else values[0])
        moved = self._flat(_rows(code)) - self.memory.get_buffer("weights")
        return moved.square().sum(1).mean()

    def magnitude(self, condition: Any = None) -> Tensor:
        """Return the squared length of all generated weights, averaged over the conditions; (). For a penalty."""
        code = self.condition(self._complete(condition, None))
        return self._flat(_rows(code)).square().sum(1).mean()

    def calibrate(self, condition: Any) -> None:
        """Scale the heads anew so that over these conditions weights have the variance meant, in place.

        Done at construction with the conditions known there; worth doing once on real ones for a `DataCondition`,
        before training.

        Raises:
            LaminaError: the init is not hyperfan: then the heads start small on purpose.
        """
        if self.plain:
            raise LaminaError(
                "calibrate is for an init of hyperfan_in or hyperfan_out: with a base the heads start small"
            )
        code = self.condition(self._complete(condition, None))
        self.generator.normalise(_rows(code))

    @torch.no_grad()
    def report(self) -> list[TensorReport]:
        """Compare the spread of every generated tensor, over the initial conditions, with the target's own."""
        found = self._generate(self.condition.code_samples())
        return [
            TensorReport(e.name, e.shape, float(found[e.name].float().std(correction=0)), own)
            for e, own in zip(self.entries, self.own_stds, strict=True)
        ]

    @property
    def num_generated(self) -> int:
        """How many numbers of the target are generated: P."""
        return sum(e.numel for e in self.entries)

    @property
    def compression_ratio(self) -> float:
        """Trained numbers that stand for the generated ones (generator, embeddings, trainable base), over P."""
        bases = [parts.base_of(self.target, e) for e in self.entries]
        own = [*self.generator.parameters(), *self.condition.parameters(), *self.gates]
        return sum(t.numel() for t in [*own, *(b for b in bases if isinstance(b, nn.Parameter))]) / self.num_generated

    @property
    def lamina_wrapped(self) -> nn.Module:
        """The target: `lamina.batches.call` hands it what its forward names."""
        return self.target

    def extra_repr(self) -> str:
        """Show how much is generated."""
        return f"generation={self.generator.generation!r}, num_generated={self.num_generated}"

    def _start(self, starts: Sequence[start.Start], init: Init) -> None:
        gates = [s.gate for s in starts if s.gate is not None]
        numbers = iter(range(len(gates)))
        self.gate_of = [None if s.gate is None else next(numbers) for s in starts]
        self.gates = nn.ParameterList([nn.Parameter(torch.tensor(gates))] if gates else [])
        constants = [s.constant if parts.base_of(self.target, e) is None else 0.0
                     for s, e in zip(starts, self.entries, strict=True)]  # fmt: skip
        self.register_buffer("scales", torch.tensor([s.scale for s in starts]))
        self.register_buffer("constants", torch.tensor(constants))
        self.plain = not init.startswith("hyperfan")
        if self.plain:
            self.generator.shrink(RESIDUAL_FACTOR if init == "residual" else 0.0)
        else:
            self.generator.normalise(self.condition.code_samples())

    def _generate(self, codes: Tensor) -> dict[str, Tensor]:
        """Return the weights (B, *shape) of codes (B, C), by name."""
        with without_autocast(codes.device):
            like = next(self.generator.heads.parameters())
            emitted = self.generator(codes.to(like.dtype))
            return {e.name: self._weight(i, e, emitted[i]) for i, e in enumerate(self.entries)}

    def _weight(self, i: int, entry: parts.Entry, emitted: Tensor) -> Tensor:
        weight = entry.assemble(emitted)
        if not self.plain:
            gate = self.gate_of[i]
            scale = self.scales[i] if gate is None else self.scales[i] * self.gates[0][gate]
            weight = torch.addcmul(self.constants[i].to(weight.dtype), weight, scale.to(weight.dtype))
        base = parts.base_of(self.target, entry)
        if base is not None:
            weight = weight + base.to(weight.dtype)
        return weight.to(self.get_buffer(f"like{entry.dtype}").dtype)

    def _flat(self, codes: Tensor) -> Tensor:
        return torch.cat([t.flatten(1).float() for t in self._generate(codes).values()], dim=1)

    def _run(self, generated: Mapping[str, Tensor], value: Any, args: Any, named: Any) -> Any:
        tensors = parts.by_place(self.target, self.entries, {n: t[0] for n, t in generated.items()})
        if self.statistics is None:
            return self._call(tensors, args, named)
        task = self._task(value)
        statistics = self.statistics.read(task)
        output = self._call({**tensors, **statistics}, args, named)
        if self.training:
            self.statistics.write(task, statistics)
        return output

    def _call(self, tensors: dict[str, Tensor], args: Any, named: Any) -> Any:
        if self.recurrent:
            parts.tell_recurrent(self.target, tensors)
        # Ties are spelled out in the names of the tensors.
        output = functional_call(self.target, tensors, args, named, tie_weights=False)
        if self.recurrent:
            parts.refresh_recurrent(self.target)
        return output

    def _for_some(self, codes: Tensor, value: Any, args: Any, named: Any, *, shared: bool) -> Any:
        generated = self._generate(codes)
        if self.statistics is None:
            return self._vmapped(parts.by_place(self.target, self.entries, generated), args, named, shared=shared)
        args, named = tree_map(lambda t: t[0] if isinstance(t, Tensor) and not shared else t, (args, named))
        return tree_map(lambda t: t.unsqueeze(0), self._run(generated, value, args, named))

    def _vmapped(self, weights: dict[str, Tensor], args: Any, named: Any, *, shared: bool) -> Any:
        # vmap maps every keyword: all goes by position.
        leaves, spec = tree_flatten((args, named))

        def run(weights: dict[str, Tensor], *leaves: Any) -> Any:
            args, named = tree_unflatten(leaves, spec)
            return self._call(weights, args, named)

        places = [0 if isinstance(leaf, Tensor) and not shared else None for leaf in leaves]
        return mapped(run, places, self.recurrent)(weights, *leaves)

    def _complete(self, value: Any, x: Any) -> Any:
        if isinstance(self.condition, JointCondition):
            return self.condition.complete(value, x)
        return self.condition.fill(x) if value is None else value

    def _task(self, value: Any) -> Tensor:
        return torch.as_tensor(value, device=self.scales.device)

    def _refuse_rows_in_batch_norm(self) -> None:
        if self.one_task_a_call:
            raise LaminaError(
                "a batch of conditions would give every row batch statistics of its own: with batch norms in the "
                "target give one condition a call, or use for_each"
            )

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        parts.refuse_another_layout(state.get(f"{prefix}layout"), self.entries)
        super()._load_from_state_dict(state, prefix, *rest)


def _rows(code: Tensor) -> Tensor:
    """Return codes (B, C); one code is a batch of one."""
    return code if code.dim() == 2 else code.unsqueeze(0)
