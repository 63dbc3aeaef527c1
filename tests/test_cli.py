"""The command line: bad input is one sentence and leaves nothing; help is there at once."""

import json
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pair_on_disk import without_stages, write_config, write_pair

from rq4lens import __version__, cli
from rq4lens.analysis.rankings.methods import METHODS

ROOT = Path(__file__).parent.parent
COMMANDS = (
    *("demo", "run", "patch", "head", "rank", "sweep"),
    *("audit", "figures", "report", "verify", "pairs"),
)


@pytest.fixture
def rq4lens(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder: exit code, what was printed, and what stderr says."""
    here = tmp_path / "empty"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rq4lens", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, without_stages(err)

    yield run
    logging.captureWarnings(False)
    logging.getLogger().handlers.clear()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def config(settings, tmp_path_factory):
    return write_config(settings, tmp_path_factory.mktemp("config") / "run.toml")


def assert_one_sentence(result, said, folder):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert said in err
    assert err.startswith("rq4lens: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nope", "No such command 'nope'; see `rq4lens --help`."),
        ("run --lyer 1", "No such option: --lyer"),
        ("run --alpha", "requires an argument; see"),
        ("run", "no pair is named: give --pair NAME"),
        ("run --pair nope", "pair 'nope' does not exist: choose one of etiquette"),
        ("run --pair cultural", "pair 'cultural' needs your prompts"),
        ("run --base a --layer 1", "--base 'a' is given without --tuned"),
        ("run --base a --tuned b --layer 1", "give a JSONL file (--prompts FILE"),
        ("run --base a --tuned b --prompts p.jsonl", "prompt file 'p.jsonl' does not exist"),
        ("run nowhere.toml", "configuration file 'nowhere.toml' does not exist"),
        ("run --pair etiquette --alpha 2", "alpha = '2' is not allowed"),
        ("run --pair etiquette --alpha much", "alpha = 'much' is not allowed"),
        ("run --pair etiquette --layer -1", "layer = '-1' is not allowed"),
        ("run --pair etiquette --k 1,x", "--k '1,x' is not a list of numbers"),
        ("run --pair etiquette --k 2,2", "a number stands twice"),
        ("run --pair etiquette --random-seeds s", "--random-seeds 's' is not a list"),
        ("run --pair etiquette --map-kind magic", "map_kind = 'magic' is not allowed"),
        ("run --pair etiquette --engine warp", "engine = 'warp' is not allowed"),
        ("run --pair etiquette --dtype int8", "dtype = 'int8' is not allowed"),
        ("run --pair etiquette --device warp", "device 'warp' cannot be used here"),
        ("run --pair etiquette --prompts p.jsonl", "prompt file 'p.jsonl' does not exist"),
        ("run --pair etiquette --decision-rule first", "decision_rule = 'first' is not allowed"),
        ("run --pair etiquette --marker x", "marker 'x' is given, but the decision rule is 'last'"),
        ("run --pair etiquette --decision-rule marker", "has no marker, which rule 'marker' needs"),
        ("run --pair etiquette --max-tokens 0", "max_tokens = '0' is not allowed"),
        ("run --pair etiquette --device cpu --n-devices 2", "n_devices=2 spreads a model"),
        ("run --pair etiquette --device cpu --device-map auto", "both say where the layers go"),
        ("run --pair etiquette --device-map cuda:98", "names 'cuda:98', which is not there"),
        ("run --pair etiquette --prompts p.csv", "prompt file 'p.csv' does not exist"),
        ("run --pair etiquette --prompts .", "folder '.' is no Hugging Face dataset"),
        ("audit", "no pair is named"),
        ("audit --base a --tuned b --prompts p.csv", "prompt file 'p.csv' does not exist"),
        ("audit --pair etiquette --marker x", "marker 'x' is given"),
        ("sweep --pair etiquette --layers 5-2", "cannot read layers '5-2'"),
        ("pairs nope", "pair 'nope' does not exist"),
        ("figures nowhere", "'nowhere' holds no finished run"),
        ("report nowhere", "'nowhere' holds no finished run"),
        ("verify nowhere", "'nowhere' holds no finished run"),
        ("verify .", "'.' holds no finished run"),
        ("validate --base nope", "model 'nope' needs your prompts: give a JSONL file (--prompts"),
    ],
)
def test_bad_input_is_one_sentence(rq4lens, line, said):
    """Exit code 2, one line on stderr that names the value, no traceback, nothing written."""
    assert_one_sentence(rq4lens(*line.split()), said, Path.cwd())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run {} --layer 9", "layer 9 does not exist: the models have layers 0 to 2"),
        ("run {} --layer 0", "layer 0 cannot be its own control"),
        ("run {} --control-layer 7", "layer 7 does not exist"),
        ("run {} --k 1,99", "k 99 does not fit: a layer has 8 heads"),
        ("run {} --k 0", "k 0 does not fit"),
        ("run {} --split test", "no prompt has split 'test': the splits are train, val"),
        ("run {} --k-positions 99", "k_positions 99 does not fit"),
        ("run {} --metric accuracy", "needs the answer of each prompt, and prompts"),
        ("sweep {} --metric accuracy", "needs the answer of each prompt, and prompts"),
        ("patch {} --metric accuracy", "needs the answer of each prompt, and prompts"),
        ("rank {} --method magic", "magic"),
        ("sweep {} --layers 0-9", "layer 3 does not exist"),
    ],
)
def test_what_does_not_fit_the_models_is_one_sentence(rq4lens, config, line, said):
    """Found only once the pair is loaded, and still before anything is written."""
    assert_one_sentence(rq4lens(*line.format(config).split()), said, Path.cwd())


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ("8", "head 8 does not exist"),
        ("5-2", "runs backwards"),
        ("some", "cannot read 'some'"),
        ("-1", "cannot read '-1'"),
    ],
)
def test_heads_that_do_not_exist_are_one_sentence(rq4lens, settings, heads, said):
    """`patch` refuses what the grammar of head sets refuses."""
    options = [f"--{name}={settings[name]}" for name in ("base", "tuned", "prompts", "layer")]
    assert_one_sentence(rq4lens("patch", *options, "--heads", heads), said, Path.cwd())


def test_a_folder_that_cannot_be_made_is_one_sentence(rq4lens, config, tmp_path):
    """A file lies where the run directory should be."""
    (tmp_path / "taken").write_text("mine")
    result = rq4lens("run", config, "--out", tmp_path / "taken")
    assert_one_sentence(result, "cannot make the directory", Path.cwd())
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "rank", "sweep"])
def test_no_command_writes_over_a_file_of_another_name(rq4lens, config, tmp_path, command):
    """Each command that writes into a folder says that a file lies there, and leaves it."""
    (tmp_path / "taken").write_text("mine")
    result = rq4lens(command, config, "--out", tmp_path / "taken" / "deeper")
    assert_one_sentence(result, "cannot make the directory", Path.cwd())
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "run --fresh", "rank", "sweep", "run --shard 1/2"])
@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_a_file_in_place_of_a_folder_is_said_before_the_work(
    rq4lens, config, tmp_path, monkeypatch, caplog, command, option
):
    """No model is loaded, nothing is called set aside, and the option of that folder is named."""
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr("rq4lens.models.catalog._load", lambda *_: pytest.fail("it was loaded"))
    others = [] if option == "--out" else ["--out", "run"]
    result = rq4lens(*command.split(), config, option, tmp_path / "taken", *others)
    assert_one_sentence(result, "is no directory): name another place", Path.cwd())
    assert f"({option}" in result[2]
    assert "set aside" not in caplog.text
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "sweep", "run --shard 1/2"])
def test_somebodys_own_files_are_not_written_among(rq4lens, config, tmp_path, command):
    """A folder that holds files and no run is refused: a report of one's own could be replaced."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    result = rq4lens(*command.split(), config, "--out", tmp_path / "mine")
    assert_one_sentence(result, "holds other files (report.html) and no run", Path.cwd())
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine"]


@pytest.mark.parametrize("command", ["patch", "audit", "validate"])
def test_a_file_that_cannot_be_written_is_said_before_the_work(rq4lens, tmp_path, command):
    """Neither a directory nor a file in none can be written; no model is looked for."""
    options = [command, "--base=none", "--prompts=none.jsonl"]
    options += [] if command == "validate" else ["--tuned=none"]
    (tmp_path / "taken").mkdir()
    said = rq4lens(*options, "--out", tmp_path / "taken")
    assert_one_sentence(said, "is a directory: name a file in it", Path.cwd())
    said = rq4lens(*options, "--out", tmp_path / "nowhere" / "x.json")
    assert_one_sentence(said, "there is no directory", Path.cwd())


def test_the_help_names_every_ranking_method():
    """It is written out, for the methods themselves take seconds to import."""
    assert all(name in re.split(r"[ ,;]+", cli.METHOD_HELP) for name in METHODS)


def test_verbose_may_stand_behind_the_command(rq4lens, settings):
    """What holds for all commands may be written where one looks for it."""
    options = [f"--{name}={settings[name]}" for name in ("base", "tuned", "prompts")]
    assert rq4lens("audit", *options, "-v")[0] == rq4lens("-v", "audit", *options)[0] == 0


def test_a_config_file_with_an_unknown_key_is_one_sentence(rq4lens, tmp_path):
    """The nearest key is named."""
    path = write_config({"lyer": 1}, tmp_path / "my.toml")
    assert_one_sentence(
        rq4lens("run", path), "unknown key 'lyer': did you mean 'layer'?", Path.cwd()
    )


def test_patch_prints_one_condition_and_writes_its_record(rq4lens, settings, tmp_path):
    """The console says what the record holds; lines are not broken, whatever is in them."""
    names = ("base", "tuned", "prompts", "layer", "resamples", "device")
    options = [f"--{name}={settings[name]}" for name in names]
    code, out, err = rq4lens("patch", *options, "--heads", "1,0", "--out", tmp_path / "patch.json")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "patch.json").read_text())
    assert (record["cond"], record["heads"], record["layer"]) == ("patch", [0, 1], 1)
    lines = out.splitlines()[2:]
    assert lines[0] == "heads 0-1"
    for line, name in zip(lines[1:3], ("KL_raw", "KL_mapped"), strict=True):
        label, printed = line.split()[:2]
        decimals = len(printed.partition(".")[2])
        assert (label, float(printed)) == (name, round(record[f"{name}_mean"], decimals))
    shares = [line[:9].strip() for line in lines[4:]]
    assert shares == ["drop", "to base", "to tuned", "coverage", "raw cover"]


def test_options_replace_what_the_file_says(rq4lens, config):
    """A file gives the settings, an option beside it wins, and the rest stays."""
    said = assert_one_sentence
    said(rq4lens("run", config, "--k", "1,50"), "k 50 does not fit", Path.cwd())
    said(rq4lens("run", config, "--alpha", "7"), "alpha = '7'", Path.cwd())


def test_pairs_lists_what_comes_with_the_package(rq4lens):
    """One line per pair, and with a name its settings as TOML."""
    code, out, _ = rq4lens("pairs")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["etiquette", "dialect", "cognitive", "cultural"]
    code, out, _ = rq4lens("pairs", "cultural")
    assert code == 0
    assert 'tuned = "inceptionai/Llama-3.1-Sherkala-8B-Chat"' in out
    assert max(len(line) for line in out.splitlines()) > 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(rq4lens, command):
    """`--help` says what the command is for, and names its options by their settings."""
    code, out, err = rq4lens(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: rq4lens ")
    if command == "run":
        for option in ("--layer", "--control-layer", "--random-seeds", "--rank-by", "--out"):
            assert option in out


def python(*arguments):
    """A fresh interpreter in the repository, as a user's shell starts one."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_help_is_there_at_once():
    """`rq4lens --help` takes under 0.6 s of processor time, the interpreter's own start included.

    The best of three tries: whatever else runs on the machine only makes it slower.
    """
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("-c", "from rq4lens.cli import main; main()", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.6


HEAVY = ("torch", "transformer_lens", "transformers", "pandas", "scipy", "sklearn", "plotly")


def test_help_imports_nothing_heavy():
    """What takes seconds to import is imported when it is needed."""
    code = (
        "import sys; sys.argv = ['rq4lens', '--help']\n"
        "from rq4lens.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_importing_the_package_imports_nothing_heavy():
    """`import rq4lens` is instant; its names are looked up when they are used."""
    code = (
        "import sys, rq4lens\n"
        "assert {'fit_maps', 'run_grid', 'load_pair', 'figures'} <= set(dir(rq4lens))\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python("-c", code).stdout == "[]\n"


def test_the_version_is_one(rq4lens):
    """`--version` says the version of the package, and `-h` helps everywhere."""
    assert rq4lens("--version") == (0, f"rq4lens {__version__}\n", "")
    assert rq4lens("run", "-h") == rq4lens("run", "--help")
