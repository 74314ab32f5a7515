"""Rows for POST /v1/chat/completions: request fields, messages and parts, the response, the stream, errors."""

from __future__ import annotations

import json
import re
from typing import Any

import requests

from tests.server.conformance import (
    PICTURE_TOKENS,
    PNG,
    WORKS,
    Api,
    accepted,
    refused,
    row,
)
from tests.server.conftest import ask, data_url, image_part, picture

REQUEST, MESSAGES, RESPONSE = "Chat: request", "Chat: messages and parts", "Chat: response"
STREAM, ERRORS, EXTRAS = "Chat: stream", "Errors and headers", "Chat: fields of vLLM and SGLang"

# -- request -----------------------------------------------------------------------------------------------------------


@row(REQUEST, "messages", WORKS, "at least one")
def _(api: Api) -> None:
    assert api.chat(messages=[{"role": "user", "content": ""}])["usage"]["prompt_tokens"] > 0
    api.refused("messages[0].role", code="missing_required_parameter", messages=[{"content": "x"}])
    assert api.chat()["choices"][0]["message"]["role"] == "assistant"
    api.refused("messages", code="empty_array", messages=[])


@row(REQUEST, "model", WORKS, "may be left out, or SGLang's `default`; another name is 404 `model_not_found`")
def _(api: Api) -> None:
    for name in ("tiny", "default"):
        assert api.chat(model=name)["model"] == "tiny"
    api.refused("model", status=404, code="model_not_found", model="gpt-9")


@row(REQUEST, "max_completion_tokens", WORKS, "wins over max_tokens")
def _(api: Api) -> None:
    assert api.chat(max_completion_tokens=3, max_tokens=7, ignore_eos=True)["usage"]["completion_tokens"] == 3
    api.refused("max_completion_tokens", max_completion_tokens=0)


@row(REQUEST, "max_tokens", WORKS, "prompt and answer together are cut at the context's end")
def _(api: Api) -> None:
    assert api.chat(max_tokens=5, ignore_eos=True)["usage"]["completion_tokens"] == 5
    api.refused("max_tokens", max_tokens=0)


@row(REQUEST, "temperature", WORKS, "0 to 2; 0 is greedy")
def _(api: Api) -> None:
    assert api.text(temperature=0, max_tokens=12) == api.text(temperature=0, max_tokens=12)
    assert len({api.text(temperature=2, seed=s, max_tokens=12) for s in range(4)}) > 1
    for value in (-0.1, 2.1):
        api.refused("temperature", temperature=value)


@row(REQUEST, "top_p", WORKS, "0 to 1; 0 is greedy")
def _(api: Api) -> None:
    for value in (0, 1e-6):
        assert api.text(top_p=value, temperature=1, seed=1, max_tokens=12) == api.text(max_tokens=12)
    api.refused("top_p", top_p=1.5)


@row(REQUEST, "n", WORKS, "1 to 128; one prefill for all")
def _(api: Api) -> None:
    assert [c["index"] for c in api.chat(n=128, max_tokens=1, temperature=1)["choices"]] == list(range(128))
    for value in (0, 129):
        api.refused("n", n=value)


@row(REQUEST, "stop", WORKS, "a string or up to 16 (OpenAI: 4); not part of the text; may straddle tokens")
def _(api: Api) -> None:
    free = api.text(max_tokens=24)
    choice = api.chat(max_tokens=24, stop=free[5:8])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == free[: free.index(free[5:8])]
    assert api.text(max_tokens=24, stop=["\u2603", free[5:8]]) == choice["message"]["content"]
    api.refused("stop", stop=["x"] * 17)


@row(REQUEST, "seed", WORKS, "the same seed gives the same answer")
def _(api: Api) -> None:
    first, again, other = (api.text(temperature=1, seed=s, max_tokens=16) for s in (1, 1, 2))
    assert first == again != other


@row(REQUEST, "presence_penalty, frequency_penalty", WORKS, "-2 to 2")
def _(api: Api) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        plain = api.text(max_tokens=48, ignore_eos=True)
        assert api.text(max_tokens=48, ignore_eos=True, **{name: 2.0}) != plain
        api.refused(name, **{name: 2.5})


@row(REQUEST, "logit_bias", WORKS, "an id of no token is refused")
def _(api: Api) -> None:
    assert api.text(logit_bias={"65": 100}, max_tokens=3) == "bbb"
    api.refused("logit_bias", logit_bias={"99999999": 1})
    api.refused("logit_bias", logit_bias={"65": 101})


@row(REQUEST, "logprobs", WORKS)
def _(api: Api) -> None:
    content = api.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert all(entry["top_logprobs"] == [] and entry["logprob"] <= 0 for entry in content)
    assert api.chat(logprobs=False)["choices"][0]["logprobs"] is None


@row(REQUEST, "top_logprobs", WORKS, "0 to 20; needs logprobs")
def _(api: Api) -> None:
    content = api.chat(logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 20 for entry in content)
    api.refused("top_logprobs", logprobs=True, top_logprobs=21)
    api.refused("top_logprobs", top_logprobs=1)


@row(REQUEST, "stream", WORKS)
def _(api: Api) -> None:
    streamed = "".join(c["choices"][0]["delta"].get("content", "") for c in api.chunks(max_tokens=16))
    assert streamed == api.text(max_tokens=16)


@row(REQUEST, "stream_options.include_usage", WORKS, "only with stream")
def _(api: Api) -> None:
    assert api.chunks(stream_options={"include_usage": True})[-1]["usage"]["completion_tokens"] == 4
    api.refused("stream_options", stream_options={"include_usage": True})


@row(REQUEST, "stream_options.include_obfuscation", "accepted", "nothing is padded")
def _(api: Api) -> None:
    assert api.chunks(stream_options={"include_obfuscation": True})


@row(REQUEST, "metadata", "accepted", "echoed; 16 pairs, keys of 64 and values of 512 characters")
def _(api: Api) -> None:
    assert api.chat(metadata={"a": "b"})["metadata"] == {"a": "b"}
    api.refused("metadata", metadata={str(i): "" for i in range(17)})
    api.refused("metadata", metadata={"k" * 65: ""})
    api.refused("metadata", metadata={"k": "v" * 513})


@row(REQUEST, "service_tier", "accepted", "the answer says `default`")
def _(api: Api) -> None:
    for tier in ("auto", "default", "flex", "scale", "priority", "fast"):
        assert api.chat(service_tier=tier, max_tokens=1)["service_tier"] == "default"
    api.refused("service_tier", service_tier="platinum")


@row(REQUEST, "modalities", WORKS, '`["text"]`; audio is refused')
def _(api: Api) -> None:
    assert api.text(modalities=["text"]) == api.text()
    api.refused("modalities", modalities=["text", "audio"])


accepted(REQUEST, "user", "alice")
accepted(REQUEST, "safety_identifier", "user-1")
accepted(REQUEST, "prompt_cache_key", "bucket")
accepted(REQUEST, "prompt_cache_options", {"mode": "explicit", "ttl": "30m"})
accepted(REQUEST, "prompt_cache_retention", "24h")
accepted(REQUEST, "store", True, "nothing is stored")
accepted(REQUEST, "reasoning_effort", "low", "these models do not reason")
accepted(REQUEST, "verbosity", "low")
accepted(REQUEST, "prediction", {"type": "content", "content": "x"})
accepted(REQUEST, "moderation", {"model": "x"})
accepted(REQUEST, "web_search_options", {})
refused(REQUEST, "audio", {"voice": "alloy", "format": "wav"})

# A random model's strings have no end, so this one has no long ones.
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}, "name": {"type": "string", "maxLength": 3}},
    "required": ["n", "name"],
    "additionalProperties": False,
}


@row(REQUEST, "response_format json_schema", WORKS, "strict or not: the answer is always what the schema says")
def _(api: Api) -> None:
    for strict in (True, False):
        inner = {"name": "x", "schema": SCHEMA, "strict": strict}
        answer = json.loads(
            api.text(max_tokens=300, temperature=1, response_format={"type": "json_schema", "json_schema": inner})
        )
        assert set(answer) == {"n", "name"}
        assert answer["n"] in (1, 2)
    api.refused("response_format.json_schema.schema", response_format={"type": "json_schema", "json_schema": {}})


@row(REQUEST, "response_format json_object", WORKS, "any object; say in the prompt what should be in it")
def _(api: Api) -> None:
    # `}` made likely, or a random model's object has no end
    closing = {"92": 60}
    answer = api.text(max_tokens=300, response_format={"type": "json_object"}, logit_bias=closing)
    assert isinstance(json.loads(answer), dict)
    assert api.text(response_format={"type": "text"}) == api.text()
    api.refused("response_format", response_format={"type": "xml"})


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@row(REQUEST, "tools", WORKS, "functions; calls are read from the answer as its chat template has the model write them")
def _(api: Api) -> None:
    plain, told = (api.chat(**body)["usage"]["prompt_tokens"] for body in ({}, {"tools": [TOOL]}))
    assert told > plain
    api.refused("tools", tools=[])
    api.refused("tools[1].function.name", tools=[TOOL, TOOL])
    api.refused("tools[0].function.name", tools=[{"type": "function", "function": {"name": "<|im_end|>"}}])


@row(REQUEST, "tool_choice none, auto", WORKS)
def _(api: Api) -> None:
    assert api.text(tools=[TOOL], tool_choice="none") == api.text()
    assert api.text(tools=[TOOL], tool_choice="auto") == api.text(tools=[TOOL])
    api.refused("tool_choice", tools=[TOOL], tool_choice="sometimes")


@row(
    REQUEST,
    "tool_choice required, named, allowed_tools",
    WORKS,
    "by grammar: the call and its arguments are always valid",
)
def _(api: Api) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    for choice in ("required", named, allowed):
        body = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 400}
        answer = api.chat(**body)["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    api.refused("tool_choice.function.name", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}})
    api.refused("tool_choice", tool_choice="required")


@row(REQUEST, "parallel_tool_calls", WORKS, "false: at most one call")
def _(api: Api) -> None:
    twice = r'(<tool_call>\n\{"name": "weather", "arguments": \{\}\}\n</tool_call>){2}'
    for parallel, count in ((None, 2), (True, 2), (False, 1)):
        answer = api.chat(tools=[TOOL], parallel_tool_calls=parallel, regex=twice, max_tokens=400)
        assert len(answer["choices"][0]["message"]["tool_calls"]) == count


refused(REQUEST, "functions", [{"name": "f"}], "deprecated by OpenAI: use tools")
refused(REQUEST, "function_call", {"name": "f"}, "deprecated by OpenAI: use tool_choice")

# -- messages ----------------------------------------------------------------------------------------------------------


@row(MESSAGES, "role system, developer", WORKS, "text, or a list of text parts")
def _(api: Api) -> None:
    for role in ("system", "developer"):
        system = {"role": role, "content": "Be brief."}
        parts = {"role": role, "content": [{"type": "text", "text": "Be brief."}]}
        answer, same = (api.chat(messages=[m, *ask("hello")]) for m in (system, parts))
        assert answer["choices"] == same["choices"]
        assert answer["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]


@row(MESSAGES, "role assistant", WORKS, "text, parts, or null")
def _(api: Api) -> None:
    for content in ("a red circle", [{"type": "text", "text": "a red circle"}], None):
        api.chat(messages=[*ask("x"), {"role": "assistant", "content": content}, *ask("and?")])


@row(MESSAGES, "refusal part", WORKS, "read as text")
def _(api: Api) -> None:
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}
    as_text = {"role": "assistant", "content": "I cannot."}
    one, other = (api.chat(messages=[*ask("x"), m, *ask("y")])["usage"]["prompt_tokens"] for m in (said, as_text))
    assert one == other


@row(MESSAGES, "tool_calls, and role tool", WORKS, "calls of the assistant and their results")
def _(api: Api) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    asked = [*ask("x"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    api.chat(messages=[*asked, result], tools=[TOOL])
    api.chat(messages=[*asked, {**result, "content": [{"type": "text", "text": "sunny"}]}])
    call["function"]["arguments"] = "{"
    api.refused("messages[1].tool_calls[0].function.arguments", messages=[*asked, result])


@row(MESSAGES, "name", "accepted", "chat templates of these models have no place for it")
def _(api: Api) -> None:
    api.chat(messages=[{"role": "user", "name": "bob", "content": "hello"}])


@row(MESSAGES, "text part", WORKS)
def _(api: Api) -> None:
    joined = api.chat(messages=[{"role": "user", "content": "ab"}])
    assert api.chat(messages=ask("a", "b"))["usage"]["prompt_tokens"] == joined["usage"]["prompt_tokens"]


@row(MESSAGES, "image_url part, data: URL", WORKS, "PNG, JPEG, WEBP, GIF; told by their bytes")
def _(api: Api) -> None:
    for kind, mime in (("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif")):
        for claimed in (mime, "image/png"):
            part = {"type": "image_url", "image_url": {"url": data_url(picture(1, kind=kind), claimed)}}
            assert api.chat(messages=ask(part))["usage"]["prompt_tokens_details"]["image_tokens"] == PICTURE_TOKENS


@row(MESSAGES, "image_url part, http(s) URL", WORKS, "private addresses only with --allow-private-media")
def _(api: Api) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    # Nobody listens there: the server did try, and says so.
    api.refused("messages[0].content[0].image_url", code="failed_to_download_image", messages=ask(part))


@row(MESSAGES, "image_url as a plain string", WORKS, "as the Responses API has it; OpenAI refuses it here")
def _(api: Api) -> None:
    part = {"type": "image_url", "image_url": PNG}
    assert api.chat(messages=ask(part))["usage"]["prompt_tokens_details"]["image_tokens"] == PICTURE_TOKENS


@row(MESSAGES, "image_url.detail", WORKS, "`low` caps at 512 x 512; `high`, `original` and `auto` are the model's own")
def _(api: Api) -> None:
    def tokens(detail: str) -> int:
        url = data_url(picture(3, 1000, 1000))
        part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
        return api.chat(messages=ask(part), max_tokens=1)["usage"]["prompt_tokens_details"]["image_tokens"]

    assert tokens("low") < tokens("high") == tokens("original") == tokens("auto")
    part = {"type": "image_url", "image_url": {"url": PNG, "detail": "best"}}
    api.refused("messages[0].content[0].image_url.detail", messages=ask(part))


@row(MESSAGES, "several pictures, text and pictures in any order", WORKS)
def _(api: Api) -> None:
    usage = api.chat(messages=ask("one", image_part(1), "two", image_part(2), "compare"))["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 2 * PICTURE_TOKENS


@row(MESSAGES, "pictures in system and assistant messages", WORKS, "more than OpenAI allows")
def _(api: Api) -> None:
    for role in ("system", "assistant"):
        message = {"role": role, "content": [image_part(1)]}
        usage = api.chat(messages=[message, *ask("hello")])["usage"]
        assert usage["prompt_tokens_details"]["image_tokens"] == PICTURE_TOKENS


@row(MESSAGES, "unknown keys of a part", "accepted", "such as prompt_cache_breakpoint")
def _(api: Api) -> None:
    part = {"type": "text", "text": "hello", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}
    assert api.text(messages=ask(part)) == api.text()


@row(MESSAGES, "input_audio part", "refused")
def _(api: Api) -> None:
    part = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    api.refused("messages[0].content[0].type", messages=ask(part))


@row(MESSAGES, "file part", "refused", "send a picture of the page")
def _(api: Api) -> None:
    api.refused("messages[0].content[0].type", messages=ask({"type": "file", "file": {"file_id": "f"}}))


@row(MESSAGES, "video_url part", "refused")
def _(api: Api) -> None:
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,"}}
    api.refused("messages[0].content[0].type", messages=ask(part))


# -- response ----------------------------------------------------------------------------------------------------------


@row(RESPONSE, "id, object, created, model, system_fingerprint, service_tier", WORKS)
def _(api: Api) -> None:
    answer = api.chat()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int)
    assert answer["model"] == "tiny"
    assert answer["system_fingerprint"] is None
    assert answer["service_tier"] == "default"


@row(RESPONSE, "choices[].message", WORKS, "role, content, refusal (null)")
def _(api: Api) -> None:
    message = api.chat()["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)
    assert message["refusal"] is None


@row(RESPONSE, "choices[].finish_reason", WORKS, "`stop` or `length`, never null; `stop_reason` says what stopped it")
def _(api: Api) -> None:
    assert api.chat()["choices"][0]["finish_reason"] == "length"
    choice = api.chat(logit_bias={"65": 100}, stop_token_ids=[65])["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 65)


@row(RESPONSE, "choices[].logprobs", WORKS, "token, logprob, bytes, top_logprobs; -9999 stands for minus infinity")
def _(api: Api) -> None:
    choice = api.chat(logprobs=True, top_logprobs=2, max_tokens=8)["choices"][0]
    for entry in choice["logprobs"]["content"]:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert all(set(top) == {"token", "logprob", "bytes"} for top in entry["top_logprobs"])
    joined = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert joined.decode(errors="replace") == choice["message"]["content"]


@row(
    RESPONSE, "usage", WORKS, "pictures' tokens counted; `cached_tokens`, `image_tokens` and `text_tokens` always there"
)
def _(api: Api) -> None:
    usage = api.chat(messages=ask("count", image_part(9)))["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage["prompt_tokens_details"]
    assert details["image_tokens"] == PICTURE_TOKENS
    assert details["image_tokens"] + details["text_tokens"] == usage["prompt_tokens"]
    assert {"cached_tokens", "audio_tokens"} <= set(details)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0, "audio_tokens": 0}


# -- stream ------------------------------------------------------------------------------------------------------------


@row(STREAM, "every chunk: id, object, created, model, choices", WORKS)
def _(api: Api) -> None:
    chunks = api.chunks()
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    assert all(isinstance(c["choices"], list) for c in chunks)
    assert all({"index", "delta", "finish_reason", "logprobs"} <= set(k) for c in chunks for k in c["choices"])


@row(STREAM, "first chunk of a choice", WORKS, "role and empty content, together with the first token")
def _(api: Api) -> None:
    chunks = api.chunks(n=2)
    for index in (0, 1):
        first = next(k for c in chunks for k in c["choices"] if k["index"] == index)
        assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert first["finish_reason"] is None


@row(STREAM, "content deltas", WORKS, "nothing else in delta; finish_reason null")
def _(api: Api) -> None:
    middle = api.chunks(max_tokens=8)[1:-1]
    assert middle
    assert all(set(c["choices"][0]["delta"]) == {"content"} for c in middle)
    assert all(c["choices"][0]["finish_reason"] is None for c in middle)


@row(STREAM, "tool_calls deltas", WORKS, "index, id, type and name with empty arguments; then the arguments in pieces")
def _(api: Api) -> None:
    chunks = api.chunks(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=400)
    first, *rest = (d for c in chunks for k in c["choices"] for d in k["delta"].get("tool_calls", ()))
    assert first["index"] == 0
    assert first["id"].startswith("call_")
    assert (first["type"], first["function"]) == ("function", {"name": "weather", "arguments": ""})
    assert rest
    assert all(set(d) == {"index", "function"} and set(d["function"]) == {"arguments"} for d in rest)
    assert json.loads("".join(d["function"]["arguments"] for d in rest))["city"] in ("Paris", "Rome")


@row(STREAM, "last chunk of a choice", WORKS, "empty delta and the finish_reason, once")
def _(api: Api) -> None:
    chunks = api.chunks()
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["length"]


@row(STREAM, "usage chunk", WORKS, "`choices: []` at the end; `usage: null` in all chunks before")
def _(api: Api) -> None:
    *before, last = api.chunks(stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert all(c["usage"] is None for c in before)
    assert all("usage" not in c for c in api.chunks())


@row(STREAM, "stream_options.continuous_usage_stats", WORKS, "vLLM's: running counts in every chunk")
def _(api: Api) -> None:
    chunks = api.chunks(stream_options={"include_usage": True, "continuous_usage_stats": True}, max_tokens=8)
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


@row(
    STREAM,
    "data: [DONE]",
    WORKS,
    'after success only; a failure in mid-stream is a `data: {"error": ...}` event and the end',
)
def _(api: Api) -> None:
    body = {
        "messages": ask("hello"),
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
        "rid": "conformance-abort",
    }
    with requests.post(f"{api.url}/v1/chat/completions", json=body, stream=True, timeout=60) as response:
        lines = response.iter_lines(decode_unicode=True)
        assert next(lines).startswith("data: {")
        assert api.ok("/abort_request", rid="conformance-abort") == {"aborted": 1}
        rest = [line for line in lines if line]
    assert json.loads(rest[-1][6:])["error"]["code"] == "request_aborted"
    assert "data: [DONE]" not in rest


# -- errors ------------------------------------------------------------------------------------------------------------


def picture_error(name: str, url: str, code: str, status: int = 400) -> None:
    """A row for a code of OpenAI's image errors."""

    @row(ERRORS, name, WORKS, f"{status} `{code}`")
    def _(api: Api) -> None:
        part = {"type": "image_url", "image_url": {"url": url}}
        api.refused("messages[0].content[0].image_url", status=status, code=code, messages=ask(part))
        items = [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
        api.refused("input[0].content[0].image_url", "/v1/responses", status=status, code=code, input=items)


picture_error("a URL of no known scheme", "cat.png", "invalid_image_url")
picture_error("a host that does not answer", "http://127.0.0.1:9/x.png", "failed_to_download_image")
picture_error("broken base64", "data:image/png;base64,@@@@", "invalid_base64_image")
picture_error("an empty picture", "data:image/png;base64,", "empty_image_file")
picture_error("bytes that are no picture", "data:image/png;base64,aGVsbG8gd29ybGQ=", "invalid_image_format")
picture_error("a media type that is no image", "data:text/html;base64,aGVsbG8=", "unsupported_image_media_type")
picture_error("a picture that is cut off", data_url(picture(1)[:500]), "image_parse_error")
picture_error("a picture that is too large", data_url(b"\x89PNG\r\n\x1a\n" + bytes(20_000_001)), "image_too_large", 413)


@row(ERRORS, "a prompt longer than the context", WORKS, "400 `context_length_exceeded`")
def _(api: Api) -> None:
    api.refused("messages", code="context_length_exceeded", messages=ask("word " * 5000))


@row(ERRORS, "wrong types", WORKS, "400, never 422; 256.0 is a whole number")
def _(api: Api) -> None:
    api.refused("temperature", code="invalid_type", temperature="warm")
    assert api.chat(max_tokens=3.0, n=1.0, ignore_eos=True)["usage"]["completion_tokens"] == 3
    api.refused("max_tokens", code="invalid_type", max_tokens=3.5)
    wrong = api.post("/v1/chat/completions", {"messages": ask("x"), "stop": 3}).json()["error"]
    assert wrong["message"] == "stop must be a valid string or a valid array."


@row(ERRORS, "a body that is not JSON", WORKS, "400 `invalid_json`, with the place")
def _(api: Api) -> None:
    url = f"{api.url}/v1/chat/completions"
    for body in (b"", b"{", b'{"messages": "\xff"}', b'{"messages": "\\ud83d"}', b"[]", b"null"):
        error = requests.post(url, data=body, timeout=10).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_json", None)
    assert "line 1 column 1" in requests.post(url, data=b"{", timeout=10).json()["error"]["message"]
    packed = requests.post(url, data=b"x", headers={"content-encoding": "gzip"}, timeout=10)
    assert (packed.status_code, packed.json()["error"]["param"]) == (415, "content-encoding")


@row(ERRORS, "unknown URL, wrong method", WORKS, "404 `unknown_url` with the one that was meant, 405; HEAD is as GET")
def _(api: Api) -> None:
    for path in ("/chat/completions", "/v1/v1/chat/completions"):
        message = api.post(path, {}).json()["error"]["message"]
        assert message == f"Unknown URL: POST {path}; did you mean /v1/chat/completions?"
    assert api.post("/v1/chat/completions/", {"messages": ask("x"), "max_tokens": 1}).status_code == 200
    # A body behind HEAD would be taken for the next answer of the connection.
    with requests.Session() as session:
        for path in ("/health", "/v1/models"):
            assert session.head(api.url + path, timeout=10).status_code == 200
            assert session.get(f"{api.url}/v1/models/tiny", timeout=10).json()["id"] == "tiny"
    missing = requests.get(f"{api.url}/v1/nothing", timeout=10)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    assert requests.get(f"{api.url}/v1/chat/completions", timeout=10).status_code == 405


@row(ERRORS, "a body that is too large", WORKS, "413")
def _(api: Api) -> None:
    response = requests.post(f"{api.url}/v1/chat/completions", data=b" " * 33_000_000, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


@row(ERRORS, "x-request-id", WORKS, "the client's own if sane, on every response")
def _(api: Api) -> None:
    headers = {"x-request-id": "mine-1"}
    for path, body in (("/v1/chat/completions", {"messages": ask("x"), "max_tokens": 1}), ("/v1/completions", {})):
        assert api.post(path, body, headers=headers).headers["x-request-id"] == "mine-1"
    assert api.post("/v1/responses", {}, headers={"x-request-id": "<b>"}).headers["x-request-id"].startswith("req-")


@row(ERRORS, "openai-processing-ms, openai-version", WORKS)
def _(api: Api) -> None:
    headers = api.post("/v1/chat/completions", {"messages": ask("x"), "max_tokens": 1}).headers
    assert int(headers["openai-processing-ms"]) >= 0
    assert headers["openai-version"] == "2020-10-01"


@row(ERRORS, "x-should-retry", WORKS, "`false` on permanent errors")
def _(api: Api) -> None:
    assert api.post("/v1/chat/completions", {}).headers["x-should-retry"] == "false"


# -- what vLLM's and SGLang's clients send -----------------------------------------------------------------------------


@row(EXTRAS, "top_k, min_p", WORKS)
def _(api: Api) -> None:
    assert api.text(top_k=1, temperature=1, max_tokens=12) == api.text(max_tokens=12)
    assert api.text(min_p=1.0, temperature=1, max_tokens=12) == api.text(max_tokens=12)


@row(EXTRAS, "repetition_penalty", WORKS)
def _(api: Api) -> None:
    assert api.text(repetition_penalty=2.0, max_tokens=48, ignore_eos=True) != api.text(max_tokens=48, ignore_eos=True)


@row(EXTRAS, "stop_token_ids, include_stop_str_in_output, no_stop_trim", WORKS)
def _(api: Api) -> None:
    free = api.text(max_tokens=24)
    stop = free[5:8]
    for name in ("include_stop_str_in_output", "no_stop_trim"):
        assert api.text(max_tokens=24, stop=stop, **{name: True}).endswith(stop)


@row(EXTRAS, "ignore_eos, min_tokens", WORKS)
def _(api: Api) -> None:
    api.refused("min_tokens", min_tokens=5, max_tokens=4)
    (end,) = api.ok("/tokenize", prompt="<|im_end|>")["tokens"]
    bias = {"logit_bias": {str(end): 100}, "max_tokens": 6}
    assert api.chat(**bias)["choices"][0]["finish_reason"] == "stop"
    assert api.chat(**bias, ignore_eos=True)["usage"]["completion_tokens"] == 6
    assert api.chat(**bias, min_tokens=3)["usage"]["completion_tokens"] >= 3


@row(EXTRAS, "skip_special_tokens", WORKS)
def _(api: Api) -> None:
    (start,) = api.ok("/tokenize", prompt="<|im_start|>")["tokens"]
    bias = {"logit_bias": {str(start): 100}, "max_tokens": 2}
    assert api.text(**bias) == ""
    assert api.text(**bias, skip_special_tokens=False) == "<|im_start|><|im_start|>"


@row(EXTRAS, "mm_processor_kwargs", WORKS, "min_pixels and max_pixels, within the checkpoint's bounds")
def _(api: Api) -> None:
    def tokens(**body: object) -> int:
        usage = api.chat(messages=ask(image_part(1, width=300, height=300)), **body)["usage"]
        return usage["prompt_tokens_details"]["image_tokens"]

    assert tokens(mm_processor_kwargs={"max_pixels": 12544}) < tokens()
    api.refused("mm_processor_kwargs.max_pixels", mm_processor_kwargs={"max_pixels": 0})


@row(EXTRAS, "add_generation_prompt, continue_final_message, chat_template_kwargs", WORKS)
def _(api: Api) -> None:
    messages = [*ask("x"), {"role": "assistant", "content": "I see"}]
    whole = api.chat(messages=messages)["usage"]["prompt_tokens"]
    open_end = {"continue_final_message": True, "add_generation_prompt": False}
    assert api.chat(messages=messages, **open_end)["usage"]["prompt_tokens"] < whole
    assert api.text(chat_template_kwargs={"enable_thinking": False}) == api.text()


@row(EXTRAS, "modalities of a picture part", WORKS, "SGLang's `image` and `multi-images`")
def _(api: Api) -> None:
    for value in ("image", "multi-images"):
        api.chat(messages=ask({**image_part(1), "modalities": value}))
    api.refused("messages[0].content[0].modalities", messages=ask({**image_part(1), "modalities": "video"}))


@row(EXTRAS, "rid", WORKS, "names the request for /abort_request")
def _(api: Api) -> None:
    api.chat(rid="conformance")


@row(EXTRAS, "a field nobody knows", "accepted", "said once in the server's log")
def _(api: Api) -> None:
    assert api.text(frobnicate=3) == api.text()


accepted(EXTRAS, "priority", 1, "first come, first served")
accepted(EXTRAS, "request_id", "r-1")
accepted(EXTRAS, "session_id", "s")


def grammar_row(name: str, value: Any, pattern: str, bad: Any, note: str = "") -> None:
    """A field that says what the answer must look like."""

    @row(EXTRAS, name, WORKS, note)
    def _(api: Api) -> None:
        for seed in range(3):
            assert re.fullmatch(pattern, api.text(max_tokens=300, temperature=1, seed=seed, **{name: value}))
        assert (
            api.post("/v1/chat/completions", {"messages": ask("x"), name: bad})
            .json()["error"]["param"]
            .startswith(name)
        )


_OBJECT = r'\s*\{\s*"n"\s*:\s*[12]\s*,\s*"name"\s*:\s*"[^"]{0,30}"\s*\}'
_EBNF = 'root ::= ("ja" | "nee") "!"'
grammar_row("regex", "[0-9]{2}-(a|b)", "[0-9]{2}-(a|b)", "(", "Rust's syntax; the whole answer matches")
grammar_row("ebnf", _EBNF, "(ja|nee)!", "root ::= other", "GBNF as SGLang takes it, or Lark")
grammar_row("json_schema", json.dumps(SCHEMA), _OBJECT, "{", "a string or an object")
grammar_row(
    "structured_outputs",
    {"choice": ["red", "green"]},
    "red|green",
    {"xml": "x"},
    "json, json_object, regex, choice, grammar",
)
grammar_row("guided_json", SCHEMA, _OBJECT, {"type": "x"})
grammar_row("guided_regex", "a{3}", "aaa", "(")
grammar_row("guided_choice", ["red", "green"], "red|green", [])
grammar_row("guided_grammar", _EBNF, "(ja|nee)!", "root ::= other")
refused(EXTRAS, "best_of", 3)
refused(EXTRAS, "use_beam_search", True)
refused(EXTRAS, "length_penalty", 0.5)
refused(EXTRAS, "echo", True)
refused(EXTRAS, "bad_words", ["x"])
refused(EXTRAS, "allowed_token_ids", [1])
refused(EXTRAS, "prompt_logprobs", 1)
refused(EXTRAS, "truncate_prompt_tokens", 5)
refused(EXTRAS, "chat_template", "{{ 1 }}", "the operator chooses the template")
refused(EXTRAS, "logits_processors", ["x"])
refused(EXTRAS, "custom_logit_processor", "x")
refused(EXTRAS, "lora_path", "x")
refused(EXTRAS, "media_io_kwargs", {"image": {}})
