"""Files below a folder, and which of two folders belong together.

Links are followed where they stay below the folder, each folder is entered once (a loop of links ends there), and names that
begin with a dot are passed over, such as the `._x.jpg` that some archives bring. Files belong together whose paths below their
folders are equal but for the suffix.

A data set is often made by a stranger: its links and the paths in its tables may read what lies below its own folder, and
nothing else of this machine, unless `data.allow_outside` says so.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from src.data.set_checks import first_twins
from src.data.source import note_once, refuse_set
from src.types import UserError


class Bounds:
    """Whether files really lie below one of some folders, whatever links are in between. Folders are looked up once each."""

    def __init__(self, *roots: Path):
        self.roots = [os.path.realpath(root) for root in roots]
        self._real: dict[str, str] = {}

    def hold(self, file: Path) -> bool:
        """Also for a file that does not exist. False for what can be no path, such as one with a zero byte."""
        folder, name = os.path.split(file)
        try:
            if name in ("", ".", "..") or os.path.islink(file):
                real = os.path.realpath(file)
            else:
                if folder not in self._real:
                    self._real[folder] = os.path.realpath(folder)
                real = os.path.join(self._real[folder], name)
        except (OSError, ValueError):
            return False
        return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self.roots)


def refuse_outside(
    named: Sequence[tuple[str, Path]], bounds: Bounds, allowed: bool, where: str, inside: str, link: bool = False
) -> None:
    """Refuse files that are not within bounds, or tell of them once where they are allowed. Raises UserError.

    named: what stands where, for messages ("row 3: '../x.png'"), and the file that it means; where: the table, or the
    folder; inside: what they should lie below; link: whether links lead there, and not words of a table.
    """
    out = [words for words, file in named if not bounds.hold(file)]
    if not out:
        return
    what = "links lead" if link else "paths lead"
    line = f"{where}: {len(out)} of {len(named)} {what} out of {inside}: {', '.join(out[:3])}"
    if not allowed:
        raise UserError(f"{line}; put the files below it, or write data.allow_outside=true if you trust whoever made them")
    note_once(f"outside {where}", f"{line}; they are read, for data.allow_outside=true")


def refuse_url(word: str, where: str) -> None:
    """Refuse what a configuration names by a URL, which would be looked for as a file of that name. Raises UserError."""
    if is_url(word):
        fix = "download it, or mount it, and write its path; or write data=hub data.path=owner/name for what is on the hub"
        raise UserError(f"{where} is a URL, and URLs are not read; {fix}")


def is_url(word: str) -> bool:
    return "://" in word


def path_of(word: str) -> Path:
    """A word of a table as a path; `~` is the home folder where there is such a user."""
    try:
        return Path(word).expanduser()
    except RuntimeError:
        return Path(word)


def is_file(path: Path) -> bool:
    """As Path's own, but False also for a name that no file system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def walk(root: Path, without: Iterable[Path] = (), within: Sequence[Path] = (), allow_outside: bool = False) -> list[Path]:
    """Every file below `root` in the order of their names. Raises UserError for links that lead out of it.

    without: folders that are left out; within: folders where links may lead, too; allow_outside: anywhere.
    """
    entered = {_identity(p) for p in without if p.is_dir()}
    bounds, found, links = Bounds(root, *within), [], []

    def enter(folder: Path) -> None:
        if _identity(folder) in entered:
            return
        entered.add(_identity(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                link = folder / entry.name
                links.append((f"{link.relative_to(root)} -> {os.readlink(link)}", link))
                if not allow_outside and not bounds.hold(link):
                    continue
            if _is_folder(entry):
                enter(folder / entry.name)
            else:
                found.append(folder / entry.name)

    enter(root)
    refuse_outside(links, bounds, allow_outside, str(root), "it", link=True)
    return sorted(found)


def stem(file: Path, root: Path) -> str:
    """The path below `root` without its suffix: what partners have in common."""
    return str(PurePosixPath(*file.relative_to(root).parts).with_suffix(""))


def refuse_twins(files: Sequence[Path], root: Path, where: str) -> None:
    """Refuse two files that differ in their suffix alone: a caption or a map would belong to both. Raises UserError."""
    twins = set(first_twins([stem(f, root) for f in files]))
    if twins:
        named = [str(f.relative_to(root)) for f in files if stem(f, root) in twins]
        fault = f"{where}: {len(named)} files share a stem, so that partners cannot be told apart"
        refuse_set(UserError(f"{fault}: {', '.join(named[:10])}; rename or remove one of each"))


def partners(
    images: Sequence[Path],
    root: Path,
    folder: Path,
    suffixes: Sequence[str],
    key: str,
    exact: bool,
    allow_outside: bool = False,
) -> dict[Path, Path]:
    """image below `root` -> its map below `folder`. Raises UserError with the first 10 names that have no partner.

    suffixes: of maps; key: of the configuration, as messages call the folder; exact: whether a map without an image is a
    fault as well; allow_outside: whether links may lead elsewhere than below the two folders.
    """
    if outside := [str(f) for f in images if not f.is_relative_to(root)]:
        fix = "name the maps in columns of the table, data.signal_columns"
        raise UserError(f"{key}: partners are found by their paths below {str(root)!r}, where {outside[0]} is not; {fix}")
    where = f"{key}={str(folder)!r}"
    files = [f for f in walk(folder, (), (root,), allow_outside) if f.suffix.lower() in suffixes]
    refuse_twins(images, root, f"images of {key}")
    refuse_twins(files, folder, where)
    wanted, there = {stem(f, root): f for f in images}, {stem(f, folder): f for f in files}
    alone = [str(f.relative_to(root)) for s, f in wanted.items() if s not in there]
    extra = [str(f.relative_to(folder)) for s, f in there.items() if s not in wanted] if exact else []
    if alone or extra:
        faults = [f"{len(alone)} images have no map there: {', '.join(alone[:10])}"] if alone else []
        faults += [f"{len(extra)} maps have no image: {', '.join(extra[:10])}"] if extra else []
        fault = f"{where} holds {len(files)} maps for {len(images)} images; {'; '.join(faults)}"
        refuse_set(UserError(f"{fault}; give both the same names below their folders, whatever the suffix"))
    return {f: there.get(stem(f, root), folder / f"{stem(f, root)}.png") for f in images}


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino
