"""Reproducibility process: claims with a bar, verdicts that are computed, evidence that goes stale.

**What it is for.** A published figure reaches a reader through many hands. The report's process (paper analysis to
release, with a check at every step) is what every method of Lamina goes through; `lamina reproduce` is the part of it
that a machine can do: run ours and the baseline in one go, judge the figures against a bar that stood in the code
before the run, write down with which code and where, and notice when that no longer holds.

**Smallest use.**

    lamina reproduce lamb            # run, judge, write evidence/lamb.json
    lamina reproduce --check         # recompute every verdict, code hash and digest; trains nothing

**How it works.** An experiment is a function `run(seed, device) -> Measurement` under `@experiment(slug, bar=...)`.
The bar is parsed at import by a small grammar, never evaluated as code. The verdict takes the 95 % bootstrap interval
of the bar's left side over the seeds: all of it over the bar is *reproduced*, only its direction is *direction only*.
The evidence file holds every figure, versions, hardware, the hash of the experiment's module and of every module of
ours behind it, checksums of the named data it read, and a digest over itself.

**What is measured here.** The paper's own claim is qualitative. At our scale: into evidence of a finished run twelve
faults are planted (figures edited, a seed removed, a NaN, the code or the bar changed since, a status promoted, a
file cut short; half of them by a hand careful enough to renew the digest). The baseline is what method cards and
checklists do: read the status somebody wrote. A fault counts as detected when the check names a problem or the
recomputed verdict differs.

**Limits.** A hand that edits figures so that the edited ones meet the bar, and renews the digest, is not found by any
check that trains nothing: one such fault is among the twelve and is missed by both arms; running the experiment again
finds it. The card's other claim (a differential tester that names the faulty layer) needs `verify` and is not
measured here.

**Composes with** every method: their experiments are its input.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lamina.errors import LaminaError
from lamina.experiments import evidence
from lamina.experiments.bars import parse_bar
from lamina.experiments.harness import Experiment, Measurement, experiment
from lamina.experiments.reproduce import check_one

PARTS: tuple[str, ...] = ()
TESTS = ("tests/experiments/test_harness.py",)

Fault = Callable[[dict[str, Any]], None]


@experiment(
    "reproducibility-process",
    source="the process as a whole: its verdicts and its evidence (section numbers unconfirmed)",
    bar="detected(ours) - detected(baseline) >= 5 and false_alarms(ours) <= 0, 3 seeds",
    budget="10s",
)
def run(seed: int, device: torch.device) -> Measurement:
    """Plant every fault into evidence of a run with this seed's figures, and count who notices."""
    generator = torch.Generator().manual_seed(seed)
    detected = {"ours": 0.0, "baseline": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        one = _finished(generator, Path(folder))
        path = Path(folder) / f"{one.slug}.json"
        clean = path.read_text(encoding="utf-8")
        false_alarms = float(len(check_one(one, Path(folder))))
        for fault, renewed in faults():
            path.write_text(_plant(clean, fault, renewed), encoding="utf-8")
            detected["ours"] += _noticed(one, Path(folder))
            detected["baseline"] += _unreadable(path)
    count = float(len(faults()))
    return Measurement(
        {"detected": detected["ours"], "false_alarms": false_alarms},
        {"detected": detected["baseline"], "false_alarms": 0.0},
        paper="qualitative: a process from paper analysis to release, each step with a check",
        unit=f"of {count:.0f} faults",
    )


def faults() -> list[tuple[Fault, bool]]:
    """List the planted faults; True = the digest is renewed after the edit, as a careful hand would."""
    return [
        (lambda c: c["measurements"][0]["ours"].update(value=9.0), False),
        (lambda c: c["measurements"][0]["baseline"].update(value=-9.0), False),
        (lambda c: c.update(seconds=2.0), False),
        (lambda c: c["environment"].update(commit="another"), False),
        (lambda c: c.update(status="reproduced" if c["status"] != "reproduced" else "direction only"), False),
        (lambda c: c.update(slug=None, cut=True), False),
        (lambda c: c["measurements"].pop(), True),
        (lambda c: c["measurements"][1]["ours"].update(value=float("nan")), True),
        (lambda c: c["measurements"][2]["ours"].update(value=-9.0), True),
        (lambda c: c["code"].update({"lamina.errors": "0" * 16}), True),
        (lambda c: c.update(bar="ours - baseline >= 0.01, 3 seeds"), True),
        (_flatter, True),
    ]


def _flatter(content: dict[str, Any]) -> None:
    for measurement in content["measurements"]:
        measurement["ours"]["value"] += 1.0


def _finished(generator: torch.Generator, folder: Path) -> Experiment:
    """Write the evidence of a run that reproduced: three seeds well above a bar of 0.1."""

    def nothing(seed: int, device: torch.device) -> Measurement:
        raise NotImplementedError("its figures are written, not run")

    nothing.__module__ = __name__
    one = Experiment("toy", "-", parse_bar("ours - baseline >= 0.1, 3 seeds"), nothing, (0, 1, 2), "0s")
    noise = torch.rand(3, generator=generator).tolist()
    evidence.write(one, [Measurement(0.5 + 0.1 * n, 0.1 * n) for n in noise], 1.0, folder)
    return one


def _plant(clean: str, fault: Fault, renewed: bool) -> str:
    content = json.loads(clean)
    digest = content.pop("digest")
    fault(content)
    if content.pop("cut", False):
        return clean[: len(clean) // 2]
    return json.dumps({**content, "digest": evidence.digest(content) if renewed else digest})


def _noticed(one: Experiment, folder: Path) -> bool:
    return bool(check_one(one, folder))


def _unreadable(path: Path) -> bool:
    """What the baseline notices: the written status cannot be read, or is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["status"] is None
    except (ValueError, KeyError, LaminaError):
        return True
