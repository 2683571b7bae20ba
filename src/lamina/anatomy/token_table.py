"""Find the table that a model looks its tokens up in."""

from __future__ import annotations

from torch import nn

from lamina.errors import AnatomyError


def token_table(model: nn.Module) -> str:
    """Return the path of the table of tokens: the one that the model names, else the first `nn.Embedding` of its tree.

    Raises:
        AnatomyError: it has none.
    """
    named = getattr(model, "get_input_embeddings", None)
    try:
        table = named() if callable(named) else None
    except NotImplementedError:
        table = None
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    path = next((p for p, module in found.items() if module is table), None) or next(iter(found), None)
    if path is None:
        raise AnatomyError(f"{type(model).__name__} has no table that tokens are looked up in: it has no nn.Embedding")
    return path
