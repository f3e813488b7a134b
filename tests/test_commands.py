"""The commands as a user runs them: output, exit status, and one message for a mistake."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


# -P: the installed package, not the source tree that the tests may be started from.
LOCALDS = [sys.executable, "-P", "-m", "localds"]


def run(*words: object, piped: bytes = b"", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [*LOCALDS, *map(str, words)]
    done = subprocess.run(
        command, input=piped, capture_output=True, timeout=120, env=os.environ | variables
    )
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def fails(done: subprocess.CompletedProcess[str], status: int, message: str) -> None:
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_lists_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("chat", "list", "pull", "rm", "inspect", "bench", "imatrix", "eval"):
        assert command in done.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = {"numpy", "rich", "jinja2", "huggingface_hub", "platformdirs"}
    code = f"import sys, localds.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    assert run("--version").stdout.startswith("localds 0.")


def test_chat_prints_the_answer_alone(tiny_model: Path) -> None:
    done = run("chat", tiny_model, "-p", "hello", "-n", 8, "--temp", 0)
    assert done.returncode == 0, done.stderr
    assert "reply 8 tokens" in done.stderr
    assert "reply" not in done.stdout
    again = run("chat", tiny_model, "-p", "hello", "-n", 8, "--temp", 0, "--threads", 1)
    assert again.stdout == done.stdout


def test_chat_reads_piped_input(tiny_model: Path) -> None:
    together = run("chat", tiny_model, "-p", "sum:\n\none two", "-n", 4, "--temp", 0)
    assert together.stdout.strip(), together.stderr
    piped = run("chat", tiny_model, "-p", "sum:", "-n", 4, "--temp", 0, piped=b"one two\n")
    assert piped.stdout == together.stdout
    alone = run("chat", tiny_model, "-n", 4, "--temp", 0, piped=b"sum:\n\none two\n")
    assert alone.stdout == together.stdout


def test_chat_raw_continues_the_text(tiny_model: Path) -> None:
    import localds

    with localds.load(tiny_model) as model:
        pieces = model.session().generate("the cat", max_tokens=6)
        expected = "".join(map(str, pieces))
    done = run("chat", tiny_model, "--raw", "-p", "the cat", "-n", 6, "--temp", 0)
    assert done.stdout == expected + "\n"


def test_inspect_text_and_json_agree_with_the_file(tiny_model: Path) -> None:
    text = run("inspect", tiny_model)
    assert text.returncode == 0, text.stderr
    assert "routed experts" in text.stdout
    report = json.loads(run("inspect", tiny_model, "--json", "-c", 100).stdout)
    assert report["layers"] == 3
    assert report["experts"] == 8
    assert sum(report["parts"].values()) == sum(t["bytes"] for t in report["types"].values())
    # kv_lora_rank 48 + rope 16, three layers, two bytes; four heads of 32 + 16 + 24 expanded.
    assert report["cache"]["bytes_per_token"] == 3 * 64 * 2
    assert report["cache"]["times_smaller"] == pytest.approx(4 * 72 / 64)
    assert report["memory"]["context"] == 100


def test_inspect_check_finds_non_finite_weights(tiny_model: Path, tmp_path: Path) -> None:
    assert run("inspect", tiny_model, "--check").returncode == 0
    broken = tmp_path / "broken.gguf"
    data = bytearray(tiny_model.read_bytes())
    data[-64:-60] = b"\x00\x00\xc0\x7f"
    broken.write_bytes(data)
    done = run("inspect", broken, "--check")
    assert done.returncode == 1
    assert "non-finite" in done.stderr


def test_bench_takes_lists_in_every_spelling(tiny_model: Path) -> None:
    def depths(*words: object) -> list[int]:
        done = run("bench", *words, "-p", 0, "-n", 1, "-r", 1, "--json")
        assert done.returncode == 0, done.stderr
        return [r["n_depth"] for r in json.loads(done.stdout)]

    assert depths(tiny_model, "-d", 0, 4) == [0, 4]
    assert depths(tiny_model, "-d", "0,4") == [0, 4]
    assert depths("--depth", 0, "--depth", 4, "-t", 1, tiny_model) == [0, 4]


def test_bench_measures_every_depth(tiny_model: Path) -> None:
    done = run("bench", tiny_model, "-p", 8, "-n", 2, "-d", 0, 16, "-r", 2, "--json", "-t", 1)
    records = json.loads(done.stdout)
    keys = [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in records]
    assert keys == [(8, 0, 0), (0, 2, 0), (8, 0, 16), (0, 2, 16)]
    for record in records:
        assert len(record["samples_ts"]) == 2
        assert record["avg_ts"] == pytest.approx(sum(record["samples_ts"]) / 2)
        assert record["threads"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect"], "Missing argument"),
        (["chat", "x.gguf", "--temp", "hot"], "Invalid value"),
        (["chat", "x.gguf", "--logit-bias", "five"], "write a token id and a number"),
        (["bench", "x.gguf", "-p", "many"], "Invalid value"),
        (["bench", "x.gguf", "-p"], "requires an argument"),
        (["brew"], "No such command"),
    ],
)
def test_usage_errors_exit_with_2(words: list[str], message: str) -> None:
    fails(run(*words), 2, message)


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    for command in (["chat", "-p", "x"], ["inspect"], ["bench"]):
        done = run(command[0], tmp_path / "no.gguf", *command[1:])
        fails(done, 1, "no.gguf")
        assert done.stderr.count("\n") == 1


def test_a_truncated_file_is_one_message(tiny_model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model.read_bytes()[:-1000])
    fails(run("chat", cut, "-p", "x"), 1, "cut.gguf")


def test_wrong_values_are_one_message(tiny_model: Path) -> None:
    fails(run("chat", tiny_model, "-p", "x" * 50, "-c", 20), 1, "choose a larger context")
    fails(run("chat", tiny_model, "-p", "x", "-c", 10**9), 1, "made for at most")
    fails(run("chat", tiny_model, "-p", "x", "--cache-type", "q3"), 1, "cache type 'q3'")
    fails(run("chat", tiny_model, "-p", "x", "--ram", "1MiB"), 1, "the budget is 1 MiB")
    fails(run("chat", tiny_model, "-p", "x", LOCALDS_ISA="vax"), 1, "vax")
    fails(run("bench", tiny_model, LOCALDS_ISA="vax"), 1, "vax")


def test_interrupt_ends_a_reply_and_keeps_what_was_said(tiny_model: Path) -> None:
    command = [*LOCALDS, "chat", str(tiny_model), "-p", "go", "-t", "1"]
    # Without the tokens that end a reply it goes on until it is told to stop.
    command += [word for token in range(3) for word in ("--logit-bias", f"{token}=-inf")]
    with subprocess.Popen(
        [*command, "-c", "20000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run in the background of a shell inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        errors = process.stderr.read().decode()
        assert process.wait(timeout=10) == 130
        assert time.monotonic() - started < 5
    assert "Traceback" not in errors
    assert "reply" in errors


def test_a_closed_pipe_is_quiet(tiny_model: Path) -> None:
    chat = shlex.join([*LOCALDS, "chat", str(tiny_model), "-p", "go", "-n", "500"])
    command = f"{chat} | head -c 1 | wc -c"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1"
    assert "Traceback" not in done.stderr
