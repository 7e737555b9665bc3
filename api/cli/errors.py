"""What stops a command: one sentence for a person, printed by `main`, and exit code 1."""

from typing import Any

__all__ = ["ApiProblem", "CliError", "ServiceUnreachable"]

REMEDIES = {
    401: "set ABQ_API_KEY or pass --key; abq up shows the first key",
    403: "use a key with that scope: abq keys create",
    429: "wait until running jobs have finished",
}
"""What would do where the service itself cannot know it."""


class CliError(Exception):
    """The command cannot go on."""


class ServiceUnreachable(CliError):
    """Nothing answers at the service's address."""


class ApiProblem(CliError):
    """The service refused, and said why in a problem document."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(sentence_of(status, problem))
        self.status = status
        self.code: str = str(problem.get("code") or "unknown")
        self.param: str | None = problem.get("param")


def sentence_of(status: int, problem: dict[str, Any]) -> str:
    """Say in one line what was refused, at which field, and what would do."""
    faults = [each for each in problem.get("errors") or () if isinstance(each, dict)]
    if faults:
        detail = "; ".join(_named(each.get("param"), each.get("message")) for each in faults)
    else:
        said = problem.get("detail") or problem.get("message") or problem.get("title")
        detail = _named(problem.get("param"), said)
    parts = [detail or f"the service answered {status}", REMEDIES.get(status)]
    line = "; ".join(part for part in parts if part)
    request_id = problem.get("request_id") if status >= 500 else None
    return f"{line} (request {request_id})" if request_id else line


def _named(param: object, said: object) -> str:
    """Put the field before the sentence, unless the sentence names it by itself."""
    sentence = str(said or "").strip().rstrip(".")
    if not param or str(param).rsplit(".", 1)[-1] in sentence:
        return sentence
    return f"{param}: {sentence}"
