"""Carrying a drop out: sublayers become stubs, blocks leave their list, cache slots and config follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lamina.anatomy import Trunk, attention_cores, dissect, get, keep_blocks
from lamina.batches import bare
from lamina.errors import AnatomyError, LaminaError
from lamina.rewrite._skip import skip_sublayer


@dataclass(frozen=True)
class Saving:
    """What a drop frees."""

    parameters: int
    """How many parameters go."""
    total: int
    """How many the model has before."""
    cache_bytes: int | None
    """Of keys and values that a decoder no longer keeps, per token and sequence; None where it keeps none."""


@dataclass(frozen=True)
class DropDecision:
    """Which sublayers and blocks of one trunk go; indices are of the blocks as they stand when it is applied."""

    trunk: str | None = None
    """Path of the stack of blocks; None = the only one."""
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    """Whole blocks; where all share their weights, iterations."""
    keep_norm: bool = False
    """Leave the norm of a dropped post-norm sublayer."""
    scores: Mapping[str, tuple[float | None, ...]] | None = None
    """Mean cosines per block by kind (`attention`, `mlp`, `block`); None where the order needed none."""
    depth: int = 0
    """How many blocks the trunk had; 0 = not known."""
    saving: Saving | None = None

    def table(self) -> str:
        """Word the decision for people: scores per block, what goes, what that saves."""
        depth = self.depth or max((*self.attention, *self.mlp, *self.blocks), default=-1) + 1
        columns = {k: v for k, v in (self.scores or {}).items() if any(s is not None for s in v)}
        lines = [" ".join(["block", *(f"{name:>9}" for name in columns), " goes"])]
        for index in range(depth):
            scores = (f"{'-' if s[index] is None else format(s[index], '.4f'):>9}" for s in columns.values())
            lines.append(" ".join([f"{index:>5}", *scores, f" {self._goes(index)}"]).rstrip())
        return "\n".join([*lines, *self._savings()])

    def _goes(self, index: int) -> str:
        if index in self.blocks:
            return "block"
        kinds = (("attention", self.attention), ("mlp", self.mlp))
        return ", ".join(kind for kind, chosen in kinds if index in chosen)

    def _savings(self) -> list[str]:
        if self.saving is None:
            return []
        gone, total = self.saving.parameters, self.saving.total
        lines = [f"parameters: {total:,} -> {total - gone:,} ({gone / max(total, 1):.1%} fewer)"]
        if not gone and self.blocks:
            lines.append(
                f"the blocks share their weights and run {self.depth - len(self.blocks)} of {self.depth} times"
            )
        elif gone < total:
            lines.append(f"speed-up where reading the weights is the cost: about {total / (total - gone):.2f}x")
        if self.saving.cache_bytes:
            lines.append(f"key-value cache: {self.saving.cache_bytes:,} bytes less per token and sequence")
        return lines


def find_trunk(model: nn.Module, path: str | None) -> Trunk:
    """Return the trunk at `path`, or the only one.

    Raises:
        AnatomyError: no trunk, several and no path, or nothing that can be one at the path.
    """
    model = bare(model)
    if path is None:
        return dissect(model).trunk()
    try:
        found = dissect(model)
    except AnatomyError:
        # No blocks can be recognised, but the user (or an earlier decision) says where they are.
        return dissect(model, blocks=path).trunk(path)
    known = any(t.path == path for t in found.trunks)
    return found.trunk(path) if known or not path else dissect(model, blocks=path).trunk(path)


def carry_out(model: nn.Module, decision: DropDecision, trunk: Trunk | None = None) -> nn.Module:
    """Drop what the decision names, in place; return the model.

    Args:
        trunk: where it was found already; it is looked for otherwise.
    Raises:
        AnatomyError: the model has no such block or sublayer, or shares the weights of what should go.
        LaminaError: a decoder would be left without attention, or its cache without a first slot.
    """
    if trunk is None:
        trunk = find_trunk(model, decision.trunk)
    check(model, trunk, decision)
    for index in sorted({*decision.attention, *decision.mlp}):
        block = trunk.blocks[index]
        for kind, chosen in (("attention", decision.attention), ("mlp", decision.mlp)):
            sublayer = block.find(kind)
            if index in chosen and sublayer is not None:
                skip_sublayer(model, block, sublayer, keep_norm=decision.keep_norm)
                block = replace(block, sublayers=tuple(s for s in block.sublayers if s is not sublayer))
    if trunk.repeats == 1:
        paths = _remove_blocks(model, trunk, decision.blocks)
        _renumber(model, trunk, decision, paths)
    else:
        _run_fewer_times(model, trunk, trunk.repeats - len(decision.blocks))
    _note_in_config(model, trunk, decision)
    return model


def check(model: nn.Module, trunk: Trunk, decision: DropDecision) -> None:
    """Refuse a decision that this model cannot follow; see `carry_out`."""
    limit = trunk.repeats if trunk.repeats > 1 else len(trunk.blocks)
    for kind in ("attention", "mlp", "blocks"):
        chosen: tuple[int, ...] = getattr(decision, kind)
        outside = [i for i in chosen if not 0 <= i < limit]
        if outside or len(set(chosen)) < len(chosen):
            raise AnatomyError(f"{trunk.path} has blocks 0..{limit - 1}; cannot drop {kind} of {list(chosen)}")
        if kind == "blocks" or not chosen:
            continue
        if trunk.repeats > 1:
            raise AnatomyError(shared_weights(trunk, kind))
        missing = [i for i in chosen if trunk.blocks[i].find(kind) is None]
        if missing:
            raise AnatomyError(f"blocks {missing} of {trunk.path} have no {kind} that can be dropped")
        refuse_shared(model, trunk, chosen)
    lending = lenders(model, trunk) & {*decision.attention, *decision.blocks}
    if lending:
        raise AnatomyError(
            f"the attention of blocks {sorted(lending)} of {trunk.path} holds tables that all others use: it must stay"
        )
    if len(decision.blocks) >= limit:
        raise LaminaError(f"{trunk.path} has {limit} blocks: one must stay, cannot drop {len(decision.blocks)}")
    _check_attention(model, trunk, decision)


def shared_weights(trunk: Trunk, kind: str) -> str:
    """Word why nothing but whole iterations can leave a trunk that runs one block many times."""
    return (
        f"{trunk.path} runs the same weights {trunk.repeats} times, so its {kind} cannot be dropped from some "
        "blocks only; drop_block runs it fewer times"
    )


def refuse_shared(model: nn.Module, trunk: Trunk, chosen: Iterable[int]) -> None:
    """Refuse to take a part out of a block that stands at several places: it would be gone at each.

    Raises:
        AnatomyError: names the places.
    """
    modules = [id(get(model, block.path)) for block in trunk.blocks]
    for index in chosen:
        places = [i for i, module in enumerate(modules) if module == modules[index]]
        if len(places) > 1:
            raise AnatomyError(
                f"blocks {places} of {trunk.path} are one module, so they can only be told apart as whole blocks: "
                "drop_block with order='first', 'last' or 'random' takes them out of the list"
            )


def lenders(model: nn.Module, trunk: Trunk) -> set[int]:
    """Blocks whose attention holds a lookup table the others lack: T5's first computes the position bias of all."""
    tables = []
    for block in trunk.blocks:
        sublayer = block.find("attention")
        modules = () if sublayer is None else get(model, sublayer.path).named_modules()
        tables.append({name for name, m in modules if isinstance(m, nn.Embedding)})
    others = [set().union(*tables[:i], *tables[i + 1 :]) for i in range(len(tables))]
    return {i for i, own in enumerate(tables) if own - others[i]}


def slots(types: Sequence[str], survivors: Iterable[int]) -> dict[int, int]:
    """Give each block that keeps its attention the lowest free cache slot of its own type.

    transformers makes one cache slot a block, of the block's `layer_types`, and reads the sequence length off slot 0.

    Raises:
        LaminaError: slot 0 would stay empty, so that the model would never know how much it has cached.
    """
    free: dict[str, list[int]] = {}
    for index, kind in enumerate(types):
        free.setdefault(kind, []).append(index)
    given = {block: free[types[block]].pop(0) for block in sorted(survivors)}
    if given and 0 not in given.values() and "attention" in types[0] and "linear" not in types[0]:
        raise LaminaError(
            f"no {types[0]} would be left, but the cache counts its tokens in slot 0, which is of that type: keep one"
        )
    return given


def _check_attention(model: nn.Module, trunk: Trunk, decision: DropDecision) -> None:
    survivors = _surviving(trunk, decision)
    lost = bool(decision.attention or decision.blocks) and trunk.repeats == 1
    if not trunk.causal or not lost or not any(b.find("attention") for b in trunk.blocks):
        return
    if not survivors:
        raise LaminaError(f"{trunk.path} would be left without attention; a decoder needs one to see earlier tokens")
    if getattr(_text_config(model), "num_kv_shared_layers", 0):
        raise AnatomyError(f"the blocks of {trunk.path} read each other's keys and values: none can lose its attention")
    gone = set(decision.blocks)
    kept = [i for i in range(len(trunk.blocks)) if i not in gone]
    types = _types(model, len(trunk.blocks))
    slots([types[i] for i in kept], [kept.index(i) for i in survivors])


def _surviving(trunk: Trunk, decision: DropDecision) -> list[int]:
    gone = {*decision.attention, *decision.blocks}
    return [i for i, block in enumerate(trunk.blocks) if block.find("attention") and i not in gone]


def _remove_blocks(model: nn.Module, trunk: Trunk, gone: tuple[int, ...]) -> dict[int, str]:
    """Take blocks out of their container; return where each remaining one (by its old index) now stands."""
    paths = {i: block.path for i, block in enumerate(trunk.blocks) if i not in gone}
    if not gone:
        return paths
    removed = {trunk.blocks[i].path for i in gone}
    names = [_join(trunk.path, name) for name in get(model, trunk.path)._modules]
    kept = [j for j, name in enumerate(names) if name not in removed]
    keep_blocks(model, trunk.path, kept)
    moved = {names[j]: _join(trunk.path, str(position)) for position, j in enumerate(kept)}
    return {i: moved[path] for i, path in paths.items()}


def _run_fewer_times(model: nn.Module, trunk: Trunk, count: int) -> None:
    container = get(model, trunk.path)
    config = getattr(model, "config", None)
    if isinstance(container, (nn.ModuleList, nn.Sequential)) and len(container) == trunk.repeats:
        keep_blocks(model, trunk.path, range(count))
    elif getattr(config, "num_hidden_layers", None) == trunk.repeats:
        config.num_hidden_layers = count  # type: ignore[union-attr]
    else:
        raise AnatomyError(f"cannot tell where {type(model).__name__} keeps how often it runs {trunk.path}")


def _renumber(model: nn.Module, trunk: Trunk, decision: DropDecision, paths: Mapping[int, str]) -> None:
    """Number what is left; the attentions of a decoder by cache slot, so that slot 0 is filled."""
    kept = sorted(paths)
    if decision.blocks:
        for position, index in enumerate(kept):
            for module in attention_cores(model, paths[index]):
                module.layer_idx = position  # type: ignore[assignment]
    if not trunk.causal:
        return
    survivors = [kept.index(i) for i in _surviving(trunk, decision)]
    for position, slot in slots(_types(model, len(kept)), survivors).items():
        block = trunk.blocks[kept[position]]
        inner = "".join(s.path.removeprefix(block.path) for s in (block.find("attention"),) if s is not None)
        for module in attention_cores(model, paths[kept[position]] + inner):
            module.layer_idx = slot  # type: ignore[assignment]


def _types(model: nn.Module, depth: int) -> list[str]:
    listed = getattr(_text_config(model), "layer_types", None)
    return list(listed) if isinstance(listed, list) and len(listed) == depth else ["attention"] * depth


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    inner = getattr(config, "get_text_config", None)
    return config if inner is None else inner(decoder=True)


def _note_in_config(model: nn.Module, trunk: Trunk, decision: DropDecision) -> None:
    """Write the indices under the key names of the method's authors, where there is a transformers config.

    Their format knows one stack of blocks; encoder and decoder together are left to the model's own history.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or getattr(config, "is_encoder_decoder", False):
        return
    kept = [i for i in range(len(trunk.blocks)) if i not in decision.blocks]
    for name, fresh in (("drop_attn_list", decision.attention), ("drop_mlp_list", decision.mlp)):
        earlier = getattr(config, name, None) or []
        listed = sorted(kept.index(i) for i in {*earlier, *fresh} if i in kept)
        if listed or hasattr(config, name):
            setattr(config, name, listed)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
