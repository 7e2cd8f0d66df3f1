"""What can go wrong between this machine and the model hub, by kind: whoever asks the hub says the remedy in its own words; and
what is read of a model that a stranger made."""

import functools
from pathlib import Path
from typing import Any, Literal

from src.types import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WAIT_S = 5.0  # for the hub's first answer; HF_HUB_DOWNLOAD_TIMEOUT, 10 s, is for the next bytes of a file's content
HubFault = Literal["gated", "revision", "missing", "layout", "unreachable"]


def hub_fault(error: BaseException) -> HubFault | None:
    """The kind of an exception of huggingface_hub; None for one that is not about the hub.

    gated: the licence is not accepted; revision: there is no such; missing: no such repository, or a private one; layout: a
    file is not in it; unreachable: nothing of that, or no network.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "gated"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "missing"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "layout"
    of_the_wire = type(error).__module__.startswith(("httpx", "httpcore"))
    return "unreachable" if of_the_wire or isinstance(error, (OSError, ValueError, errors.HfHubHTTPError)) else None


@functools.cache
def answers() -> bool:
    """Whether the hub says anything at all within WAIT_S, asked once per process. Its own library would wait for minutes: it
    tries again six times, 60 s each."""
    import httpx
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=WAIT_S)
    except (httpx.HTTPError, OSError):
        return False
    return True


def from_safetensors(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder on this machine, from safetensors alone: weights in any other file are pickle, which
    may run what its writer wanted. Raises UserError where there are no safetensors, or where the model brings code."""
    try:
        return kind.from_pretrained(folder, **options, local_files_only=True, use_safetensors=True)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(f"{folder} brings code of its own, which is never run: {str(error).splitlines()[0]}") from error
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        below = Path(folder) / options.get("subfolder", "")
        pickles = [f for f in sorted(below.rglob("*")) if f.suffix in PICKLES and not list(f.parent.glob("*.safetensors"))]
        if not pickles:
            raise UserError(f"{below}: {str(error).splitlines()[0]}; copy the whole model, with its *.safetensors") from error
        raise UserError(
            f"{pickles[0]} is pickle, which can run any code, and is never read; take a model that has *.safetensors, or write "
            "them with save_pretrained(folder, safe_serialization=True) where nothing can be harmed"
        ) from error
