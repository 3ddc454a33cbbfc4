"""The tuner's configuration: the defaults, YAML and its paths, and each mistake in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import read_json, write_json
from synth.prompts import TEMPLATES
from synth.sampler import Settings, Space
from synth.tuning.config import Config, RLTuningConfig, config_from, load_config
from tests.scripts import ROOT


def test_the_defaults_are_the_specified_ones():
    tuning = RLTuningConfig()
    assert (tuning.enable_rl_tuning, tuning.num_iterations, tuning.batch_size) == (False, 10, 100)
    assert (tuning.rl_algorithm, tuning.learning_rate, tuning.reward_metric) == ("random_search", 0.001, "accuracy")
    assert tuning.target_model_path is None and tuning.validation_data_path is None
    assert tuning.step_size == 0.05 and Config().rl_tuning == tuning
    assert Config().space == Space() and Config().settings == Settings()


def test_yaml_is_read_with_its_paths_relative_to_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "task: a/b.yaml\ntemplates: [plain, careful]\ntemperature: 0.5\ntemperature_range: [0, 1]\n"
        "rl_tuning: {enable_rl_tuning: true, target_model_path: t.py:f, validation_data_path: v.jsonl}\n"
    )
    config = load_config(path)
    assert config.task == str(tmp_path / "a/b.yaml") and config.seed_data is None
    assert config.rl_tuning.target_model_path == str(tmp_path / "t.py:f")
    assert config.rl_tuning.validation_data_path == str(tmp_path / "v.jsonl")
    assert config.templates == {name: TEMPLATES[name] for name in ("plain", "careful")}
    assert config.space.temperature == (0.0, 1.0) and config.settings.temperature == 0.5
    write_json(tmp_path / "config.json", config.as_dict())
    assert config_from(read_json(tmp_path / "config.json"), "config.json") == config


def test_templates_of_ones_own(tmp_path):
    own = {"plain": "{request}", "brief": "{request} Be brief."}
    assert config_from({"templates": own}, "x").space.templates == ("plain", "brief")
    assert load_config(Path("synth/tuning/examples/digits.yaml")).rl_tuning.enable_rl_tuning


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"taks": "x"}, "mine has the unknown key 'taks'; known are task, generator, answer, seed_data"),
        ({"rl_tuning": {"rate": 1}}, r"unknown key 'rl_tuning.rate'; known are enable_rl_tuning, num_iterations"),
        ({"rl_tuning": {"rl_algorithm": "a2c"}}, r"rl_tuning.rl_algorithm to 'a2c'.*'random_search', 'reinforce'"),
        ({"rl_tuning": {"num_iterations": 0}}, r"rl_tuning.num_iterations to 0: .*greater than or equal to 1"),
        ({"rl_tuning": {"update_every": 1}}, r"rl_tuning.update_every to 1"),
        ({"rl_tuning": {"baseline": float("nan")}}, r"rl_tuning.baseline to nan"),
        ({"rl_tuning": {"gamma": 1.5}}, r"rl_tuning.gamma to 1.5"),
        ({"temperature_range": [0, float("inf")]}, r"temperature_range.1 to inf: .*finite"),
        ({"rl_tuning": {"learning_rate": float("inf")}}, r"rl_tuning.learning_rate to inf"),
        ({"seed": 2**64}, "seed to 18446744073709551616"),
        ({"templates": ["plane"]}, r"templates to \['plane'\].*'plane' is not one of plain, varied, careful"),
        ({"temperature": "hot"}, "temperature to 'hot'"),
        ({"temperature": 3}, "temperature is 3; it must lie within 0 to 2"),
        ({"template": "careful"}, "template is 'careful'; use one of plain"),
        ({"methods": ["guess"]}, "methods of generate_from_seed, evolve_instructions"),
    ],
)
def test_each_mistake_is_one_line(content, message):
    with pytest.raises(UserError, match=message) as error:
        config_from(content, "mine")
    assert "\n" not in str(error.value)


def test_the_package_gives_the_tuner_and_reads_configurations_without_mlx():
    code = "import sys\nfrom synth.tuning import Config\nassert 'mlx' not in sys.modules, 'mlx is imported'\n"
    code += "from synth.tuning import RLTuner\nassert RLTuner.__name__ == 'RLTuner' and Config().seed == 0"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError, match="Tuner"):
        from synth.tuning import Tuner  # noqa: F401
