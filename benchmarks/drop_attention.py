"""Deciding a drop against one plain forward pass over the same calibration data: six-layer MiniLM's sizes.

Ours: dissect the model, run the data once with the scores streamed inside hooks, choose, count what it saves.
Peer: the bare forward pass. Run: OMP_NUM_THREADS=1 python -m benchmarks drop_attention
"""

from __future__ import annotations

import copy
import logging
import os

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from benchmarks.harness import Row, pair, write
from lamina.rewrite import DropAttention, rewrite

SAMPLES, CONTEXT, BATCH = 64, 64, 32


def minilm() -> torch.nn.Module:
    """The architecture of all-MiniLM-L6-v2 with random weights (time does not depend on them)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertModel(BertConfig(**sizes)).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(SAMPLES // BATCH):
        lengths = torch.randint(CONTEXT // 2, CONTEXT + 1, (BATCH, 1), generator=generator)
        mask = (torch.arange(CONTEXT) < lengths).long()
        ids = torch.randint(1000, 30000, (BATCH, CONTEXT), generator=generator)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model, data = minilm(), batches()
    one = DropAttention(2)

    @torch.no_grad()
    def forward() -> None:
        for batch in data:
            model(**batch)

    row = pair(
        f"decide on {SAMPLES} x {CONTEXT} tokens",
        lambda: one.decide(model, data),
        forward,
        names=("dissect + decide", "plain forward"),
        goal="<= 1.10",
        rounds=int(os.environ.get("ROUNDS", "9")),
        warmup=1,
    )
    write("drop_attention", [row, speed_of_what_is_left(data)], ("transformers",))


def speed_of_what_is_left(data: list[dict[str, torch.Tensor]]) -> Row:
    """Forward time without three of six attentions; at least 0.8 of the operations saved must show as time saved."""
    whole = minilm()
    short = rewrite(copy.deepcopy(whole), DropAttention(3, order="last"))

    @torch.no_grad()
    def run(model: torch.nn.Module) -> None:
        for batch in data:
            model(**batch)

    saved = 1 - operations(short, data[0]) / operations(whole, data[0])
    return pair(
        f"forward without 3 of 6 attentions ({saved:.1%} fewer operations)",
        lambda: run(short),
        lambda: run(whole),
        names=("dropped", "whole"),
        goal=f"<= {1 - 0.8 * saved:.3f}",
        rounds=int(os.environ.get("ROUNDS", "9")),
        warmup=1,
    )


@torch.no_grad()
def operations(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
