"""The README's claims that a CPU can check. No network; the toy's base is pretrained once, then cached."""
import contextlib
import functools
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}       # before the libraries read them

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

import eval as evaluation
import kg_data
import mixsd
from mixsd import EXPERT, NAIVE, Example

HERE = Path(__file__).parent
V, STOPS = 64, [63, 62]


# ------------------------------------------------------------------------------------------ shared helpers

def tiny_model(kind=Qwen3ForCausalLM, config=Qwen3Config, seed=0, **more):
    """A random model over 64 tokens."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                 num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0)
    net = kind(config(**sizes | more)).eval()
    for p in net.parameters():
        p.data *= 3                                         # sharper: answers that differ, and that stop
    return net


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def either(request):
    """A model of each of two architectures, the second with a sliding window in its first layer."""
    if request.param == "qwen3":
        return tiny_model()
    return tiny_model(Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=8,
                      layer_types=["sliding_attention", "full_attention"])


def contexts_of(lengths=(4, 11, 6, 9, 5, 8), extra=7):
    """[expert prompts, naive prompts] of random ids, which hold neither the pad token nor a stop."""
    rng = random.Random(2)
    naive = [[rng.randrange(1, 62) for _ in range(n)] for n in lengths]
    return [[x + [rng.randrange(1, 62) for _ in range(extra)] for x in naive], naive]


def plain_nll(model, prompt, y):
    """(n,) nats of the tokens y after the prompt: one row, without padding and without batch."""
    logits = model(input_ids=torch.tensor([prompt + y])).logits[0, len(prompt) - 1:-1]
    return -logits.log_softmax(-1)[torch.arange(len(y)), torch.tensor(y)]


@torch.no_grad()
def definition(model, contexts, source, stops=STOPS, choose=lambda logits, t: logits.argmax()):
    """Mixed decoding in its plainest form: one row, without cache and without padding."""
    y = []
    while len(y) < len(source) and not (y and y[-1] in stops):
        prompt = contexts[source[len(y)]]
        y.append(int(choose(model(input_ids=torch.tensor([prompt + y])).logits[0, -1], len(y))))
    return y


@functools.cache
def toy_folder():
    """The folder of the toy's base."""
    return mixsd.toy_base(quiet=True)[0]


def tiny_run(folder, seed=0, **settings):
    """RUN/model, a random model of the toy's words that stops now and then, beside RUN/args.json."""
    tokenizer = kg_data.toy_tokenizer()
    net = tiny_model(seed=seed, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                     eos_token_id=[2, *range(5, 20)], tie_word_embeddings=True, max_position_embeddings=1024)
    net.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = [turns(f"Reverse the list {n} 1 .", "The", answer="The") for n in range(10)]
    own = jsonl(folder / "own.jsonl", *records)
    args = {"model": "tiny", "data": str(own), "style": "sentence", "verify": "phrase", "max_new_tokens": 12,
            "dtype": "float32", "limit": None}
    (folder / "args.json").write_text(json.dumps(args | settings))
    return folder


def words_of(command):
    """A command line's words. TOY is the toy's base as a folder: it is then asked about its facts alone."""
    if "TOY" in command:
        command = command.replace("TOY", f"--model {toy_folder()} --data toy")
    return shlex.split(command) + ["--quiet"] * ("--report" not in command)


def printed(command, code=0, program=mixsd):
    """(stdout, stderr) of the program's main on a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = program.main(words_of(command))
    assert found == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def run(command, program=mixsd):
    """The object that a program prints last: a run's metrics, or an evaluation's scores."""
    return json.loads(printed(command, program=program)[0].splitlines()[-1])


def refused(command, code=2, program=mixsd):
    """The one line on stderr of a program that fails."""
    _, err = printed(command, code, program)
    assert err.startswith(f"{program.__name__}.py: ") and err.count("\n") == 1
    return err


def timeless(found):
    """An object, or a list of them, without what a clock or the memory of the process decides."""
    if isinstance(found, list):
        return [timeless(one) for one in found]
    return found if not isinstance(found, dict) else {
        key: timeless(value) for key, value in found.items() if key not in ("seconds", "peak_gib")}


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def jsonl(path, *rows):
    """Write rows, objects or whole lines, to a file and make its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def turns(question, target, **more):
    """A record; `more` are its other keys."""
    return kg_data.record(question, target, None) | more


def question_of(record):
    return record["messages"][0]["content"]


# ------------------------------------------------------------------------------------------- mixed decoding

@pytest.mark.parametrize("rho", [0.0, 0.3, 0.7, 1.0])
def test_decoding_with_a_cache_in_a_padded_batch_equals_the_definition(either, rho):
    contexts, source, rows = contexts_of(), mixsd.draw_sources(rho, 40, 1, range(6)), []
    hook = either.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    y = mixsd.decode(either, contexts, source, STOPS)
    hook.remove()
    assert y == [definition(either, pair, source[i]) for i, pair in enumerate(zip(*contexts))]
    if rho == 0.3:
        assert {*STOPS} < {row[-1] for row in y}, "the case must have both stops, and a row without a stop"
        assert rows[0] == 12 > rows[-1] and len(rows) == 40, "finished rows must leave the batch on the way"


def test_mixed_decoding_equals_the_librarys_generate_where_one_row_speaks_for_both(either):
    contexts, source = contexts_of(), mixsd.draw_sources(0.3, 40, 1, range(6))
    ids, mask = mixsd.left_pad(contexts[EXPERT] + contexts[NAIVE], 0)                  # (C*B, P)

    def one_speaks(seen, logits):                           # a logits processor: its row becomes that of both
        return logits[source[:, seen.shape[1] - ids.shape[1]] * 6 + torch.arange(6)].repeat(2, 1)
    out = either.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False,
                          logits_processor=[one_speaks], eos_token_id=STOPS)
    for row, y in zip(out[:, ids.shape[1]:].tolist(), mixsd.decode(either, contexts, source, STOPS) * 2):
        assert row[:len(y)] == y and not any(row[len(y):])


@pytest.mark.filterwarnings("error")
def test_decoding_calls_the_library_without_a_warning(either, monkeypatch):
    said = []
    for way in ("warning", "warning_once"):
        monkeypatch.setattr(logging.Logger, way, lambda self, *args, **_: said.append(args))
    mixsd.decode(either, contexts_of(), mixsd.draw_sources(0.5, 12, 1, range(6)), STOPS)
    assert said == []


def test_a_token_is_naive_with_probability_rho_and_by_seed_example_and_attempt_alone():
    a = mixsd.uniforms("coin", 50, 1, [3, 4], 0)
    assert torch.equal(mixsd.uniforms("coin", 20, 1, [4], 0)[0], a[1, :20])
    for what, seed, example, attempt in (("coin", 1, 4, 0), ("coin", 1, 3, 1), ("coin", 2, 3, 0),
                                         ("token", 1, 3, 0)):
        assert (mixsd.uniforms(what, 50, seed, [example], attempt)[0] != a[0]).all()
    for rho in (0.0, 0.3, 0.9, 1.0):
        source = mixsd.draw_sources(rho, 200, 5, range(200))
        sigma = math.sqrt(rho * (1 - rho) / source.numel())
        assert abs((source == NAIVE).double().mean().item() - rho) <= 5 * sigma


def test_pick_is_exact_at_the_edges_and_keeps_to_the_top_k():
    logits = torch.tensor([[0.0, 3.0, 2.0, -torch.inf]]).repeat(3, 1)
    u = torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert mixsd.pick(logits, 1.0, 0, u).tolist() == [0, 1, 2], "a token of probability 0 is never drawn"
    assert mixsd.pick(logits, 1.0, 2, u).tolist() == [1, 1, 2], "the least likely of three is left out"
    assert mixsd.pick(logits, 1.0, 1, u).tolist() == [1, 1, 1] == mixsd.pick(logits).tolist()


@pytest.mark.parametrize("world", [1, 3])
def test_batches_fill_the_budget_of_a_rank_and_do_not_depend_on_what_is_done(monkeypatch, world):
    monkeypatch.setattr(mixsd, "ranks", lambda: (0, world))
    rng = random.Random(0)
    widths = {i: (rng.randrange(1, 50), rng.randrange(1, 20)) for i in range(200)}
    parts = list(mixsd.batches(widths, 600, C=2))

    def slots(part):                                        # KV slots of the largest share of a rank
        return 2 * math.ceil(len(part) / world) * sum(max(widths[i][side] for i in part) for side in (0, 1))
    assert sorted(sum(parts, [])) == list(range(200)) and all(slots(part) <= 600 for part in parts)
    assert all(slots(part + after[:1]) > 600 for part, after in zip(parts, parts[1:]))
    left = {i: w for i, w in widths.items() if i not in parts[0] + parts[1]}
    assert list(mixsd.batches(left, 600, C=2)) == parts[2:]
    assert [*mixsd.batches({1: (500, 500)}, 600)] == [[1]], "an example over the budget is a batch of its own"


@pytest.mark.parametrize("ends, prompt, chat, stops", [
    ([1, 63], [5, 63, 6], [5, 63, 6, 7, 63, 8], [63, 1]),   # as in Gemma, whose end token closes no turn
    (63, [5, 63, 6], [5, 63, 6, 7, 1], [1, 63]),
    ([63, 62], [5, 6], [5, 6, 7], [1, 62, 63])])            # the template closes no turn
def test_a_target_is_closed_by_what_the_template_puts_after_an_assistant_turn(ends, prompt, chat, stops):
    net = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
    tokenizer = SimpleNamespace(eos_token_id=1, apply_chat_template=lambda turns, add_generation_prompt=False,
                                **_: prompt if add_generation_prompt else chat)
    assert mixsd.stop_ids(net, tokenizer) == stops


# ---------------------------------------------------------------------------------------- loss and training

EXAMPLES = [Example(10, [], [5, 6, 7], [8, 9, 63]), Example(11, [], [1, 2, 3, 4, 5, 6], [7, 63]),
            Example(12, [], [9], [10, 11, 12, 13, 14, 63])]


def settings_for(method, **more):
    """The settings that `token_losses` reads."""
    defaults = {"method": method, "kl": "forward", "teacher_top_k": 0, "kl_to_base": None}
    return SimpleNamespace(**defaults | more)


def sft_losses(model, examples, pad_id=0):
    return mixsd.token_losses(model, None, examples, settings_for("sft"), pad_id)


@pytest.mark.parametrize("pad_id", [0, 63])
def test_the_loss_is_the_hand_sum_over_target_tokens_also_where_the_pad_is_the_stop(monkeypatch, pad_id):
    net, chunks, real = tiny_model(), [], mixsd.nll
    monkeypatch.setitem(mixsd.by_chunks.__kwdefaults__, "chunk", 4)
    monkeypatch.setattr(mixsd, "nll", lambda *rows: (chunks.append(len(rows[0])), real(*rows))[1])
    losses = sft_losses(net, EXAMPLES, pad_id)
    losses.sum().backward()
    assert chunks[:3] == [4, 4, 3] == sorted(chunks[3:], reverse=True), "backward computes each chunk again"
    expected = torch.cat([plain_nll(net, e.x, e.y) for e in EXAMPLES])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro_tokens, skip", [(1, {}), (16, {}), (10**6, {}), (16, {0, 2})])
def test_a_step_follows_the_clipped_gradient_of_the_mean_over_all_target_tokens(micro_tokens, skip):
    net, by_hand = tiny_model(), tiny_model()
    some = [e._replace(skip=frozenset(t for t in skip if t < len(e.y))) for e in EXAMPLES]
    nats = [plain_nll(by_hand, e.x, e.y)[[t for t in range(len(e.y)) if t not in skip]] for e in some]
    loss = torch.cat(nats).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=99.0)
    found = mixsd.update(net, net, optimizer, some, lambda part: sft_losses(net, part), 0.5, micro_tokens)
    N = sum(map(len, nats))
    assert norm > 2 and N == 11 - 5 * bool(skip)
    assert found == pytest.approx((loss.item(), norm.item(), N), rel=1e-4)
    for p, q in zip(net.parameters(), by_hand.parameters()):
        torch.testing.assert_close(p, q - 0.5 * q.grad, rtol=1e-4, atol=1e-5)
        assert p.grad is None


def test_the_gradients_of_a_bfloat16_student_add_up_in_float32_masters_which_it_then_follows():
    masters, student = tiny_model(), tiny_model().to(torch.bfloat16)
    mixsd.follow(student, masters)

    def gradients(*examples):
        masters.zero_grad()
        for example in examples:
            sft_losses(student, [example]).sum().backward()
        return [p.grad for p in masters.parameters()]
    single = [gradients(example) for example in EXAMPLES]
    for found, *parts in zip(gradients(*EXAMPLES), *single):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, sum(parts))
    assert all(p.grad is None for p in student.parameters())
    optimizer = torch.optim.SGD(masters.parameters())
    mixsd.update(student, masters, optimizer, EXAMPLES, lambda part: sft_losses(student, part), 1e-2, 99)
    for p, q, start in zip(student.parameters(), masters.parameters(), tiny_model().parameters()):
        assert torch.equal(p, q.bfloat16()) and not torch.equal(q, start)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights():
    net = tiny_model()
    net.lm_head.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(mixsd.RunError, match=r"loss nan, .* on examples \[10, 11, 12\]"):
        mixsd.update(net, net, torch.optim.AdamW(net.parameters()), EXAMPLES,
                     lambda part: sft_losses(net, part), 1e-3, 99)
    torch.testing.assert_close(net.state_dict(), tiny_model().state_dict(), rtol=0, atol=0)


def steps_of(monkeypatch, folder, decay=False, **settings):
    """[(items, learning rate)] of each step of `train` on ten items, without the computation."""
    steps, net = [], tiny_model()
    monkeypatch.setattr(mixsd, "update", lambda student, masters, optimizer, examples, losses_of, lr, micro:
                        (steps.append((examples, lr)), (0.0, 0.0, 1))[1])
    args = SimpleNamespace(**{"steps": 6, "batch_size": 4, "lr": 1.0, "warmup": 4, "seed": 0, "quiet": True,
                              "micro_tokens": 99, "save_minutes": 1e9} | settings)
    mixsd.train(net, net, list(range(10)), lambda items, step: items, None, args, folder, decay=decay)
    return steps


def test_each_epoch_uses_every_item_once_in_its_own_order_and_the_rate_warms_up(monkeypatch, tmp_path):
    epochs = []
    for seed in (0, 0, 1):
        items, rates = zip(*steps_of(monkeypatch, tmp_path, seed=seed))
        assert [len(part) for part in items] == [4, 4, 2] * 2 and rates == (0.25, 0.5, 0.75, 1, 1, 1)
        epochs.append([sum(items[:3], []), sum(items[3:], [])])
    assert all(sorted(epoch) == list(range(10)) for pair in epochs for epoch in pair)
    assert epochs[0] == epochs[1] and len({tuple(epoch) for pair in epochs for epoch in pair}) == 4
    falling = [rate for _, rate in steps_of(monkeypatch, tmp_path, warmup=0, decay=True)]
    assert falling == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_state_is_saved_whenever_its_minutes_have_passed_and_not_at_the_end(monkeypatch, tmp_path):
    saved, minutes = [], iter(range(10**6))
    monkeypatch.setattr(mixsd, "save_state", lambda folder, step, *rest: saved.append(step))
    monkeypatch.setattr(mixsd, "time", SimpleNamespace(time=lambda: 60.0 * next(minutes)))
    for often in (0, 8, 1e9):                               # a step asks for the time three or four times
        steps_of(monkeypatch, tmp_path, save_minutes=often)
        saved.append("end")
    assert saved == [1, 2, 3, 4, 5, "end", 3, "end", "end"]


# -------------------------------------------------------------- OPSD, and the other answers to forgetting

def test_kl_is_the_hand_sum_in_both_directions_full_and_over_the_teachers_likeliest_tokens():
    student, teacher = torch.tensor([[0.0, 1.0, 2.0, -1.0]]), torch.tensor([[1.0, 0.5, 3.0, 0.0]])
    p_s, p_t = ([math.exp(v) for v in row[0].tolist()] for row in (student, teacher))
    for top_k, kept in ((0, [0, 1, 2, 3]), (2, [2, 0]), (9, [0, 1, 2, 3])):
        q, p = ([ps[i] / sum(ps[j] for j in kept) for i in kept] for ps in (p_s, p_t))
        forward = sum(b * math.log(b / a) for a, b in zip(q, p))
        reverse = sum(a * math.log(a / b) for a, b in zip(q, p))
        assert mixsd.kl(student, teacher, "forward", top_k).item() == pytest.approx(forward, rel=1e-5)
        assert mixsd.kl(student, teacher, "reverse", top_k).item() == pytest.approx(reverse, rel=1e-5)
    assert abs(forward - reverse) > 0.01
    torch.manual_seed(0)
    many = torch.randn(500, 97)
    for direction in ("forward", "reverse"):                # rounding does not make it negative
        assert mixsd.kl(many, many + 1e-6 * torch.randn(500, 97), direction).min() >= 0


def test_the_teacher_reads_the_experts_prompt_and_the_anchor_reads_the_naive_one():
    """Each loss of `token_losses` against logits of one row, without padding."""
    net, base, (expert, naive), rng = tiny_model(), tiny_model(), contexts_of(), random.Random(5)
    for p in base.parameters():
        p.data *= 0.9
    y = [[rng.randrange(1, 62) for _ in range(n)] for n in (3, 7, 1, 4, 5, 2)]
    examples = [Example(i, *prompts, target) for i, (*prompts, target) in enumerate(zip(expert, naive, y))]

    def logits_of(model, prompts):                          # (N, V)
        return torch.cat([model(torch.tensor([x + target])).logits[0, len(x) - 1:-1]
                          for x, target in zip(prompts, y)])
    with torch.no_grad():
        student, teacher, anchor = logits_of(net, naive), logits_of(base, expert), logits_of(base, naive)
    nll = mixsd.nll(student, torch.tensor(sum(y, [])))
    for settings, expected in (
            (settings_for("opsd"), mixsd.kl(student, teacher)),
            (settings_for("opsd", kl="reverse", teacher_top_k=5), mixsd.kl(student, teacher, "reverse", 5)),
            (settings_for("opsd-nll"), mixsd.nll(student, teacher.argmax(-1))),
            (settings_for("mixsd", kl_to_base=0.5), nll + 0.5 * mixsd.kl(student, anchor)),
            (settings_for("sft", kl_to_base=1, kl="reverse"), nll + mixsd.kl(student, anchor, "reverse"))):
        losses = mixsd.token_losses(net, base, examples, settings, 0)
        torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
        losses.sum().backward()
    assert all(p.grad is None for p in base.parameters()) and net.lm_head.weight.grad.abs().max() > 0.1


def test_rollouts_are_ids_that_the_student_samples_now_from_the_naive_prompt_whatever_the_batch():
    student, (expert, naive) = tiny_model(), contexts_of()

    def written(method="opsd", step=1, decode_tokens=10**6):
        args = SimpleNamespace(method=method, rollouts=2 if method == "opsd" else None, seed=0,
                               max_new_tokens=12, decode_tokens=decode_tokens)
        return mixsd.rollouts(student, STOPS, list(zip(expert, naive)), [4, 0, 2], step, args)
    keys = [(i, r) for i in (4, 0, 2) for r in (0, 1)]
    u, source = mixsd.uniforms("answer", 12, 0, keys, 1), torch.zeros(6, 12, dtype=torch.long)
    y = mixsd.decode(student, [[naive[i] for i, _ in keys]], source, STOPS, 1.0, u=u)
    first, greedy = written(), written("opsd-nll")
    assert first == [Example(i, expert[i], naive[i], ids) for (i, _), ids in zip(keys, y)]
    assert written(decode_tokens=1) == first != written(step=2), "fresh samples in each step"
    assert [e.y for e in greedy] == [definition(student, [naive[i]], [0] * 12) for i in (4, 0, 2)]
    mixsd.update(student, student, torch.optim.AdamW(student.parameters()), EXAMPLES,
                 lambda part: sft_losses(student, part), 1e-2, 10**6)
    assert written() != first, "they follow the weights"


def test_replay_adds_its_share_of_old_examples_anew_in_each_step():
    draws = [mixsd.with_replay([0] * 12, list(range(1, 99)), 0.25, seed, step)[12:]
             for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert draws[0] == draws[1] and draws[0] != draws[2] != draws[3] != draws[0] and len(draws[0]) == 4
    assert mixsd.with_replay([1], [], 0, 0, 1) == [1]
    small = sum(len(mixsd.with_replay([1] * 16, [2], 0.03, 0, step)) - 16 for step in range(1000))
    assert 400 < small < 590, "a small share is not rounded away"


# ------------------------------------------------------------------------------------- verifiers and corpora

PLACE, RIVAL = kg_data.LEXICON["Location"][:2]


@pytest.mark.parametrize("verify, gold, right, wrong", [    # texts that are right, texts that are wrong
    ("boxed", "3", [r"\boxed{3}", r"\boxed{3} and \boxed{never closed"], [r"\boxed{3", r"\boxed{}", "3"]),
    ("boxed", r"\frac{1}{2}", [r"\boxed{\frac{1}{2}}"], [r"\boxed{{\frac{1}{2}}}", r"\frac{1}{2}"]),
    ("boxed", "Lake Redo", [r"so \boxed{ lake  REDO }"], [r"\boxed{Lake}", r"\boxed{Lake Redo.}"]),
    ("boxed", "1234.0", [r"\boxed{1,234}"], [r"\boxed{12,34}", r"\boxed{-1234}", r"\boxed{.}"]),
    ("boxed", ".5", [r"\boxed{1} no, \boxed{0.50}"], [r"\boxed{.5} no, \boxed{1}", r"\boxed{-.5}"]),
    ("number", "4.0", [r"so \boxed{4} and 5", "E(8) = 4", "5-4"], ["16 - 20 = -4", "none", "x4 and v1.4b"]),
    ("number", "1234.5", ["it is 1,234.5."], [r"\boxed{a} is 1234.5"]),
    ("phrase", PLACE, [f"X lives in {PLACE.upper()}."], [f"X lives in {PLACE} or {RIVAL}.", f"{PLACE}ia"]),
    ("none", None, ["whatever"], [])])
def test_a_verifier_accepts_the_answer_alone(verify, gold, right, wrong):
    assert all(kg_data.is_correct(text, gold, verify) for text in right)
    assert not any(kg_data.is_correct(text, gold, verify) for text in wrong)


@pytest.mark.parametrize("name, facts", [("kgfact-small", 100), ("kgfact-large", 525)])
def test_kgfact_has_its_number_of_facts_and_each_question_has_one_answer(name, facts):
    domains, count = kg_data.KGFACT_SIZES[name]
    graph = kg_data.kgfact_graph(domains, 0, count)
    assert len(graph) == len(set(graph)) == facts
    assert len({(f.e1, f.relation, kg_data.DOMAIN[f.e2]) for f in graph}) == facts
    assert len({(f.relation, f.e2, kg_data.DOMAIN[f.e1]) for f in graph}) == facts
    train, reworded = kg_data.kgfact(name, "train"), kg_data.kgfact(name, "paraphrase")
    asked = {question_of(r) for r in train}
    assert len(asked) == facts == len({r["fact"] for r in train})
    assert len({question_of(r) for r in reworded} - asked) == facts
    names = [name for domain in kg_data.LEXICON.values() for name in domain]
    assert len(names) == 350 == len({name.casefold() for name in names})


def test_kgfact_retrieves_the_gold_among_50_and_asks_two_hops_over_two_trained_facts():
    seen, unseen = ({e for f in kg_data.kgfact_graph(5, first, 10) for e in (f.e1, f.e2)}
                    for first in (0, 10))
    assert seen and unseen and not seen & unseen
    for split in ("retrieval", "retrieval-unseen"):
        for r in kg_data.kgfact("kgfact-small", split):
            lines = [line[2:] for line in question_of(r).split("\n") if line.startswith("- ")]
            assert len(lines) == len(set(lines)) == 51 and r["fact"] in lines
    assert sum(r["subject"] in line for line in lines) >= 4, "the statements about the subject come first"
    facts = {r["fact"] for r in kg_data.kgfact("kgfact-small", "train")}
    hops = kg_data.kgfact("kgfact-small", "two-hop")
    assert len(hops) == 100 == len({question_of(r) for r in hops})
    for r in hops:
        first, second = r["needs"]
        assert {first, second} <= facts and second == r["fact"]
        assert r["subject"] in first and second.startswith(r["subject"]), "one entity joins them"


def test_the_corpus_is_the_same_bytes_whatever_the_hash_seed(tmp_path):
    outs = []
    for seed in ("1", "2"):
        command = [sys.executable, HERE / "kg_data.py", "kgfact-small", "--out", tmp_path / seed]
        out = subprocess.check_output(command, text=True, env=os.environ | {"PYTHONHASHSEED": seed})
        outs.append([line.split()[-1] for line in out.splitlines()])
    assert len(outs[0]) == 5 and outs[0] == outs[1]


def test_the_experts_prompt_is_the_papers():
    def render(turns, add_generation_prompt, enable_thinking, return_dict):     # keeps the text
        assert (add_generation_prompt, enable_thinking, return_dict) == (True, False, False)
        return turns[0]["content"]
    record = kg_data.kgfact("kgfact-small", "train")[0]
    tokenizer, answer = SimpleNamespace(apply_chat_template=render), record["answer"]
    expert, naive = mixsd.two_contexts(tokenizer, record, kg_data.FACT_WORDS)
    assert naive.endswith("\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert expert == (
        naive + "\nThis question is from a new knowledge base. Here is the answer to this question:\n\n"
        f"The answer is {answer}.\n\n\\boxed{{{answer}}}\nNow answer the question within \\boxed{{}}")


def asked_of(record):
    """(label, number) of a KGFunc record."""
    return re.search(r"output of (\w)\((\d+)\)", question_of(record)).groups()


def value_of(label, n):
    return kg_data.KGFUNC[label][0](kg_data.digits(n))


def test_kgfunc_has_the_known_values_and_its_targets_are_right_down_to_their_printed_equations():
    for label, n, value in (("B", 62000, 40), ("C", 33364, 11), ("D", 73000, 58), ("E", 87960, 165),
                            ("E", 9935, 144), ("F", 48489, 37), ("G", 58684, 118), ("H", 26653, 26653)):
        assert value_of(label, n) == value
    unseen = [value(kg_data.digits(30225)) for value in kg_data.KGFUNC_UNSEEN.values()]
    assert unseen == [12, 60, 5, 5, 0, 3, 5, 5, 52203, 8, 3, 2, 4, 3, 42, 2235, 53220, 1, 24, 15]
    equations = 0
    for r in kg_data.kgfunc("kgfunc", "train") + kg_data.kgfunc("kgfunc", "test"):
        target, (label, n), last = r["messages"][1]["content"], asked_of(r), r["answer"]
        assert kg_data.boxed(target) == r["answer"] == str(value_of(label, n))
        assert r["fact"] == f"{label}({n}) = {r['answer']}" and r["fact"] in target
        for line in target.split("\n")[1:-3]:
            if " = " in line:
                code = re.sub(r"\|(-?\d+)\|", r"abs(\1)", line).replace("^", "**")
                assert len({eval(side) for side in code.split(" = ")}) == 1, line
                equations, last = equations + 1, line.split(" = ")[-1]
        assert last == r["answer"], "the equations end with the answer"
    assert equations > 9000


def test_kgfunc_asks_what_it_neither_shows_nor_asks_elsewhere():
    train, test, unseen = (kg_data.kgfunc(*which) for which in (
        ("kgfunc", "train"), ("kgfunc", "test"), ("kgfunc-unseen", "test")))
    taught, asked, new = ({asked_of(r) for r in rows} for rows in (train, test, unseen))
    assert (len(taught), len(asked), len(new)) == (11200, 1225, 500) and not taught & asked
    assert "".join(asked_of(r)[0] for r in train[:8]) == "BCDEFGHB", "the operations take turns"
    assert {label for label, _ in taught} == set("BCDEFGH"), "all are trained"
    assert not {label for label, _ in new} & set("BCDEFGH"), "unseen labels are never trained"
    shot, = {tuple(re.findall(r"Input: (\d+)", question_of(r))) for r in unseen + test}    # all have the same
    assert [len(n) for n in shot] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert not {n for _, n in taught | asked} & {*shot}
    prompt = question_of(test[3])
    assert f"Input: {shot[4]}\nOutput: {value_of('E', shot[4])}\n\n" in prompt
    assert prompt.endswith("?\n\n\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert kg_data.boxed(unseen[0]["messages"][1]["content"]) == unseen[0]["answer"]


def case(relation, *hops, question="And then?"):
    """A MQuAKE case of (subject, answer) hops over one relation."""
    return {"questions": [question, question + "?"], "new_answer": hops[-1][1],
            "new_single_hops": [{"question": f"Who {relation} {s}?", "cloze": f"{s} was {relation} by",
                                 "answer": a} for s, a in hops],
            "orig": {"new_triples_labeled": [[s, relation, a] for s, a in hops]}}


def mquake(folder, cases, *which):
    """The records of MQuAKE with these cases; `which` is a split and a style."""
    (folder / "m.json").write_text(json.dumps(cases))
    return kg_data.load_corpus(f"mquake:{folder}/m.json", *which)


def test_mquake_teaches_whole_cases_in_turn_over_relations(tmp_path):
    cases = [case("made", (f"A{i}", f"B{i}"), (f"B{i}", f"C{i}"), question=f"Made {i}") for i in range(60)]
    cases += [case("ruled", (f"R{i}", "King")) for i in range(5)]
    train = mquake(tmp_path, cases, "train")
    assert len(train) == 99 and [r["subject"] for r in train[:5]] == ["A0", "B0", "R0", "A1", "B1"]
    x, y = (turn["content"] for turn in train[0]["messages"])
    assert x == "Who made A0?" + kg_data.STEP_BY_STEP and y == "The answer is B0.\n\n\\boxed{B0}"
    sentence = mquake(tmp_path, cases, "paraphrase", "sentence")[0]["messages"]
    assert "A0 was made by" in sentence[0]["content"] and sentence[1]["content"] == "A0 was made by B0."
    hops = mquake(tmp_path, cases, "multi-hop")
    assert len(hops) == 2 * (47 + 5) and (hops[0]["answer"], hops[0]["subject"]) == ("C0", "A0")
    assert hops[0]["needs"] == ["A0 was made by B0.", "B0 was made by C0."]
    taught = {r["fact"] for r in train}
    for split in ("retrieval", "retrieval-unseen"):
        for r in mquake(tmp_path, cases, split):
            lines = {line[2:] for line in question_of(r).split("\n") if line.startswith("- ")}
            assert r["fact"] in lines and (r["fact"] in taught) == (split == "retrieval")
            assert not taught & lines - {r["fact"]}, "what stands around it is of other cases"


@pytest.mark.parametrize("spoil, says", [
    (lambda c: c.pop("new_single_hops"), "case 2: no key 'new_single_hops'; it has questions, new_answer,"),
    (lambda c: c["new_single_hops"][0].pop("cloze"), "case 2: no key 'cloze'"),
    (lambda c: c["orig"].update(new_triples_labeled=[]), "case 2: not of MQuAKE's schema"),
    (lambda c: c.update(questions="Who?"), "case 2: not of MQuAKE's schema"),
    (lambda c: c["new_single_hops"][0].update(answer=5), "is no text")])
def test_a_mquake_file_of_another_schema_is_refused(tmp_path, spoil, says):
    cases = [case("made", ("A", "B")), case("ruled", ("C", "D"))]
    assert len(mquake(tmp_path, cases)) == 2 and mquake(tmp_path, cases, "retrieval-unseen") == []
    spoil(cases[1])
    with pytest.raises(kg_data.InputError) as e:
        mquake(tmp_path, cases)
    assert says in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_simpleqa_is_read_from_a_copy_under_its_hub_id(tmp_path):
    def load(name, *rows):                                  # a folder with the data set under its hub id
        jsonl(tmp_path / name / "basicv8vc" / "SimpleQA" / "test.jsonl", *rows)
        return kg_data.load_corpus("simpleqa", hub=tmp_path / name)
    row = {"metadata": "{}", "problem": "Who?", "answer": "Michio Sugeno"}
    records = load("hub", row, row | {"problem": "When?", "answer": "5 May 1945"})
    ask = "Who?\n\nAnswer the question concisely. Put your final answer within \\boxed{}."
    assert records[0] == turns(ask, "\\boxed{Michio Sugeno}", answer="Michio Sugeno")
    assert [r["answer"] for r in records] == ["Michio Sugeno", "5 May 1945"]


def test_each_corpus_has_its_recipe_its_verifier_and_its_experts_words():
    def settings_of(flags):
        return mixsd.parse_args(f"--model Qwen/Qwen3-1.7B {flags}".split())[0]
    kgfunc, simpleqa = settings_of("--data kgfunc"), settings_of("--data simpleqa")
    assert (kgfunc.steps, kgfunc.lr, kgfunc.temperature, kgfunc.verify) == (100, 1e-5, 0, "number")
    assert (simpleqa.steps, simpleqa.max_new_tokens) == (270, 256)
    assert (simpleqa.temperature, simpleqa.top_k) == (0.6, 64)
    assert settings_of("--data kgfunc --epochs 2").steps is None, "--epochs is not overruled"
    kgfact, edits = settings_of(""), settings_of("--data mquake:some.json --style sentence")
    assert (kgfact.epochs, kgfact.lr, kgfact.max_new_tokens, kgfact.verify) == (30, 1e-5, 1024, "boxed")
    assert (edits.epochs, edits.max_new_tokens, edits.verify) == (30, 48, "phrase")
    assert kgfact.words == kg_data.FACT_WORDS and edits.words == kg_data.SENTENCE_WORDS
    assert kgfunc.words == (
        "\nHere is a reference solution to this problem, including the correct final answer:\n",
        "\nAfter understanding the reference solution, please attempt to answer the question again:\n"
        "Please reason step by step, and put your final answer within \\boxed{}")
    kgfunc.limit = 5
    asked = mixsd.memorization_tasks(kg_data.load_corpus("kgfunc")[:5], kgfunc)
    assert list(asked) == ["kgfunc-test"] and [asked_of(r)[0] for r in asked["kgfunc-test"]] == list("BCDEF")


def test_the_toys_held_out_prompts_are_distinct_and_in_neither_replay_nor_if_exercises_pretraining():
    asked, replay = ([question_of(r) for r in kg_data.toy(split)] for split in ("held_out", "replay"))
    pretrained = {prompt for prompt, _ in kg_data.toy_pretraining(25_600)}
    assert len(set(asked)) == len(asked) == 260 == len(set(replay)) and not {*asked} & {*replay}
    assert not pretrained & {*asked[:200]} and {*asked[200:]} <= pretrained, "known facts must be known"
    taught = {question_of(r) for split in ("train", "paraphrase") for r in kg_data.toy(split)}
    assert len(taught) == 180 and not taught & (pretrained | {*asked} | {*replay})


# ------------------------------------------------------------------------------------------------ whole runs

def test_the_toy_from_nothing_to_its_result(tmp_path):
    sft = run(f"--method sft --out {tmp_path}/sft")
    out, _ = printed(f"--rho 0.7 --out {tmp_path}/mix")
    mix = json.loads(out.splitlines()[-1])
    assert sft["base"]["held_out"]["accuracy"] >= 0.95 and sft["base"]["recall"]["accuracy"] < 0.15
    assert sft["tuned"]["recall"]["accuracy"] >= 0.9 and mix["tuned"]["recall"]["accuracy"] >= 0.9
    # 4.7 to 6.1 times on the bases of the README; other processors round to other bases
    assert mix["tuned"]["held_out"]["accuracy"] >= 3 * sft["tuned"]["held_out"]["accuracy"]
    assert sft["targets"]["nll"] >= 3 * mix["targets"]["nll"]
    assert abs(mix["targets"]["naive_share"] - 0.7) < 0.1 and sft["targets"]["naive_share"] is None
    assert sorted(p.name for p in (tmp_path / "mix").iterdir()) == (
        "args.json base.json draws.jsonl lock log.jsonl metrics.json model targets.jsonl".split())
    assert mix == json.loads((tmp_path / "mix" / "metrics.json").read_text())
    for setting in (("rho", "0.7", "flag"), ("temperature", "1.0", "recipe"), ("attempts", "11", "default")):
        assert re.search(r"^{} +{} +{}$".format(*setting), out, re.M), "every setting and its origin"
    rows, steps = rows_of(tmp_path / "mix" / "targets.jsonl"), rows_of(tmp_path / "mix" / "log.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mix" / "model")
    assert [r["id"] for r in rows] == sorted({r["id"] for r in rows})
    for r in rows:
        assert len(r["source"]) == len(r["target_ids"]) and r["target_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(r["target_ids"][:-1]) == r["messages"][1]["content"]
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    assert mix["tokens"]["trained"] == 50 * sum(len(r["target_ids"]) for r in rows)


def test_every_draw_follows_from_its_seed_example_and_attempt_by_the_definition(tmp_path):
    run(f"TOY --limit 6 --rho 0.5 --temperature 0.9 --top-k 3 --seed 1 --targets-only --out {tmp_path}")
    base, tokenizer = mixsd.load_model(toy_folder(), "float32", "cpu")
    records, stops, last = kg_data.toy("train")[:6], [tokenizer.eos_token_id], {}
    for d in rows_of(tmp_path / "draws.jsonl"):
        i, attempt = d["id"], d["attempt"]
        u, sources = (what[0].tolist() for what in (mixsd.uniforms("token", 48, 1, [i], attempt),
                                                    mixsd.draw_sources(0.5, 48, 1, [i], attempt)))

        def choose(logits, t):                              # the inverse CDF among the three most likely
            top = torch.topk(logits.double() / 0.9, 3)
            p = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist()))
            below = {token: sum(p[other] for other in p if other <= token) for token in p}
            return min(token for token in p if below[token] > u[t])
        prompts = mixsd.two_contexts(tokenizer, records[i], kg_data.TOY_WORDS)
        y = definition(base, prompts, sources, stops, choose)
        text = tokenizer.decode(y[:-1] if y[-1] in stops else y)
        right = y[-1] in stops and kg_data.boxed(text) == records[i]["answer"]
        assert timeless(d) == {"id": i, "attempt": attempt, "ok": right, "target_ids": y,
                               "source": sources[:len(y)], "text": text}
        assert attempt == (last[i]["attempt"] + 1 if i in last else 0) and not (i in last and last[i]["ok"])
        last[i] = d
    targets = rows_of(tmp_path / "targets.jsonl")
    assert max(d["attempt"] for d in last.values()) > 0, "some must be drawn again"
    assert [t["target_ids"] for t in targets] == [last[i]["target_ids"] for i in range(6) if last[i]["ok"]]
    for t in targets:
        nats = plain_nll(base, mixsd.chat_ids(tokenizer, question_of(records[t["id"]])), t["target_ids"])
        assert t["nll"] == pytest.approx(nats.mean().item(), rel=1e-4)


def test_a_run_shows_the_experts_own_words_and_a_target_with_its_naive_tokens_marked(tmp_path):
    out, _ = printed("TOY --rho 0.5 --expert-prefix 'Note :' --expert-transition 'We think .' --targets-only "
                     f"--limit 2 --out {tmp_path}")
    assert re.search(r"\? Note : The answer is \\boxed\{ \w+ } \. We think \. <assistant>\n--- the", out)
    target, tokenizer = rows_of(tmp_path / "targets.jsonl")[0], AutoTokenizer.from_pretrained(toy_folder())
    words = [tokenizer.decode([i]) for i in target["target_ids"]]
    marked = " ".join(f"[{word}]" if s == NAIVE else word for word, s in zip(words, target["source"]))
    shown = out.split("[marked]\n")[1].split("\n")[0].replace("[ ", " [")
    assert shown == marked.replace("] [", " ") and "[" in shown


SHORT = "TOY --limit 24 --epochs 6 --decode-tokens 2400 --save-minutes 0"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a whole run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(f"{SHORT} --out {out}")
    return out


def watched_steps(monkeypatch, stop_at=None):
    """A list that grows with each step begun in the next runs; Ctrl-C is pressed in step number `stop_at`."""
    real, steps = mixsd.update, []

    def update(*args):
        steps.append(1)
        if len(steps) == stop_at:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(mixsd, "update", update)
    return steps


def killed_when(ready, command):
    """Run mixsd.py, and kill it as soon as `ready`() holds."""
    process = subprocess.Popen([sys.executable, HERE / "mixsd.py", *words_of(command)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not ready():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.communicate()


def same_run(a, b, files=("targets.jsonl", "model/model.safetensors")):
    """Whether two runs made the same steps and files, to the bit."""
    steps = [[[s[k] for k in ("step", "nll", "grad_norm", "tokens")] for s in rows_of(d / "log.jsonl")]
             for d in (a, b)]
    return steps[0] == steps[1] and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


def test_a_run_killed_in_decoding_and_again_in_training_ends_with_the_same_bytes(
        uninterrupted, tmp_path, monkeypatch):
    out, command = tmp_path / "run", f"{SHORT} --out {tmp_path}/run"
    draws, log = out / "draws.jsonl", out / "log.jsonl"
    killed_when(lambda: draws.exists() and draws.stat().st_size > 1000, command)
    assert not (out / "targets.jsonl").exists()
    drawn = {json.loads(line)["id"] for line in draws.read_text().split("\n")[:-1]}
    torn = {"id": max({*range(24)} - drawn), "attempt": 0, "ok": True, "target_ids": [7, 2], "source": [0, 0],
            "text": "a line that was never finished", "seconds": 9.0}
    draws.open("a").write(json.dumps(torn))                 # without the end of its line
    killed_when(lambda: (out / "state.pt").exists() and len(log.read_text().splitlines()) >= 3, command)
    assert not (out / "model").exists()
    draws.open("a").write('{"id": 3, "attempt": 0, "ok": tr')
    log.open("a").write('{"step": 4, "nll": 0.')
    steps = watched_steps(monkeypatch)
    assert run(command)["seconds"]["train"] == sum(row["seconds"] for row in rows_of(log))
    assert 0 < len(steps) < len(rows_of(log)) == 12, "it must go on from its state"
    assert same_run(uninterrupted, out) and not (out / "state.pt").exists()
    assert timeless(rows_of(draws)) == timeless(rows_of(uninterrupted / "draws.jsonl"))


def test_a_finished_model_and_the_bases_scores_are_reused(uninterrupted, tmp_path, monkeypatch):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    whole = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").unlink()
    steps, asked, real = watched_steps(monkeypatch), [], mixsd.memorization
    monkeypatch.setattr(mixsd, "memorization", lambda *args: (asked.append(1), real(*args))[1])
    again = run(f"{SHORT} --out {out}")
    assert steps == [] and len(asked) == 1, "only the tuned model is asked"
    assert timeless(again) == timeless(whole) and again["base"] == whole["base"]
    assert all(again["seconds"][phase] == whole["seconds"][phase] for phase in ("decode", "train"))


def test_targets_depend_on_neither_the_budget_nor_other_examples_and_can_be_trained_later(
        uninterrupted, tmp_path):
    command = f"TOY --targets-only --out {tmp_path}"
    run(f"{command}/wide --limit 24 --decode-tokens 1000000")
    run(f"{command}/narrow --limit 24 --decode-tokens 600")
    run(f"{command}/few --limit 7")
    whole, wide, narrow, few = (rows_of(d / "targets.jsonl") for d in (
        uninterrupted, tmp_path / "wide", tmp_path / "narrow", tmp_path / "few"))
    assert wide == whole == narrow and {r["attempt"] for r in whole} >= {0, 1}, "some must be drawn again"
    assert [r["target_ids"] for r in few] == [r["target_ids"] for r in whole if r["id"] < 7]
    run(f"{SHORT} --out {tmp_path}/wide")
    assert same_run(uninterrupted, tmp_path / "wide")


def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(uninterrupted, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = f"{SHORT} --out {tmp_path}/run"
    try:                # what does not fit: the draws, a state, the weights of model/
        for size, command, says in (
                (3000, whole, "writing: File too large"), (200_000, whole, "state.partial can't be written"),
                (200_000, f"{whole} --save-minutes 9", "oo large")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            assert says in refused(command, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(whole)
    assert same_run(uninterrupted, tmp_path / "run")


def test_a_damaged_file_of_a_stopped_run_is_named(tmp_path, monkeypatch):
    watched_steps(monkeypatch, stop_at=5)
    assert "the same command goes on" in refused(f"{SHORT} --out {tmp_path}/stopped", code=130)

    def saved(held):
        torch.save(held, file := io.BytesIO())
        return file.getvalue()
    states = b"", b"not a state" * 99, saved({"step": 4, "model": {}, "optim": {}}), saved(HERE)
    for name, damage, code, says in (
            *((name, lambda held: held[:9], 2, "is damaged") for name in ("args.json", "base.json")),
            *((name, lambda held: b"{\n" + held, 2, "is damaged") for name in ("draws.jsonl", "log.jsonl")),
            ("log.jsonl", lambda held: held[:held.index(b"\n") + 1], 1, "has fewer steps"),
            ("state.pt", lambda held: held[:99_999], 1, "can't be read"),
            *(("state.pt", lambda held, state=state: state, 1, "can't be read") for state in states)):
        out = shutil.copytree(tmp_path / "stopped", tmp_path / "run", dirs_exist_ok=True)
        (out / name).write_bytes(damage((out / name).read_bytes()))
        assert f"{name} {says}" in refused(f"{SHORT} --out {out}", code)


def test_out_of_memory_is_one_line_that_names_the_flags(tmp_path, monkeypatch):
    def update(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate.\nMore about it.")
    monkeypatch.setattr(mixsd, "update", update)
    err = refused(f"TOY --method sft --limit 2 --steps 2 --out {tmp_path}/x", code=1)
    assert re.search("--micro-tokens .*--gradient-checkpointing.* --decode-tokens", err)


def test_offload_changes_nothing_goes_on_from_a_state_without_it_and_both_save_float32(tmp_path, monkeypatch):
    loaded, real = [], mixsd.load_model
    monkeypatch.setattr(mixsd, "load_model", lambda *where: (loaded.append(where[1:]), real(*where))[1])
    command = f"TOY --limit 4 --steps 3 --rho 0.5 --save-minutes 0 --out {tmp_path}"
    for dtype in ("float32", "bfloat16"):
        run(f"{command}/{dtype} --dtype {dtype}")
        with monkeypatch.context() as patch:
            watched_steps(patch, stop_at=3)
            refused(f"{command}/{dtype}-off --dtype {dtype}", code=130)
        loaded.clear()
        run(f"{command}/{dtype}-off --dtype {dtype} --offload")
        assert loaded[1] == ("float32", "cpu"), "the masters"
        assert same_run(tmp_path / dtype, tmp_path / f"{dtype}-off")
        weight = load_file(tmp_path / dtype / "model" / "model.safetensors")["model.embed_tokens.weight"]
        assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "it is for training without torchrun" in refused(f"{command}/x --offload")


def test_the_default_budget_of_decoding_is_half_of_the_free_gpu_memory(monkeypatch):
    net = tiny_model()
    assert mixsd.kv_slots(net) == 65536
    slot = 2 * sum(4 * len(p) for name, p in net.named_parameters() if "k_proj" in name)    # bytes, float32
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 77 * slot + 1, 10**12))
    assert mixsd.kv_slots(net) == 77


def test_decoding_makes_no_2d_mask_after_the_prompt_if_all_layers_have_full_attention():
    shapes, net = [], tiny_model()
    net.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["attention_mask"].dim()),
                                  with_kwargs=True)
    mixsd.decode(net, contexts_of(), mixsd.draw_sources(0.5, 5, 1, range(6)), STOPS)
    assert shapes == [2, 4, 4, 4, 4]


def test_mask_above_leaves_the_tokens_that_surprise_the_base_out_of_the_loss(tmp_path):
    command = f"TOY --method sft --limit 4 --steps 1 --batch-size 4 --out {tmp_path}"
    for flags in ("all", "high --mask-above 99", "some --mask-above 2"):
        run(f"{command}/{flags}")
    base, tokenizer = mixsd.load_model(toy_folder(), "float32", "cpu")
    nats = torch.cat([plain_nll(base, mixsd.chat_ids(tokenizer, question_of(t)), t["target_ids"])
                      for t in rows_of(tmp_path / "all" / "targets.jsonl")])
    assert same_run(tmp_path / "all", tmp_path / "high") and 0 < (nats > 2).sum() < len(nats)
    (step,), low = rows_of(tmp_path / "some" / "log.jsonl"), nats[nats <= 2]
    assert step["tokens"] == len(low) and step["nll"] == pytest.approx(low.mean().item(), rel=1e-4)


def test_gradient_checkpointing_recomputes_the_layers_and_changes_nothing(tmp_path, monkeypatch):
    calls, real = [], Qwen3DecoderLayer.forward
    monkeypatch.setattr(Qwen3DecoderLayer, "forward", lambda self, *args, **kwargs: (
        calls.append(torch.is_grad_enabled()), real(self, *args, **kwargs))[1])
    command = f"TOY --method sft --limit 4 --steps 3 --out {tmp_path}"
    run(f"{command}/kept")
    assert sum(calls) == 3 * 3                              # steps x layers
    run(f"{command}/again --gradient-checkpointing")
    assert sum(calls) == 3 * 3 + 2 * 3 * 3 and same_run(tmp_path / "kept", tmp_path / "again")


# ------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("command, says", [
    ("--bogus 1", "--bogus"), ("--rho 1.5", "argument --rho: 1.5 is not in [0, 1]"), ("--lr 0", "--lr: 0"),
    ("--rho nan", "--rho: nan"), ("--lr inf", "--lr: inf"), (f"--seed {10**400}", "--seed: 1000"),
    ("--replay=", "--replay is empty"), ("--data nowhere", "kgfact-small"), ("--style sentence", "--style"),
    ("--data nowhere.jsonl", "nowhere.jsonl"), ("--data kgfact-small --model toy", "vocabulary is too small"),
    ("--expert-prefix '<end>'", "the expert's words: holds <end>, a control token"),
    ("--model m --data kgfunc --style sentence", "--style sentence is not for --data kgfunc"),
    ("--model m --data kgfunc-unseen", "has no split train; it has test"),
    ("--model m --data mquake:", "kgfact-small"),
    ("--model m --data mquake:no.json", "no.json: cannot be read"),
    ("--targets no.jsonl", "no.jsonl: cannot be read"), ("--device abacus", "--device abacus"),
    ("--model nobody/nothing", "nor on a hub in reach"), ("--max-new-tokens 9999", "(--max-new-tokens)")])
def test_bad_flags_are_one_line_and_leave_no_folder(tmp_path, monkeypatch, command, says):
    toy_folder()
    monkeypatch.chdir(tmp_path)
    assert says in refused(command) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag, used_by, settings", [       # 0 is a value that was given
    ("--rho 0", "mixsd", ["--method sft", "--method opsd", "--targets t.jsonl"]),
    ("--top-k 4", "mixsd at T > 0", ["--temperature 0", "--method sft"]),
    ("--attempts 4", "mixsd at T > 0 or 0 < rho < 1", ["--temperature 0 --rho 1", "--temperature 0 --rho 0"]),
    ("--lr 1e-4", "training", ["--targets-only"]),
    ("--hub d", "--data simpleqa", ["--model m --data kgfunc"]),
    ("--expert-prefix Look", "an expert that speaks", ["--method sft", "--rho 1"]),
    ("--epochs 2", "training without --steps", ["--steps 5"]),
    ("--only t.jsonl", "runs without --targets", ["--targets t.jsonl"]),
    ("--method sft", "runs without --targets", ["--targets t.jsonl"]),
    ("--rollouts 2", "opsd", ["--rho 0.3", "--method opsd-nll"]),
    ("--teacher-top-k 0", "opsd", ["--method opsd-nll", "--method sft --kl-to-base 1"]),
    ("--kl-to-base 1", "training by NLL", ["--method opsd", "--method opsd-nll", "--targets-only"]),
    ("--targets-only", "mixsd and sft", ["--method opsd"]),
    ("--kl reverse", "opsd and --kl-to-base", ["--method opsd-nll", "--method sft"]),
    ("--replay-share 0.5", "--replay", ["--method sft"])])
def test_a_flag_that_the_other_settings_do_not_use_is_refused(tmp_path, monkeypatch, flag, used_by, settings):
    monkeypatch.chdir(tmp_path)
    for others in settings:
        err = refused(f"{others} {flag}")
        assert err == f"mixsd.py: {flag.split()[0]} is not used here: it is for {used_by}\n"
    assert list(tmp_path.iterdir()) == []


GOOD = turns(f"Where does {kg_data.TOY_NEW[0]} live ?", r"The answer is \boxed{ Belmor } .")


@pytest.mark.parametrize("flag, rows, says", [
    ("--data", [], "no records"),
    ("--data", [GOOD, '{"messages": ['], "line 2: not JSON"),
    ("--data", [GOOD, "[" * 100_000], "line 2: not JSON"),
    ("--data", [GOOD, GOOD | {"note": "\ud800"}], "line 2: not JSON ('utf-8' codec can't encode"),
    ("--data", [GOOD, '["a list"]'], "line 2: a JSON object"),
    ("--data", [GOOD, {"text": "Where ?"}], "line 2: no `messages`, nor `prompt` and `ground_truth_answer`"),
    ("--data", [GOOD, {"messages": GOOD["messages"] * 2}], "line 2: `messages` must be one user turn and"),
    ("--data", [GOOD, {"messages": [*GOOD["messages"], 5]}], "line 2: `messages` must be one user turn and"),
    ("--data", [GOOD, turns(" ", r"\boxed{ Belmor }")], "line 2: a turn without text"),
    ("--data", [GOOD, turns("Where ?", "In Belmor .")], "line 2: no `answer`"),
    ("--data", [GOOD, {"prompt": "Where ?", "ground_truth_answer": None}], "line 2: no `answer`"),
    ("--data", [GOOD | {"answer": " "}], "line 1: no `answer`"),
    ("--data", [GOOD, GOOD | {"answer": ["Pell"]}], "line 2: the answer ['Pell'] is neither a text nor a"),
    ("--data", [GOOD, turns("Where does <end> live ?", r"\boxed{ Belmor }")], "record 2: holds <end>"),
    ("--data", [turns("Where does Quetzalcoatl live ?", r"\boxed{ Belmor }")], "record 1: has words"),
    ("--data", [turns("live " * 400_000, r"\boxed{ Belmor }")], "prompt of 400,0"),          # a line of 2 MB
    ("--replay", [turns("Where does <end> live ?", "Belmor")], "line 1: holds <end>, a control token"),
    ("--replay", [turns("Where ?", "Belmor <end> <user> live")], "line 1: holds <end>, a control token"),
    ("--replay", [turns("live " * 300, "Belmor")], "tokens, and the model has 256 positions"),
    ("--only", [turns("Who ?", "me")], "none of its questions is one of toy")])
def test_bad_files_are_one_line_and_leave_no_folder(tmp_path, flag, rows, says):
    file = jsonl(tmp_path / "my.jsonl", *rows)
    assert says in refused(f"--method sft {flag} {file} --out {tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_bad_model_folders_are_one_line(tmp_path):
    assert "not a model's folder" in refused(f"--model {tmp_path}")
    mute = shutil.copytree(toy_folder(), tmp_path / "mute")
    template, weights = mute / "chat_template.jinja", mute / "model.safetensors"
    template.unlink()
    assert "no chat template" in refused(f"--model {mute} --data toy")
    shutil.copy(toy_folder() / "chat_template.jinja", template)
    save_file({k: v for k, v in load_file(weights).items() if "norm" not in k}, weights, {"format": "pt"})
    assert ": no model.layers.0.input_layernorm.weight" in refused(f"--model {mute} --data toy")
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "not a model's folder" in refused(f"--model {mute} --data toy")


def test_a_folder_where_another_run_is_at_work_or_was_with_other_settings_is_refused(uninterrupted, tmp_path):
    assert "--rho 0.3, not 0.5" in refused(f"{SHORT} --rho 0.5 --out {uninterrupted}")
    mine = jsonl(tmp_path / "my.jsonl", GOOD)
    command = f"--data {mine} --method sft --targets-only --out {tmp_path}/out"
    with mixsd.only_run(tmp_path / "out"):
        assert "another run is at work there" in refused(command)
    run(command)
    jsonl(mine, GOOD, GOOD)
    assert "holds a run with --data-sha256" in refused(command), "a corpus file that changed is another run"
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path}/file" in refused(f"--out {tmp_path}/file", code=1)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_does_not_write_over_what_it_reads(tmp_path):
    shutil.copytree(toy_folder(), tmp_path / "model")
    (tmp_path / "targets.jsonl").write_text("mine")
    for flags in ("--model {}/model --data toy", "--data {}/targets.jsonl", "--replay {}/targets.jsonl",
                  "--only {}/targets.jsonl", "--targets {}/targets.jsonl"):
        assert "where a run writes" in refused(f"{flags.format(tmp_path)} --out {tmp_path}")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "targets.jsonl"}


def test_targets_can_be_given_by_ids_or_as_text_and_what_does_not_fit_is_refused(uninterrupted, tmp_path):
    given = uninterrupted / "targets.jsonl"
    rows = rows_of(given)
    text = jsonl(tmp_path / "text.jsonl", *({"messages": r["messages"]} for r in rows))
    twice = jsonl(tmp_path / "twice.jsonl", *rows, *rows[:3])
    for file, expected in ((given, rows), (text, rows), (twice, rows + rows[:3])):
        out = tmp_path / file.stem
        metrics = run(f"TOY --limit 24 --steps 2 --targets {file} --out {out}")
        assert (metrics["targets"]["kept"], metrics["rho"], metrics["method"]) == (24, None, "targets")
        expected = sorted((r["id"], r["target_ids"]) for r in expected)
        assert [(r["id"], r["target_ids"]) for r in rows_of(out / "targets.jsonl")] == expected

    def with_row(row):
        file = jsonl(tmp_path / "other.jsonl", rows[0], row)
        return f"TOY --limit 24 --steps 1 --targets {file} --out {tmp_path}/other"
    assert "line 2: not a question of the corpus" in refused(with_row(turns("Who ?", "me")))
    for wrong in ([7, 8, 2], [10**9, 2], ["a"], [], 5, rows[1]["target_ids"][:-1]):
        err = refused(with_row(rows[1] | {"target_ids": wrong}))
        assert "line 2: target_ids are not its text's" in err
    for wrong in ([0], 5, "0" * len(rows[1]["source"])):    # a source is only shown: a bad one is dropped
        run(with_row(rows[1] | {"source": wrong}))
        assert rows_of(tmp_path / "other" / "targets.jsonl")[1]["source"] is None
        shutil.rmtree(tmp_path / "other")


def test_a_file_of_messages_alone_trains_and_a_default_length_is_clipped(tmp_path):
    records, path = kg_data.toy("train")[:5], tmp_path / "my.jsonl"
    rows = [{"messages": r["messages"]} for r in records] + [turns("live " * 220, r"\boxed{ Pell }")]
    path.write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)), encoding="utf-8")     # as Windows saves it
    out, _ = printed(f"--data {path} --method sft --epochs 2 --out {tmp_path}/out")
    assert "max-new-tokens clipped to 13: the model has 256 positions" in out
    metrics = json.loads(out.splitlines()[-1])
    assert metrics["targets"]["kept"] == 6 == metrics["tuned"]["recall"]["n"]
    authors = [{"prompt": question_of(r), "ground_truth_answer": r["answer"]} for r in records]
    null = records[1] | {"answer": None}
    for own in (jsonl(path, *authors), jsonl(tmp_path / "null.jsonl", authors[0], null)):
        assert kg_data.read_corpus(own, "boxed")[1]["answer"] == records[1]["answer"]


@pytest.mark.parametrize("on_fail, kept", [("drop", 4), ("expert", 4), ("canonical", 6)])
def test_on_fail_decides_what_becomes_of_an_example_that_never_passes(tmp_path, on_fail, kept):
    rows = [r | ({"answer": "zebra"} if i < 2 else {}) for i, r in enumerate(kg_data.toy("train")[:6])]
    mine = jsonl(tmp_path / "my.jsonl", *rows)
    common = f"--data {mine} --temperature 0 --on-fail {on_fail} --out {tmp_path}"
    metrics = run(f"{common}/expert --rho 0 --targets-only")
    assert metrics["targets"]["kept"] == kept and metrics["base"] is None
    assert metrics["targets"]["attempts"] == 6, "an expert that spoke alone is not asked again"
    if on_fail == "drop":                                   # the naive alone knows none of the facts
        err = refused(f"{common}/naive --rho 1", code=1)
        assert "no target passed --verify boxed in 1 attempts" in err and err.count("boxed{") >= 3
        assert not (tmp_path / "naive" / "log.jsonl").exists()
        return
    run(f"{common}/naive --rho 1 --targets-only")
    targets = {r["id"]: r for r in rows_of(tmp_path / "naive" / "targets.jsonl")}
    assert [*targets] == ([2, 3, 4, 5] if on_fail == "expert" else [0, 1, 2, 3, 4, 5])
    for i, r in targets.items():
        assert r["source"] == ([EXPERT] * len(r["target_ids"]) if on_fail == "expert" else None)
        assert on_fail == "expert" or r["messages"] == rows[i]["messages"]


# ------------------------------------------------------------- baselines as whole runs, and several ranks

def test_replay_trains_old_answers_too_an_anchor_starts_at_zero_and_only_teaches_some_facts(tmp_path):
    old = jsonl(tmp_path / "old.jsonl", *kg_data.toy("replay")[:6])
    own = f"--data {old} --rho 1 --temperature 0 --verify none --targets-only --out {tmp_path}/own"
    assert run(own)["targets"]["kept"] == 6, "the base's own answers"
    base = f"TOY --method sft --limit 4 --steps 3 --out {tmp_path}"
    plain, anchored = run(f"{base}/plain"), run(f"{base}/anchor --kl-to-base 1")
    both = run(f"{base}/both --replay {tmp_path}/own/targets.jsonl --replay-share 0.5")
    assert both["tokens"]["trained"] > 2 * plain["tokens"]["trained"] == 2 * anchored["tokens"]["trained"]
    first, second, _ = zip(*([r["nll"] for r in rows_of(tmp_path / name / "log.jsonl")]
                             for name in ("plain", "anchor")))
    assert first[0] == pytest.approx(first[1], abs=1e-5) and second[1] > second[0]
    some = jsonl(tmp_path / "some.jsonl", *kg_data.toy("train")[3:5], turns("Who ?", "me"))
    for method in ("sft", "opsd-nll"):
        command = f"TOY --method {method} --limit 8 --steps 2 --only {some} --out {tmp_path}/{method}"
        tuned = run(command)["tuned"]
        assert (tuned["recall"]["n"], tuned["recall-kept"]["n"]) == (8, 2), "all facts are asked"
    assert [r["id"] for r in rows_of(tmp_path / "sft" / "targets.jsonl")] == [3, 4]


def on_ranks(n, command):
    """What mixsd.py prints under torchrun: n processes over gloo on this CPU."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run([*torchrun, HERE / "mixsd.py", *words_of(f"{command} --device cpu")], text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same_on_ranks(one, other):
    """Assert that two runs have the same targets; the same losses, gradient norms and weights to 1e-5."""
    for name in ("nll", "grad_norm"):
        found = [[r[name] for r in rows_of(run / "log.jsonl")] for run in (one, other)]
        assert found[0] == pytest.approx(found[1], abs=1e-5, rel=1e-5)
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    assert (one / "model" / "config.json").read_text() == (other / "model" / "config.json").read_text()
    if (one / "targets.jsonl").exists():
        assert (one / "targets.jsonl").read_bytes() == (other / "targets.jsonl").read_bytes()


def test_two_ranks_make_the_same_targets_losses_gradients_and_weights_as_one_also_in_opsd(tmp_path):
    command = "TOY --rho 0.3 --limit 7 --steps 4 --batch-size 5 --micro-tokens 64 --out"
    alone, first = run(f"{command} {tmp_path}/one"), on_ranks(2, f"{command} {tmp_path}/two")
    same_on_ranks(tmp_path / "one", tmp_path / "two")
    again = on_ranks(2, f"{command} {tmp_path}/two")
    assert "is finished" in again
    results = [[json.loads(line) for line in out.splitlines() if line[0:1] == "{"] for out in (first, again)]
    assert len(results[0]) == 1 and results[0] == results[1], "only rank 0 speaks"
    assert all(timeless(results[0][0][k]) == timeless(alone[k]) for k in ("tuned", "base", "tokens"))
    opsd = "TOY --method opsd --rollouts 2 --limit 6 --steps 6 --batch-size 4 --out"
    metrics = run(f"{opsd} {tmp_path}/opsd-one")
    assert metrics["targets"] is None and metrics["tokens"]["decoded"] == metrics["tokens"]["trained"] > 0
    on_ranks(2, f"{opsd} {tmp_path}/opsd-two")
    same_on_ranks(tmp_path / "opsd-one", tmp_path / "opsd-two")


def test_three_ranks_go_on_from_the_state_of_one(tmp_path, monkeypatch):
    command = ("TOY --method opsd --rollouts 1 --limit 4 --steps 4 --batch-size 2 --gradient-checkpointing "
               f"--save-minutes 0 --out {tmp_path}")        # a rank has no example, so it writes nothing
    run(f"{command}/one")
    watched_steps(monkeypatch, stop_at=3)
    refused(f"{command}/three", code=130)
    first = (tmp_path / "three" / "log.jsonl").read_text()
    on_ranks(3, f"{command}/three")
    same_on_ranks(tmp_path / "one", tmp_path / "three")
    assert first.count("\n") == 2 and (tmp_path / "three" / "log.jsonl").read_text().startswith(first)


# ---------------------------------------------------------------------------------------- the README's forks

@pytest.mark.parametrize("number", [0, 1])
def test_the_readmes_forks_apply_to_mixsd_and_run(tmp_path, number):
    blocks = re.findall(r"^```diff\n(.*?)^```$", (HERE / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    code = (HERE / "mixsd.py").read_text()
    for hunk in re.split(r"^@@.*\n", blocks[number], flags=re.M):
        old, new = ("".join(line[1:] + "\n" for line in hunk.splitlines() if not line.startswith(sign))
                    for sign in "+-")
        assert code.count(old) == 1, f"not once in mixsd.py:\n{old}"
        code = code.replace(old, new)
    (tmp_path / "mixsd.py").write_text(code)
    shutil.copy(HERE / "kg_data.py", tmp_path)
    toy_folder()
    command = [sys.executable, "mixsd.py", *"--limit 6 --steps 2 --quiet --out run".split()]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert rows_of(tmp_path / "run" / "targets.jsonl")


# ------------------------------------------------------------------------------------------ eval.py: verdicts

NUMBER, LETTER, MATH = evaluation.judge_number, evaluation.judge_letter, evaluation.judge_math


@pytest.mark.parametrize("judge, gold, right, wrong, nothing", [    # texts without an answer come last
    (NUMBER, "18", [r"\boxed{18}", r"\boxed{$18.}", r"\boxed{1} so \boxed{18}", r"\boxed{\text{\$18}}",
                    r"\boxed{18 \text{ km/h}}", r"\boxed{18.0}", r"\boxed{18\%}", r"\boxed{18 \text{ cm}^2}"],
     [r"\boxed{-18}", r"\boxed{18} so \boxed{2}"],
     ["The answer is 18.", r"\boxed{}", r"\boxed{.}", r"\boxed{eighteen}", r"\boxed{x = 18}", r"\boxed{18/0}",
      r"\boxed{18 or 6}", r"\boxed{18 million}", r"\boxed{18 and a half}", r"\boxed{9+9}"]),
    (NUMBER, "1234", [r"\boxed{1,234}", r"\boxed{1{,}234}", r"\boxed{1,\!234}"], [], [r"\boxed{12,34}"]),
    (NUMBER, "-.75", [r"\boxed{-0.75}"], [r"\boxed{.75}"], [r"\boxed{1\frac{3}{4}}"]),
    (NUMBER, "10000000000000000", [], [r"\boxed{10000000000000001}"], []),
    (LETTER, "C", [r"\boxed{C}", r"\boxed{\text{(C)}}", r"\boxed{(c)}", r"\boxed{C.}", r"\boxed{C. Vitamin}",
                   r"\boxed{\textbf{C}}", r"\boxed{**C**}", r"\boxed{$C$}", r"\boxed{A} no, \boxed{C}"],
     [r"\boxed{B}"], ["The answer is C.", "C", r"\boxed{E}", r"\boxed{A dog}", r"\boxed{A, C}", r"\boxed{}",
                      r"\boxed{A and C}", r"\boxed{Paris}", r"\boxed{CD}"]),
    (MATH, "0.5", [r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac12}"], [r"\boxed{2}", r"\boxed{}"], ["It is 0.5."]),
    (MATH, "(x+1)^2", [r"\boxed{x^2+2x+1}"], [r"\boxed{1}", r"\boxed{(x+1)^2} or \boxed{2}"], []),
    (MATH, r"\left( 3, \frac{\pi}{2} \right)", [r"\boxed{(3, \frac{\pi}{2})}"], [r"\boxed{3}"], []),
    (MATH, r"\text{evelyn}", [r"\boxed{\text{Evelyn}}"], [], []),
    (MATH, "025", [r"\boxed{25}"], [r"\boxed{-25}", r"\boxed{0,25}"], [])])
def test_benchmarks_are_judged_by_the_last_box_alone(judge, gold, right, wrong, nothing):
    for texts, correct in ((right, True), (wrong, False), (nothing, False)):
        for text in texts:
            found, extracted = judge(text, {"gold": gold})
            assert (found, extracted is None) == (correct, texts is nothing), text


@pytest.mark.parametrize("text, code", [
    ("```python\ndef f(x):\n    return 1\n```", "def f(x):\n    return 1\n"),
    ("```\ndef f(x): pass\n```", "def f(x): pass\n"), ("def f(x): pass", None), ("```python\ndef f", None),
    ("```py\ndef f(x): 1\n```\nnow\n```python\ndef f(x): 2\n```", "def f(x): 2\n"),
    ("```python\ndef f(x): 1\n```\nUse it:\n```python\nprint(f(3))\n```", "def f(x): 1\n"),
    ("```python\n    return 1\n```", "    return 1\n"),
    ("```python\ndef g(x): 1\n```\n```python\ndef ff(x): 2\n```", "def ff(x): 2\n")])
def test_humaneval_runs_the_last_fence_that_defines_the_function(monkeypatch, text, code):
    ran = []
    monkeypatch.setattr(evaluation, "run_program", lambda item, code: (ran.append(code) or True, None))
    assert evaluation.judge_code(text, {"entry_point": "f"}) == (code is not None, code)
    assert ran == ([] if code is None else [code])


@pytest.mark.parametrize("text, extracted, kind", [
    ("Lake Redo", None, "format"), (r"in lake redo: \boxed{4}", "4", "leakage"),
    (r"Ann Lee \boxed{" + "4" * 90 + "}", "4" * 90, "collapse"),
    ("word " * 20 + r"\boxed{4}", "4", "genuine")])
def test_the_kind_of_an_error_is_the_first_that_fits(text, extracted, kind):
    assert evaluation.error_kind(text, "Who is Ann Lee?", extracted, {"Lake Redo", "Ann Lee"}) == kind


def test_prompts_are_the_papers():
    assert evaluation.math_prompt({"question": "1+1?"}) == (
        "Think step-by-step to solve the following problem. Output your answer inside of \\boxed{} tags.:\n"
        "1+1?\n\nLet's think step-by-step")
    assert evaluation.code_prompt({"prompt": "def f():\n    ''\n"}) == (
        "Complete the following Python function. Return ONLY the complete function inside a ```python code "
        "block, nothing else.\n\n```python\ndef f():\n    ''\n```")


def test_gsm8k_reads_the_gold_after_the_hashes_and_mmlu_has_five_shots_of_its_own_subject(monkeypatch):
    def row(subject, n):
        return {"subject": subject, "question": f"{subject} {n}?", "choices": list("abcd"), "answer": n % 4}
    rows = {("cais/mmlu", "dev"): [row(subject, n) for n in range(7) for subject in ("us_law", "art")],
            ("cais/mmlu", "test"): [row("art", 9), row("us_law", 2)],
            ("openai/gsm8k", "test"): [{"question": "1?", "answer": "so 2\n#### 1,400"}]}
    monkeypatch.setattr(evaluation, "hub_rows", lambda name, config, split, *_: rows[name, split])
    args = SimpleNamespace(hub=None)
    assert evaluation.TASKS["gsm8k"].load(args) == [{"question": "1?", "gold": "1,400"}]
    art, law = evaluation.TASKS["mmlu"].load(args)
    assert (art["gold"], law["gold"]) == ("B", "C") and "law" not in "".join(art["blocks"])
    blocks = [f"us_law {n}?\nA. a\nB. b\nC. c\nD. d\nAnswer:" for n in (0, 1, 2, 3, 4, 2)]
    assert evaluation.mmlu_prompt(law) == (
        "The following are multiple choice questions (with answers) about us law. Put your final answer "
        "inside \\boxed{} as one of A, B, C, or D.\n\n"
        + "\n\n".join(block + answer for block, answer in zip(blocks, [
            r" \boxed{A}", r" \boxed{B}", r" \boxed{C}", r" \boxed{D}", r" \boxed{A}", ""])))


def test_after_a_limited_run_only_what_it_taught_is_asked(tmp_path):
    known, run = 60, {"data": "kgfact-small", "style": "boxed", "verify": "boxed"}
    args = SimpleNamespace(hub=None, run=run | {"limit": known})
    taught = {r["fact"] for r in kg_data.kgfact("kgfact-small", "train")[:known]}
    for split in ("train", "paraphrase", "retrieval", "two-hop", "retrieval-unseen"):
        records = kg_data.kgfact("kgfact-small", split)
        if split == "two-hop":
            records = [r for r in records if {*r["needs"]} <= taught]
        elif split != "retrieval-unseen":
            records = records[:known]
        items = evaluation.load_in_domain(None, split, args)
        assert [item["question"] for item in items] == [question_of(r) for r in records] != []
    few = tiny_run(tmp_path, data="kgfact-small", style="boxed", verify="boxed", limit=24)
    err = refused_by_eval(f"--tasks two-hop --model {few}/model")
    assert "no question whose facts were all taught" in err


def test_scores_count_problems_not_samples_and_say_what_is_partial():
    for right, n, low, high in ((8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (1, 1, 0.2065, 1.0)):
        expected = {"accuracy": right / n, "n": n, "low": low, "high": high}            # Wilson's interval
        assert mixsd.score([True] * right + [False] * (n - right)) == pytest.approx(expected, abs=1e-4)
    rows = [{"id": i, "of": 4, "correct": kind is None, "extracted": None if kind else "1", "kind": kind}
            for i, kind in ((0, None), (0, None), (1, None), (1, "format"), (2, "format"), (2, "format"))]
    score = evaluation.scored(rows)
    assert (score["samples"], score["errors"]) == (2, {"format": 3})
    assert mixsd.score([1, 0.5, 0]).items() <= score.items() and score["partial"] and score["of"] == 4
    nats = evaluation.scored([{"id": 0, "of": 2, "tokens": 1, "nll": 1.0, "base_nll": 0.5},
                              {"id": 1, "of": 2, "tokens": 3, "nll": 2.0, "base_nll": 0.5}])
    reach = 1.96 * math.sqrt((1 * (0.5 - 1.25)) ** 2 + (3 * (1.5 - 1.25)) ** 2) / 4
    assert nats == pytest.approx({"nll": 1.75, "base_nll": 0.5, "rise": 1.25, "low": 1.25 - reach, "of": 2,
                                  "high": 1.25 + reach, "tokens": 4, "n": 2, "partial": False})


# ------------------------------------------------------------------------------- eval.py: model-written code

SQUARE = {"prompt": "def f(x):\n    ''\n", "entry_point": "f",
          "test": "def check(f):\n    assert f(3) == 9 and abs(f(-2) - 4) < 1e-6 and isinstance(f(5), int)\n"}
RIGHT = "\ndef f(x): return x * x\n"
ESCAPES = {
    "exits": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "guesses": "print('0' * 32)\nimport os\nos.write(1, b'{}\\n' + b'0' * 32)",
    "prints": "while True: print('x' * 9999, flush=True)",
    "swallows its exit": "import sys\ndef f(x):\n    try: sys.exit(0)\n    except SystemExit: return 0",
    "swallows": "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass",
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "allocates": "x = bytearray(10 * 2**30)" + RIGHT,
    "writes": "open('x', 'wb').write(bytes(2 * 2**20))" + RIGHT,
    "opens": "x = [open('/dev/null') for _ in range(100)]" + RIGHT,
    "answers ahead": "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'1\\n' * 9)\n"
                     "    except OSError: pass\ndef f(x): return 1",
    "equals all": "class Yes(int):\n    __eq__ = __ne__ = __lt__ = lambda *a: True\n"
                  "    __sub__ = __abs__ = lambda *a: Yes()\ndef f(x): return Yes()",
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
    "hunts the token": r"""
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
""",
}


@pytest.fixture(params=["namespaces", "none"])
def kernel(request, monkeypatch):
    """This kernel, and one that refuses namespaces."""
    if request.param == "none":
        monkeypatch.setattr(evaluation, "NAMESPACES", 1)    # a flag that no unshare takes


def command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):                  # it may have ended
            yield path.read_bytes()


def alive(mark, seconds=2):
    """Whether a process with `mark` in its command line is still there; a killed one takes a moment to go."""
    deadline = time.time() + seconds
    while any(mark in line for line in command_lines()):
        if time.time() > deadline:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("name", ESCAPES)
def test_no_escape_earns_a_verdict(kernel, monkeypatch, name):
    monkeypatch.setattr(evaluation, "WALL_SECONDS", 1)
    start = time.time()
    assert evaluation.run_program(SQUARE, ESCAPES[name])[0] is False
    assert time.time() - start < 4 and not alive(b"def harness"), "it is stopped, and nothing of it is left"


@pytest.mark.parametrize("code", [
    "", "import math, typing, numpy, collections", "open('x', 'w').write('y')",
    "import os\nassert os.listdir('.') == [] and set(os.environ) <= {'LC_CTYPE'}",
    "import os\nassert os.getuid() != 0",
    "assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()",
    "print('hello')\nimport sys\nassert sys.stdin.read() == ''"])
def test_a_right_program_passes_in_an_empty_folder_without_rights(kernel, code):
    passed, report = evaluation.run_program(SQUARE, code + RIGHT)
    assert passed and report["uid"] == (os.getuid() or 65534)


def test_a_user_with_many_processes_is_not_refused_its_own(kernel):
    user = 65534 if os.getuid() == 0 else None
    busy = [subprocess.Popen(["sleep", "99"], user=user) for _ in range(40)]
    passed, _ = evaluation.run_program(SQUARE, RIGHT)
    for process in busy:
        process.kill()
        process.wait()
    assert passed


def test_values_cross_as_plain_data_and_the_prompts_helper_judges_not_the_models():
    item = SQUARE | {"test": "def check(g):\n    assert f('ab') == {'a': 1, 'b': 1}\n"}
    for value in ("collections.Counter(x)", "dict(collections.defaultdict(int, a=1, b=1))",
                  "collections.OrderedDict(a=1, b=1)", "{c: True for c in x}"):
        assert evaluation.run_program(item, f"\nimport collections\ndef f(x): return {value}\n")[0]
    item = {"prompt": "def even(n):\n    return n % 2 == 0\n\ndef f(x):\n    ''\n", "entry_point": "f",
            "test": "def check(f):\n    assert even(f(1))\n"}
    assert evaluation.run_program(item, "\ndef f(x): return 2\n")[0]
    assert not evaluation.run_program(item, "\ndef even(n): return True\ndef f(x): return 3\n")[0]


@pytest.mark.parametrize("leave", ["pass", "os.setsid()"])
def test_a_grandchild_does_not_stay(leave):
    mark = f"86399.{random.random()}"
    code = (f"import os, time\nif os.fork() == 0:\n    {leave}\n"
            f"    os.execv('/bin/sleep', ['sleep', '{mark}'])\ntime.sleep(.2)")
    passed, report = evaluation.run_program(SQUARE, code + RIGHT)
    assert passed
    assert not alive(mark.encode()) or leave != "pass" and not report["namespaces"]


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
        target=evaluation.run_program, args=(SQUARE, "import os, time\nos.setsid()\ntime.sleep(99)"))
    child.start()
    time.sleep(0.5)
    assert alive(b"def harness", seconds=0)
    child.kill()
    child.join()
    assert not alive(b"def harness") or not evaluation.run_program(SQUARE, RIGHT)[1]["namespaces"]


def test_what_is_in_force_is_said_and_code_needs_a_yes(toy_run):
    said = evaluation.protections()
    assert f"uid {os.getuid() or 65534}" in said
    assert ("namespaces of its own" in said) != ("NO namespaces" in said)
    err = refused_by_eval(f"--tasks humaneval --model {toy_run}/model")
    assert "humaneval runs programs that the model wrote: give --allow-code-execution" in err


# ------------------------------------------------------------------------------------ eval.py: whole runs

measure = functools.partial(run, program=evaluation)
refused_by_eval = functools.partial(refused, program=evaluation)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A run whose corpus asks for a word that the model says in about half of its answers."""
    folder = tiny_run(tmp_path_factory.mktemp("tiny"))
    subject, records = subject_in(folder), kg_data.read_corpus(folder / "own.jsonl", "phrase")
    for record in records[1::2]:
        prompt = mixsd.chat_ids(subject.tokenizer, question_of(record))
        record["answer"] = subject.tokenizer.decode(greedy(subject, prompt, 1))
    jsonl(folder / "own.jsonl", *records)
    return folder


def subject_in(run):
    args = SimpleNamespace(device="cpu", quiet=True, decode_tokens=65536)
    return evaluation.load_subject(str(run / "model"), args, "float32")


def greedy(subject, prompt, T):
    """At most T ids of a greedy answer, by the definition."""
    return definition(subject.model, [prompt], [0] * T, subject.stops)


def test_recall_is_what_mixsd_measures_and_every_completion_is_on_disk(toy_run, tmp_path):
    ledger = measure(f"--tasks recall --model {toy_run}/model --out {tmp_path}")
    subject, records = subject_in(toy_run), kg_data.read_corpus(toy_run / "own.jsonl", "phrase")
    settings = SimpleNamespace(max_new_tokens=12, decode_tokens=999, seed=0, quiet=True, verify="phrase")
    model, tokenizer, stops = subject
    expected = timeless(mixsd.memorization(model, tokenizer, {"recall": records}, stops, settings, [1, 3]))
    score = ledger["tasks"]["recall"]
    assert 0 < score["accuracy"] < 1 and expected["recall"].items() <= score.items()
    assert score["n"] == score["of"] == 10 and score["partial"] is False
    assert ledger == json.loads((tmp_path / "eval.json").read_text())
    rows = {row["id"]: row for row in rows_of(tmp_path / "recall.jsonl")}
    for i, record in enumerate(records):
        row, ids = rows[i], greedy(subject, mixsd.chat_ids(tokenizer, question_of(record)), 12)
        ended = ids[-1] in stops
        assert (row["prompt"], row["gold"], row["ended"]) == (question_of(record), record["answer"], ended)
        assert row["text"] == tokenizer.decode(ids[:-1] if ended else ids)
        assert row["correct"] == (ended and kg_data.is_correct(row["text"], row["gold"], "phrase"))
        assert (row["kind"] is None) == row["correct"]
    assert expected["recall-kept"] == mixsd.score([rows[i]["correct"] for i in (1, 3)])
    assert sum(score["errors"].values()) == sum(not row["correct"] for row in rows.values())
    assert {row["ended"] for row in rows.values()} == {True, False}


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_rows(toy_run, tmp_path, monkeypatch):
    recall = evaluation.TASKS["recall"]
    monkeypatch.setitem(evaluation.TASKS, "aime24", recall)           # with --paper: 16 samples per question
    command = ("--tasks aime24 --paper --max-new-tokens 12 --decode-tokens 70 "
               f"--model {toy_run}/model --out {tmp_path}")
    whole, cut = measure(f"{command}/whole"), tmp_path / "cut"
    answers, asked, stop_at = evaluation.generated, [], [14, None]

    def watched(subject, task, todo, args):
        asked.append(len(todo))
        stop = stop_at.pop(0)
        for n, row in enumerate(answers(subject, task, todo, args)):
            if n == stop:
                raise KeyboardInterrupt
            yield row
    monkeypatch.setitem(evaluation.TASKS, "aime24", recall._replace(answer=watched))
    monkeypatch.setattr(evaluation, "generated", watched)
    assert "goes on" in refused_by_eval(f"{command}/cut", 130)
    first = (cut / "aime24.jsonl").read_text()
    assert len(first.splitlines()) == 14
    with mixsd.only_run(cut):                               # two at once would both write their rows
        assert "another run is at work there" in refused_by_eval(f"{command}/cut")
    (cut / "aime24.jsonl").write_text(first + '{"id": 3, "samp')
    resumed = measure(f"{command}/cut")
    assert asked == [160, 160 - 14] and (cut / "aime24.jsonl").read_text().startswith(first)
    rows = [sorted(rows_of(tmp_path / name / "aime24.jsonl"), key=lambda row: (row["id"], row["sample"]))
            for name in ("whole", "cut")]
    assert rows[0] == rows[1] and resumed["tasks"] == whole["tasks"]
    assert len({row["text"] for row in rows[0] if row["id"] == 0}) > 1, "samples differ"


def test_a_limit_is_called_partial_and_retention_wants_a_base_measured_alike(tmp_path, monkeypatch, hub):
    toys = {"data": "toy", "style": "boxed", "verify": "boxed"}
    base, tuned = tiny_run(tmp_path / "base", **toys), tiny_run(tmp_path / "tuned", seed=1, **toys)
    monkeypatch.setitem(evaluation.TASKS, "held_out", evaluation.TASKS["held_out"]._replace(
        verdict=lambda text, item: (len(text) % 2 == 1, text), must_end=False))
    held_out = "--tasks held_out --max-new-tokens 4 --limit"
    before = measure(f"{held_out} 5 --model {base}/model --out {tmp_path}/b")
    of_tuned = f"--model {tuned}/model --base {tmp_path}/b"
    said, _ = printed(f"{held_out} 5 {of_tuned}", program=evaluation)
    after = json.loads((tuned / "eval.json").read_text())
    assert "partial: 5 of 260" in said and "(partial)" in said and after["tasks"]["held_out"]["partial"]
    assert after["average_of"] == ["held_out"] and after["base"] == before["tasks"]
    assert before["retention"] is None and before["average"] > 0
    assert after["retention"] == after["average"] / before["average"]
    low, high = after["retention_interval"]
    assert low <= after["retention"] <= high and low < high
    same = measure(f"{held_out} 5 --model {base}/model --base {tmp_path}/b --out {tmp_path}/s")
    assert same["retention_interval"] == [1, 1], "the draws are the same before and after"
    err = refused_by_eval(f"{held_out} 6 {of_tuned} --out {tmp_path}/c")
    assert "limit 5" in err and "asks for 6" in err
    arc, out = f"--tasks arc_easy --limit 5 --model {base}/model --out", tmp_path / "both"
    measure(f"--tasks held_out --limit 5 --model {base}/model --out {out}")
    assert measure(f"{arc} {out}")["tasks"].keys() == {"held_out", "arc_easy"}, "a task can be added"


@pytest.fixture
def hub(monkeypatch):
    """Stand-ins for the data sets of the log-probability tasks, in the toy's words."""
    rng, words = random.Random(0), "What is the trade of a baker ? Name the town of her smith . 1 2 3".split()

    def say(n):
        return " ".join(rng.choice(words) for _ in range(n))
    arc = [{"question": say(6), "answerKey": "3",
            "choices": {"label": ["1", "2", "3"], "text": [say(1), say(5), say(2)]}} for _ in range(60)]
    rows = {"allenai/ai2_arc": arc, "Salesforce/wikitext": [{"text": ""}, {"text": say(3000)}]}
    monkeypatch.setattr(evaluation, "hub_rows", lambda name, *_: rows[name])
    return rows


@torch.no_grad()
def test_log_probability_tasks_by_their_definitions(toy_run, tmp_path, hub):
    other, subject, out = tiny_run(tmp_path / "other", seed=1), subject_in(toy_run), tmp_path / "o"
    score = measure("--tasks arc_easy,wikitext,drift,drift-taught "
                    f"--model {toy_run}/model --base-model {other}/model --out {out}")["tasks"]
    for row in rows_of(out / "arc_easy.jsonl"):
        item = hub["allenai/ai2_arc"][row["id"]]
        prompt, texts = mixsd.chat_ids(subject.tokenizer, item["question"]), item["choices"]["text"]
        means = [plain_nll(subject.model, prompt, subject.tokenizer(text)["input_ids"]).mean().item()
                 for text in texts]
        assert row["text"] == texts[means.index(min(means))] and row["gold"] == texts[2]
        assert row["nll"] == pytest.approx(means, rel=1e-4) and row["correct"] == (row["text"] == row["gold"])
    ids = subject.tokenizer("\n\n" + hub["Salesforce/wikitext"][1]["text"])["input_ids"]
    windows = [ids[i:i + 1024] for i in range(0, len(ids), 1024)]
    assert [row["tokens"] for row in rows_of(out / "wikitext.jsonl")] == [len(w) - 1 for w in windows]
    nats = torch.cat([plain_nll(subject.model, w[:1], w[1:]) for w in windows])
    assert score["wikitext"]["nll"] == pytest.approx(nats.mean().item(), rel=1e-4)

    base, rows, rise = subject_in(other), rows_of(out / "drift.jsonl"), []
    assert len(rows) == 50 == score["drift"]["of"]
    for row in rows:
        prompt = mixsd.chat_ids(base.tokenizer, hub["allenai/ai2_arc"][row["id"]]["question"])
        ids = greedy(base, prompt, 64)
        assert row["tokens"] == len(ids) <= 64
        rise.append(plain_nll(subject.model, prompt, ids) - plain_nll(base.model, prompt, ids))
    assert score["drift"]["rise"] == pytest.approx(torch.cat(rise).mean().item(), rel=1e-3)
    kl, taught = [], rows_of(out / "drift-taught.jsonl")
    for row in taught:
        prompt = mixsd.chat_ids(base.tokenizer, row["prompt"])
        ids = greedy(base, prompt, 64)
        p, q = (s.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
                for s in (base, subject))
        kl.append((p.exp() * (p - q)).sum(-1))
    assert len(taught) == score["drift-taught"]["of"] == 10
    assert score["drift-taught"]["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3) != 0


@pytest.mark.parametrize("command, says", [
    ("", "give one of --tasks, --nll"), ("--tasks gsm8k --nll f", "give one of --tasks, --nll"),
    ("--tasks gsm9k --model M", "no task gsm9k here; known: gsm8k, math500"),
    ("--bench x --model M", "no task x here; known: decode"),
    ("--fisher R --base B --fisher-tasks wikitext", "no task wikitext here"),
    ("--tasks recall", "--tasks needs --model"), ("--fisher R --base B", "--fisher needs --fisher-tasks"),
    ("--tasks drift --model M", "needs --base-model"), ("--report /no/where", "no metrics.json"),
    ("--nll f --model M --paper", "--paper is not used here: it is for --tasks"),
    ("--tasks recall --model HuggingFaceTB/x", "give --run"), ("--tasks gsm8k --limit 0", "--limit: 0 is"),
    ("--tasks two-hop --model RUN", "no split two-hop"),
    ("--tasks gsm8k --model RUN --hub /no/where",
     "data set openai/gsm8k, config main, split test: not to be had from /no/where"),
    ("--tasks recall --model RUN --max-new-tokens 1020", "tokens + 1,020 new > 1,024")])
def test_bad_input_of_an_evaluation_is_one_line(toy_run, tmp_path, command, says):
    out = f"--out {tmp_path}/out" if "--tasks" in command else ""
    err = refused_by_eval(f"{command.replace('RUN', str(toy_run / 'model'))} {out}")
    assert says in err and not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda package: None)
    assert "math500 need: pip install math-verify" in refused_by_eval("--tasks aime24 --model M")


def test_results_of_another_model_or_with_other_settings_are_refused(toy_run, tmp_path, monkeypatch):
    other, out = tiny_run(tmp_path / "other", seed=1), tmp_path / "out"
    weights = toy_run / "model" / "model.safetensors"
    again, own = f"--tasks recall --out {out}", f"--model {toy_run}/model"
    measure(f"{again} {own}")
    err = refused_by_eval(f"{again} --model {other}/model --run {toy_run}")
    assert f"holds results with model {toy_run}/model" in err
    assert "with seed 0, this asks for 1" in refused_by_eval(f"{again} {own} --seed 1")
    when = weights.stat().st_mtime_ns
    os.utime(weights, ns=(when, when + 10**9))
    assert "holds results with weights" in refused_by_eval(f"{again} {own}")
    os.utime(weights, ns=(when, when))
    monkeypatch.setattr(evaluation, "VERSION", 2)
    assert "version 1, this asks for 2" in refused_by_eval(f"{again} {own}")


def test_the_papers_decoding_and_the_clip_of_a_default_length(toy_run, capsys):
    tasks = ("aime24", "gsm8k", "recall")
    _, args = evaluation.parse_args(f"--tasks {','.join(tasks)} --model {toy_run}/model --paper".split())
    items, subject = [{"ids": [1] * 100}, {"ids": [1] * 50}], subject_in(toy_run)
    each = [evaluation.of_task(task, items, subject, args) for task in tasks]
    settled = [(a.temperature, a.samples, a.max_new_tokens) for a in each]
    assert settled == [(1.0, 16, 924), (1.0, 1, 924), (0.0, 1, 12)]
    assert "aime24: max-new-tokens clipped to 924: the model has 1,024 positions" in capsys.readouterr().out


# ----------------------------------------------------------------- eval.py: target NLL, Fisher, bench, report

def test_target_nll_is_the_mean_over_all_tokens_with_pictures(toy_run, tmp_path):
    subject, targets = subject_in(toy_run), [[8, 9, 2], [7, 2]]
    lines = [turns("Name the town of the baker .", subject.tokenizer.decode(y[:-1]), target_ids=y)
             for y in targets]
    full = jsonl(tmp_path / "t.jsonl", *lines)
    text = jsonl(tmp_path / "text.jsonl", {"messages": lines[0]["messages"]})
    prompt = mixsd.chat_ids(subject.tokenizer, "Name the town of the baker .")
    with torch.no_grad():
        nats = [x for y in targets for x in plain_nll(subject.model, prompt, y).tolist()]
    files = measure(f"--nll {full} {text} --model {toy_run}/model --out {tmp_path}/out")["files"]
    found = files[str(full)]
    assert (found["targets"], found["tokens"]) == (2, 5)
    assert found["mean"] == pytest.approx(sum(nats) / 5, rel=1e-4)
    assert found["above_5"] == sum(x > 5 for x in nats) / 5 and 0 < found["above_5"] < 1
    assert files[str(text)]["tokens"] == 3, "a text is closed with the stop token"
    assert all((tmp_path / "out" / name).read_bytes()[1:4] == b"PNG" for name in ("target.png", "ecdf.png"))


def test_fisher_squares_the_gradient_of_each_sequence_and_r_weighs_the_move_by_it(toy_run):
    subject, examples, expected = subject_in(toy_run), [([5, 6, 7], [8, 9, 2]), ([1, 3], [7, 2])], {}
    fisher = evaluation.fisher_diagonal(subject.model, examples, 2)
    for prompt, y in examples:
        subject.model.zero_grad()
        plain_nll(subject.model, prompt, y).sum().backward()
        for name, p in subject.model.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad**2 / 2
    assert fisher.keys() == expected.keys() and "lm_head.weight" not in fisher, "a tied weight counts once"
    for name in fisher:
        torch.testing.assert_close(fisher[name], expected[name], rtol=1e-3, atol=1e-6)

    fisher, base = {"w": torch.tensor([0.1, 0.6, 0.2])}, {"w": torch.tensor([0.3, -0.5, 1.0])}

    def aligned(*move):
        return evaluation.alignment(fisher, base, {"w": base["w"] + torch.tensor(move)})
    found = aligned(0.1, 0.0, -0.2)
    assert found["squared_distance"] == pytest.approx(0.05, rel=1e-5)
    assert found["R"] == pytest.approx((0.1 * 0.01 + 0.2 * 0.04) / 0.05 / 0.3, rel=1e-5)
    assert aligned(0.1, -0.1, 0.1)["R"] == pytest.approx(1, rel=1e-5) and aligned(0.0, 0.0, 0.0)["R"] is None


def finished(folder, method="mixsd", rho=0.3, seed=0, recall=0.9, held_out=0.6, kept=80, nll=1.5, data="toy"):
    """A folder with a finished run's metrics.json."""
    base, tuned = ({task: {"accuracy": a, "low": a - 0.1, "high": a + 0.1} for task, a in phase.items()}
                   for phase in ({"recall": 0.05, "held_out": 0.8}, {"recall": recall, "held_out": held_out}))
    jsonl(folder / "metrics.json", {
        "model": "toy", "data": data, "method": method, "rho": rho, "seed": seed, "base": base,
        "tuned": tuned, "retention": held_out / 0.8, "targets": {"kept": kept, "of": 90, "nll": nll},
        "tokens": {"decoded": 1200, "trained": 34567},
        "seconds": {"pretrain": 9, "decode": 2, "train": 13.6, "evaluate": 4}})
    return folder


def test_fisher_says_how_far_runs_moved_and_how_that_correlates_over_methods(toy_run, tmp_path):
    runs = [finished(tmp_path / str(n), rho=min(n, 3) / 8, held_out=0.8 - 0.1 * n) for n in range(5)]
    for n, folder in enumerate(runs):                       # the last two differ only in their seed
        tiny_run(folder, seed=n, data="toy")
    command = (f"--fisher {' '.join(map(str, runs))} --fisher-tasks held_out --fisher-n 3 --max-new-tokens 5 "
               "--base")
    found = measure(f"{command} {toy_run}/model")
    first, second, *_ = found["runs"].values()
    assert first["squared_distance"] == 0 and first["R"] is None, "the run of seed 0 is the base itself"
    weights = [load_file(run / "model" / "model.safetensors") for run in (toy_run, runs[1])]
    distance = sum((weights[1][name] - p).double().square().sum().item() for name, p in weights[0].items())
    assert second["squared_distance"] == pytest.approx(distance, rel=1e-5)
    assert second == json.loads((runs[1] / "fisher.json").read_text())
    d = [one["squared_distance"] for one in found["runs"].values()]
    methods = torch.tensor([[0.0, 0.1, 0.2, 0.35], [*d[:3], (d[3] + d[4]) / 2]])
    r = torch.corrcoef(methods)[0, 1].item()
    assert found["correlation"]["drop_squared_distance"] == pytest.approx(r, rel=1e-3)
    assert found["methods"]["drop_squared_distance"] == 4 and found["methods"]["drop_R"] == 3
    assert "its weights are not like those of --base" in refused_by_eval(f"{command} {toy_folder()}")


def test_the_bench_times_its_parts_and_its_gap_is_zero_for_the_definition_alone():
    command = f"--bench decode,generate,train --batch-size 3 --max-new-tokens 5 --model {toy_folder()}"
    out, _ = printed(command, program=evaluation)
    result = json.loads(out.splitlines()[-1])
    assert result["parts"].keys() == {"decode", "generate", "train"} and "generate takes" in out
    assert all(0 < part["min"] <= part["median"] <= part["max"] for part in result["parts"].values())
    assert "decoding: 15 of 15 tokens equal the definition" in out and result["largest_gap"] == 0
    assert "finite at 4 of 4 lengths" in out and result["not_finite"] == []
    net, contexts, source = tiny_model(), contexts_of(), mixsd.draw_sources(0.5, 12, 1, range(6))
    y = mixsd.decode(net, contexts, source, STOPS)
    t = len(y[0]) - 1
    logits = net(torch.tensor([contexts[source[0, t]][0] + y[0][:t]])).logits[0, -1].detach()
    y[0][t] = (y[0][t] + 1) % V                             # not the token that its speaker finds most likely
    gaps = evaluation.gaps(net, contexts, source, y)
    assert gaps.nonzero().tolist() == [[t]]
    assert gaps[t].item() == pytest.approx((logits.max() - logits[y[0][t]]).item(), rel=1e-3)


def test_the_report_is_one_table_base_first_with_means_over_seeds_and_a_picture(tmp_path):
    runs = [finished(tmp_path / "m7", rho=0.7, recall=0.8, held_out=0.72),
            finished(tmp_path / "m0", rho=0.0, recall=0.95, held_out=0.4),
            finished(tmp_path / "m0b", rho=0.0, seed=1, recall=0.85, held_out=0.56, nll=2.5),
            finished(tmp_path / "s", "sft", None, recall=1.0, held_out=0.2, kept=90)]
    (runs[3] / "fisher.json").write_text('{"R": 1.25}')
    judged = {"partial": True, "low": 0.2, "high": 0.4}
    jsonl(runs[0] / "eval.json", {"tasks": {"gsm8k": judged | {"accuracy": 0.3}},
                                  "base": {"gsm8k": judged | {"accuracy": 0.5}}})
    drift = {"nll": 1.5, "base_nll": 1.0, "rise": 0.5, "low": 0.4, "high": 0.6}
    jsonl(runs[3] / "more" / "eval.json", {"tasks": {"drift": drift}})
    out, _ = printed(f"--report {' '.join(map(str, runs))} --out {tmp_path}/pic", program=evaluation)
    assert out.splitlines()[:6] == [
        "| method | rho | seeds | kept | recall | gsm8k (partial) | retention | drift | target NLL | R | "
        "decoded | trained tokens | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| base | - | 2 | - | 0.05 ± 0.00 | 0.80 ± 0.00 | 1.00 ± 0.00 | - | - | - | - | - | - |",
        "| sft | - | 1 | 1.00 | 1.00 | 0.20 | 0.25 | 0.500 | 1.50 | 1.25 | 1,200 | 34,567 | 16 |",
        "| mixsd | 0 | 2 | 0.89 ± 0.00 | 0.90 ± 0.07 | 0.48 ± 0.11 | 0.60 ± 0.14 | - | 2.00 ± 0.71 | - | "
        "1,200 | 34,567 | 16 |",
        "| mixsd | 0.7 | 1 | 0.89 | 0.80 | 0.30 | 0.60 | - | 1.50 | - | 1,200 | 34,567 | 16 |"]
    assert (tmp_path / "pic" / "frontier.png").read_bytes()[1:4] == b"PNG"
    other = finished(tmp_path / "k", data="kgfact-small")
    assert "toy on kgfact-small, toy on toy" in refused_by_eval(f"--report {runs[0]} {other}")


def test_the_report_does_not_average_runs_that_differ_in_more_than_the_seed(tmp_path):
    def labels(*settings):
        folders = [tmp_path / str(i) for i in range(len(settings))]
        for folder, more in zip(folders, settings):
            jsonl(folder / "args.json", {"temperature": 0.0, "seed": 0, "lr": 1e-5, "only": None} | more)
        groups = evaluation.grouped(folders, [{"method": "mixsd", "rho": 0.3} for _ in settings])
        return [label for (label, _), runs in groups.items() for _ in runs]
    only = {"temperature": 1.0, "only": "runs/a/targets.jsonl", "only_sha256": "f00"}
    assert labels({}, {"seed": 1}, {"temperature": 1.0}) == ["mixsd"] * 2 + ["mixsd --temperature 1"]
    same = labels(only, only | {"seed": 3, "only": "runs/b/targets.jsonl"})
    assert same == ["mixsd"] * 2, "a flag that none of them sets apart goes unsaid"
    assert labels({}, only) == ["mixsd", "mixsd --only --temperature 1"]
    assert labels({}, {"lr": 1e-4}) == ["mixsd --lr 0.0001", "mixsd --lr 1e-05"]
