"""Files that were cut, edited or made by others: each is one line with the file, and nothing is taken by half.

Adapters and heads in both frameworks, and the folder of a run that is resumed.

python -m pytest tests/test_damaged.py
"""

import json
import math
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

import ppo_training
import pytorch_ppo_training
import sft
from common.errors import UserError
from common.schemas import read_key
from models import adapters, arrays, torch_adapters, torch_arrays, torch_loading
from models.adapter_config import AdapterConfig, find_adapter
from models.adapters import write_adapter
from models.loading import load
from models.value_head import HEAD_FILE, ValueHead
from tests.scripts import call, fails, read_samples
from training.metrics import read_metrics

READERS = {"mlx": adapters.read_adapter, "torch": torch_adapters.read_adapter}
ARRAYS = {"mlx": arrays.read_arrays, "torch": torch_arrays.read_arrays}
MODELS = {"mlx": load, "torch": lambda name: torch_loading.load(name, torch.device("cpu"))}


@pytest.fixture
def folder(tmp_path):
    """An adapter with a value head."""
    weights = {"model.layers.0.self_attn.q_proj.lora_a": mx.ones((32, 4))}
    head = ValueHead(32, std=1.0)
    write_adapter(tmp_path / "adapter", weights, AdapterConfig(lora_parameters=LORA), head)
    return tmp_path / "adapter"


LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


def line_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# JSON

WRONG: dict[str, list] = {
    "fine_tune_type": ["other", ["lora"], 3, None],
    "num_layers": ["16", 1.5, True, None, [], -2, 10**9],
    "lora_parameters": [[4], "rank", {"rank": 4}, {"scale": 1.0, "dropout": 0.0}],
    "num_prompt_tokens": [0, -1, "32", None, True],
    "model": [3, None, ["a"]],
    "provenance": ["me", {}, [3], [{}], [{"script": 3, "flags": {}, "figures": {}}],
                   [{"script": "sft.py", "flags": [], "figures": {}}],
                   [{"script": "sft.py", "flags": {}, "figures": {"loss": "low"}}],
                   [{"script": "sft.py", "flags": {}, "figures": {"loss": math.nan}}],
                   [{"script": "sft.py", "flags": {"a": [math.inf]}, "figures": {}}]],
}  # fmt: skip
WRONG_LORA: dict[str, list] = {
    "rank": ["4", 0, -1, True, 1.5, None, 10**9],
    "scale": ["2", None, [2], math.nan, math.inf, -math.inf],
    "dropout": ["0", 1, -0.1, math.nan, None],
    "keys": ["q_proj", [1], {"a": 1}],
}
WRONG["lora_parameters"] += [{**LORA, name: value} for name in WRONG_LORA for value in WRONG_LORA[name]]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("key", "value"), [(key, value) for key in WRONG for value in WRONG[key]])
def test_a_value_of_another_type_or_range_names_file_and_key(folder, reader, key, value):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    line = line_of(READERS[reader], folder)
    assert line.startswith(str(path)) and f"{key}" in line and line.endswith("train it again")


PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", "4"), ("r", 0), ("r", None), ("lora_alpha", math.nan), ("lora_alpha", []), ("lora_dropout", 2),
     ("use_rslora", "no"), ("use_dora", 1), ("bias", []), ("base_model_name_or_path", 3)],
)  # fmt: skip
def test_a_peft_value_of_another_type_names_file_and_key(tmp_path, key, value):
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), {"a": mx.ones(2)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PEFT, key: value}))
    line = line_of(find_adapter, tmp_path)
    assert line.startswith(str(tmp_path / "adapter_config.json")) and f"{key}" in line and "save it again" in line


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"3", b'"a"', b"\xff\xfe", b"[" * 100_000, b"9" * 5_000]
)
def test_json_that_is_no_description_is_one_line(folder, content):
    (folder / "adapter_config.json").write_bytes(content)
    assert "adapter_config.json" in line_of(find_adapter, folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "lacks iterations"), ('{"iterations": "3"}', "has '3'"), ('{"iterations": null}', "has None"),
     ("[]", "something else"), ('{"iterations": true}', "has True")],
)  # fmt: skip
def test_a_key_of_another_type_or_none_is_one_line(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    line = line_of(read_key, int, tmp_path / "a.json", "iterations")
    assert line.startswith(str(tmp_path / "a.json")) and said in line and "restore it" in line


# arrays


def header(content, length=None, data=b"\0" * 64):
    """A safetensors file with this header."""
    text = json.dumps(content).encode() if not isinstance(content, bytes) else content
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changes):
    return {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **changes}}


DAMAGES = {
    "empty": lambda content: b"",
    "cut in the length": lambda content: content[:4],
    "cut in the header": lambda content: content[:40],
    "cut in the data": lambda content: content[:-7],
    "longer": lambda content: content + b"more",
    "text": lambda content: b"no tensors at all, but a longer text than a header's length",
    "a pickle": lambda content: b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93.",
    "a length past the end": lambda content: header(tensor(), 10**6),
    "a huge length": lambda content: header(tensor(), 2**63),
    "a header that is no JSON": lambda content: header(b"{not json}"),
    "a header that is a list": lambda content: header([]),
    "an unknown type": lambda content: header(tensor(dtype="F99")),
    "a shape of text": lambda content: header(tensor(shape="16")),
    "a negative shape": lambda content: header(tensor(shape=[-16])),
    "offsets past the end": lambda content: header(tensor(data_offsets=[0, 999])),
    "offsets turned round": lambda content: header(tensor(data_offsets=[64, 0])),
    "no offsets": lambda content: header({"a": {"dtype": "F32", "shape": [16]}}),
    "a shape of another size": lambda content: header(tensor(shape=[17])),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["adapters.safetensors", HEAD_FILE])
def test_damaged_weights_are_one_line(folder, reader, name, damage):
    path = folder / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert line_of(READERS[reader], folder).startswith(str(path))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_one_line(tiny_folder, tmp_path, kind, damage):
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    path = copy / "model.safetensors"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert str(copy) in line_of(MODELS[kind], str(copy))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_with_a_number_that_is_none_is_refused(tiny_folder, tmp_path, kind, number):
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = dict(mx.load(str(copy / "model.safetensors")))
    weights["model.norm.weight"][3] = number
    mx.save_safetensors(str(copy / "model.safetensors"), weights, metadata={"format": "mlx"})
    line = line_of(MODELS[kind], str(copy))
    assert line.startswith(str(copy)) and "numbers that are not finite in model.norm.weight" in line


@pytest.mark.parametrize("reader", ARRAYS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_one_number_that_is_none_is_found_and_large_ones_are_no_fault(tmp_path, reader, dtype):
    path = tmp_path / "a.safetensors"
    large = mx.full((4, 8), 60_000.0, dtype=dtype)  # in float16 their sum overflows
    mx.save_safetensors(str(path), {"a": large})
    assert set(ARRAYS[reader](path, "x")) == {"a"}
    for number in (math.nan, math.inf, -math.inf):
        large[2, 3] = number
        mx.save_safetensors(str(path), {"a": large, "b": mx.ones(2)})
        assert line_of(ARRAYS[reader], path, "do it") == f"{path} has numbers that are not finite in a; do it"
    mx.save_safetensors(str(path), {"c": mx.ones(2, dtype=mx.int32), "d": mx.ones(2, dtype=mx.uint8)})
    assert line_of(ARRAYS[reader], path, "do it") == f"{path} has no weights in c and 1 more; do it"
    assert set(ARRAYS[reader](path, "x", weights=False)) == {"c", "d"}


@pytest.mark.parametrize("reader", ARRAYS)
def test_a_pickle_in_an_npz_is_refused(tmp_path, reader):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    np.savez(tmp_path / "a.npz", a=np.array([Harm()], dtype=object))
    assert line_of(ARRAYS[reader], tmp_path / "a.npz", "x").startswith(str(tmp_path / "a.npz"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("shape", [(32,), (2, 32), (0, 32), (1, 32, 1), ()])
def test_a_head_of_another_shape_is_refused_in_both_forms(folder, tmp_path, reader, shape):
    mx.save_safetensors(str(folder / HEAD_FILE), {"weight": mx.ones(shape)})
    assert f"a value head of shape {shape}, which must be (1, H)" in line_of(READERS[reader], folder)
    single = tmp_path / "single.npz"
    tensors: dict[str, Any] = {"value_head.weight": np.ones(shape, dtype=np.float32)}
    np.savez(single, **tensors)
    shutil.copy(folder / "adapter_config.json", single.with_suffix(".json"))
    assert f"a value head of shape {shape}, which must be (1, H)" in line_of(READERS[reader], single)


# runs

SCRIPTS = {
    "sft": (sft, ["--train", "--iters", 6, "--save-every", 2, "--steps-per-report", 1, "--batch-size", 2,
                  "--val-batches", 1, "--lora-layers", 1]),
    "ppo": (ppo_training, ["--ground-truth-reward", "--num-steps", 4, "--save-every", 2, "--batch-size", 2,
                           "--mini-batch-size", 2, "--max-completion-length", 3, "--ppo-epochs", 1]),
}  # fmt: skip
SCRIPTS["torch"] = (pytorch_ppo_training, [*SCRIPTS["ppo"][1], "--device", "cpu"])
BREAKS = {
    "cut adapter": lambda last: cut(last / "adapter" / "adapters.safetensors"),
    "cut optimizer": lambda last: cut(last / "optimizer.safetensors"),
    "no optimizer": lambda last: (last / "optimizer.safetensors").unlink(),
    "no configuration": lambda last: (last / "adapter" / "adapter_config.json").unlink(),
    "state that is a list": lambda last: (last / "state.json").write_text("[]"),
    "cut state": lambda last: cut(last / "state.json"),
    "state of text": lambda last: change_state(last, step="four"),
    "state of another sign": lambda last: change_state(last, step=-4),
    "state without what the run adds": lambda last: (last / "state.json").write_text('{"step": 4}'),
    "weights that are not finite": lambda last: change_weights(last / "adapter" / "adapters.safetensors"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_state(last, **entries):
    path = last / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def change_weights(path):
    weights = dict(mx.load(str(path)))
    name = next(iter(weights))
    weights[name] = weights[name] * math.nan
    mx.save_safetensors(str(path), weights)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """The folder of a finished run of each script, with its script and the weights it left. Read-only."""
    made = {}
    for name, (script, own) in SCRIPTS.items():
        folder = tmp_path_factory.mktemp(name)
        places = ["--model", tiny_folder, "--output-dir", folder / "run", "--save-file", folder / "a.safetensors"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "plot_run", lambda folder: folder / "curves.png")
            call(script.main, *own, *places)
        made[name] = SimpleNamespace(folder=folder / "run", script=script, weights=folder / "a.safetensors")
    return made


@pytest.fixture
def resumable(finished, tmp_path, monkeypatch):
    """resumable(script) -> a copy of its finished run, whose adapter goes elsewhere."""

    def make(name):
        run = finished[name]
        copy = shutil.copytree(run.folder, tmp_path / "run")
        monkeypatch.setattr(run.script, "plot_run", lambda folder: folder / "curves.png")
        return copy, run, ["--resume", copy, "--save-file", tmp_path / "again.safetensors"]

    return make


CASES = [("sft", damage) for damage in BREAKS] + [("ppo", damage) for damage in BREAKS] + [("torch", "cut adapter")]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_ends_the_same(resumable, capsys, name, damage):
    copy, run, words = resumable(name)
    last = sorted((copy / "checkpoints").iterdir())[-1]
    BREAKS[damage](last)
    call(run.script.main, *words)
    said, before = capsys.readouterr().out, sorted((run.folder / "checkpoints").iterdir())[-2].name
    assert f"checkpoint {last.name} cannot be used (" in said and f"the run goes on from checkpoint {before}" in said
    assert (copy / "checkpoints" / f"damaged-{last.name}").is_dir()
    assert Path(words[-1]).read_bytes() == run.weights.read_bytes()
    steps = [row["step"] for row in read_metrics(copy)]
    assert steps == [row["step"] for row in read_metrics(run.folder)]


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_where_every_checkpoint_is_damaged_it_is_one_line_and_nothing_is_moved(resumable, capsys, name):
    copy, run, words = resumable(name)
    for checkpoint in (copy / "checkpoints").iterdir():
        cut(checkpoint / "optimizer.safetensors")
    before = sorted(copy.rglob("*"))
    assert "optimizer.safetensors cannot be read" in fails(capsys, run.script.main, *words)
    assert sorted(copy.rglob("*")) == before


LINES = ["", "{", "[]", "3", "null", '{"step": "1"}', '{"step": true}', '{"score": 1}', '{"step": 2, "loss": NaN}',
         f'{{"step": 2, "loss": {10**400}}}', '{"step": 2, "loss": "low"}', '{"step": 2, "loss": [1]}']  # fmt: skip


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_lines_of_a_log_that_are_none_are_passed_over(resumable, name):
    copy, run, words = resumable(name)
    rows = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_bytes("\n".join([*LINES, rows]).encode() + b"\xff\xfe{")
    if name == "ppo":
        samples = (copy / "samples.jsonl").read_text()
        (copy / "samples.jsonl").write_text("\n".join([*LINES[:-4], samples]))
    call(run.script.main, *words)
    assert read_metrics(copy) == read_metrics(run.folder)
    assert read_samples(copy) == read_samples(run.folder)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_killed_after_its_last_checkpoint_says_all_when_resumed(resumable, name):
    copy, run, words = resumable(name)
    (copy / "summary.json").unlink()
    # Killed before it deleted what it keeps no longer.
    whole = sorted(path.name for path in (copy / "checkpoints").iterdir())
    shutil.copytree(copy / "checkpoints" / whole[0], copy / "checkpoints" / "000001")
    (copy / "best" / "000001").mkdir(parents=True)
    call(run.script.main, *words)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == whole
    assert not (copy / "best" / "000001").exists()
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run.folder, copy))
    # Of the process and not of the run.
    own = dict.fromkeys(("seconds", "adapter", "picture", "tokens_per_second", "peak_memory_gb"))
    assert {**second, **own} == {**first, **own}
    told = [json.loads(path.with_suffix(".json").read_text())["provenance"] for path in (run.weights, Path(words[-1]))]
    assert {**told[0][-1]["figures"], **own} == {**told[1][-1]["figures"], **own}
    assert name == "sft" or {"mean_score", "kl", "kl_coef"} <= second.keys()
