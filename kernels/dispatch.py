"""The kernel, block and warps of each shape: data, each entry with its reason.

`reach` is the columns that a row may touch: C, or C + VEC - 1 where rows begin between lines
(layout.py). Reasons that hold throughout: 16 to 32 elements a thread give 128-bit accesses and at
most 64 registers; a block's work beyond the row is wasted; few warps a row save the exchange
between warps. The numbers behind them come from the machine code (tests/test_kernels_static.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_NAMED = 1024  # classes that a program holds in registers; with more, the reference computes
MANY_NAMED = 128  # above, a program has up to four times the warps, for more registers


@dataclass(frozen=True)
class Entry:
    """up_to: the largest reach it serves. rows: of a program. block: columns of a tile.

    kept: the most named classes it serves.
    """

    up_to: int
    kernel: str
    block: int
    rows: int
    warps: int
    why: str
    kept: int = MOST_NAMED


ANY = 1 << 30

SPARSE_FORWARD = (
    Entry(32, "row", 32, 16, 4, "many rows a program; 32 give sm_90 a stack"),
    Entry(128, "row", 128, 8, 4, "with more named classes, 8 rows spill", 16),
    Entry(128, "row", 128, 4, 4, "half the rows, for the registers of their named classes"),
    Entry(256, "row", 256, 8, 4, "16 elements a thread", 16),
    Entry(256, "row", 256, 4, 4, "half the rows, for the registers of their named classes"),
    Entry(512, "row", 512, 1, 1, "one warp a row: no shared memory, no barrier"),
    Entry(1024, "row", 1024, 1, 1, "one warp a row: half the instructions of four warps"),
    Entry(2048, "row", 2048, 1, 2, "32 elements a thread"),
    Entry(4096, "row", 4096, 1, 4, "32 elements a thread"),
    Entry(8192, "row", 8192, 1, 8, "32 elements a thread"),
    Entry(ANY, "loop", 4096, 1, 8, "a longer row in registers leaves room for one program per SM"),
)
DENSE_FORWARD = (
    Entry(32, "row", 32, 64, 4, "many rows a program"),
    Entry(128, "row", 128, 16, 4, "many rows a program"),
    Entry(256, "row", 256, 8, 4, "many rows a program"),
    Entry(512, "row", 512, 1, 1, "one warp a row"),
    Entry(1024, "row", 1024, 1, 2, "two rows in registers: 16 elements of each a thread"),
    Entry(2048, "row", 2048, 1, 4, "16 elements of each a thread"),
    Entry(4096, "row", 4096, 1, 8, "16 elements of each a thread"),
    Entry(8192, "row", 8192, 1, 16, "16 elements of each a thread"),
    Entry(ANY, "loop", 4096, 1, 8, "a longer row in registers leaves room for one program per SM"),
)
BACKWARD = (
    Entry(32, "grad", 32, 64, 4, "many rows a program"),
    Entry(128, "grad", 128, 16, 4, "many rows a program"),
    Entry(256, "grad", 256, 8, 4, "many rows a program"),
    Entry(512, "grad", 512, 1, 1, "one warp a row"),
    Entry(1024, "grad", 1024, 1, 1, "one warp a row, as forward"),
    Entry(ANY, "grad", 2048, 1, 4, "tiles are independent: enough of them for any device"),
)
TABLES = {"sparse": SPARSE_FORWARD, "dense": DENSE_FORWARD, "backward": BACKWARD}


def serves(kept: int | None) -> bool:
    return kept is None or kept <= MOST_NAMED


def entry(table: str, reach: int, kept: int = 0) -> Entry:
    found = next(e for e in TABLES[table] if reach <= e.up_to and kept <= e.kept)
    if kept <= MANY_NAMED:
        return found
    # Eight elements a thread are 128 bits in 16-bit types.
    most = min(16, max(4, found.rows * found.block // (8 * 32)))
    return replace(found, warps=min(4 * found.warps, most))
