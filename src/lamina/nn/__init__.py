"""Layers: plain `nn.Module`s and the functions behind them.

layer_norm      layer normalisation and its recurrent nets
pooling_mixer   pooling and the control arms of the MetaFormer comparison
attention       multi-head attention on torch's scaled_dot_product_attention
"""

from lamina.nn import activations as activations
from lamina.nn.attention import Attention as Attention
from lamina.nn.attention import KeyValueCache as KeyValueCache
from lamina.nn.layout import GridAsSequence as GridAsSequence
from lamina.nn.layout import SequenceAsGrid as SequenceAsGrid
