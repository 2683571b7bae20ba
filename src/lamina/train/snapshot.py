"""Everything a run is at one step, by name, and back: model, optimizer, scaler, loader, random state, and the rest."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lamina.data import Loader
from lamina.errors import LaminaError
from lamina.gradients.reducer import Reducer
from lamina.parallel.data_parallel import Placed
from lamina.train.coded import ChunkLoader
from lamina.train.distributed import World
from lamina.train.packing import pack, unpack
from lamina.train.state import Loaded


@dataclass(frozen=True)
class Live:
    """The parts of a running training that have state."""

    placed: Placed
    optimizer: Optimizer
    objective: Any
    loader: Loader | ChunkLoader
    scaler: torch.amp.GradScaler
    reducer: Reducer | None
    world: World


def capture(live: Live) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state as JSON values and tensors; every process calls it."""
    tensors: dict[str, Tensor] = {}
    own: dict[str, Any] = {"random": _random_state()}
    if live.reducer is not None:
        own["reducer"] = pack(live.reducer.state_dict(), f"reducer.{live.world.rank}", tensors)
    shared, of_process = _objective_state(live.objective)
    if of_process:
        own["objective"] = pack(of_process, f"objective_of.{live.world.rank}", tensors)
    plain = {
        "model": pack(model_state(live.placed.bare), "model", tensors),
        "optimizer": pack(_optimizer_state(live), "optimizer", tensors),
        "loader": live.loader.state_dict(),
        "scaler": live.scaler.state_dict(),
        "processes": live.world.everyone(own),
    }
    if hasattr(live.objective, "state_dict"):
        plain["objective"] = pack(shared, "objective", tensors)
    return plain, tensors


def restore(live: Live, loaded: Loaded) -> None:
    """Put the state of a checkpoint back; the model must have the checkpoint's shapes already (see `replay_training`).

    Raises:
        LaminaError: the checkpoint is of another model or optimizer, or of a number of processes it cannot resume on.
    """
    plain = loaded.plain
    restore_model(live.placed.bare, loaded)
    _restore_optimizer(live, loaded)
    live.loader.load_state_dict(plain["loader"])
    live.scaler.load_state_dict(plain["scaler"])
    processes = plain["processes"]
    if "objective" in plain and hasattr(live.objective, "load_state_dict"):
        # A process that was not there begins with what the last one had.
        of_process = processes[min(live.world.rank, len(processes) - 1)].get("objective", {})
        live.objective.load_state_dict(_read(plain["objective"], loaded) | _read(of_process, loaded))
    if live.reducer is not None:
        if len(processes) != live.world.size:
            raise LaminaError(
                f"{loaded.path.name} was written by {len(processes)} processes, each with its own state of "
                f"{type(live.reducer).__name__}; this run has {live.world.size}"
            )
        live.reducer.load_state_dict(_read(processes[live.world.rank]["reducer"], loaded))
    if live.world.rank < len(processes):
        _set_random_state(processes[live.world.rank]["random"])


def _objective_state(objective: Any) -> tuple[Any, dict[str, Any]]:
    """Return the state of an objective, and apart from it that of its modules that say `per_process`."""
    state = objective.state_dict() if hasattr(objective, "state_dict") else {}
    modules = objective.named_modules() if isinstance(objective, nn.Module) else ()
    apart = tuple(f"{path}." if path else "" for path, m in modules if getattr(m, "per_process", False))
    of_process = {k: v for k, v in state.items() if k.startswith(apart)} if apart else {}
    return {k: v for k, v in state.items() if k not in of_process}, of_process


def restore_model(model: nn.Module, loaded: Loaded) -> None:
    """Fill the model with the checkpoint's parameters and buffers, in place."""
    state = model_state(model)
    loaded.fill({f"model.{n}": t.detach() for n, t in state.items() if isinstance(t, Tensor)})
    extra = {n: v for n, v in loaded.plain["model"].items() if n in state and not isinstance(state[n], Tensor)}
    if extra:
        model.load_state_dict(_read(extra, loaded), strict=False)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return a module's state dict with every tied tensor once."""
    unique: dict[int, tuple[str, Any]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(value), (name, value))
    return dict(unique.values())


def _optimizer_state(live: Live) -> dict[str, Any]:
    """The optimizer's own state dict, with parameters by name instead of by number."""
    names = {id(p): n for n, p in _named(live).items()}
    state = live.optimizer.state_dict()
    numbered = _numbers(live.optimizer, state["param_groups"], names)
    groups = [{**g, "params": [numbered[i] for i in g["params"]]} for g in state["param_groups"]]
    rest = {k: v for k, v in state.items() if k not in ("state", "param_groups")}
    return {"state": {numbered[i]: s for i, s in state["state"].items()}, "groups": groups, "rest": rest}


def _restore_optimizer(live: Live, loaded: Loaded) -> None:
    parameters = _named(live)
    likes = {f"optimizer.state.{n}.": p for n, p in parameters.items()}
    stored = _read(loaded.plain["optimizer"], loaded, likes)
    unknown = [n for g in stored["groups"] for n in g["params"] if n not in parameters]
    if unknown:
        raise LaminaError(f"{loaded.path.name} has optimizer state of {unknown[:3]}, which this model does not have")
    # A rewrite moved parameters between groups; the groups are the checkpoint's, not a new optimizer's.
    extra = len(stored["groups"]) - len(live.optimizer.param_groups)
    if extra:
        raise LaminaError(
            f"{loaded.path.name} has {len(stored['groups'])} parameter groups, this optimizer has "
            f"{len(live.optimizer.param_groups)}"
        )
    numbers: dict[str, int] = {}
    for group, saved in zip(live.optimizer.param_groups, stored["groups"], strict=True):
        group["params"] = [parameters[n] for n in saved["params"]]
        for name in saved["params"]:
            numbers[name] = len(numbers)
    groups = [{**g, "params": [numbers[n] for n in g["params"]]} for g in stored["groups"]]
    state = {numbers[n]: s for n, s in stored["state"].items()}
    live.optimizer.load_state_dict({**stored["rest"], "state": state, "param_groups": groups})


def _numbers(optimizer: Optimizer, groups: list[dict[str, Any]], names: Mapping[int, str]) -> dict[int, str]:
    found = {}
    for group, packed in zip(optimizer.param_groups, groups, strict=True):
        for parameter, number in zip(group["params"], packed["params"], strict=True):
            if id(parameter) not in names:
                raise LaminaError("the optimizer holds a parameter that is neither the model's nor the objective's")
            found[number] = names[id(parameter)]
    return found


def _named(live: Live) -> dict[str, nn.Parameter]:
    own = {f"objective.{i}": p for i, p in enumerate(live.objective.parameters())}
    return {**dict(live.placed.bare.named_parameters()), **own}


def _read(tree: Any, loaded: Loaded, likes: Mapping[str, Tensor] | None = None) -> Any:
    """Unpack a tree, its tensors read from the checkpoint together."""
    wanted: dict[str, Tensor] = {}

    def room(key: str) -> Tensor:
        like = next((t for prefix, t in (likes or {}).items() if key.startswith(prefix)), None)
        wanted[key] = loaded.allocate(key, like)
        return wanted[key]

    result = unpack(tree, room)
    loaded.fill(wanted)
    return result


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"torch": _hex(torch.get_rng_state()), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [kind, keys.tolist(), int(position), int(has_gauss), float(cached)]
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
