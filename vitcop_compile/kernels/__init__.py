"""Kernels of our own for CPUs: products of few rows, and attention of one query. C++, built on first use and kept.

`torch.ops.vitcop_cpu.linear_few(input, weight, bias?)` and `decode_attention(query, key, value, scale, at)`, for float32,
bfloat16 and float16, with sums in fp32. A weight has the input's type, or is int8, its scales left to the graph;
`linear_int8(input, weight)` multiplies int8 by int8, with sums in int32. They read weights and caches once, at the rate of
memory: see docs/performance.md.
"""

from .build import begin, instructions, load
from .products import MOST_ROWS, Rule, onednn, rule

__all__ = ["MOST_ROWS", "Rule", "begin", "instructions", "load", "onednn", "rule"]
