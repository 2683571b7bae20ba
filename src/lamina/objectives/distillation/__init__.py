"""Distillation: a student follows a teacher, by terms between any places of the two.

distillation        the objective; logit_distillation: where only outputs are at hand
terms               a term: a loss, its places, its weight, its time, its adapter; `LOSSES` lists the losses by name
places              where tensors are taken; fitting: do paths and shapes fit, before the first step
logit_losses        between predictions: knowledge distillation, standardised, DIST, streamlined
feature_losses      between maps: hint, attention, flow, boundaries, channels, affinity, simple representation, DIST+
trained_losses      with heads of their own: factor transfer, variational, uncertain, knowledge review
relational_losses   between rows of a batch: probabilities, distances and angles, correlation, similarity
memory_losses       contrast with earlier batches; self_supervision: images and their rotations
hidden_states       relative squared errors (`hidden`); teachers: several as one
"""

from lamina.objectives.distillation.distillation import Distillation as Distillation
from lamina.objectives.distillation.feature_losses import ActivationBoundary as ActivationBoundary
from lamina.objectives.distillation.feature_losses import Affinity as Affinity
from lamina.objectives.distillation.feature_losses import AttentionTransfer as AttentionTransfer
from lamina.objectives.distillation.feature_losses import DISTPlus as DISTPlus
from lamina.objectives.distillation.feature_losses import FlowOfSolution as FlowOfSolution
from lamina.objectives.distillation.feature_losses import Hint as Hint
from lamina.objectives.distillation.feature_losses import InterChannelCorrelation as InterChannelCorrelation
from lamina.objectives.distillation.feature_losses import SimpleRepresentation as SimpleRepresentation
from lamina.objectives.distillation.hidden_states import relative_gap as relative_gap
from lamina.objectives.distillation.hidden_states import sum_of_gaps as sum_of_gaps
from lamina.objectives.distillation.logit_distillation import LogitDistillation as LogitDistillation
from lamina.objectives.distillation.logit_losses import DIST as DIST
from lamina.objectives.distillation.logit_losses import KnowledgeDistillation as KnowledgeDistillation
from lamina.objectives.distillation.logit_losses import LogitStandardization as LogitStandardization
from lamina.objectives.distillation.logit_losses import StreamlinedDirection as StreamlinedDirection
from lamina.objectives.distillation.logit_losses import StreamlinedInstance as StreamlinedInstance
from lamina.objectives.distillation.logit_losses import soft_divergence as soft_divergence
from lamina.objectives.distillation.memory_losses import ContrastiveRepresentation as ContrastiveRepresentation
from lamina.objectives.distillation.relational_losses import CorrelationCongruence as CorrelationCongruence
from lamina.objectives.distillation.relational_losses import (
    ProbabilisticKnowledgeTransfer as ProbabilisticKnowledgeTransfer,
)
from lamina.objectives.distillation.relational_losses import RelationalKD as RelationalKD
from lamina.objectives.distillation.relational_losses import SimilarityPreserving as SimilarityPreserving
from lamina.objectives.distillation.self_supervision import SelfSupervisionKD as SelfSupervisionKD
from lamina.objectives.distillation.teachers import TeacherEnsemble as TeacherEnsemble
from lamina.objectives.distillation.term_loss import TermLoss as TermLoss
from lamina.objectives.distillation.terms import LOSSES as LOSSES
from lamina.objectives.distillation.terms import Term as Term
from lamina.objectives.distillation.trained_losses import FactorTransfer as FactorTransfer
from lamina.objectives.distillation.trained_losses import KnowledgeReview as KnowledgeReview
from lamina.objectives.distillation.trained_losses import PredictionWithUncertainty as PredictionWithUncertainty
from lamina.objectives.distillation.trained_losses import VariationalInformation as VariationalInformation
