"""Writes a config as YAML, and the schema as help text and documentation."""

from __future__ import annotations

from dataclasses import is_dataclass
from textwrap import fill
from typing import Any

from frozen_fast.config import yaml_text
from frozen_fast.config.fields import KeyInfo, keys_of, mapping_value_type, to_plain, walk_keys
from frozen_fast.config.renamed import EXPERIMENT
from frozen_fast.config.schema import ExperimentConfig


def dump_yaml(config: ExperimentConfig, *, meanings: bool = False) -> str:
    """Return the resolved config as YAML; load_config reads it back unchanged.

    Args:
        config: the config; every key is written, including defaults.
        meanings: write each key's meaning above it as a comment.
    """
    if not meanings:
        return yaml_text.dump(to_plain(config))
    return "\n".join(_section_lines(config, "")) + "\n"


def help_text() -> str:
    """Return every key of a config file with path, type, default and meaning, as plain text."""
    lines = []
    for path, info in walk_keys(ExperimentConfig):
        if info.is_section:
            lines += ["", f"{path}: {info.meaning}"]
            continue
        lines.append(f"  {path} = {_default_in_words(info)}")
        lines.append(fill(f"{info.meaning} [{info.allowed}]", 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines) + "\n"


def docs_markdown() -> str:
    """Return the page docs/config.md: one table per group of keys."""
    parts = [
        "# Config keys",
        "Written by `python -m frozen_fast config-docs` from frozen_fast/config/schema.py; do not edit by hand.",
        "A config file is YAML. `extends: other.yaml` (or a list; later ones win; relative to the file) starts from\n"
        "other files: mappings merge key by key, lists and scalars are replaced. On the command line `key.path=value`\n"
        "sets one value, `data.sources[0].path=x` reaches into lists, and an index one past the end appends. Numbers\n"
        "and booleans follow YAML 1.2: `1e-5` is a number, `on` is text. Unknown keys, duplicate keys and wrong types\n"
        "are errors that name the key, the value, what is allowed and the line. Paths are relative to the working\n"
        "directory.",
    ]
    for path, cls in _groups(ExperimentConfig, ""):
        title = f"`{path}`" if path else "Top level"
        doc = (cls.__doc__ or "").strip().splitlines()[0]
        rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
        for info in keys_of(cls):
            if not info.is_section:
                cells = (f"`{info.name}`", info.allowed, f"`{_default_in_words(info)}`", info.meaning)
                rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts += [f"## {title}", doc, "\n".join(rows)]
    rows = ["| former name | now |", "|---|---|"]
    for old, new in EXPERIMENT.items():
        rows += [f"| `{old}` | `{new}` |"] if isinstance(new, str) else [f"| `{old}` | {new.__doc__} |"]
    parts += [
        "## Former names",
        "Read with a warning; a config must not contain a key under both names.",
        "\n".join(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _groups(cls: type, path: str) -> list[tuple[str, type]]:
    found = [(path, cls)]
    for info in keys_of(cls):
        here = f"{path}.{info.name}" if path else info.name
        if info.is_section:
            found += _groups(info.type, here)
        elif info.item_class is not None:
            found += _groups(info.item_class, f"{here}[i]")
    return found


def _default_in_words(info: KeyInfo) -> str:
    if mapping_value_type(info.type) is not None:
        return yaml_text.dump_inline(dict(info.default))
    return yaml_text.dump_inline(_only_changed(info.default))


def _only_changed(value: Any) -> Any:
    """Plain form of a default; of a group of keys only what differs from the group's own defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        infos = keys_of(type(value))
        return {
            info.name: to_plain(getattr(value, info.name))
            for info in infos
            if getattr(value, info.name) != info.default
        }
    if isinstance(value, tuple):
        return [_only_changed(item) for item in value]
    return value


def _section_lines(section: Any, indent: str) -> list[str]:
    lines = []
    for info in keys_of(type(section)):
        value = getattr(section, info.name)
        lines += [fill(info.meaning, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")]
        if info.is_section:
            lines += [f"{indent}{info.name}:", *_section_lines(value, indent + "  ")]
        elif info.item_class is not None and value:
            lines.append(f"{indent}{info.name}:")
            for item in value:
                lines += _item_lines(item, indent + "  ")
        elif mapping_value_type(info.type) is not None:
            lines.append(f"{indent}{info.name}: {yaml_text.dump_inline(dict(value))}")
        else:
            lines.append(f"{indent}{info.name}: {yaml_text.dump_inline(to_plain(value))}")
    return lines


def _item_lines(item: Any, indent: str) -> list[str]:
    """A list's item with its dash on the first key; meanings are left to the first line's comments."""
    text = yaml_text.dump([to_plain(item)]).rstrip("\n")
    return [indent + line for line in text.splitlines()]
