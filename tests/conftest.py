"""Fixtures that several test files share: tiny checkpoints, made once in a session."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from checkpoints import make_checkpoint
from command_line import CommandLine

if TYPE_CHECKING:
    from browsing import Browsing

# Tests never reach the network, and one process does not take every core.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither use nor fill the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHFORMER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("qwen3")` -> folder of that row of checkpoints.VARIANTS; do not write there."""
    made: dict[str, Path] = {}

    def folder_of(variant: str) -> Path:
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            made[variant] = make_checkpoint(folder, variant)
        return made[variant]

    return folder_of


@pytest.fixture
def copied(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint, which a test may change."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> CommandLine:
    """The command line, with a cache of its own."""
    return CommandLine(capsys, monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def _browser() -> "Iterator[Browsing]":
    """A browser and a server, for all tests of a file."""
    from browsing import browsing  # it takes long, and few files need it

    with browsing() as found:
        yield found


@pytest.fixture
def pages(_browser: "Browsing") -> "Iterator[Browsing]":
    """`pages.open()` -> the server's page; nothing may have gone wrong in it, or be left of it."""
    yield _browser
    _browser.close()
