"""Tables of the exchangeable parts: the names that a config may use, and the code for each name.

To add a part, write a file and add a line to its table. Another package adds parts with the entry point group
`frozen_fast.plugins`; an entry's name is TABLE.NAME:

    [project.entry-points."frozen_fast.plugins"]
    "video_towers.my_tower" = "my_package.towers:MyTower"

A part is imported when it is loaded, so importing this file imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from frozen_fast.errors import UserError, reason, unknown_name

PLUGIN_GROUP = "frozen_fast.plugins"


class ExtensionPoint:
    """The parts of one kind, by name.

    Attributes:
        kind: the table's name, the first half of a plugin's entry point name.
        key: the config key that selects a part, for messages.
    """

    def __init__(self, kind: str, key: str, built_in: Mapping[str, str]) -> None:
        """Store the table.

        Args:
            kind: the table's name.
            key: the config key that selects a part.
            built_in: name -> "module:attribute".
        """
        self.kind = kind
        self.key = key
        self._built_in = dict(built_in)

    def names(self) -> tuple[str, ...]:
        """Return the names that the config key accepts: built-in parts, then plugins."""
        return (*self._built_in, *sorted(set(_plugins(self.kind)) - set(self._built_in)))

    def built_in(self) -> tuple[str, ...]:
        """Return the names of the built-in parts."""
        return tuple(self._built_in)

    def check(self, name: str, key: str | None = None) -> None:
        """Check a name without importing the part.

        Args:
            name: what the config says.
            key: the config key for messages, if several keys select such a part.

        Raises:
            UserError: naming the key and the allowed names.
        """
        if name not in self.names():
            raise unknown_name(key or self.key, name, self.names())

    def load(self, name: str, key: str | None = None) -> Any:
        """Import a part.

        Raises:
            UserError: for an unknown name, or a plugin that cannot be imported.
        """
        self.check(name, key)
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            return getattr(import_module(module), attribute)
        entry = _plugins(self.kind)[name]
        try:
            return entry.load()
        except Exception as error:  # a plugin can raise anything: report it in one line
            got = f"got {name!r}, a plugin that cannot be loaded ({reason(error)})"
            raise UserError(f"{key or self.key}: {got}; allowed: {', '.join(self.names())}") from error


@lru_cache
def _all_plugins() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=PLUGIN_GROUP))


def _plugins(kind: str) -> dict[str, EntryPoint]:
    prefix = f"{kind}."
    return {entry.name.removeprefix(prefix): entry for entry in _all_plugins() if entry.name.startswith(prefix)}


models = ExtensionPoint(
    "models",
    "model.kind",
    {
        "frozen": "frozen_fast.models.dual_encoder:DualEncoder",
        "collaborative_experts": "frozen_fast.models.experts.expert_model:CollaborativeExperts",
        "moee": "frozen_fast.models.experts.expert_model:MixtureOfExperts",
        "concatenated_experts": "frozen_fast.models.experts.expert_model:ConcatenatedExperts",
        "clip2video": "frozen_fast.models.clip2video.clip2video_model:Clip2Video",
        "classifier": "frozen_fast.models.classifier:Classifier",
    },
)
"""frozen_fast.models.retrieval_model.RetrievalModel classes."""

tasks = ExtensionPoint(
    "tasks",
    "task of model.kind",
    {
        "retrieval": "frozen_fast.training.retrieval_task:RetrievalTask",
        "classification": "frozen_fast.training.classification_task:ClassificationTask",
    },
)
"""frozen_fast.training.task.Task classes; a model's class names its own (RetrievalModel.task)."""

model_methods = ExtensionPoint(
    "model_methods",
    "method of a model",
    {
        "embed_videos": "frozen_fast.search.embed:embed_videos",
    },
)
"""What every model offers and floors above the models provide: functions of a RetrievalModel and arguments."""

losses = ExtensionPoint(
    "losses",
    "loss.name",
    {
        "infonce": "frozen_fast.losses.contrastive:InfoNCE",
        "sigmoid": "frozen_fast.losses.sigmoid:SigmoidLoss",
        "max_margin": "frozen_fast.losses.max_margin:MaxMarginLoss",
    },
)
"""frozen_fast.losses.retrieval_loss.RetrievalLoss classes."""

metrics = ExtensionPoint(
    "metrics",
    "evaluation.metrics",
    {
        "retrieval": "frozen_fast.evaluation.metric_table:RETRIEVAL",
    },
)
"""frozen_fast.evaluation.metric_table.MetricFamily objects."""

_SOURCES = "frozen_fast.data.sources"
layouts = ExtensionPoint(
    "layouts",
    "data.sources[i].format",
    {
        "manifest": f"{_SOURCES}.manifest:MANIFEST",
        "shards": f"{_SOURCES}.packed_shards:SHARDS",
        "features": f"{_SOURCES}.expert_features:FEATURES",
        "csv": f"{_SOURCES}.caption_tables:CSV",
        "parquet": f"{_SOURCES}.caption_tables:PARQUET",
        "webvid": f"{_SOURCES}.webvid:WEBVID",
        "cc3m": f"{_SOURCES}.cc3m:CC3M",
        "howto100m": f"{_SOURCES}.howto100m:HOWTO100M",
        "msrvtt": f"{_SOURCES}.msrvtt:MSRVTT",
        "msrvtt_clip4clip": f"{_SOURCES}.msrvtt:MSRVTT_CLIP4CLIP",
        "msvd": f"{_SOURCES}.msvd:MSVD",
        "didemo": f"{_SOURCES}.didemo:DIDEMO",
        "lsmdc": f"{_SOURCES}.lsmdc:LSMDC",
        "lsmdc_clip4clip": f"{_SOURCES}.lsmdc:LSMDC_CLIP4CLIP",
        "activitynet": f"{_SOURCES}.activitynet:ACTIVITYNET",
        "vatex": f"{_SOURCES}.vatex:VATEX",
        "flickr30k": f"{_SOURCES}.karpathy:FLICKR30K",
        "coco": f"{_SOURCES}.karpathy:COCO",
        "kinetics400": f"{_SOURCES}.kinetics:KINETICS400",
        "ucf101": f"{_SOURCES}.ucf101:UCF101",
        "hmdb51": f"{_SOURCES}.hmdb51:HMDB51",
        "something_v2": f"{_SOURCES}.something_something:SOMETHING_V2",
    },
)
"""frozen_fast.data.sources.Layout objects: data set layouts."""

decoders = ExtensionPoint(
    "decoders",
    "data.decode.backend",
    {
        "auto": "frozen_fast.data.decode.backends:AUTO",
        "dali": "frozen_fast.data.decode.backends:DALI",
        "torchcodec": "frozen_fast.data.decode.backends:TORCHCODEC",
        "decord": "frozen_fast.data.decode.backends:DECORD",
        "pyav": "frozen_fast.data.decode.backends:PYAV",
    },
)
"""frozen_fast.data.decode.backends.DecoderKind objects."""

optimizers = ExtensionPoint(
    "optimizers",
    "optimizer.name",
    {
        "adamw": "frozen_fast.optimizers.kinds:ADAMW",
        "adam": "frozen_fast.optimizers.kinds:ADAM",
        "radam": "frozen_fast.optimizers.kinds:RADAM",
        "ranger": "frozen_fast.optimizers.kinds:RANGER",
        "lion": "frozen_fast.optimizers.kinds:LION",
        "lamb": "frozen_fast.optimizers.kinds:LAMB",
    },
)
"""frozen_fast.optimizers.kinds.OptimizerKind objects."""

strategies = ExtensionPoint(
    "strategies",
    "accelerate config",
    {
        "ddp": "frozen_fast.parallel.base:Parallel",
        "deepspeed": "frozen_fast.parallel.deepspeed:DeepSpeedParallel",
        "fsdp2": "frozen_fast.parallel.fsdp:FsdpParallel",
    },
)
"""frozen_fast.parallel.base.Parallel classes; selected by the accelerate config of the launch."""

trackers = ExtensionPoint(
    "trackers",
    "tracking.trackers",
    {
        "tensorboard": "frozen_fast.records.trackers:tensorboard",
        "wandb": "frozen_fast.records.trackers:wandb",
        "mlflow": "frozen_fast.records.trackers:mlflow",
        "comet_ml": "frozen_fast.records.trackers:comet_ml",
        "aim": "frozen_fast.records.trackers:aim",
        "clearml": "frozen_fast.records.trackers:clearml",
        "dvclive": "frozen_fast.records.trackers:dvclive",
        "swanlab": "frozen_fast.records.trackers:swanlab",
        "trackio": "frozen_fast.records.trackers:trackio",
    },
)
"""Functions from frozen_fast.records.tracking.TrackedRun to an accelerate.tracking.GeneralTracker."""

_REPORT = "frozen_fast.report"
report_sections = ExtensionPoint(
    "report_sections",
    "report section",
    {
        "state": f"{_REPORT}.state_section:state_section",
        "retrieval": f"{_REPORT}.retrieval:retrieval_section",
        "gallery": f"{_REPORT}.gallery_section:gallery_section",
        "mean_over_sources": f"{_REPORT}.mean_over_sources:mean_over_sources_section",
        "published": f"{_REPORT}.published_comparison:published_section",
        "reranked": f"{_REPORT}.reranked:reranked_section",
        "classification": f"{_REPORT}.classification_section:classification_section",
        "stages": f"{_REPORT}.stages_section:stages_section",
        "paper": f"{_REPORT}.paper_section:paper_section",
        "loss": f"{_REPORT}.loss_section:loss_section",
        "sources": f"{_REPORT}.clips:sources_section",
        "bad_clips": f"{_REPORT}.clips:bad_clips_section",
        "batch_sizes": f"{_REPORT}.batch_sizes_section:batch_sizes_section",
        "profile": f"{_REPORT}.profile_section:profile_section",
        "machine": f"{_REPORT}.machine_section:machine_section",
        "config": f"{_REPORT}.config_section:config_section",
    },
)
"""Functions from a run (frozen_fast.report.run_data.RunData) to a Section, or to None for no section; the report
has the sections in this order, those of plugins last."""

video_towers = ExtensionPoint(
    "video_towers",
    "model.video.tower",
    {
        "space_time": "frozen_fast.models.video.space_time:SpaceTimeTransformer",
        "timm": "frozen_fast.models.video.timm_frames:TimmFrames",
        "clip": "frozen_fast.models.clip.clip_frames:ClipFrames",
        "clip_divided": "frozen_fast.models.clip.clip_divided:ClipDivided",
        "siglip": "frozen_fast.models.clip.siglip_frames:SiglipFrames",
        "torchvision_video": "frozen_fast.models.video.torchvision_video:TorchvisionVideo",
    },
)
"""frozen_fast.models.video.video_tower.VideoTower classes."""

_ATTENTION = "frozen_kernels.attention"
attention_backends = ExtensionPoint(
    "attention_backends",
    "model.video.attention",
    {
        "auto": f"{_ATTENTION}.selection:choose_backend",
        "reference": f"{_ATTENTION}.reference:attention_reference",
        "sdpa": f"{_ATTENTION}.sdpa:attention_sdpa",
        "cpu_c": f"{_ATTENTION}.cpu_c:attention_cpu_c",
        "xformers": f"{_ATTENTION}.xformers:attention_xformers",
        "triton": f"{_ATTENTION}.triton:attention_triton",
    },
)
"""frozen_kernels holds the built-in ones and tells which can run; a plugin is a frozen_kernels.Backend."""

text_towers = ExtensionPoint(
    "text_towers",
    "model.text.tower",
    {
        "transformers": "frozen_fast.models.text.transformers_tower:TransformersTower",
        "clip": "frozen_fast.models.clip.clip_captions:ClipCaptions",
        "siglip": "frozen_fast.models.clip.siglip_captions:SiglipCaptions",
    },
)
"""frozen_fast.models.text.text_tower.TextTower classes."""
