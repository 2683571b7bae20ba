from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract import foreign
from tests.contract.example import Example
from tests.processes import in_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lamina import io
from lamina.anatomy import get
from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError
from lamina.models import MetaFormer, Transformer
from lamina.optim import LAMB, parameter_groups
from lamina.optim.groups import norms_and_biases
from lamina.parallel.data_parallel import Placement, place
from lamina.rewrite import (
    DropAttention,
    Expand,
    ExpandedStack,
    LinearExpansion,
    descendants,
    fit_linear,
    history,
    interpolate,
    replay,
    rewrite,
)

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def ours(depth: int = 3, **options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(depth, **({"width": 16, "heads": 2, "vocabulary": 32, "context": 8} | options))


def gene() -> nn.Module:
    """A model that is expanded already and says so itself, as one would that nothing was rewritten in."""
    model = rewrite(ours(2), LinearExpansion())
    del model.lamina_history
    model.lamina_node = {"name": "tests.rewrite.test_expand:gene"}  # type: ignore[assignment]
    return model


def tokens() -> dict[str, Tensor]:
    return {"input_ids": foreign.tokens()}


NOTHING_TO_EXPAND = "there is nothing to expand before `linear_expansion`; that is tried in its own test"
EXAMPLES = [
    Example("pass", "linear_expansion", {"depth": 3}, bad={"depth": 0}),
    Example(
        "pass", "expand", {"depth": 3}, model=gene, batch=tokens, bad={"trunk": "nowhere"}, only_ours=NOTHING_TO_EXPAND
    ),
]


def bert() -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TINY, num_hidden_layers=3, num_labels=3)), tokens()


class Named(nn.Module):
    """Blocks with names, a norm with statistics and stochastic depth, in a Sequential."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(OrderedDict((f"block_{i}", NormedBlock(0.1 * i)) for i in range(depth)))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class StochasticDepthDropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, x: Tensor) -> Tensor:
        return x


class NormedBlock(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
        self.scale = nn.Parameter(torch.full((6,), 0.5))
        self.drop_path = StochasticDepthDropPath(rate) if rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.scale * self.net(self.norm(x)))


def named() -> tuple[nn.Module, Mapping[str, Any]]:
    torch.manual_seed(0)
    return Named(), {"inputs": torch.randn(7, 6, generator=torch.Generator().manual_seed(1))}


def torchs() -> tuple[nn.Module, Mapping[str, Any]]:
    """Torch's own encoder, which reads the weights of its first layer where it can."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 3), {"inputs": torch.randn(2, 5, 16)}


MODELS = {
    "ours": foreign.ours,
    "home_made": foreign.home_made,
    "llama": foreign.llama,
    "vision": foreign.vision,
    "bert": bert,
    "named": named,
    "torchs": torchs,
}


def out(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return logits(call(model.eval(), batch))


def trained(model: nn.Module, batch: Mapping[str, Any], optimizer: Any = None, steps: int = 2) -> nn.Module:
    """Move every tensor off its start: slopes of norms and biases are zeros there."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        logits(call(model, batch)).square().mean().backward()
        optimizer.step()
    return model.eval()


def stack_of(model: nn.Module) -> ExpandedStack:
    return next(m for m in model.modules() if isinstance(m, ExpandedStack))


def two(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stack = stack_of(model)
    return dict(stack.base.named_parameters()), dict(stack.slope.named_parameters())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_way_there_and_back_at_the_same_depth_is_exact_to_the_bit(make: Any) -> None:
    model, batch = make()
    kind, names = type(model), list(model.state_dict())
    expanded = trained(rewrite(model, LinearExpansion()), batch)
    before = out(expanded, batch)
    stack = stack_of(expanded)
    path = next(p for p, m in expanded.named_modules() if m is stack)
    assert all(p.any() for p in stack.slope.parameters() if p.dim() == 1)
    plain = rewrite(copy.deepcopy(expanded), Expand())
    assert type(plain) is kind
    assert list(plain.state_dict()) == names
    assert torch.equal(out(plain, batch), before)
    # Layer 0 is the base at every depth; the last one's place is (L - 1) / L, not 1.
    base, slope = two(expanded)
    for depth, one in descendants(expanded, (1, 2, 7)).items():
        blocks = list(get(one, path).children())
        assert len(blocks) == depth
        assert out(one, batch).isfinite().all()
        for name, last in blocks[-1].named_parameters():
            assert torch.equal(blocks[0].get_parameter(name), base[name])
            expected = base[name].double() + (depth - 1) / depth * slope[name].double()
            torch.testing.assert_close(last.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(out(expanded, batch), before), "descendants left the model as it was"


def test_a_cache_and_what_transformers_records_work_in_the_expanded_model_and_after() -> None:
    model, _ = foreign.llama()
    ids = foreign.tokens(context=7)
    expanded: Any = trained(rewrite(model, LinearExpansion(depth=5)), tokens())
    assert expanded.config.num_hidden_layers == 5
    with torch.no_grad():
        whole = expanded(ids, output_hidden_states=True)
        assert len(whole.hidden_states) == 6
        for one in (expanded, rewrite(copy.deepcopy(expanded), Expand())):
            first = one(ids[:, :4], use_cache=True)
            assert len(first.past_key_values) == 5
            rest = one(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
            torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), whole.logits, rtol=1e-5, atol=1e-6)
            again = one(ids, output_hidden_states=True)
            assert all(torch.equal(a, b) for a, b in zip(again.hidden_states, whole.hidden_states, strict=True))
    small: Any = rewrite(expanded, Expand(2)).eval()
    assert small.generate(ids[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 6)
    text = rewrite(ours(), LinearExpansion()).eval()
    assert text.caches
    greedy = text.generate(ids[:, :3], 4, temperature=0)  # type: ignore[operator]
    assert torch.equal(out(text, {"input_ids": greedy[:, :-1]})[:, 2:].argmax(-1), greedy[:, 3:])


@pytest.mark.parametrize("kept", ["recomputed", "checkpointed", "hooked"])
def test_gradients_are_the_layers_sum_and_their_sum_weighted_by_place(kept: str) -> None:
    """Against the untied model of the same tensors, in float64; what autograd keeps must not change them."""
    model = trained(rewrite(ours(depth=3), LinearExpansion(seed=3)).double(), tokens())
    untied = rewrite(copy.deepcopy(model), Expand())
    for one in (model, untied):
        one.zero_grad()
        run = call(one, tokens()) if kept != "checkpointed" else checkpoint(one, **tokens(), use_reentrant=False)
        run.square().mean().backward() if kept != "hooked" else hooked(one)
    base, slope = two(model)
    for name in base:
        each = torch.stack([b.get_parameter(name).grad for b in untied.blocks])  # type: ignore[union-attr]
        torch.testing.assert_close(base[name].grad, each.sum(0), rtol=1e-10, atol=1e-14)
        places = torch.arange(3.0, dtype=torch.float64).view(3, *[1] * (each.dim() - 1)) / 3
        torch.testing.assert_close(slope[name].grad, (places * each).sum(0), rtol=1e-10, atol=1e-14)


def hooked(model: nn.Module) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        call(model, tokens()).square().mean().backward()


def test_no_layers_tensors_are_kept_for_backward_and_a_change_in_between_is_an_error() -> None:
    model = rewrite(ours(), LinearExpansion())
    made = []
    stack = stack_of(model)
    summed = stack.tensors

    def watched(place: int) -> dict[str, Tensor]:
        tensors = summed(place)
        made.extend(t.untyped_storage()._weak_ref() for t in tensors.values() if t.dim() == 2)
        return tensors

    stack.tensors = watched  # type: ignore[method-assign]
    answer = call(model, tokens())
    assert len(made) == 18
    assert all(torch.UntypedStorage._expired(ref) for ref in made)
    with torch.no_grad():
        stack.slope.mixer.query.weight.mul_(2)  # type: ignore[union-attr,operator]
    with pytest.raises(RuntimeError, match="changed in place"):
        answer.square().mean().backward()
    stack.tensors = summed  # type: ignore[method-assign]
    # Transforms of torch.func, with which one takes gradients row by row, allow no hooks.
    named = dict(model.named_parameters())

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, tensors, (foreign.tokens(),)).square().mean()

    model.zero_grad()
    call(model, tokens()).square().mean().backward()
    found = torch.func.grad(loss)({n: p.detach() for n, p in named.items()})
    for name, parameter in named.items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_torchs_own_encoder_takes_a_mask_of_padding() -> None:
    model, batch = torchs()
    expanded = trained(rewrite(model, LinearExpansion()), batch)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    before = expanded(batch["inputs"], src_key_padding_mask=mask)
    after = rewrite(copy.deepcopy(expanded), Expand()).eval()(batch["inputs"], src_key_padding_mask=mask)
    torch.testing.assert_close(after, before)


def test_an_affine_stack_is_fitted_exactly_and_stays_what_it_is() -> None:
    model = trained(rewrite(ours(5).double(), LinearExpansion()), tokens())
    base, slope = ({n: t.detach().clone() for n, t in part.items()} for part in two(model))
    plain = rewrite(model, Expand())
    stack = [{n: p.detach() for n, p in b.named_parameters()} for b in plain.blocks]  # type: ignore[union-attr]
    fitted = fit_linear(stack)
    for name in base:
        torch.testing.assert_close(fitted[0][name], base[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(fitted[1][name], slope[name], rtol=1e-6, atol=1e-6)
    assert all(abs(r2 - 1) < 1e-6 for r2 in fitted[2].values())
    before = out(plain, tokens())
    again = rewrite(plain, LinearExpansion(init="fit"))
    torch.testing.assert_close(out(again, tokens()), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out(rewrite(again, Expand(5)), tokens()), before, rtol=1e-5, atol=1e-6)
    assert history(again)[-2].decision["r2"]["norm1.weight"] > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 63])
def test_the_fit_is_numpys_least_squares(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    stack = [{"w": torch.randn(width, 3, generator=generator).to(dtype), "c": torch.ones(2)} for _ in range(5)]
    base, slope, r2 = fit_linear(stack)
    y = torch.stack([s["w"] for s in stack]).double().flatten(1).numpy()
    x = np.stack([np.ones(5), np.arange(5) / 5], axis=1)
    (b, a), left, *_ = np.linalg.lstsq(x, y, rcond=None)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    np.testing.assert_allclose(base["w"].double().flatten(), b, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slope["w"].double().flatten(), a, rtol=tolerance, atol=tolerance)
    assert r2["w"] == pytest.approx(1 - left.sum() / ((y - y.mean(0)) ** 2).sum(), abs=1e-9)
    assert r2["c"] == 1.0
    assert base["w"].dtype is dtype
    middle = interpolate(base, slope, 0.4)["w"]
    torch.testing.assert_close(middle.double(), base["w"].double() + 0.4 * slope["w"].double(), rtol=1e-2, atol=1e-2)


def test_a_stack_that_is_no_line_is_told() -> None:
    with pytest.warns(UserWarning, match="not near-linear, expect to train it again"):
        decision = LinearExpansion(init="fit").decide(ours(8, width=8))
    assert "R2" in decision.table()
    assert decision.r2 is not None
    assert decision.r2["norm1.weight"] == 1.0
    assert decision.r2["mixer.query.weight"] < 0.4


def test_two_blocks_are_held_whatever_the_depth_and_the_file_does_not_grow(tmp_path: Any) -> None:
    def parameters(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    block = parameters(ours().blocks[0])
    around = parameters(ours()) - 3 * block
    sizes = []
    for depth in (2, 12):
        model = rewrite(ours(), LinearExpansion(depth=depth))
        assert parameters(model) == around + 2 * block
        assert len(stack_of(model)) == depth
        assert sum(t.numel() for n, t in model.state_dict().items() if "head" not in n) == around + 2 * block
        io.save(model, tmp_path / str(depth))
        sizes.append((tmp_path / str(depth) / "model.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]
    plain, undecayed = norms_and_biases(ours()), norms_and_biases(model)
    assert {n for n in undecayed if "blocks.base" in n} == {
        n.replace("blocks.0", "blocks.base") for n in plain if "blocks.0" in n
    }
    assert len(parameter_groups(model, 0.1)[1]["params"]) == len(undecayed)


def test_without_a_slope_it_is_one_block_run_again_and_again() -> None:
    model = rewrite(ours(), LinearExpansion(slope_std=0.0, seed=1))
    assert not any(p.any() for p in two(model)[1].values())
    shared = copy.deepcopy(rewrite(copy.deepcopy(model), Expand(1)))
    shared.blocks = nn.ModuleList([shared.blocks[0]] * 3)  # type: ignore[index]
    torch.testing.assert_close(out(model, tokens()), out(shared, tokens()), rtol=1e-6, atol=1e-7)
    first, *others = rewrite(model, Expand(4)).blocks.children()  # type: ignore[union-attr,operator]
    assert all(torch.equal(p, o.get_parameter(n)) for o in others for n, p in first.named_parameters())


def test_what_is_drawn_hangs_on_the_seed_alone_and_starts_as_the_authors_code_does() -> None:
    state = torch.get_rng_state()
    models = [rewrite(ours(width=64), LinearExpansion(slope_std=0.01, seed=s)) for s in (0, 0, 1)]
    assert not torch.equal(torch.get_rng_state(), state), "ours() seeds"
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rewrite(models.pop(), Expand(2))
    replayed = replay(ours(width=64), history(models[0]))
    base, slope = two(models[0])
    for name, tensor in base.items():
        assert torch.equal(tensor, two(models[1])[0][name])
        assert torch.equal(tensor, two(replayed)[0][name])
        if tensor.dim() == 2:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
            assert slope[name].std().item() == pytest.approx(0.01, rel=0.05)
        else:
            assert torch.equal(tensor, torch.full_like(tensor, float("norm" in name and "weight" in name)))
            assert not slope[name].any()
    other = rewrite(ours(width=64), LinearExpansion(seed=2))
    assert not torch.equal(two(other)[0]["mixer.query.weight"], base["mixer.query.weight"])
    assert json.loads(json.dumps(history(models[0])[0].decision))["slope_std"] == 0.01


def test_gains_that_are_added_to_one_start_at_zero_and_kinds_of_layers_go_on_alternating() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    types = ["sliding_attention", "full_attention"]
    config = Gemma2Config(**TINY, num_hidden_layers=4, num_key_value_heads=1, head_dim=8, layer_types=types * 2)
    torch.manual_seed(0)
    model: Any = rewrite(Gemma2ForCausalLM(config), LinearExpansion(depth=3))
    assert not two(model)[0]["input_layernorm.weight"].any()
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert out(model, tokens()).isfinite().all()
    model = rewrite(model, Expand(5))
    # Three layers of the two kinds: their pattern starts again after the third.
    assert model.config.layer_types == [types[0], types[1], types[0], types[0], types[1]]
    assert [b.self_attn.layer_idx for b in model.model.layers] == [0, 1, 2, 3, 4]
    assert [b.self_attn.layer_type for b in model.model.layers] == model.config.layer_types
    assert out(model, tokens()).isfinite().all()


def test_buffers_and_drop_path_follow_their_layers() -> None:
    model, batch = named()
    expanded = trained(rewrite(model, LinearExpansion(depth=4)), batch)
    stack = stack_of(expanded)
    means = [stack.get_buffer(f"{i}.held.norm.running_mean") for i in range(4)]
    assert len({tuple(m.tolist()) for m in means}) == 4
    assert torch.equal(two(expanded)[0]["scale"] != 0.5, torch.ones(6, dtype=torch.bool)), "trained on from 0.5"
    assert [getattr(layer.drop_path, "drop_prob", 0.0) for layer in stack] == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])
    other = copy.deepcopy(rewrite(named()[0], LinearExpansion(depth=4)))
    other.load_state_dict(expanded.state_dict())
    assert torch.equal(out(other, batch), out(expanded, batch))
    plain: Any = rewrite(expanded, Expand(2))
    assert list(plain.blocks._modules) == ["block_0", "block_1"]
    assert torch.equal(plain.blocks[1].norm.running_mean, means[2])
    plain = rewrite(rewrite(named()[0], LinearExpansion()), Expand(2))
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in plain.blocks] == pytest.approx([0.0, 0.2])
    pooled = MetaFormer((4, 1), (8, 16), classes=3, drop_path=0.4)
    pooled = rewrite(pooled, LinearExpansion(trunk="stages.0"), Expand(2))  # type: ignore[assignment]
    rates = [b.drop_path.rate for b in pooled.stages[0].children()]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.0, 0.3])


def test_blocks_are_independent_after_expanding_and_modes_and_freezing_are_kept() -> None:
    plain: Any = ours()
    plain.blocks[1].eval()
    model = rewrite(plain, LinearExpansion())
    stack_of(model).slope.requires_grad_(False)
    assert [layer.training for layer in stack_of(model)] == [True, False, True]
    plain = rewrite(model, Expand(4))
    assert [b.mixer.training for b in plain.blocks] == [True, False, True, True]
    assert len({p.data_ptr() for p in plain.parameters()}) == len({id(p) for p in plain.parameters()})
    kept = {n: p.detach().clone() for n, p in plain.named_parameters() if not n.startswith("blocks.1")}
    with torch.no_grad():
        for p in plain.blocks[1].parameters():
            p.add_(1.0)
    assert all(torch.equal(plain.get_parameter(n), p) for n, p in kept.items())
    frozen = ours().requires_grad_(False)
    assert not any(p.requires_grad for p in rewrite(rewrite(frozen, LinearExpansion()), Expand(2)).parameters())


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_each_block_goes_on_with_the_moments_of_the_base(kind: str) -> None:
    model = rewrite(ours(), LinearExpansion())
    optimizer: torch.optim.Optimizer = (
        LAMB(parameter_groups(model, 0.01), lr=1e-2)
        if kind == "lamb"
        else torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    trained(model, tokens(), optimizer)
    old = {n: copy.deepcopy(optimizer.state[p]) for n, p in two(model)[0].items()}
    model = rewrite(model, Expand(4), optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    for block in model.blocks:  # type: ignore[union-attr]
        for name, p in block.named_parameters():
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in old[name].items() if isinstance(v, Tensor))
    before = call(model, tokens()).square().mean().item()
    trained(model, tokens(), optimizer, steps=3)
    assert call(model, tokens()).square().mean().item() < before
    # A fit goes on with the first block's; the slope starts fresh.
    model = rewrite(model, LinearExpansion(init="fit"), optimizer=optimizer)
    base, slope = two(model)
    assert optimizer.state[base["mixer.query.weight"]]
    assert not optimizer.state[slope["mixer.query.weight"]]


def test_expanded_models_and_descendants_are_saved_and_loaded_to_the_same_bits(tmp_path: Any) -> None:
    from transformers import BertForSequenceClassification

    model, batch = bert()
    model = trained(rewrite(model, LinearExpansion(depth=4)), batch)
    io.save(model, tmp_path / "expanded")
    loaded = io.load(tmp_path / "expanded")
    assert torch.equal(out(loaded, batch), out(model, batch))
    small = rewrite(loaded, Expand(2))
    io.save(small, tmp_path / "small")
    assert torch.equal(out(io.load(tmp_path / "small"), batch), out(small, batch))
    # To transformers alone it is an ordinary folder of a model with two layers.
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "small")
    assert plain.config.num_hidden_layers == 2
    assert torch.equal(out(plain, batch), out(small, batch))


@pytest.mark.slow  # Some seconds.
def test_torch_export_takes_an_expanded_model() -> None:
    model = trained(rewrite(ours(), LinearExpansion()), tokens())
    exported = torch.export.export(model, (), tokens())
    torch.testing.assert_close(exported.module()(**tokens()), model(**tokens()), rtol=1e-5, atol=1e-6)


def test_weights_in_bf16_are_summed_and_expanded_alike() -> None:
    low = trained(rewrite(ours(), LinearExpansion()), tokens()).to(torch.bfloat16)
    answer = out(low, tokens())
    assert answer.dtype is torch.bfloat16
    assert torch.equal(out(rewrite(low, Expand()), tokens()), answer)


def test_checkpointing_that_transformers_switches_on_goes_along() -> None:
    model, batch = foreign.llama()
    plain = rewrite(model, LinearExpansion()).train()
    other: Any = copy.deepcopy(plain)
    other.activation_checkpointing_enable({"use_reentrant": False})
    for one in (plain, other):
        logits(call(one, batch)).square().mean().backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    blocks: Any = get(rewrite(other, Expand(2)), "model.layers")
    assert all(b.gradient_checkpointing for b in blocks)


def tied() -> nn.Module:
    model = ours()
    model.blocks[2].norm1.weight = model.final_norm.weight
    return model


def odd(change: str) -> nn.Module:
    model: Any = foreign.HomeMade(depth=3) if change != "buffer" else Named()
    block = (model.blocks if change == "buffer" else model.stack)[1]
    if change == "shape":
        block.net[0], block.net[2] = nn.Linear(16, 33), nn.Linear(33, 16)
    elif change == "class":
        block.ln_a = nn.RMSNorm(16)
    elif change == "buffer":
        block.norm.running_mean.add_(1)
    elif change == "type":
        block.double()
    elif change == "more":
        block.attend.q = nn.Linear(16, 16, bias=False)
    elif change == "beside":
        model.stack.append(nn.Tanh())
    return model


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    return AlbertModel(AlbertConfig(**TINY, embedding_size=8, num_hidden_layers=3))


def integer() -> nn.Module:
    model: Any = ours()
    for block in model.blocks:
        block.mixer.query.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "one", "sentence"),
    [
        (lambda: odd("shape"), LinearExpansion(), r"block 0 and block 1 differ in the parameter net.0.bias: \(32,\)"),
        (
            lambda: odd("class"),
            LinearExpansion(),
            "differ in the class of ln_a: LayerNorm and RMSNorm; one base and slope",
        ),
        (lambda: odd("buffer"), LinearExpansion(), "buffer norm.running_mean, which must not depend on depth"),
        (lambda: odd("type"), LinearExpansion(), r"torch.float32 and .* torch.float64"),
        (lambda: odd("more"), LinearExpansion(), "parameter attend.q.bias, which one of them lacks"),
        (lambda: odd("beside"), LinearExpansion(), "holds other modules beside its blocks"),
        (lambda: foreign.convolutional()[0], LinearExpansion(), "has several trunks: name one"),
        (lambda: ours(1), LinearExpansion(), "blocks of Transformer has one block: a line over depth needs"),
        (albert, LinearExpansion(), "runs one block's weights 3 times"),
        (tied, LinearExpansion(), "one parameter stands at blocks.2.norm1.weight, final_norm.weight: what is tied"),
        (integer, LinearExpansion(), "quantised blocks have no line over depth"),
        (lambda: rewrite(ours(), DropAttention(1, order="last")), LinearExpansion(), "not alike: block 0 and block 2"),
        (ours, Expand(2), "has no linearly expanded stack to make blocks of: rewrite it first"),
        (lambda: rewrite(ours(), LinearExpansion()), Expand(2, trunk="layers"), "at 'layers'; it is at 'blocks'"),
        (lambda: rewrite(ours(), LinearExpansion()), LinearExpansion(), "found no repeated blocks in `Transformer`"),
        (lambda: nn.Sequential(*foreign.HomeMade().stack), LinearExpansion(), "the model itself of Sequential"),
    ],
)
def test_models_that_cannot_be_expanded(make: Any, one: Any, sentence: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AnatomyError, match=sentence):
        rewrite(model, one)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LinearExpansion(0), "depth is a number of layers, at least 1, got 0"),
        (lambda: LinearExpansion(init="best"), "init must be 'random' or 'fit', got 'best'"),  # type: ignore[arg-type]
        (lambda: LinearExpansion(slope_std=-1.0), "slope_std must not be negative, got -1.0"),
        (lambda: Expand(True), "depth is a number of layers, at least 1, got True"),
        (lambda: fit_linear([{"w": torch.ones(1)}]), "at least two blocks to be fitted to, got 1"),
    ],
)
def test_bad_options(make: Any, sentence: str) -> None:
    with pytest.raises(LaminaError, match=sentence):
        make()


def test_what_watches_the_blocks_comes_after() -> None:
    from lamina.rewrite import Truncate, check_order

    truncated = rewrite(ours(), Truncate(layers=2))
    with pytest.raises(AnatomyError, match="went through truncate, which watches its blocks: expand first"):
        rewrite(truncated, LinearExpansion())
    with pytest.raises(LaminaError, match="exclude each other: truncate watches the blocks it saw"):
        check_order([Truncate(layers=2), LinearExpansion()])


def in_parallel(rank: int) -> bool:
    """Two replicas, then two shards: half the rows each give the gradients of all rows, and take a step."""
    whole = rewrite(ours(), LinearExpansion()).eval()
    rows = foreign.tokens(rows=4)
    call(whole, {"input_ids": rows}).square().mean().backward()
    for placement in (Placement(data=2), Placement(shard=2)):
        model = rewrite(ours(), LinearExpansion()).eval()
        placed: Any = place(model, placement, device=torch.device("cpu"))
        run = placed if isinstance(placed, nn.Module) else placed.module
        call(run, {"input_ids": rows.chunk(2)[rank]}).square().mean().backward()
        for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
            found: Any = parameter.grad
            found = found.full_tensor() if hasattr(found, "full_tensor") else found
            torch.testing.assert_close(found, expected.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(LaminaError, match="is sharded: take the model back first"):
        rewrite(model, Expand(2))
    return True


@pytest.mark.distributed
@pytest.mark.slow  # Processes take seconds to start.
def test_replicas_and_shards_give_the_gradients_of_one_process(tmp_path: Any) -> None:
    assert in_processes(in_parallel, 2, tmp_path) == [True, True]


def test_several_stacks_are_told_apart_by_trunk() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (foreign.HomeMade(depth=d).stack for d in (2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    model: Any = Both()
    for path in ("second", "first"):
        model = rewrite(model, LinearExpansion(trunk=path))
    before = out(model, {"inputs": torch.ones(2, 3, 16)})
    with pytest.raises(AnatomyError, match="several expanded stacks: name one of 'first', 'second' as trunk"):
        rewrite(model, Expand(2))
    model = rewrite(model, Expand(trunk="first"), Expand())
    assert torch.equal(out(model, {"inputs": torch.ones(2, 3, 16)}), before)
    assert (len(model.first), len(model.second)) == (2, 3)
