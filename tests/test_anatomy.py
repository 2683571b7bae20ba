from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lamina.anatomy import (
    Anatomy,
    Sublayer,
    attention_cores,
    describe,
    dissect,
    get,
    keep_blocks,
    swap,
)
from lamina.errors import AnatomyError

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4, **{k: SIZES[k] for k in list(SIZES)[:4]}}


def hf(name: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


def llava(name: str, config: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    parts = {
        "vision_config": transformers.CLIPVisionConfig(**IMAGE),
        "text_config": transformers.LlamaConfig(**GROUPED),
    }
    return hf(name, config, **parts, image_token_id=31, image_token_index=31)


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def feed_forward(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))


class Block(nn.Module):
    """The block of our own models, in any order of norms."""

    def __init__(self, place: str = "pre", mixer: Callable[[], nn.Module] = Attention) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.feed_forward = (
            nn.LayerNorm(16),
            mixer(),
            nn.RMSNorm(16),
            feed_forward(),
        )
        self.place = place
        with torch.no_grad():
            self.norm1.weight.uniform_(0.5, 1.5)
            self.norm2.weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        def mix(x: Tensor) -> Tensor:
            out = self.mixer(x)
            return out[0] if isinstance(self.mixer, nn.GRU) else out

        if self.place == "pre":
            x = x + mix(self.norm1(x))
            return x + self.feed_forward(self.norm2(x))
        if self.place == "post":
            x = self.norm1(x + mix(x))
            return self.norm2(x + self.feed_forward(x))
        if self.place == "sandwich":
            x = x + self.norm1(mix(x))
            return x + self.norm2(self.feed_forward(x))
        if self.place == "parallel":
            h = self.norm1(x)
            return x + mix(h) + self.norm2(self.feed_forward(h))
        return x + mix(x)


class Stubborn(Block):
    """Cannot run on symbols: reads a size as a number."""

    def forward(self, x: Tensor) -> Tensor:
        if range(x.shape[1]) == range(0):
            raise ValueError("empty")
        return super().forward(x)


class Inline(nn.Module):
    """An attention and a gated feed-forward written out in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.ln2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.w1, self.w2, self.w3 = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        h = self.ln2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, residual: bool) -> None:
        super().__init__()
        self.norm, self.inner, self.residual = nn.LayerNorm(16), inner, residual

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(self.norm(x))
        return x + out if self.residual else out


class Pairs(nn.Module):
    """Blocks without a forward of their own: (attention, feed-forward) pairs in a list of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Wrapped(Attention(), False), Wrapped(feed_forward(), False)]) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, inner in self.layers:
            x = x + attention(x)
            x = x + inner(x)
        return x


class Residual(nn.Module):
    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Conv2d(into, out, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16, 2), Residual(16, 16), Residual(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


class Net(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, block: Callable[[], nn.Module], depth: int = 3, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([block()] * depth if shared else [block() for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


OWN: dict[str, Callable[[], nn.Module]] = {
    **{p: functools.partial(Net, functools.partial(Block, p)) for p in ("pre", "post", "sandwich", "parallel", "none")},
    "recurrent": lambda: Net(lambda: Block("pre", lambda: nn.GRU(16, 16, batch_first=True))),
    "stubborn": lambda: Net(lambda: Stubborn("pre")),
    "inline": lambda: Net(Inline),
    "shared": lambda: Net(Block, 4, shared=True),
    "single": lambda: Net(Block, 1),
    "flat": lambda: nn.Sequential(nn.Embedding(32, 16), Block(), Block(), nn.Linear(16, 32)),
    "pairs": Pairs,
    "sequences": lambda: nn.Sequential(
        *(nn.Sequential(Wrapped(Attention(), True), Wrapped(feed_forward(), True)) for _ in range(3))
    ),
    "resnet": ResNet,
}


@functools.cache
def model(name: str) -> nn.Module:
    return make(name)


def make(name: str) -> nn.Module:
    if name in OWN:
        torch.manual_seed(0)
        return OWN[name]().eval()
    builders: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: hf("LlamaForCausalLM", "LlamaConfig", **GROUPED),
        "mistral": lambda: hf("MistralForCausalLM", "MistralConfig", **GROUPED),
        "qwen2": lambda: hf("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
        "gemma2": lambda: hf("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=4),
        "gpt2": lambda: hf(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=16,
            n_layer=2,
            n_head=4,
            vocab_size=32,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=1,
        ),
        "gpt_neox": lambda: hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
        "gpt_neox_serial": lambda: hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES, use_parallel_residual=False),
        "opt": lambda: hf(
            "OPTForCausalLM",
            "OPTConfig",
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
            ffn_dim=48,
            word_embed_proj_dim=16,
        ),
        "opt_post": lambda: hf(
            "OPTForCausalLM",
            "OPTConfig",
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
            ffn_dim=48,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
        ),
        "bert": lambda: hf("BertForSequenceClassification", "BertConfig", **SIZES),
        "roberta": lambda: hf("RobertaModel", "RobertaConfig", **SIZES),
        "albert": lambda: hf("AlbertModel", "AlbertConfig", **{**SIZES, "num_hidden_layers": 3}, embedding_size=8),
        "distilbert": lambda: hf(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=16,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            vocab_size=32,
            max_position_embeddings=32,
        ),
        "vit": lambda: hf("ViTForImageClassification", "ViTConfig", **IMAGE),
        "swin": lambda: hf(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        "t5": lambda: hf(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=16,
            d_kv=4,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            vocab_size=32,
            decoder_start_token_id=0,
        ),
        "bart": lambda: hf(
            "BartForConditionalGeneration",
            "BartConfig",
            d_model=16,
            encoder_layers=2,
            decoder_layers=3,
            vocab_size=32,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=32,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
        ),
        "falcon": lambda: hf("FalconForCausalLM", "FalconConfig", **SIZES, new_decoder_architecture=False),
        "mixtral": lambda: hf("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
        "olmo2": lambda: hf("Olmo2ForCausalLM", "Olmo2Config", **GROUPED),
        "bloom": lambda: hf(
            "BloomForCausalLM", "BloomConfig", hidden_size=16, n_layer=2, n_head=4, vocab_size=32, pad_token_id=0
        ),
        "bert_decoder": lambda: hf("BertLMHeadModel", "BertConfig", **SIZES, is_decoder=True, add_cross_attention=True),
        "modernbert": lambda: hf("ModernBertModel", "ModernBertConfig", **SIZES, cls_token_id=1, sep_token_id=1),
        "llava": lambda: llava("LlavaForConditionalGeneration", "LlavaConfig"),
        "encoder": lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 48, batch_first=True), 2, enable_nested_tensor=False
        ),
        "decoder": lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(16, 4, 48, batch_first=True, norm_first=True), 2, norm=nn.LayerNorm(16)
        ),
    }
    torch.manual_seed(0)
    return builders[name]()


TokenIds = torch.tensor([[3, 7, 1, 30, 2], [4, 4, 9, 8, 5]])


def batch(name: str) -> dict[str, Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    special = {
        "vit": {"pixel_values": noise(2, 3, 8, 8)},
        "swin": {"pixel_values": noise(2, 3, 16, 16)},
        "resnet": {"inputs": noise(2, 3, 8, 8)},
        "bart": {"input_ids": TokenIds, "decoder_input_ids": TokenIds},
        "t5": {"input_ids": TokenIds, "decoder_input_ids": TokenIds},
        "encoder": {"src": noise(2, 5, 16)},
        "decoder": {"tgt": noise(2, 5, 16), "memory": noise(2, 4, 16)},
        "pairs": {"inputs": noise(2, 5, 16)},
        "sequences": {"inputs": noise(2, 5, 16)},
    }
    return special.get(name, {"input_ids": TokenIds})


# name: trunk (its path, how many blocks), then per sublayer "kind | parts | norms | place | flags", below the block.
# Flags: T the first part returns a tuple, R the residual is added inside.
DECODER = ("attention | self_attn | input_layernorm | pre | T", "mlp | mlp | post_attention_layernorm | pre |")
TABLE: dict[str, list[tuple[str, int, tuple[str, ...]]]] = {
    "llama": [("model.layers", 2, DECODER)],
    "mistral": [("model.layers", 2, DECODER)],
    "qwen2": [("model.layers", 2, DECODER)],
    "gemma2": [
        (
            "model.layers",
            2,
            (
                "attention | self_attn | input_layernorm post_attention_layernorm | sandwich | T",
                "mlp | mlp | pre_feedforward_layernorm post_feedforward_layernorm | sandwich |",
            ),
        )
    ],
    "gpt2": [("transformer.h", 2, ("attention | attn | ln_1 | pre | T", "mlp | mlp | ln_2 | pre |"))],
    "gpt_neox": [
        (
            "gpt_neox.layers",
            2,
            (
                "attention | attention | input_layernorm | pre | T",
                "mlp | mlp | post_attention_layernorm | pre |",
            ),
        )
    ],
    "opt": [
        (
            "model.decoder.layers",
            2,
            (
                "attention | self_attn | self_attn_layer_norm | pre | T",
                "mlp | fc1 fc2 | final_layer_norm | pre |",
            ),
        )
    ],
    "bert": [
        (
            "bert.encoder.layer",
            2,
            (
                "attention | attention | attention.output.LayerNorm | post | TR",
                "mlp | intermediate output | output.LayerNorm | post | R",
            ),
        )
    ],
    "albert": [
        (
            "encoder.albert_layer_groups.0.albert_layers",
            1,
            (
                "attention | attention | attention.LayerNorm | post | TR",
                "mlp | ffn ffn_output | full_layer_layer_norm | post |",
            ),
        )
    ],
    "distilbert": [
        (
            "distilbert.transformer.layer",
            2,
            (
                "attention | attention | sa_layer_norm | post | T",
                "mlp | ffn | output_layer_norm | post |",
            ),
        )
    ],
    "vit": [
        (
            "vit.layers",
            2,
            (
                "attention | attention | layernorm_before | pre | T",
                "mlp | mlp | layernorm_after | pre |",
            ),
        )
    ],
    "t5": [
        (
            "encoder.block",
            2,
            (
                "attention | layer.0 | layer.0.layer_norm | pre | TR",
                "mlp | layer.1 | layer.1.layer_norm | pre | R",
            ),
        ),
        (
            "decoder.block",
            3,
            (
                "attention | layer.0 | layer.0.layer_norm | pre | TR",
                "cross_attention | layer.1 | layer.1.layer_norm | pre | TR",
                "mlp | layer.2 | layer.2.layer_norm | pre | R",
            ),
        ),
    ],
    "llava": [
        (
            "model.vision_tower.encoder.layers",
            2,
            (
                "attention | self_attn | layer_norm1 | pre | T",
                "mlp | mlp | layer_norm2 | pre |",
            ),
        ),
        ("model.language_model.layers", 2, DECODER),
    ],
    "encoder": [("layers", 2, ("attention | self_attn | norm1 | post | T", "mlp | linear1 linear2 | norm2 | post |"))],
    "decoder": [
        (
            "layers",
            2,
            (
                "attention | self_attn | norm1 | pre | T",
                "cross_attention | multihead_attn | norm2 | pre | T",
                "mlp | linear1 linear2 | norm3 | pre |",
            ),
        )
    ],
    "inline": [("blocks", 3, ("attention | q k v o | ln | pre |", "mlp | w1 w3 w2 | ln2 | pre |"))],
    "none": [("blocks", 3, ("attention | mixer |  | none |",))],
    "parallel": [
        (
            "blocks",
            3,
            (
                "attention | mixer | norm1 | pre |",
                "mlp | feed_forward | norm1 norm2 | sandwich |",
            ),
        )
    ],
    "recurrent": [("blocks", 3, ("branch | mixer | norm1 | pre | T", "mlp | feed_forward | norm2 | pre |"))],
    "shared": [("blocks", 1, ("attention | mixer | norm1 | pre |", "mlp | feed_forward | norm2 | pre |"))],
    "single": [("blocks", 1, ("attention | mixer | norm1 | pre |", "mlp | feed_forward | norm2 | pre |"))],
    "flat": [("", 2, ("attention | mixer | norm1 | pre |", "mlp | feed_forward | norm2 | pre |"))],
    "pairs": [("layers", 3, ("attention | 0 | 0.norm | pre |", "mlp | 1 | 1.norm | pre |"))],
    "sequences": [("", 3, ("attention | 0 | 0.norm | pre | R", "mlp | 1 | 1.norm | pre | R"))],
    "resnet": [
        ("layer1", 2, ("branch | conv1 conv2 | bn1 bn2 | sandwich |",)),
        ("layer2", 2, ("branch | conv1 conv2 | bn1 bn2 | sandwich |",)),
    ],
}
TABLE["bart"] = [
    ("model.encoder.layers", 2, TABLE["opt"][0][2]),
    (
        "model.decoder.layers",
        3,
        (
            TABLE["opt"][0][2][0],
            "cross_attention | encoder_attn | encoder_attn_layer_norm | pre | T",
            TABLE["opt"][0][2][1],
        ),
    ),
]
TABLE["bart"] = [(p, n, tuple(s.replace("pre", "post") for s in subs)) for p, n, subs in TABLE["bart"]]
TABLE["falcon"] = [
    (
        "transformer.h",
        2,
        (
            "attention | self_attention | input_layernorm | pre | T",
            "mlp | mlp | input_layernorm | pre |",
        ),
    )
]
TABLE["mixtral"] = TABLE["llama"]
TABLE["olmo2"] = [
    (
        "model.layers",
        2,
        (
            "attention | self_attn | post_attention_layernorm | sandwich | T",
            "mlp | mlp | post_feedforward_layernorm | sandwich |",
        ),
    )
]
TABLE["bloom"] = [
    (
        "transformer.h",
        2,
        (
            "attention | self_attention | input_layernorm | pre | TR",
            "mlp | mlp | post_attention_layernorm | pre | R",
        ),
    )
]
TABLE["bert_decoder"] = [
    (
        "bert.encoder.layer",
        2,
        (
            TABLE["bert"][0][2][0],
            "cross_attention | crossattention | crossattention.output.LayerNorm | post | TR",
            TABLE["bert"][0][2][1],
        ),
    )
]
TABLE["gpt_neox_serial"] = TABLE["gpt_neox"]
TABLE["opt_post"] = [(p, n, tuple(s.replace("pre", "post") for s in subs)) for p, n, subs in TABLE["opt"]]
TABLE["roberta"] = [("encoder.layer", 2, TABLE["bert"][0][2])]
TABLE["swin"] = [(f"swin.encoder.layers.{i}.blocks", 2, TABLE["vit"][0][2]) for i in (0, 1)]
for _place in ("pre", "post", "sandwich", "stubborn"):
    _where = "pre" if _place == "stubborn" else _place
    TABLE[_place] = [
        ("blocks", 3, (f"attention | mixer | norm1 | {_where} |", f"mlp | feed_forward | norm2 | {_where} |"))
    ]

# name: (embeddings, final norm, head)
ENDS: dict[str, tuple[str, str | None, str | None]] = {
    "llama": ("model.embed_tokens", "model.norm", "lm_head"),
    "gpt2": ("transformer.wte transformer.wpe", "transformer.ln_f", "lm_head"),
    "gpt_neox": ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head"),
    "opt": ("model.decoder.embed_tokens model.decoder.embed_positions", "model.decoder.final_layer_norm", "lm_head"),
    "bert": (
        " ".join(f"bert.embeddings.{k}_embeddings" for k in ("word", "position", "token_type")),
        None,
        "classifier",
    ),
    "roberta": (" ".join(f"embeddings.{k}_embeddings" for k in ("word", "token_type", "position")), None, None),
    "albert": (" ".join(f"embeddings.{k}_embeddings" for k in ("word", "position", "token_type")), None, None),
    "distilbert": (
        " ".join(f"distilbert.embeddings.{k}_embeddings" for k in ("word", "position")),
        None,
        "classifier",
    ),
    "vit": ("vit.embeddings.patch_embeddings.projection", "vit.layernorm", "classifier"),
    "swin": ("swin.embeddings.patch_embeddings.projection", "swin.layernorm", "classifier"),
    "bart": (
        "model.shared model.encoder.embed_tokens model.encoder.embed_positions model.decoder.embed_tokens "
        "model.decoder.embed_positions",
        None,
        "lm_head",
    ),
    "t5": ("shared encoder.embed_tokens decoder.embed_tokens", "decoder.final_layer_norm", "lm_head"),
    "llava": (
        "model.vision_tower.embeddings.patch_embedding model.vision_tower.embeddings.position_embedding "
        "model.language_model.embed_tokens",
        "model.language_model.norm",
        "lm_head",
    ),
    "encoder": ("", None, None),
    "decoder": ("", "norm", None),
    "pre": ("embed", "norm", "head"),
    "flat": ("0", None, "3"),
    "resnet": ("conv1", None, "fc"),
}
CAUSAL = {
    "llama",
    "mistral",
    "qwen2",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "gpt_neox_serial",
    "opt",
    "opt_post",
    "falcon",
    "mixtral",
    "olmo2",
    "bloom",
    "bert_decoder",
}


def spell(block: str, s: Sublayer) -> str:
    def below(paths: tuple[str, ...]) -> str:
        assert all(p.startswith(block + ".") for p in paths)
        return " ".join(p.removeprefix(block + ".") for p in paths)

    assert s.path == s.parts[0]
    flags = ("T" if s.returns == "tuple" else "") + ("R" if s.residual_inside else "")
    return f"{s.kind} | {below(s.parts)} | {below(s.norms)} | {s.place} | {flags}".rstrip()


def check(found: Anatomy, name: str) -> None:
    assert [t.path for t in found.trunks] == [path for path, _, _ in TABLE[name]]
    for trunk, (_, count, want) in zip(found.trunks, TABLE[name], strict=True):
        assert len(trunk.blocks) == count
        for block in trunk.blocks:
            assert [spell(block.path, s) for s in block.sublayers] == list(want), block.path
            assert block.parallel == (name in ("gpt_neox", "parallel", "falcon"))


@pytest.mark.parametrize("name", sorted(TABLE))
def test_static_reading_finds_every_part(name: str) -> None:
    check(dissect(model(name)), name)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_traced_forward_confirms_the_static_reading(name: str) -> None:
    assert dissect(model(name), batch(name)) == dissect(model(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "swin", "t5", "gemma2", "inline", "resnet", "stubborn"])
def test_works_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        empty = make(name)
    check(dissect(empty), name)


@pytest.mark.parametrize("name", sorted(ENDS))
def test_ends_of_the_model(name: str) -> None:
    embeddings, norm, head = ENDS[name]
    found = dissect(model(name))
    assert (found.embeddings, found.final_norm, found.head) == (tuple(embeddings.split()), norm, head)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_causal_and_repeats(name: str) -> None:
    trunks = dissect(model(name)).trunks
    causal = {"t5": [False, True], "bart": [False, True], "llava": [False, True]}.get(
        name, [name in CAUSAL] * len(trunks)
    )
    assert [t.causal for t in trunks] == causal
    assert [t.repeats for t in trunks] == [{"albert": 3, "shared": 4}.get(name, 1)] * len(trunks)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_dissecting_leaves_nothing_behind(name: str) -> None:
    # Fresh, for one that ran before may hold what its forward leaves (Swin's shift) already.
    fresh = make(name)
    state = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in fresh.modules()]
    dissect(fresh, batch(name))
    after = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in fresh.modules()]
    assert state == after
    for m in fresh.modules():
        assert not m._forward_hooks
        assert not any(isinstance(v, fx.Proxy) for v in vars(m).values())


def test_a_missing_first_norm_is_no_post_norm() -> None:
    # ModernBERT's first block has no norm before its attention: the next norm must not be taken for one behind it.
    found = dissect(model("modernbert"))
    assert [s.place for s in found.trunk().blocks[0].sublayers] == ["none", "pre"]
    assert [s.place for s in found.trunk().blocks[1].sublayers] == ["pre", "pre"]
    assert dissect(model("modernbert"), batch("modernbert")) == found


def test_values_overrule_a_wrong_static_reading() -> None:
    class Late(Stubborn):
        def forward(self, x: Tensor) -> Tensor:
            if range(x.shape[1]) == range(0):
                raise ValueError("empty")
            x = self.norm1(x + self.mixer(x))
            return self.norm2(x + self.feed_forward(x))

    late = Net(Late)
    assert dissect(late).trunk().blocks[0].sublayers[0].place == "pre"
    assert [spell("blocks.1", s) for s in dissect(late, batch("pre")).trunk().blocks[1].sublayers] == [
        "attention | mixer | norm1 | post |",
        "mlp | feed_forward | norm2 | post |",
    ]


def test_blocks_beside_each_other_are_refused() -> None:
    class Fan(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.head(self.norm(sum(block(h) for block in self.blocks)))

    class Backwards(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in reversed(self.blocks):
                h = block(h)
            return self.head(h)

    with pytest.raises(AnatomyError, match=r"'blocks.1' does not read what 'blocks.0' gives"):
        dissect(Fan(Block), batch("pre"))
    with pytest.raises(AnatomyError, match=r"do not run in sequence: blocks.2 blocks.1 blocks.0"):
        dissect(Backwards(Block), batch("pre"))


def test_no_blocks_is_a_clear_error() -> None:
    class MyNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.fc = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    with pytest.raises(AnatomyError, match=r"found no repeated blocks in `MyNet` \(looked for .*saw: conv1, fc\)"):
        dissect(MyNet())
    with pytest.raises(AnatomyError, match="has no module 'fcc'; did you mean 'fc'"):
        dissect(MyNet(), blocks="fcc")
    with pytest.raises(AnatomyError, match="blocks='conv1' is a Conv2d"):
        dissect(MyNet(), blocks="conv1")


def test_blocks_names_the_list() -> None:
    net = nn.Module()
    net.stages = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
    found = dissect(net, blocks="stages")
    assert [b.path for b in found.trunk().blocks] == ["stages.0", "stages.1", "stages.2"]
    assert dissect(model("t5"), blocks="decoder.block").trunk().depth == 3


def test_trunk_by_path() -> None:
    found = dissect(model("t5"))
    assert found.trunk("decoder.block").depth == 3
    with pytest.raises(AnatomyError, match=r"several trunks: name one of encoder.block, decoder.block"):
        found.trunk()
    with pytest.raises(AnatomyError, match=r"no trunk at 'decoder.blocks'; did you mean 'decoder.block'"):
        found.trunk("decoder.blocks")
    assert dissect(model("albert")).trunk().depth == 3
    cross = found.trunk("decoder.block").blocks[0].find("cross_attention")
    assert cross is not None
    assert cross.path == "decoder.block.0.layer.1"
    assert found.trunk("encoder.block").blocks[0].find("cross_attention") is None


# name: depth, width, heads, key-value heads, head width, feed-forward, vocabulary, context
SHAPES: dict[str, tuple[int | None, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma2", "llava"), (2, 16, 4, 2, 4, 48, 32, 32)),
    **dict.fromkeys(("gpt_neox", "opt", "bert", "roberta", "distilbert"), (2, 16, 4, 4, 4, 48, 32, 32)),
    "gpt2": (2, 16, 4, 4, 4, 64, 32, 32),
    "albert": (3, 16, 4, 4, 4, 48, 32, 32),
    "vit": (2, 16, 4, 4, 4, 48, None, None),
    "swin": (4, 16, 4, 4, 4, 64, None, None),
    "t5": (3, 16, 4, 4, 4, 48, 32, None),
    "encoder": (2, 16, 4, 4, 4, 48, None, None),
    "decoder": (2, 16, 4, 4, 4, 48, None, None),
    "pre": (3, 16, 4, 4, 4, 40, 32, None),
    "shared": (4, 16, 4, 4, 4, 40, 32, None),
    "recurrent": (3, None, None, None, None, 40, 32, None),
    "resnet": (4, 16, None, None, None, None, None, None),
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_describe_reads_the_sizes(name: str) -> None:
    found = describe(model(name))
    got = (
        found.depth, found.width, found.heads, found.kv_heads, found.head_width, found.feed_forward, found.vocabulary,
        found.context,
    )  # fmt: skip
    want = SHAPES[name]
    if name == "recurrent":
        got, want = (got[0], *got[2:]), (want[0], *want[2:])
    assert got == want
    assert found.parameters == sum(p.numel() for p in model(name).parameters())


@pytest.mark.parametrize(
    "path", ["transformer.h.1.attn", "transformer.h.0", "transformer.h.1.mlp.c_fc", "transformer.wte"]
)
def test_swap_puts_and_returns(path: str) -> None:
    gpt2 = make("gpt2")
    old = get(gpt2, path)
    new = nn.Identity()
    assert swap(gpt2, path, new) is old
    assert get(gpt2, path) is new
    assert [n for n, m in gpt2.named_modules() if m is new] == [path]


def test_swap_in_a_sequential_runs() -> None:
    flat = make("flat")
    swap(flat, "2", nn.Identity())
    x = TokenIds
    torch.testing.assert_close(flat(x), flat[3](flat[1](flat[0](x))))


def test_swap_refuses_shared_modules_unless_told() -> None:
    shared = make("shared")
    with pytest.raises(AnatomyError, match=r"'blocks.2' is shared by 'blocks.0', 'blocks.1', 'blocks.2', 'blocks.3'"):
        swap(shared, "blocks.2", nn.Identity())
    new = nn.Identity()
    swap(shared, "blocks.2", new, all=True)
    assert all(b is new for b in shared.blocks)
    with pytest.raises(AnatomyError, match=r"no module 'block.1'"):
        swap(shared, "block.1", new)
    with pytest.raises(AnatomyError, match="the path is empty"):
        swap(shared, "", new)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_keep_blocks_is_the_model_with_the_others_skipped(data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, 5))
    indices = data.draw(st.permutations(range(depth)).flatmap(lambda p: st.integers(1, depth).map(lambda n: p[:n])))
    net = Net(Block, depth).eval()
    blocks = list(net.blocks)
    h = net.embed(TokenIds)
    for i in indices:
        h = blocks[i](h)
    kept = keep_blocks(net, "blocks", indices)
    assert kept is net.blocks
    assert list(kept) == [blocks[i] for i in indices]
    torch.testing.assert_close(net(TokenIds), net.head(net.norm(h)))


def test_keep_blocks_keeps_names_and_class_of_the_container() -> None:
    class Doubling(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Module()
    net.body = Doubling(OrderedDict(one=nn.Linear(2, 2), two=nn.ReLU(), three=nn.Linear(2, 2)))
    old = net.body
    kept = keep_blocks(net, "body", [2, 1])
    assert [n for n, _ in kept.named_children()] == ["three", "two"]
    assert len(old) == 3
    x = torch.randn(3, 2)
    torch.testing.assert_close(kept(x), 2 * torch.relu(old.three(x)))


def test_dissecting_draws_no_random_number_and_sees_dropped_branches() -> None:
    class Dropping(Block):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and torch.rand(()).item() < 1.1:
                return x
            return super().forward(x)

    class Drawing(Block):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            return super().forward(x)

    net = Net(Dropping).train()
    assert [s.kind for s in dissect(net).trunk().blocks[0].sublayers] == ["attention", "mlp"]
    assert all(m.training for m in net.modules())
    drawing = Net(Drawing)
    state = torch.get_rng_state()
    dissect(drawing)
    assert torch.equal(torch.get_rng_state(), state)


def test_keep_blocks_trims_the_config() -> None:
    gemma = make("gemma2")
    types = list(gemma.config.layer_types)
    assert len(set(types)) == 2
    keep_blocks(gemma, "model.layers", [1])
    assert gemma.config.num_hidden_layers == 1
    assert gemma.config.layer_types == [types[1]]
    gpt2 = make("gpt2")
    keep_blocks(gpt2, "transformer.h", [0])
    assert gpt2.config.n_layer == 1
    assert describe(gpt2).depth == 1


def test_keep_blocks_trims_only_its_own_trunk() -> None:
    t5 = make("t5")
    keep_blocks(t5, "decoder.block", [0, 2])
    assert (t5.config.num_layers, t5.config.num_decoder_layers) == (2, 2)
    keep_blocks(t5, "encoder.block", [0])
    assert (t5.config.num_layers, t5.config.num_decoder_layers) == (1, 2)
    assert (t5.encoder.config.num_layers, t5.decoder.config.num_layers) == (1, 2)
    eyes = make("llava")
    keep_blocks(eyes, "model.vision_tower.encoder.layers", [1])
    assert eyes.config.vision_config.num_hidden_layers == 1
    assert eyes.config.text_config.num_hidden_layers == 2


@pytest.mark.parametrize("indices", [[], [0, 0], [2], [-1]])
def test_keep_blocks_refuses_bad_indices(indices: list[int]) -> None:
    with pytest.raises(AnatomyError, match=r"'transformer.h' has blocks 0..1; cannot keep"):
        keep_blocks(model("gpt2"), "transformer.h", indices)
    with pytest.raises(AnatomyError, match="is a GPT2Attention, expected a ModuleList"):
        keep_blocks(model("gpt2"), "transformer.h.0.attn", [0])


def test_attention_cores_are_what_numbers_a_cache_slot() -> None:
    llama = model("llama")
    assert attention_cores(llama, "model.layers.1") == [get(llama, "model.layers.1.self_attn")]
    bert = model("bert")
    assert attention_cores(bert, "bert.encoder.layer.0") == [get(bert, "bert.encoder.layer.0.attention.self")]
    assert attention_cores(model("pre"), "blocks.0") == []


def test_wrapped_models_are_read_bare() -> None:
    compiled = torch.compile(model("llama"), backend="eager")
    assert dissect(compiled) == dissect(model("llama"))
    assert describe(compiled).depth == 2


def test_a_dissected_model_still_generates_the_same() -> None:
    swin = make("swin")
    with torch.no_grad():
        want = swin(**batch("swin")).logits
        dissect(swin)
        torch.testing.assert_close(swin(**batch("swin")).logits, want, rtol=0, atol=0)


@given(order=st.permutations(["a", "norm", "b", "n2"]), place=st.sampled_from(["pre", "post"]))
@settings(max_examples=10, deadline=None)
def test_the_order_of_registration_does_not_matter(order: list[str], place: str) -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = {"a": Attention(), "norm": nn.LayerNorm(16), "b": feed_forward(), "n2": nn.LayerNorm(16)}
            for name in order:
                setattr(self, name, parts[name])

        def forward(self, x: Tensor) -> Tensor:
            for norm, part in ((self.norm, self.a), (self.n2, self.b)):
                x = x + part(norm(x)) if place == "pre" else norm(x + part(x))
            return x

    block = dissect(Net(Shuffled, 2)).trunk().blocks[1]
    assert [spell(block.path, s) for s in block.sublayers] == [
        f"attention | a | norm | {place} |",
        f"mlp | b | n2 | {place} |",
    ]


def test_all_paths_are_named_modules() -> None:
    for name in TABLE:
        net = model(name)
        known = {n for n, _ in net.named_modules()}
        found = dissect(net)
        paths = {t.path for t in found.trunks} | set(found.embeddings) | {found.final_norm, found.head} - {None}
        for s in itertools.chain.from_iterable(b.sublayers for t in found.trunks for b in t.blocks):
            paths |= {s.path, *s.parts, *s.norms}
        assert paths <= known


class Loop(nn.Module):
    """Blocks in a python list, registered one by one."""

    def __init__(self, makes: Callable[[], nn.Module] = Block, count: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.layers = [makes() for _ in range(count)]
        for i, layer in enumerate(self.layers):
            self.add_module(f"layer_{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def test_blocks_numbered_alike_are_a_stack() -> None:
    found = dissect(Loop())
    assert [b.path for b in found.trunk().blocks] == ["layer_0", "layer_1", "layer_2"]
    assert [s.kind for s in found.trunk().blocks[0].sublayers] == ["attention", "mlp"]
    assert (found.trunk().path, found.embeddings, found.head) == ("", ("embed",), "head")
    assert dissect(Loop(), batch("pre")) == found
    inside = nn.ModuleDict({"body": Loop(count=2), "head": nn.Linear(32, 4)})
    found = dissect(inside)
    assert (found.trunk().path, found.embeddings) == ("body", ("body.embed",))
    with pytest.raises(AnatomyError, match="'body' is a Loop, expected a ModuleList or Sequential"):
        keep_blocks(inside, "body", [0])


def test_siblings_of_another_class_that_are_blocks_count_too() -> None:
    net = Net(Block, 4)
    net.blocks[1], net.blocks[2] = Inline(), Block("post", lambda: nn.GRU(16, 16, batch_first=True))
    net.blocks.append(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    assert [b.path for b in dissect(net).trunk().blocks] == [f"blocks.{i}" for i in range(4)]


def test_blocks_of_many_classes_are_named_in_the_hint() -> None:
    net = Net(Block, 2)
    net.blocks = nn.ModuleList([Block(), Inline()])
    with pytest.raises(AnatomyError, match=r"Pass blocks='blocks'\.$"):
        dissect(net)
    assert dissect(net, blocks="blocks").trunk().depth == 2
    with pytest.raises(AnatomyError, match=r"Pass blocks= the path of the list, if there is one\.$"):
        dissect(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_a_module_at_several_places_of_a_list_is_measured_at_each() -> None:
    net = Net(Block, 2)
    net.blocks = nn.ModuleList([net.blocks[0], net.blocks[1]] * 2)
    assert dissect(net, batch("pre")) == dissect(net)
    assert dissect(net).trunk().depth == 4


def test_routed_and_shared_experts_are_one_branch() -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    moe = hf("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **GROUPED, **sizes, shared_expert_intermediate_size=24)
    block = dissect(moe).trunk().blocks[0]
    assert [spell(block.path, s) for s in block.sublayers] == [
        "attention | self_attn | input_layernorm | pre | T",
        "mlp | mlp | post_attention_layernorm | pre |",
    ]
    assert not block.parallel


def test_a_tuple_put_together_is_a_tuple() -> None:
    class Appending(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (super().forward(x),) + (x, None)[1:]  # noqa: RUF005

    class Symbolic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Appending()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            out = self.inner(x)
            return (out[0],) + out[1:]  # noqa: RUF005

    class Taking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(16), Symbolic()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(self.norm(x))[0]

    block = dissect(Net(Taking)).trunk().blocks[0]
    assert spell(block.path, block.sublayers[0]) == "attention | attention | norm | pre | T"


def test_mixing_positions_is_no_feed_forward() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.positions, self.channels = (
                nn.LayerNorm(16), nn.LayerNorm(16), feed_forward(5), feed_forward(),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.positions(self.norm1(x).mT).mT
            return x + self.channels(self.norm2(x))

    block = dissect(Net(Mixer)).trunk().blocks[0]
    assert [(s.kind, s.path) for s in block.sublayers] == [
        ("branch", "blocks.0.positions"),
        ("mlp", "blocks.0.channels"),
    ]
    assert describe(Net(Mixer)).feed_forward == 40


def test_an_attention_that_says_so_is_one_whatever_its_widths_say() -> None:
    funnel = hf("FunnelBaseModel", "FunnelConfig", vocab_size=32, block_sizes=[1, 1], d_model=16, n_head=4, d_head=4)
    kinds = [[s.kind for s in t.blocks[0].sublayers] for t in dissect(funnel).trunks]
    assert kinds == [["attention", "mlp"], ["attention", "mlp"]]


def test_heads_of_a_query_cut_in_low_rank() -> None:
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
    found = describe(hf("DeepseekV3ForCausalLM", "DeepseekV3Config", **{**GROUPED, "num_key_value_heads": 4}, **ranks))
    assert (found.heads, found.head_width) == (4, 12)


def test_a_sum_in_place_is_a_sum() -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            out = self.mixer(self.norm1(x))
            out += x
            last = self.feed_forward(self.norm2(out))
            last.add_(out)
            return last

    class Changing(Block):
        def forward(self, x: Tensor) -> Tensor:
            x += self.mixer(self.norm1(x))
            x += self.feed_forward(self.norm2(x))
            return x

    want = [spell("blocks.0", s) for s in dissect(Net(Block)).trunk().blocks[0].sublayers]
    for kind in (InPlace, Changing):
        net = Net(kind)
        assert [spell("blocks.0", s) for s in dissect(net).trunk().blocks[0].sublayers] == want
        assert dissect(net, batch("pre")) == dissect(net)


def test_parts_of_a_list_that_add_the_residual_say_so() -> None:
    net = Net(Block, 2)
    net.blocks = nn.ModuleList(
        nn.ModuleList([Wrapped(Attention(), True), Wrapped(feed_forward(), True)]) for _ in range(2)
    )
    assert [(s.kind, s.place, s.residual_inside) for s in dissect(net).trunk().blocks[1].sublayers] == [
        ("attention", "pre", True),
        ("mlp", "pre", True),
    ]
