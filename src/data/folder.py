"""A folder of images with captions: beside them in .txt files, or in one JSONL or CSV table; maps in folders or columns."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from src.data import picture
from src.data.captions import decode_text
from src.data.framing import Framing
from src.data.pairs import Bounds, is_file, is_url, partners, path_of, refuse_outside, refuse_twins, refuse_url, stem, walk
from src.data.picture import SUFFIXES
from src.data.records import IMAGE, Records, RecordSource, as_names, column
from src.data.signals import MAP_SUFFIXES, check_signals
from src.data.source import BadSample, Split
from src.data.tables import read_table
from src.types import UserError

TXT = ".txt"
MAX_CAPTION_KIB = 1024


class FolderRecords(Records):
    """path: folder of the images, read with its subfolders; table: a .jsonl or .csv file, relative to `path` or to here.

    Without a table, every image below `path` is one record, in the order of their names, and its caption stands in the .txt
    file of the same name. With one, its rows are the records, in their order; `image_column` holds paths relative to `path`,
    and an image that stands in several rows has several captions, one record each. A row whose file does not exist, or that
    names none, is a bad sample; a column in which all are so is refused.
    signals: name of a signal -> folder with one map per image, of the same name but for the suffix, relative to `path` or to
    here; folders of maps below `path` are not searched for images. signal_columns: name of a signal -> column with its path.
    allow_outside: whether links and the paths in a table may lead out of these folders; the folders themselves, which the
    configuration names, may lie anywhere.
    """

    def __init__(
        self,
        path: str,
        table: str | None,
        image_column: str,
        caption_column: str,
        signals: Mapping[str, Any] | None,
        signal_columns: Mapping[str, Any] | None,
        allow_outside: bool = False,
    ):
        self.root, self._outside = Path(path).expanduser(), allow_outside
        self.where = f"data.path={path!r}"
        folders, columns = as_names(signals), as_names(signal_columns)
        check_signals([*folders], "data.signals")
        check_signals([*columns], "data.signal_columns")
        refuse_url(path, self.where)
        if not self.root.is_dir():
            raise UserError(f"{self.where} is not a folder")
        if columns and table is None:
            raise UserError(f"data.signal_columns={columns} needs a table to read them from; write data.table=...")
        if both := sorted(folders.keys() & columns.keys()):
            raise UserError(f"data.signals and data.signal_columns both name {both[0]}; leave one of them out")
        self.signals = check_signals([*folders, *columns], "data.signals")
        found = {s: _existing(f, self.root, Path.is_dir, f"data.signals.{s}={f!r}", "folder") for s, f in folders.items()}
        self._maps: dict[str, list[Path]] = {}
        self._lost: dict[tuple[int, str], BadSample] = {}  # (row, part) that a table names, and that is not there
        self._captions: list[Any] | None = None  # those of a table
        if table is None:
            self._find_images(list(found.values()))
        else:
            self._read_table(table, image_column, caption_column, columns)
        for signal, folder in found.items():
            images = list(dict.fromkeys(f for row, f in enumerate(self.files) if (row, IMAGE) not in self._lost))
            key, suffixes = f"data.signals.{signal}", (*SUFFIXES, *MAP_SUFFIXES)
            there = partners(images, self.root, folder, suffixes, key, table is None, allow_outside)
            self._maps[signal] = [there.get(f, f) for f in self.files]  # without its image a map is not asked for

    def raw(self, row: int, part: str) -> Path:
        if lost := self._lost.get((row, part)):
            raise lost
        return self._file(row, part)

    def name(self, row: int, part: str) -> str:
        return lost.id if (lost := self._lost.get((row, part))) else str(self._file(row, part))

    def caption(self, row: int) -> Any:
        if self._captions is not None:
            return self._captions[row]
        file = self.files[row].with_suffix(TXT)
        try:
            if file.stat().st_size > MAX_CAPTION_KIB << 10:
                raise BadSample(str(file), f"a caption of more than {MAX_CAPTION_KIB} KiB", "cut it, or remove it")
            return decode_text(file.read_bytes(), str(file))
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = f"cannot be opened ({error.strerror})"
            raise BadSample(str(file), reason, "check its permissions and links, or remove it") from error

    def stamp(self, row: int) -> str:
        parts = (IMAGE, *self.signals)
        return "|".join("not there" if (row, p) in self._lost else _stamp(self._file(row, p)) for p in parts)

    def _file(self, row: int, part: str) -> Path:
        return self.files[row] if part == IMAGE else self._maps[part][row]

    def _find_images(self, without: list[Path]) -> None:
        files = walk(self.root, without, without, self._outside)
        self.files = [f for f in files if f.suffix.lower() in SUFFIXES]
        if not self.files:
            seen = sorted({f.suffix for f in files})
            raise UserError(f"{self.where} holds no image ({', '.join(SUFFIXES)}); its files end in {seen}")
        refuse_twins(self.files, self.root, self.where)
        self.ids = [str(f.relative_to(self.root)) for f in self.files]
        self.no_caption = self._caption_words([f for f in files if f.suffix.lower() not in SUFFIXES])

    def _caption_words(self, others: list[Path]) -> str:
        """What is said of images without a caption: what was looked for, and what there was instead."""
        beside = {stem(f, self.root) for f in self.files}
        texts = [f for f in others if f.suffix == TXT]
        stray = [str(f.relative_to(self.root)) for f in texts if stem(f, self.root) not in beside]
        found = [f"{len(stray)} {TXT} files lie elsewhere or are named otherwise, such as {stray[0]}"] if stray else []
        endings = Counter(f.suffix for f in others if f.suffix != TXT)
        found += [f"{n} files end in {s!r}" for s, n in endings.most_common(3)]
        return f"no caption file of the same name ({'; '.join([TXT, *found])})"

    def _read_table(self, table: str, image_column: str, caption_column: str, columns: dict[str, str]) -> None:
        file = _existing(table, self.root, Path.is_file, f"data.table={table!r}", "file")
        names, rows = read_table(file, "data.table")
        where = str(file)
        column(names, image_column, "data.image_column", where)
        column(names, caption_column, "data.caption_column", where)
        self.files = self._paths(rows, IMAGE, image_column, where)
        for signal, name in columns.items():
            column(names, name, f"data.signal_columns.{signal}", where)
            self._maps[signal] = self._paths(rows, signal, name, where)
        self._captions = [row.get(caption_column) for row in rows]
        times: Counter[str] = Counter()
        self.ids = []
        for number, row in enumerate(rows, 1):
            times[path := str(row[image_column]) if _names(row, image_column) else f"row {number}"] += 1
            self.ids.append(path if times[path] == 1 else f"{path}#{times[path]}")

    def _paths(self, rows: list[dict[str, Any]], part: str, name: str, where: str) -> list[Path]:
        """One path a row, as its column `name` has it; the table itself where it has none. Notes what is not there, and raises
        UserError where all are so."""
        empty = [i for i, row in enumerate(rows) if not _names(row, name)]
        if len(empty) == len(rows):
            first = ", ".join(str(i + 1) for i in empty[:10])
            raise UserError(f"{where}: {len(empty)} of {len(rows)} rows hold no path in {name}: rows {first}")
        there = {i: self.root / path_of(row[name].strip()) for i, row in enumerate(rows) if _names(row, name)}
        named = [(f"row {i + 1}: {name}={rows[i][name]!r}", path) for i, path in there.items()]
        refuse_outside(named, Bounds(self.root), self._outside, where, self.where)
        lost = [i for i, path in there.items() if not is_file(path)]
        urls = any(is_url(rows[i][name]) for i in lost)
        fix = "URLs are not read: download the pictures" if urls else f"paths are read relative to {self.where}"
        if len(lost) == len(there):
            first = ", ".join(rows[i][name] for i in lost[:10])
            raise UserError(f"{where}: {len(lost)} of {len(rows)} files of {name} do not exist: {first}; {fix}")
        for i in empty:
            reason = f"no path in {name}"
            self._lost[i, part] = BadSample(f"{where}, row {i + 1}", reason, "fill it in or remove the row")
        for i in lost:
            reason = f"does not exist, and row {i + 1} of {where} names it in {name} ({fix})"
            self._lost[i, part] = BadSample(str(there[i]), reason, "mend the path or remove the row")
        return [there.get(i, Path(where)) for i in range(len(rows))]


class FolderSource(RecordSource):
    """Images below `path`: see `FolderRecords` for its own arguments, `RecordSource` for the rules."""

    form: ClassVar = "folder"

    def __init__(
        self,
        name: str,
        path: str,
        val_images: int,
        split: Split,
        resolution: int,
        *,
        table: str | None = None,
        image_column: str = "file_name",
        caption_column: str = "text",
        signals: dict[str, str] | None = None,
        signal_columns: dict[str, str] | None = None,
        allow_outside: bool = False,
        **rules: Any,
    ):
        records = FolderRecords(path, table, image_column, caption_column, signals, signal_columns, allow_outside)
        super().__init__(records, name, val_images, split, resolution, **rules)


def read_picture(file: Path, resolution: int, matte: str = "white") -> np.ndarray:
    """One picture as a source reads it: -> (resolution, resolution, 3) uint8, its middle. Raises BadSample."""
    image = picture.read_rgb(file, str(file), matte)
    return Framing(resolution, "center", 0, None).frame(image.shape[:2], file.name).apply(image)


def _existing(given: str, root: Path, exists: Any, where: str, what: str) -> Path:
    """A path that is absolute, relative to `root`, or relative to the working directory. Raises UserError."""
    refuse_url(given, where)
    tried = [root / Path(given).expanduser(), Path(given).expanduser()]
    for path in tried:
        if exists(path):
            return path
    raise UserError(f"{where} is not a {what}, neither here nor below {str(root)!r}")


def _names(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row of a table holds a path there."""
    return isinstance(row.get(column), str) and bool(row[column].strip())


def _stamp(file: Path) -> str:
    try:
        found = file.stat()
    except (OSError, ValueError) as error:  # a name that no file system takes
        return f"unreadable: {getattr(error, 'strerror', error)}"
    return f"{found.st_size}|{found.st_mtime_ns}"
