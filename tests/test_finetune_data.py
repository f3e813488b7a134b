"""Data files of every form and fault, and what becomes of them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fake_hub
import numpy as np
import pytest
from fake_hub import FakeHub, go_to
from finetune_models import encoder, guide, taught
from hub_home import home

from localds.finetune.data import Data, DataError, Encoder, load_data
from localds.finetune.data import values as values_module
from localds.finetune.data.errors import Problems, RecordError
from localds.finetune.data.files import find_files, split_of
from localds.finetune.data.messages import Message
from localds.finetune.data.records import Completion, Conversation, Text, read_record
from localds.finetune.data.splitting import held_out
from localds.finetune.data.values import read_values
from localds.hub import cache
from localds.hub.errors import HubError, NoConnectionError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["home"]

EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def record(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Question {number}"},
            {"role": "assistant", "content": f"Answer {number}"},
        ]
    }


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(item)}\n" for item in records))
    return path


def load(source: str | Path, **options: Any) -> Data:
    return load_data(source, encoder(guide()[0]), **options)


def complaint(path: Path, content: bytes | str, name: str = "bad.jsonl") -> str:
    """What is said about a file with this content."""
    file = path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        load(file)
    return str(caught.value).replace(f"{path}/", "")


# What records say

TALK = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (
            {
                "id": 7,
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "H"}, "i"]},
                    {"role": "assistant", "content": "Hello", "weight": 1},
                ],
            },
            TALK,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            TALK,
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, TALK),
        (
            {"system": "S", "instruction": "Add", "input": "1 1", "output": "2"},
            Conversation(
                (
                    Message("system", "S"),
                    Message("user", "Add\n\n1 1"),
                    Message("assistant", "2"),
                )
            ),
        ),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
        ({"text": "a"}, Text("a")),
        (
            {
                "prompt": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "1"},
                ],
                "completion": [{"role": "assistant", "content": "2"}],
            },
            Conversation(
                (
                    Message("user", "Hi", trained=False),
                    Message("assistant", "1", trained=False),
                    Message("assistant", "2"),
                )
            ),
        ),
        (
            {"messages": [{"role": "assistant", "reasoning": "why", "content": "so"}]},
            Conversation((Message("assistant", "so", "why"),)),
        ),
        (
            {"messages": [{"role": "assistant", "content": "<think>\nwhy\n</think>\n\nso"}]},
            Conversation((Message("assistant", "so", "why"),)),
        ),
        (
            {"messages": [{"role": "assistant", "content": "<think></think>so"}]},
            Conversation((Message("assistant", "so"),)),
        ),
        (
            {
                "messages": [{"role": "developer", "content": "a <think> b"}],
                "tools": [{"name": "f"}],
            },
            Conversation((Message("system", "a <think> b"),), ({"name": "f"},)),
        ),
    ],
)
def test_forms(value: object, wanted: object) -> None:
    assert read_record(value) == wanted


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "a record is an object, not a number"),
        ({"question": 1, "answer": 2}, "the record has 'question', 'answer'; what can be read"),
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": ["a"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "bot", "content": ""}]}, r"role is 'bot'; it must be one of sys"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": ""}]}]},
            "other than text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            "weight is 0.5; it must be 0 or 1",
        ),
        (
            {"messages": [{"role": "assistant", "content": "<think>a"}]},
            "a thinking part without an answer",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            r"tool_calls\[0\] names no function",
        ),
        ({"conversations": [{"from": "ai", "value": ""}]}, "from is 'ai'; it must be one of"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "both texts or both"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"text": None}, "text is null; it must be a text"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": {}}, "tools must be a list"),
    ],
)
def test_records_that_say_nothing(value: object, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_record(value)


# Files with faults


def test_every_bad_line_is_listed_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("encoded too early"))
    good = json.dumps(record(1)).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"",
        b'{"text": "a"',
        b'{"text": "\xff"}',
        b"   \r",
        b'{"text": "a", "text": "b"}',
        b'{"text": NaN}',
        b"[" * 100_000,
        b'{"text": "a"} {"text": "b"}',
        b'{"txt": "a"}',
        b'{"text": ' + b"9" * 5000 + b"}",
        good,
    ]
    text = complaint(tmp_path, b"\n".join(lines))
    assert text.startswith("8 problems in the data; mend or remove these first:\n")
    found = [line.strip() for line in text.splitlines()[1:]]
    for line, (number, message) in zip(
        found,
        [
            (3, "not JSON: Expecting ',' delimiter at column 13"),
            (4, "byte 11 is not UTF-8; save the file as UTF-8"),
            (6, "the key 'text' appears twice in one object; keep one of them"),
            (7, "not JSON: NaN is no number that JSON has"),
            (8, "its lists and objects are nested too deeply"),
            (9, "not JSON: something follows the record at column 15"),
            (10, "the record has 'txt'; what can be read is"),
            (11, "a number in it has too many digits"),
        ],
        strict=True,
    ):
        assert line.startswith(f"bad.jsonl:{number}: {message}")


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    lines = complaint(tmp_path, "{\n" * 1234).splitlines()
    assert lines[0].startswith("1,234 problems")
    assert len(lines) == 22
    assert lines[-1].strip() == "and 1,214 more"


def test_bad_lines_of_all_files_together(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", record(1), 5)
    write(tmp_path / "valid.jsonl", 6)
    with pytest.raises(DataError, match=r"(?s)2 problems.*train.jsonl:2.*valid.jsonl:1"):
        load(tmp_path)


def test_what_the_template_refuses_is_listed_too(tmp_path: Path) -> None:
    system = [{"role": "tool", "content": "result"}, *record(1)["messages"]]
    path = write(tmp_path / "a.jsonl", record(1), {"messages": system}, record(2))
    with pytest.raises(DataError, match=r"1 problem in the data(?s:.)*a.jsonl:2: .*'tool'"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.jsonl: the file holds no examples"),
        (b"\n \n", "bad.jsonl: the file holds no examples"),
        ("é".encode("utf-16"), "bad.jsonl: the text is UTF-16; save it as UTF-8"),
        ('[{"text": "a"}\n\n, 5]', "bad.jsonl:3: a record is an object, not a number"),
        ('[{"text": "a"},\n{"text" "b"}]', "bad.jsonl:2: not JSON: Expecting ':'"),
        ('[{"text": "a"}\n{"text": "b"}]', "bad.jsonl:1: after this record the list goes on"),
        ('[{"text": "a"}', "bad.jsonl:1: after this record the list goes on without"),
        ('[{"text": "a"}]\n[]', "bad.jsonl:1: something follows the end of the list"),
        (b'["\xff"]', "bad.jsonl: byte 3 is not UTF-8"),
        ("[]", "bad.jsonl: the file holds no examples"),
    ],
)
def test_whole_files_with_faults(content: bytes | str, message: str, tmp_path: Path) -> None:
    assert f"  {message}" in complaint(tmp_path, content)


def test_records_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "MAX_RECORD", 1000)
    long = json.dumps({"text": "a" * 5000})
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "b"}}\n{long}\n{{"text": "c"}}\n{long}')
    problems = Problems()
    assert list(read_values(path, problems)) == [(1, {"text": "b"}), (3, {"text": "c"})]
    assert problems.count == 2
    with pytest.raises(DataError, match=r"a.jsonl:2: the record is longer than 1000 B; cut it"):
        problems.check()


def test_a_list_has_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff\n[\n {"a":\n 1}, 2,\n\n[3]\n]\n')
    problems = Problems()
    assert list(read_values(path, problems)) == [(3, {"a": 1}), (4, 2), (6, [3])]
    assert not problems.count


def test_plain_text_that_is_none(tmp_path: Path) -> None:
    assert "bad.txt: byte 2 is not UTF-8" in complaint(tmp_path, b"a\xff", "bad.txt")
    assert "bad.txt: the file holds no examples" in complaint(tmp_path, " \n", "bad.txt")


# Which files


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("valid.jsonl", "valid"),
        ("data/validation-00000.jsonl", "valid"),
        ("eval/a.jsonl", "valid"),
        ("my_dev.json", "valid"),
        ("test.jsonl", "test"),
        ("Test_1.jsonl", "test"),
        ("evaluation.jsonl", "train"),
        ("contest.jsonl", "train"),
        ("latest/validity.jsonl", "train"),
    ],
)
def test_splits_by_name(name: str, split: str) -> None:
    assert split_of(name) == split


def test_a_folder(tmp_path: Path) -> None:
    for name in ("train.jsonl", "sub/more.json", "valid.jsonl", "test.jsonl", ".cache/x.jsonl"):
        write(tmp_path / name, {"text": name})
    (tmp_path / "notes.txt").write_text("A text.")
    (tmp_path / "README.md").write_text("About.")
    (tmp_path / "dataset_info.json").write_text("{}")
    files = find_files(tmp_path)
    assert [path.name for path in files.train] == ["notes.txt", "more.json", "train.jsonl"]
    data = load(tmp_path)
    assert (len(data.train), len(data.valid), data.report.valid) == (3, 1, 1)
    assert data.report.unused == (str(tmp_path / "test.jsonl"),)
    assert taught(guide()[0], data.train[0]) == [f"A text.{EOS}"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no \.jsonl, \.json, \.txt, \.md file is in it$"),
        (["a.parquet"], r"a\.parquet: \.parquet files are not read; write the table as JSON Lin"),
        (["valid.jsonl", "test.jsonl"], "no file to train on, only valid.jsonl, test.jsonl; name"),
    ],
)
def test_folders_without_data(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, record(1))
    with pytest.raises(DataError, match=message):
        find_files(tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "a.pdf").write_text("x")
    for name, message in [
        ("a.csv", "csv files are not read"),
        ("a.pdf", r"data is read from \.jsonl, \.json, \.txt, \.md files"),
        ("train.jsonl", "no such file or folder; a data set on the hub is written"),
    ]:
        with pytest.raises(DataError, match=message):
            find_files(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        find_files("data/train.jsonl")


# Loading


def test_a_file_with_a_share_for_evaluation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(record(i % 150) for i in range(200)))
    data = load(path, share=0.1, seed=4)
    assert len(data.valid) == data.report.valid
    assert len(data.valid) == 20
    assert len(data.train) + len(data.valid) == data.report.examples == data.report.records == 200
    texts = [{tuple(e.ids.tolist()) for e in part} for part in (data.train, data.valid)]
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == 150
    again = load(path, share=0.1, seed=4)
    assert [e.ids.tolist() for e in again.valid] == [e.ids.tolist() for e in data.valid]
    other = load(path, share=0.1, seed=5)
    assert [e.ids.tolist() for e in other.valid] != [e.ids.tolist() for e in data.valid]
    assert not len(load(path, share=0).valid)


def test_evaluation_files_are_never_learned(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", *(record(i) for i in range(10)))
    valid = write(tmp_path / "b.jsonl", record(3), record(77))
    data = load(train, valid=valid)
    assert (len(data.train), len(data.valid), data.report.repeated) == (9, 2, 1)
    assert "1 examples are in the evaluation files, too: left out" in data.report.lines()


def test_the_report(tmp_path: Path) -> None:
    long = {"role": "assistant", "content": "word " * 50}
    talk = record(0)["messages"]
    path = write(
        tmp_path / "a.jsonl",
        record(1),
        {"messages": [talk[0], long]},
        {"messages": [{"role": "user", "content": "word " * 50}, talk[1]]},
        {"messages": [talk[0], {**talk[1], "reasoning": "Hm."}, *talk]},
    )
    data = load_data(path, encoder(guide()[0], length=32), share=0)
    report = data.report
    whole = encoder(guide()[0]).encode(
        Conversation((Message("user", "Question 0"), Message("assistant", "word " * 50)))
    )
    assert report.longest == max(len(whole[0]), 50)
    assert report.lost_tokens == len(whole[0]) - 33
    assert (report.records, report.examples) == (4, 4)
    assert (report.truncated, report.dropped, report.split) == (1, 1, 1)
    assert report.tokens == sum(len(example) for example in data.train)
    assert report.trained_tokens == sum(int(example.trained.sum()) for example in data.train)
    assert report.lines()[2:] == [
        f"1 examples were too long and lost {report.lost_tokens} tokens at their ends",
        "1 examples had nothing to learn within the length",
        "1 conversations became an example for each turn, since the template leaves out parts of "
        "earlier turns",
    ]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "word " * 99, "completion": "b"})
    with pytest.raises(DataError, match=r"in all 1 examples what is to be learned begins after 8"):
        load_data(path, encoder(guide()[0], length=8))


def test_progress(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(record(i) for i in range(5)))
    told: list[tuple[str, int, int]] = []
    load(path, on_progress=lambda *args: told.append(args))
    assert told[4:6] == [("checking", path.stat().st_size, path.stat().st_size), ("encoding", 1, 5)]
    assert told[-1] == ("encoding", 5, 5)


def test_many_examples_take_little_memory(tmp_path: Path) -> None:
    """Five bytes a token, 16 an example: objects for each would take some hundreds more."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"text": "{i} is a number"}}\n' for i in range(60_000))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from finetune_models import guide, encoder\n"
        "from localds.finetune.data import load_data\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "small = Path(sys.argv[2]); load_data(small, encoder(guide()[0])); before = used()\n"
        "data = load_data(sys.argv[1], encoder(guide()[0]))\n"
        "print(used() - before, data.train.tokens + data.valid.tokens)"
    )
    small = write(tmp_path / "b.jsonl", {"text": "a"}, {"text": "b"})
    done = subprocess.run(
        [sys.executable, "-c", code, path, small],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    growth, tokens = map(int, done.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.RUSAGE_SELF == 0
    assert growth * unit < 60_000 * 100 + tokens * 20


def test_the_share() -> None:
    digests = np.array([1] * 90 + list(range(2, 12)), np.uint64)
    for seed in range(20):
        chosen = held_out(digests, 0.05, seed)
        assert len(set(chosen[:90].tolist())) == 1
        assert chosen.sum() == 5
        assert (held_out(digests[::-1], 0.05, seed)[::-1] == chosen).all()
        # Where every choice is too large, it is the smallest.
        assert held_out(np.array([1] * 60 + [2] * 40, np.uint64), 0.05, seed).sum() == 40
    assert held_out(np.arange(3, dtype=np.uint64), 0.01, 0).sum() == 1
    assert not held_out(np.ones(5, np.uint64), 0.2, 0).any()
    with pytest.raises(ValueError, match=r"share for evaluation is 0\.9"):
        held_out(digests, 0.9, 0)


# The hub

NAME = "owner/talks"


class DataSetHandler(fake_hub._Handler):
    """Serves a data set where the hub has them."""

    def _answer(self, *, body: bool) -> None:
        models = self.path.replace("/api/datasets/", "/api/models/")
        self.path = models.replace("/datasets/", "/")
        super()._answer(body=body)


@pytest.fixture
def data_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    assert home.exists()
    monkeypatch.setattr(fake_hub, "_Handler", DataSetHandler)
    lines = "".join(f"{json.dumps(record(i))}\n" for i in range(5)).encode()
    files = {
        "README.md": b"# Talks",
        "data/train.jsonl": lines,
        "data/validation.jsonl": json.dumps(record(9)).encode(),
        "other/big.json": b'[{"text": "a"}]',
        "dataset_infos.json": b"{}",
        "table.parquet": b"PAR1",
    }
    with FakeHub(NAME, files) as hub:
        go_to(hub.url, monkeypatch)
        yield hub


def test_a_data_set_on_the_hub(data_hub: FakeHub) -> None:
    data = load(NAME)
    assert (len(data.train), len(data.valid)) == (6, 1)
    assert data_hub.downloaded() == ["data/train.jsonl", "data/validation.jsonl", "other/big.json"]


def test_some_files_of_a_data_set(data_hub: FakeHub) -> None:
    files = find_files(f"{NAME}:data/*")
    assert [path.name for path in (*files.train, *files.valid)] == [
        "train.jsonl",
        "validation.jsonl",
    ]
    assert data_hub.downloaded() == ["data/train.jsonl", "data/validation.jsonl"]
    with pytest.raises(DataError, match=r"no file matches 'x'; it has README\.md, data/train"):
        find_files(f"{NAME}:x")
    with pytest.raises(DataError, match=r"it has no \.jsonl or \.json file, only README.md"):
        find_files(f"{NAME}:*.md")
    with pytest.raises(DataError, match=r"Parquet files only.*datasets\.load_dataset\('owner/talk"):
        find_files(f"{NAME}:*.parquet")


def test_a_data_set_that_does_not_fit_on_the_disk(
    data_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "free_room", lambda: 10)
    with pytest.raises(HubError, match="are still to be downloaded, but"):
        find_files(NAME)
    assert not data_hub.downloaded()


def test_a_data_set_in_the_cache_needs_no_connection(
    data_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = find_files(f"{NAME}:data/*")
    assert data_hub.requests
    go_to(f"http://127.0.0.1:{fake_hub.closed_port()}", monkeypatch)
    assert find_files(f"{NAME}:data/*") == online
    with pytest.raises(NoConnectionError, match="cannot reach"):
        find_files("owner/unknown")


def test_a_data_set_that_is_not_there(data_hub: FakeHub) -> None:
    with pytest.raises(HubError, match="no such file here, and no such data set on"):
        find_files("owner/nothing")
    data_hub.denial = (403, "GatedRepo")
    with pytest.raises(HubError, match=r"accept the terms on http://\S*/datasets/owner/talks"):
        find_files(NAME)
