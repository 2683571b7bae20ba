"""Terminator against a straightforward port of the released definitions, with its weights; and both ways of convolving.

The port does what the released code does, operation by operation: every sine filter and every context filter of a slow
net is a 1 x 1 convolution of its own, earlier outputs are tiled before they are joined, every standardisation is a
layer of its own, group by group, and local kernels always go by torch's convolution.

Run: OMP_NUM_THREADS=1 python -m benchmarks hyperzzw
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, forward, pair, training, write
from lamina.models import Terminator
from lamina.nn import CoordinateKernel, HyperZZWLocal, RecursiveGatedUnit, SFNEBlock, depthwise_convolution
from lamina.nn.hyper_convolution.gates import HyperChannelInteraction, HyperInteraction

CONVOLVE = {1: F.conv1d, 2: F.conv2d}


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return CONVOLVE[x.dim() - 2](x, weight.view(*weight.shape[:2], *[1] * (x.dim() - 2)), bias)


def slow(net: CoordinateKernel, context: Tensor | None = None) -> Tensor:
    axes = [torch.linspace(-1 if n > 1 else 0, 1, n) for n in net.size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    filters = zip(net.waves.weight.chunk(net.layers + 1), net.waves.bias.chunk(net.layers + 1), strict=True)
    sines = [torch.sin(pointwise(grid, w, b)) for w, b in filters]
    z = sines[0]
    for i, mix in enumerate(net.mixes):
        z = sines[i + 1] * pointwise(z, mix.weight, mix.bias) + net.position_bias  # type: ignore[arg-type]
        if context is not None:
            z = z.detach() + 0.1 * F.normalize(z.flatten(2), dim=-1).view(z.shape)
            filter_of = net.contexts[i]
            z = z * pointwise(context, filter_of.weight, filter_of.bias)  # type: ignore[arg-type]
    return pointwise(z, net.out.weight, net.out.bias)


def local(m: HyperZZWLocal, x: Tensor, y: Tensor) -> Tensor:
    u = m.context_in(F.adaptive_avg_pool2d(x, m.kernel.size[0])).mean(0, keepdim=True)
    kernel = slow(m.kernel, F.gelu(m.context_out(u)))
    side = kernel.shape[-1]
    y = F.conv2d(y, kernel.transpose(0, 1), padding=side // 2, groups=y.shape[1])
    return F.gelu(F.batch_norm(m.mix(y), None, None, training=True)) + m.bias


def unit(m: RecursiveGatedUnit, x: Tensor) -> Tensor:
    return m.out(F.gelu(F.instance_norm(m.key(x) * m.query(m.value(x)))) + m.position_bias)


def channel_gate(m: HyperChannelInteraction, x: Tensor) -> Tensor:
    return x * torch.sigmoid(slow(m.kernel).view(1, -1, 1, 1) * x.mean((2, 3), keepdim=True) ** 2)


def gate(m: HyperInteraction, y: Tensor, x: Tensor) -> Tensor:
    channels = slow(m.channels).view(1, -1, 1, 1) * y.mean((2, 3), keepdim=True) ** 2
    return x * torch.sigmoid(channels * (slow(m.positions) * y.mean(1, keepdim=True) ** 2))


def grouped(x: Tensor, groups: int) -> Tensor:
    parts = x.chunk(groups, 1)
    done = [
        F.instance_norm(p) if i % 2 else F.batch_norm(p, None, None, training=True)  # type: ignore[arg-type]
        for i, p in enumerate(parts)
    ]
    return torch.cat(done, 1)


def block(m: SFNEBlock, x: Tensor, skips: list[Tensor]) -> Tensor:
    context = x * slow(m.slow)
    fast = F.instance_norm(unit(m.unit_of_slow, context) + unit(m.unit, x))
    mx, hc = F.instance_norm(m.project(x)), F.instance_norm(channel_gate(m.channel_gate, x))
    o, ox, oh = context @ fast, context @ mx, context @ hc
    parts = [fast, o, ox, torch.sigmoid(o) * o, oh]
    for one, (a, b) in zip(m.locals, ((x, hc), (hc, x), (mx, x), (x, mx)), strict=True):
        assert isinstance(one, HyperZZWLocal)
        parts.append(local(one, a, b))
    parts.append(gate(m.gate, o, x))
    parts += [s.repeat(1, m.width // s.shape[1], 1, 1) for s in skips]
    return F.gelu(grouped(m.join(torch.cat(parts, 1)), m.norm.groups)) + m.bias


class Port(nn.Module):
    """The released way, on the weights of a Terminator without dropout."""

    def __init__(self, model: Terminator) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for m, skips in zip(self.model.blocks, self.model.skips, strict=True):
            assert isinstance(m, SFNEBlock)
            x = block(m, x, [outputs[j] for j in skips])
            outputs.append(x)
        return self.model.head(x.mean((2, 3)))


def ways(side: int, kernel_side: int, *, learns: bool) -> Row:
    x, kernel = torch.randn(4, 32, side, side), torch.randn(32, kernel_side, kernel_side)

    def run(path: str) -> Callable[[], object]:
        def once() -> object:
            with torch.set_grad_enabled(learns):
                y = depthwise_convolution(x.requires_grad_(learns), kernel.requires_grad_(learns), path)  # type: ignore[arg-type]
                return y.sum().backward() if learns else y

        return once

    what = f"depthwise, {side} x {side} by {kernel_side} x {kernel_side}, " + ("and backward" if learns else "forward")
    return pair(what, run("auto"), run("direct"), names=("auto", "direct"), goal="<= 1.0", rounds=11)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Terminator(dropout=0.0).eval()
    port = Port(model).eval()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x), port(x), rtol=1e-3, atol=1e-3)
    names, rows = ("terminator", "the released Terminator"), []
    for batch in (1, 4):
        what, x = f"forward, 32 pixels, batch {batch}", torch.randn(batch, 3, 32, 32)
        rows.append(pair(what, forward(model, x), forward(port, x), names=names, goal="<= 1.0", rounds=11))
    what = "forward and backward, 32 pixels, batch 4"
    rows.append(pair(what, training(model, x), training(port, x), names=names, goal="<= 1.0", rounds=5, warmup=1))
    for learns in (False, True):
        rows += [ways(*sizes, learns=learns) for sizes in ((16, 7), (32, 9), (32, 11), (32, 31))]
    write("hyperzzw", rows)  # Compilation takes minutes.
    compiled = torch.compile(model, fullgraph=True)
    alone = ("terminator, compiled", names[0])
    what = "forward, 32 pixels, batch 4"
    rows.append(pair(what, forward(compiled, x), forward(model, x), names=alone, goal="< 1.0", rounds=11))
    write("hyperzzw", rows)
    what = "forward and backward, 32 pixels, batch 4"
    rows.append(pair(what, training(compiled, x), training(model, x), names=alone, goal="< 1.0", rounds=5, warmup=1))
    write("hyperzzw", rows)


if __name__ == "__main__":
    main()
