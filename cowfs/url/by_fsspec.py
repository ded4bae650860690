"""A file that the Python package fsspec can read: s3://, gs:// and others."""

from __future__ import annotations

from typing import Any

from cowfs.linux.programs import how_to_add
from cowfs.url.http import changed
from cowfs.url.protocol import Refused, Unreachable, Version

_MARKS = (
    *("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "modified", "modify"),
    *("generation", "VersionId", "version_id", "md5Hash", "content_md5", "checksum", "uid", "ino"),
)
"""The keys by which filesystems of fsspec tell one state of a file from another."""


class FsspecFile:
    """A file that fsspec reads. Any thread may call the methods."""

    def __init__(self, url: str) -> None:
        """Refused if fsspec, or a package that it needs for the URL, is not installed."""
        scheme = url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise Refused(f"{scheme}:// needs the Python package fsspec", how_to_add("fsspec")) from None
        try:
            self._fs, self._path = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise Refused(
                f"fsspec cannot read {scheme}://: {_line(error)}",
                "install the package that it needs for that (s3fs, gcsfs, adlfs …)",
            ) from None
        except Exception as error:
            raise Refused(f"fsspec cannot read it: {_line(error)}", "check the URL, and the login") from None

    def version(self, until: float) -> Version:
        """Return the version of the file. Blocks; Refused, Unreachable. The limits are those of fsspec."""
        try:
            self._fs.invalidate_cache(self._path)
            info: dict[str, Any] = self._fs.info(self._path)
        except Exception as error:
            raise _explained(error) from None
        if info.get("type", "file") != "file" or info.get("size") is None:
            raise Refused("is not a file", "check the URL")
        marks = tuple((name, str(info[name])) for name in _MARKS if info.get(name) is not None)
        return Version(int(info["size"]), marks)

    def read(self, start: int, length: int, version: Version, until: float) -> bytes:
        """Return bytes of this version of the file, like :meth:`HttpFile.read`.

        Checks the version afterwards, and returns nothing of another version.
        """
        try:
            data: bytes = self._fs.cat_file(self._path, start=start, end=start + length)
        except Exception as error:
            raise _explained(error) from None
        found = self.version(until)
        if found != version:
            raise changed(version, found)
        if len(data) != length:
            raise Unreachable(f"the answer was cut short: {len(data)} of {length} bytes")
        return data


def _explained(error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):
        return Refused("there is no such file", "check the URL")
    if isinstance(error, PermissionError):
        return Refused("reading it is not allowed", "give a login, as the package for the URL wants it")
    if type(error).__name__ in {"NoCredentialsError", "HttpError", "ClientError"}:
        return Refused(f"is refused: {_line(error)}", "give a login, as the package for the URL wants it")
    return Unreachable(_line(error))


def _line(error: Exception) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    lines = text.splitlines()
    return lines[0] if lines else type(error).__name__
