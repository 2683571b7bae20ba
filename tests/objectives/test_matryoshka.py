"""Matryoshka: every size of a list from one forward pass; what it equals, where gradients go, what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.contract.foreign import HomeMade, llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lamina.errors import AnatomyError, LaminaError
from lamina.models import Transformer
from lamina.nn import cut_embedding
from lamina.objectives import Classification, CoSENT, EmbeddingClassification, InfoNCE, Matryoshka, MultipleNegatives
from lamina.objectives._exit_vectors import exit_vectors, exits_of
from lamina.objectives._sizes import default_pairs
from lamina.rewrite import Truncate, rewrite

transformers = pytest.importorskip("transformers")

PAIRS = [(1, 8), (2, 16), (4, 32)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 32, shape, generator=torch.Generator().manual_seed(seed))


def ours() -> nn.Module:
    torch.manual_seed(0)
    return Transformer(4, 32, 2, vocabulary=32, context=8, causal=False)


def pairs_of_texts() -> dict[str, Tensor]:
    mask = torch.ones(4, 2, 7, dtype=torch.long)
    mask[1, 0, 4:] = 0
    return {"input_ids": tokens(4, 2, 7), "attention_mask": mask, "label": torch.tensor([1.0, 3.0, 2.0, 5.0])}


EXAMPLES = [
    Example(
        "objective", "matryoshka", {"base": "cosent", "pairs": PAIRS}, model=ours, batch=pairs_of_texts,
        bad={"kl_weight": -1.0},
    )
]  # fmt: skip


def bert(depth: int = 4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=depth, num_attention_heads=2,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def texts(fields: int = 2) -> dict[str, Any]:
    batch = []
    for i in range(fields):
        mask = torch.ones(4, 5 + i, dtype=torch.long)
        mask[1, 3:] = 0
        batch.append({"input_ids": tokens(4, 5 + i, seed=i), "attention_mask": mask})
    return {"texts": batch, "label": torch.tensor([1.0, 3.0, 2.0, 5.0])}


def embedded(model: nn.Module, text: dict[str, Tensor], layers: int, width: int) -> Tensor:
    """By Hugging Face's own hidden states, and a loop."""
    hidden = model(**text, output_hidden_states=True).hidden_states[layers]
    rows = [row[mask.bool()].mean(0)[:width] for row, mask in zip(hidden, text["attention_mask"], strict=True)]
    return torch.stack([row / row.norm() for row in rows])


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_the_whole_model_alone_is_the_base_loss_on_it_with_its_gradients():
    model, batch = bert(), texts(3)
    found = Matryoshka(MultipleNegatives(), [(4, 32)], kl=None)(model, batch)["loss"]
    e = [embedded(model, t, 4, 32) for t in batch["texts"]]
    expected = MultipleNegatives().loss({"embeddings": e}, batch)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    wanted = gradients(model, expected)
    for name, grad in gradients(model, found).items():
        assert grad is not None
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-6)


def test_the_sum_over_sizes_and_the_divergence_of_scores_by_hand():
    model, batch = bert(), texts(3)
    found = Matryoshka("multiple_negatives", PAIRS, kl_weight=0.5, weights=[1.0, 2.0, 3.0])(model, batch)
    base: list[Tensor] = []
    scored: list[Tensor] = []
    for n, d in PAIRS:
        e = [embedded(model, t, n, d) for t in batch["texts"]]
        base.append(MultipleNegatives().loss({"embeddings": e}, {})["loss"])
        scored.append(20 * e[0] @ torch.cat(e[1:]).T)
    goal = scored[-1].softmax(-1)
    kl = [(goal * (goal.log() - s.log_softmax(-1))).sum(-1).mean() for s in scored[:-1]]
    total = base[0] + 2 * base[1] + 3 * base[2] + 0.5 * (kl[0] + kl[1])
    torch.testing.assert_close(found["loss"], total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["loss/2x16"], base[1].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["kl/1x8"], kl[0].detach(), rtol=1e-5, atol=1e-5)
    assert found["count"] == 4
    assert "kl/4x32" not in found
    with pytest.raises(LaminaError, match=r"matryoshka needs the model"):
        Matryoshka(pairs=PAIRS).loss(None, batch)


def test_coordinates_are_the_official_one_liner():
    model, batch = bert(), texts()
    given = {"pairs": PAIRS, "kl": "coordinates", "detach": False}
    found = Matryoshka(CoSENT(), **given)(model, batch)  # type: ignore[arg-type]
    hidden = [model(**t, output_hidden_states=True).hidden_states for t in batch["texts"]]

    def pooled(layer: int) -> Tensor:
        masks = [t["attention_mask"][..., None] for t in batch["texts"]]
        return torch.cat([(h[layer] * m).sum(1) / m.sum(1) for h, m in zip(hidden, masks, strict=True)])

    for n, d in PAIRS[:-1]:
        line = 0.3 * F.kl_div(F.log_softmax(pooled(n)[:, :d], dim=-1), F.softmax(pooled(4)[:, :d], dim=-1), reduction="batchmean")  # fmt: skip  # noqa: E501
        torch.testing.assert_close(found[f"kl/{n}x{d}"], line.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kl", ["scores", "coordinates"])
def test_a_detached_goal_teaches_the_last_layer_nothing(kl):
    model, batch = bert(), texts()
    last = [n for n, _ in model.named_parameters() if n.startswith("encoder.layer.3")]
    for detach in (True, False):
        whole = Matryoshka(CoSENT(), PAIRS, kl=kl, detach=detach)
        without = Matryoshka(CoSENT(), PAIRS, kl=None)
        one, two = (gradients(model, o(model, batch)["loss"]) for o in (whole, without))
        same = all(torch.allclose(one[n], two[n], rtol=1e-5, atol=1e-7) for n in last)  # type: ignore[arg-type]
        assert same == detach


def test_a_small_size_trains_its_layers_and_all_of_their_width():
    model = bert()
    with pytest.warns(UserWarning, match=r"the largest size is \(2, 8\), and the whole model, \(4, 32\), is not train"):
        loss = Matryoshka(CoSENT(), [(2, 8)])(model, texts())["loss"]
    found = gradients(model, loss)
    assert all(found[n] is None for n in found if n.startswith(("encoder.layer.2", "encoder.layer.3")))
    rows = found["encoder.layer.1.output.dense.weight"]
    # Beyond the cut, by the layer norm alone.
    assert rows is not None
    assert rows[:8].abs().sum() > rows[8:].abs().sum() > 0
    first = found["encoder.layer.1.output.LayerNorm.weight"]
    assert first is not None
    assert first[:8].any()
    assert not first[8:].any()


def test_one_forward_pass_a_text_whatever_the_number_of_sizes():
    model, calls = bert(), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    Matryoshka(pairs=[(1, 8), (2, 8), (3, 16), (4, 32)])(model, texts(3))
    assert len(calls) == 3
    both = pairs_of_texts()
    Matryoshka(CoSENT(), PAIRS)(model, both)
    assert len(calls) == 4
    handle.remove()
    listed = {"texts": [{k: both[k][:, i] for k in ("input_ids", "attention_mask")} for i in (0, 1)], "label": both["label"]}  # fmt: skip  # noqa: E501
    one, two = (Matryoshka(CoSENT(), PAIRS)(model, b)["loss"] for b in (both, listed))
    torch.testing.assert_close(one, two)


def test_the_order_of_sizes_is_irrelevant_and_the_generic_list_fits_any_depth():
    model, batch = bert(), texts()
    one, two = (Matryoshka(CoSENT(), p, weights=w)(model, batch)["loss"] for p, w in ((PAIRS, [1, 2, 3]), (PAIRS[::-1], [3, 2, 1])))  # fmt: skip  # noqa: E501
    torch.testing.assert_close(one, two)
    assert default_pairs(12, 768) == [(2, 24), (4, 48), (6, 96), (8, 192), (10, 384), (12, 768)]
    assert default_pairs(6, 384)[0] == (1, 16)
    assert default_pairs(2, 20) == [(1, 16), (2, 20)]
    for depth in range(1, 30):
        found = default_pairs(depth, 100)
        assert found[-1] == (depth, 100)
        assert len({n for n, _ in found}) == len(found) == min(depth, 6)
    assert "loss/4x32" in Matryoshka(CoSENT())(model, batch)


def test_two_dimensional_matryoshka_is_two_layers_at_all_widths():
    model, batch = bert().eval(), texts()
    objective = Matryoshka(CoSENT(), PAIRS, select="random", kl=None, seed=3)
    drawn = objective._drawn(4, training=False)[0]
    found = objective(model, batch)
    expected = sum(
        CoSENT().loss({"embeddings": [embedded(model, t, n, d) for t in batch["texts"]]}, batch)["loss"]
        for n in (drawn, 4)
        for _, d in PAIRS
    )
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # Importing their library takes seconds.
def test_two_dimensional_matryoshka_equals_that_of_sentence_transformers(monkeypatch):
    theirs = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules.pooling")
    modules = pytest.importorskip("sentence_transformers.base.modules")
    import random

    model, batch = bert(), texts()

    class Trunk(modules.Transformer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.auto_model = model

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            found = self.auto_model(**{k: features[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)  # fmt: skip  # noqa: E501
            # Layers 1..L; their class lists the embeddings as well.
            features |= {"token_embeddings": found[0], "all_layer_embeddings": found.hidden_states[1:]}
            return features

    wrapped = sentence_transformers.SentenceTransformer(modules=[Trunk(), pooling.Pooling(32, "mean")], device="cpu")
    objective = Matryoshka(CoSENT(), PAIRS, select="random", kl="coordinates", seed=3)
    drawn = objective._drawn(4, training=False)[0]
    monkeypatch.setattr(random, "sample", lambda layers, k: [drawn - 1])
    loss = theirs.Matryoshka2dLoss(wrapped, theirs.CoSENTLoss(wrapped), [32, 16, 8], n_dims_per_step=-1)
    expected = loss([dict(t) for t in batch["texts"]], batch["label"])
    torch.testing.assert_close(objective(model.eval(), batch)["loss"], expected, rtol=1e-5, atol=1e-5)


def test_layers_drawn_are_in_the_state_and_the_same_in_every_evaluation():
    model, batch = bert(), texts()
    one, two = (Matryoshka(CoSENT(), PAIRS, select="random", seed=1) for _ in range(2))
    seen = [one._drawn(9, training=True)[0] for _ in range(40)]
    assert set(seen) == set(range(1, 9))
    two.load_state_dict(one.state_dict())
    assert [one._drawn(9, training=True) for _ in range(9)] == [two._drawn(9, training=True) for _ in range(9)]
    assert len({tuple(one._drawn(9, training=False)) for _ in range(9)}) == 1
    model.eval()
    assert one(model, batch)["loss"] == Matryoshka(CoSENT(), PAIRS, select="random", seed=1)(model, batch)["loss"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_under_a_checkpoint(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.attend, self.ln_a, self.ln_b, self.net = block.attend, block.ln_a, block.ln_b, block.net

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(self.ln_a(x))
            return x + self.net(self.ln_b(x))

    class Home(HomeMade):
        def forward(self, x: Tensor) -> Tensor:
            x = self.read(x)[0]
            for block in self.stack:
                x = checkpoint(block, x, use_reentrant=reentrant)  # type: ignore[assignment]
            return self.norm(x)

    torch.manual_seed(0)
    plain = HomeMade()
    made = Home()
    made.stack = nn.Sequential(*(Checkpointed(b) for b in copy.deepcopy(plain.stack)))
    made.load_state_dict(plain.state_dict())
    batch = {"inputs": torch.randn(5, 7, 5), "labels": torch.tensor([0, 1, 2, 1, 0])}
    objective = Matryoshka(EmbeddingClassification(3, [8, 16]), [(2, 8), (4, 16)])
    if reentrant:
        with pytest.raises(LaminaError, match=r"run without gradients .*use_reentrant=False"):
            objective(made, batch)
        return
    one, two = (gradients(m, objective(m, batch)["loss"]) for m in (plain, made))
    torch.testing.assert_close(two["stack.1.net.0.weight"], one["stack.1.net.0.weight"])


def test_images_single_fields_decoders_and_shared_blocks():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=2
    )
    vit = transformers.ViTModel(config, add_pooling_layer=False)
    batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 1, 1])}
    objective = Matryoshka(EmbeddingClassification(2, [8, 16]), [(1, 8), (2, 16)], "cls")
    found = objective(vit, batch)
    found["loss"].backward()
    assert found["kl/1x8"] > 0
    assert all(p.grad is not None for p in objective.parameters())
    vectors = exit_vectors(vit, batch, exits_of(vit), [1, 2], "cls")
    torch.testing.assert_close(vectors[2], vit(batch["pixel_values"]).last_hidden_state[:, 0])
    decoder, given = llama()
    vectors = exit_vectors(decoder, given, exits_of(decoder), [4], "last")
    torch.testing.assert_close(vectors[4], decoder.model(**given).last_hidden_state[:, -1])
    config = transformers.AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2,
    )  # fmt: skip
    albert = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    given = {"input_ids": tokens(2, 5)}
    vectors = exit_vectors(albert, given, exits_of(albert), [1, 3], "mean")
    states = albert(**given, output_hidden_states=True).hidden_states
    torch.testing.assert_close(vectors[1], states[1].mean(1))
    torch.testing.assert_close(vectors[3], states[3].mean(1))


def test_without_gradients_streams_are_pooled_as_they_come():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList(HomeMade().stack)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.stack:
                x = block(x)
                x.mul_(1.0)
                x.add_(1.0)
            return x

    model, x = InPlace(), torch.randn(2, 3, 16)
    with torch.no_grad():
        found = exit_vectors(model, {"x": x}, exits_of(model), [1], "mean")[1]
        torch.testing.assert_close(found, model.stack[0](x).mean(1))
    with pytest.raises(LaminaError, match=r"what block 1 of stack gives is changed in place by a later one"):
        exit_vectors(model, {"x": x}, exits_of(model), [1], "mean")


def test_a_truncated_model_is_measured_at_the_sizes_it_still_has():
    model, batch = bert(), pairs_of_texts()
    whole = Matryoshka(CoSENT(), PAIRS, kl=None)(model, batch)
    small = rewrite(model, Truncate(2, 16))
    found = Matryoshka(CoSENT(), PAIRS, kl=None)(small, batch)
    assert set(found) == {"loss", "count", "loss/1x8", "loss/2x16"}
    torch.testing.assert_close(found["loss/2x16"], whole["loss/2x16"])
    with pytest.raises(LaminaError, match=r"none of the sizes \[\(3, 32\)\] is left in a model of 2 layers"):
        Matryoshka(CoSENT(), [(3, 32)])(small, batch)


def test_an_empty_text_gives_zeros_and_no_nan():
    model, batch = bert(), texts()
    batch["texts"][0]["attention_mask"][2] = 0
    loss = Matryoshka(InfoNCE(), PAIRS)(model, batch)["loss"]
    assert loss.isfinite()
    assert all(g is None or g.isfinite().all() for g in gradients(model, loss).values())
    assert not cut_embedding(torch.zeros(2, 4), 3).any()


def test_peak_memory_hardly_grows_with_the_sizes():
    """What is kept for the backward pass, counted by its storages."""

    def kept(pairs: list[tuple[int, int]]) -> int:
        storages: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        model = bert(6)
        batch = {"texts": [{"input_ids": tokens(8, 16, seed=i), "attention_mask": torch.ones(8, 16)} for i in (0, 1)]}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            alive = Matryoshka(pairs=pairs)(model, batch)
        assert alive["loss"].requires_grad
        return sum(storages.values())

    assert kept([(1, 8), (2, 8), (3, 16), (4, 16), (5, 32), (6, 32)]) <= 1.2 * kept([(6, 32)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pairs": [(1, 8), (1, 8), (4, 32)]}, r"pairs names the size \(1, 8\) twice"),
        ({"pairs": [(1, 16), (2, 8)]}, r"pairs must grow in both, and \(1, 16\) is followed by \(2, 8\)"),
        ({"pairs": [(2, 8), (2, 16)]}, r"pairs must grow in both"),
        ({"pairs": [(0, 8)]}, r"two whole numbers from 1 on, got \(0, 8\)"),
        ({"pairs": []}, r"pairs names no size"),
        ({"pairs": [(5, 32)]}, r"pairs names the size \(5, 32\), and encoder.layer has 4 layers of width 32"),
        ({"pairs": [(4, 33)]}, r"4 layers of width 32"),
        ({"pairs": PAIRS, "weights": [1.0]}, r"weights are numbers from 0 on, one a pair"),
        ({"kl": "score"}, r"kl is 'scores', 'coordinates' or None"),
        ({"select": "some"}, r"select 'all' or 'random'"),
        ({"pool": "max"}, r"pool must be one of mean, cls, last"),
        ({"temperature": 0.0}, r"temperature above 0"),
        ({"base": Matryoshka()}, r"the base Matryoshka calls the model itself; matryoshka hands it embeddings"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(LaminaError, match=sentence):
        Matryoshka(**{"base": CoSENT(), **options})(bert(), texts())


def test_bad_models_and_batches_are_refused():
    with pytest.raises(AnatomyError, match=r"found no repeated blocks"):
        Matryoshka(CoSENT())(nn.Linear(4, 4), {"inputs": torch.zeros(2, 4)})
    batch = {"input_ids": tokens(2, 2, 5), "label": torch.zeros(2)}
    batch["input_ids"][0, 0, 3:] = 0
    with pytest.raises(LaminaError, match=r"has padding \(token 0\) and no attention_mask"):
        Matryoshka(CoSENT(), PAIRS)(bert(), batch)
    with pytest.raises(TypeError, match=r"cannot find the prediction in a dict"):
        Matryoshka(Classification(), PAIRS)(bert(), texts())
