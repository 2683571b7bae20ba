from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.processes import in_processes
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.optim import Float8AdamW
from lamina.optim.dynamic_range import Coding, QuantizedTensor, encode
from lamina.parallel.data_parallel import gather, shard
from lamina.train.distributed import World
from lamina.train.state import load, save


def test_a_state_of_two_shards_is_read_by_one_process() -> None:
    """Each shard (33 and 32 rows of 65) had groups of its own, the second one less: its tables are padded."""

    def made() -> Float8AdamW:
        return Float8AdamW([Parameter(torch.randn(65, 130, generator=torch.Generator().manual_seed(0)))])

    def step(optimizer: Float8AdamW) -> None:
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()

    whole = made()
    step(whole)
    moment = whole.state[whole.param_groups[0]["params"][0]]["exp_avg"].dequantize()
    parts = [encode(part, Coding()).parts() for part in moment.chunk(2)]
    state = whole.state_dict()
    kept = state["state"][0]
    kept["exp_avg.codes"] = torch.cat([p["codes"].view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn)
    for name in ("scale", "k", "center"):
        kept[f"exp_avg.{name}"] = nn.utils.rnn.pad_sequence([p[name] for p in parts], batch_first=True)
    assert kept["exp_avg.scale"].shape == (2, 34)
    other = made()
    other.load_state_dict(state)
    found = other.state[other.param_groups[0]["params"][0]]["exp_avg"]
    expected = torch.cat([encode(part, Coding()).dequantize() for part in moment.chunk(2)])
    assert isinstance(found, QuantizedTensor)
    assert torch.equal(found.codes.float(), encode(expected, Coding()).codes.float())
    step(other)
    assert torch.isfinite(other.param_groups[0]["params"][0]).all()


class Net(nn.Module):
    """Rows that do not split evenly, and shards of which the last group is short."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(130, 65), nn.Linear(65, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def start(world: int) -> tuple[nn.Module, Float8AdamW]:
    torch.manual_seed(0)
    model: nn.Module = Net()
    if world > 1:
        model = shard(model, dist.device_mesh.init_device_mesh("cpu", (world,)))
    return model, Float8AdamW(model.parameters(), lr=1e-2, min_numel=256)


def descend(model: nn.Module, optimizer: Float8AdamW, steps: int, begin: int = 0) -> None:
    for step in range(begin, begin + steps):
        x = torch.randn(4, 130, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def named(model: nn.Module, optimizer: Float8AdamW) -> dict[str, Tensor]:
    names = [n for n, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, s in state.items() for key, value in s.items()}


def restored(folder: Path, world: World) -> tuple[nn.Module, Float8AdamW]:
    model, optimizer = start(world.size)
    loaded = load(folder, world)
    parameters = dict(model.named_parameters())
    loaded.fill({n: p.detach() for n, p in parameters.items()})
    state: dict[int, dict[str, Tensor]] = {}
    for key in loaded.plain["tensors"]:
        name, _, part = key.partition("/")
        if part:
            tensor = loaded.allocate(key, parameters[name])
            loaded.fill({key: tensor})
            state.setdefault(list(parameters).index(name), {})[part] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return model, optimizer


def _work(rank: int, folder: Path) -> list[str]:
    world = World(rank, 2)
    whole, plain = start(1)
    descend(whole, plain, 1)
    model, optimizer = start(2)
    descend(model, optimizer, 1)
    same = [
        torch.allclose(a, b.full_tensor(), atol=1e-6)
        for a, b in zip(whole.parameters(), model.parameters(), strict=True)
    ]  # type: ignore[attr-defined]
    checked = {"the first step is that of one process": all(same)}
    descend(model, optimizer, 2, begin=1)
    tensors = {n: p.detach() for n, p in model.named_parameters()} | named(model, optimizer)
    path = save(folder, 3, {}, tensors, world)
    again, resumed = restored(path, world)
    for (key, a), b in zip(named(model, optimizer).items(), named(again, resumed).values(), strict=True):
        local = [t.to_local() if hasattr(t, "to_local") else t for t in (a, b)]
        bits = [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in local]
        checked[f"{key} comes back bit for bit"] = torch.equal(*bits) and a.dtype == b.dtype
    for one, other in ((model, optimizer), (again, resumed)):
        descend(one, other, 2, begin=3)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    checked["resumed equals never stopped"] = all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)  # type: ignore[attr-defined]
    moments = [optimizer.state[p]["exp_avg"].full_tensor() for p in model.parameters()]
    bare = gather(model, optimizer=optimizer)
    followed = [
        torch.equal(torch.as_tensor(optimizer.state[p]["exp_avg"] + 0), m)
        for p, m in zip(bare.parameters(), moments, strict=True)
    ]
    checked["moments are gathered for a rewrite"] = all(followed)
    back = shard(bare, dist.device_mesh.init_device_mesh("cpu", (2,)), optimizer=optimizer)
    descend(back, optimizer, 1, begin=5)
    checked["and sharded again"] = all(torch.isfinite(p.full_tensor()).all() for p in back.parameters())  # type: ignore[attr-defined]
    if rank == 1:
        first = next(iter(back.parameters()))
        first.grad.to_local().fill_(torch.nan)  # type: ignore[union-attr]
    skipped, before = optimizer.skipped, next(iter(back.parameters())).full_tensor()  # type: ignore[attr-defined]
    optimizer.step()
    after = next(iter(back.parameters())).full_tensor()  # type: ignore[attr-defined]
    checked["both leave a step out"] = optimizer.skipped == skipped + 1 and torch.equal(before, after)
    return [name for name, right in checked.items() if not right]


@pytest.mark.slow
@pytest.mark.distributed
def test_shards_step_save_gather_and_resume(tmp_path: Path) -> None:
    assert in_processes(_work, 2, tmp_path, tmp_path) == [[], []]
    # One process reads what two wrote: moments are quantised anew, for their groups were those of two shards.
    model, optimizer = restored(tmp_path / "checkpoints" / "step-000003", World())
    kept = optimizer.state[next(iter(model.parameters()))]["exp_avg"]
    assert isinstance(kept, QuantizedTensor)
    assert kept.shape == (65, 130)
    descend(model, optimizer, 1, begin=3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
