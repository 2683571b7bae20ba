"""Hopfield layers with patterns of their own: pooling by learned states, and look-up in learned stored patterns.

Source: Ramsauer et al., Hopfield Networks is All You Need (2020), arXiv 2008.02217.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import ShapeError
from lamina.nn._hopfield_options import options_of
from lamina.nn.hopfield import INITIAL_STD, Hopfield
from lamina.nn.hopfield_association import SOURCE
from lamina.registry import register

OF_SEQUENCES = ("causal", "rotary", "rotary_base", "context")
"""Options of `Hopfield` that mean something for a sequence of tokens only."""


@register("layer", source=f"{SOURCE}, section 3, type (2)")
@options_of(Hopfield, without=OF_SEQUENCES)
class HopfieldPooling(nn.Module):
    """Pool a set of instances by learned states: (B, N, width) -> (B, quantity * output_size).

    For bags of which only the bag has a label, sets, and sequences whose order does not matter: each learned state
    looks for what it stands for among the instances. Padding changes nothing where it is masked.

    Args:
        width: of the states, and of the instances where stored_size is not given.
        quantity: how many states.
        trainable: whether the states learn; False = they stay as they were drawn.
        options: of `Hopfield`, all but those of sequences.
    Raises:
        ShapeError, ValueError: as `Hopfield`; quantity below 1.
    Source: Ramsauer et al. (2020), section 3; states drawn from N(0, 0.02).
    Example:
        >>> HopfieldPooling(16, quantity=2, heads=4, hidden_size=8)(torch.randn(3, 10, 16)).shape
        torch.Size([3, 32])
    """

    def __init__(self, width: int, quantity: int = 1, *, trainable: bool = True, **options: Any) -> None:
        super().__init__()
        _check("HopfieldPooling", quantity, options)
        self.association = Hopfield(width, **options)
        self.quantity, self.output_size = quantity, quantity * self.association.output_size
        self.state = nn.Parameter(torch.empty(1, quantity, width), requires_grad=trainable)
        nn.init.normal_(self.state, std=INITIAL_STD)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        *,
        key_padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool; with `return_weights` also how much of each instance, (B, heads, quantity, N).

        Args:
            x: instances (B, N, stored_size), or (instances, what is pooled of them (B, N, projection_size)).
            key_padding_mask: (B, N), True = no instance.
            association_mask: (quantity, N) or (B * heads, quantity, N); see `Hopfield`.
        """
        stored, projection = (x, x) if isinstance(x, Tensor) else x
        found = self.association(
            (stored, self.state, projection),
            key_padding_mask=key_padding_mask,
            association_mask=association_mask,
            return_weights=return_weights,
        )
        return (found[0].flatten(1), found[1]) if return_weights else found.flatten(1)


@register("layer", source=f"{SOURCE}, section 3, type (3)")
@options_of(Hopfield, without=OF_SEQUENCES)
class HopfieldLayer(nn.Module):
    """Look states up in learned stored patterns: (B, S, width) -> (B, S, output_size).

    For prototypes, look-up tables, a layer that answers like the training data it holds: `store` sets the patterns (and
    what to answer for them, with separate targets), train_stored=False keeps them.

    Args:
        width: of the states, and of the stored patterns where stored_size is not given.
        quantity: how many patterns are stored.
        separate_targets: what is retrieved are learned values of its own (projection_size), not the stored patterns.
        train_stored, train_targets: whether they learn.
        options: of `Hopfield`, all but those of sequences.
    Raises:
        ShapeError, ValueError: as `Hopfield`; quantity below 1.
    Source: Ramsauer et al. (2020), section 3; patterns and targets drawn from N(0, 0.02).
    Example:
        >>> HopfieldLayer(16, quantity=5)(torch.randn(3, 7, 16)).shape
        torch.Size([3, 7, 16])
    """

    def __init__(
        self,
        width: int,
        quantity: int,
        *,
        separate_targets: bool = False,
        train_stored: bool = True,
        train_targets: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        _check("HopfieldLayer", quantity, options)
        if not separate_targets:
            options.setdefault("projection_size", options.get("stored_size"))
        self.association = Hopfield(width, **options)
        self.quantity, self.output_size = quantity, self.association.output_size
        self.stored = nn.Parameter(torch.empty(1, quantity, self.association.stored_size), requires_grad=train_stored)
        size = self.association.projection_size
        if not separate_targets and size != self.association.stored_size:
            raise ShapeError(
                f"HopfieldLayer: projection_size={size} is for separate_targets=True: else patterns are both"
            )
        self.targets = (
            nn.Parameter(torch.empty(1, quantity, size), requires_grad=train_targets) if separate_targets else None
        )
        for patterns in (self.stored, self.targets):
            if patterns is not None:
                nn.init.normal_(patterns, std=INITIAL_STD)

    def forward(
        self,
        x: Tensor,
        *,
        association_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Look up; with `return_weights` also how much of each pattern, (B, heads, S, quantity)."""
        targets = self.stored if self.targets is None else self.targets
        return self.association(
            (self.stored, x, targets), association_mask=association_mask, return_weights=return_weights
        )

    @torch.no_grad()
    def store(self, patterns: Tensor, targets: Tensor | None = None) -> None:
        """Set the stored patterns, (quantity, stored_size), and what is retrieved for them, in place.

        Raises:
            ShapeError: another shape, or targets where the layer has none of its own.
        """
        for name, given, kept in (("patterns", patterns, self.stored), ("targets", targets, self.targets)):
            if given is not None and (kept is None or given.shape != kept.shape[1:]):
                wanted = "none (separate_targets=False)" if kept is None else tuple(kept.shape[1:])
                raise ShapeError(f"HopfieldLayer.store: {name} must be {wanted}, got {tuple(given.shape)}")
        self.stored.copy_(patterns[None])
        if targets is not None and self.targets is not None:
            self.targets.copy_(targets[None])


def _check(name: str, quantity: int, options: dict[str, Any]) -> None:
    if quantity < 1:
        raise ShapeError(f"{name}: quantity must be at least 1, got {quantity}")
    for option in OF_SEQUENCES:
        if option in options:
            raise TypeError(f"{name} has no option {option!r}: its patterns are no sequence")
