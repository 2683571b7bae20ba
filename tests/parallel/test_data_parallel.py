from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.train.tiny import DropLast, Net, WidenClasses, data, net, numbers, trainer
from torch import nn

from lamina.errors import LaminaError, PlanError
from lamina.gradients import Mean, Median
from lamina.models import Transformer
from lamina.nn import Pattention
from lamina.objectives import Classification
from lamina.parallel import data_parallel
from lamina.parallel.data_parallel import Placement
from lamina.rewrite import GrowParameterTokens
from lamina.train import distributed
from lamina.train.phases import Scheduled

ROOT = Path(__file__).parents[2]

REWRITES = [Scheduled(DropLast(), "before"), Scheduled(WidenClasses((4, 3, 2, 1, 0, -1)), 0.5)]

GROWTH = [Scheduled(GrowParameterTokens(1.5), 0.5)]


class Tied(Net):
    """A weight used twice, so that sharding and gathering must keep the tie."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, batch_norm=False)
        self.blocks[1].weight = self.blocks[0].weight


class Paired(Net):
    """Layers whose weights are pairs that can be added to; five pairs do not share out evenly."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, batch_norm=False)
        self.blocks = nn.ModuleList(Pattention(8, 8, 5) for _ in range(2))


class AfterBackward(Mean):
    """The mean, but once over the whole model."""

    granularity = "model"


class Adapted(nn.Module):
    """An objective with a parameter of its own, which every process begins differently: that of the first counts."""

    needs = "outputs"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 0.5 + (dist.get_rank() if dist.is_initialized() else 0)))

    def forward(self, model, batch):
        losses = Classification()(model, batch)
        return {**losses, "loss": losses["loss"] * self.scale.square().sum()}


SCENARIOS = {
    "ddp": {"placement": Placement(data=2)},
    "ddp-parts": {"placement": Placement(data=2), "accumulate": 2, "clip": 0.1},
    "ddp-rewrite": {"placement": Placement(data=2), "rewrites": REWRITES},
    "bucket": {"placement": Placement(data=2), "reducer": Mean, "rewrites": REWRITES, "accumulate": 2},
    "model": {"placement": Placement(data=2), "reducer": AfterBackward, "rewrites": REWRITES, "accumulate": 2},
    "median": {"placement": Placement(data=2), "reducer": Median},
    "ddp-adapted": {"placement": Placement(data=2), "objective": Adapted, "clip": 0.1},
    "fsdp-adapted": {"placement": Placement(shard=2), "objective": Adapted, "clip": 0.1},
    "fsdp": {"placement": Placement(shard=2)},
    "fsdp-parts": {"placement": Placement(shard=2), "accumulate": 2, "clip": 0.1},
    "fsdp-rewrite": {"placement": Placement(shard=2), "rewrites": REWRITES},
    "fsdp-tied": {"placement": Placement(shard=2), "rewrites": REWRITES[1:], "model": Tied},
    "ddp-grow": {"placement": Placement(data=2), "rewrites": GROWTH, "model": Paired},
    "fsdp-grow": {"placement": Placement(shard=2), "rewrites": GROWTH, "model": Paired},
}


def of(name: str, folder: Path, **changes):
    options = {**SCENARIOS[name], **changes}
    torch.manual_seed(0)
    model = options.pop("model", lambda: net(dropout=0.0, batch_norm=False))()
    reducer = options.pop("reducer", None)
    if "objective" in options:
        options["objective"] = options["objective"]()
    on = data(padded=True, rows=44)
    return trainer(folder, model=model, on=on, reducer=reducer and reducer(), evaluate_every=4, **options)


def work(folder: Path) -> None:
    """What each process does."""
    world = distributed.start("cpu", timeout=60)
    for name in SCENARIOS:
        of(name, folder / name).fit()
    # Stopped at step 8, behind the rewrite, and gone on from there.
    for name in ("ddp-rewrite", "fsdp-rewrite"):
        half = folder / f"{name}-resumed"
        run = of(name, half, checkpoint_every=8)
        stop_at(run, 8)
        with pytest.raises(Stop):
            run.fit()
        of(name, half, checkpoint_every=8).fit(resume=True)
    facts(world.rank, folder)
    distributed.finish()


class Stop(Exception):
    pass


def stop_at(run, step: int) -> None:
    inner = run._look_around

    def look() -> None:
        inner()
        if run.step == step:
            raise Stop

    run._look_around = look


def facts(rank: int, folder: Path) -> None:
    torch.manual_seed(rank)
    model = Transformer(2, 16, 2, vocabulary=32, context=8)
    mesh = Placement(shard=2).mesh(torch.device("cpu"))
    ids = torch.arange(8)[None]
    data_parallel.same_everywhere(model)
    before = model(ids).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(ids).square().mean().backward()
    optimizer.step()
    stepped = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    after = model(ids).detach()
    assert not torch.equal(before, after)
    sharded = data_parallel.shard(model, mesh, optimizer=optimizer)
    torch.testing.assert_close(sharded(ids).detach(), after)
    data_parallel.reshard(sharded)
    local = sum(p.to_local().numel() for p in sharded.parameters())
    whole = sum(p.numel() for p in sharded.parameters())
    back = data_parallel.gather(sharded, optimizer=optimizer)
    assert type(back) is Transformer
    assert back.head.weight is back.embedding.weight
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, stepped[name]), name
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name]), name
    units = sum(1 for m in sharded.modules() if type(m).__name__.startswith("FSDP"))
    with pytest.raises(PlanError, match="sharded already"):
        data_parallel.shard(sharded, mesh)
    with pytest.raises(LaminaError, match=r"blocks.0 is sharded: take the model back first"):
        GrowParameterTokens(2.0).decide(data_parallel.shard(Paired(), mesh))
    (folder / f"facts-{rank}").write_text(f"{local / whole} {units}")


def torchrun(
    code: str, *words: str, processes: int = 2, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    command += ["--master-port", str(free_port()), "--no-python", sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    code = "import sys, pathlib, tests.parallel.test_data_parallel as t; t.work(pathlib.Path(sys.argv[1]))"
    done = torchrun(code, str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def curve(folder: Path) -> list[tuple]:
    return [(r["event"], r["step"], r.get("loss", r.get("loss_after"))) for r in numbers(folder) if r["event"] != "end"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_give_the_loss_curve_of_one(name, together, tmp_path) -> None:
    # The median of two is their mean.
    of(name, tmp_path, placement=None, reducer=None).fit()
    one, two = curve(tmp_path), curve(together / name)
    assert [r[:2] for r in two] == [r[:2] for r in one]
    assert [r[2] for r in two] == pytest.approx([r[2] for r in one], rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp-rewrite", "fsdp-rewrite"])
def test_two_processes_resume_with_the_same_numbers(name, together) -> None:
    assert numbers(together / f"{name}-resumed") == numbers(together / name)


@pytest.mark.distributed
def test_shards_hold_half_and_gather_gives_the_bits_back(together) -> None:
    share, units = (together / "facts-0").read_text().split()
    assert 0.4 < float(share) < 0.6
    # Two blocks and the root.
    assert int(units) == 3


@pytest.mark.distributed
def test_fsdp_states_what_followed_a_rewrite(together) -> None:
    row = next(r for r in numbers(together / "fsdp-rewrite") if r["event"] == "rewrite" and r["at"] == 0.5)
    same = next(r for r in numbers(together / "ddp-rewrite") if r["event"] == "rewrite" and r["at"] == 0.5)
    for key in ("kept", "derived", "fresh", "dropped", "parameters_before", "parameters_after"):
        assert row[key] == same[key]
    assert row["derived"] == ["head.weight", "head.bias"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp-grow", "fsdp-grow"])
def test_growth_in_training_changes_no_loss_and_moments_follow(name, together) -> None:
    row = next(r for r in numbers(together / name) if r["event"] == "rewrite")
    assert row["step"] == 6
    assert row["loss_after"] == pytest.approx(row["loss_before"], rel=1e-6)
    assert row["derived"] == [f"blocks.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert row["fresh"] == []
    assert row["parameters_after"] - row["parameters_before"] == 2 * 3 * 16


def test_a_placement_for_another_number_of_processes_is_refused() -> None:
    with pytest.raises(PlanError, match=r"data: 2 x shard: 2 needs 4 processes, this run has 1.*--nproc-per-node 4"):
        trainer(placement=Placement(data=2, shard=2)).fit()
    with pytest.raises(PlanError, match="shard must be a whole number of at least 1, got 0"):
        Placement(shard=0)


def test_clone_keeps_ties_and_leaves_the_original() -> None:
    model = Tied()
    copy = data_parallel.clone_with(model, lambda t: t.to("meta"))
    assert copy.blocks[1].weight is copy.blocks[0].weight
    assert copy.head.weight.is_meta
    assert not model.head.weight.is_meta
    again = data_parallel.clone_with(copy, lambda t: torch.zeros(t.shape))
    assert isinstance(again.head, nn.Linear)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_a_model_that_shard_did_not_shard_cannot_be_gathered() -> None:
    with pytest.raises(PlanError, match="Net cannot be gathered for a rewrite"):
        data_parallel.gather(net())
