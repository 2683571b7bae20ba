"""Whole networks, built from the layers of `lamina.nn` through named slots.

transformer         encoder or decoder with slots for mixer, norm and feed-forward
vision_transformer  ViT
resnet              small and standard ResNets
metaformer          the MetaFormer template and PoolFormer's sizes
hugging_face        any transformers model, by config or folder
"""

from lamina.models.hugging_face import hugging_face as hugging_face
from lamina.models.resnet import ResNet as ResNet
from lamina.models.resnet import resnet18 as resnet18
from lamina.models.resnet import resnet20 as resnet20
from lamina.models.resnet import resnet34 as resnet34
from lamina.models.resnet import resnet50 as resnet50
from lamina.models.transformer import Transformer as Transformer
from lamina.models.transformer import TransformerBlock as TransformerBlock
from lamina.models.vision_transformer import VisionTransformer as VisionTransformer
from lamina.models.vision_transformer import deit_base as deit_base
from lamina.models.vision_transformer import deit_small as deit_small
from lamina.models.vision_transformer import deit_tiny as deit_tiny
