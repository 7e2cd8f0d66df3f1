"""What is evaluated: trained runs of this project, and adapters that others trained in diffusers' own form."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from src.results.design import design_of, flat
from src.types import UserError

if TYPE_CHECKING:
    from src.build import Sampler

OF_A_RUN = ("backbone", "task")  # groups that a run brings along


@dataclass(frozen=True)
class Subject:
    """One adapter before its weights are read. label: for people, without places; cfg: backbone, task, resolution, hardware
    and, of a run, everything else of its configuration; checkpoint: of a run; source: of an adapter of diffusers."""

    label: str
    cfg: DictConfig
    checkpoint: Path | None = None
    source: str | None = None

    def load(self) -> "Sampler":
        """Backbone, codec, task and adapter, ready to draw. Raises UserError for weights that do not fit."""
        from src import build

        if self.checkpoint is not None:
            return build.load_sampler(self.cfg, self.checkpoint)
        from src.construct import construct
        from src.interop.imports import import_adapter

        device = build.device_of(self.cfg)
        backbone = construct(self.cfg.backbone, resolution=self.cfg.resolution).load(device, build.backbone_dtype(self.cfg))
        adapter = import_adapter(self.source, backbone)
        task = construct(without_weights(self.cfg.task))
        return build.Sampler(backbone, backbone.load_codec(device), task, adapter)

    def described(self) -> dict[str, Any]:
        """What a manifest says of it before its weights are read."""
        if self.checkpoint is None:
            unknown = dict.fromkeys(("seed", "images_seen", "config_sha", "design"))
            return {"label": self.label, "kind": "diffusers", **unknown}
        from src.checkpoint import read_meta

        meta = read_meta(self.checkpoint)
        said = {"images_seen": meta.get("images_seen"), "config_sha": meta.get("config_sha")}
        return {"label": self.label, "kind": "run", "seed": self.cfg.seed, **said, "design": design_of(self.cfg)}


def find_subjects(cfg: DictConfig, typed: Sequence[str]) -> list[Subject]:
    """Those that `run` or `checkpoint` name. typed: overrides of the command line.

    Raises UserError, before a weight is read, for folders that are no runs, for runs of unlike tasks, backbones or
    resolutions, and for keys that a run brings along itself.
    """
    named = [cfg.run] if isinstance(cfg.run, str) else list(cfg.run or [])
    runs = [run for name in named for run in trained_below(name)]
    if bool(runs) == (cfg.checkpoint is not None):
        raise UserError("give run=<a run folder, or a list of them> or checkpoint=<an adapter of diffusers>, one of the two")
    if not runs:
        return [_imported(cfg)]
    keys = [word.lstrip("+~").split("=")[0] for word in typed]
    if surplus := [key for key in keys if key.split(".")[0] in OF_A_RUN]:
        raise UserError(f"{surplus[0]}: a run brings its own backbone and task; leave it out, or write checkpoint=")
    found = [_trained(str(run), cfg) for run in runs]
    doubles = [s.label for i, s in enumerate(found) if s.checkpoint in [f.checkpoint for f in found[:i]]]
    if doubles:
        raise UserError(f"run: {doubles[0]} stands there twice; leave one out")
    for other in found[1:]:
        refuse_unlike(shared(found[0].cfg), shared(other.cfg), found[0].label, other.label)
    return found


def trained_below(name: str) -> list[str]:
    """The finished runs below a folder that is no run itself; the name alone where there are none."""
    folder = Path(name)
    if (folder / "config.yaml").is_file():
        return [name]
    finished = sorted(file.parent for file in folder.rglob("results.json") if (file.parent / "checkpoints").is_dir())
    return [str(run) for run in finished] or [name]


def shared(cfg: DictConfig) -> dict[str, Any]:
    """What runs must have in common to be given one set, as far as a configuration tells."""
    task = OmegaConf.to_container(without_weights(cfg.task), resolve=True)
    backbone = {key: cfg.backbone.get(key) for key in ("name", "source", "revision", "quantize")}
    return {"task": task, "backbone": backbone, "resolution": cfg.resolution}


def refuse_unlike(one: dict[str, Any], two: dict[str, Any], name_one: str, name_two: str) -> None:
    """Raises UserError, naming every dotted key that differs, and both values of the first."""
    a, b = flat(one), flat(two)
    differ = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    if differ:
        first = differ[0]
        rest = f"; so do {', '.join(differ[1:])}" if len(differ) > 1 else ""
        raise UserError(
            f"{name_one} and {name_two} do not compare: {first} differs, {a.get(first)!r} and {b.get(first)!r}{rest}; evaluate "
            "both under the same conditions, each alone otherwise"
        )


def without_weights(task: DictConfig) -> DictConfig:
    """A task as pictures are drawn for it: a metric's weights are not drawn with."""
    return OmegaConf.create({k: None if k == "lpips_weights" else v for k, v in task.items()})


def _trained(run: str, cfg: DictConfig) -> Subject:
    from src.runs import trained_run

    trained, checkpoint = trained_run(run)
    folder = Path(run).resolve()
    with open_dict(trained):
        trained.hardware = cfg.hardware
        if cfg.resolution is not None:
            trained.resolution = cfg.resolution
    return Subject(_safe(f"{folder.parent.name}_{folder.name}"), trained, checkpoint=checkpoint)


def _imported(cfg: DictConfig) -> Subject:
    keys = {"backbone": cfg.backbone, "task": cfg.task, "hardware": cfg.hardware}
    own = OmegaConf.create({k: OmegaConf.to_container(v, resolve=True) for k, v in keys.items()})
    own.resolution = cfg.resolution or cfg.backbone.native_resolution
    return Subject(_safe(Path(cfg.checkpoint).name), own, source=cfg.checkpoint)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", name).strip("_.") or "adapter"
