"""A real Ray cluster of several nodes on this machine: nodes die, numbers stay."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from few_prompts import few_prompts
from pair_on_disk import write_pair

from rq4lens.analysis.saved import read_layers
from rq4lens.cluster.launch import kept_beside, run_on_cluster, run_validation
from rq4lens.cluster.many import LOOPBACK_SWITCH, Cluster, Many
from rq4lens.cluster.pieces import Request, read_job
from rq4lens.config import config_from, preset
from rq4lens.errors import UserError
from rq4lens.jobs.sweep import sweep_layers
from rq4lens.studies.file import read_study
from rq4lens.studies.job import run_study_file
from rq4lens.studies.report import ROWS
from rq4lens.validation.suite import ValidationRequest

os.environ[LOOPBACK_SWITCH] = "0"  # before Ray is imported, as the package does it
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
try:
    import ray
    from ray.actor import ActorHandle
    from ray.cluster_utils import Cluster as Nodes
except ModuleNotFoundError:
    if os.environ.get("CI"):
        raise
    pytest.skip("Ray is not installed: pip install 'rq4lens[cluster]'", allow_module_level=True)
from rq4lens.cluster.pool import Pool, connected

# This process computes with one thread, as each worker does.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
]

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
NOTICED_SOON = {"health_check_period_ms": 1000}
"""Ray calls a node dead that missed five checks; its own pause between them is three seconds."""
LAYERS = (1, 2)


@pytest.fixture
def nodes():
    """A head that computes nothing, and two nodes of one core each."""
    cluster = Nodes(
        initialize_head=True,
        head_node_args={
            **NODE,
            "num_cpus": 0,
            "include_dashboard": False,
            "node_ip_address": "127.0.0.1",
            "_system_config": NOTICED_SOON,
        },
    )
    added = [cluster.add_node(**NODE, node_ip_address="127.0.0.1") for _ in range(2)]
    yield cluster, added
    ray.shutdown()
    cluster.shutdown()


def acting(name_start, act):
    """A stage that acts once, when the first piece of a stage is done."""
    acted = []

    @contextmanager
    def stage(name, _rows=None):
        def progress(rows):
            if rows and name.startswith(name_start) and not acted:
                acted.append(name)
                act()

        yield progress

    return stage, acted


def measuring(nodes):
    """The node that a worker which has begun is on."""

    def workers_of(node):
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [each.name() for each in raylet.children(recursive=True)]

    return next(n for n in nodes if any(name.startswith("ray::Worker") for name in workers_of(n)))


def test_a_sweep_outlives_a_node_and_has_the_numbers_of_a_single_process(nodes, tmp_path):
    """The built-in pair on two nodes, one of them killed in the middle: the same bytes.

    The work of the dead node is measured by the other one, and the summary says what happened.
    """
    cluster, added = nodes
    config = preset("etiquette").updated(
        prompts=str(few_prompts(tmp_path, val=48)),
        resamples=200,
        device="cpu",
        random_seeds=list(range(9)),
        batch_size=8,
    )
    stage, acted = acting(
        "pieces", lambda: cluster.remove_node(measuring(added), allow_graceful=False)
    )
    where = Cluster(address=cluster.address, workers=2)
    said = run_on_cluster(Request("sweep", config, LAYERS), tmp_path / "ray", where, stage=stage)
    assert acted == ["pieces on 2 workers"]
    assert len(read_job(tmp_path / "ray").prompt_parts) == 6  # 48 prompts, 8 in a forward pass
    alone = sweep_layers(config, tmp_path / "alone", LAYERS)
    assert said.startswith(alone.summary)
    assert said.endswith("workers were lost on the way\n")
    found, expected = (read_layers(tmp_path / name) for name in ("ray", "alone"))
    for layer in LAYERS:
        assert list(found.grids[layer].conditions) == list(expected.grids[layer].conditions)
        for name, condition in expected.grids[layer].conditions.items():
            other = found.grids[layer][name]
            np.testing.assert_array_equal(other.kl_raw_nats, condition.kl_raw_nats)
            np.testing.assert_array_equal(other.kl_mapped_nats, condition.kl_mapped_nats)
    for name in ("layers.json", "layers_per_prompt.parquet"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return config_from(write_pair(tmp_path_factory.mktemp("pair")) | {"random_seeds": range(24)})


def children():
    """Servers that this process started, and the addresses that they listen at."""
    for process in psutil.Process().children(recursive=True):
        for each in process.net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN:
                yield process.name(), each.laddr.ip.removeprefix("::ffff:")


def test_interrupted_work_goes_on_and_its_ports_are_loopback(config, tmp_path):
    """Ctrl-C keeps what is done and ends Ray; the next call measures the rest alone.

    While it runs, Ray listens to this machine and to nobody else.
    """
    listening = []

    def interrupt():
        listening.extend(children())
        raise KeyboardInterrupt

    stage, acted = acting("pieces", interrupt)
    request = Request("run", config)
    with pytest.raises(KeyboardInterrupt):
        run_on_cluster(request, tmp_path, Cluster(workers=1), stage=stage)
    assert acted
    assert not ray.is_initialized()
    assert listening
    assert {address for _, address in listening} == {"127.0.0.1"}
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "conditions").iterdir()}
    assert kept
    said = run_on_cluster(request, tmp_path, Cluster(workers=1))
    assert "lost" not in said
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "conditions").iterdir()}
    assert len(now) > len(kept)
    assert {name: now[name] for name in kept} == kept
    assert (tmp_path / "report.html").exists()
    deadline = time.monotonic() + 30
    while list(children()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list(children())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "ray", "ray:x"])
def test_no_cluster_at_the_address_is_one_sentence(config, tmp_path, address):
    """Where nothing listens, or where no address is given, it is said at once."""
    started = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster answers at '{address}' .*ray start"):
        run_on_cluster(Request("run", config), tmp_path / "out", Cluster(address=address))
    assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []


def test_no_cluster_on_this_machine_is_one_sentence(config, tmp_path, monkeypatch):
    """`--cluster auto` where no cluster runs says how to start one."""

    def found_none(**_settings):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", found_none)
    with pytest.raises(UserError, match=r"no Ray cluster answers at 'auto' .*ray start"):
        run_on_cluster(Request("run", config), tmp_path, Cluster(address="auto"))


def test_without_ray_the_sentence_names_the_extra(config, tmp_path, monkeypatch):
    """Ray is an extra; whoever lacks it is told its name."""
    monkeypatch.setattr("rq4lens.cluster.launch.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"rq4lens\[cluster\]"):
        run_on_cluster(Request("run", config), tmp_path, Cluster())


def test_a_worker_takes_what_it_has_ready():
    """Prompts stay with their worker; a new one takes what nobody else has, then helps anybody."""
    pool = Pool(lambda: None, size=2)
    left = deque(["a1", "a2", "b1", "b2"])

    def take(worker):
        task = pool._take(worker, left, lambda each: each[0])
        pool._busy[worker] = (worker, task)
        return task

    one, two = (Mock(spec=ActorHandle) for _ in range(2))
    assert [take(worker) for worker in (one, two, one, two)] == ["a1", "b1", "a2", "b2"]
    left.extend(["b3", "c1"])
    assert [take(one), take(one)] == ["c1", "b3"]


@pytest.mark.parametrize("settings", [{"workers": 0}, {"gpus_per_worker": 1.5}])
def test_workers_that_cannot_be_had_are_refused(settings):
    """Zero workers, or one GPU and a half."""
    with pytest.raises(UserError, match="ask for"):
        replace(Cluster(), **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"shard": "1/2", "cluster": "local"}, "two ways"),
        ({"workers": 2}, "give --cluster"),
        ({"gpus_per_worker": 1.0}, "give --cluster"),
    ],
)
def test_settings_of_other_ways_are_refused(settings, sentence):
    """A shard is no cluster, and workers are of a cluster."""
    with pytest.raises(UserError, match=sentence):
        Many(**settings)


@pytest.fixture(scope="module")
def ray_here():
    """Ray on this machine for the tests from here on, since those above find it not there."""
    with connected(Cluster()):
        yield


@pytest.mark.usefixtures("ray_here")
def test_a_validation_goes_on_after_ctrl_c_and_outlives_a_worker(config, tmp_path):
    """Planted pairs are judged by any worker: the numbers of a single process, each judged once.

    What was done before Ctrl-C is kept; a worker that is killed afterwards is replaced.
    """

    def interrupt():
        raise KeyboardInterrupt

    def kill():
        names = {each.name(): each for each in psutil.Process().children(recursive=True)}
        next(each for name, each in names.items() if name.startswith("ray::Planter")).kill()

    out, alone = tmp_path / "v.json", tmp_path / "alone.json"
    request = ValidationRequest(config, ("delta", "kl_raw"), layer=1, pairs=1)
    with pytest.raises(KeyboardInterrupt):
        run_validation(request, out, Cluster(workers=1), stage=acting("planted", interrupt)[0])
    assert not out.exists()
    kept = {each: each.stat().st_mtime_ns for each in kept_beside(out).iterdir()}
    assert 0 < len(kept) < request.n_planted
    stage, acted = acting("planted", kill)
    said = run_validation(request, out, Cluster(workers=2), stage=stage)
    assert acted == ["planted pairs on 2 workers"]
    assert {each: each.stat().st_mtime_ns for each in kept} == kept
    assert said == run_validation(request, alone)
    assert json.loads(out.read_text()) == json.loads(alone.read_text())


@pytest.fixture(scope="module")
def study(config, tmp_path_factory):
    """A study of two sweeps; what a single process says of it, and where."""
    folder = tmp_path_factory.mktemp("study")
    pair = "\n".join(
        f"{name} = {getattr(config.pair, name)!r}" for name in ("base", "tuned", "prompts")
    )
    path = folder / "study.toml"
    path.write_text(
        f'alphas = [0.3, 0.6]\nlayers = "1"\n[settings]\ndevice = "cpu"\nresamples = 100\n'
        f'[[pairs]]\nname = "p"\n{pair}\n'
    )
    study = read_study(path)
    return study, run_study_file(study, folder / "alone"), folder / "alone"


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(("workers", "stage_name"), [(1, "sweeps on 1"), (3, "pieces on")])
def test_a_study_on_a_cluster_has_the_report_of_a_single_process(
    study, tmp_path, workers, stage_name
):
    """Whole sweeps for each worker where there are enough of them; else all share each sweep."""
    study, of_one, alone = study
    names = []

    @contextmanager
    def stage(name, _rows=None):
        names.append(name)
        yield lambda _: None

    many = Many(cluster="local", workers=workers)
    assert run_study_file(study, tmp_path, many, stage=stage) == of_one
    assert any(name.startswith(stage_name) for name in names)
    assert (tmp_path / ROWS).read_bytes() == (alone / ROWS).read_bytes()


@pytest.mark.usefixtures("ray_here")
def test_what_a_worker_refuses_is_one_sentence(config, tmp_path):
    """A layer that does not exist is said by the worker and reaches the user unchanged."""
    request = Request("run", config.updated(layer=17))
    sentence = "^layer 17 does not exist: the models have layers 0 to 2.$"
    with pytest.raises(UserError, match=sentence):
        run_on_cluster(request, tmp_path / "out", Cluster(workers=1))
    assert list(tmp_path.iterdir()) == []
