"""muP: learning rates and first values that are right at every width, and networks of infinite width.

What for: tuning on a narrow model what is then trained wide. In the usual parametrization the best learning rate falls
as a network gets wider, and what was tuned small is wrong large; in muP it stays. Smallest use:

    model = parametrize(make(1024), base=lambda: make(64))                    # first values, read-outs, logits
    optimizer = mup(model, {"name": "adamw", "lr": 4e-3})                     # the rate that is best at width 64
    print(coordinate_check(lambda w: parametrize(make(w), base=lambda: make(64)), [64, 256, 1024], batch).table())

In a recipe: `optimizer: {name: mup, base: {name: adamw, lr: 4e-3}}` and, first under `rewrite`, `{name:
"lamina.optim.parametrization:MuP", base: {width: 64}}` (a Hugging Face model: the options of its config in which the
narrow one differs); `lamina search` on the narrow recipe, then the same recipe with another width: `recipes/mup.yaml`.

How it works: every parameter's shape is compared with that of the narrow model; no annotation. Where a dimension
differs, it grows with the width, k times as wide as the base's. Hidden weights (two such dimensions) start smaller by
sqrt(k) and learn at lr / k under Adam; everything else (input weights, biases, gains, embeddings, read-outs) starts and
learns as in the base; the input of a read-out is divided by k; attention logits by the head width where that grows.
Under SGD: rates k, k_out / k_in and k. Under LAMB and LARS, whose steps are as long as the tensor's own norm (Adafactor
too): lr / sqrt(k) for hidden weights. First values are measured in both models, so it does not matter by which rule a
model is drawn. The decision stands in the model's history and is replayed at load; weights are never rescaled twice.
`ABC` is the theory: exponents of multipliers, first values and rate, and whether infinite width then learns features,
is a kernel machine, or blows up.

What is measured: a perceptron 64-w-w-10 on scikit-learn's digits, three epochs of Adam, rates 2^-12 to 2^-3, the mean
of two starts: by how many octaves the best rate (ties within 2 % go to the smaller) moves from width 32 to 512. Beside
it: training losses at the base's best rate; widths 64 to 1024, LAMB, SGD, and byte decoders with a tied embedding (one
seed); first-order MAML on Omniglot characters (100 to learn from, 36 new ones, 10 x 10 pixels, where the data is at
hand) by linear networks of width 2, 8, 32 and infinite in muP, and by the kernels that a ReLU network becomes without
feature learning; CBOW embeddings of the standard library's docstrings at widths 64, 256, 1024: how many of a word's ten
neighbours are those at infinite width. Against PyPI's `mup`, by hand: a perceptron and a transformer under MuSGD,
MuAdam and MuAdamW have the same first values, rates and decays, and the same outputs after 5 steps to the last bit.

What was found: the direction, not the bar. Without muP the best rate falls by 3, 2 and 2 octaves from width 32 to 512;
in muP it stays on one seed and rises by 2 on the others (2^-6 to 2^-4), and the bar counts octaves whichever way: at
width 32 the base is so narrow that its best rate is careful for wider networks, never too bold. The losses at the
base's best rate fall from width 32 to 512 on every seed (0.145 to 0.111 on average). From width 64 to 1024 (one seed,
as what follows) the best rate stays in muP and falls by 3 octaves without; under LAMB it stays, and moves by 1 without;
of decoders with a tied embedding it moves by 1, and by 2 without; under SGD neither moves at this depth. A network of
width 512 tuned without muP still has the lowest loss of all here. Few-shot accuracy rises with the width to the limit
(30, 41, 47, 49 %), but the limit is no better than the NTK (49 %) and hardly better than the GP (47 %), where five
points were hoped for: a hundred characters of 10 x 10 pixels and 300 steps are little to learn features from; nothing
was tuned. The neighbours agree with the limit's more and more (54, 78, 83 %).

Limits: depth, batch size, number of steps and regularisation do not transfer by this theory. A home-made attention that
divides by a head width which nothing tells (no `head_dim`, no `scaling`) is not seen, nor a model that scales by its
width in its own forward (T5's tied head): let heads grow in number, and look at the coordinate check. What leads from
the width to a fixed size in the middle of a network, and layers that are not torch's, have to be named (`roles`). Very
wide and deep networks without norms are warned of. The narrowest width should not be too narrow for the task. Networks
of infinite width are studied here (`LinearLimit`, `CBOWLimit`, `ReLUKernel`), not served.

Composes with: any optimizer whose steps scale in a known way (`rule` says it of others), LAMB; drop, replace and growth
passes in training, distillation, TokenFormer (`roles={"blocks.*.key": "normalized", "blocks.*.value": "input"}`),
torch.compile, DDP, checkpoints. A pass that changes the width afterwards is refused: change it first.
Source: Yang & Hu, Feature Learning in Infinite-Width Neural Networks (ICML 2021), arXiv 2011.14522; Yang et al., Tensor
Programs V (2022), arXiv 2203.03466.
"""

from __future__ import annotations

import ast
import functools
import io
import os
import re
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lamina.data import digit_images, text
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.experiments.infinite_width_limits import CBOWLimit, LinearLimit, LinearNetwork, ReLUKernel
from lamina.models import Transformer
from lamina.optim import MuP, coordinate_check, mup, parameter_groups
from lamina.recipe import Node, build
from lamina.rewrite import rewrite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("optimizer mup",)
TESTS = ("tests/optim/test_parametrization.py", "tests/optim/test_abc.py", "tests/experiments/test_infinite_width.py")
WIDTHS, BASE, EPOCHS, BATCH, STARTS = (32, 128, 512), 32, 3, 64, 2
EXPONENTS = tuple(range(-12, -2))
"""Learning rates tried, as powers of 2."""

Losses = dict[int, list[float]]
"""Training loss of the last epoch by width, a number a rate."""


@experiment(
    "infinite-width",
    source="Tensor Programs V, figure 1: the best Adam rate holds at every width in muP, and drifts without",
    bar="moved(baseline) - moved(ours) >= 1.5, 3 seeds",
    seeds=(0, 1, 2),
    budget="12m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Sweep the learning rate at three widths in muP and without; the other claims are reported beside."""
    found = {in_mup: sweep(seed, in_mup, device) for in_mup in (True, False)}
    ours, baseline = ({"moved": moved(found[arm])} for arm in (True, False))
    at = int(np.argmin(found[True][BASE]))
    extra = {f"loss_{arm}_{w}": found[arm == "mup"][w][at] for arm in ("mup", "standard") for w in WIDTHS}
    extra |= few_shot(seed, device)
    if seed == 0:
        extra |= further(seed, device) | words(seed)
    paper = "best log2 rate of a reference run, widths 32, 128, 512: -5, -5, -5 in muP, -5, -7, -8 without"
    return Measurement(ours, baseline, paper, unit="octaves", extra=extra)


# Learning rates over widths.


@functools.cache
def sweep(
    seed: int,
    in_mup: bool,
    device: torch.device,
    widths: tuple[int, ...] = WIDTHS,
    optimizer: str = "adam",
    exponents: tuple[int, ...] = EXPONENTS,
    starts: int = STARTS,
) -> Losses:
    """Train a perceptron on the digits at every width and rate, from two starts; the mean loss of the last epoch."""
    images, y = (t.to(device) for t in digit_images(seed=seed))
    x = (images.flatten(1) - 0.3) * 2
    if smoke():
        x, y, starts = x[:256], y[:256], 1
    base = widths[0]

    def make(width: int) -> nn.Module:
        layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        return nn.Sequential(*layers)

    def trained(width: int, rate: float, start: int) -> float:
        model = made(lambda: make(width), start, (lambda: make(base)) if in_mup else None, device)
        rule = rule_of(model, {"name": optimizer, "lr": rate}, in_mup)
        generator = torch.Generator().manual_seed(start)
        losses: list[Tensor] = []
        for _ in range(EPOCHS):
            losses = []
            for rows in torch.randperm(len(x), generator=generator).split(BATCH):
                losses.append(step(rule, F.cross_entropy(model(x[rows]), y[rows])))
        return float(torch.stack(losses).mean())

    runs = [starts * seed + i for i in range(starts)]
    return {w: [float(np.mean([trained(w, 2.0**e, i) for i in runs])) for e in exponents] for w in widths}


def made(make: Callable[[], nn.Module], seed: int, base: Any, device: torch.device) -> nn.Module:
    """Make a model from a seed, in muP where there is a base."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        if base is not None:
            rewrite(model, MuP(base))
    return model.to(device)


def rule_of(model: nn.Module, node: Node, in_mup: bool) -> torch.optim.Optimizer:
    """Build an optimizer: of muP, or the plain one."""
    groups = parameter_groups(model, 0.0)
    made: torch.optim.Optimizer = mup(model, node) if in_mup else build(node, "optimizer", params=groups)
    return made


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Take one step; return the loss before it."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def best_exponent(losses: Sequence[float], exponents: Sequence[int] = EXPONENTS) -> int:
    """Return the power of 2 of the best rate; of those within 2 % of it the smallest."""
    finite = np.nan_to_num(np.asarray(losses), nan=np.inf)
    return exponents[int(np.argmax(finite <= 1.02 * finite.min()))]


def moved(losses: Losses, exponents: Sequence[int] = EXPONENTS) -> float:
    """Return how many octaves lie between the best rates of the narrowest and the widest."""
    narrow, wide = (best_exponent(losses[w], exponents) for w in (min(losses), max(losses)))
    return float(abs(narrow - wide))


def further(seed: int, device: torch.device) -> dict[str, float]:
    """Measure the same over widths 64 to 1024, under LAMB, under SGD, and of decoders with a tied embedding."""
    wide = (64, 1024) if smoke() else (64, 256, 1024)
    upper = tuple(range(-10, -1))
    found = {}
    for name, in_mup in (("mup", True), ("standard", False)):
        found[f"moved_64_to_1024_{name}"] = moved(sweep(seed, in_mup, device, wide, starts=1))
        found[f"moved_lamb_{name}"] = moved(sweep(seed, in_mup, device, WIDTHS, "lamb", upper, 1), upper)
        found[f"moved_sgd_{name}"] = moved(sweep(seed, in_mup, device, WIDTHS, "sgd", upper, 1), upper)
        found[f"moved_tied_decoder_{name}"] = moved(decoders(seed, in_mup, device), DECODER_EXPONENTS)
    return found


DECODER_EXPONENTS = tuple(range(-11, -4))


def decoders(seed: int, in_mup: bool, device: torch.device) -> Losses:
    """Train byte decoders with a tied embedding, 60 steps, at widths 32, 64 and 128; the mean loss of the last 16."""
    data = text("python-stdlib", context=32, batch=16, limit=200_000)
    generator = torch.Generator().manual_seed(seed)
    count = 4 if smoke() else 60
    rows = torch.randint(len(data.train), (count, 16), generator=generator)
    batches = [data.train.batch(r)["input_ids"].to(device) for r in rows]
    vocabulary = int(data.sizes["vocabulary"])

    def make(width: int) -> nn.Module:
        return Transformer(2, width, 2, vocabulary=vocabulary, context=32)

    def trained(width: int, rate: float) -> float:
        model = made(lambda: make(width), seed, {"width": 32} if in_mup else None, device)
        rule = rule_of(model, {"name": "adam", "lr": rate}, in_mup)
        losses = []
        for ids in batches:
            scores = model(ids)[:, :-1]
            losses.append(step(rule, F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())))
        return float(torch.stack(losses[-16:]).mean())

    widths = (32, 64) if smoke() else (32, 64, 128)
    return {w: [trained(w, 2.0**e) for e in DECODER_EXPONENTS] for w in widths}


# Few-shot learning: infinite width, finite widths, kernels.

WAYS, TASKS, QUERIES, INNER, META, CLIP = 5, 32, 5, 0.4, 0.1, 0.5
TEST_STEPS, TEST_TASKS = 20, 200


def few_shot(seed: int, device: torch.device) -> dict[str, float]:
    """First-order MAML on Omniglot, 5-way 1-shot; nothing without a folder that has it."""
    images = omniglot()
    if images is None:
        return {}
    images = images.to(device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = images[order[:100]].flatten(2), images[order[100:]].flatten(2)
    found = {}
    start = LinearLimit(train.shape[-1], WAYS, 1.0, 1 / 32)
    for name, network in {
        **{f"width_{n}": start.sample(n, seed) for n in (2, 8, 32)},
        "limit": LinearLimit(train.shape[-1], WAYS, 1.0, 1 / 32),
    }.items():
        found[f"few_shot_{name}"] = maml(network.to(device), train, test, seed)
    for kind in ("ntk", "gp"):
        found[f"few_shot_{kind}"] = kernel_maml(ReLUKernel(kind), train, test, seed)
    return found


def omniglot(side: int = 10) -> Tensor | None:
    """Read characters of five alphabets, (136, 20, side, side), ink 1; None where the folder of data has none."""
    path = Path(os.environ.get("LAMINA_DATA", "."), "omniglot", "images_background_small1.zip")
    if not path.is_file():
        return None
    from PIL import Image

    characters: dict[str, list[Tensor]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".png") and not name.startswith("__MACOSX"):
                picture = Image.open(io.BytesIO(archive.read(name))).convert("L").resize((side, side), 4)
                characters.setdefault(name.rpartition("/")[0], []).append(1 - torch.from_numpy(np.array(picture)) / 255)
    return torch.stack([torch.stack(drawn) for drawn in characters.values()])


def draw_tasks(images: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw tasks as places in the pool (class * 20 + drawer): (count, ways) to learn from, (count, ways * queries)."""
    classes, drawers = images.shape[:2]
    chosen = torch.rand(count, classes, generator=generator).argsort(1)[:, :WAYS]
    who = torch.rand(count, WAYS, drawers, generator=generator).argsort(2)[..., : 1 + QUERIES]
    places = chosen[..., None] * drawers + who
    return places[..., 0], places[..., 1:].flatten(1)


def labels_of(tasks: Tensor, each: int) -> Tensor:
    """Number the classes of a task: ways * each labels, the same for every task."""
    return torch.arange(WAYS, device=tasks.device).repeat_interleave(each).expand(len(tasks), -1)


def meta_steps() -> int:
    """How many batches of tasks are learned from."""
    return 30 if smoke() else 300


def meta_rate(i: int) -> float:
    """The rate of the outer step: a tenth after half of them, a hundredth after three quarters."""
    return META * 0.1 ** ((i >= meta_steps() / 2) + (i >= 3 * meta_steps() / 4))


def maml(network: LinearNetwork, train: Tensor, test: Tensor, seed: int) -> float:
    """Train by first-order MAML; return the accuracy on new classes."""
    generator = torch.Generator().manual_seed(seed)
    weights = {n: p.detach().clone() for n, p in network.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, w, (x,)), y)

    each = vmap(grad(loss))

    def adapted(tasks: Tensor, pool: Tensor, steps: int) -> dict[str, Tensor]:
        own = {n: w.expand(len(tasks), *w.shape) for n, w in weights.items()}
        x, y = pool[tasks], labels_of(tasks, 1)
        for _ in range(steps):
            slopes = each(own, x, y)
            own = {n: w - INNER * slopes[n] for n, w in own.items()}
        return own

    pool = train.flatten(0, 1)
    for i in range(meta_steps()):
        support, query = draw_tasks(train, TASKS, generator)
        slopes = each(adapted(support, pool, 1), pool[query], labels_of(query, QUERIES))
        mean = {n: g.mean(0) for n, g in slopes.items()}
        norm = torch.stack([g.norm() for g in mean.values()]).norm()
        scale = meta_rate(i) * (CLIP / norm.clamp(min=CLIP))
        weights = {n: w - scale * mean[n] for n, w in weights.items()}
    held, right = test.flatten(0, 1), []
    for _ in range(TEST_TASKS // 50):
        support, query = draw_tasks(test, 50, generator)
        own = adapted(support, held, TEST_STEPS)
        out = vmap(lambda w, x: functional_call(network, w, (x,)))(own, held[query])
        right.append((out.argmax(-1) == labels_of(query, QUERIES)).float().mean())
    return float(torch.stack(right).mean())


def kernel_maml(kernel: ReLUKernel, train: Tensor, test: Tensor, seed: int) -> float:
    """Do the same in the space of a kernel's functions, f = sum of coefficients times k(x_i, .); the pool is finite."""
    generator = torch.Generator().manual_seed(seed)
    pool, held = train.flatten(0, 1), test.flatten(0, 1)
    gram, across, within = kernel(pool, pool), kernel(held, pool), kernel(held, held)
    coefficients = pool.new_zeros(len(pool), WAYS)

    def slope(out: Tensor, y: Tensor) -> Tensor:
        return (out.softmax(-1) - F.one_hot(y, WAYS)) / y.shape[1]

    for i in range(meta_steps()):
        support, query = draw_tasks(train, TASKS, generator)
        values = gram @ coefficients
        inner = slope(values[support], labels_of(support, 1))
        moved_by = torch.einsum("tqs,tso->tqo", gram[query[:, :, None], support[:, None]], inner)
        outer = slope(values[query] - INNER * moved_by, labels_of(query, QUERIES)) / TASKS
        change = torch.zeros_like(coefficients).index_add_(0, query.flatten(), outer.flatten(0, 1))
        norm = (change * (gram @ change)).sum().clamp(min=0).sqrt()
        coefficients -= meta_rate(i) * change * (CLIP / norm.clamp(min=CLIP))
    support, query = draw_tasks(test, TEST_TASKS, generator)
    values = across @ coefficients
    first, later = values[support], values[query]
    own, other = within[support[:, :, None], support[:, None]], within[query[:, :, None], support[:, None]]
    for _ in range(TEST_STEPS):
        change = slope(first, labels_of(support, 1))
        first, later = first - INNER * own @ change, later - INNER * other @ change
    return float((later.argmax(-1) == labels_of(query, QUERIES)).float().mean())


# Words: neighbours in embeddings of any width, and of infinite.

WINDOW, NEGATIVES, RATE, DECAY, POSITIONS = 8, 25, 0.05, 0.001, 64


def words(seed: int) -> dict[str, float]:
    """Train CBOW embeddings on the library's docstrings; how many of a word's ten neighbours are the limit's."""
    ids, counts = corpus()
    limit, *finite = (neighbours(ids, counts, width, seed) for width in (None, 64, 256, 1024))
    shared = [(a[:, :, None] == limit[:, None]).any(2).float().mean() for a in finite]
    return {f"neighbours_{w}": float(s) for w, s in zip((64, 256, 1024), shared, strict=True)}


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    """Read the docstrings of Python's standard library: 40,000 words by their numbers, and how often each occurs."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        documented = [n for n in ast.walk(tree) if isinstance(n, kinds)]
        found += re.findall(r"[a-z]+", " ".join(ast.get_docstring(n) or "" for n in documented).lower())
    known = {w: i for i, (w, n) in enumerate(Counter(found).most_common()) if n >= 5}
    ids = torch.tensor([known[w] for w in found if w in known])
    ids = ids[: 4000 if smoke() else 40_000]
    return ids, torch.bincount(ids, minlength=len(known))


def neighbours(ids: Tensor, counts: Tensor, width: int | None, seed: int) -> Tensor:
    """Train embeddings; return the ten nearest of each of the 200 most frequent words, by cosine."""
    tables = CBOWLimit(len(counts), width, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = counts.clamp(min=1).float() ** 0.75
    share = counts.float() / counts.sum()
    keep = (1e-3 / share.clamp(min=1e-12)).sqrt().clamp(max=1.0)
    offsets = torch.tensor([o for o in range(-WINDOW, WINDOW + 1) if o])
    kept = ids[torch.rand(len(ids), generator=generator) < keep[ids]]
    for done, at in enumerate(torch.randperm(len(kept), generator=generator).split(POSITIONS)):
        reach = torch.randint(1, WINDOW + 1, (len(at), 1), generator=generator)
        places = at[:, None] + offsets
        mask = (offsets.abs() <= reach) & (places >= 0) & (places < len(kept))
        drawn = torch.multinomial(noise, len(at) * NEGATIVES, replacement=True, generator=generator)
        target = torch.cat((kept[at][:, None], drawn.view(len(at), -1)), 1)
        label = F.one_hot(torch.zeros(len(at), dtype=torch.long), 1 + NEGATIVES).float()
        left = 1 - done * POSITIONS / len(kept)
        tables.step(kept[places.clamp(0, len(kept) - 1)], mask, target, label, RATE * left, DECAY)
    directions = F.normalize(tables.words[: min(1000, len(counts))], dim=1)
    like = directions[:200] @ directions.T
    like.fill_diagonal_(-1)
    return like.topk(10).indices


def picture(seed: int, device: torch.device) -> Figure:
    """Draw loss against rate at three widths, in muP and without, and the coordinate check of both."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.6, 2.9), layout="constrained")
    axes = drawing.subplots(1, 4)
    for axis, in_mup in zip(axes[:2], (False, True), strict=True):
        for width, losses in sweep(seed, in_mup, device).items():
            (line,) = axis.plot(EXPONENTS, losses, marker="o", markersize=3, label=f"width {width}")
            best = best_exponent(losses)
            axis.plot(best, losses[EXPONENTS.index(best)], "*", markersize=11, color=line.get_color())
        axis.set(xlabel="log2 of the rate", yscale="log", title="muP" if in_mup else "standard", ylim=(0.05, 3))
    axes[0].set_ylabel("training loss, last epoch")
    axes[0].legend(fontsize=7)
    images, y = digit_images(seed=seed)
    batch = {"inputs": (images[:64].flatten(1) - 0.3) * 2, "labels": y[:64]}

    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    for axis, in_mup in zip(axes[2:], (False, True), strict=True):
        base: Any = {True: lambda: make(32)}.get(in_mup)
        checked = coordinate_check(
            lambda w, b=base: made(lambda: make(w), seed, b, torch.device("cpu")),  # type: ignore[misc]
            [32, 64, 128, 256, 512, 1024],
            batch,
            steps=3,
            optimizer={"name": "adam", "lr": 2.0**-5},
            modules=["0", "2", "4"],
        )
        for name, label in (("0", "first"), ("2", "hidden"), ("4", "read-out")):
            axis.plot(checked.widths, checked.sizes[name][-1], marker="o", markersize=3, label=label)
        title = f"activations, 3 steps: {'muP' if in_mup else 'standard'}"
        axis.set(xscale="log", yscale="log", xlabel="width", title=title, ylim=(0.1, 300))
    axes[2].legend(fontsize=7)
    return drawing
