"""What each layer of a FIT costs, before anything is built: multiply-adds and the memory that training keeps.

Source: Chen, Li, FIT: Far-reaching Interleaved Transformers (2023), arXiv 2305.12689, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamina.models.fit.layers import parse_layers


@dataclass(frozen=True)
class LayerCost:
    """One layer, for one sequence."""

    name: str
    """Its path below the model's trunk."""
    flops: int
    """Floating-point operations of its matrix products in a forward pass, two for each multiply-add."""
    attention_flops: int
    """Those of them that are products of queries with keys and of weights with values."""
    activation_bytes: int
    """What the backward pass needs of the layer, where attention is fused and nothing is recomputed."""


def attention_cost(
    layers: str,
    tokens_per_group: int,
    groups: int,
    latents_per_group: int,
    token_width: int,
    latent_width: int,
    *,
    token_heads: int = 1,
    latent_heads: int = 1,
    side_tokens: int = 0,
    mlp_ratio: int = 4,
    bytes_per_number: int = 4,
) -> list[LayerCost]:
    """List the layers of a FIT in the order they run, each with its cost for one sequence.

    With m latents fixed, t n^2 of the local layers and (t m)^2 of the global ones are balanced at
    n = (L m^2)^(1/3) tokens a group, L = t n, and their sum grows as L^(4/3).

    Args:
        side_tokens: k, in front of every group.
        bytes_per_number: 4 for float32, 2 for bfloat16.
    Raises:
        RecipeError: the layer string cannot be read.
    """
    counts, costs = parse_layers(layers), []
    inside, latents = tokens_per_group + side_tokens, latents_per_group
    one = {"ratio": mlp_ratio, "size": bytes_per_number}
    for i, (local, total) in enumerate(counts):
        at = f"blocks.{i}"
        costs += [_layer(f"{at}.local.{j}", groups, inside, token_width, token_heads, **one) for j in range(local)]
        if not total:
            continue
        narrow, heads = min(token_width, latent_width), min(token_heads, latent_heads)
        cross = {"groups": groups, "narrow": narrow, "heads": heads, "size": bytes_per_number}
        costs.append(_cross(f"{at}.read", latents, latent_width, inside, token_width, **cross))
        costs += [
            _layer(f"{at}.latent.{j}", 1, groups * latents, latent_width, latent_heads, **one) for j in range(total)
        ]
        if i < len(counts) - 1:
            costs.append(_cross(f"{at}.write", inside, token_width, latents, latent_width, **cross))
    return costs


def _layer(name: str, groups: int, tokens: int, width: int, heads: int, *, ratio: int, size: int) -> LayerCost:
    """Cost a pre-norm layer over groups of tokens that see each other."""
    rows, attention = groups * tokens, 4 * groups * tokens**2 * width
    # Kept of a token: two inputs and outputs of norms, q, k, v and the heads' answers, the MLP before and behind its
    # activation; mean and deviation twice, and a normaliser a head.
    kept = (8 + 2 * ratio) * width + 4 + heads
    return LayerCost(name, (8 + 4 * ratio) * rows * width**2 + attention, attention, rows * kept * size)


def _cross(
    name: str, queries: int, width: int, keys: int, key_width: int, *, groups: int, narrow: int, heads: int, size: int
) -> LayerCost:
    """Cost a read of some keys by some queries in every group."""
    attention = 4 * groups * queries * keys * narrow
    projections = 4 * groups * narrow * (queries * width + keys * key_width)
    kept = queries * (2 * width + 2 * narrow + 2 + heads) + keys * (2 * key_width + 2 * narrow + 2)
    return LayerCost(name, projections + attention, attention, groups * kept * size)
