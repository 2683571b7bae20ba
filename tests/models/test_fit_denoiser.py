from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from tests.models import fit_reference as reference
from tests.models.fit_reference import lively, with_batch_norms
from torch import Tensor, nn

from lamina.data import digit_images
from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models import FITDenoiser, group_image, parse_layers
from lamina.models.fit.denoiser import time_features

SIZES: dict[str, Any] = {
    "layers": "(1)1(2)1(1)", "tokens_per_group": 4, "groups": 3, "latents_per_group": 2, "in_features": 5,
    "token_width": 8, "latent_width": 16, "token_heads": 2, "latent_heads": 4,
}  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TIME = torch.tensor([0.25, 0.9])
EXAMPLES = [
    Example(
        "model", "fit_denoiser",
        SIZES | {"layers": "(1)1(1)", "condition_features": 3, "self_conditioning": True, "out_features": 2},
        batch=lambda: {"inputs": numbers(2, 3, 4, 5), "time": TIME, "condition": numbers(2, 2, 3, seed=1),
                       "latents": numbers(2, 3, 2, 16, seed=2)},
        bad={"latent_width": 20},
    ),
]  # fmt: skip


def make(**options: Any) -> FITDenoiser:
    torch.manual_seed(0)
    return FITDenoiser(**(SIZES | options)).eval()


def expected(
    model: FITDenoiser, x: Tensor, time: Tensor, condition: Tensor | None, latents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Example by example, by the reference."""
    state, options, found = dict(model.named_parameters()), SIZES | model.lamina_node, []
    width, m = options["latent_width"], options["latents_per_group"]
    for b in range(len(x)):
        tokens = reference.norm(state, "stem.norm", reference.linear(state, "stem.project", x[b]))
        rates = torch.tensor([10000.0 ** (-i / (width // 8)) for i in range(width // 8)])
        waves = torch.cat(((1000 * time[b] * rates).sin(), (1000 * time[b] * rates).cos()))
        waves = (waves - waves.mean()) / (waves - waves.mean()).square().mean().sqrt()
        hidden = reference.linear(state, "time.up", waves)
        read = reference.linear(state, "time.down", hidden * torch.sigmoid(hidden))[None]
        if condition is not None:
            read = torch.cat((read, reference.linear(state, "condition", condition[b])))
        start = list(state["trunk.table"].split(m))
        if model.previous is not None:
            given = torch.zeros(len(start), m, width) if latents is None else latents[b]
            given = reference.layer(state, "previous.mlp", given, 1, None)
            start = [z + reference.norm(state, "previous.norm", g) for z, g in zip(start, given, strict=True)]
        ends = reference.trunk(
            state, parse_layers(options["layers"]), list(tokens + state["stem.positions.table"]), start,
            (options["token_heads"], options["latent_heads"]), condition=read,
        )  # fmt: skip
        found.append([torch.stack(side) for side in ends])
    tokens, after = (torch.stack(side) for side in zip(*found, strict=True))
    return reference.linear(state, "head", reference.norm(state, "token_norm", tokens)), after


@pytest.mark.parametrize(
    "options",
    [{}, {"condition_features": 3, "self_conditioning": True}, {"cross_mlp": True, "context_norm": False},
     {"local_attention": False, "out_features": 2}, {"self_conditioning": True, "layers": "(1)1(2)1(1)"},
     {"tokens_per_group": 1, "groups": 7, "latents_per_group": 63}],
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_card_written_out(options: dict[str, Any]) -> None:
    model = lively(make(**options))
    sizes = SIZES | options
    x = numbers(2, sizes["groups"], sizes["tokens_per_group"], 5)
    condition = numbers(2, 2, 3, seed=1) if "condition_features" in options else None
    for latents in (None, numbers(2, sizes["groups"], 2, 16, seed=2)) if "self_conditioning" in options else (None,):
        found, wanted = model(x, TIME, condition, latents), expected(model, x, TIME, condition, latents)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)
        wanting = [*model.parameters()]
        grads = [torch.autograd.grad(sum(y.square().mean() for y in ends), wanting) for ends in (found, wanted)]
        for (name, _), a, b in zip(model.named_parameters(), *grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_at_the_start_the_step_before_has_no_say_and_with_a_gain_it_has() -> None:
    model, x = make(self_conditioning=True), numbers(2, 3, 4, 5)
    before = numbers(2, 3, 2, 16, seed=2)
    assert torch.equal(model(x, TIME, None, before)[0], model(x, TIME)[0])
    nn.init.ones_(model.previous.norm.weight)
    assert not torch.allclose(model(x, TIME, None, before)[0], model(x, TIME)[0])


def test_times_are_standardised_and_condition_and_time_reach_every_token() -> None:
    found = time_features(torch.linspace(0, 1, 7), 24)
    torch.testing.assert_close(found.mean(-1), torch.zeros(7), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.std(-1, correction=0), torch.ones(7))
    model, x, condition = lively(make(condition_features=3)), numbers(2, 3, 4, 5), numbers(2, 2, 3, seed=1)
    base = model(x, TIME, condition)[0]
    for other in (model(x, TIME + 0.01, condition)[0], model(x, TIME, condition + 0.1)[0]):
        assert ((other - base).abs().amax(-1) > 0).all()


def test_options_leave_out_and_put_in_what_they_say() -> None:
    names = {key: {n for n, _ in make(**{key: value}).named_parameters()} for key, value in (
        ("dropout", 0.0), ("local_attention", False), ("cross_mlp", True), ("context_norm", False),
    )}  # fmt: skip
    plain = names["dropout"]
    assert any(".local." in n and ".mixer." in n for n in plain)
    assert not any(".local." in n and ".mixer." in n for n in names["local_attention"])
    assert {n.split(".")[4] for n in names["cross_mlp"] - plain} == {"mlp"}
    assert {n.split(".")[4] for n in plain - names["context_norm"]} == {"context_norm"}


def test_padding_is_read_by_no_one() -> None:
    model, x = lively(make(pad_groups=True)), numbers(2, 9, 5)
    seen = (torch.arange(12) < 9).expand(2, -1).unflatten(1, (3, 4))
    filled = torch.cat((x, 5 * torch.ones(2, 3, 5)), 1).unflatten(1, (3, 4))
    torch.testing.assert_close(model(x, TIME)[0][seen], model(filled, TIME, attention_mask=seen)[0][seen])


def test_norms_that_count_tokens_do_not_count_padding() -> None:
    model = lively(make(self_conditioning=True, cross_mlp=True, condition_features=3, side_features=2))
    assert with_batch_norms(model) > 15
    x, y, condition = numbers(2, 3, 4, 5), numbers(2, 3, 1, 2, seed=3), numbers(2, 2, 3, seed=1)
    seen = (torch.arange(12) < 7).expand(2, -1).unflatten(1, (3, 4))
    before = numbers(2, 3, 2, 16, seed=2)
    tokens, latents = model(x, TIME, condition, before, y, seen)
    x, y, before = (t.clone() for t in (x, y, before))
    x[~seen], y[:, 2], before[:, 2] = 9.0, 9.0, 9.0
    again, after = model(x, TIME, condition, before, y, seen)
    torch.testing.assert_close(again[seen], tokens[seen])
    torch.testing.assert_close(after[:, :2], latents[:, :2])


def test_it_learns_to_take_noise_off_digits() -> None:
    """The role it is for: predict the clean patches; a sampler's step reads the latents of the one before."""
    images = group_image(digit_images(seed=0)[0][:256, None] * 2 - 1, group=4, patch=1)  # (N, 4, 16, 1)
    torch.manual_seed(0)
    model = FITDenoiser("(1)1(1)", 16, 4, 4, 1, 16, 32, 2, 2, self_conditioning=True)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(35):
        rows = torch.randint(256, (16,))
        time, noise = 0.4 * torch.rand(16), torch.randn(16, 4, 16, 1)
        noisy = images[rows] * (1 - time).view(-1, 1, 1, 1) + noise * time.view(-1, 1, 1, 1)
        with torch.no_grad():
            before = model(noisy, time)[1]
        loss = (model(noisy, time, None, before)[0] - images[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # What the mean image, which looks at nothing, would leave.
    assert sum(losses[-10:]) / 10 < 0.5 * (images - images.mean(0)).square().mean()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": "(1)1(1)1"}, RecipeError, "ends with global layers that change no token"),
        ({"layers": "(1)1(1)1", "self_conditioning": True}, RecipeError, "ends with global layers that change no"),
        ({"layers": "(1)"}, RecipeError, "no global layers"),
        ({"latent_width": 20}, ShapeError, "latent_width must be 8 k, got 20"),
        ({"condition_features": -1}, ShapeError, "at least 0"),
        ({"out_features": 0}, ShapeError, "out_features=0 must be at least 1"),
        ({"token_layer": nn.Linear, "local_attention": False}, RecipeError, "give one of them"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("options", "given", "words"),
    [
        ({}, {"time": torch.zeros(3)}, r"time must be 2 floating-point numbers, got torch.float32 \(3,\)"),
        ({}, {"time": torch.zeros(2, dtype=torch.long)}, "got torch.int64"),
        ({}, {"condition": torch.zeros(2, 1, 3)}, r"condition must be None, got \(2, 1, 3\)"),
        ({"condition_features": 3}, {}, r"condition must be \(2, 's', 3\), got None"),
        ({"condition_features": 3}, {"condition": torch.zeros(2, 1, 4)}, r"got \(2, 1, 4\)"),
        ({}, {"latents": torch.zeros(2, 3, 2, 16)}, "self_conditioning=True"),
        ({"self_conditioning": True}, {"latents": torch.zeros(2, 3, 1, 16)}, r"must be \(2, 3, 2, 16\)"),
    ],
)
def test_bad_inputs_are_refused(options: dict[str, Any], given: dict[str, Any], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        make(**options)(numbers(2, 3, 4, 5), **({"time": TIME} | given))
