"""What the teacher's client (synth/teacher) and the offline teacher's server (synth/offline) agree on.

Both speak OpenAI's Chat Completions API; here is what that API leaves open.
"""

from collections.abc import Iterable, Mapping

# The index of one of several equal requests, sent along. Servers ignore headers they do not know; the offline teacher
# answers by it, so that its answers do not depend on the order in which requests arrive.
SAMPLE_HEADER = "X-Sample"
OFFLINE_MODEL = "offline-teacher"

CHARACTERS_PER_TOKEN = 4  # UTF-8 bytes; a rule of thumb, good to some 30 % for prose
TOKENS_PER_MESSAGE = 4


def count_tokens(messages: Iterable[Mapping]) -> int:
    """Roughly how many tokens some messages are: for estimates, and where an endpoint reports no usage."""
    return sum(len(str(m["content"]).encode()) // CHARACTERS_PER_TOKEN + TOKENS_PER_MESSAGE for m in messages)
