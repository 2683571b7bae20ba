"""How first values, multipliers and learning rates scale with width: muP for any model, and the theory behind it.

abc          parametrizations as exponents, and what infinite width makes of them
widths       which dimensions grow, by comparison with a narrower model
initial      what first values have to be multiplied by
readout      layers with a multiplier
mup_pass     the pass, and `parametrize`
rates        the optimizer `mup`, and groups for any other
coordinates  the coordinate check
"""

from lamina.optim.parametrization.abc import ABC as ABC
from lamina.optim.parametrization.coordinates import Coordinates as Coordinates
from lamina.optim.parametrization.coordinates import coordinate_check as coordinate_check
from lamina.optim.parametrization.mup_pass import MuP as MuP
from lamina.optim.parametrization.mup_pass import parametrize as parametrize
from lamina.optim.parametrization.rates import mup as mup
from lamina.optim.parametrization.rates import param_groups as param_groups
from lamina.optim.parametrization.readout import MuReadout as MuReadout
from lamina.optim.parametrization.widths import Widths as Widths
from lamina.optim.parametrization.widths import widths_of as widths_of
