"""Choose a label for one clip without training: python zero_shot_labels.py CHECKPOINT CLIP LABEL LABEL .."""

import sys

import torch

from frozen_fast import DualEncoder, load_video, transforms
from frozen_fast.search.zero_shot import best_labels, label_vectors

checkpoint, clip, *labels = sys.argv[1:]
model = DualEncoder.from_pretrained(checkpoint)
frames = load_video(clip, model.learned_frames)  # uint8 [T, 3, H, W], one from the middle of each segment
with torch.no_grad():
    clip_VD = model.encode_video(transforms(model)(frames)[None])
shares, best = best_labels(clip_VD, label_vectors(model, labels), top=len(labels))
for share, place in zip(shares[0].tolist(), best[0].tolist(), strict=True):
    print(f"{share:.3f}  {labels[place]}")
