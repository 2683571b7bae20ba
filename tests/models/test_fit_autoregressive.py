from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from tests.contract.example import Example
from tests.models import fit_reference as reference
from tests.models.fit_reference import lively
from torch import Tensor, nn

from lamina import io
from lamina.errors import RecipeError, ShapeError
from lamina.models import FITAutoregressive, parse_layers
from lamina.models.fit import interleaved
from lamina.objectives import NextToken
from lamina.rewrite import DropAttention, Replace, rewrite

SIZES: dict[str, Any] = {
    "layers": "(1)1(2)1(1)", "tokens_per_group": 5, "groups": 4, "latents_per_group": 2,
    "token_width": 8, "latent_width": 12, "token_heads": 2, "latent_heads": 4, "vocabulary": 11,
}  # fmt: skip


def ids(rows: int = 2, length: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "model",
        "fit_autoregressive",
        SIZES | {"layers": "(1)1(1)"},
        batch=lambda: {"input_ids": ids()},
        bad={"layers": "(1)1(1)1"},
    ),
]


def make(**options: Any) -> FITAutoregressive:
    torch.manual_seed(0)
    return FITAutoregressive(**(SIZES | options)).eval()


def expected(model: FITAutoregressive, tokens: Tensor) -> Tensor:
    """Logits by the reference, example by example."""
    state, options = dict(model.state_dict(keep_vars=True)), SIZES | model.lamina_node
    n, m = options["tokens_per_group"], options["latents_per_group"]
    found = []
    for row in tokens:
        groups = [state["embedding.weight"][part] + state["positions.table"] for part in row.split(n)]
        latents = list(state["trunk.table"].split(m))[: len(groups)]
        ends, _ = reference.trunk(
            state, parse_layers(options["layers"]), groups, latents,
            (options["token_heads"], options["latent_heads"]), causal_tokens=True, causal_latents=True,
        )  # fmt: skip
        y = reference.norm(state, "token_norm", torch.cat(ends))
        found.append(y @ state["embedding.weight"].T + state["head.bias"])
    return torch.stack(found)


@pytest.mark.parametrize(
    "options",
    [{}, {"tokens_per_group": 1, "groups": 20}, {"latents_per_group": 1, "positions": "sincos"},
     {"tokens_per_group": 63, "groups": 2}, {"token_width": 16}],
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_card_written_out(options: dict[str, Any]) -> None:
    model = lively(make(**options))
    x = ids(2, model.context)
    found, wanted = model(x), expected(model, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((y * weight).sum(), [*model.parameters()]) for y in (found, wanted)]
    for (name, _), a, b in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-3, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def influence(model: FITAutoregressive) -> Tensor:
    """(to, from): whether the logits at a position change when the token at another one does."""
    x = ids(1)
    with torch.no_grad():
        changed = torch.cat([x.where(torch.arange(20) != j, (x + 1) % 11) for j in range(20)])
        return ((model(changed) - model(x)).abs().amax(-1) > 0).T


def test_no_token_sees_a_later_one_and_each_sees_every_earlier_group() -> None:
    found, place = influence(lively(make())), torch.arange(20)
    assert torch.equal(found, place[:, None] >= place)


def test_without_the_shift_of_latents_tokens_do_see_later_ones() -> None:
    with mock.patch.object(interleaved, "shift_latents", lambda latents: latents):
        found = influence(lively(make()))
    assert found.triu(1).any()
    assert found.tril().sum() == 210


def test_generation_from_a_cache_is_generation_without() -> None:
    model = lively(make())
    for length in (1, 5, 13):
        x = ids(2, length, seed=length)
        assert model.caches
        found = model.generate(x, 20 - length, 0.7, torch.Generator().manual_seed(1))
        with mock.patch.object(FITAutoregressive, "caches", False):
            plain = model.generate(x, 20 - length, 0.7, torch.Generator().manual_seed(1))
        assert torch.equal(found, plain)
        assert torch.equal(found[:, :length], x)
    greedy = model.generate(x, 7, temperature=0)
    assert torch.equal(model(greedy).argmax(-1)[:, 12:-1], greedy[:, 13:])


def test_a_cache_sees_each_token_once() -> None:
    model, lengths = make(), []
    with mock.patch.object(type(model.trunk.blocks[0].local[0]), "forward", autospec=True) as forward:
        forward.side_effect = lambda self, x, **context: lengths.append(x.shape[1]) or x
        model.generate(ids(2, 7), 6)
    # Four local layers see 12 tokens; two latent layers the latents of the two finished groups.
    assert sum(lengths) == 4 * 12 + 2 * 2 * 2


def test_latents_are_begun_once_a_group_and_not_once_a_token() -> None:
    model = make()
    with mock.patch.object(type(model.trunk), "start", autospec=True, side_effect=type(model.trunk).start) as start:
        model.generate(ids(2, 7), 6)
    # What the first group reads in two blocks, and where the latents of two finished groups start.
    assert start.call_count == 2 + 2


def test_layers_without_a_cache_generate_all_the_same() -> None:
    def own(width: int) -> nn.Module:
        return nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)

    model, plain = make(token_layer=own, latent_layer=own), ids(2, 3)
    assert not model.caches
    greedy = model.generate(plain, 10, temperature=0)
    assert torch.equal(model._logits(greedy).argmax(-1)[:, 2:-1], greedy[:, 3:])
    assert torch.equal(influence(lively(model)).triu(1), torch.zeros(20, 20, dtype=torch.bool))


def test_any_length_with_padding_and_fewer_groups_without() -> None:
    model = lively(make())
    x = ids()
    torch.testing.assert_close(model(x[:, :10]), model(x)[:, :10])
    torch.testing.assert_close(lively(make(pad_groups=True))(x[:, :13]), model(x)[:, :13])


def test_next_token_is_the_objective_and_generation_goes_on_as_learned() -> None:
    """A cycle, by heart; and no option moves the logits away from the labels of that objective."""
    torch.manual_seed(0)
    model = FITAutoregressive(**(SIZES | {"layers": "(1)1(1)"}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(50):
        x = (torch.arange(20) + torch.arange(step, step + 4)[:, None]) % 11
        optimizer.zero_grad()
        loss = NextToken()(model, {"input_ids": x})["loss"]
        loss.backward()
        optimizer.step()
    # Chance is 2.4.
    assert float(loss.detach()) < 0.7
    assert torch.equal(model.eval().generate(x[:, :12], 5, temperature=0), x[:, :17])
    with pytest.raises(TypeError, match="start_token"):
        make(start_token=0)


def test_its_head_is_the_embedding_and_can_be_another(tmp_path: Any) -> None:
    model = lively(make())
    assert model.head.weight is model.embedding.weight
    assert model.to("meta").head.weight is model.embedding.weight
    model = lively(make())
    rewrite(model, Replace("head", "fourier_head", options={"num_frequencies": 3}))
    x = ids()
    assert model(x).shape == (2, 20, 11)
    assert model.generate(x[:, :4], 3).shape == (2, 7)
    io.save(model, tmp_path / "saved")
    assert torch.equal(io.load(tmp_path / "saved")(x), model(x))
    assert make(head={"name": "fourier_head", "num_frequencies": 3}).head is not None


def test_a_dropped_attention_leaves_generation_as_it_is() -> None:
    model, x = lively(make(layers="(3)1(3)")), ids()
    rewrite(model, DropAttention(count=2, trunk="trunk.blocks.1.local"), data=[{"input_ids": x}])
    found = model.generate(x[:, :3], 12, temperature=0)
    assert torch.equal(model._logits(found).argmax(-1)[:, 2:-1], found[:, 3:])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": "(1)1(1)1"}, RecipeError, "end with local ones"),
        ({"layers": "(3)"}, RecipeError, "must have global layers"),
        ({"vocabulary": 0}, ShapeError, "vocabulary must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_bad_tokens_and_lengths_are_refused() -> None:
    model = make()
    for length, words in ((13, "no whole groups of 5"), (3, "no whole groups of 5"), (25, "25 tokens, .* is 20")):
        with pytest.raises(ShapeError, match=words):
            model(ids(2, length))
    with pytest.raises(ShapeError, match=r"expected token ids \(batch, tokens\), got torch.float32"):
        model(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match="18 tokens and 3 steps do not fit the context of 20"):
        model.generate(ids(2, 18), 3)
    with pytest.raises(ShapeError, match="at least one token"):
        model.generate(ids(2, 0), 3)
    with pytest.raises(ValueError, match="must not be negative"):
        model.generate(ids(2, 5), -1)
