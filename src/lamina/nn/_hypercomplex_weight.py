"""What the hypercomplex layers share: the algebra, the blocks, how both start, and the weight they stand for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import RecipeError, ShapeError, nearest
from lamina.nn._hypercomplex_kron import kron_sum, nearest_blocks, nearest_kron_sum
from lamina.nn._precision import autocasts

Init = Literal["variance", "official", "algebra"]
AlgebraOption = Literal["learned", "complex", "quaternion"] | Tensor | Sequence[Sequence[Sequence[float]]]
"""How A is given: learned, one by name, or (n, n, n) numbers that stay."""

COMPLEX = (((1, 0), (0, 1)), ((0, -1), (1, 0)))
"""A[0] for the real and A[1] for the imaginary part: H = [[r, -i], [i, r]]."""
QUATERNION = (
    ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
    ((0, -1, 0, 0), (1, 0, 0, 0), (0, 0, 0, -1), (0, 0, 1, 0)),
    ((0, 0, -1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, -1, 0, 0)),
    ((0, 0, 0, -1), (0, 0, -1, 0), (0, 1, 0, 0), (1, 0, 0, 0)),
)
"""Hamilton's product from the left: H = [[r, -i, -j, -k], [i, r, -k, j], [j, k, r, -i], [k, -j, i, r]]."""
ALGEBRAS: dict[str, tuple[Any, ...]] = {"real": (((1,),),), "complex": COMPLEX, "quaternion": QUATERNION}
NOISE = 0.05
"""Standard deviation around the known algebra with init="algebra"."""

K = TypeVar("K", bound="KroneckerWeight")


class KroneckerWeight(nn.Module):
    """A weight (rows, columns, *kernel) kept as an algebra and n blocks: `weight` is their sum of Kronecker products.

    A (n, n, n) is a parameter, or a buffer where it is fixed; F (n, rows / n, columns / n, *kernel). With `rank` F is
    the product of `left` (n, rows / n, rank) and `right` (n, rank, columns / n).

    Args:
        shape: of the dense weight.
        out_dim: which side of it is the output: 0, or 1 for transposed convolutions.
        spread: standard deviation that its entries start with (init "variance" and "algebra").
    """

    undecayed: ClassVar[frozenset[str]] = frozenset({"A"})
    A: Tensor
    F: Parameter
    bias: Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        n: int,
        bias: bool,
        *,
        algebra: AlgebraOption,
        algebra_from: nn.Module | None,
        init: Init,
        spread: float,
        out_dim: int = 0,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        name, inputs = type(self).__name__, shape[1 - out_dim]
        check_sizes(name, shape[out_dim], inputs, n)
        if init not in ("variance", "official", "algebra"):
            raise RecipeError(f"{name}: init must be 'variance', 'official' or 'algebra', got {init!r}")
        self.n, self.rank, self.init, self.spread, self.out_dim = n, rank, init, spread, out_dim
        self.fan_in = inputs if init == "official" else inputs * math.prod(shape[2:])
        self.owns_algebra = algebra_from is None
        given = _algebra(name, n, algebra, init) if algebra_from is None else _shared(name, n, algebra, algebra_from)
        if isinstance(given, Parameter):
            self.A = given
        else:
            self.register_buffer("A", given)
        p, q = shape[0] // n, shape[1] // n
        if rank is None:
            self.F = Parameter(torch.empty(n, p, q, *shape[2:]))
        elif 1 <= rank <= min(p, q):
            self.left, self.right = Parameter(torch.empty(n, p, rank)), Parameter(torch.empty(n, rank, q))
        else:
            raise ShapeError(f"{name}: rank must lie in 1..{min(p, q)}, the smaller side of a block, got {rank}")
        self.bias = Parameter(torch.empty(shape[out_dim])) if bias else None
        self._held: _Held | None = None
        self.reset_parameters()
        if self._draws_algebra and n**3 > math.prod(shape) // n:
            warnings.warn(
                f"{name}: the algebra has n^3 = {n**3} numbers, more than the blocks ({math.prod(shape) // n}), for a "
                f"weight of {math.prod(shape)}: take a smaller n, a fixed algebra, or share one (algebra_from)",
                stacklevel=3,
            )

    @property
    def blocks(self) -> Tensor:
        """The blocks (n, rows / n, columns / n, *kernel): F, or what the two thin factors give."""
        return self.F if self.rank is None else self.left @ self.right

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, formed on each reading."""
        return kron_sum(self.A, self.blocks)

    def formed(self) -> Tensor:
        """Return `weight`; in evaluation without gradients it is kept until a parameter changes.

        A change is seen by the tensors' version counters, so what is written through `.data` in evaluation shows only
        after the next `train()` or `eval()`.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.weight
        sources = (self.A, *self._contents())
        # Stand-ins (functional_call, vmap, tensors made in inference mode) come and go: not to be remembered.
        if not all(type(t) is Parameter for t in sources[1:]) or any(t.is_inference() for t in sources):
            return self.weight
        if self._held is None or not self._held.fits(sources):
            self._held = _Held(sources, self.weight)
        return self._held.weight

    def train(self: K, mode: bool = True) -> K:
        """Switch the mode; forget the weight that was kept."""
        self._held = None
        super().train(mode)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw everything anew as `init` says; an algebra that is fixed or another layer's stays as it is."""
        if self.init == "official":
            for tensor in (*([self.A] if self._draws_algebra else []), *self._contents()):
                nn.init.xavier_uniform_(tensor)
        else:
            self._draw(self.spread)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.fan_in**-0.5), self.fan_in**-0.5)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        """Draw algebra and blocks anew so that the entries of `weight` have that standard deviation; bias zero."""
        self._draw(std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def load_nearest(self, weight: Tensor) -> float:
        """Become the nearest sum of Kronecker products to a dense weight; return the relative error of the result.

        An algebra that is fixed or another layer's stays, and the blocks are the nearest for it. With `rank` the
        blocks are cut to it afterwards, one by one.
        """
        if self._draws_algebra:
            algebra, blocks, error = nearest_kron_sum(weight, self.n)
            self.A.copy_(algebra)
        else:
            blocks, error = nearest_blocks(weight, self.A)
        if self.rank is None:
            self.F.copy_(blocks)
            return error
        u, s, v = torch.linalg.svd(blocks, full_matrices=False)
        root = s[:, : self.rank].sqrt()
        self.left.copy_(u[..., : self.rank] * root[:, None])
        self.right.copy_(v[:, : self.rank] * root[..., None])
        dense = weight.to(torch.float64)
        return float((kron_sum(self.A.double(), self.blocks.double()) - dense).norm() / dense.norm())

    def check_dtype(self, x: Tensor) -> None:
        """Refuse inputs of another dtype than the weight's, where autocast does not cast.

        Raises:
            ShapeError: names the dtypes and the shape.
        """
        if x.dtype == self.A.dtype or (x.is_floating_point() and autocasts(x.device)):
            return
        name = type(self).__name__
        raise ShapeError(f"{name} holds {self.A.dtype} and takes the same, got {x.dtype} of shape {tuple(x.shape)}")

    def fill(self, made: Any) -> Any:
        """Give a plain layer that was built on meta this weight and bias, dtype and mode; return it."""
        trained = any(p.requires_grad for n, p in self.named_parameters() if n != "bias")
        made.weight = Parameter(self.weight.detach().clone(), requires_grad=trained)
        if self.bias is not None:
            made.bias = Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return made.train(self.training)

    def words(self) -> str:
        """Show what all these layers have."""
        kind = "learned" if isinstance(self.A, Parameter) else "fixed"
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"n={self.n}, algebra={kind}{rank}, bias={self.bias is not None}"

    @property
    def _draws_algebra(self) -> bool:
        return self.owns_algebra and isinstance(self.A, Parameter)

    def _draw(self, std: float) -> None:
        """Give A entries of variance 1/n (each output block exactly n in all), and F the spread."""
        if self._draws_algebra:
            if self.init == "algebra":
                basis = torch.tensor(ALGEBRAS[{1: "real", 2: "complex", 4: "quaternion"}[self.n]])
                self.A.copy_(basis).add_(torch.randn_like(self.A), alpha=NOISE)
            else:
                nn.init.normal_(self.A)
            self.A.mul_(math.sqrt(self.n) / self.A.square().sum([0, 2 - self.out_dim], keepdim=True).sqrt())
        # A tensor, not a number: it exists on the meta device too.
        gain = std / (self.A.square().sum() / self.n**2).sqrt()
        *rest, last = self._contents()
        last.copy_(torch.randn_like(last) * gain)
        for tensor in rest:
            nn.init.normal_(tensor, std=tensor.shape[-1] ** -0.5)

    def _contents(self) -> list[Tensor]:
        return [self.F] if self.rank is None else [self.left, self.right]

    def _apply(self: K, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> K:
        # torch gives each module its own new parameter when the device type changes, as to_empty() after meta does:
        # the first of several layers that share an algebra leaves a note on the old one where the new one is.
        old = self.A
        super()._apply(fn, recurse)
        if isinstance(old, Parameter) and self.A is not old:
            moved = getattr(old, "_moved_to", None)
            if moved is not None and (moved.device, moved.dtype) == (self.A.device, self.A.dtype):
                self.A = moved
            else:
                old._moved_to = self.A  # type: ignore[attr-defined]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles form their own weight.
        return {**self.__dict__, "_held": None}


class _Held:
    """A weight that was formed, and what it was formed from."""

    def __init__(self, sources: Sequence[Tensor], weight: Tensor) -> None:
        self.sources, self.weight = sources, weight
        # Aliases: they keep the memory from being given to another tensor, so that equal addresses mean equal tensors.
        self.seen = [(t.detach(), t._version) for t in sources]

    def fits(self, sources: Sequence[Tensor]) -> bool:
        """Whether these are the very tensors, unchanged."""
        return all(
            new is old and new._version == version and new.data_ptr() == alias.data_ptr() and new.dtype == alias.dtype
            for new, old, (alias, version) in zip(sources, self.sources, self.seen, strict=True)
        )


def check_sizes(name: str, out: int, inputs: int, n: int) -> None:
    """Refuse sizes that n does not divide.

    Raises:
        ShapeError: names both sizes and the next n that divides them.
    """
    if min(out, inputs, n) < 1:
        raise ShapeError(f"{name}: sizes must be positive, got {inputs} inputs, {out} outputs, n={n}")
    if out % n or inputs % n:
        raise ShapeError(
            f"{name}: n={n} must divide the {inputs} inputs and the {out} outputs; the next n that does is "
            f"{next_n(out, inputs, n)}"
        )


def next_n(out: int, inputs: int, n: int) -> int:
    """Return the number nearest to n (the larger of two) that divides both sizes."""
    both = math.gcd(out, inputs)
    return min((d for d in range(1, both + 1) if both % d == 0), key=lambda d: (abs(d - n), -d))


def _algebra(name: str, n: int, algebra: AlgebraOption, init: Init) -> Tensor:
    """Return A: a parameter still to be drawn, or the numbers that stay."""
    if isinstance(algebra, str) and algebra == "learned":
        if init == "algebra" and n not in (1, 2, 4):
            raise RecipeError(
                f"{name}: init='algebra' starts at a known algebra; there is one for n = 1, 2, 4, not {n}"
            )
        return Parameter(torch.empty(n, n, n))
    if isinstance(algebra, str) and algebra not in ALGEBRAS:
        known = ("learned", *ALGEBRAS)
        raise RecipeError(
            f"{name}: no algebra is called {algebra!r}{nearest(algebra, known)}; known: {', '.join(known)}"
        )
    if init == "algebra":
        raise RecipeError(f"{name}: init='algebra' says where a learned algebra starts, this one is fixed")
    numbers = ALGEBRAS[algebra] if isinstance(algebra, str) else algebra
    try:
        fixed = torch.as_tensor(numbers, dtype=torch.get_default_dtype()).detach().clone()
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{name}: the algebra must be n x n x n numbers: {error}") from error
    if fixed.shape != (n, n, n):
        what = f"the {algebra} algebra" if isinstance(algebra, str) else "the algebra given"
        raise ShapeError(f"{name}: {what} has the shape {tuple(fixed.shape)}, n={n} needs {(n, n, n)}")
    if not fixed.is_meta and not (torch.isfinite(fixed).all() and fixed.any()):
        raise ShapeError(f"{name}: the algebra given is all zero or not finite: nothing would come through")
    return fixed


def _shared(name: str, n: int, algebra: AlgebraOption, other: nn.Module) -> Tensor:
    if not isinstance(other, KroneckerWeight):
        raise RecipeError(f"{name}: algebra_from must be a hypercomplex layer, got a {type(other).__name__}")
    if not isinstance(algebra, str) or algebra != "learned":
        raise RecipeError(f"{name}: algebra and algebra_from are both given: which one?")
    if other.n != n:
        raise ShapeError(f"{name}: n={n}, but the algebra of the {type(other).__name__} it shares has n={other.n}")
    return other.A
