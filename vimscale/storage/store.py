"""Read and write files in a folder, on a web server, in an object store, or wherever fsspec has a driver.

A connection that breaks, a server that is down (5xx) or busy (429), and a body that ends early are retried from the
byte that was reached. Any other error is raised at once: what is missing, forbidden or malformed stays so.
"""

import base64
import importlib
import logging
import posixpath
import re
import socket
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request

from vimscale.errors import DataError, shortened
from vimscale.storage import files, untrusted, web
from vimscale.storage.addresses import filled, masked, shown

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_CHUNK = 1 << 18
_PROGRESS = 1 << 20
"""After this many more bytes the count of failures restarts: only a connection without progress is given up."""
_BUCKETS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
_UNLISTED = "%s cannot be listed, so shards are checked only when they are fetched: %s"
WRITTEN = "give a folder, or s3://, gs:// or az://BUCKET/FOLDER"
_READ = "folders and http(s):// can always be read; s3://, gs:// and az:// with vimscale[s3]"


class Missing(DataError):
    """The file does not exist."""


class _Broken(Exception):
    """A failure that a retry may fix."""


@dataclass(frozen=True)
class Retry:
    """How often to try a connection that fails; pauses double from `first` to `longest`, in seconds."""

    tries: int = 10
    first: float = 0.1
    longest: float = 15.0
    stall: float = 60.0
    """Seconds without a byte after which a connection counts as broken, as does one that stays below 1,000 bytes per
    second for that long. A request to a bucket may take no longer either; another one continues where it stopped.
    """

    def pause(self, failures: int) -> float:
        return min(self.first * 2 ** (failures - 1), self.longest)


class Folder:
    """Files on this machine."""

    def __init__(self, path: Path):
        self.path = path
        self.url = str(path)

    def where(self, name: str) -> str:
        """The file's full name."""
        return str(self.path / name)

    def get(self, name: str, most: int = untrusted.SMALL) -> bytes:
        """Read a small file.

        Raises:
            DataError: it cannot be read, or has more than `most` bytes; `Missing` if it is not there.
        """
        try:
            return untrusted.read(self.path / name, most)
        except FileNotFoundError:
            raise Missing(f"{self.where(name)} is not there") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{self.where(name)} cannot be read: {error}") from None

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each file that exists."""
        found = {}
        for name in names:
            try:
                found[name] = (self.path / name).stat().st_size
            except FileNotFoundError:
                continue
            except OSError as error:
                raise DataError(f"{self.where(name)} cannot be read: {error}") from None
        return found


class Remote(ABC):
    """Files on another machine. A subclass opens a file at a byte, lists files, and writes them if it can."""

    def __init__(self, url: str, retry: Retry):
        self.url = url
        self.retry = retry

    def __reduce__(self) -> tuple:
        return type(self), (self.url, self.retry)  # worker processes open their own connections

    def where(self, name: str) -> str:
        """The file's full address without secrets, for messages and as the name in the cache."""
        return f"{shown(self.url).rstrip('/')}/{name}"

    def get(self, name: str, most: int = untrusted.SMALL) -> bytes:
        """Read a small file.

        Raises:
            DataError: it cannot be read, or has more than `most` bytes; `Missing` if it is not there.
        """
        return b"".join(self.stream(name, most))

    def stream(self, name: str, most: int | None = None) -> Iterator[bytes]:
        """Yield the complete file in pieces, in order, over as many connections as it takes.

        Raises:
            DataError: it cannot be read, or has more than `most` bytes; `Missing` if it is not there.
        """
        done = mark = failures = 0
        while True:
            try:
                size, pieces = self._open(name, done)
                self._check(name, size or 0, most)
                for piece in pieces:
                    done += len(piece)
                    self._check(name, done, most)
                    if done - mark >= _PROGRESS:
                        mark, failures = done, 0
                    yield piece
                if size is not None and done != size:
                    raise _Broken(f"it ended after {done:,} of {size:,} bytes")
                return
            except _Broken as error:
                failures += 1
                self._failed(name, error, failures)

    def _check(self, name: str, size: int, most: int | None) -> None:
        if most is not None and size > most:
            raise DataError(f"{self.where(name)} has more than {most:,} bytes, the most that is read of it")

    def put(self, name: str, content: Path | bytes) -> None:
        """Write a file; others see it once it is complete.

        Raises:
            DataError: it cannot be written.
        """
        self._try(name, partial(self._put, name, content))

    def delete(self, name: str) -> None:
        """Raises:
        DataError: it cannot be deleted. A file that does not exist is not an error.
        """
        self._try(name, partial(self._delete, name))

    def listed(self) -> dict[str, int]:
        """Bytes of all files below the address, by name.

        Raises:
            DataError: they cannot be listed.
        """
        return self._try("", self._list)

    def _try(self, name: str, action: Callable[[], _T]) -> _T:
        failures = 0
        while True:
            try:
                return action()
            except _Broken as error:
                failures += 1
                self._failed(name, error, failures)

    def _failed(self, name: str, error: _Broken, failures: int) -> None:
        """Pause before the next try; raises DataError after the last one."""
        if failures == self.retry.tries:
            raise DataError(
                f"{self.where(name)}: {error}; tried {failures} times, with pauses of up to"
                f" {self.retry.pause(failures):g} s; repeat the command once it can be reached again"
            ) from None
        pause = self.retry.pause(failures)
        log.warning("%s: %s; retrying in %g s", self.where(name), error, pause)
        time.sleep(pause)

    def sizes(self, names: Iterable[str]) -> dict[str, int] | None:
        """Bytes of each file that exists; None if this would take one request per file."""
        return None

    @abstractmethod
    def _open(self, name: str, start: int) -> tuple[int | None, Iterator[bytes]]:
        """(size of the file or None, its bytes from `start` on); raises _Broken for failures that a retry may fix."""

    def _put(self, name: str, content: Path | bytes) -> None:
        raise DataError(f"{self.where(name)} cannot be written: {WRITTEN}")

    def _delete(self, name: str) -> None:
        raise DataError(f"{self.where(name)} cannot be deleted: {WRITTEN}")

    def _list(self) -> dict[str, int]:
        raise DataError(f"{self.where('')} cannot be listed: {WRITTEN}")


class Web(Remote):
    """A web server. If it supports ranges, a retry continues where the body broke."""

    def __init__(self, url: str, retry: Retry):
        super().__init__(url, retry)
        try:
            self._parts = urlsplit(url)
        except ValueError as error:
            raise DataError(f"data {shown(url)} is not an address: {error}") from None
        self._host = self._parts.netloc.rpartition("@")[2]

    def _open(self, name: str, start: int) -> tuple[int | None, Iterator[bytes]]:
        path = f"{self._parts.path.rstrip('/')}/{quote(name)}"
        address = urlunsplit((self._parts.scheme, self._host, path, self._parts.query, ""))
        try:
            request = Request(address, headers={"Accept-Encoding": "identity", "User-Agent": "vimscale"})
            if start:
                request.add_header("Range", f"bytes={start}-")
            if self._parts.username is not None:
                user = f"{unquote(self._parts.username)}:{unquote(self._parts.password or '')}"
                # a server that this one redirects to must not get its password
                request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
            response = web.urlopen(request, self.retry.stall)
        except HTTPError as error:
            error.close()
            status = f"HTTP {error.code} {shortened(error.reason)}"
            if error.code in (301, 302, 303, 307, 308):
                raise DataError(
                    f"{self.where(name)}: it redirects endlessly, or to an address other than http(s):// ({status});"
                    " give the address where the files are"
                ) from None
            if error.code >= 500 or error.code in (408, 425, 429):
                raise _Broken(status) from None
            if error.code in (404, 410):
                raise Missing(f"{self.where(name)} is not there ({status}); check the address") from None
            raise DataError(f"{self.where(name)}: {status}; check the address and who may read it") from None
        except (InvalidURL, ValueError) as error:
            raise DataError(f"{self.where(name)} is not an address: {error}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            unknown = isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME
            if unknown or isinstance(reason, ssl.SSLCertVerificationError):
                raise DataError(f"{self.where(name)}: {reason}; check the address") from None
            raise _Broken(shortened(str(reason)) or type(reason).__name__) from None
        try:
            length = web.length(response, start)
        except ValueError as error:
            response.close()
            raise DataError(f"{self.where(name)}: the server {error}; serve the files as they are") from None
        skip = start if response.status != 206 else 0
        return None if length is None else length + start - skip, _body(response, skip)


def _body(response: web.Response, skip: int) -> Iterator[bytes]:
    """Yield the rest of a response, without its first `skip` bytes."""
    with response:
        while True:
            try:
                piece = response.read_some(_CHUNK)
            except (OSError, HTTPException) as error:
                raise _Broken(shortened(str(error)) or type(error).__name__) from None
            if not piece:
                return
            if len(piece) > skip:
                yield piece[skip:]
            skip = max(skip - len(piece), 0)


class Bucket(Remote):
    """S3, Google Cloud Storage or Azure through obstore, which reads AWS_ENDPOINT_URL and similar variables."""

    def __init__(self, url: str, retry: Retry):
        super().__init__(url, retry)
        self._obstore = _library("obstore", url, "s3")
        stores = importlib.import_module("obstore.store")
        try:
            self._bucket = stores.from_url(
                url.rstrip("/"),
                client_options={"allow_http": True, "timeout": timedelta(seconds=retry.stall)},
                retry_config={"max_retries": 0},
            )
        except Exception as error:  # obstore has no common class for invalid addresses and settings
            raise DataError(f"data {shown(url)}: {_first_line(error)}; write s3://BUCKET/FOLDER") from None

    def sizes(self, names: Iterable[str]) -> dict[str, int] | None:
        try:
            return self._entries()
        except Exception as error:
            log.warning(_UNLISTED, shown(self.url), _first_line(error))
            return None

    def _entries(self) -> dict[str, int]:
        return {entry["path"]: entry["size"] for page in self._obstore.list(self._bucket) for entry in page}

    def _open(self, name: str, start: int) -> tuple[int | None, Iterator[bytes]]:
        options = {"range": {"offset": start}} if start else None
        try:
            found = self._obstore.get(self._bucket, name, options=options)
        except Exception as error:
            raise self._fault(name, error) from None
        return found.meta["size"], _pieces(found.stream(min_chunk_size=_CHUNK))

    def _put(self, name: str, content: Path | bytes) -> None:
        try:
            self._obstore.put(self._bucket, name, files.pieces(content))
        except Exception as error:
            raise self._fault(name, error) from None

    def _delete(self, name: str) -> None:
        try:
            self._obstore.delete(self._bucket, name)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._fault(name, error) from None

    def _list(self) -> dict[str, int]:
        try:
            return self._entries()
        except Exception as error:
            raise self._fault("", error) from None

    def _fault(self, name: str, error: Exception) -> Exception:
        """The exception to raise for an error of obstore."""
        if isinstance(error, FileNotFoundError):
            return Missing(f"{self.where(name)} is not there; check bucket, folder and AWS_ENDPOINT_URL")
        message = _first_line(error)
        refused = type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
        if refused or re.search(r"status code: 4(?!08|25|29)|incorrectly configured|[Cc]redential", message):
            return DataError(
                f"{self.where(name)}: {message}; check the region and the keys in the environment"
                " (AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true)"
            )
        no_keys = "169.254.169.254" in message  # where machines in a cloud get keys; others do not have it
        return _Broken(message + (" (no keys in the environment)" if no_keys else ""))


class Filesystem(Remote):
    """Any other address that fsspec has a driver for."""

    def __init__(self, url: str, retry: Retry):
        super().__init__(url, retry)
        self._fsspec = _library("fsspec", url, "fsspec")
        scheme = url.partition("://")[0]
        try:
            self._fsspec.get_filesystem_class(scheme.rpartition("::")[2])
        except ValueError:
            raise DataError(
                f"data {url}: {scheme}:// is not a known scheme; {_READ}, others with vimscale[fsspec]"
            ) from None
        except ImportError as error:
            raise DataError(f"data {shown(url)}: {scheme}:// needs another package: {error}") from None

    def sizes(self, names: Iterable[str]) -> dict[str, int] | None:
        try:
            return self._list()
        except _Broken as error:
            log.warning(_UNLISTED, shown(self.url), error)
            return None

    def _list(self) -> dict[str, int]:
        try:
            system, root = self._fsspec.core.url_to_fs(self.url)
            found = system.find(root, detail=True)
        except Exception as error:  # every driver raises its own
            raise _Broken(_first_line(error)) from None
        return {posixpath.relpath(path, root): entry["size"] for path, entry in found.items()}

    def _put(self, name: str, content: Path | bytes) -> None:
        try:
            system, root = self._fsspec.core.url_to_fs(self.url)
            path = posixpath.join(root, name)
            system.makedirs(posixpath.dirname(path), exist_ok=True)
            if isinstance(content, Path):
                system.put_file(str(content), path)
            else:
                system.pipe_file(path, content)
        except Exception as error:
            raise _Broken(_first_line(error)) from None

    def _delete(self, name: str) -> None:
        try:
            system, root = self._fsspec.core.url_to_fs(self.url)
            system.rm_file(posixpath.join(root, name))
        except FileNotFoundError:
            return
        except Exception as error:
            raise _Broken(_first_line(error)) from None

    def _open(self, name: str, start: int) -> tuple[int | None, Iterator[bytes]]:
        try:
            system, root = self._fsspec.core.url_to_fs(self.url)
            file = system.open(posixpath.join(root, name), "rb")
            file.seek(start)
        except FileNotFoundError:
            raise Missing(f"{self.where(name)} is not there; check the address") from None
        except PermissionError as error:
            raise DataError(f"{self.where(name)}: {error}; check who may read it") from None
        except Exception as error:  # every driver raises its own
            raise _Broken(_first_line(error)) from None
        return getattr(file, "size", None), _pieces(_read(file))


def _read(file: Any) -> Iterator[bytes]:
    with file:
        while piece := file.read(_CHUNK):
            yield piece


def _pieces(pieces: Iterable[Any]) -> Iterator[bytes]:
    try:
        for piece in pieces:
            yield bytes(piece)
    except Exception as error:  # the libraries raise anything when a connection breaks
        raise _Broken(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    lines = masked(str(error)).partition(": <")[0].splitlines()  # some quote the signed address
    return lines[0] if lines else type(error).__name__


def _library(name: str, url: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        scheme = url.partition("://")[0]
        raise DataError(
            f"data {shown(url)}: {scheme}:// needs {name}, which is not installed:"
            f" pip install 'vimscale[{extra}]' ({_READ})"
        ) from None


def with_secrets(url: str) -> str:
    """Fill in the environment variables of an address. Only for addresses that the user gave: one from a manifest could
    send the values anywhere.

    Raises:
        DataError: a variable is not set.
    """
    try:
        return filled(url)
    except KeyError as error:
        raise DataError(
            f"data {url}: {error.args[0]} is not set in the environment; export it (for a job: name it under secrets)"
        ) from None


def open_store(url: str, retry: Retry | None = None) -> Folder | Remote:
    """Open `url`: a folder's path, or an address.

    Raises:
        DataError: its scheme is not known, or needs a library that is not installed.
    """
    if url.startswith("pipe:"):
        raise DataError(f"data {url}: no command is run to read data; give the shards' own address, or download them")
    scheme, mark, path = url.partition("://")
    if not mark:
        return Folder(Path(url))
    if scheme == "file":
        return Folder(Path(unquote(path)))
    kind = Web if scheme in ("http", "https") else Bucket if scheme in _BUCKETS else Filesystem
    return kind(url, retry or Retry())


def beside(url: str, base: str) -> str:
    """Resolve the `base` of a manifest at `url`: an address, an absolute path, or a path relative to the manifest."""
    if "://" in base or base.startswith(("/", "pipe:")):
        return base
    scheme, mark, path = url.partition("://")
    if not mark:
        return str(Path(url) / base)
    path, question, query = path.partition("?")
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, base))}{question}{query}"
