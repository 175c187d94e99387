"""eval/apps/demo.py as users start it: through its HTTP interface, and in a browser."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from eval.apps.classify import embed_labels, label_probabilities
from eval.apps.demo import build_demo, main
from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.embedder_amorlip import encode_images
from tests.helpers.checkout import ROOT, environment_with_threads


LABELS = ["airplane", "red heart", "angry face"]
BARS = ("dt", "dd", "meter")  # of a label on the page: its name, its per cent, its bar


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """Where the demo's temporary files go."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def demo(tiny_model, uploads, tmp_path_factory):
    """The address of a demo that runs in its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "eval/apps/demo.py", "--model", tiny_model, "--port", str(port)]
    log = tmp_path_factory.mktemp("demo") / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **environment_with_threads(1),
                "TMPDIR": str(uploads),
                "HTTP_PROXY": "http://127.0.0.1:9",
            },  # nobody is there
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have background jobs ignore it
        )
    try:
        deadline = time.monotonic() + 120
        while f"Open http://127.0.0.1:{port}" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)  # Ctrl-C
        assert process.wait(60) == 0
        assert not list(uploads.rglob("*.png"))
    finally:
        process.kill()


@pytest.fixture(scope="module")
def picture(tmp_path_factory, demo_rows):
    """A half-transparent image: whoever laid it on black would see something else."""
    image = demo_rows[3]["image"].convert("RGBA").resize((96, 96))
    image.putalpha(128)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    image.save(path)
    return path


@pytest.fixture(scope="module")
def expected(tiny_model, picture):
    """{label: probability}, likeliest first."""
    model, processor = AutoModel.from_pretrained(tiny_model).eval(), AutoProcessor.from_pretrained(tiny_model)
    embeds = encode_images(model, processor, [Image.open(picture)])
    probabilities = label_probabilities(model, embeds, embed_labels(model, processor, LABELS))[0].tolist()
    return dict(sorted(zip(LABELS, probabilities, strict=True), key=lambda item: -item[1]))


@pytest.mark.e2e
def test_demo_answers_http_client(demo, picture, expected, uploads, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    client = Client(demo, verbose=False, analytics_enabled=False)
    result = client.predict(handle_file(picture), " airplane, red heart,, angry face , airplane", api_name="/classify")
    assert result["label"] == next(iter(expected))
    found = {line["label"]: line["confidence"] for line in result["confidences"]}
    assert list(found) == list(expected) and found == pytest.approx(expected, abs=1e-5)
    assert list(uploads.rglob(picture.name))  # until the demo ends, see its fixture
    by_line = client.predict(handle_file(picture), "airplane\nred heart\r\n\nangry face\n", api_name="/classify")
    assert by_line == result
    for image, labels, message in (
        (handle_file(picture), "airplane", "2 or more different labels, got 1"),
        (handle_file(picture), " ,\n", "2 or more different labels, got 0"),
        (handle_file(broken), "airplane, anchor", "The image cannot be read: it is not an image"),
        (None, "airplane, anchor", "Upload an image first"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(image, labels, api_name="/classify")


@pytest.mark.e2e
def test_demo_listens_on_this_computer_only(demo):
    assert requests.get(demo, timeout=30).ok
    port = demo.rpartition(":")[2]
    with pytest.raises(OSError):  # another address of this computer, which a server for all networks would answer
        socket.create_connection(("127.0.0.2", int(port)), timeout=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "--port must be between 1 and 65535, got 99999"),
        (["--port", "0"], "--port must be between 1 and 65535, got 0"),
        (["--template", "a photo"], "'a photo' has no {} where the label goes"),
    ],
)
def test_demo_reports_mistakes_at_start(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "not/loaded", *options])
    assert main() == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.e2e
def test_demo_reports_taken_port(demo, tiny_model, monkeypatch, capsys):
    port = demo.rpartition(":")[2]
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", str(tiny_model), "--port", port])
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the demo sets it
    assert main() == 1
    assert f"--port {port} cannot be used: Address already in use" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def browser(tmp_path):
    """Chromium without a network."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = (shutil.which("chromium") or shutil.which("chromium-browser")), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path / 'profile'}",
        "window-size=1100,700",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.e2e
@pytest.mark.browser
def test_demo_in_browser(demo, picture, expected, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(css, text=""):
        def displayed(browser):
            return next((e for e in browser.find_elements(By.CSS_SELECTOR, css) if text in e.text), None)

        return WebDriverWait(browser, 60).until(displayed, f"no {css} {text}")

    browser.get(demo)
    find("input[type=file]").send_keys(str(picture))
    find("[data-testid=image] img, .image-frame img")
    find("textarea").send_keys(", ".join(LABELS))
    find("button", "Submit").click()
    shown = find("[data-testid=label-output-value]").text
    assert shown == next(iter(expected))
    names, percents, meters = (browser.find_elements(By.CSS_SELECTOR, f"[data-testid=label] {e}") for e in BARS)
    assert [name.text for name in names] == list(expected)
    assert [percent.text for percent in percents] == [f"{100 * p:.0f}%" for p in expected.values()]
    assert [float(meter.get_attribute("value")) for meter in meters] == pytest.approx([*expected.values()], abs=1e-5)

    browser.save_screenshot(str(tmp_path / "demo.png"))
    assert Image.open(tmp_path / "demo.png").size[0] >= 1000
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    elsewhere = [url for url in asked if not url.startswith((demo, "data:", "blob:", "chrome:"))]
    assert any(url.startswith(demo) for url in asked) and not elsewhere


@pytest.fixture
def page(tiny_model):
    return build_demo(AutoModel.from_pretrained(tiny_model).eval(), AutoProcessor.from_pretrained(tiny_model))


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a"])
def test_page_explains_broken_pictures(page, tmp_path, name):
    import gradio

    (tmp_path / name).write_bytes(b"no image")
    upload = SimpleNamespace(path=str(tmp_path / name))
    with pytest.raises(gradio.Error, match="The image cannot be read: it is not an image"):
        page.fn(page.input_components[0].preprocess(upload), "a, b")
    with pytest.raises(gradio.Error, match="Upload an image first"):
        page.fn(page.input_components[0].preprocess(None), "a, b")


def test_page_decodes_as_the_command_line(page, demo_rows, tmp_path):
    gray = np.asarray(demo_rows[3]["image"].convert("L").resize((96, 96)))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(gray).save(tmp_path / "gray.png")
    results = [page.fn(str(tmp_path / name), "a cat, an ant") for name in ("deep.png", "gray.png")]
    assert results[0] == pytest.approx(results[1], abs=1e-6) and list(results[0]) == ["a cat", "an ant"]


def test_page_warns_of_indistinguishable_labels(page, picture, monkeypatch):
    import gradio

    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    result = page.fn(str(picture), "\n".join(["a dog", "a cat " * 40 + "one", "a cat " * 40 + "two"]))
    assert len(result) == 3 and len(warnings) == 1 and "share one probability" in warnings[0]


def test_page_of_model_with_logit_bias_takes_one_label(tiny_model, picture):
    torch.manual_seed(0)
    config = AmorLIPConfig.from_pretrained(tiny_model, logit_bias_init_value=-1.5)
    page = build_demo(AmorLIPModel(config).eval(), AutoProcessor.from_pretrained(tiny_model))
    one, two = page.fn(str(picture), "a cat"), page.fn(str(picture), "a cat, a dog")
    assert 0 < one["a cat"] < 1 and one["a cat"] == pytest.approx(two["a cat"], abs=1e-6)
