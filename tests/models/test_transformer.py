from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.batches import call
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models.transformer import Transformer, TransformerBlock, sample
from lamina.nn.attention import KeyValueCache


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(32, shape, generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "model",
        "transformer",
        options={"depth": 2, "width": 16, "heads": 2, "vocabulary": 32, "context": 12},
        batch=lambda: {"input_ids": tokens(2, 8), "labels": tokens(2, 8, seed=1)},
        bad={"heads": 3},
    ),
    Example(
        "model",
        "transformer",
        options={
            "depth": 2,
            "width": 16,
            "heads": 4,
            "kv_heads": 2,
            "vocabulary": 32,
            "context": 12,
            "causal": False,
            "position": "learned",
            "feed_forward": "swiglu",
            "classes": 3,
        },
        batch=lambda: {"input_ids": tokens(2, 8), "labels": torch.tensor([0, 2])},
        bad={"position": "rotory"},
    ),
]


def make(seed: int = 0, **options: object) -> Transformer:
    torch.manual_seed(seed)
    chosen = {"depth": 3, "width": 16, "heads": 4, "vocabulary": 32, "context": 16} | options
    return Transformer(**chosen).eval()  # type: ignore[arg-type]


class Nothing(nn.Module):
    """What a dropped sublayer leaves behind: any arguments in, a zero out."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros(())


def drop_mixer(model: Transformer, index: int) -> None:
    model.blocks[index].norm1 = nn.Identity()
    model.blocks[index].mixer = Nothing()


def naive_forward(model: Transformer, input_ids: Tensor) -> Tensor:
    """The model written out once more with explicit loops over heads, from its weights alone."""
    length = input_ids.shape[1]
    x = model.embedding.weight[input_ids] + model.position_embedding.weight[:length]
    for block in model.blocks:
        n1, n2, a, f = block.norm1, block.norm2, block.mixer, block.feed_forward
        h = F.layer_norm(x, n1.weight.shape, n1.weight, n1.bias)
        parts = []
        size = a.head_width
        for head in range(a.heads):
            mine = slice(head * size, (head + 1) * size)
            shared = head // (a.heads // a.kv_heads)
            theirs = slice(shared * size, (shared + 1) * size)
            q, k, v = h @ a.query.weight[mine].T, h @ a.key.weight[theirs].T, h @ a.value.weight[theirs].T
            scores = q @ k.transpose(1, 2) / math.sqrt(size)
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            parts.append(scores.softmax(-1) @ v)
        x = x + torch.cat(parts, -1) @ a.out.weight.T
        h = F.layer_norm(x, n2.weight.shape, n2.weight, n2.bias)
        x = x + F.gelu(h @ f.up.weight.T + f.up.bias) @ f.down.weight.T + f.down.bias
    x = F.layer_norm(x, model.final_norm.weight.shape, model.final_norm.weight, model.final_norm.bias)
    return x @ model.embedding.weight.T


@pytest.mark.parametrize(("length", "kv_heads"), [(1, None), (7, None), (13, 2)])
def test_outputs_and_gradients_are_those_of_the_model_written_out(length: int, kv_heads: int | None) -> None:
    model = make(position="learned", kv_heads=kv_heads).double()
    for parameter in model.parameters():  # away from the initialisation, where residual branches hardly speak
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = tokens(2, length)
    ours, theirs = model(ids), naive_forward(model, ids)
    assert torch.allclose(ours, theirs, atol=1e-10)
    names = [n for n, _ in model.named_parameters()]
    weight = torch.randn(ours.shape, dtype=torch.float64)
    got = torch.autograd.grad((ours * weight).sum(), model.parameters())
    want = torch.autograd.grad((theirs * weight).sum(), model.parameters())
    for name, g, w in zip(names, got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-9), name


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 15), st.sampled_from(["rotary", "learned", "none"]))
def test_future_tokens_do_not_change_the_past(cut: int, position: str) -> None:
    model = make(position=position)
    ids = tokens(1, 16)
    other = ids.clone()
    other[:, cut:] = (other[:, cut:] + 1) % 32
    assert torch.equal(model(ids)[:, :cut], model(other)[:, :cut])
    assert not torch.allclose(model(ids)[:, cut:], model(other)[:, cut:])


@pytest.mark.parametrize("position", ["rotary", "learned", "none"])
@pytest.mark.parametrize("dropped", [(), (0,), (1,), (0, 1, 2)])
def test_cached_generation_is_full_recomputation(position: str, dropped: tuple[int, ...]) -> None:
    model = make(position=position, kv_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    for index in dropped:
        drop_mixer(model, index)
    prompt = tokens(2, 5)
    made = model.generate(prompt, steps=9, temperature=0)
    slow = prompt
    for _ in range(9):
        slow = torch.cat((slow, model(slow)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(made, slow)
    cache = KeyValueCache()
    pieces = [model(piece, cache=cache) for piece in made.split([4, 1, 6, 3], dim=1)]
    assert torch.allclose(torch.cat(pieces, 1), model(made), atol=1e-5)
    assert cache.length == 14
    assert len(cache.slots) == 3 - len(dropped)


def test_cached_generation_when_whole_blocks_are_gone_or_strange() -> None:
    class Around(nn.Module):
        """A block of somebody else's, that says nothing about caches."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, **context: Tensor) -> Tensor:
            return self.block(x, **context)

    model, prompt = make(), tokens(1, 4)
    del model.blocks[0]
    made = model.generate(prompt, 6, temperature=0)
    assert model.caches
    model.blocks[0] = Around(model.blocks[0])
    assert not model.caches
    assert torch.equal(model.generate(prompt, 6, temperature=0), made)


def test_cached_generation_with_padding_on_the_left() -> None:
    model = make(depth=2)
    ids = tokens(1, 6)
    padded = torch.cat((tokens(1, 3, seed=5), ids), 1)
    seen = torch.tensor([[0] * 3 + [1] * 6])
    cache = KeyValueCache()
    first = model(padded[:, :7], seen[:, :7], cache=cache)
    rest = model(padded[:, 7:], seen, cache=cache)
    assert torch.allclose(torch.cat((first, rest), 1)[:, 3:], model(ids), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing_about_real_tokens(side: str, causal: bool) -> None:
    model = make(causal=causal)
    ids = tokens(2, 7)
    pad, ones, zeros = tokens(2, 4, seed=9), torch.ones(2, 7), torch.zeros(2, 4)
    left = side == "left"
    padded = torch.cat((pad, ids) if left else (ids, pad), 1)
    mask = torch.cat((zeros, ones) if left else (ones, zeros), 1).long()
    kept = slice(4, None) if left else slice(0, 7)
    assert torch.allclose(model(padded, mask)[:, kept], model(ids), atol=1e-5)
    assert model(padded, mask).isfinite().all()


def test_classifier_ignores_padding_and_averages_tokens() -> None:
    model = make(causal=False, classes=3)
    ids = tokens(2, 7)
    padded = torch.cat((ids, tokens(2, 4, seed=9)), 1)
    mask = torch.cat((torch.ones(2, 7), torch.zeros(2, 4)), 1).bool()
    assert torch.allclose(model(padded, mask), model(ids), atol=1e-5)
    head, model.head = model.head, nn.Identity()
    pooled = model(ids)
    assert torch.allclose(head(pooled), make(causal=False, classes=3)(ids), atol=1e-6)


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20000, 3)
    drawn = sample(logits, 0.5, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn[:, 0], minlength=3) / 20000
    assert torch.allclose(share, torch.tensor([0.0, 2.0, 4.0]).softmax(0), atol=0.01)
    model = make()
    one, two, three = (
        model.generate(tokens(1, 3), 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_same_seed_same_weights_and_residual_outputs_are_scaled() -> None:
    one, two = make(depth=8, width=64), make(depth=8, width=64)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    block = one.blocks[3]
    for layer in (block.mixer.query, block.feed_forward.up, one.embedding):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    for layer in (block.mixer.out, block.feed_forward.down):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)


def test_parameter_count() -> None:
    width, hidden, vocabulary, depth = 16, 64, 32, 3
    attention = 4 * width * width
    feeding = 2 * width * hidden + hidden + width
    expected = vocabulary * width + depth * (attention + feeding + 4 * width) + 2 * width
    assert sum(p.numel() for p in make().parameters()) == expected
    assert sum(p.numel() for p in make(tie=False).parameters()) == expected + vocabulary * width


def test_meta_then_real_keeps_the_tie() -> None:
    with torch.device("meta"):
        model = Transformer(2, 16, 2, vocabulary=32, context=8)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    assert model.head.weight is model.embedding.weight
    real = make(depth=2, heads=2, context=8)
    model.load_state_dict(real.state_dict())
    assert torch.equal(model.eval()(tokens(2, 8)), real(tokens(2, 8)))
    untied = make(tie=False).double()
    assert untied.head.weight is not untied.embedding.weight
    twin = copy.deepcopy(real)
    assert twin.head.weight is twin.embedding.weight is not real.embedding.weight


@pytest.mark.parametrize("mask", [False, True])
def test_compiles_whole_with_equal_outputs(mask: bool) -> None:
    model = make(depth=2, kv_heads=2)
    drop_mixer(model, 0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = (tokens(2, 9, seed=3) > 8) if mask else None
    assert torch.allclose(compiled(tokens(2, 9), seen), model(tokens(2, 9), seen), atol=1e-6)


def test_bfloat16_autocast_stays_close() -> None:
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens(2, 9))
    full = model(tokens(2, 9))
    assert low.dtype == torch.bfloat16
    assert (low.float() - full).norm() < 0.02 * full.norm()


def test_it_learns_to_copy() -> None:
    model = make(depth=1, width=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        half = tokens(16, 4, seed=step)
        batch = {"input_ids": half.repeat_interleave(2, dim=1)}
        loss = F.cross_entropy(call(model, batch)[:, ::2].flatten(0, 1), half.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


class Halving(nn.Module):
    """A mixer that takes x alone."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Grid(nn.Module):
    layout = "grid"

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_mixer_that_takes_only_x_and_a_swap_later() -> None:
    model = make(mixer=Halving, position="none")
    ids = tokens(1, 4)
    assert not model.caches
    assert model.generate(ids, 3, temperature=0).shape == (1, 7)
    block = model.blocks[0]
    x = torch.randn(1, 4, 16)
    middle = x + block.norm1(x) / 2
    assert torch.allclose(block(x), middle + block.feed_forward(block.norm2(middle)))
    other = make()
    other.blocks[1].mixer = Halving(causal=True)
    assert other(ids, torch.ones(1, 4)).isfinite().all()
    assert not other.caches
    with pytest.raises(LaminaError, match="cannot use a cache"):
        other(ids, cache=KeyValueCache())
    assert isinstance(other.blocks[1], TransformerBlock)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mixer": lambda: Halving(), "position": "none"}, RecipeError, "not known to be causal"),
        ({"mixer": Halving}, RecipeError, "no rotary positions"),
        ({"mixer": Grid, "causal": False, "position": "none"}, RecipeError, "works on images"),
        ({"position": "absolute"}, RecipeError, "'rotary', 'learned', 'sinusoidal', 'none'"),
        ({"heads": 3}, LaminaError, "width 16 does not divide by 3 heads"),
        ({"depth": 0}, ShapeError, "depth must be at least 1"),
        ({"classes": 0}, ShapeError, "classes must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_bad_input() -> None:
    model = make()
    with pytest.raises(ShapeError, match="17 tokens, the model's context is 16"):
        model(tokens(1, 17))
    with pytest.raises(ShapeError, match="do not fit the context of 16"):
        model.generate(tokens(1, 10), 7)
    with pytest.raises(LaminaError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(LaminaError, match="only a causal"):
        make(causal=False).generate(tokens(1, 2), 1)
    with pytest.raises(ValueError, match="must not be negative"):
        model.generate(tokens(1, 2), 1, temperature=-1.0)
    embedded = model.embedding(tokens(2, 5))
    assert torch.equal(model(inputs_embeds=embedded), model(tokens(2, 5)))


def test_a_row_of_padding_alone_harms_no_other_row():
    torch.manual_seed(0)
    model = Transformer(1, 16, 2, vocabulary=32, context=8, causal=False, classes=3)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    outputs = model(tokens(2, 6), mask)
    torch.testing.assert_close(outputs[0], model(tokens(2, 6)[:1])[0])
    F.cross_entropy(outputs, torch.tensor([1, -100])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_generation_needs_a_token_to_go_on_from():
    model = Transformer(1, 16, 2, vocabulary=32, context=8).eval()
    with pytest.raises(ShapeError, match=r"continues at least one token, got input_ids \(1, 0\)"):
        model.generate(tokens(1, 0), 2)


def test_a_feed_forward_is_given_what_it_names():
    # By position, an activation would take the width for its slope.
    model = Transformer(1, 16, 2, vocabulary=32, context=8, feed_forward="leaky_relu")
    assert model.blocks[0].feed_forward.negative_slope == 0.01
    with pytest.raises(LaminaError, match="needs the options 'input_size', 'hidden_size'"):
        Transformer(1, 16, 2, vocabulary=32, context=8, feed_forward="layer_norm_gru")
