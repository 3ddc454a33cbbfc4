"""The flags by which a command finds its teacher, and the settings made of them.

The API key is no flag: it is read from the environment.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from common.errors import UserError
from common.files import check_file
from common.parser import Parser, Repeated, positive
from common.ranges import COUNT, NOT_NEGATIVE, POSITIVE
from synth.teacher.address import checked_urls, key_for
from synth.teacher.asking import Asking
from synth.teacher.cache import Cache
from synth.teacher.limits import Limits


@with_config(ConfigDict(coerce_numbers_to_str=True))
@dataclass(frozen=True)
class TeacherSettings:
    """Which teacher is asked, how hard, and what it may cost. The fields are named as the flags are.

    teacher_url: several are separated by spaces. cache: None stands for cache.sqlite in the run folder.
    offline_teacher: flags of the offline teacher, which takes the place of a missing teacher_url. endpoint: the name
    under which the cache knows the teacher, where that is not its first URL.
    """

    teacher_url: str | None = None
    teacher_model: str | None = None
    cache: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    teacher_temperature: float = 1.0
    answer_tokens: int = 1024
    max_calls: int | None = None
    max_tokens: int | None = None
    max_money: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    offline_teacher: str = ""
    endpoint: str | None = None

    def check(self) -> None:
        """Raise UserError for what no run could begin with: an address, a key, a limit, or a cache that is none."""
        if self.teacher_url:
            for url in checked_urls(self.teacher_url):
                key_for(url)
        _ = self.limits
        positive("concurrency", self.concurrency)
        positive("timeout", self.timeout)
        positive("answer-tokens", self.answer_tokens)
        if self.cache and Path(self.cache).exists():
            Cache(self.cache).close()
        elif self.cache:
            check_file(self.cache)

    @property
    def limits(self) -> Limits:
        """Raises UserError as Limits does."""
        return Limits(self.max_calls, self.max_tokens, self.max_money, self.price_in, self.price_out)

    @property
    def asking(self) -> Asking:
        return Asking(self.teacher_temperature, self.answer_tokens)


def add_teacher_flags(parser: argparse.ArgumentParser, cache: str | None = "synth_cache.sqlite") -> None:
    """The flags of TeacherSettings. cache: the default of --cache."""
    default = TeacherSettings()
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--teacher-url",
        action=Repeated,
        help="an OpenAI-compatible endpoint, up to and including /v1; repeat it for several of one model",
    )
    group.add_argument("--teacher-model", help="the model's name at that endpoint")
    group.add_argument("--cache", default=cache, metavar="FILE", help="where answers are kept")
    group.add_argument(
        "--concurrency", type=COUNT, default=default.concurrency, help="maximum requests in flight, at each endpoint"
    )
    group.add_argument("--timeout", type=POSITIVE, default=default.timeout, help="seconds a request may take")
    group.add_argument(
        "--teacher-temperature",
        type=NOT_NEGATIVE,
        default=default.teacher_temperature,
        help="for generation, rewriting and votes",
    )
    group.add_argument(
        "--answer-tokens", type=COUNT, default=default.answer_tokens, help="maximum tokens of one answer"
    )
    group.add_argument("--max-calls", type=COUNT, help="limit on calls, retries included")
    group.add_argument("--max-tokens", type=COUNT, help="limit on tokens, prompts and answers together")
    group.add_argument("--max-money", type=NOT_NEGATIVE, help="limit on cost, in the currency of the prices")
    group.add_argument("--price-in", type=NOT_NEGATIVE, default=default.price_in, help="per million prompt tokens")
    group.add_argument("--price-out", type=NOT_NEGATIVE, default=default.price_out, help="per million answer tokens")


def add_offline_teacher_flag(group: argparse._ActionsContainer) -> None:
    """--offline-teacher, for commands that start one where no URL is given."""
    group.add_argument(
        "--offline-teacher",
        default=TeacherSettings.offline_teacher,
        metavar="TEXT",
        help="without --teacher-url: flags of the offline teacher, as one string",
    )


def teacher_settings(args: argparse.Namespace) -> TeacherSettings:
    """The settings that `add_teacher_flags` has read."""
    given = vars(args)
    return TeacherSettings(
        **{field.name: given[field.name] for field in fields(TeacherSettings) if field.name in given}
    )


def teacher_from_mapping(given: Mapping[str, Any], place: str = "teacher") -> TeacherSettings:
    """The settings of a mapping such as {"teacher_url": ..., "concurrency": 4}, from a YAML file.

    Raises UserError, which begins with `place`, for an unknown key or a value of the wrong type.
    """
    known = sorted(field.name for field in fields(TeacherSettings) if field.name != "endpoint")
    for key in given:
        if key not in known:
            raise UserError(f"{place} has the unknown key {key!r}; known are {', '.join(known)}")
    if isinstance(given.get("teacher_url"), list):
        given = {**given, "teacher_url": " ".join(map(str, given["teacher_url"]))}
    try:
        settings = TypeAdapter(TeacherSettings).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{place} sets {key} to {first['input']!r:.60}, which cannot be read: {first['msg']}") from None
    parser = Parser(None)
    add_teacher_flags(parser)
    parser.check_values({key: getattr(settings, key) for key in given}, place)
    return settings
