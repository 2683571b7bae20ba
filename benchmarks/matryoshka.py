"""Training six sizes at once against the plain loss and against sentence-transformers; what a truncated model saves.

Six-layer MiniLM's sizes with random weights, 16 anchors with a positive each, 32 tokens a text. The plain loss is our
multiple_negatives on the model's own mean-pooled output. sentence-transformers trains the same layers and widths, each
layer at all widths, as it has no list of pairs: `Matryoshka2dLoss` of all layers and widths. Memory is the peak of a
process of its own above what it held before the step (Linux), with pages given back at once.

Run: OMP_NUM_THREADS=1 python -m benchmarks matryoshka
"""

from __future__ import annotations

import copy
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.harness import Row, pair, write
from lamina.nn import TokenPooling
from lamina.objectives import Matryoshka, MultipleNegatives
from lamina.rewrite import Truncate, rewrite

PAIRS = [(1, 32), (2, 64), (3, 128), (4, 192), (5, 256), (6, 384)]
ROWS, TOKENS = 16, 32


def minilm() -> nn.Module:
    """The architecture of all-MiniLM-L6-v2 without dropout: time does not depend on the weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False)


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1000, 30000, (ROWS, TOKENS), generator=generator) for _ in range(2)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def step(arm: str) -> Callable[[], object]:
    """Return one training step (without the optimizer, which is the same for all): loss and gradients."""
    model, batch = minilm(), {"texts": texts()}
    pooling, plain = TokenPooling(), MultipleNegatives()
    if arm == "sentence-transformers":
        return theirs(model, batch["texts"])

    def losses() -> Tensor:
        if arm == "plain":
            e = [pooling(model(**t).last_hidden_state, t["attention_mask"]) for t in batch["texts"]]
            return plain.loss({"embeddings": e}, {})["loss"]
        return objective(model, batch)["loss"]

    objective = Matryoshka(plain, PAIRS if arm == "six sizes" else PAIRS[-1:])

    def run() -> None:
        model.zero_grad()
        losses().backward()

    return run


def theirs(model: Any, given: list[dict[str, Tensor]]) -> Callable[[], object]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    class Trunk(Transformer):
        """Their transformer round a model that is there already; it gives all layers, as theirs does."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.auto_model = model

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            found = model(features["input_ids"], features["attention_mask"], output_hidden_states=True)
            features |= {"token_embeddings": found[0], "all_layer_embeddings": found.hidden_states[1:]}
            return features

    wrapped = SentenceTransformer(modules=[Trunk(), Pooling(384, "mean")], device="cpu").train()
    base = losses.MultipleNegativesRankingLoss(wrapped)
    widths = [d for _, d in reversed(PAIRS)]
    loss = losses.Matryoshka2dLoss(wrapped, base, widths, n_layers_per_step=-1, n_dims_per_step=-1)

    def run() -> None:
        model.zero_grad()
        loss([dict(t) for t in given], torch.zeros(ROWS)).backward()

    return run


def peak(arm: str) -> float:
    """Megabytes of one step at its peak; for a process of its own."""
    torch.set_num_threads(1)
    run = step(arm)
    run()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1e6


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def memory(ours: str, peer: str, goal: str, rounds: int) -> Row:
    found: dict[str, list[float]] = {ours: [], peer: []}
    # Every tensor gets pages of its own, which go back at once: what is resident is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for turn in range(rounds):
        for arm in (ours, peer) if turn % 2 == 0 else (peer, ours):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.matryoshka", arm]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
    ratios = sorted(a / b for a, b in zip(found[ours], found[peer], strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    megabytes = statistics.median(found[ours]), statistics.median(found[peer])
    row = Row(f"peak memory of a step, {ours}", ours, peer, megabytes[0] / megabytes[1], (low, high), goal, (0.0, 0.0), megabytes=megabytes)  # fmt: skip  # noqa: E501
    print(f"{row.what}: {ours} / {peer} = {row.ratio:.3f} [{low:.3f}, {high:.3f}]  (goal {goal})", flush=True)
    return row


def inference(size: tuple[int, int], goal: str, rounds: int) -> Row:
    """A truncated model against the whole one, both to an embedding."""
    whole = minilm().eval()
    small = rewrite(copy.deepcopy(whole), Truncate(*size))
    full = rewrite(whole, Truncate(*PAIRS[-1]))
    given = texts()[0]

    def run(model: nn.Module) -> Callable[[], object]:
        def embed() -> object:
            with torch.inference_mode():
                return model(**given)

        return embed

    what = f"embedding {ROWS} texts, {size[0]} of 6 layers, {size[1]} of 384 numbers"
    return pair(what, run(small), run(full), names=("truncated", "whole"), goal=goal, rounds=rounds)


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rounds = int(os.environ.get("ROUNDS", "5"))
    plain, six, peer = step("plain"), step("six sizes"), step("sentence-transformers")
    rows = [
        pair("a step at six sizes", six, plain, names=("six sizes", "plain loss"), goal="<= 1.15", rounds=rounds),
        pair(
            "a step at six sizes",
            six,
            peer,
            names=("six sizes", "sentence-transformers 2D, all layers"),
            goal="<= 1.00",
            rounds=rounds,
        ),
        inference((2, 64), "<= 0.40", 3 * rounds),
        inference((1, 32), "<= 0.22", 3 * rounds),
        memory("six sizes", "one size", "<= 1.20", min(rounds, 2)),
        memory("six sizes", "sentence-transformers", "<= 1.00", min(rounds, 2)),
    ]
    write("matryoshka", rows, ("transformers", "sentence-transformers"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(peak(sys.argv[1])))
    else:
        main()
