"""Prompts and answers, and chats: literal labels, answers only, conversations whole, bad records named."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import write_jsonl
from rho import corpus as module
from rho.conversations import PLAIN, loss_mask
from rho.corpus import Corpus, CorpusConfig, build_corpus
from rho.errors import ConfigError, DataError
from rho.evaluate import Checkpoint, EvaluateConfig, evaluate
from rho.models import ModelConfig, make_model
from rho.objective import IGNORE_INDEX
from rho.references.model import mean_loss
from rho.runs import read_manifest
from rho.score import ScoreConfig, score_corpus
from rho.sources import Document
from rho.store import ScoreStore
from rho.tokenizer import Tokenizer, train_tokenizer
from rho.train import TrainConfig, train

PAIR = {"prompt_field": "prompt", "completion_field": "completion"}
CHAT = {"messages_field": "messages"}
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "It is 6."},
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def build(tmp_path: Path, tokenizer: Tokenizer) -> Any:
    """A corpus of some records, in a new folder."""

    def build_one(records: list, tokenizer: Tokenizer = tokenizer, **settings: Any) -> Corpus:
        number = len(list(tmp_path.glob("*.jsonl")))
        source, out = write_jsonl(tmp_path / f"{number}.jsonl", records), tmp_path / str(number)
        settings = {"block_length": 8, **(PAIR if "prompt" in records[0] else {}), **settings}
        build_corpus(CorpusConfig(sources=[str(source)], **settings), tokenizer, out)
        return Corpus(out, "validation" if settings.get("heldout_fraction") == 1.0 else "train")

    return build_one


def pair(prompt: str, completion: str, **rest: Any) -> dict:
    return {"prompt": prompt, "completion": completion, **rest}


def chat(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict:
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


def shown(corpus: Corpus) -> list[str]:
    """Each block's tokens, those without a label in brackets; | is the end token."""
    rows = []
    for block in range(len(corpus)):
        inputs = corpus.inputs(corpus.row(block, corpus.reads))
        pieces = [piece.replace(corpus.tokenizer.eos, "|") for piece in corpus.tokenizer.pieces(inputs["input_ids"])]
        labelled = (inputs["labels"] != IGNORE_INDEX).tolist()
        assert all(
            label in (IGNORE_INDEX, token)
            for label, token in zip(inputs["labels"].tolist(), inputs["input_ids"].tolist(), strict=True)
        )
        rows.append(" ".join(piece if has else f"({piece})" for piece, has in zip(pieces, labelled, strict=True)))
    return rows


# Digits are one token each.


def test_answers_and_their_end_have_labels_and_a_conversation_is_never_cut(build: Any) -> None:
    corpus = build([pair("123", "45"), pair("6", "78"), pair("9", "0")])
    assert shown(corpus) == ["(1) (2) (3) 4 5 | (|) (|)", "(6) 7 8 | (9) 0 | (|)"]
    rows = [corpus.row(block, (*corpus.reads, "num_bytes", "document_id")) for block in (0, 1)]
    assert rows[0]["document"].tolist() == [0] * 6 + [1] * 2
    assert rows[1]["document"].tolist() == [2] * 4 + [3] * 3 + [4]
    assert rows[0]["num_bytes"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert [name.split(":")[-1] for name in rows[1]["document_id"]] == ["2", "3", "padding"]


def test_conversations_in_a_block_do_not_see_each_other(build: Any) -> None:
    corpus = build([pair("6", "78"), pair("9", "0")])
    assert corpus.isolated
    positions = corpus.inputs(corpus.row(0, corpus.reads))["position_ids"].tolist()
    assert positions == [0, 1, 2, 3, 0, 1, 2, 0]


def test_the_last_block_is_filled_and_nothing_is_dropped(build: Any) -> None:
    facts = build([pair("1", "2")] * 4).manifest.facts["splits"]["train"]
    expected = {"documents": 4, "tokens": 12, "padding_tokens": 4, "blocks": 2, "dropped_tokens": 0}
    assert expected.items() <= facts.items()


def test_both_splits_are_filled(build: Any) -> None:
    records = [pair(str(n), "1") for n in range(10)]
    folder = build(records, heldout_fraction=0.5).folder
    for split in ("train", "validation"):
        facts = read_manifest(folder).facts["splits"][split]
        assert (facts["tokens"] + facts["padding_tokens"]) == 8 * facts["blocks"] > 0


def test_without_a_prompt_the_first_token_is_predicted_from_nothing(build: Any) -> None:
    assert shown(build([pair("", "12")], block_length=4)) == ["(1) 2 | (|)"]


def test_of_a_chat_what_the_template_marks_has_labels(build: Any, tokenizer: Tokenizer) -> None:
    marked = Tokenizer(tokenizer.backend, tokenizer.eos, MARKED)
    corpus = build([chat("12", "3", "4", "5")], marked, **CHAT)
    assert shown(corpus) == ["(1) (2) 3 (4) 5 | (|) (|)"]
    assert corpus.tokenizer.chat_template == MARKED


def test_a_template_that_ends_in_the_end_token_gets_no_second_one(build: Any, tokenizer: Tokenizer) -> None:
    ended = Tokenizer(tokenizer.backend, tokenizer.eos, MARKED + "{{ eos_token }}")
    assert shown(build([chat("12", "3")], ended, **CHAT, block_length=4)) == ["(1) (2) 3 |"]


def test_an_end_behind_other_text_is_no_part_of_an_answer(build: Any, tokenizer: Tokenizer) -> None:
    with_tail = Tokenizer(tokenizer.backend, tokenizer.eos, MARKED + "9")
    assert shown(build([chat("1", "2")], with_tail, **CHAT, block_length=4)) == ["(1) 2 (9) (|)"]


def test_without_a_template_a_chat_is_written_plainly(build: Any, tokenizer: Tokenizer) -> None:
    corpus = build([{"messages": CONVERSATION}], **CHAT, block_length=128)
    inputs = corpus.inputs(corpus.row(0, corpus.reads))
    ids, eos = inputs["input_ids"].tolist(), tokenizer.eos
    turns = ["system:\nBe brief.\nuser:\n2 + 2?\nassistant:\n4", "user:\nAnd 3 + 3?\nassistant:\nIt is 6."]
    text = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text.split(eos)[:3] == [*turns, ""]
    trained = [token for token, label in zip(ids, inputs["labels"].tolist(), strict=True) if label != IGNORE_INDEX]
    assert tokenizer.backend.decode(trained, skip_special_tokens=False) == f"4{eos}It is 6.{eos}"


def test_the_labels_of_a_chat_are_transformers_own_assistant_mask(build: Any) -> None:
    corpus = build([{"messages": CONVERSATION}], **CHAT, block_length=128)
    inputs = corpus.inputs(corpus.row(0, corpus.reads))
    saved = AutoTokenizer.from_pretrained(corpus.folder / "tokenizer")
    assert saved.chat_template == PLAIN
    theirs = saved.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    length = len(theirs["input_ids"])
    assert inputs["input_ids"][:length].tolist() == theirs["input_ids"]
    assert (inputs["labels"][:length] != IGNORE_INDEX).int().tolist() == theirs["assistant_masks"]
    asked = saved.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("assistant:\n")  # what a trained model goes on from


def test_values_that_are_missing_are_not_written(build: Any, tokenizer: Tokenizer) -> None:
    named = Tokenizer(tokenizer.backend, tokenizer.eos, "{% for m in messages %}{{ m.name }}{% endfor %}" + MARKED)
    messages = [{"role": "user", "content": "1", "name": None}, {"role": "assistant", "content": "2"}]
    assert shown(build([{"messages": messages}], named, **CHAT, block_length=4)) == ["(1) 2 | (|)"]


# Properties


@settings(deadline=None)
@given(
    parts=st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=3),
    tail=st.text(max_size=4),
)
def test_no_token_with_a_label_reaches_out_of_an_answer(tokenizer: Tokenizer, parts: list, tail: str) -> None:
    text, answers = "", []
    for question, answer in parts:
        text += question
        answers.append((len(text), len(text) + len(answer)))
        text += answer
    text += tail
    [(ids, ends)] = tokenizer.encode([text])
    document = Document(text, "id", "source", "here", answers=answers)
    try:
        mask = loss_mask(document, ends)
    except ValueError:
        return  # each answer is a part of a token
    assert len(mask) == len(ids) + 1
    assert mask[-1] == (not tail)
    begins = np.concatenate([[0], ends[:-1]])
    for begin, end in zip(begins[mask[:-1]], ends[mask[:-1]], strict=True):
        assert any(start <= begin and end <= stop for start, stop in answers)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=30))
def test_every_conversation_lies_in_one_block_with_all_its_labels(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, lengths: list
) -> None:
    folder = tmp_path_factory.mktemp("whole")
    records = [pair("1" * prompt, "2" * answer) for prompt, answer in lengths]
    source = write_jsonl(folder / "pairs.jsonl", records)
    build_corpus(CorpusConfig(sources=[str(source)], block_length=11, **PAIR), tokenizer, folder / "out")
    corpus, found = Corpus(folder / "out"), []
    for block in range(len(corpus)):
        row = corpus.row(block, (*corpus.reads, "document_id"))
        labelled = corpus.inputs(row)["labels"].numpy() != IGNORE_INDEX
        numbers = row["document"]
        for number, name in zip(dict.fromkeys(numbers.tolist()), row["document_id"], strict=True):
            if name != module.PADDING:
                found.append((int((numbers == number).sum()), int(labelled[numbers == number].sum())))
            else:
                assert not labelled[numbers == number].any()
    # A first token has no label, even if it is an answer's.
    assert found == [(prompt + answer + 1, answer + 1 - (prompt == 0)) for prompt, answer in lengths]


def test_a_token_that_begins_in_the_prompt_is_not_trained_on(tokenizer: Tokenizer) -> None:
    document = Document("a bc", "id", "source", "here", answers=[(2, 4)])
    assert loss_mask(document, np.array([1, 3, 4])).tolist() == [False, False, True, True]
    # The bytes of a character are tokens of their own, which all end where it ends.
    assert loss_mask(document, np.array([2, 2, 3, 3, 4])).tolist() == [False, False, True, True, True, True]


# What can't be used


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        (
            {"prompt": "1", "text": "2"},
            PAIR,
            "expected the text in fields 'prompt' and 'completion', found the fields 'prompt', 'text'; name the right "
            "one with --prompt-field and --completion-field",
        ),
        (pair("1", " \n"), PAIR, "expected an answer in field 'completion', found an empty one"),
        (pair("1", 2), PAIR, "expected a string in field 'completion', found int; --completion-field names another"),  # type: ignore[arg-type]
        ({"messages": "hello"}, CHAT, "expected a list of messages in field 'messages', found hello"),
        ({"messages": []}, CHAT, "expected a list of messages"),
        (chat("1", "  "), CHAT, "and no empty answers"),
        ({"messages": [{"role": "assistant", "content": None}]}, CHAT, "a role and a content, both text"),
        ({"messages": [["user", "1"]]}, CHAT, "a role and a content, both text"),
        (chat("1", "2", roles=("user", "bot")), CHAT, "expected an answer of the assistant in field 'messages'"),
        (pair("1" * 8, "2"), PAIR, "at most the 8 tokens of a block, found 10. Ask for longer blocks"),
    ],
)
def test_a_bad_record_is_an_error_that_says_where_and_can_be_passed_over(
    build: Any, tmp_path: Path, record: dict, settings: dict, message: str
) -> None:
    good = chat("1", "2") if settings is CHAT else pair("1", "2")
    length = 64 if settings is CHAT else 8
    with pytest.raises(DataError) as caught:
        build([good, record], **settings, block_length=length)
    assert "0.jsonl:2: " in str(caught.value) and message in str(caught.value)
    assert "--skip-bad-records" in str(caught.value)
    corpus = build([good, record], **settings, block_length=length, skip_bad_records=True)
    assert corpus.manifest.facts["splits"]["train"]["documents"] == 1
    [skipped] = json.loads((corpus.folder / "skipped.json").read_text())
    assert message in skipped["reason"] and skipped["where"].endswith("1.jsonl:2")


def test_plain_text_has_no_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("123")
    config = CorpusConfig(sources=[str(tmp_path / "a.txt")], block_length=8, **PAIR)
    with pytest.raises(DataError, match="expected an answer of a token or more, found none"):
        build_corpus(config, tokenizer, tmp_path / "out")


def test_an_answer_inside_a_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="expected an answer of a token or more"):
        loss_mask(Document("abc", "id", "source", "here", answers=[(1, 2)]), np.array([3]))


def test_a_message_that_the_template_refuses_is_named(build: Any, tokenizer: Tokenizer) -> None:
    strict = Tokenizer(tokenizer.backend, tokenizer.eos, "{{ raise_exception('roles must alternate') }}" + MARKED)
    with pytest.raises(DataError, match=r"jsonl:1: expected messages that .*\(roles must alternate\)"):
        build([chat("1", "2")], strict, **CHAT)


def test_a_template_that_does_not_mark_the_answers_is_refused(build: Any, tokenizer: Tokenizer) -> None:
    unmarked = Tokenizer(tokenizer.backend, tokenizer.eos, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"does not mark what the assistant says.*\{% generation %\}"):
        build([chat("1", "2")], unmarked, **CHAT)


@pytest.mark.parametrize(
    "settings",
    [{"prompt_field": "prompt"}, {"completion_field": "answer"}, {**PAIR, **CHAT}],
)
def test_settings_at_odds_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="give prompt_field and completion_field, or messages_field, or neither"):
        CorpusConfig(sources=["x"], **settings)


def test_plain_records_say_how_others_are_read(build: Any) -> None:
    with pytest.raises(
        DataError, match=r"found the fields 'messages'; name the right one with --text-field .*messages"
    ):
        build([chat("1", "2")])


# Resuming


def test_an_interrupted_build_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 40)
    records = [pair("1" * (n % 4), "2" * (1 + n % 5)) for n in range(60)]
    source = write_jsonl(tmp_path / "pairs.jsonl", records)
    config = CorpusConfig(sources=[str(source)], block_length=11, shard_blocks=3, heldout_fraction=0.3, **PAIR)
    whole = build_corpus(config, tokenizer, tmp_path / "whole")
    write, stopped = module.write_shard, []

    def write_and_stop(path: Path, columns: Any) -> None:
        write(path, columns)
        if path.name not in stopped:
            stopped.append(path.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_shard", write_and_stop)
    made = None
    while made is None:
        with contextlib.suppress(KeyboardInterrupt):
            made = build_corpus(config, tokenizer, tmp_path / "cut")
    assert len(stopped) > 3
    assert made.fingerprint == whole.fingerprint


# All stages count the answers alone


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """A corpus of questions and answers, and one that is held out."""
    folder = tmp_path_factory.mktemp("answers")
    records = []
    for n in range(60):
        prompt, completion = f"{n} and {n}? ", f"They are {2 * n}."
        label = "even" if n % 2 == 0 else "odd"
        spans = [[len(prompt), len(prompt) + len(completion), label]]
        records.append(pair(prompt, completion, spans=spans))
    source = write_jsonl(folder / "pairs.jsonl", records)
    config = CorpusConfig(sources=[str(source)], block_length=32, heldout_fraction=0.3, **PAIR)
    build_corpus(config, tokenizer, folder / "corpus")
    return Corpus(folder / "corpus"), Corpus(folder / "corpus", "validation")


def num_trained(corpus: Corpus) -> int:
    return sum(int((corpus.inputs(corpus.row(b, corpus.reads))["labels"] >= 0).sum()) for b in range(len(corpus)))


def test_score_train_and_evaluate_count_answers_alone(
    answers: tuple[Corpus, Corpus], architecture: dict, tmp_path: Path
) -> None:
    corpus, target = answers
    model = ModelConfig(architecture=architecture)
    arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1}
    train(TrainConfig(arguments={**arguments, "num_train_epochs": 3}), corpus, model, tmp_path / "reference")
    reference = ModelConfig(path=str(tmp_path / "reference"))
    score_corpus(ScoreConfig(), corpus, reference, tmp_path / "scores", target)
    store = ScoreStore(tmp_path / "scores")
    selection = TrainConfig(ratio=0.5, scope="step", arguments=arguments)
    train(selection, corpus, model, tmp_path / "slm", store, target)
    steps = [json.loads(line) for line in (tmp_path / "slm" / "steps.jsonl").read_text().splitlines()]
    assert sum(step["eligible"] for step in steps) == num_trained(corpus)
    labelled = sum(one["eligible"] for step in steps for one in step["labels"].values())
    assert labelled == num_trained(corpus) - corpus.manifest.facts["splits"]["train"]["documents"]  # end tokens
    evaluate(
        EvaluateConfig(), [Checkpoint(str(tmp_path / "slm"), step=None)], {"held-out": target}, tmp_path / "evaluate"
    )
    [line] = (tmp_path / "evaluate" / "losses.jsonl").read_text().splitlines()
    assert json.loads(line)["tokens"] == num_trained(target)
    loss = mean_loss(make_model(reference, corpus.vocab_size), target).nats_per_token
    assert loss == pytest.approx(store.manifest.facts["target_loss"])


def test_a_reference_with_another_tokenizer_scores_every_answer_and_its_end(
    answers: tuple[Corpus, Corpus], architecture: dict, tmp_path: Path
) -> None:
    corpus, _ = answers
    train_tokenizer(
        [str(write_jsonl(tmp_path / "other.jsonl", [{"text": "They are 1 and 2. " * 9}]))], 262, tmp_path / "t"
    )
    other = Tokenizer.load(tmp_path / "t" / "tokenizer")
    model = make_model(ModelConfig(architecture={**architecture, "max_position_embeddings": 256}), other.vocab_size)
    model.save_pretrained(tmp_path / "model")
    other.save(tmp_path / "model")
    source = ModelConfig(path=str(tmp_path / "model"))
    config = ScoreConfig(context=128)
    score_corpus(config, corpus, source, tmp_path / "scores", reference_tokenizer=str(tmp_path / "t" / "tokenizer"))
    store = ScoreStore(tmp_path / "scores")
    for block in range(len(corpus)):
        labels = corpus.inputs(corpus.row(block, corpus.reads))["labels"].numpy()
        loss = store.row(block, ("ref_loss",))["ref_loss"]
        assert np.isfinite(loss[labels != IGNORE_INDEX]).all()
        ends = labels == corpus.tokenizer.eos_id
        assert (loss[ends] > 1.0).all()  # an untrained reference's whole loss, not a share of it
