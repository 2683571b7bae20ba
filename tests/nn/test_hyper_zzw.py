"""The operators: global and local products, gates, grouped standardisation, the block."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.processes import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lamina.errors import RecipeError, ShapeError
from lamina.models import MetaFormer
from lamina.nn import (
    GroupInstanceBatchNorm,
    HyperChannelInteraction,
    HyperInteraction,
    HyperZZWGlobal,
    HyperZZWLocal,
    RecursiveGatedUnit,
    SFNEBlock,
    global_product,
    slow_kernel_distance,
)
from lamina.nn.hyper_convolution import group_norm, local
from lamina.nn.hyper_convolution.global_product import mixer_kernels, two_product
from lamina.nn.hyper_convolution.group_norm import interleaved


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FOUR = lambda: (maps(2, 4, 3, 3),)  # noqa: E731
EXAMPLES = [
    Example("mixer", "hyper_zzw_global", {"width": 4, "grid": (3, 3), "hidden": 4}, inputs=FOUR, bad={"grid": (3, 4)}),
    Example("layer", "hyper_zzw_local", {"width": 4, "kernel_size": 3, "hidden": 4}, FOUR, bad={"kernel_size": 4}),
    Example("norm", "group_instance_batch_norm", {"width": 4, "groups": 2}, inputs=FOUR, bad={"groups": 3}),
]


def seeded(kind: Any, *args: object, **options: object) -> Any:
    """Build a part and move every weight, so that no bias is zero."""
    torch.manual_seed(0)
    module = kind(*args, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module


def silenced(module: nn.Module) -> nn.Module:
    """Slow kernels that are zero."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if ".out." in name:
                p.zero_()
    return module


@pytest.mark.parametrize("side", [1, 3, 7])
def test_the_global_product_is_a_triple_loop(side: int) -> None:
    context, y = maps(2, 2, side, side), maps(2, 2, side, side, seed=1)
    expected = torch.zeros_like(y)
    for i in range(side):
        for j in range(side):
            for k in range(side):
                expected[:, :, i, j] += context[:, :, i, k] * y[:, :, k, j]
    torch.testing.assert_close(global_product(context, y), expected)


def test_ones_times_the_identity_map_give_x_back() -> None:
    x = maps(2, 3, 5, 5)
    assert torch.equal(global_product(x * torch.ones(1, 3, 5, 5), torch.eye(5).expand(2, 3, 5, 5)), x)


def test_a_cell_sees_its_column_and_two_in_a_row_see_everything() -> None:
    context, y = maps(1, 1, 5, 5), maps(1, 1, 5, 5, seed=1).requires_grad_()
    (seen,) = torch.autograd.grad(global_product(context, y)[0, 0, 1, 3], y)
    assert seen[0, 0, :, 3].all()
    assert seen.count_nonzero() == 5
    mixer = seeded(HyperZZWGlobal, 1, (5, 5))
    x = maps(1, 1, 5, 5).requires_grad_()
    (seen,) = torch.autograd.grad(mixer(x)[0, 0, 1, 3], x)
    assert seen.count_nonzero() == 9, "row and column of the cell"
    (seen,) = torch.autograd.grad(mixer(mixer(x))[0, 0, 1, 3], x)
    assert seen.all(), "everything"


def test_the_mixer_is_the_product_with_its_kernel_at_any_size() -> None:
    mixer = seeded(HyperZZWGlobal, 2, (4, 4), omega0=0.1)
    for side in (2, 4, 7):
        x = maps(2, 2, side, side)
        expected = (x * mixer.kernel(size=side)) @ x * (4 / side)
        torch.testing.assert_close(mixer(x), expected)
    # On twice as fine a grid a smooth map's product is the same function: a row keeps its weight.
    x = F.interpolate(maps(1, 2, 3, 3), (32, 32), mode="bicubic", align_corners=True)
    fine = mixer(F.interpolate(x, (63, 63), mode="bilinear", align_corners=True))
    torch.testing.assert_close(fine[..., ::2, ::2], mixer(x), rtol=0.1, atol=0.05 * mixer(x).abs().max().item())


def test_the_two_product_is_the_kernel_times_the_square() -> None:
    kernel, y = maps(1, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(two_product(kernel, y), kernel * y**2)


@pytest.mark.parametrize("kind", ["channels", "both"])
def test_a_gate_lies_between_nothing_and_all_and_is_one_half_where_its_kernel_is_zero(kind: str) -> None:
    gate = seeded(HyperChannelInteraction, 6) if kind == "channels" else seeded(HyperInteraction, 6, 5)
    x = maps(3, 6, 5, 5) + 1
    share = gate(x) / x
    assert (share >= 0).all()
    assert (share <= 1).all()
    assert share.std() > 0.01
    assert torch.equal(silenced(gate)(x), x * 0.5)


def test_gates_are_the_formulas() -> None:
    x, y = maps(2, 6, 3, 3), maps(2, 6, 3, 3, seed=1)
    gate = seeded(HyperChannelInteraction, 6)
    score = gate.kernel()[0, 0] * x.mean((2, 3)) ** 2
    torch.testing.assert_close(gate(x), x * torch.sigmoid(score)[..., None, None])
    both = seeded(HyperInteraction, 6, 3)
    channels = both.channels()[0, 0] * y.mean((2, 3)) ** 2
    places = both.positions()[0, 0] * y.mean(1) ** 2
    torch.testing.assert_close(both(y, x), x * torch.sigmoid(channels[..., None, None] * places[:, None]))
    assert torch.equal(both(x), both(x, x))
    assert both(maps(1, 6, 7, 7)).shape == (1, 6, 7, 7)


def test_the_gated_unit_is_the_formula_and_runs_at_other_sizes() -> None:
    unit, x = seeded(RecursiveGatedUnit, 3, 5, 4), maps(2, 3, 4, 4)
    k, v = (
        torch.einsum("oc,bchw->bohw", m.weight[..., 0, 0], x) + m.bias[:, None, None] for m in (unit.key, unit.value)
    )
    q = torch.einsum("oc,bchw->bohw", unit.query.weight[..., 0, 0], v) + unit.query.bias[:, None, None]
    z = k * q
    z = (z - z.mean((2, 3), keepdim=True)) / (z.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    expected = unit.out(F.gelu(z) + unit.position_bias)
    torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)
    assert unit(maps(1, 3, 9, 9)).shape == (1, 5, 9, 9)


@pytest.mark.parametrize(("width", "groups", "batch"), [(6, 2, 3), (6, 3, 1), (4, 1, 2), (12, 12, 2)])
def test_even_groups_are_standard_over_the_batch_and_odd_ones_image_by_image(
    width: int, groups: int, batch: int
) -> None:
    norm, x = GroupInstanceBatchNorm(width, groups), 3 * maps(batch, width, 4, 7) + 5
    x = (x + maps(batch, width, 1, 1, seed=1)).requires_grad_()
    y = norm(x)
    assert torch.equal(y, norm.eval()(x)), "batch statistics in evaluation too"
    expected = torch.cat(
        [
            F.batch_norm(part, None, None, training=True) if i % 2 == 0 else F.instance_norm(part)
            for i, part in enumerate(x.chunk(groups, 1))
        ],
        dim=1,
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weight = maps(*x.shape, seed=2)
    found, wanted = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    half = norm(x.bfloat16())
    assert half.dtype is torch.bfloat16
    assert (half.float() - y).abs().max() < 0.05


def test_running_statistics_are_those_of_torchs_batch_norm_and_make_images_independent() -> None:
    ours, torchs = GroupInstanceBatchNorm(6, 2, track_stats=True), nn.BatchNorm2d(3, affine=False)
    for seed in range(3):
        x = maps(2, 6, 3, 3, seed=seed) * 2 + 1
        ours(x)
        torchs(x[:, :3])
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    x = maps(3, 6, 3, 3)
    torch.testing.assert_close(ours.eval()(x)[:, :3], torchs.eval()(x[:, :3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x)[:1], ours(x[:1]))
    assert interleaved(torch.tensor([[[0.0], [2], [4]]]), torch.tensor([[[1.0], [3]]])).flatten().tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_the_local_operator_is_the_formula() -> None:
    local, x, y = seeded(HyperZZWLocal, 3, 3, hidden=4), maps(2, 3, 6, 5), maps(2, 3, 6, 5, seed=1)
    u = F.conv2d(F.adaptive_avg_pool2d(x, 3), local.context_in.weight, local.context_in.bias).mean(0, keepdim=True)
    u = F.gelu(F.conv2d(u, local.context_out.weight, local.context_out.bias))
    kernel = local.kernel(u)[0]
    convolved = torch.stack([F.conv2d(y[:, c : c + 1], kernel[c][None, None], padding=1)[:, 0] for c in range(3)], 1)
    mixed = F.batch_norm(local.mix(convolved), None, None, training=True)
    torch.testing.assert_close(local(x, y), F.gelu(mixed) + local.bias, rtol=1e-4, atol=1e-5)
    assert torch.equal(local(x), local(x, x))
    assert not torch.allclose(local(x, y), local(y, y), atol=1e-2), "the kernel comes from x"


def test_an_answer_depends_on_the_batch_as_published_and_not_with_the_two_options() -> None:
    x = maps(3, 3, 6, 6)
    published = seeded(HyperZZWLocal, 3, 5).eval()
    assert (published(x)[:1] - published(x[:1])).abs().max() > 1e-2
    alone = seeded(HyperZZWLocal, 3, 5, per_sample=True, track_stats=True)
    alone(x)
    torch.testing.assert_close(alone.eval()(x)[:1], alone(x[:1]), rtol=1e-4, atol=1e-5)
    kernels = alone.kernel(alone.context(x))
    assert not torch.allclose(kernels[0], kernels[1], atol=1e-3), "every image has a kernel of its own"


def test_the_block_is_put_together_as_the_card_says() -> None:
    block = seeded(SFNEBlock, 4, 2, 4, groups=4, local_kernels=(3, 5, 3, 1), skips=(2, 4))
    x, prev, earlier = maps(2, 4, 4, 4), maps(2, 2, 4, 4, seed=1), maps(2, 4, 4, 4, seed=2)
    norm = F.instance_norm
    ctx = x * block.slow()
    fast, mx, hc = norm(block.unit_of_slow(ctx) + block.unit(x)), norm(block.project(x)), norm(block.channel_gate(x))
    o, ox, oh = ctx @ fast, ctx @ mx, ctx @ hc
    l1, l2, l3, l4 = (m(a, b) for m, (a, b) in zip(block.locals, [(x, hc), (hc, x), (mx, x), (x, mx)], strict=True))
    parts = [fast, o, ox, torch.sigmoid(o) * o, oh, l1, l2, l3, l4, block.gate(o, x), prev.repeat(1, 2, 1, 1), earlier]
    y = F.gelu(block.norm(block.join(torch.cat(parts, 1)))) + block.bias
    torch.testing.assert_close(block(x, prev, earlier), y, rtol=1e-4, atol=1e-4)
    dropping = copy.deepcopy(block).train()
    dropping.dropout = 0.5
    whole = dropping(x, prev, earlier).eq(0).flatten(2)
    assert (whole.all(2) == whole.any(2)).all(), "whole channels"
    assert whole.any()
    assert torch.equal(dropping.eval()(x, prev, earlier), block.eval()(x, prev, earlier))


def test_branches_are_left_out_with_their_weights() -> None:
    options: dict[str, Any] = {"groups": 2, "local_kernels": (3, 3, 3, 3)}
    sizes = {}
    for branches in (("global", "local"), ("local",), ("global",)):
        block = seeded(SFNEBlock, 2, 2, 4, branches=branches, **options)
        block(maps(2, 2, 4, 4)).sum().backward()
        assert all(p.grad is not None for p in block.parameters())
        sizes[branches] = block.join.in_channels
    assert list(sizes.values()) == [20, 12, 12]


def test_the_slow_loss_is_zero_exactly_where_tiled_kernels_coincide() -> None:
    small, factors = maps(1, 2, 3, 3), [3, 2, 5]
    middle = small.repeat(1, 3, 1, 1)
    kernels = [small, middle, middle.repeat(1, 2, 1, 1)]
    assert slow_kernel_distance(kernels, factors) == 0
    other = [k + 0.1 * i for i, k in enumerate(kernels)]
    torch.testing.assert_close(slow_kernel_distance(other, factors), torch.tensor(0.01 + 0.04 + 0.01))
    swapped = [small, small.repeat_interleave(3, 1)]
    assert slow_kernel_distance(swapped, factors) > 0.1, "tiled, not repeated one by one"
    assert slow_kernel_distance([small], [1]) == 0
    with pytest.raises(ShapeError, match="2 times along its channels, does not make kernel 1"):
        slow_kernel_distance(kernels[:2], [2, 2])
    with pytest.raises(ShapeError, match="as many factors as kernels"):
        slow_kernel_distance(kernels, [3, 2])


def test_kernels_of_mixers_in_any_model_are_compared_on_the_largest_grid() -> None:
    torch.manual_seed(0)
    mixer = {"name": "hyper_zzw_global", "hidden": 8}
    model = MetaFormer((1, 1), (4, 8), mixers=mixer, image=16, classes=3, patch=(3, 2, 1))
    kernels, factors = mixer_kernels(model)
    assert [tuple(k.shape) for k in kernels] == [(1, 4, 8, 8), (1, 8, 8, 8)]
    assert factors == [2, 1]
    assert slow_kernel_distance(kernels, factors) > 0
    with pytest.raises(ShapeError, match=r"multiple of the channels before it, got \[4, 6\]"):
        mixer_kernels(nn.ModuleList([HyperZZWGlobal(4, (2, 2)), HyperZZWGlobal(6, (2, 2))]))


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(ShapeError, match=r"grid must be square, got \(3, 4\)"):
        HyperZZWGlobal(4, (3, 4))
    with pytest.raises(ShapeError, match=r"square maps \(B, 4, S, S\), got .* \(1, 4, 3, 4\)"):
        HyperZZWGlobal(4, (3, 3))(maps(1, 4, 3, 4))
    with pytest.raises(ShapeError, match="equal square maps"):
        global_product(maps(1, 2, 3, 3), maps(1, 2, 4, 4))
    with pytest.raises(ShapeError, match="groups must divide width"):
        GroupInstanceBatchNorm(10)
    with pytest.raises(ShapeError, match=r"takes floating-point maps \(B, 12, H, W\)"):
        GroupInstanceBatchNorm(12)(maps(1, 6, 2, 2))
    with pytest.raises(ShapeError, match="batch statistics of one number are not defined"):
        HyperZZWLocal(3, 3)(maps(1, 3, 1, 1))
    with pytest.raises(ShapeError, match="one position have no variance"):
        GroupInstanceBatchNorm(4, 2)(maps(3, 4, 1, 1))
    with pytest.raises(ShapeError, match="kernel_size must be odd"):
        HyperZZWLocal(3, 4)
    with pytest.raises(ShapeError, match="and \\(1, 3, 5, 5\\)"):
        HyperZZWLocal(3, 3)(maps(1, 3, 4, 4), maps(1, 3, 5, 5))
    with pytest.raises(ShapeError, match="two maps of one shape"):
        HyperInteraction(3, 4)(maps(1, 3, 4, 4), maps(2, 3, 4, 4))
    with pytest.raises(ShapeError, match="5 channels cannot be tiled to the block's 4"):
        SFNEBlock(4, 3, 4, skips=(5,))
    with pytest.raises(ShapeError, match=r"reads earlier outputs of \(2,\) channels, got \[\]"):
        SFNEBlock(4, 3, 4, skips=(2,))(maps(1, 4, 4, 4))
    with pytest.raises(ShapeError, match="four local operators"):
        SFNEBlock(4, 3, 4, local_kernels=(3,))
    with pytest.raises(RecipeError, match="branches are 'global', 'local' or both, got"):
        SFNEBlock(4, 3, 4, branches=("loca",))
    for wrong in ({"dropout": 1.0}, {"bottleneck": 0}):
        with pytest.raises(ShapeError, match="at least"):
            SFNEBlock(**{"width": 4, "bottleneck": 3, "size": 4} | wrong)


def _half(rank: int) -> list[Any]:
    block, x = seeded(SFNEBlock, 2, 2, 4, groups=2, local_kernels=(3, 5, 3, 3), sync=True), maps(6, 2, 4, 4)
    wrapped = DistributedDataParallel(block)
    wrapped(x[3 * rank : 3 * rank + 3]).square().mean().backward()
    return [p.grad for p in block.parameters() if p.grad is not None]


@pytest.mark.parametrize("track_stats", [False, True])
def test_in_evaluation_nothing_waits_for_other_processes(track_stats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(*_: Any, **__: Any) -> None:
        raise RuntimeError("a collective")

    for module in (group_norm, local):
        monkeypatch.setattr(module, "token_moments", meet)
    synced, alone = (
        seeded(HyperZZWLocal, 4, 3, 8, 2, track_stats=track_stats, sync=sync).eval() for sync in (True, False)
    )
    x = maps(2, 4, 5, 6)
    assert torch.equal(synced(x), alone(x))
    with pytest.raises(RuntimeError, match="a collective"):
        synced.train()(x)
    with pytest.raises(ShapeError, match="one number"):
        GroupInstanceBatchNorm(4, 1, sync=True)(maps(1, 4, 1, 1))


def _unequally(rank: int) -> list[Any]:
    block = seeded(HyperZZWLocal, 4, 3, 8, 2, sync=True).eval()
    return [block(maps(2, 4, 5, 6, seed=i)).detach() for i in range(1 + 2 * rank)]


@pytest.mark.slow  # Two processes; the test before says the same of one.
@pytest.mark.distributed
def test_processes_may_evaluate_unequally_many_batches(tmp_path: Path) -> None:
    found = in_processes(_unequally, 2, tmp_path)
    alone = seeded(HyperZZWLocal, 4, 3, 8, 2).eval()
    for rank in range(2):
        assert len(found[rank]) == 1 + 2 * rank
        for i, answer in enumerate(found[rank]):
            torch.testing.assert_close(answer, alone(maps(2, 4, 5, 6, seed=i)))


@pytest.mark.slow  # Two processes; the norm's statistics over processes are in the contract of the objective.
@pytest.mark.distributed
def test_two_processes_with_synchronised_means_are_one(tmp_path: Path) -> None:
    found = in_processes(_half, 2, tmp_path)
    whole = seeded(SFNEBlock, 2, 2, 4, groups=2, local_kernels=(3, 5, 3, 3))
    whole(maps(6, 2, 4, 4)).square().mean().backward()
    for rank in range(2):
        for p, gradient in zip(whole.parameters(), found[rank], strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)
