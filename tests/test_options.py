"""Options are the settings: what is given on the command line is what the configuration holds."""

import inspect

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from rq4lens.cli import app
from rq4lens.config import PARTS, SETTINGS, Reading, RunConfig, config_from, preset
from rq4lens.errors import UserError
from rq4lens.screen.options import takes_config


def read(*arguments, **how):
    """The configuration, and the command's own option, that a command line gives."""
    app, got = typer.Typer(pretty_exceptions_enable=False), {}

    @app.command()
    @takes_config(*PARTS.values(), **how)
    def command(config: RunConfig, own: str = "default") -> None:
        got.update(config=config, own=own)

    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return got["config"], got["own"]


def test_a_pair_brings_its_settings_and_options_replace_them():
    """The preset is the start; what is given beside it wins; the rest stays."""
    config, own = read("--pair", "cultural", "--alpha", "0.5", "--k", "3,1", "--own", "mine")
    assert own == "mine"
    assert (config.patching.alpha, config.patching.k) == (0.5, (3, 1))
    expected = preset("cultural").updated(alpha=0.5, k=[3, 1])
    assert config == expected


def test_a_file_is_the_start_too(tmp_path):
    """A TOML file gives the settings, and an option beside it wins."""
    path = tmp_path / "run.toml"
    path.write_text('base = "a"\ntuned = "b"\nlayer = 3\nalpha = 0.1\n')
    config, _ = read(path, "--layer", "4", config_file=True)
    assert (config.pair.base, config.patching.layer, config.patching.alpha) == ("a", 4, 0.1)


def test_ones_own_pair_starts_from_the_defaults():
    """`--base` and `--tuned` name a pair that no preset knows."""
    config, _ = read("--base", "a", "--tuned", "b")
    assert config == config_from({"base": "a", "tuned": "b"})


@pytest.mark.parametrize(
    ("flag", "kept"), [((), None), (("--keep-both",), True), (("--no-keep-both",), False)]
)
def test_switches_have_both_ways(flag, kept):
    """A switch that is left out keeps the setting as it was."""
    assert read("--base", "a", "--tuned", "b", *flag)[0].place.keep_both is kept


@pytest.mark.parametrize("value", ["1,x", "", "1;2", "1.5"])
def test_a_list_that_is_none_is_refused(value):
    """The sentence shows how a list is written."""
    with pytest.raises(UserError, match=r"--k '.*' is not a list of numbers: write it as '1,2,4'"):
        read("--pair", "etiquette", "--k", value)


def test_nothing_named_is_nothing_to_run():
    """Without pair, models or file there is nothing to start from."""
    with pytest.raises(UserError, match="no pair is named"):
        read("--alpha", "0.5")


def test_every_setting_is_an_option():
    """A setting stands on the command line once, under its name; `about` decides nothing."""
    run = typer.main.get_command(app).commands["run"]
    names = [parameter.name for parameter in run.params]
    assert set(SETTINGS) - {"about"} <= set(names)
    assert len(set(names)) == len(names)


def test_a_command_takes_parts_or_single_settings():
    """Parts give all their settings, names one; what is left out is no option."""

    @takes_config(Reading, "alpha", without=("marker",))
    def command(config: RunConfig) -> None:
        """Do nothing with it."""

    names = set(Reading.by_file_key()) - {"marker"} | {"alpha"}
    assert set(inspect.signature(command).parameters) == names


def test_help_shows_values_and_defaults():
    """Each option says what it means, which values it takes and what it is when left out."""
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @takes_config("alpha", "rank_by", "k", "keep_both")
    def command(config: RunConfig) -> None:
        """Do nothing with it."""

    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "--alpha VALUE Blend strength, from 0 to 1. [default: 0.3]" in text
    assert "--rank-by delta|drop_pct" in text
    assert "--k LIST" in text
    assert "[default: 1,2,4,8]" in text
    assert "--keep-both / --no-keep-both" in text or "--keep-both/--no-keep-both" in text
