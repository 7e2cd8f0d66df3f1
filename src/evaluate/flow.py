"""From a checked configuration to pictures, manifest and numbers: everything that can be refused first, then one adapter after
the other."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf

from src.construct import construct
from src.control_score import ARMS, NONE, RIGHT, HeldOut, drawn
from src.evaluate.compare import compare, told
from src.evaluate.manifest import NAME, conditions_of, drawn_from, group_key, read_manifest, write_manifest
from src.evaluate.measures import Measures, plan_measures
from src.evaluate.numbers import measure, write_numbers
from src.evaluate.pictures import PictureFolder, Progress
from src.evaluate.sets import EvaluationSet, Plan, names, open_set, plan_set, refuse_training_images
from src.evaluate.subjects import Subject, refuse_unlike, without_weights
from src.sampling import Batches, solver_for
from src.types import UserError

if TYPE_CHECKING:
    from src.build import Sampler

PARTS = "parts"
FOLDERS = {arm: arm or "right" for arm in ARMS}  # arm -> the folder of its pictures


@dataclass
class Work:
    """What all adapters of one command share. part: (number, count) where several jobs share the drawing; opened: the set, and
    `first` the conditions that it was opened for."""

    cfg: DictConfig
    plan: Plan
    measures: Measures
    arms: tuple[str, ...]
    batches: Batches
    part: tuple[int, int] | None = None
    first: tuple[str, dict] | None = None
    opened: EvaluationSet | None = None


def evaluate(cfg: DictConfig, subjects: Sequence[Subject]) -> Path:
    """Evaluate adapters from `find_subjects` as a resolved configuration says. -> the folder of the one, or the one that holds
    all. Raises UserError before a weight is read for whatever can be known by then."""
    arms = named_arms(cfg.arms)
    task, of_a_run = construct(without_weights(subjects[0].cfg.task)), subjects[0].checkpoint is not None
    plan = plan_set(cfg, task, of_a_run, subjects[0].cfg.resolution, say)
    for subject in subjects:
        if subject.checkpoint is not None:
            refuse_training_images(plan, cfg.data, subject.cfg, subject.label)
    measures = plan_measures(cfg, task, plan.source.are_scenes, plan.source.resolution, say)
    torch.set_num_threads(cfg.hardware.threads)
    torch.backends.cudnn.deterministic = True
    from src import build

    build.quiet()
    if cfg.engine == "ray":
        from src.evaluate.on_ray import draw_parts

        draw_parts(cfg, subjects, len(plan), say)
    work = Work(cfg, plan, measures, arms, Batches(cfg.batch, say), drawn_part(cfg.part))
    folders = [evaluate_one(work, subject) for subject in subjects]
    return folders[0] if len(folders) == 1 or work.part else compare(folders, folders[0].parent, say)


def named_arms(given: Sequence[str]) -> tuple[str, ...]:
    """The right condition and the arms that were asked for, in one order. Raises UserError for a word that is no arm."""
    for word in given:
        if word not in ARMS or word == RIGHT:
            raise UserError(f"arms: {word!r} is not one of {', '.join(ARMS[1:])}")
    return tuple(arm for arm in ARMS if arm == RIGHT or arm in given)


def evaluate_one(work: Work, subject: Subject) -> Path:
    """Draw what is missing of one adapter, measure it, and leave manifest.json, outcome.json and results.json."""
    from src.backbones.codec import module_hash

    cfg, model = work.cfg, subject.load()
    solver = solver_for(model.backbone.objective, model.backbone.scheduler(), cfg.solver)
    conditions = drawn_from(cfg, work.plan, model, subject.cfg.task, type(solver).__name__)
    if work.first is not None:
        refuse_unlike(work.first[1], conditions, work.first[0], subject.label)
    group = Path(cfg.output_dir) / f"{work.plan.name}-{group_key(conditions, work.plan.source.fingerprint())}"
    if work.opened is None:
        work.first, work.opened = (subject.label, conditions), open_set(work.plan, model.task, group / "set", say)
    held = held_out(work, model, solver)
    adapter_hash = module_hash(model.adapter)
    folder = group / f"{subject.label}-{adapter_hash[:8]}"
    if work.part:
        return draw_part(work, model, held, folder)
    kept = PictureFolder(folder, say)
    put_together(kept, work)
    device = torch.cuda.get_device_name() if cfg.hardware.accelerator == "gpu" else "cpu"
    drawing = {"device": device, "threads": cfg.hardware.threads, "batch": cfg.batch, "torch": torch.__version__}
    progress = draw(work, model, held, kept, drawing)
    files = [file for arm in work.arms for file in kept.hashes(names(FOLDERS[arm], range(len(work.plan))))]
    described = {"adapter": model.adapter.name, **subject.described(), "hash": adapter_hash}
    conditions = conditions_of(conditions, work.opened, work.measures.settings())
    manifest = write_manifest(kept.folder, conditions, described, drawing, files)
    pictures = {arm: kept.many(names(FOLDERS[arm], range(len(work.plan)))) for arm in work.arms}
    found = measure(held, work.opened, pictures, work.measures, say)
    result = write_numbers(kept.folder, manifest, found, work.opened, model, held, progress)
    kept.close()
    if cfg.logger.name != "local":
        from src.loggers.results import log_result

        trained = OmegaConf.to_container(subject.cfg, resolve=True)
        named = {"adapter": {**trained.get("adapter", {}), "name": model.adapter.name}, "evaluation": conditions}
        log_result(cfg.logger, kept.folder, f"{work.plan.name} {subject.label}", {**trained, **named}, result)
    for line in told(found.entries):
        say(line)
    say(f"pictures: {kept.folder}   numbers: {kept.folder}/results.json")
    return kept.folder


def held_out(work: Work, model: "Sampler", solver: object) -> HeldOut:
    """The set as training's validation has it. Captions, conditions and latents are encoded once and kept in cache_dir."""
    from src.data.stores import build_stores

    cfg, device = work.cfg, model.adapter.device
    (stores,) = build_stores(
        [work.plan.source], model.task, model.backbone, model.codec, model.adapter.condition_space, Path(cfg.cache_dir), device,
        work.plan.seed, cfg.hardware.workers, say,
    )  # fmt: skip
    model.backbone.drop_text()
    images, conditions = work.opened.images, work.opened.conditions
    return HeldOut(stores, images, conditions, model.task, model.codec, solver, cfg.steps, cfg.guidance, work.plan.seed)


def draw(work: Work, model: "Sampler", held: HeldOut, kept: PictureFolder, drawing: dict) -> Progress:
    """Every arm's pictures that are not there yet. Batches are those of a run from the beginning, so that a picture has the
    neighbours that it would have had, and the same last bit."""
    rows = range(len(work.plan))
    number, count = work.part or (0, 1)
    if NONE in work.arms and not work.part:
        adopt(kept, names(FOLDERS[NONE], rows), drawing)
    wanted = {arm: dict(zip(rows, names(FOLDERS[arm], rows), strict=True)) for arm in work.arms}
    there = sum(name in kept.files for of_arm in wanted.values() for name in of_arm.values())
    total = len(rows) * len(work.arms)
    if there:
        say(f"{kept.folder.name}: {there} of {total} pictures are there{', going on behind them' if there < total else ''}")
    progress = Progress(f"{kept.folder.name}: picture", total, there, say)
    for arm, of_arm in wanted.items():
        missing = {row // work.cfg.batch for row, name in of_arm.items() if name not in kept.files}
        again = [row for row in rows if (of := row // work.cfg.batch) in missing and of % count == number]
        for some, pictures in drawn(model.adapter, held, arm, again, work.batches):
            fresh = [(row, p) for row, p in zip(some, pictures, strict=True) if of_arm[row] not in kept.files]
            for row, picture in fresh:
                kept.write(of_arm[row], picture)
            progress.add(len(fresh))
    return progress


def drawn_part(given: str | None) -> tuple[int, int] | None:
    """`0/4` -> (0, 4). Raises UserError for anything else."""
    if given is None:
        return None
    number, _, count = given.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise UserError(f"part={given}: write part=0/4, part=1/4 and so on, one for each job")
    return int(number), int(count)


def draw_part(work: Work, model: "Sampler", held: HeldOut, folder: Path) -> Path:
    """Every count-th batch of every arm, in a folder of its own, so that jobs wait for nobody. -> the folder of the whole."""
    number, count = work.part
    kept = PictureFolder(folder / PARTS / f"{number}-of-{count}", say)
    draw(work, model, held, kept, {})
    kept.close()
    say(f"part {number} of {count}: {len(kept.files)} pictures; when all are drawn, the same command without part= measures")
    return folder


def put_together(kept: PictureFolder, work: Work) -> None:
    """Take over what parts have drawn: the pictures that this process would draw, in the same batches."""
    wanted = {name for arm in work.arms for name in names(FOLDERS[arm], range(len(work.plan)))} - kept.files.keys()
    for folder in sorted((kept.folder / PARTS).glob("*-of-*")) if wanted else ():
        part = PictureFolder(folder, say)  # refused while it is being drawn
        for name in sorted(wanted & part.files.keys()):
            kept.adopt(folder / name, name, part.files[name].sha256)
        part.close()


def adopt(kept: PictureFolder, wanted: Sequence[str], drawing: dict) -> None:
    """Take over the frozen backbone's own pictures from an adapter that was evaluated before under the same conditions, on the
    same machine and in the same batches: they would be drawn bit for bit the same."""
    missing = [name for name in wanted if name not in kept.files]
    for file in sorted(kept.folder.parent.glob(f"*/{NAME}")) if missing else ():
        manifest = read_manifest(file.parent)
        if manifest["drawing"] != drawing:
            continue
        hashes = {entry["file"]: entry["sha256"] for entry in manifest["files"]}
        for name in [name for name in missing if name in hashes]:
            kept.adopt(file.parent / name, name, hashes[name])
        missing = [name for name in missing if name not in kept.files]


say = functools.partial(print, flush=True)
