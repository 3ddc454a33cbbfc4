"""Which base an adapter goes on: the recorded one by default, another one only if it is named and fits, and said."""

import pytest

import evaluate
import fuse
import talk_to_model
from common.errors import UserError
from models.adapter_base import base_of
from models.adapters import AdapterConfig, attach_adapter, read_adapter, save_adapter
from models.loading import load, resolve
from tests.conftest import tiny_random_folder
from tests.scripts import call, fails


@pytest.fixture
def adapter(tmp_path, tiny_folder):
    """A LoRA on the random model, which records its base."""
    return saved(tmp_path / "adapter", tiny_folder, str(tiny_folder))


def saved(path, folder, base):
    config = AdapterConfig("lora", -1, model=base)
    model = load(str(folder)).model
    attach_adapter(model, config)
    save_adapter(path, model, config)
    return str(path)


def test_the_recorded_base_is_the_default(adapter, tiny_folder, capsys):
    assert base_of(None, None, resolve) == "tiny-digits"
    assert base_of("mine", None, resolve) == "mine"
    assert base_of(None, adapter, resolve) == str(tiny_folder)
    assert base_of(f"{tiny_folder}/", adapter, resolve) == f"{tiny_folder}/"
    assert capsys.readouterr().out == ""


def test_another_base_is_said(adapter, tiny_folder):
    said: list[str] = []
    assert base_of("own/model", adapter, resolve, said.append) == "own/model"
    (line,) = said
    assert line == f"{adapter} was trained on {tiny_folder}; --model puts it on own/model, if its shapes fit"


def test_a_made_model_and_its_folder_are_one(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr("models.loading.tiny_model_path", lambda name: tiny_folder)
    said: list[str] = []
    base_of(str(tiny_folder), saved(tmp_path / "named", tiny_folder, "tiny-digits"), resolve, said.append)
    assert not said


def test_a_base_that_is_not_known_or_not_here_has_to_be_named(tmp_path, tiny_folder):
    with pytest.raises(UserError, match="does not say which base model it was trained on; name it by --model"):
        base_of(None, saved(tmp_path / "nameless", tiny_folder, ""), resolve)
    with pytest.raises(UserError, match=r"was trained on \./gone, which is not here; name its base by --model"):
        base_of(None, saved(tmp_path / "moved", tiny_folder, "./gone"), resolve)


def test_every_script_opens_the_recorded_base(adapter, tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(fuse.main, "--adapter-file", adapter, "--save-path", "fused")
    assert f"fused {adapter} into {tiny_folder}: " in capsys.readouterr().out
    words = ["--ground-truth-reward", "--num-samples", 2, "--max-completion-length", 3]
    call(evaluate.main, "--resume-file", adapter, *words)
    assert capsys.readouterr().out.startswith(f"{tiny_folder} with {adapter}\n")
    call(evaluate.main, "--against-adapter", adapter, "--model", "fused", *words)
    assert f"fused with {adapter}\n" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    call(talk_to_model.main, "--resume-file", adapter)
    assert capsys.readouterr().err.startswith(adapter)


def test_a_base_that_it_does_not_fit_is_refused(adapter, tmp_path, capsys):
    other = tiny_random_folder(tmp_path / "wide", hidden_size=128)
    words = ("--model", other, "--adapter-file", adapter, "--save-path", tmp_path / "out")
    assert "does not fit this model" in fails(capsys, fuse.main, *words)
    assert not (tmp_path / "out").exists()


def test_what_was_trained_on_another_base_records_that_one(adapter, tiny_folder, tmp_path):
    from training.ppo_learner import build_policies
    from training.settings import PPOSettings, SFTSettings
    from training.sft_loop import build_trainee

    other = tiny_random_folder(tmp_path / "other", seed=1)
    policy, _ = build_policies(load(str(other)), PPOSettings(), adapter)
    assert policy.adapter.model == str(other)
    assert build_trainee(load(str(other)), SFTSettings(), adapter).adapter.model == str(other)
    assert read_adapter(adapter).config.model == str(tiny_folder)
