"""What tests of several files write their data with."""

import json

import pytest


@pytest.fixture
def data(tmp_path):
    def write(*rows, name="data.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines))
        return str(tmp_path / name)

    return write
