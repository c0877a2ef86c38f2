"""What is remembered between processes: one JSON file per entry, under $TDSL_CACHE or the user's cache directory."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any


def directory() -> Path:
    """Where entries lie: $TDSL_CACHE, else tdsl's folder in the user's cache directory."""
    if given := os.environ.get("TDSL_CACHE"):
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_cache_dir("tdsl"))


def read(kind: str, key: str) -> dict[str, Any] | None:
    """The entry `key` of one kind ("kernels", "reports"), or None. A corrupt file is ignored, with a warning."""
    path = directory() / kind / f"{key}.json"
    try:
        entry = json.loads(path.read_text())
        if not isinstance(entry, dict):
            raise ValueError(f"expected an object, found a {type(entry).__name__}")
    except OSError:
        return None
    except ValueError as error:
        warnings.warn(f"ignoring the corrupt cache file {path} ({error}); it will be made anew", RuntimeWarning, stacklevel=2)
        return None
    return entry


def write(kind: str, key: str, entry: dict[str, Any]) -> None:
    """Keep an entry. Readers see the old file or the new one, never a part; a disk that cannot be written to only costs time."""
    folder = directory() / kind
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(entry, file)
        os.replace(temporary, folder / f"{key}.json")
    except OSError as error:
        warnings.warn(f"cannot write the cache in {folder}: {error}", RuntimeWarning, stacklevel=2)
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
