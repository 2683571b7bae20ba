"""Models for the tests of depth routing, with weights large enough that what a token sees shows in the outputs."""

import torch

from lamina.models import Transformer
from lamina.nn import TokenRouting
from lamina.rewrite import DepthRouting, rewrite

DEPTH, VOCABULARY = 4, 64


def louder(model, factor=6.0):
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(factor)
    return model.eval()


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )
    return louder(LlamaForCausalLM(config))


def gpt2(**more):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 64}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**sizes, **still, bos_token_id=None, eos_token_id=None, **more)
    return louder(GPT2LMHeadModel(config))


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    sight = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=2,
        projection_dim=16,
    )
    config = LlavaConfig(vision_config=sight, text_config=text, image_token_id=VOCABULARY - 1, vision_feature_layer=-1)
    return louder(LlavaForConditionalGeneration(config), 3.0)


def ours(**more):
    torch.manual_seed(0)
    return louder(Transformer(DEPTH, 32, 4, vocabulary=VOCABULARY, context=64, **more))


def route(model, *args, **options):
    return rewrite(model, DepthRouting(*args, **options))


def routings(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, TokenRouting)}


def ids(rows=4, count=20, seed=1):
    return torch.randint(VOCABULARY - 2, (rows, count), generator=torch.Generator().manual_seed(seed))


def padded(rows=4, count=20):
    """Token ids padded on the left by another number in each row, their mask, and positions counted from the first."""
    mask = torch.ones(rows, count, dtype=torch.long)
    mask[0, :7] = 0
    mask[2, :3] = 0
    return ids(rows, count), mask, (mask.cumsum(1) - 1).clamp(min=0)
