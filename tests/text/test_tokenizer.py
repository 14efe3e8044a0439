import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from baton.errors import BatonError, Cause, InvalidRequest
from baton.text import Tokenizer, TokenizerFiles, TokenizerPool


def write_model(folder: Path, backend: Backend, **files: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_special_tokens_come_from_the_post_processor(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [tokenizer.bos_token_id, *plain]
    assert tokenizer.encode("<|end|>", add_special_tokens=False) == [tokenizer.eos_token_id]


def test_a_long_text_holds_up_no_other_thread(tokenizer: Tokenizer) -> None:
    text = "to be or not to be, " * 5_000
    calls = (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_input(text, text, max_tokens=100),
    )
    for call in calls:
        thread = threading.Thread(target=call)
        began_s = last_s = time.monotonic()
        longest_s = 0.0
        thread.start()
        while thread.is_alive():
            time.sleep(0.001)
            now_s = time.monotonic()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s
        assert longest_s < (last_s - began_s) / 2


def test_ids_and_defaults(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_id is not None
    assert tokenizer.eos_token_ids == tuple(sorted({3, 7, tokenizer.eos_token_id}))
    assert tokenizer.sampling_defaults == {"temperature": 0.6}
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_a_folder_in_hugging_face_layout(tmp_path: Path, backend: Backend) -> None:
    folder = write_model(
        tmp_path,
        backend,
        config={"eos_token_id": 5},
        tokenizer_config={
            "eos_token": {"content": "<|stop|>"},
            "added_tokens_decoder": {"9000": {"content": "<new>", "normalized": False}},
            "chat_template": [{"name": "default", "template": "inline"}],
        },
    )
    (folder / "chat_template.jinja").write_text("file {{ eos_token }}", encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(str(folder))
    assert tokenizer.render_chat([{"role": "user", "content": ""}]) == "file <|stop|>"
    assert tokenizer.eos_token_id in tokenizer.eos_token_ids
    assert 5 in tokenizer.eos_token_ids
    (new,) = tokenizer.encode("<new>", add_special_tokens=False)[-1:]
    assert tokenizer.token_bytes(new) == b"<new>"
    assert tokenizer.decode([new, tokenizer.eos_token_id or 0]) == "<new>"


def test_named_templates_beside_the_main_one(tmp_path: Path, backend: Backend) -> None:
    folder = write_model(tmp_path, backend, tokenizer_config={"chat_template": "main"})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = Tokenizer.from_pretrained(str(folder))
    chat = [{"role": "user", "content": ""}]
    assert tokenizer.render_chat(chat) == "main"
    assert tokenizer.render_chat(chat, tools=[{}]) == "tools"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path, backend: Backend) -> None:
    copy = Backend.from_str(backend.to_str())
    copy.enable_truncation(2)
    copy.enable_padding(length=8)
    tokenizer = Tokenizer.from_pretrained(str(write_model(tmp_path, copy)))
    assert len(tokenizer.encode("abab", add_special_tokens=False)) == len(
        backend.encode("abab", add_special_tokens=False).ids
    )


def test_what_cannot_be_loaded_is_one_clear_line(tmp_path: Path, backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(str(tmp_path))
    write_model(tmp_path, backend)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        Tokenizer.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor"):
        Tokenizer.from_pretrained("./no/such/folder")


def test_no_template_is_the_request_s_error(fallback_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fallback_tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_no_torch_no_transformers() -> None:
    code = "import sys, baton.text; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


async def test_the_pool_answers_as_the_tokenizer_does(tokenizer: Tokenizer) -> None:
    pool = TokenizerPool(tokenizer)
    chat = [{"role": "user", "content": "hello"}]
    try:
        assert await pool.encode("hello") == tokenizer.encode("hello")
        assert await pool.encode_chat(chat) == tokenizer.encode_chat(chat)
        assert await pool.render_chat(chat) == tokenizer.render_chat(chat)
        with pytest.raises(InvalidRequest):
            await pool.encode_chat([])
    finally:
        pool.close()


async def test_the_pool_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    class Slow:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            gate.wait()
            return [len(text)]

    pool = TokenizerPool(Slow(), num_threads=1, max_pending=2)  # type: ignore[arg-type]
    try:
        tasks = [asyncio.create_task(pool.encode("x" * i)) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BatonError) as caught:
            await pool.encode("one too many")
        assert caught.value.cause is Cause.OVERLOADED
        gate.set()
        assert await asyncio.gather(*tasks) == [[0], [1]]
        assert await pool.encode("abc") == [3]
    finally:
        gate.set()
        pool.close()


async def test_a_short_text_by_itself_takes_no_thread() -> None:
    class Where:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [threading.current_thread() is threading.main_thread()]

    pool = TokenizerPool(Where())  # type: ignore[arg-type]
    try:
        assert await pool.encode("x" * 100, is_only=True) == [True]
        assert await pool.encode("x" * 100) == [False], "there may be a thousand of them"
        assert await pool.encode("x" * 10_000, is_only=True) == [False]
    finally:
        pool.close()


def test_files_default_to_empty() -> None:
    assert TokenizerFiles().special_tokens() == {}
