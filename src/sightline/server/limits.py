"""Every bound of the server in one table, for `/server_info` and the documentation."""

from __future__ import annotations

from typing import Any, NamedTuple

from sightline.config import ServerConfig
from sightline.prompt.decoder import FORMATS
from sightline.prompt.media import MediaLimits

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 100


class Limit(NamedTuple):
    """One bound. value: None is unbounded. flag: what changes it; empty when nothing does. status: of who passes it."""

    name: str
    value: Any
    unit: str
    flag: str
    status: str
    meaning: str


def table(config: ServerConfig, media: MediaLimits) -> list[Limit]:
    """The bounds of one server, defaults for `ServerConfig()`."""

    def of(name: str, field: str, unit: str, status: str, meaning: str) -> Limit:
        return Limit(name, getattr(config, field), unit, f"--{field.replace('_', '-')}", status, meaning)

    return [
        of("body", "max_body_mb", "MB", "413", "one request's body, counted as it comes"),
        Limit("headers", MAX_HEADER_BYTES, "bytes", "", "431", "request line and headers together"),
        Limit("header_count", MAX_HEADERS, "headers", "", "431", "headers of one request"),
        of("images", "max_images_per_request", "images", "400", "pictures in one request"),
        of("image_size", "max_image_mb", "MB", "413", "one encoded picture"),
        Limit("images_size", media.max_request_bytes / 1e6, "MB", "", "413", "encoded pictures of one request"),
        of("image_pixels", "max_image_megapixels", "million pixels", "400", "one picture, by its header"),
        Limit("image_formats", list(FORMATS), "", "", "400", "by the first bytes, whatever the type says"),
        Limit(
            "decode_memory", media.decode_bytes / 1e6, "MB", "", "waits", "pictures decoded at once, in this process"
        ),
        of(
            "fetch_time",
            "media_timeout",
            "s",
            "400",
            "one picture: name, connections, redirects, body; retried if a kept connection was closed",
        ),
        of("redirects", "media_redirects", "redirects", "400", "of one picture, each checked like the first URL"),
        of("private_addresses", "allow_private_media", "", "403", "whether pictures may come from private addresses"),
        of("requests", "max_queued_requests", "requests", "503", "in flight, waiting ones included"),
        of("tokens", "max_queued_tokens", "tokens", "503", "prompt tokens in flight"),
        of("held", "max_queued_mb", "MB", "503", "bodies and encoded pictures in flight"),
        of("queue_time", "queue_timeout", "s", "503", "waiting for a turn in the engine"),
        of("run_time", "request_timeout", "s", "504", "one request, from its headers to its end"),
        of("client_time", "client_timeout", "s", "408 or cut off", "sending headers, sending a body, reading on"),
        of("keep_alive", "stream_keep_alive", "s", "", "silence in a stream before a comment line"),
        of("drain_time", "drain_timeout", "s", "503", "running requests after SIGTERM"),
        of("stall_time", "stall_timeout", "s", "exit 7", "silence of a busy engine; 60 s on a GPU, 600 s on a CPU"),
    ]
