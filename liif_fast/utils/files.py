"""Files that are either whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`: a kill at any moment leaves the old file or the new one, never half of one.

    The temporary file stands in the same folder, which must exist. Raises OSError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could keep the new name and lose the contents
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
