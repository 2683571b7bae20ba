"""Give a module another forward while it stays what it was: same parameters, same names, same type to `isinstance`."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

from torch import nn

M = TypeVar("M", bound="Reclassed")


class Reclassed:
    """Base of what is put over a module's own class; see `reclassed`."""

    plain: type[nn.Module]
    """The class it was."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the two classes it is made of: the joint one has no name that could be imported."""
        return _blank, (_layer_over(type(self)), plain_class(self)), self.__dict__


def reclassed(module: nn.Module, over: type[M]) -> M:
    """Return the module anew, with `over` before its own class; children and tensors are shared, nothing is copied."""
    new = _blank(over, plain_class(module))
    new.__dict__.update(module.__dict__)
    _own_tables(new)
    return cast(M, new)


def restored(module: nn.Module) -> nn.Module:
    """Return a reclassed module as one of its own class, without what was added to its attributes."""
    cls = plain_class(module)
    new = cls.__new__(cls)
    new.__dict__.update({k: v for k, v in module.__dict__.items() if not k.startswith("elastic_")})
    _own_tables(new)
    new._buffers = {k: v for k, v in new._buffers.items() if not k.startswith("elastic_")}
    new._parameters = {k: v for k, v in new._parameters.items() if not k.startswith("elastic_")}
    new._modules = {k: v for k, v in new._modules.items() if not k.startswith("elastic_")}
    new._non_persistent_buffers_set = {k for k in new._non_persistent_buffers_set if not k.startswith("elastic_")}
    return new


def plain_class(module: Any) -> type[nn.Module]:
    """Return the class a module is, or was before it was reclassed."""
    return module.plain if isinstance(module, Reclassed) else type(module)


def _own_tables(module: nn.Module) -> None:
    """Let a module that shares another's attributes have tables of its own."""
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(module, name, dict(getattr(module, name)))
    module._non_persistent_buffers_set = set(module._non_persistent_buffers_set)


def _blank(over: type[Any], plain: type[nn.Module]) -> nn.Module:
    joint: Any = _joint
    cls = joint(over, plain)
    new: nn.Module = cls.__new__(cls)
    return new


@functools.cache
def _joint(over: Any, plain: Any) -> Any:
    # The old name: some models are known by their classes' names. Not the old module: tracers take torch.nn as known.
    return type(plain.__name__, (over, plain), {"__module__": over.__module__, "plain": plain, "over": over})


def _layer_over(cls: type[Any]) -> type[Any]:
    return cast(type[Any], cls.over)
