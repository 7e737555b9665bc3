from api.cli.errors import ApiProblem


def test_a_sentence_that_names_its_field_is_left_as_it_is():
    message = "w_bits = 9 is not possible: use 1 to 8"
    problem = {"detail": message, "errors": [{"param": "spec.w_bits", "message": message}]}

    assert str(ApiProblem(422, problem)) == message


def test_a_field_that_the_sentence_leaves_out_is_put_before_it():
    problem = {"detail": "there is no such repository.", "param": "model"}

    assert str(ApiProblem(404, problem)) == "model: there is no such repository"


def test_several_faults_are_one_line():
    faults = [{"param": "a", "message": "a is required."}, {"param": "b", "message": "b is short."}]

    assert str(ApiProblem(422, {"errors": faults})) == "a is required; b is short"


def test_a_fault_of_the_service_carries_the_request_id():
    assert "req_1" in str(ApiProblem(500, {"detail": "It failed.", "request_id": "req_1"}))


def test_an_empty_answer_still_says_something():
    assert str(ApiProblem(502, {})) == "the service answered 502"
