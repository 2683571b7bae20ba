"""Layers: plain `nn.Module`s and the functions behind them.

layer_norm      layer normalisation and its recurrent nets
pooling_mixer   pooling and the control arms of the MetaFormer comparison
attention       multi-head attention on torch's scaled_dot_product_attention
feed_forward    the plain and the gated position-wise network
layout          sequence mixers on images and the other way round
torch_layers    torch's activations and batch norms under the names recipes use
"""

from lamina.nn import torch_layers as torch_layers
from lamina.nn.attention import Attention as Attention
from lamina.nn.attention import KeyValueCache as KeyValueCache
from lamina.nn.feed_forward import FeedForward as FeedForward
from lamina.nn.feed_forward import SwiGLU as SwiGLU
from lamina.nn.layer_norm import ChannelLayerNorm as ChannelLayerNorm
from lamina.nn.layer_norm import LayerNorm as LayerNorm
from lamina.nn.layer_norm import RMSNorm as RMSNorm
from lamina.nn.layer_norm import TokenBatchNorm as TokenBatchNorm
from lamina.nn.layer_norm import layer_norm_reference as layer_norm_reference
from lamina.nn.layer_norm_recurrent import LayerNormGRU as LayerNormGRU
from lamina.nn.layer_norm_recurrent import LayerNormGRUCell as LayerNormGRUCell
from lamina.nn.layer_norm_recurrent import LayerNormLSTM as LayerNormLSTM
from lamina.nn.layer_norm_recurrent import LayerNormLSTMCell as LayerNormLSTMCell
from lamina.nn.layer_norm_recurrent import LayerNormRNN as LayerNormRNN
from lamina.nn.layer_norm_recurrent import LayerNormRNNCell as LayerNormRNNCell
from lamina.nn.layout import GridAsSequence as GridAsSequence
from lamina.nn.layout import SequenceAsGrid as SequenceAsGrid
from lamina.nn.pooling_mixer import ChannelNorm2d as ChannelNorm2d
from lamina.nn.pooling_mixer import IdentityMixer as IdentityMixer
from lamina.nn.pooling_mixer import PoolingMixer as PoolingMixer
from lamina.nn.pooling_mixer import RandomMixer as RandomMixer
from lamina.nn.pooling_mixer import SpatialLinearMixer as SpatialLinearMixer
