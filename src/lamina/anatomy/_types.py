"""What a dissection says: frozen records of trunks, blocks, sublayers and sizes; re-exported by `lamina.anatomy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamina.errors import AnatomyError, nearest

NormPlace = Literal["pre", "post", "sandwich", "none"]
"""Where a sublayer's norm sits: x + F(norm x) | norm(x + F x) | x + norm(F(norm x)) | no norm found."""


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a block."""

    kind: Literal["attention", "cross_attention", "mlp", "branch"]
    """`branch` is a residual branch of another sort (a convolution, a mixer)."""
    path: str
    """Dotted path, from the model, of the module that computes the branch (of the first one, where there are two)."""
    parts: tuple[str, ...]
    """Paths of every module of the branch without its norms; BERT's feed-forward is a pair."""
    norms: tuple[str, ...]
    """Paths of the norm modules that belong to the branch, in the order they run; may lie inside a part."""
    place: NormPlace
    returns: Literal["tensor", "tuple"]
    """What the module at `path` returns: the branch's output itself, or a tuple that begins with it."""
    residual_inside: bool
    """True where the last part adds the residual (and, post-norm, normalises) itself, as BERT's do."""


@dataclass(frozen=True)
class Block:
    """One repeated unit of a trunk."""

    path: str
    sublayers: tuple[Sublayer, ...]
    """In the order they run (parallel branches: attention first)."""
    parallel: bool = False
    """True where attention and feed-forward read the same input (GPT-NeoX, GPT-J)."""

    def find(self, kind: str) -> Sublayer | None:
        """Return the block's sublayer of that kind, or None."""
        return next((s for s in self.sublayers if s.kind == kind), None)


@dataclass(frozen=True)
class Trunk:
    """A stack of blocks that run one after the other on a residual stream."""

    path: str
    """Path of the ModuleList (or of the shared block)."""
    blocks: tuple[Block, ...]
    repeats: int = 1
    """How often the whole stack runs with the same weights (ALBERT: 12 with one block)."""
    causal: bool = False

    @property
    def depth(self) -> int:
        """Number of blocks that run in one forward pass."""
        return len(self.blocks) * self.repeats


@dataclass(frozen=True)
class Anatomy:
    """Where everything is in one model; all paths are `named_modules` names."""

    model: str
    """Class name, for messages."""
    trunks: tuple[Trunk, ...]
    embeddings: tuple[str, ...]
    """Modules that feed the first trunk (token, position, patch embeddings)."""
    final_norm: str | None
    head: str | None
    """The output projection after the last trunk."""

    def trunk(self, path: str | None = None) -> Trunk:
        """Return the only trunk, or the one at `path`.

        Raises:
            AnatomyError: several trunks and no path given, or no trunk at that path.
        """
        paths = [t.path for t in self.trunks]
        if path is None:
            if len(self.trunks) == 1:
                return self.trunks[0]
            raise AnatomyError(f"{self.model} has several trunks: name one of {', '.join(paths)}")
        if path not in paths:
            raise AnatomyError(
                f"{self.model} has no trunk at {path!r}{nearest(path, paths)} (trunks: {', '.join(paths)})"
            )
        return self.trunks[paths.index(path)]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that planning and reports need; None = not found."""

    parameters: int
    depth: int | None
    width: int | None
    heads: int | None
    kv_heads: int | None
    head_width: int | None
    feed_forward: int | None
    vocabulary: int | None
    context: int | None
