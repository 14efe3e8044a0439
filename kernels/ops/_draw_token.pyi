"""draw_token.c. Built where there is a C compiler at installation; importing it raises ImportError
where the processor has no AVX2."""

from typing_extensions import Buffer

def draw_token(
    logits: Buffer,
    words: Buffer,
    mass: Buffer,
    likeliest: int,
    key: int,
    temperature: float,
    top_p: float,
    /,
) -> int:
    """The id that is drawn from one row, without the GIL.

    Args:
        logits: [vocab_size] float32, no NaN; the largest, divided by temperature, is finite.
        words: [vocab_size] uint32: `token_words` of all ids.
        mass: [vocab_size] int32, overwritten.
        likeliest: the first id with the largest logit.
        key: of the draw.
        top_p: more than 0, less than 1.

    Raises:
        ValueError: something does not fit; nothing was drawn.
    """
