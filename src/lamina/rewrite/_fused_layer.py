"""Keep torch's transformer encoder off the kernels that read its layers' numbers instead of calling their parts."""

from __future__ import annotations

from torch import nn


def leave_fused_path(model: nn.Module, layer_path: str) -> None:
    """Let the encoder layer at a path run part by part, in evaluation too; any other module is left alone.

    In evaluation torch's layer hands every weight to one fused kernel, and its encoder packs padded batches for that.
    """
    layer = model.get_submodule(layer_path)
    if not isinstance(layer, nn.TransformerEncoderLayer):
        return
    # "No activation the kernel knows", by which the layer itself declares that it cannot be fused.
    layer.activation_relu_or_gelu = 0
    encoder = model.get_submodule(layer_path.rpartition(".")[0].rpartition(".")[0])
    if isinstance(encoder, nn.TransformerEncoder):
        encoder.use_nested_tensor = False
