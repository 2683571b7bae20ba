"""Convolution and batch norm as one while fine-tuning with frozen statistics: the function of "eval", less memory.

    model = rewrite(model.eval(), ConvBN())                   # tune mode; gradients as in evaluation mode
    set_mode(model, "eval")                                   # back and forth, at any time
    print(activation_bytes(model, images))                    # what it saves, without running
    model = rewrite(model.eval(), Fold())                     # deploy: one way, see lamina.rewrite.fold

Source: You, Qin, Bao, Cao, Huang, Shan, Long, Efficient ConvBN Blocks for Transfer Learning and Beyond (ICLR 2024),
arXiv 2305.11624.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lamina import anatomy
from lamina.batches import Batch, bare, to_device
from lamina.errors import AnatomyError, LaminaError, nearest
from lamina.lineage import Lineage
from lamina.registry import register
from lamina.rewrite._conv_bn_block import ConvBNBlock as ConvBNBlock
from lamina.rewrite._conv_bn_block import HeldConv as HeldConv
from lamina.rewrite._conv_bn_block import Mode, block, hold, plain
from lamina.rewrite._conv_bn_pairs import find_pairs, first_batch
from lamina.rewrite._links import Links, on_meta, watch

MODES: tuple[Mode, ...] = ("tune", "eval", "train")

Bytes = dict[str, dict[str, int]]
"""By the path of the norm: bytes kept for the backward pass in mode "eval" and in mode "tune"."""


@dataclass(frozen=True)
class ConvBNDecision:
    """Which batch norms compute together with the layer before them."""

    pairs: tuple[tuple[str, str], ...]
    """(path of the layer, path of the norm)."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a norm stays as it is, by its path."""
    mode: Mode = "tune"
    freeze_statistics: bool = False
    bytes: Bytes = field(default_factory=dict)
    """See `activation_bytes`; only where there was data to look at."""

    def table(self) -> str:
        """Word the decision for people: pairs, what they save, what stays and why."""
        lines = [f"{len(self.pairs)} pairs, mode {self.mode}; {len(self.skipped)} batch norms stay as they are"]
        for layer, norm in self.pairs:
            kept = self.bytes.get(norm)
            saving = f": {kept['eval']:,} -> {kept['tune']:,} bytes" if kept else ""
            lines.append(f"  {layer} + {norm}{saving}")
        if self.bytes:
            before, after = (sum(b[mode] for b in self.bytes.values()) for mode in ("eval", "tune"))
            lines.append(f"kept for backward: {before:,} -> {after:,} bytes ({after / max(before, 1) - 1:+.1%})")
        return "\n".join([*lines, *(f"  stays: {path}: {why}" for path, why in self.skipped.items())])


@register("pass", source="You et al. 2024")
class ConvBN:
    """Let each batch norm with frozen statistics compute together with the convolution (or linear layer) before it.

    In mode "tune" the norm is folded into the weight at every call: outputs and gradients are those of a norm in
    evaluation mode, but the convolution's output need not be kept for the backward pass. A norm that is in training
    mode at a call runs after its convolution, by the batch's statistics, as ever. Parameters are the same objects
    under the same names, so optimizer state and `state_dict` stay.

    Args:
        mode: "tune"; "eval": one after the other (what it is compared with); "train": the same, and it undoes
            freeze_statistics. It only says what happens while a norm's `training` is False, which wins over it.
        match: pattern of the norms' paths, such as `layer4.*`; default all.
        min_ratio: leave pairs alone whose predicted saving is below this many times the bytes of the folded weight,
            >= 0; needs data. Below 1 (late stages, small batches) tune mode takes more memory, not less.
        freeze_statistics: put the norms in evaluation mode and keep them there through `model.train()`.
    Raises:
        AnatomyError: no batch norm, or none that can be paired; the message says why.
        LaminaError: an unknown mode, a negative min_ratio or one without data, mode "train" with freeze_statistics.
    Source: You et al. (2024), arXiv 2305.11624, section 3 and algorithm 1. Deviation: folds in float32 under autocast.
    Example:
        >>> from lamina.rewrite import rewrite
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> type(rewrite(model, ConvBN())[1]).__name__
        'ConvBNBlock2d'
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "function"

    def __init__(
        self,
        mode: Mode = "tune",
        *,
        match: str | None = None,
        min_ratio: float | None = None,
        freeze_statistics: bool = False,
    ) -> None:
        _check_mode(mode, freeze_statistics)
        if min_ratio is not None and not min_ratio >= 0:
            raise LaminaError(f"ConvBN: min_ratio must be at least 0, got {min_ratio}")
        self.mode, self.match, self.min_ratio, self.freeze_statistics = mode, match, min_ratio, freeze_statistics

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ConvBNDecision:
        """Find the pairs (torch.fx, else one batch of data) and say of every other batch norm why it stays."""
        model = bare(model)
        if self.min_ratio is not None and data is None:
            raise LaminaError("ConvBN: min_ratio compares sizes of feature maps, so it needs data: pass a batch")
        batch = None if data is None else first_batch(data)
        found = find_pairs(model, None if batch is None else [batch], self.match)
        pairs, skipped = dict(found.found), dict(found.skipped)
        for path in found.found:
            if self._trains(anatomy.get(model, path)):
                skipped[path] = "it is in training mode (call model.eval() first, or pass freeze_statistics=True)"
                del pairs[path]
        saved = {} if batch is None or not pairs else _bytes(model, batch, pairs)
        if self.min_ratio is not None:
            for path, kept in saved.copy().items():
                weight = _weight_bytes(model, pairs[path])
                ratio = (kept["eval"] - kept["tune"] + weight) / weight
                if ratio < self.min_ratio:
                    skipped[path] = f"it would save {ratio:.2f} times its folded weight, less than {self.min_ratio:g}"
                    del pairs[path], saved[path]
        if not pairs:
            why = "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3])
            raise AnatomyError(f"no batch norm of {type(model).__name__} can join the layer before it: {why}")
        return ConvBNDecision(
            tuple((layer, norm) for norm, layer in pairs.items()), skipped, self.mode, self.freeze_statistics, saved
        )

    def apply(self, model: nn.Module, decision: ConvBNDecision, lineage: Lineage) -> nn.Module:
        """Put held layers and blocks in place; the Parameters are the very same, so the lineage has nothing to say."""
        for layer_path, norm_path in decision.pairs:
            layer, norm = anatomy.get(model, layer_path), anatomy.get(model, norm_path)
            if isinstance(norm, ConvBNBlock) and _is_like(norm, decision):
                continue
            held = hold(layer)
            made = block(norm, held, decision.mode, decision.freeze_statistics)
            if isinstance(norm, ConvBNBlock) and norm.freeze_statistics and not decision.freeze_statistics:
                made.training = model.training
            if held is not layer:
                anatomy.swap(model, layer_path, held, all=True)
            anatomy.swap(model, norm_path, made, all=True)
        return model

    def _trains(self, norm: nn.Module) -> bool:
        stays = self.freeze_statistics or self.mode == "train" or isinstance(norm, ConvBNBlock)
        return norm.training and not stays


def set_mode(model: nn.Module, mode: Mode, *, freeze_statistics: bool | None = None) -> nn.Module:
    """Switch every block of a model, in place; return the model.

    Args:
        mode: "tune", "eval" or "train", see `ConvBN`; a norm's `training` still wins.
        freeze_statistics: None = as it is, but "train" lets the norms follow `model.train()` again.
    Raises:
        AnatomyError: the model has no block (rewrite it by ConvBN first).
        LaminaError: an unknown mode ("deploy" is the pass `fold`, which is one way), or "train" with frozen statistics.
    """
    _check_mode(mode, bool(freeze_statistics))
    model = bare(model)
    frozen = False if mode == "train" else freeze_statistics
    for one in _blocks(model).values():
        one.mode = mode
        if frozen is not None and frozen != one.freeze_statistics:
            one.freeze_statistics = frozen
            one.train(model.training)
    return model


def release(model: nn.Module) -> nn.Module:
    """Put ordinary convolutions and norms back in the place of every block; the way back. In place; return the model.

    A model that is saved afterwards replays the pass at load: the same function, in blocks.

    Raises:
        AnatomyError: the model has no block.
    """
    model = bare(model)
    for path, one in _blocks(model).items():
        (held,) = one.held
        layer_path = next(p for p, m in model.named_modules() if m is held)
        anatomy.swap(model, layer_path, plain(held), all=True)
        anatomy.swap(model, path, plain(one), all=True)
    return model


def activation_bytes(model: nn.Module, inputs: Tensor | Batch) -> Bytes:
    """Predict from shapes alone what each pair keeps for the backward pass, in both modes, in bytes.

    "eval": the input and the convolution's output. "tune": the input and the folded weight. An input that several
    layers read counts at the first; a pair that does not run in evaluation mode is left out.
    Nothing is computed: a copy runs on the meta device.

    Args:
        inputs: what the model is called with; only the shapes matter (`torch.empty(16, 3, 224, 224, device="meta")`).
    Raises:
        AnatomyError: no pair was found, or the model cannot run on the meta device.
    """
    model = bare(model)
    batch = {"inputs": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    pairs = find_pairs(model, [batch]).found
    if not pairs:
        raise AnatomyError(f"no batch norm of {type(model).__name__} can join the layer before it: nothing to predict")
    return _bytes(model, batch, pairs, always_meta=True)


def _bytes(model: nn.Module, batch: Batch, pairs: Mapping[str, str], *, always_meta: bool = False) -> Bytes:
    watched = {*pairs, *pairs.values()}
    try:
        links = watch(on_meta(model), to_device(batch, "meta"), watched)
    except (NotImplementedError, RuntimeError) as error:
        # The model looks at values on its way.
        if always_meta:
            raise AnatomyError(
                f"{type(model).__name__} cannot run on the meta device, where shapes are read: {error}"
            ) from error
        links = watch(model, batch, watched)
    counted: set[int] = set()
    # A head that runs in training alone (an auxiliary one) has no size in evaluation.
    return {norm: _pair_bytes(model, norm, layer, links, counted) for norm, layer in pairs.items() if norm in links}


def _pair_bytes(model: nn.Module, norm: str, layer: str, links: Links, counted: set[int]) -> dict[str, int]:
    given, made = links[layer][0].input, links[norm][0].output
    assert given is not None
    assert made is not None
    shared = 0 if id(given) in counted else given.nbytes
    counted.add(id(given))
    return {"eval": shared + made.nbytes, "tune": shared + _weight_bytes(model, layer)}


def _weight_bytes(model: nn.Module, layer: str) -> int:
    weight: Any = anatomy.get(model, layer).weight
    return int(weight.nbytes)


def _blocks(model: nn.Module) -> dict[str, ConvBNBlock]:
    found = {path: m for path, m in model.named_modules() if isinstance(m, ConvBNBlock)}
    if not found:
        raise AnatomyError(f"{type(model).__name__} has no ConvBNBlock: rewrite(model, ConvBN()) makes them")
    return found


def _is_like(one: ConvBNBlock, decision: ConvBNDecision) -> bool:
    return one.mode == decision.mode and one.freeze_statistics == decision.freeze_statistics


def _check_mode(mode: str, freeze_statistics: bool) -> None:
    if mode == "deploy":
        raise LaminaError("deploy mode cannot be left again, so it is a pass of its own: rewrite(model.eval(), Fold())")
    if mode not in MODES:
        raise LaminaError(f"mode must be one of {', '.join(MODES)}, got {mode!r}{nearest(str(mode), MODES)}")
    if mode == "train" and freeze_statistics:
        raise LaminaError("mode 'train' learns the statistics, and freeze_statistics=True keeps them: choose one")
