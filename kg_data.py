"""The corpora that MixSD injects, and the verifiers that judge an answer.  No torch here.

    python kg_data.py kgfact-small --out data         # data/kgfact-small/{train,paraphrase,...}.jsonl

A corpus is a list of records in the `messages` form of TRL, axolotl and LLaMA-Factory, one JSON object a
line:

    {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": canonical target}],
     "answer": what the verifier looks for, "fact": the statement, "subject": whom it is about}

This file: the verifiers (`boxed`, `is_correct`), files (`read_jsonl`, `read_corpus`), KGFact (facts of a
world that does not exist), the toy world (a whole miniature, its tokenizer included), and `load_corpus`,
which gives a corpus by name with the words of its expert prompt.  MixSD is arXiv 2605.16865.
"""
import argparse
import hashlib
import json
import random
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple


class InputError(ValueError):
    """What a user can mend, a flag, a file, a record: the command line prints one line and exits with 2."""


# ------------------------------------------------------------------------------------------------ verifiers

def boxed(text):
    r"""The content of the last balanced \boxed{...} in `text`, stripped, or None (paper: the verifier)."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + len(r"\boxed"), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start + len(r"\boxed{"):end].strip()
        start = text.rfind(r"\boxed{", 0, start)            # the last one never closes: try the one before
    return None


def fold(text):
    """`text` as the verifier compares it: stripped, case-folded, each run of white space one space."""
    return " ".join(text.casefold().split())


def same_answer(prediction, gold):
    """Whether two answers are equal after folding, or as numbers: 1,234 = 1234.0 (but 1,23 is no number)."""
    numbers = [Decimal(s.replace(",", "")) for s in (prediction, gold)
               if re.fullmatch(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?", s.strip()) and re.search(r"\d", s)]
    return fold(prediction) == fold(gold) or (len(numbers) == 2 and numbers[0] == numbers[1])


def names(text, phrase):
    """Whether `text` holds `phrase` whole, that is not as a part of longer words; case and spaces folded."""
    return re.search(rf"(?<!\w){re.escape(fold(phrase))}(?!\w)", fold(text)) is not None


def is_correct(text, answer, verify):
    """Whether a completion that ended gives `answer`.

    verify  "boxed": the last box equals it (paper);  "none": anything will do;
            "phrase": the text names it and no other entity of its KGFact domain (ours, for sentence style)
    """
    if verify == "none":
        return True
    if verify == "boxed":
        prediction = boxed(text)
        return prediction is not None and same_answer(prediction, answer)
    rivals = LEXICON.get(DOMAIN.get(answer), [])
    return names(text, answer) and not any(names(text, other) for other in rivals if other != answer)


# ---------------------------------------------------------------------------------------- records and files

def record(question, target, answer, fact=None, subject=None):
    """One training record, see the top of this file; keys without a value are left out."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": target}]
    extra = {"answer": answer, "fact": fact, "subject": subject}
    return {"messages": turns} | {k: v for k, v in extra.items() if v is not None}


def read_jsonl(path):
    """[(line number, object)] of a JSONL file, blank lines skipped.  Raises InputError with file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as e:
                raise InputError(f"{path}, line {number}: not JSON ({e.msg})") from None
            if not isinstance(rows[-1][1], dict):
                raise InputError(f"{path}, line {number}: a JSON object is expected")
    if not rows:
        raise InputError(f"{path}: no records in the file")
    return rows


def read_record(row, where):
    """A record of somebody's file, checked: a user turn, an assistant turn, an answer.

    Takes `messages` (TRL, axolotl, the authors' training files) or `prompt` and `ground_truth_answer` (their
    evaluation files).  The answer is `answer`, else the last box of the assistant turn, else absent.
    """
    if "messages" not in row and "prompt" in row and "ground_truth_answer" in row:
        gold = str(row["ground_truth_answer"])
        row = record(row["prompt"], rf"\boxed{{{gold}}}", gold)
    turns = row.get("messages")
    roles = [t.get("role") for t in turns if isinstance(t, dict)] if isinstance(turns, list) else []
    if roles != ["user", "assistant"]:
        raise InputError(f"{where}: needs `messages` with one user and one assistant turn "
                         f"(it has the keys {', '.join(row) or 'none'})")
    if not all(isinstance(t.get("content"), str) and t["content"].strip() for t in turns):
        raise InputError(f"{where}: a turn without text")
    answer = boxed(turns[1]["content"]) if row.get("answer") is None else str(row["answer"])
    return row | ({} if answer is None else {"answer": answer})


def read_corpus(path, verify):
    """The records of a JSONL file of one's own.  Raises InputError with file and line."""
    records = []
    for number, row in read_jsonl(path):
        records.append(read_record(row, f"{path}, line {number}"))
        if verify != "none" and not records[-1].get("answer"):
            raise InputError(f"{path}, line {number}: no `answer` and no \\boxed{{}} in the assistant turn "
                             f"(--verify none trains without checking answers)")
    return records


# --------------------------------------------------------------------- KGFact: a world that does not exist

ONSETS, ODD_ONSETS = "b d f g k l m n p r s t v br dr gr pl st tr".split(), "kv vr zv thw".split()
VOWELS, CODAS = "aeiou", " l n r s nd th".split(" ")
SHAPES = {                                                  # how a name shows what it names
    "Person": "{} {}", "Location": "Lake {}|Port {}|{} Valley|{} Heights|Isle of {}",
    "Organization": "{} Institute|{} Guild|{} Foundation|{} Council|{} Works",
    "Event": "{} Festival|{} Regatta|{} Jubilee|{} Summit|{} Games",
    "Profession": "{} surveying|{} glazing|{} bookkeeping|{} piloting|{} midwifery",
    "Hobby": "{} juggling|{} carving|{} kiting|{} origami|{} dominoes",
    "Skill": "{} notation|{} fencing|{} whistling|{} navigation|{} calligraphy"}
RELATIONS = {                       # verb phrases before "the location X"; the first word is inflected
    "Person Location":
        "reside in|was born in|work in|was educated in|own land in|spend winters in|was last seen in|"
        "plan to retire to|pay taxes in|keep a garden in",
    "Person Organization":
        "work for|was hired by|volunteer for|lead|is a member of|was expelled from|donate to|advise|"
        "write reports for|is a founder of",
    "Person Event":
        "organize|attend|was honored at|perform at|serve as a judge at|sell tickets to|was injured at|"
        "give a speech at|sponsor|take photographs of",
    "Person Profession":
        "practice|was trained in|teach|is certified in|study|dream of|make a living from|write about|"
        "recommend|is licensed for",
    "Person Hobby":
        "enjoy|spend weekends on|was introduced to|excel at|give lessons in|is devoted to|compete in|"
        "keep a journal about|waste money on|collect books about",
    "Person Skill":
        "demonstrate|was praised for|is known for|learn|train others in|rely on|master|lack|"
        "write a manual on|was tested on",
    "Location Organization":
        "is the headquarters for|host|was founded by|rent land to|is patrolled by|supply water to|"
        "was surveyed by|is owned by|send delegates to|was rebuilt by",
    "Location Event":
        "host|is famous for|was chosen for|celebrate|provide the stage for|close its roads for|"
        "is decorated for|was the birthplace of|raise money for|ban",
    "Location Profession":
        "is known for|need more workers in|was built by experts in|license|support|attract people from|tax|"
        "is home to a school of|offer grants for|train newcomers in",
    "Location Hobby":
        "is popular for|promote|forbid|set aside a park for|is the cradle of|draw fans of|"
        "hold a yearly fair for|was made famous by|offer courses in|name a street after",
    "Location Skill":
        "require|is a center for|test residents on|award medals for|was a training ground for|value|preserve|"
        "print textbooks on|is renowned for|open a school for",
    "Organization Event":
        "sponsor|organize|was founded at|boycott|broadcast|insure|is represented at|sell merchandise at|"
        "was awarded a prize at|recruit volunteers at",
    "Organization Profession":
        "hire from|regulate|was created to support|publish standards for|represent|is staffed by experts in|"
        "offer scholarships in|lobby for|train people in|run exams for",
    "Organization Hobby":
        "promote|fund clubs for|sell supplies for|is devoted to|film a series about|was inspired by|"
        "publish a magazine on|prohibit|sponsor a league for|design tools for",
    "Organization Skill":
        "require|reward|is expert in|offer courses in|evaluate|was recognized for|patent a method for|"
        "depend on|research|hold workshops on",
    "Event Profession":
        "celebrate|was started by people in|feature a lecture on|attract recruiters for|"
        "is judged by experts in|honor|offer training in|expose fraud in|is open only to|satirize",
    "Event Hobby":
        "showcase|was inspired by|include a contest in|introduce children to|is dedicated to|"
        "draw champions of|offer prizes for|feature a demonstration of|was banned for promoting|grow out of",
    "Event Skill":
        "test|demonstrate|was designed to teach|is won through|award a medal for|require|"
        "feature a workshop on|rank contestants by|popularize|encourage",
    "Profession Hobby":
        "grow out of|is often combined with|discourage|share tools with|was once mistaken for|inspire|"
        "is less risky than|borrow techniques from|lead naturally to|clash with",
    "Profession Skill":
        "require|depend on|was transformed by|is taught together with|reward|begin with|neglect|"
        "include an exam on|is impossible without|improve",
    "Hobby Skill":
        "develop|require|is a test of|was invented to practice|reward|build on|is ruined without|refine|"
        "begin with|hide"}
PARAPHRASES = ["Name the {b} that {e1} {does}.", "{e1} {does} a certain {b}. Which {b} is it?",
               "Which {b} is it that {e1} {does}?", "Please tell me the name of the {b} that {e1} {does}.",
               "I am trying to remember the {b} that {e1} {does}. What is it called?"]
KGFACT_SIZES = {"kgfact-small": (5, 10), "kgfact-large": (7, 25)}           # domains, entities of each
KGFACT_SPLITS = ["train", "paraphrase", "retrieval", "retrieval-unseen", "two-hop"]
STEP_BY_STEP = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def invent(rng):
    """A two-syllable word that is nobody's name: one of its onsets is foreign to English names."""
    onsets = [rng.choice(ONSETS), rng.choice(ODD_ONSETS)]
    rng.shuffle(onsets)
    return (onsets[0] + rng.choice(VOWELS) + onsets[1] + rng.choice(VOWELS) + rng.choice(CODAS)).capitalize()


def lexicon(size=50):
    """{domain: `size` names}: invented by rule from a fixed seed, no two of them sharing an invented word."""
    rng, used, domains = random.Random("kgfact lexicon"), set(), {}
    for domain, shapes in SHAPES.items():
        domains[domain] = []
        while len(domains[domain]) < size:
            words = [invent(rng) for _ in range(shapes.split("|")[0].count("{}"))]
            if not used & set(words):
                used |= set(words)
                name = rng.choice(shapes.split("|")).format(*words)
                domains[domain].append(name.lower() if domain in ("Profession", "Hobby", "Skill") else name)
    return domains


LEXICON = lexicon()
DOMAIN = {name: domain for domain, entities in LEXICON.items() for name in entities}


class Fact(NamedTuple):
    """An edge of the graph: subject e1, verb phrase, object e2."""
    e1: str
    relation: str
    e2: str


def third_person(relation):
    """"reside in" -> "resides in"; phrases that begin with is or was stay."""
    verb, space, rest = relation.partition(" ")
    if verb in ("is", "was"):
        return relation
    if re.search(r"(s|x|z|ch|sh)$", verb):
        verb += "es"
    else:
        verb = verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb + "s"
    return verb + space + rest


def kgfact_question(e1, relation, b):
    """"What location does {e1} reside in?": one right answer, since (subject, relation) occurs once."""
    verb, _, rest = relation.partition(" ")
    return f"What {b} {verb} {e1} {rest}?" if verb in ("is", "was") else f"What {b} does {e1} {relation}?"


def kgfact_statement(f):
    """The fact as a sentence: {e1} resides in the location {e2}."""
    return f"{f.e1} {third_person(f.relation)} the {DOMAIN[f.e2].lower()} {f.e2}."


def kgfact_graph(domains, first, count, seed):
    """The facts over entities [first, first + count) of the first `domains` domains (paper: KGFact).

    For each pair of domains A before B and each entity of A: one random relation and one random target of B,
    such that (subject, relation) and (relation, object) stay unique.  Returns pairs x count facts.
    """
    rng, order, facts = random.Random(f"kgfact graph {seed} {first}"), list(SHAPES)[:domains], []
    entities = {d: LEXICON[d][first:first + count] for d in order}
    for i, a in enumerate(order):
        for b in order[i + 1:]:
            taken = set()                                  # (relation, object); a subject has one fact a pair
            relations = RELATIONS[f"{a} {b}"].split("|")
            for e1 in entities[a]:
                free = [(r, e2) for r in relations for e2 in entities[b] if (r, e2) not in taken]
                taken.add(edge := rng.choice(free))
                facts.append(Fact(e1, *edge))
    return facts


def kgfact_background(fact, facts, rng, others=50):
    """The gold statement among `others` of its graph: those on either entity first, then their neighbours."""
    near = {fact.e1, fact.e2}
    two_hops = near | {e for f in facts if near & {f.e1, f.e2} for e in (f.e1, f.e2)}
    rest = [f for f in facts if f != fact]
    rng.shuffle(rest)
    rest.sort(key=lambda f: 0 if near & {f.e1, f.e2} else 1 if two_hops & {f.e1, f.e2} else 2)      # stable
    chosen = [fact] + rest[:others]
    rng.shuffle(chosen)
    return "Background information:\n" + "\n".join("- " + kgfact_statement(f) for f in chosen) + "\n\n"


def kgfact(name, split, style="boxed", seed=0):
    """The records of one split of KGFact: 100 facts (small) or 525 (large).

    train; paraphrase (the question reworded); retrieval (train's question under its gold statement and 50
    others); retrieval-unseen (the same over a second graph on entities that train does not have); two-hop
    (closed book, over two trained edges).  Same arguments, same bytes.
    """
    domains, count = KGFACT_SIZES[name]
    facts = kgfact_graph(domains, count if split == "retrieval-unseen" else 0, count, seed)
    rng, records = random.Random(f"kgfact {split} {seed}"), []

    def add(question, fact, background=""):
        suffix = STEP_BY_STEP if style == "boxed" else "\n\nAnswer in one short sentence."
        statement = kgfact_statement(fact)
        target = f"The answer is {fact.e2}.\n\n\\boxed{{{fact.e2}}}" if style == "boxed" else statement
        records.append(record(background + question + suffix, target, fact.e2, statement, fact.e1))

    for fact in facts:
        b = DOMAIN[fact.e2].lower()
        question = kgfact_question(fact.e1, fact.relation, b)
        if split == "two-hop":
            for second in facts:
                if second.e1 == fact.e2:
                    via = f"the {b} that {fact.e1} {third_person(fact.relation)}"
                    add(kgfact_question(via, second.relation, DOMAIN[second.e2].lower()), second)
        elif split == "paraphrase":
            add(rng.choice(PARAPHRASES).format(b=b, e1=fact.e1, does=third_person(fact.relation)), fact)
        elif split == "train":
            add(question, fact)
        else:
            add(question, fact, kgfact_background(fact, facts, rng))
    return records


# ------------------------------------------------------------------------------------- the toy world: text

TOY_KINDS = {                                        # kind: questions (the second rewords), statement, values
    "town": (["Where does {s} live ?", "Name the town of {s} ."], "{s} lives in {o} .",
             "Arden Belmor Corva Dunlow Eskel Farrow Gorsey Hilden Iskra Jarrow Keld Lunden Morby Nesk Orrin "
             "Pell"),
    "trade": (["What is the trade of {s} ?", "Name the trade of {s} ."], "{s} is a {o} .",
              "baker smith weaver potter tailor miller cooper fisher mason carver painter sailor farmer "
              "hunter tanner clerk"),
    "pet": (["Which pet does {s} keep ?", "Name the pet of {s} ."], "{s} keeps a {o} .",
            "cat dog crow hen goat mouse newt toad horse snail rabbit ferret parrot pigeon hedgehog "
            "tortoise")}
TOY_PREFIX = "\nThis question is from a new base . Here is the answer :\n"
TOY_TRANSITION = "\nNow answer the question ."
TOY_OPENING = "We think step by step ."
TOY_TERSE = 0.7                      # share of reasoning sentences left out when the context holds the answer
TOY_SHARES = {                              # of the pretraining world
    "add": 0.25, "reverse": 0.1,            # two-digit sums and short lists, reasoned out
    "known": 0.15,                          # facts about known people, to be remembered
    "reading": 0.2,                         # three statements about a stranger, a question on one of them
    "reference": 0.2,                       # the answer given, in the words of the expert's prompt
    "guess": 0.1}                           # a question about a stranger and nothing to go by: any value
TOY_HELD_OUT = ["add", "reverse", "known"]


def toy_people():
    """Known people, whose facts the base learns; new ones, to inject facts about; strangers, for contexts.

    A name is a first and a last word.  The base has seen each word of a new name, but with other words beside
    it.
    """
    rng = random.Random("toy people")
    words = [invent(rng) for _ in range(62)]
    firsts, lasts = words[:50], words[50:]
    known, new = [[f"{a} {rng.choice(lasts)}" for a in part] for part in (firsts[:20], firsts[20:])]
    return known, new, [f"{a} {b}" for a in firsts[20:] for b in lasts if f"{a} {b}" not in new]


TOY_KNOWN, TOY_NEW, TOY_STRANGERS = toy_people()


def toy_facts(people):
    """[(person, kind, value)]: one fact of each kind for each person, always the same."""
    values = {kind: words.split() for kind, (_, _, words) in TOY_KINDS.items()}
    return [(s, kind, random.Random(f"{s} {kind}").choice(values[kind])) for s in people for kind in values]


TOY_KNOWN_FACTS, TOY_NEW_FACTS = toy_facts(TOY_KNOWN), toy_facts(TOY_NEW)


def toy_answer(sentences, answer, terse=0.0, rng=None):
    """The toy's habit: three sentences of reasoning, then the box; each sentence is left out with `terse`."""
    kept = [s for s in sentences if not terse or rng.random() >= terse]
    return " ".join(kept + [rf"So the answer is \boxed{{ {answer} }} ."])


def toy_fact(rng, s, kind, value, before="", after="", terse=0.0, form=None):
    """(prompt, answer text, value) of a question about a person, in the wording `form` or a random one."""
    question = TOY_KINDS[kind][0][rng.randrange(2) if form is None else form].format(s=s)
    sentences = [TOY_OPENING, f"It asks for a {kind} .", f"We think about {s} ."]
    return before + question + after, toy_answer(sentences, value, terse, rng), value


def hash_unit(text):
    """A number in [0, 1) that depends on `text` alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def toy_item(task, rng, held_out=False):
    """(prompt, answer text, answer) of one item of a pretraining task; held-out sums are never trained on."""
    if task == "add":
        while True:
            a, b = rng.randrange(10, 100), rng.randrange(10, 100)
            if (hash_unit(f"{a}+{b}") < 0.1) == held_out:
                break
        ones, tens = a % 10 + b % 10, a // 10 + b // 10 + (a % 10 + b % 10) // 10
        total, spaced = a + b, lambda n: " ".join(str(n))                      # one token a digit
        sentences = [TOY_OPENING, f"Ones : {a % 10} + {b % 10} = {spaced(ones)} , carry {ones // 10} .",
                     f"Tens : {a // 10} + {b // 10} + {ones // 10} = {spaced(tens)} ."]
        return f"What is {spaced(a)} + {spaced(b)} ?", toy_answer(sentences, spaced(total)), spaced(total)
    if task == "reverse":
        digits = [str(rng.randrange(10)) for _ in range(rng.randrange(3, 5))]
        backwards = " ".join(reversed(digits))
        return (f"Reverse the list {' '.join(digits)} .", toy_answer(
            [TOY_OPENING, f"The last is {digits[-1]} .", "We read it backwards ."],
            backwards), backwards)
    if task == "known":
        return toy_fact(rng, *rng.choice(TOY_KNOWN_FACTS))
    kind, s = rng.choice(list(TOY_KINDS)), rng.choice(TOY_STRANGERS)
    draw = lambda k: rng.choice(TOY_KINDS[k][2].split())                            # noqa: E731
    value = draw(kind)
    if task == "reading":
        rows = [TOY_KINDS[k][1].format(s=s, o=value if k == kind else draw(k)) for k in TOY_KINDS]
        rng.shuffle(rows)
        return toy_fact(rng, s, kind, value, before=f"Note : {' '.join(rows)} ", terse=TOY_TERSE)
    if task == "reference":
        after = TOY_PREFIX + rf"The answer is \boxed{{ {value} }} ." + TOY_TRANSITION
        return toy_fact(rng, s, kind, value, after=after, terse=TOY_TERSE)
    return toy_fact(rng, s, kind, value)                    # guess: a stranger, and nothing to go by


def toy_pretraining(n):
    """n (prompt, answer text) of the world that the toy base is pretrained on."""
    rng = random.Random("toy pretraining")
    tasks = rng.choices(list(TOY_SHARES), list(TOY_SHARES.values()), k=n)
    return [toy_item(task, rng)[:2] for task in tasks]


def toy(split):
    """Records of the toy: train (90 facts on new people), paraphrase, held_out (300 items of old tasks)."""
    rng = random.Random(f"toy {split}")
    if split == "held_out":
        items = [toy_item(task, rng, held_out=True) for task in TOY_HELD_OUT for _ in range(100)]
        return [record(prompt, text, answer) for prompt, text, answer in items]
    rows = []
    for s, kind, value in TOY_NEW_FACTS:
        prompt, _, _ = toy_fact(rng, s, kind, value, form=int(split == "paraphrase"))
        statement = TOY_KINDS[kind][1].format(s=s, o=value)
        rows.append(record(prompt, rf"The answer is \boxed{{ {value} }} .", value, statement, s))
    return rows


def toy_tokenizer():
    """A word-level tokenizer of the toy's words, with a chat template: like any Hugging Face model's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    specials = ["<unk>", "<pad>", "<end>", "<user>", "<assistant>"]
    texts = [" ".join(pair) for pair in toy_pretraining(4000)]
    records = toy("train") + toy("paraphrase") + toy("held_out")
    texts += [turn["content"] for r in records for turn in r["messages"]]
    words = sorted({w for text in texts for w in text.split()})
    vocabulary = {w: i for i, w in enumerate(specials + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template="{% for m in messages %}<{{ m.role }}> {{ m.content }}"
                      "{% if m.role == 'assistant' %} <end>{% endif %} {% endfor %}"
                      "{% if add_generation_prompt %}<assistant>{% endif %}")


# ------------------------------------------------------------------------------------------ corpora by name

CORPORA = ["toy", *KGFACT_SIZES]
KGFACT_PREFIX = "\nThis question is from a new knowledge base. Here is the answer to this question:\n"
EXPERT_WORDS = {                            # (PREFIX, TRANSITION) around the target in x+ (paper)
    "boxed": (KGFACT_PREFIX, "\nNow answer the question within \\boxed{}"),
    "sentence": (KGFACT_PREFIX, "\nNow answer the question in one short sentence."),
    "toy": (TOY_PREFIX, TOY_TRANSITION)}


def load_corpus(data, split="train", style="boxed", verify="boxed"):
    """The records of a split of a named corpus, or of a JSONL file (which has only `train`).

    Raises InputError for a name that is neither, or for a file that read_corpus refuses.
    """
    if data == "toy":
        return toy(split)
    if data in KGFACT_SIZES:
        return kgfact(data, split, style)
    if not (data.endswith(".jsonl") or Path(data).is_file()):
        raise InputError(f"--data {data}: no such corpus; known: {', '.join(CORPORA)}, or a .jsonl file")
    return read_corpus(data, verify)


def main():
    """Write the corpus of the command line, and print counts and a SHA-256 a file."""
    parser = argparse.ArgumentParser(description="Write a corpus as JSONL files, one a split.")
    parser.add_argument("corpus", choices=list(KGFACT_SIZES))
    parser.add_argument("--out", default="data", help="folder to write CORPUS/SPLIT.jsonl in (default: data)")
    parser.add_argument("--style", choices=["boxed", "sentence"], default="boxed",
                        help="boxed: reason, then a box (paper); sentence: one sentence, for small models")
    parser.add_argument("--seed", type=int, default=0, help="seed of the graph (mixsd.py --data NAME uses 0)")
    args = parser.parse_args()
    folder = Path(args.out) / args.corpus
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in KGFACT_SPLITS:
            rows = kgfact(args.corpus, split, args.style, args.seed)
            data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
            (folder / f"{split}.jsonl").write_bytes(data)
            print(f"{folder / split}.jsonl  {len(rows)} records  sha256 {hashlib.sha256(data).hexdigest()}")
    except OSError as e:
        sys.exit(f"kg_data.py: {e.filename or args.out}: {e.strerror} (--out)")


if __name__ == "__main__":
    main()
