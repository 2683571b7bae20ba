"""Data sets and the loader whose position is part of a checkpoint."""

from lamina.data.examples import Columns as Columns
from lamina.data.examples import Data as Data
from lamina.data.examples import Examples as Examples
from lamina.data.images import Images as Images
from lamina.data.images import images as images
from lamina.data.loader import Loader as Loader
from lamina.data.loader import one_pass as one_pass
from lamina.data.tabular import from_arrays as from_arrays
from lamina.data.tabular import tabular as tabular
from lamina.data.text import Blocks as Blocks
from lamina.data.text import text as text
from lamina.data.verb import load as load
