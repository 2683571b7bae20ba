"""Objectives: what a training step minimises.

objective     the protocol; weighted sums
evidence_bound  errors of a latent model and the divergence of its posterior
fourier_smoothness  keep the densities of Fourier heads smooth
hard_samples  a pool of the rows with the largest errors, for any loss that is one a row; hard_views: of cameras
hypernetwork  hold the weights that a hypernetwork made for earlier tasks
supervised    next token, masked token, classification, regression
distillation  follow a teacher in logits and hidden states, by two dozen methods; teacher_cache: its outputs on disk
ensemble_distillation  fine-tune on what several teachers say on average; soft_labels: said once, and stored
matryoshka    one embedding model for several sizes; embedding_losses: what it trains at each; matryoshka_autoencoding
masked_marginals  what was hidden of a Boltzmann machine's variables
ponder        mean loss under a learned distribution of exits; weighted_exits: every exit's, weighted
prototype     the four terms of a prototype network; the two penalties beside any objective
contrastive   features alike where rows are alike by what is known of them; similarity: how alike that is
sandwich      the parts of an elastic model follow the whole, from some point of the training on
router_loss   let the routers of a mixture of depths tell by themselves what its top-k takes
slow_kernels  let the slow kernels of a network's blocks agree
relative_lp   error of fields relative to the target; relative_sobolev: with their derivatives
volume_distillation  follow another radiance field: feature, density and colour at points, then what rays see
solver_cost   what a step costs the solvers of neural ODEs and SDEs: local, and global
"""

from lamina.objectives.contrastive import WeightedContrastive as WeightedContrastive
from lamina.objectives.contrastive import weighted_contrastive_loss as weighted_contrastive_loss
from lamina.objectives.distillation import Distillation as Distillation
from lamina.objectives.distillation import LogitDistillation as LogitDistillation
from lamina.objectives.embedding_losses import CoSENT as CoSENT
from lamina.objectives.embedding_losses import EmbeddingClassification as EmbeddingClassification
from lamina.objectives.embedding_losses import InfoNCE as InfoNCE
from lamina.objectives.embedding_losses import MultipleNegatives as MultipleNegatives
from lamina.objectives.ensemble_distillation import EnsembleDistillation as EnsembleDistillation
from lamina.objectives.evidence_bound import EvidenceBound as EvidenceBound
from lamina.objectives.fourier_smoothness import FourierSmoothness as FourierSmoothness
from lamina.objectives.hard_samples import HardPoints as HardPoints
from lamina.objectives.hard_samples import HardRays as HardRays
from lamina.objectives.hard_samples import HardSamples as HardSamples
from lamina.objectives.hard_views import HardViews as HardViews
from lamina.objectives.hypernetwork import HyperNetworkDrift as HyperNetworkDrift
from lamina.objectives.masked_marginals import MaskedMarginals as MaskedMarginals
from lamina.objectives.matryoshka import Matryoshka as Matryoshka
from lamina.objectives.matryoshka_autoencoding import MatryoshkaAutoencoding as MatryoshkaAutoencoding
from lamina.objectives.matryoshka_autoencoding import continuing_tokens as continuing_tokens
from lamina.objectives.objective import Losses as Losses
from lamina.objectives.objective import Objective as Objective
from lamina.objectives.objective import WeightedSum as WeightedSum
from lamina.objectives.ponder import Ponder as Ponder
from lamina.objectives.ponder import WeightedExits as WeightedExits
from lamina.objectives.prototype import PrototypeObjective as PrototypeObjective
from lamina.objectives.prototype import PrototypePenalties as PrototypePenalties
from lamina.objectives.relative_error import RelativeLp as RelativeLp
from lamina.objectives.relative_error import RelativeSobolev as RelativeSobolev
from lamina.objectives.router import RouterLoss as RouterLoss
from lamina.objectives.sandwich import Sandwich as Sandwich
from lamina.objectives.similarity import anatomical as anatomical
from lamina.objectives.similarity import cauchy as cauchy
from lamina.objectives.similarity import gaussian as gaussian
from lamina.objectives.similarity import rbf as rbf
from lamina.objectives.slow_kernels import SlowNeuralLoss as SlowNeuralLoss
from lamina.objectives.soft_labels import SoftLabelStore as SoftLabelStore
from lamina.objectives.soft_labels import soft_labels as soft_labels
from lamina.objectives.solver_cost import GlobalSolverCost as GlobalSolverCost
from lamina.objectives.solver_cost import LocalSolverCost as LocalSolverCost
from lamina.objectives.supervised import Classification as Classification
from lamina.objectives.supervised import MaskedToken as MaskedToken
from lamina.objectives.supervised import NextToken as NextToken
from lamina.objectives.supervised import Regression as Regression
from lamina.objectives.volume_distillation import VolumeDistillation as VolumeDistillation
