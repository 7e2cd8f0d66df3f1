"""Where each part of each sample lies in a tar file, so that a shard can be read in any order.

An index is made once per shard, by its headers. It lies beside the shard (`x.tar.index.json`), or in `index_dir` where that
folder cannot be written, and is made anew when the shard's size or time changes. Only whole tar files of plain members are
read: no member may leave its folder, be a link, or claim more bytes than there are.
"""

import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from src.data.locks import WholeFile
from src.data.picture import SUFFIXES, header
from src.data.set_checks import first_twins
from src.data.signals import npy_size
from src.data.source import BadSample, note_once
from src.types import UserError

INDEX_VERSION = 1
MAX_MEMBER_MIB = 512
MAX_INDEX_SHARE = 2  # of a shard's own bytes: an index is far smaller, since a member has a header of a block
BLOCK = 512  # bytes; a tar file ends with empty blocks
HEAD = 1 << 16  # bytes of a picture that hold its header, mostly
REDO = "write the shard again or remove it"
NPY = ".npy"
Part = tuple[int, int]  # offset, size in bytes


@dataclass(frozen=True)
class ShardIndex:
    """What one shard holds.

    keys: names of its samples, in their order; parts: per sample, suffix -> (offset, size); headers: per sample, suffix of
    a picture or an array -> [height, width, kind], or [reason, fix] where it has none.
    """

    file: Path
    keys: list[str]
    parts: list[dict[str, Part]]
    headers: list[dict[str, list]]

    @staticmethod
    def of(file: Path, index_dir: str | None) -> "ShardIndex":
        """The index of a shard, read or made. Raises UserError for a file that is no whole tar of safe members."""
        try:
            found = file.stat()
            stamp = [INDEX_VERSION, found.st_size, found.st_mtime_ns]
            places = index_places(file, index_dir)
            for place in places:
                if stored := _stored(place, stamp):
                    return ShardIndex(file, stored["keys"], stored["parts"], stored["headers"])
            made = scan(file)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error}); check the disk and its permissions") from error
        text = json.dumps({"stamp": stamp, "keys": made.keys, "parts": made.parts, "headers": made.headers})
        if not any(_write(place, text) for place in places):
            note_once("index", f"no index of {file} can be written to {places[-1].parent}: it is made at every start")
        return made


def shard_files(path: str, where: str) -> list[Path]:
    """The tar files of a folder, a name or a pattern with `{00..09}`, `{a,b}`, `*`, `?` and `[...]`; `where`: see Records.

    In the order of the pattern, and of names within a wildcard. Raises UserError where one is missing.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        found = sorted(root.glob("*.tar"))
        if not found:
            seen = sorted({p.suffix for p in root.iterdir() if p.is_file()})
            raise UserError(f"{where} holds no .tar file; its files end in {seen}")
        return found
    names: list[str] = []
    for name in braces(str(root)):
        wild = any(c in name for c in "*?[")
        matched = sorted(glob.glob(name)) if wild else [name]
        if not matched:
            raise UserError(f"{where}: {name} matches no file")
        names += matched
    missing = [n for n in names if not Path(n).is_file()]
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(names)} shards do not exist: {', '.join(missing[:10])}")
    if twins := first_twins(names):
        raise UserError(f"{where} names shards twice: {', '.join(twins)}")
    return [Path(n) for n in names]


def braces(pattern: str) -> Iterator[str]:
    """`a{00..02}.tar` and `a{x,y}.tar` written out, the first brace slowest; zeros in front are kept."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        yield pattern
        return
    first, last, listed = found.groups()
    words = listed.split(",") if listed else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    for word in words:
        yield from braces(pattern[: found.start()] + word + pattern[found.end() :])


def index_places(file: Path, index_dir: str | None) -> list[Path]:
    """Where the index of a shard may lie, the first choice first."""
    beside = file.with_name(f"{file.name}.index.json")
    if index_dir is None:
        return [beside]
    mark = hashlib.blake2b(str(file.resolve()).encode(), digest_size=6).hexdigest()
    return [beside, Path(index_dir).expanduser() / f"{file.stem}-{mark}.index.json"]


def scan(file: Path) -> ShardIndex:
    """The index of a tar file, from its headers and those of its pictures. Raises UserError, OSError."""
    keys: dict[str, dict[str, Part]] = {}
    end, size = 0, file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            raise UserError(f"{file} is compressed, and cannot be read at random; unpack it with gunzip")
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    _check_member(file, member, size)
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    _add(file, keys, member)
        except tarfile.TarError as error:
            raise UserError(f"{file} is no whole tar file ({error}); {REDO}") from error
        stream.seek(end)
        if stream.read(BLOCK) != bytes(BLOCK):  # where tarfile stops without a word
            raise UserError(f"{file} is cut or damaged at byte {end} of {size}; {REDO}")
        headers = [
            {s: _header(stream, p, f"{file}: {key}.{s}") for s, p in parts.items() if _has_size(s)}
            for key, parts in keys.items()
        ]
    return ShardIndex(file, list(keys), list(keys.values()), headers)


def _check_member(file: Path, member: tarfile.TarInfo, size: int) -> None:
    if _leaves(member.name):
        raise UserError(f"{file}: the member {member.name!r} leaves its folder; {REDO}")
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        raise UserError(f"{file}: the member {member.name!r} is no plain file, but a link or a device; {REDO}")
    if member.size > MAX_MEMBER_MIB << 20:
        raise UserError(
            f"{file}: the member {member.name!r} claims {member.size} bytes, more than {MAX_MEMBER_MIB} MiB; {REDO}"
        )
    if member.offset_data + member.size > size:
        raise UserError(f"{file}: the member {member.name!r} ends behind the end of the file, at {size} bytes; {REDO}")


def _add(file: Path, keys: dict[str, dict[str, Part]], member: tarfile.TarInfo) -> None:
    """File a member under its sample: the path up to the first dot of its name, as WebDataset does."""
    path = PurePosixPath(member.name)
    if member.isdir() or path.name.startswith("."):
        return
    start, dot, suffix = path.name.partition(".")
    if not dot:
        note_once(f"member {file}", f"{file}: members without a suffix, such as {member.name!r}, belong to no sample")
        return
    parts = keys.setdefault(str(path.with_name(start)), {})
    if suffix.lower() in parts:
        raise UserError(f"{file}: the member {member.name!r} stands twice; {REDO}")
    parts[suffix.lower()] = (member.offset_data, member.size)


def _has_size(suffix: str) -> bool:
    ending = f".{suffix.rpartition('.')[2]}"
    return ending in SUFFIXES or ending == NPY


def _header(stream: BinaryIO, part: Part, name: str) -> list:
    offset, size = part
    for count in (HEAD, size):
        stream.seek(offset)
        raw = stream.read(min(count, size))
        try:
            if name.endswith(NPY):
                return [*npy_size(raw, name), "NPY"]
            found = header(raw, name)
            return [found.height, found.width, found.kind]
        except BadSample as bad:
            if count >= size:
                return [bad.reason, bad.fix]
    raise AssertionError("the whole file was tried last")


def _stored(place: Path, stamp: list[int]) -> dict | None:
    """An index on disk, if it is whole, of this very shard, and could have been made here."""
    try:
        if place.stat().st_size > MAX_INDEX_SHARE * stamp[1]:
            return None
        stored = json.loads(place.read_bytes())
        if stored["stamp"] != stamp:
            return None
        keys, parts, headers = stored["keys"], stored["parts"], stored["headers"]
        if _could_be(keys, parts, headers, stamp[1]):
            return stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    note_once(f"index {place}", f"{place} does not fit its shard, and is made anew")
    return None


def _could_be(keys: list, parts: list, headers: list, size: int) -> bool:
    """Whether stored fields have the form of an index, and every part lies within a shard of `size` bytes: an index comes
    along with its shard, and may be as wrong as any file."""
    if not (isinstance(keys, list) and isinstance(parts, list) and isinstance(headers, list)):
        return False
    if not len(keys) == len(parts) == len(headers) or len(set(keys)) != len(keys):
        return False
    for key, members, known in zip(keys, parts, headers, strict=True):
        if not isinstance(key, str) or _leaves(key) or known.keys() != {s for s in members if _has_size(s)}:
            return False
        for offset, count in members.values():
            whole = type(offset) is int and type(count) is int
            if not whole or offset < BLOCK or not 0 <= count <= MAX_MEMBER_MIB << 20 or offset + count > size:
                return False
        for found in known.values():
            kinds = [type(value) for value in found]
            if kinds != [str, str] and not (kinds == [int, int, str] and min(found[:2]) > 0):
                return False
    return True


def _leaves(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _write(place: Path, text: str) -> bool:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with WholeFile(place) as part:
            part.write_text(text)
        return True
    except OSError:
        return False
