"""Evidence files: what an experiment measured, where, with which code; and whether that code is still the same."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.errors import LaminaError
from lamina.experiments.bars import parse_bar
from lamina.experiments.harness import Experiment, Measurement, Verdict, figures, verdict

FORMAT = 1
HARNESS = "lamina.experiments.harness"
MACHINERY = {
    HARNESS,
    *(f"lamina.experiments.{name}" for name in ("bars", "evidence", "methods", "picture", "reproduce")),
}
"""What judges; it counts as code behind an experiment only where that imports more of it than the harness."""
PAGE = {"PARTS", "TESTS"}
"""Constants of an experiment's module that only its page shows."""
PACKAGES = ("torch", "numpy", "transformers", "scikit-learn", "safetensors")


@dataclass(frozen=True)
class Evidence:
    """One evidence file, read."""

    path: Path
    content: Mapping[str, Any]

    @property
    def measurements(self) -> list[Measurement]:
        """The measurements, one a seed."""
        return [
            Measurement(m["ours"], m["baseline"], m["paper"], m["unit"], m["extra"])
            for m in self.content["measurements"]
        ]


def folder() -> Path:
    """Return where evidence lives: the source tree's `evidence/`, else the installed package's."""
    package = Path(lamina.__file__).parent
    source = package.parent.parent / "evidence"
    return source if source.is_dir() else package / "evidence"


def write(
    experiment: Experiment,
    measurements: Sequence[Measurement],
    seconds: float,
    into: Path,
    data: Mapping[str, Path] | None = None,
) -> Path:
    """Write the evidence of one finished run, aside and renamed; return its path.

    Args:
        data: the files of named data sets that it read, by their name below the data folder.
    """
    judged = verdict(measurements, experiment.bar)
    content: dict[str, Any] = {
        "format": FORMAT,
        "slug": experiment.slug,
        "source": experiment.source,
        "bar": experiment.bar.text,
        "seeds": list(experiment.seeds),
        "status": judged.status,
        "reason": judged.reason,
        "intervals": [list(i) for i in judged.intervals],
        "measurements": [_plain(m) for m in measurements],
        "seconds": round(seconds, 1),
        "code": code_hashes(experiment),
        "data": {name: checksum(path) for name, path in sorted((data or {}).items())},
        "environment": environment(),
    }
    content["digest"] = digest(content)
    into.mkdir(parents=True, exist_ok=True)
    path = into / f"{experiment.slug}.json"
    aside = path.with_suffix(".json.part")
    aside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def read(slug: str, where: Path | None = None) -> Evidence | None:
    """Read a method's evidence; None where there is none.

    Raises:
        LaminaError: the file is not what `lamina reproduce` wrote.
    """
    path = (where or folder()) / f"{slug}.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored = content.pop("digest")
    except (ValueError, KeyError) as error:
        raise LaminaError(f"{path} is not an evidence file: {error}") from error
    if digest(content) != stored:
        raise LaminaError(f"{path} was edited after the run: field 'digest' does not match")
    if content["slug"] != slug:
        raise LaminaError(f"{path} is the evidence of another experiment: field 'slug' says {content['slug']!r}")
    return Evidence(path, content)


def status(experiment: Experiment, where: Path | None = None) -> str:
    """Return `reproduced`, `direction only`, `not reproduced`, `stale`, or `-` (no evidence, or no verdict)."""
    evidence = read(experiment.slug, where)
    if evidence is None:
        return "-"
    if stale(experiment, evidence):
        return "stale"
    return judge(evidence).status or "-"


def judge(evidence: Evidence) -> Verdict:
    """Compute the verdict anew from the stored measurements and the bar of the run (another bar today: stale)."""
    return verdict(evidence.measurements, parse_bar(evidence.content["bar"]))


def stale(experiment: Experiment, evidence: Evidence) -> list[str]:
    """List what changed since the run: modules behind the experiment, its bar, its data; empty = nothing.

    Data that this machine does not have is not held against the evidence.
    """
    now, then = code_hashes(experiment), evidence.content["code"]
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if experiment.bar.text != evidence.content["bar"]:
        changed.append("bar")
    root = os.environ.get("LAMINA_DATA")
    for name, stored in evidence.content.get("data", {}).items() if root else ():
        path = Path(root or "", name)
        if path.is_file() and checksum(path) != stored:
            changed.append(f"data {name}")
    return changed


def code_hashes(experiment: Experiment) -> dict[str, str]:
    """Hash the experiment's module and every `lamina` module it imports, directly or not.

    Packages (`__init__`) only re-export, so a name imported from one counts for the module that defines it:
    another method's change does not make this evidence stale. Comments, docstrings and what only the method's page
    shows do not count, nor does the harness that an experiment is declared with: verdicts are computed anew.
    """
    found: dict[str, str] = {}
    todo = [experiment.run.__module__]
    while todo:
        module = todo.pop()
        path = None if module in found else _source(module)
        if path is None or path.name == "__init__.py":
            continue
        found[module], imported = _digested(path.read_text(encoding="utf-8"))
        todo += [n for n in imported if (n in MACHINERY if module in MACHINERY else n != HARNESS)]
    return dict(sorted(found.items()))


@cache
def _digested(source: str) -> tuple[str, list[str]]:
    """Return a module's hash and what it imports; kept, since experiments have most of their modules in common."""
    tree = ast.parse(source)
    code = repr(_shape(_without_docstrings(tree)))
    return hashlib.sha256(code.encode()).hexdigest()[:16], _imports(tree)


def environment() -> dict[str, Any]:
    """Return commit, versions and hardware."""
    return {
        "commit": _commit(),
        "lamina": lamina.__version__,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an evidence file's content without its own digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(measurement: Measurement) -> dict[str, Any]:
    plain = asdict(measurement)
    return {**plain, "ours": figures(measurement.ours), "baseline": figures(measurement.baseline)}


def _imports(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names if a.name.startswith("lamina")]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lamina") and not node.level:
            names += [_defining(node.module, a.name) for a in node.names]
    return names


@cache
def _defining(module: str, name: str) -> str:
    """Return the module in which `name`, importable from `module`, is written."""
    if _source(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    value = getattr(importlib.import_module(module), name, None)
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) and home.startswith("lamina") else module


@cache
def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _shape(node: Any) -> Any:
    """Return a syntax tree as nested lists: unlike its source or dump, the same under every version of Python."""
    if isinstance(node, ast.JoinedStr):
        # Python 3.12 ends the format of an f-string with an empty constant.
        return ["JoinedStr", [_shape(v) for v in node.values if getattr(v, "value", None) != ""]]
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return [type(node).__name__, *([name, _shape(value)] for name, value in fields)]
    return [_shape(n) for n in node] if isinstance(node, list) else repr(node)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    tree.body = [s for s in tree.body if not (_targets(s) & PAGE)]
    for node in ast.walk(tree):
        body: Iterable[Any] = getattr(node, "body", ())
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [
                s
                for s in body
                if not (
                    isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) and isinstance(s.value.value, str)
                )
            ]
    return tree


def _targets(statement: ast.stmt) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _commit() -> str | None:
    """Return the source tree's commit, with `+` where it has uncommitted changes to code."""
    root = Path(lamina.__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain", "src"], cwd=root, capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
