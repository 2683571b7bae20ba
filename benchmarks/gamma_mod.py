"""Half of the tokens past seven of eight blocks, against the same model dense: prefill, a training step, generation.

The first block of a decoder stays dense, so at best the blocks' linear layers take (1 + 7 / 2) / 8 = 0.56 of the time.
Inference is by threshold, as a decoder's must be; the threshold is put where half of the tokens of the prompt enter.

Run: OMP_NUM_THREADS=1 python -m benchmarks gamma_mod
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, forward, pair, training, write
from lamina import probe
from lamina.models import Transformer
from lamina.nn import TokenRouting
from lamina.rewrite import DepthRouting, rewrite

DEPTH, WIDTH, HEADS, VOCABULARY, CONTEXT, BATCH = 8, 384, 6, 512, 512, 2
GOAL = "<= 0.65"


def main() -> None:
    """Time all pairs; write `results/gamma_mod.json`."""
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (BATCH, CONTEXT))
    sizes = f"{DEPTH} blocks of width {WIDTH}, {CONTEXT} tokens, batch {BATCH}"
    rows: list[Row] = []
    for name, model in (("ours", ours()), ("transformers Llama", llama())):
        dense, routed = model.eval(), half(copy.deepcopy(model).eval(), ids)
        names = ("half of the tokens past 7 of 8 blocks", "dense")
        rows.append(
            pair(
                f"prefill, {name}, {sizes}", forward(routed, ids), forward(dense, ids), names=names, goal=GOAL, rounds=9
            )
        )
        if name == "ours":
            step = (training(routed.train(), ids), training(dense.train(), ids))
            rows.append(pair(f"forward and backward, {name}, {sizes}", *step, names=names, goal=GOAL, rounds=7))
        else:
            prompt = ids[:, : CONTEXT - 32]
            generate = (generation(routed, prompt), generation(dense, prompt))
            rows.append(
                pair(
                    f"{CONTEXT - 32} tokens of prompt and 16 new ones, {name}",
                    *generate,
                    names=names,
                    goal="no target",
                    rounds=5,
                )
            )
    write("gamma_mod", rows, packages=("transformers",))


def ours() -> nn.Module:
    """The project's decoder."""
    return Transformer(DEPTH, WIDTH, HEADS, vocabulary=VOCABULARY, context=CONTEXT)


def llama() -> nn.Module:
    """The same sizes in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
    more = {
        "intermediate_size": 4 * WIDTH,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **more))


def half(model: nn.Module, ids: Tensor) -> nn.Module:
    """Route all blocks but the first, and put each one's threshold where half of these tokens enter."""
    model = rewrite(model, DepthRouting(list(range(1, DEPTH))))
    routings = {p: m for p, m in model.named_modules() if isinstance(m, TokenRouting)}
    for path, routing in routings.items():
        seen: list[Tensor] = []
        with torch.no_grad(), probe.observe(model, {path: lambda m, a, k, o, seen=seen: seen.append(o.probability)}):
            model(ids)
        routing.threshold_prefill = routing.threshold_decode = float(seen[0].median())
    return model


def generation(model: nn.Module, prompt: Tensor) -> object:
    """Return what to time."""

    def run() -> object:
        return model.generate(prompt, max_new_tokens=16, do_sample=False)  # type: ignore[operator]

    return run


if __name__ == "__main__":
    main()
