"""A finished run on the Hugging Face hub, as a dataset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rq4lens.disk.files import short_reason
from rq4lens.disk.run import PER_PROMPT, SHARED, SUMMARY
from rq4lens.errors import UserError

_NAME = re.compile(r"hf:/{1,2}(?:datasets/)?(?!datasets/)([^/@]+/[^/@]+)(?:@(.+))?")
"""``hf://USER/NAME``, also after ``pathlib`` took one stroke away."""

CARD = "README.md"
CARD_TEXT = """---
tags:
- rq4lens
configs:
- config_name: per_prompt
  data_files: {table}
---

Which attention heads carry what a fine-tune changed: a finished run of rq4lens.

```python
import rq4lens as rq

run = rq.read_run("hf://datasets/{repo}")
```

```text
{summary}```
"""


def fetch_run(name: str) -> Path:
    """The folder of a run on the hub, in the cache of the hub's own client."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"{name[:200]!r} names no run on the hub: write hf://USER/NAME or "
            "hf://datasets/USER/NAME, a revision behind it as @REVISION."
        )
    repo, revision = match.groups()
    with _in_a_sentence(f"dataset {repo!r}"):
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=list(SHARED)
            )
        )


def push_run(directory: Path, repo: str, *, private: bool = False) -> str:
    """Put a finished run on the hub, in one commit, in place of one that is there.

    Args:
        directory: the run directory.
        repo: the dataset, as ``USER/NAME``; it is made if there is none.
        private: whether a dataset that is made is private.

    Returns:
        The name that :func:`rq4lens.read_run` takes.

    Raises:
        UserError: if this machine has no token that may write there, or the hub cannot be reached.
    """
    if get_token() is None:
        raise UserError(
            "there is no Hugging Face token on this machine: log in with `hf auth login`, or set "
            "HF_TOKEN to one that may write."
        )
    found = sorted(path for pattern in SHARED for path in directory.glob(pattern))
    files = {path.relative_to(directory).as_posix(): path for path in found if path.is_file()}
    with _in_a_sentence(f"dataset {repo!r}"):
        hub = HfApi()
        hub.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        there = hub.list_repo_files(repo, repo_type="dataset")
        adds = [CommitOperationAdd(name, path) for name, path in files.items()]
        if CARD not in there:
            summary = (directory / SUMMARY).read_text(encoding="utf-8")
            card = CARD_TEXT.format(table=PER_PROMPT, repo=repo, summary=summary)
            adds.append(CommitOperationAdd(CARD, card.encode()))
        shared = (name for name in there if any(fnmatch(name, pattern) for pattern in SHARED))
        stale = [CommitOperationDelete(name) for name in shared if name not in files]
        message = "A finished run of rq4lens"
        hub.create_commit(repo, [*adds, *stale], commit_message=message, repo_type="dataset")
    return f"hf://datasets/{repo}"


_REASONS = {
    HFValidationError: "is no name on the hub: write USER/NAME",
    RevisionNotFoundError: ("has no such revision: name a branch, tag or commit that exists"),
    RepositoryNotFoundError: (
        "does not exist on the hub, or this machine may not read it: check the spelling, or log in "
        "with `hf auth login`"
    ),
    OfflineModeIsEnabled: "needs the network, and HF_HUB_OFFLINE forbids it: set it to 0",
}


@contextmanager
def _in_a_sentence(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # errors of the hub's HTTP client have no public common class
        known = (said for kind, said in _REASONS.items() if isinstance(problem, kind))
        raise UserError(f"{what} {next(known, None) or _reason(problem)}.") from None


def _reason(problem: Exception) -> str:
    if isinstance(problem, HfHubHTTPError) and problem.response.status_code in (401, 403):
        return (
            "is not open to this machine's token: take one that may write there, with `hf auth "
            "login` or HF_TOKEN"
        )
    return (
        f"could not be reached on the hub ({type(problem).__name__}: {short_reason(problem)}): "
        "check the network, or try again later"
    )
