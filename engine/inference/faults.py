"""What an exception keeps alive, and letting go of it."""

import traceback

__all__ = ["let_go_of_frames"]


def let_go_of_frames(error: BaseException) -> None:
    """Clear the variables of every frame that an exception, or one behind it, came through.

    They may hold a model or its cache, and there is no memory for two.
    """
    seen = set[int]()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        left += [each.__cause__, each.__context__]
