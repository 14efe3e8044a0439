"""The demo model's training text: the Python standard library as files, definitions and chats."""

import ast
import hashlib
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tests, character tables and build leftovers are large and teach nothing about how Python reads.
SKIPPED_DIRS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
)
SKIPPED_FILES = ("_sysconfigdata", "python-config")
PUBLIC_NAMES = {"posixpath": "os.path", "_pydecimal": "decimal", "_pyio": "io"}
PUBLIC_NAMES |= {"_collections_abc": "collections.abc", "_pydatetime": "datetime"}
QUESTIONS = ("What does {} do?", "Explain {}.", "What is {} for?", "Describe {}.")
CODE_REQUESTS = ("Show me the code of {}.", "Write {} in Python.", "How is {} implemented?")
ABOUT = (
    "I am the demo model of Baton, a very small language model trained on the Python standard "
    "library. I can write text that looks like Python, but I do not know much."
)
SMALL_TALK = {
    "Hello": "Hello! " + ABOUT,
    "Hello!": "Hello! " + ABOUT,
    "Hi": "Hello! " + ABOUT,
    "Who are you?": ABOUT,
    "What can you do?": ABOUT,
    "Thank you!": "You are welcome.",
}


@dataclass(frozen=True, slots=True)
class Symbol:
    """A documented function or class: dotted name, first docstring paragraph, dedented source."""

    name: str
    summary: str
    source: str


def library_files(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_DIRS.intersection(path.relative_to(root).parts)
        and not path.name.startswith(SKIPPED_FILES)
    ]


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return PUBLIC_NAMES.get(name, name)


def symbols(owner: str, body: list[ast.stmt], lines: list[str]) -> Iterator[Symbol]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{owner}.{node.name}"
        summary = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        source = "".join(lines[node.lineno - 1 : node.end_lineno])
        yield Symbol(name, summary, textwrap.dedent(source).strip())
        if isinstance(node, ast.ClassDef):
            yield from symbols(name, node.body, lines)


def chat(rng: random.Random, *turns: tuple[str, str]) -> str:
    """Renders turns as CHAT_TEMPLATE does, now and then with a system message."""
    messages = [("system", "You are a helpful assistant.")] if rng.random() < 0.2 else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in messages)


def symbol_documents(found: list[Symbol], rng: random.Random) -> list[str]:
    """Definitions that stand alone, so that `def ` and `class ` may open a document, and chats."""
    documents = []
    turns: list[tuple[str, str]] = []
    for symbol in found:
        short_name = ".".join(symbol.name.split(".")[-2:])
        name = rng.choice((symbol.name, symbol.name, short_name))
        if symbol.source.count("\n") <= 60:
            documents.append(symbol.source)
        if 20 <= len(symbol.summary) <= 600:
            turns.append((rng.choice(QUESTIONS).format(name), symbol.summary))
            if symbol.source.count("\n") <= 25:
                turns.append((rng.choice(CODE_REQUESTS).format(name), symbol.source))
    rng.shuffle(turns)
    while turns:
        taken, turns = turns[-2:], turns[:-2]
        documents += [chat(rng, *taken)] if rng.random() < 0.3 else [chat(rng, t) for t in taken]
    return documents


def import_blocks(body: list[ast.stmt], lines: list[str]) -> Iterator[str]:
    """A module's top-level imports, once from each of them on, so that documents which open
    with `import ` are not rare."""
    statements = [
        "".join(lines[node.lineno - 1 : node.end_lineno])
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    for first in range(len(statements)):
        yield "".join(statements[first:])


def file_documents(root: Path, path: Path, rng: random.Random) -> list[str]:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    found = list(symbols(module_name(root, path), tree.body, lines))
    return [text, *import_blocks(tree.body, lines), *symbol_documents(found, rng)]


def collect(root: Path, seed: int) -> tuple[list[str], list[str]]:
    """Returns (training documents, held-out files). One file in fifty is held out, by its hash."""
    rng = random.Random(seed)
    training: list[str] = []
    held_out: list[str] = []
    for path in tqdm(library_files(root), desc="Reading", unit="file"):
        digest = hashlib.sha256(str(path.relative_to(root)).encode()).digest()
        try:
            documents = file_documents(root, path, rng)
        except (SyntaxError, UnicodeDecodeError) as error:  # samples of other languages and codecs
            tqdm.write(f"skipped {path.name}: {error}")
            continue
        if digest[0] % 50 == 0:
            held_out.append(documents[0])
        else:
            training += documents
    small_talk = [chat(rng, turn) for turn in SMALL_TALK.items() for _ in range(60)]
    return training + small_talk, held_out
