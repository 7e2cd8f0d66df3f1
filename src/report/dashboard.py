"""A W&B workspace of the same charts, defined here and written as JSON; saving it there wants `wandb-workspaces` and a login.

Nothing in it is not in the page: sections and panels are those of `report.html`, over the runs of a project.
"""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import CONF
from src.config.signatures import locate
from src.report.charts import LOOKS
from src.report.rows import read_rows
from src.results import write_atomic
from src.types import UserError

FILE = "dashboard.json"
IMAGES, SECONDS = "images_seen", "train/seconds"
CLOCK = "RelativeTime(Process)"  # W&B's own clock, which runs in validations, too
ARMS = ("", "/wrong_condition", "/zero_condition", "/no_condition")
METHOD, BACKBONE, TASK = "adapter.name", "backbone.name", "task.name"  # of a run's configuration
BENCHED = {  # title -> what a benchmark logs
    "peak memory of a step, GiB": "peak_mem_gib",
    "milliseconds of a step, benchmarked": "step_time_ms/total",
    "images per second, benchmarked": "img_per_s",
}
EXTRA = "pip install -e '.[dashboards]'"


def definition(name: str, project: str, entity: str | None, metrics: dict[str, str]) -> dict[str, Any]:
    """The workspace as plain data: sections of panels. metrics: task -> its control score.

    A panel has kind (line, scatter, bar, media), title, and x and y as keys that runs log; runs are grouped by method.
    """
    first = [_line(f"{task}: {m} against images", [f"val/{m}"], IMAGES) for task, m in metrics.items()]
    first += [_line(f"{task}: {m} against the clock", [f"val/{m}"], CLOCK) for task, m in metrics.items()]
    arms = [_line(f"{task}: {m} of all arms", [f"val/{m}{arm}" for arm in ARMS], IMAGES) for task, m in metrics.items()]
    cost = [
        {"kind": "scatter", "title": f"{task}: {m} against seconds of training", "x": SECONDS, "y": f"val/{m}"}
        for task, m in metrics.items()
    ]
    machine = [
        _line("peak memory, GiB", ["train/peak_mem_gib"], IMAGES),
        {"kind": "bar", "title": "peak memory, GiB", "y": ["train/peak_mem_gib"]},
        _line("images per second", ["train/img_per_s"], IMAGES),
        {"kind": "bar", "title": "milliseconds of a step", "y": ["train/step_time_ms"]},
    ]
    learning = [_line(title, [key], IMAGES) for title, key in (("loss", "train/loss"), ("validation loss", "val/loss"))]
    sections = {"control": first, "arms": arms, "cost against control": cost, "memory and speed": machine, "loss": learning}
    looks = [(name, f"eval/{name}") for name in (*metrics.values(), *LOOKS)]
    sections["evaluations"] = [
        {"kind": "bar", "title": f"{name} of evaluations", "y": [key]} for name, key in dict(looks).items()
    ]
    sections["benchmarks"] = [{"kind": "bar", "title": title, "y": [f"cost/{key}"]} for title, key in BENCHED.items()]
    sections["the same scenes"] = [{"kind": "media", "title": "source, condition, no control, controlled", "y": ["val/grid"]}]
    return {
        "name": name,
        "project": project,
        "entity": entity,
        "group_by": [METHOD, BACKBONE, TASK],
        "sections": [{"name": title, "panels": panels} for title, panels in sections.items()],
    }


def _line(title: str, keys: list[str], x: str) -> dict[str, Any]:
    return {"kind": "line", "title": title, "x": x, "y": keys}


def define(cfg: DictConfig) -> Path:
    """Write the definition into cfg.out and say how to push it. -> its file. Raises UserError."""
    made = definition(cfg.name, cfg.project, cfg.entity, control_scores(cfg.runs))
    file = Path(cfg.out) / FILE
    write_atomic(file, (json.dumps(made, indent=2) + "\n").encode())
    panels = sum(len(section["panels"]) for section in made["sections"])
    print(f"{len(made['sections'])} sections, {panels} panels for project {cfg.project}")
    print(f"to have it in W&B: {EXTRA}, wandb login, then python -m src.report wandb project={cfg.project} push=true")
    print("the same without an account: python -m src.report runs=[runs]")
    print(f"wrote {file}", flush=True)
    return file


def control_scores(runs: Iterable[str]) -> dict[str, str]:
    """Task -> its control score: of the tasks in these results, or of every task that there is. Raises UserError."""
    if runs := list(runs):
        return {row.result.task: row.main_metric for row in read_rows(runs)}
    found = {}
    for file in sorted((CONF / "task").glob("*.yaml")):
        node = OmegaConf.load(file)
        found[node.name] = next(iter(locate(node["_target_"], "task", str).metrics))
    return found


def push(cfg: DictConfig) -> str:
    """Write the definition and save it as a workspace of the project. -> its address.

    Raises UserError, before anything is written, where the package, a key or the server is missing.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(f"push=true: wandb-workspaces is not installed; {EXTRA}")
    import wandb

    from src.loggers.wandb_run import reachable

    mode, why = reachable(wandb.setup().settings.base_url)
    if mode != "online":
        raise UserError(f"push=true: {why}; without it the definition is written, and nothing is sent")
    made = json.loads(define(cfg).read_text())
    made["entity"] = made["entity"] or wandb.Api().default_entity
    url = workspace(made).save().url
    print(f"saved as {url}", flush=True)
    return url


def workspace(made: dict[str, Any]) -> Any:
    """A definition as the workspace of `wandb_workspaces` that it describes; nothing is sent. It wants an entity."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as spaces

    def panel(p: dict[str, Any]) -> Any:
        match p["kind"]:
            case "line":
                return panels.LinePlot(title=p["title"], x=p["x"], y=p["y"])
            case "scatter":
                return panels.ScatterPlot(title=p["title"], x=panels.SummaryMetric(p["x"]), y=panels.SummaryMetric(p["y"]))
            case "bar":
                return panels.BarPlot(title=p["title"], metrics=p["y"])
            case "media":
                return panels.MediaBrowser(title=p["title"], media_keys=p["y"], num_columns=1)
            case other:
                raise ValueError(f"a panel is a line, scatter, bar or media, not {other!r}")

    sections = [spaces.Section(name=s["name"], panels=[panel(p) for p in s["panels"]], is_open=True) for s in made["sections"]]
    return spaces.Workspace(
        entity=made["entity"],
        project=made["project"],
        name=made["name"],
        sections=sections,
        runset_settings=spaces.RunsetSettings(groupby=[spaces.Config(key) for key in made["group_by"]]),
    )
