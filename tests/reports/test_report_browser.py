"""Pages in a real browser: no overflow on a narrow screen, no request, no error.

Needs Chromium; where there is none the tests are skipped.
"""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_report import demo, dpo, sft  # noqa: F401

from zephyr_jax.demo.run import write_demo_report
from zephyr_jax.reports.run import write_run_report

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# A frame of 360 px, as narrow as no window can be, and what is seen of it when it has loaded.
LOOK = """<!doctype html>
<iframe src="page.html" style="width:360px;height:9000px;border:0"></iframe>
<pre id="seen"></pre><script>
addEventListener("load", () => {
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const svg = page.querySelector("svg[data-hover]");
  const texts = [...page.querySelectorAll("h1, h2, h3, p, td, th, dt, dd, .words, svg text")];
  document.getElementById("seen").textContent = JSON.stringify({
    values: (svg.dispatchEvent(new view.PointerEvent("pointermove", {clientX: 9999})),
      page.querySelector(".values").textContent),
    inside: view.innerWidth,
    wide: page.documentElement.scrollWidth,
    requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    texts: texts.length,
  });
});
</script>"""


@pytest.fixture(scope="module", autouse=True)
def _browser():
    if not CHROMIUM:
        pytest.skip("no chromium here")


@pytest.fixture(params=[write_run_report, write_demo_report])
def page(request, demo):  # noqa: F811
    return request.param(demo if request.param is write_demo_report else demo / "sft")


def see(page, tmp_path, scheme):
    """What `LOOK` sees of a page, and the browser's complaints."""
    (tmp_path / "look").mkdir()
    (tmp_path / "look" / "page.html").write_text(page.read_text())
    (tmp_path / "look" / "outer.html").write_text(LOOK)
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom"
    flags += f" --allow-file-access-from-files --blink-settings=preferredColorScheme={scheme}"
    flags += f" --virtual-time-budget=5000 --user-data-dir={tmp_path / 'profile'}"
    words = [CHROMIUM, *flags.split(), f"file://{tmp_path / 'look' / 'outer.html'}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    seen = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(seen[0])), complaints


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_page_on_a_narrow_screen(page, tmp_path, scheme):
    seen, complaints = see(page, tmp_path, scheme)
    assert seen["inside"] == 360
    assert seen["wide"] <= 360
    assert seen["values"] == "step 6\ntrain 0.8333\nheld-out 4.322"
    assert seen["requests"] == complaints == []
    assert seen["dark"] == (scheme == 0)
    assert seen["texts"] > 50
