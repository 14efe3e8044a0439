"""Three small tokenizers with the decoders of the families that Baton serves."""

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from baton.text import Tokenizer, TokenizerFiles

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_backend() -> Backend:
    """Llama 3 and Qwen: the GPT-2 alphabet, a few merges, special and plain added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|bos|>", "<|end|>"])
    backend.add_tokens(["<think>", "a b", "é", "中"])
    bos = backend.token_to_id("<|bos|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    return backend


def byte_fallback_backend() -> Backend:
    """Llama 2 and Mistral: words with ▁, bytes as <0xNN>, one leading space dropped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", "a", "b", "▁a", "▁▁", "é", "中", "▁中", "<0xZZ>", "�"]
    backend = Backend(
        models.BPE(
            vocab={w: i for i, w in enumerate(words)},
            merges=[("▁", "a"), ("▁", "▁"), ("▁", "中")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("[INST]", special=False)])
    return backend


def metaspace_backend() -> Backend:
    words = ["<unk>", "▁", "a", "b", "▁a", "▁b▁", "中"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Metaspace()
    return backend


BACKENDS = {
    "byte_level": byte_level_backend,
    "byte_fallback": byte_fallback_backend,
    "metaspace": metaspace_backend,
}


@pytest.fixture(scope="session", params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte level, with a chat template and an EOS."""
    files = TokenizerFiles(
        tokenizer_config={"bos_token": "<|bos|>", "eos_token": "<|end|>"},
        generation_config={"eos_token_id": [3, 7], "temperature": 0.6, "top_k": None},
        chat_templates={"default": CHAT},
    )
    return Tokenizer(byte_level_backend(), files)


@pytest.fixture(scope="session")
def fallback_tokenizer() -> Tokenizer:
    return Tokenizer(byte_fallback_backend(), TokenizerFiles())
