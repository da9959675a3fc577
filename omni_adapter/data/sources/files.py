"""Files on this disk: which ones a path means, what they hold, and a digest of them.

Knows nothing of rows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

_SAMPLED_BYTES = 1 << 16  # read from both ends of a file for its fingerprint

KINDS: Mapping[str, str] = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".arrow": "arrow",
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".au", ".m4a"), "audio"),
}  # fmt: skip
"""What a file holds, by the end of its name."""


def kind_of(file: Path) -> str:
    """Return what a file holds, "" if nothing that is read as rows."""
    return KINDS.get(file.suffix.lower(), "")


def local_files(path: str) -> list[Path] | None:
    """Return the files that a path means, in order of name; None if it is not on this disk."""
    if "*" in path:
        folder, _, pattern = path.partition("*")
        top = Path(folder) if folder.endswith("/") or not folder else Path(folder).parent
        prefix = "" if folder.endswith("/") or not folder else Path(folder).name
        found = (
            sorted(file for file in top.glob(f"{prefix}*{pattern}") if file.is_file()) if top.is_dir() else []
        )
        return found or None
    place = Path(path)
    if place.is_file():
        return [place]
    if not place.is_dir():
        return None
    return sorted(
        file
        for file in place.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(place).parts)
    )


def digest_files(files: Sequence[Path]) -> str:
    """Return a digest of names, sizes, and both ends of files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLED_BYTES))
            content.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(content.read(_SAMPLED_BYTES))
    return digest.hexdigest()
