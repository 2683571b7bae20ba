"""What a compressor keeps for each parameter from step to step: by name, and through rewrites by the parameter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter


class Memory:
    """Several kinds of values, each by parameter name; and the count of steps, told by the names that come by.

    A reducer sees a bucket at a time, in an order that DistributedDataParallel changes once. A step begins when a
    name comes a second time. Names that a whole step did not have are forgotten; a new name has nothing yet.
    """

    def __init__(self, *kinds: str) -> None:
        self.kinds: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        self.steps = 0
        """Steps begun; the first one is step 0, so the present one is `steps - 1`."""
        self.names: list[str] = []
        """Of the step before the present one, in the order they came."""
        self._seen: dict[str, None] = {}
        self._between_steps = True
        self._parameters: dict[str, weakref.ref[Parameter]] = {}

    def __getitem__(self, kind: str) -> dict[str, Any]:
        """Return the values of a kind by name."""
        return self.kinds[kind]

    def begins(self, names: Iterable[str]) -> bool:
        """Say whether a bucket of these names would begin a step."""
        return self._between_steps or not self._seen.keys().isdisjoint(names)

    def begin(self, names: Iterable[str]) -> bool:
        """Take note of a bucket's names; say whether a step begins with it."""
        names = list(names)
        fresh = self.begins(names)
        if fresh:
            self.names = list(self._seen)
            if self.steps:
                for values in self.kinds.values():
                    for gone in values.keys() - self._seen.keys():
                        del values[gone]
            self.steps += 1
            self._seen, self._between_steps = {}, False
        self._seen.update(dict.fromkeys(names))
        return fresh

    def follow(self, parameters: Mapping[str, Parameter]) -> None:
        """Take the names that parameters have from now on: values move along with a parameter, or are forgotten.

        A rewrite that removes a block renames those after it; what is kept must not pass to another parameter that
        now bears the name.
        """
        before = {id(p): n for n, ref in self._parameters.items() if (p := ref()) is not None}
        if self._parameters:
            moved = {new: before[id(p)] for new, p in parameters.items() if id(p) in before}
            for kind, values in self.kinds.items():
                self.kinds[kind] = {new: values[old] for new, old in moved.items() if old in values}
            self._seen = {new: None for new, old in moved.items() if old in self._seen}
            self._between_steps = True
        self._parameters = {n: weakref.ref(p) for n, p in parameters.items()}

    def fitting(self, kind: str, name: str, like: Tensor) -> Tensor | None:
        """Return the tensor kept for a name, on the device of `like`; None where there is none of this shape."""
        kept: Tensor | None = self.kinds[kind].get(name)
        if kept is None or kept.shape != like.shape:
            return None
        return kept.to(like.device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything kept, by kind and name, with the count of steps and the names of the last one."""
        kinds = {kind: dict(values) for kind, values in self.kinds.items()}
        return {"steps": self.steps, "names": list(self._seen), **kinds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back; the next bucket begins a step."""
        self.steps = int(state["steps"])
        for kind in self.kinds:
            self.kinds[kind] = {n: v.clone() if isinstance(v, Tensor) else v for n, v in state[kind].items()}
        self._seen, self._between_steps = dict.fromkeys(state["names"]), True
