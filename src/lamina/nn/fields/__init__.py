"""Radiance fields: density and colour in space, in four representations, and what renders them.

field           what a field is; the density's exponential and its clip
hash            levels of hash tables: fast to train
mlp             a network on sines of the coordinates: small and smooth
low_rank        planes times lines
grid            values at vertices, dense or sparse: can be edited
render          cameras, rays, points, and their weighted sum
occupancy       which part of space is empty
interpolation   weighted sums of rows of a table; spherical_harmonics: the basis of directions
"""

from lamina.nn.fields.field import HIGHEST as HIGHEST
from lamina.nn.fields.field import LOWEST as LOWEST
from lamina.nn.fields.field import Field as Field
from lamina.nn.fields.field import FieldWithNetworks as FieldWithNetworks
from lamina.nn.fields.field import clip_log_density as clip_log_density
from lamina.nn.fields.field import truncated_exp as truncated_exp
from lamina.nn.fields.grid import GridField as GridField
from lamina.nn.fields.hash import HashField as HashField
from lamina.nn.fields.interpolation import weighted_rows as weighted_rows
from lamina.nn.fields.low_rank import LowRankField as LowRankField
from lamina.nn.fields.mlp import MLPField as MLPField
from lamina.nn.fields.occupancy import OccupancyGrid as OccupancyGrid
from lamina.nn.fields.render import Rendering as Rendering
from lamina.nn.fields.render import Samples as Samples
from lamina.nn.fields.render import VolumeRenderer as VolumeRenderer
from lamina.nn.fields.render import evaluate as evaluate
from lamina.nn.fields.render import ray_weights as ray_weights
from lamina.nn.fields.spherical_harmonics import spherical_harmonics as spherical_harmonics
