"""What a checkpoint's `config.json` says about a BERT-type encoder. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.engine.model_config import stored_dtype
from baton.errors import InvalidRequest

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """What sets one kind of encoder apart from BERT."""

    prefix: str  # of its tensors, where the checkpoint has a head besides
    counts_from_padding: bool = False  # positions begin behind the id of the padding token


_BERT = EncoderFamily("bert.")
_ROBERTA = EncoderFamily("roberta.", counts_from_padding=True)
ENCODERS: Mapping[str, EncoderFamily] = {
    "BertModel": _BERT,
    "BertForSequenceClassification": _BERT,
    "RobertaModel": _ROBERTA,
    "RobertaForSequenceClassification": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "XLMRobertaForSequenceClassification": _ROBERTA,
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """A transformer that looks both ways, with learned positions and norms behind its residuals."""

    architecture: str
    prefix: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    max_len: int  # tokens of one input
    first_position: int  # in the table of positions
    num_token_types: int
    layer_norm_eps: float
    activation: str
    dtype: str | None  # of the stored weights, where config.json says so

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def parse_encoder_config(config: Mapping[str, Any], architecture: str) -> EncoderConfig:
    """
    Raises:
        InvalidRequest: it asks for something unsupported.
        KeyError, TypeError, ValueError: it is malformed.
    """
    family = ENCODERS[architecture]
    activation = str(config.get("hidden_act", "gelu"))
    positions = str(config.get("position_embedding_type", "absolute"))
    for key, value, ok in (
        ("hidden_act", activation, activation in ACTIVATIONS),
        ("position_embedding_type", positions, positions == "absolute"),
        ("is_decoder", True, not config.get("is_decoder", False)),
        ("quantization_config", "quantized weights", "quantization_config" not in config),
    ):
        if not ok:
            raise InvalidRequest(f"unsupported {key} in config.json: {value}", "model")
    hidden_size, num_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is no multiple of {num_heads} heads")
    first = int(config["pad_token_id"]) + 1 if family.counts_from_padding else 0
    return EncoderConfig(
        architecture=architecture,
        prefix=family.prefix,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_heads=num_heads,
        vocab_size=int(config["vocab_size"]),
        max_len=int(config["max_position_embeddings"]) - first,
        first_position=first,
        num_token_types=int(config.get("type_vocab_size", 2)),
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        activation=activation,
        dtype=stored_dtype(config),
    )
