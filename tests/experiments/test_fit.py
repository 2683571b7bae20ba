from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data import text
from lamina.experiments import fit
from lamina.experiments.fit import held_out


def test_the_loss_on_held_out_text_is_the_mean_of_the_blocks_there_are(tmp_path, monkeypatch) -> None:
    """A model that knows nothing is at the logarithm of the vocabulary, however many blocks the text has."""
    (tmp_path / "a.txt").write_text("abcdefgh" * 400)

    class Ignorant(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.zeros(*input_ids.shape, 256)

    data = text(tmp_path / "a.txt", context=32, batch=4)
    expected = float(F.cross_entropy(torch.zeros(1, 256), torch.zeros(1, dtype=torch.long)))
    for most in (2, 64, 1000):
        monkeypatch.setattr(fit, "EVALUATED", most)
        assert abs(held_out(Ignorant(), data, torch.device("cpu")) - expected) < 1e-4
