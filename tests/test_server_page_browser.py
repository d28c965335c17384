# SPDX-License-Identifier: Apache-2.0
"""The server's page in a real browser: Debian's chromium, driven by playwright.

    apt install chromium; pip install playwright

Without them these tests are skipped. `MESHWEN_SCREENSHOTS=FOLDER` keeps pictures of what they see.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopback import PausingEngine, on_loopback
from meshwen.engine.cache_stats import CacheStats
from meshwen.parallel.heads import head_layout
from meshwen.server.layout import Layout
from serving import PATIENCE, tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)

FOLDER = os.environ.get("MESHWEN_SCREENSHOTS")
MILLISECONDS = 1000 * PATIENCE
PHONE = {"width": 360, "height": 740}
ANSWER = """# Heads

Each device has **two** heads, see `layout`:

1. query heads
   - padded *or* not
2. key/value heads

| device | heads |
|:--|--:|
| 0 | 7 |
| 1 | 7 |

```python
def heads(n: int) -> list[int]:
    return [n // 8 for _ in range(8)]
```

> More in [the docs](https://example.org/docs).
"""
HOSTILE = (
    "<img src=x onerror=\"document.title='x'\"><script>document.title='x'</script>\n\n"
    "[a](javascript:document.title='x') [b](data:text/html,x) ![c](https://example.org/c.png)"
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
]
TOOL_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Opens the page of a server; afterwards no one else was asked, and nothing went wrong."""

    @contextmanager
    def open_page(script="Hello!", viewport=None, scheme="light", allowed=(), **options):
        with on_loopback(script, **options) as (url, server):
            context = browser.new_context(
                viewport=viewport or {"width": 1100, "height": 900}, color_scheme=scheme
            )
            context.set_default_timeout(MILLISECONDS)
            page, said, asked = context.new_page(), [], []
            page.on("console", lambda one: said.append(one.text))
            page.on("pageerror", lambda one: said.append(str(one)))
            page.on("request", lambda one: asked.append(one.url))
            page.goto(url)
            playwright.expect(page.locator("#model")).to_have_text("demo")
            try:
                yield page, server
            finally:
                context.close()
            assert [one for one in asked if not one.startswith(url)] == []
            assert [one for one in said if not any(words in one for words in allowed)] == []

    return open_page


def say(page, text):
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")


def expect_whole(page):
    playwright.expect(page.locator("#status")).to_have_text("The answer is whole.")


def shoot(page, name):
    if FOLDER is not None:
        page.screenshot(path=Path(FOLDER) / f"{name}.png", full_page=True)


def sent(page, act):
    """The request for an answer that an action sends."""
    with page.expect_request("**/v1/chat/completions") as found:
        act()
    return json.loads(found.value.post_data)


SHARED = {
    "layout": Layout("1x8", 1, head_layout(28, 4, 8), "bfloat16", "exact"),
    "cache_stats": lambda: CacheStats(13, 40, 1000, 640, 0, 0),
}


def test_an_answer_is_markdown_and_can_be_copied(opened):
    with opened(ANSWER, shared=SHARED) as (page, _):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        say(page, "Which heads?\nAll of them.")
        expect_whole(page)
        text = page.locator(".assistant .text")
        for selector, words in (
            ("h3", "Heads"),
            ("strong", "two"),
            ("ol > li > ul > li > em", "or"),
            ("table td.right >> nth=0", "7"),
            ("blockquote a", "the docs"),
            (".code .bar", "pythonCopy"),
        ):
            playwright.expect(text.locator(selector)).to_have_text(words)
        code = "def heads(n: int) -> list[int]:\n    return [n // 8 for _ in range(8)]"
        assert text.locator("pre").inner_text() == code
        page.get_by_role("button", name="Copy the code").click()
        playwright.expect(text.locator(".code button")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == code
        page.get_by_role("button", name="Copy the answer").click()
        playwright.expect(page.locator(".who button")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == ANSWER
        playwright.expect(page.locator(".user .said")).to_have_text("Which heads?\nAll of them.")
        shoot(page, "desktop")


def test_nothing_that_a_model_writes_becomes_a_part_of_the_page(opened):
    with opened(HOSTILE) as (page, _):
        say(page, HOSTILE)
        expect_whole(page)
        text = page.locator(".assistant .text")
        assert text.locator("img, script").count() == 0
        assert [one.get_attribute("href") for one in text.locator("a").all()] == [
            "https://example.org/c.png"
        ]
        assert "<img src=x onerror=" in text.inner_text()
        assert page.title() == "demo"


def test_the_browser_itself_refuses_to_make_elements_of_text(opened):
    with opened(allowed=("TrustedHTML", "Content Security Policy")) as (page, _):
        act = "document.body.innerHTML = '<b>x</b>'"
        with pytest.raises(playwright.Error, match="TrustedHTML"):
            page.evaluate(act)


def test_keys_send_stop_and_move_on(opened):
    engine = PausingEngine("one two three four five six seven", steps=4)
    with opened(engine) as (page, server):
        playwright.expect(page.locator("#message")).to_be_focused()
        page.keyboard.type("a")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("b")
        assert page.locator("#message").input_value() == "a\nb"
        page.keyboard.press("Enter")
        playwright.expect(page.locator(".assistant .text")).to_contain_text("one")
        playwright.expect(page.locator("#log")).to_have_attribute("aria-busy", "true")
        playwright.expect(page.locator("#send")).to_be_hidden()
        shoot(page, "streaming")
        page.keyboard.press("Escape")
        playwright.expect(page.locator("#status")).to_have_text("Stopped.")
        playwright.expect(page.locator(".note")).to_contain_text("stopped")
        playwright.expect(page.locator("#message")).to_be_focused()
        server.engine.go.set()
        order = []
        for _ in range(4):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.textContent"))
        assert order[:3] == ["Send", "Regenerate", "New conversation"]
        assert order[3].startswith("System message")


def test_the_stop_button_cancels_in_the_engine(opened):
    engine = PausingEngine("one two three four five six seven", steps=3)
    with opened(engine) as (page, server):
        say(page, "go")
        playwright.expect(page.locator(".assistant .text")).not_to_be_empty()
        page.locator("#stop").click()
        playwright.expect(page.locator("#status")).to_have_text("Stopped.")
        for _ in range(200):
            if not server.thread.running:
                break
            page.wait_for_timeout(50)
        server.engine.go.set()
        for _ in range(200):
            if server.engine.cancelled:
                break
            page.wait_for_timeout(50)
        assert server.engine.cancelled == [0]


def test_parameters_are_sent_as_they_were_given(opened):
    with opened() as (page, _):
        bare = sent(page, lambda: say(page, "Hi"))
        assert bare.keys() == {"model", "messages", "stream", "stream_options"}
        assert bare["messages"] == [{"role": "user", "content": "Hi"}]
        expect_whole(page)
        page.locator("#settings summary").click()
        for label, value in (
            ("System message", "Be brief."),
            ("Temperature", "0.5"),
            ("Top p", "0.9"),
            ("Most new tokens", "12"),
            ("Seed", "7"),
            ("Stop strings", "END\nSTOP"),
        ):
            page.get_by_label(label).fill(value)
        body = sent(page, lambda: say(page, "Again"))
        assert body["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Again"},
        ]
        assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 12,
            "seed": 7,
        }
        assert body["stop"] == ["END", "STOP"]
        expect_whole(page)
        shoot(page, "settings")
        page.get_by_label("Top p").fill("7")
        say(page, "No")
        playwright.expect(page.locator("#error")).to_contain_text("Top p:")
        playwright.expect(page.locator("#message")).to_have_value("No")


def test_an_answer_is_made_again_and_a_conversation_begins_anew(opened):
    with opened() as (page, _):
        say(page, "Hi")
        expect_whole(page)
        body = sent(page, lambda: page.get_by_role("button", name="Regenerate").click())
        assert body["messages"] == [{"role": "user", "content": "Hi"}]
        expect_whole(page)
        assert page.locator(".assistant").count() == 1
        page.get_by_role("button", name="New conversation").click()
        assert page.locator(".turn").count() == 0
        playwright.expect(page.locator("#empty")).to_be_visible()
        assert sent(page, lambda: say(page, "New"))["messages"] == [
            {"role": "user", "content": "New"}
        ]
        expect_whole(page)


def test_a_tool_call_is_a_block_that_takes_a_result(opened):
    def script(request, choice):
        sunny = "Sunny" in tokenizer().decode(request.prompt_tokens)
        return "It is sunny." if sunny else f"Let me look.\n{CALL}"

    with opened(script, template=TOOL_TEMPLATE) as (page, _):
        page.locator("#settings summary").click()
        page.get_by_label("Tools").fill(json.dumps(TOOLS))
        assert sent(page, lambda: say(page, "Weather?"))["tools"] == TOOLS
        expect_whole(page)
        call = page.locator(".call")
        playwright.expect(call.locator(".name")).to_have_text("Calls get_weather")
        assert json.loads(call.locator("pre").inner_text()) == {"city": "Oslo"}
        playwright.expect(page.locator(".assistant .text")).to_have_text("Let me look.")
        shoot(page, "tool-call")
        call.get_by_label("Result").fill("Sunny")
        body = sent(page, lambda: page.get_by_role("button", name="Send the results").click())
        _, called, result = body["messages"]
        assert result["role"] == "tool"
        assert result["content"] == "Sunny"
        assert result["tool_call_id"] == called["tool_calls"][0]["id"]
        playwright.expect(page.locator(".assistant .text").last).to_have_text("It is sunny.")


def test_an_error_is_shown_and_what_was_typed_comes_back(opened):
    with opened(allowed=("500",)) as (page, server):
        server.engine.failure = RuntimeError("x")
        say(page, "Hi")
        playwright.expect(page.locator("#error")).to_contain_text("The engine failed")
        playwright.expect(page.locator("#message")).to_have_value("Hi")
        assert page.locator(".turn").count() == 0
        shoot(page, "error")
        page.keyboard.press("Enter")
        expect_whole(page)
        playwright.expect(page.locator("#error")).to_be_hidden()


def test_a_key_is_asked_for_and_kept_for_this_tab_alone(browser):
    with on_loopback(api_key=("secret",)) as (url, _):
        page = browser.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.goto(url)
        playwright.expect(page.locator("#error")).to_contain_text("key")
        playwright.expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Tab")
        playwright.expect(page.locator("#model")).to_have_text("demo")
        say(page, "Hi")
        expect_whole(page)
        kept = "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]"
        assert page.evaluate(kept) == ['{"meshwen-key":"secret"}', "{}", ""]
        assert "secret" not in page.url
        page.reload()
        playwright.expect(page.locator("#model")).to_have_text("demo")
        page.close()


def test_the_engine_and_its_head_layout_are_shown(opened):
    with opened(shared=SHARED) as (page, _):
        numbers = page.locator("#numbers")
        playwright.expect(numbers).to_contain_text("33%")  # 13 of 40 blocks.
        playwright.expect(numbers).to_contain_text("64%")  # 640 of 1000 tokens.
        playwright.expect(page.locator("#about")).to_contain_text("exact numerics in bfloat16")
        devices = page.locator("#mesh svg")
        assert devices.count() == 8
        assert devices.nth(1).get_attribute("aria-label") == (
            "device 1: key/value heads 0; query heads 4, 5, 6"
        )
        assert devices.nth(1).locator("text").all_text_contents()[1:] == ["0", "4", "5", "6"]
        assert devices.nth(1).locator("rect.padding").count() == 1
        said = page.locator("#mesh-said")
        playwright.expect(said).to_contain_text("28 query heads and 4 key/value heads on 8 devices")
        playwright.expect(said).to_contain_text("4 query heads of the mesh are padding")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_fits_a_phone(opened, scheme):
    with opened(ANSWER, viewport=PHONE, scheme=scheme, shared=SHARED) as (page, _):
        page.locator("#settings summary").click()
        say(page, "a" * 200)
        expect_whole(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for button in page.locator("#composer button:visible").all():
            assert button.bounding_box()["height"] >= 36
        shoot(page, f"phone-{scheme}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(opened, scheme):
    with opened(ANSWER, scheme=scheme, shared=SHARED) as (page, _):
        say(page, "Hi")
        expect_whole(page)
        back = rgb(page, "body", "backgroundColor")
        for selector in ("body", ".soft", ".text a", ".bad", "#numbers dt", "button"):
            assert contrast(rgb(page, selector, "color"), back) >= 4.5, selector
        page.mouse.move(0, 0)
        colours = [rgb(page, "#send", name) for name in ("color", "backgroundColor")]
        assert contrast(*colours) >= 4.5
        bar = [rgb(page, ".code .bar", name) for name in ("color", "backgroundColor")]
        assert contrast(*bar) >= 4.5
        shoot(page, f"desktop-{scheme}")


def rgb(page, selector, name):
    text = page.locator(selector).first.evaluate(f"one => getComputedStyle(one).{name}")
    return [int(one) for one in re.findall(r"\d+", text)[:3]]


def contrast(one, other):
    """WCAG 2's ratio of two colours."""

    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# Markdown, and the HTML that CommonMark's or GitHub's rules make of it, within one block.
MARKDOWN = [
    ("# a *b*", "<h3>a <em>b</em></h3>"),
    ("a\nb", "<p>a<br>b</p>"),
    ("**a `b*` c**", "<p><strong>a <code>b*</code> c</strong></p>"),
    ("***a***", "<p><strong><em>a</em></strong></p>"),
    ("snake_case_name 2*3*4", "<p>snake_case_name 2*3*4</p>"),
    ("~~a~~ \\*b\\*", "<p><del>a</del> *b*</p>"),
    ("\\boxed{5} \\( x \\)", "<p>\\boxed{5} \\( x \\)</p>"),
    ("``a`b``", "<p><code>a`b</code></p>"),
    ("<b>a</b> &amp;", "<p>&lt;b&gt;a&lt;/b&gt; &amp;amp;</p>"),
    ("- a\n- b\n  - c\n\nd", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("a | b", "<p>a | b</p>"),
]


def test_markdown_is_read_as_others_read_it(opened):
    with opened() as (page, _):
        made = page.evaluate(
            """async (texts) => {
                const { show } = await import("/page/markdown.js");
                return texts.map((text) => {
                    const one = document.createElement("div");
                    show(one, text);
                    return one.innerHTML;
                });
            }""",
            [text for text, _ in MARKDOWN],
        )
        assert made == [expected for _, expected in MARKDOWN]


def test_a_text_is_shown_alike_however_it_comes(opened):
    with opened() as (page, _):
        whole, pieces = page.evaluate(
            """async (text) => {
                const { show } = await import("/page/markdown.js");
                const [whole, pieces] = [0, 1].map(() => document.createElement("div"));
                show(whole, text);
                for (let end = 1; end <= text.length; end++) show(pieces, text.slice(0, end));
                return [whole.innerHTML, pieces.innerHTML];
            }""",
            ANSWER,
        )
        assert whole == pieces
