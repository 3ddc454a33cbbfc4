"""The generator of samples: the settings in the request a server gets, what is dropped, limits, the cache."""

import json

import pytest

from common.errors import UserError
from common.files import read_json
from rewards.answers import answer_type
from synth.prompts import TEMPLATES, NewSample
from synth.sampler import METHODS, Sampler, Settings, Space
from synth.task import SHIPPED, Task, load_task
from synth.teacher.flags import teacher_from_mapping
from synth.teacher.limits import Limits
from synth.tuning.task_generator import REPEATED, TaskGenerator, task_generator
from tests.faulty_server import FaultyServer, completion
from tests.scripted_teacher import said, sample, section, stage_of

DEMOS = [{"input": "3 + 4 =", "output": "7"}, {"input": "12 + 7 =", "output": "19"}]
TASK = Task("sums", "Add the two whole numbers.", answer=answer_type("number"), demos=DEMOS)
SPACE = Space((0.0, 2.0), (0.1, 1.0), tuple(TEMPLATES), METHODS)


def scripted(script, seed_rows=None, task=TASK):
    """A generator whose asks are answered by `script`, and the list of its asks."""
    asked = []

    def ask(asks):
        asked.extend(asks)
        return [script(one) for one in asks]

    return TaskGenerator(task, Sampler(SPACE), ask, seed_rows), asked


def served(tmp_path, server, **more):
    args = teacher_from_mapping({"teacher_url": server.url, "teacher_model": "m", "concurrency": 4, **more})
    return task_generator(TASK, Sampler(SPACE), args, tmp_path)


def new_sums(body, seen):
    number = len(body["messages"][-1]["content"])
    content = json.dumps({"input": f"{number} + {seen} =", "output": str(number + seen)})
    return 200, {}, json.dumps(completion(content)).encode()


def test_the_sampler_is_what_the_server_is_sent(tmp_path):
    with FaultyServer(new_sums) as server, served(tmp_path, server) as generator:
        generator.sampler.set(Settings(0.35, 0.8, "careful"))
        generator.generate_from_seed(2)
        generator.sampler.set(Settings(1.5, 0.1, "plain"))
        generator.generate_from_seed(1, first=3)
        bodies = [body for body in server.bodies if "sample number" in body["messages"][-1]["content"]]
    assert [(body["temperature"], body["top_p"]) for body in bodies] == [(0.35, 0.8)] * 2 + [(1.5, 0.1)]
    careful = TEMPLATES["careful"].removeprefix("{request}")
    assert [careful in body["messages"][-1]["content"] for body in bodies] == [True, True, False]
    assert sorted(header["X-Sample"] for header in server.headers[-3:]) == ["1", "2", "3"]


def test_other_settings_are_asked_anew_and_the_same_ones_are_in_the_cache(tmp_path):
    with FaultyServer(new_sums) as server, served(tmp_path, server) as generator:
        first = generator.generate_from_seed(3)
        calls = server.calls
        assert generator.generate_from_seed(3) == first and server.calls == calls
        generator.sampler.top_p = 0.9
        generator.generate_from_seed(3)
        assert server.calls == calls + 3
        generator.generate_from_seed(3, first=4)
        assert server.calls == calls + 6


def test_limits_hold_for_all_batches_together(tmp_path):
    with FaultyServer(new_sums) as server, served(tmp_path, server, max_calls=8) as generator:
        generator.generate_from_seed(4)
        with pytest.raises(UserError, match="limit of 8 calls"):
            generator.generate_from_seed(6, first=5)
        assert server.calls == 8
    assert read_json(tmp_path / "ledger.json")["total"]["calls"] == 8


def test_rows_that_are_of_no_use_are_counted_by_reason():
    def script(ask):
        two = sample("1 + 1 =", "2")
        return [two, two, sample("a", "many"), said("", "refusal")][ask.sample - 1]

    results = scripted(script)[0].generate_from_seed(4)
    assert results.data == [{"input": "1 + 1 =", "output": "2"}]
    assert results.dropped == {REPEATED: 1, "unreadable output": 1, "no sample: refusal": 1}


def test_seed_rows_are_evolved_in_turn():
    generator, asked = scripted(lambda ask: sample(f"{ask.sample} + 1 =", str(ask.sample + 1)))
    assert len(generator.evolve_instructions(3, first=2).data) == 3
    assert [stage_of(ask) for ask in asked] == ["harder"] * 3
    assert [section(ask, "input") for ask in asked] == ["12 + 7 =", "3 + 4 =", "12 + 7 ="]
    other, asked = scripted(lambda ask: sample("5 + 5 =", "10"), [{"input": "0 + 0 =", "output": "0"}])
    other.evolve_instructions(1)
    assert section(asked[0], "input") == "0 + 0 =" and asked[0].schema is NewSample
    with pytest.raises(UserError, match="no demos to evolve"):
        scripted(lambda ask: None, [])[0].evolve_instructions(1)


def test_without_a_url_the_offline_teacher_answers(tmp_path):
    task = load_task(SHIPPED / "arithmetic.yaml")
    args = teacher_from_mapping({"offline_teacher": "--error-rate 0 --seed 3"})
    with task_generator(task, Sampler(SPACE), args, tmp_path) as generator:
        first = generator.generate_from_seed(10)
    assert len(first.data) == 10 and all("+" in row["input"] for row in first.data)
    before = (tmp_path / "ledger.json").read_text()
    with task_generator(task, Sampler(SPACE), args, tmp_path) as generator:  # another port, the same teacher
        assert generator.generate_from_seed(10) == first
    after = json.loads((tmp_path / "ledger.json").read_text())
    assert after["total"]["calls"] == json.loads(before)["total"]["calls"] and after["total"]["cached"] == 10


def test_the_teacher_s_settings_are_checked():
    assert teacher_from_mapping({"price_in": 2, "max_money": 0.5}).limits == Limits(money=0.5, price_in=2.0)
    with pytest.raises(UserError, match="teacher has the unknown key 'url'"):
        teacher_from_mapping({"url": "http://localhost"})
    with pytest.raises(UserError, match="teacher sets concurrency to 'many', which cannot be read"):
        teacher_from_mapping({"concurrency": "many"})
