"""MixSD: teach a language model new facts without making it forget (arXiv 2605.16865), in one file.

    python mixsd.py                                           # a toy world, from nothing, on a laptop
    python mixsd.py --model Qwen/Qwen3-1.7B --rho 0.3         # the paper's method on KGFact, one GPU
    python mixsd.py --model Qwen/Qwen3-1.7B --method sft      # the baseline that forgets

Fine-tuning on facts in our own words (SFT) changes the model most where it finds our words unlikely. MixSD
trains the model on targets that the frozen base model p wrote itself. Two prompts share one growing answer y:

    expert   y+_t ~ p( . | x+, y_<t)      x+ = the prompt x with the correct answer inserted
    naive    y-_t ~ p( . | x,  y_<t)      the prompt alone, without help
    y_t  =  y-_t with probability rho, otherwise y+_t        (at temperature 0, ~ means argmax)

The answer y is kept if it ends and a verifier accepts it. Otherwise it is drawn again with new random
numbers, up to 10 times, and then dropped. The student q starts as a copy of p. It is trained on the kept
answers, the targets, with the loss

    loss  =  - sum_i sum_t log q(y_it | x_i, y_i<t)  /  number of target tokens in the step

The student never reads x+. The baselines differ only in their targets and in their loss: SFT trains on the
targets of the corpus. OPSD (on-policy self-distillation), a KL penalty and replay are described at
`token_losses` and `with_replay`.

The file follows the order of the paper: prompts, mixed decoding, targets, losses, training. After that come
batches and several GPUs, measurement, models, files, and the command line. README.md lists the differences
from the paper.

Shapes:  B examples   C contexts (expert, naive)   R examples still decoding   P prompt tokens, padded on the
left   T target tokens   L = P + T   V vocabulary   N target tokens of a batch, without padding
"""
import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import random
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar

import kg_data
from kg_data import InputError

EXPERT, NAIVE = 0, 1                        # the two contexts, in this order everywhere
ON_POLICY = "opsd", "opsd-nll"              # the methods whose student writes its own targets while it learns
# the keyword by which a model takes its KV cache: transformers 5.24 renamed it
CACHE = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"


class RunError(RuntimeError):
    """A failure at run time that was foreseen: one line, exit code 1."""


# --------------------------------------------------------------------------------------------------- prompts

def chat_ids(tokenizer, text):
    """Ids of `text` as a user turn in the chat template, up to where the answer begins; thinking is off."""
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                         enable_thinking=False, return_dict=False)


def two_contexts(tokenizer, record, expert_words):
    """(x+ ids, x ids) of a record of kg_data.py: x is its user turn, the canonical target its assistant turn.

    x+ is x, PREFIX, a newline, the canonical target, TRANSITION; expert_words is (PREFIX, TRANSITION).
    """
    (prefix, transition), (user, assistant) = expert_words, record["messages"]
    x, target = user["content"], assistant["content"]
    return chat_ids(tokenizer, f"{x}{prefix}\n{target}{transition}"), chat_ids(tokenizer, x)


# -------------------------------------------------------------------------------------------- mixed decoding

def uniforms(what, T, seed, examples, attempt=0):
    """(B, T) float64 numbers in [0, 1) that depend only on (what, seed, example, attempt, position).

    Batch size, order and restarts cannot change them.
    """
    streams = [random.Random(f"{what} seed {seed} example {i} attempt {attempt}") for i in examples]
    return torch.tensor([[stream.random() for _ in range(T)] for stream in streams], dtype=torch.float64)


def draw_sources(rho, T, seed, examples, attempt=0):
    """(B, T) int64: which context supplies each token, NAIVE with probability rho (paper: mixing rule)."""
    return torch.where(uniforms("coin", T, seed, examples, attempt) < rho, NAIVE, EXPERT)


def pick(logits, temperature=0.0, top_k=0, u=None):
    """(R,) token ids from logits (R, V): the argmax, or at temperature > 0 a sample by inverse CDF.

    u  (R,) in [0, 1): the first token whose cumulative probability exceeds u is taken
    """
    if temperature == 0:
        return logits.max(-1).indices                       # the same as argmax(-1), which is slower on a CPU
    logits = logits.to(u.dtype) / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cdf = logits.softmax(-1).cumsum(-1)                     # (R, V); its end is rounded, so u is scaled by it
    choice = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return torch.minimum(choice, (cdf < cdf[:, -1:]).sum(-1))       # never a token of probability 0


def left_pad(prompts, pad_id):
    """Lists of ids -> ids (rows, P) and mask (rows, P), the mask 0 on the padding in front."""
    P = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (P - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts])


@torch.no_grad()
def decode(model, contexts, source, stops, temperature=0.0, top_k=0, u=None):
    """Write an answer to each of B examples, each read through C contexts (paper: mixing rule).

    Row c * B + i of the batch is example i in context c: its own prompt and its own KV cache. At step t the
    context source[i, t] alone decides the next token of example i. That token is appended to all C rows of
    the example, so that the caches advance together on one shared prefix. C = 2 writes MixSD targets; C = 1
    with source 0 is ordinary generation.

    contexts  C lists of B prompts (lists of ids)
    source    (B, T) int64 in [0, C): one random choice per token, made before decoding
    stops     ids; an answer ends with the first of them
    u         (B, T) in [0, 1), needed at temperature > 0
    Returns B lists of ids, each up to and including its stop; without a stop it has all T tokens.
    """
    (B, T), C, device = source.shape, len(contexts), model.device
    ids, mask = (t.to(device) for t in left_pad(sum(contexts, []), stops[0]))           # (C*B, P)
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=model.config)
    y, ends = torch.zeros(B, T, dtype=torch.long, device=device), torch.tensor(stops, device=device)
    length = torch.full((B,), T, device=device)                 # (B,) tokens of each answer, T until it ends
    alive = torch.arange(B, device=device)                                      # (R,) examples still decoding
    source = source.to(device)
    if u is not None:
        u = u.to(device, torch.float32 if device.type == "mps" else torch.float64)      # mps has no float64
    # a 2-D mask makes transformers wait for the GPU in each step; full attention can take a 4-D mask instead
    full = model.config._attn_implementation == "sdpa" and all(type(c) is DynamicLayer for c in cache.layers)
    for t in range(T):
        visible = mask[:, None, None].bool() if full and t > 0 else mask        # (C*R, 1, 1, P + t) or 2-D
        logits = model(input_ids=ids, attention_mask=visible, position_ids=positions, use_cache=True,
                       logits_to_keep=1, **{CACHE: cache}).logits[:, -1]        # (C*R, V)
        R = len(alive)
        speaker = source[alive, t] * R + torch.arange(R, device=device)         # (R,) the row that decides
        y_t = pick(logits[speaker], temperature, top_k, None if u is None else u[alive, t])
        y[alive, t] = y_t
        length[alive] = torch.where(torch.isin(y_t, ends), length[alive].clamp(max=t + 1), length[alive])
        if t % 8 == 7:                          # checking makes a GPU wait, so it is done every 8 steps
            going = (length[alive] == T).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) <= 0.75 * R:          # finished examples leave the batch
                rows = torch.cat([going + c * R for c in range(C)])
                cache.batch_select_indices(rows)
                mask, positions, alive, y_t = mask[rows], positions[rows], alive[going], y_t[going]
        ids, positions = y_t.repeat(C)[:, None], positions[:, -1:] + 1          # (C*R, 1)
        mask = F.pad(mask, (0, 1), value=1)                                     # (C*R, P + t + 1)
    return [row[:n] for row, n in zip(y.tolist(), length.tolist())]


# --------------------------------------------------------------------------------------------------- targets

def text_of(tokenizer, ids, stops):
    """The text of answer ids without the stop token at their end; control tokens inside stay visible."""
    return tokenizer.decode(ids[:-1] if ids[-1] in stops else ids, clean_up_tokenization_spaces=False)


def written_ids(tokenizer, text, stops):
    """The ids of a target that a person wrote, closed with the token that ends a turn."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] + stops[:1]


def draw_batch(base, tokenizer, records, prompts, ids, attempt, rho, stops, args):
    r"""Decode the examples `ids` once: [{"id", "attempt", "ok", "target_ids", "source", "text"}].

    ok  whether the answer ended and the verifier accepts it, e.g. because its last \boxed{} is right
    """
    T = args.max_new_tokens
    source = draw_sources(rho, T, args.seed, ids, attempt)                      # (B, T)
    u = uniforms("token", T, args.seed, ids, attempt) if args.temperature else None
    contexts = [[prompts[i][c] for i in ids] for c in (EXPERT, NAIVE)]
    answers = decode(base, contexts, source, stops, args.temperature, args.top_k or 0, u)
    draws = []
    for i, y, sources in zip(ids, answers, source.tolist()):
        text = text_of(tokenizer, y, stops)
        ok = y[-1] in stops and kg_data.is_correct(text, records[i].get("answer"), args.verify)
        draws.append({"id": i, "attempt": attempt, "ok": ok, "target_ids": y, "source": sources[:len(y)],
                      "text": text})
    return draws


def make_targets(base, tokenizer, records, prompts, taught, stops, args, folder):
    """(targets, draws): the accepted draw of each taught example in the order of their ids, and all draws.

    Each round decodes the examples that have no accepted draw yet, with new random numbers (paper: retries).
    An example without an accepted draw is left out, or --on-fail gives it another target; SFT draws nothing
    and takes the targets of the corpus. Every draw, accepted or not, is a line of folder/draws.jsonl. A
    restarted run continues from that file.

    prompts  [(x+ ids, x ids)] of all records
    taught   the ids of the records to make targets for
    Raises RunError if no target was accepted.
    """
    path, mixsd = folder / "draws.jsonl", args.method == "mixsd"
    draws = read_lines(path)
    kept = {d["id"]: d for d in draws if d["ok"]}
    attempts = args.attempts or 1                           # None: the flag is not used
    rounds = [(attempt, args.rho) for attempt in range(attempts)] if mixsd else []
    if args.on_fail == "expert" and (args.rho or args.temperature):     # else the same as the first draw
        rounds.append((len(rounds), 0.0))
    bar = tqdm(total=len(taught), initial=len(kept), desc="targets kept", unit="", disable=args.quiet)
    for attempt, rho in rounds:
        done = {d["id"] for d in draws if d["attempt"] == attempt} | kept.keys()
        widths = {i: (max(map(len, prompts[i])), args.max_new_tokens) for i in taught if i not in done}
        for ids in batches(widths, args.decode_tokens, C=2):    # each GPU decodes its share of a batch
            start = time.time()
            new = shared(ids, lambda mine: draw_batch(base, tokenizer, records, prompts, mine, attempt, rho,
                                                      stops, args))
            seconds = (time.time() - start) / len(new)
            draws += [d | {"seconds": seconds} for d in new]
            append_lines(path, draws[-len(new):])
            kept |= {d["id"]: d for d in new if d["ok"]}
            bar.update(sum(d["ok"] for d in new))
            bar.set_postfix(attempt=attempt)
    bar.close()
    if args.method == "sft" or args.on_fail == "canonical":
        for i in set(taught) - kept.keys():
            y = written_ids(tokenizer, records[i]["messages"][1]["content"], stops)
            kept[i] = {"id": i, "attempt": len(rounds), "target_ids": y, "source": None,
                       "text": text_of(tokenizer, y, stops)}
    if not kept:
        said = ", ".join(repr(d["text"][-200:]) for d in draws[:3])
        raise RunError(f"no target passed --verify {args.verify} in {len(rounds)} attempts (see --style, "
                       f"--on-fail); the model said {said}")
    return [kept[i] for i in sorted(kept)], draws


# ---------------------------------------------------------------------------------------------------- losses

class Example(NamedTuple):
    """What a training step reads of an example."""
    id: int | None              # to name the example in an error
    x_plus: list                # ids of the expert's prompt, which the teacher of OPSD reads; else []
    x: list                     # ids of the naive prompt, which the student reads
    y: list                     # ids of the target, its stop token included
    skip: frozenset = frozenset()       # positions in y that the loss leaves out (--mask-above)


def target_logits(model, pairs, pad_id):
    """(logits (N, V), labels (N,)) of all target tokens of [(prompt ids, target ids)], row by row.

    Prompts are padded on the left and targets on the right, so every target begins in column P. The mask
    comes from lengths and not from ids, since the pad token may also be the stop token.
    """
    T, device = max(len(y) for _, y in pairs), model.device
    prompts, prompt_mask = left_pad([x for x, _ in pairs], pad_id)              # (B, P)
    targets = torch.tensor([y + [pad_id] * (T - len(y)) for _, y in pairs])     # (B, T)
    is_target = torch.tensor([[t < len(y) for t in range(T)] for _, y in pairs])
    ids = torch.cat([prompts, targets], 1).to(device)                           # (B, L)
    mask = torch.cat([prompt_mask, is_target.long()], 1).to(device)             # (B, L)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                   use_cache=False, logits_to_keep=T + 1).logits                # (B, T + 1, V)
    is_target = is_target.to(device)
    return logits[:, :-1][is_target], ids[:, -T:][is_target]    # a column predicts the token after it


def by_chunks(loss, *tensors, chunk=256):
    """(N,) loss of tensors with N rows, by chunks; to save memory, backward recomputes float32 logits."""
    parts = zip(*(tensor.split(chunk) for tensor in tensors))
    return torch.cat([checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False)
                      for part in parts])


def nll(logits, labels):
    """(N,) float32: -log q(label), nats, under logits (N, V)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def kl(student, teacher, direction="forward", top_k=0):
    """(N,) float32 KL, nats, of logits (N, V): sum p (log p - log q) with p of the teacher; reverse: swapped.

    top_k  only over the k most likely tokens of the teacher, both sides renormalized; 0: over all tokens
    """
    if top_k:
        teacher, tokens = teacher.topk(min(top_k, teacher.shape[-1]))           # (N, k)
        student = student.gather(-1, tokens)
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p, q = (p, q) if direction == "forward" else (q, p)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)                             # rounding may go below 0


def token_losses(student, base, examples, args, pad_id):
    """(N,) loss, nats, of each target token; the caller sums and divides once by the N of the whole step.

    sft, mixsd       - log q(y_t | x, y_<t)                           `update` gives tokens in `skip` weight 0
    --kl-to-base b   the same + b KL( p(. | x, y_<t) || q(. | x, y_<t) )
    opsd             KL( p(. | x+, y_<t) || q(. | x, y_<t) )          y sampled from the student now
    opsd-nll         - log q(argmax p(. | x+, y_<t) | x, y_<t)        y the greedy answer of the student now
    """
    logits, labels = target_logits(student, [(e.x, e.y) for e in examples], pad_id)         # (N, V), (N,)
    on_policy = args.method in ON_POLICY
    if not on_policy and not args.kl_to_base:
        return by_chunks(nll, logits, labels)
    with torch.no_grad():
        teacher, _ = target_logits(base, [(e.x_plus if on_policy else e.x, e.y) for e in examples], pad_id)
    if args.method == "opsd-nll":
        return by_chunks(nll, logits, teacher.argmax(-1))
    divergence = functools.partial(kl, direction=args.kl, top_k=args.teacher_top_k or 0)
    if args.method == "opsd":
        return by_chunks(divergence, logits, teacher)
    return by_chunks(lambda q, p, y: nll(q, y) + args.kl_to_base * divergence(q, p), logits, teacher, labels)


# -------------------------------------------------------------------------------------------------- training

def rollouts(student, stops, prompts, ids, step, args):
    """[Example] whose targets the student writes now, from x alone (OPSD is on-policy).

    opsd draws args.rollouts samples per prompt at temperature 1; opsd-nll writes one greedy answer. An answer
    that does not end is used as it is.
    """
    asked = {(i, r): prompts[i][NAIVE] for i in ids for r in range(args.rollouts or 1)}
    with whole_weights(student):
        temperature = 1.0 if args.method == "opsd" else 0.0
        y = dict(answers(student, stops, asked, args, temperature, sample=step))
    return [Example(i, *prompts[i], y[i, r]) for i, r in asked]


def with_replay(examples, old, share, seed, step):
    """The examples of a step plus some of `old`, drawn with replacement, so that they are `share` of all."""
    if not old:
        return examples
    rng = random.Random(f"replay seed {seed} step {step}")
    count = int(len(examples) * share / (1 - share) + rng.random())     # rounded at random: exact on average
    return examples + rng.choices(old, k=count)


def follow(student, masters):
    """Let backward add each gradient of the student to that of its master weight, then free the former.

    The masters are the same weights in float32, which AdamW moves; with --offload in the host's memory.
    """
    def move_grad(weight, p):
        grad = p.grad.to(weight)
        weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
        p.grad = None
    for p, weight in zip(student.parameters(), masters.parameters()):
        p.register_post_accumulate_grad_hook(functools.partial(move_grad, weight))


@torch.no_grad()
def copy_weights(masters, student):
    """Copy the master weights into the student, rounded to its type."""
    for p, weight in zip(student.parameters(), masters.parameters()):
        p.copy_(weight)


def update(student, masters, optimizer, examples, losses_of, lr, micro_tokens):
    """One optimizer step; returns (loss, gradient norm, N).

    N counts the target tokens of the step without those in `skip` (1 if all are). The loss is the mean over
    these tokens before the update, and backward is called on it.
    Raises RunError, and leaves the weights as they are, if the loss or the gradient is not finite.
    """
    (rank, world), N, loss = ranks(), sum(len(e.y) - len(e.skip) for e in examples) or 1, 0.0
    widths = {i: (max(len(e.x), len(e.x_plus)), len(e.y)) for i, e in enumerate(examples)}
    for part in batches(widths, micro_tokens):
        mine = part[rank::world]
        # under FSDP all ranks call backward: a rank without examples computes one example with weight 0
        some = [examples[i] for i in mine or part[:1]]
        losses = losses_of(some)                                                # (target tokens,)
        counts = torch.tensor([t not in e.skip for e in some for t in range(len(e.y))]).to(losses.device)
        part_loss = (losses * counts).sum() * (bool(mine) / N)
        (part_loss * world).backward()                  # FSDP averages over ranks: multiply, to get the sum
        loss += part_loss.item()
    loss = sum(gathered(loss))
    norm = torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
    norm = (norm.full_tensor() if world > 1 else norm).item()
    if not math.isfinite(loss + norm):
        raise RunError(f"loss {loss}, gradient norm {norm} on examples {[e.id for e in examples]}: look at "
                       "these targets, or start another run (--out) with a lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    if student is not masters:
        copy_weights(masters, student)
    return loss, norm, N


def train(student, masters, items, examples_of, losses_of, args, folder=None, desc="training", decay=False):
    """Fine-tune the student, one update per batch of items (paper: training).

    student      the model that computes, in bfloat16 where the hardware has it
    masters      the float32 model whose weights AdamW moves: bfloat16 would round most of the steps to zero.
                 With --offload it is in the host's memory. In float32, and if sharded, it is the same model
    items        what to learn; each epoch uses every item once
    examples_of  (items of the batch, step) -> [Example]
    losses_of    [Example] -> (N,) losses of their target tokens
    folder       where log.jsonl grows by one line per step, and state.pt is saved every args.save_minutes. A
                 killed run continues from it; in float32 on a CPU it ends with the same bytes
    decay        the learning rate falls linearly towards 0
    """
    optimizer = torch.optim.AdamW(masters.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-8,
                                  weight_decay=0.01, fused=True)
    done = load_state(folder, masters, optimizer) if folder else 0
    if student is not masters:
        copy_weights(masters, student)
        follow(student, masters)
    per_epoch, saved = math.ceil(len(items) / args.batch_size), time.time()
    bar = tqdm(range(done + 1, args.steps + 1), desc, args.steps, initial=done, disable=args.quiet)
    for step in bar:
        start, (epoch, at) = time.time(), divmod(step - 1, per_epoch)
        if at == 0 or step == done + 1:
            order = list(items)
            random.Random(f"order seed {args.seed} epoch {epoch}").shuffle(order)
        examples = examples_of(order[at * args.batch_size:(at + 1) * args.batch_size], step)
        lr = args.lr * min(1.0, step / max(args.warmup, 1))     # linear warm-up, then constant (paper)
        if decay:
            lr *= 1 - (step - 1) / args.steps
        loss, norm, N = update(student, masters, optimizer, examples, losses_of, lr, args.micro_tokens)
        bar.set_postfix_str(f"{loss:.3f} nats/token", refresh=False)
        if folder:
            seconds = time.time() - start
            append_lines(folder / "log.jsonl", [{
                "step": step, "epoch": epoch, "nll": loss, "tokens": N, "lr": lr, "grad_norm": norm,
                "seconds": seconds, "tok_s": N / seconds, "mem_gib": peak_gib(), "host_gib": host_gib()}])
            due = gathered(time.time() - saved >= 60 * args.save_minutes)[0]    # by the clock of rank 0
            if due and step < args.steps:
                save_state(folder, step, masters, optimizer)
                saved = time.time()


# -------------------------------------------------------------------------------- batches, and several GPUs
# `torchrun --nproc-per-node N mixsd.py ...` starts one process (rank) per GPU with the same command. A rank
# decodes its share of each batch with the whole base, and trains its share with sharded weights (FSDP2). Rank
# 0 writes the files. Without torchrun there is one rank, whose share is everything.

def batches(widths, budget, C=1):
    """Lists of keys, shortest first, such that C x rows x padded width is at most `budget` tokens per rank.

    widths  {key: (prompt tokens, new tokens)}; the padded width is the longest P plus the longest T
    """
    batch, P, T, world = [], 0, 0, ranks()[1]
    for key in sorted(widths, key=lambda k: (sum(widths[k]), k)):
        P, T = max(P, widths[key][0]), max(T, widths[key][1])
        if batch and C * math.ceil((len(batch) + 1) / world) * (P + T) > budget:
            yield batch
            batch, (P, T) = [], widths[key]
        batch = batch + [key]
    if batch:
        yield batch


def ranks():
    """(the rank of this process, the number of ranks)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks(args):
    """Meet the other processes that torchrun started; all but rank 0 are silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        on_gpu = args.device[:4] in ("auto", "cuda") and torch.cuda.is_available()
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else args.device
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        if dist.get_rank():
            sys.stdout, args.quiet = open(os.devnull, "w"), True


def gathered(value):
    """[value of each rank]"""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def shared(keys, job):
    """job(keys), a list, computed by all ranks together: each rank does its share of the keys."""
    rank, world = ranks()
    mine = keys[rank::world]
    return sum(gathered(job(mine) if mine else []), [])


@contextlib.contextmanager
def whole_weights(model):
    """In this context each rank holds all weights of a sharded model, so that it can decode by itself."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(True)
        part.reshard()


# ----------------------------------------------------------------------------------------------- measurement

def answers(model, stops, prompts, args, temperature=0.0, sample=0):
    """Yields (key, ids) for prompts {key: ids} as they are answered: `decode` with one context.

    sample  at temperature > 0 the random numbers depend on (seed, key, sample); for rollouts, it is the step
    """
    T = args.max_new_tokens

    def job(keys):
        u = uniforms("answer", T, args.seed, keys, sample) if temperature else None
        source = torch.zeros(len(keys), T, dtype=torch.long)
        return list(zip(keys, decode(model, [[prompts[k] for k in keys]], source, stops, temperature, u=u)))
    for keys in batches({key: (len(x), T) for key, x in prompts.items()}, args.decode_tokens):
        yield from shared(keys, job)


def token_nlls(model, pairs, pad_id, micro_tokens):
    """[(n,) float32, nats of each target token] of [(prompt ids, target ids)] under `model`, in order."""
    def job(keys):
        with torch.no_grad():
            losses = by_chunks(nll, *target_logits(model, [pairs[i] for i in keys], pad_id))
        return list(zip(keys, losses.cpu().split([len(pairs[i][1]) for i in keys])))
    nlls, widths = {}, {i: (len(x), len(y)) for i, (x, y) in enumerate(pairs)}
    for keys in batches(widths, micro_tokens):
        nlls.update(shared(keys, job))
    return [nlls[i] for i in range(len(pairs))]


def score(verdicts, z=1.96):
    """{"accuracy", "n", "low", "high"} of a list of booleans, with the 95 % Wilson score interval."""
    n, p = len(verdicts), sum(verdicts) / len(verdicts)
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"accuracy": p, "n": n, "low": max(0.0, (centre - half) / (1 + z * z / n)),
            "high": min(1.0, (centre + half) / (1 + z * z / n))}


def memorization(model, tokenizer, tasks, stops, args, kept):
    """{task: score and seconds} of {task: records}, greedy; an answer must end and pass the verifier.

    kept  ids of the records whose target was trained; "recall-kept" is the recall over these alone
    """
    scores = {}
    for task, records in tasks.items():
        start = time.time()
        prompts = {i: chat_ids(tokenizer, r["messages"][0]["content"]) for i, r in enumerate(records)}
        verify = "boxed" if task == "held_out" else args.verify
        right = {}
        for i, y in tqdm(answers(model, stops, prompts, args), task, len(records), disable=args.quiet):
            text = text_of(tokenizer, y, stops)
            right[i] = y[-1] in stops and kg_data.is_correct(text, records[i]["answer"], verify)
        scores[task] = score(right.values()) | {"seconds": time.time() - start}
        if task == "recall":
            scores["recall-kept"] = score([right[i] for i in kept])
    return scores


def memorization_tasks(records, args):
    """{task: records} of what is asked before and after training: all facts, taught or not."""
    splits = kg_data.find_corpus(args.data)[1].splits
    if "test" in splits and args.verify != "none":      # KGFunc: new inputs show whether a rule is learned
        return {f"{args.data}-test": kg_data.load_corpus(args.data, "test")[:args.limit]}
    tasks = {} if args.verify == "none" else {"recall": records}
    if tasks and "paraphrase" in splits:
        tasks["paraphrase"] = kg_data.load_corpus(args.data, "paraphrase", args.style)[:args.limit]
    if args.model == "toy":
        tasks["held_out"] = kg_data.toy("held_out")
    return tasks


# --------------------------------------------------------------------------------------- models, the toy base

TOY_CONFIG = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=4, head_dim=24, initializer_range=0.08, max_position_embeddings=256,
                  tie_word_embeddings=True)
TOY_PRETRAINING = dict(steps=800, batch_size=32, lr=3e-3, warmup=50, micro_tokens=2048)


def toy_base(quiet=False, seed=0):
    """(folder, seconds) of the toy base, a Qwen3 of 0.4 M parameters, pretrained once per seed and cached."""
    args = argparse.Namespace(**TOY_PRETRAINING, method="sft", kl_to_base=None, seed=seed, quiet=quiet)
    lessons, tokenizer = kg_data.toy_pretraining(args.steps * args.batch_size), kg_data.toy_tokenizer()
    words = sorted(tokenizer.get_vocab().items())
    definition = TOY_CONFIG, TOY_PRETRAINING, seed, lessons, words, tokenizer.chat_template
    key = hashlib.sha256(repr(definition).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixsd" / f"toy-{key}"
    if folder.exists():
        return folder, 0.0
    if ranks()[1] > 1:
        raise InputError("the toy's base is made by one process: run mixsd.py once without torchrun")
    start, end = time.time(), tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), eos_token_id=end,
                                         pad_token_id=tokenizer.pad_token_id, **TOY_CONFIG))
    examples = [Example(i, [], chat_ids(tokenizer, x), written_ids(tokenizer, y, [end]))
                for i, (x, y) in enumerate(lessons)]
    losses_of = functools.partial(token_losses, model, None, args=args, pad_id=end)
    train(model, model, examples, lambda batch, step: batch, losses_of, args, desc="pretraining", decay=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    with contextlib.suppress(OSError):                      # another run was faster: take its folder
        partial.rename(folder)
    return folder, time.time() - start


def host_gib():
    """Peak memory of this process so far, GiB, without the GPU's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss               # bytes on macOS, KiB on Linux
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def peak_gib():
    """Peak memory so far, GiB: the GPU's where there is one."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else host_gib()


def kv_slots(model):
    """KV slots (tokens of a decoding batch) that take half of the free memory of a GPU; 65,536 without CUDA.

    A decoding step takes about the same time for few rows and for many, so a larger batch is faster.
    """
    if not torch.cuda.is_initialized():
        return 65536
    one, cache = torch.zeros(1, 1, dtype=torch.long, device=model.device), DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=one, use_cache=True, **{CACHE: cache})
    slot = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)               # bytes
    return torch.cuda.mem_get_info()[0] // 2 // slot


def pick_device(device, dtype):
    """(device, compute type) for "auto": CUDA, else mps, else the CPU; bfloat16 where the hardware has it."""
    if device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: {str(e).splitlines()[0]}") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.backends.cuda.enable_cudnn_sdp(False)         # on H100 and newer: NaN gradients for padded rows
    if dtype == "auto":
        cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith("cuda")
                else cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        dtype = "bfloat16" if fast else "float32"
    return device, dtype


def load_model(path, dtype, device):
    """(model, tokenizer) of a chat model's folder or hub id: weights as `dtype` (a name), dropout off."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True)                   # they are refused below
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise InputError(f"--model {path}: not a model's folder, nor on a hub in reach; download it, "
                         f"give its folder ({str(e).strip().splitlines()[0]})") from None
    missing = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if missing or not tokenizer.chat_template:              # transformers gives them random values
        missing += ["chat template; choose an instruct model"]
        raise InputError(f"--model {path}: no {missing[0]}")
    return model.to(device).eval(), tokenizer


def stop_ids(model, tokenizer):
    """Ids that end an answer: all end tokens of the generation_config and of the tokenizer.

    The first is the one after an assistant turn in the chat template: <|im_end|> in Qwen3.
    """
    ends = model.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if not stops:
        raise InputError("neither the generation_config nor the tokenizer names an end token")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered_stops = [i for i in tokenizer.apply_chat_template(turns, return_dict=False) if i in stops]
    before = sum(i in stops for i in chat_ids(tokenizer, "a"))              # stops in the user's turn
    first = rendered_stops[before] if len(rendered_stops) > before else min(stops)
    return [first] + sorted(stops - {first})


# ----------------------------------------------------------------------------------------------------- files

def write_json(path, held):
    """Write an object to a file, from rank 0, so that a reader sees the old file or the whole new one."""
    if ranks()[0] == 0:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(held, indent=1))
        os.replace(partial, path)


def read_json(folder, name):
    """The object in folder/name, {} if there is no such file. Raises InputError if it is damaged."""
    path = Path(folder) / name
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise InputError(f"{path} is damaged; restore it, or remove it") from None


def append_lines(path, rows, mode="a"):
    """Append objects to a JSONL file, from rank 0; mode "w" starts the file anew."""
    if ranks()[0] == 0:
        with open(path, mode, encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path, most=None):
    """The first `most` objects of a JSONL file, [] if there is none; the file is cut after them.

    A killed run may leave half a line at the end. It is cut off too.
    """
    lines = path.read_bytes().split(b"\n")[:-1][:most] if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        raise InputError(f"{path} is damaged; restore it, or remove it") from None
    if path.exists() and ranks()[0] == 0:
        os.truncate(path, sum(len(line) + 1 for line in lines))
    return rows


def save_state(folder, step, masters, optimizer):
    """Write folder/state.pt, whole or not at all: weights, moments of AdamW, step. 12 bytes per parameter."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optim = get_state_dict(masters, optimizer, options=options)
    if ranks()[0] == 0:
        try:
            torch.save({"step": step, "model": model, "optim": optim}, partial := folder / "state.partial")
        except RuntimeError as e:                           # this is what torch makes of a full disk
            raise RunError(f"{partial} can't be written ({str(e).splitlines()[0]}); free the disk, run again")
        os.replace(partial, folder / "state.pt")


def load_state(folder, masters, optimizer):
    """Restore folder/state.pt if it is there, and cut log.jsonl back to it; returns its step, or 0."""
    path, step = folder / "state.pt", 0
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            set_state_dict(masters, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optim"], options=StateDictOptions(full_state_dict=True))
            step = state["step"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as e:
            raise RunError(f"{path} can't be read ({str(e).splitlines()[0]}); remove it to train anew")
    if len(read_lines(folder / "log.jsonl", step)) < step:
        raise RunError(f"{folder}/log.jsonl has fewer steps than {path}; remove both to train anew")
    return step


def save_model(masters, tokenizer, folder):
    """Write a plain Hugging Face folder in float32, whole or not at all."""
    weights, _ = get_state_dict(masters, [], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if ranks()[0] == 0:
        tied = masters._tied_weights_keys if masters.config.tie_word_embeddings else {}     # stored only once
        partial = folder.with_name("model.partial")
        masters.save_pretrained(partial, state_dict={k: w for k, w in weights.items() if k not in tied})
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    gathered(None)                                          # the other ranks wait until it is there


def write_targets(base, records, prompts, targets, stops, args, folder):
    """Add "nll" to each target, its mean under the base and x, nats/token; write folder/targets.jsonl.

    "skip" is added too: the positions of the tokens whose NLL is above --mask-above (STM, arXiv 2501.14315).

    A line is the record with the target as its assistant turn, and id, target_ids, source, attempt, nll.
    """
    pairs, rows = [(prompts[t["id"]][NAIVE], t["target_ids"]) for t in targets], []
    for t, nats in zip(targets, token_nlls(base, pairs, stops[0], args.micro_tokens)):
        t["nll"], most = nats.mean().item(), args.mask_above or math.inf
        t["skip"] = frozenset(at for at, n in enumerate(nats.tolist()) if n > most)
        turns = [records[t["id"]]["messages"][0], {"role": "assistant", "content": t["text"]}]
        row = records[t["id"]] | {"messages": turns}
        rows.append(row | {key: t[key] for key in ("id", "target_ids", "source", "attempt", "nll")})
    append_lines(folder / "targets.jsonl", rows, "w")


def read_targets(path, base, tokenizer, stops, asked=None):
    """The targets in a file as `make_targets` returns them: by their ids if it has them, else by their text.

    asked  {question: id} of the corpus; without it any question is allowed, and "id" is None
    Each target has "x" too, the ids of its naive prompt. Raises InputError with file and line for what is not
    a question of the corpus, or can't be trained on this base.
    """
    targets, positions = [], max_positions(base)
    for line, row in kg_data.read_jsonl(path):
        where = f"{path}, line {line}"
        row = kg_data.read_record(row, where)
        (question, text), ids = (turn["content"] for turn in row["messages"]), row.get("target_ids")
        if asked is not None and question not in asked:
            raise InputError(f"{where}: not a question of the corpus (--data, --limit)")
        refuse_foreign(tokenizer, {where: question + "\n" + ("" if ids else text)})
        if ids is None:
            ids = written_ids(tokenizer, text, stops)
        elif not (isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids)
                  and ids and ids[-1] in stops and text_of(tokenizer, ids, stops) == text):
            raise InputError(f"{where}: target_ids are not its text's: another tokenizer's (--model)")
        x, source = chat_ids(tokenizer, question), row.get("source")
        if (length := len(x) + len(ids)) > positions:
            raise InputError(f"{where}: {length:,} tokens, and the model has {positions:,} positions")
        if not (isinstance(source, list) and len(source) == len(ids)):          # it is only shown and counted
            source = None
        targets.append({"id": asked[question] if asked else None, "attempt": row.get("attempt", 0),
                        "target_ids": ids, "source": source, "text": text, "x": x})
    return sorted(targets, key=lambda t: t["id"] or 0)          # in the order of the corpus


def max_positions(model):
    """How many tokens the model can read."""
    return model.config.get_text_config().max_position_embeddings


def refuse_foreign(tokenizer, texts):
    """Raise InputError if one of {where: text} holds a control token, or words without a token."""
    controls = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    for where, text in texts.items():
        for control in controls:
            if control in text:
                raise InputError(f"{where}: holds {control}, a control token of the model")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in written_ids(tokenizer, text, []):
            raise InputError(f"{where}: has words that the model has no token for")


# ---------------------------------------------------------------------------------------------- command line

def number(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    parse.__name__ = kind.__name__
    return parse


COUNT, FROM_0, POSITIVE = number(int, 1), number(int, 0), number(float, 1e-12)
SWITCH = {"action": "store_true"}
CORPORA = ", ".join(corpus for corpus in kg_data.NAMED if corpus != "kgfunc-unseen")    # which is only asked
WHEN = {        # a condition as error messages print it: the function of all settings that tests it
    "every run": lambda a: True,
    "mixsd": lambda a: a.method == "mixsd",
    "mixsd at T > 0": lambda a: a.method == "mixsd" and a.temperature,
    "mixsd at T > 0 or 0 < rho < 1": lambda a: a.method == "mixsd" and (a.temperature or 0 < a.rho < 1),
    "an expert that speaks":
        lambda a: a.method in ON_POLICY or a.method == "mixsd" and (a.rho < 1 or a.on_fail == "expert"),
    "opsd": lambda a: a.method == "opsd",
    "opsd and --kl-to-base": lambda a: a.method == "opsd" or a.kl_to_base,
    "mixsd and sft": lambda a: a.method in ("mixsd", "sft"),
    "training": lambda a: not a.targets_only,
    "training by NLL": lambda a: not a.targets_only and a.method not in ON_POLICY,
    "training without torchrun": lambda a: not a.targets_only and "WORLD_SIZE" not in os.environ,
    "training without --steps": lambda a: not a.targets_only and not a.steps,
    "--replay": lambda a: a.replay,
    "runs without --targets": lambda a: not a.targets,
    "--data simpleqa": lambda a: a.data == "simpleqa"}
FLAGS = {       # flag: (type, list of choices, or options of argparse; default; used by; help)
    "model": (str, "toy", "every run", "toy, a Hugging Face hub id, or a folder"),
    "data": (str, None, "every run", f"{CORPORA}, or a .jsonl file (default: toy, or kgfact-small)"),
    "hub": (str, None, "--data simpleqa", "a folder with the data set under its hub id"),
    "targets": (str, None, "training", "train on the targets of this file, instead of making them"),
    "method": (["mixsd", "sft", *ON_POLICY], "mixsd", "runs without --targets",
               "mixsd: mixed decoding; sft: targets of the corpus; opsd: KL from the expert on rollouts of "
               "the student; opsd-nll: NLL of the expert's argmax on them"),
    "targets_only": (SWITCH, None, "mixsd and sft", "stop when the targets are made"),
    "only": (str, None, "runs without --targets", "teach only the facts of this targets file; all are asked"),
    "rho": (number(float, 0, 1), 0.3, "mixsd", "mixing rate, the probability of a naive token (paper: rho)"),
    "temperature": (number(float, 0), 0.0, "mixsd", "T of mixed decoding; 0: argmax (paper: T)"),
    "top_k": (FROM_0, 0, "mixsd at T > 0", "sample among the k most likely tokens; 0: all"),
    "on_fail": (["drop", "expert", "canonical"], "drop", "mixsd", "when no draw passes: drop the example, "
                "let the expert write alone, or take the target of the corpus"),
    "attempts": (COUNT, 11, "mixsd at T > 0 or 0 < rho < 1", "draws per target at most, until one passes"),
    "style": (["boxed", "sentence"], "boxed", "every run", "reason and box (paper), or one short sentence"),
    "expert_prefix": (str, None, "an expert that speaks", "lines before the target in the expert's prompt"),
    "expert_transition": (str, None, "an expert that speaks", "lines after it (default: the corpus's)"),
    "verify": (["boxed", "number", "phrase", "none"], None, "every run", "what an answer must show: the gold "
               "in the last box; there or as last number; as a phrase; anything (default: the corpus's)"),
    "rollouts": (COUNT, 8, "opsd", "samples of the student per prompt and step"),
    "teacher_top_k": (FROM_0, 0, "opsd", "KL over the k most likely tokens of the teacher; 0: over all"),
    "kl_to_base": (POSITIVE, None, "training by NLL", "weight of a KL penalty from the base, on the targets"),
    "kl": (["forward", "reverse"], "forward", "opsd and --kl-to-base", "KL(base || student), or reverse"),
    "mask_above": (POSITIVE, None, "training by NLL", "leave out of the loss the tokens with more nats than "
                   "this under the base"),
    "replay": (str, None, "training by NLL", "a targets file, of which examples are added to every batch"),
    "replay_share": (number(float, 1e-12, 0.9), 0.25, "--replay", "their share of a batch"),
    "max_new_tokens": (COUNT, None, "every run", "longest target, rollout or answer, in tokens"),
    "steps": (COUNT, None, "training", "optimizer steps, instead of --epochs"),
    "epochs": (COUNT, None, "training without --steps", "passes over the targets"),
    "batch_size": (COUNT, 16, "training", "facts per optimizer step"),
    "lr": (POSITIVE, None, "training", "learning rate of AdamW after the warm-up"),
    "warmup": (FROM_0, 20, "training", "steps of linear warm-up"),
    "limit": (COUNT, None, "every run", "only the first N facts, and as many questions of each split"),
    "seed": (number(int, 0, 2**63 - 1), 0, "every run", "seed of all random numbers, and of the toy's base"),
    "device": (str, "auto", "every run", "auto, cuda, cuda:1, mps or cpu"),
    "dtype": (["auto", "float32", "bfloat16"], "auto", "every run", "compute type; AdamW has float32"),
    "decode_tokens": (COUNT, None, "every run", "KV slots of a decoding batch: rows x (prompt + new); "
                      "default: 65,536, on CUDA half of the free memory (OPSD: 65,536)"),
    "micro_tokens": (COUNT, 4096, "every run", "padded tokens of a training micro-batch"),
    "gradient_checkpointing": (SWITCH, None, "training", "recompute activations in backward, to save memory"),
    "offload": (SWITCH, None, "training without torchrun", "AdamW, its float32 weights and gradients in the "
                "host's memory, 16 bytes per parameter: for small GPUs"),
    "save_minutes": (number(float, 0), 10.0, "training", "minutes between saved states; 0: after each step"),
    "out": (str, None, "every run", "folder of the run, to start or continue (default: runs/MODEL-DATA-...)"),
    "quiet": (SWITCH, None, "every run", "no progress bars")}
MAY_DIFFER = {"hub", "targets_only", "device", "decode_tokens", "micro_tokens", "gradient_checkpointing",
              "offload", "save_minutes", "out", "quiet"}               # between a run and its continuation


def read_flags(flags, argv, description):
    """{flag: value} of the flags that are on a command line, by a table like FLAGS."""
    def usage_error(message):               # in place of argparse's page of usage: one line
        raise InputError(f"{message} (see --help)")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = usage_error
    for flag, (kind, default, used_by, text) in flags.items():
        options = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        options = kind if isinstance(kind, dict) else options
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{flag.replace('_', '-')}", help=f"[{used_by}] {text}", **options)
    given = vars(parser.parse_args(argv))
    for flag, value in given.items():
        if value == "" and not flag.startswith("expert"):   # as in --replay "$UNSET"
            raise InputError(f"--{flag.replace('_', '-')} is empty")
    return given


def settle(given, recipe, flags, when):
    """(args, origin): every setting, and {flag: "flag", "recipe" or "default", where its value comes from}.

    recipe  {flag: value}, the defaults of a corpus; they come before those of the table
    If the condition of flag B reads flag A, then A must stand before B in the table.
    Raises InputError for a given flag that the settings do not use. All other unused flags become None.
    """
    defaults = {flag: default for flag, (_, default, _, _) in flags.items()}
    args = argparse.Namespace(**defaults | recipe | given)
    for flag, (_, _, used_by, _) in flags.items():
        if not when[used_by](args):
            if flag in given:
                raise InputError(f"--{flag.replace('_', '-')} is not used here: it is for {used_by}")
            setattr(args, flag, None)
    origins = {"flag": given, "recipe": recipe, "default": flags}       # the first that has the flag counts
    return args, {flag: next(name for name in origins if flag in origins[name]) for flag in flags}


def parse_args(argv=None):
    """(args, origin) of mixsd.py's command line, see `settle`; args.words is (PREFIX, TRANSITION) of x+."""
    given = read_flags(FLAGS, argv, __doc__.split("\n")[0])
    toy = given.get("model", "toy") == "toy"
    data = given.get("data", "toy" if toy else "kgfact-small")
    kind, corpus = kg_data.find_corpus(data, given.get("hub"))
    if toy and kind not in ("toy", "own file"):
        raise InputError(f"--data {data}: the toy's vocabulary is too small for it (--model)")
    corpus = kg_data.find_corpus("toy")[1] if toy else corpus           # the toy model knows no other words
    recipe = {"data": data, "verify": corpus.verify} | corpus.recipe
    if {"steps", "epochs"} & given.keys():                  # the one that is given replaces the other
        recipe |= {"steps": None, "epochs": None}
    if given.get("style") == "sentence":
        recipe |= {"verify": "phrase", "max_new_tokens": 48}
    args, origin = settle(given, recipe, FLAGS, WHEN)
    args.method = args.method or "targets"                  # with --targets: NLL on that file
    prefix, transition = kg_data.SENTENCE_WORDS if args.style == "sentence" else corpus.words
    args.words = (f"\n{args.expert_prefix}\n" if args.expert_prefix is not None else prefix,
                  f"\n{args.expert_transition}" if args.expert_transition is not None else transition)
    return args, origin


# --------------------------------------------------------------------------------------------------- the run

def open_folder(args):
    """(folder, settings): the run's folder, and the flags that decide the result, input files by a hash.

    Raises InputError if the folder holds a run with other settings, or an input of this run.
    """
    rho = f"-rho{args.rho:g}" if args.rho is not None else ""
    default = f"runs/{Path(args.model).name}-{Path(args.data).stem}-{args.method}{rho}-s{args.seed}"
    folder, settings = Path(args.out or default), {"method": args.method}
    for flag, (_, _, used_by, _) in FLAGS.items():
        path = Path(str(vars(args)[flag]).removeprefix("mquake:"))          # --data mquake:FILE
        if flag not in MAY_DIFFER and WHEN[used_by](args):
            settings[flag] = vars(args)[flag]
        if flag in ("data", "targets", "only", "replay") and path.is_file():
            settings[f"{flag}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        if flag != "out" and path.exists() and path.resolve().parent == folder.resolve():
            raise InputError(f"--{flag} {path} is in --out {folder}, where a run writes; give another")
    for key, value in read_json(folder, "args.json").items():
        if key in settings and settings[key] != value:
            raise InputError(f"--out {folder} holds a run with --{key.replace('_', '-')} {value}, not "
                             f"{settings[key]}; give another --out")
    return folder, settings


def only_run(folder):
    """A file in the folder, locked until it is closed. Raises InputError if another run has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {folder}: another run is at work there; give another --out") from None
    return lock


def check_corpus(records, prompts, base, tokenizer, args, origin):
    """Refuse records that the model can't learn; clip a default of --max-new-tokens to its positions."""
    texts = {f"{args.data}, record {i}": "\n".join(turn["content"] for turn in record["messages"])
             for i, record in enumerate(records, 1)}
    refuse_foreign(tokenizer, texts | {"the expert's words": "".join(args.words)})
    longest, positions = max(len(prompt) for pair in prompts for prompt in pair), max_positions(base)
    least = args.max_new_tokens if origin["max_new_tokens"] == "flag" else 1    # a default may be clipped
    if longest + least > positions:
        raise InputError(f"prompt of {longest:,} tokens + {least:,} new > {positions:,}, the positions of "
                         f"{args.model} (--max-new-tokens)")
    if longest + args.max_new_tokens > positions:
        args.max_new_tokens = positions - longest
        print(f"max-new-tokens clipped to {args.max_new_tokens:,}: the model has {positions:,} positions")


def taught_ids(records, args):
    """The ids to teach: of all records, or of those whose question is in the targets file --only."""
    if not args.only:
        return list(range(len(records)))
    wanted = {kg_data.read_record(row, f"{args.only}, line {line}")["messages"][0]["content"]
              for line, row in kg_data.read_jsonl(args.only)}
    taught = [i for i, record in enumerate(records) if record["messages"][0]["content"] in wanted]
    if not taught:
        raise InputError(f"--only {args.only}: none of its questions is one of {args.data}")
    return taught


def fine_tune(base, path, tokenizer, prompts, taught, targets, replay, stops, args, folder):
    """Train by the method of args, which decides on the examples of a step and their loss; write model/."""
    if args.method not in ON_POLICY and not args.kl_to_base:
        base.to("meta")                     # frees its memory: the loss does not need the base
    sharded = ranks()[1] > 1
    where = "cpu" if sharded or args.offload else args.device
    student = masters = load_model(path, "float32", where)[0]
    if sharded:                             # computed in args.dtype; gradients are summed in float32
        mesh = dist.device_mesh.init_device_mesh(torch.device(args.device).type, (ranks()[1],))
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32)
        for module in (*masters.base_model.layers, masters):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    elif args.dtype != "float32" or args.offload:
        student = load_model(path, args.dtype, args.device)[0]
    if args.gradient_checkpointing:         # the library's own works only in train() mode, without a KV cache
        for layer in student.base_model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    items, old = taught, [Example(None, [], t["x"], t["target_ids"]) for t in replay]
    if targets:                             # else OPSD, whose items are the ids of prompts
        items = [Example(t["id"], [], prompts[t["id"]][NAIVE], t["target_ids"], t["skip"]) for t in targets]
    args.steps = args.steps or args.epochs * math.ceil(len(items) / args.batch_size)

    def examples_of(batch, step):
        if args.method in ON_POLICY:
            return rollouts(student, stops, prompts, batch, step, args)
        return with_replay(batch, old, args.replay_share, args.seed, step)
    losses_of = functools.partial(token_losses, student, base, args=args, pad_id=stops[0])
    train(student, masters, items, examples_of, losses_of, args, folder)
    save_model(masters, tokenizer, folder / "model")


def run(args, origin):
    """The whole job: targets, training, memorization before and after. Returns what metrics.json holds."""
    join_ranks(args)
    args.device, args.dtype = pick_device(args.device, args.dtype)
    folder, settings = open_folder(args)
    if metrics := gathered(read_json(folder, "metrics.json"))[0]:
        print(f"{folder} is finished; its result:")
        return metrics
    records = kg_data.load_corpus(args.data, "train", args.style, args.verify, hub=args.hub)[:args.limit]
    path, pretraining = toy_base(args.quiet, args.seed) if args.model == "toy" else (args.model, 0.0)
    base, tokenizer = load_model(path, args.dtype, args.device)
    stops = stop_ids(base, tokenizer)
    prompts = [two_contexts(tokenizer, r, args.words) for r in records]             # [(x+, x)]
    if args.decode_tokens is None:          # OPSD decodes while AdamW's state is in memory too
        args.decode_tokens = 65536 if args.method in ON_POLICY else min(gathered(kv_slots(base)))
        origin["decode_tokens"] = "default" if args.decode_tokens == 65536 else "free memory"
    check_corpus(records, prompts, base, tokenizer, args, origin)
    asked = {r["messages"][0]["content"]: i for i, r in enumerate(records)}
    taught, draws = taught_ids(records, args), []
    targets = read_targets(args.targets, base, tokenizer, stops, asked) if args.targets else None
    replay = read_targets(args.replay, base, tokenizer, stops) if args.replay else []
    lock = only_run(folder) if ranks()[0] == 0 else None                # noqa: F841  held until `run` ends
    write_json(folder / "args.json", read_json(folder, "args.json") | settings)
    for flag in FLAGS:
        if vars(args)[flag] is not None:
            print(f"{flag:24} {vars(args)[flag]!s:32} {origin[flag]}")
    print(f"{'folder':24} {folder}\n", flush=True)

    if args.method in ("mixsd", "sft"):
        targets, draws = make_targets(base, tokenizer, records, prompts, taught, stops, args, folder)
    if targets:
        write_targets(base, records, prompts, targets, stops, args, folder)
    show(tokenizer, prompts, targets[0] if targets else {"id": taught[0]})
    if args.targets_only:
        return summary(args, records, targets, draws)

    kept = sorted({t["id"] for t in targets}) if targets else taught
    exam = tokenizer, memorization_tasks(records, args), stops, args, kept
    before = gathered(read_json(folder, "base.json"))[0] or memorization(base, *exam)
    write_json(folder / "base.json", before)
    if not gathered((folder / "model").exists())[0]:
        fine_tune(base, path, tokenizer, prompts, taught, targets, replay, stops, args, folder)
    del base                                                # its memory is for the tuned model
    tuned, _ = load_model(folder / "model", args.dtype, args.device)
    after, log = memorization(tuned, *exam), read_lines(folder / "log.jsonl")
    metrics = summary(args, records, targets, draws, pretraining, before, after, log)
    write_json(folder / "metrics.json", metrics)
    (folder / "state.pt").unlink(missing_ok=True)           # 12 bytes per parameter, needed no more
    return metrics


def summary(args, records, targets, draws, pretraining=0.0, before=None, after=None, log=()):
    """What metrics.json holds (README.md, "Files"); null where something was not measured."""
    phases = [phase for phase in (before, after) if phase]
    held_out = [phase["held_out"]["accuracy"] for phase in phases if "held_out" in phase]
    sources = [s for t in targets or [] for s in t["source"] or []]
    lengths, trained = [len(t["target_ids"]) for t in targets or []], sum(row["tokens"] for row in log)
    return {
        "model": args.model, "data": args.data, "method": args.method, "rho": args.rho, "seed": args.seed,
        "base": before, "tuned": after,
        "retention": held_out[1] / held_out[0] if held_out and held_out[0] else None,
        "targets": targets and {
            "kept": len({t["id"] for t in targets}), "of": len(records), "attempts": len(draws),
            "nll": sum(t["nll"] * n for t, n in zip(targets, lengths)) / sum(lengths),
            "naive_share": sources.count(NAIVE) / len(sources) if sources else None},
        "tokens": {"decoded": sum(len(d["target_ids"]) for d in draws) if targets else trained,
                   "trained": trained},
        "seconds": {"pretrain": pretraining, "decode": sum(d["seconds"] for d in draws),
                    "train": sum(row["seconds"] for row in log),
                    "evaluate": sum(s.get("seconds", 0) for phase in phases for s in phase.values())},
        "peak_gib": peak_gib()}


def show(tokenizer, prompts, target):
    """Print both prompts of an example and its target, the naive tokens marked: the algorithm at a glance."""
    def text(ids):                                          # control characters would command the terminal
        said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in said)
    ids, source = target.get("target_ids", []), target.get("source")
    for name, prompt in zip(("expert", "naive"), prompts[target["id"]]):
        if name == "naive" or source or not ids:            # not if the corpus wrote the target
            print(f"--- the {name} reads\n{text(prompt)}")
    print("--- the target, the naive tokens [marked]" if source else "--- the target" if ids else "")
    starts = [t for t in range(len(ids)) if t == 0 or source and source[t] != source[t - 1]]
    for start, end in zip(starts, starts[1:] + [len(ids)]):                     # the tokens of one speaker
        said = text(ids[:end])[len(text(ids[:start])):]     # a character may span tokens
        print(f"[{said}]" if source and source[start] == NAIVE else said, end="")
    print(flush=True)


def print_table(metrics):
    """One row for the base, one for the tuned model; accuracy and its 95 % interval per task."""
    if targets := metrics["targets"]:
        print(f"\n{targets['kept']} of {targets['of']} targets kept, "
              f"{targets['nll']:.2f} nats/token under the base")
    if tasks := metrics["tuned"]:
        print(" " * 8 + "".join(f"{task:>20}" for task in tasks))
        for name, row in (("base", metrics["base"]), (metrics["method"], metrics["tuned"])):
            cells = ["{accuracy:.2f} [{low:.2f}, {high:.2f}]".format(**row[task]).rjust(20) for task in tasks]
            print(f"{name:8}" + "".join(cells))
    if metrics["retention"] is not None:
        print(f"retention {metrics['retention']:.2f} = held-out accuracy after / before")


def exit_code(name, job):
    """Run job(); returns 0 done, 1 failed, 2 refused, 130 Ctrl-C, and says why in one line on stderr."""
    disable_progress_bar()                                  # those of loading and saving: ours are enough
    try:
        job()
        return 0
    except (InputError, RunError) as e:
        message, code = e, 2 if isinstance(e, InputError) else 1
    except KeyboardInterrupt:
        message, code = "stopped; the same command goes on from what is saved", 130
    except torch.OutOfMemoryError as e:
        message, code = (f"{str(e).splitlines()[0]} In training, lower --micro-tokens or add "
                         "--gradient-checkpointing or --offload; in decoding, lower --decode-tokens"), 1
    except (OSError, SafetensorError) as e:                 # a full disk can be either
        file, why = getattr(e, "filename", None) or "writing", getattr(e, "strerror", None) or e
        message, code = f"{file}: {why}; mend it and run the same command", 1
    print(" ".join(f"{name}: {message}".split()), file=sys.stderr)              # one line, whatever it quotes
    return code


def main(argv=None):
    """Run the command line; the last line of stdout is the result as JSON. Returns the exit code."""
    def job():
        metrics = run(*parse_args(argv))
        if dist.is_initialized():
            dist.destroy_process_group()
        print_table(metrics)
        print(json.dumps(metrics))
    return exit_code("mixsd.py", job)


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:          # torch sometimes aborts while it tears its threads down at exit
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
