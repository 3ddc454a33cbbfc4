"""data.tokenizer: a model's tokenizer without its weights, and every token that ends a turn."""

import json
import shutil
import sys

import pytest

from common import locate
from common.errors import UserError
from data.check import encode
from data.tokenizer import open_tokenizer
from models.loading import load
from tests.chat_tokenizers import CHATML, byte_tokenizer


@pytest.fixture
def two_ends(tiny_folder, tmp_path):
    """A model whose generation_config.json names an end besides the tokenizer's; config.json does not."""
    folder = tmp_path / "two-ends"
    shutil.copytree(tiny_folder, folder)
    byte_tokenizer(CHATML, eos="</s>").save_pretrained(folder)
    end = byte_tokenizer(CHATML).convert_tokens_to_ids("<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    return folder, {1, end}


def test_the_ends_are_those_of_the_generation_config_as_in_training(two_ends):
    folder, ends = two_ends
    assert open_tokenizer(str(folder)).eos_token_ids == load(str(folder)).tokenizer.eos_token_ids == ends


def test_what_is_shown_as_trained_is_what_is_trained(two_ends):
    folder, _ = two_ends
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    shown, trained = (encode(tokenizer, row, True) for tokenizer in (open_tokenizer(str(folder)),
                                                                       load(str(folder)).tokenizer))  # fmt: skip
    assert shown == trained
    # The turn ends with its <|im_end|>; the newline after it is not trained, and no </s> is added.
    assert open_tokenizer(str(folder)).decode(shown[1][0].tokens).endswith("yes<|im_end|>")


def test_without_mlx_lm_it_is_transformers_with_the_same_ends(two_ends, monkeypatch):
    folder, ends = two_ends
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    tokenizer = open_tokenizer(str(folder))
    assert type(tokenizer).__module__.startswith("transformers") and tokenizer.eos_token_ids == ends


def test_an_end_that_is_no_token_is_one_line(two_ends):
    folder, _ = two_ends
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 1000000000000]}')
    with pytest.raises(UserError, match=r"has 1000000000000 as eos_token_id, which is none of its .* tokens"):
        open_tokenizer(str(folder))


def test_a_damaged_tokenizer_is_one_line(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer of .* cannot be opened"):
        open_tokenizer(str(folder))


def test_other_names_are_left_to_a_process_which_gives_the_folder_or_the_error(tiny_digits, tmp_path):
    assert locate.locate("tiny-digits") == tiny_digits
    with pytest.raises(UserError, match=r"^\./missing is not a model folder"):
        locate.locate("./missing")
    assert locate.locate(str(tiny_digits)) == tiny_digits
