"""EvoNorm: evolved layers that normalise and activate in one, and the pass that puts them into a convolutional net.

What for: replacing every batch norm and the ReLU after it by one layer. The B variants use batch statistics; the S
variants use one example alone: no running statistics, no difference between training and evaluation, nothing to
synchronise, batch size 1. Smallest use:

    model = rewrite(model, ReplaceNormActivation(options={"variant": "s0"}))       # any net that torch.fx can trace
    print(ReplaceNormActivation().decide(model).table())                           # only look
    layer = EvoNorm2d(64, "b0")                                                    # in place of BatchNorm2d and ReLU

or in a recipe: `rewrite: [{name: replace_norm_activation, options: {variant: b0}}]`, or, in a model with slots,
`norm: {name: evonorm, variant: s0}` with `activation: identity`.

How it works: B0 divides x by the larger of the batch's deviation and v1 * x plus the image's own deviation; S0 divides
x * sigmoid(v1 * x) by the deviation of a group of channels; gain and shift follow. None subtracts a mean. The pass
traces the model: a norm that one activation alone reads becomes EvoNorm, the activation an identity (where it is a
function or shared, the block that calls it is re-traced without that call); a norm without one keeps gain and shift.
Between forward and backward only x is kept, the rest is computed again.

What is measured: a pre-activation net of three residual blocks (32, 64, 64 channels) on scikit-learn's digits, 600 to
train on. `accuracy`: S0 (ours) and batch norm with ReLU (baseline) at batch 50, in percent of the rest; `accuracy_
batch_1`: at batch 1, where a batch norm trains on the statistics of one image and is evaluated with others. Reported
beside: group norm with ReLU, B0, and all four at batch 2. The paper's claim, EvoNorm above both, is about ImageNet; at
this size it was not seen when the bar was set, so the bar at batch 50 allows a loss of 0.7 points.

What was found (three seeds): not reproduced at this size. At batch 1 S0 keeps its accuracy (96 against 45 to 83, 29
points ahead in the mean), at batch 50 it is 1.9 points below batch norm after the 120 steps of the budget, more than
the bar allows; B0 is level with batch norm there. Nothing was tuned after the first run; all variants agree with timm's
layers to rounding, outputs and gradients.

Limits: made for nets with the norm before the convolution; in others (ResNet as published) only the inner pairs fuse
and the paper has no figures. Outputs change at the swap: train afterwards. Channels stand in dimension 1, so it is no
norm for a transformer's tokens. Maps of one position have no variance of their own (a warning). No forward-mode
derivatives. An edited block cannot be pickled. The search that found the layers is not here.

Composes with: LAMB, LARS (gain, shift and slope are not decayed), distillation, `drop_block`, autocast, torch.compile,
torch.func, checkpointing, DDP (statistics per process, or `sync`).
Source: Liu, Brock, Simonyan, Le, Evolving Normalization-Activation Layers (2020), arXiv 2004.02967.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import require
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.rewrite import ReplaceNormActivation, rewrite

PARTS = ("norm evonorm", "pass replace_norm_activation")
TRAINED_ON = 600


@experiment(
    "evonorm",
    source="section 5, tables 4 and 5: drop-in on ImageNet, and S0 at small batches",
    bar="accuracy(ours) - accuracy(baseline) >= -0.7 and accuracy_batch_1(ours) - accuracy_batch_1(baseline) >= 10, "
    "3 seeds",
    seeds=(0, 1, 2),
    budget="3m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train the net with every layer at batch 50 and 2, and S0 and batch norm at batch 1."""
    digits = load_digits(seed, device)
    large = {name: train(network(name, seed), digits, 0.05, 50, 10, seed) for name in ARMS}
    small = {name: train(network(name, seed), digits, 0.005, 2, 4, seed) for name in ARMS}
    single = {name: train(network(name, seed), digits, 0.0025, 1, 3, seed, clip=5.0) for name in ("s0", "bn")}
    extra = {f"batch_50_{name}": large[name] for name in ("gn", "b0")}
    extra |= {f"batch_2_{name}": value for name, value in small.items()}
    ours = {"accuracy": large["s0"], "accuracy_batch_1": single["s0"]}
    baseline = {"accuracy": large["bn"], "accuracy_batch_1": single["bn"]}
    paper = "ImageNet, ResNet-50: BN-ReLU 76.3, B0 77.8; GN-ReLU 75.3, S0 77.1; 4 images a worker: S0 about 76.8"
    return Measurement(ours, baseline, paper, unit="%", extra=extra)


class PreActivationBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm x))))); where the shape changes, the shortcut is a convolution of act(norm x)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.activation1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm2, self.activation2 = nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = stride == 1 and channels == width
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, width, H / stride, W / stride)."""
        active = self.activation1(self.norm1(x))
        around = x if self.shortcut is None else self.shortcut(active)
        return around + self.conv2(self.activation2(self.norm2(self.conv1(active))))


def network(arm: str, seed: int) -> nn.Module:
    """Build the net of one arm, the same weights for all: a stem, three blocks, the last norm, a linear head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1, bias=False),
            PreActivationBlock(32, 32, 1),
            PreActivationBlock(32, 64, 2),
            PreActivationBlock(64, 64, 1),
            *(nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )
    if arm == "gn":
        return _with_group_norm(model)
    return model if arm == "bn" else rewrite(model, ReplaceNormActivation(options={"variant": arm}))


ARMS = ("bn", "gn", "b0", "s0")
"""Batch norm and ReLU, group norm (32 groups, as S0) and ReLU, and two layers that are both."""


def _with_group_norm(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                module.register_module(name, nn.GroupNorm(32, child.num_features))
    return model


@dataclass(frozen=True)
class Digits:
    """Train and test part of scikit-learn's digits: images (N, 1, 8, 8), mean 0 and deviation 1 over training."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits(seed: int, device: torch.device) -> Digits:
    """Load the digits: 600 drawn by the seed to train on, the other 1197 to test."""
    found = require("sklearn.datasets", "experiments").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    kept, rest = order[:TRAINED_ON], order[TRAINED_ON:]
    x, y = torch.tensor(found.images, dtype=torch.float32)[:, None], torch.tensor(found.target)
    x = (x - x[kept].mean()) / x[kept].std()
    return Digits(x[kept].to(device), y[kept].to(device), x[rest].to(device), y[rest].to(device))


def train(
    model: nn.Module, digits: Digits, rate: float, batch: int, epochs: int, seed: int, *, clip: float | None = None
) -> float:
    """Train by SGD with momentum 0.9 at a constant rate; return the accuracy on the test part in percent."""
    model = model.to(digits.x.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    count = len(digits.x) // 10 if smoke() else len(digits.x)
    for _ in range(epochs):
        order = torch.randperm(len(digits.x), generator=generator)[:count].to(digits.x.device)
        for index in order.split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.x[index]), digits.y[index]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    with torch.no_grad():
        return 100 * float((model.eval()(digits.test_x).argmax(1) == digits.test_y).float().mean())
