"""Reads the released checkpoints of Collaborative Experts (trained_model.pth).

A file contains {"arch", "epoch", "state_dict", "monitor_best", "config", "optimizer"}; "config" is a pickled
ConfigParser, of which only plain data is read. Names and shapes of the weights determine the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from frozen_fast.errors import UserError, some
from frozen_fast.models.experts.expert_set import Expert, ExpertSizes, Gating, Mixture
from frozen_fast.models.released.torch_pickle import Inert, LazyTensor, load_torch_pickle, read_tensors

PARALLEL_PREFIX = "module."
UNUSED = ("ce.moe_fc_bottleneck1.", "ce.moe_cg.", "ce.moe_fc_proj.")
"""Unused layers of earlier versions."""
UNUSED_COUNTER = ".num_batches_tracked"

NORM = ("weight", "bias", "running_mean", "running_var")
LINEAR = ("weight", "bias")

DesignName = Literal["collaborative", "moee", "concatenated"]


@dataclass(frozen=True)
class Design:
    """The model of a released file, by names and shapes; width: that of a collaborative model's experts."""

    name: DesignName
    gating: Gating
    mixture: Mixture
    width: int
    sizes: ExpertSizes


def read_upstream(path: Path, experts: Sequence[str] | None) -> tuple[Design, dict[str, Tensor]]:
    """Read a released checkpoint.

    Args:
        path: trained_model.pth, in either of torch's layouts.
        experts: names in the model's order; None: the file's config says them.

    Returns:
        (the model's description, its weights under our names).

    Raises:
        UserError: the file is damaged or contains another model, or the names do not fit its shapes.
    """
    content = load_torch_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint: got {path}, which contains no state_dict")
    lazy = {
        name.removeprefix(PARALLEL_PREFIX): value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, LazyTensor)
    }
    wanted = [name for name in lazy if not name.startswith(UNUSED) and not name.endswith(UNUSED_COUNTER)]
    for needed in ("text_pooling.clusters2", "ce.moe_fc.weight"):
        if needed not in wanted:
            raise UserError(f"checkpoint: got {path}, whose state_dict lacks {needed}; allowed: Collaborative Experts")
    config = _plain_config(content.get("config"))
    weights = {name: tensor.float() for name, tensor in read_tensors(path, lazy, wanted).items()}
    try:
        design = _design(weights, _names(config, experts, len(weights["ce.moe_fc.weight"])), config)
        ours = _Renaming(weights).ours(design)
    except KeyError as error:
        raise UserError(f"checkpoint: got {path}, whose state_dict lacks {error.args[0]}") from error
    except RuntimeError as error:
        raise UserError(f"checkpoint: got {path}, whose experts differ in shape ({error})") from error
    if weights:
        raise UserError(f"checkpoint: got {path}, which has unknown {some(sorted(weights))}")
    return design, ours


def _plain_config(config: Any) -> Mapping[str, Any]:
    """Return the experiment's config inside the pickled ConfigParser; empty if there is none."""
    state = config.state if isinstance(config, Inert) else config
    if isinstance(state, Mapping):
        inner = state.get("_config", state.get("config", state))
        if isinstance(inner, Mapping):
            return inner
    return {}


def _names(config: Mapping[str, Any], experts: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return the experts' names in the model's order: as given, or those of the config in alphabetical order."""
    if experts is None:
        section = config.get("experts")
        modalities = section.get("modalities") if isinstance(section, Mapping) else None
        if not isinstance(modalities, list) or not all(isinstance(name, str) for name in modalities):
            raise UserError(f"experts: got none, nor does the checkpoint contain them; allowed: {count} names in order")
        dropped = str(section.get("drop_feats", "")).split(",") if isinstance(section, Mapping) else []
        experts = sorted(set(modalities) - set(dropped))
    if len(experts) != count or len(set(experts)) != count:
        raise UserError(f"experts: got {len(experts)} names; allowed: {count}, as many as the checkpoint has")
    return tuple(experts)


def _design(weights: Mapping[str, Tensor], names: tuple[str, ...], config: Mapping[str, Any]) -> Design:
    """Determine the model's variant and sizes."""
    name: DesignName
    gating: Gating
    inputs: str | None
    if "ce.g_reason_1.weight" in weights:
        name, gating, inputs = "collaborative", "in_order", "ce.video_dim_reduce.{}.fc.weight"
    elif "ce.video_dim_reduce.0.fc.weight" in weights:
        name, gating, inputs = "collaborative", "none", "ce.video_dim_reduce.{}.fc.weight"
    elif "ce.video_GU.0.fc.weight" in weights:
        name, gating, inputs = "moee", "none", "ce.video_GU.{}.fc.weight"
    else:
        name, gating, inputs = "concatenated", "none", None
    experts = []
    for index, expert in enumerate(names):
        width = 0 if inputs is None else weights[inputs.format(index)].shape[1]
        clusters = weights.get(f"pooling.{expert}.clusters2")
        if clusters is not None:
            if width not in (0, clusters.shape[1] * clusters.shape[2]):
                got = f"{expert} as number {index + 1}, whose layer reads {width} values"
                raise UserError(f"experts: got {got}; allowed: the model's order, alphabetical in released files")
            experts.append(Expert(name=expert, width=clusters.shape[1], clusters=clusters.shape[2]))
        else:
            experts.append(Expert(name=expert, width=width))
    arch = config.get("arch")
    arguments = arch.get("args") if isinstance(arch, Mapping) else None
    frozen = isinstance(arguments, Mapping) and bool(arguments.get("freeze_weights"))
    _, text_width, text_clusters = weights["text_pooling.clusters2"].shape
    sizes = ExpertSizes(
        experts=tuple(experts),
        text_width=text_width,
        text_clusters=text_clusters,
        ghost_clusters=weights["text_pooling.clusters"].shape[1] - text_clusters,
    )
    width = len(weights["ce.text_GU.0.fc.weight"]) if name == "collaborative" else 0
    return Design(name, gating, "uniform" if frozen else "learned", width, sizes)


class _Renaming:
    """Converts weights from the released names to ours; the experts' equal layers are stacked to one tensor."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights
        self._ours: dict[str, Tensor] = {}

    def ours(self, design: Design) -> dict[str, Tensor]:
        """Convert all weights of the model."""
        names, experts = design.sizes.names, design.sizes.experts
        vlad = ("clusters", "clusters2", *(f"batch_norm.{part}" for part in NORM))
        for expert in experts:
            if expert.clusters:
                self._move(f"pooling.{expert.name}", f"pooling.{key_of(expert.name)}", vlad)
        self._move("text_pooling", "text_pooling", vlad)
        self._move("ce.moe_fc", "mixture", LINEAR)
        if design.name == "concatenated":
            return self._ours
        equal = design.name == "collaborative"
        inputs = "ce.video_dim_reduce.{}.fc" if equal else "ce.video_GU.{}.fc"
        for index in range(len(names)):
            self._move(inputs.format(index), f"video_linear.{index}", LINEAR)
        self._join("ce.text_GU.{}.fc", "text_linear", LINEAR, len(names))
        self._blocks("ce.text_GU.{}.cg.fc", "text_gate.linear", len(names), equal)
        self._join("ce.text_GU.{}.cg.batch_norm", "text_gate.norm", NORM, len(names))
        self._blocks("ce.video_GU.{}.cg.fc", "video_gate.linear", len(names), equal)
        if design.gating == "none":
            self._join("ce.video_GU.{}.cg.batch_norm", "video_gate.norm", NORM, len(names))
            return self._ours
        self._join("ce.video_GU.{}.cg.batch_norm", "video_gate.pair_gate_norm", NORM, len(names))
        self._join("ce.video_GU.{}.cg.batch_norm2", "video_gate.own_gate_norm", NORM, len(names))
        self._move("ce.g_reason_1", "video_gate.pair_linear", LINEAR)
        for index, (norm, linear) in enumerate(((0, 2), (3, 5))):
            self._move(f"ce.g_reason_shared.{norm}", f"video_gate.pair_norms.{index}", NORM)
            self._move(f"ce.g_reason_shared.{linear}", f"video_gate.shared_linear.{index}", LINEAR)
        return self._ours

    def _move(self, theirs: str, ours: str, parts: Sequence[str]) -> None:
        for part in parts:
            self._ours[f"{ours}.{part}"] = self._weights.pop(f"{theirs}.{part}")

    def _join(self, theirs: str, ours: str, parts: Sequence[str], count: int) -> None:
        """Concatenate the tensors of all experts."""
        for part in parts:
            tensors = [self._weights.pop(f"{theirs.format(index)}.{part}") for index in range(count)]
            self._ours[f"{ours}.{part}"] = torch.cat(tensors)

    def _blocks(self, theirs: str, ours: str, count: int, equal: bool) -> None:
        """Return a BlockLinear's weights, stacked if all widths are equal by design."""
        weights = [self._weights.pop(f"{theirs.format(index)}.weight") for index in range(count)]
        if equal or len({len(weight) for weight in weights}) == 1:
            self._ours[f"{ours}.weight"] = torch.stack(weights)
        else:
            self._ours.update({f"{ours}.weights.{index}": weight for index, weight in enumerate(weights)})
        self._join(theirs, ours, ("bias",), count)


def key_of(expert: str) -> str:
    """Return an expert's name as a module name, which must not contain a dot."""
    return expert.replace(".", "/")
