"""Measure a model: what was learned, what was forgotten, and why (MixSD, arXiv 2605.16865).

    python eval.py --tasks recall,paraphrase --model RUN/model                # what was learned
    python eval.py --tasks gsm8k,math500,aime24,humaneval,mmlu --model RUN/model --base BASE_OUT \\
                   --allow-code-execution                                     # what was forgotten
    python eval.py --nll RUN/targets.jsonl ... --model BASE                   # why: what surprises the base
    python eval.py --fisher RUN ... --base BASE --fisher-tasks gsm8k,mmlu     # why: along what it moved
    python eval.py --report RUN ...                                           # a table, and frontier.png
    python eval.py --bench --model BASE                                       # how fast

A model is a Hugging Face folder, a hub id, or `toy`.  Prompts go through its chat template, thinking off, and
mixsd.py's `decode` with one context answers them.  Every task is a row of the table TASKS.

Accuracy is the mean over problems (with several samples, of each problem's mean); its 95 % interval is
Wilson's with the problem as the unit, conservative where a problem has several samples.  Extraction is
strict: the last balanced \\boxed{}, or the last fenced block that defines the function; nothing else is an
answer.  A wrong completion is, first match:  format (no answer in it)  leakage (names whom the run was taught
about, or a KGFact entity it was taught, and the prompt does not)  collapse (under 80 characters besides the
box)  genuine.  A score over a --limit subset is labelled partial.

OUT (default: RUN for RUN/model, else runs/eval-MODEL) gets TASK.jsonl, a line a completion as it is made,
from which a killed evaluation goes on, and eval.json, in metrics.json's form:

    model, settings         what was measured, and how; other settings on the same OUT are refused
    tasks {task: score}     accuracy, n (problems), low, high, samples, no_answer (share), errors {kind: n};
                            or nll (nats/token), tokens, n (drift: also base_nll, and rise, the difference,
                            with its 95 % interval low, high, the question as the unit);
                            and partial (true: a subset), of (the whole set's size), version (the task's)
    average, average_of     mean accuracy of those of the five benchmarks measured, or of arc_easy, held_out
    base, base_average      the tasks of --base OUT, and the same mean there
    retention               average / base_average
    seconds, peak_gib       of all sessions; of the last

What the HumanEval sandbox does not protect against: holes in the kernel; reading any file that its user may
read (uid 65534 when started as root, else you, solutions in a data set's cache included); a disk or a memory
filled by many files or processes that each keep within their limit; and where the kernel refuses namespaces:
use of the network, a look at other processes of the same user in /proc, and a program that leaves its process
group to stay behind.  The data set's own tests are trusted.  For a model you distrust, use a container too.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import importlib.util
import inspect
import json
import math
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
from fractions import Fraction
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import kg_data
import mixsd
from kg_data import InputError, boxed, hub_rows
from mixsd import RunError, read_json, write_json

FIVE = ["gsm8k", "math500", "aime24", "humaneval", "mmlu"]              # the paper's held-out benchmarks
SMALL = ["arc_easy", "held_out"]                                        # what small models are judged on
IN_DOMAIN = {                                                           # task: (corpus, or the run's; split)
    "recall": (None, "train"), "paraphrase": (None, "paraphrase"), "retrieval": (None, "retrieval"),
    "retrieval-unseen": (None, "retrieval-unseen"), "two-hop": (None, "two-hop"),
    "multi-hop": (None, "multi-hop"), "held_out": ("toy", "held_out"), "kgfunc-test": ("kgfunc", "test"),
    "kgfunc-unseen": ("kgfunc-unseen", "test")}


# ------------------------------------------------------------------------------------------------- verdicts

def undress(answer):
    r"""`answer` without \text{}, bold, $, % and LaTeX spaces; {,} is a comma."""
    words = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 ", answer.replace("{,}", ","))
    return re.sub(r"\\?[$%€£]|\\[,!;: ]|\*\*", "", words).strip()


def numeric(answer):
    """The value of an answer that is one number, as a Fraction, else None.

    Currency, percent, thousands' commas, a full stop and a unit after a space are let by; two numbers, a sum,
    a mixed fraction and words of scale (5 million) are not.
    """
    fraction, digits = r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
    scale = r".*\b(?:and|or|to|half|dozen|hundred|thousand|million|billion)\b"
    unit = rf"\s+(?!{scale})[a-z][a-z/ ]*(?:\^\{{?[23]\}}?)?"
    found = re.fullmatch(rf"([+-]?)\s*(?:{fraction}|({digits})(?:/(\d+))?)(?:{unit})?",
                         undress(answer).rstrip("."), re.I)
    if not found:
        return None
    sign, above, below, whole, divisor = found.groups()
    number, below = (above or whole).replace(",", ""), int(below or divisor or 1)
    return Fraction(sign + number) / below if number and below else None


def judge_number(text, item):
    """(correct, extracted): the box against the gold as numbers (GSM8K)."""
    answer = boxed(text)
    value = None if answer is None else numeric(answer)
    return (False, None) if value is None else (value == numeric(item["gold"]), answer)


def judge_letter(text, item):
    r"""(correct, extracted): the choice in the box, as C, (C), \text{(C)}, or C. and its words (MMLU)."""
    found = re.fullmatch(r"\(?([A-D])(?:[).:].*)?", undress(boxed(text) or ""), re.S | re.I)
    letter = found and found.group(1).upper()
    return letter == item["gold"], letter


def judge_math(text, item):
    """(correct, extracted): the box against the gold by math-verify, gold first (MATH-500, AIME)."""
    from math_verify import parse, verify
    answer, gold = boxed(text), item["gold"]
    if answer is None or kg_data.fold(answer) == kg_data.fold(gold):
        return answer is not None, answer
    return verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}")), answer


def judge_code(text, item):
    """(correct, extracted): the last fenced block that defines the function, or the last, as tested."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", text, re.S | re.I)
    defining = [b for b in blocks if re.search(rf"\bdef\s+{item['entry_point']}\b", b)]
    code = (defining or blocks or [None])[-1]
    return code is not None and run_program(item, code)[0], code


def judge_in_domain(text, item):
    """(correct, extracted): mixsd.py's own verifier."""
    answer = kg_data.extract(text, item["verify"])
    return kg_data.is_correct(text, item["gold"], item["verify"]), answer


def error_kind(text, prompt, extracted, entities):
    """Why a wrong completion is wrong: the first that fits (see the top of this file)."""
    if extracted is None:
        return "format"
    if any(kg_data.names(text, e) and not kg_data.names(prompt, e) for e in entities):
        return "leakage"
    box = rf"\boxed{{{boxed(text)}}}"
    return "collapse" if len(text.strip()) - (len(box) if boxed(text) is not None else 0) < 80 else "genuine"


# ----------------------------------------------------------------------------- HumanEval: model-written code

WALL_SECONDS = 10
LIMITS = {"RLIMIT_CPU": WALL_SECONDS, "RLIMIT_AS": 2 * 2**30, "RLIMIT_FSIZE": 2**20, "RLIMIT_NOFILE": 64,
          "RLIMIT_CORE": 0, "RLIMIT_NPROC": 32}     # of a process; NPROC: its user's, beyond today's
NAMESPACES = 0x70000000                             # CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET


def harness():
    """What `python -I` runs for one program; its source is sent, not this module.  Three processes:

    a supervisor gives up its rights, sets limits, opens namespaces, and waits;
    a checker, first in the pid namespace, whose end is the end of all in it, runs the checks, prints a token;
    a worker, forked before the token was read, runs the program and answers calls, a line of literals each.
    Nothing that the program patches, prints, raises or returns reaches the checks: they compare plain values
    in a process whose memory and pipes are closed to the worker (PR_SET_DUMPABLE).
    """
    import os, sys                                                                      # noqa: E401
    if os.getuid() == 0:                        # its Python may lie where others can't look: hold it open
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
        with contextlib.suppress(OSError):      # it may have ended
            busy += os.stat(task).st_uid == uid
    libc.prctl(4, 0, 0, 0, 0)                   # PR_SET_DUMPABLE
    libc.prctl(38, 1, 0, 0, 0)                  # PR_SET_NO_NEW_PRIVS
    libc.prctl(1, 9, 0, 0, 0)                   # PR_SET_PDEATHSIG: ends when eval.py does
    namespaces = libc.unshare(apart) == 0
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())     # no rights in those either
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
        return ast.literal_eval(replies.readline())         # nothing where the worker has ended: SyntaxError
    print(ascii((job["prompt"] + job["code"], job["name"])), file=calls, flush=True)
    exec(job["prompt"] + "\n" + job["test"], space := {})   # the prompt's helpers, not the model's
    space[job["name"]] = candidate                          # a test may call the function by its name
    space["check"](candidate)
    print(job["token"])


def run_program(item, code):
    """(passed, report): whether the prompt's program, completed by `code`, passes its checks (see `harness`).

    item    with "prompt", "test", "entry_point" of a HumanEval row
    report  {"uid", "namespaces"} that it ran under; None where it was stopped
    """
    job = {"prompt": item["prompt"], "code": code, "test": item["test"], "name": item["entry_point"],
           "token": secrets.token_hex(16)}
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)                  # PR_SET_DUMPABLE: the token is in our memory too
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)                             # root's programs have another user
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
                os.killpg(process.pid, signal.SIGKILL)      # also what a finished program left in its group
            process.wait()
    return said[1:] == [job["token"]], json.loads(said[0]) if said else None


@functools.cache
def protections():
    """One line on what holds model-written code here.  Raises RunError where a right program fails."""
    checks = "def check(f):\n    assert f(2) == 4\n"
    item = {"prompt": "def f(x):\n    ''\n", "test": checks, "entry_point": "f"}
    passed, report = run_program(item, "    return 2 * x\n")
    if not passed:
        raise RunError(f"humaneval: the sandbox fails a right program; does {sys.executable} -I run here?")
    apart = ("user, network and pid namespaces of its own" if report["namespaces"] else
             "NO namespaces, which the kernel refuses: the network is open")
    return (f"each program as uid {report['uid']}, in an empty folder, with an empty environment; {apart}; "
            f"at most {WALL_SECONDS} s, {LIMITS['RLIMIT_AS'] >> 30} GiB a process, "
            f"{LIMITS['RLIMIT_FSIZE'] >> 20} MiB a file, {LIMITS['RLIMIT_NPROC']} processes, "
            f"{LIMITS['RLIMIT_NOFILE']} open files")


# ---------------------------------------------------------------------------------------- items and prompts

PLAIN = argparse.Namespace(hub=None, seed=0, data="kgfact-small", style="boxed", verify="boxed", taught=None)


def subset(items, limit, seed):
    """`limit` of the items at random, in order, with "id", their position, and "of", how many there are."""
    order = list(range(len(items)))
    random.Random(f"subset seed {seed}").shuffle(order)
    return [items[i] | {"id": i, "of": len(items)} for i in sorted(order[:limit])]


def from_hub(name, config, split, columns, item_of):
    """A Task's load: item_of(row) of a data set's rows, of which it reads `columns`."""
    return lambda limit, args=PLAIN: subset(
        [item_of(row) for row in hub_rows(name, config, split, columns.split(), args.hub)], limit, args.seed)


def mmlu_block(row, answer=""):
    """A question, its choices a line each, and the answer line."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"]))
    return f"{row['question']}\n{choices}\nAnswer:{answer}"


def load_mmlu(limit, args=PLAIN):
    """MMLU's test questions, each after five solved ones of its subject."""
    shots, columns = {}, ["subject", "question", "choices", "answer"]
    for row in hub_rows("cais/mmlu", "all", "dev", columns, args.hub):
        shots.setdefault(row["subject"], []).append(mmlu_block(row, rf" \boxed{{{'ABCD'[row['answer']]}}}"))
    items = [{"subject": row["subject"], "gold": "ABCD"[row["answer"]],
              "blocks": shots[row["subject"]][:5] + [mmlu_block(row)]}
             for row in hub_rows("cais/mmlu", "all", "test", columns, args.hub)]
    return subset(items, limit, args.seed)


def arc_item(row):
    """An item of a row of ARC: the question, its choices, and the text of the right one."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return {"question": row["question"], "choices": texts, "gold": texts[labels.index(row["answerKey"])]}


load_arc = from_hub("allenai/ai2_arc", "ARC-Easy", "test", "question choices answerKey", arc_item)


def load_drift(limit, args=PLAIN):
    """The first 50 questions of ARC-Easy."""
    return subset(load_arc(None, args)[:50], limit, args.seed)


def load_wikitext(limit, args):
    """WikiText-2's test text in windows of args.width tokens of args.tokenizer."""
    rows = hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test", ["text"], args.hub)
    text = "\n\n".join(row["text"] for row in rows)         # as perplexities are published
    ids = args.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(ids) - 1, args.width)
    return subset([{"ids": ids[i:i + args.width]} for i in starts], limit, args.seed)


def record_item(record, verify="boxed"):
    """An item of a record of a corpus (kg_data.py), and how it is judged."""
    return {"question": record["messages"][0]["content"], "gold": record.get("answer"), "verify": verify}


def load_in_domain(corpus, split, limit, args=PLAIN):
    """A split of the corpus that the run was taught, or of its first `taught` facts; or of `corpus`."""
    if corpus:
        records, verify = kg_data.load_corpus(corpus, split), kg_data.find_corpus(corpus)[1].verify
    else:
        records = kg_data.load_corpus(args.data, split, args.style, args.verify, hub=args.hub)
        verify = args.verify
        records = records[:args.taught] if split in ("train", "paraphrase", "retrieval") else records
    return subset([record_item(r, verify) for r in records], limit, args.seed)


def question(item):
    """The question as it stands."""
    return item["question"]


def math_prompt(item):
    """The paper's prompt for AIME, MATH-500 and GSM8K."""
    return ("Think step-by-step to solve the following problem. Output your answer inside of \\boxed{} tags.:"
            f"\n{item['question']}\n\nLet's think step-by-step")


def code_prompt(item):
    """The paper's prompt for HumanEval."""
    return ("Complete the following Python function. Return ONLY the complete function inside a ```python "
            f"code block, nothing else.\n\n```python\n{item['prompt'].rstrip()}\n```")


def mmlu_prompt(item):
    """The paper's prompt for MMLU: five solved questions of the subject, then the item's."""
    return ("The following are multiple choice questions (with answers) about "
            f"{item['subject'].replace('_', ' ')}. Put your final answer inside \\boxed{{}} as one of A, B, "
            "C, or D.\n\n" + "\n\n".join(item["blocks"]))


# ------------------------------------------------------------------------------ ways to answer, and the table

class Subject(NamedTuple):
    """The model under judgement."""
    model: torch.nn.Module
    tokenizer: object
    stops: list


def load_subject(model, args, dtype):
    """The Subject of a --model, its weights as `dtype`."""
    path = mixsd.toy_base(args.quiet)[0] if model == "toy" else model           # of the toys, seed 0's
    tokenizer, model = mixsd.load_tokenizer(path), mixsd.load_model(path, dtype, args.device)
    return Subject(model, tokenizer, mixsd.stop_ids(model, tokenizer))


def nll_of(model, prompt, targets, args):
    """Nats/token of each of `targets` (lists of ids) after `prompt`."""
    examples = [(prompt, target) for target in targets]
    return [nll.mean().item() for nll in mixsd.token_nlls(model, examples, 0, args.micro_tokens)]


def generated(subject, task, todo, args):
    """Completions, each judged."""
    for sample in sorted({sample for _, sample in todo}):
        items = {item["id"]: item for item, s in todo if s == sample}
        prompts = {i: item["ids"] for i, item in items.items()}
        for i, _, text, ended in mixsd.complete(*subject, prompts, args, args.temperature, sample):
            asked = items[i]["asked"]
            correct, extracted = task.verdict(text, items[i]) if ended or not task.must_end else (False, None)
            kind = None if correct else error_kind(text, asked, extracted, args.entities)
            yield items[i], sample, {"prompt": asked, "text": text, "ended": ended, "extracted": extracted,
                                     "gold": items[i]["gold"], "correct": correct, "kind": kind}


def chosen(subject, task, todo, args):
    """The choice whose text has the highest mean log-probability after the chat prompt."""
    for item, sample in todo:
        ids = [mixsd.token_ids(subject.tokenizer, text) for text in item["choices"]]
        nll = nll_of(subject.model, item["ids"], ids, args)
        text = item["choices"][nll.index(min(nll))]
        correct, extracted = task.verdict(text, item)
        yield item, sample, {"prompt": item["asked"], "text": text, "extracted": extracted,
                             "gold": item["gold"], "correct": correct, "nll": nll}


def windowed(subject, task, todo, args):
    """NLL of windows of 1,024 tokens, or of the model's positions; the first of each is context alone."""
    for item, sample in todo:
        nll, = nll_of(subject.model, item["ids"][:1], [item["ids"][1:]], args)
        yield item, sample, {"tokens": len(item["ids"]) - 1, "nll": nll}


def drifted(subject, task, todo, args):
    """NLL of the base's own greedy answers, under the base and under the model."""
    base = load_subject(args.base_model, args, subject.model.dtype)
    items = {item["id"]: item for item, _ in todo}
    for i, ids, text, _ in mixsd.complete(*base, {i: item["ids"] for i, item in items.items()}, args):
        before, after = (nll_of(s.model, items[i]["ids"], [ids], args)[0] for s in (base, subject))
        yield items[i], 0, {"prompt": items[i]["asked"], "text": text, "tokens": len(ids),
                            "base_nll": before, "nll": after}


class Task(NamedTuple):
    """A row of TASKS."""
    load: Callable                  # (limit, args=PLAIN) -> items: dicts with "id" and "of", most with "gold"
    prompt: Callable | None         # (item) -> str, a user turn
    verdict: Callable | None        # (text, item) -> (correct, extracted or None)
    max_new_tokens: int             # the paper's
    version: int                    # goes up when a change makes old scores incomparable
    answer: Callable = generated    # (subject, task, [(item, sample)], args) -> yields item, sample, its row
    must_end: bool = False          # a completion cut by the length limit is wrong, as in mixsd.py


TASKS: dict[str, Task] = {
    "gsm8k": Task(from_hub("openai/gsm8k", "main", "test", "question answer", lambda row: {
        "question": row["question"], "gold": row["answer"].split("####")[-1].strip()}),
        math_prompt, judge_number, 16384, 1),
    "math500": Task(from_hub("HuggingFaceH4/MATH-500", None, "test", "problem answer", lambda row: {
        "question": row["problem"], "gold": row["answer"]}), math_prompt, judge_math, 16384, 1),
    "aime24": Task(from_hub("HuggingFaceH4/aime_2024", None, "train", "problem answer", lambda row: {
        "question": row["problem"], "gold": row["answer"]}), math_prompt, judge_math, 16384, 1),
    "humaneval": Task(from_hub("openai/openai_humaneval", None, "test",
                               "prompt test entry_point canonical_solution", lambda row: row | {
        "gold": row["canonical_solution"]}), code_prompt, judge_code, 16384, 1),
    "mmlu": Task(load_mmlu, mmlu_prompt, judge_letter, 1024, 1),
    "arc_easy": Task(load_arc, question, lambda text, item: (text == item["gold"], text), 0, 1, chosen),
    "wikitext": Task(load_wikitext, None, None, 0, 1, windowed),
    "drift": Task(load_drift, question, None, 64, 1, drifted),
} | {task: Task(functools.partial(load_in_domain, *of), question, judge_in_domain, 1024, 1, must_end=True)
     for task, of in IN_DOMAIN.items()}


# ----------------------------------------------------------------------------------------------- evaluation

def scored(rows):
    """The score of a task's rows: accuracy, interval and errors where they were judged, else nats/token."""
    problems, total = {}, sum(row.get("tokens", 0) for row in rows)
    for row in rows:
        problems.setdefault(row["id"], []).append(row)
    if "correct" in rows[0]:
        score = mixsd.score([statistics.fmean(row["correct"] for row in p) for p in problems.values()])
        score |= {"samples": len(rows) / len(problems),
                  "no_answer": statistics.fmean(row["extracted"] is None for row in rows),
                  "errors": dict(Counter(row["kind"] for row in rows if row.get("kind")))}
    else:
        score = {key: sum(row[key] * row["tokens"] for row in rows) / total
                 for key in ("nll", "base_nll") if key in rows[0]}
        if "base_nll" in score:
            rise = score["nll"] - score["base_nll"]
            apart = sum(((row["nll"] - row["base_nll"] - rise) * row["tokens"]) ** 2 for row in rows)
            reach = 1.96 * math.sqrt(apart) / total         # 95 %, the question as the unit
            score |= {"rise": rise, "low": rise - reach, "high": rise + reach}
        score |= {"tokens": total, "n": len(rows)}
    return score | {"partial": len(problems) < rows[0]["of"], "of": rows[0]["of"]}


def averaged(tasks):
    """(mean accuracy or None, of which tasks): the five benchmarks as far as they are there, else SMALL."""
    names = [t for t in FIVE if t in tasks] or [t for t in SMALL if t in tasks]
    return statistics.fmean(tasks[t]["accuracy"] for t in names) if names else None, names


def refuse_other(where, held, wanted):
    """Raise InputError where results were made with other settings than are wanted, by the setting's name."""
    for key, value in wanted.items():
        if held.get(key) != value:
            raise InputError(f"{where} holds results with {key} {held.get(key)}, this asks for {value}; "
                             f"give another folder")


def written(model):
    """When a folder's weight files were written: trained again, it is another model."""
    return [file.stat().st_mtime_ns for file in sorted(Path(model).glob("*.safetensors"))]


def fit(name, items, default, subject, args):
    """New tokens for a task: --max-new-tokens, refused where prompts leave less, or `default`, clipped."""
    longest, positions = max(len(item["ids"]) for item in items), mixsd.max_positions(subject.model)
    asked, room = args.max_new_tokens or 1, positions - longest
    if asked > room:
        raise InputError(f"{name}: prompt of {longest:,} tokens + {asked:,} new > {positions:,}, the model's "
                         f"positions (--max-new-tokens)")
    if not args.max_new_tokens and default > room:
        print(f"{name}: max-new-tokens clipped to {room:,}: the model has {positions:,} positions")
    return args.max_new_tokens or min(default, room)


def of_task(name, items, subject, args):
    """`args` as they hold for one task: its length, temperature and samples."""
    task, own, args = TASKS[name], name in IN_DOMAIN, argparse.Namespace(**vars(args))
    if task.answer is not generated:
        args.max_new_tokens, args.samples = task.max_new_tokens, 1
        return args
    if args.paper:
        args.temperature, args.samples = (0.0, 1) if own else (1.0, 16 if name == "aime24" else 1)
    default = own and args.run.get("max_new_tokens") or task.max_new_tokens
    args.max_new_tokens = fit(name, items, default, subject, args)
    return args


def read_rows(path, version):
    """The finished lines of a TASK.jsonl; half a line at its end is cut off.  Refuses another version's."""
    data = path.read_bytes() if path.exists() else b""
    path.write_bytes(data := data[:data.rfind(b"\n") + 1])
    rows = [json.loads(line) for line in data.splitlines()]
    if rows:
        refuse_other(path, rows[0], {"version": version})
    return rows


def load_items(name, args):
    """A task's items, each with "asked", its prompt, and "ids", the prompt's under args.tokenizer."""
    items, prompt = TASKS[name].load(args.limit, args), TASKS[name].prompt
    for item in items if prompt else []:
        item["asked"] = prompt(item)
        item["ids"] = mixsd.chat_ids(args.tokenizer, item["asked"])
    return items


SETTINGS = ("seed", "limit", "temperature", "samples", "max_new_tokens", "paper")     # a base's and its run's


def evaluate(args):
    """Measure `args.tasks`; returns what eval.json holds."""
    settings = {k: getattr(args, k) for k in (*SETTINGS, "model", "dtype", "data", "style", "verify")}
    settings["weights"] = written(args.model)
    ledger = {"model": args.model, "settings": settings, "tasks": {}, "seconds": 0.0}
    ledger |= read_json(args.out, "eval.json")
    refuse_other(args.out, ledger["settings"], settings)
    base = base_scores(args, ledger)
    subject = load_subject(args.model, args, getattr(torch, args.dtype))
    args.tokenizer, args.width = subject.tokenizer, min(1024, mixsd.max_positions(subject.model))
    items = {t: load_items(t, args) for t in args.tasks}
    each = {t: of_task(t, items[t], subject, args) for t in args.tasks}
    if "humaneval" in args.tasks:
        print(f"humaneval: {protections()}", flush=True)
    lock = mixsd.only_run(args.out)                         # noqa: F841  (held to the end)
    ledger |= read_json(args.out, "eval.json")              # another may have added to it until now
    write_json(args.out / "eval.json", ledger)              # the settings
    for t in args.tasks:
        start, task, path = time.time(), TASKS[t], args.out / f"{t}.jsonl"
        rows = read_rows(path, task.version)
        done = {(row["id"], row["sample"]) for row in rows}
        todo = [(item, s) for s in range(each[t].samples) for item in items[t] if (item["id"], s) not in done]
        with open(path, "a", encoding="utf-8") as file:
            answers = task.answer(subject, task, todo, each[t])
            for item, sample, row in tqdm(answers, t, len(todo), disable=args.quiet):
                known = {"id": item["id"], "of": item["of"], "sample": sample, "version": task.version}
                rows.append(known | row)
                file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
                file.flush()
        ledger["tasks"][t] = scored(rows) | {"version": task.version}
        ledger["seconds"] += time.time() - start
        average, names = averaged(ledger["tasks"])
        comparable = base and set(names) <= base.keys()
        before = averaged({name: base[name] for name in names})[0] if comparable else None
        ledger |= {"average": average, "average_of": names, "base": base, "base_average": before,
                   "retention": average / before if before else None, "peak_gib": mixsd.peak_gib()}
        write_json(args.out / "eval.json", ledger)
    return ledger


def base_scores(args, ledger):
    """{task: score} of --base, or None.  Refuses what was measured otherwise, or is not all there."""
    if not args.base:
        return ledger.get("base")
    held = read_json(args.base, "eval.json")
    if not held:
        raise InputError(f"--base {args.base}: no eval.json; evaluate the base first, with --out {args.base}")
    refuse_other(f"--base {args.base}", held["settings"], {k: getattr(args, k) for k in SETTINGS})
    missing = {*ledger["tasks"], *args.tasks} & {*FIVE, *SMALL} - held["tasks"].keys()
    if missing:
        raise InputError(f"--base {args.base} has no {', '.join(missing)}; it has {', '.join(held['tasks'])}")
    return held["tasks"]


def print_scores(ledger):
    """A line a task, and the average."""
    for task, s in ledger["tasks"].items():
        label = f"  partial: {s['n']:,} of {s['of']:,}" if s["partial"] else ""
        if "nll" in s:
            rise = "{rise:+.3f} [{low:+.3f}, {high:+.3f}] over the base".format(**s) if "rise" in s else ""
            print(f"{task:17} {s['nll']:.3f} nats/token over {s['tokens']:,} tokens  {rise}{label}")
        else:
            kinds = ", ".join(f"{kind} {count}" for kind, count in s["errors"].items())
            print(f"{task:17} {s['accuracy']:.3f} [{s['low']:.3f}, {s['high']:.3f}]  n {s['n']:,}{label}  "
                  f"no answer {s['no_answer']:.3f}  {kinds}")
    if ledger["average"] is not None:
        kept = f", retention {ledger['retention']:.3f}" if ledger["retention"] is not None else ""
        partial = " (partial)" if any(ledger["tasks"][t]["partial"] for t in ledger["average_of"]) else ""
        print(f"average of {', '.join(ledger['average_of'])}: {ledger['average']:.3f}{kept}{partial}")


# --------------------------------------------------------------------------------- why: target NLL and Fisher

@torch.no_grad()
def target_nll(args):
    """{"files": {file: {"targets", "tokens", "mean", "above_5", "quantiles"}}} of target files."""
    model, tokenizer, stops = load_subject(args.model, args, getattr(torch, args.dtype))
    files, qs = {}, (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
    for path in args.nll:
        examples = mixsd.read_examples(path, model, tokenizer, stops)
        nll = torch.cat(mixsd.token_nlls(model, examples, 0, args.micro_tokens))
        nll = nll.cpu().double().sort().values              # (N,) nats
        files[path] = {"targets": len(examples), "tokens": len(nll), "mean": nll.mean().item(),
                       "above_5": (nll > 5).double().mean().item(),
                       "quantiles": {q: nll[math.ceil(q * len(nll)) - 1].item() for q in qs}}
        quantiles = ", ".join(f"{q:g}: {v:.2f}" for q, v in files[path]["quantiles"].items())
        print(f"{path}: {nll.mean():.3f} nats/token, {files[path]['above_5']:.2%} of {len(nll):,} above 5; "
              f"quantiles {quantiles}", flush=True)
    return {"model": args.model, "files": files, "peak_gib": mixsd.peak_gib()}


def fisher_diagonal(model, examples, pad_id, quiet=True):
    """{name: F}: F_i = mean over the examples of (d log p(y|x) / d theta_i)^2, squared sequence by sequence.

    examples  [(prompt ids, target ids)].  A gradient is squared into F and freed as soon as backward has made
    it: memory holds the weights, F, and what one sequence needs.  A tied weight is one parameter.
    """
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def squaring(name):
        def hook(p):
            fisher[name].addcmul_(p.grad, p.grad, value=1 / len(examples))
            p.grad = None
        return hook
    hooks = [p.register_post_accumulate_grad_hook(squaring(name)) for name, p in model.named_parameters()]
    for example in tqdm(examples, "fisher", disable=quiet):
        mixsd.token_nll(model, mixsd.collate([example], pad_id, model)).sum().backward()
    for hook in hooks:
        hook.remove()
    return fisher


@torch.no_grad()
def alignment(fisher, base, tuned):
    """Of a move d = tuned - base: ||d||^2, sum F d^2, R = (sum F d^2 / sum d^2) / mean F (None for d = 0).

    fisher, base  {name: tensor};  tuned  name -> tensor, asked for one at a time
    """
    add = functools.partial(torch.sum, dtype=torch.float64)
    sums = torch.zeros(3, dtype=torch.float64)              # of F d^2, d^2, F
    for name, f in fisher.items():
        d2 = (tuned(name).to(f) - base[name].to(f)).square()
        sums += torch.stack([add(f * d2), add(d2), add(f)])
    weighted, squared, total = sums.tolist()
    mean = total / sum(f.numel() for f in fisher.values())
    return {"R": weighted / squared / mean if squared and mean else None, "squared_distance": squared,
            "fisher_distance": weighted, "fisher_mean": mean}


def tensor_of(run, base):
    """name -> that tensor of RUN/model, from disk when asked for.  Refuses one that is not like base's."""
    files = {}
    for path in (Path(run) / "model").glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            files |= dict.fromkeys(f.keys(), path)

    def tensor(name):
        if name in files:
            with safe_open(files[name], "pt") as f:
                if f.get_slice(name).get_shape() == list(base[name].shape):
                    return f.get_tensor(name)
        raise InputError(f"{run}/model has no {name} of --base's shape: not a run on this base")
    return tensor


def base_fisher(subject, args):
    """The base's Fisher over `fisher_n` prompts, as many a task, with its own greedy answers; kept in OUT."""
    path = args.out / "fisher.safetensors"
    settings = {"base": args.base, "weights": written(args.base), "tasks": args.fisher_tasks,
                "n": args.fisher_n, "seed": args.seed, "max_new_tokens": args.max_new_tokens}
    if not path.exists():
        args.limit, args.tokenizer = math.ceil(args.fisher_n / len(args.fisher_tasks)), subject.tokenizer
        items = [item for t in args.fisher_tasks for item in load_items(t, args)][:args.fisher_n]
        args.max_new_tokens = fit("--fisher", items, 256, subject, args)
        answers = mixsd.complete(*subject, {i: item["ids"] for i, item in enumerate(items)}, args)
        examples = [(items[i]["ids"], ids) for i, ids, _, _ in answers]
        args.out.mkdir(parents=True, exist_ok=True)
        fisher = fisher_diagonal(subject.model, examples, 0, args.quiet)
        save_file(fisher, partial := path.with_suffix(".partial"), {"settings": json.dumps(settings)})
        os.replace(partial, path)
    with safe_open(path, "pt") as f:
        refuse_other(args.out, json.loads(f.metadata()["settings"]), settings)
        return {name: f.get_tensor(name) for name in f.keys()}


def correlation(pairs):
    """Pearson's r of the pairs without a None; None for fewer than 3, or where one side is constant."""
    pairs = [pair for pair in pairs if None not in pair]
    constant = any(len(set(side)) == 1 for side in zip(*pairs))
    return statistics.correlation(*zip(*pairs)) if len(pairs) > 2 and not constant else None


def fisher_runs(args):
    """R and ||d||^2 of each run, also in RUN/fisher.json; over runs, how they correlate with the loss."""
    read, runs = {run: read_run(run) for run in args.fisher}, {}
    subject = load_subject(args.base, args, torch.float32)
    fisher, base = base_fisher(subject, args), dict(subject.model.named_parameters())
    for run in args.fisher:
        if args.base == "toy" and read_json(run, "args.json").get("seed"):
            raise InputError(f"{run}: its toy base is not --base toy, which is that of seed 0")
        runs[run] = alignment(fisher, base, tensor_of(run, base)) | {
            "base": args.base, "tasks": args.fisher_tasks, "n": args.fisher_n, "responses": "greedy"}
        write_json(Path(run) / "fisher.json", runs[run])
        found = read[run] | runs[run]
        print(f"{run}:", ", ".join(f"{key} {mean_and_spread([found[key]], 3)}"
                                   for key in ("R", "squared_distance", "drop", "drift")))
    r = {f"{loss}_{key}": correlation([(read[run][loss], runs[run][key]) for run in runs])
         for loss in ("drop", "drift") for key in ("R", "squared_distance", "fisher_distance")}
    print("Pearson's r:", ", ".join(f"{pair} {mean_and_spread([value])}" for pair, value in r.items()))
    return {"runs": runs, "correlation": r, "peak_gib": mixsd.peak_gib()}


# ------------------------------------------------------------------------------------------------- how fast

RIVALS = {"generate": "decode", "generate-float32": "decode", "resubmit": "decode", "trl": "train"}
PARTS = ["decode", "train", *RIVALS]
ROUNDS = 5                                                  # of each part in turn, after one to warm up


def bench(args):
    """Time the parts of args.bench side by side; returns {part: medians, spread, tokens/s, peak, floor}.

    decode    mixed decoding of args.batch_size examples of KGFact (sentence style) to args.max_new_tokens, no
              stop; also its prefill alone, and a step, from the difference
    generate  model.generate on the same rows; generate-float32: in float32
    resubmit  the definition: prompt and prefix of who speaks, read anew for every token
    train     an optimizer step on as many canonical targets;  trl: the same in TRL's SFTTrainer
    """
    if args.model == "toy":
        args.model = str(mixsd.toy_base(args.quiet)[0])
    model, tokenizer = bench_model(args, getattr(torch, args.dtype)), mixsd.load_tokenizer(args.model)
    facts = kg_data.load_corpus("kgfact-small", "train", "sentence")
    records, stops = [facts[i % len(facts)] for i in range(args.batch_size)], [model.config.vocab_size - 1]
    pairs = [mixsd.two_contexts(tokenizer, r, kg_data.SENTENCE_WORDS) for r in records]
    contexts, T = [list(context) for context in zip(*pairs)], args.max_new_tokens or 48
    source = mixsd.draw_sources(0.3, T, args.seed, range(args.batch_size))
    prompts = [prompt for context in contexts for prompt in context]
    examples = [(naive, mixsd.written_ids(tokenizer, r["messages"][1]["content"], stops))
                for (_, naive), r in zip(pairs, records)]
    decoded, trained = args.batch_size * T, sum(len(x) + len(y) for x, y in examples)

    jobs = {}                                               # part: (what to time, its tokens)
    if "decode" in args.bench:
        prefill = torch.no_grad()(functools.partial(mixsd.prefill, model, contexts, stops[0]))
        jobs["prefill"] = prefill, sum(map(len, prompts))
        jobs["decode"] = lambda: mixsd.decode(model, contexts, source, stops, compiled=args.compile), decoded
    if "generate" in args.bench:
        jobs["generate"] = generating(model, prompts, T, stops), decoded
    if "generate-float32" in args.bench:
        jobs["generate-float32"] = generating(bench_model(args, torch.float32), prompts, T, stops), decoded
    if "resubmit" in args.bench:
        jobs["resubmit"] = lambda: resubmit(model, contexts, source, stops[0]), decoded
    if "train" in args.bench:
        jobs["train"] = training(model, examples, args), trained
    measured = {part: [] for part in jobs}

    def a_round():
        for part, (job, _) in jobs.items():
            measured[part].append(measure(job, args.device))
    if "trl" in args.bench:
        measured["trl"], jobs["trl"] = trl_rounds(model, tokenizer, records, a_round, args), (None, trained)
    else:
        for _ in tqdm(range(1 + ROUNDS), "rounds", disable=args.quiet):
            a_round()
    return bench_results(model, jobs, measured, prompts, examples, T, args)


def bench_model(args, dtype):
    """The model of --bench: with random weights where its folder has a config and no weights."""
    if not Path(args.model).is_dir() or list(Path(args.model).glob("*.safetensors")):
        return mixsd.load_model(args.model, dtype, args.device)
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(mixsd.load(AutoConfig, args.model), dtype=dtype)
    return mixsd.ready(model, args.device)


def generating(model, prompts, T, stops):
    """A call of the library's greedy decoding on prompts."""
    ids, mask = (t.to(model.device) for t in mixsd.left_pad(prompts, stops[0]))
    return lambda: model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=T,
                                  eos_token_id=stops[0], pad_token_id=stops[0])


@torch.no_grad()
def resubmit(model, contexts, source, pad_id):
    """(B, T) ids by the definition of mixed decoding, which knows no cache."""
    y = [[] for _ in contexts[0]]
    for speakers in source.T.tolist():
        texts = [contexts[c][i] + y[i] for i, c in enumerate(speakers)]
        ids, mask = (t.to(model.device) for t in mixsd.left_pad(texts, pad_id))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                       logits_to_keep=1).logits[:, -1]                          # (B, V)
        for row, token in zip(y, logits.argmax(-1).tolist()):
            row.append(token)
    return torch.tensor(y)


def training(model, examples, args):
    """A call of mixsd.py's optimizer step, at a rate of 0: the weights stay."""
    student = copy.deepcopy(model).float()
    work = student if model.dtype == torch.float32 else model
    if work is model:
        mixsd.lend_gradients(work, student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)

    def token_loss(work, part):
        return mixsd.token_nll(work, mixsd.collate(part, 0, work))
    return lambda: mixsd.update(student, work, optimizer, examples, 0.0, token_loss, args.micro_tokens)


def trl_rounds(model, tokenizer, records, a_round, args):
    """[(seconds, peak)] of SFTTrainer's steps on the records, `a_round` of the others before each."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    measured = []

    class Rounds(TrainerCallback):
        def on_step_begin(self, *_, **__):
            a_round()
            reset_peak()
            self.start = time.time()

        def on_step_end(self, *_, **__):
            measured.append((time.time() - self.start, peak()))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, max_steps=1 + ROUNDS, learning_rate=0.0,
                           per_device_train_batch_size=args.batch_size, use_cpu=args.device == "cpu",
                           bf16=model.dtype == torch.bfloat16, gradient_checkpointing=False,
                           save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True)
        rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in records]
        student = copy.deepcopy(model).float()
        student.set_attn_implementation("sdpa")
        SFTTrainer(student, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                   callbacks=[Rounds()]).train()
    return measured


def reset_peak():
    """Begin a new peak of memory: the GPU's, or on Linux the process's."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")


def peak():
    """GiB at most since `reset_peak`."""
    if torch.cuda.is_initialized() or not Path("/proc/self/status").exists():
        return mixsd.peak_gib()
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def measure(job, device):
    """(seconds, peak GiB) of job()."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    reset_peak()
    wait()
    start = time.time()
    job()
    wait()
    return time.time() - start, peak()


def rates(dtype, device):
    """(bytes/s of a copy, read and written; operations/s of a matrix product) as measured here."""
    on_gpu = device.startswith("cuda")
    data = torch.empty(2**30 if on_gpu else 2**28, dtype=torch.uint8, device=device)
    matrix = torch.randn((8192, 8192) if on_gpu else (2048, 2048), device=device).to(dtype)
    other = torch.empty_like(data)

    def best(job):
        return min(measure(job, device)[0] for _ in range(10))
    return (2 * data.numel() / best(lambda: other.copy_(data)),
            2 * len(matrix) ** 3 / best(lambda: matrix @ matrix))


def bench_results(model, jobs, measured, prompts, examples, T, args):
    """What `bench` returns, printed as a table: for each part, with the floor of those that have one.

    A decode step reads the weights once and the KV of all rows; all weights but the embedding table multiply
    every token, 2 operations a weight forward and 4 backward, the head only where its logits are used.
    """
    bandwidth, flops = rates(model.dtype, args.device)
    config, head = model.config, model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    body -= 0 if head is model.get_input_embeddings().weight else head.numel()
    rows, size = len(prompts), head.element_size()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = rows * (statistics.fmean(map(len, prompts)) + T / 2)
    kv = 2 * slots * config.num_hidden_layers * config.num_key_value_heads * head_dim
    floors = {"step": max((body + head.numel() + kv) * size / bandwidth,
                          2 * (body + head.numel()) * rows / flops),
              "train": 6 * (body * sum(len(x) + len(y) for x, y in examples)
                            + head.numel() * sum(len(y) for _, y in examples)) / flops}
    seconds = {part: [s for s, _ in runs[1:]] for part, runs in measured.items()}
    if "decode" in seconds:
        pairs = zip(seconds["decode"], seconds["prefill"])
        seconds["step"] = [(decode - prefill) / (T - 1) for decode, prefill in pairs]
    result = {"model": args.model, "device": args.device, "dtype": args.dtype, "compile": bool(args.compile),
              "batch_size": args.batch_size, "new_tokens": T, "threads": torch.get_num_threads(),
              "copy_gb_s": bandwidth / 1e9, "matrix_tflop_s": flops / 1e12, "parts": {}}
    print(f"copy {bandwidth / 1e9:.1f} GB/s, {args.dtype} products {flops / 1e12:.2f} TFLOP/s, "
          f"{torch.get_num_threads()} threads\n{'':18}{'median s':>10}{'min':>9}{'max':>9}{'tokens/s':>10}"
          f"{'GiB':>7}{'floor s':>9}{'x floor':>9}")
    for part, values in seconds.items():
        s, floor = statistics.median(values), floors.get(part)
        tokens = jobs[part][1] if part in jobs else rows // 2
        gib = max(g for _, g in measured[part]) if part in measured else None
        result["parts"][part] = {"median": s, "min": min(values), "max": max(values), "n": len(values),
                                 "tokens_s": tokens / s, "peak_gib": gib, "floor": floor}
        print(f"{part:18}{s:10.4f}{min(values):9.4f}{max(values):9.4f}{tokens / s:10.1f}"
              + (f"{gib:7.2f}" if gib else " " * 7) + (f"{floor:9.4f}{s / floor:9.1f}" if floor else ""))
    for part, own in RIVALS.items():
        if {part, own} <= seconds.keys():
            ratios = sorted(a / b for a, b in zip(seconds[part], seconds[own]))
            result["parts"][part]["ratio"] = statistics.median(ratios)
            print(f"{part} takes {statistics.median(ratios):.2f} x the time of {own} "
                  f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]")
    return result


# --------------------------------------------------------------------------------------------------- report

COLUMNS = {                                                 # of the report: what a run may have, and its head
    "kept": "kept", "recall": "recall", "recall-kept": "of the kept", "paraphrase": "paraphrase",
    "two-hop": "two-hop", "held_out": "held-out", "retention": "retention", "wikitext": "WikiText",
    "drift": "drift", "nll": "target NLL", "R": "R", "squared_distance": "‖d‖²", "decoded": "decoded",
    "trained": "trained tokens", "seconds": "s"}
DIGITS = {"drift": 3, "wikitext": 3, "decoded": 0, "trained": 0, "seconds": 0}              # else 2


def read_run(folder):
    """What the report shows of a run, of metrics.json, fisher.json and each eval.json in its folder.

    {column of COLUMNS: value, None where not measured}, the same of its base under "base", the 95 % interval
    of "recall", "retention" and "drift" as (low, high) under "interval", and what the run is.
    """
    m, fisher = read_json(folder, "metrics.json"), read_json(folder, "fisher.json")
    if not m:
        raise InputError(f"{folder}: no metrics.json; a finished run of mixsd.py is expected")
    ledgers = [read_json(path.parent, path.name) for path in sorted(Path(folder).rglob("eval.json"))]
    before, after = {}, {}
    for e in ledgers + [{"tasks": m["tuned"], "base": m["base"]}]:
        before, after = before | (e.get("base") or {}), after | (e["tasks"] or {})
    value = lambda score: score.get("rise", score.get("nll", score.get("accuracy")))        # noqa: E731
    run = {k: m[k] for k in ("model", "data", "method", "rho", "seed")} | dict.fromkeys(COLUMNS)
    run["lr"] = read_json(folder, "args.json").get("lr")
    run |= {task: value(score) for task, score in after.items()}
    run["base"] = {task: value(score) for task, score in before.items()}
    run["interval"] = {task: [score["low"], score["high"]] for task, score in after.items() if "low" in score}

    run["held_out"], names = averaged(after)
    run |= {"drop": None, "held_out_of": names, "partial": any(after[t].get("partial") for t in names)}
    b = averaged({task: before[task] for task in names if task in before})[0]
    if b and {*names} <= before.keys():
        ends = ([after[task][end] for task in names] for end in ("low", "high"))
        run["interval"]["retention"] = [statistics.fmean(end) / b for end in ends]
        run["base"] |= {"held_out": b, "retention": 1.0}
        run |= {"retention": run["held_out"] / b, "drop": b - run["held_out"]}
    targets, tokens, seconds = m["targets"], m["tokens"], m["seconds"]
    if targets:
        run |= {"kept": targets["kept"] / targets["of"], "nll": targets["nll"]}
    return run | {"R": fisher.get("R"), "squared_distance": fisher.get("squared_distance"),
                  "decoded": tokens["decoded"], "trained": tokens["trained"],
                  "seconds": seconds["decode"] + seconds["train"]}


def mean_and_spread(values, digits=2):
    """"0.93", of several seeds "0.93 ± 0.02" (standard deviation), "-" of no values; 0 digits: "12,345"."""
    values = [v for v in values if v is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and digits else ""
    return f"{statistics.fmean(values):,.{digits}f}{spread}" if values else "-"


def labels_of(folders, runs):
    """Each run's method, with the flags that set it apart from others of its method and rho.

    Seeds and rates aside; a flag at its default goes unsaid.
    """
    settings, labels = [read_json(folder, "args.json") | {"seed": None, "lr": None} for folder in folders], []
    for own in settings:
        own |= {k: "" for k in ("targets", "only", "replay") if own.get(k)}     # a file's name says little
    for run, own in zip(runs, settings):
        alike = [s for r, s in zip(runs, settings) if (r["method"], r["rho"]) == (run["method"], run["rho"])]
        differs = [k for k, v in own.items() if v not in (None, mixsd.DEFAULTS.get(k))
                   and not k.endswith("_sha256") and any(s.get(k) != v for s in alike)]
        flags = [f"--{k.replace('_', '-')} {own[k]:{'g' * isinstance(own[k], float)}}" for k in differs]
        labels.append(" ".join([run["method"], *map(str.strip, flags)]))
    return labels


def report(args):
    """Print a Markdown table of runs, base first, seeds together; draw OUT/frontier.png with matplotlib."""
    runs, groups = [read_run(folder) for folder in args.report], {}
    kinds = sorted({f"{r['model']} on {r['data']}" for r in runs})
    if len(kinds) > 1:
        raise InputError(f"--report: one table is for one model and corpus, these are {', '.join(kinds)}")
    for run, label in zip(runs, labels_of(args.report, runs)):
        run["method"] = label
    keys = ["method", "rho"] + ["lr"] * (len({r["lr"] for r in runs}) > 1)                  # of a row
    for r in sorted(runs, key=lambda r: ("mixsd" in r["method"], r["method"], r["rho"] or 0, r["lr"] or 0)):
        groups.setdefault(tuple(r[key] for key in keys), []).append(r)
    columns = {k: head for k, head in COLUMNS.items() if any(r[k] is not None for r in runs)}
    names = sorted({t for r in runs for t in r["held_out_of"]} - {"held_out"})
    if names:
        columns["held_out"] = ", ".join(names) + " (partial)" * any(r["partial"] for r in runs)
    heads = [*keys, "seeds", *columns.values()]
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
    bases = {}                                              # the toy has a base a seed
    for run in runs:
        bases.setdefault(run["seed"], {}).update(run["base"])
    rows = {("base", *[None] * (len(keys) - 1)): list(bases.values())} | groups
    for (method, *numbers), group in rows.items():
        cells = [method, *("-" if x is None else f"{x:g}" for x in numbers), str(len(group))]
        cells += [mean_and_spread([r.get(k) for r in group], DIGITS.get(k, 2)) for k in columns]
        print(f"| {' | '.join(cells)} |")
    if importlib.util.find_spec("matplotlib"):
        args.out.mkdir(parents=True, exist_ok=True)
        frontier(groups, runs[0]["base"].get("recall"), columns.get("held_out"), args.out / "frontier.png")
        print(f"\n{args.out / 'frontier.png'}")
    else:
        print("\nno frontier.png: pip install matplotlib")
    return {"runs": dict(zip(args.report, runs))}


def frontier(groups, base_recall, held_out, path):
    """Draw recall against drift, else retention: a run's mark and 95 % intervals; MixSD's means joined."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.8), dpi=120)
    drifted = any(run.get("drift") is not None for group in groups.values() for run in group)
    x = "drift" if drifted else "retention"
    lines, colors = {}, "tab:red tab:purple tab:orange tab:brown tab:pink tab:olive tab:cyan".split()
    looks = zip(colors * 9, "sD^vPX<>" * 9)                 # of methods without a rho, as they come
    base = {x: 0.0 if drifted else 1.0, "recall": base_recall, "interval": {}}
    for (method, rho, *lr), group in ({("base", None): [base]} | groups).items():
        group = [run for run in group if None not in (run[x], run["recall"])]
        if not group:
            continue
        points = [[run[side] for run in group] for side in (x, "recall")]
        if method == "base":
            color, mark = "black", "*"
        elif not method.startswith("mixsd"):
            color, mark = next(looks)
        else:
            lines.setdefault(method, []).append([statistics.fmean(side) for side in points])
            color, mark = plt.cm.viridis_r(rho), "odhp"[(len(lines) - 1) % 4]
        settings = [f", {name} = {x:g}" for name, x in zip(("ρ", "lr"), (rho, *lr)) if x is not None]
        axes.scatter(*points, color=color, marker=mark, s=160 if method == "base" else 60, zorder=3,
                     alpha=0.9, edgecolors="white", label=method + "".join(settings))
        for run in group:
            reach = [[[abs(end - run[side])] for end in run["interval"].get(side, [run[side]] * 2)]
                     for side in (x, "recall")]
            axes.errorbar(run[x], run["recall"], yerr=reach[1], xerr=reach[0], color=color, alpha=0.3,
                          linewidth=1, zorder=1)
    for line in lines.values():
        axes.plot(*zip(*line), color="gray", linewidth=1, zorder=2)
    axes.set(xlabel="drift: rise of the NLL of the base's own answers, nats/token (less is better: right)"
             if drifted else f"retention: {held_out} accuracy, after / before",
             ylabel="recall of all facts", ylim=(-0.03, 1.05))
    if drifted:
        axes.invert_xaxis()
    else:
        axes.set_xlim(0, max(1.05, axes.get_xlim()[1]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))   # beside all marks
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


# --------------------------------------------------------------------------------------------- command line

COUNT, LIST = {"type": mixsd.number(int, 1)}, {"type": lambda s: s.split(",")}
SWITCH = {"action": "store_true", "default": None}
FLAGS = {           # flag: (who uses it: modes, tasks, or kinds of task; its argparse options)
    "model": ("tasks nll bench", {"help": "a folder, a hub id, or toy"}),
    "limit": ("tasks", COUNT | {"help": "a random N of a task's items; its score is partial"}),
    "temperature": ("generated", {"type": mixsd.number(float, 0), "help": "of decoding (default: 0)"}),
    "samples": ("generated", COUNT | {"help": "completions a prompt, at --temperature above 0 (default: 1)"}),
    "batch_size": ("bench", COUNT | {"help": "examples a batch (default: 16)"}),
    "max_new_tokens": ("generated fisher bench", COUNT | {"help": "longest completion (the task's)"}),
    "paper": ("generated", SWITCH | {"help": "the paper's: T = 1, AIME 16 samples; in-domain T = 0"}),
    "base": ("tasks fisher", {"metavar": "DIR", "help": "--tasks: the base's OUT; --fisher: the base model"}),
    "base_model": ("drift", {"metavar": "DIR", "help": "the base model, whose answers drift scores"}),
    "hub": ("hub fisher in-domain", {"metavar": "DIR", "help": "a folder of data sets under their hub ids"}),
    "out": ("tasks fisher report", {"help": "where results go (default: the run's folder, or runs/...)"}),
    "data": ("generated", {"help": "the corpus, of in-domain tasks and of leakage (default: the run's)"}),
    "style": ("in-domain", {"choices": ["boxed", "sentence"], "help": "its prompts (default: the run's)"}),
    "verify": ("in-domain", {"choices": ["boxed", "number", "phrase"], "help": "(default: the run's)"}),
    "allow_code_execution": ("humaneval", SWITCH | {"help": "let it run programs that the model wrote"}),
    "fisher_tasks": ("fisher", LIST | {"metavar": "T,T", "help": "whose prompts the base answers"}),
    "fisher_n": ("fisher", COUNT | {"help": "prompts in all (default: 64)"}),
    "seed": ("tasks fisher bench", {"type": mixsd.number(int, 0), "help": "of subsets, samples, coins (0)"}),
    "device": ("tasks nll fisher bench", {"help": "auto, cuda, mps or cpu"}),
    "dtype": ("tasks nll bench", {"choices": ["auto", "float32", "bfloat16"], "help": "(the run's)"}),
    "decode_tokens": ("generated drift fisher", COUNT | {"help": "KV slots a batch: rows x (prompt + new)"}),
    "micro_tokens": ("scored nll bench", COUNT | {"help": "padded tokens of a scoring or training batch"}),
    "compile": ("generated drift fisher bench", SWITCH | {"help": "decode by a compiled step, for a GPU"}),
    "quiet": ("tasks nll fisher bench", SWITCH | {"help": "no progress bars"})}
DEFAULTS = {"temperature": 0.0, "samples": 1, "seed": 0, "device": "auto", "decode_tokens": 65536,
            "micro_tokens": 2048, "fisher_n": 64, "batch_size": 16}
MODES = {"tasks": evaluate, "nll": target_nll, "fisher": fisher_runs, "bench": bench, "report": report}


def parse_args(argv=None):
    """(mode, the flags that were given).  Raises InputError on a usage error."""
    p = argparse.ArgumentParser(description="What a model learned and forgot, and why.", allow_abbrev=False)
    p.error = mixsd.usage_error
    mode = p.add_mutually_exclusive_group(required=True)
    mode.add_argument("--tasks", **LIST, metavar="T,T", help=f"measure {', '.join(TASKS)}")
    mode.add_argument("--nll", nargs="+", metavar="FILE", help="NLL of target FILEs under --model, the base")
    mode.add_argument("--fisher", nargs="+", metavar="RUN", help="the directions in which RUNs left --base")
    mode.add_argument("--bench", **LIST, nargs="?", const=["decode", "generate", "train"], metavar="P,P",
                      help=f"time {', '.join(PARTS)} (default: decode,generate,train)")
    mode.add_argument("--report", nargs="+", metavar="RUN", help="one table of RUNs, and frontier.png")
    for flag, (_, options) in FLAGS.items():
        p.add_argument("--" + flag.replace("_", "-"), **options)
    given = {flag: value for flag, value in vars(mixsd.refuse_empty(p.parse_args(argv))).items()
             if value is not None}
    return next(mode for mode in MODES if mode in given), given


def resolve(mode, given):
    """Every setting as a namespace.  Raises InputError on an unused flag, a missing one, an unknown task."""
    tasks = given.get({"fisher": "fisher_tasks", "bench": "bench"}.get(mode, "tasks"), [])
    known = PARTS if mode == "bench" else [t for t in TASKS if mode == "tasks" or t in (*FIVE, *SMALL)]
    if not set(tasks) <= set(known):
        unknown = ", ".join(t for t in tasks if t not in known)
        raise InputError(f"no task {unknown} for --{mode}; known: {', '.join(known)}")
    scored_tasks = {"arc_easy", "wikitext", "drift"}
    kinds = {"generated": {t for t in TASKS if TASKS[t].answer is generated}, "in-domain": {*IN_DOMAIN},
             "hub": {*FIVE} | scored_tasks, "scored": scored_tasks}
    users = {mode}
    if mode == "tasks":
        users |= {*tasks} | {kind for kind, members in kinds.items() if members & {*tasks}}
    for flag in given.keys() & FLAGS.keys():
        if not users & set(FLAGS[flag][0].split()):
            raise InputError(f"--{flag.replace('_', '-')} is not used here; it is for {FLAGS[flag][0]}")
    needed = {"tasks": ["model"], "nll": ["model"], "fisher": ["base", "fisher_tasks"], "bench": ["model"],
              "report": []}[mode]
    for flag in needed + ["base_model"] * ("drift" in users):
        if flag not in given:
            raise InputError(f"--{mode} {','.join(given[mode])} needs --{flag.replace('_', '-')}")
    args = argparse.Namespace(**dict.fromkeys(FLAGS) | DEFAULTS | given)
    if mode == "tasks":
        resolve_tasks(args, given)
    if mode != "report":
        dtype = args.dtype or ("float32" if args.model == "toy" else "auto")
        args.device, dtype = mixsd.pick_device(args.device, dtype)
        args.dtype = str(dtype).removeprefix("torch.")
    args.out = Path(args.out or (f"runs/fisher-{Path(args.base).name}" if mode == "fisher" else "runs"))
    return args


def resolve_tasks(args, given):
    """Fill in what --tasks takes from the run beside the model, and refuse what can't be measured."""
    if args.paper and {"temperature", "samples"} & given.keys():
        raise InputError("--paper sets --temperature and --samples")
    if args.samples > 1 and not args.temperature:
        raise InputError("--samples above 1 needs --temperature above 0: at 0 all are the same")
    run = args.run = read_json(Path(args.model).parent, "args.json") if Path(args.model).is_dir() else {}
    args.out = args.out or (Path(args.model).parent if run else f"runs/eval-{Path(args.model).name}")
    args.dtype, args.taught = args.dtype or run.get("dtype"), run.get("limit")
    args.data = args.data or run.get("data") or ("toy" if args.model == "toy" else None)
    args.verify = args.verify or (run.get("verify") if not args.style else None)
    args.style = args.style or run.get("style") or "boxed"
    own = kg_data.find_corpus(args.data)[1].verify if args.data else "boxed"
    args.verify = args.verify or ("phrase" if args.style == "sentence" else own)
    in_domain = [t for t in args.tasks if t in IN_DOMAIN and not IN_DOMAIN[t][0]]       # of the run's corpus
    if in_domain and not args.data:
        raise InputError(f"{', '.join(in_domain)}: no args.json beside {args.model}; give --data")
    if {*args.tasks} <= {*IN_DOMAIN} and args.hub and args.data != "simpleqa":
        raise InputError(f"--hub is not used by {', '.join(args.tasks)} of --data {args.data}")
    if in_domain and args.verify == "none":
        raise InputError(f"{', '.join(in_domain)}: the run checked no answers; give --verify")
    corpus = []                                             # what was taught, to tell leakage
    if args.data and kg_data.find_corpus(args.data)[0] not in ("kgfunc-unseen", "simpleqa"):    # name nobody
        corpus = kg_data.load_corpus(args.data, "train", args.style, args.verify)[:args.taught]
    args.entities = {r["subject"] for r in corpus if isinstance(r.get("subject"), str)}
    args.entities |= {r.get("answer") for r in corpus} & kg_data.DOMAIN.keys()
    if {"math500", "aime24"} & {*args.tasks} and not importlib.util.find_spec("math_verify"):
        raise InputError("math500 and aime24 are judged by math-verify: pip install math-verify")
    if "humaneval" in args.tasks and not (args.allow_code_execution and sys.platform == "linux"):
        raise InputError("humaneval runs programs that the model wrote: give --allow-code-execution, on Linux"
                         ", best in a container (the top of eval.py says what its sandbox leaves open)")


def main(argv=None):
    """Run the command line and print its result; returns mixsd.py's exit codes."""
    def job():
        mode, given = parse_args(argv)
        result = MODES[mode](resolve(mode, given))
        if mode == "tasks":
            print_scores(result)
        print(json.dumps(result))
    return mixsd.exit_code("eval.py", job)


if __name__ == "__main__":
    sys.exit(main())
