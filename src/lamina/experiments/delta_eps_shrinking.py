"""DepS: one network is trained once, and cut to any device: fewer blocks, channels and taps, no training again.

What for: a model that has to run on many devices, or under a limit that is not known yet. Instead of training one for
each, one network is trained so that its parts are good too; the part that fits is cut out, an ordinary small model.

    model = rewrite(model, Elastic(depth=(1, 2, 3), expand=(0.25, 0.5)))        # the same function
    objective = Sandwich("classification", start=0.5, ramp=0.05)               # told by the trainer how far it is
    small = cut_out(model, supernet(model).smallest(), data=batches)           # plain, with statistics of its own
    best = pick_subnet(model, accuracy, batch, limit=2e6, data=batches)        # in `lamina.search`: by evolution

or a recipe: `recipes/elastic.yaml` trains, `lamina rewrite MODEL "{name: extract, config: smallest}" --data ...` cuts.
In a loop of your own call `objective.set_progress(fraction)` at every step; `objective.parts` gives the terms one by
one, for the memory of one network.

How it works: `elastic` looks into every block on symbols. Hidden channels that layers of the block make and layers of
the block read, and nothing else, can be fewer: a bottleneck's, an inverted residual's (squeeze and excitation along),
a feed-forward network's (gated ones too). Blocks that add to the stream they are given can be left out, the last ones
of a stage first. Depthwise kernels shrink to their middle, through a learned map of the taps. Which channels come first
is an order by importance; nothing is moved, names, optimizer states and the function stay. `sandwich` then trains the
whole by the labels and, every step, the smallest part and two random ones by the whole's predictions. The paper's point
is when that begins: half way, when there is something to follow, and not at once: the parts' share of the gradient
grows from 0 over a ramp, in terms of the learning rate. Batch norms need statistics of their own in every part.

What is measured: a MobileNet of 8, 12 and 16 channels (two stages of three inverted residuals, depth 1 to 3, expansion
1, 2, 4, kernel 3 or 5) on 2000 images of MNIST, tested on 2000 others, SGD along a cosine. All arms make 1400 forward
and backward passes, of whatever part. `accuracy`: mean over the smallest part, three between and the whole, each with
statistics of its own; ours begins at half (`delayed`), the baseline at once (`early`, as BigNAS does). Beside: at 80 %
(`late`), at half without a ramp (`sudden`), and `jump`, by how much the whole's loss on held-out images (statistics of
its own) rises at most in the 20 steps after the switch.

What was found: not reproduced. Beginning half way gives 87.3 % over the five parts, beginning at once 88.1: -0.8
points [-1.6, -0.1] (bar +3). The small parts are what pays for the delay (79.7 against 82.6 for the smallest), the
whole is level (93.2, 93.0). The claim's own trial had early shrinking at 75 %, its whole at 79: such harm does not
show here, where parts leave the running statistics of the whole alone and are normalised by their batch. Beginning at
80 % is too late (77.9). What the paper says of the ramp holds: with it the whole's loss rises by 0.09 in the 20 steps
after the switch, without it by 0.21; in accuracy the ramp is worth 0.9 points. An earlier run with half the passes and
a warm-up, which the claim does not have, was stopped after one seed that said the same (84.6 against 85.9).

Limits: widths of attention (heads) and of the stream stay. Norms over hidden channels (layer and group norm) keep their
channels together, with the reason in the decision, as do channels that are concatenated, reshaped or read by a grouped
convolution. Blocks that hand on more than one tensor (T5) are never left out. In mode "slice" torch.compile makes one
graph of the whole, and parts run eagerly; in mode "mask" one graph serves all, at the whole's cost. Half of a channel
dimension is rounded to multiples of 8: small nets want `multiple=4`. Progressive shrinking as in Once-for-All (kernels,
then depth, then width, each its own phase) is not here.

Composes with: every optimizer, drop passes before and after it, distillation beside it, `fold` and `calibrate` after
`extract`, LAMB, DDP and FSDP2 (all processes draw the same parts), autocast, export of what is cut out.
Source: Annavajjala, Khare, Agrawal, Fedorov, Latapie, Lee, Tumanov, DepS: Delayed epsilon-Shrinking for Faster
Once-For-All Training (ECCV 2024), arXiv 2407.06167; Cai et al., Once-for-All (ICLR 2020), arXiv 1908.09791.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data import mnist
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.nn import Subnet, supernet
from lamina.objectives import Sandwich
from lamina.optim.schedule import warmup_cosine
from lamina.rewrite import Calibrate, Elastic, cut_out, rewrite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("pass elastic", "pass extract", "objective sandwich")

TRAIN, TEST, BATCH, PASSES, RATE = 2000, 2000, 64, 1400, 0.1
CHANNELS, AFTER = (8, 12, 16), 20
COSINE = {"name": "warmup_cosine", "warmup": 0.0}
NAMES = ("smallest", "second", "third", "fourth", "whole")
Arm = Literal["delayed", "early", "late", "sudden"]
STARTS: dict[Arm, tuple[float, float]] = {
    "delayed": (0.5, 0.05),
    "early": (0.0, 0.0),
    "late": (0.8, 0.05),
    "sudden": (0.5, 0.0),
}
"""When the parts begin to count, and how long before that they are ramped up: fractions of the training."""


@experiment(
    "delta-eps-shrinking",
    source="table 1 and the ablations: when the parts begin to be trained; smallest to largest, mean of the front",
    bar="accuracy(ours) - accuracy(baseline) >= 0.03, 2 seeds",
    seeds=(0, 1),
    budget="10m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train all arms with equally many passes; `accuracy` is the mean of five calibrated parts, early the baseline."""
    arms = {arm: trained(arm, seed, device) for arm in STARTS}
    means = {arm: sum(found.accuracy) / len(found.accuracy) for arm, found in arms.items()}
    extra = {f"{arm}_{name}": a for arm, found in arms.items() for name, a in zip(NAMES, found.accuracy, strict=True)}
    extra |= {f"accuracy_{arm}": means[arm] for arm in ("late", "sudden")}
    extra |= {f"jump_{arm}": arms[arm].jump for arm in ("delayed", "sudden")}
    paper = "ImageNet, MobileNetV3 space: smallest 73.8 %, largest 77.3 % (BigNAS 70.6 %, 74.0 %), with fewer epochs"
    return Measurement({"accuracy": means["delayed"]}, {"accuracy": means["early"]}, paper, extra=extra)


@dataclass(frozen=True)
class Trained:
    """What one arm gave."""

    accuracy: tuple[float, ...]
    """Of the five parts, the smallest first, the whole last; calibrated."""
    multiply_adds: tuple[int, ...]
    """Of an image."""
    jump: float
    """By how much the calibrated whole's loss on held-out images rose at most in the steps after the switch."""


class InvertedResidual(nn.Module):
    """Widen, filter every channel on its own, narrow; the shortcut where shapes allow it."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * into
        self.expand = nn.Sequential(nn.Conv2d(into, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        depthwise = nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        """(B, into, H, W) -> (B, out, H / stride, W / stride)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A stem and two stages of three inverted residual blocks, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        stem, one, two = CHANNELS
        self.stem = nn.Sequential(nn.Conv2d(1, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.stages = nn.Sequential(stage(stem, one), stage(one, two))
        self.head = nn.Linear(two, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> logits (B, 10)."""
        return self.head(self.stages(self.stem(pixel_values)).mean((2, 3)))


def stage(into: int, out: int) -> nn.Sequential:
    """Three blocks, of which the first halves the image."""
    return nn.Sequential(InvertedResidual(into, out, 2), InvertedResidual(out, out, 1), InvertedResidual(out, out, 1))


def steps_of(arm: Arm) -> int:
    """Return how many steps an arm has so that all arms make equally many forward and backward passes."""
    start, ramp = STARTS[arm]
    passes = PASSES // 10 if smoke() else PASSES
    return round(passes / (1 + 3 * (1 - start + ramp)))


@functools.cache
def trained(arm: Arm, seed: int, device: torch.device) -> Trained:
    """Train one arm by SGD with momentum along a cosine; the pass orders the channels when the ramp begins."""
    (x, y), (test_x, test_y) = images(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = MobileNet().to(device).train()
    start, ramp = STARTS[arm]
    steps = steps_of(arm)
    objective = Sandwich("classification", start=start, ramp=ramp, schedule=COSINE, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    switch = round((start - ramp) * steps)
    losses: list[float] = []
    for step in range(steps):
        if step == switch:
            pass_ = Elastic(depth=(1, 2, 3), expand=(1, 2, 4), kernel=(3, 5), multiple=4)
            model = rewrite(model, pass_, optimizer=optimizer)
        if switch <= step <= switch + AFTER and arm in ("delayed", "sudden"):
            losses.append(calibrated_loss(model, x, test_x[:500], test_y[:500]))
        fraction = (step + 1) / steps
        objective.set_progress(fraction)
        for group in optimizer.param_groups:
            group["lr"] = RATE * warmup_cosine(fraction, warmup=0.0)
        rows = torch.randperm(len(x), generator=generator)[:BATCH].to(device)
        optimizer.zero_grad()
        objective(model, {"pixel_values": x[rows], "labels": y[rows]})["loss"].backward()
        optimizer.step()
    data = [{"pixel_values": part} for part in x.split(250)]
    parts = [cut_out(model, part, data) for part in five(model)]
    parts[-1] = calibrated(parts[-1], x)
    counts = supernet(model).costs({"pixel_values": x[:1]})
    accuracy = tuple(float((predicted(p, test_x).argmax(1) == test_y).float().mean()) for p in parts)
    jump = max(losses) - losses[0] if losses else 0.0
    return Trained(accuracy, tuple(counts(part) for part in five(model)), jump)


def five(model: nn.Module) -> list[Subnet]:
    """Return the smallest part, three between, and the whole."""

    def part(depth: int, expand: int, kernel: int) -> Subnet:
        return Subnet((depth,) * 2, (expand,) * 6, (kernel,) * 6)

    return [part(1, 1, 3), part(1, 2, 5), part(2, 2, 3), part(2, 4, 5), supernet(model).full()]


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """Take the statistics of a model's batch norms anew, over all training images."""
    return rewrite(model.eval(), Calibrate(), data=[{"pixel_values": part} for part in x.split(250)])


def calibrated_loss(model: nn.Module, x: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Return the loss of the whole on held-out images, with statistics of its own."""
    whole = calibrated(cut_out(model, supernet(model).full()), x[:500])
    return float(F.cross_entropy(predicted(whole, test_x), test_y))


@torch.no_grad()
def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of all images."""
    return torch.cat([model(part) for part in x.split(500)])


@functools.cache
def images(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return MNIST images (N, 1, 28, 28), standardised, and classes: to train on, and to test."""
    data = mnist(BATCH, limit=TRAIN, folder=os.environ.get("LAMINA_DATA") or ".")
    assert data.evaluation is not None
    rows = [s.batch(torch.arange(min(n, len(s)))) for s, n in ((data.train, TRAIN), (data.evaluation, TEST))]
    train, test = ((r["pixel_values"].to(device), r["labels"].to(device)) for r in rows)
    return train, test


def picture(seed: int, device: torch.device) -> Figure:
    """Draw accuracy over multiply-adds, a line an arm."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = drawing.subplots()
    words = {
        "delayed": "from half way on, ramped",
        "early": "from the start",
        "late": "from 80 % on",
        "sudden": "no ramp",
    }
    for arm, style in zip(STARTS, ("o-", "s--", "^:", "x-."), strict=True):
        found = trained(arm, seed, device)
        axis.plot([m / 1e3 for m in found.multiply_adds], [100 * a for a in found.accuracy], style, label=words[arm])
    axis.set_xscale("log")
    axis.set_xlabel("thousand multiply-adds an image")
    axis.set_ylabel("accuracy, %")
    axis.legend(title="parts are trained", frameon=False)
    return drawing
