"""Reads what W&B keeps of a run that is offline, without W&B's own reader."""

import json
import struct
import time
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<4sHB")  # ":W&B", a magic number, the version of the format
CHUNK = struct.Struct("<IHB")  # checksum, length, type, as in LevelDB's logs (doc/log_format.md)
BLOCK = 32 * 1024  # bytes; a chunk does not cross its end
PATIENCE = 60  # seconds
FULL, LAST = 1, 4  # types of a chunk that ends a record


def read_records(path: Path) -> list[Any]:
    """The records in a .wandb file, in order. W&B writes them in a process of its own, which may end after training."""
    deadline = time.monotonic() + PATIENCE
    while not any(record.HasField("exit") for record in whole_records(path)):
        assert time.monotonic() < deadline, f"W&B does not end {path}"
        time.sleep(0.1)
    return whole_records(path)


def whole_records(path: Path) -> list[Any]:
    """The records that are there by now."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, begun = path.read_bytes(), [], b""
    assert HEADER.unpack_from(data)[0] == b":W&B"
    at = HEADER.size
    while at + CHUNK.size <= len(data):
        if BLOCK - at % BLOCK < CHUNK.size:  # the rest of the block is empty
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = CHUNK.unpack_from(data, at)
        at += CHUNK.size
        if at + length > len(data):  # being written
            break
        begun += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            records.append(Record.FromString(begun))
            begun = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    """What was logged, row by row."""
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def config(records: list[Any]) -> dict[str, Any]:
    """The settings of the run."""
    updates = [update for record in records for update in (*record.config.update, *record.run.config.update)]
    return {update.key or "/".join(update.nested_key): json.loads(update.value_json) for update in updates}
