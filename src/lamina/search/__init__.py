"""Search: a recipe with choices left open is a space; train its points, compare what they give and cost.

run           `search`: one training run a trial, resumable; a table, and a report with the front
space         the choices of a recipe, counted out
algorithm     which point comes next: `sweep`
aspect_ratio  the depth and heads of any transformer recipe as a space
trial         what a trial gave; summaries over seeds, and which of them are dominated
measure       latency and memory of a model
subnet        the best part of an elastic model within a limit of multiply-adds or latency
"""

from lamina.search.algorithm import Algorithm as Algorithm
from lamina.search.algorithm import Sweep as Sweep
from lamina.search.aspect_ratio import with_aspect_ratios as with_aspect_ratios
from lamina.search.measure import latency as latency
from lamina.search.measure import peak_bytes as peak_bytes
from lamina.search.run import search as search
from lamina.search.space import Point as Point
from lamina.search.space import points as points
from lamina.search.subnet import Picked as Picked
from lamina.search.subnet import pick_subnet as pick_subnet
from lamina.search.trial import Summary as Summary
from lamina.search.trial import Trial as Trial
from lamina.search.trial import summaries as summaries
