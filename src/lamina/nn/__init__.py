"""Layers: plain `nn.Module`s and the functions behind them.

layer_norm      layer normalisation and its recurrent nets
hypernetwork    the weights of any module generated from a condition
pooling_mixer   pooling and the control arms of the MetaFormer comparison
attention       multi-head attention on torch's scaled_dot_product_attention
attention_kernels  what it does with queries, keys and values: windows, blocks, features, learned weights
byte_tokens     bytes as tokens, fewer than there are bytes
cross_attention  attention of one sequence to another, of another width
elastic         layers and blocks that run whole or in part; which part, and what it costs
equilibrium     mean field at its unique equilibrium: monotone couplings, proximal softmax, fixed points
evonorm         norm and activation as one layer
feed_forward    the plain and the gated position-wise network
float8          layers that train on float8 numbers and keep them, in a byte each, for the backward pass
fields          radiance fields: hash tables, perceptron, low-rank tensors, grid; the renderer of any of them
fourier_head    logits over ordered bins as a Fourier density; fourier_density: the density itself
hopfield        association with stored patterns: mixer, pooling, look-up, memory; attention is one case of it
hypercomplex    linear layers and convolutions with 1/n of the weights
hyper_convolution  kernels computed from coordinates, and HyperZZW's products of them with the maps
linear_attention  attention in time linear in the tokens, for images
layout          sequence mixers on images and the other way round
parameter_attention  attention to learned pairs, a projection whose weights can grow
local_global_attention  attention inside groups of tokens, and among a few latents of all groups
multigrid       a linear map over a whole grid as a V-cycle of small convolutions; spectral_convolution: by frequencies
ode             neural ODEs and SDEs, and what a step of their solvers would cost
patch_embedding  patches of a map, with wider views beside them
progressive_norm  layer norm that ends as batch norm (PRepBN), and batch norm with a skip (RepBN)
projection      the network between features and a contrastive loss
prototype       distances to learned prototypes; a head that decides by them
raft_mixer      MLPs over columns and rows of a map, or over all of it; resize_token_mixing: at any size
random_feature_attention  frozen random heads over a set, values in closed form; random_feature_mlp: without the set
ridge_regression  ridge regression on features of any kind, in blocks
token_pooling   one vector of many tokens, cut and of length one
token_router    which tokens a layer computes, and which pass it by
torch_layers    torch's activations and batch norms under the names recipes use
windowed_attention  attention in windows of a sequence, shifted ones too; the merging of neighbours
"""

from lamina.nn import torch_layers as torch_layers
from lamina.nn.attention import Attention as Attention
from lamina.nn.attention import KeyValueCache as KeyValueCache
from lamina.nn.byte_tokens import ByteEmbedding as ByteEmbedding
from lamina.nn.byte_tokens import ByteTokens as ByteTokens
from lamina.nn.byte_tokens import TokenReduction1d as TokenReduction1d
from lamina.nn.byte_tokens import byte_tokens as byte_tokens
from lamina.nn.cross_attention import CrossAttention as CrossAttention
from lamina.nn.elastic import Subnet as Subnet
from lamina.nn.elastic import Supernet as Supernet
from lamina.nn.elastic import is_elastic as is_elastic
from lamina.nn.elastic import supernet as supernet
from lamina.nn.equilibrium import EquilibriumHead as EquilibriumHead
from lamina.nn.equilibrium import MeanFieldEquilibrium as MeanFieldEquilibrium
from lamina.nn.evonorm import EvoNorm as EvoNorm
from lamina.nn.evonorm import EvoNorm1d as EvoNorm1d
from lamina.nn.evonorm import EvoNorm2d as EvoNorm2d
from lamina.nn.evonorm import EvoNorm3d as EvoNorm3d
from lamina.nn.evonorm import normalize_and_activate as normalize_and_activate
from lamina.nn.feed_forward import FeedForward as FeedForward
from lamina.nn.feed_forward import SwiGLU as SwiGLU
from lamina.nn.fields import GridField as GridField
from lamina.nn.fields import HashField as HashField
from lamina.nn.fields import LowRankField as LowRankField
from lamina.nn.fields import MLPField as MLPField
from lamina.nn.fields import OccupancyGrid as OccupancyGrid
from lamina.nn.fields import VolumeRenderer as VolumeRenderer
from lamina.nn.fixed_point_solver import FixedPointInfo as FixedPointInfo
from lamina.nn.fixed_point_solver import fixed_point as fixed_point
from lamina.nn.float8 import Float8Activation as Float8Activation
from lamina.nn.float8 import Float8GatedMLP as Float8GatedMLP
from lamina.nn.float8 import Float8LayerNorm as Float8LayerNorm
from lamina.nn.float8 import Float8Linear as Float8Linear
from lamina.nn.float8 import Float8RMSNorm as Float8RMSNorm
from lamina.nn.fourier_density import FourierDensity as FourierDensity
from lamina.nn.fourier_density import FourierDistribution as FourierDistribution
from lamina.nn.fourier_head import FourierHead as FourierHead
from lamina.nn.fourier_head import fourier_bins as fourier_bins
from lamina.nn.fourier_head import fourier_penalty as fourier_penalty
from lamina.nn.fourier_head import smoothness as smoothness
from lamina.nn.hopfield import Hopfield as Hopfield
from lamina.nn.hopfield_association import association_regimes as association_regimes
from lamina.nn.hopfield_association import association_weights as association_weights
from lamina.nn.hopfield_association import hopfield_energy as hopfield_energy
from lamina.nn.hopfield_association import hopfield_update as hopfield_update
from lamina.nn.hopfield_blocks import HopfieldDecoderLayer as HopfieldDecoderLayer
from lamina.nn.hopfield_blocks import HopfieldEncoderLayer as HopfieldEncoderLayer
from lamina.nn.hopfield_memory import HopfieldMemory as HopfieldMemory
from lamina.nn.hopfield_pooling import HopfieldLayer as HopfieldLayer
from lamina.nn.hopfield_pooling import HopfieldPooling as HopfieldPooling
from lamina.nn.hyper_convolution.block import SFNEBlock as SFNEBlock
from lamina.nn.hyper_convolution.convolution import CoordinateConv2d as CoordinateConv2d
from lamina.nn.hyper_convolution.convolution import depthwise_convolution as depthwise_convolution
from lamina.nn.hyper_convolution.convolution import prefers_fft as prefers_fft
from lamina.nn.hyper_convolution.coordinate_kernel import CoordinateKernel as CoordinateKernel
from lamina.nn.hyper_convolution.gates import HyperChannelInteraction as HyperChannelInteraction
from lamina.nn.hyper_convolution.gates import HyperInteraction as HyperInteraction
from lamina.nn.hyper_convolution.gates import RecursiveGatedUnit as RecursiveGatedUnit
from lamina.nn.hyper_convolution.global_product import HyperZZWGlobal as HyperZZWGlobal
from lamina.nn.hyper_convolution.global_product import global_product as global_product
from lamina.nn.hyper_convolution.global_product import slow_kernel_distance as slow_kernel_distance
from lamina.nn.hyper_convolution.group_norm import GroupInstanceBatchNorm as GroupInstanceBatchNorm
from lamina.nn.hyper_convolution.local import HyperZZWLocal as HyperZZWLocal
from lamina.nn.hypercomplex import PHConv1d as PHConv1d
from lamina.nn.hypercomplex import PHConv2d as PHConv2d
from lamina.nn.hypercomplex import PHConv3d as PHConv3d
from lamina.nn.hypercomplex import PHConvTranspose2d as PHConvTranspose2d
from lamina.nn.hypercomplex import PHMLinear as PHMLinear
from lamina.nn.hypercomplex import kron_sum as kron_sum
from lamina.nn.hypercomplex import nearest_kron_sum as nearest_kron_sum
from lamina.nn.hypernetwork import HyperNetwork as HyperNetwork
from lamina.nn.hypernetwork_conditions import DataCondition as DataCondition
from lamina.nn.hypernetwork_conditions import NoiseCondition as NoiseCondition
from lamina.nn.hypernetwork_conditions import TaskCondition as TaskCondition
from lamina.nn.hypernetwork_conditions import VectorCondition as VectorCondition
from lamina.nn.hypernetwork_layers import HyperConv2d as HyperConv2d
from lamina.nn.hypernetwork_layers import HyperLinear as HyperLinear
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
from lamina.nn.linear_attention import SimplifiedLinearAttention as SimplifiedLinearAttention
from lamina.nn.linear_attention import linear_attention as linear_attention
from lamina.nn.local_global_attention import LocalGlobalAttention as LocalGlobalAttention
from lamina.nn.monotone_coupling import Coupling as Coupling
from lamina.nn.monotone_coupling import MonotoneHollow as MonotoneHollow
from lamina.nn.monotone_coupling_conv import MonotoneHollowConv as MonotoneHollowConv
from lamina.nn.multigrid import MultigridLinear as MultigridLinear
from lamina.nn.multigrid import MultigridMixer as MultigridMixer
from lamina.nn.multigrid import v_cycle as v_cycle
from lamina.nn.ode.block import NeuralODE as NeuralODE
from lamina.nn.ode.field import TimeConv as TimeConv
from lamina.nn.ode.field import TimeMLP as TimeMLP
from lamina.nn.ode.recording import recording as recording
from lamina.nn.ode.sde import NeuralSDE as NeuralSDE
from lamina.nn.ode.sde_step import local_sde_error as local_sde_error
from lamina.nn.ode.solve import Solution as Solution
from lamina.nn.ode.step import initial_step as initial_step
from lamina.nn.ode.step import local_error as local_error
from lamina.nn.ode.step import local_stiffness as local_stiffness
from lamina.nn.ode.step import rk_step as rk_step
from lamina.nn.parameter_attention import Pattention as Pattention
from lamina.nn.parameter_attention import parameter_attention as parameter_attention
from lamina.nn.patch_embedding import MultiScalePatchEmbed as MultiScalePatchEmbed
from lamina.nn.pooling_mixer import ChannelNorm2d as ChannelNorm2d
from lamina.nn.pooling_mixer import IdentityMixer as IdentityMixer
from lamina.nn.pooling_mixer import PoolingMixer as PoolingMixer
from lamina.nn.pooling_mixer import RandomMixer as RandomMixer
from lamina.nn.pooling_mixer import SpatialLinearMixer as SpatialLinearMixer
from lamina.nn.progressive_norm import PRepBN as PRepBN
from lamina.nn.progressive_norm import RepBN as RepBN
from lamina.nn.projection import ProjectionHead as ProjectionHead
from lamina.nn.prototype import PrototypeHead as PrototypeHead
from lamina.nn.prototype import PrototypeLayer as PrototypeLayer
from lamina.nn.prototype import prototype_penalties as prototype_penalties
from lamina.nn.prototype import squared_distances as squared_distances
from lamina.nn.proximal_softmax import ProxSoftmax as ProxSoftmax
from lamina.nn.proximal_softmax import prox_softmax as prox_softmax
from lamina.nn.raft_mixer import MixerTokenMixing as MixerTokenMixing
from lamina.nn.raft_mixer import RaftTokenMixing as RaftTokenMixing
from lamina.nn.random_feature_attention import RandomFeatureAttention as RandomFeatureAttention
from lamina.nn.random_feature_attention import attention_features as attention_features
from lamina.nn.random_feature_mlp import RandomFeatureMLP as RandomFeatureMLP
from lamina.nn.random_feature_readout import fit_readout as fit_readout
from lamina.nn.resize_token_mixing import ResizeTokenMixing as ResizeTokenMixing
from lamina.nn.ridge_regression import RidgeFit as RidgeFit
from lamina.nn.ridge_regression import fit_ridge as fit_ridge
from lamina.nn.ridge_regression import ridge as ridge
from lamina.nn.spectral_convolution import SpectralConvolution as SpectralConvolution
from lamina.nn.token_pooling import TokenPooling as TokenPooling
from lamina.nn.token_pooling import cut_embedding as cut_embedding
from lamina.nn.token_pooling import pool_tokens as pool_tokens
from lamina.nn.token_router import TokenRouter as TokenRouter
from lamina.nn.token_router import TokenRouting as TokenRouting
from lamina.nn.windowed_attention import TokenMerging1d as TokenMerging1d
from lamina.nn.windowed_attention import WindowedAttention as WindowedAttention
from lamina.nn.windowed_attention import WindowKernel as WindowKernel
from lamina.nn.windowed_attention import attend_in_windows as attend_in_windows
