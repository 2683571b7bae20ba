"""AnatCL's encoder and losses against straightforward ports of the public implementations.

The encoder port is EIDOSLAB/AnatCL's 3-D ResNet-18, operation by operation, with the same weights. The loss port does
what EIDOSLAB/contrastive-brain-age-prediction does: masks, the largest logit of a row taken off, exponentials summed by
hand, and in the threshold mode everything for every triple of rows at once. Memory: bytes that autograd keeps and the
largest tensor, counted, so the machine has no part in it.

Run: OMP_NUM_THREADS=1 python -m benchmarks anatcl
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Row, forward, pair, training, write
from lamina.models import load_anatcl, resnet3d_18
from lamina.objectives import rbf
from lamina.objectives.contrastive import Mode, anchor_losses


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv3d(channels, width, 1, stride, bias=False), nn.BatchNorm3d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Reference(nn.Module):
    """The public ResNet-18 on volumes; the names of its weights are the official ones."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(3, 2, 1)
        channels = width
        for stage in range(4):
            out = width << stage
            blocks = [Block(channels, out, 2 if stage else 1), Block(out, out, 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            channels = out
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        return torch.flatten(self.avgpool(x), 1)


def public_loss(z: Tensor, w: Tensor, mode: Mode, temperature: float = 0.1) -> Tensor:
    """The released loss of normalised rows, as it is computed there."""
    rows = len(z)
    off = torch.scatter(torch.ones_like(w), 1, torch.arange(rows).view(-1, 1), 0)
    s = torch.div(torch.matmul(z, z.T), temperature)
    s = s - torch.max(s, dim=1, keepdim=True).values.detach()
    repelled = torch.exp(s) * off
    if mode == "threshold":
        delta = (w[:, :, None] - w[:, None, :] > 0.0).float().permute(1, 0, 2)
        repelled = (repelled.unsqueeze(-1).repeat(1, 1, rows) * delta).sum(-1)
    elif mode == "exp":
        repelled = torch.exp(s * (1 - w)) * off
    uniformity = torch.log(repelled.sum(1, keepdim=True))
    positive = w * off
    return -((positive * (s - uniformity)).sum(1) / positive.sum(1)).mean()


def our_loss(z: Tensor, w: Tensor, mode: Mode) -> Tensor:
    losses, counted = anchor_losses(z, w, mode, official_shift=True)
    return losses.sum() / counted.sum().clamp(min=1)


class Largest(TorchDispatchMode):
    """Note the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def megabytes(loss: Callable[[], Tensor]) -> float:
    """Bytes that the forward pass leaves for the backward pass, or the largest tensor where that is more."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss()
    return max(sum(kept.values()), largest.bytes) / 2**20


def memory_row(what: str, ours: Callable[[], Tensor], peer: Callable[[], Tensor], row: Row) -> Row:
    mine, theirs = megabytes(ours), megabytes(peer)
    print(f"{what}: {mine:.2f} MB / {theirs:.2f} MB = {mine / theirs:.3f}", flush=True)
    ratio = mine / theirs
    return dataclasses.replace(row, what=what, ratio=ratio, spread=(ratio, ratio), megabytes=(mine, theirs))


def encoders(rows: list[Row]) -> None:
    for width, side, batch in ((64, 32, 1), (8, 32, 16)):
        peer, ours = Reference(width).eval(), resnet3d_18(width=width).eval()
        load_anatcl(peer.state_dict(), ours)
        x = torch.randn(batch, 1, side, side, side)
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-4)
        names = (f"resnet3d_18, width {width}", "the public 3-D ResNet-18")
        what = f"{side}^3 voxels, batch {batch}"
        rows.append(pair(f"forward, {what}", forward(ours, x), forward(peer, x), names=names, goal="<= 1.0"))
        ours.train(), peer.train()
        if batch > 1:
            what = f"forward and backward, {what}"
            rows.append(pair(what, training(ours, x), training(peer, x), names=names, goal="<= 1.0", rounds=21))
            compiled = torch.compile(ours.eval(), fullgraph=True)
            alone = (f"{names[0]}, compiled", names[0])
            what = f"forward, {side}^3 voxels, batch {batch}"
            rows.append(pair(what, forward(compiled, x), forward(ours, x), names=alone, goal="< 1.0", warmup=3))  # type: ignore[arg-type]


def losses(rows: list[Row]) -> None:
    for mode, count in (("exp", 64), ("exp", 512), ("y_aware", 512), ("threshold", 64), ("threshold", 256)):
        z = F.normalize(torch.randn(count, 128), dim=1).requires_grad_()
        w = rbf(60 * torch.rand(count), 5.0)

        def step(loss: Callable[..., Tensor], z: Tensor = z, w: Tensor = w, mode: str = mode) -> Callable[[], Tensor]:
            def run() -> Tensor:
                found = loss(z, w, mode)
                torch.autograd.grad(found, z)
                return found

            return run

        ours, peer = step(our_loss), step(public_loss)
        torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-4)
        names = (f"weighted contrastive, {mode}", "the public loss")
        what = f"loss and gradient, {mode}, {count} rows"
        rounds = 15 if mode == "threshold" else 61
        row = pair(what, ours, peer, names=names, goal="<= 1.0", rounds=rounds, warmup=5)
        rows += [row, memory_row(f"memory, {mode}, {count} rows", ours, peer, row)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    losses(rows)
    encoders(rows)
    assert all(math.isfinite(row.ratio) for row in rows)
    write("anatcl", rows)


if __name__ == "__main__":
    main()
