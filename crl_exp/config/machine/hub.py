"""What went wrong between this machine and the Hugging Face hub, in words that name the id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")


def cached_commit(repo_id: str, kind: str = "model", revision: str | None = None) -> str | None:
    """The commit at which the hub's local cache holds a revision (null: the default branch) of a
    repository, without a look at the network; None where it doesn't hold it.

    kind: `model` or `dataset`. A revision that is a commit is taken as it is.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind)
    ref = folder / "refs" / (revision or "main")
    said = ref.read_text("utf-8").strip() if ref.is_file() else ""
    return said if COMMIT.fullmatch(said) else None


def hub_trouble(error: BaseException, repo_id: str) -> str | None:
    """Why a file of `repo_id` could not be had, or None where the hub has nothing to do with it.

    transformers and SAELens wrap the hub's exceptions in their own; the causes are looked through.
    """
    import httpx
    import requests
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))
    if _any(causes, GatedRepoError):
        return (
            f"{repo_id} is gated on the hub: accept its terms at https://huggingface.co/{repo_id} "
            "and log in with `hf auth login`"
        )
    if _any(causes, RevisionNotFoundError):
        return f"{repo_id} has no such revision on the hub"
    if _any(causes, RepositoryNotFoundError):
        return f"the hub has no {repo_id} (or it is private: log in with `hf auth login`)"
    network = (httpx.TransportError, requests.RequestException, ConnectionError, TimeoutError)
    if _any(causes, LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, *network):
        return f"the hub can't be reached for {repo_id}, and it is not in the local cache"
    return None


def own_code(error: BaseException) -> str | None:
    """Why something that brings Python code of its own was refused, or None where it is another
    fault. Such code runs with all that its reader may do; nothing here runs it."""
    if not any("trust_remote_code" in str(cause) for cause in _causes(error)):
        return None
    return (
        "it brings Python code of its own (auto_map in its config), which is never run here; take "
        "a model whose architecture transformers has"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _any(causes: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(cause, kinds) for cause in causes)
