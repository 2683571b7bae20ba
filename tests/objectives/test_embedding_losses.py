"""Losses of embeddings: formulas by hand, sentence-transformers, layouts of a batch, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.models import EachView
from lamina.objectives import CoSENT, EmbeddingClassification, InfoNCE, MultipleNegatives, Objective
from lamina.objectives.embedding_losses import scores


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return EachView(nn.Linear(6, 4), dims=2)


def rows(fields: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(5, fields, 6, generator=generator), "label": torch.tensor([0.0, 3.0, 1.0, 5.0, 3.0])}


EXAMPLES = [
    Example("objective", "multiple_negatives", model=encoder, batch=lambda: rows(3), bad={"scale": 0.0}),
    Example("objective", "info_nce", model=encoder, batch=rows, bad={"temperature": -1.0}),
    Example("objective", "cosent", model=encoder, batch=rows, bad={"scale": -1.0}),
    Example(
        "objective",
        "embedding_classification",
        {"classes": 3, "widths": [4]},
        model=lambda: nn.Linear(6, 4),
        batch=lambda: {"inputs": rows()["inputs"][:, 0], "labels": torch.tensor([0, 2, 1, 1, 0])},
        bad={"classes": 0},
    ),
]


def embeddings(fields: int, rows: int = 5, width: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(fields)
    return [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(fields)]


def ranked_by_hand(e: list[Tensor], scale: float, *, cosine: bool) -> float:
    e = [x.double() / (x.double().norm(dim=1, keepdim=True) if cosine else 1) for x in e]
    total = 0.0
    for i, anchor in enumerate(e[0]):
        others = [scale * float(anchor @ other) for field in e[1:] for other in field]
        total += float(torch.tensor(others, dtype=torch.float64).logsumexp(0)) - others[i]
    return total / len(e[0])


@pytest.mark.parametrize("fields", [2, 4])
@pytest.mark.parametrize(("count", "width"), [(1, 7), (7, 1), (5, 63)])
def test_ranking_losses_equal_loops_by_hand(fields, count, width):
    e = embeddings(fields, count, width)
    found = MultipleNegatives(20.0).loss({"embeddings": e}, {})
    assert found["loss"].item() == pytest.approx(ranked_by_hand(e, 20.0, cosine=True), rel=1e-5, abs=1e-6)
    found = InfoNCE(0.5).loss({"embeddings": e}, {})
    assert found["loss"].item() == pytest.approx(ranked_by_hand(e, 2.0, cosine=False), rel=1e-5, abs=1e-5)
    assert found["count"] == count


def test_cosent_equals_a_loop_over_pairs_and_perfect_order_costs_little():
    a, b = embeddings(2)
    label = rows()["label"]
    cosine = F.cosine_similarity(a.double(), b.double())
    pairs = [20 * (cosine[i] - cosine[j]) for i in range(5) for j in range(5) if label[i] < label[j]]
    expected = torch.stack([torch.zeros((), dtype=torch.float64), *pairs]).logsumexp(0)
    assert CoSENT().loss(torch.stack([a, b], 1), {"label": label})["loss"].item() == pytest.approx(expected.item())
    assert len(pairs) == 9
    equal = CoSENT().loss({"embeddings": [a, b]}, {"label": torch.ones(5)})
    assert equal["loss"] == 0.0
    angle = torch.linspace(1.5, 0.0, 5)
    turned = torch.stack([angle.cos(), angle.sin()], 1)
    ordered = CoSENT(100.0).loss({"embeddings": [torch.tensor([[1.0, 0.0]] * 5), turned]}, {"label": torch.arange(5)})
    assert ordered["loss"] < 0.01


@pytest.mark.slow  # Importing their library takes seconds; loops by hand say the same.
def test_sentence_transformers_computes_the_same():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    e = embeddings(3)
    model: Any = nn.Identity()
    theirs = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    torch.testing.assert_close(theirs.compute_loss_from_embeddings(e, None), MultipleNegatives().loss({"embeddings": e}, {})["loss"])  # fmt: skip  # noqa: E501
    theirs = losses.CoSENTLoss(model, scale=20.0)
    label = rows()["label"]
    torch.testing.assert_close(
        theirs.compute_loss_from_embeddings(e[:2], label),
        CoSENT().loss({"embeddings": e[:2]}, {"label": label})["loss"],
    )


@pytest.mark.parametrize("make", [MultipleNegatives, InfoNCE, CoSENT])
def test_gradients_by_differences_and_half_precision(make):
    label = rows()["label"]
    a, b = (x.double().requires_grad_() for x in embeddings(2, 5, 3))
    objective = make(2.0) if make is InfoNCE else make(1.0)
    assert torch.autograd.gradcheck(
        lambda x, y: objective.loss({"embeddings": [x, y]}, {"label": label})["loss"], (a, b)
    )
    low = [x.bfloat16() for x in embeddings(2)]
    found = objective.loss({"embeddings": low}, {"label": label})["loss"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, objective.loss({"embeddings": [x.float() for x in low]}, {"label": label})["loss"]
    )


def test_scores_of_one_field_leave_out_the_row_itself():
    (x,) = embeddings(1, 4)
    whole = 3.0 * x @ x.T
    expected = torch.stack([torch.cat([whole[i, :i], whole[i, i + 1 :]]) for i in range(4)])
    torch.testing.assert_close(scores([x], 3.0), expected)
    assert scores([x[:1]], 3.0).shape == (1, 0)


def test_a_batch_of_texts_and_one_of_tensors_give_the_same():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids).mean(1)

    torch.manual_seed(0)
    model = Table()
    ids = torch.randint(9, (3, 2, 5))
    objective: Objective = MultipleNegatives()
    expected = objective(model, {"input_ids": ids})["loss"]
    listed = {"texts": [{"input_ids": ids[:, 0]}, {"input_ids": ids[:, 1]}]}
    torch.testing.assert_close(objective(model, listed)["loss"], expected)
    torch.testing.assert_close(objective.loss({"embeddings": [model(ids[:, i]) for i in (0, 1)]}, {})["loss"], expected)
    with pytest.raises(ShapeError, match=r"different numbers of rows: \[3, 2\]"):
        objective(model, {"texts": [{"input_ids": ids[:, 0]}, {"input_ids": ids[:2, 1]}]})
    with pytest.raises(LaminaError, match=r"batch\['texts'\] must be a list of batches"):
        objective(model, {"texts": ids})


def test_bad_input_is_refused_in_a_sentence():
    a, b = embeddings(2)
    with pytest.raises(ShapeError, match=r"MultipleNegatives takes at least 2 fields of one shape.*got \[\(5, 7\)\]"):
        MultipleNegatives().loss({"embeddings": [a]}, {})
    with pytest.raises(ShapeError, match=r"fields of one shape"):
        MultipleNegatives().loss({"embeddings": [a, b[:3]]}, {})
    with pytest.raises(LaminaError, match=r"cosent needs a score a row in 'label', and the batch has \['inputs'\]"):
        CoSENT().loss({"embeddings": [a, b]}, {"inputs": a})
    with pytest.raises(ShapeError, match=r"two texts and a score a row, got 2 and \(4,\)"):
        CoSENT().loss({"embeddings": [a, b]}, {"label": torch.zeros(4)})
    with pytest.raises(ShapeError, match=r"heads are for one embedding of width 2, 4, got 1 of 7"):
        EmbeddingClassification(3, [4, 2]).loss(a, {"labels": torch.zeros(5).long()})
    with pytest.raises(ShapeError, match=r"\(batch, width\) or \(batch, fields, width\), got \(5,\)"):
        InfoNCE().loss(a[:, 0], {})
    with pytest.raises(ShapeError, match=r"expected embeddings, one \(batch, width\) a field, got a dict"):
        InfoNCE().loss({"logits": a}, {})
