"""Talk to a trained model: completions of one or many prompts, printed as they come.

    python sample.py demo                                       # after `python train_gpt2.py demo`: stories
    python sample.py --checkpoint=out/gpt2 --prompt="Once upon a time"
    python sample.py --hf=gpt2 --prompt="The meaning of life is" --n_samples=3 --top_k=0 --top_p=0.95
    echo "What is a cat?" | python sample.py --prompt=-         # standard input
    python sample.py --prompt_file=prompts.txt                  # the whole file is one prompt
    python sample.py --checkpoint=out/dpo --chat                # a conversation with a fine-tuned model
    python sample.py demo-chat                                  # after the demos of sft.py and dpo.py

The prompt and the model's words go to standard output, everything else to standard error. In a conversation
/reset forgets what was said and /quit ends it; what no longer fits into the model's context is forgotten too.
"""

import codecs
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import tiktoken
import torch

from checkpoints import load_model
from data import prompt_text
from model import GPT
from sampling import cast_linears, check_sampling, generate
from training import autocast, check_least, check_recipe, parse, pick_precision, require_compiler, setup


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/gpt2"  # a checkpoint file, or the out_dir of a run: its newest
    hf: str = ""  # instead: a GPT-2 of the Hugging Face hub ("gpt2", "gpt2-xl"), or a folder in its format
    prompt: str = "Hello, I'm a language model,"  # "-" reads standard input; "" begins a document
    prompt_file: str = ""  # instead: the text of a file
    chat: bool = False  # a conversation instead: every line is a prompt in the template of sft.py
    turns: int = 8  # of a conversation that the model sees; 0 suits one that learned from single questions
    n_samples: int = 1  # continuations, printed in turn; several are drawn together (CPU: twice the memory)
    max_new_tokens: int = 256  # length of each, tokens; end-of-text ends one sooner
    temperature: float = 0.8  # 0: always the most likely token; 1: the model's own probabilities
    top_k: int = 50  # choose among the k most likely tokens; 0: all
    top_p: float = 1.0  # choose among the most likely tokens that make up this probability; 1: all
    seed: int = 1337  # sample i is drawn with seed + i
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device is faster with it
    compile: bool = False  # compile the work of a token: up to a minute, and on a CPU twice the memory


CONFIGS = {
    "gpt2": Config(),
    "demo": Config(
        checkpoint="out/demo", prompt="Once upon a time", n_samples=3, max_new_tokens=500, temperature=0.3
    ),
    "demo-chat": Config(checkpoint="out/demo-dpo", chat=True, turns=0, max_new_tokens=100, temperature=0.0),
}


def say(text: str) -> None:
    """Print a remark beside the samples."""
    print(text, file=sys.stderr, flush=True)


def read_prompt(cfg: Config) -> str:
    """The prompt's text from wherever the configuration has it."""
    if cfg.prompt_file:
        try:
            return Path(cfg.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"cannot read the prompt file {cfg.prompt_file}: {error}") from error
    try:
        return sys.stdin.read() if cfg.prompt == "-" else cfg.prompt
    except UnicodeDecodeError as error:
        raise SystemExit(f"standard input is not text in UTF-8: {error}") from error


def stream(
    tokens: Iterator[list[int | None]], tokenizer: tiktoken.Encoding, n_rows: int
) -> Iterator[list[str]]:
    """Steps of token ids -> steps of text; the bytes of an unfinished character wait for the rest."""
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(n_rows)]
    for step in tokens:
        yield [
            ""
            if token in (None, tokenizer.eot_token)
            else decoder.decode(tokenizer.decode_single_token_bytes(token))
            for token, decoder in zip(step, decoders)
        ]
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def fit_history(history: list[list[int]], prompt: list[int], room: int) -> list[list[int]]:
    """The newest turns that fit into `room` tokens together with the prompt."""
    kept = room - len(prompt)
    newest = []
    for turn in reversed(history):
        kept -= len(turn)
        if kept < 0:
            break
        newest.insert(0, turn)
    return newest


def chat(cfg: Config, raw: GPT, tokenizer: tiktoken.Encoding) -> None:
    """Answer line by line until /quit or the end of the input; each turn sees the ones before it."""
    # what an answer may need stays free, but never more than half of what the model sees
    room = raw.config.block_size - min(cfg.max_new_tokens, raw.config.block_size // 2)
    history: list[list[int]] = []  # the turns so far, each with its end-of-text
    say("/reset forgets what was said, /quit ends")
    for seed in count(cfg.seed):
        try:
            line = input("> ").strip()
        except EOFError:
            return print()
        except UnicodeDecodeError as error:
            say(f"not text in UTF-8: {error}")
            continue
        if line == "/quit":
            return
        if line == "/reset":
            history = []
        elif line.startswith("/"):
            say(f"no command {line}: there are /reset and /quit")
        if not line or line.startswith("/"):
            continue
        prompt = tokenizer.encode_ordinary(prompt_text(line))
        if len(prompt) > room:
            say(f"that is {len(prompt)} tokens; the model has room for {room}")
            continue
        history = fit_history(history[max(0, len(history) - cfg.turns) :], prompt, room)
        turn = list(prompt)
        settings = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, seeds=[seed])
        settings |= dict(compile=cfg.compile)
        context = [token for old in history for token in old] + prompt
        tokens = generate(raw, [context], cfg.max_new_tokens, stop=tokenizer.eot_token, **settings)
        for (piece,) in stream(remember(tokens, turn), tokenizer, 1):
            print(piece, end="", flush=True)
        print()
        history.append([*turn, tokenizer.eot_token] if turn[-1] != tokenizer.eot_token else turn)


def remember(tokens: Iterator[list[int | None]], turn: list[int]) -> Iterator[list[int | None]]:
    """Hand the tokens of the only row on, and add them to the turn."""
    for step in tokens:
        turn += [token for token in step if token is not None]
        yield step


def main(cfg: Config) -> None:
    """Print the prompt's continuations, or hold a conversation."""
    check_least(cfg, 1, "n_samples")
    check_least(cfg, 0, "max_new_tokens", "turns")
    check_recipe(cfg)
    try:
        check_sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    text = "" if cfg.chat else read_prompt(cfg)
    raw, tokenizer = load_model(cfg.checkpoint, cfg.hf, say)
    device = setup(cfg.device, deterministic=False).device
    if cfg.compile:
        require_compiler(device)
    raw.to(device)
    precision = pick_precision(cfg.precision, device)
    if precision == "bf16":
        cast_linears(raw, torch.bfloat16)
    amp = autocast(precision, device)
    if cfg.chat:
        with amp:
            return chat(cfg, raw, tokenizer)

    prompt = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]  # an empty prompt begins a document
    if len(prompt) > raw.config.block_size:
        say(f"the prompt has {len(prompt)} tokens; the model sees the last {raw.config.block_size}")
    t0 = time.perf_counter()
    n_drawn = 0

    def counted(steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
        nonlocal n_drawn
        for step in steps:
            n_drawn += sum(token is not None for token in step)
            yield step

    with amp:
        tokens = generate(
            raw,
            [prompt] * cfg.n_samples,
            cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            seeds=[cfg.seed + i for i in range(cfg.n_samples)],
            stop=tokenizer.eot_token,
            compile=cfg.compile,
        )
        print(text, end="", flush=True)
        waiting = [""] * cfg.n_samples  # the first sample streams, the others are drawn beside it
        for pieces in stream(counted(tokens), tokenizer, cfg.n_samples):
            print(pieces[0], end="", flush=True)
            waiting = [old + new for old, new in zip(waiting, pieces)]
    print()
    for sample in waiting[1:]:
        print(f"---\n{text}{sample}")
    seconds = time.perf_counter() - t0
    say(f"{n_drawn:,} tokens in {seconds:.1f} s: {n_drawn / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    try:
        main(parse(CONFIGS, __doc__))
    except KeyboardInterrupt:
        print()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
