"""What is installed, what a name means then, which model is the default, and removing one."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_hub import sha256
from hub_home import FILES, PARTS, REPOSITORY, SMALL, blobs, install
from huggingface_hub import scan_cache_dir

import localds
from localds import settings
from localds.catalog import resolve
from localds.catalog.installed import find_installed
from localds.catalog.known import SUGGESTION, RegistryError, known_models
from localds.catalog.names import UnknownModelError, UnknownQuantError
from localds.catalog.resolve import Found, How, NotInstalledError, find_model
from localds.hub.cache import lock_file
from localds.settings import LastUsed, last_used, remember
from localds.units import format_size

if TYPE_CHECKING:
    from localds.model import Model

LOCALDS = [sys.executable, "-P", "-m", "localds"]
Q4 = {SMALL: FILES[SMALL]}
Q8 = {name: FILES[name] for name in PARTS}
OTHER = "some.one/Other_Model-GGUF"


def run(*words: str, piped: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LOCALDS, *words],
        capture_output=True,
        text=True,
        input=piped or "",
        timeout=60,
        env=os.environ | more,
    )


def fails(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 1, done.stderr
    assert message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.fixture
def installed(home: Path, tiny_model: Path) -> Path:
    """The known model's default quant, which can really be loaded."""
    install(home, REPOSITORY, {SMALL: tiny_model.read_bytes()})
    return home


@pytest.fixture
def demo(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built-in model."""
    path = tmp_path / "demo.gguf"
    path.write_bytes(tiny_model.read_bytes())
    monkeypatch.setattr(resolve, "DEMO", path)
    return path


def test_nothing_is_installed(home: Path) -> None:
    assert find_installed() == []
    (home / "hf" / "hub").mkdir(parents=True)
    (home / "hf" / "hub" / "models--a--b").write_bytes(b"")
    (home / "hf" / "hub" / "models--c--d" / "snapshots" / "e").mkdir(parents=True)
    assert find_installed() == []


def test_whole_files_of_any_repository(home: Path) -> None:
    snapshot = install(home, REPOSITORY, FILES)
    other = install(home, OTHER, {"sub/Other.i1-IQ4_XS.gguf": b"1", "x.safetensors": b"2"})
    found = {model.name: model for model in find_installed()}
    assert list(found) == [
        "tiny:Q8_0",
        f"{REPOSITORY}:Q2_K",
        "tiny:Q4_K_M",
        f"{OTHER}:IQ4_XS",
    ]
    assert found["tiny:Q8_0"].path == snapshot / PARTS[0]
    assert found["tiny:Q8_0"].size == sum(map(len, Q8.values()))
    assert found["tiny:Q8_0"].title == "Tiny Chat (Q8_0)"
    assert found[f"{OTHER}:IQ4_XS"].path == other / "sub/Other.i1-IQ4_XS.gguf"


def test_what_is_not_whole_is_not_installed(home: Path) -> None:
    snapshot = install(home, REPOSITORY, Q8 | Q4)
    (snapshot / PARTS[1]).unlink()
    (snapshot / SMALL).resolve().unlink()
    assert find_installed() == []


def test_the_newest_snapshot_counts(home: Path) -> None:
    old = install(home, REPOSITORY, Q4 | Q8, "a" * 40)
    new = install(home, REPOSITORY, {SMALL: b"newer"}, "b" * 40)
    found = {model.name: model.path for model in find_installed()}
    assert found == {"tiny:Q4_K_M": new / SMALL, "tiny:Q8_0": old / PARTS[0]}


def test_names_of_what_is_installed(home: Path) -> None:
    small = install(home, REPOSITORY, Q4 | {"Tiny-Chat-Q2_K.gguf": b"2"}) / SMALL
    for name in ("tiny", "tiny:q4_k_m", "Tiny:Q4_K_M", REPOSITORY, f"{REPOSITORY}:Q4_K_M"):
        assert find_model(name) == Found(small, How.NAME, "Tiny Chat (Q4_K_M)")
    assert find_model(f"{REPOSITORY}:q2_k").title == f"{REPOSITORY} (Q2_K)"
    install(home, OTHER, {"a-Q8_0.gguf": b"1", "a-Q6_K.gguf": b"2"})
    with pytest.raises(UnknownModelError, match=f"several .*: {OTHER}:Q6_K, {OTHER}:Q8_0$"):
        find_model(OTHER)
    install(home, "a/b", {"a-Q8_0.gguf": b"1"})
    assert find_model("a/b").path.name == "a-Q8_0.gguf"


def test_another_quant_than_the_default_will_do(home: Path) -> None:
    install(home, REPOSITORY, Q8)
    assert find_model("tiny").title == "Tiny Chat (Q8_0)"
    with pytest.raises(NotInstalledError, match="`localds pull tiny:Q4_K_M`"):
        find_model("tiny:q4_k_m")


@pytest.mark.usefixtures("home")
def test_known_but_not_installed() -> None:
    quant = known_models()[SUGGESTION].quants["Q4_K_M"]
    with pytest.raises(NotInstalledError) as caught:
        find_model(f"{SUGGESTION}:q4_k_m")
    remedy = f"get it with `localds pull {SUGGESTION}:Q4_K_M` ({format_size(quant.size)})"
    assert remedy in str(caught.value)


@pytest.mark.usefixtures("home")
def test_neither_file_nor_name() -> None:
    with pytest.raises(NotInstalledError, match=r"^tiny: .* `localds pull tiny` \(2.86 MiB\)$"):
        find_model("tiny")
    with pytest.raises(NotInstalledError, match=r"^a/b:Q8_0: no such file, .* pull a/b:Q8_0`$"):
        find_model("a/b:Q8_0")
    with pytest.raises(UnknownModelError, match=r"^tinny: no such file, .* did you mean tiny\?"):
        find_model("tinny")
    with pytest.raises(UnknownQuantError, match="only Q4_K_M, Q8_0"):
        find_model("tiny:Q9")
    for name in ("no.gguf", "/a/b", "./tiny", "../tiny", "a/b/c", "a b"):
        assert find_model(name) == Found(Path(name), How.FILE, Path(name).stem)


def test_a_file_comes_first(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(installed)
    Path("tiny").write_bytes(b"a file")
    assert find_model("tiny").how == How.FILE
    (installed / "config" / "localds" / "models.toml").write_text("nonsense")
    assert find_model("tiny").how == How.FILE
    with pytest.raises(RegistryError):
        find_model("tiny2")


@pytest.mark.usefixtures("installed")
def test_load_takes_names() -> None:
    def layers(model: Model) -> int:
        with model:
            return model.geometry.layers

    assert layers(localds.load("tiny")) == layers(localds.load(f"{REPOSITORY}:Q4_K_M")) == 3
    with pytest.raises(NotInstalledError):
        localds.load("tiny:Q8_0")


def test_the_default_model(home: Path, demo: Path, tiny_model: Path) -> None:
    assert find_model() == Found(demo, How.DEMO, resolve.DEMO_TITLE)
    install(home, "other/program", {"no-model-of-ours-Q8_0.gguf": b"1"})
    assert find_model() == Found(demo, How.DEMO, resolve.DEMO_TITLE)
    small = install(home, REPOSITORY, {SMALL: tiny_model.read_bytes()}) / SMALL
    assert find_model() == Found(small, How.ONLY, "Tiny Chat (Q4_K_M)")
    install(home, OTHER, {"a-Q8_0.gguf": tiny_model.read_bytes()})
    assert find_model() == Found(demo, How.DEMO_AMONG_OTHERS, resolve.DEMO_TITLE)
    own = home / "own.gguf"
    own.write_bytes(b"")
    remember(LastUsed(own, "own"))
    assert find_model() == Found(own, How.LAST, "own")
    own.unlink()
    assert find_model().how == How.DEMO_AMONG_OTHERS


@pytest.mark.usefixtures("home")
def test_without_a_demo_the_remedy_is_a_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "DEMO", Path("/none.gguf"))
    with pytest.raises(NotInstalledError, match=f"`localds pull {SUGGESTION}`"):
        find_model()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", '{"path": 5, "title": "x"}', '{"path": "/x"}', "\xff", "null"]
)
def test_a_broken_state_is_none(home: Path, text: str) -> None:
    remember(LastUsed(Path("/x"), "x"))
    assert last_used() == LastUsed(Path("/x"), "x")
    (state,) = (home / "state" / "localds").iterdir()
    state.write_bytes(text.encode("latin-1"))
    assert last_used() is None


def test_a_state_that_cannot_be_written(home: Path) -> None:
    (home / "state").write_bytes(b"a file")
    remember(LastUsed(Path("/x"), "x"))
    assert last_used() is None


def test_writing_is_whole_or_not_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(LastUsed(Path("/x"), "x"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            remember(LastUsed(Path("/y"), "y"))
    assert last_used() == LastUsed(Path("/x"), "x")
    assert len(list((home / "state" / "localds").iterdir())) == 1
    assert settings.state_folder() == home / "state" / "localds"


CHAT = ("-p", "hello", "-n", "2", "--temp", "0")


@pytest.mark.usefixtures("installed")
def test_chat_remembers_and_says_what_it_uses(tiny_model: Path) -> None:
    only = run("chat", *CHAT)
    assert only.returncode == 0, only.stderr
    lines = only.stderr.splitlines()
    assert lines[0] == "localds: using Tiny Chat (Q4_K_M), the only one installed"
    named = run("chat", str(tiny_model), *CHAT)
    assert "using" not in named.stderr
    assert named.stdout == only.stdout
    last = run("chat", *CHAT)
    assert last.stderr.splitlines()[0] == f"localds: using {tiny_model.stem}, used last"
    assert run("inspect", "tiny").returncode == 0
    assert f"using {tiny_model.stem}" in run("chat", *CHAT).stderr


def test_chat_with_the_demo(
    home: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from localds.cli import app

    assert demo.exists()
    monkeypatch.setattr("sys.stdin", None)
    app(["chat", *CHAT], standalone_mode=False)
    assert capsys.readouterr().err.startswith(
        "localds: no model is installed, so this is the built-in demo, a guide to localds; for a "
        f"real model: localds list, then localds pull {SUGGESTION}\n"
    )
    assert not (home / "state").exists()


@pytest.mark.usefixtures("installed")
def test_every_command_takes_names(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the other cat " * 20)
    output = str(tmp_path / "imatrix.gguf")
    for words in (
        ("inspect", "tiny"),
        ("bench", "tiny", "-p", "4", "-n", "1", "-r", "1"),
        ("eval", "tiny", str(text), "--against", REPOSITORY, "-c", "16", "--chunks", "2"),
        ("imatrix", "tiny", str(text), "-o", output, "--chunk-size", "16", "--chunks", "2"),
    ):
        done = run(*words)
        assert done.returncode == 0, done.stderr
    for words in (("inspect",), ("eval", str(text)), ("imatrix", str(text)), ("bench",)):
        fails(run(words[0], "tiny:q8_0", *words[1:]), "`localds pull tiny:Q8_0` (1.14 MiB)")
    fails(run("chat", "tinny", "-p", "x"), "did you mean tiny?")


def test_list(home: Path) -> None:
    install(home, REPOSITORY, Q4)
    long = "someone/" + "Long-Name-" * 5 + "GGUF"
    install(home, long, {"x-Q8_0.gguf": b"1"})
    done = run("list", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    lines = done.stdout.splitlines()
    assert lines[0] == f"Installed in {home / 'hf' / 'hub'}"
    assert any(line.split()[:3] == ["tiny:Q4_K_M", "2.86", "MiB"] for line in lines)
    assert any(line.split()[:1] == [SUGGESTION] for line in lines)
    row = next(line for line in lines if line.split()[:1] == ["tiny"])
    assert row.split()[1] == "Q4_K_M*"
    assert "installed" in row
    assert row.endswith("2048  mit")
    assert "of memory" in lines[-1]


def test_list_as_json(home: Path, tiny_model: Path) -> None:
    data = tiny_model.read_bytes()
    snapshot = install(home, REPOSITORY, {SMALL: data})
    install(home, "other/program", {"no-model-of-ours-Q8_0.gguf": b"1"})
    report = json.loads(run("list", "--json").stdout)
    other, model = report["installed"]
    assert other["fits"] == "other kind"
    assert model["name"] == "tiny:Q4_K_M"
    assert model["path"] == str(snapshot / SMALL)
    assert model["bytes"] == len(data)
    assert model["memory_bytes"] == len(data) + 1_000_000_000
    assert model["fits"] == "fits"
    known = {entry["name"]: entry for entry in report["known"]}
    assert [(q["quant"], q["installed"]) for q in known["tiny"]["quants"]] == [
        ("Q4_K_M", True),
        ("Q8_0", False),
    ]
    assert report["memory"]["available_bytes"] <= report["memory"]["total_bytes"]


@pytest.mark.parametrize(
    ("wanted", "available", "total", "verdict"),
    [(5, 6, 10, "fits"), (7, 6, 10, "not now"), (11, 6, 10, "from disk"), (5, None, 10, "fits")],
)
def test_verdicts(wanted: int, available: int | None, total: int, verdict: str) -> None:
    from localds.commands.list import _verdict

    assert _verdict(wanted, available, total) == verdict


def test_a_mistake_in_the_users_file_is_one_message(home: Path) -> None:
    own = home / "config" / "localds" / "models.toml"
    own.write_text('[x]\ntitle = "X"')
    for words in (("list",), ("pull", "x"), ("chat", "x", "-p", "hi")):
        fails(run(*words), f"{own}: [x]: repository is missing; add it")


def test_rm_asks_for_a_terminal_or_yes(home: Path) -> None:
    install(home, REPOSITORY, Q4)
    fails(run("rm", "tiny", piped="y\n"), "tiny:Q4_K_M, 2.86 MiB: there is no terminal to ask on")
    assert find_installed()
    done = run("rm", "tiny", "--yes")
    assert done.stdout == "removed tiny:Q4_K_M, 2.86 MiB\n"
    assert find_installed() == []
    assert not (home / "hf/hub/models--owner--Tiny-Chat-GGUF").exists()
    fails(run("rm", "tiny", "-y"), "tiny: it is not installed; `localds list` shows what is")


@pytest.mark.parametrize(("answer", "status"), [("n", 1), ("y", 0), ("", 1)])
def test_rm_asks(home: Path, answer: str, status: int) -> None:
    install(home, REPOSITORY, Q4)
    outer, inner = pty.openpty()
    with subprocess.Popen(
        [*LOCALDS, "rm", "tiny"], stdin=inner, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(inner)
        os.write(outer, f"{answer}\n".encode())
        output, _ = process.communicate(timeout=30)
    os.close(outer)
    assert process.returncode == status
    assert "Remove tiny:Q4_K_M, 2.86 MiB? [y/N]" in output
    assert bool(find_installed()) == bool(status)


def test_rm_keeps_what_others_need(home: Path) -> None:
    shared, own = {"Tiny-Chat-Q2_K.gguf": FILES[SMALL]}, {"README.md": b"# Tiny"}
    first = install(home, REPOSITORY, Q8 | Q4 | shared | own, "a" * 40)
    second = install(home, REPOSITORY, Q8, "b" * 40)
    fails(run("rm", "tiny", "-y"), "several variants are installed; name one: tiny:Q8_0, tiny:Q4")
    assert run("rm", "tiny:Q8_0", "-y").returncode == 0
    assert not second.exists()
    left = {path.name for path in first.rglob("*")}
    assert left == {SMALL, "Tiny-Chat-Q2_K.gguf", "README.md"}
    # Q2_K and Q4_K_M are one blob here.
    assert run("rm", "tiny", "-y").returncode == 0
    assert (first / "Tiny-Chat-Q2_K.gguf").read_bytes() == FILES[SMALL]
    assert len(blobs(home)) == 2
    assert run("rm", f"{REPOSITORY}:Q2_K", "-y").returncode == 0
    assert [path.name for path in first.iterdir()] == ["README.md"]
    assert not scan_cache_dir(home / "hf/hub").warnings


def test_rm_takes_unfinished_downloads(home: Path) -> None:
    folder = home / "hf/hub/models--owner--Tiny-Chat-GGUF/blobs"
    folder.mkdir(parents=True)
    part = folder / f"{sha256(b'1')}.localds-part"
    part.write_bytes(bytes(2048))
    done = run("rm", "tiny", "-y")
    assert done.stdout == f"removed unfinished downloads of {REPOSITORY}, 2 KiB\n"
    assert not folder.parent.exists()
    install(home, REPOSITORY, Q4)
    part.write_bytes(bytes(2048))
    assert "tiny:Q4_K_M, 2.86 MiB, and unfinished downloads of" in run("rm", "tiny", "-y").stdout
    assert not folder.parent.exists()


def test_rm_leaves_a_download_that_goes_on(home: Path) -> None:
    install(home, REPOSITORY, Q4)
    part = blobs(home)[0].parent / f"{sha256(b'1')}.localds-part"
    part.write_bytes(bytes(2048))
    code = (
        "import sys; from huggingface_hub.utils import WeakFileLock\n"
        "with WeakFileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    lock = lock_file(REPOSITORY, sha256(b"1"))
    lock.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert run("rm", "tiny", "-y").stdout == "removed tiny:Q4_K_M, 2.86 MiB\n"
        holder.send_signal(signal.SIGKILL)
    assert blobs(home) == [part]
