"""The tables and the pictures of docs/record-codecs.md, made of the result lines of bench_codec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, cell

PAGE = Path(__file__).parent.parent / "docs" / "record-codecs.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
STYLES = {
    "kdcache, 8 bit": ("C0", "o-"),
    "kdcache, 16 bit": ("C9", "o-"),
    "TinyViT": ("C3", "s-"),
    "FKD, float32": ("C1", "^-"),
    "FKD, float16": ("C1", "v:"),
    "DistillKit": ("C2", "D-"),
    "DistillKit, budget": ("C2", "d:"),
    "projection": ("0.45", "x--"),
}
KINDS = {
    "full": "KL over all classes, the tail spread evenly",
    "bucket": "KL over the named classes and the rest as one outcome",
}
TEMPERATURES = ("1", "2", "5", "10")

Line = dict[str, Any]


def saved() -> list[Line]:
    path = RESULTS / "codec.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(lines: list[Line]) -> str:
    points = [x for x in lines if "layout" in x]
    parts = [_passport(lines)]
    parts += ["### Bars", _bars([x for x in lines if "tinyvit_bytes" in x], points)]
    parts += [
        f"### {title}\n\n![{title}](record_codecs_{kind}.svg)" for kind, title in KINDS.items()
    ]
    parts += ["### Speed", _speeds([x for x in lines if "p50" in x])]
    parts.append("### Every point")
    for name in dict.fromkeys(x["set"] for x in points):
        parts.append(_points([x for x in points if x["set"] == name]))
    return "\n\n".join(parts)


def _passport(lines: list[Line]) -> str:
    machine = lines[0]["machine"]
    versions = ", ".join(f"{n} {machine['versions'][n]}" for n in ("zarr", "numpy", "torch"))
    sets = [
        f"* **{x['set']}**: {x['classes']} classes, {x['typefaces']} typefaces, {x['records']:,} "
        f"records of mixed views; teacher's accuracy on unseen typefaces {x['accuracy']:.0%}, its "
        f"mean top-1 probability on the views {x['mean_top1_probability']:.2f}."
        for x in lines
        if "accuracy" in x
    ]
    where = f"{machine['cpu']}, {machine['cores']} cores; {versions}; commit {machine['commit']}."
    return "\n".join([where, "", *sets])


def _bars(bars: list[Line], points: list[Line]) -> str:
    """A row for each point of TinyViT's."""
    heads = [f"{kind}, T = {t}" for kind in KINDS for t in TEMPERATURES[1:]]
    shares = "our share of them, T = 1 | of them after zstd"
    rows = [
        f"| set | TinyViT's k | its bytes | {shares} | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * (4 + len(heads)),
    ]
    zstd = {(x["set"], x["k"]): x["zstd_bytes"] for x in points if x["layout"] == "TinyViT"}
    for name, k in dict.fromkeys((x["set"], x["k"]) for x in bars):
        at = {f"{x['T']:g}": x for x in bars if (x["set"], x["k"]) == (name, k)}
        size, share = at["1"]["tinyvit_bytes"], at["1"]["full"]
        packed = "out of reach" if share is None else cell(share * size / zstd[name, k])
        cells = [_bar(at["1"], "full"), packed]
        cells += [_bar(at[t], kind) for kind in KINDS for t in TEMPERATURES[1:]]
        rows.append(f"| {name} | {k} | {size:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _bar(line: Line, kind: str) -> str:
    value = "out of reach" if line[kind] is None else f"{cell(line[kind])}"
    return value if line[f"{kind}_met"] else f"**{value}**"


def _speeds(lines: list[Line]) -> str:
    first = lines[0]
    rows = [
        f"Million records a second, one thread of torch, {first['set']}, k = {first['k']}.",
        "",
        "| step | p50 | p20 to p80 |",
        "| --- | ---: | ---: |",
    ]
    for x in lines:
        p20, p50, p80 = (f"{x[p] / 1e6:.2g}" for p in ("p20", "p50", "p80"))
        rows.append(f"| {x['step']} | {p50} | {p20} to {p80} |")
    return "\n".join(rows)


def _points(lines: list[Line]) -> str:
    heads = [f"{kind} {t}" for kind in KINDS for t in TEMPERATURES]
    rows = [
        f"**{lines[0]['set']}**, {lines[0]['classes']} classes; KL in nats at each T",
        "",
        "| layout | k | bytes | zstd | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * (3 + len(heads)),
    ]
    for x in lines:
        values = (x[f"{kind}_{t}"] for kind in KINDS for t in TEMPERATURES)
        sizes = f"{x['bytes']:.1f} | {x['zstd_bytes']:.1f}"
        kl = " | ".join(f"{v:.2g}" for v in values)
        rows.append(f"| {x['layout']} | {x['k']} | {sizes} | {kl} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with its measured part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(saved())}\n\n{END}{rest.split(END)[1]}"


def write() -> None:
    PAGE.write_text(page(PAGE.read_text()))
    points = [x for x in saved() if "layout" in x]
    for kind, title in KINDS.items():
        plot(points, kind, title, PAGE.with_name(f"record_codecs_{kind}.svg"))


def plot(points: list[Line], kind: str, title: str, path: Path) -> None:
    """Curves of bytes against KL: a row of panels for each set, a panel for each temperature."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "kdcache"  # equal figures, equal files
    sets = list(dict.fromkeys((x["set"], x["classes"]) for x in points))
    figure = Figure(figsize=(13, 0.9 + 3.2 * len(sets)))
    panels = figure.subplots(len(sets), len(TEMPERATURES), sharey="row", sharex=True)
    for row, (name, classes) in zip(panels, sets, strict=True):
        for axes, t in zip(row, TEMPERATURES, strict=True):
            for layout, (colour, style) in STYLES.items():
                if (layout, kind) == ("projection", "bucket"):
                    continue  # it names every class or none
                here = [x for x in points if (x["set"], x["layout"]) == (name, layout)]
                few = [x for x in here if x["k"] != "all"]
                axes.plot(
                    [x["bytes"] for x in few],
                    [x[f"{kind}_{t}"] for x in few],
                    style,
                    color=colour,
                    markersize=4,
                    linewidth=1.2,
                    label=layout,
                )
                if every := [x for x in here if x["k"] == "all"]:
                    axes.plot(every[0]["bytes"], every[0][f"{kind}_{t}"], "*", color=colour, ms=9)
            axes.set(xscale="log", yscale="log", title=f"{name}, C = {classes}, T = {t}")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("KL in nats")
    for axes in panels[-1]:
        axes.set_xlabel("bytes a record")
    figure.suptitle(f"{title} (a star: all classes)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(STYLES), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, metadata={"Date": None})
