"""The audit log: who signed in, who was refused, and what admins did. No token is ever in it."""

import json
import logging
import os
import time
from pathlib import Path

from reward_server.redaction import shown

_log = logging.getLogger(__name__)
_LONGEST = 300  # characters of a detail


class Audit:
    """Appends JSON lines to a file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        """Take the path; the file and its folder are made with the first line."""
        self._path = path

    def note(self, event: str, address: str, **details: str | None) -> None:
        """Write down an event with its time, the address that it came from, and details.

        A disk that takes no line stops nobody: it is told in the console's log.
        """
        told = {name: value and shown(value)[:_LONGEST] for name, value in details.items()}
        line = {"time": round(time.time(), 3), "event": event, "address": address, **told}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(file, json.dumps(line).encode() + b"\n")
            finally:
                os.close(file)
        except OSError as error:
            _log.warning("%s: a line of the audit log was not written: %s", self._path, error)
