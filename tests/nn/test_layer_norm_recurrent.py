from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from lamina.errors import ShapeError
from lamina.nn import (
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LayerNormRNN,
    LayerNormRNNCell,
    layer_norm_reference,
)
from lamina.nn._layer_norm_gru import gru_loop
from lamina.nn._layer_norm_lstm import lstm_loop
from lamina.nn._layer_norm_rnn import rnn_loop

NETS = [LayerNormLSTM, LayerNormGRU, LayerNormRNN]
SMALL = {"input_size": 3, "hidden_size": 4}

ONE_OPERATOR = "the time loop is one operator of ours, which ONNX does not know"
EXAMPLES = [
    *(
        Example("layer", name, SMALL, lambda: (torch.randn(5, 2, 3),), bad={"hidden_size": 0}, no_onnx=ONE_OPERATOR)
        for name in ("layer_norm_lstm", "layer_norm_gru", "layer_norm_rnn")
    ),
    *(
        Example("layer", name, SMALL, lambda: (torch.randn(2, 3),), bad={"eps": 0.0}, no_onnx=ONE_OPERATOR)
        for name in ("layer_norm_lstm_cell", "layer_norm_gru_cell", "layer_norm_rnn_cell")
    ),
]


def ln(a: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    return layer_norm_reference(a, a.shape[-1:], gain, shift, eps)


def lstm_step(cell: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's equations, letter by letter."""
    p, bias = cell, 0 if cell.bias is None else cell.bias
    a, u = x @ p.weight_ih.T, h @ p.weight_hh.T
    if p.official_bias:
        a = a + bias
    if p.gain_ih is not None:
        a = ln(a, p.gain_ih, p.shift_ih, p.eps)
    if p.gain_hh is not None:
        u = ln(u, p.gain_hh, p.shift_hh, p.eps)
    z = a + u + (0 if p.official_bias and not p.norm_input else bias)
    i, f, o, g = z.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * ln(c, p.gain_cell, p.shift_cell, p.eps).tanh(), c


def gru_step(cell: Any, x: Tensor, h: Tensor) -> Tensor:
    p, H = cell, cell.hidden_size
    W, Wx, U, Ux = p.weight_ih[: 2 * H], p.weight_ih[2 * H :], p.weight_hh[: 2 * H], p.weight_hh[2 * H :]
    bias = x.new_zeros(3 * H) if p.bias is None else p.bias
    b, bx = bias[: 2 * H], bias[2 * H :]
    xa, xb = x @ W.T, x @ Wx.T
    if p.official_bias or not p.norm_input:
        xa, xb = xa + b, xb + bx
    if p.norm_input:
        xa = ln(xa, p.gain_ih[: 2 * H], p.shift_ih[: 2 * H], p.eps)
        xb = ln(xb, p.gain_ih[2 * H :], p.shift_ih[2 * H :], p.eps)
        if not p.official_bias:
            xa, xb = xa + b, xb + bx
    pre = ln(h @ U.T, p.gain_hh[: 2 * H], p.shift_hh[: 2 * H], p.eps) + xa
    r, u = pre.sigmoid().chunk(2, -1)
    new = (ln(h @ Ux.T, p.gain_hh[2 * H :], p.shift_hh[2 * H :], p.eps) * r + xb).tanh()
    return u * h + (1 - u) * new


def rnn_step(cell: Any, x: Tensor, h: Tensor) -> Tensor:
    p, bias = cell, 0 if cell.bias is None else cell.bias
    a, u = x @ p.weight_ih.T, h @ p.weight_hh.T
    if p.norm_input:
        inner = bias if p.official_bias else 0
        z = ln(a + u + inner, p.gain_hh, p.shift_hh, p.eps) + (0 if p.official_bias else bias)
    else:
        z = a + bias + ln(u, p.gain_hh, p.shift_hh, p.eps)
    return z.relu() if p.nonlinearity == "relu" else z.tanh()


STEPS: dict[type, Callable[..., Any]] = {LayerNormLSTM: lstm_step, LayerNormGRU: gru_step, LayerNormRNN: rnn_step}


def literal(net: Any, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Stacked and bidirectional, one step at a time; x (T, B, n)."""
    step, directions, final = STEPS[type(net)], 2 if net.bidirectional else 1, []
    for layer in range(net.num_layers):
        outputs = []
        for d in range(directions):
            k = layer * directions + d
            s, seen = tuple(t[k] for t in state), []
            for t in range(x.shape[0])[:: -1 if d else 1]:
                new = step(net.cells[k], x[t], *s)
                s = new if isinstance(new, tuple) else (new,)
                seen.append(s[0])
            outputs.append(torch.stack(seen[::-1] if d else seen))
            final.append(s)
        x = torch.cat(outputs, -1)
    return x, tuple(torch.stack(s) for s in zip(*final, strict=True))


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.7 + 0.2)
    return net


def states_of(net: Any, batch: int) -> tuple[Tensor, ...]:
    count = 2 if isinstance(net, LayerNormLSTM) else 1
    return tuple(torch.randn(len(net.cells), batch, net.hidden_size).double() for _ in range(count))


def call(net: Any, x: Any, state: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    output, final = net(x, state if len(state) == 2 else state[0])
    return output, final if isinstance(final, tuple) else (final,)


OPTIONS = [
    (LayerNormLSTM, {}),
    (LayerNormLSTM, {"official_bias": True}),
    (LayerNormLSTM, {"norm_input": False, "official_bias": True}),
    (LayerNormLSTM, {"variant": "cell"}),
    (LayerNormLSTM, {"bias": False, "num_layers": 2, "bidirectional": True}),
    (LayerNormLSTM, {"bias": False, "variant": "cell"}),
    (LayerNormGRU, {}),
    (LayerNormGRU, {"official_bias": True, "num_layers": 2, "bidirectional": True}),
    (LayerNormGRU, {"norm_input": False}),
    (LayerNormGRU, {"bias": False}),
    (LayerNormRNN, {"num_layers": 2, "bidirectional": True}),
    (LayerNormRNN, {"norm_input": False, "nonlinearity": "relu"}),
    (LayerNormRNN, {"official_bias": True}),
    (LayerNormRNN, {"bias": False}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_values_and_every_gradient_equal_the_literal_equations(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = randomise(kind(3, 7, dtype=torch.float64, **options))
    x, state = torch.randn(6, 2, 3).double().requires_grad_(), states_of(net, 2)
    leaves = [x, *(s.requires_grad_() for s in state), *net.parameters()]
    results = []
    for run in (call, literal):
        output, final = run(net, x, state)
        torch.manual_seed(1)
        loss = sum((torch.randn(t.shape).double() * t).sum() for t in (output, *final))
        results.append([output, *final, *torch.autograd.grad(loss, leaves)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", NETS)
def test_gradcheck(kind: Any) -> None:
    torch.manual_seed(0)
    net = randomise(kind(2, 3, dtype=torch.float64))
    x = torch.randn(3, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *p: call(net, x, states_of_zero(net))[0], (x, *net.parameters()))


def states_of_zero(net: Any) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(s) for s in states_of(net, 2))


@pytest.mark.parametrize("reverse", [False, True])
def test_without_norms_the_loops_are_torchs_nets(reverse: bool) -> None:
    torch.manual_seed(0)
    T, B, H = 6, 2, 5
    x, suffix = torch.randn(T, B, 3), "_reverse" if reverse else ""
    half = slice(H, None) if reverse else slice(0, H)
    for peer, order in (
        (nn.LSTM(3, H, bidirectional=True), [0, 1, 3, 2]),
        (nn.GRU(3, H, bidirectional=True), [0, 1, 2]),
    ):
        W, U, b, d = (
            torch.cat([getattr(peer, f"{n}_l0{suffix}").chunk(len(order))[k] for k in order])
            for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        rows, zero, expected = x.view(-1, 3) @ W.T, torch.zeros(B, H), peer(x)[0][..., half]
        if isinstance(peer, nn.LSTM):
            got = lstm_loop(rows + b + d, zero, zero, U, None, None, None, None, reverse, 1e-5)[0]
        else:
            inner = torch.cat([d[: 2 * H], torch.zeros(H)])
            got = gru_loop(rows + b + inner, zero, U, None, d[2 * H :], None, reverse, 1e-5)[0]
        torch.testing.assert_close(got.view(T, B, H), expected, rtol=0, atol=1e-6)
        leaves = [p for n, p in peer.named_parameters() if n.endswith("reverse") == reverse]
        weights = torch.randn(T, B, H)
        ours = torch.autograd.grad((got.view(T, B, H) * weights).sum(), leaves)
        theirs = torch.autograd.grad((expected * weights).sum(), leaves)
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    rnn = nn.RNN(3, H)
    rows = x.view(-1, 3) @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + rnn.bias_hh_l0
    got = rnn_loop(rows, torch.zeros(B, H), rnn.weight_hh_l0, None, None, None, True, False, None, False, 1e-5)[0]
    torch.testing.assert_close(got.view(T, B, H), rnn(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_equals_each_sequence_alone(kind: Any, enforce_sorted: bool) -> None:
    torch.manual_seed(0)
    net = randomise(kind(3, 5, 2, bidirectional=True, dtype=torch.float64))
    lengths = [7, 4, 4, 1] if enforce_sorted else [4, 7, 1, 4]
    sequences = [torch.randn(n, 3).double().requires_grad_() for n in lengths]
    state = tuple(s.requires_grad_() for s in states_of(net, 4))
    output, final = call(net, pack_sequence(sequences, enforce_sorted=enforce_sorted), state)
    padded, got = pad_packed_sequence(output)
    assert got.tolist() == lengths
    alone = [literal(net, s[:, None], tuple(t[:, k : k + 1] for t in state)) for k, s in enumerate(sequences)]
    for k, (o, f) in enumerate(alone):
        torch.testing.assert_close(padded[: lengths[k], k], o[:, 0])
        for ours, truth in zip(final, f, strict=True):
            torch.testing.assert_close(ours[:, k : k + 1], truth)
    leaves = [*sequences, *state, *net.parameters()]
    ours = torch.autograd.grad(output.data.square().sum() + sum(f.sum() for f in final), leaves)
    truth = torch.autograd.grad(sum(o.square().sum() + sum(t.sum() for t in f) for o, f in alone), leaves)
    for a, e in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("kind", "peer"), [(LayerNormLSTM, nn.LSTM), (LayerNormGRU, nn.GRU), (LayerNormRNN, nn.RNN)])
def test_arguments_and_shapes_are_torchs(kind: Any, peer: Any) -> None:
    torch.manual_seed(0)
    for options in ({}, {"batch_first": True}, {"num_layers": 3, "bidirectional": True, "batch_first": True}):
        ours, theirs = kind(3, 4, **options), peer(3, 4, **options)
        for x in (torch.randn(5, 2, 3), torch.randn(5, 3)):
            (a, s), (b, t) = ours(x), theirs(x)
            assert a.shape == b.shape
            assert [v.shape for v in (s if isinstance(s, tuple) else (s,))] == [
                v.shape for v in (t if isinstance(t, tuple) else (t,))
            ]
            again = ours(x, s)[0]
            assert not torch.equal(again, a)
        first = torch.randn(2, 5, 3)
        packed = pack_padded_sequence(first, torch.tensor([5, 3]), batch_first=True)
        assert ours(packed)[0].data.shape == theirs(packed)[0].data.shape
    ours = kind(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(ours(x)[0], kind_time_first(ours)(x.transpose(0, 1))[0].transpose(0, 1))


def kind_time_first(net: Any) -> Any:
    twin = copy.deepcopy(net)
    twin.batch_first = False
    return twin


def test_dropout_is_between_layers_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3)
    net = randomise(LayerNormLSTM(3, 4, 2, dropout=1.0))
    # Everything between the layers is dropped: the second layer sees zeros, but its output is not dropped.
    zeros = LayerNormLSTM(4, 4)
    zeros.cells[0].load_state_dict(net.cells[1].state_dict())
    torch.testing.assert_close(net(x)[0], zeros(torch.zeros(5, 2, 4))[0])
    assert net(x)[0].abs().min() > 0
    assert not torch.equal(net.eval()(x)[0], zeros(torch.zeros(5, 2, 4))[0])
    with pytest.warns(UserWarning, match="num_layers=1"):
        LayerNormLSTM(3, 4, dropout=0.1)


@pytest.mark.parametrize("kind", NETS)
def test_rows_do_not_see_each_other_and_training_equals_evaluation(kind: Any) -> None:
    torch.manual_seed(0)
    net, x = randomise(kind(3, 8, dtype=torch.float64)), torch.randn(6, 4, 3).double()
    whole = net(x)[0]
    other = x.clone()
    other[:, 1:] += 5
    assert torch.equal(net(other)[0][:, 0], whole[:, 0])
    torch.testing.assert_close(net(x[:, :1])[0], whole[:, :1], rtol=0, atol=1e-12)
    assert torch.equal(net.eval()(x)[0], whole)


@pytest.mark.parametrize(
    ("kind", "net"),
    [(LayerNormLSTMCell, LayerNormLSTM), (LayerNormGRUCell, LayerNormGRU), (LayerNormRNNCell, LayerNormRNN)],
)
def test_cell_is_one_step_of_the_net(kind: Any, net: Any) -> None:
    torch.manual_seed(0)
    whole = randomise(net(3, 4))
    cell, x = kind(3, 4), torch.randn(5, 2, 3)
    cell.load_state_dict(whole.cells[0].state_dict())
    state = None
    for t in range(5):
        state = cell(x[t], state)
    final = whole(x)[1]
    torch.testing.assert_close(
        torch.stack(state) if isinstance(state, tuple) else state,
        torch.cat(final) if isinstance(final, tuple) else final[0],
    )
    torch.testing.assert_close(torch.as_tensor(first(cell(x[0, 0]))), first(cell(x[0]))[0])


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def test_scaling_the_recurrent_weight_leaves_its_part_unchanged() -> None:
    torch.manual_seed(0)
    cell = LayerNormLSTMCell(8, 64, eps=1e-14, dtype=torch.float64)
    x, h, c = (torch.randn(4, n).double() for n in (8, 64, 64))
    before = cell(x, (h, c))
    with torch.no_grad():
        cell.weight_hh *= 100
    for a, b in zip(cell(x, (h, c)), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_over_200_steps_is_tame_with_layer_norm_and_explodes_without(seed: int) -> None:
    torch.manual_seed(seed)
    net = LayerNormLSTM(8, 64, dtype=torch.float64)
    cell = net.cells[0]
    with torch.no_grad():
        cell.weight_ih.normal_(std=0.1)
        cell.weight_hh *= 100
    x, h, c = torch.randn(200, 1, 8).double(), torch.zeros(1, 64).double(), torch.randn(1, 64).double()
    c.requires_grad_()
    (with_norm,) = torch.autograd.grad(net(x, (h[None], c[None]))[0][-1].sum(), c)
    rows = x.view(200, 8) @ cell.weight_ih.T
    plain = lstm_loop(rows, h, c, cell.weight_hh, None, None, None, None, False, 1e-5)[0]
    (without,) = torch.autograd.grad(plain[-1].sum(), c)
    assert 0 < with_norm.norm() < 1e8
    assert without.norm() > 1e50


def test_the_carried_cell_state_is_not_normalised() -> None:
    cell = LayerNormLSTMCell(2, 3)
    with torch.no_grad():
        for name, value in cell.named_parameters():
            value.fill_(1.0 if name == "gain_cell" else 0.0)
        # Input and forget gates wide open, candidate near 1: c grows by 1 a step.
        cell.bias[:6] = 50.0
        cell.bias[9:] = 50.0
    h, c = cell(torch.zeros(1, 2))
    for _ in range(9):
        h, c = cell(torch.zeros(1, 2), (h, c))
    torch.testing.assert_close(c, torch.full((1, 3), 10.0))
    # All units equal: the norm of the read-out leaves nothing.
    assert torch.equal(h, torch.zeros(1, 3))


@pytest.mark.parametrize("kind", NETS)
def test_degenerate_inputs_stay_finite(kind: Any) -> None:
    torch.manual_seed(0)
    for hidden, x in ((4, torch.zeros(5, 2, 3)), (4, torch.full((5, 2, 3), 9.0)), (1, torch.randn(5, 2, 3))):
        net = kind(3, hidden)
        x.requires_grad_()
        output = net(x)[0]
        output.sum().backward()
        assert torch.isfinite(output).all()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", NETS)
def test_half_precision_keeps_states_and_statistics_in_float32(kind: Any) -> None:
    torch.manual_seed(0)
    net, x = kind(8, 16), torch.randn(20, 2, 8)
    truth = net(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x)[0]
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, truth, rtol=0, atol=0.1)
    mixed.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    half = net.bfloat16()(x.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), truth, rtol=0, atol=0.1)
    half.sum().backward()


@pytest.mark.parametrize("kind", NETS)
def test_compiles_as_one_graph(kind: Any) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x = randomise(kind(3, 4)), torch.randn(6, 2, 3)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(net(x)[0].sum(), list(net.parameters()))
    got = torch.autograd.grad(compiled(x)[0].sum(), list(net.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", NETS)
def test_second_derivative_is_refused(kind: Any) -> None:
    net, x = kind(3, 4), torch.randn(3, 2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_initialisation_is_the_authors() -> None:
    torch.manual_seed(0)
    cell = LayerNormLSTMCell(100, 16)
    for block in cell.weight_hh.chunk(4):
        torch.testing.assert_close(block @ block.T, torch.eye(16), rtol=0, atol=1e-5)
    assert abs(float(cell.weight_ih.detach().std()) - 0.01) < 0.001
    assert all((p == 1).all() for n, p in cell.named_parameters() if n.startswith("gain"))
    assert not any(p.any() for n, p in cell.named_parameters() if n.startswith(("shift", "bias")))
    for block in LayerNormLSTMCell(16, 16).weight_ih.chunk(4):
        torch.testing.assert_close(block @ block.T, torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_shapes_are_known_on_the_meta_device(kind: Any) -> None:
    net = kind(3, 4, num_layers=2, bidirectional=True, device="meta")
    output, _ = net(torch.empty(5, 2, 3, device="meta"))
    assert output.shape == (5, 2, 8)


def test_bad_input_is_refused() -> None:
    net = LayerNormLSTM(3, 4)
    with pytest.raises(ShapeError, match="proj_size must be 0, got 2"):
        LayerNormLSTM(3, 4, proj_size=2)
    with pytest.raises(ShapeError, match="the last of 3"):
        net(torch.randn(5, 2, 4))
    with pytest.raises(TypeError, match="int64"):
        net(torch.ones(5, 2, 3, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"initial states \(1, 2, 4\), got \(1, 3, 4\)"):
        net(torch.randn(5, 2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))
    x = torch.randn(5, 2, 3)
    for hx, got in (
        (torch.zeros(1, 2, 4), r"\(2, 4\)"),
        ((torch.zeros(1, 2, 4),), r"\(1, 2, 4\)"),
        ((torch.zeros(1, 2, 4),) * 3, r"\(1, 2, 4\), \(1, 2, 4\), \(1, 2, 4\)"),
    ):
        with pytest.raises(ShapeError, match=rf"expects \(h, c\), two initial states \(1, 2, 4\), got {got}$"):
            net(x, hx)
    with pytest.raises(ShapeError, match=r"LayerNormGRU expects one initial state \(1, 2, 4\), got tuple"):
        LayerNormGRU(3, 4)(x, (torch.zeros(1, 2, 4),) * 2)
    with pytest.raises(ShapeError, match=r"one initial state \(1, 4\), got \(1, 1, 4\)"):
        LayerNormGRU(3, 4)(x[:, 0], torch.zeros(1, 1, 4))
    with pytest.raises(ShapeError, match=r"two initial states \(2, 4\), got \(2, 4\)"):
        LayerNormLSTMCell(3, 4)(x[0], (torch.zeros(2, 4),))
    with pytest.raises(ShapeError, match=r"at least one row, got \(0, 3\)"):
        LayerNormLSTMCell(3, 4)(torch.randn(0, 3))
    with pytest.raises(ShapeError, match="at least one step"):
        net(torch.randn(0, 2, 3))
    with pytest.raises(ValueError, match="variant"):
        LayerNormLSTM(3, 4, variant="gate")
    with pytest.raises(ShapeError, match=r"\(batch, 3\)"):
        LayerNormGRUCell(3, 4)(torch.randn(2, 5))
