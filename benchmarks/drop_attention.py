"""Deciding a drop against one plain forward pass over the same calibration data: six-layer MiniLM's sizes.

Ours: dissect the model, run the data once with the scores streamed inside hooks, choose, count what it saves.
Peer: the bare forward pass. Run: OMP_NUM_THREADS=1 python -m benchmarks drop_attention
"""

from __future__ import annotations

import logging
import os

import torch
from transformers import BertConfig, BertModel

from benchmarks.harness import pair, write
from lamina.rewrite import DropAttention

SAMPLES, CONTEXT, BATCH = 128, 64, 32


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
    write("drop_attention", [row], ("transformers",))


if __name__ == "__main__":
    main()
