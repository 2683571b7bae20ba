"""ByteFormer: sizes, the official function, padding that changes nothing, obfuscation that costs nothing."""

import copy

import pytest
import torch
from benchmarks.byteformer import Reference
from tests.contract.example import Example
from torch.utils.flop_counter import FlopCounterMode

from lamina.data import BytePermutation
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import ByteFormer, load_byteformer
from lamina.nn import Attention, LocalGlobalAttention
from lamina.rewrite import DropAttention, DropBlock, PermuteVocabulary, Replace, rewrite

SMALL = {"classes": 5, "width": 12, "heads": 3, "depth": 4, "kernel": 4, "window": 8, "max_tokens": 400}


def padded_batch():
    torch.manual_seed(3)
    x = torch.randint(256, (3, 150))
    x[1, 83:] = -1
    x[2, 40:] = -1
    return x


EXAMPLES = [
    Example(
        "model",
        "byteformer",
        options={**SMALL, "depth": 2},
        batch=lambda: {"inputs": padded_batch()},
        bad={"kernel": 3},
    )
]


def small(**options):
    torch.manual_seed(0)
    return ByteFormer(**{**SMALL, **options}).eval()


def count(model, without=""):
    return sum(p.numel() for n, p in model.named_parameters() if not without or not n.startswith(without))


def test_parameters_are_those_of_the_published_networks():
    with torch.device("meta"):
        for kernel, tokens, expected in ((32, 50_000, 16_805_416), (4, 50_000, 15_773_224), (16, 10_000, 8_535_592)):
            assert count(ByteFormer(1000, "tiny", kernel=kernel, max_tokens=tokens)) == expected
        assert count(ByteFormer(1000, "tiny", kernel=32, max_tokens=9_415), without="head") == 8_820_096
        for size, (d, layers) in {"small": (384, 12), "base": (768, 12), "huge": (1280, 32)}.items():
            ends, merges = 257 * d + 16 * d * d + 10_000 * d + 2 * d + 1000 * d + 1000, 6 * (2 * d * d + 2 * d)
            assert count(ByteFormer(1000, size)) == ends + layers * (12 * d * d + 13 * d) + merges


def test_multiply_adds_are_those_of_the_closed_form():
    with torch.device("meta"):
        model, x = ByteFormer(1000, "tiny", kernel=32, max_tokens=9_415), torch.zeros(1, 150_668, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
    d, tokens, found = 192, 9_415, 257 * 32 * 192**2 + 192 * 1000
    for i in range(12):
        windows = -(-tokens // 128) if i % 2 == 0 else -(-(tokens + 64) // 128)
        found += 12 * d * d * tokens + 2 * d * 128 * 128 * windows
        if i in (0, 1, 3, 5, 7, 9):
            tokens = -(-tokens // 2)
            found += 2 * d * d * tokens
    # Sums of vectors (the tokens) and of masks are no products.
    assert counter.get_total_flops() / 2 == pytest.approx(found, rel=0.02)
    assert tokens == -(-9_415 // 64)


@pytest.mark.parametrize("shift", [None, 16])
def test_without_masks_it_is_the_public_implementation_with_its_weights_and_gradients(shift):
    torch.manual_seed(0)
    sizes = {"classes": 5, "width": 12, "heads": 3, "depth": 4, "kernel": 4, "window": 8, "max_tokens": 90}
    reference = Reference(**sizes, shift=shift, merged=(0, 1)).eval()
    model = ByteFormer(**sizes, shift=shift, merge_after=(0, 1), mask_attention=False).eval()
    load_byteformer(reference.state_dict(), model)
    for length in (9, 63, 150):
        x = torch.randint(256, (2, length))
        x[1, 7:] = -1
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    reference(x).square().sum().backward()
    qkv = reference.transformer[1].pre_norm_mha[1].qkv_proj.weight.grad
    attention = model.blocks[1].mixer.attention
    mine = torch.cat([getattr(attention, n).weight.grad for n in ("query", "key", "value")])
    torch.testing.assert_close(mine, qkv, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        model.tokens.embedding.table.weight.grad, reference.embeddings.weight.grad, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("length", [4, 7, 37, 63, 64, 150])
def test_a_file_has_the_same_logits_alone_and_in_a_batch_padded_by_any_number_of_bytes(length):
    model = small(merge_after=(0, 1, 3))
    x = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(1))
    alone = model(x)
    for extra in (1, 2, 8, 13, 24):
        longer = torch.randint(256, (2, length + extra), generator=torch.Generator().manual_seed(2))
        longer[0, length:] = -1
        longer[0, :length] = x[0]
        torch.testing.assert_close(model(longer)[:1], alone, rtol=0, atol=1e-5)


def test_the_official_function_is_moved_by_padding():
    model, x = small(mask_attention=False), torch.randint(256, (1, 60))
    padded = torch.cat((x, torch.full((1, 30), -1)), 1)
    assert (model(padded) - model(x)).abs().max() > 1e-3


def test_a_row_of_padding_alone_gives_finite_numbers_and_gradients():
    model, x = small(), torch.randint(256, (2, 60))
    x[1] = -1
    out = model(x)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_tokens_are_as_many_as_the_formulas_say():
    model, found = small(kernel=8, merge_after=(0, 1, 3)), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, o: found.append((i[0].shape[1], o.shape[1])))
    for length in (8, 63, 150):
        found.clear()
        model(torch.randint(256, (1, length)))
        n = (length - 8) // 4 + 1
        half = (n + 1) // 2
        quarter = (half + 1) // 2
        assert found == [(n, half), (half, quarter), (quarter, quarter), (quarter, (quarter + 1) // 2)]


def test_a_re_keyed_model_reads_obfuscated_bytes_as_the_plain_one_did_and_the_way_back_is_the_identity():
    model, x = small(kernel=8), torch.randint(256, (2, 1500))
    hide = BytePermutation(seed=5)
    plain = model(x)
    hidden = rewrite(copy.deepcopy(model), PermuteVocabulary(5))
    assert torch.equal(hidden(hide.table[x].long()), plain)
    assert not torch.allclose(hidden(x), plain)
    back = rewrite(hidden, PermuteVocabulary(5, inverse=True))
    for (name, a), b in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_other_parts_stand_in_its_slots_and_passes_find_their_place():
    x = padded_batch()
    mixer = {"name": "local_global_attention", "group": 8, "latents": 2}
    model = small(mixer=mixer, norm="rms_norm", linear={"name": "pattention", "pairs": 8}, head="prototype_head")
    assert type(model.blocks[1].mixer) is LocalGlobalAttention
    assert model(x).shape == (3, 5)
    assert type(small(mixer={"name": "attention", "bias": True}).blocks[0].mixer) is Attention
    for one in (DropAttention(count=1), DropBlock(count=1), Replace("layer_norm", "rms_norm")):
        changed = rewrite(small(merge_after=(0,)), one, data=[{"inputs": x}])
        assert changed.eval()(x).shape == (3, 5)
    assert small(positions="sinusoidal")(x).shape == (3, 5)
    assert count(small(positions="sinusoidal")) == count(small()) - 400 * 12


@pytest.mark.slow  # Expressions of an unknown length cost a quarter of a minute.
def test_one_graph_takes_files_of_any_length():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = small(depth=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for length in (150, 163, 221):
        x = torch.randint(256, (2, length))
        x[1, 37:] = -1
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_what_cannot_be_is_refused():
    for options, words in (
        ({"size": "large"}, "one of tiny, small, base, huge"),
        ({"size": "tiny"}, "says width and heads and depth already"),
        ({"heads": 5}, "width divide by heads"),
        ({"merge_after": (1, 4)}, r"blocks 0\.\.3 at most once, got \[1, 4\]"),
        ({"merge_after": (1, 1)}, "at most once"),
        ({"shift": 8}, "shift of 8 must be less than the window"),
        ({"positions": "rotary"}, "learned"),
        ({"window": 0}, "at least 1"),
        ({"kernel": 7}, "must be even"),
    ):
        with pytest.raises(LaminaError, match=words):
            small(**options)
    assert issubclass(RecipeError, LaminaError)
    with pytest.raises(ShapeError, match="449 tokens, max_tokens is 400"):
        small()(torch.zeros(1, 900, dtype=torch.long))
    with pytest.raises(ShapeError, match="files as long, got 3"):
        small()(torch.zeros(1, 3, dtype=torch.long))
