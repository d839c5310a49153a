r"""Files that carry a digest of their contents, and the reading of files that others wrote."""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

from deepinv_deq._digest import digest, plain

DIGEST = "_digest"  # the entry of a file that holds one digest for each other entry
__all__ = [
    "check_archive",
    "contents_of",
    "digest",
    "digests",
    "load_intact",
    "plain",
    "read_weights",
    "save_intact",
    "temporary",
]
_SHIPPED = Path(__file__).parent / "weights"
_VIEWS = 2**28
_DIRECTORY = 0x10  # attribute of MS-DOS: PyTorch reads no data of such a record, and leaves its tensor uninitialised


def save_intact(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    r"""Write a dictionary with a digest of its contents, for :func:`load_intact`: the whole file, or none.

    The file is written under a temporary name in the same folder, and renamed when it is on the disk. If writing fails,
    the temporary file is removed, and a file that was at ``path`` before is still there.

    :param dict content: tensors and plain values under string keys. NumPy arrays become tensors, NumPy scalars numbers.
    :param str, os.PathLike path: file to write.
    :raises TypeError: if there is anything else in it, which could not be read back without running code.
    :raises OSError: if the file cannot be written, such as on a full disk or in a read-only folder.
    """
    path = Path(path).resolve()  # a link stays a link
    if not isinstance(content, Mapping) or not all(type(key) is str for key in content) or DIGEST in content:
        raise TypeError(f"content must be a dictionary with string keys other than {DIGEST!r}.")
    content = {key: plain(value, key) for key, value in content.items()}
    content[DIGEST] = digests(content)
    with temporary(path) as partial:
        with open(partial, "wb") as file:  # not its name: PyTorch's own writer hides what went wrong
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    r"""A temporary file beside ``path``, to be written and renamed in the block, and removed after it if it is still there.

    :param pathlib.Path path: file that is to be written in the end.
    :return: path of the temporary file.
    :raises OSError: if writing fails in the block; the message names ``path`` and says what to do.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.{get_ident()}.part")
    try:
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is not a regular file")
        partial.touch()
        yield partial
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else _why_not_written(partial)
        if cause is None:
            raise
        message = (
            f"{path} could not be written ({cause.strerror or cause}). Free space, or make the folder writable, and "
        )
        raise type(cause)(cause.errno or errno.EIO, message + "save again.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _why_not_written(file: Path) -> OSError | None:
    r"""Why nothing can be added to a file: PyTorch's own writer reports a full disk as a RuntimeError about positions."""
    try:
        with open(file, "ab") as stream:
            stream.write(bytes(2**16))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error
    return None


def load_intact(path: str | os.PathLike[str], *, signed: bool = False) -> Any:
    r"""Read a file of :func:`save_intact` or ``torch.save``, on the CPU, without running any code in it.

    Every checksum and every digest in the file is verified. A file of ``torch.save`` has checksums of its records, and no
    digest. A file in the format before PyTorch 1.6 has neither, which a warning says.

    :param str, os.PathLike path: file.
    :param bool signed: whether a digest is required, for files that only this package writes.
    :return: what was saved, without the digest. Entries that were removed from a signed file are not missed.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file was cut off or changed, or has more in it than tensors and plain values.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        return _verified(path.read_bytes(), path, signed)
    except Exception as error:  # a broken file fails in as many ways as there are bytes in it
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(
            f"{path} cannot be trusted: it was cut off or changed, or has more in it than tensors and plain values "
            f"({cause}). Use another copy of it."
        ) from error


def _verified(data: bytes, path: Path, signed: bool) -> Any:
    zipped = data[:2] == b"PK"
    if zipped:  # PyTorch itself does not look at the checksums that it wrote
        check_archive(data)
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    check_size(content, len(data))
    found = content.pop(DIGEST, None) if isinstance(content, dict) else None
    if found is None:
        if isinstance(content, dict) and any(
            isinstance(value, dict) and value and value.keys() == content.keys() - {key}
            for key, value in content.items()
        ):
            raise ValueError("its digest has another name")  # a changed bit in the name
        if signed:
            raise ValueError("it has no digest: it was written by an older version or by another program")
        if not zipped:
            warnings.warn(
                f"{path} has no checksum (format of PyTorch before 1.6), so a changed byte is not noticed. Write it anew "
                "with torch.save.",
                stacklevel=4,
            )
    else:
        changed = [key for key, value in digests(content).items() if found.get(key) != value]
        if changed:
            raise ValueError(f"the digest of {', '.join(map(repr, changed))} is wrong")
    return content


def check_size(content: Any, length: int) -> None:
    r"""Refuse a file whose tensors are views of few numbers, which would take much memory when they are copied.

    :param content: what was read.
    :param int length: size of the file in bytes.
    :raises ValueError: if its tensors have more than 256 MiB, and more than four times the size of the file.
    """
    needed, waiting = 0, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            needed += value.numel() * value.element_size() if value.layout is torch.strided else 0
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += list(value)
    if needed > max(_VIEWS, 4 * length):
        raise ValueError(f"its tensors ask for {needed:,} bytes, and the file has {length:,}")


def digests(content: Mapping[str, Any]) -> dict[str, str]:
    r"""One digest for each entry of a dictionary, of its name and its value.

    :param dict content: tensors and plain values under string keys.
    :return: the digests, under the same keys.
    :raises TypeError: if there is anything else in it.
    """
    # the name too: equal strings are one object in a pickle, so that a changed bit may rename an entry and its digest
    return {key: digest((key, digest(value, str(key)))) for key, value in content.items()}


def check_archive(data: bytes) -> None:
    r"""Verify the directory and all checksums of a zip file that ``torch.save`` wrote.

    :param bytes data: content of the file.
    :raises zipfile.BadZipFile: if a record is broken, compressed, doubled, or marked as a directory.
    """
    with ZipFile(io.BytesIO(data)) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) != len(records):
            raise BadZipFile("a record is there twice")
        if min((record.header_offset for record in records), default=0) != 0:
            raise BadZipFile("there is something before the first record")
        for record in records:
            if record.compress_type != ZIP_STORED or record.external_attr & _DIRECTORY or record.is_dir():
                raise BadZipFile(f"the directory entry of {record.filename} is damaged")
            archive.read(record)  # raises if the checksum is wrong


@contextmanager
def contents_of(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    r"""Turn every error of building something from a file into a ValueError that names the file.

    :param str, os.PathLike path: file.
    :param str what: what the file should hold, such as ``"weights of an EquilibriumUNet"``.
    :raises ValueError: if the block fails.
    """
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"{path} does not hold {what} ({cause}).") from error


def read_weights(name: str | os.PathLike[str], folder: str = "") -> dict[str, Any]:
    r"""Read a file of weights without running any code in it.

    :param str, os.PathLike name: a name of the files that ship in ``folder``, or a path.
    :param str folder: subfolder of the shipped weights.
    :return: its dictionary.
    :raises FileNotFoundError: if there is none.
    :raises ValueError: if the file is broken.
    """
    shipped = {path.stem: path for path in (_SHIPPED / folder).glob("*.pt")}
    path = shipped.get(str(name), Path(name))
    if not path.exists():
        known = f" or one of {', '.join(sorted(shipped))}" if shipped else ""
        raise FileNotFoundError(f"No weights {str(name)!r}: give a file{known}.")
    try:
        content = load_intact(path)
    except ValueError as error:
        raise ValueError(f"{path} holds no weights, or was cut off ({error.__cause__}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no weights, but a {type(content).__name__}.")
    return content
