"""Linear interpreters: the exact affine map y = F x + r that a network applied to one input: rows, columns, bias, SVD.

What for: seeing what an output looked at and how, where an input went, and what share of an answer came from biases
and not from the input; for classifiers, super-resolution and image-to-image networks, and what a rewrite changed in
them.

    system = linear_interpreter(model, x)                      # x: one input, (1, ...); the model is left as it is
    system.contributions(3)                                    # the vote of every pixel for logit 3; with bias[0, 3]
    system.row(3), system.column((0, 4, 4)), system.svd(8)     # without ever building F; system.matrix() builds it
    affine_parts(model, batch)                                 # F x and r of many inputs at once
    lamina explain MODEL_FOLDER photo.png --svd 8              # a page with pictures and arrays

How it works: the model's own code runs at x. One torch function mode sees every call, and does for probes beside x
what x decided: ReLUs keep their slopes and pools their winners, smooth units the gain phi(x) / x, norms their
statistics, attention its weights, a product its gate. What is left is affine in the probe: r is what becomes of 0, a
column what becomes of a unit, a row the gradient of an output. In a piecewise-linear network F is the Jacobian;
elsewhere it is not, and `rule="tangent"` makes it so for pointwise units.

What is measured: a small VGG-like net on digits, with biases and without. `lost` is its accuracy less that of F x
alone; `bias_alone` that of r alone, `share` the mean of |r| / (|F x| + |r|) of the winning logit. That votes and bias
add up to each logit to 1e-5, and that nothing remains without biases, is asserted. Reported beside, with no bar: a
super-resolution net (x2, on two photographs) against bicubic: the part of a column's energy within 9 x 9 pixels, the
sum of a row, the ratio of a row's principal axes at edges and in flat places, the mean frequency (cycles a pixel) of
the leading singular images; and the time of one probe over that of a plain pass.

What was found: reproduced. With biases 26 to 39 points of accuracy go when r is taken away (r alone is right for 11 to
35 %), and r is 30 to 42 % of the winning logit; without biases nothing goes. The super-resolution net (0.5 dB above
bicubic) has columns as local as expected (97 % of the energy within 9 x 9) and rows that sum to about 1 on average,
though the furthest of a run were 0.06 to 1.31. Its leading singular images
oscillate (0.6 cycles a pixel). That rows are longer along edges than in flat places (expected: above 1.5 and below 1.3)
was not found: the axes are 1.3 to 1 in both. The seconds of a probe were taken on a busy machine; `benchmarks/` has
them paired.

Limits: one input at a time (or rows that do not see each other); no recurrent kernels (unrolled cells are fine), no
scripts, no compiled models; what leaves torch (`.item()`, numpy) cannot be followed. Secants blow up near 0:
`check()` tells the largest gain. Probabilities after a softmax are all bias: look at logits. F describes one input
only.

Composes with: any torch model, before and after every pass; foldings keep every vote.
Source: Navarrete Michelini, Liu, Lu, Jiang, A Tour of Convolutional Networks Guided by Linear Interpreters (2019),
arXiv 1908.05168.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data import digit_images
from lamina.errors import LaminaError, require
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.verify import LinearInterpreter, affine_parts

PARTS: tuple[str, ...] = ()
TESTS = (
    "tests/verify/test_linear_interpreter.py",
    "tests/verify/test_linear_scopes.py",
    "tests/verify/test_matrix_free_svd.py",
    "tests/verify/test_explain.py",
)

PATCH = 24
"""Side of the low-resolution patches of the super-resolution net."""


@experiment(
    "linear-interpreter",
    source="the figures of classifiers: a class score is a vote of the pixels and a large part from biases, which "
    "often decides (digits unconfirmed)",
    bar="lost(ours) >= 0.20 and lost(baseline) <= 0.0, 3 seeds",
    seeds=(0, 1, 2),
    budget="10m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train the net with biases and without, and the super-resolution net; take their linear systems apart."""
    digits = load_digits(seed, device)
    ours = take_apart(classifier(seed, digits, bias=True), digits, bias=True)
    baseline = take_apart(classifier(seed, digits, bias=False), digits, bias=False)
    extra = super_resolution_figures(seed, device)
    paper = "figures only: the bias part is large in classifiers; super-resolution rows follow edges"
    return Measurement(ours, baseline, paper, unit="accuracy", extra=extra)


Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def load_digits(seed: int, device: torch.device) -> Digits:
    """Return training images (N, 1, 8, 8) of 0..1 and classes, and those of the held-out 30 %."""
    images, classes = digit_images(seed)
    images, classes, held = images[:, None].to(device), classes.to(device), round(0.3 * len(classes))
    return images[held:], classes[held:], images[:held], classes[:held]


def classifier(seed: int, digits: Digits, *, bias: bool) -> nn.Sequential:
    """Train conv16-conv32-maxpool-conv32-mean-linear for 15 epochs with Adam 3e-3."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=bias), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 32, 3, padding=1, bias=bias), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 10, bias=bias)).to(digits[0].device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(2 if smoke() else 15):
        for rows in torch.randperm(len(digits[0])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(digits[0][rows]), digits[1][rows]).backward()
            optimizer.step()
    return model.eval()


def take_apart(model: nn.Module, digits: Digits, *, bias: bool) -> dict[str, float]:
    """Return accuracies of the net, of F x and of r alone, and the share of r in the winning logit.

    Raises:
        LaminaError: votes and bias do not add up to a logit, or something remains without biases.
    """
    x, y = digits[2:]
    filtered, rest = affine_parts(model, x)
    logits = filtered + rest
    _assert_votes(model, x[:10])
    if not bias and float(rest.abs().max()) > 1e-6 * float(logits.abs().max()):
        raise LaminaError(f"without biases {float(rest.abs().max()):.2g} remains")
    accuracy, alone = (float((z.argmax(1) == y).float().mean()) for z in (logits, filtered))
    won = logits.argmax(1, keepdim=True)
    part, left = filtered.gather(1, won).abs(), rest.gather(1, won).abs()
    return {
        "lost": accuracy - alone,
        "accuracy": accuracy,
        "filtered_alone": alone,
        "bias_alone": float((rest.argmax(1) == y).float().mean()),
        "share": float((left / (part + left)).mean()),
    }


def _assert_votes(model: nn.Module, images: Tensor) -> None:
    for image in images.split(1):
        system = LinearInterpreter(model, image)
        for i, logit in enumerate(system.output[0]):
            error = float((system.contributions(i).sum() + system.bias[0, i] - logit).abs())
            if error > 1e-5 * max(1.0, float(system.output.abs().max())):
                raise LaminaError(f"votes and bias miss logit {i} by {error:.2g}")


def super_resolution(seed: int, device: torch.device) -> tuple[nn.Sequential, list[Tensor]]:
    """Train a net x2 on the upper three quarters of two photographs; return it and the lower quarters (1, 1, H, W)."""
    photographs = require("sklearn.datasets", "experiments").load_sample_images().images
    grey = [torch.from_numpy(p.copy()).float().mean(2)[None, None].to(device) / 255 for p in photographs]
    upper, lower = zip(*((g[:, :, : 3 * g.shape[2] // 4], g[:, :, 3 * g.shape[2] // 4 :]) for g in grey), strict=True)
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 3, padding=1), nn.PixelShuffle(2)]
    model, steps = nn.Sequential(*layers).to(device), 40 if smoke() else 1500
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        sharp = torch.cat([_crop(upper[i % 2], 2 * PATCH) for i in range(16)])
        optimizer.zero_grad()
        F.mse_loss(model(_halved(sharp)), sharp).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), list(lower)


def _crop(image: Tensor, side: int) -> Tensor:
    top, left = (int(torch.randint(n - side + 1, ())) for n in image.shape[2:])
    return image[:, :, top : top + side, left : left + side]


def _halved(image: Tensor) -> Tensor:
    return F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True)


def super_resolution_figures(seed: int, device: torch.device, patches: int = 8) -> dict[str, float]:
    """Return what the linear systems of held-out patches look like, and how the net compares with bicubic."""
    model, lower = super_resolution(seed, device)
    signal = {
        "sr_psnr": _psnr(model, lower),
        "bicubic_psnr": _psnr(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), lower),
    }
    local, sums, edge, flat, frequencies = [], [], [], [], []
    for i in range(2 if smoke() else patches):
        x = _halved(_crop(lower[i % 2], 2 * PATCH))
        system = LinearInterpreter(model, x)
        local += [_energy_near(system, place) for place in ((8, 8), (12, 12), (15, 9))]
        steep, level = _edges_and_flats(x)
        edge += [_axes(system.row((0, *place))) for place in steep]
        flat += [_axes(system.row((0, *place))) for place in level]
        sums += [float(system.row((0, *place)).sum()) for place in (*steep, *level)]
        if i < 2:
            triples = system.svd(4 if smoke() else 8, "lanczos", tolerance=1e-3)
            frequencies += [_frequency(right[0]) for right in triples.right]
    return {
        **signal,
        "column_energy_in_9x9": statistics.mean(local),
        "row_sum": statistics.mean(sums),
        "row_sum_furthest_from_1": max(sums, key=lambda s: abs(s - 1)),
        "axes_at_edges": statistics.median(edge),
        "axes_in_flats": statistics.median(flat),
        "cycles_a_pixel_of_singular_images": statistics.mean(frequencies),
        "seconds_of_a_probe_over_a_pass": cost(model, torch.rand(1, 1, 64, 64, device=device)),
    }


def _psnr(enlarge: Callable[[Tensor], Tensor], images: list[Tensor]) -> float:
    with torch.no_grad():
        even = [image[:, :, : image.shape[2] // 2 * 2, : image.shape[3] // 2 * 2] for image in images]
        errors = [float(F.mse_loss(enlarge(_halved(image)), image)) for image in even]
    return float(-10 * torch.tensor(errors).mean().log10())


def _energy_near(system: LinearInterpreter, place: tuple[int, int]) -> float:
    """Return the part of a column's energy within 9 x 9 pixels round where its input lies in the large image."""
    energy = system.column((0, *place))[0, 0].square()
    top, left = 2 * place[0] - 4, 2 * place[1] - 4
    return float(energy[top : top + 9, left : left + 9].sum() / energy.sum())


def _edges_and_flats(x: Tensor, count: int = 3, margin: int = 6) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the steepest and the flattest places, in the large image, away from the border."""
    down, across = torch.gradient(x[0, 0])
    steep = (down.square() + across.square())[margin:-margin, margin:-margin]
    order = steep.flatten().argsort(descending=True).tolist()
    places = [(2 * (i // steep.shape[1] + margin), 2 * (i % steep.shape[1] + margin)) for i in order]
    return places[:count], places[-count:]


def _axes(row: Tensor) -> float:
    """Return the ratio of the principal axes of a row's energy."""
    weights = row[0, 0].double().square()
    weights = weights / weights.sum()
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in weights.shape), indexing="ij")).double()
    grid = grid.to(weights).flatten(1)
    centred = grid - (grid * weights.flatten()).sum(1, keepdim=True)
    small, large = torch.linalg.eigvalsh((centred * weights.flatten()) @ centred.T).tolist()
    return float((large / max(small, 1e-9)) ** 0.5)


def _frequency(image: Tensor) -> float:
    """Return the mean frequency of an image, weighed by its power, in cycles a pixel."""
    power = torch.fft.fft2(image).abs().square()
    down, across = (torch.fft.fftfreq(n, dtype=torch.float64).to(power.device) for n in image.shape)
    radius = (down[:, None].square() + across.square()).sqrt()
    return float((radius * power).sum() / power.sum())


def cost(model: nn.Module, x: Tensor, rounds: int = 15) -> float:
    """Return the median time of one probe's pass over that of a plain forward pass, in turns."""
    system = LinearInterpreter(model, x)

    def plain() -> None:
        with torch.no_grad():
            model(x)

    ratios = []
    for _ in range(rounds):
        seconds = []
        for step in (lambda: system.apply(x), plain):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def picture(seed: int, device: torch.device) -> Any:
    """Draw the votes for a digit, and rows, a column and singular images of the super-resolution net."""
    from matplotlib.figure import Figure

    digits = load_digits(seed, device)
    votes = _votes(classifier(seed, digits, bias=True), digits)
    model, lower = super_resolution(seed, device)
    x = _halved(_crop(lower[0], 2 * PATCH))
    system, (steep, level) = LinearInterpreter(model, x), _edges_and_flats(x)
    rows = [("row in a flat place", system.row((0, *level[-1]))), ("row at an edge", system.row((0, *steep[0])))]
    column = ("a column", system.column((0, PATCH // 2, PATCH // 2)))
    triples = system.svd(8, "lanczos", tolerance=1e-3)
    singular = [(f"singular image {i + 1}", triples.right[i]) for i in (0, 3, 7)]
    panels = [*votes, ("small image", x), *rows, column, *singular]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for axis, (title, values) in zip(figure.subplots(2, 5).flat, panels, strict=True):
        shown = values.detach().cpu().reshape(-1, *values.shape[-2:])[0].numpy()
        grey, reach = title in ("digit", "small image"), float(abs(shown).max())
        limits = {} if grey else {"vmin": -reach, "vmax": reach}
        axis.imshow(shown, cmap="gray" if grey else "RdBu_r", interpolation="nearest", **limits)
        axis.set(title=title, xticks=[], yticks=[])
    return figure


def _votes(model: nn.Module, digits: Digits) -> list[tuple[str, Tensor]]:
    """Return a digit, and the votes for the class it is given and for the next."""
    image = digits[2][:1]
    system = LinearInterpreter(model, image)
    first, second = system.output[0].topk(2).indices.tolist()
    shown = []
    for i in (first, second):
        said = f"votes for {i}: {float(system.filter(image)[0, i]):.1f}, bias {float(system.bias[0, i]):.1f}"
        shown.append((said, system.contributions(i)))
    return [("digit", image), *shown]
