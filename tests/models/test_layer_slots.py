"""The slots for the linear layers and convolutions inside the models' blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lamina import io
from lamina.batches import call
from lamina.errors import RecipeError
from lamina.nn import PHConv2d, PHMLinear
from lamina.recipe import build

PHM: dict[str, Any] = {"name": "phm_linear", "n": 2}
PHC: dict[str, Any] = {"name": "ph_conv2d", "n": 4}
MODELS: dict[str, tuple[dict[str, Any], type[nn.Module], int]] = {
    "transformer": (
        {"depth": 2, "width": 16, "heads": 2, "vocabulary": 32, "context": 8, "linear": PHM}, PHMLinear, 12,
    ),
    "gated": (
        {"name": "transformer", "depth": 1, "width": 16, "heads": 2, "vocabulary": 32, "context": 8, "linear": PHM,
         "feed_forward": "swiglu"},
        PHMLinear, 7,
    ),
    "vision_transformer": (
        {"image": 8, "patch": 4, "depth": 2, "width": 16, "heads": 2, "classes": 3, "linear": PHM}, PHMLinear, 12,
    ),
    "resnet": ({"depths": [1, 1], "widths": [16, 32], "stem": "small", "classes": 3, "conv": PHC}, PHConv2d, 5),
    "metaformer": ({"depths": [1, 1], "widths": [8, 16], "classes": 3, "conv": PHC}, PHConv2d, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_slot_fills_every_block_trains_and_is_saved(name: str, tmp_path: Any) -> None:
    options, kind, count = MODELS[name]
    torch.manual_seed(0)
    model = build({"name": name, **options}, "model")
    found = [m for m in model.modules() if isinstance(m, kind)]
    assert len(found) == count
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens} if "vocabulary" in options else {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "metaformer":
        batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    call(model, batch).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    io.save(model.eval(), tmp_path / "saved")
    assert torch.equal(call(io.load(tmp_path / "saved"), batch), call(model, batch))


def test_the_model_draws_the_layers_as_it_would_draw_its_own() -> None:
    torch.manual_seed(0)
    model = build({"name": "transformer", "depth": 8, "width": 64, "heads": 2, "vocabulary": 32, "context": 8,
                   "linear": {"name": "phm_linear", "n": 2}}, "model")  # fmt: skip
    block = model.blocks[0]
    assert block.feed_forward.up.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert block.mixer.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.3)
    assert not block.feed_forward.up.bias.any()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet20"])
def test_a_whole_size_has_a_quarter_of_its_blocks_weights(name: str) -> None:
    with torch.device("meta"):
        model, dense = build({"name": name, "conv": PHC}, "model"), build(name, "model")
    plain = sum(m.weight.numel() for m in model.modules() if isinstance(m, PHConv2d))
    held = sum(p.numel() for m in model.modules() if isinstance(m, PHConv2d) for p in m.parameters())
    assert 0.25 < held / plain < 0.26
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, dense)]
    assert counts[0] == counts[1] - plain + held


@pytest.mark.parametrize("name", ["transformer", "vision_transformer"])
def test_a_slot_that_no_part_has_is_refused(name: str) -> None:
    options = {**MODELS[name][0], "mixer": "identity_mixer", "feed_forward": "tests.models.test_layer_slots:Plain"}
    with pytest.raises(RecipeError, match=r"neither identity_mixer nor \S+Plain has a slot for linear layers"):
        build({"name": name, **options}, "model")


class Plain(nn.Linear):
    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__(width, width)
