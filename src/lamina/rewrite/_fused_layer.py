"""Keep torch's transformer encoder off the kernels that read its norms' numbers instead of calling them."""

from __future__ import annotations

from torch import nn


def leave_fused_path(model: nn.Module, norm_path: str) -> None:
    """Let the encoder layer that holds a norm run part by part, in evaluation too; any other parent is left alone."""
    layer_path = norm_path.rpartition(".")[0]
    layer = model.get_submodule(layer_path)
    if not isinstance(layer, nn.TransformerEncoderLayer):
        return
    # "No activation the kernel knows", by which the layer itself declares that it cannot be fused.
    layer.activation_relu_or_gelu = 0
    encoder_path = layer_path.rpartition(".")[0].rpartition(".")[0]
    encoder = model.get_submodule(encoder_path) if layer_path else layer
    if isinstance(encoder, nn.TransformerEncoder):
        # The encoder packs padded batches for that kernel.
        encoder.use_nested_tensor = False
