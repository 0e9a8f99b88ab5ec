"""A signal to stop: remembered while there is something to save, and never ignored while there is not."""

from __future__ import annotations

import os
import signal

import pytest

from weftrain.core.stop import StopRequest, sigterm_unwinds


def test_a_signal_is_remembered_and_a_second_interrupt_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested()
        stop.leave_if_requested()
        for _ in range(2):  # a scheduler and torchrun may both send it
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.requested(), stop.number) == (True, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(SystemExit) as ended:
        stop.leave_if_requested()
    assert ended.value.code == 143


def test_what_another_process_was_asked_is_no_interrupt_of_this_one() -> None:
    with StopRequest() as stop:
        stop.ask(0)
        assert not stop.requested()
        stop.ask(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the first that reaches this process
        stop.ask(signal.SIGTERM)
        assert stop.number == signal.SIGINT


def test_a_signal_has_its_default_effect_where_nothing_can_be_saved_yet() -> None:
    with StopRequest() as stop:
        own = signal.getsignal(signal.SIGTERM)
        with stop.ends_at_once():
            assert {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} == {signal.SIG_DFL}
        assert signal.getsignal(signal.SIGTERM) == own
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit), stop.ends_at_once():
            pytest.fail("it had been asked to stop before")
        assert signal.getsignal(signal.SIGTERM) == own
    before = signal.getsignal(signal.SIGINT)  # a shell that started this in the background has it ignored
    with StopRequest().ends_at_once():  # never entered: no handler of anybody's is touched
        assert signal.getsignal(signal.SIGINT) == before


def test_sigterm_unwinds_what_is_under_way() -> None:
    tidied = []
    with pytest.raises(SystemExit) as ended, sigterm_unwinds():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            tidied.append(True)
    assert (ended.value.code, tidied) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with StopRequest() as stop, sigterm_unwinds():  # somebody handles it already
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_what_schedulers_and_terminals_send_stops_too(number: int) -> None:
    now = 100.0
    with StopRequest(lambda: now) as stop:
        assert stop.asked_s() == 0
        os.kill(os.getpid(), number)
        now = 107.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.number, stop.asked_s()) == (number, 7.0)


def test_a_request_to_save_does_not_stop() -> None:
    with StopRequest() as stop:
        assert not stop.take_save()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR2)
        assert (stop.take_save(), stop.take_save(), stop.requested()) == (True, False, False)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
