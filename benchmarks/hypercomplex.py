"""Hypercomplex layers against torch's dense ones and against the official way to form the weight; time and memory.

The official way (HyperNets, `layers/ph_layers.py`): all n products of A[i] and F[i] side by side, summed; or one
torch.kron a term, added up. Both are written here, as its package is not on PyPI.

Run: OMP_NUM_THREADS=1 python -m benchmarks hypercomplex
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import profile

from benchmarks.harness import Row, pair, write
from lamina.nn import PHConv2d, PHMLinear


class Official(nn.Module):
    """The layer of a weight that is formed by n-fold products, or term by term with torch.kron."""

    def __init__(self, ours: nn.Module, terms: bool) -> None:
        super().__init__()
        self.A, self.F, self.bias = (nn.Parameter(t.detach().clone()) for t in (ours.A, ours.F, ours.bias))
        self.terms = terms

    def formed(self) -> Tensor:
        n, p, q, *kernel = self.F.shape
        if self.terms:
            flat = self.F.reshape(n, p, -1) if not kernel else self.F
            ones = [1] * len(kernel)
            return sum(torch.kron(a.view(n, n, *ones), f) for a, f in zip(self.A, flat, strict=True))
        products = self.A[:, :, None, :, None, None] * self.F.reshape(n, 1, p, 1, q, -1)
        return products.sum(0).reshape(n * p, n * q, *kernel)

    def forward(self, x: Tensor) -> Tensor:
        if self.F.dim() == 3:
            return functional.linear(x, self.formed(), self.bias)
        return functional.conv2d(x, self.formed(), self.bias, padding=1)


def training(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    tangent = torch.ones_like(layer(x))

    def run() -> object:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(tangent)
        return x.grad

    return run


def inference(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    layer.eval()

    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def peak(run: Callable[[], object]) -> int:
    """Return the most bytes that were alive at once of those the run allocated."""
    run()
    with profile(profile_memory=True) as recorded:
        run()
    alive = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def memory(what: str, ours: nn.Module, dense: nn.Module, x: Tensor) -> Row:
    """Compare what one training step allocates beyond the dense layer's, in units of the dense weight."""
    bytes_ours, bytes_dense = peak(training(ours, x)), peak(training(dense, x))
    weight = dense.weight.numel() * dense.weight.element_size()
    ratio = (bytes_ours - bytes_dense) / weight
    print(f"{what}: {bytes_ours} - {bytes_dense} bytes = {ratio:.2f} dense weights (goal <= 2)", flush=True)
    what, names = f"{what}: extra peak bytes / bytes of the dense weight", (type(ours).__name__, type(dense).__name__)
    megabytes = (bytes_ours / 1e6, bytes_dense / 1e6)
    return Row(what, *names, ratio, (ratio, ratio), "<= 2", (0.0, 0.0), megabytes=megabytes)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    x, tokens = torch.randn(8, 512, 14, 14), torch.randn(1024, 512)
    conv, dense = PHConv2d(512, 512, 3, n=4, padding=1), nn.Conv2d(512, 512, 3, padding=1)
    linear, plain = PHMLinear(512, 2048, n=4), nn.Linear(512, 2048)
    for name, options in (("n-fold products", {"terms": False}), ("torch.kron", {"terms": True})):
        for layer, where in ((conv, x), (linear, tokens[:8])):
            official = Official(layer, **options)
            torch.testing.assert_close(official(where), layer(where), rtol=1e-3, atol=1e-3)
            names = (type(layer).__name__, f"official, {name}")
            what = "512->512 3x3, batch 8, forward and backward"
            if layer is linear:
                what, where = "512->2048, 256 rows, forward and backward", tokens[:256]
            rows.append(
                pair(what, training(layer, where), training(official, where), names=names, goal="< 1", rounds=9)
            )
    what = "512->512 3x3, n=4, batch 8, 14x14, forward and backward"
    names = ("PHConv2d", "nn.Conv2d")
    rows.append(pair(what, training(conv, x), training(dense, x), names=names, goal="<= 1.2", rounds=15))
    rows.append(memory(what, conv, dense, x))
    names = ("PHMLinear", "nn.Linear")
    small, small_plain = PHMLinear(128, 512, n=4), nn.Linear(128, 512)
    for ours, peer, given in (
        (linear, plain, tokens),
        (linear, plain, tokens[:256]),
        (linear, plain, tokens[:32]),
        (small, small_plain, tokens[:, :128]),
    ):
        what = f"{ours.in_features}->{ours.out_features}, n=4, {len(given)} rows, forward and backward"
        runs = training(ours, given), training(peer, given)
        rows.append(pair(what, *runs, names=names, goal="<= 1.3", rounds=31))
    rows.append(memory("512->2048, n=4, 1024 rows, forward and backward", linear, plain, tokens))
    for given in (tokens[:1], tokens):
        what = f"512->2048, n=4, {len(given)} rows, inference"
        runs = inference(linear, given), inference(plain, given)
        rows.append(pair(what, *runs, names=names, goal="<= 1.3", rounds=41))
    write("hypercomplex", rows)


if __name__ == "__main__":
    main()
