from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contract.example import Example
from tests.models.test_radiance_field import FIELD, batch
from tests.nn.test_fields import KINDS, SMALL, lively
from torch import Tensor, nn

from lamina import io
from lamina.cli import main
from lamina.errors import AnatomyError, LaminaError
from lamina.models import RadianceField
from lamina.nn import GridField, HashField, MLPField
from lamina.rewrite import ConvertField, history, rewrite


def hash_model() -> nn.Module:
    torch.manual_seed(0)
    model = lively(RadianceField(FIELD, samples=5))
    return model.eval()


MLP = {"name": "mlp_field", **SMALL["mlp_field"]}
EXAMPLES = [
    Example(
        "pass",
        "convert_field",
        {"to": MLP},
        model=hash_model,
        batch=batch,
        bad={"to": {**MLP, "bound": 2.0}},
        only_ours="the foreign models of these tests have no radiance field",
    ),
]


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_every_kind_becomes_every_other(old: str, new: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RadianceField({"name": old, **SMALL[old]}, samples=4, occupancy=3)
    model.occupancy.cells[::3] = False
    result = rewrite(model, ConvertField({"name": new, **SMALL[new]}, seed=3))
    assert type(result.field) is KINDS[new]
    assert not result.occupancy.cells[0], "the grid of what is empty stays"
    io.save(result, tmp_path / "model")
    loaded = io.load(tmp_path / "model")
    assert torch.equal(loaded(**batch()), result.eval()(**batch()))
    assert history(loaded) == history(result)


def test_the_small_networks_are_handed_over_where_they_fit_with_their_momentum() -> None:
    torch.manual_seed(0)
    model = RadianceField(HashField(levels=14, log2_table=6, finest=32), samples=3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(**batch()).sum().backward()
    optimizer.step()
    old = {n: p.detach().clone() for n, p in model.field.named_parameters()}
    momentum = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.field.named_parameters()}
    model = rewrite(model, ConvertField(MLP), optimizer=optimizer)
    carried = [n for n, _ in model.field.named_parameters() if n.split(".")[0] in ("geometry_net", "color_net")]
    assert len(carried) == 5
    for name in carried:
        parameter = model.field.get_parameter(name)
        assert torch.equal(parameter.detach(), old[name])
        assert torch.equal(optimizer.state[parameter]["exp_avg"], momentum[name])
    trunk = model.field.trunk[0].weight
    assert not optimizer.state.get(trunk)
    low = rewrite(model, ConvertField({"name": "low_rank_field", **SMALL["low_rank_field"]}))
    assert torch.equal(low.field.color_net[0].weight.detach(), old["color_net.0.weight"])
    assert history(low)[1].decision["carried"] == [[f"color_net.{i}.weight"] * 2 for i in (0, 2, 4)]
    grid = rewrite(low, ConvertField({"name": "grid_field", "resolution": 3}))
    assert history(grid)[2].decision["carried"] == []


def test_frozen_networks_stay_as_they_are() -> None:
    model = rewrite(hash_model(), ConvertField(MLP, freeze=True))
    assert not model.field.color_net[0].weight.requires_grad
    assert model.field.trunk[0].weight.requires_grad
    before = history(model)[0].decision
    assert before["frozen"] is True


def test_a_field_alone_becomes_another_root_in_its_box() -> None:
    field = GridField(resolution=4, bound=1.5).double().eval()
    made = rewrite(field, ConvertField(MLP))
    assert isinstance(made, MLPField)
    assert made.bound == 1.5
    assert not made.training
    assert made.trunk[0].weight.dtype == torch.float64


def test_fields_inside_a_home_made_model_are_all_converted() -> None:
    class Two(nn.Module):
        """Two fields whose densities add up."""

        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = GridField(resolution=3), GridField(resolution=4)
            self.shared = self.near

        def forward(self, x: Tensor, d: Tensor) -> Tensor:
            return self.near(x, d)[0] + self.far(x, d)[0]

    model = rewrite(Two(), ConvertField({"name": "hash_field", **SMALL["hash_field"]}))
    assert isinstance(model.near, HashField)
    assert isinstance(model.far, HashField)
    assert model.shared is model.near
    x, d = torch.zeros(2, 3), torch.eye(3)[:2]
    assert torch.isfinite(model(x, d)).all()


@pytest.mark.parametrize(
    ("options", "model", "error", "words"),
    [
        ({"to": MLP}, nn.Linear(2, 2), AnatomyError, "no radiance field"),
        ({"to": {**MLP, "bound": 3.0}}, GridField(resolution=3), LaminaError, "bound 1"),
        ({"to": {**MLP, "dim": 2}}, GridField(resolution=3), LaminaError, "dim 3"),
        ({"to": "mlp_feild"}, GridField(resolution=3), LaminaError, "mlp_field"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    options: dict[str, object], model: nn.Module, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rewrite(model, ConvertField(**options))
    with pytest.raises(LaminaError, match="a file can hold"):
        ConvertField(GridField(resolution=3))


RECIPE = """
lamina: 1
model: {name: radiance_field}
data: {name: scenes, rays: 16, poses: 4, image: 8, test: 1, train: 1}
objective: {name: volume_distillation, stages: [0.2, 0.4]}
optimizer: {name: adamw, lr: 2e-2}
train: {steps: 12, log_every: 4, precision: fp32, seed: 0}
"""


def test_the_command_line_converts_a_saved_field_and_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    io.save(hash_model(), "old")
    (tmp_path / "heal.yaml").write_text(RECIPE)
    command = ["rewrite", "old", "{name: convert_field, to: {name: grid_field, resolution: 5}}"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--train", "heal.yaml", "--out", "new"])
    assert not end.value.code
    made, fresh = io.load("new"), rewrite(io.load("old"), ConvertField({"name": "grid_field", "resolution": 5})).eval()
    assert isinstance(made.field, GridField)
    goal = io.load("old")(**batch())
    with torch.no_grad():
        assert (made(**batch()) - goal).norm() < (fresh(**batch()) - goal).norm()
    assert "saved in new" in capsys.readouterr().out
