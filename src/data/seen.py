"""Whether a detector knows the pictures that it is given."""

from src.data.source import Source
from src.tasks.base import Task
from src.types import UserError


def check_seen(task: Task, source: Source, trained: bool = False) -> None:
    """Refuse photos for a detector that knows rendered scenes alone. Maps of their own make conditions without it, and then
    the scores are worth a line. trained: whether the task is that of a run which is over. Raises UserError."""
    if not task.sees_scenes_only or source.are_scenes:
        return
    name = "a depth model" if task.signal == "depth" else "a keypoint model"
    fault = f"task.detector=scene_probe knows the project's rendered scenes and no photos, and data={source.name} are photos"
    fix = f"{'train with' if trained else 'write'} task.detector=<hub id or folder of {name}>"
    if task.signal not in source.signals:
        raise UserError(
            f"{fault}: {fix}, or give the maps as data.signals={{{task.signal}: <folder>}}; data.are_scenes=true where they "
            "are scenes that were written out"
        )
    print(
        f"{fault}: conditions are those of the data, and the scores {' and '.join(task.metrics)} mean nothing; {fix}",
        flush=True,
    )
