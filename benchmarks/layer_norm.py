"""Forward and backward of the layer-normalised nets against torch's fused ones and against a scripted plain loop.

Run: OMP_NUM_THREADS=1 python -m benchmarks layer_norm
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.nn import LayerNormGRU, LayerNormLSTM

HIDDEN, STEPS, BATCH = 128, 100, 16


class PlainLoop(nn.Module):
    """An LSTM without norms: one GEMM for the input, then a loop that autograd records; to be scripted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_ih, self.weight_hh = (nn.Parameter(torch.randn(4 * width, width) * 0.08) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.linear(x, self.weight_ih, self.bias)
        h = torch.zeros(x.size(1), self.weight_hh.size(1))
        c = torch.zeros_like(h)
        outputs: list[Tensor] = []
        for t in range(x.size(0)):
            i, f, o, g = (rows[t] + torch.mm(h, self.weight_hh.t())).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs)


def step(net: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        output = net(x)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        net.zero_grad(set_to_none=True)

    return run


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, HIDDEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(PlainLoop(HIDDEN))
    what = f"forward+backward H={HIDDEN} T={STEPS} B={BATCH}"
    lstm, gru = step(LayerNormLSTM(HIDDEN, HIDDEN), x), step(LayerNormGRU(HIDDEN, HIDDEN), x)
    peers: list[tuple[Callable[[], None], Callable[[], None], tuple[str, str], str]] = [
        (lstm, step(nn.LSTM(HIDDEN, HIDDEN), x), ("LayerNormLSTM", "torch.nn.LSTM"), "<= 2.5"),
        (lstm, step(scripted, x), ("LayerNormLSTM", "scripted plain LSTM loop"), "<= 1.5"),
        (gru, step(nn.GRU(HIDDEN, HIDDEN), x), ("LayerNormGRU", "torch.nn.GRU"), "<= 2.5"),
    ]
    rows: list[Row] = [pair(what, a, b, names=n, goal=g, rounds=25, warmup=4) for a, b, n, g in peers]
    write("layer_norm", rows)


if __name__ == "__main__":
    main()
