"""Look behind what a model does.

attacks             what faulty workers send in place of a gradient, and a reducer that plays it
explain             a page about one input: votes, bias shares, rows, columns, singular images
linear_interpreter  the linear system that a network applied to one input: rows, columns, bias, singular vectors
matrix_free_svd     the largest singular triples of a map that is only known by its products
"""

from lamina.verify.attacks import Attacked as Attacked
from lamina.verify.explain import explain as explain
from lamina.verify.linear_interpreter import AffineParts as AffineParts
from lamina.verify.linear_interpreter import LinearInterpreter as LinearInterpreter
from lamina.verify.linear_interpreter import affine_parts as affine_parts
from lamina.verify.linear_interpreter import linear_interpreter as linear_interpreter
from lamina.verify.matrix_free_svd import SingularTriples as SingularTriples
from lamina.verify.matrix_free_svd import matrix_free_svd as matrix_free_svd
