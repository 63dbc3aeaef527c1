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
from rq4lens.disk.run import (
    ANALYSIS,
    AUDIT,
    HEADS,
    LAYERS,
    LAYERS_PER_PROMPT,
    MAPS,
    PER_PROMPT,
    PROMPTS,
    REPORT,
    RESULTS,
    RUN,
    SUMMARY,
)
from rq4lens.errors import UserError

SHARED = (
    *(RUN, RESULTS, PER_PROMPT, ANALYSIS, PROMPTS, AUDIT, SUMMARY, REPORT, LAYERS),
    *(LAYERS_PER_PROMPT, "single_head_*.json", f"{HEADS}/*.json", f"{MAPS}/*"),
)
"""What is shared of a run; figures can be drawn from it, and caches stay where they are."""

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
    """The folder of a run on the hub, in the cache of the hub's own client.

    Raises:
        UserError: if the name is none, there is no such repository, or the hub cannot be reached.
    """
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
            adds.append(CommitOperationAdd(CARD, _card(directory, repo)))
        stale = [CommitOperationDelete(name) for name in there if _is_stale(name, files)]
        message = "A finished run of rq4lens"
        hub.create_commit(repo, [*adds, *stale], commit_message=message, repo_type="dataset")
    return f"hf://datasets/{repo}"


def _card(directory: Path, repo: str) -> bytes:
    summary = (directory / SUMMARY).read_text(encoding="utf-8")
    return CARD_TEXT.format(table=PER_PROMPT, repo=repo, summary=summary).encode()


def _is_stale(name: str, files: dict[str, Path]) -> bool:
    return name not in files and any(fnmatch(name, pattern) for pattern in SHARED)


@contextmanager
def _in_a_sentence(what: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        reason = "is no name on the hub: write USER/NAME"
    except RevisionNotFoundError:
        reason = "has no such revision: name a branch, tag or commit that exists"
    except RepositoryNotFoundError:
        reason = (
            "does not exist on the hub, or this machine may not read it: check the spelling, or "
            "log in with `hf auth login`"
        )
    except HfHubHTTPError as problem:
        if problem.response.status_code not in (401, 403):
            raise UserError(_unreachable(what, problem)) from None
        reason = (
            "is not open to this machine's token: take one that may write there, with `hf auth "
            "login` or HF_TOKEN"
        )
    except OfflineModeIsEnabled:
        reason = "needs the network, and HF_HUB_OFFLINE forbids it: set it to 0"
    except Exception as problem:  # errors of the hub's HTTP client have no public common class
        raise UserError(_unreachable(what, problem)) from None
    else:
        return
    raise UserError(f"{what} {reason}.")


def _unreachable(what: str, problem: Exception) -> str:
    return (
        f"{what} could not be reached on the hub ({type(problem).__name__}: "
        f"{short_reason(problem)}): check the network, or try again later."
    )
