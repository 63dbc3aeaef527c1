"""Finished runs on the Hugging Face hub, against a small stand-in for the hub's HTTP API."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub_constants
import numpy as np
import pytest
from synthetic import synthetic_grid
from test_run_directory import write
from typer.testing import CliRunner

import rq4lens as rq
from rq4lens.cli import app
from rq4lens.disk.files import write_text_atomic
from rq4lens.disk.hub import CARD, push_run
from rq4lens.errors import UserError

REPO = "me/my-run"
TOKEN = "hf_" + "x" * 34
API = re.compile(r"/api/datasets/([\w-]+/[\w-]+)/?(\w*)/?([^/?]*)")
FILE = re.compile(r"/datasets/([\w-]+/[\w-]+)/resolve/\w+/(.+)")


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to those requests that a push and a fetch make."""

    repos: dict[str, dict[str, bytes]]
    commits: list[str]

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        """A response of JSON, or of the bytes of a file."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        """A repository, what is in it, or a file."""
        if (file := FILE.match(self.path)) is not None:
            return self.file(*file.groups())
        match = API.match(self.path)
        if match is None or match[1] not in self.repos:
            return self.answer(404, {}, X_Error_Code="RepoNotFound")
        repo, what, revision = match.groups()
        if revision not in ("", "main", *self.commits):
            return self.answer(404, {}, X_Error_Code="RevisionNotFound")
        if what == "tree":
            return self.answer(200, [entry(*each) for each in self.repos[repo].items()])
        return self.answer(200, {"id": repo, "sha": self.commits[-1]})

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def file(self, repo: str, name: str) -> None:
        """The bytes of a file."""
        content = self.repos[repo][name]
        self.answer(200, content, ETag=f'"{oid(content)}"', X_Repo_Commit=self.commits[-1])

    def do_POST(self) -> None:
        """A new repository, or a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid token"})
        if self.path == "/api/repos/create":
            made = json.loads(body)
            known = "/".join((made.get("organization") or "me", made["name"]))
            self.repos.setdefault(known, {})
            return self.answer(200, {"url": f"{hub_constants.ENDPOINT}/datasets/{known}"})
        if self.path.startswith("/api/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        repo, what, _ = API.match(self.path).groups()
        if what == "preupload":
            files = [{**each, "uploadMode": "regular", "shouldIgnore": False}
                     for each in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        return self.commit(repo, map(json.loads, body.splitlines()))

    def commit(self, repo: str, lines) -> None:
        """Take files in, and others out."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.repos[repo][value["path"]]
        self.commits.append(oid(repr(self.repos).encode()))
        url = f"{hub_constants.ENDPOINT}/datasets/{repo}/commit/{self.commits[-1]}"
        self.answer(200, {"commitUrl": url, "commitOid": self.commits[-1]})

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "oid": oid(content), "size": len(content)}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, in place of the hub, and a token for it."""
    handler = type("OwnHub", (Hub,), {"repos": {}, "commits": [oid(b"nothing")]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def finished(tmp_path) -> Path:
    """A finished run, with files beside it that are not for others."""
    folder = tmp_path / "run"
    for part in ("conditions", "activations"):
        (folder / part).mkdir(parents=True)
    write(folder, synthetic_grid(n_heads=4, n_prompts=12, ks=(1, 2)))
    for name in ("conditions/L1.json", "activations/z.safetensors", "own notes.txt"):
        write_text_atomic(folder / name, "mine")
    return folder


def refusal(job, *arguments, **options) -> str:
    with pytest.raises(UserError) as refused:
        job(*arguments, **options)
    return str(refused.value)


@pytest.mark.parametrize("name", [f"hf://datasets/{REPO}", f"hf://{REPO}", f"hf://{REPO}@main"])
def test_what_was_pushed_is_read_back(hub, finished, name):
    """A run that goes to the hub and comes back is the same run, number by number."""
    own = rq.read_run(finished)
    assert own.push(REPO) == f"hf://datasets/{REPO}"
    again = rq.read_run(name)
    assert again.records == own.records
    assert again.summary == own.summary
    assert np.array_equal(again.grid.full.kl_raw_nats, own.grid.full.kl_raw_nats)
    assert len(hub.commits) == 2  # the empty repository, and one commit


def test_only_the_results_are_shared(hub, finished):
    """Caches and files that are no part of a run stay here; a card says how to read it."""
    push_run(finished, REPO)
    shared = hub.repos[REPO]
    assert not [name for name in shared if "conditions" in name or "activations" in name]
    assert "own notes.txt" not in shared
    assert f'rq.read_run("hf://datasets/{REPO}")'.encode() in shared[CARD]
    assert b"summary\n" in shared[CARD]


def test_a_later_push_replaces_the_run_and_nothing_else(hub, finished):
    """Files of the run before go, files of others and a card that was edited stay."""
    push_run(finished, REPO)
    kept = {CARD: b"mine", "LICENSE": b"MIT"}
    hub.repos[REPO] |= {**kept, "single_head_L9_hook_z_alpha1.json": b"[]"}
    push_run(finished, REPO)
    assert "single_head_L9_hook_z_alpha1.json" not in hub.repos[REPO]
    assert {name: hub.repos[REPO][name] for name in kept} == kept


@pytest.mark.usefixtures("hub")
def test_a_run_that_was_read_is_there_without_network(finished, monkeypatch):
    """What the client has kept is read where nothing can be reached."""
    push_run(finished, REPO)
    before = rq.read_run(f"hf://{REPO}")
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    assert rq.read_run(f"hf://{REPO}").records == before.records


def test_the_command_shares_a_run(hub, finished):
    """`rq4lens push RUN --repo USER/NAME` says under which name it is read."""
    said = CliRunner().invoke(app, ["push", str(finished), "--repo", REPO])
    assert (said.exit_code, said.stdout) == (0, f"pushed to hf://datasets/{REPO}\n")
    assert REPO in hub.repos


@pytest.mark.usefixtures("hub")
class TestRefusals:
    """Each is one sentence that says what to do."""

    def test_no_token(self, finished, monkeypatch, tmp_path):
        """Without a token nothing is asked of the hub."""
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "hf auth login" in refusal(push_run, finished, REPO)

    def test_a_token_that_may_not(self, finished, monkeypatch):
        """A token that the hub does not take."""
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        assert "token" in refusal(push_run, finished, REPO)

    def test_no_such_repository(self):
        """A dataset that is not there, by its name."""
        said = refusal(rq.read_run, "hf://me/nothing")
        assert "'me/nothing' does not exist" in said

    def test_no_such_revision(self, finished):
        """A commit that is not there."""
        push_run(finished, REPO)
        assert "revision" in refusal(rq.read_run, f"hf://{REPO}@other")

    @pytest.mark.parametrize("name", ["hf://me", "hf://", "hf://datasets/me", "hf://a/b/c"])
    def test_no_name(self, name):
        """What names no repository."""
        assert "hf://USER/NAME" in refusal(rq.read_run, name)

    @pytest.mark.parametrize("repo", ["a b/c", "me/my/run", ""])
    def test_no_name_to_push_to(self, finished, repo):
        """What cannot be the name of one."""
        assert "USER/NAME" in refusal(push_run, finished, repo)

    def test_a_dataset_that_is_no_run(self, hub):
        """Somebody's data: nothing of it is fetched."""
        hub.repos["me/data"] = {"train.parquet": b"x" * 100}
        said = refusal(rq.read_run, "hf://me/data")
        assert "'hf://me/data' holds no finished run" in said

    def test_a_folder_that_is_no_run(self, hub, tmp_path):
        """A folder is looked at before anything is made on the hub."""
        said = CliRunner().invoke(app, ["push", str(tmp_path), "--repo", REPO])
        assert "holds no finished run" in str(said.exception)
        assert hub.repos == {}

    def test_no_network(self, finished, monkeypatch):
        """Nothing answers, for both ways."""
        monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
        for job in (lambda: push_run(finished, REPO), lambda: rq.read_run("hf://me/other")):
            assert "could not be reached" in refusal(job)

    def test_offline(self, finished, monkeypatch):
        """HF_HUB_OFFLINE is named where it is the reason."""
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
        for job in (lambda: push_run(finished, REPO), lambda: rq.read_run("hf://me/other")):
            assert "HF_HUB_OFFLINE" in refusal(job)
