"""Starbucks: one embedding model, several sizes: its first layers and first dimensions are embedding models as well.

What for: train an encoder of texts (images, anything) once and deploy it at several sizes. A vector index wants short
vectors, a phone few layers, a server all; all of them are cut out of the same weights.

    objective = Matryoshka("multiple_negatives", pairs=[(2, 64), (4, 192), (6, 384)])   # any model with a trunk
    objective(model, {"texts": [anchors, positives]})["loss"].backward()                # one forward pass a text
    small = rewrite(copy.deepcopy(model), Truncate(layers=2, width=64))                 # small(**batch) -> (B, 64)
    print(sizes(model, batches, metric, [(2, 64), (6, 384)]).table())                   # quality, time, bytes
    export_sentence_transformers(small, "folder", tokenizer)                            # SentenceTransformer("folder")

In `transformers.Trainer`: `compute_loss` returns `objective(model, inputs)["loss"]`. From a recipe:
`recipes/starbucks.yaml` (passages that follow each other, no labels, two minutes). `scored_pairs` reads sentences with
scores, for the base `cosent`. Images: the base `embedding_classification`, `pool: cls`. Before fine-tuning, on text
alone: `matryoshka_autoencoding`.

How it works: while the model runs, the stream after the blocks of the list is pooled over the real tokens, behind the
model's own final norm; of each size (n, d) the first d numbers, of length one, go through the loss that you have, and
the losses are added. The divergence of each size's scores in the batch from those of the largest is added too; the
largest learns nothing from it. No parameters are added. 2D Matryoshka (`select="random"`) trains the last layer and one
other, drawn anew each step, at all widths. Masked autoencoding: at each size the first d numbers restore hidden words
(the head's first dense layer by its first d columns), and the first token alone must let one more layer restore a text
with more words hidden. `truncate` leaves names and tensors as they are; its output equals that size in the whole model.

What is measured: MiniLM (6 layers, 384) fine-tuned on 2,000 pairs drawn from STS-B by CoSENT, one epoch of batches of
32 with AdamW 5e-5; Spearman's correlation on all of dev at six sizes. Ours trains all sizes in every step, the baseline
is 2D Matryoshka with the same steps and batches. Beside it: the model cut without training, each of two sizes trained
alone, and for one seed the largest alone and ours without the divergence; and the MLM loss at three sizes after 100
steps on WikiText-2, by masked autoencoding and by plain MLM.

What was found: reproduced. Over the first four sizes 67.2 against 61.7 points of Spearman's correlation, +5.5 [5.3,
5.7] (bar 2); cut without training 55.2. Without the divergence 65.8 (seed 0), so most of it is the losses at every
size. Sizes within the whole are 0.4 (1 x 32) and 1.6 (3 x 128) points below the same sizes trained alone, whose model
serves one size. The largest is 0.9 above full fine-tuning (seed 0), and every arm is below the untrained 86.7 there: 63
steps do not improve MiniLM. Masked autoencoding: after 100 steps the small sizes stand at 6.1 and 5.8 nats, under plain
MLM at 9.7 and 8.5, and the largest is level (5.84, 5.81). A first run took the file's first 2,000 pairs, captions all:
+11.4, with every trained arm ten points below the untrained model at full size.

Limits: the widths of a list must not shrink with the layers. Losses that embed a batch twice to save memory
(GradCache) do not fit. A head is run and not used: give the model without it; under DDP without its pooler, too
(`add_pooling_layer=False`). Pipelines refuse it.

Composes with: LAMB, drop passes before it, distillation beside it, `Replace` of layers, data parallel training (rows
of all processes are negatives), activation checkpointing, compile and export of what `truncate` leaves.
Source: Zhuang, Wang, Zheng, Koopman, Zuccon, Starbucks: Improved Training for 2D Matryoshka Embeddings (2024), arXiv
2410.13230; 2D Matryoshka: Li et al. (2024), arXiv 2402.14776.
"""

from __future__ import annotations

import copy
import functools
import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.batches import Batch
from lamina.data import SentencePairs, sts_b
from lamina.data.text_pairs import encoded_pairs
from lamina.errors import require
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.experiments.llm_drop import minilm, spearman
from lamina.nn import cut_embedding
from lamina.objectives import CoSENT, MaskedToken, Matryoshka, MatryoshkaAutoencoding, Objective, continuing_tokens
from lamina.objectives._exit_vectors import exit_vectors, exits_of
from lamina.rewrite import Truncate, rewrite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = (
    "objective matryoshka",
    "objective matryoshka_autoencoding",
    "objective multiple_negatives",
    "objective cosent",
    "objective info_nce",
    "objective embedding_classification",
    "pass truncate",
    "data scored_pairs",
    "data passage_pairs",
)
PAIRS = ((1, 32), (2, 64), (3, 128), (4, 192), (5, 256), (6, 384))
ALONE = ((1, 32), (3, 128))
"""Sizes that are trained by themselves, to compare with."""
TRAIN, CONTEXT, BATCH, RATE = 2000, 48, 32, 5e-5
HIDING_PAIRS, HIDING_TEXTS, HIDING_STEPS, HIDING_BATCH = ((2, 64), (4, 128), (6, 384)), 2000, 100, 16

Arms = dict[str, dict[str, float]]
"""Spearman's rank correlation in points, by arm and size (`2x64`)."""


@experiment(
    "starbucks",
    source="table A1 (SRL over 2DMSE at every size; Demi 0.7214 against 0.6841)",
    bar="first_four(ours) - first_four(baseline) >= 2, 2 seeds",
    seeds=(0, 1),
    budget="15m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Fine-tune MiniLM on STS-B for six sizes at once: all in every step (ours), or two layers at random (2DMSE)."""
    arms = measured(seed, device)
    extra = {f"{arm}_{size}": value for arm, found in arms.items() for size, value in found.items()}
    for n, d in ALONE:
        size = f"{n}x{d}"
        extra[f"srl_less_separate_{size}"] = arms["srl"][size] - arms["separate"][size]
    if seed == 0:
        extra["srl_less_full_6x384"] = arms["srl"]["6x384"] - arms["full"]["6x384"]
        extra |= hidden_words(device)
    return Measurement(
        ours={"first_four": first_four(arms["srl"])},
        baseline={"first_four": first_four(arms["2dmse"])},
        paper="STS at (2, 32), (4, 64), (6, 128), (8, 256): SRL .7214 .7466 .7635 .7833, 2DMSE .6841 .7068 .7187 .7401",
        unit="points of Spearman's rank correlation, STS-B dev",
        extra=extra,
    )


def first_four(found: dict[str, float]) -> float:
    """Return the mean over the four smallest sizes."""
    return sum(found[f"{n}x{d}"] for n, d in PAIRS[:4]) / 4


@functools.cache
def measured(seed: int, device: torch.device) -> Arms:
    """Train every arm on the same batches and measure it at the sizes it is for; two arms for the first seed alone."""
    model, tokenizer = minilm(device)
    train = tokenized(sts_b("train"), tokenizer, 200 if smoke() else TRAIN, seed)
    dev = tokenized(sts_b("dev"), tokenizer, 200 if smoke() else None, seed)
    objectives: dict[str, Callable[[], Objective]] = {
        "2dmse": lambda: Matryoshka(CoSENT(), PAIRS, select="random", kl="coordinates", seed=seed),
        "srl": lambda: Matryoshka(CoSENT(), PAIRS),
        "srl_without_kl": lambda: Matryoshka(CoSENT(), PAIRS, kl=None),
        "full": lambda: Matryoshka(CoSENT(), PAIRS[-1:], kl=None),
    }
    if seed:
        del objectives["srl_without_kl"], objectives["full"]
    arms = {"raw": correlations(model, dev, PAIRS)}
    for name, make in objectives.items():
        arms[name] = correlations(tuned(copy.deepcopy(model), make(), train, seed), dev, PAIRS)
    arms["separate"] = {}
    for size in ALONE:
        small = rewrite(copy.deepcopy(model), Truncate(*size))
        tuned(small, CoSENT(), train, seed)
        arms["separate"] |= correlations(small, dev, [size])
    return arms


def tokenized(pairs: SentencePairs, tokenizer: Any, limit: int | None, seed: int) -> dict[str, Tensor]:
    """Return pairs as tokens (rows, 2, 48) with their masks and scores: all, or as many drawn from the whole file.

    Drawn, since the file is in the order of its genres.
    """
    rows = torch.randperm(len(pairs.scores), generator=torch.Generator().manual_seed(seed))[:limit]
    first, second = ([texts[i] for i in rows.tolist()] for texts in (pairs.first, pairs.second))
    return encoded_pairs(SentencePairs(first, second, pairs.scores[rows]), CONTEXT, tokenizer)


def picked(columns: dict[str, Tensor], rows: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Take rows, and no more columns than the longest of them has tokens."""
    found = {name: values[rows] for name, values in columns.items()}
    longest = int(found["attention_mask"].sum(-1).max())
    return {k: (v[..., :longest] if v.dim() == 3 else v).to(device) for k, v in found.items()}


def tuned(model: nn.Module, objective: Objective, train: dict[str, Tensor], seed: int) -> nn.Module:
    """Train for one epoch: AdamW 5e-5, batch 32; every arm sees the same batches."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    order = torch.randperm(len(train["label"]), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.train()
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            objective(model, picked(train, rows, device))["loss"].backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def correlations(model: nn.Module, dev: dict[str, Tensor], pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return Spearman's correlation of cosines with scores at each size, in points; one pass over all sentences."""
    device = next(model.parameters()).device
    exits = exits_of(model)
    # Sentences of like length together, so that little is padding.
    flat = {k: v.flatten(0, 1) for k, v in dev.items() if v.dim() == 3}
    order = flat["attention_mask"].sum(-1).argsort(stable=True)
    parts = []
    for rows in order.split(64):
        length = int(flat["attention_mask"][rows].sum(-1).max())
        batch = {k: v[rows, :length].to(device) for k, v in flat.items()}
        parts.append(exit_vectors(model, batch, exits, {n for n, _ in pairs}, "mean"))
    back = order.argsort()
    found = {}
    for n, d in pairs:
        one, other = cut_embedding(torch.cat([p[n] for p in parts])[back.to(device)], d).unflatten(0, (-1, 2)).unbind(1)
        found[f"{n}x{d}"] = 100 * spearman((one * other).sum(-1).cpu(), dev["label"])
    return found


def hidden_words(device: torch.device) -> dict[str, float]:
    """Pre-train on WikiText-2 by hidden words, at three sizes or at the largest alone; the loss at each, in nats.

    The head over the vocabulary is fresh in both; what is measured is the MLM loss on other sentences.
    """
    transformers = require("transformers", "hf")
    trunk, tokenizer = minilm(device)
    texts = sentences()
    train, held = (batches(texts[:-96], tokenizer), batches(texts[-96:], tokenizer))
    found: dict[str, float] = {}
    for arm in ("autoencoding", "plain"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.BertForMaskedLM(trunk.config).to(device)
            model.bert.load_state_dict(trunk.state_dict(), strict=False)
            ours = autoencoding(model, tokenizer)
            plain = MaskedToken(tokenizer.mask_token_id, len(tokenizer), share=0.2)
            objective: Objective = ours if arm == "autoencoding" else plain
            optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=1e-4)
            steps = HIDING_STEPS // 10 if smoke() else HIDING_STEPS
            for step in range(steps):
                batch = {k: v.to(device) for k, v in train[step % len(train)].items()}
                optimizer.zero_grad()
                objective(model.train(), batch)["loss"].backward()
                optimizer.step()
                if step + 1 in (steps // 4, steps):
                    done = "" if step + 1 == steps else "_at_a_quarter"
                    found |= {f"{arm}_{k}{done}": v for k, v in hidden_loss(model, ours, held, device).items()}
    return found


@torch.no_grad()
def hidden_loss(
    model: nn.Module, objective: MatryoshkaAutoencoding, held: Sequence[Batch], device: torch.device
) -> dict[str, float]:
    """Return the mean MLM loss at each size over held-out batches."""
    model.eval()
    found = [objective(model, {k: v.to(device) for k, v in batch.items()}) for batch in held]
    names = [f"mlm/{n}x{d}" for n, d in HIDING_PAIRS]
    return {name.replace("/", "_"): sum(float(f[name]) for f in found) / len(found) for name in names}


def autoencoding(model: nn.Module, tokenizer: Any) -> MatryoshkaAutoencoding:
    """Make the objective for a BERT tokenizer's words."""
    special, words = tokenizer.all_special_ids, continuing_tokens(tokenizer)
    return MatryoshkaAutoencoding(
        model, tokenizer.mask_token_id, len(tokenizer), HIDING_PAIRS, special=special, continues=words
    )


def sentences() -> list[str]:
    """Return 2000 sentences of 6 to 30 words from WikiText-2's valid part, below LAMINA_DATA."""
    path = Path(os.environ.get("LAMINA_DATA", ""), "text", "wikitext-2-valid.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found = [s.strip() for line in file if not line.startswith(" =") for s in line.split(" . ")]
    chosen = [s for s in found if 6 <= len(s.split()) <= 30]
    return chosen[: 400 if smoke() else HIDING_TEXTS]


def batches(texts: Sequence[str], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Tokenize texts in order, 16 a batch."""
    return list(_batches(texts, tokenizer))


def _batches(texts: Sequence[str], tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(texts), HIDING_BATCH):
        rows = tokenizer(
            list(texts[start : start + HIDING_BATCH]), padding=True, truncation=True, max_length=CONTEXT,
            return_tensors="pt",
        )  # fmt: skip
        yield {k: rows[k] for k in ("input_ids", "attention_mask")}


def picture(seed: int, device: torch.device) -> Figure:
    """Draw the quality of every size, by how it was trained."""
    from matplotlib.figure import Figure

    arms = measured(seed, device)
    labels = {"raw": "cut, not tuned", "full": "tuned whole, then cut", "2dmse": "2D Matryoshka", "srl": "Starbucks"}
    drawing = Figure(figsize=(5.4, 3.4), layout="constrained")
    axis = drawing.subplots()
    places = range(len(PAIRS))
    for arm, label in labels.items():
        axis.plot(places, [arms[arm][f"{n}x{d}"] for n, d in PAIRS], "o-", label=label, markersize=4)
    alone = [PAIRS.index(size) for size in ALONE]
    axis.plot(alone, [arms["separate"][f"{n}x{d}"] for n, d in ALONE], "k*", label="trained alone", markersize=9)
    axis.set_xticks(list(places), [f"{n} layers\n{d}" for n, d in PAIRS])
    axis.set_ylabel("Spearman x 100, STS-B dev")
    axis.legend(frameon=False)
    return drawing
