"""A radiance field as a model: rays in, colours out.

Source: Mildenhall et al., NeRF (2020), arXiv 2003.08934; Fang et al. (AAAI 2023), arXiv 2211.15977.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data.scenes import RADIUS, VIEW, looking_at_middle, rays_of
from lamina.errors import LaminaError
from lamina.nn.fields import OccupancyGrid, VolumeRenderer
from lamina.nn.fields.render import check_rays
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("model", source="Mildenhall et al., NeRF (2020), arXiv 2003.08934")
class RadianceField(nn.Module):
    """A field of any representation and the renderer that looks at it.

    origins (N, 3), directions (N, 3) of any length -> rgb (N, 3) in 0..1, float32; safe under autocast. From
    photographs it is trained by `regression` on their pixels (`scenes` with views="photographs"), from another field by
    `volume_distillation`; `convert_field` replaces the field.

    Args:
        field: hash_field, mlp_field, low_rank_field, grid_field, or any module with `bound`, `geometry` and `color`.
        samples: points a ray.
        background: "white", "black", or "random" (a colour a ray).
        jitter: in training, draw each point within its piece of the ray.
        occupancy: cells a side of a grid that says where something is, kept with the weights; None = all is asked.
            `update_occupancy` looks anew; until then every cell is occupied.
    Raises:
        LaminaError: no sample, or a field for pictures (dim 2). ShapeError: (at the call) no rays.
    Example:
        >>> model = RadianceField({"name": "grid_field", "resolution": 4}, samples=8)
        >>> model(torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]])).shape
        torch.Size([1, 3])
    """

    occupancy: OccupancyGrid | None

    def __init__(
        self,
        field: Annotated[nn.Module | Node, Slot("field")] = "hash_field",
        *,
        samples: int = 128,
        background: Literal["white", "black", "random"] = "white",
        jitter: bool = True,
        occupancy: int | None = None,
    ) -> None:
        super().__init__()
        self.field: nn.Module = field if isinstance(field, nn.Module) else factory("field", field)()
        if getattr(self.field, "dim", 3) != 3:
            raise LaminaError("a radiance field is looked at along rays in space: its field needs dim 3")
        self.renderer = VolumeRenderer(samples, background, jitter=jitter)
        bound: Any = self.field.bound
        self.occupancy = None if occupancy is None else OccupancyGrid(occupancy, bound=bound)

    def forward(self, origins: Tensor, directions: Tensor) -> Tensor:
        """Return what is seen along the rays."""
        check_rays(origins, directions, unit=False)
        directions = F.normalize(directions, dim=1)
        color: Tensor = self.renderer(self.field, origins, directions, self.occupancy).color
        return color

    @torch.no_grad()
    def update_occupancy(self, threshold: float = 1.0) -> float:
        """Look where the field is denser than the threshold; return the share of cells that hold something.

        Raises:
            LaminaError: the model was built without an occupancy grid.
        """
        if self.occupancy is None:
            raise LaminaError("the model has no occupancy grid: build it with occupancy=128 (cells a side)")
        return self.occupancy.update(self.field, threshold).share

    def pictures(self) -> dict[str, Tensor]:
        """Return what a report shows of the model: name -> (H, W, 3)."""
        return {"a turn round the scene": turntable(self)}


@torch.no_grad()
def turntable(model: nn.Module, count: int = 8, size: int = 64, elevation: float = 25.0) -> Tensor:
    """Return views from all round, side by side: (size, count * size, 3).

    Args:
        model: origins (N, 3), unit directions (N, 3) -> rgb (N, 3), such as a `RadianceField`; its mode is kept.
        count: views, at equal angles.
        size: pixels a side of each.
        elevation: of the cameras, in degrees; they stand as far away as those of `scenes`.
    """
    bound = float(getattr(getattr(model, "field", None), "bound", 1.0))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    line, focal = torch.arange(size) + 0.5, 0.5 * size / math.tan(0.5 * VIEW)
    pixels = torch.stack([line.repeat(size), line.repeat_interleave(size)], dim=1)
    was_training = model.training
    model.eval()
    views = []
    for i in range(count):
        camera = looking_at_middle(360 * i / count, elevation, RADIUS * bound).expand(len(pixels), 4, 4)
        rays = rays_of(camera, pixels, (size, size), focal)
        views.append(model(rays["origins"].to(device), rays["directions"].to(device)).view(size, size, 3))
    model.train(was_training)
    return torch.cat(views, dim=1)
