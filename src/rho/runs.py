"""Stage folders: atomic files, manifests, fingerprints and freshness.

A stage is a function from a config and input folders to one output folder. The folder's `manifest.json` says what it
was made from and what it holds. It is written twice: when the stage starts (`"status": "running"`), so that a rerun
knows it continues the same work, and when it ends (`"complete"`), after every output is on disk.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from rho.errors import ConfigError, DataError, MismatchError, RhoError
from rho.progress import say

MANIFEST = "manifest.json"
LOCK = ".lock"
FORMAT = 1
MADE_FROM = ("stage", "config", "inputs")
ADVICE = {  # for what the system refuses a program that is right
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "make the folder writable",
    errno.EACCES: "fix the permissions",
    errno.EPERM: "fix the permissions",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the limit of open files (`fs.file-max`)",
    errno.ENAMETOOLONG: "give a shorter name",
}


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` whole or not at all.

    Temporary file in the same folder, fsync, rename, fsync of the folder. If anything fails, what stood at `path`
    before is untouched and the temporary file is gone.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        advice = ADVICE.get(error.errno or 0, "look at the disk")
        raise RhoError(
            f"{path}: could not be written ({error.strerror or error}). What was there before is unchanged; "
            f"{advice}, then run the same command again to continue."
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def refusal(error: BaseException, place: str | os.PathLike[str] | None = None) -> RhoError | None:
    """What to tell a user whose system refused a file; None for any other error.

    Args:
        error: of Python, or of a library in another language, which has only the words of it.
        place: where the work is, for an error that names no file.
    """
    number = getattr(error, "errno", None)
    if number not in ADVICE:
        number = next((known for known in ADVICE if os.strerror(known) in str(error)), None)
    if number is None or isinstance(error, RhoError):
        return None
    named, said = getattr(error, "filename", None) or place, getattr(error, "strerror", None) or str(error)
    words = os.strerror(number) if said == os.strerror(number) else f"{os.strerror(number)} ({said})"
    return RhoError(
        f"{f'{named}: ' if named else ''}{words}. What was finished is kept: {ADVICE[number]}, then run the same "
        "command again to go on."
    )


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it, unless it is there.

    Raises:
        RhoError: the system refuses it, or a file stands in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise RhoError(f"{folder}: the folder can't be made ({why}). Choose another one.") from error


def write_json(path: Path, value: Any) -> None:
    """Atomically write `value` as indented JSON with sorted keys."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage_of(path: Path, recorded: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of which `sha256` and `bytes` were recorded; None if it is as it was written."""
    try:
        if path.stat().st_size != recorded["bytes"]:
            return f"{path.stat().st_size} bytes, {recorded['bytes']} were written"
        return None if hash_file(path) == recorded["sha256"] else "content changed"
    except OSError as error:  # missing, or the disk can't read it
        return error.strerror or str(error)


def hash_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass
class Manifest:
    """What a stage folder was made from and what it holds.

    `config` and `inputs` decide whether the folder is the one asked for; `outputs` maps each file to its SHA-256 and
    size in bytes; `facts` are what the stage found out and later stages need. `environment` (versions, seconds) is for
    people and is no part of the fingerprint.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    status: str = "running"

    @property
    def fingerprint(self) -> str:
        """Content hash: equal exactly when stage, config, inputs, outputs and facts are equal."""
        return hash_json([FORMAT, self.stage, self.config, self.inputs, self.outputs, self.facts])

    @property
    def made_from(self) -> str:
        """Content hash of what was asked for: stage, config and inputs."""
        return hash_json([getattr(self, what) for what in MADE_FROM])

    def write(self, folder: Path) -> None:
        """Commit this manifest to `folder`."""
        value = {"format": FORMAT, "fingerprint": self.fingerprint, **vars(self)}
        write_json(folder / MANIFEST, {**value, "sha256": hash_json(value)})


def read_manifest(folder: str | os.PathLike[str], stage: str | None = None) -> Manifest:
    """The manifest of a complete stage folder; a `DataError` if missing, damaged, unfinished or of another stage."""
    folder = Path(folder)
    manifest = load_manifest(folder)
    if manifest is None:
        raise DataError(
            f"{folder}: no {MANIFEST} here, so this is not a folder written by rho. Check the path, or "
            "run the stage that writes it first."
        )
    if stage is not None and manifest.stage != stage:
        raise DataError(f"{folder}: expected the output of stage '{stage}', found that of stage '{manifest.stage}'.")
    if manifest.status != "complete":
        raise DataError(f"{folder}: stage '{manifest.stage}' was not finished. Run it again: it continues.")
    return manifest


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a stage folder, finished or not; None if there is none, a `DataError` if it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
        checksum = value.pop("sha256", None)  # of what the fingerprint leaves out, too; others need not write it
        unchanged = checksum is None or (checksum == hash_json(value) and raw.endswith(b"\n"))
        fingerprint = value.pop("fingerprint")
        version = value.pop("format")
        if version != FORMAT:
            raise DataError(f"{path}: written in format {version}, this version of rho reads format {FORMAT}.")
        manifest = Manifest(**value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: damaged manifest ({error}). Restore it or remove the folder and rerun.") from error
    if manifest.fingerprint != fingerprint or not unchanged:
        raise DataError(f"{path}: the content does not match its own fingerprint. Restore it or remove the folder.")
    return manifest


def first_difference(expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key, in dotted form, at which two nested mappings differ, with both values; None if they are equal."""
    for key in sorted({*expected, *found}):
        a, b = expected.get(key), found.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if (inner := first_difference(a, b, f"{prefix}{key}.")) is not None:
                return inner
        elif a != b:
            return f"{prefix}{key}: asked for {a!r}, found {b!r}"
    return None


class Stage:
    """An output folder being made: use `open_stage`."""

    lock: FileLock

    def __init__(self, folder: Path, manifest: Manifest, fresh: bool) -> None:
        self.folder, self.manifest, self.fresh = folder, manifest, fresh
        self._started = time.monotonic()

    def add_output(self, name: str, sha256: str | None = None) -> None:
        """Record the finished file `name` (relative to the folder); its hash is computed unless given."""
        path = self.folder / name
        self.manifest.outputs[name] = {"sha256": sha256 or hash_file(path), "bytes": path.stat().st_size}

    def add_folder(self, name: str) -> None:
        """Record every file under the subfolder `name`."""
        for path in sorted((self.folder / name).rglob("*")):
            if path.is_file():
                self.add_output(path.relative_to(self.folder).as_posix())

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Of a shared stage: nobody else is in here. False where somebody else has finished the stage meanwhile."""
        with self.lock:  # however long another takes to hash what it finishes; a dead one's lock is free
            found = load_manifest(self.folder)
            finished = found is not None and found.status == "complete"
            if finished:
                assert found is not None
                self.manifest = found
            yield not finished

    def checkpoint(self) -> None:
        """Commit what is recorded so far, so that an interrupted stage can continue from it."""
        self.manifest.write(self.folder)

    def finish(self, **facts: Any) -> Manifest:
        """Commit the folder as complete."""
        self.manifest.facts.update(facts)
        self.manifest.environment |= {**environment(), "seconds": round(time.monotonic() - self._started, 2)}
        self.manifest.status = "complete"
        self.manifest.write(self.folder)
        return self.manifest


@contextmanager
def open_stage(
    folder: str | os.PathLike[str],
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    follow: bool = False,
    shared: bool = False,
) -> Iterator[Stage]:
    """Open `folder` to run `stage` in it: new, to be continued, or `fresh` (complete and made from just this).

    Args:
        folder: the output folder; made if missing.
        stage: the stage's name.
        config: every setting that changes the result, as JSON values.
        inputs: name -> content hash of everything read.
        follow: another process leads this stage: neither lock nor write.
        shared: other processes may work in the folder at the same time; `Stage.alone` is for what only one may do.

    Raises:
        MismatchError: the folder was made from another config or other inputs; the first differing key is named.
        RhoError: another process works in the folder, or the disk is full.
    """
    folder = Path(folder)
    asked = Manifest(stage, json.loads(json.dumps(config)), dict(inputs))
    if follow:
        found = load_manifest(folder)
        yield Stage(folder, asked, fresh=found is not None and _is_fresh(folder, found))
        return
    lock = FileLock(folder / LOCK)
    make_folder(folder)
    try:
        lock.acquire(timeout=-1 if shared else 0)
    except Timeout:
        raise RhoError(
            f"{folder}: another rho process is writing here. Wait for it or choose another folder."
        ) from None
    except OSError as error:
        raise RhoError(f"{folder}: the folder can't be written to ({error.strerror}). Choose another one.") from error
    try:
        entered = _enter(folder, asked)
        entered.lock = lock
        if shared:
            lock.release()
        yield entered
    except Exception as error:
        full = shutil.disk_usage(folder).free < 2**20  # torch has neither number nor words for it
        told = refusal(OSError(errno.ENOSPC, str(error)) if full else error, folder)
        if told is None or isinstance(error, RhoError):
            raise
        raise told from error
    finally:
        lock.release()


def _enter(folder: Path, asked: Manifest) -> Stage:
    found = load_manifest(folder)
    if found is None or _nothing_made(folder, found):
        _check_empty(folder)
        asked.write(folder)
        return Stage(folder, asked, fresh=False)
    _check_made_from(folder, asked, found)
    if fresh := _is_fresh(folder, found):
        say(f"{found.stage} {folder}: fresh")
    else:
        was_complete, found.status = found.status == "complete", "running"
        for name in _missing_outputs(folder, found):
            del found.outputs[name]
        if was_complete:
            found.write(folder)
    return Stage(folder, found, fresh)


def _is_fresh(folder: Path, found: Manifest) -> bool:
    return found.status == "complete" and not _missing_outputs(folder, found)


def _nothing_made(folder: Path, found: Manifest) -> bool:
    """Whether a run failed before its first file: a corrected command may start in the same folder."""
    left = {name for name in _files(folder) if not (name.startswith(".") and name.endswith((".lock", ".probe.json")))}
    return found.status == "running" and not found.outputs and left <= {MANIFEST}


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def is_made_from(folder: Path, asked: Manifest) -> bool:
    """Whether a folder's manifest has the stage, config and inputs asked for."""
    found = load_manifest(folder)
    return found is not None and all(getattr(found, what) == getattr(asked, what) for what in MADE_FROM)


def _check_empty(folder: Path) -> None:
    """Refuse to start a stage among files that are not its own."""
    strangers = sorted(name for name in _files(folder) if name != MANIFEST and not name.startswith("."))
    if strangers:
        raise ConfigError(
            f"{folder}: holds files that rho did not write ({', '.join(strangers[:3])}). Choose an empty folder."
        )


def _check_made_from(folder: Path, asked: Manifest, found: Manifest) -> None:
    """Refuse a folder that another stage, config or set of inputs made, naming the first difference."""
    for what in MADE_FROM:
        difference = first_difference({what: getattr(asked, what)}, {what: getattr(found, what)})
        if difference is not None:
            raise MismatchError(
                f"{folder}: was made otherwise. {difference}. Nothing was changed: "
                "choose another output folder, restore the setting or input, or remove this folder to make it anew."
            )


def _missing_outputs(folder: Path, manifest: Manifest) -> list[str]:
    """Outputs that don't exist with their recorded size (contents are checked where they are read)."""

    def present(name: str) -> bool:
        path = folder / name
        return path.is_file() and path.stat().st_size == manifest.outputs[name]["bytes"]

    return [name for name in manifest.outputs if not present(name)]


def environment() -> dict[str, str]:
    """Versions that a reader of the results wants to know."""
    names = ("rho-lm", "torch", "transformers", "tokenizers", "pyarrow", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}
