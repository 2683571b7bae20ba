"""Find the stacks of repeated blocks in a module tree, and its ends (embeddings, final norm, head)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from lamina.anatomy._flow import follow
from lamina.anatomy._tree import attentions, channels, is_inside, is_norm, join, widths
from lamina.errors import AnatomyError

_CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Stack:
    """A container of repeated siblings."""

    path: str
    blocks: tuple[str, ...]
    repeats: int

    def covers(self, path: str, model: nn.Module) -> bool:
        """Tell a path inside; of a module that holds its blocks among other children, only the blocks are."""
        whole = self.path != "" and isinstance(model.get_submodule(self.path), _CONTAINERS)
        return any(is_inside(path, inner) for inner in ((self.path,) if whole else self.blocks))


def find_stacks(model: nn.Module) -> list[Stack]:
    """List the innermost containers whose children are blocks, in the order the model registers them."""
    order = [(path, m) for path, m in model.named_modules() if isinstance(m, _CONTAINERS) or _numbered(m)]
    found: list[Stack] = []
    for path, container in sorted(order, key=lambda item: -len(item[0].split(".")) if item[0] else 0):
        inner = [s for s in found if is_inside(s.path, path)]
        stack = _stack(path, container, inner)
        if stack is not None:
            found = [s for s in found if s not in inner] + [stack]
    ranks = {path: rank for rank, (path, _) in enumerate(order)}
    return sorted(found, key=lambda s: ranks[s.path])


def stack_at(model: nn.Module, path: str, module: nn.Module) -> Stack:
    """Read the container the user named.

    Raises:
        AnatomyError: it holds no modules.
    """
    members = _members(module, whole=True)
    if not members or not isinstance(module, (*_CONTAINERS, nn.ModuleDict)):
        raise AnatomyError(
            f"blocks={path!r} is a {type(module).__name__} in {type(model).__name__}, expected a ModuleList or "
            "Sequential of blocks"
        )
    return _made(path, members)


def none_found(model: nn.Module) -> AnatomyError:
    """Word the error for a model without blocks."""
    able = [(path, m) for path, m in model.named_modules() if isinstance(m, (*_CONTAINERS, nn.ModuleDict)) and path]
    # A list of lists, or of things with parts, is likelier a stack than a Sequential of layers.
    likely = [path for path, m in able if len(m) > 1 and all(any(c.children()) for c in m.children())]
    seen = ", ".join(name for name, _ in model.named_children()) or "no submodules"
    hint = f"Pass blocks={likely[0]!r}" if likely else "Pass blocks= the path of the list, if there is one"
    return AnatomyError(
        f"found no repeated blocks in `{type(model).__name__}` (looked for siblings in a ModuleList or Sequential, or "
        f"numbered alike, with an attention or a residual branch; saw: {seen}). {hint}."
    )


def _stack(path: str, container: nn.Module, inner: list[Stack]) -> Stack | None:
    members = _members(container)
    loose = not isinstance(container, _CONTAINERS)
    # Numbered siblings that hold stacks are stages (a ResNet's layer1 .. layer4).
    if not members or (loose and any(is_inside(s.path, join(path, n)) for s in inner for n, _ in members)):
        return None
    with_attention = [_has_attention(join(path, n), m, inner) for n, m in members]
    if any(with_attention):
        # A pair (attention wrapper, feed-forward wrapper) is one block's inside, not two blocks.
        if not all(with_attention) and len(members) == 2:
            return None
        return _made(path, _with_other_blocks(path, container, members, inner))
    residual = [(n, m) for n, m in members if _has_residual(join(path, n), m, inner)]
    return _made(path, _with_other_blocks(path, container, residual, inner)) if residual else None


def _members(container: nn.Module, *, whole: bool = False) -> list[tuple[str, nn.Module]]:
    """Children of the commonest class, listed once per place they stand at."""
    able = [(n, m) for n, m in container._modules.items() if m is not None and (whole or _is_able(m))]
    if not isinstance(container, _CONTAINERS) and not whole:
        able = [(n, m) for n, m in able if n in _numbered(container)]
    if whole or not able:
        return able
    kind, count = Counter(type(m) for _, m in able).most_common(1)[0]
    if count < 2 and not (isinstance(container, nn.ModuleList) and len(container) == 1):
        return []
    return [(n, m) for n, m in able if type(m) is kind]


def _with_other_blocks(
    path: str, container: nn.Module, members: list[tuple[str, nn.Module]], inner: list[Stack]
) -> list[tuple[str, nn.Module]]:
    """Add the siblings of another class that are blocks as well (Jamba: attention here, a state space there)."""
    known, kind = {n for n, _ in members}, type(members[0][1])
    mixed = isinstance(container, _CONTAINERS)

    def belongs(name: str, module: nn.Module) -> bool:
        if not mixed or type(module) is kind or not _is_able(module):
            return name in known
        place = join(path, name)
        return _has_attention(place, module, inner) or _has_residual(place, module, inner)

    return [(n, m) for n, m in container._modules.items() if m is not None and belongs(n, m)]


def _is_able(module: nn.Module) -> bool:
    """Tell what may be a block: it computes something from parts; leaves and torch's attention are parts."""
    return any(True for _ in module.children()) and not isinstance(module, nn.MultiheadAttention)


def _numbered(module: nn.Module) -> set[str]:
    """Names of the most children that are numbered alike (`layer_0`, `layer_1`), outside containers."""
    if isinstance(module, _CONTAINERS):
        return set()
    stems: dict[tuple[str, type], set[str]] = {}
    for name, child in module._modules.items():
        stem = name.rstrip("0123456789")
        if child is not None and stem != name and _is_able(child):
            stems.setdefault((stem, type(child)), set()).add(name)
    longest = max(stems.values(), key=len, default=set())
    return longest if len(longest) > 1 else set()


def _made(path: str, members: list[tuple[str, nn.Module]]) -> Stack:
    same = len({id(m) for _, m in members}) == 1
    kept = members[:1] if same else members
    return Stack(path, tuple(join(path, n) for n, _ in kept), len(members) if same else 1)


def _has_attention(path: str, block: nn.Module, inner: list[Stack]) -> bool:
    found = [join(path, p) for p, _ in attentions(block)]
    return any(not any(is_inside(p, s.path) for s in inner) for p in found)


def _has_residual(path: str, block: nn.Module, inner: list[Stack]) -> bool:
    if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        return False
    flow = follow(block)
    if flow is None or not flow.residual:
        return False
    units = [join(path, u) for b in flow.branches for u in b.strand.units]
    return any(not any(is_inside(u, s.path) for s in inner) for u in units)


def embeddings(model: nn.Module, stacks: list[Stack]) -> tuple[str, ...]:
    """List lookup tables outside all trunks, and the convolutions before the first one or named so (patches)."""
    found: list[str] = []
    before = True
    for path, module in model.named_modules():
        if _covers(model, stacks, path):
            before = before and not is_inside(path, stacks[0].blocks[0])
            continue
        table = isinstance(module, nn.Embedding)
        if table or (channels(module) is not None and (before or "embed" in path)):
            found.append(path)
    return tuple(found)


def final_norm(model: nn.Module, last: Stack, stacks: list[Stack], width: int | None) -> str | None:
    """Find the norm that stands beside or above the last trunk, and after it where several do."""
    before: list[str] = []
    after: list[str] = []
    passed = False
    for path, module in model.named_modules():
        passed = passed or path == last.blocks[-1]
        if _covers(model, stacks, path) or not is_norm(module) or not path:
            continue
        sizes = {p.shape[0] for p in module.parameters() if p.dim() == 1}
        if (
            is_inside(last.path, path.rpartition(".")[0])
            and "embed" not in path
            and (width is None or not sizes or width in sizes)
        ):
            (after if passed else before).append(path)
    return after[0] if after else before[-1] if before else None


def head(model: nn.Module, last: Stack, stacks: list[Stack], width: int | None) -> str | None:
    """Find the projection after the last trunk: the one a Hugging Face model names, or the last one above the trunk."""
    named = getattr(model, "get_output_embeddings", lambda: None)()
    found: str | None = None
    for path, module in model.named_modules():
        if named is not None and module is named:
            return path
        size = widths(module)
        if size is None or _covers(model, stacks, path) or "pool" in path:
            continue
        fits = width is None or size[0] == width
        if fits and _stands_above(model, path, last):
            found = path
    return found


def _stands_above(model: nn.Module, path: str, last: Stack) -> bool:
    if any(word in path for word in ("head", "classifier")):
        return True
    parent, _, name = path.rpartition(".")
    if is_inside(last.path, parent):
        # A projection registered before the trunk leads into it.
        names = list(dict(model.get_submodule(parent).named_children()))
        child = last.blocks[-1].removeprefix(parent).lstrip(".").partition(".")[0]
        return names.index(name) > names.index(child)
    return False


def _covers(model: nn.Module, stacks: list[Stack], path: str) -> bool:
    return any(s.covers(path, model) for s in stacks)
