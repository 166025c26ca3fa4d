"""The tables and the pictures of docs/losses.md, made of the result lines of bench_loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "losses.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def saved(device: str) -> list[dict[str, Any]]:
    path = RESULTS / f"loss_{device}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables() -> str:
    """Markdown: a table for each shape and cache state, or the word that there is none yet."""
    parts = []
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        lines = saved(device)
        parts.append(f"### {name}")
        if not lines:
            parts.append("Not yet measured.")
            continue
        parts.append(f"![Times as multiples of a copy](losses_{device}.svg)")
        parts.append(_passport(lines[0]))
        for key in dict.fromkeys((line["shape"], line["cache"]) for line in lines):
            parts.append(_table([x for x in lines if (x["shape"], x["cache"]) == key]))
    return "\n\n".join(parts)


def _passport(line: dict[str, Any]) -> str:
    machine, versions = line["machine"], line["machine"]["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {line['threads']} threads"
    return (
        f"{where}; torch {versions['torch']}, triton {versions['triton']}, numba "
        f"{versions['numba']}; commit {machine['commit']}; {line['dtype']}, k = {line['k']}, "
        f"T = {line['T']:g}, {line['rounds']} interleaved rounds."
    )


def _table(lines: list[dict[str, Any]]) -> str:
    first = lines[0]
    timed = sorted((x for x in lines if "p50" in x), key=lambda x: x["p50"])
    ours = next((x["p50"] for x in timed if x["contestant"] == "kdcache sparse"), None)
    graph = ", CUDA graph" if first["launch"] == "graph" else ""
    rows = [
        f"**{first['shape']}**, {first['cache']} cache{graph}",
        "",
        "| form | p50 us | p20 to p80 | times ours | share of copy | peak bytes a logit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for x in timed:
        times = f"{x['p50'] / ours:.1f}" if ours else ""
        peak = "" if x["peak_bytes_per_logit"] is None else f"{x['peak_bytes_per_logit']:.1f}"
        share = "" if x["of_copy"] is None else f"{x['of_copy']:.0%}"
        rows.append(
            f"| {x['contestant']} | {x['p50']:,.0f} | {x['p20']:,.0f} to {x['p80']:,.0f} "
            f"| {times} | {share} | {peak} |"
        )
    rows += [f"| {x['contestant']} | {x['result']} | | | | |" for x in lines if "result" in x]
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with its measured part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def write() -> None:
    PAGE.write_text(page(PAGE.read_text()))
    for device in ("cpu", "cuda"):
        if lines := [x for x in saved(device) if "p50" in x and x["cache"] == "warm"]:
            plot(lines, PAGE.with_name(f"losses_{device}.svg"))


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Bars of the medians, as multiples of the copy; whiskers from p20 to p80."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(x["shape"] for x in lines))
    figure = Figure(figsize=(9, 0.8 + 2.6 * len(shapes)))
    for number, shape in enumerate(shapes, 1):
        axes = figure.add_subplot(len(shapes), 1, number)
        here = sorted((x for x in lines if x["shape"] == shape), key=lambda x: -x["p50"])
        copy = next(x["p50"] for x in here if x["contestant"] == "copy")
        names, medians = [x["contestant"] for x in here], [x["p50"] / copy for x in here]
        low = [(x["p50"] - x["p20"]) / copy for x in here]
        high = [(x["p80"] - x["p50"]) / copy for x in here]
        colours = ["C0" if n.startswith("kdcache") else "0.7" for n in names]
        axes.barh(names, medians, xerr=[low, high], color=colours)
        axes.set_xscale("log")
        axes.set_title(f"{shape}, warm: time as a multiple of a copy")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
