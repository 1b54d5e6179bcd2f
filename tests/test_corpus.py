"""Reading text: formats, invalid files, the split, and constant memory."""
import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from tinyllm import corpus, documents
from tinyllm.cli import UserError
from tinyllm.corpus import document_hash, find_files, find_val_threshold, summarize_skipped
from tinyllm.documents import read_documents


def read(path, name, content):
    path = path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_documents(path))


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "one story\nof two lines\n", ["one story\nof two lines"]),
    ("a.txt", "one<|endoftext|>\n two \n<|endoftext|>\n\n<|endoftext|>three", ["one", "two", "three"]),
    ("a.txt", "line\r\nline", ["line\nline"]),
    ("a.txt", b"\xef\xbb\xbfwith a mark", ["with a mark"]),
    ("a.txt", "", []), ("a.txt", "\n \n\t\n", []),
    ("a.json", '[{"story": "one"}, {"text": "two"}, "three"]', ["one", "two", "three"]),
    ("a.json", '[{"story": "one", "source": "x", "instruction": {"words": ["a", "b"]}}]', ["one"]),
    ("a.json", '{"text": "a single one"}', ["a single one"]), ("a.json", "[]", []), ("a.json", "  \n", []),
    ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n', ["one", "two"]),
    ("a.jsonl", '{"text": "no newline at the end"}', ["no newline at the end"]),
    ("a.jsonl", '{\n "text": "one"\n}\n{\n "text": "two"\n}\n', ["one", "two"]),       # as jq prints them
    ("a.jsonl", '["one",\n "two"]', ["one", "two"]), ("a.jsonl", '["one", "two"]', ["one", "two"]),
    ("a.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
    ("a.JSONL", '{"text": ""}\n{"text": " x "}\n', ["x"]),
    ("a.json", r'["\ud83d\ude00", "half \ud83d of it"]', ["😀", "half \ufffd of it"]),
    ("a.txt.gz", gzip.compress(b"one<|endoftext|>two", mtime=0), ["one", "two"]),
    ("a.json.gz", gzip.compress(b'["one"]', mtime=0), ["one"]),
    ("a.jsonl.gz", gzip.compress(b'"one"\n"two"\n', mtime=0), ["one", "two"])])
def test_formats(tmp_path, name, content, expected):
    assert read(tmp_path, name, content) == expected


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"fine \xff\xfe", "not UTF-8"),
    ("a.json", '[{"story": "one"}, {"title": "two"}]', "record 2: found the keys title; expected story or text"),
    ("a.json", '[{"story": "one"}, {"story": "tw', "record 2"), ("a.json", '[{"story": "one"}', "cut"),
    ("a.json", '["one"] and more', "record 2: .* not JSON"), ("a.json", '[{"story": 5}]', "record 1: found int;"),
    ("a.json", '["one", "two"', "record 3: cut off"), ("a.json", '["one",', "record 2: cut off"),
    ("a.json", '["one" "two"]', "record 2: .* a comma"), ("a.json", '["one",, "two"]', "record 2: .* not JSON"),
    ("a.json", '[, "one"]', "record 1: .* not JSON"), ("a.json", '["one",]', "record 2: .* not JSON"),
    ("a.json", '{"text": "one"}], [{"text": "two"}', "record 2: .* not JSON"),
    ("a.json", '"one", "two"', "record 2: .* not JSON"), ("a.json", '["one"]\n["two"]', "record 2: .* not JSON"),
    ("a.jsonl", '["one"]\n["two"]\n', "record 2: found text after the end of the list"),
    ("a.jsonl", '"one"\n["two"]\n', "record 2: found list; expected a text"),
    ("a.json", json.dumps([["one"]] * 10 + ["x" * (1 << 22)]), "record 1: found list; expected a text"),
    ("a.json", '["one"]' + " " * (1 << 19) + "and more", "record 2: .* not JSON"),
    ("a.json", json.dumps("x" * (documents.MAX_RECORD_CHARS + 9)), "record 1: longer than 16,777,216 characters"),
    ("a.json", json.dumps({f"k{i}": i for i in range(9)}), "found the keys k0, k1, k2, k3, k4 and 4 more; expected"),
    ("a.json", "hello", "not JSON"), ("a.json", "[" * 100_000, "record 1"), ("a.jsonl", '"one"\n{oops}\n', "record 2"),
    ("a.txt.gz", b"not packed at all", "record 1"), ("a.txt.gz", gzip.compress(b"words " * 99, mtime=0)[:-9], "ended"),
    ("a.txt.gz", gzip.compress(b"words " * 99, mtime=0)[:-8] + b"8 wrong.", "CRC")])
def test_unreadable_files_are_named(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, name, content)
    assert name in str(error.value)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_reading_in_pieces_changes_nothing(tmp_path, monkeypatch, chunk):
    texts = ["one", 'quo"te\n', "<|endo", "x" * 100, "äöü😀", "last"]
    records = [{"story": text} for text in texts]
    monkeypatch.setattr(documents, "_CHUNK_CHARS", chunk)
    monkeypatch.setattr(documents, "MAX_WHOLE_JSON_CHARS", chunk)
    for name, content in [("a.json", json.dumps(records, indent=1, ensure_ascii=False)),
                          ("a.json", json.dumps(records)), ("a.jsonl", "\n".join(map(json.dumps, records)))]:
        assert read(tmp_path, name, content) == [text.strip() for text in texts]
    assert read(tmp_path, "a.txt", documents.SEPARATOR.join(texts)) == [text.strip() for text in texts]


def test_long_documents_are_split_at_boundaries(tmp_path):
    words = " ".join(random.Random(0).choices(["alpha", "beta", "gamma"], k=60_000))
    for name, content in [("a.txt", words), ("a.json", json.dumps([words]))]:
        pieces = read(tmp_path, name, content)
        assert len(pieces) > 3 and max(map(len, pieces)) <= documents.MAX_DOCUMENT_CHARS and " ".join(pieces) == words
    paragraphs = "\n\n".join(["A paragraph of a few words.\nIn lines."] * 5000)
    assert all(piece.endswith("In lines.") for piece in read(tmp_path, "b.txt", paragraphs))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_WHOLE_JSON_CHARS", 1 << 20)
    def peak(megabytes, name, unit, close=""):
        path = tmp_path / name
        with open(path, "w", encoding="utf-8") as file:
            file.write("[" if close else "")
            for i in range(megabytes * 1000):
                file.write(unit(i))
            file.write(close)
        tracemalloc.start()
        count = sum(1 for _ in read_documents(path))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, most
    for name, unit, close in [("a.jsonl", lambda i: json.dumps({"text": "w" * 980}) + "\n", ""),
                              ("a.json", lambda i: (", " if i else "") + json.dumps("w" * 980), "]"),
                              ("a.txt", lambda i: "word " * 200, "")]:
        small, large = peak(4, name, unit, close), peak(16, name, unit, close)
        assert large[0] > 3 * small[0] and large[1] < 1.2 * small[1] < 20e6, name


def test_progress_adds_up_to_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 1_000_000, encoding="utf-8")
    seen = []
    list(read_documents(path, seen.append))
    assert sum(seen) == path.stat().st_size and len(seen) > 2


def test_folders_are_read_in_order_and_other_files_ignored(tmp_path):
    for name in ["b.txt", "a/z.json", "a/b.jsonl.gz", "readme.md", "c.txt.bak"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert found == ["a/b.jsonl.gz", "a/z.json", "b.txt"]
    for name in ".DS_Store", "._b.txt":         # files of macOS; the second is not text
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("x", encoding="utf-8")
    assert len(find_files(tmp_path)) == 3
    assert summarize_skipped(tmp_path) == "1 .bak, 1 .md" and summarize_skipped(tmp_path / "b.txt") == ""
    assert find_files(tmp_path / "b.txt") == [tmp_path / "b.txt"]


def test_byte_order_mark_and_unknown_encodings(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf["one"]')
    assert list(read_documents(path, encoding="UTF-8")) == list(read_documents(path)) == ["one"]
    for encoding in ("nope", "hex", "utf\0"):
        with pytest.raises(UserError, match="unknown encoding .*; expected gb18030"):
            list(read_documents(path, encoding=encoding))


@pytest.mark.parametrize("encoding", ["gb18030", "iso2022_jp", "hz", "utf-16"])
def test_encoding_applies_to_every_file(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("小さい犬".replace("さい", "").encode(encoding))
    assert list(read_documents(tmp_path / "a.txt", encoding=encoding)) == ["小犬"]


def test_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    def no_entry(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    monkeypatch.setattr(Path, "iterdir", no_entry)
    with pytest.raises(PermissionError):
        find_files(tmp_path)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no file or folder at .*missing$"):
        find_files(tmp_path / "missing")
    with pytest.raises(UserError, match="no file or folder at .*missing.too$"):
        find_files(tmp_path / "missing" / "too")
    (tmp_path / "my_stories").mkdir()
    with pytest.raises(UserError, match="at .*storys; did you mean .*my_stories\\?$"):
        find_files(tmp_path / "my_storys")
    with pytest.raises(UserError, match="no text in"):
        find_files(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(UserError, match=".jsonl"):
        find_files(tmp_path / "a.pdf")


def split(files):
    threshold = find_val_threshold(files)
    texts = [text for file in files for text in read_documents(file)]
    marks = [document_hash(text.encode()) for text in texts]
    return ([text for text, mark in zip(texts, marks) if mark > threshold],
            [text for text, mark in zip(texts, marks) if mark <= threshold])


def test_two_percent_of_documents_are_validation(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(f"story {i}") for i in range(5000)), encoding="utf-8")
    train, val = split([path])
    assert 70 < len(val) < 130 and len(train) + len(val) == 5000 and not set(train) & set(val)


def test_large_texts_keep_less_for_validation(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(f"story {i}") for i in range(5000)), encoding="utf-8")
    monkeypatch.setattr(corpus, "VAL_BYTES", path.stat().st_size // 500)
    assert 2 <= len(split([path])[1]) < 25


@pytest.mark.parametrize("count", [2, 3, 10])
def test_small_texts_have_at_least_one_of_each(tmp_path, count):
    for start in range(20):
        path = tmp_path / f"{start}.jsonl"
        path.write_text("\n".join(json.dumps(f"{start} story {i}") for i in range(count)), encoding="utf-8")
        train, val = split([path])
        assert train and val and len(train) + len(val) == count


def test_the_split_does_not_depend_on_files_or_order(tmp_path):
    texts = [f"story {i}" for i in range(400)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, reversed(texts[:200]))), encoding="utf-8")
    (tmp_path / "b.txt").write_text(documents.SEPARATOR.join(texts[200:]), encoding="utf-8")
    together = split([tmp_path / "one.jsonl"])[1]
    assert sorted(split([tmp_path / "a.jsonl", tmp_path / "b.txt"])[1]) == sorted(together) and together


@pytest.mark.parametrize("content, message", [("", "no text"), (" \n\n ", "no text"), ("alone", "only one document"),
                                              ("twin<|endoftext|>twin", "only one document")])
def test_too_little_text_is_an_error(tmp_path, content, message):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        find_val_threshold([tmp_path / "a.txt"])


def test_built_in_stories_are_the_fallback(tmp_path, capsys):
    source = corpus.default_source("data")
    assert source.as_posix() == "data/demo" and "synthetic" in capsys.readouterr().out
    files = find_files(source)
    assert len(files) == 10 and sum(1 for file in files for _ in read_documents(file)) == 20_000
    corpus.default_source("data")
    assert capsys.readouterr().out == ""
    (tmp_path / "data" / corpus.TINYSTORIES_DIR).mkdir()
    assert corpus.default_source("data").name == corpus.TINYSTORIES_DIR


def test_separator_across_a_chunk_border(tmp_path, monkeypatch):
    """Text without a space is split at LONGEST characters, but never inside a separator."""
    monkeypatch.setattr(documents, "MAX_DOCUMENT_CHARS", 64)
    monkeypatch.setattr(documents, "_CHUNK_CHARS", 256)
    for length in range(230, 275):
        (tmp_path / "a.txt").write_text("h" * length + documents.SEPARATOR + "b" * 10, encoding="utf-8")
        *first, last = read_documents(tmp_path / "a.txt")
        assert ("".join(first), last) == ("h" * length, "b" * 10)
