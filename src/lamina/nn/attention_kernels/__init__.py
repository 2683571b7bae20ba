"""What attention does with queries, keys and values: kernels of one signature, (q, k, v, mask) -> out.

q, k, v (B, heads, T, D); mask None, or (B or 1, 1, 1, T) bool over keys, True = a real token (softmax and synthesizer:
any mask of pairs). `attention` takes one by name, with options: `kernel: {name: local, window: 32}`.

| name             | computes                          | time, memory         | causal | fixed length |
| ---------------- | --------------------------------- | -------------------- | ------ | ------------ |
| `softmax`        | softmax attention, torch's fused  | O(T^2), O(T)         | yes    | no           |
| `local`          | softmax in a window, exact        | O(T)                 | yes    | no           |
| `strided_sparse` | softmax, window and stride, exact | O(T^1.5)             | yes    | no           |
| `longformer`     | softmax, window and global tokens | O(T)                 | no     | no           |
| `bigbird`        | softmax, blocks near and random   | O(T)                 | no     | at most      |
| `linear`         | features in place of softmax      | O(T)                 | yes    | no           |
| `performer`      | softmax estimated at random       | O(T)                 | yes    | no           |
| `linformer`      | softmax over learned mixtures     | O(T)                 | no     | at most      |
| `sinkhorn`       | softmax in sorted blocks          | O(T), tiny O(T^2)    | no     | at most      |
| `synthesizer`    | learned weights, no comparison    | O(T^2)               | yes    | at most      |

All of them honour a mask of keys. None but softmax works with a key-value cache.
Source: the ten attentions that Brown et al., Wide Attention Is The Way Forward For Transformers? (2022), arXiv
2210.00640, compare; the set of Tay et al., Long Range Arena (2020), arXiv 2011.04006, without the Reformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, RecipeError, nearest
from lamina.nn.attention_kernels.bigbird import BigBirdKernel as BigBirdKernel
from lamina.nn.attention_kernels.features import LinearKernel as LinearKernel
from lamina.nn.attention_kernels.features import PerformerKernel as PerformerKernel
from lamina.nn.attention_kernels.linformer import LinformerKernel as LinformerKernel
from lamina.nn.attention_kernels.sinkhorn import SinkhornKernel as SinkhornKernel
from lamina.nn.attention_kernels.synthesizer import SynthesizerKernel as SynthesizerKernel
from lamina.nn.attention_kernels.windows import LocalKernel as LocalKernel
from lamina.nn.attention_kernels.windows import LongformerKernel as LongformerKernel
from lamina.nn.attention_kernels.windows import StridedSparseKernel as StridedSparseKernel
from lamina.recipe._options import fit, signature_of
from lamina.registry import find

KernelName = Literal[
    "softmax",
    "linear",
    "local",
    "strided_sparse",
    "longformer",
    "bigbird",
    "linformer",
    "performer",
    "sinkhorn",
    "synthesizer",
]
KERNELS: dict[str, type[nn.Module]] = {
    "linear": LinearKernel,
    "local": LocalKernel,
    "strided_sparse": StridedSparseKernel,
    "longformer": LongformerKernel,
    "bigbird": BigBirdKernel,
    "linformer": LinformerKernel,
    "performer": PerformerKernel,
    "sinkhorn": SinkhornKernel,
    "synthesizer": SynthesizerKernel,
}
"""The kernels but `softmax`, which `attention` runs itself."""


def make_kernel(node: str | Mapping[str, Any], **given: Any) -> nn.Module | None:
    """Build the kernel that a node names; None for `softmax`.

    Args:
        node: a name, `{name: local, window: 32}`, or `my.module:MyKernel`.
        given: heads, head_width, context, causal: handed over as far as the kernel names them.
    Raises:
        RecipeError: no such kernel, or an option that it does not have or that it refuses.
    """
    options: dict[str, Any] = {"name": node} if isinstance(node, str) else dict(node)
    name = options.pop("name", None)
    known = [*KERNELS, "softmax"]
    if not isinstance(name, str) or (name not in known and ":" not in name):
        raise RecipeError(f"no attention kernel is called {name!r}{nearest(str(name), known)}; there are: {', '.join(known)}")  # fmt: skip  # noqa: E501
    make: Callable[..., Any] | None = None if name == "softmax" else KERNELS.get(name) or find("layer", name)
    taken = {} if make is None else signature_of(make).options
    for option, value in options.items():
        if option not in taken:
            raise RecipeError(f"the kernel {name!r} has no option {option!r}{nearest(str(option), taken)}; it has {', '.join(taken) or 'none'}")  # fmt: skip  # noqa: E501
        if option in given:
            raise RecipeError(f"the kernel's {option} is the attention's: set it there, not in the kernel {name!r}")
        fit(value, taken[option].hint, f"kernel.{option}")
    if make is None:
        return None
    if given.get("causal") and "causal" not in taken:
        raise RecipeError(f"the kernel {name!r} cannot be causal: it has no option of that name")
    try:
        made: nn.Module = make(**{k: v for k, v in given.items() if k in taken}, **options)
    except (LaminaError, TypeError) as error:
        raise RecipeError(f"kernel: {error}") from error
    return made


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with all its weights held in memory, as papers before fused kernels timed it; O(T^2) memory."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        mask = mask.to(torch.bool)
        # A row of padding alone sees all of it: a row without a key has no softmax.
        scores = scores.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), -math.inf)
    return scores.softmax(-1) @ v
