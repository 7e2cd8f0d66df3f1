"""Every experiment runs, as a quick try; that it composes and says what it reaches: test_config."""

import pytest

from src.config import load
from src.results import read_results
from src.support import options
from src.train.flow import train
from tests.conftest import SMALL


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_runs(experiment, tmp_path, cache_dir):
    """In this process, since loading torch costs more than such a run; the commands of the documents go through the entry."""
    typed = [f"+experiment={experiment}", *SMALL, f"output_dir={tmp_path}", f"cache_dir={cache_dir}"]
    folder = train(load("train", typed), typed, experiment)
    assert read_results(folder / "results.json").experiment == experiment
