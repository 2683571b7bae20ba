"""scikit-learn's digits as plain tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lamina.errors import require


def digit_images(seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Return all 1,797 handwritten digits, for those who split them their own way; see `digits` for a data set.

    images (1797, 8, 8) float32 from 0 to 1, classes (1797,) int64.

    Args:
        seed: of an order drawn by numpy's default generator; None = the set's own order.
    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    found = require("sklearn.datasets", "experiments").load_digits()
    images = torch.from_numpy(found.images / 16).float()
    classes = torch.from_numpy(found.target).long()
    if seed is None:
        return images, classes
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(classes)))
    return images[order], classes[order]
