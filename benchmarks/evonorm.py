"""EvoNorm against what it takes the place of, compiled: forward and backward of one layer; and what it keeps in eager.

The literal formula is the layer as other libraries write it (timm's, for one): op by op, autograd keeps every step.
Memory is what autograd saves between forward and backward, each storage once.

Run: OMP_NUM_THREADS=1 python -m benchmarks evonorm
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.nn import EvoNorm2d

SHAPE = (8, 64, 56, 56)


class Literal(nn.Module):
    """S0 or B0 written down op by op."""

    def __init__(self, channels: int, variant: str) -> None:
        super().__init__()
        self.variant, self.groups, self.eps = variant, 32, 1e-5
        self.weight, self.v1 = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        v1 = self.v1.view(shape)
        if self.variant == "s0":
            grouped = x.reshape(x.shape[0], self.groups, -1)
            spread = (grouped.var(2, correction=0) + self.eps).sqrt()
            spread = spread.repeat_interleave(x.shape[1] // self.groups, 1)[:, :, None, None]
            unit = x * (x * v1).sigmoid() / spread
        else:
            batch = x.var((0, 2, 3), correction=0)
            self.running_var.copy_(self.running_var * 0.9 + 0.1 * batch.detach())
            instance = (x.var((2, 3), correction=0, keepdim=True) + self.eps).sqrt()
            unit = x / (batch + self.eps).sqrt().view(shape).max(x * v1 + instance)
        return unit * self.weight.view(shape) + self.bias.view(shape)


def step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    direction = torch.randn_like(x)

    def run() -> None:
        x.grad = None
        layer(x).backward(direction)

    return run


def kept(layer: nn.Module, x: Tensor) -> float:
    """Megabytes that autograd saves."""
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    return sum(found.values()) / 1e6


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(SHAPE[1]), nn.SiLU())


def compiled(layer: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(layer)  # type: ignore[assignment]
    return made


def memory(variant: str, x: Tensor, name: str, peer: nn.Module, goal: str) -> Row:
    ours, theirs = kept(EvoNorm2d(SHAPE[1], variant), x), kept(peer, x)  # type: ignore[arg-type]
    ratio = ours / theirs
    what = f"kept for the backward pass, eager, {SHAPE}"
    print(f"{what}: evonorm {variant} / {name} = {ratio:.3f}  (goal {goal})", flush=True)
    return Row(what, f"evonorm {variant}", name, ratio, (ratio, ratio), goal, (0.0, 0.0), megabytes=(ours, theirs))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    for layout, goal in ((torch.contiguous_format, "<= 1.3"), (torch.channels_last, "<= 1.3")):
        x = torch.randn(SHAPE).to(memory_format=layout).requires_grad_()
        word = "channels_last" if layout is torch.channels_last else "contiguous"
        for variant in ("s0", "b0"):
            torch.compiler.reset()
            ours = step(compiled(EvoNorm2d(SHAPE[1], variant)), x)  # type: ignore[arg-type]
            peer = step(compiled(batch_norm()), x)
            what = f"forward and backward, compiled, {SHAPE}, {word}"
            rows.append(
                pair(what, ours, peer, names=(f"evonorm {variant}", "BatchNorm2d and SiLU"), goal=goal, rounds=11)
            )
            if layout is torch.contiguous_format:
                names = (f"evonorm {variant}, compiled", "literal formula, eager")
                what = f"forward and backward, {SHAPE}, {word}"
                rows.append(
                    pair(what, ours, step(Literal(SHAPE[1], variant), x), names=names, goal="<= 0.67", rounds=9)
                )
                names = (f"evonorm {variant}, eager", "literal formula, eager")
                eager = step(EvoNorm2d(SHAPE[1], variant), x)  # type: ignore[arg-type]
                rows.append(pair(what, eager, step(Literal(SHAPE[1], variant), x), names=names, goal="-", rounds=9))
    x = torch.randn(SHAPE, requires_grad=True)
    for variant in ("s0", "b0"):
        rows.append(memory(variant, x, "literal formula", Literal(SHAPE[1], variant), "<= 0.67"))
        rows.append(memory(variant, x, "BatchNorm2d and SiLU", batch_norm(), "<= 1"))
    write("evonorm", rows)


if __name__ == "__main__":
    main()
