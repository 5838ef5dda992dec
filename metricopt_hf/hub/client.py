"""The Hub: fetching the files of a value function, and pushing, with errors that say what to do."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError, ValueFunctionError
from ..value.serialization import CONFIG_FILE, MAX_BYTES, check_file

T = TypeVar("T")

# Where a value function lies in the repository of a model, whose own config and weights have the root.
SUBFOLDER = "value_function"

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, or pass token=..."
# Seconds before each new attempt at a push that failed for the moment.
WAITS = (1.0, 4.0)


def fetch(
    name_or_path: str | os.PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a value function: a local one, or downloaded; of a model's folder or repository, the part in it.

    Raises:
        ValueFunctionError: there is none, it may not be read, it is too large, or the Hub cannot be reached.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(_download(str(name_or_path), revision, token, cache_dir, local_files_only))
    return folder / SUBFOLDER if (folder / SUBFOLDER / CONFIG_FILE).is_file() else folder


def _download(name: str, revision, token, cache_dir, local_files_only) -> str:
    get = partial(snapshot_download, name, revision=revision, token=token, cache_dir=cache_dir)
    wanted = [f"{SUBFOLDER}/{file}" for file in MAX_BYTES]
    try:
        if local_files_only:
            return get(allow_patterns=wanted, local_files_only=True)
        try:
            listed = get(allow_patterns=[*wanted, *MAX_BYTES], dry_run=True)
        except DryRunError as error:  # the Hub cannot be asked: is it held here already?
            try:
                return get(allow_patterns=wanted, local_files_only=True)
            except LocalEntryNotFoundError:
                raise error from error.__cause__
        sizes = {file.filename: file.file_size for file in listed}
        if not set(wanted) & set(sizes):
            wanted = list(MAX_BYTES)
        for file in wanted:
            check_file(name, file, sizes.get(file))
        return get(allow_patterns=wanted)
    except ValueFunctionError:
        raise
    except Exception as error:
        raise ValueFunctionError(_why_not_fetched(error, name, revision)) from error


def _why_not_fetched(error: Exception, name: str, revision: str | None) -> str:
    kinds = list(chain(error))
    if any(isinstance(e, HFValidationError) for e in kinds):
        return f"{name!r} is neither a folder nor the name of a repository on the Hub (user/name)."
    if any(isinstance(e, RevisionNotFoundError) for e in kinds):
        return f"{name} has no revision {revision!r}: give a branch, a tag or a whole commit hash."
    if any(isinstance(e, RepositoryNotFoundError) or status(e) in (401, 403) for e in kinds):
        return f"There is no repository {name} that you may read. If it is private or gated, {LOG_IN}; check the name."
    return (
        f"{name} could not be fetched from the Hub ({first_line(error)}). Check the network, HF_ENDPOINT and "
        "HF_HUB_OFFLINE, and try again; or give a local folder."
    )


def push(upload: Callable[[], T], repo: str, kept: str) -> T:
    """Call `upload`, and again if the Hub or the network fails for a moment.

    Args:
        repo: the destination, for messages.
        kept: where the files still are, for messages.

    Raises:
        HubError: it failed for good; what to do about it, and where the files are.
    """
    for wait in (*WAITS, None):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*about to commit a data file.*")
                return upload()
        except Exception as error:
            if not any(_of_the_hub(e) for e in chain(error)):
                raise
            if wait is None or not _passing(error):  # the client has retried one that comes wrapped
                raise HubError(why_not_pushed(error, repo, kept)) from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def why_not_pushed(error: BaseException, repo: str, kept: str) -> str:
    """Why a push failed, what to do, and that nothing local is lost."""
    kinds = list(chain(error))
    if any(isinstance(e, RevisionNotFoundError) for e in kinds):
        remedy = "Make that branch first: HfApi().create_branch(repo_id, branch=...)."
    elif any(isinstance(e, LocalTokenNotFoundError) or status(e) in (401, 403, 404) for e in kinds):
        remedy = f"To write to it, {LOG_IN}; the token needs write access."
    elif any(isinstance(e, OfflineModeIsEnabled) for e in kinds):
        remedy = "Unset HF_HUB_OFFLINE."
    else:
        remedy = "Check the network and try again."
    return f"The push to {repo} failed ({first_line(error)}). {remedy} Nothing is lost: {kept}."


def first_line(error: BaseException) -> str:
    """A line with an error and its cause."""
    errors = [f"{type(e).__name__}: {' '.join(str(e).split())[:200]}" for e in chain(error)]
    return " from ".join(errors[:2])


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there is one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _of_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")


def _of_the_hub(error: BaseException) -> bool:
    # Xet's uploads raise a ConnectionError, when they have tried for minutes
    known = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, ConnectionError)
    return isinstance(error, known) or _of_network(error)


def _passing(error: BaseException) -> bool:
    code = status(error)
    return code in (408, 429) or code >= 500 if code is not None else _of_network(error)
