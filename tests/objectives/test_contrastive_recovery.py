"""The anatomy that phantoms were drawn with comes back out of a mixture that shows it only in part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data import phantoms, standardized
from lamina.objectives import WeightedContrastive, anatomical


def share_found(z: Tensor, psi: Tensor) -> float:
    """Mean R2 of a linear map from features to all measures, fitted to the first 300 rows, on the rest."""
    z = torch.cat([z, torch.ones(len(z), 1)], dim=1)
    fit, held = z[:300], z[300:]
    guess = held @ torch.linalg.solve(fit.T @ fit + torch.eye(z.shape[1]), fit.T @ psi[:300])
    return float((1 - (guess - psi[300:]).square().mean(0) / psi[300:].var(0)).mean())


@pytest.mark.parametrize(("by", "mode"), [("measure", "exp"), ("region", "threshold")])
def test_the_known_anatomy_is_recovered(by: str, mode: str) -> None:
    draw = torch.Generator().manual_seed(0)
    measures = phantoms(400, 16, scanner=0.0).measures
    psi = standardized(measures, torch.arange(300))
    # Sixty-four numbers, each a mixture of all measures, with noise.
    x = psi.flatten(1) @ torch.randn(36, 64, generator=draw) / 6 + 0.3 * torch.randn(400, 64, generator=draw)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    alike = anatomical(psi[300:], by)[~torch.eye(100, dtype=torch.bool)]  # type: ignore[arg-type]

    @torch.no_grad()
    def measured() -> tuple[float, float]:
        z = F.normalize(net(x[300:]), dim=1)
        near = (z @ z.T)[~torch.eye(100, dtype=torch.bool)]
        return share_found(net(x), psi.flatten(1)), float(torch.corrcoef(torch.stack([near, alike]))[0, 1])

    before = measured()
    objective = WeightedContrastive([{"name": "psi", "similarity": {"name": "anatomical", "by": by}}], mode)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(150):
        rows = torch.randint(300, (64,), generator=draw)
        optimizer.zero_grad()
        objective(net, {"inputs": x[rows], "psi": psi[rows]})["loss"].backward()
        optimizer.step()
    after = measured()
    assert before[0] < 0.55
    assert after[0] > 0.65
    assert after[1] > before[1] + 0.2
