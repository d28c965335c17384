# SPDX-License-Identifier: Apache-2.0
"""Grammars: which tokens may come, against lists of all texts; what is refused; what is kept."""

import itertools
import json
import subprocess
import sys
import threading
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwen import demo
from meshwen.engine import compiled_grammars
from meshwen.engine.compiled_grammars import Grammars
from meshwen.engine.grammar import (
    LONGEST_GRAMMAR,
    GrammarError,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from meshwen.engine.sampling_params import SamplingParams
from meshwen.errors import MeshwenError
from meshwen.tokenizer.tokenizer import Tokenizer

VOCAB, PADDED = 1024, 1030
EOS = (1021, 1023)  # <|endoftext|>, <|im_end|>


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(demo.path())


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), frozenset(EOS), PADDED)


def constraint(grammar: str):
    return grammars().compiled(grammar).constraint()


def allowed(one, drafts=()) -> list[list[int]]:
    """The tokens that may come next, and after each draft."""
    rows = np.zeros((1 + len(drafts), PADDED + 2), bool)
    one.forbid(rows, drafts)
    return [np.flatnonzero(~row).tolist() for row in rows]


def expected(texts: list[bytes], begun: bytes) -> list[int]:
    """By trying each token: what leads on to one of all texts that there are."""
    found = []
    for token in range(VOCAB):
        written = tokenizer().token_bytes(token)
        if written and any(text.startswith(begun + written) for text in texts):
            found.append(token)
    return sorted([*found, *(EOS if begun in texts else ())])


def encoded(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def follows(grammar: str, text: str) -> bool:
    """Whether a text's tokens may come, and then the end."""
    one, tokens = constraint(grammar), encoded(text)
    if one.fitting(tokens) < len(tokens):
        return False
    for token in tokens:
        one.push(token)
    return EOS[0] in allowed(one)[0]


TREE = "\N{CHRISTMAS TREE}"
WORDS = ["weather", "weird", "we", f"e\u0301 {TREE}", "<|im_end|>", '"/\\\n', "a" * 300]
NUMBERS = [1, 10, 105, "a b", f"\u00e9{TREE}", True, None, [1, 10]]
LANGUAGES = {
    "choices": (choice_grammar(WORDS), WORDS),
    "one": (choice_grammar(["answer"]), ["answer"]),
    "none or some": (choice_grammar(["", "x"]), ["", "x"]),
    "regex": (
        regex_grammar(r"^(?:fo|foo)[ab/]{1,2}[0-3]?$"),
        [
            start + "".join(middle) + end
            for start in ("fo", "foo")
            for n in (1, 2)
            for middle in itertools.product("ab/", repeat=n)
            for end in ("", *"0123")
        ],
    ),
    "JSON": (
        json_schema_grammar({"enum": NUMBERS[:-1]}),
        [json.dumps(one, ensure_ascii=False) for one in NUMBERS[:-1]],
    ),
    "Lark": (lark_grammar('start: "a" b b\nb: "x" | "yy"'), ["axx", "axyy", "ayyx", "ayyyy"]),
    "GBNF": (lark_grammar('root ::= "a" b b\nb ::= "x" | "yy"'), ["axx", "axyy", "ayyx", "ayyyy"]),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_token_may_come_where_it_leads_on_to_a_text_of_the_grammar(name):
    grammar, texts = LANGUAGES[name]
    whole = [text.encode() for text in texts]
    rng = np.random.default_rng(0)
    for _ in range(6):
        one, begun = constraint(grammar), b""
        while True:
            (found,) = allowed(one)
            assert found == expected(whole, begun)
            going_on = [token for token in found if token not in EOS]
            if not going_on:
                break
            token = int(rng.choice(going_on))
            one.push(token)
            begun += tokenizer().token_bytes(token)
        assert begun in whole


def test_where_a_grammar_is_complete_an_end_of_text_token_may_come_and_then_only_such():
    one = constraint(regex_grammar("a+"))
    one.push(*encoded("a"))
    assert set(EOS) < set(allowed(one)[0])
    one.push(EOS[0])
    assert allowed(one) == [list(EOS)]
    one.push(EOS[1])
    assert allowed(one) == [list(EOS)]
    assert one.fitting(encoded("a")) == 0
    done = constraint(choice_grammar(["a"]))
    done.push(*encoded("a"))
    assert allowed(done) == [list(EOS)]


@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
@settings(max_examples=25, deadline=None)
def test_what_may_come_after_a_draft_is_what_may_come_after_the_token(seed, begun):
    rng = np.random.default_rng(seed)
    grammar, texts = LANGUAGES[("choices", "JSON", "Lark")[seed % 3]]
    one, text = constraint(grammar), encoded(str(rng.choice(texts)))
    for token in text[:begun]:
        one.push(token)
    before = allowed(one)
    drafts = [*text[begun:], *map(int, rng.integers(0, PADDED, 2))]
    drafts[int(rng.integers(len(drafts)))] = int(rng.integers(0, VOCAB))
    count = one.fitting(drafts)
    rows = allowed(one, drafts[:count])
    assert allowed(one) == before  # Drafts leave nothing behind.
    assert rows[0] == before[0]
    for token, row in zip(drafts[:count], rows[1:], strict=True):
        assert token in allowed(one)[0]
        assert token not in EOS
        one.push(token)
        assert allowed(one)[0] == row
    if count < len(drafts) and drafts[count] not in EOS:
        assert drafts[count] not in rows[-1]


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/words"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"words": {"type": "array", "items": {"type": "string"}, "maxItems": 2}},
}


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ('{"a":1}', True),
        ('{"a": 1, "b": ["x", "y"]}', True),
        ('{\n  "a": 1,\n  "b": [\n    "x"\n  ]\n}', True),
        ('{"a": 1, "b": ["x", "y", "z"]}', False),
        ('{"b": [], "a": 1}', False),
        ('{"a": 1.5}', False),
        ('{"a": 1}{', False),
        ('{"a": 1', False),
        ('{"a":  1}', False),
        ("{" + "\n" + 24 * " " + '"a": 1}', True),
        ("{" + "\n" + 25 * " " + '"a": 1}', False),
        ("{\n" + 8 * "\t" + '"a": 1}', True),
        ("{\n" + 9 * "\t" + '"a": 1}', False),
        ('{\n\n"a": 1}', False),
        (' {"a": 1}', False),
    ],
)
def test_json_follows_its_schema_with_blanks_as_people_write_them_and_no_more(text, ok):
    assert follows(json_schema_grammar(SCHEMA), text) == ok
    assert follows(json_schema_grammar(json.dumps(SCHEMA)), text) == ok


def test_a_schema_cannot_have_its_own_blanks_or_be_taken_lightly():
    lenient = {**SCHEMA, "x-guidance": {"whitespace_flexible": True}}
    assert not follows(json_schema_grammar(lenient), '{"a":   1}')
    with pytest.raises(GrammarError, match="not"):
        constraint(json_schema_grammar({"not": {}, "x-guidance": {"lenient": True}}))


def test_any_object_is_one_and_nothing_else_is():
    grammar = json_object_grammar()
    assert follows(grammar, '{"x": [1, {"y": null}]}')
    assert not follows(grammar, "[1]")
    assert follows(json_schema_grammar(True), "[1]")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: json_schema_grammar({"not": {}}), "Unimplemented"),
        (lambda: json_schema_grammar({"oneOf": [{}, {"minLength": 1}]}), "oneOf"),
        (lambda: json_schema_grammar({"type": "string", "format": "password"}), "password"),
        (lambda: json_schema_grammar({"$ref": "https://x.org/y"}), "x.org"),
        (lambda: json_schema_grammar({"$ref": "#"}), "follows"),
        (lambda: json_schema_grammar({"type": "string", "pattern": "(?=a)"}), "look"),
        (lambda: json_schema_grammar({"type": "word"}), "word"),
        (lambda: json_schema_grammar(False), "Unsatisfiable"),
        (lambda: json_schema_grammar("{"), "JSON"),
        (lambda: json_schema_grammar("[" * 100_000), "JSON"),
        (lambda: json_schema_grammar("3"), "object"),
        (lambda: json_schema_grammar({"a": float("nan")}), "JSON"),
        (lambda: json_schema_grammar({"a": "\ud800"}), "Unicode"),
        (lambda: regex_grammar("("), "unclosed"),
        (lambda: regex_grammar("a(?=b)"), "look"),
        (lambda: regex_grammar(r"(a)\1"), "backreferences"),
        (lambda: regex_grammar("a" * 70_000), "70000"),
        (lambda: regex_grammar(3), "text"),
        (lambda: choice_grammar([]), "choices"),
        (lambda: choice_grammar("ab"), "choices"),
        (lambda: choice_grammar(["a", 3]), "text"),
        (lambda: choice_grammar(["a"] * 5000), "5000"),
        (lambda: lark_grammar("start: b"), "b"),
        (lambda: lark_grammar('start: a\na: a "x"'), "follows"),
        (lambda: lark_grammar("root ::= ("), "GBNF"),
        (lambda: lark_grammar("root ::= " + "(" * 50_000), "GBNF"),
        (lambda: "start: " + "x" * LONGEST_GRAMMAR, "characters"),
        (lambda: "no grammar", "xpected"),
    ],
)
def test_what_no_answer_can_be_held_to_is_refused_in_one_line(make, word):
    with pytest.raises(GrammarError) as caught:
        constraint(make())
    assert word in caught.value.reason
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def nested(levels: int):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_may_be_deep_and_no_deeper():
    assert follows(json_schema_grammar(nested(50)), "[" * 50 + '"x"' + "]" * 50)
    for levels in (70, 20_000):
        with pytest.raises(GrammarError, match="levels"):
            json_schema_grammar(nested(levels))


HOSTILE = {
    "optional properties": lambda: json_schema_grammar(
        {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}
    ),
    "enum": lambda: json_schema_grammar({"enum": [f"{i:09d}" for i in range(60_000)]}),
    "long": lambda: json_schema_grammar({"type": "string", "maxLength": 10**9}),
    "powers": lambda: regex_grammar("((a{1,1000}b){1,1000}c){1,1000}"),
    "backtracking": lambda: regex_grammar("(((a*)*)*b|(a|a)*)*c"),
    "states": lambda: regex_grammar("(.*a.{12}){3}.*b.{15}c"),
    "and": lambda: "start: A\nA: /(.*x.{10})/ & /(.*y.{11})/ & ~/(.*z.{12})/",
    "left": lambda: 'start: a\na: a a | a a a | "x" | ""',
    "repeated": lambda: 'start: a{1,9999}\na: b{1,9999}\nb: c{1,9999}\nc: "x" | "y"',
    "forced": lambda: '%llguidance {"no_forcing": false}\nstart: "' + "ab" * 30_000 + '"',
    "twins": lambda: regex_grammar("(a|b)*a(a|b){30}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_gives_tokens_or_fails_and_does_not_hang(name):
    done = threading.Event()

    def walk() -> None:
        rng = np.random.default_rng(0)
        try:
            one = constraint(HOSTILE[name]())
        except GrammarError:
            done.set()
            return
        for _ in range(20):
            (found,) = allowed(one)
            assert bool(found) == (one.failure is None)
            if not found:
                break
            one.push(int(rng.choice(found)))
        done.set()

    thread = threading.Thread(target=walk, daemon=True)
    thread.start()
    assert done.wait(60)


def test_a_step_that_is_too_much_lets_nothing_come_and_says_why(monkeypatch):
    import llguidance

    limits = llguidance.LLParserLimits

    def small(**given):
        return limits(**given, step_max_items=20, max_items_in_row=20)

    monkeypatch.setattr(llguidance, "LLParserLimits", small)
    rules = "".join(f'\nr{i}: "a" "b" "c{i}"' for i in range(30))
    grammar = 'start: "x" "y" (' + " | ".join(f"r{i}" for i in range(30)) + ")" + rules
    one = Grammars(tokenizer(), frozenset(EOS), PADDED).compiled(grammar).constraint()
    assert one.failure is None
    one.push(*encoded("x"))
    assert allowed(one) == [[]]
    assert "items" in one.failure
    assert one.fitting(encoded("a")) == 0


def test_grammars_used_last_are_kept_and_others_are_not(monkeypatch):
    monkeypatch.setattr(compiled_grammars, "_MOST_KEPT", 2)
    kept = Grammars(tokenizer(), frozenset(EOS), PADDED)
    first = kept.compiled("start: /a/")
    kept.compiled("start: /b/")
    assert kept.compiled("start: /a/") is first
    kept.compiled("start: /c/")  # In the place of b.
    assert kept.compiled("start: /a/") is first
    assert len(kept._kept) == 2


def test_answers_of_one_grammar_are_apart():
    one, other = constraint(choice_grammar(["ab", "cd"])), constraint(choice_grammar(["ab", "cd"]))
    before = allowed(other)
    one.push(*encoded("a"))
    assert allowed(other) == before


def test_a_model_without_tokenizer_or_end_has_no_grammars(monkeypatch):
    with pytest.raises(MeshwenError, match="tokenizer"):
        Grammars(None, frozenset(EOS), PADDED).compiled("start: /a/")
    with pytest.raises(MeshwenError, match="end-of-text"):
        Grammars(tokenizer(), frozenset(), PADDED).compiled("start: /a/")


def test_an_installation_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (
        lambda: Grammars(tokenizer(), frozenset(EOS), PADDED).compiled("start: /a/"),
        lambda: regex_grammar("a"),
    ):
        with pytest.raises(MeshwenError, match=r"llguidance: pip install .*serve"):
            make()


def test_the_library_is_not_imported_before_a_grammar_is_used():
    modules = "meshwen.engine.engine, meshwen.engine.grammar, meshwen.server.structured"
    code = f"import sys, {modules}; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("value", ["", 3, "\ud800", {"type": "object"}])
def test_a_grammar_is_text(value):
    with pytest.raises(MeshwenError, match=r"^grammar must be a grammar's text, not "):
        SamplingParams(grammar=value)
