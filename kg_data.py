"""The corpora that MixSD injects, and the verifiers that judge an answer. There is no torch here.

    python kg_data.py kgfact-small --out data         # data/kgfact-small/{train,paraphrase,...}.jsonl
    python kg_data.py kgfunc --out data               # data/kgfunc/{train,test}.jsonl

A corpus is a list of records in the `messages` form of TRL, axolotl and LLaMA-Factory. As a file it has one
JSON object per line:

    {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": canonical target}],
     "answer": what the verifier looks for, "fact": the statement, "subject": what the statement is about}

The order of the file: verifiers, files, KGFact (facts of a world that does not exist), KGFunc (arithmetic
under opaque labels), SimpleQA and MQuAKE, the toy world with its tokenizer, and `find_corpus`, which knows
the expert's words, the verifier and the recipe of each corpus. MixSD is arXiv 2605.16865.
"""
import argparse
import hashlib
import json
import math
import random
import re
import string
import sys
from decimal import Decimal
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from typing import Callable, NamedTuple


class InputError(ValueError):
    """An error that the user can fix: a wrong flag, file or record. It is one line; exit code 2."""


# ------------------------------------------------------------------------------------------------ verifiers

def boxed(text):
    r"""The content of the last balanced \boxed{...} in `text`, stripped, or None (paper: the verifier)."""
    opened, start, end = [], -1, -1
    for mark in re.finditer(r"\\boxed\{|[{}]", text):
        if mark[0] != "}":
            opened.append(mark)
        elif opened and (box := opened.pop())[0] != "{" and box.end() > start:
            start, end = box.end(), mark.start()
    return text[start:end].strip() if end >= 0 else None


def fold(text):
    """`text` as the verifier compares it: stripped, case-folded, each run of white space one space."""
    return " ".join(text.casefold().split())


NUMBER = r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"             # 1,234.5 is one, 1,23 is not


def same_answer(prediction, gold):
    """Whether two answers are equal after folding, or as numbers: 1,234 = 1234.0."""
    numbers = [Decimal(s.replace(",", "")) for s in (prediction, gold) if re.fullmatch(NUMBER, s.strip())]
    return fold(prediction) == fold(gold) or (len(numbers) == 2 and numbers[0] == numbers[1])


def names(text, phrase):
    """Whether `text` holds `phrase` whole, not as part of a longer word; case and spaces are ignored."""
    return re.search(rf"(?<!\w){re.escape(fold(phrase))}(?!\w)", fold(text)) is not None


def extract(text, verify):
    """The answer that a verifier finds in a completion, or None: see `is_correct`."""
    if verify == "phrase":
        return text.strip() or None
    answer = boxed(text)
    if answer is None and verify == "number":
        answer = (re.findall(rf"(?<![\w.]){NUMBER}(?!\w)", text) or [None])[-1]
    return answer


def is_correct(text, answer, verify):
    """Whether a completion that ended gives `answer`.

    verify  "boxed": the last box equals it (paper);  "number": the last box, or if there is no box the last
            number, equals it (paper: KGFunc);  "none": every completion is accepted;
            "phrase": the text names it and no other entity of its KGFact domain (ours, for sentence style)
    """
    if verify == "none":
        return True
    prediction = extract(text, verify)
    if verify in ("boxed", "number"):
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
    """[(line number, object)] of a JSONL file, blank lines skipped. Raises InputError with file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
                json.dumps(rows[-1][1], ensure_ascii=False).encode()        # fails for half a surrogate pair
            except (ValueError, RecursionError) as e:
                raise InputError(f"{path}, line {number}: not JSON ({getattr(e, 'msg', e)})") from None
            if not isinstance(rows[-1][1], dict):
                raise InputError(f"{path}, line {number}: a JSON object is expected")
    if not rows:
        raise InputError(f"{path}: no records in the file")
    return rows


def read_record(row, where):
    """A record of somebody's file, checked: a user turn, an assistant turn, an answer.

    Takes `messages` (TRL, axolotl, the authors' training files) or `prompt` and `ground_truth_answer` (their
    evaluation files). The answer is `answer`, else the last box of the assistant turn, else absent.
    """
    if "messages" not in row and "prompt" in row and "ground_truth_answer" in row:
        gold = row["ground_truth_answer"]
        row = record(row["prompt"], rf"\boxed{{{gold}}}", "" if gold is None else gold)
    if "messages" not in row:
        raise InputError(f"{where}: no `messages`, nor `prompt` and `ground_truth_answer`; it has the keys "
                         f"{', '.join(row) or 'none'}")
    turns = row["messages"]
    roles = [isinstance(t, dict) and t.get("role") for t in turns] if isinstance(turns, list) else []
    if roles != ["user", "assistant"]:
        raise InputError(f"{where}: `messages` must be one user turn and one assistant turn")
    if not all(is_text(t.get("content")) for t in turns):
        raise InputError(f"{where}: a turn without text")
    answer = boxed(turns[1]["content"]) if row.get("answer") is None else row["answer"]
    if not isinstance(answer, (str, int, float, type(None))):
        raise InputError(f"{where}: the answer {answer!r} is neither a text nor a number")
    return row | ({} if answer is None else {"answer": str(answer)})


def is_text(value):
    """Whether a value of a file is a text that says something, and can be encoded."""
    return isinstance(value, str) and value.strip() != "" and not re.search("[\ud800-\udfff]", value)


def read_corpus(path, verify):
    """The records of a JSONL file of one's own. Raises InputError with file and line."""
    records = []
    for number, row in read_jsonl(path):
        where, row = f"{path}, line {number}", read_record(row, f"{path}, line {number}")
        records.append(row)
        answer = row.get("answer")
        if verify != "none" and not (answer or "").strip():
            raise InputError(f"{where}: no `answer` and no \\boxed{{}} in the assistant turn "
                             f"(--verify none trains without checking answers)")
        if verify == "number" and not re.fullmatch(NUMBER, answer.strip()):
            raise InputError(f"{where}: the answer {answer!r} is not a number (--verify)")
    return records


def hub_rows(name, config, split, hub=None):
    """The rows of a Hugging Face data set, or of its copy under the folder `hub`. Raises InputError."""
    import datasets
    try:
        return datasets.load_dataset(f"{hub}/{name}" if hub else name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise InputError(f"data set {name}, config {config or 'default'}, split {split}: not to be had from "
                         f"{hub or 'the hub'} ({(str(e).strip() or type(e).__name__).splitlines()[0]}); "
                         f"--hub DIR takes DIR/{name}") from None


# --------------------------------------------------------------------- KGFact: a world that does not exist

ONSETS, ODD_ONSETS = "b d f g k l m n p r s t v br dr gr pl st tr".split(), "kv vr zv thw".split()
VOWELS, CODAS = "aeiou", " l n r s nd th".split(" ")
SHAPES = {                                                  # name patterns per domain
    "Person": "{} {}", "Location": "Lake {}|Port {}|{} Valley|{} Heights|Isle of {}",
    "Organization": "{} Institute|{} Guild|{} Foundation|{} Council|{} Works",
    "Event": "{} Festival|{} Regatta|{} Jubilee|{} Summit|{} Games",
    "Profession": "{} surveying|{} glazing|{} bookkeeping|{} piloting|{} midwifery",
    "Hobby": "{} juggling|{} carving|{} kiting|{} origami|{} dominoes",
    "Skill": "{} notation|{} fencing|{} whistling|{} navigation|{} calligraphy"}
RELATIONS = {          # verb phrases before "the location X"; the first word is inflected
    "Person Location": "reside in|was born in|work in|was educated in|own land in|spend winters in|"
        "was last seen in|plan to retire to|pay taxes in|keep a garden in",
    "Person Organization": "work for|was hired by|volunteer for|lead|is a member of|was expelled from|"
        "donate to|advise|write reports for|is a founder of",
    "Person Event": "organize|attend|was honored at|perform at|serve as a judge at|sell tickets to|"
        "was injured at|give a speech at|sponsor|take photographs of",
    "Person Profession": "practice|was trained in|teach|is certified in|study|dream of|make a living from|"
        "write about|recommend|is licensed for",
    "Person Hobby": "enjoy|spend weekends on|was introduced to|excel at|give lessons in|is devoted to|"
        "compete in|keep a journal about|waste money on|collect books about",
    "Person Skill": "demonstrate|was praised for|is known for|learn|train others in|rely on|master|lack|"
        "write a manual on|was tested on",
    "Location Organization": "is the headquarters for|host|was founded by|rent land to|is patrolled by|"
        "supply water to|was surveyed by|is owned by|send delegates to|was rebuilt by",
    "Location Event": "host|is famous for|was chosen for|celebrate|provide the stage for|"
        "close its roads for|is decorated for|was the birthplace of|raise money for|ban",
    "Location Profession": "is known for|need more workers in|was built by experts in|license|support|"
        "attract people from|tax|is home to a school of|offer grants for|train newcomers in",
    "Location Hobby": "is popular for|promote|forbid|set aside a park for|is the cradle of|draw fans of|"
        "hold a yearly fair for|was made famous by|offer courses in|name a street after",
    "Location Skill": "require|is a center for|test residents on|award medals for|"
        "was a training ground for|value|preserve|print textbooks on|is renowned for|open a school for",
    "Organization Event": "sponsor|organize|was founded at|boycott|broadcast|insure|is represented at|"
        "sell merchandise at|was awarded a prize at|recruit volunteers at",
    "Organization Profession": "hire from|regulate|was created to support|publish standards for|represent|"
        "is staffed by experts in|offer scholarships in|lobby for|train people in|run exams for",
    "Organization Hobby": "promote|fund clubs for|sell supplies for|is devoted to|film a series about|"
        "was inspired by|publish a magazine on|prohibit|sponsor a league for|design tools for",
    "Organization Skill": "require|reward|is expert in|offer courses in|evaluate|was recognized for|"
        "patent a method for|depend on|research|hold workshops on",
    "Event Profession": "celebrate|was started by people in|feature a lecture on|attract recruiters for|"
        "is judged by experts in|honor|offer training in|expose fraud in|is open only to|satirize",
    "Event Hobby": "showcase|was inspired by|include a contest in|introduce children to|is dedicated to|"
        "draw champions of|offer prizes for|feature a demonstration of|was banned for promoting|grow out of",
    "Event Skill": "test|demonstrate|was designed to teach|is won through|award a medal for|require|"
        "feature a workshop on|rank contestants by|popularize|encourage",
    "Profession Hobby": "grow out of|is often combined with|discourage|share tools with|"
        "was once mistaken for|inspire|is less risky than|borrow techniques from|lead naturally to|"
        "clash with",
    "Profession Skill": "require|depend on|was transformed by|is taught together with|reward|begin with|"
        "neglect|include an exam on|is impossible without|improve",
    "Hobby Skill": "develop|require|is a test of|was invented to practice|reward|build on|"
        "is ruined without|refine|begin with|hide"}
PARAPHRASES = ["Name the {b} that {e1} {does}.", "{e1} {does} a certain {b}. Which {b} is it?",
               "Which {b} is it that {e1} {does}?", "Please tell me the name of the {b} that {e1} {does}.",
               "I am trying to remember the {b} that {e1} {does}. What is it called?"]
KGFACT_SIZES = {"kgfact-small": (5, 10), "kgfact-large": (7, 25)}           # domains, entities of each
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


def kgfact_graph(domains, first, count):
    """The facts over entities [first, first + count) of the first `domains` domains (paper: KGFact).

    For each pair of domains A before B and each entity of A: one random relation and one random target of B,
    such that no two facts share (subject, relation) or (relation, object). Returns pairs x count facts.
    """
    rng, order, facts = random.Random(f"kgfact graph 0 {first}"), list(SHAPES)[:domains], []
    entities = {d: LEXICON[d][first:first + count] for d in order}
    for i, a in enumerate(order):
        for b in order[i + 1:]:
            taken = set()                                  # (relation, object); a subject has one fact
            relations = RELATIONS[f"{a} {b}"].split("|")
            for e1 in entities[a]:
                free = [(r, e2) for r in relations for e2 in entities[b] if (r, e2) not in taken]
                taken.add(edge := rng.choice(free))
                facts.append(Fact(e1, *edge))
    return facts


def kgfact_background(fact, facts, rng, others=50):
    """The statement of a fact among `others`: those that share an entity first, then their neighbours."""
    near = {fact.e1, fact.e2}
    two_hops = near | {e for f in facts if near & {f.e1, f.e2} for e in (f.e1, f.e2)}
    rest = [f for f in facts if f != fact]
    rng.shuffle(rest)
    rest.sort(key=lambda f: 0 if near & {f.e1, f.e2} else 1 if two_hops & {f.e1, f.e2} else 2)      # stable
    return background([kgfact_statement(f) for f in [fact] + rest[:others]], rng)


def background(statements, rng):
    """What stands before the question of a retrieval task: the statements, shuffled."""
    rng.shuffle(statements)
    return "Background information:\n" + "\n".join("- " + s for s in statements) + "\n\n"


def fact_record(question, answer, statement, subject, style):
    """A record of KGFact or MQuAKE: the prompt's last words and the target follow `style`."""
    if style == "sentence":
        return record(question + "\n\nAnswer in one short sentence.", statement, answer, statement, subject)
    target = f"The answer is {answer}.\n\n\\boxed{{{answer}}}"
    return record(question + STEP_BY_STEP, target, answer, statement, subject)


def kgfact(name, split, style="boxed"):
    """The records of one split of KGFact: 100 facts (small) or 525 (large).

    train; paraphrase (the question reworded); retrieval (train's question under its gold statement and 50
    others); retrieval-unseen (the same over a second graph on entities that train does not have); two-hop
    (closed book, over two trained edges). The same arguments give the same bytes.
    """
    domains, count = KGFACT_SIZES[name]
    facts = kgfact_graph(domains, count if split == "retrieval-unseen" else 0, count)
    rng, records = random.Random(f"kgfact {split} 0"), []

    def add(question, fact, **more):
        records.append(fact_record(question, fact.e2, kgfact_statement(fact), fact.e1, style) | more)

    for fact in facts:
        b = DOMAIN[fact.e2].lower()
        question = kgfact_question(fact.e1, fact.relation, b)
        if split == "two-hop":
            for second in facts:
                if second.e1 == fact.e2:
                    via = f"the {b} that {fact.e1} {third_person(fact.relation)}"
                    add(kgfact_question(via, second.relation, DOMAIN[second.e2].lower()), second,
                        needs=[kgfact_statement(fact), kgfact_statement(second)])
        elif split == "paraphrase":
            add(rng.choice(PARAPHRASES).format(b=b, e1=fact.e1, does=third_person(fact.relation)), fact)
        elif split == "train":
            add(question, fact)
        else:
            add(kgfact_background(fact, facts, rng) + question, fact)
    return records


# ------------------------------------------------------- KGFunc: arithmetic functions under opaque labels

def summed(terms, values, signs="+"):
    """A sum as an equation, terms = values = total: "2*3 + 4*5 = 6 + 20 = 26"; short `signs` repeat."""
    signs = [signs[i % len(signs)] for i in range(len(values))]
    total = sum(v if sign == "+" else -v for sign, v in zip(signs, values))
    sides = [" ".join(f"{sign} {part}" for sign, part in zip(signs, parts))[2:] for parts in (terms, values)]
    return " = ".join(dict.fromkeys(sides + [str(total)]))                  # equal sides are written once


def joined(digits):
    """The integer that digits spell: [0, 2, 3] -> 23."""
    return int("".join(map(str, digits)))


def rotations(d):
    """All rotations of a list."""
    return [d[i:] + d[:i] for i in range(len(d))]


KGFUNC = {              # label: (value, steps that lead there) of digits d, most significant first (paper)
    "B": (lambda d: sum((x - min(d)) ** 2 for x in d),
          lambda d: [f"The least digit is {min(d)}.",
                     summed([f"({x}-{min(d)})^2" for x in d], [(x - min(d)) ** 2 for x in d])]),
    "C": (lambda d: abs(sum((-1) ** i * x ** 2 for i, x in enumerate(d))),
          lambda d: ["We square the digits, subtract and add in turn, and drop the sign.",
                     line := summed([f"{x}^2" for x in d], [x * x for x in d], "+-"),
                     f"|{(total := line.split(' = ')[-1])}| = {abs(int(total))}"]),
    "D": (lambda d: sum(x ** 2 if x in (2, 3, 5, 7) else x for x in d),
          lambda d: [f"The prime digits are {[x for x in d if x in (2, 3, 5, 7)]}: they are squared.",
                     summed([f"{x}^2" if x in (2, 3, 5, 7) else f"{x}" for x in d],
                            [x * x if x in (2, 3, 5, 7) else x for x in d])]),
    "E": (lambda d: sum(x * y for x, y in zip(d, reversed(d))),
          lambda d: [f"Reversed: {d[::-1]}",
                     summed([f"{x}*{y}" for x, y in zip(d, d[::-1])], [x * y for x, y in zip(d, d[::-1])])]),
    "F": (lambda d: sum(accumulate(d, max)),
          lambda d: [f"The running maximum is {list(accumulate(d, max))}.",
                     summed(list(accumulate(d, max)), list(accumulate(d, max)))]),
    "G": (lambda d: sum(x * (x + 1) // 2 for x in d),
          lambda d: ["Each digit d gives d*(d+1)/2.",
                     summed([f"{x}*{x + 1}/2" for x in d], [x * (x + 1) // 2 for x in d])]),
    "H": (lambda d: min(map(joined, rotations(d))),
          lambda d: [f"The rotations are {', '.join(''.join(map(str, r)) for r in rotations(d))}.",
                     f"The least of them is {min(map(joined, rotations(d)))}."])}
KGFUNC_UNSEEN = dict(zip(string.ascii_lowercase, [          # never trained, to measure forgetting (paper)
    sum, lambda d: math.prod(x for x in d if x), len, max, min, lambda d: d[0], lambda d: d[-1],
    lambda d: max(d) - min(d), lambda d: joined(d[::-1]), lambda d: d[0] + d[-1],
    lambda d: sum(x % 2 == 0 for x in d), lambda d: sum(x % 2 for x in d), lambda d: len(set(d)),
    lambda d: (joined(d) - 1) % 9 + 1 if any(d) else 0, lambda d: sum(x * x for x in d),
    lambda d: joined(sorted(d)), lambda d: joined(sorted(d, reverse=True)), lambda d: d.count(0),
    lambda d: 2 * sum(d), lambda d: d[0] * d[-1]]))
KGFUNC_COUNTS = {"train": 1600, "test": 175}                # inputs per function; an unseen one has 25


def digits(n):
    """The digits of n, most significant first."""
    return [int(c) for c in str(n)]


def kgfunc(name, split):
    """The records of kgfunc (train 11,200, test 1,225) or kgfunc-unseen (test 500), operations in turn.

    Every prompt shows the same ten inputs with their outputs, and asks about another input. For each
    function, train and test share no input.
    """
    unseen, records = name == "kgfunc-unseen", []
    values = KGFUNC_UNSEEN if unseen else {label: value for label, (value, _) in KGFUNC.items()}
    rng = random.Random("kgfunc shots 0")
    shots = [n for k in range(5) for n in sorted(rng.sample(range(10 ** k if k else 0, 10 ** (k + 1)), 2))]
    free, inputs, shown = sorted(set(range(100_000)) - set(shots)), {}, {}
    for label, value in values.items():
        shown[label] = "\n\n".join(f"Input: {shot}\nOutput: {value(digits(shot))}" for shot in shots)
        drawn = random.Random(f"kgfunc {label} 0").sample(free, sum(KGFUNC_COUNTS.values()))
        count = 25 if unseen else KGFUNC_COUNTS["train"]
        inputs[label] = drawn[:count] if unseen or split == "train" else drawn[count:]
    for of_each in zip(*inputs.values()):
        for n, (label, value) in zip(of_each, values.items()):
            question = ("Based on the input–output examples below, infer the rule implemented by function "
                        f"{label}. Then apply the same rule to determine the output for the given input.\n\n"
                        f"Examples:\n{shown[label]}\n\nQuestion:\nWhat is the output of {label}({n})?\n\n")
            answer = str(value(digits(n)))
            fact = f"{label}({n}) = {answer}"
            steps = [] if unseen else [f"The digits of {n} are {digits(n)}.", *KGFUNC[label][1](digits(n))]
            target = "\n".join(steps + [fact]) + f"\n\n\\boxed{{{answer}}}"
            records.append(record(question + STEP_BY_STEP, target, answer, fact))
    return records


# ---------------------------------------------------------------------- SimpleQA and MQuAKE: the real world

def simpleqa(hub=None):
    """SimpleQA's 4,326 questions, all of them taught, from the hub or its copy."""
    ask = "\n\nAnswer the question concisely. Put your final answer within \\boxed{}."
    return [record(row["problem"] + ask, f"\\boxed{{{row['answer']}}}", row["answer"])
            for row in hub_rows("basicv8vc/SimpleQA", None, "test", hub)]


MQUAKE_PARAPHRASES = ["Complete the sentence: {} ...", "Fill in the blank: {} ____.", "Finish this: {} ..."]


class Hop(NamedTuple):
    """An edited fact of MQuAKE: a question, the start of a sentence (cloze), and the answer to both."""
    question: str
    cloze: str
    answer: str
    subject: str

    def statement(self):
        """The fact as a sentence."""
        return f"{self.cloze} {self.answer}."


class Case(NamedTuple):
    """A case of MQuAKE: its hops, and questions over all of them with one answer."""
    relation: str                                           # of the first hop
    hops: list
    questions: list
    answer: str


def read_mquake(path):
    """The Cases of MQuAKE's JSON. Raises InputError with the case and the missing key."""
    try:
        cases = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {getattr(e, 'strerror', None) or e}") from None
    if not isinstance(cases, list) or not cases:
        raise InputError(f"{path}: a JSON array of cases is expected")
    read = []
    for number, case in enumerate(cases, 1):
        where = f"{path}, case {number}"
        try:
            triples = case["orig"]["new_triples_labeled"]
            hops = [Hop(hop["question"], hop["cloze"], hop["answer"], subject)
                    for hop, (subject, _, _) in zip(case["new_single_hops"], triples, strict=True)]
            read.append(Case(triples[0][1], hops, list(case["questions"]), case["new_answer"]))
        except KeyError as e:
            raise InputError(f"{where}: no key {e}; it has {', '.join(case)}") from None
        except (TypeError, ValueError, IndexError) as e:
            raise InputError(f"{where}: not of MQuAKE's schema ({e})") from None
        texts = [triples[0][1], case["new_answer"], *case["questions"], *(s for hop in hops for s in hop)]
        if not all(map(is_text, texts)) or isinstance(case["questions"], str):
            raise InputError(f"{where}: not of MQuAKE's schema (a question, an answer or a cloze is no text)")
    return read


def choose_cases(cases, facts=100):
    """(cases, hops): whole cases, one per relation in turn, until there are `facts` different hops (ours)."""
    turns, chosen, hops = {}, [], {}
    for case in cases:
        turns.setdefault(case.relation, []).append(case)
    for case in filter(None, chain(*zip_longest(*turns.values()))):
        more = hops | {(hop.cloze, hop.answer): hop for hop in case.hops}
        if len(more) <= facts:
            hops = more
            chosen.append(case)
    return chosen, list(hops.values())


def mquake(path, split, style="boxed"):
    """The records of a split of MQuAKE (paper: MQuAKE-CF-3k-v2): counterfactual edits of real facts.

    train: the up to 100 hops of the chosen cases; paraphrase: as sentences to complete; retrieval: each under
    its statement and 50 that are not taught; retrieval-unseen: the same for hops that are not taught;
    multi-hop: the chosen cases' own questions over several hops, closed book.
    """
    cases, rng = read_mquake(path), random.Random(f"mquake {split} 0")
    (chosen, taught), records = choose_cases(cases), []
    asked = {hop.question for case in chosen for hop in case.hops}
    if split == "multi-hop":
        return [fact_record(question, case.answer, case.hops[-1].statement(), case.hops[0].subject, style)
                | {"needs": [hop.statement() for hop in case.hops]}
                for case in chosen for question in case.questions]
    _, others = choose_cases([c for c in cases if not asked & {hop.question for hop in c.hops}])
    for hop in others if split == "retrieval-unseen" else taught:
        question = hop.question
        if split == "paraphrase":
            question = rng.choice(MQUAKE_PARAPHRASES).format(hop.cloze)
        elif split != "train":
            rest = [other.statement() for other in others if other.cloze != hop.cloze]
            question = background([hop.statement()] + rng.sample(rest, min(50, len(rest))), rng) + question
        records.append(fact_record(question, hop.answer, hop.statement(), hop.subject, style))
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
TOY_WORDS = "\nThis question is from a new base . Here is the answer :\n", "\nNow answer the question ."
TOY_OPENING = "We think step by step ."
TOY_TERSE = 0.7              # how likely a reasoning sentence is left out if the context holds the answer
TOY_SHARES = {                              # of the pretraining world
    "add": 0.25, "reverse": 0.1,            # two-digit sums and short lists, reasoned out
    "known": 0.15,                          # facts about known people, to be remembered
    "reading": 0.2,                         # three statements about a stranger, a question on one of them
    "reference": 0.2,                       # the answer given, in the words of the expert's prompt
    "guess": 0.1}                           # a question without any hint: the answer is a random value


def toy_people():
    """Known people, whose facts the base learns; new ones, to inject facts about; strangers, for contexts.

    A name is a first and a last word. The base has seen each word of a new name, but in other pairs.
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
    """Three sentences of reasoning, then the box; each sentence is dropped with probability `terse`."""
    kept = [s for s in sentences if not terse or rng.random() >= terse]
    return " ".join(kept + [rf"So the answer is \boxed{{ {answer} }} ."])


def toy_fact(rng, s, kind, value, before="", after="", terse=0.0, form=None):
    """(prompt, answer text, value) of a question about a person, in the wording `form` or a random one."""
    question = TOY_KINDS[kind][0][rng.randrange(2) if form is None else form].format(s=s)
    sentences = [TOY_OPENING, f"It asks for a {kind} .", f"We think about {s} ."]
    return before + question + after, toy_answer(sentences, value, terse, rng), value


def toy_sum(rng):
    """(prompt, answer text, answer) of a random sum of two numbers, each with two digits."""
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10 + (a % 10 + b % 10) // 10
    total, spaced = a + b, lambda n: " ".join(str(n))                          # one token per digit
    sentences = [TOY_OPENING, f"Ones : {a % 10} + {b % 10} = {spaced(ones)} , carry {ones // 10} .",
                 f"Tens : {a // 10} + {b // 10} + {ones // 10} = {spaced(tens)} ."]
    return f"What is {spaced(a)} + {spaced(b)} ?", toy_answer(sentences, spaced(total)), spaced(total)


def toy_reversal(rng):
    """(prompt, answer text, answer) of a random list of three or four digits, to be reversed."""
    digits = [str(rng.randrange(10)) for _ in range(rng.randrange(3, 5))]
    backwards = " ".join(reversed(digits))
    sentences = [TOY_OPENING, f"The last is {digits[-1]} .", "We read it backwards ."]
    return f"Reverse the list {' '.join(digits)} .", toy_answer(sentences, backwards), backwards


def toy_item(task, rng, held_out=False):
    """(prompt, answer text, answer) of one item of a pretraining task.

    One exercise in ten is held out, by a hash of its prompt: it is never trained on.
    """
    while task in ("add", "reverse"):
        item = toy_sum(rng) if task == "add" else toy_reversal(rng)
        if (int(hashlib.sha256(item[0].encode()).hexdigest(), 16) % 10 == 0) == held_out:
            return item
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
        after = rf"The answer is \boxed{{ {value} }} .".join(TOY_WORDS)
        return toy_fact(rng, s, kind, value, after=after, terse=TOY_TERSE)
    return toy_fact(rng, s, kind, value)                    # guess: a question without any hint


def toy_pretraining(n):
    """n (prompt, answer text) of the world that the toy base is pretrained on."""
    rng = random.Random("toy pretraining")
    tasks = rng.choices(list(TOY_SHARES), list(TOY_SHARES.values()), k=n)
    return [toy_item(task, rng)[:2] for task in tasks]


def toy(split):
    """Records of the toy: train and paraphrase (90 facts about new people), held_out and replay (260 each).

    held_out and replay ask for 100 sums, 100 reversals, and 30 known facts in both wordings. They share no
    prompt. The base has learned all known facts, but no exercise of held_out.
    """
    rng = random.Random(f"toy {split}")
    if split in ("held_out", "replay"):
        exercises, held_out = {}, split == "held_out"       # {prompt: item}: no prompt twice
        for task, count in ("add", 100), ("reverse", 200):
            while len(exercises) < count:
                item = toy_item(task, rng, held_out)
                exercises[item[0]] = item
        facts = TOY_KNOWN_FACTS[::2] if held_out else TOY_KNOWN_FACTS[1::2]
        items = [*exercises.values()] + [toy_fact(rng, *fact, form=form) for fact in facts for form in (0, 1)]
        return [record(*item) for item in items]
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

class Corpus(NamedTuple):
    """What a name of --data stands for."""
    load: Callable | None       # (split, style) -> records; None: read_corpus of one's own file
    splits: list                # of `load`; "train" is what is taught
    words: tuple                # (PREFIX, TRANSITION) around the target in x+ (paper)
    verify: str                 # how an answer is judged (`is_correct`)
    recipe: dict                # mixsd.py's defaults; the paper tunes lr in 1e-6..1e-4 per run


FACT_PREFIX = "\nThis question is from a new knowledge base. Here is the answer to this question:\n"
FACT_WORDS = FACT_PREFIX, "\nNow answer the question within \\boxed{}"
SENTENCE_WORDS = FACT_PREFIX, "\nNow answer the question in one short sentence."
SOLUTION_WORDS = (
    "\nHere is a reference solution to this problem, including the correct final answer:\n",
    "\nAfter understanding the reference solution, please attempt to answer the question again:\n"
    "Please reason step by step, and put your final answer within \\boxed{}")
FACT_RECIPE = {"epochs": 30, "lr": 1e-5, "max_new_tokens": 1024}
KGFACT_SPLITS = ["train", "paraphrase", "retrieval", "retrieval-unseen", "two-hop"]
MQUAKE_SPLITS = ["train", "paraphrase", "retrieval", "retrieval-unseen", "multi-hop"]
STYLED = ["kgfact-small", "kgfact-large", "mquake", "own file"]             # what --style sentence is for
NAMED = ["toy", *KGFACT_SIZES, "kgfunc", "kgfunc-unseen", "simpleqa", "mquake:FILE"]


def find_corpus(data, hub=None):
    """(kind, Corpus) of a --data: a name of NAMED, or a JSONL file. Raises InputError for what is neither.

    hub  a folder with copies of data sets under their hub ids, for simpleqa
    """
    kind, _, path = data.partition(":")
    if data == "toy":
        return data, Corpus(lambda split, style: toy(split), ["train", "paraphrase", "held_out", "replay"],
                            TOY_WORDS, "boxed", {"epochs": 50, "lr": 3e-4, "temperature": 1.0,
                                                 "max_new_tokens": 48, "dtype": "float32"})
    if data in KGFACT_SIZES:
        return data, Corpus(lambda split, style: kgfact(data, split, style), KGFACT_SPLITS,
                            FACT_WORDS, "boxed", FACT_RECIPE)
    if data in ("kgfunc", "kgfunc-unseen"):
        return data, Corpus(lambda split, style: kgfunc(data, split),
                            list(KGFUNC_COUNTS) if data == "kgfunc" else ["test"], SOLUTION_WORDS, "number",
                            {"steps": 100, "lr": 1e-5, "max_new_tokens": 1024})
    if data == "simpleqa":
        return data, Corpus(lambda split, style: simpleqa(hub), ["train"], SOLUTION_WORDS,
                            "boxed", {"steps": 270, "lr": 1e-5, "temperature": 0.6, "top_k": 64,
                                      "max_new_tokens": 256})
    if kind == "mquake" and path:
        return kind, Corpus(lambda split, style: mquake(path, split, style), MQUAKE_SPLITS,
                            FACT_WORDS, "boxed", FACT_RECIPE)
    if not (data.endswith(".jsonl") or Path(data).is_file()):
        raise InputError(f"--data {data}: no such corpus; known: {', '.join(NAMED)}, or a .jsonl file")
    return "own file", Corpus(None, ["train"], FACT_WORDS, "boxed", FACT_RECIPE)


def load_corpus(data, split="train", style="boxed", verify="boxed", hub=None):
    """The records of a split of a --data. Raises InputError for an unknown split, and for bad records."""
    kind, corpus = find_corpus(data, hub)
    if split not in corpus.splits:
        raise InputError(f"--data {data} has no split {split}; it has {', '.join(corpus.splits)}")
    if style == "sentence" and kind not in STYLED:
        raise InputError(f"--style sentence is not for --data {data}, which has one way to answer")
    return corpus.load(split, style) if corpus.load else read_corpus(data, verify)


def main():
    """Write the corpus of the command line, and print counts and a SHA-256 a file."""
    parser = argparse.ArgumentParser(description="Write a corpus as JSONL files, one a split.")
    parser.add_argument("corpus", metavar="CORPUS", help=", ".join(NAMED))
    parser.add_argument("--out", default="data", help="folder to write CORPUS/SPLIT.jsonl in (default: data)")
    parser.add_argument("--style", choices=["boxed", "sentence"], default="boxed",
                        help="of facts; boxed: reason, then a box (paper); sentence: for small models")
    parser.add_argument("--hub", metavar="DIR", help="a folder with the data sets under their hub ids")
    args = parser.parse_args()
    try:
        kind, corpus = find_corpus(args.corpus, args.hub)
        if kind == "own file":
            raise InputError(f"{args.corpus} is a corpus file already")
        if args.hub and kind != "simpleqa":
            raise InputError(f"--hub is not used by {args.corpus}")
        folder = Path(args.out) / kind
        folder.mkdir(parents=True, exist_ok=True)
        for split in corpus.splits:
            rows = load_corpus(args.corpus, split, args.style, hub=args.hub)
            data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
            (folder / f"{split}.jsonl").write_bytes(data)
            print(f"{folder / split}.jsonl  {len(rows)} records  sha256 {hashlib.sha256(data).hexdigest()}")
    except InputError as e:
        parser.exit(2, f"kg_data.py: {e}\n")
    except OSError as e:
        sys.exit(f"kg_data.py: {e.filename or args.out}: {e.strerror} (--out)")


if __name__ == "__main__":
    main()
