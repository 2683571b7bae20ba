"""The Fourier head against a linear head of as many bins, and against the paper's own way to compute it.

Run: OMP_NUM_THREADS=1 python -m benchmarks fourier_head
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, forward, pair, write
from lamina.nn import FourierHead


class GroupedConvolutionHead(nn.Module):
    """The algorithm as published: the autocorrelation as a complex convolution with a group a row, then the series."""

    def __init__(self, linear: nn.Linear, bins: int) -> None:
        super().__init__()
        self.linear = linear
        frequencies = torch.arange(1, linear.out_features // 2)
        centres = -1 + (2 * torch.arange(bins) + 1) / bins
        self.register_buffer("waves", torch.exp(1j * math.pi * frequencies[:, None] * centres))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.complex(*self.linear(x).chunk(2, -1))
        count = a.shape[-1]
        c = F.conv1d(a[None], a[:, None].conj().resolve_conj(), padding=count - 1, groups=len(a))[0, :, count - 1 :]
        p = 0.5 + ((c[:, 1:] / c[:, :1].real) @ self.waves).real
        return (p / p.sum(-1, keepdim=True) + 1e-5).log()


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward, cross-entropy, backward to weights and input."""
    x = x.clone().requires_grad_()
    bins = model(x[:1]).shape[-1]
    labels = torch.arange(len(x)) % bins

    def run() -> object:
        model.zero_grad()
        x.grad = None
        F.cross_entropy(model(x), labels).backward()
        return x.grad

    return run


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    for width, frequencies in ((512, 550), (384, 550), (512, 64)):
        x, ours, peer = torch.randn(256, width), FourierHead(width, 4096, frequencies), nn.Linear(width, 4096)
        for what, make in (("forward", forward), ("forward and backward", step)):
            title = f"{what}, 4096 bins, {frequencies} frequencies, width {width}, 256 rows"
            names = ("FourierHead", "nn.Linear")
            rows.append(pair(title, make(ours, x), make(peer, x), names=names, goal="<= 1.2", rounds=15))
    x, ours = torch.randn(4096, 64), FourierHead(64, 256, 64)
    published = GroupedConvolutionHead(ours.linear, 256)
    torch.testing.assert_close(published(x).exp(), ours(x).exp(), rtol=0, atol=1e-6)
    names = ("FourierHead", "autocorrelation by grouped convolution")
    what = "forward, 256 bins, 64 frequencies, 4096 rows"
    rows.append(pair(what, forward(ours, x), forward(published, x), names=names, goal="<= 0.1", rounds=5, warmup=1))
    write("fourier_head", rows)


if __name__ == "__main__":
    main()
