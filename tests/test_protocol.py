"""The evaluation protocol: by hand on a bigram model, against transformers, against the reference figures."""

import json
import math
import os
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from comoe.bench.corpus import chunk_items, evaluate, next_chunk_accuracy
from comoe.make.protocol import ChunkItem, Evaluation, decode
from comoe.make.score import DomainScore, Score, compare
from comoe.make.text import documents, windows
from comoe.types import UsageError

SHARED = Path(os.environ.get("COMOE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
WORDS = ["<pad>", "</s>", "<|doc|>", "<extra_id_0>", *"abcdefgh"]
DOC, SPAN, EOS = 2, 3, 1
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared models and data at {SHARED}")


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


class Bigram:
    """A decoder whose logits are a row of `table` (vocabulary, vocabulary) by the last token alone."""

    training = False
    device = torch.device("cpu")
    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, table):
        self.table = table

    def __call__(self, input_ids, **_):
        past = SimpleNamespace(batch_repeat_interleave=lambda copies: None)
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=past)


def ids_of(*, rows, length, seed=0):
    return torch.randint(4, 12, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.5,
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def switch():
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=12,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config).eval()


def reference_nats(model, prompt, target):
    """One sequence, no batch, no cache: the sum of -log p of `target` after `prompt`."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).logits[0]
        else:
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return -float(logits.log_softmax(-1)[range(len(target)), target].sum())


def test_documents_lose_their_outer_newlines_and_empty_ones_vanish():
    assert documents("\n\na\n b \n<|doc|>\n<|doc|>\nc\n") == ["a\n b ", "c"]


def test_every_document_is_followed_by_the_mark_and_windows_are_full_and_consecutive(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(word) for word in "abcd"]
    a, b, c, d = ids
    text = "a b c\n<|doc|>\nd\n<|doc|>\na a\n"
    assert windows(tokenizer, text, 4) == [[a, b, c, DOC], [d, DOC, a, a]]
    assert windows(tokenizer, text, 3) == [[a, b, c], [DOC, d, DOC], [a, a, DOC]]
    assert windows(tokenizer, text, 3, limit=2) == [[a, b, c], [DOC, d, DOC]]


def test_no_more_text_is_tokenised_than_the_windows_need(tokenizer):
    seen = []

    class Counting:
        unk_token_id = 0
        convert_tokens_to_ids = tokenizer.convert_tokens_to_ids

        def __call__(self, text, **options):
            seen.append(text)
            return tokenizer(text, **options)

    assert len(windows(Counting(), "<|doc|>".join(["a b c"] * 9), 4, limit=2)) == 2
    assert len(seen) == 2


def test_a_tokeniser_without_the_document_mark_is_a_usage_error(tokenizer):
    spy = SimpleNamespace(convert_tokens_to_ids=lambda _: 0, unk_token_id=0)
    with pytest.raises(UsageError, match="doc"):
        windows(spy, "a", 4)


def test_a_uniform_model_scores_log_of_the_vocabulary_on_every_token_but_the_first(tokenizer):
    score = Evaluation.for_model(Bigram(torch.zeros(12, 12)), tokenizer).nats(ids_of(rows=3, length=256))
    assert score.tokens.tolist() == [255] * 3
    assert score.nats == pytest.approx([255 * math.log(12)] * 3, rel=1e-6)
    assert score.nats_per_token == pytest.approx(math.log(12))


def test_a_bigram_models_nats_are_the_sum_over_neighbouring_pairs(tokenizer):
    table = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    window = ids_of(rows=1, length=256)[0]
    log_z = [math.log(sum(math.exp(x) for x in row)) for row in table.tolist()]
    by_hand = sum(log_z[a] - float(table[a, b]) for a, b in pairwise(window))
    model = Bigram(table)
    assert Evaluation.for_model(model, tokenizer).nats([window]).nats[0] == pytest.approx(by_hand, rel=1e-5)
    assert decode(model, tokenizer, [window]).nats.sum() == pytest.approx(by_hand, rel=1e-5)


def test_switch_windows_are_128_tokens_and_a_span_to_the_encoder_and_95_and_the_end_to_the_decoder(tokenizer, switch):
    evaluation = Evaluation.for_model(switch, tokenizer)
    window = list(range(1000, 1224))
    assert evaluation.window_length == len(window)
    assert evaluation.split(window) == ([*window[:128], SPAN, EOS], [*window[128:223], EOS])


@pytest.mark.parametrize("name", ["qwen", "switch"])
def test_a_batch_scores_what_its_windows_score_alone(name, tokenizer, request):
    model = request.getfixturevalue(name)
    evaluation = Evaluation.for_model(model, tokenizer, batch=2)
    texts = ids_of(rows=3, length=evaluation.window_length)
    alone = [reference_nats(model, *evaluation.split(window)) for window in texts]
    assert evaluation.nats(texts).nats == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ["qwen", "switch"])
def test_decoding_token_by_token_gives_the_nats_of_the_whole_window(name, tokenizer, request):
    model = request.getfixturevalue(name)
    evaluation = Evaluation.for_model(model, tokenizer)
    texts = ids_of(rows=2, length=evaluation.window_length)
    whole = evaluation.nats(texts)
    ticks = count(0, 0.25)
    decoded = decode(model, tokenizer, texts, clock=lambda: next(ticks))
    rows = decoded.nats.reshape(2, whole.tokens[0])
    assert rows.sum(1) == pytest.approx(whole.nats, rel=1e-5)
    assert decoded.ms.tolist() == [250.0] * rows.size


def test_decoding_stops_at_the_tokens_asked_for_and_crosses_windows(tokenizer, qwen):
    texts = ids_of(rows=2, length=256)
    assert decode(qwen, tokenizer, texts, 300).nats.shape == (300,)
    assert decode(qwen, tokenizer, texts, 0).nats.shape == (0,)
    both, second = decode(qwen, tokenizer, texts, 260), decode(qwen, tokenizer, texts[1:], 5)
    assert both.nats[255:].tolist() == second.nats.tolist()


def words_of(length, seed):
    return " ".join(WORDS[i] for i in ids_of(rows=1, length=length, seed=seed)[0])


@pytest.mark.parametrize("name", ["qwen", "switch"])
def test_the_chosen_chunk_is_the_likeliest_per_token_scored_one_by_one(name, tokenizer, request):
    model = request.getfixturevalue(name)
    evaluation = Evaluation.for_model(model, tokenizer, batch=4)
    items, best = [], []
    for seed in range(24):
        choices = tuple(words_of(length, 100 + 3 * seed + length) for length in (1, 3, 2))
        items.append(ChunkItem("x", words_of(30 if seed % 3 else 200, seed), choices, answer=0))
        prompt = evaluation.prompt(tokenizer(items[-1].prefix).input_ids)
        ids = [tokenizer(choice).input_ids for choice in choices]
        best.append(int(np.argmin([reference_nats(model, prompt, x) / len(x) for x in ids])))
    right = [item._replace(answer=choice) for item, choice in zip(items, best, strict=True)]
    wrong = [item._replace(answer=(choice + 1) % 3) for item, choice in zip(items, best, strict=True)]
    assert set(best) == {0, 1, 2}
    assert evaluation.next_chunk(right) == [True] * 24
    assert evaluation.next_chunk(wrong) == [False] * 24
    assert next_chunk_accuracy(model, tokenizer, items) == best.count(0) / 24


def test_the_prompt_is_the_last_160_tokens_of_the_prefix(tokenizer, qwen, switch):
    prefix = list(range(1000, 1300))
    assert Evaluation.for_model(qwen, tokenizer).prompt(prefix) == prefix[140:]
    assert Evaluation.for_model(switch, tokenizer).prompt(prefix) == [*prefix[140:], SPAN, EOS]


def test_a_model_in_training_mode_is_refused(tokenizer, qwen):
    qwen.train()
    try:
        with pytest.raises(ValueError, match="training"):
            Evaluation.for_model(qwen, tokenizer)
    finally:
        qwen.eval()


def corpus(folder, texts):
    (folder / "data" / "corpus").mkdir(parents=True)
    for name, text in texts.items():
        (folder / "data" / "corpus" / name).write_text(text, "utf-8")
    return folder


def test_evaluate_reads_the_validation_texts_alone(tokenizer, tmp_path):
    shared = corpus(tmp_path, {"x.valid.txt": "a " * 600, "y.valid.txt": "b " * 300, "x.calib.txt": "c"})
    model = Bigram(torch.zeros(12, 12))
    score = evaluate(model, tokenizer, shared)
    assert {name: len(domain.nats) for name, domain in score.domains.items()} == {"x": 2, "y": 1}
    assert score.mean == pytest.approx(math.log(12))
    assert len(evaluate(model, tokenizer, shared, ["x"], 1).domains["x"].nats) == 1


def test_a_missing_or_too_short_text_is_a_usage_error(tokenizer, tmp_path):
    model, shared = Bigram(torch.zeros(12, 12)), corpus(tmp_path, {"x.valid.txt": "a b"})
    with pytest.raises(UsageError, match="klingon"):
        evaluate(model, tokenizer, shared, ["x", "klingon"])
    with pytest.raises(UsageError, match="shorter than one window"):
        evaluate(model, tokenizer, shared)
    with pytest.raises(UsageError, match="any domain"):
        evaluate(model, tokenizer, tmp_path / "nowhere")


def score_of(**domains):
    return Score({name: DomainScore(np.array(nats, float), np.full(len(nats), 255)) for name, nats in domains.items()})


def noisy(seed, *, factor=1.0, spread=0.0):
    """Two domains of 48 windows, the same exact nats for every call, times `factor` and noise."""
    exact = np.random.default_rng(0).uniform(400, 900, (2, 48))
    noise = 1 + spread * np.random.default_rng(seed).standard_normal((2, 48))
    return score_of(x=exact[0] * factor * noise[0], y=exact[1] * factor * noise[1])


def test_identical_scores_lose_nothing():
    loss = compare(noisy(1), noisy(1))
    assert (loss.mean, loss.ci95, loss.worst) == (0.0, (0.0, 0.0), 0.0)


def test_the_loss_is_the_mean_of_the_windows_increases_then_of_the_domains():
    loss = compare(score_of(x=[110, 200], y=[150, 100, 100]), score_of(x=[100, 200], y=[100, 100, 100]))
    assert loss.per_domain == pytest.approx({"x": 0.05, "y": 1 / 6})
    assert loss.mean == pytest.approx((0.05 + 1 / 6) / 2)
    assert (loss.worst_domain, loss.worst) == ("y", loss.per_domain["y"])


def test_the_same_factor_on_every_window_has_an_interval_of_no_width():
    loss = compare(noisy(1, factor=1.02), noisy(1))
    assert [loss.mean, *loss.ci95] == pytest.approx([0.02] * 3)


def test_the_interval_brackets_the_mean_and_is_as_wide_as_theory_says():
    loss = compare(noisy(3, factor=1.01, spread=0.02), noisy(0))
    low, high = loss.ci95
    assert low < loss.mean < high
    assert high - low == pytest.approx(2 * 1.96 * 0.02 / math.sqrt(96), rel=0.25)


def test_the_interval_depends_on_the_seed_alone():
    pair = noisy(3, spread=0.02), noisy(0)
    assert compare(*pair, seed=1) == compare(*pair, seed=1)
    assert compare(*pair, seed=1).ci95 != compare(*pair, seed=2).ci95


@pytest.mark.parametrize(
    "other",
    [score_of(x=[1.0]), score_of(x=[1, 2]), score_of(x=[1, 2], z=[1]), score_of(x=[1], y=[1]), Score({})],
)
def test_scores_of_other_windows_cannot_be_compared(other):
    with pytest.raises(ValueError, match="same"):
        compare(other, score_of(x=[1, 2], y=[1]))
    with pytest.raises(ValueError, match="same"):
        compare(score_of(x=[1, 2], y=[1]), other)


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(
    ("name", "family"), [("qwen3moe-mini", AutoModelForCausalLM), ("switch-mini", AutoModelForSeq2SeqLM)]
)
def test_the_reference_figures_of_a_domain_are_reproduced(name, family):
    folder = SHARED / "models" / name
    expected = json.loads((folder / "eval.json").read_text("utf-8"))
    model = family.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = evaluate(model, tokenizer, SHARED, ["man_es"]).nats_per_token["man_es"]
    assert nats == pytest.approx(expected["nats_per_token"]["man_es"], abs=1e-3)
    items = [item for item in chunk_items(SHARED) if item.domain == "man_es"]
    accuracy = next_chunk_accuracy(model, tokenizer, items)
    assert accuracy == pytest.approx(expected["next_chunk"]["man_es"], abs=1e-3)
