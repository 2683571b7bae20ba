"""MgNO against a straightforward port of the public implementation, with its weights, and against Fourier operators.

The port does what xlliu2017/MgNO does: a module for every step, tuples of (u, f) handed from one to the next, torch's
own convolutions in the memory format they come in. The FNO is neuraloperator's (extra bench), at the parameters of the
MgNO; ours is held to it as well. At about equal accuracy: an MgNO of 8 channels beside the FNO of 8 modes and width 16;
their errors on the experiment's Darcy fields are measured here too, with one seed.

Run: OMP_NUM_THREADS=1 python -m benchmarks mgno
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, forward, pair, write
from lamina.experiments import mgno as experiment
from lamina.models import FNO, MgNO
from lamina.nn import MultigridLinear
from lamina.objectives import RelativeLp

SCHEDULE = experiment.SCHEDULE
NARROW = 8
"""Channels of the MgNO that is about as accurate as the FNO of 8 modes."""


class Step(nn.Module):
    """(u, f) or f -> (u + S(f - A u), f) or (S f, f)."""

    def __init__(self, cf: int, cu: int, first: bool) -> None:
        super().__init__()
        self.A = None if first else nn.Conv2d(cu, cf, 3, padding=1, bias=False)
        self.S = nn.Conv2d(cf, cu, 3, padding=1, bias=False)

    def forward(self, out: Any) -> tuple[Tensor, Tensor]:
        if self.A is None:
            return self.S(out), out
        u, f = out
        return u + self.S(f - self.A(u)), f


class Restrict(nn.Module):
    def __init__(self, cf: int, cu: int) -> None:
        super().__init__()
        self.Pi = nn.Conv2d(cu, cu, 3, 2, 1, bias=False)
        self.R = nn.Conv2d(cf, cf, 3, 2, 1, bias=False)

    def forward(self, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.Pi(out[0]), self.R(out[1])


class Cycle(nn.Module):
    """The V-cycle as published, zero padding, no steps after the coarser levels."""

    def __init__(self, cf: int, cu: int, schedule: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        for level, (pre, _) in enumerate(schedule):
            steps: list[nn.Module] = [Restrict(cf, cu)] if level else []
            steps += [Step(cf, cu, first=not level and not i) for i in range(pre)]
            self.down.append(nn.Sequential(*steps))
        self.up = nn.ModuleList(nn.ConvTranspose2d(cu, cu, 4, 2, 1, bias=False) for _ in schedule[1:])

    def forward(self, f: Tensor) -> Tensor:
        out: Any = f
        kept = []
        for level in self.down:
            out = level(out)
            kept.append(out)
        u = kept[-1][0]
        for j in reversed(range(len(self.up))):
            u = kept[j][0] + self.up[j](u)
        return u


class Reference(nn.Module):
    """The public MgNO for Darcy flow."""

    def __init__(self, width: int, depth: int, schedule: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        widths = [1, *[width] * depth]
        self.cycles = nn.ModuleList(Cycle(into, width, schedule) for into in widths[:-1])
        self.linear = nn.ModuleList(nn.Conv2d(into, width, 1) for into in widths[:-1])
        self.last = nn.Conv2d(width, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for cycle, linear in zip(self.cycles, self.linear, strict=True):
            x = F.gelu(cycle(x) + linear(x))
        return self.last(x)


@torch.no_grad()
def take_weights(ours: MgNO, peer: Reference) -> None:
    """Give the port the weights of our model."""
    for layer, cycle, linear in zip(ours.layers, peer.cycles, peer.linear, strict=True):
        operator: MultigridLinear = layer.operator
        for j, level in enumerate(operator.levels):
            steps = list(cycle.down[j])
            if j:
                above = operator.levels[j - 1].restriction
                restrict = steps.pop(0)
                restrict.Pi.load_state_dict(above.of_u.state_dict())
                restrict.R.load_state_dict(above.of_f.state_dict())
            for step, mine in zip(steps, level.pre, strict=True):
                step.S.load_state_dict(mine.smoother.state_dict())
                if step.A is not None:
                    step.A.load_state_dict(mine.operator.state_dict())
            if level.prolongation is not None:
                cycle.up[j].load_state_dict(level.prolongation.conv.state_dict())
        linear.load_state_dict(layer.pointwise.state_dict())
    peer.last.load_state_dict(ours.head.state_dict())


def training(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    def run() -> object:
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        return None

    return run


def parameters(model: nn.Module) -> int:
    """Count real numbers: a complex parameter is two."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())


def neuraloperator_fno(modes: int, width: int, depth: int = 3) -> nn.Module:
    from neuralop.models import FNO as NeuralOperatorFNO  # noqa: N811

    sizes = {"in_channels": 1, "out_channels": 1, "hidden_channels": width, "n_layers": depth}
    return NeuralOperatorFNO(n_modes=(modes, modes), **sizes)


class Scaled(nn.Module):
    """neuraloperator's network between the units of the data, as ours has them inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.units = inner, (0.0, 1.0, 0.0, 1.0)

    def fit_normalizer(self, batches: Sequence[dict[str, Tensor]]) -> None:
        x, y = batches[0]["inputs"], batches[0]["targets"]
        self.units = (float(x.mean()), float(x.std()), float(y.mean()), float(y.std()))

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, out_shift, out_scale = self.units
        return self.inner((x - shift) / scale) * out_scale + out_shift


def error_of(model: MgNO | FNO | Scaled) -> float:
    """Train on the experiment's Darcy fields as the experiment does; return the relative error on the test fields."""
    data, device, objective = experiment.darcy(0), torch.device("cpu"), RelativeLp()
    x, y = experiment.fields(data, "train", device)
    model.fit_normalizer([{"inputs": x, "targets": y}])
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.RATE)
    steps = experiment.EPOCHS * len(x) // experiment.BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, experiment.RATE, steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(experiment.EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(experiment.BATCH):
            optimizer.zero_grad()
            objective(model, {"inputs": x[rows], "targets": y[rows]})["loss"].backward()
            optimizer.step()
            schedule.step()
    return experiment.relative_error(model.eval(), *experiment.fields(data, "test", device))


def errors_as_row(ours: float, peer: float, names: tuple[str, str]) -> Row:
    ratio = ours / peer
    what = f"test error on Darcy flow after {experiment.EPOCHS} epochs: {ours:.4f} and {peer:.4f}"
    print(f"{what}: {ratio:.3f}", flush=True)
    return Row(what, *names, ratio, (ratio, ratio), "<= 1.0", (0.0, 0.0))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, peer = MgNO(1, 1, 16, 3, SCHEDULE), Reference(16, 3, SCHEDULE)
    take_weights(ours, peer)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-5)
    assert parameters(ours) == parameters(peer)
    rows: list[Row] = []
    fourier, theirs = FNO(1, 1, 16, 3, 6), neuraloperator_fno(12, 15)
    wide, narrow = FNO(1, 1, 16, 3, 8), MgNO(1, 1, NARROW, 3, SCHEDULE)
    counts = [f"{parameters(m):,}" for m in (ours, theirs, fourier, wide, narrow)]
    print(
        f"parameters: mgno {counts[0]}, neuraloperator {counts[1]}, fno {counts[2]} and {counts[3]}, narrow {counts[4]}"
    )
    for grid, batch in ((32, 16), (128, 2), (256, 1)):
        x, y = torch.randn(batch, 1, grid, grid), torch.randn(batch, 1, grid, grid)
        where = f"{grid} x {grid}, batch {batch}"
        names = ("mgno", "the public MgNO")
        rows.append(pair(f"forward, {where}", forward(ours, x), forward(peer, x), names=names, goal="<= 1.0"))
        rows.append(pair(f"training, {where}", training(ours, x, y), training(peer, x, y), names=names, goal="<= 1.0"))
        names = ("mgno", f"neuraloperator FNO, {counts[1]} parameters")
        rows.append(
            pair(f"training, {where}", training(ours, x, y), training(theirs, x, y), names=names, goal="<= 1.0")
        )
        names = (f"mgno, {NARROW} channels", "fno, 8 modes")
        rows.append(
            pair(f"training, {where}", training(narrow, x, y), training(wide, x, y), names=names, goal="<= 0.8")
        )
        names = ("fno, 6 modes", f"neuraloperator FNO, {counts[1]} parameters")
        rows.append(
            pair(f"training, {where}", training(fourier, x, y), training(theirs, x, y), names=names, goal="<= 1.0")
        )
    small, large = torch.randn(1, 1, 128, 128), torch.randn(1, 1, 256, 256)
    names = ("mgno at 256 x 256", "mgno at 128 x 128")
    rows.append(
        pair("forward, four times the cells", forward(ours, large), forward(ours, small), names=names, goal="< 5")
    )
    x = torch.randn(2, 1, 128, 128)
    compiled, public = (torch.compile(m, fullgraph=True) for m in (ours, peer))
    what = "forward, 128 x 128, batch 2"
    both = ("mgno, compiled", "the public MgNO, compiled")
    rows.append(pair(what, forward(compiled, x), forward(public, x), names=both, goal="<= 1.0", warmup=3))
    alone = ("mgno, compiled", "mgno")
    rows.append(pair(what, forward(compiled, x), forward(ours, x), names=alone, goal="< 1.0", warmup=3))
    names = (f"mgno, {NARROW} channels", "fno, 8 modes")
    rows.append(errors_as_row(error_of(narrow), error_of(wide), names))
    names = ("mgno", f"neuraloperator FNO, {counts[1]} parameters")
    rows.append(errors_as_row(error_of(ours), error_of(Scaled(theirs)), names))
    write("mgno", rows, ("neuraloperator",))


if __name__ == "__main__":
    main()
