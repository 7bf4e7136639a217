"""Tokenizers: loaded from anywhere, trained here, and the same under the same fingerprint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers

from rho.errors import ConfigError, DataError
from rho.tokenizer import EOS, Tokenizer, token_bytes, train_tokenizer

TEXT = "The shift by one,  naïve 東京 🙂\n\tand `code`."


def backend(special: list[str], vocab_size: int = 280) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


def saved(made: tokenizers.Tokenizer, folder: Path) -> Path:
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ids(tokenizer: Tokenizer, text: str = TEXT) -> list[int]:
    return tokenizer.encode([text])[0][0].tolist()


def plain() -> tokenizers.Tokenizer:
    return backend([EOS])


def llama_like() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def padding_and_truncating() -> tokenizers.Tokenizer:
    made = plain()
    made.enable_truncation(8)
    made.enable_padding(length=20, pad_token="<pad>", pad_id=0)
    return made


def end_token_of_plain_text() -> tokenizers.Tokenizer:
    made = backend([])
    made.add_tokens([AddedToken("</s>", normalized=True, rstrip=True)])
    return made


def end_token_only_in_the_vocabulary() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel({"The": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


KINDS = [plain, llama_like, padding_and_truncating, end_token_of_plain_text, end_token_only_in_the_vocabulary]


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_changes_neither_ids_nor_fingerprint(tmp_path, kind):
    first = Tokenizer.load(saved(kind(), tmp_path))
    before = (first.fingerprint, first.eos, first.vocab_size, first.special_ids, ids(first, TEXT + first.eos))
    first.save(tmp_path / "one")
    second = Tokenizer.load(tmp_path / "one")
    second.save(tmp_path / "two")
    for tokenizer in (first, second, Tokenizer.load(tmp_path / "two")):
        found = (
            tokenizer.fingerprint,
            tokenizer.eos,
            tokenizer.vocab_size,
            tokenizer.special_ids,
            ids(tokenizer, TEXT + tokenizer.eos),
        )
        assert found == before


def test_a_files_own_truncation_and_padding_don_t_apply_to_documents(tmp_path):
    tokenizer = Tokenizer.load(saved(padding_and_truncating(), tmp_path))
    assert ids(tokenizer) == ids(Tokenizer.load(saved(plain(), tmp_path)))
    assert tokenizer.backend.decode(ids(tokenizer)) != ""


def test_no_special_tokens_are_added_to_a_document(tmp_path):
    tokenizer = Tokenizer.load(saved(llama_like(), tmp_path))
    assert tokenizer.backend.token_to_id("<s>") not in ids(tokenizer)


def test_another_merge_token_or_end_is_another_fingerprint(tmp_path):
    prints = {Tokenizer.load(saved(backend([EOS], size), tmp_path)).fingerprint for size in (280, 281)}
    prints.add(Tokenizer.load(saved(backend([EOS, "<pad>"]), tmp_path)).fingerprint)
    prints.add(Tokenizer.load(saved(backend([EOS, "</s>"]), tmp_path), eos="</s>").fingerprint)
    prints.add(Tokenizer.load(saved(backend([EOS, "</s>"]), tmp_path), eos=EOS).fingerprint)
    lower = backend([EOS])
    lower.normalizer = normalizers.Lowercase()
    prints.add(Tokenizer.load(saved(lower, tmp_path)).fingerprint)
    assert len(prints) == 6


def test_a_tokenizer_loads_from_file_folder_and_corpus(tokenizer_folder, corpus):
    places = (tokenizer_folder / "tokenizer.json", tokenizer_folder, corpus / "tokenizer")
    assert len({Tokenizer.load(place).fingerprint for place in places}) == 1


def test_a_tokenizer_without_end_token_is_refused_until_one_is_named(tmp_path):
    path = saved(backend(["<stop>"]), tmp_path)
    with pytest.raises(ConfigError, match=r"no end-of-document token: its vocabulary has none of .*with --eos"):
        Tokenizer.load(path)
    with pytest.raises(ConfigError, match="no end-of-document token: its vocabulary has no <end>"):
        Tokenizer.load(path, eos="<end>")
    tokenizer = Tokenizer.load(path, eos="<stop>")
    assert tokenizer.eos_id in tokenizer.special_ids


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(path)


def test_a_place_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer could be loaded from here"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="No file or folder of that name is in"):
        Tokenizer.load("no/such-tokenizer")


@pytest.mark.parametrize("stage", ["model", "tokenizer"])
def test_a_stage_folder_stands_for_the_tokenizer_in_it(tokenizer_folder, tmp_path, stage):
    shutil.copytree(tokenizer_folder, tmp_path / stage)
    assert Tokenizer.load(tmp_path).fingerprint == Tokenizer.load(tokenizer_folder).fingerprint


@pytest.mark.parametrize("place", ["models/of/mine", "./mine", "/mine", "~/mine", "tokenizer.json"])
def test_a_path_that_leads_nowhere_is_not_asked_for_on_the_hub(place):
    with pytest.raises(ConfigError, match=rf"^{place}: no such file or folder \(seen from "):
        Tokenizer.load(place)


def test_ends_are_the_characters_at_which_tokens_end(tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    text = "12 é🙂"
    found_ids, ends = tokenizer.encode([text])[0]
    assert tokenizer.backend.decode(found_ids.tolist()) == text
    assert ends.tolist()[:2] == [1, 2]
    assert ends[-1] == len(text)


@settings(deadline=None)
@given(st.text())
def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer_folder, text):
    ids, ends = Tokenizer.load(tokenizer_folder).encode([text])[0]
    if len(ids):
        sizes = token_bytes(text, ends)
        assert len(sizes) == len(ids)
        assert sizes.sum() == len(text.encode())
        assert (sizes >= 0).all()


def test_each_character_counts_once_however_many_tokens_it_takes():
    # a | 🙂 in three tokens | é ; the last token's end is cut short by a tokenizer that trims
    assert token_bytes("a🙂é ", np.array([1, 2, 2, 2, 3])).tolist() == [1, 4, 0, 0, 3]


def test_pieces_show_each_token_as_text(tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    found, _ = tokenizer.encode(["12 e"])[0]
    assert "".join(tokenizer.pieces(found)) == "12 e"
    assert tokenizer.pieces([tokenizer.eos_id]) == [EOS]


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "written",
    [TEMPLATE, [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}], None],
    ids=["text", "list", "file"],
)
def test_a_chat_template_is_found_wherever_it_stands_and_saved(tmp_path, written):
    saved(backend([EOS, "<s>"]), tmp_path)
    config = {"eos_token": EOS, "bos_token": {"content": "<s>"}}
    if written is None:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        config["chat_template"] = written
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.chat_template, tokenizer.eos) == (TEMPLATE, EOS)
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.chat_template, again.bos, again.fingerprint) == (TEMPLATE, tokenizer.bos, tokenizer.fingerprint)


def test_a_beginning_that_is_no_special_token_is_none(tmp_path):
    saved(backend([EOS]), tmp_path)
    for bos, found in (("a", ""), (EOS, EOS)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
        assert Tokenizer.load(tmp_path).bos == found


# Training one


def test_a_trained_tokenizer_has_the_vocabulary_asked_for_and_loses_nothing(tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos == EOS
    assert tokenizer.special_ids == [tokenizer.eos_id]
    assert tokenizer.backend.decode(ids(tokenizer)) == TEXT


def test_numbers_are_split_into_digits(tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert tokenizer.pieces(ids(tokenizer, "1234567890")) == list("1234567890")


def test_training_twice_gives_the_same_file(tmp_path, text_file, tokenizer_folder):
    manifest = train_tokenizer([str(text_file)], 300, tmp_path / "again")
    again = tmp_path / "again" / "tokenizer" / "tokenizer.json"
    assert again.read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    assert manifest.facts["fingerprint"] == Tokenizer.load(again).fingerprint


def test_a_vocabulary_without_room_for_the_bytes_is_refused_before_anything_is_read(tmp_path, text_file):
    with pytest.raises(ConfigError, match="a vocabulary of 256: expected 257 or more"):
        train_tokenizer([str(text_file)], 256, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


def test_too_little_text_for_the_vocabulary_is_an_error_with_both_sizes(tmp_path, text_file):
    with pytest.raises(DataError, match=r"too little text for a vocabulary of 50000 \(reached \d+\)"):
        train_tokenizer([str(text_file)], 50_000, tmp_path / "out")
    train_tokenizer([str(text_file)], 300, tmp_path / "out")


def test_each_source_gives_an_equal_share_of_the_text(tmp_path):
    paths = []
    for name, letter in (("large", "a"), ("small", "b")):
        paths.append(tmp_path / f"{name}.jsonl")
        size = 2000 if name == "large" else 200
        paths[-1].write_text((json.dumps({"text": letter * 10}) + "\n") * size)
    manifest = train_tokenizer([str(path) for path in paths], 259, tmp_path / "out", max_characters=2000)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert manifest.config["max_characters"] == 2000
    assert len(ids(tokenizer, "bb")) == len(ids(tokenizer, "aa")) == 1


def test_each_source_has_a_field_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 40}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "b" * 40}) + "\n")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    train_tokenizer(paths, 259, tmp_path / "out", ["text", "body"])
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert len(ids(tokenizer, "bb")) == len(ids(tokenizer, "aa")) == 1


def test_a_bad_record_is_an_error_unless_it_may_be_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a" * 40}) + "\nbroken\n")
    with pytest.raises(DataError, match=r"a.jsonl:2: expected one JSON object a line"):
        train_tokenizer([str(path)], 258, tmp_path / "out")
    train_tokenizer([str(path)], 258, tmp_path / "out", skip_bad_records=True)
