"""Real models and texts come out of Python wheels: every package index mirror serves them, no other host is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where models and texts are kept between runs: `$FXCALIB_CACHE`, else `~/.cache/fxcalib`; made when missing."""
    folder = Path(os.environ.get("FXCALIB_CACHE") or Path.home() / ".cache" / "fxcalib")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def wheel(requirement: str) -> Iterator[zipfile.ZipFile]:
    """The wheel of `requirement`, such as `gensim==4.4.0`, open for reading. Nothing is installed or kept.

    Raises RuntimeError with pip's last lines where the download fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary", ":all:"]
        done = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            tail = " ".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(
                f"pip could not download {requirement}: {tail}; check the package index, or set FXCALIB_CACHE to a "
                "folder that another machine filled"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            yield archive
