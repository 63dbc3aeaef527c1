"""A finished run is believed only as far as it can be shown to be right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pair_on_disk import LAYER, write_pair
from safetensors.torch import load_file, save_file

from rq4lens.analysis.saved import read_run
from rq4lens.config import config_from
from rq4lens.disk.run import file_sha256
from rq4lens.disk.store import NamedIngredients, Store, read_record
from rq4lens.errors import UserError
from rq4lens.jobs.run import run as run_job
from rq4lens.jobs.verify import verify_run

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    settings = write_pair(folder)
    run_job(config_from(settings), folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def findings(verification) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verification.checks}


def test_an_untouched_run_passes_every_check(finished):
    """Files, conditions, plan, table, maps and a sample measured again all agree."""
    verification = verify_run(finished, sample=6)
    assert verification.passed, verification.text
    assert set(findings(verification).values()) == {True}
    assert verification.text.endswith(f"PASS: {finished}\n")


def test_every_condition_agrees_with_the_reference_engine(finished):
    """All conditions, measured again through native hooks, are within rounding."""
    assert verify_run(finished, sample=1000).passed


def test_a_moved_run_still_passes(run):
    """Nothing in a run depends on where it lies."""
    assert verify_run(run).passed


def edit_json(name: str, edit):
    def change(run: Path) -> None:
        path = run / name
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))

    return change


def edit_table(edit):
    def change(run: Path) -> None:
        path = run / "per_prompt.parquet"
        table = pd.read_parquet(path)
        edit(table)
        table.to_parquet(path, index=False)

    return change


def first_record(run: Path) -> Path:
    return sorted((run / "conditions").glob(f"L{LAYER}_heads3_*_raw_*.json"))[0]


def edit_record(edit):
    def change(run: Path) -> None:
        path = first_record(run)
        path.write_bytes(edit(path.read_bytes()))

    return change


def swap_records(run: Path) -> None:
    one, other = sorted((run / "conditions").glob("*.json"))[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def swap_heads(table) -> None:
    table.loc[table["cond"] == "head3", "heads"] = "4"


def swap_columns(table) -> None:
    """The trap of calling the raw numbers mapped."""
    raw, mapped = (table["kind"] == kind for kind in ("raw", "mapped"))
    table.loc[mapped, "kl"] = table.loc[raw, "kl"].to_numpy()


def one_number(table) -> None:
    table.loc[5, "kl"] = np.nextafter(table.loc[5, "kl"], 1)


def flip(content: bytes) -> bytes:
    return content[:-90] + bytes([content[-90] ^ 1]) + content[-89:]


def edit_map(run: Path) -> None:
    path = sorted((run / "maps").glob(f"L{LAYER}_*.safetensors"))[0]
    tensors = load_file(path)
    save_file({**tensors, "bias": tensors["bias"] + 1e-6}, path)


TAMPERED = {
    "a result": (edit_json("rq4_results.json", lambda rows: rows[3].update(delta=0.5)), "table"),
    "an interval": (
        edit_json("rq4_results.json", lambda rows: rows[3].update(delta_ci95=[0, 1])),
        "table",
    ),
    "the order of results": (
        edit_json("rq4_results.json", lambda rows: rows.insert(0, rows.pop())),
        "run",
    ),
    "the ranking": (
        edit_json(f"single_head_L{LAYER}_hook_z_alpha0.3.json", lambda rows: rows.reverse()),
        "table",
    ),
    "one bit of one prompt": (edit_table(one_number), "conditions"),
    "raw numbers called mapped": (edit_table(swap_columns), "conditions"),
    "heads of a condition": (edit_table(swap_heads), "plan"),
    "the noise floor": (
        edit_json("run.json", lambda run: run.update(noise_floor_nats=1.0)),
        "table",
    ),
    "the strength": (
        edit_json("run.json", lambda run: run["settings"].update(alpha=0.5)),
        "plan",
    ),
    "the layer": (edit_json("run.json", lambda run: run["settings"].update(layer=2)), "plan"),
    "the seeds": (
        edit_json("run.json", lambda run: run["settings"].update(random_seeds=[0, 5])),
        "plan",
    ),
    "the models": (
        edit_json("run.json", lambda run: run["models"]["base"].update(weights_fingerprint="0")),
        "re-run",
    ),
    "base and tuned": (
        edit_json(
            "run.json",
            lambda run: run.update(
                models={"base": run["models"]["tuned"], "tuned": run["models"]["base"]}
            ),
        ),
        "conditions",
    ),
    "the prompts": (
        edit_json("run.json", lambda run: run["prompts"]["tokens"].update(base="0")),
        "re-run",
    ),
    "the configuration": (
        edit_json("run.json", lambda run: run["config"].update(resamples="many")),
        "table",
    ),
    "a missing part of run.json": (edit_json("run.json", lambda run: run.pop("maps")), "maps"),
    "a flipped record": (edit_record(flip), "conditions"),
    "a cut record": (edit_record(lambda b: b[: len(b) // 2]), "conditions"),
    "two records swapped": (swap_records, "conditions"),
    "a missing record": (lambda run: first_record(run).unlink(), "conditions"),
    "the bias of a map": (edit_map, "maps"),
    "a missing map": (
        lambda run: sorted((run / "maps").glob("*.safetensors"))[0].unlink(),
        "maps",
    ),
    "the summary": (lambda run: (run / "summary.txt").write_text("all is well"), "files"),
    "a missing summary": (lambda run: (run / "summary.txt").unlink(), "files"),
    "the analysis": (edit_json("analysis.json", lambda analysis: analysis.update(x=1)), "files"),
    "a missing results file": (lambda run: (run / "rq4_results.json").unlink(), "run"),
    "a cut run.json": (lambda run: (run / "run.json").write_text("{"), "run"),
    "a cut table": (lambda run: (run / "per_prompt.parquet").write_bytes(b"PAR1"), "run"),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "name"), TAMPERED.values(), ids=TAMPERED.keys())
def test_whatever_was_changed_is_found(run, tamper, name):
    """Each change is found by the check that is there for it, and nothing crashes."""
    tamper(run)
    verification = verify_run(run, sample=1)
    assert not verification.passed
    assert findings(verification)[name] is False, verification.text


def test_numbers_that_were_forged_everywhere_are_found_by_measuring_again(run):
    """Even a forgery that keeps all checksums does not survive the models."""
    path = first_record(run)
    record = read_record(path)
    payload = {**record.payload, "kl_nats": [2 * kl for kl in record.payload["kl_nats"]]}
    _, forged = Store(path.parent)._record(NamedIngredients("", record.ingredients), payload)
    path.write_bytes(forged)
    table = pd.read_parquet(run / "per_prompt.parquet")
    table.loc[(table["cond"] == "head3") & (table["kind"] == "raw"), "kl"] *= 2
    table.to_parquet(run / "per_prompt.parquet", index=False)
    edit_json(
        "run.json",
        lambda value: value["files_sha256"].update(
            {"per_prompt.parquet": file_sha256(run / "per_prompt.parquet")}
        ),
    )(run)
    found = findings(verify_run(run, sample=1000))
    assert found["files"] is True
    assert found["re-run"] is False


def test_without_the_models_the_rest_is_still_checked(run):
    """A run whose models are not at hand is not blamed for it, and says so."""
    edit_json("run.json", lambda value: value["config"].update(base=str(run / "nowhere")))(run)
    verification = verify_run(run)
    assert findings(verification)["re-run"] is None
    assert verification.passed
    assert "cannot be loaded here" in verification.text


def test_no_models_are_loaded_for_a_sample_of_none(run):
    """`sample=0` looks at files only."""
    assert findings(verify_run(run, sample=0))["re-run"] is None


def test_a_strangers_run_cannot_make_checkpoints_run_code(run, monkeypatch):
    """`trust_remote_code` in run.json is not obeyed."""
    asked = []

    def load(source, *_):
        asked.append(source.trust_remote_code)
        raise UserError("no models in this test")

    monkeypatch.setattr("rq4lens.analysis.card.sides.pair_from", load)
    edit_json("run.json", lambda value: value["config"].update(trust_remote_code=True))(run)
    verify_run(run)
    verify_run(run, trust_remote_code=True)
    assert asked == [False, True]


def test_what_is_no_run_is_said(tmp_path):
    """A folder without a finished run is bad input, not a failed check."""
    with pytest.raises(UserError, match="no finished run"):
        verify_run(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"config": {"pair": "x"}}', "no JSON"])
def test_somebody_elses_run_json_is_no_run(tmp_path, text):
    """Beside nothing that a run writes it is not a damaged run, wherever it is read."""
    (tmp_path / "run.json").write_text(text)
    for read in (verify_run, read_run):
        with pytest.raises(UserError, match="holds no finished run"):
            read(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_number_formats_pass_within_their_rounding(tmp_path, dtype):
    """The allowance follows the models' number format."""
    settings = write_pair(tmp_path) | {"dtype": dtype}
    run_job(config_from(settings), tmp_path / "run")
    torch.set_num_threads(1)
    verification = verify_run(tmp_path / "run", sample=1000)
    assert verification.passed, verification.text
