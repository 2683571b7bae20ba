"""Well-known real data sets by name: from a folder, else from the Hugging Face hub, else an error that says how."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lamina.data._arrays import Array, idx, npz
from lamina.data._at_hand import from_hub, places
from lamina.data._files import read
from lamina.data._tables import read_columns, read_rows
from lamina.data._tokenize import Tokenizer
from lamina.data.digit_images import digit_images
from lamina.data.examples import Data, split_rows
from lamina.data.images import Images, decoded
from lamina.data.sentence_pairs import SentencePairs, sentence_pairs
from lamina.data.sentences import from_texts
from lamina.data.series import from_values, numbers
from lamina.data.tabular import from_arrays
from lamina.data.text import text
from lamina.data.tokens import from_tokens
from lamina.errors import LaminaError
from lamina.registry import register


@register("data", source="LeCun and Cortes, the MNIST database")
def mnist(batch: int = 128, *, limit: int | None = None, folder: str | None = None) -> Data:
    """Handwritten digits, 60,000 + 10,000 grey images of 28 x 28 in 10 classes; evaluation is the test set.

    Args:
        batch: global batch size.
        limit: training images used, from the first; None = all.
        folder: with `mnist/train-images-idx3-ubyte.gz` and so on; default: what LAMINA_DATA names, else the hub.
    Raises:
        LaminaError: the set is not at hand.
    """
    files = [f"mnist/{p}-{k}-ubyte.gz" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]
    found = places("mnist", files, folder, hub="ylecun/mnist")
    if found:
        arrays = [idx(path) for path in found]
    else:
        arrays = _hub_images(from_hub("mnist", files, "ylecun/mnist"), "image")
    return _images("mnist", arrays, batch, limit, 0.1307, 0.3081)


@register("data", source="Krizhevsky, Learning multiple layers of features from tiny images (2009)")
def cifar10(batch: int = 128, *, limit: int | None = None, folder: str | None = None) -> Data:
    """Colour images of 32 x 32 in 10 classes; evaluation is the test set.

    Below a folder it is the subset of JPEG files (20,000 + 3,000, lossy), from the hub the complete set: accuracies of
    the two do not compare.

    Args:
        batch: global batch size.
        limit: training images used, from the first; None = all.
        folder: with `cifar10/train_jpeg_20k.npz` and `cifar10/test_jpeg_3k.npz`; default as in `mnist`.
    Raises:
        LaminaError: the set is not at hand.
    """
    files = ["cifar10/train_jpeg_20k.npz", "cifar10/test_jpeg_3k.npz"]
    found = places("cifar10", files, folder, hub="uoft-cs/cifar10")
    if found:
        arrays = [array for path in found for array in _jpegs(path)]
    else:
        arrays = _hub_images(from_hub("cifar10", files, "uoft-cs/cifar10"), "img")
    return _images("cifar10", arrays, batch, limit, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@register("data", source="scikit-learn")
def digits(batch: int = 64, *, split: float = 0.2, seed: int = 0) -> Data:
    """Handwritten digits, 1,797 grey images of 8 x 8 in 10 classes, installed with scikit-learn (extra experiments).

    `pixel_values` (B, 1, 8, 8) from 0 to 1. Args as in `images`.
    """
    images, labels = digit_images()
    whole = Images(images.numpy(), labels.numpy(), mean=0.0, std=1.0)
    train, held = split_rows(len(whole), split, seed)
    return Data(whole.select(train), whole.select(held) if split else None, batch, whole.sizes, "digits")


@register("data", source="Karpathy, char-rnn")
def tiny_shakespeare(
    context: int = 256,
    batch: int = 16,
    *,
    unit: Literal["bytes", "characters"] = "characters",
    target: Literal["next", "none"] = "next",
    folder: str | None = None,
) -> Data:
    """A megabyte of Shakespeare, 65 characters; evaluation is the last tenth. Options as in `text`.

    Raises:
        LaminaError: `text/tinyshakespeare.txt` is not below the folder (the hub has no copy that loads as data).
    """
    found = places("tiny_shakespeare", ["text/tinyshakespeare.txt"], folder, hub=None) or []
    made = text(found[0], context, batch, split=0.1, unit=unit, target=target)
    return Data(made.train, made.evaluation, batch, made.sizes, "tiny_shakespeare")


@register("data", source="Merity et al., Pointer sentinel mixture models (2016), arXiv 1609.07843")
def wikitext(
    context: int = 256,
    batch: int = 16,
    *,
    train: Literal["train", "valid", "test"] = "train",
    target: Literal["next", "none"] = "next",
    folder: str | None = None,
) -> Data:
    """WikiText-2 as bytes; evaluation is `valid` (with `train="valid"`: `test`).

    Args:
        context: bytes a block.
        batch: global batch size.
        train: the part to train on; a folder that lacks the large one may have the others.
        target: as in `text`.
        folder: with `text/wikitext-2-train.txt.gz` and so on; default as in `mnist`.
    Raises:
        LaminaError: the set is not at hand.
    """
    names = (train, "test" if train == "valid" else "valid")
    files = [f"text/wikitext-2-{name}.txt.gz" for name in names]
    found = places("wikitext", files, folder, hub="Salesforce/wikitext")
    if found:
        contents = [read(path) for path in found]
    else:
        sets = from_hub("wikitext", files, "Salesforce/wikitext", "wikitext-2-v1")
        contents = ["".join(sets["validation" if n == "valid" else n]["text"]).encode("utf-8") for n in names]
    parts = [
        from_tokens(np.frombuffer(c, dtype=np.uint8), 256, context, 1, target=target, split=0.0, name="wikitext")
        for c in contents
    ]
    return Data(parts[0].train, parts[1].train, batch, parts[0].sizes, "wikitext")


@register("data", source="Socher et al., Recursive deep models (2013); GLUE")
def sst2(
    context: int = 64, batch: int = 32, *, tokenizer: str | Tokenizer | None = None, folder: str | None = None
) -> Data:
    """Sentiment of film reviews, two classes, 67,349 phrases; evaluation is the 872 of dev. Options as in `sentences`.

    Raises:
        LaminaError: neither `glue/SST-2/{train,dev}.tsv.gz` below the folder nor the hub is at hand.
    """
    files = ["glue/SST-2/train.tsv.gz", "glue/SST-2/dev.tsv.gz"]
    found = places("sst2", files, folder, hub="nyu-mll/glue")
    if found:
        tables: list[Any] = [read_columns(path) for path in found]
    else:
        sets = from_hub("sst2", files, "nyu-mll/glue", "sst2")
        tables = [sets["train"], sets["validation"]]
    parts = [(list(t["sentence"]), [int(v) for v in t["label"]]) for t in tables]
    return from_texts(parts[0], parts[1], context, batch, tokenizer=tokenizer, name="sst2")


@register("data", source="Zhang et al., Character-level convolutional networks (2015), arXiv 1509.01626")
def ag_news(
    context: int = 256, batch: int = 32, *, tokenizer: str | Tokenizer | None = None, folder: str | None = None
) -> Data:
    """Topic of news (World, Sports, Business, Sci/Tech); evaluation is the 7,600 of `test`. Options as in `sentences`.

    Below a folder: 9,991 descriptions to train on; from the hub: 120,000 titles with descriptions.

    Raises:
        LaminaError: the set is not at hand.
    """
    files = ["textclass/ag_news_train10k.tsv.gz", "textclass/ag_news_test.csv.gz"]
    found = places("ag_news", files, folder, hub="fancyzhx/ag_news")
    if found:
        columns, rows = read_columns(found[0]), read_rows(found[1])
        train = columns["text"], [int(v) - 1 for v in columns["label"]]
        test = [row[2] for row in rows], [int(row[0]) - 1 for row in rows]
    else:
        sets = from_hub("ag_news", files, "fancyzhx/ag_news")
        train, test = ((list(sets[n]["text"]), list(sets[n]["label"])) for n in ("train", "test"))
    return from_texts(train, test, context, batch, tokenizer=tokenizer, name="ag_news")


def sts_b(part: Literal["train", "dev", "test"] = "dev", *, folder: str | None = None) -> SentencePairs:
    """Sentence pairs with a similarity of 0..5: 5,749 / 1,500 / 1,379 (Cer et al. 2017, arXiv 1708.00055).

    Raises:
        LaminaError: the set is not at hand (the hub has no scores for `test`).
    """
    files = [f"glue/STS-B/{'test_labelled' if part == 'test' else part}.tsv.gz"]
    found = places("sts_b", files, folder, hub=None if part == "test" else "nyu-mll/glue")
    if found:
        return sentence_pairs(found[0])
    rows = from_hub("sts_b", files, "nyu-mll/glue", "stsb")["validation" if part == "dev" else part]
    return SentencePairs(list(rows["sentence1"]), list(rows["sentence2"]), torch.tensor(list(rows["label"])))


@register("data", source="Zhou et al., Informer (2021), arXiv 2012.07436")
def etth1(
    context: int = 96,
    horizon: int = 96,
    batch: int = 32,
    *,
    evaluation: Literal["valid", "test"] = "valid",
    folder: str | None = None,
) -> Data:
    """Hourly load and oil temperature of a transformer, 7 channels; 12 / 4 / 4 months of training / valid / test.

    Standardised by the 12 months of training. Options as in `series`.

    Raises:
        LaminaError: `timeseries/ETTh1.csv.gz` is not below the folder.
    """
    found = places("etth1", ["timeseries/ETTh1.csv.gz"], folder, hub=None) or []
    table = read_columns(found[0])
    values = numbers({n: v for n, v in table.items() if n != "date"}, found[0])
    month = 30 * 24
    if len(values) < 20 * month:
        raise LaminaError(f"{str(found[0])!r} has {len(values)} rows, expected at least {20 * month}")
    start = 12 * month if evaluation == "valid" else 16 * month
    return from_values(
        values, context, horizon, batch, train=12 * month, evaluation=(start, start + 4 * month), name="etth1"
    )


@register("data", source="UCI machine learning repository; splits of Gal and Ghahramani (2016), arXiv 1506.02142")
def uci(
    table: Literal["concrete", "energy", "kin8nm", "power-plant", "wine-quality-red"] = "concrete",
    batch: int = 32,
    *,
    fold: int = 0,
    folder: str | None = None,
) -> Data:
    """Small regression tables with 20 standard splits; the target keeps its unit.

    Args:
        table: which.
        batch: global batch size.
        fold: the split, 0..19: evaluation is its test part.
        folder: with `uci/concrete.npz` and so on; default: what LAMINA_DATA names.
    Raises:
        LaminaError: the table is not below the folder, or the fold is none of its.
    """
    found = places("uci", [f"uci/{table}.npz"], folder, hub=None) or []
    features, labels, folds = npz(found[0], ["X", "y", "test_idx"])
    if not 0 <= fold < len(folds):
        raise LaminaError(f"{table} has folds 0..{len(folds) - 1}, got {fold}")
    return from_arrays(features, labels, batch, task="regression", evaluation=folds[fold], name=table)


def _images(name: str, arrays: Sequence[Array], batch: int, limit: int | None, mean: Any, std: Any) -> Data:
    if limit is not None and limit < 1:
        raise LaminaError(f"limit must be at least 1, got {limit}")
    train = Images(arrays[0][:limit], arrays[1][:limit], mean=mean, std=std)
    test = Images(arrays[2], arrays[3], mean=mean, std=std)
    return Data(train, test, batch, {**test.sizes}, name)


def _hub_images(sets: Any, column: str) -> list[Array]:
    return [
        array
        for part in ("train", "test")
        for array in (np.stack([np.asarray(i) for i in sets[part][column]]), np.asarray(sets[part]["label"][:]))
    ]


def _jpegs(path: Path) -> tuple[Array, Array]:
    """Decode an archive of image files, back to back in `data`, from `offsets[i]` to `offsets[i + 1]`."""
    data, offsets, labels = npz(path, ["data", "offsets", "labels"])
    starts, content = offsets.tolist(), data.tobytes()
    if starts[0] != 0 or starts[-1] != len(content) or len(starts) != len(labels) + 1:
        raise LaminaError(
            f"the offsets of {str(path)!r} do not cover its {len(content)} bytes and {len(labels)} labels"
        )
    files = [(f"image {i} of {path.name}", content[a:b]) for i, (a, b) in enumerate(itertools.pairwise(starts))]
    return decoded(files), labels
