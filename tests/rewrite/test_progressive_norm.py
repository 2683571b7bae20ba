from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.contract.foreign import home_made, llama, ours, vision
from tests.train.tiny import adamw, data, numbers, trainer
from torch import Tensor, nn

from lamina.anatomy import describe, dissect
from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.nn import PRepBN, RepBN
from lamina.objectives import Classification
from lamina.rewrite import ProgressiveNorm, Replace, history, replay, rewrite
from lamina.train.phases import Scheduled, carry_out

EXAMPLES = [Example("pass", "progressive_norm", bad={"decay_fraction": -0.5})]


def encoder(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"inputs": inputs}


@pytest.mark.parametrize("make", [home_made, llama, vision, ours, encoder, lambda: encoder(norm_first=True)])
def test_in_training_the_outputs_are_the_old_ones_and_the_optimizer_follows(make: Any) -> None:
    model, batch = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        logits(call(model.train(), batch)).square().mean().backward()
        optimizer.step()
    expected = logits(call(model, batch))
    norms = {p: m for p, m in model.named_modules() if "Norm" in type(m).__name__}
    states = {p: optimizer.state[m.weight]["exp_avg"].clone() for p, m in norms.items()}
    weights = {p: m.weight.detach().clone() for p, m in norms.items()}
    model = rewrite(model, ProgressiveNorm(), optimizer=optimizer)
    assert torch.equal(logits(call(model, batch)), expected)
    for path, weight in weights.items():
        new = model.get_submodule(path)
        assert type(new) is PRepBN
        assert torch.equal(new.norm.weight, weight)
        assert torch.equal(new.rep.weight, weight)
        assert torch.equal(optimizer.state[new.norm.weight]["exp_avg"], states[path])
        assert not optimizer.state[new.rep.weight]
        assert new.rep.skip.item() == 1.0
    logits(call(model, batch)).square().mean().backward()
    optimizer.step()


def test_torchs_encoder_calls_the_new_norms_in_evaluation_too() -> None:
    model, batch = encoder(norm_first=True)
    model = rewrite(model, ProgressiveNorm()).eval()
    for norm in (m for m in model.modules() if isinstance(m, RepBN)):
        norm.running_mean.fill_(3.0)
    with torch.no_grad():
        found = model(batch["inputs"])
    torch.testing.assert_close(found, model(batch["inputs"].requires_grad_()).detach())


def test_language_models_may_start_from_the_zero_map() -> None:
    model, _ = llama()
    model = rewrite(model, ProgressiveNorm(skip_init=0.0, scale_init=0.0, warm_fraction=0.1, decay_fraction=0.2))
    norm = model.model.norm
    assert not norm.rep.sync
    assert rewrite(Normed(), ProgressiveNorm(sync=True))[1].rep.sync
    assert type(norm.norm) is nn.RMSNorm
    assert norm.norm.eps == model.config.rms_norm_eps
    assert not norm.rep(torch.randn(5, 16)).any()
    norm.set_progress(0.2)
    assert float(norm.lam) == pytest.approx(0.5)


def test_the_decision_names_every_norm_and_replays() -> None:
    model, _ = vision()
    original = copy.deepcopy(model)
    assert "vit.layernorm: layer_norm of 16 features" in ProgressiveNorm().decide(model).table()
    model = rewrite(model, ProgressiveNorm(match="*layernorm_before"))
    decision = json.loads(json.dumps(history(model)[0].decision))
    assert list(decision["norms"]) == [f"vit.layers.{i}.layernorm_before" for i in range(4)]
    assert decision["norms"]["vit.layers.0.layernorm_before"] == {
        "base": "layer_norm",
        "features": 16,
        "eps": model.config.layer_norm_eps,
    }
    again = replay(original, history(model))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


class Offset(nn.Module):
    """An RMS norm whose gain is 1 + weight, as Gemma's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class OffsetRMSNorm(Offset):
    pass


class PlainRMSNorm(Offset):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class MapLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def test_what_a_foreign_norm_computes_is_tried() -> None:
    model = nn.Sequential(nn.LayerNorm(4), OffsetRMSNorm(4), PlainRMSNorm(4), MapLayerNorm(4), nn.GroupNorm(1, 4))
    with torch.no_grad():
        model[2].weight.uniform_(0.5, 2)
    decision = ProgressiveNorm().decide(model)
    assert {p: n.base for p, n in decision.norms.items()} == {"0": "layer_norm", "2": "rms_norm"}
    assert "OffsetRMSNorm is neither a plain layer norm nor" in decision.skipped["1"]
    assert "MapLayerNorm is neither" in decision.skipped["3"]
    assert "stays: 1" in decision.table()
    with pytest.raises(AnatomyError, match="1: OffsetRMSNorm is neither"):
        ProgressiveNorm(match="1").decide(model)
    with pytest.raises(AnatomyError, match="cannot be tried on the meta device"):
        ProgressiveNorm(match="2").decide(model.to("meta"))


def test_norms_without_gains_or_shifts_and_frozen_ones() -> None:
    model = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4, bias=False), nn.RMSNorm(4))
    model[1].weight.requires_grad_(False)
    x = torch.randn(5, 4)
    expected = model(x)
    model = rewrite(model, ProgressiveNorm())
    assert torch.equal(model(x), expected)
    assert not model[1].rep.weight.requires_grad
    assert not model[1].rep.skip.requires_grad
    assert model[0].rep.skip.requires_grad
    assert model[2].norm.eps == torch.finfo(torch.float32).eps


def test_shared_norms_stay_shared_and_other_passes_still_find_their_way() -> None:
    shared = nn.LayerNorm(4)
    model = rewrite(nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Linear(4, 4), shared)}), ProgressiveNorm())
    assert model["a"] is model["b"][1]
    whole, batch = ours()
    before = dissect(whole), describe(whole)
    whole = rewrite(whole, ProgressiveNorm())
    assert dissect(whole) == before[0]
    assert describe(whole).width == before[1].width
    assert rewrite(whole, Replace("layer_norm", "rms_norm"))(batch["input_ids"]).shape == (2, 8, 32)


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (nn.Sequential(nn.LayerNorm((3, 4))), {}, ShapeError, r"at '0' normalises over \(3, 4\)"),
        (nn.Sequential(nn.Linear(3, 4)), {}, AnatomyError, "has no layer norm"),
        (nn.Sequential(nn.LayerNorm(4)), {"match": "x.*"}, AnatomyError, "at a path like 'x.\\*'; they are at 0"),
        (nn.Sequential(PRepBN(4)), {}, AnatomyError, "has no layer norm"),
    ],
)
def test_a_model_without_a_place_is_refused(model: nn.Module, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        ProgressiveNorm(**options).decide(model)


def test_replace_points_at_the_pass_and_puts_in_the_plain_half() -> None:
    with pytest.raises(LaminaError, match="that is the pass progressive_norm"):
        Replace("layer_norm", "prep_bn").decide(Normed())
    model = Normed()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
    weight = model[1].weight.detach().clone()
    model = rewrite(model, Replace("layer_norm", "rep_bn", options={"skip_init": 0.5}))
    assert type(model[1]) is RepBN
    assert torch.equal(model[1].weight, weight)
    assert model[1].skip.item() == 0.5


def test_bad_options_are_refused() -> None:
    with pytest.raises(LaminaError, match="decay_fraction must be positive"):
        ProgressiveNorm(decay_fraction=0)
    with pytest.raises(LaminaError, match="more than the whole of training"):
        ProgressiveNorm(warm_fraction=0.5)
    with pytest.raises(LaminaError, match="1 of it is over"):
        ProgressiveNorm(begin=1.0)


class Watched(Classification):
    """Notes lam at every forward pass of training, and may fail on the way."""

    def __init__(self, at: int = -1) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.at = at

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        if model.training:
            norm = next((m for m in model.modules() if isinstance(m, PRepBN)), None)
            self.seen.append(round(float(norm.lam), 6) if norm is not None else -1)
            if len(self.seen) == self.at:
                raise KeyboardInterrupt
        return super().__call__(model, batch)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))


def run(folder: Path | None = None, at: int = -1, resume: bool = False, when: Any = "before", **options: Any) -> Any:
    watched = Watched(at)
    rewrites = [Scheduled(ProgressiveNorm(), when)]
    made = trainer(folder, model=Normed(), objective=watched, steps=10, rewrites=rewrites, **options)
    with contextlib.suppress(KeyboardInterrupt):
        made.fit(resume=resume)
    return watched.seen


# The trainer tells (step + 1) / steps before each step.
DECAY = [round(max(0.0, 1 - (s + 1) / 8), 6) for s in range(10)]


def test_the_trainer_moves_lam_once_a_step_whatever_the_accumulation() -> None:
    assert run() == DECAY
    assert run(accumulate=4) == [lam for lam in DECAY for _ in range(4)]


def test_lam_goes_on_after_a_kill(tmp_path: Path) -> None:
    assert run(tmp_path / "whole") == DECAY
    first = run(tmp_path / "killed", at=6, checkpoint_every=2)
    assert first == DECAY[:6]
    assert run(tmp_path / "killed", resume=True, checkpoint_every=2) == DECAY[4:]
    loss = [[r["loss"] for r in numbers(tmp_path / n) if r["event"] == "step"] for n in ("whole", "killed")]
    assert loss[0] == loss[1]


def test_in_mid_training_the_decay_takes_its_share_of_what_is_left(tmp_path: Path) -> None:
    expected = [-1] * 5 + [round(max(0.0, 1 - 0.25 * (s + 1)), 6) for s in range(5)]
    assert run(tmp_path / "whole", when=0.5) == expected
    run(tmp_path / "killed", at=8, when=0.5, checkpoint_every=2)
    assert run(tmp_path / "killed", resume=True, when=0.5, checkpoint_every=2) == expected[6:]


def test_after_training_there_is_nothing_to_decay_over() -> None:
    model = Normed()
    with pytest.raises(LaminaError, match="needs training to come"):
        carry_out(
            Scheduled(ProgressiveNorm(), "after"),
            model,
            Classification(),
            data=data(),
            seed=0,
            device=torch.device("cpu"),
            optimizer=adamw(model),
        )
