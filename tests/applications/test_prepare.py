"""What the applications make of their data sets: every schema, what is held out, near copies, long inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsgpt.applications import legal, news, support
from dsgpt.applications.prepare import chat_of, prepare
from dsgpt.applications.records import Example, Shares, conversation, split_examples, task
from dsgpt.cli import cli
from dsgpt.errors import DataError
from dsgpt.evaluate.questions import read_questions
from dsgpt.generate.chat import Chat
from dsgpt.tokenizer.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
# {application: (its files, how many examples of each kind are in them)}
REAL = {
    "support": (
        {"dialogues": ["support/sgd_train_dialogues_001.json", "support/abcd_sample.json"],
         "faq": ["support/dstc9_faq_knowledge.json"], "manuals": ["support/abcd_guidelines.json"],
         "intents": ["support/banking77_train.csv"]},
        {"dialogues": 131, "faq": 2900, "intents": 10003, "manuals": 55},
    ),
    "news": ({"articles": ["news/cnn_dm_200.jsonl", "news/xsum_200.jsonl"]}, {"articles": 400}),
    "legal": (
        {"summaries": ["legal/legalsum_tosdr_annotated_v1.json"], "clauses": ["legal/unfair_tos_test.tsv"]},
        {"summaries": 361, "clauses": 3841, "contracts": 212},
    ),
}  # fmt: skip
TURNS = [("USER", "I need a table"), ("SYSTEM", "Where?"), ("USER", "Here"), ("SYSTEM", "Done")]


def said(example):
    return [(one["role"], one["content"]) for one in example.record["messages"]]


@pytest.mark.parametrize(
    "record",
    [
        {"dialogue_id": "d", "turns": [{"speaker": who, "utterance": text, "frames": []} for who, text in TURNS]},
        {"convo_id": "d", "original": [["agent", "Hi!"], *([{"USER": "customer", "SYSTEM": "agent"}[who], text]
                                                          for who, text in TURNS), ["action", "looked up"]]},
    ],
    ids=["sgd", "abcd"],
)  # fmt: skip
def test_dialogues_begin_with_a_customer_and_end_with_an_agent(record):
    (one,) = support.examples("dialogues", [record])
    assert said(one) == [("user", "I need a table"), ("assistant", "Where?"), ("user", "Here"), ("assistant", "Done")]
    assert one.group == "d"


def test_turns_of_one_side_are_one_and_a_last_question_is_left_out():
    turns = [(False, "a"), (False, " b "), (True, "c"), (False, ""), (True, "d"), (False, "e")]
    assert [one["content"] for one in conversation(turns)] == ["a\nb", "c\nd"]


@pytest.mark.parametrize(
    "record",
    [
        {"title": "Are pets allowed?", "body": "No."},
        {"question": "Are pets allowed?", "answer": "No."},
        {"instruction": "Are pets allowed?", "response": "No.", "category": "PETS", "intent": "pets"},
        {"hotel": {"0": {"name": "Inn", "docs": {"0": {"title": "Are pets allowed?", "body": "No."}}}}},
    ],
    ids=["flat", "question", "bitext", "dstc9"],
)
def test_frequent_questions_of_every_schema(record):
    (one,) = support.examples("faq", [record])
    asked = "Inn: Are pets allowed?" if "hotel" in record else "Are pets allowed?"
    assert said(one) == [("user", asked), ("assistant", "No.")]


def test_manuals_and_intents():
    flows = {"Orders": {"description": "x", "subflows": {"Refund": {"actions": [{"text": "Ask"}, {"text": "Pay"}]}}}}
    (one,) = support.examples("manuals", [flows])
    assert one.record == task(support.MANUAL, "Orders: Refund", "1. Ask\n2. Pay")
    rows = [{"text": "lost it", "category": "lost_card"}, {"text": "lost it", "label": 3, "label_text": "lost_card"}]
    for row in (*rows, {"instruction": "lost it", "intent": "lost_card"}):
        (one,) = support.examples("intents", [row])
        assert one.record == task(support.ROUTE, "lost it", "lost card")


@pytest.mark.parametrize(
    "record",
    [
        {"article": "Long. News.", "highlights": "News."},
        {"document": "Long. News.", "summary": "News."},
        {"prompt": "Summarise the article:\n\nLong. News.", "completion": "News.<|endoftext|>"},
        {"prompt": "Summarize: Long. News.", "completion": "News.</endoftext/>"},
    ],
)
def test_articles_of_every_schema(record):
    (one,) = news.examples("articles", [record])
    assert one.record == task(news.SUMMARISE, "Long. News.", "News.")


def test_the_lead_is_the_first_sentences():
    text = 'ROME (Reuters) -- It rained. "Why?" he said. Mr. Smith left at 5 p.m. today.\nThe end came.'
    assert news.lead(text, 2).startswith('ROME (Reuters) -- It rained. "Why?" he said.')
    assert news.lead("One sentence only") == "One sentence only"


def test_a_contract_is_made_of_all_passages_of_a_document():
    rows = {f"u{i}": {"original_text": f"passage {i} of it.", "reference_summary": f"says {i}", "urls": "{'a.com'}",
                      "doc": "Terms"} for i in range(3)}  # fmt: skip
    found = list(legal.examples("summaries", [rows]))
    assert [one.kind for one in found] == ["summaries"] * 3 + ["contracts"] * 3
    assert found[4].record["input"] == "passage 0 of it.\n\npassage 1 of it.\n\npassage 2 of it."
    assert (found[4].record["instruction"], found[4].record["output"]) == (f"{legal.FIND} says 1", "passage 1 of it.")
    assert len({one.group for one in found}) == 1
    cuad = {"title": "C", "context": "All of it.", "question": "Who?", "answers": {"text": ["it"], "answer_start": [7]}}
    several = {"text": ["it", "All", "", "it"], "answer_start": [7, 0, 0, 7]}
    one, none, two = legal.examples(
        "contracts", [cuad, {**cuad, "answers": {"text": []}}, {**cuad, "answers": several}]
    )
    assert one.record == task(f"{legal.FIND} Who?", "All of it.", "it")
    assert none.answers == [""], "left out and counted with those without an answer"
    assert two.record == {**one.record, "other_answers": ["All"]}
    (one,) = legal.examples("clauses", [{"text": "we may change it", "label": "Unilateral change"}])
    assert one.record["output"] == "Unilateral change"


@pytest.mark.parametrize(
    "of, source",
    [(support, "dialogues"), (support, "faq"), (support, "manuals"), (support, "intents"), (news, "articles"),
     (legal, "summaries"), (legal, "clauses"), (legal, "contracts")],
)  # fmt: skip
def test_a_record_of_no_known_schema_is_named(of, source):
    with pytest.raises(DataError, match="one, two"):
        list(of.examples(source, [{"one": 1, "two": "2"}]))


def test_groups_stay_together_and_near_copies_of_what_is_held_out_are_not_trained_on():
    words = [f"word{i}" for i in range(21)]
    examples = [
        Example("a", f"group {i % 40}", task("Do:", " ".join([*words[i % 7 :], f"n{i % 40}", *words[::-1]]), f"{i}"))
        for i in range(400)
    ]
    split = split_examples(examples, Shares(validation=0.2, test=0.2), seed=1)
    sides = [{one.group for one in side} for side in (split.train, split.validation, split.test)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2]) and all(sides)
    again = split_examples(reversed(examples), Shares(validation=0.2, test=0.2), seed=1)
    assert {one.group for one in again.test} <= sides[2], "a group's side does not depend on the others"
    copies = [Example("b", f"g{i}", task("Do:", " ".join(words), "x")) for i in range(30)]
    assert split_examples(copies, Shares(), 1).near_copies["b"] == 29
    assert split_examples(copies, Shares(), 1).counts()["b"]["train"] == 0, "the one that is left is a held-out one"


@pytest.fixture
def tokenizer(dataset):
    return Tokenizer.load(dataset.parent / "tokenizer")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_is_prepared_fits_and_is_asked_whole(tokenizer, tmp_path):
    rows = [{"document": f"Report {i}. " + f"It goes on about {i}, and so on. " * (i % 9), "summary": f"It is {i}."}
            for i in range(60)]  # fmt: skip
    told = []
    summary = prepare("news", {"articles": [write(tmp_path / "a.jsonl", rows)]}, tmp_path / "out", tokenizer, 96,
                      report=told.append)  # fmt: skip
    chat, cut = Chat(tokenizer, "chatml"), 0
    for line in (tmp_path / "out/train.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        assert chat.num_tokens(messages) <= 97 and messages[1]["content"].startswith("It is")
        document = rows[int(messages[1]["content"][6:-1])]["document"].strip()
        cut += messages[0]["content"] != f"{news.SUMMARISE}\n\n{document}"
    assert cut == summary["kinds"]["articles"]["cut"] > 0 and "cut to their lead" in told[0]
    whole = {row["summary"]: row["document"].strip() for row in rows}
    questions = read_questions(tmp_path / "out/test-articles.jsonl")
    assert questions and all(whole[one.answer] == one.input for one in questions)


def test_conversations_are_asked_at_every_answer_and_choices_are_those_of_training(tokenizer, tmp_path):
    chats = [{"dialogue_id": f"{i}", "turns": [{"speaker": who, "utterance": f"{text} {i}"} for who, text in TURNS]}
             for i in range(40)]  # fmt: skip
    intents = [{"text": f"message {i} about it", "category": f"kind_{i % 4}"} for i in range(60)]
    sources = {"dialogues": [write(tmp_path / "d.jsonl", chats)], "intents": [write(tmp_path / "i.jsonl", intents)]}
    summary = prepare(
        "support", sources, tmp_path / "out", tokenizer, 128, limits={"intents": 20}, report=lambda _: None
    )
    counts = summary["kinds"]
    asked = read_questions(tmp_path / "out/test-dialogues.jsonl")
    assert len(asked) == 2 * counts["dialogues"]["test"] and {one.answer.split()[0] for one in asked} == {
        "Where?",
        "Done",
    }
    routed = read_questions(tmp_path / "out/test-intents.jsonl")
    assert all(one.choices == ("kind 0", "kind 1", "kind 2", "kind 3") for one in routed)
    assert counts["intents"]["train"] == 20


def test_a_conversation_longer_than_a_sequence_is_divided_between_exchanges(tokenizer, tmp_path):
    turns = [("USER" if i % 2 == 0 else "SYSTEM", f"turn {i} of them") for i in range(40)]
    chats = [{"dialogue_id": f"{i}", "turns": [{"speaker": who, "utterance": f"{text} {i}"} for who, text in turns[:4 + i]]}
             for i in range(37)]  # fmt: skip
    told = []
    path = write(tmp_path / "d.jsonl", chats)
    summary = prepare("support", {"dialogues": [path]}, tmp_path / "out", tokenizer, 128, report=told.append)
    chat, found = Chat(tokenizer, "chatml"), {}
    for line in (tmp_path / "out/train.jsonl").read_text().splitlines():
        part = json.loads(line)["messages"]
        assert part[0]["role"] == "user" and part[-1]["role"] == "assistant" and chat.num_tokens(part) <= 128
        found.setdefault(part[0]["content"].split()[-1], []).append([one["content"] for one in part])
    whole = {one["dialogue_id"]: [turn["utterance"] for turn in one["turns"]] for one in chats}
    whole = {name: said[: len(said) - len(said) % 2] for name, said in whole.items()}  # a last question has no answer
    assert all([text for part in parts for text in part] == whole[name] for name, parts in found.items())
    divided = sum(len(parts) > 1 for parts in found.values())
    assert divided == summary["kinds"]["dialogues"]["divided"] > 0 and f"{divided} (" in told[0]


def test_questions_come_in_random_order_with_their_group_and_whether_the_answer_was_taught(tokenizer, tmp_path):
    faq = [
        {"entity": f"Inn {i // 5}", "title": f"May I {i}?", "body": "Yes." if i % 2 else f"No, {i}."}
        for i in range(200)
    ]
    summary = prepare("support", {"faq": [write(tmp_path / "f.jsonl", faq)]}, tmp_path / "out", tokenizer, 128,
                      report=lambda _: None)["kinds"]["faq"]  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out/test-faq.jsonl").read_text().splitlines()]
    groups = [row["group"] for row in rows]
    edges = [one for one, two in zip(groups, [None, *groups], strict=False) if one != two]
    assert len(edges) == len(set(groups)) == summary["groups"], "those of a group are together"
    assert edges != sorted(edges, key=lambda name: int(name.split()[1])), "not in the order of the file"
    assert [row["seen"] for row in rows] == [row["messages"][-1]["content"] == "Yes." for row in rows]
    assert summary["answers_seen"] == sum(row["seen"] for row in rows) > 0
    assert summary["most_frequent_answer"] == "Yes." and summary["answer_tokens"] <= 8
    assert {question.group for question in read_questions(tmp_path / "out/test-faq.jsonl")} == set(groups)


def test_a_passage_beyond_the_lead_is_asked_for_but_not_trained_on(tokenizer, tmp_path):
    rows = [{"title": f"C{i}", "context": " ".join(f"clause {j} of {i} says so." for j in range(60)), "question": f"No {j}?",
             "answers": {"text": [f"clause {j} of {i} says so."]}} for i in range(40) for j in (0, 59)]  # fmt: skip
    kinds = prepare("legal", {"contracts": [write(tmp_path / "c.jsonl", rows)]}, tmp_path / "out", tokenizer, 256,
                    report=lambda _: None)["kinds"]["contracts"]  # fmt: skip
    lines = [json.loads(line)["messages"] for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert all(answer["content"] in asked["content"] for asked, answer in lines)
    assert kinds["beyond"] == kinds["train"] / 2 == len(lines) and kinds["test_beyond"] == kinds["test"] / 2
    assert kinds["questions"] == kinds["test"]
    with pytest.raises(DataError, match=r"longer than a training sequence(.|\n)*contracts: \d+"):
        prepare(
            "legal", {"contracts": [tmp_path / "c.jsonl"]}, tmp_path / "refused", tokenizer, 256, long_input="refuse"
        )
    assert not (tmp_path / "refused/summary.json").exists()


def test_conversations_are_written_by_the_models_own_template(dataset, tmp_path):
    said = "'[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token"
    own = f"{{% for m in messages %}}{{{{ {said} }}}}{{% endfor %}}"
    folder = tmp_path / "tokenizer"
    Tokenizer.load(dataset.parent / "tokenizer").save(folder)
    (folder / "chat_template.jinja").write_text(own)
    tokenizer = Tokenizer.load(folder)
    messages = [{"role": "user", "content": "Hi"}]
    assert "[INST] Hi [/INST]" in tokenizer.decode(chat_of(tokenizer).prompt(messages).ids)
    plain = Tokenizer.load(dataset.parent / "tokenizer")
    expected = Chat(plain, None if plain.chat_template else "chatml").prompt(messages).ids
    assert chat_of(plain).prompt(messages).ids == expected


@pytest.mark.parametrize(
    "source, record, seen",
    [
        ("faq", {"question": "q", "answer": 3}, "answer: 3"),
        ("dialogues", {"turns": [{"speaker": "USER", "utterance": ["a"]}]}, "utterance"),
        ("dialogues", {"messages": [{"role": "user", "content": {"a": 1}}]}, "content"),
        ("manuals", {"title": "t", "steps": "one text"}, "no manual"),
    ],
)
def test_records_of_other_types_are_named(source, record, seen):
    with pytest.raises(DataError, match=seen):
        list(support.examples(source, [record]))


def test_what_has_no_answer_is_left_out_and_counted(tokenizer, tmp_path):
    faq = [{"question": f"May I {i}?", "answer": None if i % 10 == 0 else f"No, {i}."} for i in range(60)]
    told = []
    kinds = prepare("support", {"faq": [write(tmp_path / "f.jsonl", faq)]}, tmp_path / "out", tokenizer, 128,
                    report=told.append)["kinds"]  # fmt: skip
    assert kinds["faq"]["empty"] == 6 and "6 without an answer left out" in told[0]
    assert "None" not in (tmp_path / "out/train.jsonl").read_text()


def test_data_as_it_is_published_elsewhere():
    columns = {"dialogue_id": "d", "turns": {"speaker": [0, 1], "utterance": ["Hello", "Hi"]}}
    abcd = {"train": [{"convo_id": 1, "original": [["customer", "Hello"], ["agent", "Hi"]]}], "dev": [], "test": []}
    for record in (columns, abcd):
        (one,) = support.examples("dialogues", [record])
        assert said(one) == [("user", "Hello"), ("assistant", "Hi")]
    squad = {"data": [{"title": "C", "paragraphs": [{"context": "All of it.", "qas": [
        {"question": "Who?", "answers": [{"text": "it"}]}, {"question": "When?", "answers": []}]}]}]}  # fmt: skip
    one, none = legal.examples("contracts", [squad])
    assert none.answers == [""]
    assert one.record == task(f"{legal.FIND} Who?", "All of it.", "it") and one.document == "All of it."
    (one,) = legal.examples("clauses", [{"index": 0, "text": "we may change it", "answer": "Unilateral change"}])
    assert one.record["output"] == "Unilateral change"


def test_a_copied_document_goes_with_all_its_questions_and_like_questions_of_others_stay():
    asked = "Highlight the parts of this contract, if any, that a lawyer should look at when asked about its law"
    texts = {name: " ".join(f"{name} word {i}" for i in range(50)) for name in "abcdefghijklmnopqrst"}
    texts |= {f"{name}-again": text + " more" for name, text in texts.items()}
    found = [Example("contracts", name, task(f"{asked} {n}", text, f"{name} law"), document=text)
             for name, text in texts.items() for n in (1, 2)]  # fmt: skip
    split = split_examples(found, Shares(0.2, 0.2), seed=1)
    left = [one for side in (split.train, split.validation, split.test) for one in side]
    assert len(left) == 40 and split.near_copies["contracts"] == 40
    assert len({one.group.removesuffix("-again") for one in left}) == 20


def test_the_command_names_what_it_does_not_know(tokenizer, dataset, tmp_path):
    def run(*source):
        words = ["application", "prepare", "news", *source, "--tokenizer", dataset.parent / "tokenizer"]
        words += ["--seq-length", 64, "--output", tmp_path / "out"]
        return CliRunner().invoke(cli, [str(word) for word in words])

    path = write(tmp_path / "a.jsonl", [{"document": f"d {i}", "summary": "s"} for i in range(30)])
    assert run("--source", f"articles={path}").exit_code == 0
    few = run("--source", f"articles={write(tmp_path / 'few.jsonl', [{'document': 'd', 'summary': 's'}])}")
    assert isinstance(few.exception, DataError) and "a side would have no example" in str(few.exception)
    limited = run("--source", f"articles={path}", "--limit", "article=3")
    assert isinstance(limited.exception, DataError) and "limit one of articles" in str(limited.exception)
    wrong = run("--source", f"books={path}")
    assert isinstance(wrong.exception, DataError) and "articles with their summaries" in str(wrong.exception)
    assert isinstance(run().exception, DataError)
    assert run("--source", "articles").exit_code == 2


@pytest.mark.slow
@real_data
@pytest.mark.parametrize("name", sorted(REAL))
def test_real_data_of_the_same_schemas_is_read_whole(name, tokenizer, tmp_path):
    """As many examples as the files have records; what was left out was counted."""
    sources, kinds = REAL[name]
    places = {key: [str(SHARED / one) for one in files] for key, files in sources.items()}
    summary = prepare(name, places, tmp_path, tokenizer, 1024, report=lambda _: None)
    sides = ("train", "validation", "test", "near_copies", "empty")
    assert {kind: sum(counts[side] for side in sides) for kind, counts in summary["kinds"].items()} == kinds
    for kind in kinds:
        assert read_questions(tmp_path / f"test-{kind}.jsonl")
