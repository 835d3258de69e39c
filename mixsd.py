"""MixSD: teach a language model new facts without making it forget (arXiv 2605.16865), in one file.

    python mixsd.py                                           # a toy world, from nothing, on a laptop
    python mixsd.py --model Qwen/Qwen3-1.7B --rho 0.3         # the paper's method on KGFact, one GPU
    python mixsd.py --model Qwen/Qwen3-1.7B --method sft      # the baseline that forgets

Fine-tuning on facts as we would write them (SFT) moves the model wherever our wording surprises it.  MixSD
trains on targets that the frozen base model p wrote itself.  Two readers of one shared prefix y_<t take
turns:

    expert   y+_t ~ p( . | x+, y_<t)      x+ = the prompt x with the answer inserted
    naive    y-_t ~ p( . | x,  y_<t)      the model's own prior; at temperature 0, ~ is argmax
    y_t  =  y-_t with probability rho, else y+_t              a coin for each t, tossed beforehand
    y is kept if it ends and gives the answer; else it is drawn again, with fresh coins
    loss =  - sum_i sum_t log q(y_it | x_i, y_i<t) / N        q starts at p and never reads x+

The baselines go through the same loop: SFT, OPSD (the student writes its own targets as it learns), a KL
anchor to p, and replay; see `guided_loss` and `objective`.

The method is the first half of the file: contexts, mixed decoding, the KV cache, loss, targets, training.
Then come many GPUs (with one, `ranks()` is (0, 1), and merged, whole, from_first give back what they get),
memorization, the toy base, devices and models, what a run keeps, other people's targets, command line.

Letters:  B examples   C contexts   P prompt width, left-padded   T target tokens   L = P + T
          V vocabulary   R = examples still being decoded   N target tokens, of a batch or of a whole step

Differences from the paper: see README.md.  The corpora and their verifiers are in kg_data.py.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM,
                          AutoTokenizer, DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

import kg_data
from kg_data import InputError

EXPERT, NAIVE = 0, 1                        # the two contexts, in this order everywhere
OPSD = "opsd", "opsd-nll"                   # the methods whose student writes its own targets as it learns


class RunError(RuntimeError):
    """A failure at run time that was foreseen: one line, exit code 1."""


# -------------------------------------------------------------------------------------------------- contexts

def chat_ids(tokenizer, text):
    """Ids of `text` as one user turn in the chat template, up to where the answer begins; thinking off."""
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                         enable_thinking=False, return_dict=False)


def two_contexts(tokenizer, record, expert_words):
    """(expert ids, naive ids) of a record: x+ = x PREFIX newline canonical-target TRANSITION, and x."""
    (prefix, transition), (user, assistant) = expert_words, record["messages"]
    x, target = user["content"], assistant["content"]
    return chat_ids(tokenizer, f"{x}{prefix}\n{target}{transition}"), chat_ids(tokenizer, x)


def stop_ids(model, tokenizer):
    """Ids that end a completion; first the one that ends an assistant turn, which closes written targets.

    All of generation_config's end tokens and the tokenizer's.  Which one the chat template puts after an
    answer is read off a rendered conversation (<|im_end|> in Qwen3, <end_of_turn> in Gemma).
    """
    ends = model.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if not stops:
        raise InputError("neither the generation_config nor the tokenizer names an end token")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = [i for i in tokenizer.apply_chat_template(turns, return_dict=False) if i in stops]
    before = sum(i in stops for i in chat_ids(tokenizer, "a"))              # of the system and the user turn
    first = rendered[before] if len(rendered) > before else min(stops)
    return [first] + sorted(stops - {first})


# -------------------------------------------------------------------------------------------- mixed decoding

def uniforms(what, T, seed, examples, attempt=0):
    """(B, T) float64 in [0, 1): a function of (what, seed, example, attempt, t) alone.

    Python's own generator, seeded by a text of the first four, gives the tokens their numbers in turn:
    neither the batch nor its order, a restart or the version of a library can change who speaks when.
    """
    streams = [random.Random(f"{what} seed {seed} example {i} attempt {attempt}") for i in examples]
    return torch.tensor([[stream.random() for _ in range(T)] for stream in streams], dtype=torch.float64)


def draw_sources(rho, T, seed, examples, attempt=0):
    """(B, T) int64: who supplies each token, NAIVE with probability rho, else EXPERT (paper: mixing rule)."""
    return torch.where(uniforms("coin", T, seed, examples, attempt) < rho, NAIVE, EXPERT)


def wide(device):
    """float64, but float32 on Apple's mps, which has no more."""
    return torch.float32 if device.type == "mps" else torch.float64


def pick(logits, temperature=0.0, top_k=0, u=None):
    """(R,) ids from logits (R, V): the argmax at temperature 0, else the least v with sum_{w<=v} p(w) > u.

    u  (R,) in [0, 1): one number a token, drawn elsewhere, makes a sample reproducible (inverse CDF)
    """
    if temperature == 0:
        return logits.max(-1).indices                                           # argmax is slower on a CPU
    logits = logits.to(wide(logits.device)) / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cdf = logits.softmax(-1).cumsum(-1)                                         # (R, V)
    choice = torch.searchsorted(cdf, u.to(cdf)[:, None] * cdf[:, -1:], right=True)[:, 0]
    return torch.minimum(choice, (cdf < cdf[:, -1:]).sum(-1))       # the last with any probability


@torch.no_grad()
def decode(model, contexts, source, stops, temperature=0.0, top_k=0, u=None, compiled=False):
    """Continuations of B examples, each read through C contexts that share it token for token.

    Example i owns rows i, B + i, ... of one batch, a row a context, each with its own prompt and KV cache.
    At step t the context source[i, t] is asked for y_t, and y_t is appended to every row of the example
    (paper: mixing rule).  C = 2 makes MixSD's targets; C = 1 with source 0 is ordinary generation, for
    rollouts and evaluation.  Rows of finished examples leave the batch once they are a quarter of it.

    contexts  C lists of B prompts (lists of ids)
    source    (B, T) int64 in [0, C)
    stops     ids; a continuation ends with the first of them
    u         (B, T) float64 in [0, 1), needed at temperature > 0
    compiled  keep shapes fixed and compile the step: for a GPU, where starting kernels is what takes time
    Returns y (B, T) int64, padded with stops[0], and n (B,) int64, the tokens kept: the stop counts, 0 if
    there was none in T tokens.
    """
    (B, T), C, device = source.shape, len(contexts), model.device
    if compiled and B & (B - 1):                            # few shapes: B up to a power of two by repeats
        keep = list(range(B)) + [B - 1] * ((1 << B.bit_length()) - B)
        y, n = decode(model, [[context[i] for i in keep] for context in contexts], source[keep], stops,
                      temperature, top_k, None if u is None else u[keep], compiled)
        return y[:B], n[:B]
    source, u = source.to(device), None if u is None else u.to(device, wide(device))
    y, n = torch.full((B, T), stops[0], device=device), torch.zeros(B, dtype=torch.long, device=device)
    ends, alive = torch.tensor(stops, device=device), torch.arange(B, device=device)
    look_every = 16 if device.type == "cuda" else 1                             # a look makes the GPU wait

    cache, logits, attention, positions = prefill(model, contexts, stops[0])            # logits (C*B, V)
    step, P = forward_step, attention.shape[1]
    if compiled:
        L = math.ceil((P + T) / 64) * 64
        step, cache = static(model, cache, L)
        attention = F.pad(attention, (0, L - P), value=1)   # slots not yet written are hidden causally
    for t in range(T):
        R = len(alive)
        asked = source[alive, t] * R + torch.arange(R, device=device)           # (R,) rows of the speakers
        y_t = pick(logits[asked], temperature, top_k, None if u is None else u[alive, t])
        unfinished = n[alive] == 0                                              # (R,)
        y_t = torch.where(unfinished, y_t, stops[0])
        y[alive, t] = y_t
        n[alive] = torch.where(unfinished & torch.isin(y_t, ends), t + 1, n[alive])
        if t == T - 1:
            break

        if t % look_every == look_every - 1:
            stay = (n[alive] == 0).nonzero()[:, 0]
            if len(stay) == 0:
                break
            if len(stay) <= 0.75 * R and not compiled:
                rows = torch.cat([stay + c * R for c in range(C)])             # (C*R,) for the new, smaller R
                cache.batch_select_indices(rows)
                attention, positions, alive, y_t = attention[rows], positions[rows], alive[stay], y_t[stay]
        positions = positions + 1                                               # (C*R, 1)
        if not compiled:
            attention = F.pad(attention, (0, 1), value=1)                       # (C*R, P + t + 1)
        logits = step(model, y_t.repeat(C)[:, None], attention, positions, cache)       # (C*R, V)
    return y, n


def batches(widths, budget, C=1):
    """Lists of the keys of `widths`, shortest first, such that C x rows x padded width stays within `budget`.

    widths  {key: (prompt tokens, new tokens)}; padding makes a batch as wide as its longest prompt plus its
    longest rest.  A function of its arguments alone, and the batches that follow one don't depend on those
    before it.
    """
    batch, P, T = [], 0, 0
    for key in sorted(widths, key=lambda k: (sum(widths[k]), k)):
        wider = max(P, widths[key][0]), max(T, widths[key][1])
        if batch and C * (len(batch) + 1) * sum(wider) > budget:
            yield batch
            batch, wider = [], widths[key]
        batch, (P, T) = batch + [key], wider
    if batch:
        yield batch


def within_memory(job, widths, args, C=1):
    """Yields (keys, job(keys)) of `widths` in batches of --decode-tokens a rank.

    With one rank they are halved where memory ends.

    job  keys -> {key: value}, on each rank for its share of a batch; what is yielded holds all of the batch
    """
    left, (rank, world) = dict(widths), ranks()
    while left:
        for keys in batches(left, args.decode_tokens * world, C):
            try:
                mine = job(keys[rank::world]) if keys[rank::world] else {}
            except torch.OutOfMemoryError:
                if len(keys) == 1 or world > 1:
                    raise
                args.decode_tokens //= 2
                print(f"no memory for {len(keys)} examples at once: --decode-tokens {args.decode_tokens} now")
                break
            yield keys, merged(mine, keys)
            for key in keys:
                del left[key]


# ---------------------------------------------------------------------------------------------- the KV cache

def max_positions(model):
    """How many tokens the model can read."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)


def full_attention(model):
    """Whether no layer has a sliding window, which would count the padding between tokens."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def shared_prefix(model, prompts):
    """How many tokens all prompts begin with (the chat header, shots), at least one left to each.

    They go through the model once for all rows, as columns in front of the padding; fewer than 8 are not
    worth a pass of their own.  one_pass: sharded or recomputed layers can't be called twice before the
    backward pass.
    """
    if len(prompts) == 1 or not full_attention(model) or getattr(model, "one_pass", False):
        return 0
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    return shared if shared >= 8 else 0


def left_pad(prompts, pad_id, shared=0):
    """Lists of ids -> ids and mask, both (rows, P), | shared | padding | rest |; the mask is 0 on padding.

    Padding stands behind the shared columns, so that these are the same in every row.
    """
    P = max(map(len, prompts))
    ids = torch.tensor([p[:shared] + [pad_id] * (P - len(p)) + p[shared:] for p in prompts])
    return ids, torch.tensor([[1] * shared + [0] * (P - len(p)) + [1] * (len(p) - shared) for p in prompts])


def read(model, ids, attention, shared, cache, keep):
    """(logits (rows, keep, V) of the last `keep` columns of ids (rows, L), positions (rows, L)).

    The first `shared` columns, which are the same in all rows, are read once; `cache` gets the KV of all.
    """
    positions = (attention.cumsum(1) - 1).clamp(min=0)                  # (rows, L), 0 at a row's first token
    if shared:
        model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(ids))
    logits = model(input_ids=ids[:, shared:], attention_mask=attention, position_ids=positions[:, shared:],
                   past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep).logits
    return logits, positions


class RoomyLayer(DynamicLayer):
    """KV of one layer, written in place into room for 64 tokens: DynamicLayer copies all for each token."""
    room = None

    def update(self, keys, values, *args, **kwargs):
        """(keys, values) of all tokens so far, (rows, heads, used, head_dim), with those of the new ones."""
        if not self.get_seq_length():
            return super().update(keys, values)
        start, used = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        mine = self.room and self.room[0].data_ptr() == self.keys.data_ptr()    # else rows left the batch
        if not mine or used > self.room[0].shape[2]:
            self.room = [F.pad(x, (0, 0, 0, keys.shape[2] + 63)) for x in (self.keys, self.values)]
        for room, new in zip(self.room, (keys, values)):
            room[:, :, start:used] = new
        self.keys, self.values = (room[:, :, :used] for room in self.room)
        return self.keys, self.values


def prefill(model, contexts, pad_id):
    """Read C lists of B prompts, a row each, each list at its own width, then padded in front to the widest.

    Returns (the KV cache, the next token's logits (C*B, V), the mask (C*B, P), last positions (C*B, 1)).
    """
    groups, caches, others = contexts, [], []
    if not full_attention(model):                           # all at one width, with no padding added later
        groups = [sum(contexts, [])]
    for prompts in groups:
        shared, cache = shared_prefix(model, prompts), DynamicCache(config=model.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        ids, attention = (t.to(model.device) for t in left_pad(prompts, pad_id, shared))
        logits, positions = read(model, ids, attention, shared, cache, 1)
        caches.append(cache)
        others.append((logits[:, -1], attention, positions[:, -1:]))
    logits, attentions, positions = zip(*others)
    P = max(attention.shape[1] for attention in attentions)
    missing = [P - attention.shape[1] for attention in attentions]
    for layers in zip(*(cache.layers for cache in caches)):
        for kv in ("keys", "values"):
            padded = [F.pad(getattr(layer, kv), (0, 0, m, 0)) for layer, m in zip(layers, missing)]
            setattr(layers[0], kv, torch.cat(padded))
    attention = torch.cat([F.pad(a, (m, 0)) for a, m in zip(attentions, missing)])
    return caches[0], torch.cat(logits), attention, torch.cat(positions)


def forward_step(model, ids, attention, positions, cache):
    """(rows, V) logits of what follows ids (rows, 1), whose KV join the cache.  The function to compile."""
    return model(input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache,
                 use_cache=True, logits_to_keep=1).logits[:, -1]


def static(model, cache, L):
    """(step, cache) for --compile: forward_step as one CUDA graph, and the KV in a StaticCache of L slots.

    A model keeps the last of its caches for the next batch of the same shape: a graph knows addresses.
    """
    if not hasattr(model, "compiled"):
        torch._dynamo.config.recompile_limit = 64           # a shape each
        model.compiled = torch.compile(forward_step, mode="reduce-overhead", fullgraph=True, dynamic=False)
    if not full_attention(model):
        raise InputError("--compile is for models with full attention, not for sliding windows")
    shape = len(cache.layers[0].keys), L
    if getattr(model, "static", (None,))[0] != shape:
        model.static = shape, StaticCache(config=model.config, max_cache_len=L)
    fixed = model.static[1]
    fixed.reset()
    for i, layer in enumerate(cache.layers):
        fixed.update(layer.keys, layer.values, i)
    return model.compiled, fixed


# ------------------------------------------------------------------------------------------------------ loss

class Batch(NamedTuple):
    """Prompts padded in front of their unshared part, targets behind: every target begins in column P."""
    ids: torch.Tensor           # (B, L) int64
    attention: torch.Tensor     # (B, L) int64, 0 on padding
    is_target: torch.Tensor     # (B, T) bool, True on y_1 .. y_stop
    shared: int                 # columns that are the same in all rows, and read once


def collate(examples, pad_id, model):
    """A Batch of [(prompt ids, target ids)]; what is padding is known by length, never by id."""
    shared, device = shared_prefix(model, [prompt for prompt, _ in examples]), model.device
    prompts, prompt_mask = left_pad([prompt for prompt, _ in examples], pad_id, shared)
    T = max(len(target) for _, target in examples)
    targets = torch.tensor([target + [pad_id] * (T - len(target)) for _, target in examples])
    is_target = torch.tensor([[t < len(target) for t in range(T)] for _, target in examples])
    ids, attention = torch.cat([prompts, targets], 1), torch.cat([prompt_mask, is_target.long()], 1)
    return Batch(ids.to(device), attention.to(device), is_target.to(device), shared)


def target_logits(model, batch):
    """(logits (N, V), labels (N,)) of the batch's N target tokens, row by row; the prompt's aren't made."""
    cache, T = DynamicCache(config=model.config) if batch.shared else None, batch.is_target.shape[1]
    logits, _ = read(model, batch.ids, batch.attention, batch.shared, cache, T + 1)
    return logits[:, :-1][batch.is_target], batch.ids[:, -T:][batch.is_target]  # (B, T, V), (B, T) before


def by_chunks(loss, *tensors, chunk=256):
    """(N,) loss of tensors with N rows each, in checkpointed chunks of rows.

    Under bfloat16 no float32 tensor of (N, V) exists: a chunk's is made, reduced, and made again backwards.
    """
    parts = zip(*(tensor.split(chunk) for tensor in tensors))
    return torch.cat([checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False)
                      for part in parts])


def nll(logits, labels):
    """(N,) float32: -log q(label), nats, under logits (N, V)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def kl(student, teacher, direction="forward", top_k=0):
    """(N,) float32 KL, nats, of logits (N, V): sum p_T (log p_T - log p_S), or reverse, with T and S swapped.

    top_k  over the teacher's k likeliest tokens alone, both renormalised; 0: over all
    """
    if top_k:
        teacher, tokens = teacher.topk(min(top_k, teacher.shape[-1]))           # (N, k)
        student = student.gather(-1, tokens)
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p, q = (p, q) if direction == "forward" else (q, p)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)                             # rounding may go below 0


def token_nll(model, batch):
    """(N,) float32: -log q(y_t | x, y_<t), nats, of each target token, the stop included (paper: the loss).

    The caller sums and divides once by the step's N, so that the result does not depend on how a step is cut
    into micro-batches.
    """
    return by_chunks(nll, *target_logits(model, batch))


def guided_loss(student, guide, examples, args, pad_id):
    """(N,) losses against a frozen guide, the base, that reads the same target tokens y (baselines).

    opsd            KL( p(. | x+, y_<t) || q(. | x, y_<t) )                 y sampled from q as it is now
    opsd-nll        - log q(argmax p(. | x+, y_<t) | x, y_<t)               y what q says now, greedily
    --kl-to-base b  - log q(y_t | x, y_<t) + b KL( p(. | x, y_<t) || q(. | x, y_<t) )

    examples  [(x, x_plus, y)], or [(x, y)] where guide and student read the same
    """
    seen, guided = (collate([(e[i], e[-1]) for e in examples], pad_id, student)
                    for i in (0, -2))                       # the student reads x, the guide x_plus, if any
    logits, labels = target_logits(student, seen)                               # (N, V), (N,)
    with torch.no_grad():
        reference, _ = target_logits(guide, guided)                             # (N, V)
    if args.method == "opsd-nll":
        return by_chunks(nll, logits, reference.argmax(-1))
    divergence = functools.partial(kl, direction=args.kl, top_k=args.teacher_top_k or 0)
    if args.method == "opsd":
        return by_chunks(divergence, logits, reference)
    anchored = lambda a, b, y: nll(a, y) + args.kl_to_base * divergence(a, b)   # noqa: E731
    return by_chunks(anchored, logits, reference, labels)


@torch.no_grad()
def token_nlls(model, examples, pad_id, micro_tokens):
    """[(n,) nats of an example's target tokens under `model`], in the order given."""
    nlls = [None] * len(examples)
    for part in batches({i: (len(x), len(y)) for i, (x, y) in enumerate(examples)}, micro_tokens):
        losses = token_nll(model, collate([examples[i] for i in part], pad_id, model))
        for i, of_one in zip(part, losses.split([len(examples[i][1]) for i in part])):
            nlls[i] = of_one
    return nlls


# --------------------------------------------------------------------------------------------------- targets

def text_of(tokenizer, ids):
    """The text of target ids without their stop token, nothing cleaned up."""
    return tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)


def token_ids(tokenizer, text):
    """The ids of a bare text."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def written_ids(tokenizer, text, stops):
    """The ids of a target that somebody wrote, closed with the token that ends a turn."""
    return token_ids(tokenizer, text) + stops[:1]


def make_targets(model, tokenizer, records, pairs, taught, stops, args, folder):
    """The targets of a run, one dict a kept record in id order; also in folder/targets.jsonl (see README).

    Rounds of drawing: every example not kept yet is decoded with the fresh coins of its next attempt; it is
    kept if it ends in a stop token and the verifier accepts it.  Then --on-fail: drop the rest, let the
    expert speak alone (verified too), or take the canonical target.  Finished batches are appended to the
    file, and to state/draws.jsonl, from which a restart goes on.

    pairs   the records' (expert ids, naive ids)
    taught  the ids of those to make targets of
    Returns (targets, draws), draws being the lines of state/draws.jsonl, a dict a batch.
    Raises RunError where no target passed.
    """
    path, journal, first = folder / "targets.jsonl", folder / "state" / "draws.jsonl", ranks()[0] == 0
    draws = from_first(read_draws, path, journal)
    rounds = [(attempt, args.rho) for attempt in range(args.attempts)] if args.method == "mixsd" else []
    if args.on_fail == "expert" and (args.rho or args.temperature):     # at rho 0 it has spoken alone already
        rounds.append((args.attempts, 0.0))
    if args.method == "sft" or args.on_fail == "canonical":
        rounds.append((args.attempts if args.method == "mixsd" else 0, None))       # None: not decoded

    kept = {i for d in draws for i in d["kept"]}
    bar = tqdm(total=len(taught), initial=len(kept), desc="targets kept", unit="", disable=args.quiet)
    files = (path, journal) if first else (os.devnull, os.devnull)
    with open(files[0], "ab") as targets, open(files[1], "a") as log:
        for attempt, rho in rounds:
            done = {i for d in draws if d["attempt"] == attempt for i in d["ids"]}
            new = 0 if rho is None else args.max_new_tokens
            widths = {i: (max(map(len, pairs[i])), new) for i in taught if i not in kept | done}
            draw = functools.partial(draw_batch, model, tokenizer, records, pairs, attempt, rho, stops, args)
            start = time.time()
            for ids, answers in within_memory(draw, widths, args, C=2):
                good = {i: a for i, a in answers.items() if a["ok"]}
                examples = [(pairs[i][NAIVE], a["ids"]) for i, a in good.items()]
                nlls = token_nlls(model, examples, stops[0], args.micro_tokens)
                for (i, a), of_one in zip(good.items(), nlls):
                    targets.write(target_line(records[i], i, a, attempt, of_one.mean().item(), tokenizer))
                targets.flush()
                decoded = sum(len(a["ids"]) for a in answers.values()) if rho is not None else 0
                said = [tokenizer.decode(a["ids"])[-200:] for a in answers.values() if not a["ok"]][:3]
                draws.append({"attempt": attempt, "ids": ids, "kept": list(good), "tokens": decoded,
                              "said": said, "bytes": targets.tell(), "seconds": time.time() - start})
                log.write(json.dumps(draws[-1]) + "\n")
                log.flush()
                start = time.time()
                kept |= set(good)
                bar.update(len(good))
                bar.set_postfix(attempt=attempt)
    bar.close()
    targets = from_first(sorted_targets, path)
    if not targets:
        said = [repr(text) for d in draws for text in d["said"]][:3]
        raise RunError(f"no target passed --verify {args.verify} in {args.attempts} attempts (see --style, "
                       f"--on-fail); the model said {', '.join(said)}")
    return targets, draws


def draw_batch(model, tokenizer, records, pairs, attempt, rho, stops, args, ids):
    """{example: {"ids", "source", "ok"}} of a batch: mixed decoding at `rho`; None: the canonical targets."""
    if rho is None:
        written = {i: written_ids(tokenizer, records[i]["messages"][1]["content"], stops) for i in ids}
        return {i: {"ids": y, "source": None, "ok": True} for i, y in written.items()}
    source = draw_sources(rho, args.max_new_tokens, args.seed, ids, attempt)
    u = uniforms("token", args.max_new_tokens, args.seed, ids, attempt) if args.temperature else None
    y, n = decode(model, [[pairs[i][c] for i in ids] for c in (EXPERT, NAIVE)], source, stops,
                  args.temperature, args.top_k or 0, u, args.compile)
    answers = {}
    for i, row, coins, length in zip(ids, y.tolist(), source.tolist(), n.tolist()):
        row, coins = row[:length or None], coins[:length or None]
        ok = length > 0 and kg_data.is_correct(text_of(tokenizer, row), records[i].get("answer"), args.verify)
        answers[i] = {"ids": row, "source": coins, "ok": ok}
    return answers


def target_line(record, i, answer, attempt, nll, tokenizer):
    """A line of targets.jsonl: the record, with the target's text as assistant turn, its ids, its source."""
    turns = [record["messages"][0], {"role": "assistant", "content": text_of(tokenizer, answer["ids"])}]
    row = record | {"messages": turns, "id": i, "target_ids": answer["ids"], "source": answer["source"],
                    "attempt": attempt, "nll": nll}
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def show(tokenizer, pair, target):
    """Print both prompts of an example and its target, the naive tokens marked: the algorithm at a glance."""
    def text(ids):                                          # a terminal obeys the control characters of data
        said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in said)
    written = target["target_ids"] and not target["source"]                     # then there is no expert
    for name, ids in zip(("expert", "naive"), pair):
        if name == "naive" or not written:
            print(f"--- the {name} reads\n{text(ids)}")
    if not target["target_ids"]:                            # OPSD: the student will write it
        return
    ids, source = target["target_ids"], target["source"] or [EXPERT] * len(target["target_ids"])
    left, right = ("\033[93m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    print("--- the target" + (f", the naive's tokens {left}marked{right}" if target["source"] else ""))
    starts = [t for t in range(len(ids)) if t == 0 or source[t] != source[t - 1]]
    for start, end in zip(starts, starts[1:] + [len(ids)]):                     # a run of one speaker
        said = text(ids[:end])[len(text(ids[:start])):]
        print(f"{left}{said}{right}" if source[start] == NAIVE else said, end="")
    print(flush=True)


# -------------------------------------------------------------------------------------------------- training

def learning_rate(step, lr, warmup, decay_over=None):
    """The rate of step 1, 2, ...: linear warm-up, then constant (paper) or linear to 0 over `decay_over`."""
    fade = 1 - (step - 1) / decay_over if decay_over else 1.0
    return lr * min(1.0, step / max(warmup, 1)) * fade


def epoch_order(n, seed, epoch):
    """The order of n examples in an epoch, a function of (n, seed, epoch) alone."""
    order = list(range(n))
    random.Random(f"order seed {seed} epoch {epoch}").shuffle(order)
    return order


def lend_gradients(work, model):
    """Have each gradient of `work`, the bfloat16 copy of `model`, added to model's in float32, and freed."""
    def add_to(weight):
        def hook(p):
            weight.grad = p.grad.float() if weight.grad is None else weight.grad.add_(p.grad)
            p.grad = None
        return hook
    for p, weight in zip(work.parameters(), model.parameters()):
        p.register_post_accumulate_grad_hook(add_to(weight))


@torch.no_grad()
def copy_weights(source, into):
    """Round the weights of `source`, which may be sharded, into its copy."""
    for p, weight in zip(into.parameters(), source.parameters()):
        p.copy_(whole(weight))


def update(model, work, optimizer, examples, lr, token_loss, micro_tokens):
    """One optimizer step on the examples (prompts..., target ids); returns (loss, gradient norm, N).

    The loss is the mean over the step's N target tokens, before the update: what was differentiated.
    Raises FloatingPointError, with the weights untouched, where the gradient is not finite.
    """
    N, total = sum(len(target) for *_, target in examples), 0.0
    widths = {i: (max(map(len, prompts)), len(target)) for i, (*prompts, target) in enumerate(examples)}
    rank, world = ranks()
    for part in batches(widths, micro_tokens * world):
        mine = part[rank::world]                            # none: one is run, for 0, beside other ranks
        losses = token_loss(work, [examples[i] for i in mine or part[:1]])
        loss = losses.sum() * (bool(mine) / N)
        (loss * world).backward()                           # the gradient is the mean over ranks
        total += loss.item()
    total = sum(merged({rank: total}, range(world)).values())
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"loss {total}, gradient norm {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    if work is not model:
        copy_weights(model, work)
    return total, norm, N


def rollouts(student, tokenizer, stops, pairs, ids, step, args):
    """[(x, x_plus, y)] of the examples `ids`: y is what the student itself says to x now (OPSD: on-policy).

    opsd: args.rollouts samples at T = 1, a function of (seed, example, rollout, step) and the weights;
    opsd-nll: one greedy answer.  One that finds no end is cut, and used as it is.
    """
    prompts = {(i, r): pairs[i][NAIVE] for i in ids for r in range(args.rollouts or 1)}
    answers = complete(student, tokenizer, stops, prompts, args, 1.0 if args.method == "opsd" else 0.0, step)
    y = {key: ids for key, ids, _, _ in answers}
    return [(x, pairs[i][EXPERT], y[i, r]) for (i, r), x in prompts.items()]


def with_replay(examples, old, share, seed, step):
    """The step's examples with as many of `old` added, drawn with replacement, as make up `share` of all."""
    rng = random.Random(f"replay seed {seed} step {step}")
    count = int(len(examples) * share / (1 - share) + rng.random())             # on the mean, the share
    return examples + rng.choices(old, k=count)


def objective(guide, plain, tokenizer, stops, pairs, taught, targets, old, args):
    """(names, examples_of, token_loss) for `train`: methods differ in a step's targets and in their loss.

    guide  the frozen base, where a method asks it
    plain  the model that takes the student's weights to decode
    """
    examples, pad_id = [(pairs[t["id"]][NAIVE], t["target_ids"]) for t in targets or []], stops[0]

    def examples_of(work, places, step):
        if args.method in OPSD:
            student = gather(work, plain)
            return rollouts(student, tokenizer, stops, pairs, [taught[i] for i in places], step, args)
        return with_replay([examples[i] for i in places], old, args.replay_share or 0, args.seed, step)

    def token_loss(model, part):
        if guide:
            return guided_loss(model, guide, part, args, pad_id)
        return token_nll(model, collate(part, pad_id, model))
    return taught if args.method in OPSD else [t["id"] for t in targets], examples_of, token_loss


def train(model, work, names, examples_of, token_loss, settings, folder=None, desc="training", decay=False):
    """Fine-tune `model`, in place, on examples in batches (paper: training).

    model, work the float32 weights that AdamW moves, and the model that computes: the same one, or a bfloat16
                copy, kept equal up to rounding.  On bfloat16 weights most updates would round to nothing.
    names       the examples' ids, to be named by
    examples_of (work, positions in `names`, step) -> the step's examples: (prompt ids, target ids), or more
                prompts first
    token_loss  (work, examples) -> (N,) losses of their target tokens
    settings    needs steps, batch_size, lr, warmup, seed, micro_tokens, quiet
    folder      where log.jsonl grows, a line a step, and state/ is kept; a killed run goes on from it, bit
                for bit the same in float32 on a CPU.  None keeps nothing.
    Raises RunError with the step and the examples where the gradient is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), eps=1e-8,
                                  weight_decay=0.01, fused=True)
    done = load_state(folder, model, optimizer) if folder else 0
    rank, world = ranks()
    if work is not model:
        copy_weights(model, work)
        lend_gradients(work, model)
    log = cut_log(folder / "log.jsonl", done) if folder and rank == 0 else None
    per_epoch = math.ceil(len(names) / settings.batch_size)
    resumed, saved_at, save_cost = done, time.time(), 0.0
    bar = tqdm(total=settings.steps, initial=done, desc=desc, unit="step", disable=settings.quiet)
    try:
        for step in range(done + 1, settings.steps + 1):
            start, (epoch, at) = time.time(), divmod(step - 1, per_epoch)
            order = epoch_order(len(names), settings.seed, epoch)
            places = order[at * settings.batch_size:(at + 1) * settings.batch_size]
            examples = examples_of(work, places, step)
            lr = learning_rate(step, settings.lr, settings.warmup, settings.steps if decay else None)
            with signals_held():
                try:
                    loss, norm, N = update(model, work, optimizer, examples, lr, token_loss,
                                           settings.micro_tokens)
                except FloatingPointError as e:
                    where = f"step {step}, examples {[names[i] for i in places]}"
                    raise RunError(f"{where}: {e}; step {done} is kept") from None
                except torch.OutOfMemoryError:
                    raise RunError(f"step {step}: no memory for --micro-tokens {settings.micro_tokens}; "
                                   f"lower it, or add --gradient-checkpointing") from None
                done, seconds = step, time.time() - start
                if log:
                    row = {"step": step, "epoch": epoch, "nll": loss, "tokens": N, "lr": lr,
                           "grad_norm": norm, "seconds": seconds, "tok_s": N / seconds, "mem_gib": peak_gib()}
                    log.write(json.dumps(row) + "\n")
            bar.update()
            if step % max(1, settings.steps // 10) == 0:
                tqdm.write(f"{desc}: step {step}/{settings.steps}, {loss:.3f} nats/token, lr {lr:.1e}")
            due = lambda: time.time() - saved_at > 20 * save_cost                   # noqa: E731
            if folder and step < settings.steps and from_first(due):
                saving = time.time()                        # being safe may take one part in 20 of the time
                if log:
                    log.flush()
                save_state(folder, done, model, optimizer)
                saved_at, save_cost = time.time(), time.time() - saving
    finally:                                             # the end, Ctrl-C, SIGTERM, a loss that is not finite
        bar.close()
        if log:
            log.close()
        if folder and done > resumed and (world == 1 or done == settings.steps):    # ranks don't stop in step
            save_state(folder, done, model, optimizer)


# ------------------------------------------------------------------------------------------------- many GPUs
# torchrun starts a process a GPU, a rank each, all with the same command.  A rank decodes its share of every
# batch with the whole frozen base, and trains its share with its part of the weights (FSDP2); rank 0 writes.
# With one process these functions give back what they get.

def ranks():
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks(args):
    """Meet the other processes of a torchrun; all but rank 0 fall silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=1))
    if dist.get_rank():
        sys.stdout, args.quiet = open(os.devnull, "w"), True


def from_first(function, *args):
    """What function(*args) is on rank 0, where alone it is called."""
    rank, world = ranks()
    result = [function(*args) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(result)
    return result[0]


def merged(part, keys):
    """One {key: value} of those of all ranks, in the order of `keys`."""
    parts = [part]
    if ranks()[1] > 1:
        dist.all_gather_object(parts := [None] * ranks()[1], part)
    values = {key: value for part in parts for key, value in part.items()}
    return {key: values[key] for key in keys}


def whole(tensor):
    """A tensor, of which each rank may hold a part."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def on_first(tensor):
    """The whole tensor in the memory of rank 0's CPU; None elsewhere."""
    tensor = whole(tensor)
    return tensor.cpu() if ranks()[0] == 0 else None


def like(p, tensor):
    """A whole tensor placed as the parameter p is, or a scalar on its device."""
    tensor = tensor.to(p.device)
    parts = isinstance(p, DTensor) and tensor.dim()
    return distribute_tensor(tensor, p.device_mesh, p.placements) if parts else tensor


def shard(model, dtype, device):
    """Spread float32 weights over the ranks, a group a layer: computed in `dtype`, summed in float32."""
    mesh = dist.device_mesh.init_device_mesh(torch.device(device).type, (ranks()[1],))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.base_model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.one_pass = True                                   # its weights are gone until the backward pass
    return model


def gather(work, plain):
    """`plain` with the weights of `work`, which is the same model, or on many ranks sharded."""
    if work is not plain:
        copy_weights(work, plain)
    return plain


# ---------------------------------------------------------------------------------------------- memorization

def complete(model, tokenizer, stops, prompts, args, temperature=0.0, sample=0):
    """Yields (key, ids, text, ended) for prompts {key: ids} as they are answered: `decode` with C = 1.

    args    needs max_new_tokens, decode_tokens, compile, seed
    sample  which of several answers, at temperature > 0: random numbers are keyed by (seed, key, sample)
    """
    T = args.max_new_tokens

    def answer(keys):
        u = uniforms("answer", T, args.seed, keys, sample) if temperature else None
        ids, source = [prompts[key] for key in keys], torch.zeros(len(keys), T, dtype=torch.long)
        y, n = decode(model, [ids], source, stops, temperature, 0, u, args.compile)
        return {key: (row[:length or None], length > 0)
                for key, row, length in zip(keys, y.tolist(), n.tolist())}
    widths = {key: (len(x), T) for key, x in prompts.items()}
    for _, answers in within_memory(answer, widths, args):
        for key, (row, ended) in answers.items():
            closed = row if ended else row + stops[:1]
            yield key, row, text_of(tokenizer, closed), ended


def wilson(k, n, z=1.96):
    """(low, high): the 95 % Wilson score interval of k successes in n."""
    p, centre = k / n, (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def score(verdicts):
    """{"accuracy", "n", "low", "high"} of a list of booleans; the interval is Wilson's, 95 %."""
    low, high = wilson(sum(verdicts), len(verdicts))
    return {"accuracy": sum(verdicts) / len(verdicts), "n": len(verdicts), "low": low, "high": high}


def memorization(model, tokenizer, tasks, stops, args, kept=None):
    """{task: score} of {task: records}, T = 0, strict; with `kept` ids also the recall over those alone."""
    scores = {}
    for task, records in tasks.items():
        prompts = {i: chat_ids(tokenizer, r["messages"][0]["content"]) for i, r in enumerate(records)}
        verdicts, answers = [False] * len(records), complete(model, tokenizer, stops, prompts, args)
        for i, _, text, ended in tqdm(answers, task, len(records), disable=args.quiet):
            verify = "boxed" if task == "held_out" else args.verify
            verdicts[i] = ended and kg_data.is_correct(text, records[i]["answer"], verify)
        scores[task] = score(verdicts)
        if task == "recall" and kept:
            scores["recall-kept"] = score([verdicts[i] for i in kept])
    return scores


# ---------------------------------------------------------------------------------------------- the toy base

TOY_CONFIG = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=4, head_dim=24, initializer_range=0.08, max_position_embeddings=256,
                  tie_word_embeddings=True)
TOY_PRETRAINING = dict(steps=800, batch_size=32, lr=3e-3, warmup=50, micro_tokens=2048)


def toy_base(quiet=False, seed=0):
    """(folder, seconds) of the toy base, a Qwen3 of 0.4 M parameters: pretrained once a seed, then cached."""
    world = kg_data.toy_pretraining(TOY_PRETRAINING["steps"] * TOY_PRETRAINING["batch_size"])
    tokenizer = kg_data.toy_tokenizer()
    words = sorted(tokenizer.get_vocab().items())
    definition = TOY_CONFIG, TOY_PRETRAINING, seed, world, words, tokenizer.chat_template
    key = hashlib.sha256(repr(definition).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixsd" / f"toy-{key}"
    if folder.exists():
        return folder, 0.0
    if ranks()[1] > 1:
        raise InputError("the toy's base is made by one process: run mixsd.py once without torchrun")
    start = time.time()
    torch.manual_seed(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen3Config(vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=pad, **TOY_CONFIG)
    model = Qwen3ForCausalLM(config)
    examples = [(chat_ids(tokenizer, x), written_ids(tokenizer, y, [end])) for x, y in world]
    settings = argparse.Namespace(**TOY_PRETRAINING, seed=seed, quiet=quiet)
    token_loss = lambda model, part: token_nll(model, collate(part, pad, model))     # noqa: E731
    examples_of = lambda work, places, step: [examples[i] for i in places]           # noqa: E731
    train(model, model, range(len(examples)), examples_of, token_loss, settings, desc="pretraining the toy",
          decay=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    with contextlib.suppress(OSError):                      # another run was faster: take its folder
        partial.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    return folder, time.time() - start


# ---------------------------------------------------------------------------------------- devices and models

def peak_gib():
    """Peak memory of this process so far, GiB: the GPU's where there is one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def pick_device(device, dtype):
    """(device, compute dtype): auto: CUDA, else mps, else the CPU; bfloat16 where in hardware."""
    if device == "auto":
        has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        device = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: {str(e).splitlines()[0]}") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)
    if dtype == "auto":
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text() if device == "cpu" and cpuinfo.exists() else ""
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith("cuda")
                else re.search(r"\b(avx512_bf16|amx_bf16)\b", flags))
        dtype = "bfloat16" if fast else "float32"
    return device, getattr(torch, dtype)


def sdpa_cpu(module, query, key, value, *args, **kwargs):
    """transformers' sdpa, in float32 where a gradient is needed: in bfloat16 it is 5 times slower there."""
    dtype = torch.float32 if query.requires_grad else query.dtype
    qkv = query.to(dtype), key.to(dtype), value.to(dtype)
    out, weights = sdpa_attention_forward(module, *qkv, *args, **kwargs)
    return out.to(query.dtype), weights


AttentionInterface.register("sdpa_cpu", sdpa_cpu)
AttentionMaskInterface.register("sdpa_cpu", sdpa_mask)


def load(loader, path, **options):
    """loader.from_pretrained(path), path a folder or a hub id.  Raises InputError with what was tried."""
    if not Path(path).is_dir() and (path[0] in "./~" or path.count("/") > 1):
        raise InputError(f"--model {path}: no such folder")
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        why = ("not a model's folder" if Path(path).is_dir() else "no folder here, nor on a hub in reach; "
               "download it where there is a network and give its folder")
        raise InputError(f"--model {path}: {why} ({str(e).strip().splitlines()[0]})") from None


def load_tokenizer(path):
    """The tokenizer in `path`, which must be a chat model's."""
    tokenizer = load(AutoTokenizer, str(path))
    if not tokenizer.chat_template:                 # transformers makes up a tokenizer where there is none
        raise InputError(f"--model {path}: no tokenizer, or no chat template in it; choose an instruct model")
    return tokenizer


def load_model(path, dtype, device):
    """The causal model in `path` with its weights as `dtype`, on `device`, dropout off."""
    config = load(AutoConfig, str(path))                    # the smallest file first: a wrong name fails soon
    model, found = load(AutoModelForCausalLM, str(path), config=config, dtype=dtype, use_safetensors=True,
                        output_loading_info=True)
    if found["missing_keys"]:                               # they would be random
        raise InputError(f"--model {path}: no weights for {sorted(found['missing_keys'])[0]}")
    return ready(model, device)


def ready(model, device):
    """The model on its device, dropout off, with an attention that suits a CPU."""
    if device == "cpu" and model.dtype == torch.bfloat16:
        model.set_attn_implementation("sdpa_cpu")
    return model.to(device).eval()


def recompute_layers(model):
    """Have each layer keep its input alone, and compute the rest again backwards."""
    for layer in model.base_model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    model.one_pass = True                                   # twice would add its KV to a shared prefix twice


def save_model(model, tokenizer, path, folder):
    """Write a plain Hugging Face folder, float32, of a model that came from `path`."""
    if ranks()[1] > 1:
        model = gather(model, load_model(path, torch.float32, "cpu"))
    if ranks()[0]:
        return
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as e:                                  # of a full disk tokenizers makes a bare Exception
        raise RunError(f"{folder} can't be written ({e}); free the disk and run again") from e


# ------------------------------------------------------------------------------------------ what a run keeps

def write_atomically(path, data):
    """Write bytes to `path` so that a reader sees the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def write_json(path, held):
    """Write an object to `path`, whole or not at all."""
    write_atomically(path, json.dumps(held, indent=1).encode())


def read_json(folder, name):
    """The object in folder/name, {} where there is no such file.  Raises InputError where it is damaged."""
    path = Path(folder) / name
    try:
        held = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise InputError(f"{path} is damaged; restore it, or remove it")
    return held


def cached(path, function, *args):
    """The JSON in `path`, or timed(function, *args) written there first: what a restart need not repeat."""
    if not from_first(path.exists):
        from_first(write_json, path, timed(function, *args))
    return read_json(path.parent, path.name)


def timed(function, *args):
    """{"result": function(*args), "seconds": how long it took}"""
    start = time.time()
    return {"result": function(*args), "seconds": time.time() - start}


def read_draws(path, journal):
    """The batches that a killed run has finished; both files are cut back to them."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []    # the last if it was finished
    try:
        draws = [json.loads(line) for line in lines]
        held = path.read_bytes()[:draws[-1]["bytes"]] if draws else b""
        ids = [json.loads(line)["id"] for line in held.splitlines()]
        if sorted(ids) != sorted(i for d in draws for i in d["kept"]):
            raise ValueError("other targets")
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not what {journal} says was drawn ({e}); remove both, or train on a "
                         "copy with --targets and another --out") from None
    write_atomically(journal, "".join(line + "\n" for line in lines).encode())
    path.touch()
    os.truncate(path, len(held))
    return draws


def sorted_targets(path):
    """The targets in a file, which is put in id order."""
    lines = sorted(path.read_bytes().splitlines(keepends=True), key=lambda line: json.loads(line)["id"])
    write_atomically(path, b"".join(lines))
    return [json.loads(line) for line in lines]


def save_state(folder, step, model, optimizer):
    """Write state/step-N.pt beside and rename it; the one before is kept.  12 bytes a parameter each."""
    path = folder / "state" / f"step-{step:08d}.pt"
    moments = {name: {key: on_first(value) for key, value in optimizer.state[p].items()}
               for name, p in model.named_parameters()}
    weights = {name: on_first(p) for name, p in model.named_parameters()}
    if ranks()[0]:
        return
    for old in sorted(path.parent.glob("step-*.pt"))[:-1]:
        old.unlink()
    state = {"step": step, "weights": weights, "optimizer": moments}
    try:
        torch.save(state, partial := path.with_suffix(".partial"))
    except RuntimeError as e:                               # what torch makes of a full disk
        raise RunError(f"{path} can't be written ({str(e).splitlines()[0]}); free the disk, run again") from e
    os.replace(partial, path)


@torch.no_grad()
def load_state(folder, model, optimizer):
    """Restore the newest state that can be read; returns its step, 0 where there is none."""
    state, shapes = newest_state(folder), {name: p.shape for name, p in model.named_parameters()}
    if state and {name: weight.shape for name, weight in state["weights"].items()} != shapes:
        raise RunError(f"{folder}/state is another model's; remove it")
    for name, p in model.named_parameters() if state else ():
        p.copy_(like(p, state["weights"][name]))
        optimizer.state[p] = {key: like(p, value) for key, value in state["optimizer"][name].items()}
    return state.get("step", 0)


def newest_state(folder):
    """The newest of the states that can be read; {} where there is none."""
    for path in sorted((folder / "state").glob("step-*.pt"), reverse=True):
        try:
            with zipfile.ZipFile(path) as file:
                if file.testzip():                          # torch.load itself compares no checksums
                    raise zipfile.BadZipFile
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, zipfile.BadZipFile) as e:
            print(f"{path} cannot be read ({type(e).__name__}); trying the one before", flush=True)
    return {}


def cut_log(path, step):
    """log.jsonl opened for appending, cut back to the steps that the saved state has."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if len(lines) < step:
        raise RunError(f"{path} has {len(lines)} steps, the saved state {step}; "
                       f"remove {path.parent}/state/step-*")
    write_atomically(path, "".join(line + "\n" for line in lines[:step]).encode())
    return open(path, "a")


@contextlib.contextmanager
def signals_held():
    """Ctrl-C and SIGTERM wait for the end of the block: weights and step change together or not at all."""
    held, handlers = [], {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in handlers:
        signal.signal(s, lambda *received: held.append(received))
    try:
        yield
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if held:
        signal.raise_signal(held[0][0])


# ------------------------------------------------------------------------------------ other people's targets

def refuse_control_tokens(tokenizer, texts):
    """Raise InputError where one of {where: text} would be read as the end of a turn, or as another such."""
    controls = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    for where, text in texts.items():
        for control in controls:
            if control in text:
                raise InputError(f"{where}: holds {control}, a control token of the model")


def target_rows(path, model, tokenizer, stops):
    """[(file and line, row, prompt ids, target ids)] of a targets file, by its ids, else by its text."""
    rows, texts = [], {}
    for line, row in kg_data.read_jsonl(path):
        where = f"{path}, line {line}"
        row = kg_data.read_record(row, where)
        text, ids, source = row["messages"][1]["content"], row.get("target_ids"), row.get("source")
        question = texts[where] = row["messages"][0]["content"]
        if ids is None:
            texts[where] += "\n" + text
            ids, source = written_ids(tokenizer, text, stops), None
        elif not (isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids)
                  and ids and ids[-1] in stops and text_of(tokenizer, ids) == text):
            raise InputError(f"{where}: target_ids are not its text's: another tokenizer's (--model)")
        if source is not None and not (isinstance(source, list) and len(source) == len(ids)
                                       and all(s in (EXPERT, NAIVE) for s in source)):
            raise InputError(f"{where}: source must name {EXPERT} or {NAIVE} for each of target_ids")
        prompt, room = chat_ids(tokenizer, question), max_positions(model)
        if (length := len(prompt) + len(ids)) > room:
            raise InputError(f"{where}: {length:,} tokens, and the model has {room:,} positions")
        rows.append((where, row | {"source": source}, prompt, ids))
    refuse_control_tokens(tokenizer, texts)
    return rows


def read_targets(path, records, pairs, base, tokenizer, stops, args):
    """The targets of somebody's file, by ids where they are there.  Raises InputError if they don't fit."""
    position, targets = {r["messages"][0]["content"]: i for i, r in enumerate(records)}, []
    for where, row, _, ids in target_rows(path, base, tokenizer, stops):
        question = row["messages"][0]["content"]
        if question not in position:
            raise InputError(f"{where}: not a question of {args.data}: another corpus's (--data, --limit)")
        targets.append({"attempt": 0} | row | {"id": position[question], "target_ids": ids})
    targets.sort(key=lambda t: t["id"])
    examples = [(pairs[t["id"]][NAIVE], t["target_ids"]) for t in targets]
    nlls = token_nlls(base, examples, stops[0], args.micro_tokens)
    return [t | {"nll": of_one.mean().item()} for t, of_one in zip(targets, nlls)]


def read_examples(path, model, tokenizer, stops):
    """[(naive prompt's ids, target ids)] of a targets file.  Raises InputError with file and line."""
    return [(prompt, ids) for _, _, prompt, ids in target_rows(path, model, tokenizer, stops)]


# ---------------------------------------------------------------------------------------------- command line

DEFAULTS = {"method": "mixsd", "rho": 0.3, "temperature": 0.0, "top_k": 0, "style": "boxed", "attempts": 11,
            "on_fail": "drop", "batch_size": 16, "warmup": 20, "seed": 0, "device": "auto", "dtype": "auto",
            "decode_tokens": 65536, "micro_tokens": 4096, "rollouts": 8, "kl": "forward", "teacher_top_k": 0,
            "replay_share": 0.25}
EXPERT_FLAGS = ["expert_prefix", "expert_transition"]
DRAW_FLAGS = ["rho", "temperature", "top_k", "attempts", "on_fail"]         # how mixsd draws its targets
NLL_FLAGS = ["kl_to_base", "kl", "replay", "replay_share"]                  # what NLL can be joined with
USES = {"mixsd": DRAW_FLAGS + EXPERT_FLAGS + NLL_FLAGS, "sft": NLL_FLAGS, "targets": NLL_FLAGS,
        "opsd": EXPERT_FLAGS + ["rollouts", "kl", "teacher_top_k"], "opsd-nll": EXPERT_FLAGS}
METHOD_FLAGS = list(dict.fromkeys(flag for flags in USES.values() for flag in flags))
TRAIN_FLAGS = ["epochs", "steps", "batch_size", "lr", "warmup"] + NLL_FLAGS
FREE_FLAGS = ["device", "decode_tokens", "micro_tokens", "gradient_checkpointing", "compile", "out", "hub",
              "quiet", "targets_only"]                                      # may change between sessions


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number of `kind` in [low, high], or (low, high] with `above`."""
    def parse(text):
        value = kind(text)
        if not ((low < value if above else low <= value) and value <= high and value != math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not in {'(' if above else '['}{low}, {high}]")
        return value
    parse.__name__ = kind.__name__
    return parse


def usage_error(message):
    """In place of argparse's page of usage: one line."""
    raise InputError(f"{message} (see --help)")


def parse_args(argv=None):
    """The command line as a namespace, None what was not given.  Raises InputError on a usage error."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                epilog="Other defaults come from the corpus's recipe; a run prints them all.")
    p.error = usage_error
    count, probability, add = number(int, 1), number(float, 0, 1), p.add_argument
    add("--model", help="toy, a Hugging Face hub id, or a folder (default: toy)")
    corpora = ", ".join(name for name in kg_data.NAMED if name != "kgfunc-unseen")      # that is asked alone
    add("--data", help=f"{corpora}, or a .jsonl file (default: toy's, or kgfact-small)")
    add("--hub", metavar="DIR", help="simpleqa: a folder with the data set under its hub id")
    add("--method", choices=["mixsd", "sft", *OPSD], help="mixsd: mixed decoding (default); sft: canonical "
        "targets; opsd: KL from the expert on the student's own rollouts; opsd-nll: NLL of its argmax there")
    add("--rho", type=probability, help="mixing rate, P(naive token) (paper: rho; default 0.3)")
    add("--temperature", type=number(float, 0),
        help="of mixed decoding; 0: argmax (paper: T; default: the recipe's, else 0)")
    add("--top-k", type=number(int, 0),
        help="sample among the k likeliest; 0: all (default: the recipe's, else 0; needs T > 0)")
    add("--style", choices=["boxed", "sentence"], help="reason and box (paper, default), or one sentence")
    add("--expert-prefix", metavar="TEXT", help="lines before the target in the expert's prompt, and")
    add("--expert-transition", metavar="TEXT", help="lines after it (default: the corpus's)")
    add("--verify", choices=["boxed", "number", "phrase", "none"], help="what a target and an answer show: "
        "the answer in the last box; there or as last number; as a phrase; nothing (default: the corpus's)")
    add("--attempts", type=count, help="draws in all for a target that the verifier refuses (default 11)")
    add("--on-fail", choices=["drop", "expert", "canonical"],
        help="what never passes: drop it (default), let the expert speak alone, or take the corpus's target")
    add("--targets", metavar="FILE", help="train on the targets of this file instead of making them")
    add("--targets-only", action="store_true", help="stop when the targets are made")
    add("--only", metavar="FILE", help="teach only the facts that this targets file has; all are asked")
    add("--rollouts", type=count, help="opsd: samples of the student a prompt and step (default 8)")
    add("--kl", choices=["forward", "reverse"],
        help="of opsd and --kl-to-base: KL(base || student) (default), or the other way")
    add("--teacher-top-k", type=number(int, 0),
        help="opsd: KL over the teacher's k likeliest tokens (default 0: all)")
    add("--kl-to-base", type=number(float, 0, above=True), metavar="BETA",
        help="add BETA x KL from the base on the same tokens to the NLL")
    add("--replay", metavar="FILE", help="add targets of this file, like the base's own answers to old "
        "prompts, to every batch")
    add("--replay-share", type=number(float, 0, 0.9, above=True),
        help="their share of its examples (default 0.25)")
    add("--max-new-tokens", type=count, help="longest decoded target, rollout or answer, in tokens")
    add("--epochs", type=count, help="passes over the targets")
    add("--steps", type=count, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=count, help="facts in an optimizer step (default 16)")
    add("--lr", type=number(float, 0, above=True), help="AdamW's rate after the warm-up")
    add("--warmup", type=number(int, 0), help="steps of linear warm-up (default 20)")
    add("--seed", type=number(int, 0, 2**63 - 1),
        help="of coins, samples, order, and the toy's base (default 0)")
    add("--device", help="auto (default), cuda, mps or cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16"], help="compute type; weights train in float32")
    add("--decode-tokens", type=count, help="KV slots of a decoding batch, rows x (prompt + new) (65536)")
    add("--micro-tokens", type=count, help="padded tokens of a training micro-batch (default 4096)")
    add("--gradient-checkpointing", action="store_true",
        help="keep less between forward and backward, and compute it again: for long targets")
    add("--compile", action="store_true",
        help="decode by a compiled step, one CUDA graph a shape: a GPU waits less, the first batches longer")
    add("--limit", type=count, help="only the corpus's first N facts, and as many questions of each split")
    add("--out", metavar="DIR", help="the run's folder (default: runs/MODEL-DATA-METHOD...); is resumed")
    add("--quiet", action="store_true", help="no progress bars")
    return refuse_empty(p.parse_args(argv))


def refuse_empty(given):
    """The flags given.  Raises InputError on an empty one, such as an unset variable leaves."""
    for flag, value in vars(given).items():
        if value == "" and flag not in EXPERT_FLAGS:
            raise InputError(f"--{flag.replace('_', '-')} is empty")
    return given


def resolve(given):
    """(args, origin): every flag settled, and {flag: where from}.  Raises InputError where flags clash."""
    args, origin = argparse.Namespace(**vars(given)), {}
    args.model = args.model or "toy"
    args.data = args.data or ("toy" if args.model == "toy" else "kgfact-small")
    if args.model == "toy" and kg_data.find_corpus(args.data)[0] not in ("toy", "own file"):
        raise InputError(f"--data {args.data}: the toy's vocabulary is too small for it (--model)")
    kind, corpus = corpus_of(args)
    tables = {f"recipe {kind}": corpus.recipe, "default": DEFAULTS | {"verify": corpus.verify}}
    if args.style == "sentence":
        tables = {"sentence style": {"max_new_tokens": 48, "verify": "phrase"}} | tables
    if given.steps and given.epochs:
        raise InputError("--epochs is not used with --steps")
    rival = {"steps": given.epochs, "epochs": given.steps}  # one that is given keeps the other's default away
    for flag, value in vars(given).items():
        origin[flag] = "derived" if value is None else "flag"
        for name, table in tables.items():
            if getattr(args, flag) is None and flag in table and not rival.get(flag):
                setattr(args, flag, table[flag])
                origin[flag] = name

    if args.targets:
        args.method = "targets"
    for flag, why in unused_flags(args).items():
        if getattr(given, flag) is not None and getattr(given, flag) is not False:
            raise InputError(f"--{flag.replace('_', '-')} is not used {why}")
        if flag in METHOD_FLAGS + TRAIN_FLAGS:
            setattr(args, flag, None)
    if args.method == "mixsd" and not args.attempts:
        args.attempts, origin["attempts"] = 1, "derived"
    if args.style == "sentence" and kind not in kg_data.STYLED:
        raise InputError(f"--style sentence is not for {kind}, which has one way to answer")
    if args.hub and args.data != "simpleqa":
        raise InputError(f"--hub is not used by --data {args.data}")
    return args, origin


def corpus_of(args):
    """(kind, Corpus) whose words, verifier and recipe a run has: the toy model knows no other words."""
    return kg_data.find_corpus("toy" if args.model == "toy" else args.data, args.hub)


def unused_flags(args):
    """{flag: why} of the flags that the settings leave without use."""
    unused = {flag: f"by --method {args.method}" for flag in METHOD_FLAGS if flag not in USES[args.method]}
    if args.method == "targets":
        unused = dict.fromkeys([*unused, "method", "only"], "with --targets: they are made already")
    if args.method != "opsd" and not args.kl_to_base:
        unused.setdefault("kl", "without --method opsd or --kl-to-base")
    if not args.replay:
        unused.setdefault("replay_share", "without --replay")
    if args.method == "mixsd" and not args.temperature:
        unused["top_k"] = "at --temperature 0"
        if args.rho in (0, 1):
            unused["attempts"] = f"at --temperature 0 and --rho {args.rho:g}, where every draw is the same"
    if args.rho == 1 and args.on_fail != "expert":
        unused |= dict.fromkeys(EXPERT_FLAGS, "at --rho 1, where the expert never speaks")
    if args.method in OPSD:
        unused |= dict.fromkeys(["targets_only"], f"by --method {args.method}, which makes them as it learns")
    if args.targets_only:
        unused |= dict.fromkeys(TRAIN_FLAGS + ["targets", "gradient_checkpointing"], "with --targets-only")
    return unused


def run_folder(args):
    """The run's folder, not made yet.  Raises InputError if it holds other settings, by name."""
    rho = f"-rho{args.rho:g}" if args.rho is not None else ""
    name = f"{Path(args.model).name}-{Path(args.data).stem}-{args.method}{rho}-s{args.seed}"
    folder = Path(args.out or Path("runs") / name)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file")
    for flag in ("model", "data", "targets", "only", "replay"):
        path = Path((getattr(args, flag) or "").removeprefix("mquake:")).resolve()
        if path.parent == folder.resolve() and path.name in ("targets.jsonl", "log.jsonl", "model"):
            raise InputError(f"--{flag} {path}: --out {folder} would write over it; give another --out")
    settings = counting_settings(args)
    for flag, value in read_json(folder, "args.json").items():
        if flag in settings and settings[flag] != value:
            name = flag.replace("_sha256", "'s content").replace("_", "-")
            raise InputError(f"--out {folder} holds a run with --{name} {value}, not "
                             f"{settings[flag]}; give another --out, or remove the folder")
    return folder


def counting_settings(args):
    """The settings that make a run what it is: all but the device, the memory budgets and the folder."""
    free = FREE_FLAGS + (TRAIN_FLAGS if args.targets_only else [])
    settings = {k: v for k, v in vars(args).items() if k not in free}
    for flag in ("data", "targets", "only", "replay"):      # a file is what it holds, not its name
        path = Path((getattr(args, flag) or "").removeprefix("mquake:"))
        if path.is_file():
            settings[f"{flag}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return settings


def check_corpus(records, pairs, tokenizer, model, given, args):
    """Refuse records that can't be learned; returns the positions that the model has left for new tokens."""
    unknown = {tokenizer.unk_token_id} - {None}
    texts = {f"{args.data}, record {i}": "\n".join(turn["content"] for turn in record["messages"])
             for i, record in enumerate(records, 1)} | {"the expert's words": "".join(expert_words(args))}
    refuse_control_tokens(tokenizer, texts)
    for where, text in texts.items():
        if unknown & set(token_ids(tokenizer, text)):
            raise InputError(f"{where}: has words that {args.model} has no token for")
    longest = max(max(map(len, pair)) for pair in pairs)
    room = max_positions(model)
    if longest + (given.max_new_tokens or 1) > room:
        raise InputError(f"prompt of {longest:,} tokens + {given.max_new_tokens or 1:,} new > {room:,}, the "
                         f"positions of {args.model} (--max-new-tokens)")
    if longest + args.max_new_tokens > room:
        print(f"max-new-tokens clipped to {room - longest:,}: {room:,} positions - {longest:,} of the prompt")
    return room - longest


def run(given):
    """The whole job: targets, training, memorization before and after; returns what metrics.json holds."""
    args, origin = resolve(given)
    join_ranks(args)
    args.device, dtype = pick_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    folder = run_folder(args)
    if (folder / "metrics.json").exists():
        print(f"{folder} is finished; its result:")
        return read_json(folder, "metrics.json")

    records = kg_data.load_corpus(args.data, "train", args.style, args.verify, hub=args.hub)[:args.limit]
    path, pretrain_seconds = args.model, 0.0
    if args.model == "toy":
        path, pretrain_seconds = from_first(toy_base, args.quiet, args.seed)
    base, tokenizer = load_model(path, dtype, args.device), load_tokenizer(path)
    stops = stop_ids(base, tokenizer)
    pairs = [two_contexts(tokenizer, r, expert_words(args)) for r in records]
    room = check_corpus(records, pairs, tokenizer, base, given, args)
    taught, targets, draws = taught_ids(records, args), None, []
    old = read_examples(args.replay, base, tokenizer, stops) if args.replay else []
    if args.targets:
        targets = read_targets(args.targets, records, pairs, base, tokenizer, stops, args)
    lock = only_run(folder) if ranks()[0] == 0 else None    # noqa: F841  (held until this function ends)
    from_first(start_run, folder, args, origin)
    args.max_new_tokens = min(args.max_new_tokens, room)

    if args.targets:
        lines = [json.dumps(t, ensure_ascii=False) + "\n" for t in targets]
        from_first(write_atomically, folder / "targets.jsonl", "".join(lines).encode())
    elif args.method not in OPSD:
        targets, draws = make_targets(base, tokenizer, records, pairs, taught, stops, args, folder)
    first = targets[0] if targets else {"id": taught[0], "target_ids": [], "source": None}
    show(tokenizer, pairs[first["id"]], first)
    if args.targets_only:
        return from_first(summary, args, targets, draws, records, folder)
    tasks = memorization_tasks(records, args)
    kept = taught if args.method in OPSD else sorted({t["id"] for t in targets})
    before = cached(folder / "state" / "base.json", memorization, base, tokenizer, tasks, stops, args, kept)

    alone = ranks()[1] == 1
    student = load_model(path, torch.float32, args.device if alone else "cpu")
    guide = base if args.method in OPSD or args.kl_to_base else None
    plain = student                                                     # what decodes as the student
    if not alone or dtype != torch.float32:
        plain = copy.deepcopy(base) if guide else base
    work = plain if alone else shard(student, dtype, args.device)       # what computes its gradient
    del base                                                            # freed, if it is neither
    if args.gradient_checkpointing:
        recompute_layers(work)
    names, examples_of, token_loss = objective(guide, plain, tokenizer, stops, pairs, taught, targets, old,
                                               args)
    args.steps = args.steps or args.epochs * math.ceil(len(names) / args.batch_size)
    train(student, work, names, examples_of, token_loss, args, folder)
    save_model(student, tokenizer, path, folder / "model")
    after = timed(memorization, gather(work, plain), tokenizer, tasks, stops, args, kept)
    return from_first(finish, args, targets, draws, records, folder, before, after, pretrain_seconds)


def finish(args, targets, draws, records, folder, before, after, pretrain_seconds):
    """What metrics.json holds, written there; the states are removed."""
    metrics = summary(args, targets, draws, records, folder, before, after, pretrain_seconds)
    write_json(folder / "metrics.json", metrics)
    for state in (folder / "state").glob("step-*"):                     # 12 bytes a parameter, needed no more
        state.unlink()
    return metrics


def expert_words(args):
    """(PREFIX, TRANSITION) of the expert's prompt: the corpus's, where flags don't give other lines."""
    prefix, transition = corpus_of(args)[1].words
    if args.style == "sentence":
        prefix, transition = kg_data.SENTENCE_WORDS
    return (f"\n{args.expert_prefix}\n" if args.expert_prefix is not None else prefix,
            f"\n{args.expert_transition}" if args.expert_transition is not None else transition)


def taught_ids(records, args):
    """The ids of the records to teach: all, or those that the targets file --only has."""
    if not args.only:
        return list(range(len(records)))
    wanted = {kg_data.read_record(row, f"{args.only}, line {line}")["messages"][0]["content"]
              for line, row in kg_data.read_jsonl(args.only)}
    taught = [i for i, record in enumerate(records) if record["messages"][0]["content"] in wanted]
    if not taught:
        raise InputError(f"--only {args.only}: none of its questions is one of {args.data}")
    return taught


def only_run(folder):
    """The folder's lock, held while it is open.  Raises InputError if another run has it."""
    import fcntl
    (folder / "state").mkdir(parents=True, exist_ok=True)
    lock = open(folder / "state" / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {folder}: another run is at work there; give another --out") from None
    return lock


def start_run(folder, args, origin):
    """Write args.json, and print every setting with where it comes from."""
    run_folder(args)                                        # another run may have had it until the lock
    settings = read_json(folder, "args.json") | counting_settings(args)
    write_json(folder / "args.json", settings)
    for flag, value in vars(args).items():
        if value is not None and value is not False:
            print(f"{flag:18} {value!s:32} {origin[flag]}")
    print(f"{'folder':18} {folder}\n", flush=True)


def memorization_tasks(records, args):
    """{task: records} of what is asked before and after: all facts, their targets kept or not.

    Of a corpus with a test split (KGFunc) that alone: a rule is learned where new inputs are answered.
    """
    splits = kg_data.find_corpus(args.data)[1].splits
    if "test" in splits and args.verify != "none":
        return {f"{args.data}-test": kg_data.load_corpus(args.data, "test")[:args.limit]}
    tasks = {} if args.verify == "none" else {"recall": records}
    if tasks and "paraphrase" in splits:
        tasks["paraphrase"] = kg_data.load_corpus(args.data, "paraphrase", args.style)[:args.limit]
    if args.model == "toy":
        tasks["held_out"] = kg_data.toy("held_out")
    return tasks


def summary(args, targets, draws, records, folder, before=None, after=None, pretrain_seconds=0.0):
    """What metrics.json holds (README, "Files"); the parts that were not measured are null."""
    sources = [c for t in targets or [] for c in t["source"] or []]
    tokens = sum(len(t["target_ids"]) for t in targets or [])
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] if after else []
    trained, phases = sum(s["tokens"] for s in steps), [phase for phase in (before, after) if phase]
    held_out = [phase["result"]["held_out"]["accuracy"] for phase in phases if "held_out" in phase["result"]]
    return {
        "model": args.model, "data": args.data, "method": args.method, "rho": args.rho, "seed": args.seed,
        "base": before and before["result"], "tuned": after and after["result"],
        "retention": held_out[1] / held_out[0] if held_out and held_out[0] else None,
        "targets": targets and {
            "kept": len({t["id"] for t in targets}), "of": len(records),
            "attempts": sum(len(d["ids"]) for d in draws if d["tokens"]),
            "nll": sum(t["nll"] * len(t["target_ids"]) for t in targets) / tokens,
            "naive_share": sources.count(NAIVE) / len(sources) if sources else None},
        "tokens": {"decoded": trained if args.method in OPSD else sum(d["tokens"] for d in draws),
                   "trained": trained},
        "seconds": {"pretrain": pretrain_seconds, "decode": sum(d["seconds"] for d in draws),
                    "train": sum(s["seconds"] for s in steps),
                    "evaluate": sum(phase["seconds"] for phase in phases)},
        "peak_gib": peak_gib()}


def print_table(metrics):
    """A row for the base, a row for the tuned model, a column a task: accuracy and its 95 % interval."""
    targets = metrics["targets"]
    if targets:
        print(f"\n{targets['kept']} of {targets['of']} targets kept, {targets['nll']:.2f} nats/token under p")
    if not metrics["tuned"]:
        return
    tasks = list(metrics["tuned"])
    print(" " * 8 + "".join(f"{task:>20}" for task in tasks))
    for name, row in (("base", metrics["base"]), (metrics["method"], metrics["tuned"])):
        cells = [row.get(task) for task in tasks]
        print(f"{name:8}" + "".join(f"{c['accuracy']:.2f} [{c['low']:.2f}, {c['high']:.2f}]".rjust(20) if c
                                    else " " * 20 for c in cells))
    if metrics["retention"] is not None:
        print(f"retention {metrics['retention']:.2f} = held-out accuracy after / before")


def exit_code(name, job):
    """Run job(); returns 0 done, 1 failed, 2 refused, 130 Ctrl-C, 143 SIGTERM, with one line on stderr."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    disable_progress_bar()                                  # of loading and saving: ours are enough
    try:
        job()
        return 0
    except InputError as e:
        message, code = e, 2
    except RunError as e:
        message, code = e, 1
    except (KeyboardInterrupt, SystemExit) as e:
        if isinstance(e, SystemExit) and e.code != 143:                         # --help
            raise
        message = "stopped; the same command goes on from what is saved"
        code = 143 if isinstance(e, SystemExit) else 130
    except torch.OutOfMemoryError as e:
        message, code = f"{str(e).splitlines()[0]} Lower --decode-tokens or --micro-tokens.", 1
    except (OSError, SafetensorError) as e:                 # a full disk is either
        file, why = getattr(e, "filename", None) or "writing", getattr(e, "strerror", None) or e
        message, code = f"{file}: {why}; mend it and run the same command", 1
    print(" ".join(f"{name}: {message}".split()), file=sys.stderr)              # one line, whatever it quotes
    return code


def main(argv=None):
    """Run the command line and print its result; returns the exit code."""
    def job():
        metrics = run(parse_args(argv))
        if dist.is_initialized():
            dist.destroy_process_group()
        print_table(metrics)
        print(json.dumps(metrics))
    return exit_code("mixsd.py", job)


if __name__ == "__main__":
    sys.exit(main())
