import re

from reward_server.labeling.page.files import TYPES, files, version

FOREIGN = re.compile(rb"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}|@import|url\(", re.IGNORECASE)
INLINE = re.compile(rb"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", re.IGNORECASE)
# Ways of making markup or code of a text.
RUNS = re.compile(rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function|srcdoc")


def test_the_page_takes_nothing_from_elsewhere_and_has_nothing_inline():
    for name, content in files().items():
        assert not FOREIGN.search(content.replace(b"http://www.w3.org/2000/svg", b"")), name
        if name.endswith(".html"):
            assert not INLINE.search(content), name


def test_no_text_can_become_markup():
    scripts = {name: content for name, content in files().items() if name.endswith(".js")}
    assert len(scripts) > 5
    for name, content in scripts.items():
        assert not RUNS.search(content), name


def test_every_file_that_is_asked_for_is_there():
    asked = {
        found.decode()
        for content in files().values()
        for found in re.findall(rb'(?:/static/|from "\./)([\w.]+)', content)
    }
    assert len(asked) > 8
    assert asked <= set(files())


def test_the_version_is_that_of_the_files():
    assert re.fullmatch("[0-9a-f]{12}", version())
    assert {name[name.rindex(".") :] for name in files()} == set(TYPES)
