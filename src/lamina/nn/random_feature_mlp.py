"""One hidden layer of frozen random weights with trained outputs: the baseline of random-feature attention, and a head.

Source: Rahimi, Recht, Random Features for Large-Scale Kernel Machines (2007); as in Fu et al. (2023), arXiv 2307.11353.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.nn._inputs import check_features
from lamina.nn.random_feature_readout import Penalty, RandomFeatureReadout, refuse_non_finite
from lamina.registry import register


class MLPFeatures(nn.Module):
    """relu(<w_m, (x, 1)>) for frozen w_m: x (..., in_features) -> (..., num_features)."""

    weight: Tensor

    def __init__(self, in_features: int, num_features: int, weight_scale: float, seed: int) -> None:
        super().__init__()
        # The same numbers on every device and in every dtype; under torch.device("meta") a generator has none to give.
        here, generator = torch.empty(0).device, torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(num_features, in_features + 1, generator=generator, dtype=torch.float64, device="cpu")
        drawn *= weight_scale / math.sqrt(in_features)
        self.register_buffer("weight", drawn.to(here, torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        check_features("RandomFeatureMLP", x, self.weight.shape[1] - 1)
        refuse_non_finite("RandomFeatureMLP", x)
        return F.relu(F.linear(x, self.weight[:, :-1], self.weight[:, -1]))


@register("layer", source="Fu et al., What can a Single Attention Layer Learn? (2023), arXiv 2307.11353, RFMLP")
class RandomFeatureMLP(RandomFeatureReadout):
    """Two-layer network of which only the outputs are learned; for `nn.Linear(in_features, out_features)`.

    A nonlinear head without a learning rate: `fit` (or `fit_readout` inside a model) solves for the values in closed
    form; they train by gradients as well. Zero until then, so it belongs at the end of a network, not inside.
    x (..., in_features) -> (..., out_features), in the dtype of the values.

    Args:
        num_features: M of the hidden layer.
        weight_scale: deviation of the frozen weights times sqrt(in_features); for x of norm 1 try 1, 2, 4, 8.
        seed: of the frozen weights.
    Raises:
        LaminaError: a size below 1, a scale that is not above 0, (at the call) NaN or infinity.
        ShapeError: (at the call) another width, no floating-point numbers.
    Source: arXiv 2307.11353, random-feature MLP. out_features comes second, as in torch's linear layer.
    Example:
        >>> head, x = RandomFeatureMLP(3, num_features=64), torch.randn(200, 3)
        >>> penalty = head.fit(x, x[:, 0] * x[:, 1])
        >>> head(x).shape
        torch.Size([200, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        num_features: int = 1024,
        *,
        weight_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        if in_features < 1 or num_features < 1:
            raise LaminaError(
                f"RandomFeatureMLP needs in_features and num_features of at least 1, got {in_features}, {num_features}"
            )
        if not 0 < weight_scale < math.inf:
            raise LaminaError(f"weight_scale must be above 0 and finite, got {weight_scale}")
        super().__init__(MLPFeatures(in_features, num_features, weight_scale, seed), (num_features,), out_features)
        self.in_features, self.num_features, self.weight_scale = in_features, num_features, weight_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of (..., in_features)."""
        return self.read(self.features(x))

    @torch.no_grad()
    def fit(self, x: Tensor, targets: Tensor, penalty: Penalty = "validate") -> float:
        """Solve for values and intercept in place; return the penalty.

        Args:
            x: (n, in_features).
            targets: (n, out_features), (n,) for one output, or class numbers (n,) for several.
            penalty: above 0, or "validate", see `fit_ridge`.
        """
        return self.fit_features([(self.features(x), targets)], penalty)

    @torch.no_grad()
    def kernel(self, first: Tensor, second: Tensor) -> Tensor:
        """Return features(first) @ features(second).T / M for M without end: (n, d), (m, d) -> (n, m); no gradient."""
        rows = [F.pad(x, (0, 1), value=1.0) for x in (first, second)]
        norms = [x.norm(dim=-1) for x in rows]
        std = self.weight_scale / math.sqrt(self.in_features)
        return expected_product(rows[0] @ rows[1].t(), norms[0][:, None] * norms[1]) * std**2

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.in_features}, {self.out_features}, num_features={self.num_features}"


def expected_product(inner: Tensor, norms: Tensor) -> Tensor:
    """Return E[relu(<w, a>) relu(<w, b>)] for standard Gaussian w, from <a, b> and |a| |b|.

    Source: Cho, Saul, Kernel Methods for Deep Learning (2009), the arc-cosine kernel of order 1.
    """
    cosine = (inner / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(-1.0, 1.0)
    sine = (1 - cosine.square()).clamp(min=0.0).sqrt()
    return norms / (2 * math.pi) * (sine + (math.pi - cosine.acos()) * cosine)
