"""Published methods that merge tokens, by the book, and the attention that knows how many a token stands for: plain loops over
one image of one sample, as in `naive_methods.py`, whose rules on ties and sums are these.

An index is ascending, and row k of the rows returned with it stands where token index[k] was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from naive_methods import best, cosine, dot, softmax, top


def mean_of(rows: Iterable[np.ndarray]) -> list[float]:
    """Of [k, D]; k >= 1."""
    rows = list(rows)
    return [math.fsum(float(row[c]) for row in rows) / len(rows) for c in range(len(rows[0]))]


def downsample(grid: tuple[int, int], cells: tuple[int, int], hidden: np.ndarray) -> tuple[list[int], list[list[float]]]:
    """The grid pooled to fewer cells, each the mean of its tokens. A floor, of no paper.

    hidden [n, D]. Along an axis of R, cell i of r is floor(i R / r) .. ceil((i + 1) R / r), as in adaptive average pooling:
    cells may share tokens. A cell stands where its middle token was, floor((first + last) / 2) along either axis.
    """
    index, rows = [], []
    for r in range(cells[0]):
        top_row, end_row = r * grid[0] // cells[0], -(-(r + 1) * grid[0] // cells[0])
        for c in range(cells[1]):
            left, end = c * grid[1] // cells[1], -(-(c + 1) * grid[1] // cells[1])
            index.append((top_row + end_row - 1) // 2 * grid[1] + (left + end - 1) // 2)
            rows.append(mean_of(hidden[y * grid[1] + x] for y in range(top_row, end_row) for x in range(left, end)))
    return index, rows


def visionzip(
    score: Sequence[float], keys: np.ndarray, hidden: np.ndarray, dominant: int, contextual: int, doubled: bool = True
) -> tuple[list[int], list[list[float]]]:
    """VisionZip (arXiv 2412.04467, section 3): the tokens of greatest score as they are, the rest merged into `contextual`
    ones.

    score [n]: attention of CLS, summed over heads, of the last layer but one; without CLS, attention received. keys [n, K]: of
    that layer, the mean over heads of what the projection gives (bias included, not scaled, not rotated). hidden [n, D]: what
    leaves it. Of the m tokens that are not dominant, in raster order, each (m // contextual)-th is a target, the first
    `contextual` of them; every other goes to the target of the key most like its own, by cosine. A contextual token is its
    target *plus* the mean of those that went to it, as in the published code (the target alone if none did): about twice as
    long as any other. doubled=False: the mean of all, target included, instead.

    Not here: CLS, which the published code keeps as one of the dominant tokens (its 54 + 10 are 53 patches, CLS and 10), and
    its order, dominant before contextual: here each stands where it was.
    """
    first = top([float(s) for s in score], dominant)
    rest = [i for i in range(len(hidden)) if i not in first]
    targets = [rest[k * (len(rest) // contextual)] for k in range(contextual)] if contextual else []
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in groups and targets:
            groups[targets[best([cosine(keys[i], keys[target]) for target in targets])]].append(i)
    rows = {i: [float(x) for x in hidden[i]] for i in first + targets}
    for target, group in groups.items():
        if group and doubled:
            rows[target] = [x + y for x, y in zip(rows[target], mean_of(hidden[i] for i in group))]
        elif group:
            rows[target] = mean_of(hidden[i] for i in [target, *group])
    return sorted(rows), [rows[i] for i in sorted(rows)]


def local_scan(score: Sequence[float], grid: tuple[int, int], window: int, budget: int) -> list[int]:
    """VScan's local scan (arXiv 2505.22654, section 4): as many tokens of greatest score from every window.

    score [n]. The windows are window x window, without overlap; what is left over at the right and below belongs to the last
    window there. From the greatest score down, a token is taken if its window has given less than ceil(budget / windows),
    until there are `budget` (fewer, if windows have no more to give). The published code has this for Qwen2.5-VL. For LLaVA it
    has budget // windows from each window, which is the same where windows divide grid and budget, and loses tokens elsewhere.
    """
    down, across = max(1, grid[0] // window), max(1, grid[1] // window)
    limit = math.ceil(budget / (down * across))
    taken: list[int] = []
    given = {(y, x): 0 for y in range(down) for x in range(across)}
    for i in sorted(range(len(score)), key=lambda i: (-score[i], i)):
        place = min(i // grid[1] // window, down - 1), min(i % grid[1] // window, across - 1)
        if given[place] < limit and len(taken) < budget:
            given[place] += 1
            taken.append(i)
    return sorted(taken)


def vscan(
    local: Sequence[float], whole: Sequence[float], hidden: np.ndarray, grid: tuple[int, int], window: int, budget: int
) -> tuple[list[int], list[list[float]]]:
    """VScan's vision side (arXiv 2505.22654, section 4): half the budget, floor(budget / 2), by `local_scan`, the rest by
    `whole` among the others; what nobody took is merged into the kept token most like it.

    local, whole [n]: attention of CLS, mean over heads, of an early layer (the sixth of 24) and of the last but one; for
    Qwen2.5-VL attention received, mean over rows, of its first full layer and of its last, each the mean of the four patches
    that become one token. hidden [n, D]: what leaves the projector, by whose cosine tokens are merged: a row is the mean of
    the token and of those that went to it. Windows are 6 x 6 patches, for Qwen2.5-VL 4 x 4 tokens.

    The decoder's side, the last instruction token's attention at the entry of the middle layer (16 of 32, 14 of 28), is
    `naive_methods.pyramiddrop`. For Qwen2.5-VL the published code leaves out the rotation there; this does not.
    """
    kept = local_scan(local, grid, window, budget // 2)
    others = [i for i in range(len(hidden)) if i not in kept]
    kept = sorted(kept + top([float(s) for s in whole], budget - len(kept), others))
    groups = {i: [i] for i in kept}
    for i in range(len(hidden)):
        if i not in groups:
            groups[kept[best([cosine(hidden[i], hidden[k]) for k in kept])]].append(i)
    return kept, [mean_of(hidden[i] for i in groups[k]) for k in kept]


def tome(
    keys: np.ndarray, hidden: np.ndarray, sizes: Sequence[float], r: int, protected: int = 0
) -> tuple[list[list[float]], list[float], list[int]]:
    """ToMe's bipartite soft matching of one block (arXiv 2210.09461, section 3) -> (rows, sizes, owner [n]: the row that a
    token became part of).

    keys [n, K]: of the block, the mean over heads; hidden [n, D]: between its attention and its MLP; sizes [n]: how many
    patches each stands for. Tokens 0, 2, 4, .. each draw an edge to the one of 1, 3, 5, .. whose key is most like its own;
    along the r edges of greatest cosine the former are merged into the latter, by the mean weighted by size. protected=1:
    token 0 is CLS and draws none. At most (n - protected) // 2 go. `sizes` enter the next block's attention
    (`attend`).

    The rows are in raster order of the tokens that stay. In the published code those that drew an edge and stay come first, by
    falling cosine (with CLS: in raster order), then all others: of one block the same rows, but the next block splits
    them otherwise.
    """
    n = len(hidden)
    r = min(r, (n - protected) // 2)
    edges = []
    for i in range(0, n, 2):
        if i >= protected and n > 1:
            nearest = best([cosine(keys[i], keys[j]) if j % 2 else -math.inf for j in range(n)])
            edges.append((-cosine(keys[i], keys[nearest]), i, nearest))
    into = {i: nearest for _, i, nearest in sorted(edges)[:r]}
    stay = [i for i in range(n) if i not in into]
    owner = [stay.index(into.get(i, i)) for i in range(n)]
    rows, totals = [], []
    for k in range(len(stay)):
        group = [i for i in range(n) if owner[i] == k]
        totals.append(math.fsum(float(sizes[i]) for i in group))
        rows.append(
            [dot([sizes[i] for i in group], [hidden[i][c] for i in group]) / totals[-1] for c in range(hidden.shape[1])]
        )
    return rows, totals, owner


def attend(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, causal: bool, size: Sequence[float]
) -> list[list[float]]:
    """Attention of one head that counts a merged token as often as tokens are in it: softmax(q k^T scale + log size) v (ToMe,
    arXiv 2210.09461, Eq. 1, "proportional attention"). Tokens that are alike and merged into one give what they gave
    before.

    query [t, hd], key [s, hd], value [s, D], size [s]: 1 of every token that is not merged. causal: row i of t sees the first
    s - t + i + 1 -> [t, D].
    """
    rows = []
    for i in range(len(query)):
        seen = len(key) - len(query) + i + 1 if causal else len(key)
        weights = softmax([scale * dot(query[i], key[j]) + math.log(float(size[j])) for j in range(seen)])
        rows.append([dot(weights, [value[j][c] for j in range(seen)]) for c in range(value.shape[1])])
    return rows
