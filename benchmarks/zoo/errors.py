"""Why an architecture takes no part."""

from __future__ import annotations

import os
import re
import traceback


class NotBuilt(Exception):
    """The model cannot be built tiny, or does not run eagerly; `stage` is how far it got."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


def cause(error: BaseException, limit: int = 400) -> str:
    """One line about an error: type, first lines of the message, and the innermost line outside of torch."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    message = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
    message = re.sub(r"\S*site-packages/", "", message)  # results are read on other machines
    return f"{type(error).__name__}: {message[:limit]}{where[:160]}"
