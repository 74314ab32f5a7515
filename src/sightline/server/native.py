"""SGLang's own endpoints: POST /generate, and control of the running server."""

from __future__ import annotations

import asyncio
import base64
import math
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar, NamedTuple

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from sightline.engine.output import CompletionOutput, RequestOutput
from sightline.errors import ImageError, RequestError
from sightline.prompt.caller import caller
from sightline.prompt.pipeline import Prompt
from sightline.prompt.processor import PixelLimits
from sightline.server.admission import is_operator, require_admin
from sightline.server.exchange import Exchange, check_ids, renamed, wire_logprob
from sightline.server.lifecycle import Lifecycle
from sightline.server.schema import GRAMMAR_FIELDS, Body, SamplingFields, Whole, ranged
from sightline.types import FinishReason, TokenLogprob

router = APIRouter()

_DEFAULT_MAX_NEW_TOKENS = 128


class GenerateSampling(SamplingFields):
    """`sampling_params` of POST /generate, in SGLang's names."""

    harmless: ClassVar = SamplingFields.harmless | {"spaces_between_special_tokens", "custom_params"}
    refused: ClassVar = {**SamplingFields.refused, "stop_regex": (), "structural_tag": ()}

    max_temperature: ClassVar = math.inf

    max_new_tokens: Whole | None = ranged(minimum=0)
    min_new_tokens: Whole | None = ranged(minimum=0)
    sampling_seed: Whole | None = None

    def given(self) -> dict[str, Any]:
        """SGLang's default is 128 tokens."""
        given = super().given()
        limits = (self.max_new_tokens, given["max_tokens"], _DEFAULT_MAX_NEW_TOKENS)
        given["max_tokens"] = next(limit for limit in limits if limit is not None)
        given["min_tokens"] = self.min_new_tokens if self.min_new_tokens is not None else given["min_tokens"]
        given["seed"] = self.sampling_seed if self.sampling_seed is not None else given["seed"]
        return given

    def spelling(self, name: str) -> str:
        """As SGLang spells them."""
        if name == "logprobs":
            return "top_logprobs_num"
        names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
        return f"sampling_params.{names.get(name, name)}"


class _Logprobs(NamedTuple):
    """num: how many likelier tokens are told. start: from which of the prompt's tokens on, -1 for none of them."""

    num: int
    start: int

    @property
    def settings(self) -> dict[str, int]:
        """As fields of `SamplingParams`; the first of the prompt's tokens has no value, as with SGLang."""
        if self.start < 0:
            return {"logprobs": self.num}
        return {"logprobs": self.num, "prompt_logprobs": self.num, "prompt_logprobs_start": self.start + 1}


class GenerateRequest(Body):
    """Body of POST /generate. One prompt, or lists of equal length."""

    harmless: ClassVar = Body.harmless | {"return_text_in_logprobs", "mm_hashes", "mm_content_hashes", "background"}
    refused: ClassVar = {
        **Body.refused,
        **dict.fromkeys(GRAMMAR_FIELDS, ()),
        "input_embeds": (),
        "video_data": ([],),
        "audio_data": ([],),
        "token_ids_logprob": ([],),
        "session_params": ({},),
        "return_hidden_states": (False,),
        "log_metrics": (True, False),
    }

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    image_data: Any = None
    modalities: list[str] | None = None
    sampling_params: GenerateSampling | list[GenerateSampling] | None = None
    rid: str | list[str] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: Whole | list[Whole] | None = None
    top_logprobs_num: Whole | list[Whole] | None = None

    def check(self) -> None:
        """What the fields say together."""
        super().check()
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("Send either text or input_ids.", param="text", code="missing_required_parameter")
        if not self.each_prompt:
            raise RequestError(f"{self.prompt_field} must hold at least one prompt.", param=self.prompt_field)
        for name in ("return_logprob", "logprob_start_len", "top_logprobs_num"):
            if isinstance(value := getattr(self, name), list) and len(value) != len(self.each_prompt):
                raise RequestError(f"{name} must be one value or one for each prompt.", param=name)
        if any(start < -1 for start in self._each(self.logprob_start_len, -1)):
            raise RequestError("logprob_start_len must be a place in the prompt, or -1.", param="logprob_start_len")
        if isinstance(self.rid, list):
            raise RequestError("rid: name the whole request with one string.", param="rid")
        many = self.sampling_params
        if isinstance(many, list) and len(many) != len(self.each_prompt):
            raise RequestError("sampling_params must be one object or one for each prompt.", param="sampling_params")
        with renamed(lambda param: f"sampling_params.{param}"):
            for each in many if isinstance(many, list) else [many] if many else []:
                each.check()

    @property
    def prompt_field(self) -> str:
        """The field that has the prompts."""
        return "input_ids" if self.text is None else "text"

    @property
    def is_batch(self) -> bool:
        """Whether the prompts came as a list."""
        return isinstance(self.text, list) or (bool(self.input_ids) and isinstance(self.input_ids[0], list))  # type: ignore[index]

    @property
    def each_prompt(self) -> list[str | list[int]]:
        """The prompts, as a list."""
        value: Any = self.input_ids if self.text is None else self.text
        return value if self.is_batch else [value] if value else []

    def samplings(self, lifecycle: Lifecycle) -> list[Any]:
        """Sampling parameters for each prompt. Raises `RequestError`."""
        samplings = []
        for i, (one, logprobs) in enumerate(zip(self._each_sampling, self.each_logprobs, strict=True)):
            if i in self.only_read:
                one = one.model_copy(update={"max_new_tokens": 1})
            defaults = {**lifecycle.sampling_defaults, **(logprobs.settings if logprobs else {})}
            samplings.append(one.sampling(defaults, lifecycle.pipeline.tokenizer.vocab_size))
        return samplings

    def _each(self, value: Any, default: Any) -> list[Any]:
        """What a field says of each prompt."""
        return value if isinstance(value, list) else [default if value is None else value] * len(self.each_prompt)

    @property
    def _each_sampling(self) -> list[GenerateSampling]:
        return self._each(self.sampling_params, GenerateSampling())

    @property
    def each_logprobs(self) -> list[_Logprobs | None]:
        """What is asked for of each prompt and its answers."""
        nums, starts = self._each(self.top_logprobs_num, 0), self._each(self.logprob_start_len, -1)
        wanted = zip(self._each(self.return_logprob, False), nums, starts, strict=True)
        return [_Logprobs(num, start) if is_wanted else None for is_wanted, num, start in wanted]

    @property
    def only_read(self) -> set[int]:
        """Prompts of which nothing but their own log-probabilities is asked for."""
        each = zip(self._each_sampling, self.each_logprobs, strict=True)
        return {i for i, (one, lp) in enumerate(each) if one.max_new_tokens == 0 and lp and lp.start >= 0}

    def each_images(self) -> list[list[str]]:
        """Pictures of each prompt as URLs. Raises `RequestError`.

        One picture, a list of them, or lists of lists; a flat list beside several prompts has one for each.
        """
        count, data = len(self.each_prompt), self.image_data
        if not data:
            groups: list[Any] = [[]] * count
        elif not isinstance(data, list):
            groups = [data] * count
        elif self.is_batch or (len(data) == 1 and isinstance(data[0], list)):
            groups = data
        else:
            groups = [data]
        if len(groups) != count:
            raise RequestError(
                f"image_data has {len(groups)} entries for {count} prompts; send one for each.", param="image_data"
            )
        lists = [group if isinstance(group, list) else [group] * (group is not None) for group in groups]
        return [
            [_url(image, f"{self.images_field(i)}[{j}]") for j, image in enumerate(images)]
            for i, images in enumerate(lists)
        ]

    def images_field(self, i: int) -> str:
        """What errors call the pictures of prompt i."""
        return f"image_data[{i}]" if self.is_batch else "image_data"


def _url(image: Any, param: str) -> str:
    """A URL as it is; a picture's bare base64 as a data URL. A path is refused: nobody reads the server's files."""
    if isinstance(image, dict) and isinstance(image.get("url"), str):
        image = image["url"]
    if not isinstance(image, str):
        raise RequestError("image_data holds URLs, data URLs or base64 text.", param=param, code="invalid_image_url")
    if image[:5].lower() in ("data:", "http:", "https", "file:"):
        return image
    try:
        base64.b64decode(image[:64], validate=True)
    except ValueError as error:
        raise ImageError(
            "image_data is neither a URL nor base64; files of the server are not read, send the picture's bytes.",
            code="invalid_image_url",
            param=param,
        ) from error
    return f"data:;base64,{image}"


@router.post("/generate")
@router.put("/generate")
async def generate(request: Request) -> Response:
    """Continue raw prompts, with pictures, in SGLang's form."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    body = GenerateRequest.parse(await request.body())
    return await _Generate(lifecycle, body).respond(request, stream=bool(body.stream))


class _Generate(Exchange):
    shows_aborts = True

    def __init__(self, lifecycle: Lifecycle, body: GenerateRequest) -> None:
        for ids in body.each_prompt:
            if not isinstance(ids, str):
                check_ids(lifecycle, ids, "input_ids")
        samplings = body.samplings(lifecycle)
        assert not isinstance(body.rid, list)
        super().__init__(lifecycle, f"gen-{uuid.uuid4().hex}", samplings, body.rid)
        self.request = body
        self.only_read = body.only_read
        self.logprobs = body.each_logprobs
        self.images = body.each_images()
        self.began = time.monotonic()

    async def prompts(self) -> list[Prompt]:
        several = "multi-images" in (self.request.modalities or ())
        limits = PixelLimits(single=True) if several else PixelLimits()
        text, names = self.lifecycle.pipeline.text, map(self.request.images_field, range(len(self.images)))
        triples = zip(self.request.each_prompt, self.images, names, strict=True)
        return await asyncio.gather(*(text(p, images, limits=limits, images_param=name) for p, images, name in triples))

    def rename(self, param: str) -> str:
        """The prompt has the name of its field."""
        return self.request.prompt_field if param == "prompt" else param

    def body(self, outputs: list[RequestOutput]) -> Any:
        """One object, or a list of them for several prompts or answers."""
        objects = [self._object(i, out) for i, output in enumerate(outputs) for out in output.outputs]
        return objects if self.request.is_batch or len(objects) > 1 else objects[0]

    async def events(self) -> AsyncGenerator[dict[str, Any] | None]:
        """The text so far, again and again, as SGLang does; then None."""
        wholes = [
            RequestOutput(self.request_id, [CompletionOutput(j) for j in range(each.n)], 0, 0) for each in self.sampling
        ]
        several = self.request.is_batch or self.sampling[0].n > 1
        first = [0]
        for each in self.sampling:
            first.append(first[-1] + each.n)
        async for i, delta in self.deltas():
            wholes[i].append(delta)
            if delta.text or delta.finish_reason is not None:
                event = self._object(i, wholes[i].outputs[delta.index])
                yield {**event, "index": first[i] + delta.index} if several else event
        yield None

    def _object(self, i: int, output: CompletionOutput) -> dict[str, Any]:
        prompt = self.answers[i].prompt
        meta: dict[str, Any] = {
            "id": self.rid or self.request_id,
            "finish_reason": _finish(output),
            "prompt_tokens": len(prompt.input_ids),
            "completion_tokens": len(output.token_ids),
            "cached_tokens": self._num_cached[i],
            "image_tokens": prompt.num_image_tokens,
            "weight_version": "default",
            "e2e_latency": time.monotonic() - self.began,
        }
        if asked := self.logprobs[i]:
            logprobs, read = output.logprobs or [], self._read_logprobs(i, asked.start)
            meta["input_token_logprobs"] = [self._logprob(token, lp.logprob if lp else None) for token, lp in read]
            meta["output_token_logprobs"] = [self._logprob(lp.token_id, lp.logprob) for lp in logprobs]
            if asked.num:
                meta["input_top_logprobs"] = [lp and self._top(lp) for _, lp in read]
                meta["output_top_logprobs"] = [self._top(lp) for lp in logprobs]
        return {"text": output.text, "output_ids": output.token_ids, "meta_info": meta}

    def _read_logprobs(self, i: int, start: int) -> list[tuple[int, TokenLogprob | None]]:
        """Tokens of prompt i from `start` on, with their values but for the first."""
        if start < 0:
            return []
        ids = self.answers[i].prompt.input_ids[start : start + 1].tolist()
        return [*((token, None) for token in ids), *((lp.token_id, lp) for lp in self.prompt_logprobs[i])]

    def _logprob(self, token_id: int, logprob: float | None) -> list[Any]:
        text = self.tokenizer.token_bytes(token_id).decode(errors="replace")
        asked = (self.request.model_extra or {}).get("return_text_in_logprobs")
        return [logprob if logprob is None else wire_logprob(logprob), token_id, text if asked else None]

    def _top(self, logprob: TokenLogprob) -> list[list[Any]]:
        return [self._logprob(*pair) for pair in logprob.top]


def _finish(output: CompletionOutput) -> dict[str, Any] | None:
    match output.finish_reason:
        case None:
            return None
        case FinishReason.LENGTH:
            return {"type": "length", "length": len(output.token_ids)}
        case FinishReason.ABORT:
            return {"type": "abort", "message": "ended by /abort_request"}
        case _:
            return {"type": "stop", "matched": _matched(output.stop_reason, output.token_ids)}


def _matched(stop_reason: str | int | None, token_ids: Sequence[int]) -> str | int | None:
    """What ended it; the end-of-sequence token has no stop_reason and is the last token."""
    return stop_reason if stop_reason is not None else token_ids[-1] if token_ids else None


# -- control -----------------------------------------------------------------------------------------------------------


class AbortRequest(Body):
    """Body of POST /abort_request."""

    rid: str | None = None
    abort_all: bool | None = None

    def check(self) -> None:
        """One of the two."""
        super().check()
        if not self.rid and not self.abort_all:
            raise RequestError("Name the request's rid, or set abort_all.", param="rid")


@router.post("/abort_request")
async def abort_request(request: Request) -> Response:
    """End a running request of the same key by its `rid` or the id of its answer; an operator may end any, and all."""
    body = AbortRequest.parse(await request.body())
    exchanges: dict[str, Exchange] = request.app.state.exchanges
    if body.abort_all:
        await require_admin(request)
    found = set(exchanges.values()) if body.abort_all else {exchanges[body.rid]} if body.rid in exchanges else set()
    found = {exchange for exchange in found if is_operator() or exchange.tenant == caller().salt}
    for exchange in found:
        exchange.abort()
    return JSONResponse({"aborted": len(found)})


@router.post("/flush_cache", dependencies=[Depends(require_admin)])
@router.get("/flush_cache", dependencies=[Depends(require_admin)])
async def flush_cache(request: Request) -> Response:
    """Forget cached prefixes and encoded pictures, but for what running requests use."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    lifecycle.engine.flush_cache()
    return JSONResponse({"status": "flushed"})
