"""Where a backbone's files come from: embedded in this package, a local folder, or the hub. Checked before any weight loads.

All three have the diffusers layout (`model_index.json`, one folder per part). A local folder never contacts the hub.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from src.hub import answers, hub_fault
from src.types import UserError

SHAPES = Path(__file__).with_name("shapes.json")  # configurations of public models, as their config.json files have them
EMBEDDED_ROOT = Path(__file__).resolve().parents[1] / "embedded" / "weights"


class SourceError(UserError):
    """The backbone's files cannot be had; the message says what to do about it."""


@dataclass(frozen=True)
class ModelSource:
    """One diffusers model folder, wherever it is.

    source: "embedded:<name>", a folder, a hub id, or "random:<name>" for a full-size shape with random weights, to measure
    memory and speed with; revision: hub branch, tag or commit (None: main);
    licence_url: the page where a gated model's licence is accepted (None: not gated).
    """

    source: str
    revision: str | None = None
    licence_url: str | None = None

    @property
    def random(self) -> bool:
        """Whether there are no weights to read, only a shape."""
        return self.source.startswith("random:")

    @property
    def embedded(self) -> bool:
        """Whether it ships with this project."""
        return self.source.startswith("embedded:")

    @cached_property
    def _shape(self) -> dict[str, dict]:
        shapes, name = json.loads(SHAPES.read_text()), self.source.removeprefix("random:")
        if name not in shapes:
            raise SourceError(f"backbone.source={self.source!r}: no such shape; there are {sorted(shapes)}")
        return shapes[name]

    @property
    def local_folder(self) -> Path | None:
        """The folder on this machine, or None for a hub id. Raises SourceError for a path that is not a folder."""
        if self.embedded:
            name = self.source.removeprefix("embedded:")
            folder = EMBEDDED_ROOT / name
            if not folder.is_dir():
                have = sorted(p.parent.name for p in EMBEDDED_ROOT.glob("*/model_index.json"))
                raise SourceError(
                    f"no embedded backbone {name!r}; there are {have}, or make it: python -m src.prepare backbone={name}"
                )
            return folder
        path = Path(self.source).expanduser()
        if path.is_dir():
            return path
        if self.source.startswith((".", "/", "~")) or self.source.count("/") != 1:
            raise SourceError(f"backbone.source={self.source!r} is not a folder and not a hub id of the form owner/name")
        return None

    def config(self, part: str) -> dict:
        """The JSON configuration of a part ("transformer", "vae", ...), or of the whole for part="" (model_index.json)."""
        if self.random:
            return self._shape[part]
        name = f"{part}/{part}_config.json" if part == "scheduler" else f"{part}/config.json" if part else "model_index.json"
        return json.loads(self._small_file(name).read_text())

    def check(self, parts: tuple[str, ...]) -> None:
        """Refuse at once what cannot work: missing folder, missing part, gated model without licence or token, no network."""
        index = self.config("")
        for part in parts:
            if part not in index or index[part][0] is None:
                raise SourceError(
                    f"{self.source}: model_index.json names no {part!r}; it holds {sorted(k for k in index if k[0] != '_')}"
                )
            if not self.random and self.local_folder is not None and not (self.local_folder / part).is_dir():
                raise SourceError(
                    f"{self.source}: the folder {part}/ is missing, although model_index.json names it; copy the whole model"
                )

    def fetch(self, parts: tuple[str, ...]) -> Path:
        """-> a folder on this machine that holds these parts; downloads them from the hub where they are not cached."""
        if self.random:
            raise SourceError(
                f"{self.source} has random weights and no {', '.join(parts)}: it serves to measure memory and speed; "
                "to train or sample, name a folder or a hub id in backbone.source"
            )
        if self.local_folder is not None:
            return self.local_folder
        from huggingface_hub import snapshot_download

        wanted = ["model_index.json"]
        for part in parts:
            wanted += [f"{part}/*.json", f"{part}/*.txt", f"{part}/*.model", f"{part}/*.safetensors"]
        with _hub_errors(self):
            return Path(
                snapshot_download(
                    self.source,
                    revision=self.revision,
                    allow_patterns=wanted,
                    ignore_patterns=["*.fp16.*"],
                    local_files_only=not answers(),
                )
            )

    @cached_property
    def resolved_revision(self) -> str:
        """The hub commit, or "local" for a folder (whose content the weight hash identifies), or "random"."""
        if self.random:
            return "random"
        if self.local_folder is not None:
            return "local"
        return self._small_file("model_index.json").parent.name  # the hub cache names a snapshot's folder by its commit

    def part_hash(self, parts: tuple[str, ...]) -> str:
        """16 hex digits over the weight and vocabulary files of parts of a local folder."""
        digest = hashlib.blake2b(digest_size=8)
        for part in parts:
            for file in sorted((self.local_folder / part).glob("*.*")):
                digest.update(f"{part}/{file.name}".encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
        return digest.hexdigest()

    def _small_file(self, name: str) -> Path:
        folder = self.local_folder
        if folder is not None:
            if not (folder / name).is_file():
                raise SourceError(
                    f"{folder} has no {name}: not a model folder in the diffusers layout; "
                    "save one with pipeline.save_pretrained(folder), or name a hub id"
                )
            return folder / name
        from huggingface_hub import hf_hub_download

        with _hub_errors(self):
            return Path(hf_hub_download(self.source, name, revision=self.revision, local_files_only=not answers()))


class _hub_errors:
    """Turn the hub's exceptions into one line with the remedy."""

    def __init__(self, model: ModelSource):
        self.model = model

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, _trace) -> bool:
        fault = None if error is None or isinstance(error, UserError) else hub_fault(error)
        if fault is None:
            return False
        source = self.model.source
        page = self.model.licence_url or f"the page of {source} on the hub"
        said = {
            "gated": f"is gated: accept its licence at {page}, then run `hf auth login` or set HF_TOKEN",
            "revision": f"has no revision {self.model.revision!r}; leave backbone.revision out for main",
            "missing": "is not on the hub, or is private: check the spelling, then `hf auth login` or HF_TOKEN",
            "layout": f"is not in the diffusers layout: {(str(error).splitlines() or [''])[0]}",
            "unreachable": f"is not cached here and the hub cannot be reached ({kind.__name__}): download it on a machine with "
            f"a network (`hf download {source}`) and pass backbone.source=<that folder>, or use backbone=sd3_tiny",
        }
        raise SourceError(f"{source} {said[fault]}") from error
