"""`localds pull` as a user runs it: interrupted, killed, twice at once, and without a network."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from fake_hub import COMMIT, closed_port, sha256
from hub_home import FILES, PARTS, REPOSITORY, SMALL, blobs, install
from huggingface_hub import scan_cache_dir

if TYPE_CHECKING:
    from pathlib import Path

    from fake_hub import FakeHub

pytestmark = pytest.mark.usefixtures("home")
LOCALDS = [sys.executable, "-P", "-m", "localds"]
DATA = FILES[SMALL]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LOCALDS, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        env=os.environ | variables,
    )


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LOCALDS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def fails(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 1, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def part_file(home: Path, name: str = SMALL) -> Path:
    folder = home / "hf/hub/models--owner--Tiny-Chat-GGUF/blobs"
    return folder / f"{sha256(FILES[name])}.localds-part"


def wait_for(file: Path, size: int) -> None:
    """Until the file has that many bytes."""
    for _ in range(1000):
        if file.exists() and file.stat().st_size >= size:
            return
        time.sleep(0.02)
    raise AssertionError(f"{file} does not grow to {size} bytes")


def asked(hub: FakeHub, name: str = SMALL) -> list[str | None]:
    return [word for kind, path, word in hub.requests if kind == "GET" and path.endswith(name)]


def test_pull_says_where_it_is_and_how_to_chat(model_hub: FakeHub, home: Path) -> None:
    done = run("pull", "tiny")
    assert done.returncode == 0, done.stderr
    path = home / f"hf/hub/models--owner--Tiny-Chat-GGUF/snapshots/{COMMIT}/{SMALL}"
    assert done.stdout == f"{path}: 2.86 MiB; chat with it: localds chat tiny\n"
    assert path.read_bytes() == DATA
    assert run("pull", "TINY:q4_k_m").stdout.endswith("localds chat tiny:Q4_K_M\n")
    assert len(asked(model_hub)) == 1
    other = run("pull", REPOSITORY)
    assert other.stdout.endswith(f"localds chat {REPOSITORY}:Q4_K_M\n")


def test_dry_run(model_hub: FakeHub, home: Path) -> None:
    done = run("pull", "tiny:Q8_0", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert blobs(home) == []
    assert model_hub.downloaded() == []
    for name in PARTS:
        assert name in done.stdout
    assert "to download  1.14 MiB of 1.14 MiB" in done.stdout
    assert f"snapshots/{COMMIT}" in done.stdout
    assert "free there" in done.stdout
    part_file(home).parent.mkdir(parents=True)
    part_file(home).write_bytes(DATA[: 1 << 20])
    install(home, REPOSITORY, {PARTS[0]: FILES[PARTS[0]]}, COMMIT)
    assert f"{SMALL}: 2.86 MiB, 1 MiB are here" in run("pull", "tiny", "--dry-run").stdout
    parts = run("pull", "tiny:Q8_0", "--dry-run").stdout
    assert f"{PARTS[0]}: 391 KiB, is here\n" in parts
    assert "to download  781 KiB of 1.14 MiB" in parts


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_the_middle(model_hub: FakeHub, home: Path, kind: signal.Signals) -> None:
    model_hub.hold = {SMALL: 1_400_000}
    with start("pull", "tiny") as process:
        wait_for(part_file(home), 1_300_000)
        process.send_signal(kind)
        output, errors = process.communicate(timeout=20)
    assert output == ""
    assert "Traceback" not in errors
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    if kind == signal.SIGINT:
        assert "the same command goes on where it was" in errors
    kept = part_file(home).stat().st_size
    assert DATA.startswith(part_file(home).read_bytes())
    assert blobs(home) == [part_file(home)]
    assert "none yet" in run("list").stdout
    assert not scan_cache_dir(home / "hf/hub").warnings
    model_hub.hold = {}
    model_hub.requests.clear()
    model_hub.sent.clear()
    done = run("pull", "tiny")
    assert done.returncode == 0, done.stderr
    assert asked(model_hub) == [f"bytes={kept}-"]
    assert model_hub.sent[SMALL] == len(DATA) - kept
    assert "of it are here" in done.stderr
    assert [blob.read_bytes() for blob in blobs(home)] == [DATA]


def test_stopped_between_parts(model_hub: FakeHub, home: Path) -> None:
    model_hub.hold = {PARTS[2]: 100_000}
    with start("pull", "tiny:Q8_0") as process:
        wait_for(part_file(home, PARTS[2]), 90_000)
        process.kill()
    assert "none yet" in run("list").stdout
    model_hub.hold = {}
    model_hub.requests.clear()
    assert run("pull", "tiny:Q8_0").returncode == 0
    assert model_hub.downloaded() == [PARTS[2]]


def test_two_at_once(model_hub: FakeHub, home: Path) -> None:
    model_hub.hold = {SMALL: 1_400_000}
    with start("pull", "tiny") as first:
        wait_for(part_file(home), 1_300_000)
        with start("pull", "tiny") as second:
            assert second.stderr
            lines = [second.stderr.readline(), second.stderr.readline()]
            assert "another program is downloading it; waiting" in lines[1]
            model_hub.go.set()
            results = [first.communicate(timeout=20), second.communicate(timeout=20)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert results[0][0] == results[1][0]
    assert asked(model_hub) == [None]
    assert [blob.read_bytes() for blob in blobs(home)] == [DATA]


def test_the_second_goes_on_when_the_first_is_killed(model_hub: FakeHub, home: Path) -> None:
    model_hub.hold = {SMALL: 1_400_000}
    with start("pull", "tiny") as first:
        wait_for(part_file(home), 1_300_000)
        with start("pull", "tiny") as second:
            assert second.stderr
            for _ in range(2):
                second.stderr.readline()
            first.kill()
            first.wait()
            model_hub.go.set()
            assert second.communicate(timeout=20)[0]
    assert second.returncode == 0
    assert len(asked(model_hub)) == 2
    assert str(asked(model_hub)[1]).startswith("bytes=1")


def test_wrong_hash(model_hub: FakeHub, home: Path) -> None:
    model_hub.changed = {SMALL: bytes(len(DATA))}
    fails(run("pull", "tiny"), "does not have the hash that the hub states, and was removed")
    assert blobs(home) == []
    assert "none yet" in run("list").stdout


def test_errors_are_one_message(model_hub: FakeHub) -> None:
    fails(run("pull", "tinny"), "did you mean tiny?")
    fails(run("pull", "tiny:Q5_K_M"), "only Q4_K_M, Q8_0")
    fails(run("pull", f"{REPOSITORY}:Q6_K"), "no 'Q6_K'; add one of these after a colon: Q8_0")
    fails(run("pull", "owner/nothing"), "check the spelling")
    model_hub.denial = (403, "GatedRepo")
    fails(run("pull", "tiny"), "accept the terms on")
    model_hub.denial = None
    model_hub.busy = [(429, {"Retry-After": "300"})]
    fails(run("pull", "tiny"), "try again in 5 minutes")


def test_offline(model_hub: FakeHub) -> None:
    fails(run("pull", "tiny", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")
    nowhere = f"http://127.0.0.1:{closed_port()}"
    fails(run("pull", "tiny", HF_ENDPOINT=nowhere), f"cannot reach {nowhere}")
    assert model_hub.requests == []
    pulled = run("pull", "tiny")
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": nowhere}):
        again = run("pull", "tiny", **variables)
        assert again.returncode == 0
        assert again.stdout.split(";")[0] == pulled.stdout.split(";")[0]
        fails(run("pull", "tiny:Q8_0", **variables), REPOSITORY)


def test_environment(model_hub: FakeHub, tmp_path: Path) -> None:
    elsewhere = {"HF_HOME": str(tmp_path / "elsewhere"), "HF_TOKEN": "hf_secret"}
    done = run("pull", "tiny", **elsewhere)
    assert done.stdout.startswith(str(tmp_path / "elsewhere" / "hub"))
    assert model_hub.tokens == {"Bearer hf_secret"}
    done = run("pull", "tiny", HF_HUB_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith(str(tmp_path / "cache"))


def test_on_a_terminal_there_is_a_bar(model_hub: FakeHub, home: Path) -> None:
    model_hub.hold = {SMALL: 1_400_000}
    outer, inner = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(outer, 65536):
                shown.extend(data)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    command = [*LOCALDS, "pull", "tiny"]
    with subprocess.Popen(
        command, stderr=inner, stdout=subprocess.PIPE, env=environment
    ) as process:
        os.close(inner)
        wait_for(part_file(home), 1_300_000)
        time.sleep(0.3)
        model_hub.go.set()
        process.wait(timeout=20)
    reader.join()
    os.close(outer)
    assert process.returncode == 0
    assert b"Downloading" in shown
    assert b"MiB" in shown
    assert max(len(line) for line in shown.decode(errors="replace").split("\r")) < 400
