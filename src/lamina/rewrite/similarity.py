"""How little each sublayer and block changes the residual stream, measured in one forward pass over some data."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy import Trunk, undisturbed
from lamina.batches import Batch, bare, call, to_device
from lamina.errors import LaminaError
from lamina.probe import observe
from lamina.rewrite._drop_apply import refuse_shared
from lamina.rewrite._stream import Scores, State, Watch
from lamina.rewrite._stream import channel_dim as channel_dim

FEW_TOKENS = 1000
"""Below this many tokens the means are rough, and a log line says so."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Similarity:
    """Mean cosine between the residual stream before and after, per block in order; 1 = changes nothing."""

    attention: Scores
    mlp: Scores
    block: Scores
    runs: Scores = ()
    """Asked for with `span`: cosine from the input of block i to the output of block i + span - 1."""
    tokens: int = 0
    """Tokens the means are over: padding and all-zero vectors are left out."""


@torch.no_grad()
def similarity(
    model: nn.Module,
    trunk: Trunk,
    data: Iterable[Batch],
    *,
    samples: int = 256,
    keep_norm: bool = False,
    span: int | None = None,
) -> Similarity:
    """Score every sublayer and block of a trunk in one pass, by sums that run along; no activation outlives a batch.

    The cosine is over channels, in float32, between what the stream is and what it would be without the part; the
    mean is over real tokens (`attention_mask`, `decoder_attention_mask` for a decoder that has an encoder,
    `src_key_padding_mask`). The model runs in evaluation mode and is as before afterwards.

    Args:
        samples: rows of data that are looked at.
        keep_norm: score a post-norm sublayer against norm(x), as dropping it but not its norm would leave.
        span: score each run of this many blocks, too.
    Raises:
        LaminaError: no data, weights on the meta device, or a score that is not finite. AnatomyError: blocks that are
            one module.
    Source: He et al. (2024), arXiv 2406.15786, equations 2-4.
    """
    model = bare(model)
    if any(p.is_meta for p in model.parameters()):
        raise LaminaError(f"{type(model).__name__} has weights on the meta device: there is nothing to score")
    refuse_shared(model, trunk, range(len(trunk.blocks)))
    watch = Watch(model, trunk, keep_norm=keep_norm, span=span)
    options = _cheaper(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with undisturbed(model), observe(model, watch.callbacks()):
        for batch in take(data, samples):
            moved = to_device(batch, device)
            watch.mask = _mask(moved, trunk)
            call(model, moved, **options)
            watch.batch_done()
    return _result(watch)


def take(data: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Yield batches until `samples` rows are reached, the last one cut to fit.

    Raises:
        LaminaError: the data is empty, or is no iterable of batches.
    """
    left = samples
    for batch in [None] if isinstance(data, (Mapping, Tensor)) else data:
        if not isinstance(batch, Mapping):
            given = data if batch is None else batch
            raise LaminaError(
                f"calibration data is an iterable of batches, each a mapping of names to tensors, such as "
                f"[{{'input_ids': ids}}]; got a {type(given).__name__}{'' if batch is None else ' in it'}"
            )
        rows = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
        if not rows:
            continue
        if rows > left:
            cut = {k for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and len(v) == rows}
            batch = {k: v[:left] if k in cut else v for k, v in batch.items()}
        yield batch
        left -= rows
        if left <= 0:
            return
    if left == samples:
        raise LaminaError(
            "the calibration data is empty: similarity needs at least one batch (an iterator is used up after one "
            "pass: give a list, or a loader)"
        )


def cosine(x: Tensor, y: Tensor, dim: int = -1) -> Tensor:
    """Cosine between vectors along `dim`, in float32 or better; 0 where either is all zero."""
    return State.of(x, dim).cosine(State.of(y, dim))


def _result(watch: Watch) -> Similarity:
    name = watch.trunk.path
    blocks = tuple(m.read(f"block {i} of {name}") for i, m in enumerate(watch.blocks))
    tokens = max((int(m.weight) for m in watch.blocks if m.weight is not None), default=0)
    if tokens < FEW_TOKENS:
        _log.warning("similarity of %s is measured on %d tokens only: the scores are rough", name, tokens)
    runs = tuple(m.read(f"the run of {watch.span} blocks from {i} of {name}") for i, m in enumerate(watch.runs))
    return Similarity(watch.read("attention"), watch.read("mlp"), blocks, runs, tokens)


def _mask(batch: Batch, trunk: Trunk) -> Tensor | None:
    """The batch's real tokens (B, T), True = real, or None; a decoder that has an encoder has its own mask."""
    decoding = "decoder" in trunk.path.split(".") and any(k.startswith("decoder_") for k in batch)
    mask = batch.get("decoder_attention_mask" if decoding else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    padding = batch.get("src_key_padding_mask")
    return ~padding.bool() if isinstance(padding, Tensor) and not decoding else None


def _cheaper(model: nn.Module) -> dict[str, Any]:
    """Options of a Hugging Face forward that leave out what scoring does not need."""
    taken = inspect.signature(model.forward).parameters
    return {k: v for k, v in (("use_cache", False), ("logits_to_keep", 1)) if k in taken}
