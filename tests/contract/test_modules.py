"""What every layer, norm, mixer, field and model must do, with nothing written by its author but an example."""

import contextlib
import copy
import inspect
import warnings

import pytest
import torch
from tests.contract.collect import label, make, of
from tests.onnx_export import export
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves, tree_map

from lamina import io
from lamina.batches import call
from lamina.errors import LaminaError

ALL = of("norm", "layer", "mixer", "field", "model")
MODULES = [e for e in ALL if not e.size_of]
REPRESENTATIVE = {"layer_norm", "attention", "feed_forward", "transformer"}

FIRST = list({e.name: e for e in reversed(MODULES)}.values())
"""The first example of each part."""


def backend_of(example):
    """Inductor for a few; a part's gradients in the graph for its first example, but of models, which consist of parts
    and have compiled tests of their own, as of further examples, only that one graph holds them."""
    if example.name in REPRESENTATIVE and example in FIRST:
        return "inductor"
    return "aot_eager" if example.kind != "model" and example in FIRST else "eager"


def seeded(example):
    torch.manual_seed(0)
    return make(example)


def feed(example):
    torch.manual_seed(1)
    if example.kind == "model":
        batch = dict(example.batch())
        return lambda m: call(m, batch)
    inputs = example.inputs()
    return lambda m: m(*inputs)


def arguments(example, module):
    """What forward takes: positional tensors, named ones."""
    torch.manual_seed(1)
    if example.kind != "model":
        return example.inputs(), {}
    known = inspect.signature(module.forward).parameters
    return (), {k: v for k, v in example.batch().items() if k in known and k != "labels"}


def tensors(value):
    """Every floating tensor of an output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Distribution):
        return [getattr(value, name) for name in value.arg_constraints]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for v in values for t in tensors(v)]


def loss_of(value):
    return sum(t.float().square().mean() for t in tensors(value))


def step(example, module, optimizer, run):
    torch.manual_seed(2)  # dropout and the like, the same in every arm
    optimizer.zero_grad()
    loss = loss_of(run(module))
    loss.backward()
    optimizer.step()
    return loss.detach()


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def same(left, right):
    left, right = tensors(left), tensors(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_forward_is_finite_and_gradients_reach_every_parameter(example):
    module, run = seeded(example), feed(example)
    outputs = run(module)
    assert all(torch.isfinite(t).all() for t in tensors(outputs))
    if trained(module):
        loss_of(outputs).backward()
        for name, p in module.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, f"no gradient reaches {name}"
                assert torch.isfinite(p.grad).all(), name


PASSED_ON = {"hypernetwork", "data_condition"}
"""The module that the user put inside takes x, and says what it thinks of it."""


@pytest.mark.parametrize("example", MODULES, ids=label)
@pytest.mark.parametrize("change", ["integers", "no examples"])
def test_what_it_cannot_take_is_refused_in_a_sentence(example, change):
    module = seeded(example).eval()
    by_torch = any(c.__module__.startswith("torch.nn.modules") and c is not nn.Module for c in type(module).__mro__)
    if example.kind == "model" or by_torch or example.name in PASSED_ON or not example.inputs()[0].is_floating_point():
        pytest.skip("torch's own layer, or one whose input is another module's affair")
    x, *rest = example.inputs()
    with contextlib.suppress(LaminaError, TypeError):  # Or it takes it; torch's own errors get through.
        module(x.mul(3).long() if change == "integers" else x[:0], *rest)


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_bf16_autocast_stays_near_float32(example):
    if example.no_autocast:
        pytest.skip(example.no_autocast)
    module, run = seeded(example).eval(), feed(example)
    with torch.no_grad():
        exact = tensors(run(module))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = tensors(run(module))
    for a, b in zip(exact, rounded, strict=True):
        scale = a.abs().max().clamp(min=1e-3)
        assert (a - b.float()).abs().max() <= 0.08 * scale


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_one_graph_of_torch_compile_gives_the_eager_outputs_and_gradients(example):
    if example.no_compile:
        pytest.skip(example.no_compile)
    torch.compiler.reset()
    eager, run = seeded(example), feed(example)
    compiled_of = copy.deepcopy(eager)
    compiled = torch.compile(compiled_of, backend=backend_of(example), fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        expected = run(eager)
        torch.manual_seed(2)
        found = run(compiled)
    for a, b in zip(tensors(expected), tensors(found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if trained(eager):
        loss_of(expected).backward()
        loss_of(found).backward()
        for (name, a), b in zip(eager.named_parameters(), compiled_of.parameters(), strict=True):
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_a_state_dict_carries_everything(example):
    module, run = seeded(example), feed(example)
    if trained(module):
        step(example, module, torch.optim.SGD(trained(module), lr=0.1), run)
    torch.manual_seed(99)
    other = make(example)
    other.load_state_dict(module.state_dict(), strict=True)
    same(run(module.eval()), run(other.eval()))


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_a_deep_copy_is_equal_and_independent(example):
    module, run = seeded(example).eval(), feed(example)
    before = [t.detach().clone() for t in tensors(run(module))]
    other = copy.deepcopy(module)
    same(run(module), run(other))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    same(before, [t.detach() for t in tensors(run(module))])


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_killed_and_resumed_equals_never_killed(example):
    run = feed(example)
    whole = seeded(example)
    if not trained(whole):
        pytest.skip("has no parameters to train")
    optimizer = torch.optim.AdamW(trained(whole), lr=1e-2)
    expected = [step(example, whole, optimizer, run) for _ in range(4)]
    first = seeded(example)
    optimizer = torch.optim.AdamW(trained(first), lr=1e-2)
    found = [step(example, first, optimizer, run) for _ in range(2)]
    state = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    torch.manual_seed(99)
    second = make(example)
    optimizer = torch.optim.AdamW(trained(second), lr=1e-2)
    second.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    found += [step(example, second, optimizer, run) for _ in range(2)]
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("example", [e for e in MODULES if e.kind == "model"], ids=label)
def test_a_model_is_saved_and_loaded_bit_for_bit(example, tmp_path):
    model, run = seeded(example).eval(), feed(example)
    io.save(model, tmp_path / "saved")
    torch.manual_seed(99)
    same(run(model), run(io.load(tmp_path / "saved")))


@pytest.mark.parametrize("example", [e for e in MODULES if e.kind == "model"], ids=label)
def test_a_model_is_built_on_the_meta_device_without_memory(example):
    with torch.device("meta"):
        model = make(example)
    real = seeded(example)
    assert all(p.is_meta for p in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_without_memory_it_gives_the_shapes_or_says_that_it_needs_numbers(example):
    """`lamina check` and the start of `lamina train` send a batch through a model on meta."""
    module = seeded(example).eval()
    positional, named = arguments(example, module)
    expected = [t.shape for t in tensors(module(*positional, **named))]
    positional, named = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (positional, named))
    try:
        found = module.to("meta")(*positional, **named)
    except (NotImplementedError, RuntimeError) as error:
        assert isinstance(error, NotImplementedError) or "meta" in str(error).lower()
    else:
        assert [t.shape for t in tensors(found)] == expected


@pytest.mark.parametrize("example", [e for e in MODULES if not e.no_compile], ids=label)
def test_torch_export_takes_it(example):
    module = seeded(example).eval()
    positional, named = arguments(example, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, positional, named)
    found, expected = exported.module()(*positional, **named), module(*positional, **named)
    for a, b in zip(tensors(expected), tensors(found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # A second each; there are many.
@pytest.mark.parametrize("example", [e for e in MODULES if not (e.no_compile or e.no_onnx)], ids=label)
def test_onnx_runs_it_to_the_same_outputs(example, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = seeded(example).eval()
    positional, named = arguments(example, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export(module, positional, kwargs=named)
    program.save(tmp_path / "module.onnx")
    session = runtime.InferenceSession(tmp_path / "module.onnx", providers=["CPUExecutionProvider"])
    fed = [t.numpy() for t in tree_leaves((positional, named)) if isinstance(t, Tensor)]
    found = session.run(None, {i.name: t for i, t in zip(session.get_inputs(), fed, strict=True)})
    found = [t for t in map(torch.from_numpy, found) if t.is_floating_point()]
    with torch.no_grad():
        expected = tensors(module(*positional, **named))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("example", [e for e in ALL if e.size_of], ids=label)
def test_a_size_of_another_part_is_built_and_run_without_memory(example):
    assert example.size_of in {e.name for e in MODULES if e.kind == example.kind}
    with torch.device("meta"):
        model = make(example)
        outputs = call(model, {k: v.to("meta") for k, v in example.batch().items()})
    assert all(t.is_meta for t in tensors(outputs))
    assert len(tensors(outputs)) > 0


def test_the_representatives_are_still_there():
    assert {e.name for e in MODULES} >= REPRESENTATIVE
    assert isinstance(seeded(MODULES[0]), nn.Module)
