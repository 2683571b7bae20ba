"""Reducers: how the gradients of data-parallel workers become one.

reducer  the protocol, averaging, the DDP and after-backward adapters
robust   coordinate-wise median (and later: trimmed mean, Krum, ...)
"""

from lamina.gradients.reducer import Handle as Handle
from lamina.gradients.reducer import Mean as Mean
from lamina.gradients.reducer import Reducer as Reducer
from lamina.gradients.reducer import attach as attach
from lamina.gradients.robust import Median as Median
