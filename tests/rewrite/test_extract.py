"""Cutting parts out of elastic models: the same bits, their own statistics, optimizer states by rows."""

from __future__ import annotations

import copy
import io as memory
import warnings
from collections.abc import Iterator

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import ALL, llama
from tests.onnx_export import export
from tests.rewrite.test_elastic import images, mobile
from torch import Tensor, nn

from lamina import io
from lamina.batches import call, logits
from lamina.errors import LaminaError
from lamina.models import ResNet
from lamina.nn import is_elastic, supernet
from lamina.objectives import Sandwich
from lamina.rewrite import Elastic, Extract, cut_out, rewrite
from lamina.rewrite.extract import Kept

pytest.importorskip("transformers")


def net() -> nn.Module:
    torch.manual_seed(0)
    return ResNet((2, 2), (8, 16), stem="small", channels=1, classes=3).eval()


def elastic() -> nn.Module:
    return rewrite(net(), Elastic((1, 2), (0.5,), multiple=2))


def batch(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 1, 7, 7, generator=torch.Generator().manual_seed(seed))}


EXAMPLES = [
    Example(
        "pass",
        "extract",
        model=elastic,
        batch=batch,
        only_ours="it cuts out of what `elastic` made, which is no foreign model",
        bad={"config": {"width": [1]}},
    ),
]


def out(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(call(model, rows))


def quietly(model: nn.Module, part: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return cut_out(model, part)  # type: ignore[arg-type]


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


@pytest.mark.parametrize(
    ("where", "mode"), [*((w, "slice") for w in ALL), ("convolutional", "mask"), ("llama", "mask")]
)
def test_a_part_cut_out_computes_what_the_elastic_model_does_set_to_it(where: str, mode: str) -> None:
    model, rows = ALL[where]()
    model = rewrite(model.eval(), Elastic((2,), (0.5,), multiple=4, mode=mode))
    view = supernet(model)
    for part in (view.smallest(), view.sample(torch.Generator().manual_seed(1)), view.full()):
        with view.running_as(part):
            expected = out(model, rows)
        cut = quietly(model, part)
        if mode == "slice" or part == view.full():
            assert torch.equal(out(cut, rows), expected)
        else:
            torch.testing.assert_close(out(cut, rows), expected, rtol=1e-4, atol=1e-5)
        assert not is_elastic(cut)
        assert {type(m) for m in cut.modules()} <= {type(m) for m in ALL[where]()[0].modules()}
        assert not storages(model) & storages(cut)
    assert is_elastic(model), "the supernet stays"


def test_a_weight_that_a_block_which_goes_shares_with_one_that_stays_is_copied() -> None:
    model, rows = ALL["home_made"]()
    model.stack[-1].net[0].weight = model.stack[0].net[0].weight
    model = rewrite(model.eval(), Elastic((1,), (0.5,), multiple=4))
    view = supernet(model)
    with view.running_as(view.smallest()):
        expected = out(model, rows)
    cut = quietly(model, view.smallest())
    assert len(cut.stack) == 1
    assert torch.equal(out(cut, rows), expected)
    assert not storages(model) & storages(cut)


def test_a_layer_at_two_places_is_cut_at_both() -> None:
    torch.manual_seed(0)
    model = mobile()
    model.stages[0][2].depthwise[0] = model.stages[0][1].depthwise[0]
    model = rewrite(model, Elastic((3,), (4,), (3, 5)))
    view = supernet(model)
    with view.running_as(view.smallest()):
        expected = out(model, {"pixel_values": images()})
    cut = quietly(model, view.smallest())
    assert cut.stages[0][2].depthwise[0] is cut.stages[0][1].depthwise[0]
    assert type(cut.stages[0][2].depthwise[0]) is nn.Conv2d
    assert torch.equal(out(cut, {"pixel_values": images()}), expected)


def test_in_half_precision_too() -> None:
    model = elastic().bfloat16()
    rows = {"pixel_values": batch()["pixel_values"].bfloat16()}
    view = supernet(model)
    with view.running_as(view.smallest()):
        expected = out(model, rows)
    cut = quietly(model, view.smallest())
    assert torch.equal(out(cut, rows), expected)
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}


def test_a_cut_layer_says_its_own_sizes_and_holds_no_more_than_it_needs() -> None:
    model = elastic()
    cut = quietly(model, supernet(model).smallest())
    conv, norm = cut.stages[1][0].conv1, cut.stages[1][0].norm1
    assert (conv.in_channels, conv.out_channels, norm.num_features) == (8, 8, 8)
    assert type(conv) is nn.Conv2d
    assert conv.weight.untyped_storage().nbytes() == 8 * 8 * 9 * 4
    assert len(cut.stages[0]) == 1
    assert not storages(model) & storages(cut)
    assert repr(conv).startswith("Conv2d(8, 8, kernel_size=(3, 3), stride=(2, 2)")


def test_a_decoder_goes_on_from_its_cache_after_blocks_are_gone() -> None:
    model, rows = llama()
    cut = quietly(rewrite(model.eval(), Elastic((2,), (0.5,), multiple=4)), {"depth": [2]})
    assert cut.config.num_hidden_layers == 2
    whole = cut(**rows).logits
    first = cut(rows["input_ids"][:, :5], use_cache=True)
    rest = cut(rows["input_ids"][:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-5)


def stream(count: int, rows: int) -> Iterator[dict[str, Tensor]]:
    x = batch(count, seed=5)["pixel_values"]
    yield from ({"pixel_values": part} for part in x.split(rows))


@pytest.mark.parametrize("rows", [4, 6, 24])
def test_statistics_are_the_mean_over_all_images_whatever_the_batches(rows: int) -> None:
    model = elastic()
    cut = cut_out(model, supernet(model).smallest(), stream(24, rows), images=24)
    with torch.no_grad():
        maps = cut.stem[0](batch(24, seed=5)["pixel_values"])
    torch.testing.assert_close(cut.stem[1].running_mean, maps.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_a_batch_of_another_length_would_weigh_too_much_and_is_left_out() -> None:
    model = elastic()
    decision = Extract(images=100).decide(model, stream(10, 4))
    assert decision.images == 8
    assert Extract(images=5).decide(model, stream(24, 4)).images == 8
    whole = Extract("full").decide(model, stream(8, 4))
    assert whole.statistics == {}, "those of the whole are its own"


def trained() -> nn.Module:
    """Three classes, learned by the whole and the smallest part, with statistics of the whole."""
    model = elastic().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = Sandwich("classification", samples=0, start=0.0, ramp=0.0)
    for step in range(25):
        x, y = task(32, step)
        objective(model, {"pixel_values": x, "labels": y})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def task(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    x = torch.randn(rows, 1, 8, 8, generator=generator) * 0.3
    x += 3 * torch.eye(8).roll(1, 0)[None, None] * (y == 1).view(-1, 1, 1, 1) + 2.0 * (y == 2).view(-1, 1, 1, 1)
    return x, y


def test_a_part_without_statistics_of_its_own_is_worth_little_and_that_is_said() -> None:
    model = trained()
    x, y = task(300, 99)
    with pytest.warns(UserWarning, match="statistics of the whole, with which it predicts next to nothing: pass data"):
        bare = cut_out(model, supernet(model).smallest())
    calibrated = cut_out(model, supernet(model).smallest(), [{"pixel_values": task(64, s)[0]} for s in range(8)])
    with torch.no_grad():
        found = {n: nn.functional.cross_entropy(m(x), y) for n, m in (("bare", bare), ("calibrated", calibrated))}
        assert (calibrated(x).argmax(-1) == y).float().mean() > 0.95
    assert found["bare"] > 3 * found["calibrated"]


def test_momentum_follows_the_rows_that_are_kept() -> None:
    model = elastic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    call(model, batch()).square().sum().backward()
    optimizer.step()
    block = model.stages[1][0]
    old = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in block.named_parameters()}
    order = block.conv1.elastic_out_order[:8]
    cut = rewrite(model, Extract("smallest"), data=[batch()], optimizer=optimizer)
    new = dict(cut.stages[1][0].named_parameters())
    for name in ("conv1.weight", "norm1.weight", "norm1.bias"):
        assert torch.equal(optimizer.state[new[name]]["momentum_buffer"], old[name][order])
    assert not optimizer.state.get(new["conv2.weight"]), "columns are cut: fresh"
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in cut.parameters()}


def test_it_is_saved_and_loaded_with_its_statistics(tmp_path) -> None:
    cut = cut_out(elastic(), {"depth": [1, 2]}, [batch()])
    io.save(cut, tmp_path / "part")
    loaded = io.load(tmp_path / "part")
    assert torch.equal(out(loaded, batch()), out(cut, batch()))
    assert [len(s) for s in loaded.stages] == [1, 2]
    stored = memory.BytesIO()
    torch.save(cut, stored)
    stored.seek(0)
    assert torch.equal(out(torch.load(stored, weights_only=False), batch()), out(cut, batch()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own exporter
def test_a_part_is_exported_to_onnx_and_by_torch() -> None:
    cut = copy.deepcopy(quietly(elastic(), {"depth": [1, 2]}))
    exported = torch.export.export(cut, (batch()["pixel_values"],))
    torch.testing.assert_close(exported.module()(batch()["pixel_values"]), out(cut, batch()))
    pytest.importorskip("onnxscript")
    export(cut, (batch()["pixel_values"],))


def test_bad_parts_are_refused() -> None:
    with pytest.raises(LaminaError, match="config is 'smallest', 'full' or a mapping"):
        Extract("tiny")  # type: ignore[arg-type]
    with pytest.raises(LaminaError, match="images must be a whole number"):
        Extract(images=0)
    with pytest.raises(LaminaError, match="is not elastic"):
        Extract().decide(net())
    assert Kept() == Kept(None, None, None)
