"""What the tests of passes about batch norms share: nets whose norms have something to say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamina.models import ResNet


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_statistics(model: nn.Module) -> nn.Module:
    """Give every norm the statistics, gains and shifts of a net that was trained for a while."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.3, 3.0, generator=generator)
            if norm.affine:
                norm.weight.uniform_(-1.5, 1.5, generator=generator)
                norm.bias.normal_(generator=generator)
    return model


def small() -> nn.Module:
    return with_statistics(ResNet((1, 1), (8, 12), stem="small", classes=3))


def images() -> dict[str, Tensor]:
    return {"pixel_values": drawn(2, 3, 8, 8)}
