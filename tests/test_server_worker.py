"""The engine process's pump, run in a thread: what it leaves behind when requests end."""

import gc
import socket
import threading

import pytest

from flashformer.engine.llm import LLM
from flashformer.engine.sequence import Request
from flashformer.serve.server import wire
from flashformer.serve.server.grammars import GrammarQueue
from flashformer.serve.server.worker import Worker


@pytest.fixture
def channel():
    """The server's end of a pump on the reference backend."""
    ours, theirs = socket.socketpair()
    grammars = GrammarQueue()
    with LLM(device="reference", context=64) as llm, ours, theirs:
        worker = Worker(wire.Channel(theirs, [grammars.descriptor]), llm, grammars)

        def pump():
            with pytest.raises(EOFError):
                worker.run()

        thread = threading.Thread(target=pump)
        thread.start()
        yield wire.Channel(ours)
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()


def steps_of(channel, key):
    """The steps of a request, one after the other."""
    while True:
        for message in channel.receive(10):
            if isinstance(message, wire.Step) and any(k == key for k, _ in message.events):
                yield message


def test_ended_and_cancelled_requests_do_not_wait_for_the_garbage_collector(channel):
    def submit(key, max_tokens):
        params = {"max_tokens": max_tokens, "ignore_eos": True, "n": 2}
        channel.send(wire.Submit(key, ((5, 9), (4,)), params))

    def alive():
        return sum(type(thing) is Request for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        submit(1, 2)
        ended = 0
        for step in steps_of(channel, 1):
            ended += sum(event.finish_reason is not None for _, event in step.events)
            if ended == 4:
                break
        submit(2, 50)
        next(steps_of(channel, 2))
        assert alive() == 2
        channel.send(wire.Cancel(2))
        submit(3, 1)  # which is answered when the cancellation has been done
        next(steps_of(channel, 3))
        assert alive() <= 2  # of the third request alone
    finally:
        gc.enable()
