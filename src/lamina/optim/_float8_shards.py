"""Quantised moments of sharded parameters, and moments as plain tensors: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from lamina.errors import LaminaError
from lamina.optim._layerwise import local
from lamina.optim.dynamic_range import Coding, QuantizedTensor, encode

MOMENTS = ("exp_avg", "exp_avg_sq")


def like_parameter(moment: Tensor, parameter: Tensor, *, check_only: bool = False) -> Tensor:
    """Return the moment of this process's shard as a tensor placed like the parameter.

    Raises:
        LaminaError: the parameter is sharded over columns, or over two dimensions of a mesh.
    """
    if not isinstance(parameter, DTensor):
        return moment
    sharded = [p for p in parameter.placements if not p.is_replicate()]
    if len(sharded) > 1 or any(type(p) is not Shard or p.dim != 0 for p in sharded):
        raise LaminaError(
            f"Float8AdamW takes parameters sharded by rows over one dimension of a mesh, got {parameter.placements}"
        )
    return moment if check_only else _placed(moment, parameter, parameter.shape, parameter.stride())


def flattened(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state with each quantised moment as its parts; scales as (shards, groups of a shard)."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        kept = local(value) if isinstance(value, Tensor) else value
        if not isinstance(kept, QuantizedTensor):
            result[name] = value
            continue
        for part, stored in kept.parts().items():
            if not isinstance(value, DTensor):
                result[f"{name}.{part}"] = stored if part == "codes" else stored[None]
            elif part == "codes":
                result[f"{name}.{part}"] = _placed(stored, value, value.shape, value.stride())
            else:
                shards, groups = _grid(value, kept.coding)
                row = F.pad(stored, (0, groups - len(stored)))[None]
                result[f"{name}.{part}"] = _placed(row, value, torch.Size((shards, groups)), (groups, 1))
    return result


def assembled(state: Mapping[str, Any], parameter: Tensor, codings: Mapping[str, Coding]) -> dict[str, Any]:
    """Undo `flattened` for a parameter; the tensors are copies.

    Codes come back bit for bit, unless the parameter is sharded otherwise than it was: then they are quantised anew.
    """
    result: dict[str, Any] = {}
    for name, value in state.items():
        moment, _, part = name.partition(".")
        if part == "codes":
            others = [state.get(f"{moment}.{p}") for p in ("scale", "k", "center")]
            coding = codings[moment]
            if others[0] is None or (others[1] is None) == coding.expand or value.dtype != coding.dtype:
                raise LaminaError(
                    f"the state's {moment} ({value.dtype}, with {'an' if others[1] is not None else 'no'} exponent) "
                    f"was saved under other options than this Float8AdamW has ({coding})"
                )
            result[moment] = like_parameter(_assembled(value, others, parameter, coding), parameter)
        elif moment not in codings or not part:
            result[name] = value.detach().clone() if isinstance(value, Tensor) else value
            if name == "step":
                result[name] = torch.as_tensor(value, dtype=torch.float32, device="cpu").clone()
    return result


def _assembled(codes: Tensor, others: list[Tensor | None], parameter: Tensor, coding: Coding) -> QuantizedTensor:
    tables = [None if t is None else (t.full_tensor() if isinstance(t, DTensor) else t) for t in others]
    scale = tables[0]
    assert scale is not None
    device = parameter.device
    if scale.shape == _grid(parameter, coding):
        mine = _own(parameter, codes)
        count = -(-mine.numel() // coding.group_size)
        row = _index(parameter)
        rows = [None if t is None else t[row, :count].to(device, copy=True) for t in tables]
        return QuantizedTensor(mine.to(device, copy=True).contiguous(), rows[0], rows[1], rows[2], coding)  # type: ignore[arg-type]
    # Another number of shards: each of the old ones had groups of its own.
    whole = codes
    if isinstance(codes, DTensor):
        whole = _own_view(codes).full_tensor().view(coding.dtype)
    wide = torch.cat([
        QuantizedTensor(  # type: ignore[call-arg]
            part.contiguous(),
            *(None if t is None else t[i, : -(-part.numel() // coding.group_size)] for t in tables),  # type: ignore[arg-type]
            coding,
        ).dequantize()
        for i, part in enumerate(whole.chunk(scale.shape[0]))
    ])  # fmt: skip
    return encode(_own(parameter, wide.to(device)), coding)


def _own(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return this process's rows of a tensor shaped like the parameter."""
    if isinstance(whole, DTensor):
        return whole.to_local()
    if not isinstance(parameter, DTensor):
        return whole
    if whole.dtype.itemsize == 1:
        return _own(parameter, whole.view(torch.uint8)).view(whole.dtype)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def _own_view(codes: DTensor) -> DTensor:
    """Return codes as bytes: what collectives take."""
    return _placed(codes.to_local().view(torch.uint8), codes, codes.shape, codes.stride())


def _placed(part: Tensor, like: DTensor, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def _grid(tensor: Tensor, coding: Coding) -> tuple[int, int]:
    """Return the number of shards, and of groups in the largest of them."""
    if not isinstance(tensor, DTensor):
        return 1, -(-tensor.numel() // coding.group_size)
    shards = 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard():
            shards = tensor.device_mesh.size(dimension)
    rows = -(-tensor.shape[0] // shards)
    return shards, -(-rows * (tensor.numel() // tensor.shape[0]) // coding.group_size)


def _index(tensor: Tensor) -> int:
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_shard():
                return int(tensor.device_mesh.get_local_rank(dimension))
    return 0
