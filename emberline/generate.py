"""`emberline generate`: text from a model, on the terminal or as JSON.

Invariant: what is imported here does not load torch, so that `--help` does not wait for it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from emberfs.cli.output import json_option, note, note_if_slow, plural, print_json, safe

from .model import config_of

if TYPE_CHECKING:
    from embertrain.engine import Engine, Request, Sampling
    from embertrain.engine.tokenizers import Tokenizer
    from embertrain.model.config import ModelConfig
    from embertrain.model.model import Model

SEQUENCES_MAX = 8
"""Prompts of a batch that run at once."""


@click.command(short_help="Text from a model.")
@click.option(
    "--model",
    "name",
    required=True,
    metavar="PRESET|FOLDER",
    help="A folder with config.json and safetensors, or a preset's name (emberline model info lists them).",
)
@click.option("--random-weights", is_flag=True, help="Weights drawn from --seed: the text means nothing.")
@click.option(
    "--dtype", type=click.Choice(["bf16", "f32"]), default="bf16", show_default=True, help="What the model computes in."
)
@click.option(
    "--tokenizer",
    "text",
    metavar="byte|v4|FILE",
    help="byte, v4 (DeepSeek-V4's), or a tokenizer.json. If not said: the folder's own tokenizer.json; else "
    "v4 where the vocabulary is V4's, and byte where it is not.",
)
@click.option("--prompt", help="The text to go on from.")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="A file with it; - is the standard input, which is read too if no prompt is given.",
)
@click.option(
    "--batch",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of prompts, one a line, that are worked on together.",
)
@click.option(
    "--max-new",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="The most tokens of an answer.",
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0: always the most likely token."
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    metavar="P",
    help="Only the likeliest tokens that have this probability together.",
)
@click.option("--top-k", type=int, metavar="K", help="Only the K likeliest tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling, and of --random-weights.")
@click.option(
    "--batch-invariant", is_flag=True, help="The same bits for a prompt whatever else is in its batch. Slower."
)
@click.option(
    "--prefixes",
    "address",
    metavar="ADDRESS",
    help="A KV-cache service (emberline kv serve) that keeps pages of prompts, for others that begin alike.",
)
@click.option(
    "--windows",
    default="full",
    show_default=True,
    metavar="full|periodic:N|zero",
    help="With --prefixes: what is kept of V4's windows. At every page, every N tokens, or nothing.",
)
@click.option("--stream/--no-stream", default=True, show_default=True, help="Print text as it comes, or when it ends.")
@json_option  # fmt: skip
def generate(
    name: str,
    random_weights: bool,
    dtype: str,
    text: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    batch: Path | None,
    max_new: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int,
    batch_invariant: bool,
    address: str | None,
    windows: str,
    stream: bool,
    as_json: bool,
) -> None:
    """Go on from a prompt, token by token.

    Text goes to the standard output, timings to the standard error. --json prints one object for each prompt: ids,
    text, why it ended, how many tokens came from disk, and timings in seconds.

    \b
    Examples:
      emberline generate --model tiny --random-weights --prompt "Once upon a time"
      emberline generate --model ./checkpoint --prompt-file question.txt --temperature 0.7 --top-p 0.95 --seed 1
      cat notes.txt | emberline generate --model ./checkpoint --max-new 400
      emberline generate --model ./checkpoint --batch prompts.txt --json > answers.jsonl
      emberline generate --model ./checkpoint --prompt-file book.txt --prefixes 127.0.0.1:7400
    """
    prompts = _prompts(prompt, prompt_file, batch)
    shape = config_of(name)
    begin_s = time.perf_counter()
    with note_if_slow(f"loading {name} ..."):
        tokenizer = _tokenizer(text, name, shape)
        model = _model(name, shape, dtype, seed if random_weights else None)
    loaded_s = time.perf_counter() - begin_s
    from embertrain.engine import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    encoded = [tokenizer.encode(each) for each in prompts]
    engine = _engine(model, [len(ids) + max_new for ids in encoded], batch_invariant, address, windows)
    answers = _submit(engine, prompts, encoded, sampling, max_new, tokenizer.stop_ids)
    try:
        if as_json:
            for answer in _ended(engine, answers):
                print_json(_fields(answer, tokenizer, loaded_s))
        else:
            for answer in answers:
                _print(engine, answers, answer, tokenizer, stream)
            note(_told(answers, loaded_s, address))
    except KeyboardInterrupt:
        if not as_json:
            click.echo()
        raise
    finally:
        engine.close()


@dataclass(slots=True)
class _Answer:
    """A request, and when what came of it."""

    prompt: str
    request: Request
    begin_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    end_s: float | None = None

    def seconds(self) -> dict[str, float | None]:
        """To the first token, and to the last one."""
        first = None if self.first_s is None else self.first_s - self.begin_s
        return {"first": first, "whole": None if self.end_s is None else self.end_s - self.begin_s}


def _prompts(prompt: str | None, prompt_file: Path | None, batch: Path | None) -> list[str]:
    given = [name for name, value in [("--prompt", prompt), ("--prompt-file", prompt_file), ("--batch", batch)]
             if value is not None]  # fmt: skip
    if len(given) > 1:
        raise click.UsageError(f"give one of {', '.join(given)}")
    if batch is not None:
        lines = [line for line in batch.read_text(encoding="utf-8").split("\n") if line]
        if not lines:
            raise click.ClickException(f"{batch} holds no prompt")
        return lines
    if prompt_file is not None and str(prompt_file) != "-":
        prompt = prompt_file.read_text(encoding="utf-8")
    elif prompt is None:
        if sys.stdin.isatty() and prompt_file is None:
            raise click.UsageError("what to go on from? --prompt, --prompt-file, --batch, or the standard input")
        prompt = sys.stdin.buffer.read().decode("utf-8")
    if not prompt:
        raise click.UsageError("the prompt is empty")
    return [prompt]


def _tokenizer(text: str | None, name: str, shape: ModelConfig) -> Tokenizer:
    from embertrain.engine.tokenizers import V4_VOCABULARY, fit, load_tokenizer

    beside = Path(name) / "tokenizer.json"
    if text is None and beside.exists():
        text = str(beside)
    if text is None:
        text = "v4" if shape.vocab_size == V4_VOCABULARY else "byte"
    tokenizer = load_tokenizer(text)
    fit(tokenizer, shape.vocab_size)
    return tokenizer


def _model(name: str, shape: ModelConfig, dtype: str, seed: int | None) -> Model:
    """With weights from its folder, or random ones if there is a seed."""
    if seed is None and not Path(name).is_dir():
        raise click.UsageError(f"{name} has no weights: give a folder that has, or --random-weights")
    import torch
    from embertrain.model.model import Model
    from embertrain.weights import load

    kind = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    if seed is not None:
        model = Model(shape, mtp=False)
        model.reset_parameters(torch.Generator().manual_seed(seed))
        return model.cast(kind)
    with torch.device("meta"):
        model = Model(shape, mtp=False).cast(kind)
    load(model, name, config=shape, partial=True)
    return model


def _engine(model: Model, counts: list[int], batch_invariant: bool, address: str | None, windows: str) -> Engine:
    """As large as these many tokens need."""
    from embertrain.cache.spec import PAGE_TOKENS
    from embertrain.engine import Engine, EngineConfig

    sequences = min(len(counts), SEQUENCES_MAX)
    largest = [min(count, model.config.positions_max) for count in sorted(counts, reverse=True)[:sequences]]
    pages = sum(-(-count // PAGE_TOKENS) for count in largest)
    config = EngineConfig(sequences=sequences, pages=pages, batch_invariant=batch_invariant)
    prefixes = None
    if address is not None:
        from embertrain.prefix import Prefixes

        prefixes = Prefixes(address, windows=windows)
    return Engine(model, config=config, prefixes=prefixes)


def _submit(
    engine: Engine,
    prompts: list[str],
    encoded: list[list[int]],
    sampling: Sampling,
    max_new: int,
    stop_ids: tuple[int, ...],
) -> list[_Answer]:
    answers = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        request = engine.submit(ids, sampling, max_new_tokens=max_new, stop_ids=stop_ids)
        answers.append(_Answer(prompt, request))
    return answers


def _step(engine: Engine, answers: list[_Answer]) -> None:
    """One step of the engine, and the time of what came of it."""
    engine.step()
    now_s = time.perf_counter()
    for answer in answers:
        if answer.request.new_ids and answer.first_s is None:
            answer.first_s = now_s
        if answer.request.finish is not None and answer.end_s is None:
            answer.end_s = now_s


def _ended(engine: Engine, answers: list[_Answer]) -> Iterator[_Answer]:
    """The answers in order, each when it has ended."""
    for answer in answers:
        while answer.request.finish is None:
            _step(engine, answers)
        yield answer


def _print(engine: Engine, answers: list[_Answer], answer: _Answer, tokenizer: Tokenizer, stream: bool) -> None:
    """One answer's text; what others get meanwhile waits for its turn."""
    from embertrain.engine.tokenizers import TextStream

    if len(answers) > 1:
        click.echo(safe(f"--- {answer.request.number + 1}: {answer.prompt[:60]}", terminal=True))
    request, text = answer.request, TextStream(tokenizer)
    given = 0
    while request.finish is None or given < len(request.new_ids):
        if given == len(request.new_ids) or (request.finish is None and not stream):
            _step(engine, answers)
            continue
        _echo(text.push(request.new_ids[given]))
        given += 1
    _echo(text.end())
    click.echo()


def _echo(text: str) -> None:
    """What a model writes does not command a terminal."""
    if text:
        click.echo("\n".join(safe(line) for line in text.split("\n")), nl=False)
        sys.stdout.flush()


def _fields(answer: _Answer, tokenizer: Tokenizer, loaded_s: float) -> dict[str, Any]:
    request = answer.request
    return {
        "prompt": answer.prompt,
        "prompt_ids": request.prompt_ids,
        "ids": request.new_ids,
        "text": tokenizer.decode(request.new_ids),
        "finish": request.finish,
        "cached_tokens": request.cached_tokens,
        "seconds": {"load": loaded_s, **answer.seconds()},
    }


def _told(answers: list[_Answer], loaded_s: float, address: str | None) -> str:
    begin_s = answers[0].begin_s
    first_s = min(a.first_s for a in answers if a.first_s is not None) - begin_s
    whole_s = max(a.end_s for a in answers if a.end_s is not None) - begin_s
    count = sum(len(a.request.new_ids) for a in answers)
    after = count - 1
    rate = f", then {after / (whole_s - first_s):,.1f} tokens/s" if after and whole_s > first_s else ""
    told = f"loaded in {loaded_s:.1f} s, first token after {first_s:.2f} s{rate}; {plural(count, 'token')}"
    if address is None:
        return told
    prompts = sum(len(a.request.prompt_ids) for a in answers)
    return f"{told}; from disk {sum(a.request.cached_tokens for a in answers):,} of the prompts' {prompts:,}"
