"""Flags of SGLang and vLLM that are no settings here: what becomes of each.

A flag whose value is what sightline does anyway is accepted; any other ends the start with the reason and the remedy. Flags with
our meaning under another name are spellings of a setting in config.py and do not appear here.
"""

from __future__ import annotations

from typing import NamedTuple

ANY = "*"  # accepted with every value
MODEL = "=model"  # accepted when it is the model's own path


class ForeignFlag(NamedTuple):
    """names: spellings without dashes, the first is canonical. accepted: values that change nothing; a switch has none.

    why: the reason and the remedy, as a sentence that follows the flag. switch: takes no value. origin: whose flag it is.
    """

    names: tuple[str, ...]
    accepted: tuple[str, ...]
    why: str
    switch: bool
    origin: str

    @property
    def options(self) -> tuple[str, ...]:
        """Every spelling with its dashes; short ones have one dash too."""
        short = (f"-{name}" for name in self.names if len(name) <= 2)
        return (*(f"--{name}" for name in self.names), *short)

    def refusal(self, value: object, model: object) -> str | None:
        """Why the start must end, or None where nothing changes. model: what the start names as its model."""
        given = str(value).strip().lower()
        # A file may say that something is off or not set, which is what happens anyway.
        if value is None or (self.switch and given == "false"):
            return None
        if ANY in self.accepted or given in self.accepted:
            return None
        if MODEL in self.accepted and value == model:
            return None
        return self.why + (f" (accepted: {self.shown})" if self.shown and not self.switch else "")

    @property
    def shown(self) -> str:
        """The accepted values, for people."""
        return "" if ANY in self.accepted else ", ".join("the model's" if a == MODEL else a for a in self.accepted)


_TABLE: dict[str, str] = {}

# flag and other spellings | accepted values, or "switch", or "switch ok" | reason and remedy
_TABLE["SGLang"] = """
tokenizer-path | =model | the tokenizer lies in the model's folder; put both into one
tokenizer-mode | auto | only tokenizer.json is read, the fast form of every tokenizer
skip-tokenizer-init | switch | text is always possible; send input_ids to /generate to skip it
trust-remote-code | switch ok | code of a checkpoint is never run, and the served families need none
kv-cache-dtype | auto | K/V has the type of the activations
quantization, q | | quantized weights are not supported; serve the original checkpoint
quantization-param-path | | quantized weights are not supported
completion-template | | filling in the middle is not supported
is-embedding | switch | only generating models are served
max-prefill-tokens | | use --chunked-prefill-size: tokens of one step, however many prompts they come from
schedule-policy | fcfs | requests are served in their order
schedule-conservativeness | | a prompt takes all its pages when it is admitted; nothing is to be tuned
cpu-offload-gb | 0 | weights stay on the device
page-size, block-size | 16 | pages have 16 tokens
stream-interval | 1 | every token is sent when it is there
stream-output | switch | /generate sends the text so far, as SGLang does by default
constrained-json-whitespace-pattern | | JSON has the grammar's own white space
watchdog-timeout | | the engine has no timer for a step
base-gpu-id | 0 | choose the device with CUDA_VISIBLE_DEVICES
gpu-id-step | 1 | choose the device with CUDA_VISIBLE_DEVICES
log-level-http | | use --log-level
log-requests | switch ok | each request has a line in the log
log-requests-level | 0 | bodies are never logged
show-time-cost | switch | each request's line in the log has its times
file-storage-path | | no files are kept; send pictures in the request
enable-cache-report | switch ok | usage always has cached_tokens
reasoning-parser | | the served models do not reason
ep-size, expert-parallel-size, ep | 1 | models with experts are not served
json-model-override-args | {} | edit the checkpoint's config.json instead
lora-paths | | LoRA adapters are not supported; merge them into the weights
max-loras-per-batch | | LoRA adapters are not supported
lora-backend | | LoRA adapters are not supported
grammar-backend | llguidance | grammars are llguidance's
speculative-algorithm | | speculative decoding is not supported
speculative-draft-model-path | | speculative decoding is not supported
speculative-num-steps | | speculative decoding is not supported
speculative-eagle-topk | | speculative decoding is not supported
speculative-num-draft-tokens | | speculative decoding is not supported
speculative-accept-threshold-single | | speculative decoding is not supported
speculative-accept-threshold-acc | | speculative decoding is not supported
speculative-token-map | | speculative decoding is not supported
enable-double-sparsity | switch | attention is exact
ds-channel-config-path | | attention is exact
ds-heavy-channel-num | | attention is exact
ds-heavy-token-num | | attention is exact
ds-heavy-channel-type | | attention is exact
ds-sparse-decode-threshold | | attention is exact
disable-cuda-graph-padding | switch | a decode step is padded to the next captured size; use --disable-cuda-graph for none at all
enable-nccl-nvls | switch | set the environment variable NCCL_NVLS_ENABLE
disable-outlines-disk-cache | switch ok | no grammar is kept on disk
disable-custom-all-reduce | switch ok | sums between GPUs are NCCL's
disable-mla | switch ok | no served family has latent attention
enable-mixed-chunk | switch ok | decode rows and prefill chunks always share a step
enable-dp-attention | switch | each rank attends with its own heads
enable-ep-moe | switch | models with experts are not served
enable-deepep-moe | switch | models with experts are not served
enable-torch-compile | switch | steps are not compiled; CUDA graphs are used without it
torch-compile-max-bs | | steps are not compiled
cuda-graph-bs | | use --cuda-graph-max-bs; the sizes below it are chosen
torchao-config | | quantized weights are not supported
enable-nan-detection | switch | the answers are not searched for NaN
enable-p2p-check | switch ok | NCCL checks it by itself
triton-attention-reduce-in-fp32 | switch ok | attention accumulates in float32
triton-attention-num-kv-splits | | the kernel chooses its splits
num-continuous-decode-steps | 1 | every step may admit a request
delete-ckpt-after-loading | switch | checkpoints are never deleted
enable-memory-saver | switch | memory is not released while the server runs
allow-auto-truncate | switch | nothing is dropped from a prompt; one that is too long is answered 400
enable-custom-logit-processor | switch | code from requests is never run; use logit_bias or a grammar
enable-hierarchical-cache | switch | K/V is kept on the device only
hicache-ratio | | K/V is kept on the device only
enable-flashinfer-mla | switch | no served family has latent attention
enable-flashmla | switch | no served family has latent attention
flashinfer-mla-disable-ragged | switch | no served family has latent attention
warmups | | the engine answers a request of its own before it is ready
debug-tensor-dump-output-folder | | tensors are not dumped
debug-tensor-dump-input-file | | tensors are not dumped
debug-tensor-dump-inject | | tensors are not dumped
skip-server-warmup | switch | the engine answers a request of its own before it is ready
enable-multimodal | switch ok | pictures are served whenever the model has them
mm-attention-backend | | use --attention-backend
mm-enable-dp-encoder | switch ok | pictures are divided among the ranks of --tp-size
"""
_TABLE["vLLM"] = """
enable-prefix-caching | switch ok | the prefix cache is on
no-enable-prefix-caching | switch | use --disable-radix-cache
enable-chunked-prefill | switch ok | prompts are computed in chunks
no-enable-chunked-prefill | switch | prompts are always computed in chunks; use --chunked-prefill-size for larger ones
async-scheduling | switch ok | steps overlap on a GPU
scheduling-policy | fcfs | requests are served in their order
pipeline-parallel-size, pp | 1 | a model is divided by --tp-size, not by layers
api-server-count | 1 | one process serves HTTP
distributed-executor-backend | mp | the ranks of an engine are processes; several machines are --nnodes, or Ray Serve
swap-space | 0 | K/V is kept on the device only
generation-config | auto | generation_config.json gives the defaults of sampling; requests override them
override-generation-config | | edit the checkpoint's generation_config.json, or send the values with requests
hf-token | | set the environment variable HF_TOKEN
config-format | auto, hf | checkpoints are in Hugging Face's form
runner | auto, generate | only generating models are served
limit-mm-per-prompt, limit-mm-data-per-request | | use --max-images-per-request
mm-processor-kwargs | | send mm_processor_kwargs with requests
mm-encoder-tp-mode | data | pictures are divided among the ranks of --tp-size, not the tower
mm-processor-cache-gb | | use --vision-cache-gb: encoded pictures are kept instead of resized ones
disable-chunked-mm-input | switch | a chunk may end inside a picture
interleave-mm-strings | switch ok | pictures stand where the message has them
media-io-kwargs | | pictures are decoded as transformers does
enable-auto-tool-choice | switch ok | tools work without it
structured-outputs-config | | grammars are llguidance's
enable-lora | switch | LoRA adapters are not supported; merge them into the weights
speculative-config | | speculative decoding is not supported
compilation-config | | steps are not compiled
enable-request-id-headers | switch ok | every answer has x-request-id
enable-prompt-tokens-details | switch ok | usage always has them
enable-log-requests | switch ok | each request has a line in the log
disable-log-requests, no-enable-log-requests | switch | use --log-level warning
disable-log-stats | switch | use --log-level warning
otlp-traces-endpoint | | use --enable-trace, and the environment variable OTEL_EXPORTER_OTLP_ENDPOINT (http/protobuf)
collect-detailed-traces | | --enable-trace has spans of every phase
uvicorn-log-level | | use --log-level
return-tokens-as-token-ids | switch | log-probabilities carry the tokens' bytes
ssl-keyfile | | end TLS in front of the server
ssl-certfile | | end TLS in front of the server
root-path | | strip the prefix in front of the server
"""


def _parse() -> tuple[ForeignFlag, ...]:
    flags = []
    for origin, text in _TABLE.items():
        for line in text.strip().splitlines():
            names, accepted, why = (cell.strip() for cell in line.split("|"))
            switch = accepted.startswith("switch")
            values = (ANY,) if accepted == "switch ok" else () if switch else tuple(accepted.split(", "))
            spellings = tuple(name.strip() for name in names.split(","))
            flags.append(ForeignFlag(spellings, tuple(filter(None, values)), why, switch, origin))
    return tuple(flags)


FOREIGN_FLAGS = _parse()
