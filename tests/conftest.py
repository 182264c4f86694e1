"""Fixtures that several test files share: tiny checkpoints, made once in a session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoints import make_checkpoint

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
