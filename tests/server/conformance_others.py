"""Rows for the endpoints beside chat: completions, responses, models, tokens, and SGLang's own."""

from __future__ import annotations

import base64
import itertools
import threading
import time
from typing import Any

import pytest
import requests

from tests.server.conformance import PICTURE_TOKENS, PNG, WORKS, Api, accepted, refused, row
from tests.server.conftest import OPERATOR, ask, data_url, image_part, picture

COMPLETIONS, RESPONSES, EVENTS = "Completions", "Responses", "Responses: stream"
MODELS, TOKENS, GENERATE, CONTROL = "Models", "Token counts", "SGLang: /generate", "SGLang: control and information"
AT_COMPLETIONS, AT_RESPONSES = "/v1/completions", "/v1/responses"


def near(value: float) -> Any:
    """What a prefix out of the cache, or a chunk of another size, changes in a float's last bits."""
    return pytest.approx(value, abs=1e-4)


# -- completions -------------------------------------------------------------------------------------------------------


@row(COMPLETIONS, "prompt", WORKS, "a string, strings, token ids, or lists of them")
def _(api: Api) -> None:
    ids = api.ok("/tokenize", prompt="hello")["tokens"]
    one = api.complete()["choices"][0]["text"]
    for prompt, count in ((["hello"], 1), (ids, 1), ([ids, ids], 2), (["hello", "hello"], 2)):
        choices = api.complete(prompt=prompt)["choices"]
        assert [c["index"] for c in choices] == list(range(count))
        assert {c["text"] for c in choices} == {one}
    for prompt in ([], "", [[]], [10**6], [-1], {"a": 1}):
        api.refused("prompt", AT_COMPLETIONS, prompt=prompt)
    api.refused("prompt[0][0]", AT_COMPLETIONS, prompt=[["a"]])


@row(COMPLETIONS, "max_tokens", WORKS, "16 by default")
def _(api: Api) -> None:
    body = {"prompt": "hello", "temperature": 0, "ignore_eos": True}
    assert api.ok(AT_COMPLETIONS, **body)["usage"]["completion_tokens"] == 16


@row(COMPLETIONS, "echo", WORKS, "the prompt in front of the answer")
def _(api: Api) -> None:
    plain, echoed = (api.complete(echo=e)["choices"][0]["text"] for e in (False, True))
    assert echoed == "hello" + plain
    streamed = api.frames(AT_COMPLETIONS, prompt="hello", temperature=0, max_tokens=4, echo=True)
    assert "".join(c["choices"][0]["text"] for c in streamed[:-1]) == echoed


@row(COMPLETIONS, "echo with logprobs", WORKS, "those of the prompt too; with `max_tokens: 0` nothing else")
def _(api: Api) -> None:
    ids = api.ok("/tokenize", prompt="hello there")["tokens"]
    whole = api.complete(prompt="hello there", echo=True, logprobs=2)
    choice = whole["choices"][0]
    plain = api.complete(prompt="hello there", logprobs=2)["choices"][0]
    lists = choice["logprobs"]
    assert {len(values) for values in lists.values()} == {len(ids) + 4}
    assert (lists["token_logprobs"][0], lists["top_logprobs"][0]) == (None, None)
    assert lists["tokens"][len(ids) :] == plain["logprobs"]["tokens"]
    assert lists["text_offset"][len(ids) :] == [at + len("hello there") for at in plain["logprobs"]["text_offset"]]
    assert lists["token_logprobs"][len(ids) :] == [near(value) for value in plain["logprobs"]["token_logprobs"]]
    pairs = zip(lists["token_logprobs"][1:], lists["top_logprobs"][1:], strict=True)
    assert all(value <= 0 and value in top.values() and 2 <= len(top) <= 3 for value, top in pairs)
    for token, at in zip(lists["tokens"][: len(ids)], lists["text_offset"], strict=False):
        assert choice["text"][at : at + len(token)] == token
    for prompt in ("hello there", ids):
        body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 0}
        only = api.ok(AT_COMPLETIONS, **body)
        assert only["choices"][0]["text"] == "hello there"
        assert only["choices"][0]["finish_reason"] == "length"
        read = only["choices"][0]["logprobs"]
        assert read["tokens"] == lists["tokens"][: len(ids)]
        assert read["token_logprobs"] == [None, *map(near, lists["token_logprobs"][1 : len(ids)])]
        assert {len(values) for values in read.values()} == {len(ids)}
        assert only["usage"]["completion_tokens"] == 0
        *chunks, done = api.frames(AT_COMPLETIONS, **body)
        assert done == "[DONE]"
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hello there"]
        assert chunks[0]["choices"][0]["logprobs"]["tokens"] == read["tokens"]
    many = api.complete(prompt=["hello there", "b"], echo=True, logprobs=0, n=2)["choices"]
    assert [len(c["logprobs"]["tokens"]) - 4 for c in many] == [len(ids)] * 2 + [1] * 2
    streamed = api.frames(AT_COMPLETIONS, prompt="hello there", temperature=0, max_tokens=4, echo=True, logprobs=2)
    for name in ("tokens", "text_offset"):
        assert [value for c in streamed[:-1] for value in c["choices"][0]["logprobs"][name]] == lists[name]
    api.refused("max_tokens", AT_COMPLETIONS, max_tokens=0)


@row(COMPLETIONS, "logprobs", WORKS, "0 to 5: tokens, token_logprobs, top_logprobs, text_offset")
def _(api: Api) -> None:
    logprobs = api.complete(logprobs=2)["choices"][0]["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in logprobs.values()} == {4}
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"][0] == 0
    assert api.complete()["choices"][0]["logprobs"] is None
    for value in (-1, 6):
        api.refused("logprobs", AT_COMPLETIONS, logprobs=value)


@row(COMPLETIONS, "n, best_of", WORKS, "best_of only as 1 or n")
def _(api: Api) -> None:
    choices = api.complete(prompt=["a", "b"], n=2, best_of=2, temperature=1)["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    api.refused("best_of", AT_COMPLETIONS, best_of=3)


@row(COMPLETIONS, "stop, seed, temperature, top_p, penalties, logit_bias", WORKS, "as for chat")
def _(api: Api) -> None:
    choice = api.complete(logit_bias={"65": 100}, stop=["bbb"], max_tokens=9)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "bbb")
    assert api.complete(temperature=1, seed=5)["choices"] == api.complete(temperature=1, seed=5)["choices"]
    api.refused("frequency_penalty", AT_COMPLETIONS, frequency_penalty=3)


@row(COMPLETIONS, "stream, stream_options", WORKS, "text_completion objects; several prompts come interleaved")
def _(api: Api) -> None:
    body = {"prompt": ["hello", "b"], "temperature": 0, "max_tokens": 8}
    *chunks, usage, done = api.frames(AT_COMPLETIONS, **body, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"text_completion"}
    for choice in api.ok(AT_COMPLETIONS, **body)["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 16
    assert all(c["usage"] is None for c in chunks)


@row(COMPLETIONS, "the answer", WORKS, "id, object, created, model, choices, usage")
def _(api: Api) -> None:
    answer = api.complete()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 4
    assert {"index", "text", "logprobs", "finish_reason"} <= set(answer["choices"][0])


refused(COMPLETIONS, "suffix", "end", "these models cannot fill in the middle", AT_COMPLETIONS)
accepted(COMPLETIONS, "user", "alice", path=AT_COMPLETIONS)

# -- responses ---------------------------------------------------------------------------------------------------------


@row(RESPONSES, "input", WORKS, "a string or items; the answer is that of the same chat")
def _(api: Api) -> None:
    text = api.text()
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    for value in ("hello", items, [{"role": "user", "content": "hello"}]):
        assert api.respond(input=value)["output"][0]["content"][0]["text"] == text
    for value in ([], ""):
        api.refused("input", AT_RESPONSES, input=value)
    api.refused("input[0].role", AT_RESPONSES, input=[{"role": "bob", "content": "x"}])


@row(RESPONSES, "input_image", WORKS, "image_url is a plain string; detail as for chat")
def _(api: Api) -> None:
    part = {"type": "input_image", "image_url": PNG, "detail": "low"}
    usage = api.respond(input=[{"role": "user", "content": [part]}])["usage"]
    assert usage["input_tokens_details"]["image_tokens"] == PICTURE_TOKENS
    no_file = {"type": "input_image", "file_id": "file-1"}
    api.refused("input[0].content[0].file_id", AT_RESPONSES, input=[{"role": "user", "content": [no_file]}])


@row(RESPONSES, "input_file, input_audio", "refused")
def _(api: Api) -> None:
    for kind in ("input_file", "input_audio"):
        items = [{"role": "user", "content": [{"type": kind}]}]
        api.refused("input[0].content[0].type", AT_RESPONSES, input=items)


@row(RESPONSES, "earlier answers as input", WORKS, "output_text and refusal parts; reasoning items say nothing")
def _(api: Api) -> None:
    first = api.respond()
    items = [{"role": "user", "content": "hello"}, {"type": "reasoning", "id": "rs_1", "summary": []}, *first["output"]]
    again = api.respond(input=[*items, {"role": "user", "content": "again"}])
    assert again["usage"]["input_tokens"] > first["usage"]["input_tokens"]


@row(RESPONSES, "instructions", WORKS, "a system message in front")
def _(api: Api) -> None:
    answer = api.respond(instructions="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert answer["instructions"] == "Be brief."
    assert answer["output"][0]["content"][0]["text"] == api.text(messages=[system, *ask("hello")])


@row(RESPONSES, "text.format", WORKS, "text, json_object, json_schema")
def _(api: Api) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["red", "green"]}, "strict": True}
    answer = api.respond(text={"format": form}, max_output_tokens=20, temperature=1)
    assert answer["output"][0]["content"][0]["text"] in ('"red"', '"green"')
    assert answer["text"]["format"] == form
    api.refused("text.format.schema", AT_RESPONSES, text={"format": {"type": "json_schema", "name": "x"}})
    api.refused("text.format", AT_RESPONSES, text={"format": {"type": "grammar"}})
    api.refused("text.format.type", AT_RESPONSES, text={"format": {}})


@row(RESPONSES, "max_output_tokens", WORKS, "cut answers are `incomplete`")
def _(api: Api) -> None:
    answer = api.respond(max_output_tokens=3)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"]["output_tokens"] == 3
    (end,) = api.ok("/tokenize", prompt="<|im_end|>")["tokens"]
    whole = api.respond(logit_bias={str(end): 100})
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)
    api.refused("max_output_tokens", AT_RESPONSES, max_output_tokens=0)


@row(RESPONSES, "temperature, top_p", WORKS, "echoed")
def _(api: Api) -> None:
    answer = api.respond(temperature=0.5, top_p=0.5)
    assert (answer["temperature"], answer["top_p"]) == (0.5, 0.5)


@row(RESPONSES, "include, top_logprobs", WORKS, "`message.output_text.logprobs`")
def _(api: Api) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    logprobs = api.respond(**asked)["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 4
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
    assert api.respond()["output"][0]["content"][0]["logprobs"] == []
    api.refused("top_logprobs", AT_RESPONSES, top_logprobs=2)
    api.refused("include", AT_RESPONSES, include=["everything"])


@row(RESPONSES, "metadata, user, safety_identifier, prompt_cache_key", "accepted", "echoed")
def _(api: Api) -> None:
    sent = {"metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}
    answer = api.respond(**sent)
    assert {name: answer[name] for name in sent} == sent


@row(RESPONSES, "store", "accepted", "answered with `false`: nothing is stored, and GET, DELETE and cancel are 404")
def _(api: Api) -> None:
    answer = api.respond(store=True)
    assert answer["store"] is False
    assert requests.get(f"{api.url}/v1/responses/{answer['id']}", timeout=10).status_code == 404
    assert requests.delete(f"{api.url}/v1/responses/{answer['id']}", timeout=10).status_code == 404
    assert api.post(f"/v1/responses/{answer['id']}/cancel", {}).status_code == 404


@row(RESPONSES, "reasoning", "accepted", "effort is echoed; these models do not reason")
def _(api: Api) -> None:
    assert api.respond(reasoning={"effort": "low"})["reasoning"] == {"effort": "low", "summary": None}


@row(RESPONSES, "truncation", WORKS, "`disabled`; `auto` is refused, because nothing is dropped")
def _(api: Api) -> None:
    assert api.respond(truncation="disabled")["truncation"] == "disabled"
    api.refused("truncation", AT_RESPONSES, truncation="auto")
    api.refused("input", AT_RESPONSES, code="context_length_exceeded", input="word " * 5000)


@row(RESPONSES, "tools, tool_choice, parallel_tool_calls", WORKS, "function tools, flat; every form of the choice")
def _(api: Api) -> None:
    tool = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
    forced = {"tools": [tool], "tool_choice": {"type": "function", "name": "now"}, "max_output_tokens": 60}
    (call,) = api.respond(**forced)["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "now", "completed")
    items = [
        {"role": "user", "content": "x"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "3"},
    ]
    assert api.respond(input=items, tools=[tool])["usage"]["input_tokens"] > 20


@row(RESPONSES, "built-in tools", "refused", "only function tools are; the 400 names the tool")
def _(api: Api) -> None:
    for kind in ("web_search", "file_search", "code_interpreter", "mcp", "custom"):
        api.refused("tools[0].type", AT_RESPONSES, tools=[{"type": kind}])
    api.refused("max_tool_calls", AT_RESPONSES, max_tool_calls=2)


refused(RESPONSES, "previous_response_id", "resp_1", "send the whole conversation", AT_RESPONSES)
refused(RESPONSES, "conversation", "conv_1", "", AT_RESPONSES)
refused(RESPONSES, "prompt", {"id": "p"}, "no prompt templates are stored", AT_RESPONSES)
refused(RESPONSES, "background", True, "", AT_RESPONSES)
accepted(RESPONSES, "service_tier", "auto", path=AT_RESPONSES)


@row(RESPONSES, "the answer", WORKS, "every field that OpenAI's clients require")
def _(api: Api) -> None:
    from openai.types.responses import Response

    answer = api.respond()
    required = {name for name, f in Response.model_fields.items() if f.is_required()}
    assert required <= set(answer)
    Response.model_validate(answer)
    assert answer["output"][0]["content"][0]["annotations"] == []
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@row(RESPONSES, "POST /v1/responses/input_tokens", WORKS, "counts without computing, pictures included")
def _(api: Api) -> None:
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": PNG}]}]
    counted = api.ok("/v1/responses/input_tokens", input=items)
    assert counted["object"] == "response.input_tokens"
    assert counted["input_tokens"] == api.respond(input=items)["usage"]["input_tokens"]


# -- the stream of responses -------------------------------------------------------------------------------------------


@row(EVENTS, "sequence", WORKS, "created, in_progress, item, part, deltas, done in reverse, completed or incomplete")
def _(api: Api) -> None:
    kinds = [event["type"].removeprefix("response.") for event in api.events()]
    head = ["created", "in_progress", "output_item.added", "content_part.added"]
    tail = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[:4] == head
    assert kinds[-4:] == tail
    assert set(kinds[4:-4]) == {"output_text.delta"}


@row(EVENTS, "function_call", WORKS, "item, arguments' deltas and done, item done")
def _(api: Api) -> None:
    tool = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
    events = api.events(tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=60)
    kinds = [event["type"].removeprefix("response.") for event in events[2:]]
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == events[-3]["arguments"]
    arguments = [*["function_call_arguments.delta"] * len(deltas), "function_call_arguments.done"]
    assert kinds == ["output_item.added", *arguments, "output_item.done", "completed"]


@row(EVENTS, "event: lines and sequence_number", WORKS, "from 0, without gaps; no [DONE]")
def _(api: Api) -> None:
    response = api.post(AT_RESPONSES, {"input": "hello", "max_output_tokens": 4, "stream": True})
    events = api.events()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    frames = response.text.split("\n\n")[:-1]
    assert all(f.startswith("event: response.") and f.count("\n") == 1 for f in frames)
    assert all(f'"type":"{f.partition(chr(10))[0][7:]}"' in f for f in frames)


@row(EVENTS, "deltas", WORKS, "item_id, output_index, content_index, logprobs; joined they are the text")
def _(api: Api) -> None:
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    events = api.events(max_output_tokens=12)
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    whole = events[-1]["response"]["output"][0]
    assert {(d["item_id"], d["output_index"], d["content_index"]) for d in deltas} == {(whole["id"], 0, 0)}
    assert all("logprobs" in d for d in deltas)
    assert "".join(d["delta"] for d in deltas) == whole["content"][0]["text"]


@row(EVENTS, "a failure in mid-stream", WORKS, "response.failed with the error")
def _(api: Api) -> None:
    body = {"input": "x", "max_output_tokens": 4000, "ignore_eos": True, "stream": True, "rid": "conformance-responses"}
    with requests.post(api.url + AT_RESPONSES, json=body, stream=True, timeout=60) as response:
        lines = response.iter_lines(decode_unicode=True)
        assert next(lines) == "event: response.created"
        api.ok("/abort_request", rid="conformance-responses")
        rest = [line for line in lines if line.startswith("event: ")]
    assert rest[-1] == "event: response.failed"


# -- models, tokens ----------------------------------------------------------------------------------------------------


@row(MODELS, "GET /v1/models", WORKS, "with max_model_len and input_modalities")
def _(api: Api) -> None:
    (card,) = requests.get(f"{api.url}/v1/models", timeout=10).json()["data"]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert card["max_model_len"] > 0
    assert card["architecture"] == {"input_modalities": ["text", "image"], "output_modalities": ["text"]}


@row(MODELS, "GET /v1/models/{name}", WORKS, "404 `model_not_found` for another; `//` in the path is read as `/`")
def _(api: Api) -> None:
    assert requests.get(f"{api.url}/v1//models/tiny", timeout=10).json()["id"] == "tiny"
    missing = requests.get(f"{api.url}/v1/models/org/other", timeout=10)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@row(TOKENS, "POST /tokenize with prompt", WORKS, "vLLM's form; a list gives lists, as SGLang's; also /v1/tokenize")
def _(api: Api) -> None:
    one = api.ok("/tokenize", prompt="hello", return_token_strs=True)
    assert one["count"] == len(one["tokens"]) == len(one["token_strs"])
    many = api.ok("/v1/tokenize", prompt=["hello", "a b"])
    assert many["count"] == [len(ids) for ids in many["tokens"]]
    assert api.ok("/tokenize", prompt="")["tokens"] == []
    api.refused("prompt", "/tokenize", prompt=[])
    api.refused("prompt", "/tokenize", prompt="x", messages=ask("x"))


@row(TOKENS, "POST /tokenize with messages", WORKS, "the chat's exact prompt tokens, pictures included")
def _(api: Api) -> None:
    messages = ask("hello", image_part(1))
    counted = api.ok("/tokenize", messages=messages)
    usage = api.chat(messages=messages)["usage"]
    assert counted["count"] == usage["prompt_tokens"]
    assert counted["image_tokens"] == PICTURE_TOKENS


@row(TOKENS, "POST /detokenize", WORKS, "vLLM's `prompt` and SGLang's `text`; also /v1/detokenize")
def _(api: Api) -> None:
    ids = api.ok("/tokenize", prompt="hello there")["tokens"]
    assert api.ok("/detokenize", tokens=ids) == {"prompt": "hello there", "text": "hello there"}
    assert api.ok("/v1/detokenize", tokens=[ids, ids])["text"] == ["hello there"] * 2
    api.refused("tokens", "/detokenize", tokens=[10**6])


# -- SGLang ------------------------------------------------------------------------------------------------------------


@row(GENERATE, "text, input_ids", WORKS, "one or a list")
def _(api: Api) -> None:
    ids = api.ok("/tokenize", prompt="hello")["tokens"]
    one = api.generate()
    assert one["text"] == api.generate(input_ids=ids)["text"]
    assert [answer["text"] for answer in api.generate(text=["hello", "hello"])] == [one["text"]] * 2
    assert [answer["text"] for answer in api.generate(input_ids=[ids, ids])] == [one["text"]] * 2
    api.refused("text", "/generate")
    api.refused("text", "/generate", text="a", input_ids=[1])
    api.refused("input_ids", "/generate", input_ids=[10**6])


@row(GENERATE, "image_data", WORKS, "URL, data URL, bare base64, {url}; one, a list, a list of lists")
def _(api: Api) -> None:
    raw = base64.b64encode(picture(1)).decode()
    jpeg = base64.b64encode(picture(2, kind="JPEG")).decode()
    forms: list[tuple[Any, int]] = [
        (PNG, 1),
        (raw, 1),
        (jpeg, 1),
        ({"url": PNG}, 1),
        ([PNG, raw], 2),
        ([[PNG, raw]], 2),
    ]
    for value, count in forms:
        assert api.generate(image_data=value)["meta_info"]["image_tokens"] == count * PICTURE_TOKENS
    many = api.generate(text=["a", "b", "c"], image_data=[[PNG, PNG], PNG, None])
    assert [answer["meta_info"]["image_tokens"] // PICTURE_TOKENS for answer in many] == [2, 1, 0]
    placed = api.generate(text="a<|vision_start|><|image_pad|><|vision_end|>b", image_data=PNG)
    assert placed["meta_info"]["image_tokens"] == PICTURE_TOKENS
    api.refused("image_data", "/generate", text=["a", "b"], image_data=[PNG])


@row(
    GENERATE,
    "image_data, a path or file: URL, or a damaged picture",
    "refused",
    "the server's files are nobody's pictures",
)
def _(api: Api) -> None:
    for value in ("/etc/passwd", "picture.png", "../secret.jpg", "\u00e9"):
        api.refused("image_data[0]", "/generate", code="invalid_image_url", text="x", image_data=value)
    cut = data_url(picture(1)[:500])
    api.refused("image_data[1]", "/generate", code="image_parse_error", text="x", image_data=[PNG, cut])
    many = {"text": ["a", "b"], "image_data": [[PNG], [PNG, cut]]}
    api.refused("image_data[1][1]", "/generate", code="image_parse_error", **many)
    api.refused("image_data[0]", "/generate", 403, "invalid_image_url", text="x", image_data="file:///etc/passwd")


@row(GENERATE, "regex, ebnf, json_schema", WORKS, "in sampling_params")
def _(api: Api) -> None:
    for name, value, answers in (
        ("regex", "(ja|nee)!", ("ja!", "nee!")),
        ("ebnf", 'root ::= "ja" | "nee"', ("ja", "nee")),
        ("json_schema", '{"enum": [1, 2]}', ("1", "2")),
    ):
        assert api.generate({name: value, "max_new_tokens": 20, "temperature": 1})["text"] in answers
    api.refused("sampling_params.regex", "/generate", text="x", sampling_params={"regex": "("})
    api.refused("sampling_params.ebnf", "/generate", text="x", sampling_params={"regex": "a", "ebnf": 'root ::= "a"'})
    api.refused("regex", "/generate", text="x", regex="a")


@row(GENERATE, "sampling_params", WORKS, "SGLang's names; one object, or one for each prompt; 128 tokens by default")
def _(api: Api) -> None:
    assert api.generate({"max_new_tokens": 3, "ignore_eos": True})["meta_info"]["completion_tokens"] == 3
    body = {"text": "hello", "sampling_params": {"temperature": 0, "ignore_eos": True}}
    assert api.ok("/generate", **body)["meta_info"]["completion_tokens"] == 128
    each = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "ignore_eos": True}]
    many = api.ok("/generate", text=["a", "b"], sampling_params=each)
    assert [len(answer["output_ids"]) for answer in many] == [1, 2]
    api.refused("sampling_params.max_new_tokens", "/generate", text="x", sampling_params={"max_new_tokens": 0})
    assert api.generate({"temperature": 5.0, "seed": 1})["text"]
    api.refused("sampling_params.temperature", "/generate", text="x", sampling_params={"temperature": -1})
    api.refused("sampling_params", "/generate", text=["a", "b"], sampling_params=[{}])
    api.refused("sampling_params.stop_regex", "/generate", text="x", sampling_params={"stop_regex": "a"})


@row(GENERATE, "meta_info", WORKS, "id, finish_reason {type, matched or length}, token counts, e2e_latency")
def _(api: Api) -> None:
    meta = api.generate(rid="conformance-meta")["meta_info"]
    assert meta["id"] == "conformance-meta"
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert {"prompt_tokens", "completion_tokens", "cached_tokens", "image_tokens", "e2e_latency"} <= set(meta)
    (end,) = api.ok("/tokenize", prompt="<|im_end|>")["tokens"]
    ended = api.generate({"logit_bias": {str(end): 100}})
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": end}
    stopped = api.generate({"logit_bias": {"65": 100}, "stop": "bb"})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "bb"}


@row(GENERATE, "n", WORKS, "a list of answers")
def _(api: Api) -> None:
    assert len(api.generate({"n": 3, "temperature": 1})) == 3


@row(GENERATE, "stream", WORKS, "the whole text so far in each event, then [DONE]")
def _(api: Api) -> None:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    *events, done = api.frames("/generate", **body)
    assert done == "[DONE]"
    texts = [event["text"] for event in events]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == api.ok("/generate", **body)["text"]
    *events, _done = api.frames("/generate", **{**body, "text": ["hello", "b"]})
    assert {event["index"] for event in events} == {0, 1}


@row(GENERATE, "return_logprob, top_logprobs_num", WORKS, "of the answer")
def _(api: Api) -> None:
    body = {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    meta = api.generate(**body)["meta_info"]
    assert len(meta["output_token_logprobs"]) == 4
    logprob, token_id, text = meta["output_token_logprobs"][0]
    assert logprob <= 0
    assert isinstance(token_id, int)
    assert isinstance(text, str)
    assert [len(top) for top in meta["output_top_logprobs"]] == [2] * 4
    assert meta["input_token_logprobs"] == meta["input_top_logprobs"] == []


@row(
    GENERATE,
    "logprob_start_len",
    WORKS,
    "of the prompt, from there on; the first is null; `max_new_tokens: 0` reads only",
)
def _(api: Api) -> None:
    ids = api.ok("/tokenize", prompt="hello there")["tokens"]
    body = {"text": "hello there", "return_logprob": True, "top_logprobs_num": 2}
    whole = api.generate(**body, logprob_start_len=0)["meta_info"]
    echoed = api.complete(prompt="hello there", echo=True, logprobs=2)["choices"][0]["logprobs"]
    assert [token for _, token, _ in whole["input_token_logprobs"]] == ids
    values = [value for value, _, _ in whole["input_token_logprobs"]]
    assert values == [None, *map(near, echoed["token_logprobs"][1 : len(ids)])]
    assert whole["input_top_logprobs"][0] is None
    whole_ids = [token for _, token, _ in whole["output_token_logprobs"]]
    assert all(len(top) == 2 for top in whole["input_top_logprobs"][1:])
    for start in (1, 5, len(ids) - 1, len(ids), 1000):
        meta = api.generate(**body, logprob_start_len=start)["meta_info"]
        expected = whole["input_token_logprobs"][start:]
        assert [each[1:] for each in meta["input_token_logprobs"]] == [each[1:] for each in expected]
        values = [value for value, *_ in meta["input_token_logprobs"]]
        assert values == [None, *(near(value) for value, *_ in expected[1:])][: len(expected)]
        assert [token for _, token, _ in meta["output_token_logprobs"]] == whole_ids
    only = api.generate({"max_new_tokens": 0}, **body, logprob_start_len=0)
    assert (only["text"], only["output_ids"], only["meta_info"]["output_token_logprobs"]) == ("", [], [])
    values = [value for value, *_ in only["meta_info"]["input_token_logprobs"]]
    assert values == [None, *(near(value) for value, *_ in whole["input_token_logprobs"][1:])]
    assert (only["meta_info"]["completion_tokens"], only["meta_info"]["finish_reason"]["type"]) == (0, "length")
    many = {"text": ["hello there", "b"], "return_logprob": True, "logprob_start_len": 0}
    samplings = [{"max_new_tokens": 0}, {"max_new_tokens": 2, "ignore_eos": True}]
    lengths = [
        (len(a["meta_info"]["input_token_logprobs"]), len(a["output_ids"]))
        for a in api.ok("/generate", **many, sampling_params=samplings)
    ]
    assert lengths == [(len(ids), 0), (1, 2)]
    each = {"return_logprob": [True, False], "logprob_start_len": [1, 0], "top_logprobs_num": [1, 0]}
    first, second = api.generate(text=["hello there", "b"], **each)
    assert len(first["meta_info"]["input_token_logprobs"]) == len(ids) - 1
    assert "output_token_logprobs" not in second["meta_info"]
    api.refused("logprob_start_len", "/generate", text="x", logprob_start_len=[0, 0])
    api.refused("top_logprobs_num", "/generate", text="x", return_logprob=True, top_logprobs_num=21)
    image = api.generate(text="hello", image_data=PNG, return_logprob=True, logprob_start_len=0)["meta_info"]
    assert len(image["input_token_logprobs"]) == image["prompt_tokens"]
    api.refused("logprob_start_len", "/generate", text="x", logprob_start_len=-2)


@row(GENERATE, "rid", WORKS, "unique among running requests")
def _(api: Api) -> None:
    done: list[Any] = []
    sampling = {"max_new_tokens": 3000, "ignore_eos": True}
    body = {"text": "hello", "rid": "conformance-twice", "sampling_params": sampling}
    thread = threading.Thread(target=lambda: done.append(api.ok("/generate", **body)))
    thread.start()
    _wait_until_running(api)
    api.refused("rid", "/generate", text="x", rid="conformance-twice")
    assert api.ok("/abort_request", rid="conformance-twice") == {"aborted": 1}
    thread.join(30)
    assert done[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert done[0]["meta_info"]["completion_tokens"] > 0


def _wait_until_running(api: Api) -> None:
    for _ in range(500):
        if requests.get(f"{api.url}/server_info", timeout=10).json()["requests_in_flight"]:
            time.sleep(0.2)
            return
        time.sleep(0.01)
    raise AssertionError("the request never ran")


for name, value in (
    ("input_embeds", [[0.1]]),
    ("video_data", ["x"]),
    ("audio_data", ["x"]),
    ("session_params", {"id": "s"}),
    ("return_hidden_states", True),
    ("lora_path", "x"),
    ("custom_logit_processor", "x"),
):
    refused(GENERATE, name, value, path="/generate")


@row(CONTROL, "/model_info, /get_model_info", WORKS)
def _(api: Api) -> None:
    for path in ("/model_info", "/get_model_info"):
        info = requests.get(api.url + path, timeout=10).json()
        assert info["model_path"] == "tiny"
        assert info["is_generation"] is True
        assert info["has_image_understanding"] is True
        assert info["architectures"] == ["Qwen2VLForConditionalGeneration"]


@row(CONTROL, "/server_info, /get_server_info", WORKS, "settings without keys and paths, limits, counters")
def _(api: Api) -> None:
    for path in ("/server_info", "/get_server_info"):
        info = requests.get(api.url + path, timeout=10).json()
        assert info["version"]
        assert "api_key" not in info["config"]
        # SGLang's bench_serving reads the first of them.
        assert info["internal_states"][0]["steps"] > 0


@row(CONTROL, "/health, /health_generate", WORKS, "/health never waits for the engine; the other runs one token")
def _(api: Api) -> None:
    assert requests.get(f"{api.url}/health", timeout=10).status_code == 200
    before = requests.get(f"{api.url}/server_info", timeout=10).json()["engine"]["finished"]
    assert requests.get(f"{api.url}/health_generate", timeout=10).status_code == 200
    assert requests.get(f"{api.url}/server_info", timeout=10).json()["engine"]["finished"] == before + 1


@row(CONTROL, "/flush_cache", WORKS, "GET or POST, with `--admin-api-key`; what running requests use stays")
def _(api: Api) -> None:
    messages = ask(image_part(77), "a prompt that is long enough to fill a page or two of the cache")
    api.chat(messages=messages)
    assert api.chat(messages=messages)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    for method in (requests.get, requests.post):
        assert method(f"{api.url}/flush_cache", timeout=10).status_code == 401
        assert method(f"{api.url}/flush_cache", headers=OPERATOR, timeout=10).status_code == 200
        assert api.chat(messages=messages)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@row(CONTROL, "/abort_request", WORKS, "by rid or by the answer's id; abort_all with `--admin-api-key`")
def _(api: Api) -> None:
    assert api.ok("/abort_request", rid="nobody") == {"aborted": 0}
    assert api.post("/abort_request", {"abort_all": True}).status_code == 401
    assert api.post("/abort_request", {"abort_all": True}, headers=OPERATOR).json() == {"aborted": 0}
    api.refused("rid", "/abort_request")
