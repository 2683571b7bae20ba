"""MEAL V2: a trained classifier gets better by following the average opinion of several stronger ones, without labels.

What for: a few points for a model that is in use already, at its architecture and its cost: fine-tune it on what larger
models say, on images that need no labels; or heal what a pass cost, by the model from before.

    objective = EnsembleDistillation([first, second])                   # any loop; the student begins trained
    SGD(student.parameters(), lr=0.01, momentum=0.9)                    # no weight decay; later a tenth of the rate
    objective(student, batch)["loss"].backward()
    {name: ensemble_distillation, teachers: [{name: "lamina.io:load", folder: runs/a/model}, ...]}      # a recipe
    store = SoftLabelStore("labels", crops=Crops(), count=8); store.record(data, teachers)              # asked once
    for batch in Loader(store.wrap(data).train, 64): ...                # EnsembleDistillation() follows what is stored

`lamina train meal` (recipes/meal.yaml) is one that runs: two teachers and a student, trained there, on small images.

How it works: the target is the mean of the teachers' probabilities, the loss its cross-entropy with the student, and
nothing else. Teachers see the very batch that the student sees, in evaluation mode whatever a trainer says, under
inference_mode, in bf16 where asked; they are no submodules, so nothing of them is saved, trained or wrapped. They may
have other classes (`label_map`), other inputs (`input_transforms`), answers on disk (`cache`). A store keeps crops as
boxes with the five largest probabilities of each (the rest is spread evenly): 30 bytes a crop and no teacher to run. A
student that is no nearer to its teachers than a guess is refused: the method needs trained weights. The published
discriminator is there with both signs, off by default.

What is measured: MNIST, the first 1,000 images to train on, 4,000 to test. Teachers of 40 channels, 25 epochs; the
student of 12, 40 epochs, images moved by up to two pixels; then 40 epochs more, the same moved images for every arm.
Ours is the student after MEAL V2 without labels and decay, the baseline the student before. Beside it, from the same
weights: labels (plain training goes on), label smoothing, distillation from one teacher (temperature 4, a tenth
labels), with weight decay, with half the labels' loss added, eight stored crops an image; and from random weights. With
the first seed the discriminator of either sign.

What was found: the direction only, +0.2 points over three seeds (0.4, -0.2, 0.3; bar 0.4): 94.8 % after, 94.6 before.
The student that one cycle at 0.05 left is within 0.8 points of its teachers together (95.4), so there is little to take
over; nothing was tuned after that. Labels do better here: plain training continued 95.2, label smoothing 95.4 (MEAL V2
is 0.4 points below the first); half the labels' loss beside it 95.1; one teacher alone 94.6. What the paper says of
the rest holds: from random weights 89.2, 5.6 points below; with decay 94.7, no difference; eight stored crops 94.7, as
good as asking. Discriminator (first seed, 94.9 without): cooperative 94.9, adversarial 94.8.

Limits: labels at hand are worth more than the ensemble where teachers are hardly better than the student, as here. With
ten classes the discriminator has two hidden units a layer, which are easily dead; a loop of one's own must give it a
group of its own for its rate. Every step costs the teachers' forward passes, unless stored. A wrong order of equally
many classes cannot be seen. Sequences count position by position, rows labelled -100 for nothing.

Composes with: any pass in training (its teacher is the model before), LAMB, reducers, hypercomplex and other layers in
any slot of student or teachers, `random_crops`, objectives beside it, data parallel training, compiled models.
Source: Shen and Savvides, MEAL V2 (2020), arXiv 2009.08453; Shen et al., MEAL (2019), arXiv 1812.02425; Shen and Xing,
A Fast Knowledge Distillation Framework (2021), arXiv 2112.01528.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn

from lamina.data import Columns, Crops, Data, Examples, Loader, random_crops
from lamina.experiments.harness import Measurement, experiment
from lamina.experiments.torchdistill import (
    BATCH,
    KD,
    STUDENT,
    TEACHER,
    Digits,
    accuracy_of,
    epochs,
    fit,
    load_digits,
    network,
)
from lamina.objectives import Classification, Distillation, EnsembleDistillation, Objective, SoftLabelStore
from lamina.recipe import Node, build
from lamina.registry import Slot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("objective ensemble_distillation", "data random_crops")
TESTS = (
    "tests/objectives/test_ensemble_distillation.py",
    "tests/objectives/test_soft_labels.py",
    "tests/data/test_crops.py",
)
SHIFTS = Crops(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, padding=2)
"""Images moved by up to two pixels."""
RATE, LATER, TURN = 0.01, 0.001, 100 / 190
"""Learning rates, and the share of the steps after which the second one holds: epoch 100 of 180 to 200."""
KEPT_CROPS = 8
"""Crops of each image in the store that is reported."""

Arm = Callable[[list[nn.Module]], Objective]
ARMS: dict[str, Arm] = {
    "meal": lambda t: EnsembleDistillation(t),
    "labels": lambda t: Classification(),
    "label_smoothing": lambda t: Classification(label_smoothing=0.1),
    "distillation": lambda t: Distillation(t[0], terms=[KD]),
}
"""How the trained student goes on with every seed: the objective, given the teachers."""
FIRST_SEED: dict[str, Arm] = {
    "meal_cooperative": lambda t: EnsembleDistillation.official(t),
    "meal_adversarial": lambda t: EnsembleDistillation(t, discriminator="adversarial"),
}
"""With the first one only."""


@experiment(
    "meal-v2",
    source="table 3: ResNet-50 on ImageNet 80.67, from 76.5 before",
    bar="accuracy(ours) - accuracy(baseline) >= 0.4, 3 seeds",
    seeds=(0, 1, 2),
    budget="6m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train two teachers and a student on labels; ours is the student after MEAL V2, the baseline before it."""
    images = load_digits(device)
    teachers, base = trained_models(images, seed)
    rows = shifted_rows(images)
    before = accuracy_of(base, images)
    found = {}
    for name, objective in (ARMS | FIRST_SEED if seed == 0 else ARMS).items():
        student = copy.deepcopy(base)
        torch.manual_seed(seed)
        made = objective(teachers)
        follow(student, made.to(device) if isinstance(made, nn.Module) else made, rows, seed)
        found[name] = accuracy_of(student, images)
    found |= from_stores(base, teachers, images, seed)
    extra = {"accuracy_ensemble": ensemble_accuracy(teachers, images)}
    extra |= {f"accuracy_{name}": value for name, value in found.items() if name != "meal"}
    extra["from_init_over_from_scratch"] = found["meal"] - found["meal_from_scratch"]
    extra["over_labels_continued"] = found["meal"] - found["labels"]
    paper = "ImageNet, ResNet-50 76.5 -> 80.67, ResNet-18 69.76 -> 73.19, MobileNetV3-Large 75.3 -> 76.92"
    return Measurement({"accuracy": found["meal"]}, {"accuracy": before}, paper, "%", extra)


def trained_models(images: Digits, seed: int) -> tuple[list[nn.Module], nn.Module]:
    """Train two wide networks and the student on labels, images moved."""
    rows = Columns({"inputs": images.x, "labels": images.y})
    models = [network(TEACHER, 10 * seed + 1), network(TEACHER, 10 * seed + 2), _fresh(images, seed)]
    for i, (model, count) in enumerate(zip(models, (25, 25, 40), strict=True)):
        fit(model.to(images.x.device), Classification(), rows, 10 * seed + i, epochs(count), shifts=2)
    return [m.eval() for m in models[:2]], models[2]


def shifted_rows(images: Digits) -> Examples:
    """Return the training rows, moved anew in every epoch."""
    data = Data(Columns({"inputs": images.x, "labels": images.y}), None, BATCH)
    return random_crops(data, scale=SHIFTS.scale, ratio=SHIFTS.ratio, flip=0.0, padding=2, entry="inputs").train


def follow(student: nn.Module, objective: Objective, rows: Examples, seed: int, decay: float = 0.0) -> None:
    """Fine-tune for 40 epochs by SGD with momentum 0.9, at two rates as published."""
    loader = Loader(rows, BATCH, seed=seed)
    steps = epochs(40) * loader.batches_per_epoch
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE, momentum=0.9, weight_decay=decay)
    told = getattr(objective, "rate_factors", tuple)
    factors = [1.0]
    for parameter, factor in told():
        optimizer.add_param_group({"params": [parameter]})
        factors.append(factor)
    student.train()
    for step in range(steps):
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = factor * (RATE if step < TURN * steps else LATER)
        optimizer.zero_grad()
        objective(student, next(loader))["loss"].backward()
        optimizer.step()


def from_stores(base: nn.Module, teachers: list[nn.Module], images: Digits, seed: int) -> dict[str, float]:
    """Return accuracies of students that never meet their teachers.

    With a crop for every epoch and all probabilities kept they see what they would be told otherwise, exactly, and the
    teachers are asked once for all of them.
    """
    rows = Columns({"inputs": images.x, "labels": images.y})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        exact = SoftLabelStore(f"{folder}/exact", None, SHIFTS, count=epochs(40), entry="inputs", seed=seed)
        exact.record(rows, teachers, batch=500)
        arms: dict[str, tuple[EnsembleDistillation, nn.Module, float]] = {
            "meal_decay": (EnsembleDistillation(), base, 1e-4),
            "meal_hard_label": (EnsembleDistillation(hard_weight=0.5), base, 0.0),
            "meal_from_scratch": (EnsembleDistillation(allow_scratch=True), _fresh(images, seed), 0.0),
        }
        for name, (objective, begun, decay) in arms.items():
            student = copy.deepcopy(begun)
            follow(student, objective, exact.wrap(rows), seed, decay)
            found[name] = accuracy_of(student, images)
        few = SoftLabelStore(f"{folder}/few", 5, SHIFTS, count=KEPT_CROPS, entry="inputs", seed=seed)
        few.record(rows, teachers, batch=500)
        student = copy.deepcopy(base)
        follow(student, EnsembleDistillation(), few.wrap(rows), seed)
        found["meal_stored"] = accuracy_of(student, images)
    return found


def _fresh(images: Digits, seed: int) -> nn.Module:
    return network(STUDENT, 1000 + seed).to(images.x.device)


@torch.no_grad()
def ensemble_accuracy(teachers: list[nn.Module], images: Digits) -> float:
    """Return the accuracy of the mean probabilities, in percent."""
    said = torch.stack([t.eval()(images.test_x).softmax(-1) for t in teachers]).mean(0)
    return 100 * float((said.argmax(1) == images.test_y).float().mean())


def trained(
    model: Annotated[Node, Slot("model")],
    *,
    data: Annotated[Node | Data, Slot("data")] = "digits",
    count: int = 8,
    lr: float = 0.05,
    seed: int = 0,
) -> nn.Module:
    """Build a model and train it on labels: for `recipes/meal.yaml`, which begins where others ended.

    Args:
        model: recipe node.
        data: on which; images and labels.
        count: epochs.
        lr: highest rate of one cycle of SGD.
        seed: of the weights and of the order.
    """
    given: Data = data if isinstance(data, Data) else build(data, "data")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = build(model, "model", **given.sizes)
        loader = Loader(given.train, given.batch, seed=seed)
        optimizer = torch.optim.SGD(made.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        steps = count * loader.batches_per_epoch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        made.train()
        for _ in range(steps):
            optimizer.zero_grad()
            Classification()(made, next(loader))["loss"].backward()
            optimizer.step()
            schedule.step()
    return made


def picture(seed: int, device: torch.device) -> Figure:
    """Draw what the student said before and after of digits it had wrong, and what its teachers say."""
    from matplotlib.figure import Figure

    images = load_digits(device)
    teachers, base = trained_models(images, seed)
    student = copy.deepcopy(base)
    follow(student, EnsembleDistillation(teachers), shifted_rows(images), seed)
    with torch.no_grad():
        before, after = (m.eval()(images.test_x).softmax(-1) for m in (base, student))
        said = torch.stack([t(images.test_x).softmax(-1) for t in teachers]).mean(0)
    chosen = _mended(before, after, images.test_y)[:6].tolist()
    drawing = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = drawing.subplots(2, len(chosen), squeeze=False, height_ratios=[1, 2])
    for column, row in enumerate(chosen):
        axes[0, column].imshow(images.test_x[row, 0].cpu(), cmap="gray_r")
        axes[0, column].set_axis_off()
        for i, (name, told) in enumerate((("before", before), ("teachers", said), ("after", after))):
            places = torch.arange(10) + 0.27 * (i - 1)
            axes[1, column].barh(places.tolist(), told[row].tolist(), 0.27, label=name)
        axes[1, column].set_yticks(range(10))
        axes[1, column].set_xlim(0, 1)
        axes[1, column].invert_yaxis()
    axes[1, 0].set_ylabel("class")
    drawing.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    drawing.suptitle("digits that the student had wrong before and right after: what is said of them")
    return drawing


def _mended(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """Number the rows that became right, the surest errors first."""
    rows = ((before.argmax(1) != labels) & (after.argmax(1) == labels)).nonzero().flatten()
    return rows[before.max(1).values[rows].argsort(descending=True)]
