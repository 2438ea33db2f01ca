"""The files of the page, as they are sent, and their version, which is recorded with each answer."""

from functools import cache
from hashlib import sha256
from pathlib import Path

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Media types, by ending."""
_FOLDER = Path(__file__).parent / "static"


@cache
def files() -> dict[str, bytes]:
    """The content of each file, by name."""
    return {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in TYPES}


@cache
def version() -> str:
    """12 hex digits that are others as soon as a file is."""
    digest = sha256()
    for name, content in files().items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
