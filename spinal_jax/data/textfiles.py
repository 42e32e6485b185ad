"""Reads lines and JSON values of text files in bounded memory; other formats are refused by name.

`key` is the group of settings of the file (`prompts`, `preferences`, `corpus`), for error messages. The format is
detected from the first bytes, not the name: gzip, bzip2, xz and Zstandard are decompressed, parquet and Arrow are left
to `tables`, and other known binary formats are refused.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import json
import lzma
import math
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any, cast

from spinal_jax.errors import UserError

MAX_LINE = 64 << 20  # bytes of a line or of an item of a JSON array
MAX_BLANK = 1_000_000  # blank lines in a row
MAX_GROWTH = 200  # times the size of a compressed file beyond MAX_LINE; texts take 3 to 50 times
MAX_UNDECODABLE = 3  # undecodable bytes that are always accepted; above, at most 1 in TRACE
TRACE = 1000
_HEAD = 4096  # bytes for the detection of the format
_PIECE = 1 << 20

_SPACE = b" \n\r\t"  # white space of JSON
_BLANK = re.compile(r"[ \n\r\t]*")

File = str | Path | Traversable

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}
TABLES = {b"PAR1": "parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow stream"}
_ENCODINGS = {  # byte order marks; UTF-32's begin with UTF-16's
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_BINARY = {
    b"GGUF": "a GGUF model file",
    b"PK\x03\x04": "a zip archive (or a document, an array file or a PyTorch file, which are such archives)",
    b"PK\x05\x06": "an empty zip archive",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"RIFF": "a RIFF file (WAV, WebP or AVI)",
    b"OggS": "an Ogg file",
    b"ID3": "an MP3 file",
    b"fLaC": "a FLAC file",
    b"\x7fELF": "an ELF program",
    b"MZ\x90\0": "a Windows program",
    b"\xca\xfe\xba\xbe": "a Java class or a Mach-O program",
    b"\xcf\xfa\xed\xfe": "a Mach-O program",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array file",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"ORC": "an ORC table",
    b"Obj\x01": "an Avro file",
    b"\xd0\xcf\x11\xe0": "an old Microsoft Office document",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x04\x22\x4d\x18": "an LZ4 file",
    b"\x1f\x9d": "a file of the old Unix compress",
    b"{\\rtf": "an RTF document",
}


class FileErrors(contextlib.AbstractContextManager["FileErrors"]):
    """Converts errors of reading a file into one `UserError`."""

    def __init__(self, source: str, key: str):
        self.source, self.key, self.compression = source, key, ""
        self.most: float = math.inf  # bytes of the text of a compressed file
        self.damage: type[Exception] = zlib.error  # raised by decompressors

    def error(self, why: str) -> UserError:
        return UserError(f"{self.key}.path: {self.source!r} {why}")

    def check_growth(self, read: int) -> None:
        """Raises UserError if a compressed file has had too many bytes of text."""
        if read > self.most:
            raise self.error(
                f"has more than {MAX_GROWTH} times its size within {self.compression}, which is no usual text; "
                "decompress it first if it is right"
            )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self.key}.path: there is no file {self.source!r}") from error
        if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, self.damage)) or (
            self.compression and isinstance(error, OSError | ValueError) and not getattr(error, "errno", None)
        ):
            raise self.error(f"is not a whole {self.compression or 'compressed'} file ({error})") from error
        if isinstance(error, OSError | ValueError):
            raise self.error(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def kind_of(file: File, source: str, key: str) -> str:
    """The format of a file: `parquet`, `Arrow`, `Arrow stream`, or `text` for `lines` and `items`.

    Raises `UserError` if it is not a regular file.
    """
    with FileErrors(source, key), _regular(file, source, key) as stream:
        head = stream.read(_HEAD)
    return next((name for magic, name in TABLES.items() if head.startswith(magic)), "text")


def lines(file: File, source: str, key: str, counts: dict[str, int]) -> Iterator[str]:
    """The lines without line breaks (\\n or \\r\\n); `counts["undecodable"]` counts bytes that are not UTF-8.

    Those become U+FFFD; a byte order mark is passed over. Raises `UserError` if the file cannot be read, is not text,
    has a line of more than `MAX_LINE` bytes, or more undecodable bytes than a trace.
    """
    with FileErrors(source, key) as errors, _text(file, errors) as stream:
        read = blank = 0
        for number in range(1, 1 << 62):
            raw = stream.readline(MAX_LINE + 1)
            if not raw:
                break
            if len(raw) > MAX_LINE:
                raise errors.error(f"has more than {MAX_LINE >> 20} MiB in line {number}; give one row a line")
            read += len(raw)
            errors.check_growth(read)
            blank = blank + 1 if raw in (b"\n", b"\r\n") else 0
            if blank > MAX_BLANK:
                raise errors.error(f"has more than {MAX_BLANK:,} blank lines in a row")
            yield _decoded(raw, f"line {number}", read, counts, errors).removesuffix("\n").removesuffix("\r")


def starts_array(file: File, source: str, key: str) -> bool:
    """Whether the first character of a text file that is not white space opens a JSON array."""
    with FileErrors(source, key) as errors, _text(file, errors) as stream:
        return stream.read(_PIECE).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def items(file: File, source: str, key: str, counts: dict[str, int]) -> Iterator[Any]:
    """The items of a file that is one JSON array, read one after the other. Errors as `lines`."""
    decoder = json.JSONDecoder()
    with FileErrors(source, key) as errors, _text(file, errors) as stream:
        rest, read, blank, number, wanted = "", 0, 0, 0, _PIECE
        pending = b""
        opened = ended = False
        while True:
            raw = b"" if ended else stream.read(wanted)
            ended = ended or len(raw) < wanted
            read += len(raw)
            errors.check_growth(read)
            blank = 0 if raw.strip(_SPACE) else blank + len(raw)
            if blank > MAX_LINE:
                raise errors.error(f"has more than {MAX_LINE >> 20} MiB of white space behind item {number}")
            pending += raw
            # The end of the piece may split a character.
            cut = len(pending) if ended else max(0, len(pending) - 4)
            while 0 < cut < len(pending) and pending[cut] & 0xC0 == 0x80:
                cut -= 1
            rest += _decoded(pending[:cut], f"item {number + 1}", read, counts, errors)
            pending = pending[cut:]
            place = 0
            while True:
                place = _blank(rest, place)
                if place == len(rest):
                    break
                if not opened:
                    opened, place = True, place + 1  # the bracket
                    continue
                if rest[place : place + 1] == "]":
                    if rest[place + 1 :].strip() or pending.strip() or stream.read(_PIECE).strip():
                        raise errors.error("goes on behind the end of its JSON array")
                    return
                begin = place
                if number:
                    if rest[place] != ",":
                        raise errors.error(f"is not JSON behind item {number}: {rest[place : place + 60]!r}")
                    begin = _blank(rest, place + 1)
                try:
                    value, after = decoder.raw_decode(rest, begin)
                except RecursionError as error:
                    raise errors.error(f"is nested too deeply in item {number + 1}") from error
                except ValueError as error:
                    if ended:
                        shown = rest[begin : begin + 60]
                        raise errors.error(f"is not JSON in item {number + 1}: {shown!r}") from error
                    break
                if after == len(rest) and not ended:
                    break  # a number may continue
                number, place = number + 1, after
                yield value
            if ended and place >= len(rest):
                raise errors.error("ends within its JSON array")
            rest = rest[place:]
            if len(rest) > MAX_LINE:
                raise errors.error(f"has more than {MAX_LINE >> 20} MiB in item {number + 1}")
            wanted = max(_PIECE, len(rest))  # an item of n bytes is tried log n times


def _blank(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    assert match is not None
    return match.end()


def _decoded(raw: bytes, where: str, read: int, counts: dict[str, int], errors: FileErrors) -> str:
    if b"\0" in raw:
        raise errors.error(f"has NUL bytes in {where}, so it is not text")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        counts["undecodable"] = counts.get("undecodable", 0) + text.count("\ufffd") - raw.count("\ufffd".encode())
        if counts["undecodable"] > max(MAX_UNDECODABLE, read // TRACE):
            raise errors.error(
                f"is not UTF-8: {counts['undecodable']} of its first {read} bytes stand for no character ({where}); "
                "convert it, with iconv for example"
            ) from None
        return text


@contextlib.contextmanager
def _regular(file: File, source: str, key: str) -> Iterator[IO[bytes]]:
    if isinstance(file, str | Path):
        file = Path(file).expanduser()
        mode = os.stat(file).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{key}.path: {source!r} is a folder; give one file")
        if not stat.S_ISREG(mode):
            kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
            kind = kinds.get(stat.S_IFMT(mode), "a device")
            raise UserError(f"{key}.path: {source!r} is {kind}; give a regular file")
    with file.open("rb") as stream:
        yield cast(IO[bytes], stream)


@contextlib.contextmanager
def _text(file: File, errors: FileErrors) -> Iterator[IO[bytes]]:
    """The bytes of a text file, decompressed, once their beginning has been looked at."""
    with _regular(file, errors.source, errors.key) as raw, contextlib.ExitStack() as stack:
        head = raw.read(_HEAD)
        raw.seek(0)
        stream: IO[bytes] = raw
        kind = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)
        if kind is not None:
            errors.compression = kind
            errors.most = max(MAX_LINE, MAX_GROWTH * raw.seek(0, os.SEEK_END))
            raw.seek(0)
            stream = stack.enter_context(_decompressed(raw, kind, errors))
            head = stream.read(_HEAD)
            stream = cast(IO[bytes], stack.enter_context(_Behind(head, stream)))
            if any(head.startswith(magic) for magic in (*COMPRESSED, *TABLES)):
                raise errors.error(f"holds another compressed file or a table within {kind}; decompress it first")
        _check_text(head, errors)
        if head.startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        yield stream


class _Behind(io.BufferedReader):
    """A stream again from its beginning, of which `head` has been read."""

    def __init__(self, head: bytes, stream: IO[bytes]):
        class Joined(io.RawIOBase):
            left = head

            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                some = self.left[: len(buffer)] or stream.read(len(buffer))
                self.left = self.left[len(buffer) :]
                buffer[: len(some)] = some
                return len(some)

        super().__init__(Joined(), _PIECE)


def _decompressed(raw: IO[bytes], kind: str, errors: FileErrors) -> IO[bytes]:
    if kind == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if kind == "bzip2":
        return cast(IO[bytes], bz2.BZ2File(raw))
    if kind == "xz":
        return cast(IO[bytes], lzma.LZMAFile(raw))
    # It is in the standard library from Python 3.14 on.
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        zstd = importlib.import_module(name)
    except ImportError as error:
        install = f"which needs {name}; pip install 'spinal-jax[datasets]'"
        raise errors.error(f"is compressed with Zstandard, {install}") from error
    errors.damage = zstd.ZstdError
    return cast(IO[bytes], zstd.ZstdFile(raw))


def _check_text(head: bytes, errors: FileErrors) -> None:
    """UserError if the beginning of a file is that of a known binary format or of text in another encoding."""
    binary = next((name for magic, name in _BINARY.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        binary = "a tar archive"
    elif len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32 and b"\0" in head[:8]:
        binary = "a safetensors file"
    if binary is not None:
        raise errors.error(f"is {binary}; give text: JSON lines, a JSON array or one prompt a line")
    encoding = next((name for magic, name in _ENCODINGS.items() if head.startswith(magic)), None)
    if encoding is None and b"\0" in head:
        even, odd = head[::2].count(0), head[1::2].count(0)
        few, many = sorted((even, odd))
        if many > len(head) // 5 and few <= many // 10:  # Latin text has a NUL in every second byte
            encoding = "UTF-16"
    if encoding is not None:
        raise errors.error(f"is {encoding} text; convert it to UTF-8: iconv -f {encoding} -t UTF-8")
    if b"\0" in head:
        raise errors.error("has NUL bytes at its beginning, so it is not text")
