"""What a pooling model is asked, and what it says of itself: embeddings, and scores of pairs. Data
only; standard library only; everything frozen."""

from dataclasses import dataclass
from enum import StrEnum

from baton.errors import Cause, InvalidRequest


class PoolingTask(StrEnum):
    """What the model's result is. Also a worker's capability."""

    EMBED = "embed"  # a vector of one text
    SCORE = "score"  # one number for two texts: a cross-encoder


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """Of a pooling model, as far as whoever asks it must know; from its files."""

    task: PoolingTask
    num_values: int  # of one result
    is_matryoshka: bool = False  # the first values of a result are a result
    dimensions: tuple[int, ...] = ()  # how many of them may be asked for; () = any number
    tells_pairs: bool = False  # it has to know where the second of two texts begins

    def check_dimensions(self, dimensions: int | None, model: str) -> None:
        """
        Raises:
            InvalidRequest: `model` cannot make its results that short.
        """
        if dimensions is None:
            return
        if not self.is_matryoshka:
            raise InvalidRequest(
                f"The model {model} does not support Matryoshka representation: its embeddings "
                f"have {self.num_values} dimensions.",
                "dimensions",
            )
        if self.dimensions and dimensions not in self.dimensions:
            served = ", ".join(map(str, self.dimensions))
            raise InvalidRequest(f"The model {model} supports dimensions {served}.", "dimensions")
        if not 1 <= dimensions <= self.num_values:
            raise InvalidRequest(f"dimensions must be in 1..{self.num_values}.", "dimensions")


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """What `LLM.embed` and `LLM.score` take besides their texts; names are vLLM's."""

    dimensions: int | None = None  # the first so many values, of a Matryoshka model
    use_activation: bool | None = None  # norm 1 of an embedding, sigmoid of a score; None = model's
    truncate_prompt_tokens: int | None = None  # tokens of an input; -1 = what the model reads


@dataclass(frozen=True, slots=True)
class PoolingInput:
    """One text, or two that are looked at together, as token ids."""

    token_ids: tuple[int, ...]
    second_start: int | None = None  # where the second text begins, if the model tells them apart


@dataclass(frozen=True, slots=True)
class PoolingRequest:
    """Inputs and what is wanted of each; results come in their order, float32 little-endian."""

    inputs: tuple[PoolingInput, ...]
    use_activation: bool | None = None  # norm 1 of an embedding, sigmoid of a score; None = model's
    dimensions: int | None = None  # of an embedding; None = all
    priority: int = 0  # lower runs first
    deadline_ms: int | None = None  # what is left when sent

    @property
    def num_tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.inputs)


def check_input(one: PoolingInput, max_model_len: int, vocab_size: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: the model cannot read it.
    """
    if not one.token_ids:
        raise InvalidRequest("The input has no tokens.", param)
    if max(one.token_ids) >= vocab_size or min(one.token_ids) < 0:
        raise InvalidRequest("The input has a token id out of the vocabulary.", param)
    if len(one.token_ids) > max_model_len:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens, but an input has "
            f"{len(one.token_ids)}.",
            param,
            Cause.CONTEXT_LENGTH_EXCEEDED,
        )
