"""What stands between an encoder's last block and its answer, found by watching one forward pass, not by names.

The values tell: a module belongs to the tail if what it was given is what came before it, whole, pooled over the
tokens, or after an activation. That finds BERT's pooler, RoBERTa's head, DistilBERT's nameless ReLU, a mean of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina import probe
from lamina.anatomy import Trunk, describe, get, undisturbed
from lamina.batches import TARGETS, Batch, call, first_input
from lamina.errors import AnatomyError, LaminaError
from lamina.nn.token_pooling import pool_tokens

Pool = Literal["cls", "mean", "last", "mean_all", "mean_rest", "cls_mean_rest"]
"""First token; mean of the real tokens; last real token; mean of all tokens, padding too; of all but the first (BEiT);
the first token beside that (DINOv2)."""

POOLS: tuple[Pool, ...] = ("cls", "mean", "last", "mean_all", "mean_rest", "cls_mean_rest")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh()": torch.tanh,
    "relu()": F.relu,
    "gelu()": F.gelu,
    "silu()": F.silu,
}
"""Functions a tail may apply without a module of the model's own, by the name they have in a decision."""

Inspected = tuple[str, Tensor, Tensor]
"""A module's path, what it was given and what it gave."""


@dataclass(frozen=True)
class Tail:
    """How the stream (B, T, C) becomes an answer: `before`, pooling, `after`, `head`."""

    before: tuple[str, ...]
    """Paths of modules, and names of activations, that every token goes through (the final norm)."""
    pool: Pool
    after: tuple[str, ...]
    """The same for the pooled token (BERT's pooler)."""
    head: str | None
    """Path of the classifier; None = the model has none."""
    classes: int | None = None
    width: int = 0
    """Of what the classifier reads."""
    fixed: tuple[str, ...] = ()
    """Tensors that blocks are called with and that have no row for each example (a mask of tokens by tokens)."""


def pooled(x: Tensor, pool: Pool, mask: Tensor | None) -> Tensor:
    """Make one vector of a sequence: (B, T, C) -> (B, C), with "cls_mean_rest" (B, 2 C).

    Args:
        mask: (B, T), true where a token is real; None = everywhere.
    """
    if pool == "cls":
        return x[:, 0]
    if pool == "mean_rest":
        return x[:, 1:].mean(1)
    if pool == "cls_mean_rest":
        return torch.cat((x[:, 0], x[:, 1:].mean(1)), dim=-1)
    if pool == "mean_all":
        return x.mean(1)
    return pool_tokens(x, mask, pool).to(x.dtype)


def reader(model: nn.Module, tail: Tail) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what makes of a stream (B, T, C) and its token mask what the classifier reads, (B, C).

    Paths are looked up here, once, and not after every layer.
    """
    before, after = _steps(model, tail.before), _steps(model, tail.after)
    # One token goes through the final norm instead of all, where the norm looks at each token alone.
    alone = bool(before) and tail.pool == "cls" and not any(getattr(step, "takes_mask", False) for step in before)

    def read(stream: Tensor, mask: Tensor | None) -> Tensor:
        if alone:
            stream, mask = stream[:, :1], None
        h = pooled(_through(before, stream), tail.pool, mask)
        return _through(after, h)

    return read


def _steps(model: nn.Module, names: Iterable[str]) -> list[Callable[[Tensor], Tensor]]:
    """Find modules by path and activations by name."""
    return [ACTIVATIONS[name] if name in ACTIVATIONS else get(model, name) for name in names]


def _through(steps: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def token_mask(model: nn.Module, inputs: Mapping[str, Any], pool: Pool | None) -> Tensor | None:
    """Find which tokens are real: the attention mask; without one, for the "last", where ids are not the padding."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    ids, pad = inputs.get("input_ids"), getattr(getattr(model, "config", None), "pad_token_id", None)
    # A mean without a mask is one over all tokens, as attention without one is.
    return ids != pad if pool == "last" and pad is not None and isinstance(ids, Tensor) else None


def find_tail(
    model: nn.Module, trunk: Trunk, data: Iterable[Batch] | None, *, pool: Pool | None, classes: int | None
) -> Tail:
    """Watch the model on a few rows and read its tail off the values.

    Args:
        data: the first batch is looked at; None = made up, where the model tells what it takes.
        pool: the only way of pooling to look for; None = any.
        classes: outputs of a classifier to be added, where the model has none.
    Raises:
        AnatomyError: blocks that are not called one after the other, an answer that cannot be followed back to them,
            or one for every token. LaminaError: no classifier and no `classes`, or not as many; no data where needed.
    """
    batch = padded(model, probe_batch(model, data))
    fixed = _fixed(model, trunk, batch)
    batch = rows(batch, 3)
    stream, modules, result = _watched(model, trunk, batch)
    mask = token_mask(model, batch, pool)
    target, is_answer = _target(model, result, classes, pool)
    if is_answer and target.dim() != 2:
        raise AnatomyError(
            f"{type(model).__name__} answers for every token {tuple(target.shape)}; exits are for one answer a "
            "sequence: take the model without that head and give classes="
        )
    pools = POOLS if pool is None else (pool,)
    for able in (_leaves(model, modules), modules):
        for steps, place, kind in _chains(stream, target, able, pools, mask):
            tail = _arranged(model, trunk, steps, place, kind, is_answer, pool)
            width = 0 if tail is None else _explains(model, tail, stream, mask, target, is_answer)
            if tail is not None and width:
                count = int(target.shape[-1]) if is_answer else classes
                return Tail(tail.before, tail.pool, tail.after, tail.head, count, width, fixed)
    raise AnatomyError(
        f"cannot follow the answer of {type(model).__name__} {tuple(target.shape)} back to {trunk.path}"
        f"{'' if pool is None else f' with pool={pool!r}'} (looked for modules and {', '.join(ACTIVATIONS)} between "
        f"them, pooled by {', '.join(pools)}; saw: {', '.join(p for p, _, _ in modules) or 'nothing'})"
    )


def probe_batch(model: nn.Module, data: Iterable[Batch] | None) -> dict[str, Any]:
    """Take the first batch, or make one up of what the model says it takes.

    Raises:
        LaminaError: there is none, and the model does not say.
    """
    if data is not None:
        for batch in data:
            return {k: v for k, v in batch.items() if k not in TARGETS}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inner = getattr(model, "lamina_wrapped", model)
    named = inspect.signature(inner.forward).parameters
    config, generator = getattr(model, "config", None), torch.Generator().manual_seed(0)
    if "input_ids" in named and (vocabulary := describe(model).vocabulary):
        ids = torch.randint(vocabulary, (3, min(7, describe(model).context or 7)), generator=generator)
        if (pad := getattr(config, "pad_token_id", None)) is not None:
            ids[ids == pad] = (pad + 1) % vocabulary
        return {"input_ids": ids.to(device)}
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    shape = (channels, side, side) if isinstance(side, int) and channels else getattr(model, "image_shape", None)
    if "pixel_values" in named and shape is not None:
        return {"pixel_values": torch.randn(3, *shape, generator=generator).to(device)}
    raise LaminaError(
        f"early_exit watches {type(model).__name__} on one batch and cannot tell what it takes: pass data=... "
        "(--data on the command line)"
    )


def rows(batch: Batch, count: int) -> dict[str, Any]:
    """Return `count` rows, the first ones, again from the start where there are too few."""
    size = len(first_input(batch))
    chosen = torch.arange(count) % size
    return {
        k: v[chosen.to(v.device)] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v for k, v in batch.items()
    }


def padded(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Let one row of a text end in padding, so that a mean of the real tokens differs from one of all."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    takes = "attention_mask" in inspect.signature(getattr(model, "lamina_wrapped", model).forward).parameters
    if mask is None and takes and isinstance(ids, Tensor) and ids.dim() == 2:
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < 3 or not bool(mask.all()):
        return batch
    mask = mask.clone()
    mask[0, -1] = 0
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(ids, Tensor) and pad is not None:
        ids = ids.clone()
        ids[0, -1] = pad
        batch = {**batch, "input_ids": ids}
    return {**batch, "attention_mask": mask}


def tensors(value: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an argument with a name each, inside tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ()
    for name, item in items:
        yield from tensors(item, f"{key}.{name}")


def _fixed(model: nn.Module, trunk: Trunk, batch: Batch) -> tuple[str, ...]:
    """Run two and three rows: what blocks are given of the same first size, and not 1, has no row an example."""
    shapes: list[dict[str, torch.Size]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
        shapes.append({k: t.shape for name, a in given.items() for k, t in tensors(a, name)})

    first = trunk.blocks[0].path
    with torch.no_grad(), undisturbed(model):
        for count in (2, 3):
            with probe.observe(model, {}, before={first: note}):
                call(model, rows(batch, count))
    calls = len(shapes) // 2
    if not calls or calls != trunk.repeats:
        raise AnatomyError(f"{first} ran {calls} times in a forward pass, expected {trunk.repeats}")
    two, three = shapes[0], shapes[calls]
    stream = next(iter(two.items()), None)
    if stream is None or len(stream[1]) != 3 or stream[1][0] != 2:
        found = None if stream is None else tuple(stream[1])
        raise AnatomyError(
            f"the blocks of {trunk.path} must be called with a stream (batch, tokens, channels) first, and for two "
            f"examples are called with {found}"
        )
    return tuple(k for k, s in two.items() if s and s[0] != 1 and s[:1] == three.get(k, s)[:1])


def _watched(model: nn.Module, trunk: Trunk, batch: Batch) -> tuple[Tensor, list[Inspected], Any]:
    inside = tuple(f"{b.path}." for b in trunk.blocks)
    last = trunk.blocks[-1].path
    paths = [p for p, _ in model.named_modules() if p and not f"{p}.".startswith(inside)]
    with torch.no_grad(), undisturbed(model), probe.capture(model, paths, [*paths, last]) as seen:
        result = call(model, batch)
    found: list[Inspected] = []
    for path in paths:
        given, gave = seen.inputs.get(path), probe.first_tensor(seen.outputs.get(path))
        # Dropout and the like change nothing here, and the exits have a dropout of their own.
        if isinstance(given, Tensor) and gave is not None and gave.is_floating_point() and not _same(given, gave):
            found.append((path, given, gave))
    return seen.tensor(last), found, result


def _leaves(model: nn.Module, modules: list[Inspected]) -> list[Inspected]:
    return [m for m in modules if not any(True for _ in get(model, m[0]).children())]


def _target(model: nn.Module, result: Any, classes: int | None, pool: Pool | None) -> tuple[Tensor, bool]:
    """What the tail must lead to, and whether that is the answer already."""
    name = type(model).__name__

    def entry(key: str) -> Tensor | None:
        value = result.get(key) if isinstance(result, Mapping) else getattr(result, key, None)
        return value if isinstance(value, Tensor) else None

    scores = result if isinstance(result, Tensor) else entry("logits")
    hidden = entry("last_hidden_state")
    if scores is None and hidden is None:
        scores = probe.first_tensor(result)
    if scores is not None and (classes is None or scores.shape[-1] == classes):
        return scores, True
    if scores is not None and isinstance(result, Mapping):
        raise LaminaError(f"classes={classes}, but {name} has a classifier of {scores.shape[-1]} already: leave it out")
    if classes is None:
        raise LaminaError(f"{name} has no classifier: say how many outputs the exits should have, classes=...")
    summary = entry("pooler_output")
    if summary is not None and pool in (None, "cls"):
        return summary, False
    found = hidden if scores is None else scores
    assert found is not None
    return found, False


def _chains(
    stream: Tensor, target: Tensor, modules: list[Inspected], pools: Iterable[Pool], mask: Tensor | None
) -> Iterator[tuple[list[str], int | None, Pool | None]]:
    """Yield every way from the stream to the target: its steps, how many come before the pooling, and which that is."""

    def walk(
        x: Tensor, steps: list[str], place: int | None, kind: Pool | None
    ) -> Iterator[tuple[list[str], int | None, Pool | None]]:
        ways: list[tuple[Tensor, int | None, Pool | None]] = [(x, place, kind)]
        if place is None and x.dim() == 3:
            ways += [(pooled(x, p, mask), len(steps), p) for p in pools]
        for value, at, by in ways:
            for path, given, gave in modules:
                if path in steps:
                    continue
                for name, act in ((None, None), *ACTIVATIONS.items()):
                    if given.shape == value.shape and _same(value if act is None else act(value), given):
                        yield from walk(gave, [*steps, *([name] if name else []), path], at, by)
                        break
        for value, at, by in ways:
            if _same(value, target):
                yield steps, at, by

    yield from walk(stream, [], None, None)


def _arranged(
    model: nn.Module,
    trunk: Trunk,
    steps: list[str],
    place: int | None,
    kind: Pool | None,
    is_answer: bool,
    pool: Pool | None,
) -> Tail | None:
    """Bring a chain into the order norm, pooling, pooler, head; None where it has no such order."""
    if not is_answer:
        default: Pool = "last" if trunk.causal else "mean"
        place = len(steps) if place is None else place
        return Tail(tuple(steps[:place]), kind or pool or default, tuple(steps[place:]), None)
    if not steps or steps[-1] in ACTIVATIONS or place is None or kind is None:
        return None
    if place == len(steps):
        # Pooled after the head, which commutes with it if it looks at each token alone and is linear.
        if not isinstance(get(model, steps[-1]), nn.Linear):
            return None
        place -= 1
    return Tail(tuple(steps[:place]), kind, tuple(steps[place:-1]), steps[-1])


def _explains(
    model: nn.Module, tail: Tail, stream: Tensor, mask: Tensor | None, target: Tensor, is_answer: bool
) -> int:
    """Run the tail by itself: the width of what the classifier reads, or 0 where it does not lead to the target."""
    with torch.no_grad(), undisturbed(model):
        h = reader(model, tail)(stream, mask)
        found = h if tail.head is None else get(model, tail.head)(h)
    right = h.dim() == 2 and (_same(found, target) or (not is_answer and target.dim() == 3))
    return h.shape[-1] if right else 0


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or not (x.is_floating_point() and y.is_floating_point()):
        return False
    scale = float(y.abs().max()) if y.numel() else 0.0
    return torch.allclose(x.float(), y.float(), rtol=1e-4, atol=1e-5 * max(scale, 1e-3))
