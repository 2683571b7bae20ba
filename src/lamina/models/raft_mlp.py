"""RaftMLP: a hierarchical all-MLP vision backbone for images of any size, and MLP-Mixer as its baseline.

Source: Tatsunami, Taki, RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality? (2021), arXiv
2108.04384.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from lamina.errors import RecipeError, ShapeError
from lamina.models._raft_mlp_block import enlarged, level_grids, make_level, token_mean
from lamina.nn.patch_embedding import MultiScalePatchEmbed
from lamina.recipe import Node, factory
from lamina.registry import Slot, register

SOURCE = "Tatsunami & Taki 2021, arXiv 2108.04384"


@register("model", "raft_mlp", source=SOURCE)
class RaftMLP(nn.Module):
    """Levels of vertical, horizontal and channel MLPs, each begun by a patch embedding that shrinks the map.

    pixel_values (B, channels, H, W) -> logits (B, classes), the last level's features (B, C) where classes is 0, or
    the list of all levels' maps with `features_only`. Any H and W: a map that patches do not divide is enlarged to
    the next multiple, and away from `image` the tokens are mixed on that size's grid (both bicubically), so the cost
    of the token mixing is fixed by `image`, and a much larger image loses what is finer than its grid.

    Args:
        widths: channels per level, multiples of rafts.
        depths: blocks per level.
        patches: side of the patches that begin each level.
        rafts: channels that a token MLP sees together; 1 = each channel alone. Not read with token_mixing="mixer".
        kernels: per level, the windows of the multi-scale embedding (see `MultiScalePatchEmbed`); None = once and
            twice the patch, at the last level the patch alone (the published ones). Only with "multi_scale".
        image: (H, W) or side of the images it is trained on, in pixels.
        token_mixing: "raft", or "mixer" (one MLP over all tokens, as MLP-Mixer).
        embedding: "multi_scale", or "patch" (the patch alone).
        token_expansion: hidden numbers of a token MLP for each of its inputs. channel_expansion: of a channel MLP.
        shortcut: let the levels before the last scale and shift the features too.
        drop_path: share of images that skip an MLP, in training, the same for all blocks; 0..1 (1 excluded).
        dropout: after each linear layer of the MLPs, in training.
        resize: False = refuse any other size than `image`, as MLP-Mixer does, instead of interpolating.
        linear: the layers of the channel MLPs, built as linear(in, out, bias=).
        head: built as head(widths[-1], classes).
    Raises:
        RecipeError: lists of other lengths than widths, kernels without "multi_scale", a shortcut without a head, an
            unknown token_mixing or embedding.
        ShapeError: sizes below 1, rafts that do not divide a width, kernels that do not fit their patch; at the call,
            no images of these channels, or (with resize=False) another size.
    Warns:
        UserWarning: at the call, a map less than a quarter of the trained grid along an axis.
    Example:
        >>> RaftMLP((8, 16), (1, 1), patches=(2, 2), image=16, classes=5)(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        *,
        patches: Sequence[int] = (4, 2, 2, 2),
        rafts: int = 2,
        kernels: Sequence[Sequence[int]] | None = None,
        image: int | tuple[int, int] = 224,
        classes: int = 1000,
        channels: int = 3,
        token_mixing: Literal["raft", "mixer"] = "raft",
        embedding: Literal["multi_scale", "patch"] = "multi_scale",
        token_expansion: int = 2,
        channel_expansion: int = 4,
        shortcut: bool = False,
        drop_path: float = 0.1,
        dropout: float = 0.0,
        features_only: bool = False,
        resize: bool = True,
        linear: Annotated[Node, Slot("layer")] = "linear",
        head: Annotated[Node, Slot("layer")] = "linear",
    ) -> None:
        super().__init__()
        if shortcut and features_only:
            raise RecipeError("features_only leaves the head out, so shortcut would change nothing")
        if classes < 0 or channels < 1:
            raise ShapeError(f"classes must not be negative and channels at least 1, got {classes} and {channels}")
        windows = _windows(embedding, patches, kernels)
        _check(widths, depths=depths, patches=patches, kernels=windows)
        grids = level_grids(image, patches)
        mixing = _token_mixing(token_mixing, rafts, {"expansion": token_expansion, "dropout": dropout})
        options: dict[str, Any] = {"expansion": channel_expansion, "drop_path": drop_path, "dropout": dropout}
        options |= {"linear": linear, "resize": resize}
        self.channels, self.features_only, self.resize = channels, features_only, resize
        self.patches = tuple(patches)
        self.embeds = nn.ModuleList(
            MultiScalePatchEmbed(before, width, window, patch)
            for before, width, window, patch in zip((channels, *widths[:-1]), widths, windows, patches, strict=True)
        )
        self.levels = nn.ModuleList(
            make_level(width, depth, grid, mixing, **options)
            for width, depth, grid in zip(widths, depths, grids, strict=True)
        )
        read = () if features_only else widths if shortcut else widths[-1:]
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in read)
        self.shortcuts = nn.ModuleList(nn.Linear(w, 2 * widths[-1]) for w in read[:-1])
        plain = features_only or not classes
        self.head: nn.Module = nn.Identity() if plain else factory("layer", head)(widths[-1], classes)

    def forward(self, pixel_values: Tensor) -> Tensor | list[Tensor]:
        """Return logits, features, or the maps of all levels."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.channels or 0 in pixel_values.shape[2:]:
            raise ShapeError(f"RaftMLP takes images (B, {self.channels}, H, W), got {tuple(pixel_values.shape)}")
        x, maps = pixel_values, []
        for patch, embed, level in zip(self.patches, self.embeds, self.levels, strict=True):
            x = embed(enlarged(x, patch) if self.resize else x)
            x = level(x.movedim(1, -1)).movedim(-1, 1)
            maps.append(x)
        if self.features_only:
            return maps
        answer: Tensor = self.head(self._features(maps))
        return answer

    def _features(self, maps: list[Tensor]) -> Tensor:
        """Average the last level; from there backward, each level before scales and shifts the average."""
        *earlier, last = maps[-len(self.norms) :]
        features = token_mean(last, self.norms[-1])
        for x, norm, shortcut in zip(
            reversed(earlier), reversed(self.norms[:-1]), reversed(self.shortcuts), strict=True
        ):
            scale, shift = shortcut(token_mean(x, norm)).chunk(2, dim=1)
            features = scale * features + shift
        return features


def load_raft_mlp(state: dict[str, Tensor], model: RaftMLP) -> None:
    """Load the weights that okojoalg/raft-mlp saved for a network of the same sizes.

    Args:
        state: the official model's state dict; embeddings of both kinds, shortcut or not.
        model: changed in place.
    Raises:
        RuntimeError: by torch, names the tensors that are missing, left over or of another shape.
    """
    from lamina.models._raft_mlp_official import renamed

    model.load_state_dict(renamed(state, model))


def _windows(
    embedding: str, patches: Sequence[int], kernels: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[int]]:
    """Return the kernels of every level's embedding."""
    if embedding not in ("multi_scale", "patch"):
        raise RecipeError(f"embedding must be 'multi_scale' or 'patch', got {embedding!r}")
    if embedding == "patch":
        if kernels is not None:
            raise RecipeError("kernels are of the multi-scale embedding; embedding='patch' has the patch alone")
        return [(p,) for p in patches]
    return [*((p, 2 * p) for p in patches[:-1]), *((p,) for p in patches[-1:])] if kernels is None else kernels


def _check(widths: Sequence[int], **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != len(widths):
            raise RecipeError(f"{name} has {len(values)} entries for {len(widths)} levels (widths={list(widths)})")
    if not widths or min(*widths, *lists["depths"], *lists["patches"]) < 1:
        sizes = ", ".join(f"{n} {list(v)}" for n, v in (("widths", widths), *list(lists.items())[:2]))
        raise ShapeError(f"widths, depths and patches must be at least 1, got {sizes}")


def _token_mixing(kind: str, rafts: int, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """Return what builds a level's token mixing, as mixing(width=, grid=, drop_path=)."""
    if kind not in ("raft", "mixer"):
        raise RecipeError(f"token_mixing must be 'raft' or 'mixer', got {kind!r}")
    chosen = {"rafts": rafts} if kind == "raft" else {}
    return factory("mixer", {"name": f"{kind}_token_mixing", **chosen, **options})


Sized = Callable[..., RaftMLP]


def _size(name: str, widths: tuple[int, ...]) -> Sized:
    """Register a published size of four levels; its docstring says what is in it."""

    def build(
        classes: int = 1000,
        image: int | tuple[int, int] = 224,
        *,
        channels: int = 3,
        embedding: Literal["multi_scale", "patch"] = "multi_scale",
        drop_path: float = 0.1,
        dropout: float = 0.0,
        features_only: bool = False,
    ) -> RaftMLP:
        options: dict[str, Any] = {"embedding": embedding, "drop_path": drop_path, "dropout": dropout}
        return RaftMLP(widths, classes=classes, image=image, channels=channels, features_only=features_only, **options)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"RaftMLP with widths {widths}, depths (2, 2, 6, 2), patches of 4, 2, 2, 2 and rafts of 2."
    return register("model", name, source=f"{SOURCE}, table 1")(build)


raft_mlp_s = _size("raft_mlp_s", (64, 128, 256, 512))
raft_mlp_m = _size("raft_mlp_m", (96, 192, 384, 768))
raft_mlp_l = _size("raft_mlp_l", (128, 192, 512, 1024))


@register("model", "mixer_b16_e2", source="Tolstikhin et al. 2021, arXiv 2105.01601, table 1")
def mixer_b16_e2(
    classes: int = 1000,
    image: int | tuple[int, int] = 224,
    *,
    channels: int = 3,
    drop_path: float = 0.1,
    dropout: float = 0.0,
    resize: bool = True,
) -> RaftMLP:
    """MLP-Mixer B/16 with a token expansion of 2: RaftMLP's baseline; 12 blocks of width 768, patches of 16."""
    options: dict[str, Any] = {"drop_path": drop_path, "dropout": dropout, "resize": resize, "embedding": "patch"}
    sizes: dict[str, Any] = {"patches": (16,), "image": image, "classes": classes, "channels": channels}
    return RaftMLP((768,), (12,), token_mixing="mixer", **sizes, **options)
