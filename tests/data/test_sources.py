"""Files, folders and hub ids -> the same rows, with the right numbers, in bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastsft.config import DataSource
from fastsft.data import tables, textfiles
from fastsft.data.rows import BadRow, Conversation
from fastsft.data.sources import Source, open_source
from fastsft.errors import UserError

SEED = Path(__file__).parent / "seed"
HUB = Path(__file__).parent / "loopback_hub.py"
TEXTS = [f'Text {n} with ünïcödé, "quotes",\nand a line break' for n in range(2500)]
ROWS = [{"text": text, "id": n} for n, text in enumerate(TEXTS)]


def opened(path: Path | str, **spec: Any) -> Source:
    return open_source(DataSource(path=str(path), **spec), system=None)


def parsed(source: Source, start_row: int = 0) -> list[Conversation | BadRow]:
    return [row for chunk in source.chunks(start_row) for row in source.parse(chunk)]


def refusal(path: Path | str, **spec: Any) -> str:
    with pytest.raises(UserError) as caught:
        parsed(opened(path, **spec))
    return str(caught.value)


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    quoted = ['"' + row["text"].replace('"', '""') + f'",{row["id"]}' for row in rows]
    return "\r\n".join(["text,id", *quoted, ""]).encode()


def arrow_bytes(rows: list[dict[str, Any]], new: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    return sink.getvalue().to_pybytes()


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=600)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "crlf.jsonl": lambda rows: lines(rows).replace(b"}\n", b"}\r\n"),
    "unended.jsonl": lambda rows: lines(rows).rstrip(),
    "lines.json": lines,
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "two.jsonl.gz": lambda rows: gzip.compress(lines(rows[:9])) + gzip.compress(lines(rows[9:])),
    "a.jsonl.zst": lambda rows: zstd(lines(rows)),
    "two.jsonl.zst": lambda r: zstd(lines(r[:9])) + zstd(lines(r[9:])),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "a.json.gz": lambda rows: gzip.compress(json.dumps(rows, ensure_ascii=False).encode()),
    "array.jsonl": lambda rows: json.dumps(rows).encode(),
    "a.csv": csv_bytes,
    "a.csv.gz": lambda rows: gzip.compress(csv_bytes(rows)),
    "a.parquet": parquet_bytes,
    "file.arrow": lambda rows: arrow_bytes(rows, pa.ipc.new_file),
    "stream.arrow": lambda rows: arrow_bytes(rows, pa.ipc.new_stream),
}


@pytest.fixture(params=WRITERS)
def container(request, tmp_path) -> Path:
    path = tmp_path / request.param
    path.write_bytes(WRITERS[request.param](ROWS))
    return path


def test_every_container_gives_the_same_rows_from_any_start(container, monkeypatch):
    # Small blocks, so that rows, characters and elements lie across their ends.
    monkeypatch.setattr(tables, "BLOCK", 997)
    monkeypatch.setattr(textfiles, "BLOCK", 997)
    source = pickle.loads(pickle.dumps(opened(container)))
    assert source.verdict.startswith("text: columns text (not used: id)")
    rows = parsed(source)
    assert [row.text for row in rows] == TEXTS
    numbers = [int(row.where.removeprefix(f"{container}:")) for row in rows]
    if "csv" in container.name:
        assert numbers == [2 + 2 * n for n in range(len(ROWS))]  # each record covers two lines
    else:
        assert numbers == list(range(1, len(ROWS) + 1))
    for start in (1, 599, 600, 1234, 2499, 2500, 9999):
        assert [row.text for row in parsed(source, start)] == TEXTS[start:], start
        assert [c.first_row for c in source.chunks(start)][:1] == [start][: start < len(ROWS)]


def test_max_rows_in_every_container(container):
    for n in (1, 600, 1001):
        source = opened(container, max_rows=n)
        assert [row.text for row in parsed(source)] == TEXTS[:n]
        assert [row.text for row in parsed(source, n - 1)] == TEXTS[n - 1 : n]


def test_fingerprints(tmp_path, container):
    first = opened(container).fingerprint()
    assert opened(container).fingerprint() == first
    assert opened(container, max_rows=5).fingerprint() != first
    assert opened(container, columns={"text": "text"}).fingerprint() == first
    other = DataSource(path=str(container))
    assert open_source(other, system="S").fingerprint() != first
    moved = tmp_path / f"moved-{container.name}"
    moved.write_bytes(container.read_bytes())
    assert opened(moved).fingerprint() == first
    changed = [*ROWS[:-1], {"text": "changed", "id": 2499}]
    container.write_bytes(WRITERS[container.name](changed))
    assert opened(container).fingerprint() != first


@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "jsonl.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, format):
    row = {"text": "word " * 400, "id": 1}
    peaks = []
    for megabytes in (4, 24):
        path = tmp_path / f"{megabytes}.{format}"
        path.write_bytes(WRITERS[f"a.{format}"]([row] * (megabytes * 500)))
        source = opened(path)
        tracemalloc.start()
        count = sum(1 for chunk in source.chunks() for _ in source.parse(chunk))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == megabytes * 500
    assert peaks[1] < 1.2 * peaks[0] < 16e6


def test_chunks_are_small_whatever_the_batches_are(tmp_path):
    rows = [{"text": "word " * 4000} for _ in range(600)]
    for name in ("a.parquet", "file.arrow"):
        (tmp_path / name).write_bytes(WRITERS[name](rows))
        sizes = [len(chunk.payload) for chunk in opened(tmp_path / name).chunks()]
        assert sum(sizes) > 12e6 and max(sizes) < 2e6


def test_a_row_group_is_not_held_whole(tmp_path):
    rows = [{"text": os.urandom(500).hex()} for _ in range(24_000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=len(rows))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in opened(tmp_path / "a.parquet").chunks()]
    assert len(held) > 10 and max(held) < 8e6, max(held)  # of 24 MB


# -- seeds and verdicts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("alpaca.json", "alpaca: columns instruction, input, output, system, history"),
        ("sharegpt.jsonl", "sharegpt: columns conversations, tools, system"),
        ("messages.jsonl", "messages: columns messages, tools"),
    ],
)
def test_seed_files_are_whole(name, verdict):
    source = opened(SEED / name)
    rows = parsed(source)
    assert source.verdict == verdict
    assert len(rows) == 12 and all(isinstance(row, Conversation) for row in rows), rows


TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "spec", "verdict"),
    [
        ({"messages": MESSAGES, "text": "x"}, {}, "messages: columns messages (not used: text)"),
        ({"conversations": MESSAGES}, {}, "messages: columns conversations"),
        ({"messages": TURNS}, {}, "sharegpt: columns messages"),
        (
            {"prompt": "a", "messages": MESSAGES},
            {},
            "messages: columns messages (not used: prompt)",
        ),
        ({"chat": TURNS}, {"columns": {"conversations": "chat"}}, "sharegpt: columns chat"),
        ({"conversations": json.dumps(TURNS)}, {}, "sharegpt: columns conversations"),
        ({"output": "b", "instruction": "a"}, {}, "alpaca: columns output, instruction"),
        (
            {"q": "a", "a": "b"},
            {"columns": {"instruction": "q", "output": "a"}},
            "alpaca: columns q, a",
        ),
        ({"prompt": "a", "completion": "b"}, {}, "completion: columns prompt, completion"),
        ({"text": "x", "prompt": "y"}, {"format": "text"}, "text: columns text (not used: prompt)"),
    ],
)
def test_verdicts(tmp_path, row, spec, verdict):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([row] * 3))
    source = opened(path, **spec)
    assert source.verdict == verdict
    assert all(isinstance(result, Conversation) for result in parsed(source))


def test_verdict_tells_of_the_container(tmp_path):
    (tmp_path / "a.json").write_bytes(lines(ROWS[:3]))
    assert opened(tmp_path / "a.json").verdict.endswith("; JSON lines in a .json file")
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[:3]))
    assert opened(tmp_path / "a.jsonl").verdict.endswith("; a JSON array in a .jsonl file")


def test_builtin_docstrings():
    source = opened("builtin:docstrings", max_rows=1100)
    rows = parsed(source)
    assert source.verdict == "messages: columns messages"
    assert rows[1001].where == "builtin:docstrings:1002"
    assert rows[1001].messages == parsed(source, 1001)[0].messages
    assert source.fingerprint() != opened("builtin:docstrings", split="held_out").fingerprint()
    assert "only builtin:docstrings" in refusal("builtin:poems")


# -- bad rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_malformed_lines_have_their_numbers(tmp_path, ending):
    content = lines(ROWS[:40]).split(b"\n")
    content[4] = b""  # a blank line is no row, but counts
    content[36] = b'{"text": "cut'
    content[37] = b'{"text": "a"} {"text": "b"}'
    content[38] = b'["text"]'
    path = tmp_path / f"a.{ending}"
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstd}
    path.write_bytes(pack[ending](b"\n".join(content)))
    rows = parsed(opened(path))
    assert len(rows) == 39
    wrong = [row for row in rows if isinstance(row, BadRow)]
    assert [row.where for row in wrong] == [f"{path}:{n}" for n in (37, 38, 39)]
    assert [row.reason for row in wrong] == ["malformed JSON", "malformed JSON", "not an object"]
    assert "column 10" in wrong[0].detail
    assert rows[-1].where == f"{path}:40"


def test_invalid_utf8_names_the_byte(tmp_path):
    ok = '{"text": "ä"}'.encode()
    for name, joined in (("a.jsonl", b"\n%s\n%s\n%s"), ("a.json", b"[%s,\n%s,\n%s]")):
        path = tmp_path / name
        path.write_bytes(joined % (ok, b'{"text": "\xc3\xa4 \xe4"}', ok))
        first, wrong, last = parsed(opened(path))
        assert first.text == last.text == "ä"
        assert (wrong.reason, wrong.detail) == (
            "invalid UTF-8",
            "Byte 14 of the row (0xe4) is not UTF-8.",
        )
    csv = tmp_path / "a.csv"
    csv.write_bytes(b"text,id\nfine,1\n\xe4,2\n")
    assert parsed(opened(csv))[1].detail == "Byte 1 of the cell (0xe4) is not UTF-8."
    array = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xe4")]
    )
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    good, wrong = parsed(opened(tmp_path / "a.parquet"))
    assert good.text == "a" and (wrong.reason, wrong.where[-2:]) == ("invalid UTF-8", ":2")


def test_escaped_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n{"text": "\\uDE00 x"}\n')
    rows = parsed(opened(path))
    assert rows[0].text == "\N{GRINNING FACE}"
    assert [row.reason for row in rows[1:]] == ["invalid Unicode", "invalid Unicode"]


def test_nesting_and_numbers_beyond_pythons_limits(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = b"[" * 200_000
    path.write_bytes(b'{"text": "fine"}\n' + deep + b"\n" + b"9" * 5000 + b"\n")
    assert [row.reason for row in parsed(opened(path))[1:]] == ["malformed JSON"] * 2
    (tmp_path / "a.json").write_bytes(b'[{"text": "fine"},\n' + deep)
    assert "in line 2" in refusal(tmp_path / "a.json")


def test_csv_records_of_the_wrong_length(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\n"two\nlines",b\na,b,c\n\nd\ne,\nf,g\n')
    rows = parsed(opened(path))
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "4", "6", "7", "8"]
    assert [getattr(row, "reason", "") for row in rows] == [
        "",
        "malformed CSV",
        "malformed CSV",
        "empty answer",
        "",
    ]


def test_csv_cells_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,id\n" + "x" * 300_000 + ",1\n")
    assert len(parsed(opened(path))[0].text) == 300_000


def test_csv_cells_keep_their_line_breaks(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('text,id\n"a\r\nb\n\nc",1\nd\u2028e\x0cf,2\n'.encode())
    assert [row.text for row in parsed(opened(path))] == ["a\r\nb\n\nc", "d\u2028e\x0cf"]


def test_nulls_that_arrow_puts_into_tools_are_dropped(tmp_path):
    def tool(name: str, **properties: Any) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [tool("f", city={"type": "string"}), tool("g", day={"type": "integer", "enum": [1, 2]})]
    calls = [
        {"function": {"name": name, "arguments": a}}
        for name, a in (("f", {"city": "X"}), ("g", {"day": 1}))
    ]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": calls[:1]},
        {"role": "assistant", "content": None, "tool_calls": calls[1:]},
    ]
    rows = [{"messages": messages, "tools": tools}, {"messages": MESSAGES, "tools": None}]
    for name in ("a.parquet", "file.arrow"):
        (tmp_path / name).write_bytes(WRITERS[name](rows))
        first, second = parsed(opened(tmp_path / name))
        assert first.tools == tools and second.tools is None
        arguments = [m["tool_calls"][0]["function"]["arguments"] for m in first.messages[1:]]
        assert arguments == [{"city": "X"}, {"day": 1}]
        assert second.messages == MESSAGES  # no null tool_calls either


def test_the_json_type_of_datasets_is_parsed(tmp_path):
    # What `datasets` makes of contents that are texts in some messages and lists in others.
    parts = [{"type": "text", "text": "ä"}, {"type": "text", "text": "b"}]
    contents = pa.array([json.dumps("a"), json.dumps(parts)], pa.string()).cast(pa.json_())
    messages = pa.StructArray.from_arrays(
        [pa.array(["user", "assistant"]), contents], ["role", "content"]
    )
    table = pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), messages)})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    (row,) = parsed(opened(tmp_path / "a.arrow"))
    assert [m["content"] for m in row.messages] == ["a", "äb"]


# -- files that cannot be read at all -------------------------------------------------------------


def test_what_is_wrong_with_a_whole_file(tmp_path):
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    packed = gzip.compress(lines(ROWS))
    parquet = parquet_bytes(ROWS[:3])
    stream = arrow_bytes(ROWS[:3], pa.ipc.new_stream)
    cases = [
        (file("empty.jsonl", b""), "is empty"),
        (file("blank.jsonl", b"\n \n"), "holds no rows"),
        (file("none.json", b"[ ]"), "holds no rows"),
        (file("empty.jsonl.gz", gzip.compress(b"")), "holds no rows"),
        (file("header.csv", b"text,id\n"), "holds no rows"),
        (file("zero.parquet", parquet_bytes(ROWS[:0])), "holds no rows"),
        (file("a.txt", b"words"), "'.txt' is not one of .jsonl"),
        (file("noending", b"words"), "'(none)' is not one of"),
        (file("a.gz", packed), "'.gz' is not one of"),
        (file("a.parquet.gz", packed), "'.parquet.gz' is not one of"),
        (file("plain.jsonl.gz", lines(ROWS)), "cannot be unpacked as gzip"),
        (file("plain.jsonl.zst", lines(ROWS)), "cannot be unpacked as zstd"),
        (file("packed.jsonl", packed), "compressed with gzip (its name should end in .gz)"),
        (file("table.jsonl", parquet), "it is a Parquet file"),
        (file("utf16.jsonl", lines(ROWS).decode().encode("utf-16")), "UTF-16"),
        (file("zip.csv", b"PK\x03\x04..."), "spreadsheet"),
        (file("binary.csv", b"a\0b\n1,2\n"), "binary"),
        (file("fake.parquet", lines(ROWS)), "is not what its ending says"),
        (file("cut.parquet", parquet[:-50]), "cut short"),
        (file("fake.arrow", lines(ROWS)), "is not what its ending says"),
        (file("cut.arrow", stream[: len(stream) // 2]), "cut short"),
        (file("cut.jsonl.gz", packed[:-3000]), "Truncated"),
        (
            file("cut.jsonl.zst", zstd(lines(ROWS))[:-3000]),
            "Truncated",
        ),
        (
            file("words.jsonl", b"some words\nand more\n"),
            f"{tmp_path}/words.jsonl:1: malformed JSON",
        ),
        (file("numbers.jsonl", b"1\n2\n"), "none of the first 2 rows is a JSON object"),
        (
            file("object.json", b'{\n  "text": "a"\n}'),
            "neither an array of rows nor one row a line",
        ),
        (file("broken.json", b'[{"text": "a"},\n\n{"text" "b"}]'), "malformed JSON in line 3"),
        (file("cut.json", b'[{"text": "a"},\n{"text": "b'), "malformed JSON in line 2"),
        (
            file("comma.json", b'[{"text": "a"}\n{"text": "b"}]'),
            "in line 2: ',' or ']' was expected",
        ),
        (file("twice.json", b'[{"text": "a"}]\n[1]'), "line 2: there is more after the end"),
        (file("open.csv", b'text,id\na,1\n"b,2\nc,3\n'), ":3: malformed CSV"),
        (file("twice.csv", b"text,text\na,b\n"), "['text'] twice"),
        (file("columns.csv", b"q,a\n1,2\n"), "could not be told"),
        (file("columns.csv", b"q,a\n1,2\n"), "columns found: q, a. Name yours with columns:"),
    ]
    for path, words in cases:
        message = refusal(path)
        assert words in message and str(path) in message, (path.name, message)


def test_an_array_breaks_late_and_with_the_right_line(tmp_path):
    rows = ['{\n"text": "%s"\n}' % ("x" * 1000) for _ in range(5000)]
    rows[4321] = '{\n"text": oops\n}'
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(rows) + "\n]")
    assert f"malformed JSON in line {4321 * 3 + 3}:" in refusal(tmp_path / "a.json")


def test_missing_files(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS[:2]))
    assert f"did you mean {tmp_path}/train.jsonl?" in refusal(tmp_path / "trian.jsonl")
    assert "does not exist; nor does the folder" in refusal(tmp_path / "no" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    assert "data file train.json does not exist; did you mean train.jsonl?" in refusal("train.json")


def test_options_that_make_no_sense(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"q": "a", "a": "b"}]))
    named = {"instruction": "q", "output": "a"}
    assert "`split` is for hub data sets" in refusal(path, split="train", columns=named)
    assert "the field 'question'" in refusal(path, columns={"question": "q"})
    assert "'answer', which none of the first rows has; found: q, a" in refusal(
        path, columns={"instruction": "q", "output": "answer"}
    )
    assert "maps 'x' to 'robot'" in refusal(path, columns=named, roles={"x": "robot"})
    assert "format alpaca needs the field 'output'" in refusal(
        path, format="alpaca", columns={"instruction": "q"}
    )
    assert "the field 'prompt'" in refusal(path, format="text", columns={"prompt": "q"})


# -- folders and the hub --------------------------------------------------------------------------


def test_folders(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"messages": MESSAGES, "id": 1}, {"messages": MESSAGES, "id": 2}]
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "cannot be read as a data set" in refusal(folder)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes(lines(rows * (1 if split == "test" else 2)))
    source = opened(folder)
    assert len(parsed(source)) == 4 and len(parsed(opened(folder, split="test"))) == 2
    assert source.verdict == "messages: columns messages (not used: id)"
    assert parsed(source, 3)[0].where == f"{folder}[train]:4"
    assert b"arrow_dataset" not in pickle.dumps(source)  # workers need not open it, nor import
    fingerprint = source.fingerprint()
    assert opened(folder).fingerprint() == fingerprint
    assert opened(folder, split="test").fingerprint() != fingerprint
    assert "Unknown split" in refusal(folder, split="validation")
    assert "this is a folder" in refusal(folder, revision="main")

    (folder / "train.jsonl").write_bytes(lines([{**row, "id": 3} for row in rows]))
    assert opened(folder).fingerprint() != fingerprint
    (folder / "test.jsonl").write_bytes(lines(rows) + b'{"messages": [')
    assert "JSON" in refusal(folder, split="test")

    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "dict")
    for path, split in (("saved", None), ("dict", "test")):
        source = pickle.loads(pickle.dumps(opened(tmp_path / path, split=split)))
        assert [row.messages for row in parsed(source)] == [MESSAGES, MESSAGES]
    assert "no split 'train'" in refusal(tmp_path / "dict")


def test_hub_ids(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    run = subprocess.run(
        [sys.executable, str(HUB)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    out = json.loads(run.stdout.splitlines()[-1])
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    for verdict, fingerprint, rows, tail in (out["False"], out["True"]):
        assert verdict == "messages: columns messages" and len(fingerprint) == 32
        assert [where for where, _ in rows] == [f"team/chat[train]:{n}" for n in range(1, 6)]
        assert [messages[0]["content"] for _, messages in rows] == [f"q{n}" for n in range(5)]
        assert rows[0][1][1] == {"role": "assistant", "content": "a"}
        assert rows[1][1][1]["tool_calls"] == [call]
        assert tail == ["team/chat[train]:4", "team/chat[train]:5"]
    assert "team/none" in out["team/none None"] and "cannot be read" in out["team/none None"]
    assert "nothing" in out["team/chat nothing"]
    assert out["tokens"] == ["Bearer hf_secret"] and out["asked"] > 0
    stored = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert stored and not any(b"hf_secret" in p.read_bytes() for p in stored)
