"""The labeling page in a real browser, by keys, mouse, finger and with things that go wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.label_load import served as killable
from reward_server.labeling.log import FILE, read_events
from reward_server.labeling.people import People
from reward_server.schema import Message
from tests.browser import CHROMIUM, Browser, browser
from tests.labeling_pages import Served, ranking, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]
READY = (
    "document.querySelector('#pace')?.textContent && document.querySelector('.output, textarea')"
    " && !document.querySelector('main').inert"
)
PRESSED = "[...document.querySelectorAll('.ranks [aria-pressed=true]')].map(one => one.textContent)"
SAVED = "document.querySelector('#saving').textContent === 'Saved'"
HOSTILE = {
    "script": "<script>window.hacked = 1</script>",
    "svg": "<svg onload='window.hacked = 1'><img src=x onerror='window.hacked = 1'>",
    "link": "[press](javascript:window.hacked=1) <a href='javascript:window.hacked=1'>here</a> ![x](https://a.example/x)",
    "code": "```html\n<script>window.hacked = 1</script>\n```\n- <b onmouseover='window.hacked = 1'>one</b>\n",
    "style": "</div></main><style>body { display: none }</style><iframe srcdoc='<script>top.hacked=1</script>'>",
    "template": "{{constructor.constructor('window.hacked=1')()}} ${window.hacked=1} <%= 1 %>",
    "bidi": "pay \u202e001\u202c now \u2066x\u2069 \u061c\u200f",
    "control": "a\u0007b\u0008c\x1b[2Jd\u0000e\u007f\u0085 \ufeff\u200b",
    "combining": "Z" + "\u0301\u0489" * 400,
}

# Texts whose contrast with what is behind them is below WCAG's AA for small letters.
CONTRAST = """(() => {
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parts_of_light = [0.2126, 0.7152, 0.0722];
  const light = color => parts_of_light.reduce((sum, part, k) => sum + part * linear(color[k] / 255), 0);
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const behind = one => {
    const color = one ? parts(getComputedStyle(one).backgroundColor) : [255, 255, 255];
    return color[3] === 0 ? behind(one.parentElement) : color;
  };
  const words = one => [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  return [...document.querySelectorAll('body *')]
    .filter(one => words(one) && one.checkVisibility() && !one.closest('[disabled]'))
    .map(one => { const [a, b] = [light(parts(getComputedStyle(one).color)), light(behind(one))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 80)]; })
    .filter(([ratio]) => ratio < 4.5);
})()"""


@pytest.fixture
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, [ranking("one"), ranking("two"), ranking("three")], quality=False, flags="") as served:
        yield served


def enter(tab: Browser, page: Served, name: str = "Anna", **window: Any) -> None:
    tab.open(f"{page.url}/#{page.tokens[name]}", **window)
    tab.wait(READY)


def finish(tab: Browser, *keys: str) -> None:
    """Rank an item and wait for the next."""
    done = tab.run("document.querySelector('#pace').textContent.split(' ')[0]")
    tab.press(*keys, "Enter")
    tab.wait(f"document.querySelector('#pace').textContent.startsWith('{int(done) + 1} of')")
    tab.wait(f"{READY} || document.querySelector('.alone')")


def answers(page: Served, kind: str = "submitted") -> list[Any]:
    return [event["answer"]["ranks"] for event in page.events(kind)]


def test_two_pages_by_keys_alone_and_nothing_from_elsewhere(tab: Browser, tmp_path: Path):
    with serving(tmp_path, [ranking("one"), ranking("two")]) as page:
        enter(tab, page)
        assert tab.run("location.href") == f"{page.url}/"
        assert tab.run("document.cookie + JSON.stringify(localStorage)") == "{}"
        tab.press("6", "q", "ArrowLeft", "q", "Q", "ArrowRight", "5", "2", "1")
        tab.press("Enter")
        finish(tab, "1", "2", "2", "4")
        (answer,) = [event["answer"] for event in page.events("submitted")]
        assert answer["ranks"] == [1, 2, 2, 4]
        assert [rating["quality"] for rating in answer["ratings"]] == [6, 5, 2, 1]
        assert [rating["flags"] for rating in answer["ratings"]] == [[], ["instruction"], [], []]
        assert page.events("submitted")[0]["seconds"] > 0
    assert tab.errors == []
    assert {url.split("/")[2] for url in tab.requests} == {page.url.split("/")[2]}


def test_enter_goes_to_what_is_missing_and_keys_move_and_clear(tab: Browser, page: Served):
    enter(tab, page)
    tab.press("c", "1", "0", "Enter")
    assert tab.run("document.querySelector('.now .letter').textContent") == "A"
    assert page.events("submitted") == []
    tab.press("2", "9", "1", "3", "b", "Backspace", "4")
    finish(tab)
    assert answers(page) == [[2, 4, 1, 3]]


def test_undo_goes_back_change_by_change_and_then_to_the_answer_before(tab: Browser, page: Served):
    enter(tab, page)
    finish(tab, "1", "2", "3", "4")
    tab.press("4", "3", "u", "1")
    tab.wait(SAVED)
    tab.press("u", "u")
    assert tab.run("document.querySelectorAll('.board .column:first-child .letter').length") == 4
    tab.press("u")
    tab.wait("document.querySelector('#pace').textContent.startsWith('0 of')")
    tab.press("a", "4")
    finish(tab)
    tab.wait(SAVED)
    assert answers(page) == [[1, 2, 3, 4], [4, 2, 3, 4]]
    assert len(page.events("undone")) == 1


def test_letters_are_dragged_into_ranks_by_mouse_and_by_finger(tab: Browser, page: Served):
    enter(tab, page)
    tab.drag(".output:nth-child(1) > header .letter", "[data-drop='2']")
    tab.drag(".output:nth-child(2) > header .letter", "[data-drop='1']")
    tab.swipe(".board .column:first-child .letter:first-child", "[data-drop='2']")
    tab.swipe(".output:nth-child(4) > header .letter", "[data-drop='4']")
    tab.swipe("[data-drop='4'] .letter", "[data-drop='3']")
    finish(tab)
    assert answers(page) == [[2, 1, 2, 3]]


def test_what_was_done_without_a_network_is_kept_and_sent_in_order(tab: Browser, page: Served):
    enter(tab, page)
    tab.press("1")
    tab.wait(SAVED)
    tab.offline(True)
    tab.press("2")
    said = "document.querySelector('#offline').textContent"
    tab.wait(f"{said}.startsWith('Not saved: offline, 1 waiting')")
    tab.press("3", "4", "Enter")
    tab.wait(f"/^Not saved: offline, [2-4] waiting/.test({said})")
    assert answers(page) == []
    kept = json.loads(tab.run("Object.values(localStorage)[0]"))
    assert kept[-1]["answer"]["ranks"] == [1, 2, 3, 4]
    tab.offline(False)
    tab.wait("document.querySelector('#pace').textContent.startsWith('1 of')")
    tab.wait("document.querySelector('#offline').hidden")
    assert answers(page) == [[1, 2, 3, 4]]
    assert [event["version"] for event in [*page.events("draft"), *page.events("submitted")]] == [1, 2, 3]
    assert tab.run("JSON.stringify(localStorage)") == "{}"


def test_a_change_of_which_the_reply_is_lost_is_sent_again_and_counts_once(tab: Browser, page: Served):
    enter(tab, page)
    tab.run("""(real => {
      let lost = 0;
      window.fetch = async (...asked) => {
        const answer = await real(...asked);
        if (asked[0] === "/api/draft" && lost++ === 0) throw new TypeError("the reply is lost");
        return answer;
      };
    })(fetch)""")
    tab.press("1")
    tab.wait("document.querySelector('#offline').textContent.startsWith('Not saved: offline, 1 waiting')")
    tab.press("2", "3")
    tab.wait(SAVED)
    finish(tab, "4")
    assert answers(page) == [[1, 2, 3, 4]]
    assert [event["version"] for event in page.events("draft")] == [1, 2]


def test_a_tab_that_is_closed_without_a_network_loses_nothing(tab: Browser, page: Served):
    enter(tab, page)
    tab.offline(True)
    tab.press("3", "1")
    tab.wait("document.querySelector('#offline').textContent.includes('waiting')")
    tab.open("about:blank")
    tab.offline(False)
    tab.open(page.url)
    tab.wait(READY)
    assert tab.run(PRESSED) == ["3", "1"]
    finish(tab, "2", "2")
    assert answers(page) == [[3, 1, 2, 2]]


def test_a_tab_that_is_closed_at_once_has_sent_its_last_change(tab: Browser, page: Served):
    enter(tab, page)
    tab.press("3")
    tab.open("about:blank")
    tab.open(page.url)
    tab.wait(READY)
    tab.wait("document.querySelector('.ranks [aria-pressed=true]')?.textContent === '3'")
    assert answers(page, "draft")[-1] == [3, None, None, None]


def test_two_tabs_see_what_the_other_did_and_can_put_their_own_back(tab: Browser, page: Served):
    enter(tab, page)
    with tab.another() as other:
        other.open(page.url)
        other.wait(READY)
        other.press("4", "3")
        other.wait(SAVED)
        tab.press("1")
        strip = "!document.querySelector('#conflict').hidden && document.querySelector('#conflict').textContent"
        assert tab.wait(strip).startswith("Changed in another tab")
        assert tab.run(PRESSED) == ["4", "3"]
        tab.click("#conflict button")
        assert tab.run(PRESSED) == ["1"]
        tab.wait(SAVED)
        finish(tab, "2", "3", "4")
        other.press("1")
        other.wait("document.querySelector('#told').textContent.startsWith('This item was finished in another tab')")
        other.wait("document.querySelectorAll('.ranks [aria-pressed=true]').length === 0")
    assert answers(page) == [[1, 2, 3, 4]]


def test_a_server_that_is_killed_and_comes_back_has_lost_nothing(tab: Browser, tmp_path: Path):
    _, token = People(tmp_path / "people.json").invite("Anna")
    with killable(tmp_path, 5) as (url, process):
        tab.open(f"{url}/#{token}")
        tab.wait(READY)
        tab.press("Enter", "1", "2", "3", "4", "Enter")
        tab.wait("document.querySelector('#pace').textContent.startsWith('1 of')")
        tab.press("Enter", "2", "1")
        process.kill()
        process.wait(10)
        tab.press("3")
        tab.wait("document.querySelector('#offline').textContent.startsWith('Not saved: offline')")
    with killable(tmp_path, 5, int(url.rpartition(":")[2])):
        tab.press("3", "Enter")
        tab.wait("document.querySelector('#pace').textContent.startsWith('2 of')")
    events = read_events(tmp_path / FILE)
    assert [e["answer"]["ranks"] for e in events if e["kind"] == "submitted"] == [[1, 2, 3, 4], [2, 1, 3, 3]]


@pytest.mark.parametrize("name", HOSTILE)
def test_text_stays_text(tab: Browser, tmp_path: Path, name: str):
    text = HOSTILE[name]
    guide = tmp_path / "guide.txt"
    guide.write_text(text)
    item = ranking("one", [text, text + " "], prompt=[Message(role="user", content=text)], use_case=text)
    with serving(tmp_path, [item], ("An<b>x</b>",), quality=False, guidelines=guide) as page:
        enter(tab, page, "An<b>x</b>")
        tab.press("r")
        made = "[...document.querySelectorAll('.text *, .panel *')].map(one => one.localName)"
        allowed = {"p", "pre", "code", "ul", "li", "span", "button", "h2", "div"}
        assert set(tab.run(made)) <= allowed
        assert tab.run("document.querySelectorAll('.text').length") >= 4
        assert tab.run("window.hacked === undefined && document.querySelectorAll('a, img, iframe').length") == 0
        shown = tab.run("document.querySelector('.output .text').textContent")
        if name in ("bidi", "control"):
            assert not [one for one in shown if not (one.isprintable() or one == "\n")]
            chips = tab.run("[...document.querySelectorAll('.output:first-child .chip')].map(one => one.textContent)")
            assert ("U+202E" if name == "bidi" else "U+0000") in chips
        elif name != "code":
            assert shown == text
    assert tab.errors == []
    assert all(url.startswith(page.url) for url in tab.requests)


def test_a_very_long_text_folds_and_is_all_there(tab: Browser, tmp_path: Path):
    long = "word " * 40_000 + "end"
    with serving(tmp_path, [ranking("one", [long, "\u202e" * 200_000, "short"])], quality=False, flags="") as page:
        enter(tab, page)
        texts = "[...document.querySelectorAll('.output .text')].map(one => one.textContent.length)"
        assert all(length < 7000 for length in tab.run(texts))
        place = tab.run("[...document.querySelectorAll('.output')].findIndex(one => one.textContent.includes('word'))")
        tab.press("abc"[place], "m")
        assert tab.run(f"({texts})[{place}]") > len(long)
        tab.press("m")
        assert tab.run(f"({texts})[{place}]") < 7000
        finish(tab, "a", "1", "2", "3")
    assert sorted(answers(page)[0]) == [1, 2, 3]


def test_code_and_lists_are_shown_as_such(tab: Browser, tmp_path: Path):
    text = "Do this:\n\n3. first `x`\n4. second\n   more\n\n```python\nif a < b:\n    print(1)\n```\n- dot\n"
    with serving(tmp_path, [ranking("one", [text, "other"])], quality=False, flags="") as page:
        enter(tab, page)
        shown = tab.run(
            "(one => [...one.querySelectorAll('ol li')].map(li => [li.value, li.textContent])"
            ".concat([[one.querySelector('pre').textContent, one.querySelector('li code').textContent]]))"
            "([...document.querySelectorAll('.output')].find(one => one.textContent.includes('Do this')))"
        )
    assert shown == [[3, "first x"], [4, "second\nmore"], ["if a < b:\n    print(1)", "x"]]


def test_what_cannot_be_ranked_is_saved_with_its_reason(tab: Browser, page: Served):
    enter(tab, page)
    tab.press("n")
    tab.wait("document.querySelector('dialog').open || document.querySelector('#cannot').open")
    tab.press("2")
    tab.wait("document.querySelector('#pace').textContent.startsWith('1 of')")
    assert page.events("submitted")[0]["answer"]["cannot"] == "I do not know enough about it"


def test_training_is_explained_before_it_goes_on(tab: Browser, tmp_path: Path):
    lesson = ranking("lesson", ["yes", "no"], use="training", ranks=(0, 1), explanation="Yes is <b>right</b>.")
    with serving(tmp_path, [lesson, ranking("one")], quality=False, flags="") as page:
        enter(tab, page)
        right = tab.run("document.querySelector('.output .text').textContent") == "yes"
        tab.press("2", "1", "Enter")
        said = tab.wait("document.querySelector('.feedback')?.textContent")
        assert said.startswith("As the guide ranks them" if not right else "The guide ranks them otherwise")
        assert ("the guide: A > B" if right else "the guide: B > A") in said
        assert "Yes is <b>right</b>." in said
        tab.press("u", "Enter")
        tab.wait("document.querySelectorAll('.output').length === 4")
    assert len(page.events("submitted")) == 1


def test_a_demonstration_is_written_and_kept_while_it_grows(tab: Browser, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("")
    item = ranking("demo", (), task="demonstration")
    with serving(tmp_path, [item], tasks="demonstration", demonstrations=prompts) as page:
        enter(tab, page)
        tab.press(*"Ab 1u")
        tab.wait(SAVED)
        assert page.events("draft")[-1]["answer"]["text"] == "Ab 1u"
        tab.press("?")
        tab.press("Enter", control=True)
        tab.wait("document.querySelector('.alone')")
    assert page.events("submitted")[0]["answer"]["text"] == "Ab 1u?"


def test_a_wrong_link_says_so_and_a_pasted_one_opens(tab: Browser, page: Served):
    tab.open(f"{page.url}/#wrong-token")
    assert "not valid" in tab.wait("document.querySelector('.wrong')?.textContent")
    assert tab.run("location.hash") == ""
    tab.run(f"document.querySelector('#token').value = '{page.url}/#{page.tokens['Anna']}'")
    tab.click(".alone .go")
    tab.wait(READY)
    tab.click("#leave")
    tab.wait("document.querySelector('#token')")


def test_who_is_signed_out_elsewhere_signs_in_again_and_goes_on(tab: Browser, page: Served):
    enter(tab, page)
    tab.ask("Network.clearBrowserCookies")
    tab.press("4", "3")
    tab.wait("document.querySelector('#token')")
    tab.run(f"document.querySelector('#token').value = '{page.tokens['Anna']}'")
    tab.click(".alone .go")
    tab.wait(f"{READY} && document.querySelectorAll('.ranks [aria-pressed=true]').length === 2")
    finish(tab, "1", "1")
    assert answers(page) == [[4, 3, 1, 1]]


def test_time_without_a_sign_of_life_counts_for_a_minute_at_most(tab: Browser, page: Served):
    enter(tab, page)
    seconds = tab.run("""import("/static/clock.js").then(({ Clock }) => {
      let now = 0;
      performance.now = () => now;
      const clock = new Clock(), found = [];
      clock.start(5);
      const after = seconds => { now += seconds * 1000; };
      after(10); found.push(clock.seconds);
      dispatchEvent(new Event("keydown")); after(200); found.push(clock.seconds);
      dispatchEvent(new Event("keydown")); after(1); found.push(clock.seconds);
      return found;
    })""")
    assert seconds == [15, 75, 76]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_and_letters_can_be_read(tab: Browser, tmp_path: Path, width: int, dark: bool):
    texts = [*list(HOSTILE.values())[:6], "x" * 500, "```\n" + "y" * 500 + "\n```", "z"]
    with serving(tmp_path, [ranking("one", texts)]) as page:
        enter(tab, page, width=width, height=844, dark=dark)
        for step in ("rate", "rank"):
            tab.run(f"document.querySelectorAll('.tabs button')[{int(step == 'rank')}].click()")
            seen = tab.sight()
            (tmp_path / f"{step}-{width}-{dark}.png").write_bytes(seen.picture)
            assert seen.scrolls <= width
            assert seen.sticking == []
            assert tab.run(CONTRAST) == []


def test_the_admin_page_shows_who_did_what_and_leaves_out(tab: Browser, page: Served):
    anna = page.labeler()
    anna.rank((1, 2, 3, 4))
    tab.open(f"{page.url}/admin#{page.tokens['Chief']}")
    shown = tab.wait("document.querySelector('table')?.textContent")
    assert "Anna (p1)" in shown
    assert "1 of 3" in tab.run("document.querySelector('.figures').textContent")
    tab.click("[aria-label='Leave out Anna (p1)']")
    tab.press(*"moved", "Enter")
    tab.wait("document.querySelector('table').textContent.includes('left out: moved')")
    assert page.events("left_out")[0]["reason"] == "moved"
    tab.click("[aria-label='Take back Anna (p1)']")
    tab.wait("!document.querySelector('table').textContent.includes('left out')")
    for width in (1280, 390):
        tab.open(f"{page.url}/admin", width=width)
        tab.wait("document.querySelector('table')")
        seen = tab.sight()
        assert (seen.scrolls <= width, seen.sticking) == (True, [])
        assert tab.run(CONTRAST) == []
    assert tab.errors == []
