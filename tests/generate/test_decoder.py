"""Rows decoded together against the largest logit of one full pass each time, and against transformers' own generation."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsgpt.config import ModelConfig
from dsgpt.errors import ConfigError, DataError, NumericalError
from dsgpt.generate.decoder import Decoder
from dsgpt.generate.sampling import Sampler, Sampling
from dsgpt.model.hf import build_hf, hf_model_config
from tests.model import test_gpt, test_hf

BATCHNORM = ModelConfig(**test_gpt.BASE, norm="batchnorm")
NATIVE = test_gpt.KINDS | {"batchnorm": BATCHNORM}
PROMPTS = ([5, 17, 3], [8], [40, 2, 9, 61, 7, 30, 12, 4, 77], [1, 2, 3, 4, 5])
GREEDY = Sampling(12, temperature=0)


def one_pass_each(model, prompt, count):
    """Greedy without a cache: the plain definition."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def run_all(model, prompts, sampling, places=2, end_ids=()):
    """At most `places` rows at once, in their order: rows join while others are in the middle."""
    decoder, waiting, done = Decoder(model), list(prompts), []
    while waiting or decoder.rows:
        while waiting and sum(row.finish is None for row in decoder.rows) < places:
            done.append(decoder.add(waiting.pop(0), sampling, end_ids))
        decoder.step()
    return done


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("places", [1, 2, 4])
def test_rows_decoded_together_are_what_each_is_alone_without_a_cache(kind, places):
    model = test_gpt.make(NATIVE[kind]).eval()
    rows = run_all(model, PROMPTS, GREEDY, places)
    assert [row.new for row in rows] == [one_pass_each(model, prompt, 12) for prompt in PROMPTS]
    assert {row.finish for row in rows} == {"length"}


@pytest.mark.parametrize("kind", test_hf.KINDS)
def test_models_of_transformers_generate_what_transformers_does(kind):
    theirs = test_hf.reference(kind)
    theirs.generation_config.eos_token_id = None
    long = [*range(20, 45)]  # more than the window of mistral here
    prompts = [*PROMPTS, long]
    rows = run_all(test_hf.ours(theirs), prompts, GREEDY, places=3)
    for row, prompt in zip(rows, prompts, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=12,
            pad_token_id=0,
        )  # fmt: skip
        assert row.new == expected[0, len(prompt) :].tolist(), prompt


def test_an_end_token_ends_its_row_alone_and_is_not_part_of_it():
    model = test_gpt.make(test_gpt.LLAMA).eval()
    whole = [row.new for row in run_all(model, PROMPTS, GREEDY, 4)]
    end = whole[0][4]
    for row, expected in zip(run_all(model, PROMPTS, GREEDY, 4, end_ids={end}), whole, strict=True):
        if end in expected:
            assert row.new == expected[: expected.index(end)] and row.finish == "stop"
        else:
            assert row.new == expected and row.finish == "length"


def test_the_context_ends_a_row_and_a_prompt_must_leave_room():
    model = test_gpt.make(test_gpt.LLAMA).eval()
    decoder = Decoder(model)
    row = decoder.add(list(range(20)), Sampling(60, seed=3))
    while decoder.step():
        pass
    assert len(row.new) == 24 - 20 and row.finish == "length"
    assert len(decoder.add(list(range(23)), GREEDY).new) == 1
    with pytest.raises(DataError, match="does not fit"):
        decoder.add(list(range(24)), GREEDY)
    with pytest.raises(DataError, match="empty"):
        decoder.add([], GREEDY)


def test_a_seed_gives_the_same_tokens_in_any_batch_and_another_one_others():
    model = test_gpt.make(test_gpt.LLAMA, scale=2.0).eval()
    chosen = Sampling(12, temperature=1.0, top_k=0, seed=5)
    alone = [run_all(model, [prompt], chosen)[0].new for prompt in PROMPTS]
    assert [row.new for row in run_all(model, PROMPTS, chosen, 4)] == alone
    assert [row.new for row in run_all(model, PROMPTS, Sampling(12, 1.0, 0, seed=6), 4)] != alone


@pytest.mark.parametrize(
    "chosen",
    [
        Sampling(temperature=0.7, top_k=0),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_k=0, top_p=0.6),
        Sampling(temperature=0.02, top_k=0, top_p=1e-30),
        Sampling(temperature=1.1, top_k=20, top_p=0.8, repetition_penalty=1.7),
    ],
    ids=["temperature", "top-k", "top-p", "edge", "all"],
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers(chosen):
    from transformers.generation import logits_process as theirs

    logits, prompt = torch.randn(30, generator=torch.Generator().manual_seed(1)) * 2, [3, 7, 7, 21]
    processors = [theirs.RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty)]
    processors += [theirs.TemperatureLogitsWarper(chosen.temperature)]
    processors += [theirs.TopKLogitsWarper(chosen.top_k)] if chosen.top_k else []
    processors += [theirs.TopPLogitsWarper(chosen.top_p)] if chosen.top_p < 1 else []
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([prompt]), scores)
    expected = scores.softmax(-1)[0]
    count, draws = torch.zeros(30), 4000
    for seed in range(draws):
        sampler = Sampler(Sampling(**{**vars(chosen), "seed": seed}), prompt, 30, torch.device("cpu"))
        count[sampler.choose(logits)] += 1
    assert not count[expected == 0].any()
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((count / draws - expected).abs() <= 4 * deviation + 3 / draws).all()


@pytest.mark.parametrize("kind", ["openai-gpt", "lfm2"])
def test_an_architecture_without_such_a_cache_is_refused(kind):
    """One keeps nothing and does not say so, the other keeps states of another kind."""
    import transformers

    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "openai-gpt":
        config = transformers.OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        layers = ["conv", "full_attention"]
        config = transformers.Lfm2Config(**sizes, hidden_size=32, num_key_value_heads=2, layer_types=layers)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = build_hf(hf_model_config(theirs.config.to_dict(), 1, "here"))
    model.load_state_dict(theirs.state_dict())
    with pytest.raises(ConfigError, match="cannot generate here"):
        Decoder(model.eval())


def test_the_penalty_knows_what_was_generated_too():
    logits = torch.tensor([3.0, 2.9, 1.0])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [2], 3, torch.device("cpu"))
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 0]


def test_a_row_without_numbers_ends_alone():
    model = test_gpt.make(test_gpt.LLAMA).eval()
    decoder = Decoder(model)
    good, bad = (decoder.add([5, token, 3], GREEDY) for token in (17, 4))
    keys, _ = decoder._cache.layers[0]
    keys[1] = float("nan")
    while decoder.step():
        pass
    assert good.error is None and good.new == one_pass_each(model, [5, 17, 3], 12)
    assert isinstance(bad.error, NumericalError) and len(bad.new) == 1


def test_logits_that_are_no_numbers_are_an_error():
    """Nor infinite ones: their differences are none."""
    for temperature, wrong in itertools.product((0, 1.0), ("nan", "inf")):
        sampler = Sampler(Sampling(temperature=temperature), [0], 3, torch.device("cpu"))
        with pytest.raises(NumericalError):
            sampler.choose(torch.tensor([1.0, float(wrong), 0.0]))
    for temperature in (0, 1.0):  # what must not be said may be impossible
        sampler = Sampler(Sampling(temperature=temperature), [0], 3, torch.device("cpu"))
        assert sampler.choose(torch.tensor([-torch.inf, 1.0, -torch.inf])) == 1
