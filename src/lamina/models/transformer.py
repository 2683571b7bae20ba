"""The project's own transformer: decoder or encoder, with slots for mixer, norm and feed-forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, RecipeError, ShapeError
from lamina.models._tied_head import TiedHead
from lamina.nn.attention import Attention, KeyValueCache
from lamina.nn.feed_forward import FeedForward, SwiGLU
from lamina.nn.layout import layout_of
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

INITIAL_STD = 0.02
"""Of embeddings and projections (GPT-2); the outputs of residual branches divide it by sqrt(2 * depth)."""

POSITIONS = ("rotary", "learned", "sinusoidal", "none")


class TransformerBlock(nn.Module):
    """Pre-norm block: x + mixer(norm1 x), then x + feed_forward(norm2 x); (B, T, C) -> (B, T, C).

    The mixer gets the keywords that its forward names (`attention_mask`, `positions`, `cache`), and no others.
    """

    def __init__(
        self, norm1: nn.Module, mixer: nn.Module, norm2: nn.Module, feed_forward: nn.Module, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.mixer = norm1, mixer
        self.norm2, self.feed_forward = norm2, feed_forward
        self.dropout = nn.Dropout(dropout)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Read when the mixer is set, by us or by a pass, so that forward inspects nothing (and compiles).
        if name == "mixer":
            self._mixer_takes = _keywords(value.forward)

    def takes(self, keyword: str) -> bool:
        """Whether the mixer's forward has this keyword."""
        return self._mixer_takes is None or keyword in self._mixer_takes

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Run both branches; `context` is offered to the mixer."""
        given = {k: v for k, v in context.items() if v is not None and self.takes(k)}
        mask = context.get("attention_mask")
        x = x + self.dropout(self.mixer(normed(self.norm1, x, mask), **given))
        # The feed-forward has its own dropout.
        return x + self.feed_forward(normed(self.norm2, x, mask))


@register("model", source="Vaswani et al. 2017; pre-norm and initialisation: Radford et al. 2019")
class Transformer(TiedHead):
    """Stack of pre-norm blocks on token embeddings: a language model, or (with `classes`) a classifier.

    input_ids (B, T) -> logits (B, T, vocabulary), or (B, classes) from the real tokens' mean or from a class token.

    Args:
        vocabulary: number of token ids.
        context: longest sequence.
        causal: tokens see earlier tokens only (decoder); False: the whole sequence (encoder).
        mixer: built as mixer(width=, heads=, kv_heads=, context=, causal=, rotary=, dropout=), as far as it names them.
            Where causal or rotary is asked for, the mixer must have an attribute of that name that is true.
        norm: built as norm(width).
        feed_forward: built as feed_forward(width=, hidden=, dropout=), as far as it names them.
        hidden: channels inside the feed-forward; None = its own default.
        kv_heads: heads of keys and values; None = heads.
        head_width: channels of one head, for a mixer that names it; None = width // heads, or what the mixer's node
            says. heads * head_width need not be width: see `wide_transformer`.
        position: "rotary" (inside the mixer), "learned" or "sinusoidal" (added to the embeddings), or "none".
        dropout: of embeddings, attention weights and branches, in training; 0..1.
        tie: the output projection is the token embedding (language models with a plain head only).
        classes: make a classifier with that many outputs.
        pool: what a classifier reads: the "mean" of the real tokens, or a learned "class" token in front of them.
        linear: the layers inside mixer and feed_forward, as far as they have a slot of that name.
        head: built as head(width, vocabulary or classes); of a language model the plain one has no bias.
    Raises:
        ShapeError: sizes do not fit. RecipeError: the mixer cannot do what is asked (causal, rotary, sequences).
    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3.
    Example:
        >>> Transformer(2, 16, 2, vocabulary=32, context=8)(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        depth: int = 6,
        width: int = 256,
        heads: int = 8,
        *,
        vocabulary: int,
        context: int,
        causal: bool = True,
        mixer: Annotated[Node, Slot("mixer")] = "attention",
        norm: Annotated[Node, Slot("norm")] = "layer_norm",
        feed_forward: Annotated[Node, Slot("layer")] = "feed_forward",
        hidden: int | None = None,
        kv_heads: int | None = None,
        head_width: int | None = None,
        position: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary",
        dropout: float = 0.0,
        tie: bool = True,
        classes: int | None = None,
        pool: Literal["mean", "class"] = "mean",
        linear: Annotated[Node, Slot("layer")] = "linear",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        _check_sizes(depth=depth, width=width, heads=heads, vocabulary=vocabulary, context=context, classes=classes)
        if position not in POSITIONS:
            raise RecipeError(f"position must be {', '.join(map(repr, POSITIONS))}, got {position!r}")
        _check_pool(pool, classes, causal)
        self.context, self.causal, self.classes = context, causal, classes
        make_norm, make_mixer = factory("norm", norm), factory("mixer", mixer)
        make_feed_forward = factory("layer", feed_forward)
        check_linear(linear, make_mixer, make_feed_forward)
        given: dict[str, Any] = {"width": width, "heads": heads, "kv_heads": kv_heads, "linear": linear}
        # A class token is one token more for the mixer.
        given |= {"context": context + (pool == "class"), "causal": causal}
        given |= {} if head_width is None else {"head_width": head_width}
        if head_width is not None and "head_width" not in make_mixer.found.signature.options:  # type: ignore[attr-defined]
            raise RecipeError(f"head_width={head_width} would change nothing: the mixer {mixer!r} has no such option")
        rotary = position == "rotary"

        def block() -> TransformerBlock:
            mixing = make_mixer(**given, rotary=rotary, dropout=dropout)
            _check_mixer(mixing, causal=causal, rotary=rotary)
            feeding = make_feed_forward(width=width, hidden=hidden, dropout=dropout, linear=linear)
            return TransformerBlock(make_norm(width), mixing, make_norm(width), feeding, dropout)

        self.embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width) if position == "learned" else None
        self.waves = position == "sinusoidal"
        self.class_token = nn.Parameter(torch.empty(width)) if pool == "class" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.final_norm: nn.Module = make_norm(width)
        plain: Node = {"name": "linear", "bias": False} if head == "linear" and classes is None else head
        self.head: nn.Module = factory("layer", plain)(width, vocabulary if classes is None else classes)
        self._initialise()
        if tie and classes is None and type(self.head) is nn.Linear:
            self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the logits; see the class for shapes.

        Args:
            attention_mask: (B, T) bool or 0/1 (with a cache: over all its tokens too); True = a real token.
            inputs_embeds: (B, T, width) instead of input_ids.
            cache: keys and values of the tokens before these; this call adds to it.
        Raises:
            ShapeError: longer than the context. LaminaError: a mixer cannot use a cache, or not one input given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise LaminaError("Transformer takes either input_ids or inputs_embeds")
        if cache is not None and not self.caches:
            raise LaminaError("this model's mixers cannot use a cache: not causal, or their forward does not name it")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if cache is None else cache.length
        positions = self._positions(past, x)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.waves:
            x = x + sinusoids(positions, x.shape[-1]).to(x.dtype)
        if self.class_token is not None:
            x, attention_mask = self._with_class_token(x, attention_mask)
            positions = self._positions(0, x, more=1)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, attention_mask=attention_mask, positions=positions, cache=cache)
        if cache is not None:
            cache.advance(x.shape[1])
        x = normed(self.final_norm, x, attention_mask)
        if self.class_token is not None:
            return self.head(x[:, 0])
        return self.head(x if self.classes is None else mean_token(x, attention_mask))

    @property
    def caches(self) -> bool:
        """Whether generation can reuse keys and values: every mixer left takes a cache."""
        return self.causal and all(
            isinstance(b, TransformerBlock) and b.takes("cache") and getattr(b.mixer, "caches", True)
            for b in self.blocks
        )

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, steps: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue each sequence by `steps` tokens; (B, T) -> (B, T + steps). Call `eval()` first to turn dropout off.

        Args:
            temperature: divides the logits before sampling; 0 = always the likeliest token.
            generator: draws the samples; on the model's device.
        Raises:
            LaminaError: the model is not a causal language model. ShapeError: longer than the context.
        """
        if not self.causal or self.classes is not None:
            raise LaminaError("only a causal Transformer without classes generates text")
        if temperature < 0 or steps < 0:
            raise ValueError(f"temperature and steps must not be negative, got {temperature} and {steps}")
        if not input_ids.shape[1]:
            raise ShapeError(f"generation continues at least one token, got input_ids {tuple(input_ids.shape)}")
        if input_ids.shape[1] + steps > self.context:
            raise ShapeError(f"{input_ids.shape[1]} tokens and {steps} steps do not fit the context of {self.context}")
        cache = KeyValueCache() if self.caches else None
        tokens = input_ids
        for _ in range(steps):
            fresh = tokens if cache is None else tokens[:, cache.length :]
            chosen = sample(self(fresh, cache=cache)[:, -1], temperature, generator)
            tokens = torch.cat((tokens, chosen), dim=1)
        return tokens

    def _with_class_token(self, x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.class_token is not None
        x = torch.cat((self.class_token.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        return x, None if attention_mask is None else F.pad(attention_mask, (1, 0), value=1)

    def _positions(self, past: int, x: Tensor, more: int = 0) -> Tensor:
        length = past + x.shape[1]
        if length > self.context + more:
            raise ShapeError(f"the sequence has {length} tokens, the model's context is {self.context}")
        return torch.arange(past, length, device=x.device)

    def _initialise(self) -> None:
        residual_std = INITIAL_STD / math.sqrt(2 * len(self.blocks))
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=INITIAL_STD)
        for table in (self.embedding, self.position_embedding, self.head):
            # A head of another kind keeps the initialisation of its paper.
            if isinstance(table, nn.Embedding) or type(table) is nn.Linear:
                nn.init.normal_(table.weight, std=INITIAL_STD)
        if type(self.head) is nn.Linear and self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        for module in self.blocks.modules():
            # Parts of other methods keep the initialisation of their papers.
            if isinstance(module, (Attention, FeedForward, SwiGLU)):
                module.initialise(INITIAL_STD, residual_std)


def check_linear(linear: Node, *parts: Callable[..., Any]) -> None:
    """Refuse a kind of linear layer that no part of the block has a slot for.

    Raises:
        RecipeError: names the parts.
    """
    if linear != "linear" and not any("linear" in p.found.signature.options for p in parts):  # type: ignore[attr-defined]
        names = " nor ".join(p.found.part.name for p in parts)  # type: ignore[attr-defined]
        raise RecipeError(f"linear={linear!r} would change nothing: neither {names} has a slot for linear layers")


def normed(norm: nn.Module, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Run a norm; one that takes statistics over tokens (`takes_mask`) is told which of them are real."""
    if attention_mask is None or not getattr(norm, "takes_mask", False):
        return norm(x)
    return norm(x, attention_mask[:, -x.shape[1] :])


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Return the sines, then the cosines, of positions (T,) at wave lengths from 2 pi to 20000 pi; (T, width), float32.

    Source: Vaswani et al. (2017), arXiv 1706.03762, section 3.5 (there sines and cosines alternate).
    """
    half = (width + 1) // 2
    rate = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions.to(torch.float32)[:, None] * rate
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :width]


def mean_token(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Average the real tokens; (B, T, C) -> (B, C). A row of padding alone gives zeros."""
    if attention_mask is None:
        return x.mean(dim=1)
    weight = attention_mask.to(x.dtype)[..., None]
    return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row from softmax(logits / temperature), or take the likeliest at 0; (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(dim=-1), 1, generator=generator)


def _keywords(forward: Callable[..., Any]) -> frozenset[str] | None:
    """Names of a forward's parameters; None = it takes any."""
    parameters = inspect.signature(forward).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else frozenset(parameters)


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ShapeError(f"Transformer: {name} must be at least 1, got {size}")


def _check_pool(pool: str, classes: int | None, causal: bool) -> None:
    if pool not in ("mean", "class"):
        raise RecipeError(f"pool must be 'mean' or 'class', got {pool!r}")
    if pool == "class" and (classes is None or causal):
        raise RecipeError(
            "pool='class' is for classifiers that see the whole sequence: set classes and causal=False (the token in "
            "front of a causal model sees nothing)"
        )


def _check_mixer(mixer: nn.Module, *, causal: bool, rotary: bool) -> None:
    name = type(mixer).__name__
    if layout_of(mixer) != "sequence":
        raise RecipeError(f"Transformer: the mixer {name} works on images (layout 'grid'), not on sequences")
    if causal and not getattr(mixer, "causal", False):
        raise RecipeError(
            f"Transformer: the mixer {name} is not known to be causal (no true attribute `causal`); "
            "pass causal=False, or another mixer"
        )
    if rotary and not getattr(mixer, "rotary", False):
        raise RecipeError(
            f"Transformer: the mixer {name} has no rotary positions (no true attribute `rotary`); "
            "pass position='learned' or position='none'"
        )
