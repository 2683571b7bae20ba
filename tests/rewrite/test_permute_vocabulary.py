"""Other numbers for the tokens, and the same answers: in bytes, in language models with tied heads, in training."""

import copy

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import llama
from torch import nn

from lamina.data import BytePermutation, byte_table
from lamina.errors import AnatomyError, LaminaError
from lamina.models import Transformer
from lamina.rewrite import PermuteVocabulary, history, rewrite

TABLE = [3, 1, 0, 2, 5, 4]
EXAMPLES = [Example("pass", "permute_vocabulary", options={"table": TABLE}, bad={"table": [0, 2]})]


def renumbered(ids, table):
    return torch.tensor([*table, *range(len(table), 32)])[ids]


@pytest.mark.parametrize("tie", [False, True])
def test_answers_to_renumbered_tokens_are_those_to_the_plain_ones_and_tied_logits_move_along(tie):
    torch.manual_seed(0)
    model = Transformer(2, 8, 2, vocabulary=32, context=8, tie=tie)
    ids = torch.randint(32, (2, 8))
    plain = model(ids)
    changed = rewrite(model, PermuteVocabulary(TABLE))
    found = changed(renumbered(ids, TABLE))
    # Row phi(b) of the logits is what row b was, where the head is tied.
    assert torch.equal(found[..., renumbered(torch.arange(32), TABLE)] if tie else found, plain)
    decision = history(changed)[0].decision
    assert decision == {"embedding": "embedding", "head": "head" if tie else None, "table": TABLE}


def test_a_masked_language_model_of_transformers_keeps_its_tie_its_bias_and_its_padding():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    ids = torch.randint(32, (2, 7))
    plain = model(ids).logits
    changed = rewrite(model, PermuteVocabulary(TABLE))
    found = changed(renumbered(ids, TABLE)).logits
    torch.testing.assert_close(found[..., renumbered(torch.arange(32), TABLE)], plain)
    words = changed.bert.embeddings.word_embeddings
    assert changed.cls.predictions.decoder.weight is words.weight
    assert changed.cls.predictions.bias is changed.cls.predictions.decoder.bias
    assert words.padding_idx == TABLE[0]


def test_there_and_back_is_the_identity_and_a_seed_is_the_table_of_the_transform():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(257, 3, padding_idx=256), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    there = rewrite(model, PermuteVocabulary(9))
    assert torch.equal(there[0].weight[byte_table(9)], before["0.weight"][:256])
    assert torch.equal(BytePermutation(9).table.long(), byte_table(9))
    assert there[0].padding_idx == 256
    back = rewrite(there, PermuteVocabulary(9, inverse=True))
    assert all(torch.equal(v, before[k]) for k, v in back.state_dict().items())


def test_training_goes_on_as_if_nothing_had_happened():
    """Adam's moments follow: the re-numbered run on re-numbered data has the very losses of the plain one."""

    def losses(rewritten):
        torch.manual_seed(0)
        model = Transformer(1, 8, 2, vocabulary=32, context=8, tie=False, classes=3, causal=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        found = []
        for step in range(6):
            if step == 3 and rewritten:
                model = rewrite(model, PermuteVocabulary(TABLE), optimizer=optimizer)
            ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(step))
            ids = renumbered(ids, TABLE) if step >= 3 and rewritten else ids
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(ids), ids[:, 0].new_tensor([0, 1, 2, 0]))
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(rewritten=True) == losses(rewritten=False)


def test_what_cannot_be_is_refused():
    for table in ([], [0, 0], [1, 2], [-1, 0]):
        with pytest.raises(LaminaError, match="once, got"):
            PermuteVocabulary(table)
    model, _ = llama()
    with pytest.raises(AnatomyError, match="32 rows, and 256 tokens"):
        rewrite(model, PermuteVocabulary(1))
    with pytest.raises(AnatomyError, match="no table that tokens are looked up in"):
        rewrite(nn.Linear(2, 2), PermuteVocabulary(TABLE))
    with pytest.raises(AnatomyError, match="is a Linear, no table of tokens"):
        rewrite(nn.Sequential(nn.Linear(2, 2)), PermuteVocabulary(TABLE, embedding="0"))
