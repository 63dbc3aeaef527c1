"""Turn the records of ``benchmarks/results/`` into ``benchmarks/RESULTS.md`` and growth curves.

Run as ``python benchmarks/tables.py`` after ``engine.py``, ``atlas.py``, ``spread.py``,
``positions.py``, ``end_to_end.py`` and ``many_prompts.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ORDER = ("llama-8b", "gpt2-small", "builtin")

INTRODUCTION = """# What the engine costs

Each section is one run of one process; ratios, not seconds, are what carries over to other
machines. The plain forward passes are the unavoidable input: both models once over all prompts.
The grid is the main job at one layer (all heads, each head, top and random heads; raw and mapped),
from two models in memory to numbers, with the maps given. Other ways are timed on a sample of the
same conditions and extrapolated to all of them; a process of its own makes the weights of a random
pair instead of reading them. The arithmetic floor counts two operations per
weight that a row is multiplied with, at the speed of one large matrix product on the same device.

Written by `python benchmarks/tables.py` from the records in `benchmarks/results/`.
"""


def main() -> None:
    """Write the tables and draw the curves."""
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    records = {name: found[name] for name in ORDER if name in found}
    sections = [section(name, record) for name, record in records.items()]
    sections += [atlas(each) for name, each in found.items() if name.startswith("atlas-")]
    sections += [spread(each) for name, each in found.items() if name.startswith("spread-")]
    sections += [whole_run(each) for name, each in found.items() if name.startswith("end-to-end-")]
    sections += [bridge(each) for name, each in found.items() if name.startswith("bridge-")]
    sections += [positions(each) for name, each in found.items() if name.startswith("positions-")]
    sections += [prompts(n, each) for n, each in found.items() if n.startswith("many-prompts-")]
    (HERE / "RESULTS.md").write_text("\n".join([INTRODUCTION, *sections]))
    for name, record in records.items():
        if "growth" in record:
            draw(record).write_image(RESULTS / f"{name}-growth.svg")


def section(name: str, record: dict[str, Any]) -> str:
    """The tables of one case."""
    lines = [
        f"## {record['case']}",
        "",
        f"{record['what']}.",
        "",
        origin(record),
        "",
        "| | seconds | of two plain forward passes | the engine is faster by |",
        "|---|---:|---:|---:|",
        *(row(*entry) for entry in entries(record)),
        "",
        *remarks(record),
        "",
    ]
    if "growth" in record:
        lines += [f"![How the cost grows](results/{name}-growth.svg)", ""]
    return "\n".join(lines)


Entry = tuple[str, float, float, float | None]


def entries(record: dict[str, Any]) -> list[Entry]:
    """Label, seconds, ratio to the plain passes, and how much slower than the engine."""
    plain, grid, scan = record["plain_forwards_seconds"], record["grid"], record["scan"]
    stages = grid["stages_seconds"]
    n_grid, n_scan = grid["n_conditions"], scan["n_conditions"]

    def other(label: str, key: str, n: int, engine: float) -> list[Entry]:
        if key not in record:
            return []
        seconds = record[key] * n
        return [
            (f"{label}, {n} conditions (extrapolated)", seconds, seconds / plain, seconds / engine)
        ]

    whole = grid["seconds"]
    measured: list[Entry] = [
        ("two plain forward passes", plain, 1.0, None),
        (f"**the grid, {n_grid} conditions, all in all**", whole, whole / plain, None),
        ("its base activations", stages["capture"], stages["capture"] / plain, None),
        (
            "its clean pass, check included",
            stages["clean_pass"],
            stages["clean_pass"] / plain,
            None,
        ),
        ("its conditions", stages["rows"], stages["rows"] / plain, None),
        *other("native hooks, batched", "hooks_seconds_per_condition", n_grid, whole),
        *other("TransformerLens `patching`", "library_seconds_per_condition", n_grid, whole),
        *other("one process each", "process_seconds_per_condition", n_grid, whole),
        (
            "gradient attribution of the layer (approximate)",
            record["attribution_of_one_layer_seconds"],
            record["attribution_of_one_layer_seconds"] / plain,
            None,
        ),
        (
            f"**every head of every layer, {n_scan} conditions, beyond the clean passes**",
            scan["seconds"],
            scan["seconds"] / plain,
            None,
        ),
        *other("native hooks, batched", "hooks_seconds_per_condition", n_scan, scan["seconds"]),
    ]
    return measured


def row(label: str, seconds: float, ratio: float, faster: float | None) -> str:
    """One line of a table."""
    by = "" if faster is None else f"{short(faster)}x"
    return f"| {label} | {short(seconds)} | {short(ratio)}x | {by} |"


def short(value: float) -> str:
    """A number with three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def remarks(record: dict[str, Any]) -> list[str]:
    """What does not fit into the table."""
    scan, agreement = record["scan"], record["agreement"]
    lines = [
        f"- Arithmetic floor of every head of every layer: {scan['floor_seconds']:.3g} s at "
        f"{record['peak_flops'] / 1e12:.3g} TFLOP/s; the engine takes "
        f"{scan['seconds'] / scan['floor_seconds']:.3g}x that.",
        f"- The first of each in the process, which also reorders weights in memory and builds "
        f"kernels: the grid {record['grid']['first_seconds']:.3g} s, every head "
        f"{scan['first_seconds']:.3g} s.",
        f"- No patch reads {agreement['none_kl_nats']:.2g} nats. All heads patched: KL "
        f"{agreement['full_kl_nats']:.6g} nats by the engine, "
        f"{agreement['full_kl_nats_by_hooks']:.6g} by native hooks; the largest difference of any "
        f"prompt is {agreement['largest_kl_difference_nats']:.2g}.",
    ]
    if "peak_bytes_beyond_weights" in record:
        rows = scan["memory"]["rows"]
        lines.append(
            f"- Peak memory beyond the weights of both models: "
            f"{record['peak_bytes_beyond_weights'] / 1e9:.3g} GB; budget of the rows "
            f"{rows['budget_bytes'] / 1e9:.3g} GB, of the kept keys and values "
            f"{scan['memory']['kept_bytes'] / 1e9:.3g} GB."
        )
    if "demo_compute_seconds" in record:
        lines.append(
            f"- Maps and main grid of the demo, once loaded: "
            f"{record['demo_compute_seconds']:.3g} s."
        )
    return lines


def origin(record: dict[str, Any]) -> str:
    """What was run, when and on what."""
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    return f"`{record['command']}`, {record['date']}, {record['hardware']}, {versions}."


def atlas(record: dict[str, Any]) -> str:
    """Every head of every layer on several GPUs."""
    lines = [
        "## Every head of every layer on several GPUs",
        "",
        f"{record['what']}.",
        "",
        origin(record),
        "",
        "| GPUs | seconds | rows per second | rate | peak memory of one |",
        "|---:|---:|---:|---:|---:|",
    ]
    for point, ratio in zip(record["points"], record["rate_ratio_to_first"], strict=True):
        lines.append(
            f"| {point['workers']} | {point['seconds']:.3g} | {point['rows_per_second']:,.0f} | "
            f"{ratio:.3g}x | {point['peak_bytes_of_a_worker'] / 1e9:.3g} GB |"
        )
    difference = record["largest_kl_difference_nats"]
    lines += ["", f"- The numbers differ between these by at most {difference:.2g} nats.", ""]
    return "\n".join(lines)


def bridge(record: dict[str, Any]) -> str:
    """The cached engine on a bridge."""
    seconds = record["seconds"]
    return "\n".join(
        [
            "## A TransformerBridge through its own cache",
            "",
            f"{record['what']}.",
            "",
            origin(record),
            "",
            f"- Processor seconds: {seconds['cached']:.3g} by the cached engine, its clean pass "
            f"included, {seconds['hooks']:.3g} by native hooks (extrapolated): "
            f"{record['times_faster']:.3g}x faster.",
            f"- The numbers differ by at most {record['largest_kl_difference_nats']:.2g} of "
            f"{record['largest_kl_nats']:.2g} nats.",
            "",
        ]
    )


def positions(record: dict[str, Any]) -> str:
    """Rows of several tokens beside rows of one."""
    points = record["points"]
    sizes = sorted({point["size"] for point in points})
    lines = [
        f"## More tokens: {record['case']}",
        "",
        f"{record['what']}; rows of the grid, relative to the decision token alone, and seconds; "
        "beside them the clean pass, check included, likewise.",
        "",
        origin(record),
        "",
        "| | " + " | ".join(str(size) for size in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    for axis in dict.fromkeys(point["axis"] for point in points):
        some = [point for point in points if point["axis"] == axis]
        for label, key in (("rows", "rows_seconds"), ("clean pass", "clean_pass_seconds")):
            cells = (f"{p[key] / some[0][key]:.2g}x, {p[key]:.3g} s" for p in some)
            lines.append(f"| {axis}: {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def spread(record: dict[str, Any]) -> str:
    """A pair that fits no single GPU, by stage."""
    lines = [
        f"## {record['case']}",
        "",
        f"{record['what'][0].upper()}{record['what'][1:]}; weights of one model "
        f"{record['weights_bytes'] / 1e9:.0f} GB.",
        "",
        origin(record),
        "",
        "| stage | seconds | peak memory of each GPU |",
        "|---|---:|---:|",
    ]
    for stage, seconds in record["stages_seconds"].items():
        peaks = " and ".join(f"{peak / 1e9:.1f}" for peak in record["stages_peak_bytes"][stage])
        lines.append(f"| {stage} | {seconds:.2f} | {peaks} GB |")
    memory = record["memory"]["rows"]
    return "\n".join(
        [
            *lines,
            "",
            f"- The grid, {record['n_conditions']} conditions (capture, clean pass and rows): "
            f"{record['grid_seconds']:.2f} s, {record['ratio_to_plain_forwards']:.2f}x two plain "
            f"forward passes, {record['times_faster_than_hooks']:.0f}x faster than native hooks.",
            f"- Rows: {memory['largest_chunk_rows']:,} at once, {memory['max_rows']:,} allowed by "
            f"the budget of {memory['budget_bytes'] / 1e9:.1f} GB on each GPU.",
            f"- No patch reads {record['none_kl_nats']:.2g} nats. All heads patched: KL "
            f"{record['full_kl_nats']:.6g} nats by the engine, "
            f"{record['full_kl_nats_by_hooks']:.6g} by native hooks.",
            "",
        ]
    )


def whole_run(record: dict[str, Any]) -> str:
    """The whole command beside a plain script, by stage."""
    runs = {"plain script": record["plain"], **record["runs"]}
    stages = list(dict.fromkeys(name for each in runs.values() for name in each["stages_seconds"]))
    plain = record["plain"]["wall_seconds"]

    def line(label: str, values: list[str]) -> str:
        return f"| {label} | {' | '.join(values)} |"

    def walls(form: str, unit: float) -> list[str]:
        return [
            f"{'' if each['finished'] else 'above '}{each['wall_seconds'] / unit:{form}}"
            for each in runs.values()
        ]

    lines = [
        "## The whole command, from folders to report",
        "",
        f"{record['what'][0].upper()}{record['what'][1:]}.",
        "",
        origin(record),
        "",
        line("seconds", list(runs)),
        line("---", ["---:"] * len(runs)),
        *(
            line(stage, [f"{each['stages_seconds'].get(stage, 0):.1f}" for each in runs.values()])
            for stage in stages
        ),
        line("**wall, start-up included**", walls(".0f", 1.0)),
        line("**of the plain script**", walls(".2f", plain)),
        line(
            "peak memory on the GPU",
            [
                f"{each['peak_device_bytes'] / 1e9:.1f} GB" if each.get("peak_device_bytes") else ""
                for each in runs.values()
            ],
        ),
        "",
    ]
    return "\n".join(lines)


def prompts(name: str, record: dict[str, Any]) -> str:
    """A run by the number of its val prompts."""
    head = ("val prompts", "seconds", "CPU seconds", "peak memory", "report")
    lines = [
        "## More prompts",
        "",
        f"{record['what'][0].upper()}{record['what'][1:]}.",
        "",
        origin(record),
        "",
        f"| {' | '.join(head)} |",
        f"|{'---:|' * len(head)}",
    ]
    for run in record["runs"]:
        cells = (
            f"{run['n_val']:,}",
            f"{run['wall_seconds']:.0f}",
            f"{run['cpu_seconds']:.0f}",
            f"{run['peak_bytes'] / 1e9:.2f} GB",
            f"{run['report_bytes'] / 1e6:.1f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![How a run grows with its prompts](results/{name}.svg)", ""])


def draw(record: dict[str, Any]) -> go.Figure:
    """Seconds against the size of each axis, both on logarithmic scales."""
    axes = list(dict.fromkeys(point["axis"] for point in record["growth"]))
    figure = make_subplots(1, len(axes), shared_yaxes=True, subplot_titles=axes)
    for column, axis in enumerate(axes, start=1):
        points = [point for point in record["growth"] if point["axis"] == axis]
        for key, label, colour in (
            ("clean_pass_seconds", "clean pass", "#7f7f7f"),
            ("rows_seconds", "conditions", "#0072B2"),
        ):
            figure.add_scatter(
                x=[point["value"] for point in points],
                y=[point[key] for point in points],
                name=label,
                mode="lines+markers",
                line_color=colour,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", dtick="D2")
    figure.update_yaxes(type="log")
    figure.update_yaxes(title_text="seconds", col=1)
    return figure.update_layout(
        template="plotly_white",
        width=1100,
        height=380,
        title_text=f"{record['case']}: {record['what']}",
        title_font_size=13,
    )


if __name__ == "__main__":
    main()
