"""Give the tokens of a model other numbers: it then reads re-numbered inputs as it read the plain ones, exactly.

    hidden = rewrite(model, PermuteVocabulary(7))                 # hidden(phi(x)) == model(x), phi = byte_table(7)
    hidden = rewrite(model, PermuteVocabulary(7, inverse=True))   # and back

Obfuscation, not cryptography: a fixed renumbering is a substitution cipher, and whoever has enough inputs can undo it.
Source: Horton et al., Bytes Are All You Need (2023), arXiv 2306.00238, section 4.3 (obfuscated inputs).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import Parameter

from lamina import anatomy
from lamina.anatomy.token_table import token_table
from lamina.batches import Batch
from lamina.data.byte_transforms import byte_table
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.registry import register


@dataclass(frozen=True)
class PermuteVocabularyDecision:
    """Which tables are put in another order, and in which."""

    embedding: str
    """Path of the table of tokens."""
    head: str | None
    """Path of the output projection that is tied to it, or None."""
    table: tuple[int, ...]
    """The new number of each token, from token 0."""


@register("pass", source="Horton et al. 2023, arXiv 2306.00238, section 4.3")
class PermuteVocabulary:
    """Re-number the tokens of a model: its answers to re-numbered inputs are what they were to the plain ones.

    Row b of the table of tokens becomes row table[b]; rows beyond the table stay. An output projection that is tied to
    the table is put in order along, with its bias, and its logits then stand at the new numbers. Nothing is learned and
    nothing lost. Moments of the optimizer follow.

    Args:
        table: the new number of each token, from token 0 (each number once); or a seed, of the table that the data
            transform `byte_permutation` with that seed uses.
        inverse: go back from such a table.
        embedding: path of the table of tokens; None = the one that the model names, or the first.
    Raises:
        LaminaError: a table that does not have each number once.
        AnatomyError: no table of tokens, or one with fewer rows.
    Source: section 4.3: "our model is invariant to permutations of the byte values" made exact for a trained model.
    Example:
        >>> from lamina.rewrite import rewrite
        >>> model = nn.Sequential(nn.Embedding(3, 1))
        >>> plain = model(torch.tensor([0, 1, 2])).flatten()
        >>> bool((rewrite(model, PermuteVocabulary([2, 0, 1]))(torch.tensor([2, 0, 1])).flatten() == plain).all())
        True
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(self, table: int | Sequence[int], *, inverse: bool = False, embedding: str | None = None) -> None:
        numbers = byte_table(table).tolist() if isinstance(table, int) else [*table]
        if sorted(numbers) != list(range(len(numbers))) or not numbers:
            raise LaminaError(
                f"a table has each of the numbers 0..{max(len(numbers) - 1, 0)} once, got {_short(numbers)}"
            )
        self.table = tuple(_inverse(numbers) if inverse else numbers)
        self.embedding = embedding

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> PermuteVocabularyDecision:
        """Find the table of tokens and a projection tied to it; the data is not looked at."""
        path = token_table(model) if self.embedding is None else self.embedding
        table = _embedding(model, path)
        if table.num_embeddings < len(self.table):
            raise AnatomyError(
                f"{path!r} of {type(model).__name__} has {table.num_embeddings} rows, and {len(self.table)} tokens are "
                "to get new numbers"
            )
        tied = (p for p, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight is table.weight)
        return PermuteVocabularyDecision(path, next(tied, None), self.table)

    def apply(self, model: nn.Module, decision: PermuteVocabularyDecision, lineage: Lineage) -> nn.Module:
        """Put the rows in order, in place; return the model."""
        table = _embedding(model, decision.embedding)
        rows = [*_inverse(decision.table), *range(len(decision.table), table.num_embeddings)]
        moved: list[Any] = [table.weight]
        bias = None if decision.head is None else getattr(anatomy.get(model, decision.head), "bias", None)
        if isinstance(bias, Parameter):
            moved.append(bias)
        for old in moved:
            new = Parameter(old.detach()[torch.tensor(rows, device=old.device)], requires_grad=old.requires_grad)
            lineage.derive(new, old, rows)
            _put(model, old, new)
        if table.padding_idx is not None and table.padding_idx < len(decision.table):
            table.padding_idx = decision.table[table.padding_idx]
        return model


def _put(model: nn.Module, old: Parameter, new: Parameter) -> None:
    """Put a parameter wherever another one is."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is old:
                setattr(module, name, new)


def _embedding(model: nn.Module, path: str) -> nn.Embedding:
    found = anatomy.get(model, path)
    if not isinstance(found, nn.Embedding):
        raise AnatomyError(f"{path!r} of {type(model).__name__} is a {type(found).__name__}, no table of tokens")
    return found


def _inverse(table: Sequence[int]) -> list[int]:
    found = [0] * len(table)
    for old, new in enumerate(table):
        found[new] = old
    return found


def _short(numbers: Sequence[int]) -> str:
    return f"{[*numbers[:8]]}{'...' if len(numbers) > 8 else ''}"
