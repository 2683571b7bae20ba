"""FIT as its card writes it: loops over groups, softmax written out, weights read from a state dict by name."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina import anatomy
from lamina.nn import RepBN

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def attend(state: State, name: str, x: Tensor, context: Tensor, heads: int, seen: Tensor | None) -> Tensor:
    """x (T, C), context (S, D), seen (T, S): one sequence."""
    q, k, v = (linear(state, f"{name}.{part}", y) for part, y in (("query", x), ("key", context), ("value", context)))
    size, outs = q.shape[-1] // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if seen is not None:
            scores = scores.masked_fill(~seen, -1e30)
        weights = scores.softmax(-1)
        if seen is not None:
            weights = weights * seen
        outs.append(weights @ v[:, part])
    return linear(state, f"{name}.out", torch.cat(outs, -1))


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    hidden = linear(state, f"{name}.up", x)
    return linear(state, f"{name}.down", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def layer(state: State, name: str, x: Tensor, heads: int, seen: Tensor | None) -> Tensor:
    if f"{name}.norm.weight" in state:  # The MLP alone.
        return x + mlp(state, f"{name}.feed_forward", norm(state, f"{name}.norm", x))
    y = norm(state, f"{name}.norm1", x)
    x = x + attend(state, f"{name}.mixer", y, y, heads, seen)
    return x + mlp(state, f"{name}.feed_forward", norm(state, f"{name}.norm2", x))


def read(state: State, name: str, x: Tensor, context: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    kv = norm(state, f"{name}.context_norm", context) if f"{name}.context_norm.weight" in state else context
    x = x + attend(state, f"{name}.attention", norm(state, f"{name}.norm", x), kv, heads, seen)
    return layer(state, f"{name}.mlp", x, heads, None) if f"{name}.mlp.norm.weight" in state else x


def trunk(
    state: State,
    counts: list[tuple[int, int]],
    tokens: list[Tensor],
    latents: list[Tensor],
    heads: tuple[int, int],
    *,
    causal_tokens: bool = False,
    causal_latents: bool = False,
    real: list[Tensor] | None = None,
    condition: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """One example: a list of groups (n, C) and of their latents (m, D), and which tokens of each are real."""
    cross, m, n = min(heads), len(latents[0]), len(tokens[0])
    for i, (local, total) in enumerate(counts):
        at = f"trunk.blocks.{i}"
        for g in range(len(tokens)):
            seen = torch.ones(n, n, dtype=torch.bool).tril() if causal_tokens else None
            seen = real[g].expand(n, -1) if real is not None else seen
            for j in range(local):
                tokens[g] = layer(state, f"{at}.local.{j}", tokens[g], heads[0], seen)
        if not total:
            continue
        for g in range(len(tokens)):
            seen = None if real is None else real[g].expand(m, -1)
            latents[g] = read(state, f"{at}.read", latents[g], tokens[g], cross, seen)
        z = torch.cat(latents)
        if condition is not None:
            z = read(state, f"{at}.condition", z, condition, heads[1])
        group = torch.arange(len(z)) // m
        seen = group[:, None] >= group if causal_latents else torch.ones(len(z), len(z), dtype=torch.bool)
        if real is not None:
            filled = torch.stack([r.any() for r in real])[group]
            seen = (seen & filled) | (torch.eye(len(z), dtype=torch.bool) if causal_latents else seen & False)
        for j in range(total):
            z = layer(state, f"{at}.latent.{j}", z, heads[1], seen)
        latents = list(z.split(m))
        if i < len(counts) - 1:
            for g in range(len(tokens)):
                source = latents[g] if not causal_tokens else latents[g - 1] if g else torch.zeros_like(latents[0])
                tokens[g] = read(state, f"{at}.write", tokens[g], source, cross)
    return tokens, latents


def lively(module: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """Norms that are not the identity, biases that are not zero, branches that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def with_batch_norms(model: nn.Module) -> int:
    """Put norms that take statistics over all tokens in place of the layer norms, in training; return how many."""
    norms = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    for path, old in norms:
        anatomy.swap(model, path, RepBN(old.normalized_shape[0]))
    model.train()
    return len(norms)
