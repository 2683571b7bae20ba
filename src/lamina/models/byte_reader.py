"""Let any encoder of embedded tokens read the bytes of files: ByteFormer's front before a model that is there already.

Source: Horton et al., Bytes Are All You Need (2023), arXiv 2306.00238, section 3.1.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any

from torch import Tensor, nn

from lamina import anatomy
from lamina.anatomy.token_table import token_table
from lamina.errors import AnatomyError, ShapeError
from lamina.nn.byte_tokens import ByteTokens
from lamina.recipe import Node, factory
from lamina.registry import Slot, register


@register("model", "byte_reader", source="Horton et al. 2023, arXiv 2306.00238, section 3.1")
class ByteReader(nn.Module):
    """Put byte tokens in front of an encoder, in place of its table of tokens.

    inputs (B, S) whole numbers 0..255, padded with -1 -> whatever the encoder returns. It is called with
    `inputs_embeds` (B, N, width) and `attention_mask` (B, N), as models of transformers and our `transformer` are; its
    own positions are added to the byte tokens. The table of tokens, which nobody reads any more, is taken out of it,
    in place (where the output projection is tied to it, that keeps the weight).

    Args:
        model: the encoder: a model that is there, or built as model(vocabulary=257, context=, classes=, causal=False),
            as far as it names them.
        kernel: bytes a token is made of, even, their starts kernel / 2 apart; 0 = each byte is a token.
        context: of an encoder that is built: the most tokens of a file, (bytes - kernel) // (kernel / 2) + 1.
        classes: of an encoder that is built.
    Raises:
        AnatomyError: the model's forward takes no `inputs_embeds`, or it has no table of tokens.
        ShapeError: an odd kernel; at the call, no bytes, or more tokens than the encoder takes.
    Example:
        >>> import torch
        >>> encoder = {"name": "transformer", "depth": 1, "width": 16, "heads": 2, "position": "learned"}
        >>> ByteReader(encoder, kernel=8, context=64, classes=3)(torch.randint(256, (2, 100))).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: Annotated[Node | nn.Module, Slot("model")],
        kernel: int = 16,
        context: int = 1024,
        classes: int = 2,
    ) -> None:
        super().__init__()
        if context < 1 or classes < 1:
            raise ShapeError(f"context and classes must be at least 1, got {context} and {classes}")
        if not isinstance(model, nn.Module):
            sizes: dict[str, Any] = {"vocabulary": 257, "context": context, "classes": classes, "causal": False}
            model = factory("model", model)(**sizes)
        assert isinstance(model, nn.Module)
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            raise AnatomyError(
                f"{type(model).__name__}.forward takes no inputs_embeds, so nothing can be put in front of it"
            )
        path = token_table(model)
        table = anatomy.get(model, path)
        assert isinstance(table, nn.Embedding)
        self.tokens = ByteTokens(table.embedding_dim, kernel).to(table.weight.device)
        anatomy.swap(model, path, nn.Identity(), all=True)
        self.model = model
        self.takes_mask = "attention_mask" in inspect.signature(model.forward).parameters

    def forward(self, inputs: Tensor) -> Any:
        """Return the encoder's output."""
        tokens, mask = self.tokens(inputs)
        return self.model(inputs_embeds=tokens, **({"attention_mask": mask.long()} if self.takes_mask else {}))
