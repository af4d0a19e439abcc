"""CLIP2Video (Fang et al. 2021, arXiv 2106.11097): CLIP with a Temporal Difference and a Temporal Alignment Block.

Parameter names are those of the released checkpoints. Axis letters: Q captions, V clips, T frames, C channels, H and W
pixels, L text tokens, S tokens of a clip, D width, E width of the common space (here E = D), K centres.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.common.autocast import without_autocast
from frozen_fast.config.schema import ModelConfig
from frozen_fast.errors import UserError, unknown_name
from frozen_fast.models.clip.clip_blocks import ClipTransformer, settle_sequences
from frozen_fast.models.clip.clip_tokenizer import ClipTokenizer
from frozen_fast.models.clip.clip_towers import (
    CLIP_MEAN,
    CLIP_SIZES,
    CLIP_STD,
    Clip,
    ClipImageTower,
    ClipSize,
    ClipTextTower,
    end_of_text,
)
from frozen_fast.models.clip.clip_weights import ClipWeights, read_clip
from frozen_fast.models.clip2video.clip2video_checkpoint import clip_tokenizer_for, read_clip2video
from frozen_fast.models.clip2video.frame_masks import aligned, key_scores, masked_mean
from frozen_fast.models.counted_flops import counted_flops
from frozen_fast.models.learned_scale import with_ceiling
from frozen_fast.models.model_folder import write_model_folder
from frozen_fast.models.pixels import PixelNormalisation
from frozen_fast.models.pretrained import load_weights, read_run
from frozen_fast.models.retrieval_model import Features, RetrievalModel, SideFlops, TextInput, VideoInput
from frozen_fast.models.video.blocks import FusedOps
from frozen_fast.models.video.kernel_choice import AUTO_ATTENTION, kernels_of

TEMPORAL_NORM_EPS = 1e-12
"""Epsilon of the LayerNorms inside the temporal transformers."""

CENTER_STD = 0.125
DEFAULT_CENTERS = 5
"""K for MSR-VTT and MSVD; VATEX uses 7."""

MAX_TOKENS = 32
TEMPORAL_DEPTH = 4
LARGEST_SCALE = 100.0


class Clip2Video(RetrievalModel):
    """CLIP per frame, frame differences between the frames, and two similarities per pair.

    The global similarity compares the caption's end-of-text embedding with the mean of the frames after a transformer
    over frames and frame differences. The aligned similarity compares words and frames aggregated at shared centres.
    Both are multiplied by exp(logit scale). The model ranks by their mean, and training averages their losses.

    Attributes:
        compatible_masks: reproduce the released code's error in the masks of short videos (frame_masks.key_scores). A
            score then depends on the other clips of the batch.
        mean, std: CLIP's normalisation, which is applied to uint8 clips.
        max_scale: largest exp(logit scale).
    """

    kind = "clip2video"
    takes_frame_masks = True
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        size: ClipSize,
        *,
        centers: int = DEFAULT_CENTERS,
        temporal_depth: int = TEMPORAL_DEPTH,
        compatible_masks: bool = False,
        max_scale: float = LARGEST_SCALE,
        tokenizer: ClipTokenizer | None = None,
        **options: Any,
    ) -> None:
        """Build the model with random weights; start_from_clip initialises it as published.

        Args:
            size: CLIP's sizes; the text width must equal that of the common space.
            centers: K.
            temporal_depth: blocks of the transformer over frames and differences.
            compatible_masks: see the attribute.
            max_scale: see the attribute.
            tokenizer: tokenizer for captions; None: the model accepts token ids only.
            options: attention, fused_ops and checkpointed_blocks of Clip.
        """
        super().__init__()
        if size.text_width != size.embedding:
            got = f"text width {size.text_width} and common width {size.embedding}"
            raise UserError(f"clip2video: got a CLIP of {got}; allowed: equal ones, as in ViT-B/32")
        if centers < 1:
            raise UserError(f"centers: got {centers}; allowed: 1 or more")
        self.clip = Clip(size, **options)
        self._attention = str(options.get("attention", AUTO_ATTENTION))
        self._fused_ops = str(options.get("fused_ops", "auto"))
        self.compatible_masks = compatible_masks
        self.max_scale = max_scale
        self._tokenizer = tokenizer
        self.learned_frames = size.context
        self.mean, self.std = CLIP_MEAN, CLIP_STD
        self.pixels = PixelNormalisation(self.mean, self.std)
        width = size.embedding
        temporal = {"eps": TEMPORAL_NORM_EPS, "activation": "quick_gelu", "fused_ops": options.get("fused_ops", "auto")}
        self.frame_position_embeddings = nn.Embedding(size.context, width)
        self.type_position_embeddings = nn.Embedding(2, width)
        self.transformerClip = ClipTransformer(width, temporal_depth, size.text_heads, **temporal)
        self.frame2t_attention = ClipTransformer(width, 1, size.text_heads, **temporal)
        self.actionClip = ClipTransformer(width, 1, size.text_heads, **temporal)
        self.trans_layernorm = nn.LayerNorm(width)
        self.weight_center = nn.Parameter(CENTER_STD * torch.randn(centers, width))
        self.emb_center = nn.Parameter(CENTER_STD * torch.randn(centers, width))

    @property
    def tokenizer(self) -> ClipTokenizer | None:
        """CLIP's tokenizer, if the extra clip is installed."""
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weight_center.device

    @property
    def resolution(self) -> int:
        """Pixels along a frame's edge."""
        return self.clip.visual.resolution

    @property
    def centers(self) -> int:
        """K."""
        return len(self.weight_center)

    @classmethod
    def from_config(cls, config: ModelConfig) -> Clip2Video:
        """Initialise from CLIP's weights as model.clip2video says, or load model.checkpoint.

        Raises:
            UserError: a key under model.clip2video, a file that cannot be read, or no tokenizer (extra clip).
        """
        section = config.clip2video
        how: dict[str, Any] = {
            "attention": config.video.attention,
            "fused_ops": config.video.fused_ops,
            "checkpointed_blocks": config.video.checkpointed_blocks,
        }
        if config.checkpoint is not None:
            wrong_masks = True if section.compatible_masks else None
            model = cls.from_pretrained(Path(config.checkpoint), compatible_masks=wrong_masks, **how).train()
        else:
            activation = None if section.activation == "auto" else section.activation
            weights = read_clip(section.clip, activation) if section.clip else None
            if weights is None and section.size not in CLIP_SIZES:
                raise unknown_name("model.clip2video.size", section.size, CLIP_SIZES)
            size = CLIP_SIZES[section.size] if weights is None else weights.size
            model = cls(
                size,
                centers=section.centers,
                temporal_depth=section.temporal_layers,
                compatible_masks=section.compatible_masks,
                tokenizer=clip_tokenizer_for(size, section.max_tokens),
                **how,
            )
            if weights is not None:
                model.start_from_clip(weights)
        if model.tokenizer is None:
            need = "CLIP's vocabulary and the extra clip (pip install frozen-fast[clip])"
            raise UserError(f"model.clip2video: got no tokenizer for the captions; allowed: {need}")
        return model

    def start_from_clip(self, weights: ClipWeights) -> None:
        """Load CLIP's weights, and initialise the temporal parts from its text tower as the released code does.

        Frame positions are initialised from the text positions, the two type embeddings from the first two of them, and
        every temporal block from the text block of the same index.

        Args:
            weights: CLIP's weights, with the same sizes.
        """
        if weights.size != self.clip.size:
            raise UserError(f"clip2video: got CLIP weights of {weights.size}; allowed: {self.clip.size}")
        depth = len(self.transformerClip.resblocks)
        if depth > weights.size.text_depth:
            raise UserError(f"clip2video: got {depth} temporal blocks; allowed: up to {weights.size.text_depth}")
        self.clip.load_state_dict(weights.state)
        with torch.no_grad():
            self.frame_position_embeddings.weight.copy_(self.clip.positional_embedding)
            self.type_position_embeddings.weight.copy_(self.clip.positional_embedding[:2])
        for temporal in (self.transformerClip, self.frame2t_attention, self.actionClip):
            for block, source in zip(temporal.resblocks, self.clip.transformer.resblocks, strict=False):
                block.load_state_dict(source.state_dict())

    # Features

    def text_features(self, text: TextInput) -> Features:
        """Encode captions.

        Args:
            text: Q strings, or {"input_ids", "attention_mask"} [Q, L], L up to 77 (the released model: 32).

        Returns:
            {"global": [Q, E], "aligned": [Q, E]}, both of length exp(logit scale).
        """
        ids_QL, mask_QL = self._tokens(text)
        tokens_QLE = self.clip(ids_QL, all_tokens=True).float()
        words_QL = mask_QL.clone()
        words_QL[:, 0] = 0
        with without_autocast(self.device.type):
            scale = self._scale()
            return {
                "global": scale * F.normalize(end_of_text(tokens_QLE, ids_QL), dim=-1),
                "aligned": scale * aligned(tokens_QLE, words_QL, self.weight_center, self.emb_center),
            }

    def video_features(self, video: VideoInput, frame_mask: Tensor | None = None) -> Features:
        """Encode clips.

        Args:
            video: [V, T, 3, R, R], normalised floats or uint8 pixels, T up to 77; or {"video", "frame_mask"}. Missing
                frames of short clips are zeros after normalisation, as in the released code.
            frame_mask: [V, T], 1 for valid frames, which come first; None: all are valid.

        Returns:
            {"global": [V, E], "aligned": [V, E]}, both of length 1.

        Raises:
            ValueError: for another shape or dtype.
        """
        if isinstance(video, Mapping):
            frame_mask = video.get("frame_mask") if frame_mask is None else frame_mask
            video = video["video"]
        video, mask_VT = self._checked_video(video, frame_mask)
        frames_VTE = self.clip.visual(video).float()
        tokens = self._over_time(self.transformerClip, frames_VTE, mask_VT)
        sparse_VTE, sparse_mask = frames_VTE[:, ::2], None if mask_VT is None else mask_VT[:, ::2]
        action = self._over_time(self.actionClip, sparse_VTE, sparse_mask)
        mask_VS = None if mask_VT is None or sparse_mask is None else torch.cat([mask_VT, sparse_mask], dim=1)
        with without_autocast(self.device.type):
            mean_VE = masked_mean(F.normalize(tokens, dim=-1), mask_VT)
            both_VSE = torch.cat([frames_VTE, action], dim=1)
            return {
                "global": F.normalize(mean_VE, dim=-1),
                "aligned": aligned(both_VSE, mask_VS, self.weight_center, self.emb_center),
            }

    def pair_similarities(self, text: Features, video: Features) -> Tensor:
        """Return the global and aligned similarities, both times exp(logit scale): [2, Q, V], fp32."""
        return torch.stack(
            [text[name].float() @ F.normalize(video[name].float(), dim=-1).T for name in ("global", "aligned")]
        )

    @property
    def vector_width(self) -> int:
        """The width of the global and the aligned vector together."""
        return 2 * self.clip.size.embedding

    def vectors(self, features: Features) -> Tensor:
        """Concatenate global and aligned vectors, [N, 2E]; their dot product is the mean similarity / exp(scale)."""
        both = [F.normalize(features[name].float(), dim=-1) for name in ("global", "aligned")]
        return torch.cat(both, dim=-1) / math.sqrt(2)

    def _scale(self) -> Tensor:
        """Return exp(logit scale), limited to max_scale, [1]."""
        return with_ceiling(self.clip.logit_scale, math.log(self.max_scale)).exp()

    def _over_time(self, transformer: ClipTransformer, frames_VTE: Tensor, mask_VT: Tensor | None) -> Tensor:
        """Run a temporal transformer on frames and differences; return its output at the frames + frames [V, T, E]."""
        tokens_VSE, mask_VS = self._with_differences(frames_VTE, mask_VT)
        x, branch = transformer(tokens_VSE, self._key_scores(mask_VS))
        return (x + branch)[:, ::2].float() + frames_VTE

    def _with_differences(self, frames_VTE: Tensor, mask_VT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Apply the Temporal Difference Block: frames with the enhanced differences of neighbours between them.

        Returns:
            (tokens [V, 2T-1, E], their mask or None). A difference has the mask of the frame before it.
        """
        frames = frames_VTE.shape[1]
        position_TE = self.frame_position_embeddings(torch.arange(frames, device=frames_VTE.device))
        difference_E, frame_E = self.type_position_embeddings(torch.arange(2, device=frames_VTE.device))
        tokens_VTE = frames_VTE + position_TE + frame_E
        if frames == 1:
            return tokens_VTE, mask_VT
        changes = frames_VTE[:, 1:] - frames_VTE[:, :-1] + position_TE[1:]
        later = None if mask_VT is None else mask_VT[:, 1:]
        x, branch = self.frame2t_attention(changes, self._key_scores(later))
        changes = 2 * torch.sigmoid(self.trans_layernorm(x + branch)) - 1
        between = changes + position_TE[:-1] + difference_E
        pairs = torch.stack([tokens_VTE[:, :-1], between], dim=2).flatten(1, 2)
        tokens_VSE = torch.cat([pairs, tokens_VTE[:, -1:]], dim=1)
        if mask_VT is None:
            return tokens_VSE, None
        return tokens_VSE, torch.cat([mask_VT[:, :-1].repeat_interleave(2, dim=1), mask_VT[:, -1:]], dim=1)

    def _key_scores(self, mask_VS: Tensor | None) -> Tensor | None:
        heads = self.clip.size.text_heads
        return None if mask_VS is None else key_scores(mask_VS, heads, self.compatible_masks)

    # For training

    def compiled_parts(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
        """Return the blocks of the image tower and of the temporal transformers, and CLIP's text tower."""
        stacks = (self.clip.visual.transformer, self.transformerClip, self.frame2t_attention, self.actionClip)
        return [block for stack in stacks for block in stack.resblocks], [self.clip]

    def choose_kernels(self, batch_sizes: Mapping[int, int], device: torch.device, dtype: torch.dtype) -> None:
        """Let "auto" choose attention for a stage's shapes, and import the chosen backends."""
        for frames, batch in batch_sizes.items():
            settle_sequences(self.clip.visual, batch * frames, self.clip.visual.tokens, device, dtype)
            for number in (frames, (frames + 1) // 2):
                for stack in (self.transformerClip, self.frame2t_attention, self.actionClip):
                    tokens = number - 1 if stack is self.frame2t_attention else 2 * number - 1
                    settle_sequences(stack, batch, tokens, device, dtype)

    def kernels_used(self, device: torch.device, *, compiled: bool) -> dict[str, Any]:
        """Return the attention backends chosen so far, and the form of the fused ops."""
        return kernels_of(self._attention, self._fused_ops, device, compiled=compiled)

    def side_flops(self, frames: int, tokens: int) -> SideFlops | None:
        """Count FLOPs on the meta device (counted_flops)."""
        size, side = self.clip.size, self.resolution
        image = counted_flops(lambda: ClipImageTower(size), (1, 1, 3, side, side))
        depth = len(self.transformerClip.resblocks)
        video = counted_flops(lambda: _VideoHalf(size, self.centers, depth), (1, frames, 3, side, side))
        text = counted_flops(lambda: ClipTextTower(size), (1, tokens), dtype=torch.long)
        if image is None or video is None or text is None:
            return None
        visual = {id(parameter) for parameter in self.clip.visual.parameters()}
        image_learns = any(parameter.requires_grad for parameter in self.clip.visual.parameters())
        text_learns = any(one.requires_grad for one in self.clip.parameters() if id(one) not in visual)
        frozen = (0.0 if image_learns else frames * image) + (0.0 if text_learns else text)
        patches, width = self.clip.visual.tokens - 1, size.image_width
        rest = 4.0 * patches * width * (width + size.image_hidden + patches + 1)  # of the last block, which is not read
        return SideFlops(video, video + frames * rest, text, pair=2 * 2.0 * size.embedding, frozen=frozen)

    # Inputs

    def _tokens(self, text: TextInput) -> tuple[Tensor, Tensor]:
        """Return ids and mask on the device of the weights."""
        if not isinstance(text, Mapping):
            if self.tokenizer is None:
                raise UserError(
                    "text: got strings, and the model has no tokenizer; allowed: {'input_ids', 'attention_mask'}, or "
                    "strings with the extra clip (pip install frozen-fast[clip])"
                )
            text = self.tokenizer(text)
        ids, mask = text.get("input_ids"), text.get("attention_mask")
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
            raise ValueError(f"text: got a dict of {sorted(text)}; allowed: tensors input_ids and attention_mask")
        if ids.dim() != 2 or 0 in ids.shape or ids.shape != mask.shape or ids.is_floating_point():
            got = f"input_ids {list(ids.shape)} {ids.dtype} and attention_mask {list(mask.shape)}"
            raise ValueError(f"text: got {got}; allowed: two whole-number tensors [Q, L] of one shape")
        return ids.to(self.device), mask.to(self.device)

    def _checked_video(self, video: Any, frame_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return normalised floats and the mask on the device of the weights."""
        if not isinstance(video, Tensor) or video.dim() != 5 or not 1 <= video.shape[1] <= self.learned_frames:
            got = f"shape {list(video.shape)}" if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(f"video: got {got}; allowed: a tensor [V, T, 3, H, W] with T up to {self.learned_frames}")
        if frame_mask is not None and frame_mask.shape != video.shape[:2]:
            raise ValueError(f"frame_mask: got shape {list(frame_mask.shape)}; allowed: {list(video.shape[:2])}")
        video = video.to(self.device)
        mask_VT = None if frame_mask is None else (frame_mask.to(self.device) != 0).float()
        if video.is_floating_point():
            return video.to(self.weight_center.dtype), mask_VT
        if video.dtype != torch.uint8:
            raise ValueError(f"video: got dtype {video.dtype}; allowed: normalised floats, or uint8")
        pixels = self.pixels(video)
        return (pixels if mask_VT is None else pixels * mask_VT[:, :, None, None, None]), mask_VT

    # Files

    def architecture(self) -> dict[str, Any]:
        """Return the content of config.json without the kind."""
        return {
            "clip": asdict(self.clip.size),
            "centers": self.centers,
            "temporal_depth": len(self.transformerClip.resblocks),
            "compatible_masks": self.compatible_masks,
            "max_scale": self.max_scale,
            "max_tokens": MAX_TOKENS if self.tokenizer is None else self.tokenizer.max_tokens,
        }

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write weights, config.json and tokenizer; `state` replaces the model's own weights (gathered from shards)."""
        weights = self.state_dict() if state is None else state
        write_model_folder(Path(folder), self.kind, weights, self.architecture(), self.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        centers: int | None = None,
        compatible_masks: bool | None = None,
        max_tokens: int | None = None,
        attention: str = "auto",
        fused_ops: FusedOps = "auto",
        checkpointed_blocks: int = 0,
    ) -> Clip2Video:
        """Load a checkpoint; the model is in eval mode.

        Args:
            path: a frozen_fast folder, or a released pytorch_model.bin.N.
            centers: K; None: the file's value. A value other than the file's is an error.
            compatible_masks: see the attribute; None: the folder's value, or False for a released file.
            max_tokens: captions are truncated to this many tokens; None: the folder's value, or 32.
            attention: backend of frozen_kernels.divided_attention for the image tower.
            fused_ops: compute residual norms by frozen_kernels' fastest form, or by PyTorch's operators.
            checkpointed_blocks: number of blocks of each CLIP tower that recompute their activations in the backward
                pass.

        Raises:
            UserError: for a missing, damaged or unsupported checkpoint.
        """
        path = Path(path).expanduser()
        stored = read_clip2video(path, max_tokens or 0)
        found = stored.settings["centers"]
        if centers is not None and centers != found:
            raise UserError(f"centers: got {centers} for {path}; allowed: {found}, the rows of its weight_center")
        settings = dict(stored.settings)
        if compatible_masks is not None:
            settings["compatible_masks"] = compatible_masks
        how: dict[str, Any] = {"attention": attention, "fused_ops": fused_ops}
        with torch.device("meta"):  # skips random initialisation
            model = cls(
                stored.size,
                tokenizer=stored.tokenizer,
                checkpointed_blocks=checkpointed_blocks,
                **settings,
                **how,
            )
        model = model.to_empty(device="cpu")
        load_weights(model, stored.state, path)
        model.run = read_run(path)
        return model.eval()


class _VideoHalf(nn.Module):
    """The video side alone, for counting FLOPs."""

    def __init__(self, size: ClipSize, centers: int, temporal_depth: int) -> None:
        super().__init__()
        self.model = Clip2Video(size, centers=centers, temporal_depth=temporal_depth)

    def forward(self, video_VTCHW: Tensor) -> Tensor:
        return self.model.video_features(video_VTCHW)["aligned"]
