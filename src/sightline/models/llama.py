"""Plain language models on the shared decoder: Llama (arXiv:2407.21783), Mistral (arXiv:2310.06825), Qwen2 (arXiv:2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sightline.attention.backend import ForwardContext
from sightline.layers.embedding import OutputHead, place_features
from sightline.models import KVSpec
from sightline.models.config import Fields, refuse_quantization
from sightline.models.decoder import AroundDecoder, Decoder, DecoderConfig, text_config
from sightline.parallel import SOLO, Group


@dataclass(frozen=True)
class TextModelConfig(AroundDecoder):
    """config.json of a text-only checkpoint."""

    model_type: ClassVar[str]

    text: DecoderConfig
    tie_word_embeddings: bool
    dtype: str | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> TextModelConfig:
        """config: the contents of config.json; there is no preprocessor."""
        refuse_quantization(config)
        fields = Fields(config)
        # Mistral's window has a default, and a file that leaves it out means it
        defaults = {"sliding_window": 4096} if cls.model_type == "mistral" else {}
        return cls(
            text=text_config(fields, cls.model_type, defaults),
            tie_word_embeddings=fields.get(bool, "tie_word_embeddings", default=False),
            dtype=fields.get(str, "dtype", "torch_dtype", default=None),
        )


class LlamaConfig(TextModelConfig):
    """Llama 2 and 3, and what is built like them."""

    model_type = "llama"


class MistralConfig(TextModelConfig):
    """Mistral 7B. Its first release attends over a window of 4096 tokens; here its context ends there."""

    model_type = "mistral"


class Qwen2Config(TextModelConfig):
    """Qwen1.5, Qwen2 and Qwen2.5."""

    model_type = "qwen2"


class CausalLM(nn.Module):
    """See the contract in `sightline.models`. Subclasses name their config."""

    config_class: type[TextModelConfig]
    uses_mrope = False

    def __init__(self, config: TextModelConfig, group: Group = SOLO) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config.text, group)
        self.lm_head = None if config.tie_word_embeddings else OutputHead(config.hidden_size, config.vocab_size, group)

    def map_name(self, name: str) -> str | None:
        """Names are ours, but for buffers of old releases and a tied head that is written nevertheless."""
        if name.endswith(".rotary_emb.inv_freq") or (self.lm_head is None and name == "lm_head.weight"):
            return None
        return name

    @property
    def kv_spec(self) -> KVSpec:
        """What the cache holds for each token."""
        return self.model.kv_spec

    def embed(self, input_ids: Tensor, image_rows: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """input_ids int64 [T] -> [T, hidden]. Rows may be overwritten by features, as anywhere; nobody here makes some."""
        return place_features(self.model.embed_tokens(input_ids), image_rows, features)

    def forward(self, hidden: Tensor, positions: Tensor, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """hidden [T, hidden], positions int64 [T] -> [T, hidden], normalised; with rows int64 [S], those alone."""
        return self.model(hidden, positions, ctx, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab]."""
        head = self.model.embed_tokens.logits if self.lm_head is None else self.lm_head
        return head(hidden)


class LlamaForCausalLM(CausalLM):
    """Llama 2 and 3."""

    config_class = LlamaConfig


class MistralForCausalLM(CausalLM):
    """Mistral 7B."""

    config_class = MistralConfig


class Qwen2ForCausalLM(CausalLM):
    """Qwen1.5, Qwen2 and Qwen2.5: biases on queries, keys and values."""

    config_class = Qwen2Config
