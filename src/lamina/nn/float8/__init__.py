"""Layers that train on float8 numbers and keep them for the backward pass (COAT).

rounding    numbers to codes and back: a scale a tensor, or one for every 16 numbers
linear      products of float8 numbers
norms       layer norm and RMS norm; activation: SiLU, GELU and the gated network
saved       any module's saved tensors in float8, and their bytes
"""

from lamina.nn.float8.activation import Float8Activation as Float8Activation
from lamina.nn.float8.activation import Float8GatedMLP as Float8GatedMLP
from lamina.nn.float8.linear import Float8Linear as Float8Linear
from lamina.nn.float8.linear import float8_linear as float8_linear
from lamina.nn.float8.norms import Float8LayerNorm as Float8LayerNorm
from lamina.nn.float8.norms import Float8RMSNorm as Float8RMSNorm
from lamina.nn.float8.norms import float8_norm as float8_norm
from lamina.nn.float8.rounding import Formats as Formats
from lamina.nn.float8.rounding import group_max as group_max
from lamina.nn.float8.rounding import per_group as per_group
from lamina.nn.float8.rounding import per_tensor as per_tensor
from lamina.nn.float8.rounding import restore as restore
from lamina.nn.float8.saved import keeping_float8 as keeping_float8
from lamina.nn.float8.saved import save_in_float8 as save_in_float8
from lamina.nn.float8.saved import saved_bytes as saved_bytes
