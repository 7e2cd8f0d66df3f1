"""What can go wrong between this machine and the model hub, by kind: whoever asks the hub says the remedy in its own words."""

from typing import Literal

WAIT_S = 5.0  # for an answer about a file; HF_HUB_DOWNLOAD_TIMEOUT, 10 s, is for the next bytes of its content
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
