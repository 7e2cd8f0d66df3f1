"""One of several processes fails, hangs or is killed: the run ends soon, tells the first error, and can go on."""

import json
import time

import pytest
import torch

from src.checkpoint import newest
from tests.test_ranks import RUN, TWO, go, rows, run_of, weights

TIMEOUT_S, STARTS_S, ENDS_S = 15, 60, 25  # hardware.timeout_s; imports and caches; grace, dump of the hung, the last words
FAULTY = [*RUN, *TWO, f"hardware.timeout_s={TIMEOUT_S}", "callbacks.checkpoints.every_images=8"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "first", "beside"),
    [
        ("1:16:raise", "error: rank 1 failed first: ValueError: this rank has had enough", ""),
        ("0:16:raise", "error: rank 0 failed first: ValueError: this rank has had enough", ""),
        ("1:16:hang", "error: rank 0 failed first: RuntimeError: ", "rank 1 did not answer and was ended"),
        ("1:16:kill", "error: rank 1 ended without a word (SIGKILL)", ""),
    ],
)
def test_one_rank_fails_and_nobody_hangs(tmp_path, cache_dir, fault, first, beside):
    began = time.monotonic()
    done = go(tmp_path, cache_dir, *FAULTY, f"output_dir={tmp_path}", FAULT=fault)
    took = time.monotonic() - began
    assert done.returncode not in (0, 143), done.stdout + done.stderr
    # a hung job would have been ended by the caller's own limit, and not by itself
    assert took < STARTS_S + TIMEOUT_S + ENDS_S
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "rank "))]
    assert said[0].startswith(first), done.stderr
    assert beside in "\n".join(said)
    if fault.endswith("hang"):
        assert "in fail" in done.stderr, "where the hung rank stood"
    # what was saved before is whole, and an uninterrupted run is met again from there, to the bit
    (folder,) = (tmp_path / "unicon_sd3_tiny_canny").iterdir()
    kept = newest(folder / "checkpoints")
    assert json.loads((kept / "meta.json").read_text())["images_seen"] == 16
    straight = run_of(go(tmp_path / "straight", cache_dir, *FAULTY, f"output_dir={tmp_path / 'straight'}"))
    assert run_of(go(tmp_path / "again", cache_dir, f"resume={folder}")) == folder
    assert rows(folder) == rows(straight)
    for name in ("adapter", "adapter_ema"):
        assert all(
            torch.equal(a, b) for a, b in zip(weights(folder, name).values(), weights(straight, name).values(), strict=True)
        )


@pytest.mark.fault
def test_a_disk_that_refuses_the_first_rank_fails_on_all(tmp_path, cache_dir):
    """Only rank 0 writes; the other must not wait for it in the step behind."""
    blocked = tmp_path / "unicon_sd3_tiny_canny"
    done = go(tmp_path, cache_dir, *FAULTY, f"output_dir={tmp_path}", FAULT="0:8:nowhere")
    assert done.returncode == 1
    assert "failed first: " in done.stderr
    assert "nowhere to write" in done.stderr
    assert not list(blocked.glob("*/checkpoints/images-*"))
