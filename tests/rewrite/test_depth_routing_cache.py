"""Decoding from a cache whose layers differ in length equals one pass over all tokens, in batches and in any order."""

import pytest
import torch
from tests.rewrite.routed import gpt2, ids, llama, ours, padded, route, routings
from transformers import DynamicCache

from lamina import probe
from lamina.errors import LaminaError
from lamina.models import Transformer
from lamina.nn import KeyValueCache
from lamina.rewrite.depth_routing import block

MAKERS = [(llama, "sdpa"), (llama, "eager"), (gpt2, "sdpa"), (gpt2, "eager")]


def decoded(model, x, mask, positions, cache, first=8, begin=0):
    """Logits of a prefill and of single steps after it."""
    cuts = [(begin, first)] * (begin < first) + [(t, t + 1) for t in range(first, x.shape[1])]
    return torch.cat(
        [
            model(x[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache).logits
            for a, b in cuts
        ],
        dim=1,
    )


@pytest.mark.parametrize(("make", "implementation"), MAKERS)
@torch.no_grad()
def test_step_by_step_equals_one_pass_with_padding_on_the_left(make, implementation):
    model = route(make(attn_implementation=implementation), [1, 3])
    x, mask, positions = padded()
    whole = model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = DynamicCache()
    found = decoded(model, x, mask, positions, cache)
    keep = mask.bool()
    torch.testing.assert_close(found[keep], whole[keep], rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths[0] == lengths[2] == 20
    assert max(lengths[1], lengths[3]) < 20
    for layer in (cache.layers[1], cache.layers[3]):
        held = layer.positions >= 0
        # No more slots than the fullest row has tokens, in their order, and no padding among them.
        assert int(held.sum(1).max()) == layer.keys.shape[2]
        assert all(row[h].diff().gt(0).all() for row, h in zip(layer.positions, held, strict=True))
        assert all(mask[i, row[h]].all() for i, (row, h) in enumerate(zip(layer.positions, held, strict=True)))


@pytest.mark.parametrize(("make", "implementation"), MAKERS)
@torch.no_grad()
def test_chunks_of_a_prompt_without_any_mask_equal_each_row_by_itself(make, implementation):
    model = route(make(attn_implementation=implementation), [1, 3])
    x, cache = ids(), DynamicCache()
    alone = torch.cat([model(x[i : i + 1], use_cache=False).logits for i in range(4)])
    cuts = [(0, 7), (7, 15), (15, 20)]
    chunks = torch.cat([model(x[:, a:b], past_key_values=cache).logits for a, b in cuts], dim=1)
    for found in (chunks, model(x, use_cache=False).logits):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_generation_in_a_padded_batch_equals_a_full_pass_at_each_step(make):
    model = route(make(), [1, 3])
    x, mask, _ = padded()
    found = model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False)
    mask = torch.cat((mask, torch.ones(4, 8, dtype=torch.long)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(found, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.equal(whole[:, 19:-1].argmax(-1), found[:, 20:])


@torch.no_grad()
def test_beams_are_those_without_a_cache():
    model = route(llama(), [1, 3])
    x, mask, _ = padded()
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    assert torch.equal(model.generate(x, **options), model.generate(x, use_cache=False, **options))


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been():
    model = route(llama(), [1, 3])
    x, mask, positions = padded()
    cache = DynamicCache()
    decoded(model, x[:, :14], mask[:, :14], positions[:, :14], cache)
    for layer in cache.layers:
        layer.crop(-4)
    assert cache.get_seq_length() == 10
    other = ids(4, 20, seed=9)
    other[:, :10] = x[:, :10]
    whole = model(other, attention_mask=mask, position_ids=positions, use_cache=False).logits
    found = decoded(model, other, mask, positions, cache, first=10, begin=10)
    torch.testing.assert_close(found, whole[:, 10:], rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_and_repeated_with_their_positions():
    model = route(llama(), [1, 3])
    x, mask, positions = padded()
    cache = DynamicCache()
    model(x[:, :19], attention_mask=mask[:, :19], position_ids=positions[:, :19], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([7, 0, 4])
    cache.batch_select_indices(rows)
    some = rows // 2
    last = model(
        x[some, 19:], attention_mask=mask[some], position_ids=positions[some, 19:], past_key_values=cache
    ).logits
    whole = model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits[some, -1:]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    cache.reset()
    assert cache.layers[1].positions is None


@torch.no_grad()
def test_a_token_that_no_row_lets_in_writes_nothing_and_keeps_its_bits():
    from lamina import probe

    model = route(llama(), [1], threshold_decode=1.0)
    x, cache = ids(), DynamicCache()
    model(x[:, :10], past_key_values=cache)
    before = cache.layers[1].keys.shape[2]
    with probe.capture(model, ["model.layers.1"], ["model.layers.1"]) as seen:
        model(x[:, 10:11], past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == before
    assert cache.get_seq_length() == 11
    assert torch.equal(seen.input("model.layers.1"), seen.tensor("model.layers.1"))


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "norm": "rms_norm", "feed_forward": "swiglu"}])
@torch.no_grad()
def test_our_own_cache_and_generation(options):
    model = route(ours(**options), [1, 3])
    x, mask, _ = padded()
    whole = model(x, attention_mask=mask)
    cache = KeyValueCache()
    cuts = [(0, 8), *((t, t + 1) for t in range(8, 20))]
    found = torch.cat([model(x[:, a:b], attention_mask=mask[:, :b], cache=cache) for a, b in cuts], 1)
    keep = mask.bool()
    torch.testing.assert_close(found[keep], whole[keep], rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    assert model.caches
    text = model.generate(x, 6, temperature=0)
    assert torch.equal(model(text)[:, 19:-1].argmax(-1), text[:, 20:])


@torch.no_grad()
def test_caches_that_cannot_work_are_refused():
    from transformers import DynamicCache, StaticCache

    model, x = route(llama(), [1, 3]), ids()
    with pytest.raises(LaminaError, match=r"DynamicCache whose layers may differ in length, got a StaticCache"):
        model(x, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    filled = DynamicCache()
    llama()(x[:, :8], past_key_values=filled)
    with pytest.raises(LaminaError, match="that LlamaDecoderLayer did not route"):
        model(x[:, 8:9], past_key_values=filled)
    cache = DynamicCache()
    model(x[:, :8], past_key_values=cache)
    with pytest.raises(LaminaError, match="no decoding from a cache in training"):
        model.train()(x[:, 8:9], past_key_values=cache)
    compact, cache = route(llama(), [1], positions="compact"), DynamicCache()
    compact(x[:, :8], past_key_values=cache)
    with pytest.raises(LaminaError, match="'compact' cannot go on from a cache"):
        compact(x[:, 8:9], past_key_values=cache)


@pytest.mark.parametrize("make", [llama, gpt2, ours])
@pytest.mark.parametrize("nobody", [False, True])
@torch.no_grad()
def test_rows_that_run_apart_leave_the_same_slots_as_together(make, nobody, monkeypatch):
    model, x, seen = route(make(), [1, 3]), ids(), {}
    paths = routings(model)
    with probe.observe(model, {p: lambda m, a, k, o, p=p: seen.__setitem__(p, o.probability) for p in paths}):
        model(x)
    for path, routing in paths.items():
        # Where every row has a token that enters, or all rows but one; the second block is told only by the first.
        top = seen[path].amax(1)
        routing.threshold_prefill = float(top.min()) + (1e-4 if nobody else -1e-4)
    runs = []
    for spare in (10**9, 0):
        monkeypatch.setattr(block, "CALL", spare)
        monkeypatch.setattr(block, "FEW", spare)
        runs.append(held(model, x))
    (logits, together), (found, apart) = runs
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    for (positions, pairs), (expected, others) in zip(apart, together, strict=True):
        assert torch.equal(positions, expected)
        assert bool((expected == -1).any()), "rows differ in length, or this tests nothing"
        for mine, other in zip(pairs, others, strict=True):
            real = (positions >= 0)[:, None, :, None].expand_as(mine)
            torch.testing.assert_close(mine[real], other[real], rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def held(model, x):
    """Logits of a prefill and of four steps, and what each routed layer holds after them."""
    cache = KeyValueCache() if isinstance(model, Transformer) else DynamicCache()
    name = "cache" if isinstance(model, Transformer) else "past_key_values"
    parts = [model(x[:, a:b], **{name: cache}) for a, b in ((0, 16), (16, 17), (17, 18), (18, 19), (19, 20))]
    logits = torch.cat([p if isinstance(p, torch.Tensor) else p.logits for p in parts], dim=1)
    if isinstance(model, Transformer):
        slots = vars(cache)["routed"].values()
        return logits, [(s.positions, [t for pair in s.inner.slots.values() for t in pair]) for s in slots]
    return logits, [(s.positions, [s.keys, s.values]) for s in (cache.layers[1], cache.layers[3])]


def test_rows_run_apart_where_that_spares_more_fillers_than_it_may_cost():
    assert block.row_groups([363, 150], 32) == [[0], [1]]
    assert block.row_groups([270, 280], 32) == [[1, 0]]
    assert block.row_groups([5, 9, 5, 9, 0], 0) == [[1, 3], [0, 2], [4]]
    # 10 fillers in each of four rows are 40.
    assert block.row_groups([20, 10, 10, 10, 10], 39) == [[0], [1, 2, 3, 4]]
    assert block.row_groups([20, 10, 10, 10, 10], 40) == [[0, 1, 2, 3, 4]]
