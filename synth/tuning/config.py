"""The tuner's configuration: one YAML file, read strictly, or the same as Python objects.

task: tasks/my_task.yaml             the samples' task: a path, relative to this file, or reasoning_gym:NAME
teacher: {teacher_url: URL, teacher_model: NAME}     a teacher's flags; default: the offline teacher
templates: [plain, careful]          what the agent may choose from
rl_tuning: {enable_rl_tuning: true, rl_algorithm: random_search, target_model_path: my_target.py:accuracy}
"""

from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from common.errors import UserError
from common.files import expanded
from common.yaml_files import read_yaml
from synth.pipeline.reasoning_gym_tasks import PREFIX
from synth.prompts import TEMPLATES
from synth.sampler import METHODS, Settings, Space

GENERATORS = ("task", "self_instruct", "evol_instruct")
ALGORITHMS = ("random_search", "reinforce", "ppo", "tpe", "defaults")
PATHS = ("task", "seed_data")  # and, in rl_tuning:
TUNING_PATHS = ("target_model_path", "validation_data_path")
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _named(given: Any) -> Any:
    """A list of shipped templates' names as name → text."""
    if isinstance(given, list | tuple):
        unknown = [name for name in given if not isinstance(name, str) or name not in TEMPLATES]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not one of {', '.join(TEMPLATES)}; write its text: {{name: text}}")
        return {name: TEMPLATES[name] for name in given}
    return given


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]


@dataclass(frozen=True, config=STRICT)
class RLTuningConfig:
    """How the settings are learned.

    target_model_path: file.py:function, or None for sft.py on the rows; validation_data_path: its rows. baseline: the
    metric that the first iteration is compared with; None measures it, on a batch with the initial settings.
    step_size: of temperature and top_p, per iteration. The rest is for REINFORCE and PPO: update_every in iterations;
    batch_features: include features of the last batch in the state.
    """

    enable_rl_tuning: bool = False
    num_iterations: Positive = 10
    batch_size: Positive = 100
    rl_algorithm: Literal[ALGORITHMS] = "random_search"  # type: ignore[valid-type]
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    reward_metric: str = "accuracy"
    target_model_path: str | None = None
    validation_data_path: str | None = None
    baseline: float | None = None
    step_size: Annotated[float, Field(gt=0)] = 0.05
    update_every: Annotated[int, Field(ge=2)] = 5
    gamma: Share = 0.9
    gae_lambda: Share = 0.95
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    ppo_epochs: Positive = 4
    batch_features: bool = False


@dataclass(frozen=True, config=STRICT)
class Config:
    """The task and its teacher, the initial settings, and the space that the agent may choose from.

    generator: "task" writes samples of the task, "self_instruct" and "evol_instruct" write instructions with responses
    (default: "task" if there is one, else "self_instruct"). seed_data: rows to start from; without, instructions start
    from the offline teacher's sums. answer: how the built-in target compares answers, if there is no task. templates:
    name → text with {request}, or a list of shipped names; sft_* and eval_temperature (0: greedy): of the built-in
    target.
    """

    task: str = ""
    generator: Literal["", *GENERATORS] = ""  # type: ignore[valid-type]
    answer: str = "exact"
    seed_data: str | None = None
    teacher: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    top_p: float = 1.0
    template: str = "plain"
    method: str = "generate_from_seed"
    temperature_range: Range = (0.0, 2.0)
    top_p_range: Range = (0.05, 1.0)
    templates: Annotated[dict[str, str], BeforeValidator(_named)] = field(
        default_factory=lambda: {"plain": TEMPLATES["plain"]}
    )
    methods: tuple[str, ...] = ("generate_from_seed",)
    sft_model: str = "tiny-digits"
    sft_iters: Positive = 100
    sft_flags: str = ""
    eval_temperature: Annotated[float, Field(ge=0)] = 0.0
    output_dir: str | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    rl_tuning: RLTuningConfig = field(default_factory=RLTuningConfig)

    @property
    def space(self) -> Space:
        """What the agent may choose from. Raises UserError as Space does."""
        # Evol-Instruct is a method of its own; who names methods can have both, for the agent to choose.
        evolving = self.generator == "evol_instruct" and self.methods == METHODS[:1]
        methods = METHODS[1:] if evolving else self.methods
        return Space(self.temperature_range, self.top_p_range, tuple(self.templates), methods)

    @property
    def settings(self) -> Settings:
        """The initial settings, which the result is compared with."""
        evolving = self.generator == "evol_instruct" and self.method == METHODS[0]
        method = METHODS[1] if evolving and METHODS[1] in self.space.methods else self.method
        return Settings(self.temperature, self.top_p, self.template, method)

    @property
    def kind(self) -> str:
        """The generator: the named one, or the default."""
        return self.generator or ("task" if self.task else "self_instruct")

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `config_from` reads it."""
        return asdict(self)


def config_from(content: Mapping[str, Any], place: str) -> Config:
    """The configuration of a mapping. Raises UserError, which begins with `place`, for a wrong key or value."""
    try:
        config = TypeAdapter(Config).validate_python(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            known = RLTuningConfig if key.startswith("rl_tuning.") else Config
            names = ", ".join(known.__dataclass_fields__)
            raise UserError(f"{place} has the unknown key {key!r}; known are {names}") from None
        raise UserError(f"{place} sets {key} to {first['input']!r:.60}: {first['msg']}; fix it") from None
    config.space.check(config.settings)
    return config


def load_config(path: str | Path) -> Config:
    """The configuration of a YAML file, whose paths are relative to it. Raises UserError."""
    content = read_yaml(path)
    folder = Path(path).parent
    _resolve(content, PATHS, folder)
    if isinstance(content.get("rl_tuning"), dict):
        _resolve(content["rl_tuning"], TUNING_PATHS, folder)
    return config_from(content, str(path))


def _resolve(content: dict[str, Any], keys: tuple[str, ...], folder: Path) -> None:
    for key in keys:
        given = content.get(key)
        if isinstance(given, str) and given and not given.startswith(PREFIX):
            content[key] = str((folder / expanded(given)).resolve())
