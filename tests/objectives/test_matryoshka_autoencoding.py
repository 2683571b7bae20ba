"""Masked autoencoding at every size: masks by row and step, the head on few numbers, the decoder layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import AnatomyError, LaminaError
from lamina.models import Transformer
from lamina.objectives import MatryoshkaAutoencoding, continuing_tokens
from lamina.objectives._exit_vectors import exits_of
from lamina.objectives._word_masks import draws
from lamina.objectives.matryoshka_autoencoding import Head

transformers = pytest.importorskip("transformers")

PAIRS = [(1, 8), (2, 16)]
SPECIAL, CONTINUES = [0, 1, 2], list(range(40, 64))


def tokens(rows: int = 4, length: int = 9, seed: int = 0) -> Tensor:
    ids = torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


def ours() -> nn.Module:
    torch.manual_seed(0)
    return Transformer(2, 16, 2, vocabulary=64, context=12, causal=False)


EXAMPLES = [
    Example(
        "objective",
        "matryoshka_autoencoding",
        {"model": ours(), "mask_token": 3, "vocabulary": 64, "pairs": PAIRS, "special": SPECIAL},
        model=ours,
        batch=lambda: {"input_ids": tokens()},
        bad={"encoder_mask": 0.6},
    )
]


def lm(kind: str = "Bert") -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForMaskedLM")(config)


def objective(model: nn.Module, **options: Any) -> MatryoshkaAutoencoding:
    given = {"mask_token": 3, "vocabulary": 64, "pairs": PAIRS, "special": SPECIAL, "continues": CONTINUES}
    return MatryoshkaAutoencoding(model, **{**given, **options})


@pytest.mark.parametrize("make", [lm, lambda: lm("Roberta"), ours])
def test_the_head_on_few_numbers_is_the_whole_head_with_zeros_behind_them(make):
    model = make()
    head = Head(model, exits_of(model))
    x = torch.randn(3, 5, 16)
    whole = F.pad(x[..., :8], (0, 8))
    with torch.no_grad():
        torch.testing.assert_close(head.logits(x, 8), head.module(whole), rtol=1e-6, atol=1e-6)
        assert head.transform(x[:, 0], 8).shape == (3, 16)
        if hasattr(model, "cls"):
            torch.testing.assert_close(head.transform(x[:, 0], 8), model.cls.predictions.transform(whole[:, 0]))
        if hasattr(model, "lm_head"):
            expected = model.lm_head.layer_norm(F.gelu(model.lm_head.dense(whole[:, 0])))
            torch.testing.assert_close(head.transform(x[:, 0], 8), expected)


def test_the_loss_equals_the_parts_by_hand():
    model = lm()
    made, batch = objective(model), {"input_ids": tokens()}
    found = made(model, batch)
    fresh = objective(model)
    seen, heard = fresh.hidden(batch)
    states = model.bert(seen.input_ids, output_hidden_states=True).hidden_states
    embedded = model.bert.embeddings(heard.input_ids)
    predictions = model.cls.predictions
    total = []
    for n, d in PAIRS:
        cut = F.pad(states[n][..., :d], (0, 16 - d))
        mlm = F.cross_entropy(model.cls(cut).flatten(0, 1), seen.labels.flatten())
        sentence = predictions.transform(cut[:, 0])
        restored = fresh.decoder(torch.cat([sentence[:, None], embedded[:, 1:]], 1))
        mae = F.cross_entropy(model.cls(restored).flatten(0, 1), heard.labels.flatten())
        torch.testing.assert_close(found[f"mlm/{n}x{d}"], mlm.detach())
        torch.testing.assert_close(found[f"mae/{n}x{d}"], mae.detach())
        total.append((mlm + mae) / 2)
    torch.testing.assert_close(found["loss"], torch.stack(total).mean())
    assert found["count"] == (seen.labels != -100).sum()


def test_the_first_token_of_every_size_learns_to_carry_the_sentence():
    model = lm()
    made = objective(model)
    assert torch.equal(made.decoder.output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    assert made.decoder.output.dense.weight is not model.bert.encoder.layer[0].output.dense.weight
    assert {id(p) for p in made.parameters()} == {id(p) for p in made.decoder.parameters()}
    optimizer = torch.optim.Adam([*model.parameters(), *made.parameters()], lr=1e-2)
    batch = {"input_ids": tokens(8)}
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(made(model, batch))
        losses[-1]["loss"].backward()
        optimizer.step()
    assert all(p.grad is not None for p in made.parameters())
    for name in ("mlm/1x8", "mae/1x8", "mlm/2x16", "mae/2x16"):
        assert losses[-1][name] < losses[0][name] - 0.1


def test_whole_words_are_hidden_and_the_decoder_misses_what_the_encoder_misses():
    made = objective(ours(), encoder_mask=0.3, decoder_mask=0.6)
    ids = tokens(200, 12)
    ids[:, 3:6] = torch.tensor([20, 45, 50])
    ids[:, 10:] = 0
    mask = (torch.arange(12) < 10).long().expand(200, 12)
    seen, heard = made.hidden({"input_ids": ids, "attention_mask": mask})
    one, two = seen.labels != -100, heard.labels != -100
    assert (one <= two).all()
    assert not one[:, 0].any()
    assert not two[:, 10:].any()
    for chosen in (one, two):
        assert (chosen[:, 3:6].sum(1) % 3 == 0).all()
        assert chosen[:, 3].any()
        assert (chosen.sum(1) >= 1).all()
    # Nine may be hidden: at most round(0.3 * 9) = 3 and round(0.6 * 9) = 5, and seldom much fewer.
    assert one.sum(1).max() == 3
    assert two.sum(1).max() == 5
    assert two.float().sum(1).mean() > 4
    kinds = seen.input_ids[one]
    assert (kinds == 3).float().mean() == pytest.approx(0.8, abs=0.05)
    assert (kinds == ids[one]).float().mean() == pytest.approx(0.1, abs=0.05)
    assert torch.equal(seen.input_ids[~one], ids[~one])


def test_masks_hang_on_the_row_and_the_step_alone():
    made = objective(ours())
    ids = tokens(6)
    whole = made.hidden({"input_ids": ids})[0].input_ids
    assert torch.equal(made.hidden({"input_ids": ids[2:5]})[0].input_ids, whole[2:5])
    longer = F.pad(ids, (0, 3))
    mask = F.pad(torch.ones_like(ids), (0, 3))
    assert torch.equal(made.hidden({"input_ids": longer, "attention_mask": mask})[0].input_ids[:, :9], whole)
    assert not torch.equal(objective(ours(), seed=1).hidden({"input_ids": ids})[0].input_ids, whole)
    model, batch = ours(), {"input_ids": ids}
    one, two = made(model, batch)["loss"], made(model, batch)["loss"]
    assert one != two
    again = objective(ours())
    again.load_state_dict(made.state_dict())
    assert again.steps == 2
    torch.testing.assert_close(again(model, batch)["loss"], made(model, batch)["loss"])
    model.eval()
    assert made(model, batch)["loss"] == made(model, batch)["loss"]
    assert made.steps == 3


def test_draws_are_uniform_and_unrelated():
    drawn = draws(torch.randint(0, 30000, (2000, 40), generator=torch.Generator().manual_seed(0)), torch.ones(2000, 40, dtype=torch.bool), 0, 0)  # fmt: skip  # noqa: E501
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.005)
    assert drawn.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 0.12
    assert 0 <= drawn.min() < drawn.max() < 1


def test_tokens_that_go_on_with_a_word_are_listed():
    class Tokenizer:
        all_special_ids = (0,)

        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {w: i for i, w in enumerate(self.words)}

    assert continuing_tokens(Tokenizer("[PAD]", "a", "##b", "c")) == [2]
    assert continuing_tokens(Tokenizer("<s>", "Ġa", "b", "Ġc")) == [2]
    assert continuing_tokens(Tokenizer("<s>", "▁a", "▁b", "c")) == [3]


def test_bad_input_is_refused_in_a_sentence():
    model = ours()
    with pytest.raises(LaminaError, match=r"0 < encoder <= decoder <= 1, got 0.5 and 0.4"):
        objective(model, encoder_mask=0.5)
    with pytest.raises(LaminaError, match=r"mask_token must be an id below vocabulary=64, got 64"):
        objective(model, mask_token=64)
    with pytest.raises(LaminaError, match=r"twice"):
        objective(model, pairs=[(1, 8), (1, 8)])
    with pytest.raises(AnatomyError, match=r"BertModel has no head over a vocabulary"):
        objective(lm().bert)
    with pytest.raises(LaminaError, match=r"needs 'input_ids' in the batch"):
        objective(model)(model, {"inputs": torch.zeros(2, 3)})
    with pytest.raises(LaminaError, match=r"needs the model: call the objective, not its loss"):
        objective(model).loss(None, {})
    assert copy.deepcopy(objective(model)).mask_token == 3
