"""Retrieval: BM25 worked by hand, both engines alike, no word lost in cutting, no index older than its library."""

import bz2
import gzip
import json
import lzma
import math
import os
import random
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

import synth.pipeline.retrieval
from benchmarks.retrieval import make_queries, overlap, write_library
from common.errors import UserError
from common.progress import progress
from synth.pipeline.retrieval import ENGINES, Index, best, build_index, cut, library_files, merge, words
from synth.task import load_task

ANIMALS = ["the cat sat on the mat", "the dog sat", "a bird sang in the old tree", "Stones do not sing."]


def write_rows(path, texts, key="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def animals(tmp_path):
    return write_rows(tmp_path / "library" / "animals.jsonl", ANIMALS)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two indexes, one by each engine, of the benchmark's passages."""
    folder = tmp_path_factory.mktemp("large")
    write_library(folder / "library.jsonl", 1500, seed=0)
    return {engine: build_index(folder / "library.jsonl", folder / engine, engine=engine) for engine in ENGINES}


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_by_hand(animals, tmp_path, engine):
    index = build_index(animals, tmp_path / "index", engine=engine)
    assert index.engine == engine and len(index) == 4
    mean = (6 + 3 + 7 + 4) / 4

    def term(found_in, times, length):
        return math.log((4 + 1) / found_in) * times * 2.5 / (times + 1.5 * (0.25 + 0.75 * length / mean))

    expected = [term(2, 1, 6) + term(3, 2, 6), term(2, 1, 3) + term(3, 1, 3), term(3, 1, 7), 0.0]
    assert index.scores("the SAT, the sat; unheard") == pytest.approx(expected, rel=1e-6)
    assert not index.scores("unheard of").any() and not index.scores("").any()


def test_both_engines_give_the_same_scores_and_top_10(large):
    queries = make_queries(50, seed=0)
    by_rank, by_bm25s = (large[engine] for engine in ENGINES)
    for query in queries[:20]:
        np.testing.assert_allclose(by_rank.scores(query), by_bm25s.scores(query), rtol=1e-5, atol=1e-6)
    tops = [[best(index.scores(query), 10) for query in queries] for index in (by_rank, by_bm25s)]
    assert np.mean([len(top) for top in tops[0]]) > 5
    assert overlap(*tops) >= 0.95


def test_the_engine_follows_the_size(animals, tmp_path, monkeypatch):
    monkeypatch.setattr(synth.pipeline.retrieval, "LARGE", 4)
    assert build_index(animals, tmp_path / "four").engine == "rank-bm25"
    write_rows(animals, [*ANIMALS, "one more"])
    assert build_index(animals, tmp_path / "five").engine == "bm25s"


def test_the_large_index_is_memory_mapped(large):
    scores = large["bm25s"]._scores_of.__self__.scores
    assert all(isinstance(scores[name], np.memmap) for name in ("data", "indices", "indptr"))


@pytest.mark.parametrize("engine", ENGINES)
def test_search_finds_and_names_its_passages(animals, tmp_path, engine):
    index = build_index(animals, tmp_path / "index", engine=engine)
    found = index.search("old bird")
    assert found == [("animals.jsonl#2", ANIMALS[2], str(animals))]
    assert index.passage("animals.jsonl#2") == found[0]
    assert [p.id[-1] for p in index.search("the cat sat")] == ["0", "1", "2"]
    assert len(index.search("the cat sat", top_k=2)) == 2
    assert index.search([]) == index.search("") == index.search("unheard") == []


def test_queries_are_merged_by_reciprocal_rank(animals, tmp_path):
    assert merge([[5, 7], [7, 9], [7]]) == [7, 5, 9]  # 1/62 + 1/61 + 1/61; 1/61; 1/62
    assert merge([[3], [1]]) == [1, 3] and merge([]) == []
    index = build_index(animals, tmp_path / "index")
    assert [p.id[-1] for p in index.search(["stones", "bird", "bird tree"])] == ["2", "3"]


def test_best_takes_positive_scores_and_the_lower_number_of_equals():
    scores = np.array([0, 2, 1, 2, 3, 0, 2], dtype=np.float32)
    assert best(scores, 3) == [4, 1, 3] and best(scores, 1) == [4]
    assert best(scores, 6) == best(scores, 100) == [4, 1, 3, 6, 2]
    assert best(np.zeros(4, dtype=np.float32), 2) == []


def test_near_duplicates_are_left_out_and_their_places_filled(tmp_path):
    copies = [f"the quick brown fox jumps over the lazy dog number {i}" for i in range(50)]
    others = [f"a fox {a} lives {b} alone {a}{b}" for a in ("red", "grey", "old") for b in ("here", "there", "far")]
    library = write_rows(tmp_path / "library.jsonl", [*copies, *others])
    found = build_index(library, tmp_path / "index").search("the quick brown fox", 4, near_duplicates=0.9)
    assert [p.id for p in found[:1]] == ["library.jsonl#0"]
    assert len(found) == 4 and all(p.text in others for p in found[1:])


def test_passages_that_differ_in_their_facts_are_all_found(tmp_path):
    """The forty towns stand in one frame: ROUGE-L of 0.7 and more between them."""
    task = load_task("synth/tasks/library_facts.yaml")
    index = build_index(task.write_library(tmp_path), tmp_path / "index")
    assert len(index) == 40 and len(index.search("town founded", top_k=40)) == 40
    assert len(index.search("town founded", top_k=40, near_duplicates=0.7)) < 5
    copies = [" ".join([*(f"word{n}" for n in range(40)), f"copy{i}"]) for i in range(5)]
    library = write_rows(tmp_path / "copies.jsonl", copies)
    copied = build_index(library, tmp_path / "copies")
    assert len(copied.search("word1", top_k=5)) == 1 and copied.repeated == 4
    assert index.search("town founded", top_k=40) and index.repeated == 0


def test_a_text_is_cut_at_sentences():
    text = "One two three. Four five six seven. Eight nine ten eleven twelve thirteen fourteen fifteen."
    assert cut(text, 10, 4) == [
        "One two three. Four five six seven.",
        "Four five six seven. Eight nine ten eleven twelve thirteen",
        "ten eleven twelve thirteen fourteen fifteen.",
    ]
    assert cut("# One\n\n" + "a " * 6 + "\n# Two\nit is $5 (so)", 7, 0) == [
        "# One\n\na a a a a a",
        "# Two\nit is $5 (so)",
    ]
    assert cut("a b $5 -7 (c) d", 2, 0) == ["a b", "$5 -7", "(c) d"]
    assert cut("", 5, 0) == cut(" ... ", 5, 2) == [] and cut(" a b. ", 5, 2) == ["a b."]


@pytest.mark.parametrize("seed", range(20))
def test_cutting_loses_no_word_and_keeps_its_bounds(seed):
    rng = random.Random(seed)
    ends = ["", "", "", "", ".", "!", "?\n", ",", "\n\n", ".\n# "]
    text = " ".join(f"w{i}{rng.choice(ends)}" for i in range(rng.randrange(1, 300)))
    length = rng.randrange(1, 40)
    margin = rng.randrange(0, length // 2 + 1)
    numbers = [[int(word[1:]) for word in words(passage)] for passage in cut(text, length, margin)]
    assert numbers[0][0] == 0 and numbers[-1][-1] == len(words(text)) - 1
    for passage in numbers:
        assert passage == list(range(passage[0], passage[-1] + 1)) and len(passage) <= length
    for one, other in pairwise(numbers):
        assert one[-1] - margin < other[0] <= one[-1] + 1


def test_all_kinds_of_file_are_read(tmp_path):
    library = tmp_path / "library"
    row = json.dumps({"id": 1, "passage": "from json"}).encode()
    contents = {
        "a.jsonl": b"\xef\xbb\xbf" + row + b"\n\n" + json.dumps({"content": "second \u00e4 row"}).encode(),
        "b/a.txt": "Grüße from text\r\n".encode(),
        "c.md": b"# Mark\n\ndown",
        "d.jsonl.gz": gzip.compress(row),
        "e.txt.bz2": bz2.compress(b"from bz2"),
        "f.md.XZ": lzma.compress(b"from xz"),
        "g.csv": b"not read",
        ".hidden/h.txt": b"not read",
        "empty.txt": b"",
    }
    for name, content in contents.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(content)
    index = build_index([library, library / "c.md"], tmp_path / "index")
    found = {p.id: p.text for p in index.search(["from mark row", "second"])}
    assert found == {
        "a.jsonl#0": "from json", "a.jsonl#1": "second ä row", "b/a.txt#0": "Grüße from text",
        "c.md#0": "# Mark\n\ndown", "e.txt.bz2#0": "from bz2", "f.md.XZ#0": "from xz",
    }  # fmt: skip
    assert index.passage("d.jsonl.gz#0").text == "from json"  # a duplicate in a search, and there all the same
    assert index.passage("f.md.XZ#0").source == str(library / "f.md.XZ")


def test_equal_names_of_two_folders_are_told_apart(tmp_path):
    for name in "xy":
        write_rows(tmp_path / name / "a.jsonl", [f"only in {name}"])
    assert list(library_files([tmp_path / "x", tmp_path / "y"])) == ["a.jsonl", "a.jsonl~2"]
    index = build_index([tmp_path / "x", tmp_path / "y"], tmp_path / "index")
    assert index.passage("a.jsonl~2#0").text == "only in y"


def test_rows_and_long_texts_are_cut_and_numbered_on(tmp_path):
    long = ". ".join(f"sentence {i} of the row" for i in range(30))
    library = write_rows(tmp_path / "a.jsonl", [long, "short"], key="body")
    index = build_index(library, tmp_path / "index", length=20, overlap=5, text_key="body")
    assert [index.passage(f"a.jsonl#{i}").text for i in range(len(index))] == [*cut(long, 20, 5), "short"]
    text = "".join(f"Paragraph {i} says little.\n\n" for i in range(20_000))
    (tmp_path / "b.txt").write_text(text)
    index = build_index(tmp_path / "b.txt", tmp_path / "index", length=10, overlap=0, engine="bm25s")
    assert [p.text for p in index.search("13579", 1)] == [
        "Paragraph 13578 says little.\n\nParagraph 13579 says little."
    ]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "odd \\ud800 text"}')
    assert build_index(tmp_path, tmp_path / "index").passage("a.jsonl#0").text == "odd ? text"


def marker_time(folder):
    return (folder / synth.pipeline.retrieval.MARKER).stat().st_mtime_ns


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unchanged_library_is_opened_and_a_changed_one_indexed_anew(animals, tmp_path, engine):
    folder = tmp_path / "index"
    old = build_index(animals.parent, folder, engine=engine)
    made = marker_time(folder)
    assert build_index(animals.parent, folder, engine=engine).search("bird")[0].id == "animals.jsonl#2"
    assert marker_time(folder) == made
    size = animals.stat().st_size
    write_rows(animals, ["the bird sat on a mat.", *ANIMALS[1:]])
    assert animals.stat().st_size == size
    os.utime(animals, ns=(1, 1))  # where the clock is coarse, the write alone may not show
    new = build_index(animals.parent, folder, engine=engine)
    assert len(new.search("bird")) == 2 and marker_time(folder) != made
    assert [p.text for p in old.search("cat")] == [ANIMALS[0]]  # an open one keeps what it opened
    write_rows(animals.parent / "more.jsonl", ["a late bird"])
    assert len(build_index(animals.parent, folder, engine=engine)) == 5
    assert len(build_index(animals.parent, folder, engine=engine, length=3, overlap=1)) > 5


def test_an_unchanged_library_is_not_read(animals, tmp_path, monkeypatch):
    build_index(animals, tmp_path / "index")
    monkeypatch.setattr(synth.pipeline.retrieval, "_lines", None)
    assert build_index(animals, tmp_path / "index").search("bird")


def test_a_failed_build_leaves_the_old_index(animals, tmp_path):
    folder = tmp_path / "index"
    build_index(animals, folder)
    animals.write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(UserError, match=r"animals\.jsonl:2 is not valid JSON"):
        build_index(animals, folder)
    assert Index(folder).search("bird")[0].text == ANIMALS[2]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_text_is_never_held_whole(tmp_path):
    """The build's own arrays are one or two numbers a word and a passage; 4 MB of text would stand out."""
    line = " ".join(f"word{i}" for i in range(100))
    path = write_rows(tmp_path / "a.jsonl", [line] * 6000)
    (tmp_path / "out").mkdir()
    with progress(1, "reading", "byte") as bar:
        tracemalloc.start()
        synth.pipeline.retrieval._write_passages({"a.jsonl": path}, tmp_path / "out", 200, 40, None, bar)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert path.stat().st_size > 4e6 and peak < 1e6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 1}\n', r"a\.jsonl:3 has 'text' of type int"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 is list, not an object"),
        ("a.jsonl", b'{"body": "a"}\n', r"a\.jsonl:1 has the keys \['body'\]; it needs 'text' or 'passage' or"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not valid JSON"),
        ("a.txt", b"fine\nGr\xfc\xdfe\n", r"a\.txt:2 is not UTF-8 \(byte 2 of the line\)"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz cannot be read after line 0"),
        ("a.txt.gz", gzip.compress(b"a\n" * 9999, mtime=0)[:-9], r"a\.txt\.gz cannot be read after line [0-9]"),
        ("a.txt.bz2", b"not packed", r"a\.txt\.bz2 cannot be read after line 0"),
        ("a.md.xz", b"not packed", r"a\.md\.xz cannot be read after line 0"),
        ("a.txt", b" ... \n", r"a\.txt has no words"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        build_index(tmp_path / name, tmp_path / "index")
    assert "\n" not in str(caught.value) and not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"library": "nowhere"}, "nowhere does not exist"),
        ({"library": []}, "names no file"),
        ({"library": "."}, "holds no .jsonl, .txt or .md"),
        ({"length": 10, "overlap": 6}, "10 words cannot overlap by 6"),
        ({"length": 0, "overlap": 0}, "passages of 0 words"),
        ({"engine": "okapi"}, "engine 'okapi' is not known; use one of rank-bm25, bm25s"),
        ({"text_key": "body"}, "it needs 'body'"),
        ({"folder": "file"}, "is a file"),
        ({"folder": "other"}, "holds other files"),
    ],
)
def test_a_users_mistake_is_one_line(animals, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    (tmp_path / "empty" / "file").write_text("mine")
    (tmp_path / "empty" / "other").mkdir()
    (tmp_path / "empty" / "other" / "photo.png").write_text("mine")
    with pytest.raises(UserError, match=message):
        build_index(**{"library": animals, "folder": tmp_path / "index", **arguments})


@pytest.mark.parametrize("passage_id", ["animals.jsonl#4", "animals.jsonl#-1", "animals.jsonl", "other#0", "#", ""])
def test_an_unknown_passage_is_named(animals, tmp_path, passage_id):
    with pytest.raises(UserError, match="has no passage"):
        build_index(animals, tmp_path / "index").passage(passage_id)


def test_the_benchmarks_overlap_and_library():
    assert overlap([[1, 2], [3], []], [[2, 3], [3], []]) == 0.75
    assert make_queries(3, seed=0) == make_queries(3, seed=0) != make_queries(3, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("retrieval_index.json", "[]", "retrieval_index.json has something else"),
        ("retrieval_index.json", '{"made_from": 3}', "retrieval_index.json lacks engine"),
        ("vocab.index.json", '{"a": "1"}', "'1' as a"),
        ("passage_ends.npy", "", "index cannot be read"),
        ("passages.bin", "", "index cannot be read"),
    ],
)
def test_a_damaged_index_is_a_line(animals, tmp_path, name, content, said):
    build_index(animals, tmp_path / "index")
    assert (tmp_path / "index" / name).is_file()
    (tmp_path / "index" / name).write_text(content)
    with pytest.raises(UserError) as caught:
        Index(tmp_path / "index")
    assert said in str(caught.value) and "delete that folder" in str(caught.value)
