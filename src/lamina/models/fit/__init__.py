"""FIT: attention inside groups of tokens, interleaved with attention among a few latents of all groups.

encoder         FIT, and FITImage for images
autoregressive  FITAutoregressive: a language model of long sequences
denoiser        FITDenoiser: the network of a diffusion model
grouping        images into groups and back, groups of unequal fill, the masks and shifts of latents
cost            products and memory of every layer, before anything is built
"""

from lamina.models.fit.autoregressive import FITAutoregressive as FITAutoregressive
from lamina.models.fit.cost import LayerCost as LayerCost
from lamina.models.fit.cost import attention_cost as attention_cost
from lamina.models.fit.denoiser import FITDenoiser as FITDenoiser
from lamina.models.fit.encoder import FIT as FIT
from lamina.models.fit.encoder import FITImage as FITImage
from lamina.models.fit.grouping import block_causal_mask as block_causal_mask
from lamina.models.fit.grouping import group_image as group_image
from lamina.models.fit.grouping import pad_groups as pad_groups
from lamina.models.fit.grouping import shift_latents as shift_latents
from lamina.models.fit.grouping import snake_order as snake_order
from lamina.models.fit.grouping import ungroup_image as ungroup_image
from lamina.models.fit.layers import parse_layers as parse_layers
