# SPDX-License-Identifier: Apache-2.0
"""The contract of a storage: what goes in comes out, once, and for others at once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from lightning_subnet.errors import StudyMismatchError, TellError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.history import Evaluation
from lightning_subnet.study.storage import Storage, Study
from lightning_subnet.testing.problems import assert_clear, conditional, grid, mixed, record


def new_study(storage: Storage, name: str = "a", space: SearchSpace | None = None) -> Study:
    """Return a new study of a storage."""
    return storage.create_study(name, {"seed": 0}, space or grid(), {"numpy": "2"})


class StorageContract:
    """The tests that every storage inherits.

    Attributes:
        shared: Whether two storages of one place see the same rows; a database in memory does not.

    Example:
        >>> class TestFile(StorageContract):
        ...     def make(self, place):
        ...         return Storage(f"sqlite:///{place}/search.db")
    """

    shared: ClassVar[bool] = True

    def make(self, place: Path) -> Storage:
        """Return a storage in a folder; another one of the same place at every call.

        Args:
            place: An empty folder of the test. A server's database has a schema for each, say.
        """
        raise NotImplementedError

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        """The storage of a test, empty."""
        return self.make(tmp_path)

    def test_studies_are_kept_by_name(self, storage: Storage) -> None:
        assert storage.study_names() == []
        assert storage.find_study("apple") is None
        for name in ("zebra", "apple", "with 'quotes\" and ünicode/7"):
            new_study(storage, name, conditional())
        assert storage.study_names() == ["zebra", "apple", "with 'quotes\" and ünicode/7"]
        study = storage.find_study("with 'quotes\" and ünicode/7")
        assert study is not None
        assert study.header == {"seed": 0}
        assert study.versions == {"numpy": "2"}
        assert study.space == conditional()
        assert storage.find_study("Apple") is None

    @pytest.mark.parametrize("space", [grid(), conditional(), mixed(), grid(3, 4)], ids=repr)
    def test_evaluations_come_back_as_they_were(self, storage: Storage, space: SearchSpace) -> None:
        pool = space.restricted_to(space.sample(12, rng=0))
        for home in (space, pool):
            study = new_study(storage, repr(home), home)
            written = [
                Evaluation(0, s, {"f0": 1 / (i + 3), "f1": -1e300}, {"f0": 1e-17}, generation=i)
                for i, s in enumerate(home.sample(6, rng=1))
            ]
            reason = 'it\'s "broken" ümlaut\n;--'
            written += [
                Evaluation(0, s, {}, status="failed", reason=reason, seconds=0.25)
                for s in home
                if s not in [e.subnet for e in written]
            ][:3]
            stored = [study.add_evaluation(e) for e in written]
            assert [e.number for e in stored] == list(range(9))
            assert study.evaluations(home) == stored
            assert study.evaluations(home, start=7) == stored[7:]
            assert [e.subnet for e in stored] == [e.subnet for e in written]

    def test_generations_come_back_in_order(self, storage: Storage) -> None:
        space = conditional()
        study = new_study(storage, space=space)
        batches = [space.sample(n, rng=n) for n in (5, 1, 12)]
        for number, batch in enumerate(batches):
            assert study.add_generation(number, batch) == batch
        assert study.generations(space) == batches

    def test_the_generation_that_was_committed_first_stays(self, storage: Storage) -> None:
        study = new_study(storage)
        first, second = grid().sample(3, rng=0), grid().sample(3, rng=1)
        study.add_generation(0, first)
        assert study.add_generation(0, second) == first
        assert study.generations(grid()) == [first]

    def test_a_subnet_is_stored_once_in_a_study(self, storage: Storage) -> None:
        study, other = new_study(storage, "a"), new_study(storage, "b")
        study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 1.0}))
        with pytest.raises(TellError) as caught:
            study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 2.0}))
        assert_clear(caught.value, str(grid().smallest), "'a'", "measured once")
        assert [e.values["f0"] for e in study.evaluations(grid())] == [1.0]
        assert other.add_evaluation(Evaluation(0, grid().smallest, {"f0": 2.0})).number == 0

    def test_values_are_found_by_fingerprint_and_subnet(self, storage: Storage) -> None:
        prints = {"f0": "weights:f0", "latency_ms": "cpu-1"}
        a, b = grid().sample(2, rng=0)
        assert storage.known_values(prints, a) == {}
        new_study(storage, "a").add_evaluation(
            Evaluation(0, a, {"f0": 0.5, "latency_ms": 2.0, "f1": 9.0}, {"latency_ms": 0.25}),
            prints,
        )
        assert storage.known_values(prints, a) == {"f0": (0.5, 0.0), "latency_ms": (2.0, 0.25)}
        assert storage.known_values(prints | {"latency_ms": "cpu-2"}, a) == {"f0": (0.5, 0.0)}
        assert storage.known_values({"top1": "weights:f0"}, a) == {"top1": (0.5, 0.0)}
        assert storage.known_values(prints, b) == {}
        assert storage.known_values({}, a) == {}
        assert storage.values_of("cpu-1") == {a.key: (2.0, 0.25)}
        twin = grid().subnet(a.to_json())
        assert storage.known_values(prints, twin) == storage.known_values(prints, a)

    def test_the_first_value_of_a_fingerprint_stays(self, storage: Storage) -> None:
        for name, value in (("a", 1.0), ("b", 2.0)):
            new_study(storage, name).add_evaluation(
                Evaluation(0, grid().smallest, {"f0": value}), {"f0": "x"}
            )
        storage.keep_value("x", grid().smallest, 3.0, 0.5)
        assert storage.known_values({"f0": "x"}, grid().smallest) == {"f0": (1.0, 0.0)}

    def test_a_refused_evaluation_leaves_no_values(self, storage: Storage) -> None:
        study = new_study(storage)
        study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 1.0}))
        with pytest.raises(TellError):
            study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 2.0}), {"f0": "x"})
        assert storage.known_values({"f0": "x"}, grid().smallest) == {}

    def test_a_header_with_other_settings_shows_the_difference(self, storage: Storage) -> None:
        header = {"seed": 0, "strategy": {"name": "nsga2", "population": 50}, "x": [1, 2]}
        storage.create_study("a", header | {"same": None}, grid(), {})
        other = {"seed": 1, "strategy": {"name": "nsga2", "population": 20}, "y": "new"}
        with pytest.raises(StudyMismatchError) as caught:
            storage.create_study("a", other | {"same": None}, grid(), {})
        assert_clear(
            caught.value,
            "'a'",
            "seed: stored 0, now 1",
            "strategy.population: stored 50, now 20",
            "x: stored [1, 2], now nothing",
            'y: stored nothing, now "new"',
            "another name=",
        )
        assert "same" not in str(caught.value)
        study = storage.find_study("a")
        assert study is not None
        study.check(header | {"same": None})
        study.check({**header, "x": (1, 2), "same": None})  # a tuple is a list in JSON

    def test_equal_studies_created_twice_are_one(self, storage: Storage) -> None:
        first = new_study(storage)
        first.add_evaluation(Evaluation(0, grid().smallest, {"f0": 1.0}))
        second = new_study(storage)
        assert record(second.evaluations(grid())) == record(first.evaluations(grid()))
        assert storage.study_names() == ["a"]

    def test_a_study_is_forgotten_as_asked(self, storage: Storage) -> None:
        study = new_study(storage)
        study.add_generation(0, [grid().smallest])
        study.add_evaluation(Evaluation(0, grid().smallest, {"f0": 1.0}))
        assert study.has()
        study.forget()
        assert not study.has()
        assert study.generations(grid()) == [[grid().smallest]]
        study.forget(whole=True)
        assert storage.study_names() == []

    def test_committed_rows_are_there_for_others_at_once(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        study = new_study(storage)
        other = self.make(tmp_path).find_study("a")
        if not self.shared:
            assert other is None
            return
        assert other is not None
        for number, subnet in enumerate(grid().sample(5, rng=0)):
            study.add_evaluation(Evaluation(0, subnet, {"f0": 1.0}))
            assert len(other.evaluations(grid())) == number + 1
