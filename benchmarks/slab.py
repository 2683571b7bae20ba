"""Models with their norms folded away against layer norm, and linear attention against softmax attention; inference.

One thread, float32, no gradients. The attentions are whole layers (width 192, 3 heads, batch 1), projections and
depthwise convolution included; softmax attention runs on torch's fused kernel.

Run: OMP_NUM_THREADS=1 python -m benchmarks slab
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina.batches import call
from lamina.models import VisionTransformer
from lamina.nn import Attention, LayerNorm, PRepBN, SimplifiedLinearAttention
from lamina.rewrite import Fold, ProgressiveNorm, rewrite

SIDES = (14, 20, 28, 40, 56, 64)
FASTER, NAMES = "<= 0.91", ("folded", "layer norm")


def forward(model: Callable[..., object], batch: dict[str, Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return call(model, batch) if isinstance(model, nn.Module) else model(*batch.values())

    return run


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return run


def vit(image: int, patch: int, depth: int, width: int, heads: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    options = {"classes": 10, "channels": channels}
    return VisionTransformer(image, patch, depth, width, heads, pool="mean", **options).eval()  # type: ignore[arg-type]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=6, use_cache=False)
    config.num_attention_heads = config.num_key_value_heads = 4
    return LlamaForCausalLM(config).eval()


def progressive(model: nn.Module) -> nn.Module:
    made = rewrite(copy.deepcopy(model), ProgressiveNorm())
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in made.modules() if isinstance(m, PRepBN)):
        norm.set_progress(1.0)
        norm.rep.running_mean.normal_(generator=generator)
        norm.rep.running_var.uniform_(0.5, 2, generator=generator)
    return made.eval()


def folding(what: str, model: nn.Module, batch: dict[str, Tensor], rounds: int) -> list[Row]:
    turned = progressive(model)
    folded = rewrite(copy.deepcopy(turned), Fold(), data=[batch])
    with torch.inference_mode():
        before, after = (call(m, batch) for m in (turned, folded))
        before, after = (getattr(t, "logits", t) for t in (before, after))
        error = float((before - after).abs().max() / before.abs().max())
    assert error < 1e-5, error
    runs = forward(folded, batch), forward(model, batch)
    return [
        pair(f"forward, {what}", *runs, names=NAMES, goal=FASTER, rounds=rounds, warmup=5),
        pair(
            f"forward, {what}",
            forward(turned, batch),
            forward(model, batch),
            names=("not folded yet", NAMES[1]),
            goal="",
            rounds=rounds,
            warmup=5,
        ),
    ]


def compiled(what: str, model: nn.Module, batch: dict[str, Tensor], rounds: int) -> Row:
    folded = rewrite(progressive(model), Fold(), data=[batch])
    (x,) = batch.values()
    runs = (forward(torch.compile(m), {"x": x}) for m in (folded, copy.deepcopy(model)))
    return pair(f"forward under torch.compile, {what}", *runs, names=NAMES, goal=FASTER, rounds=rounds, warmup=3)


def attentions() -> list[Row]:
    rows: list[Row] = []
    for side in SIDES:
        tokens = side * side
        ours, peer = SimplifiedLinearAttention(192, 3, (side, side)).eval(), Attention(192, 3, bias=True).eval()
        batch = {"x": torch.randn(1, tokens, 192, generator=torch.Generator().manual_seed(0))}
        goal = "<= 0.25" if tokens == 4096 else "<= 1" if tokens >= 400 else ""
        names = ("linear", "softmax attention")
        runs = forward(ours, batch), forward(peer, batch)
        rounds = 41 if tokens < 1000 else 15
        rows.append(pair(f"attention of {tokens} tokens", *runs, names=names, goal=goal, rounds=rounds, warmup=3))
    return [*rows, growth(rows)]


def growth(rows: list[Row]) -> Row:
    """Word the growth of both times from 784 tokens on as one row: the slopes of log time over log tokens."""
    from numpy import polyfit

    tokens = [2 * math.log(side) for side in SIDES[2:]]
    ours, peer = (polyfit(tokens, [math.log(r.milliseconds[i]) for r in rows[2:]], 1)[0] for i in (0, 1))
    print(f"log time over log tokens, from 784 tokens on: linear {ours:.3f}, softmax {peer:.3f}  (goal linear <= 1.2)")
    what = f"log time over log tokens, from 784 tokens on: {ours:.3f} against {peer:.3f}"
    return replace(rows[-1], what=what, ratio=float(ours / peer), spread=(0.0, 0.0), goal="ours <= 1.2")


def main() -> None:
    torch.set_num_threads(1)
    small = vit(8, 2, 6, 64, 4, 1)
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = attentions()
    for batch, rounds in ((1, 301), (64, 101)):
        what = f"ViT of width 64, 6 blocks, 16 tokens, batch {batch}"
        given = {"pixel_values": images[:batch].clone()}
        rows += folding(what, small, given, rounds)
        rows.append(compiled(what, small, given, rounds))
    deit = {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
    rows += folding("DeiT-Ti, 196 tokens, batch 1", vit(224, 16, 12, 192, 3, 3), deit, 21)
    text = {"input_ids": torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))}
    rows += folding("transformers Llama of width 64, 6 blocks, 64 tokens, batch 1", llama(), text, 101)
    norm, peer = PRepBN(64), LayerNorm(64)
    x = torch.randn(64, 16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    runs = step(norm, x), step(peer, x)
    rows.append(
        pair("training step of one norm, 1024 tokens of 64", *runs, names=("PRepBN", "LayerNorm"), goal="", rounds=201)
    )
    write("slab", rows, ("transformers",))


if __name__ == "__main__":
    main()
