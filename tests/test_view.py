"""What `view` records, against what compiled models keep and the naive references; the page and the picture, as files."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import families
import families_more
import models
import naive
import numpy as np
import pytest
import test_tiled
import tiled
import torch
from models import pixels, prompt, slow
from PIL import Image
from rich.console import Console

from vitcop_compile import ConfigError, InputError, RewriteError, ViTCoPConfig, methods
from vitcop_compile.layout import Segment
from vitcop_compile.policies import POLICIES
from vitcop_compile.progress import Steps
from vitcop_compile.view import Collector, Record, Run, collect, page, save_page, sheet, watch
from vitcop_compile.view.record import Answer, Panel, check_steps, panels_of
from vitcop_compile.view.render import data_of
from vitcop_compile.view.sheet import _plain, cut, lit

HOSTILE = "</script><script>document.title='owned'</script> \u2028 & \"what\" <!-- $title"
SHARES = ("0.5", "0.2")
METHODS: dict[str, list[Any]] = {
    "vitcop": [ViTCoPConfig(vision_ratio=0.8, retention=0.5), ViTCoPConfig(vision_ratio=0.5, retention=0.2)],
    "visionzip": [methods.VisionZip(retention=0.5), methods.VisionZip(retention=0.2)],
    "fastv": [methods.FastV(layer=2, retention=0.5), methods.FastV(layer=2, retention=0.2)],
    "dense": [ViTCoPConfig.dense()] * 2,
}
QUIET = Steps(Console(file=io.StringIO()))


def words(ids: list[int]) -> str:
    return "".join(f" w{i}" for i in ids)


def collector(model: Any, inputs: dict[str, Any], **more: Any) -> Collector:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "optimize", models.optimize)
        return Collector(model, inputs, **more)


def request() -> dict[str, Any]:
    return {"input_ids": prompt(), "pixel_values": pixels(1), "attention_mask": torch.ones_like(prompt())}


def recorded() -> Record:
    photo = Image.fromarray((pixels(1)[0].permute(1, 2, 0).numpy() * 30 + 150).clip(0, 255).astype("uint8"))
    seen = collector(models.shared(), request(), new_tokens=6, read=words)
    return seen.record(METHODS, SHARES, [photo], QUIET, model="tiny", prompt=HOSTILE)


@pytest.fixture(scope="module")
def record() -> Record:
    return recorded()


@pytest.mark.parametrize(
    "name, share",
    [("vitcop", 1), *(slow(*case) for case in (("vitcop", 0), ("visionzip", 0), ("visionzip", 1), ("fastv", 0)))],
)
@torch.no_grad()
def test_what_is_kept_is_what_compiled_programs_keep(record: Record, name: str, share: int) -> None:
    method, run = METHODS[name][share], record.runs[name][share]
    fast = models.optimize(models.shared(), method)
    selection = fast(**request()).past_key_values.selection
    told = [rows[0].tolist() for rows in (selection.kept, *selection.stages) if rows is not None]
    assert [list(step.kept) for step in run.steps] == told and told
    assert run.mean_tokens == fast.schedule.mean_visual_tokens()
    answer = fast.generate(**request(), max_new_tokens=6, do_sample=False)[0, prompt().shape[1] :].tolist()
    assert list(run.answer.tokens) == answer
    assert run.answer.pieces == tuple(f" w{i}" for i in answer)
    dense = models.shared().generate(**request(), max_new_tokens=6, do_sample=False)[0, prompt().shape[1] :].tolist()
    assert list(record.dense.tokens) == dense
    same = [a == b for a, b in zip(answer, dense)]
    assert run.differs == (same.index(False) if False in same else None)


def test_vitcop_is_the_naive_reference_on_what_it_read(record: Record) -> None:
    for run in record.runs["vitcop"]:
        vision, shallow, deep = run.steps
        attention, labels = vision.scores["attention"], run.clusters
        assert len(attention) == models.PATCHES and len(labels) == len(vision.kept)
        order = sorted(range(models.PATCHES), key=lambda i: (-attention[i], i))
        assert sorted(order[: len(vision.kept)]) == list(vision.kept)
        assert run.saliency == pytest.approx(sum(attention[i] for i in vision.kept) / sum(attention))
        norms = shallow.scores["key norm"]
        rows, index = naive.merge_by_cluster(np.eye(len(vision.kept)), norms, labels, len(shallow.kept))
        assert [vision.kept[i] for i in index] == list(shallow.kept)
        groups = [tuple(vision.kept[i] for i in np.nonzero(row)[0]) for row in rows]
        assert list(shallow.groups) == groups and max(map(len, groups)) > 1
        kept = naive.keep_lowest(deep.scores["key norm"], len(deep.kept))
        assert [shallow.kept[i] for i in kept] == list(deep.kept)
        assert vision.groups is None and deep.groups is None


@torch.no_grad()
def test_scores_are_those_of_the_stock_encoder(record: Record) -> None:
    tower = models.shared().model.vision_tower
    block = tower.encoder.layers[2]
    states = block.layer_norm1(tower(pixels(1), output_hidden_states=True).hidden_states[2])
    query, key = (
        projection(states).unflatten(2, (4, 8)).transpose(1, 2)[0].numpy()
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    score = naive.cls_saliency(query, key, 8**-0.5)
    assert record.runs["vitcop"][0].steps[0].where == "behind encoder layer 2"
    assert record.runs["vitcop"][0].steps[0].scores["attention"] == pytest.approx(score, rel=1e-4)


def test_what_cannot_be_had_says_why(record: Record) -> None:
    run = record.runs["fastv"][1]
    assert run.left_out is not None and "as the first 2 of 6 layers see all" in run.left_out
    assert not run.steps and run.answer is None


def test_nothing_pruned_is_the_dense_answer(record: Record) -> None:
    (run, _) = record.runs["dense"]
    assert run.steps == () and run.differs is None and run.answer == record.dense and run.kl == pytest.approx(0, abs=1e-5)
    assert run.mean_tokens == models.PATCHES and run.clusters is None and run.saliency is None


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.merges])
def test_rows_are_the_sums_that_a_mixture_says(name: str) -> None:
    """Of every policy that merges, more rows than the hidden state has columns among them."""
    policy, rng = POLICIES[name], torch.Generator().manual_seed(3)
    n, width, budget = 40, 8, 12
    options: dict[str, Any] = {
        "dominant_and_contextual": {"contextual": 3, "heads": 4, "doubled": True},
        "local_and_global": {"window": 3},
        "downsample": {"cells": (3, 4)},
    }.get(name, {})
    budget = 30 if name == "bipartite_matching" else budget
    hidden, key = torch.randn(1, n, width, generator=rng), torch.randn(1, 4, n, 6, generator=rng)
    at = torch.arange(n)[None]
    score = torch.rand(1, n, *((2,) if name == "local_and_global" else ()), generator=rng)
    site = watch.Site(
        at=at, hidden=hidden, key=key, score=score, features=key.transpose(1, 2).flatten(2), grid=(5, 8),
        places=torch.stack((at // 8, at % 8), -1).float() / 8,
        state=(at % 5,) if name.startswith("merge_") else (),
    )  # fmt: skip
    choice = policy.choose(site, budget, **options)
    mixed = watch.mixture(policy, site, budget, choice, options)
    assert mixed.shape == (1, budget, n)
    torch.testing.assert_close(mixed @ hidden, choice.rows, atol=1e-5, rtol=1e-4)
    assert ((mixed != 0).sum(-1) > 1).any() and (mixed >= 0).all()


def test_a_policy_that_merges_at_random_is_refused() -> None:
    site = watch.Site(at=torch.arange(4)[None], hidden=torch.randn(1, 4, 8))
    turns = iter((0, 1))

    def choose(site: Any, budget: int) -> Any:
        index = torch.tensor([[next(turns)]])
        return watch.Choice(index, site.hidden[:, :1])

    policy = POLICIES["downsample"].__class__(choose, frozenset())
    with pytest.raises(RewriteError, match="chose otherwise when it was asked again"):
        watch.mixture(policy, site, 1, policy.choose(site, 1), {})


def test_no_name_of_a_watched_policy_is_left(record: Record) -> None:
    assert not [name for name in POLICIES if "watched" in name]
    assert {step.policy for runs in record.runs.values() for run in runs for step in run.steps} <= POLICIES.keys()


@pytest.mark.slow
def test_several_tiles_of_two_images(record: Record) -> None:
    """LLaVA-NeXT: an overview and packed tiles of two images, whose selections are programs of their own."""
    ids, given = test_tiled.request("next", [(40, 100), (168, 150)], 2)
    inputs = {"input_ids": torch.tensor([ids]), **given}
    seen = collector(tiled.model("next"), inputs, new_tokens=2)
    run = seen.run(test_tiled.CONFIG)
    selection = test_tiled.optimized("next")(**inputs).past_key_values.selection
    told = [rows[0].tolist() for rows in (selection.kept, *selection.stages)]
    assert [list(step.kept) for step in run.steps] == told
    grids = [segment.grid for segment in seen.layout]
    assert len(grids) == 4 and [(p.rows, p.columns) for p in panels_of(seen.layout)] == [grid[1:] for grid in grids]
    assert run.answer.pieces == tuple(map(str, run.answer.tokens)) and run.answer.text == ""
    pictures = [Image.new("RGB", (100, 40), "red"), Image.new("RGB", (150, 168), "blue")]
    drawn, places = seen._pictures(pictures, None)
    assert places == [0, 0, 1, 1] and drawn == pictures
    drawn, places = seen._pictures(pictures, ([0.5] * 3, [0.5] * 3))  # an overview is an input of the encoder
    assert [drawn[i].size for i in places] == [(56, 56), (100, 40), (56, 56), (150, 168)]
    with pytest.raises(InputError, match="1 pictures were given for a prompt of 2 images or frames: give one each"):
        seen._pictures(pictures[:1], None)
    for normal in (None, ([0.5] * 3, [0.5] * 3)):
        with pytest.raises(InputError, match="3 pictures were given for a prompt of 2 images or frames: give one each"):
            seen._pictures([*pictures, pictures[0]], normal)
    out = sheet(Record("m", "p", record.pictures * 2, panels_of(seen.layout, [0, 0, 1, 1]), ("1",), seen.dense, {"a": (run,)}))
    assert out.get_size_inches()[0] > 8


@pytest.mark.parametrize("name", [slow("qwen2_5_vl"), slow("internvl")])
def test_families_that_merge_patches(name: str) -> None:
    ids, given = families.prompt(name, [5, *([families.SHAPES[0]] if name == "qwen2_5_vl" else [(4, 4), 3, (4, 4)]), 6])
    inputs = {"input_ids": torch.tensor([ids]), **given}
    model = families.model(name)
    seen = collector(model, inputs, new_tokens=2)
    method = ViTCoPConfig(vision_ratio=0.8, retention=0.4, scale_layers=True)
    run = seen.run(method)
    selection = models.optimize(model, method)(**inputs).past_key_values.selection
    told = [rows[0].tolist() for rows in (selection.kept, *selection.stages)]
    assert [list(step.kept) for step in run.steps] == told
    assert run.steps[0].where.startswith("by encoder layer")
    assert len(run.steps[0].scores["attention"]) == sum(segment.candidates for segment in seen.layout)
    refused = seen.run(methods.ToMe(retention=0.5))
    assert refused.left_out is not None and "tokens are put together behind its encoder" in refused.left_out


@pytest.mark.parametrize("name", ["qwen2_5_vl", *map(slow, ("qwen2_vl", "qwen3_vl", "glm4v"))])
def test_a_step_of_a_video_lies_on_the_first_frame_it_was_made_of(name: str) -> None:
    """Two videos, six frames each of one gray, in pairs in the rows of patches: a panel's picture is as gray as its rows."""
    known: Any = families if name in families.KINDS else families_more
    ids, given = known.prompt(name, [5, (2, 2, 4), 3, (1, 2, 4), 6])
    rows = given["pixel_values_videos"].unflatten(1, (3, 2, -1))  # colors, frames of a step, pixels of a patch
    for step, own in enumerate(rows.chunk(3)):
        own[:, :, 0], own[:, :, 1] = 40 * step / 255, (40 * step + 20) / 255
    inputs = {"input_ids": torch.tensor([ids]), **given}
    inputs |= families_more.types(name, inputs["input_ids"], given) if known is families_more else families.types(
        inputs["input_ids"])  # fmt: skip
    seen = collector(known.model(name), inputs, new_tokens=1)
    frames = [Image.new("L", (8, 4), 20 * frame).convert("RGB") for frame in range(6)]
    panels = panels_of(seen.layout)
    assert len(panels) == 3 and {(panel.rows, panel.columns) for panel in panels} == {(2, 4)}
    drawn, places = seen._pictures(frames, None)
    for panel, place, own in zip(panels, places, rows.chunk(3), strict=True):
        assert drawn[place].getpixel((0, 0))[0] == pytest.approx(255 * own[0, 0, 0, 0]), panel
    drawn, places = seen._pictures(frames[:3], None)  # one for each step
    assert [drawn[place] for place in places] == frames[:3]
    wanted = "for a prompt of 3 steps of video, each of 2 frames: give one for each of the 6 frames"
    for count in (0, 2, 5, 7, 9):
        with pytest.raises(InputError, match=f"{count} pictures were given {wanted}"):
            seen._pictures((frames * 2)[:count], None)


def test_errors_of_a_request() -> None:
    model, one = models.shared(), request()
    with pytest.raises(InputError, match="max_new_tokens=0 is below 1"):
        Collector(model, one, new_tokens=0)
    two = {name: torch.cat([value, value]) for name, value in one.items()}
    with pytest.raises(InputError, match="2 prompts were given: one is seen at a time"):
        collector(model, two)
    with pytest.raises(InputError, match="the prompt has no picture"):
        collector(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    seen = collector(model, one, new_tokens=1)
    with pytest.raises(ConfigError, match=r"no method can be had: fastv: retention=0\.1"):
        seen.runs({"fastv": [methods.FastV(layer=2, retention=0.1)]}, QUIET)
    assert "is for the frames of videos" in seen.run(ViTCoPConfig(retention=0.3, vision_ratio=0.5, clips="pooled")).left_out
    with pytest.raises(InputError, match=r"segment 0 of the prompt has 3 tokens in a grid of 1 x 2 x 2: what is kept"):
        panels_of((Segment("image", (1, 2, 2), 4, (3,)),))
    clip = panels_of((Segment("video", (2, 2, 3), 12), Segment("video", (1, 2, 2), 4)))
    assert [(panel.label, panel.first) for panel in clip] == [
        ("video 1 of 2, frame 1", 0), ("video 1 of 2, frame 2", 6), ("video 2 of 2", 12),
    ]  # fmt: skip


def test_numbers_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the picture, in the pruned answer alone, and in what a policy read."""
    one = request()
    remedy = r"are not finite, in float32: use float32 \(--dtype float32\)"
    with pytest.raises(InputError, match=f"logits of the dense answer: 192 of 192 numbers {remedy}"):
        collector(models.shared(), one | {"pixel_values": one["pixel_values"] * float("nan")}, new_tokens=2)
    seen, method = collector(models.shared(), one, new_tokens=1), METHODS["visionzip"][0]
    whole = seen.run(method)
    assert whole.kl is not None and whole.kl > 0
    with monkeypatch.context() as patch:
        # Finite, but their difference is not.
        patch.setattr(seen, "_logits", torch.zeros(models.VOCAB).index_fill(0, torch.tensor([1]), 3e38).index_fill(
            0, torch.tensor([2]), -3e38))  # fmt: skip
        with pytest.raises(InputError, match="the distance of the answer pruned by zip to the dense one: 1 of 1 numbers"):
            seen.run(method, "zip")
    with monkeypatch.context() as patch:
        head = collect.CompiledModel.generate

        def generate(*given: Any, **options: Any) -> Any:
            out = head(*given, **options)
            out.logits[0][0, 3] = float("inf")
            return out

        patch.setattr(collect.CompiledModel, "generate", generate)
        with pytest.raises(InputError, match=f"logits of the answer pruned by zip: 1 of 96 numbers {remedy}"):
            seen.runs({"zip": [method]}, QUIET)
    with monkeypatch.context() as patch:
        (step,) = whole.steps
        broken = dataclasses.replace(step, scores={"attention": (float("nan"), *step.scores["attention"][1:])})
        patch.setattr(collect, "steps_of", lambda *_: (broken,))
        with pytest.raises(InputError, match=f"attention {step.where}, read by VisionZip: 1 of 64 numbers {remedy}"):
            seen.run(method)


def test_a_record_of_another_request_is_refused(record: Record) -> None:
    selection = models.optimize(models.shared(), METHODS["vitcop"][1])(**request()).past_key_values.selection
    steps = record.runs["vitcop"][1].steps
    check_steps(steps, selection)
    with pytest.raises(RewriteError, match="is not what the cache was told"):
        check_steps(record.runs["vitcop"][0].steps, selection)


@pytest.mark.parametrize(
    "one, other, place", [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1,), 1), ((), (4,), 0), ((), (), None)]
)
def test_first_difference(one: tuple, other: tuple, place: int | None) -> None:
    assert collect.first_difference(one, other) == place == collect.first_difference(other, one)


def test_pieces_put_together_are_the_text() -> None:
    """A letter of three bytes, one a token, comes with its last."""
    held = "é € !".encode()
    found = collect.pieces_of(lambda ids: bytes(ids).decode(errors="replace"), list(held))
    assert found == ("", "é", " ", "", "", "€", " ", "!") and "".join(found) == "é € !"


class Tree(HTMLParser):
    """Open tags must close in order; what is in each script, and all addresses."""

    VOID = ("meta", "input", "br", "img", "link")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.title = ""
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [given[name] or "" for name in ("src", "href", "action", "srcset") if name in given]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        if self.open and self.open[-1] == "title":
            self.title += data


def test_the_page_is_whole_and_nothing_of_the_request_is_markup(record: Record) -> None:
    text = page(record)
    tree = Tree()
    tree.feed(text)
    tree.close()
    assert not tree.open and len(tree.scripts) == 2 and not tree.addresses
    assert not re.search(r"https?://", text) and HOSTILE not in text
    assert "\u2028" not in tree.scripts[0]
    assert json.loads(tree.scripts[0]) == json.loads(json.dumps(data_of(record)))
    assert json.loads(tree.scripts[0])["prompt"] == HOSTILE and tree.title == f"{HOSTILE} - tiny"
    digest = base64.b64encode(hashlib.sha256(tree.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in tree.policy and "default-src 'none'" in tree.policy


def test_the_page_holds_the_selection(record: Record) -> None:
    data = data_of(record)
    told = data["runs"]["vitcop"][1]
    selection = models.optimize(models.shared(), METHODS["vitcop"][1])(**request()).past_key_values.selection
    assert [step["kept"] for step in told["steps"]] == [rows[0].tolist() for rows in (selection.kept, *selection.stages)]
    assert told["clusters"] == selection.labels[0].tolist()
    assert {name: [run["left_out"] is None for run in own] for name, own in data["runs"].items()} == {
        "vitcop": [True, True], "visionzip": [True, True], "fastv": [True, False], "dense": [True, True],
    }  # fmt: skip
    assert data["patches"] == models.PATCHES and data["retentions"] == list(SHARES)
    head, _, held = data["pictures"][0].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(held))) as picture:
        assert head == "data:image/png;base64" and picture.size == (models.SIDE, models.SIDE)


def test_numbers_that_are_none() -> None:
    answer = Answer((1,), ("a",), "a")
    run = Run(answer=answer, kl=float("inf"), mean_tokens=1 / 3)
    told = data_of(Record("m", "p", (), (Panel("", 1, 1, 0),), ("1",), answer, {"x": (run,)}))["runs"]["x"][0]
    assert told["kl"] is None and told["mean_tokens"] == 0.33333


def test_the_picture_lights_what_is_left(record: Record, tmp_path: Path) -> None:
    run = record.runs["vitcop"][0]
    light = lit(run, models.PATCHES)
    assert set(np.nonzero(light == 1)[0]) == set(run.steps[-1].kept)
    gone = set(range(models.PATCHES)) - set(run.steps[0].kept)
    assert set(np.nonzero(light == light.min())[0]) == gone
    drawing = sheet(record)
    drawing.savefig(tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        values = np.asarray(picture.convert("L"), dtype=float)
    assert values.shape[0] > 900 and values.std() > 20


def test_text_without_spaces_stays_in_the_picture(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut, not dropped, and what the font lacks is a question mark: matplotlib warns of every glyph that it lacks."""
    import matplotlib

    german, chinese = "Donaudampfschifffahrtsgesellschaft" * 4, "图片里有什么？" * 20
    dense = dataclasses.replace(record.dense, text=chinese)
    runs = {name: tuple(dataclasses.replace(run, answer=dataclasses.replace(record.dense, text=f"$x$ {german}"))
            for run in record.runs["vitcop"]) for name in ("one",)}  # fmt: skip
    made = dataclasses.replace(record, prompt=german, dense=dense, runs=runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = sheet(made)
        drawing.savefig(io.BytesIO())
    head, said = drawing.get_suptitle(), drawing.axes[0].get_xlabel()
    assert head == f"{german[:47]}…\nnothing pruned: {'?' * 47}…"
    first, second, verdict = said.split("\n", 2)
    assert (first + second).replace(" ", "") == rf"\$x\${german[:51]}…" and verdict.startswith("differs")
    families = ["no such family", "DejaVu Sans", "STIXGeneral"]
    monkeypatch.setitem(matplotlib.rcParams, "font.family", families)
    assert _plain("a\u2a0ab") == "a\u2a0ab"  # the second steps in for what the first lacks
    monkeypatch.setitem(matplotlib.rcParams, "font.family", families[:1])
    assert _plain("aé图\t") == "aé??"  # none there is: matplotlib takes its own


@pytest.mark.parametrize(
    "text, found", [("", ""), ("a b", "a b"), (" a\n b ", "a b"), ("abcde", "abcde"), ("abcdef", "abcd…"), ("abc def", "abc…")]
)
def test_text_is_cut(text: str, found: str) -> None:
    assert cut(text, 5) == found


def test_a_page_that_cannot_be_written(record: Record, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        save_page(record, tmp_path / "none" / "page.html")
    assert save_page(record, tmp_path / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
