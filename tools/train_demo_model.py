"""Train the demo model that ships with Baton on the sources of the Python standard library.

The result is a small Qwen3-shaped checkpoint directory in Hugging Face layout. It exists so that
`baton serve` answers with readable tokens on a machine that has downloaded nothing.
"""

import argparse
import math
import platform
import random
import re
import string
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from demo_corpus import CHAT_TEMPLATE, TEXT_END, TURN_END, TURN_START, collect
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

SAMPLE_PROMPTS = ("def ", "import ", "class ", "for i in range(")
SAMPLE_CHATS = ("Hello", "What does os.path.join do?", "Show me the code of textwrap.dedent.")


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Documents joined end to end. ids: [num_tokens] int64; starts: [num_documents] int64."""

    ids: torch.Tensor
    starts: torch.Tensor
    num_bytes: int


def train_tokenizer(documents: list[str], vocab_size: int, max_len: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TEXT_END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(documents, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=TEXT_END,
        additional_special_tokens=[TURN_START],
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def cut(text: str, rng: random.Random) -> list[str]:
    """Splits after some spaces. BPE glues a space to the word that follows, so the lone space that
    ends a prompt such as `def ` would otherwise never be seen in training."""
    cuts = []
    for match in re.finditer(r"^(?:def|class|import|from) (?=\w)| (?=\w)", text, re.MULTILINE):
        if rng.random() < (0.3 if len(match[0]) > 1 else 0.02):
            cuts.append(match.end())
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> TokenStream:
    rng = random.Random(seed)
    order = rng.sample(documents, len(documents))
    text_end = tokenizer.convert_tokens_to_ids(TEXT_END)
    ids: list[int] = []
    starts: list[int] = []
    for document in tqdm(order, desc="Encoding", unit="doc"):
        starts.append(len(ids))
        for piece in cut(document, rng):
            ids += tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        ids.append(text_end)
    num_bytes = sum(len(document.encode()) for document in documents)
    return TokenStream(torch.tensor(ids), torch.tensor(starts), num_bytes)


def build_model(tokenizer: PreTrainedTokenizerFast, max_len: int) -> Qwen3ForCausalLM:
    text_end, turn_end = tokenizer.convert_tokens_to_ids([TEXT_END, TURN_END])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_len,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=turn_end,
        pad_token_id=text_end,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[turn_end, text_end],
        pad_token_id=text_end,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
    )
    return model


def draw_batch(stream: TokenStream, batch: int, length: int, rng: torch.Generator) -> torch.Tensor:
    """Returns [batch, length] int64: about half of the rows open at a document, half anywhere."""
    last = len(stream.ids) - length
    anywhere = torch.randint(last, (batch,), generator=rng)
    at_document = stream.starts[torch.randint(len(stream.starts), (batch,), generator=rng)]
    coin = torch.randint(2, (batch,), generator=rng).bool()
    begins = torch.where(coin, anywhere, at_document.clamp(max=last))
    return torch.stack([stream.ids[begin : begin + length] for begin in begins.tolist()])


def build_optimizers(model: Qwen3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for embeddings and norm gains.

    With the few tokens that a CPU can afford, AdamW alone stays far behind: its loss after 150
    steps was 5.0 at the best of three settings tried, against 4.2, at about the same time per step.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    gains = [p for p in model.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([embedding, *gains], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def train(model: Qwen3ForCausalLM, stream: TokenStream, args: argparse.Namespace) -> None:
    rng = torch.Generator().manual_seed(args.seed)
    optimizers = build_optimizers(model, args.lr)
    warmup = min(200, args.steps // 10)
    schedules = [get_cosine_schedule_with_warmup(o, warmup, args.steps) for o in optimizers]
    # The last steps see full-length rows (as many tokens per step), or RoPE angles that occur only
    # in long prompts would be untrained.
    first_long_step = round(args.steps * (1 - args.long_share))
    smooth_loss = math.log(model.config.vocab_size)
    with tqdm(total=args.steps * args.batch_tokens, unit="tok", unit_scale=True) as bar:
        for step in range(args.steps):
            length = args.max_len if step >= first_long_step else args.context
            batch = draw_batch(stream, max(1, args.batch_tokens // length), length, rng)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for update in (*optimizers, *schedules):
                update.step()
            model.zero_grad(set_to_none=True)
            smooth_loss += 0.05 * (loss.item() - smooth_loss)
            bar.set_postfix(step=step + 1, loss=f"{smooth_loss:.3f}", refresh=False)
            bar.update(batch.numel())


@torch.inference_mode()
def bits_per_byte(model: Qwen3ForCausalLM, stream: TokenStream, length: int) -> float:
    """Mean code length of the held-out files, read in rows of `length` tokens without overlap."""
    rows = stream.ids[: len(stream.ids) // length * length].view(-1, length)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    mean_nats: float = sum(losses) / len(losses)
    return mean_nats / math.log(2) * len(stream.ids) / stream.num_bytes


@torch.inference_mode()
def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, num_tokens: int
) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens)
    text: str = tokenizer.decode(output[0], skip_special_tokens=False)
    return text


def samples(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns greedy completions of fixed prompts as Markdown, special tokens visible."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in SAMPLE_CHATS
    ]
    prompts = [*SAMPLE_PROMPTS, *chats]
    texts = [complete(model, tokenizer, prompt, 80) for prompt in prompts]
    return "\n\n".join(f"~~~text\n{text}\n~~~" for text in texts)


def commands(args: argparse.Namespace) -> str:
    """Returns the command lines that lead to this model, those of a resumed one's card included."""
    values = {key.replace("_", "-"): value for key, value in vars(args).items()}
    switch = "--bf16" if values.pop("bf16") else "--no-bf16"
    shown = {k: v.name if isinstance(v, Path) else v for k, v in values.items() if v is not None}
    options = " ".join([*(f"--{key} {value}" for key, value in shown.items()), switch])
    earlier = ""
    if args.resume:
        card = (args.resume / "README.md").read_text(encoding="utf-8")
        earlier = card.partition("~~~sh\n")[2].partition("~~~")[0]
    num_tokens = args.steps * args.batch_tokens / 1e6
    return f"{earlier}# {num_tokens:.1f} M tokens\npython tools/train_demo_model.py {options}"


def save(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    streams: tuple[TokenStream, TokenStream],
    args: argparse.Namespace,
) -> None:
    """Writes the bf16 checkpoint, reads it back, and describes in the card what was read back."""
    model.to(torch.bfloat16).save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)  # written as a private file
    tokenizer.save_pretrained(args.output, save_jinja_files=False)
    saved = Qwen3ForCausalLM.from_pretrained(args.output, dtype=torch.bfloat16).eval()
    training, held_out = streams
    template = Path(__file__).with_name("demo_model_card.md").read_text(encoding="utf-8")
    card = string.Template(template).substitute(
        num_parameters=f"{saved.num_parameters():,}",
        vocab_size=len(tokenizer),
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        train_bytes=f"{training.num_bytes / 1e6:.1f}",
        train_tokens=f"{len(training.ids) / 1e6:.1f}",
        bits_per_byte=f"{bits_per_byte(saved, held_out, args.context):.2f}",
        context=args.context,
        max_len=args.max_len,
        commands=commands(args),
        samples=samples(saved, tokenizer),
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default_output = Path(__file__).parents[1] / "baton" / "demo_model"
    parser.add_argument("--output", type=Path, default=default_output, help="checkpoint directory")
    parser.add_argument("--resume", type=Path, help="checkpoint directory to train further")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--context", type=int, default=256, help="row length in tokens")
    parser.add_argument("--max-len", type=int, default=2048, help="longest sequence in tokens")
    parser.add_argument("--long-share", type=float, default=0.1, help="share of --max-len steps")
    parser.add_argument("--vocab-size", type=int, default=2048, help="number of tokens")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and weights")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    documents, held_out_documents = collect(Path(sysconfig.get_path("stdlib")), args.seed)
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume)
        for loading_option in ("is_local", "local_files_only"):  # would be saved along
            tokenizer.init_kwargs.pop(loading_option, None)
        model = Qwen3ForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(documents, args.vocab_size, args.max_len)
        model = build_model(tokenizer, args.max_len)
    training = encode(tokenizer, documents, args.seed)
    held_out = encode(tokenizer, held_out_documents, args.seed)
    print(
        f"{len(documents)} documents, {training.num_bytes / 1e6:.1f} MB, "
        f"{len(training.ids) / 1e6:.2f} M tokens; {model.num_parameters() / 1e6:.2f} M parameters",
        file=sys.stderr,
    )
    train(model, training, args)
    save(model, tokenizer, (training, held_out), args)


if __name__ == "__main__":
    main()
