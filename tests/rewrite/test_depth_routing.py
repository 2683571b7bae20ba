"""Depth routing: dense limits, a brute-force reference, protection, counted FLOPs, other people's models, bad input."""

import copy
import json
from unittest import mock

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import convolutional, home_made, vision
from tests.rewrite.routed import gpt2, ids, llama, llava, ours, padded, route, routings
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lamina import io, probe
from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError
from lamina.lineage import Lineage
from lamina.models import Transformer
from lamina.nn.token_router import ENTER
from lamina.objectives import NextToken, RouterLoss, WeightedSum
from lamina.rewrite import DepthRouting, DropBlock, EarlyExit, check_order, history, rewrite
from lamina.rewrite.rewriting import from_json, to_json

EXAMPLES = [
    Example("pass", "depth_routing", options={"count": 2}, bad={"skip": 1.0}),
    Example("pass", "depth_routing", options={"layers": "every_other", "scale": "block", "router": "per_layer"}),
]


def watched(model, *args, **kwargs):
    """Output, and what each router decided."""
    seen = {}
    paths = routings(model)
    with probe.observe(model, {p: (lambda m, a, k, o, p=p: seen.__setitem__(p, o)) for p in paths}):
        return model(*args, **kwargs), seen


@pytest.mark.parametrize("make", [ours, llama, gpt2])
def test_without_skipping_it_is_the_dense_model(make):
    dense = make()
    model = route(copy.deepcopy(dense), [1, 2], skip=0.0, scale="none")
    x = ids()
    for mode in (True, False):
        for routing in routings(model).values():
            routing.threshold_prefill = 0.0
        assert torch.equal(logits(model.train(mode)(x)), logits(dense.train(mode)(x)))


def scaled(block, factor):
    """A block whose feed-forward's (last) output is multiplied."""
    plain = block.mlp.forward
    block.mlp.forward = lambda x: plain(x) * factor()


@pytest.mark.parametrize("scale", ["mlp", "block"])
def test_the_probability_scales_the_feed_forward_or_the_whole_update(scale):
    dense = llama()
    model = route(copy.deepcopy(dense), [2], skip=0.0, scale=scale).train()
    x = ids()
    found, seen = watched(model, x)
    p = seen["model.layers.2.routing"].probability[..., None]
    block = dense.model.layers[2]
    if scale == "mlp":
        scaled(block, lambda: p)
    else:
        plain = block.forward
        block.forward = lambda h, **kw: h + p * (plain(h, **kw) - h)
    torch.testing.assert_close(found.logits, dense.train()(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [ours, llama, gpt2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selected_tokens_equal_a_block_that_cannot_see_the_others(make, training, dtype):
    dense = make()
    model = route(copy.deepcopy(dense), [2], scale="none").to(dtype)
    x, mask, positions = padded()
    given = {"attention_mask": mask} | ({} if make is ours else {"position_ids": positions, "use_cache": False})
    path = routings(model)
    block = next(iter(path)).removesuffix(".routing")
    with torch.no_grad(), probe.capture(model, [block], [block]) as around:
        _, seen = watched(model.train(training), x, **given)
    before, after = around.input(block), around.tensor(block)
    enters = next(iter(seen.values())).enters
    assert not enters.all()
    assert enters.any()
    assert torch.equal(after[~enters], before[~enters])
    # Brute force: all tokens run, and see of the others only those that entered.
    real = enters & mask.bool()
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    seen_by = (causal & real[:, None, :]) | torch.eye(20, dtype=torch.bool)
    inner = dense.to(dtype).train(training).get_submodule(block)
    with torch.no_grad():
        if make is ours:
            wanted = inner(before, attention_mask=real, positions=torch.arange(20))
        elif make is llama:
            arrays = dense.model.rotary_emb(before, position_ids=positions)
            wanted = inner(before, attention_mask=seen_by[:, None], position_embeddings=arrays)
        else:
            wanted = inner(before, attention_mask=seen_by[:, None])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(after[real], wanted[real], rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_padding_never_enters_and_changes_nothing():
    model = route(llama(), [1, 3])
    x, mask, positions = padded()
    with torch.no_grad():
        found, seen = watched(model, x, attention_mask=mask, position_ids=positions, use_cache=False)
        assert not any((c.enters & ~mask.bool()).any() for c in seen.values())
        for row in range(4):
            keep = mask[row].bool()
            alone = model(x[row : row + 1, keep], use_cache=False).logits[0]
            torch.testing.assert_close(found.logits[row, keep], alone, rtol=1e-4, atol=1e-4)


def test_compact_positions_number_the_tokens_that_entered():
    dense = llama()
    x, mask, positions = padded()
    model = route(copy.deepcopy(dense), [2], scale="none", positions="compact")
    block = "model.layers.2"
    with torch.no_grad(), probe.capture(model, [block], [block]) as around:
        found, seen = watched(model, x, attention_mask=mask, position_ids=positions, use_cache=False)
    enters = seen[f"{block}.routing"].enters
    for row in range(4):
        h = around.input(block)[row : row + 1, enters[row]]
        arrays = dense.model.rotary_emb(h, position_ids=torch.arange(h.shape[1])[None])
        wanted = dense.model.layers[2](h, position_embeddings=arrays)
        torch.testing.assert_close(around.tensor(block)[row, enters[row]], wanted[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        # In a graph, where all tokens are computed under a mask.
        again = model(x, attention_mask=mask, position_ids=positions, use_cache=False)
    keep = mask.bool()
    torch.testing.assert_close(again.logits[keep], found.logits[keep], rtol=1e-4, atol=1e-4)


def test_protected_tokens_enter_through_a_batch_entry_that_the_model_never_sees():
    model = route(ours(), [1, 2], protect="question")
    x = ids()
    protect = torch.zeros(4, 20, dtype=torch.bool)
    protect[:, -5:] = True
    protect[1, :3] = True
    # Nothing to tell them apart by: the first tokens would win.
    torch.nn.init.zeros_(model.token_router.weight)
    seen = []
    with probe.observe(model, dict.fromkeys(routings(model), lambda m, a, k, o: seen.append(o))):
        call(model.train(), {"input_ids": x, "question": protect})
    assert all(c.enters[protect].all() for c in seen)
    assert all(c.top.shape == (4, 20 - 12 // 2) for c in seen)
    with pytest.raises(LaminaError, match=r"question is a mask .* got \(4,\)"):
        call(model, {"input_ids": x, "question": protect[:, 0]})
    with pytest.raises(LaminaError, match=r"protect \(4, 19\) for tokens \(4, 20\)"):
        call(model, {"input_ids": x, "question": protect[:, 1:]})


def test_protected_tokens_enter_by_threshold_too_and_a_prompts_mask_ends_with_the_prompt():
    model = route(llama(), [2, 3], protect="question", threshold_prefill=1.0, threshold_decode=1.0).eval()
    x = ids()
    protect = torch.zeros(4, 20, dtype=torch.bool)
    protect[:, 7:12] = True
    protect[2, 0] = True
    seen = []
    with probe.observe(model, dict.fromkeys(routings(model), lambda m, a, k, o: seen.append(o))), torch.no_grad():
        past = model(input_ids=x, question=protect, use_cache=True).past_key_values
        assert all(torch.equal(c.enters, protect) for c in seen)
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            model(input_ids=x, question=protect, use_cache=False)
        assert all(torch.equal(c.enters, protect) for c in seen[2:])
        model(input_ids=x[:, :1], question=protect, past_key_values=past, use_cache=True)
    assert not any(c.enters.any() for c in seen[4:])
    with pytest.raises(LaminaError, match=r"protect \(4, 19\) for tokens \(4, 20\)"):
        model(input_ids=x, question=protect[:, 1:], use_cache=False)


@pytest.mark.parametrize("scale", ["mlp", "block", "none"])
def test_the_task_reaches_the_router_exactly_if_it_scales(scale):
    model = route(gpt2(), [1, 3], scale=scale).train()
    model(ids()).logits.square().mean().backward()
    gradient = model.transformer.token_router.weight.grad
    assert (gradient is not None and float(gradient.abs().max()) > 0) == (scale != "none")


@pytest.mark.parametrize(("router", "count"), [("shared", 1), ("per_layer", 3)])
def test_a_shared_router_is_one_tensor_under_one_name(router, count):
    dense = llama()
    names = {n: id(p) for n, p in dense.named_parameters()}
    model = route(dense, [1, 2, 3], router=router)
    fresh = [n for n, p in model.named_parameters() if id(p) not in names.values()]
    assert len(fresh) == count
    assert set(model.state_dict()) == set(names) | set(fresh)
    weights = [dict(model.named_parameters())[n] for n in fresh]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert {n: id(p) for n, p in model.named_parameters() if n in names} == names


def test_counted_operations_fall_by_half_and_by_a_quarter():
    def count(model, block):
        # The counter knows no formula for the fused attention of CPUs.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.get_submodule(block)(torch.randn(2, 64, 32), positions=torch.arange(64))
        by_operation = dict.fromkeys(("linear", "attention"), 0)
        for name, flops in counter.get_flop_counts()["Global"].items():
            by_operation["attention" if "attention" in str(name) or "bmm" in str(name) else "linear"] += flops
        return by_operation

    dense = ours()
    whole = count(copy.deepcopy(dense).train(), "blocks.1")
    routed = count(route(dense, [1], skip=0.5, scale="none").train(), "blocks.1")
    router = 2 * 2 * 64 * 32 * 2
    assert routed["linear"] - router == whole["linear"] // 2
    assert routed["attention"] == whole["attention"] // 4 > 0


def test_a_vision_language_model_skips_image_tokens_in_training_and_generates():
    model, image = llava(), 63
    x = ids(3, 24)
    x[:, 2:18] = image
    batch = {
        "input_ids": x,
        "attention_mask": torch.ones_like(x),
        "pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    model = rewrite(model, DepthRouting(count=2, skippable=[image]), data=[batch])
    decision = from_json(DepthRouting, history(model)[0].decision, 1)
    assert decision.trunk == "model.language_model.layers"
    assert 0 not in decision.layers
    _, seen = watched(model.train(), **batch)
    for choice in seen.values():
        assert choice.top.shape == (3, 24 - 16 // 2)
        assert choice.enters[x != image].all()
    with torch.no_grad():
        model.eval()
        found = model.generate(**batch, max_new_tokens=4, do_sample=False)
        whole = model(**{**batch, "input_ids": found, "attention_mask": torch.ones_like(found)}, use_cache=False)
    assert torch.equal(whole.logits[:, 23:-1].argmax(-1), found[:, 24:])


def test_rows_with_unequal_counts_agree_where_a_block_takes_no_mask():
    model, batch = home_made()
    model = route(model.eval(), [0, 2], inference="threshold")
    torch.nn.init.normal_(model.token_router.weight, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        together, seen = watched(model, batch["inputs"])
        alone = torch.cat([model(batch["inputs"][i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert any(len(set(c.enters.sum(1).tolist())) > 1 for c in seen.values())


def test_torch_encoder_layers_route_with_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    model = route(model, [0, 2], inference="threshold")
    x = torch.randn(3, 9, 16)
    padding = torch.zeros(3, 9, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[1, :6], model(x[1:2, :6])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0], model(x[:1])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [vision, home_made])
def test_encoders_route_by_rank_unless_told_otherwise(make):
    model, batch = make()
    model = rewrite(model.eval(), DepthRouting(count=2), data=[batch])
    assert {r.inference for r in routings(model).values()} == {"topk"}
    with torch.no_grad():
        torch.testing.assert_close(logits(call(model.train(), batch)), logits(call(model.eval(), batch)))


def test_layers_of_the_lowest_rank_are_chosen_and_the_table_says_so():
    model = ours()
    one = DepthRouting(count=2)
    decision = one.decide(model, [{"input_ids": ids()}])
    order = sorted(range(1, 4), key=lambda i: (round(decision.ranks[i], 6), i))
    assert decision.layers == tuple(sorted(order[:2]))
    assert "0.50 of its linear layers and 0.25 of its attention" in decision.table()
    assert DepthRouting(threshold=1e9).decide(model, [{"input_ids": ids()}]).layers == (1, 2, 3)
    assert DepthRouting("every_other").decide(model).layers == (1, 3)
    again = from_json(DepthRouting, json.loads(json.dumps(to_json(decision))), 1)
    assert again == decision
    with pytest.raises(LaminaError, match="would route no block"):
        DepthRouting(threshold=0.0).decide(model, [{"input_ids": ids()}])


def test_saved_and_loaded_it_generates_the_same(tmp_path):
    model = route(llama(), [1, 3], router="per_layer", threshold_decode=0.4)
    x = ids()
    wanted = model.generate(x, max_new_tokens=6, do_sample=False)
    io.save(model, tmp_path / "routed")
    loaded = io.load(tmp_path / "routed")
    assert torch.equal(loaded.generate(x, max_new_tokens=6, do_sample=False), wanted)


@pytest.mark.parametrize("make", [ours, pytest.param(llama, marks=pytest.mark.slow)])
def test_exported_it_gives_the_same_numbers(make):
    model = route(make(), [1, 3])
    x = ids()
    given = {} if make is ours else {"use_cache": False}
    with torch.no_grad():
        wanted = logits(model(x, **given))
        exported = torch.export.export(model, (x,), given, strict=False).module()
        torch.testing.assert_close(logits(exported(x, **given)), wanted, rtol=1e-4, atol=1e-4)


def test_annealing_is_told_by_the_trainer_and_a_copy_is_its_own():
    model = route(ours(), [1], anneal=0.5).train()
    (routing,) = routings(model).values()
    routing.set_progress(0.0)
    twin = copy.deepcopy(model)
    next(iter(routings(twin).values())).set_progress(1.0)
    _, seen = watched(model, ids())
    _, seen_by_twin = watched(twin, ids())
    assert seen["blocks.1.routing"].top.shape[1] == 20
    assert seen_by_twin["blocks.1.routing"].top.shape[1] == 10
    with torch.no_grad():
        twin.token_router.weight.zero_()
    assert bool(model.token_router.weight.any())
    assert not watched(twin, ids())[1]["blocks.1.routing"].logits.any()


def test_checkpointed_blocks_give_the_same_gradients_and_can_be_copied_afterwards():
    gradients = []
    for checkpointing in (False, True):
        model = route(llama(), [1, 2]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids()).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        copy.deepcopy(model)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_after_training_the_threshold_decides_as_the_top_k_does():
    torch.manual_seed(0)
    model = Transformer(4, 32, 2, vocabulary=16, context=32)
    model = route(model, [1, 2], protect=None)
    objective = WeightedSum([(1.0, NextToken()), (0.1, RouterLoss())], ["task", "router"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def batch():
        # Half of the tokens are noise that predicts nothing.
        x = torch.randint(8, (16, 32), generator=generator)
        x[:, 1::2] += 8
        return {"input_ids": x, "labels": x.roll(-1, 1)}

    for _ in range(150):
        optimizer.zero_grad()
        losses = objective(model.train(), batch())
        losses["loss"].backward()
        optimizer.step()
    assert float(objective(model, batch())["router.agreement"]) >= 0.9
    _, seen = watched(model.eval(), batch()["input_ids"])
    for choice in seen.values():
        by_rank = choice.probability.argsort(dim=1, descending=True, stable=True)[:, :16]
        chosen = torch.zeros_like(choice.enters).scatter(1, by_rank, True)
        assert float((chosen == choice.enters).float().mean()) >= 0.9
        assert choice.logits[..., ENTER].isfinite().all()


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 24, norm_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x):
        return self.layers(x)


def windowed():
    return ours(mixer={"name": "attention", "kernel": "local"})


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (ours, {"layers": [0, 1]}, LaminaError, r"cannot route blocks \[0\] of blocks"),
        (ours, {"layers": [1, 9]}, LaminaError, r"cannot route blocks \[9\]"),
        (ours, {"count": 4}, LaminaError, "count=4, but only 3 of 4 blocks"),
        (PostNorm, {"layers": [1]}, AnatomyError, "only pre-norm blocks"),
        (TimeFirst, {"layers": [1]}, AnatomyError, "batch_first=True"),
        (lambda: convolutional()[0], {"layers": [1]}, AnatomyError, "several trunks"),
        (lambda: ours(norm="batch_norm"), {"layers": [1]}, AnatomyError, "statistics over tokens"),
        (windowed, {"layers": [1]}, AnatomyError, "needs all tokens"),
    ],
)
def test_models_that_cannot_be_routed_are_told_so_and_left_alone(make, options, error, words):
    model = make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=words):
        rewrite(model, DepthRouting(**options), data=[{"input_ids": ids()}])
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either count .* or threshold"),
        ({"count": 1, "threshold": 2.0}, "exactly one"),
        ({"layers": [1], "count": 1}, "leave them out"),
        ({"layers": "odd"}, "'every_other' or a list"),
        ({"layers": [-1]}, "not negative"),
        ({"count": 0}, "count is a whole number"),
        ({"count": 1, "samples": 0}, "samples is a whole number"),
        ({"count": 1, "skip": -0.1}, "0 <= skip < 1"),
        ({"count": 1, "scale": "attention"}, "scale must be one of mlp, block, none"),
        ({"count": 1, "positions": "new"}, "positions must be one of"),
        ({"count": 1, "router": "own"}, "router must be one of"),
        ({"count": 1, "threshold_prefill": 2.0}, "threshold_prefill is a probability"),
        ({"count": 1, "protect": "mask", "skippable": [3]}, "not both"),
        ({"count": 1, "protect": "a mask"}, "name of a batch entry"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(LaminaError, match=words):
        DepthRouting(**options)


def test_data_is_asked_for_where_ranks_are_and_two_passes_of_a_kind_are_refused():
    with pytest.raises(LaminaError, match="pass data="):
        DepthRouting(count=1).decide(ours())
    routed = route(ours(), [1])
    with pytest.raises(AnatomyError, match="already has a forward of its own"):
        DepthRouting([1]).decide(routed)
    for earlier, words in ((EarlyExit(), "put depth_routing first"), (DepthRouting([1]), "routed once")):
        with pytest.raises(LaminaError, match=words):
            check_order([earlier, DepthRouting([1])])
    with pytest.raises(LaminaError, match="drop first"):
        check_order([DepthRouting([1]), DropBlock(1)])
    with pytest.raises(AnatomyError, match="has 5 blocks, the decision is for 4"):
        deeper = Transformer(5, 32, 4, vocabulary=64, context=64)
        DepthRouting([1]).apply(deeper, DepthRouting([1]).decide(ours()), Lineage())


def test_a_feed_forward_replaced_after_routing_is_scaled_like_the_one_before():
    model = route(llama(), [1])
    wanted = model(ids()).logits
    fresh = llama().model.layers[1].mlp
    model.model.layers[1].mlp = fresh
    assert torch.equal(model(ids()).logits, wanted)
    model.model.layers[1].forward.plain = lambda x, **kw: x
    with pytest.raises(LaminaError, match="no longer the block's feed-forward"):
        model(ids())


def test_few_skippable_tokens_are_warned_of(caplog):
    protect = torch.zeros(4, 20, dtype=torch.bool)
    DepthRouting([1], protect="protect").decide(ours(), [{"input_ids": ids(), "protect": protect}])
    assert "at most 20 tokens of a row may be skipped" in caplog.text
