"""Random-feature attention: its features, its kernel, and what can be learned with it in closed form."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.onnx_export import export
from torch import Tensor, nn

from lamina.errors import LaminaError, ShapeError
from lamina.nn import RandomFeatureAttention, attention_features, fit_ridge, random_feature_attention
from lamina.nn.random_feature_mlp import expected_product


def sphere(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)


def pair(rows: int, keys: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return sphere(rows, width, seed=seed, dtype=dtype), sphere(rows, keys, width, seed=seed + 1000, dtype=dtype)


def example_inputs() -> tuple[Tensor, ...]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    return (*pair(3, 4, 5, dtype=torch.float32), mask)


class Trained(RandomFeatureAttention):
    """With values that are not zero, so that what flows back through them is seen."""

    def __init__(self, width: int, num_heads: int, **options: Any) -> None:
        super().__init__(width, num_heads, **options)
        with torch.no_grad():
            self.value.fill_(0.3)


EXAMPLES = [
    Example(
        "layer",
        "random_feature_attention",
        {"width": 5, "num_heads": 6, "out_features": 2},
        example_inputs,
        bad={"num_heads": 0},
    ),
    Example(
        "layer",
        "random_feature_attention",
        {"width": 5, "num_heads": 3, "activation": "softmax", "bias_scale": 2.0, "normalize": True},
        example_inputs,
        bad={"activation": "tanh"},
    ),
]


def layer(width: int = 5, heads: int = 6, outputs: int = 1, **options: Any) -> RandomFeatureAttention:
    return RandomFeatureAttention(width, heads, outputs, **options).double()


def by_loops(made: RandomFeatureAttention, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition, number by number."""
    weight, bias = made.features.weight.tolist(), [1.0] if made.features.append_bias else []
    rows = []
    for b in range(len(query)):
        x0 = query[b].tolist() + bias
        kept = [i for i in range(keys.shape[1]) if mask is None or bool(mask[b, i])]
        row = []
        for head in weight:
            xs = [keys[b, i].tolist() + bias for i in kept]
            scores = [sum(x0[a] * head[a][c] * x[c] for a in range(len(x0)) for c in range(len(x0))) for x in xs]
            if made.features.activation == "relu":
                weights = [max(s, 0.0) / len(kept) for s in scores]
            else:
                weights = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
            row += [sum(w * x[a] for w, x in zip(weights, xs, strict=True)) for a in range(len(x0))]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "keys", "width", "heads"), [(3, 4, 5, 6), (1, 1, 1, 1), (7, 7, 7, 1), (2, 63, 3, 7)])
@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("append_bias", [True, False])
def test_features_are_those_of_the_triple_loop(
    rows: int, keys: int, width: int, heads: int, activation: Any, append_bias: bool
) -> None:
    made = layer(width, heads, activation=activation, append_bias=append_bias, bias_scale=0.5)
    query, others = pair(rows, keys, width)
    mask = torch.rand(rows, keys, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0] = True
    for masked in (None, mask, mask.long()):
        found = made.features(query, others, masked)
        assert found.shape == (rows, heads * (width + append_bias))
        torch.testing.assert_close(found, by_loops(made, query, others, masked), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 63])
def test_lower_precision_is_near_the_loop(size: int) -> None:
    made, (query, keys) = layer(size, 3), pair(2, 7, size)
    expected = made.features(query, keys)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        low = copy.deepcopy(made).to(dtype)
        found = low.features(query.to(dtype), keys.to(dtype))
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= close * expected.abs().max()
        assert low(query.to(dtype), keys.to(dtype)).dtype == dtype
    single = copy.deepcopy(made).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = single.features(query.float(), keys.float())
        assert found.dtype == torch.bfloat16
        assert single(query.float(), keys.float()).dtype == torch.float32, "what is summed up stays float32"
    assert (found.double() - expected).abs().max() <= 3e-2 * expected.abs().max()


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_a_set_has_no_order_and_no_multiplicity_but_the_query_is_another_thing(activation: Any) -> None:
    made, (query, keys) = layer(activation=activation), pair(3, 4, 5)
    found = made.features(query, keys)
    torch.testing.assert_close(made.features(query, keys[:, [2, 0, 3, 1]]), found)
    torch.testing.assert_close(made.features(query, torch.cat([keys, keys], 1)), found)
    swapped = torch.cat([query[:, None], keys[:, 1:]], 1)
    assert (made.features(keys[:, 0], swapped) - found).abs().max() > 0.05


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("filling", [0.0, 1e30, float("nan")])
def test_padding_changes_nothing_and_sets_may_differ_in_size(activation: Any, filling: float) -> None:
    made, (query, keys) = layer(activation=activation), pair(3, 6, 5)
    sizes = [6, 2, 1]
    mask = torch.arange(6) < torch.tensor(sizes)[:, None]
    padded = keys.masked_fill(~mask[..., None], filling)
    found = made.features(query, padded, mask)
    for row, size in enumerate(sizes):
        alone = made.features(query[row : row + 1], keys[row : row + 1, :size])
        torch.testing.assert_close(found[row : row + 1], alone)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_gradients_to_query_keys_and_values_are_right(activation: Any) -> None:
    made, (query, keys) = layer(heads=2, activation=activation, outputs=2), pair(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        made.value.normal_()

    def run(q: Tensor, k: Tensor, value: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"value": value}, (q, k, mask))

    given = [t.detach().clone().requires_grad_() for t in (query, keys, made.value)]
    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_rows_in_pieces_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch, activation: Any) -> None:
    made, (query, keys) = layer(activation=activation), pair(7, 4, 5)
    mask = torch.rand(7, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 1] = True
    for masked in (None, mask):
        whole = made.features(query, keys, masked)
        monkeypatch.setattr(random_feature_attention, "NUMBERS_AT_ONCE", 80)
        torch.testing.assert_close(made.features(query, keys, masked), whole)
        monkeypatch.undo()
    whole = layer().kernel((query, keys, mask), (query[:2], keys[:2]))
    monkeypatch.setattr(random_feature_attention, "NUMBERS_AT_ONCE", 80)
    torch.testing.assert_close(layer().kernel((query, keys, mask), (query[:2], keys[:2])), whole)


def test_frozen_matrices_have_the_deviation_the_mean_and_the_seed_asked_for() -> None:
    plain, biased = layer(16, 400), layer(16, 400, bias_scale=4.0, weight_std=0.5)
    assert plain.features.weight.std().item() == pytest.approx(0.5, rel=0.01)
    assert plain.features.weight.mean().abs() < 0.01
    expected = torch.zeros(17, 17, dtype=torch.float64)
    expected[range(16), range(16)] = 4.0
    torch.testing.assert_close(biased.features.weight - plain.features.weight, expected.expand(400, -1, -1))
    other = layer(16, 400, seed=1)
    assert not torch.equal(other.features.weight, plain.features.weight)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = layer(16, 400)
    assert torch.equal(again.features.weight, plain.features.weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert [n for n, _ in plain.named_parameters()] == ["value"]
    assert set(plain.state_dict()) == {"value", "intercept", "features.weight"}
    assert plain.value.shape == (1, 400, 17)
    with torch.device("meta"):
        bare = RandomFeatureAttention(4, 2)
        assert bare.features.weight.is_meta
        assert bare(torch.empty(2, 4), torch.empty(2, 3, 4)).shape == (2, 1)


def test_scores_of_unit_norms_have_a_deviation_near_one_and_half_of_the_heads_are_on() -> None:
    made, (query, keys) = layer(16, 500), pair(50, 1, 16)
    q, k = (F.pad(x, (0, 1), value=1.0) for x in (query, keys))
    scores = torch.einsum("ba,mac,bnc->bmn", q, made.features.weight, k)
    assert scores.std().item() == pytest.approx(1.0, abs=0.1)
    on = made.features(query, keys).view(50, 500, 17)[..., -1] > 0
    assert on.double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_relu_of_both_signs_of_the_query_is_linear_attention() -> None:
    made, (query, keys) = layer(append_bias=False), pair(3, 4, 5)
    difference = made.features(query, keys) - made.features(-query, keys)
    scores = torch.einsum("ba,mac,bnc->bmn", query, made.features.weight, keys)
    linear = torch.einsum("bmn,bnc->bmc", scores, keys) / 4
    torch.testing.assert_close(difference, linear.flatten(1))


def test_a_large_bias_makes_every_head_the_same() -> None:
    c, (query, keys) = 1e6, pair(3, 4, 5)
    found = layer(bias_scale=c).features(query, keys).view(3, 6, 6) / c
    inner = torch.einsum("bd,bnd->bn", query, keys).relu()
    expected = torch.einsum("bn,bnd->bd", inner, F.pad(keys, (0, 1), value=1.0)) / 4
    torch.testing.assert_close(found, expected[:, None].expand(-1, 6, -1), rtol=0, atol=2e-6)
    torch.testing.assert_close(layer(bias_scale=0.0).features(query, keys), layer().features(query, keys))


def test_normalize_divides_by_the_norms() -> None:
    made, (query, keys) = layer(normalize=True), pair(3, 4, 5)
    torch.testing.assert_close(made.features(7 * query, 0.1 * keys), layer().features(query, keys))
    large = (30 * query, 30 * keys, torch.ones(3))
    with pytest.warns(UserWarning, match="norms of about 30 and 30"):
        layer().fit(*large, penalty=1.0)
    made.fit(*large, penalty=1.0)


def test_expected_product_is_the_integral() -> None:
    a, b = (sphere(2, 3, seed=s) * torch.tensor([[0.5], [2.0]]).double() for s in (0, 1))
    w = torch.randn(400_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = ((w @ a.t()).relu() * (w @ b.t()).relu()).mean(0)
    found = expected_product((a * b).sum(-1), a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(found, drawn, rtol=0.02, atol=1e-3)
    one = torch.tensor(2.0).double()
    ends = [expected_product(sign * one, one).item() for sign in (1, 0, -1)]
    assert ends == pytest.approx([1.0, 1 / math.pi, 0.0], abs=1e-12)
    assert expected_product(0 * one, 0 * one) == 0


@pytest.mark.parametrize("options", [{}, {"append_bias": False, "weight_std": 1.5}, {"normalize": True}])
def test_the_kernel_is_what_many_heads_come_to(options: dict[str, Any]) -> None:
    first, second = pair(3, 4, 3), pair(2, 5, 3, seed=7)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    exact = layer(3, 1, **options).kernel((*first, mask), second)
    errors = []
    for heads, seeds in ((1000, 40), (10_000, 40)):
        drawn = []
        for seed in range(seeds):
            made = layer(3, heads, seed=seed, **options)
            drawn.append(made.features(*first, mask) @ made.features(*second).t() / heads - exact)
        errors.append(torch.stack(drawn).square().mean().sqrt().item() / exact.abs().mean().item())
    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(math.sqrt(10), rel=0.35)
    same = layer(3, 1, **options)
    torch.testing.assert_close(same.kernel(second, (*first, mask)).t(), exact)
    gram = same.kernel(first, first)
    assert torch.linalg.eigvalsh(gram).min() > -1e-12


def test_the_kernel_without_closed_form_is_refused() -> None:
    for options in ({"bias_scale": 1.0}, {"activation": "softmax"}):
        with pytest.raises(LaminaError, match="closed form for activation='relu' and bias_scale=0 only"):
            layer(**options).kernel(pair(2, 3, 5), pair(2, 3, 5))


def r_squared(guess: Tensor, truth: Tensor) -> float:
    return 1 - ((guess - truth).square().mean() / truth.var(correction=0)).item()


def random_values(made: RandomFeatureAttention, seed: int) -> RandomFeatureAttention:
    with torch.no_grad():
        made.value.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def test_a_function_of_its_own_is_learned_exactly() -> None:
    target, made, (query, keys), test = random_values(layer(3, 12), 3), layer(3, 12), pair(200, 5, 3), pair(99, 5, 3, 9)
    with torch.no_grad():
        made.fit(query, keys, target(query, keys))
        assert r_squared(made(*test), target(*test)) > 0.999


def test_a_function_of_other_heads_is_learned_the_better_the_more_rows() -> None:
    target, (query, keys), test = random_values(layer(3, 12, seed=1), 3), pair(800, 5, 3), pair(99, 5, 3, 9)
    left = []
    for rows in (25, 100, 400, 800):
        made = layer(3, 100)
        with torch.no_grad():
            made.fit(query[:rows], keys[:rows], target(query[:rows], keys[:rows]))
            left.append(1 - r_squared(made(*test), target(*test)))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.1 * left[0]


@pytest.mark.parametrize("rows", [15, 60])
def test_gradient_descent_on_the_values_comes_to_the_fit(rows: int) -> None:
    fitted, trained, (query, keys) = layer(3, 6, 2), layer(3, 6, 2), pair(rows, 5, 3)
    y = torch.stack([keys.mean(1)[:, 0], query[:, 1]], 1)
    assert fitted.fit(query, keys, y, penalty=0.01) == pytest.approx(0.01)
    trained.intercept.copy_(fitted.intercept)
    optimizer = torch.optim.LBFGS(trained.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (trained(query, keys) - y).square().sum(1).mean() + 0.01 * trained.value.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(trained.value, fitted.value, rtol=1e-4, atol=1e-6)
    assert trained.features.weight.grad is None
    assert not trained.features.weight.requires_grad


def test_what_was_fitted_is_saved_and_class_numbers_are_ones_against_the_rest() -> None:
    made, (query, keys) = layer(5, 10, 3), pair(60, 4, 5)
    labels = keys.mean(1)[:, :3].argmax(1)
    made.fit(query, keys, F.one_hot(labels, 3).double(), penalty=1e-4)
    fresh = layer(5, 10, 3)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(query, keys), made(query, keys))
    assert (made(query, keys).argmax(1) == labels).double().mean() > 0.9
    fresh.fit(query, keys, labels, penalty=1e-4)
    torch.testing.assert_close(fresh.value, made.value)
    mask = torch.ones(60, 4, dtype=torch.bool)
    ignored = torch.where(torch.arange(60) < 40, labels, -100)
    fresh.fit(query, keys, ignored, penalty=1e-4, mask=mask)
    made.fit(query[:40], keys[:40], labels[:40], penalty=1e-4)
    torch.testing.assert_close(fresh.value, made.value)


def test_it_is_fitted_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, (query, keys) = layer(heads=40), pair(90, 4, 5)
    mask = torch.rand(90, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 1] = True
    y = (mask * keys[..., 0]).sum(1)
    monkeypatch.setattr(random_feature_attention, "FITTED_AT_ONCE", 240)
    assert len(list(pieces._blocks(query, keys, mask, y))) == 90
    chosen = pieces.fit(query, keys, y, mask=mask)
    expected = fit_ridge(pieces.features(query, keys, mask), y)
    assert chosen == pytest.approx(float(expected.penalty))
    torch.testing.assert_close(pieces.value.detach().flatten(), expected.weights, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pieces.intercept[0], expected.intercept)


def test_many_layers_run_at_once_under_vmap() -> None:
    layers = [Trained(5, 3, seed=s).double() for s in range(3)]
    query, keys = sphere(3, 2, 5), sphere(3, 2, 4, 5, seed=1)
    params, buffers = torch.func.stack_module_state(layers)
    template = copy.deepcopy(layers[0])

    def run(p: dict[str, Tensor], b: dict[str, Tensor], q: Tensor, k: Tensor) -> Tensor:
        return torch.func.functional_call(template, {**p, **b}, (q, k))

    found = torch.func.vmap(run)(params, buffers, query, keys)
    expected = torch.stack([one(q, k) for one, q, k in zip(layers, query, keys, strict=True)])
    torch.testing.assert_close(found, expected)


def test_it_compiles_with_gradients_through_its_inputs_and_exports_with_any_batch() -> None:
    made, (query, keys) = Trained(5, 6), pair(3, 4, 5, dtype=torch.float32)
    given = [t.clone().requires_grad_() for t in (query, keys)]
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for run in (made, compiled):
        run(*given).sum().backward()
    eager = [torch.autograd.grad(made(*given).sum(), given)]
    torch.testing.assert_close([g.grad for g in given], [2 * g for g in eager[0]])
    rows, count = torch.export.Dim("rows", min=2), torch.export.Dim("count", min=2)
    shapes = {"query": {0: rows}, "keys": {0: rows, 1: count}}
    exported = torch.export.export(made.eval(), (query, keys), dynamic_shapes=shapes).module()
    other = pair(8, 9, 5, seed=4, dtype=torch.float32)
    torch.testing.assert_close(exported(*other), made(*other))


@pytest.mark.slow  # torch's exporter takes seconds.
def test_onnx_runs_values_that_are_not_zero_to_the_same_outputs(tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made, given = Trained(5, 6, out_features=2).eval(), example_inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export(made, given)
    program.save(tmp_path / "layer.onnx")
    session = runtime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    fed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
    expected = made(*given).detach()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(torch.from_numpy(session.run(None, fed)[0]), expected, rtol=1e-4, atol=1e-4)


def test_the_function_takes_any_matrices() -> None:
    query, keys = pair(3, 4, 5)
    weight = torch.eye(5, dtype=torch.float64)[None]
    found = attention_features(query, keys, weight)
    inner = torch.einsum("bd,bnd->bn", query, keys).relu()
    torch.testing.assert_close(found[:, 0], torch.einsum("bn,bnd->bd", inner, keys) / 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "at least 1, got 0 and 6"),
        ({"num_heads": 0}, "at least 1, got 5 and 0"),
        ({"out_features": 0}, "out_features of at least 1, got 0"),
        ({"weight_std": 0.0}, "weight_std must be above 0"),
        ({"weight_std": math.nan}, "weight_std must be above 0"),
        ({"bias_scale": -1.0}, "bias_scale at least 0"),
        ({"activation": "tanh"}, "'relu' or 'softmax', got 'tanh'"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        RandomFeatureAttention(**{"width": 5, "num_heads": 6, **options})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k: (q[:, :4], k), r"query \(B, 5\) and keys \(B, N, 5\), got \(3, 4\) and \(3, 4, 5\)"),
        (lambda q, k: (q, k[..., :4]), r"got \(3, 5\) and \(3, 4, 4\)"),
        (lambda q, k: (q, k[0]), r"got \(3, 5\) and \(4, 5\)"),
        (lambda q, k: (q[:2], k), "a set of at least one key for every query"),
        (lambda q, k: (q, k[:, :0]), r"at least one key for every query, got \(3, 5\) and \(3, 0, 5\)"),
        (lambda q, k: (q, k.long()), "takes inputs in torch.float64, got torch.float64, torch.int64"),
        (lambda q, k: (q.float(), k.float()), "takes inputs in torch.float64, got torch.float32"),
        (lambda q, k: (q, k, torch.ones(3, 5, dtype=torch.bool)), r"is \(3, 4\) bool, .* got torch.bool \(3, 5\)"),
        (lambda q, k: (q, k, torch.ones(3, 4)), r"got torch.float32 \(3, 4\)"),
        (lambda q, k: (q, k, torch.arange(3)[:, None].expand(3, 4) > 0), r"row 0 are all masked \(1 such rows\)"),
        (lambda q, k: (q / 0, k), r"NaN or infinity in its input of shape \(3, 5\)"),
        (lambda q, k: (q, k * math.nan), r"NaN or infinity in its input of shape \(3, 4, 5\)"),
    ],
)
def test_bad_input_is_refused_with_its_shape(change: Any, words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        layer()(*change(*pair(3, 4, 5)))


def test_targets_that_do_not_fit_are_refused() -> None:
    query, keys = pair(6, 4, 5)
    for outputs, targets, words in (
        (1, torch.zeros(5), "6 queries have 5 targets"),
        (2, torch.zeros(6), "class numbers of 2 classes must be whole, got torch.float32"),
        (2, torch.arange(6), r"must lie in 0\.\.1, got 0 to 5"),
        (2, torch.zeros(6, 3), r"2 outputs are \(n, 2\) or class numbers \(n,\), got \(6, 3\)"),
        (1, torch.full((6,), math.inf), r"targets \(6, 1\) .* NaN or infinity"),
    ):
        with pytest.raises((ShapeError, LaminaError), match=words):
            layer(outputs=outputs).fit(query, keys, targets, penalty=1.0)
    with pytest.raises(LaminaError, match="above 0"):
        layer().fit(query, keys, torch.zeros(6), penalty=-1.0)
    with pytest.raises(LaminaError, match="at least 2 rows to choose"):
        layer().fit(query[:1], keys[:1], torch.zeros(1))


def test_empty_batches_pass() -> None:
    made = layer()
    assert made(torch.zeros(0, 5).double(), torch.zeros(0, 3, 5).double()).shape == (0, 1)
    assert made.kernel((torch.zeros(0, 5).double(), torch.zeros(0, 3, 5).double()), pair(2, 3, 5)).shape == (0, 2)
    assert isinstance(made, nn.Module)
