"""What every pass must do, on our model and on three foreign ones, alone and after every other pass."""

import copy
import itertools
import json
import warnings

import pytest
import torch
from tests.contract.collect import label, make, of
from tests.contract.foreign import ALL, FOREIGN, runs_bf16_lstm
from torch import nn

from lamina import io
from lamina.batches import call, logits
from lamina.errors import LaminaError
from lamina.rewrite import check_order, history, replay, rewrite
from lamina.rewrite.rewriting import from_json, to_json

PASSES = of("pass")
DISTINCT = list({e.name: e for e in reversed(PASSES)}.values())[::-1]
"""The first example of each pass: pairs grow with the square."""

DONE = {}
"""What `rewritten` gave, by example and model: half of this file's time was rewriting the same models again."""

CASES = [pytest.param(e, where, id=f"{label(e)}-{where}") for e in PASSES for where in ALL]
FAST = ("ours", "llama")

COMPILED = [
    pytest.param(e, where, id=f"{label(e)}-{where}", marks=[] if e in DISTINCT and where in FAST else pytest.mark.slow)
    for e in PASSES
    for where in ALL
    if e in DISTINCT or where in FAST
]
"""Compilation takes seconds: a pass's first example in all models, the others in two, mostly in the slow run."""


def prepared(example, where):
    """Model and batches: the example's own model where it names one and the case is `ours`."""
    if where == "ours" and example.model is not None:
        torch.manual_seed(0)
        model, batch = example.model(), example.batch()
    else:
        model, batch = ALL[where]()
    return model.eval(), batch


def rewritten(example, where):
    """The model before and after, and a batch; None where the pass says in a sentence that it has no place there."""
    key = (PASSES.index(example), where)
    if key not in DONE:
        DONE[key] = first_time(example, where)
    return copy.deepcopy(DONE[key])


def first_time(example, where):
    model, batch = prepared(example, where)
    before = copy.deepcopy(model)
    try:
        result = rewrite(model, make(example), data=[batch])
    except LaminaError as error:
        assert len(str(error)) > 30, "an error that explains nothing"
        for (name, a), b in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b), f"{name} changed although the pass was refused"
        return None
    return before, result, batch


def out(model, batch):
    with torch.no_grad():
        return logits(call(model, batch))


@pytest.mark.parametrize("example", PASSES, ids=label)
def test_a_pass_works_on_its_own_model_and_changes_it(example):
    assert rewritten(example, "ours") is not None


@pytest.mark.parametrize("example", PASSES, ids=label)
def test_a_pass_works_on_a_foreign_model(example):
    if example.only_ours:
        pytest.skip(example.only_ours)
    assert any(rewritten(example, where) is not None for where in FOREIGN)


@pytest.mark.parametrize(("example", "where"), CASES)
def test_its_claim_holds_and_it_is_recorded(example, where):
    done = rewritten(example, where)
    if done is None:
        return
    before, model, batch = done
    old, new = out(before, batch), out(model, batch)
    assert torch.isfinite(new).all()
    claim = make(example).preserves
    if claim == "function":
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    elif claim == "shape":
        assert new.shape == old.shape
    record = history(model)[-1]
    assert record.parameters_after == sum(p.numel() for p in model.parameters())
    assert record.parameters_before == sum(p.numel() for p in before.parameters())


@pytest.mark.parametrize(("example", "where"), CASES)
def test_a_decision_is_json_and_replays_to_the_same_bits(example, where):
    done = rewritten(example, where)
    if done is None:
        return
    before, model, batch = done
    kind = type(make(example))
    record = history(model)[-1]
    stored = json.loads(json.dumps(record.decision))
    assert to_json(from_json(kind, stored, record.version)) == record.decision
    torch.manual_seed(123)  # nothing may hang on the global generator
    again = replay(before, history(model))
    fresh = {n for n, _ in again.named_parameters()}
    assert fresh == {n for n, _ in model.named_parameters()}
    assert torch.equal(out(again.eval(), batch), out(model.eval(), batch))
    with pytest.raises(LaminaError, match=r"version"):
        from_json(kind, stored, record.version + 1)


@pytest.mark.parametrize(("example", "where"), CASES)
def test_a_decision_applies_on_the_meta_device(example, where):
    done = rewritten(example, where)
    if done is None:
        return
    before, model, _ = done
    skeleton = replay(before.to("meta"), history(model))
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in skeleton.parameters())


@pytest.mark.parametrize(("example", "where"), COMPILED)
def test_a_rewritten_model_is_copied_and_compiled(example, where):
    done = rewritten(example, where)
    if done is None:
        return
    _, model, batch = done
    torch.compiler.reset()
    expected = out(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # torch itself breaks the graph at its recurrent layers.
        whole = not any(isinstance(m, nn.RNNBase) for m in model.modules())
        # What becomes of a graph once traced is the parts' own contract.
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=whole)
        torch.testing.assert_close(out(compiled, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("example", "where"), CASES)
def test_a_rewritten_model_trains_also_in_bf16(example, where):
    done = rewritten(example, where)
    if done is None:
        return
    _, model, batch = done
    expected = out(model, batch)
    if runs_bf16_lstm() or not any(isinstance(m, nn.LSTM) for m in model.modules()):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = out(model, batch).float()
        assert (rounded - expected).abs().max() <= 0.1 * expected.abs().max().clamp(min=0.1)
    logits(call(model.train(), batch)).float().square().mean().backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None, f"no gradient reaches {name}"


@pytest.mark.parametrize(("example", "where"), [c for c in CASES if c.values[1] in ("ours", "llama", "vision")])
def test_a_rewritten_model_is_saved_and_loaded_bit_for_bit(example, where, tmp_path):
    done = rewritten(example, where)
    if done is None:
        return
    _, model, batch = done
    base = "tests.contract.foreign:HomeMade" if isinstance(model, FOREIGN["home_made"]()[0].__class__) else None
    io.save(model, tmp_path / "saved", base=base)
    torch.manual_seed(123)
    loaded = io.load(tmp_path / "saved")
    assert torch.equal(out(loaded, batch), out(model.eval(), batch))
    assert history(loaded) == history(model)


@pytest.mark.parametrize(("example", "where"), CASES)
def test_the_optimizer_follows(example, where):
    model, batch = prepared(example, where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    logits(call(model.train(), batch)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    try:
        model = rewrite(model.eval(), make(example), data=[batch], optimizer=optimizer)
    except LaminaError:
        return
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    for p in model.parameters():
        if id(p) in kept:
            assert torch.equal(optimizer.state[p]["exp_avg"], kept[id(p)])
    logits(call(model.train(), batch)).float().square().mean().backward()
    optimizer.step()


PAIRS = [pytest.param(a, b, id=f"{a.name}-{b.name}") for a, b in itertools.product(DISTINCT, DISTINCT)]


def pair_works(first, second, where):
    """Run two passes one after the other and replay both; False where either says in a sentence why not."""
    done = rewritten(first, where)
    if done is None:
        return False
    original, model, batch = done
    two = make(second)
    try:
        check_order([make(first), two])
        model = rewrite(model, two, data=[batch])
    except LaminaError as error:
        assert len(str(error)) > 30
        return False
    new = out(model.eval(), batch)
    assert torch.isfinite(new).all()
    assert torch.equal(out(replay(original, history(model)).eval(), batch), new)
    return True


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_an_ordered_pair_works_or_says_why_not(first, second):
    # One model a pair; which one turns with the pair, so that a pass meets all of them.
    turn = (DISTINCT.index(first) + DISTINCT.index(second)) % len(FOREIGN)
    places = list(FOREIGN)[turn:] + list(FOREIGN)[:turn]
    if first.only_ours or second.only_ours:
        # Refused in all of them, as a rule: one sentence is enough.
        places = places[:1]
    any(pair_works(first, second, where) for where in places)


@pytest.mark.parametrize("second", ["drop_mlp", "replace", "hypercomplex"])
def test_a_pair_with_nothing_between_them_works_in_either_order(second):
    drop, other = (next(e for e in DISTINCT if e.name == name) for name in ("drop_attention", second))
    assert pair_works(drop, other, "llama")
    assert pair_works(other, drop, "llama")


@pytest.mark.parametrize("example", [e for e in PASSES if e.bad], ids=label)
def test_bad_options_are_refused_before_anything_changes(example):
    model, batch = prepared(example, "ours")
    option, value = next(iter(example.bad.items()))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LaminaError, match=r"\w+ \w+"):
        changed = type(example)("pass", example.name, {**example.options, option: value})
        rewrite(model, make(changed), data=[batch])
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("example", PASSES, ids=label)
def test_a_pass_that_changes_nothing_is_an_error(example):
    class Nothing(type(make(example))):
        def apply(self, model, decision, lineage):
            return model

    model, batch = prepared(example, "ours")
    one = make(example)
    one.__class__ = Nothing
    with pytest.raises(LaminaError, match="changed nothing"):
        rewrite(model, one, data=[batch])
