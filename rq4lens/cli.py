"""The command line: commands, and nothing else."""

from __future__ import annotations

import errno
import gc
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rq4lens import __version__
from rq4lens.analysis.rankings.methods import METHODS, methods_of
from rq4lens.cluster.many import Many
from rq4lens.config import PARTS, PairSource, Reading, RunConfig, preset, preset_names, preset_text
from rq4lens.disk.files import refuse_no_file, write_json_atomic
from rq4lens.errors import UserError
from rq4lens.screen import options, terminal

app = typer.Typer(
    help="Which attention heads carry what a fine-tune changed.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EVERY_PART = tuple(PARTS.values())

OWN_PAIR = "--base BASE --tuned TUNED --prompts prompts.jsonl"

UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ENOTDIR,
)  # fmt: skip
"""What the machine says of a folder that cannot be written to, such as a compiler's cache."""

ANALYSIS = ("analysis", "random_sizes")
"""Settings of the full analysis, which the main job alone makes."""

*_others, _last = METHODS
METHOD_HELP = f"{', '.join(_others)} or {_last}; several with commas, or ALL."

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a finished run.")]


def _say_version(asked: bool) -> bool:
    if asked:
        terminal.output.print(f"rq4lens {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _common(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Say the version.", callback=_say_version, is_eager=True),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what is reused or computed, and why.")
    ] = False,
) -> None:
    terminal.show_log(verbose)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run directory.")] = Path("runs/demo"),
    fresh: options.Fresh = False,
) -> None:
    """Run the main job on the built-in pair, every layer beside it."""
    from rq4lens.jobs.finished import refuse_other_run  # noqa: PLC0415 - keeps --help fast

    refuse_other_run(preset("etiquette"), out)
    with terminal.starting():  # torch and what stands on it take seconds to import
        from rq4lens.jobs.bench import Bench  # noqa: PLC0415
        from rq4lens.jobs.run import run_on  # noqa: PLC0415
        from rq4lens.jobs.sweep import sweep_on  # noqa: PLC0415

    bench = Bench(preset("etiquette"), out, fresh=fresh, stage=terminal.watched)
    with terminal.kept_when_stopped(out):
        # The sweep first: the run takes its layers into the report, and what it measured.
        sweep_on(bench)
        terminal.say(run_on(bench).summary, out)


@app.command(
    cls=options.Paneled, epilog=f"Example: rq4lens run {OWN_PAIR} --layer 26 --out runs/mine"
)
@options.takes_config(*EVERY_PART, config_file=True)
@options.takes_many()
def run(
    config: RunConfig,
    out: options.Out = None,
    fresh: options.Fresh = False,
    replace: Annotated[
        bool, options.in_directory("--replace", help="Replace a finished run of other settings.")
    ] = False,
    plan: Annotated[
        bool, options.in_directory("--plan", help="Say what memory it will take; measure nothing.")
    ] = False,
    *,
    many: Many,
) -> None:
    """Run the main job on a pair, and write its report.

    Maps on train prompts; on val prompts every head, top-k against random-k, the control layer.
    """
    if plan:
        from rq4lens.jobs.memory import plan_memory  # noqa: PLC0415 - keeps --help fast

        terminal.output.print(plan_memory(config).table)
        return
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in config.pair.name)
    directory = (
        out or Path("runs") / f"{name}_L{config.patching.layer}_alpha{config.patching.alpha:g}"
    )
    if many.asked:
        _by_many("run", config, None, directory, many, fresh)
        return
    from rq4lens.jobs.finished import refuse_other_run  # noqa: PLC0415

    if not (fresh or replace):
        refuse_other_run(config, directory)
    with terminal.starting():
        from rq4lens.jobs import run as job  # noqa: PLC0415

    with terminal.kept_when_stopped(directory):
        finished = job.run(config, directory, fresh=fresh, replace=replace, stage=terminal.watched)
        terminal.say(finished.summary, directory)


@app.command(
    cls=options.Paneled,
    epilog="Example: rq4lens patch --pair etiquette --heads L1H0,L1H2 --alpha 1",
)
@options.takes_config(
    *EVERY_PART,
    without=("control_layer", "k", "random_seeds", "rank_by", *ANALYSIS),
    config_file=True,
)
def patch(
    config: RunConfig,
    heads: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Head set: '3,7,12', '0-3,8', 'L1H3', ALL or NONE."),
    ] = "ALL",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the record as JSON.")
    ] = None,
    say: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Continue prompts for N tokens, patched at each."),
    ] = 0,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="A prompt that --say continues; repeatable."),
    ] = None,
) -> None:
    """Patch one head set of one layer, raw and mapped.

    With --say, base, tuned and tuned with these heads from base go on behind some prompts.
    """
    from rq4lens.jobs.patch import patch_once  # noqa: PLC0415 - keeps --help fast

    result = patch_once(config, heads, out, say=say, prompts=prompt or (), stage=terminal.watched)
    terminal.output.print(result.text, end="")


@app.command()
def head(
    run: Run,
    label: Annotated[
        str | None, typer.Argument(metavar="[HEAD]", help="A head, as in 'L1H0'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Write the cards of all heads into RUN/heads.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that a card shows.")] = 12,
    trust_remote_code: options.TrustCode = False,
) -> None:
    """Say what a head reads, writes and decides in both models of a run.

    Loads the models again; the report shows the cards that lie in RUN/heads.
    """
    from rq4lens.analysis.statistics.plain import to_json  # noqa: PLC0415
    from rq4lens.jobs.pages import card_of_run, write_every_card  # noqa: PLC0415 - keeps --help fast
    from rq4lens.screen.card import card_parts  # noqa: PLC0415

    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "stage": terminal.watched}
    if every == (label is not None):
        raise UserError("name one head, as in `rq4lens head RUN L1H0`, or ask for --all.")
    if label is None:
        terminal.say("", write_every_card(run, prompts, **how))
        return
    card = card_of_run(run, label, prompts, **how)
    if as_json:
        terminal.output.print(json.dumps(to_json(card), ensure_ascii=False, indent=1))
    else:
        terminal.show(card_parts(card))


@app.command(
    cls=options.Paneled, epilog="Example: rq4lens rank --pair etiquette --method delta,shapley"
)
@options.takes_config(
    *EVERY_PART,
    without=("control_layer", "random_seeds", "rank_by", *ANALYSIS),
    config_file=True,
)
def rank(
    config: RunConfig,
    method: Annotated[str, typer.Option(metavar="LIST", help=METHOD_HELP)] = "delta",
    file: options.RankingFiles = None,
    target: options.Target = None,
    ig_steps: options.IgSteps = None,
    out: options.RankOut = None,
) -> None:
    """Rank the heads of a layer by any method.

    Each is set beside exact single-head ΔKL, and beside what its top k heads cover.
    """
    from rq4lens.jobs.rank import rank_layer  # noqa: PLC0415 - keeps --help fast

    job = rank_layer(
        config,
        methods_of(method),
        files=file or (),
        target=target,
        ig_steps=ig_steps,
        out=out,
        stage=terminal.watched,
    )
    terminal.say(job.summary, *job.files)


@app.command(cls=options.Paneled, epilog=f"Example: rq4lens sweep {OWN_PAIR} --layers 20-31")
@options.takes_config(*EVERY_PART, without=("layer", "control_layer", *ANALYSIS), config_file=True)
@options.takes_many()
def sweep(
    config: RunConfig,
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Layers: '24,26', '20-31' or ALL.")
    ] = None,
    out: options.Out = None,
    fresh: options.Fresh = False,
    *,
    many: Many,
) -> None:
    """Compare all layers, and propose main and control.

    Every layer is measured from one clean pass of each model.
    """
    with terminal.starting():
        from rq4lens.jobs.sweep import parse_layers, sweep_layers  # noqa: PLC0415

    if many.asked:
        _by_many("sweep", config, parse_layers(layers), out, many, fresh)
        return
    result = sweep_layers(config, out, parse_layers(layers), fresh=fresh, stage=terminal.watched)
    terminal.say(result.summary, *([] if out is None else [out]))


def _by_many(
    command: Literal["run", "sweep"],
    config: RunConfig,
    layers: list[int] | None,
    out: Path | None,
    many: Many,
    fresh: bool,
) -> None:
    """Measure a share, or everything on a cluster, and print what became of it."""
    from rq4lens.cluster.launch import run_on_cluster  # noqa: PLC0415 - keeps --help fast
    from rq4lens.cluster.pieces import Request  # noqa: PLC0415
    from rq4lens.cluster.shards import run_shard  # noqa: PLC0415

    if out is None:
        raise UserError("several processes need one folder to meet in: name it with --out DIR.")
    request = Request(command, config, None if layers is None else tuple(layers))
    with terminal.kept_when_stopped(out):
        if many.shard is not None:
            said = run_shard(request, out, many.sharing, fresh=fresh, stage=terminal.watched)
        else:
            said = run_on_cluster(request, out, many.where, fresh=fresh, stage=terminal.watched)
    terminal.say(said, out)


@app.command()
@options.takes_many()
def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY.toml", help="Pairs, layers, alphas, maps.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Study directory; runs/NAME.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it takes, from a short probe.")
    ] = False,
    fresh: options.Fresh = False,
    *,
    many: Many,
) -> None:
    """Sweep several pairs, strengths and map kinds.

    They are compared in one report.
    """
    from rq4lens.studies.cost_model import plan_text  # noqa: PLC0415
    from rq4lens.studies.file import read_study  # noqa: PLC0415 - keeps --help fast
    from rq4lens.studies.job import run_study_file  # noqa: PLC0415

    wanted = read_study(file)
    if plan:
        terminal.say(plan_text(wanted, stage=terminal.watched))
        return
    directory = out or Path("runs") / file.stem
    with terminal.kept_when_stopped(directory):
        said = run_study_file(wanted, directory, many, fresh=fresh, stage=terminal.watched)
    terminal.say(said, directory)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of the shares.")],
    trust_remote_code: options.TrustCode = False,
) -> None:
    """Put together what shares of a job measured.

    Says which shares of the run, sweep or study are missing, if any are.
    """
    from rq4lens.studies.job import merge as merged  # noqa: PLC0415 - keeps --help fast

    terminal.say(merged(run, trust_remote_code=trust_remote_code, stage=terminal.watched), run)


@app.command(epilog="Example: rq4lens positions runs/demo --last 4 --prompt val0001")
def positions(
    run: Run,
    last: Annotated[
        str, typer.Option(metavar="N", help="How many of the last tokens, or all.")
    ] = "8",
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Measure on this prompt alone; repeatable."),
    ] = None,
    trust_remote_code: options.TrustCode = False,
) -> None:
    """Say at which token the heads of a run's layer carry something.

    Each of the last tokens is patched alone, and the subject where prompts name one: the whole
    layer and each head, in both directions. They are at most as many as every measured prompt has.
    A patch N tokens before the end costs N rows, since all behind it changes. Writes
    RUN/positions.json, and the report again.
    """
    from rq4lens.jobs.positions import map_run  # noqa: PLC0415 - keeps --help fast
    from rq4lens.screen.tables import positions_text  # noqa: PLC0415

    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "stage": terminal.watched}
    with terminal.kept_when_stopped(run):
        found = map_run(run, int(last) if last.isdecimal() else last, prompt, **how)
    terminal.say(positions_text(found), run)


@app.command(cls=options.Paneled, epilog=f"Example: rq4lens audit {OWN_PAIR}")
@options.takes_config(PairSource, Reading, "backend", "device", "dtype", config_file=True)
def audit(
    config: RunConfig,
    every: Annotated[bool, typer.Option("--all", help="Show every prompt.")] = False,
    compare: Annotated[
        Literal["auto", "none", "weights", "models"],
        typer.Option(
            help="What is compared besides: the weights, from their files, or the models, loaded, "
            "for the gap too; auto loads small ones that lie in folders."
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the audit as JSON.")
    ] = None,
) -> None:
    """Check that both models read each prompt alike, and say what the pair is.

    Large models are left alone: their tokenizers are enough for the prompts. The exit code is 1 if
    less than 95% align.
    """
    from rq4lens.jobs.audit import audit_pair  # noqa: PLC0415 - keeps --help fast
    from rq4lens.screen.audit import WIDTHS, audit_parts  # noqa: PLC0415

    refuse_no_file(out)
    found = audit_pair(config, compare, stage=terminal.watched)
    if out is not None:
        write_json_atomic(out, found.to_dict())
    terminal.show(audit_parts(*found, every_prompt=every), **WIDTHS)
    if found.audit.lacking or not found.audit.enough:
        raise typer.Exit(1)


@app.command()
def figures(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to; RUN/figures if left out.")
    ] = None,
) -> None:
    """Draw every figure of a finished run.

    HTML, and PNG and SVG where there is a Chromium.
    """
    from rq4lens.disk.run import FIGURES  # noqa: PLC0415
    from rq4lens.jobs.pages import draw_run  # noqa: PLC0415 - keeps --help fast

    directory = out or run / FIGURES
    for sentence in draw_run(run, directory):
        terminal.errors.print(sentence)
    terminal.say("", directory)


@app.command()
def report(run: Run) -> None:
    """Write the report of a finished run again.

    Layers that a sweep has put beside it since are shown too.
    """
    from rq4lens.jobs.pages import write_report_of  # noqa: PLC0415 - keeps --help fast

    terminal.say("", write_report_of(run))


@app.command()
def push(
    run: Run,
    repo: Annotated[
        str, typer.Option(metavar="USER/NAME", help="The dataset; it is made if there is none.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Let a dataset that is made be private.")
    ] = False,
) -> None:
    """Share a finished run on the Hugging Face hub.

    Its results, prompts, maps and report; rq.read_run("hf://USER/NAME") reads it again.
    """
    from rq4lens.analysis.saved import read_run  # noqa: PLC0415 - keeps --help fast

    terminal.output.print(f"pushed to {read_run(run).push(repo, private=private)}")


@app.command()
def verify(
    run: Run,
    sample: Annotated[
        int, typer.Option(min=0, help="Conditions to measure again through the reference engine.")
    ] = 5,
    trust_remote_code: options.TrustCode = False,
) -> None:
    """Check a finished run, and measure some of it again.

    Checksums, table and maps; then a sample of conditions through plain forward passes.
    """
    from rq4lens.jobs.verify import verify_run  # noqa: PLC0415 - keeps --help fast

    with terminal.watched("verify"):
        verification = verify_run(run, sample=sample, trust_remote_code=trust_remote_code)
    terminal.output.print(verification.text, end="")
    raise typer.Exit(0 if verification.passed else 1)


@app.command(
    cls=options.Paneled, epilog="Example: rq4lens validate --base BASE --prompts prompts.jsonl"
)
@options.takes_config(
    *(PairSource, Reading, "alpha", "device", "dtype", "seed"),
    without=("tuned", "tuned_revision", "exclude_misaligned"),
    config_file=True,
    default_pair="etiquette",
)
@options.takes_many("cluster", "workers", "gpus_per_worker")
def validate(
    config: RunConfig,
    method: Annotated[str, typer.Option(metavar="LIST", help=METHOD_HELP)] = "ALL",
    layer: Annotated[
        int | None, typer.Option(min=0, help="Plant in this layer; in a drawn one if left out.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Planted pairs per scenario.")] = 4,
    drift: Annotated[
        float, typer.Option(min=0.0, help="How far every weight moves besides.")
    ] = 0.02,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the result as JSON; keep pairs beside."),
    ] = None,
    fresh: options.Fresh = False,
    *,
    many: Many,
) -> None:
    """Test ranking methods on planted heads of a base model.

    Copies of it are made whose changed heads are known; nothing else is needed.
    """
    from rq4lens.cluster.launch import kept_beside, run_validation  # noqa: PLC0415
    from rq4lens.validation.suite import ValidationRequest  # noqa: PLC0415

    request = ValidationRequest(config, methods_of(method), layer, pairs, drift)
    where = many.where if many.asked else None
    with terminal.kept_when_stopped(None if out is None else kept_beside(out)):
        said = run_validation(request, out, where, fresh=fresh, stage=terminal.watched)
    terminal.output.print(said, end="")


@app.command()
def pairs(
    name: Annotated[str | None, typer.Argument(help="Print this pair's settings as TOML.")] = None,
) -> None:
    """List the pairs that come with the package."""
    if name is not None:
        terminal.output.print(preset_text(name), end="")
        return
    for each in preset_names():
        terminal.output.print(f"{each:<12}{preset(each).pair.about}")


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit code 2."""
    terminal.replace_unprintable()
    try:
        # They may stand behind the command too, where one looks for them.
        arguments = sorted(sys.argv[1:], key=lambda each: each not in ("-v", "--verbose"))
        said = app(args=arguments or ["--help"], prog_name="rq4lens", standalone_mode=False)
        if (why := terminal.output_problem()) is not None:
            _fail_at_output(why)
        sys.exit(said or 0)
    except OSError as problem:
        _fail_at_disk(problem)
    except UserError as problem:
        _fail(str(problem))
    except typer.Abort:
        sys.exit(130)
    except Exception as problem:
        # Typer's own usage errors have no public common class; this method is what marks them.
        if not hasattr(problem, "format_message"):
            raise
        context = getattr(problem, "ctx", None)
        command = context.command_path if context else "rq4lens"
        _fail(f"{problem.format_message().rstrip('.')}; see `{command} --help`.")
    finally:
        gc.freeze()  # else the interpreter looks through all that was imported once more


def _fail_at_disk(problem: OSError) -> None:
    """Say what no command can help: an output that takes no more, a place that is not open."""
    if (why := terminal.output_problem("\n")) is not None:
        _fail_at_output(why)
    if problem.filename is None or problem.errno not in UNUSABLE:
        raise problem
    _fail(
        f"cannot use {str(problem.filename)!r} ({problem.strerror}): make it writable, leave room "
        "on the disk, or name another place."
    )


def _fail_at_output(why: str) -> None:
    terminal.errors.print(
        f"rq4lens: cannot print the result ({why}); files that were written are complete"
    )
    sys.exit(1)


def _fail(sentence: str) -> None:
    # What a library says may have several lines; the sentence stays one.
    terminal.errors.print(f"rq4lens: {' '.join(sentence.split())}")
    sys.exit(2)
