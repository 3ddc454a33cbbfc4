"""Sources of rows: folders written by datasets, the hub (mocked), and their error messages."""

import json
import re
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

import data.sources
from common.errors import UserError
from common.json_text import parse_json
from data.prompts import read_answers, read_prompts
from data.records import located_rows, read_rows
from data.sources import Split, base_in, contents, find_split, is_hub_name, saved_splits, whole

ROWS = [{"Input": f"question {n}", "Output": f"answer {n}"} for n in range(20)]
PAIR = [("prompt", "completion")]


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


@pytest.fixture
def saved(datasets, tmp_path):
    """A folder of save_to_disk with a train split in two files and a validation split."""
    data = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": data.select(range(16)), "validation": data.select(range(16, 20))})
    splits.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "validation": 1})
    return tmp_path / "saved"


def test_a_saved_data_set_is_read_as_datasets_reads_it(datasets, saved):
    for split, name in (("train", "train"), ("valid", "validation")):
        source = find_split(saved, "ignored_", split)
        assert str(source) == f"{saved} ({name})"
        rows = read_rows(source, PAIR)
        wanted = datasets.load_from_disk(str(saved))[name]
        assert [(row["prompt"], row["completion"]) for row in rows] == list(
            zip(wanted["Input"], wanted["Output"], strict=True)
        )
    message = error_of(find_split, saved, "", "test")
    assert "train, validation" in message and "as test" in message


def test_messages_and_tools_come_back_without_the_nulls_that_arrow_fills_in(datasets, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    row = {"messages": [{"role": "user", "content": "hi"}, call], "tools": json.dumps([{"name": "add"}])}
    datasets.Dataset.from_list([row]).save_to_disk(str(tmp_path / "chat"))
    (read,) = read_rows(tmp_path / "chat", [("messages",)], chat=True)
    assert read["messages"] == [{"role": "user", "content": "hi"}, {**call, "content": ""}]
    assert read["tools"] == [{"name": "add"}]


@pytest.mark.parametrize("count", [2, 7, 20, 101])
def test_without_a_split_to_validate_on_the_last_tenth_is_held_out(datasets, tmp_path, count):
    datasets.Dataset.from_list([{"text": str(n)} for n in range(count)]).save_to_disk(str(tmp_path / "one"))
    train, valid = (find_split(tmp_path / "one", "", split) for split in ("train", "valid"))
    assert "first 90 %" in str(train) and "last 10 %" in str(valid)
    texts = [[row["text"] for row in read_rows(source, [("text",)])] for source in (train, valid)]
    assert texts[0] + texts[1] == [str(n) for n in range(count)]
    assert 1 <= len(texts[1]) == pytest.approx(count / 10, abs=1)
    places = [place for place, _ in located_rows(valid, [("text",)])]
    assert places[-1] == f"{tmp_path / 'one'}, row {count}"


def test_a_row_that_does_not_fit_is_named_by_its_number(datasets, tmp_path):
    datasets.Dataset.from_list([{"txt": "a"}]).save_to_disk(str(tmp_path / "bad"))
    assert "bad, row 1 has the keys ['txt']" in error_of(read_rows, whole(tmp_path / "bad"), [("text",)])


def test_prompts_and_answers_of_a_saved_data_set(saved):
    assert read_prompts(saved) == [row["Input"] for row in ROWS[:16]]
    assert read_answers(saved) == {row["Input"]: row["Output"] for row in ROWS[:16]}


def test_without_pyarrow_the_command_that_brings_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error_of(read_rows, tmp_path, PAIR)


@pytest.mark.parametrize("state", ["[]", "{}", '{"_data_files": 3}', '{"_data_files": [{"filename": 3}]}', "nothing"])
def test_a_damaged_description_of_a_saved_data_set_is_a_line(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    assert "state.json" in error_of(lambda: list(contents(tmp_path)))
    (tmp_path / "dataset_dict.json").write_text(state.replace("_data_files", "splits"))
    assert "dataset_dict.json" in error_of(saved_splits, tmp_path)


def test_folders_that_nothing_saved_are_refused(tmp_path):
    assert "save_to_disk" in error_of(saved_splits, tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert "save_to_disk" in error_of(find_split, tmp_path, "", "train")


# --- the hub ---


@pytest.fixture
def hub(monkeypatch):
    """A mocked hub: the arguments of every call, and what to return or raise."""
    stand_in = SimpleNamespace(calls=[], answer={"train": ROWS})

    def load_dataset(*arguments):
        stand_in.calls.append(arguments)
        if isinstance(stand_in.answer, Exception):
            raise stand_in.answer
        return stand_in.answer

    class DatasetsError(Exception):
        pass

    exceptions, settings = SimpleNamespace(DatasetsError=DatasetsError), SimpleNamespace()
    module = SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions, config=settings)
    monkeypatch.setattr(data.sources, "_hub_answers", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", module)
    data.sources._downloaded.cache_clear()
    yield stand_in
    data.sources._downloaded.cache_clear()


def test_a_hub_name_is_downloaded_once_and_split(hub):
    train, valid = (find_split("owner/name", "", split) for split in ("train", "valid"))
    assert [len(read_rows(source, PAIR)) for source in (train, valid)] == [18, 2]
    assert hub.calls == [("owner/name", None)]
    assert [place for place, _ in contents(valid)] == [f"owner/name (train), row {n}" for n in (19, 20)]
    assert read_prompts("owner/name") == [row["Input"] for row in ROWS]


def test_a_configuration_stands_behind_the_name(hub):
    hub.answer = {"train": ROWS[:5], "test": ROWS[5:7], "validation": ROWS[7:]}
    sizes = [len(read_rows(find_split("openai/gsm8k:main", "", split), PAIR)) for split in ("train", "valid", "test")]
    assert sizes == [5, 13, 2] and hub.calls == [("openai/gsm8k", "main")]


@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), ValueError("Config name is missing")])
def test_what_the_hub_does_not_give_is_one_line(hub, error):
    hub.answer = error
    message = error_of(find_split, "owner/name", "", "train")
    assert type(error).__name__ in message and "check name and network" in message


def test_without_datasets_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    data.sources._downloaded.cache_clear()
    assert "pip install datasets" in error_of(find_split, "owner/name", "", "train")


def test_offline_the_real_loader_ends_in_one_line_at_once(datasets, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    for settings in (datasets.config, constants):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", settings.HF_HUB_OFFLINE)  # put back afterwards
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    data.sources._downloaded.cache_clear()
    message = error_of(find_split, "owner/no-such-name", "", "train")
    assert "owner/no-such-name is not a local folder" in message and "OfflineMode" in message  # it asked nobody


def test_a_folder_with_mlx_lm_s_names_needs_no_base(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    assert base_in(tmp_path, None) == "" and base_in(tmp_path, "mine_") == "mine_"
    assert find_split(tmp_path, base_in(tmp_path, None), "train") == tmp_path / "train.jsonl"
    (tmp_path / "increasing_mult_2_valid.jsonl").write_text("{}")  # as in data/, where commands keep their meaning
    assert base_in(str(tmp_path), None) == "increasing_mult_2_" == base_in("OWNER/NAME", None)


def test_names_of_the_hub_and_others(tmp_path, monkeypatch):
    assert all(map(is_hub_name, ("owner/name", "HuggingFaceH4/no_robots", "openai/gsm8k:main", "a/b.c-d")))
    assert not any(map(is_hub_name, ("data", "./a/b", "/a/b", "a/b/c", "a/b.jsonl", "~/a", "a/b:", "")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert "nor for any other base" in error_of(find_split, "owner/name", "", "train")  # a folder is a folder
    assert whole("owner/rows.jsonl") == Path("owner/rows.jsonl") and isinstance(whole("owner/other"), Split)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a\\ud800b"}', "half of a surrogate pair, '\\ud800'"),
        ('{"\\udc00": 1}', "half of a surrogate pair, '\\udc00'"),
        ("[" * 65 + "]" * 65, "nested more than 64 levels deep"),
        ('{"a": ' * 65 + "1" + "}" * 65, "nested more than 64 levels deep"),
        ("[" * 100_000, "nested more than 64 levels deep"),
        ("9" * 5000, "4300 digits"),
    ],
)
def test_json_that_no_template_or_tokenizer_takes_is_a_line(tmp_path, text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_json(text)
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' + text)
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / "x.jsonl", [["text"]])
    assert f"x.jsonl:2 is not valid JSON ({said}" in str(caught.value) or "4300" in said


def test_json_at_the_limits_is_read():
    assert parse_json("[" * 64 + "]" * 64) and parse_json('"' + "[" * 100 + '"') == "[" * 100
    assert parse_json('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


def test_a_role_may_be_anything_and_tools_as_deep(tmp_path):
    deep = "[" * 70 + "]" * 70
    rows = ['{"messages": [{"from": ["human"], "value": "a"}]}', '{"messages": [{"role": {}, "content": "a"}]}']
    rows += [json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": deep})]
    for row, said in zip(rows, ['without a "role"', 'without a "role"', "they must be a list of JSON"], strict=True):
        (tmp_path / "x.jsonl").write_text(row)
        with pytest.raises(UserError, match=said):
            read_rows(tmp_path / "x.jsonl", [["messages"]], chat=True)
