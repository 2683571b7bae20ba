"""What stands where a convolution and its batch norm were, so that both compute as one and every name stays.

The convolution's place is taken by a layer that owns its parameters and hands its input on; the norm's by a block
that owns the norm's parameters and statistics and computes both. Both are still what they were by type
(`isinstance(block, nn.BatchNorm2d)`), so loops that freeze norms, groups without decay and initialisers find them.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lamina.nn import TokenBatchNorm
from lamina.rewrite._folding import fold_dtype, fold_into_producer, norm_scale_and_shift

Mode = Literal["tune", "eval", "train"]


class HeldConv(nn.Module):
    """Owns a convolution's parameters under their old names; called, it returns its input unchanged."""

    plain: ClassVar[type[nn.Module]]
    """The class it was."""

    def forward(self, input: Tensor) -> Tensor:
        """Hand the input on: the block behind computes."""
        return input

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer with these parameters."""
        return self._conv_forward(input, weight, bias)  # type: ignore[operator]


class HeldConv1d(HeldConv, nn.Conv1d):
    """See `HeldConv`."""

    plain = nn.Conv1d


class HeldConv2d(HeldConv, nn.Conv2d):
    """See `HeldConv`."""

    plain = nn.Conv2d


class HeldConv3d(HeldConv, nn.Conv3d):
    """See `HeldConv`."""

    plain = nn.Conv3d


class _HeldTransposed(HeldConv):
    function: ClassVar[Any]

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return type(self).function(input, weight, bias, *options)


class HeldConvTranspose1d(_HeldTransposed, nn.ConvTranspose1d):  # type: ignore[misc]
    """See `HeldConv`."""

    plain, function = nn.ConvTranspose1d, staticmethod(F.conv_transpose1d)


class HeldConvTranspose2d(_HeldTransposed, nn.ConvTranspose2d):  # type: ignore[misc]
    """See `HeldConv`."""

    plain, function = nn.ConvTranspose2d, staticmethod(F.conv_transpose2d)


class HeldConvTranspose3d(_HeldTransposed, nn.ConvTranspose3d):  # type: ignore[misc]
    """See `HeldConv`."""

    plain, function = nn.ConvTranspose3d, staticmethod(F.conv_transpose3d)


class HeldLinear(HeldConv, nn.Linear):
    """See `HeldConv`; of a linear layer."""

    plain = nn.Linear

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer with these parameters."""
        return F.linear(input, weight, bias)


class ConvBNBlock(nn.Module):
    """Owns a batch norm's parameters and statistics under their old names; computes the layer before it, then the norm.

    While `training` is True, and in the modes "train" and "eval": one after the other, as before. Else, in mode
    "tune", as one: the norm is folded into the layer's weight at every call (never kept), in float32 or better.
    x is the layer's input.
    """

    channels_last: ClassVar[bool] = False
    plain: ClassVar[type[nn.Module]]
    """The class it was."""
    held: tuple[HeldConv]
    """The layer: in a tuple, so that it is no child here and its parameters are listed once, at its own path."""
    mode: Mode
    freeze_statistics: bool
    """True: `train()` leaves `training` False."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, ...) -> (B, C, ...): convolution and norm."""
        (layer,) = self.held
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        # A linear layer's features are the norm's channels in a batch of rows alone; anything else runs as it stands.
        folds = input.dim() == weight.dim() or self.channels_last
        if self.training or self.mode != "tune" or not folds:
            return super().forward(layer.compute(input, weight, bias))
        return layer.compute(input, *folded(layer, self, weight, bias))

    def train(self, mode: bool = True) -> Any:
        """Set the training mode, unless the statistics are frozen."""
        return super().train(mode and not self.freeze_statistics)

    def extra_repr(self) -> str:
        """Show the norm, the layer and the mode."""
        (layer,) = self.held
        frozen = ", freeze_statistics=True" if self.freeze_statistics else ""
        return f"{super().extra_repr()}, mode={self.mode!r}{frozen}, held={layer.plain.__name__}({layer.extra_repr()})"


class ConvBNBlock1d(ConvBNBlock, nn.BatchNorm1d):
    """See `ConvBNBlock`."""

    plain = nn.BatchNorm1d


class ConvBNBlock2d(ConvBNBlock, nn.BatchNorm2d):
    """See `ConvBNBlock`."""

    plain = nn.BatchNorm2d


class ConvBNBlock3d(ConvBNBlock, nn.BatchNorm3d):
    """See `ConvBNBlock`."""

    plain = nn.BatchNorm3d


class ConvBNBlockSync(ConvBNBlock, nn.SyncBatchNorm):
    """See `ConvBNBlock`; statistics of all processes while training."""

    plain = nn.SyncBatchNorm


class ConvBNBlockToken(ConvBNBlock, TokenBatchNorm):
    """See `ConvBNBlock`; channels last."""

    channels_last, plain = True, TokenBatchNorm


LAYERS: dict[type[nn.Module], type[HeldConv]] = {
    nn.Conv1d: HeldConv1d,
    nn.Conv2d: HeldConv2d,
    nn.Conv3d: HeldConv3d,
    nn.ConvTranspose1d: HeldConvTranspose1d,
    nn.ConvTranspose2d: HeldConvTranspose2d,
    nn.ConvTranspose3d: HeldConvTranspose3d,
    nn.Linear: HeldLinear,
}
"""Layers that a norm folds into; exact types, as a subclass may compute something else."""

NORMS: dict[type[nn.Module], type[ConvBNBlock]] = {
    nn.BatchNorm1d: ConvBNBlock1d,
    nn.BatchNorm2d: ConvBNBlock2d,
    nn.BatchNorm3d: ConvBNBlock3d,
    nn.SyncBatchNorm: ConvBNBlockSync,
    TokenBatchNorm: ConvBNBlockToken,
}
"""Norms that fold; exact types."""


def folded(layer: nn.Module, norm: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (weight, bias) of the layer with the norm behind it folded in, in the weight's dtype; differentiable."""
    dtype = fold_dtype(weight, norm.running_var)
    scale, shift = norm_scale_and_shift(norm, dtype)
    new, moved = fold_into_producer(
        weight, bias, scale, shift, transposed=is_transposed(layer), groups=getattr(layer, "groups", 1)
    )
    return new.to(weight.dtype), moved.to(weight.dtype)


def is_transposed(layer: nn.Module) -> bool:
    """Tell a layer whose output channels are dimension 1 of its weight."""
    return bool(getattr(layer, "transposed", False))


def hold(layer: nn.Module) -> HeldConv:
    """Make the module that takes a layer's place; the Parameters are the very same."""
    held = layer if isinstance(layer, HeldConv) else _remade(layer, LAYERS[type(layer)])
    assert isinstance(held, HeldConv)
    return held


def block(norm: nn.Module, held: HeldConv, mode: Mode, freeze_statistics: bool) -> ConvBNBlock:
    """Make the block that takes a norm's (or another block's) place; parameters and buffers are the very same."""
    made = _remade(norm, type(norm) if isinstance(norm, ConvBNBlock) else NORMS[type(norm)])
    assert isinstance(made, ConvBNBlock)
    made.held, made.mode, made.freeze_statistics = (held,), mode, freeze_statistics
    if freeze_statistics:
        made.training = False
    return made


def plain(module: nn.Module) -> nn.Module:
    """Make the ordinary layer or norm out of a held layer or a block; the Parameters are the very same."""
    assert isinstance(module, (HeldConv, ConvBNBlock))
    made = _remade(module, module.plain)
    for name in ("held", "mode", "freeze_statistics"):
        vars(made).pop(name, None)
    return made


def _remade(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return the module under another class, with tables of its own for the very same tensors."""
    made = copy.copy(module)
    made.__class__ = kind
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    return made
