"""Model families: what a compiler must know of a model that its graph does not say. One small file each."""

from .registry import FAMILIES, Family, family_of, register

__all__ = ["FAMILIES", "Family", "family_of", "register"]

from . import (  # noqa: F401  (they register themselves)
    gemma3,
    glm4v,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    mistral3,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    video_llava,
)
