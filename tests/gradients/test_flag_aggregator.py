import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.example import Example
from tests.gradients.workers import run
from torch import nn

from lamina.errors import LaminaError, ShapeError
from lamina.gradients import FlagAggregator, LGreCo, attach, flag_subspace
from lamina.gradients.robust import gram as blockwise

EXAMPLES = [
    Example("reducer", "flag_aggregator", options={"iters": 3, "lam": 0.5}, bad={"rank": 0}),
]


def gradients(workers, n, seed=0, dtype=torch.float64, noise=1.0):
    g = torch.Generator().manual_seed(seed)
    true = torch.randn(n, generator=g, dtype=torch.float64)
    return (true + noise * torch.randn(workers, n, generator=g, dtype=torch.float64)).to(dtype)


def reference(g, rank, iters, lam=0.0, a=2.0, compat=None):
    """FlagIRLS as the paper has it: singular vectors of parameters x workers, in numpy; (Y, v, w, objectives)."""
    g = g.double()
    u = (g / g.norm(dim=1, keepdim=True)).numpy().T
    p = u.shape[1]
    differences = [(u[:, i] - u[:, j]) for i in range(p) for j in range(p) if i != j]
    if compat is None:
        differences = [d / np.linalg.norm(d) for d in differences if np.linalg.norm(d) > 0]
    v, vd, found, objectives = np.zeros(p), np.zeros(len(differences)), None, []
    for _ in range(iters):
        w = (1 - v + 1e-7) ** ((1 / a - 1) / 2)
        factor = lam / (p * (p - 1))
        wd = (np.abs(1 - vd) + 1e-7) ** ((1 / a - 1) / 2) * (factor if compat else math.sqrt(factor))
        columns = [*(w * u).T, *(c * d for c, d in zip(wd, differences, strict=True) if lam)]
        y = np.linalg.svd(np.stack(columns, 1), full_matrices=False)[0][:, :rank]
        v = ((y.T @ u) ** 2).sum(0).clip(0, 1)
        vd = np.array([((y.T @ d) ** 2).sum() for d in differences])
        objective = ((1 - v) ** (1 / a)).sum()
        if lam and not compat:
            objective += factor * ((1 - vd.clip(0, 1)) ** (1 / a)).sum()
        if objectives and objective > objectives[-1]:
            break
        found = (y, v, (1 - v + 1e-7) ** ((1 / a - 1) / 2))
        objectives.append(objective)
    return *found, objectives


def products_of(g):
    u = g / g.norm(dim=1, keepdim=True)
    return u @ u.T


@pytest.mark.parametrize(
    ("lam", "a", "compat"), [(0.0, 2.0, None), (0.7, 2.0, None), (50.0, 3.0, None), (5.0, 2.0, "reference")]
)
def test_the_gram_form_is_the_singular_vectors_form(lam, a, compat):
    g = gradients(9, 200)
    y, v, w, objectives = reference(g, 4, 4, lam, a, compat)
    found = flag_subspace(products_of(g), 4, 4, lam=lam, a=a, compat=compat)
    ours = ((g / g.norm(dim=1, keepdim=True)).T @ found.basis).numpy()
    assert np.abs(ours @ ours.T - y @ y.T).max() < 1e-6
    np.testing.assert_allclose(found.explained, v, atol=1e-9)
    np.testing.assert_allclose(found.weights, w, rtol=1e-7)
    np.testing.assert_allclose(found.objectives, objectives, rtol=1e-9)
    u = (g / g.norm(dim=1, keepdim=True)).T
    np.testing.assert_allclose(u @ found.projected, ours @ (ours.T @ u.numpy()), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 63])
def test_the_answer_is_the_definition_s_in_the_gradients_own_dtype(n, dtype):
    g = gradients(7, n, seed=n, dtype=dtype)
    y, *_ = reference(g, min(4, n), 5)
    u = (g.double() / g.double().norm(dim=1, keepdim=True)).numpy()
    for scale, length in (
        ("median", np.median(g.double().norm(dim=1).numpy()) / 7),
        ("unit", 1 / 4),
    ):
        expected = length * (y @ (y.T @ u.sum(0)))
        found = FlagAggregator(scale=scale).aggregate(g)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        np.testing.assert_allclose(found.double(), expected, atol=tolerance * np.abs(expected).max())


def test_raw_scale_is_the_paper_s_text_and_lets_a_huge_gradient_pass():
    g = gradients(7, 40)
    y, *_ = reference(g, 4, 5)
    np.testing.assert_allclose(FlagAggregator(scale="raw").aggregate(g), y @ (y.T @ g.sum(0).numpy()) / 7, atol=1e-9)
    # Explained by no subspace of the others, but one of four dimensions has room for it.
    g[0] = 1e6 * torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    huge = FlagAggregator(rank=7, scale="raw").aggregate(g).norm()
    assert huge > 1e5
    assert FlagAggregator(rank=7).aggregate(g).norm() < 100


def test_a_subspace_of_everything_gives_the_mean_direction():
    g = gradients(6, 50)
    u = g / g.norm(dim=1, keepdim=True)
    whole = FlagAggregator(rank=6)
    torch.testing.assert_close(whole.aggregate(g), g.norm(dim=1).quantile(0.5) * u.mean(0))
    torch.testing.assert_close(whole.explained, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(FlagAggregator(rank=6, scale="unit").aggregate(g), u.mean(0))
    few = g[:, :3]
    u = few / few.norm(dim=1, keepdim=True)
    torch.testing.assert_close(FlagAggregator(rank=4, scale="unit").aggregate(few), 6 / 4 * u.mean(0))


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 12), st.integers(0, 10**6), st.sampled_from([0.0, 0.3]), st.data())
def test_workers_have_no_order_no_length_and_no_axes(workers, seed, lam, data):
    g = gradients(workers, 40, seed)
    rule = FlagAggregator(rank=data.draw(st.integers(1, workers)), lam=lam)
    whole, v, w = rule.aggregate(g), rule.explained, rule.weights
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(workers, generator=generator)
    torch.testing.assert_close(rule.aggregate(g[order]), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rule.explained, v[order], rtol=1e-5, atol=1e-6)
    scales = 10 ** (6 * torch.rand(workers, 1, generator=generator, dtype=torch.float64) - 3)
    scaled = rule.aggregate(scales * g)
    torch.testing.assert_close(scaled / scaled.norm(), whole / whole.norm(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rule.explained, v, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rule.weights, w, rtol=1e-4, atol=1e-4)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    torch.testing.assert_close(rule.aggregate(g @ turn.T), turn @ whole, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 15), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 50.0]), st.sampled_from([1.0, 2.0, 5.0]))
def test_no_accepted_step_raises_the_objective(workers, seed, lam, a):
    g = gradients(workers, 30, seed)
    found = flag_subspace(products_of(g), workers // 2 + 1, 40, lam=lam, a=a)
    assert found.objectives == sorted(found.objectives, reverse=True)
    first = flag_subspace(products_of(g), workers // 2 + 1, 1, lam=lam, a=a)
    assert found.objectives[0] == first.objectives[0]


def test_few_outliers_among_copies_are_not_explained():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(1000, generator=generator)
    g = torch.cat([true.expand(12, -1), torch.randn(3, 1000, generator=generator)])
    rule = FlagAggregator(rank=1)
    found = rule.aggregate(g)
    assert torch.cosine_similarity(found, true, dim=0) > 0.99
    assert (rule.explained[12:] < 0.05).all()
    assert (rule.explained[:12] > 0.999).all()


def test_equal_workers_give_their_gradient_and_pairs_of_equals_are_dropped():
    g = torch.tensor([[3.0, 4.0]]).expand(5, -1)
    for lam in (0.0, 1.0):
        torch.testing.assert_close(FlagAggregator(lam=lam).aggregate(g), g[0])


def test_workers_of_nan_infinity_or_nothing_are_left_out_and_named(caplog):
    honest = gradients(6, 30, dtype=torch.float32)
    bad = torch.stack([torch.full((30,), v) for v in (math.nan, math.inf, 0.0)])
    bad[0, 1:] = 1.0
    rule = FlagAggregator()
    found = rule.aggregate(torch.cat([bad, honest]))
    torch.testing.assert_close(found, FlagAggregator().aggregate(honest))
    assert rule.failed == (0, 1, 2)
    assert rule.weights[:3].tolist() == rule.explained[:3].tolist() == [0.0] * 3
    assert "workers 0, 1, 2 of 9 left out" in caplog.text
    rule.aggregate(honest)
    assert rule.failed == ()
    # No sum with zeros: the step is as long as that of those who sent something.
    assert found.norm() > 0.9 * FlagAggregator().aggregate(honest).norm()


@pytest.mark.parametrize("size", [1e-35, 1e20, 1e38])
def test_gradients_whose_squares_overflow_or_vanish_in_float32(size):
    g = gradients(5, 20, dtype=torch.float32, noise=0.1)
    expected = FlagAggregator(scale="unit").aggregate(g)
    huge = g.clone()
    huge[2] *= size / huge[2].abs().max()
    torch.testing.assert_close(FlagAggregator(scale="unit").aggregate(huge), expected, rtol=1e-4, atol=1e-5)


def test_weights_too_small_for_float32_are_applied_in_float64():
    rows = torch.full((2, 3), 1e38)
    weights = torch.tensor([1e-43, 2e-43], dtype=torch.float64)
    torch.testing.assert_close(blockwise.weighted_sum(rows, weights), torch.full((3,), 3e-5), rtol=1e-6, atol=0)


def test_the_gram_matrix_is_taken_block_by_block_in_float64():
    g = gradients(5, 1000, dtype=torch.float32)
    whole = g.double() @ g.double().T
    g.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK_BYTES", 5 * 8 * 300)
        torch.testing.assert_close(blockwise.gram(g.detach()), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_a_large_gradient_takes_no_copy_of_itself():
    resource = pytest.importorskip("resource")
    g = torch.randn(15, 10_000_000)
    FlagAggregator().aggregate(g[:, :1000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    FlagAggregator().aggregate(g)
    # Kilobytes: the result itself, and less than a gradient beside it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 40_000


def uneven():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model[2].bfloat16()
    return model


@pytest.mark.parametrize("per_layer", [False, True])
def test_workers_exchange_slices_and_get_what_one_would_compute(per_layer):
    world = 5
    model = uneven()
    sent = [{n: torch.randn(p.shape).to(p.dtype) for n, p in model.named_parameters()} for _ in range(world)]
    sent[3]["0.bias"][1] = math.nan

    def work(rank):
        rule = FlagAggregator(per_layer=per_layer)
        before = {n: g.clone() for n, g in sent[rank].items()}
        reduced = rule.reduce(sent[rank], None)
        assert all(torch.equal(g, sent[rank][n]) or n == "0.bias" for n, g in before.items())
        return reduced, rule.failed, rule.explained, rule.bytes_sent()

    results = run(world, work)
    left = [s for r, s in enumerate(sent) if r != 3]
    names = sorted(sent[0])
    groups = [[n] for n in names] if per_layer else [names]
    for rows in groups:
        flat = torch.stack([torch.cat([s[n].flatten().double() for n in rows]) for s in left])
        parts = FlagAggregator().aggregate(flat).split([sent[0][n].numel() for n in rows])
        for name, part in zip(rows, parts, strict=True):
            for reduced, *_ in results:
                assert torch.equal(reduced[name], results[0][0][name])
                assert reduced[name].dtype == sent[0][name].dtype
                rounding = {"rtol": 8e-3, "atol": 1e-3} if name[0] == "2" else {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(reduced[name].double().flatten(), part, **rounding)
    assert all(failed == (3,) for _, failed, *_ in results)
    assert results[0][2].shape == ((4, 5) if per_layer else (5,))
    layers = 4 if per_layer else 1
    # Roll call, slices out, inner products, the combined slice; of 25 float32 and 18 bfloat16 numbers.
    assert results[0][3] == 24 + 4 * (25 + 5) + 2 * (20 + 4) + 8 * 25 * layers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"iters": 0}, "iters must be a whole number >= 1, got 0"),
        ({"lam": -1.0}, "lam must be a number >= 0, got -1.0"),
        ({"lam": math.nan}, "lam must be a number >= 0, got nan"),
        ({"a": 0.5}, r"a must be a number >= 1 \(below, outliers would count more\), got 0.5"),
        ({"scale": "mean"}, "scale must be 'median', 'unit' or 'raw', got 'mean'"),
        ({"compat": "garfield"}, "compat must be None or 'reference', got 'garfield'"),
        ({"nonfinite": "skip"}, "nonfinite must be 'raise' or 'pass_on', got 'skip'"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, words):
    with pytest.raises(LaminaError, match=words):
        FlagAggregator(**options)


def test_bad_gradients_are_refused():
    with pytest.raises(LaminaError, match="FlagAggregator needs at least 2 workers, got 1"):
        FlagAggregator().aggregate(torch.ones(1, 3))
    with pytest.raises(LaminaError, match=r"rank must be within 1..3, the number of workers, got 4"):
        FlagAggregator(rank=4).aggregate(torch.ones(3, 3))
    with pytest.raises(ShapeError, match=r"shape \(workers, n\), got torch.float32 of shape \(3,\)"):
        FlagAggregator().aggregate(torch.ones(3))
    with pytest.raises(ShapeError, match="got no tensor"):
        FlagAggregator().aggregate([torch.ones(3), torch.ones(2)])
    with pytest.raises(LaminaError, match="every worker's gradient is zero"):
        FlagAggregator().aggregate(torch.zeros(3, 4))
    bad = torch.full((2, 3), math.nan)
    with pytest.raises(LaminaError, match=r"no worker's gradient is finite \(workers 0, 1\)"):
        FlagAggregator().aggregate(bad)
    assert FlagAggregator(nonfinite="pass_on").aggregate(bad).isnan().all()
    with pytest.raises(LaminaError, match=r"rank must be within 1..2, the number of directions, got 3"):
        flag_subspace(torch.eye(2), 3)
    with pytest.raises(ShapeError, match="products must be a square matrix"):
        flag_subspace(torch.ones(2, 3), 1)


def test_robust_and_compressed_do_not_combine():
    with pytest.raises(LaminaError, match="base must be a compressor"):
        LGreCo("flag_aggregator")


def test_a_plain_loop_of_one_worker_is_as_it_was():
    model = uneven()
    handle = attach(model, FlagAggregator())
    model[0](torch.randn(2, 4)).sum().backward()
    before = model[0].weight.grad.clone()
    handle.reduce()
    assert torch.equal(model[0].weight.grad, before)
