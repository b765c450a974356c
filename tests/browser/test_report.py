"""The report in a real browser: drawn, without a request, on a desk and on a phone, light and dark, and saved."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import matplotlib.image
import numpy
import pytest

from lorakit.analyse.page import Table
from tests.browser.contrast import contrast
from tests.browser.example import HARM, figures

pytestmark = pytest.mark.browser

DESK = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
DRAWN = (1, 2, 3, 4, 5, 6, 10)  # numbers of the figures that Plotly draws on the page
INIT = "window.harmed = []; window.harm = what => harmed.push(what);"


@pytest.fixture
def opened(browser: Any, report: str) -> Iterator[Callable[..., Any]]:
    """Open the report in a window of its own; at the end nothing may have been said, asked for or harmed."""
    contexts, said, asked = [], [], []

    def open_(init: str = "", **window: Any) -> Any:
        contexts.append(browser.new_context(**window))
        contexts[-1].route(lambda address: address != report, lambda route: (asked.append(route), route.abort()))
        page = contexts[-1].new_page()
        page.add_init_script(INIT + init)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report)
        return page

    yield open_
    harmed = [page.evaluate("harmed") for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    outside = [place for place in asked if not str(place).startswith((report, "data:", "blob:"))]
    assert (said, outside, [what for each in harmed for what in each]) == ([], [], [])


def to_figure(page: Any, number: int) -> Any:
    """Scroll to a figure and wait until it is drawn."""
    figure = page.locator(f"#figure-{number}")
    page.evaluate("n => document.getElementById(`figure-${n}`).scrollIntoView({behavior: 'instant'})", number)
    if number in DRAWN:
        figure.locator(".plot .main-svg").first.wait_for()
    return figure


def draw_all(page: Any) -> None:
    for number in DRAWN:
        to_figure(page, number)
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")


@contextmanager
def saving(page: Any) -> Iterator[list[Any]]:
    """What a click saves: [name, bytes]."""
    saved: list[Any] = []
    with page.expect_download() as download:
        yield saved
    saved += [download.value.suggested_filename, download.value.path().read_bytes()]


def cell(page: Any, figure: int, trace: int, row: int, column: int) -> tuple[float, float]:
    """Where on the screen the middle of a heat map's cell is."""
    found = page.evaluate(
        """([figure, trace, row, column]) => {
            const plot = document.querySelector(`#figure-${figure} .plot`);
            const axes = plot._fullLayout, box = plot.getBoundingClientRect();
            const {xaxis, yaxis} = plot._fullData[trace];
            const [x, y] = [axes[xaxis.replace("x", "xaxis")], axes[yaxis.replace("y", "yaxis")]];
            return [box.left + x._offset + x.d2p(column), box.top + y._offset + y.d2p(row)];
        }""",
        [figure, trace, row, column],
    )
    return found[0], found[1]


def test_every_figure_is_drawn(opened: Callable[..., Any]) -> None:
    page = opened(**DESK)
    draw_all(page)
    kinds = {1: (".hm image", 2), 2: (".hm image", 4), 3: (".hm image", 1), 4: (".scatterlayer .js-line", 30)}
    kinds |= {5: (".scatterlayer path.point", 4), 6: (".barlayer .point path", 24), 10: (".hm image", 1)}
    for number, (what, count) in kinds.items():
        assert page.locator(f"#figure-{number} {what}").count() == count, number
    assert page.locator("#figure-7 tbody tr").count() == 3
    assert page.locator("#figure-8 .tokens span").all_inner_texts()[:2] == ["A", " dull"]
    assert page.locator("nav a").count() == 3


def test_text_is_shown_as_it_is(opened: Callable[..., Any]) -> None:
    page = opened(**DESK)
    draw_all(page)
    assert page.locator("h1").inner_text() == f"What it learned {HARM}"
    assert page.title() == f"What it learned {HARM}"
    assert "<b>3</b> %{x} &amp;" in page.locator("#figure-2 .annotation-text").all_text_contents()
    assert page.locator("script").count() == 2 + 2 * len(figures())
    assert page.locator("img, a[href^=http]").count() == 0


def test_a_figure_far_below_is_drawn_when_it_comes_near_and_nothing_moves(opened: Callable[..., Any]) -> None:
    page = opened(**DESK)
    before = page.evaluate("document.documentElement.scrollHeight")
    assert page.locator("#figure-10 .main-svg").count() == 0
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollHeight") == before


def test_pointing_at_a_cell_shows_its_number(opened: Callable[..., Any]) -> None:
    page = opened(**DESK)
    to_figure(page, 1)
    page.mouse.move(*cell(page, 1, 1, 3, 17))
    label = page.locator("#figure-1 .hovertext").first
    label.wait_for()
    value = float(figures()[0].panels["random"][2, 16])
    assert label.text_content() == f"randomi: 3j: 17φ: {value:.4g}"


def test_dragging_enlarges_and_a_new_width_leaves_it_so(opened: Callable[..., Any]) -> None:
    page = opened(**DESK)
    to_figure(page, 1)
    page.mouse.move(*cell(page, 1, 0, 2, 10))
    page.mouse.down()
    page.mouse.move(*cell(page, 1, 0, 6, 40), steps=4)
    page.mouse.up()
    reach = "document.querySelector('#figure-1 .plot')._fullLayout.xaxis.range.map(Math.round)"
    page.wait_for_function(f"{reach}[0] === 10")
    page.set_viewport_size({"width": 900, "height": 800})
    page.wait_for_function("document.querySelector('#figure-1 .plot')._fullLayout.width < 900")
    assert page.evaluate(reach) == [10, 40]
    page.mouse.dblclick(*cell(page, 1, 0, 4, 20))
    page.wait_for_function(f"{reach}[0] <= 1")


@pytest.mark.parametrize("window", [DESK, {**PHONE, "color_scheme": "dark"}], ids=["desk", "dark phone"])
def test_png_is_a_picture_on_white_of_the_same_size_everywhere(opened: Callable[..., Any], window: Any) -> None:
    page = opened(**window)
    for number, figure in enumerate(figures(), 1):
        with saving(page) as saved:
            page.locator(f"#figure-{number} button[data-kind=PNG]").click()
        name, content = saved
        assert re.fullmatch(rf"figure-{number}[a-z0-9-]*\.png", name)
        picture = matplotlib.image.imread(io.BytesIO(content), format="png")
        height, width, _ = picture.shape
        assert 900 <= width <= (4000 if isinstance(figure, Table) else 2000) and 150 <= height <= 2600, figure.title
        assert (picture[0, 0, :3] == 1).all() and (picture[-1, -1, :3] == 1).all()
        ink = (picture[..., :3] < 0.9).any(axis=2)
        assert ink[height // 3 :].any() and len(numpy.unique(picture[::7, ::7].reshape(-1, 4), axis=0)) > 5
        assert ink[20:64, 24:300].any(), "no title"
        assert not ink[:4].any() and not ink[:, :2].any(), "the title or a name is cut off"


def test_csv_is_the_figures_own_to_the_byte(opened: Callable[..., Any]) -> None:
    page = opened(**DESK)
    for number, figure in enumerate(figures(), 1):
        with saving(page) as saved:
            page.locator(f"#figure-{number} button[data-kind=CSV]").click()
        assert saved[0].endswith(".csv") and saved[1] == figure.csv().encode()


def test_the_keyboard_saves_and_walks_over_tokens(opened: Callable[..., Any]) -> None:
    page = opened(**DESK)
    page.locator("#figure-1 button[data-kind=CSV]").focus()
    with saving(page) as saved:
        page.keyboard.press("Enter")
    assert saved[1] == figures()[0].csv().encode()
    page.locator("#figure-8 .tokens").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.locator("#figure-8 .note").inner_text() == f"“ dull” · change: −1.25 · {HARM}"


def test_a_browser_too_old_to_save_says_so(opened: Callable[..., Any]) -> None:
    page = opened("delete window.DecompressionStream;", **DESK)
    button = page.locator("#figure-1 button[data-kind=CSV]")
    button.click()
    page.get_by_text("failed").wait_for()
    assert "DecompressionStream" in button.get_attribute("title")


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_the_screen(opened: Callable[..., Any], width: int) -> None:
    page = opened(**{**PHONE, "viewport": {"width": width, "height": 740}})
    draw_all(page)
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure, .plot, .main-svg, button, .tokens, .scroll, dd, h2')].map(each =>"
        " { const {left, right} = each.getBoundingClientRect(); return [left, right, each.outerHTML.slice(0, 80)] })"
    )
    assert [box for box in boxes if box[0] < 0 or box[1] > width] == []
    texts = page.evaluate(
        "[...document.querySelectorAll('.plot text')].filter(each => each.textContent.trim()).map(each => {"
        " const text = each.getBoundingClientRect(), plot = each.closest('.plot').getBoundingClientRect();"
        " return [text.left - plot.left, plot.right - text.right, plot.bottom - text.bottom, each.textContent] })"
    )
    assert [text for text in texts if min(text[:3]) < -1] == []


def test_on_a_phone_panels_are_stacked_and_a_table_scrolls_by_itself(opened: Callable[..., Any]) -> None:
    page = opened(**PHONE)
    to_figure(page, 2)
    layout = "document.querySelector('#figure-2 .plot')._fullLayout"
    across = page.evaluate(f"['xaxis', 'xaxis2', 'xaxis3', 'xaxis4'].map(axis => {layout}[axis].domain)")
    down = page.evaluate(f"['yaxis', 'yaxis2', 'yaxis3', 'yaxis4'].map(axis => {layout}[axis].domain)")
    assert across == [[0, 1]] * 4
    assert all(lower[1] < upper[0] for upper, lower in pairwise(down))
    assert page.evaluate("(table => table.scrollWidth > table.clientWidth)(document.querySelector('.scroll'))")
    page.set_viewport_size({"width": 800, "height": 740})
    page.wait_for_function(f"{layout}.xaxis2.domain[0] > 0.5")


def test_a_finger_scrolls_over_a_figure_and_a_tap_shows_the_number(opened: Callable[..., Any]) -> None:
    page = opened(**PHONE)
    to_figure(page, 1)
    x, y = cell(page, 1, 0, 5, 30)
    before, touch = page.evaluate("scrollY"), page.context.new_cdp_session(page)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for step in range(1, 11):
        points = [{"x": x, "y": y - 10 * step}]
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_function(f"scrollY > {before} + 50")
    to_figure(page, 1)
    page.touchscreen.tap(*cell(page, 1, 0, 5, 30))
    page.locator("#figure-1 .hovertext").first.wait_for()
    assert page.locator("#figure-1 .hovertext").first.text_content().startswith("trainedi: 5j: 30")
    page.locator("#figure-8 .tokens span").nth(2).tap()
    assert page.locator("#figure-8 .note").inner_text() == "“ film⏎” · change: 2.5 · base: good"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(opened: Callable[..., Any], scheme: str) -> None:
    page = opened(**DESK, color_scheme=scheme)
    to_figure(page, 1)
    surface = colour(page, "figure", "background-color")
    assert (sum(surface) < 200) == (scheme == "dark")
    for what in ("h1", "dt", "nav a", ".hint", "figcaption", "figcaption .number", "button", "thead th", "td", ".key"):
        assert contrast(hexadecimal(colour(page, what, "color")), hexadecimal(surface)) >= 4.5, what
    ticks = page.locator("#figure-1 .xtick text").first.evaluate("each => getComputedStyle(each).fill")
    assert contrast(hexadecimal(numbers(ticks)), hexadecimal(surface)) >= 4.5
    for token in page.locator("#figure-8 .tokens span").all()[:3]:
        *over, share = [*numbers(token.evaluate("each => getComputedStyle(each).backgroundColor")), 1.0][:4]
        seen = [share * one + (1 - share) * other for one, other in zip(over, surface, strict=True)]
        assert contrast(hexadecimal(colour(page, ".tokens", "color")), hexadecimal(seen)) >= 4.5


def test_a_change_of_scheme_and_printing_colour_all_figures_anew(opened: Callable[..., Any]) -> None:
    page = opened(**DESK, color_scheme="light")
    to_figure(page, 1)
    paper = "document.querySelector('#figure-1 .plot')._fullLayout.paper_bgcolor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{paper} !== '{light}'")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(paper) == light
    assert page.locator("#figure-10 .main-svg").count() > 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(paper) != light


def colour(page: Any, what: str, name: str) -> list[float]:
    """A computed colour of the first such element, as red, green and blue."""
    return numbers(page.locator(what).first.evaluate("(each, name) => getComputedStyle(each)[name]", name))[:3]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", text)]


def hexadecimal(parts: list[float]) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in parts[:3])
