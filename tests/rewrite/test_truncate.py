"""Truncate: equals the size within the whole model, in any model; decisions, folders for sentence-transformers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.contract.example import Example
from tests.contract.foreign import HomeMade, home_made, llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lamina import io
from lamina.batches import call
from lamina.errors import AnatomyError, LaminaError
from lamina.models import Transformer
from lamina.nn import cut_embedding, pool_tokens
from lamina.objectives._exit_vectors import exit_vectors, exits_of
from lamina.rewrite import (
    DropAttention,
    DropBlock,
    Truncate,
    export_sentence_transformers,
    history,
    replay,
    rewrite,
    sizes,
)

transformers = pytest.importorskip("transformers")

EXAMPLES = [Example("pass", "truncate", {"layers": 2, "width": 8}, bad={"layers": 5})]

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 32, shape, generator=torch.Generator().manual_seed(0))


def padded() -> dict[str, Tensor]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": tokens(3, 7), "attention_mask": mask}


def bert(kind: str = "BertModel", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**{**SIZES, **options})).eval()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocabulary": 32, "context": 8, "causal": False, "classes": 3, "pool": "class"}
    return Transformer(4, 16, 2, **sizes).eval()


MODELS = {
    "bert": (bert, padded),
    "bert_mlm": (lambda: bert("BertForMaskedLM"), padded),
    "bert_classifier": (lambda: bert("BertForSequenceClassification"), padded),
    "llama": (lambda: llama()[0].eval(), padded),
    "ours": (lambda: Transformer(4, 16, 2, vocabulary=32, context=8).eval(), padded),
    "ours_with_a_class_token": (classifier, padded),
    "home_made": (lambda: home_made()[0].eval(), lambda: home_made()[1]),
}


@torch.no_grad()
def at_size(model: nn.Module, batch: Any, layers: int, width: int, pool: Any = "mean") -> Tensor:
    return cut_embedding(exit_vectors(model, batch, exits_of(model), [layers], pool)[layers], width)


@pytest.mark.parametrize(("name", "pool"), [*((name, "mean") for name in MODELS), ("bert", "cls"), ("ours", "last")])
def test_a_truncated_model_gives_what_the_whole_gives_at_that_size(name, pool):
    make, batch = MODELS[name]
    model, given = make(), batch()
    expected = at_size(model, given, 2, 8, pool)
    names = dict(model.named_parameters())
    small = rewrite(model, Truncate(2, 8, pool))
    with torch.no_grad():
        torch.testing.assert_close(call(small, given), expected, rtol=1e-6, atol=1e-6)
    assert expected.shape == (len(expected), 8)
    # What stays keeps its tensor and its name.
    assert all(names[n] is p for n, p in small.named_parameters())
    assert len(names) > len(list(small.parameters()))


def test_head_and_pooler_go_and_the_configuration_follows():
    model = bert("BertForSequenceClassification")
    decision = Truncate(3, 8).decide(model)
    assert decision.drop == ("classifier", "bert.pooler")
    assert decision.table() == (
        "bert.encoder.layer: 3 of 4 blocks; output: mean of the tokens, its first 8 numbers, of length one; "
        "without classifier, bert.pooler"
    )
    small = rewrite(model, Truncate(3, 8))
    assert small.config.num_hidden_layers == 3
    assert json.loads(json.dumps(history(small)[0].decision))["drop"] == ["classifier", "bert.pooler"]
    again = replay(bert("BertForSequenceClassification").to("meta"), history(small))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}


def test_positional_masks_are_read_as_well():
    model, given = bert(), padded()
    expected = at_size(model, given, 2, 8)
    small = rewrite(model, Truncate(2, 8))
    with torch.no_grad():
        torch.testing.assert_close(small(given["input_ids"], given["attention_mask"]), expected)
        assert not torch.allclose(small(given["input_ids"]), expected)


def test_only_blocks_go_where_nothing_is_pooled_and_a_decoder_still_generates():
    model, given = llama()
    whole = copy.deepcopy(model).eval()
    small = rewrite(model, Truncate(2, pool=None))
    with torch.no_grad():
        states = whole.model(**given, output_hidden_states=True).hidden_states
        torch.testing.assert_close(small(**given).logits, whole.lm_head(whole.model.norm(states[2])))
    assert small.generate(given["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 10)


def test_a_shared_block_runs_fewer_times():
    config = transformers.AlbertConfig(**SIZES, embedding_size=8)
    model = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    given = {"input_ids": tokens(2, 5)}
    expected = at_size(model, given, 3, 8)
    small = rewrite(model, Truncate(3, 8))
    with torch.no_grad():
        torch.testing.assert_close(small(**given), expected)
    assert small.config.num_hidden_layers == 3


def test_truncated_again_and_dropped_after():
    model, given = bert(), padded()
    expected = at_size(model, given, 2, 8)
    small = rewrite(rewrite(model, Truncate(3, 16)), Truncate(2, 8))
    with torch.no_grad():
        torch.testing.assert_close(small(**given), expected)
    with pytest.raises(LaminaError, match=r"cannot keep 9 numbers of an embedding of 8"):
        Truncate(2, 9).decide(small)
    # The end of whatever block runs last.
    rewrite(small, DropBlock(1, order="last"))
    with torch.no_grad():
        torch.testing.assert_close(small(**given), at_size(bert(), given, 1, 8))
    assert "truncate counts the blocks it saw" in str(DropAttention(1).conflicts(Truncate(2)))


def test_torch_encoders_leave_their_fused_path():
    torch.manual_seed(0)
    for batch_first in (True, False):
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
        x = torch.randn(2, 5, 16) if batch_first else torch.randn(5, 2, 16)
        expected = at_size(model, {"src": x}, 2, 8)
        small = rewrite(model, Truncate(2, 8))
        with torch.no_grad():
            found = small(x)
        torch.testing.assert_close(found, expected)
        assert found.shape == (2, 8)


class Checkpointed(HomeMade):
    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)[0]
        for block in self.stack:
            x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
        return self.answer(self.norm(x))


def test_a_checkpointed_model_trains_and_keeps_nothing_of_the_second_pass():
    torch.manual_seed(0)
    small: Any = rewrite(Checkpointed(), Truncate(2, 8))
    # Else the second pass ends before it comes to the hook.
    with set_checkpoint_early_stop(False):
        small(torch.randn(2, 7, 5)).sum().backward()
    assert small.embedding_output.stream is None
    assert small.stack[0].net[0].weight.grad is not None
    copy.deepcopy(small)


@pytest.mark.slow  # Contract tests save, load and compile truncated models.
def test_it_is_exported_saved_and_loaded(tmp_path):
    model, given = bert("BertForMaskedLM"), padded()
    small = rewrite(model, Truncate(2, 8))
    with torch.no_grad():
        expected = small(**given)
        program = torch.export.export(small, (), given)
        torch.testing.assert_close(program.module()(**given), expected)
    io.save(small, tmp_path / "saved")
    assert torch.equal(io.load(tmp_path / "saved")(**given), expected)


def vocabulary(folder: Any) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=16)


def test_the_folder_holds_the_blocks_that_are_left_and_says_what_follows(tmp_path):
    tokenizer = vocabulary(tmp_path)
    small, given = rewrite(bert("BertForMaskedLM"), Truncate(2, 8)), padded()
    folder = export_sentence_transformers(small, tmp_path / "folder", tokenizer)
    modules = json.loads((folder / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert json.loads((folder / "config_sentence_transformers.json").read_text())["truncate_dim"] == 8
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [k for k, v in pooling.items() if v is True] == ["pooling_mode_mean_tokens"]
    body = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert len(body.encoder.layer) == 2
    with safe_open(str(folder / "2_Dense" / "model.safetensors"), framework="pt") as stored, torch.no_grad():
        rows = (
            pool_tokens(body(**given).last_hidden_state, given["attention_mask"]) @ stored.get_tensor("linear.weight").T
        )
        torch.testing.assert_close(nn.functional.normalize(rows), small(**given))


@pytest.mark.slow  # Importing their library takes seconds; the folder is read without it above.
@pytest.mark.parametrize(("width", "pool"), [(8, "mean"), (16, "cls"), (8, "last")])
def test_sentence_transformers_loads_the_folder_with_the_same_embeddings(tmp_path, width, pool):
    library = pytest.importorskip("sentence_transformers")
    tokenizer = vocabulary(tmp_path)
    model = bert("BertForMaskedLM")
    whole = copy.deepcopy(model)
    small = rewrite(model, Truncate(2, width, pool))
    texts = ["a b c d", "e", "", "f g h i j k l m n o p q r s t u v w x y z"]
    given = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    folder = export_sentence_transformers(small, tmp_path / "folder", tokenizer)
    with torch.no_grad():
        expected = small(**given)
    loaded = library.SentenceTransformer(str(folder), device="cpu")
    torch.testing.assert_close(loaded.encode(texts, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-6)
    assert loaded.get_embedding_dimension() == width
    # Their own way: layers cut by hand, then truncate_dim, then the norm.
    loaded[0].auto_model = whole.bert
    whole.bert.encoder.layer = whole.bert.encoder.layer[:2]
    by_hand = library.SentenceTransformer(modules=list(loaded)[:2], device="cpu", truncate_dim=width)
    found = by_hand.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(LaminaError, match=r"BertModel is no transformers model that ends in an embedding"):
        export_sentence_transformers(bert(), tmp_path / "a", None)
    with pytest.raises(LaminaError, match=r"HomeMade is no transformers model"):
        export_sentence_transformers(rewrite(HomeMade(), Truncate(2, 8)), tmp_path / "a", None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "something").touch()
    with pytest.raises(LaminaError, match=r"a is not empty: refusing to write"):
        export_sentence_transformers(rewrite(bert(), Truncate(2, 8)), tmp_path / "a", None)


def test_the_sizes_of_a_model_are_a_table_and_the_model_stays():
    model, given = bert(), padded()
    before = len(list(model.parameters()))
    found = sizes(model, [given], lambda m, b: float(m(**b[0]).sum()), [(1, 8), (4, 16)], rounds=1)
    assert len(list(model.parameters())) == before
    small, large = found.rows
    assert small.metric == pytest.approx(float(at_size(model, given, 1, 8).sum()), abs=1e-5)
    assert (small.embedding_bytes, large.embedding_bytes) == (32, 64)
    assert small.bytes < large.bytes
    assert len(found.table().splitlines()) == 3
    with pytest.raises(LaminaError, match=r"sizes needs a batch"):
        sizes(model, [], lambda m, b: 0.0, [(1, 8)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": 0}, r"layers is how many blocks stay, at least 1, got 0"),
        ({"layers": 5}, r"cannot keep 5 blocks, encoder.layer has 4"),
        ({"layers": 2, "width": 17}, r"cannot keep 17 numbers of an embedding of 16"),
        ({"layers": 2, "width": 0}, r"at least 1, got 0"),
        ({"layers": 2, "width": 8, "pool": None}, r"only an embedding can be cut to width=8, and pool=None makes none"),
        ({"layers": 2, "pool": "max"}, r"pool must be one of mean, cls, last"),
        ({"layers": 2, "pool": lambda x, m: x[:, 0]}, r"pool must be a name, which a file can hold"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(LaminaError, match=sentence):
        rewrite(bert(), Truncate(**options))


def test_models_without_one_trunk_are_refused():
    with pytest.raises(AnatomyError, match=r"found no repeated blocks"):
        Truncate(1).decide(nn.Linear(2, 2))
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    with pytest.raises(AnatomyError, match=r"several trunks"):
        Truncate(1).decide(transformers.T5ForConditionalGeneration(config))
