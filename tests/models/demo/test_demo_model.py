"""The demo model: its tokenizer, its data, its checkers and the accuracy of the weights."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from smelt.models.demo import data, evaluate, tasks
from smelt.models.demo.talk import TASKS

FOLDER = Path(data.__file__).parent
MODELS = ("smelt-demo", "smelt-demo-draft")
SIZE_LIMIT = 12_000_000

# Floors for the larger model on ten questions each; its accuracy on all of them is 89 to 100 %.
FLOORS = {
    "add_two_digits": 0.8,
    "compare": 0.8,
    "copy_words": 0.7,
    "count_words": 0.9,
    "extreme": 0.8,
    "multiply": 0.9,
    "recall": 0.9,
    "reverse_words": 0.9,
    "small_talk": 0.9,
    "sort_numbers": 0.6,
    "subtract": 0.9,
    "who_has": 0.9,
    "yes_or_no": 0.8,
}


def chats(count: int, seed: int = 0) -> list[list[tasks.Message]]:
    rng = Random(seed)
    return [data.conversation(rng) for _ in range(count)]


@pytest.mark.parametrize("model", MODELS)
def test_tokenizer_round_trip(model: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / model / "tokenizer.json"))
    texts = [data.render(chat) for chat in chats(50)]
    texts += ["Grüße, 12 345 \n\n  naïve\ttabs", "漢字 🙂", " leading and trailing "]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_models_share_the_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        first, second = ((FOLDER / model / name).read_bytes() for model in MODELS)
        assert first == second


def test_digits_and_specials_are_single_tokens() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / MODELS[0] / "tokenizer.json"))
    assert tokenizer.encode("4071").tokens == ["4", "0", "7", "1"]
    for index, special in enumerate(data.SPECIAL_TOKENS):
        assert tokenizer.encode(special).ids == [index]


def test_chat_template_renders_as_in_training() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / MODELS[0])
    for chat in chats(50):
        assert tokenizer.apply_chat_template(chat, tokenize=False) == data.render(chat)
        asked = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        assert asked == data.render(chat[:-1], add_generation_prompt=True)


def test_encoding_in_pieces_equals_encoding_as_a_whole() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / MODELS[0] / "tokenizer.json"))
    for chat in chats(50):
        ids, weights = data.encode_chat(tokenizer, chat, prompt_weight=0.1)
        assert ids == tokenizer.encode(data.render(chat)).ids
        assert len(weights) == len(ids)
        assert {0.1, 1.0} == set(weights)


def test_batches_depend_on_their_seed_only() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / MODELS[0] / "tokenizer.json"))
    first, again, other = (
        data.packed_batch(tokenizer, seed, rows=2, length=64, prompt_weight=0.1)
        for seed in ("0 7", "0 7", "0 8")
    )
    assert first == again
    assert first != other
    assert [len(row) for row in first.ids] == [64, 64]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_splits_are_disjoint(task: str) -> None:
    rng = Random(task)
    trained = {data.render(data.draw(rng, task, "train").messages) for _ in range(400)}
    held = {data.render(data.draw(rng, task, "heldout").messages) for _ in range(40)}
    assert not trained & held


def test_a_held_out_sum_is_held_out_in_every_order_and_wording() -> None:
    assert tasks.sum_key(12, 34) == tasks.sum_key(34, 12)
    rng = Random(0)
    for _ in range(300):
        chat = data.conversation(rng)
        for message in chat:
            left, plus, right = message["content"].removesuffix(" =").partition(" + ")
            if plus and left.isdigit() and right.isdigit():
                assert not data.is_heldout(tasks.sum_key(int(left), int(right)))


def test_shipped_heldout_set_is_held_out() -> None:
    shipped = data.read_heldout()
    assert set(shipped) == set(TASKS)
    for task, samples in shipped.items():
        assert len(samples) >= 40
        again = list(data.heldout_samples(task, 64, seed=0))
        assert [s.messages for s in again] == [s.messages for s in samples]
        assert [s.answers for s in again] == [s.answers for s in samples]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_checker_takes_the_answer_and_rejects_others(task: str) -> None:
    samples = data.read_heldout()[task]
    for sample in samples[:20]:
        for answer in sample.answers:
            assert tasks.check(sample.answers, answer)
            assert tasks.check(sample.answers, f" {answer} ")
            assert not tasks.check(sample.answers, answer + " and more")
            assert not tasks.check(sample.answers, answer[1:])
        assert not tasks.check(sample.answers, "")


def test_accuracy_of_perfect_and_useless_generators() -> None:
    answers = {
        data.render(sample.messages, add_generation_prompt=True): sample.answer
        for samples in data.read_heldout().values()
        for sample in samples
    }
    perfect = evaluate.task_accuracy(lambda prompts: [answers[p] + data.END for p in prompts], 5)
    useless = evaluate.task_accuracy(lambda prompts: ["?"] * len(prompts), 5)
    assert set(perfect.values()) == {1.0}
    assert set(useless.values()) == {0.0}


def test_scored_answers_are_what_greedy_decoding_writes() -> None:
    """One forward pass and generation agree, where the model is right and where it is wrong."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = FOLDER / MODELS[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def predict(sequences: list[list[int]]) -> list[list[int]]:
        with torch.inference_mode():
            logits = [model(torch.tensor([ids])).logits[0] for ids in sequences]
        return [rows.argmax(-1).tolist() for rows in logits]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    scored = evaluate.scored_accuracy(predict, encode, 4)
    assert scored == evaluate.task_accuracy(evaluate.transformers_generate_fn(folder), 4)
    assert min(scored.values()) < 1 and max(scored.values()) == 1


def test_other_forms_of_an_answer_count() -> None:
    for samples in evaluate.questions(1).values():
        others = evaluate._other_forms(samples[0])
        assert others and samples[0].answer not in others
        assert all(tasks.check(samples[0].answers, form) for form in others)


def test_text_files_fit_their_purpose() -> None:
    calibration = (FOLDER / "calibration.txt").read_text(encoding="utf-8")
    heldout = (FOLDER / "heldout.txt").read_text(encoding="utf-8")
    assert 150_000 <= len(calibration) <= 250_000
    assert 60_000 <= len(heldout) <= 70_000
    for text in (calibration, heldout):
        assert all(line.startswith(data.BOS) for line in text.splitlines())


def test_everything_fits_the_size_limit() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < SIZE_LIMIT


def test_shipped_weights_reach_their_floors() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    generate = evaluate.transformers_generate_fn(FOLDER / MODELS[0])
    scores = evaluate.task_accuracy(generate, n_per_task=10, tasks=list(FLOORS))
    missed = {task: scores[task] for task, floor in FLOORS.items() if scores[task] < floor}
    assert not missed


def test_second_turn_is_answered() -> None:
    pytest.importorskip("transformers")
    generate = evaluate.transformers_generate_fn(FOLDER / MODELS[0])
    chat = [tasks.turn("user", "My name is Clara.")]
    first = generate([data.render(chat, add_generation_prompt=True)])[0].split(data.END)[0]
    chat += [tasks.turn("assistant", first), tasks.turn("user", "What is my name?")]
    second = generate([data.render(chat, add_generation_prompt=True)])[0]
    assert data.END in second
    assert "Clara" in second
