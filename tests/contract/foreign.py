"""Small models that no part was written for, and ours beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def runs_bf16_lstm() -> bool:
    """Torch's LSTM has no bf16 kernel on processors without AVX-512."""
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError:
        return False
    return True


Maker = Callable[[], tuple[nn.Module, Mapping[str, Any]]]


def tokens(rows: int = 2, context: int = 8, vocabulary: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (rows, context), generator=torch.Generator().manual_seed(seed))


class HomeAttention(nn.Module):
    """What a user might have written on a Sunday."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2) / x.shape[-1] ** 0.5, -1)
        return self.out(weights @ self.v(x))


class HomeBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_a, self.attend = nn.LayerNorm(width), HomeAttention(width)
        self.ln_b, self.net = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.ln_a(x))
        return x + self.net(self.ln_b(x))


class HomeMade(nn.Module):
    """A classifier of vectors in sequence, with a recurrent layer in front."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.read = nn.LSTM(5, width, batch_first=True)
        self.stack = nn.Sequential(*(HomeBlock(width) for _ in range(depth)))
        self.norm, self.answer = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.norm(self.stack(self.read(x)[0])).mean(1))


def home_made() -> tuple[nn.Module, Mapping[str, Any]]:
    torch.manual_seed(0)
    return HomeMade(), {"inputs": torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))}


def ours() -> tuple[nn.Module, Mapping[str, Any]]:
    from lamina.models import Transformer

    torch.manual_seed(0)
    return Transformer(4, 16, 2, vocabulary=32, context=8), {"input_ids": tokens()}


def llama() -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": tokens()}


def vision() -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=2,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return ViTForImageClassification(config), {"pixel_values": images}


def convolutional() -> tuple[nn.Module, Mapping[str, Any]]:
    """A net of convolutions whose batch norms have statistics: torch.fx cannot trace it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[2, 2],
        layer_type="basic",
        num_labels=3,
        downsample_in_first_stage=False,
    )
    model = ResNetForImageClassification(config)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model, {"pixel_values": images}


FOREIGN: dict[str, Maker] = {
    "home_made": home_made,
    "llama": llama,
    "vision": vision,
    "convolutional": convolutional,
}
ALL: dict[str, Maker] = {"ours": ours, **FOREIGN}
