"""`emberline kv size` and `kv simulate` as a user meets them. Run: pytest tests/kvcache/test_cli_kv.py"""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from emberkv.trace import trace_lines

from tests.fs.cli_run import emberline, emberline_json
from tests.kvcache.traces import CONVERSATIONS, chat_requests


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"".join(trace_lines(chat_requests(seed=7))))
    return path


# ---- size


def test_size_turns_a_rate_into_hours() -> None:
    text = emberline("kv", "size", "deepseek-v3", "--capacity", "100TiB", "--tokens-per-s", "1e6").stdout
    assert "70,272 bytes" in text
    assert "4.3 MiB, 64 tokens" in text
    assert "0.4 hours at 1,000,000 new tokens a second" in text
    (fields,) = emberline_json("kv", "size", "deepseek-v3", "--capacity", "100TiB", "--tokens-per-s", "1e6")
    assert fields["kept_hours"] == pytest.approx(100 * 2**40 / 70_272 / 1e6 / 3600)
    assert (fields["dtype"], fields["page_bytes"]) == ("bf16", 4_497_408)


def test_size_counts_window_states_by_their_interval() -> None:
    (fields,) = emberline_json("kv", "size", "deepseek-v4-flash", "--interval", "4096", "--capacity", "1GiB")
    assert set(fields["parts"]) == {"c4", "c4_indexer", "c128"}
    assert fields["state_bytes_per_token"] == fields["state_bytes"] / 4096
    assert fields["capacity_tokens"] == int(2**30 / (fields["bytes_per_token"] + fields["state_bytes_per_token"]))
    assert "3.1 MiB at each place" in emberline("kv", "size", "deepseek-v4-flash").stdout


def test_size_tells_what_a_day_writes() -> None:
    (fields,) = emberline_json("kv", "size", "deepseek-v4.1-flash", "--tokens-per-s", 1e6)
    assert fields["day_bytes"] == pytest.approx(890 * 1e6 * 86_400)
    assert "69.9 TiB at 1,000,000" in emberline("kv", "size", "deepseek-v4.1-flash", "--tokens-per-s", 1e6).stdout


def test_size_reads_a_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
              "hidden_size": 4096}  # fmt: skip
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "config.json"
    path.write_text(json.dumps(config))
    for name in (path, path.parent):
        (fields,) = emberline_json("kv", "size", name, "--dtype", "fp8")
        assert (fields["model"], fields["bytes_per_token"]) == ("mine", 65_536)
    path.write_text("{")
    assert "is no config of a model" in emberline("kv", "size", path, code=1).stderr


def test_size_says_which_models_there_are() -> None:
    assert "none of deepseek-v3, " in emberline("kv", "size", "gpt-2", code=1).stderr
    assert "a number with one of the units" in emberline("kv", "size", "kimi-k2", "--capacity", "big", code=2).stderr


# ---- simulate


def test_simulate_shows_a_curve(trace: Path) -> None:
    head, _, table = emberline("kv", "simulate", trace, "--policy", "lru", "--policy", "s3fifo").stdout.partition(
        "\n\n"
    )
    assert "400 requests" in head
    assert "without end" in head
    columns, *rows = table.splitlines()
    assert columns.split() == ["policy", "pages", "page", "hits", "token", "hits", "written", "evicted"]
    assert {row.split()[0] for row in rows} == {"lru", "s3fifo"}


def test_simulate_as_json(trace: Path) -> None:
    (told,) = emberline_json(
        "kv", "simulate", trace, "--capacity", "100", "--capacity", "1,000", "--policy", "fifo", "--units", "--replay",
        "--model", "deepseek-v4-flash", "--price-miss", "2", "--price-hit", "0.5",
    )  # fmt: skip
    assert told["trace"]["requests"] == 400
    assert [(row["policy"], row["capacity"]) for row in told["curve"]] == [("fifo", 100), ("fifo", 1000)]
    end = told["infinite"]
    assert end["capacity"] is None
    assert end["page_rate"] == end["hit_pages"] / end["pages"]
    assert end["saved_money"] == pytest.approx(end["hit_tokens"] / 1e6 * 1.5)
    assert 0 < end["saved_flops_share"] < 1
    assert told["units"]["states"] < told["units"]["stored_pages"]
    assert told["replay"]["states"] == 0
    assert told["replay"]["recomputed_tokens"] > 0


def test_simulate_shows_what_is_saved(trace: Path) -> None:
    text = emberline("kv", "simulate", trace, "--model", "deepseek-v3", "--units", "--price-miss", "0.5").stdout
    for told in ("prefill FLOPs", "in money", "it holds", "a page", "states of", "saved flops share", "size"):
        assert told in text


def test_a_size_is_pages_of_a_model(trace: Path) -> None:
    (told,) = emberline_json("kv", "simulate", trace, "--model", "deepseek-v3", "--capacity", "1GiB")
    assert told["curve"][0]["capacity"] == 2**30 // 35_979_264
    assert "say of which --model" in emberline("kv", "simulate", trace, "--capacity", "1GiB", code=2).stderr


def test_simulate_draws_the_curve(trace: Path, tmp_path: Path) -> None:
    svg, html = tmp_path / "curve.svg", tmp_path / "curve.html"
    emberline("kv", "simulate", trace, "--plot", svg, "--policy", "lru", "--policy", "fifo", "--capacity", "50",
              "--capacity", "500")  # fmt: skip
    drawn = ElementTree.fromstring(svg.read_text())
    assert len(drawn.findall(".//{*}circle")) == 4
    assert "no end" in "".join(drawn.itertext())
    emberline("kv", "simulate", trace, "--plot", html, "--capacity", "50")
    page = html.read_text()
    assert "<td>no end</td>" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert ".svg or .html" in emberline("kv", "simulate", trace, "--plot", "curve.png", code=2).stderr


def test_simulate_names_the_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}\n')
    assert "line 1: 9 tokens are 1 pages of 512" in emberline("kv", "simulate", path, code=1).stderr


def test_simulate_reads_the_standard_input(trace: Path) -> None:
    result = emberline("kv", "simulate", "-", "--json", stdin=trace.read_bytes())
    assert json.loads(result.stdout)["trace"]["requests"] == 400


def test_simulate_tells_the_published_figures() -> None:
    if not CONVERSATIONS.exists():
        pytest.skip("the conversation trace is not beside the repository")
    text = emberline("kv", "simulate", CONVERSATIONS, "--units", "--no-common").stdout
    assert "36.64% of pages and 37.36% of tokens hit" in text
    assert "35.52% of pages hit, of 36.60%" in text
    assert "states of 17,561 of 170,899 pages" in text
