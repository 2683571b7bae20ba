"""Run all benchmarks, or those named: `python -m benchmarks lamb layer_norm`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NOT_BENCHMARKS = {"__init__", "__main__", "harness"}


def main(names: list[str]) -> None:
    known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_BENCHMARKS)
    unknown = [n for n in names if n not in known]
    if unknown:
        sys.exit(f"no benchmark is called {unknown[0]!r}; known: {', '.join(known)}")
    for name in names or known:
        print(f"== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main(sys.argv[1:])
