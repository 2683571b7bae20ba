"""Gradient coding, in one round and over several: exact gradients without waiting for stragglers.

matrix         CodingMatrix: who computes which chunks, what is sent, the sum from whoever answered
tolerance      which workers may straggle when
scheme         what a scheme is; gradient coding, and none
sequential     the codes over time: SR-SGC and M-SGC
ledger         the master's account: every message once
coded_reducer  what the reducers share: tasks, messages to rank 0, its waiting rule, the outcome
reducers       GradientCoding, SelectiveRepetition, MultiplexedCoding
exchange       their messages, point to point
interleave     the loop that trains several models in turns
master         train_coded: a master and a crew of workers
crew           what a worker does; LocalCrew, threads
actors         RayCrew, processes on one machine or many
waiting        the master's waiting rule
tasks          the gradient of one chunk, the same on whichever worker computes it
"""

from lamina.gradients.coding.actors import RayCrew as RayCrew
from lamina.gradients.coding.coded_reducer import CodedReducer as CodedReducer
from lamina.gradients.coding.crew import LocalCrew as LocalCrew
from lamina.gradients.coding.interleave import interleave as interleave
from lamina.gradients.coding.ledger import Ledger as Ledger
from lamina.gradients.coding.master import Report as Report
from lamina.gradients.coding.master import train_coded as train_coded
from lamina.gradients.coding.matrix import CodingMatrix as CodingMatrix
from lamina.gradients.coding.matrix import NotDecodable as NotDecodable
from lamina.gradients.coding.reducers import GradientCoding as GradientCoding
from lamina.gradients.coding.reducers import MultiplexedCoding as MultiplexedCoding
from lamina.gradients.coding.reducers import SelectiveRepetition as SelectiveRepetition
from lamina.gradients.coding.scheme import GradientCodingScheme as GradientCodingScheme
from lamina.gradients.coding.scheme import Item as Item
from lamina.gradients.coding.scheme import Scheme as Scheme
from lamina.gradients.coding.scheme import UncodedScheme as UncodedScheme
from lamina.gradients.coding.scheme import least_load as least_load
from lamina.gradients.coding.sequential import MultiplexedScheme as MultiplexedScheme
from lamina.gradients.coding.sequential import SelectiveRepetitionScheme as SelectiveRepetitionScheme
from lamina.gradients.coding.tolerance import Arbitrary as Arbitrary
from lamina.gradients.coding.tolerance import Bursty as Bursty
from lamina.gradients.coding.tolerance import BurstyOrFew as BurstyOrFew
from lamina.gradients.coding.tolerance import PerRound as PerRound
from lamina.gradients.coding.tolerance import conforms as conforms
