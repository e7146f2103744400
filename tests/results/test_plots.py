# SPDX-License-Identifier: Apache-2.0
"""Pictures of results."""

from __future__ import annotations

import matplotlib as mpl
import pytest

from lightning_subnet.errors import ObjectiveError
from tests.problems import Counting, assert_clear, search_of
from tests.results.test_record import result_of

mpl.use("Agg")


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_plot_returns_figure_and_axes(m: int) -> None:
    import matplotlib.pyplot as plt

    result = search_of(objectives={f"f{k}": "min" for k in range(m)}, budget=12).run(
        Counting(m), progress=False
    )
    figure, ax = result.plot()
    assert ax.figure is figure
    assert ax.get_ylabel().startswith("f0")
    own_figure, own = plt.subplots()
    assert result.plot(ax=own) == (own_figure, own)
    if m >= 3:
        assert result.plot(x="f2", y="f1")[1].get_xlabel().startswith("f2")
    plt.close("all")


def test_plotting_an_unknown_measure_names_those_there_are() -> None:
    with pytest.raises(ObjectiveError) as caught:
        result_of().plot(x="mss")
    assert_clear(caught.value, "'mss' was not recorded", "Did you mean 'ms'?")


def test_a_result_without_measurements_cannot_be_drawn() -> None:
    failed = search_of()
    failed.fail(failed.ask()[0], "broken")
    for result in (search_of().result(), failed.result()):
        with pytest.raises(ObjectiveError) as caught:
            result.plot()
        assert_clear(caught.value, "not recorded", "Recorded: nothing")
