"""Trained adapters on a named set of prompts, conditions and noise: pictures, their manifest, and numbers with intervals.

    python -m src.evaluate run=runs/<name>/<stamp>
    python -m src.evaluate run=[runs/<one>/<stamp>,runs/<other>/<stamp>] n=256

Drawn and scored by what validates trainings (src/control_score.py). The last line printed is `run: <folder>`: of one adapter
its own, of several the one that holds them and comparison.json. A command that was killed goes on where it was.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(cfg: "DictConfig") -> None:
    """The entry: compare what is there, or evaluate."""
    from hydra.core.hydra_config import HydraConfig

    from src.config import resolve_hardware
    from src.evaluate.subjects import find_subjects

    typed = list(HydraConfig.get().overrides.task)
    cfg = resolve_hardware(cfg)
    if cfg.compare:
        from src.evaluate.compare import compare_folders

        folder = compare_folders(cfg)
    else:
        subjects = find_subjects(cfg, typed)
        from src import preflight
        from src.evaluate.flow import evaluate  # heavy: what is named wrongly is refused before

        pictures = len(subjects) * (1 + len(cfg.arms)) * (cfg.n or cfg.evaluation_set.images or 0)
        preflight.evaluation(cfg, subjects[0].cfg.backbone, pictures, subjects[0].cfg.resolution)

        folder = evaluate(cfg, subjects)
    print(f"run: {folder}", flush=True)


if __name__ == "__main__":
    import sys

    from src.evaluate.early import refuse_absent

    refuse_absent(sys.argv[1:])  # torch comes with everything else, and takes seconds
    from src.config import cli

    cli("evaluate", main)
