"""Captions as vectors: what is a word and what is padding, and what is refused."""

import sys

import numpy as np
import pytest
import torch

import text
from files import UserError
from scenes import caption_list
from text import EncodedPrompts, Prompts, encode_words, read_prompts, scene_prompts


def test_words_are_vectors_and_the_rest_is_zero():
    vectors = encode_words("a red star")
    assert vectors.shape == (8, text.TEXT_WIDTH)
    assert (np.abs(vectors).sum(1) > 0).tolist() == [True] * 3 + [False] * 5


def test_a_word_has_the_same_vector_everywhere_and_a_place_of_its_own():
    first = encode_words("a red star left of a blue ring")
    width = text.WORD_WIDTH
    word, before, place = np.split(first, [width, 2 * width], axis=1)
    assert np.array_equal(word[0], word[5])  # "a"
    assert len({tuple(row) for row in word}) == 7
    assert np.array_equal(before[1:], word[:-1]) and not before[0].any()
    assert len({tuple(row) for row in place}) == 8


def test_prompts_are_looked_up_by_number_and_minus_one_is_the_empty_prompt():
    prompts = Prompts(["a red star", "two blue rings"])
    found = prompts[torch.tensor([1, 0, -1])]
    assert torch.equal(found[0], torch.from_numpy(encode_words("two blue rings")))
    assert torch.equal(found[2], torch.from_numpy(encode_words("")))
    assert (found.abs().sum(-1) > 0).sum(1).tolist() == [3, 3, 1]  # the empty prompt has one token


def test_every_caption_of_training_fits():
    prompts = scene_prompts()
    assert len(prompts) == 2700 and prompts.vectors.shape == (2701, 8, text.TEXT_WIDTH)
    assert len({row.numpy().tobytes() for row in prompts.vectors}) == 2701  # all are told apart
    assert prompts.texts[:1728] == [str(caption) for caption in caption_list()]


def test_an_unknown_word_is_named_with_the_nearest_known_ones():
    with pytest.raises(UserError, match="'yelow' of the prompt 'a yelow star'.*mean yellow"):
        encode_words("a yelow star")
    with pytest.raises(UserError, match="'qqq'.*known words: a, above"):
        encode_words("qqq")


def test_a_long_prompt_is_cut_and_says_so(capsys):
    long = "a red star left of a blue ring and a red star"
    cut = encode_words(long)
    assert "is cut after 8 words" in capsys.readouterr().out
    assert np.array_equal(cut, encode_words("a red star left of a blue ring"))


@pytest.mark.parametrize("content, message", [(None, "cannot read"), ("\n \n", "holds no prompts")])
def test_files_without_prompts(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(file)


def test_a_folder_that_holds_no_prompts(tmp_path):
    with pytest.raises(UserError, match="no folder of encoded prompts"):
        EncodedPrompts(tmp_path)


def test_a_tiny_t5_encodes_prompts_once(tmp_path, monkeypatch, capsys):
    """A random T5 of transformers, with a tokenizer of whole words. The file on disk holds what the
    encoder itself gives, in float16; padding is zero; what is there is not written again."""
    transformers = pytest.importorskip("transformers", reason="optional package: transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="optional package: tokenizers")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "star", "blue", "ring"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=8, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
    )
    encoder = transformers.T5EncoderModel(config).eval()
    encoder.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue ring a red star\n")
    words = ["text.py", "--prompts", tmp_path / "prompts.txt", "--encoder", tmp_path / "t5"]
    words += ["--out", tmp_path / "out", "--length", 6, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    text.main()
    said = capsys.readouterr().out
    assert "1 empty lines" in said and "cut after 6 of 7 tokens" in said

    prompts = EncodedPrompts(tmp_path / "out")
    found = prompts[torch.tensor([0, -1])]
    for vectors, prompt in zip(found, ("a red star", ""), strict=True):
        batch = tokenizer([prompt], return_tensors="pt")
        with torch.no_grad():
            expected = encoder(**batch).last_hidden_state[0]
        torch.testing.assert_close(vectors[: len(expected)], expected, rtol=2e-3, atol=2e-3)
        assert vectors[len(expected) :].abs().sum() == 0
    shard = tmp_path / "out" / "00000.npy"
    before = shard.stat().st_mtime_ns
    text.main()
    assert shard.stat().st_mtime_ns == before

    monkeypatch.setattr(text, "SHARD", 2)  # 2 prompts and the empty one: two shards
    shared = [*map(str, words[:-5]), str(tmp_path / "shared"), "--length", "6", "--device", "cpu"]
    for worker in ("1/2", "2/2"):  # neither waits for the other
        monkeypatch.setattr(sys, "argv", [*shared, "--worker", worker])
        text.main()
    assert {file.name for file in (tmp_path / "shared").glob("*.npy")} == {"00000.npy", "00001.npy"}
