"""A run's report: its figures by hand, every part missing in turn, and a teacher's text that stays text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

import synth.pipeline.report
from common.errors import UserError
from synth.pipeline.charts import curve, intervals, ticks
from synth.pipeline.report import (
    AMOUNTS,
    as_script,
    margin_counts,
    rate_bins,
    rate_counts,
    read_run,
    samples,
    verdict,
    write_report,
)
from synth.stages import drop, kept, new_row, write_rows

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script><!-- \u2028\u2029 {{rows}} {{end}} \"'&"


class Page(HTMLParser):
    """The elements of a page, and the text of those that hold raw text, as a browser divides them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.within, self.raw = [], "", "", {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.within = f"{tag} {dict(attrs).get('type', '')}".strip() if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within:
            self.raw[self.within] = self.raw.get(self.within, "") + data
        else:
            self.text += data

    @property
    def rows(self):
        return json.loads(self.raw["script application/json"])

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def voted(row, votes, **fields):
    cast = sum(votes.values())
    first, second, *_ = [*sorted(votes.values(), reverse=True), 0]
    return {**row, "votes": votes, "cast": cast, "margin": (first - second) / cast, **fields}


def tried(row, solved, rollouts=8):
    return {**row, "solved": solved, "rollouts": rollouts, "pass_rate": solved / rollouts}


def stages():
    """Six samples: a refusal, a tie, and four tried; g1 made harder, and its harder one's harder one refused."""
    rows = [new_row(f"g{n}", f"{n} + {n}", str(2 * n), "generated", passage=f"p{n}") for n in range(1, 7)]
    rows[4] = drop({**rows[4], "input": "", "output": ""}, "no sample: refusal", "an apology")
    verified = [voted(row, {row["output"]: 9, "7": 1}) for row in kept(rows)]
    verified[4] = drop(voted(verified[4], {"12": 5, "7": 5}), "tie", "5 of 10 votes for one answer")
    done = [tried(row, solved) for row, solved in zip(kept(verified), (8, 4, 1, 0), strict=True)]
    harder = tried(voted(new_row("g1h", "11 + 11", "22", "harder", "g1", "p1"), {"22": 10}), 3)
    done += [harder, drop(new_row("g1hh", "", "", "harder", "g1h", "p1"), "no sample: truncated", "cut")]
    selected = [drop(r, "pass rate outside the band", "0") if r["pass_rate"] in (0, 1) else r for r in kept(done)]
    return {"generate": rows, "verify": verified, "difficulty": done, "selection": selected}


SPENT = {"cached": 5, "retries": 6, "prompt_tokens": 70, "completion_tokens": 8, "money": 0.25}
LEDGER = {"generate": {"calls": 1234, **SPENT}, "total": {"calls": 4321, **SPENT}}
EVALUATION = {
    "questions": 400,
    "base": {"mean": 0.25, "low": 0.2, "high": 0.31},
    "trained": {"mean": 0.75, "low": 0.69, "high": 0.8},
    "difference": {"mean": 0.5, "low": 0.45, "high": 0.55, "gained": 210, "lost": 10},
}
CHECKPOINTS = {
    "held_out": 7,
    "chosen": 4,
    "checkpoints": [{"step": 0, "mean_score": 0.25}, {"step": 4, "mean_score": 1}],
}
PARTS = ["generate.jsonl", "verify.jsonl", "difficulty.jsonl", "selection.jsonl", "config.json", "ledger.json"]
PARTS += ["checkpoints.json", "evaluation.json", "rl/metrics.jsonl"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "sums"
    for name, rows in stages().items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "config.json").write_text(json.dumps({"task": "sums.yaml", "base_model": "tiny", "count": 6}))
    (folder / "ledger.json").write_text(json.dumps(LEDGER))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "checkpoints.json").write_text(json.dumps(CHECKPOINTS))
    (folder / "rl").mkdir()
    lines = [{"step": 1, "mean_score": 0.2}, {"step": 2, "kl": 0.1}, {"step": 3, "mean_score": None}]
    lines += [{"step": 4, "mean_score": 0.6}]
    (folder / "rl/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "me')
    return folder


def plain(path):
    """A page's markup without tags: cells parted by blanks."""
    return " ".join(re.sub(r"<[^>]*>", " ", path.read_text(encoding="utf-8").split("<script")[0]).split())


def test_what_was_kept_and_dropped_is_counted_by_hand(folder):
    text = plain(write_report(folder))
    assert "generate kept 5 83.3 % no sample: refusal 1 16.7 %" in text
    assert "verify kept 4 80.0 % tie 1 20.0 %" in text
    assert "difficulty kept: 4 generated, 1 harder 5 83.3 % no sample: truncated 1 16.7 %" in text
    assert "selection kept: 2 generated, 1 harder 3 60.0 % pass rate outside the band 2 40.0 %" in text
    assert "5 of 6 samples readable. 4 of 5 samples verified. 5 of 6 samples kept with a pass rate" in text
    assert "called 4,321 times, for 78 tokens." in text and "0.250 before training, 0.750 after" in text
    assert "before: as generated (4)" in text and "after: with harder and easier ones (5)" in text
    assert "dropped by the vote (1)" in text and "kept (5)" in text  # selection is no vote
    assert "generate 1,234 5 6 70 8 0.2500 total 4,321 5 6 70 8 0.2500" in text
    assert "Mean score on the 400 questions of the evaluation set" in text
    assert "base 0.250 0.200 to 0.310 trained 0.750 0.690 to 0.800 difference 0.500 0.450 to 0.550" in text
    assert "Mean score on 7 held-out samples by step: step 4 was chosen" in text and "Mean score by step: rl" in text
    assert "Not in the run folder" not in text


def test_every_sample_stands_in_the_table_once_as_its_last_stage_left_it(folder):
    rows = {row["id"]: row for row in Page(write_report(folder)).rows}
    assert list(rows) == ["g1", "g2", "g3", "g4", "g5", "g6", "g1h", "g1hh"]
    ends = {row_id: row["outcome"] for row_id, row in rows.items()}
    assert ends["g5"] == "generate: no sample: refusal" and ends["g6"] == "verify: tie"
    assert ends["g1"] == ends["g4"] == "selection: pass rate outside the band"
    assert ends["g2"] == ends["g3"] == ends["g1h"] == "selected"
    assert ends["g1hh"] == "difficulty: no sample: truncated"
    assert (rows["g1h"]["parent"], rows["g1h"]["passage"], rows["g1h"]["rate"]) == ("g1", "p1", 0.375)
    assert rows["g2"]["votes"] == [["4", 9], ["7", 1]] and rows["g2"]["margin"] == 0.8 and rows["g2"]["cast"] == 10


def test_a_row_that_is_carried_along_is_counted_where_it_was_dropped():
    rows = [new_row("a", "1", "1", "generated"), drop(new_row("b", "2", "2", "generated"), "tie")]
    found = samples({"generate": rows, "verify": [rows[0], drop(rows[1], "another reason")]})
    assert [row["outcome"] for row in found] == ["kept by verify", "generate: tie"]


def test_every_column_of_the_ledger_and_every_origin_is_explained_where_it_stands(folder):
    text = plain(write_report(folder))
    ledger, kept_and_dropped = text[text.index("Ledger") :], text[text.index("Kept and dropped") :]
    for name in AMOUNTS:
        assert name.split("_")[0].casefold() in ledger.partition("stage calls")[0].casefold()
    for origin in ("generated", "harder", "easier"):
        assert origin in kept_and_dropped.partition("stage outcome")[0].partition("Origins:")[2]
    assert "95 % interval: " in text


def test_the_teacher_is_named(folder):
    assert "Task: sums.yaml. Base model: tiny. 5 of 6" in plain(write_report(folder))
    for given, said in ((None, "Teacher: the offline one."), ("http://a/v1", "Teacher: gpt.")):
        settings = {"teacher_url": given, "teacher_model": given and "gpt"}
        (folder / "config.json").write_text(json.dumps(settings))
        assert said in plain(write_report(folder))


def test_held_out_samples_are_named_and_counted(folder):
    rows = stages()
    write_rows(folder / "held_out.jsonl", [row for row in rows["difficulty"] if row["id"] == "g2"])
    write_rows(folder / "selection.jsonl", [row for row in rows["selection"] if row["id"] != "g2"])
    path = write_report(folder)
    ends = {row["id"]: row["outcome"] for row in Page(path).rows}
    assert ends["g2"] == "held out" and ends["g3"] == "selected"
    assert "1 harder 5 83.3 % of these held out, to choose the checkpoint 1 16.7 %" in plain(path)


def test_a_training_outside_the_run_folder_has_its_curve(folder, tmp_path):
    (folder / "rl" / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    (folder / "config.json").write_text(json.dumps({"work_model_paths": str(tmp_path)}))
    assert read_run(folder).curves == {tmp_path.name: [(1, 0.2), (4, 0.6)]}
    (folder / "config.json").write_text(json.dumps({"work_model_paths": str(folder / "rl")}))
    (tmp_path / "metrics.jsonl").rename(folder / "rl" / "metrics.jsonl")
    assert list(read_run(folder).curves) == ["rl"]


def test_scores_beyond_one_have_an_axis_that_reaches_them():
    labels = re.findall(r'text-anchor="middle">([^<]*)<', intervals("scores", {"base": (2.5, -0.5, 3.5)}))
    assert labels == ["-1", "0", "1", "2", "3", "4"]
    labels = re.findall(r'text-anchor="middle">([^<]*)<', intervals("scores", {"base": (0.5, 0.25, 0.75)}))
    assert labels == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_missing_and_is_named(folder, part):
    (folder / part).unlink()
    text = plain(write_report(folder))
    missing = re.search(r"Not in the run folder \(yet\): (.*?)\. ", text)
    assert missing and missing[1] == (part if "/" not in part else "metrics.jsonl with mean_score")


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_all_there_is(folder, part):
    for other in PARTS:
        if other != part:
            (folder / other).unlink()
    path = write_report(folder)
    assert f" {part.rpartition('/')[2]}" not in plain(path).partition("Not in the run folder")[2].partition(". ")[0]
    assert len(Page(path).rows) == (len(stages()[part.removesuffix(".jsonl")]) if part in PARTS[:4] else 0)


def test_a_stage_that_was_given_nothing_has_an_empty_file(folder):
    (folder / "selection.jsonl").write_text("")
    assert "selection kept 0 – " in plain(write_report(folder))


def test_a_half_evaluation_is_shown_as_far_as_it_goes(folder):
    (folder / "evaluation.json").write_text(json.dumps({"base": EVALUATION["base"], "trained": {"mean": None}}))
    text = plain(write_report(folder))
    assert "base 0.250" in text and "trained" not in text and "before training" not in text


def test_a_teachers_text_stays_text(folder):
    rows = stages()["generate"]
    rows[0] |= {"id": EVIL, "input": EVIL, "output": EVIL, "passage": EVIL, "parent": EVIL, "votes": {EVIL: 3}}
    rows[0] |= {"origin": EVIL, "cast": 3, "margin": 1.0, "outvoted": EVIL}
    rows[1] = drop(rows[1], EVIL, EVIL)
    with (folder / "generate.jsonl").open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("verify", "difficulty", "selection"):
        (folder / f"{name}.jsonl").unlink()
    (folder / "config.json").write_text(json.dumps({"task": EVIL, EVIL: [EVIL]}))
    (folder / "ledger.json").write_text(json.dumps({EVIL: LEDGER["total"]}))
    page = Page(write_report(folder))
    assert not page.all("img") and len(page.all("script")) == 2 and len(page.all("style")) == 1
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name in ("style", "src")]
    raw = page.raw["script application/json"]
    assert not set("<>&\u2028\u2029") & set(raw) and raw.isascii()
    assert all(page.rows[0][name] == EVIL for name in ("id", "input", "output", "passage", "parent", "origin"))
    assert page.rows[1]["outcome"] == f"generate: {EVIL}"
    assert page.rows[0]["votes"] == [[EVIL, 3]] and page.rows[1]["detail"] == EVIL
    assert page.text.count(EVIL) == 6  # task (twice), origin, reason, ledger, flag; one value is JSON
    assert page.text.count("<img src=x") == 7


def test_the_policy_admits_the_pages_own_script_and_style_and_nothing_else(folder):
    page = Page(write_report(folder))
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)

    def digest(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": digest(page.raw["style"]),
        "script-src": digest(page.raw["script"]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_page_asks_for_nothing_and_builds_no_markup_from_text(folder):
    page = Page(write_report(folder))
    assert not {"link", "img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    code = page.raw["script"] + page.raw["style"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|://|url\(|@import", code)


def test_every_control_and_picture_has_a_name(folder):
    page = Page(write_report(folder))
    assert all(
        svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"]) for svg in page.all("svg")
    )
    text = synth.pipeline.report.TEMPLATE.read_text()
    labelled = re.findall(r"<label[^>]*>[^<]+<(?:input|select) id", text)
    assert len(labelled) == len(page.all("input")) + len(page.all("select")) == 5
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and set(re.findall(r'at\("(\w+)"\)', text)) <= set(ids)


def test_pass_rates_are_binned_by_the_rollouts_and_the_ends_are_exact():
    def row(solved, rollouts=8):
        return tried(new_row("a", "", "", "generated"), solved, rollouts)

    rows = [
        row(0),
        row(1),
        row(4),
        row(4),
        row(7),
        row(8),
        row(0, 32),
        row(1, 32),
        row(15, 32),
        row(31, 32),
        row(32, 32),
    ]
    assert rate_bins(rows) == 8
    assert rate_counts([*rows, new_row("b", "", "", "generated")], 8) == [2, 2, 0, 0, 3, 0, 0, 2, 2]
    assert rate_bins([row(1, 100)]) == rate_bins([]) == 10


def test_margins_are_binned_in_tenths():
    rows = [{"margin": margin} for margin in (0, 0.05, 0.1, 0.3, 0.7, 0.99, 1.0, None)]
    assert margin_counts(rows) == [2, 1, 0, 1, 0, 0, 0, 1, 0, 2]


def test_ticks_enclose_what_is_drawn_with_round_steps():
    assert ticks(0, 87, 4) == [0, 50, 100]
    assert ticks(0.42, 0.83) == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert ticks(-3, 7) == [-5, 0, 5, 10]
    for low, high in ((0.5, 0.5), (0, 0), (1e-9, 3e-9), (-2.5e6, 1e7), (3, 3)):
        marks = ticks(low, high)
        assert marks[0] <= low <= high <= marks[-1] and 2 <= len(marks) <= 7, (low, high, marks)


def test_the_curve_of_a_chart_runs_through_its_points():
    drawn = curve("score", [(0, 0.0), (5, 1.0), (10, 0.5)])
    points = re.search(r'polyline points="([^"]*)"', drawn)
    assert points and points[1] == "58.0,188.0 227.0,10.0 396.0,99.0"
    assert "polyline" not in curve("score", [(3, 0.5)]) and "circle" in curve("score", [(3, 0.5)])


def test_the_learning_curve_skips_what_is_no_score_and_a_line_cut_off(folder):
    assert read_run(folder).curves == {"rl": [(1, 0.2), (4, 0.6)]}


def test_json_in_a_script_is_equal_after_reading():
    assert json.loads(as_script([EVIL, {"a": 1.5, "b": None}])) == [EVIL, {"a": 1.5, "b": None}]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [("generate.jsonl", "{", "generate.jsonl:1 is not valid JSON"), ("verify.jsonl", '{"id": "a"}', "has the keys"),
     ("ledger.json", "[]", "input should be an object"), ("evaluation.json", "", "is not valid JSON")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(folder, file, content, said):
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_command_writes_the_report_and_names_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    synth.pipeline.report.main()
    assert capsys.readouterr().out.strip() == str(folder / "report.html") and (folder / "report.html").is_file()
    for wrong, said in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "holds no run")):
        with pytest.raises(UserError, match=said):
            write_report(wrong)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ((0.125, 0.05, 0.2), "Training helped: the mean score went from 0.500 to 0.625 (+0.125); "),
        ((0.125, -0.05, 0.3), "It is not certain that training changed anything: the mean score went from 0.500"),
        ((-0.25, -0.4, -0.1), "Training did harm: the mean score went from 0.500 to 0.250 (-0.250); "),
    ],
)
def test_the_verdict_says_whether_it_helped_by_how_much_and_whether_that_is_certain(difference, said):
    after = 0.5 + difference[0]
    line = verdict({"base": (0.5, 0.4, 0.6), "trained": (after, 0.0, 1.0), "difference": difference}, 200)
    assert line.startswith(said) and "on 200 questions" in line
    assert ("includes 0" in line) == (difference[1] <= 0 <= difference[2])
    assert verdict({"base": (0.5, 0.4, 0.6)}, 200).startswith("No verdict")
