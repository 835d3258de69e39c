"""The README's claims that a CPU can check.  No network; the toy base is pretrained once, then cached."""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig,
                          Qwen3Config, Qwen3ForCausalLM)

import kg_data
import mixsd
from mixsd import EXPERT, NAIVE

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


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_a_sliding_window_architecture_decodes_by_the_definition(rho):
    layers = ["sliding_attention", "full_attention"]
    gemma = tiny_model(Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=8, layer_types=layers)
    contexts, source = prompts(), mixsd.draw_sources(rho, 20, 1, range(6))
    y, n = mixsd.decode(gemma, contexts, source, STOPS)
    for i in range(6):
        expected, length = definition(gemma, [contexts[EXPERT][i], contexts[NAIVE][i]], source[i])
        assert y[i, : len(expected)].tolist() == expected and n[i] == length


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
    small = Qwen3ForCausalLM(Qwen3Config(vocab_size=6, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2, head_dim=16)).eval()
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
    nll = mixsd.token_nll(model, mixsd.collate(EXAMPLES, 0, "cpu"))
    expected = []
    for prompt, target in EXAMPLES:
        logp = model(input_ids=torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        expected += [-logp[len(prompt) - 1 + t, y] for t, y in enumerate(target)]
    torch.testing.assert_close(nll, torch.stack(expected), rtol=1e-4, atol=1e-4)
    batch = mixsd.collate(EXAMPLES, 0, "cpu")
    seen = {}
    hook = model.lm_head.register_forward_hook(lambda m, i, out: (out.retain_grad(), seen.update(out=out))[0])
    mixsd.token_nll(model, batch).sum().backward()
    hook.remove()
    model.zero_grad()
    used = seen["out"].grad.abs().sum(-1) > 0  # (B, T + 1): the last column predicts beyond the target
    assert torch.equal(used, torch.nn.functional.pad(batch.is_target, (0, 1)))


def test_padding_is_known_by_length_so_that_a_stop_that_is_also_the_pad_is_trained(model):
    batch = mixsd.collate(EXAMPLES, 63, "cpu")
    assert batch.is_target.sum(1).tolist() == [3, 2, 6] and batch.attention.sum(1).tolist() == [6, 8, 7]
    otherwise = mixsd.collate(EXAMPLES, 0, "cpu")
    torch.testing.assert_close(mixsd.token_nll(model, batch), mixsd.token_nll(model, otherwise))


def test_micro_batches_of_unequal_length_add_up_to_the_full_batch():
    norms = []
    for micro_tokens in (1, 16, 10**6):
        net = tiny_model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        nll, norm, N = mixsd.update(net, optimizer, EXAMPLES, 1e-3, 0, micro_tokens, torch.float32)
        norms.append((nll, norm, N))
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-4)


def test_what_is_not_finite_stops_the_run_and_keeps_the_weights(tmp_path):
    net = tiny_model()
    settings = argparse.Namespace(steps=3, batch_size=2, lr=1e-3, warmup=0, seed=0, micro_tokens=99,
                                  quiet=True)
    (tmp_path / "state").mkdir()
    before = [p.clone() for p in net.parameters()]
    hook = net.lm_head.register_forward_hook(lambda m, i, out: out * float("nan"))
    with pytest.raises(mixsd.RunError, match=r"step 1, examples \[\d, \d\]: loss nan"):
        mixsd.train(net, EXAMPLES, settings, torch.float32, 0, tmp_path)
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

    expert, naive = mixsd.two_contexts(Spy(), record, kg_data.EXPERT_WORDS["boxed"])
    answer = record["answer"]
    assert naive.endswith("\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert expert == (
        naive + "\nThis question is from a new knowledge base. Here is the answer to this question:\n\n"
        f"The answer is {answer}.\n\n\\boxed{{{answer}}}\nNow answer the question within \\boxed{{}}"
    )


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
    mix = run(f"--out {tmp_path}/mix", capsys)
    assert sft["base"]["held_out"]["accuracy"] >= 0.95 and sft["base"]["recall"]["accuracy"] < 0.15
    assert sft["tuned"]["recall"]["accuracy"] >= 0.9 and mix["tuned"]["recall"]["accuracy"] >= 0.9
    assert mix["tuned"]["held_out"]["accuracy"] >= 2.5 * sft["tuned"]["held_out"]["accuracy"]
    assert sft["targets"]["nll"] >= 3 * mix["targets"]["nll"]

    files = {"args.json", "targets.jsonl", "log.jsonl", "state", "model", "metrics.json"}
    assert {p.name for p in (tmp_path / "mix").iterdir()} == files
    assert mix == json.loads((tmp_path / "mix" / "metrics.json").read_text())
    assert run(f"--out {tmp_path}/mix", capsys) == mix, "a finished run prints its result again"
    rows, steps = rows_of(tmp_path / "mix" / "targets.jsonl"), rows_of(tmp_path / "mix" / "log.jsonl")
    AutoModelForCausalLM.from_pretrained(tmp_path / "mix" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mix" / "model")
    assert [r["id"] for r in rows] == sorted({r["id"] for r in rows})
    for r in rows:
        assert len(r["source"]) == len(r["target_ids"]) and r["target_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(r["target_ids"][:-1]) == r["messages"][1]["content"]
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    assert mix["tokens"]["trained"] == 50 * sum(len(r["target_ids"]) for r in rows)


SHORT = "--limit 24 --epochs 6 --decode-tokens 600"


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(f"{SHORT} --out {out}")
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
    run(f"--limit 7 --targets-only --out {tmp_path}/few")
    keep = ("id", "target_ids", "source", "attempt")
    whole, wide, few = (
        [[r[k] for k in keep] for r in rows_of(d / "targets.jsonl")]
        for d in (uninterrupted, tmp_path / "wide", tmp_path / "few")
    )
    assert wide == whole and few == [r for r in whole if r[0] < 7]
    assert {r[3] for r in whole} >= {0, 1}, "some were drawn again"


def test_a_run_stopped_after_its_targets_goes_on_with_any_training_flags(uninterrupted, tmp_path):
    run(f"--limit 24 --decode-tokens 600 --targets-only --out {tmp_path}/run")
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
    ("--attempts -3", "--attempts: -3"),
    ("--lr 0", "--lr: 0"),
    ("--method sft --rho 0.3", "--rho is not used by --method sft"),
    ("--method sft --rho 0", "--rho is not used by --method sft"),
    ("--temperature 0 --top-k 4", "--top-k is not used"),
    ("--temperature 0 --rho 1 --attempts 4", "--attempts is not used"),
    ("--targets-only --lr 1e-4", "--lr is not used with --targets-only"),
    ("--style sentence", "--style sentence"),
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
    ([GOOD, {"text": "Where ?"}], "line 2: needs `messages`"),
    ([GOOD, turns(" ", r"\boxed{ Belmor }")], "line 2: a turn without text"),
    ([], "no records"),
    ([GOOD, turns("Where does <end> live ?", r"\boxed{ Belmor }")], "record 2: holds <end>"),
    ([turns("Where does Quetzalcoatl live ?", r"\boxed{ Belmor }")], "record 1: has words"),
    ([turns("live " * 300, r"\boxed{ Belmor }")], "positions of"),
])
def test_bad_corpus_files_are_one_line_and_exit_2(toy, tmp_path, capsys, rows, says):
    err = run(f"--data {jsonl(tmp_path / 'my.jsonl', *rows)} --out {tmp_path}/out", capsys, code=2)
    assert says in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_bad_model_folders_are_one_line_and_exit_2(toy, tmp_path, capsys):
    assert "not a model's folder" in run(f"--model {tmp_path}", capsys, code=2)
    mute = tmp_path / "mute"
    shutil.copytree(toy, mute)
    (mute / "chat_template.jinja").unlink()
    assert "no chat template" in run(f"--model {mute} --data toy", capsys, code=2)


def test_an_out_of_another_run_is_refused_by_the_settings_name(uninterrupted, tmp_path, capsys):
    assert "--rho 0.3, not 0.5" in run(f"{SHORT} --rho 0.5 --out {uninterrupted}", capsys, code=2)
    (tmp_path / "file").write_text("mine")
    assert "is a file" in run(f"--out {tmp_path}/file", capsys, code=2)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_corpus_file_that_changed_is_another_run(toy, tmp_path, capsys):
    mine = jsonl(tmp_path / "my.jsonl", GOOD)
    run(f"--data {mine} --targets-only --on-fail canonical --out {tmp_path}/out")
    jsonl(mine, GOOD, turns("Where does Talo live ?", r"\boxed{ Pell }"))
    err = run(f"--data {mine} --targets-only --on-fail canonical --out {tmp_path}/out", capsys, code=2)
    assert "data-sha256" in err


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
    for wrong in ([7, 8, 2], [10**9, 2], ["a"]):
        other = jsonl(tmp_path / "other.jsonl", rows[0] | {"target_ids": wrong})
        assert "another tokenizer's" in run(f"--targets {other} --out {tmp_path}/x", capsys, code=2)
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
