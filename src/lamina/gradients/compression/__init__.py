"""Reducers that send less: each keeps one knob a layer (bits, density, rank), which `l_greco` can choose.

compressor  what they share: raw small tensors, error feedback by name, faults, bytes
memory      what is kept for each parameter from step to step, through rewrites too
traffic     the collectives, their bytes counted where they are called
qsgd        few bits a number, rounded at random
top_k       the largest entries of each tensor
powersgd    two thin factors of each matrix
"""

from lamina.gradients.compression.compressor import Compressor as Compressor
from lamina.gradients.compression.powersgd import PowerSGD as PowerSGD
from lamina.gradients.compression.qsgd import QSGD as QSGD
from lamina.gradients.compression.top_k import TopK as TopK
from lamina.gradients.compression.traffic import Traffic as Traffic
