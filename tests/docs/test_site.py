"""The documentation as a site: opened from its folder, it needs no network, and its search finds things."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the site with")
@pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="the pages lie in the checkout")
def test_the_site_works_from_a_folder(tmp_path):
    pytest.importorskip("material", reason="building the site needs the docs extra")
    api = pytest.importorskip("playwright.sync_api", reason="opening the site needs playwright")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=120)
    asked, wrong = [], []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((tmp_path / "site" / "index.html").as_uri())
        page.click(".md-search__input")
        page.keyboard.type("ResRouting")
        page.wait_for_selector(".md-search-result__item")
        found = [link.get_attribute("href") for link in page.locator(".md-search-result__link").all()]
        browser.close()
    assert any("concepts.html" in href for href in found)
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:"))] == []
    assert wrong == []
