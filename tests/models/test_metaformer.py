from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamina import io, registry
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import MetaFormer, MetaFormerBlock, load_timm
from lamina.models.metaformer import ATTENTION, DropPath, stage_grids
from lamina.nn import Attention, IdentityMixer, PoolingMixer, RandomMixer, SpatialLinearMixer
from lamina.recipe import build


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TINY: dict[str, Any] = {"depths": (1, 2), "widths": (8, 16), "classes": 5}
POOLFORMERS = {
    "poolformer_s12": (11_915_176, 1.823),
    "poolformer_s24": (21_388_968, 3.413),
    "poolformer_s36": (30_862_760, 5.003),
    "poolformer_m36": (56_172_520, 8.802),
    "poolformer_m48": (73_473_448, 11.591),
}
HYBRIDS = {
    "metaformer_pppa_s12": (14_038_440, 1.920),
    "metaformer_pppf_s12": (11_919_978, 1.825),
    # The card gives no figures for these; by hand from pppa and pppf: position maps 320 * 14 * 14 and 512 * 7 * 7,
    # attention 4 w^2 + w a block, spatial linear 196^2 a block of stage 3.
    "metaformer_ppaa_s12": (14_038_440 + 6 * (4 * 320 * 320 + 320) + 320 * 14 * 14, None),
    "metaformer_ppff_s12": (11_919_978 + 6 * 196 * 196, None),
}
EXAMPLES = [
    Example(
        "model",
        "metaformer",
        TINY | {"layer_scale": 0.5, "drop_path": 0.2},
        batch=lambda: {"pixel_values": images(2, 3, 16, 16), "labels": torch.tensor([0, 4])},
        bad={"widths": (8,)},
    ),
    *(
        Example(
            "model",
            name,
            batch=lambda side=side: {"pixel_values": images(1, 3, side, side), "labels": torch.tensor([0])},
            size_of="metaformer",
        )
        for names, side in ((POOLFORMERS, 64), (HYBRIDS, 224))
        for name in names
    ),
]


def make(**options: Any) -> MetaFormer:
    torch.manual_seed(0)
    return MetaFormer(**(TINY | options)).eval()


def spread(model: nn.Module) -> nn.Module:
    """Weights at which every branch matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.2)
    return model


@pytest.mark.parametrize(("name", "count"), [(n, c) for n, (c, _) in (POOLFORMERS | HYBRIDS).items()])
def test_parameter_counts_of_the_paper(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in registry.find("model", name)().parameters()) == count


@pytest.mark.parametrize(("name", "giga"), [(n, g) for n, (_, g) in (POOLFORMERS | HYBRIDS).items() if g])
def test_multiply_adds_at_224_pixels(name: str, giga: float) -> None:
    """Counted: convolutions and linear layers (not attention's products), and five a number that a norm returns."""
    normed = 0

    def count(module: nn.Module, given: Any, output: Tensor) -> None:
        nonlocal normed
        normed += 5 * output.numel()

    with torch.device("meta"):
        model, x = registry.find("model", name)().eval(), torch.empty(1, 3, 224, 224)
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    wanted = {torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm}
    flops = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in wanted)
    assert (flops / 2 + normed) / 1e9 == pytest.approx(giga, rel=0.005)


NAMES = (
    ("poolformer.encoder.patch_embeddings.", "embeds."),
    (".projection.", "."),
    ("poolformer.encoder.block.", "stages."),
    (".before_norm.", ".norm1."),
    (".after_norm.", ".norm2."),
    (".output.conv1.", ".feed_forward.up."),
    (".output.conv2.", ".feed_forward.down."),
    (".layer_scale_1", ".scale1.scale"),
    (".layer_scale_2", ".scale2.scale"),
    ("classifier.", "head."),
)


def ours(name: str) -> str:
    """transformers' name of a weight -> ours."""
    for theirs, own in NAMES:
        name = name.replace(theirs, own)
    return f"norms.0.{name.removeprefix('norm.')}" if name.startswith("norm.") else name


@pytest.mark.parametrize("size", [(64, 64), (40, 56), (35, 67)])
def test_it_is_the_poolformer_of_transformers(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
    config = transformers.PoolFormerConfig(**sizes, num_labels=5, layer_scale_init_value=0.5)
    torch.manual_seed(1)
    peer = spread(transformers.PoolFormerForImageClassification(config)).eval()
    model = make(depths=(1, 2, 1, 1), widths=(8, 16, 24, 32))
    model.load_state_dict({ours(name): tensor for name, tensor in peer.state_dict().items()})
    x = images(2, 3, *size)
    got, want = model(x), peer(x).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    theirs = {ours(name): p.grad for name, p in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-3, rtol=1e-3, msg=name)


def timm_state(depths: tuple[int, ...], widths: tuple[int, ...], classes: int) -> dict[str, Tensor]:
    """The weights of timm's poolformer of these sizes, under timm's names."""
    shapes: dict[str, tuple[int, ...]] = {"stem.conv.weight": (widths[0], 3, 7, 7), "stem.conv.bias": (widths[0],)}
    for i, (depth, w) in enumerate(zip(depths, widths, strict=True)):
        if i:
            shapes[f"stages.{i}.downsample.conv.weight"] = (w, widths[i - 1], 3, 3)
            shapes[f"stages.{i}.downsample.conv.bias"] = (w,)
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}."
            vectors = ("norm1.weight", "norm1.bias", "layer_scale1.scale", "norm2.weight", "norm2.bias")
            shapes |= {block + name: (w,) for name in (*vectors, "layer_scale2.scale", "mlp.fc2.bias")}
            shapes |= {f"{block}mlp.fc1.weight": (4 * w, w, 1, 1), f"{block}mlp.fc1.bias": (4 * w,)}
            shapes[f"{block}mlp.fc2.weight"] = (w, 4 * w, 1, 1)
    shapes |= {"head.norm.weight": (widths[-1],), "head.norm.bias": (widths[-1],)}
    shapes |= {"head.fc.weight": (classes, widths[-1]), "head.fc.bias": (classes,)}
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def test_timms_names_become_ours_one_to_one() -> None:
    depths, widths = (1, 2, 11, 1), (8, 16, 24, 32)
    theirs = timm_state(depths, widths, 5)
    renamed = load_timm(theirs)
    wanted = make(depths=depths, widths=widths).state_dict()
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in wanted.items()}
    assert len(renamed) == len(theirs)
    assert renamed["embeds.3.bias"] is theirs["stages.3.downsample.conv.bias"]
    assert renamed["stages.2.10.feed_forward.down.weight"] is theirs["stages.2.blocks.10.mlp.fc2.weight"]


def test_a_layer_scale_of_zero_makes_every_stage_the_identity() -> None:
    model = make(layer_scale=0.0)
    for stage, width in zip(model.stages, TINY["widths"], strict=True):
        x = images(2, width, 4, 5)
        assert torch.equal(stage(x), x)
    assert not torch.equal(make(layer_scale=0.1).stages[0](images(2, 8, 4, 5)), images(2, 8, 4, 5))


def test_drop_path_grows_linearly_over_all_stages() -> None:
    model = make(depths=(1, 2, 3), widths=(8, 8, 8), drop_path=0.5)
    rates = [block.drop_path.rate for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert make(depths=(1,), widths=(8,), drop_path=0.5).stages[0][0].drop_path.rate == 0.0


def test_drop_path_leaves_out_whole_rows_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 2, 1, 3)
    y = layer(x)
    rows = y.flatten(1)
    assert ((rows == 0).all(1) | torch.isclose(rows, torch.tensor(1 / 0.75)).all(1)).all()
    assert rows.mean() == pytest.approx(1.0, abs=0.05)
    assert layer.eval()(x) is x


def permuted(x: Tensor) -> Tensor:
    order = torch.randperm(x.shape[2] * x.shape[3], generator=torch.Generator().manual_seed(3))
    return x.flatten(2)[..., order].view_as(x)


@pytest.mark.parametrize(("mixer", "commutes"), [("identity_mixer", True), ("pooling_mixer", False)])
def test_without_mixing_a_stage_commutes_with_any_order_of_the_cells(mixer: str, commutes: bool) -> None:
    stage = spread(make(mixers=mixer, layer_scale=0.5)).stages[1]
    x = images(2, 16, 4, 5)
    assert torch.allclose(stage(permuted(x)), permuted(stage(x)), atol=1e-5) is commutes


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "pooling": lambda: PoolingMixer(),
    "identity": lambda: IdentityMixer(),
    "random": lambda: RandomMixer((2, 3), seed=0),
    "spatial_linear": lambda: SpatialLinearMixer((2, 3)),
    "attention": lambda: Attention(4, 2),
}


@pytest.mark.parametrize("norm", ["channel_layer_norm", "channel_norm_2d"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradcheck_of_a_block_with_every_mixer(mixer: str, norm: str) -> None:
    torch.manual_seed(0)
    block = spread(MetaFormerBlock(4, MIXERS[mixer](), mlp_ratio=2, norm=norm, layer_scale=0.5)).double()
    x = images(1, 4, 2, 3).double().requires_grad_()
    weights = tuple(p.detach().clone().requires_grad_() for p in block.parameters())
    names = [n for n, _ in block.named_parameters()]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.parametrize(
    "mixer", ["pooling_mixer", "identity_mixer", "random_mixer", "spatial_linear_mixer", {**ATTENTION, "head_width": 4}]
)
def test_gradients_reach_every_parameter(mixer: Any) -> None:
    model = make(mixers=mixer, image=(16, 24), positions=(False, True), widths=(8, 32)).train()
    model(images(2, 3, 16, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_block_is_its_two_equations() -> None:
    block = spread(MetaFormerBlock(4, PoolingMixer(), layer_scale=0.5))
    x = images(2, 4, 3, 3)
    s1, s2 = (s.scale[:, None, None] for s in (block.scale1, block.scale2))
    normed = F.group_norm(x, 1, block.norm1.weight, block.norm1.bias)
    y = x + s1 * (F.avg_pool2d(normed, 3, 1, 1, count_include_pad=False) - normed)
    up, down = block.feed_forward.up, block.feed_forward.down
    hidden = F.gelu(F.conv2d(F.group_norm(y, 1, block.norm2.weight, block.norm2.bias), up.weight, up.bias))
    torch.testing.assert_close(block(x), y + s2 * F.conv2d(hidden, down.weight, down.bias))


def test_the_ablations_leave_the_mixer_alone() -> None:
    x = images(2, 8, 4, 4)
    alone = MetaFormerBlock(8, PoolingMixer(), layer_scale=None, mlp=False, residual=False)
    assert [n for n, _ in alone.named_parameters()] == ["norm1.weight", "norm1.bias"]
    assert torch.equal(alone(x), PoolingMixer()(alone.norm1(x)))
    kept = MetaFormerBlock(8, PoolingMixer(), layer_scale=None, mlp=False)
    assert torch.equal(kept(x), x + PoolingMixer()(kept.norm1(x)))


def test_features_of_all_stages() -> None:
    model = make(depths=(1, 1, 1, 1), widths=(8, 12, 16, 20), features_only=True)
    shapes = [tuple(m.shape[1:]) for m in model(images(1, 3, 64, 96))]
    assert shapes == [(8, 16, 24), (12, 8, 12), (16, 4, 6), (20, 2, 3)]
    model(images(1, 3, 64, 96))[0].sum().backward()
    assert len(model.norms) == 4
    assert isinstance(model.head, nn.Identity)


def test_no_classes_gives_what_the_head_would_read() -> None:
    full, bare = make(), make(classes=0)
    bare.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("head.")})
    x = images(2, 3, 16, 20)
    assert bare(x).shape == (2, 16)
    torch.testing.assert_close(full.head(bare(x)), full(x))


def test_grids_are_what_the_convolutions_give() -> None:
    model = make(depths=(1, 1, 1), widths=(4, 8, 8), features_only=True)
    for size in ((16, 16), (33, 70), (3, 3), (224, 225)):
        found = stage_grids(size, 3, (7, 4, 2), (3, 2, 1))
        assert found == [tuple(m.shape[2:]) for m in model(images(1, 3, *size))]


def test_a_sequence_mixer_reads_the_cells_row_by_row() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 2), images(2, 8, 3, 4)
    expected = attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(MetaFormerBlock(8, attention).mixer(x), expected)


def test_positions_start_at_zero_and_are_resized_on_request() -> None:
    model = make(image=16, positions=(False, True))
    plain = make()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("positions.")})
    x = images(2, 3, 16, 16)
    assert torch.equal(model(x), plain(x))
    assert {n: tuple(p.shape) for n, p in model.positions.named_parameters()} == {"1.embedding": (1, 16, 2, 2)}
    with torch.no_grad():
        model.positions[1].embedding.fill_(0.3)
    with pytest.raises(ShapeError, match=r"for \(2, 2\) cells, the image has \(3, 4\).*resize_positions"):
        model(images(1, 3, 24, 32))
    model.resize_positions((24, 32))
    assert model(images(1, 3, 24, 32)).shape == (1, 5)
    torch.testing.assert_close(model.positions[1].embedding, torch.full((1, 16, 3, 4), 0.3))


def test_a_recipe_names_another_mixer_for_every_stage_and_it_is_saved(tmp_path: Any) -> None:
    stages = ["pooling_mixer", {"name": "attention", "head_width": 8}]
    node = {"name": "metaformer", **TINY, "mixers": stages, "norm": "channel_norm_2d", "image": 16, "positions": True}
    torch.manual_seed(0)
    model = spread(build(node, "model")).eval()
    assert type(model.stages[0][0].mixer) is PoolingMixer
    assert model.stages[1][1].mixer.mixer.head_width == 8
    io.save(model, tmp_path / "saved")
    x = images(2, 3, 16, 16)
    assert torch.equal(io.load(tmp_path / "saved").eval()(x), model(x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mixers": ["pooling_mixer"]}, RecipeError, "mixers has 1 entries for 2 stages"),
        ({"widths": (8, 16, 32)}, RecipeError, "widths has 3 entries"),
        ({"positions": (True,)}, RecipeError, "positions has 1 entries"),
        ({"depths": (), "widths": ()}, ShapeError, "at least 1"),
        ({"depths": (0, 1)}, ShapeError, "at least 1"),
        ({"positions": True}, RecipeError, "give `image`"),
        ({"mixers": "spatial_linear_mixer"}, LaminaError, "grid"),
        ({"mixers": "poling_mixer"}, LaminaError, "did you mean 'pooling_mixer'"),
        ({"mixers": {"name": "pooling_mixer", "kernel_size": 2}}, LaminaError, "odd"),
        ({"mixers": {"name": "attention", "heads": 3}}, LaminaError, "does not divide"),
        ({"mixers": {"name": "attention", "head_width": 3}}, ShapeError, "8 does not divide into heads of 3"),
        ({"drop_path": 1.0}, RecipeError, "below 1"),
        ({"drop_path": 1.0, "depths": (1,), "widths": (8,)}, RecipeError, "below 1"),
        ({"classes": -1}, ShapeError, "classes must not be negative"),
        ({"channels": 0}, ShapeError, "channels and mlp_ratio positive"),
        ({"mlp_ratio": 0.0}, ShapeError, "channels and mlp_ratio positive"),
        ({"image": 2}, ShapeError, "leaves no pixel for stage 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 1, 16, 16), r"\(B, 3, H, W\)"),
        ((3, 16, 16), r"\(B, 3, H, W\)"),
        ((1, 3, 2, 40), "both sides must be at least 3"),
    ],
)
def test_bad_images_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        make()(images(*shape))


def test_heads_are_as_wide_as_the_mixer_says() -> None:
    narrow = make(widths=(16, 24), mixers={"name": "attention", "head_width": 4})
    assert [stage[0].mixer.mixer.heads for stage in narrow.stages] == [4, 6]
    assert make(widths=(16, 64), mixers="attention").stages[1][0].mixer.mixer.heads == 2


def test_one_cell_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    model(images(1, 3, 16, 16))
    assert not caplog.text
    for _ in range(2):
        model(images(1, 3, model.smallest, model.smallest))
    assert caplog.text.count("one cell of the images") == 1


def test_the_smallest_image_is_the_smallest() -> None:
    for patch, down in (((7, 4, 2), (3, 2, 1)), ((2, 2, 0), (2, 2, 0)), ((3, 1, 1), (3, 2, 0))):
        model = make(patch=patch, downsample=down)
        assert model(images(1, 3, model.smallest, model.smallest)).shape == (1, 5)
        with pytest.raises(ShapeError, match="leaves no pixel"):
            stage_grids(model.smallest - 1, 2, patch, down)


def test_any_size_runs_in_one_compiled_graph() -> None:
    model = make(depths=(1, 1))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((16, 16), (24, 40), (33, 17)):
            torch.testing.assert_close(compiled(images(2, 3, *size)), model(images(2, 3, *size)))
