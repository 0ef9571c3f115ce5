"""The HTTP server in this process: shapes, settings and refusals, by what OpenAI's documentation says."""

from __future__ import annotations

import json
import re
from typing import Any
from unittest import mock

import doors
import pytest
from doors import END, Spoken, asked, door, events_of, ids_of, post, refused, shown, talk

from vitcop_compile import ConfigError, InputError
from vitcop_compile.serve.answers import Piece, TokenText, Told
from vitcop_compile.serve.door import Door, Limits
from vitcop_compile.serve.pictures import Pictures
from vitcop_compile.serve.replies import ChatReply, CompletionReply
from vitcop_compile.serve.requests import Overloaded, Sampling


def test_a_chat() -> None:
    spoken = Spoken("Good day.")
    answer = post(door(spoken), messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}])
    body = answer.json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body.pop("id")) and body.pop("created") > 1.7e9
    # What was asked: a beginning, 13 + 8 and 6 + 6 letters and [assistant], as the template has them.
    assert doors.text_of(spoken.asked[0].inputs) == "[system]Be kind.[user]Hello?[assistant]"
    prompt = 1 + len("[system]Be kind.[user]Hello?[assistant]")
    assert body == {
        "object": "chat.completion",
        "model": "spoken",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Good day.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 10,
            "total_tokens": prompt + 10,
            "prompt_tokens_details": {"text_tokens": prompt, "image_tokens": 0},
        },
    }
    assert spoken.wait() == ["finished"]


def test_a_chat_that_is_streamed() -> None:
    answer = post(door(Spoken("né")), stream=True, stream_options={"include_usage": True}, n=2)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["cache-control"] == "no-cache"
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]" and len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == "spoken" for chunk in chunks)
    *parts, last = chunks
    assert all(part["usage"] is None for part in parts)
    prompt = 1 + len("[user]Hello?[assistant]")
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
    assert last["usage"]["total_tokens"] == prompt + 8
    choices = [choice for part in parts for choice in part["choices"]]
    for number in range(2):
        deltas = [choice["delta"] for choice in choices if choice["index"] == number]
        assert deltas == [{"role": "assistant", "content": ""}, {"content": "n"}, {"content": "é"}, {}]
        assert [choice["finish_reason"] for choice in choices if choice["index"] == number] == [None, None, None, "stop"]


def test_completions_of_texts_and_of_token_ids() -> None:
    spoken = Spoken(lambda inputs, sampling, choice: [*ids_of(f"{doors.text_of(inputs)}{choice}"), END])
    at = door(spoken)
    answer = post(at, "/v1/completions", {"model": "spoken", "prompt": ["a", "b"], "n": 2, "logprobs": 1})
    body = answer.json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert body["usage"]["prompt_tokens"] == 4 and body["usage"]["completion_tokens"] == 12
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "0"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"0": -0.5}],
        "text_offset": [0, 1],
    }
    assert [each.sampling.max_new_tokens for each in spoken.asked] == [16, 16]  # OpenAI's default
    for prompt, texts in (("a", ["a0"]), (ids_of("c"), ["c0"]), ([ids_of("c"), ids_of("d")], ["c0", "d0"])):
        answer = post(at, "/v1/completions", {"model": "spoken", "prompt": prompt})
        assert [choice["text"] for choice in answer.json()["choices"]] == texts, prompt
    *chunks, done = events_of(post(at, "/v1/completions", {"model": "spoken", "prompt": "a", "stream": True}).text)
    assert done == "[DONE]" and all(chunk["object"] == "text_completion" for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a0"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    for prompt in ("", [], [""]):
        refused(post(at, "/v1/completions", {"model": "spoken", "prompt": prompt}), 400, "prompt is empty", "prompt")


def test_log_probabilities_of_a_chat() -> None:
    answer = post(door(Spoken("é")), logprobs=True, top_logprobs=2)
    first, second = answer.json()["choices"][0]["logprobs"]["content"]
    assert first["bytes"] == [0xC3] and second["bytes"] == [0xA9] and first["logprob"] == -0.5
    assert [(top["bytes"], top["logprob"]) for top in first["top_logprobs"]] == [([0xC3], -0.5), ([0xC4], -1.5)]
    assert post(door(Spoken("é")), logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    *chunks, _ = events_of(post(door(Spoken("é")), logprobs=True, stream=True).text)
    told = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert [len(one["content"]) if one else 0 for one in told] == [0, 1, 1, 0]


def test_settings_reach_the_scheduler() -> None:
    spoken = Spoken()
    at = door(spoken)
    post(at)
    assert spoken.asked[-1].sampling == Sampling(max_new_tokens=64, temperature=1.0)  # OpenAI's defaults, the model's length
    asks = {
        "max_completion_tokens": 7, "n": 2, "seed": -5, "temperature": 0, "top_p": 0.5, "presence_penalty": 1,
        "frequency_penalty": -1.5, "top_k": 9, "repetition_penalty": 1.25, "min_tokens": 3, "ignore_eos": True,
        "stop_token_ids": [END], "logprobs": True, "top_logprobs": 4, "user": "somebody",
    }  # fmt: skip
    assert post(at, **asks).status_code == 200
    assert spoken.asked[-1].sampling == Sampling(
        max_new_tokens=7, min_new_tokens=3, temperature=0.0, top_p=0.5, top_k=9, repetition_penalty=1.25, presence_penalty=1.0,
        frequency_penalty=-1.5, stop_ids=(END,), ignore_end=True, seed=-5, logprobs=4, n=2,
    )  # fmt: skip
    # What is null is not given, and what asks for nothing is nothing.
    nothing = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "logit_bias": {}, "store": False}
    assert post(at, **nothing, **dict.fromkeys(asks), stop=None, metadata=None, parallel_tool_calls=None).status_code == 200
    assert spoken.asked[-1].sampling == spoken.asked[0].sampling
    assert post(at, max_tokens=5, max_completion_tokens=5).status_code == 200
    assert spoken.asked[-1].sampling.max_new_tokens == 5


def test_an_answer_ends_with_its_length_or_a_token() -> None:
    at = door(Spoken("Hello there."))
    choice = post(at, max_tokens=5).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "length")
    choice = post(at, stop_token_ids=ids_of(" ")).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")
    # The model's own end is a token as any other then, without a text.
    said = Spoken(lambda *_: [*ids_of("a"), END, *ids_of("b")])
    choice = post(door(said), max_tokens=3, ignore_eos=True).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_and_cancels_the_rest(stream: bool) -> None:
    spoken = Spoken(lambda *_: [*ids_of("one, two, three"), *ids_of("x") * 1000])
    spoken.allow(14)
    at = door(spoken)
    answer = post(at, stop=[", th", "never"], stream=stream)
    if stream:
        *chunks, done = events_of(answer.text)
        choices = [chunk["choices"][0] for chunk in chunks]
        text, end = "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]
        assert done == "[DONE]"
    else:
        choice = answer.json()["choices"][0]
        text, end = choice["message"]["content"], choice["finish_reason"]
        assert answer.json()["usage"]["completion_tokens"] == 12
    assert (text, end) == ("one, two", "stop")
    assert spoken.wait() == ["cancelled"] and spoken.asked[0].told < 20
    assert post(at, stop="e", max_tokens=3).json()["choices"][0]["message"]["content"] == "on"


def test_one_of_several_answers_that_stops_leaves_the_others() -> None:
    """And is cancelled alone: nothing decodes on for it."""
    spoken = Spoken(lambda inputs, sampling, choice: [*ids_of(("no stop", "a." + "b" * 50)[choice]), END])
    choices = post(door(spoken), n=2, stop=".").json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["no stop", "a"]
    assert spoken.wait()[0] in ("finished", "cancelled") and spoken.asked[0].cancelled == {0, 1}


def test_pictures_of_a_conversation() -> None:
    spoken = Spoken()
    jpeg = doors.data_url(doors.picture(kind="JPEG"), "image/jpeg")
    messages = [
        {"role": "user", "content": [shown(doors.picture()), {"type": "text", "text": "What is it?"}, shown(jpeg)]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Sure?"},
    ]
    answer = post(door(spoken), messages=messages)
    inputs = spoken.asked[0].inputs
    assert inputs.keys() == {"input_ids", "pixel_values"}
    assert inputs["pixel_values"].shape == (2, 3, doors.SIDE, doors.SIDE)
    assert doors.text_of(inputs) == "[user]What is it?[assistant]Red.[user]Sure?[assistant]"
    details = answer.json()["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] == 2 * (doors.SIDE // doors.PATCH) ** 2
    # The second is in its place: the template puts 16 placeholders there.
    ids = inputs["input_ids"][0].tolist()
    assert ids[7:23] == [doors.IMAGE] * 16 and ids.index(doors.IMAGE, 23) == 23 + len("What is it?")


def test_several_models_behind_one_door() -> None:
    one, two = Spoken("one"), Spoken("two")
    at = door(one, two)
    assert post(at, model="other").json()["choices"][0]["message"]["content"] == "two"
    assert not one.asked and len(two.asked) == 1
    found = talk(at, lambda client: client.get("/v1/models")).json()
    assert found["object"] == "list" and [card["id"] for card in found["data"]] == ["spoken", "other"]
    assert all(card.keys() == {"id", "object", "created", "owned_by"} for card in found["data"])
    assert talk(at, lambda client: client.get("/v1/models/other")).json() == found["data"][1]
    error = refused(post(at, model="gpt-5"), 404, "'gpt-5' is not served here: these are spoken, other", "model")
    assert error["code"] == "model_not_found"
    refused(talk(at, lambda client: client.get("/v1/models/gpt-5")), 404, "not served here", "model")


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools is not supported here", "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported here", "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported", "logit_bias"),
        ({"temprature": 1}, "temprature is not supported", "temprature"),
        ({"model": None}, "model is missing", "model"),
        ({"messages": []}, "messages: List should have at least 1 item", "messages"),
        ({"messages": "Hi"}, "messages: Input should be a valid array", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'developer', 'user' or 'assistant'", "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "content is missing", "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "valid array", "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "'text', 'image_url'", "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "name is not supported", "messages.0.name"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number", "temperature"),
        ({"temperature": -1}, "temperature=-1.0 is out of range: from 0", None),
        ({"top_p": 0}, "top_p=0.0 is not above 0", None),
        ({"presence_penalty": 3}, "from -2 to 2", None),
        ({"max_tokens": 65}, "max_tokens=65 exceeds 64, the most that spoken generates", "max_tokens"),
        ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
        ({"max_tokens": 2.5}, "valid integer", "max_tokens"),
        ({"max_tokens": True}, "valid integer", "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "two names of one number", None),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 exceeds max_tokens=8", "min_tokens"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20", "top_logprobs"),
        ({"n": 0}, "greater than or equal to 1", "n"),
        ({"n": 17}, "a request may have 16 in all", "n"),
        ({"stop": ""}, "at least 1 character", "stop.0"),
        ({"stop": ["a"] * 17}, "at most 16 items", "stop"),
        ({"seed": 2**63}, "seed", "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options says how to stream", None),
        ({"stream": "yes"}, "valid boolean", "stream"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_body_is_named(fields: dict[str, Any], message: str, param: str | None) -> None:
    spoken = Spoken()
    refused(post(door(spoken), **fields), 400, message, param)
    assert not spoken.asked


def test_bodies_that_are_no_json() -> None:
    at = door(Spoken())
    for body in (b"", b"{", b'{"model": "spoken",}', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000, b"NaN"):
        answer = post(at, body=body)
        assert refused(answer, 400, "")["code"] in ("invalid_json", "invalid_value"), body
    refused(post(at, body=b"[]"), 400, "the body: Input should be")
    refused(post(at, body=b'{"model": "spoken", "messages": [], "temperature": NaN}'), 400, "finite number", "temperature")


def test_messages_that_the_processor_refuses() -> None:
    at = door(Spoken())
    twice = [{"role": "user", "content": "Hi"}, {"role": "developer", "content": "Be kind."}]
    refused(post(at, messages=twice), 400, "chat template refuses these messages: a system message comes first")
    refused(post(at, messages=[{"role": "user", "content": "<image> what?"}]), 400, "'<image>', which stands for a picture")
    refused(post(at, "/v1/completions", {"model": "spoken", "prompt": "<image>"}), 400, "stands for a picture")
    refused(post(at, messages=[{"role": "user", "content": "x" * 5_001}]), 400, "5001 characters of text, the limit is 5000")
    system = [{"role": "system", "content": [shown(doors.picture())]}, {"role": "user", "content": "Hi"}]
    refused(post(at, messages=system), 400, "role system holds a picture", "messages.0")


def test_a_model_without_a_chat_template_completes_texts() -> None:
    bare = doors.served(Spoken("yes"))
    bare.prompts._chats = False
    refused(post(Door([bare])), 400, "no chat template: use /v1/completions")
    answer = post(Door([bare]), "/v1/completions", {"model": "spoken", "prompt": "?"})
    assert answer.json()["choices"][0]["text"] == "yes"


def test_paths_and_methods_that_are_none() -> None:
    at = door(Spoken())
    refused(post(at, "/v1/embeddings", {}), 404, "POST /v1/embeddings: Not Found")
    refused(talk(at, lambda client: client.get("/v1/chat/completions")), 405, "Method Not Allowed")


def test_health_and_closing() -> None:
    one, two = Spoken(), Spoken()
    at = door(one, two, limits=Limits(stalled=10))
    answer = talk(at, lambda client: client.get("/health"))
    assert answer.status_code == 200 and answer.json()["status"] == "ok"
    two.age = 10.5
    answer = talk(at, lambda client: client.get("/health"))
    assert answer.status_code == 503 and answer.json()["status"] == "stalled"
    assert answer.json()["models"]["other"] == {"heartbeat_age_s": 10.5}
    two.age = 0
    at.shut()
    answer = talk(at, lambda client: client.get("/health"))
    assert answer.status_code == 503 and answer.json()["status"] == "closing"
    error = post(at)
    assert refused(error, 503, "the server is closing")["type"] == "server_error" and error.headers["retry-after"] == "5"
    assert at.drained and not one.asked


def metric(text: str, name: str, **labels: str) -> float:
    wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    found = re.search(rf"^{name}\{{{re.escape(wanted)}\}} (\S+)$", text, re.MULTILINE)
    assert found, (name, wanted, text)
    return float(found[1])


def test_metrics() -> None:
    ticks = iter(range(1000))
    at = door(Spoken(), Spoken(), clock=lambda: float(next(ticks)))  # every look at it is a second later

    async def work(client: Any) -> str:
        await client.post("/v1/chat/completions", json=asked(max_tokens=3))
        await client.post("/v1/chat/completions", json=asked(model="nobody"))
        return (await client.get("/metrics")).text

    text = talk(at, work)
    # A second from the request to its first token, another to each of the next two.
    assert metric(text, "vitcop_time_to_first_token_seconds_sum", model="spoken") == 1
    assert metric(text, "vitcop_time_to_first_token_seconds_count", model="spoken") == 1
    assert metric(text, "vitcop_time_per_output_token_seconds_sum", model="spoken") == 1
    assert metric(text, "vitcop_http_requests_total", model="spoken", status="200") == 1
    assert metric(text, "vitcop_http_requests_total", model="", status="404") == 1
    for name, value in (
        ("slots", 4), ("occupied", 1), ("queued", 0), ("oldest_queued_seconds", 0.25), ("heartbeat_age_seconds", 0),
        ("submitted_total", 0), ("rejected_total", 0), ("cancelled_total", 0), ("prefills_total", 1),
        ("decode_steps_total", 2), ("padded_rows_total", 3), ("text_rows_total", 8), ("feature_hits_total", 1),
        ("feature_misses_total", 2), ("finished_total", 0), ("failed_total", 0),
    ):  # fmt: skip
        assert metric(text, f"vitcop_{name}", model="other") == value, name


def test_settings_that_allow_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="models are named nothing"):
        Door([])
    with pytest.raises(ConfigError, match="models are named spoken, spoken"):
        Door([doors.served(Spoken()), doors.served(Spoken())])
    for wrong in ({"body": 0}, {"preparing": 0}, {"answers": -1}, {"stalled": float("nan")}, {"body_seconds": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* is not above 0"):
            Limits(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pixels=0 is not above 0"):
        Pictures(pixels=0)


def test_what_a_scheduler_refuses_has_a_status_of_its_own() -> None:
    refused(post(door(Spoken(refuse=InputError("900 text tokens exceed max_text_len=512")))), 400, "900 text tokens exceed")
    answer = post(door(Spoken(most=0)), stream=True)
    assert refused(answer, 429, "no more can wait")["type"] == "rate_limit_error" and answer.headers["retry-after"] == "3"
    answer = post(door(Spoken(refuse=RuntimeError("a secret path"))))
    assert "secret" not in refused(answer, 500, "failed on this request (RuntimeError)")["message"]
    json.loads(answer.text)


def test_a_scheduler_that_has_stopped(caplog: pytest.LogCaptureFixture) -> None:
    class Stopped(Spoken):
        is_stopped = True

        def counts(self) -> Any:
            return {**super().counts(), "stopped": float(self.is_stopped)}

    one, two = Stopped(refuse=Overloaded("the scheduler has stopped: a secret path", 1.0)), Spoken()
    at = door(one, two)
    answer = talk(at, lambda client: client.get("/health"))
    assert answer.status_code == 503 and answer.json()["status"] == "stopped"
    answer = post(at)
    assert refused(answer, 503, "spoken has stopped, the server's log says why")["code"] == "stopped"
    assert post(at, model="other").status_code == 200
    assert metric(talk(at, lambda client: client.get("/metrics")).text, "vitcop_stopped", model="spoken") == 1
    # It stops between the look at it and what is submitted.
    looks = iter([False, True])
    with mock.patch.object(Stopped, "is_stopped", property(lambda self: next(looks))):
        answer = post(at)
    assert "secret" not in refused(answer, 503, "spoken has stopped")["message"] and "a secret path" in caplog.text
    # Who is inside by then is told the same, whatever it was that failed.
    looks = iter([False, True])
    inside = door(Stopped(lambda *_: RuntimeError("another secret")))
    with mock.patch.object(Stopped, "is_stopped", property(lambda self: next(looks))):
        answer = post(inside)
    assert "secret" not in refused(answer, 503, "spoken has stopped")["message"] and "another secret" in caplog.text
    one.is_stopped = False
    refused(post(at), 429, "the scheduler has stopped")  # overloaded, whatever it says


def test_a_logarithm_of_nothing_is_a_number() -> None:
    texts = mock.Mock(return_value=TokenText("a", b"a"))
    piece = Piece("a", (Told(5, float("-inf"), ((6, float("-inf")), (5, -0.5)), 0),), "stop")
    for kind in (ChatReply, CompletionReply):
        body = json.dumps(kind("spoken", texts, True).whole([piece], {}), allow_nan=False)
        assert body.count("-9999.0") == (2 if kind is ChatReply else 1)
