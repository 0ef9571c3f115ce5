"""The plugin in the real lmms-eval, offline: a task of this test's own, whose right answers are the stock model's.

Needs the extra `eval` (CONTRIBUTING.md): CI has it not, as it pulls in a hundred packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import models
import pytest
import spoken
import test_eval
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install -e '.[eval]'")

from lmms_eval import models as registry
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.see.evaluate import MOST_TOKENS, answers, held_out
from examples.see.questions import KINDS
from vitcop_compile import ConfigError, InputError, UnsupportedError, optimize
from vitcop_compile.errors import VitcopWarning
from vitcop_compile.lmms import VitcopCompile, VitcopCompileSimple, manifest
from vitcop_compile.methods import DivPrune

TRAINED = Path(__file__).parents[1] / "examples" / "models" / "llava"

TASKS = {
    "own_say": "output_type: generate_until\nprocess_results: !function own.right_if_equal\n"
    "generation_kwargs:\n  max_new_tokens: 3\n  temperature: 0\n  do_sample: false\n"
    "metric_list:\n  - metric: right\n    aggregation: mean\n    higher_is_better: true\n",
    "own_choose": 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ntarget_delimiter: ""\n'
    "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
    "own_rounds": "output_type: generate_until_multi_round\nprocess_results: !function own.joined\n"
    "generation_kwargs:\n  max_new_tokens: 2\n"
    "metric_list:\n  - metric: rounds\n    aggregation: !function own.first\n    higher_is_better: true\n",
}  # fmt: skip
COMMON = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function own.pictures
doc_to_text: {text}
doc_to_target: {target}
"""
FUNCTIONS = """
import json
from PIL import Image

def pictures(doc):
    return [Image.open(path).convert("RGB") for path in doc["pictures"]]

def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if not round_idx:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    return pictures(doc), "Then, after " + previous_output[-1] + "?", False, previous_output, (previous_round_info or 0) + 1

def right_if_equal(doc, results):
    return {"right": float(results[0] == doc["answer"].strip())}

def joined(doc, results):
    return {"rounds": results[0]}

def first(items):
    return json.dumps(items)
"""
QUESTIONS = (("What?", (1,)), ("Who is it?", (2,)), ("Two?", (1, 2)), ("Where?", (3,)), ("Hi", ()))
CHOICES = ("cat", "Dog", "red", "two", "No.", "1 2", "zzz", "QWE")


def conversation(text: str, pictures: tuple[int, ...]) -> Any:
    return spoken.asked(text, *pictures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it is saved, and tasks with the stock model's answers."""
    root = tmp_path_factory.mktemp("lmms")
    (root / "tasks").mkdir()
    model = models.llava(3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = spoken.END, spoken.PAD
    model.save_pretrained(root / "model")
    spoken.processor().save_pretrained(root / "model")
    lines = []
    for number, (text, seen) in enumerate(QUESTIONS):
        paths = []
        for at in seen:
            spoken.picture(at).save(root / f"{number}_{at}.png")
            paths.append(str(root / f"{number}_{at}.png"))
        asked = conversation(text, seen)
        said = test_eval.text_of(test_eval.stock_answer(asked, 3))
        likely = [test_eval.stock_likelihood(asked, choice)[0] for choice in CHOICES]
        best = max(range(len(CHOICES)), key=likely.__getitem__)
        lines.append({"question": text, "pictures": paths, "answer": said, "choices": list(CHOICES), "best": best})
    assert len({line["best"] for line in lines}) > 1 and len({line["answer"] for line in lines}) > 3
    (root / "data.json").write_text("\n".join(map(json.dumps, lines)))
    (root / "tasks" / "own.py").write_text(FUNCTIONS)
    for name, own in TASKS.items():
        text = "!function own.rounds" if name == "own_rounds" else '"{{question}}"'
        target = '"{{best}}"' if name == "own_choose" else '"{{answer}}"'
        common = COMMON.format(name=name, data=root / "data.json", text=text, target=target)
        (root / "tasks" / f"{name}.yaml").write_text(common + own)
    return root


@cache
def model(root: Path, kind: Any = VitcopCompile, more: str = "method=dense", size: str = "2") -> Any:
    words = f"pretrained={root}/model,backend=eager,dtype=float32,{more}"
    return kind.create_from_arg_string(words, {"batch_size": size, "device": "cpu"})


def evaluated(root: Path, asked: Any, *tasks: str) -> dict[str, Any]:
    manager = TaskManager("ERROR", include_path=str(root / "tasks"), include_defaults=False)
    found = simple_evaluate(asked, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True)
    return found


def test_the_registry_finds_both_models() -> None:
    assert registry.get_model("vitcop_compile") is VitcopCompile
    assert registry.get_model("vitcop_compile", force_simple=True) is VitcopCompileSimple
    assert registry.get_model_manifest("vitcop_compile") == manifest()


def test_dense_says_what_the_stock_model_says(folder: Path) -> None:
    """In messages and in texts and pictures: one picture, two, none."""
    for kind in (VitcopCompile, VitcopCompileSimple):
        found = evaluated(folder, model(folder, kind), "own_say")
        assert found["results"]["own_say"]["right,none"] == 1.0
        counts = [sample["token_counts"][0] for sample in found["samples"]["own_say"]]
        assert [own["input_tokens"] for own in counts] == [
            test_eval.given(conversation(*own))["input_ids"].shape[1] for own in QUESTIONS
        ]


def test_choices_are_scored_with_the_sign_that_lmms_eval_reads(folder: Path) -> None:
    found = evaluated(folder, model(folder, VitcopCompileSimple), "own_choose")
    assert found["results"]["own_choose"]["acc,none"] == 1.0
    for sample, own in zip(found["samples"]["own_choose"], QUESTIONS, strict=True):
        told = [test_eval.stock_likelihood(conversation(*own), choice) for choice in CHOICES]
        pairs = [tuple(response) for response in sample["filtered_resps"]]
        assert [-loss for loss, _ in pairs] == pytest.approx([total for total, _ in told], abs=1e-4)
        assert [likeliest for _, likeliest in pairs] == [likeliest for _, likeliest in told]


def test_choices_need_force_simple(folder: Path) -> None:
    """lmms-eval asks for them in texts and pictures alone."""
    with pytest.raises(AssertionError, match="messages is used for generation only"):
        evaluated(folder, model(folder), "own_choose")
    with pytest.raises(InputError, match="add --force_simple"):
        model(folder).loglikelihood([])


def test_every_round_is_asked_about_the_one_before(folder: Path) -> None:
    rounds = []
    for kind in (VitcopCompile, VitcopCompileSimple):
        found = evaluated(folder, model(folder, kind), "own_rounds")
        rounds.append(json.loads(found["results"]["own_rounds"]["rounds,none"]))
    told = []
    for text, seen in QUESTIONS:
        first = test_eval.text_of(test_eval.stock_answer(conversation(text, seen), 2))
        then = conversation(f"Then, after {first}?", seen)
        told.append([first, test_eval.text_of(test_eval.stock_answer(then, 2))])
    assert rounds == [told, told]


def test_the_command_line_is_all_there_is_to_type(folder: Path, tmp_path: Path) -> None:
    words = f'pretrained={folder}/model,method="vitcop:shallow_layer=1,deep_layer=2",retention=1/3,backend=eager,dtype=float32'
    command = [sys.executable, "-m", "lmms_eval", "--model", "vitcop_compile", "--model_args", words, "--tasks", "own_say"]
    more = ["--include_path", str(folder / "tasks"), "--batch_size", "2", "--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("*_results.json")
    found = json.loads(path.read_text())
    assert found["config"]["model"] == "vitcop_compile" and int(found["config"]["batch_size"]) == 2
    assert 0 <= found["results"]["own_say"]["right,none"] <= 1 and "right" in done.stdout


@pytest.mark.parametrize(
    "words, method", [("method=dense", None), ("method=divprune,retention=1/9", DivPrune(retention=1 / 9))]
)
def test_the_trained_model_is_right_as_often_as_without_lmms_eval(words: str, method: Any, tmp_path: Path) -> None:
    asked = [example for kind in KINDS for example in held_out(kind, 3)]
    lines = []
    for number, example in enumerate(asked):
        example.image.save(tmp_path / f"{number}.png")
        lines.append({"question": example.question, "pictures": [str(tmp_path / f"{number}.png")], "answer": example.answer})
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tasks" / "own.py").write_text(FUNCTIONS)
    common = COMMON.format(name="own_see", data=tmp_path / "data.json", text='"{{question}}"', target='"{{answer}}"')
    (tmp_path / "tasks" / "own_see.yaml").write_text(common + TASKS["own_say"].replace("tokens: 3", f"tokens: {MOST_TOKENS}"))
    given = f"pretrained={TRAINED},backend=eager,dtype=float32,{words}"
    found = evaluated(tmp_path, VitcopCompile.create_from_arg_string(given, {"batch_size": "7", "device": "cpu"}), "own_see")
    stock = AutoModelForImageTextToText.from_pretrained(TRAINED, dtype=torch.float32).eval()
    fast = stock if method is None else optimize(stock, method, backend="eager")
    told = answers(fast, AutoProcessor.from_pretrained(TRAINED), "llava", asked)
    right = [said == example.answer for said, example in zip(told, asked, strict=True)]
    assert 0.5 < sum(right) / len(right) == pytest.approx(found["results"]["own_see"]["right,none"])
    assert [sample["filtered_resps"][0].strip() for sample in found["samples"]["own_see"]] == told


@pytest.mark.parametrize(
    "words, error, message",
    [
        ("colour=red", ConfigError, "model_args: colour unknown: use some of pretrained, method, retention"),
        ("dtype=int8", ConfigError, "dtype='int8' is unknown: use one of auto, float32"),
        ("num_frames=4,fps=1.0", ConfigError, "num_frames=4 and fps=1.0 both choose the frames"),
        ("max_pixels=1000", ConfigError, "max_pixels=1000 is no setting of LlavaProcessor: leave it out"),
        ("num_frames=4", ConfigError, "num_frames=4 is no setting of LlavaProcessor, which takes no videos: leave it out"),
        ("fps=1.0", ConfigError, "fps=1.0 is no setting of LlavaProcessor, which takes no videos: leave it out"),
        ("chat_template=nowhere.jinja", ConfigError, "chat_template=nowhere.jinja cannot be read: No such file"),
        ("stop_at_blank_line=2", ConfigError, "stop_at_blank_line=2 is neither true nor false"),
    ],
)
def test_arguments_that_are_none_are_refused(folder: Path, words: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(folder, more=words)


def test_a_model_that_cannot_be_had_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="names no model: write pretrained=FOLDER"):
        VitcopCompile()
    with pytest.raises(UnsupportedError, match=r"pretrained=.*/tasks cannot be loaded"):
        VitcopCompile(str(folder / "tasks"))
    with pytest.raises(ConfigError, match="batch_size='auto' is no count: programs are compiled for a size"):
        model(folder, size="auto")


def test_settings_of_requests(folder: Path) -> None:
    seen = model(folder)
    assert seen._settings({"until": ["\n\n", "Q:"], "top_p": 1.0}) == {"until": ["Q:"], "top_p": 1.0}
    with pytest.warns(VitcopWarning, match="image_aspect_ratio of a task tells other models how to see: left out"):
        assert seen._settings({"image_aspect_ratio": "pad", "until": []}) == {"until": []}


def test_a_system_prompt_stands_before_the_question(folder: Path) -> None:
    seen = model(folder, more='method=dense,system_prompt="Be brief, please."')
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert seen.evaluator.render(seen._conversation(messages)) == "Be brief, please.\nU:HiA:"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert seen.evaluator.render(seen._conversation(messages)) == "Be brief, please.\nU:HiA:YesA:"


def test_what_cannot_be_asked_is_refused(folder: Path) -> None:
    seen = model(folder, VitcopCompileSimple)
    for part, message in (
        ({"type": "audio", "url": "a.wav"}, "a question with audio: choose tasks with texts, images and videos"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "a part of a video is asked about"),
    ):
        with pytest.raises(InputError, match=message):
            seen._conversation([{"role": "user", "content": [part]}])
    pair = type("Request", (), {"args": ("", "cat")})
    with pytest.raises(InputError, match="acc_mutual_info, whose numbers lmms-eval pairs wrongly: use acc or acc_norm"):
        seen.loglikelihood([pair()])
