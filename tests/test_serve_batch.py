"""Files of requests: every line is answered once, whatever it holds and however often the run was stopped."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import doors
import folders
import models
import pytest
import spoken
import test_cli
import torch
from doors import END, Spoken, door, ids_of

from vitcop_compile import ConfigError, InputError, VitcopError
from vitcop_compile.serve import batch, opening
from vitcop_compile.serve.batch import Answerer, Output, Tally, answering, blocks_of, lines_of, run
from vitcop_compile.serve.cluster import Cluster

invoke, error_of = test_cli.invoke, test_cli.error_of


def request(custom_id: Any, text: str = "Hello?", url: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    """A line of OpenAI's batch format."""
    body = {"model": "spoken", "messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_all(source: Path, output: Path, scheduler: Spoken, at_once: int = 3) -> Tally:
    """A run of the command, but for its models."""
    lines, tally = lines_of(source), Tally()

    async def work(left: list[batch.Line], out: Output) -> None:
        def write(answer: dict[str, Any]) -> None:
            out.write(answer)
            tally.add(answer)

        async with answering(door(scheduler)) as answerer:
            await run(answerer, source, left, at_once, write)

    with Output(output, lines) as out:
        asyncio.run(work([line for line in lines if line.key not in out.done], out))
    return tally


def echo(inputs: Any, sampling: Any, choice: int) -> list[int]:
    return [*ids_of(doors.text_of(inputs).split("[user]")[-1].split("[assistant]")[0]), END]


WRONG: list[tuple[Any, str]] = [
    ("{not json", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ({"body": {}}, "has no custom_id that is a string"),
    ("[]", "has no custom_id that is a string"),
    (request(7), "has no custom_id that is a string"),
    (request("files", url="/v1/files"), "asks POST /v1/files: use POST, /v1/chat/completions or"),
    (request("get") | {"method": "GET"}, "asks GET"),
    (request("nothing") | {"body": None}, "has no body"),
    (request("stream", stream=True), "answers of a batch come whole"),
]


def test_every_line_has_an_answer(tmp_path: Path) -> None:
    good = [request(f"n{number}", f"line {number}") for number in range(12)]
    refused = [request("unknown", model="other"), request("field", tools=[1])]
    prompts = {
        "custom_id": "text",
        "url": "/v1/completions",
        "body": {"model": "spoken", "prompt": ["a", "b"], "max_tokens": 2},
    }
    source = written(tmp_path / "in", *good, "", *(line for line, _ in WRONG), *refused, "  ", prompts)
    spoken = Spoken(echo)
    tally = answer_all(source, tmp_path / "out", spoken)
    found = read(tmp_path / "out")
    assert len(found) == len(good) + len(WRONG) + len(refused) + 1
    assert all(answer.keys() == {"id", "custom_id", "response", "error"} for answer in found)
    assert len({answer["id"] for answer in found}) == len(found)
    by_id = {answer["custom_id"]: answer for answer in found if answer["custom_id"]}
    for number in range(12):
        response = by_id[f"n{number}"]["response"]
        assert response["status_code"] == 200 and response["body"]["object"] == "chat.completion"
        assert response["body"]["choices"][0]["message"]["content"] == f"line {number}"
    assert [choice["text"] for choice in by_id["text"]["response"]["body"]["choices"]] == ["a", "b"]
    assert by_id["unknown"]["response"]["status_code"] == 404 and by_id["field"]["response"]["status_code"] == 400
    assert by_id["field"]["response"]["body"]["error"]["param"] == "tools"
    wrong = [answer["error"] for answer in found if answer["error"]]
    assert sorted(error["line"] for error in wrong) == [14 + place for place in range(len(WRONG))]
    for place, (_, message) in enumerate(WRONG):
        (error,) = [one for one in wrong if one["line"] == 14 + place]
        assert message in error["message"] and error["code"] == "invalid_line"
    assert (tally.answered, tally.failed) == (len(found), len(WRONG) + 2)
    assert tally.tokens == sum(len(f"line {number}") + 1 for number in range(12)) + 4
    assert spoken.closed is True and len(spoken.asked) == 14
    # Again: nothing is left to do.
    before = (tmp_path / "out").read_bytes()
    again = Spoken(echo)
    assert answer_all(source, tmp_path / "out", again).answered == 0 and not again.asked
    assert (tmp_path / "out").read_bytes() == before


def test_no_more_than_so_many_are_under_way(tmp_path: Path) -> None:
    source = written(tmp_path / "in", *(request(str(number), "x" * (number % 5 + 1)) for number in range(20)))
    spoken = Spoken(echo)
    real, most = spoken.submit, []

    def submit(*given: Any) -> Any:
        most.append(sum(each.ended is None for each in spoken.asked) + 1)
        return real(*given)

    spoken.submit = submit  # type: ignore[method-assign]
    answer_all(source, tmp_path / "out", spoken, at_once=4)
    assert len(most) == 20 and max(most) <= 4 and len(read(tmp_path / "out")) == 20


def test_a_queue_that_is_full_is_waited_for(tmp_path: Path) -> None:
    spoken, waits = Spoken("ok", most=0), []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        spoken._most = 10

    answer = asyncio.run(Answerer(door(spoken), sleep).answer(1, json.dumps(request("a")).encode()))
    assert answer["response"]["status_code"] == 200 and waits == [3.0]

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    with pytest.raises(VitcopError, match=r"line 1 was refused 60 times, .*no more can wait"):
        asyncio.run(Answerer(door(Spoken(most=0)), wait).answer(1, json.dumps(request("a")).encode()))
    assert waits == [3.0] * 61


def test_a_scheduler_that_has_stopped_answers_no_line(tmp_path: Path) -> None:
    """Its 503 in the output would be kept as an answer."""

    class Stopped(Spoken):
        def counts(self) -> Any:
            return {**super().counts(), "stopped": float(len(self.asked) >= 3)}

    source = written(tmp_path / "in", *(request(f"n{number}", f"{number}") for number in range(9)))
    lines, output = lines_of(source), tmp_path / "out"

    async def work(out: Output) -> None:
        async with answering(door(Stopped(echo))) as answerer:
            await run(answerer, source, lines, 1, out.write)

    with Output(output, lines) as out, pytest.raises(VitcopError, match=r"line \d cannot be answered now: spoken has stopped"):
        asyncio.run(work(out))
    assert 2 <= len(read(output)) <= 3 and all(answer["response"]["status_code"] == 200 for answer in read(output))


def test_a_run_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """After an error of the disk in the middle, and with what a killed process leaves: half a line."""
    source = written(tmp_path / "in", *(request(f"n{number}", f"{number}") for number in range(9)))
    lines, output = lines_of(source), tmp_path / "out"

    async def work(out: Output) -> None:
        def write(answer: dict[str, Any]) -> None:
            if len(out.done) == 4:
                raise OSError("no space left")
            out.write(answer)

        async with answering(door(stopped)) as answerer:
            await run(answerer, source, lines, 2, write)

    stopped = Spoken(echo)
    with Output(output, lines) as out, pytest.raises(OSError, match="no space"):
        asyncio.run(work(out))
    assert stopped.closed is False
    held = output.read_bytes()
    assert len(read(output)) == 4
    for cut in (
        b'{"id":"ba',
        b'{"id":"batch_req_12',
        b'{"id":"batch_req_12","custom_id":"n8","response":null,"error":nul',
        b"",
    ):
        output.write_bytes(held + cut)
        with Output(output, lines) as out:
            assert len(out.done) == 4 and output.read_bytes() == held
    # A whole line that lacks its end alone is kept.
    output.write_bytes(held[:-1])
    with Output(output, lines) as out:
        assert len(out.done) == 4
    assert output.read_bytes() == held
    spoken = Spoken(echo)
    assert answer_all(source, output, spoken).answered == 5 and len(spoken.asked) == 5
    assert sorted(answer["custom_id"] for answer in read(output)) == [f"n{number}" for number in range(9)]


@pytest.mark.slow
def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    """One that is killed while it writes: what `write` returned from is there."""
    source = written(tmp_path / "in", *(request(f"n{number}") for number in range(50)))
    code = (
        "import sys, os, signal; from pathlib import Path\n"
        "from vitcop_compile.serve.batch import Output, lines_of\n"
        "out = Output(Path(sys.argv[2]), lines_of(Path(sys.argv[1])))\n"
        "for number in range(3):\n"
        "    out.write({'id': 'batch_req_0', 'custom_id': f'n{number}', 'response': {}, 'error': None})\n"
        'out._file.write(b\'{"id":"batch_req_\'); out._file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "out"])
    assert done.returncode == -9 and not (tmp_path / "out").read_bytes().endswith(b"\n")
    with Output(tmp_path / "out", lines_of(source)) as out:
        assert out.done == {"n0", "n1", "n2"}


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in cannot be read: No such file"):
        lines_of(tmp_path / "in")
    twice = written(tmp_path / "twice", request("a"), request("b"), request("a"))
    with pytest.raises(InputError, match="lines 1 and 3 have one custom_id, 'a'"):
        lines_of(twice)
    lines = lines_of(written(tmp_path / "in", request("a"), "{"))
    assert [(line.number, line.key) for line in lines] == [(1, "a"), (2, 2)]
    for held, message in (
        (b"hello\n", "line 1 is no answer of a batch"),
        (b"hello", "line 1 is no answer of a batch"),
        (b'{"id":"batch_req_1"}\n', "line 1 is no answer"),
        (
            b'{"id":"batch_req_1","custom_id":"z","response":null,"error":null}\n',
            "line 1 answers 'z', which the input has not",
        ),
        ((tmp_path / "in").read_bytes(), "line 1 is no answer"),
    ):
        (tmp_path / "out").write_bytes(held)
        with pytest.raises(InputError, match=message):
            Output(tmp_path / "out", lines)
        assert (tmp_path / "out").read_bytes() == held
    (tmp_path / "out").unlink()
    with Output(tmp_path / "out", lines), pytest.raises(ConfigError, match="is being written by another process"):
        Output(tmp_path / "out", lines)
    with pytest.raises(InputError, match="cannot be written"):
        Output(tmp_path / "nowhere" / "out", lines)


@pytest.mark.slow
def test_the_command_by_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model, with pictures and without: greedy answers are those of `generate`."""
    model = models.optimize(models.shared(3), folders.CONFIG)
    monkeypatch.setattr(opening.Opening, "_optimized", lambda self, source: model)
    models.shared(3).config.save_pretrained(tmp_path / "tiny")
    spoken.processor().save_pretrained(tmp_path / "tiny")
    asked = []
    for number in range(6):
        content: Any = [{"type": "text", "text": f"What is {number}?"}]
        if number % 3:
            path = tmp_path / "picture.png"
            spoken.picture(number).save(path)
            content = [doors.shown(path.read_bytes()), *content]
        asked.append(request(f"n{number}", content, model="tiny", temperature=0, max_tokens=4 + number))
    source = written(tmp_path / "in", *asked, request("long", max_tokens=4000, model="tiny"))
    options = ("--backend", "eager", "--slots", 2, "--max-text-len", 48, "--max-new-tokens", 16)
    result = invoke("batch", tmp_path / "tiny", source, tmp_path / "out", *options)
    assert result.exit_code == 1, result.output  # one is refused
    assert "7 of 7 lines answered, 0 were there, 1 of the new ones with an error" in result.output
    by_id = {answer["custom_id"]: answer["response"] for answer in read(tmp_path / "out")}
    assert by_id["long"]["status_code"] == 400 and "max_tokens=4000 exceeds 16" in by_id["long"]["body"]["error"]["message"]
    processor = spoken.processor()
    for number in range(6):
        turns = spoken.asked(f"What is {number}?", *([number] if number % 3 else []))
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=4 + number)[0, inputs["input_ids"].shape[1] :]
        choice = by_id[f"n{number}"]["body"]["choices"][0]
        assert choice["message"]["content"] == processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert choice["finish_reason"] == "length"
    result = invoke("batch", tmp_path / "tiny", source, tmp_path / "out", *options)
    assert result.exit_code == 0 and "0 of 7 lines answered, 7 were there" in result.output


def test_what_the_command_refuses(tmp_path: Path) -> None:
    source = written(tmp_path / "in", request("a"))
    assert "--replicas is of a cluster: add --ray" in error_of("batch", "x", source, tmp_path / "out", "--replicas", 2)
    assert "--replicas 0: Input should be greater" in error_of(
        "batch", "x", source, tmp_path / "out", "--ray", "--replicas", 0
    )
    assert "cannot be loaded" in error_of("batch", tmp_path, source, tmp_path / "out")
    assert "retention='much' is neither one of" in error_of("batch", tmp_path, source, tmp_path / "out", "--retention", "much")


def test_a_cluster_is_opened_as_the_command_says() -> None:
    cluster = Cluster(models={"a": "x"}, method="fastv:layer=2", image_sizes=[(2, 3)], max_body_mib=1, image_hosts=["a.org"])
    assert type(cluster.opening().settings).__name__ == "FastV" and cluster.opening().image_sizes == [(2, 3)]
    assert cluster.limits().body == 1 << 20 and cluster.limits().pictures.hosts == ("a.org",)
    assert Cluster(models={"a": "x"}, retention="0.25").opening().settings != cluster.opening().settings
    assert cluster.processor_of("a") == "x" and Cluster(models={"a": "x"}, processor="p").processor_of("a") == "p"


def test_parts_of_a_batch() -> None:
    assert [blocks_of(count) for count in (1, 32, 33, 10**6)] == [1, 1, 2, 10_000]
