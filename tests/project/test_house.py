"""The picture of the house and its words: see docs/design.md."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "dev"))

import house


def test_the_picture_shows_the_imports_of_today():
    assert house.picture() == house.PICTURE.read_text("utf-8"), "run `make picture`"


def test_the_package_uses_no_words_of_its_own():
    words = re.compile(
        r"\b(portions?|beside|anew|by lot|letters_of|blot|straddl\w+)\b", re.IGNORECASE
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in house.python_files(house.PACKAGE)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


def test_no_private_name_of_another_package_is_used():
    private = re.compile(r"\bjax\._src|type_handlers|HfHubHTTPError\.__|huggingface_hub\._")
    for path in house.python_files(house.PACKAGE):
        assert not private.search(path.read_text("utf-8")), path
