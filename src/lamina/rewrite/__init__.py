"""Passes that rewrite a model before, during or after training, and the verb that runs them.

rewriting   the Pass protocol, rewrite(), history, replay
replace     one kind of layer for another, weights carried where a map exists
replace_norm_activation  batch norm and activation as one layer
conv_bn     convolution and batch norm as one, for fine-tuning with frozen statistics
progressive_norm  layer norms that turn into batch norm while trained; calibrate: their statistics
fold        norms into the layers around them, for deployment
hypercomplex  linear layers and convolutions with 1/n of the weights, and back
grow        more pairs in parameter attention, with equal outputs
permute_vocabulary  other numbers for the tokens, and the same answers
low_precision  blocks that train on float8 and keep their activations in a byte each
convert_field  another representation of a radiance field
expand      two blocks that stand for a stack of any depth, and back to models of any depth
drop        remove attention, feed-forward or whole blocks by similarity
truncate    the first blocks and the first numbers of an embedding
early_exit  an exit after every block: easy inputs leave early
depth_routing  blocks that only some of the tokens pass through
elastic     fewer blocks, channels and taps of one trained network; extract: one such part as a plain model
"""

from lamina.rewrite.calibrate import Calibrate as Calibrate
from lamina.rewrite.calibrate import CalibrateDecision as CalibrateDecision
from lamina.rewrite.conv_bn import ConvBN as ConvBN
from lamina.rewrite.conv_bn import ConvBNDecision as ConvBNDecision
from lamina.rewrite.conv_bn import activation_bytes as activation_bytes
from lamina.rewrite.conv_bn import release as release
from lamina.rewrite.conv_bn import set_mode as set_mode
from lamina.rewrite.convert_field import ConvertField as ConvertField
from lamina.rewrite.convert_field import ConvertFieldDecision as ConvertFieldDecision
from lamina.rewrite.depth_routing import DepthRouting as DepthRouting
from lamina.rewrite.depth_routing import RoutingDecision as RoutingDecision
from lamina.rewrite.depth_routing import attention_rank as attention_rank
from lamina.rewrite.drop import DropAttention as DropAttention
from lamina.rewrite.drop import DropBlock as DropBlock
from lamina.rewrite.drop import DropDecision as DropDecision
from lamina.rewrite.drop import DropMLP as DropMLP
from lamina.rewrite.drop import DropSublayers as DropSublayers
from lamina.rewrite.drop import import_official as import_official
from lamina.rewrite.early_exit import EarlyExit as EarlyExit
from lamina.rewrite.early_exit import EarlyExitModel as EarlyExitModel
from lamina.rewrite.early_exit import ExitDecision as ExitDecision
from lamina.rewrite.early_exit import LambdaHead as LambdaHead
from lamina.rewrite.early_exit import exit_distribution as exit_distribution
from lamina.rewrite.early_exit import q_exit as q_exit
from lamina.rewrite.elastic import Elastic as Elastic
from lamina.rewrite.elastic import ElasticDecision as ElasticDecision
from lamina.rewrite.elastic import sort_channels as sort_channels
from lamina.rewrite.expand import Expand as Expand
from lamina.rewrite.expand import ExpandDecision as ExpandDecision
from lamina.rewrite.expand import ExpandedStack as ExpandedStack
from lamina.rewrite.expand import ExpansionDecision as ExpansionDecision
from lamina.rewrite.expand import LinearExpansion as LinearExpansion
from lamina.rewrite.expand import descendants as descendants
from lamina.rewrite.expand import fit_linear as fit_linear
from lamina.rewrite.expand import interpolate as interpolate
from lamina.rewrite.extract import Extract as Extract
from lamina.rewrite.extract import ExtractDecision as ExtractDecision
from lamina.rewrite.extract import cut_out as cut_out
from lamina.rewrite.fold import Fold as Fold
from lamina.rewrite.fold import FoldDecision as FoldDecision
from lamina.rewrite.grow import GrowDecision as GrowDecision
from lamina.rewrite.grow import GrowParameterTokens as GrowParameterTokens
from lamina.rewrite.grow import GrowParameterTokensRandom as GrowParameterTokensRandom
from lamina.rewrite.hypercomplex import FoldHypercomplex as FoldHypercomplex
from lamina.rewrite.hypercomplex import FoldHypercomplexDecision as FoldHypercomplexDecision
from lamina.rewrite.hypercomplex import Hypercomplex as Hypercomplex
from lamina.rewrite.hypercomplex import HypercomplexDecision as HypercomplexDecision
from lamina.rewrite.hypercomplex import HypercomplexLayer as HypercomplexLayer
from lamina.rewrite.low_precision import LowPrecision as LowPrecision
from lamina.rewrite.low_precision import LowPrecisionDecision as LowPrecisionDecision
from lamina.rewrite.permute_vocabulary import PermuteVocabulary as PermuteVocabulary
from lamina.rewrite.permute_vocabulary import PermuteVocabularyDecision as PermuteVocabularyDecision
from lamina.rewrite.progressive_norm import ProgressiveNorm as ProgressiveNorm
from lamina.rewrite.progressive_norm import ProgressiveNormDecision as ProgressiveNormDecision
from lamina.rewrite.replace import Replace as Replace
from lamina.rewrite.replace import ReplaceDecision as ReplaceDecision
from lamina.rewrite.replace_norm_activation import ReplaceNormActivation as ReplaceNormActivation
from lamina.rewrite.replace_norm_activation import ReplaceNormActivationDecision as ReplaceNormActivationDecision
from lamina.rewrite.rewriting import Pass as Pass
from lamina.rewrite.rewriting import Record as Record
from lamina.rewrite.rewriting import check_order as check_order
from lamina.rewrite.rewriting import history as history
from lamina.rewrite.rewriting import replay as replay
from lamina.rewrite.rewriting import rewrite as rewrite
from lamina.rewrite.truncate import Truncate as Truncate
from lamina.rewrite.truncate import TruncateDecision as TruncateDecision
from lamina.rewrite.truncate import export_sentence_transformers as export_sentence_transformers
from lamina.rewrite.truncate import sizes as sizes
