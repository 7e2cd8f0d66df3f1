"""Files below a folder, and which of two folders belong together.

Links are followed, each folder is entered once (a loop of links ends there), and names that begin with a dot are passed
over, such as the `._x.jpg` that some archives bring. Files belong together whose paths below their folders are equal but
for the suffix.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from src.data.records import first_twins
from src.data.source import refuse_set
from src.types import UserError


def walk(root: Path, without: Iterable[Path] = ()) -> list[Path]:
    """Every file below `root` in the order of their names. without: folders that are left out. Raises UserError."""
    entered = {_identity(p) for p in without if p.is_dir()}
    found: list[Path] = []

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
            if _is_folder(entry):
                enter(folder / entry.name)
            else:
                found.append(folder / entry.name)

    enter(root)
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
    images: Sequence[Path], root: Path, folder: Path, suffixes: Sequence[str], key: str, exact: bool
) -> dict[Path, Path]:
    """image below `root` -> its map below `folder`. Raises UserError with the first 10 names that have no partner.

    suffixes: of maps; key: of the configuration, as messages call the folder; exact: whether a map without an image is a
    fault as well.
    """
    if outside := [str(f) for f in images if not f.is_relative_to(root)]:
        fix = "name the maps in columns of the table, data.signal_columns"
        raise UserError(f"{key}: partners are found by their paths below {str(root)!r}, where {outside[0]} is not; {fix}")
    where = f"{key}={str(folder)!r}"
    files = [f for f in walk(folder) if f.suffix.lower() in suffixes]
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
