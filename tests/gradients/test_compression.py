import copy
import itertools
import math

import numpy as np
import pytest
import torch
from tests.contract.example import Example
from tests.gradients.workers import run
from torch import nn

from lamina.errors import LaminaError, PlanError, ShapeError
from lamina.gradients import QSGD, Mean, PowerSGD, TopK, attach
from lamina.gradients.compression import qsgd
from lamina.gradients.compression.powersgd import leading_singular_values, orthonormal
from lamina.gradients.compression.qsgd import CHUNK, add_dequantized, levels, pack, quantize, unpack
from lamina.gradients.compression.top_k import SAMPLE, largest

EXAMPLES = [
    Example("reducer", "qsgd", options={"bits": 4, "bucket": 64}, bad={"bits": 9}),
    Example("reducer", "topk", options={"density": 0.2}, bad={"density": 0.0}),
    Example("reducer", "powersgd", options={"rank": 1, "start_step": 0}, bad={"rank": 0}),
]

FAMILIES = [
    lambda **o: QSGD(bits=3, bucket=16, **o),
    lambda **o: TopK(density=0.1, **o),
    lambda **o: PowerSGD(rank=2, min_compression_rate=1.0, **{"start_step": 0, **o}),
]
NAMES = ["qsgd", "topk", "powersgd"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of_rank(rank, step=0, dtype=torch.float32):
    """The gradients of one worker: a matrix, a kernel, odd sizes, a bias."""
    shapes = {"a.weight": (63, 7), "a.bias": (7,), "conv": (8, 4, 3, 3), "one": (1, 63), "gain": ()}
    return {n: draw(*s, seed=97 * rank + 7 * step + i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}


def mean_of(world, step=0, dtype=torch.float32):
    each = [of_rank(r, step, dtype) for r in range(world)]
    return {n: torch.stack([g[n].float() for g in each]).mean(0) for n in each[0]}


# --- QSGD


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 7, 63, 4096])
def test_packed_codes_come_back_and_take_their_bits(bits, n):
    codes = torch.randint(0, 2**bits, (8, n), generator=torch.Generator().manual_seed(n), dtype=torch.int16)
    packed = pack(codes.clone(), bits)
    assert packed.shape == (bits, n)
    assert torch.equal(unpack(packed, bits), codes)


def test_packed_bits_lie_one_after_another():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.int16).view(8, 1)
    for bits in (3, 4, 5, 6, 7, 8):
        number = sum(int(c) << (bits * i) for i, c in enumerate(codes))
        assert int.from_bytes(bytes(pack(codes.clone(), bits).flatten().tolist()), "little") == number


@pytest.mark.parametrize("scale", ["max", "l2"])
@pytest.mark.parametrize(("n", "bucket"), [(1, 512), (63, 7), (513, 512), (CHUNK + 77, 500)])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_no_number_is_off_by_a_level_and_the_size_is_the_formula(bits, n, bucket, scale):
    x = draw(n)
    scales, codes = quantize(x, bits, bucket, scale, torch.Generator().manual_seed(3))
    back = add_dequantized(torch.zeros(n), scales, codes, bits, bucket)
    step = scales.repeat_interleave(bucket)[:n] / levels(bits)
    assert ((back - x).abs() <= step * (1 + 1e-5)).all()
    assert torch.equal(torch.round(back / step), (back / step).round())
    bucket_norms = [part.norm(p=math.inf if scale == "max" else 2) for part in x.split(bucket)]
    torch.testing.assert_close(scales, torch.stack(bucket_norms))
    sent = scales.nbytes + codes.nbytes
    assert sent == QSGD(bits, bucket=bucket, scale=scale).compressed_size((n,), bits, 4)
    assert bits * n + 32 * -(-n // bucket) <= 8 * sent < bits * (n + 8) + 32 * -(-n // bucket)


def rounded(x, copies, bits, seed):
    """Many roundings of one vector, each its own bucket: (copies, n)."""
    n = len(x)
    made = quantize(x.repeat(copies), bits, n, "max", torch.Generator().manual_seed(seed))
    return add_dequantized(torch.zeros(n * copies), *made, bits, n).view(copies, n).double()


def test_rounding_is_unbiased_with_the_variance_of_its_closed_form():
    x = draw(8)
    rows = torch.cat([rounded(x, 4096, 3, seed) for seed in range(5)])
    assert len(rows) > 20_000
    standard_error = rows.std(0) / math.sqrt(len(rows))
    assert ((rows.mean(0) - x).abs() <= 4 * standard_error + 1e-6).all()
    expected = QSGD(3, bucket=8).compression_errors(x.view(1, 8), [3]).square()
    torch.testing.assert_close((rows - x).square().sum(1).mean()[None], expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("chunk", [15, 16])
def test_rounding_errors_of_different_numbers_do_not_go_together(monkeypatch, chunk):
    # Two halves share the numbers they were drawn from, but for some bits: two chunks, or two parts of one.
    monkeypatch.setattr(qsgd, "CHUNK", 1 << chunk)
    monkeypatch.setattr(qsgd, "DRAWN", 1 << 15)
    x = draw(64)
    sums = []
    for seed in range(120):
        error = (rounded(x, (1 << 16) // 64, 3, seed) - x).view(2, -1)
        sums.append(torch.stack([error[0, :512].sum(), error[1, :512].sum(), error[0, 512:1024].sum()]))
    correlation = torch.corrcoef(torch.stack(sums).T) - torch.eye(3)
    assert correlation.abs().max() < 4 / math.sqrt(120)


def test_the_paper_s_bound_holds_with_the_norm_as_scale():
    x = draw(4, 512)
    for bits in (2, 3, 4, 6):
        bound = min(512 / levels(bits) ** 2, math.sqrt(512) / levels(bits)) * x.square().sum()
        assert QSGD(bits, scale="l2").errors(x, [bits])[0] ** 2 <= bound


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_mean_is_right_to_a_small_part_of_a_level(bits):
    # Next to the largest number, where what is added to a float is rounded the most.
    s, n = levels(bits), 1 << 21
    x = torch.full((n,), (s - 0.25) / s)
    x[::512] = 1.0
    made = quantize(x, bits, generator=torch.Generator().manual_seed(1))
    codes = (add_dequantized(torch.zeros(n), *made, bits) * s).round()
    assert codes.max() == s
    up = codes.view(-1, 512)[:, 1:].eq(s).double().mean()
    assert abs(up - 0.75) < 4 * math.sqrt(0.75 * 0.25 / n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_rounded_as_their_float32_is(dtype):
    x = draw(CHUNK + 77).to(dtype)
    one, other = (quantize(y, 4, generator=torch.Generator().manual_seed(2)) for y in (x, x.float()))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_numbers_too_small_to_divide_by_are_as_good_as_zeros():
    for x in (torch.full((64,), 1e-40), torch.tensor([1e-38, -2e-38, 0.0])):
        back = add_dequantized(torch.zeros(len(x)), *quantize(x, 4, 16), 4, 16)
        assert ((back * x.sign() >= 0) & (back.abs() <= 1e-35)).all()


def test_zeros_and_equal_seeds_give_what_they_must():
    scales, codes = quantize(torch.zeros(100), 4, 10)
    assert add_dequantized(torch.zeros(100), scales, codes, 4, 10).eq(0).all()
    one, other = (quantize(draw(99), 4, 10, "max", torch.Generator().manual_seed(5))[1] for _ in range(2))
    assert torch.equal(one, other)


# --- TopK


@pytest.mark.parametrize("n", [1, 7, 63, 4 * SAMPLE + 1, 9 * SAMPLE + 5])
@pytest.mark.parametrize("density", [0.003, 0.5])
def test_the_largest_entries_are_exactly_those_of_a_full_sort(n, density):
    x = draw(n, seed=n)
    count = max(1, int(n * density))
    for values in (x, x.round(decimals=1), torch.zeros(n), torch.cat([x[: n // 2], torch.zeros(n - n // 2)])):
        found = largest(values, count)
        assert len(found.unique()) == count
        expected = values.abs().sort(descending=True).values[:count]
        assert torch.equal(values[found].abs().sort(descending=True).values, expected)


def test_an_adversarial_order_does_not_mislead_the_sample():
    # Every place that is sampled is large, or small, or just enough of them are: the guess is wrong, the answer is not.
    n = 8 * SAMPLE
    for special, until in ((10.0, n), (0.0, n), (10.0, 8 * 400)):
        x = draw(n).abs() + 1
        x[:until:8] = special
        found = largest(x, n // 100)
        assert torch.equal(x[found].sort().values, x.sort().values[-(n // 100) :])


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_the_error_table_equals_direct_computation(family):
    reducer, x = family(), draw(40, 30)
    options = reducer.options(x.shape)
    table = reducer.errors(x, options)
    raw = 4 * x.numel()
    for option, error in zip(options, table, strict=True):
        if reducer.size(x.shape, option) == raw:
            assert error == 0
        elif isinstance(reducer, TopK):
            rest = x.flatten().clone()
            rest[rest.abs().topk(math.ceil(option * x.numel() - 1e-9)).indices] = 0
            assert math.isclose(error, rest.norm(), rel_tol=1e-6)
        elif isinstance(reducer, PowerSGD):
            u, s, v = np.linalg.svd(x.double().numpy())
            best = (u[:, :option] * s[:option]) @ v[:option]
            assert math.isclose(error, np.linalg.norm(x.numpy() - best), rel_tol=1e-5)
        else:
            draws = []
            for i in range(20):
                made = quantize(x.flatten(), option, 16, "max", torch.Generator().manual_seed(i))
                draws.append((add_dequantized(torch.zeros(1200), *made, option, 16) - x.flatten()).square().sum())
            assert math.isclose(error, math.sqrt(sum(draws) / 20), rel_tol=0.03)
    assert all(a >= b for a, b in itertools.pairwise(table)), "more is better"
    for factor in (1e-6, 1e4):
        torch.testing.assert_close(reducer.errors(factor * x, options), factor * table, rtol=1e-3, atol=0)


def test_the_power_estimate_of_singular_values_is_close_and_never_too_large():
    decay = draw(80, 50) * torch.logspace(0, -2, 50)
    true = torch.linalg.svdvals(decay)[:8].double()
    found = leading_singular_values(decay, 8, 5)
    assert (found <= true * (1 + 1e-6)).all()
    torch.testing.assert_close(found, true, rtol=0.05, atol=0)
    exact, quick = (PowerSGD(4, error=kind).errors(decay, [2, 4, 8]) for kind in ("svd", "power"))
    torch.testing.assert_close(exact, quick, rtol=0.02, atol=0)
    # A matrix of zeros has columns to span and nothing to lose.
    assert orthonormal(torch.zeros(5, 2)).isfinite().all()
    assert PowerSGD(1).errors(torch.zeros(9, 8), [1]).tolist() == [0.0]


# --- all of them, over several workers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_workers_get_the_same_bits_near_the_mean_and_small_tensors_exactly(family, dtype):
    def work(rank):
        reducer, given = family(), of_rank(rank, dtype=dtype)
        kept = {n: g.clone() for n, g in given.items()}
        found = [reducer.reduce(of_rank(rank, s, dtype), None) for s in range(3)]
        assert all(torch.equal(g, kept[n]) for n, g in given.items())
        return found, reducer

    (first, reducer), *others = run(3, work)
    for other, _ in others:
        for a, b in zip(first, other, strict=True):
            assert all(torch.equal(a[n], b[n]) and a[n].dtype == dtype for n in a)
    for step, found in enumerate(first):
        exact = mean_of(3, step, dtype)
        assert list(found) == list(exact)
        for name, g in exact.items():
            assert found[name].shape == g.shape
            raw = not reducer.compresses(name, g.to(dtype))
            close = torch.allclose(found[name].float(), g, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0.01)
            assert close or not raw, name
            assert raw or not torch.equal(found[name].float(), g)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_the_bytes_are_those_handed_to_the_collectives(family, monkeypatch):
    handed = []

    def watch(module, name, tensor_at):
        original = getattr(module, name)

        def watched(*given, **options):
            handed.append(given[tensor_at].nbytes)
            return original(*given, **options)

        monkeypatch.setattr(module, name, watched)

    import torch.distributed as dist

    watch(dist, "all_reduce", 0)
    watch(dist, "all_gather", 1)
    reducers = run(2, lambda rank: [r := family(), r.reduce(of_rank(rank), None)][0])
    assert sum(r.bytes_sent() for r in reducers) == sum(handed)
    one = reducers[0]
    layers = {n: g for n, g in of_rank(0).items() if g.ndim > 1}
    expected = sum(one.size(g.shape, one.option_of(n)) for n, g in layers.items())
    raw = sum(4 * g.numel() for n, g in of_rank(0).items() if g.ndim < 2)
    assert one.bytes_sent() == expected + raw + 16, "a word on the bucket of 16 bytes"
    assert one.bytes_sent() < sum(4 * g.numel() for g in of_rank(0).values()) / 2


@pytest.mark.parametrize("family", FAMILIES[1:], ids=NAMES[1:])
def test_what_is_not_sent_is_sent_later(family):
    """Error feedback telescopes: what was applied and what is kept add up to the true gradients."""
    steps = 6

    def work(rank):
        reducer = family()
        applied = {n: torch.zeros_like(g, dtype=torch.float64) for n, g in of_rank(rank).items()}
        for step in range(steps):
            for n, g in reducer.reduce(of_rank(rank, step, torch.float64), None).items():
                applied[n] += g
        return applied, reducer.memory["residual"]

    results = run(2, work)
    applied = results[0][0]
    for name, total in applied.items():
        true = sum(of_rank(r, s, torch.float64)[name] for r in range(2) for s in range(steps)) / 2
        kept = sum(residual.get(name, 0.0) for _, residual in results) / 2
        torch.testing.assert_close(total + kept, true, rtol=1e-12, atol=1e-12)
    assert set(results[0][1]) == {"a.weight", "conv", "one"} - ({"one"} if family is FAMILIES[2] else set())


def test_a_worker_keeps_exactly_what_it_did_not_send():
    def work(rank):
        reducer = TopK(0.1)
        result = reducer.reduce({"w": of_rank(rank)["a.weight"]}, None)
        return result["w"], reducer.memory["residual"]["w"]

    (mean, first), (_, second) = run(2, work)
    sent = [of_rank(r)["a.weight"] - kept for r, kept in enumerate((first, second))]
    assert [int((s != 0).sum()) for s in sent] == [math.ceil(0.1 * 441)] * 2
    assert torch.equal(mean, (sent[0] + sent[1]) / 2)
    # The contraction of the largest entries.
    x = of_rank(0)["a.weight"]
    assert first.square().sum() <= (1 - 45 / 441) * x.square().sum()


def test_without_error_feedback_nothing_is_kept():
    def work(rank):
        reducer = TopK(0.1, error_feedback=False), PowerSGD(1, error_feedback=False, start_step=0, warm_start=False)
        for r in reducer:
            r.reduce(of_rank(rank), None)
        return [r.memory["residual"] for r in reducer], reducer[1].memory["factor"]

    assert run(2, work)[0] == ([{}, {}], {})


def test_the_full_rank_is_the_mean_and_a_low_rank_of_a_low_rank_matrix_too():
    def work(rank):
        full = PowerSGD(64, start_step=0, min_compression_rate=0.01)
        low = PowerSGD(2, start_step=0)
        g = of_rank(rank)
        thin = draw(40, 1, seed=1) @ draw(1, 30, seed=2) * (rank + 1)
        assert full.compresses("conv", g["conv"]), "at twice its size"
        assert low.compresses("w", thin)
        return full.reduce(g, None), low.reduce({"w": thin}, None)["w"], thin

    for (full, low, _), expected in zip(run(2, work), [mean_of(2)] * 2, strict=True):
        for name, g in expected.items():
            torch.testing.assert_close(full[name], g, rtol=0, atol=1e-5)
        torch.testing.assert_close(low, draw(40, 1, seed=1) @ draw(1, 30, seed=2) * 1.5, rtol=1e-4, atol=1e-4)


def test_repeated_steps_find_the_leading_subspace():
    """Warm start is power iteration: on a constant gradient the error reaches that of the best rank."""

    def error(warm):
        def work(rank):
            reducer = PowerSGD(3, start_step=0, error_feedback=False, warm_start=warm)
            x = draw(30, 40) * torch.logspace(0, -1, 40)
            for _ in range(12):
                found = reducer.reduce({"w": x}, None)["w"]
            return float((found - x).norm() / reducer.errors(x, [3])[0])

        return run(2, work)[0]

    assert error(True) < 1.01 < 1.05 < error(False)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_killed_and_resumed_equals_never_killed(family):
    def work(rank, stop=None):
        reducer, found = family(start_step=1), []
        for step in range(6):
            if step == stop:
                state = copy.deepcopy(reducer.state_dict())
                reducer = family(start_step=1)
                reducer.load_state_dict(state)
            found.append(reducer.reduce(of_rank(rank, step), None))
        return found, reducer.bytes_sent()

    for stop in (1, 3):
        for (a, sent), (b, again) in zip(run(2, work), run(2, lambda r, s=stop: work(r, s)), strict=True):
            assert sent == again
            for x, y in zip(a, b, strict=True):
                assert all(torch.equal(x[n], y[n]) for n in x)


def test_buckets_of_any_order_give_the_step_they_belong_to():
    """DistributedDataParallel cuts the model into other buckets after the first step; names tell the steps apart."""

    def work(rank):
        reducer = TopK(0.1)
        for step, cut in enumerate(
            [["a.weight", "a.bias", "conv", "one", "gain"]] + [["conv"], ["gain", "a.weight"]] * 2
        ):
            g = of_rank(rank, step)
            reducer.reduce({n: g[n] for n in cut}, None)
        # Names that a whole step did not have are forgotten.
        return reducer.memory.steps, set(reducer.memory["residual"])

    assert run(2, work) == [(3, {"conv", "a.weight"})] * 2


def test_residuals_move_with_their_parameters_through_a_rewrite():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

    def work(rank):
        model = nn.Sequential(*copy.deepcopy(blocks))
        reducer = TopK(0.1)
        handle = attach(model, reducer)
        for i, layer in enumerate(model):
            layer.weight.grad = draw(8, 8, seed=10 * rank + i)
        handle.reduce()
        before = {n: r.clone() for n, r in reducer.memory["residual"].items()}
        # The middle block goes, the last takes its name; a new one of the same shape takes the last one's.
        model = nn.Sequential(model[0], model[2], nn.Linear(8, 8, bias=False))
        attach(model, reducer)
        after = reducer.memory["residual"]
        assert set(after) == {"0.weight", "1.weight"}
        assert torch.equal(after["1.weight"], before["2.weight"])
        # A wrong shape under a known name begins at zero.
        fresh = TopK(0.1)
        fresh.load_state_dict(copy.deepcopy(reducer.state_dict()))
        found = fresh.reduce({"1.weight": draw(4, 63, seed=rank)}, None)["1.weight"]
        alone = TopK(0.1).reduce({"1.weight": draw(4, 63, seed=rank)}, None)["1.weight"]
        assert torch.equal(found, alone)

    run(2, work)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_alone_nothing_is_lost_and_before_the_first_step_everything_goes_raw(family):
    g = of_rank(0)
    alone = family()
    assert all(torch.equal(alone.reduce(g, None)[n], g[n]) for n in g)
    assert alone.bytes_sent() == 0

    def work(rank):
        late, plain = family(start_step=2), Mean()
        for step in range(2):
            a, b = (r.reduce(of_rank(rank, step), None) for r in (late, plain))
            assert all(torch.equal(a[n], b[n]) for n in a)
        assert late.bytes_sent() == plain.bytes_sent()
        third = late.reduce(of_rank(rank, 2), None)
        return torch.equal(third["conv"], plain.reduce(of_rank(rank, 2), None)["conv"])

    assert run(2, work) == [False, False]


def test_each_layer_has_a_knob_of_its_own():
    def work(rank):
        reducer = QSGD(4, bucket=64)
        reducer.reduce(of_rank(rank), None)
        before = reducer.bytes_sent()
        reducer.set_options({"conv": 8})
        reducer.reduce(of_rank(rank), None)
        return reducer.bytes_sent() - 2 * before

    assert run(2, work) == [4 * 288 // 8] * 2
    with pytest.raises(LaminaError, match="bits must be a whole number from 2 to 8, got 1"):
        QSGD().set_options({"w": 1})


# --- faults


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_worker_that_sends_what_is_no_number_is_named_and_leaves_no_trace(family, poison):
    def work(rank):
        reducer = family()
        reducer.reduce(of_rank(rank), None)
        before = copy.deepcopy(reducer.state_dict()["memory"]["residual"])
        bad = of_rank(rank, 1)
        if rank == 1:
            bad["conv"][0, 0, 0, 0] = poison
        with pytest.raises(LaminaError, match=r"NaN or infinity: worker 1 in 'conv'; nothing was combined"):
            reducer.reduce(bad, None)
        after = reducer.state_dict()["memory"]["residual"]
        assert all(torch.equal(before[n], after[n]) for n in before)
        # The same step once more, with the gradient mended.
        assert all(g.isfinite().all() for g in reducer.reduce(of_rank(rank, 1), None).values())

    run(3, work)


def test_a_loss_scaler_sees_infinity_and_the_residuals_do_not():
    def work(rank):
        reducer = TopK(0.1, nonfinite="pass_on")
        bad = of_rank(rank)
        bad["conv"] *= math.inf if rank == 0 else 1.0
        found = reducer.reduce(bad, None)
        assert not found["conv"].isfinite().all()
        torch.testing.assert_close(found["a.weight"], mean_of(2)["a.weight"])
        return reducer.memory["residual"], reducer.report()["passed_on"]

    assert run(2, work) == [({}, 1)] * 2


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_workers_with_other_shapes_names_or_knobs_are_told_on_every_worker(family):
    def other(rank, how):
        g, reducer = of_rank(rank), family()
        if rank == 2:
            if how == "shape":
                g["a.weight"] = g["a.weight"].T.contiguous()
            elif how == "name":
                g["b.weight"] = g.pop("a.weight")
            else:
                reducer.set_options({"conv": {"bits": 4, "density": 0.5, "rank": 1}[reducer.knob]})
        with pytest.raises(ShapeError, match=r"workers \[2\] sent gradients of other names, shapes, types or knobs"):
            reducer.reduce(g, None)

    for how in ("shape", "name", "knob"):
        run(3, lambda rank, how=how: other(rank, how))


def test_a_worker_without_any_gradient_is_told_so():
    handle = attach(nn.Linear(2, 2), TopK())
    with pytest.raises(LaminaError, match=r"no parameter has a gradient to combine: call backward\(\) before"):
        handle.reduce()


def test_sparse_gradients_are_refused():
    def work(rank):
        with pytest.raises(PlanError, match="TopK takes dense gradients, but that of 'table' is sparse"):
            TopK().reduce({"table": torch.eye(3).to_sparse()}, None)

    run(2, work)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: QSGD(1), "bits must be a whole number from 2 to 8, got 1"),
        (lambda: QSGD(True), "bits must be"),
        (lambda: QSGD(bucket=0), "bucket must be a whole number of at least 1, got 0"),
        (lambda: QSGD(scale="mean"), "scale must be 'max' or 'l2', got 'mean'"),
        (lambda: TopK(1.5), "density must be above 0 and at most 1, got 1.5"),
        (lambda: TopK(math.nan), "density must be above 0"),
        (lambda: PowerSGD(0), "rank must be a whole number of at least 1, got 0"),
        (lambda: PowerSGD(2.5), "rank must be a whole number of at least 1, got 2.5"),
        (lambda: PowerSGD(min_compression_rate=0), "min_compression_rate must be above 0, got 0"),
        (lambda: PowerSGD(error="qr"), "error must be 'svd' or 'power', got 'qr'"),
        (lambda: TopK(start_step=-1), "start_step must be a whole number of at least 0, got -1"),
        (lambda: TopK(nonfinite="drop"), "nonfinite must be 'raise' or 'pass_on', got 'drop'"),
    ],
)
def test_bad_options_are_refused(make, sentence):
    with pytest.raises(LaminaError, match=sentence):
        make()
