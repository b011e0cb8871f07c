"""Sample from a trained model: stream continuations of one prompt, or chat.

    python sample.py demo                                       # after `python train_gpt2.py demo`: stories
    python sample.py --checkpoint=out/gpt2 --prompt="Once upon a time"
    python sample.py --checkpoint=gpt2 --prompt="The meaning of life is" --n_samples=3 --top_k=0 --top_p=0.95
    python sample.py --prompt=- < prompt.txt                    # standard input
    python sample.py --checkpoint=out/dpo --chat                # chat with a fine-tuned model
    python sample.py demo-chat                                  # after the demos of sft.py and dpo.py

Prompts and samples go to standard output, messages to standard error. A sample depends on its prompt and its seed and,
through rounding, on the number of samples.
"""

import re
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Literal

import tiktoken

from neogpt import chat, checkpoint, config, cpu, generate, model, runtime

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but tab and newline
Ids = list[int]  # token ids


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/gpt2"  # out_dir, checkpoint file, adapter folder, Hugging Face folder or hub name
    prompt: str = "Hello, I'm a language model,"  # "-" reads standard input; "" starts a new document
    chat: bool = False  # instead of samples: every line of standard input is an instruction in sft.py's template
    history_turns: config.NonNegativeInt = 8  # earlier turns that the model sees; 0 if trained on single questions
    n_samples: config.PositiveInt = 1  # number of samples, generated together and printed one after another
    max_new_tokens: config.NonNegativeInt = 256  # tokens per sample; end-of-text ends a sample earlier
    temperature: config.NonNegativeFloat = 0.8  # 0 is greedy; 1 samples from the model's probabilities
    top_k: config.NonNegativeInt = 50  # sample from the k most likely tokens; 0 for all
    top_p: Annotated[float, "(0, 1]"] = 1.0  # sample from the most likely tokens with this total probability; 1 for all
    repetition_penalty: config.PositiveFloat = 1.0  # above 1: earlier tokens are less likely (arXiv:1909.05858)
    stop: tuple[str, ...] = ()  # a sample ends before the first of these texts
    seed: config.Seed = 1337  # sample i uses seed + i
    device: str = "auto"  # auto selects CUDA, else MPS, else the CPU
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto"  # auto: bf16 if faster; int8: weights, fast on a CPU
    compile: bool = False  # compile the decode step, on CUDA: takes up to a minute


CONFIGS = {
    "gpt2": Config(),
    "demo": Config(checkpoint="out/demo", prompt="Once upon a time", n_samples=3, max_new_tokens=500, temperature=0.3),
    "demo-chat": Config(checkpoint="out/demo-dpo", chat=True, history_turns=0, max_new_tokens=100, temperature=0.0),
}


def show(text: str) -> None:
    """Print text at once and without a newline; control characters are replaced."""
    print(CONTROL.sub("\ufffd", text), end="", flush=True)


def until_stop(text: str, stop: tuple[str, ...]) -> tuple[str, int]:
    """The text before the first stop text, and how many of its characters are certainly not part of a stop text."""
    if found := [text.index(s) for s in stop if s in text]:
        return text[: min(found)], min(found)
    begun = [k for s in stop for k in range(1, len(s)) if text.endswith(s[:k])]
    return text, len(text) - max(begun, default=0)


def stream(cfg: Config, raw: model.GPT, tokenizer: tiktoken.Encoding, prompt: Ids, seeds: list[int]) -> list[Ids]:
    """Continue the prompt once per seed; return the new ids without end-of-text. Prints the first row as it grows."""
    eot, rows, n_shown = tokenizer.eot_token, [[] for _ in seeds], 0
    options = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, compile=cfg.compile)
    options |= dict(repetition_penalty=cfg.repetition_penalty, seeds=seeds, stop=eot)
    try:
        for step in generate.generate(raw, [prompt] * len(seeds), cfg.max_new_tokens, **options):
            for row, token in zip(rows, step):
                row += [token] if token not in (None, eot) else []
            text, n_safe = until_stop(tokenizer.decode(rows[0]).rstrip("\ufffd"), cfg.stop)  # an incomplete character
            show(text[n_shown:n_safe])
            n_shown = max(n_shown, n_safe)
            if cfg.stop and all(any(s in tokenizer.decode(row) for s in cfg.stop) for row in rows):
                break
    except KeyboardInterrupt:  # in a chat it ends the answer only
        if not cfg.chat:
            raise
    finally:
        show(until_stop(tokenizer.decode(rows[0]), cfg.stop)[0][n_shown:] + "\n")
    return rows


def chat_loop(cfg: Config, raw: model.GPT, tokenizer: tiktoken.Encoding) -> None:
    """Answer the lines of standard input until /quit or the end of the input."""
    with suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401, input() then has line editing and a history
    # tokens of history and prompt: max_new_tokens stay free for the answer, but at most half of the context
    budget = raw.config.block_size - min(cfg.max_new_tokens, raw.config.block_size // 2)
    history: deque[tuple[str, str]] = deque(maxlen=cfg.history_turns)  # line and answer of each turn
    runtime.print0("/reset clears the history, /quit ends the chat")
    for seed in count(cfg.seed):
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        except UnicodeDecodeError as error:
            runtime.print0(f"the input is not UTF-8 text: {error}")
            continue
        prompt = chat.encode_prompt(chat.Row(line, "", "", tuple(history)), budget, tokenizer)
        if line == "/quit":
            return
        elif line == "/reset":
            history.clear()
        elif len(prompt) > budget:
            runtime.print0(f"the prompt has {len(prompt)} tokens, but only {budget} fit: use a shorter line")
        elif line:
            (answer,) = stream(cfg, raw, tokenizer, prompt, [seed])
            history.append((line, until_stop(tokenizer.decode(answer), cfg.stop)[0]))


def main(cfg: Config) -> None:
    """Print samples, or chat."""
    rt = runtime.setup(cfg.device, "fp32" if cfg.precision == "int8" else cfg.precision, console=sys.stderr)
    if "" in cfg.stop:
        raise ValueError("--stop must not be empty")
    if cfg.precision == "int8" and rt.device.type != "cpu":
        raise ValueError(f"--precision=int8 on {rt.device.type}: int8 weights are for a CPU; use --device=cpu")
    if cfg.compile and rt.device.type != "cuda":
        raise ValueError(f"--compile=True on {rt.device.type}: compiled decoding is faster on CUDA only; omit it")
    if cfg.compile:
        runtime.require_compiler(rt.device)
    try:
        text = sys.stdin.read() if cfg.prompt == "-" and not cfg.chat else cfg.prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}") from error
    raw, tokenizer, stage, _ = checkpoint.load_model(cfg.checkpoint)
    if cfg.chat and stage == "pretraining":
        runtime.print0(f"{cfg.checkpoint} was perhaps not trained to answer: its stage is pretraining or unknown")
    raw.to(rt.device)
    if cfg.precision == "int8":
        cpu.use_int8(raw)
    if rt.precision == "bf16":
        generate.cast_linears(raw)
    with rt.autocast():
        if cfg.chat:
            return chat_loop(cfg, raw, tokenizer)
        prompt = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]
        if len(prompt) > raw.config.block_size:
            runtime.print0(f"the prompt has {len(prompt)} tokens: only the last {raw.config.block_size} are used")
        show(text)
        started = time.perf_counter()
        rows = stream(cfg, raw, tokenizer, prompt, [cfg.seed + i for i in range(cfg.n_samples)])
    for row in rows[1:]:
        show(f"---\n{text}{until_stop(tokenizer.decode(row), cfg.stop)[0]}\n")
    n_tokens, seconds = sum(map(len, rows)), time.perf_counter() - started
    runtime.print0(f"{n_tokens:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    config.run(main, CONFIGS)
