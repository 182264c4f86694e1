"""Where a number comes from: commit, versions, processor, load.

-> JSON values that every result file holds
"""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from flashformer import __version__


def provenance() -> dict[str, Any]:
    """Commit, date, command line, versions and the system, as far as they can be known."""
    return {
        "flashformer": __version__,
        "git": git_state(Path(__file__).parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["flashformer", *sys.argv[1:]],
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def system() -> dict[str, Any]:
    """The machine outside the plan: processor, memory, load."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def cpu_name() -> str:
    """The processor's name as the system knows it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the working tree that holds `folder`; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit or _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
