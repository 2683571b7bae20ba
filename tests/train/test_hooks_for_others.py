"""The same pass, optimizer, objective and reducer without our trainer: three loops, one loss curve."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from tests.train.test_state import Momentum
from torch import nn
from torch.utils.data import DataLoader

from lamina.batches import Batch
from lamina.gradients import attach
from lamina.models import Transformer
from lamina.objectives import NextToken
from lamina.optim import LAMB, parameter_groups
from lamina.rewrite import history, rewrite
from lamina.rewrite.drop import DropAttention

STEPS, REWRITE_AT = 6, 3

BATCHES: list[Batch] = [
    {"input_ids": torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))} for _ in range(STEPS)
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Transformer(3, 16, 2, vocabulary=32, context=8)


def lamb(of: nn.Module) -> LAMB:
    return LAMB(parameter_groups(of, 0.01), lr=3e-2)


def drop(of: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    return rewrite(of, DropAttention(count=1), data=BATCHES[:2], optimizer=optimizer)


def plain() -> tuple[list[float], nn.Module]:
    net, objective, losses = model(), NextToken(), []
    optimizer, handle = lamb(net), attach(net, Momentum())
    for step, batch in enumerate(BATCHES):
        if step == REWRITE_AT:
            net = drop(net, optimizer)
        loss = objective(net, batch)["loss"]
        loss.backward()
        handle.reduce()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, net


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], nn.Module]:
    return plain()


def same(found: tuple[list[float], nn.Module], expected: tuple[list[float], nn.Module]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert [r.name for r in history(found[1])] == ["drop_attention"]
    for (name, a), b in zip(found[1].named_parameters(), expected[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_in_a_plain_loop(expected) -> None:
    losses, net = expected
    assert losses[-1] < losses[0]
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in model().parameters())
    same(plain(), expected)


def test_in_transformers_trainer(expected, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate, which is not installed")
    net, objective, losses = model(), NextToken(), []
    optimizer, handle = lamb(net), attach(net, Momentum())

    class Hooks(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, optimizer, **rest) -> None:
            if state.global_step == REWRITE_AT:
                drop(model, getattr(optimizer, "optimizer", optimizer))

        def on_pre_optimizer_step(self, args, state, control, **rest) -> None:
            handle.reduce()

    class WithObjective(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = objective(model, inputs)["loss"]
            losses.append(loss.item())
            return (loss, {}) if return_outputs else loss

        def get_train_dataloader(self):
            return DataLoader(BATCHES, batch_size=None)

    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    WithObjective(net, options, train_dataset=BATCHES, optimizers=(optimizer, schedule), callbacks=[Hooks()]).train()
    same((losses, net), expected)


def test_in_lightning(expected, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # Lightning imports what others have deprecated.
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.objective, self.losses = model(), NextToken(), []
            self.handle = attach(self.net, Momentum())

        def configure_optimizers(self):
            return lamb(self.net)

        def on_train_batch_start(self, batch, index) -> None:
            if index == REWRITE_AT:
                self.net = drop(self.net, self.trainer.optimizers[0])

        def training_step(self, batch, index):
            loss = self.objective(self.net, batch)["loss"]
            self.losses.append(loss.item())
            return loss

        def on_before_optimizer_step(self, optimizer) -> None:
            self.handle.reduce()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(module, DataLoader(BATCHES, batch_size=None))
    same((module.losses, module.net), expected)
