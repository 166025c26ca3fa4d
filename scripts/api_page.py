"""docs/api.md from the docstrings of the public names: `python -m scripts.api_page` writes it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import kdcache

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
GROUPS = {
    "Images and views": (
        "convert",
        "ConvertReport",
        "open_source",
        "open_dataset",
        "Dataset",
        "ViewSpec",
        "Loader",
        "Batch",
    ),
    "Teachers and the cache": (
        "load_teacher",
        "make_cache_spec",
        "precompute",
        "CacheSpec",
        "TopK",
        "Dense",
        "Sampled",
        "Transformed",
        "LogitCache",
        "CachedLoader",
    ),
    "Targets and losses": ("Target", "TemperedTarget", "distillation_loss", "DistillationLoss"),
    "Training and evaluation": (
        "load_student",
        "TrainSpec",
        "TrainingRun",
        "RunOptions",
        "train",
        "evaluate",
    ),
}
INTRO = """# The library in Python

Generated from the docstrings by `python -m scripts.api_page`. Suffixes of tensor names are their
shapes: B rows of a batch, C classes, K classes that a record names, H and W height and width in
pixels. Every error is a `kdcache.errors.KDCacheError`. [extending.md](extending.md) adds sources,
transforms, record codecs, losses and settings.
"""
# "name   what it is", as docstrings list parameters and fields.
_ENTRY = re.compile(r"(\w+(?:, \w+)*)  +(\S.*)")


def page() -> str:
    parts = [INTRO]
    for group, names in GROUPS.items():
        parts.append(f"## {group}\n")
        parts += [_entry(f"kdcache.{name}", getattr(kdcache, name), 3) for name in names]
    return "\n".join(parts).rstrip() + "\n"


def _entry(title: str, item: Any, level: int) -> str:
    kind = "class " if inspect.isclass(item) else ""
    parts = [f"{'#' * level} {title}\n", f"```text\n{kind}{signature(item)}\n```\n", markdown(item)]
    for name, member in vars(item).items() if inspect.isclass(item) else ():
        if not name.startswith("_") and _documented(member):
            shown = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            shown = shown.fget if isinstance(shown, property) else shown
            text = f"`{signature(shown)}`" if not isinstance(member, property) else f"`{name}`"
            parts.append(f"**{text}** {markdown(shown)}")
    return "\n".join(parts)


def _documented(member: Any) -> bool:
    functions = staticmethod | classmethod | property
    return (inspect.isfunction(member) or isinstance(member, functions)) and bool(member.__doc__)


def signature(item: Any) -> str:
    """One parameter a line where it is long."""
    found = inspect.signature(item)
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    text = str(found.replace(parameters=parameters)).replace("kdcache.", "")
    text = re.sub(r"<function .*? at 0x\w+>|<.*? object at 0x\w+>", "...", text)
    text = f"{item.__name__}{text}".replace("'", "")
    if len(text) <= 100:
        return text
    inner, _, result = text.partition("(")[2].rpartition(")")
    lines = re.split(r", (?=\w+: |\*, |\*\w)", inner)
    return f"{item.__name__}(\n" + "".join(f"    {line},\n" for line in lines) + f"){result}"


def markdown(item: Any) -> str:
    """A docstring with its lists of parameters as lists, and its code as code."""
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(item.__doc__ or "")):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            blocks.append("```text\n" + inspect.cleandoc("\n" + block) + "\n```")
        elif _ENTRY.fullmatch(lines[0]):
            blocks.append(_list(lines))
        else:
            blocks.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(blocks) + "\n"


def _list(lines: list[str]) -> str:
    out: list[str] = []
    for line in lines:
        entry = _ENTRY.fullmatch(line)
        if entry:
            out.append(f"* `{entry[1]}`: {entry[2]}")
        else:
            out[-1] += " " + line.strip()
    return "\n".join(out)


if __name__ == "__main__":
    PAGE.write_text(page())
