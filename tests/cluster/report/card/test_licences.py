from pathlib import Path

import pytest

from cluster.report.card.licences import licence_of, metadata_of

TABLE = """\
# Sources

| file | source | Licence | rows |
| --- | --- | --- | --- |
| a.jsonl, b.jsonl.gz | somewhere | MIT | 3 |
| `c.csv` | elsewhere | CC BY-SA 4.0 | 4 |
"""


@pytest.mark.parametrize(
    ("name", "licence"),
    [("a.jsonl", "MIT"), ("b.jsonl.gz", "MIT"), ("c.csv", "CC BY-SA 4.0"), ("b.jsonl", "unknown"), ("d", "unknown")],
)
def test_a_table_of_sources_says_the_licence_of_the_files_that_it_names(tmp_path: Path, name: str, licence: str):
    (tmp_path / "SOURCES.md").write_text(TABLE)
    assert licence_of(tmp_path / name) == licence


def test_a_data_sets_card_goes_first(tmp_path: Path):
    (tmp_path / "SOURCES.md").write_text(TABLE)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A set\n")
    assert licence_of(tmp_path / "a.jsonl") == licence_of(tmp_path) == "apache-2.0"


@pytest.mark.parametrize(
    "card", ["no front matter", "---\n[1, 2]\n---\n", "---\n{: :\n---\n", "---\nlicense: [mit]\n---\n"]
)
def test_a_card_that_says_nothing_of_use_leaves_it_unknown(tmp_path: Path, card: str):
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path / "a.jsonl") == "unknown"


def test_without_anything_beside_it_nothing_is_known(tmp_path: Path):
    assert licence_of(tmp_path / "gone" / "a.jsonl") == "unknown"
    assert metadata_of(tmp_path) == {}
