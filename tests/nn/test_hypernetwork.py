import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.contract.foreign import ALL
from torch import nn
from torch.func import functional_call

import lamina
from lamina import io
from lamina.batches import call, logits
from lamina.errors import LaminaError, ShapeError
from lamina.nn import DataCondition, HyperNetwork, NoiseCondition, TaskCondition, VectorCondition
from lamina.nn._hypernetwork_start import rectified_modules
from lamina.rewrite import DropMLP, rewrite

GENERATIONS = ("chunk", "once", "multihead", "component")

EXAMPLES = [
    Example(
        "layer",
        "hypernetwork",
        {
            "target": {"name": "torch.nn:Linear", "in_features": 5, "out_features": 3},
            "condition": {"name": "task_condition", "count": 3, "dim": 4},
            "chunk_size": 7,
            "hidden": [8],
        },
        inputs=lambda: (normal(2, 5), torch.tensor([2, 0])),
        bad={"chunk_size": 0},
    ),
]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mlp(*widths):
    layers = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ConvNet(nn.Module):
    """A home-made network: convolution, group norm, a functional rectifier, two inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x, shift=None):
        x = F.relu(self.norm(self.conv(x)))
        x = x if shift is None else x + shift[:, None, None, None]
        return self.fc(x.mean((2, 3)))


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


TARGETS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "convolution": (ConvNet, (4, 2, 5, 5)),
    "attention": (Attend, (4, 7, 8)),
    "norm": (lambda: nn.LayerNorm(6), (4, 6)),
}


def stirred(h):
    """Move everything away from its start, so that nothing is equal because it is zero."""
    torch.manual_seed(9)
    with torch.no_grad():
        for p in h.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return h


def make(target, condition=None, **options):
    torch.manual_seed(0)
    return HyperNetwork(target, condition or TaskCondition(5, 8), **{"chunk_size": 16, "hidden": (8,), **options})


def policy(name):
    return {"chunk_size": 256, "batch_norm": "per_condition" if name == "convolutional" else "refuse"}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("base", ["frozen", "trainable"])
def test_a_zero_head_on_a_base_is_exactly_the_model_it_was(name, base):
    model, batch = ALL[name]()
    model.eval()
    before = logits(call(model, batch))
    h = make(copy.deepcopy(model), base=base, init="zero", match="**", **policy(name)).eval()
    assert torch.equal(logits(call(h, {**batch, "condition": torch.tensor(3)})), before)
    assert torch.equal(logits(call(h.materialize(1), batch)), before)


@pytest.mark.parametrize("name", ALL)
def test_a_materialized_model_is_plain_and_does_what_the_hypernetwork_did(name):
    model, batch = ALL[name]()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    h = stirred(make(model.eval(), base="trainable", **policy(name))).eval()
    expected = logits(call(h, {**batch, "condition": torch.tensor(2)}))
    plain = h.materialize(2)
    assert type(plain) is type(model)
    assert {n: p.shape for n, p in plain.named_parameters()} == shapes
    assert not list(plain.buffers()) or len(list(plain.buffers())) == len(list(ALL[name]()[0].buffers()))
    torch.testing.assert_close(logits(call(plain, batch)), expected, rtol=1e-6, atol=1e-6)
    other = logits(call(h.materialize(1), batch))
    assert (other - expected).abs().max() > 1e-4
    logits(call(plain, batch)).square().mean().backward()
    assert all(p.grad is not None for p in plain.parameters() if p.requires_grad)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("base", ["none", "frozen", "trainable"])
@pytest.mark.parametrize("rank", [None, 2])
def test_every_selected_parameter_is_generated_once_in_shape_and_no_other(generation, base, rank):
    net = ConvNet()
    shapes = {n: p.shape for n, p in net.named_parameters()}
    h = make(net, match=("conv*", "*weight"), generation=generation, base=base, rank=rank, chunk_size=7)
    chosen = {n for n in shapes if n.startswith("conv") or n.endswith("weight")}
    assert {n: t.shape for n, t in h.generate(2).items()} == {n: shapes[n] for n in chosen}
    assert {n: t.shape for n, t in h.generate(torch.arange(3)).items()} == {n: (3, *shapes[n]) for n in chosen}
    assert h.num_generated == sum(shapes[n].numel() for n in chosen)
    own = {n.removeprefix("target.") for n, _ in h.named_parameters() if n.startswith("target.")}
    assert own == (set(shapes) - chosen if base != "trainable" else set(shapes))
    assert all(p.is_leaf for p in h.parameters())
    h(normal(2, 2, 5, 5), 0).square().mean().backward()
    assert all(p.grad is not None for p in h.parameters())


def test_a_predicate_selects_and_a_bare_star_leaves_norms_alone():
    assert {e.name for e in make(ConvNet()).entries} == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
    assert len(make(ConvNet(), match="**").entries) == 6
    assert {e.name for e in make(ConvNet(), match="norm*").entries} == {"norm.weight", "norm.bias"}
    h = make(ConvNet(), match=lambda name, p: p.dim() == 2)
    assert [e.name for e in h.entries] == ["fc.weight"]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("options", [{"rank": 1}, {"base": "trainable"}])
def test_gradients_through_generator_and_target_are_right(generation, options):
    h = make(
        mlp(3, 3, 1), TaskCondition(2, 2), generation=generation, chunk_size=5, embedding=2, hidden=(3,), **options
    )
    h = stirred(h).double()
    names, values = zip(*h.named_parameters(), strict=True)
    x = normal(2, 3, dtype=torch.float64)

    def run(*given):
        return functional_call(h, dict(zip(names, given, strict=True)), (x, torch.tensor([0, 1])))

    assert torch.autograd.gradcheck(run, values)


def test_the_gradient_of_the_generator_is_its_jacobian_times_that_of_the_weights():
    h = stirred(make(mlp(3, 4, 2), base="frozen")).double()
    x, goal = normal(6, 3, dtype=torch.float64), normal(6, 2, seed=1, dtype=torch.float64)
    F.mse_loss(h(x, 1), goal).backward()
    leaves = {n: t.detach().requires_grad_() for n, t in h.generate(1).items()}
    given = torch.autograd.grad(F.mse_loss(functional_call(mlp(3, 4, 2), leaves, x), goal), list(leaves.values()))
    phi = list(h.parameters())
    by_hand = torch.autograd.grad(list(h.generate(1).values()), phi, grad_outputs=given)
    for p, g in zip(phi, by_hand, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("training", [True, False])
def test_many_conditions_at_once_are_a_loop_over_them(name, training):
    build, shape = TARGETS[name]
    h = stirred(make(build(), match="**", base="frozen" if name == "norm" else "none")).train(training)
    x, tasks = normal(*shape), torch.tensor([3, 0, 4, 3])
    with torch.set_grad_enabled(training):
        rows = torch.cat([h(x[i : i + 1], tasks[i]) for i in range(4)])
        torch.testing.assert_close(h(x, tasks), rows, rtol=1e-5, atol=1e-6)
        every = torch.stack([h(x, t) for t in tasks])
        torch.testing.assert_close(h.for_each(x, tasks), every, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(h.for_each(x, tasks, at_once=3), every, rtol=1e-5, atol=1e-6)
        own = normal(4, *shape, seed=3)
        each = torch.stack([h(own[i], tasks[i]) for i in range(4)])
        torch.testing.assert_close(h.for_each(own, tasks, shared=False), each, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(h.for_each(own, tasks, shared=False, at_once=2), each, rtol=1e-5, atol=1e-6)


def test_rows_of_every_input_go_with_their_condition():
    h = stirred(make(ConvNet()))
    x, shift, tasks = normal(3, 2, 5, 5), normal(3, seed=1), torch.tensor([1, 4, 0])
    rows = torch.cat([h(x[i : i + 1], int(tasks[i]), shift=shift[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(h(x, tasks, shift=shift), rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h((x, shift), tasks), rows, rtol=1e-5, atol=1e-6)


def variance_of_outputs(target, draws):
    with torch.no_grad():
        return torch.stack([target(i) for i in range(draws)]).var().item()


def test_hyperfan_in_keeps_the_variance_that_torch_s_start_of_a_hypernetwork_loses():
    widths = (32, 512, 128, 64, 256, 32)
    x = normal(64, 32)

    def kaiming(_):
        plain = mlp(*widths)
        for m in plain:
            if isinstance(m, nn.Linear):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu" if m.out_features != 32 else "linear")
                nn.init.zeros_(m.bias)
        return plain(x)

    torch.manual_seed(0)
    wanted = variance_of_outputs(kaiming, 20)
    h = HyperNetwork(mlp(*widths), TaskCondition(200, 16), chunk_size=1024)
    found = variance_of_outputs(lambda i: h(x, i), 200)
    assert wanted / 3 < found < wanted * 3
    # The control: torch's own start of the head, and no factor a tensor.
    h.generator.heads[0].reset_parameters()
    h.scales.fill_(1.0)
    lost = variance_of_outputs(lambda i: h(x, i), 200)
    assert not wanted / 10 < lost < wanted * 10


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_start_of_each_tensor_is_by_its_own_fan(generation):
    net = nn.Sequential(nn.Conv2d(8, 32, 3, groups=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32, 64))
    h = make(net, generation=generation, match="**", batch_norm="batch", chunk_size=300)
    for row in h.report():
        wanted = {"0.weight": math.sqrt(2 / (4 * 9)), "4.weight": math.sqrt(1 / 32)}.get(row.name, 0.0)
        assert row.std == pytest.approx(wanted, rel=0.25), row
    constants = {n: t for n, t in h.generate(1).items() if t.dim() == 1}
    assert (constants.pop("1.weight") == 1).all()
    assert not any(t.any() for t in constants.values())
    out = make(copy.deepcopy(ConvNet()), init="hyperfan_out", chunk_size=300, match="**")
    spread = {r.name: r.std for r in out.report()}
    assert spread["conv.weight"] == pytest.approx(math.sqrt(2 / (4 * 9)), rel=0.25)
    assert spread["fc.weight"] == pytest.approx(math.sqrt(1 / 3), rel=0.25)


def test_hyperfan_out_opens_the_bias_where_a_layer_widens():
    h = make(nn.Linear(4, 64), TaskCondition(50, 8), init="hyperfan_out", generation="once")
    assert {r.name: r.std for r in h.report()}["bias"] == pytest.approx(math.sqrt(1 - 4 / 64), rel=0.2)
    h = make(nn.Linear(64, 4), TaskCondition(50, 8), init="hyperfan_out", generation="once")
    assert {r.name: r.std for r in h.report()}["bias"] == 0


def test_what_is_no_known_layer_starts_as_spread_as_it_was():
    class Home(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.gain = nn.Embedding(40, 8), nn.Parameter(torch.full((8,), 1e-3))

        def forward(self, x):
            return self.table(x) * self.gain

    h = make(Home())
    rows = {r.name: r for r in h.report()}
    assert rows["table.weight"].std == pytest.approx(rows["table.weight"].own_std, rel=0.2)
    torch.testing.assert_close(h.generate(0)["gain"], torch.full((8,), 1e-3))


def test_a_low_rank_weight_starts_as_spread_as_a_whole_one_and_has_that_rank():
    h = make(nn.Linear(64, 48), rank=3, generation="multihead")
    weight = h.generate(2)["weight"]
    assert torch.linalg.matrix_rank(weight) == 3
    assert {r.name: r.std for r in h.report()}["weight"] == pytest.approx(1 / 8, rel=0.25)
    assert h.entries[0].emitted == 3 * (64 + 48)


def test_rectifiers_are_found_through_norms_functions_and_sequentials():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.GELU(), nn.Linear(2, 2))

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else x

    assert rectified_modules(ConvNet()) == {"conv", "norm"}
    assert rectified_modules(Loops()) == {"body.0"}
    assert rectified_modules(mlp(2, 3, 4)) == {"0"}


def test_the_size_of_a_chunked_generator_is_by_the_formula_and_far_below_a_million():
    target = nn.Linear(1000, 1000, bias=False)
    h = HyperNetwork(target, TaskCondition(3, 8), chunk_size=2000, hidden=(32, 64), embedding=4)
    trunk = (8 + 4) * 32 + 32 + 32 * 64 + 64
    assert h.num_generated == 10**6
    assert sum(p.numel() for p in h.parameters()) == trunk + 64 * 2000 + 2000 + 500 * 4 + 3 * 8
    assert h.compression_ratio == sum(p.numel() for p in h.parameters()) / 10**6 < 0.2
    odd = HyperNetwork(nn.Linear(7, 9), TaskCondition(1), chunk_size=32)
    assert odd.generator.embedding.shape[0] == 3
    assert make(nn.Linear(5, 3), base="trainable").compression_ratio > make(nn.Linear(5, 3)).compression_ratio


@pytest.mark.parametrize("generation", GENERATIONS)
def test_numbers_come_out_as_a_loop_over_the_runs_of_the_trunk_writes_them(generation):
    h = stirred(make(mlp(3, 4, 2), base="frozen", generation=generation, chunk_size=7))
    g, code, base = h.generator, h.condition.embedding[2], [h.target[0].weight, h.target[0].bias]
    base = torch.cat([t.flatten() for t in (*base, h.target[2].weight, h.target[2].bias)])
    sizes, runs = (12, 4, 8, 2), {"chunk": 4, "component": 4}.get(generation, 1)
    hidden = [g.trunk(code if g.embedding is None else torch.cat((code, g.embedding[j]))) for j in range(runs)]
    if generation == "multihead":
        pieces = [head(hidden[0]) for head in g.heads]
    elif generation == "component":
        pieces = [g.heads[0](e)[:n] for e, n in zip(hidden, sizes, strict=True)]
    else:
        pieces = [g.heads[0](e) for e in hidden]
    found = torch.cat([t.flatten() for t in h.generate(2).values()])
    torch.testing.assert_close(found, base + torch.cat(pieces)[:26])


def test_tasks_do_not_share_an_embedding_samples_and_noise_make_weights_differ():
    h = make(mlp(3, 4, 2))
    before = h.generate(0)["0.weight"].clone()
    with torch.no_grad():
        h.condition.embedding[1] += 1
    assert torch.equal(h.generate(0)["0.weight"], before)
    x = normal(2, 3)
    data = make(mlp(3, 4, 2), DataCondition(nn.Linear(3, 8)))
    weights = data.generate(x)["0.weight"]
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    torch.testing.assert_close(data(x), data(x, x))
    noise = make(mlp(3, 4, 2), NoiseCondition(8))
    z = noise.condition.draw(20, generator=torch.Generator().manual_seed(0))
    assert noise.for_each(x, z).var(0).min() > 0
    torch.testing.assert_close(noise.for_each(x, z)[3], noise(x, z[3]))
    assert (noise(x) - noise(x)).abs().max() > 0


def test_several_conditions_together():
    h = make(mlp(3, 4, 2), [TaskCondition(3, 4), VectorCondition(1, "cos_sin"), NoiseCondition(2)])
    x, z = normal(2, 3), normal(2)
    first, second, third = h(x, (1, 0.2, z)), h(x, (1, 0.7, z)), h(x, (2, 0.2, z))
    assert min((first - second).abs().max(), (first - third).abs().max()) > 1e-4
    assert h(x, (torch.tensor([0, 1]), torch.tensor([0.5, 0.1]), None)).shape == (2, 2)


def test_tied_weights_are_generated_once_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.out.weight = self.embed.weight
            self.again = self.out

        def forward(self, x):
            return self.again(self.embed(x)) + self.out(self.embed(x))

    for base in ("none", "frozen", "trainable"):
        h = stirred(make(Tied(), base=base, match="out.weight"))
        assert h.num_generated == 44
        assert [n for n, _ in h.target.named_parameters()] == (["embed.weight"] if base == "trainable" else [])
        weight, ids = h.generate(1)["embed.weight"], torch.tensor([[1, 3, 10]])
        torch.testing.assert_close(h(ids, 1), 2 * weight[ids] @ weight.T)
        plain = h.materialize(1)
        assert plain.embed.weight is plain.out.weight
        torch.testing.assert_close(plain(ids), h(ids, 1))
        # A call leaves nothing behind in the target.
        torch.testing.assert_close(h(ids, 2), h.materialize(2)(ids))


def test_another_trunk_lets_the_pieces_see_each_other():
    x = normal(2, 3)
    for trunk in ("feed_forward", lambda width: nn.GRU(width, 6, batch_first=True), nn.Linear(24, 5)):
        h = make(mlp(3, 4, 2), generator=trunk)
        assert h(x, 1).shape == (2, 2)
        h(x, 1).sum().backward()
    recurrent = make(mlp(3, 4, 2), generator=lambda width: nn.GRU(width, 6, batch_first=True))
    before = recurrent.generate(0)["2.bias"].clone()
    with torch.no_grad():
        recurrent.gates[0].fill_(1.0)
        first = recurrent.generate(0)["2.weight"].clone()
        recurrent.generator.embedding[0] += 1
    assert not torch.equal(recurrent.generate(0)["2.weight"], first), "a later chunk feels an earlier embedding"
    assert not before.any()
    with pytest.raises(ShapeError, match=r"must map \(B, R, 24\)"):
        make(mlp(3, 4, 2), generator=lambda width: nn.Flatten())


def test_a_cell_gets_new_weights_every_step():
    h = make(nn.GRUCell(3, 4), DataCondition(nn.Linear(4, 6)))
    state, states = torch.zeros(2, 4), []
    for step in range(3):
        state = h((normal(2, 3, seed=step), state), state)
        states.append(state)
    row = torch.zeros(1, 4)
    for step in range(3):
        weights = {n: t[0] for n, t in h.generate(row).items()}
        row = functional_call(nn.GRUCell(3, 4), weights, (normal(2, 3, seed=step)[:1], row))
    torch.testing.assert_close(states[-1][:1], row)


@pytest.mark.parametrize("base", ["none", "frozen", "trainable"])
def test_torch_s_recurrent_layers_get_the_weights_and_forget_them(base):
    h = stirred(make(nn.LSTM(3, 4, batch_first=True), base=base))
    x = normal(2, 5, 3)
    found = h(x, 1)[0]
    own = nn.LSTM(3, 4, batch_first=True)
    own.load_state_dict(h.generate(1))
    torch.testing.assert_close(found, own(x)[0])
    torch.testing.assert_close(copy.deepcopy(h)(x, 1)[0], found)
    torch.testing.assert_close(h.materialize(1)(x)[0], found)
    torch.testing.assert_close(h.for_each(x, torch.tensor([0, 1]))[0][1], found)
    found.sum().backward()
    assert h.generator.heads[0].weight.grad.any()


@pytest.mark.parametrize("base", ["none", "frozen", "trainable"])
def test_parameters_come_back_in_the_order_that_they_had(base):
    names = [n for n, _ in ConvNet().named_parameters()]
    plain = make(ConvNet(), base=base, match=("conv.weight", "fc.bias", "norm.weight")).materialize(0)
    assert [n for n, _ in plain.named_parameters()] == names
    assert set(vars(plain.conv)) == set(vars(ConvNet().conv))


def test_drift_is_the_squared_way_since_it_was_remembered():
    h = make(mlp(3, 4, 2))
    assert h.drift() == 0
    h.remember([0, 3])
    then = {t: h.generate(t) for t in (0, 3)}
    assert h.drift() == 0
    stirred(h)
    moved = [sum((h.generate(t)[n] - then[t][n]).square().sum() for n in then[t]) for t in (0, 3)]
    torch.testing.assert_close(h.drift(), sum(moved) / 2)
    h.drift().backward()
    assert h.condition.embedding.grad[0].any()
    assert not h.condition.embedding.grad[1].any()
    h.remember([3])
    torch.testing.assert_close(h.drift(), moved[0] / 2)
    assert len(h.memory) == 2
    both = make(mlp(3, 4, 2), (TaskCondition(2, 4), VectorCondition(2)))
    both.remember((torch.tensor([0, 1]), normal(2, 2)))
    assert both.drift() == 0
    stirred(both)
    assert both.drift() > 0
    path = make(mlp(3, 4, 2), VectorCondition(1))
    for batch in ([0.1, 0.2], [0.3], [0.2]):
        path.remember(batch)
    assert len(path.memory) == 3
    assert path.drift() < 1e-10
    flat = torch.cat([t.flatten() for t in h.generate(1).values()])
    torch.testing.assert_close(h.magnitude(1), flat.square().sum())


def test_what_is_remembered_is_saved_and_loaded(tmp_path):
    node = {"name": "lamina.nn.hypernetwork:HyperNetwork", **EXAMPLES[0].options}
    h = lamina.recipe.build(node, "model")
    h.remember([1, 2])
    stirred(h)
    io.save(h, tmp_path / "h", base=node)
    other = lamina.load(tmp_path / "h")
    assert torch.equal(other.drift(), h.drift())
    assert torch.equal(other(normal(2, 5), 1), h(normal(2, 5), 1))
    third = lamina.recipe.build(node, "model")
    third.load_state_dict(h.state_dict())
    assert torch.equal(third.drift(), h.drift())


def test_a_state_of_another_target_is_refused_by_name():
    state = make(mlp(3, 4, 2)).state_dict()
    with pytest.raises(LaminaError, match=r"the first that differs is 2.weight"):
        make(mlp(3, 4, 3)).load_state_dict(state)
    with pytest.raises(LaminaError, match="another target, match or rank"):
        make(mlp(3, 4, 2), match="*weight").load_state_dict(state)


@pytest.mark.parametrize("base", ["none", "frozen"])
def test_it_is_built_on_meta_and_filled(base):
    real = make(mlp(3, 4, 2), base=base)
    with torch.device("meta"):
        h = make(mlp(3, 4, 2), base=base)
    assert all(p.is_meta for p in h.parameters())
    h.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(h(normal(2, 3), 1), real(normal(2, 3), 1))


def batch_normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_batch_norm_is_refused_unless_there_is_a_policy():
    with pytest.raises(LaminaError, match=r"1 keeps running statistics.*batch_norm='per_condition' or 'batch'"):
        make(batch_normed())
    with pytest.raises(LaminaError, match="needs a TaskCondition"):
        make(batch_normed(), NoiseCondition(2), batch_norm="per_condition")


def test_each_task_has_running_statistics_of_its_own():
    h = make(batch_normed(), batch_norm="per_condition")
    plain = [h.materialize(t).train() for t in range(2)]
    for step in range(3):
        for t in range(2):
            x = normal(8, 3, seed=10 * step + t) + t
            torch.testing.assert_close(h(x, t), plain[t](x))
    x = normal(5, 3)
    h.eval()
    found = h.for_each(x, torch.tensor([0, 1]))
    for t in range(2):
        torch.testing.assert_close(h(x, t), plain[t].eval()(x))
        torch.testing.assert_close(found[t], plain[t](x))
        torch.testing.assert_close(h.materialize(t)(x), plain[t](x))
    assert h.materialize(0)[1].num_batches_tracked == 3
    assert h.materialize(4)[1].num_batches_tracked == 0
    with pytest.raises(LaminaError, match="give one condition a call"):
        h(x, torch.arange(5))


def test_the_policy_batch_normalises_by_the_batch_always():
    h = make(batch_normed(), batch_norm="batch").eval()
    x = normal(6, 3)
    weights = h.generate(1)
    hidden = F.linear(x, weights["0.weight"], weights["0.bias"])
    expected = F.linear(F.batch_norm(hidden, None, None, training=True), weights["2.weight"], weights["2.bias"])
    torch.testing.assert_close(h(x, 1), expected)
    torch.testing.assert_close(h.materialize(1)(x), expected)


def test_weights_are_made_in_float32_under_autocast_and_cast_to_the_target_s_dtype():
    h = make(mlp(7, 63, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert h.generate(1)["0.weight"].dtype == torch.float32
        assert h(normal(2, 7), 1).dtype == torch.bfloat16
    mixed = mlp(7, 63, 1)
    mixed[0].bfloat16()
    assert {t.dtype for t in make(mixed).generate(0).values()} == {torch.bfloat16, torch.float32}
    rounded = copy.deepcopy(h).bfloat16()
    exact = h(normal(2, 7), 1)
    assert (rounded(normal(2, 7).bfloat16(), 1).float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_attention_with_weights_of_its_own_a_row_compiles_into_one_graph():
    torch.compiler.reset()
    build, shape = TARGETS["attention"]
    h = stirred(make(build(), match="**"))
    compiled = torch.compile(h, backend="aot_eager", fullgraph=True)
    x, tasks = normal(*shape), torch.tensor([3, 0, 4, 3])
    torch.testing.assert_close(compiled(x, tasks), h(x, tasks), rtol=1e-4, atol=1e-5)


def test_dropout_under_many_conditions_drops_differently():
    h = make(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), base="frozen", init="zero")
    out = h(normal(1, 16).expand(8, -1), torch.zeros(8, dtype=torch.long))
    assert len({tuple(r.tolist()) for r in out == 0}) > 1


def test_a_rewrite_of_the_target_takes_its_weights_along():
    model, batch = ALL["ours"]()
    h = make(model, TaskCondition(2, 4), base="frozen", chunk_size=256).eval()
    h = rewrite(h, DropMLP(count=2), data=[{**batch, "condition": torch.tensor(0)}])
    given = {**batch, "condition": torch.tensor(1)}
    torch.testing.assert_close(call(h.materialize(1), batch), call(h, given))
    call(h, {**batch, "condition": torch.tensor([0, 1])}).sum().backward()


def test_calibration_gives_data_conditions_the_spread_meant():
    h = make(nn.Linear(64, 32), DataCondition(nn.Linear(64, 8)))
    x = 50 * normal(40, 64)
    assert h.generate(x)["weight"].std() > 1
    h.calibrate(x)
    assert h.generate(x)["weight"].std().item() == pytest.approx(1 / 8, rel=0.25)
    with pytest.raises(LaminaError, match="calibrate is for an init of hyperfan"):
        make(nn.Linear(4, 3), base="frozen").calibrate(0)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"match": "0.wheight"}, LaminaError, "has no parameter '0.wheight'; did you mean '0.weight'"),
        ({"match": ()}, LaminaError, "selects no parameter of Sequential"),
        ({"generation": "chunks"}, LaminaError, "generation must be one of .*did you mean 'chunk'"),
        ({"base": "fixed"}, LaminaError, "base must be one of none, frozen, trainable"),
        ({"init": "residual"}, LaminaError, "pass base='frozen' or 'trainable'"),
        ({"base": "frozen", "init": "zero", "rank": 1}, LaminaError, "would never move"),
        ({"chunk_size": 0}, ShapeError, "chunk_size must be at least 1, got 0"),
        ({"rank": 0}, ShapeError, "rank must be at least 1, got 0"),
        ({"hidden": (8, 0)}, ShapeError, "hidden must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_with_what_was_given(options, error, sentence):
    with pytest.raises(error, match=sentence):
        make(mlp(3, 4, 2), **options)


def test_parameters_that_cannot_be_generated_are_refused():
    whole = nn.Linear(3, 2)
    whole.register_parameter("steps", nn.Parameter(torch.tensor([1]), requires_grad=False))
    with pytest.raises(LaminaError, match=r"steps is torch.int64"):
        make(whole)
    with pytest.raises(LaminaError, match=r"weight is lazy.*run the target once"):
        make(nn.LazyLinear(3))
    with pytest.raises(LaminaError, match=r"one head for 60,000,000 numbers.*allow_large=True"), torch.device("meta"):
        make(nn.Linear(10_000, 6_000, bias=False), generation="once")
    with pytest.raises(LaminaError, match="got a Linear"):
        make(mlp(3, 4, 2), nn.Linear(2, 2))


def test_calls_that_do_not_fit_are_refused():
    h = make(mlp(3, 4, 2))
    with pytest.raises(LaminaError, match=r"tasks are 0\.\.4, got 5"):
        h(normal(2, 3), 5)
    with pytest.raises(ShapeError, match=r"3 conditions for an input of shape \(2, 3\)"):
        h(normal(2, 3), torch.arange(3))
    with pytest.raises(LaminaError, match="needs a condition at every call"):
        h(normal(2, 3))
    with pytest.raises(ShapeError, match="one condition, got a batch of 2"):
        h.materialize(torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match="takes a batch of conditions, got one"):
        h.for_each(normal(2, 3), 1)
