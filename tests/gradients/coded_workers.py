"""Coded workers as threads of one process, over queues in place of a process group."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class QueueLink:
    """Messages by queues; a closed link raises what gloo raises."""

    def __init__(self, rank: int, workers: int, boxes: dict[tuple[int, int], queue.Queue[Any]]) -> None:
        self.rank, self.workers, self.boxes = rank, workers, boxes

    def send(self, tensor: Tensor, peer: int) -> None:
        self.boxes[self.rank, peer].put(tensor.clone())

    def receive(self, tensor: Tensor, peer: int) -> None:
        got = self.boxes[peer, self.rank].get(timeout=20)
        if got is None:
            raise RuntimeError("Connection closed by peer")
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        tensor.copy_(got)

    def cut(self) -> None:
        """End this worker: whoever waits for it is told."""
        for peer in range(self.workers):
            if peer != self.rank:
                self.boxes[self.rank, peer].put(None)


def run(make: Callable[[], Any], workers: int, work: Callable[[Any, QueueLink], Any]) -> list[Any]:
    """Call `work(reducer, link)` on every worker with a reducer of its own; return what each gave, or its error."""
    boxes = {(a, b): queue.Queue[Any]() for a in range(workers) for b in range(workers)}
    results: list[Any] = [None] * workers

    def one(rank: int) -> None:
        reducer, link = make(), QueueLink(rank, workers, boxes)
        reducer._link = link
        try:
            results[rank] = work(reducer, link)
        except BaseException as error:
            results[rank] = error
            link.cut()

    threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results
