"""Distillation: a step with a cached teacher against a step on labels; watching modules against a loop written by hand;
the same configuration in torchdistill 1.1.5 (its own box, in this process), a first stage of hints and a step of
attention transfer with knowledge distillation: time, memory, and the loss of five steps; the affinity loss without its
loop over channels.

Run: OMP_NUM_THREADS=1 python -m benchmarks torchdistill  (torchdistill where it is installed; torchvision need not be)
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.objectives import Classification, Distillation
from lamina.objectives.distillation import Affinity

ROWS, CLASSES, SIDE = 64, 10, 32
ATTENTION = [{"name": "attention_transfer", "student": p, "weight": 100.0} for p in ("relu2", "relu3")]
KD = {"name": "knowledge_distillation", "temperature": 4.0, "alpha": 0.1}
HINT = {"name": "hint", "student": "relu2", "reduction": "sum"}


def network(channels: int, seed: int, depth: int = 4) -> nn.Sequential:
    """Convolutions with batch norm, all by name; the second map has twice as many channels in every size."""
    torch.manual_seed(seed)
    net, width = nn.Sequential(), 3
    for i in range(depth):
        out = channels * 2 ** min(i, 2)
        net.add_module(f"conv{i + 1}", nn.Conv2d(width, out, 3, stride=1 + (i > 0), padding=1))
        net.add_module(f"norm{i + 1}", nn.BatchNorm2d(out))
        net.add_module(f"relu{i + 1}", nn.ReLU())
        width = out
    for name, layer in (("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("head", nn.Linear(width, CLASSES))):
        net.add_module(name, layer)
    return net


def batch_of(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, SIDE, SIDE, generator=generator)
    return {"inputs": x, "labels": torch.arange(rows) % CLASSES, "index": torch.arange(rows)}


def step_of(objective: Any, student: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Return one optimizer step; it returns its loss."""
    parameters = [*student.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = objective(student, batch)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def by_hand(student: nn.Sequential, teacher: nn.Sequential, places: Sequence[str], x: Tensor) -> Callable[[], Tensor]:
    """Return a forward and backward pass of hints in a loop that knows both networks' modules."""

    def maps(net: nn.Sequential, last: str | None) -> list[Tensor]:
        y, found = x, []
        for name, layer in net.named_children():
            y = layer(y)
            if name in places:
                found.append(y)
            if name == last:
                break
        return found

    def run() -> Tensor:
        with torch.no_grad():
            goals = maps(teacher, places[-1])
        ours = maps(student, None)
        loss = torch.stack([F.mse_loss(a, b) for a, b in zip(ours, goals, strict=True)]).sum()
        loss.backward()
        return loss.detach()

    return run


def peer_step(kind: str, student: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Return one step of torchdistill's own box, its configuration as its YAML would say it."""
    box_of = import_peer()
    reads = {"hint": ["relu2"], "attention": ["relu2", "relu3"]}[kind]
    lower = [n for n, _ in student.named_children()][:6] if kind == "hint" else []
    hooks = {"input": [], "output": reads}
    side = {"forward_proc": "forward_batch_only", "sequential": lower, "forward_hook": hooks, "frozen_modules": []}
    pairs = {p: {w: {"io": "output", "path": p} for w in ("teacher", "student")} for p in reads}
    kd = {f"{w}_module_{k}": v for w in ("student", "teacher") for k, v in (("path", "."), ("io", "output"))}
    places = {"input": {"is_from_teacher": False}, "target": {"is_from_teacher": True}}
    simple = {k: {**v, "module_path": "relu2", "io": "output"} for k, v in places.items()}
    terms = {
        "hint": {
            "hint": {
                "criterion": {"key": "MSELoss", "kwargs": {"reduction": "sum"}},
                "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": simple},
                "weight": 1.0,
            }
        },
        "attention": {
            "kd": {"criterion": {"key": "KDLoss", "kwargs": {**kd, "temperature": 4.0, "alpha": 0.1}}, "weight": 1.0},
            "at": {"criterion": {"key": "ATLoss", "kwargs": {"at_pairs": pairs, "mode": "code"}}, "weight": 100.0},
        },
    }[kind]
    config = {
        "num_epochs": 1,
        "teacher": {**side, "requires_grad": False},
        "student": {**side, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 1e-3, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = box_of(teacher.eval(), student, {}, config, torch.device("cpu"), None, False, 1.0)
    box.student_model.train()
    box.teacher_model.eval()

    def run() -> Tensor:
        loss: Tensor = box.forward_process(batch["inputs"], batch["labels"], None)
        box.post_forward_process(loss)
        return loss.detach()

    return run


def our_step(kind: str, student: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    terms = {"hint": [HINT], "attention": [KD, *ATTENTION]}[kind]
    return step_of(Distillation(teacher, terms=terms, stop=kind == "hint"), student.train(), batch)


STEPS = {"ours": our_step, "torchdistill": peer_step}


class _Empty(types.ModuleType):
    """Has a class by every name."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which torchdistill imports and these steps do not use."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        absent = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_peer() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Absent())
        for part in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models"):
            importlib.import_module(part)
    # Registers the ways to call a model.
    importlib.import_module("torchdistill.core.interfaces.forward_proc")
    return importlib.import_module("torchdistill.core.distillation").DistillationBox


def peak(which: str, kind: str, queue: Any) -> None:
    """Put the growth of the process's largest size over three steps, in megabytes, into a queue (Linux)."""
    torch.set_num_threads(1)
    student, teacher, batch = network(16, 0), network(16, 1, depth=5), batch_of(256)
    run = STEPS[which](kind, student, teacher, batch)
    # Forgets the largest size so far, which imports may have made.
    Path("/proc/self/clear_refs").write_text("5")
    before = largest_size()
    for _ in range(3):
        run()
    queue.put(largest_size() - before)


def largest_size() -> float:
    """Return the process's largest resident size in megabytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def memory(kind: str, rounds: int = 3) -> Row:
    """Compare the memory of three steps, each in a process of its own, in alternating order."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[float]] = {"ours": [], "torchdistill": []}
    # Every tensor gets pages of its own, which go back at once: what is resident is what is alive. Without that, the
    # same steps differ by a fifth from process to process, by where the heap has its holes.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for turn in range(rounds):
        for which in list(found) if turn % 2 == 0 else list(found)[::-1]:
            queue = context.Queue()
            worker = context.Process(target=peak, args=(which, kind, queue))
            worker.start()
            found[which].append(queue.get())
            worker.join()
    ours, theirs = (sorted(v)[rounds // 2] for v in found.values())
    ratios = sorted(a / b for a, b in zip(*found.values(), strict=True))
    row = Row(f"memory of {kind} steps, 256 rows", "probe", "torchdistill", ours / theirs, (ratios[0], ratios[-1]), "< 1", (0.0, 0.0), megabytes=(ours, theirs))  # fmt: skip  # noqa: E501
    print(f"{row.what}: {ours:.0f} / {theirs:.0f} MB = {row.ratio:.3f}  (goal < 1)", flush=True)
    return row


def first_losses(kind: str, steps: int = 5) -> list[float]:
    """Return the relative gap of the losses of both, step by step, from the same weights on the same rows."""
    batch, found = batch_of(), []
    for make in STEPS.values():
        run = make(kind, network(16, 0), network(16, 1, depth=5), batch)
        found.append(torch.stack([run() for _ in range(steps)]))
    return ((found[0] - found[1]).abs() / found[1].abs()).tolist()


def affinity_loop(student: Tensor, teacher: Tensor) -> Tensor:
    """A matrix of all pairs of positions for each channel in turn, as published code does it."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    total = torch.zeros(len(s))
    for i in range(s.shape[1]):
        gap = s[:, i, :, None] * s[:, i, None] - t[:, i, :, None] * t[:, i, None]
        total = total + (gap / s.shape[2]).norm(dim=(1, 2))
    return total.mean()


def gradients(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], object]:
    def run() -> object:
        x.grad = None
        function(x, y).backward()
        return None

    return run


def main() -> None:
    torch.set_num_threads(1)
    batch, teacher = batch_of(), network(16, 1, depth=5).eval()
    student = network(16, 0)
    with tempfile.TemporaryDirectory() as folder:
        cached = Distillation(teacher, terms=[{**KD, "alpha": 0.5}], cache=folder)
        names = ("knowledge distillation, cached", "classification")
        steps = step_of(cached, student, batch), step_of(Classification(), copy.deepcopy(student), batch)
        rows = [pair("step with a cached teacher, 64 images of 32 x 32", *steps, names=names, goal="<= 1.1", rounds=31)]
    hints = [{"name": "hint", "student": p} for p in ("relu2", "relu3")]
    watched, plain = Distillation(teacher, terms=hints), network(16, 0)

    def probed() -> Tensor:
        loss: Tensor = watched(student, batch)["loss"]
        loss.backward()
        return loss

    hand = by_hand(plain, teacher, ("relu2", "relu3"), batch["inputs"])
    names = ("distillation of two hints", "loop over both networks' modules")
    rows.append(pair("watching two maps, forward and backward", probed, hand, names=names, goal="<= 1.03", rounds=31))
    maps = [torch.randn(8, 64, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    maps[0].requires_grad_()
    affinity = gradients(Affinity(), *maps), gradients(affinity_loop, *maps)
    names = ("affinity", "loop over channels")
    rows.append(pair("affinity of 64 maps of 16 x 16, 8 rows", *affinity, names=names, goal="<= 0.2", rounds=9))
    packages: tuple[str, ...] = ()
    if importlib.util.find_spec("torchdistill") is None:
        print("torchdistill is not installed: nothing is compared with it")
    else:
        packages = ("torchdistill",)
        for kind, what in (("hint", "a first stage of hints"), ("attention", "attention transfer and distillation")):
            pairs = [make(kind, network(16, 0), network(16, 1, depth=5), batch) for make in STEPS.values()]
            rows.append(pair(f"step of {what}", *pairs, names=("probe", "torchdistill 1.1.5"), goal="< 1", rounds=31))
            rows.append(memory(kind))
            gaps = first_losses(kind)
            print(f"losses of five steps of {kind}: largest relative gap {max(gaps):.1e}")
            if max(gaps) > 1e-4:
                raise AssertionError(f"the losses of {kind} differ from torchdistill's: {gaps}")
    write("torchdistill", rows, packages)


if __name__ == "__main__":
    main()
