"""The store believes a record only when everything that made it is what is asked for."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from rq4lens.disk import files
from rq4lens.disk.files import read_json, write_json_atomic
from rq4lens.disk.store import NUMERICS_VERSION, Store, content_key
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.patching.keys import ConditionIngredients, chunk_ingredients
from rq4lens.patching.patch import Patch

ON = {
    "models": {
        side: {part: f"{part} of {side}" for part in ("weights", "config", "tokenizer")}
        for side in ("base", "tuned")
    },
    "prompts": "prompts",
    "tokens": {"base": "tokens of base", "tuned": "tokens of tuned"},
    "decision_rule": "last",
    "patching": {
        "split": "val",
        "k_positions": 1,
        "kl_direction": "patched||clean",
        "raw_baseline": "identity",
    },
    "dtype": "float32",
    "device": "cpu",
    "libraries": "torch 2",
    "numerics_version": NUMERICS_VERSION,
}
INGREDIENTS = ConditionIngredients(ON, Patch(2, HeadSet.of((0, 3), 8), 0.3, "mapped"), "map")
PROMPT_IDS = ("p0", "p1")
PAYLOAD = {"kl_nats": [0.1, 1e-17, 3.0], "reason": None}


def leaves(values: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of each value of nested dictionaries."""
    for name, value in values.items():
        yield from leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]


def replaced_on(changes: dict[tuple[str, ...], object]) -> ConditionIngredients:
    """The same condition, measured on something else."""
    values = deepcopy(ON)
    for (*path, name), value in changes.items():
        reduce(getitem, path, values)[name] = value
    return replace(INGREDIENTS, on=values)


def value_at(path: tuple[str, ...]) -> Any:
    return reduce(getitem, path, ON)


def other_value(value: object) -> object:
    """A value of the same type that is not the given one."""
    return value + 1 if isinstance(value, int) else f"another {value}"


def replaced_patch(**changes: object) -> ConditionIngredients:
    return replace(INGREDIENTS, patch=replace(INGREDIENTS.patch, **changes))


CHANGED = {
    "/".join(path): replaced_on({path: other_value(value_at(path))}) for path in leaves(ON)
} | {
    "layer": replaced_patch(layer=3),
    "heads": replaced_patch(heads=HeadSet.of((0, 3, 7), 8)),
    "n_heads": replaced_patch(heads=HeadSet.of((0, 3), 9)),
    "alpha": replaced_patch(alpha=0.4),
    "source": replaced_patch(source="raw"),
    "map": replace(INGREDIENTS, map_fingerprint="another map"),
    "no map": replace(INGREDIENTS, map_fingerprint=None),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "conditions")


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
def test_changing_any_ingredient_changes_the_key(store, changed):
    """Two conditions that differ in any one ingredient never share a record."""
    assert content_key(changed.to_dict()) != content_key(INGREDIENTS.to_dict())
    store.put(INGREDIENTS, PAYLOAD)
    assert store.get(changed) is None
    assert store.counters.set_aside == []


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
def test_changing_any_ingredient_changes_the_key_of_a_chunk(changed):
    """Nor do head sets that were measured together."""
    second = replaced_patch(heads=HeadSet.of([1], 8))
    chunk = chunk_ingredients((INGREDIENTS, second), PROMPT_IDS)
    other = chunk_ingredients((changed, replace(second, on=changed.on)), PROMPT_IDS)
    assert content_key(chunk.to_dict()) != content_key(other.to_dict())


def test_a_chunk_is_its_patches_and_prompts_in_their_order():
    """One patch more, another order of them, or other prompts: another chunk."""
    one, two = INGREDIENTS, replaced_patch(heads=HeadSet.of([1], 8))
    chunks = [
        chunk_ingredients(patches, prompts)
        for patches in ((one,), (one, two), (two, one))
        for prompts in (PROMPT_IDS, PROMPT_IDS[::-1], PROMPT_IDS[:1])
    ]
    assert len({content_key(chunk.to_dict()) for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize("path", [path for path in leaves(ON) if "base" in path])
def test_swapping_base_and_tuned_changes_the_key(path):
    """A pair and its mirror image are different experiments, in each thing the sides have."""
    twin = tuple("tuned" if name == "base" else name for name in path)
    swapped = replaced_on({path: value_at(twin), twin: value_at(path)})
    assert content_key(swapped.to_dict()) != content_key(INGREDIENTS.to_dict())


def test_equal_contents_have_equal_keys():
    """Order and repetition of heads, 0.0 or -0.0, tuple or list: one condition, one key."""
    again = replaced_patch(heads=HeadSet.of((3, 0, 3), 8))
    assert content_key(again.to_dict()) == content_key(INGREDIENTS.to_dict())
    zero, minus_zero = replaced_patch(alpha=0.0), replaced_patch(alpha=-0.0)
    assert content_key(zero.to_dict()) == content_key(minus_zero.to_dict())
    assert content_key({"a": (1,), "b": 2}) == content_key({"b": 2, "a": [1]})


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, {1: 2}, {None: 1}, object(), b"bytes", {3}, 1j]
)
def test_a_key_is_made_of_json_alone(value):
    """Values that JSON cannot hold are refused, not turned into something else."""
    with pytest.raises(UserError):
        content_key({"ingredient": [value]})


def test_numbers_return_bit_for_bit(store):
    """float64 values survive the trip through a record exactly, subnormal ones included."""
    draw = random.Random(0)
    values = [draw.uniform(-1, 1) * 10.0 ** draw.randint(-320, 300) for _ in range(2000)]
    store.put(INGREDIENTS, {"kl": values})
    returned = store.get(INGREDIENTS)["kl"]
    assert [v.hex() for v in returned] == [v.hex() for v in values]


@pytest.mark.parametrize("many", [False, True])
def test_arrays_return_bit_for_bit_and_nan_as_null(store, many):
    """Whatever their layout in memory, and however they are stored."""
    draw = np.random.default_rng(0)
    payload = {
        "each": draw.standard_normal(50) * 10.0 ** draw.integers(-300, 300, 50),
        "by_token": draw.standard_normal((3, 4)).T,
        "edge": np.array([0.0, -0.0, 5e-324, 1e22, np.nan]),
    }
    if many:
        store.put_all([(INGREDIENTS, payload)])
    else:
        store.put(INGREDIENTS, payload)
    found = store.get(INGREDIENTS)
    assert found["edge"][4] is None
    for name, numbers in payload.items():
        assert np.array(found[name], dtype=float).tobytes() == numbers.tobytes()


def test_an_infinity_is_refused_and_nothing_written(store):
    """Not turned into null, which would say that nothing was measured."""
    with pytest.raises(UserError, match="kl_nats holds an infinity"):
        store.put(INGREDIENTS, {"kl_nats": np.array([1.0, np.inf])})
    assert store.get(INGREDIENTS) is None


def test_counters_say_what_was_reused_and_computed(store):
    """A record that was found counts as reused, one that was written as computed."""
    assert store.get(INGREDIENTS) is None
    store.put(INGREDIENTS, PAYLOAD)
    assert store.get(INGREDIENTS) == PAYLOAD
    assert (store.counters.computed, store.counters.reused) == (1, 1)


def test_a_fresh_store_uses_nothing_that_is_there(store):
    """`fresh` computes again and replaces the record."""
    store.put(INGREDIENTS, PAYLOAD)
    fresh = Store(store.directory, fresh=True)
    assert fresh.get(INGREDIENTS) is None
    fresh.put(INGREDIENTS, {"kl_nats": [2.0]})
    assert Store(store.directory).get(INGREDIENTS) == {"kl_nats": [2.0]}


def test_reasons_are_logged(store, caplog):
    """The log names each reused and each recomputed record and says why."""
    caplog.set_level("INFO", logger="rq4lens.disk.store")
    store.get(INGREDIENTS)
    store.put(INGREDIENTS, PAYLOAD)
    store.get(INGREDIENTS)
    Store(store.directory, fresh=True).get(INGREDIENTS)
    said = [record.message for record in caplog.records]
    assert [message.split(":")[-1].strip() for message in said] == [
        "no record yet",
        "checksum and ingredients agree",
        "the store is to be made fresh",
    ]
    assert all(store.path(INGREDIENTS).name in message for message in said)


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replaced_by_symlink(path: Path) -> None:
    target = path.with_name("elsewhere.json")
    path.rename(target)
    path.symlink_to(target)


def replaced_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "zeroed": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "doubled": lambda p: p.write_bytes(p.read_bytes() * 2),
    "not UTF-8": lambda p: p.write_bytes(b"\xff\xfe" + p.read_bytes()),
    "another number": lambda p: p.write_bytes(p.read_bytes().replace(b"0.1,", b"0.2,")),
    "NaN": lambda p: p.write_bytes(p.read_bytes().replace(b"0.1,", b"NaN,")),
    "infinity": lambda p: p.write_bytes(p.read_bytes().replace(b"0.1,", b"1e999,")),
    "number as text": lambda p: p.write_bytes(p.read_bytes().replace(b"3.0", b'"3.0"')),
    "deeply nested": lambda p: p.write_text("[" * 100_000),
    "huge integer": lambda p: p.write_text("1" * 10_000),
    "a list": lambda p: p.write_text("[]"),
    "null": lambda p: p.write_text("null"),
    "no payload": lambda p: p.write_text('{"format": "rq4lens record 1"}'),
    "another format": lambda p: edited(p, format="rq4lens record 999"),
    "format of another type": lambda p: edited(p, format=[1, 2]),
    "other ingredients": lambda p: edited(p, ingredients={"layer": 5}),
    "ingredients of another type": lambda p: edited(p, ingredients=None),
    "another checksum": lambda p: edited(p, payload_sha256="0" * 64),
    "checksum of another type": lambda p: edited(p, payload_sha256=0),
    "one field more": lambda p: edited(p, more=1),
    "a symlink": replaced_by_symlink,
    "a directory": replaced_by_directory,
    "a pipe": replaced_by_pipe,
}


@pytest.mark.fault
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_record_that_cannot_be_believed_is_set_aside(store, damage):
    """Damaged, truncated and foreign files are renamed, said, and computed again."""
    path = store.put(INGREDIENTS, PAYLOAD)
    damage(path)
    assert store.get(INGREDIENTS) is None
    assert [name for name, _ in store.counters.set_aside] == [path.name]
    assert not path.exists()
    assert os.path.lexists(f"{path}.damaged")
    store.put(INGREDIENTS, PAYLOAD)
    assert store.get(INGREDIENTS) == PAYLOAD


@pytest.mark.fault
def test_a_foreign_record_under_the_right_name_is_not_believed(store):
    """A valid record of another condition, renamed to this one's name, is set aside."""
    other = replaced_on({("models", "base", "weights"): "another base"})
    foreign = store.put(other, PAYLOAD)
    shutil.copy(foreign, store.path(INGREDIENTS))
    assert store.get(INGREDIENTS) is None
    assert store.counters.set_aside[0][1] == "made from other ingredients"


@pytest.mark.fault
def test_any_flipped_byte_is_noticed(store):
    """A record with one changed byte is never returned with a changed number."""
    path = store.put(INGREDIENTS, PAYLOAD)
    valid = path.read_bytes()
    for at in range(0, len(valid), 7):
        content = bytearray(valid)
        content[at] ^= 1
        path.write_bytes(content)
        assert store.get(INGREDIENTS) in (None, PAYLOAD)


def killed_in_a_write(directory: str) -> None:
    os.replace = lambda *_paths: os.kill(os.getpid(), signal.SIGKILL)
    Store(Path(directory)).put(INGREDIENTS, PAYLOAD)


@pytest.mark.fault
def test_what_a_killed_write_left_is_gone_when_the_store_is_opened_again(store):
    """A process dies between writing and renaming: the next one removes its temporary file."""
    writer = multiprocessing.get_context("fork").Process(
        target=killed_in_a_write, args=(str(store.directory),)
    )
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    (left,) = store.directory.iterdir()
    again = Store(store.directory)
    assert not left.exists()
    assert again.get(INGREDIENTS) is None


@pytest.mark.fault
def test_temporary_files_are_ignored_and_removed_when_their_owner_is_gone(store):
    """Those of living processes stay; of other machines' processes, only old ones are removed."""
    here, token = files._machine(), "0" * 32
    old, young = f".00000000-1-{token}.tmp", f".11111111-1-{token}.tmp"
    living, foreign = f".{here}-{os.getpid()}-{token}.tmp", ".notes.tmp"
    store.directory.mkdir()
    long_ago = time.time() - 2 * files.LEFT_SECONDS
    for name in (old, young, living, foreign):
        (store.directory / name).write_text("half a rec")
    for name in (old, living, foreign):
        os.utime(store.directory / name, (long_ago, long_ago))
    again = Store(store.directory)
    assert {path.name for path in store.directory.iterdir()} == {young, living, foreign}
    assert again.get(INGREDIENTS) is None


@pytest.mark.fault
@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_jumping_clock_loses_nothing(store, monkeypatch, jump):
    """Another machine whose clock jumps may sweep our temporary file; the write is made again."""
    true_time, replace_file = time.time, os.replace
    monkeypatch.setattr(time, "time", lambda: true_time() + jump)
    sweeps = iter([files.remove_leftovers])

    def swept_replace(source, target):
        for sweep in sweeps:
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr(files, "_machine", lambda: "00000000")
                sweep(store.directory)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", swept_replace)
    store.put(INGREDIENTS, PAYLOAD)
    assert store.get(INGREDIENTS) == PAYLOAD
    assert not list(store.directory.glob(".*.tmp"))


@pytest.mark.fault
@pytest.mark.parametrize("failing", ["fsync", "replace", "open"])
def test_a_failed_write_leaves_the_old_record_and_no_rest(store, monkeypatch, failing):
    """A full disk at any step of a write: the old record stays, nothing half-written remains."""
    store.put(INGREDIENTS, PAYLOAD)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(UserError, match="No space left on device"):
            store.put(INGREDIENTS, {"kl_nats": [9.0]})
    assert store.get(INGREDIENTS) == PAYLOAD
    assert [p.name for p in store.directory.iterdir()] == [store.path(INGREDIENTS).name]


@pytest.mark.fault
def test_ctrl_c_during_a_write_leaves_no_rest(store, monkeypatch):
    """An interrupted write removes its temporary file and lets the interrupt through."""

    def interrupted(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.put(INGREDIENTS, PAYLOAD)
    assert list(store.directory.iterdir()) == []


def write_often(directory: str, n: int) -> None:
    store = Store(Path(directory))
    for number in range(n):
        store.put(INGREDIENTS, {"kl_nats": [0.25] * (1 + number % 50)})


@pytest.mark.fault
def test_two_processes_may_write_the_same_record(store):
    """Whoever reads while two processes write sees a complete record, never a mixture."""
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write_often, args=(str(store.directory), 150)) for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        payload = store.get(INGREDIENTS)
        assert payload is None or set(payload["kl_nats"]) == {0.25}
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert store.counters.set_aside == []
    assert len(list(store.directory.iterdir())) == 1


# --- tensors


TENSORS = {"z": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}


def test_tensors_return_bit_for_bit_with_their_payload(store):
    """Every number, type and shape; strided ones too; and the record says what was put with it."""
    strided = {"w": torch.randn(4, 3).T}
    other = replaced_patch(layer=3)
    store.put_tensors(INGREDIENTS, TENSORS, {"rows": 2})
    store.put_tensors(other, strided)
    for ingredients, tensors in ((INGREDIENTS, TENSORS), (other, strided)):
        found = store.get_tensors(ingredients)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert store.get(INGREDIENTS)["rows"] == 2
    assert Store(store.directory, fresh=True).get_tensors(INGREDIENTS) is None
    assert store.get_tensors(replaced_patch(layer=4)) is None
    assert store.counters.set_aside == []


def foreign_tensors(path: Path) -> None:
    path.write_bytes(save({"z": torch.zeros(2, 3), "half": TENSORS["half"]}))


TENSOR_DAMAGE = {
    **{each: DAMAGE[each] for each in ("empty", "truncated", "half", "zeroed", "doubled")},
    **{each: DAMAGE[each] for each in ("a symlink", "a directory", "a pipe")},
    "other tensors": foreign_tensors,
    "no tensors": Path.unlink,
}


@pytest.mark.fault
@pytest.mark.parametrize("damage", TENSOR_DAMAGE.values(), ids=TENSOR_DAMAGE.keys())
def test_tensors_that_cannot_be_believed_are_set_aside(store, damage, caplog):
    """As records are: renamed, said, and computed again."""
    path = store.put_tensors(INGREDIENTS, TENSORS).with_suffix(".safetensors")
    damage(path)
    assert store.get_tensors(INGREDIENTS) is None
    assert [name for name, _ in store.counters.set_aside] == [path.name]
    assert f"set aside {path.name} and computing it again" in caplog.text
    assert not os.path.lexists(path)
    assert os.path.lexists(f"{path}.damaged") == (damage is not Path.unlink)
    store.put_tensors(INGREDIENTS, TENSORS)
    assert torch.equal(store.get_tensors(INGREDIENTS)["z"], TENSORS["z"])


@pytest.mark.fault
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_tensors_of_a_record_that_cannot_be_believed_are_not_used(store, damage):
    """However whole the tensors are."""
    path = store.put_tensors(INGREDIENTS, TENSORS, PAYLOAD)
    damage(path)
    assert store.get_tensors(INGREDIENTS) is None
    assert [name for name, _ in store.counters.set_aside] == [path.name]


@pytest.mark.fault
def test_tensors_without_their_record_are_not_there(store):
    """A process was killed between the two files: computed again, and nothing is wrong."""
    store.put_tensors(INGREDIENTS, TENSORS).unlink()
    assert store.get_tensors(INGREDIENTS) is None
    assert store.counters.set_aside == []


@pytest.mark.fault
def test_a_moved_store_still_knows_its_records(store, tmp_path):
    """Records hold no path: the directory can be moved."""
    store.put(INGREDIENTS, PAYLOAD)
    moved = store.directory.rename(tmp_path / "elsewhere")
    assert Store(moved).get(INGREDIENTS) == PAYLOAD


@pytest.mark.hostile
def test_a_label_cannot_leave_the_directory(store):
    """The readable part of a file name is made of harmless characters."""
    hostile = replaced_patch(source="../../../etc/passwd\0\n" + "x" * 300)
    path = store.put(hostile, PAYLOAD)
    assert path.parent == store.directory
    assert store.get(hostile) == PAYLOAD


@pytest.mark.hostile
def test_a_file_where_the_directory_should_be_is_said(tmp_path):
    """A store that cannot be made says so in one sentence."""
    (tmp_path / "conditions").write_text("a file")
    with pytest.raises(UserError, match="cannot make the directory"):
        Store(tmp_path / "conditions")


def test_below_a_file_there_is_no_record(tmp_path, caplog):
    """What cannot be there is absent, not damaged: nothing is set aside."""
    (tmp_path / "taken").write_text("a file")
    store = Store(tmp_path / "taken" / "conditions")
    assert store.get(INGREDIENTS) is None
    assert store.counters.set_aside == []
    assert "set aside" not in caplog.text


def test_a_hundred_conditions_take_well_under_a_second(store):
    """Keeping a grid costs next to nothing beside computing it."""
    values = [random.Random(0).random() for _ in range(256)]
    conditions = [replaced_patch(heads=HeadSet.of([head], 100)) for head in range(100)]
    start = time.perf_counter()
    for condition in conditions:
        store.put(condition, dict.fromkeys(["raw", "mapped", "change", "other"], values))
    for condition in conditions:
        store.get(condition)
    assert time.perf_counter() - start < 5  # 0.4 on an idle machine; a shared one gets room


@pytest.mark.hostile
def test_written_json_is_strict_and_ascii(tmp_path):
    """No NaN is written, and no character of a prompt can act on whoever opens the file."""
    path = tmp_path / "value.json"
    write_json_atomic(path, {"text": "\u202eevil é"})
    assert path.read_bytes().isascii()
    assert read_json(path) == {"text": "\u202eevil é"}
    with pytest.raises(UserError, match="finite"):
        write_json_atomic(path, {"delta": math.nan})
    assert read_json(path) == {"text": "\u202eevil é"}


@pytest.mark.hostile
@pytest.mark.parametrize(
    "content", [b"", b"{", b"NaN", b"[1e999]", b"\xff", b"[" * 10**5, b"1" * 5000, b"\0"]
)
def test_damaged_json_is_a_user_error(tmp_path, content):
    """Reading JSON returns a value or one clear sentence."""
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"value\.json"):
        read_json(path)


@pytest.mark.hostile
def test_a_symlink_is_replaced_and_not_followed(tmp_path):
    """Writing through a planted symlink does not touch the file it points to."""
    target, path = tmp_path / "precious", tmp_path / "value.json"
    target.write_text("precious")
    path.symlink_to(target)
    write_json_atomic(path, 1)
    assert target.read_text() == "precious"
    assert not path.is_symlink()
