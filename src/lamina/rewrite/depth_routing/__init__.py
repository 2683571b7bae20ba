"""Turn blocks of a trained transformer into a mixture of depths: a router says which tokens pass through them.

    model = rewrite(model, DepthRouting(count=4, protect="protect"), data=batches)    # then train, with `router_loss`
    model.eval().generate(ids)                                                         # skips for real, with a cache

routing    the pass; decision: what it decides
rank       which blocks: the mean rank of their attention maps
block      the forward of a routed block: choose, gather, run, put back
arguments  masks and positions of the tokens that enter
cache      keys and values of layers that not every token enters
entry      the mask of tokens that must enter, from the batch to the blocks

Source: Luo et al., gamma-MoD (2024), arXiv 2410.13859; parent: Raposo et al., Mixture-of-Depths, arXiv 2404.02258.
"""

from lamina.rewrite.depth_routing.decision import RoutingDecision as RoutingDecision
from lamina.rewrite.depth_routing.rank import attention_rank as attention_rank
from lamina.rewrite.depth_routing.routing import DepthRouting as DepthRouting
