"""The configuration: every value that is not allowed is one sentence that says what is."""

import json

import pytest

from rq4lens.config import (
    SETTINGS,
    PairSource,
    RunConfig,
    config_from,
    preset,
    preset_names,
    preset_text,
    read_config,
)
from rq4lens.errors import UserError
from rq4lens.patching.maps.map import MAP_KINDS, MAP_SCOPES


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lyer", "layer"),
        ("controllayer", "control_layer"),
        ("Alpha", "alpha"),
        ("random_seed", "random_seeds"),
        ("map-kind", "map_kind"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, meant):
    """A misspelt key is never ignored, and the sentence says which one was probably meant."""
    with pytest.raises(UserError, match=rf"unknown key '{key}': did you mean '{meant}'\?$"):
        config_from({key: 1})


def test_a_key_like_no_other_is_answered_with_all():
    """Where nothing is near, the allowed keys are listed."""
    with pytest.raises(
        UserError, match=r"unknown key 'zzz': allowed are about, pair, base, .*seed"
    ):
        config_from({"zzz": 1})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layer": -1}, "layer = '-1'.*greater than or equal to 0.*heads are patched"),
        ({"layer": 1.5}, "layer = '1.5'.*integer"),
        ({"layer": "two"}, "layer = 'two'.*integer"),
        ({"layer": True}, "layer = 'True'.*true and false are no numbers"),
        ({"control_layer": -3}, "control_layer = '-3'"),
        ({"alpha": 1.01}, "alpha = '1.01'.*less than or equal to 1.*blend strength"),
        ({"alpha": -0.1}, "alpha = '-0.1'"),
        ({"alpha": float("nan")}, "alpha = 'nan'"),
        ({"alpha": float("inf")}, "alpha = 'inf'"),
        ({"alpha": "much"}, "alpha = 'much'"),
        ({"alpha": False}, "alpha = 'False'"),
        ({"k": 3}, "k = '3'"),
        ({"k": "1,2"}, "k = '1,2'"),
        ({"k": [1, "x"]}, "k = 'x'"),
        ({"k": [1, True]}, "k = '1,True'"),
        ({"k": [2, 2]}, "a number stands twice"),
        ({"random_seeds": [0, 0]}, "a number stands twice"),
        ({"random_seeds": [-1]}, "random_seeds = '-1'"),
        (
            {"rank_by": "size"},
            "rank_by = 'size'.*'delta', 'drop_pct', .*'metric' or 'metric_to_tuned'",
        ),
        ({"map_kind": "magic"}, "map_kind = 'magic'.*'procrustes_scaled'"),
        ({"map_scope": "model"}, "map_scope = 'model'.*'head' or 'layer'"),
        ({"k_positions": 0}, "k_positions = '0'"),
        ({"raw_baseline": "zero"}, "raw_baseline = 'zero'"),
        ({"kl_direction": "both"}, "kl_direction = 'both'"),
        ({"decision_rule": "first"}, "decision_rule = 'first'"),
        ({"engine": "warp"}, "engine = 'warp'.*'suffix', 'cached' or 'hooks'"),
        ({"dtype": "fp8"}, "dtype = 'fp8'.*'float32'"),
        ({"batch_size": 0}, "batch_size = '0'"),
        ({"keep_both": "maybe"}, "keep_both = 'maybe'"),
        ({"resamples": 10}, "resamples = '10'"),
        ({"resamples": 10**9}, "resamples = '1000000000'"),
        ({"seed": -1}, "seed = '-1'"),
        ({"seed": 2**32}, "seed = '4294967296'"),
        ({"base": ["a"]}, "base = "),
        ({"split": None}, "split = 'None'"),
        ({"analysis": "none"}, "analysis = 'none'"),
        ({"alpha": "x" * 9000}, "alpha = 'x{80}' is"),
    ],
)
def test_a_value_that_is_not_allowed_is_one_sentence(values, said):
    """The sentence names the key, the value, what is allowed and what the key means."""
    with pytest.raises(UserError, match=said) as caught:
        config_from(values, "my.toml")
    sentence = str(caught.value)
    assert sentence.startswith("my.toml: ")
    assert "\n" not in sentence
    assert len(sentence) < 400
    assert not sentence.endswith("..")


def test_every_setting_says_what_it_is():
    """Help texts and error sentences are made from these descriptions."""
    for name, field in SETTINGS.items():
        assert field.description, name


def test_the_defaults_are_those_of_the_method():
    """Alpha 0.3, k 1, 2, 4 and 8, seeds 0, 1 and 2, the decision token alone, on val, per head."""
    patching = RunConfig().patching
    assert (patching.alpha, patching.k, patching.random_seeds) == (0.3, (1, 2, 4, 8), (0, 1, 2))
    assert (patching.split, patching.k_positions, patching.map_scope) == ("val", 1, "head")
    assert (patching.kl_direction, patching.raw_baseline) == ("patched||clean", "identity")
    assert (patching.rank_by, patching.map_kind) == ("delta", "procrustes_scaled")
    assert RunConfig().place.engine == "suffix"


@pytest.mark.parametrize("kind", MAP_KINDS)
def test_every_kind_of_map_can_be_configured(kind):
    """The configuration and the maps know the same kinds."""
    assert config_from({"map_kind": kind}).patching.map_kind == kind


@pytest.mark.parametrize("scope", MAP_SCOPES)
def test_every_scope_of_map_can_be_configured(scope):
    """The configuration and the maps know the same scopes."""
    assert config_from({"map_scope": scope}).patching.map_scope == scope


def test_a_changed_configuration_is_checked_again():
    """`updated` replaces values and refuses what `config_from` refuses."""
    config = config_from({"layer": 1, "alpha": 0.5})
    assert config.updated(alpha=0.1).patching.alpha == 0.1
    assert config.updated(k=[]).patching.layer == 1
    assert config.patching.alpha == 0.5
    with pytest.raises(UserError, match="alpha = '2'"):
        config.updated(alpha=2)


# --- files


def test_a_toml_file_is_a_configuration(tmp_path):
    """Keys of the file are the names of the settings."""
    path = tmp_path / "run.toml"
    path.write_text('layer = 2\nk = [1, 3]\nbase = "a"\ntuned = "b"\nkeep_both = false\n')
    config = read_config(path)
    assert (config.patching.layer, config.patching.k, config.pair.base, config.place.keep_both) == (
        2,
        (1, 3),
        "a",
        False,
    )


def test_the_run_json_of_a_finished_run_is_one_too(tmp_path):
    """What was asked for is read from its `config`; code of a checkpoint is not run for it."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": {"layer": 3, "trust_remote_code": True}, "more": 1}))
    config = read_config(path)
    assert config.patching.layer == 3
    assert not config.pair.trust_remote_code


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.toml", b"layer = ", "cannot be read as TOML"),
        ("a.toml", b"\xff\xfe", "cannot be read"),
        ("a.toml", b"lyer = 1", r"a\.toml' has unknown key 'lyer'|a\.toml has unknown key 'lyer'"),
        ("a.toml", b"[layer]\nx = 1", "layer = "),
        ("run.json", b"{", "cannot be read as a run.json"),
        ("run.json", b"{}", "cannot be read as a run.json"),
        ("run.json", b"[]", "cannot be read as a run.json"),
        ("run.json", b'{"config": 3}', "holds no table"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, name, content, said):
    """Whatever a file holds, it is a configuration or a sentence."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_config(path)


def test_a_missing_file_is_said(tmp_path):
    """The sentence names the path."""
    with pytest.raises(UserError, match=r"nowhere\.toml' does not exist"):
        read_config(tmp_path / "nowhere.toml")


# --- presets


def test_the_built_in_pairs_come_first():
    """They are the ones that run without any download."""
    assert preset_names() == ("etiquette", "dialect", "cognitive", "cultural")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_configuration_of_that_name(name):
    """Presets pass the same checks as anything else, and say what they are."""
    config = preset(name)
    assert config.pair.name == name
    assert config.pair.about
    assert config.patching.layer != config.patching.control_layer
    assert f'pair = "{name}"' in preset_text(name)


@pytest.mark.parametrize("name", ["nope", "", "../etiquette", "etiquette.toml"])
def test_a_pair_that_does_not_exist_is_answered_with_all(name):
    """The sentence lists the pairs that there are."""
    with pytest.raises(UserError, match="does not exist: choose one of etiquette, dialect"):
        preset(name)


def test_a_pair_is_named_by_its_models():
    """Where no name is given, both folders or hub ids are; a name that is given stays."""
    source = PairSource(base="org/small", tuned="runs/../tuned/")
    assert source.name == "small and tuned"
    assert source.but(tuned="other").name == "small and other"
    assert PairSource(pair="mine", base="a", tuned="b").name == "mine"
    assert "pair" not in RunConfig(pair=source).flat()


def test_a_moved_run_finds_what_moved_with_it(tmp_path, monkeypatch):
    """From the folder of its run.json, or one above it; what is nowhere stays as it is."""
    run, elsewhere = tmp_path / "moved" / "runs" / "r1", tmp_path / "elsewhere"
    for folder in (run, tmp_path / "moved" / "models" / "base", elsewhere / "models" / "base"):
        folder.mkdir(parents=True)
    source = PairSource(base="models/base", tuned="models/tuned")
    monkeypatch.chdir(elsewhere)
    found = source.found_from(run)
    assert found.base == str(tmp_path / "moved" / "models" / "base")
    assert found.tuned == "models/tuned"
    monkeypatch.chdir(tmp_path / "moved")
    assert source.found_from(run).base == "models/base"
