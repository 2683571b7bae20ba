"""How much the attention maps of each block say: their mean rank (ARank). A block of low rank may skip tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lamina.anatomy import Trunk, undisturbed
from lamina.batches import Batch, bare, call, to_device
from lamina.errors import AnatomyError, LaminaError
from lamina.probe import observe
from lamina.rewrite.similarity import take

INSTALLED = "_output_capturing_hooks_installed"


@torch.no_grad()
def attention_rank(
    model: nn.Module, data: Iterable[Batch], samples: int = 32, *, trunk: Trunk | None = None
) -> list[float | None]:
    """Return the mean rank of the attention maps of each block, over heads and samples; None for one without attention.

    Of each map the diagonal, and in a decoder what lies above it, counts as 0; the rank is numerical (singular values
    above T * eps * the largest, float32). Padded tokens (`attention_mask`) are left out, so a sample's value does not
    depend on the others of its batch. One block's maps are held at a time. Any attention is seen that calls torch's
    scaled_dot_product_attention, multi-head attention or softmax; the model is as before afterwards.

    Args:
        samples: rows of data that are looked at; a few dozen suffice.
        trunk: where it was found already; else the only one, or the only causal one.
    Raises:
        AnatomyError: a block whose attention showed no probabilities. LaminaError: no data, or weights on meta.
    Source: Luo et al. (2024), arXiv 2410.13859, equation 5. Deviation: without a causal mask only the diagonal is
        taken out, the maps are of the fused attention's arguments, and one block's are held at a time.
    """
    from lamina.rewrite.depth_routing.routing import routable_trunk

    model = bare(model)
    if any(p.is_meta for p in model.parameters()):
        raise LaminaError(f"{type(model).__name__} has weights on the meta device: it has no attention maps")
    trunk = routable_trunk(model, None) if trunk is None else trunk
    watch = _Watch(trunk)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with undisturbed(model), observe(model, watch.after(), before=watch.before()), watch.mode:
        for batch in take(data, samples):
            moved = to_device(batch, device)
            mask = moved.get("attention_mask")
            watch.real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            call(model, moved)
        hooked = [m for m in model.modules() if getattr(m, INSTALLED, False)]
    for module in hooked:
        # transformers hangs hooks on at the first pass that needs them, and must not forget that it did.
        setattr(module, INSTALLED, True)
    return watch.means()


def map_rank(probabilities: Tensor, *, causal: bool = True) -> Tensor:
    """Rank of attention maps (..., T, T) without their diagonal, and without what lies above it if causal; (...)."""
    maps = probabilities.float()
    eye = torch.eye(maps.shape[-1], dtype=torch.bool, device=maps.device)
    maps = maps.tril(-1) if causal else maps.masked_fill(eye, 0.0)
    return torch.linalg.matrix_rank(maps)


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Probabilities of scaled_dot_product_attention, which it never writes down: (..., H, T, S), float32."""
    if enable_gqa and k.dim() > 2:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask.float()
    # A query that sees nothing (padding) has no probabilities.
    return scores.softmax(-1).nan_to_num(0.0)


class _Watch:
    """Sums of ranks, block by block."""

    def __init__(self, trunk: Trunk) -> None:
        self.causal = trunk.causal
        found = [(i, b.find("attention")) for i, b in enumerate(trunk.blocks)]
        self.paths = {i: s.path for i, s in found if s is not None}
        self.depth = len(trunk.blocks)
        self.sums = dict.fromkeys(self.paths, 0.0)
        self.counts = dict.fromkeys(self.paths, 0)
        self.real: Tensor | None = None
        self.inside: int | None = None
        self.mode = _Maps(lambda: self.inside is not None, self._seen)

    def before(self) -> dict[str, Callable[..., None]]:
        """Return what is told when an attention begins."""

        def enter(index: int) -> Callable[..., None]:
            def begin(*_: Any) -> None:
                self.inside = index

            return begin

        return {path: enter(i) for i, path in self.paths.items()}

    def after(self) -> dict[str, Callable[..., None]]:
        """Return what is told when one ends."""

        def leave(*_: Any) -> None:
            self.inside = None

        return dict.fromkeys(self.paths.values(), leave)

    def means(self) -> list[float | None]:
        """Return the mean ranks."""
        silent = [path for i, path in self.paths.items() if not self.counts[i]]
        if silent:
            raise AnatomyError(
                f"no attention probabilities were seen in {', '.join(silent)}: they use a backend that hides them; "
                "switch to one of torch's (attn_implementation='eager' or 'sdpa'), or give the layers by number"
            )
        return [self.sums[i] / self.counts[i] if i in self.paths else None for i in range(self.depth)]

    def _seen(self, maps: Tensor) -> None:
        index, self.inside = self.inside, None
        assert index is not None
        rows = len(maps) if self.real is None else len(self.real)
        # Heads may be rolled into the batch, or be one.
        maps = maps.reshape(rows, -1, *maps.shape[-2:])
        for row in range(rows):
            one = maps[row]
            if self.real is not None and self.real.shape[1] == one.shape[-1]:
                keep = self.real[row].nonzero()[:, 0]
                one = one.index_select(-1, keep).index_select(-2, keep)
            self.sums[index] += float(map_rank(one, causal=self.causal).float().mean())
            self.counts[index] += 1


class _Maps(TorchFunctionMode):
    """Hands on the attention maps of whatever runs: square ones, of the first function in a module that makes some."""

    def __init__(self, wanted: Callable[[], bool], give: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.wanted, self.give = wanted, give

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and look at it."""
        kwargs = kwargs or {}
        if not self.wanted():
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            result = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            self._offer(result[1])
            return result
        if func is F.scaled_dot_product_attention:
            self._offer(attention_probabilities(*args, **kwargs))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in (torch.softmax, F.softmax, Tensor.softmax):
            self._offer(result)
        return result

    def _offer(self, maps: Any) -> None:
        if isinstance(maps, Tensor) and maps.dim() > 2 and maps.shape[-1] == maps.shape[-2]:
            self.give(maps)
