"""What was pruned, drawn on the photograph: kept patches, their clusters, and what is left after each decoder stage."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .cache import Selection
from .errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = NDArray[np.float64]  # [height, width, 3], 0 to 1
NO_CLUSTER = -1
DPI = 120
SIZE = (10.0, 11.75)  # inches
_BRIGHTNESS = 0.16  # of a patch that is gone
_SHADE = 0.75  # of a patch that only the shallow stage keeps
_DEEP, _SHALLOW = "#ffd23f", "#7fd6ff"
_GRAY = (0.62, 0.62, 0.62)


def require_matplotlib() -> Any:
    """matplotlib. Raises UnsupportedError, saying how to install it, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError("drawing needs matplotlib, which is missing: pip install 'vitcop-compile[plot]'") from None
    return matplotlib


def load_image(path: Path | None) -> Image.Image:
    """The image at `path` in RGB; None: the photograph that comes with matplotlib. Raises InputError if unreadable."""
    if path is None:
        require_matplotlib()
        from matplotlib.cbook import get_sample_data

        path = Path(str(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read: pass a JPEG or PNG file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def photograph(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Picture:
    """The image as the model sees it: `pixels` [3, height, width] with the processor's normalisation taken back."""
    values = pixels.detach().float().cpu().numpy().transpose(1, 2, 0).astype(np.float64)
    return np.clip(values * np.asarray(std) + np.asarray(mean), 0.0, 1.0)


def darkened(photo: Picture, kept: Sequence[int], grid: tuple[int, int], brightness: float = _BRIGHTNESS) -> Picture:
    """`photo` with every patch but `kept` (raster indices) at `brightness`."""
    lit = np.full(grid[0] * grid[1], brightness)
    lit[list(kept)] = 1.0
    return photo * _spread(lit.reshape(grid), photo)[..., None]


def colored(photo: Picture, kept: Sequence[int], labels: Sequence[int], grid: tuple[int, int]) -> Picture:
    """`photo` darkened, with a color per cluster over the patches `kept`; gray for NO_CLUSTER."""
    colors = np.zeros((grid[0] * grid[1], 3))
    palette = cluster_colors(labels)
    colors[list(kept)] = [palette[label] for label in labels]
    overlay = np.stack([_spread(colors[:, channel].reshape(grid), photo) for channel in range(3)], axis=-1)
    held = _spread(np.isin(np.arange(len(colors)), list(kept)).reshape(grid), photo)[..., None]
    # The photo's own light and shade stays visible below the color.
    light = 0.45 + 0.55 * photo.mean(axis=-1, keepdims=True)
    return np.where(held, overlay * light, darkened(photo, [], grid))


def cluster_colors(labels: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """A color per cluster. Hues step by the golden ratio, so that any number of them differ; big clusters come first."""
    sizes = {label: list(labels).count(label) for label in set(labels)}
    ordered = sorted((label for label in sizes if label != NO_CLUSTER), key=lambda label: (-sizes[label], label))
    golden = (5**0.5 - 1) / 2
    colors = {
        label: colorsys.hsv_to_rgb((0.56 + i * golden) % 1.0, (0.75, 0.55, 0.9)[i % 3], (1.0, 0.95, 0.85)[i % 3])
        for i, label in enumerate(ordered)
    }
    return colors | {NO_CLUSTER: _GRAY}


def figure(photo: Picture, selection: Selection, grid: tuple[int, int], title: str = "") -> Figure:
    """Four panels for the first image of `selection`. Raises InputError if nothing was pruned."""
    require_matplotlib()
    from matplotlib.figure import Figure

    if selection.kept is None or selection.labels is None:
        raise InputError("there is no selection to draw: the model is dense, or the prompt had no image")
    kept, labels = selection.kept[0].tolist(), selection.labels[0].tolist()
    stages = [stage[0].tolist() for stage in selection.stages]
    out = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    axes = out.subplots(2, 2).flat
    patches, clusters = grid[0] * grid[1], len(set(labels) - {NO_CLUSTER})
    _panel(axes[0], photo, "the photograph, as the model sees it", f"{patches} patches")
    _panel(axes[1], darkened(photo, kept, grid), "kept inside the vision encoder", f"{len(kept)} of {patches}")
    # A dark patch that is kept looks like one that is not: every kept one gets a thin edge.
    _outline(axes[1], kept, photo, grid, edgecolor=(1, 1, 1, 0.55), linewidth=0.5)
    _panel(axes[2], colored(photo, kept, labels, grid), "clusters of the kept patches", _clusters(labels, clusters))
    _decoder_panel(axes[3], photo, stages, grid)
    arrow = " → ".join(str(count) for count in (patches, len(kept), *map(len, stages)))
    out.suptitle(f"{title}\n{arrow} visual tokens".strip(), fontsize=15, fontweight="bold", y=0.985)
    out.subplots_adjust(left=0.02, right=0.98, bottom=0.05, top=0.89, wspace=0.04, hspace=0.12)
    return out


def save(drawing: Figure, path: str | Path) -> Path:
    """Writes `drawing` as a PNG, aside first and then moved into place."""
    target = Path(path)
    aside = target.with_name(target.name + ".partial")
    try:
        drawing.savefig(aside, format="png", dpi=DPI)
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from None
    return target


def _decoder_panel(axes: Axes, photo: Picture, stages: list[list[int]], grid: tuple[int, int]) -> None:
    from matplotlib.patches import Patch

    shallow, deep = (stages[0] if stages else []), (stages[-1] if len(stages) > 1 else [])
    light = np.full(grid[0] * grid[1], _BRIGHTNESS)
    light[shallow], light[deep] = _SHADE, 1.0
    _panel(axes, photo * _spread(light.reshape(grid), photo)[..., None], "left inside the language model", _counts(stages))
    _outline(axes, shallow, photo, grid, edgecolor=_SHALLOW, linewidth=0.8)
    _outline(axes, deep, photo, grid, edgecolor=_DEEP, linewidth=2.6)
    handles = [
        Patch(facecolor="none", edgecolor=_SHALLOW, linewidth=1.2, label="shallow stage"),
        Patch(facecolor="none", edgecolor=_DEEP, linewidth=2.6, label="deep stage"),
    ]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=2,
        facecolor="#333333",
        edgecolor="none",
        labelcolor="white",
        fontsize=10,
    )


def _panel(axes: Axes, image: Picture, title: str, counts: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_title(f"{title}\n{counts}", fontsize=11.5)
    axes.set_axis_off()


def _outline(axes: Axes, patches: Sequence[int], photo: Picture, grid: tuple[int, int], **style: Any) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    height, width = photo.shape[0] / grid[0], photo.shape[1] / grid[1]
    # imshow centers pixel 0 on 0: a patch starts half a pixel before its first pixel.
    corners = [(index % grid[1] * width - 0.5, index // grid[1] * height - 0.5) for index in patches]
    axes.add_collection(PatchCollection([Rectangle(at, width, height) for at in corners], facecolor="none", **style))


def _clusters(labels: list[int], clusters: int) -> str:
    free = labels.count(NO_CLUSTER)
    return f"{clusters} clusters, a color each" + (f"; {free} patches in none (gray)" if free else "")


def _counts(stages: list[list[int]]) -> str:
    names = ("after the shallow stage", "after the deep stage")
    return ", ".join(f"{len(stage)} {name}" for stage, name in zip(stages, names))


def _spread(values: NDArray, photo: Picture) -> NDArray:
    """A value per patch [rows, columns] -> a value per pixel of `photo`."""
    rows = np.arange(photo.shape[0]) * values.shape[0] // photo.shape[0]
    columns = np.arange(photo.shape[1]) * values.shape[1] // photo.shape[1]
    return values[np.ix_(rows, columns)]
