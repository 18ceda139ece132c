"""What huggingface_hub raises where the hub does not give something, and errors of ours that say the way out."""

from __future__ import annotations

from typing import cast

from ggufmoe.errors import HubError, one_line


def hub_failures() -> tuple[type[Exception], ...]:
    """The exceptions of huggingface_hub and of its HTTP library where the hub does not give something."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # The bases of HfHubHTTPError are those of the HTTP library that this huggingface_hub uses.
    http_errors = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    return (OSError, ValueError, EntryNotFoundError, *http_errors)


def is_offline() -> bool:
    """Whether the user forbids to reach the hub (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def explained(where: str, repo_id: str, error: BaseException) -> HubError:
    """The error to raise for one of ``hub_failures()``: what ``where`` is not, and what to do."""
    from huggingface_hub import constants, errors

    chain = [error]  # huggingface_hub hides a refusal behind 'not found in the cache'
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    page = f"{constants.ENDPOINT}/{repo_id}"
    token = "set a token (HF_TOKEN, or `hf auth login`)"
    if any(isinstance(cause, errors.GatedRepoError) for cause in chain):
        return HubError(f"{where} is gated: accept its licence on {page} and {token}")
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in chain):
        return HubError(f"{where}: there is no such revision; {page} lists branches and tags")
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in chain):
        return HubError(
            f"{where} is neither a local directory nor a public model on {constants.ENDPOINT}; if it is private, "
            f"ask for access on {page} and {token}"
        )
    if any(getattr(getattr(cause, "response", None), "status_code", None) == 429 for cause in chain):
        return HubError(
            f"{where} cannot be fetched for now: {constants.ENDPOINT} had too many requests from here (status 429); "
            f"try again in five minutes, or {token}, which allows more"
        )
    if constants.HF_HUB_OFFLINE:
        return HubError(f"{where} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it")
    return HubError(
        f"{where} cannot be fetched from {constants.ENDPOINT} and is not in the cache ({one_line(chain[-1])}); "
        "check the connection, or give a directory"
    )
