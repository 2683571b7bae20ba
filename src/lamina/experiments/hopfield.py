"""Hopfield layers: association with stored patterns, as attention, pooling, look-up, or a memory without training.

What for: pooling bags of instances of which only the bag has a label; looking sets up in one another with control of
how sharp (`beta`) and how often (`update_steps_max`); learned look-up; a plain content-addressable memory.

    memory = HopfieldMemory(embeddings, beta=32.0)                               # no training
    nearest, weights = memory.retrieve(query, return_weights=True)
    head = nn.Sequential(HopfieldPooling(768, heads=4, hidden_size=64), nn.Linear(768, classes))
    rewrite(model, Replace("attention", "hopfield"))                             # same outputs, at one association

In a recipe: `mixer: {name: hopfield, update_steps_max: 2}`. Layers that have norms and random projections do not
retrieve what they are given as it is: for plain retrieval take the memory, centre the patterns and scale them to length
1. `association_regimes` says of a model's heads how many patterns they draw on.

How it works: an update moves a state to the mean of the stored patterns, weighted by softmax(beta x_i . state). It is
attention whose values are the keys, never raises the energy, and normally has arrived after one step. All updates run
on torch's fused kernel: memory grows with states plus patterns, not with their product.

What is measured: (1) capacity: random patterns on a sphere of radius sqrt(d - 1), beta 1; the largest number, in steps
of 1.5, of which 99 % are retrieved by one update to a tenth of the radius from queries with noise of deviation 0.1, in
d = 8, 12, 16, 20. `r2`: of a line through log N over d; `growth`: the smallest factor from one d to the next.
`load`: the same of the classical binary net (Hebbian weights, one sign update, started at the patterns themselves), as
the largest N / d. (2) `accuracy`: bags of ten digits, positive with a 9 among them, 400 to train on and 400 of other
images; pooling by Hopfield states against the mean. (3) `bits`: bags of 16 patterns of 8 bits, positive with one of 8
signals in it; 1536 bags to train on, 512 to test; HopfieldPooling with 8 heads, three updates, beta 0.25, dropout 0.5
after 185 epochs, against the mean.

What was found: capacity grows as claimed, by a factor of 11 and more with every four dimensions (1, 52, 1724, 25 250
patterns; at d = 8 two of the few patterns are too often neighbours for 99 %), and the classical net stays at 0.17 d. On
digit bags pooling by states beats the mean by 4.2 points (94.7 against 90.5 %, in every run), as it does by little the
largest (94.3) and gated attention (93.3), which shows nothing over attention. On bit patterns the mean of three runs is
77.5 %, the mean pool at chance (52.7) and one head without further updates at 56.6; but one run ends at 73.4 %, below
the 75 % asked of each: hence `direction only`. Nothing was tried to better it. In MiniLM most heads of the first layer
average (40 and more of 64 tokens; one looks a single token up), the next four layers mix heads that draw on 2 with
heads that draw on 40, and all of the last draw on about half (picture).

Limits: not a generative memory, and nothing is forgotten. `update_steps_max=None` and an early stop look at values at
the run: no full graph of torch.compile, no export. Dropout of the weights has no fused kernel on the CPU: there, in
training, a table of S x N is made. `Replace` keeps outputs only where scores are plain products: positions that an
attention adds to its scores (T5, ALiBi) are lost, and rotary ones must be asked for by `options={"rotary": True}`.

Composes with: `Replace` in any model and back, drop passes, distillation, LAMB and LARS, hypercomplex projections in
its `linear` slot, caches, autocast, compile, export, data parallel training.
Source: Ramsauer et al., Hopfield Networks is All You Need (ICLR 2021), arXiv 2008.02217.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina import probe
from lamina.errors import LaminaError, require
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.experiments.llm_drop import minilm
from lamina.nn import Hopfield, HopfieldMemory, HopfieldPooling, association_regimes, hopfield_update
from lamina.rewrite import Replace, rewrite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = (
    "mixer hopfield",
    "layer hopfield_pooling",
    "layer hopfield_layer",
    "layer hopfield_encoder_layer",
    "layer hopfield_decoder_layer",
    "pass replace",
)
TESTS = (
    "tests/nn/test_hopfield.py",
    "tests/nn/test_hopfield_association.py",
    "tests/nn/test_hopfield_blocks.py",
    "tests/nn/test_hopfield_memory.py",
    "tests/nn/test_hopfield_pooling.py",
    "tests/rewrite/test_replace_hopfield.py",
)
WIDTHS = (8, 12, 16, 20)
QUERIES = 2000
"""So many of the stored patterns are asked for: of one memory, or of several where each holds fewer."""


@experiment(
    "hopfield",
    source="theorem 3 (capacity grows exponentially); multiple instance learning; the official bit patterns",
    bar="accuracy(ours) - accuracy(baseline) >= 0.03 and r2(ours) > 0.95 and growth(ours) >= 5 and "
    "load(baseline) <= 0.3 and bits(ours) >= 0.75 and bits(baseline) <= 0.55, 3 seeds",
    seeds=(0, 1, 2),
    budget="8m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Measure capacity, bags of digits and bags of bit patterns; other ways to pool are reported beside."""
    counts = {width: capacity(width, seed, device) for width in (WIDTHS[:2] if smoke() else WIDTHS)}
    ours: dict[str, float] = {"r2": straightness(counts), "growth": growth(counts)}
    load = max(classical_capacity(width, seed, device) / width for width in counts)
    extra = {f"patterns_d{width}": float(count) for width, count in counts.items()}
    digits = digit_bags(seed, device)
    scores = {name: train(digit_network(name, seed), digits, seed, epochs=40, batch=16) for name in POOLS}
    extra |= {f"accuracy_{name}": scores[name] for name in ("max", "gated")}
    patterns = bit_bags(seed, device)
    arms = {name: train(bit_network(name, seed), patterns, seed, epochs=185, batch=32, clip=1.0) for name in BIT_ARMS}
    extra["bits_one_head"] = arms["one head"]
    ours |= {"accuracy": scores["hopfield"], "bits": arms["adapted"]}
    baseline = {"accuracy": scores["mean"], "load": load, "bits": arms["mean"]}
    paper = "AUC Tiger / Fox / Elephant / UCSB: 91.3 / 64.05 / 94.9 / 89.5; capacity at least sqrt(p) c^((d - 1) / 4)"
    return Measurement(ours, baseline, paper, unit="share, or count", extra=extra)


def capacity(width: int, seed: int, device: torch.device) -> int:
    """Largest number of patterns, in steps of 1.5, of which 99 % come back from a noisy query by one update."""
    generator = torch.Generator().manual_seed(seed)
    radius, best = math.sqrt(width - 1), 0
    for count in growing():
        # Few patterns are few queries: as many memories as it takes for enough of them.
        many = math.ceil(QUERIES / count)
        patterns = radius * F.normalize(torch.randn(many, count, width, generator=generator), dim=-1)
        asked = patterns[:, :QUERIES]
        queries = asked + 0.1 * torch.randn(asked.shape, generator=generator)
        found = hopfield_update(queries.to(device), patterns.to(device), beta=1.0).cpu()
        right = (found - asked).norm(dim=-1) < 0.1 * radius
        if float(right.float().mean()) < 0.99:
            return best
        best = count
    return best


def growing() -> Iterator[int]:
    """Numbers of patterns in steps of 1.5: 1, 2, 3, 5, 8, ... up to two hundred thousand."""
    return iter(sorted({math.ceil(1.5**k) for k in range(31)}))


def classical_capacity(width: int, seed: int, device: torch.device, draws: int = 1000) -> int:
    """Largest number of random binary patterns of which 99 % are fixed points of sign(W x), W Hebbian, no diagonal."""
    generator, best = torch.Generator().manual_seed(seed), 0
    for count in range(1, width + 1):
        bits = torch.randint(2, (draws, count, width), generator=generator).to(device) * 2.0 - 1.0
        weights = bits.mT @ bits
        weights.diagonal(dim1=-2, dim2=-1).zero_()
        fixed = ((bits @ weights) * bits > 0).all(-1)
        if float(fixed.float().mean()) < 0.99:
            return best
        best = count
    return best


def straightness(counts: dict[int, int]) -> float:
    """R^2 of a line through log N over d."""
    points = torch.tensor([[float(d), math.log(max(n, 1))] for d, n in counts.items()], dtype=torch.float64)
    return float(torch.corrcoef(points.T)[0, 1].square())


def growth(counts: dict[int, int]) -> float:
    """Smallest factor by which N grows from one d to the next."""
    many = list(counts.values())
    return min(after / max(before, 1) for before, after in itertools.pairwise(many))


@dataclass(frozen=True)
class Bags:
    """Bags (B, N, C) of instances with one label each, 0 or 1."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def digit_bags(seed: int, device: torch.device, bags: int = 400, size: int = 10) -> Bags:
    """Bags of ten of scikit-learn's digits, half of them with a 9; training and test images are disjoint."""
    found = require("sklearn.datasets", "experiments").load_digits()
    images = torch.tensor(found.data / 16, dtype=torch.float32)
    nine = torch.tensor(found.target == 9)
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(len(images), generator=generator).chunk(2)

    def draw(rows: Tensor) -> tuple[Tensor, Tensor]:
        drawn = rows[torch.randint(len(rows), (20 * bags, size), generator=generator)]
        positive = nine[drawn].any(1)
        chosen = torch.stack((drawn[~positive][: bags // 2], drawn[positive][: bags // 2]), dim=1).flatten(0, 1)
        return images[chosen].to(device), (torch.arange(bags) % 2).float().to(device)

    return Bags(*draw(parts[0]), *draw(parts[1]))


def bit_bags(seed: int, device: torch.device, bags: int = 2048, size: int = 16, signals: int = 8) -> Bags:
    """Bags of 16 patterns of 8 bits; in half of them one is one of 8 signals, which no other pattern is."""
    generator = torch.Generator().manual_seed(seed)
    # No pattern is all zeros; the first codes, in a random order, are the signals.
    codes = torch.randperm(255, generator=generator) + 1
    chosen = codes[signals + torch.randint(255 - signals, (bags, size), generator=generator)]
    y = torch.arange(bags) % 2
    place = torch.randint(size, (bags,), generator=generator)
    planted = codes[torch.randint(signals, (bags,), generator=generator)]
    rows = torch.arange(bags)
    chosen[rows, place] = torch.where(y.bool(), planted, chosen[rows, place])
    x = (chosen[..., None] >> torch.arange(8) & 1).float().to(device)
    labels = y.float().to(device)
    return Bags(x[:1536], labels[:1536], x[1536:], labels[1536:])


class MeanPooling(nn.Module):
    """(B, N, C) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Average over instances."""
        return x.mean(1)


class MaxPooling(nn.Module):
    """(B, N, C) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the largest over instances, channel by channel."""
        return x.amax(1)


class GatedAttentionPooling(nn.Module):
    """(B, N, C) -> (B, C): weights softmax(w (tanh(V x) * sigmoid(U x))); Ilse et al. (2018), arXiv 1802.04712."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.content, self.gate, self.score = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Average over instances with learned weights."""
        weights = self.score(torch.tanh(self.content(x)) * torch.sigmoid(self.gate(x))).softmax(1)
        return (weights * x).sum(1)


POOLS = ("hopfield", "mean", "max", "gated")
BIT_ARMS = ("adapted", "one head", "mean")


def digit_network(pool: str, seed: int) -> nn.Module:
    """Build an encoder 64-64-64 of each image, one way to pool, and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        last = nn.Linear(64, 1)
        made: nn.Module = MeanPooling() if pool == "mean" else MaxPooling()
        if pool == "hopfield":
            made = HopfieldPooling(64, hidden_size=32)
        elif pool == "gated":
            made = GatedAttentionPooling(64, 32)
        return nn.Sequential(encoder, made, last)


def bit_network(arm: str, seed: int) -> nn.Module:
    """Build a pool of the patterns and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pool: nn.Module = MeanPooling()
        if arm == "adapted":
            pool = HopfieldPooling(8, heads=8, hidden_size=8, update_steps_max=3, beta=0.25, dropout=0.5)
        elif arm == "one head":
            pool = HopfieldPooling(8)
        return nn.Sequential(pool, nn.Linear(8, 1))


def train(model: nn.Module, bags: Bags, seed: int, *, epochs: int, batch: int, clip: float | None = None) -> float:
    """Train with AdamW 1e-3; return the accuracy on the test bags after the last epoch."""
    model = model.to(bags.x.device).train()
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        # Of dropout.
        torch.manual_seed(seed)
        for _ in range(epochs // 10 if smoke() else epochs):
            for rows in torch.randperm(len(bags.x), generator=generator).to(bags.x.device).split(batch):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(model(bags.x[rows])[:, 0], bags.y[rows]).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
    with torch.no_grad():
        return float(((model.eval()(bags.test_x)[:, 0] > 0) == bags.test_y.bool()).float().mean())


def picture(seed: int, device: torch.device) -> Figure:
    """Draw digits stored, asked for by a half, and retrieved, with the energy; and MiniLM's heads, if it is there."""
    from matplotlib.figure import Figure

    heads = regimes_of_minilm(device)
    drawing = Figure(figsize=(9.6 if heads is not None else 5.6, 3.6), layout="constrained")
    parts: Any = drawing.subfigures(
        1, 1 if heads is None else 2, squeeze=False, width_ratios=None if heads is None else (5, 4)
    )
    draw_retrieval(parts[0, 0], seed)
    if heads is not None:
        draw_regimes(parts[0, 1], heads)
    return drawing


def draw_retrieval(part: Any, seed: int, shown: int = 6) -> None:
    """Show digits as they are stored, the upper halves that ask for them, what comes back; below, the energies."""
    stored, queries, mean = halves()
    memory = HopfieldMemory(stored, beta=64.0)
    rows = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))[:shown]
    states = [queries[rows]]
    for _ in range(4):
        states.append(memory(states[-1]))
    grid = part.subplots(4, shown, gridspec_kw={"height_ratios": (1, 1, 1, 1.3)})
    part.suptitle("500 digits stored; half of one asks, one update answers")
    for row, (name, images) in enumerate((("stored", stored[rows]), ("asked", states[0]), ("retrieved", states[1]))):
        for axis, image in zip(grid[row], images, strict=True):
            axis.imshow((image + mean).view(8, 8).numpy(), cmap="gray")
            axis.set_xticks([])
            axis.set_yticks([])
        grid[row, 0].set_ylabel(name)
    energies = torch.stack([memory.energy(s) for s in states])
    for axis, curve in zip(grid[3], energies.T, strict=True):
        axis.plot(range(len(states)), curve.numpy(), "o-", markersize=3)
        axis.set_xticks([0, 2, 4])
        axis.set_yticks([])
        axis.set_ylim(float(energies.min()) - 0.05, float(energies.max()) + 0.05)
    grid[3, 0].set_ylabel("energy")
    grid[3, shown // 2].set_xlabel("updates")


@functools.cache
def halves() -> tuple[Tensor, Tensor, Tensor]:
    """Return 500 digits and their upper halves, both centred and of length 1, and the mean at the digits' scale."""
    raw = torch.tensor(require("sklearn.datasets", "experiments").load_digits().data[:500], dtype=torch.float32)
    centred = raw - raw.mean(0)
    upper = centred.clone()
    upper[:, 32:] = 0.0
    scale = centred.norm(dim=-1).mean()
    return F.normalize(centred, dim=-1), F.normalize(upper, dim=-1), raw.mean(0) / scale


def draw_regimes(part: Any, heads: Tensor) -> None:
    """Show for each layer and head how many of 64 tokens it draws on."""
    axis = part.subplots()
    image = axis.imshow(heads.numpy(), cmap="viridis", vmin=1, aspect="auto")
    bright = 0.6 * float(heads.max())
    for layer, row in enumerate(heads.tolist()):
        for head, count in enumerate(row):
            axis.text(
                head, layer, f"{count:.0f}", ha="center", va="center", fontsize=7, color="k" if count > bright else "w"
            )
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title("MiniLM: median of the fewest of 64 tokens\nthat hold 0.9 of a head's weight")
    part.colorbar(image, ax=axis)


@torch.no_grad()
def regimes_of_minilm(device: torch.device, tokens: int = 64) -> Tensor | None:
    """Median number of tokens that each head of each layer of MiniLM draws on, (layers, heads); None without it."""
    try:
        model, tokenizer = minilm(device)
    except LaminaError:
        return None
    pieces = tokenizer(some_text(), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for piece in pieces for i in piece], device=device)
    rows = ids[: len(ids) // tokens * tokens].view(-1, tokens)[:32]
    model = rewrite(model, Replace("attention", "hopfield")).eval()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Hopfield)}
    with probe.capture(model, inputs=layers) as seen:
        probe.run(model, {"input_ids": rows})
    return torch.stack([association_regimes(m(seen.input(p), return_weights=True)[1]) for p, m in layers.items()]).cpu()


def some_text() -> list[str]:
    """Paragraphs of English that every machine has: what modules of the standard library say of themselves."""
    names = ("argparse", "csv", "doctest", "heapq", "pdb", "random", "shlex", "turtle")
    said = "\n\n".join(inspect.getdoc(importlib.import_module(name)) or "" for name in names)
    return [" ".join(p.split()) for p in said.split("\n\n") if p.strip()]
