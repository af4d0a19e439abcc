"""Loads YAML files and command-line overrides into a validated ExperimentConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from frozen_fast.config import renamed, yaml_text
from frozen_fast.config.convert import build
from frozen_fast.config.fields import to_plain
from frozen_fast.config.model_defaults import with_model_defaults
from frozen_fast.config.overrides import apply_overrides, copy_tree, merge
from frozen_fast.config.schema import DataConfig, EvaluationConfig, ExperimentConfig, SourceConfig
from frozen_fast.config.yaml_text import Origins
from frozen_fast.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Load a config file and the files that it extends, apply overrides and validate the result.

    A file may say `extends: other.yaml` (or a list, later ones win), relative to itself. Mappings
    are merged key by key; lists and scalars are replaced. Other paths in a config (data, weights,
    run_folder) are relative to the working directory.

    Args:
        path: the YAML file.
        overrides: texts `key.path=value`, applied in order; `data.sources[0].path=x` reaches list items.

    Returns:
        The config, every source named.

    Raises:
        UserError: for each mistake, with the key's path, the value, what is allowed and the line.
    """
    tree, origins = _read_with_bases(Path(path), ())
    return config_from_mapping(tree, overrides, origins=origins)


def config_from_mapping(
    tree: dict[str, Any], overrides: Sequence[str] = (), *, origins: Origins | None = None
) -> ExperimentConfig:
    """Type and check a mapping of plain values as `load_config` does a file."""
    origins, tree = dict(origins or {}), copy_tree(tree)
    renamed.rename_keys(tree, renamed.EXPERIMENT, origins)
    if overrides:
        tree = merge(to_plain(ExperimentConfig()), tree)
        apply_overrides(tree, overrides, origins, ExperimentConfig, renamed.EXPERIMENT)
    config = name_sources(build(ExperimentConfig, tree, origins=origins))
    return replace(config, model=with_model_defaults(config.model))


def name_sources(config: ExperimentConfig) -> ExperimentConfig:
    """Give every source without a name its format's."""

    def named(holder: DataConfig | EvaluationConfig) -> tuple[SourceConfig, ...]:
        return tuple(source if source.name else replace(source, name=source.format) for source in holder.sources)

    return replace(
        config,
        data=replace(config.data, sources=named(config.data)),
        evaluation=replace(config.evaluation, sources=named(config.evaluation)),
    )


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """The merged tree of a file and of all that it extends."""
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(entry.name for entry in (*above[above.index(resolved) :], resolved))
        raise UserError(f"extends: got a cycle, {chain}; allowed: files that do not extend themselves")
    tree, origins = yaml_text.read(path)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: got a {type(tree).__name__} at the top; allowed: a mapping of keys")
    tree = copy_tree(tree)
    renamed.rename_keys(tree, renamed.EXPERIMENT, origins)
    bases = tree.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"extends: got {bases!r}; allowed: a path or a list of paths ({path})")
    merged: dict[str, Any] = {}
    merged_origins: Origins = {}
    for base in bases:
        base_tree, base_origins = _read_with_bases(path.parent / base, (*above, resolved))
        merged = merge(merged, base_tree)
        merged_origins.update(base_origins)
    return merge(merged, tree), {**merged_origins, **origins}
