"""Whole networks, built from the layers of `lamina.nn` through named slots.

transformer         encoder or decoder with slots for mixer, norm and feed-forward
wide_transformer    the same heads in few layers or in many: the aspect ratio as one knob
pair_classifier     one encoder reads two sequences, and their relation is told
each_view           any encoder, given several views of each row
vision_transformer  ViT
resnet              small and standard ResNets
volume_encoder      ResNets on volumes, as AnatCL has them
metaformer          the MetaFormer template and PoolFormer's sizes
raft_mlp            RaftMLP's sizes and MLP-Mixer: all-MLP backbones
tokenformer         TokenFormer's sizes and TokenFormerViT: weights that can be added to
fit                 FIT: local attention in groups, global attention among their latents; encoder, decoder, denoiser
byteformer          ByteFormer: files classified by their bytes; byte_reader: bytes into any encoder
terminator          Terminator: slow kernels computed from coordinates times fast activations
neural_operator     MgNO and FNO: from one field on a grid to another, by V-cycles or by frequencies
boltzmann           dense and convolutional Boltzmann machines with one mean-field answer
prototype_network   an autoencoder that decides by prototypes; prototype_explanation: of any model with such a head
neural_ode          classifiers with a neural ODE or SDE as their body; latent_ode: of time series
radiance_field      a field in space of any representation, seen along rays
hugging_face        any transformers model, by config or folder
"""

from lamina.models.boltzmann import ConvMonotoneDBM as ConvMonotoneDBM
from lamina.models.boltzmann import MonotoneDBM as MonotoneDBM
from lamina.models.byte_reader import ByteReader as ByteReader
from lamina.models.byteformer import ByteFormer as ByteFormer
from lamina.models.byteformer import ByteFormerBlock as ByteFormerBlock
from lamina.models.byteformer import load_byteformer as load_byteformer
from lamina.models.each_view import EachView as EachView
from lamina.models.fit import FIT as FIT
from lamina.models.fit import FITAutoregressive as FITAutoregressive
from lamina.models.fit import FITDenoiser as FITDenoiser
from lamina.models.fit import FITImage as FITImage
from lamina.models.fit import LayerCost as LayerCost
from lamina.models.fit import attention_cost as attention_cost
from lamina.models.fit import block_causal_mask as block_causal_mask
from lamina.models.fit import group_image as group_image
from lamina.models.fit import pad_groups as pad_groups
from lamina.models.fit import parse_layers as parse_layers
from lamina.models.fit import shift_latents as shift_latents
from lamina.models.fit import snake_order as snake_order
from lamina.models.fit import ungroup_image as ungroup_image
from lamina.models.hugging_face import hugging_face as hugging_face
from lamina.models.latent_ode import LatentODE as LatentODE
from lamina.models.metaformer import MetaFormer as MetaFormer
from lamina.models.metaformer import MetaFormerBlock as MetaFormerBlock
from lamina.models.metaformer import load_timm as load_timm
from lamina.models.metaformer import metaformer_ppaa_s12 as metaformer_ppaa_s12
from lamina.models.metaformer import metaformer_ppff_s12 as metaformer_ppff_s12
from lamina.models.metaformer import metaformer_pppa_s12 as metaformer_pppa_s12
from lamina.models.metaformer import metaformer_pppf_s12 as metaformer_pppf_s12
from lamina.models.metaformer import poolformer_m36 as poolformer_m36
from lamina.models.metaformer import poolformer_m48 as poolformer_m48
from lamina.models.metaformer import poolformer_s12 as poolformer_s12
from lamina.models.metaformer import poolformer_s24 as poolformer_s24
from lamina.models.metaformer import poolformer_s36 as poolformer_s36
from lamina.models.neural_ode import NeuralODEClassifier as NeuralODEClassifier
from lamina.models.neural_ode import NeuralSDEClassifier as NeuralSDEClassifier
from lamina.models.neural_operator import FNO as FNO
from lamina.models.neural_operator import MgNO as MgNO
from lamina.models.neural_operator import mgno_darcy_rough as mgno_darcy_rough
from lamina.models.neural_operator import mgno_darcy_smooth as mgno_darcy_smooth
from lamina.models.neural_operator import mgno_helmholtz as mgno_helmholtz
from lamina.models.neural_operator import mgno_navier_stokes as mgno_navier_stokes
from lamina.models.neural_operator import mgno_pipe as mgno_pipe
from lamina.models.neural_operator import rollout as rollout
from lamina.models.pair_classifier import PairClassifier as PairClassifier
from lamina.models.prototype_explanation import Explanation as Explanation
from lamina.models.prototype_explanation import NearestTraining as NearestTraining
from lamina.models.prototype_explanation import explain_prototypes as explain_prototypes
from lamina.models.prototype_explanation import nearest_training as nearest_training
from lamina.models.prototype_network import PrototypeNetwork as PrototypeNetwork
from lamina.models.prototype_network import PrototypeOutput as PrototypeOutput
from lamina.models.radiance_field import RadianceField as RadianceField
from lamina.models.radiance_field import turntable as turntable
from lamina.models.raft_mlp import RaftMLP as RaftMLP
from lamina.models.raft_mlp import load_raft_mlp as load_raft_mlp
from lamina.models.raft_mlp import mixer_b16_e2 as mixer_b16_e2
from lamina.models.raft_mlp import raft_mlp_l as raft_mlp_l
from lamina.models.raft_mlp import raft_mlp_m as raft_mlp_m
from lamina.models.raft_mlp import raft_mlp_s as raft_mlp_s
from lamina.models.resnet import ResNet as ResNet
from lamina.models.resnet import resnet18 as resnet18
from lamina.models.resnet import resnet20 as resnet20
from lamina.models.resnet import resnet34 as resnet34
from lamina.models.resnet import resnet50 as resnet50
from lamina.models.terminator import Terminator as Terminator
from lamina.models.tokenformer import TokenFormer as TokenFormer
from lamina.models.tokenformer import TokenFormerViT as TokenFormerViT
from lamina.models.tokenformer import tokenformer_1_5b as tokenformer_1_5b
from lamina.models.tokenformer import tokenformer_124m as tokenformer_124m
from lamina.models.tokenformer import tokenformer_150m as tokenformer_150m
from lamina.models.tokenformer import tokenformer_354m as tokenformer_354m
from lamina.models.tokenformer import tokenformer_450m as tokenformer_450m
from lamina.models.tokenformer import tokenformer_757m as tokenformer_757m
from lamina.models.tokenformer import tokenformer_900m as tokenformer_900m
from lamina.models.transformer import Transformer as Transformer
from lamina.models.transformer import TransformerBlock as TransformerBlock
from lamina.models.vision_transformer import VisionTransformer as VisionTransformer
from lamina.models.vision_transformer import deit_base as deit_base
from lamina.models.vision_transformer import deit_small as deit_small
from lamina.models.vision_transformer import deit_tiny as deit_tiny
from lamina.models.volume_encoder import VolumeEncoder as VolumeEncoder
from lamina.models.volume_encoder import load_anatcl as load_anatcl
from lamina.models.volume_encoder import resnet3d_18 as resnet3d_18
from lamina.models.volume_encoder import resnet3d_34 as resnet3d_34
from lamina.models.volume_encoder import resnet3d_50 as resnet3d_50
from lamina.models.volume_encoder import resnet3d_101 as resnet3d_101
from lamina.models.wide_transformer import aspect_ratios as aspect_ratios
from lamina.models.wide_transformer import wide_transformer as wide_transformer
