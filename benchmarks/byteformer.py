"""ByteFormer against a port of the public implementation with its weights, and batches of like lengths against none.

The port does what apple/corenet does, operation by operation, from its description: bytes embedded one by one, masks of
pairs for every window (which it then does not use), windows copied out, attention with all its weights in memory. Its
weights are made in its own names and layouts and loaded by `load_byteformer`; outputs are compared before anything is
timed. `mask_attention=False` is what it computes; the other rows are the masked network.

Run: OMP_NUM_THREADS=1 python -m benchmarks byteformer
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import forward, pair, training, write
from lamina.data import FileBytes, Loader
from lamina.data.file_bytes import KeptFiles
from lamina.models import ByteFormer, load_byteformer

MERGED = (0, 1, 3, 5, 7, 9)


class ReferenceAttention(nn.Module):
    """Fused projections, scores and weights written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv_proj(x).reshape(rows, tokens, 3, self.heads, -1).transpose(1, 3).contiguous()
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        weights = torch.matmul(query * (width // self.heads) ** -0.5, key.transpose(-1, -2)).float().softmax(-1)
        out = torch.matmul(weights.to(x.dtype), value)
        return self.out_proj(out.transpose(1, 2).reshape(rows, tokens, -1))


class ReferenceLayer(nn.Module):
    """A pre-norm layer that runs on windows, norms and feed-forward too, and makes masks that it does not use."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.pre_norm_mha = nn.Sequential(nn.LayerNorm(width), ReferenceAttention(width, heads), nn.Dropout(0.0))
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.pre_norm_ffn = nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), nn.Dropout(0.0), down, nn.Dropout(0.0))
        self.window, self.shift = window, shift

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        x, mask = filled(x, mask, self.window)
        if self.shift:
            x, mask = x.roll(-self.shift, 1), mask.roll(-self.shift, 1)
        windows = x.reshape(-1, self.window, width)
        pairs = self.pairs(x.shape[1], x.device).expand(rows, -1, -1, -1).flatten(0, 1)
        total = mask.reshape(-1, 1, self.window) + pairs
        total[total.max(-1).values == -torch.inf] = 0
        windows = windows + self.pre_norm_mha(windows)
        windows = windows + self.pre_norm_ffn(windows)
        x = windows.reshape(rows, -1, width)
        return (x.roll(self.shift, 1) if self.shift else x)[:, :tokens]

    def pairs(self, tokens: int, device: torch.device) -> Tensor:
        mask = torch.zeros(tokens // self.window, self.window, self.window, device=device)
        mask[-1] = -torch.inf
        mask[-1, : self.window - self.shift, : self.window - self.shift] = 0
        mask[-1, -self.shift :, -self.shift :] = 0
        return mask


class ReferenceMerging(nn.Module):
    """Both numbers of a channel side by side, a linear layer, a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Linear(2 * width, width, bias=False), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.where((mask == -torch.inf)[..., None], 0.0, x)
        x, mask = filled(x, mask, 2)
        pairs = x.unfold(1, 2, 2).reshape(len(x), x.shape[1] // 2, -1)
        return self.norm(self.reduction(pairs)), mask.unfold(1, 2, 2).max(-1).values


class Reference(nn.Module):
    """The public ByteFormer, tiny as it stands."""

    def __init__(
        self,
        classes: int = 1000,
        width: int = 192,
        heads: int = 3,
        depth: int = 12,
        kernel: int = 16,
        window: int = 128,
        shift: int | None = None,
        max_tokens: int = 10_000,
        merged: tuple[int, ...] = MERGED,
    ) -> None:
        super().__init__()
        shift = window // 2 if shift is None else shift
        self.embeddings = nn.Embedding(257, width, padding_idx=-1)
        self.token_reduction_net = nn.Conv1d(width, width, kernel, kernel // 2, bias=False)
        self.pos_embed = nn.ParameterDict({"table": nn.Parameter(torch.randn(1, 1, max_tokens, width) * width**-0.5)})
        self.transformer = nn.Sequential(*(ReferenceLayer(width, heads, window, shift * (i % 2)) for i in range(depth)))
        self.downsamplers = nn.ModuleDict({f"downsample_{i}": ReferenceMerging(width) for i in merged})
        self.post_transformer_norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)
        self.kernel = kernel

    def forward(self, inputs: Tensor) -> Tensor:
        mask = torch.zeros_like(inputs, dtype=torch.float)
        # The official code marks padding in a copy, so that nothing is marked; and writes into its input.
        x = self.embeddings(torch.where(inputs == -1, 256, inputs))
        x = self.token_reduction_net(x.permute(0, 2, 1)).permute(0, 2, 1)
        mask = mask[..., None].unfold(1, self.kernel, self.kernel // 2).amax((2, 3))
        x = x + self.pos_embed["table"][0][:, : x.shape[1]]
        for i, layer in enumerate(self.transformer):
            x = layer(x, mask)
            if f"downsample_{i}" in self.downsamplers:
                x, mask = self.downsamplers[f"downsample_{i}"](x, mask)
        x = self.post_transformer_norm(x)
        return self.classifier(x.sum(1) / (mask == 0).sum(1, keepdim=True))


def filled(x: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    lacking = -x.shape[1] % size
    return F.pad(x, (0, 0, 0, lacking)), F.pad(mask, (0, lacking), value=-torch.inf)


def passing(data: FileBytes, model: nn.Module, batch: int) -> object:
    """Return what to time: an epoch's forward passes."""
    loader = Loader(data, batch)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(loader.batches_per_epoch):
                model(next(loader)["inputs"])

    return run


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, names = [], ("byteformer", "the public ByteFormer")
    for what, kernel, length in (
        ("a TIFF of 150,668 bytes, k = 32", 32, 150_668),
        ("a WAV of 32,044 bytes, k = 16", 16, 32_044),
    ):
        limit = length // (kernel // 2)
        peer = Reference(kernel=kernel, max_tokens=limit).eval()
        ours = {
            how: ByteFormer(1000, "tiny", kernel=kernel, max_tokens=limit, mask_attention=masked).eval()
            for how, masked in (("as published", False), ("masked", True))
        }
        for model in ours.values():
            load_byteformer(peer.state_dict(), model)
        x = torch.randint(256, (1, length))
        with torch.inference_mode():
            torch.testing.assert_close(ours["as published"](x), peer(x), rtol=1e-3, atol=1e-4)
        for how, model in ours.items():
            row = forward(model, x), forward(peer, x)
            rows.append(pair(f"forward, tiny, {what}, {how}", *row, names=names, goal="<= 1.0", rounds=7, warmup=1))
    for how, model in ours.items():
        row = training(model, x), training(peer, x)
        rows.append(
            pair(f"forward and backward, tiny, {what}, {how}", *row, names=names, goal="<= 1.0", rounds=5, warmup=1)
        )
    what, plain = "forward, tiny, a WAV of 32,044 bytes, k = 16, masked", forward(ours["masked"], x)
    compiled, theirs = forward(torch.compile(ours["masked"], fullgraph=True), x), forward(torch.compile(peer), x)
    both = ("byteformer, compiled", "the public ByteFormer, compiled")
    rows.append(pair(what, compiled, plain, names=(both[0], names[0]), goal="< 1.0", warmup=3))
    rows.append(pair(what, compiled, theirs, names=both, goal="<= 1.0", warmup=3))
    lengths = (torch.rand(256, generator=torch.Generator().manual_seed(0)) * 7000 + 500).long().tolist()
    files = KeptFiles([bytes(torch.randint(256, (n,)).tolist()) for n in lengths])
    sorted_, drawn = (FileBytes(files, torch.zeros(256, dtype=torch.long), pool=pool) for pool in (16, 1))
    model = ByteFormer(10, width=96, heads=3, depth=4, kernel=8, window=32).eval()
    runs = passing(sorted_, model, 16), passing(drawn, model, 16)
    what = "an epoch of 256 files of 500 to 7,500 bytes, batch 16"
    rows.append(pair(what, *runs, names=("pool=16", "pool=1"), goal="< 1.0", rounds=5))  # type: ignore[arg-type]
    write("byteformer", rows)


if __name__ == "__main__":
    main()
