"""The stream from source to file: what is written, and what is left when it is cut off."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from fake_source import METADATA, SHAPES, fake_source, values
from gguf.quants import dequantize

from convert import CheckpointError, Progress, StoppedError, convert, pipeline
from convert import output as output_files
from convert.pipeline import WrongDataError
from localds.gguf.splits import merge_tensors, open_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Listener(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total = self.done = 0.0

    def note(self, line: str) -> None:
        self.notes.append(line)

    def begin(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def advance(self, _: object, size: float) -> None:
        self.done += size


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks for each tensor, and a journal that is always up to date."""
    monkeypatch.setattr("convert.source.BLOCK_BYTES", 4 * 64 * 10)
    monkeypatch.setattr(pipeline, "SYNC_BYTES", 1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def expected(name: str) -> NDArray[np.float32]:
    shape = SHAPES[name]
    if len(shape) < 3:
        return values(f"{name}.0", (-(-np.prod(shape) // shape[-1]), shape[-1])).reshape(shape)
    return np.stack([values(f"{name}.{i}", shape[1:]) for i in range(shape[0])])


@pytest.mark.usefixtures("small_blocks")
def test_the_file_holds_the_source(tmp_path: Path) -> None:
    listener = Listener()
    out = tmp_path / "out.gguf"
    paths = convert(fake_source(tmp_path / "src"), out, recipe="F32", progress=listener)
    assert paths == [out]
    assert names(tmp_path) == ["out.gguf"]
    reader = gguf.GGUFReader(out)
    assert [tensor.name for tensor in reader.tensors] == list(SHAPES)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, expected(tensor.name))
    for key, value in METADATA.items():
        assert reader.fields[key].contents() == value
    assert reader.fields["general.architecture"].contents() == "deepseek2"
    assert (
        listener.done
        == pytest.approx(listener.total)
        == sum(2 * np.prod(s) for s in SHAPES.values())
    )


@pytest.mark.usefixtures("small_blocks")
def test_quantized_in_blocks_as_in_one_piece(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(fake_source(tmp_path / "src"), out, recipe="Q8_0")
    for tensor in gguf.GGUFReader(out).tensors:
        data = expected(tensor.name)
        if data.ndim > 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        found = dequantize(tensor.data, tensor.tensor_type)
        assert found.shape == data.shape
        np.testing.assert_allclose(found, data, atol=np.abs(data).max() / 127)


def test_importance_belongs_to_its_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[float, float]] = []
    real = pipeline._native.quantize

    def spy(kind: int, data: Any, weights: Any = None) -> Any:
        if weights is not None:
            given.append((float(data[0, 0]), float(weights[0])))
        return real(kind, data, weights)

    class Matrices:
        def __init__(self) -> None:
            self.metadata = {"quantize.imatrix.file": "x"}

        def of(self, target: Any) -> NDArray[np.float32] | None:
            if "exps" not in target.name:
                return None
            numbers = np.arange(target.matrices, dtype=np.float32) + 1
            return np.repeat(numbers[:, None], target.columns, axis=1)

    monkeypatch.setattr(pipeline._native, "quantize", spy)
    out = tmp_path / "out.gguf"
    convert(fake_source(tmp_path / "src"), out, recipe="Q8_0", importance=Matrices())
    down, up = (expected(f"blk.0.ffn_{kind}_exps.weight")[:, 0, 0] for kind in ("down", "up"))
    numbers = [1.0, 2.0, 3.0, 4.0]
    assert given == [*zip(down, numbers, strict=True), *zip(up, numbers, strict=True)]
    assert gguf.GGUFReader(out).fields["quantize.imatrix.file"].contents() == "x"


# Values and sources that are wrong


@pytest.mark.parametrize(
    ("recipe", "value", "message"),
    [
        ("F32", np.nan, "is nan, so the source is damaged"),
        ("Q8_0", -np.inf, "is -inf, so the source is damaged"),
        ("F16", 1e6, r"is 1e\+06, which F16 cannot hold"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_wrong_values_are_named(tmp_path: Path, recipe: str, value: float, message: str) -> None:
    def change(name: str, matrix: int, start: int, rows: NDArray[np.float32]) -> Any:
        if name == "blk.0.ffn_up_exps.weight" and matrix == 2 and start <= 23 < start + len(rows):
            rows = rows.copy()
            rows[23 - start, 5] = value
        return rows

    source = fake_source(tmp_path / "src", change=change)
    with pytest.raises(WrongDataError, match=message) as caught:
        convert(source, tmp_path / "out.gguf", recipe=recipe)
    place = "row 23, column 5 of model.blk.0.ffn_up_exps.weight"
    assert place in str(caught.value)
    assert names(tmp_path) == []


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    source = fake_source(tmp_path / "src", change=lambda *read: read[3][:, :-1])
    with pytest.raises(WrongDataError, match=r"token_embd.weight.*shape \(320, 64\)"):
        convert(source, tmp_path / "out.gguf", recipe="F32")
    assert names(tmp_path) == []


def failing_at(tensor: str, error: BaseException) -> Any:
    def change(name: str, *read: Any) -> Any:
        if name == tensor:
            raise error
        return read[-1]

    return change


@pytest.mark.parametrize("error", [OSError(5, "broken", "f"), CheckpointError("f is cut")])
@pytest.mark.usefixtures("small_blocks")
def test_read_error_keeps_what_is_done(tmp_path: Path, error: Exception) -> None:
    source = fake_source(tmp_path / "src", change=failing_at("output.weight", error))
    with pytest.raises(StoppedError, match=r"6 of 7 tensors .* --resume"):
        convert(source, tmp_path / "out.gguf", recipe="Q8_0")
    assert names(tmp_path) == ["out.gguf.part", "out.gguf.part.json"]
    listener = Listener()
    good = fake_source(tmp_path / "src")
    convert(good, tmp_path / "out.gguf", recipe="Q8_0", resume=True, progress=listener)
    convert(good, tmp_path / "whole.gguf", recipe="Q8_0")
    assert listener.total > 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


# Names that are taken, and going on


def test_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    source = fake_source(tmp_path / "src")
    with pytest.raises(FileExistsError, match="--force"):
        convert(source, out, recipe="F16")
    assert out.read_text() == "mine"
    convert(source, out, recipe="F16", force=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(fake_source(tmp_path / "src"), tmp_path / "no" / "out.gguf", recipe="F16")


def test_source_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(fake_source(tmp_path / "src"), out, recipe="F32")
    source = fake_source(tmp_path / "src")
    object.__setattr__(source, "path", out)
    with pytest.raises(FileExistsError, match="the source itself"):
        convert(source, out, recipe="Q8_0", force=True)


def cut_off(tmp_path: Path, recipe: str = "Q8_0", **options: Any) -> Path:
    """Leave an unfinished out.gguf behind."""
    change = failing_at("output_norm.weight", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        source = fake_source(tmp_path / "src", change=change)
        convert(source, tmp_path / "out.gguf", recipe=recipe, **options)
    assert json.loads((tmp_path / "out.gguf.part.json").read_text())["done"] == 5
    return tmp_path / "out.gguf"


def test_resume_needs_the_same_conversion(tmp_path: Path) -> None:
    out = cut_off(tmp_path)
    source = fake_source(tmp_path / "src")
    with pytest.raises(CheckpointError, match=r"begun differently \(--type, .*without --resume"):
        convert(source, out, recipe="F16", resume=True)
    with pytest.raises(CheckpointError, match=r"\(--keep.* changed\)"):
        convert(source, out, recipe="Q8_0", keep=["x=F16"], resume=True)
    (tmp_path / "src" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(CheckpointError, match="the source's files changed"):
        convert(source, out, recipe="Q8_0", resume=True)
    assert names(tmp_path) == ["out.gguf.part", "out.gguf.part.json"]


def test_resume_of_damaged_leftovers(tmp_path: Path) -> None:
    out = cut_off(tmp_path)
    source = fake_source(tmp_path / "src")
    part = tmp_path / "out.gguf.part"
    raw = part.read_bytes()
    part.write_bytes(b"x" + raw[1:])
    with pytest.raises(CheckpointError, match="not the file that its journal describes"):
        convert(source, out, recipe="Q8_0", resume=True)
    part.unlink()
    with pytest.raises(CheckpointError, match="part is missing"):
        convert(source, out, recipe="Q8_0", resume=True)
    (tmp_path / "out.gguf.part.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        convert(source, out, recipe="Q8_0", resume=True)


def test_starting_afresh_replaces_leftovers(tmp_path: Path) -> None:
    cut_off(tmp_path, split=20000)
    assert len(names(tmp_path)) > 2
    listener = Listener()
    convert(fake_source(tmp_path / "src"), tmp_path / "out.gguf", recipe="F16", progress=listener)
    assert "replacing the unfinished out.gguf.part" in listener.notes[0]
    assert names(tmp_path) == ["out.gguf"]


def test_resume_with_nothing_to_resume(tmp_path: Path) -> None:
    listener = Listener()
    source = fake_source(tmp_path / "src")
    convert(source, tmp_path / "out.gguf", recipe="F16", resume=True, progress=listener)
    assert "nothing to resume" in listener.notes[0]
    assert names(tmp_path) == ["out.gguf"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    other: list[BaseException] = []

    def change(*read: Any) -> Any:
        if not other:
            other.append(ValueError("not yet"))
            try:
                convert(fake_source(tmp_path / "src"), out, recipe="Q8_0")
            except OSError as error:
                other[0] = error
        return read[-1]

    convert(fake_source(tmp_path / "src", change=change), out, recipe="F16")
    assert "another process is writing" in str(other[0])
    assert names(tmp_path) == ["out.gguf"]


# Killed processes

KILLED = """
    import sys, time
    from pathlib import Path
    import convert.source as sources
    from convert import convert, pipeline
    from fake_source import fake_source
    sources.BLOCK_BYTES = 10240
    pipeline.SYNC_BYTES = 1
    def change(name, matrix, start, rows):
        time.sleep(0.02)
        return rows
    folder = Path(sys.argv[1])
    print("begun", flush=True)
    convert(fake_source(folder / "src", change=change), folder / "out.gguf", recipe="Q8_0",
            resume=True, split=int(sys.argv[2]) or None)
"""


def start_killed(folder: Path, split: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", textwrap.dedent(KILLED), str(folder), str(split)]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("split", [0, 20000])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path, split: int) -> None:
    convert(
        fake_source(tmp_path / "src"), tmp_path / "out.gguf", recipe="Q8_0", split=split or None
    )
    whole = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    for name in whole:
        (tmp_path / name).unlink()
    moments = random.Random(5)
    reached = []
    status = -signal.SIGKILL
    while status == -signal.SIGKILL and len(reached) < 8:
        process = start_killed(tmp_path, split)
        time.sleep(moments.uniform(0.1, 0.4))
        process.kill()
        process.communicate()
        status = process.returncode
        for path in tmp_path.glob("*.gguf"):
            assert path.read_bytes() == whole[path.name]
        journal = tmp_path / "out.gguf.part.json"
        reached.append(json.loads(journal.read_text())["done"] if journal.exists() else 0)
    assert max(reached) > 0
    if status:
        _, errors = start_killed(tmp_path, split).communicate(timeout=60)
        assert not errors
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == whole


def test_cut_off_between_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fake_source(tmp_path / "src")
    convert(source, tmp_path / "whole.gguf", recipe="Q8_0", split=20000)
    whole = [path.read_bytes() for path in sorted(tmp_path.glob("whole*"))]
    assert len(whole) > 2
    real = Path.replace
    renamed: list[Path] = []

    def replace(self: Path, target: Path) -> Path:
        if target.suffix == ".gguf":
            if renamed:
                raise KeyboardInterrupt
            renamed.append(target)
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        convert(source, tmp_path / "out.gguf", recipe="Q8_0", split=20000)
    assert not list(tmp_path.glob("out-00001-of-*.gguf"))
    convert(source, tmp_path / "out.gguf", recipe="Q8_0", split=20000, resume=True)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("out*"))] == whole


# Disks


def test_too_little_space_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_files, "DISK_MARGIN", 1 << 60)
    with pytest.raises(OSError, match=r"out.gguf takes .* KiB and .*; free .* TiB"):
        convert(fake_source(tmp_path / "src"), tmp_path / "out.gguf", recipe="Q8_0")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("small_blocks")
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fake_source(tmp_path / "src")
    out = tmp_path / "out.gguf"
    convert(source, tmp_path / "whole.gguf", recipe="Q8_0")
    real, room = os.pwrite, [30000]

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch, pytest.raises(StoppedError) as caught:
        patch.setattr(os, "pwrite", pwrite)
        convert(source, out, recipe="Q8_0")
    done = json.loads((tmp_path / "out.gguf.part.json").read_text())["done"]
    assert 0 < done < len(SHAPES)
    message = str(caught.value)
    assert f"No space left on device while writing {list(SHAPES)[done]}" in message
    assert "free " in message
    assert "--resume" in message
    convert(source, out, recipe="Q8_0", resume=True)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on the size of files")
def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    script = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
        from pathlib import Path
        from convert import convert, StoppedError
        from fake_source import fake_source
        folder = Path({str(tmp_path)!r})
        try:
            convert(fake_source(folder / "src"), folder / "out.gguf", recipe="F32")
        except StoppedError as error:
            print(error)
    """
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert "File too large while writing token_embd.weight" in done.stdout, done.stderr


# Split files


def test_split_files_are_one_model(tmp_path: Path) -> None:
    source = fake_source(tmp_path / "src")
    paths = convert(source, tmp_path / "m.gguf", recipe="F32", split=90000)
    count = len(paths)
    assert [path.name for path in paths] == [
        f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)
    ]
    assert names(tmp_path) == [path.name for path in paths]
    assert all(path.stat().st_size <= 90000 for path in paths)
    tensors = merge_tensors(open_parts(paths[0]))
    assert list(tensors) == list(SHAPES)
    for name, tensor in tensors.items():
        found = tensor.data.view(np.float32).reshape(SHAPES[name])
        np.testing.assert_array_equal(found, expected(name))
    for number, path in enumerate(paths):
        fields = gguf.GGUFReader(path).fields
        assert fields["split.no"].contents() == number
        assert fields["split.no"].types == [gguf.GGUFValueType.UINT16]
        assert fields["split.count"].contents() == count
        assert fields["split.tensors.count"].contents() == len(SHAPES)
        assert fields["split.tensors.count"].types == [gguf.GGUFValueType.INT32]
        assert ("general.name" in fields) == (number == 0)


def test_a_tensor_larger_than_a_part_has_one_of_its_own(tmp_path: Path) -> None:
    source = fake_source(tmp_path / "src")
    paths = convert(source, tmp_path / "m.gguf", recipe="F32", split=1000)
    assert len(paths) == len(SHAPES)
    assert list(merge_tensors(open_parts(paths[0]))) == list(SHAPES)


def test_all_in_one_part_is_no_split(tmp_path: Path) -> None:
    source = fake_source(tmp_path / "src")
    assert convert(source, tmp_path / "m.gguf", recipe="F32", split=1 << 30) == [
        tmp_path / "m.gguf"
    ]
    assert "split.count" not in gguf.GGUFReader(tmp_path / "m.gguf").fields


# Memory


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 1.2 GB in float32, half of it in one stack, within 450 MB of its own."""
    script = f"""
        import resource
        from pathlib import Path
        import numpy as np
        from convert import convert
        from convert.source import Target
        from fake_source import fake_source
        shapes = {{"a.weight": (8, 2048, 4608), "b.weight": (73728, 2048), "c.weight": (2048,)}}
        folder = Path({str(tmp_path)!r})
        source = fake_source(folder / "src", shapes)
        ones = np.ones(1, np.float32)
        for index, target in enumerate(source.targets):
            def read(matrix, start, stop, columns=target.columns):
                return np.full((stop - start, columns), 0.5, np.float32)
            source.targets[index] = Target(target.name, target.shape, "F32", 4, read)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        convert(source, folder / "out.gguf", recipe="Q8_0")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "linux" else 1024
    assert int(done.stdout) / unit < 450
