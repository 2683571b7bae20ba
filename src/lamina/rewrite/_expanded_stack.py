"""A stack of blocks that all come from two: the tensors of layer l are base + (l / depth) * slope.

The stack stands where a `ModuleList` or `Sequential` of blocks stood and behaves like it. Its layers own no tensor and
show no parts: each takes base and slope, runs its block on their sum (`torch.func.functional_call`), and forgets the
sum; what a backward pass needs of it is summed up again.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import Parameter

from lamina.optim.groups import is_norm


def interpolate(base: Mapping[str, Tensor], slope: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Return base + fraction * slope of every tensor, by name, each in its own dtype.

    Args:
        fraction: the layer's place, l / depth: 0 for the first layer, never 1.
    Source: Xia et al. (2024), arXiv 2312.05614, equation 2.
    """
    return {name: torch.add(tensor, slope[name], alpha=fraction) for name, tensor in base.items()}


class Tensors(nn.Module):
    """Holds parameters and buffers under the paths that they have in a block, and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.undecayed: tuple[str, ...] = ()
        """Names of its own parameters that take no weight decay: a norm's."""


class ExpandedLayer(nn.Module):
    """One layer of an `ExpandedStack`: runs its block with the stack's tensors at its own place in depth.

    A class made by `layer_class` is one of the block's class as well, so that what asks for that (recording of hidden
    states, checkpointing) finds it. Attributes that it lacks are the block's.
    """

    # Set past nn.Module, for they are neither its children nor its tensors.
    lamina_stack: ExpandedStack
    lamina_place: int
    lamina_block: nn.Module
    lamina_buffers: list[tuple[str, nn.Module, str]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block."""
        stack = self.lamina_stack
        tensors = stack.tensors(self.lamina_place)
        held = {name: getattr(owner, last) for name, owner, last in self.lamina_buffers}
        with stack.recomputed(tensors, self.lamina_place):
            return functional_call(self.lamina_block, {**tensors, **held}, args, kwargs, tie_weights=False)

    def train(self, mode: bool = True) -> ExpandedLayer:
        """Set the mode, of the block too."""
        super().train(mode)
        self.lamina_block.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "lamina_block" not in self.__dict__:
                raise
            return getattr(self.__dict__["lamina_block"], name)

    def __reduce__(self) -> Any:
        # The class has no place in a module to be found at.
        return _bare_layer, (type(self).__bases__[1],), self.__dict__


class ExpandedStack(nn.ModuleList):
    """Depth layers of one kind of block out of two sets of its tensors, `base` and `slope`.

    Iterates, indexes and counts its layers only; where it replaced a `Sequential` it runs them as that did.

    Args:
        base, slope: tensors by the path that they have in a block.
        blocks: one for each layer, as `without_tensors` leaves them.
        buffers: of each layer, by path; true where it is saved.
        container: what the blocks stood in, for the way back.
    """

    container: nn.ModuleList | nn.Sequential
    base: Tensors
    slope: Tensors

    def __init__(
        self,
        base: Mapping[str, Parameter],
        slope: Mapping[str, Parameter],
        blocks: Sequence[nn.Module],
        buffers: Sequence[Mapping[str, tuple[Tensor, bool]]],
        container: nn.ModuleList | nn.Sequential,
    ) -> None:
        super().__init__()
        # Past nn.Module: it is not a child.
        self.__dict__["container"] = _emptied(container)
        # torchvision calls its blocks encoder_layer_0 and so on.
        self.stem = next(iter(container._modules)).rstrip("0123456789")
        self.depth = len(blocks)
        norms = _norm_paths(blocks[0])
        self._add("base", _tree(base, norms))
        self._add("slope", _tree(slope, norms))
        trees = (self._modules["base"], self._modules["slope"])
        self._owners = [(n, _owner(trees[0], n), _owner(trees[1], n), n.rpartition(".")[2]) for n in base]
        for place, (block, held) in enumerate(zip(blocks, buffers, strict=True)):
            self._add(str(place), _layer(self, place, block, held))
        self.training = container.training

    def tensors(self, place: int) -> dict[str, Tensor]:
        """Return the tensors of one layer, by their path in the block."""
        # Reading `base` and `slope` as dictionaries would walk their trees at every call.
        fraction = place / self.depth
        return {
            name: torch.add(getattr(base, last), getattr(slope, last), alpha=fraction)
            for name, base, slope, last in self._owners
        }

    def recomputed(self, tensors: Mapping[str, Tensor], place: int) -> AbstractContextManager[Any]:
        """While this is open, autograd keeps the place instead of the layer's tensors, and sums them up when needed."""
        compiling = torch.compiler.is_compiling()
        if compiling or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors.values()):
            return nullcontext()
        # Only the innermost hooks are asked: those of a checkpoint must stay so. Transforms of torch.func allow none.
        watched = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if watched or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            return nullcontext()
        return saved_tensors_hooks(*_Recomputing(self, tensors, place).hooks())

    def holding(self, blocks: Iterable[nn.Module]) -> nn.ModuleList | nn.Sequential:
        """Return a container like the one that the stack replaced, with these blocks in it."""
        container = _emptied(self.container)
        for place, block in enumerate(blocks):
            container.add_module(f"{self.stem}{place}", block)
        return container

    def layers(self) -> list[nn.Module]:
        """List the layers, without base and slope."""
        return [self._modules[str(place)] for place in range(self.depth)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers one after the other, as a `Sequential` does."""
        if not isinstance(self.container, nn.Sequential):
            raise NotImplementedError(
                f"{type(self.container).__name__} has no forward: its layers are called one by one"
            )
        first, *others = self.layers()
        x = first(*args, **kwargs)
        for layer in others:
            x = layer(x)
        return x

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layers())

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, index: Any) -> Any:
        return self.layers()[index]

    def __dir__(self) -> list[str]:
        return list(nn.Module.__dir__(self))

    def _add(self, name: str, module: nn.Module) -> None:
        nn.Module.add_module(self, name, module)


@functools.cache
def layer_class(block: Any) -> type[ExpandedLayer]:
    """Return the class of layers that run such a block."""
    return type(f"Expanded{block.__name__}", (ExpandedLayer, block), {"__module__": __name__})


def without_tensors(block: nn.Module) -> nn.Module:
    """Copy a block's modules and plain attributes: its parameters and buffers are None, its config is the same."""
    tensors = (*block.parameters(), *block.buffers())
    shared = [getattr(m, "config", None) for m in block.modules()]
    memo: dict[int, Any] = {id(t): None for t in tensors} | {id(c): c for c in shared if c is not None}
    return copy.deepcopy(block, memo)


def with_tensors(block: nn.Module, parameters: Mapping[str, Parameter], buffers: Mapping[str, Tensor]) -> nn.Module:
    """Copy a block that `without_tensors` made and give it these, by path."""
    new = without_tensors(block)
    for name, parameter in parameters.items():
        _owner(new, name)._parameters[name.rpartition(".")[2]] = parameter
    for name, buffer in buffers.items():
        _owner(new, name)._buffers[name.rpartition(".")[2]] = buffer
    return new


def named_buffers(block: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """List a block's buffers by path, each with whether it is saved."""
    found = {}
    for path, module in block.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                saved = name not in module._non_persistent_buffers_set
                found[f"{path}.{name}".lstrip(".")] = (buffer, saved)
    return found


class _Recomputing:
    """Knows the tensors of one layer by their storage, and how to get them again."""

    def __init__(self, stack: ExpandedStack, tensors: Mapping[str, Tensor], place: int) -> None:
        self.fraction = place / stack.depth
        self.sources = {
            _storage(tensors[name]): (getattr(base, last), getattr(slope, last))
            for name, base, slope, last in stack._owners
            if tensors[name].requires_grad
        }

    def hooks(self) -> tuple[Any, Any]:
        return self.pack, self.unpack

    def pack(self, tensor: Tensor) -> Any:
        found = self.sources.get(_storage(tensor)) if tensor.layout == torch.strided else None
        if found is None:
            return tensor
        versions = found[0]._version, found[1]._version
        return found, versions, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        (base, slope), versions, view = kept
        if (base._version, slope._version) != versions:
            raise RuntimeError("base or slope of an expanded stack was changed in place between forward and backward")
        with torch.no_grad():
            return torch.add(base, slope, alpha=self.fraction).as_strided(*view)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _layer(stack: ExpandedStack, place: int, block: nn.Module, held: Mapping[str, tuple[Tensor, bool]]) -> nn.Module:
    layer = _bare_layer(type(block))
    # A forward that was set on the block (an exit after it) is called there.
    own = {*nn.Module().__dict__, "forward"}
    layer.__dict__.update({name: value for name, value in block.__dict__.items() if name not in own})
    layer.training = block.training
    owners = []
    for name, (buffer, saved) in held.items():
        path, _, last = f"held.{name}".rpartition(".")
        owner = _holder(layer, path)
        owner.register_buffer(last, buffer, persistent=saved)
        owners.append((name, owner, last))
    if getattr(block, "gradient_checkpointing", False):
        # Once is enough, and around the sum of base and slope.
        block.gradient_checkpointing = False  # type: ignore[assignment]
    layer.__dict__.update(lamina_stack=stack, lamina_place=place, lamina_block=block, lamina_buffers=owners)
    return layer


def _bare_layer(block: Any) -> nn.Module:
    made = layer_class(block)
    layer = made.__new__(made)
    nn.Module.__init__(layer)
    return layer


def _holder(root: nn.Module, path: str) -> nn.Module:
    """Return what holds the tensors at a path below `root`, made where it is missing."""
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, Tensors())
        root = root.get_submodule(name)
    return root


def _tree(tensors: Mapping[str, Parameter], norms: frozenset[str]) -> Tensors:
    tree = Tensors()
    for name, parameter in tensors.items():
        path, _, last = name.rpartition(".")
        owner = _holder(tree, path)
        owner.register_parameter(last, parameter)
        if name in norms and isinstance(owner, Tensors):
            owner.undecayed = (*owner.undecayed, last)
    return tree


def _norm_paths(block: nn.Module) -> frozenset[str]:
    """Name what no decay belongs on: a norm's parameters, and those that a module names itself."""
    found: set[str] = set()
    for path, module in block.named_modules():
        names = module._parameters if is_norm(module) else getattr(module, "undecayed", ())
        found.update(f"{path}.{n}".lstrip(".") for n in names)
    return frozenset(found)


def _owner(root: Any, name: str) -> nn.Module:
    owner: nn.Module = root.get_submodule(name.rpartition(".")[0])
    return owner


def _emptied(container: nn.ModuleList | nn.Sequential) -> nn.ModuleList | nn.Sequential:
    mould = copy.copy(container)
    mould._modules = {}
    return mould
