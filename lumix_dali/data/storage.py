"""Folders and files, local or wherever fsspec reaches (``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://``).

Remote shards are copied whole into a `Cache` that several processes share.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout

_SILENCE = 60  # seconds without a byte after which a server is given up
_WAITS = (0.5, 2, 8)  # seconds before another try
_QUESTIONS = 16  # requests that a server gets at once
_COPY = re.compile(r"/[0-9a-f]{64}(\.part)?$")
# Best first. Only one is used: a listing may contain fewer than a request for one file.
_VERSIONS: tuple[str, ...] = ("ETag", "etag", "md5Hash", "blob_id", "checksum", "Content-MD5", "Digest", "LastModified")
_VERSIONS += ("Last-Modified", "last_modified", "updated", "mtime", "created")
_Answer = TypeVar("_Answer")
StrPath = str | os.PathLike[str]


class Missing(ValueError):
    """A file or object that does not exist."""


class Entry(NamedTuple):
    """A file: its size in bytes (None: the server does not tell) and a text that changes when its content does."""

    size: int | None
    version: str


def is_remote(path: StrPath) -> bool:
    """Whether fsspec has to read `path`."""
    return "://" in os.fspath(path)


def join(root: str, name: str) -> str:
    """Path of `name` in `root`; an absolute or remote name stays unchanged."""
    return name if is_remote(name) else os.path.join(root, name)


def split(path: str) -> tuple[str, str]:
    """Folder and name of a file."""
    folder, name = os.path.split(path)
    return (f"{folder.rstrip('/')}//" if folder.rstrip("/").endswith(":") and is_remote(path) else folder), name


def listing(root: str, deep: bool = False) -> dict[str, Entry]:
    """The files in `root`, or with `deep` at any depth below it (remote only), by relative name.

    Raises:
        Missing: the folder does not exist.
        ValueError: the storage cannot be read.
    """
    if not is_remote(root):
        try:
            with os.scandir(root or ".") as entries:
                return {entry.name: _local_entry(entry) for entry in entries if entry.is_file()}
        except OSError as error:
            raise Missing(f"source={root!r}: {error.strerror}; give a folder that exists") from error
    found = _fresh(root, lambda fs, path: fs.find(path, detail=True).values() if deep else fs.ls(path, detail=True))
    prefix = _ask(root, lambda fs, path: path.rstrip("/") + "/")
    return {
        item["name"].removeprefix(prefix): Entry(item["size"], _version(item))
        for item in found
        if item["type"] == "file" and item["name"].startswith(prefix)
    }


def matching(pattern: str) -> list[str]:
    """Remote files whose names match a glob."""
    root = re.split(r"[^/]*[*?\[]", pattern, maxsplit=1)[0]  # so that a file has one name, however it is found
    found = _fresh(pattern, lambda fs, path: [name.removeprefix(fs._strip_protocol(root)) for name in fs.glob(path)])
    return [root + name.lstrip("/") for name in found]


def is_folder(path: str) -> bool:
    """Whether this is an existing folder."""
    return _fresh(path, lambda fs, name: bool(fs.isdir(name))) if is_remote(path) else os.path.isdir(path)


def has_folders(root: str) -> bool:
    """Whether `root` contains folders that are not hidden."""
    if is_remote(root):
        found = _fresh(root, lambda fs, path: fs.ls(path, detail=True))
        folders = [item["name"].rstrip("/").rpartition("/")[2] for item in found if item["type"] == "directory"]
        return any(name[0] != "." for name in folders)
    with os.scandir(root) as entries:
        return any(is_dir(entry) and entry.name[0] != "." for entry in entries)


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder or a link to one; `os.DirEntry.is_dir` fails for a link to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def read_bytes(path: StrPath) -> bytes:
    """The content of a file.

    Raises:
        Missing: it does not exist.
        ValueError: the storage cannot be read.
    """
    if is_remote(path):
        content: bytes = _ask(os.fspath(path), lambda fs, name: fs.cat_file(name))
        return content
    with open(path, "rb") as file:
        return file.read()


def entry(path: str) -> Entry:
    """Size and version of one file.

    Raises:
        Missing: it does not exist.
    """
    if is_remote(path):
        info = _fresh(path, lambda fs, name: fs.info(name))
        return Entry(info["size"], _version(info))
    try:
        return _local_entry(Path(path))
    except OSError as error:
        raise Missing(f"source={path!r}: no such file; give one that exists ({error.strerror})") from error


def entries(paths: Sequence[str]) -> list[Entry]:
    """`entry` of each of these."""
    with ThreadPoolExecutor(_QUESTIONS) as pool:
        return list(pool.map(entry, paths))


@contextmanager
def replacing(path: StrPath) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` once it is complete; a failure leaves nothing behind."""
    path = os.path.abspath(path)
    part = os.path.join(os.path.dirname(path), f".part-{uuid4().hex}")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # it may not have been opened
            os.remove(part)
        if isinstance(error, OSError) and error.filename is None:  # such as a full disk
            error.filename = path
        raise


def cache_folder() -> str:
    """The folder for indices and copies of remote shards: ``$LUMIX_DALI_CACHE``, else in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("LUMIX_DALI_CACHE") or os.path.join(home, "lumix_dali")


def locked(path: str, wait: bool = True) -> FileLock:
    """A context that holds the lock file `path`; other processes and threads wait for it.

    Raises:
        filelock.Timeout: another one holds it, and `wait` is False.
    """
    return FileLock(path, blocking=wait, thread_local=False)


class Cache:
    """Local copies of remote files, limited in size and shared by any number of processes.

    fsspec's own `filecache` is not safe across processes, takes an interrupted copy for a complete one, and serves the
    old file after the remote one has changed. Here a copy gets its name once it is complete, the name depends on the
    remote file's size and version, and readers hold descriptors, which stay valid after a file is removed.

    Args:
        folder: of the copies; created if it does not exist.
        limit: total bytes of the copies; beyond it, the least recently opened copies are removed.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def path(self, url: str, remote: Entry) -> str:
        """The path of the copy of `url` in this version, whether or not it exists."""
        name = hashlib.sha256(f"{url}\0{remote.size}\0{remote.version}".encode("utf-8", "surrogateescape"))
        return os.path.join(self.folder, name.hexdigest())

    def open(self, url: str, remote: Entry) -> int:
        """Opens the local copy of `url`, which is made first if it does not exist.

        Returns:
            A file descriptor.

        Raises:
            ValueError: the remote file cannot be read, or has changed.
        """
        os.makedirs(self.folder, exist_ok=True)
        path = self.path(url, remote)
        with locked(self._lock_of(path)):
            with suppress(FileNotFoundError):
                os.utime(path)
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            part = f"{path}.part"
            try:
                _ask(url, lambda fs, source: fs.get_file(source, part))
                size = os.path.getsize(part)
                if remote.size not in (None, size) or entry(url) != remote:
                    raise ValueError(
                        f"source={url!r}: it changed during the copy, or the copy ended at {size} bytes; try again"
                    )
                # Opened before it has its name: another process may remove it as soon as it has.
                handle = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                os.replace(part, path)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.remove(part)
                raise
        self._evict()
        return handle

    def _lock_of(self, path: str) -> str:
        # A fixed number of lock files, never removed: removing one that a process waits for would break the lock.
        return os.path.join(self.folder, f"lock-{os.path.basename(path)[:2]}")

    def _evict(self) -> None:
        """Removes the copies beyond the limit, and the remains of interrupted copies."""
        with locked(os.path.join(self.folder, "lock")):
            files: list[tuple[int, int, str]] = []
            for path in filter(_COPY.search, map(str, Path(self.folder).iterdir())):
                with suppress(FileNotFoundError):  # another process has just finished it
                    status = os.stat(path)
                    files.append((status.st_mtime_ns, status.st_size, path))
            copies = sorted(each for each in files if not each[2].endswith(".part"))
            total = sum(size for _, size, _ in copies)
            for _, size, path in copies[:-1]:
                if total <= self.limit:
                    break
                os.remove(path)
                total -= size
            for *_, path in set(files) - set(copies):
                with suppress(Timeout, FileNotFoundError), locked(self._lock_of(path), wait=False):
                    os.remove(path)


def _local_entry(file: Any) -> Entry:
    status = file.stat()
    # A program can set the time of change of the content back, but neither ctime nor the inode of a new file.
    return Entry(status.st_size, f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}")


def _version(info: dict[str, Any]) -> str:
    """What distinguishes a changed remote file from the old one, as far as its storage tells."""
    for key in _VERSIONS:
        if found := info.get(key):
            return str(found.timestamp() if isinstance(found, datetime) else found).strip('"')
    return ""


def _fresh(url: str, question: Callable[[Any, str], _Answer]) -> _Answer:
    """`_ask`, without fsspec's cache of listings."""

    def ask(fs: Any, path: str) -> _Answer:
        fs.invalidate_cache()
        return question(fs, path)

    return _ask(url, ask)


def _ask(url: str, question: Callable[[Any, str], _Answer]) -> _Answer:
    """The answer of `question` for the file system and path of `url`; errors name the URL."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(url))
        return _patiently(partial(question, fs, path))
    except FileNotFoundError as error:
        raise Missing(f"source={url!r}: it does not exist; give one that does") from error
    except ImportError as error:
        raise ValueError(f"source={url!r}: {error}") from error
    except Exception as error:  # every protocol raises its own errors
        why = f"{type(error).__name__}: {str(error)[:150]}; check address, region and credentials"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "no space for its copy in the cache; set cache_dir to another disk"
        raise ValueError(f"source={url!r}: {why}") from error


def _options(url: str) -> dict[str, Any]:
    """Of fsspec's HTTP client, which would end any request after 300 s: a limit on silence, not on length."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    limit = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
    return dict(client_kwargs=dict(timeout=limit))


def _is_passing(error: Exception) -> bool:
    """Whether a server may answer if asked again: it is busy, or the connection broke."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ClientPayloadError", "ClientConnectionError", "ConnectionError", "IncompleteRead"})


def _patiently(question: Callable[[], _Answer]) -> _Answer:
    """The answer, after a few tries if the server fails for the moment; s3fs and gcsfs try again by themselves."""
    for wait in _WAITS:
        try:
            return question()
        except Exception as error:
            if not _is_passing(error):
                raise
            time.sleep(wait)
    return question()
