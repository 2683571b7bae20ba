"""torchdistill: distillation written down, not programmed: any method between any places of two models.

What for: healing what a pass made smaller, training a small model by a large one, comparing methods of distillation on
a pair of models whose code stays as it is. A method is a line in a recipe.

    objective = Distillation(teacher, terms=["knowledge_distillation"])            # a plain loop, any two models
    Distillation(teacher, terms=[{"name": "hint", "student": "layer2", "teacher": "layer3", "adapter": [64, 256]}])
    {name: distillation, teacher: {name: "lamina.io:load", folder: runs/big/model}, cache: runs/big/outputs,
     terms: [{name: attention_transfer, student: layer3, weight: 100.0, to: 0.5}, knowledge_distillation]}  # a recipe
    [next_token, {name: distillation, terms: [...]}]     # with no teacher: the model before its latest rewrite
    lamina convert-distillation torchdistill.yaml --out recipes                     # what you have already

How it works: a term names a loss, a place in the student and one in the teacher (a module's output, `path:input`, or
`.logits`), a weight, the part of training in which it counts, and an adapter that is trained along. The places are
watched by the library's one hook mechanism, in the forward pass that the task's objective uses too; the teacher runs
under no_grad and no further than the last place that is asked for, the student as well with `stop`. Losses are modules
that see tensors and no paths: `lamina.objectives.distillation` has two dozen, `module:Class` names one of your own.
Heads, adapters and memories belong to the objective and are saved with it. Padding counts for nothing. With `cache` the
teacher's outputs lie on disk by row: a row is known by a fingerprint of what the teacher saw, so that another data set,
another teacher and random augmentation are refused. Before the first step (and by `lamina check`) every path is looked
up and every loss is computed once on tensors of the right shapes. Stages within a run are `from` and `to`; where
optimizer or frozen parts change, a second recipe begins with the first one's model.

What is measured: MNIST, the first 1,000 images to train on, the first 4,000 to test. A convolutional teacher (40, 80,
80 channels; 25 epochs, images moved by up to 2 pixels) and students of 12, 24, 24 channels, 30 epochs, unmoved images,
the same first weights for every method; SGD, one cycle up to 0.05, batch 100. The bar is knowledge distillation
(temperature 4, a tenth cross-entropy) against labels alone. Beside it: the gain of every other method, with the weights
that stand in `METHODS`; those of attention transfer, similarity, DIST, relational distillation are the ones of the
claim, the others are the published ones or 1 and were tuned by nobody (most with the first seed only).
`gain_of_its_own_equal` is Tf-KD, a teacher of the student's own size. `probed_step_over_hand_written` is the time of a
step that watches two maps of this very small network over a loop written for it.

What was found: reproduced. Knowledge distillation is 4.4 points [3.4, 5.4] better than labels alone (92.8 against 88.5;
the teacher has 95.2; bar 1.5). Over three seeds similarity 4.2, hints in two stages 4.2, relational 2.8, knowledge
review 2.2, attention transfer 2.0, DIST 1.3 points over labels. Of what ran with the first seed only, self-supervision
(5.5), simple representation (4.8), contrastive (4.6) and affinity (4.5) stand above plain distillation (4.3 there), and
correlation congruence (-0.1) and variational information (0.0) gained nothing at their published weights, which is a
remark on weights and no ranking. Watching two maps of this network costs 5 % of a step of a few milliseconds [-1, 10],
more than the 3 % hoped for; on layers of a usual size it does not show (benchmark: 0.97).

Limits: losses between rows of a batch see the rows of one process and one micro-batch. Weights do not transfer between
models or data. Compiled models run eagerly while modules are watched (a warning says so; `logit_distillation` does
not). `stop` and DistributedDataParallel exclude each other. Freezing is for a whole run. Sharded students show their
local outputs only. Detectors' heads and distillation on what the student generates are not here.

Composes with: every pass in training (its teacher is the model before it), LAMB and LARS, any layer in any slot of
either model, `augmented_views` (without cache), prototypes and other objectives beside it, data parallel training.
Source: Matsubara, torchdistill (2021), arXiv 2011.12913; Matsubara, torchdistill Meets Hugging Face Libraries (2023),
arXiv 2310.17644; each loss names its own.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data import Columns, Data, Loader, indexed, mnist, rotated
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.objectives import Classification, Distillation, Objective, WeightedSum
from lamina.objectives.distillation.feature_losses import activity
from lamina.probe import capture
from lamina.recipe import build

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("objective distillation", "objective logit_distillation", "data indexed", "data rotated")
TRAINING, TEST, BATCH = 1000, 4000, 100
TEACHER, STUDENT = 40, 12
"""Channels of the first convolution."""

KD = {"name": "knowledge_distillation", "temperature": 4.0, "alpha": 0.1}
MAP, POOL = {"student": "relu3"}, {"student": "pool"}
WIDEN = [2 * STUDENT, 2 * TEACHER]
"""Channels of the last map, student's and teacher's."""


def beside_labels(*terms: Mapping[str, Any] | str) -> list[Any]:
    """Return the nodes of classification and of a distillation by these terms."""
    return ["classification", {"name": "distillation", "terms": list(terms)}]


def in_stages(*first: Mapping[str, Any], share: float = 0.2) -> list[Any]:
    """Return the node of a distillation that begins with these terms and goes on with knowledge distillation."""
    return [{"name": "distillation", "terms": [*({**t, "to": share} for t in first), {**KD, "from": share}]}]


METHODS: dict[str, list[Any]] = {
    "ce": ["classification"],
    "kd": [{"name": "distillation", "terms": [KD]}],
    "attention_transfer": beside_labels(
        *({"name": "attention_transfer", "student": place, "weight": 100.0} for place in ("relu2", "relu3"))
    ),
    "similarity_preserving": beside_labels({"name": "similarity_preserving", **MAP, "weight": 3000.0}),
    "dist": beside_labels({"name": "dist", "weight": 2.0}),
    "relational_kd": beside_labels({"name": "relational_kd", **POOL, "distance": 1.0, "angle": 0.0, "weight": 25.0}),
    "fitnet": in_stages({"name": "hint", "student": "relu2", "adapter": WIDEN}),
    "activation_boundary": in_stages(
        {"name": "activation_boundary", "student": "norm3", "adapter": WIDEN, "weight": 1e-3}
    ),
    "flow_of_solution": in_stages(
        {
            "name": "flow_of_solution",
            "student": ["relu1", "relu3"],
            "adapter": [[STUDENT, TEACHER], WIDEN],
            "weight": 0.1,
        }
    ),
    "knowledge_review": beside_labels(
        {
            "name": "knowledge_review",
            "student": ["relu1", "relu2", "relu3"],
            "student_channels": [STUDENT, 2 * STUDENT, 2 * STUDENT],
            "teacher_channels": [TEACHER, 2 * TEACHER, 2 * TEACHER],
        }
    ),
    "probabilistic_knowledge_transfer": beside_labels(
        {"name": "probabilistic_knowledge_transfer", **POOL, "weight": 30000.0}
    ),
    "factor_transfer": beside_labels(
        {"name": "factor_transfer", **MAP, "student_channels": WIDEN[0], "teacher_channels": WIDEN[1], "weight": 100.0}
    ),
    "variational_information": beside_labels(
        {"name": "variational_information", **MAP, "student_channels": WIDEN[0], "teacher_channels": WIDEN[1]}
    ),
    "correlation_congruence": beside_labels(
        {
            "name": "correlation_congruence",
            **POOL,
            "student_features": 4 * WIDEN[0],
            "teacher_features": 4 * WIDEN[1],
            "weight": 100.0,
        }
    ),
    "inter_channel_correlation": beside_labels(
        {"name": "inter_channel_correlation", **MAP, "adapter": WIDEN, "weight": 500.0}
    ),
    "affinity": beside_labels({"name": "affinity", **MAP, "adapter": WIDEN}),
    "prediction_with_uncertainty": beside_labels(
        {"name": "hint", **POOL, "adapter": WIDEN, "to": 0.3},
        {"name": "prediction_with_uncertainty", **POOL, "adapter": WIDEN, "features": 4 * WIDEN[1], "from": 0.3},
    ),
    "simple_representation": beside_labels(
        {"name": "simple_representation", "student": ["relu3", ".logits"], "adapter": [WIDEN, None]}
    ),
    "dist_plus": beside_labels({"name": "dist_plus", "student": [".logits", "relu3"], "adapter": [None, WIDEN]}),
    "logit_standardization": [{"name": "distillation", "terms": ["logit_standardization"]}],
    "streamlined": beside_labels("streamlined_instance", "streamlined_direction"),
    "contrastive_representation": [
        {
            "name": "distillation",
            "terms": [
                {**KD, "alpha": 0.5, "weight": 2.0},
                {
                    "name": "contrastive_representation",
                    **POOL,
                    "rows": TRAINING,
                    "student_features": 4 * WIDEN[0],
                    "teacher_features": 4 * WIDEN[1],
                    "negatives": 512,
                    "weight": 0.8,
                },
            ],
        }
    ],
    "self_supervision_kd": [
        {
            "name": "distillation",
            "terms": [
                {
                    "name": "self_supervision_kd",
                    "student": ["pool", ".logits"],
                    "student_features": 4 * WIDEN[0],
                    "teacher_features": 4 * WIDEN[1],
                }
            ],
        }
    ],
}
"""The objective of every student, as it stands in a recipe; the teacher is offered when it is built."""

EVERY_SEED = (
    *("ce", "kd", "attention_transfer", "similarity_preserving", "dist", "relational_kd", "fitnet", "knowledge_review"),
)
"""Trained with every seed; the others with the first one."""


@experiment(
    "torchdistill",
    source="table of knowledge distillation on ImageNet: ResNet-18 from ResNet-34, KD 71.37 against 69.76",
    bar="accuracy(ours) - accuracy(baseline) >= 1.5, 3 seeds",
    seeds=(0, 1, 2),
    budget="5m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train a teacher, and a student by every method from the same first weights; ours is KD, the baseline labels."""
    digits = load_digits(device)
    teacher = train_teacher(digits, seed)
    names = METHODS if seed == 0 else EVERY_SEED
    accuracy = {name: student_accuracy(METHODS[name], teacher, digits, seed) for name in names}
    extra = {"accuracy_teacher": accuracy_of(teacher, digits)}
    extra |= {f"gain_{name}": value - accuracy["ce"] for name, value in accuracy.items() if name not in ("ce", "kd")}
    if seed == 0:
        extra["gain_of_its_own_equal"] = self_taught(digits, seed) - accuracy["ce"]
    extra["probed_step_over_hand_written"] = probing_ratio(teacher, digits, seed)
    paper = (
        "ImageNet, ResNet-18: labels 69.76; KD 71.37, AT 70.90, FT 71.56, CRD 70.93, KR 71.64, DIST 71.95, SRD 71.92"
    )
    return Measurement({"accuracy": accuracy["kd"]}, {"accuracy": accuracy["ce"]}, paper, "%", extra)


def network(channels: int, seed: int) -> nn.Sequential:
    """Build three strided convolutions with batch norm, an average pool to 2 x 2, and a linear classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        widths = (1, channels, 2 * channels, 2 * channels)
        for i in range(3):
            layers[f"conv{i + 1}"] = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1)
            layers[f"norm{i + 1}"] = nn.BatchNorm2d(widths[i + 1])
            layers[f"relu{i + 1}"] = nn.ReLU()
        layers["pool"] = nn.AdaptiveAvgPool2d(2)
        layers["flat"] = nn.Flatten()
        layers["head"] = nn.Linear(8 * channels, 10)
        return nn.Sequential(layers)


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 28, 28) of MNIST from 0 to 1 and their labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits(device: torch.device) -> Digits:
    """Load the first 1,000 images to train on and the first 4,000 to test.

    Raises:
        LaminaError: the folder that LAMINA_DATA names has no MNIST.
    """
    # A folder that is named is not looked for on the hub: an experiment does not download.
    data = mnist(BATCH, limit=TRAINING, folder=os.environ.get("LAMINA_DATA") or ".")
    assert data.evaluation is not None
    found = []
    for part, rows in ((data.train, TRAINING), (data.evaluation, TEST)):
        batch = part.batch(torch.arange(rows))
        # Undone: mnist standardises.
        found += [(batch["pixel_values"] * 0.3081 + 0.1307).to(device), batch["labels"].to(device)]
    return Digits(*found)


def train_teacher(digits: Digits, seed: int) -> nn.Module:
    """Train the wide network on the labels, images moved by up to two pixels."""
    teacher = network(TEACHER, seed).to(digits.x.device)
    fit(teacher, Classification(), Columns({"inputs": digits.x, "labels": digits.y}), seed, epochs(25), shifts=2)
    return teacher.eval()


def student_accuracy(nodes: Sequence[Any], teacher: nn.Module, digits: Digits, seed: int) -> float:
    """Train a fresh student by an objective; return its accuracy in percent."""
    return accuracy_of(trained_student(nodes, teacher, digits, seed), digits)


def trained_student(nodes: Sequence[Any], teacher: nn.Module, digits: Digits, seed: int) -> nn.Module:
    """Train a fresh student by the objective of these nodes."""
    student = network(STUDENT, 1000 + seed).to(digits.x.device)
    data = Data(Columns({"inputs": digits.x, "labels": digits.y}), None, BATCH)
    turns = "self_supervision_kd" in str(nodes)
    prepared = rotated(data, entry="inputs") if turns else indexed(data)
    fit(student, objective_of(nodes, teacher, seed).to(digits.x.device), prepared.train, seed, epochs(30))
    return student


def self_taught(digits: Digits, seed: int) -> float:
    """Let a student of the same size, trained on labels from other first weights, be the teacher (Tf-KD)."""
    equal = network(STUDENT, 2000 + seed).to(digits.x.device)
    fit(equal, Classification(), Columns({"inputs": digits.x, "labels": digits.y}), seed, epochs(30))
    return student_accuracy(METHODS["kd"], equal, digits, seed)


def objective_of(nodes: Sequence[Any], teacher: nn.Module, seed: int) -> WeightedSum:
    """Build the sum of the objectives that the nodes name; heads and adapters are drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: list[tuple[float, Objective]] = []
        for node in nodes:
            given = {**node, "teacher": teacher} if isinstance(node, Mapping) else node
            parts.append((1.0, build(given, "objective")))
    return WeightedSum(parts)


def fit(model: nn.Module, objective: Any, rows: Any, seed: int, count: int, shifts: int = 0) -> None:
    """Train by SGD with momentum 0.9 and weight decay 5e-4, one cycle of rates with their peak at 0.05."""
    loader = Loader(rows, BATCH, seed=seed)
    steps = count * loader.batches_per_epoch
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    tell = getattr(objective, "set_progress", None)
    model.train()
    for step in range(steps):
        batch = next(loader)
        if shifts:
            batch["inputs"] = shifted(batch["inputs"], shifts, generator)
        if tell is not None:
            tell(step / steps)
        optimizer.zero_grad()
        objective(model, batch)["loss"].backward()
        optimizer.step()
        schedule.step()


def shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move every image by up to `most` pixels along each axis."""
    padded = F.pad(x, (most,) * 4)
    moves = torch.randint(2 * most + 1, (len(x), 2), generator=generator).tolist()
    return torch.stack([p[:, i : i + x.shape[2], j : j + x.shape[3]] for p, (i, j) in zip(padded, moves, strict=True)])


@torch.no_grad()
def accuracy_of(model: nn.Module, digits: Digits) -> float:
    """Return the percentage of the test images that are told right."""
    model.eval()
    told = torch.cat([model(part).argmax(1) for part in digits.test_x.split(500)])
    return 100 * float((told == digits.test_y).float().mean())


def probing_ratio(teacher: nn.Module, digits: Digits, seed: int, rounds: int = 40) -> float:
    """Return the median time of a step that watches two maps, over that of one written by hand for this network."""
    student = network(STUDENT, seed).to(digits.x.device)
    terms = [{"name": "hint", "student": place, "adapter": WIDEN} for place in ("relu2", "relu3")]
    objective = Distillation(teacher, terms=terms).to(digits.x.device)
    batch = {"inputs": digits.x[:BATCH]}
    weights, biases = (list(objective.parameters())[i::2] for i in range(2))

    def by_hand() -> None:
        x, goals = batch["inputs"], []
        with torch.no_grad():
            y = x
            for layer in list(teacher.children())[:9]:
                y = layer(y)
                goals += [y] if isinstance(layer, nn.ReLU) else []
        found = []
        for layer in student.children():
            x = layer(x)
            found += [x] if isinstance(layer, nn.ReLU) else []
        losses = []
        for mine, goal, weight, bias in zip(found[1:], goals[1:], weights, biases, strict=True):
            mapped = F.conv1d(mine.flatten(2), weight.unsqueeze(-1), bias).unflatten(2, mine.shape[2:])
            losses.append(F.mse_loss(mapped, goal))
        torch.stack(losses).sum().backward()

    def probed() -> None:
        objective(student, batch)["loss"].backward()

    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            (probed, by_hand)[which]()
            times[which].append(time.process_time() - start)
    return statistics.median(times[0][4:]) / statistics.median(times[1][4:])


def epochs(count: int) -> int:
    """Return how many epochs this run makes of `count`: a smoke run makes a tenth."""
    return max(count // 10, 1) if smoke() else count


def picture(seed: int, device: torch.device) -> Figure:
    """Draw which pixels the last maps of the teacher and of three students are active at, for a few digits."""
    from matplotlib.figure import Figure

    digits = load_digits(device)
    teacher = train_teacher(digits, seed)
    shown = {"teacher": teacher}
    for name in ("ce", "kd", "attention_transfer"):
        shown[name] = trained_student(METHODS[name], teacher, digits, seed)
    drawing = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = drawing.subplots(len(shown) + 1, 8)
    images = digits.test_x[:8]
    for axis, image in zip(axes[0], images, strict=True):
        axis.imshow(image[0].cpu(), cmap="gray_r")
    for row, (name, model) in zip(axes[1:], shown.items(), strict=True):
        with torch.no_grad(), capture(model, outputs=["relu2"]) as seen:
            told = model.eval()(images).argmax(1)
        for axis, flat, guess in zip(row, activity(seen.tensor("relu2")), told.tolist(), strict=True):
            axis.imshow(flat.reshape(7, 7).cpu(), cmap="viridis")
            axis.set_xlabel(str(guess))
        row[0].set_ylabel(name.replace("_", "\n"))
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    drawing.suptitle("where the second maps are active, and what is told")
    return drawing
