"""Data sets of a hub: rows streamed from a server that answers as the hub does, and a hub that cannot be reached."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from .conftest import Spinal

ROWS = [{"prompt": f"question {number}", "number": number} for number in range(700)]
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that streaming asks for, of one data set, owner/name, with one parquet file."""

    protocol_version = "HTTP/1.1"
    file = ("train.parquet", b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content_Length": str(len(body)), "X_Repo_Commit": COMMIT}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def describe(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, data = self.file
        path, about = self.path.partition("?")[0], "/api/datasets/owner/name"
        if path in (about, f"{about}/revision/{COMMIT}"):
            state = dict.fromkeys(("private", "gated", "disabled"), False)
            self.describe({"id": "owner/name", "sha": COMMIT, "tags": [], "siblings": [{"rfilename": name}], **state})
        elif path == f"{about}/tree/{COMMIT}":
            self.describe([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}])
        elif path == f"/datasets/owner/name/resolve/{COMMIT}/{name}":
            begin, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = data[int(begin) : int(end or len(data)) + 1]
            last = int(begin) + len(part) - 1
            self.answer(206, part, ETag='"1"', Content_Range=f"bytes {begin}-{last}/{len(data)}")
        else:
            wrong = "Revision" if "/owner/name/resolve/v1" in path else "Entry" if "/owner/name/" in path else "Repo"
            self.answer(404, b"{}", X_Error_Code=f"{wrong}NotFound")


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub that has owner/name, with ROWS."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    Hub.file = ("train.parquet", buffer.getvalue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


READ = """
import json
from spinal_jax.data import read_prompts, source_of
from spinal_jax.errors import UserError

def message(**source):
    try:
        return len(read_prompts(source_of(None, **source)).prompts)
    except UserError as error:
        return str(error)

read = read_prompts(source_of(None, dataset="owner/name"), limit=650, offset=40)
found = [prompt.text for prompt in read.prompts]
wrong = [dict(dataset="owner/none"), dict(dataset="owner/name", split="dev"), dict(dataset="owner/name", revision="v1")]
print(json.dumps({"texts": found, "wrong": [message(**source) for source in wrong]}))
"""


def test_rows_are_streamed_from_a_hub(tmp_path: Path, hub: str) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", READ], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["texts"] == [row["prompt"] for row in ROWS[40:690]]
    for text, words in zip(found["wrong"], (("owner/none",), ("dev", "['train']"), ("v1",)), strict=True):
        assert text.startswith("prompts.dataset: "), text
        assert "\n" not in text
        assert all(word in text for word in words), text
    # Only rows are read: no copy of the data set's file is kept.
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_hub_that_cannot_be_reached(spinal: Spinal, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    outcome = spinal("audit", f"model.source={model}", "prompts.dataset=owner/name")
    outcome.refusal("prompts.dataset", "owner/name", "Couldn't reach")
