"""What one module is, judged by its own weights: a projection, a norm, an attention; names only break ties."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|glu|moe|expert", re.IGNORECASE)
_HEAD_NORM = re.compile(r"(^|_)(q|k|v|query|key|value|kv|qk|head)(_|$)")
_EPS = ("eps", "epsilon", "variance_epsilon")


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a dense projection (Linear, quantised Linear, GPT-2's Conv1D), else None."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    # Read only there: a layer may form its weight when it is read, which cannot be done while a block is traced.
    weight = getattr(module, "weight", None) if type(module).__name__ == "Conv1D" else None
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def channels(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) channels of a convolution, else None."""
    sizes = getattr(module, "in_channels", None), getattr(module, "out_channels", None)
    return (sizes[0], sizes[1]) if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None


def is_norm(module: nn.Module) -> bool:
    """Tell a normalisation: by its class's name (or a base's), or a leaf of vectors that has an epsilon."""
    if widths(module) or channels(module) or any(widths(m) for m in module.modules()):
        return False
    if any("norm" in c.__name__.lower() for c in type(module).__mro__):
        return True
    own = list(module.parameters())
    leaf = not any(True for _ in module.children())
    return leaf and bool(own) and all(p.dim() == 1 for p in own) and any(hasattr(module, e) for e in _EPS)


def is_head_norm(name: str) -> bool:
    """Tell the norm of queries or keys (`q_norm`) from the norm of a branch by its last name."""
    return _HEAD_NORM.search(name.rpartition(".")[2].lower()) is not None


def hint(*names: str) -> str | None:
    """Read `attention` or `mlp` out of class and attribute names; None where they do not say."""
    for name in names:
        if _ATTENTION.search(name):
            return "attention"
        if _FEED_FORWARD.search(name):
            return "mlp"
    return None


def projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    """List the projections a module owns: its children, and those wrapped in a child Sequential (`to_out.0`)."""
    found: dict[str, tuple[int, int]] = {}
    for name, child in module.named_children():
        inner = child.named_children() if isinstance(child, nn.Sequential) else [("", child)]
        for last, leaf in inner:
            size = widths(leaf)
            if size is not None:
                found[f"{name}.{last}".rstrip(".")] = size
    return found


def is_attention(module: nn.Module) -> bool:
    """Tell a module that itself holds the projections of an attention (three of the input, or a fused one)."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    sizes = list(projections(module).values())
    said = hint(type(module).__name__)
    if len(sizes) < 2 or said == "mlp":
        return False
    return said == "attention" or reads_like_attention(sizes)


def reads_like_attention(sizes: list[tuple[int, int]]) -> bool:
    """Tell by (in, out) sizes alone, in the order registered or run."""
    if len(sizes) < 2:
        return False
    width = sizes[0][0]
    reading = [out for into, out in sizes if into == width]
    if len(sizes) == 2:
        (into, fused), (mixed, back) = sizes
        # Query, key and value in one: more comes out than goes on; twice as much would be a gated feed-forward.
        return back == into and mixed < fused and fused != 2 * mixed and (fused - mixed) % 2 == 0
    if len(sizes) == 3 and len(reading) == 2:
        # Query apart, key and value together; two equal ones are a gated feed-forward's.
        return reading[0] != reading[1] and sizes[2][1] == width
    return len(reading) >= 3 and any(out == width for _, out in sizes)


def attentions(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the outermost attentions in a tree; the module itself is not one of them."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if is_attention(child):
            yield path, child
        else:
            yield from attentions(child, path)


def is_inside(path: str, outer: str) -> bool:
    """Tell whether `path` is `outer` or below it; the empty path is the root."""
    return outer == "" or path == outer or path.startswith(outer + ".")


def join(*parts: str) -> str:
    """Join dotted paths, leaving out empty ones."""
    return ".".join(p for p in parts if p)
