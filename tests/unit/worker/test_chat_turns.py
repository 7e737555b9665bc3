"""What a chat template sees of a turn."""

import pytest

from worker.inference.schemas import MessageBody


def turn_with(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return MessageBody(role="assistant", tool_calls=(call,)).for_template()


def test_a_template_sees_arguments_of_a_call_as_an_object():
    turn = turn_with('{"place": "Rome", "days": 2}')

    [call] = turn["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"place": "Rome", "days": 2}}
    assert (call["id"], turn["content"]) == ("c", "")


@pytest.mark.parametrize("arguments", ["", '{"place": "Ro', "7", "[" * 100_000, {"a": 1}, None])
def test_arguments_that_are_no_text_of_an_object_stay_as_they_are(arguments):
    turn = turn_with(arguments)

    assert turn["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("call", [{}, {"function": "f"}, {"function": {"name": "f"}}])
def test_a_call_without_arguments_stays_as_it_is(call):
    turn = MessageBody(role="assistant", tool_calls=(call,)).for_template()

    assert turn["tool_calls"] == [call]
