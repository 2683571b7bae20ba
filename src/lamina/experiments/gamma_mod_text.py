"""Mixture of depths on a language model of real text: a Llama trained on Shakespeare's bytes, routed, trained on.

What gamma-MoD's experiment reports beside its images: loss, operations and time of a prefill, before and after.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lamina.data import Loader, text
from lamina.errors import require
from lamina.experiments.harness import smoke
from lamina.objectives import NextToken, Objective, RouterLoss, WeightedSum
from lamina.rewrite import DepthRouting, rewrite

CONTEXT, BATCH, STEPS, LR, COUNT = 128, 16, 300, 2e-3, 3


def routed_text(device: torch.device) -> dict[str, float]:
    """Train densely, route three of six blocks at half the tokens, train on, and the dense model for as long."""
    data = text(Path(os.environ.get("LAMINA_DATA") or ".", "text", "tinyshakespeare.txt"), CONTEXT, BATCH)
    assert data.evaluation is not None
    held = [data.evaluation.batch(torch.arange(i, i + 32)) for i in range(0, 128, 32)]
    model = llama(device)
    steps = STEPS // 20 if smoke() else STEPS
    train(model, NextToken(), Loader(data.train, BATCH, seed=0), steps)
    found = {"before": loss(model, held)}
    dense = copy.deepcopy(model)
    routed = rewrite(model, DepthRouting(count=COUNT, skip=0.5), data=held[:1])
    train(dense, NextToken(), Loader(data.train, BATCH, seed=1), steps // 2)
    healing = WeightedSum([(1.0, NextToken()), (0.01, RouterLoss())])
    train(routed, healing, Loader(data.train, BATCH, seed=1), steps // 2)
    ids = held[0]["input_ids"].to(device)
    found |= {"dense": loss(dense, held), "routed": loss(routed, held)}
    found["flops_prefill"] = operations(routed, ids) / operations(dense, ids)
    found["seconds_prefill"] = seconds(routed, dense, ids)
    return {f"text_{name}": value for name, value in found.items()}


def llama(device: torch.device) -> nn.Module:
    """Six blocks of width 96, of transformers' own class, fresh."""
    transformers = require("transformers", "hf")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(device)


def train(model: nn.Module, objective: Objective, batches: Loader, steps: int) -> None:
    """Take steps of AdamW under one linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    model.train()
    device = next(model.parameters()).device
    for _, batch in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        objective(model, {k: v.to(device) for k, v in batch.items()})["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()


@torch.no_grad()
def loss(model: nn.Module, held: list[dict[str, Tensor]]) -> float:
    """Mean loss of a held-out byte in nats; by threshold where the model is routed."""
    model.eval()
    device = next(model.parameters()).device
    found = [NextToken()(model, {k: v.to(device) for k, v in b.items()})["loss"] for b in held]
    return float(torch.stack(found).mean())


@torch.no_grad()
def operations(model: nn.Module, ids: Tensor) -> int:
    """Count the operations of a prefill."""
    # The counter knows no formula for the fused attention of CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(input_ids=ids)
    return int(counter.get_total_flops())


@torch.inference_mode()
def seconds(model: nn.Module, other: nn.Module, ids: Tensor) -> float:
    """Time prefills of two models in turns; the ratio of the medians."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(9):
        for times, one in zip(taken, (model, other), strict=True):
            start = time.perf_counter()
            one.eval()(input_ids=ids)
            times.append(time.perf_counter() - start)
    return statistics.median(taken[0]) / statistics.median(taken[1])
