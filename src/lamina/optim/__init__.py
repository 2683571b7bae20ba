"""Optimizers, learning-rate schedules, and how optimizer state follows a rewrite.

lamb, lars  layer-wise adaptive rates for large batches
schedule    multipliers as functions of the fraction of training
carry       the optimizer follows a rewritten model
"""

from lamina.optim.carry import Carried as Carried
from lamina.optim.carry import carry as carry
from lamina.optim.groups import parameter_groups as parameter_groups
from lamina.optim.schedule import constant as constant
from lamina.optim.schedule import sqrt_batch_rule as sqrt_batch_rule
from lamina.optim.schedule import stages as stages
from lamina.optim.schedule import warmup_cosine as warmup_cosine
from lamina.optim.schedule import warmup_linear as warmup_linear
from lamina.optim.schedule import warmup_polynomial as warmup_polynomial
