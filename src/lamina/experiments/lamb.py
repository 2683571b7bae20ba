"""LAMB: one learning-rate rule from small batches to the whole data set.

What for: large batches (10 to 100 times the usual) without tuning again. Each weight tensor's step is as long as
the tensor's own norm says, so the rate grows with the square root of the batch, with warm-up, and nothing else
changes. Smallest use:

    optimizer = lamina.optim.LAMB(lamina.optim.parameter_groups(model, 0.01), lr=3e-3)
    lr, warmup = lamina.optim.sqrt_batch_rule(3e-3, batch=32, new_batch=2048, warmup=0.01)

or in a recipe: `optimizer: {name: lamb, lr: 3e-3, schedule: {name: warmup_polynomial, warmup: 0.1}}`.

How it works: Adam's bias-corrected update r, plus the decay, gives u = r + lambda x; the step on a tensor x is
lr * ||x|| / ||u|| * u. Tensors whose norm or update is zero, and groups with `adapt: False` (norm gains, biases),
take plain Adam steps. Three published variants differ in clipping, bias correction and who adapts: `paper`,
`nvlamb`, `v3`. LARS is the same idea around SGD with momentum.

What is measured: scikit-learn's digits, an MLP 64-128-128-10 with LayerNorm, 20 epochs, batches from 32 to all 1437
rows. LAMB and AdamW each keep one base rate (0.01 and 0.001 at batch 32) and follow the square-root rule. The bar
is on the final training loss. Test accuracy is about equal: the claim is about optimisation under one untuned
rule, not about generalisation.

Counter-evidence: Nado et al. (2021), arXiv 2102.06356, reach the paper's results with tuned Nesterov momentum and
Adam at the same batch sizes. So: robust without tuning, not better than a tuned baseline.

Limits: no gain at ordinary batch sizes; a tensor that starts near zero starts slowly; a flattened model (FSDP1's
FlatParameter) has lost its layers.

Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (2020), arXiv 1904.00962.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.data import digit_images
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.optim import LAMB, parameter_groups, sqrt_batch_rule, warmup_linear

PARTS = ("optimizer lamb", "optimizer lars", "schedule warmup_polynomial")
BATCHES = (32, 128, 512, 1437)
BASE_BATCH = 32
DECAY = 0.01

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


@experiment(
    "lamb",
    source="table 1, arXiv 1904.00962",
    bar="loss_512(ours) / loss_512(baseline) <= 0.8 and loss_1437(ours) / loss_1437(baseline) <= 0.8, 3 seeds",
    seeds=(0, 1, 2),
    budget="1m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train with LAMB and AdamW at each batch size under the square-root rule; the losses are of the training set."""
    ours = train_all(lambda model, lr: LAMB(parameter_groups(model, DECAY), lr=lr), 0.01, seed, device)
    baseline = train_all(
        lambda model, lr: torch.optim.AdamW(parameter_groups(model, DECAY), lr=lr), 0.001, seed, device
    )
    drop = ours["accuracy_32"] - ours["accuracy_512"]
    return Measurement(
        ours=ours,
        baseline=baseline,
        paper="SQuAD-v1 F1 of BERT-Large from batch 512 to 32k: 91.752 to 91.475 (LARS: 90.717, diverges at 32k)",
        unit="nats; fraction of test rows",
        extra={"accuracy_drop_32_to_512": drop},
    )


def train_all(make: Make, base_lr: float, seed: int, device: torch.device) -> dict[str, float]:
    """Return `loss_<batch>` (training set) and `accuracy_<batch>` (test set) for each batch size."""
    train, test = digits(seed, device)
    figures: dict[str, float] = {}
    for batch in BATCHES:
        lr, _ = sqrt_batch_rule(base_lr, BASE_BATCH, batch)
        model = train_one(make, lr, batch, seed, train)
        with torch.no_grad():
            figures[f"loss_{batch}"] = float(F.cross_entropy(model(train[0]), train[1]))
            figures[f"accuracy_{batch}"] = float((model(test[0]).argmax(-1) == test[1]).float().mean())
    return figures


def train_one(make: Make, lr: float, batch: int, seed: int, train: tuple[Tensor, Tensor]) -> nn.Module:
    """Train a fresh model: linear warm-up over min(0.5, batch / 32 / 80) of the steps, then linear decay to 0."""
    torch.manual_seed(seed)
    model = mlp().to(train[0].device)
    optimizer = make(model, lr)
    epochs = 2 if smoke() else 20
    rows = list(minibatches(len(train[0]), batch, epochs, seed))
    warmup = min(0.5, batch / BASE_BATCH / 80)
    for step, chosen in enumerate(rows):
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_linear((step + 1) / len(rows), warmup)
        optimizer.zero_grad()
        F.cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
        optimizer.step()
    return model


def minibatches(rows: int, batch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield row numbers of each minibatch; each epoch is a new permutation, its last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(rows, generator=generator).split(batch)


def mlp() -> nn.Sequential:
    """Return the network 64-128-128-10 with LayerNorm before each ReLU."""
    hidden = [nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128), nn.LayerNorm(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def digits(seed: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return scikit-learn's digits as (1437 training rows, 360 test rows), pixels in 0..1."""
    images, labels = digit_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = images.flatten(1)[order].to(device), labels[order].to(device)
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])
