import string

import pytest

from api.auth import ALPHABET, Principal, authenticate, hash_key, is_well_formed, new_key
from api.errors import KeyMissing, KeyRejected
from api.schemas.keys import Scope


def test_a_key_is_one_word_of_known_form_with_178_random_bits():
    key = new_key()

    assert key.startswith("abq_live_")
    assert len(key) == 9 + 30 + 6
    assert set(key.removeprefix("abq_live_")) <= set(string.ascii_letters + string.digits)
    assert len(ALPHABET) ** 30 > 2**178
    assert len({new_key() for _ in range(1000)}) == 1000


def test_every_typing_error_of_one_character_is_found_without_a_database():
    key = new_key()

    mistyped = [
        key[:place] + other + key[place + 1 :]
        for place in range(len(key))
        for other in "aZ0-"
        if other != key[place]
    ]

    assert is_well_formed(key)
    assert not any(is_well_formed(each) for each in mistyped)


@pytest.mark.parametrize(
    "text",
    ["", "abq_live_", "x" * 45, new_key()[:-1], new_key() + "0", "ä" * 45],
    ids=["none", "prefix", "no-prefix", "short", "long", "not-ascii"],
)
def test_what_is_no_key_is_refused_before_any_query(text):
    expected = KeyRejected if text else KeyMissing

    with pytest.raises(expected):
        authenticate(None, text)


def test_what_is_stored_of_a_key_does_not_contain_it():
    key = new_key()

    assert len(hash_key(key)) == 64
    assert key[9:20] not in hash_key(key)
    assert hash_key(key) == hash_key(key) != hash_key(new_key())


def test_admin_stands_for_every_scope_and_no_other_scope_does():
    def holder(scope):
        return Principal(tenant_id="t", key_id="k", scopes=frozenset({scope}))

    assert all(holder(Scope.ADMIN).may(scope) for scope in Scope)
    for scope in set(Scope) - {Scope.ADMIN}:
        assert [each for each in Scope if holder(scope).may(each)] == [scope]
