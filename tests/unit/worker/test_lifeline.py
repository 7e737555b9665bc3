import os
import signal
import time

from worker.lifeline import Lifeline


def test_a_pool_process_sees_that_its_worker_stops():
    lifeline = Lifeline.open()
    assert not lifeline.is_cut()

    lifeline.let_go()

    assert lifeline.is_cut()


def test_a_pool_process_sees_that_its_worker_was_killed():
    lifeline = Lifeline.open()
    holder = os.fork()
    if holder == 0:
        time.sleep(60)
    lifeline.let_go()
    assert not lifeline.is_cut()

    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)

    assert lifeline.wait(5.0)


def test_letting_go_twice_harms_nothing():
    lifeline = Lifeline.open()

    lifeline.let_go()
    lifeline.let_go()

    assert lifeline.is_cut()
