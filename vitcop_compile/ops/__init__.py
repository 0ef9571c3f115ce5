"""The operations of token pruning: batched, static shapes, no data-dependent control flow, fp32 inside.

Plain torch that `torch.export` traces; indices are int64 and ties go to the lowest index.
"""

from .clustering import density_peaks
from .merging import keep_lowest, mean_by_cluster, merge_by_cluster
from .saliency import cls_saliency, key_norm

__all__ = ["cls_saliency", "density_peaks", "keep_lowest", "key_norm", "mean_by_cluster", "merge_by_cluster"]
