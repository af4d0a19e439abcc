"""Collaborative Experts, its ablations and Mixture of Embedding Experts: models of caption tokens and expert features.

Sources: Liu et al. 2019, "Use What You Have"; Miech et al. 2018, "Learning a Text-Video Embedding from Incomplete and
Heterogeneous Data".

Axis letters: Q captions, L tokens, V videos, N vectors of one video's expert, M experts, D width of an expert's space,
W = sum of the widths of all experts' spaces.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.config.schema import ModelConfig
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.experts.expert_set import (
    GATINGS,
    MIXTURES,
    Expert,
    ExpertSizes,
    Gating,
    Mixture,
    in_alphabetical_order,
)
from frozen_fast.models.experts.gated_units import CollaborativeGate, ContextGate
from frozen_fast.models.experts.net_vlad import NetVLAD
from frozen_fast.models.experts.upstream_checkpoint import Design, key_of, read_upstream
from frozen_fast.models.model_folder import read_model_folder, write_model_folder
from frozen_fast.models.pretrained import checkpoint_of_run, load_weights
from frozen_fast.models.retrieval_model import Features, RetrievalModel, TextInput, VideoInput

TOKENS = "tokens"


class ExpertModel(RetrievalModel):
    """Base class of the expert models: aggregation, availability and the similarity.

    S_ij = sum_m w_im A_jm <text_im, video_jm> / sum_m w_im A_jm, where w are the caption's mixture weights and A_jm is
    1 if video j has expert m, otherwise 0. A video without experts has similarity 0.

    Attributes:
        sizes: experts, widths and clusters.
        space_widths: width of each expert's space.
        variant_keys: keyword arguments of the constructor other than `sizes`, which are also keys under model.experts.
    """

    learned_frames = 1
    tokenizer = None
    space_widths: tuple[int, ...]
    variant_keys: tuple[str, ...]

    def __init__(self, sizes: ExpertSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.pooling = nn.ModuleDict(
            {
                key_of(expert.name): NetVLAD(expert.width, expert.clusters, mask_padding=sizes.mask_padding)
                for expert in sizes.experts
                if expert.clusters
            }
        )
        self.text_pooling = NetVLAD(
            sizes.text_width, sizes.text_clusters, sizes.ghost_clusters, mask_padding=sizes.mask_padding
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.text_pooling.clusters.device

    def text_features(self, text: TextInput) -> Features:
        """Encode captions.

        Args:
            text: {"tokens": [Q, L, text width]}, padded with zeros.

        Returns:
            "experts" [Q, W] and "weights" [Q, M], the mixture weights (a concatenation has M = 1).

        Raises:
            ValueError: another shape, or strings; a separate language model computes token features.
        """
        tokens = text.get(TOKENS) if isinstance(text, Mapping) else None
        width = self.sizes.text_width
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.shape[2] != width or 0 in tokens.shape:
            got = list(tokens.shape) if isinstance(tokens, Tensor) else type(text).__name__
            raise ValueError(f"text: got {got}; allowed: {{'tokens': [Q, L, {width}]}}, token features padded by zeros")
        return self._text_spaces(self.text_pooling(tokens.to(self.device, self.text_pooling.clusters.dtype)))

    def video_features(self, video: VideoInput) -> Features:
        """Encode videos.

        Args:
            video: expert name -> [V, width], or [V, N, width] padded with zeros for an expert with clusters; NaN if a
                video lacks the expert. Experts that the model does not read are ignored.

        Returns:
            "experts" [V, W] and "available" [V, M], 1 or 0 (a concatenation has M = 1).

        Raises:
            ValueError: an expert is absent or of another shape.
        """
        if not isinstance(video, Mapping):
            raise ValueError(f"video: got {type(video).__name__}; allowed: a dict of expert features")
        pooled: list[Tensor] = []
        available: list[Tensor] = []
        for expert in self.sizes.experts:
            x = video.get(expert.name)
            if not isinstance(x, Tensor):
                raise ValueError(f"video: got no expert {expert.name!r}; allowed: {', '.join(self.sizes.names)}")
            if x.dim() != (3 if expert.clusters else 2) or x.shape[-1] != (expert.width or x.shape[-1]) or 0 in x.shape:
                shape = f"[V, N, {expert.width}]" if expert.clusters else f"[V, {expert.width}]"
                raise ValueError(f"video: got {expert.name} of shape {list(x.shape)}; allowed: {shape}")
            if pooled and len(x) != len(pooled[0]):
                raise ValueError(f"video: got {len(x)} videos of {expert.name}; allowed: {len(pooled[0])}, as the rest")
            x = x.to(self.device, self.text_pooling.clusters.dtype)
            present_V = ~x.flatten(1).isnan().any(dim=1)
            x = x.masked_fill(~present_V.view(-1, *[1] * (x.dim() - 1)), 0.0)
            pooled.append(self.pooling[key_of(expert.name)](x) if expert.clusters else x)
            available.append(present_V)
        return self._video_spaces(pooled, torch.stack(available, dim=1).to(pooled[0].dtype))

    @abstractmethod
    def _text_spaces(self, pooled_QT: Tensor) -> Features:
        """Compute text_features from aggregated captions [Q, text width x text clusters]."""

    @abstractmethod
    def _video_spaces(self, pooled: list[Tensor], available_VM: Tensor) -> Features:
        """Compute video_features from aggregated experts, [V, pooled width] each; missing experts are zeros."""

    def pair_similarities(self, text: Features, video: Features) -> Tensor:
        """Compare captions and videos by the mixture of available experts.

        Args:
            text: "experts" [Q, W], "weights" [Q, M].
            video: "experts" [V, W], "available" [V, M].

        Returns:
            sim_KQV with K = 1, fp32.
        """
        weights_QM, available_VM = text["weights"].float(), video["available"].float()
        if len(self.space_widths) == 1:
            return (text["experts"].float() * weights_QM @ (video["experts"].float() * available_VM).T)[None]
        widths = torch.tensor(self.space_widths, device=weights_QM.device)
        weighted_QW = text["experts"].float() * weights_QM.repeat_interleave(widths, dim=1)
        present_VW = video["experts"].float() * available_VM.repeat_interleave(widths, dim=1)
        total_QV = weights_QM @ available_VM.T
        return (weighted_QW @ present_VW.T / total_QV.masked_fill(total_QV == 0, 1.0))[None]

    @classmethod
    def from_config(cls, config: ModelConfig) -> ExpertModel:
        """Build the model of model.experts with random weights, or load model.checkpoint.

        Raises:
            UserError: there are no experts, or a key under model.experts is wrong.
        """
        section = config.experts
        if config.checkpoint is not None:
            path = Path(config.checkpoint).expanduser()
            names = sorted(expert.name for expert in section.experts)
            return cls.from_pretrained(path, experts=names if names and path.is_file() else None).train()
        experts = [Expert(name=one.name, width=one.width, clusters=one.clusters) for one in section.experts]
        sizes = ExpertSizes(
            experts=in_alphabetical_order(experts),
            text_width=section.text_width,
            text_clusters=section.text_clusters,
            ghost_clusters=section.ghost_clusters,
            mask_padding=section.mask_padding,
        )
        return cls(sizes, **{name: getattr(section, name) for name in cls.variant_keys})

    @abstractmethod
    def variant(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments other than `sizes`, as data that JSON can represent."""

    def architecture(self) -> dict[str, Any]:
        """Return the content of config.json without the kind."""
        return {"sizes": self.sizes.to_json(), "variant": self.variant()}

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write model.safetensors and config.json; `state` replaces the model's own weights."""
        weights = self.state_dict() if state is None else state
        write_model_folder(Path(folder), self.kind, weights, self.architecture(), None)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        experts: Sequence[str] | None = None,
        mask_padding: bool | None = None,
        **variant: Any,
    ) -> ExpertModel:
        """Load a checkpoint; the model is in eval mode.

        Args:
            path: a folder of save_pretrained or training, or a released trained_model.pth.
            experts: the experts' names in the model's order, for a released file that does not contain them.
            mask_padding: True excludes padding from NetVLAD; None: the checkpoint's value.
            variant: keyword arguments of the constructor that the file does not contain: compatible, mixture, gating.
                Those that the checkpoint's variant lacks must have their default values.

        Returns:
            The checkpoint's model: an instance of this class, or of an ablation if called on CollaborativeExperts.

        Raises:
            UserError: the checkpoint is missing, damaged or unsupported, or does not support an option.
        """
        path = checkpoint_of_run(Path(path).expanduser())
        if path.is_dir():
            if experts is not None:
                raise UserError("experts: got names for a frozen_fast folder; allowed: none, the folder contains them")
            kinds = {model.kind: model for model in EXPERT_MODELS}
            state, config = read_model_folder(path, kinds, needs=("sizes", "variant"))
            sizes, keywords = ExpertSizes.from_json(config["sizes"]), dict(config["variant"])
            found = kinds[config["kind"]]
        else:
            design, state = read_upstream(path, experts)
            sizes = design.sizes
            found, keywords = _of_design(design)
        if not (issubclass(found, cls) or cls is CollaborativeExperts):
            raise UserError(f"kind: got {cls.kind!r} for {path}, which contains a {found.kind}; allowed: {found.kind}")
        keywords.update(_known(variant, keywords, found))
        if found is CollaborativeExperts and keywords["mixture"] == "uniform":
            state = {name: value for name, value in state.items() if not name.startswith("mixture.")}
        if mask_padding is not None:
            sizes = ExpertSizes.from_json({**sizes.to_json(), "mask_padding": mask_padding})
        with torch.device("meta"):  # skips random initialisation
            model = found(sizes, **keywords)
        model = model.to_empty(device="cpu")
        load_weights(model, state, path)
        return model.eval()


class _SpacedModel(ExpertModel):
    """An expert model with an embedding space per expert: gated units of the text, and mixture weights."""

    def __init__(self, sizes: ExpertSizes, widths: Sequence[int], mixture: Mixture, *, mixture_layer: bool) -> None:
        super().__init__(sizes)
        if mixture not in MIXTURES:
            raise unknown_name("model.experts.mixture", mixture, MIXTURES)
        self.mixture_kind, self.space_widths = mixture, tuple(widths)
        inputs = [expert.pooled_width for expert in sizes.experts]
        self.video_linear = nn.ModuleList(
            nn.Linear(pooled, width) for pooled, width in zip(inputs, widths, strict=True)
        )
        self.text_linear = nn.Linear(sizes.pooled_text_width, sum(widths))
        self.text_gate = ContextGate(widths)
        self.mixture = nn.Linear(sizes.pooled_text_width, len(widths)) if mixture_layer else None

    def _text_spaces(self, pooled_QT: Tensor) -> Features:
        """Compute the gated units of all experts in one product, and the mixture weights."""
        experts_QW = self.text_gate(self.text_linear(pooled_QT))
        if self.mixture_kind == "learned":
            assert self.mixture is not None
            return {"experts": experts_QW, "weights": self.mixture(pooled_QT).softmax(dim=1)}
        weights_QM = pooled_QT.new_full((len(pooled_QT), len(self.space_widths)), 1 / len(self.space_widths))
        return {"experts": _with_unused(self.mixture, experts_QW), "weights": weights_QM}

    def _projected(self, pooled: list[Tensor]) -> Tensor:
        """Apply every expert's linear layer, and concatenate the outputs: [V, W]."""
        return torch.cat([linear(x) for linear, x in zip(self.video_linear, pooled, strict=True)], dim=1)


class CollaborativeExperts(_SpacedModel):
    """Collaborative Experts: all experts have the same width, and each is gated by its pairs with the others."""

    kind = "collaborative_experts"
    variant_keys = ("width", "gating", "mixture")

    def __init__(
        self, sizes: ExpertSizes, *, width: int = 768, gating: Gating = "in_order", mixture: Mixture = "learned"
    ) -> None:
        """Build it with random weights.

        Args:
            sizes: experts, widths and clusters.
            width: D, the width of each expert's embedding.
            gating: "in_order" as released (later experts use gated earlier ones), "parallel", or "none": context gating
                of each expert by itself (the ablation CE - CG).
            mixture: "learned" from the caption, or "uniform" (CE - MW) without a mixture layer.
        """
        super().__init__(sizes, [width] * len(sizes.experts), mixture, mixture_layer=mixture == "learned")
        if gating not in GATINGS:
            raise unknown_name("model.experts.gating", gating, GATINGS)
        self.width, self.gating = width, gating
        count = len(sizes.experts)
        self.video_gate: CollaborativeGate | ContextGate
        if gating == "none":
            self.video_gate = ContextGate([width] * count)
        else:
            self.video_gate = CollaborativeGate(count, width, in_order=gating == "in_order")

    def _video_spaces(self, pooled: list[Tensor], available_VM: Tensor) -> Features:
        """Project, normalise and gate."""
        x_VMD = F.normalize(self._projected(pooled).view(len(available_VM), -1, self.width), dim=2)
        if isinstance(self.video_gate, CollaborativeGate):
            experts_VW = self.video_gate(x_VMD, available_VM).flatten(1)
        else:
            experts_VW = self.video_gate(x_VMD.flatten(1))
        return {"experts": experts_VW, "available": available_VM}

    def variant(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return {"width": self.width, "gating": self.gating, "mixture": self.mixture_kind}


class MixtureOfExperts(_SpacedModel):
    """MoEE: each expert has the width of its features and is gated by itself (the ablation CE - P,CG)."""

    kind = "moee"
    variant_keys = ("mixture",)

    def __init__(self, sizes: ExpertSizes, *, mixture: Mixture = "learned") -> None:
        """Build it with random weights.

        Args:
            sizes: experts, widths and clusters.
            mixture: "learned", or "uniform" (CE - MW,P,CG), with an unused mixture layer as released.
        """
        widths = [expert.width for expert in sizes.experts]
        super().__init__(sizes, widths, mixture, mixture_layer=True)
        self.video_gate = ContextGate(widths)

    def _video_spaces(self, pooled: list[Tensor], available_VM: Tensor) -> Features:
        """Compute the gated units of each expert."""
        return {"experts": self.video_gate(self._projected(pooled)), "available": available_VM}

    def variant(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return {"mixture": self.mixture_kind}


class ConcatenatedExperts(ExpertModel):
    """The ablation Concat: dot product of the aggregated caption and the concatenated experts.

    The shorter vector is padded with zeros. The model has no gates, no availability, and an unused mixture layer, as
    released. If the text is longer, the released code pads the video with an empty vector, so that every similarity is
    0.
    """

    kind = "concatenated_experts"
    variant_keys = ("compatible",)
    space_widths = (0,)

    def __init__(self, sizes: ExpertSizes, *, compatible: bool = False) -> None:
        """Build it with random weights.

        Args:
            sizes: experts, widths and clusters.
            compatible: reproduce this defect of the released code.
        """
        super().__init__(sizes)
        self.compatible = compatible
        self.mixture = nn.Linear(sizes.pooled_text_width, len(sizes.experts))

    def _text_spaces(self, pooled_QT: Tensor) -> Features:
        """Return the aggregated caption."""
        return {"experts": _with_unused(self.mixture, pooled_QT), "weights": pooled_QT.new_ones(len(pooled_QT), 1)}

    def _video_spaces(self, pooled: list[Tensor], available_VM: Tensor) -> Features:
        """Concatenate the aggregated experts."""
        return {"experts": torch.cat(pooled, dim=1), "available": available_VM.new_ones(len(available_VM), 1)}

    def pair_similarities(self, text: Features, video: Features) -> Tensor:
        """Return dot products; see the base class for the shape."""
        text_QT, video_VW = text["experts"].float(), video["experts"].float()
        shorter = min(text_QT.shape[1], video_VW.shape[1])
        sim_QV = text_QT[:, :shorter] @ video_VW[:, :shorter].T
        if self.compatible and text_QT.shape[1] > video_VW.shape[1]:
            sim_QV = sim_QV * 0.0
        return sim_QV[None]

    def variant(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return {"compatible": self.compatible}


EXPERT_MODELS: tuple[type[ExpertModel], ...] = (CollaborativeExperts, MixtureOfExperts, ConcatenatedExperts)
VARIANT_DEFAULTS = {"compatible": False, "mixture": "learned", "gating": "in_order"}


def _of_design(design: Design) -> tuple[type[ExpertModel], dict[str, Any]]:
    """Return the class of a released checkpoint, and its keyword arguments."""
    if design.name == "collaborative":
        return CollaborativeExperts, {"gating": design.gating, "mixture": design.mixture, "width": design.width}
    if design.name == "moee":
        return MixtureOfExperts, {"mixture": design.mixture}
    return ConcatenatedExperts, {"compatible": False}


def _known(given: Mapping[str, Any], keywords: Mapping[str, Any], model: type[ExpertModel]) -> dict[str, Any]:
    """Return the given options that the model supports; other options must have their default values."""
    for name, value in given.items():
        if name not in VARIANT_DEFAULTS:
            raise unknown_name("load_model option", name, ("experts", "mask_padding", *VARIANT_DEFAULTS))
        if name not in keywords and name != "compatible" and value != VARIANT_DEFAULTS[name]:
            raise UserError(f"{name}: got {value!r} for a {model.kind}; allowed: {VARIANT_DEFAULTS[name]!r}")
    return {name: value for name, value in given.items() if name in keywords}


def _with_unused(layer: nn.Module | None, x: Tensor) -> Tensor:
    """Return x with an unused layer in its graph, because strategies need a gradient for every parameter."""
    if layer is None or not layer.training:
        return x
    return x + 0.0 * sum(parameter.sum() for parameter in layer.parameters())
