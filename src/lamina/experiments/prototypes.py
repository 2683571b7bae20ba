"""Prototype networks: a classifier that says which learned cases an input is close to, and shows them.

What for: predictions that have to be explained by the very numbers they are computed from, "this is a 7, for it is near
these two prototypes", on any encoder; not a second model that guesses afterwards.

    model = PrototypeNetwork(image=28)                        # encoder, decoder, 15 prototypes; images from 0 to 1
    loss = PrototypeObjective()(model, {"pixel_values": x, "labels": y})["loss"]
    print(model.explain(x[:1]))                               # prototypes, distances, what each adds to each logit
    pictures = model.decoded_prototypes()

A model you have: `rewrite(model, Replace("head", "prototype_head", options={"num_prototypes": 30}))`, then
`prototype_penalties` beside its own objective, and
`explain_prototypes(model, batch, nearest=nearest_training(model, data))`.
In a recipe: `model: prototype_network`, `objective: prototype`, or `head: prototype_head` in our models. Where a
pretrained trunk's latents are far from 0..1, start with `head.initialize(latents, labels)`.

How it works: the latent z is compared with m prototypes, d_j = |z - p_j|^2, and logits are a linear function of the d
without bias; a negative weight means that being near speaks for the class. Everything learns together. Two penalties
make prototypes mean something: R1 pulls each to its nearest latent of the batch, R2 each latent to its nearest
prototype; a decoder, trained by reconstruction, shows them. Distances are taken in float32 after the prototypes' mean
was subtracted. Over several processes R1 seeks the nearest latent among all of them.

What is measured: digits of 8 x 8, 1200 to train on and 597 to test, three convolutions of stride 2 to a latent of
width 10. `accuracy`: against the same encoder and decoder with a linear head. `r1`, `r2` over the training images, and
`realism`, the mean squared error of a decoded prototype to its nearest training image: against the same network without
the penalties. `named`: share of prototypes whose class (the most negative weight) is that image's label. With MNIST at
hand, on 10,000 of its images, elastically deformed: accuracy, and how many of the ten classes have a prototype that
decodes to an image near one of theirs.

What was found: the penalties do what they are said to do, in every run (R1 25 times smaller and more, R2 45 times, the
decoded prototypes 0.35 to 0.43 of the distance to an image, three quarters named after it), at no cost of accuracy:
98.2 % with them and without, 97.7 % with the linear head. The bar, half a point of accuracy at most, is met by the mean
(+0.6 points) and missed by one of the seeds, three images of 597 (0.5025 points); the interval is held to it, hence
`direction only`. Nothing was tried to better it. The convolutions start as torch's do: from the official start
(deviation 0.01) the same epochs gave 97.3 % on one seed, for the first ten are spent on getting under way. On MNIST,
beside the evidence, one seed: 94.6 % after its 15 epochs of deformed images, 8 classes covered; 96 % was hoped for.

Limits: prototypes are of whole images, not of parts. The weights are free, so a prototype may speak against a class. A
distance of latents is none of pixels, and what the encoder does before is not explained. Distances grow with the width
of the latent. Without a decoder, prototypes are shown by the training inputs nearest to them.

Composes with: `Replace` of any model's head, LAMB, drop passes before and after, distillation, `elastically_deformed`
data, data parallel training.
Source: Li, Liu, Chen, Rudin, Deep Learning for Case-Based Reasoning through Prototypes (AAAI 2018), arXiv 1710.04806.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data import digit_images, elastic_deformation, mnist
from lamina.errors import LaminaError
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.models import PrototypeNetwork
from lamina.nn import prototype_penalties
from lamina.objectives import PrototypeObjective
from lamina.objectives.prototype import reconstruction_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = (
    "model prototype_network",
    "layer prototype_head",
    "layer prototype_layer",
    "objective prototype",
    "objective prototype_penalties",
    "data elastically_deformed",
)
EPOCHS, BATCH, RATE, WIDTHS = 60, 50, 2e-3, (32, 32, 10)
Arm = Literal["prototypes", "no penalties", "linear"]


@experiment(
    "prototypes",
    source="MNIST with 15 prototypes: as accurate as the same network without; meaningless without R1 and R2",
    bar="accuracy(ours) - accuracy(baseline) >= -0.005 and r1(baseline) / r1(ours) >= 10 and "
    "r2(baseline) / r2(ours) >= 10 and realism(ours) / realism(baseline) < 0.5 and named(ours) > 0.5, 3 seeds",
    seeds=(0, 1, 2),
    budget="3m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train the three networks; `baseline` is the linear head's accuracy, and the rest of the one without penalties."""
    digits = load_digits(device)
    ours, loose = (figures(trained(arm, seed, device), digits) for arm in ("prototypes", "no penalties"))
    linear = accuracy(trained("linear", seed, device), digits)
    baseline = {**loose, "accuracy": linear}
    extra = {"accuracy_without_penalties": loose["accuracy"], **on_mnist(seed, device)}
    paper = "MNIST: 99.22 % with 15 prototypes, 99.24 % without"
    return Measurement(ours, baseline, paper, extra=extra)


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) from 0 to 1 and classes of scikit-learn's digits."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits(device: torch.device) -> Digits:
    """Load the digits, split 1200 : 597 the same way for every seed."""
    images, y = (t.to(device) for t in digit_images(seed=0))
    x = images[:, None]
    return Digits(x[:1200], y[:1200], x[1200:], y[1200:])


@functools.cache
def trained(arm: Arm, seed: int, device: torch.device) -> nn.Module:
    """Train one arm with Adam; all see the same batches and start from the same encoder and decoder."""
    digits = load_digits(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = PrototypeNetwork(image=8, widths=WIDTHS, weight_std=None, seed=seed)
        model = (LinearNetwork(network) if arm == "linear" else network).to(device)
    weight = 1.0 if arm == "prototypes" else 0.0
    objective = PrototypeObjective(prototype_to_data=weight, data_to_prototype=weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS // 10 if smoke() else EPOCHS):
        for rows in torch.randperm(len(digits.x), generator=generator).split(BATCH):
            batch = {"pixel_values": digits.x[rows], "labels": digits.y[rows]}
            optimizer.zero_grad()
            loss = model.loss(batch) if isinstance(model, LinearNetwork) else objective(model, batch)["loss"]
            loss.backward()
            optimizer.step()
    return model.eval()


class LinearNetwork(nn.Module):
    """The encoder and decoder of a prototype network with a linear head, and the two losses that are left."""

    def __init__(self, network: PrototypeNetwork) -> None:
        super().__init__()
        assert network.decoder is not None
        self.encoder, self.decoder = network.encoder, network.decoder
        self.head = nn.Linear(network.head.in_features, network.head.num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.encoder(pixel_values).flatten(1))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Weigh classification and reconstruction as the prototype network does."""
        maps = self.encoder(batch["pixel_values"])
        told = F.cross_entropy(self.head(maps.flatten(1)), batch["labels"])
        return 20.0 * told + reconstruction_error(self.decoder(maps), batch["pixel_values"])


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test images that are told right."""
    out = model(digits.test_x)
    told = (out if isinstance(out, Tensor) else out.logits).argmax(1)
    return float((told == digits.test_y).float().mean())


@torch.no_grad()
def figures(model: nn.Module, digits: Digits) -> dict[str, float]:
    """Measure a prototype network: accuracy, both penalties, and how its decoded prototypes look."""
    assert isinstance(model, PrototypeNetwork)
    first, second = prototype_penalties(model(digits.x).distances)
    errors, rows = nearest_images(model.decoded_prototypes(), digits.x)
    named = digits.y[rows] == model.head.prototype_class()
    return {
        "accuracy": accuracy(model, digits),
        "r1": float(first),
        "r2": float(second),
        "realism": float(errors.mean()),
        "named": float(named.float().mean()),
    }


def nearest_images(pictures: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of each picture to its nearest image, and that image's number."""
    apart = torch.cdist(pictures.flatten(1), images.flatten(1)).square() / images[0].numel()
    errors, rows = apart.min(1)
    return errors, rows


def on_mnist(seed: int, device: torch.device) -> dict[str, float]:
    """Train the paper's network on 10,000 images for 15 epochs; nothing without a folder that has MNIST."""
    try:
        # A folder that is named is not looked for on the hub: an experiment does not download.
        data = mnist(250, limit=1000 if smoke() else 10_000, folder=os.environ.get("LAMINA_DATA") or ".")
    except LaminaError:
        return {}
    assert data.evaluation is not None
    parts = [part.batch(torch.arange(len(part))) for part in (data.train, data.evaluation)]
    # The named set is standardised; the decoder shows 0..1.
    (x, y), (test_x, test_y) = (
        ((p["pixel_values"] * 0.3081 + 0.1307).clamp(0, 1).to(device), p["labels"].to(device)) for p in parts
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PrototypeNetwork(weight_std=None, seed=seed).to(device)
    objective, optimizer = PrototypeObjective(), torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2 if smoke() else 15):
        for rows in torch.randperm(len(x), generator=generator).split(250):
            batch = {"pixel_values": elastic_deformation(x[rows], generator=generator), "labels": y[rows]}
            optimizer.zero_grad()
            objective(model, batch)["loss"].backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        told = torch.cat([model(part).logits.argmax(1) for part in test_x.split(500)])
        _, rows = nearest_images(model.decoded_prototypes(), x)
    return {
        "mnist_accuracy": float((told == test_y).float().mean()),
        "mnist_classes_covered": float(len(y[rows].unique())),
    }


def picture(seed: int, device: torch.device) -> Figure:
    """Draw the decoded prototypes, and the explanation of one prediction beside them."""
    from matplotlib.figure import Figure

    digits, model = load_digits(device), trained("prototypes", seed, device)
    assert isinstance(model, PrototypeNetwork)
    shown, classes = model.decoded_prototypes(), model.head.prototype_class()
    told = model.explain(digits.test_x[:1], top=3)
    assert told.pictures is not None
    drawing = Figure(figsize=(8.4, 3.4), layout="constrained")
    parts: Any = drawing.subfigures(1, 2, width_ratios=(1.1, 1.0))
    left, right = parts
    left.suptitle("prototypes, decoded, and their class")
    columns = -(-len(shown) // 3)
    order = classes.argsort(stable=True).tolist()
    for place, axis in enumerate(_axes(left, 3, columns)):
        if place < len(order):
            _show(axis, shown[order[place]], f"{int(classes[order[place]])}")
    guess = int(told.logits[0].argmax())
    right.suptitle(f"an input, and why it is told to be a {guess}")
    axes = _axes(right, 1, 4)
    _show(axes[0], digits.test_x[0], f"input: a {int(digits.test_y[0])}")
    for place, axis in enumerate(axes[1:]):
        near, adds = float(told.distances[0, place]), float(told.contributions[0, place, guess])
        _show(
            axis, told.pictures[0, place], f"class {int(told.classes[0, place])}\ndistance {near:.2f}\nadds {adds:.2f}"
        )
    right.supxlabel(
        f"the other prototypes add {float(told.others[0, guess]):.2f}; logit {float(told.logits[0, guess]):.2f}"
    )
    return drawing


def _axes(part: Any, rows: int, columns: int) -> list[Any]:
    axes = list(part.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    return axes


def _show(axis: Any, image: Tensor, title: str) -> None:
    axis.imshow(image[0].detach().cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=8)
