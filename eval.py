"""Measure what a model learned and what it forgot, and find out why (MixSD, arXiv 2605.16865).

    python eval.py --tasks recall,paraphrase --model RUN/model                # what the model learned
    python eval.py --tasks gsm8k,math500,aime24,humaneval,mmlu --model RUN/model --base BASE_OUT \\
                   --allow-code-execution                                     # what the model forgot
    python eval.py --nll RUN/targets.jsonl ... --model BASE                   # NLL of targets under the base
    python eval.py --fisher RUN ... --base BASE --fisher-tasks gsm8k,mmlu     # how its weights moved
    python eval.py --report RUN ...                                           # one table, and frontier.png
    python eval.py --bench --model BASE                                       # how fast the code is

A model is a Hugging Face folder, a hub id, or `toy`. Each prompt goes through the chat template of the model,
with thinking turned off, and mixsd.py's `decode` writes the answer with one context. Each task is one row of
the table TASKS.

Accuracy is the mean over problems; the value of a problem with several samples is the mean over its samples.
The 95 % interval is Wilson's, counting each problem once. The answer in a completion is its last
balanced \\boxed{}, or its last fenced code block that defines the function; nothing else counts as an answer.
A wrong completion has the first of these kinds that applies:

    format      it contains no answer
    leakage     it names a taught subject or a taught KGFact entity that the prompt does not name
    collapse    it has fewer than 80 characters besides the box
    genuine     it is wrong for another reason

OUT (default: RUN for RUN/model, otherwise runs/eval-MODEL) holds TASK.jsonl, which grows by one line per
completion, and eval.json. A killed evaluation continues from these files. eval.json holds:

    model, settings         what was measured, and how, with the VERSION of the tasks; OUT refuses results
                            with other settings
    tasks {task: score}     accuracy, n (problems), low, high, samples, errors {kind: n};
                            or nll (nats/token), tokens, n. The drift tasks also have base_nll, rise, the
                            difference, with its 95 % interval low, high, and kl, KL(base || model) in
                            nats/token over the full vocabulary. Every score has "of" (how many
                            problems can be asked), "partial" (whether n is less)
    average, average_of     the mean accuracy, and its tasks: those of the paper's five benchmarks that were
                            measured, or if there are none, those of arc_easy and held_out
    base_out                the --base folder, where the base was measured
    base, base_average      the scores of the base, and their average over the same tasks
    retention               average / base_average; retention_interval is its 95 % interval
    seconds, peak_gib       the seconds of all sessions, the peak memory of the last session

The HumanEval sandbox does not protect against:
- holes in the kernel;
- reading files that its user may read: user 65534 if you start as root, otherwise you;
- filling the disk or the memory with many files or processes that each keep within their limit;
- if the kernel refuses namespaces: use of the network, a look at other processes, running on afterwards.
It trusts the tests of the data set. If you distrust a model, use a container as well.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import random
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

import kg_data
import mixsd
from kg_data import InputError, boxed, hub_rows
from mixsd import RunError, read_json, write_json

VERSION = 1             # of the tasks; increases when a change makes old scores incomparable
FIVE = ["gsm8k", "math500", "aime24", "humaneval", "mmlu"]              # the paper's held-out benchmarks
SMALL = ["arc_easy", "held_out"]                                        # held-out tasks for small models
IN_DOMAIN = {               # task: (its corpus, None for the corpus of the run; the split that is asked)
    "recall": (None, "train"), "paraphrase": (None, "paraphrase"), "retrieval": (None, "retrieval"),
    "retrieval-unseen": (None, "retrieval-unseen"), "two-hop": (None, "two-hop"),
    "multi-hop": (None, "multi-hop"), "held_out": ("toy", "held_out"), "kgfunc-test": ("kgfunc", "test"),
    "kgfunc-unseen": ("kgfunc-unseen", "test"), "drift-taught": (None, "train")}


# ------------------------------------------------------------------------------------------------- verdicts
# A judge is called with a completion and an item (see `Task`). It returns (whether the completion is correct,
# the answer that it found in the completion, or None).

def undress(answer):
    r"""`answer` without \text{}, bold, $, % and LaTeX spaces; {,} becomes a comma."""
    words = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 ", answer.replace("{,}", ","))
    return re.sub(r"\\?[$%€£]|\\[,!;: ]|\*\*", "", words).strip()


def judge_number(text, item):
    """Compare the box with the gold answer as numbers (GSM8K).

    The number may have a currency sign, a percent sign, commas between thousands, a full stop at the end, and
    a unit after a space. Two numbers, a sum, a fraction, and "5 million" are not one number.
    """
    scale = r".*\b(?:and|or|to|half|dozen|hundred|thousand|million|billion)\b"
    unit = rf"\s+(?!{scale})[a-z][a-z/ ]*(?:\^\{{?[23]\}}?)?"
    found = re.fullmatch(rf"({kg_data.NUMBER})(?:{unit})?", undress(boxed(text) or "").rstrip("."), re.I)
    return (kg_data.same_answer(found[1], item["gold"]), boxed(text)) if found else (False, None)


def judge_letter(text, item):
    r"""Compare the choice in the box, written as C, (C), \text{(C)}, or C. with its words (MMLU)."""
    found = re.fullmatch(r"\(?([A-D])(?:[).:].*)?", undress(boxed(text) or ""), re.S | re.I)
    letter = found and found.group(1).upper()
    return letter == item["gold"], letter


def judge_math(text, item):
    """Compare the box with the gold answer by the package math-verify (MATH-500, AIME)."""
    from math_verify import parse, verify
    answer, gold = boxed(text), item["gold"]
    if answer is None or kg_data.fold(answer) == kg_data.fold(gold):
        return answer is not None, answer
    return verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}")), answer


def judge_code(text, item):
    """Test the last fenced block that defines the function; if no block does, the last block."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", text, re.S | re.I)
    defining = [b for b in blocks if re.search(rf"\bdef\s+{item['entry_point']}\b", b)]
    code = (defining or blocks or [None])[-1]
    return code is not None and run_program(item, code)[0], code


def judge_in_domain(text, item):
    """Judge by the verifier with which mixsd.py makes targets."""
    answer = kg_data.extract(text, item["verify"])
    return kg_data.is_correct(text, item["gold"], item["verify"]), answer


def error_kind(text, prompt, extracted, entities):
    """The kind of a wrong completion: the first that applies, see the top of this file."""
    if extracted is None:
        return "format"
    if any(kg_data.names(text, e) and not kg_data.names(prompt, e) for e in entities):
        return "leakage"
    box = rf"\boxed{{{boxed(text)}}}"
    return "collapse" if len(text.strip()) - (len(box) if boxed(text) is not None else 0) < 80 else "genuine"


# ----------------------------------------------------------------------------- HumanEval: model-written code

WALL_SECONDS = 10
LIMITS = {"RLIMIT_CPU": WALL_SECONDS, "RLIMIT_AS": 2 * 2**30, "RLIMIT_FSIZE": 2**20, "RLIMIT_NOFILE": 64,
          "RLIMIT_CORE": 0, "RLIMIT_NPROC": 32}     # per process; NPROC: new processes of its user
NAMESPACES = 0x70000000                             # CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET


def harness():
    """The source of this function is the script that `python -I` runs for one program, in three processes.

    The supervisor gives up its rights, sets limits, opens namespaces, and waits. The checker, the first
    process of the pid namespace (all others end with it), runs the checks and prints the token. The worker,
    forked before the checker reads the token, runs the program and answers each call with Python literals.
    What the program patches, prints, raises or returns can't change the checks: they compare plain values in
    the checker, and the worker can't open the memory or the pipes of the checker (PR_SET_DUMPABLE).
    """
    import os, sys                                                                      # noqa: E401
    if os.getuid() == 0:                        # Python's folder may be closed to other users: open it now
        sys.path[:] = [f"/proc/self/fd/{os.open(p, os.O_RDONLY)}" for p in sys.path if os.path.isdir(p)]
        sys.modules["encodings"].__path__ = [f"{p}/encodings" for p in sys.path]
    import ast, contextlib, ctypes, glob, json, resource                                # noqa: E401
    libc, (limits, apart) = ctypes.CDLL(None), json.loads(sys.argv[1])
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    uid, busy = os.getuid(), 0
    for task in glob.glob("/proc/[0-9]*/task/*"):
        with contextlib.suppress(OSError):      # the process may have ended
            busy += os.stat(task).st_uid == uid
    libc.prctl(4, 0, 0, 0, 0)                   # PR_SET_DUMPABLE
    libc.prctl(38, 1, 0, 0, 0)                  # PR_SET_NO_NEW_PRIVS
    libc.prctl(1, 9, 0, 0, 0)                   # PR_SET_PDEATHSIG: end when eval.py ends
    namespaces = libc.unshare(apart) == 0
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())     # no rights in them
    for name, limit in (limits | {"RLIMIT_NPROC": limits["RLIMIT_NPROC"] + busy}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    print(json.dumps({"uid": uid, "namespaces": namespaces}), flush=True)
    if checker := os.fork():
        os.waitpid(checker, 0)
        os._exit(0)

    libc.prctl(1, 9, 0, 0, 0)
    pipes = os.pipe() + os.pipe()               # calls: read end, write end; replies: the same
    if os.fork() == 0:
        calls, replies = os.fdopen(pipes[0]), os.fdopen(pipes[3], "w")
        for fd in (0, 1, 2, pipes[1], pipes[2]):
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)

        def plain(x):
            if isinstance(x, dict):
                return {plain(k): plain(v) for k, v in x.items()}
            kind = next((kind for kind in (list, tuple, set) if isinstance(x, kind)), None)
            return kind(map(plain, x)) if kind else x
        program, name = ast.literal_eval(calls.readline())
        exec(program, space := {"__name__": "program"})
        for call in calls:
            print(ascii(plain(space[name](*ast.literal_eval(call)))), file=replies, flush=True)
        os._exit(0)

    os.close(pipes[0]), os.close(pipes[3])
    calls, replies, job = os.fdopen(pipes[1], "w"), os.fdopen(pipes[2]), json.load(sys.stdin)

    def candidate(*args):
        print(ascii(args), file=calls, flush=True)
        return ast.literal_eval(replies.readline())         # SyntaxError if the worker has ended
    print(ascii((job["prompt"] + job["code"], job["name"])), file=calls, flush=True)
    exec(job["prompt"] + "\n" + job["test"], space := {})   # helpers from the prompt, not from the model
    space[job["name"]] = candidate                          # a test may call the function by its name
    space["check"](candidate)
    print(job["token"])


def run_program(item, code):
    """(passed, report): whether the program of the prompt, completed by `code`, passes its checks.

    item    has "prompt", "test" and "entry_point" of a row of HumanEval
    report  {"uid", "namespaces"} of the program; None if it was stopped
    """
    job = {"prompt": item["prompt"], "code": code, "test": item["test"], "name": item["entry_point"],
           "token": secrets.token_hex(16)}
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)                  # PR_SET_DUMPABLE: this memory holds the token too
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)                             # if root starts it, the program has another user
        program = inspect.getsource(harness) + "harness()"
        process = subprocess.Popen([sys.executable, "-I", "-c", program, json.dumps([LIMITS, NAMESPACES])],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   cwd=folder, env={}, start_new_session=True, text=True)
        try:
            said = process.communicate(json.dumps(job), timeout=WALL_SECONDS)[0].splitlines()
        except subprocess.TimeoutExpired:
            said = []
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)      # and what a finished program left in its group
            process.wait()
    return said[1:] == [job["token"]], json.loads(said[0]) if said else None


def protections():
    """One line that says which limits are in force here. Raises RunError if a right program fails."""
    checks = "def check(f):\n    assert f(2) == 4\n"
    item = {"prompt": "def f(x):\n    ''\n", "test": checks, "entry_point": "f"}
    passed, report = run_program(item, "    return 2 * x\n")
    if not passed:
        raise RunError(f"humaneval: the sandbox fails a right program; does {sys.executable} -I run here?")
    apart = ("user, network and pid namespaces of its own" if report["namespaces"] else
             "NO namespaces, which the kernel refuses: the network is open")
    return (f"each program as uid {report['uid']}, in an empty folder, with an empty environment; {apart}; "
            f"at most {WALL_SECONDS} s; {LIMITS}")


# ---------------------------------------------------------------------------------------- items and prompts

def from_hub(name, config, split, item_of, first=None):
    """A Task's `load`: item_of(row) for the rows, or the `first` rows, of a data set."""
    def load(args):
        rows = hub_rows(name, config, split, args.hub)
        return [item_of(row) for row in itertools.islice(rows, first)]
    return load


def mmlu_block(row, answer=""):
    """A question, its choices on one line each, and the line of the answer."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"]))
    return f"{row['question']}\n{choices}\nAnswer:{answer}"


def load_mmlu(args):
    """The test questions of MMLU, each after five solved questions of its subject."""
    shots = {}
    for row in hub_rows("cais/mmlu", "all", "dev", args.hub):
        shots.setdefault(row["subject"], []).append(mmlu_block(row, rf" \boxed{{{'ABCD'[row['answer']]}}}"))
    return [{"subject": row["subject"], "gold": "ABCD"[row["answer"]],
             "blocks": shots[row["subject"]][:5] + [mmlu_block(row)]}
            for row in hub_rows("cais/mmlu", "all", "test", args.hub)]


def load_wikitext(args):
    """The test text of WikiText-2 in windows of args.width tokens of args.tokenizer."""
    rows = hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test", args.hub)
    text = "\n\n".join(row["text"] for row in rows)         # the usual way, so that perplexities compare
    ids = args.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [{"ids": ids[i:i + args.width]} for i in range(0, len(ids) - 1, args.width)]


def load_in_domain(corpus, split, args):
    """The questions of a split of `corpus`, or if it is None, of the corpus that the run was taught.

    If only the first facts were taught (--limit of the run), only questions that they answer are asked.
    """
    if corpus:
        data, style, verify, taught = corpus, "boxed", kg_data.find_corpus(corpus)[1].verify, None
    else:
        data, style, verify, taught = (args.run.get(key) for key in ("data", "style", "verify", "limit"))
    records = kg_data.load_corpus(data, split, style, verify, hub=args.hub)
    if split in ("train", "paraphrase", "retrieval"):       # one question per fact, in the order of the facts
        records = records[:taught]
    elif split in ("two-hop", "multi-hop"):                 # a question needs several facts
        facts = kg_data.load_corpus(data, "train", style, verify, hub=args.hub)[:taught]
        known = {record["fact"] for record in facts}
        records = [record for record in records if known >= {*record["needs"]}]
    return [{"question": r["messages"][0]["content"], "gold": r.get("answer"), "verify": verify}
            for r in records]


def math_prompt(item):
    """The paper's prompt for AIME, MATH-500 and GSM8K."""
    return ("Think step-by-step to solve the following problem. Output your answer inside of \\boxed{} tags.:"
            f"\n{item['question']}\n\nLet's think step-by-step")


def code_prompt(item):
    """The paper's prompt for HumanEval."""
    return ("Complete the following Python function. Return ONLY the complete function inside a ```python "
            f"code block, nothing else.\n\n```python\n{item['prompt'].rstrip()}\n```")


def mmlu_prompt(item):
    """The paper's prompt for MMLU: five solved questions of the subject, then the question of the item."""
    return ("The following are multiple choice questions (with answers) about "
            f"{item['subject'].replace('_', ' ')}. Put your final answer inside \\boxed{{}} as one of A, B, "
            "C, or D.\n\n" + "\n\n".join(item["blocks"]))


# ------------------------------------------------------------------------------ ways to answer, and the table
# `generated`, `chosen`, `windowed` and `drifted` take (subject, task, todo, args), where todo is a list of
# (item, sample). They yield (item, sample, row), where row is what TASK.jsonl holds of one completion.

class Subject(NamedTuple):
    """The model that is measured."""
    model: torch.nn.Module
    tokenizer: object
    stops: list


def load_subject(model, args, dtype):
    """The Subject of a --model, its weights in `dtype`; toy is the toy base of --seed.

    If --decode-tokens is not given, it is set to what the memory holds beside the model.
    """
    path = mixsd.toy_base(args.quiet, args.seed or 0)[0] if model == "toy" else model
    model, tokenizer = mixsd.load_model(path, dtype, args.device)
    args.decode_tokens = args.decode_tokens or mixsd.kv_slots(model)
    return Subject(model, tokenizer, mixsd.stop_ids(model, tokenizer))


def generated(subject, task, todo, args):
    """The model writes a completion, and task.verdict judges it."""
    for sample in sorted({sample for _, sample in todo}):
        items = {item["id"]: item for item, s in todo if s == sample}
        prompts = {i: item["ids"] for i, item in items.items()}
        for i, ids in mixsd.answers(subject.model, subject.stops, prompts, args, args.temperature, sample):
            text, ended = mixsd.text_of(subject.tokenizer, ids, subject.stops), ids[-1] in subject.stops
            asked = items[i]["asked"]
            correct, extracted = task.verdict(text, items[i]) if ended or not task.must_end else (False, None)
            kind = None if correct else error_kind(text, asked, extracted, args.entities)
            yield items[i], sample, {"prompt": asked, "text": text, "ended": ended, "extracted": extracted,
                                     "gold": items[i]["gold"], "correct": correct, "kind": kind}


def chosen(subject, task, todo, args):
    """The model answers with the choice whose text has the lowest mean NLL after the prompt."""
    for item, sample in todo:
        pairs = [(item["ids"], mixsd.written_ids(subject.tokenizer, text, [])) for text in item["choices"]]
        nll = [nlls.mean().item() for nlls in mixsd.token_nlls(subject.model, pairs, 0, args.micro_tokens)]
        text = item["choices"][nll.index(min(nll))]
        yield item, sample, {"prompt": item["asked"], "text": text, "gold": item["gold"],
                             "correct": text == item["gold"], "nll": nll}


def windowed(subject, task, todo, args):
    """The NLL of a window of text; its first token is context only."""
    for item, sample in todo:
        pair = item["ids"][:1], item["ids"][1:]
        nlls, = mixsd.token_nlls(subject.model, [pair], 0, args.micro_tokens)
        yield item, sample, {"tokens": len(nlls), "nll": nlls.mean().item()}


def drifted(subject, task, todo, args):
    """The NLL of the greedy answer of the base, under the base and under the model, and KL(base || model)."""
    base, items = load_subject(args.base_model, args, args.dtype), {item["id"]: item for item, _ in todo}
    prompts = {i: item["ids"] for i, item in items.items()}
    for i, ids in mixsd.answers(base.model, base.stops, prompts, args):
        text = mixsd.text_of(base.tokenizer, ids, base.stops)
        pair = items[i]["ids"], ids
        with torch.no_grad():
            (p, y), (q, _) = (mixsd.target_logits(s.model, [pair], 0) for s in (base, subject))  # (N, V)
        yield items[i], 0, {"prompt": items[i]["asked"], "text": text, "tokens": len(ids),
                            "base_nll": mixsd.nll(p, y).mean().item(),
                            "nll": mixsd.nll(q, y).mean().item(), "kl": mixsd.kl(q, p).mean().item()}


class Task(NamedTuple):
    """A row of TASKS."""
    load: Callable                  # (args) -> all items: dicts, most with "gold"
    prompt: Callable | None         # (item) -> str, a user turn
    verdict: Callable | None        # (text, item) -> (correct, extracted or None)
    max_new_tokens: int             # the paper's
    answer: Callable = generated    # how the model answers: one of the four functions above
    must_end: bool = False          # a completion that the length limit cuts is wrong, as in mixsd.py


QUESTION = operator.itemgetter("question")                  # the prompt is only the question
ARC = "allenai/ai2_arc", "ARC-Easy", "test", lambda row: {
    "question": row["question"], "choices": row["choices"]["text"],
    "gold": dict(zip(row["choices"]["label"], row["choices"]["text"]))[row["answerKey"]]}
TASKS: dict[str, Task] = {
    "gsm8k": Task(from_hub("openai/gsm8k", "main", "test", lambda row: {
        "question": row["question"], "gold": row["answer"].split("####")[-1].strip()}),
        math_prompt, judge_number, 16384),
    "math500": Task(from_hub("HuggingFaceH4/MATH-500", None, "test", lambda row: {
        "question": row["problem"], "gold": row["answer"]}), math_prompt, judge_math, 16384),
    "aime24": Task(from_hub("HuggingFaceH4/aime_2024", None, "train", lambda row: {
        "question": row["problem"], "gold": row["answer"]}), math_prompt, judge_math, 16384),
    "humaneval": Task(from_hub("openai/openai_humaneval", None, "test", lambda row: row | {
        "gold": row["canonical_solution"]}), code_prompt, judge_code, 16384),
    "mmlu": Task(load_mmlu, mmlu_prompt, judge_letter, 1024),
    "arc_easy": Task(from_hub(*ARC), QUESTION, None, 0, chosen),
    "wikitext": Task(load_wikitext, None, None, 0, windowed),
    "drift": Task(from_hub(*ARC, first=50), QUESTION, None, 64, drifted),
} | {task: Task(functools.partial(load_in_domain, *of), QUESTION, judge_in_domain, 1024, must_end=True)
     for task, of in IN_DOMAIN.items()}
TASKS["drift-taught"] = TASKS["drift"]._replace(load=TASKS["drift-taught"].load)


# ----------------------------------------------------------------------------------------------- evaluation

def accuracies(rows):
    """{question id: the share of its samples that are correct}"""
    verdicts = {}
    for row in rows:
        verdicts.setdefault(row["id"], []).append(row["correct"])
    return {i: statistics.fmean(samples) for i, samples in verdicts.items()}


def scored(rows):
    """The score of the rows of a task: accuracy, interval and errors if they were judged, else nats/token."""
    n, total = len({row["id"] for row in rows}), sum(row.get("tokens", 0) for row in rows)
    if "correct" in rows[0]:
        score = mixsd.score(accuracies(rows).values())
        score |= {"samples": len(rows) / n,
                  "errors": dict(Counter(row["kind"] for row in rows if row.get("kind")))}
    else:
        score = {key: sum(row[key] * row["tokens"] for row in rows) / total
                 for key in ("nll", "base_nll", "kl") if key in rows[0]}
        if "base_nll" in score:
            rise = score["nll"] - score["base_nll"]
            apart = sum(((row["nll"] - row["base_nll"] - rise) * row["tokens"]) ** 2 for row in rows)
            reach = 1.96 * math.sqrt(apart) / total         # 95 %, with one observation per question
            score |= {"rise": rise, "low": rise - reach, "high": rise + reach}
        score |= {"tokens": total, "n": n}
    return score | {"partial": n < rows[0]["of"], "of": rows[0]["of"]}


def averaged(tasks):
    """(the mean accuracy or None, the tasks it is over): the measured tasks of FIVE, or else of SMALL."""
    names = [t for t in FIVE if t in tasks] or [t for t in SMALL if t in tasks]
    return statistics.fmean(tasks[t]["accuracy"] for t in names) if names else None, names


def refuse_other(where, held, wanted):
    """Raise InputError with the name of the first setting in which the results there differ from `wanted`."""
    for key, value in wanted.items():
        if held.get(key) != value:
            raise InputError(f"{where} holds results with {key} {held.get(key)}, this asks for {value}; "
                             f"give another folder")


def load_items(name, args):
    """The items of a task, or args.limit random ones, in their order.

    Each has "id", its position, "of", the number of all, "asked", its prompt, and "ids", those of the prompt.
    """
    items, prompt = TASKS[name].load(args), TASKS[name].prompt
    if not items:
        raise InputError(f"{name}: there is no question whose facts were all taught (--limit of the run)")
    order = list(range(len(items)))
    random.Random(f"subset seed {args.seed}").shuffle(order)
    items = [items[i] | {"id": i, "of": len(items)} for i in sorted(order[:args.limit])]
    for item in items if prompt else []:
        item["asked"] = prompt(item)
        item["ids"] = mixsd.chat_ids(args.tokenizer, item["asked"])
    return items


def fit(name, items, default, subject, args):
    """The longest answer, in tokens: --max-new-tokens, else `default`, cut to the positions left.

    Raises InputError if the longest prompt does not leave --max-new-tokens positions.
    """
    longest, positions = max(len(item["ids"]) for item in items), mixsd.max_positions(subject.model)
    asked, room = args.max_new_tokens or 1, positions - longest
    if asked > room:
        raise InputError(f"{name}: prompt of {longest:,} tokens + {asked:,} new > {positions:,}, the model's "
                         f"positions (--max-new-tokens)")
    if not args.max_new_tokens and default > room:
        print(f"{name}: max-new-tokens clipped to {room:,}: the model has {positions:,} positions")
    return args.max_new_tokens or min(default, room)


def of_task(name, items, subject, args):
    """A copy of `args` with the length, the temperature and the number of samples for one task."""
    task, own, args = TASKS[name], name in IN_DOMAIN, argparse.Namespace(**vars(args))
    if task.answer is not generated:
        args.max_new_tokens, args.samples = task.max_new_tokens, 1
        return args
    sampled = args.paper and not own                        # a taught fact is asked greedily, as by mixsd.py
    args.temperature = 1.0 if sampled else 0.0
    args.samples = 16 if sampled and name == "aime24" else 1
    default = own and args.run.get("max_new_tokens") or task.max_new_tokens
    args.max_new_tokens = fit(name, items, default, subject, args)
    return args


ALIKE = ("seed", "limit", "max_new_tokens", "paper", "version")          # equal for base and run


def evaluate(args):
    """Measure `args.tasks`; returns what eval.json holds (see the top of this file)."""
    settings = {k: getattr(args, k) for k in (*ALIKE, "model", "dtype")}
    settings |= {k: args.run.get(k) for k in ("data", "style", "verify")}
    files = sorted(Path(args.model).glob("*.safetensors"))
    settings["weights"] = [file.stat().st_mtime_ns for file in files]       # they change with training
    ledger = {"model": args.model, "settings": settings, "tasks": {}, "seconds": 0.0}
    ledger |= read_json(args.out, "eval.json")
    refuse_other(args.out, ledger["settings"], settings)
    args.base = args.base or ledger.get("base_out")
    base = base_scores(args, [*ledger["tasks"], *args.tasks]) if args.base else {}
    subject = load_subject(args.model, args, args.dtype)
    args.tokenizer, args.width = subject.tokenizer, min(1024, mixsd.max_positions(subject.model))
    items = {t: load_items(t, args) for t in args.tasks}
    each = {t: of_task(t, items[t], subject, args) for t in args.tasks}
    if "humaneval" in args.tasks:
        print(f"humaneval: {protections()}", flush=True)
    with mixsd.only_run(args.out):
        ledger |= read_json(args.out, "eval.json")          # until now, another process may have added to it
        write_json(args.out / "eval.json", ledger)
        for t in args.tasks:
            start = time.time()
            ledger["tasks"][t] = scored(answered(t, items[t], subject, each[t]))
            ledger["seconds"] += time.time() - start
            ledger |= against_base(ledger["tasks"], base, args) | {"peak_gib": mixsd.peak_gib()}
            write_json(args.out / "eval.json", ledger)
    return ledger


def answered(name, items, subject, args):
    """Read the rows of OUT/TASK.jsonl, generate and append the missing rows, return all rows."""
    task, path = TASKS[name], args.out / f"{name}.jsonl"
    rows = mixsd.read_lines(path)
    done = {(row["id"], row["sample"]) for row in rows}
    todo = [(item, s) for s in range(args.samples) for item in items if (item["id"], s) not in done]
    answers = task.answer(subject, task, todo, args)
    for item, sample, row in tqdm(answers, name, len(todo), disable=args.quiet):
        rows.append({"id": item["id"], "of": item["of"], "sample": sample} | row)
        mixsd.append_lines(path, rows[-1:])
    return rows


def base_scores(args, names):
    """{task: score} of --base. Raises InputError if it has other settings or lacks one of `names`."""
    held = read_json(args.base, "eval.json")
    if not held:
        raise InputError(f"--base {args.base}: no eval.json; evaluate the base first, with --out {args.base}")
    refuse_other(f"--base {args.base}", held["settings"], {k: getattr(args, k) for k in ALIKE})
    missing = [t for t in names if t in FIVE + SMALL and t not in held["tasks"]]
    if missing:
        raise InputError(f"--base {args.base} has no {', '.join(missing)}; it has {', '.join(held['tasks'])}")
    return held["tasks"]


def against_base(tasks, base, args):
    """The keys of eval.json from "average" to "retention_interval"; without --base, the base's are None."""
    average, names = averaged(tasks)
    before = averaged({t: base[t] for t in names})[0] if base else None
    return {"average": average, "average_of": names, "base_out": args.base, "base": base or None,
            "base_average": before, "retention": average / before if before else None,
            "retention_interval": retention_interval(names, args) if before else None}


def retention_interval(names, args, draws=2000):
    """[low, high], the 95 % interval of the retention over the tasks `names`: a paired bootstrap.

    For each task with n questions, each draw samples n of them with replacement, the same before and after.
    Raises InputError if the base was asked other questions.
    """
    generator, means = torch.Generator().manual_seed(args.seed), 0.0
    for t in names:
        before, after = (accuracies(row for _, row in kg_data.read_jsonl(Path(folder) / f"{t}.jsonl"))
                         for folder in (args.base, args.out))
        if before.keys() != after.keys():
            raise InputError(f"--base {args.base}: its {t}.jsonl holds other questions than {args.out}")
        pairs = torch.tensor([[before[i], after[i]] for i in after])                        # (n, 2)
        picks = (torch.randint(len(pairs), (len(pairs),), generator=generator) for _ in range(draws))
        means += torch.stack([pairs[pick].mean(0) for pick in picks]) / len(names)          # (draws, 2)
    ratios = (means[:, 1] / means[:, 0])[means[:, 0] > 0]   # the ratio needs a base that is right
    return ratios.quantile(torch.tensor([0.025, 0.975])).tolist()


def print_scores(ledger):
    """Print one line per task, and the average."""
    for task, s in ledger["tasks"].items():
        label = f"  partial: {s['n']:,} of {s['of']:,}" if s["partial"] else ""
        if "nll" in s:
            found = "{nll:.3f} nats/token over {tokens:,} tokens"
            if "rise" in s:
                found += "  {rise:+.3f} [{low:+.3f}, {high:+.3f}] over the base, KL {kl:.3f}"
            print(f"{task:17} {found.format(**s)}{label}")
        else:
            kinds = ", ".join(f"{kind} {count}" for kind, count in s["errors"].items())
            found = "{accuracy:.3f} [{low:.3f}, {high:.3f}]  n {n:,}".format(**s)
            print(f"{task:17} {found}{label}  {kinds}")
    if ledger["average"] is not None:
        partial = " (partial)" if any(ledger["tasks"][t]["partial"] for t in ledger["average_of"]) else ""
        print(f"average of {', '.join(ledger['average_of'])}: {ledger['average']:.3f}{partial}")
    if ledger["retention"] is not None:
        low, high = ledger["retention_interval"]
        print(f"retention {ledger['retention']:.3f} [{low:.3f}, {high:.3f}] = average / average of the base")


# --------------------------------------------------------------------------------- why: target NLL and Fisher

@contextlib.contextmanager
def picture(path, rows=1, **options):
    """Yields the `rows` axes of a new picture, one below the other; saves it as `path` at the end."""
    import matplotlib
    matplotlib.use("agg")                                   # needs no screen
    from matplotlib import pyplot as plt
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(rows, squeeze=False, dpi=150, layout="constrained", **options)
    yield axes[:, 0]
    for panel in axes[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
    print(f"\n{path}")                                      # a blank line ends the table of the report


def target_nll(args):
    """{"files": {file: {"targets", "tokens", "mean", "above_5"}}} of target files, under a base.

    Also draws OUT/target.png (the first target of each file, token by token) and OUT/ecdf.png (the share of
    tokens up to each NLL; paper: the ECDF of target NLL).
    """
    model, tokenizer, stops = load_subject(args.model, args, args.dtype)
    files, firsts, curves = {}, [], {}
    for path in args.nll:
        targets = mixsd.read_targets(path, model, tokenizer, stops)
        nlls = mixsd.token_nlls(model, [(t["x"], t["target_ids"]) for t in targets], 0, args.micro_tokens)
        firsts.append((targets[0], nlls[0].tolist()))
        nll = torch.cat(nlls).double()                      # (N,) nats
        curves[path] = nll.tolist()
        files[path] = {"targets": len(targets), "tokens": len(nll), "mean": nll.mean().item(),
                       "above_5": (nll > 5).double().mean().item()}
        print("{path}: {mean:.3f} nats/token, {above_5:.2%} of {tokens:,} tokens above 5".format(
            path=path, **files[path]), flush=True)
    draw_targets(firsts, tokenizer, args.out / "target.png")
    draw_ecdf(curves, args.out / "ecdf.png")
    return {"model": args.model, "files": files, "peak_gib": mixsd.peak_gib()}


def draw_targets(firsts, tokenizer, path):
    """Draw one bar per target token: its height is the NLL, its colour shows who supplied the token.

    firsts  [(target, [nats of each of its tokens])], drawn one below the other on the same scale
    """
    longest = max(len(nlls) for _, nlls in firsts)
    looks = {mixsd.EXPERT: ("tab:blue", "the expert"), mixsd.NAIVE: ("tab:orange", "the naive"),
             None: ("tab:red", "the corpus")}
    with picture(path, len(firsts), sharey=True, figsize=(9, 2.3 * len(firsts))) as panels:
        for axes, (target, nlls) in zip(panels, firsts):
            source = target["source"] or [None] * len(nlls)
            for who, (colour, label) in looks.items():
                places = [t for t, s in enumerate(source) if s == who]
                if places:
                    bars = axes.bar(places, [nlls[t] for t in places], color=colour, label=label)
                    axes.bar_label(bars, fmt="%.1f", fontsize=8)
            words = [tokenizer.decode([i]).strip() or "space" for i in target["target_ids"]]
            axes.set_xticks(range(len(nlls)), words, rotation=30, ha="right")
            for word, who in zip(axes.get_xticklabels(), source):       # a bar near 0 can't be seen
                word.set_color(looks[who][0])
            axes.set(xlim=(-0.6, longest - 0.4), ylabel="NLL, nats")
            axes.set_title(f"{sum(nlls) / len(nlls):.2f} nats/token", loc="right", fontsize=10)
            axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
            axes.margins(y=0.15)


def draw_ecdf(curves, path):
    """Draw {file: [nats of each token]} as curves: which share of the tokens has at most this NLL."""
    with picture(path, figsize=(6.4, 4)) as (axes,):
        for file, nats in curves.items():
            axes.ecdf(nats, label=f"{Path(file).parent.name}: {statistics.fmean(nats):.2f} nats/token")
        axes.set(xlabel="NLL of a target token under the base, nats", ylabel="share of tokens",
                 ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="lower right")


def fisher_diagonal(model, examples, pad_id, quiet=True):
    """{name: F}: F_i = mean over the examples of (d log p(y|x) / d theta_i)^2, squared per sequence.

    examples  [(prompt ids, target ids)]
    A tied weight is one parameter. Memory holds the weights, their gradients, and F.
    """
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in tqdm(examples, "fisher", disable=quiet):
        mixsd.nll(*mixsd.target_logits(model, [example], pad_id)).sum().backward()
        for name, p in model.named_parameters():
            fisher[name].addcmul_(p.grad, p.grad, value=1 / len(examples))
            p.grad = None
    return fisher


@torch.no_grad()
def alignment(fisher, base, tuned):
    """How far the weights moved, and how much of this lies in directions to which the base is sensitive.

    With d = tuned - base: squared_distance = sum d^2, fisher_distance = sum F d^2, fisher_mean = mean F, and
    R = fisher_distance / squared_distance / fisher_mean, which is None if nothing moved. All arguments are
    {name: tensor}.
    """
    add = functools.partial(torch.sum, dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)              # of F d^2, d^2, F
    for name, f in fisher.items():
        d2 = (tuned[name] - base[name]).square()
        sums += torch.stack([add(f * d2), add(d2), add(f)]).cpu()
    weighted, squared, total = sums.tolist()
    mean = total / sum(f.numel() for f in fisher.values())
    return {"R": weighted / squared / mean if squared and mean else None, "squared_distance": squared,
            "fisher_distance": weighted, "fisher_mean": mean}


def base_fisher(base, args):
    """The Fisher diagonal of the base on its greedy answers to `fisher_n` prompts, as many per task."""
    args.limit, args.tokenizer = math.ceil(args.fisher_n / len(args.fisher_tasks)), base.tokenizer
    items = [item for t in args.fisher_tasks for item in load_items(t, args)][:args.fisher_n]
    args.max_new_tokens = fit("--fisher", items, 256, base, args)
    prompts = {i: item["ids"] for i, item in enumerate(items)}
    answers = mixsd.answers(base.model, base.stops, prompts, args)
    return fisher_diagonal(base.model, [(prompts[i], ids) for i, ids in answers], 0, args.quiet)


def correlation(groups, x, y):
    """(Pearson's r, n): average x and y over the runs of each method, correlate over the n methods.

    r is None for fewer than 3 methods, or if one side is constant.
    """
    known = [[(run[x], run[y]) for run in group if None not in (run[x], run[y])] for group in groups]
    means = [[statistics.fmean(side) for side in zip(*pairs)] for pairs in known if pairs]
    varied = all(len(set(side)) > 1 for side in zip(*means))
    return statistics.correlation(*zip(*means)) if len(means) > 2 and varied else None, len(means)


CAUSES = "nll", "kl", "R", "squared_distance", "fisher_distance"    # what may go with forgetting


def fisher_runs(args):
    """The alignment of each run, also in RUN/fisher.json, and how it correlates with what the run forgot.

    Returns {"runs": {run: alignment}, "correlation": {LOSS_KEY: Pearson's r over methods}, "methods":
    {LOSS_KEY: how many methods}}, where a method is the mean of its seeds. LOSS is drop (held-out accuracy
    before minus after) or drift. KEY is one of CAUSES: nll of the targets, kl of the task drift-taught (RL's
    Razor, arXiv 2509.04259), or what `alignment` returns. The weights of the base, of a run and F are in
    memory, in float32.
    """
    runs = {folder: read_run(folder) for folder in args.fisher}
    base = load_subject(args.base, args, "float32")
    weights, fisher = dict(base.model.named_parameters()), base_fisher(base, args)
    for folder, run in runs.items():
        if args.base == "toy" and run["seed"] != args.seed:
            raise InputError(f"{folder}: its toy base is not --base toy, which is that of --seed {args.seed}")
        tuned = dict(load_subject(f"{folder}/model", args, "float32").model.named_parameters())
        if {name: p.shape for name, p in tuned.items()} != {name: p.shape for name, p in weights.items()}:
            raise InputError(f"{folder}/model: its weights are not like those of --base {args.base}")
        found = alignment(fisher, weights, tuned)
        write_json(Path(folder) / "fisher.json", found | {
            "base": args.base, "tasks": args.fisher_tasks, "n": args.fisher_n, "responses": "greedy"})
        run |= found
        print(f"{folder}:", ", ".join(f"{key} {mean_and_spread([run[key]], 3)}"
                                      for key in ("R", "squared_distance", "drop", "drift")))
    groups, r, n = grouped(list(runs), list(runs.values())).values(), {}, {}
    for loss, key in itertools.product(("drop", "drift"), CAUSES):
        pair = f"{loss}_{key}"
        r[pair], n[pair] = correlation(groups, loss, key)
        print(f"Pearson's r of {loss} and {key}: {mean_and_spread([r[pair]])}, methods: {n[pair]}")
    return {"runs": {folder: read_json(folder, "fisher.json") for folder in runs}, "correlation": r,
            "methods": n, "peak_gib": mixsd.peak_gib()}


# ------------------------------------------------------------------------------------------------- how fast

PARTS, ROUNDS = ["decode", "generate", "train", "trl"], 5   # rounds of each part, after one to warm up


@torch.no_grad()
def gaps(model, contexts, source, answers):
    """(N,) how far, in logits, each decoded token lies below the best token of its speaker.

    The speaker reads its prompt and the prefix again, without a cache. By the definition of mixed decoding at
    temperature 0, all gaps are 0. The arguments and the answers are those of mixsd.decode.
    """
    logits = torch.stack([mixsd.target_logits(model, list(zip(prompts, answers)), 0)[0]
                          for prompts in contexts])                             # (C, N, V)
    speaker = torch.cat([row[:len(y)] for row, y in zip(source, answers)]).to(logits.device)    # (N,)
    logits = logits[speaker, torch.arange(len(speaker), device=logits.device)].float()          # (N, V)
    tokens = torch.tensor(sum(answers, []), device=logits.device)
    return logits.max(-1).values - logits.gather(1, tokens[:, None])[:, 0]


def not_finite(model, lengths, quiet):
    """The lengths of a row that give no finite gradient, in a batch with a short, left-padded row.

    Some attention kernels return NaN for rows that see only padding, at some lengths modulo 128.
    """
    bad = []
    for L in tqdm(lengths, "lengths", disable=quiet):
        pairs = [([1] * (L - 8), [2] * 8), ([1] * 8, [2] * 8)]
        mixsd.nll(*mixsd.target_logits(model, pairs, 0)).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        bad += [] if norm.isfinite() else [L]
        model.zero_grad()
    return bad


def bench(args):
    """Check decoding and gradients, time the parts of args.bench; returns {part: median, min, max s, ratio}.

    decode    mixed decoding of args.batch_size examples of KGFact, args.max_new_tokens each, without a stop
    generate  model.generate on the same prompts, those of both contexts
    train     one optimizer step on the canonical targets of the examples
    trl       the same in SFTTrainer of TRL
    """
    model, tokenizer, _ = load_subject(args.model, args, args.dtype)
    facts, T = kg_data.load_corpus("kgfact-small", "train", "sentence"), args.max_new_tokens
    never = [model.config.vocab_size - 1]                   # a stop token that a language model hardly writes
    records = [facts[i % len(facts)] for i in range(args.batch_size)]
    pairs = [mixsd.two_contexts(tokenizer, r, kg_data.SENTENCE_WORDS) for r in records]
    contexts, source = list(map(list, zip(*pairs))), mixsd.draw_sources(0.3, T, args.seed, range(len(pairs)))
    few = [prompts[:8] for prompts in contexts]
    gap = gaps(model, few, source[:8], mixsd.decode(model, few, source[:8], never)).cpu()
    print(f"decoding: {(gap == 0).sum()} of {len(gap)} tokens equal the definition; the largest gap of the "
          f"others is {gap.max():.3g} in logits (near 16, bfloat16 has steps of 0.125)", flush=True)
    lengths = range(128, 256, 1 if args.device.startswith("cuda") else 32)      # a CPU has no such kernels
    bad = not_finite(model, lengths, args.quiet)
    print(f"gradients: finite at {len(lengths) - len(bad)} of {len(lengths)} lengths {bad or ''}", flush=True)

    ids, mask = (t.to(model.device) for t in mixsd.left_pad(sum(contexts, []), 0))
    steps = {"decode": lambda: mixsd.decode(model, contexts, source, never),
             "generate": lambda: model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=T,
                                                do_sample=False, eos_token_id=never[0], pad_token_id=0)}
    if "train" in args.bench:
        steps["train"] = optimizer_step(model, tokenizer, pairs, records, args)
    parts = {}
    for part in args.bench:
        times = trl_times(model, tokenizer, records, args) if part == "trl" else []
        for _ in range(1 + ROUNDS if part in steps else 0):
            times.append(clock(args))
            steps[part]()
            times.append(clock(args))
        seconds = [end - start for start, end in zip(times[2::2], times[3::2])]
        parts[part] = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
        print("{part:10} {median:.4f} s [{min:.4f}, {max:.4f}]".format(part=part, **parts[part]), flush=True)
    for part, own in (("generate", "decode"), ("trl", "train")):
        if {part, own} <= parts.keys():
            ratio = parts[part]["ratio"] = parts[part]["median"] / parts[own]["median"]
            print(f"{part} takes {ratio:.2f} x the time of {own}")
    print(f"peak memory {mixsd.peak_gib():.2f} GiB")
    return {"model": args.model, "device": args.device, "dtype": args.dtype, "batch_size": args.batch_size,
            "new_tokens": T, "largest_gap": gap.max().item(), "not_finite": bad, "parts": parts,
            "peak_gib": mixsd.peak_gib()}


def clock(args):
    """Wait until a GPU has finished its work, then return the time in seconds."""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.time()


def optimizer_step(model, tokenizer, pairs, records, args):
    """A function that makes one optimizer step of mixsd.py on the records, at a learning rate of 0."""
    masters, sft = model, argparse.Namespace(method="sft", kl_to_base=None)
    examples = [mixsd.Example(i, [], x, mixsd.written_ids(tokenizer, r["messages"][1]["content"], [0]))
                for i, ((_, x), r) in enumerate(zip(pairs, records))]
    if args.dtype != "float32":
        masters = copy.deepcopy(model).float()
        mixsd.follow(model, masters)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=0.0, fused=True)
    return lambda: mixsd.update(model, masters, optimizer, examples, lambda part: mixsd.token_losses(
        model, None, part, sft, 0), 0.0, args.micro_tokens)


def trl_times(model, tokenizer, records, args):
    """[the times at which each step of SFTTrainer on the records starts and ends]"""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    times = []

    class Times(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(clock(args))
        on_step_end = on_step_begin
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, max_steps=1 + ROUNDS, learning_rate=0.0,
                           per_device_train_batch_size=args.batch_size, use_cpu=args.device == "cpu",
                           bf16=args.dtype == "bfloat16", gradient_checkpointing=False,
                           save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True)
        rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in records]
        SFTTrainer(copy.deepcopy(model).float(), config, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer, callbacks=[Times()]).train()
    return times


# --------------------------------------------------------------------------------------------------- report

COLUMNS = {                                                 # of the report: {key of read_run: (head, digits)}
    "kept": ("kept", 2), "recall": ("recall", 2), "recall-kept": ("of the kept", 2),
    "paraphrase": ("paraphrase", 2), "two-hop": ("two-hop", 2), "held_out": ("held-out", 2),
    "retention": ("retention", 2), "wikitext": ("WikiText", 3), "drift": ("drift", 3), "kl": ("KL taught", 3),
    "nll": ("target NLL", 2), "R": ("R", 2), "squared_distance": ("‖d‖²", 2), "decoded": ("decoded", 0),
    "trained": ("trained tokens", 0), "seconds": ("s", 0)}


def read_run(folder):
    """What the report shows of a run: metrics.json, fisher.json and each eval.json below its folder.

    Returns {column: value, or None if it was not measured}, the same for its base under "base", the 95 %
    intervals under "interval", "drop" (held-out accuracy before - after), and the settings of the run.
    """
    m, fisher = read_json(folder, "metrics.json"), read_json(folder, "fisher.json")
    if not m:
        raise InputError(f"{folder}: no metrics.json; a finished run of mixsd.py is expected")
    ledgers = [read_json(path.parent, path.name) for path in sorted(Path(folder).rglob("eval.json"))]
    before, after = {}, {}
    for held in [*ledgers, {"tasks": m["tuned"], "base": m["base"]}]:
        before, after = before | (held.get("base") or {}), after | (held["tasks"] or {})

    def values(tasks):
        return {t: score.get("rise", score.get("nll", score.get("accuracy"))) for t, score in tasks.items()}
    (held_out, names), targets = averaged(after), m["targets"] or {"kept": None, "nll": None}
    at_first = averaged({t: before[t] for t in names})[0] if {*names} <= before.keys() else None
    interval = {t: [score["low"], score["high"]] for t, score in after.items() if "low" in score}
    interval |= {"retention": held["retention_interval"] for held in ledgers
                 if held.get("retention_interval") and held["average_of"] == names}
    return dict.fromkeys(COLUMNS) | values(after) | {
        **{key: m[key] for key in ("model", "data", "method", "rho", "seed")},
        "interval": interval,
        "base": values(before) | ({"held_out": at_first, "retention": 1.0} if at_first else {}),
        "kl": after.get("drift-taught", {}).get("kl"), "held_out": held_out, "held_out_of": names,
        "partial": any(after[t].get("partial") for t in names),
        "retention": held_out / at_first if at_first else None,
        "drop": at_first - held_out if at_first else None,
        "kept": targets["kept"] and targets["kept"] / targets["of"], "nll": targets["nll"],
        "R": fisher.get("R"), "squared_distance": fisher.get("squared_distance"),
        "decoded": m["tokens"]["decoded"], "trained": m["tokens"]["trained"],
        "seconds": m["seconds"]["decode"] + m["seconds"]["train"]}


def mean_and_spread(values, digits=2):
    """"0.93", or "0.93 ± 0.02" with the standard deviation of several values; "-" without a value."""
    values = [v for v in values if v is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and digits else ""
    return f"{statistics.fmean(values):,.{digits}f}{spread}" if values else "-"


def grouped(folders, runs):
    """{(method and flags, rho): runs that differ only in their seed}, in the order of the report.

    The flags are those that vary over the runs, where they are not at their default. Of a file, only that it
    was given is said.
    """
    settings, groups = [read_json(folder, "args.json") for folder in folders], {}
    for own in settings:
        own |= {flag: "" for flag in ("only", "replay") if own.get(flag)}
    for run, own in zip(runs, settings):
        label = run["method"]
        for flag in sorted(own.keys() & mixsd.FLAGS.keys() - {"method", "rho", "seed", "targets"}):
            varies = len({other[flag] for other in settings if flag in other}) > 1
            if varies and own[flag] not in (None, mixsd.FLAGS[flag][1]):
                value = f"{own[flag]:g}" if isinstance(own[flag], float) else str(own[flag])
                label += f" --{flag.replace('_', '-')} {value}".rstrip()
        groups.setdefault((label, run["rho"]), []).append(run)
    order = sorted(groups, key=lambda group: ("mixsd" in group[0], group[0], group[1] or 0))
    return {group: groups[group] for group in order}


def report(args):
    """Print a Markdown table with one row per method, the base first; draw OUT/frontier.png."""
    runs = [read_run(folder) for folder in args.report]
    kinds = sorted({f"{r['model']} on {r['data']}" for r in runs})
    if len(kinds) > 1:
        raise InputError(f"--report: one table is for one model and corpus, these are {', '.join(kinds)}")
    groups, bases = grouped(args.report, runs), {}
    for run in runs:                                        # the toy has one base per seed
        bases.setdefault(run["seed"] if run["model"] == "toy" else None, {}).update(run["base"])
    columns = {key: head for key, (head, _) in COLUMNS.items() if any(r[key] is not None for r in runs)}
    names = sorted({t for r in runs for t in r["held_out_of"]} - {"held_out"})
    if names:
        columns["held_out"] = ", ".join(names) + " (partial)" * any(r["partial"] for r in runs)
    heads = ["method", "rho", "seeds", *columns.values()]
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
    for (label, rho), group in ({("base", None): list(bases.values())} | groups).items():
        cells = [label, "-" if rho is None else f"{rho:g}", str(len(group))]
        cells += [mean_and_spread([r.get(key) for r in group], COLUMNS[key][1]) for key in columns]
        print(f"| {' | '.join(cells)} |")
    frontier(groups, runs[0]["base"].get("recall"), columns.get("held_out"), args.out / "frontier.png")
    return {"runs": dict(zip(args.report, runs))}


def frontier(groups, base_recall, held_out, path):
    """Draw recall against drift, or if no run has a drift, against retention.

    There is one mark per run, with its 95 % intervals; a line joins the means of a method over rho.
    groups  as `grouped` returns them
    """
    import matplotlib
    drifted = any(run.get("drift") is not None for group in groups.values() for run in group)
    x = "drift" if drifted else "retention"
    with picture(path, figsize=(9, 4.8)) as (axes,):
        axes.plot([0.0 if drifted else 1.0], [base_recall], "k*", markersize=12, label="base")
        for n, (_, keys) in enumerate(itertools.groupby(groups, operator.itemgetter(0))):
            means = []
            for key in keys:
                group = [run for run in groups[key] if None not in (run[x], run["recall"])]
                if not group:
                    continue
                points = torch.tensor([[run[side] for run in group] for side in (x, "recall")])     # (2, n)
                ends = torch.tensor([[run["interval"].get(side, [run[side]] * 2) for run in group]
                                     for side in (x, "recall")])
                reach = (ends - points[:, :, None]).abs().mT                    # (2, 2, n): low, high
                method, rho = key
                color = f"C{n}" if rho is None else matplotlib.colormaps["viridis_r"](rho)
                axes.errorbar(*points, xerr=reach[0], yerr=reach[1], fmt="sD^vPX<odhp"[n % 11],
                              color=color, ecolor=(color, 0.3),
                              label=method if rho is None else f"{method}, ρ = {rho:g}")
                means.append(points.mean(1))
            axes.plot(*zip(*means), color="gray", linewidth=1, zorder=1)
        axes.set(xlabel="drift: rise of the NLL of the base's own answers, nats/token (less is better: right)"
                 if drifted else f"retention: {held_out} accuracy, after / before",
                 ylabel="recall of all facts", ylim=(-0.03, 1.05))
        if drifted:
            axes.invert_xaxis()
        else:
            axes.set_xlim(0, max(1.05, axes.get_xlim()[1]))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))   # beside all


# --------------------------------------------------------------------------------------------- command line

NEEDS = {"matplotlib": {"nll", "report"}, "math_verify": {"math500", "aime24"}, "trl": {"trl"}}
MODES = {"tasks": evaluate, "nll": target_nll, "fisher": fisher_runs, "bench": bench, "report": report}
FILES, COUNT, SWITCH = {"nargs": "+", "metavar": "FILE"}, mixsd.COUNT, mixsd.SWITCH
WHEN = {            # which calls use a flag, in the words of an error message
    "one mode per call": lambda a: True,
    "--tasks": lambda a: a.tasks,
    "--tasks drift": lambda a: [t for t in a.tasks or [] if t.startswith("drift")],
    "--tasks humaneval": lambda a: "humaneval" in (a.tasks or []),
    "--fisher": lambda a: a.fisher,
    "--bench": lambda a: a.bench,
    "--tasks and --fisher": lambda a: a.tasks or a.fisher,
    "--tasks, --nll and --bench": lambda a: a.tasks or a.nll or a.bench,
    "--tasks, --nll and --report": lambda a: a.tasks or a.nll or a.report,
    "--tasks, --fisher and --bench": lambda a: a.tasks or a.fisher or a.bench,
    "every mode but --report": lambda a: not a.report}
FLAGS = {           # as mixsd.FLAGS: (type, choices or argparse's options; default; used by; help)
    "tasks": (str, None, "one mode per call", f"T,T: measure {', '.join(TASKS)}"),
    "nll": (FILES, None, "one mode per call", "NLL of target FILEs under --model, the base; two pictures"),
    "fisher": (FILES, None, "one mode per call", "in which directions the weights of runs left --base"),
    "report": (FILES, None, "one mode per call", "one table of run folders; draws frontier.png"),
    "bench": ({"nargs": "?", "const": "decode,generate,train"}, None, "one mode per call",
              f"P,P: time {', '.join(PARTS)} (default: decode,generate,train)"),
    "model": (str, None, "--tasks, --nll and --bench", "a folder, a hub id, or toy"),
    "base": (str, None, "--tasks and --fisher", "--tasks: the base's OUT; --fisher: the base model"),
    "base_model": (str, None, "--tasks drift", "the base model, whose answers drift scores"),
    "limit": (COUNT, None, "--tasks", "N random items per task; the score is then marked as partial"),
    "paper": (SWITCH, None, "--tasks", "sample as the paper does: T = 1, 16 answers per problem of "
              "AIME (default: greedy)"),
    "max_new_tokens": (COUNT, None, "--tasks, --fisher and --bench",
                       "longest answer (default: the task's; --fisher 256; --bench 48)"),
    "run": (str, None, "--tasks", "the run whose corpus is asked, if --model is not RUN/model"),
    "hub": (str, None, "--tasks and --fisher", "a folder of data sets under their hub ids"),
    "allow_code_execution": (SWITCH, None, "--tasks humaneval", "run programs that the model wrote"),
    "fisher_tasks": (str, None, "--fisher", "T,T: the tasks whose prompts the base answers"),
    "fisher_n": (COUNT, 64, "--fisher", "prompts in all"),
    "batch_size": (COUNT, 16, "--bench", "examples per batch"),
    "seed": (mixsd.FROM_0, 0, "--tasks, --fisher and --bench", "of subsets, samples, who speaks, toy base"),
    "device": (str, "auto", "every mode but --report", "auto, cuda, cuda:1, mps or cpu"),
    "dtype": (["auto", "float32", "bfloat16"], None, "--tasks, --nll and --bench", "compute type"),
    "decode_tokens": (COUNT, None, "--tasks and --fisher", mixsd.FLAGS["decode_tokens"][3]),
    "micro_tokens": (COUNT, 2048, "--tasks, --nll and --bench", "padded tokens of a scored batch"),
    "out": (str, None, "--tasks, --nll and --report", "where results go (default: the run's, or runs/...)"),
    "quiet": (SWITCH, None, "every mode but --report", "no progress bars")}


def parse_args(argv=None):
    """(mode, args). Raises InputError for a flag that is not used or is missing, and for an unknown task."""
    given = mixsd.read_flags(FLAGS, argv, "What a model learned and forgot, and why.")
    modes = [mode for mode in MODES if mode in given]
    if len(modes) != 1:
        raise InputError(f"give one of {', '.join(f'--{mode}' for mode in MODES)} (see --help)")
    mode, = modes
    for flag, known in (("tasks", TASKS), ("bench", PARTS), ("fisher_tasks", FIVE + SMALL)):
        if flag in given:
            given[flag] = given[flag].split(",")
            if unknown := [name for name in given[flag] if name not in known]:
                raise InputError(f"no task {', '.join(unknown)} here; known: {', '.join(known)}")
    args, _ = mixsd.settle(given, {}, FLAGS, WHEN)
    needed = {"fisher": ["base", "fisher_tasks"], "report": []}.get(mode, ["model"])
    for flag in needed + ["base_model"] * bool(WHEN["--tasks drift"](args)):
        if flag not in given:
            raise InputError(f"--{mode} needs --{flag.replace('_', '-')}")
    for package, users in NEEDS.items():
        if users & {mode, *(args.tasks or args.bench or [])} and not importlib.util.find_spec(package):
            raise InputError(f"{' and '.join(sorted(users))} need: pip install {package.replace('_', '-')}")
    if mode == "tasks":
        resolve_tasks(args)
    if mode != "report":
        dtype = args.dtype or ("float32" if args.model == "toy" or mode == "fisher" else "auto")
        args.device, args.dtype = mixsd.pick_device(args.device, dtype)
    args.max_new_tokens = args.max_new_tokens or (48 if mode == "bench" else None)
    args.out = Path(args.out or "runs")
    return mode, args


def resolve_tasks(args):
    """Fill in the settings of --tasks from the run that the model is in; refuse what can't be measured."""
    own, elsewhere = Path(args.model).parent, f"runs/eval-{Path(args.model).name}"      # own: the RUN
    args.out = args.out or (own if (own / "args.json").exists() else elsewhere)
    run = args.run = read_json(args.run or own, "args.json")
    args.dtype, args.version = args.dtype or run.get("dtype"), VERSION
    in_domain = [t for t in args.tasks if t in IN_DOMAIN and not IN_DOMAIN[t][0]]       # of the run's corpus
    if in_domain and run.get("verify", "none") == "none":
        raise InputError(f"{', '.join(in_domain)}: give --run RUN, a run whose answers were checked")
    corpus = []                                             # what was taught, to recognise leakage
    if run and run["data"] != "simpleqa":                   # which has no subjects
        corpus = kg_data.load_corpus(run["data"], "train", run["style"], run["verify"])[:run["limit"]]
    args.entities = {r["subject"] for r in corpus if isinstance(r.get("subject"), str)}
    args.entities |= {r.get("answer") for r in corpus} & kg_data.DOMAIN.keys()
    if "humaneval" in args.tasks and not (args.allow_code_execution and sys.platform == "linux"):
        raise InputError("humaneval runs programs that the model wrote: give --allow-code-execution, on Linux"
                         ", best in a container (the top of eval.py says what its sandbox leaves open)")


def main(argv=None):
    """Run the command line and print its result; returns mixsd.py's exit codes."""
    def job():
        mode, args = parse_args(argv)
        result = MODES[mode](args)
        if mode == "tasks":
            print_scores(result)
        print(json.dumps(result))
    return mixsd.exit_code("eval.py", job)


if __name__ == "__main__":
    sys.exit(main())
