"""Sharded parameters: two gloo processes must do what one does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import in_processes
from torch import Tensor, nn
from torch.nn import Parameter

from lamina.errors import LaminaError
from lamina.optim import LAMB, LARS, Kar2, Kar3, parameter_groups
from lamina.optim._layerwise import chunks, squared_norms, trust_ratio

CASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (LAMB, {"weight_decay": 0.05}),
    (LAMB, {"weight_decay": 0.05, "foreach": False}),
    (LAMB, {"weight_decay": 0.05, "variant": "nvlamb", "max_grad_norm": 0.1}),
    (LAMB, {"weight_decay": 0.05, "variant": "v3"}),
    (LARS, {"weight_decay": 0.05}),
    (LARS, {"weight_decay": 0.05, "variant": "lamb-paper"}),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    # 5 rows over two processes: uneven shards; one row: the second process has none of it.
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double()


def train(model: nn.Module, kind: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = kind(parameter_groups(model, **_decay(options)), lr=0.05, **_rest(options))
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


def _decay(options: dict[str, Any]) -> dict[str, Any]:
    return {"weight_decay": options["weight_decay"]}


def _rest(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "weight_decay"}


def work(rank: int) -> list[Any]:
    from torch.distributed.fsdp import fully_shard

    found: list[Any] = []
    for kind, options in CASES:
        model = net()
        fully_shard(model)
        optimizer = train(model, kind, options)
        values = [p.full_tensor().tolist() for p in model.parameters()]  # type: ignore[attr-defined]
        sizes = {type(s).__name__ for state in optimizer.state.values() for k, s in state.items() if k != "step"}
        found.append((values, sizes))
    return found


@pytest.mark.distributed
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    answers = in_processes(work, 2, tmp_path)
    assert answers[0] == answers[1]
    for (kind, options), (values, sizes) in zip(CASES, answers[0], strict=True):
        model = net()
        train(model, kind, options)
        assert sizes == {"DTensor"}
        for parameter, value in zip(model.parameters(), values, strict=True):
            torch.testing.assert_close(
                torch.tensor(value, dtype=torch.float64), parameter.detach(), rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("kind", [LAMB, LARS, Kar2, Kar3])
def test_the_state_of_narrow_parameters_is_saved_and_loaded_in_float32(kind: Any, foreach: bool | None) -> None:
    def steps(parameters: list[Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
            optimizer.step()

    options: dict[str, Any] = {"lr": 0.05} | ({"foreach": foreach} if kind in (LAMB, LARS) else {})
    drawn = [torch.randn(5, 3, generator=torch.Generator().manual_seed(9)).bfloat16(), torch.ones(3)]
    going = [Parameter(x) for x in drawn]
    optimizer = kind(going, **options)
    steps(going, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [Parameter(p.detach().clone()) for p in going]
    resumed = kind(again, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    state = resumed.state_dict()["state"][0]
    assert {x.dtype for x in state.values()} == {torch.float32}
    steps(going, optimizer, range(3, 8))
    steps(again, resumed, range(3, 8))
    for one, two in zip(going, again, strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert torch.equal(value, resumed.state[two][name])


def test_long_sums_of_squares_keep_their_digits() -> None:
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    exact = x.double().square().sum()
    assert abs(float(squared_norms([x])[0].double() / exact) - 1) < 2e-6
    assert squared_norms([x.bfloat16()])[0].dtype is torch.float32


def test_trust_ratio_table() -> None:
    x, u = torch.tensor([2.0, 0.0, 2.0, 0.0, 40.0]), torch.tensor([4.0, 4.0, 0.0, 0.0, 4.0])
    assert trust_ratio(x, u).tolist() == [0.5, 1, 1, 1, 10]
    assert trust_ratio(x, u, phi=(0.0, 10.0)).tolist() == [0.5, 1, 1, 1, 2.5]
    assert trust_ratio(x, u, phi=(3.0, 10.0)).tolist() == [0.75, 1, 1, 1, 2.5]
    assert trust_ratio(x, u, clip=True).tolist() == [0.5, 1, 1, 1, 1]


def test_chunks_hold_one_dtype_and_at_most_the_limit() -> None:
    sizes = [3, 4, 20, 2, 2, 9]
    layers: list[Tensor] = [Parameter(torch.zeros(n)) for n in sizes]
    layers.insert(4, Parameter(torch.zeros(1, dtype=torch.float64)))
    assert [[p.numel() for p in c] for c in chunks(layers, 8)] == [[3, 4], [20], [2], [1], [2], [9]]
    assert [[p.numel() for p in c] for c in chunks(layers[:4], None)] == [[3, 4, 20, 2]]


def test_partial_parameters_are_refused(tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, Partial, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        partial = Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
        partial.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        with pytest.raises(LaminaError, match="redistribute it first"):
            LAMB([partial]).step()
    finally:
        dist.destroy_process_group()
