"""Cut a sub-network out of an elastic model: a plain model of its size, with its own batch-norm statistics.

    small = rewrite(model, Extract("smallest"), data=batches)                        # in place
    small = cut_out(model, Subnet(depth=(1, 2), expand=(2, 4, 4)), data=batches)     # a copy; the supernet stays

Source: Cai et al., Once-for-All (ICLR 2020), arXiv 1908.09791; Annavajjala et al., DepS (ECCV 2024), arXiv 2407.06167.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lamina import anatomy
from lamina.anatomy import attention_cores, get, keep_blocks
from lamina.batches import Batch
from lamina.errors import LaminaError
from lamina.lineage import Lineage
from lamina.nn.elastic import ElasticBlock, ElasticLayer, Subnet, Supernet, restored, supernet
from lamina.nn.elastic.kernels import cropped
from lamina.nn.elastic.layers import BATCH_NORMS, CONVOLUTIONS, ElasticDepthwiseConv
from lamina.registry import register
from lamina.rewrite.calibrate import Calibrate, Statistics
from lamina.rewrite.rewriting import history, rewrite

Part = Literal["smallest", "full"] | dict[str, list[float]]
CUT = frozenset({"weight", "bias", "running_mean", "running_var"})
"""What of a layer that is cut is made anew."""


@dataclass(frozen=True)
class Kept:
    """What is left of one layer; None = all."""

    makes: tuple[int, ...] | None = None
    """Channels it makes, by their old numbers."""
    reads: tuple[int, ...] | None = None
    kernel: int | None = None


@dataclass(frozen=True)
class ExtractDecision:
    """What is left of an elastic model."""

    subnet: dict[str, list[float]]
    layers: dict[str, Kept]
    """By path."""
    removed: tuple[str, ...] = ()
    """Paths of the blocks that go."""
    images: int = 0
    """Rows of data behind the statistics; 0 = the supernet's own are kept."""
    statistics: dict[str, Statistics] = field(default_factory=dict)
    """Of every batch norm, by its path in the model that is left."""

    def table(self) -> str:
        """Word the decision for people."""
        lines = [f"  {axis}: {', '.join(f'{v:g}' for v in values)}" for axis, values in self.subnet.items() if values]
        lines += [f"  goes: {path}" for path in self.removed]
        return "\n".join([*lines, f"  statistics of {len(self.statistics)} batch norms over {self.images} rows"])


@register("pass", source="Cai et al. 2020; Annavajjala et al. 2024")
class Extract:
    """Cut a sub-network out of an elastic model, in place: plain layers of its sizes, blocks that do not run are gone.

    It computes what the elastic model does while it is set to that part. Batch norms get statistics of their own, over
    the given data: those of the supernet belong to the whole, and a part with them is worth nothing.

    Args:
        config: "smallest", "full", or {depth: [...], expand: [...], kernel: [...]}; an axis left out is whole.
        images: how many rows of data the statistics are taken over, at least 1.
    Raises:
        LaminaError: the model is not elastic, or has no such part.
    Warns:
        UserWarning: there are batch norms and no data.
    Source: Once-for-All, arXiv 1908.09791, section 3.3; 2000 training images: the official code.
    Example:
        >>> from lamina.models import ResNet
        >>> from lamina.rewrite import Elastic
        >>> net = rewrite(ResNet((2, 2), (8, 16), stem="small", classes=3), Elastic(depth=(1,), expand=(0.5,)))
        >>> data = [{"pixel_values": torch.randn(4, 3, 8, 8)}]
        >>> len(rewrite(net, Extract("smallest"), data=data).stages[0])
        1
    """

    version: ClassVar[int] = 1
    preserves: ClassVar[Literal["function", "shape", "nothing"]] = "shape"

    def __init__(self, config: Part | Subnet = "smallest", *, images: int = 2000) -> None:
        if isinstance(config, str) and config not in ("smallest", "full"):
            raise LaminaError(f"Extract: config is 'smallest', 'full' or a mapping of axes to lists, got {config!r}")
        if isinstance(images, bool) or not isinstance(images, int) or images < 1:
            raise LaminaError(f"Extract: images must be a whole number, at least 1, got {images!r}")
        self.config, self.images = config, images
        # As many batches as it may look at; it stops at so many rows.
        self.batches = images

    def decide(self, model: nn.Module, data: Iterable[Batch] | None = None) -> ExtractDecision:
        """Work out what is left of every layer, and the statistics of its batch norms; change nothing."""
        net = supernet(model)
        subnet = self._subnet(net)
        decision = ExtractDecision(subnet.to_dict(), _kept(net, subnet), _removed(net, subnet))
        norms = any(getattr(m, "running_mean", None) is not None for m in net.model.modules())
        if not norms or subnet == net.full():
            return decision
        if data is None:
            warnings.warn(
                f"{type(net.model).__name__} has batch norms, and without data the part cut out of it keeps statistics "
                "of the whole, with which it predicts next to nothing: pass data, or run Calibrate on it",
                stacklevel=2,
            )
            return decision
        part = self.apply(_copy_of_tree(net.model, _tensors(net.model)), decision, Lineage())
        rows = list(_rows(data, self.images))
        found = Calibrate(max(1, len(rows))).decide(part, rows)
        images = sum(_length(b) for b in rows)
        return ExtractDecision(decision.subnet, decision.layers, decision.removed, images, found.statistics)

    def apply(self, model: nn.Module, decision: ExtractDecision, lineage: Lineage) -> nn.Module:
        """Put plain layers in place, take blocks out, write the statistics."""
        places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        for path, kept in decision.layers.items():
            _swap(model, path, sliced(get(model, path), kept, lineage), places)
        blocks = [path for path, m in model.named_modules() if isinstance(m, ElasticBlock)]
        for path in blocks:
            _swap(model, path, restored(get(model, path)), places)
        _remove(model, decision.removed)
        for path, statistics in decision.statistics.items():
            norm: Any = get(model, path)
            norm.running_mean = torch.tensor(statistics.mean, dtype=torch.float64).to(norm.running_mean)
            norm.running_var = torch.tensor(statistics.var, dtype=torch.float64).to(norm.running_var)
        return model

    def _subnet(self, net: Supernet) -> Subnet:
        if isinstance(self.config, str):
            return net.smallest() if self.config == "smallest" else net.full()
        return net.checked(self.config)


def cut_out(
    model: nn.Module,
    subnet: Subnet | Mapping[str, Any],
    data: Iterable[Batch] | None = None,
    *,
    images: int = 2000,
) -> nn.Module:
    """Return a sub-network as a plain model in evaluation mode, calibrated on the data; the elastic model stays.

    Args:
        data: training batches, for the statistics of its batch norms; not needed where there are none.
        images: how many rows of them.
    Raises:
        LaminaError: the model is not elastic, or has no such part.
    Warns:
        UserWarning: there are batch norms and no data.
    """
    net = supernet(model)
    config: Any = net.checked(subnet)
    part = _copy_of_tree(net.model, _replaced(net, config)).eval()
    return rewrite(part, Extract(config, images=images), data=data)


def _copy_of_tree(model: nn.Module, shared: Iterable[Tensor]) -> nn.Module:
    """Copy modules, config and weights, but for the tensors that shall be shared, and what the model remembers."""
    return copy.deepcopy(model, {id(x): x for x in (*shared, *history(model))})


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _replaced(net: Supernet, subnet: Subnet) -> list[Tensor]:
    """List the tensors that a part holds nothing of, or a cut with numbers of its own: no need to copy them first."""
    cut = {path for path, kept in _kept(net, subnet).items() if kept != Kept()}
    gone = tuple(f"{path}." for path in _removed(net, subnet))
    stays = set()
    for path, module in net.model.named_modules(remove_duplicate=False):
        if not f"{path}.".startswith(gone):
            own = {**module._parameters, **module._buffers}
            stays |= {id(t) for name, t in own.items() if not (path in cut and name in CUT)}
    return [t for t in _tensors(net.model) if id(t) not in stays]


def _swap(model: nn.Module, path: str, new: nn.Module, places: Mapping[int, int]) -> None:
    """Put a module in its place; the whole tree is searched for others of its places only where it has any."""
    parent, _, name = path.rpartition(".")
    if places[id(get(model, path))] > 1:
        anatomy.swap(model, path, new, all=True)
    else:
        anatomy.swap(get(model, parent), name, new)


def sliced(layer: nn.Module, kept: Kept, lineage: Lineage) -> nn.Module:
    """Return what is left of an elastic layer as a plain one, with parameters of its own where any are fewer."""
    assert isinstance(layer, ElasticLayer)
    new: Any = restored(layer)
    if kept == Kept():
        return new
    makes, reads = _index(kept.makes, layer), _index(kept.reads, layer)
    is_norm = isinstance(layer, BATCH_NORMS)
    transposed = type(layer).__name__ == "Conv1D"
    weight: Any = layer.weight
    if weight is not None:
        taken = weight.detach()
        if kept.kernel is not None and isinstance(layer, ElasticDepthwiseConv):
            taken = cropped(weight.detach(), layer.elastic_maps, layer.elastic_kernels, kept.kernel).detach()
        taken = _take(taken, makes, 1 if transposed else 0)
        taken = (
            taken if isinstance(layer, ElasticDepthwiseConv) or is_norm else _take(taken, reads, 0 if transposed else 1)
        )
        new.weight = _parameter(taken, weight, None if transposed else kept.makes, lineage)
    if getattr(layer, "bias", None) is not None:
        bias: Any = layer.bias
        new.bias = _parameter(_take(bias.detach(), makes, 0), bias, kept.makes, lineage)
    if is_norm and new.running_mean is not None:
        new.running_mean = _take(new.running_mean, makes, 0).clone()
        new.running_var = _take(new.running_var, makes, 0).clone()
    _resize(new, kept, transposed)
    return cast(nn.Module, new)


def _resize(layer: Any, kept: Kept, transposed: bool) -> None:
    """Let the layer's own numbers say its new sizes."""
    made = None if kept.makes is None else len(kept.makes)
    read = None if kept.reads is None else len(kept.reads)
    names = ("out_channels", "in_channels") if isinstance(layer, CONVOLUTIONS) else ("out_features", "in_features")
    if isinstance(layer, BATCH_NORMS):
        names = ("num_features", "num_features")
    if transposed:
        names = ("nf", "nx")
    for name, count in zip(names, (made, read), strict=True):
        if count is not None:
            setattr(layer, name, count)
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        layer.groups = layer.out_channels
    if kept.kernel is not None:
        dims = len(layer.kernel_size)
        layer.kernel_size = (kept.kernel,) * dims
        layer.padding = tuple(d * (kept.kernel // 2) for d in layer.dilation)
        layer._reversed_padding_repeated_twice = [p for p in reversed(layer.padding) for _ in range(2)]


def _kept(net: Supernet, subnet: Subnet) -> dict[str, Kept]:
    counts, sizes = net.counts(subnet), dict(zip(net.kernels, subnet.kernel, strict=True))
    found = {}
    for path, layer in net.layers.items():
        makes = _numbers(net, layer.elastic_makes, counts, layer.elastic_out_order)
        reads = _numbers(net, layer.elastic_reads, counts, layer.elastic_in_order)
        kernel = sizes.get(path)
        whole = isinstance(layer, ElasticDepthwiseConv) and kernel == layer.elastic_kernels[-1]
        found[path] = Kept(makes, reads, None if whole else kernel)
    return found


def _numbers(
    net: Supernet, group: str | None, counts: Mapping[str, int], order: Tensor | None
) -> tuple[int, ...] | None:
    if group is None or group not in counts or counts[group] == net.groups[group][1].hidden:
        return None
    return tuple(range(counts[group])) if order is None else tuple(order[: counts[group]].tolist())


def _removed(net: Supernet, subnet: Subnet) -> tuple[str, ...]:
    running = set(net.running(subnet))
    return tuple(path for path in net.blocks if path not in running)


def _remove(model: nn.Module, paths: Sequence[str]) -> None:
    """Take blocks out of their lists; those that stay get the numbers of the places where they stand now."""
    containers = dict.fromkeys(p.rpartition(".")[0] for p in paths)
    for container in containers:
        names = [f"{container}.{n}".lstrip(".") for n, _ in get(model, container).named_children()]
        left = [i for i, name in enumerate(names) if name not in paths]
        for position, i in enumerate(left):
            for core in attention_cores(model, names[i]):
                core.layer_idx = position  # type: ignore[assignment]
        keep_blocks(model, container, left)


def _take(tensor: Tensor, index: Tensor | None, dim: int) -> Tensor:
    return tensor if index is None else tensor.index_select(dim, index)


def _index(numbers: tuple[int, ...] | None, layer: nn.Module) -> Tensor | None:
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
    return None if numbers is None else torch.tensor(numbers, dtype=torch.long, device=device)


def _parameter(value: Tensor, old: Parameter, rows: tuple[int, ...] | None, lineage: Lineage) -> Parameter:
    """Make a parameter of its own; its optimizer state follows by rows where nothing else is cut."""
    own = value.clone(memory_format=torch.contiguous_format) if value.data_ptr() == old.data_ptr() else value
    new = Parameter(own.contiguous(), requires_grad=old.requires_grad)
    if new.shape[1:] == old.shape[1:] and (rows is not None or new.shape == old.shape):
        lineage.derive(new, old, None if rows is None else list(rows))
    return new


def _rows(data: Iterable[Batch], images: int) -> Iterator[Batch]:
    """Yield batches of one length until there are `images` rows: their plain average is the mean over all rows."""
    length, seen = 0, 0
    for batch in data:
        length = length or _length(batch)
        if seen >= images or _length(batch) != length:
            return
        seen += length
        yield batch


def _length(batch: Batch) -> int:
    return next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim())
