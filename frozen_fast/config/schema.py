"""The experiment file's typed form: every key, its type, default and one-line meaning.

Nothing here imports torch. `frozen_fast.config.load` reads YAML into these classes; unknown keys,
wrong types and values outside what is allowed are UserErrors that name the key's path, all of them at once.

A key is a line: its type, default, meaning, and the values that are allowed (keys.key). Keys that must agree are
checked by their section's validators. A mapping is Named[type of its values].
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from frozen_fast.config import extensions
from frozen_fast.config.keys import Count, Named, OneOf, dataclass, key, refuse, section
from frozen_fast.config.video_sizes import VIDEO_SIZES
from frozen_fast.errors import unknown_value

Expansion = Literal["zero", "nearest", "bilinear"]
Attention = Literal["auto", "reference", "sdpa", "cpu_c", "xformers", "triton"]

Beta = Annotated[float, Field(ge=0, lt=1)]
Spread = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class VideoTowerConfig:
    """The video tower. A key that the chosen tower does not read is refused when it is set."""

    tower: str | None = key(None, "space_time; timm: an image model on each frame; clip: CLIP's image tower on each frame; clip_divided: CLIP's ViT with divided space-time attention; torchvision_video; or a plugin's; none: space_time, or the checkpoint's", names=extensions.video_towers)
    size: str | None = key(None, "which model of the tower. space_time: a named size (frozen_fast/config/video_sizes.py); timm: a timm model; torchvision_video: s3d, r3d_18, r3d_101, r2plus1d_18, mc3_18, mvit_v1_b, mvit_v2_s, swin3d_t, swin3d_s, swin3d_b; clip: ViT-B/32, ViT-B/16, ViT-L/14 (random weights); none: base_patch16_224 for space_time, or the checkpoint's", not_blank=True)
    weights: str = key("none", "initial weights: none; a local .pth/.safetensors file; timm:NAME, a local .onnx file, or package:MODULE/FILE.onnx inside an installed package (space_time: a ViT's); OpenAI's, open_clip's or transformers' files or open_clip:MODEL/TAG (clip); pretrained (timm and torchvision_video: from the library's cache or a download)", not_blank=True)
    resolution: int | None = key(None, "pixels along a frame's edge (timm, torchvision_video); none: what the model was made for, or the checkpoint's", ge=1)
    over_time: Literal["mean", "transformer"] | None = key(None, "timm, clip: how the frames' features become one: their mean (clip: of normalised ones, CLIP4Clip's meanP), or a transformer with learned frame positions; none: mean, or the checkpoint's")
    time_layers: int | None = key(None, "timm, clip: layers of the transformer over time; none: 2 (clip: 4), or the checkpoint's", ge=1)
    heads: int | None = key(None, "attention heads of a released checkpoint's video tower, which its file does not tell; none: width / 64", ge=1)
    block: Literal["frozen_in_time", "timesformer"] | None = key(None, "space_time: where the space residual adds: the block's input, or TimeSformer's divided block; none: frozen_in_time, or the checkpoint's")
    attention: Attention = key("auto", "space_time: attention backend of frozen_kernels")
    fused_ops: Literal["auto", "plain"] = key("auto", "space_time: residual norms and bias + GELU by frozen_kernels' fastest form for the device (Triton, C), or by PyTorch's own operators")
    time_init: Literal["zero_output", "released", "random"] = key("zero_output", "space_time: how time attention starts: output projection 0; qkv 0 and projection 1 as released at more than one frame (its queries and keys then never learn); or random as released at one frame")
    position_init_std: float = key(0.02, "space_time: spread of the position embeddings' start; a tower from scratch on little data needs 1 to see where things are", ge=0)
    temporal_init_std: float = key(0.0, "spread of the temporal embeddings' start, added to what the first expansion makes of one frame's row; 0: as in the paper", ge=0)
    skip_time_attention_at_one_frame: bool | None = key(None, "space_time: leave temporal attention out in stages of one frame (changes the model); none: false, or the checkpoint's")
    checkpointed_blocks: int = key(0, "number of blocks whose activations are recomputed in the backward pass", ge=0)
    full_last_block: bool = key(False, "space_time: compute the last block's patch outputs too, which nothing reads (for timing comparisons)")
    options: Named[Any] = key((), "further settings of a plugin's tower (a mapping)")

    @model_validator(mode="after")
    def _size_is_the_towers(self) -> Self:
        if self.tower in (None, "space_time") and self.size is not None and self.size not in VIDEO_SIZES:
            refuse([("size", unknown_value(self.size, VIDEO_SIZES))])
        return self


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """The caption encoder."""

    tower: str | None = key(None, "transformers: any encoder of that library; clip: CLIP's; or a plugin's; none: transformers, or the checkpoint's", names=extensions.text_towers)
    name: str | None = key(None, "transformers name, local folder, or package:MODULE/FOLDER inside an installed package; none: distilbert-base-uncased, or the checkpoint's", not_blank=True)
    weights: Literal["pretrained", "random"] = key("pretrained", "random keeps the architecture and draws the weights")
    tokenizer: str | None = key(None, "tokenizer name or folder; none: the tower's own, or the checkpoint's")
    max_tokens: int | None = key(None, "captions are cut to this many tokens; none: 77 or as many as the tower takes, or the checkpoint's", ge=3)
    frozen_layers: int = key(0, "freeze the embeddings and the first N layers; 0: freeze none", ge=0)
    pooling: Literal["auto", "cls", "mean", "pooler", "eos"] = key("auto", "cls: token 0; mean: over the caption's tokens; pooler: the model's own; eos: the caption's last token; auto: the checkpoint's, or what the architecture was trained with (BERT's pooler, T5's mean, CLIP's eos), otherwise cls")
    heads: int | None = key(None, "attention heads of a released checkpoint's text tower, which its file does not tell; none: width / 64", ge=1)
    options: Named[Any] = key((), "further settings of a plugin's tower (a mapping)")


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """One expert of a model that reads expert features."""

    name: str = key("", "as in the feature store: imagenet.senet154.0, face, ocr", not_blank=True)
    width: int = key(512, "of one vector", ge=1)
    clusters: int = key(0, "NetVLAD clusters over an expert's vectors; 0: the store has one vector per video", ge=0)
    max_vectors: int = key(0, "an expert with clusters: largest number of vectors read per video, padded with zeros", ge=0)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Models that read expert features (docs/experts.md); defaults are Collaborative Experts on MSR-VTT."""

    experts: tuple[ExpertConfig, ...] = key((), "what the model reads of a video; it goes through them in alphabetical order")
    width: int = key(768, "collaborative_experts: width of every expert's space", ge=1)
    gating: Literal["in_order", "parallel", "none"] = key("in_order", "collaborative_experts: in_order, as released: later experts see earlier ones gated; parallel: all see the rest as they came; none: each gates itself (CE - CG)")
    mixture: Literal["learned", "uniform"] = key("learned", "weights of the experts: from the caption, or all the same (MW)")
    compatible: bool = key(False, "concatenated_experts: score 0 where the text is wider than the video, as the released code does")
    mask_padding: bool = key(False, "leave padding out of NetVLAD; the released models count it")
    text: str = key("", "name of the store's text features; empty: the only ones")
    text_width: int = key(768, "width of a token's features", ge=1)
    text_clusters: int = key(28, "NetVLAD clusters over a caption's tokens", ge=1)
    ghost_clusters: int = key(1, "clusters of the text that only take part in the softmax", ge=0)
    max_text_tokens: int = key(37, "largest number of tokens read per caption, padded with zeros", ge=1)

    @model_validator(mode="after")
    def _vectors_and_names(self) -> Self:
        found = []
        for index, expert in enumerate(self.experts):
            if bool(expert.clusters) != bool(expert.max_vectors):
                got = f"got {expert.max_vectors} with {expert.clusters} clusters"
                found.append((f"experts[{index}].max_vectors", f"{got}; allowed: above 0 with clusters, 0 without"))
        for name, count in Counter(expert.name for expert in self.experts).items():
            if count > 1:
                found.append(("experts", f"got {name!r} {count} times; allowed: each expert once"))
        refuse(found)
        return self


@dataclass(frozen=True, kw_only=True)
class Clip2VideoConfig:
    """CLIP2Video's sizes and start; attention, fused_ops and checkpointed_blocks of model.video hold for its CLIP."""

    clip: str = key("", "CLIP weights to start from: OpenAI's .pt file, an open_clip file, a transformers folder, or open_clip:MODEL/TAG; empty: random weights")
    activation: Literal["auto", "quick_gelu", "gelu"] = key("auto", "CLIP's activation; auto: what a transformers folder says, otherwise quick_gelu (most of open_clip's own weights use gelu, which no file says)")
    size: str = key("ViT-B/32", "sizes of random weights: ViT-B/32, ViT-B/16, ViT-L/14, or tiny (for tests)", not_blank=True)
    centers: int = key(5, "shared centres of the temporal alignment block (7 on VATEX)", ge=1)
    temporal_layers: int = key(4, "layers of the transformer over frames and their differences", ge=1)
    compatible_masks: bool = key(False, "repeat the released code's mistake in the masks of short clips, for its released weights; scores then depend on which clips share a batch")
    max_tokens: int = key(32, "captions are cut to this many tokens, start and end included", ge=3, le=77)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model."""

    kind: str = key("frozen", "frozen: the paper's dual encoder; clip2video; collaborative_experts, moee, concatenated_experts: models of expert features; or a plugin's", names=extensions.models)
    checkpoint: str | None = key(None, "start from this frozen_fast checkpoint folder, run folder (its best checkpoint, else its newest) or released .pth/.pth.tar file; it says what the model is, and keys that contradict it are refused")
    video: VideoTowerConfig = section(VideoTowerConfig, "video tower")
    text: TextTowerConfig = section(TextTowerConfig, "text tower")
    embedding_width: int | None = key(None, "width of the common space; 0: no projections, the towers' outputs are compared as they are (the towers clip); none: 256, or the checkpoint's", ge=0)
    text_activation: Literal["relu", "none"] | None = key(None, "before the text projection: relu as released, none as in the paper; null: relu, or the checkpoint's")
    expansion: Expansion = key("zero", "how temporal embeddings for m frames become embeddings for M > m")
    experts: ExpertsConfig = section(ExpertsConfig, "models of expert features")
    clip2video: Clip2VideoConfig = section(Clip2VideoConfig, "CLIP2Video")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One collection of clips with captions."""

    name: str = key("", "name in reports; empty: the format")
    format: str = key("manifest", "layout on disk: a name of config.extensions.layouts (docs/datasets.md lists them), or of a plugin", names=extensions.layouts)
    path: str = key("", "manifest file, the data set's root folder, or the folder of packed shards")
    split: str = key("train", "train, val or test (a manifest's own values; empty: every line of a manifest, every clip of shards)")
    split_version: str = key("", "version of the data set's splits, where it has several (docs/datasets.md): msrvtt 1k-A, 1k-B or full, ucf101 1, 2 or 3")
    split_counts: Literal["warn", "error", "off"] = key("warn", "where an annotation names another number of clips than is published for the split; files that are not on disk are counted apart and do not matter here")
    columns: Named[str] = key((), "csv and parquet: names of the file's columns for id, path, caption, kind, split, label, start_seconds, end_seconds (a mapping in YAML)")
    captions: Literal["random", "first", "paragraph", "all"] = key("random", "training draws one, takes the first, or joins a random number; evaluation reads all or joins all")
    max_caption_characters: int = key(350, "captions are cut to this length, 0: never", ge=0)
    caption_masks: str | None = key(None, "features: pickle of 0 or 1 for each caption of a video; training draws from the captions marked 1 (TeachText's denoising)")
    twins_together: bool = key(False, "training takes a clip and its twin (a manifest's field) in turn, so that an even batch holds both: negatives that one frame cannot tell apart")
    weight: float = key(1.0, "relative share of optimizer steps among the sources", ge=0)
    max_clips: int = key(0, "use only the first N clips, 0: all", ge=0)


def check_sources(sources: tuple[SourceConfig, ...]) -> None:
    """Refuse sources without a path, or of one name. Versions and splits are checked by the layout when it reads."""
    found = []
    for index, source in enumerate(sources):
        if not source.path.strip():
            found.append((f"sources[{index}].path", f"got {source.path!r}; allowed: text that is not empty"))
    for name, count in Counter(source.name or source.format for source in sources).items():
        if count > 1:
            what = f"got {count} sources called {name!r}; allowed: one of each name (set their name)"
            found.append(("sources", what))
    refuse(found)


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Training augmentation; one draw per clip, shared by its frames."""

    crop_scale: tuple[float, float] = key((0.5, 1.0), "RandomResizedCrop: smallest and largest share of the area")
    crop_ratio: tuple[float, float] = key((0.75, 1.3333333333333333), "RandomResizedCrop: smallest and largest aspect ratio")
    horizontal_flip: float = key(0.5, "probability of a mirror image; 0 for captions that speak of left and right", ge=0, le=1)
    mean: tuple[float, float, float] = key((0.485, 0.456, 0.406), "normalisation mean, RGB in [0, 1]")
    std: tuple[Spread, Spread, Spread] = key((0.229, 0.224, 0.225), "normalisation standard deviation")

    @model_validator(mode="after")
    def _smallest_first(self) -> Self:
        found = []
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            found.append(("crop_scale", f"got [{low}, {high}]; allowed: 0 < smallest <= largest <= 1"))
        low, high = self.crop_ratio
        if not 0 < low <= high:
            found.append(("crop_ratio", f"got [{low}, {high}]; allowed: 0 < smallest <= largest"))
        refuse(found)
        return self


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which frames of a clip the model sees."""

    rule: Literal["segments", "fixed_rate"] = key("segments", "segments: one frame of each of T equal segments, short clips repeat frames; fixed_rate: CLIP2Video's, T of the frames at a fixed rate, short clips are padded and masked (for models that take masks)")
    frames_per_second: float = key(5.0, "fixed_rate: rate of the frames to choose from", gt=0)
    divisor: int = key(1, "fixed_rate: keep one of every N of those frames (2 on MSR-VTT, 1 on MSVD and VATEX)", ge=1)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How clips become frames."""

    backend: str = key("auto", "decoder: dali, torchcodec, decord, pyav, or a plugin's; auto takes the fastest that reads the codec on this device", names=extensions.decoders)
    threads: int | None = key(None, "decoding threads of one loader process or background thread; null: by device (docs/data.md)", ge=1)
    workers: int | None = key(None, "loader processes (torchcodec, decord, pyav); 0: a background thread; null: on a GPU one for each core of a rank but one (dali: 0), on a CPU 0", ge=0)
    prefetch_batches: int | None = key(None, "batches decoded ahead; null: twice the workers, at least 2", ge=1)
    on_bad_clip: Literal["auto", "error", "skip"] = key("auto", "auto: skip in training, error in evaluation")
    max_bad_share: float = key(0.05, "a run fails past this share of unreadable clips", ge=0, le=1)
    max_pixels: int = key(50_000_000, "a picture or frame with more pixels is a bad clip", ge=1)
    read_timeout_seconds: float = key(120.0, "a batch that takes longer is an error, not a hang", gt=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data."""

    sources: tuple[SourceConfig, ...] = key((), "sources; a batch comes from one of them")
    order: Literal["round_robin", "weighted"] = key("round_robin", "how batches alternate: in turn by weight, or drawn by weight")
    epoch_ends: Literal["first", "shortest", "longest", "all"] = key("first", "an epoch is over when this has been read once: the first source, the one with the fewest clips, with the most clips, or every source")
    sampling: SamplingConfig = section(SamplingConfig, "which frames of a clip, in training and evaluation")
    decode: DecodeConfig = section(DecodeConfig, "decoding")
    augmentation: AugmentationConfig = section(AugmentationConfig, "augmentation")

    @model_validator(mode="after")
    def _sources_are_sound(self) -> Self:
        check_sources(self.sources)
        return self


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One step of the curriculum."""

    frames: int = key(1, "frames per video clip (images are always one frame)", ge=1)
    global_batch_size: int = key(96, "clips per forward pass over all ranks, for sources without an entry in batch_sizes", ge=1)
    batch_sizes: Named[Count] = key((), "per source name: clips per forward pass over all ranks (a mapping in YAML)")
    share: float | None = key(None, "share of the curriculum's budget in clips; exactly one of share, steps", gt=0, le=1)
    steps: int | None = key(None, "optimizer steps of this stage; exactly one of share, steps", ge=1)
    learning_rate_scale: float = key(1.0, "factor on optimizer.learning_rate in this stage", ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.share is None) == (self.steps is None):
            got = "neither share nor steps" if self.share is None else f"share {self.share} and steps {self.steps}"
            refuse([("", f"got {got}; allowed: exactly one of share, steps (set the other to null)")])
        return self


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """The stages, and the budget that they share."""

    stages: tuple[StageConfig, ...] = key((StageConfig(steps=100),), "stages in order; frames may not fall")
    budget_clips: int | None = key(None, "clips of the whole run; one of budget_clips, budget_epochs where stages name shares", ge=1)
    budget_epochs: float | None = key(None, "epochs of the whole run", gt=0)
    gradient_accumulation_steps: int = key(1, "forward passes per optimizer step; a clip meets the negatives of its own pass only, so that four passes of 24 clips are not one of 96", ge=1)

    @model_validator(mode="after")
    def _frames_do_not_fall(self) -> Self:
        found = [] if self.stages else [("stages", "got none; allowed: one or more stages")]
        for index, (before, stage) in enumerate(pairwise(self.stages), start=1):
            if stage.frames < before.frames:
                allowed = f"{before.frames} or more, as in the stage before"
                found.append((f"stages[{index}].frames", f"got {stage.frames}; allowed: {allowed}"))
        refuse(found)
        return self

    @model_validator(mode="after")
    def _budget_goes_with_shares(self) -> Self:
        shares = [stage.share for stage in self.stages if stage.share is not None]
        budgets = [name for name in ("budget_clips", "budget_epochs") if getattr(self, name) is not None]
        found = []
        if budgets and not shares:
            got = f"got {getattr(self, budgets[0])}, but no stage has a share"
            found.append((budgets[0], f"{got}; allowed: a budget with shares, or steps without a budget"))
        if shares and len(budgets) != 1:
            got = f"got {'both' if budgets else 'neither'} of budget_clips, budget_epochs"
            found.append(("", f"{got}; allowed: exactly one of them where stages name shares"))
        if shares and not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            found.append(("stages", f"got shares that sum to {sum(shares):.6g}; allowed: a sum of 1"))
        refuse(found)
        return self


@dataclass(frozen=True, kw_only=True)
class OptimizerGroupConfig:
    """Settings for the parameters whose names match a pattern; later groups win."""

    match: str = key("", "parameter name, * stands for any text: text_model.*, video_model.blocks.*, loss_scale.*", not_blank=True)
    learning_rate_scale: float | None = key(None, "factor on optimizer.learning_rate; null: as without this group", ge=0)
    weight_decay: float | None = key(None, "weight decay; null: as without this group", ge=0)
    frozen: bool | None = key(None, "true: the parameters are not trained; null: as without this group")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: str = key("adamw", "adamw, adam, radam, ranger (RAdam with Lookahead), lion, lamb, or a plugin's", names=extensions.optimizers)
    groups: tuple[OptimizerGroupConfig, ...] = key((), "learning rate, weight decay or freezing for a part of the model")
    learning_rate: float = key(3e-5, "peak learning rate", gt=0)
    betas: tuple[Beta, Beta] = key((0.9, 0.999), "decay rates of the running averages")
    eps: float = key(1e-6, "added to the denominator", gt=0)
    weight_decay: float = key(0.0, "weight decay (biases, norms and embeddings of position exempt, unless decay_all)", ge=0)
    decay_all: bool = key(False, "weight decay for every parameter, as the released expert models have it")
    text_learning_rate_scale: float = key(1.0, "deprecated, use groups: factor on the learning rate of the text tower", ge=0)
    position_learning_rate_scale: float = key(1.0, "deprecated, use groups: factor on the learning rate of the video tower's CLS token, position and temporal embeddings", ge=0)
    weight_average_decay: float = key(0.0, "exponential moving average of the weights: share that stays at each step, such as 0.999; evaluations use the average, checkpoints hold it as a model of its own in averaged/; 0: no average", ge=0, lt=1)
    gradient_clip_norm: float = key(0.0, "largest gradient norm, 0: no clipping", ge=0)
    schedule: Literal["constant", "cosine", "epoch_decay"] = key("constant", "after warm-up; epoch_decay: times optimizer.epoch_factor after each epoch (data.epoch_ends)")
    epoch_factor: float = key(0.95, "epoch_decay: the learning rate's factor from one epoch to the next", gt=0, le=1)
    warmup_steps: int = key(0, "linear warm-up, optimizer steps", ge=0)
    fused: Literal["auto", "on", "off"] = key("auto", "fused kernel where the optimizer has one")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What training minimises."""

    name: str = key("infonce", "infonce: cross-entropy in both directions; sigmoid: SigLIP's; max_margin: Collaborative Experts'; or a plugin's", names=extensions.losses)
    temperature: float = key(0.05, "infonce and sigmoid: divides the similarities; the start value where it is learned", gt=0)
    learnable_temperature: bool = key(False, "learn the temperature with the model, as CLIP does (and the bias of sigmoid)")
    max_logit_scale: float = key(100.0, "ceiling of 1 / temperature where it is learned", gt=0)
    sigmoid_bias: float = key(-10.0, "sigmoid: added to the scaled similarities; the start value where it is learned")
    average_directions: bool = key(False, "infonce: the mean of both directions (CLIP) in place of their sum (the paper)")
    margin: float = key(0.2, "max_margin: by how much a true pair's similarity should exceed a wrong pair's", ge=0)
    local: bool = key(True, "each rank computes the rows of its own clips only (same value and gradient)")
    chunk_rows: int = key(0, "rows of logits computed at once, 0: all", ge=0)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One teacher: a model of this project, or embeddings that TeachText released."""

    checkpoint: str | None = key(None, "a frozen_fast checkpoint folder, or a released file (with kind)")
    kind: str | None = key(None, "kind of a released file's model; none: the folder says it", names=extensions.models)
    pickle: str | None = key(None, "released embeddings of the training videos and captions, in place of a checkpoint")
    text: str = key("", "models of expert features: the store's text features that this teacher reads; empty: the student's")
    frames: int | None = key(None, "frames of a clip that this teacher sees; the student sees its stage's share of them; none: those of the stage", ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.checkpoint is None) == (self.pickle is None):
            refuse([("", "got a checkpoint and a pickle, or neither; allowed: one of the two")])
        return self


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Teachers whose mean similarity the model follows, beside its loss."""

    teachers: tuple[TeacherConfig, ...] = key((), "frozen models or released embeddings; none: no distillation")
    weight: float = key(1.0, "factor on the distillation loss", ge=0)
    beta: float = key(1.0, "Smooth L1: differences of similarity below this count squared", gt=0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a step runs."""

    precision: Literal["auto", "bf16", "fp32"] = key("auto", "bf16: autocast over fp32 weights; auto: bf16 where the device computes it in hardware, otherwise fp32, said once and reported; bf16 without such hardware runs, slowly, with a warning")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: CUDA where there is one")
    compile: bool = key(False, "torch.compile of the video tower's blocks and the text tower")
    expected_world_size: int | None = key(None, "refuse to run with another number of processes", ge=1)
    log_every_steps: int = key(10, "steps between lines of the log (steps.jsonl has every step)", ge=1)
    profile_steps: int = key(0, "number of steps of each stage to trace with torch.profiler: a Chrome trace in traces/, the most expensive kernels in the report", ge=0)


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Limits on the time of each phase; past one, every rank writes its stacks to hangs/ and the run ends with 1."""

    start_minutes: float = key(60.0, "until the first stage begins: reading sources, building the model, 0: no limit", ge=0)
    first_step_minutes: float = key(60.0, "first step of a stage, which may compile, 0: no limit", ge=0)
    step_minutes: float = key(30.0, "any other step, the wait for its batch included, 0: no limit", ge=0)
    evaluation_minutes: float = key(240.0, "an evaluation, 0: no limit", ge=0)
    checkpoint_minutes: float = key(60.0, "a snapshot for a checkpoint, 0: no limit", ge=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved and when."""

    every_steps: int = key(500, "optimizer steps between checkpoints, 0: only at stage ends", ge=0)
    every_minutes: float = key(30.0, "minutes between checkpoints, whatever every_steps says, 0: by steps only", ge=0)
    keep: int = key(2, "number of newest checkpoints to keep, beside the best (evaluation.keep_best)", ge=1)
    keep_every_steps: int = key(0, "checkpoints whose step is a multiple of this are kept too, 0: none", ge=0)
    keep_stage_ends: bool = key(False, "the checkpoint at the end of each stage is kept too")
    asynchronous: bool = key(True, "a thread writes a snapshot in host memory (as large as weights and optimizer state) while training continues; false: training waits")
    give_up_minutes: float = key(60.0, "a disk that refuses every checkpoint for so long ends the run; until then it is tried again and again", gt=0)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Retrieval on held-out clips."""

    sources: tuple[SourceConfig, ...] = key((), "what to evaluate; none: no evaluation")
    every: Literal["epoch", "stage", "end", "never"] = key("stage", "after each epoch (data.epoch_ends) of a stage and at its end, after each stage, after the last, or not at all")
    metrics: tuple[Annotated[str, OneOf(extensions.metrics)], ...] = key(("retrieval",), "families of metrics to compute: retrieval (recall, ranks), or a plugin's")
    keep_best: str = key("none", "keep the checkpoint with the best value on the first of evaluation.sources as checkpoints/best: validation_loss (the training loss of its clips in batches of the last stage's size, as the paper chooses epochs), or any metric such as t2v/R@1; none: keep none")
    protocol: Literal["auto", "plain", "several_captions", "paragraph"] = key("auto", "auto: by the number of captions per clip")
    gallery: int = key(0, "queries that the retrieval page of each source shows with the first 5 clips found (gallery_SOURCE.html in the run folder), 0: no page", ge=0)
    gallery_videos: str | None = key(None, "folder with ID.mp4 for the retrieval page, where a source's clips are no videos (feature stores)")
    rerank: tuple[Literal["dual_softmax", "qb_norm"], ...] = key((), "re-rankings, reported apart from the plain numbers: dual_softmax over the test set, qb_norm with captions of data.sources[0] as querybank (text to video)")
    dual_softmax_scale: float = key(100.0, "dual_softmax: factor on the similarities inside the softmax", gt=0)
    querybank_size: int = key(5000, "qb_norm: captions of the querybank, one a clip, of clips evenly spread over data.sources[0]", ge=1)
    querybank_beta: float = key(20.0, "qb_norm: factor on the similarities inside the inverted softmax", gt=0)
    prompts: tuple[str, ...] = key((), "zero-shot classification of sources whose clips carry a class: texts with {} for the class name, whose similarities are averaged; none: retrieval only")
    linear_head: bool = key(False, "action recognition: fit a linear layer on the frozen model's clip embeddings of the training split (the entry of data.sources with the format, path and split_version of the evaluation source) and classify with it")
    linear_head_smoothing: float = key(0.1, "linear_head: label smoothing", ge=0, lt=1)
    linear_head_decay: float = key(0.01, "linear_head: weight decay of its objective, on standardised features", gt=0)
    average_sources: bool = key(False, "the report adds the mean over the sources: the folds of COCO's 1k protocol, the splits of UCF101 and HMDB51")
    frames: int | None = key(None, "frames per window: up to those that the model learns in the run, and in training no more than it has learned by then; none: those of the stage, or of the checkpoint", ge=1)
    stride_seconds: float = key(2.0, "seconds between test windows inside a segment; 0: one window in the middle", ge=0)
    max_windows: int = key(0, "largest number of windows per clip, evenly spread, 0: all", ge=0)
    batch_size: int = key(32, "windows per forward pass on a rank", ge=1)
    resize: int = key(256, "short side before the centre crop, for a 224 model; scaled with the resolution", ge=1)

    @model_validator(mode="after")
    def _sources_are_sound(self) -> Self:
        check_sources(self.sources)
        return self

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> Self:
        if self.keep_best != "none" and (not self.sources or self.every == "never"):
            why = "no evaluation.sources" if not self.sources else "evaluation.every: never"
            refuse([("keep_best", f"got {self.keep_best!r} with {why}; allowed: none, or something to evaluate")])
        return self


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Experiment trackers; their addresses and secrets come from the environment, as each documents (WANDB_API_KEY, MLFLOW_TRACKING_URI)."""

    trackers: tuple[Annotated[str, OneOf(extensions.trackers)], ...] = key((), "where numbers go beside the run folder, several at once: tensorboard, wandb, mlflow and Accelerate's others, or a plugin's")
    project: str = key("frozen_fast", "the project or experiment that runs are listed under", not_blank=True)
    run_name: str | None = key(None, "the run's name there; none: the experiment's")
    wandb_mode: Literal["online", "offline"] = key("online", "wandb: send at once, or write files for `wandb sync`")


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """The printed retrieval numbers that the report shows beside this run's (paper_row: the hours of Table 4)."""

    table: str = key("", "table of frozen_fast/evaluation/published.yaml, such as \"Table 2\"; empty: none")
    row: str = key("", "its row, such as CC3M")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment: what to train, on what, for how long."""

    name: str = key("experiment", "name in reports", not_blank=True)
    seed: int = key(0, "seed of weights, sampling, augmentation and order", ge=0, le=2**32 - 1)
    run_folder: str = key("runs/{name}", "where results go; {name} is the experiment's name", not_blank=True)
    paper_row: Literal["none", "1", "4", "1=>4", "8", "1=>4=>8"] = key("none", "row of the paper's Table 4 that this experiment follows")
    paper: PaperConfig = section(PaperConfig, "row of a printed table")
    model: ModelConfig = section(ModelConfig, "model")
    data: DataConfig = section(DataConfig, "training data")
    curriculum: CurriculumConfig = section(CurriculumConfig, "stages")
    optimizer: OptimizerConfig = section(OptimizerConfig, "optimizer")
    loss: LossConfig = section(LossConfig, "loss")
    distillation: DistillationConfig = section(DistillationConfig, "teachers")
    training: TrainingConfig = section(TrainingConfig, "engine")
    checkpoints: CheckpointConfig = section(CheckpointConfig, "checkpoints")
    watchdog: WatchdogConfig = section(WatchdogConfig, "limits on the time of each phase")
    evaluation: EvaluationConfig = section(EvaluationConfig, "evaluation")
    tracking: TrackingConfig = section(TrackingConfig, "experiment trackers")

    @model_validator(mode="after")
    def _batch_sizes_name_sources(self) -> Self:
        names = [source.name or source.format for source in self.data.sources] or ["(no data.sources)"]
        refuse(
            (f"curriculum.stages[{index}].batch_sizes", unknown_value(name, names))
            for index, stage in enumerate(self.curriculum.stages)
            for name, _ in stage.batch_sizes
            if name not in names
        )
        return self

    @model_validator(mode="after")
    def _run_folder_is_a_pattern(self) -> Self:
        try:
            self.run_folder.format(name="x")
        except (KeyError, IndexError, ValueError):
            allowed = "a path in which {name} is the experiment's name"
            refuse([("run_folder", f"got {self.run_folder!r}; allowed: {allowed}")])
        return self
