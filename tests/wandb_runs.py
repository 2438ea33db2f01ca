"""What W&B's own process has written of a run: the records in its .wandb file."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from wandb.proto import wandb_internal_pb2

_BLOCK, _FIRST, _HEADER = 32768, 7, 7  # LevelDB's log format, after 7 bytes of W&B's own
_FULL, _LAST = 1, 4


def records(run_dir: Path, run_id: str, deadline_s: float = 20.0) -> list[dict[str, Any]]:
    """The records of a run that was finished, as JSON values, in order; waits for the last one."""
    end = time.monotonic() + deadline_s
    while True:
        files = sorted((run_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb"))
        found = [_record(data) for file in files for data in _read(file.read_bytes())]
        if any("exit" in one for one in found):
            return found
        assert time.monotonic() < end, f"{files} have no end: {[list(one) for one in found][-3:]}"
        time.sleep(0.1)


def history(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were logged, without W&B's own columns."""
    rows = [one["history"]["item"] for one in found if "history" in one]
    named = [{_name(item): json.loads(item["valueJson"]) for item in row} for row in rows]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in named]


def _name(item: dict[str, Any]) -> str:
    return item.get("key") or ".".join(item["nestedKey"])


def _record(data: bytes) -> dict[str, Any]:
    record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
    record.ParseFromString(data)
    return MessageToDict(record)


def _read(data: bytes) -> Iterator[bytes]:
    place, parts = _FIRST, b""
    while place + _HEADER <= len(data):
        if (left := _BLOCK - place % _BLOCK) < _HEADER:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        place += _HEADER
        if place + size > len(data):
            return  # the last record is being written
        parts += data[place : place + size]
        place += size
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
