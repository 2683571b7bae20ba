from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina import io
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.models import PrototypeNetwork, explain_prototypes, nearest_training
from lamina.nn import PrototypeHead
from lamina.recipe import build


def images(count: int, channels: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


SMALL: dict[str, Any] = {"num_prototypes": 5, "classes": 3, "image": 8, "widths": (6, 4), "weight_std": None}
EXAMPLES = [
    Example(
        "model",
        "prototype_network",
        SMALL,
        batch=lambda: {"pixel_values": images(4), "labels": torch.arange(4) % 3},
        bad={"num_prototypes": 0},
    )
]


def network(**options: Any) -> PrototypeNetwork:
    torch.manual_seed(0)
    return PrototypeNetwork(**{**SMALL, **options})


def test_the_official_architecture_goes_2_4_7_14_28() -> None:
    net = PrototypeNetwork()
    assert [tuple(p.shape) for n, p in net.encoder.named_parameters() if "weight" in n] == [
        (32, 1, 3, 3),
        (32, 32, 3, 3),
        (32, 32, 3, 3),
        (10, 32, 3, 3),
    ]
    x, sides = torch.rand(2, 10, 2, 2), []
    assert net.decoder is not None
    for layer in net.decoder:
        x = layer(x)
        sides += [x.shape[-1]] if isinstance(layer, nn.ConvTranspose2d) else []
    assert sides == [4, 7, 14, 28]
    out = net(images(3, 1, 28, 28))
    assert [tuple(v.shape) for v in out if v is not None] == [(3, 10), (3, 15), (3, 40), (3, 1, 28, 28)]
    assert isinstance(net.encoder[-1], nn.ReLU)
    assert isinstance(net.decoder[-1], nn.Sigmoid)
    weights = torch.cat([p.detach().flatten() for n, p in net.encoder.named_parameters() if "weight" in n])
    assert float(weights.std()) == pytest.approx(0.01, rel=0.05)
    assert not any(p.any() for n, p in net.encoder.named_parameters() if "bias" in n)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (9, 14), (63, 5)])
def test_odd_sizes_are_decoded_to_their_own(size: tuple[int, int]) -> None:
    net = network(image=size, channels=2)
    out = net(images(2, 2, *size))
    assert out.reconstruction.shape == (2, 2, *size)
    assert net.decoded_prototypes().shape == (5, 2, *size)


def test_logits_are_the_head_s_and_the_decoder_runs_in_training_only() -> None:
    net, x = network(), images(4)
    out = net(x)
    latent = net.encoder(x).flatten(1)
    assert torch.equal(out.latent, latent)
    torch.testing.assert_close(out.distances, torch.cdist(latent, net.head.layer.prototypes).square())
    torch.testing.assert_close(out.logits, out.distances @ net.head.linear.weight.T)
    assert torch.equal(out.reconstruction, net.decoder(net.encoder(x)))
    net.eval()
    assert net(x).reconstruction is None
    assert torch.equal(net(x).logits, out.logits)


@pytest.mark.parametrize("top", [1, 3, 5, 99])
def test_an_explanation_adds_up_to_the_logits_for_every_class(top: int) -> None:
    net, x = network().train(), images(4)
    told = net.explain(x, top)
    out = net.eval()(x)
    kept = min(top, 5)
    torch.testing.assert_close(told.contributions.sum(1) + told.others, out.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(told.logits, out.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(told.weights * told.distances[..., None], told.contributions)
    assert torch.equal(told.prototypes, out.distances.sort(1).indices[:, :kept])
    assert torch.equal(told.classes, net.head.linear.weight.argmin(0)[told.prototypes])
    assert told.pictures is not None
    assert torch.equal(told.pictures, net.decoded_prototypes()[told.prototypes])
    assert told.pictures_from == "decoder"
    if top == 5:
        assert told.others.abs().max() < 1e-5
    assert f"prototype {int(told.prototypes[0, 0])} (class" in str(told)


def test_explaining_leaves_the_model_as_it_was() -> None:
    net = network().train()
    net.decoder.eval()
    before = {n: m.training for n, m in net.named_modules()}
    net.explain(images(2))
    net.nearest_training([{"pixel_values": images(3)}])
    assert {n: m.training for n, m in net.named_modules()} == before


def test_the_nearest_training_input_is_found_across_batches() -> None:
    net, x, y = network().eval(), images(7), torch.arange(7) % 3
    found = net.nearest_training(
        [{"pixel_values": a, "labels": b} for a, b in zip(x.split(3), y.split(3), strict=True)]
    )
    with torch.no_grad():
        d = net(x).distances
    assert torch.equal(found.rows, d.argmin(0))
    torch.testing.assert_close(found.distances, d.min(0).values)
    assert torch.equal(found.inputs, x[found.rows])
    assert torch.equal(found.labels, y[found.rows])


def test_without_a_decoder_pictures_are_training_inputs_and_say_so() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    net, x = network(encoder=encoder), images(4)
    assert net(x).reconstruction is None
    assert net.explain(x).pictures is None
    assert "no pictures: there is no decoder" in str(net.explain(x))
    near = net.nearest_training([{"pixel_values": x}])
    told = net.explain(x, nearest=near)
    assert told.pictures_from == "nearest training input"
    assert "pictures: nearest training input" in str(told)
    assert torch.equal(told.pictures, near.inputs[told.prototypes])
    with pytest.raises(LaminaError, match="no decoder to show prototypes with"):
        net.decoded_prototypes()


def test_an_encoder_and_decoder_of_one_s_own_by_module_or_by_name() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    decoder = nn.Sequential(nn.Linear(6, 64), nn.Unflatten(1, (1, 8, 8)))
    net = network(encoder=encoder, decoder=decoder)
    assert net(images(2)).reconstruction.shape == (2, 1, 8, 8)
    assert net.decoded_prototypes().shape == (5, 1, 8, 8)
    named = build({"name": "prototype_network", **SMALL, "encoder": {"name": "identity"}}, "model")
    assert named.head.in_features == 64
    assert named.decoder is None


def test_merging_prototypes_survives_saving(tmp_path: Any) -> None:
    net, x = network().eval(), images(4)
    with torch.no_grad():
        net.head.layer.prototypes[4] = net.head.layer.prototypes[2]
    before = net(x).logits
    assert net.merge_prototypes(1e-6) == [[0], [1], [2, 4], [3]]
    torch.testing.assert_close(net(x).logits, before)
    io.save(net, tmp_path / "saved")
    again = io.load(tmp_path / "saved")
    assert torch.equal(again.eval()(x).logits, net(x).logits)


class Foreign(nn.Module):
    """A model with a prototype head among its own parts, in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)), PrototypeHead(6, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


def test_any_model_with_the_head_is_explained() -> None:
    torch.manual_seed(0)
    model, x = Foreign(), torch.randn(5, 4)
    told = explain_prototypes(model, {"x": x}, 2, nearest=nearest_training(model, [{"x": x}]))
    torch.testing.assert_close(told.logits, model.eval()(x))
    assert told.pictures.shape == (5, 2, 4)
    sequence = explain_prototypes(model, {"x": torch.randn(2, 3, 4)})
    assert sequence.logits.shape == (6, 3)
    with pytest.raises(LaminaError, match="saw 6 latents of 2 inputs"):
        nearest_training(model, [{"x": torch.randn(2, 3, 4)}])


BAD: list[tuple[Any, str]] = [
    (lambda: network(classes=0), "classes must be at least 1, got 0"),
    (lambda: network(widths=()), "at least one convolution"),
    (lambda: network(weight_std=0.0), "weight_std must be above 0"),
    (lambda: network()(images(2, 1, 7, 8)), r"takes \(batch, \(1, 8, 8\)\), got \(2, 1, 7, 8\)"),
    (
        lambda: network(decoder=nn.Upsample(scale_factor=2)),
        r"decoder must give images \(1, 8, 8\), it gives \(4, 4, 4\)",
    ),
    (lambda: network(encoder=nn.Flatten(0)), r"a row an image, of 1 image it gave \(64,\)"),
    (lambda: network().explain(images(1), 0), "at least 1, got 0"),
    (lambda: network().nearest_training([]), "data has no batch"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_bad_input_is_met_with_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises((LaminaError, ShapeError), match=sentence):
        call()


def test_a_model_without_the_head_is_told_how_to_get_one() -> None:
    with pytest.raises(AnatomyError, match=r"one PrototypeHead in Linear, which has none; Replace\('head'"):
        explain_prototypes(nn.Linear(2, 3), {"x": torch.zeros(1, 2)})
