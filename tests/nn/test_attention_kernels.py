from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from tests.onnx_export import export
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamina import io
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import Transformer
from lamina.nn.attention import Attention
from lamina.nn.attention_kernels import KERNELS, KernelName, make_kernel, written_out
from lamina.nn.attention_kernels.bigbird import BigBirdKernel, draw_blocks
from lamina.nn.attention_kernels.features import PerformerKernel, by_features, orthogonal
from lamina.nn.attention_kernels.linformer import LinformerKernel
from lamina.nn.attention_kernels.sinkhorn import SinkhornKernel

HEADS, WIDTH, CONTEXT = 2, 4, 63
SMALL: dict[str, dict[str, Any]] = {
    "linear": {},
    "local": {"window": 5},
    "strided_sparse": {"stride": 4},
    "longformer": {"window": 4, "global_tokens": 2},
    "bigbird": {"block": 4, "random_blocks": 2, "seed": 0},
    "linformer": {"rank": 6},
    "performer": {"features": 9, "seed": 0},
    "sinkhorn": {"block": 4, "iterations": 3},
    "synthesizer": {},
}
CAUSAL = ["linear", "local", "strided_sparse", "performer", "synthesizer"]
EXACT = ["local", "strided_sparse", "longformer", "bigbird"]
"""Softmax attention with fewer pairs: a mask says which."""


def make(name: str, causal: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"heads": HEADS, "head_width": WIDTH, "context": CONTEXT, "causal": causal}
    kernel = make_kernel({"name": name, **SMALL[name], **options}, **given)
    assert kernel is not None
    return kernel.double()


def qkv(tokens: int, seed: int = 1, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = 3, batch, HEADS, tokens, WIDTH
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind(0))


def padding(tokens: int, real: int) -> Tensor:
    """All tokens of the first row, `real` of the second."""
    return (torch.arange(tokens) < torch.tensor([[tokens], [real]]))[:, None, None]


def pairs(name: str, kernel: Any, tokens: int, causal: bool) -> Tensor:
    """Which token sees which, written out one by one."""
    table = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(tokens):
            if name == "local":
                sees = abs(i - j) <= kernel.window
            elif name == "strided_sparse":
                sees = abs(i - j) <= kernel.stride or (i - j) % kernel.stride == 0
            elif name == "longformer":
                sees = abs(i - j) <= kernel.window or min(i, j) < kernel.global_tokens
            else:
                own, other = i // kernel.block, j // kernel.block
                sees = abs(own - other) <= 1 or min(own, other) < 1 or other in kernel.random[own].tolist()
            table[i, j] = sees and (j <= i or not causal)
    return table


def reference(name: str, kernel: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, causal: bool = False) -> Tensor:
    """Every kernel through a table of all pairs; seen (B, 1, 1, T)."""
    tokens = q.shape[2]
    itself, earlier = torch.eye(tokens, dtype=torch.bool), torch.ones(tokens, tokens).tril().bool()
    if name in EXACT:
        return written_out(q, k, v, pairs(name, kernel, tokens, causal) & seen | itself)
    if name == "linear":
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * seen * (earlier if causal else 1)
        return weights / weights.sum(-1, keepdim=True) @ v
    if name == "performer":
        w, scale = kernel.projection, WIDTH**-0.25
        phi = [(x * scale @ w.T - (x * scale).square().sum(-1, keepdim=True) / 2).exp() for x in (q, k)]
        weights = phi[0] @ phi[1].mT * seen * (earlier if causal else 1)
        return weights / weights.sum(-1, keepdim=True) @ v
    if name == "linformer":
        k, v = (weight[:, :tokens] @ (x * seen.mT) for weight, x in ((kernel.keys, k), (kernel.values, v)))
        return (q @ k.mT / math.sqrt(WIDTH)).softmax(-1) @ v
    if name == "synthesizer":
        scores = torch.relu(q @ kernel.first + kernel.first_bias) @ kernel.second + kernel.second_bias
        mask = (seen & earlier | itself) if causal else seen
        return scores[..., :tokens].masked_fill(~mask, -math.inf).softmax(-1) @ v
    return sorted_blocks(kernel, q, k, v, seen[:, 0, 0])


def sorted_blocks(kernel: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Sinkhorn attention, one sequence, one head and one query at a time."""
    size, out = kernel.block, torch.zeros_like(q)
    for b in range(q.shape[0]):
        real = int(seen[b].sum())
        blocks = -(-real // size)
        for h in range(HEADS):
            keys, values = (F.pad(x[b, h, :real], (0, 0, 0, blocks * size - real)).split(size) for x in (k, v))
            there = F.pad(torch.ones(real, dtype=q.dtype), (0, blocks * size - real)).split(size)
            order = torch.stack([torch.stack([kernel.places[h, :, i] @ c.sum(0) for c in keys]) for i in range(blocks)])
            order = (order / kernel.temperature).exp()
            for _ in range(kernel.iterations):
                order = order / order.sum(1, keepdim=True)
                order = order / order.sum(0, keepdim=True)
            for t in range(real):
                i = t // size
                beside = [sum(order[i, j] * x[j] for j in range(blocks)) for x in (keys, values, there)]
                scores = torch.cat((keys[i], beside[0])) @ q[b, h, t] / math.sqrt(WIDTH)
                weights = scores.exp() * torch.cat((there[i], beside[2]))
                out[b, h, t] = weights / weights.sum() @ torch.cat((values[i], beside[1]))
    return out


@pytest.mark.parametrize("tokens", [1, 7, 63])
@pytest.mark.parametrize(("name", "causal"), [*((n, False) for n in KERNELS), *((n, True) for n in CAUSAL)])
def test_outputs_and_gradients_are_those_of_a_table_of_all_pairs(name: str, causal: bool, tokens: int) -> None:
    kernel, inputs = make(name, causal=causal), [t.requires_grad_() for t in qkv(tokens)]
    real = max(1, tokens - tokens // 4)
    seen = padding(tokens, real)
    ours, theirs = kernel(*inputs, seen), reference(name, kernel, *inputs, seen, causal)
    # What stands at a padded place is of no account.
    ours, theirs = (torch.where(seen.mT, t, 0.0) for t in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    wanted = [*inputs, *kernel.parameters()]
    weight = torch.randn_like(ours)
    got, want = (
        torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True, materialize_grads=True)
        for out in (ours, theirs)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", KERNELS)
def test_a_mask_of_ones_changes_nothing_and_a_padded_batch_equals_the_unpadded_one(name: str) -> None:
    kernel, (q, k, v) = make(name), qkv(22)
    whole = kernel(q, k, v)
    torch.testing.assert_close(kernel(q, k, v, torch.ones(1, 1, 1, 22, dtype=torch.bool)), whole)
    more = [torch.cat((t, 9 * torch.ones(2, HEADS, 15, WIDTH, dtype=t.dtype)), dim=2) for t in (q, k, v)]
    seen = padding(37, 22)[1:]
    torch.testing.assert_close(kernel(*more, seen)[:, :, :22], whole)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_kernel_lets_nothing_of_later_tokens_through(name: str) -> None:
    kernel, (q, k, v) = make(name, causal=True), qkv(30)
    before = kernel(q, k, v)
    for t in (q, k, v):
        t[:, :, 17:] += 3.0
    after = kernel(q, k, v)
    torch.testing.assert_close(after[:, :, :17], before[:, :, :17])
    assert not torch.allclose(after[:, :, 17:], before[:, :, 17:])


@pytest.mark.parametrize("name", KERNELS)
def test_float32_and_bfloat16_stay_near_float64(name: str) -> None:
    kernel, inputs = make(name), qkv(19)
    exact = kernel(*inputs)
    torch.testing.assert_close(kernel.float()(*(t.float() for t in inputs)).double(), exact, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = kernel(*(t.bfloat16() for t in inputs))
    assert (rounded.double() - exact).abs().max() < 0.05 * exact.abs().max()


class Largest(TorchDispatchMode):
    """The largest tensor that is made inside, in numbers."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


GROWTH = {"strided_sparse": 2**1.5, "synthesizer": 4.0}


@pytest.mark.parametrize("name", KERNELS)
def test_memory_grows_with_the_tokens_and_not_with_their_square(name: str) -> None:
    largest = []
    for tokens in (4096, 8192):
        with torch.device("meta"):
            given = {"heads": HEADS, "head_width": WIDTH, "context": tokens}
            kernel = make_kernel(name, **given)
            assert kernel is not None
            inputs = [torch.empty(1, HEADS, tokens, WIDTH) for _ in range(3)]
        with Largest() as seen:
            kernel(*inputs)
        largest.append(seen.size)
    assert largest[1] / largest[0] == pytest.approx(GROWTH.get(name, 2.0), rel=0.1)


def test_windows_that_reach_everywhere_are_softmax() -> None:
    q, k, v = qkv(9)
    expected = F.scaled_dot_product_attention(q, k, v)
    for name, options in {
        "local": {"window": 8},
        "longformer": {"window": 1, "global_tokens": 9},
        "strided_sparse": {"stride": 8},
        "bigbird": {"block": 5},
    }.items():
        torch.testing.assert_close(make(name, **options)(q, k, v), expected)
    linformer = LinformerKernel(9, rank=9).double()
    for weight in (linformer.keys, linformer.values):
        nn.init.eye_(weight)
    torch.testing.assert_close(linformer(q, k, v), expected)
    torch.testing.assert_close(written_out(q, k, v), expected)


def test_random_features_are_orthogonal_and_their_mean_is_softmax() -> None:
    w = orthogonal(8, 4, seed=0)
    for group in w.split(4):
        torch.testing.assert_close(group @ group.T, torch.diag(group.square().sum(1)), atol=1e-5, rtol=0)
    assert orthogonal(4000, 4, seed=0).mean(0).abs().max() < 0.1, "no direction is preferred"
    q, k, v = (0.3 * t for t in qkv(12))
    expected, errors = F.scaled_dot_product_attention(q, k, v), []
    for features in (64, 4096):
        found = PerformerKernel(WIDTH, features, seed=1).double()(q, k, v)
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] < 0.015
    assert errors[0] > 3 * errors[1]


def test_large_queries_and_keys_do_not_leave_the_range_of_the_features() -> None:
    """In float32 exp(-100) is nothing: the factor that all keys share must be taken out."""
    q, k, v = (12 * t for t in qkv(12))
    for causal in (False, True):
        kernel = make("performer", causal=causal)
        exact = kernel(q, k, v)[:, :, -1]
        found = kernel.float()(*(t.float() for t in (q, k, v)))
        assert found.isfinite().all()
        torch.testing.assert_close(found[:, :, -1].double(), exact, atol=1e-2, rtol=1e-2)


def test_a_strong_key_leaves_no_rounding_to_earlier_tokens() -> None:
    """A sum less its last term would: at the end of a chunk such a key is most of the sum."""
    q, k, v = (t.float() for t in qkv(128))
    k[:, :, 127] = 1e6
    kernel = make("linear", causal=True).float()
    found = kernel(q, k, v)[:, :, :127]
    torch.testing.assert_close(found, kernel(*(t[:, :, :127] for t in (q, k, v))), atol=1e-5, rtol=1e-4)


def test_padding_does_not_set_the_range_of_the_features() -> None:
    q, k, v = (20 * t.float() for t in qkv(12))
    kernel = make("performer").float()
    alone = kernel(q[:, :, :7], k[:, :, :7], v[:, :, :7])
    torch.testing.assert_close(kernel(q, k, v, padding(12, 7))[1:, :, :7], alone[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "causal"), [*((n, False) for n in KERNELS), *((n, True) for n in CAUSAL)])
def test_a_row_of_padding_alone_gives_numbers_and_leaves_the_others(name: str, causal: bool) -> None:
    kernel, inputs = make(name, causal=causal), [t.requires_grad_() for t in qkv(13)]
    out = kernel(*inputs, padding(13, 0))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs if t.grad is not None)
    torch.testing.assert_close(out[:1], kernel(*(t[:1] for t in inputs)))


def test_the_chunked_causal_sum_does_not_depend_on_the_chunk() -> None:
    q, k, v = (t.abs() for t in qkv(13))
    sums = [by_features(q, k, v, None, causal=True, chunk=chunk) for chunk in (1, 3, 64)]
    torch.testing.assert_close(sums[0], sums[2])
    torch.testing.assert_close(sums[1], sums[2])


def test_random_blocks_are_different_distant_and_drawn_once_a_layer() -> None:
    table = draw_blocks(12, 3, 1, seed=0)
    for i, row in enumerate(table.tolist()):
        assert len(set(row)) == 3
        assert all(j >= 1 and abs(i - j) > 1 for j in row)
    assert (draw_blocks(3, 2, 1, seed=0) == -1).any(), "three blocks have nothing distant"
    torch.manual_seed(0)
    one, other = BigBirdKernel(200), BigBirdKernel(200)
    assert not torch.equal(one.random, other.random)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.random, other.random)


def test_sorting_is_doubly_stochastic_and_can_be_any_permutation() -> None:
    kernel = make("sinkhorn", iterations=1000)
    _, k, _ = qkv(16)
    order = kernel.sorting(k.unflatten(2, (4, 4)), torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(order.sum(-1), torch.ones_like(order[..., 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(order.sum(-2), torch.ones_like(order[..., 0]), atol=1e-6, rtol=0)
    # Block j is marked by its j-th channel: place i looks for the mark of block 3 - i.
    hard = SinkhornKernel(16, heads=1, head_width=4, block=4, temperature=0.01).double()
    with torch.no_grad():
        hard.places.copy_(torch.eye(4).flip(0)[None])
    marked = torch.eye(4, dtype=torch.float64).repeat_interleave(4, 0)[None, None]
    q, v = torch.randn(2, 1, 1, 16, 4, dtype=torch.float64)
    block = torch.arange(16) // 4
    mask = (block[:, None] == block) | (block[:, None] == 3 - block)
    torch.testing.assert_close(hard(q, marked, v), written_out(q, marked, v, mask))


def test_the_random_synthesizer_is_a_learned_table_and_attention_makes_no_other_projection() -> None:
    kernel, (q, k, v) = make("synthesizer", logits="random"), qkv(7)
    torch.testing.assert_close(kernel(q, k, v), kernel.table[:, :7, :7].softmax(-1) @ v)
    for logits, absent in (("random", ["query", "key"]), ("dense", ["key"])):
        layer = Attention(8, 2, context=9, kernel={"name": "synthesizer", "logits": logits})
        assert [n for n in ("query", "key", "value") if getattr(layer, n) is None] == absent
        layer(torch.randn(2, 7, 8)).square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(("name", "causal"), [*((n, False) for n in KERNELS), *((n, True) for n in CAUSAL)])
def test_a_transformer_takes_a_kernel_by_name_from_a_recipe(name: str, causal: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocabulary": 11, "context": 9, "kv_heads": 1, "causal": causal}
    position = "rotary" if causal else "learned"
    mixer = {"name": "attention", "kernel": {"name": name, **({"rank": 3} if name == "linformer" else {})}}
    model = Transformer(2, 8, 2, **sizes, position=position, mixer=mixer).eval()
    ids = torch.randint(11, (2, 9))
    out = model(ids, attention_mask=torch.ones(2, 9, dtype=torch.bool))
    torch.testing.assert_close(out, model(ids))
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    io.save(model, tmp_path / "saved")
    torch.manual_seed(1)
    assert torch.equal(io.load(tmp_path / "saved")(ids), model(ids))
    if causal:
        assert not model.caches
        tokens = model.generate(ids[:, :3], steps=4, temperature=0)
        assert torch.equal(tokens[:, -1], model(tokens[:, :-1])[:, -1].argmax(-1))


def compiled_and_exported(name: str, causal: bool) -> None:
    torch.compiler.reset()
    layer = Attention(8, 2, context=24, causal=causal, kernel=name, bias=True)
    x = torch.randn(2, 21, 8)
    mask = torch.arange(21) < torch.tensor([[21], [13]])
    expected = layer(x, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, mask), expected, atol=1e-5, rtol=1e-4)
        exported = torch.export.export(layer.eval(), (x, mask)).module()
    torch.testing.assert_close(exported(x, mask), expected, atol=1e-5, rtol=1e-4)


def test_one_kernel_is_one_graph_with_a_mask() -> None:
    torch.compiler.reset()
    layer, x = Attention(8, 2, context=24, kernel="longformer"), torch.randn(2, 21, 8)
    mask = torch.arange(21) < torch.tensor([[21], [13]])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), layer(x, mask))


@pytest.mark.slow  # A second each.
@pytest.mark.parametrize(("name", "causal"), [*((n, False) for n in KERNELS), *((n, True) for n in CAUSAL)])
def test_every_kernel_compiles_and_exports_with_a_mask(name: str, causal: bool) -> None:
    compiled_and_exported(name, causal)


@pytest.mark.slow  # A second each.
@pytest.mark.parametrize("name", KERNELS)
def test_onnx_runs_every_kernel(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer = Attention(8, 2, context=24, kernel=name).eval()
    x = torch.randn(2, 21, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export(layer, (x,))
    program.save(tmp_path / "layer.onnx")
    session = runtime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, layer(x).detach(), atol=1e-4, rtol=1e-4)


BAD: list[tuple[Callable[[], object], type[LaminaError], str]] = [
    (lambda: Attention(8, 2, kernel="locl"), RecipeError, "no attention kernel is called 'locl'; did you mean 'local'"),
    (lambda: Attention(8, 2, kernel={"name": "local", "windw": 3}), RecipeError, "no option 'windw'"),
    (lambda: Attention(8, 2, kernel={"name": "softmax", "window": 3}), RecipeError, "no option 'window'"),
    (lambda: Attention(8, 2, kernel={"window": 3}), RecipeError, "no attention kernel is called None"),
    (lambda: Attention(8, 2, kernel={"name": "local", "window": 0}), RecipeError, "window of at least 1, got 0"),
    (lambda: Attention(8, 2, kernel={"name": "local", "window": 2.5}), RecipeError, "kernel.window.*whole number"),
    (
        lambda: Attention(8, 2, causal=True, kernel={"name": "local", "causal": False}),
        RecipeError,
        "is the attention's",
    ),
    (lambda: Attention(8, 2, kernel={"name": "sinkhorn", "heads": 4}), RecipeError, "heads is the attention's"),
    (lambda: Attention(8, 2, causal=True, kernel="longformer"), RecipeError, "cannot be causal"),
    (lambda: Attention(8, 2, causal=True, context=9, kernel="linformer"), RecipeError, "cannot be causal"),
    (lambda: Attention(8, 2, kernel="linformer"), RecipeError, "context of at least 1, got None"),
    (lambda: Attention(8, 2, context=9, kernel={"name": "linformer", "rank": 10}), RecipeError, "the rank 10"),
    (lambda: Attention(8, 2, kernel="bigbird"), RecipeError, "context of at least 1, got None"),
    (lambda: Attention(8, 2, kernel="sinkhorn"), RecipeError, "context of at least 1, got None"),
    (
        lambda: Attention(8, 2, context=9, kernel={"name": "synthesizer", "logits": "x"}),
        RecipeError,
        "'dense', 'random'",
    ),
    (lambda: make("local")(*qkv(7), torch.ones(1, 1, 7, 7, dtype=torch.bool)), ShapeError, "no table of all pairs"),
    (lambda: make("local")(qkv(3)[0], *qkv(7)[1:]), ShapeError, "3 queries and 7 keys"),
    (lambda: make("linformer")(*qkv(64)), ShapeError, "63 tokens, got 64"),
    (lambda: make("bigbird")(*qkv(65)), ShapeError, "drawn for 16 blocks"),
    (lambda: make("sinkhorn")(*qkv(65)), ShapeError, "sorts 16 blocks"),
    (lambda: make("synthesizer")(*qkv(64)), ShapeError, "63 tokens, got 64"),
]


def test_every_kernel_has_its_name_in_the_option() -> None:
    assert set(get_args(KernelName)) == {*KERNELS, "softmax"}
    assert Attention(8, 2, kernel="softmax").kernel is None


@pytest.mark.parametrize(("act", "error", "sentence"), BAD)
def test_what_a_kernel_cannot_do_is_refused(act: Callable[[], object], error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        act()
