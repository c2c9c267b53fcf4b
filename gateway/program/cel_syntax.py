"""CEL source to a small tree, with what is refused before anything runs: what would cost too much or has no meaning in JSON.

The grammar and the parser are celpy's. The tree is flattened (a literal sits under eight rules that do nothing), which makes an evaluation
about five times as fast and keeps the depth of the interpreter's recursion near the depth that an author sees.
"""

from collections.abc import Iterator

from celpy.celparser import CELParseError, CELParser
from celpy.evaluation import celstr
from lark import Token, Tree

from gateway.program.problems import nearest

MOST_CHARS = 4096
MOST_BRACKETS = 24  # inside one another
MOST_DEPTH = 64  # of the tree; `a + b + c` is three deep
MOST_MACROS = 2  # inside one another

MACROS = frozenset({"all", "exists", "exists_one", "map", "filter"})
METHODS = frozenset({"size", "contains", "startsWith", "endsWith", "matches"})
FUNCTIONS = frozenset({"size", "matches", "int", "double", "string", "bool", "has"})
PASS_THROUGH = frozenset({"expr", "conditionalor", "conditionaland", "relation", "addition", "multiplication", "unary", "member"})

Node = Tree[Token]
_PARSER = CELParser()


def parse(text: str) -> Node:
    """The tree. Raises ValueError with a sentence and, where there is one, the position."""
    if not text.strip():
        raise ValueError("is empty")
    if len(text) > MOST_CHARS:
        raise ValueError(f"has {len(text)} characters: at most {MOST_CHARS} are allowed")
    depth = 0
    for position, character in code(text):
        depth += (character in "([{") - (character in ")]}")
        if depth > MOST_BRACKETS:
            raise ValueError(f"has brackets more than {MOST_BRACKETS} deep, at character {position + 1}")
    try:
        tree = _PARSER.parse(text)
    except CELParseError as error:
        raise ValueError(_where(text, error.line, error.column)) from None
    for subtree in tree.iter_subtrees():
        subtree.children = [_inner(child) for child in subtree.children]
    tree = _inner(tree)  # type: ignore[assignment]
    _check_depth(tree)
    _check(tree, 0)
    return tree


def code(text: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """The characters of CEL source from `start` that are outside of strings, with their positions.

    Raises ValueError for a string that does not end, which the parser's regular expressions would search for in exponential time, and
    for comments and forms of strings that they read in another way than CEL's specification.
    """
    at = start
    while at < len(text):
        character = text[at]
        if character not in "\"'":
            if text.startswith("//", at):
                raise ValueError(f"has a comment at character {at + 1}: comments are not supported")
            yield at, character
            at += 1
            continue
        if text.startswith(character * 3, at):
            raise ValueError(f"has a triple-quoted string at character {at + 1}: write it in single quotes")
        is_raw = at > start and text[at - 1] in "rR" and not (at > start + 1 and (text[at - 2].isalnum() or text[at - 2] == "_"))
        end = at + 1
        while end < len(text) and text[end] not in (character, "\n"):
            if text[end] == "\\":
                if is_raw and text[end + 1 : end + 2] == character:
                    raise ValueError(f"has a raw string with a backslash before a quote, at character {end + 1}")
                end += 1
            end += 1
        if end >= len(text) or text[end] == "\n":
            raise ValueError(f"has a string that does not end, at character {at + 1}")
        at = end + 1


def references(tree: Node) -> frozenset[str]:
    """Dotted paths of all variables, as `steps.search.output.hits`, each up to its first index that is not a constant name."""
    return frozenset(".".join(path) for path in _references(tree, frozenset()))


def _where(text: str, line: int | None, column: int | None) -> str:
    if not line or not column or line < 0 or column < 0:
        return "is not complete: CEL expects more at its end"
    rest = text.splitlines()[line - 1][column - 1 :][:20]
    return f"is not CEL at line {line}, column {column}" + (f", at `{rest}`" if rest else "")


def _inner(child: Node | Token) -> Node | Token:
    if isinstance(child, Tree) and child.data in PASS_THROUGH and len(child.children) == 1 and isinstance(child.children[0], Tree):
        return child.children[0]
    return child


def _check_depth(tree: Node) -> None:
    depths: dict[int, int] = {}
    for subtree in tree.iter_subtrees():  # children before their parents
        depths[id(subtree)] = 1 + max((depths[id(child)] for child in subtree.children if isinstance(child, Tree)), default=0)
    if max(depths.values()) > MOST_DEPTH * 2:  # an operator takes two levels
        raise ValueError(f"nests more than {MOST_DEPTH} operations")


def _check(tree: Node, macros: int) -> None:
    if tree.data == "literal":
        token = tree.children[0]
        if isinstance(token, Token) and token.type in ("BYTES_LIT", "UINT_LIT"):
            raise ValueError(f"has `{token}`: bytes and unsigned numbers are not JSON")
        if isinstance(token, Token) and token.type == "INT_LIT" and not -(2**63) <= int(token, 0 if "x" in token else 10) < 2**63:
            raise ValueError(f"has `{token}`: beyond 64 bits")
    elif tree.data in ("dot_ident", "dot_ident_arg", "fieldinits") or (tree.data == "member_object" and not _is_primary(tree.children[0])):
        raise ValueError("has a form of CEL that is for protobuf messages")
    elif tree.data == "ident_arg":
        _known(str(tree.children[0]), FUNCTIONS, len(_arguments(tree)), 1 + (tree.children[0] == "matches"))
        if tree.children[0] == "has" and _arguments(tree)[0].data != "member_dot":
            raise ValueError("has `has(...)` of something that is not a field, as in `has(input.question)`")
    elif tree.data == "member_dot_arg":
        name = str(tree.children[1])
        arguments = _arguments(tree)
        _known(name, MACROS | METHODS, len(arguments), 2 if name in MACROS else int(name != "size"))
        if name in MACROS:
            if _path(arguments[0]) is None or len(_path(arguments[0]) or ()) != 1:
                raise ValueError(f"has `{name}(...)` whose first argument is no name, as in `hits.{name}(hit, hit.id)`")
            macros += 1
            if macros > MOST_MACROS:
                raise ValueError(f"has {name}(...) more than {MOST_MACROS} deep in others of its kind")
    for child in tree.children:
        if isinstance(child, Tree):
            _check(child, macros)


def _is_primary(child: Node | Token) -> bool:
    return isinstance(child, Tree) and child.data == "primary"


def _known(name: str, names: frozenset[str], got: int, wants: int) -> None:
    if name not in names:
        raise ValueError(f"uses `{name}(...)`, which there is not{nearest(name, names)}")
    if got != wants:
        raise ValueError(f"uses `{name}(...)` with {got} arguments; it takes {wants}")


def _arguments(tree: Node) -> list[Node]:
    last = tree.children[-1]
    if isinstance(last, Tree) and last.data == "exprlist":
        return [child for child in last.children if isinstance(child, Tree)]
    return []


def _path(tree: Node) -> tuple[str, ...] | None:
    """The names of `a.b["c"]`, None for anything else."""
    first = tree.children[0] if tree.children else None
    if tree.data == "primary" and isinstance(first, Tree) and first.data == "ident":
        return (str(first.children[0]),)
    if tree.data == "member_dot" and isinstance(first, Tree) and (path := _path(first)):
        return (*path, str(tree.children[1]))
    if tree.data == "member_index" and isinstance(first, Tree) and (path := _path(first)):
        name = _constant_name(tree.children[1])
        return (*path, name) if name is not None else None
    return None


def _constant_name(tree: Node | Token) -> str | None:
    while isinstance(tree, Tree) and tree.data in ("primary", "literal"):
        tree = tree.children[0]
    return str(celstr(tree)) if isinstance(tree, Token) and tree.type == "STRING_LIT" else None


def _references(tree: Node, bound: frozenset[str]) -> Iterator[tuple[str, ...]]:
    path = _path(tree)
    if path is not None:
        if path[0] not in bound:
            yield path
        return
    children = [child for child in tree.children if isinstance(child, Tree)]
    if tree.data == "member_dot_arg" and tree.children[1] in MACROS:
        yield from _references(children[0], bound)
        item, body = _arguments(tree)
        yield from _references(body, bound | set(_path(item) or ()))
        return
    for child in children:
        yield from _references(child, bound)
