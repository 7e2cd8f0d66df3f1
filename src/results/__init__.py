"""`results.json`: what one run or one cell found and under which conditions. `report` joins these files and reads nothing
else.

`train`, `cost` and `evaluation` are the kinds of results, `files` writes and reads them, `checks` refuses what is not whole,
`provenance` says where a number comes from.
"""

from src.results.checks import SCHEMA_VERSION, ResultError, plain
from src.results.cost import CostResult, check_cost, read_cost, write_cost
from src.results.evaluation import EvaluationResult, read_evaluation, write_evaluation
from src.results.files import kind_of, read_rows, write_atomic
from src.results.provenance import (
    HIDDEN,
    PACKAGES,
    command_line,
    dated_origin,
    environment,
    git_state,
    hide_secrets,
    origin,
    scrub,
    without_places,
)
from src.results.train import Result, check_result, read_results, write_results

__all__ = ["HIDDEN", "PACKAGES", "SCHEMA_VERSION", "CostResult", "EvaluationResult", "Result", "ResultError"]
__all__ += ["check_cost", "check_result", "command_line", "dated_origin", "environment", "git_state", "hide_secrets"]
__all__ += [
    "kind_of",
    "origin",
    "plain",
    "read_cost",
    "read_evaluation",
    "read_results",
    "read_rows",
    "scrub",
    "without_places",
]
__all__ += ["write_atomic", "write_cost", "write_evaluation", "write_results"]
