"""Let easy inputs leave an encoder early: an exit after every block, and a trained rule that says when.

    model = rewrite(model, EarlyExit(q=0.5), data=batches)      # then train with the objective `ponder`
    model.eval().q = 0.3                                         # faster, without training again

exits    the pass
model    what it makes: a model that a row may leave after any block
leaving  one forward pass: who is still there, and the batch without the others
halting  the lambda head, the distribution of exits, the Q-exit
tail     what stands between the last block and the answer

Source: Balagansky, Gavrilov, PALBERT: Teaching ALBERT to Ponder (NeurIPS 2022), arXiv 2204.03276; PonderNet: Banino et
al. (2021), arXiv 2107.05407; patience: Zhou et al., BERT Loses Patience (2020), arXiv 2006.04152.
"""

from lamina.rewrite.early_exit.exits import EarlyExit as EarlyExit
from lamina.rewrite.early_exit.exits import ExitDecision as ExitDecision
from lamina.rewrite.early_exit.halting import LambdaHead as LambdaHead
from lamina.rewrite.early_exit.halting import exit_distribution as exit_distribution
from lamina.rewrite.early_exit.halting import q_exit as q_exit
from lamina.rewrite.early_exit.model import EarlyExitModel as EarlyExitModel
