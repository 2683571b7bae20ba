"""The master's account: which messages of which job are in, each once, and the sum that they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lamina.errors import LaminaError
from lamina.gradients.coding.matrix import NotDecodable
from lamina.gradients.coding.scheme import Item, Scheme


class Ledger:
    """Messages of the jobs in flight: uncoded ones are added up as they come, coded ones wait until the job is whole.

    Args:
        scheme: whose messages.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._wanted, self._groups = scheme.parts()
        self._sums: dict[int, Tensor] = {}
        self._own: dict[int, set[tuple[int, int]]] = {}
        self._coded: dict[int, dict[int, dict[int, Tensor]]] = {}

    def add(self, worker: int, item: Item, message: Tensor) -> None:
        """Take one message in; the ledger keeps it.

        Raises:
            LaminaError: it is in already.
        """
        if item.kind == "D1":
            own = self._own.setdefault(item.job, set())
            twice = (worker, item.part) in own
            own.add((worker, item.part))
        else:
            sent = self._coded.setdefault(item.job, {}).setdefault(item.part, {})
            twice = worker in sent
        if twice:
            raise LaminaError(
                f"worker {worker} sent {item.kind} {item.part} of job {item.job} twice: it would count twice"
            )
        if item.kind != "D1":
            sent[worker] = message
        elif item.job in self._sums:
            self._sums[item.job].add_(message)
        else:
            # In float64 the order in which messages come does not show.
            self._sums[item.job] = message.double()

    def decodable(self, job: int) -> bool:
        """Say whether the job's messages suffice."""
        coded = self._coded.get(job, {})
        return self._own.get(job, set()) >= self._wanted and all(
            self.scheme.code.decodes(coded.get(g, {})) for g in range(self._groups)
        )

    def decode(self, job: int) -> Tensor:
        """Return the sum over all of a job's chunks, in float64, and forget the job.

        Raises:
            NotDecodable: messages are missing (they are named); nothing is forgotten.
        """
        lost = sorted(self._wanted - self._own.get(job, set()))
        if lost:
            raise NotDecodable(f"job {job} lacks own chunks (worker, chunk): {lost[:8]}")
        coded = self._coded.get(job, {})
        try:
            decoded = [self.scheme.code.decode(coded.get(g, {})) for g in range(self._groups)]
        except NotDecodable as error:
            raise NotDecodable(f"job {job}: {error}") from error
        total = self._sums.pop(job, None)
        for part in decoded:
            total = part.double() if total is None else total.add_(part)
        assert total is not None
        self._own.pop(job, None)
        self._coded.pop(job, None)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the messages of the jobs in flight."""
        return {
            "sums": {str(job): total.clone() for job, total in self._sums.items()},
            "own": {str(job): [list(k) for k in sorted(own)] for job, own in self._own.items()},
            "coded": {
                str(job): {str(g): {str(w): m.clone() for w, m in sent.items()} for g, sent in groups.items()}
                for job, groups in self._coded.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._sums = {int(job): total.clone() for job, total in state["sums"].items()}
        self._own = {int(job): {(int(w), int(k)) for w, k in own} for job, own in state["own"].items()}
        self._coded = {
            int(job): {int(g): {int(w): m.clone() for w, m in sent.items()} for g, sent in groups.items()}
            for job, groups in state["coded"].items()
        }
