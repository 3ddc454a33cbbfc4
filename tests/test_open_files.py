"""The limit of open files follows the teacher's concurrency; macOS starts a process with 256."""

import asyncio
import resource

import pytest

from common.errors import UserError
from synth.teacher.cache import Cache
from synth.teacher.client import Teacher
from synth.teacher.open_files import allow_connections


@pytest.fixture
def limits(monkeypatch):
    """Soft and hard limit as on macOS, with a kernel that allows 10 240; what is asked for is noted."""
    state = [256, resource.RLIM_INFINITY]

    def ask(which, limits):
        if limits[0] > 10_240:
            raise ValueError("current limit exceeds maximum limit")
        state[:] = limits

    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(state))
    monkeypatch.setattr(resource, "setrlimit", ask)
    return state


@pytest.mark.parametrize(("count", "soft"), [(8, 256), (128, 256), (129, 257), (1000, 1128), (10_112, 10_240)])
def test_it_is_raised_where_the_connections_would_reach_it(limits, count, soft):
    allow_connections(count)
    assert limits == [soft, resource.RLIM_INFINITY]


def test_what_the_system_does_not_allow_is_one_line(limits):
    with pytest.raises(UserError, match=r"--concurrency 10113 needs 10241 .* allows .* 256; try --concurrency 128"):
        allow_connections(10_113)


def test_without_a_limit_nothing_is_asked_for(limits):
    limits[0] = resource.RLIM_INFINITY
    allow_connections(10**6)
    assert limits[0] == resource.RLIM_INFINITY


def test_a_teacher_asks_for_its_concurrency(limits, tmp_path):
    async def opened():
        async with Teacher("http://localhost:1/v1", "model", Cache(tmp_path / "cache.sqlite"), concurrency=500):
            return limits[0]

    assert asyncio.run(opened()) == 628


def test_the_system_s_own_limit_can_be_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 300:
        pytest.skip(f"the hard limit here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        allow_connections(150)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (278, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
