from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from tests.contract.example import Example
from tests.models import fit_reference as reference
from tests.models.fit_reference import lively, with_batch_norms
from torch import Tensor, nn

from lamina import io
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import FIT, FITAutoregressive, FITImage, group_image, pad_groups, parse_layers
from lamina.models.fit.layers import sine_table
from lamina.nn import Attention
from lamina.recipe import build
from lamina.rewrite import DropAttention, Replace, history, rewrite


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIZES: dict[str, Any] = {
    "layers": "(1)1(2)1(1)", "tokens_per_group": 4, "groups": 3, "latents_per_group": 2, "in_features": 5,
    "token_width": 8, "latent_width": 12, "token_heads": 2, "latent_heads": 4,
}  # fmt: skip
EXAMPLES = [
    Example(
        "model", "fit", SIZES | {"layers": "(1)1(1)", "side_features": 3, "drop_path": 0.2, "dropout": 0.1},
        batch=lambda: {"inputs": numbers(2, 3, 4, 5), "y": numbers(2, 3, 1, 3, seed=1)}, bad={"token_heads": 3},
    ),
    Example(
        "model", "fit_image",
        {"layers": "(1)1", "group": 4, "patch": 2, "latents_per_group": 2, "token_width": 8, "latent_width": 8,
         "token_heads": 2, "latent_heads": 2, "image": 8, "channels": 1, "classes": 5},
        batch=lambda: {"pixel_values": numbers(2, 1, 8, 8), "labels": torch.tensor([0, 4])}, bad={"patch": 3},
    ),
]  # fmt: skip


def make(**options: Any) -> FIT:
    torch.manual_seed(0)
    return FIT(**(SIZES | options)).eval()


@pytest.mark.parametrize(
    ("layers", "n", "t", "m", "c", "widths", "heads", "count"),
    [
        ("(2)4(2)", 16, 4, 4, 12, (32, 64), (4, 4), 265_920),
        ("(1)2(1)2", 16, 4, 4, 12, (32, 64), (4, 4), 247_008),
        ("(2)4(2)4(2)4(2)", 256, 100, 16, 768, (512, 768), (8, 12), 119_923_456),
        ("(2)2(2)", 64, 16, 8, None, (128, 128), (4, 4), 1_380_608),
    ],
)
def test_parameters_are_the_cards(layers, n, t, m, c, widths, heads, count) -> None:
    with torch.device("meta"):
        if c is None:
            model: nn.Module = FITAutoregressive(layers, n, t, m, *widths, *heads, vocabulary=256)
        else:
            model = FIT(layers, n, t, m, c, *widths, *heads)
    assert sum(p.numel() for p in model.parameters()) == count


def test_layer_strings() -> None:
    assert parse_layers("(2)4(2)") == [(2, 4), (2, 0)]
    assert parse_layers("(1)2(10)3") == [(1, 2), (10, 3)]
    for bad, words in (
        ("(2)0(2)", "no global layers between"), ("2(4)", "is written"), ("", "is written"), ("(2)4 (2)", "is written"),
        ("(0)", "has no layers"), ("(2)-1(2)", "is written"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            parse_layers(bad)


def expected(model: FIT, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The whole encoder by the reference, example by example."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    options, found = SIZES | model.lamina_node, []
    heads = (options["token_heads"], options["latent_heads"])
    for b in range(len(x)):
        tokens = reference.norm(state, "stem.norm", reference.linear(state, "stem.project", x[b]))
        tokens = tokens + state["stem.positions.table"]
        k = 0
        if y is not None:
            k = y.shape[2]
            side = reference.norm(state, "stem.side_norm", reference.linear(state, "stem.side", y[b]))
            tokens = torch.cat((side, tokens), 1)
        real = None
        if mask is not None:
            real = [torch.cat((r.any().expand(k), r)) for r in mask[b].bool()]
        ends = reference.trunk(
            state, parse_layers(options["layers"]), list(tokens),
            list(state["trunk.table"].split(options["latents_per_group"])), heads,
            causal_latents=options.get("causal_latents", False), real=real,
        )  # fmt: skip
        found.append([torch.stack(side) for side in ends])
    tokens, latents = (torch.stack(side) for side in zip(*found, strict=True))
    return (
        reference.norm(state, "token_norm", tokens[:, :, -x.shape[2] :]),
        reference.norm(state, "latent_norm", latents),
    )


KINDS: list[dict[str, Any]] = [
    {},
    {"causal_latents": True, "token_width": 16, "positions": "sincos"},
    {"side_features": 3, "layers": "(1)2(0)1"},
    {"tokens_per_group": 1, "groups": 7, "latents_per_group": 1},
    {"tokens_per_group": 63, "groups": 2, "positions": "sincos", "layers": "(1)1(1)"},
]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_those_of_the_card_written_out(options: dict[str, Any], masked: bool) -> None:
    model = lively(make(**options))
    n, t = (SIZES | options)["tokens_per_group"], (SIZES | options)["groups"]
    x, y = numbers(2, t, n, 5), numbers(2, t, 2, 3) if options.get("side_features") else None
    mask = None
    if masked:
        mask = numbers(2, t, n, seed=3) > -0.5
        mask[:, 0, 0], mask[1, -1] = True, False  # A group of nothing.
    found, wanted = model(x, y, mask), expected(model, x, y, mask)
    real = torch.ones(2, t, n, dtype=torch.bool) if mask is None else mask
    filled = real.any(-1)
    for a, b, kept in zip(found, wanted, (real, filled), strict=True):
        torch.testing.assert_close(a[kept], b[kept], rtol=1e-4, atol=1e-4)
    weights = [numbers(*a[kept].shape, seed=5) for a, kept in zip(found, (real, filled), strict=True)]
    grads = [
        torch.autograd.grad(
            sum((a[kept] * w).sum() for a, kept, w in zip(ends, (real, filled), weights, strict=True)),
            [*model.parameters()],
        )
        for ends in (found, wanted)
    ]
    for (name, _), a, b in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
    low = copy.deepcopy(model).bfloat16()(x.bfloat16(), None if y is None else y.bfloat16(), mask)
    for a, b, kept in zip(low, wanted, (real, filled), strict=True):
        assert (a.float() - b)[kept].abs().max() < 0.1 * b[kept].abs().max()


def test_one_group_sees_the_same_with_and_without_a_causal_mask() -> None:
    plain, causal = lively(make(groups=1)), lively(make(groups=1, causal_latents=True))
    for a, b in zip(plain(numbers(2, 1, 4, 5)), causal(numbers(2, 1, 4, 5)), strict=True):
        torch.testing.assert_close(a, b)
    plain, causal = lively(make()), lively(make(causal_latents=True))
    assert not torch.allclose(plain(numbers(2, 3, 4, 5))[0], causal(numbers(2, 3, 4, 5))[0])


def test_with_closed_cross_attentions_every_group_is_a_plain_transformer() -> None:
    model = lively(make())
    layers = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attention.out." in name:
                parameter.zero_()
        for ours in (layer for block in model.trunk.blocks for layer in block.local):
            peer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
            attention = ours.mixer
            parts = (attention.query, attention.key, attention.value)
            peer.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
            peer.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
            pairs = ((peer.self_attn.out_proj, attention.out), (peer.linear1, ours.feed_forward.up))
            pairs += ((peer.linear2, ours.feed_forward.down), (peer.norm1, ours.norm1), (peer.norm2, ours.norm2))
            for theirs, mine in pairs:
                theirs.load_state_dict(mine.state_dict())
            layers.append(peer.train())
    x = numbers(2, 3, 4, 5)
    tokens = model.stem(x).flatten(0, 1)
    for layer in layers:
        tokens = layer(tokens)
    torch.testing.assert_close(model(x)[0], model.token_norm(tokens).unflatten(0, (2, 3)), rtol=0, atol=1e-5)


def test_groups_permuted_with_their_latents_permute_the_outputs() -> None:
    model, x, order = lively(make()), numbers(2, 3, 4, 5), torch.tensor([2, 0, 1])
    found = model(x)
    with torch.no_grad():
        model.trunk.table.copy_(model.trunk.table.unflatten(0, (3, 2))[order].flatten(0, 1))
    for before, after in zip(found, model(x[:, order]), strict=True):
        torch.testing.assert_close(after, before[:, order])


def test_groups_of_unequal_fill_and_fewer_groups() -> None:
    model, sparse = lively(make()), lively(make(pad_groups=True))
    parts = [numbers(n, 5, seed=n) for n in (4, 1, 3)]
    x, mask = pad_groups(parts, 4)
    tokens, latents = sparse(x[None], None, mask[None])
    other = sparse(x.masked_fill(~mask[..., None], 9.0)[None], None, mask[None])
    torch.testing.assert_close(other[0][0][mask], tokens[0][mask])
    torch.testing.assert_close(other[1], latents)
    # Flat and too short, or whole groups fewer: the rest is as if it were not there.
    short = sparse(x[None, :2], None, mask[None, :2])
    whole = sparse(torch.cat((x[:2], 7 * x[2:]))[None], None, torch.cat((mask[:2], mask[2:] & False))[None])
    torch.testing.assert_close(short[1][:, :2], whole[1][:, :2])
    flat = numbers(2, 10, 5)
    padded = torch.cat((flat, torch.zeros(2, 2, 5)), 1).unflatten(1, (3, 4))
    seen = (torch.arange(12) < 10).expand(2, -1).unflatten(1, (3, 4))
    torch.testing.assert_close(sparse(flat), model(padded, None, seen))
    torch.testing.assert_close(sparse(numbers(2, 12, 5)), model(numbers(2, 12, 5).unflatten(1, (3, 4))))


@pytest.mark.parametrize("options", [{}, {"classes": 3}, {"classes": 3, "layers": "(1)1(1)1"}])
def test_norms_that_count_tokens_do_not_count_padding(options: dict[str, Any]) -> None:
    model = lively(make(side_features=2, **options))
    assert with_batch_norms(model) > 10
    x, y = numbers(2, 3, 4, 5), numbers(2, 3, 1, 2, seed=3)
    seen = (torch.arange(12) < 7).expand(2, -1).unflatten(1, (3, 4))
    found = model(x, y, seen)
    x, y = x.clone(), y.clone()
    x[~seen], y[:, 2] = 9.0, 9.0
    again = model(x, y, seen)
    if options:
        torch.testing.assert_close(again, found)
    else:
        torch.testing.assert_close(again[0][seen], found[0][seen])
        torch.testing.assert_close(again[1][:, :2], found[1][:, :2])


@pytest.mark.parametrize("layers", ["(1)1(1)", "(1)1(1)1"])
def test_a_classifier_reads_latents_or_tokens_and_no_padding(layers: str) -> None:
    model, bare = lively(make(layers=layers, classes=3, pad_groups=True)), make(layers=layers, pad_groups=True)
    state = {n: p for n, p in model.state_dict().items() if not n.startswith("head.")}
    missing = bare.load_state_dict(state, strict=False).missing_keys
    assert {n.split(".")[0] for n in missing} == {"latent_norm" if layers.endswith(")") else "token_norm"}
    x = numbers(2, 2, 4, 5)
    tokens, latents = bare(x)
    features = tokens[:, :2].mean((1, 2)) if layers.endswith(")") else latents[:, :2].mean((1, 2))
    torch.testing.assert_close(model(x), model.head(features))
    assert model.head.out_features == 3
    taken = make(classes=3, head={"name": "fourier_head", "num_frequencies": 1})
    assert type(taken.head).__name__ == "FourierHead"


class Home(nn.Module):
    """A home-made layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.seen = nn.Linear(width, width), None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen = mask
        return x + self.mix(x).mean(1, keepdim=True)


def torchs(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)


def test_layers_of_ones_own_are_interleaved_and_told_the_mask() -> None:
    model = make(token_layer=Home, latent_layer=torchs, causal_latents=True)
    assert [type(layer.layer) for block in model.trunk.blocks for layer in block.local] == [Home] * 4
    x = numbers(2, 3, 4, 5).requires_grad_()
    latents = model(x)[1]
    assert model.trunk.blocks[0].local[0].layer.seen is None
    latents[:, 0].square().sum().backward()
    reached = x.grad.abs().sum((0, 2, 3)) > 0
    assert reached.tolist() == [True, False, False], "torch's own layer was given the mask, and took it"
    named = make(latent_layer={"name": "hopfield_encoder_layer", "hidden": 16, "dropout": 0.0, "heads": 2})
    assert torch.isfinite(named(x)[0]).all()
    with pytest.raises(LaminaError, match="is not told of padding"):
        model(x, None, torch.ones(2, 3, 4))


def test_recomputing_gives_the_same_gradients_and_keeps_less() -> None:
    x, kept, grads = numbers(2, 3, 4, 5), [], []
    for checkpoint in (False, True):
        model = lively(make(checkpoint=checkpoint))
        held: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=held: held.setdefault(t.data_ptr(), 0) or t, lambda t: t
        ):
            loss = sum(y.square().sum() for y in model(x))
        loss.backward()
        kept.append(len(held))
        grads.append([p.grad for p in model.parameters()])
    assert kept[1] < kept[0] / 3
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_it_starts_as_the_official_code_does() -> None:
    with torch.random.fork_rng():
        model = make(layers="(1)1(1)", token_width=96, latent_width=192, token_heads=4, latent_heads=6)
    layer, cross = model.trunk.blocks[0].local[0], model.trunk.blocks[0].read.attention
    limits = {
        layer.mixer.query: (6 / (96 * (4 + 24))) ** 0.5,
        layer.mixer.out: (6 / (4 * (24 + 96))) ** 0.5,
        layer.feed_forward.up: (6 / (96 + 384)) ** 0.5,
        cross.query: (6 / (192 * (4 + 24))) ** 0.5,
        cross.key: (6 / (96 * (4 + 24))) ** 0.5,
        cross.out: (6 / (4 * (24 + 192))) ** 0.5,
    }
    for part, limit in limits.items():
        assert 0.97 * limit < part.weight.abs().max() <= limit
        assert not part.bias.any()
    assert model.trunk.table.std().item() == pytest.approx(0.0176, rel=0.1)  # 0.02, cut off at two deviations.


def test_sine_tables_end_at_a_thousand() -> None:
    table = sine_table(5, 4)
    angles = torch.tensor([0.0, 250.0, 500.0, 750.0, 1000.0])
    wanted = torch.stack((angles.sin(), (angles / 100).sin(), angles.cos(), (angles / 100).cos()), 1)
    torch.testing.assert_close(table, wanted)
    grid = sine_table(9, 8, grid=True)
    torch.testing.assert_close(grid[5], torch.cat((sine_table(3, 4)[1], sine_table(3, 4)[2])))
    assert torch.equal(make(positions="sincos2d").stem.positions.table, sine_table(4, 8, grid=True))
    assert not any("positions" in n for n, _ in make(positions="sincos2d").named_parameters())


def test_passes_find_its_layers(tmp_path: Any) -> None:
    model, x = lively(make(layers="(3)1(3)")), numbers(2, 3, 4, 5)
    rewrite(model, DropAttention(count=1, trunk="trunk.blocks.0.local"), data=[{"inputs": x}])
    assert sum(isinstance(m, Attention) for m in model.modules()) == 6
    rewrite(model, Replace("layer_norm", "rms_norm", match="trunk.blocks.*"))
    assert len(history(model)) == 2
    io.save(model, tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(io.load(tmp_path / "saved")(x), model(x), strict=True))


def test_images_in_a_recipe() -> None:
    node = {"name": "fit_image", **EXAMPLES[1].options}
    del node["image"], node["channels"], node["classes"]
    model = build(node, "model", image=8, channels=1, classes=10)
    assert model(numbers(2, 1, 8, 8)).shape == (2, 10)
    wide, x = FITImage("(1)1(1)", 4, 2, 1, 8, 8, 2, 2, image=(8, 16)), numbers(2, 3, 8, 16)
    assert [tuple(y.shape) for y in wide(x)] == [(2, 8, 4, 8), (2, 8, 1, 8)]
    plain = FIT("(1)1(1)", 4, 8, 1, 12, 8, 8, 2, 2)
    plain.load_state_dict(wide.state_dict())
    torch.testing.assert_close(wide(x), plain(group_image(x, 4, 2)))
    with pytest.raises(ShapeError, match=r"takes \(batch, \(3, 8, 16\)\), got \(2, 3, 8, 8\)"):
        wide(x[..., :8])
    with pytest.raises(ShapeError, match="the image of 8 x 9"):
        FITImage("(1)1(1)", 4, 2, 1, 8, 8, 2, 2, image=(8, 9))


def test_drop_path_and_dropout_are_in_training_only_and_drop_path_in_no_cross_attention() -> None:
    model, x = make(drop_path=0.5, dropout=0.5), numbers(2, 3, 4, 5)
    torch.testing.assert_close(model(x), make()(x))
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])
    with torch.no_grad(), mock.patch("torch.rand", lambda *a, **k: torch.zeros(a[0])):  # Every branch is left out.
        for block in model.trunk.blocks:
            tokens = model.stem(x).flatten(0, 1)
            assert all(torch.equal(layer(tokens), tokens) for layer in block.local)
        first = model.trunk.blocks[0]
        assert not torch.equal(first(model.stem(x), model.trunk.start(2, 3))[1], model.trunk.start(2, 3))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"token_heads": 3}, ShapeError, "token_width 8 does not divide by 3 token_heads"),
        ({"latent_heads": 5}, ShapeError, "latent_width 12 does not divide by 5 latent_heads"),
        ({"token_heads": 4, "latent_heads": 3}, ShapeError, "3 heads .* do not divide the narrower width 8"),
        ({"groups": 0}, ShapeError, "groups must be at least 1, got 0"),
        ({"mlp_ratio": 0}, ShapeError, "mlp_ratio must be at least 1"),
        ({"in_features": 0}, ShapeError, "in_features must be at least 1"),
        ({"classes": 0}, ShapeError, "classes must be at least 1"),
        ({"layers": "(2)"}, RecipeError, "no global layers: no group would learn of another"),
        ({"layers": "2(4)"}, RecipeError, "is written"),
        ({"positions": "rotary"}, RecipeError, "'learned', 'sincos' or 'sincos2d', got 'rotary'"),
        ({"positions": "sincos2d", "tokens_per_group": 5}, ShapeError, "n a square"),
        ({"dropout": 1.0}, RecipeError, "dropout must be at least 0 and below 1"),
        ({"drop_path": 1.0}, RecipeError, "below 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("shape", "options", "given", "words"),
    [
        ((2, 11, 5), {}, {}, r"3 groups of 4 take 12 tokens, got 11; fewer are taken with pad_groups=True"),
        ((2, 13, 5), {"pad_groups": True}, {}, r"take 12 tokens, got 13$"),
        ((2, 3, 5, 5), {}, {}, r"take 3 x 4 tokens, got 3 x 5$"),
        ((2, 2, 4, 5), {}, {}, r"take 3 x 4 tokens, got 2 x 4; fewer"),
        ((2, 3, 4, 6), {}, {}, r"3 groups, 4, 5\) or"),
        ((3, 5), {}, {}, "expected floating-point tokens"),
        ((2, 3, 4, 5), {}, {"attention_mask": torch.ones(2, 12)}, r"attention_mask must be \(2, 3, 4\), got \(2, 12\)"),
        ((2, 3, 4, 5), {}, {"y": torch.zeros(2, 3, 1, 3)}, r"side_features is 0, got \(2, 3, 1, 3\)"),
        ((2, 3, 4, 5), {"side_features": 3}, {}, "side_features is 3, got None"),
        ((2, 3, 4, 5), {"side_features": 3}, {"y": torch.zeros(2, 2, 1, 3)}, r"y must be \(2, 3, 'k', 3\)"),
    ],
)
def test_bad_tokens_are_refused(shape: Any, options: Any, given: Any, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        make(**options)(numbers(*shape), **given)
