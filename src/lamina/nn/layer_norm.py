"""Layer normalisation: torch's own, its literal formula, the form for maps, and the norms of the comparison.

The recurrent nets of the same paper are in `layer_norm_recurrent`. Every norm here is built as `norm(width)`.
Source: Ba, Kiros, Hinton, Layer Normalization (2016), arXiv 1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.registry import register

SOURCE = "Ba, Kiros, Hinton, Layer Normalization (2016), arXiv 1607.06450"

LayerNorm = register("norm", "layer_norm", source=SOURCE)(nn.LayerNorm)
"""torch's own layer normalisation over the last dimension, (..., width) -> same."""

RMSNorm = register("norm", "rms_norm", source="torch.nn.RMSNorm; Zhang, Sennrich (2019), arXiv 1910.07467")(nn.RMSNorm)
"""torch's own root-mean-square norm over the last dimension: no mean, no shift."""


@register("norm", source=SOURCE)
class ChannelLayerNorm(nn.GroupNorm):
    """Layer normalisation of maps: statistics of one example over channels and all positions.

    For convolutional nets that must not look at the batch. x (B, C, ...) -> same, with one gain and one shift
    per channel: `torch.nn.GroupNorm` with a single group, so parameters and numerics are torch's.

    Args:
        num_channels: C, at least 1.
        eps: added to the variance, inside the root.
    Raises:
        ShapeError: num_channels below 1; at the call, x without a channel dimension of that size.
    Source: section 6.7 (convolutional networks), arXiv 1607.06450. The paper finds batch norm better there.
    Example:
        >>> ChannelLayerNorm(3)(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        if num_channels < 1:
            raise ShapeError(f"ChannelLayerNorm needs at least one channel, got num_channels={num_channels}")
        super().__init__(1, num_channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each example over everything but the batch."""
        if input.dim() < 2 or input.shape[1] != self.num_channels:
            raise ShapeError(f"ChannelLayerNorm({self.num_channels}) expects (B, C, ...), got {tuple(input.shape)}")
        return super().forward(input)

    def extra_repr(self) -> str:
        """Say the size, without the group that is always one."""
        return f"{self.num_channels}, eps={self.eps}"


@register("norm", "batch_norm", source="torch.nn.BatchNorm1d; Ioffe, Szegedy (2015), arXiv 1502.03167")
class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation in a slot meant for layer normalisation: features last, statistics over all tokens.

    x (..., width) -> same. Parameters, buffers and `state_dict` are `torch.nn.BatchNorm1d`'s, which itself reads
    (B, width, T) and so cannot stand where a transformer puts its norm. Padded tokens are counted like any other.

    Raises:
        ShapeError: the last dimension is not num_features.
    Example:
        >>> TokenBatchNorm(8)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise every feature over all leading dimensions."""
        if input.dim() < 2 or input.shape[-1] != self.num_features:
            raise ShapeError(f"TokenBatchNorm({self.num_features}) expects (..., width), got {tuple(input.shape)}")
        return super().forward(input.reshape(-1, self.num_features)).view(input.shape)


def layer_norm_reference(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    eps_outside: bool = False,
) -> Tensor:
    """Compute layer normalisation by the letter: weight * (x - mean) / sqrt(var + eps) + bias.

    The truth that tests hold the fast paths against; two passes (never E[x^2] - mean^2), float32 inside for
    half precision. x (..., *normalized_shape) -> same shape and dtype.

    Args:
        eps_outside: divide by std + eps, as the authors' Torch7 file does.
    Raises:
        ShapeError: the trailing dimensions are not normalized_shape, or one number is normalised without gain
            and shift (the result could only be zero).
        TypeError: x is not floating point.
    Source: equation 3, arXiv 1607.06450.
    """
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ShapeError(f"layer norm over {shape} needs x of shape (..., *{shape}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"layer norm needs a floating-point x, got {x.dtype}")
    if torch.Size(shape).numel() <= 1 and weight is None and bias is None:
        raise ShapeError(f"layer norm over {shape} without gain and shift is always zero: give more than one unit")
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = tuple(range(-len(shape), 0))
    centred = wide - wide.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    result = centred / (variance.sqrt() + eps if eps_outside else (variance + eps).sqrt())
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result.to(x.dtype)
