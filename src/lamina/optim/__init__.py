"""Optimizers, learning-rate schedules, and how optimizer state follows a rewrite.

lamb, lars  layer-wise adaptive rates for large batches
schedule    multipliers as functions of the fraction of training
carry       the optimizer follows a rewritten model
"""

from lamina.optim.carry import Carried as Carried
from lamina.optim.carry import carry as carry
from lamina.optim.groups import parameter_groups as parameter_groups
