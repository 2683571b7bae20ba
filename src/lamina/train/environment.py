"""What a run ran on: `environment.json`."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lamina import __version__
from lamina.train.distributed import World

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "pydantic")


def write_environment(path: Path, world: World) -> None:
    """Write versions and machine as JSON."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    found = {
        "lamina": __version__,
        "python": platform.python_version(),
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "device": str(world.device),
        "gpu": gpu,
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
