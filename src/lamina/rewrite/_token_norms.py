"""Say where each norm of tokens goes when its statistics are fixed: into its readers, into what it reads, or nowhere.

Norms of tokens have their features last (`PRepBN`, `RepBN`, `TokenBatchNorm`); for batch norms of maps see
`_conv_bn_pairs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lamina.anatomy import get
from lamina.batches import Batch, to_device
from lamina.nn import PRepBN, RepBN, TokenBatchNorm
from lamina.rewrite._conv_bn_pairs import first_batch, module_reason, norm_reason
from lamina.rewrite._folding import norm_scale_and_shift
from lamina.rewrite._neighbours import (
    Neighbours,
    Source,
    channels_from_last,
    neighbours_of_run,
    neighbours_on_symbols,
)

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
HUGGING_FACE_LINEAR = "Conv1D"
"""GPT-2's linear layer, whose weight is (in, out)."""


@dataclass(frozen=True)
class Destination:
    """Where one norm goes."""

    into: Literal["consumers", "producer", "affine"]
    modules: tuple[str, ...]
    """Paths of the layers whose weights change."""
    why: str


def token_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norms of tokens by path; of a progressive norm the whole, not its parts."""
    found = {p: m for p, m in model.named_modules() if type(m) in (PRepBN, RepBN, TokenBatchNorm)}
    whole = tuple(f"{path}." if path else "" for path, m in found.items() if isinstance(m, PRepBN))
    return {p: m for p, m in found.items() if not (whole and p.startswith(whole) and not isinstance(m, PRepBN))}


def token_norm_reason(norm: nn.Module) -> str:
    """Say why a norm of tokens must stay as it is; empty = it is a scale and shift in evaluation."""
    if isinstance(norm, TokenBatchNorm):
        return norm_reason(norm)
    return next((reason for m in norm.modules() if (reason := module_reason(m))), "")


def destinations(
    model: nn.Module, norms: Mapping[str, nn.Module], data: Iterable[Batch] | None
) -> dict[str, Destination]:
    """Choose for every norm: all its readers, else what it alone reads, else a scale and shift in its place.

    Args:
        data: the first batch is run; without it torch.fx looks, and sees direct readers only.
    """
    layers = [p for p, m in model.named_modules() if layer_kind(m)]
    watched = [*norms, *layers]
    if data is None:
        seen, unseen = neighbours_on_symbols(model, watched), "not seen by torch.fx: pass data to look for its readers"
    else:
        like = next(iter(model.parameters()), torch.empty(0))
        seen = neighbours_of_run(model, to_device(first_batch(data), like.device), watched)
        unseen = "it does not run on this batch"
    shared = _shared_weights(model)
    return {path: _destination(model, path, norm, seen, shared, unseen) for path, norm in norms.items()}


def layer_kind(module: nn.Module) -> str:
    """Tell the layers that a scale and shift can go into; empty = none."""
    if type(module) is nn.MultiheadAttention:
        return "attention"
    if isinstance(module, (*LINEAR, *CONVOLUTIONS)) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return "layer"
    return "layer" if type(module).__name__ == HUGGING_FACE_LINEAR else ""


def _destination(
    model: nn.Module, path: str, norm: nn.Module, seen: Neighbours, shared: set[int], unseen: str
) -> Destination:
    if path not in seen.given:
        return Destination("affine", (), unseen)
    readers = [*seen.readers.get(path, {})]
    whys = [_reader_reason(model, path, norm, r, seen, shared) for r in readers] or ["nothing reads it"]
    if not any(whys):
        return Destination("consumers", tuple(readers), f"read by {', '.join(readers)} alone")
    reason = next(w for w in whys if w)
    producers = seen.sources(path)
    producer = next(iter(producers)) if len(producers) == 1 else None
    if producer is not None and not _producer_reason(model, path, producer, seen, shared):
        return Destination("producer", (producer.path,), f"alone reads {producer.path}; {reason}")
    return Destination("affine", (), reason)


def _reader_reason(
    model: nn.Module, path: str, norm: nn.Module, reader: str, seen: Neighbours, shared: set[int]
) -> str:
    """Say why a norm cannot go into one of its readers; empty = it can."""
    if reader not in seen.given:
        return f"its output is also read by {reader}"
    layer: Any = get(model, reader)
    kind = layer_kind(layer)
    if not kind:
        return f"its output is read by {reader}, a {type(layer).__name__}"
    if seen.sources(reader) != {Source(path, channels_from_last(layer))}:
        return f"{reader} is called with more than its output, or with its features in another dimension"
    if kind == "attention":
        if layer.in_proj_weight is None or layer.in_proj_bias is None or layer.bias_k is not None:
            return f"{reader} has no one biased input projection"
        if any(len(given) != 3 for given in seen.given[reader]):
            return f"what {reader} is called with is not seen: pass data"
    elif any(len(given) != 1 for given in seen.given[reader]):
        return f"{reader} is called with more than its input"
    if isinstance(layer, CONVOLUTIONS) and _pads_with_zeros(layer) and _shifts(norm):
        return f"{reader} pads with zeros, which have no shift"
    return _layer_reason(reader, layer, shared)


def _producer_reason(model: nn.Module, path: str, producer: Source, seen: Neighbours, shared: set[int]) -> str:
    layer: Any = get(model, producer.path)
    if layer_kind(layer) != "layer" or type(layer).__name__ == HUGGING_FACE_LINEAR:
        return "no layer before it"
    if producer.from_last != -1:
        return "its features are not the layer's channels"
    if [*seen.readers[producer.path]] != [path]:
        return "the layer has other readers"
    return _layer_reason(producer.path, layer, shared)


def _layer_reason(path: str, layer: Any, shared: set[int]) -> str:
    known = (*LINEAR, *CONVOLUTIONS, nn.MultiheadAttention)
    if type(layer) not in known and type(layer).__name__ != HUGGING_FACE_LINEAR:
        return f"{path} is a {type(layer).__name__}, which may compute something else"
    if hasattr(layer, "parametrizations"):
        return f"the weight of {path} has a parametrization"
    if any(id(p) in shared for p in layer.parameters()):
        return f"the weight of {path} is another layer's too"
    reason = module_reason(layer)
    return f"{path}: {reason}" if reason else ""


def _pads_with_zeros(layer: Any) -> bool:
    padded = layer.padding != "valid" if isinstance(layer.padding, str) else any(layer.padding)
    return padded and layer.padding_mode == "zeros"


def _shifts(norm: nn.Module) -> bool:
    return bool(norm_scale_and_shift(norm, torch.float64)[1].any())


def _shared_weights(model: nn.Module) -> set[int]:
    """Find parameters that several modules hold (an embedding and the head tied to it)."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {key for key, count in holders.items() if count > 1}
