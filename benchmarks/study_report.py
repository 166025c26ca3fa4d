"""The table of docs/record-codecs.md on students, from the lines of study_records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "record-codecs.md"
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"

Line = dict[str, Any]


def saved() -> list[Line]:
    path = RESULTS / "records_study.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(whole: list[Line], kind: str) -> str:
    """A row for each kind of record, columns for each T; mean over seeds, and their range."""
    temperatures = sorted({x["T"] for x in whole})
    head = ["record", "bytes"]
    for what in ("KL at T = 1", "KL at T", "agreement"):
        head += [
            f"{what}, trained at T = {T:g}" for T in temperatures if (what, T) != ("KL at T", 1)
        ]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name in dict.fromkeys(x["record"] for x in whole):
        of_record = [x for x in whole if x["record"] == name]
        row = [name, f"{of_record[0]['bytes']:,.0f}"]
        for key, digits in ((f"{kind}_kl_1", 3), (f"{kind}_kl_T", 4), (f"{kind}_agreement", -1)):
            for T in temperatures:
                if (key, T) != (f"{kind}_kl_T", 1):
                    row.append(_cell([x[key] for x in of_record if x["T"] == T], digits))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(values: list[float], digits: int) -> str:
    """Mean and half the range, such as 1.816 ± 0.004; digits -1: per cent."""
    if not values:
        return ""
    unit = ""
    if digits < 0:
        values, digits, unit = [100 * x for x in values], 1, " %"
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    range_ = f" ± {spread:.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{range_}{unit}"


def text(lines: list[Line]) -> str:
    machine, first = lines[0]["machine"], lines[0]
    seeds = len({x["seed"] for x in lines})
    of = {n: [x for x in lines if x["epochs"] == n] for n in sorted({x["epochs"] for x in lines})}
    most = max(of.values(), key=len)
    versions = ", ".join(f"{n} {machine['versions'][n]}" for n in ("torch", "numba", "ffcv"))
    where = (
        f"{first['images']:,} images, {first['views']} views, {most[0]['epochs']} epochs, {seeds} "
        f"seeds (mean ± half the range); {machine['cpu']}, {machine['cores']} cores; {versions}; "
        f"commit {machine['commit']}."
    )
    parts = [where, "Held-out images, mixed as in training:", table(most, "mixed")]
    parts += ["Held-out images, whole:", table(most, "plain")]
    for epochs, some in of.items():
        if epochs > most[0]["epochs"]:
            parts += [f"{epochs} epochs, seed 0, mixed images:", table(some, "mixed")]
    short = of.get(1, [])
    if len(short) == 2:
        found = "; ".join(
            f"{x['record']}: KL at T = 1 {x['mixed_kl_1']:.6f}, at T {x['mixed_kl_T']:.6f}"
            for x in short
        )
        parts.append(f"One epoch beside the live teacher, T = {short[0]['T']:g}, seed 0: {found}.")
    return "\n\n".join(parts)


def page(whole: str) -> str:
    """The page with its part made anew."""
    before, rest = whole.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text(saved())}\n\n{END}{rest.split(END)[1]}"


def write() -> None:
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    write()
