"""Several gloo processes for one test: started from a server that has imported torch and lamina once."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "lamina.gradients",
    "lamina.models",
    "lamina.objectives",
    "lamina.optim",
]


def server() -> ForkServerContext:
    """Return what starts processes that have torch and lamina from the beginning."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def in_processes(work: Callable[..., Any], world: int, folder: Path, *given: Any, seconds: float = 120) -> list[Any]:
    """Run work(rank, *given) in `world` processes of one group and return what each returned, by rank.

    Args:
        work: a function of a module; what it returns is pickled.
        folder: of the test, for the processes to meet in.
        seconds: in which all must be done; what still runs then is killed.
    Raises:
        AssertionError: a process raised (its traceback is shown), died, or was too slow.
    """
    context = server()
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    store = f"file://{folder}/processes"
    workers = [context.Process(target=_worker, args=(work, r, world, store, given, ends[r][1])) for r in range(world)]
    for worker, (_, sending) in zip(workers, ends, strict=True):
        worker.start()
        sending.close()
    answers: dict[int, Any] = {}
    waiting: dict[Any, int] = {end: rank for rank, (end, _) in enumerate(ends)}
    deadline = time.monotonic() + seconds
    try:
        while waiting:
            # In order of arrival: who fails first is the cause, the others only lost their peer.
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"processes {sorted(waiting.values())} were not done in {seconds:g} s"
            for end in ready:
                rank = waiting.pop(end)
                answers[rank] = _received(rank, end)
        for worker in workers:
            worker.join(20)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    return [answers[rank] for rank in range(world)]


def _received(rank: int, end: Any) -> Any:
    try:
        result, raised = pickle.loads(end.recv_bytes())
    except EOFError:
        raise AssertionError(f"process {rank} died") from None
    assert raised is None, f"process {rank} raised:\n{raised}"
    return result


def _worker(
    work: Callable[..., Any], rank: int, world: int, store: str, given: tuple[Any, ...], end: Connection
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=world)
    try:
        # Plain pickle: tensors as bytes, which outlive this process.
        answer = pickle.dumps((work(rank, *given), None))
    except BaseException:
        end.send_bytes(pickle.dumps((None, traceback.format_exc())))
        return
    end.send_bytes(answer)
    dist.barrier()
    dist.destroy_process_group()
