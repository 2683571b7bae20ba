"""Reducers: how the gradients of data-parallel workers become one.

reducer          the protocol, averaging, the DDP and after-backward adapters
compression      few bits (QSGD), the largest entries (TopK), low rank (PowerSGD), with error feedback
l_greco          a knob of these for every layer, chosen to make the message small within an error budget
budget           that choice as a pure function, solved exactly
robust           rules that a faulty minority cannot carry away: median, trimmed mean, Krum, Bulyan, ...
flag_aggregator  the same by projection onto the subspace that explains most workers best
flag_subspace    that subspace, from the workers' inner products
lost_worker      a worker that is gone is named
coding           exact gradients without waiting for stragglers, coded in one step or over several
stragglers       how long that takes: a simulator, and the choice of parameters by it
throttled        any of them over a slower link, to measure
"""

from lamina.gradients.budget import solve_budget as solve_budget
from lamina.gradients.coding import GradientCoding as GradientCoding
from lamina.gradients.coding import MultiplexedCoding as MultiplexedCoding
from lamina.gradients.coding import SelectiveRepetition as SelectiveRepetition
from lamina.gradients.compression import QSGD as QSGD
from lamina.gradients.compression import Compressor as Compressor
from lamina.gradients.compression import PowerSGD as PowerSGD
from lamina.gradients.compression import TopK as TopK
from lamina.gradients.flag_aggregator import FlagAggregator as FlagAggregator
from lamina.gradients.flag_subspace import FlagSubspace as FlagSubspace
from lamina.gradients.flag_subspace import flag_subspace as flag_subspace
from lamina.gradients.l_greco import LGreCo as LGreCo
from lamina.gradients.reducer import Handle as Handle
from lamina.gradients.reducer import Mean as Mean
from lamina.gradients.reducer import Reducer as Reducer
from lamina.gradients.reducer import attach as attach
from lamina.gradients.robust import Bulyan as Bulyan
from lamina.gradients.robust import GeometricMedian as GeometricMedian
from lamina.gradients.robust import Krum as Krum
from lamina.gradients.robust import MeaMed as MeaMed
from lamina.gradients.robust import Median as Median
from lamina.gradients.robust import Phocas as Phocas
from lamina.gradients.robust import RobustRule as RobustRule
from lamina.gradients.robust import TrimmedMean as TrimmedMean
from lamina.gradients.stragglers import ArrivalModel as ArrivalModel
from lamina.gradients.stragglers import select_parameters as select_parameters
from lamina.gradients.stragglers import simulate as simulate
from lamina.gradients.throttled import Throttled as Throttled
