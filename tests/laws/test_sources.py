"""Where rows come from: what a file is, told by its content; what is refused and by which name; equal rows anywhere."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from spinal_jax.audit.pipeline import prompts_record, read_prompt_set
from spinal_jax.config import PromptsConfig
from spinal_jax.data import read_documents, read_pairs, read_prompts, source_of, stem, textfiles, tokenise_prompts
from spinal_jax.data.sources import Source, read_rows
from spinal_jax.errors import UserError
from spinal_jax.models.formats.byte_level import byte_tokenizer

ROWS = [
    {"prompt": f"question {n} é😀", "number": n, "messages": [{"role": "user", "content": f"m{n}"}]} for n in range(700)
]


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def lines_of(values: list[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def zstd(data: bytes) -> bytes:
    module = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    return module.compress(data, options={module.CompressionParameter.checksum_flag: 1})


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def containers(folder: Path, values: list[dict[str, Any]]) -> dict[str, Source]:
    """The same rows in everything that holds rows."""
    folder.mkdir()
    table = pyarrow.Table.from_pylist(values)
    data = lines_of(values)
    (folder / "p.jsonl").write_bytes(data)
    (folder / "p.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    for name, compress in COMPRESS.items():
        (folder / f"p.{name}").write_bytes(compress(data))
    pyarrow.parquet.write_table(table, folder / "p.parquet", row_group_size=100)
    with pyarrow.ipc.new_file(folder / "p.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=90)
    with pyarrow.ipc.new_stream(folder / "p.stream", table.schema) as stream:
        stream.write_table(table, max_chunksize=90)
    made = datasets.Dataset.from_list(values)
    made.save_to_disk(folder / "saved", num_shards=3)
    datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(folder / "splits")
    (folder / "repo" / "data").mkdir(parents=True)
    half = len(values) // 2
    for number, part in enumerate((values[:half], values[half:])):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(part), folder / "repo" / "data" / f"train-0000{number}-of-00002.parquet"
        )
    pyarrow.parquet.write_table(table.slice(0, 3), folder / "repo" / "data" / "test-00000-of-00001.parquet")
    files = [path for path in folder.iterdir() if path.is_file()]
    return {
        **{path.name: Source(path) for path in files},
        "saved": Source(folder / "saved"),
        "splits": source_of(folder / "splits", split="train"),
        "repo": source_of(folder / "repo", split="train"),
        "dataset": source_of(None, dataset=str(folder / "repo"), split="train"),
    }


def test_equal_rows_give_equal_prompts_whatever_holds_them(tmp_path: Path) -> None:
    expected = [row["prompt"] for row in ROWS]
    found = containers(tmp_path / "c", ROWS)
    assert len(found) == 13
    digests = set()
    for name, source in found.items():
        read = read_prompts(source)
        assert [prompt.text for prompt in read.prompts] == expected, name
        digests.add(read.sha256)
        some = read_prompts(source, limit=5, offset=498)
        assert [prompt.text for prompt in some.prompts] == expected[498:503], name
        said = read_prompts(source, field="messages", limit=2)
        assert [prompt.turns for prompt in said.prompts] == [(("user", "m0"),), (("user", "m1"),)], name
    assert len(digests) == 1


def test_equal_rows_give_equal_tokens_and_the_same_record_in_a_trace(tmp_path: Path) -> None:
    containers(tmp_path / "c", ROWS[:40])
    (tmp_path / "c" / "saved").rename(tmp_path / "c" / "p")
    found = []
    for name in ("p.jsonl", "p.json", "p.gz", "p.parquet", "p.arrow", "p"):
        config = PromptsConfig(path=str(tmp_path / "c" / name), limit=30)
        read = read_prompt_set(config)
        tokens = tokenise_prompts(read, byte_tokenizer(), 12, False)
        found.append((json.dumps(prompts_record(read, config)), [ids.tobytes() for ids in tokens.ids]))
    assert all(each == found[0] for each in found)


def test_names_tell_nothing_and_content_tells_all(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(gzip.compress(lines_of(ROWS[:3])))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:3]), tmp_path / "p.txt")
    (tmp_path / "p.gz").write_bytes(lines_of(ROWS[:3]))
    for name in ("p.parquet", "p.txt", "p.gz"):
        assert [p.text for p in read_prompts(tmp_path / name).prompts] == [row["prompt"] for row in ROWS[:3]]
    assert read_documents(tmp_path / "p.txt", "jsonl", "prompt").texts == tuple(row["prompt"] for row in ROWS[:3])
    assert "is a parquet file, not text" in message(lambda: read_prompts(tmp_path / "p.txt", "text"))


@pytest.mark.parametrize("path", ["a/hh.jsonl.gz", "hh.parquet", "hh", "hh/", "x/hh.json.zst"])
def test_a_trace_names_a_source_without_its_container(path: str) -> None:
    assert stem(path) == "hh"
    assert stem(".jsonl") == ".jsonl"


BINARY = {
    b"GGUF\x03\0\0\0": "a GGUF model file",
    (80).to_bytes(8, "little") + b'{"a": 1}': "a safetensors file",
    b"PK\x03\x04rest": "a zip archive",
    b"%PDF-1.7\n": "a PDF document",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff\xe0": "a JPEG image",
    b"SQLite format 3\0": "an SQLite database",
    b"\x7fELF\x02": "an ELF program",
    b"\x80\x04\x95": "a Python pickle",
    b"\x93NUMPY\x01": "a NumPy array file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"name\0" + bytes(252) + b"ustar\0": "a tar archive",
    b"\xd0\xcf\x11\xe0\xa1\xb1": "an old Microsoft Office document",
}


@pytest.mark.parametrize("data", BINARY)
@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_binary_files_are_refused_by_name(tmp_path: Path, data: bytes, format: str) -> None:
    (tmp_path / "p").write_bytes(data + bytes(100))
    text = message(lambda: read_prompts(tmp_path / "p", format))
    assert f"is {BINARY[data]}" in text
    assert "format=text" not in text
    (tmp_path / "p").write_bytes(gzip.compress(data + bytes(100)))
    assert f"is {BINARY[data]}" in message(lambda: read_prompts(tmp_path / "p", format))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str, format: str) -> None:
    (tmp_path / "p").write_bytes(lines_of(ROWS).decode().encode(encoding))
    assert f"is {encoding[:6].upper()} text; convert it to UTF-8" in message(
        lambda: read_prompts(tmp_path / "p", format)
    )


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("latin-1", "où est l'été à Nîmes"), ("cp1251", "где лето"), ("shift-jis", "夏はどこ"), ("gb18030", "夏天在哪里")],
)
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, encoding: str, said: str) -> None:
    (tmp_path / "p").write_bytes((f"{said}\n" * 20).encode(encoding))
    assert "is not UTF-8" in message(lambda: read_prompts(tmp_path / "p", "text"))


def test_a_trace_of_undecodable_bytes_is_let_pass_and_counted(tmp_path: Path) -> None:
    good = b"a line of plain text, as long as others are\n" * 1000
    (tmp_path / "p").write_bytes(good + b"caf\xe9\n" * 20 + "a real \ufffd\n".encode())
    assert read_prompts(tmp_path / "p", "text").undecodable == 20
    (tmp_path / "p").write_bytes(good + b"caf\xe9\n" * 100)
    assert "is not UTF-8" in message(lambda: read_prompts(tmp_path / "p", "text"))


@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_null_bytes_are_refused_wherever_they_are(tmp_path: Path, format: str) -> None:
    for data in (b'{"prompt": "a\0"}\n', lines_of(ROWS) + b'{"prompt": "a\0"}\n'):
        (tmp_path / "p").write_bytes(data)
        assert "NUL bytes" in message(lambda: read_prompts(tmp_path / "p", format))
    (tmp_path / "p").write_bytes(rb'{"prompt": "a\u0000b"}')
    assert read_prompts(tmp_path / "p").prompts[0].text == "a\0b"


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=list(COMPRESS))
def test_a_damaged_compressed_file(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    rng = random.Random(0)
    whole = compress(lines_of([{"prompt": str(rng.random())} for _ in range(20_000)]))
    for data in (whole[: len(whole) // 2], whole[:1000] + bytes(200) + whole[1200:]):
        (tmp_path / "p").write_bytes(data)
        assert "is not a whole" in message(lambda: read_prompts(tmp_path / "p"))
    (tmp_path / "p").write_bytes(gzip.compress(compress(b"x")))
    assert "within gzip; decompress it first" in message(lambda: read_prompts(tmp_path / "p"))


def test_several_frames_are_one_file(tmp_path: Path) -> None:
    for name, compress in COMPRESS.items():
        (tmp_path / name).write_bytes(compress(lines_of(ROWS[:2])) + compress(lines_of(ROWS[2:4])))
        assert len(read_prompts(tmp_path / name).prompts) == 4, name


def test_a_line_is_read_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MAX_LINE", 1000)
    (tmp_path / "p").write_bytes(gzip.compress(b'{"prompt": "a"}\n' + b"a" * 50_000_000))
    for format in ("jsonl", "text"):
        text = message(lambda format=format: read_prompts(tmp_path / "p", format))
        assert "MiB in line 2; give one row a line" in text
    (tmp_path / "p").write_bytes(b'[{"prompt": "a"}, {"prompt": "' + b"a" * 5_000_000)
    assert "MiB in item 2" in message(lambda: read_prompts(tmp_path / "p"))


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
def test_what_is_compressed_may_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(textfiles, "MAX_LINE", 100_000)
    (tmp_path / "p").write_bytes(compress(b'{"prompt": "a"}\n' * 100_000))
    assert "200 times its size" in message(lambda: read_prompts(tmp_path / "p"))
    assert len(read_prompts(tmp_path / "p", limit=1000).prompts) == 1000
    (tmp_path / "p").write_bytes(compress(b'[{"prompt": "a"}' + b',{"prompt": "a"}' * 100_000 + b"]"))
    assert "200 times its size" in message(lambda: read_prompts(tmp_path / "p"))


def test_blank_lines_and_white_space_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MAX_BLANK", 1000)
    (tmp_path / "p").write_bytes(b"a\n" + b"\r\n" * 1000 + b"b")
    assert read_prompts(tmp_path / "p", "text").skipped_empty == 1000
    (tmp_path / "p").write_bytes(b"a\n" + b"\n" * 1001 + b"b")
    assert "1,000 blank lines in a row" in message(lambda: read_prompts(tmp_path / "p", "text"))
    monkeypatch.setattr(textfiles, "MAX_LINE", 3_000_000)
    for before, count, words in ((b'{"prompt": "a"}', 9_000_000, "white space behind item 1"), (b"", 0, "ends within")):
        (tmp_path / "p").write_bytes(b"[" + before + b" " * count)
        assert words in message(lambda: read_prompts(tmp_path / "p"))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "is a FIFO; give a regular file" in message(lambda: read_prompts(tmp_path / "fifo"))
    for device in ("/dev/zero", "/dev/null"):
        assert "is a device; give a regular file" in message(lambda device=device: read_prompts(device))
    assert "is a device" in message(lambda: read_pairs("/dev/zero"))
    assert "is a device" in message(lambda: read_documents("/dev/zero"))


# JSON arrays


def test_arrays_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place where a piece may end: within a character, an escape, a number and between items."""
    values = [{"prompt": "é😀" * n + '"\\', "n": 1.5e10 + n} for n in range(1, 12)]
    for text in (json.dumps(values, ensure_ascii=False), json.dumps(values, indent=2), f"\n {json.dumps(values)} \n"):
        (tmp_path / "p").write_bytes(text.encode())
        for piece in range(1, 40):
            monkeypatch.setattr(textfiles, "_PIECE", piece)
            found = [row.record for row in read_rows(Source(tmp_path / "p"), "prompts", 0, None, {}) if not row.blank]
            if piece > 2:  # the first character is looked for in the first piece
                assert found == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"prompt": "a"}, {"prompt": ', "is not JSON in item 2"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "is not JSON behind item 1"),
        ('[{"prompt": "a"}', "ends within its JSON array"),
        ('[{"prompt": "a"}] x', "goes on behind the end of its JSON array"),
        ('[{"prompt": "a"}, 3]', "item 2 must hold a JSON object, not 3"),
        ('[{"prompt": "a"}, {"text": "b"}]', "item 2 has no field 'prompt'"),
        ("[" * 100_000, "nested too deeply in item 1"),
        ("[]", "has no prompt among the rows asked for"),
    ],
)
def test_bad_arrays(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p").write_text(text, encoding="utf-8")
    assert said in message(lambda: read_prompts(tmp_path / "p"))


# Tables, folders and data sets


def test_damaged_tables(tmp_path: Path) -> None:
    containers(tmp_path / "c", ROWS)
    for name, kind in (("p.parquet", "parquet"), ("p.arrow", "Arrow"), ("p.stream", "Arrow stream")):
        data = (tmp_path / "c" / name).read_bytes()
        for spoiled in (data[: len(data) // 2], data[:100], data[:8]):
            (tmp_path / "p").write_bytes(spoiled)
            assert f"is not a whole {kind} file" in message(lambda: read_prompts(tmp_path / "p"))


def test_a_row_of_a_table_is_named(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"prompt": "a"}, {"prompt": None}])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    text = message(lambda: read_prompts(tmp_path / "p.parquet"))
    assert "p.parquet', row 2: 'prompt' must be a string, not null" in text
    assert "row 1 has no field 'ask'; it has 'prompt'" in message(
        lambda: read_prompts(tmp_path / "p.parquet", field="ask")
    )


def test_splits_of_folders(tmp_path: Path) -> None:
    containers(tmp_path / "c", ROWS)
    assert len(read_prompts(source_of(tmp_path / "c" / "splits", split="test")).prompts) == 3
    assert len(read_prompts(source_of(tmp_path / "c" / "repo", split="test")).prompts) == 3
    for name in ("splits", "repo"):
        assert "prompts.split" in message(lambda name=name: read_prompts(tmp_path / "c" / name))
        asked = source_of(tmp_path / "c" / name, split="dev")
        assert "prompts.split is 'dev'" in message(lambda asked=asked: read_prompts(asked))
    one = source_of(tmp_path / "c" / "p.jsonl", split="test")
    assert "is one file, which has no splits" in message(lambda: read_prompts(one))
    (tmp_path / "c" / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../../x"}]}', encoding="utf-8")
    assert "outside of its folder" in message(lambda: read_prompts(tmp_path / "c" / "saved"))
    (tmp_path / "c" / "saved" / "state.json").write_text("[" * 100_000, encoding="utf-8")
    assert "lists no _data_files" in message(lambda: read_prompts(tmp_path / "c" / "saved"))


@pytest.mark.parametrize(
    "listed", ["", "3", "[3]", "{}", '{"a": 1}', "null", '["x", 3]', "[[]]", "[" * 100_000], ids=str.__len__
)
def test_what_a_folder_says_of_itself_may_be_anything(tmp_path: Path, listed: str) -> None:
    for name, field in (("dataset_dict.json", "splits"), ("state.json", "_data_files")):
        folder = tmp_path / name
        folder.mkdir()
        for content in (listed, f'{{"{field}": {listed}}}'):
            (folder / name).write_text(content)
            with pytest.raises(UserError, match=r"prompts\.path|prompts\.split") as error:
                read_prompts(folder)
            assert "\n" not in str(error.value)


def test_data_sets_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    assert "prompts.dataset: " in message(lambda: read_prompts(source_of(None, dataset=str(tmp_path / "repo"))))
    script = tmp_path / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    assert "prompts.dataset: " in message(lambda: read_prompts(source_of(None, dataset=str(script))))
    assert not (tmp_path / "ran").exists()  # nothing of a data set is executed
