"""What `import lamina` adds to `import torch`, and how long `lamina --help` takes: fresh processes, in turn.

Every process is timed as a whole, from its start to its end; what an import adds is the median of the differences
from `import torch` in the same round. Run: python -m benchmarks imports (ROUNDS=5: quicker).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from benchmarks.harness import Row, write

BASE = "import torch"
COMMANDS: dict[str, list[str]] = {
    BASE: ["-c", "import torch"],
    "import lamina": ["-c", "import torch, lamina"],
    "import lamina.rewrite": ["-c", "import torch, lamina.rewrite"],
    "import lamina.train": ["-c", "import torch, lamina.train"],
    "from lamina.train import Trainer": ["-c", "import torch; from lamina.train import Trainer"],
    "bare python": ["-c", "pass"],
    "lamina --help": ["-m", "lamina", "--help"],
}
ADDED = "<= 0.2 s added"
"""Goal of `import lamina`; the packages below it are there to be compared."""
GOALS = {"import lamina": ADDED, "lamina --help": "<= 0.5 s in all"}


def seconds(arguments: list[str]) -> float:
    """Time one fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, list[float]]:
    """Run every command once a round, in changing order; the first round fills the caches and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    names = list(COMMANDS)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(seconds(COMMANDS[name]))
    return {name: found[1:] for name, found in taken.items()}


def row(name: str, peer: str, taken: dict[str, list[float]]) -> Row:
    """Compare one command with another, round by round."""
    a, b = taken[name], taken[peer]
    low, _, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    added = statistics.median(x - y for x, y in zip(a, b, strict=True))
    middle = statistics.median(a), statistics.median(b)
    goal = GOALS.get(name, "none")
    print(f"{name}: {middle[0]:.2f} s, {added:+.3f} s beside {peer}  (goal {goal})", flush=True)
    milliseconds = middle[0] * 1e3, middle[1] * 1e3
    return Row("fresh process", name, peer, middle[0] / middle[1], (low, high), goal, milliseconds, added)


def main() -> None:
    taken = measure(int(os.environ.get("ROUNDS", "11")))
    imports = [name for name in COMMANDS if name.startswith(("import lamina", "from lamina"))]
    write("imports", [*(row(n, BASE, taken) for n in imports), row("lamina --help", "bare python", taken)])


if __name__ == "__main__":
    main()
