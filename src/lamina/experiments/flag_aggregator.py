"""Flag Aggregator: training goes on while some workers send garbage, and nobody needs to know how many.

What for: data-parallel training where workers may send wrong gradients (bit flips, bugs, lost packets, attackers) or
see far noisier data than the others. In place of the mean of the gradients.

    handle = attach(model, FlagAggregator())        # a plain loop, or round DistributedDataParallel
    loss.backward()
    handle.reduce()                                 # before clipping and optimizer.step()
    handle.reducer.explained, handle.reducer.failed # how much of each worker was used; who was left out
    FlagAggregator().aggregate(gradients)           # (workers, n) -> (n,), without processes

In a recipe: `gradients: {name: flag_aggregator, iters: 5}`; four processes of which one attacks: `recipes/robust.yaml`.
The rules it is compared with are reducers as well: `median`, `trimmed_mean`, `mea_med`, `phocas`, `krum` (Multi-Krum:
`select: multi`), `bulyan`, `geometric_median`. Attacks: `lamina.verify.attacks`.

How it works: every gradient becomes a unit vector u_i. A subspace of dimension m = ceil((p + 1) / 2) is sought that
minimises sum_i sqrt(1 - v_i), v_i the share of u_i inside it: maximum likelihood of v ~ Beta(1, 1/2). Iteratively
reweighted: PCA of the u_i with weights (1 - v_i)^(-1/4), so that what the subspace explains badly counts ever less
(`lam` adds the same for differences of workers). The answer is the projection of the mean direction, as long as the
median gradient. All of it happens on the p x p inner products. Each worker has one slice of everyone's gradients
(all-to-all), inner products are summed (p^2 numbers), each combines its slice, the slices are gathered: two copies of a
gradient a worker, however many workers. A worker whose gradient has NaN, infinity or zeros alone is left out; other
names or shapes, no gradient, or a worker that is gone end the step on all of them with its number.

What is measured: 15 simulated workers, batch 16 each, an MLP 64-64-10 on scikit-learn's digits, SGD 0.1 with momentum
0.9, 150 steps; the last 3 send what six attacks say (none; uniform in 0..1; -10 times a gradient; mean - 1.5
deviations; -0.1 times the mean; noise of 20 times the length). `worst` is the least accuracy over the six; the
baseline's is that of the best of mean, median, trimmed mean, Krum and Bulyan, chosen anew for each seed. `augmented`:
nobody attacks, 3 workers see images with noise of deviation 1 and random contrast; the baseline is the mean. Beside the
bar: every rule.

What was found (mean of three seeds, accuracy):

    rule                none   random  reverse  little  empires  gaussian   worst   augmented
    mean                .959   .090    .105     .836    .956     .948       .084    .956
    median              .948   .952    .950     .828    .944     .955       .828    .956
    trimmed mean        .957   .958    .958     .827    .951     .958       .827    .955
    MeaMed              .947   .960    .954     .796    .943     .958       .796    .956
    Phocas              .950   .960    .953     .598    .945     .959       .598    .957
    Krum                .931   .921    .907     .927    .133     .921       .133    .921
    Multi-Krum          .960   .967    .964     .843    .954     .967       .843    .967
    Bulyan              .939   .950    .951     .732    .910     .950       .732    .950
    geometric median    .963   .960    .956     .902    .947     .963       .902    .962
    flag, 1 step        .956   .958    .956     .937    .942     .954       .937    .955
    flag, 5 steps       .956   .956    .956     .923    .942     .954       .923    .955
    flag, unit length   .960   .960    .957     .911    .952     .960       .911    .961

With one step or five its worst case is better than that of all other rules, and 0.095 above that of the best single
one of the five baselines (median). The bar is missed nevertheless: against the best of the five chosen anew for each
seed it is 0.042 ahead (0.017 to 0.058), where 0.05 was asked for; and with spoilt images it is level with the mean
(0.002 below it, within the seeds' noise): such images do not harm the mean here, so there is nothing to gain. Hence
`not reproduced`. Nothing was changed after the first run. Without attack it is 0.003 below the mean. Under random,
reversed and long gradients every robust rule ties: only the attacks that hide tell them apart. One step (plain PCA, as
the official trainer has it) is not worse than five. Multi-Krum, which was slightly ahead in an earlier single-seed run,
is not here: .843 against .923.

In four real processes of which one attacks (recipe `robust`, a small ResNet on digits, one run each, accuracy):
reversed gradients .950 (median .978, the mean diverges); uniform ones .799, and .883 with `rank: 2` (the mean: a loss
of 303).
Time at 15 workers and 25M parameters: 1.07 of Multi-Krum's (`benchmarks/flag_aggregator.py`).

Limits: fewer than half of the workers may be faulty. Colluding ones that send the same vector occupy part of the
subspace: with m = ceil((p + 1) / 2) any subspace method keeps some of them, and the more, the fewer workers there are
(of 4 directions it keeps 3: give a smaller `rank`). Honest workers with data of their own kind are outliers, too, and
count less. `scale="raw"`, the paper's text, is not robust: a huge gradient inside the subspace passes. Workers compute
the combined slices honestly: one that corrupts its slice is not guarded against. Running statistics of batch norm are
not combined. It needs whole gradients (DDP, not FSDP2), after backward. Where several directions are explained equally
well at the edge of the subspace, rounding decides between them.

Composes with: any optimizer and schedule (LAMB), passes in mid-training and distillation, DDP and plain loops, mixed
dtypes, bf16, fp16 with a loss scaler (`nonfinite: pass_on`), resuming. With no compressor: `l_greco` refuses it as its
`base`, for compressed and robust combination do not commute.
Source: Almasi, Mishra, Vamanan, Ravi, Flag Aggregator: Scalable Distributed Training under Failures and Augmented
Losses using Convex Optimization (ICLR 2024), arXiv 2302.05865; FlagIRLS: Mankovich et al. (2022), arXiv 2203.04437.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lamina.data import digit_images
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.gradients import (
    Bulyan,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MeaMed,
    Median,
    Phocas,
    TrimmedMean,
)
from lamina.verify.attacks import fall_of_empires, gaussian, little_is_enough, random, reverse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = (
    "reducer flag_aggregator",
    "reducer median",
    "reducer trimmed_mean",
    "reducer mea_med",
    "reducer phocas",
    "reducer krum",
    "reducer bulyan",
    "reducer geometric_median",
)
WORKERS, FAULTY, BATCH = 15, 3, 16
STEPS, RATE, MOMENTUM = 150, 0.1, 0.9

Rule = Callable[[Tensor], Tensor]
"""(workers, n) -> (n,)."""

Attack = Callable[[Tensor, int, torch.Generator], Tensor]

RULES: Mapping[str, Callable[[], Rule]] = {
    "mean": lambda: lambda rows: rows.mean(0),
    "median": lambda: Median().aggregate,
    "trimmed_mean": lambda: TrimmedMean(FAULTY).aggregate,
    "krum": lambda: Krum(FAULTY).aggregate,
    "multi_krum": lambda: Krum(FAULTY, "multi").aggregate,
    "bulyan": lambda: Bulyan(FAULTY).aggregate,
    "mea_med": lambda: MeaMed(FAULTY).aggregate,
    "phocas": lambda: Phocas(FAULTY).aggregate,
    "geometric_median": lambda: GeometricMedian().aggregate,
    "flag_1_step": lambda: FlagAggregator(iters=1).aggregate,
    "flag": lambda: FlagAggregator(iters=5).aggregate,
    "flag_unit": lambda: FlagAggregator(iters=5, scale="unit").aggregate,
}
BASELINES = ("mean", "median", "trimmed_mean", "krum", "bulyan")
"""The best of these, by its worst attack, is what the bar compares with."""

ATTACKS: Mapping[str, Attack | None] = {
    "none": None,
    "random": random,
    "reverse": reverse,
    "little_is_enough": partial(little_is_enough, z=1.5),
    "fall_of_empires": fall_of_empires,
    "gaussian": partial(gaussian, length=20.0),
}


@experiment(
    "flag-aggregator",
    source="figures 4 and 5 (accuracy of the rules as f grows to 3 of 15), section 4 (augmented data)",
    bar="worst(ours) - worst(baseline) >= 0.05 and augmented(ours) - augmented(baseline) >= 0, 3 seeds",
    seeds=(0, 1, 2),
    budget="4m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train with every rule under every attack; then with honest workers of whom three see spoilt images."""
    data = digits(seed, device)
    table = {
        rule: {attack: train(RULES[rule](), data, seed, attack=ATTACKS[attack]) for attack in ATTACKS} for rule in RULES
    }
    worst = {rule: min(row.values()) for rule, row in table.items()}
    augmented = {rule: train(RULES[rule](), data, seed, spoilt=FAULTY) for rule in RULES}
    extra = {f"{rule}_{attack}": value for rule, row in table.items() for attack, value in row.items()}
    extra |= {f"worst_{rule}": value for rule, value in worst.items()}
    extra |= {f"augmented_{rule}": value for rule, value in augmented.items()}
    extra["no_attack_below_mean"] = table["mean"]["none"] - table["flag"]["none"]
    return Measurement(
        ours={"worst": worst["flag"], "augmented": augmented["flag"]},
        baseline={"worst": max(worst[rule] for rule in BASELINES), "augmented": augmented["mean"]},
        paper="ResNet-18 on CIFAR-10, 15 workers, random attack: the best accuracy of all as f grows to 3 (plots)",
        unit="share of test rows",
        extra=extra,
    )


Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def digits(seed: int, device: torch.device) -> Data:
    """Return scikit-learn's digits as (1437 training rows, 360 test rows), pixels in 0..1."""
    images, labels = digit_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = images.flatten(1)[order].to(device), labels[order].to(device)
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def train(rule: Rule, data: Data, seed: int, *, attack: Attack | None = None, spoilt: int = 0) -> float:
    """Train an MLP 64-64-10 with one rule by SGD with momentum; return its test accuracy.

    Args:
        attack: what the last three workers send; None = their gradients.
        spoilt: how many of the workers see strongly augmented images.
    """
    (x, y), (test_x, test_y) = data
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(x.device)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in parameters.values()])
    # One generator for the rows that all arms see, one for what faulty workers do.
    rows, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    moving = torch.zeros_like(flat)

    def loss(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        parts = weights.split([p.numel() for p in parameters.values()])
        named = {n: part.view_as(p) for (n, p), part in zip(parameters.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, named, (images,)), labels)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    for _ in range(STEPS // 10 if smoke() else STEPS):
        chosen = torch.randint(len(x), (WORKERS, BATCH), generator=rows).to(x.device)
        images = x[chosen]
        if spoilt:
            images[-spoilt:] = augmented(images[-spoilt:], noise)
        sent = gradients(flat, images, y[chosen])
        if attack is not None:
            sent[-FAULTY:] = attack(sent[:-FAULTY], FAULTY, noise)
        moving = MOMENTUM * moving + rule(sent)
        flat = flat - RATE * moving
    parts = flat.split([p.numel() for p in parameters.values()])
    named = {n: part.view_as(p) for (n, p), part in zip(parameters.items(), parts, strict=True)}
    told: Tensor = functional_call(model, named, (test_x,)).argmax(-1)
    return float((told == test_y).float().mean())


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change the contrast of each image by a factor of 0.25 to 2, and add Gaussian noise of deviation 1."""
    contrast = 0.25 + 1.75 * torch.rand(images.shape[:-1], generator=generator)[..., None].to(images)
    return 0.5 + contrast * (images - 0.5) + torch.randn(images.shape, generator=generator).to(images)


def picture(seed: int, device: torch.device) -> Figure:
    """Draw the accuracy of each rule under each attack, for one seed."""
    from matplotlib.figure import Figure

    data = digits(seed, device)
    values = torch.tensor(
        [[train(RULES[rule](), data, seed, attack=attack) for attack in ATTACKS.values()] for rule in RULES]
    )
    drawing = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = drawing.subplots()
    axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(ATTACKS)), [name.replace("_", "\n") for name in ATTACKS])
    axis.set_yticks(range(len(RULES)), [name.replace("_", " ") for name in RULES])
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    axis.set_title("test accuracy: 15 workers, of whom 3 attack")
    return drawing
