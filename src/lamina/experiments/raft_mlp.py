"""RaftMLP: an all-MLP vision backbone that mixes tokens along columns and rows, for images of any size.

What for: a backbone of MLPs alone, cheaper than MLP-Mixer and at any image size; token mixing that reaches the whole
map at a cost of N^1.5, in the mixer slot of other networks or in place of attention.

    model = models.raft_mlp_s(classes=10, image=32)             # sizes: s, m, l; mixer_b16_e2 is the baseline
    maps = models.raft_mlp_l(features_only=True)(pixel_values)  # four maps, for detection or segmentation, any size
    rewrite(vit, Replace("attention", "raft_token_mixing", options={"rafts": 4}))                 # a model you have
    MetaFormer(mixers={"name": "raft_token_mixing", "residual": False}, image=224)                # in a slot of ours
    load_raft_mlp(state, model)                                 # weights that okojoalg/raft-mlp saved

In a recipe: `model: {name: raft_mlp_s, drop_path: 0.0}`; classes, channels and image come from the data set. Half a
minute on digits: `tests/composition/recipes/raft_mlp_on_digits_lamb_drop_distillation.yaml`.

How it works: an MLP of every column, then one of every row, then one of the channels of each position, each after a
norm and with a residual. A raft is a set of R channels, C / R apart, that a token MLP reads together: R * H numbers in,
hidden twice as many, R * H out, the weights shared by all rafts and columns. Tokens come to the first dimension by
moving whole runs of channels, so a layer is one product of matrices with no transposition number by number. Levels
begin with a patch embedding that sees each patch through several windows, here a sum of strided convolutions. At
another size than the one trained on, the token mixing runs on the trained grid between two bicubic interpolations
(`ResizeTokenMixing`, for any mixer that is bound to a grid); at the trained size nothing is interpolated.

What is measured: MNIST, 10,000 images to train on and 2,000 to test, two levels (14 x 14 of width 32, 7 x 7 of width
64, two blocks each), 4 epochs of AdamW 2e-3. Four networks that differ in the token mixing and the embedding alone:
MLP-Mixer's one MLP over all tokens, rafts of one channel, rafts of two (ours), and these with windows of 2 and 4
pixels. `kept_32`, `kept_24`: accuracy on test images shown at 32 x 32 and 24 x 24 over that at 28 x 28, nothing
trained anew. That MLP-Mixer without the wrapper refuses these sizes, and that the token mixings cost 0.317 of its
multiply-adds, is checked in the run. The bar is held by the interval over seeds, not by the mean alone.

What was found: accuracy 93.4 % against MLP-Mixer's 92.7 % at 0.26 of its parameters, at worst 0.3 points behind in a
run, as claimed; but only 80 % of it is kept at 32 x 32 and 77 % at 24 x 24 (66 to 91 % by run), below the 90 % asked
for: hence `direction only`. MLP-Mixer in the same wrapper keeps 59 % and 42 %. The ablation points the paper's way: two
channels a raft are 0.6 points over one (within the noise), windows of two sizes 2.2 points over one. Nothing was
changed after the first run: sizes, rate, epochs and the way images are shown at another size stand as they were
written down.

Limits: bound to a grid: not equivariant to shifts, no masks, no causal form. A much larger image passes the token
mixing at the trained grid, so what is finer is lost there (in RaftMLP; with `residual=False` the trunk still adds it).
Below a quarter of the grid along an axis there is a warning. In place of attention a class token learns nothing in
these blocks: keep one attention, or read the mean of the cells. As detection backbones these networks are below
convolutions and attention, as the paper says itself. ImageNet was not trained here.

Composes with: LAMB and LARS, drop passes (`trunk: levels.1`) and their healing by distillation, `Replace` of its norms,
linear layers, convolutions and head, the slots `linear` and `head`, MetaFormer, data parallel training, compile at any
size, ONNX.
Source: Tatsunami, Taki, RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality? (ACCV 2022),
arXiv 2108.04384; MLP-Mixer: Tolstikhin et al. (2021), arXiv 2105.01601.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamina.data import mnist
from lamina.errors import ShapeError
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.models import RaftMLP

PARTS = (
    "model raft_mlp",
    "mixer raft_token_mixing",
    "mixer mixer_token_mixing",
    "mixer resize_token_mixing",
    "layer multi_scale_patch_embed",
    "pass replace",
)
SIDE, EPOCHS, BATCH, RATE = 28, 4, 128, 2e-3
SIZES: dict[str, Any] = {"widths": (32, 64), "depths": (2, 2), "patches": (2, 2)}
ARMS: dict[str, dict[str, Any]] = {
    "mixer": {"token_mixing": "mixer", "embedding": "patch"},
    "raft_r1": {"rafts": 1, "embedding": "patch"},
    "raft_r2": {"rafts": 2, "embedding": "patch"},
    "raft_r2_multi_scale": {"rafts": 2, "kernels": ((2, 4), (2, 4))},
}
"""What the four networks differ in."""

OTHER_SIDES = (32, 24)
"""Sizes of the images that the trained networks are tested on besides their own."""


@experiment(
    "raft-mlp",
    source="table 1 (as accurate as MLP-Mixer at less cost), section 3.4 (other resolutions by bicubic interpolation)",
    bar="accuracy(ours) - accuracy(baseline) >= -0.005 and kept_32(ours) >= 0.9 and kept_24(ours) >= 0.9, 3 seeds",
    seeds=(0, 1, 2),
    budget="15m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train the four networks on the same batches; ours is the raft of two channels, the baseline MLP-Mixer's MLP."""
    digits = load_digits(device)
    ratio = token_mixing_macs("raft_r2") / token_mixing_macs("mixer")
    if not math.isclose(ratio, expected_ratio()):
        raise AssertionError(f"token mixing costs {ratio} of the Mixer's, and {expected_ratio()} by the formula")
    check_that_mixer_is_bound(device)
    extra = {"token_mixing_macs_over_mixer": ratio}
    accuracy: dict[str, float] = {}
    kept: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        model = train(network(arm, seed).to(device), digits, seed)
        accuracy[arm] = share_right(model, digits.test_x, digits.test_y)
        if arm in ("mixer", "raft_r2"):
            kept[arm] = {
                f"kept_{side}": share_right(model, resized(digits.test_x, side), digits.test_y) / accuracy[arm]
                for side in OTHER_SIDES
            }
        extra |= {f"parameters_{arm}": float(sum(p.numel() for p in model.parameters())), f"macs_{arm}": macs(model)}
    for arm in ("raft_r1", "raft_r2_multi_scale"):
        extra[f"accuracy_{arm}"] = accuracy[arm]
    extra |= {f"{name}_mixer_wrapped": value for name, value in kept["mixer"].items()}
    extra["raft_r2_less_r1"] = accuracy["raft_r2"] - accuracy["raft_r1"]
    extra["multi_scale_less_patch"] = accuracy["raft_r2_multi_scale"] - accuracy["raft_r2"]
    paper = "ImageNet: RaftMLP-S 76.1 at 9.9 M parameters and 2.1 G, Mixer-B/16 76.4 at 59.9 M and 12.6 G multiply-adds"
    ours = {"accuracy": accuracy["raft_r2"], **kept["raft_r2"]}
    return Measurement(ours, {"accuracy": accuracy["mixer"]}, paper, extra=extra)


def network(arm: str, seed: int, **options: Any) -> RaftMLP:
    """Build one of the four networks for grey images of 28 x 28: grids of 14 x 14 and 7 x 7."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RaftMLP(**SIZES, **ARMS[arm], image=SIDE, channels=1, classes=10, **options)


def check_that_mixer_is_bound(device: torch.device) -> None:
    """See that MLP-Mixer's mixing without the wrapper refuses images of another size.

    Raises:
        AssertionError: it takes them.
    """
    model = network("mixer", 0, resize=False).to(device).eval()
    for side in OTHER_SIDES:
        try:
            model(torch.zeros(1, 1, side, side, device=device))
        except ShapeError:
            continue
        raise AssertionError(f"MLP-Mixer without the wrapper took an image of {side} pixels")


def macs(model: nn.Module, shape: tuple[int, ...] = (1, 1, SIDE, SIDE)) -> float:
    """Count the multiply-adds of one image."""
    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(shape, device=device))
    return counter.get_total_flops() / 2


def token_mixing_macs(arm: str) -> float:
    """Count the multiply-adds of all token mixings of a network for one image."""
    with torch.device("meta"):
        levels = network(arm, 0).levels
        grids = [(width, SIDE // 2 ** (i + 1)) for i, width in enumerate(SIZES["widths"])]
        return sum(
            macs(block.get_submodule("token_mixing"), (1, width, side, side))
            for level, (width, side) in zip(levels, grids, strict=True)
            for block in level.children()
        )


def expected_ratio(e: int = 2, r: int = 2) -> float:
    """Return 4 e r N^1.5 C over 2 e N^2 C, both summed over the two levels."""
    levels = [(width, (SIDE // 2 ** (i + 1)) ** 2) for i, width in enumerate(SIZES["widths"])]
    return sum(4 * e * r * n**1.5 * c for c, n in levels) / sum(2 * e * n**2 * c for c, n in levels)


@dataclass(frozen=True)
class Digits:
    """10,000 training and 2,000 test images (N, 1, 28, 28) of MNIST, standardised, and their labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits(device: torch.device) -> Digits:
    """Load the first images of MNIST's two parts.

    Raises:
        LaminaError: the folder that LAMINA_DATA names has no MNIST.
    """
    # A folder that is named is not looked for on the hub: an experiment does not download.
    data = mnist(BATCH, limit=1000 if smoke() else 10_000, folder=os.environ.get("LAMINA_DATA") or ".")
    assert data.evaluation is not None
    train, test = data.train.batch(torch.arange(len(data.train))), data.evaluation.batch(torch.arange(2000))
    return Digits(*(part[key].to(device) for part in (train, test) for key in ("pixel_values", "labels")))


def train(model: nn.Module, digits: Digits, seed: int) -> nn.Module:
    """Train 4 epochs with AdamW 2e-3 (torch's defaults else), batch 128; every arm sees the same batches."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=RATE), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(digits.x), generator=generator).to(digits.x.device).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(digits.x[rows]), digits.y[rows]).backward()
                optimizer.step()
    return model.eval()


def resized(x: Tensor, side: int) -> Tensor:
    """Show images at another size, as an image viewer would."""
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True)


@torch.no_grad()
def share_right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that are told right."""
    told = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return float((told == y).float().mean())
