"""Hugging Face data sets: a hub id, a saved data set, a folder of images with metadata, or parquet files.

Whatever is on this machine is read without a look at the hub. Columns are found by name; an image column holds pictures
(an Image feature) or the paths of pictures, which are opened.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from src.data.pairs import Bounds, is_file, is_url, path_of, refuse_outside, refuse_url
from src.data.records import IMAGE, Records, RecordSource, as_names, column
from src.data.signals import SIGNALS, check_signals
from src.data.source import BadSample, Split
from src.types import UserError

PARQUET = ".parquet"
HUB_TIMEOUT_S = 10


class HubRecords(Records):
    """path: a hub id (owner/name), or a folder or .parquet file on this machine; revision: of a hub id, None for the newest;
    hub_split: the part of the data set that is read, of which the last images are held out.

    Ids are the names of the files where the images come from files, and row numbers otherwise. Paths in a column are
    relative to `path`, or to here, and lead to what lies below `path` or in the library's own cache, unless `allow_outside`.
    """

    def __init__(
        self,
        path: str,
        revision: str | None,
        hub_split: str,
        image_column: str,
        caption_column: str,
        signal_columns: Mapping[str, Any] | None,
        allow_outside: bool = False,
    ):
        maps = as_names(signal_columns)
        self.signals = check_signals([*maps], "data.signal_columns")
        self.where = f"data.path={path!r}"
        self.root = Path(path).expanduser()
        data = open_dataset(path, revision, hub_split)
        columns, keys = {IMAGE: image_column, **maps}, {IMAGE: "data.image_column"}
        keys |= {s: f"data.signal_columns.{s}" for s in maps}
        self.columns = {part: column(data.column_names, name, keys[part], self.where) for part, name in columns.items()}
        self._caption_column = column(data.column_names, caption_column, "data.caption_column", self.where)
        data = _as_stored(data)
        self._captions = data[self._caption_column][:]
        self._parts = {part: data.select_columns([name]) for part, name in self.columns.items()}
        self._paths = {part: _paths(data, name) for part, name in self.columns.items()}
        self._stamp = _stamp(data)
        self._bounds, self._outside = self._may_read(), allow_outside
        self._refuse_outside()
        named = [self._below(path) for path, _ in self._paths[IMAGE] if path]
        self.ids = named if len(set(named)) == len(data) else [f"row {i}" for i in range(len(data))]

    def raw(self, row: int, part: str) -> Any:
        name, value = self.name(row, part), self._parts[part][row][self.columns[part]]
        if isinstance(value, Mapping) and "path" in value:  # an Image feature, as stored
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise BadSample(name, "nothing stands there", "fill it in or remove the row")
        if isinstance(value, bytes) or (part != IMAGE and SIGNALS[part] == "joints" and not isinstance(value, str)):
            return value
        if not isinstance(value, str):
            raise BadSample(name, f"a {type(value).__name__}, neither a picture nor a path", "name another column")
        return self._file(value, name)

    def name(self, row: int, part: str) -> str:
        return f"{self.ids[row]} ({self.columns[part]})"

    def caption(self, row: int) -> Any:
        return self._captions[row]

    def stamp(self, row: int) -> str:
        stamps = [self._stamp]
        for part in (IMAGE, *self.signals):
            path, inside = self._paths[part][row]
            stamps.append(str(row) if inside or not path else _stat(self._file_or_none(path)))
        return "|".join(stamps)

    def _below(self, path: str) -> str:
        file = Path(path)
        return str(file.relative_to(self.root) if file.is_relative_to(self.root) else file)

    def _file_or_none(self, value: str) -> Path | None:
        return next((f for f in (self._base / path_of(value), path_of(value)) if is_file(f)), None)

    @property
    def _base(self) -> Path:
        return self.root if self.root.is_dir() else self.root.parent

    def _may_read(self) -> Bounds:
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        caches = (Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))  # for what it downloads and unpacks
        return Bounds(*caches, *([self._base] if self.root.exists() else []))

    def _refuse_outside(self) -> None:
        for part, column_name in self.columns.items():
            named = [
                (f"row {row}: {column_name}={path!r}", self._file_or_none(path) or self._base / path_of(path))
                for row, (path, inside) in enumerate(self._paths[part])
                if path and not inside
            ]
            refuse_outside(named, self._bounds, self._outside, f"{self.where}, column {column_name}", "it")

    def _file(self, value: str, name: str) -> Path:
        file = self._file_or_none(value)
        if file and (self._outside or self._bounds.hold(file)):
            return file
        if file:
            raise BadSample(name, f"{value!r} leads out of {self.where}", "mend the path, or write data.allow_outside=true")
        if is_url(value):
            raise BadSample(name, f"{value!r} is a URL, and URLs are not read", "download it and write its path")
        reason = f"{value!r} is no file, neither here nor below {self.where}"
        raise BadSample(name, reason, "mend the path or remove the row")


class HubSource(RecordSource):
    """A data set of the library `datasets`: see `HubRecords` for its own arguments, `RecordSource` for the rules."""

    form: ClassVar = "hub"

    def __init__(
        self,
        name: str,
        path: str,
        val_images: int,
        split: Split,
        resolution: int,
        *,
        revision: str | None = None,
        hub_split: str = "train",
        image_column: str = "image",
        caption_column: str = "text",
        signal_columns: dict[str, str] | None = None,
        allow_outside: bool = False,
        **rules: Any,
    ):
        records = HubRecords(path, revision, hub_split, image_column, caption_column, signal_columns, allow_outside)
        super().__init__(records, name, val_images, split, resolution, **rules)


def open_dataset(path: str, revision: str | None, split: str) -> Any:
    """The `datasets.Dataset` that a path or a hub id names. Raises UserError with the remedy."""
    where, root = f"data.path={path!r}", Path(path).expanduser()
    refuse_url(path, where)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError("data=hub needs the package datasets: pip install 'controlbench[data]'") from error
    datasets.disable_progress_bars()
    if root.exists():
        if revision is not None:
            raise UserError(f"data.revision={revision}: {where} is on this machine and has none; write data.revision=null")
        return _local(datasets, root, split, where)
    if not _is_hub_id(path):
        raise UserError(f"{where} is not here, and is not a hub id of the form owner/name")
    return _remote(datasets, path, revision, split, where)


def _local(datasets: Any, root: Path, split: str, where: str) -> Any:
    if root.is_dir() and ((root / "state.json").is_file() or (root / "dataset_dict.json").is_file()):
        saved = datasets.load_from_disk(str(root))
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise UserError(f"data.hub_split={split}: {where} has no such split; its splits are {', '.join(saved)}")
        return saved[split]
    if root.is_file():
        if root.suffix != PARQUET:
            raise UserError(f"{where} is a file that does not end in {PARQUET}; give a folder, or a parquet file")
        given: dict[str, Any] = {"path": "parquet", "data_files": {split: [str(root)]}}
    elif parts := sorted(str(f) for f in root.rglob(f"*{PARQUET}")):
        named = [f for f in parts if Path(f).name.startswith(f"{split}-")]
        given = {"path": "parquet", "data_files": {split: named or parts}}
    else:
        given = {"path": "imagefolder", "data_dir": str(root)}
    try:
        return datasets.load_dataset(**given, split=split)
    except Exception as error:  # the library raises almost anything on a folder that it cannot make sense of
        raise UserError(f"{where} cannot be read as a data set: {_one_line(error)}; see data=folder for plain files") from error


def _remote(datasets: Any, path: str, revision: str | None, split: str, where: str) -> Any:
    from huggingface_hub import HfApi

    try:
        if not datasets.config.HF_HUB_OFFLINE:
            HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT_S)  # load_dataset tries for half a minute
        return datasets.load_dataset(path, revision=revision, split=split)
    except Exception as error:  # network, permissions, a misspelt name: each has its remedy
        raise UserError(f"{where}: {_remedy(error, path)}") from error


def _remedy(error: Exception, path: str) -> str:
    """What went wrong between here and the hub, and what to do: by the words of the whole chain of causes."""
    chain, cause = "", error
    while cause is not None:
        chain += f" {type(cause).__name__} {cause}".lower()
        cause = cause.__cause__ or cause.__context__
    local = "or download it elsewhere and give its folder in data.path"
    terms = f"https://huggingface.co/datasets/{path}"
    for words, remedy in (
        (("gated",), f"its owner wants a login; accept the terms on {terms} and run `hf auth login`, {local}"),
        (("offline",), f"the hub is switched off (HF_HUB_OFFLINE) and no copy is in the local cache; switch it on, {local}"),
        (("scripts are no longer",), "it is a loading script, which is not run; use a parquet copy of it"),
        (("revision",), f"{_one_line(error)}; write a branch or a commit in data.revision"),
        (("unknown split",), f"{_one_line(error)}; write one of these in data.hub_split"),
        (
            ("connect", "timeout", "timed out", "resolve", "unreach"),
            f"the hub cannot be reached; check the network, set HF_HUB_OFFLINE=1 to read what is in the local cache, {local}",
        ),
        (
            ("notfound", "401", "403", "404"),
            f"not on the hub, or private; check its name, or {terms} and `hf auth login`, {local}",
        ),
    ):
        if any(word in chain for word in words):
            return remedy
    return f"{_one_line(error)}; {local.removeprefix('or ')}"


def _as_stored(data: Any) -> Any:
    """Image features as bytes or paths, rows in the order in which they lie."""
    import datasets

    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data if data._indices is None else data.flatten_indices()


def _paths(data: Any, name: str) -> list[tuple[str | None, bool]]:
    """Per row the path in a column, None where there is none, and whether the picture itself lies in the data set."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = data.data.column(name)
    if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        inside = pc.is_valid(pc.struct_field(values, "bytes")).to_pylist()
        return list(zip(pc.struct_field(values, "path").to_pylist(), inside, strict=True))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return [(path, False) for path in values.to_pylist()]
    return [(None, True)] * len(data)


def _stamp(data: Any) -> str:
    """Of the Arrow files that hold a data set, by name, size and time; without any, the library's own fingerprint."""
    files = [Path(f["filename"]) for f in data.cache_files]
    return ",".join(f"{f.name} {_stat(f)}" for f in files) or data._fingerprint


def _stat(file: Path | None) -> str:
    return f"{file.stat().st_size} {file.stat().st_mtime_ns}" if file else "not there"


def _is_hub_id(path: str) -> bool:
    owner, slash, name = path.partition("/")
    return bool(slash and owner and name) and "/" not in name and not path.startswith((".", "~", "/"))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
