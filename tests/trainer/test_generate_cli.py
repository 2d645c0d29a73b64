"""`emberline generate`: text, JSON, batches, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from embertrain.engine import Engine, Token
from embertrain.engine.tokenizers import ByteTokenizer
from embertrain.model.model import Model
from embertrain.model.presets import preset
from embertrain.weights import save

from emberline.cli import main

from . import oracle
from .prefix_lab import serving


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, ["generate", *arguments], input=text)


RANDOM = ["--model", "micro", "--random-weights"]


def random_model(*arguments: str, text: str | None = None) -> Result:
    return run(*RANDOM, *arguments, text=text)


def test_text_and_json_are_the_same_answer() -> None:
    shown = random_model("--prompt", "hello", "--max-new", "9")
    assert shown.exit_code == 0 and "first token after" in shown.stderr
    told = json.loads(random_model("--prompt", "hello", "--max-new", "9", "--json").stdout)
    assert told["prompt_ids"] == list(b"hello") and len(told["ids"]) == 9 and told["finish"] == "length"
    assert told["text"] == ByteTokenizer().decode(told["ids"]) == shown.stdout[:-1]
    assert told["seconds"].keys() == {"load", "first", "whole"}
    for other in (["--no-stream"], ["--stream"], ["--batch-invariant"]):
        assert random_model("--prompt", "hello", "--max-new", "9", *other).stdout == shown.stdout


def test_a_prompt_comes_from_a_file_or_from_the_standard_input(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello")
    want = random_model("--prompt", "hello", "--max-new", "4").stdout
    assert random_model("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new", "4").stdout == want
    assert random_model("--prompt-file", "-", "--max-new", "4", text="hello").stdout == want
    assert random_model("--max-new", "4", text="hello").stdout == want


def test_a_batch_gives_every_prompt_its_own_answer(tmp_path: Path) -> None:
    prompts = [f"prompt number {i}" * (i + 1) for i in range(10)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    sampled = [
        "--temperature",
        "0.8",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--seed",
        "3",
        "--max-new",
        "5",
        "--dtype",
        "f32",
    ]
    out = random_model("--batch", str(tmp_path / "prompts.txt"), "--json", *sampled).stdout
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["prompt"] for a in answers] == prompts
    alone = json.loads(random_model("--prompt", prompts[7], "--json", *sampled).stdout)
    assert alone["ids"] == answers[7]["ids"]
    text = random_model("--batch", str(tmp_path / "prompts.txt"), *sampled).stdout
    assert [line for line in text.splitlines() if line.startswith("--- ")][1] == f"--- 2: {prompts[1]}"


def test_a_folder_of_weights(tmp_path: Path) -> None:
    model = Model(preset("micro-v3"))
    oracle.randomise(model, 3)
    save(model, tmp_path, model.config)
    answer = json.loads(
        run("--model", str(tmp_path), "--dtype", "f32", "--prompt", "hi", "--max-new", "6", "--json").stdout
    )
    expected = Engine(model).generate([list(b"hi")], max_new_tokens=6)[0]
    assert answer["ids"] == expected.new_ids


def test_ctrl_c_ends_the_line_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [0], Engine.step

    def interrupted(engine: Engine) -> list[Token]:
        steps[0] += 1
        if steps[0] == 4:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    result = random_model("--prompt", "hello")
    assert result.exit_code == 130 and result.stderr.endswith("interrupted\n")
    assert result.stdout.endswith("\n") and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "micro", "--prompt", "x"], "micro has no weights: give a folder that has, or --random-weights"),
        (["--model", "nothing", "--prompt", "x"], "nothing is neither a file, nor a folder with a config.json"),
        ([*RANDOM, "--prompt", ""], "the prompt is empty"),
        ([*RANDOM, "--prompt", "x", "--prompt-file", "-"], "give one of --prompt"),
        ([*RANDOM, "--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        ([*RANDOM, "--prompt", "x", "--tokenizer", "v4"], "the tokenizer has 129,280"),
        ([*RANDOM, "--prompt", "x", "--max-new", "1048576"], "are more than the"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code in (1, 2) and message in result.stderr and "Traceback" not in result.output


def test_what_a_model_writes_does_not_command_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from emberline import generate

    told: list[str] = []
    monkeypatch.setattr("emberline.generate.click.echo", lambda text, nl: told.append(text))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    generate._echo("a\x1b[31m\nb")
    assert told == ["a\\x1b[31m\nb"]


def test_a_prompt_that_begins_alike_comes_from_disk(tmp_path: Path) -> None:
    prompt, more = "the same words again and again; " * 10, ["--max-new", "4", "--batch-invariant"]
    want = random_model("--prompt", prompt, *more).stdout
    with serving(tmp_path) as service:
        for windows, cached in (("full", [0, 256]), ("zero", [0, 0])):  # zero: as many would be computed again
            found = ["--prefixes", service.address, "--windows", windows]
            for tokens in cached:
                shown = random_model("--prompt", prompt, *more, *found)
                assert shown.stdout == want and f"from disk {tokens} of the prompts' 320" in shown.stderr
        told = json.loads(random_model("--prompt", prompt, *more, "--prefixes", service.address, "--json").stdout)
        assert told["cached_tokens"] == 256
        wrong = random_model("--prompt", prompt, "--prefixes", service.address, "--windows", "half")
        assert wrong.exit_code == 1 and 'windows: "full", "zero", or' in wrong.stderr


def test_random_weights_are_the_seeds() -> None:
    a, b = (random_model("--prompt", "x", "--max-new", "8", "--seed", seed).stdout for seed in "12")
    assert a != b and a == random_model("--prompt", "x", "--max-new", "8", "--seed", "1").stdout
    assert torch.is_grad_enabled()
