# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The page of `emu3 serve` in a real browser, against the real server. Skipped where there is no browser."""

import base64
import io
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from paddlemix.processors.image_processing_emu3 import psnr

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements-dev.txt)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")

ROOT = Path(__file__).resolve().parents[1]
SCENE = ROOT / "paddlemix" / "demo_images" / "emu3_scene.png"  # a red circle left of a blue triangle
PHOTO = ROOT / "paddlemix" / "demo_images" / "emu3_demo.png"
KEY = "a key of the tests"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
)
CIRCLE = "a large red circle on a white background."


@pytest.fixture(scope="module")
def address():
    """Where a server of emu3-mini listens that asks for KEY."""
    arguments = ["serve", "--model_path=emu3-mini", "--port=0", f"--api_key={KEY}"]
    program = [sys.executable, "-m", "paddlemix.commands", *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            said = ""
            for line in server.stdout:
                said += line
                if found := re.search(r"listening on (http://\S+)", line):
                    yield found[1].rstrip("/")
                    break
            else:
                pytest.fail(f"the server ended: {said}")
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser():
    if subprocess.run([CHROMIUM, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"{CHROMIUM} does not run")  # some distributions have a script there that names their shop
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())


@pytest.fixture
def visit(browser, address):
    """visit(path="/", **options of the browser's context) -> a page of its own.

    At the end: nothing was asked of another host, and the console holds no error, but for `page.expected`.
    """
    contexts, pages = [], []

    def open_page(path="/", key=KEY, width=1280, height=800, locale="en-US", **options):
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, locale=locale, accept_downloads=True, **options)
        contexts.append(context)
        if key:
            context.add_init_script(f"sessionStorage.setItem('emu3.key', '{key}')")
        page = context.new_page()
        page.errors, page.hosts, page.expected = [], set(), "^$"
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: page.hosts.add(re.match(r"(data|blob):|https?://[^/]+", request.url)[0]))
        page.set_default_timeout(60_000)
        page.goto(address + path)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert page.hosts <= {address, "data:", "blob:"}
        assert [error for error in page.errors if not re.search(page.expected, error)] == []
    for context in contexts:
        context.close()


def generate(page, prompt=CIRCLE, **fields):
    """Fill in the form and send it."""
    for name, value in {"prompt": prompt, **fields}.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")


def finished(page):
    page.wait_for_selector("#run", state="hidden")
    return page.locator("#gallery > li")


def download(page, card):
    with page.expect_download() as caught:
        card.get_by_text("Download").click()
    return caught.value.suggested_filename, Image.open(caught.value.path())


def picture(page, selector):
    """The PIL picture of an image's data: URL."""
    return Image.open(io.BytesIO(base64.b64decode(page.get_attribute(selector, "src").split(",")[1])))


def watch(page):
    """From now on `seen` holds the first picture's previews and the lines of progress."""
    page.evaluate("""() => {
        window.seen = { previews: new Set(), progress: [] };
        new MutationObserver(() => {
            const image = document.querySelector("#gallery img");
            if (image) seen.previews.add(image.src);
            seen.progress.push(document.getElementById("progress-text").textContent);
        }).observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
    }""")


def give(page, event, data):
    """Paste or drop a PNG file."""
    page.evaluate("""([type, data]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "photo.png", { type: "image/png" }));
        const event = type === "paste" ? new ClipboardEvent(type, { clipboardData: transfer, bubbles: true })
            : new DragEvent(type, { dataTransfer: transfer, bubbles: true });
        document.body.dispatchEvent(event);
    }""", [event, base64.b64encode(data).decode()])


def ask(page, question):
    page.fill("#question", question)
    page.click("#ask")
    answer = page.locator("#messages > article").last
    page.wait_for_selector("#messages[aria-busy=false]")
    page.wait_for_selector("#ask:enabled")
    return answer.locator(".answer").inner_text()


def wait_until(condition):
    """Playwright's wait_for_function needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rows_appear_and_the_seed_draws_the_picture_again(visit):
    page = visit()
    watch(page)
    page.get_by_label("Prompt", exact=True).fill(CIRCLE)
    page.get_by_label("Number").fill("4")
    page.get_by_label("Seed").fill("1")
    page.get_by_role("button", name="Generate").click()
    cards = finished(page)
    assert cards.count() == 4
    assert page.evaluate("seen.previews.size") >= 2  # previews take a tenth of the time at most
    progress = page.evaluate("seen.progress")
    rows = [int(found[1]) for text in progress if (found := re.match(r"row (\d+) of 32 · \d+ of 300 tokens", text))]
    assert len(set(rows)) >= 3 and rows == sorted(rows)
    assert any("tokens a second" in text and "s left" in text for text in progress)
    assert "seed 1 · picture 1 of 4 · 64 x 64 · guidance 1.5" in cards.first.inner_text()

    name, first = download(page, cards.nth(2))
    assert name == "emu3_1_2.png" and first.text["prompt"] == CIRCLE and first.text["seed"] == "1"
    generate(page, "a blue cross", number=1, seed="")
    assert finished(page).count() == 5 and "seed 1 " not in cards.first.inner_text()
    cards.nth(3).get_by_text("Again with this seed").click()
    assert finished(page).count() == 9
    _, second = download(page, cards.nth(2))
    assert second.text == first.text and second.tobytes() == first.tobytes()
    cards.first.get_by_role("button", name="Enlarge").click()
    assert page.locator("dialog img").is_visible()


def test_stop_ends_the_work_at_the_server(visit, address):
    page = visit()
    generate(page, number=8)
    page.wait_for_selector("#gallery img")
    assert page.evaluate("document.activeElement.id") == "stop"
    page.keyboard.press("Enter")
    cards = finished(page)
    assert "stopped" in cards.first.inner_text() and not page.get_by_text("Download").count()
    assert page.evaluate("document.activeElement.id") == "generate" and page.inner_text("#draw-error") == ""
    wait_until(lambda: re.search(r"^emu3_running 0(\.0)?$", page.request.get(f"{address}/metrics").text(), re.M))


def test_a_second_visitor_sees_the_place_in_the_queue(visit):
    first, second = visit(), visit()
    watch(second)
    second.fill("#prompt", CIRCLE)
    generate(first, number=8)  # with guidance they fill the batch
    wait_until(lambda: "Waiting" not in first.inner_text("#progress-text"))
    second.click("#generate")
    wait_until(lambda: second.is_hidden("#run") or "Place 1 in the queue" in second.evaluate("seen.progress"))
    assert "Place 1 in the queue" in second.evaluate("seen.progress")
    first.evaluate("document.getElementById('stop').click()")  # it may be done by now
    assert finished(second).count() == 1


def test_two_questions_about_a_picture(visit):
    page = visit("/#chat")
    give(page, "drop", SCENE.read_bytes())
    page.wait_for_selector("#attached img")
    assert ask(page, "What colour is the triangle?") == "blue"
    assert ask(page, "What colour is the circle?") == "red"
    assert page.locator("#messages img").count() == 1  # the second is about the same picture
    page.click("#chat-new")
    assert page.locator("#messages > article").count() == 0


def test_a_picture_that_was_drawn_goes_into_a_question_and_into_codes(visit):
    page = visit()
    generate(page, seed=1)
    card = finished(page).first
    card.get_by_text("Ask about it").click()
    assert ask(page, "What colour is the circle?") == "red"
    page.click("#tab-draw")
    card.get_by_text("Its codes").click()
    page.wait_for_selector("#psnr:not(:empty)")
    assert page.inner_text("#grid-text") == "8 x 8 = 64 codes"


def test_codes_and_the_reconstruction(visit):
    page = visit("/#codes")
    with Image.open(PHOTO) as photo:
        photo.convert("RGB").resize((97, 65)).save(file := io.BytesIO(), "png")
    give(page, "paste", file.getvalue())
    page.wait_for_selector("#psnr:not(:empty)")
    original, image = picture(page, "#codes-original"), picture(page, "#codes-image")
    assert image.size == original.size == (96, 64)
    assert page.inner_text("#original-text") == "Picture, 96 x 64 pixels · scaled from 97 x 65"
    assert page.inner_text("#psnr") == f"PSNR {psnr(original.convert('RGB'), image.convert('RGB')):.2f} dB"
    codes = [line.split() for line in page.text_content("#codes-text").splitlines()]
    assert (len(codes[0]) * 8, len(codes) * 8) == image.size
    page.hover("#codes-grid", position={"x": 3, "y": 3})
    assert page.inner_text("#grid-text") == f"column 1, row 1: code {codes[0][0]}"


def test_the_language_is_the_browsers_or_the_one_chosen(visit):
    page = visit(locale="zh-CN")
    assert page.get_by_role("button", name="生成").is_visible() and page.get_by_label("提示词", exact=True).is_visible()
    generate(page, " ")
    assert page.inner_text("#draw-error") == "请填写提示词。"
    page.select_option("#language", "en")
    assert page.inner_text("#draw-error") == "Please write a prompt." and page.get_attribute("html", "lang") == "en"
    page.reload()
    assert page.get_by_role("button", name="Generate").is_visible()
    page.select_option("#language", "zh")
    text = page.text_content("main") + page.text_content("header")
    assert not set(re.findall(r"[A-Za-z]{2,}", text)) - {"Emu", "English", "Language", "API"}, "not translated"


@pytest.mark.parametrize("width, locale", [(320, "en-US"), (390, "zh-CN")])
def test_a_narrow_screen_does_not_scroll_sideways(visit, width, locale):
    page = visit(width=width, height=700, locale=locale, color_scheme="dark", has_touch=True, is_mobile=True)
    generate(page, "x" * 80, number=1, seed="9" * 15)
    finished(page)
    page.locator("#gallery button").nth(2).click()
    ask(page, "W" * 60)
    widths = []
    for tab in ("draw", "chat", "codes"):
        page.click(f"#tab-{tab}")
        if tab == "codes":
            page.set_input_files("#codes-file", SCENE)
            page.wait_for_selector("#psnr:not(:empty)")
        widths.append(page.evaluate("document.documentElement.scrollWidth"))
    assert widths == [width] * 3
    # what is touched is large enough
    heights = page.evaluate("[...document.querySelectorAll('button, select')].map((n) => n.offsetHeight)")
    assert min(filter(None, heights)) >= 40


def test_errors_are_sentences(visit):
    page = visit()
    page.expected = "Failed to load resource"  # the browser's own line
    generate(page, "word " * 15_000, number=1)
    page.wait_for_selector("#draw-error:not(:empty)")
    assert re.fullmatch(r"The server does not accept this: the prompt has \d+ tokens.*", page.inner_text("#draw-error"))
    assert page.locator("#gallery > li").count() == 0 and page.is_enabled("#generate")
    page.select_option("#language", "zh")
    assert page.inner_text("#draw-error").startswith("服务器不接受这个请求：the prompt has")
    page.select_option("#language", "en")
    for field, wrong, sentence in (
        ("seed", "-1", "The seed must be a whole number, 0 or more, of at most 15 digits."),
        ("number", "11", "The number must be a whole number from 1 to 10."),
        ("guidance", "x", "Guidance must be a number, 1 or more."),
    ):
        before = page.input_value(f"#{field}")
        generate(page, **{field: wrong})
        assert page.inner_text("#draw-error") == sentence
        assert page.evaluate("document.activeElement.id") == field
        page.fill(f"#{field}", before)
    page.click("#tab-codes")
    page.set_input_files("#codes-file", {"name": "a.png", "mimeType": "image/png", "buffer": b"not a picture"})
    page.wait_for_selector("#codes-error:not(:empty)")
    assert page.inner_text("#codes-error") == "That file is not a picture: take PNG, JPEG, WebP, GIF or BMP."
    page.context.set_offline(True)
    page.click("#tab-draw")
    generate(page)
    page.wait_for_selector("#draw-error:not(:empty)")
    assert page.inner_text("#draw-error") == "The server cannot be reached. Is it running?"


def test_the_gallery_stays_when_the_language_changes(visit):
    page = visit()
    generate(page, "a red circle", number=1)
    finished(page)
    page.select_option("#language", "zh")
    assert page.locator("#gallery img").count() == 1


@pytest.mark.parametrize("wrong", ["another key", "密钥"])
def test_a_wrong_key_is_told(visit, wrong):
    page = visit(key=None)
    page.expected = "Failed to load resource"
    page.wait_for_selector("#key-form:not([hidden])")
    page.fill("#key", wrong)
    page.click("#key-form button")
    page.wait_for_selector("#key-error:not(:empty)")
    assert "does not take this key" in page.inner_text("#key-error") and page.is_visible("#key")


def test_the_key_is_asked_for(visit):
    page = visit(key=None)
    page.expected = "Failed to load resource"
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    page.wait_for_selector("#key-form:not([hidden])")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_text("Models: emu3-mini").wait_for()
    assert not page.is_visible("#key-form")


def test_the_keyboard_and_the_screen_reader(visit):
    page = visit()
    page.focus("#tab-draw")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "tab-codes"
    assert page.get_by_role("tabpanel", name="Codes").is_visible()
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a red ring")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert page.inner_text("#draw-live") == "Finished: 1 of 1 pictures."
    nameless = page.evaluate("""() => [...document.querySelectorAll(
        "button, input, select, textarea, a, progress, canvas, [role], #gallery img, #panel-codes img"
    )].filter((n) => !(n.ariaLabel || n.alt || n.labels?.[0]?.textContent || n.textContent).trim()
        && n.role !== "status" && n.role !== "alert").map((n) => n.outerHTML)""")
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(visit, scheme):
    """WCAG AA: a contrast of 4.5."""
    page = visit(color_scheme=scheme)
    generate(page, " ")
    pairs = page.evaluate("""() => {
        const behind = (n) => {
            const colour = getComputedStyle(n).backgroundColor;
            return colour === "rgba(0, 0, 0, 0)" ? behind(n.parentElement) : colour;
        };
        const texts = [...document.querySelectorAll("body *")].filter((n) => n.offsetWidth
            && [...n.childNodes].some((c) => c.nodeType === 3 && c.data.trim()));
        return texts.map((n) => [n.textContent, getComputedStyle(n).color, behind(n)]);
    }""")

    def luminance(colour):
        linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in
                  (int(x) / 255 for x in re.findall(r"\d+", colour)[:3])]  # fmt: skip
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert len(pairs) > 10
    for text, *colours in pairs:
        dark, light = sorted(map(luminance, colours))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, colours)
