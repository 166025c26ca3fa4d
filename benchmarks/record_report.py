"""The section "Rate and distortion" of docs/record-codecs.md, from the lines of bench_records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "record-codecs.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SETS = {
    "lite0": "EfficientNet-Lite0, pretrained on ImageNet; views of function matching of drawings "
    "and photos",
    "lite2": "EfficientNet-Lite2, pretrained on ImageNet; the same images",
    "kanji": "a `kdcache:medium` trained on glyphs of 1,000 kanji; mixed views",
    "fashion-mnist": "a `kdcache:medium` trained on Fashion-MNIST; mixed views",
}
STYLES = {
    "transformed": ("C0", "o-"),
    "dense": ("C0", "*"),
    "top k, uint8": ("C9", "o-"),
    "top k, float16": ("C9", "o:"),
    "TinyViT": ("C3", "s-"),
    "FKD, float16": ("C1", "v-"),
    "DistillKit": ("C2", "D-"),
    "residual VQ": ("C5", "x--"),
    "product VQ": ("0.45", "x:"),
}
TEMPERATURES = ("1", "2", "5", "10")
PLOTS = {
    "full": ("record_codecs_kl.svg", "KL over all classes, nats"),
    "cosine_near": ("record_codecs_cosine.svg", "1 - cosine of the gradients, near student"),
}
# Of the many lines in records.jsonl.
SHOWN = {
    "transformed": ("D = 2", "D = 1", "D = 0.5", "D = 0.1", "D = 0.02", "D = 0.01"),
    "transformed, k = 6": ("D = 1.2",),
    "dense": ("float16", "uint8"),
    "top k, uint8": ("k = 10", "k = 16", "k = 64"),
    "top k, float16": ("k = 16",),
    "TinyViT": ("k = 10",),
    "FKD, float16": ("k = 10",),
    "DistillKit": ("k = 16",),
    "residual VQ": ("48 codes",),
    "product VQ": ("48 codes",),
}

Line = dict[str, Any]


def saved() -> list[Line]:
    path = RESULTS / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(lines: list[Line]) -> str:
    machine = lines[0]["machine"]
    versions = ", ".join(f"{n} {machine['versions'][n]}" for n in ("zarr", "numpy", "torch"))
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores; {versions}; commit {machine['commit']}.",
        "\n".join(
            f"* **{x['set']}**: {SETS[x['set']]}. {x['classes']:,} classes, {x['records']:,} "
            f"records measured, mean top-1 probability {x['mean_top1_probability']:.2f}."
            for x in lines
            if "mean_top1_probability" in x
        ),
        "### Bars",
        _bars([x for x in lines if "met" in x]),
        "### What `--record auto` chooses",
        _auto([x for x in lines if "auto_at" in x]),
        *(f"### {title}\n\n![{title}]({name})" for name, title in PLOTS.values()),
        "### Figures",
    ]
    points = [x for x in lines if "layout" in x]
    return "\n\n".join([*parts, *(_points(points, name) for name in _names(points))])


def _names(points: list[Line]) -> list[str]:
    return list(dict.fromkeys(x["set"] for x in points))


def _table(head: list[str], rows: list[list[str]], words: int) -> str:
    """The first `words` columns are words, the others numbers."""
    marks = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def _bars(lines: list[Line]) -> str:
    rows = []
    for x in lines:
        values = [x[f"at_{t}"] for t in TEMPERATURES]
        found = [f"{v:.4f}" if x["bar"] < 1 else f"{v:.3g}" for v in values]
        met = f"{x['bar']:g}, {'met' if x['met'] else '**not met**'}"
        rows.append([x["set"], x["case"], x["record"], f"{x['bytes']:.1f}", *found, met])
    head = ["set", "measured", "record", "bytes", *(f"T = {t}" for t in TEMPERATURES), "bar"]
    return _table(head, rows, 3)


def _auto(lines: list[Line]) -> str:
    rows = [
        [x["set"], f"{x['auto_at']:g}", x["record"], f"{x['bytes']:.0f}"]
        + [f"{x['cosine'][t]:.3f}" if t in x["cosine"] else "" for t in TEMPERATURES]
        for x in lines
    ]
    head = [
        "set",
        "`--temperature`",
        "record",
        "bytes",
        *(f"cosine, T = {t}" for t in TEMPERATURES),
    ]
    return _table(head, rows, 3)


def _points(points: list[Line], name: str) -> str:
    of_set = [x for x in points if x["set"] == name]
    head = ["record", "bytes", "zstd"]
    head += [f"{kind}, T = {t}" for kind in ("KL", "cosine") for t in TEMPERATURES]
    head.append("least cosine, fresh")
    rows = [
        [
            f"{x['layout']}, {x['setting']}",
            f"{x['bytes']:.1f}",
            f"{x['zstd_bytes']:.1f}",
            *(f"{x[f'full_{t}']:.2g}" for t in TEMPERATURES),
            *(f"{x[f'cosine_near_{t}']:.3f}" for t in TEMPERATURES),
            f"{min(x[f'cosine_fresh_{t}'] for t in TEMPERATURES):.3f}",
        ]
        for x in sorted(of_set, key=lambda x: float(x["bytes"]))
        if x["setting"] in SHOWN.get(x["layout"], ())
    ]
    return f"**{name}**, {of_set[0]['classes']} classes\n\n" + _table(head, rows, 1)


def page(text: str) -> str:
    """The page with its measured part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(saved())}\n\n{END}{rest.split(END)[1]}"


def write() -> None:
    PAGE.write_text(page(PAGE.read_text()))
    points = [x for x in saved() if "layout" in x]
    for kind, (name, title) in PLOTS.items():
        plot(points, kind, title, PAGE.with_name(name))


def plot(points: list[Line], kind: str, title: str, path: Path) -> None:
    """A row of panels for each set, one for each temperature: bytes against what is lost."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "kdcache"  # equal figures, equal files
    names = _names(points)
    figure = Figure(figsize=(13, 0.9 + 3.2 * len(names)))
    panels = figure.subplots(len(names), len(TEMPERATURES), sharex="row", squeeze=False)
    for row, name in zip(panels, names, strict=True):
        for axes, t in zip(row, TEMPERATURES, strict=True):
            for layout, (colour, style) in STYLES.items():
                here = [x for x in points if (x["set"], x["layout"]) == (name, layout)]
                here.sort(key=lambda x: float(x["bytes"]))
                values = [x[f"{kind}_{t}"] for x in here]
                lost = [max(1 - v, 1e-7) if kind == "cosine_near" else v for v in values]
                axes.plot(
                    [x["bytes"] for x in here],
                    lost,
                    style,
                    color=colour,
                    markersize=9 if layout == "dense" else 4,
                    linewidth=1.2,
                    label=layout,
                )
            axes.set(xscale="log", yscale="log", title=f"{name}, T = {t}")
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("bytes a record")
    figure.suptitle(title)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(STYLES), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, metadata={"Date": None})
