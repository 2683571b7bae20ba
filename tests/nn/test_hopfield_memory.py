from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import ShapeError
from lamina.nn import HopfieldMemory, hopfield_energy, hopfield_update


def on_sphere(count: int, width: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1) * math.sqrt(width - 1)


def test_states_of_any_shape_are_updated_and_weights_say_by_what() -> None:
    memory = HopfieldMemory(on_sphere(9, 5), beta=0.7)
    half = memory.retrieve(torch.ones(5, dtype=torch.bfloat16))
    assert half.dtype is torch.bfloat16
    exact = memory.retrieve(torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=1e-2)
    for shape in ((5,), (3, 5), (2, 3, 5)):
        state = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = hopfield_update(state.view(-1, 5), memory.patterns, 0.7, steps=3).view(shape)
        torch.testing.assert_close(memory.retrieve(state, steps=3), expected)
        found, weights = memory.retrieve(state, steps=3, return_weights=True)
        torch.testing.assert_close(found, expected)
        assert weights.shape == (*shape[:-1], 9)
        torch.testing.assert_close(weights @ memory.patterns, expected)
        torch.testing.assert_close(memory(state), memory.retrieve(state))
        energy = hopfield_energy(state.view(-1, 5), memory.patterns, 0.7).view(shape[:-1])
        torch.testing.assert_close(memory.energy(state), energy)


def test_separation_by_hand() -> None:
    memory = HopfieldMemory(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]]), beta=1.0)
    assert memory.separation().tolist() == [4 - 2, 2 - 3, 9 - 3]
    assert HopfieldMemory(torch.ones(1, 2), beta=1.0).separation().tolist() == [math.inf]


def test_separation_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HopfieldMemory(on_sphere(50, 64), beta=1.0)
    state = memory.patterns + 1e-4
    expected = memory.separation(), memory.retrieval_bound(state)
    assert torch.isfinite(expected[1]).all()
    monkeypatch.setattr("lamina.nn.hopfield_memory.BLOCK", 7)
    torch.testing.assert_close(memory.separation(), expected[0])
    torch.testing.assert_close(memory.retrieval_bound(state), expected[1], rtol=1e-9, atol=0)


def test_one_update_errs_no_more_than_the_bound() -> None:
    patterns = on_sphere(50, 64)
    memory = HopfieldMemory(patterns, beta=1.0)
    radius = 1 / (50 * math.sqrt(63))
    away = F.normalize(torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=-1)
    state = patterns + 0.99 * radius * away
    bound = memory.retrieval_bound(state)
    assert torch.isfinite(bound).all()
    assert (bound < 1e-4).all()
    assert ((memory.retrieve(state) - patterns).norm(dim=-1) <= bound).all()
    # The bound as the theorem has it, for one state, from the definitions.
    scores = patterns @ patterns.T
    delta = scores[3, 3] - scores[3][torch.arange(50) != 3].max()
    fixed = hopfield_update(patterns[3:4], patterns, 1.0, steps=200)[0]
    reach = max(float((state[3] - patterns[3]).norm()), float((fixed - patterns[3]).norm()))
    expected = 2 * 49 * math.exp(-(float(delta) - 2 * reach * math.sqrt(63))) * math.sqrt(63)
    assert float(bound[3]) == pytest.approx(expected, rel=1e-6, abs=0)


def test_where_the_theorem_is_silent_the_bound_is_infinite() -> None:
    memory = HopfieldMemory(on_sphere(50, 64), beta=1.0)
    far = memory.patterns + 0.5
    assert torch.isinf(memory.retrieval_bound(far)).all()
    crowded = HopfieldMemory(torch.eye(3) + 5, beta=1.0)
    assert torch.isinf(crowded.retrieval_bound(crowded.patterns)).all()
    alone = HopfieldMemory(torch.ones(1, 3), beta=1.0)
    assert alone.retrieval_bound(torch.zeros(3)) == 0


def halves() -> tuple[Tensor, Tensor, Tensor]:
    """500 digits, centred, of length 1; their upper halves with the mean below; the same with raw zeros below."""
    datasets = pytest.importorskip("sklearn.datasets")
    raw = torch.tensor(datasets.load_digits().data[:500], dtype=torch.float32)
    mean = raw.mean(0)
    centred = raw - mean
    upper, zeros = centred.clone(), raw.clone()
    upper[:, 32:], zeros[:, 32:] = 0.0, 0.0
    return F.normalize(centred, dim=-1), F.normalize(upper, dim=-1), F.normalize(zeros - mean, dim=-1)


def test_half_a_digit_finds_its_own_image_and_centring_matters() -> None:
    stored, upper, zeros = halves()
    memory, own = HopfieldMemory(stored, beta=64.0), torch.arange(500)

    def right(query: Tensor) -> float:
        found = memory.retrieve(query)
        return float(((found @ stored.T).argmax(-1) == own).float().mean())

    assert right(upper) >= 0.75
    assert right(zeros) <= 0.3
    flat = HopfieldMemory(stored, beta=1e-6).retrieve(upper)
    torch.testing.assert_close(flat, stored.mean(0).expand(500, -1), atol=1e-5, rtol=0)


def test_it_is_written_to_saved_and_loaded_whatever_it_holds() -> None:
    memory = HopfieldMemory(torch.empty(0, 4), beta=8.0)
    with pytest.raises(ShapeError, match="nothing is stored"):
        memory.retrieve(torch.ones(4))
    with pytest.raises(ShapeError, match="nothing is stored"):
        memory.separation()
    memory.write(torch.eye(4)[0])
    memory.write(torch.eye(4)[1:3])
    assert torch.equal(memory.patterns, torch.eye(4)[:3])
    assert not list(memory.parameters())
    other = HopfieldMemory(torch.empty(0, 4), beta=8.0)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.retrieve(torch.ones(4)), memory.retrieve(torch.ones(4)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        HopfieldMemory(torch.empty(0, 5), beta=8.0).load_state_dict(memory.state_dict())
    kept = torch.eye(4)
    memory = HopfieldMemory(kept, beta=1.0)
    kept.zero_()
    assert memory.patterns.any(), "what is stored is a copy"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: HopfieldMemory(torch.ones(3), 1.0), ShapeError, r"stores \(N, d\) floats, got \(3,\)"),
        (lambda: HopfieldMemory(torch.ones(3, 2, dtype=torch.long), 1.0), ShapeError, "int64"),
        (lambda: HopfieldMemory(torch.ones(3, 2), 0.0), ValueError, "beta must be positive"),
        (lambda: HopfieldMemory(torch.ones(3, 2), 1.0).retrieve(torch.ones(3)), ShapeError, r"width 2, got \(3,\)"),
        (lambda: HopfieldMemory(torch.ones(3, 2), 1.0).write(torch.ones(2, 3)), ShapeError, "width 2"),
        (
            lambda: HopfieldMemory(torch.ones(3, 2), 1.0).retrieve(torch.ones(2), steps=0),
            ValueError,
            "at least one step",
        ),
    ],
)
def test_refusals(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
