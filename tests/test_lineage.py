import pytest
import torch
from torch.nn import Parameter

from lamina.errors import ShapeError
from lamina.lineage import Lineage


def test_state_follows_by_rows_and_by_stacking():
    a, b = Parameter(torch.zeros(2, 3)), Parameter(torch.zeros(3, 3))
    new = Parameter(torch.zeros(5, 3))
    states = {a: torch.arange(6.0).view(2, 3), b: 10 + torch.arange(9.0).view(3, 3)}
    lineage = Lineage()
    lineage.derive(new, a, [1, -1, -1, 0, -1])
    lineage.derive(new, b, [-1, 2, -1, -1, 0])
    carried = lineage.carry(new, states)
    expected = torch.stack([states[a][1], states[b][2], torch.zeros(3), states[a][0], states[b][0]])
    assert torch.equal(carried, expected)
    assert len(lineage) == 1
    assert [o.old is p for o, p in zip(lineage.origins(new), (a, b), strict=True)] == [True, True]


def test_a_whole_parameter_follows_and_a_fresh_one_has_no_state():
    old, new, fresh = (Parameter(torch.zeros(2, 3)) for _ in range(3))
    lineage = Lineage()
    lineage.derive(new, old)
    state = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    carried = lineage.carry(new, {old: state})
    assert torch.equal(carried, state)
    assert carried is not state
    assert lineage.carry(fresh, {old: state}) is None
    assert lineage.carry(new, {}) is None


@pytest.mark.parametrize(
    ("new", "index", "sentence"),
    [
        ((3, 3), None, "equal shapes"),
        ((3, 3), [0, 1], "index of"),
        ((2, 4), [0, 1], "for new"),
        ((2, 3), [0, 2], r"outside -1..1"),
        ((2, 3), [0, -2], r"outside -1..1"),
    ],
)
def test_what_does_not_fit_is_refused(new, index, sentence):
    with pytest.raises(ShapeError, match=sentence):
        Lineage().derive(Parameter(torch.zeros(new)), Parameter(torch.zeros(2, 3)), index)
