"""Disks of a few kilobytes."""

import contextlib
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def disk(folder: Path, size: str):
    """A file system of its own of so much; the test is skipped where this user may not mount one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
