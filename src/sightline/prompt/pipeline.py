"""Messages and pictures to one `Prompt`: fetch, identify, render, tokenise, expand. Runs in the HTTP process, without torch."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from sightline.errors import ContextLengthError, ImageError, ModelNotFoundError, RequestError
from sightline.prompt import decoder
from sightline.prompt.caller import caller, phase
from sightline.prompt.chat_template import ChatTemplate, Rendered, Shield, load_source
from sightline.prompt.decode_budget import DecodeBudget
from sightline.prompt.decoder import Header
from sightline.prompt.media import MediaLimits, MediaLoader
from sightline.prompt.processor import (
    HasPlaceholder,
    ImagePlan,
    MindsCompany,
    PixelLimits,
    ProcessedPrompt,
    load_processor,
    prepare,
    read_json,
)
from sightline.prompt.roles import template_message
from sightline.prompt.tokenizer import Tokenizer
from sightline.registry import FAMILIES
from sightline.types import ImageRef, Pixels

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KNOWN_HEADERS = 100_000
# A conversation that is rendered and tokenised on the event loop: half a millisecond.
_SHORT_MESSAGES, _SHORT_CHARS = 8, 2048
# What one pixel of a PIL image takes that a caller hands over: a converted copy and its like.
_COPY_COST = 16
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
_DETAILS = ("auto", "low", "high", "original")


@dataclass(frozen=True)
class Picture:
    """One distinct picture of a prompt. data: its encoded bytes, or an upright RGB image (offline only). memory: bytes that
    decoding it takes."""

    digest: bytes
    data: bytes | Image.Image
    plan: ImagePlan
    memory: int
    param: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What the engine needs, and the pictures behind it.

    input_ids: int32 [L], placeholders expanded. positions: int32 [3, L] or None. images: in the order of the prompt, a
    picture shown twice appears twice; pictures: by digest, once.
    """

    input_ids: np.ndarray
    positions: np.ndarray | None
    position_delta: int
    images: tuple[ImageRef, ...]
    pictures: dict[bytes, Picture] = field(default_factory=dict)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of all pictures together."""
        return sum(image.num_tokens for image in self.images)


class _Source(NamedTuple):
    """A picture as a message names it. value: URL, or (offline) bytes, path or PIL image."""

    value: Any
    limits: PixelLimits
    param: str


class PromptPipeline:
    """Everything of a checkpoint folder that is not the model itself.

    chat_template: override, see `chat_template.load_source`. context_length: prompts must be shorter. allow_local: accept
    paths, bytes and PIL images as pictures (the offline `Engine`). secret: key of the pictures' identities.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        chat_template: str | None = None,
        limits: MediaLimits = MediaLimits(),
        context_length: int = 1 << 30,
        allow_local: bool = False,
        secret: bytes | None = None,
    ) -> None:
        config = read_json(model_dir / "config.json")
        architecture = (config.get("architectures") or [None])[0]
        if architecture not in FAMILIES:
            raise ModelNotFoundError(f"The architecture {architecture} is not supported.")
        family = FAMILIES[architecture]
        self.architecture: str = architecture
        self.limits = limits
        self.context_length = context_length
        self.tokenizer = Tokenizer(model_dir)
        self.processor = load_processor(family.processor, model_dir)
        if isinstance(self.processor, HasPlaceholder):
            self.tokenizer.reserve(self.processor.placeholder, self.processor.image_token_id)
        source, is_family_s = load_source(model_dir, chat_template, family.chat_template)
        self.template = self._compile(source)
        if not is_family_s and not self._places_pictures():
            logger.warning(
                "the chat template has no place for pictures; the template %r is used instead", family.chat_template
            )
            source, _ = load_source(model_dir, family.chat_template, family.chat_template)
            self.template = self._compile(source)
        # Of a checkpoint whose template has no place for tools; whoever names a template gets that one only.
        self._tool_template = self.template
        if chat_template is None:
            self._tool_template = self._compile(load_source(model_dir, None, family.chat_template, "tool_use")[0])
        self.media = MediaLoader(limits)
        self._allow_local = allow_local
        self._secret = secret or secrets.token_bytes(32)
        self._headers: OrderedDict[bytes, Header] = OrderedDict()
        self._budget = DecodeBudget(limits.decode_bytes)

    def _compile(self, source: str) -> ChatTemplate:
        tokenizer = self.tokenizer
        shield = Shield(tokenizer.added)
        return ChatTemplate(source, shield, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)

    def template_for(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> ChatTemplate:
        """The checkpoint's template; where that has no place for tools, the one that the checkpoint or else the family has
        for them."""
        return self.template if self.template.refusal(messages, tools) is None else self._tool_template

    def _places_pictures(self) -> bool:
        """Whether the template gives a picture exactly one placeholder; true for a model without pictures."""
        if self.processor is None:
            return True
        content = [{"type": "text", "text": "a"}, {"type": "image"}]
        try:
            rendered = self.template.render([{"role": "user", "content": content}])
        except RequestError:
            return False
        ids = self.tokenizer.encode_trusted(rendered.text, rendered.client_positions)
        return ids.count(self.processor.image_token_id) == 1

    @property
    def decoding_bytes(self) -> int:
        """Pixel bytes being decoded now."""
        return self._budget.num_bytes

    async def close(self) -> None:
        """Close the media client and the decoding threads."""
        await self.media.close()
        self._budget.close()

    # -- prompts -------------------------------------------------------------------------------------------------------

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        limits: PixelLimits = PixelLimits(),
    ) -> Prompt:
        """OpenAI messages to a prompt. Raises `RequestError` and its kinds, naming the field."""
        plain, sources = self._split(messages, limits)
        pictures = await self._identify(sources)

        def build() -> Prompt:
            rendered = self.template_for(plain, tools).render(
                plain,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=template_kwargs,
            )
            return self._expand(self._encode(rendered), pictures, "messages")

        with phase("prompt.render"):
            return build() if not tools and _is_short(plain) else await asyncio.to_thread(build)

    async def text(
        self,
        prompt: str | Sequence[int],
        images: Sequence[Any] = (),
        *,
        trusted: bool = True,
        limits: PixelLimits = PixelLimits(),
        images_param: str = "images",
    ) -> Prompt:
        """A raw prompt. Its i-th placeholder token is the i-th picture; without placeholders, pictures come first.

        trusted: special tokens written in the prompt count as such. images_param: what errors call the pictures.
        """
        sources = [_Source(image, limits, f"{images_param}[{i}]") for i, image in enumerate(images)]
        pictures = await self._identify(sources)

        def build() -> Prompt:
            ids = self.encode(prompt, trusted=trusted, add_bos=False) if isinstance(prompt, str) else list(prompt)
            if pictures and self.processor is not None and self.processor.image_token_id not in ids:
                ids = [self.processor.image_token_id] * len(pictures) + ids
            if isinstance(prompt, str) and ids:
                ids = self._with_bos(ids)
            return self._expand(ids, pictures, "prompt")

        with phase("prompt.render"):
            return await asyncio.to_thread(build)

    def encode(self, text: str, *, trusted: bool = True, add_bos: bool = True) -> list[int]:
        """Ids of a raw prompt, begun as the checkpoint's tokenizer begins texts. Raises `ContextLengthError` when hopeless."""
        self._check_length(text, "prompt")
        ids = self.tokenizer.encode_trusted(text) if trusted else self.tokenizer.encode(text)
        return self._with_bos(ids) if add_bos else ids

    def _check_length(self, text: str, param: str) -> None:
        """Refuse text that is too long whatever its tokens are, before tokenising it."""
        if len(text) > self.context_length * self.tokenizer.max_token_chars:
            raise ContextLengthError(
                f"This model's maximum context length is {self.context_length} tokens. However, your prompt has "
                f"{len(text)} characters, which are more tokens than that. Please shorten it.",
                param=param,
            )

    def _encode(self, rendered: Rendered) -> list[int]:
        self._check_length(rendered.text, "messages")
        return self._with_bos(self.tokenizer.encode_trusted(rendered.text, rendered.client_positions))

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token
        bos_id = self.tokenizer.token_to_id(bos) if bos and self.tokenizer.adds_bos else None
        return ids if bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]

    def _expand(self, ids: list[int], pictures: list[Picture], param: str) -> Prompt:
        if not ids:
            raise RequestError("The prompt is empty.", param=param)
        plans, digests = [p.plan for p in pictures], [p.digest for p in pictures]
        if self.processor is not None:
            processed = self.processor.expand(ids, plans, digests)
        else:
            processed = ProcessedPrompt(np.asarray(ids, dtype=np.int32), None, 0, ())
        prompt = Prompt(*processed, pictures={p.digest: p for p in pictures})
        length = len(prompt.input_ids)
        if length >= self.context_length:
            raise ContextLengthError(
                f"This model's maximum context length is {self.context_length} tokens. However, your prompt has {length} "
                f"tokens ({length - prompt.num_image_tokens} of text, {prompt.num_image_tokens} of images). Please shorten "
                "it, or send fewer or smaller images.",
                param=param,
            )
        return prompt

    # -- pictures ------------------------------------------------------------------------------------------------------

    def _split(
        self, messages: Sequence[Mapping[str, Any]], limits: PixelLimits
    ) -> tuple[list[dict[str, Any]], list[_Source]]:
        """Messages with every picture reduced to {"type": "image"}, and the pictures in order."""
        plain: list[dict[str, Any]] = []
        sources: list[_Source] = []
        for i, message in enumerate(messages):
            # Templates write roles between the halves of special tokens: only known ones may come there.
            if message.get("role") not in _ROLES:
                raise RequestError(f"role must be one of {', '.join(sorted(_ROLES))}.", param=f"messages[{i}].role")
            content = message.get("content")
            if isinstance(content, Sequence) and not isinstance(content, str):
                content = [
                    self._part(part, f"messages[{i}].content[{j}]", limits, sources) for j, part in enumerate(content)
                ]
            plain.append({**template_message(message, f"messages[{i}]"), "content": "" if content is None else content})
        return plain, sources

    def _part(self, part: Any, param: str, limits: PixelLimits, sources: list[_Source]) -> dict[str, Any]:
        value: Any
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise RequestError("A content part must be an object with a type.", param=param)
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text", "refusal"):
            text = part.get("refusal" if kind == "refusal" else "text") or ""
            if not isinstance(text, str):
                raise RequestError("The text of a content part must be a string.", param=f"{param}.text")
            return {"type": "text", "text": text}
        if kind in ("image_url", "input_image"):
            value, detail = part.get("image_url"), part.get("detail")
            if isinstance(value, Mapping):
                value, detail = value.get("url"), value.get("detail") or detail
            if not isinstance(value, str):
                raise RequestError("image_url must hold a URL.", param=f"{param}.image_url", code="invalid_image_url")
            limits = self._with_detail(limits, detail, param)._replace(**_modalities(part, param))
            sources.append(_Source(value, limits, f"{param}.image_url"))
            return {"type": "image"}
        if kind == "image" and self._allow_local:
            sources.append(_Source(part.get("image"), self._with_detail(limits, part.get("detail"), param), param))
            return {"type": "image"}
        raise RequestError(
            f"Content of type {str(kind)[:40]!r} is not supported; use text and image_url.", param=f"{param}.type"
        )

    def _with_detail(self, limits: PixelLimits, detail: str | None, param: str) -> PixelLimits:
        if detail is None or self.processor is None:
            return limits
        if detail not in _DETAILS:
            raise RequestError(f"detail must be one of {', '.join(_DETAILS)}.", param=f"{param}.image_url.detail")
        ours = self.processor.limits_for(detail)
        bounds = [b for b in (limits.max_pixels, ours.max_pixels) if b is not None]
        return PixelLimits(limits.min_pixels, min(bounds) if bounds else None, ours.single)

    async def _identify(self, sources: list[_Source]) -> list[Picture]:
        """Fetch and probe all pictures at once; the first error ends the others."""
        if not sources:
            return []
        if self.processor is None:
            raise RequestError(
                "Invalid content type. image_url is only supported by certain models.",
                param=sources[0].param.replace("[", ".[") + ".type",
            )
        if len(sources) > self.limits.max_images:
            raise RequestError(
                f"The request has {len(sources)} images; at most {self.limits.max_images} are allowed.",
                param="messages",
            )
        if isinstance(self.processor, MindsCompany):
            count, adapt = len(sources), self.processor.limits_among
            sources = [source._replace(limits=adapt(source.limits, count)) for source in sources]
        loaded = 0

        async def picture(source: _Source) -> Picture:
            nonlocal loaded
            data, identity = await self._data(source, caller().salt)
            loaded += len(data) if isinstance(data, bytes) else 0
            if loaded > self.limits.max_request_bytes:
                raise ImageError(
                    f"The images have more than {self.limits.max_request_bytes / 1e6:g} MB together; send smaller ones.",
                    code="image_too_large",
                    param="messages",
                    status=413,
                )
            return await self._picture(source, data, identity)

        tasks = [asyncio.ensure_future(picture(source)) for source in sources]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise

    async def _picture(self, source: _Source, data: bytes | Image.Image, identity: bytes) -> Picture:
        assert self.processor is not None
        header = self._headers.get(identity)
        if header is None:
            if isinstance(data, Image.Image):
                header = Header(data.width, data.height, _COPY_COST)
            else:
                header = await self._probe(data, source.param)
            self._headers[identity] = header
            if len(self._headers) > _KNOWN_HEADERS:
                self._headers.popitem(last=False)
        else:
            self._headers.move_to_end(identity)
        width, height, cost = header
        try:
            plan = self.processor.plan(width, height, source.limits)
        except ImageError as error:
            error.param = error.param or source.param
            raise
        return Picture(identity, data, plan, cost * width * height, source.param)

    def _digest(self, source: _Source, salt: bytes, *content: bytes | Image.Image) -> bytes:
        """Keyed hash of the tenant, the processor's settings and the picture, each framed by its length."""
        settings = repr((type(self.processor).__name__, tuple(source.limits))).encode()
        digest = hashlib.blake2b(key=self._secret, digest_size=32)
        for part in (salt, settings, *content):
            raw = part.tobytes() if isinstance(part, Image.Image) else part
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
        return digest.digest()

    async def _probe(self, data: bytes, param: str) -> Header:
        self.media.counters.probes += 1
        return await asyncio.to_thread(decoder.probe, data, self.limits, param)

    async def _data(self, source: _Source, salt: bytes) -> tuple[bytes | Image.Image, bytes]:
        """The picture and its identity. Off the event loop: megabytes to decode and to hash."""

        def identified(data: bytes) -> tuple[bytes, bytes]:
            return data, self._digest(source, salt, b"file", data)

        def converted(image: Image.Image) -> tuple[Image.Image, bytes]:
            framed = repr((image.mode, image.size)).encode()
            image = decoder.from_pil(image, self.limits, source.param)
            return image, self._digest(source, salt, b"pixels", framed, image)

        value = source.value
        if not self._allow_local or (isinstance(value, str) and _is_url(value)):
            return await self.media.load(value, identified, source.param)
        if isinstance(value, Image.Image):
            return await asyncio.to_thread(converted, value)
        if isinstance(value, bytes):
            return await asyncio.to_thread(identified, value)
        if not isinstance(value, (str, Path)):
            raise ImageError(
                f"An image must be a URL, a path, bytes or a PIL image, not {type(value).__name__}.",
                code="invalid_image_url",
                param=source.param,
            )
        try:
            return await asyncio.to_thread(lambda: identified(Path(value).read_bytes()))
        except (OSError, ValueError) as error:
            raise ImageError(
                f"The image file cannot be read: {error}", code="invalid_image_url", param=source.param
            ) from error

    async def decode(self, picture: Picture, for_device: bool = False) -> Pixels:
        """`prepare` in a worker thread and under the budget. Raises `ImageError` for a broken file."""

        def pixels(image: Image.Image) -> Pixels:
            assert self.processor is not None
            self.media.counters.resizes += 1
            with self.media.stats.timed(self.media.stats.resize_seconds):
                return prepare(image, self.processor.views(image.size, picture.plan), for_device)

        with phase("picture.decode"):
            return await self.use(picture, pixels)

    async def use(self, picture: Picture, function: Callable[[Image.Image], T]) -> T:
        """`function` of the upright RGB picture, in a worker thread and under the budget. Raises `ImageError` likewise."""
        return await self._budget.run(picture.memory, lambda: function(self._image(picture)))

    def _image(self, picture: Picture) -> Image.Image:
        if not isinstance(picture.data, bytes):
            return picture.data
        self.media.counters.decodes += 1
        with self.media.stats.timed(self.media.stats.decode_seconds):
            return decoder.decode(picture.data, self.limits, picture.param)


def _modalities(part: Mapping[str, Any], param: str) -> dict[str, bool]:
    """SGLang's field beside `image_url`, which LLaVA-OneVision's users send: changes to the picture's limits."""
    value = part.get("modalities")
    if value not in (None, "image", "multi-images"):
        raise RequestError("modalities must be image or multi-images.", param=f"{param}.modalities")
    return {"single": True} if value == "multi-images" else {}


def _is_short(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether plain messages are a little text and nothing else, which takes less time than the way to a thread and back."""
    if len(messages) > _SHORT_MESSAGES or any(message.keys() != {"role", "content"} for message in messages):
        return False
    contents = (message["content"] for message in messages)
    texts = ([c] if isinstance(c, str) else [part.get("text", "") for part in c] for c in contents)
    return sum(len(text) for group in texts for text in group) <= _SHORT_CHARS


def _is_url(value: str) -> bool:
    return value[:5].lower() in ("data:", "http:", "https", "file:")
