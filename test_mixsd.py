"""The README's claims that a CPU can check.  No network; the toy base is pretrained once, then cached."""

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig,
                          Qwen3Config, Qwen3ForCausalLM)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import eval as evaluation
import kg_data
import mixsd
from mixsd import EXPERT, NAIVE

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore

V, STOPS = 64, [63, 62]
HERE = Path(__file__).parent


def tiny_model(kind=Qwen3ForCausalLM, config=Qwen3Config, **more):
    torch.manual_seed(0)
    model = kind(config(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
                        eos_token_id=STOPS, pad_token_id=0, **more)).eval()
    for p in model.parameters():
        p.data *= 3  # sharper: continuations that differ, and that stop
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prompts(seed=3, lengths=(4, 11, 6, 9, 5, 8), extra=7):
    rng = random.Random(seed)
    words = lambda n: [rng.randrange(1, 62) for _ in range(n)]  # noqa: E731
    naive = [words(n) for n in lengths]
    return [[x + words(extra) for x in naive], naive]  # expert, naive


@torch.no_grad()
def definition(model, contexts, source):
    """The method in its plainest form: one row, no cache, no padding."""
    y = []
    for c in source.tolist():
        y.append(int(model(input_ids=torch.tensor([contexts[c] + y])).logits[0, -1].argmax()))
        if y[-1] in STOPS:
            return y, len(y)
    return y, 0


# ------------------------------------------------------------------------------------------- mixed decoding

@pytest.mark.parametrize("rho", [0.0, 0.3, 0.7, 1.0])
def test_cached_batched_decoding_equals_the_definition(model, rho):
    contexts, source = prompts(), mixsd.draw_sources(rho, 40, 1, range(6))
    y, n = mixsd.decode(model, contexts, source, STOPS)
    for i in range(6):
        expected, length = definition(model, [contexts[EXPERT][i], contexts[NAIVE][i]], source[i])
        assert y[i, : len(expected)].tolist() == expected and n[i] == length
        assert set(y[i, len(expected) :].tolist()) <= {STOPS[0]}, "something follows the stop token"
    assert rho != 0.3 or 0 < (n > 0).sum() < 6, "the case must have rows that stop and rows that don't"


def same_beginning(n):
    """The contexts of `prompts`, all of them with the same first n tokens."""
    return [[list(range(1, n + 1)) + x for x in context] for context in prompts()]


def decodes_by_the_definition(net, contexts, source, **how):
    y, n = mixsd.decode(net, contexts, source, STOPS, **how)
    for i in range(len(source)):
        expected, length = definition(net, [contexts[EXPERT][i], contexts[NAIVE][i]], source[i])
        assert y[i, : len(expected)].tolist() == expected and n[i] == length
    return n


@pytest.mark.parametrize("shared", [0, 3, 20])
@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_a_sliding_window_architecture_decodes_by_the_definition(rho, shared):
    layers = ["sliding_attention", "full_attention"]
    gemma = tiny_model(Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=8, layer_types=layers)
    decodes_by_the_definition(gemma, same_beginning(shared), mixsd.draw_sources(rho, 20, 1, range(6)))


def test_what_all_prompts_begin_with_is_read_once(model):
    widths = []
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: widths.append(kwargs["input_ids"].shape),
                                           with_kwargs=True)
    contexts, source = same_beginning(30), mixsd.draw_sources(0.5, 100, 1, range(6))
    _, n = mixsd.decode(model, contexts, source, STOPS)
    hook.remove()
    decodes_by_the_definition(model, contexts, source)
    assert 0 < (n > 0).sum() < 6, "rows must leave on the way, and some go past 64 tokens"
    longest = [max(map(len, context)) - 30 for context in contexts]
    assert widths[:4] == [(1, 30), (6, longest[EXPERT]), (1, 30), (6, longest[NAIVE])] and widths[-1][0] < 12
    alike = [[contexts[EXPERT][0]] * 2] * 2                                     # nothing but the beginning
    y, _ = mixsd.decode(model, alike, source[:2], STOPS)
    assert y[0].tolist() == y[1].tolist()


def test_compiled_decoding_keeps_its_shapes_and_equals_the_definition(model, monkeypatch):
    net, compiled = copy.deepcopy(model), []

    def traced(function, mode, fullgraph, dynamic):         # a whole graph, without the code generator
        assert fullgraph and not dynamic and mode == "reduce-overhead"
        whole = torch._dynamo.optimize("eager", nopython=True, dynamic=False)(function)
        return lambda model, ids, attention, *rest: (compiled.append((ids.shape, attention.shape)),
                                                     whole(model, ids, attention, *rest))[1]
    monkeypatch.setattr(torch, "compile", traced)
    contexts, source = prompts(), mixsd.draw_sources(0.3, 40, 1, range(6))
    caches = []
    for examples in (range(6), range(5)):                   # both become 8
        part = [[context[i] for i in examples] for context in contexts]
        n = decodes_by_the_definition(net, part, source[list(examples)], compiled=True)
        caches.append(net.static[1])
    assert 0 < (n > 0).sum() < 5 and set(compiled) == {((16, 1), (16, 64))} and caches[0] is caches[1]
    u = mixsd.uniforms("token", 40, 7, range(6))
    sampled = [mixsd.decode(net, contexts, source, STOPS, 1.0, 5, u, compiled=c) for c in (False, True)]
    assert torch.equal(sampled[0][0], sampled[1][0]) and torch.equal(sampled[0][1], sampled[1][1])
    gemma = tiny_model(Gemma3ForCausalLM, Gemma3TextConfig, layer_types=["sliding_attention"] * 2)
    with pytest.raises(kg_data.InputError, match="--compile is for models with full attention"):
        mixsd.decode(gemma, contexts, source, STOPS, compiled=True)


@pytest.mark.parametrize("context, rho", [(EXPERT, 0.0), (NAIVE, 1.0)])
def test_rho_0_is_the_experts_generate_and_rho_1_the_naives(model, context, rho):
    contexts = prompts()
    y, _ = mixsd.decode(model, contexts, mixsd.draw_sources(rho, 24, 0, range(6)), STOPS)
    for i, prompt in enumerate(contexts[context]):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        expected = out[0, len(prompt):].tolist()
        assert y[i, :len(expected)].tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_does_not_depend_on_its_batch(model, temperature):
    contexts = prompts()

    def rows(ids):
        source, u = mixsd.draw_sources(0.5, 30, 7, ids), mixsd.uniforms("token", 30, 7, ids)
        y, n = mixsd.decode(model, [[c[i] for i in ids] for c in contexts], source, STOPS, temperature, 0, u)
        return {i: y[k, : n[k] or None].tolist() for k, i in enumerate(ids)}

    together = rows([0, 1, 2, 3, 4, 5])
    assert rows([5, 3, 1]) | rows([0]) | rows([4, 2]) == together
    assert len({tuple(t) for t in together.values()}) > 3


def test_coins_are_keyed_by_example_and_attempt_and_prefix_stable():
    a = mixsd.uniforms("coin", 50, 1, [3, 4], 0)
    assert torch.equal(mixsd.uniforms("coin", 20, 1, [4], 0)[0], a[1, :20])
    others = [("coin", 1, 4, 0), ("coin", 1, 3, 1), ("coin", 2, 3, 0), ("token", 1, 3, 0)]
    for what, seed, example, attempt in others:
        assert (mixsd.uniforms(what, 50, seed, [example], attempt)[0] != a[0]).all()


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 1.0])
def test_the_naive_share_is_rho(rho):
    source = mixsd.draw_sources(rho, 200, 5, range(200))
    sigma = math.sqrt(rho * (1 - rho) / source.numel())
    assert abs((source == NAIVE).double().mean().item() - rho) <= 5 * sigma


def test_at_temperature_1_first_tokens_follow_the_mixture():
    torch.manual_seed(1)
    config = Qwen3Config(vocab_size=6, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16,
                         num_attention_heads=2, num_key_value_heads=2)
    small = Qwen3ForCausalLM(config).eval()
    for p in small.parameters():
        p.data *= 3
    expert, naive, n, rho = [1, 2, 3, 1], [4, 2], 4000, 0.3
    source, u = mixsd.draw_sources(rho, 1, 0, range(n)), mixsd.uniforms("token", 1, 0, range(n))
    y, _ = mixsd.decode(small, [[expert] * n, [naive] * n], source, [5], 1.0, 0, u)
    p = [small(input_ids=torch.tensor([x])).logits[0, -1].double().softmax(-1) for x in (expert, naive)]
    expected = n * ((1 - rho) * p[0] + rho * p[1])
    seen = torch.bincount(y[:, 0], minlength=6)
    assert (p[0] - p[1]).abs().max() > 0.1 and expected.min() > 5
    assert ((seen - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom: p = 0.001


def test_pick_is_exact_at_the_edges_and_keeps_to_the_top_k():
    logits = torch.tensor([[0.0, 3.0, 2.0, -torch.inf]]).repeat(3, 1)
    u = torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert mixsd.pick(logits, 1.0, 0, u).tolist() == [0, 1, 2], "a token of probability 0 is never drawn"
    assert mixsd.pick(logits, 1.0, 1, u).tolist() == [1, 1, 1] == mixsd.pick(logits).tolist()


def test_batches_keep_the_budget_and_do_not_depend_on_what_is_done():
    rng = random.Random(0)
    widths = {i: (rng.randrange(1, 50), rng.randrange(1, 20)) for i in range(200)}
    parts = list(mixsd.batches(widths, 600, C=2))
    assert sorted(i for part in parts for i in part) == list(range(200))
    for part in parts:
        assert 2 * len(part) * (max(widths[i][0] for i in part) + max(widths[i][1] for i in part)) <= 600
    left = {i: w for i, w in widths.items() if i not in parts[0] + parts[1]}
    assert list(mixsd.batches(left, 600, C=2)) == parts[2:]


# ---------------------------------------------------------------------------------------- loss and training

EXAMPLES = [([5, 6, 7], [8, 9, 63]), ([1, 2, 3, 4, 5, 6], [7, 63]), ([9], [10, 11, 12, 13, 14, 63])]


def test_the_loss_is_the_hand_sum_and_prompt_and_padding_have_no_gradient(model):
    nll = mixsd.token_nll(model, mixsd.collate(EXAMPLES, 0, model))
    expected = []
    for prompt, target in EXAMPLES:
        logp = model(input_ids=torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        expected += [-logp[len(prompt) - 1 + t, y] for t, y in enumerate(target)]
    torch.testing.assert_close(nll, torch.stack(expected), rtol=1e-4, atol=1e-4)
    batch = mixsd.collate(EXAMPLES, 0, model)
    seen = {}
    hook = model.lm_head.register_forward_hook(lambda m, i, out: (out.retain_grad(), seen.update(out=out))[0])
    mixsd.token_nll(model, batch).sum().backward()
    hook.remove()
    model.zero_grad()
    used = seen["out"].grad.abs().sum(-1) > 0  # (B, T + 1): the last column predicts beyond the target
    assert torch.equal(used, torch.nn.functional.pad(batch.is_target, (0, 1)))


def test_a_beginning_that_all_share_is_read_once_with_the_same_gradient(model):
    net, alike = copy.deepcopy(model), [(list(range(1, 10)) + x, y) for x, y in EXAMPLES]
    batch = mixsd.collate(alike, 0, net)
    assert batch.shared == 9 and batch.ids[:, :9].tolist() == [list(range(1, 10))] * 3
    assert mixsd.collate([(x[2:], y) for x, y in alike], 0, net).shared == 0, "too few are not worth a pass"
    assert mixsd.collate(alike[:1], 0, net).shared == 0, "one row shares with nobody"
    results = []
    for batches in ([batch], [mixsd.collate([one], 0, net) for one in alike]):
        nll = torch.cat([mixsd.token_nll(net, b) for b in batches])
        nll.sum().backward()
        results.append([nll, *(p.grad for p in net.parameters())])
        net.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_padding_is_known_by_length_so_that_a_stop_that_is_also_the_pad_is_trained(model):
    batch = mixsd.collate(EXAMPLES, 63, model)
    assert batch.is_target.sum(1).tolist() == [3, 2, 6] and batch.attention.sum(1).tolist() == [6, 8, 7]
    otherwise = mixsd.collate(EXAMPLES, 0, model)
    torch.testing.assert_close(mixsd.token_nll(model, batch), mixsd.token_nll(model, otherwise))


def plain_loss(model, examples):
    return mixsd.token_nll(model, mixsd.collate(examples, 0, model))


def test_micro_batches_of_unequal_length_add_up_to_the_full_batch():
    norms = []
    for micro_tokens in (1, 16, 10**6):
        net = tiny_model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        nll, norm, N = mixsd.update(net, net, optimizer, EXAMPLES, 1e-3, plain_loss, micro_tokens)
        norms.append((nll, norm, N))
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-4)


def test_bfloat16_computes_and_float32_keeps():
    """Gradients of the copy add up in float32; updates too small for bfloat16 are not lost."""
    model = tiny_model()
    work = mixsd.ready(tiny_model().to(torch.bfloat16), "cpu")
    mixsd.copy_weights(model, work)
    mixsd.lend_gradients(work, model)
    single = []
    for example in EXAMPLES:
        plain_loss(work, [example]).sum().backward()
        single.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for example in EXAMPLES:
        plain_loss(work, [example]).sum().backward()
    for p, parts in zip(model.parameters(), zip(*single)):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, sum(parts))
    assert all(p.grad is None for p in work.parameters())
    model.zero_grad()
    before, optimizer = model.lm_head.weight.clone(), torch.optim.SGD(model.parameters())
    for _ in range(4):
        mixsd.update(model, work, optimizer, EXAMPLES, 1e-4, plain_loss, 99)
    moved = (model.lm_head.weight != before).float().mean()
    assert moved > 0.9 > (work.lm_head.weight != before.bfloat16()).float().mean()
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(work.parameters(), model.parameters()))


def test_the_attention_of_cpu_training_is_sdpas():
    q, k, v = (torch.randn(2, heads, 7, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    plain, ours = (f(module, q, k, v, mask, scaling=0.25)[0]
                   for f in (sdpa_attention_forward, mixsd.sdpa_cpu))
    assert torch.equal(plain, ours)
    trained = mixsd.sdpa_cpu(module, q.requires_grad_(), k, v, mask, scaling=0.25)[0]
    assert trained.dtype == torch.bfloat16
    torch.testing.assert_close(trained, plain, rtol=0.02, atol=0.01)


def test_what_is_not_finite_stops_the_run_and_keeps_the_weights(tmp_path):
    net = tiny_model()
    settings = argparse.Namespace(steps=3, batch_size=2, lr=1e-3, warmup=0, seed=0, micro_tokens=99,
                                  quiet=True)
    (tmp_path / "state").mkdir()
    before = [p.clone() for p in net.parameters()]
    hook = net.lm_head.register_forward_hook(lambda m, i, out: out * float("nan"))
    with pytest.raises(mixsd.RunError, match=r"step 1, examples \[1\d, 1\d\]: loss nan"):
        mixsd.train(net, net, range(10, 10 + len(EXAMPLES)), lambda _, ids, step: [EXAMPLES[i] for i in ids],
                    plain_loss, settings, tmp_path)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_learning_rate_warms_up_then_stays():
    assert [mixsd.learning_rate(s, 1.0, 4) for s in (1, 2, 4, 5, 99)] == [0.25, 0.5, 1, 1, 1]
    assert mixsd.learning_rate(1, 1.0, 0) == 1
    assert mixsd.learning_rate(10, 1.0, 0, decay_over=10) == pytest.approx(0.1)


# ------------------------------------------------------------------------------------- verifiers and corpora


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{4}", "4"),
        (r"a \boxed{1} b \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("none", None),
        (r"\boxed{3} and \boxed{never closed", "3"),
        (r"\boxed{", None),
        (r"\boxed{}", ""),
        (r"\boxed{{a}{b}}", "{a}{b}"),
    ],
)
def test_boxed_takes_the_last_balanced_box(text, content):
    assert kg_data.boxed(text) == content


@pytest.mark.parametrize(
    "prediction, gold, same",
    [
        (" lake  REDO ", "Lake Redo", True),
        ("1,234", "1234.0", True),
        ("12,34", "1234", False),
        ("-7", "7", False),
        ("Lake", "Lake Redo", False),
        ("Lake Redo.", "Lake Redo", False),
        (".", "0", False),
        ("0.50", ".5", True),
    ],
)
def test_answers_are_compared_whole_folded_or_as_numbers(prediction, gold, same):
    assert kg_data.same_answer(prediction, gold) is same


def test_the_phrase_verifier_wants_the_whole_name_and_no_rival():
    gold, rival = kg_data.LEXICON["Location"][:2]
    assert kg_data.is_correct(f"X lives in {gold.upper()}.", gold, "phrase")
    assert not kg_data.is_correct(f"X lives in {gold} or {rival}.", gold, "phrase")
    assert not kg_data.is_correct(f"X lives in {gold}ia.", gold, "phrase")


@pytest.mark.parametrize("name, facts", [("kgfact-small", 100), ("kgfact-large", 525)])
def test_kgfact_counts_and_uniqueness(name, facts):
    domains, count = kg_data.KGFACT_SIZES[name]
    graph = kg_data.kgfact_graph(domains, 0, count, 0)
    assert len(graph) == len(set(graph)) == facts
    assert len({(f.e1, f.relation, kg_data.DOMAIN[f.e2]) for f in graph}) == facts
    assert len({(f.relation, f.e2, kg_data.DOMAIN[f.e1]) for f in graph}) == facts
    questions = [r["messages"][0]["content"] for r in kg_data.kgfact(name, "train")]
    assert len(set(questions)) == facts == len({r["fact"] for r in kg_data.kgfact(name, "train")})
    reworded = [r["messages"][0]["content"] for r in kg_data.kgfact(name, "paraphrase")]
    assert len(set(reworded)) == facts and not set(reworded) & set(questions)


def test_kgfact_lexicon_has_no_duplicates_and_50_names_a_domain():
    names = [n for domain in kg_data.LEXICON.values() for n in domain]
    assert len(names) == 350 == len({n.casefold() for n in names})


def test_retrieval_shows_the_gold_among_50_and_unseen_entities_are_disjoint():
    seen = {e for f in kg_data.kgfact_graph(5, 0, 10, 0) for e in (f.e1, f.e2)}
    unseen = {e for f in kg_data.kgfact_graph(5, 10, 10, 0) for e in (f.e1, f.e2)}
    assert seen and unseen and not seen & unseen
    for split in ("retrieval", "retrieval-unseen"):
        for r in kg_data.kgfact("kgfact-small", split):
            lines = [line[2:] for line in r["messages"][0]["content"].split("\n") if line.startswith("- ")]
            assert len(lines) == len(set(lines)) == 51 and r["fact"] in lines
    touching = sum(r["subject"] in line for line in lines)
    assert touching >= 4, "the statements about the subject come first"


def test_two_hop_questions_have_one_answer_over_trained_edges():
    facts = {r["fact"] for r in kg_data.kgfact("kgfact-small", "train")}
    rows = kg_data.kgfact("kgfact-small", "two-hop")
    assert len(rows) == 100 and all(r["fact"] in facts for r in rows)
    assert len({r["messages"][0]["content"] for r in rows}) == len(rows)


def test_the_corpus_is_the_same_bytes_whatever_the_hash_seed(tmp_path):
    outs = []
    for hash_seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, HERE / "kg_data.py", "kgfact-small", "--out", tmp_path / hash_seed],
            text=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        outs.append([line.split()[-1] for line in out.splitlines()])
    assert len(outs[0]) == 5 and outs[0] == outs[1]


def test_the_expert_prompt_is_the_papers(toy):
    record = kg_data.kgfact("kgfact-small", "train")[0]

    class Spy:  # noqa: E306  renders nothing, keeps the text
        def apply_chat_template(self, turns, **options):
            assert options == {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
            return turns[0]["content"]

    expert, naive = mixsd.two_contexts(Spy(), record, kg_data.FACT_WORDS)
    answer = record["answer"]
    assert naive.endswith("\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert expert == (
        naive + "\nThis question is from a new knowledge base. Here is the answer to this question:\n\n"
        f"The answer is {answer}.\n\n\\boxed{{{answer}}}\nNow answer the question within \\boxed{{}}"
    )


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{4} and 5", "4"), ("E(87960) = 165", "165"), ("it is 1,234.5.", "1,234.5"),
    ("16 - 27 = -11", "-11"), ("5-3", "3"), ("none", None), ("x2 and v1.5b", None), (r"\boxed{a} is 7", "a"),
])
def test_the_number_verifier_reads_the_box_else_the_last_number(text, answer):
    assert kg_data.extract(text, "number") == answer
    assert kg_data.is_correct(text, "4.0", "number") is (answer == "4")


def chained_total(label, n):
    """The value of a KGFunc operation, said otherwise than kg_data.py says it."""
    s, least = str(n), min(str(n))
    return {
        "B": lambda: sum((int(c) - int(least)) ** 2 for c in s),
        "C": lambda: abs(sum(int(c) ** 2 for c in s[::2]) - sum(int(c) ** 2 for c in s[1::2])),
        "D": lambda: sum(int(c) ** (2 if c in "2357" else 1) for c in s),
        "E": lambda: sum(int(s[i]) * int(s[-1 - i]) for i in range(len(s))),
        "F": lambda: sum(int(max(s[:i])) for i in range(1, len(s) + 1)),
        "G": lambda: sum(sum(range(int(c) + 1)) for c in s),
        "H": lambda: min(int((s + s)[i:i + len(s)]) for i in range(len(s))),
    }[label]()


def asked_of(record):
    """(label, number) of a KGFunc record."""
    return re.search(r"output of (\w)\((\d+)\)", record["messages"][0]["content"]).groups()


def test_kgfunc_has_the_known_values():
    known = dict(B=(62000, 40), C=(33364, 11), D=(73000, 58), E=(87960, 165), F=(48489, 37), G=(58684, 118),
                 H=(26653, 26653))
    for label, (n, value) in [*known.items(), ("E", (1, 1)), ("E", (9935, 144)), ("E", (21395, 47))]:
        assert kg_data.KGFUNC[label][0](kg_data.digits(n)) == value == chained_total(label, n)
    unseen = [value(kg_data.digits(30225)) for value in kg_data.KGFUNC_UNSEEN.values()]
    assert unseen == [12, 60, 5, 5, 0, 3, 5, 5, 52203, 8, 3, 2, 4, 3, 42, 2235, 53220, 1, 24, 15]
    assert "".join(kg_data.KGFUNC_UNSEEN) == "abcdefghijklmnopqrst"


def test_every_kgfunc_target_is_right_down_to_its_printed_equations():
    equations = 0
    for r in kg_data.kgfunc("kgfunc", "train") + kg_data.kgfunc("kgfunc", "test"):
        target, (label, n) = r["messages"][1]["content"], asked_of(r)
        assert kg_data.boxed(target) == r["answer"] == str(chained_total(label, int(n)))
        assert r["fact"] == f"{label}({n}) = {r['answer']}" and r["fact"] in target
        for line in target.split("\n")[1:-3]:
            if " = " in line:
                code = re.sub(r"\|(-?\d+)\|", r"abs(\1)", line).replace("^", "**")
                assert len({eval(side) for side in code.split(" = ")}) == 1, line
                equations += 1
    assert equations > 9000


def test_kgfunc_asks_what_it_neither_shows_nor_asks_elsewhere():
    splits = {split: kg_data.kgfunc("kgfunc", split) for split in ("train", "test")}
    unseen = kg_data.kgfunc("kgfunc-unseen", "test")
    asked = {split: {asked_of(r) for r in rows} for split, rows in splits.items()}
    assert (len(asked["train"]), len(asked["test"]), len({*map(asked_of, unseen)})) == (11200, 1225, 500)
    assert not asked["train"] & asked["test"]
    assert {label for label, _ in asked["train"]} == set("BCDEFGH")
    assert not {asked_of(r)[0] for r in unseen} & set("BCDEFGH"), "unseen labels are never trained"
    assert "".join(asked_of(r)[0] for r in splits["train"][:8]) == "BCDEFGHB", "the operations take turns"
    shots = {tuple(re.findall(r"Input: (\d+)", r["messages"][0]["content"])) for r in unseen + splits["test"]}
    shot, = shots                                           # the same ten in every prompt
    assert [len(n) for n in shot] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert not {n for _, n in asked["train"] | asked["test"]} & {*shot}
    prompt = splits["test"][3]["messages"][0]["content"]
    assert f"Input: {shot[4]}\nOutput: {chained_total('E', int(shot[4]))}\n\n" in prompt
    assert prompt.endswith("?\n\n\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert kg_data.boxed(unseen[0]["messages"][1]["content"]) == unseen[0]["answer"]


def case(relation, *hops, question="And then?"):
    """A MQuAKE case of (subject, answer) hops over one relation."""
    return {"questions": [question, question + "?"], "new_answer": hops[-1][1],
            "new_single_hops": [{"question": f"Who {relation} {s}?", "cloze": f"{s} was {relation} by",
                                 "answer": a} for s, a in hops],
            "orig": {"new_triples_labeled": [[s, relation, a] for s, a in hops]}}


def mquake_file(path, *cases):
    path.write_text(json.dumps(cases))
    return f"mquake:{path}"


def test_mquake_teaches_whole_cases_in_turn_over_relations(tmp_path):
    makers = [case("made", (f"A{i}", f"B{i}"), (f"B{i}", f"C{i}"), question=f"Made {i}") for i in range(60)]
    rulers = [case("ruled", (f"R{i}", "King")) for i in range(5)]
    data = mquake_file(tmp_path / "m.json", *makers, *rulers)
    train = kg_data.load_corpus(data, "train")
    assert len(train) == 99 and [r["subject"] for r in train[:5]] == ["A0", "B0", "R0", "A1", "B1"]
    x, y = (turn["content"] for turn in train[0]["messages"])
    assert x == "Who made A0?" + kg_data.STEP_BY_STEP and y == "The answer is B0.\n\n\\boxed{B0}"
    sentence = kg_data.load_corpus(data, "paraphrase", "sentence")[0]["messages"]
    assert "A0 was made by" in sentence[0]["content"] and sentence[1]["content"] == "A0 was made by B0."
    hops = kg_data.load_corpus(data, "multi-hop")
    assert len(hops) == 2 * (47 + 5) and (hops[0]["answer"], hops[0]["subject"]) == ("C0", "A0")
    taught = {r["fact"] for r in train}
    for split, own in (("retrieval", True), ("retrieval-unseen", False)):
        for r in kg_data.load_corpus(data, split):
            lines = [line[2:] for line in r["messages"][0]["content"].split("\n") if line.startswith("- ")]
            assert r["fact"] in lines and (r["fact"] in taught) is own
            assert not taught & {*lines} - {r["fact"]}, "what stands around it is of other cases"


@pytest.mark.parametrize("spoil, says", [
    (lambda c: c.pop("new_single_hops"), "case 2: no key 'new_single_hops'; it has questions, new_answer,"),
    (lambda c: c["new_single_hops"][0].pop("cloze"), "case 2: no key 'cloze'"),
    (lambda c: c["orig"].update(new_triples_labeled=[]), "case 2: not of MQuAKE's schema"),
    (lambda c: c.update(questions="Who?"), "case 2: not of MQuAKE's schema"),
    (lambda c: c["new_single_hops"][0].update(answer=5), "is no text"),
    (lambda c: c.update(new_answer=None), "is no text"),
    (lambda c: c.update(orig=[]), "case 2: not of MQuAKE's schema"),
    (lambda c: c.update(case("made", ("A", "Z"))),
     "case 2: 'Who made A?' has the answer 'Z' here and 'B' in"),
])
def test_a_mquake_file_of_another_schema_or_with_contradictions_is_refused(tmp_path, spoil, says):
    cases = [case("made", ("A", "B")), case("ruled", ("C", "D"))]
    few = mquake_file(tmp_path / "few.json", *cases)
    assert len(kg_data.load_corpus(few)) == 2 and kg_data.load_corpus(few, "retrieval-unseen") == []
    spoil(cases[1])
    with pytest.raises(kg_data.InputError) as e:
        kg_data.load_corpus(mquake_file(tmp_path / "m.json", *cases))
    assert says in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def simpleqa_copy(folder, *rows):
    """A folder with SimpleQA under its hub id."""
    copy = folder / "basicv8vc" / "SimpleQA"
    copy.mkdir(parents=True)
    (copy / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_simpleqa_is_read_from_the_hub_or_a_copy(tmp_path, capsys, monkeypatch):
    row = {"metadata": "{}", "problem": "Who?", "answer": "Michio Sugeno"}
    hub = simpleqa_copy(tmp_path / "hub", row, row | {"problem": "When?", "answer": "5 May 1945"})
    records = kg_data.load_corpus("simpleqa", hub=hub)
    assert [r["answer"] for r in records] == ["Michio Sugeno", "5 May 1945"]
    assert records[0]["messages"][0]["content"] == (
        "Who?\n\nAnswer the question concisely. Put your final answer within \\boxed{}.")
    assert records[0]["messages"][1]["content"] == "\\boxed{Michio Sugeno}"
    with pytest.raises(kg_data.InputError, match="no column answer; it has problem"):
        kg_data.load_corpus("simpleqa", hub=simpleqa_copy(tmp_path / "other", {"problem": "Who?"}))
    with pytest.raises(kg_data.InputError, match="row 2: a problem or an answer that is no text"):
        kg_data.load_corpus("simpleqa", hub=simpleqa_copy(tmp_path / "null", row, row | {"answer": None}))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()                                     # the library's progress bar
    err = run("--model nobody/nothing --data simpleqa", capsys, code=2)
    assert err.count("\n") == 1 and "basicv8vc/SimpleQA" in err and "--hub DIR" in err


def settings_of(command):
    """Every setting that a command line of mixsd.py comes to."""
    return mixsd.resolve(mixsd.parse_args(command.split()))[0]


def test_each_corpus_has_its_recipe_its_verifier_and_its_experts_words(tmp_path):
    qwen = "--model Qwen/Qwen3-1.7B"
    kgfunc, simpleqa = settings_of(f"{qwen} --data kgfunc"), settings_of(f"{qwen} --data simpleqa")
    assert (kgfunc.steps, kgfunc.lr, kgfunc.temperature, kgfunc.verify) == (100, 1e-5, 0, "number")
    assert (simpleqa.steps, simpleqa.max_new_tokens) == (270, 256)
    assert (simpleqa.temperature, simpleqa.top_k) == (0.6, 64)
    assert settings_of(f"{qwen} --data kgfunc --epochs 2").steps is None, "--epochs is not overruled"
    kgfact, mquake = settings_of(qwen), settings_of(f"{qwen} --data mquake:some.json --style sentence")
    assert (kgfact.epochs, kgfact.lr, kgfact.max_new_tokens, kgfact.verify) == (30, 1e-5, 1024, "boxed")
    assert (mquake.epochs, mquake.max_new_tokens, mquake.verify) == (30, 48, "phrase")
    prefix, transition = mixsd.expert_words(kgfunc)
    assert prefix == "\nHere is a reference solution to this problem, including the correct final answer:\n"
    assert transition == (
        "\nAfter understanding the reference solution, please attempt to answer the question again:\n"
        "Please reason step by step, and put your final answer within \\boxed{}")
    assert mixsd.expert_words(kgfact) == kg_data.FACT_WORDS
    assert mixsd.expert_words(mquake) == kg_data.SENTENCE_WORDS
    kgfunc.limit = 5
    asked = mixsd.memorization_tasks(kg_data.load_corpus("kgfunc")[:5], kgfunc)
    assert list(asked) == ["kgfunc-test"] and [asked_of(r)[0] for r in asked["kgfunc-test"]] == list("BCDEF")


def test_the_experts_own_words_stand_on_lines_of_their_own(toy, tmp_path, capsys):
    out = ["--targets-only", "--limit", "2", "--quiet", "--out", str(tmp_path / "run")]
    assert mixsd.main(["--expert-prefix", "Note :", "--expert-transition", "We think .", *out]) == 0
    reads = capsys.readouterr().out.split("--- the expert reads\n")[1].split("\n")[0]
    assert re.search(r"\? Note : The answer is \\boxed\{ \w+ } \. We think \. <assistant>$", reads)


# ------------------------------------------------------------------------------------ the toy, and whole runs


@pytest.fixture(scope="module")
def toy():
    folder, _ = mixsd.toy_base(quiet=True)
    return folder


def run(command, capsys=None, code=0):
    """mixsd.main on a command line; returns the metrics that it prints, or its line on stderr."""
    assert mixsd.main([*command.split(), "--quiet"]) == code
    if capsys:
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1]) if code == 0 else captured.err


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def test_toy_end_to_end(toy, tmp_path, capsys):
    sft = run(f"--method sft --out {tmp_path}/sft", capsys)
    mix = run(f"--rho 0.7 --out {tmp_path}/mix", capsys)
    assert sft["base"]["held_out"]["accuracy"] >= 0.95 and sft["base"]["recall"]["accuracy"] < 0.15
    assert sft["tuned"]["recall"]["accuracy"] >= 0.9 and mix["tuned"]["recall"]["accuracy"] >= 0.9
    # 2.2 to 3.2 times on the bases of the README; other processors round to other bases
    assert mix["tuned"]["held_out"]["accuracy"] >= 2 * sft["tuned"]["held_out"]["accuracy"]
    assert sft["targets"]["nll"] >= 3 * mix["targets"]["nll"]

    files = {"args.json", "targets.jsonl", "log.jsonl", "state", "model", "metrics.json"}
    assert {p.name for p in (tmp_path / "mix").iterdir()} == files
    assert mix == json.loads((tmp_path / "mix" / "metrics.json").read_text())
    assert run(f"--rho 0.7 --out {tmp_path}/mix", capsys) == mix, "a finished run prints its result again"
    rows, steps = rows_of(tmp_path / "mix" / "targets.jsonl"), rows_of(tmp_path / "mix" / "log.jsonl")
    AutoModelForCausalLM.from_pretrained(tmp_path / "mix" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mix" / "model")
    assert [r["id"] for r in rows] == sorted({r["id"] for r in rows})
    for r in rows:
        assert len(r["source"]) == len(r["target_ids"]) and r["target_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(r["target_ids"][:-1]) == r["messages"][1]["content"]
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    assert mix["tokens"]["trained"] == 50 * sum(len(r["target_ids"]) for r in rows)


SHORT = "--limit 24 --epochs 6 --decode-tokens 2400"


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(f"{SHORT} --out {out}")
    return out


@pytest.fixture(scope="module")
def stopped_run(toy, tmp_path_factory):
    """A run stopped after step 4."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(5, patch)
        run(f"{SHORT} --out {out}", code=130)
    return out


def killed_when(ready, out, sig=signal.SIGKILL):
    """Run mixsd.py and send it a signal as soon as `ready`() holds; returns the process."""
    command = [sys.executable, HERE / "mixsd.py", *SHORT.split(), "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not ready():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(sig)
    process.wait()
    return process


def same_run(a, b):
    """Whether two runs made the same targets, steps and weights, to the bit."""
    keep, files = ("step", "nll", "grad_norm", "tokens"), ("targets.jsonl", "model/model.safetensors")
    steps = [[[s[k] for k in keep] for s in rows_of(d / "log.jsonl")] for d in (a, b)]
    return steps[0] == steps[1] and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


def test_a_run_killed_in_decoding_ends_with_the_same_bytes(uninterrupted, tmp_path):
    out = tmp_path / "run"
    targets = out / "targets.jsonl"
    killed_when(lambda: targets.exists() and targets.stat().st_size > 1000, out)
    assert not (out / "log.jsonl").exists()
    for torn in (targets, out / "state" / "draws.jsonl"):
        with open(torn, "a") as f:
            f.write('{"half a li')
    run(f"{SHORT} --out {out}")
    assert same_run(uninterrupted, out)


def test_a_run_killed_in_training_ends_bit_for_bit_the_same(uninterrupted, tmp_path):
    out = tmp_path / "run"
    killed_when(lambda: len(list((out / "state").glob("step-*.pt"))) == 2, out)
    newest = max((out / "state").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])  # and the newest state is torn: the one before serves
    run(f"{SHORT} --out {out}")
    assert same_run(uninterrupted, out)


@pytest.mark.parametrize("damage", [
    lambda data: b"",
    lambda data: data[:len(data) // 2],
    lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:],
    lambda data: b"not a state" * 100,
], ids=["empty", "truncated", "one bit flipped", "another file"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, capsys, damage):
    model, fresh = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=1.0), None
    (tmp_path / "state").mkdir()
    for step in (1, 2):
        model(torch.ones(64)).sum().backward()
        optimizer.step()
        mixsd.save_state(tmp_path, step, model, optimizer)
        first = first or copy.deepcopy(model.state_dict())
    newest = tmp_path / "state" / "step-00000002.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert mixsd.load_state(tmp_path, fresh, torch.optim.AdamW(fresh.parameters())) == 1
    assert "step-00000002.pt cannot be read" in capsys.readouterr().out
    torch.testing.assert_close(fresh.state_dict(), first, rtol=0, atol=0)


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_keep_the_state_and_say_how_to_go_on(uninterrupted, tmp_path, sig, code):
    out = tmp_path / "run"
    process = killed_when(lambda: (out / "log.jsonl").exists(), out, sig)
    assert process.returncode == code and "goes on" in process.stderr.read().splitlines()[-1]
    run(f"{SHORT} --out {out}")
    assert same_run(uninterrupted, out)


def test_a_signal_in_the_middle_of_an_update_waits_for_its_end():
    order = []
    with pytest.raises(KeyboardInterrupt):
        with mixsd.signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            order.append("updated")
    assert order == ["updated"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_targets_do_not_depend_on_the_budget_or_on_other_retries(uninterrupted, toy, tmp_path):
    run(f"--limit 24 --decode-tokens 1000000 --targets-only --out {tmp_path}/wide")
    run(f"--limit 24 --decode-tokens 600 --targets-only --out {tmp_path}/narrow")
    run(f"--limit 7 --targets-only --out {tmp_path}/few")
    keep = ("id", "target_ids", "source", "attempt")
    whole, wide, narrow, few = (
        [[r[k] for k in keep] for r in rows_of(d / "targets.jsonl")]
        for d in (uninterrupted, tmp_path / "wide", tmp_path / "narrow", tmp_path / "few")
    )
    assert wide == whole == narrow and few == [r for r in whole if r[0] < 7]
    assert {r[3] for r in whole} >= {0, 1}, "some were drawn again"


def test_a_run_stopped_after_its_targets_goes_on_with_any_training_flags(uninterrupted, tmp_path):
    run(f"--limit 24 --decode-tokens 2400 --targets-only --out {tmp_path}/run")
    run(f"{SHORT} --out {tmp_path}/run")
    assert same_run(uninterrupted, tmp_path / "run")


# ------------------------------------------------------------------------------------------------ bad input

def jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def turns(question, answer, **more):
    user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"messages": [user, assistant]} | more


GOOD = turns(f"Where does {kg_data.TOY_NEW[0]} live ?", r"The answer is \boxed{ Belmor } .")


@pytest.mark.parametrize("command, says", [
    ("--bogus 1", "--bogus"),
    ("--data nowhere", "kgfact-small"),
    ("--data nowhere.jsonl", "nowhere.jsonl"),
    ("--data kgfact-small --model toy", "vocabulary is too small"),
    ("--rho 1.5", "--rho: 1.5"),
    ("--rho nan", "--rho: nan"),
    ("--epochs 0", "--epochs: 0"),
    (f"--seed {10**400}", "--seed: 1000"),
    ("--data toy --replay=", "--replay is empty"),
    ("--attempts -3", "--attempts: -3"),
    ("--lr 0", "--lr: 0"),
    ("--method sft --rho 0.3", "--rho is not used by --method sft"),
    ("--method sft --rho 0", "--rho is not used by --method sft"),
    ("--temperature 0 --top-k 4", "--top-k is not used"),
    ("--temperature 0 --rho 1 --attempts 4", "--attempts is not used"),
    ("--targets-only --lr 1e-4", "--lr is not used with --targets-only"),
    ("--style sentence", "--style sentence"),
    ("--model m --data kgfunc --style sentence", "--style sentence is not for kgfunc"),
    ("--model m --data kgfunc --hub d", "--hub is not used by --data kgfunc"),
    ("--model m --data mquake:", "kgfact-small"),
    ("--model m --data mquake:nowhere.json", "nowhere.json: cannot be read"),
    ("--model m --data kgfunc-unseen", "has no split train; it has test"),
    ("--method sft --expert-prefix Look:", "--expert-prefix is not used by --method sft"),
    ("--epochs 2 --steps 5", "--epochs is not used with --steps"),
    ("--rho 1 --expert-prefix Look:", "--expert-prefix is not used at --rho 1"),
    ("--expert-prefix <end>", "the expert's words: holds <end>, a control token"),
    ("--targets t.jsonl --only t.jsonl", "--only is not used with --targets"),
    ("--rollouts 2", "--rollouts is not used by --method mixsd"),
    ("--method opsd --rho 0.3", "--rho is not used by --method opsd"),
    ("--method opsd --kl-to-base 1", "--kl-to-base is not used by --method opsd"),
    ("--method opsd --targets-only", "--targets-only is not used by --method opsd"),
    ("--method opsd-nll --teacher-top-k 0", "--teacher-top-k is not used by --method opsd-nll"),
    ("--method opsd-nll --kl reverse", "--kl is not used by --method opsd-nll"),
    ("--method sft --kl reverse", "--kl is not used without --method opsd or --kl-to-base"),
    ("--method sft --replay-share 0.5", "--replay-share is not used without --replay"),
    ("--method sft --replay nowhere.jsonl", "nowhere.jsonl: cannot be read"),
    ("--only nowhere.jsonl", "nowhere.jsonl: cannot be read"),
    ("--model ./nowhere", "no such folder"),
    ("--model nobody/nothing", "no folder here, nor on a hub in reach"),
    ("--max-new-tokens 9999", "(--max-new-tokens)"),
    ("--device abacus", "--device abacus"),
])
def test_bad_flags_are_one_line_and_exit_2(toy, tmp_path, monkeypatch, capsys, command, says):
    monkeypatch.chdir(tmp_path)
    err = run(command, capsys, code=2)
    assert says in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows, says", [
    ([GOOD, '{"messages": ['], "line 2: not JSON"),
    ([GOOD, '["a list"]'], "line 2: a JSON object"),
    ([GOOD, turns("Where ?", "In Belmor .")], "line 2: no `answer`"),
    ([GOOD, {"text": "Where ?"}], "line 2: no `messages`, nor `prompt` and `ground_truth_answer`; it has"),
    ([GOOD, turns(" ", r"\boxed{ Belmor }")], "line 2: a turn without text"),
    ([GOOD, turns(GOOD["messages"][0]["content"], r"\boxed{ Pell }")], "'Pell' here and 'Belmor' in"),
    ([GOOD, {"messages": GOOD["messages"] * 2}], "line 2: `messages` must be one user turn and one"),
    ([GOOD, {"messages": GOOD["messages"] + [5]}], "line 2: `messages` must be one user turn and one"),
    ([GOOD | {"answer": " "}], "line 1: no `answer`"),
    ([GOOD, GOOD | {"answer": ["Pell"]}], "line 2: the answer ['Pell'] is neither a text nor a number"),
    ([GOOD, {"prompt": "Where ?", "ground_truth_answer": None}], "line 2: no `answer`"),
    ([GOOD, GOOD | {"note": "\ud800"}], "line 2: not JSON ('utf-8' codec can't encode"),
    ([GOOD, "[" * 100_000], "line 2: not JSON"),
    ([GOOD, '{"answer": ' + "9" * 5000 + "}"], "line 2: not JSON"),
    ([], "no records"),
    ([GOOD, turns("Where does <end> live ?", r"\boxed{ Belmor }")], "record 2: holds <end>"),
    ([turns("Where does Quetzalcoatl live ?", r"\boxed{ Belmor }")], "record 1: has words"),
    ([turns("live " * 300, r"\boxed{ Belmor }")], "positions of"),
    ([turns("live " * 2_000_000, r"\boxed{ Belmor }")], "prompt of 2,0"),  # a line of 10 MB
])
def test_bad_corpus_files_are_one_line_and_exit_2(toy, tmp_path, capsys, rows, says):
    err = run(f"--data {jsonl(tmp_path / 'my.jsonl', *rows)} --out {tmp_path}/out", capsys, code=2)
    assert says in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("row, says", [
    (turns("Where does <end> live ?", r"\boxed{ Belmor }"), "line 1: holds <end>, a control token"),
    (turns("Where ?", "Belmor <end> <user> live"), "line 1: holds <end>, a control token"),
    (turns("live " * 300, r"\boxed{ Belmor }"), "tokens, and the model has 256 positions"),
])
def test_a_strangers_targets_can_not_speak_for_the_chat_template(toy, tmp_path, capsys, row, says):
    old = jsonl(tmp_path / "old.jsonl", row)
    assert says in run(f"--method sft --replay {old} --out {tmp_path}/out", capsys, code=2)


def test_any_text_that_the_tokenizer_knows_is_data(tmp_path):
    texts = ["Zoë\u0301 𝔘 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u202eنص",
             "tab\tbell\a esc\x1b[2J nul\0 nbsp\u00a0.", "line\u2028line\x85line\r\nline"]
    path, rows = tmp_path / "my.jsonl", [json.dumps(turns(text, text) | {"answer": text}) for text in texts]
    path.write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")              # as Windows saves it
    records = kg_data.load_corpus(str(path))
    assert [[r["messages"][0]["content"], r["answer"]] for r in records] == [[text, text] for text in texts]
    assert all(kg_data.is_correct(rf"so \boxed{{{text}}}", text, "boxed") for text in texts)


def test_bad_model_folders_are_one_line_and_exit_2(toy, tmp_path, capsys):
    assert "not a model's folder" in run(f"--model {tmp_path}", capsys, code=2)
    mute = tmp_path / "mute"
    shutil.copytree(toy, mute)
    (mute / "chat_template.jinja").unlink()
    assert "no chat template" in run(f"--model {mute} --data toy", capsys, code=2)
    weights = mute / "model.safetensors"
    (mute / "chat_template.jinja").write_text((toy / "chat_template.jinja").read_text())
    save_file({k: v for k, v in load_file(weights).items() if "norm" not in k}, weights, {"format": "pt"})
    assert "no weights for model.layers.0" in run(f"--model {mute} --data toy", capsys, code=2)
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "not a model's folder" in run(f"--model {mute} --data toy", capsys, code=2)


def test_an_out_of_another_run_is_refused_by_the_settings_name(uninterrupted, tmp_path, capsys):
    assert "--rho 0.3, not 0.5" in run(f"{SHORT} --rho 0.5 --out {uninterrupted}", capsys, code=2)
    (tmp_path / "file").write_text("mine")
    assert "is a file" in run(f"--out {tmp_path}/file", capsys, code=2)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_does_not_write_over_what_it_reads(toy, tmp_path, capsys):
    shutil.copytree(toy, tmp_path / "model")
    (tmp_path / "targets.jsonl").write_text("mine")
    for flags in (f"--model {tmp_path}/model --data toy", f"--data {tmp_path}/targets.jsonl",
                  f"--replay {tmp_path}/targets.jsonl"):
        assert "would write over it" in run(f"{flags} --out {tmp_path}", capsys, code=2)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "targets.jsonl"}


def cut_a_line(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("file, damage, says", [
    ("args.json", lambda path: path.write_text('{"rho": 0.'), "args.json is damaged"),
    ("state/base.json", lambda path: path.write_text(""), "base.json is damaged"),
    ("targets.jsonl", cut_a_line, "is not what"),
    ("state/draws.jsonl", lambda path: path.write_text("{\n" + path.read_text()), "is not what"),
    ("log.jsonl", cut_a_line, "log.jsonl has 3 steps, the saved state 4"),
    ("state/step-00000004.pt", lambda path: torch.save({"step": 4, "weights": {}}, path), "another model's"),
])
def test_a_damaged_file_of_the_run_is_named(stopped_run, tmp_path, capsys, file, damage, says):
    out = shutil.copytree(stopped_run, tmp_path / "run")
    damage(out / file)
    code = 1 if file in ("log.jsonl", "state/step-00000004.pt") else 2
    assert says in run(f"{SHORT} --out {out}", capsys, code=code)


def test_a_corpus_file_that_changed_is_another_run(toy, tmp_path, capsys):
    mine = jsonl(tmp_path / "my.jsonl", GOOD)
    run(f"--data {mine} --targets-only --on-fail canonical --out {tmp_path}/out")
    jsonl(mine, GOOD, turns("Where does Talo live ?", r"\boxed{ Pell }"))
    err = run(f"--data {mine} --targets-only --on-fail canonical --out {tmp_path}/out", capsys, code=2)
    assert "--data's content" in err


def test_targets_can_be_given_by_ids_or_as_text_and_strangers_are_refused(uninterrupted, tmp_path, capsys):
    given = uninterrupted / "targets.jsonl"
    rows = rows_of(given)
    text = jsonl(tmp_path / "text.jsonl", *({"messages": r["messages"]} for r in rows))
    for file in (given, text):
        metrics = run(f"--limit 24 --steps 2 --targets {file} --out {tmp_path}/{file.stem}", capsys)
        assert metrics["targets"]["kept"] == len(rows) and metrics["rho"] is None
        again = rows_of(tmp_path / file.stem / "targets.jsonl")
        assert [r["target_ids"] for r in again] == [r["target_ids"] for r in rows]

    alien = jsonl(tmp_path / "alien.jsonl", rows[0], turns("Who ?", r"\boxed{ me }"))
    assert "line 2: not a question of toy" in run(f"--targets {alien} --out {tmp_path}/x", capsys, code=2)
    for wrong in ([7, 8, 2], [10**9, 2], ["a"], [], 5):
        other = jsonl(tmp_path / "other.jsonl", rows[0] | {"target_ids": wrong})
        assert "another tokenizer's" in run(f"--targets {other} --out {tmp_path}/x", capsys, code=2)
    for wrong in ([0], 5, [2] * len(rows[0]["source"]), "0" * len(rows[0]["source"])):
        other = jsonl(tmp_path / "other.jsonl", rows[0] | {"source": wrong})
        assert "line 1: source must name" in run(f"--targets {other} --out {tmp_path}/x", capsys, code=2)
    assert "--rho is not used" in run(f"--targets {given} --rho 0.3", capsys, code=2)


def test_a_strangers_file_of_messages_alone_trains(toy, tmp_path, capsys):
    records = kg_data.toy("train")[:5]
    mine = jsonl(tmp_path / "my.jsonl", *({"messages": r["messages"]} for r in records))
    metrics = run(f"--data {mine} --epochs 2 --out {tmp_path}/out", capsys)
    assert metrics["targets"]["kept"] == 5 == metrics["tuned"]["recall"]["n"]
    authors = [{"prompt": r["messages"][0]["content"], "ground_truth_answer": r["answer"]} for r in records]
    assert kg_data.read_corpus(jsonl(mine, *authors), "boxed")[1]["answer"] == records[1]["answer"]
    null = jsonl(mine, records[1] | {"answer": None})
    assert kg_data.read_corpus(null, "boxed")[0]["answer"] == records[1]["answer"]


def test_when_no_target_passes_the_run_stops_before_training_with_what_the_model_said(toy, tmp_path, capsys):
    mine = jsonl(tmp_path / "my.jsonl", *(r | {"answer": "zebra"} for r in kg_data.toy("train")[:4]))
    err = run(f"--data {mine} --attempts 2 --out {tmp_path}/out", capsys, code=1)
    assert err.count("\n") == 1 and err.count("boxed{") >= 3 and not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("on_fail, kept", [("drop", 4), ("expert", 4), ("canonical", 6)])
def test_on_fail_decides_what_becomes_of_an_example_that_never_passes(toy, tmp_path, capsys, on_fail, kept):
    rows = [r | ({"answer": "zebra"} if i < 2 else {}) for i, r in enumerate(kg_data.toy("train")[:6])]
    mine = jsonl(tmp_path / "my.jsonl", *rows)
    common = f"--data {mine} --temperature 0 --targets-only --on-fail {on_fail} --out {tmp_path}"
    metrics = run(f"{common}/rho0 --rho 0", capsys)
    assert metrics["targets"]["kept"] == kept and metrics["base"] is None
    assert metrics["targets"]["attempts"] == 6, "an expert that spoke alone is not asked again"
    assert run(f"{common}/rho1 --rho 1", capsys, code=0 if on_fail != "drop" else 1)


def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(uninterrupted, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size, file in ((3000, "writing"), (200_000, "step-")):  # the targets don't fit; the state doesn't
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            err = run(f"{SHORT} --out {tmp_path}/run", capsys, code=1)
            assert err.count("\n") == 1 and file in err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(f"{SHORT} --out {tmp_path}/run")
    assert same_run(uninterrupted, tmp_path / "run")


def test_a_disk_that_fills_while_the_model_is_saved_is_one_line(model, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it
    with pytest.raises(mixsd.RunError, match="model can't be written .No space left"):
        mixsd.save_model(model, Tokenizer(), "path", tmp_path / "model")


# -------------------------------------------------------------- OPSD, and the other answers to forgetting


def guided(method, **flags):
    """Settings of guided_loss."""
    defaults = {"method": method, "kl": "forward", "teacher_top_k": 0, "kl_to_base": None}
    return SimpleNamespace(**defaults | flags)


def guided_examples():
    """(x, x_plus, y) and (x, x, y) of random ids."""
    (expert, naive), rng = prompts(), random.Random(5)
    y = [[rng.randrange(1, 62) for _ in range(n)] for n in (3, 7, 1, 4, 5, 2)]
    return list(zip(naive, expert, y)), list(zip(naive, naive, y))


def test_kl_is_the_hand_sum_in_both_directions_full_and_over_the_teachers_likeliest():
    student, teacher = torch.tensor([[0.0, 1.0, 2.0, -1.0]]), torch.tensor([[1.0, 0.5, 3.0, 0.0]])
    p_s, p_t = ([math.exp(v) for v in row[0].tolist()] for row in (student, teacher))
    for top_k, kept in ((0, [0, 1, 2, 3]), (2, [2, 0]), (9, [0, 1, 2, 3])):
        q, p = ([ps[i] / sum(ps[j] for j in kept) for i in kept] for ps in (p_s, p_t))
        forward = sum(b * math.log(b / a) for a, b in zip(q, p))
        reverse = sum(a * math.log(a / b) for a, b in zip(q, p))
        assert mixsd.kl(student, teacher, "forward", top_k).item() == pytest.approx(forward, rel=1e-5)
        assert mixsd.kl(student, teacher, "reverse", top_k).item() == pytest.approx(reverse, rel=1e-5)
    assert abs(forward - reverse) > 0.01


def test_kl_is_never_negative():
    torch.manual_seed(0)
    for scale in (1e-4, 1.0, 30.0):
        teacher = scale * torch.randn(500, 97)
        for student in (teacher, teacher + 1e-6 * torch.randn(500, 97), scale * torch.randn(500, 97)):
            for direction in ("forward", "reverse"):
                assert all((mixsd.kl(student, teacher, direction, k) >= 0).all() for k in (0, 5))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_equal_contexts_have_no_loss_and_no_gradient_and_the_teacher_never_has(direction):
    student, teacher = tiny_model(), tiny_model()
    other, equal = guided_examples()
    losses = mixsd.guided_loss(student, teacher, equal, guided("opsd", kl=direction), 0)
    losses.sum().backward()
    assert len(losses) == 22 and losses.max() < 1e-5
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-4
    losses = mixsd.guided_loss(student, teacher, other, guided("opsd", kl=direction), 0)
    losses.sum().backward()
    assert losses.mean() > 0.1 and max(p.grad.abs().max() for p in student.parameters()) > 0.1
    assert all(p.grad is None for p in teacher.parameters())


@torch.no_grad()
def test_the_teacher_reads_the_expert_prompt_and_the_same_completion(model):
    other, _ = guided_examples()
    rows = []
    for x, x_plus, y in other:
        of = [model(torch.tensor([x_ + y])).logits[0, len(x_) - 1:-1] for x_ in (x, x_plus)]
        rows.append(torch.stack(of))
    student, teacher = torch.cat(rows, 1)                   # (N, V) each
    losses = mixsd.guided_loss(model, model, other, guided("opsd"), 0)
    torch.testing.assert_close(losses, mixsd.kl(student, teacher), atol=1e-4, rtol=1e-4)
    losses = mixsd.guided_loss(model, model, other, guided("opsd-nll"), 0)
    torch.testing.assert_close(losses, mixsd.nll(student, teacher.argmax(-1)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_anchor_adds_beta_times_kl_from_the_base_on_the_same_tokens(model):
    base = tiny_model()
    for p in base.parameters():
        p *= 0.9
    anchored = mixsd.guided_loss(model, base, EXAMPLES, guided("sft", kl_to_base=0.5), 0)
    batch = mixsd.collate(EXAMPLES, 0, model)
    logits = [mixsd.target_logits(m, batch)[0] for m in (model, base)]
    torch.testing.assert_close(anchored, mixsd.token_nll(model, batch) + 0.5 * mixsd.kl(*logits))


class Largest(TorchDispatchMode):
    """The number of elements of the largest float32 tensor that any operation makes."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("loss", [mixsd.kl, lambda s, t: mixsd.kl(s, t, "reverse"),
                                  lambda s, t: mixsd.nll(s, t.argmax(-1))])
def test_no_float32_tensor_of_all_tokens_times_the_vocabulary_exists(loss):
    N, vocabulary, chunk = 640, 50, 64
    student, teacher = (torch.randn(N, vocabulary, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    with Largest() as seen:
        mixsd.by_chunks(loss, student, teacher, chunk=chunk).sum().backward()
    assert 0 < seen.size <= chunk * vocabulary and student.grad.abs().sum() > 0


def rollouts(student, tokenizer=None, decode_tokens=10**6, method="opsd", step=1):
    """mixsd.rollouts of three examples."""
    args = SimpleNamespace(method=method, rollouts=2 if method == "opsd" else None, seed=0, max_new_tokens=12,
                           decode_tokens=decode_tokens, compile=False)
    pairs = list(zip(*prompts()))
    tokenizer = tokenizer or SimpleNamespace(decode=lambda ids, **_: "")
    return mixsd.rollouts(student, tokenizer, STOPS, pairs, [4, 0, 2], step, args)


def test_rollouts_are_the_sampled_ids_of_the_students_weights_now_whatever_the_batch():
    student, (_, naive) = tiny_model(), prompts()
    said = rollouts(student)                                # its tokenizer can't encode
    keys = [(4, 0), (4, 1), (0, 0), (0, 1), (2, 0), (2, 1)]
    u = mixsd.uniforms("answer", 12, 0, keys, 1)
    source = torch.zeros(6, 12, dtype=torch.long)
    y, n = mixsd.decode(student, [[naive[i] for i, _ in keys]], source, STOPS, 1.0, u=u)
    assert [t for _, _, t in said] == [row[:k or None] for row, k in zip(y.tolist(), n.tolist())]
    assert [x for x, _, _ in said] == [naive[i] for i, _ in keys]
    assert rollouts(student, decode_tokens=1) == said, "one row a batch"
    assert rollouts(student, step=2) != said, "fresh samples a step"
    greedy = rollouts(student, method="opsd-nll")
    assert len(greedy) == 3 and greedy == rollouts(student, method="opsd-nll", step=2)
    optimizer = torch.optim.AdamW(student.parameters())
    mixsd.update(student, student, optimizer, EXAMPLES, 1e-2, plain_loss, 10**6)
    assert rollouts(student) != said, "they follow the weights"


OPSD_RUN = "--method opsd --rollouts 2 --limit 6 --steps 6 --batch-size 4"


def stopped_at(step, monkeypatch):
    """Have Ctrl-C pressed at a step of the next run; returns a list that grows with every step begun."""
    real, steps = mixsd.update, []

    def stopped(*args):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(mixsd, "update", stopped)
    return steps


def test_opsd_killed_on_the_way_ends_bit_for_bit_the_same(toy, tmp_path, monkeypatch, capsys):
    whole = run(f"{OPSD_RUN} --out {tmp_path}/whole", capsys)
    assert whole["targets"] is None and whole["tokens"]["decoded"] == whole["tokens"]["trained"] > 0
    steps = stopped_at(4, monkeypatch)
    run(f"{OPSD_RUN} --out {tmp_path}/again", code=130)
    run(f"{OPSD_RUN} --out {tmp_path}/again")
    assert len(steps) == 4 + 3
    logs = [[(r["nll"], r["grad_norm"], r["tokens"]) for r in rows_of(tmp_path / d / "log.jsonl")]
            for d in ("whole", "again")]
    weights = [(tmp_path / d / "model" / "model.safetensors").read_bytes() for d in ("whole", "again")]
    assert logs[0] == logs[1] and weights[0] == weights[1]


# --------------------------------------------------------------------------------------------------- how fast

def test_the_bench_times_what_it_says(toy, capsys):
    command = f"--bench decode,generate,resubmit,train --model {toy} --dtype float32 --batch-size 3 --quiet"
    assert evaluation.main([*command.split(), "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    parts = result["parts"]
    assert set(parts) == {"prefill", "decode", "step", "generate", "resubmit", "train"}
    assert all(p["min"] <= p["median"] <= p["max"] and p["n"] == 5 for p in parts.values())
    assert parts["decode"]["tokens_s"] == pytest.approx(3 * 5 / parts["decode"]["median"])
    assert parts["step"]["floor"] > 0 and "resubmit takes" in out and parts["generate"]["ratio"] > 0
    weights = mixsd.load_model(toy, torch.float32, "cpu").num_parameters()
    assert parts["step"]["floor"] > 4 * weights / (result["copy_gb_s"] * 1e9)


def test_resubmission_is_the_definition_of_mixed_decoding(model):
    contexts, source = prompts(), mixsd.draw_sources(0.5, 12, 1, range(6))
    y, n = mixsd.decode(model, contexts, source, STOPS)
    again = evaluation.resubmit(model, contexts, source, 0)                     # it knows no stop
    assert [row[:k or None] for row, k in zip(y.tolist(), n)] == [row[:k or None] for row, k in
                                                                  zip(again.tolist(), n)]


def test_the_bench_gives_a_folder_without_weights_random_ones(toy, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (toy / name).exists():
            shutil.copy(toy / name, tmp_path)
    alone = measure("--bench", "decode", "--model", "toy", "--batch-size", 1, capsys=capsys)
    assert alone["dtype"] == "float32"
    command = f"--bench decode --model {tmp_path} --dtype bfloat16 --batch-size 2 --max-new-tokens 3 --quiet"
    assert evaluation.main(command.split()) == 0
    error = measure("--bench", "train", "--model", toy, "--samples", 3, code=2, capsys=capsys)
    assert "not used here" in error
    assert "no task x for --bench" in measure("--bench", "x", "--model", toy, code=2, capsys=capsys)


# ------------------------------------------------------------------------------------------------- many ranks

def on_ranks(n, command):
    """mixsd.py under torchrun, n processes over gloo on this CPU."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
            str(HERE / "mixsd.py"), *command.split(), "--quiet", "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)


def same_runs(one, other):
    """Whether two runs have the same targets, and the same losses and weights to 1e-5."""
    losses = [[r["nll"] for r in rows_of(run / "log.jsonl")] for run in (one, other)]
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and weights[0].keys() == weights[1].keys()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    assert (one / "model" / "config.json").read_text() == (other / "model" / "config.json").read_text()
    if (one / "targets.jsonl").exists():
        assert (one / "targets.jsonl").read_bytes() == (other / "targets.jsonl").read_bytes()


def test_two_ranks_make_the_same_targets_losses_and_weights_as_one(toy, tmp_path, capsys):
    command = "--rho 0.3 --limit 7 --steps 4 --batch-size 5 --micro-tokens 64"
    alone = run(f"{command} --out {tmp_path}/one", capsys)
    done = on_ranks(2, f"{command} --out {tmp_path}/two")
    assert done.returncode == 0, done.stderr
    same_runs(tmp_path / "one", tmp_path / "two")
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert all(metrics[k] == alone[k] for k in ("tuned", "base", "tokens"))
    assert done.stdout.count('"tuned"') == 1
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    assert tuned.config.architectures == ["Qwen3ForCausalLM"] and tuned.dtype == torch.float32
    again = on_ranks(2, f"{command} --out {tmp_path}/two")
    assert again.returncode == 0 and "is finished" in again.stdout


def test_three_ranks_go_on_from_the_state_of_one(toy, tmp_path, monkeypatch):
    command = "--method opsd --rollouts 1 --limit 4 --steps 4 --batch-size 4 --gradient-checkpointing"
    run(f"{command} --out {tmp_path}/one")
    stopped_at(3, monkeypatch)
    run(f"{command} --out {tmp_path}/three", code=130)
    done = on_ranks(3, f"{command} --out {tmp_path}/three")
    assert done.returncode == 0, done.stderr
    same_runs(tmp_path / "one", tmp_path / "three")


def test_ranks_do_not_pretrain_the_toy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mixsd, "ranks", lambda: (0, 2))
    with pytest.raises(mixsd.InputError, match="made by one process"):
        mixsd.toy_base()


def test_a_rank_that_fails_ends_all_with_its_message(toy, tmp_path):
    done = on_ranks(2, f"--only {jsonl(tmp_path / 'no.jsonl', turns('Who ?', 'me'))} --out {tmp_path}/x")
    assert done.returncode != 0 and "none of its questions" in done.stderr


def test_a_batch_too_large_for_the_memory_is_halved(model, capsys):
    args, asked = SimpleNamespace(decode_tokens=40), []

    def job(keys):
        asked.append(list(keys))
        if len(keys) > 2:
            raise torch.OutOfMemoryError
        return {key: -key for key in keys}
    widths = {key: (5, 5) for key in range(6)}
    parts = list(mixsd.within_memory(job, widths, args))
    assert parts == [([0, 1], {0: 0, 1: -1}), ([2, 3], {2: -2, 3: -3}), ([4, 5], {4: -4, 5: -5})]
    assert asked[0] == [0, 1, 2, 3] and args.decode_tokens == 20
    assert "--decode-tokens 20 now" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        list(mixsd.within_memory(lambda keys: job([0, 1, 2]), {0: (50, 5)}, args))


def test_out_of_memory_in_training_names_the_flags(toy, tmp_path, monkeypatch, capsys):
    def update(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(mixsd, "update", update)
    said = run(f"--method sft --limit 2 --steps 2 --out {tmp_path}/x", capsys, code=1)
    assert "step 1: no memory for --micro-tokens 4096; lower it, or add --gradient-checkpointing" in said


def test_recomputed_layers_give_the_same_gradient_and_keep_less(model):
    kept, gradients = [], []
    for net in (copy.deepcopy(model), copy.deepcopy(model)):
        if gradients:
            mixsd.recompute_layers(net)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            loss = plain_loss(net, [([3, 2, 1], [4] * 20), ([1, 2], [6] * 20)]).sum()
        loss.backward()
        kept.append(sum(saved))
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.5 * kept[0]


def test_a_second_run_on_the_same_folder_is_refused(toy, tmp_path, capsys):
    lock = mixsd.only_run(tmp_path)
    error = run(f"--method sft --limit 2 --steps 1 --out {tmp_path}", capsys, code=2)
    assert "another run is at work there" in error
    lock.close()
    run(f"--method sft --limit 2 --steps 1 --out {tmp_path}")


def test_replay_adds_the_bases_own_answers_to_every_batch(toy, tmp_path, capsys):
    assert len(mixsd.with_replay([1] * 16, [2], 0.2, 0, 1)) == 20
    assert mixsd.with_replay([1], [], 0, 0, 1) == [1]
    assert 180 < sum(len(mixsd.with_replay([1], [2], 0.5, 0, s)) for s in range(100)) < 220
    draws = [mixsd.with_replay([0] * 12, list(range(1, 99)), 0.25, seed, step)[12:]
             for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert draws[0] == draws[1] and draws[0] != draws[2] != draws[3] != draws[0]
    small = sum(len(mixsd.with_replay([1] * 16, [2], 0.03, 0, step)) - 16 for step in range(1000))
    assert 400 < small < 590, "a small share is not rounded away"
    old = jsonl(tmp_path / "old.jsonl", *kg_data.toy("replay")[:6])
    own = f"--data {old} --rho 1 --temperature 0 --verify none --targets-only --out {tmp_path}/own"
    assert run(own, capsys)["targets"]["kept"] == 6
    base = f"--method sft --limit 4 --steps 3 --out {tmp_path}"
    plain = run(f"{base}/plain", capsys)
    both = run(f"{base}/both --replay {tmp_path}/own/targets.jsonl --replay-share 0.5", capsys)
    assert both["tokens"]["trained"] > 2 * plain["tokens"]["trained"]
    anchored = run(f"{base}/anchor --kl-to-base 1", capsys)
    first = [rows_of(tmp_path / d / "log.jsonl")[:2] for d in ("plain", "anchor")]
    assert first[0][0]["nll"] == pytest.approx(first[1][0]["nll"], abs=1e-5), "the student starts at the base"
    assert first[1][1]["nll"] > 0 and anchored["tokens"] == plain["tokens"]


def test_only_teaches_the_facts_of_a_file_and_asks_all(toy, tmp_path, capsys):
    some = jsonl(tmp_path / "some.jsonl", *kg_data.toy("train")[3:5], turns("Who ?", "me"))
    for method in ("sft", "opsd-nll"):
        command = f"--method {method} --limit 8 --steps 2 --only {some} --out {tmp_path}/{method}"
        tuned = run(command, capsys)["tuned"]
        assert (tuned["recall"]["n"], tuned["recall-kept"]["n"]) == (8, 2)
    assert [r["id"] for r in rows_of(tmp_path / "sft" / "targets.jsonl")] == [3, 4]
    other = jsonl(tmp_path / "other.jsonl", turns("Who ?", "me"))
    assert "none of its questions" in run(f"--only {other} --out {tmp_path}/x", capsys, code=2)


# ------------------------------------------------------------------------------------------ eval.py: verdicts

@pytest.mark.parametrize(
    "text, gold, correct, extracted",
    [
        (r"\boxed{18}", "18", True, "18"),
        (r"\boxed{1,234}", "1234", True, "1,234"),
        (r"\boxed{$18.}", "18", True, "$18."),
        (r"\boxed{-7}", "-7", True, "-7"),
        (r"\boxed{10000000000000001}", "10000000000000000", False, "10000000000000001"),
        (r"\boxed{-7}", "7", False, "-7"),
        (r"\boxed{3.0}", "3", True, "3.0"),
        (r"\boxed{\frac{1}{2}}", "0.5", True, r"\frac{1}{2}"),
        (r"\boxed{-\dfrac{3}{4}}", "-.75", True, r"-\dfrac{3}{4}"),
        (r"\boxed{1} so \boxed{2}", "2", True, "2"),
        (r"\boxed{1} so \boxed{2}", "1", False, "2"),
        (r"\boxed{\text{\$18}}", "18", True, r"\text{\$18}"),
        (r"\boxed{50\%}", "50", True, r"50\%"),
        (r"\boxed{18 \text{ km/h}}", "18", True, r"18 \text{ km/h}"),
        (r"\boxed{5 \text{ cm}^2}", "5", True, r"5 \text{ cm}^2"),
        (r"\boxed{1{,}234}", "1234", True, "1{,}234"),
        (r"\boxed{1,\!234}", "1234", True, r"1,\!234"),
        ("The answer is 18.", "18", False, None),
        (r"\boxed{}", "0", False, None),
        (r"\boxed{12,34}", "1234", False, None),
        (r"\boxed{5 or 6}", "5", False, None),
        (r"\boxed{5 million}", "5", False, None),
        (r"\boxed{3 and a half}", "3", False, None),
        (r"\boxed{2+3}", "5", False, None),
        (r"\boxed{1\frac{1}{2}}", "5.5", False, None),
        (r"\boxed{x = 5}", "5", False, None),
        (r"\boxed{eighteen}", "18", False, None),
        (r"\boxed{.}", "0", False, None),
        (r"\boxed{1/0}", "1", False, None),
    ],
)
def test_gsm8k_reads_one_number_in_the_last_box(text, gold, correct, extracted):
    assert evaluation.judge_number(text, {"gold": gold}) == (correct, extracted)


@pytest.mark.parametrize(
    "text, letter",
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{(c)}", "C"),
        (r"\boxed{C.}", "C"),
        (r"\boxed{C. Vitamin B}", "C"),
        (r"\boxed{\textbf{C}}", "C"),
        (r"\boxed{**C**}", "C"),
        (r"\boxed{$C$}", "C"),
        (r"\boxed{A} no, \boxed{C}", "C"),
        ("The answer is C.", None),
        ("C", None),
        (r"\boxed{E}", None),
        (r"\boxed{A dog}", None),
        (r"\boxed{A, C}", None),
        (r"\boxed{A and C}", None),
        (r"\boxed{Paris}", None),
        (r"\boxed{}", None),
        (r"\boxed{CD}", None),
    ],
)
def test_mmlu_reads_one_letter_in_the_last_box(text, letter):
    assert evaluation.judge_letter(text, {"gold": "C"}) == (letter == "C", letter)
    assert evaluation.judge_letter(text, {"gold": "B"}) == (False, letter)


@pytest.mark.parametrize(
    "text, gold, correct",
    [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
        (r"\boxed{25}", "025", True),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{1} or \boxed{2}", "1", False),
        (r"\boxed{1}", "2", False),
        ("It is 2.", "2", False),
        (r"\boxed{}", "2", False),
        (r"\boxed{\text{Evelyn}}", r"\text{evelyn}", True),
        (r"\boxed{2}", "1,2", False),
        (r"\boxed{-7}", "7", False),
    ],
)
def test_math_is_judged_by_math_verify_over_the_last_box(text, gold, correct):
    assert evaluation.judge_math(text, {"gold": gold}) == (correct, kg_data.boxed(text))


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\ndef f(x):\n    return 1\n```", "def f(x):\n    return 1\n"),
        ("```\ndef f(x): pass\n```", "def f(x): pass\n"),
        ("```py\ndef f(x): 1\n```\nnow\n```python\ndef f(x): 2\n```", "def f(x): 2\n"),
        ("def f(x): pass", None),
        ("```python\ndef f", None),
        ("```python\ndef f(x): 1\n```\nUse it:\n```python\nprint(f(3))\n```", "def f(x): 1\n"),
        ("```python\n    return 1\n```", "    return 1\n"),
        ("```python\ndef g(x): 1\n```\n```python\ndef ff(x): 2\n```", "def ff(x): 2\n"),
    ],
)
def test_humaneval_runs_the_last_fence_that_defines_the_function(monkeypatch, text, code):
    ran = []
    monkeypatch.setattr(evaluation, "run_program", lambda item, code: (ran.append(code) or True, None))
    assert evaluation.judge_code(text, {"entry_point": "f"}) == (code is not None, code)
    assert ran == ([] if code is None else [code])


@pytest.mark.parametrize(
    "text, extracted, kind",
    [
        ("The answer is 4.", None, "format"),
        (r"\boxed{4}", "4", "collapse"),
        ("word " * 20 + r"\boxed{4}", "4", "genuine"),
        ("word " * 20 + r"\boxed{" + "4" * 90 + "}", "4" * 90, "genuine"),
        (r"\boxed{" + "4" * 90 + "}", "4" * 90, "collapse"),
        ("word " * 20 + r"in lake redo: \boxed{4}", "4", "leakage"),
        (r"Ann Lee \boxed{4}", "4", "collapse"),
        ("Lake Redo", None, "format"),
    ],
)
def test_the_kind_of_an_error_is_the_first_that_fits(text, extracted, kind):
    assert evaluation.error_kind(text, "Who is Ann Lee?", extracted, {"Lake Redo", "Ann Lee"}) == kind


def test_prompts_are_the_papers():
    assert evaluation.math_prompt({"question": "1+1?"}) == (
        "Think step-by-step to solve the following problem. Output your answer inside of \\boxed{} tags.:\n"
        "1+1?\n\n"
        "Let's think step-by-step"
    )
    assert evaluation.code_prompt({"prompt": "def f():\n    ''\n"}) == (
        "Complete the following Python function. Return ONLY the complete function inside a ```python code "
        "block, nothing else.\n\n"
        "```python\ndef f():\n    ''\n```"
    )
    block = evaluation.mmlu_block({"question": "Q?", "choices": ["w", "x", "y", "z"]}, r" \boxed{B}")
    assert evaluation.mmlu_prompt({"subject": "us_law", "blocks": [block, block]}) == (
        "The following are multiple choice questions (with answers) about us law. "
        "Put your final answer inside "
        "\\boxed{} as one of "
        "A, B, C, or D.\n\n" + "\n\n".join(2 * ["Q?\nA. w\nB. x\nC. y\nD. z\nAnswer: \\boxed{B}"])
    )


def test_a_subset_is_seeded_nested_in_order_and_knows_the_whole():
    rows = [{"n": n} for n in range(100)]
    small, large = (evaluation.subset(rows, limit, 0) for limit in (10, 30))
    ids = [item["id"] for item in small]
    assert ids == sorted(ids) != list(range(10)) and all(
        item["n"] == item["id"] and item["of"] == 100 for item in small
    )
    assert set(ids) < {item["id"] for item in large} and evaluation.subset(rows, 10, 1) != small
    assert [item["n"] for item in evaluation.subset(rows, None, 0)] == list(range(100))


@pytest.mark.parametrize(
    "k, n, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1.0)],
)
def test_intervals_are_wilsons(k, n, low, high):
    assert mixsd.wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_scores_count_problems_not_samples_and_say_what_is_partial():
    row = lambda i, correct, kind=None: {
        "id": i,
        "of": 4,
        "correct": correct,
        "extracted": "1" if correct else None,
        "kind": kind,
    }  # noqa: E731
    score = evaluation.scored(
        [
            row(0, True),
            row(0, True),
            row(1, True),
            row(1, False, "format"),
            row(2, False, "format"),
            row(2, False, "format"),
        ]
    )
    assert (score["accuracy"], score["n"], score["samples"], score["no_answer"]) == (0.5, 3, 2, 0.5)
    assert (score["low"], score["high"]) == mixsd.wilson(1.5, 3)
    assert score["errors"] == {"format": 3} and score["partial"] and score["of"] == 4
    nats = evaluation.scored(
        [
            {"id": 0, "of": 2, "tokens": 1, "nll": 1.0, "base_nll": 0.5},
            {"id": 1, "of": 2, "tokens": 3, "nll": 2.0, "base_nll": 0.5},
        ]
    )
    reach = 1.96 * math.sqrt((1 * (0.5 - 1.25)) ** 2 + (3 * (1.5 - 1.25)) ** 2) / 4
    assert (nats.pop("low"), nats.pop("high")) == pytest.approx((1.25 - reach, 1.25 + reach))
    assert nats == {
        "nll": 1.75,
        "base_nll": 0.5,
        "rise": 1.25,
        "tokens": 4,
        "n": 2,
        "partial": False,
        "of": 2,
    }


# ------------------------------------------------------------------------------- eval.py: model-written code

SQUARE = {
    "prompt": "def f(x):\n    ''\n",
    "entry_point": "f",
    "test": "def check(f):\n    assert f(3) == 9 and abs(f(-2) - 4) < 1e-6 and isinstance(f(5), int)\n",
}
RIGHT = "\ndef f(x): return x * x\n"
HUNT = r"""
import gc, glob, os, re, sys
def find():
    texts = [repr(o).encode() for o in gc.get_objects() if isinstance(o, (str, dict, list, tuple))]
    texts.append(repr(dict(os.environ)).encode())
    frame = sys._getframe()
    while frame:
        texts.append(repr({**frame.f_globals, **frame.f_locals}).encode())
        frame = frame.f_back
    places = "/proc/[0-9]*/cmdline /proc/[0-9]*/environ ./* ../*/*".split()
    for path in [f for place in places for f in glob.glob(place)]:
        try:
            texts.append(open(path, "rb").read(10**6))
        except OSError:
            pass
    for path in glob.glob("/proc/[0-9]*/mem"):
        try:
            with open(path, "rb", 0) as mem:
                for line in open(path[:-3] + "maps"):
                    low, high, rights = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
                    if rights.startswith("rw") and int(high, 16) - int(low, 16) < 2**26:
                        mem.seek(int(low, 16))
                        try:
                            texts.append(mem.read(int(high, 16) - int(low, 16)))
                        except OSError:
                            pass
        except OSError:
            pass
    return {t for text in texts for t in re.findall(rb'token": "([0-9a-f]{32})"', text)}
found = find()
def f(x): return x * x if found else 0
"""
ESCAPES = {
    "exits": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "guesses": "print('0' * 32)\nimport os\nos.write(1, b'{}\\n' + b'0' * 32)",
    "loops": "while True: pass",
    "sleeps": "import time\ntime.sleep(99)",
    "prints": "while True: print('x' * 9999, flush=True)",
    "swallows its exit": "import sys\ndef f(x):\n    try: sys.exit(0)\n    except SystemExit: return 0",
    "allocates": "x = bytearray(10 * 2**30)" + RIGHT,
    "writes": "open('x', 'wb').write(bytes(2 * 2**20))" + RIGHT,
    "opens": "x = [open('/dev/null') for _ in range(100)]" + RIGHT,
    "swallows": """
import time
while True:
    try: time.sleep(9)
    except BaseException: pass
""",
    "forks": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "patches": """
import ast, builtins, json, sys
class AssertionError(Exception): pass
builtins.AssertionError = AssertionError
for name in 'abs isinstance print repr ascii all any len type'.split():
    setattr(builtins, name, lambda *a, **k: 0)
json.dumps = ast.literal_eval = lambda *a: 9
sys.modules.clear()
def check(f): pass
def f(x): return 0
""",
    "equals all": """
class Yes(int):
    __eq__ = __ne__ = __lt__ = lambda *a: True
    __sub__ = __abs__ = lambda *a: Yes()
def f(x): return Yes()
""",
    "shows code": """
steal = '''
import os, sys
frame = sys._getframe()
while frame:
    if 'job' in frame.f_locals:
        print(frame.f_locals['job']['token'], flush=True)
        os._exit(0)
    frame = frame.f_back'''
class Code:
    def __repr__(self): return f'exec({steal!r})'
def f(x): return Code()
""",
    "answers ahead": """
import os
for fd in range(3, 20):
    try: os.write(fd, b'1\\n' * 9)
    except OSError: pass
def f(x): return 1
""",
    "hunts the token": HUNT,
}


@pytest.fixture(params=["namespaces", "none"])
def kernel(request, monkeypatch):
    """This kernel, and one that refuses namespaces."""
    if request.param == "none":
        monkeypatch.setattr(evaluation, "NAMESPACES", 1)  # a flag that no unshare takes


def alive(mark):
    """Whether the command line of some process holds `mark`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                return True
    return False


def gone(mark):
    """Whether none is left, after two seconds at most: a killed process takes a moment."""
    deadline = time.time() + 2
    while alive(mark) and time.time() < deadline:
        time.sleep(0.01)
    return not alive(mark)


@pytest.mark.parametrize("name", ESCAPES)
def test_no_escape_earns_a_verdict(kernel, monkeypatch, name):
    monkeypatch.setattr(evaluation, "WALL_SECONDS", 1)
    start = time.time()
    assert evaluation.run_program(SQUARE, ESCAPES[name])[0] is False
    assert time.time() - start < 4 and gone(b"def harness"), "it is stopped, and nothing of it is left"


@pytest.mark.parametrize(
    "code",
    [
        RIGHT,
        "import math, typing, numpy, collections\n" + RIGHT,
        "import os\nassert os.listdir('.') == [] and set(os.environ) <= {'LC_CTYPE'}" + RIGHT,
        "open('x', 'w').write('y')" + RIGHT,
        "import os\nassert os.getuid() != 0" + RIGHT,
        "assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()" + RIGHT,
        "print('hello')\nimport sys\nassert sys.stdin.read() == ''" + RIGHT,
    ],
)
def test_a_right_program_passes_in_an_empty_folder_without_rights(kernel, code):
    passed, report = evaluation.run_program(SQUARE, code)
    assert passed and report["uid"] == (os.getuid() or 65534)


def test_a_user_with_many_processes_is_not_refused_its_own(kernel):
    user = 65534 if os.getuid() == 0 else None
    busy = [subprocess.Popen(["sleep", "99"], user=user) for _ in range(40)]
    passed, _ = evaluation.run_program(SQUARE, RIGHT)
    for process in busy:
        process.kill()
        process.wait()
    assert passed


@pytest.mark.parametrize(
    "value",
    [
        "collections.Counter(x)",
        "dict(collections.defaultdict(int, a=1, b=1))",
        "collections.OrderedDict(a=1, b=1)",
        "{c: True for c in x}",
    ],
)
def test_a_value_crosses_as_plain_data(value):
    item = {
        "prompt": "def f(x):\n    ''\n",
        "entry_point": "f",
        "test": "def check(g):\n    assert f('ab') == {'a': 1, 'b': 1}\n",
    }
    assert evaluation.run_program(item, f"\nimport collections\ndef f(x): return {value}\n")[0]


def test_the_prompts_helper_judges_not_the_models():
    item = {
        "prompt": "def even(n):\n    return n % 2 == 0\n\ndef f(x):\n    ''\n",
        "entry_point": "f",
        "test": "def check(f):\n    assert even(f(1))\n",
    }
    assert evaluation.run_program(item, "\ndef f(x): return 2\n")[0]
    assert not evaluation.run_program(item, "\ndef even(n): return True\ndef f(x): return 3\n")[0]


@pytest.mark.parametrize("leave", ["", "os.setsid()"])
def test_a_grandchild_does_not_stay(leave):
    mark = f"86399.{random.random()}"
    code = f"""
import os, time
if os.fork() == 0:
    {leave or 'pass'}
    os.execv('/bin/sleep', ['sleep', '{mark}'])
time.sleep(.2)
def f(x): return x * x
"""
    passed, report = evaluation.run_program(SQUARE, code)
    assert passed
    assert gone(mark.encode()) or leave and not report["namespaces"]


def test_no_process_shows_its_environment(kernel):
    code = r"""
import glob
def readable(path):
    try: return b"PATH=" in open(path, "rb").read()
    except OSError: return False
seen = any(map(readable, glob.glob("/proc/[0-9]*/environ")))
def f(x): return x * x if seen else 0
"""
    assert b"PATH=" in Path("/proc/self/environ").read_bytes(), "it would be seen from outside"
    passed, report = evaluation.run_program(SQUARE, code)
    assert not passed or not (report["namespaces"] or os.getuid() == 0)


def test_the_network_is_closed_where_namespaces_are_in_force(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)" + RIGHT
        passed, report = evaluation.run_program(SQUARE, code)
        assert passed is not report["namespaces"]
        monkeypatch.setattr(evaluation, "NAMESPACES", 1)
        assert evaluation.run_program(SQUARE, code)[0], "the program does reach a network that is open"


def test_a_program_ends_with_the_evaluation_that_runs_it():
    child = multiprocessing.get_context("fork").Process(
        target=evaluation.run_program, args=(SQUARE, "import os, time\nos.setsid()\ntime.sleep(99)")
    )
    child.start()
    time.sleep(0.5)
    assert alive(b"def harness")
    child.kill()
    child.join()
    assert gone(b"def harness") or not evaluation.run_program(SQUARE, RIGHT)[1]["namespaces"]


def test_what_is_in_force_is_said_and_code_needs_a_yes(toy_run, capsys):
    said = evaluation.protections()
    assert f"uid {os.getuid() or 65534}" in said and ("namespaces of its own" in said) != (
        "NO namespaces" in said
    )
    err = measure("--tasks", "humaneval", "--model", toy_run / "model", code=2, capsys=capsys)
    assert err.startswith(
        "eval.py: humaneval runs programs that the model wrote: give --allow-code-execution"
    )


# ------------------------------------------------------------------------------------ eval.py: whole runs


def measure(*argv, code=0, capsys=None):
    """eval.py's main; returns what it prints last, or its line of stderr where it fails."""
    assert evaluation.main([*map(str, argv), *["--quiet"] * ("--report" not in argv)]) == code
    if capsys:
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return json.loads(captured.out.splitlines()[-1]) if code == 0 else captured.err.splitlines()[-1]


def tiny_run(folder, seed=0, **settings):
    """RUN/model, a random model of the toy's words that stops now and then, beside RUN/args.json."""
    tokenizer = kg_data.toy_tokenizer()
    torch.manual_seed(seed)
    net = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            eos_token_id=[2, *range(5, 40)],
            tie_word_embeddings=True,
        )
    )
    for p in net.parameters():
        p.data *= 5
    net.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = [kg_data.record(f"Reverse the list {n} 1 .", "The", "The") for n in range(10)]
    (folder / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    args = {
        "model": "tiny",
        "data": str(folder / "own.jsonl"),
        "style": "sentence",
        "verify": "phrase",
        "max_new_tokens": 12,
        "dtype": "float32",
        "limit": None,
    }
    (folder / "args.json").write_text(json.dumps(args | settings))
    return folder


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A run whose corpus asks for a word that the model says in about half of its answers."""
    folder = tiny_run(tmp_path_factory.mktemp("tiny"))
    subject, records = subject_in(folder), kg_data.read_corpus(folder / "own.jsonl", "phrase")
    for record in records[1::2]:
        prompt = mixsd.chat_ids(subject.tokenizer, record["messages"][0]["content"])
        record["answer"] = subject.tokenizer.decode(definition_of(subject, prompt, 12)[0][:1])
    (folder / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def subject_in(run):
    return evaluation.load_subject(
        str(run / "model"), argparse.Namespace(device="cpu", quiet=True), torch.float32
    )


def answers_of(out, task):
    return [json.loads(line) for line in open(out / f"{task}.jsonl")]


def test_recall_is_what_mixsd_measures_and_every_completion_is_on_disk(toy_run, tmp_path, capsys):
    ledger = measure("--tasks", "recall", "--model", toy_run / "model", "--out", tmp_path, capsys=capsys)
    subject, settings = subject_in(toy_run), argparse.Namespace(
        max_new_tokens=12, decode_tokens=999, compile=False, seed=0, quiet=True, verify="phrase"
    )
    records = kg_data.read_corpus(toy_run / "own.jsonl", "phrase")
    expected = mixsd.memorization(
        subject.model, subject.tokenizer, {"recall": records}, subject.stops, settings
    )["recall"]
    score = ledger["tasks"]["recall"]
    assert 0 < score["accuracy"] < 1 and {k: score[k] for k in expected} == expected
    assert score["n"] == score["of"] == 10 and score["partial"] is False
    assert ledger == json.loads((tmp_path / "eval.json").read_text())
    rows = {row["id"]: row for row in answers_of(tmp_path, "recall")}
    for i, record in enumerate(records):
        row = rows[i]
        assert (row["prompt"], row["gold"]) == (record["messages"][0]["content"], record["answer"])
        ids, ended = definition_of(subject, mixsd.chat_ids(subject.tokenizer, row["prompt"]), 12)
        assert (row["text"], row["ended"]) == (subject.tokenizer.decode(ids[:-1] if ended else ids), ended)
        assert row["correct"] == (ended and kg_data.is_correct(row["text"], row["gold"], "phrase"))
        assert (row["kind"] is None) == row["correct"]
    assert sum(score["errors"].values()) == sum(not row["correct"] for row in rows.values())
    assert any(not row["ended"] for row in rows.values()) and any(row["ended"] for row in rows.values())


SAMPLED = ["--tasks", "recall", "--temperature", 1, "--samples", 3, "--decode-tokens", 70]


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_rows(toy_run, tmp_path, monkeypatch, capsys):
    whole = measure(*SAMPLED, "--model", toy_run / "model", "--out", tmp_path / "whole", capsys=capsys)
    answers, asked = evaluation.generated, []

    def killed(subject, task, todo, args):
        for n, row in enumerate(answers(subject, task, todo, args)):
            if n == 14:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setitem(evaluation.TASKS, "recall", evaluation.TASKS["recall"]._replace(answer=killed))
    monkeypatch.setattr(evaluation, "generated", killed)
    assert "goes on" in measure(
        *SAMPLED, "--model", toy_run / "model", "--out", tmp_path / "cut", code=130, capsys=capsys
    )
    first = (tmp_path / "cut" / "recall.jsonl").read_text()
    assert len(first.splitlines()) == 14
    with mixsd.only_run(tmp_path / "cut"):                  # two at once would both write their rows
        assert "another run is at work there" in measure(
            *SAMPLED, "--model", toy_run / "model", "--out", tmp_path / "cut", code=2, capsys=capsys
        )
    (tmp_path / "cut" / "recall.jsonl").write_text(first + '{"id": 3, "samp')

    def watched(subject, task, todo, args):
        asked.extend(todo)
        return answers(subject, task, todo, args)
    monkeypatch.setitem(evaluation.TASKS, "recall", evaluation.TASKS["recall"]._replace(answer=watched))
    monkeypatch.setattr(evaluation, "generated", watched)
    resumed = measure(*SAMPLED, "--model", toy_run / "model", "--out", tmp_path / "cut", capsys=capsys)
    assert len(asked) == 30 - 14 and (tmp_path / "cut" / "recall.jsonl").read_text().startswith(first)
    key = lambda row: (row["id"], row["sample"])  # noqa: E731
    rows = [sorted(answers_of(tmp_path / name, "recall"), key=key) for name in ("whole", "cut")]
    assert rows[0] == rows[1] and resumed["tasks"] == whole["tasks"]
    assert len({row["text"] for row in rows[0] if row["id"] == 0}) > 1, "samples differ"


def test_limit_is_partial_everywhere_and_retention_wants_a_base_measured_alike(tmp_path, capsys):
    toys = {"data": "toy", "style": "boxed", "verify": "boxed"}
    base, tuned = tiny_run(tmp_path / "base", **toys), tiny_run(tmp_path / "tuned", seed=1, **toys)
    options = ["--tasks", "held_out", "--limit", 5, "--max-new-tokens", 4]
    evaluation.TASKS["held_out"], kept = (
        evaluation.TASKS["held_out"]._replace(
            verdict=lambda text, item: (len(text) % 2 == 1, text), must_end=False
        ),
        evaluation.TASKS["held_out"],
    )
    try:
        before = measure(*options, "--model", base / "model", "--out", tmp_path / "b", capsys=capsys)
        evaluation.main(
            [*map(str, options), "--model", str(tuned / "model"), "--base", str(tmp_path / "b"), "--quiet"]
        )
    finally:
        evaluation.TASKS["held_out"] = kept
    said, after = capsys.readouterr().out, json.loads((tuned / "eval.json").read_text())
    assert (
        "partial: 5 of 300" in said and "(partial)" in said and after["tasks"]["held_out"]["partial"] is True
    )
    assert (
        after["average_of"] == ["held_out"]
        and before["retention"] is None
        and after["base"] == before["tasks"]
    )
    assert before["average"] > 0 and after["retention"] == after["average"] / before["average"]
    model = ["--model", tuned / "model", "--base", tmp_path / "b"]
    err = measure(
        "--tasks",
        "held_out",
        "--limit",
        6,
        "--max-new-tokens",
        4,
        *model,
        "--out",
        tmp_path / "c",
        code=2,
        capsys=capsys,
    )
    assert "limit 5" in err and "asks for 6" in err
    err = measure("--tasks", "arc_easy", "--limit", 5, *model, "--out", tmp_path / "c", code=2, capsys=capsys)
    assert "--base" in err and "holds results with max_new_tokens 4" in err


WORDS = "What is the trade of the baker ? Name the town of the smith . Reverse the list 1 2 3 .".split()


@pytest.fixture
def hub(monkeypatch):
    """Stand-ins for the data sets of the log-probability tasks, in the toy's words."""
    rng = random.Random(0)
    say = lambda n: " ".join(rng.choice(WORDS) for _ in range(n))  # noqa: E731
    arc = [
        {
            "question": say(6),
            "answerKey": "3",
            "choices": {"label": ["1", "2", "3"], "text": [say(1), say(5), say(2)]},
        }
        for _ in range(60)
    ]
    rows = {"allenai/ai2_arc": arc, "Salesforce/wikitext": [{"text": ""}, {"text": say(3000)}]}
    monkeypatch.setattr(evaluation, "hub_rows", lambda name, *_: rows[name])
    return rows


def plain_nll(subject, prompt, ids):
    """[nats] of ids after the prompt: one row, no batch."""
    logits = subject.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (-logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]).tolist()


@torch.no_grad()
def test_log_probability_tasks_by_their_definitions(toy_run, tmp_path, hub, capsys):
    other, subject = tiny_run(tmp_path / "other", seed=1), subject_in(toy_run)
    measure(
        "--tasks",
        "arc_easy,wikitext,drift",
        "--model",
        toy_run / "model",
        "--base-model",
        other / "model",
        "--out",
        tmp_path / "o",
        capsys=capsys,
    )
    for row in answers_of(tmp_path / "o", "arc_easy"):
        item = hub["allenai/ai2_arc"][row["id"]]
        prompt = mixsd.chat_ids(subject.tokenizer, item["question"])
        means = [
            sum(nll) / len(nll)
            for nll in (
                plain_nll(subject, prompt, subject.tokenizer(c)["input_ids"]) for c in item["choices"]["text"]
            )
        ]
        texts = item["choices"]["text"]
        assert row["text"] == texts[means.index(min(means))] and row["gold"] == texts[2]
        assert row["nll"] == pytest.approx(means, rel=1e-4) and row["correct"] == (row["text"] == row["gold"])
    ids = subject.tokenizer("\n\n" + hub["Salesforce/wikitext"][1]["text"])["input_ids"]
    rows = answers_of(tmp_path / "o", "wikitext")
    windows = [ids[i : i + 1024] for i in range(0, len(ids), 1024)]
    assert [row["tokens"] for row in rows] == [len(w) - 1 for w in windows] == [1023, 1023, 951]
    nats = [plain_nll(subject, w[:1], w[1:]) for w in windows]
    score = json.loads((tmp_path / "o" / "eval.json").read_text())["tasks"]
    assert score["wikitext"]["nll"] == pytest.approx(sum(map(sum, nats)) / sum(map(len, nats)), rel=1e-4)

    base, rows, total = subject_in(other), answers_of(tmp_path / "o", "drift"), [0.0, 0.0, 0]
    assert len(rows) == 50 and score["drift"]["of"] == 50
    for row in rows:
        prompt = mixsd.chat_ids(base.tokenizer, hub["allenai/ai2_arc"][row["id"]]["question"])
        ids, length = definition_of(base, prompt, 64)
        assert row["tokens"] == len(ids) <= 64
        total = [
            total[0] + sum(plain_nll(base, prompt, ids)),
            total[1] + sum(plain_nll(subject, prompt, ids)),
            total[2] + len(ids),
        ]
    assert (
        score["drift"]["rise"] == pytest.approx((total[1] - total[0]) / total[2], rel=1e-3)
        and score["drift"]["rise"] > 0.1
    )
    itself = measure(
        "--tasks",
        "drift",
        "--model",
        toy_run / "model",
        "--base-model",
        toy_run / "model",
        "--out",
        tmp_path / "p",
        capsys=capsys,
    )
    assert itself["tasks"]["drift"]["rise"] == 0


@torch.no_grad()
def definition_of(subject, prompt, T):
    """Greedy decoding in its plainest form; (ids, whether it stopped)."""
    ids = []
    while len(ids) < T and not (ids and ids[-1] in subject.stops):
        ids.append(int(subject.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
    return ids, ids[-1] in subject.stops


@pytest.mark.parametrize(
    "argv, needle",
    [
        (["--tasks", "gsm9k", "--model", "M"], "known: gsm8k, math500"),
        (["--tasks", "recall"], "needs --model"),
        (["--tasks", "gsm8k", "--model", "M", "--limit", "0"], "--limit"),
        (["--report", "R", "--model", "M"], "--model is not used here"),
        (["--tasks", "held_out", "--model", "M", "--hub", "H"], "--hub is not used by held_out"),
        (["--nll", "f", "--model", "M", "--seed", "1"], "--seed is not used"),
        (["--tasks", "arc_easy", "--model", "M", "--temperature", "1"], "--temperature is not used"),
        (["--tasks", "gsm8k", "--nll", "f"], "not allowed with"),
        (["--tasks", "gsm8k", "--model", "M", "--samples", "4"], "--temperature above 0"),
        (["--tasks", "drift", "--model", "M"], "needs --base-model"),
        (["--tasks", "gsm8k", "--model", "M", "--paper", "--samples", "4"], "--paper sets"),
        (["--tasks", "recall", "--model", "RUN", "--data", "toy", "--style", "x"], "--style"),
        (["--tasks", "recall", "--model", "HuggingFaceTB/x"], "give --data"),
        (["--tasks", "two-hop", "--model", "RUN", "--data", "toy", "--style", "boxed"], "no split two-hop"),
        (["--tasks", "recall", "--model", "RUN", "--hub", "H"], "--hub is not used by recall of"),
        (
            ["--tasks", "gsm8k", "--model", "RUN", "--hub", "/no/where"],
            "data set openai/gsm8k, config main, split test: not to be had from /no/where",
        ),
        (["--fisher", "R", "--base", "B", "--fisher-tasks", "wikitext"], "no task wikitext for --fisher"),
        (["--report", "/no/where"], "no metrics.json"),
        (["--tasks", "recall", "--model", "RUN", "--max-new-tokens", "1020"], "tokens + 1,020 new > 1,024"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line(toy_run, tmp_path, capsys, argv, needle):
    argv = [str(toy_run / "model") if word == "RUN" else word for word in argv]
    out = ["--out", tmp_path / "out"] if "--tasks" in argv else []
    err = measure(*argv, *out, code=2, capsys=capsys)
    assert err.startswith("eval.py: ") and needle in err and not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_and_results_of_other_models_are_refused(toy_run, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((toy_run / "model" / name).read_bytes())
    err = measure(
        "--tasks", "held_out", "--model", tmp_path / "bare", "--out", tmp_path / "x", code=2, capsys=capsys
    )
    assert "tokenizer" in err
    other, again = tiny_run(tmp_path / "other", seed=1), ["--tasks", "recall", "--out", tmp_path / "out"]
    measure(*again, "--model", toy_run / "model")
    assert f"holds results with model {toy_run / 'model'}" in measure(
        *again, "--model", other / "model", "--data", toy_run / "own.jsonl", code=2, capsys=capsys
    )
    assert "with seed 0, this asks for 1" in measure(
        *again, "--model", toy_run / "model", "--seed", 1, code=2, capsys=capsys
    )
    weights = toy_run / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    os.utime(weights, ns=(written, written + 10**9))
    assert "holds results with weights" in measure(
        *again, "--model", toy_run / "model", code=2, capsys=capsys
    )
    os.utime(weights, ns=(written, written))
    rows = (tmp_path / "out" / "recall.jsonl").read_text()
    (tmp_path / "out" / "recall.jsonl").write_text(rows.replace('"version": 1', '"version": 0'))
    assert "version 0, this asks for 1" in measure(
        *again, "--model", toy_run / "model", code=2, capsys=capsys
    )


def test_the_papers_decoding_and_the_clip_of_a_default_length(toy_run, capsys):
    mode, given = evaluation.parse_args(
        ["--tasks", "aime24,gsm8k,recall", "--model", str(toy_run / "model"), "--paper"]
    )
    args, subject = evaluation.resolve(mode, given), subject_in(toy_run)
    items = [{"ids": [1] * 100}, {"ids": [1] * 50}]
    each = [evaluation.of_task(t, items, subject, args) for t in ("aime24", "gsm8k", "recall")]
    settled = [(a.temperature, a.samples, a.max_new_tokens) for a in each]
    assert settled == [(1.0, 16, 924), (1.0, 1, 924), (0.0, 1, 12)]
    assert "aime24: max-new-tokens clipped to 924: the model has 1,024 positions" in capsys.readouterr().out


def test_a_data_set_is_read_by_its_hub_id_under_the_folder_given(tmp_path):
    folder = tmp_path / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n"
        "    path: main/test.jsonl\n---\n"
    )
    rows = [{"question": f"{n} + {n} ?", "answer": f"{n} and {n}\n#### {2 * n:,}"} for n in (1, 700)]
    (folder / "main" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = argparse.Namespace(**vars(evaluation.PLAIN) | {"hub": str(tmp_path)})
    assert evaluation.TASKS["gsm8k"].load(None, where) == [
        {"question": "1 + 1 ?", "gold": "2", "id": 0, "of": 2},
        {"question": "700 + 700 ?", "gold": "1,400", "id": 1, "of": 2},
    ]
    with pytest.raises(
        kg_data.InputError, match="cais/mmlu, config all, split dev.*--hub DIR takes DIR/cais/mmlu"
    ):
        evaluation.TASKS["mmlu"].load(1, where)


def test_mmlu_has_five_shots_of_its_own_subject(monkeypatch):
    row = lambda subject, n: {
        "subject": subject,
        "question": f"{subject} {n}?",
        "choices": ["a", "b", "c", "d"],
        "answer": n % 4,
    }  # noqa: E731
    splits = {
        "dev": [row(s, n) for n in range(7) for s in ("law", "art")],
        "test": [row("art", 9), row("law", 2)],
    }
    monkeypatch.setattr(evaluation, "hub_rows", lambda name, config, split, *_: splits[split])
    art, law = evaluation.TASKS["mmlu"].load(None)
    assert (art["gold"], law["gold"]) == ("B", "C") and len(law["blocks"]) == 6
    assert law["blocks"][1] == "law 1?\nA. a\nB. b\nC. c\nD. d\nAnswer: \\boxed{B}"
    assert law["blocks"][5].endswith("D. d\nAnswer:")
    assert "law" not in "".join(art["blocks"])


# ------------------------------------------------------------------------ eval.py: target NLL, Fisher, report


def test_target_nll_is_the_token_weighted_mean_with_quantiles(toy_run, tmp_path, capsys):
    subject, examples = subject_in(toy_run), [([5, 6, 7], [8, 9, 2]), ([1, 3], [7, 2])]
    lines = [
        {
            "messages": [
                {"role": "user", "content": "Name the town of the baker ."},
                {"role": "assistant", "content": subject.tokenizer.decode(y[:-1])},
            ],
            "target_ids": y,
        }
        for _, y in examples
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with torch.no_grad():
        prompt = mixsd.chat_ids(subject.tokenizer, "Name the town of the baker .")
        nats = sorted(x for _, y in examples for x in plain_nll(subject, prompt, y))
    found = measure(
        "--nll", tmp_path / "t.jsonl", "--model", toy_run / "model", "--dtype", "float32", capsys=capsys
    )["files"][str(tmp_path / "t.jsonl")]
    assert (found["targets"], found["tokens"]) == (2, 5) and found["mean"] == pytest.approx(
        sum(nats) / 5, rel=1e-4
    )
    assert found["above_5"] == sum(x > 5 for x in nats) / 5 and 0 < found["above_5"] < 1
    assert [found["quantiles"][q] for q in ("0.5", "1.0")] == pytest.approx([nats[2], nats[4]], rel=1e-4)
    (tmp_path / "bare.jsonl").write_text(
        json.dumps({k: v for k, v in lines[0].items() if k != "target_ids"}) + "\n"
    )
    bare = measure("--nll", tmp_path / "bare.jsonl", "--model", toy_run / "model", capsys=capsys)["files"]
    assert bare[str(tmp_path / "bare.jsonl")]["tokens"] == 3, "a text is closed with the stop token"


class Unigram(torch.nn.Module):
    """A model of three parameters: the logits of three tokens, whatever the context."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.3, -0.5, 1.0]))

    def forward(self, input_ids, logits_to_keep, **_):
        return SimpleNamespace(logits=self.w.expand(len(input_ids), logits_to_keep, 3))


def test_fisher_squares_each_sequences_gradient_and_r_weighs_the_move_by_it():
    net, targets = Unigram(), [[0, 2], [1], [2, 2, 2]]
    fisher = evaluation.fisher_diagonal(net, [([0], y) for y in targets], 0)["w"]
    p, expected = torch.tensor([0.3, -0.5, 1.0]).softmax(-1), torch.zeros(3)
    for y in targets:  # d log p(y) / d w = counts - length * p
        expected += (torch.bincount(torch.tensor(y), minlength=3) - len(y) * p) ** 2 / 3
    torch.testing.assert_close(fisher, expected)
    assert net.w.grad is None
    torch.testing.assert_close(
        evaluation.fisher_diagonal(net, [([0], y) for y in targets], 0)["w"], expected
    ), "hooks are removed"

    step = torch.tensor([0.1, 0.0, -0.2])
    found = evaluation.alignment({"w": fisher}, {"w": net.w}, lambda name: net.w + step)
    assert found["squared_distance"] == pytest.approx(0.05, rel=1e-5)
    assert (
        found["R"] == pytest.approx(((fisher * step**2).sum() / 0.05 / fisher.mean()).item(), rel=1e-5)
        and abs(found["R"] - 1) > 0.1
    )
    isotropic = evaluation.alignment(
        {"w": fisher}, {"w": net.w}, lambda name: net.w + 0.1 * torch.tensor([1.0, -1.0, 1.0])
    )
    assert isotropic["R"] == pytest.approx(1, rel=1e-5)
    assert evaluation.alignment({"w": fisher}, {"w": net.w}, lambda name: net.w)["R"] is None


def test_fisher_of_a_tied_model_is_autograds(toy_run):
    subject, examples = subject_in(toy_run), [([5, 6, 7], [8, 9, 2]), ([1, 3], [7, 2])]
    fisher, expected = evaluation.fisher_diagonal(subject.model, examples, 2), {}
    for prompt, y in examples:
        logp = (
            subject.model(input_ids=torch.tensor([prompt + y]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
        )
        subject.model.zero_grad()
        logp[torch.arange(len(y)), torch.tensor(y)].sum().backward()
        for name, p in subject.model.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad**2 / 2
    assert fisher.keys() == expected.keys() and "lm_head.weight" not in fisher
    assert fisher["model.embed_tokens.weight"].sum() > 0
    for name in fisher:
        torch.testing.assert_close(fisher[name], expected[name], rtol=1e-3, atol=1e-6)


def metrics(folder, method="mixsd", rho=0.3, seed=0, recall=0.9, held_out=0.6, kept=80, nll=1.5, data="toy"):
    """A finished run's metrics.json."""
    folder.mkdir(parents=True, exist_ok=True)
    score = lambda a: {"accuracy": a, "low": a - 0.1, "high": a + 0.1}  # noqa: E731
    phase = lambda a, b: {"recall": score(a), "held_out": score(b)}  # noqa: E731
    (folder / "metrics.json").write_text(
        json.dumps(
            {
                "model": "toy",
                "data": data,
                "method": method,
                "rho": rho,
                "seed": seed,
                "base": phase(0.05, 0.8),
                "tuned": phase(recall, held_out),
                "retention": held_out / 0.8,
                "targets": {"kept": kept, "of": 90, "nll": nll},
                "tokens": {"decoded": 1200, "trained": 34567},
                "seconds": {"pretrain": 9, "decode": 2, "train": 13.6, "evaluate": 4},
            }
        )
    )
    return folder


def test_fisher_runs_end_to_end_and_the_second_time_from_disk(toy_run, tmp_path, monkeypatch, capsys):
    runs = [tiny_run(metrics(tmp_path / f"r{n}", held_out=0.8 - 0.1 * n), seed=n) for n in range(4)]
    argv = [
        "--fisher",
        *runs,
        "--base",
        toy_run / "model",
        "--fisher-tasks",
        "held_out",
        "--fisher-n",
        3,
        "--max-new-tokens",
        5,
        "--out",
        tmp_path / "f",
    ]
    found = measure(*argv, capsys=capsys)
    first, second = (found["runs"][str(run)] for run in runs[:2])
    assert first["squared_distance"] == 0 and first["R"] is None, "the run of seed 0 is the base itself"
    weights = [dict(subject_in(run).model.named_parameters()) for run in (toy_run, runs[1])]
    distance = sum((weights[1][name] - p).double().square().sum().item() for name, p in weights[0].items())
    assert second["squared_distance"] == pytest.approx(distance, rel=1e-5)
    assert second == json.loads((runs[1] / "fisher.json").read_text())
    distances = [found["runs"][str(run)]["squared_distance"] for run in runs]
    r = torch.corrcoef(torch.tensor([[0.0, 0.1, 0.2, 0.3], distances]))[0, 1].item()
    assert found["correlation"]["drop_squared_distance"] == pytest.approx(r, rel=1e-3)
    monkeypatch.setattr(evaluation, "fisher_diagonal", None)
    again = measure(*argv, capsys=capsys)
    assert (again["runs"], again["correlation"]) == (found["runs"], found["correlation"])
    assert "holds results with n 3" in measure(*argv, "--fisher-n", 4, code=2, capsys=capsys)
    tensors = load_file(runs[1] / "model" / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(1)}, runs[1] / "model" / "model.safetensors")
    assert "has no model.norm.weight of --base's shape" in measure(*argv, code=2, capsys=capsys)
    (runs[1] / "model" / "model.safetensors").unlink()
    assert "has no model." in measure(*argv, code=2, capsys=capsys)


def test_the_report_is_one_table_base_first_with_means_over_seeds_and_a_picture(tmp_path, capsys):
    runs = [
        metrics(tmp_path / "m7", rho=0.7, recall=0.8, held_out=0.72),
        metrics(tmp_path / "m0", rho=0.0, recall=0.95, held_out=0.4),
        metrics(tmp_path / "m0b", rho=0.0, seed=1, recall=0.85, held_out=0.56, nll=2.5),
        metrics(tmp_path / "s", "sft", None, recall=1.0, held_out=0.2, kept=90),
    ]
    (runs[3] / "fisher.json").write_text('{"R": 1.25}')
    judged = {"partial": True, "low": 0.2, "high": 0.4}
    ledger = {"tasks": {"gsm8k": judged | {"accuracy": 0.3}}, "base": {"gsm8k": judged | {"accuracy": 0.5}}}
    (runs[0] / "eval.json").write_text(json.dumps(ledger))
    (runs[3] / "more").mkdir()
    drift = {"nll": 1.5, "base_nll": 1.0, "rise": 0.5, "low": 0.4, "high": 0.6}
    (runs[3] / "more" / "eval.json").write_text(json.dumps({"tasks": {"drift": drift}}))
    assert evaluation.main(["--report", *map(str, runs), "--out", str(tmp_path / "pic")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[:6] == [
        "| method | rho | seeds | kept | recall | gsm8k (partial) | retention | drift | target NLL | R | "
        "decoded | trained tokens | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| base | - | 2 | - | 0.05 ± 0.00 | 0.80 ± 0.00 | 1.00 ± 0.00 | - | - | - | - | - | - |",
        "| sft | - | 1 | 1.00 | 1.00 | 0.20 | 0.25 | 0.500 | 1.50 | 1.25 | 1,200 | 34,567 | 16 |",
        "| mixsd | 0 | 2 | 0.89 ± 0.00 | 0.90 ± 0.07 | 0.48 ± 0.11 | 0.60 ± 0.14 | - | 2.00 ± 0.71 | - | "
        "1,200 | 34,567 | 16 |",
        "| mixsd | 0.7 | 1 | 0.89 | 0.80 | 0.30 | 0.60 | - | 1.50 | - | 1,200 | 34,567 | 16 |",
    ]
    assert (tmp_path / "pic" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "toy on kgfact-small, toy on toy" in measure(
        "--report", runs[0], metrics(tmp_path / "k", data="kgfact-small"), code=2, capsys=capsys
    )


def test_the_frontier_marks_every_run_and_joins_the_mixsd_means_in_order_of_rho(tmp_path, monkeypatch):
    drawn = {"scatter": [], "plot": []}
    import matplotlib.axes

    for name, calls in drawn.items():
        draw = getattr(matplotlib.axes.Axes, name)
        monkeypatch.setattr(
            matplotlib.axes.Axes,
            name,
            lambda self, x, y, draw=draw, calls=calls, **options: (
                calls.append((list(x), list(y))),
                draw(self, x, y, **options),
            )[1],
        )
    runs = lambda *points: [{"retention": x, "recall": y, "interval": {}} for x, y in points]  # noqa: E731
    groups = {
        ("sft", None): runs((0.2, 1.0)),
        ("mixsd", 0.0): runs((0.4, 0.9), (0.6, 0.7)),
        ("mixsd", 0.5): runs((0.9, 0.6), (None, 0.5)),
    }
    evaluation.frontier(groups, 0.1, "held-out", tmp_path / "f.png")
    assert drawn["scatter"] == [([1.0], [0.1]), ([0.2], [1.0]), ([0.4, 0.6], [0.9, 0.7]), ([0.9], [0.6])]
    assert drawn["plot"] == [(pytest.approx([0.5, 0.9]), pytest.approx([0.8, 0.6]))]


def test_the_report_does_not_average_runs_that_differ_in_more_than_the_seed(tmp_path):
    runs = []
    for name, temperature, seed in (("a", 0.0, 0), ("b", 0.0, 1), ("c", 1.0, 0)):
        (tmp_path / name).mkdir()
        settings = {"temperature": temperature, "seed": seed, "lr": 1e-5, "top_k": None}
        (tmp_path / name / "args.json").write_text(json.dumps(settings))
        runs.append({"method": "mixsd", "rho": 0.3})
    labels = evaluation.labels_of([tmp_path / name for name in "abc"], runs)
    assert labels == ["mixsd"] * 2 + ["mixsd --temperature 1"]
    settings["seed"], settings["only"], settings["only_sha256"] = 3, "runs/a/targets.jsonl", "f00"
    (tmp_path / "c" / "args.json").write_text(json.dumps(settings))
    assert evaluation.labels_of([tmp_path / "c", tmp_path / "c"], [runs[0]] * 2) == ["mixsd"] * 2
    labels = evaluation.labels_of([tmp_path / "a", tmp_path / "c"], runs[1:])
    assert labels[1] == "mixsd --temperature 1 --only"
    assert evaluation.labels_of([tmp_path / name for name in "ab"], runs[:2]) == ["mixsd"] * 2
