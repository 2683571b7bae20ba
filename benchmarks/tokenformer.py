"""TokenFormer against a transformer of as many parameters, one layer against a two-layer MLP, and growth in seconds.

The port does what Haiyang-W/TokenFormer does in a Pattention, operation by operation: a product with the keys, another
with a mask of ones, the norm, a division and a multiplication, GELU, dropout of nothing, the product with the values.

Run: OMP_NUM_THREADS=1 python -m benchmarks tokenformer
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import forward, pair, training, write
from lamina import anatomy
from lamina.models import TokenFormer, Transformer
from lamina.nn import Pattention
from lamina.rewrite import GrowParameterTokens, rewrite

VOCABULARY, CONTEXT = 256, 256


class Port(nn.Module):
    """The public layer."""

    def __init__(self, layer: Pattention) -> None:
        super().__init__()
        self.key, self.value, self.pairs = layer.key, layer.value, layer.pairs

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.key.transpose(-2, -1) * 1
        scores = scores * torch.ones(x.shape[-2], self.pairs, dtype=x.dtype)
        scores = scores / torch.norm(scores, p=2, dim=-1, keepdim=True) * math.sqrt(self.pairs)
        return torch.dropout(F.gelu(scores), 0.0, train=True) @ self.value


def ported(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for path, layer in list(twin.named_modules()):
        if isinstance(layer, Pattention):
            anatomy.swap(twin, path, Port(layer))
    return twin


def blocks(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks"))


def models() -> tuple[nn.Module, nn.Module]:
    """6 blocks of 16 width^2 parameters, and 8 of 12 width^2 (and their gains and biases)."""
    sizes = {"width": 256, "heads": 4, "vocabulary": VOCABULARY, "context": CONTEXT}
    ours, peer = TokenFormer(6, **sizes).eval(), Transformer(8, **sizes).eval()
    assert 0.99 < blocks(ours) / blocks(peer) <= 1.0
    return ours, peer


def fifty_million(factor: int = 1) -> TokenFormer:
    pairs = 512 * factor
    return TokenFormer(8, 768, 12, vocabulary=VOCABULARY, context=CONTEXT, attention_pairs=pairs)


def from_scratch(small: nn.Module) -> nn.Module:
    """The public way: a model of the new size, and the old rows copied into it."""
    large = fifty_million(2)
    old = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            parameter[: len(old[name])] = old[name]
    return large


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    ours, peer = models()
    ids = torch.randint(VOCABULARY, (2, CONTEXT))
    names = ("tokenformer, 6 x 256", "transformer, 8 x 256")
    for what, make, rounds in (("forward", forward, 15), ("forward and backward", training, 9)):
        row = pair(f"{what}, 2 x 256 tokens, 6.3 M parameters in the blocks", make(ours, ids), make(peer, ids),
                   names=names, goal="<= 1.3", rounds=rounds)  # fmt: skip
        rows.append(row)
    port = ported(ours)
    torch.testing.assert_close(ours(ids), port(ids), rtol=1e-4, atol=1e-4)
    names = (names[0], "the public layers in it")
    for what, make in (("forward", forward), ("forward and backward", training)):
        row = pair(f"{what}, 2 x 256 tokens", make(ours, ids), make(port, ids), names=names, goal="<= 1.0", rounds=9)
        rows.append(row)
    compiled = torch.compile(ours, fullgraph=True)
    both = (f"{names[0]}, compiled", names[0])
    rows.append(pair("forward, 2 x 256 tokens", forward(compiled, ids), forward(ours, ids), names=both, goal="< 1.0",
                     warmup=3))  # fmt: skip
    for width, pairs in ((256, 1024), (768, 3072)):
        layer = Pattention(width, width, pairs)
        mlp = nn.Sequential(nn.Linear(width, pairs), nn.GELU(), nn.Linear(pairs, width))
        x, names = torch.randn(512, width), ("pattention", "MLP of two linear layers")
        for what, make in (("forward", forward), ("forward and backward", training)):
            row = pair(f"{what}, 512 tokens of {width}, {pairs} pairs or hidden units", make(layer, x), make(mlp, x),
                       names=names, goal="<= 1.3")  # fmt: skip
            rows.append(row)
    small = fifty_million()
    assert 50e6 < sum(p.numel() for p in small.parameters()) < 51e6
    row = pair("growing 50 M parameters to 101 M", lambda: rewrite(copy.deepcopy(small), GrowParameterTokens(2.0)),
               lambda: from_scratch(small), names=("a copy, grown", "a new model, old rows copied"), goal="< 5 s",
               rounds=5, warmup=1)  # fmt: skip
    rows.append(row)
    print(f"  growing took {row.milliseconds[0] / 1e3:.2f} s", flush=True)
    write("tokenformer", rows)


if __name__ == "__main__":
    main()
