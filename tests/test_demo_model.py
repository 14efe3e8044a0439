"""The bundled model is small, whole, and says something that looks like Python."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

MODEL_DIR = Path(__file__).parents[1] / "baton" / "demo_model"
MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def greedy(model: PreTrainedModel, tokenizer: FastTokenizer, prompt: str, num_tokens: int) -> str:
    """Returns the new text, special tokens included."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    output = model.generate(ids, do_sample=False, max_new_tokens=num_tokens)
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=False)
    return text


def test_directory_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert sizes.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= MAX_BYTES


def test_shape_exercises_grouped_queries_and_tied_embeddings() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] >= 2048


def test_vocabulary_matches_the_embedding(model: PreTrainedModel, tokenizer: FastTokenizer) -> None:
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn  x ** 2\r\n\n\n",
        " leading and trailing ",
        "naïve café — “quotes” … Ελληνικά 日本語 العربية",
        "👩‍👩‍👧‍👦 family, e\u0301 combining, \u200b zero width, \x00\x7f control",
        "",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer: FastTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_ids_are_the_tokenizers(tokenizer: FastTokenizer) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = GenerationConfig.from_pretrained(MODEL_DIR)
    assert generation.eos_token_id == ends
    assert [tokenizer.eos_token_id, tokenizer.pad_token_id] == ends
    assert all(len(tokenizer.encode(end)) == 1 for end in ("<|im_end|>", "<|endoftext|>"))


def test_chat_template_renders_turns(tokenizer: FastTokenizer) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


def test_def_completes_to_a_function_header(
    model: PreTrainedModel, tokenizer: FastTokenizer
) -> None:
    text = "def " + greedy(model, tokenizer, "def ", 24)
    assert re.match(r"def [A-Za-z_]\w*\([^()]*\):\n\s+\S", text), text


def test_import_completes_to_an_import_line(
    model: PreTrainedModel, tokenizer: FastTokenizer
) -> None:
    text = "import " + greedy(model, tokenizer, "import ", 12)
    assert re.match(r"import [A-Za-z_][\w.]*(, [A-Za-z_][\w.]*)*( as \w+)?\n", text), text


def test_chat_answer_ends_its_turn(model: PreTrainedModel, tokenizer: FastTokenizer) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    answer = greedy(model, tokenizer, prompt, 200)
    assert answer.endswith("<|im_end|>")
    assert answer[0].isalpha()
