from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.errors import LaminaError
from lamina.experiments.infinite_width_limits import CBOWLimit, LinearLimit, LinearNetwork, ReLUKernel


def trained(network: LinearNetwork, steps: int) -> torch.Tensor:
    """Outputs after clipped SGD on one batch of 5 rows, and on rows of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (5,), generator=generator)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    return network(torch.randn(7, 4, generator=generator, dtype=torch.float64)).detach()


@pytest.mark.parametrize("biases", [(0.0, 0.0), (0.5, 2.0)])
def test_samples_of_a_linear_network_tend_to_its_limit_as_one_over_the_root_of_their_width(
    biases: tuple[float, float],
) -> None:
    make = lambda: LinearLimit(4, 3, 0.7, 0.4, alpha=1.5, biases=biases, dtype=torch.float64)  # noqa: E731
    assert not make()(torch.ones(1, 4, dtype=torch.float64)).any()
    limit = trained(make(), 10)
    assert limit.std() > 0.05
    widths = 2 ** np.arange(6, 14)
    errors = [
        np.mean([float((trained(make().sample(int(n), seed), 10) - limit).square().mean().sqrt()) for seed in range(4)])
        for n in widths
    ]
    assert np.polyfit(np.log(widths), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.15)


def positions(count: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(vocabulary, (count, 3), generator=generator)
    mask = torch.tensor([True, True, False]).repeat(count, 1)
    target = torch.randint(vocabulary, (count, 4), generator=generator)
    return context, mask, target, torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(count, 1)


def test_the_limit_of_embeddings_is_a_literal_run_of_one_hot_words_one_position_after_the_other() -> None:
    vocabulary, lr, decay = 9, 0.4, 0.1
    limit = CBOWLimit(vocabulary, dtype=torch.float64)
    words, targets = np.eye(vocabulary), np.zeros((vocabulary, vocabulary))
    parts = positions(40, vocabulary)
    for i in range(40):
        limit.step(*(p[i : i + 1] for p in parts), lr=lr, decay=decay)
        inside = [int(parts[0][i, c]) for c in range(2)]
        near, far = words[inside].mean(0), [int(t) for t in parts[2][i]]
        gradient = np.zeros(vocabulary)
        changes = []
        for word, label in zip(far, parts[3][i].tolist(), strict=True):
            error = 1 / (1 + np.exp(-near @ targets[word])) - label
            gradient += error * targets[word]
            changes.append((word, error * near))
        for word in inside:
            words[word] *= 1 - lr * decay
        for word in far:
            targets[word] *= 1 - lr * decay
        for word in inside:
            words[word] -= lr * gradient / 2
        for word, change in changes:
            targets[word] -= lr * change
    np.testing.assert_allclose(limit.words.numpy(), words, atol=1e-12)
    np.testing.assert_allclose(limit.targets.numpy(), targets, atol=1e-12)
    assert np.abs(targets).max() > 0.1


def test_the_gram_matrix_of_finite_embeddings_tends_to_the_limits() -> None:
    def gram(width: int | None) -> torch.Tensor:
        tables = CBOWLimit(9, width, dtype=torch.float64)
        for _ in range(5):
            tables.step(*positions(40, 9), lr=0.05, decay=0.01)
        return tables.words @ tables.words.T

    limit = gram(None)
    errors = [float((gram(n) - limit).square().mean().sqrt()) for n in (64, 1024, 16384)]
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    assert errors[2] < 0.03


@pytest.mark.parametrize(("kind", "readout"), [("gp", 1.0), ("ntk", 1.0), ("ntk", 0.5)])
def test_kernels_are_those_of_a_very_wide_network(kind: str, readout: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 5, generator=generator), torch.randn(2, 5, generator=generator)
    width, weight, bias = 2**18, 2.0, 0.3
    w = torch.randn(width, 5, generator=generator) * weight**0.5
    b = torch.randn(width, generator=generator) * bias**0.5
    v = torch.randn(width, generator=generator) * readout**0.5
    # f(x) = n^-1/2 v relu(Wx + b): by v, n^-1/2 relu(.); by row i of W, n^-1/2 v_i 1[.] x.
    parts = [t @ w.T + b for t in (x, y)]
    expected = parts[0].relu() @ parts[1].relu().T / width
    if kind == "ntk":
        on = [(p > 0).float() * v for p in parts]
        expected = expected + (on[0] @ on[1].T / width) * (x @ y.T)
    found = ReLUKernel(kind, weight, bias, readout)(x, y)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_a_kernel_of_a_point_with_itself_and_bad_input() -> None:
    x = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(ReLUKernel("gp")(x, x), torch.tensor([[12.5]]))
    torch.testing.assert_close(ReLUKernel("ntk")(x, x), torch.tensor([[25.0]]))
    with pytest.raises(LaminaError, match="kind is 'gp' or 'ntk'"):
        ReLUKernel("rbf")  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="at least 1"):
        LinearLimit(0, 3)
    with pytest.raises(LaminaError, match="at least 1"):
        CBOWLimit(5, 0)
