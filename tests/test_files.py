"""Files are complete or missing."""
import errno
import hashlib
import os
import stat

import pytest

from tinyllm.cli import UserError
from tinyllm.files import atomic_replace, atomic_write, sha256
from tinyllm.project import find_tokenizer, path_flags, tokenizer_files


def test_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_target_appears_only_when_complete(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"content")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"content" and len(list(path.parent.iterdir())) == 1


def test_leftovers_of_a_kill_are_overwritten(tmp_path):
    (tmp_path / "a.bin.tmp").write_bytes(b"a longer piece of an earlier try")
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert (tmp_path / "a.bin").read_bytes() == b"x"


def test_replace_takes_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"1")
    atomic_replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "f").exists() and not (tmp_path / "a").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows needs no flush of a folder")
@pytest.mark.parametrize("number, works", [(errno.EINVAL, True), (errno.EIO, False)])
def test_folder_without_fsync(tmp_path, monkeypatch, number, works):
    """Some network drives refuse fsync of a folder; a broken disk is an error."""
    def fsync(handle, real=os.fsync):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    try:
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"content")
    except OSError as error:
        assert not works and error.errno == number
    else:
        assert works and (tmp_path / "a.bin").read_bytes() == b"content"


def test_sha256_equals_hashlib(tmp_path):
    content = bytes(range(256)) * 9000
    (tmp_path / "f").write_bytes(content)
    assert sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_vocabulary_without_size_in_its_name(tmp_path):
    foo, other, sized = tmp_path / "tokfoo.model", tmp_path / "tokenizer.model", tmp_path / "tok512.model"
    foo.touch()
    assert find_tokenizer(tmp_path) == foo and path_flags(foo)["vocab_size"] == ""
    other.touch()
    with pytest.raises(UserError, match=r"vocabularies \(tokenizer.model, tokfoo.model\)\n"):
        find_tokenizer(tmp_path)
    sized.touch()
    with pytest.raises(UserError, match="choose one with --vocab_size, or delete the others"):
        find_tokenizer(tmp_path)
    assert tokenizer_files(tmp_path) == [other, foo, sized] and find_tokenizer(tmp_path, 512) == sized
    assert path_flags(foo)["vocab_size"] == "" and path_flags(sized)["vocab_size"] == "512"
