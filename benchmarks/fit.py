"""FIT against a hand-written loop of the same products; long sequences are in `benchmarks/fit_long.py`.

The loop does what the card says with `F.linear`, `F.layer_norm` and `scaled_dot_product_attention` on the same weights,
no modules in between: as many operations, so the ratio of times is the inverse of that of tokens a second.

Run: OMP_NUM_THREADS=1 python -m benchmarks fit
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, forward, pair, write
from lamina.models import FIT, FITAutoregressive

SIZES: dict[str, Any] = {"token_width": 128, "latent_width": 192, "token_heads": 4, "latent_heads": 6}

State = dict[str, Tensor]


def linear(w: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def attend(w: State, name: str, x: Tensor, context: Tensor, heads: int, **options: Any) -> Tensor:
    q = linear(w, f"{name}.query", x).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = linear(w, f"{name}.key", context).unflatten(-1, (heads, -1)).transpose(1, 2)
    v = linear(w, f"{name}.value", context).unflatten(-1, (heads, -1)).transpose(1, 2)
    return linear(w, f"{name}.out", F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))


def layer(w: State, name: str, x: Tensor, heads: int, **options: Any) -> Tensor:
    y = norm(w, f"{name}.norm1", x)
    x = x + attend(w, f"{name}.mixer", y, y, heads, **options)
    y = linear(w, f"{name}.feed_forward.up", norm(w, f"{name}.norm2", x))
    return x + linear(w, f"{name}.feed_forward.down", F.gelu(y))


def read(w: State, name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    kv = norm(w, f"{name}.context_norm", context)
    return x + attend(w, f"{name}.attention", norm(w, f"{name}.norm", x), kv, heads)


def trunk(w: State, counts: list[tuple[int, int]], x: Tensor, heads: tuple[int, int], causal: bool) -> tuple[Any, Any]:
    batch, groups, n, _ = x.shape
    z = w["trunk.table"].unflatten(0, (groups, -1)).expand(batch, -1, -1, -1)
    m, x = z.shape[2], x.flatten(0, 1)
    mask = None
    if causal:
        number = torch.arange(groups * m) // m
        mask = number[:, None] >= number
    for i, (local, total) in enumerate(counts):
        for j in range(local):
            x = layer(w, f"trunk.blocks.{i}.local.{j}", x, heads[0], is_causal=causal)
        if total:
            z = read(w, f"trunk.blocks.{i}.read", z.flatten(0, 1), x, min(heads)).view(batch, groups * m, -1)
            for j in range(total):
                z = layer(w, f"trunk.blocks.{i}.latent.{j}", z, heads[1], attn_mask=mask)
            z = z.view(batch, groups, m, -1)
        if i < len(counts) - 1:
            seen = torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), 1) if causal else z
            x = read(w, f"trunk.blocks.{i}.write", x, seen.flatten(0, 1), min(heads))
    return x.view(batch, groups, n, -1), z


def encoder_loop(model: FIT, counts: list[tuple[int, int]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    w, heads = dict(model.named_parameters()), (SIZES["token_heads"], SIZES["latent_heads"])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = norm(w, "stem.norm", linear(w, "stem.project", x)) + w["stem.positions.table"]
        tokens, latents = trunk(w, counts, x, heads, False)
        return norm(w, "token_norm", tokens), norm(w, "latent_norm", latents)

    return run


def decoder_loop(model: FITAutoregressive, counts: list[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    w, heads = dict(model.named_parameters()), (SIZES["token_heads"], SIZES["latent_heads"])
    n = model.tokens_per_group

    def run(ids: Tensor) -> Tensor:
        x = F.embedding(ids, w["embedding.weight"]).unflatten(1, (-1, n)) + w["positions.table"]
        tokens, _ = trunk(w, counts, x, heads, True)
        return F.linear(norm(w, "token_norm", tokens).flatten(1, 2), w["embedding.weight"], w["head.bias"])

    return run


def training(model: Callable[[Tensor], Any], x: Tensor, owner: nn.Module) -> Callable[[], object]:
    def run() -> object:
        owner.zero_grad()
        found = model(x)
        sum(y.square().mean() for y in (found if isinstance(found, tuple) else (found,))).backward()
        return None

    return run


def equal_work() -> list[Row]:
    """The same products, with modules and without."""
    rows, names, goal = [], ("fit", "hand-written loop, same weights"), "<= 1.0"
    model = FIT("(2)4(2)", 256, 16, 16, 48, **SIZES)
    loop, x = encoder_loop(model, [(2, 4), (2, 0)]), torch.randn(1, 16, 256, 48)
    torch.testing.assert_close(model(x), loop(x), rtol=1e-4, atol=1e-4)
    what = "encoder, 4096 tokens, (2)4(2), widths 128 and 192"
    rows.append(pair(f"{what}: forward", forward(model, x), forward(loop, x), names=names, goal=goal, rounds=11))
    pairs = training(model, x, model), training(loop, x, model)
    rows.append(pair(f"{what}: forward and backward", *pairs, names=names, goal=goal, rounds=7))
    compiled = torch.compile(model, fullgraph=True)
    alone = ("fit, compiled", "fit")
    rows.append(
        pair(f"{what}: forward", forward(compiled, x), forward(model, x), names=alone, goal="< 1.0", rounds=9, warmup=3)
    )
    decoder = FITAutoregressive("(2)2(2)", 64, 16, 8, vocabulary=256, **SIZES)
    loop, ids = decoder_loop(decoder, [(2, 2), (2, 0)]), torch.randint(256, (4, 1024))
    torch.testing.assert_close(decoder(ids), loop(ids), rtol=1e-4, atol=1e-4)
    names, what = ("fit_autoregressive", names[1]), "bytes, 4 x 1024, (2)2(2)"
    rows.append(pair(f"{what}: forward", forward(decoder, ids), forward(loop, ids), names=names, goal=goal, rounds=11))
    pairs = training(decoder, ids, decoder), training(loop, ids, decoder)
    rows.append(pair(f"{what}: forward and backward", *pairs, names=names, goal=goal, rounds=7))
    return rows


def generation() -> list[Row]:
    """A token from the cache, and from the whole sequence."""
    model = FITAutoregressive("(2)2(2)", 64, 16, 8, vocabulary=256, **SIZES).eval()
    prompt = torch.randint(256, (1, 512))

    class Whole(FITAutoregressive):
        caches = False

    whole = Whole("(2)2(2)", 64, 16, 8, vocabulary=256, **SIZES).eval()
    whole.load_state_dict(model.state_dict())
    what, names = "generate 32 bytes after 512", ("from the cache", "over the whole sequence each time")
    runs = [lambda m=m: m.generate(prompt, 32, temperature=0) for m in (model, whole)]
    assert torch.equal(runs[0](), runs[1]())
    return [pair(what, *runs, names=names, goal="< 1.0", rounds=3, warmup=0)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write("fit", [*equal_work(), *generation()])


if __name__ == "__main__":
    main()
