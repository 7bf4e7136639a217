"""Stage folders: atomic files, manifests, refusals and freshness."""

import errno
import json
import os
import re
from pathlib import Path

import pytest

from rho import runs
from rho.errors import ConfigError, DataError, MismatchError, RhoError
from rho.runs import MANIFEST, Manifest, atomic_write, first_difference, hash_file, open_stage, read_manifest

CONFIG = {"ratio": 0.6, "train": {"seed": 0}}
INPUTS = {"corpus": "aa"}


def make(folder: Path, config: dict = CONFIG, inputs: dict = INPUTS, name: str = "toy") -> bool:
    """A stage with one output; whether it was fresh."""
    with open_stage(folder, name, config, inputs) as stage:
        if not stage.fresh:
            with atomic_write(folder / "out.txt") as file:
                file.write(b"result")
            stage.add_output("out.txt")
            stage.finish(answer=42)
        return stage.fresh


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_half_and_fail(path: Path, error: BaseException) -> None:
    with atomic_write(path) as file:
        file.write(b"half of the n")
        raise error


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RhoError if isinstance(error, OSError) else type(error)):
        write_half_and_fail(path, error)
    assert content(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(runs.os, call, no_space)
    with (
        pytest.raises(RhoError, match=f"{path}: could not be written .No space left") as caught,
        atomic_write(path) as f,
    ):
        f.write(b"new")
    assert "run the same command again" in str(caught.value)
    assert content(tmp_path) == {"file": b"old"}


def test_a_full_disk_reported_by_another_library_is_an_error_without_its_traceback(tmp_path):
    with pytest.raises(RhoError, match="s: No space left on device"), open_stage(tmp_path / "s", "toy", CONFIG, INPUTS):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENAMETOOLONG])
def test_what_the_system_refuses_is_an_error_that_names_the_file(tmp_path, number):
    said = re.escape(f"x/model.bin: {os.strerror(number)}. What was finished is kept: {runs.ADVICE[number]}, then run")
    with pytest.raises(RhoError, match=said), open_stage(tmp_path / "s", "toy", CONFIG, INPUTS):
        raise OSError(number, os.strerror(number), "x/model.bin")


def test_an_error_that_is_not_about_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError), open_stage(tmp_path / "s", "toy", CONFIG, INPUTS):
        _ = 1 / 0


def test_an_atomic_write_replaces_the_file(tmp_path):
    for text in (b"one", b"two"):
        with atomic_write(tmp_path / "file") as file:
            file.write(text)
    assert content(tmp_path) == {"file": b"two"}


def test_a_finished_stage_is_fresh_and_untouched_by_a_second_run(tmp_path, capsys):
    assert not make(tmp_path)
    before, times = content(tmp_path), [p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != ".lock"]
    assert make(tmp_path)
    assert f"toy {tmp_path}: fresh" in capsys.readouterr().err
    assert content(tmp_path) == before
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != ".lock"] == times


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"resul")])
def test_a_stage_with_a_missing_or_shorter_output_is_run_again(tmp_path, harm):
    make(tmp_path)
    harm(tmp_path / "out.txt")
    with open_stage(tmp_path, "toy", CONFIG, INPUTS) as stage:
        assert not stage.fresh
        assert stage.manifest.outputs == {}, "a rerun must not take the missing output for done"
    assert not make(tmp_path)
    assert make(tmp_path)


def test_an_unfinished_stage_is_continued_from_what_it_recorded(tmp_path):
    with open_stage(tmp_path, "toy", CONFIG, INPUTS) as stage:
        (tmp_path / "part").write_bytes(b"1")
        stage.add_output("part")
        stage.checkpoint()
    with pytest.raises(DataError, match="was not finished"):
        read_manifest(tmp_path)
    with open_stage(tmp_path, "toy", CONFIG, INPUTS) as stage:
        assert not stage.fresh
        assert list(stage.manifest.outputs) == ["part"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {**CONFIG, "ratio": 0.5}}, "config.ratio: asked for 0.5, found 0.6"),
        ({"config": {**CONFIG, "train": {"seed": 1}}}, "config.train.seed: asked for 1, found 0"),
        ({"inputs": {"corpus": "bb"}}, "inputs.corpus: asked for 'bb', found 'aa'"),
        ({"inputs": {**INPUTS, "scores": "cc"}}, "inputs.scores: asked for 'cc', found None"),
        ({"name": "other"}, "stage: asked for 'other', found 'toy'"),
    ],
)
def test_a_folder_made_otherwise_is_refused_with_the_differing_key(tmp_path, change, named):
    make(tmp_path)
    before = content(tmp_path)
    with pytest.raises(MismatchError) as caught:
        make(tmp_path, **change)
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert content(tmp_path) == before


def test_a_stage_that_failed_before_its_first_file_can_be_corrected_and_run_again(tmp_path):
    with pytest.raises(DataError), open_stage(tmp_path, "toy", CONFIG, INPUTS):
        raise DataError("a bad line in the input")
    assert not make(tmp_path, {**CONFIG, "skip_bad_records": True})


def test_an_empty_subfolder_is_nothing_made(tmp_path):
    with pytest.raises(ZeroDivisionError), open_stage(tmp_path / "s", "toy", CONFIG, INPUTS):
        (tmp_path / "s" / "checkpoints").mkdir()
        _ = 1 / 0
    assert make(tmp_path / "s", {"other": 1}) is False


def test_a_stage_that_made_something_is_not_started_anew_with_another_config(tmp_path):
    with pytest.raises(DataError), open_stage(tmp_path, "toy", CONFIG, INPUTS):
        (tmp_path / ".unfinished").write_bytes(b"half an hour of work")
        raise DataError("later")
    with pytest.raises(MismatchError, match=r"config\.ratio"):
        make(tmp_path, {**CONFIG, "ratio": 0.5})


@pytest.mark.parametrize("stranger", ["thesis.txt", "model/weights"])
def test_a_folder_with_strange_files_is_refused(tmp_path, stranger):
    (tmp_path / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / stranger).write_bytes(b"precious")
    with pytest.raises(ConfigError, match=f"{stranger.split('/')[0]}.*Choose an empty folder"):
        make(tmp_path)
    assert not (tmp_path / MANIFEST).exists()


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    with open_stage(tmp_path, "toy", CONFIG, INPUTS) as stage:
        with pytest.raises(RhoError, match="another rho process is writing here"):
            make(tmp_path)
        stage.finish()
    assert make(tmp_path)


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_stage(tmp_path, "toy", CONFIG, INPUTS):
        raise KeyboardInterrupt
    assert not make(tmp_path)


def test_an_output_folder_that_can_not_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RhoError, match="file/out: the folder can't be made"):
        make(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"ratio": 0.6', b'"ratio": 0.5'), (b'"answer": 42', b'"answer": 43'), (b'"corpus": "aa"', b'"corpus": "ab"')],
)
def test_an_edited_manifest_is_noticed(tmp_path, old, new):
    make(tmp_path)
    raw = (tmp_path / MANIFEST).read_bytes()
    assert old in raw
    (tmp_path / MANIFEST).write_bytes(raw.replace(old, new))
    with pytest.raises(DataError, match="does not match its own fingerprint"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"3", b'"text"', b"\xff\xfe", b"{}", b'{"format": 1}'])
def test_a_damaged_manifest_is_an_error(tmp_path, damage):
    make(tmp_path)
    (tmp_path / MANIFEST).write_bytes(damage)
    with pytest.raises(DataError, match="damaged manifest"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="damaged manifest"):
        make(tmp_path)


def test_a_manifest_of_another_format_is_refused(tmp_path):
    make(tmp_path)
    value = json.loads((tmp_path / MANIFEST).read_bytes())
    (tmp_path / MANIFEST).write_text(json.dumps({**value, "format": 2}))
    with pytest.raises(DataError, match="format 2, this version of rho reads format 1"):
        read_manifest(tmp_path)


def test_reading_a_folder_without_manifest_or_of_another_stage_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not a folder written by rho"):
        read_manifest(tmp_path / "nowhere")
    make(tmp_path)
    with pytest.raises(DataError, match="expected the output of stage 'corpus', found that of stage 'toy'"):
        read_manifest(tmp_path, "corpus")


def test_the_fingerprint_is_that_of_the_content_not_of_time_and_place(tmp_path):
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        make(folder)
        made.append(read_manifest(folder, "toy"))
    assert made[0].fingerprint == made[1].fingerprint
    assert made[0].fingerprint != Manifest("toy", CONFIG, INPUTS).fingerprint


def test_outputs_are_recorded_with_hash_and_size(tmp_path):
    with open_stage(tmp_path, "toy", CONFIG, INPUTS) as stage:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "b").write_bytes(b"12345")
        stage.add_folder("sub")
        stage.finish()
    expected = {"sub/b": {"sha256": hash_file(tmp_path / "sub" / "b"), "bytes": 5}}
    assert read_manifest(tmp_path).outputs == expected


def test_the_first_difference_of_nested_mappings_is_named_in_dotted_form():
    assert first_difference({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 2}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b: asked for 1, found 2"
    assert first_difference({"a": {"b": 1}}, {"a": 3}) == "a: asked for {'b': 1}, found 3"


def test_one_who_follows_sees_a_stage_as_fresh_as_the_one_who_leads(tmp_path):
    make(tmp_path / "s")
    for expected in (True, False):
        if not expected:
            (tmp_path / "s" / "out.txt").unlink()
        with open_stage(tmp_path / "s", "toy", CONFIG, INPUTS, follow=True) as follower:
            assert follower.fresh is expected
        with open_stage(tmp_path / "s", "toy", CONFIG, INPUTS) as leader:
            assert leader.fresh is expected
