"""`builtin:docstrings`: questions about the standard library, answered by its own docstrings.

The names are a fixed list rather than whatever `dir()` finds, so that the split is the same on
every Python and only modules that are safe to import (no window, no print, no browser) are ever
touched. A name that this Python lacks, or whose docstring does not open with a sentence, is left
out. HELD_OUT never appears in the training rows: those questions measure what was learned.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from fastsft.errors import UserError

# Where a name lives (a module, or a class in a module) -> the names to ask about.
NAMES: dict[str, str] = {
    "builtins": "abs all any ascii bin bool callable chr classmethod compile delattr dir "
    "divmod enumerate eval exec filter float format frozenset getattr globals hasattr hash hex id "
    "input int isinstance issubclass iter len list locals map max min next object oct "
    "open ord pow print range repr reversed round set setattr sorted staticmethod "
    "str sum super tuple type vars zip Exception ValueError TypeError KeyError IndexError OSError "
    "RuntimeError StopIteration ImportError NameError",
    "builtins.str": "capitalize center count encode endswith expandtabs find format join ljust "
    "lower lstrip partition removeprefix replace rstrip split splitlines startswith strip "
    "swapcase title translate upper zfill",
    "builtins.bytes": "decode fromhex hex",
    "builtins.list": "append clear copy count extend index insert pop remove sort",
    "builtins.dict": "fromkeys get pop popitem setdefault",
    "builtins.set": "add difference discard intersection isdisjoint issubset union update",
    "builtins.int": "bit_length from_bytes to_bytes",
    "argparse": "ArgumentParser Namespace",
    "ast": "parse literal_eval dump walk get_docstring",
    "asyncio": "run sleep gather wait create_task Queue Lock shield",
    "base64": "b64encode b64decode urlsafe_b64encode",
    "bisect": "bisect_left insort_left",
    "calendar": "isleap leapdays monthrange weekday",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "collections.Counter": "most_common elements",
    "collections.deque": "append appendleft extendleft popleft rotate",
    "contextlib": "contextmanager closing suppress redirect_stdout ExitStack nullcontext",
    "copy": "copy deepcopy",
    "csv": "DictReader DictWriter",
    "dataclasses": "dataclass fields asdict astuple replace is_dataclass make_dataclass",
    "datetime": "timedelta timezone",
    "datetime.date": "today weekday isoformat strftime toordinal",
    "datetime.datetime": "now fromtimestamp strptime combine timestamp",
    "decimal": "Decimal getcontext localcontext",
    "difflib": "SequenceMatcher get_close_matches unified_diff ndiff Differ",
    "enum": "Enum auto unique",
    "fnmatch": "fnmatch fnmatchcase filter translate",
    "functools": "lru_cache cache partial reduce wraps total_ordering singledispatch",
    "glob": "glob iglob escape",
    "gzip": "open compress decompress",
    "heapq": "heappush heappop heapify merge nlargest nsmallest",
    "html": "escape unescape",
    "importlib": "reload invalidate_caches",
    "inspect": "signature getsource getdoc getmembers isclass ismodule stack cleandoc",
    "io": "BytesIO StringIO TextIOWrapper",
    "itertools": "accumulate chain combinations compress count cycle dropwhile filterfalse groupby "
    "islice pairwise permutations product repeat starmap takewhile tee zip_longest",
    "json": "dump dumps load loads JSONEncoder JSONDecoder",
    "logging": "basicConfig getLogger error exception disable Logger Formatter shutdown",
    "math": "acos ceil comb copysign cos degrees dist exp fabs floor fmod fsum gcd hypot "
    "isclose isfinite isnan isqrt lcm log log10 log2 perm prod radians sin sqrt tan trunc",
    "operator": "attrgetter itemgetter methodcaller contains",
    "os": "access chdir chmod cpu_count getcwd getenv getpid kill listdir makedirs mkdir remove "
    "rename replace rmdir stat symlink system truncate unlink urandom walk",
    "os.path": "abspath basename dirname exists expanduser getmtime getsize isabs isdir isfile "
    "islink join normpath realpath relpath split splitext",
    "pathlib": "Path PurePath",
    "pathlib.Path": "absolute cwd exists expanduser glob home is_dir is_file mkdir read_bytes "
    "read_text rename resolve rmdir touch unlink write_text",
    "pickle": "dump dumps load loads",
    "platform": "machine node platform processor python_version release system",
    "pprint": "pprint pformat isreadable",
    "queue": "Queue PriorityQueue LifoQueue",
    "queue.Queue": "get put qsize task_done join",
    "random": "choice choices gauss randint random randrange sample seed shuffle uniform",
    "re": "compile escape findall finditer fullmatch match search split sub subn purge",
    "secrets": "token_bytes token_hex token_urlsafe randbelow",
    "shelve": "open",
    "shlex": "split quote join",
    "shutil": "copy copyfile copyfileobj copytree disk_usage make_archive move rmtree "
    "unpack_archive which",
    "socket": "create_connection getfqdn gethostbyname gethostname",
    "sqlite3": "connect Connection Cursor complete_statement",
    "statistics": "mean median mode stdev variance pvariance fmean harmonic_mean multimode "
    "quantiles correlation covariance NormalDist",
    "string": "Template capwords",
    "struct": "pack unpack calcsize",
    "subprocess": "Popen run check_output getoutput TimeoutExpired",
    "subprocess.Popen": "communicate wait poll terminate kill",
    "sys": "exit getrecursionlimit getrefcount getsizeof exc_info settrace",
    "tempfile": "NamedTemporaryFile TemporaryDirectory mkdtemp gettempdir",
    "textwrap": "dedent fill indent shorten wrap",
    "threading": "Thread Lock Event Timer active_count enumerate main_thread",
    "threading.Thread": "start run join is_alive",
    "time": "asctime ctime localtime monotonic perf_counter process_time sleep strftime "
    "strptime time time_ns",
    "timeit": "timeit repeat Timer",
    "traceback": "format_exc print_stack extract_tb",
    "types": "SimpleNamespace coroutine",
    "typing": "cast get_type_hints NamedTuple Protocol overload final ",
    "unittest": "TestCase TestSuite skip",
    "urllib.parse": "urlparse urljoin urlencode unquote parse_qs urlunparse",
    "urllib.request": "urlopen urlretrieve",
    "uuid": "UUID uuid1 uuid4 getnode",
    "warnings": "warn simplefilter catch_warnings",
    "xml.etree.ElementTree": "parse fromstring tostring indent",
    "zipfile": "ZipFile is_zipfile",
    "zlib": "compress decompress crc32 adler32",
}

HELD_OUT = (
    "asyncio.gather", "calendar.isleap", "dict.get", "glob.glob", "heapq.heappush", "isinstance",
    "itertools.permutations", "json.dumps", "len", "list.append", "math.gcd", "os.getcwd",
    "os.path.basename", "re.compile", "shutil.rmtree", "sorted", "statistics.mean", "str.join",
    "textwrap.wrap", "time.sleep",
)  # fmt: skip

QUESTIONS = (
    "What does `{name}` do?",
    "What is `{name}` for?",
    "Explain `{name}`.",
    "Tell me about `{name}`.",
    "How would you describe `{name}`?",
    "I keep seeing `{name}`. What is it?",
    "Python: `{name}`?",
    "Give me the documentation of `{name}`.",
)

LONGEST = 110  # characters; a longer opening sentence is more than three million parameters keep
ROLE = re.compile(r":[a-z:]+:`([^`]+)`")
SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)(\s*-+>.*)?", re.DOTALL)


def rows(split: str = "train") -> Iterator[dict[str, Any]]:
    """Chat rows of one split: `train` asks each name in three ways, `held_out` once, plainly."""
    if split not in ("train", "held_out"):
        raise UserError(f"builtin:docstrings has no split {split!r}; use 'train' or 'held_out'")
    answers = documented()
    if sys.flags.optimize >= 2:
        raise UserError(
            f"builtin:docstrings: Python runs with optimization level {sys.flags.optimize}, which "
            "removes docstrings; run without -OO and without PYTHONOPTIMIZE=2"
        )
    for position, (name, answer) in enumerate(answers.items()):
        if (name in HELD_OUT) != (split == "held_out"):
            continue
        # One asked plainly, two that walk through the other phrasings.
        others = QUESTIONS[1:]
        asked = [QUESTIONS[0]]
        if split == "train":
            asked += [others[(2 * position + k) % len(others)] for k in (0, 1)]
        for question in asked:
            yield {
                "messages": [
                    {"role": "user", "content": question.format(name=name)},
                    {"role": "assistant", "content": answer},
                ]
            }


@cache
def documented() -> dict[str, str]:
    """Every listed name this Python has -> the sentence its documentation opens with."""
    found: dict[str, str] = {}
    for home, names in NAMES.items():
        owner = resolve(home)
        for name in names.split() if owner is not None else ():
            sentence = opening(getattr(owner, name, None))
            if sentence:
                found[f"{home}.{name}".removeprefix("builtins.")] = sentence
    return found


def resolve(home: str) -> Any:
    """The module or class called `home`, or None where this Python was built without it."""
    parts = home.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            owner = getattr(owner, part, None)
        return owner
    return None


def opening(thing: Any) -> str:
    """The first sentence of a docstring on one line, or "" if it does not open with a sentence."""
    doc = getattr(thing, "__doc__", None)
    if not callable(thing) or not isinstance(doc, str):
        return ""
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        if SIGNATURE.fullmatch(paragraph.strip()):
            continue  # C functions without a text signature open with "f(x, y) -> value"
        text = ROLE.sub(r"`\1`", " ".join(paragraph.split())).replace("``", "`")
        end = re.search(r"(?<![.(]\w)(?<!vs)\.(?= [A-Z`(]|$)", text)
        text = text[: end.end()] if end else text.rstrip(":;, ") + "."
        plain = text[0].isupper() and " " in text and "->" not in text and ">>>" not in text
        return text if plain and len(text) <= LONGEST else ""
    return ""


EMPTY_WORDS = frozenset(
    "a an and are as at be by for from if in is it of on or that the to with".split()
)


def answered(answer: str | None, reference: str) -> bool:
    """Whether the form was learned: a sentence of documentation, on the subject, that ended by itself.

    `answer` is None when generation ran into its token limit. One sentence: on one line, three words or
    more, from a capital to a full stop, no phrase said twice. On the subject: a third of the reference's
    words that carry meaning occur in it. Whether it is also right is another question: see `correct`.
    """
    if answer is None or not re.fullmatch(r"[A-Z`][^\n]*\.", answer.strip()):
        return False
    said = re.findall(r"\w+", answer.lower())
    triples = list(zip(said, said[1:], said[2:], strict=False))
    if len(said) < 3 or len(set(triples)) < 0.8 * len(triples):
        return False
    theirs = _meaning(reference)
    return 3 * len(_meaning(answer) & theirs) >= len(theirs)


def correct(answer: str | None, reference: str) -> bool:
    """Whether an answer also says the same: answered, and two thirds of either's words are the other's.

    The answer to another listed question passes about once in 3000.
    """
    if answer is None or not answered(answer, reference):
        return False
    mine, theirs = _meaning(answer), _meaning(reference)
    shared = len(mine & theirs)
    return 3 * shared >= 2 * len(theirs) and 3 * shared >= 2 * len(mine)


def _meaning(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - EMPTY_WORDS
