"""Early exits: a batch that leaves at layer 4 of 6 in the mean, against a model of 4 layers, and against all 6.

The ideal is the same BERT (MiniLM's sizes, random weights) cut to 4 layers: what the batch would cost if rows that
left cost nothing, and the exits neither. Rows are picked so that the mean is 4 exactly, some leaving at each layer from
2 on. The lambda head costs as much at any length, so its share falls with it: for one short text its weights, as many
as a layer's, are read as often as the layers'. What is left of the difference when the cut model computes its exits
too, and does nothing with them, is what leaving costs.

Run: OMP_NUM_THREADS=1 python -m benchmarks palbert
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, pair, write
from lamina import probe
from lamina.anatomy import dissect, keep_blocks
from lamina.objectives import Classification, Objective, Ponder
from lamina.rewrite import EarlyExit, EarlyExitModel, rewrite
from lamina.rewrite.early_exit.tail import reader

LAYERS, MEAN, BATCH, VOCABULARY = 6, 4, 32, 1000
LEAVING = {2: 6, 3: 6, 4: 8, 5: 6, 6: 6}
"""Rows by the layer they leave at: 32, in the mean at layer 4."""


def encoder(kind: str) -> nn.Module:
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 384, "num_hidden_layers": LAYERS, "num_attention_heads": 12}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=1536, num_labels=2)
    model: nn.Module = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # So that rows differ where the exits look.
            p.mul_(20.0 if "embeddings.weight" in name or "word_embeddings" in name else 1.0)
    return model.eval()


def shorter(model: nn.Module, layers: int) -> nn.Module:
    model = copy.deepcopy(model)
    if model.config.model_type == "albert":  # type: ignore[union-attr]
        model.config.num_hidden_layers = layers  # type: ignore[union-attr]
    else:
        keep_blocks(model, "bert.encoder.layer", range(layers))
    return model


def with_exits(model: nn.Module) -> EarlyExitModel:
    made = rewrite(copy.deepcopy(model), EarlyExit(), data=[{"input_ids": torch.randint(VOCABULARY, (4, 32))}])
    assert isinstance(made, EarlyExitModel)
    assert made.lambda_head is not None
    with torch.no_grad():
        for p in made.lambda_head.parameters():
            p.normal_(0.0, 0.3 if p.dim() > 1 else 0.0)
    return made.eval()


def picked(model: EarlyExitModel, tokens: int) -> Tensor:
    """Rows that leave as `LEAVING` says, out of many, at the first q by which enough leave at each layer."""
    pool = torch.randint(VOCABULARY, (512, tokens))
    model.training = True
    with torch.no_grad():
        log_p = torch.cat([model(input_ids=part)["exit_log_p"] for part in pool.split(64)])
    model.training = False
    reached = log_p.exp().cumsum(1)
    for q in torch.linspace(0.05, 0.999, 400).tolist():
        layer = (reached[:, :-1] <= q).sum(1) + 1
        if all(int((layer == k).sum()) >= n for k, n in LEAVING.items()):
            model.q = q
            rows = torch.cat([(layer == k).nonzero()[:n, 0] for k, n in LEAVING.items()])
            return pool[rows[torch.randperm(len(rows))]]
    raise RuntimeError(f"no q at which enough rows leave at each layer: {reached.quantile(0.5, dim=0)}")


def inference(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    mask = torch.ones_like(ids)

    def run() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)

    return run


def step(model: nn.Module, objective: Objective, ids: Tensor) -> Callable[[], object]:
    model = copy.deepcopy(model).train()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(len(ids)) % 2}

    def run() -> object:
        model.zero_grad()
        objective(model, batch)["loss"].backward()
        return None

    return run


def at_inference(name: str, full: nn.Module, tokens: int, rounds: int) -> tuple[EarlyExitModel, Tensor, list[Row]]:
    exits, ideal = with_exits(full), shorter(full, MEAN)
    ids = picked(exits, tokens)
    with torch.inference_mode():
        found = exits(input_ids=ids)["exit_layer"]
    assert found.float().mean() == MEAN, found
    batch = f"{name}, {LAYERS} x 384, batch {BATCH}, {tokens} tokens"
    mine, cut, whole = f"Q-exit, mean layer {MEAN}", f"the model cut to {MEAN} layers", f"all {LAYERS} layers"
    ours, short, long = inference(exits, ids), inference(ideal, ids), inference(full, ids)
    rows = [
        pair(batch, ours, short, names=(mine, cut), goal="<= 1.10", rounds=rounds),
        pair(batch, ours, long, names=(mine, whole), goal="<= 0.80", rounds=rounds),
    ]
    one = ids[(found == MEAN).nonzero()[0]]
    what = f"{name}, batch 1, {tokens} tokens"
    names = (f"Q-exit at layer {MEAN}", cut)
    rows.append(pair(what, inference(exits, one), inference(ideal, one), names=names, goal="<= 1.10", rounds=31))
    names = (names[0], f"{cut}, its exits computed")
    with computing(ideal, exits):
        rows.append(pair(what, inference(exits, one), inference(ideal, one), names=names, goal="no target", rounds=31))
    return exits, ids, rows


def computing(ideal: nn.Module, exits: EarlyExitModel) -> AbstractContextManager[None]:
    """Let a model do the arithmetic of the exits after each of its blocks."""
    head, read = exits.lambda_head, reader(ideal, exits.tail)
    assert head is not None

    def after(module: nn.Module, args: object, kwargs: object, output: Any) -> None:
        h = read(output[0] if isinstance(output, tuple) else output, None)
        head.step(h, h)

    return probe.observe(ideal, dict.fromkeys((b.path for b in dissect(ideal).trunk().blocks), after))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bert = encoder("Bert")
    exits, ids, rows = at_inference("BERT", bert, 32, 15)
    _, _, longer = at_inference("BERT", bert, 128, 7)
    _, _, shared = at_inference("ALBERT", encoder("Albert"), 32, 9)
    rows += longer + shared
    what = f"BERT, training step, batch {BATCH}, 32 tokens"
    ours, plain = step(exits, Ponder(), ids), step(bert, Classification(), ids)
    rows.append(pair(what, ours, plain, names=("with exits and ponder", "without"), goal="<= 1.05", rounds=9))
    write("palbert", rows, ("transformers",))


if __name__ == "__main__":
    main()
