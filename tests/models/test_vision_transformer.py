from __future__ import annotations

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models.vision_transformer import VisionTransformer, deit_base, deit_small, deit_tiny
from lamina.nn.layout import GridAsSequence


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TINY = {"image": 8, "patch": 4, "depth": 2, "width": 16, "heads": 2, "classes": 5}
DEIT_EXAMPLES = [
    Example(
        "model",
        name,
        options={"classes": 3, "image": 16, "depth": 1},
        batch=lambda: {"pixel_values": images(2, 3, 16, 16), "labels": torch.tensor([0, 2])},
        size_of="vision_transformer",
    )
    for name in ("deit_tiny", "deit_small", "deit_base")
]
EXAMPLES = [
    Example(
        "model",
        "vision_transformer",
        options=TINY,
        batch=lambda: {"pixel_values": images(2, 3, 8, 8), "labels": torch.tensor([0, 4])},
        bad={"patch": 3},
    ),
    *DEIT_EXAMPLES,
]


def make(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**(TINY | options)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "count"), [(deit_tiny, 5_717_416), (deit_small, 22_050_664), (deit_base, 86_567_656)]
)
def test_parameter_counts_of_the_paper(build: type[VisionTransformer], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


def test_it_is_transformers_vit() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=12,
        patch_size=4,
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(1)
    peer, ours = transformers.ViTForImageClassification(config).eval(), make(image=12)
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.3)
    renamed = {rename(name): tensor for name, tensor in peer.state_dict().items()}
    ours.load_state_dict(renamed)
    x = images(3, 3, 12, 12)
    got, want = ours(x), peer(x).logits
    assert torch.allclose(got, want, atol=1e-5)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    theirs = {rename(name): p.grad for name, p in peer.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name], atol=1e-4, rtol=1e-4), name


RENAMES = [
    ("vit.embeddings.cls_token", "class_token"),
    ("vit.embeddings.position_embeddings", "position_embedding"),
    ("vit.embeddings.patch_embeddings.projection", "patch_embedding"),
    ("vit.encoder.layer.", "blocks."),
    ("vit.layers.", "blocks."),
    (".attention.attention.", ".mixer."),
    (".attention.output.dense", ".mixer.out"),
    (".attention.q_proj", ".mixer.query"),
    (".attention.k_proj", ".mixer.key"),
    (".attention.v_proj", ".mixer.value"),
    (".attention.o_proj", ".mixer.out"),
    (".mlp.fc1", ".feed_forward.up"),
    (".mlp.fc2", ".feed_forward.down"),
    (".intermediate.dense", ".feed_forward.up"),
    (".output.dense", ".feed_forward.down"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("vit.layernorm", "final_norm"),
    ("classifier", "head"),
]


def rename(name: str) -> str:
    """transformers' names, those before and after its version 5, to ours."""
    for theirs, mine in RENAMES:
        name = name.replace(theirs, mine)
    return name


def test_a_patch_is_its_pixels_times_the_embedding() -> None:
    model = make()
    x = images(1, 3, 8, 8)
    embedded = model.patch_embedding(x).flatten(2).transpose(1, 2)[0, 2]
    by_hand = (model.patch_embedding.weight * x[:, :, 4:8, 0:4]).sum((1, 2, 3)) + model.patch_embedding.bias
    assert torch.allclose(embedded, by_hand, atol=1e-5)


def test_mean_pool_without_positions_ignores_the_order_of_patches() -> None:
    model = make(pool="mean")
    assert model.class_token is None
    with torch.no_grad():
        model.position_embedding.zero_()
    x = images(2, 3, 8, 8)
    assert torch.allclose(model(x.roll(4, dims=2)), model(x), atol=1e-6)
    assert not torch.allclose(model(x.roll(3, dims=2)), model(x), atol=1e-6)


class Shift(nn.Module):
    layout = "grid"

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (width, *grid)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == self.shape
        return x.roll(1, dims=3)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_grid_mixers_are_wrapped(pool: str) -> None:
    model = make(mixer=Shift, pool=pool)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, GridAsSequence)
    assert mixer.prefix == (pool == "class")
    assert model(images(2, 3, 8, 8)).isfinite().all()


def test_compiles_and_stays_close_in_bfloat16() -> None:
    model, x = make(), images(2, 3, 8, 8)
    full = model(x)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), full, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - full).norm() < 0.03 * full.norm()


def test_bad_options_and_input() -> None:
    with pytest.raises(ShapeError, match="image 8 is not a multiple of patch 3"):
        make(patch=3)
    with pytest.raises(ShapeError, match="depth must be at least 1, got 0"):
        make(depth=0)
    with pytest.raises(RecipeError, match="'class' or 'mean', got 'cls'"):
        make(pool="cls")
    with pytest.raises(LaminaError, match="16 does not divide by 3 heads"):
        make(heads=3)
    with pytest.raises(ShapeError, match=r"\(3, 8, 8\).*got \(1, 3, 9, 9\)"):
        make()(images(1, 3, 9, 9))
