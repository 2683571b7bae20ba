"""Optimizers, learning-rate schedules, and how optimizer state follows a rewrite.

lamb, lars  layer-wise adaptive rates for large batches
schedule    multipliers as functions of the fraction of training
groups      what is decayed and adapted, and what is not
kar         steps made of signs: of the gradient and its running means
float8_states  AdamW with both moments in a byte a number; dynamic_range: how numbers of any range fit into one
carry       the optimizer follows a rewritten model
parametrization  muP: what is tuned on a narrow model holds on a wide one
torch_parts torch's own optimizers under short names
"""

from lamina.optim import torch_parts as torch_parts
from lamina.optim.carry import Carried as Carried
from lamina.optim.carry import carry as carry
from lamina.optim.dynamic_range import DynamicRangeQuantizer as DynamicRangeQuantizer
from lamina.optim.float8_states import Float8AdamW as Float8AdamW
from lamina.optim.groups import parameter_groups as parameter_groups
from lamina.optim.kar import Kar2 as Kar2
from lamina.optim.kar import Kar3 as Kar3
from lamina.optim.lamb import LAMB as LAMB
from lamina.optim.lars import LARS as LARS
from lamina.optim.parametrization import ABC as ABC
from lamina.optim.parametrization import MuP as MuP
from lamina.optim.parametrization import MuReadout as MuReadout
from lamina.optim.parametrization import coordinate_check as coordinate_check
from lamina.optim.parametrization import mup as mup
from lamina.optim.parametrization import parametrize as parametrize
from lamina.optim.schedule import constant as constant
from lamina.optim.schedule import sqrt_batch_rule as sqrt_batch_rule
from lamina.optim.schedule import stages as stages
from lamina.optim.schedule import warmup_cosine as warmup_cosine
from lamina.optim.schedule import warmup_linear as warmup_linear
from lamina.optim.schedule import warmup_polynomial as warmup_polynomial
