"""RaftMLP-S against a straightforward port of the public implementation, with its weights; and time per multiply-add.

The port does what okojoalg/raft-mlp does, operation by operation: unfolded patches, a rearrangement before and after
every norm and every axis, `nn.Linear` on rows. The Mixer is the usual one (patches by a convolution, `nn.Linear` on the
transposed tokens), B/16 with a token expansion of 2.

Run: OMP_NUM_THREADS=1 python -m benchmarks raft_mlp
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Row, forward, pair, training, write
from lamina.models import RaftMLP, load_raft_mlp, mixer_b16_e2, raft_mlp_s

WIDTHS, DEPTHS, PATCHES = (64, 128, 256, 512), (2, 2, 6, 2), (4, 2, 2, 2)
KERNELS = ((4, 8), (2, 4), (2, 4), (2,))
RAFTS = 2


class Rearrange(nn.Module):
    """Split dimensions, permute, join them again: what an einops pattern does. Without parameters."""

    def __init__(self, split: tuple[int, ...], order: tuple[int, ...], join: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.split, self.order, self.join = split, order, join

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), *self.split).permute(0, *self.order)
        for start, end in self.join:
            x = x.flatten(start, end)
        return x


class Block(nn.Module):
    """x + MLP(norm(x)), the norm between two rearrangements where it is one of tokens."""

    def __init__(self, features: int, expansion: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm, hidden = norm, expansion * features
        layers = nn.Linear(features, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, features), nn.Dropout(0.0)
        self.fn = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x)) + x


def raft_norm(width: int, side: int, across: int) -> nn.Sequential:
    """Norm of b (co across) (chw side): to positions, channels last, and back."""
    co = width // RAFTS
    there = Rearrange((co, across, RAFTS, side), (2, 4, 1, 3), ((1, 2), (2, 3)))
    back = Rearrange((across, side, co, RAFTS), (3, 1, 4, 2), ((1, 2), (2, 3)))
    return nn.Sequential(there, nn.LayerNorm(width), back)


def raft_block(width: int, h: int, w: int) -> nn.Sequential:
    co = width // RAFTS
    return nn.Sequential(
        Rearrange((h, w, RAFTS, co), (4, 2, 3, 1), ((1, 2), (2, 3))),
        Block(RAFTS * h, 2, raft_norm(width, h, w)),
        Rearrange((co, w, RAFTS, h), (1, 4, 3, 2), ((1, 2), (2, 3))),
        Block(RAFTS * w, 2, raft_norm(width, w, h)),
        Rearrange((co, h, RAFTS, w), (2, 4, 3, 1), ((1, 2), (2, 3))),
        Block(width, 4, nn.LayerNorm(width)),
    )


class Windows(nn.Module):
    """Unfold every kernel, join, one linear layer."""

    def __init__(self, channels: int, width: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.unfolds = [(k, kernels[0], (k - kernels[0]) // 2) for k in kernels]
        self.fc = nn.Linear(channels * sum(k * k for k in kernels), width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.unfold(x, k, stride=s, padding=p).transpose(1, 2) for k, s, p in self.unfolds]
        return self.fc(torch.cat(parts, dim=2))


class Level(nn.Module):
    def __init__(self, channels: int, width: int, depth: int, kernels: tuple[int, ...], side: int) -> None:
        super().__init__()
        blocks = [raft_block(width, side, side) for _ in range(depth)]
        map_of = Rearrange((side, side, width), (3, 1, 2), ())
        self.fn = nn.Sequential(Windows(channels, width, kernels), nn.Identity(), *blocks, map_of)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


class Reference(nn.Module):
    """RaftMLP-S at 224 pixels, as published; the names of its weights are the official ones."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        levels, channels, side = [], 3, 224
        for width, depth, patch, kernels in zip(WIDTHS, DEPTHS, PATCHES, KERNELS, strict=True):
            side //= patch
            levels.append(Level(channels, width, depth, kernels, side))
            channels = width
        self.levels = nn.Sequential(*levels)
        self.heads = nn.ModuleList([nn.Sequential(nn.Identity(), nn.LayerNorm(channels))])
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.heads[0](self.levels(x).permute(0, 2, 3, 1)).mean((1, 2)))


class MixerLayer(nn.Module):
    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """The usual MLP-Mixer B/16."""

    def __init__(self, width: int = 768, depth: int = 12, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*(MixerLayer(width, 196) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


def macs(model: nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() // 2


def per_mac(row: Row, ours: nn.Module, peer: nn.Module) -> Row:
    """Turn a ratio of times into one of times per multiply-add."""
    share = macs(ours) / macs(peer)
    low, high = (r / share for r in row.spread)
    changed = dataclasses.replace(row, ratio=row.ratio / share, spread=(low, high))
    print(f"  per multiply-add: {changed.ratio:.3f} [{low:.3f}, {high:.3f}], at {share:.3f} of the multiply-adds")
    return changed


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peer, ours = Reference().eval(), raft_mlp_s(drop_path=0.0).eval()
    load_raft_mlp(peer.state_dict(), ours)
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-4)
    names, rows = ("raft_mlp_s", "the public RaftMLP-S"), []
    for batch in (1, 4):
        x, what = torch.randn(batch, 3, 224, 224), f"forward, 224 pixels, batch {batch}"
        rows.append(pair(what, forward(ours, x), forward(peer, x), names=names, goal="<= 1.0", warmup=3))
    what = "forward and backward, 224 pixels, batch 4"
    rows.append(pair(what, training(ours, x), training(peer, x), names=names, goal="<= 1.0", rounds=11))
    compiled, theirs = (torch.compile(m, fullgraph=True) for m in (ours, peer))
    both = tuple(f"{n}, compiled" for n in names)
    what = "forward, 224 pixels, batch 4"
    rows.append(pair(what, forward(compiled, x), forward(theirs, x), names=both, goal="<= 1.0", warmup=3))  # type: ignore[arg-type]
    alone = (both[0], names[0])
    rows.append(pair(what, forward(compiled, x), forward(ours, x), names=alone, goal="< 1.0", warmup=3))
    mixer, own = Mixer().eval(), mixer_b16_e2(drop_path=0.0).eval()
    raft = RaftMLP((768,), (12,), patches=(16,), embedding="patch").eval()
    x = torch.randn(1, 3, 224, 224)
    for name, model in (("mixer_b16_e2", own), ("raft_mlp, 12 x 768, r = 2", raft), ("raft_mlp_s", ours)):
        what = f"{name}: forward a multiply-add, 224 pixels, batch 1"
        row = pair(what, forward(model, x), forward(mixer, x), names=(name, "MLP-Mixer B/16"), goal="<= 1.0", warmup=3)
        rows.append(per_mac(row, model, mixer))
    write("raft_mlp", rows)


if __name__ == "__main__":
    main()
