"""The offline teacher's reviews: labels that hold, words from common to rare, and the shipped validation rows."""

from collections import Counter
from random import Random

from synth.examples import read_examples
from synth.offline.reviews import LABELS, WORDS, Reviews
from synth.task import SHIPPED, load_task

TASK = load_task(SHIPPED / "reviews.yaml")
RULE = Reviews()


def test_a_review_is_solved_as_it_was_made():
    found = [RULE.sample(Random(number), None) for number in range(300)]
    assert all(RULE.solve(Random(0), one.input, None) == one.output for one in found)
    counts = Counter(one.output for one in found)
    assert min(counts[label] for label in LABELS) > 110
    assert all(RULE.wrong(Random(0), one.input, one.output) != one.output for one in found)
    assert RULE.solve(Random(0), "what is love", None) is None


def test_harder_reviews_hold_three_opinions_of_which_one_disagrees():
    for number in range(20):
        harder, easier = (RULE.changed(Random(number), "any", step, None) for step in (1, -1))
        words = harder.input.split()
        counts = {label: sum(word in WORDS[label] for word in words) for label in LABELS}
        assert counts[harder.output] == 2 and sum(counts.values()) == 3
        assert sum(word in WORDS[label] for label in LABELS for word in easier.input.split()) == 1


def test_common_words_come_more_often():
    words = Counter(word for n in range(2000) for word in RULE.sample(Random(n), None).input.split())
    common, rare = WORDS["negative"][0], WORDS["negative"][-1]
    assert words[common] > 3 * words[rare] > 0
    assert len(set(WORDS["positive"]) | set(WORDS["negative"])) == 60  # no word is of both, none twice


def test_the_tasks_own_rows_are_right():
    rows = read_examples(SHIPPED.parent / "tuning" / "examples" / "reviews_valid.jsonl", "v") + TASK.demos
    assert len(rows) == 204
    assert all(RULE.solve(Random(0), row["input"], None) == row["output"] for row in rows)
    assert all(TASK.score(row["input"], f"It is {row['output']}.", row["output"]) == 1.0 for row in rows)
