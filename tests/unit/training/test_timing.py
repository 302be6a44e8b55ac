"""Every moment of a step belongs to one part; what no step holds, to none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from matformer_dist.training.measurements import Stragglers, _peak_tflops, slowest_rank
from matformer_dist.training.timing import PARTS, Clock
from tests.distributed.training_cases import tiny_config


class Seconds:
    """Time that passes only where a test says so; marks are past once `now` is told to be."""

    def __init__(self) -> None:
        self.now = 0.0
        self.past = True
        self.ours = True
        self.waits = 0

    def mark(self) -> float:
        return self.now

    def is_ours(self) -> bool:
        return self.ours

    def is_past(self, _: float) -> bool:
        return self.past

    def wait(self, _: float) -> None:
        self.waits += 1

    def seconds(self, begun: float, ended: float) -> float:
        return ended - begun

    def give_back(self, marks: list[float]) -> None:
        pass


@pytest.fixture
def time() -> Seconds:
    return Seconds()


@pytest.fixture
def clock(time: Seconds) -> Clock:
    clock = Clock(torch.device("cpu"))
    clock._time = time  # type: ignore[assignment]
    return clock


class Head(nn.Module):
    def __init__(self, clock: Clock, time: Seconds) -> None:
        super().__init__()
        self.clock, self.time = clock, time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.time.now += 1.5
        collective(self.clock, self.time, 0.5)
        return x


class Model(nn.Module):
    """A pass of 5 s, of which the head takes 2, and of these a collective 0.5."""

    def __init__(self, clock: Clock, time: Seconds) -> None:
        super().__init__()
        self.head = Head(clock, time)
        self.time = time
        clock.watch(self.head, "loss")

    def forward(self, x: torch.Tensor) -> Any:
        self.time.now += 3
        return self.head(x)


def collective(clock: Clock, time: Seconds, seconds: float) -> None:
    counted = clock.begin_communication()
    time.now += seconds
    if counted:
        clock.end_communication()


def step(clock: Clock, time: Seconds, model: Model) -> None:
    with clock.step():
        with clock.part("data"):
            time.now += 1
            collective(clock, time, 1)  # there, a stream waits for copies
        with clock.part("forward"):
            model(torch.zeros(1))
        with clock.part("backward"):
            time.now += 7
            collective(clock, time, 4)
        with clock.part("optimizer"):
            time.now += 0.25
        time.now += 0.125


def test_parts_are_exclusive_and_sum_to_the_step(clock: Clock, time: Seconds) -> None:
    model = Model(clock, time)
    for _ in range(3):
        begun = time.now
        step(clock, time, model)
        assert time.now - begun == 18.375
        model(torch.zeros(1))  # an evaluation
        time.now += 1000
    assert clock.take() == {
        "data": 2, "forward": 3, "loss": 1.5, "backward": 7, "optimizer": 0.25,
        "communication": 4.5, "other": 0.125,
    }  # fmt: skip
    assert clock.take() == dict.fromkeys(PARTS, 0.0)


def test_marks_are_waited_for_only_when_they_are_asked_for(clock: Clock, time: Seconds) -> None:
    time.past = False
    model = Model(clock, time)
    for _ in range(4):
        step(clock, time, model)
        time.now += 1000  # between steps: of no step, though the marks are read later
    waits = [time.waits]
    assert sum(clock.take().values()) == 18.375
    assert [*waits, time.waits] == [0, 1]


def test_a_collective_beside_the_computing_stream_is_not_waited_for(
    clock: Clock, time: Seconds
) -> None:
    with clock.step(), clock.part("backward"):
        time.ours = False
        collective(clock, time, 5)
        time.ours = True
        collective(clock, time, 3)
    assert clock.take()["backward"] == 5


def test_the_slowest_rank_is_the_one_with_most_work_of_its_own() -> None:
    waits = PARTS.index("communication")
    rows = [[1.0] * len(PARTS) for _ in range(3)]
    rows[0][waits], rows[1][0], rows[2][waits] = 9.0, 4.0, 9.0
    assert slowest_rank(rows, "abc") == {"rank": 1, "host": "b", "ratio": 1.5}
    assert slowest_rank(rows[1:], "bc") == {"rank": 0, "host": "b", "ratio": 1.5}
    assert slowest_rank(rows[:1], "a") == {"rank": 0, "host": "a", "ratio": 1.0}


def test_mfu_is_by_the_peak_that_is_set_or_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    plain, bf16 = tiny_config(), tiny_config(training={"precision": "bf16"})
    stated = tiny_config(logging={"peak_tflops": 5.0})
    assert [_peak_tflops(one, gpu) for one in (plain, bf16, stated)] == [67, 989, 5]
    assert [_peak_tflops(one, cpu) for one in (plain, stated)] == [None, 5]
    name = "NVIDIA Unheard Of"
    assert _peak_tflops(bf16, gpu) is None


def test_a_straggler_is_named_once_when_it_stays_one() -> None:
    def said(*lines: tuple[int, float]) -> list[str | None]:
        stragglers = Stragglers()
        return [
            stragglers.look_at({"slowest_rank": {"rank": rank, "host": "n", "ratio": ratio}})
            for rank, ratio in lines
        ]

    slow, fine, other = (3, 1.3), (3, 1.1), (2, 1.3)
    assert not any(said(*[slow] * 4, fine, *[slow] * 4))
    assert not any(said(*[slow, slow, other] * 5))
    warnings = said(*[slow] * 20, *[other] * 5)
    assert [i for i, warning in enumerate(warnings) if warning] == [4, 24]
    assert str(warnings[4]).startswith("rank 3 on n holds the others up: its own work takes 1.30")
