from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import Hopfield, HopfieldLayer, HopfieldPooling
from lamina.recipe import build

EXAMPLES = [
    Example(
        "layer",
        "hopfield_pooling",
        {"width": 16, "quantity": 3, "heads": 2, "hidden_size": 5, "update_steps_max": 2, "beta": 0.25},
        inputs=lambda: (torch.randn(2, 7, 16),),
        bad={"quantity": 0},
    ),
    Example(
        "layer",
        "hopfield_layer",
        {"width": 16, "quantity": 5, "separate_targets": True, "projection_size": 6, "heads": 2},
        inputs=lambda: (torch.randn(2, 7, 16),),
        bad={"quantity": -1},
    ),
]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pooling_is_association_of_its_own_states() -> None:
    torch.manual_seed(0)
    layer = HopfieldPooling(16, 3, heads=2, output_size=5, update_steps_max=1).double()
    x, values = tokens(4, 9, 16), tokens(4, 9, 16, seed=1)
    expected = layer.association((x, layer.state.expand(4, -1, -1), values))
    assert layer.output_size == 15
    torch.testing.assert_close(layer((x, values)), expected.reshape(4, 15))
    torch.testing.assert_close(layer(x), layer((x, x)))
    found, weights = layer(x, return_weights=True)
    torch.testing.assert_close(found, layer(x))
    assert weights.shape == (4, 2, 3, 9)


def test_a_bag_is_a_set_and_padding_is_no_part_of_it() -> None:
    torch.manual_seed(0)
    layer, x = HopfieldPooling(16, 2, heads=4, zero_row=True).double(), tokens(3, 9, 16)
    torch.testing.assert_close(layer(x[:, torch.randperm(9)]), layer(x))
    sizes = (9, 4, 1)
    padding = torch.arange(9) >= torch.tensor(sizes)[:, None]
    found = layer(x, key_padding_mask=padding)
    for row, size in enumerate(sizes):
        torch.testing.assert_close(found[row : row + 1], layer(x[row : row + 1, :size]))
    more = torch.cat((x, tokens(3, 2, 16, seed=1)), dim=1)
    mask = torch.cat((padding, torch.ones(3, 2, dtype=torch.bool)), dim=1)
    torch.testing.assert_close(layer(more, key_padding_mask=mask), found)


def test_states_can_be_kept_as_they_are() -> None:
    torch.manual_seed(0)
    layer = HopfieldPooling(16, 2, trainable=False)
    assert not layer.state.requires_grad
    assert float(HopfieldPooling(256, 50).state.detach().std()) == pytest.approx(0.02, rel=0.05)
    layer(tokens(2, 5, 16).float()).sum().backward()
    assert layer.state.grad is None


def test_look_up_is_association_with_its_own_patterns_and_targets() -> None:
    torch.manual_seed(0)
    x = tokens(3, 7, 16)
    layer = HopfieldLayer(16, 5, separate_targets=True, stored_size=4, projection_size=6, heads=2).double()
    expected = layer.association((layer.stored.expand(3, -1, -1), x, layer.targets.expand(3, -1, -1)))
    torch.testing.assert_close(layer(x), expected)
    shared = HopfieldLayer(16, 5, stored_size=4).double()
    assert shared.targets is None
    torch.testing.assert_close(shared(x), shared.association((shared.stored, x, shared.stored)))
    found, weights = layer(x, return_weights=True)
    torch.testing.assert_close(found, layer(x))
    assert weights.shape == (3, 2, 7, 5)


def test_stored_training_data_answers_for_itself() -> None:
    """A look-up table: patterns as they are, targets one-hot, sharp; each pattern finds its own target."""
    x, y = nn.functional.normalize(tokens(6, 8).float(), dim=-1), torch.eye(6)
    options: dict[str, Any] = {
        "stored_static": True, "state_static": True, "projection_static": True, "output_projection": False,
        "norm_stored": False, "norm_state": False, "norm_projection": False, "pattern_size": 6, "projection_size": 6,
    }  # fmt: skip
    layer = HopfieldLayer(8, 6, separate_targets=True, train_stored=False, train_targets=False, beta=50.0, **options)
    assert not [p for p in layer.parameters() if p.requires_grad]
    layer.store(x, y)
    torch.testing.assert_close(layer(x[None])[0], y, atol=1e-3, rtol=0)
    for wrong in ((torch.ones(5, 8), None), (x, torch.ones(6, 8))):
        with pytest.raises(ShapeError, match=r"store: (patterns|targets) must be \(6, [68]\)"):
            layer.store(*wrong)
    with pytest.raises(ShapeError, match="targets must be none"):
        HopfieldLayer(8, 6).store(x, x)


def test_options_are_spelled_out_for_recipes_and_refused_where_they_mean_nothing() -> None:
    for layer in (HopfieldPooling, HopfieldLayer):
        known = inspect.signature(layer).parameters
        own = set(inspect.signature(Hopfield).parameters) - {"causal", "rotary", "rotary_base", "context"}
        assert own < set(known)
        assert known["update_steps_max"].default == 0
        with pytest.raises(TypeError, match="no option 'causal'"):
            layer(16, 2, causal=True)
        with pytest.raises(TypeError, match="betta"):
            layer(16, 2, betta=1.0)
    name = {"name": "hopfield_pooling", "width": 16}
    with pytest.raises(LaminaError, match=r"no option 'betta'; did you mean 'beta'"):
        build({**name, "betta": 1.0}, "layer")
    with pytest.raises(LaminaError, match=r"heads: expected a whole number, got .*'two'"):
        build({**name, "heads": "two"}, "layer")
    built = build({**name, "linear": {"name": "phm_linear", "n": 2}, "norm_state": "plain"}, "layer")
    assert type(built.association.query).__name__ == "PHMLinear"
    assert built.association.norm_state.weight is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HopfieldPooling(16, 0), "quantity must be at least 1, got 0"),
        (lambda: HopfieldLayer(16, -1), "quantity must be at least 1, got -1"),
        (lambda: HopfieldPooling(16, heads=3), "width 16 does not divide by 3 heads"),
        (lambda: HopfieldLayer(16, 3, projection_size=5), "for separate_targets=True"),
        (lambda: HopfieldPooling(16)(torch.ones(2, 0, 16)), "at least 1"),
        (lambda: HopfieldPooling(16)((torch.ones(2, 3, 16), torch.ones(2, 4, 16))), "3 patterns .* 4 projected"),
        (lambda: HopfieldLayer(16, 3)(torch.ones(2, 16)), r"got \(2, 16\)"),
    ],
)
def test_what_cannot_be(make: Any, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        make()


def test_in_place_of_the_mean_over_tokens_in_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    trunk = transformers.ViTModel(config, add_pooling_layer=False)
    head = nn.Sequential(HopfieldPooling(16, hidden_size=8, heads=4), nn.Linear(16, 3))
    logits = head(trunk(torch.randn(2, 3, 8, 8)).last_hidden_state)
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
