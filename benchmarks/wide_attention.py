"""Wide against deep at 48 heads; our encoder against torch's, with its fast path, and (same weights) x-transformers.

Forward passes without gradients, one thread. x-transformers is the only public encoder whose heads need not fill the
width; where it is not installed its row is left out.

Run: OMP_NUM_THREADS=1 python -m benchmarks wide_attention
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, forward, pair, write
from lamina.models import Transformer, wide_transformer
from lamina.nn.attention import Attention
from lamina.nn.attention_kernels import written_out

WIDTH, HIDDEN, TOKENS = 512, 2048, 1000
SIZES: dict[str, Any] = {"hidden": HIDDEN, "vocabulary": 256, "context": TOKENS, "classes": 2}


class Blocks(nn.Module):
    """A transformer without its embedding and head."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.blocks, self.final_norm = model.blocks, model.final_norm

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)


def wide(depth: int, **mixer: Any) -> Transformer:
    torch.manual_seed(0)
    return wide_transformer(48, depth, WIDTH, **SIZES, mixer={"name": "attention", "bias": True, **mixer}).eval()


def shapes() -> list[Row]:
    ids, rows = torch.zeros(1, TOKENS, dtype=torch.long), []
    for label, options in (("fused", {}), ("weights written out", {"kernel": written_out})):
        runs = (forward(wide(depth, **options), ids) for depth in (1, 6))
        what, goal = f"48 heads, width {WIDTH}, {TOKENS} tokens, batch 1, {label}", "<= 0.625"
        goal = goal if label == "fused" else "< 1 (the paper: 0.32)"
        rows.append(pair(what, *runs, names=("1 x 48", "6 x 8"), goal=goal))
    return rows


def torchs_encoder() -> list[Row]:
    rows = []
    for batch, tokens, depth, heads in ((1, 1000, 2, 8), (16, 128, 2, 8)):
        torch.manual_seed(0)
        model = wide_transformer(depth * heads, depth, WIDTH, **SIZES).eval()
        layer = nn.TransformerEncoderLayer(WIDTH, heads, HIDDEN, activation="gelu", batch_first=True, norm_first=True)
        with warnings.catch_warnings():
            # Its note that nested tensors are not for norm_first.
            warnings.simplefilter("ignore")
            peer = nn.TransformerEncoder(layer, depth, nn.LayerNorm(WIDTH)).eval()
        for mine, theirs in zip(model.blocks, peer.layers, strict=True):
            copy_to_torch(mine, theirs)
        ours, x = Blocks(model), torch.randn(batch, tokens, WIDTH)
        torch.testing.assert_close(forward(ours, x)(), forward(peer, x)(), atol=1e-4, rtol=1e-4)
        what = f"{depth} layers x {heads} heads, batch {batch}, {tokens} tokens, same weights"
        names = ("wide_transformer", "nn.TransformerEncoder")
        rows.append(pair(what, forward(ours, x), forward(peer, x), names=names, goal="<= 1.1"))
        if batch > 1:
            compiled = torch.compile(ours)
            names = ("wide_transformer, compiled", "nn.TransformerEncoder")
            rows.append(pair(what, forward(compiled, x), forward(peer, x), names=names, goal="<= 1", warmup=4))
    return rows


def copy_to_torch(mine: Any, theirs: Any) -> None:
    a = mine.mixer
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([a.query.weight, a.key.weight, a.value.weight]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias]))
        for source, target in (
            (a.out, theirs.self_attn.out_proj),
            (mine.feed_forward.up, theirs.linear1),
            (mine.feed_forward.down, theirs.linear2),
        ):
            target.load_state_dict(source.state_dict())


def x_transformers() -> list[Row]:
    if importlib.util.find_spec("x_transformers") is None:
        print("x-transformers is not installed: its row is left out")
        return []
    from x_transformers import Encoder

    torch.manual_seed(0)
    model = wide_transformer(48, 1, WIDTH, **SIZES, mixer="attention").eval()
    peer = Encoder(dim=WIDTH, depth=1, heads=48, attn_dim_head=64, attn_flash=True, ff_mult=HIDDEN // WIDTH).eval()
    (_, attention, _), (_, feed_forward, _) = peer.layers
    mine = model.blocks[0]
    with torch.no_grad():
        for name in "qkv":
            source = {"q": mine.mixer.query, "k": mine.mixer.key, "v": mine.mixer.value}[name]
            getattr(attention, f"to_{name}").weight.copy_(source.weight)
        attention.to_out.weight.copy_(mine.mixer.out.weight)
        feed_forward.ff[0][0].load_state_dict(mine.feed_forward.up.state_dict())
        feed_forward.ff[2].load_state_dict(mine.feed_forward.down.state_dict())
    ours, x = Blocks(model), torch.randn(1, TOKENS, WIDTH)
    torch.testing.assert_close(forward(ours, x)(), forward(peer, x)(), atol=1e-4, rtol=1e-4)
    what, names = f"1 layer x 48 heads, batch 1, {TOKENS} tokens, same weights", ("wide_transformer", "x-transformers")
    return [pair(what, forward(ours, x), forward(peer, x), names=names, goal="<= 1")]


def kernels() -> list[Row]:
    """What is linear in the tokens must win where there are many."""
    rows, x = [], torch.randn(1, 4096, 256)
    softmax = Attention(256, 4).eval()
    for kernel in ("linear", "performer", "local", "longformer", "bigbird", "linformer", "sinkhorn", "strided_sparse"):
        layer = Attention(256, 4, context=4096, kernel=kernel).eval()
        names = (kernel, "softmax, fused")
        what = "attention, width 256, 4 heads, 4096 tokens"
        rows.append(pair(what, forward(layer, x), forward(softmax, x), names=names, goal="< 1", rounds=7))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows = [*shapes(), *torchs_encoder(), *x_transformers(), *kernels()]
    write("wide_attention", rows)


if __name__ == "__main__":
    main()
