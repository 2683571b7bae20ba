"""`Replace("attention", "simplified_linear_attention")`: projections and their momentum go along, the grid is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contract.example import Example
from torch import Tensor, nn

from lamina import io
from lamina.anatomy import attention_projections, dissect, get
from lamina.batches import call, logits
from lamina.errors import AnatomyError, RecipeError
from lamina.models import Transformer, VisionTransformer
from lamina.rewrite import Replace, history, rewrite

NAME = "simplified_linear_attention"


def images(rows: int = 8, columns: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(0))}


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=2
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)


def ours(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(8, 2, 2, 16, 2, classes=3, **options)


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(16, 48), nn.Linear(16, 16), 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(16), FusedAttention(), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FusedViT(nn.Module):
    """As timm writes them: queries, keys and values in one weight, no class token, images that are not square."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 16, 2, 2), nn.ModuleList([FusedBlock(), FusedBlock()])
        self.answer = nn.Linear(16, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.answer(x.mean(1))


EXAMPLES = [
    Example(
        "pass", "replace", {"old": "attention", "new": NAME}, model=lambda: ours(), batch=images, bad={"grid": (5, 5)}
    )
]
MODELS = [
    (hugging_face, (8, 8), (4, 4), 1),
    (lambda: ours(pool="mean"), (8, 8), (4, 4), 0),
    (FusedViT, (6, 10), (3, 5), 0),
]


@pytest.mark.parametrize(("make", "size", "grid", "prefix"), MODELS)
def test_projections_and_their_momentum_go_over_and_the_grid_is_found(
    make: Any, size: tuple[int, int], grid: tuple[int, int], prefix: int
) -> None:
    torch.manual_seed(0)
    model, batch = make(), images(*size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    logits(call(model, batch)).square().mean().backward()
    optimizer.step()
    paths = [b.find("attention").path for b in dissect(model).trunk().blocks]
    before = [attention_projections(get(model, path), 2) for path in paths]
    kept = [
        {n: (p.matrix(), p.vector(), optimizer.state[p.weight]["momentum_buffer"][list(p.rows)].clone())
         for n, p in one.named().items()}
        for one in before
    ]  # fmt: skip
    model = rewrite(model, Replace("attention", NAME), data=[batch], optimizer=optimizer)
    decision = history(model)[0].decision
    assert (tuple(decision["grid"]), decision["prefix"], len(decision["paths"])) == (grid, prefix, 2)
    for path, old in zip(paths, kept, strict=True):
        mixer = get(model, path).mixer
        assert (mixer.grid, mixer.prefix, mixer.heads) == (grid, prefix, 2)
        for name, projection in attention_projections(mixer).named().items():
            assert torch.equal(projection.matrix(), old[name][0])
            assert torch.equal(projection.vector(), old[name][1])
            assert torch.equal(optimizer.state[projection.weight]["momentum_buffer"], old[name][2])
        assert not mixer.position.any()
    logits(call(model.train(), batch)).square().mean().backward()
    optimizer.step()


def test_the_grid_may_be_given_as_an_option() -> None:
    for model, prefix in ((hugging_face(), 1), (ours(), 1), (ours(pool="mean"), 0)):
        model = rewrite(model, Replace("attention", NAME, options={"grid": [2, 8]}))
        mixers = [m for m in model.modules() if type(m).__name__ == "SimplifiedLinearAttention"]
        assert [(m.grid, m.prefix) for m in mixers] == [((2, 8), prefix)] * 2
        assert logits(call(model, images())).shape[0] == 2


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model = rewrite(hugging_face(), Replace("attention", NAME, options={"kernel_size": 3})).eval()
    io.save(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(logits(call(io.load(tmp_path / "model"), images())), logits(call(model, images())))


def test_models_without_a_grid_are_refused() -> None:
    text = Transformer(2, 16, 2, vocabulary=32, context=8, causal=False, position="none")
    with pytest.raises(AnatomyError, match="8 tokens, which are not the cells of an image"):
        Replace("attention", NAME).decide(text, [{"input_ids": torch.zeros(2, 8, dtype=torch.long)}])
    decoder = Transformer(2, 16, 2, vocabulary=32, context=8)
    with pytest.raises(AnatomyError, match="mixes whole images, but the attention below 'blocks' sees earlier tokens"):
        Replace("attention", NAME).decide(decoder, [{"input_ids": torch.zeros(2, 8, dtype=torch.long)}])
    with pytest.raises(AnatomyError, match="17 tokens, which are not the 5 x 5 given"):
        Replace("attention", NAME, options={"grid": [5, 5]}, match="blocks.1.*").decide(ours(), [images()])
    with pytest.raises(RecipeError, match="grid is for mixers of images; attention mixes sequences"):
        Replace("attention", "attention", grid=(2, 2)).decide(ours())
