from pathlib import Path

import pytest

from tests.labeling_pages import ranking, serving


def test_a_port_that_is_taken_is_named_with_the_remedy(tmp_path: Path):
    with serving(tmp_path / "one", [ranking("one")]) as served:
        port = int(served.url.rpartition(":")[2])
        reason = f"the labeling page cannot listen on 127.0.0.1:{port} .*; take another port, or 0"
        with pytest.raises(OSError, match=reason), serving(tmp_path / "two", [ranking("one")], port=port):
            pass
