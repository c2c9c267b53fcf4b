"""Words as the models see them: identifiers split, stop words dropped, endings cut, synonyms brought to one concept."""

import re
from functools import lru_cache

_STOP = frozenset(
    "a about all also am an and any are as at be been but by can could did do does doing else for from had has have how i "
    "if in into is it its itself me may must my of on one or our own really should so some such than that the their them "
    "then there these they this those through to too two up us want was way we were what when where whether which while "
    "who why will with without would you your let just tell please want need thing someone everything something each "
    "every it's i'm using use used uses via e.g i.e self cls none true false above below after before instead".split()
)
# Inverse document frequency of what stands everywhere in programmers' documentation, counted over the docstrings of
# CPython 3.11: (ln(N / n) / ln(N / 12)) ** .65, rounded to .05. A weight, then its stems; what is not here weighs 1.
_WEIGHTS = """
0.35 return
0.45 argument object string
0.50 error file list not number set size valu
0.55 call class creat default function get method name rais
0.60 base current data element given modul no os path read result run time type
0.65 asyncio contain dictionary exception find handler instanc key like line log mail messag new only optional pars
     process remov server specifi tupl url writ xml
0.70 add attribut block buffer case clos code command connection content context convert copy curs decimal defin
     descriptor directory either empty encod end event exampl first flag follow format handl header importlib info
     information input loop mailbox match mode more non open other otherwis out parser pass provid put python replac
     request same see show socket sort sourc start support sys system test thread unittest wait
0.75 abc abstract address allow availabl chang check client collection compar compress coroutin count exist
     identifier implement implementation import includ interfac level local maximum mean most multiprocess note
     packag point protocol represent respons rfc sax second send simpl singl specify ssl standard stat stop stream
     subclass until user variabl version window word zero
0.80 accept access alway ascii ast between binary both callabl cannot clear complet datetim document dom entry
     equivalent exit fd field float form futur generator ignor index indicat inspect internal io keyword last limit
     loader named negat next normal operation operator pathlib platform policy possibl queu random raw reader record
     register relat representation requir signal split traceback urllib work
"""

# One concept a line: general vocabulary of programming and its abbreviations. The first word stands for the others.
_CONCEPTS = """
remove delete erase unlink rm del discard drop strip
create make mk build generate construct
directory dir folder
get fetch obtain retrieve
read load
write save dump store
run execute exec launch spawn invoke
start begin
wait sleep pause delay
join concatenate merge combine
split separate
count occurrence often frequency tally
sort order ordering arrange
copy clone duplicate
move rename
find search locate look
compare difference diff delta
maximum max largest biggest greatest highest
minimum min smallest lowest
temporary temp tmp scratch
environment env environ
parse decode deserialize
encode serialize
string str text character
number integer int numeric
list sequence iterable
dictionary dict mapping
url web http internet
mail email e-mail
password passphrase secret
compress zip pack archive
current present cwd
size length len byte
match pattern regex regexp regular
random shuffle
cache memoize
recursive nested deep
unique distinct
exist existence
command cmd shell
process subprocess
concurrent parallel
coroutine async awaitable
result output
replace substitute sub substitution
time date clock
argument arg option parameter
variable var
connection connect conn
message msg
show display print
ask prompt
identifier id
processor cpu core
element item member
upper uppercase
lower lowercase
quick fast
picture image
path pathname filename
exit quit terminate
extract unpack unarchive
iterate loop
choose choice pick select draw
insert append
multiple several many
average mean
lock mutex
error exception fault failure
equal same identical equivalent
check test verify validate
permission mode
link symlink symbolic
hash digest checksum
watch monitor
repeat again
limit bound
swap exchange
truncate shorten
wildcard glob
socket network
user login
"""
_STEMS = {"libraries": "library", "copies": "copy", "written": "write", "ran": "run", "made": "make", "found": "find"}
# Parts that identifiers are glued from, besides the words above: getsize, urlopen, makedirs.
_PARTS = frozenset(
    "get set is has add put pop push open close read write line lines file dir dirs tree path name size time url str "
    "bytes int list dict map env var cwd pid uid exec wait join link base to from with out in all each any error log "
    "head tail key keys index match group pass word date stamp hash sum mean cmp sub sup cache user ext mod call iter next std".split()
)
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """Light: plurals, -ing, -ed, -ly, -er and a doubled consonant before them; `word` is in lower case."""
    if word in _STEMS:
        return _STEMS[word]
    for ending, rest in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2 and not word.endswith(("ss", "us", "is")):
            word = word[: -len(ending)] + rest
            break
    for ending in ("ively", "ive", "ingly", "ing", "edly", "ed", "ly"):
        if word.endswith(ending) and len(word) > len(ending) + 3:
            word = word[: -len(ending)]
            if len(word) > 2 and word[-1] == word[-2] and word[-1] not in "ls":
                word = word[:-1]
            break
    return word[:-1] if word.endswith("e") and len(word) > 4 else word


def _concept_table() -> dict[str, str]:
    table: dict[str, str] = {}
    for line in _CONCEPTS.strip().splitlines():
        first, *others = line.split()
        for word in (first, *others):
            table.setdefault(stem(word), stem(first))
    return table


_CONCEPT_OF = _concept_table()


def _weight_table() -> dict[str, float]:
    table, amount = {}, 1.0
    for word in _WEIGHTS.split():
        if word[0].isdigit():
            amount = float(word)
        else:
            table[word] = amount
    return table


_WEIGHT_OF = _weight_table()


@lru_cache(maxsize=50_000)
def _parts(word: str) -> tuple[str, ...]:
    """The two known words that `word` is glued from, or nothing."""
    for cut in range(len(word) - 2, 1, -1):
        left, right = word[:cut], word[cut:]
        if all(part in _PARTS or stem(part) in _CONCEPT_OF for part in (left, right)):
            return left, right
    return ()


@lru_cache(maxsize=50_000)
def concepts(word: str) -> tuple[str, ...]:
    """What one word of a text or identifier stands for; empty for a stop word. Glued identifiers give their parts too."""
    found: dict[str, None] = {}
    for piece in _WORD.findall(word):
        low = piece.lower()
        if low in _STOP or (len(low) < 2 and not low.isdigit()):
            continue
        root = stem(low)
        if root in _CONCEPT_OF:
            found[_CONCEPT_OF[root]] = None
            continue
        found[root] = None
        if len(low) >= 5:
            for part in _parts(low):
                if part not in _STOP:
                    found[_CONCEPT_OF.get(stem(part), stem(part))] = None
    return tuple(found)


def terms(text: str) -> list[str]:
    """The concepts of a text in order, repeated as often as they occur."""
    return [concept for word in re.findall(r"[A-Za-z0-9_.'-]+", text) for concept in concepts(word)]


def stems(text: str) -> set[str]:
    """The words of a text as they were written, endings cut: what tells a word from its synonym."""
    return {stem(word.lower()) for word in _WORD.findall(text)}


def weight(term: str) -> float:
    """How much a term says, over 0 to 1: little for what stands everywhere."""
    return _WEIGHT_OF.get(term, 1.0)
