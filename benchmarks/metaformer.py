"""PoolFormer S12 against transformers' port of it: forward without gradients, 224 pixels.

Run: OMP_NUM_THREADS=1 python -m benchmarks metaformer
"""

from __future__ import annotations

import torch
from transformers import PoolFormerConfig, PoolFormerForImageClassification

from benchmarks.harness import Row, forward, pair, write
from lamina.models import poolformer_s12


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peer = PoolFormerForImageClassification(PoolFormerConfig(num_labels=1000)).eval()
    ours = poolformer_s12().eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    rows: list[Row] = []
    for batch in (1, 2):
        x = torch.randn(batch, 3, 224, 224)
        names = ("poolformer_s12", "transformers PoolFormer")
        what = f"forward, 224 pixels, batch {batch}"
        rows.append(pair(what, forward(ours, x), forward(peer, x), names=names, goal="<= 1.05", rounds=25, warmup=3))
    write("metaformer", rows, ("transformers",))


if __name__ == "__main__":
    main()
