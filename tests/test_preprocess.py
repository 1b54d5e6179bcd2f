"""Step 2: contents of the shards, second runs, and failures."""
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, assert_user_error, count_words, learn_tokenizer, run_subprocess

import preprocess
import train_vocab
from extras.formats import llama2c
from tinyllm import corpus, demo_stories, documents, shards, workers
from tinyllm.cli import UserError
from tinyllm.files import save_json
from tokenizer import Tokenizer

STORIES = list(demo_stories.generate_stories(200))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Four source files of different kinds, and their tokenizer."""
    root = tmp_path_factory.mktemp("trained")
    folder = root / "texts"
    folder.mkdir()
    for i in range(0, 200, 50):
        part = STORIES[i:i + 50]
        if i == 100:
            (folder / "c.txt").write_text(documents.SEPARATOR.join(part), encoding="utf-8")
        elif i == 150:
            (folder / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, part)).encode()))
        else:
            records = json.dumps([{"text": text} for text in part])
            (folder / f"{'ab'[i // 50]}.json").write_text(records, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["train_vocab.py", "--data", "texts", "--vocab_size", "400"])
        train_vocab.main()
    return root


@pytest.fixture
def texts(trained, tmp_path, monkeypatch) -> Path:
    """A copy in the test's folder, with a shard for each file."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(corpus, "GROUP_BYTES", 1)
    monkeypatch.setattr(workers, "available_cores", lambda: 1)    # processes take time; tests ask for those they need
    return tmp_path / "texts"


def load() -> tuple[shards.ShardSet, Tokenizer]:
    vocabulary = Tokenizer("data/tok400.model")
    return shards.load_shards(Path("data/tok400"), vocabulary.sha256), vocabulary


def decoded(found, vocabulary, split) -> list[str]:
    ids = np.concatenate([found.memmap(shard) for shard in found.shards_of(split)])
    starts = [*np.flatnonzero(ids == vocabulary.bos_id), len(ids)]
    documents = [ids[a:b] for a, b in zip(starts, starts[1:])]
    assert all(document[-1] == vocabulary.eos_id for document in documents)
    return [vocabulary.decode(document.tolist()) for document in documents]


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("data/tok400").iterdir())}


def test_the_shards_hold_every_document_in_order(texts, run_in_process):
    run_in_process("preprocess")
    found, vocabulary = load()
    threshold = json.loads(Path("data/tok400.json").read_text(encoding="utf-8"))["val_threshold"]
    want = {split: [t for t in STORIES if (corpus.document_hash(t.encode()) <= threshold) == (split == "val")]
            for split in ("train", "val")}
    for split in ("train", "val"):
        assert decoded(found, vocabulary, split) == want[split] and want[split]
        assert found.total(split, "documents") == len(want[split])
        assert found.total(split, "bytes") == sum(len(text.encode()) for text in want[split])
    assert [shard.file for shard in found.shards_of("train")] == [f"train_{i:04d}.bin" for i in range(4)]
    assert [source.name for shard in found.shards_of("train") for source in shard.sources] == \
        ["a.json", "b.json", "c.txt", "d.jsonl.gz"]


def test_validation_text_never_reaches_the_vocabulary(texts, run_in_process, monkeypatch):
    seen = {}
    train = train_vocab.train_tokenizer
    monkeypatch.setattr(train_vocab, "train_tokenizer", lambda counts, size: seen.update(counts) or train(counts, size))
    run_in_process("train_vocab", "--data", texts, "--vocab_size", 400)
    run_in_process("preprocess")
    assert seen == count_words(decoded(*load(), "train")) != count_words(STORIES)


def test_the_number_of_workers_changes_nothing(texts, run_in_process):
    one = None
    for count in (1, 3):
        run_in_process("train_vocab", "--data", texts, "--vocab_size", 400, "--num_workers", count)
        run_in_process("preprocess", "--num_workers", count)
        one = one or (contents(), Path("data/tok400.model").read_bytes())
        assert (contents(), Path("data/tok400.model").read_bytes()) == one
        shutil.rmtree("data/tok400")


def test_a_second_run_does_nothing(texts, run_in_process, monkeypatch):
    run_in_process("preprocess")
    before = contents()
    monkeypatch.setattr(preprocess, "write_shards", None)       # would fail if it were called
    run_in_process("preprocess")
    assert contents() == before


@pytest.mark.parametrize("damage", ["changed", "cut", "deleted"])
def test_second_run_updates_missing_or_changed_shards(texts, run_in_process, monkeypatch, damage):
    run_in_process("preprocess")
    before = contents()
    if damage == "changed":
        (texts / "b.json").write_text(json.dumps(STORIES[50:99]), encoding="utf-8")
    elif damage == "cut":
        Path("data/tok400/train_0001.bin").write_bytes(before["train_0001.bin"][:-2])
    else:
        Path("data/tok400/val_0001.bin").unlink()
    done = []
    run = workers.run_jobs
    monkeypatch.setattr(workers, "run_jobs", lambda write, jobs, *args: done.extend(jobs) or run(write, jobs, *args))
    run_in_process("preprocess")
    assert [job.index for job in done] == [1]
    after = contents()
    assert after.keys() == before.keys() and (after == before) == (damage != "changed")
    different = {name for name in after if after[name] != before[name]}
    assert different <= {"train_0001.bin", "val_0001.bin", "manifest.json"}


def test_fewer_sources_leave_no_stale_shards(texts, run_in_process):
    run_in_process("preprocess")
    (texts / "d.jsonl.gz").unlink()
    run_in_process("preprocess")
    assert sorted(contents()) == ["manifest.json", *(f"{s}_{i:04d}.bin" for s in ("train", "val") for i in range(3))]


def test_next_command_has_the_flags_it_needs(texts, run_in_process, capsys):
    """The flags are for a second vocabulary and a new folder."""
    def following() -> str:
        return capsys.readouterr().out.partition("next: ")[2].split("\n")[0]
    run_in_process("train_vocab", "--data", texts, "--data_dir", "mine", "--vocab_size", 300)
    assert following() == "python preprocess.py --data_dir mine"
    run_in_process("train_vocab", "--data", texts, "--data_dir", "mine", "--vocab_size", 301)
    assert following() == "python preprocess.py --data_dir mine --vocab_size 301"
    run_in_process("preprocess", "--data_dir", "mine", "--vocab_size", 301)
    assert following() == "python train.py --data_dir mine --vocab_size 301"
    with pytest.raises(UserError, match="no mine.tok300.*\n.*preprocess.py --data_dir mine --vocab_size 300"):
        run_in_process("train", "--data_dir", "mine", "--vocab_size", 300)


def test_missing_text_lists_existing_ones(texts, run_in_process):
    for folder in "data/mine", "data/yours":
        run_in_process("train_vocab", "--data", texts, "--data_dir", folder, "--vocab_size", 300)
    run_in_process("preprocess", "--data_dir", "data/mine")
    with pytest.raises(UserError, match="no vocabulary in .*mime; did you mean data.mine\\?\n *make one: "
                       "python train_vocab.py --data_dir data.mime"):
        run_in_process("train", "--data_dir", "data/mime")
    with pytest.raises(UserError, match="no data.yours.tok300.*\n +run python preprocess.py --data_dir data.yours$"):
        run_in_process("train", "--data_dir", "data/yours")


@pytest.mark.parametrize("script", ["train_vocab", "preprocess"])
def test_wrong_encoding_names_file_and_flag(texts, run_in_process, script):
    wrong = texts / "e.txt"
    wrong.write_bytes("你好".encode("gbk"))
    with pytest.raises(UserError, match="e.txt: this is not UTF-8 text.*\n.*--encoding gb18030"):
        run_in_process(script, "--data", texts, "--num_workers", 2)
    for name, message in [("utf-16", "e.txt: this is not utf-16 text"), ("gbkk", "unknown encoding 'gbkk'"),
                          ("base64", "unknown encoding 'base64'")]:
        with pytest.raises(UserError, match=message):
            run_in_process(script, "--data", wrong, "--encoding", name)


@pytest.mark.parametrize("name", ["2.txt", "2.txt.gz", "2.jsonl"])
def test_encodings_give_the_same_text(run_in_process, tmp_path, name):
    """Step 2 knows the encoding from step 1."""
    folder, stories = tmp_path / "mixed", [f"很久以前，有{i}只熊。" for i in range(40)]
    content = "\n".join(map(json.dumps, stories)) if name.endswith("jsonl") else "<|endoftext|>".join(stories)
    content = content.encode().decode("unicode_escape") if name.endswith("jsonl") else content
    folder.mkdir()
    found = []
    for encoding in "utf-8", "gb18030":
        written = content.encode(encoding)
        (folder / name).write_bytes(gzip.compress(written) if name.endswith("gz") else written)
        (folder / "1.txt").write_bytes("从前<|endoftext|>有一天".encode(encoding))
        run_in_process("train_vocab", "--data", folder, "--vocab_size", 300, "--encoding", encoding)
        run_in_process("preprocess")
        shard_set = shards.read_manifest(Path("data/tok300"))
        found.append((Path("data/tok300.model").read_bytes(), [shard.sha256 for shard in shard_set.shards]))
    assert found[0] == found[1]
    run_in_process("preprocess", "--encoding", "big5")
    assert [shard.sha256 for shard in shards.read_manifest(Path("data/tok300")).shards] != found[0][1]


def test_broken_source_keeps_finished_shards(texts, run_in_process):
    good = (texts / "c.txt").read_bytes()
    (texts / "c.txt").write_bytes(good + b"\xff")
    with pytest.raises(UserError, match="c.txt: this is not UTF-8 text"):
        run_in_process("preprocess", "--num_workers", 2)
    assert "manifest.json" not in contents() and "manifest.part.json" in contents()
    assert not [name for name in contents() if name.endswith(".tmp")]
    (texts / "c.txt").write_bytes(good)
    run_in_process("preprocess")
    mended = contents()
    shutil.rmtree("data/tok400")
    run_in_process("preprocess")
    assert contents() == mended


HARD = ["小猫 坐在\n垫子上。", "▁a ▁ b", "Łódź, naïve café 🙂👍🏽", "  lead\ttab\r\n\n x", "الطائر والقط",
        "0123 4567", "e\u0301 ﬁ½"]


def test_ids_equal_the_plain_implementation(texts, run_in_process):
    """Encode each document with SentencePiece, for text in several languages, and run --verify."""
    (texts / "e.json").write_text(json.dumps(HARD * 3 + STORIES[:5]), encoding="utf-8")
    run_in_process("preprocess", "--data", texts)
    shard_set, vocabulary = load()
    threshold, expected = shard_set.val_threshold, {"train": [], "val": []}
    for path in corpus.find_files(texts):
        for text in documents.read_documents(path):
            split = "val" if corpus.document_hash(text.encode()) <= threshold else "train"
            ids = vocabulary.encode(text, bos=True, eos=True)
            expected[split] += ids
            assert vocabulary.decode(ids) == text
    for split, ids in expected.items():
        assert np.concatenate([shard_set.memmap(shard) for shard in shard_set.shards_of(split)]).tolist() == ids
    with pytest.raises(UserError, match="bash test.sh -k preprocess"):
        run_in_process("preprocess", "--verify")


def test_repeated_validation_documents_give_a_note(run_in_process, capsys):
    texts = ["the same story", "another one"]
    often = min(texts, key=lambda text: corpus.document_hash(text.encode()))
    Path("a.jsonl").write_text("".join(f'"{text}"\n' for text in texts + 500 * [often]), encoding="utf-8")
    run_in_process("train_vocab", "--data", "a.jsonl", "--vocab_size", 300)
    assert "note: 501 documents are for validation and only 1 for training" in capsys.readouterr().out


@pytest.mark.parametrize("script", [("train_vocab",), ("preprocess", "--tokenizer", "data/tok400.model")])
@pytest.mark.parametrize("folder", ["texts", "texts/vocabulary"])
def test_output_inside_the_text_is_refused(texts, run_in_process, folder, script):
    before = sorted(texts.iterdir())
    with pytest.raises(UserError, match="is in the text.*\n.*outside .*texts, such as --data_dir ../data"):
        run_in_process(*script, "--data", texts, "--data_dir", texts.parent / folder)
    assert sorted(texts.iterdir()) == before


def test_errors_after_a_failed_adoption(texts, run_in_process):
    shutil.move("data/tok400.model", "theirs.model")
    Path("data/tok400.json").unlink()
    (texts / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        run_in_process("preprocess", "--tokenizer", "theirs.model", "--data", texts)
    with pytest.raises(UserError, match="run python preprocess.py --data PATH$"):
        run_in_process("train")
    with pytest.raises(UserError, match="no tokenizer at their.model; did you mean theirs.model"):
        run_in_process("preprocess", "--tokenizer", "their.model", "--data", texts)


def test_invalid_vocab_size_is_refused_first(run_in_process):
    with pytest.raises(UserError, match="vocab_size 100 is too small"):
        run_in_process("train_vocab", "--data", "nowhere", "--vocab_size", 100)


def test_retrained_tokenizer_is_detected(texts, run_in_process):
    run_in_process("preprocess")
    (texts / "a.json").write_text(json.dumps(["entirely other words"] * 50 + STORIES[:3]), encoding="utf-8")
    run_in_process("train_vocab", "--data", texts, "--vocab_size", 400)
    with pytest.raises(UserError, match="another vocabulary"):
        load()
    run_in_process("preprocess")
    load()


def test_other_text_has_a_split(texts, run_in_process, tmp_path):
    (tmp_path / "mine.txt").write_text("One.<|endoftext|>Two.<|endoftext|>Three.", encoding="utf-8")
    run_in_process("preprocess", "--data", tmp_path / "mine.txt")
    found, vocabulary = load()
    assert sorted(decoded(found, vocabulary, "train") + decoded(found, vocabulary, "val")) == ["One.", "Three.", "Two."]


def test_foreign_vocabulary(texts, run_in_process):
    shutil.move("data/tok400.model", "theirs.model")
    Path("data/tok400.json").unlink()
    run_in_process("preprocess", "--tokenizer", "theirs.model", "--data", texts)
    found, vocabulary = load()
    assert vocabulary.sha256 == Tokenizer("theirs.model").sha256 and found.total("train", "documents") > 150
    made = contents()
    shutil.rmtree("data/tok400")
    run_in_process("preprocess")                          # it knows its text by now
    assert contents() == made
    Path("other.model").write_bytes(learn_tokenizer(STORIES[:40], 400).model)
    with pytest.raises(UserError, match="another vocabulary of that size"):
        run_in_process("preprocess", "--tokenizer", "other.model", "--data", texts)


def test_next_command_after_adopting_a_model(texts, byte_checkpoint, run_in_process, capsys):
    llama2c.write_tokenizer(Tokenizer("data/tok400.model"), Path("tokenizer.bin"))
    shutil.copy(byte_checkpoint, "weights.model")
    for name, expected in (("tokenizer.bin", "python train.py --data_dir own\n"),
                           ("weights.model", "python train.py --data_dir own2 --init_from weights.model --out_dir ")):
        data_dir = "own2" if "init" in expected else "own"
        run_in_process("preprocess", "--tokenizer", name, "--data", texts, "--data_dir", data_dir)
        assert capsys.readouterr().out.partition("next: ")[2].startswith(expected)


def test_large_vocabularies_get_32_bits(tmp_path):
    assert shards.token_dtype(65_536) == np.dtype("<u2") and shards.token_dtype(65_537) == np.dtype("<u4")


def unsealed(content: bytes) -> dict:
    return {name: value for name, value in json.loads(content).items() if name != "checksum"}


def sealed(content: dict) -> bytes:
    save_json("sealed.json", content)
    return Path("sealed.json").read_bytes()


@pytest.mark.parametrize("name, change, message", [
    ("train_0001.bin", lambda content: content[:-1], "damaged: .*train_0001.bin"),
    ("train_0001.bin", lambda content: content[:-2], "damaged: .*train_0001.bin"),
    ("train_0001.bin", lambda content: content + b"x", "damaged: .*train_0001.bin"),
    ("train_0001.bin", lambda content: content[:-1] + b"x", "damaged: .*train_0001.bin"),
    ("val_0000.bin", None, "missing or damaged: .*val_0000.bin"),
    ("manifest.json", None, "not tokenized yet"),
    ("manifest.json", lambda content: content[:100], "manifest.json is damaged"),
    ("manifest.json", lambda content: b"[]", "manifest.json is damaged"),
    ("manifest.json", lambda content: content.replace(b"true", b"false").replace(b"train_0", b"train_1"), "checksum"),
    ("manifest.json", lambda content: sealed({**unsealed(content), "format": 3}), "format 3"),
    ("manifest.json", lambda content: sealed({**unsealed(content), "shards": [{"file": "../x"}]}), "damaged")])
def test_damaged_shards_are_refused_by_name(texts, run_in_process, name, change, message):
    run_in_process("preprocess")
    path = Path("data/tok400") / name
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    with pytest.raises(UserError, match=message) as error:
        load()
    assert "python preprocess.py" in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody replace a file that is mapped")
def test_loaded_shards_outlive_their_files(texts, run_in_process):
    run_in_process("preprocess")
    found, vocabulary = load()
    shutil.rmtree("data/tok400")
    assert decoded(found, vocabulary, "val")


def test_from_the_command_line(texts):
    (texts / "b.json").write_text("[1]", encoding="utf-8")
    result = run_subprocess("preprocess", "--num_workers", "2")
    assert_user_error(result, "b.json: record 1: found int; expected a text")


def test_damaged_sidecar_is_refused(texts, run_in_process):
    Path("data/tok400.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="tok400.json is damaged"):
        run_in_process("preprocess")


def test_empty_split_is_an_error(texts, run_in_process):
    (texts / "keep.json").write_text("[]", encoding="utf-8")
    threshold = json.loads(Path("data/tok400.json").read_text(encoding="utf-8"))["val_threshold"]
    train_only = list(islice((t for t in STORIES if corpus.document_hash(t.encode()) > threshold), 20))
    for path in texts.iterdir():
        path.unlink()
    (texts / "a.json").write_text(json.dumps(train_only), encoding="utf-8")
    with pytest.raises(UserError, match="is for val"):
        run_in_process("preprocess")
    assert not Path("data/tok400/manifest.json").exists()


def test_text_is_required_without_the_sidecar(texts, run_in_process):
    run_in_process("preprocess")
    before = contents()
    Path("data/tok400.json").unlink()
    with pytest.raises(UserError, match="--data PATH"):
        run_in_process("preprocess")
    assert contents() == before
    run_in_process("preprocess", "--data", texts)


def test_a_killed_run_leaves_no_workers_behind(texts, tmp_path):
    """Orphaned workers would write into the files of the next run."""
    for path in texts.iterdir():
        path.unlink()
    (texts / "long.jsonl").write_text("\n".join(map(json.dumps, STORIES * 100)), encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(ROOT / "preprocess.py"), "--data", str(texts)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    temporary = Path("data/tok400/train_0000.bin.tmp")
    while not (temporary.exists() and temporary.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    result = run_subprocess("preprocess", "--data", texts)
    assert result.returncode == 0, result.stderr
    assert load()[0].total("train", "documents") + load()[0].total("val", "documents") == len(STORIES) * 100


def test_next_command_has_its_own_out_dir(ckpt, capsys):
    Path("output/tuned").mkdir(parents=True)
    preprocess.print_next_step(SimpleNamespace(tokenizer=str(ckpt)), Path("data/tok512.model"))
    assert f"--out_dir {Path('output/tuned-1')} " in capsys.readouterr().out
