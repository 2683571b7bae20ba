"""The affine map of a network at one input (output, F x and r) against one forward and backward pass of it.

Then the claims of the card: one probe against one plain forward pass, the memory of a pass as the network gets deeper,
and the memory of eight singular triples of a super-resolution net against that of its Jacobian by `jacrev`.

Run: OMP_NUM_THREADS=1 python -m benchmarks linear_interpreter
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.models import poolformer_s12
from lamina.verify import LinearInterpreter, affine_parts


def resnet() -> nn.Module:
    # Not at the top: the processes that measure memory do without it.
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic"))  # fmt: skip  # noqa: E501


def super_resolution(width: int = 48, depth: int = 6) -> nn.Module:
    inner = [m for _ in range(depth) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(width, 4, 3, padding=1)]
    return nn.Sequential(*layers, nn.PixelShuffle(2))


def logits(output: object) -> Tensor:
    return getattr(output, "logits", output)  # type: ignore[return-value]


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def forward_backward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad()
        logits(model(x)).square().mean().backward()

    return run


def speed() -> list[Row]:
    rows = []
    models = {"transformers ResNet-18": (resnet(), 3, 224), "poolformer_s12": (poolformer_s12(), 3, 224), "SR net x2": (super_resolution(), 1, 64)}  # fmt: skip  # noqa: E501
    for name, (model, channels, side) in models.items():
        model.eval()
        x = torch.randn(1, channels, side, side)
        system = LinearInterpreter(model, x)
        maps = lambda model=model, x=x: affine_parts(model, x)  # noqa: E731
        names = ("affine map", "forward and backward")
        rows.append(pair(f"{name}, {side} pixels", maps, forward_backward(model, x), names=names, goal="<= 3"))
        names = ("apply to one probe", "plain forward")
        rows.append(
            pair(f"{name}, one probe", lambda s=system, x=x: s.apply(x), forward(model, x), names=names, goal="<= 2.3")
        )
    return rows


def megabytes(what: str, argument: int) -> float:
    """Peak of the process's memory above what it was before, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (what, argument))


def _grown(what: str, argument: int) -> float:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if what in ("pass", "forward"):
        model, x = super_resolution(32, argument).eval(), torch.randn(1, 1, 192, 192)
        forward(super_resolution(32, 1), x)()
    else:
        model, x = super_resolution(16, 4).eval(), torch.randn(1, 1, argument, argument)
        affine_parts(model, x)
    before = _status("VmRSS")
    if what == "pass":
        affine_parts(model, x)
    elif what == "forward":
        forward(model, x)()
    elif what == "svd":
        LinearInterpreter(model, x).svd(8, method="lanczos", tolerance=1e-4)
    else:
        torch.func.jacrev(model)(x)
    return (_status("VmHWM") - before) / 1e6


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def memory() -> list[Row]:
    rows = []
    deep, shallow = megabytes("pass", 24), megabytes("pass", 4)
    names = ("a pass through 24 layers", "through 4")
    rows.append(_row("memory of a pass", names, (deep, shallow), "about 1"))
    ours, peer = megabytes("svd", 32), megabytes("jacobian", 32)
    names = ("8 singular triples", "torch.func.jacrev")
    rows.append(_row("memory, SR net x2, 32 pixels to 64", names, (ours, peer), "<= 0.1"))
    return rows


def _row(what: str, names: tuple[str, str], found: tuple[float, float], goal: str) -> Row:
    ratio = found[0] / found[1]
    row = Row(what, *names, ratio, (ratio, ratio), goal, (0.0, 0.0))
    print(
        f"{what}: {names[0]} / {names[1]} = {found[0]:.0f} / {found[1]:.0f} MB = {ratio:.3f} (goal {goal})", flush=True
    )
    return dataclasses.replace(row, megabytes=found)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write("linear_interpreter", [*speed(), *memory()], ("transformers",))


if __name__ == "__main__":
    main()
