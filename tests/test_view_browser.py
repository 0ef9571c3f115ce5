"""The page of `view` in headless Chromium: the slider is moved, and what the page then says is what compiled models kept."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import browser
import models
import numpy as np
import pytest
import torch
from browser import Browser
from PIL import Image
from test_view import HOSTILE, METHODS, SHARES, record, request  # noqa: F401

from vitcop_compile.view import Record, save_page

PROGRAM = browser.chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PROGRAM is None, reason="no Chromium on the path: apt-get install chromium, or name one in VITCOP_CHROMIUM"
    ),
]
# Mean light of every patch of the picture as it is drawn.
LIGHT = """(() => {
  const canvas = document.querySelector("#panels canvas"), pen = canvas.getContext("2d"), side = canvas.width / 8, out = [];
  for (let i = 0; i < 64; i++) {
    const data = pen.getImageData((i % 8) * side + side / 4, Math.floor(i / 8) * side + side / 4, side / 2, side / 2).data;
    let sum = 0;
    for (let k = 0; k < data.length; k += 4) sum += data[k] + data[k + 1] + data[k + 2];
    out.push(sum / (data.length / 4) / 3);
  }
  return out;
})()"""


@pytest.fixture(scope="module")
def tab(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:  # noqa: F811
    folder = tmp_path_factory.mktemp("view")
    assert PROGRAM is not None
    found = Browser(PROGRAM, folder / "profile")
    try:
        found.open(save_page(record, folder / "page.html"))
        yield found
        assert found.problems == []
    finally:
        found.close()


def text(tab: Browser, selector: str) -> str:
    return tab.ask(f"document.querySelector({selector!r}).textContent")


def texts(tab: Browser, selector: str) -> list[str]:
    return tab.ask(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")


def at(tab: Browser, method: str, share: int) -> None:
    """Chooses the method, and moves the slider by its keys."""
    tab.ask(f"(m => {{ m.value = {method!r}; m.dispatchEvent(new Event('change', {{bubbles: true}})); }})"
            "(document.getElementById('method'))")  # fmt: skip
    tab.ask("document.getElementById('retention').focus()")
    tab.press("Home")
    for _ in range(share):
        tab.press("ArrowRight")
    assert text(tab, "#retention-value") == SHARES[share]


def view(tab: Browser, name: str) -> None:
    tab.ask(f"document.querySelector('input[value={name}]').click()")


@torch.no_grad()
def test_the_slider_shows_what_compiled_models_keep(tab: Browser, record: Record) -> None:  # noqa: F811
    with Image.open(io.BytesIO(base64.b64decode(record.pictures[0].partition(",")[2]))) as held:
        cells = (
            np.asarray(held.convert("RGB"), dtype=float).mean(2).reshape(8, 14, 8, 14)[:, 3:11, :, 3:11].mean((1, 3)).ravel()
        )
    dense = models.shared().generate(**request(), max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    assert texts(tab, "#dense .token") and text(tab, "#prompt") == HOSTILE
    for share in (1, 0):
        fast = models.optimize(models.shared(), METHODS["vitcop"][share])
        selection = fast(**request()).past_key_values.selection
        kept = [selection.kept[0].tolist(), *(rows[0].tolist() for rows in selection.stages)]
        at(tab, "vitcop", share)
        view(tab, "kept")
        assert texts(tab, "#steps b") == ["64", *(str(len(tokens)) for tokens in kept)]
        shade = (cells - np.array(tab.ask(LIGHT))) / (cells - 12)  # how much of each is covered, by next to black
        assert [i for i in range(64) if shade[i] < 0.05] == kept[-1]
        assert [i for i in range(64) if shade[i] < 0.78] == kept[0]
        assert text(tab, "#mean").startswith(f"{fast.schedule.mean_visual_tokens():.1f} ")
        assert text(tab, "#clusters") == str(len(set(selection.labels[0].tolist()) - {-1}))
        said = fast.generate(**request(), max_new_tokens=6, do_sample=False)[0, -6:].tolist()
        marked = " (first that differs)"
        assert [chip.replace(marked, "") for chip in texts(tab, "#pruned .token")] == [f" w{i}" for i in said]
        first = [a == b for a, b in zip(dense, said)].index(False)
        for box in ("dense", "pruned"):
            (number,) = [i for i, chip in enumerate(texts(tab, f"#{box} .token")) if chip.endswith(marked)]
            assert number == first
        assert text(tab, "#verdict") == f"The first token that differs is number {first + 1}."


def test_clusters_and_groups_have_a_color_each(tab: Browser, record: Record) -> None:  # noqa: F811
    """Patches of one cluster, or group, change towards one hue: told by which patches darken alike on a black picture."""
    at(tab, "vitcop", 0)
    view(tab, "clusters")
    run = record.runs["vitcop"][0]
    light = np.array(tab.ask(LIGHT))
    gone = sorted(set(range(64)) - set(run.steps[0].kept))
    assert light[gone].max() < light[list(run.steps[0].kept)].min()
    view(tab, "merged")
    groups = [group for group in run.steps[1].groups if len(group) > 1]
    assert text(tab, "#merged") == f"{sum(map(len, groups))} into {len(groups)}"
    box = tab.ask("(b => [b.x, b.y, b.width])(document.querySelector('#panels canvas').getBoundingClientRect())")
    seat, group = next((seat, group) for seat, group in zip(run.steps[1].kept, run.steps[1].groups) if len(group) > 1)
    other = next(token for token in group if token != seat)
    tab.move(box[0] + (other % 8 + 0.5) * box[2] / 8, box[1] + (other // 8 + 0.5) * box[2] / 8)
    assert f"merged into row {seat // 8 + 1}, column {seat % 8 + 1}" in text(tab, "#hover")
    assert text(tab, "#hover").startswith(f"row {other // 8 + 1}, column {other % 8 + 1} · attention")


def test_the_heat_map_follows_the_scores(tab: Browser, record: Record) -> None:  # noqa: F811
    at(tab, "vitcop", 0)
    view(tab, "heat")
    assert tab.ask("document.getElementById('score').options.length") == 3
    scores = np.array(record.runs["vitcop"][0].steps[0].scores["attention"])
    light, order = np.array(tab.ask(LIGHT)), scores.argsort()
    assert light[order[-12:]].mean() > light[order[:12]].mean() + 40
    at(tab, "dense", 0)  # which scores nothing
    assert tab.ask("[...document.querySelectorAll('input[name=view]')].filter((i) => !i.disabled).map((i) => i.value)") == [
        "kept"
    ]
    assert tab.ask("document.querySelector('input[name=view]:checked').value") == "kept"
    assert text(tab, "#verdict") == "The same 6 tokens."


def test_what_is_left_out_says_why(tab: Browser, record: Record) -> None:  # noqa: F811
    at(tab, "fastv", 1)
    reason = record.runs["fastv"][1].left_out
    assert text(tab, "#note") == f"fastv at 0.2 is left out: {reason}" and text(tab, "#pruned") == "left out"
    assert text(tab, ".card[data-method=fastv] .out") == f"left out: {reason}"
    assert texts(tab, "#table tbody tr:nth-child(3) td")[1] == "left out"


def test_methods_stand_side_by_side(tab: Browser, record: Record) -> None:  # noqa: F811
    at(tab, "vitcop", 1)
    kept = len(record.runs["visionzip"][1].steps[0].kept)
    assert texts(tab, ".card button") == list(METHODS) and text(tab, ".card[data-method=visionzip] .counts") == f"64 → {kept}"
    tab.ask("document.querySelector('.card[data-method=visionzip] button').click()")
    assert tab.ask("document.getElementById('method').value") == "visionzip" and text(tab, "#count-0") == str(kept)
    agreed = [6 if run.differs is None else run.differs for run in record.runs["visionzip"]]
    assert texts(tab, "#table tbody tr:nth-child(2) td") == [f"{count} of 6" for count in agreed]


def test_keys_alone_reach_every_control(tab: Browser) -> None:
    at(tab, "vitcop", 0)
    view(tab, "kept")
    tab.ask("document.getElementById('method').focus()")
    reached = []
    for _ in range(3):
        reached.append(tab.ask("document.activeElement.id || document.activeElement.value"))
        tab.press("Tab")
    assert reached == ["method", "retention", "kept"]
    tab.ask("document.querySelector('input[value=kept]').focus()")
    tab.press("ArrowRight")
    assert tab.ask("document.querySelector('input[name=view]:checked').value") == "clusters"


@pytest.mark.parametrize("size", [(1280, 900), (400, 800)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_dark(tab: Browser, tmp_path: Path, size: tuple[int, int], dark: bool) -> None:
    tab.picture(tmp_path / "page.png", size, dark)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == size
    inks = ("h1", ".model", ".note", ".steps small", ".facts dt", ".card .counts", ".card button", "#verdict")
    back = _light(tab.ask("getComputedStyle(document.querySelector('.beside')).backgroundColor"))
    assert (back < 0.1) == dark
    for ink in inks:
        front = _light(tab.ask(f"getComputedStyle(document.querySelector({ink!r})).color"))
        assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5, ink  # WCAG 2, AA
    assert tab.ask("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_number_that_is_none_is_a_dash(tab: Browser, record: Record, tmp_path: Path) -> None:  # noqa: F811
    """Where one is not finite the page still works, with no number in its place."""
    run = record.runs["vitcop"][0]
    (first, *others) = run.steps
    broken = dataclasses.replace(first, scores={"attention": (float("nan"), *first.scores["attention"][1:])})
    run = dataclasses.replace(run, kl=float("nan"), steps=(broken, *others))
    try:
        tab.open(save_page(dataclasses.replace(record, runs=record.runs | {"vitcop": (run, run)}), tmp_path / "page.html"))
        assert text(tab, "#kl") == "- nats" and text(tab, "#count-0") == str(len(first.kept))
        view(tab, "heat")
        box = tab.ask("(b => [b.x, b.y, b.width])(document.querySelector('#panels canvas').getBoundingClientRect())")
        tab.move(box[0] + box[2] / 16, box[1] + box[2] / 16)
        assert text(tab, "#hover").startswith(f"row 1, column 1 · attention, {first.where} -")
        assert tab.problems == []
    finally:
        tab.open(save_page(record, tmp_path / "again.html"))


def test_nothing_of_the_prompt_ran(tab: Browser) -> None:
    assert tab.ask("document.title").startswith("</script><script>document.title='owned'</script>")
    assert tab.ask("document.scripts.length") == 2 and tab.problems == []


def _light(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in color[4:-1].split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
