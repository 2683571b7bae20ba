"""The linear system that a network applied to one input: y = F x + r, with every decision frozen at that input.

Rows of F say what an output looks at, columns where an input goes, r what comes from biases alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.errors import LaminaError, ShapeError, require
from lamina.verify._frozen_model import FrozenModel, Rules, named_input
from lamina.verify._frozen_pass import FrozenPass, Unit
from lamina.verify.linear_scopes.call import Rule
from lamina.verify.matrix_free_svd import Method, SingularTriples, matrix_free_svd

CHUNK = 64
"""Probes, or cotangents, that go together."""


class LinearInterpreter:
    """The affine map that a network was at x0: `apply(x)` = F x + r, where `apply(x0)` is the network's own output.

    For looking into classifiers, super-resolution and image-to-image networks: which inputs an output weighs, and how;
    what share of it comes from biases. F is never built unless asked for (`matrix`); rows, columns, F x, F^T v and
    singular triples are passes of the network. The model stays as it is; a pass costs a forward pass for x0, one more a
    probe, and keeps nothing between layers. Torch functions, methods and modules are seen alike, in place or not.

    What stays as x0 decided it: the slope of piecewise-linear units and the positions a max-pool took; the gain
    phi(x0) / x0 of smooth units; the statistics of norms (all but batch norm's running ones); the weights of softmax
    and attention; of a product of two things that depend on the input, the gate: what broadcasts, of equals what came
    straight from a unit, else the first; denominators. In a piecewise-linear network F is the Jacobian.

    x has the shape of x0, or (count, ...) for several; what comes back is shaped likewise. Types are the model's;
    computing in float64 needs `model.double()`.

    Args:
        model: in evaluation mode, not compiled. Its prediction is the tensor it returns, `.logits`, or the first.
        x0: one input, (1, ...) or without a batch; or a batch by names, of which the first floating-point entry is x
            and the others stay (`{"inputs_embeds": x, "attention_mask": mask}`).
        rule: of smooth units. "secant": through the origin; "tangent": phi'(x0), the rest goes to r, and F is the
            Jacobian where there are no other frozen parts.
        eps: below this |x0| a secant is the tangent at 0.
        strict: False: a function without a rule is taken by its tangent at x0, and a path that Python code chose by a
            value stays as at x0, both with a warning.
        rules: module types or torch functions -> `scope(unit, part0, part1, affine)`, which returns part 1 of the
            output: `unit` computes it at x0, `part0` and `part1` are its first input at x0 and for the probe, and
            `affine(gain, constant=0)` is gain * part1 + constant.
    Raises:
        LaminaError: a function without a rule (named, with the module that calls it), a model in training mode,
            compiled, scripted or random, a path chosen by the input's values, whole numbers on the path.
        ShapeError: x0 has more than one row; x, v or an index does not fit.
    Source: Navarrete Michelini, Liu, Lu, Jiang, A Tour of Convolutional Networks Guided by Linear Interpreters (2019),
        arXiv 1908.05168. Deviation: the input and the probes are not one doubled batch but run side by side, so that
        the network's own output keeps its bits; products, attention and quotients are ours. Torch's fused encoder
        layer hides its units: here it runs unfused.
    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> x = torch.randn(1, 3)
        >>> system = LinearInterpreter(net, x)
        >>> torch.allclose(system.filter(x) + system.bias, net(x), atol=1e-6)
        True
        >>> system.matrix().shape, system.row(0).shape, system.svd(1).values.shape
        (torch.Size([2, 3]), torch.Size([1, 3]), torch.Size([1]))
    """

    def __init__(
        self,
        model: nn.Module,
        x0: Tensor | Batch,
        rule: Rule = "secant",
        eps: float = 1e-6,
        strict: bool = True,
        rules: Rules | None = None,
    ) -> None:
        self._system = FrozenModel(model, rule, eps, strict, rules)
        self._batch, self._name = named_input(x0)
        self.x0: Tensor = self._batch[self._name].detach().clone()
        _check_single(self.x0)
        self.output, self.bias = self._first()

    def _first(self) -> tuple[Tensor, Tensor]:
        output, part1, _ = self._system.run(self._given(), self._name, torch.zeros_like(self.x0))
        return output, output.clone() if part1 is None else part1

    output: Tensor
    """What the network gives at x0."""
    bias: Tensor
    """r, the part of the output that does not come from x: `apply(0)`."""

    def apply(self, x: Tensor) -> Tensor:
        """Return F x + r."""
        x, several = self._several(x)
        if not several:
            return self._pass(x.reshape(self.x0.shape))
        moved = [self._pass(part.reshape(-1, *self.x0.shape)) for part in x.split(CHUNK)]
        return torch.cat(moved).reshape(len(x), *_row(self.output))

    def filter(self, x: Tensor) -> Tensor:
        """Return F x: what x contributes to the output."""
        return self.apply(x) - self.bias

    def transpose(self, v: Tensor) -> Tensor:
        """Return F^T v: v has the shape of the output, or (count, ...) for several."""
        v, several = _fit(v, self.output, "v", "the output")
        v = v.to(self.output)
        with torch.inference_mode(False):
            x = torch.zeros_like(self.x0).requires_grad_()
            moved = self._pass(x, graph=True)
            if not moved.requires_grad:
                found = x.new_zeros((len(v), *self.x0.shape))
            else:
                parts = v.reshape(-1, *self.output.shape).split(CHUNK)
                found = torch.cat([_pulled(moved, x, part) for part in parts])
        return found.reshape(len(v), *_row(self.x0)) if several else found.reshape(self.x0.shape)

    def row(self, output: int | tuple[int, ...]) -> Tensor:
        """Return a row of F, shaped as x0: how an output (its flat index, or its place) weighs every input."""
        return self.transpose(_unit(output, self.output, "output"))

    def column(self, input: int | tuple[int, ...]) -> Tensor:
        """Return a column of F, shaped as the output: where a unit of one input (flat index, or place) goes."""
        return self.filter(_unit(input, self.x0, "input"))

    def contributions(self, output: int | tuple[int, ...]) -> Tensor:
        """Return each input's vote for an output, shaped as x0: row * x0; the sum and `bias` there give the output."""
        return self.row(output) * self.x0

    def matrix(self, max_elements: int = 10_000_000) -> Tensor:
        """Return F itself, (outputs, inputs), by columns or rows, whichever are fewer.

        Raises:
            LaminaError: it would have more than `max_elements` elements.
        """
        inputs, outputs = self.x0.numel(), self.output.numel()
        if inputs * outputs > max_elements:
            raise LaminaError(
                f"the matrix would have {outputs} x {inputs} elements, more than max_elements={max_elements}: rows, "
                "columns, svd and operator need no matrix"
            )
        if inputs <= outputs:
            eye = torch.eye(inputs, dtype=self.x0.dtype, device=self.x0.device)
            return self.filter(eye.reshape(-1, *_row(self.x0))).reshape(inputs, outputs).T
        eye = torch.eye(outputs, dtype=self.output.dtype, device=self.output.device)
        return self.transpose(eye.reshape(-1, *_row(self.output))).reshape(outputs, inputs)

    def svd(self, k: int, method: Method = "block", tolerance: float = 1e-6, seed: int = 0) -> SingularTriples:
        """Return the k largest singular triples of F, `left` shaped as outputs and `right` as inputs, in float64.

        Args and raises as `matrix_free_svd`, which runs on `filter` and `transpose`.
        """

        def forward(x: Tensor) -> Tensor:
            return self.filter(x.to(self.x0).reshape(-1, *_row(self.x0))).flatten(1).cpu().double()

        def backward(v: Tensor) -> Tensor:
            return self.transpose(v.to(self.output).reshape(-1, *_row(self.output))).flatten(1).cpu().double()

        inputs, outputs = self.x0.numel(), self.output.numel()
        found = matrix_free_svd(forward, backward, inputs, outputs, k, method=method, tolerance=tolerance, seed=seed)
        left, right = found.left.reshape(k, *_row(self.output)), found.right.reshape(k, *_row(self.x0))
        return SingularTriples(left, found.values, right, found.steps)

    def operator(self) -> Any:
        """Return F as a `scipy.sparse.linalg.LinearOperator` of shape (outputs, inputs).

        Raises:
            MissingExtra: scipy is not installed.
        """
        linalg = require("scipy.sparse.linalg", "experiments")
        dtype = torch.promote_types(self.x0.dtype, torch.float32)

        def moved(run: Callable[[Tensor], Tensor], like: Tensor) -> Callable[[Any], Any]:
            def product(columns: Any) -> Any:
                rows = torch.as_tensor(columns.reshape(len(columns), -1).T.copy()).to(like)
                found = run(rows.reshape(-1, *_row(like))).flatten(1).T.to(dtype).cpu().numpy()
                return found.reshape(-1) if columns.ndim == 1 else found

            return product

        forward, backward = moved(self.filter, self.x0), moved(self.transpose, self.output)
        return linalg.LinearOperator(
            (self.output.numel(), self.x0.numel()),
            *(forward, backward, forward),
            rmatmat=backward,
            dtype=str(dtype).removeprefix("torch."),
        )

    def check(self) -> dict[str, Any]:
        """Say how well the system holds.

        Return `consistency` (the largest difference of `apply(x0)` and the network's output, in parts of its largest
        value), `max_gain` (of all units; secants blow up near 0) and `unknown` (what was taken by its tangent, with
        its module).
        """
        found, ran = self._watched
        gain = max((u.gain for u in ran.units), default=0.0)
        consistency = float((found - self.output).abs().max()) / (self._scale or 1.0)
        return {"consistency": consistency, "max_gain": gain, "unknown": list(dict.fromkeys(ran.unknown))}

    def units(self) -> list[Unit]:
        """List the units whose decisions are frozen, in order: the module, the function, its largest gain."""
        return list(self._watched[1].units)

    @cached_property
    def _watched(self) -> tuple[Tensor, FrozenPass]:
        _, part1, ran = self._system.run(self._given(), self._name, self.x0, watch=True)
        return self.output if part1 is None else part1, ran

    @cached_property
    def _scale(self) -> float:
        """The largest finite |output|."""
        return float(self.output.abs().nan_to_num(nan=0.0, posinf=0.0).max())

    def _pass(self, x: Tensor, *, graph: bool = False) -> Tensor:
        """Return part 1 of the output for one probe shaped as x0, or for (count, *x0.shape)."""
        x = x.to(self.x0)
        count = None if x.shape == self.x0.shape else len(x)
        output, part1, _ = self._system.run(self._given(), self._name, x, count=count, graph=graph)
        # What is small beside the largest output carries that one's rounding.
        close = 1e-4 * self._scale
        if output.shape != self.output.shape or not torch.allclose(output, self.output, 1e-4, close, equal_nan=True):
            raise LaminaError(
                f"{type(self._system.model).__name__} does not give what it gave for this input before: it is random, "
                "or was changed since"
            )
        if part1 is None:
            return self.output if count is None else self.output.expand(count, *self.output.shape)
        return part1

    def _given(self) -> dict[str, Any]:
        # A model may write into its input.
        return {**self._batch, self._name: self.x0.clone()}

    def _several(self, x: Tensor) -> tuple[Tensor, bool]:
        return _fit(x, self.x0, "x", "x0")


def linear_interpreter(
    model: nn.Module,
    x: Tensor | Batch,
    *,
    rule: Rule = "secant",
    eps: float = 1e-6,
    strict: bool = True,
    rules: Rules | None = None,
) -> LinearInterpreter:
    """Return the exact affine map A x + b that a network is at x; args and raises as `LinearInterpreter`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
        >>> linear_interpreter(net, torch.randn(1, 1, 8, 8)).row((0, 3, 3)).shape
        torch.Size([1, 1, 8, 8])
    """
    return LinearInterpreter(model, x, rule, eps, strict, rules)


class AffineParts(NamedTuple):
    """What a batch of outputs is made of: `filtered + bias` is what the network gives."""

    filtered: Tensor
    """F x of each row, shaped as the output."""
    bias: Tensor
    """r of each row."""


def affine_parts(
    model: nn.Module,
    x: Tensor | Batch,
    *,
    rule: Rule = "secant",
    eps: float = 1e-6,
    strict: bool = True,
    rules: Rules | None = None,
) -> AffineParts:
    """Split the outputs of many inputs at once into F x and r, every row with a system of its own.

    For a model that treats the rows of a batch alone, as models in evaluation mode do. Args and raises as
    `LinearInterpreter`, but x has any number of rows.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> torch.allclose(affine_parts(net, torch.randn(5, 3)).bias, net[2].bias.expand(5, 2))
        True
    """
    batch, name = named_input(x)
    given = batch[name].detach()
    system = FrozenModel(model, rule, eps, strict, rules)
    output, part1, _ = system.run({**batch, name: given.clone()}, name, torch.zeros_like(given))
    bias = output if part1 is None else part1
    return AffineParts(output - bias, bias)


def _check_single(x: Tensor) -> None:
    if x.dim() > 1 and len(x) != 1:
        raise ShapeError(
            f"a linear system belongs to one input, (1, ...), and x0 is {tuple(x.shape)}: take x0[i : i + 1], or "
            "x0[None] if it has no batch; affine_parts(model, x) splits the outputs of many at once"
        )


def _row(like: Tensor) -> tuple[int, ...]:
    """Return the shape of one of several: without a leading 1."""
    return tuple(like.shape[1:] if like.dim() > 1 and len(like) == 1 else like.shape)


def _fit(x: Tensor, like: Tensor, what: str, whose: str) -> tuple[Tensor, bool]:
    """Return (count, *row) and whether several were meant."""
    row = _row(like)
    if x.shape == like.shape:
        return x.reshape(1, *row), False
    if x.dim() == len(row) + 1 and tuple(x.shape[1:]) == row and len(x):
        return x, True
    raise ShapeError(f"{what} must have the shape of {whose}, {tuple(like.shape)}, or be (count, {', '.join(map(str, row))}); got {tuple(x.shape)}")  # fmt: skip  # noqa: E501


def _unit(place: int | tuple[int, ...], like: Tensor, what: str) -> Tensor:
    """Return 1 at a flat index, or a place in one row, and 0 elsewhere; `like` may lie in memory in any order."""
    unit = like.new_zeros(like.numel())
    unit[_flat(place, like, what)] = 1
    return unit.reshape(like.shape)


def _flat(place: int | tuple[int, ...], like: Tensor, what: str) -> int:
    """Return a flat index from a flat index or a place in one row."""
    row = _row(like)
    if isinstance(place, int):
        if -like.numel() <= place < like.numel():
            return place % like.numel()
    elif len(place) == len(row) and all(-n <= i < n for i, n in zip(place, row, strict=True)):
        return int(torch.arange(like.numel()).reshape(row)[place])
    raise ShapeError(f"no {what} {place}: there are {like.numel()}, of shape {row}")


def _pulled(moved: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Return the gradients of <v, moved> for every v (count, ...)."""
    if len(v) == 1:
        return torch.autograd.grad(moved, x, v[0], retain_graph=True)[0][None]
    with warnings.catch_warnings():
        # A backward pass without a batched form runs one by one, and torch says so.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.autograd.grad(moved, x, v, retain_graph=True, is_grads_batched=True)[0]
