"""Feed damaged input to every reader: each must return a value or raise UserError.

Run as a program, outside pytest, so that no run-time type check stands between reader and input:

    python tests/fuzz_readers.py [SHARE] [SEED]

prints the number of inputs per reader and the total, about ``100,000 * SHARE``; exits with 1 and
the first offending input of each reader if one raised anything else.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from model_zoo import ZOO, save, train_tokenizer
from peft import LoraConfig, get_peft_model
from synthetic import resampled
from tiny import stored_map

from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.rankings.file import read_ranking
from rq4lens.analysis.saved import read_run, write_grid, write_run
from rq4lens.config import Patching, config_from, read_config
from rq4lens.disk.files import read_json
from rq4lens.disk.run import FORMAT
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.load.adapters import base_of, check_adapter
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.fingerprint import weights_fingerprint
from rq4lens.models.load.huggingface import loadable_architecture
from rq4lens.models.load.loading import load_hooked
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching.keys import ConditionIngredients
from rq4lens.patching.maps.map import LayerMap, load_map
from rq4lens.patching.patch import Patch
from rq4lens.results import ConditionResult, GridResult, GridSettings, PatchRow, Transfer

Reader = Callable[[bytes], object]

TOKENS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"[" * 2000,
    b"{}", b"[]", b"null", b"true", b'"', b"\\", b"\\ud800", b"\\u0000", b"\n", b"\r", b"\x0c",
    "\u2028".encode(), "\u202e".encode(), "é".encode("latin-1"), b"9" * 5000, b"99999999999999999",
    b"<script>alert(1)</script>", b"../../etc/passwd", b"-", b",", b":", b"=", b"[[x]]", b"#",
    b"__class__", b"1e-400", b"0x1F", b"1_000", b"'''", b" " * 100,
]  # fmt: skip


def mutants(seeds: Sequence[bytes], count: int, rng: random.Random) -> Iterator[bytes]:
    """Damaged copies of valid inputs: flipped, cut, doubled, spliced, with hostile tokens."""
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data) + 1)
            end = min(len(data), start + rng.randint(0, 12))
            match rng.randrange(7):
                case 0 if data:
                    data[start % len(data)] ^= 1 << rng.randrange(8)
                case 1:
                    del data[start:end]
                case 2:
                    data[start:start] = data[start:end] * rng.randint(1, 3)
                case 3:
                    data[start:end] = rng.choice(TOKENS)
                case 4:
                    del data[start:]
                case 5:
                    data[start:end] = rng.randbytes(end - start)
                case _:
                    other = rng.choice(seeds)
                    at = rng.randrange(len(other) + 1)
                    data[start:end] = other[at : at + 40]
        yield bytes(data)


def json_mutants(seeds: Sequence[object], count: int, rng: random.Random) -> Iterator[bytes]:
    """Valid JSON whose values are of other types, missing, doubled or renamed."""
    for _ in range(count):
        value = json.loads(json.dumps(rng.choice(seeds)))
        for _ in range(rng.randint(1, 3)):
            value = _change_somewhere(value, rng)
        yield json.dumps(value).encode()


def _change_somewhere(value: object, rng: random.Random) -> object:
    odd = [None, True, -1, 0, 2**70, 1e308, "", "\0", "\ud800", "ALL", [], {}, [[]], {"a": 1}, 0.5]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            value[rng.choice(["", "x", "text", "\u202eid"])] = value.pop(key)
        elif rng.random() < 0.15:
            del value[key]
        else:
            value[key] = _change_somewhere(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            value.append(value[at])
        elif rng.random() < 0.2:
            del value[at]
        else:
            value[at] = _change_somewhere(value[at], rng)
        return value
    return rng.choice(odd)


def from_file(read: Callable[[Path], object], path: Path) -> Reader:
    """A reader of bytes from a reader of files."""

    def reader(data: bytes) -> object:
        path.unlink(missing_ok=True)  # cheaper than cutting a file that is there
        path.write_bytes(data)
        return read(path)

    return reader


# One entry per reader: its name, its share of the inputs, the reader and its inputs.


def head_set(rng: random.Random, count: int, _folder: Path) -> tuple[Reader, Iterator[bytes]]:
    specs = [b"3,7,12", b"0-3,8", b"ALL", b"NONE", b" 1 - 2 , 5", b"0", b"all"]
    digits = ("".join(rng.choices("0123456789,- ALN\u0663\u00b2", k=rng.randint(0, 12))).encode()
              for _ in range(count // 2))  # fmt: skip

    def read(data: bytes) -> object:
        heads = HeadSet.parse(data.decode("utf-8", "surrogateescape"), 16)
        assert HeadSet.parse(str(heads), 16) == heads
        return heads

    return read, chain(digits, mutants(specs, count - count // 2, rng))


PROMPTS = [
    {"id": "a", "text": "One two", "split": "train", "group": "g1", "meta": {"x": [1, 2.5]}},
    {"id": "b", "text": "Three", "split": "val", "group": "g2"},
    {"id": "c", "text": "Four five six", "split": "neutral"},
]


def prompts(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    file = b"\n".join(json.dumps(row).encode() for row in PROMPTS)
    lines = (b"\n".join(json_mutants(PROMPTS, 2, rng)) for _ in range(count // 2))

    def read(path: Path) -> object:
        found = PromptSet.from_jsonl(path)
        return found.fingerprint, [text.encode() for text in found.texts], found.groups

    return from_file(read, folder / "p.jsonl"), chain(lines, mutants([file], count // 2, rng))


def plain_json(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    seeds = [json.dumps(PROMPTS).encode(), b'{"delta": 0.5, "reason": null, "heads": [1, 2]}']
    return from_file(read_json, folder / "v.json"), mutants(seeds, count, rng)


def record(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    on = {"prompts": "p", "decision_rule": "last", "dtype": "float32", "device": "cpu"}
    ingredients = ConditionIngredients(on, Patch(1, HeadSet.of((1, 2), 8), 0.3, "raw"), None)
    store = Store(folder / "conditions")
    payload = {"kl_nats": [0.25, 1e-9]}
    valid = store.put(ingredients, payload).read_bytes()

    def read(data: bytes) -> object:
        store.path(ingredients).write_bytes(data)
        assert store.get(ingredients) in (None, payload), "a changed payload was believed"
        return None

    changed = json_mutants([json.loads(valid)], count // 2, rng)
    return read, chain(changed, mutants([valid], count // 2, rng))


def head_map(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    weight, bias = torch.eye(3).repeat(2, 1, 1), torch.zeros(2, 3)
    layer_map = LayerMap(1, "procrustes", "head", weight, bias, 2)
    path = stored_map(folder / "maps", layer_map).with_suffix(".safetensors")
    tensors, text = path.read_bytes(), path.with_suffix(".json").read_bytes()
    jsons = chain(
        mutants([text], count // 3, rng), json_mutants([json.loads(text)], count // 3, rng)
    )

    def read(data: bytes) -> object:
        is_tensors = data.startswith(b"T")
        path.write_bytes(data[1:] if is_tensors else tensors)
        path.with_suffix(".json").write_bytes(text if is_tensors else data[1:])
        found = load_map(path)
        assert torch.equal(found.weight, weight), "changed weights were believed"
        return found(torch.ones(5, 2, 3))

    return read, chain(
        (b"J" + data for data in jsons),
        (b"T" + data for data in mutants([tensors], count // 3, rng)),
    )


def ranking(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    seeds: list[object] = [
        [{"head": 0, "score": 0.5}, {"head": 1, "score": 0.25}],
        [[0, 0.5], [1, 2]],
        {"0": 0.5, "1": -1.5},
    ]
    texts = [json.dumps(seed).encode() for seed in seeds]

    def read(path: Path) -> object:
        found = read_ranking(path, n_heads=2, layer=1)
        assert sorted(found.heads) == [0, 1]
        return found

    inputs = chain(json_mutants(seeds, count // 2, rng), mutants(texts, count // 2, rng))
    return from_file(read, folder / "r.json"), inputs


CONFIG = b'pair = "etiquette"\nlayer = 1\ncontrol_layer = 4\nalpha = 0.3\nk = [1, 2]\nseed = 0\n'


def toml(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    return from_file(read_config, folder / "c.toml"), mutants([CONFIG], count, rng)


def run_json(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    value = {"config": tomllib.loads(CONFIG.decode()), "format": 1}
    changed = json_mutants([value], count // 2, rng)
    inputs = chain(changed, mutants([json.dumps(value).encode()], count // 2, rng))
    return from_file(read_config, folder / "run.json"), inputs


def settings(rng: random.Random, count: int, _folder: Path) -> tuple[Reader, Iterator[bytes]]:
    seeds = [config_from(tomllib.loads(CONFIG.decode())).model_dump(mode="json")]

    def read(data: bytes) -> object:
        values = json.loads(data)
        return config_from(values) if isinstance(values, dict) else None

    return read, json_mutants(seeds, count, rng)


def finished_run(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    directory = folder / "run"
    directory.mkdir()
    grid = small_grid()
    write_grid(directory, grid, records(resampled(grid, 100)))
    write_run(directory, analyse(resampled(grid, 100)), small_run(grid), "")
    names = ["rq4_results.json", "per_prompt.parquet", "analysis.json", "run.json"]
    valid = {name: (directory / name).read_bytes() for name in names}

    def read(data: bytes) -> object:
        changed, content = names[data[0]], data[1:]
        for name in names:
            (directory / name).write_bytes(content if name == changed else valid[name])
        found = read_run(directory)
        return [condition.delta for condition in found.grid.conditions.values()]

    def inputs() -> Iterator[bytes]:
        for number in range(count):
            which = number % len(names)
            source = valid[names[which]]
            if names[which].endswith("json") and rng.random() < 0.7:
                yield bytes([which]) + next(json_mutants([json.loads(source)], 1, rng))
            else:
                yield bytes([which]) + next(mutants([source], 1, rng))

    return read, inputs()


def model_folder(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    """Configuration, header, index and adapter settings, as they are checked before loading."""
    read, valid = checkpoint_files(folder)
    names = ["config.json", WEIGHTS, INDEX, "adapter_config.json"]
    return read, (damaged(names[n % len(names)], valid, rng) for n in range(count))


def whole_model(rng: random.Random, count: int, folder: Path) -> tuple[Reader, Iterator[bytes]]:
    """The same files and the tokenizer's, loaded to the end."""
    read, valid = checkpoint_files(folder, whole=True)
    names = ["config.json", WEIGHTS, "tokenizer_config.json", "tokenizer.json"]
    return read, (damaged(names[n % 4], valid, rng) for n in range(count))


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def damaged(name: str, valid: dict[str, bytes], rng: random.Random) -> bytes:
    """A file's name, a NUL and its damaged content."""
    content = valid[name]
    if name == WEIGHTS:
        size = 8 + int.from_bytes(content[:8], "little")
        if rng.random() < 0.5:
            header = next(json_mutants([json.loads(content[8:size])], 1, rng))
            start = len(header).to_bytes(8, "little") + header
        else:
            start = next(mutants([content[:size]], 1, rng))
        return name.encode() + b"\0" + start + content[size:]
    as_json = rng.random() < 0.7
    changed = json_mutants([json.loads(content)], 1, rng) if as_json else mutants([content], 1, rng)
    return name.encode() + b"\0" + next(changed)


def checkpoint_files(folder: Path, *, whole: bool = False) -> tuple[Reader, dict[str, bytes]]:
    """A reader of one damaged file in a folder that is whole but for it, and the whole files."""
    plain, sharded, adapter = folder / "plain", folder / "sharded", folder / "adapter"
    model = ZOO["llama"].make()
    save(model, train_tokenizer(), plain)
    save(model, train_tokenizer(), sharded, max_shard_size="40KB")
    settings = LoraConfig(r=2, target_modules=r".*\.(q|v)_proj", rank_pattern={"v_proj": 1})
    get_peft_model(model, settings).save_pretrained(adapter)
    homes = {INDEX: sharded, "adapter_config.json": adapter}
    names = ("config.json", WEIGHTS, "tokenizer_config.json", "tokenizer.json", *homes)
    edit = json.loads((adapter / "adapter_config.json").read_text())
    edit["base_model_name_or_path"] = str(plain)
    (adapter / "adapter_config.json").write_text(json.dumps(edit))
    valid = {name: (homes.get(name, plain) / name).read_bytes() for name in names}

    def read(data: bytes) -> object:
        name, _, content = data.partition(b"\0")
        home = homes.get(name.decode(), plain)
        path = home / name.decode()
        path.write_bytes(content)
        try:
            return weights_fingerprint(load_hooked(home).model) if whole else check(home)
        finally:
            path.write_bytes(valid[name.decode()])

    def check(home: Path) -> object:
        found = locate(home)
        if found.is_adapter:
            check_adapter(found)
            found = base_of(found)
        return loadable_architecture(found, "hooked"), len(found.weight_files)

    return read, valid


def small_grid() -> GridResult:
    """A grid of two heads and three prompts."""
    draw = np.random.default_rng(0)
    names = {"full": "ALL", "head0": "0", "head1": "1", "none": "NONE", "self": "ALL"}

    def rows(n: int) -> list[PatchRow]:
        return [PatchRow(*draw.random((4, 3))) for _ in range(n)]

    conditions = {
        name: ConditionResult(
            *(name, 1, HeadSet.parse(spec, 2), 0.3, *rows(2)),
            transfer=None if name == "self" else Transfer(*rows(2)),
        )
        for name, spec in names.items()
    }
    settings = GridSettings(
        "x", "x", "x", 3, 2, "x", "x", "x", Patching(layer=1, k=(), random_seeds=())
    )
    ids = ("a", "b", "c")
    return GridResult(settings, ids, ids, conditions, 0.0, Transfer(*rows(2)))


def small_run(grid: GridResult) -> dict[str, object]:
    """The part of run.json that reading a run needs."""
    return {
        "format": FORMAT,
        "settings": grid.settings.to_dict(),
        "noise_floor_nats": 0.0,
        "compared": grid.compared._asdict(),
        "config": {},
    }


def chain(*parts: Iterator[bytes]) -> Iterator[bytes]:
    """One part after the other."""
    for part in parts:
        yield from part


READERS = {
    "head sets": (head_set, 32_000),
    "prompt files": (prompts, 16_000),
    "JSON files": (plain_json, 12_000),
    "condition records": (record, 12_000),
    "map files": (head_map, 9_000),
    "ranking files": (ranking, 8_000),
    "TOML configurations": (toml, 6_000),
    "run.json as configuration": (run_json, 4_000),
    "settings": (settings, 4_000),
    "finished runs": (finished_run, 300),
    "model folders": (model_folder, 3_000),
    "model folders, loaded": (whole_model, 100),
}


def feed(name: str, count: int, seed: int, folder: Path) -> tuple[int, str | None]:
    """Feed one reader; returns how many inputs it took and what went wrong, if anything."""
    make, _ = READERS[name]
    reader, inputs = make(random.Random(f"{name} {seed}"), count, folder)
    fed = 0
    for data in inputs:
        fed += 1
        try:
            reader(data)
        except UserError:
            continue
        except BaseException as problem:
            if isinstance(problem, KeyboardInterrupt | SystemExit):
                raise
            return fed, f"{type(problem).__name__}: {str(problem)[:200]} on {data[:400]!r}"
    return fed, None


def main() -> int:
    """Feed every reader."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    only = sys.argv[3:] or READERS
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    total, failures = 0, 0
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            fed, problem = feed(name, max(20, int(READERS[name][1] * share)), seed, Path(folder))
        total += fed
        failures += problem is not None
        outcome = "" if problem is None else f", FAILED with {problem}"
        print(f"{name}: {fed} inputs{outcome}", flush=True)  # noqa: T201
    print(f"total: {total} inputs")  # noqa: T201
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
