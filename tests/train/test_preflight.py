from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lamina.data import Columns, Data
from lamina.errors import RecipeError
from lamina.models import ResNet, Transformer
from lamina.objectives import Classification, NextToken
from lamina.recipe import load
from lamina.rewrite import DropAttention
from lamina.train.preflight import refuse_batch, refuse_misfits, try_batch
from lamina.train.run import train


def rows(length: int = 7) -> Data:
    ids = torch.arange(3 * length).reshape(3, length) % 11
    return Data(Columns({"input_ids": ids, "labels": ids}), None, 2, {"vocabulary": 11, "context": length})


def decoder(vocabulary: int = 11, context: int = 7) -> Transformer:
    with torch.device("meta"):
        return Transformer(depth=2, width=8, heads=2, vocabulary=vocabulary, context=context)


class Looking(nn.Module):
    """Asks for a number on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device="meta"))

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids.float() * float(self.weight.sum())


def test_a_table_with_too_few_rows_is_refused() -> None:
    refuse_misfits(decoder(11), {"vocabulary": 11})
    refuse_misfits(decoder(12), {"vocabulary": 11})
    refuse_misfits(nn.Linear(3, 3), {"vocabulary": 11})
    with pytest.raises(RecipeError, match=r"^model: the data has 11 different tokens, .* rows for 10 only$"):
        refuse_misfits(decoder(10), {"vocabulary": 11})


def test_the_first_pass_must_fit_the_model() -> None:
    refuse_misfits(decoder(), {}, [DropAttention(1), DropAttention(5)])
    with pytest.raises(RecipeError, match=r"^rewrite\[0\]: cannot drop 2 of the 2 attention parts"):
        refuse_misfits(decoder(), {}, [DropAttention(2)])


def test_a_batch_goes_through_without_memory() -> None:
    assert try_batch(decoder(), NextToken(), rows()) is None
    assert "meta" in (try_batch(Looking(), NextToken(), rows()) or "")


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^model: a batch of the data does not fit: .*context is 5$"):
        try_batch(decoder(context=5), NextToken(), rows())
    with torch.device("meta"):
        images = ResNet(classes=3)
    with pytest.raises(RecipeError, match=r"^model: a batch of the data \(input_ids \(2, 7\), .*conv2d"):
        try_batch(images, Classification(), rows())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.depth=0", "override 'model.depth=0': model.depth: Transformer: depth must be at least 1, got 0"),
        ("data.source=/nowhere", "override 'data.source=/nowhere': data.source: the text source '/nowhere' does not"),
        ("model.vocabulary=16", "override 'model.vocabulary=16': model: the data has 256 different tokens"),
        ("rewrite[0].count=2", "override 'rewrite[0].count=2': rewrite[0]: cannot drop 2 of the 2"),
        ("optimizer.lr=-1", "override 'optimizer.lr=-1': optimizer.lr: LAMB: lr must be >= 0"),
    ],
)
def test_training_names_the_place_of_what_cannot_be_built(tmp_path, override: str, sentence: str) -> None:
    text = """
model: {name: transformer, depth: 2, width: 8, heads: 2}
data: {name: text, context: 8, batch: 2, limit: 20000}
objective: next_token
optimizer: {name: lamb, lr: 1e-3}
rewrite: [{name: drop_attention, count: 1, at: 0.5}]
train: {steps: 2}
"""
    with pytest.raises(RecipeError) as caught:
        train(load(text, [override]), folder=tmp_path / "run")
    assert sentence.partition(": ")[2] in str(caught.value)
    assert str(caught.value).startswith(("override", "recipe:"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "{name: vision_transformer, image: 16, patch: 2, depth: 1, width: 8, heads: 2}",
            r"takes \(batch, \(1, 16, 16",
        ),
        ("{name: resnet20, norm: layer_norm}", r".*normalized_shape=\[16\]"),
    ],
)
def test_training_refuses_a_model_that_no_batch_passes_through(tmp_path, model: str, words: str) -> None:
    text = f"model: {model}\ndata: {{name: digits, batch: 4}}\nobjective: classification\ntrain: {{steps: 2}}\n"
    with pytest.raises(RecipeError, match=r"model: a batch of the data .*does not fit: .*" + words):
        train(load(text + "optimizer: {name: adamw, lr: 1e-3}\n"), folder=tmp_path / "run")


class WithoutMeta(nn.Module):
    """Its kernel for meta refuses what the real one takes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.is_meta:
            raise RuntimeError("Expected inputs of BF16 type")
        return self.table(input_ids)


def test_what_only_meta_refuses_is_asked_of_the_model_itself() -> None:
    model = WithoutMeta()
    refuse_batch({"name": f"{__name__}:WithoutMeta"}, model, rows())
    assert model.training


def test_parts_that_are_there_already_stay_where_they_are() -> None:
    table = nn.Linear(3, 3)
    refuse_batch({"name": "transformer", "norm": table}, table, rows())
    refuse_batch(table, table, rows())
    assert not table.weight.is_meta
