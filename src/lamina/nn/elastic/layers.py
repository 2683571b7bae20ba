"""Linear layers, convolutions and batch norms of which some channels run: the first ones of an order.

Nothing is moved and nothing is renamed: a layer that runs in part takes rows and columns of the very same weight, so
the optimizer and the checkpoint notice nothing, and what does not run receives a gradient of exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.nn.elastic.kernels import cropped, identity_maps
from lamina.nn.elastic.reclass import Reclassed, plain_class, reclassed

Mode = Literal["slice", "mask"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ElasticLayer(Reclassed, nn.Module):
    """What the elastic layers share: the groups of channels they read and make, and how many of them run now."""

    weight: Any
    bias: Any
    elastic_reads: str | None
    """Id of the group of channels it reads; None = all, always."""
    elastic_makes: str | None
    """Id of the group it makes; a norm and a depthwise convolution make what they read."""
    elastic_in: int | None
    """How many channels it reads now; None = all."""
    elastic_out: int | None
    elastic_in_order: Tensor | None
    """Which channels come first, (channels,); None = in the order they stand in."""
    elastic_out_order: Tensor | None
    elastic_in_mask: Tensor | None
    """Which channels count (mode "mask"), (channels,)."""

    def masked(self, x: Tensor, dim: int) -> Tensor:
        """Set channels that do not run to zero (mode "mask")."""
        if self.elastic_in_mask is None:
            return x
        shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
        return torch.where(self.elastic_in_mask.view(shape), x, 0)

    def part(self, weight: Tensor, bias: Tensor | None, out_dim: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the rows and columns that run."""
        weight = first(weight, out_dim, self.elastic_out_order, self.elastic_out)
        weight = first(weight, 1 - out_dim, self.elastic_in_order, self.elastic_in)
        return weight, None if bias is None else first(bias, 0, self.elastic_out_order, self.elastic_out)


class ElasticLinear(ElasticLayer):
    """A linear layer in part: x (..., channels that run) -> (..., channels that run)."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the rows and columns that run."""
        return F.linear(self.masked(input, -1), *self.part(self.weight, self.bias))


class ElasticTransposedLinear(ElasticLayer):
    """GPT-2's Conv1D in part: its weight is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the rows and columns that run."""
        weight, bias = self.part(self.weight, self.bias, out_dim=1)
        return F.linear(self.masked(x, -1), weight.T, bias)


class ElasticConv(ElasticLayer):
    """A convolution of one group in part."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the rows and columns that run."""
        weight, bias = self.part(self.weight, self.bias)
        result: Tensor = self._conv_forward(self.masked(input, 1), weight, bias)  # type: ignore[operator]
        return result


class ElasticDepthwiseConv(ElasticLayer):
    """A depthwise convolution in part: fewer channels, and a smaller kernel cut out of the middle of the large one.

    Each step to a smaller kernel has a linear map of its taps (`elastic_maps`, the identity at first).
    Source: Cai et al., Once-for-All (2020), arXiv 1908.09791, section 3.3.
    """

    kernel_size: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    elastic_maps: nn.ParameterList
    elastic_kernels: tuple[int, ...]
    """Sizes it can have, the smallest first; one = always the same."""
    elastic_kernel: int | None
    """The size it has now; None = the whole kernel."""
    elastic_kernel_limit: Tensor | None
    """The same as a number on the device (mode "mask")."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve every channel that runs."""
        weight = first(self.kernel(), 0, self.elastic_out_order, self.elastic_out)
        bias = None if self.bias is None else first(self.bias, 0, self.elastic_out_order, self.elastic_out)
        padding = self.padding
        if self.elastic_kernel is not None:
            padding = tuple(d * (self.elastic_kernel // 2) for d in self.dilation)
        function: Any = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]
        result: Tensor = function(input, weight, bias, self.stride, padding, self.dilation, len(weight))
        return result

    def kernel(self) -> Tensor:
        """Return the kernel of the size it has now, of all channels."""
        weight: Tensor = self.weight
        sizes, maps = self.elastic_kernels, self.elastic_maps
        if len(sizes) == 1:
            return weight
        if self.elastic_kernel_limit is not None:
            return self._chosen(self.elastic_kernel_limit)
        if self.elastic_kernel is not None:
            return cropped(weight, maps, sizes, self.elastic_kernel)
        # Nothing is added: but every map has a gradient, of zero, which data parallelism waits for.
        return weight + sum(m.sum() * 0 for m in maps) if torch.is_grad_enabled() else weight

    def _chosen(self, limit: Tensor) -> Tensor:
        """Return the kernel at the whole size, zero outside of the size it has now: shapes never change."""
        result: Tensor = self.weight
        for size in self.elastic_kernels[-2::-1]:
            small = cropped(self.weight, self.elastic_maps, self.elastic_kernels, size)
            edge = (self.kernel_size[0] - size) // 2
            padded = F.pad(small, [edge] * (2 * len(self.kernel_size)))
            result = torch.where(limit <= size, padded, result)
        return result


class ElasticBatchNorm(ElasticLayer):
    """A batch norm in part; its running statistics follow only those channels that run."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the channels that run."""
        norm: Any = self
        if self.elastic_out is None:
            whole: Tensor = super().forward(input)
            return whole
        order, count = self.elastic_out_order, self.elastic_out
        weight, bias, mean, var = (
            None if t is None else first(t, 0, order, count)
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        follows = norm.training and norm.track_running_stats
        factor = 0.0 if norm.momentum is None else norm.momentum
        if follows and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            factor = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else factor
        by_batch = norm.training or mean is None
        used = (mean, var) if not norm.training or norm.track_running_stats else (None, None)
        result = F.batch_norm(input, *used, weight, bias, by_batch, factor, norm.eps)
        if follows and mean is not None and order is not None:
            norm.running_mean.index_copy_(0, order[:count], mean)
            norm.running_var.index_copy_(0, order[:count], var)
        return result


def first(tensor: Tensor, dim: int, order: Tensor | None, count: int | None) -> Tensor:
    """Return the first `count` channels of an order along one dimension; None = all of them as they stand."""
    if count is None:
        return tensor
    return tensor.narrow(dim, 0, count) if order is None else tensor.index_select(dim, order[:count])


def layer_kind(module: nn.Module) -> type[ElasticLayer] | None:
    """Return what makes a layer elastic; None where nothing does (another class, grouped, several channels each)."""
    cls = plain_class(module)
    if cls is nn.Linear:
        return ElasticLinear
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return ElasticTransposedLinear
    if cls in BATCH_NORMS:
        return ElasticBatchNorm
    if cls not in CONVOLUTIONS or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    if module.groups == 1:
        return ElasticConv
    depthwise = module.groups == module.in_channels == module.out_channels
    return ElasticDepthwiseConv if depthwise else None


def elastic_layer(
    module: nn.Module,
    *,
    reads: str | None = None,
    makes: str | None = None,
    in_order: Sequence[int] | None = None,
    out_order: Sequence[int] | None = None,
    kernels: Sequence[int] | None = None,
) -> ElasticLayer:
    """Return the layer as one that runs in part, sharing its parameters; for now it runs whole.

    Args:
        reads, makes: ids of the groups of channels before and behind it.
        in_order, out_order: which of their channels come first.
        kernels: sizes of a depthwise convolution's kernel, the smallest first.
    """
    over = layer_kind(module)
    assert over is not None
    new: Any = reclassed(module, over)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    new.elastic_reads, new.elastic_makes = reads, makes
    new.elastic_in = new.elastic_out = None
    for name, order in (("elastic_in_order", in_order), ("elastic_out_order", out_order)):
        value = None if order is None else torch.tensor(list(order), dtype=torch.long, device=device)
        new.register_buffer(name, value, persistent=False)
    new.register_buffer("elastic_in_mask", None, persistent=False)
    if over is ElasticDepthwiseConv:
        sizes = (int(new.kernel_size[0]),) if kernels is None else tuple(kernels)
        if sizes != getattr(module, "elastic_kernels", None):
            new.elastic_maps = identity_maps(sizes, new.weight)
        new.elastic_kernels, new.elastic_kernel = sizes, None
        new.register_buffer("elastic_kernel_limit", None, persistent=False)
    assert isinstance(new, ElasticLayer)
    return new
