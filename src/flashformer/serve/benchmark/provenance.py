"""Where a number comes from: commit, sources, versions, processor, load.

-> JSON values that every result file holds
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashformer import __version__
from flashformer.errors import UsageError

COMMIT_VARIABLE = "FLASHFORMER_COMMIT"
COMMIT_HELP = (
    f"The commit of this tree, for the result file; for copies without a .git. [{COMMIT_VARIABLE}]"
)
PACKAGE = Path(__file__).parents[2]
LIBRARIES = ("numpy", "torch", "transformers", "cuda-bindings", "nvidia-cuda-nvrtc")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Commit, date, command line, versions and the system, as far as they can be known.

    `commit` (default: the environment's FLASHFORMER_COMMIT) is what somebody says that this tree
    is, where no .git can tell. `tree` is what git calls the package's folder, computed from the
    files that ran: `git rev-parse COMMIT:src/flashformer` gives the same for the true commit.
    """
    return {
        "flashformer": __version__,
        "git": git_state(PACKAGE, commit or os.environ.get(COMMIT_VARIABLE)),
        "tree": tree_id(PACKAGE),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _command() -> list[str]:
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and script.name != "__main__.py"
    return ["python", *sys.argv] if is_script else ["flashformer", *sys.argv[1:]]


def _versions() -> dict[str, str]:
    """Of the libraries that matter for a speed, where they are installed."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in LIBRARIES if name in installed}


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


def git_state(folder: Path, given: str | None = None) -> dict[str, Any] | None:
    """Commit and dirty flag of the working tree that holds `folder`; None outside of one.

    A `given` commit counts instead, and is marked as such. Raises `UsageError` if it is no commit.
    """
    if given is not None:
        if not _COMMIT.fullmatch(given):
            raise UsageError(
                f"--commit and {COMMIT_VARIABLE} take 7 to 40 hexadecimal digits of a commit, not "
                f"{given!r}; `git rev-parse HEAD` prints them"
            )
        return {"commit": given, "given": True}
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit or _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def tree_id(folder: Path) -> str:
    """Git's id of a folder with the files that it holds now, but those that git ignores here."""
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__" or path.suffix == ".pyc":
            continue
        mode, found = (
            (b"40000", tree_id(path))
            if path.is_dir()
            else (b"100644", _object_id(b"blob", path.read_bytes()))
        )
        name = path.name.encode()
        order = name + b"/" if path.is_dir() else name
        entries.append((order, mode + b" " + name + b"\0" + bytes.fromhex(found)))
    return _object_id(b"tree", b"".join(entry for _, entry in sorted(entries)))


def _object_id(kind: bytes, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind, len(content)) + content).hexdigest()


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
