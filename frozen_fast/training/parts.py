"""Builds the parts of a run from a config: sources, decoders, loaders, model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frozen_fast.config import ExperimentConfig, StagePlan, source_name
from frozen_fast.config.extensions import models
from frozen_fast.config.schema import LossConfig, ModelConfig, SourceConfig
from frozen_fast.data import EvaluationLoader, Source, TrainingLoader, read_sources
from frozen_fast.data.load.feature_loader import (
    ExpertFormat,
    FeatureEvaluationLoader,
    FeatureFormat,
    FeatureTrainingLoader,
)
from frozen_fast.data.load.for_model import FrameFormat, decoder_factory
from frozen_fast.data.load.for_model import build_evaluation_loader as loader_for_model
from frozen_fast.errors import UserError
from frozen_fast.evaluation import Reranking
from frozen_fast.models import DualEncoder, build_dual_encoder
from frozen_fast.models.classifier import Classifier
from frozen_fast.models.experts.expert_model import ExpertModel
from frozen_fast.models.from_config import check_model, load_checkpoint
from frozen_fast.models.learned_scale import LearnedScale
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.models.video_side import VideoSide
from frozen_fast.optimizers import freeze_groups
from frozen_fast.profiling.flops import ClipFlops, TrainingFlops, clip_flops
from frozen_fast.training.build_classifier import build_classifier

log = logging.getLogger(__name__)


def build_model(
    config: ExperimentConfig,
    device: torch.device,
    *,
    resume_from: Path | None = None,
    sources: Mapping[str, Source] | None = None,
) -> RetrievalModel:
    """Build the model of model.kind on its device, in train mode.

    Args:
        config: the experiment.
        device: where it runs.
        resume_from: this run's checkpoint.
        sources: the training sources, which define a classifier's classes.

    Raises:
        UserError: a name, file or size is wrong.
    """
    if config.model.kind == DualEncoder.kind:
        return build_frozen_model(config, device, resume_from=resume_from)
    if config.model.kind == Classifier.kind:
        frames = [stage.frames for stage in config.curriculum.stages]
        classifier = build_classifier(config, sources or {}, resume_from=resume_from)
        _check_normalisation(classifier, config)
        _check_evaluation_frames(config, max(classifier.learned_frames, *frames))
        freeze_groups(classifier, config.optimizer)
        classifier.video_model.check_kernels(device)
        return classifier.to(device).train()
    section = config.model
    if resume_from is not None:
        section = replace(section, checkpoint=str(resume_from))
    torch.manual_seed(config.seed)
    model: RetrievalModel = models.load(section.kind).from_config(section)
    _check_normalisation(model, config)
    _set_loss_scale(model, config.loss)
    freeze_groups(model, config.optimizer)
    return model.to(device).train()


def build_frozen_model(
    config: ExperimentConfig, device: torch.device, *, resume_from: Path | None = None
) -> DualEncoder:
    """Build the dual encoder on its device, in train mode; random weights are drawn from config.seed.

    Args:
        config: the experiment.
        device: where it runs.
        resume_from: this run's checkpoint. Its architecture, weights and tokenizer replace those of the config, so that
            a run resumes without the hub and without the files it started from.

    Raises:
        UserError: a name, file or size is wrong, or the attention backend cannot run here.
    """
    stages = config.curriculum.stages
    section = config.model
    if resume_from is not None:
        text = replace(section.text, tokenizer=None)
        section = replace(section, checkpoint=str(resume_from), text=text)
    augmentation = config.data.augmentation
    torch.manual_seed(config.seed)
    try:
        model = build_dual_encoder(
            section,
            max_frames=max(stage.frames for stage in stages),
            first_frames=stages[0].frames,
            mean=augmentation.mean,
            std=augmentation.std,
            resuming=resume_from is not None,
        )
    except UserError:
        raise
    except ValueError as error:  # frozen_kernels raises plain ValueErrors
        raise UserError(f"model: {' '.join(str(error).split())}") from error
    _check_normalisation(model, config)
    _check_evaluation_frames(config, max(model.learned_frames, *(stage.frames for stage in stages)))
    _set_loss_scale(model, config.loss)
    freeze_groups(model, config.optimizer)
    model.video_model.check_kernels(device)
    return model.to(device).train()


def load_model(config: ExperimentConfig, checkpoint: Path, device: torch.device) -> RetrievalModel:
    """Load a checkpoint's model for evaluation, in eval mode.

    Args:
        config: evaluation.frames truncates the temporal embeddings (null: all that the checkpoint learned). The model
            section selects the computation and the tokenizer; if it names a checkpoint, it must agree with it.
        checkpoint: a frozen_fast folder or a released .pth/.pth.tar file.
        device: where it runs.

    Raises:
        UserError: the checkpoint or the tokenizer cannot be read or contradicts the config, or the checkpoint was
            trained with other pixel statistics or fewer frames than evaluation.frames.
    """
    section = replace(config.model, checkpoint=str(checkpoint))
    if config.model.kind not in (DualEncoder.kind, Classifier.kind):
        other: RetrievalModel = models.load(section.kind).from_config(section)
        _check_normalisation(other, config)
        return other.to(device).eval()
    model: VideoSide
    if config.model.kind == Classifier.kind:
        model = Classifier.from_config(section)
    else:
        model = load_checkpoint(section, compare=config.model.checkpoint is not None)
    frames = config.evaluation.frames
    if frames is not None and model.frame_embeddings():
        _check_evaluation_frames(config, model.learned_frames)
    elif frames is not None:
        model.expand_frames(frames)
    _check_normalisation(model, config)
    model.video_model.check_kernels(device)
    return model.to(device).eval()


def _check_evaluation_frames(config: ExperimentConfig, learned: int) -> None:
    """Refuse evaluation.frames above the number of frames that the model has learned."""
    frames = config.evaluation.frames
    if frames is not None and frames > learned:
        raise UserError(
            f"evaluation.frames: got {frames}; allowed: up to {learned}, those that the model has learned, or null "
            f"(frozen-fast convert-checkpoint --frames {frames} expands a checkpoint)"
        )


def build_training_loader(
    config: ExperimentConfig, sources: Mapping[str, Source], model: RetrievalModel, device: torch.device
) -> TrainingLoader | FeatureTrainingLoader:
    """Build the loader of training batches: frames at the model's resolution and tokens, or expert features."""
    if isinstance(model, ExpertModel):
        _check_features(sources, "data.sources")
        return FeatureTrainingLoader(
            sources,
            feature_format(config, model),
            caption_masks={source_name(one): one.caption_masks for one in config.data.sources if one.caption_masks},
            device=device,
            prefetch_batches=config.data.decode.prefetch_batches or 2,
            timeout_seconds=config.data.decode.read_timeout_seconds,
        )
    tokenizer = model.tokenizer
    assert tokenizer is not None, "build_model refuses a tower without a tokenizer"
    return TrainingLoader(
        sources,
        decoder_factory(config.data.decode, frame_format(config, model), device),
        tokenizer,
        augmentation=config.data.augmentation,
        decode=config.data.decode,
        sampling=config.data.sampling,
        device=device,
        resolution=model.resolution,
    )


def build_evaluation_loader(
    config: ExperimentConfig,
    source: Source,
    model: RetrievalModel,
    device: torch.device,
    *,
    frames: int,
    rank: int,
    world_size: int,
) -> EvaluationLoader | FeatureEvaluationLoader:
    """Build the loader of one evaluation source's test windows, or of its videos' features."""
    if isinstance(model, ExpertModel):
        _check_features({source.name: source}, "evaluation.sources")
        return FeatureEvaluationLoader(
            source,
            replace(feature_format(config, model), other_texts=()),
            batch_size=config.evaluation.batch_size,
            rank=rank,
            world_size=world_size,
            device=device,
        )
    return loader_for_model(
        source,
        frame_format(config, model),
        evaluation=config.evaluation,
        decode=config.data.decode,
        device=device,
        frames=frames,
        sampling=config.data.sampling,
        rank=rank,
        world_size=world_size,
    )


def feature_format(config: ExperimentConfig, model: ExpertModel) -> FeatureFormat:
    """Return the features that an expert model reads: the model's experts and widths, and the config's lengths.

    Raises:
        UserError: the config has no length for an expert with several vectors.
    """
    section = config.model.experts
    most = {expert.name: expert.max_vectors for expert in section.experts}
    experts = {}
    for expert in model.sizes.experts:
        if expert.clusters and not most.get(expert.name):
            got = f"got none for {expert.name}"
            raise UserError(f"model.experts.experts: {got}, which has clusters; allowed: its max_vectors")
        experts[expert.name] = ExpertFormat(expert.width, most[expert.name] if expert.clusters else 0)
    return FeatureFormat(
        experts=experts,
        text=section.text,
        text_width=model.sizes.text_width,
        text_tokens=section.max_text_tokens,
        other_texts=tuple(sorted({teacher.text for teacher in config.distillation.teachers if teacher.text})),
    )


def _check_features(sources: Mapping[str, Source], key: str) -> None:
    for index, source in enumerate(sources.values()):
        if source.format != "features":
            what = f"got {source.format!r} for a model of expert features"
            raise UserError(f"{key}[{index}].format: {what}; allowed: features (frozen-fast convert-features)")


def frame_format(config: ExperimentConfig, model: RetrievalModel) -> FrameFormat:
    """Return the frames that the model reads.

    Raises:
        UserError: data.sampling masks frames, and the model does not support masks.
    """
    if config.data.sampling.rule == "fixed_rate" and not model.takes_frame_masks:
        got = f"got 'fixed_rate' for a model of kind {model.kind}, which does not support masks of short clips"
        raise UserError(f"data.sampling.rule: {got}; allowed: segments")
    augmentation = config.data.augmentation
    return FrameFormat(model.resolution, augmentation.mean, augmentation.std)


def flops_counter(model: RetrievalModel, frames: Iterable[int]) -> Callable[[int, int, int], TrainingFlops | None]:
    """Return a function from (frames, text tokens, clips of a global batch) to the model FLOPs of a training clip.

    Unused outputs of a video tower's last block are not computed and count in the nominal FLOPs only, unless
    model.video.full_last_block is set. The function returns None if a tower's FLOPs are unknown.

    Args:
        model: not yet sharded.
        frames: the numbers of frames for which the function is called.
    """
    if not isinstance(model, VideoSide):
        sides = cache(model.side_flops)
        if sides(max(frames, default=1), 1) is None:
            log.info("no FLOPs and no MFU for a model of kind %s", model.kind)

        def flops_of_sides(frames: int, tokens: int, clips: int) -> TrainingFlops | None:
            found = sides(frames, tokens)
            if found is None:
                return None
            both = {"text": found.text, "loss": clips * found.pair, "frozen": found.frozen}
            executed, nominal = (ClipFlops(video=video, **both) for video in (found.video, found.nominal_video))
            return TrainingFlops(executed.training, nominal.training)

        return flops_of_sides
    video = model.video_model
    video_flops = {
        number: (video.forward_flops(number), video.forward_flops(number, executed=False), video.pixel_flops(number))
        for number in sorted(set(frames))
    }
    video_learns = any(parameter.requires_grad for parameter in video.parameters())
    text = model.text_model if isinstance(model, DualEncoder) else None
    classes = len(model.classes) if isinstance(model, Classifier) else 0

    @cache
    def text_flops(tokens: int) -> tuple[float | None, float]:
        return (0.0, 0.0) if text is None else (text.forward_flops(tokens), text.frozen_flops(tokens))

    def training_flops(frames: int, tokens: int, clips: int) -> TrainingFlops | None:
        (executed, nominal, of_pixels), (caption, frozen) = video_flops[frames], text_flops(tokens)
        if executed is None or nominal is None or caption is None:
            return None
        of_a_clip = partial(
            clip_flops,
            text=caption,
            widths=(video.width, 0 if text is None else text.width),
            embedding_width=model.embedding_width if isinstance(model, DualEncoder) else classes,
            global_batch_size=0 if text is None else clips,
        )
        if not video_learns:
            return TrainingFlops(
                of_a_clip(executed, frozen=frozen + executed).training,
                of_a_clip(nominal, frozen=frozen + nominal).training,
            )
        return TrainingFlops(
            of_a_clip(executed, frozen=frozen, of_pixels=of_pixels).training, of_a_clip(nominal, frozen=frozen).training
        )

    return training_flops


def read_training_sources(config: ExperimentConfig) -> dict[str, Source]:
    """Return data.sources by name."""
    return read_sources(config.data.sources)


def read_evaluation_sources(config: ExperimentConfig) -> dict[str, Source]:
    """Return evaluation.sources by name."""
    return read_sources(config.evaluation.sources, "evaluation.sources")


def build_reranking(config: ExperimentConfig) -> Reranking | None:
    """Return the re-rankings of evaluation.rerank; qb_norm reads the captions of the first training source.

    Raises:
        UserError: qb_norm without data.sources.
    """
    evaluation = config.evaluation
    if not evaluation.rerank:
        return None
    bank: tuple[str, ...] = ()
    if "qb_norm" in evaluation.rerank:
        if not config.data.sources:
            allowed = "a source whose captions make the querybank"
            raise UserError(f"evaluation.rerank: got 'qb_norm' without data.sources; allowed: {allowed}")
        bank = _querybank(config.data.sources[0], evaluation.querybank_size)
    scale, beta = evaluation.dual_softmax_scale, evaluation.querybank_beta
    return Reranking(names=evaluation.rerank, scale=scale, querybank=bank, beta=beta)


@lru_cache(maxsize=1)
def _querybank(source: SourceConfig, size: int) -> tuple[str, ...]:
    """Return the first caption of clips at even intervals in a source."""
    clips = next(iter(read_sources([source]).values())).clips
    count = min(size, len(clips))
    return tuple(clips[place * len(clips) // count].captions[0] for place in range(count))


def matching_training_source(config: ExperimentConfig, evaluated: str) -> SourceConfig:
    """Return the training split of an evaluation source: same format, path and split_version.

    Raises:
        UserError: data.sources has none.
    """
    own = next(source for source in config.evaluation.sources if source_name(source) == evaluated)
    for source in config.data.sources:
        if (source.format, source.path, source.split_version) == (own.format, own.path, own.split_version):
            return source
    version = f", split_version {own.split_version}" if own.split_version else ""
    wanted = f"format {own.format}, path {own.path}{version}"
    raise UserError(f"evaluation.linear_head: got true without an entry of data.sources with {wanted}; allowed: one")


def described_sources(sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """Describe the sources for environment.json: number and kind of clips, and which rows were left out and why."""
    return {
        name: {"clips": len(source), "kind": source.kind, "drops": dict(source.drops)}
        for name, source in sources.items()
    }


def described_model(model: RetrievalModel) -> dict[str, Any]:
    """Describe the model for environment.json, with its number of weights."""
    parts: dict[str, nn.Module] = {"parameters": model}
    if isinstance(model, VideoSide):
        parts["video_parameters"] = model.video_model
    if isinstance(model, DualEncoder):
        parts["text_parameters"] = model.text_model
    counts = {key: sum(one.numel() for one in part.parameters()) for key, part in parts.items()}
    return {"kind": model.kind, **model.architecture(), **counts}


def check_stage_frames(model: ModelConfig, plans: Iterable[StagePlan]) -> None:
    """Refuse a source whose clips (images: one frame) have a number of frames that the video tower does not support.

    Raises:
        UserError: naming the source.
    """
    if model.checkpoint is None and model.kind in (DualEncoder.kind, Classifier.kind):
        frames = [(f"data.sources: {name}", number) for plan in plans for name, number in plan.source_frames.items()]
        check_model(model, frames)


def fingerprint(source: Source) -> str:
    """Hash a source's clip ids in order; a data position is valid for the same hash only."""
    digest = hashlib.sha256()
    for clip in source.clips:
        digest.update(clip.id.encode("utf-8", "surrogatepass") + b"\0")
    return f"{len(source.clips)} clips, {digest.hexdigest()[:16]}"


def _set_loss_scale(model: RetrievalModel, loss: LossConfig) -> None:
    """Add the loss's learned parameters to the model, or remove them; a checkpoint's learned value is kept."""
    if not loss.learnable_temperature:
        model.loss_scale = None
    elif model.loss_scale is None:
        bias = loss.sigmoid_bias if loss.name == "sigmoid" else None
        model.loss_scale = LearnedScale(1.0 / loss.temperature, max_scale=loss.max_logit_scale, bias=bias)


def _check_normalisation(model: RetrievalModel, config: ExperimentConfig) -> None:
    if model.mean is None or model.std is None:
        return
    augmentation = config.data.augmentation
    for key, ours, theirs in (("mean", augmentation.mean, model.mean), ("std", augmentation.std, model.std)):
        if any(abs(a - b) > 1e-6 for a, b in zip(ours, theirs, strict=True)):
            allowed = f"{list(theirs)}, what the checkpoint was trained with"
            raise UserError(f"data.augmentation.{key}: got {list(ours)}; allowed: {allowed}")
