"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data: `$LMWORKS_DATA`, or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("LMWORKS_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no public data in {folder}; set LMWORKS_DATA")
    return folder
