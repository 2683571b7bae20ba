"""Reducers that a minority of faulty workers cannot carry away; the baselines of `flag_aggregator`.

rule              what they share: who is left out, the exchange by slices, `aggregate` and `reduce`
coordinate_wise   Median, TrimmedMean, MeaMed, Phocas
krum              Krum (and Multi-Krum), Bulyan
geometric_median  GeometricMedian
exchange          the collectives: a slice of everyone's gradients a worker; who is gone is named
packing           gradients as one vector that splits evenly
gram              inner products and weighted sums of rows, block by block
columns           sorted columns, block by block
bound             how many workers may be faulty, and how many that takes
"""

from lamina.gradients.robust.columns import median as median
from lamina.gradients.robust.coordinate_wise import MeaMed as MeaMed
from lamina.gradients.robust.coordinate_wise import Median as Median
from lamina.gradients.robust.coordinate_wise import Phocas as Phocas
from lamina.gradients.robust.coordinate_wise import TrimmedMean as TrimmedMean
from lamina.gradients.robust.geometric_median import GeometricMedian as GeometricMedian
from lamina.gradients.robust.krum import Bulyan as Bulyan
from lamina.gradients.robust.krum import Krum as Krum
from lamina.gradients.robust.rule import RobustRule as RobustRule
