from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.data import digit_images


def test_they_are_the_library_s_in_its_order_or_a_seeded_one() -> None:
    found = pytest.importorskip("sklearn.datasets").load_digits()
    images, classes = digit_images()
    assert (images.shape, images.dtype, classes.dtype) == ((1797, 8, 8), torch.float32, torch.int64)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert torch.equal(images * 16, torch.from_numpy(found.images).float())
    assert torch.equal(classes, torch.from_numpy(found.target))
    order = np.random.default_rng(3).permutation(1797)
    drawn, named = digit_images(seed=3)
    assert torch.equal(drawn, images[torch.from_numpy(order)])
    assert torch.equal(named, classes[torch.from_numpy(order)])
