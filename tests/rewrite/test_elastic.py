"""The pass `elastic` and the view on what it makes: which places are found, and what a part computes."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import ALL, home_made, llama, tokens, vision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError
from lamina.models import ResNet, Transformer
from lamina.nn import Subnet, is_elastic, supernet
from lamina.recipe import Choice
from lamina.rewrite import DropBlock, Elastic, cut_out, history, rewrite, sort_channels
from lamina.rewrite._elastic_places import rounded

transformers = pytest.importorskip("transformers")

EXAMPLES = [
    Example("pass", "elastic", options={"depth": [1, 2], "expand": [0.5], "multiple": 4}, bad={"expand": [0.5, 1.5]}),
]


class InvertedResidual(nn.Module):
    """What a MobileNet is made of, as a user would write it; with squeeze and excitation where asked."""

    def __init__(self, into: int, out: int, expand: int, kernel: int, stride: int, squeeze: bool = False) -> None:
        super().__init__()
        hidden = into * expand
        self.expand = nn.Sequential(nn.Conv2d(into, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        depthwise = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.ReLU6())
        self.reduce, self.raise_ = nn.Conv2d(hidden, hidden // 4, 1), nn.Conv2d(hidden // 4, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))
        self.squeeze, self.residual = squeeze, stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        if self.squeeze:
            y = y * torch.sigmoid(self.raise_(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        y = self.project(y)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    def __init__(self, channels: int = 8, squeeze: bool = False, kernel: int = 5, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU())

        def stage(into: int, out: int) -> nn.Sequential:
            ins = [into, *[out] * (depth - 1)]
            made = [InvertedResidual(i, out, 4, kernel, 2 if n == 0 else 1, squeeze) for n, i in enumerate(ins)]
            return nn.Sequential(*made)

        self.stages = nn.ModuleList([stage(channels, channels), stage(channels, 2 * channels)])
        self.head = nn.Linear(2 * channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for one in self.stages:
            x = one(x)
        return self.head(x.mean((2, 3)))


def mobile(**options: int | bool) -> nn.Module:
    torch.manual_seed(0)
    model = MobileNet(**options).eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model


def images(rows: int = 2, size: int = 15, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))


def elastic(model: nn.Module | None = None, **options: object) -> nn.Module:
    given = {"depth": (1, 2, 3), "expand": (1, 2, 4), "kernel": (3, 5), **options}
    return rewrite(mobile() if model is None else model, Elastic(**given))


def draws(count: int, model: nn.Module) -> list[Subnet]:
    net, generator = supernet(model), torch.Generator().manual_seed(0)
    return [net.full(), net.smallest(), *(net.sample(generator) for _ in range(count))]


def out(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(call(model, batch))


def test_the_places_of_a_mobile_net_are_found() -> None:
    decision = Elastic(depth=(1, 2, 3), expand=(1, 2, 4), kernel=(3, 5)).decide(mobile(squeeze=True))
    assert [s.depths for s in decision.stages] == [(1, 2, 3), (1, 2, 3)]
    assert decision.widths["stages.0.0"] == (1, 2, 4)
    outer, inner = [g for g in decision.groups if g.block == "stages.1.1"]
    assert outer.producers == ("stages.1.1.expand.0", "stages.1.1.raise_")
    assert outer.consumers == ("stages.1.1.reduce", "stages.1.1.project.0")
    assert outer.between == ("stages.1.1.expand.1", "stages.1.1.depthwise.0", "stages.1.1.depthwise.1")
    assert (outer.hidden, outer.choices, outer.inner) == (64, (16, 32, 64), False)
    # round8(m / 4)
    assert (inner.hidden, inner.choices, inner.inner) == (16, (8, 8, 16), True)
    assert set(decision.kernels.values()) == {(3, 5)}
    assert "stages.1.0 ... stages.1.2: 1, 2, 3 blocks" in decision.table()


def test_importance_is_what_leads_on_of_a_channel() -> None:
    model = mobile(squeeze=True)
    block = model.stages[0][1]
    with torch.no_grad():
        block.project[0].weight.fill_(0.1)
        block.project[0].weight[:, 5] = -3.0
        block.reduce.weight[:, 7] = 100.0
        block.raise_.weight[:, 2] = 9.0
    decision = Elastic((1,), (1,)).decide(model)
    outer, inner = [g for g in decision.groups if g.block == "stages.0.1"]
    assert outer.order is not None
    assert outer.order[0] == 5
    assert sorted(outer.order) == list(range(32))
    assert outer.order[1:7] == (0, 1, 2, 3, 4, 6), "ties stay as they stand"
    assert inner.order is not None
    assert inner.order[0] == 2


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("mode", ["slice", "mask"])
def test_the_whole_computes_what_the_model_did_and_no_name_changes(sort: bool, mode: str) -> None:
    model = mobile(squeeze=True)
    before, names, held = out(model, {"x": images()}), list(model.state_dict()), dict(model.named_parameters())
    model = elastic(model, sort=sort, mode=mode, kernel=None)
    assert torch.equal(out(model, {"x": images()}), before)
    assert list(model.state_dict()) == names
    assert all(p is held[n] for n, p in model.named_parameters())
    assert isinstance(model.stages[0][0].expand[0], nn.Conv2d)


def naive(model: nn.Module, x: Tensor, depths: tuple[int, ...], keep: dict[str, list[int]], kernel: int) -> Tensor:
    """A part of the net by hand: some channels of every block, the first blocks, the middle of the kernels."""
    x = model.stem(x)
    for s, (stage, depth) in enumerate(zip(model.stages, depths, strict=True)):
        for b, block in enumerate(list(stage)[:depth]):
            kept, y = keep[f"stages.{s}.{b}"], x
            for conv, norm, _ in (block.expand, block.depthwise):
                if conv.groups > 1:
                    edge = (conv.kernel_size[0] - kernel) // 2
                    weight = conv.weight[kept][:, :, edge : edge + kernel, edge : edge + kernel]
                    y = F.conv2d(y, weight, None, conv.stride, kernel // 2, groups=len(kept))
                else:
                    y = F.conv2d(y, conv.weight[kept])
                taken = (t[kept] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
                y = F.relu6(F.batch_norm(y, *taken))
            conv, norm = block.project
            y = norm(F.conv2d(y, conv.weight[:, kept]))
            x = x + y if block.residual else y
    return model.head(x.mean((2, 3)))


@pytest.mark.parametrize("mode", ["slice", "mask"])
@pytest.mark.parametrize(("size", "sort"), [(1, True), (7, False), (63, True)])
def test_a_part_computes_what_it_does_by_hand(mode: str, size: int, sort: bool) -> None:
    model = mobile()
    decision = Elastic((1,), (0.25,), multiple=1, sort=sort).decide(model)
    keep = {g.block: list((g.order or range(g.hidden))[: g.choices[0]]) for g in decision.groups}
    assert len(keep["stages.1.0"]) == 8
    with torch.no_grad():
        expected = naive(model, images(2, size), (2, 1), keep, 3)
    model = elastic(model, expand=(0.25,), multiple=1, mode=mode, sort=sort)
    net = supernet(model)
    net.set({**net.smallest().to_dict(), "depth": (2, 1)})
    torch.testing.assert_close(out(model, {"x": images(2, size)}), expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        cut = cut_out(model, {**net.smallest().to_dict(), "depth": (2, 1)})
    torch.testing.assert_close(out(cut, {"x": images(2, size)}), expected, rtol=1e-4, atol=1e-5)


def test_a_smaller_kernel_is_the_middle_until_its_map_learns_and_steps_follow_one_another() -> None:
    model = elastic(mobile(kernel=7), kernel=(3, 5, 7))
    conv = model.stages[0][1].depthwise[0]
    conv.elastic_kernel = 3
    assert torch.equal(conv.kernel(), conv.weight[:, :, 2:5, 2:5])
    small, middle = conv.elastic_maps
    with torch.no_grad():
        for one in (small, middle):
            one.add_(torch.randn(one.shape, generator=torch.Generator().manual_seed(0)))
    five = torch.einsum("ij,cj->ci", middle, conv.weight[:, 0, 1:6, 1:6].flatten(1)).view(-1, 5, 5)
    three = torch.einsum("ij,cj->ci", small, five[:, 1:4, 1:4].flatten(1)).view(-1, 1, 3, 3)
    torch.testing.assert_close(conv.kernel(), three)
    conv.elastic_kernel = None
    assert torch.equal(conv.kernel(), conv.weight)
    assert conv.kernel().sum().backward() is None
    assert torch.equal(small.grad, torch.zeros(9, 9)), "data parallelism waits for it"


def with_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def test_what_does_not_run_gets_a_gradient_of_exactly_zero_and_masks_get_the_same() -> None:
    found = {}
    for mode in ("slice", "mask"):
        model = elastic(mode=mode, sort=True)
        net = supernet(model)
        net.set({"depth": (2, 1), "expand": (1, 2, 4, 1, 2, 4), "kernel": (3, 5, 5, 3, 5, 3)})
        found[mode] = with_gradients(model, images())
    orders = {g["block"]: g["order"] for g in history(model)[0].decision["groups"]}
    gone = orders["stages.0.0"][8:]
    for mode in ("slice", "mask"):
        assert not found[mode]["stages.0.0.expand.0.weight"][gone].any()
        assert not found[mode]["stages.0.0.project.0.weight"][:, gone].any()
        assert found[mode]["stages.0.0.expand.0.weight"][orders["stages.0.0"][:8]].any()
    skipped = [n for n in found["mask"] if n.startswith(("stages.0.2", "stages.1.1"))]
    assert all(not found["mask"][n].any() for n in skipped)
    for name, gradient in found["slice"].items():
        torch.testing.assert_close(found["mask"][name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["vision", "llama", "home_made", "convolutional", "ours"])
def test_parts_of_models_it_was_not_written_for(where: str) -> None:
    model, batch = ALL[where]()
    before = out(model.eval(), batch)
    model = elastic(model, depth=(2,), expand=(0.5,), kernel=None, multiple=4)
    assert torch.equal(out(model, batch), before)
    with supernet(model).running_as(supernet(model).smallest()):
        part = out(model, batch)
    assert part.shape == before.shape
    assert not torch.allclose(part, before)
    assert torch.equal(out(model, batch), before), "whole again"


def test_the_feed_forward_of_bert_gpt2_and_mobile_net_v2() -> None:
    sizes = {"num_attention_heads": 2, "vocab_size": 32, "num_hidden_layers": 2, "hidden_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=24))
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0))  # fmt: skip  # noqa: E501
    config = transformers.MobileNetV2Config(num_channels=1, depth_multiplier=0.1, min_depth=8, num_labels=3)
    mobile_v2 = transformers.MobileNetV2ForImageClassification(config)
    for model, batch in ((bert, {"input_ids": tokens()}), (gpt2, {"input_ids": tokens()}),
                         (mobile_v2, {"pixel_values": images(2, 32)})):  # fmt: skip
        model = elastic(model.eval(), depth=(1,), expand=(0.5,), kernel=None)
        for part in draws(0, model):
            with supernet(model).running_as(part):
                expected = out(model, batch)
            with warnings.catch_warnings():
                # Of batch norms without data; see test_extract.py.
                warnings.simplefilter("ignore", UserWarning)
                cut = cut_out(model, part)
            assert torch.equal(out(cut, batch), expected)
            assert not is_elastic(cut)


def test_gated_and_several_hidden_layers_of_one_block_share_a_width() -> None:
    model, _ = llama()
    group = Elastic((4,), (0.5,)).decide(model).groups[0]
    assert group.producers == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    net = ResNet((2,), (16,), block="bottleneck", stem="small")
    decision = Elastic((1,), (0.5,)).decide(net)
    assert [g.choices for g in decision.groups] == [(8, 16)] * 4


def test_channels_that_something_else_reads_stay_with_a_reason() -> None:
    class Odd(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how
            self.up, self.down = nn.Linear(8, 16), nn.Linear(32 if how == "cat" else 16, 8)
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            if self.how == "cat":
                y = torch.cat([y, y], -1)
            elif self.how == "norm":
                y = self.norm(y)
            elif self.how == "view":
                y = y.flatten(1)
            elif self.how == "twice":
                return x + self.down(torch.relu(self.up(x[..., :8])) + y)
            return x + self.down(torch.relu(y))

    said = {"cat": "cat reads it", "norm": "norm normalises over its channels", "view": "flatten reads it", "twice": "up runs more than once"}  # fmt: skip  # noqa: E501
    for how, reason in said.items():
        decision = Elastic((1,), (0.5,)).decide(nn.Sequential(Odd(how), Odd(how)))
        assert not decision.groups
        assert reason in decision.skipped["0.up"]
        assert decision.stages[0].depths == (1, 2)


def test_costs_are_those_of_a_counter_and_grow_on_every_axis() -> None:
    for model, batch in ((mobile(squeeze=True), {"x": images()}), vision()):
        model = elastic(model.eval(), depth=(1, 2), expand=(0.25, 0.5))
        net, costs = supernet(model), supernet(model).costs(batch)
        for part in draws(2, model):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                cut = cut_out(model, part)
            with FlopCounterMode(display=False) as counter:
                out(cut, batch)
            assert costs(part) == counter.get_total_flops() // 2
        smallest, running = net.smallest().to_dict(), net.running(net.smallest())
        for axis, choices in net.choices().items():
            for at, allowed in enumerate(choices):
                rising = [
                    costs(Subnet.of({**smallest, axis: [*smallest[axis][:at], c, *smallest[axis][at + 1 :]]}))
                    for c in allowed
                ]
                places = {"depth": [""], "expand": net.wide, "kernel": list(net.kernels)}[axis]
                reached = any(places[at % len(places)].startswith(b) for b in running) or axis == "depth"
                assert rising == sorted(rising)
                assert len(set(rising)) == len(rising) or not reached


def test_samples_are_drawn_by_the_generator_alone_and_compound_ones_couple_depth_and_width() -> None:
    model = elastic()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (supernet(model).sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(draws(8, model))) > 6
    net = supernet(elastic(sampling="compound"))
    for seed in range(4):
        part = net.sample(torch.Generator().manual_seed(seed))
        for at, depth in enumerate(part.depth):
            assert set(part.expand[3 * at : 3 * at + 3]) == {{1: 1, 2: 2, 3: 4}[depth]}


def test_a_part_is_refused_where_its_place_cannot_have_it() -> None:
    net = supernet(elastic())
    with pytest.raises(LaminaError, match=r"depth\[1\] of the sub-network is 4, it can be one of \[1, 2, 3\]"):
        net.set({"depth": (1, 4)})
    with pytest.raises(LaminaError, match="expand of the sub-network has 1 values, MobileNet has 6"):
        net.set({"expand": (1,)})
    with pytest.raises(LaminaError, match="no axis 'depths'; did you mean 'depth'"):
        net.set({"depths": (1, 1)})
    with pytest.raises(LaminaError, match="is not elastic"):
        supernet(mobile())


def test_the_space_is_choices_a_recipe_can_leave_open() -> None:
    space = supernet(elastic()).space()
    assert space["depth"][0] == Choice("oneof", [1, 2, 3])
    assert len(list(itertools.chain(*space.values()))) == 2 + 6 + 6


def test_copies_and_pickles_stay_elastic_and_apart() -> None:
    model = elastic()
    part = supernet(model).smallest()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        supernet(other).set(part)
        assert out(other, {"x": images()}).shape == (2, 3)
        assert supernet(model).running(supernet(model).full()) == list(supernet(model).blocks)
        assert not model.stages[0][1].elastic_skipped
        assert other.stages[0][1].elastic_skipped


def test_channels_are_sorted_anew_and_the_whole_computes_the_same() -> None:
    model = elastic()
    with torch.no_grad():
        model.stages[0][0].project[0].weight[:, 30] *= 100
    changed = out(model, {"x": images()})
    kept = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model = sort_channels(model, optimizer)
    assert torch.equal(out(model, {"x": images()}), changed)
    assert model.stages[0][0].project[0].elastic_in_order[0] == 30
    assert all(p is kept[n] for n, p in model.named_parameters())
    assert len(history(model)) == 2


def test_what_a_later_pass_takes_away_is_no_longer_asked_for() -> None:
    torch.manual_seed(0)
    model = Transformer(4, 16, 2, vocabulary=32, context=8).eval()
    model = rewrite(model, Elastic((1, 2), (0.5,)), DropBlock(count=1, order="last"))
    net = supernet(model)
    assert net.stages[0].choices == (1, 2, 3)
    assert len(net.wide) == 3
    net.set(net.smallest())
    assert out(model, {"input_ids": tokens()}).shape == (2, 8, 32)


def test_one_module_at_several_places_is_left_alone() -> None:
    config = transformers.AlbertConfig(
        embedding_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=32,
    )
    with pytest.raises(AnatomyError, match="weights of its own"):
        Elastic((1,), (0.5,)).decide(transformers.AlbertModel(config))
    model, _ = home_made()
    model.stack[1].net[0].weight = model.stack[0].net[0].weight
    decision = Elastic((1,), (0.5,)).decide(model)
    assert "shares its weights" in decision.skipped["stack.0.net.0"]
    assert {g.block for g in decision.groups} == {"stack.2", "stack.3"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": ()}, "depth lists numbers of blocks"),
        ({"depth": (0, 2)}, "each at least 1"),
        ({"expand": (0.5, 2)}, "ratios of what it has, above 0 and at most 1.0"),
        ({"expand": (0.0,)}, "ratios of what it has, above 0 and at most 1.0"),
        ({"kernel": (4,)}, "kernel lists odd sizes"),
        ({"mode": "prune"}, "mode must be slice or mask"),
        ({"sampling": "fair"}, "sampling must be independent or compound"),
        ({"multiple": 0}, "multiple must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(LaminaError, match=said):
        Elastic(**options)


def test_a_model_without_a_place_is_refused_with_the_reason() -> None:
    with pytest.raises(AnatomyError, match=r"depth \[2, 9\] is beyond the stages of MobileNet: the longest has 3"):
        Elastic((2, 9)).decide(mobile())
    with pytest.raises(AnatomyError, match="is beyond the stages"):
        Elastic((2, 9)).fits(mobile())
    with pytest.raises(AnatomyError, match=r"no width asked for is below its 8 channels"):
        Elastic((2,), (1,)).decide(ResNet((2, 2), (8, 8), stem="small"))
    with pytest.raises(AnatomyError, match="at a path like 'nowhere"):
        Elastic((1,), (0.5,), match="nowhere*").decide(mobile())
    with pytest.raises(AnatomyError, match="no repeated blocks"):
        Elastic((1,), (0.5,)).decide(nn.Sequential(nn.Linear(3, 3)))


def test_rounding_follows_the_mobile_nets() -> None:
    assert [rounded(c, 8) for c in (1, 8, 12, 18, 19.9, 30, 72)] == [8, 8, 16, 24, 24, 32, 72]


def test_running_statistics_of_a_part_in_training_are_those_of_its_channels() -> None:
    model = elastic().train()
    norm = model.stages[0][0].expand[1]
    before = norm.running_mean.clone()
    net = supernet(model)
    with net.running_as(net.smallest()):
        model(images(8))
    first = norm.elastic_out_order[:8]
    changed = (norm.running_mean != before).nonzero().flatten()
    assert sorted(changed.tolist()) == sorted(first.tolist())
