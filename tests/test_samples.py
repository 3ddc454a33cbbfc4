"""Samples as a plain-text table."""

from training.samples import text_table


def test_columns_are_aligned_under_their_names():
    rows = [{"score": 0.5, "prompt": "2 4", "completion": " 6"}, {"score": -10.25, "prompt": "a", "completion": ""}]
    assert text_table(rows).splitlines() == [
        "  score  prompt  completion",
        "  0.500  2 4      6",
        "-10.250  a",
    ]
    assert text_table([]) == ""


def test_a_text_is_one_line_and_cut():
    (_, row) = text_table([{"completion": 'a\nb\t"c"\x1b[31m\u2028é 🙂' + "x" * 30}], width=26).splitlines()
    assert row == 'a\\nb\\t"c"\\u001b[31m\N{REPLACEMENT CHARACTER}é 🙂xx…' and len(row) == 26
    assert "\N{REPLACEMENT CHARACTER}" in text_table([{"completion": "\ud800\x85"}])


def test_what_is_as_long_as_the_width_is_whole():
    assert text_table([{"t": "x" * 9}], width=9).endswith("x" * 9)
    assert text_table([{"t": "x" * 10}], width=9).endswith("x" * 8 + "…")


def test_lines_that_all_begin_with_are_left_out_where_a_text_would_be_cut():
    rows = [{"prompt": f"system\nYou help.\nuser\nWhat is {n}?"} for n in (1, 2)]
    assert text_table(rows, width=25).splitlines()[1:] == ["…What is 1?", "…What is 2?"]
    assert "system" in text_table(rows, width=60) and "system" in text_table(rows[:1], width=25)
    assert "…" not in text_table([{"prompt": "12"}, {"prompt": "13"}])
