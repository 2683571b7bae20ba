"""COAT beside torch's AdamW and bfloat16 blocks: time of a step, bytes of moments and activations, loss."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from benchmarks.harness import Row, pair, write
from lamina.data import load
from lamina.models import Transformer
from lamina.nn.float8 import saved_bytes
from lamina.optim import Float8AdamW
from lamina.rewrite import LowPrecision, rewrite

SHAPES = [(512, 512)] * 16
STEPS, SEEDS = 100, (0, 1, 2)


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [Parameter(0.05 * torch.randn(s, generator=generator)) for s in SHAPES]
    for p in found:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return found


def steps() -> list[Row]:
    peer = AdamW(parameters(), foreach=True)
    rows = []
    for compiled, goal in ((True, "<= 3.0"), (False, "none")):
        ours = Float8AdamW(parameters(), compile=compiled)
        name = "Float8AdamW" + (", compile=True" if compiled else "")
        names = (name, "torch AdamW, foreach")
        rows.append(pair("step, 16 tensors, 4.2M", ours.step, peer.step, names=names, goal=goal, rounds=21))
    return rows


def counted(what: str, names: tuple[str, str], goal: str, ours: float, peer: float) -> Row:
    """Return a row of bytes, which do not vary."""
    ratio = ours / peer
    print(f"{what}: {names[0]} / {names[1]} = {ratio:.3f}  (goal {goal})", flush=True)
    return Row(what, *names, ratio, (ratio, ratio), goal, (0.0, 0.0), megabytes=(ours / 1e6, peer / 1e6))


def moments() -> Row:
    ours, peer = Float8AdamW(parameters()), AdamW(parameters())
    ours.step()
    peer.step()
    theirs = sum(s[m].nbytes for s in peer.state.values() for m in ("exp_avg", "exp_avg_sq"))
    names = ("Float8AdamW", "torch AdamW, float32")
    return counted("bytes of the moments, 16 tensors, 4.2M", names, "<= 0.30", ours.state_bytes(), theirs)


def llama() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    ids = torch.arange(4 * 128).view(4, 128) % 128
    return LlamaModel(config), lambda model: model(ids).last_hidden_state


def ours() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = Transformer(2, 256, 4, vocabulary=128, context=128, norm="rms_norm", feed_forward="swiglu")
    ids = torch.arange(4 * 128).view(4, 128) % 128
    return model, lambda model: model(ids)


def activations(name: str, made: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]) -> Row:
    found = []
    for float8 in (True, False):
        model, run = made()
        model = model.bfloat16().train()
        model = rewrite(model, LowPrecision()).train() if float8 else model
        found.append(saved_bytes(model, lambda model=model, run=run: run(model)))  # type: ignore[misc]
    names = ("low_precision", "bfloat16")
    return counted(f"saved for backward, {name}, width 256, 512 tokens", names, "<= 0.70", found[0], found[1])


def trained(seed: int, coat: bool) -> float:
    """Train in bf16; return the mean loss of the last tenth of the steps."""
    data = load("text", context=32, batch=8, split=0.1, limit=400_000)
    torch.manual_seed(seed)
    model: nn.Module = Transformer(2, 64, 2, **data.sizes, norm="rms_norm", feed_forward="swiglu")
    model = rewrite(model, LowPrecision()) if coat else model
    optimizer: Optimizer = (Float8AdamW if coat else AdamW)(model.train().parameters(), lr=2e-3, weight_decay=0.01)
    draw, losses = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        batch = data.train.batch(torch.randint(len(data.train), (8,), generator=draw))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-STEPS // 10 :])


def losses() -> Row:
    pairs = [(trained(seed, True), trained(seed, False)) for seed in SEEDS]
    ratios = sorted(a / b for a, b in pairs)
    what, names, goal = f"loss after {STEPS} steps, 3 seeds", ("COAT in bf16", "AdamW in bf16"), "<= 1.005"
    ratio = statistics.median(ratios)
    print(
        f"{what}: {names[0]} / {names[1]} = {ratio:.4f} [{ratios[0]:.4f}, {ratios[-1]:.4f}]  (goal {goal})", flush=True
    )
    return Row(what, *names, ratio, (ratios[0], ratios[-1]), goal, (0.0, 0.0))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = [moments(), activations("Llama of transformers", llama), activations("Transformer", ours)]
    write("coat", [*counts, losses(), *steps()], ("transformers",))


if __name__ == "__main__":
    main()
