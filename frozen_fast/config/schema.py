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

Beta = Annotated[float, Field(ge=0, lt=1)]
Spread = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class VideoTowerConfig:
    """The video tower. A key that the chosen tower does not read is refused when it is set."""

    tower: str | None = key(None, "space_time; timm: an image model on each frame; clip: CLIP's image tower on each frame; clip_divided: CLIP's ViT with divided space-time attention; siglip: SigLIP's image tower on each frame; torchvision_video; or a plugin's; null: space_time, or the checkpoint's", names=extensions.video_towers)
    size: str | None = key(None, "model of the tower. space_time: a named size (frozen_fast/config/video_sizes.py); timm: a timm model; torchvision_video: s3d, r3d_18, r3d_101, r2plus1d_18, mc3_18, mvit_v1_b, mvit_v2_s, swin3d_t, swin3d_s, swin3d_b; clip: ViT-B/32, ViT-B/16, ViT-L/14, siglip: base-patch16-224, large-patch16-256, so400m-patch14-384 (random weights); null: base_patch16_224 for space_time, or the checkpoint's", not_blank=True)
    weights: str = key("none", "initial weights: none; a local .pth/.safetensors file; timm:NAME, a local .onnx file, or package:MODULE/FILE.onnx inside an installed package (space_time: a ViT's); OpenAI's, open_clip's or transformers' files or open_clip:MODEL/TAG (clip); a transformers folder (siglip); pretrained (timm and torchvision_video: from the library's cache or a download)", not_blank=True)
    resolution: int | None = key(None, "pixels along a frame's edge (timm, torchvision_video); null: the model's default, or the checkpoint's", ge=1)
    over_time: Literal["mean", "transformer"] | None = key(None, "timm, clip, siglip: how frame features are pooled: mean (clip, siglip: of normalised features, CLIP4Clip's meanP), or a transformer with learned frame positions; null: mean, or the checkpoint's")
    time_layers: int | None = key(None, "timm, clip, siglip: layers of the transformer over time; null: 2 (clip, siglip: 4), or the checkpoint's", ge=1)
    heads: int | None = key(None, "attention heads of a released checkpoint's video tower, which the file does not contain; null: width / 64", ge=1)
    block: Literal["frozen_in_time", "timesformer"] | None = key(None, "space_time: residual of the space attention: frozen_in_time adds it to the block's input, timesformer to the output of time attention; null: frozen_in_time, or the checkpoint's")
    attention: str = key("auto", "attention of space_time and of CLIP's image towers: a backend of frozen_kernels, or a plugin's; auto: the fastest measured", names=extensions.attention_backends)
    fused_ops: Literal["auto", "plain"] = key("auto", "space_time: residual norms and bias + GELU by frozen_kernels' fastest form for the device (Triton, C), or by PyTorch's operators")
    residual_dtype: Literal["fp32", "bf16"] = key("fp32", "space_time: dtype of the residual stream under bf16 autocast; bf16 halves the bytes of residual sums and norms and rounds every sum")
    time_init: Literal["zero_output", "released", "random"] = key("zero_output", "space_time: initial time attention. zero_output: output projection 0; released: qkv 0 and projection 1, as in the released code with more than one frame (queries and keys then get no gradient); random: as in the released code with one frame")
    position_init_std: float = key(0.02, "space_time: standard deviation of the initial position embeddings; a tower trained from scratch on little data needs about 1 to use positions", ge=0)
    temporal_init_std: float = key(0.0, "standard deviation of the initial temporal embeddings, added at the first expansion; 0: as in the paper", ge=0)
    skip_time_attention_at_one_frame: bool | None = key(None, "space_time: skip temporal attention in stages of one frame (changes the model); null: false, or the checkpoint's")
    checkpointed_blocks: int = key(0, "number of blocks whose activations are recomputed in the backward pass", ge=0)
    full_last_block: bool = key(False, "space_time: compute the last block's patch outputs too, although they are not used (for timing comparisons)")
    options: Named[Any] = key((), "settings of a plugin's tower (a mapping)")

    @model_validator(mode="after")
    def _size_is_the_towers(self) -> Self:
        if self.tower in (None, "space_time") and self.size is not None and self.size not in VIDEO_SIZES:
            refuse([("size", unknown_value(self.size, VIDEO_SIZES))])
        return self


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """The caption encoder."""

    tower: str | None = key(None, "transformers: any encoder of that library; clip: CLIP's; siglip: SigLIP's; or a plugin's; null: transformers, or the checkpoint's", names=extensions.text_towers)
    name: str | None = key(None, "transformers name, local folder, or package:MODULE/FOLDER inside an installed package; null: distilbert-base-uncased, or the checkpoint's", not_blank=True)
    weights: Literal["pretrained", "random"] = key("pretrained", "random: the architecture of name with random weights")
    tokenizer: str | None = key(None, "tokenizer name, local folder, or package:MODULE/FOLDER; null: the tower's, or the checkpoint's")
    max_tokens: int | None = key(None, "captions are truncated to this many tokens; null: 77 or the tower's maximum, or the checkpoint's", ge=3)
    frozen_layers: int = key(0, "freeze the embeddings and the first N layers; 0: freeze none", ge=0)
    pooling: Literal["auto", "cls", "mean", "pooler", "eos"] = key("auto", "cls: token 0; mean: over the caption's tokens; pooler: the model's own; eos: the caption's last token; auto: the checkpoint's, or that of the architecture's training (pooler for BERT, mean for T5, eos for CLIP), otherwise cls")
    heads: int | None = key(None, "attention heads of a released checkpoint's text tower, which the file does not contain; null: width / 64", ge=1)
    options: Named[Any] = key((), "settings of a plugin's tower (a mapping)")


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """One expert of a model that reads expert features."""

    name: str = key("", "name in the feature store: imagenet.senet154.0, face, ocr", not_blank=True)
    width: int = key(512, "width of a vector", ge=1)
    clusters: int = key(0, "NetVLAD clusters over an expert's vectors; 0: the store has one vector per video", ge=0)
    max_vectors: int = key(0, "with clusters: largest number of vectors read per video, padded with zeros", ge=0)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Models that read expert features (docs/experts.md); defaults are Collaborative Experts on MSR-VTT."""

    experts: tuple[ExpertConfig, ...] = key((), "experts that the model reads, processed in alphabetical order")
    width: int = key(768, "collaborative_experts: width of every expert's embedding", ge=1)
    gating: Literal["in_order", "parallel", "none"] = key("in_order", "collaborative_experts: in_order, as released: later experts use the gated features of earlier ones; parallel: all use the others' ungated features; none: each expert gates itself (CE - CG)")
    mixture: Literal["learned", "uniform"] = key("learned", "weights of the experts: learned from the caption, or uniform (MW)")
    compatible: bool = key(False, "concatenated_experts: score 0 if the text is wider than the video, as in the released code")
    mask_padding: bool = key(False, "exclude padding from NetVLAD; the released models include it")
    text: str = key("", "name of the store's text features; empty: the store has only one")
    text_width: int = key(768, "width of a token's features", ge=1)
    text_clusters: int = key(28, "NetVLAD clusters over a caption's tokens", ge=1)
    ghost_clusters: int = key(1, "clusters of the text that are used in the softmax only", ge=0)
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
    """CLIP2Video's sizes and initial weights; attention, fused_ops and checkpointed_blocks of model.video apply to its CLIP."""

    clip: str = key("", "CLIP weights to start from: OpenAI's .pt file, an open_clip file, a transformers folder, or open_clip:MODEL/TAG; empty: random weights")
    activation: Literal["auto", "quick_gelu", "gelu"] = key("auto", "CLIP's activation; auto: that of a transformers folder's config.json, otherwise quick_gelu (most weights of open_clip use gelu, which their files do not state)")
    size: str = key("ViT-B/32", "sizes of random weights: ViT-B/32, ViT-B/16, ViT-L/14, or tiny (for tests)", not_blank=True)
    centers: int = key(5, "shared centres of the temporal alignment block (7 on VATEX)", ge=1)
    temporal_layers: int = key(4, "layers of the transformer over frames and their differences", ge=1)
    compatible_masks: bool = key(False, "reproduce the masks of short clips of the released code, for its weights; scores then depend on the other clips of a batch")
    max_tokens: int = key(32, "captions are truncated to this many tokens, including start and end", ge=3, le=77)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model."""

    kind: str = key("frozen", "frozen: the paper's dual encoder; clip2video; collaborative_experts, moee, concatenated_experts: models of expert features; classifier: action recognition, a linear head on the video tower of model.video or model.checkpoint (section classification); or a plugin's", names=extensions.models)
    checkpoint: str | None = key(None, "start from this frozen_fast checkpoint folder, run folder (its best checkpoint, otherwise its newest) or released .pth/.pth.tar file; the checkpoint defines the model, and keys that contradict it are errors")
    video: VideoTowerConfig = section(VideoTowerConfig, "video tower")
    text: TextTowerConfig = section(TextTowerConfig, "text tower")
    embedding_width: int | None = key(None, "width of the common space; 0: no projections, the towers' outputs are compared directly (the towers clip); null: 256, or the checkpoint's", ge=0)
    text_activation: Literal["relu", "none"] | None = key(None, "activation before the text projection: relu as released, none as in the paper; null: relu, or the checkpoint's")
    expansion: Expansion = key("zero", "how temporal embeddings for m frames become embeddings for M > m")
    experts: ExpertsConfig = section(ExpertsConfig, "models of expert features")
    clip2video: Clip2VideoConfig = section(Clip2VideoConfig, "CLIP2Video")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One collection of clips with captions."""

    name: str = key("", "name in reports; empty: the format")
    format: str = key("manifest", "layout on disk: a name of config.extensions.layouts (docs/datasets.md lists them), or of a plugin", names=extensions.layouts)
    path: str = key("", "manifest file, the data set's root folder, or the folder of packed shards")
    split: str = key("train", "train, val or test (manifest: the split of its lines; empty: all lines of a manifest, all clips of shards)")
    split_version: str = key("", "version of the data set's splits, if it has several (docs/datasets.md): msrvtt 1k-A, 1k-B or full, ucf101 1, 2 or 3")
    split_counts: Literal["warn", "error", "off"] = key("warn", "action if the number of clips in the annotation differs from the published one; missing files do not matter")
    columns: Named[str] = key((), "csv and parquet: names of the file's columns for id, path, caption, kind, split, label, start_seconds, end_seconds (a mapping in YAML)")
    captions: Literal["random", "first", "paragraph", "all"] = key("random", "random: training draws one, evaluation uses all; first: the first; paragraph: training joins a random number, evaluation all; all: training joins all, evaluation uses all")
    max_caption_characters: int = key(350, "captions are truncated to this length, 0: no limit", ge=0)
    caption_masks: str | None = key(None, "features: pickle with 0 or 1 for each caption of a video; training uses the captions with 1 (TeachText's denoising)")
    twins_together: bool = key(False, "training reads a clip and its twin (a field of the manifest) one after the other, so that a batch contains both as negatives")
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
    horizontal_flip: float = key(0.5, "probability of a horizontal flip; use 0 if captions mention left and right", ge=0, le=1)
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
    """How frames are sampled from a clip."""

    rule: Literal["segments", "fixed_rate"] = key("segments", "segments: one frame of each of T equal segments, short clips repeat frames; fixed_rate: T of the frames at a fixed rate, short clips are padded and masked (CLIP2Video; for models that support masks)")
    frames_per_second: float = key(5.0, "fixed_rate: rate of the frames to choose from", gt=0)
    divisor: int = key(1, "fixed_rate: keep one of every N of those frames (2 on MSR-VTT, 1 on MSVD and VATEX)", ge=1)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How clips are decoded."""

    backend: str = key("auto", "decoder: dali, torchcodec, decord, pyav, or a plugin's; auto selects the fastest that supports the codec on this device", names=extensions.decoders)
    threads: int | None = key(None, "decoding threads of one loader process or background thread; null: by device (docs/data.md)", ge=1)
    workers: int | None = key(None, "loader processes (torchcodec, decord, pyav); 0: a background thread; null: on a GPU one per core of a rank except one (dali: 0), on a CPU 0", ge=0)
    prefetch_batches: int | None = key(None, "batches decoded ahead; null: two parts of a batch per worker, or 2 batches with the background thread", ge=1)
    resize: Literal["auto", "cpu", "device"] = key("auto", "where training crops are resized to the model's resolution: cpu: after decoding; device: on the training device, one resize per batch (crops with more than twice the model's pixels are always resized on the CPU); auto: device on a GPU, cpu otherwise")
    on_bad_clip: Literal["auto", "error", "skip"] = key("auto", "auto: skip in training, error in evaluation")
    max_bad_share: float = key(0.05, "a run fails if the share of unreadable clips exceeds this", ge=0, le=1)
    max_pixels: int = key(50_000_000, "an image or frame with more pixels is a bad clip", ge=1)
    read_timeout_seconds: float = key(120.0, "limit for a batch; a batch that takes longer is an error", gt=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data."""

    sources: tuple[SourceConfig, ...] = key((), "training sources; each batch comes from one of them")
    order: Literal["round_robin", "weighted"] = key("round_robin", "order of the sources' steps: alternating by weight, or drawn at random by weight")
    epoch_ends: Literal["first", "shortest", "longest", "all"] = key("first", "an epoch ends when this has been read once: the first source, the one with the fewest clips, the one with the most clips, or every source")
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
    """The stages and their budget."""

    stages: tuple[StageConfig, ...] = key((StageConfig(steps=100),), "stages in order; the number of frames may not decrease")
    budget_clips: int | None = key(None, "clips of the whole run; stages with a share need one of budget_clips and budget_epochs", ge=1)
    budget_epochs: float | None = key(None, "epochs of the whole run", gt=0)
    gradient_accumulation_steps: int = key(1, "forward passes per optimizer step; a clip's negatives come from its own pass, so four passes of 24 clips differ from one pass of 96", ge=1)

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

    match: str = key("", "pattern of parameter names, * matches any text: text_model.*, video_model.blocks.*, loss_scale.*", not_blank=True)
    learning_rate_scale: float | None = key(None, "factor on optimizer.learning_rate; null: unchanged", ge=0)
    weight_decay: float | None = key(None, "weight decay; null: unchanged", ge=0)
    frozen: bool | None = key(None, "true: the parameters are not trained; null: unchanged")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: str = key("adamw", "adamw, adam, radam, ranger (RAdam with Lookahead), lion, lamb, or a plugin's", names=extensions.optimizers)
    groups: tuple[OptimizerGroupConfig, ...] = key((), "learning rate, weight decay or freezing for a part of the model")
    learning_rate: float = key(3e-5, "peak learning rate", gt=0)
    betas: tuple[Beta, Beta] = key((0.9, 0.999), "decay rates of the running averages")
    eps: float = key(1e-6, "added to the denominator", gt=0)
    weight_decay: float = key(0.0, "weight decay; biases, norms and position embeddings are exempt (unless decay_all)", ge=0)
    decay_all: bool = key(False, "weight decay for every parameter, as in the released expert models")
    text_learning_rate_scale: float = key(1.0, "deprecated, use groups: factor on the learning rate of the text tower", ge=0)
    position_learning_rate_scale: float = key(1.0, "deprecated, use groups: factor on the learning rate of the video tower's CLS token, position and temporal embeddings", ge=0)
    weight_average_decay: float = key(0.0, "exponential moving average of the weights: decay per step, such as 0.999; evaluations use the average, and checkpoints store it as a model in averaged/; 0: no average", ge=0, lt=1)
    gradient_clip_norm: float = key(0.0, "largest gradient norm, 0: no clipping", ge=0)
    schedule: Literal["constant", "cosine", "epoch_decay"] = key("constant", "learning rate after warm-up; epoch_decay multiplies it by optimizer.epoch_factor after each epoch (data.epoch_ends)")
    epoch_factor: float = key(0.95, "epoch_decay: factor on the learning rate per epoch", gt=0, le=1)
    warmup_steps: int = key(0, "linear warm-up, optimizer steps", ge=0)
    fused: Literal["auto", "on", "off"] = key("auto", "use the optimizer's fused kernel if it has one")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training loss."""

    name: str = key("infonce", "infonce: cross-entropy in both directions; sigmoid: SigLIP's; max_margin: Collaborative Experts'; or a plugin's", names=extensions.losses)
    temperature: float = key(0.05, "infonce and sigmoid: divides the similarities; the initial value if it is learned", gt=0)
    learnable_temperature: bool = key(False, "learn the temperature (and the bias of sigmoid) with the model, as CLIP does")
    max_logit_scale: float = key(100.0, "maximum of 1 / temperature if it is learned", gt=0)
    sigmoid_bias: float = key(-10.0, "sigmoid: added to the scaled similarities; the initial value if it is learned")
    average_directions: bool = key(False, "infonce: use the mean of both directions (CLIP) instead of their sum (the paper)")
    margin: float = key(0.2, "max_margin: margin between the similarities of matching and other pairs", ge=0)
    local: bool = key(True, "each rank computes the rows of its own clips only (same value and gradient)")
    chunk_rows: int = key(0, "rows of logits computed at once, 0: all", ge=0)
    gather: Literal["fp32", "bf16"] = key("fp32", "dtype in which ranks send each other their features; bf16 halves the bytes and rounds the features; their gradients are summed in fp32")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Training a classifier (model.kind: classifier) on sources whose clips carry a class."""

    classes: str | None = key(None, "text file with one class per line, in the order of the logits; null: the sorted classes of data.sources", not_blank=True)
    head: Literal["random", "class_names"] = key("random", "initial weights of the head: random; class_names: text embeddings of the class names by model.checkpoint (a retrieval checkpoint with a tokenizer), so that the initial top-1 is that of zero-shot classification with classification.prompts")
    prompts: tuple[str, ...] = key(("{}",), "with head class_names: texts with {} for the class name, whose embeddings are averaged")
    label_smoothing: float = key(0.0, "share of the target that is distributed over all classes", ge=0, lt=1)
    mixup: float = key(0.0, "parameter of the Beta distribution that mixes the clips and classes of a rank's batch in pairs, 0: no mixup", ge=0)
    dropout: float = key(0.0, "dropout probability of the tower's output, before the head", ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One teacher: a model of this project, or embeddings that TeachText released."""

    checkpoint: str | None = key(None, "a frozen_fast checkpoint folder, or a released file (with kind)")
    kind: str | None = key(None, "model kind of a released file; null: read from the folder", names=extensions.models)
    pickle: str | None = key(None, "released embeddings of the training videos and captions, instead of a checkpoint")
    text: str = key("", "models of expert features: the store's text features that this teacher reads; empty: the student's")
    frames: int | None = key(None, "frames per clip for this teacher; the student gets a subset of them; null: as many as the stage", ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.checkpoint is None) == (self.pickle is None):
            refuse([("", "got a checkpoint and a pickle, or neither; allowed: one of the two")])
        return self


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Distillation from the teachers' mean similarity, in addition to the loss."""

    teachers: tuple[TeacherConfig, ...] = key((), "frozen models or released embeddings; empty: no distillation")
    weight: float = key(1.0, "factor on the distillation loss", ge=0)
    beta: float = key(1.0, "Smooth L1: differences below this are squared", gt=0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Precision, device and compilation."""

    precision: Literal["auto", "bf16", "fp32"] = key("auto", "bf16: autocast over fp32 weights; auto: bf16 if the device supports it in hardware, otherwise fp32, with a log line; bf16 without hardware support is slow and logs a warning")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: CUDA if available")
    compile: bool = key(False, "torch.compile of the video tower's blocks and the text tower")
    expected_world_size: int | None = key(None, "end with an error if the number of processes differs", ge=1)
    log_every_steps: int = key(10, "steps between lines of the log (steps.jsonl has every step)", ge=1)
    gradient_exchange: Literal["fp32", "bf16"] = key("fp32", "dtype in which DDP reduces gradients between processes; bf16 halves the bytes and rounds each process's gradient; other strategies support fp32 only")
    on_non_finite: Literal["stop", "skip", "roll_back"] = key("stop", "if a loss or a gradient is NaN or infinite: stop ends the run with exit code 2; skip omits the update on every rank; roll_back loads the last checkpoint and continues with the clips in another order")
    max_skips: int = key(20, "skip: largest number of consecutive skipped steps; one more ends the run", ge=1)
    max_roll_backs: int = key(3, "roll_back: largest number of roll-backs of a run; one more ends the run", ge=1)
    on_out_of_memory: Literal["stop", "smaller_micro_batch"] = key("stop", "if a device runs out of memory: stop ends the run with exit code 2; smaller_micro_batch halves the batch of a pass on every rank and accumulates gradients, with the same clips in a step but fewer negatives for each (not with zero3, fsdp2 or offload)")
    deterministic: bool = key(False, "torch.use_deterministic_algorithms: the same numbers in every run on a GPU, slower; an operator without a deterministic form ends the run with exit code 2")
    measure_peak: Literal["auto", "on", "off"] = key("auto", "time a large matrix product before the first stage, for mfu_measured_peak; takes about a second on a GPU; auto: on a GPU")
    profile_steps: int = key(0, "number of steps of each stage to trace with torch.profiler: writes a Chrome trace to traces/ and the most expensive kernels to the report", ge=0)


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Time limits of each phase; when one is exceeded, every rank writes its stacks to hangs/ and the run exits with 1."""

    start_minutes: float = key(60.0, "time before the first stage: reading sources, building the model, 0: no limit", ge=0)
    first_step_minutes: float = key(60.0, "first step of a stage, which may compile, 0: no limit", ge=0)
    step_minutes: float = key(30.0, "any other step, including the wait for its batch, 0: no limit", ge=0)
    evaluation_minutes: float = key(240.0, "an evaluation, 0: no limit", ge=0)
    checkpoint_minutes: float = key(60.0, "a snapshot for a checkpoint, 0: no limit", ge=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_steps: int = key(500, "optimizer steps between checkpoints, 0: only at stage ends", ge=0)
    every_minutes: float = key(30.0, "minutes between checkpoints, in addition to every_steps, 0: by steps only", ge=0)
    keep: int = key(2, "number of newest checkpoints to keep, in addition to the best (evaluation.keep_best)", ge=1)
    keep_every_steps: int = key(0, "also keep checkpoints whose step is a multiple of this, 0: none", ge=0)
    keep_stage_ends: bool = key(False, "also keep the checkpoint at the end of each stage")
    asynchronous: bool = key(True, "a thread writes a snapshot in host memory (as large as weights and optimizer state) while training continues; false: training waits")
    give_up_minutes: float = key(60.0, "end the run if no checkpoint can be written for this long; until then writing is retried", gt=0)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Retrieval on held-out clips."""

    sources: tuple[SourceConfig, ...] = key((), "sources to evaluate; empty: no evaluation")
    every: Literal["epoch", "stage", "end", "never"] = key("stage", "after each epoch (data.epoch_ends) of a stage and at its end, after each stage, after the last, or not at all")
    metrics: tuple[Annotated[str, OneOf(extensions.metrics)], ...] = key(("retrieval",), "families of metrics to compute: retrieval (recall and ranks), or a plugin's")
    keep_best: str = key("none", "keep the checkpoint with the best value on the first of evaluation.sources as checkpoints/best: validation_loss (the training loss of its clips in batches of the last stage's size, as the paper chooses epochs), or any metric such as t2v/R@1; none: keep none")
    patience: int = key(0, "early stopping: end the run after this many evaluations in a row without a better value of keep_best, 0: never", ge=0)
    protocol: Literal["auto", "plain", "several_captions", "paragraph"] = key("auto", "auto: by the number of captions per clip")
    gallery: int = key(0, "number of queries on the retrieval page of each source, with the 5 clips ranked first; the page also shows the best and worst queries (gallery_SOURCE.html in the run folder, from the last evaluation; frozen-fast evaluate writes it to the folder of --output), 0: no page", ge=0)
    gallery_videos: str | None = key(None, "folder with ID.mp4 for the retrieval page, for sources without videos (feature stores)")
    rerank: tuple[Literal["dual_softmax", "qb_norm"], ...] = key((), "re-ranking methods, reported in separate rows: dual_softmax over the test set, qb_norm with captions of data.sources[0] as querybank (text to video)")
    dual_softmax_scale: float = key(100.0, "dual_softmax: factor on the similarities inside the softmax", gt=0)
    querybank_size: int = key(5000, "qb_norm: number of captions in the querybank, one per clip, of clips at even intervals in data.sources[0]", ge=1)
    querybank_beta: float = key(20.0, "qb_norm: factor on the similarities inside the inverted softmax", gt=0)
    prompts: tuple[str, ...] = key((), "zero-shot classification of sources with class labels: texts with {} for the class name, whose similarities are averaged; empty: retrieval only")
    linear_head: bool = key(False, "action recognition: fit a linear layer on the frozen model's clip embeddings of the training split (the entry of data.sources with the format, path and split_version of the evaluation source) and classify with it")
    linear_head_smoothing: float = key(0.1, "linear_head: label smoothing", ge=0, lt=1)
    linear_head_decay: float = key(0.01, "linear_head: weight decay of its objective, on standardised features", gt=0)
    average_sources: bool = key(False, "the report and the output of evaluate add mean and deviation over the sources: the folds of COCO's 1k protocol, the splits of UCF101 and HMDB51")
    frames: int | None = key(None, "frames per window, at most the number that the model has learned so far; null: those of the stage, or of the checkpoint", ge=1)
    stride_seconds: float = key(2.0, "seconds between test windows inside a segment; 0: one window in the middle", ge=0)
    max_windows: int = key(0, "largest number of windows per clip, evenly spread, 0: all", ge=0)
    crops: Literal[1, 3] = key(1, "views of each window: 1: centre crop; 3: also the crops at both ends of the longer side; embeddings are averaged over windows and crops (a classifier's: probabilities)")
    batch_size: int = key(32, "windows per forward pass on a rank", ge=1)
    resize: int = key(256, "short side before the centre crop, for a 224 model; scaled with the resolution", ge=1)
    embedding_cache: str | None = key(None, "folder in which frozen-fast evaluate caches the features of clips, keyed by the model's weights, the clip's file with its size and modification time, frames, windows, crops and all other settings that change them; null: no cache (evaluations inside a run never use it)", not_blank=True)
    embedding_cache_gigabytes: float = key(20.0, "largest size of that folder; the least recently used files are deleted", gt=0)

    @model_validator(mode="after")
    def _sources_are_sound(self) -> Self:
        check_sources(self.sources)
        return self

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> Self:
        if self.keep_best != "none" and (not self.sources or self.every == "never"):
            why = "no evaluation.sources" if not self.sources else "evaluation.every: never"
            refuse([("keep_best", f"got {self.keep_best!r} with {why}; allowed: none, or something to evaluate")])
        if self.patience and self.keep_best == "none":
            refuse([("patience", f"got {self.patience} with keep_best: none; allowed: 0, or a metric as keep_best")])
        return self


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Experiment trackers. Set their addresses and credentials with their environment variables (WANDB_API_KEY, MLFLOW_TRACKING_URI)."""

    trackers: tuple[Annotated[str, OneOf(extensions.trackers)], ...] = key((), "trackers to log to, in addition to the run folder: tensorboard, wandb, mlflow and Accelerate's others, or a plugin's")
    project: str = key("frozen_fast", "project or experiment name in the tracker", not_blank=True)
    run_name: str | None = key(None, "name of the run in the tracker; null: the experiment's name")
    wandb_mode: Literal["online", "offline"] = key("online", "wandb: online, or write files for `wandb sync`")


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
    run_folder: str = key("runs/{name}", "folder for results; {name} is the experiment's name", not_blank=True)
    paper_row: Literal["none", "1", "4", "1=>4", "8", "1=>4=>8"] = key("none", "row of the paper's Table 4 that this experiment follows")
    paper: PaperConfig = section(PaperConfig, "row of a printed table")
    model: ModelConfig = section(ModelConfig, "model")
    data: DataConfig = section(DataConfig, "training data")
    curriculum: CurriculumConfig = section(CurriculumConfig, "stages")
    optimizer: OptimizerConfig = section(OptimizerConfig, "optimizer")
    loss: LossConfig = section(LossConfig, "loss")
    classification: ClassificationConfig = section(ClassificationConfig, "action recognition")
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
