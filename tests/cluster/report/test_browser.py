"""The pages in a real browser: nothing else shows that plots are there, and that nothing sticks out."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.report.compare import write_comparison
from cluster.report.report import write_report
from tests.browser import CHROMIUM, Browser, browser
from tests.synthetic_run import SUITE, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / name, arms, suite=SUITE) for name, arms in (("one", ["ppo"]), ("two", ["ppo", "ppo-noptx"]))
    ]
    return {"report": write_report(runs[1]), "comparison": write_comparison(runs)}


@pytest.fixture
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.mark.parametrize(("page", "plots"), [("report", 26), ("comparison", 24)])
def test_plots_are_there_nothing_overflows_no_error_and_no_request(
    pages: dict[str, Path], tab: Browser, page: str, plots: int, tmp_path: Path
):
    for width in (1280, 390):
        for dark in (False, True):
            seen = tab.look(pages[page], width, dark)
            (tmp_path / f"{page}-{width}-{'dark' if dark else 'light'}.png").write_bytes(seen.picture)
            assert len(seen.plots) == plots
            assert all(wide > 250 and high > 100 and paths > 5 for wide, high, paths in seen.plots)
            assert seen.scrolls <= width
            assert seen.sticking == []
            assert all(title.endswith(" nats") for *_, title in seen.shading)
            backgrounds = {background for background, *_ in seen.shading}
            assert len(backgrounds) > 3
            assert {letters for _, letters, _ in seen.shading} == {"rgb(228, 231, 234)" if dark else "rgb(27, 31, 35)"}
    assert tab.errors == []
    assert tab.requests == [pages[page].resolve().as_uri()] * 4


def test_what_the_browser_sees_is_told(tab: Browser, tmp_path: Path):
    """What the test above looks for is found where it is wrong."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<main><p style="width: 2000px">wide</p><img src="https://example.org/a.png">'
        "<figure><svg width=0 height=0></svg></figure><script>console.error('a'); throw 'b'</script></main>"
    )
    seen = tab.look(page, 390)
    assert seen.scrolls > 390
    assert seen.sticking[0].startswith('<p style="width: 2000px"')
    assert seen.plots == [[0, 0, 0]]
    assert len(tab.errors) >= 2
    assert "https://example.org/a.png" in tab.requests
