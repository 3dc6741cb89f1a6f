"""Device, data type, versions, hardware and code revision of this process."""

import importlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lensbench import __version__
from lensbench.errors import LensbenchError


def choose_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the first GPU if there is one."""
    if name == "auto":
        # Of several processes each has its own current one.
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LensbenchError(f"unknown device {name!r}; give cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise LensbenchError(f"device {name!r} is not supported: lenses need float64; give cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise LensbenchError(f"there is no device {name!r} here: torch sees {torch.cuda.device_count()} GPUs; give cpu")
    return device


def dtype_named(name: str) -> torch.dtype:
    """float32, bfloat16 or float16."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise LensbenchError(f"unknown dtype {name!r}; give {', '.join(known)}")
    return known[name]


def needs(extra: str, package: str) -> None:
    """Raise :class:`LensbenchError` where ``package`` is missing, which the extra ``extra`` of lensbench installs."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        install = f"python -m pip install -e '.[{extra}]' in the clone of lensbench"
        raise LensbenchError(f"{package} is missing: {install}") from error


def versions() -> dict[str, str]:
    """Versions of lensbench, Python and the packages that numbers depend on."""
    packages = ("torch", "transformers", "tuned-lens", "tokenizers", "numpy", "pandas", "scipy", "safetensors")
    return {"lensbench": __version__, "python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def hardware(device: torch.device) -> dict[str, Any]:
    """Machine, system, processor and threads of this process, and its GPU where it computes on one."""
    described = {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return {**described, "device": device.type}


def processor() -> str:
    """The processor's model name, as the system gives it; ``unknown`` where it does not."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(errors="replace").splitlines() if facts.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown"


def git_revision() -> str | None:
    """Of the checkout that this file lies in, marked where it was changed; None for an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git on this machine: the lensbench version stands alone
