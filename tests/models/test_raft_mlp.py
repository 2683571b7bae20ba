from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.nn.test_resize_token_mixing import resizes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lamina import io, registry
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import RaftMLP, VisionTransformer, load_raft_mlp, raft_mlp_m
from lamina.models._raft_mlp_block import level_grids
from lamina.models.metaformer import MetaFormer
from lamina.nn import IdentityMixer, MixerTokenMixing, RaftTokenMixing, ResizeTokenMixing
from lamina.recipe import build


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TINY: dict[str, Any] = {"widths": (4, 8), "depths": (1, 2), "patches": (2, 2), "image": 12, "classes": 5}
SIZES = {
    "raft_mlp_s": (9_868_768, 2.101),
    "raft_mlp_m": (21_413_632, 4.289),
    "raft_mlp_l": (36_184_672, 6.571),
    "mixer_b16_e2": (59_918_200, 12.649),
}
ONE: dict[str, Any] = {"widths": (768,), "depths": (12,), "patches": (16,)}
OTHERS: dict[str, tuple[dict[str, Any], int, float]] = {
    "r = 1": (ONE | {"embedding": "patch", "rafts": 1}, 58_105_432, 11.445),
    "r = 2": (ONE | {"embedding": "patch", "rafts": 2}, 58_162_888, 11.647),
    "r = 4": (ONE | {"embedding": "patch", "rafts": 4}, 58_390_696, 12.052),
    "r = 2, wide": (ONE | {"kernels": ((16, 32),)}, 60_522_184, 12.109),
    "deep": (ONE | {"embedding": "patch", "widths": (384,), "depths": (36,)}, 43_532_296, 9.030),
    "M, plain": ({"widths": (96, 192, 384, 768), "embedding": "patch"}, 19_920_640, 3.769),
}
EXAMPLES = [
    Example(
        "model",
        "raft_mlp",
        TINY | {"shortcut": True, "drop_path": 0.2},
        batch=lambda: {"pixel_values": images(2, 3, 12, 12), "labels": torch.tensor([0, 4])},
        bad={"rafts": 3},
    ),
    *(
        Example(
            "model",
            name,
            {"image": 64},
            batch=lambda: {"pixel_values": images(1, 3, 64, 64), "labels": torch.tensor([0])},
            size_of="raft_mlp",
        )
        for name in SIZES
    ),
]


def make(**options: Any) -> RaftMLP:
    torch.manual_seed(0)
    return RaftMLP(**(TINY | options)).eval()


def lively(module: nn.Module) -> nn.Module:
    """Norms that are not the identity, and branches that matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


@pytest.mark.parametrize("name", [*SIZES, *OTHERS])
def test_parameters_and_multiply_adds_are_the_papers(name: str) -> None:
    """Counted as fvcore does: products and convolutions, and five for each number that a norm returns."""
    normed = 0

    def count(module: nn.Module, given: Any, output: Tensor) -> None:
        nonlocal normed
        normed += 5 * output.numel()

    options, parameters, giga = OTHERS[name] if name in OTHERS else ({}, *SIZES[name])
    with torch.device("meta"):
        model = registry.find("model", name if name in SIZES else "raft_mlp")(**options).eval()
        x = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == parameters
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    products = counter.get_total_flops() / 2e9
    assert products == pytest.approx(giga, rel=0.01)
    assert products + normed / 1e9 == pytest.approx(giga, rel=1e-3)


def official(model: RaftMLP, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The official network, as the card writes it, on fresh weights under its own names; returns them too."""
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(3)

    def new(name: str, *shape: int) -> Tensor:
        state[name] = (torch.randn(shape, generator=generator) * 0.3).requires_grad_()
        return state[name]

    def mlp(name: str, rows: Tensor, hidden: int) -> Tensor:
        n = rows.shape[-1]
        up = F.gelu(F.linear(rows, new(f"{name}.fn.0.weight", hidden, n), new(f"{name}.fn.0.bias", hidden)))
        return F.linear(up, new(f"{name}.fn.3.weight", n, hidden), new(f"{name}.fn.3.bias", n))

    def norm(name: str, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], new(f"{name}.weight", y.shape[-1]), new(f"{name}.bias", y.shape[-1]))

    maps = []
    for i, (embed, level) in enumerate(zip(model.embeds, model.levels, strict=True)):
        name, p = f"levels.{i}.fn", embed.stride
        kernels = [conv.kernel_size[0] for conv in embed.convs]
        mixer = level[0].token_mixing.mixer
        (ph, pw), c = level[0].token_mixing.grid, embed.convs[0].out_channels
        size = [-(-n // p) * p for n in x.shape[2:]]
        if tuple(size) != tuple(x.shape[2:]):
            x = F.interpolate(x, size, mode="bicubic")
        h, w = size[0] // p, size[1] // p
        if model.lamina_node.get("embedding") == "patch":
            b, cin = x.shape[:2]
            y = x.view(b, cin, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, p * p * cin)
            y = F.linear(y, new(f"{name}.1.weight", c, p * p * cin), new(f"{name}.1.bias", c))
        else:
            y = torch.cat([F.unfold(x, k, padding=(k - p) // 2, stride=p).mT for k in kernels], -1)
            y = F.linear(y, new(f"{name}.0.fc.weight", c, y.shape[-1]), new(f"{name}.0.fc.bias", c))
        for j in range(len(level)):
            block = f"{name}.{2 + j}"
            y = y.mT.unflatten(2, (h, w))  # (B, C, h, w)
            if (h, w) != (ph, pw):
                y = F.interpolate(y, (ph, pw), mode="bicubic")
            if isinstance(mixer, RaftTokenMixing):
                r = mixer.rafts
                y = y.unflatten(1, (r, c // r))  # (B, chw, co, h, w)
                for place, order in (("1", (0, 2, 4, 1, 3)), ("3", (0, 2, 3, 1, 4))):
                    # Positions with the channels in the order (co, chw), as the official norm has them.
                    normed = norm(f"{block}.{place}.norm.1", y.permute(0, 3, 4, 2, 1).flatten(3))
                    normed = normed.unflatten(3, (c // r, r)).permute(0, 4, 3, 1, 2)
                    rows = normed.permute(order).flatten(3)
                    mixed = mlp(f"{block}.{place}", rows, 2 * rows.shape[-1])
                    y = y + mixed.unflatten(3, (r, -1)).permute([order.index(d) for d in range(5)])
                y = y.flatten(1, 2)
            else:
                normed = norm(f"{block}.1.norm.1", y.flatten(2).mT).mT
                y = y + mlp(f"{block}.1", normed, 2 * ph * pw).unflatten(2, (ph, pw))
            if (h, w) != (ph, pw):
                y = F.interpolate(y, (h, w), mode="bicubic")
            y, last = y.flatten(2).mT, "5" if isinstance(mixer, RaftTokenMixing) else "3"
            y = y + mlp(f"{block}.{last}", norm(f"{block}.{last}.norm", y), 4 * c)
        x = y.mT.unflatten(2, (h, w))
        maps.append(x)
    heads = []
    for i, found in enumerate(maps if len(model.shortcuts) else maps[-1:]):
        mean = norm(f"heads.{i}.1", found.movedim(1, -1)).mean((1, 2))
        if found is not maps[-1]:
            wide = 2 * maps[-1].shape[1]
            mean = F.linear(mean, new(f"heads.{i}.4.weight", wide, mean.shape[1]), new(f"heads.{i}.4.bias", wide))
        heads.append(mean)
    answer = heads.pop()
    for one in reversed(heads):
        answer = one[:, : answer.shape[1]] * answer + one[:, answer.shape[1] :]
    return F.linear(answer, new("classifier.weight", 5, answer.shape[1]), new("classifier.bias", 5)), state


KINDS: list[dict[str, Any]] = [
    {},
    {"shortcut": True, "rafts": 4, "image": (9, 13)},
    {"shortcut": True, "widths": (4, 6, 8), "depths": (1, 1, 1), "patches": (2, 2, 2)},
    {"rafts": 1, "embedding": "patch"},
    {"token_mixing": "mixer", "embedding": "patch", "shortcut": True},
    {"token_mixing": "mixer", "kernels": ((2, 6), (2, 4))},
]


@pytest.mark.parametrize("size", [(12, 12), (16, 9), (5, 31)])
@pytest.mark.parametrize("options", KINDS)
def test_it_is_the_official_network_at_any_size_with_all_gradients(
    options: dict[str, Any], size: tuple[int, int]
) -> None:
    model, x = make(**options), images(2, 3, *size)
    expected, state = official(model, x)
    load_raft_mlp(state, model)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = make(**options)
    load_raft_mlp({n: p.grad for n, p in state.items()}, theirs)
    scale = max(float(p.detach().abs().max()) for p in theirs.parameters())
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other).abs().max() < 1e-4 * scale, name


def test_weights_of_other_sizes_are_not_loaded_in_silence() -> None:
    _, state = official(make(), images(1, 3, 12, 12))
    with pytest.raises(RuntimeError, match=r"shortcuts\.0\.weight"):
        load_raft_mlp(state, make(shortcut=True))
    with pytest.raises(RuntimeError, match="something"):
        load_raft_mlp({**state, "something": torch.zeros(1)}, make())


def test_without_weights_in_the_mlps_a_level_is_its_embedding() -> None:
    model, x = make(), images(2, 3, 12, 12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(not any(part in name for part in (".mlp.", ".feed_forward.")))
    embedded = model.embeds[0](x).movedim(1, -1)
    assert torch.equal(model.levels[0](embedded), embedded)


def test_its_own_size_is_not_interpolated_and_every_other_is() -> None:
    model = make(image=16)
    assert resizes(model, images(1, 3, 16, 16)) == 0
    # Three blocks there and back; an image whose sides do not divide is enlarged before.
    assert resizes(model, images(1, 3, 20, 16)) == 6
    assert resizes(model, images(1, 3, 19, 16)) == 7


@pytest.mark.parametrize("size", [(48, 48), (40, 64), (33, 33), (31, 97)])
def test_a_net_for_32_pixels_takes_other_sizes(size: tuple[int, int]) -> None:
    model = lively(make(widths=(4, 8, 8, 12), depths=(1, 1, 1, 1), patches=(4, 2, 2, 2), image=32))
    x = images(2, 3, *size).requires_grad_()
    logits = model(x)
    assert torch.isfinite(logits).all()
    logits.square().sum().backward()
    assert (x.grad != 0).any((0, 1)).float().mean() > 0.9


def test_an_image_far_smaller_than_the_grid_is_warned_about() -> None:
    model = make(image=64, widths=(4,), depths=(1,), patches=(4,))
    with pytest.warns(UserWarning, match=r"\(2, 16\) cells is blown up to the mixer's grid of \(16, 16\)"):
        model(images(1, 3, 8, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(1, 3, 16, 64))


def test_without_resizing_another_size_is_refused() -> None:
    model = make(resize=False)
    assert model(images(1, 3, 12, 12)).shape == (1, 5)
    with pytest.raises(ShapeError, match=r"built for a grid of \(6, 6\), got \(8, 8\)"):
        model(images(1, 3, 16, 16))
    with pytest.raises(ShapeError, match=r"\(13, 12\) does not divide into patches of 2"):
        model(images(1, 3, 13, 12))
    state = make().state_dict()
    model.load_state_dict({name.replace("token_mixing.mixer.", "token_mixing."): v for name, v in state.items()})
    assert torch.equal(model(images(1, 3, 12, 12)), make()(images(1, 3, 12, 12)))


def test_grids_are_rounded_up_level_by_level() -> None:
    assert level_grids(224, (4, 2, 2, 2)) == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert level_grids((33, 70), (4, 2, 2)) == [(9, 18), (5, 9), (3, 5)]
    model = make(image=(33, 70), patches=(4, 2))
    assert [level[0].token_mixing.grid for level in model.levels] == [(9, 18), (5, 9)]


def test_maps_of_all_levels_and_features_before_the_head() -> None:
    maps = make(features_only=True)(images(1, 3, 17, 24))
    assert [tuple(m.shape) for m in maps] == [(1, 4, 9, 12), (1, 8, 5, 6)]
    full, bare = make(), make(classes=0)
    bare.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("head.")})
    x = images(2, 3, 12, 12)
    assert bare(x).shape == (2, 8)
    torch.testing.assert_close(full.head(bare(x)), full(x))
    assert {n for n, _ in make(features_only=True).named_parameters()} == {
        n for n, _ in full.named_parameters() if n.startswith(("embeds.", "levels."))
    }


def test_drop_path_is_the_same_everywhere() -> None:
    model = make(depths=(1, 3), drop_path=0.25)
    blocks = [block for level in model.levels for block in level]
    assert {b.drop_path.rate for b in blocks} == {0.25}
    assert {m.drop_path for b in blocks for m in b.token_mixing.modules() if hasattr(m, "axis")} == {0.25}


def test_slots_of_the_channel_mlps_and_the_head() -> None:
    model = make(linear={"name": "phm_linear", "n": 2}, head={"name": "fourier_head", "num_frequencies": 2})
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("PHMLinear") == 6
    assert kinds.count("FourierHead") == 1
    assert model(images(1, 3, 12, 12)).shape == (1, 5)


def test_a_recipe_names_it_and_it_is_saved_after_a_step(tmp_path: Any) -> None:
    node = {"name": "raft_mlp_s", "drop_path": 0.0}
    torch.manual_seed(0)
    # What the data set offers.
    model = build(node, "model", classes=10, channels=1, image=32)
    assert [level[0].token_mixing.grid[0] for level in model.levels] == [8, 4, 2, 1]
    io.save(model.eval(), tmp_path / "saved")
    x = images(2, 1, 32, 32)
    assert torch.equal(io.load(tmp_path / "saved").eval()(x), model(x))


@pytest.mark.slow  # The compiler writes bicubic interpolation out, for every block anew.
def test_any_size_runs_in_one_compiled_graph() -> None:
    model = make(widths=(4,), depths=(1,), patches=(2,))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((12, 12), (13, 20), (24, 12)):
            torch.testing.assert_close(compiled(images(2, 3, *size)), model(images(2, 3, *size)))


MIXERS = [
    ({"name": "raft_token_mixing", "residual": False}, RaftTokenMixing),
    ({"name": "mixer_token_mixing", "residual": False, "expansion": 1}, MixerTokenMixing),
    ({"name": "resize_token_mixing", "mixer": {"name": "raft_token_mixing", "residual": False}}, ResizeTokenMixing),
]


@pytest.mark.parametrize(("mixer", "kind"), MIXERS)
def test_the_mixers_stand_in_the_slots_of_other_networks(mixer: Any, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(12, 4, 2, 8, 2, classes=5, pool="mean", mixer=mixer)
    meta = MetaFormer((1, 1), (4, 8), mixers=mixer, classes=5, image=16)
    for model, size in ((vit, 12), (meta, 16)):
        assert sum(isinstance(m, kind) for m in model.modules()) == 2
        model(images(2, 3, size, size)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    if kind is ResizeTokenMixing:
        assert meta(images(1, 3, 24, 40)).shape == (1, 5)


def test_without_mixing_the_order_of_the_cells_does_not_matter_and_with_it_it_does() -> None:
    level, x = lively(make()).levels[0], images(2, 6, 6, 4)

    def commutes() -> bool:
        return torch.allclose(level(x.flip(1)), level(x).flip(1), atol=1e-5)

    assert not commutes()
    for block in level:
        block.token_mixing = IdentityMixer()
    assert commutes()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"depths": (1,)}, RecipeError, "depths has 1 entries for 2 levels"),
        ({"patches": (2, 2, 2)}, RecipeError, "patches has 3 entries"),
        ({"kernels": ((2,),)}, RecipeError, "kernels has 1 entries"),
        ({"kernels": ((2, 5), (2,))}, LaminaError, "multiple of the stride 2"),
        ({"kernels": ((4, 2), (2,))}, LaminaError, "first kernel must be the stride 2"),
        ({"patches": (3, 2)}, LaminaError, "a kernel of 6 cannot be centred on a patch of 3"),
        ({"kernels": ((2,), (2,)), "embedding": "patch"}, RecipeError, "the patch alone"),
        ({"embedding": "conv"}, RecipeError, "'multi_scale' or 'patch', got 'conv'"),
        ({"token_mixing": "attention"}, RecipeError, "'raft' or 'mixer', got 'attention'"),
        ({"rafts": 3}, LaminaError, "rafts must divide width, got rafts=3 and width=4"),
        ({"widths": (), "depths": (), "patches": ()}, ShapeError, "at least 1"),
        ({"depths": (0, 1)}, ShapeError, "at least 1"),
        ({"image": 0}, ShapeError, "at least 1 pixel"),
        ({"classes": -1}, ShapeError, "classes must not be negative"),
        ({"channels": 0}, ShapeError, "channels at least 1"),
        ({"drop_path": 1.0}, LaminaError, "below 1"),
        ({"channel_expansion": 0}, ShapeError, "positive"),
        ({"token_expansion": 0}, LaminaError, "expansion must be at least 1"),
        ({"features_only": True, "shortcut": True}, RecipeError, "shortcut would change nothing"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize("shape", [(1, 1, 12, 12), (3, 12, 12), (1, 3, 0, 12)])
def test_bad_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"takes images \(B, 3, H, W\)"):
        make()(images(*shape))


def test_the_plain_embedding_of_a_named_size() -> None:
    with torch.device("meta"):
        model = raft_mlp_m(embedding="patch", features_only=True)
    assert [len(embed.convs) for embed in model.embeds] == [1, 1, 1, 1]
