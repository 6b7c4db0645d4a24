"""The files of the repository, as git knows them."""

import subprocess
from pathlib import Path

import pytest

from cats import paths


def tracked(*patterns: str) -> list[Path]:
    """The files that git tracks, or would with the next `git add`; all of them without a pattern."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listing = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("this is no clone: git lists no files here")
    files = {paths.ROOT / name for name in listing.stdout.split("\0") if name}
    return sorted(file for file in files if file.is_file())
