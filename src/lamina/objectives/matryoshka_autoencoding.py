"""Pre-train every size of an encoder: the first n layers and d numbers restore hidden words, and carry the sentence.

    objective = MatryoshkaAutoencoding(model, mask_token=103, vocabulary=30522, pairs=[(2, 32), (4, 64), (6, 384)],
                                       special=[0, 101, 102], continues=continuing_tokens(tokenizer))

Source: Zhuang et al., Starbucks: Improved Training for 2D Matryoshka Embeddings (2024), arXiv 2410.13230.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter

from lamina import probe
from lamina.anatomy import dissect, get
from lamina.anatomy.exits import Exits
from lamina.batches import Batch, bare, call
from lamina.errors import AnatomyError, LaminaError
from lamina.objectives._exit_vectors import exits_of
from lamina.objectives._sizes import check_pairs, fitting_pairs
from lamina.objectives._word_masks import Hidden, draws, hide, word_order
from lamina.objectives.objective import Losses, target
from lamina.objectives.supervised import IGNORE
from lamina.registry import register


@register("objective", source="Zhuang et al., Starbucks (2024), arXiv 2410.13230, section 3.2")
class MatryoshkaAutoencoding(nn.Module):
    """Masked autoencoding at every size: the mean over sizes (n, d) of (MLM + MAE) / 2.

    For encoders with a head over the vocabulary (BertForMaskedLM, our transformer with causal=False), on plain text.
    MLM: the tokens hidden from the encoder, by the head on the first d numbers of the stream after block n: its first
    dense layer uses its first d columns, all else stays. MAE: of the first token's d numbers the head's transform makes
    one full vector, which stands in place of the first token of the text with more words hidden; one transformer layer
    on that must restore them. The layer starts as a copy of the encoder's first block, is trained along, and is never
    part of the model. Whole words are hidden, in one shuffled order, so that what the encoder misses the decoder misses
    too. Logs `mlm/2x32`, `mae/2x32`, ...

    Micro-batches and processes give the same gradient where their rows hide tokens in one proportion; masks hang on the
    row and the step, not on the batch. For a model in evaluation mode they are the same every time.

    Args:
        model: the one that will be trained; its first block is copied.
        mask_token: id of the mask token.
        vocabulary: number of token ids, for the random replacement.
        pairs: sizes (layers, width) in any order; None: six, layers in equal steps, widths halved.
        encoder_mask: share of the tokens hidden from the encoder, 0..1.
        decoder_mask: from the decoder, at least as many.
        special: ids that are never hidden (padding, [CLS], [SEP]).
        continues: ids that belong to the word of the token before, as `continuing_tokens` lists them.
        trunk: path of the stack of blocks, where the model has several.
        seed: of the masks.
    Raises:
        LaminaError: shares out of range, sizes that do not grow in both, (at the call) no `input_ids`.
        AnatomyError: no trunk, several, or no head.
    Source: Zhuang et al. (2024), arXiv 2410.13230, section 3.2. Deviation: a head without a transform before its
        vocabulary hands the d numbers on with zeros behind them.
    """

    needs: ClassVar[Literal["outputs", "model"]] = "model"

    def __init__(
        self,
        model: nn.Module,
        mask_token: int,
        vocabulary: int,
        pairs: Sequence[tuple[int, int]] | None = None,
        *,
        encoder_mask: float = 0.2,
        decoder_mask: float = 0.4,
        special: Sequence[int] = (),
        continues: Sequence[int] = (),
        trunk: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0.0 < encoder_mask <= decoder_mask <= 1.0:
            raise LaminaError(
                f"encoder_mask and decoder_mask are shares, 0 < encoder <= decoder <= 1, got {encoder_mask} and {decoder_mask}"  # noqa: E501
            )
        if not 0 <= mask_token < vocabulary:
            raise LaminaError(f"mask_token must be an id below vocabulary={vocabulary}, got {mask_token}")
        self.mask_token, self.vocabulary, self.trunk, self.seed = mask_token, vocabulary, trunk, seed
        self.encoder_mask, self.decoder_mask = encoder_mask, decoder_mask
        self.pairs = None if pairs is None else check_pairs(pairs)
        exits = exits_of(model, trunk)
        find_head(bare(model), exits)
        self.decoder: nn.Module = copy.deepcopy(get(bare(model), exits.blocks[0]))
        for name, ids in (("special", special), ("continues", continues)):
            chosen = torch.zeros(vocabulary, dtype=torch.bool)
            chosen[torch.as_tensor(list(ids), dtype=torch.long)] = True
            self.register_buffer(name, chosen, persistent=False)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, model: nn.Module, batch: Batch) -> Losses:
        """Hide words, run the encoder once and the decoder layer once a size, and return the losses."""
        exits, root = exits_of(model, self.trunk), bare(model)
        pairs = fitting_pairs(self.pairs, exits)
        self.decoder.train(model.training)
        seen, heard = self.hidden(batch, training=model.training)
        streams, entry = _encoded(model, {**batch, "input_ids": seen.input_ids}, exits, {n for n, _ in pairs})
        embedded = _embedded(model, {**batch, "input_ids": heard.input_ids}, exits)
        head = Head(root, exits)
        missed, asked = seen.labels != IGNORE, heard.labels != IGNORE
        losses: Losses = {}
        total: list[Tensor] = []
        for n, d in pairs:
            stream = exits.normed(root, streams[n], batch.get("attention_mask"))
            mlm = _cross_entropy(head.logits(stream[missed], d), seen.labels[missed])
            sentence = head.transform(stream[:, 0], d)
            restored = self._decoded(torch.cat([sentence[:, None].to(embedded.dtype), embedded[:, 1:]], 1), entry)
            restored = exits.normed(root, exits.tokens(restored), batch.get("attention_mask"))
            mae = _cross_entropy(head.logits(restored[asked], exits.width), heard.labels[asked])
            losses |= {f"mlm/{n}x{d}": mlm.detach(), f"mae/{n}x{d}": mae.detach()}
            total.append((mlm + mae) / 2)
        if model.training:
            self.steps += 1
        return {"loss": torch.stack(total).mean(), "count": missed.sum().float(), **losses}

    def loss(self, outputs: Any, batch: Batch) -> Losses:
        """Refuse: outputs do not show what the term is about.

        Raises:
            LaminaError: always.
        """
        raise LaminaError("matryoshka_autoencoding needs the model: call the objective, not its loss()")

    def hidden(self, batch: Batch, *, training: bool = True) -> tuple[Hidden, Hidden]:
        """Return the text as the encoder sees it, and as the decoder does: at least the same words hidden."""
        ids = target(batch, "input_ids", "matryoshka_autoencoding")
        mask = batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        step = int(self.steps) if training else 0
        order, action, other = (draws(ids, real, self.seed, 3 * step + i) for i in range(3))
        special, continues = self.get_buffer("special"), self.get_buffer("continues")
        maskable = real & ~special[ids]
        # The first token stands for the sentence; it is replaced in the decoder.
        maskable[:, 0] = False
        ends, first = word_order(ids, maskable, continues[ids], order)
        options = {"mask_token": self.mask_token, "vocabulary": self.vocabulary}
        shares = ((self.encoder_mask, action), (self.decoder_mask, other))
        one, two = (hide(ids, share, ends, first, maskable, drawn=drawn, **options) for share, drawn in shares)
        return one, two

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield those of the decoder layer."""
        return self.decoder.parameters()

    def _decoded(self, embedded: Tensor, entry: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """Run the decoder layer as the encoder's first block was called, on another input of the same text."""
        args, kwargs = entry
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                output = self.decoder(*args[:i], embedded, *args[i + 1 :], **kwargs)
                break
        else:
            name = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            output = self.decoder(*args, **{**kwargs, name: embedded})
        found = probe.first_tensor(output)
        assert found is not None
        return found


class Head:
    """The head of a masked language model, on the first numbers of the stream only."""

    def __init__(self, model: nn.Module, exits: Exits) -> None:
        self.width = exits.width
        path, vocabulary = find_head(model, exits)
        self.module = get(model, path)
        self.vocabulary = vocabulary.removeprefix(path).lstrip(".")
        """Path, in the head, of the layer that gives the logits."""
        dense = [(n, m) for n, m in self.module.named_modules() if getattr(m, "in_features", None) == self.width]
        self.name: str = dense[0][0] if dense else ""
        self.first: nn.Module = dense[0][1] if dense else self.module

    def logits(self, x: Tensor, width: int) -> Tensor:
        """Return the logits of vectors (..., C), of which the first `width` numbers count: (..., vocabulary).

        The same as with zeros behind them, at the cost of these columns of the first dense layer alone.
        """
        if width == self.width or type(self.first) is not nn.Linear:
            whole = x if width == self.width else F.pad(x[..., :width], (0, self.width - width))
            logits: Tensor = self.module(whole)
            return logits
        name = f"{self.name}.weight".lstrip(".")
        columns = {name: self.first.weight[:, :width]}
        cut: Tensor = functional_call(self.module, columns, (x[..., :width],))
        return cut

    def transform(self, x: Tensor, width: int) -> Tensor:
        """Return what the layer of the vocabulary is given for the first `width` numbers: (..., C) -> (..., C)."""
        if not self.vocabulary:
            return F.pad(x[..., :width], (0, self.width - width))
        with probe.capture(self.module, inputs=[self.vocabulary], detach=False) as seen:
            self.logits(x, width)
        return seen.input(self.vocabulary)


def find_head(model: nn.Module, exits: Exits) -> tuple[str, str]:
    """Return the path of the whole head over the vocabulary, and of its last projection.

    Raises:
        AnatomyError: there is none.
    """
    last = dissect(model).head
    if last is None:
        raise AnatomyError(
            f"{type(model).__name__} has no head over a vocabulary: pre-train it with one (task masked_lm), and take "
            "the trunk on"
        )
    path = last
    while (above := path.rpartition(".")[0]) and not exits.blocks[0].startswith(f"{above}."):
        path = above
    return path, last


def continuing_tokens(tokenizer: Any) -> list[int]:
    """List the ids that go on with a word: "##..." of a BERT tokenizer, what lacks the word mark in others."""
    words = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    marks = [m for m in ("Ġ", "▁") if any(w.startswith(m) for w in words)]
    if marks:
        return sorted(i for w, i in words.items() if not w.startswith(tuple(marks)) and i not in special)
    return sorted(i for w, i in words.items() if w.startswith("##"))


def _encoded(
    model: nn.Module, batch: Batch, exits: Exits, layers: set[int]
) -> tuple[dict[int, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run the encoder once: the stream after the wanted blocks, and how the first block was called."""
    streams: dict[int, Tensor] = {}
    entries: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    count = 0

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal count
        count += 1
        found = probe.first_tensor(output)
        if count in layers and found is not None:
            streams[count] = exits.tokens(found)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entries.append((args, kwargs))

    with probe.observe(model, dict.fromkeys(exits.blocks, note), before={exits.blocks[0]: enter}):
        call(model, batch, use_cache=False)
    return streams, entries[0]


def _embedded(model: nn.Module, batch: Batch, exits: Exits) -> Tensor:
    """Return what the first block would be given for this text; the rest of the model does not run."""
    seen = probe.run_captured(model, batch, inputs=[exits.blocks[0]], stop=True, detach=False)
    return exits.tokens(seen.input(exits.blocks[0]))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean in float32; 0 where nothing was asked."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(len(labels), 1)
