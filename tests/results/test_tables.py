# SPDX-License-Identifier: Apache-2.0
"""Results as text and as data frames."""

from __future__ import annotations

from tests.results.test_record import result_of


def test_data_frame_marks_the_front() -> None:
    frame = result_of().to_dataframe()
    assert frame["front"].tolist() == [True, True, False, True, True, False]
    assert frame["acc"].tolist()[:5] == [0.9, 0.8, 0.7, 0.5, 0.8]
    assert frame.loc[5, "status"] == "failed"


def test_text_shows_the_front() -> None:
    text = str(result_of())
    assert "6 evaluations, 1 failed, 4 on the front of 10 subnets" in text
    assert len(text.splitlines()) == 1 + 1 + 4
    assert "n=3" in text
    assert "4 on the front" in repr(result_of())
