"""What every part must do on a GPU: the same as on the CPU. Run where there is one: `pytest -m gpu`."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from tests.contract.collect import label, make, of
from tests.contract.test_modules import FIRST, MODULES, feed, loss_of, seeded, tensors
from tests.contract.test_passes import DISTINCT, out, prepared
from tests.contract.test_training_parts import optimize, rows, small, train
from torch import nn
from torch.utils._pytree import tree_map

from lamina.batches import call
from lamina.errors import LaminaError
from lamina.gradients import attach
from lamina.rewrite import rewrite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DRAWN = {"neural_sde", "neural_sde_classifier"}
"""They draw a path on the device, and the generators differ."""
GPU = torch.device("cuda")
"""Not `cuda:0`: what a user writes."""


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """TF32 keeps ten bits of a factor: too few to compare with."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(value, device=GPU):
    """What is made of tensors, on a device."""
    return tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, value)


def near(ours, other):
    """Outputs on the GPU and on the CPU: sums in another order, no more."""
    ours, other = tensors(ours), tensors(other)
    assert len(ours) == len(other) > 0
    for a, b in zip(ours, other, strict=True):
        assert a.device.type == "cuda"
        scale = float(b.detach().abs().max().clamp(min=1e-3))
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=2e-3, atol=2e-4 * scale)


def feed_on(example):
    torch.manual_seed(1)
    if example.kind == "model":
        batch = moved(dict(example.batch()))
        return lambda m: call(m, batch)
    inputs = moved(example.inputs())
    return lambda m: m(*inputs)


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_a_module_gives_the_same_outputs_and_gradients(example):
    if example.name in DRAWN:
        pytest.skip("draws on the device")
    one = seeded(example).eval()
    other = copy.deepcopy(one).to(GPU)
    expected = feed(example)(one)
    # cuDNN's recurrent layers have no gradient in evaluation mode.
    with torch.backends.cudnn.flags(enabled=not any(isinstance(m, nn.RNNBase) for m in one.modules())):
        given = feed_on(example)(other)
    near(given, expected)
    if any(p.requires_grad for p in one.parameters()) and any(t.requires_grad for t in tensors(expected)):
        loss_of(expected).backward()
        loss_of(given).backward()
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            if p.grad is not None:
                scale = float(p.grad.abs().max().clamp(min=1e-2))
                assert (q.grad.cpu() - p.grad).abs().max() <= 5e-3 * scale, name


@pytest.mark.parametrize("example", MODULES, ids=label)
def test_a_module_trains_in_bf16_autocast(example):
    if example.no_autocast:
        pytest.skip(example.no_autocast)
    module = seeded(example).to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = feed_on(example)(module)
        loss = loss_of(outputs)
    assert torch.isfinite(loss)
    if loss.requires_grad:
        loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("example", [e for e in FIRST if e.kind != "model" and not e.no_compile], ids=label)
def test_a_module_runs_by_kernels_generated_for_it(example):
    if example.name in DRAWN:
        pytest.skip("draws on the device")
    torch.compiler.reset()
    module = seeded(example).to(GPU).eval()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    expected, given = feed_on(example)(module), feed_on(example)(compiled)
    for a, b in zip(tensors(given), tensors(expected), strict=True):
        scale = float(b.detach().abs().max().clamp(min=1e-3))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=5e-4 * scale)
    if any(t.requires_grad for t in tensors(expected)):
        loss_of(given).backward()
        assert all(torch.isfinite(p.grad).all() for p in compiled.parameters() if p.grad is not None)


@pytest.mark.parametrize("where", ["ours", "llama", "vision", "convolutional"])
@pytest.mark.parametrize("example", DISTINCT, ids=label)
def test_a_pass_rewrites_a_model_where_it_stands(example, where):
    model, batch = prepared(example, where)
    model, batch = model.to(GPU), moved(dict(batch))
    before = out(model, batch)
    try:
        result = rewrite(model, make(example), data=[batch]).eval()
    except LaminaError as error:
        assert len(str(error)) > 30
        return
    assert {p.device.type for p in result.parameters()} == {"cuda"}
    after = out(result, batch)
    assert torch.isfinite(after).all()
    if make(example).preserves == "function":
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("example", of("objective"), ids=label)
def test_an_objective_gives_the_same_loss(example):
    found = []
    for device in (torch.device("cpu"), GPU):
        torch.manual_seed(0)
        part, model = make(example), example.model().to(device)
        if hasattr(part, "before_rewrite"):
            part.before_rewrite(example.model().to(device))
        if isinstance(part, nn.Module):
            part.to(device)
        torch.manual_seed(1)
        losses = part(model, moved(dict(example.batch()), device))
        losses["loss"].backward()
        found.append(float(losses["loss"]))
    assert found[0] == pytest.approx(found[1], rel=0.02, abs=1e-3)


@pytest.mark.parametrize("example", of("optimizer"), ids=label)
def test_an_optimizer_takes_the_same_steps(example):
    one, other = small(), small().to(GPU)
    expected = train(one, optimize(example, one), 5)
    optimizer, losses = optimize(example, other), []
    for i in range(5):

        def closure(i=i):
            optimizer.zero_grad()
            loss = (other(rows(i).to(GPU)) - 1).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach().cpu())
    torch.testing.assert_close(torch.stack(losses), expected, rtol=5e-3, atol=5e-4)


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    """A group of this one process, by NCCL."""
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=0, world_size=1, timeout=datetime.timedelta(seconds=60)
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("example", of("reducer"), ids=label)
def test_a_reducer_takes_gradients_of_a_gpu(example, nccl):
    model = small().to(GPU)
    try:
        handle = attach(model, make(example))
    except LaminaError as error:
        assert example.workers > 1, error
        return
    model(rows(0).to(GPU)).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    try:
        handle.reduce()
    except LaminaError as error:
        assert len(str(error)) > 30
        return
    for p, g in zip(model.parameters(), before, strict=True):
        assert p.grad.device.type == "cuda"
        assert torch.isfinite(p.grad).all()
        assert (p.grad - g).norm() <= 1.01 * g.norm()
